//! The life of connections, and front-ends that break the protocol: at most their own connection goes.

mod common;

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{PLAIN, Rig, ZONED, open, pattern};
use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use zbdkit_export::vhost_user_blk::{BindError, ServeOptions, Server, Socket};
use zbdkit_io::unix::ListenError;
use zbdkit_testkit::client::channel::{self, Channel, NEED_REPLY, REPLY, VERSION, code, protocol_feature};
use zbdkit_testkit::client::memory::{RegionSpec, SharedMemory};
use zbdkit_testkit::client::{Client, ClientError, Request, Status, device_status, feature};

const PATIENCE: Duration = Duration::from_secs(20);

fn channel(rig: &Rig) -> Channel {
    Channel::connect(&rig.socket(), PATIENCE).unwrap()
}

fn channel_with_ack(rig: &Rig) -> Channel {
    let mut channel = channel(rig);
    let all = channel.ask_u64(code::GET_PROTOCOL_FEATURES).unwrap();
    channel
        .tell_u64("SET_PROTOCOL_FEATURES", code::SET_PROTOCOL_FEATURES, all)
        .unwrap();
    channel.set_reply_ack(true);
    channel
}

fn works(rig: &Rig) {
    rig.client().queue(0).read(0, 4096).unwrap();
}

#[test]
fn what_is_on_offer_is_what_is_promised() {
    let rig = Rig::new(PLAIN);
    let channel = channel(&rig);
    let expected = protocol_feature::MQ
        | protocol_feature::REPLY_ACK
        | protocol_feature::CONFIG
        | protocol_feature::RESET_DEVICE
        | protocol_feature::CONFIGURE_MEM_SLOTS
        | protocol_feature::STATUS;
    assert_eq!(channel.ask_u64(code::GET_PROTOCOL_FEATURES).unwrap(), expected);
    assert_eq!(channel.ask_u64(code::GET_QUEUE_NUM).unwrap(), 2);
    assert!(channel.ask_u64(code::GET_MAX_MEM_SLOTS).unwrap() >= 32);
    assert_ne!(
        channel.ask_u64(code::GET_FEATURES).unwrap() & feature::PROTOCOL_FEATURES,
        0
    );
}

#[test]
fn a_bad_message_is_refused_where_the_front_end_can_be_told() {
    let rig = Rig::new(PLAIN);
    let channel = channel_with_ack(&rig);
    let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let state = |index, num| channel::vring_state(index, num).to_vec();
    let addr = channel::vring_addr(0, 1, 0, 0, 0);
    let region = [vec![0; 8], channel::memory_region(0, 4096, 0, 0)].concat();
    let table = [
        vec![1, 0, 0, 0, 0, 0, 0, 0],
        channel::memory_region(0, 1 << 40, 0, 0),
    ]
    .concat();
    let config = channel::config_payload;
    let cases: Vec<(&str, u32, Vec<u8>, usize)> = vec![
        ("unknown request", 99, vec![], 0),
        ("SET_LOG_BASE", 6, vec![0; 16], 1),
        ("SET_INFLIGHT_FD", code::SET_INFLIGHT_FD, vec![0; 24], 1),
        ("size", code::SET_FEATURES, vec![0; 7], 0),
        ("size of an empty one", code::SET_OWNER, vec![0; 8], 0),
        ("descriptors", code::SET_FEATURES, vec![0; 8], 1),
        ("no descriptor", code::SET_VRING_KICK, vec![0; 8], 0),
        (
            "kick by polling",
            code::SET_VRING_KICK,
            0x100u64.to_le_bytes().to_vec(),
            0,
        ),
        (
            "queue of kick",
            code::SET_VRING_KICK,
            2u64.to_le_bytes().to_vec(),
            1,
        ),
        ("queue", code::SET_VRING_NUM, state(2, 128), 0),
        ("ring of 0", code::SET_VRING_NUM, state(0, 0), 0),
        ("ring of 3", code::SET_VRING_NUM, state(0, 3), 0),
        ("ring of 64 Ki", code::SET_VRING_NUM, state(0, 0x10000), 0),
        ("base", code::SET_VRING_BASE, state(0, 0x10000), 0),
        ("logging", code::SET_VRING_ADDR, addr, 0),
        ("enable", code::SET_VRING_ENABLE, state(u32::MAX, 1), 0),
        ("features", code::SET_FEATURES, u64::MAX.to_le_bytes().to_vec(), 0),
        (
            "protocol features",
            code::SET_PROTOCOL_FEATURES,
            u64::MAX.to_le_bytes().to_vec(),
            0,
        ),
        ("table without descriptors", code::SET_MEM_TABLE, table.clone(), 0),
        ("table of a file that is too short", code::SET_MEM_TABLE, table, 1),
        (
            "table of 9 regions",
            code::SET_MEM_TABLE,
            vec![9, 0, 0, 0, 0, 0, 0, 0],
            0,
        ),
        ("region of no memory", code::ADD_MEM_REG, region.clone(), 1),
        ("region that is not there", code::REM_MEM_REG, region, 0),
        ("status", code::SET_STATUS, 0x100u64.to_le_bytes().to_vec(), 0),
        ("config, read-only", code::SET_CONFIG, config(0, 0, &[1; 8]), 0),
        ("config, too far", code::SET_CONFIG, config(256, 0, &[1]), 0),
    ];
    for (what, code, payload, fds) in cases {
        let fds = vec![null.as_fd(); fds];
        let error = channel.tell("it", code, &payload, &fds).unwrap_err();
        assert!(matches!(error, ClientError::Refused { .. }), "{what}: {error}");
    }
    assert_eq!(
        channel.ask_u64(code::GET_QUEUE_NUM).unwrap(),
        2,
        "the stream is in step"
    );
}

