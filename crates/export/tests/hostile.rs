//! Chains and rings of a driver that means harm. What can be answered is, what cannot stops its queue, and
//! nothing of it reaches another queue or the next client.

mod common;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use common::{PLAIN, Rig, ZONED, pattern};
use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use zbdkit_testkit::client::channel::code;
use zbdkit_testkit::client::memory::Window;
use zbdkit_testkit::client::ring::{Desc, INDIRECT, NEXT, WRITE};
use zbdkit_testkit::client::{Client, Status, device_status, op};

/// Where things lie in the scratch memory.
const HEADER: usize = 0;
const TABLE: usize = 0x1000;
const DATA: usize = 0x2000;
const STATUS: usize = 0x8000;

/// Addresses of a client's scratch memory.
struct Scratch(Window);

impl Scratch {
    fn new(client: &Client, op: u32) -> Scratch {
        let scratch = client.scratch().clone();
        scratch.write(HEADER, &[0; 16]);
        scratch.write(HEADER, &op.to_le_bytes());
        scratch.fill(STATUS, 1, 0xff);
        Scratch(scratch)
    }

    fn at(&self, offset: usize, len: u32, flags: u16) -> Desc {
        Desc {
            addr: self.0.guest() + offset as u64,
            len,
            flags,
            next: 0,
        }
    }

    fn header(&self) -> Desc {
        self.at(HEADER, 16, 0)
    }

    fn data(&self, len: u32, flags: u16) -> Desc {
        self.at(DATA, len, flags)
    }

    fn status(&self) -> Desc {
        self.at(STATUS, 1, WRITE)
    }

    fn end(&self) -> u64 {
        self.0.guest() + self.0.len() as u64
    }
}

/// Puts descriptors, linked one to the next, into the table; the head.
fn chain(client: &mut Client, descs: &[Desc]) -> u16 {
    let ring = client.queue(0).ring().unwrap();
    let indices = ring.reserve(descs.len()).unwrap();
    for (n, desc) in descs.iter().enumerate() {
        let linked = match indices.get(n + 1) {
            Some(&next) => Desc {
                flags: desc.flags | NEXT,
                next,
                ..*desc
            },
            None => *desc,
        };
        linked.store(ring.descriptors(), indices[n].into());
    }
    indices[0]
}

/// Runs a chain that must come back; its status and used length.
fn answer(client: &mut Client, scratch: &Scratch, descs: &[Desc]) -> (Status, u32) {
    let head = chain(client, descs);
    client.queue(0).ring().unwrap().push_by_hand(head);
    let used = client.queue(0).wait_by_hand().unwrap();
    assert_eq!(used.head, u32::from(head));
    let mut status = [0];
    scratch.0.read(STATUS, &mut status);
    (Status(status[0]), used.len.unwrap())
}

