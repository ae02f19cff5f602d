//! Each request of a plain virtio-blk device, and each error that it can end with.

mod common;

use common::{PLAIN, Rig, open, open_with, pattern};
use zbdkit_block::OpenOptions;
use zbdkit_testkit::client::{
    BlockRange, ClientError, EngineKind, Framing, Request, Status, channel::protocol_feature, feature, op,
};

#[test]
fn what_is_written_is_read_with_every_engine_and_framing() {
    let rig = Rig::new(PLAIN);
    let framings = [
        Framing::default(),
        Framing::LINUX,
        Framing {
            chunk: Some(512),
            ..Framing::LINUX
        },
        Framing {
            chunk: Some(1000),
            merge_header: true,
            indirect: true,
            append_pad: 0,
        },
        Framing {
            chunk: Some(4096),
            merge_header: true,
            indirect: false,
            append_pad: 0,
        },
    ];
    for features in [
        feature::ALL,
        feature::ALL & !feature::EVENT_IDX,
        feature::ALL & !feature::INDIRECT_DESC,
    ] {
        let mut client = rig.client_with(|o| o.features = features);
        for (n, framing) in framings.into_iter().enumerate() {
            client.queue(0).set_framing(framing);
            let data = pattern(n as u64, 32 << 10);
            client.queue(0).write(128 * n as u64, &data).unwrap();
            assert_eq!(
                client.queue(0).read(128 * n as u64, data.len() as u32).unwrap(),
                data,
                "{framing:?}"
            );
        }
    }
    let mut client = rig.client_with(|o| o.engine = EngineKind::VirtioDriver);
    let data = pattern(9, 8192);
    client.queue(0).write(8, &data).unwrap();
    client.queue(0).flush().unwrap();
    assert_eq!(client.queue(0).read(8, 8192).unwrap(), data);
}

#[test]
fn the_used_length_is_what_was_written_to_the_guest() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client();
    let read = client
        .queue(0)
        .run(&Request::Read { sector: 0, len: 4096 })
        .unwrap();
    assert_eq!((read.status, read.used_len), (Status::OK, Some(4097)));
    let write = client
        .queue(0)
        .run(&Request::Write {
            sector: 0,
            data: vec![1; 4096],
        })
        .unwrap();
    assert_eq!((write.status, write.used_len), (Status::OK, Some(1)));
    let failed = client
        .queue(0)
        .run(&Request::Read {
            sector: 1 << 40,
            len: 4096,
        })
        .unwrap();
    assert_eq!((failed.status, failed.used_len), (Status::IOERR, Some(1)));
}

#[test]
fn the_configuration_says_what_the_device_is() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client();
    let config = *client.config();
    assert_eq!(
        (config.capacity, config.seg_max, config.num_queues),
        (16384, 126, 2)
    );
    assert_eq!(
        (config.blk_size, config.writeback),
        (open(PLAIN).limits().block_size, 1)
    );
    assert!(
        config.max_discard_sectors > 0 && config.max_discard_seg > 0 && config.discard_sector_alignment > 0
    );
    assert!(config.max_write_zeroes_sectors > 0 && config.max_write_zeroes_seg > 0);
    assert_eq!((config.model, config.zone_sectors), (0, 0));
    let offered = feature::ALL & !(feature::ZONED | feature::RO);
    assert_eq!(client.offered(), offered);
    assert_eq!(
        client.channel().unwrap().get_config(90, 166).unwrap(),
        config.raw[90..]
            .iter()
            .copied()
            .chain(std::iter::repeat_n(0, 160))
            .collect::<Vec<_>>()
    );
}

#[test]
fn get_id_returns_the_serial_number() {
    let rig = Rig::with(open(PLAIN), |o| o.serial = "12345678901234567890".into());
    let mut client = rig.client();
    assert_eq!(client.queue(0).get_id().unwrap(), b"12345678901234567890");
    // A buffer of another size gets what fits.
    let short = Request::Other {
        op: op::GET_ID,
        sector: 0,
        out: vec![],
        in_len: 4,
    };
    assert_eq!(client.queue(0).run(&short).unwrap().data, b"1234");
}