#[test]
fn a_bad_message_closes_the_connection_where_the_front_end_cannot_be_told() {
    let rig = Rig::new(PLAIN);
    let bytes = |code, flags, size, payload: &[u8]| channel::message_bytes(code, flags, size, payload);
    let cases = [
        ("version", bytes(code::GET_FEATURES, 2, 0, &[])),
        ("endless", bytes(code::SET_FEATURES, VERSION, u32::MAX, &[])),
        ("long", bytes(code::SET_FEATURES, VERSION, 4097, &[0; 4097])),
        ("a reply", bytes(code::GET_FEATURES, VERSION | REPLY, 0, &[])),
        ("unknown", bytes(99, VERSION, 0, &[])),
        (
            "unknown, acknowledgement not negotiated",
            bytes(99, VERSION | NEED_REPLY, 0, &[]),
        ),
        ("size", bytes(code::SET_FEATURES, VERSION, 4, &[0; 4])),
        (
            "base of no queue",
            bytes(code::GET_VRING_BASE, VERSION, 8, &channel::vring_state(7, 0)),
        ),
        (
            "no queue",
            bytes(code::SET_VRING_NUM, VERSION, 8, &channel::vring_state(7, 1)),
        ),
    ];
    for (what, bytes) in cases {
        let channel = channel(&rig);
        channel.send_bytes(&bytes, &[]).unwrap();
        channel
            .wait_closed()
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        works(&rig);
    }
}

#[test]
fn config_outside_of_its_space_is_answered_by_an_empty_payload() {
    let rig = Rig::new(ZONED);
    let channel = channel(&rig);
    for (offset, len) in [(0, 257), (256, 1), (255, 2), (u32::MAX, 1), (0, 0)] {
        let payload = channel::config_payload(offset, 0, &vec![0; len]);
        channel.send(code::GET_CONFIG, 0, &payload, &[]).unwrap();
        let reply = channel.receive_reply(code::GET_CONFIG).unwrap();
        assert!(reply.payload.is_empty(), "{offset} {len}");
    }
    let whole = channel.get_config(0, 256).unwrap();
    assert_eq!(whole[96..], [0; 160]);
    for (offset, len) in [(0, 8), (72, 24), (92, 1), (95, 10), (96, 100), (255, 1)] {
        let slice = channel.get_config(offset, len).unwrap();
        assert_eq!(
            slice,
            whole[offset as usize..(offset + len) as usize],
            "{offset} {len}"
        );
    }
}