#[test]
fn any_layout_of_a_good_request_works() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client();
    let data = pattern(3, 4096);
    client.queue(0).write(0, &data).unwrap();
    let s = Scratch::new(&client, op::READ);
    let mut check = |descs: &[Desc]| {
        s.0.fill(DATA, 8192, 0);
        assert_eq!(answer(&mut client, &s, descs), (Status::OK, 4097), "{descs:?}");
        assert_eq!(s.0.to_vec(DATA, 4096), data, "{descs:?}");
    };
    check(&[s.header(), s.data(4096, WRITE), s.status()]);
    check(&[
        s.at(0, 1, 0),
        s.at(1, 7, 0),
        s.at(8, 8, 0),
        s.data(4096, WRITE),
        s.status(),
    ]);
    check(&[
        s.header(),
        s.at(DATA, 1000, WRITE),
        s.at(DATA + 1000, 3096, WRITE),
        s.status(),
    ]);
    check(&[
        s.at(0, 0, 0),
        s.header(),
        s.data(4096, WRITE),
        s.at(0, 0, WRITE),
        s.status(),
        s.at(0, 0, WRITE),
    ]);
    // Data and status in one piece.
    let merged = [s.header(), s.at(STATUS - 4096, 4097, WRITE)];
    assert_eq!(answer(&mut client, &s, &merged), (Status::OK, 4097));
    assert_eq!(s.0.to_vec(STATUS - 4096, 4096), data);
    // Direct descriptors first, then an indirect table.
    for (n, desc) in [s.data(4096, WRITE | NEXT), s.status()].into_iter().enumerate() {
        Desc { next: 1, ..desc }.store(&s.0.slice(TABLE, 32), n);
    }
    assert_eq!(
        answer(&mut client, &s, &[s.header(), s.at(TABLE, 32, INDIRECT)]),
        (Status::OK, 4097)
    );
    // A piece over two regions.
    let across = Desc {
        addr: s.0.guest() - 2048,
        len: 4096,
        flags: WRITE,
        next: 0,
    };
    let tail = client.memory().window(s.0.guest() - 2048, 2048).unwrap();
    let kept = tail.to_vec(0, 2048);
    s.0.write(HEADER, &[0; 16]);
    let header = s.at(TABLE, 16, 0);
    s.0.write(TABLE, &[0; 16]);
    assert_eq!(
        answer(&mut client, &s, &[header, across, s.status()]),
        (Status::OK, 4097)
    );
    assert_eq!(
        (tail.to_vec(0, 2048), s.0.to_vec(0, 2048)),
        (data[..2048].to_vec(), data[2048..].to_vec())
    );
    tail.write(0, &kept);
}

#[test]
fn a_request_with_a_status_byte_is_answered_whatever_else_is_wrong() {
    let rig = Rig::new(PLAIN);
    for op in [op::READ, op::WRITE] {
        let mut client = rig.client();
        let s = Scratch::new(&client, op);
        let dir = if op == op::READ { WRITE } else { 0 };
        let bad = |addr, len| Desc {
            addr,
            len,
            flags: dir,
            next: 0,
        };
        let cases = [
            vec![s.status()],
            vec![s.at(HEADER, 15, 0), s.status()],
            vec![s.data(4096, WRITE), s.status()],
            // The wrong way round.
            vec![s.data(512, WRITE), s.header(), s.status()],
            vec![s.status(), s.header()],
            // Data outside, in part outside, overflowing, huge.
            vec![s.header(), bad(0, 4096), s.status()],
            vec![s.header(), bad(s.end() - 512, 1024), s.status()],
            vec![s.header(), bad(u64::MAX - 511, 512), s.status()],
            vec![s.header(), bad(u64::MAX - 100, 512), s.status()],
            vec![s.header(), bad(s.0.guest(), u32::MAX), s.status()],
            vec![
                s.header(),
                bad(0, 0xffff_fe00),
                bad(0, 0xffff_fe00),
                bad(0, 0xffff_fe00),
                s.status(),
            ],
            // A header outside.
            vec![
                Desc {
                    addr: 1,
                    len: 16,
                    flags: 0,
                    next: 0,
                },
                s.status(),
            ],
            // No whole sectors.
            vec![s.header(), s.data(1, dir), s.status()],
            vec![s.header(), s.data(4095, dir), s.status()],
        ];
        for descs in cases {
            s.0.fill(STATUS, 1, 0xff);
            assert_eq!(
                answer(&mut client, &s, &descs),
                (Status::IOERR, 1),
                "{op} {descs:?}"
            );
        }
        let good = [s.header(), s.data(4096, dir), s.status()];
        assert_eq!(
            answer(&mut client, &s, &good).0,
            Status::OK,
            "not passing because everything is refused"
        );
    }
}

#[test]
fn an_append_without_room_for_its_sector_is_refused() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client();
    let s = Scratch::new(&client, op::ZONE_APPEND);
    s.0.write(8, &2048u64.to_le_bytes());
    for room in [1, 8] {
        let descs = [
            s.header(),
            s.data(4096, 0),
            s.at(STATUS + 1 - room, room as u32, WRITE),
        ];
        assert_eq!(answer(&mut client, &s, &descs), (Status::IOERR, 1));
    }
    let outside = Desc {
        addr: 8,
        len: 8,
        flags: WRITE,
        next: 0,
    };
    let descs = [s.header(), s.data(4096, 0), outside, s.status()];
    assert_eq!(answer(&mut client, &s, &descs), (Status::IOERR, 1));
    assert_eq!(
        client.queue(0).zone_report(2048, 1).unwrap()[0].wp,
        2048,
        "nothing was written"
    );
    let descs = [s.header(), s.data(4096, 0), s.at(STATUS - 8, 9, WRITE)];
    assert_eq!(answer(&mut client, &s, &descs), (Status::OK, 9));
}