#[test]
fn discard_and_write_zeroes_work_on_many_ranges() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client();
    let block = u64::from(client.config().blk_size / 512);
    client.queue(0).write(0, &[7; 64 << 10]).unwrap();
    let range = |n: u64, flags| BlockRange {
        sector: n * block,
        sectors: block as u32,
        flags,
    };
    let zeroes = Request::WriteZeroes(vec![range(0, 0), range(2, 1)]);
    assert_eq!(client.queue(0).run(&zeroes).unwrap().status, Status::OK);
    let len = (block * 512) as usize;
    let data = client.queue(0).read(0, 4 * len as u32).unwrap();
    let blocks: Vec<_> = data.chunks(len).map(|b| b.iter().all(|&b| b == 0)).collect();
    assert_eq!(blocks, [true, false, true, false]);
    let discard = Request::Discard((0..8).map(|n| range(n, 0)).collect());
    assert_eq!(client.queue(0).run(&discard).unwrap().status, Status::OK);
}

#[test]
fn ranges_that_break_a_limit_are_refused() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client();
    let config = *client.config();
    let good = BlockRange {
        sector: 0,
        sectors: 8,
        flags: 0,
    };
    let mut status = |request: Request| client.queue(0).run(&request).unwrap().status;
    assert_eq!(
        status(Request::Discard(vec![BlockRange { flags: 1, ..good }])),
        Status::UNSUPP
    );
    assert_eq!(
        status(Request::WriteZeroes(vec![BlockRange { flags: 2, ..good }])),
        Status::UNSUPP
    );
    assert_eq!(status(Request::Discard(vec![])), Status::IOERR);
    assert_eq!(
        status(Request::Discard(vec![good; config.max_discard_seg as usize + 1])),
        Status::IOERR
    );
    let long = BlockRange {
        sectors: config.max_discard_sectors + 8,
        ..good
    };
    assert_eq!(status(Request::Discard(vec![long])), Status::IOERR);
    assert_eq!(status(Request::WriteZeroes(vec![long])), Status::IOERR);
    for sector in [config.capacity, u64::MAX, u64::MAX / 512 + 1] {
        assert_eq!(
            status(Request::WriteZeroes(vec![BlockRange { sector, ..good }])),
            Status::IOERR
        );
    }
    let torn = Request::Other {
        op: op::DISCARD,
        sector: 0,
        out: vec![0; 17],
        in_len: 0,
    };
    assert_eq!(status(torn), Status::IOERR);
    assert_eq!(
        status(Request::Discard(vec![good; config.max_discard_seg as usize])),
        Status::OK
    );
}

#[test]
fn data_that_is_no_sectors_or_beyond_the_end_is_refused() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client();
    let capacity = client.config().capacity;
    let mut status = |request: Request| client.queue(0).run(&request).unwrap().status;
    assert_eq!(status(Request::Read { sector: 0, len: 513 }), Status::IOERR);
    assert_eq!(
        status(Request::Write {
            sector: 0,
            data: vec![0; 100]
        }),
        Status::IOERR
    );
    for sector in [
        capacity,
        capacity - 1,
        u64::MAX,
        u64::MAX / 512,
        u64::MAX / 512 + 1,
    ] {
        assert_eq!(
            status(Request::Read { sector, len: 1024 }),
            Status::IOERR,
            "{sector}"
        );
        assert_eq!(
            status(Request::Write {
                sector,
                data: vec![0; 1024]
            }),
            Status::IOERR,
            "{sector}"
        );
    }
    assert_eq!(
        status(Request::Read {
            sector: capacity - 8,
            len: 4096
        }),
        Status::OK
    );
}

#[test]
fn what_no_device_knows_is_unsupported() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client();
    for op in [2, 3, 5, 10, op::SECURE_ERASE, 17, 27, 0x8000_0000, u32::MAX] {
        let request = Request::Other {
            op,
            sector: 0,
            out: vec![0; 512],
            in_len: 512,
        };
        assert_eq!(
            client.queue(0).run(&request).unwrap().status,
            Status::UNSUPP,
            "{op}"
        );
    }
    let zoned = [
        Request::ZoneReport { sector: 0, len: 4096 },
        Request::ZoneOpen(0),
        Request::ZoneResetAll,
    ];
    for request in zoned {
        assert_eq!(client.queue(0).run(&request).unwrap().status, Status::UNSUPP);
    }
}