#[test]
fn the_server_outlives_clients_that_go_in_the_middle_of_anything() {
    let rig = Rig::new(PLAIN);
    for cut in [1, 11, 12, 15] {
        let mut socket = UnixStream::connect(rig.socket()).unwrap();
        let message = channel::message_bytes(code::SET_FEATURES, VERSION, 8, &[0; 8]);
        socket.write_all(&message[..cut]).unwrap();
        drop(socket);
        works(&rig);
    }
    for round in 0..20 {
        let mut client = rig.client();
        for n in 0..32 {
            client
                .queue(0)
                .submit(&Request::Write {
                    sector: n * 8,
                    data: pattern(round, 4096),
                })
                .unwrap();
        }
        client.queue(0).publish().unwrap();
        drop(client);
    }
    works(&rig);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_end_the_server(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        messages in proptest::collection::vec(
            (0u32..45, any::<bool>(), proptest::collection::vec(any::<u8>(), 0..60), 0usize..3), 0..10)
    ) {
        thread_local!(static RIG: Rig = Rig::new(PLAIN));
        RIG.with(|rig| {
            let channel = channel_with_ack(rig);
            let memfd = SharedMemory::new(&[RegionSpec { guest: Some(0), len: 4096 }]).unwrap();
            for (code, ack, payload, fds) in messages {
                let fds = vec![memfd.regions()[0].fd(); fds];
                let flags = if ack { NEED_REPLY } else { 0 };
                if channel.send(code, flags, &payload, &fds).is_err() {
                    break;
                }
            }
            let _ = channel.send_bytes(&bytes, &[]);
            drop(channel);
            works(rig);
        });
    }
}

#[test]
fn a_second_front_end_waits_until_the_first_is_gone() {
    let rig = Rig::new(PLAIN);
    let mut first = rig.client();
    let gone = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let second = scope.spawn(|| {
            let mut second = rig.client();
            assert!(
                gone.load(Ordering::SeqCst),
                "served while the first was connected"
            );
            second.queue(0).read(0, 4096).unwrap()
        });
        for _ in 0..100 {
            first.queue(0).write(0, &[9; 4096]).unwrap();
        }
        gone.store(true, Ordering::SeqCst);
        drop(first);
        assert_eq!(second.join().unwrap(), [9; 4096]);
    });
}

#[test]
fn getting_the_base_of_a_ring_drains_it() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client();
    for round in 0..10 {
        for n in 0..32 {
            client
                .queue(0)
                .submit(&Request::Write {
                    sector: n * 8,
                    data: pattern(round, 4096),
                })
                .unwrap();
        }
        client.queue(0).publish().unwrap();
        let base = client.stop_queue(0).unwrap();
        let used = client.queue(0).ring().unwrap().used_index();
        assert_eq!(base, u32::from(used), "all that was taken is answered");
        client
            .channel()
            .unwrap()
            .tell_vring("SET_VRING_ENABLE", code::SET_VRING_ENABLE, 0, 0)
            .unwrap();
        client.restart_queue(0, base).unwrap();
        // Those that were not taken are now, without another kick.
        for _ in 0..32 {
            assert_eq!(client.queue(0).wait().unwrap().status, Status::OK);
        }
    }
}

#[test]
fn a_disabled_ring_stands_still_until_it_is_enabled() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client_with(|o| o.queues = 2);
    let enable = |client: &mut Client, on| {
        client
            .channel()
            .unwrap()
            .tell_vring("SET_VRING_ENABLE", code::SET_VRING_ENABLE, 0, on)
            .unwrap();
    };
    client.queue(0).write(0, &[1; 4096]).unwrap();
    enable(&mut client, 0);
    let ticket = client
        .queue(0)
        .submit(&Request::Read { sector: 0, len: 4096 })
        .unwrap();
    client.queue(0).publish().unwrap();
    client.queue(1).read(0, 4096).unwrap();
    assert!(client.queue(0).poll().unwrap().is_none());
    enable(&mut client, 1);
    assert_eq!(client.queue(0).wait_ticket(ticket).unwrap().data, [1; 4096]);
}