#[test]
fn a_report_into_memory_that_is_not_there_is_refused() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client();
    let s = Scratch::new(&client, op::ZONE_REPORT);
    let outside = Desc {
        addr: s.end() - 64,
        len: 4096,
        flags: WRITE,
        next: 0,
    };
    assert_eq!(
        answer(&mut client, &s, &[s.header(), outside, s.status()]),
        (Status::IOERR, 1)
    );
    let huge = Desc {
        addr: 0,
        len: u32::MAX,
        flags: WRITE,
        next: 0,
    };
    assert_eq!(
        answer(&mut client, &s, &[s.header(), huge, huge, s.status()]),
        (Status::IOERR, 1)
    );
}

#[test]
fn one_chain_made_available_twice_is_answered_twice() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client();
    let s = Scratch::new(&client, op::READ);
    let head = chain(&mut client, &[s.header(), s.data(4096, WRITE), s.status()]);
    let ring = client.queue(0).ring().unwrap();
    let before = ring.used_index();
    ring.push_by_hand(head);
    ring.push_by_hand(head);
    ring.publish().unwrap();
    until("both are used", || {
        client.queue(0).ring().unwrap().used_index().wrapping_sub(before) == 2
    });
}

/// Waits for something that the server does in its own time.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn needs_reset(client: &mut Client) -> bool {
    client.channel().unwrap().ask_u64(code::GET_STATUS).unwrap() & device_status::NEEDS_RESET != 0
}

