//! The client against qemu-storage-daemon, a server that we did not write, through both engines.
//! It has no zones; those are tested against `client_zoned.rs`'s device.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use zbdkit_testkit::client::channel::{self, Channel, code};
use zbdkit_testkit::client::peer::QemuStorageDaemon;
use zbdkit_testkit::client::ring::{Desc, INDIRECT, NEXT, WRITE};
use zbdkit_testkit::client::{
    Client, ClientError, EngineKind, Framing, Options, Request, Status, feature, op,
};

const SIZE: u64 = 16 << 20;
const ENGINES: [EngineKind; 2] = [EngineKind::Ours, EngineKind::VirtioDriver];

struct Server {
    daemon: QemuStorageDaemon,
    dir: tempfile::TempDir,
}

/// A daemon on an empty file; `None`, loudly, where there is none.
fn server(queues: u16) -> Option<Server> {
    if let Some(why) = QemuStorageDaemon::missing() {
        eprintln!("SKIPPED: needs qemu-storage-daemon: {why}");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk.raw");
    std::fs::File::create(&file).unwrap().set_len(SIZE).unwrap();
    let daemon = QemuStorageDaemon::start(&file, "", &dir.path().join("sock"), queues).unwrap();
    Some(Server { daemon, dir })
}

impl Server {
    fn connect(&self, options: &Options) -> Client {
        Client::connect(self.daemon.socket(), options).unwrap()
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("disk.raw")
    }
}

fn options(engine: EngineKind) -> Options {
    Options {
        engine,
        ..Options::default()
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 512) as u8 ^ i as u8 ^ seed).collect()
}

#[test]
fn every_plain_request_does_what_it_says() {
    let Some(server) = server(1) else { return };
    for engine in ENGINES {
        let mut client = server.connect(&options(engine));
        assert_eq!(client.config().capacity, SIZE / 512);
        assert_eq!(client.read_config().unwrap(), *client.config());
        assert_ne!(client.features() & feature::VERSION_1, 0);
        assert_eq!(client.features() & feature::ZONED, 0, "this server has no zones");
        let queue = client.queue(0);
        let data = pattern(64 << 10, 3);
        queue.write(8, &data).unwrap();
        queue.flush().unwrap();
        assert_eq!(std::fs::read(server.file()).unwrap()[4096..][..data.len()], data);
        assert_eq!(queue.read(8, 64 << 10).unwrap(), data);
        queue.write_zeroes(16, 8, false).unwrap();
        queue.discard(32, 8).unwrap();
        assert_eq!(queue.read(8, 4096).unwrap(), data[..4096]);
        assert_eq!(queue.read(16, 4096).unwrap(), [0; 4096]);
        assert_eq!(queue.get_id().unwrap(), b"vhost_user_blk");
        let past = queue.read(SIZE / 512, 512).unwrap_err();
        assert!(matches!(past, ClientError::Status(Status::IOERR)), "{past}");
        for unknown in [Request::ZoneResetAll, Request::ZoneOpen(0)] {
            assert_eq!(queue.run(&unknown).unwrap().status, Status::UNSUPP);
        }
    }
}

#[test]
fn many_requests_are_in_flight_on_many_queues_and_threads() {
    let Some(server) = server(4) else { return };
    for engine in ENGINES {
        let mut client = server.connect(&Options {
            queues: 4,
            ..options(engine)
        });
        std::thread::scope(|scope| {
            for (number, mut queue) in client.take_queues().into_iter().enumerate() {
                scope.spawn(move || {
                    let base = number as u64 * 4096;
                    for pass in 0..20u8 {
                        let mut tickets = BTreeMap::new();
                        for i in 0..32 {
                            let data = pattern(4096, pass ^ i as u8);
                            let request = Request::Write {
                                sector: base + i * 8,
                                data,
                            };
                            tickets.insert(queue.submit(&request).unwrap(), i);
                        }
                        assert!(matches!(
                            queue.submit(&Request::Flush),
                            Err(ClientError::QueueFull)
                        ));
                        while !tickets.is_empty() {
                            let done = queue.wait().unwrap();
                            assert_eq!(done.status, Status::OK);
                            let i = tickets.remove(&done.ticket).expect("each completes once");
                            assert_eq!(queue.in_flight(), tickets.len(), "after {i}");
                        }
                        for i in 0..32 {
                            let read = queue.read(base + i * 8, 4096).unwrap();
                            assert_eq!(read, pattern(4096, pass ^ i as u8));
                        }
                    }
                });
            }
        });
    }
}

#[test]
fn framing_and_ring_features_make_no_difference() {
    let Some(server) = server(1) else { return };
    let rings = [
        0,
        feature::EVENT_IDX,
        feature::INDIRECT_DESC,
        feature::EVENT_IDX | feature::INDIRECT_DESC,
    ];
    let framings = [
        Framing::default(),
        Framing::LINUX,
        Framing {
            merge_header: true,
            ..Framing::default()
        },
        Framing {
            chunk: Some(5),
            indirect: true,
            ..Framing::default()
        },
        Framing {
            chunk: Some(512),
            ..Framing::default()
        },
    ];
    for (round, features) in rings.into_iter().enumerate() {
        let features = feature::ALL & !(feature::EVENT_IDX | feature::INDIRECT_DESC) | features;
        let mut client = server.connect(&Options {
            features,
            ..Options::default()
        });
        for (i, framing) in framings.into_iter().enumerate() {
            let queue = client.queue(0);
            queue.set_framing(framing);
            // In pieces of 5 bytes, within this server's 1024 segments.
            let len = if framing.chunk == Some(5) { 512 } else { 4096 };
            let data = pattern(len, (round * 16 + i) as u8);
            queue.write(i as u64 * 8, &data).unwrap();
            assert_eq!(queue.read(i as u64 * 8, len as u32).unwrap(), data, "{framing:?}");
        }
    }
}