#[test]
fn requests_of_features_that_were_not_taken_are_unsupported() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client_with(|o| o.features &= !(feature::DISCARD | feature::WRITE_ZEROES));
    let range = vec![BlockRange {
        sector: 0,
        sectors: 8,
        flags: 0,
    }];
    for request in [Request::Discard(range.clone()), Request::WriteZeroes(range)] {
        assert_eq!(client.queue(0).run(&request).unwrap().status, Status::UNSUPP);
    }
}

#[test]
fn a_read_only_device_says_so_and_takes_no_writes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let graph = format!("driver=raw,file.driver=file,file.filename={}", path.display());
    let rig = Rig::with(
        open_with(
            &graph,
            &OpenOptions {
                read_only: true,
                ..OpenOptions::default()
            },
        ),
        |_| {},
    );
    let mut client = rig.client();
    assert_ne!(client.offered() & feature::RO, 0);
    assert_eq!(client.offered() & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    let write = Request::Write {
        sector: 0,
        data: vec![1; 512],
    };
    assert_eq!(client.queue(0).run(&write).unwrap().status, Status::IOERR);
    assert_eq!(client.queue(0).read(0, 512).unwrap(), [0; 512]);
}

#[test]
fn the_cache_mode_follows_the_driver() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client();
    client.channel().unwrap().set_config(32, &[0]).unwrap();
    assert_eq!(client.read_config().unwrap().writeback, 0);
    client.queue(0).write(0, &[1; 4096]).unwrap();
    // The whole space written back, as some front-ends do.
    let mut raw = client.read_config().unwrap().raw;
    raw[32] = 1;
    client.channel().unwrap().set_config(0, &raw).unwrap();
    assert_eq!(client.read_config().unwrap().writeback, 1);
    raw[0] ^= 1;
    let error = client.channel().unwrap().set_config(0, &raw).unwrap_err();
    assert!(matches!(error, ClientError::Refused { .. }), "{error}");
    drop(client);
    let mut client = rig.client_with(|o| o.features &= !feature::FLUSH);
    assert_eq!(client.read_config().unwrap().writeback, 0);
    client.queue(0).write(0, &[1; 4096]).unwrap();
}

#[test]
fn many_requests_in_flight_on_two_queues_all_come_back() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client_with(|o| {
        o.queues = 2;
        o.slots = 64;
        o.max_data = 16384;
        o.queue_size = 256;
    });
    let queues = client.take_queues();
    std::thread::scope(|scope| {
        for (q, mut queue) in queues.into_iter().enumerate() {
            scope.spawn(move || {
                for round in 0..40 {
                    let sector = |i: u64| (q as u64 * 64 + i) * 32;
                    let seed = |i: u64| i * 7 + round + q as u64;
                    for i in 0..64 {
                        let write = Request::Write {
                            sector: sector(i),
                            data: pattern(seed(i), 16384),
                        };
                        queue.submit(&write).unwrap();
                    }
                    (0..64).for_each(|_| assert_eq!(queue.wait().unwrap().status, Status::OK));
                    let mut tickets = std::collections::HashMap::new();
                    for i in 0..64 {
                        let read = Request::Read {
                            sector: sector(i),
                            len: 16384,
                        };
                        tickets.insert(queue.submit(&read).unwrap(), seed(i));
                    }
                    for _ in 0..64 {
                        let done = queue.wait().unwrap();
                        assert_eq!(done.data, pattern(tickets[&done.ticket], 16384));
                    }
                }
            });
        }
    });
}

#[test]
fn a_front_end_without_any_protocol_feature_is_served() {
    let rig = Rig::new(PLAIN);
    let mut client = rig.client_with(|o| o.features &= !feature::PROTOCOL_FEATURES);
    client.queue(0).write(0, &[3; 512 * 8]).unwrap();
    drop(client);
    let mut client = rig.client_with(|o| o.protocol_features = protocol_feature::CONFIG);
    assert_eq!(client.queue(0).read(0, 4096).unwrap(), [3; 4096]);
}