/// A way to break queue 0.
type Attack = (&'static str, fn(&mut Client, &Scratch));

fn push(client: &mut Client, head: u16) {
    let ring = client.queue(0).ring().unwrap();
    ring.push_by_hand(head);
    ring.publish().unwrap();
    ring.kick().unwrap();
}

fn push_chain(client: &mut Client, descs: &[Desc]) {
    let head = chain(client, descs);
    push(client, head);
}

/// Pushes a header, then an indirect table with these entries.
fn push_indirect(client: &mut Client, s: &Scratch, entries: &[Desc]) {
    let table = s.0.slice(TABLE, entries.len() * 16);
    entries
        .iter()
        .enumerate()
        .for_each(|(n, entry)| entry.store(&table, n));
    push_chain(
        client,
        &[s.header(), s.at(TABLE, entries.len() as u32 * 16, INDIRECT)],
    );
}

const ATTACKS: &[Attack] = &[
    ("a loop", |client, s| {
        let head = chain(client, &[s.header(), s.data(512, WRITE), s.status()]);
        let table = client.queue(0).ring().unwrap().descriptors().clone();
        let second = Desc::load(&table, head.into()).next;
        Desc {
            flags: WRITE | NEXT,
            next: head,
            ..s.status()
        }
        .store(&table, second.into());
        push(client, head);
    }),
    ("a descriptor that is its own next", |client, s| {
        let head = chain(client, &[s.header()]);
        let table = client.queue(0).ring().unwrap().descriptors().clone();
        Desc {
            flags: NEXT,
            next: head,
            ..s.header()
        }
        .store(&table, head.into());
        push(client, head);
    }),
    ("a head outside the table", |client, _| push(client, 128)),
    ("a next outside the table", |client, s| {
        let head = chain(client, &[s.header()]);
        let table = client.queue(0).ring().unwrap().descriptors().clone();
        Desc {
            flags: NEXT,
            next: 0xffff,
            ..s.header()
        }
        .store(&table, head.into());
        push(client, head);
    }),
    ("no byte for the status", |client, s| {
        push_chain(client, &[s.header(), s.data(512, 0)])
    }),
    ("a chain of nothing", |client, s| {
        push_chain(client, &[s.at(0, 0, WRITE)])
    }),
    ("a status outside of memory", |client, s| {
        push_chain(
            client,
            &[
                s.header(),
                Desc {
                    addr: s.end(),
                    len: 1,
                    flags: WRITE,
                    next: 0,
                },
            ],
        );
    }),
    ("a status at the end of the address space", |client, s| {
        push_chain(
            client,
            &[
                s.header(),
                Desc {
                    addr: u64::MAX,
                    len: 2,
                    flags: WRITE,
                    next: 0,
                },
            ],
        );
    }),
    ("an indirect table of no descriptors", |client, s| {
        push_chain(client, &[s.header(), s.at(TABLE, 0, INDIRECT)]);
    }),
    ("an indirect table of half a descriptor", |client, s| {
        push_chain(client, &[s.header(), s.at(TABLE, 24, INDIRECT)]);
    }),
    ("an indirect table of 4 GiB", |client, s| {
        push_chain(client, &[s.header(), s.at(TABLE, 0xffff_fff0, INDIRECT)]);
    }),
    ("an indirect table outside of memory", |client, s| {
        push_chain(
            client,
            &[
                s.header(),
                Desc {
                    addr: 16,
                    len: 32,
                    flags: INDIRECT,
                    next: 0,
                },
            ],
        );
    }),
    ("an indirect table in part outside of memory", |client, s| {
        push_chain(
            client,
            &[
                s.header(),
                Desc {
                    addr: s.end() - 16,
                    len: 32,
                    flags: INDIRECT,
                    next: 0,
                },
            ],
        );
    }),
    ("an indirect table with a next", |client, s| {
        push_chain(client, &[s.header(), s.at(TABLE, 32, INDIRECT), s.status()]);
    }),
    ("an indirect table in an indirect table", |client, s| {
        push_indirect(client, s, &[s.at(TABLE, 16, INDIRECT)]);
    }),
    ("an indirect loop", |client, s| {
        push_indirect(
            client,
            s,
            &[Desc {
                flags: WRITE | NEXT,
                next: 0,
                ..s.status()
            }],
        );
    }),
    ("an indirect chain longer than its table", |client, s| {
        push_indirect(
            client,
            s,
            &[Desc {
                flags: WRITE | NEXT,
                next: 1,
                ..s.status()
            }],
        );
    }),
    (
        "an indirect chain of more descriptors than a request has",
        |client, s| {
            let link = |n: u16| Desc {
                flags: WRITE | NEXT,
                next: n + 1,
                ..s.status()
            };
            push_indirect(client, s, &(0..200).map(link).collect::<Vec<_>>());
        },
    ),
    ("an avail index that jumps", |client, _| {
        client.queue(0).ring().unwrap().force_avail_index(1000).unwrap();
    }),
    ("an avail index that goes back", |client, _| {
        client
            .queue(0)
            .ring()
            .unwrap()
            .force_avail_index(u16::MAX)
            .unwrap();
    }),
];

#[test]
fn a_chain_that_cannot_be_answered_stops_its_queue_and_nothing_else() {
    let rig = Rig::new(PLAIN);
    for (what, attack) in ATTACKS {
        let mut client = rig.client_with(|o| o.queues = 2);
        let err = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let index = 0u64.to_le_bytes();
        client
            .channel()
            .unwrap()
            .tell("SET_VRING_ERR", code::SET_VRING_ERR, &index, &[err.as_fd()])
            .unwrap();
        client.queue(0).read(0, 4096).unwrap();
        assert!(!needs_reset(&mut client), "{what}");
        let used = client.queue(0).ring().unwrap().used_index();
        let scratch = Scratch::new(&client, op::READ);
        attack(&mut client, &scratch);
        until(what, || needs_reset(&mut client));
        let mut count = [0; 8];
        assert_eq!(
            rustix::io::read(&err, &mut count),
            Ok(8),
            "{what}: the err eventfd is signalled"
        );
        assert_eq!(
            client.queue(0).ring().unwrap().used_index(),
            used,
            "{what}: it is not given back"
        );
        client.queue(1).write(8, &[1; 4096]).unwrap();
        // A stopped queue still answers the front-end, and a reset makes all good.
        client.stop_queue(0).unwrap();
        client.stop_queue(1).unwrap();
        assert!(!needs_reset(&mut client), "{what}");
        drop(client);
        assert_eq!(rig.client().queue(0).read(8, 4096).unwrap(), [1; 4096], "{what}");
    }
}

#[test]
fn a_queue_is_whole_again_after_it_was_stopped_and_started() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client();
    client.queue(0).read(0, 4096).unwrap();
    push(&mut client, 500);
    until("broken", || needs_reset(&mut client));
    let base = client.stop_queue(0).unwrap();
    // The bad chain was taken: the ring goes on behind it.
    assert_eq!(base, 2);
    client.restart_queue(0, base).unwrap();
    assert!(!needs_reset(&mut client));
    let s = Scratch::new(&client, op::READ);
    let descs = [s.header(), s.data(4096, WRITE), s.status()];
    assert_eq!(answer(&mut client, &s, &descs), (Status::OK, 4097));
}