#[test]
fn chains_made_by_hand_reach_the_device() {
    let Some(server) = server(1) else { return };
    let mut client = server.connect(&Options::default());
    client.queue(0).write(0, &pattern(1024, 9)).unwrap();
    let scratch = client.scratch().clone();
    let scratch_end = scratch.guest() + scratch.len() as u64;

    // A read header, and data that begins in the first region and ends in the second.
    scratch.store_u64(4096, u64::from(op::READ), std::sync::atomic::Ordering::Relaxed);
    scratch.store_u64(4104, 0, std::sync::atomic::Ordering::Relaxed);
    let header = Desc {
        addr: scratch.guest() + 4096,
        len: 16,
        flags: 0,
        next: 0,
    };
    let data = Desc {
        addr: scratch.guest() - 512,
        len: 1024,
        flags: WRITE,
        next: 0,
    };
    let status = Desc {
        addr: scratch.guest() + 8192,
        len: 1,
        flags: WRITE,
        next: 0,
    };
    scratch.fill(8192, 1, 0xff);
    let ring = client.queue(0).ring().unwrap();
    let ids = ring.reserve(3).unwrap();
    for (i, desc) in [header, data, status].into_iter().enumerate() {
        let flags = desc.flags | if i < 2 { NEXT } else { 0 };
        let next = ids.get(i + 1).copied().unwrap_or(0);
        Desc { flags, next, ..desc }.store(ring.descriptors(), ids[i].into());
    }
    ring.push_by_hand(ids[0]);
    let used = client.queue(0).wait_by_hand().unwrap();
    assert_eq!((used.head, scratch.to_vec(8192, 1)), (ids[0].into(), vec![0]));
    assert_eq!(scratch.to_vec(0, 512), pattern(1024, 9)[512..]);

    // The same with the data outside all memory: whatever this server does, the client reports it.
    let ring = client.queue(0).ring().unwrap();
    let beyond = Desc {
        addr: scratch_end,
        len: 512,
        flags: WRITE | NEXT,
        next: ids[2],
    };
    beyond.store(ring.descriptors(), ids[1].into());
    ring.push_by_hand(ids[0]);
    client.queue(0).set_patience(Duration::from_millis(500));
    let outcome = client.queue(0).wait_by_hand();
    assert!(
        !matches!(outcome, Err(ClientError::UnexpectedUsed(_))),
        "{outcome:?}"
    );

    // An indirect table that points to itself, on a new connection.
    drop(client);
    let mut client = server.connect(&Options::default());
    let table = client.scratch().clone();
    let ring = client.queue(0).ring().unwrap();
    let ids = ring.reserve(1).unwrap();
    let within = Desc {
        addr: table.guest(),
        len: 16,
        flags: INDIRECT,
        next: 0,
    };
    within.store(&table, 0);
    within.store(ring.descriptors(), ids[0].into());
    ring.push_by_hand(ids[0]);
    client.queue(0).set_patience(Duration::from_millis(500));
    let outcome = client.queue(0).wait_by_hand();
    assert!(
        !matches!(outcome, Err(ClientError::UnexpectedUsed(_))),
        "{outcome:?}"
    );
}

#[test]
fn a_stopped_queue_goes_on_where_it_was() {
    let Some(server) = server(1) else { return };
    let mut client = server.connect(&Options::default());
    for i in 0..5 {
        client.queue(0).write(i * 8, &pattern(4096, i as u8)).unwrap();
    }
    let base = client.stop_queue(0).unwrap();
    assert_eq!(base, 5);
    client.restart_queue(0, base).unwrap();
    assert_eq!(client.queue(0).read(32, 4096).unwrap(), pattern(4096, 4));
}

#[test]
fn raw_messages_show_what_the_server_answers() {
    let Some(server) = server(1) else { return };
    let patience = Duration::from_secs(5);
    let channel = Channel::connect(server.daemon.socket(), patience).unwrap();
    let features = channel.ask_u64(code::GET_FEATURES).unwrap();
    assert_ne!(features & feature::PROTOCOL_FEATURES, 0);
    assert!(
        channel.get_config(0, 257).is_err(),
        "more than any configuration space"
    );
    drop(channel);

    // A queue that does not exist: this server acknowledges it, and then hangs up.
    let mut channel = Channel::connect(server.daemon.socket(), patience).unwrap();
    channel
        .tell_u64("SET_PROTOCOL_FEATURES", code::SET_PROTOCOL_FEATURES, 1 << 3)
        .unwrap();
    channel.set_reply_ack(true);
    let file = tempfile::tempfile().unwrap();
    let index = 99u64.to_le_bytes();
    channel
        .tell("SET_VRING_KICK", code::SET_VRING_KICK, &index, &[file.as_fd()])
        .unwrap();
    channel.wait_closed().unwrap();
    drop(channel);

    // A header that promises more than comes, then a hang-up; the server serves the next one.
    let channel = Channel::connect(server.daemon.socket(), patience).unwrap();
    channel
        .send_bytes(
            &channel::message_bytes(code::SET_FEATURES, channel::VERSION, 8, &[1, 2]),
            &[],
        )
        .unwrap();
    drop(channel);
    server.connect(&Options::default()).queue(0).read(0, 512).unwrap();
}

#[test]
fn a_deadline_ends_waiting_for_a_server_that_is_silent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    for engine in ENGINES {
        let options = Options {
            patience: Duration::from_millis(100),
            ..options(engine)
        };
        let error = Client::connect(&path, &options).unwrap_err();
        assert!(matches!(error, ClientError::Timeout(_)), "{error}");
    }
}