#[test]
fn a_reset_starts_negotiation_afresh() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client();
    client.queue(0).write(2048, &[1; 4096]).unwrap();
    let features = client.features();
    for reset in [code::SET_STATUS, code::RESET_DEVICE] {
        let channel = client.channel().unwrap();
        let payload = 0u64.to_le_bytes();
        let payload = if reset == code::SET_STATUS {
            &payload[..]
        } else {
            &[]
        };
        channel.tell("reset", reset, payload, &[]).unwrap();
        assert_eq!(channel.ask_u64(code::GET_STATUS).unwrap(), 0);
        let ok = device_status::FEATURES_OK;
        channel.tell_u64("SET_STATUS", code::SET_STATUS, ok).unwrap();
        assert_eq!(channel.ask_u64(code::GET_STATUS).unwrap(), 0, "no features yet");
        channel
            .tell_u64("SET_FEATURES", code::SET_FEATURES, features)
            .unwrap();
        channel.tell_u64("SET_STATUS", code::SET_STATUS, ok).unwrap();
        assert_eq!(channel.ask_u64(code::GET_STATUS).unwrap(), ok);
        let used = client.queue(0).ring().unwrap().used_index();
        client.restart_queue(0, used.into()).unwrap();
        assert_eq!(client.queue(0).zone_report(2048, 1).unwrap()[0].wp, 2048 + 8);
    }
}

#[test]
fn memory_comes_and_goes_while_the_ring_runs() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client();
    let more = SharedMemory::new(&[RegionSpec {
        guest: Some(0x9_0000_0000),
        len: 1 << 20,
    }])
    .unwrap();
    let region = &more.regions()[0];
    let payload = [
        vec![0; 8],
        channel::memory_region(region.guest(), 1 << 20, region.user(), 0),
    ]
    .concat();
    for round in 0..5 {
        client
            .channel()
            .unwrap()
            .tell("ADD_MEM_REG", code::ADD_MEM_REG, &payload, &[region.fd()])
            .unwrap();
        let again =
            client
                .channel()
                .unwrap()
                .tell("ADD_MEM_REG", code::ADD_MEM_REG, &payload, &[region.fd()]);
        assert!(
            matches!(again.unwrap_err(), ClientError::Refused { .. }),
            "overlap"
        );
        client.queue(0).write(0, &pattern(round, 4096)).unwrap();
        client
            .channel()
            .unwrap()
            .tell("REM_MEM_REG", code::REM_MEM_REG, &payload, &[])
            .unwrap();
        assert_eq!(client.queue(0).read(0, 4096).unwrap(), pattern(round, 4096));
    }
}

#[test]
fn a_ring_outside_of_memory_does_not_start() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client();
    let base = client.stop_queue(0).unwrap();
    let ring = client.queue(0).ring().unwrap();
    let (desc, used, avail) = (ring.descriptors().user(), ring.used().user(), ring.avail().user());
    let end = client.scratch().user() + client.scratch().len() as u64;
    let kick = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let channel = client.channel().unwrap();
    let bad = [
        (0, used, avail),
        (desc, end - 8, avail),
        (desc + 8, used, avail),
        (desc, used, u64::MAX - 1),
    ];
    for (desc, used, avail) in bad {
        channel
            .tell(
                "ADDR",
                code::SET_VRING_ADDR,
                &channel::vring_addr(0, 0, desc, used, avail),
                &[],
            )
            .unwrap();
        let error = channel
            .tell("KICK", code::SET_VRING_KICK, &[0; 8], &[kick.as_fd()])
            .unwrap_err();
        assert!(
            matches!(error, ClientError::Refused { message: "KICK", .. }),
            "{error}"
        );
        channel.get_vring_base(0).unwrap();
    }
    client.restart_queue(0, base).unwrap();
    client.queue(0).read(0, 4096).unwrap();
}