#[test]
fn what_is_in_flight_when_a_queue_breaks_is_still_answered() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client();
    let s = Scratch::new(&client, op::READ);
    let good = chain(&mut client, &[s.header(), s.data(4096, WRITE), s.status()]);
    let ring = client.queue(0).ring().unwrap();
    ring.push_by_hand(good);
    ring.push_by_hand(999);
    ring.publish().unwrap();
    let used = client.queue(0).wait_by_hand().unwrap();
    assert_eq!(used.head, u32::from(good));
    until("broken", || needs_reset(&mut client));
}

#[test]
fn data_that_overlaps_the_ring_harms_only_that_queue() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client_with(|o| o.queues = 2);
    client.queue(1).write(0, &[0xff; 8192]).unwrap();
    let s = Scratch::new(&client, op::READ);
    let ring = client.queue(0).ring().unwrap();
    let (avail, table) = (ring.avail().guest(), ring.descriptors().guest());
    let over = |addr| Desc {
        addr,
        len: 512,
        flags: WRITE,
        next: 0,
    };
    push_chain(&mut client, &[s.header(), over(table), over(avail), s.status()]);
    // Now the descriptors and the avail ring are full of ones.
    let _ = client.queue(0).ring().unwrap().kick();
    until("broken", || {
        let _ = client.queue(0).ring().unwrap().kick();
        needs_reset(&mut client)
    });
    client.queue(1).read(0, 4096).unwrap();
    drop(client);
    rig.client().queue(0).read(0, 4096).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_ring_contents_end_the_server(
        descs in proptest::collection::vec(
            (0u64..0x9000, prop_oneof![0u32..5000, any::<u32>()], 0u16..8, 0u16..40, any::<bool>()), 1..32),
        heads in proptest::collection::vec(0u16..40, 1..20),
        op in prop_oneof![0u32..32, any::<u32>()],
        sector in prop_oneof![0u64..20000, any::<u64>()],
    ) {
        thread_local!(static RIG: Rig = Rig::new(ZONED));
        RIG.with(|rig| {
            let mut client = rig.client();
            let s = Scratch::new(&client, op);
            s.0.write(8, &sector.to_le_bytes());
            let ring = client.queue(0).ring().unwrap();
            for (n, (addr, len, flags, next, inside)) in descs.into_iter().enumerate() {
                let addr = if inside { s.0.guest() + addr } else { addr.wrapping_mul(0x0123_4567_89ab_cdef) };
                Desc { addr, len, flags, next }.store(ring.descriptors(), n);
                Desc { addr, len, flags, next }.store(&s.0.slice(TABLE, 0x400), n);
            }
            heads.iter().for_each(|head| ring.push_by_hand(*head));
            ring.publish().unwrap();
            drop(client);
            let report = rig.client().queue(0).zone_report(0, 8).unwrap();
            assert_eq!(report.len(), 8);
        });
    }
}