#[test]
fn the_interrupt_can_be_changed_while_the_ring_runs() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client();
    client.queue(0).read(0, 4096).unwrap();
    let call = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    client
        .channel()
        .unwrap()
        .tell("CALL", code::SET_VRING_CALL, &[0; 8], &[call.as_fd()])
        .unwrap();
    client.queue(0).set_interrupts(true);
    client
        .queue(0)
        .submit(&Request::Read { sector: 0, len: 4096 })
        .unwrap();
    client.queue(0).publish().unwrap();
    let mut fds = [rustix::event::PollFd::new(&call, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    assert_eq!(
        rustix::event::poll(&mut fds, Some(&limit)),
        Ok(1),
        "the new eventfd is signalled"
    );
    // Masked, with no eventfd at all, and back to the first.
    let masked = 0x100u64.to_le_bytes();
    client
        .channel()
        .unwrap()
        .tell("CALL", code::SET_VRING_CALL, &masked, &[])
        .unwrap();
    client.queue(0).set_interrupts(false);
    assert_eq!(client.queue(0).wait().unwrap().status, Status::OK);
    let first = client.queue(0).call_fd().try_clone_to_owned().unwrap();
    client
        .channel()
        .unwrap()
        .tell("CALL", code::SET_VRING_CALL, &[0; 8], &[first.as_fd()])
        .unwrap();
    client.queue(0).read(0, 4096).unwrap();
}

#[test]
fn a_kick_that_is_no_eventfd_breaks_its_queue_only() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client_with(|o| o.queues = 2);
    let null = std::fs::File::open("/dev/null").unwrap();
    client
        .channel()
        .unwrap()
        .tell("KICK", code::SET_VRING_KICK, &[0; 8], &[null.as_fd()])
        .unwrap();
    let deadline = std::time::Instant::now() + PATIENCE;
    while client.channel().unwrap().ask_u64(code::GET_STATUS).unwrap() & device_status::NEEDS_RESET == 0 {
        assert!(std::time::Instant::now() < deadline, "never broken");
        std::thread::sleep(Duration::from_millis(1));
    }
    client.queue(1).read(0, 4096).unwrap();
}

#[test]
fn a_shutdown_drains_and_returns_with_a_client_connected() {
    let mut rig = Rig::new(PLAIN);
    let mut client = rig.client();
    for n in 0..32 {
        client
            .queue(0)
            .submit(&Request::Write {
                sector: n * 8,
                data: vec![1; 4096],
            })
            .unwrap();
    }
    client.queue(0).publish().unwrap();
    rig.stop().unwrap();
    assert!(!rig.socket().exists());
    client.channel().unwrap().wait_closed().unwrap();
    let used = client.queue(0).ring().unwrap().used_index();
    let avail = client
        .queue(0)
        .ring()
        .unwrap()
        .avail()
        .load_u16(2, Ordering::Relaxed);
    assert!(used <= avail);
}

#[test]
fn a_socket_in_use_is_refused_and_one_that_was_left_is_replaced() {
    let rig = Rig::new(PLAIN);
    let error = Server::bind(open(PLAIN), ServeOptions::new(Socket::Path(rig.socket())))
        .err()
        .unwrap();
    assert!(
        matches!(error, BindError::Listen(ListenError::InUse(_))),
        "{error}"
    );
    works(&rig);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    Server::bind(open(PLAIN), ServeOptions::new(Socket::Path(path.clone()))).unwrap();
    assert!(!path.exists(), "removed with the server");
}

#[test]
fn a_socket_that_listens_already_can_be_handed_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listening = UnixListener::bind(&path).unwrap();
    let server = Server::bind(
        open(PLAIN),
        ServeOptions::new(Socket::Listening(listening.into())),
    )
    .unwrap();
    let handle = server.handle();
    std::thread::scope(|scope| {
        let running = scope.spawn(|| server.run());
        let mut client = Client::connect(&path, &common::options()).unwrap();
        client.queue(0).read(0, 4096).unwrap();
        assert_eq!(handle.stats().reads, 1);
        handle.shutdown();
        running.join().unwrap().unwrap();
    });
    assert!(path.exists(), "whoever made it removes it");
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let bind = |change: fn(&mut ServeOptions)| {
        let dir = tempfile::tempdir().unwrap();
        let mut options = ServeOptions::new(Socket::Path(dir.path().join("s")));
        change(&mut options);
        Server::bind(open(PLAIN), options).err().expect("is refused")
    };
    assert!(matches!(bind(|o| o.queues = 0), BindError::Queues(0)));
    assert!(matches!(bind(|o| o.queues = 257), BindError::Queues(257)));
    assert!(matches!(bind(|o| o.queue_size = 100), BindError::QueueSize(100)));
    assert!(matches!(
        bind(|o| o.serial = "x".repeat(21)),
        BindError::Serial { len: 21, .. }
    ));
    let long = |o: &mut ServeOptions| o.socket = Socket::Path(format!("/tmp/{}", "x".repeat(200)).into());
    assert!(matches!(
        bind(long),
        BindError::Listen(ListenError::PathTooLong { .. })
    ));
}
