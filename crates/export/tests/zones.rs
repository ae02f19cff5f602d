//! Zoned requests through the door: each of them, and each status that the standard gives them.

mod common;

use common::{Rig, ZONE_SECTORS, ZONED, open, pattern};
use zbdkit_export::vhost_user_blk::{BindError, ServeOptions, Server, Socket, Unsuitable};
use zbdkit_testkit::client::{
    BlkConfig, Client, ClientError, EngineKind, Framing, Request, Status, Zone, ZoneKind, ZoneState,
    channel::code, channel::protocol_feature, feature,
};

const CAPACITY: u64 = 768 * 2;
/// The first sequential zone, and those after it.
const SEQ: u64 = ZONE_SECTORS;

fn zone(n: u64) -> u64 {
    n * ZONE_SECTORS
}

fn zones(client: &mut Client) -> Vec<Zone> {
    client.queue(0).zone_report(0, 100).unwrap()
}

fn state(client: &mut Client, n: usize) -> (ZoneState, u64) {
    let zone = zones(client)[n];
    (zone.state, zone.wp - zone.start)
}

fn status(client: &mut Client, request: Request) -> Status {
    client.queue(0).run(&request).unwrap().status
}

fn write(sector: u64, len: usize) -> Request {
    Request::Write {
        sector,
        data: vec![0x5a; len],
    }
}

fn append(sector: u64, len: usize) -> Request {
    Request::ZoneAppend {
        sector,
        data: vec![0x5a; len],
    }
}

#[test]
fn the_configuration_tells_of_the_zones() {
    let rig = Rig::new(ZONED);
    let client = rig.client();
    let config: &BlkConfig = client.config();
    assert_eq!((config.zone_sectors, config.model), (2048, 1));
    assert_eq!((config.max_open_zones, config.max_active_zones), (3, 4));
    assert_eq!(
        (config.max_append_sectors, config.write_granularity),
        (128, config.blk_size)
    );
    assert_eq!(client.offered() & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    assert_ne!(client.offered() & feature::ZONED, 0);
    assert_eq!(config.raw[93..96], [0; 3]);
}

#[test]
fn an_append_never_needs_more_segments_than_a_request_has() {
    let graph = ZONED.replace("max_append_bytes=64k", "max_append_bytes=512k");
    let rig = Rig::with(open(&graph), |o| o.queue_size = 32);
    let mut client = rig.client();
    let config = *client.config();
    assert_eq!((config.seg_max, config.max_append_sectors), (30, 30 * 8));
    let max = config.max_append_sectors as usize * 512;
    client.queue(0).set_framing(Framing {
        chunk: Some(4096),
        ..Framing::LINUX
    });
    assert_eq!(status(&mut client, append(SEQ, max)), Status::OK);
    client.queue(0).set_framing(Framing::LINUX);
    assert_eq!(
        status(&mut client, append(SEQ, max + 4096)),
        Status::ZONE_INVALID_CMD
    );
}

#[test]
fn a_report_shows_types_states_and_pointers() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client();
    client.queue(0).write(SEQ, &[1; 4096]).unwrap();
    client.queue(0).zone_open(zone(2)).unwrap();
    client.queue(0).zone_finish(zone(3)).unwrap();
    client.queue(0).write(zone(4), &[1; 8192]).unwrap();
    client.queue(0).zone_close(zone(4)).unwrap();
    let zones = zones(&mut client);
    assert_eq!(zones.len(), 8);
    assert_eq!(
        (zones[0].kind, zones[0].state),
        (ZoneKind::Conventional, ZoneState::NotWritePointer)
    );
    assert!(zones.iter().enumerate().all(|(n, z)| z.start == zone(n as u64)));
    assert!(
        zones[1..]
            .iter()
            .all(|z| z.kind == ZoneKind::SequentialRequired && z.cap == CAPACITY)
    );
    let shown: Vec<_> = zones[1..6].iter().map(|z| (z.state, z.wp - z.start)).collect();
    let expected = [
        (ZoneState::ImplicitlyOpen, 8),
        (ZoneState::ExplicitlyOpen, 0),
        (ZoneState::Full, CAPACITY),
        (ZoneState::Closed, 16),
        (ZoneState::Empty, 0),
    ];
    assert_eq!(shown, expected);
}

#[test]
fn a_report_fits_the_buffer_and_starts_anywhere_in_a_zone() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client();
    for (len, count) in [
        (64, 0),
        (127, 0),
        (128, 1),
        (64 * 4 + 63, 3),
        (64 * 9, 8),
        (64 << 10, 8),
    ] {
        let done = client
            .queue(0)
            .run(&Request::ZoneReport { sector: 0, len })
            .unwrap();
        assert_eq!(done.status, Status::OK, "{len}");
        assert_eq!(
            u64::from_le_bytes(done.data[..8].try_into().unwrap()),
            count,
            "{len}"
        );
        assert_eq!(done.used_len, Some(64 + 64 * count as u32 + 1), "{len}");
        // Nothing behind the last descriptor was touched.
        assert!(
            done.data[64 + 64 * count as usize..].iter().all(|&b| b == 0xa5),
            "{len}"
        );
    }
    let from_inside = client.queue(0).zone_report(zone(6) + 100, 10).unwrap();
    assert_eq!(
        from_inside.iter().map(|z| z.start).collect::<Vec<_>>(),
        [zone(6), zone(7)]
    );
    for (sector, len) in [(0, 0), (0, 63), (zone(8), 4096), (u64::MAX, 4096)] {
        assert_eq!(
            status(&mut client, Request::ZoneReport { sector, len }),
            Status::ZONE_INVALID_CMD
        );
    }
    client.queue(0).set_framing(Framing {
        chunk: Some(100),
        ..Framing::LINUX
    });
    assert_eq!(zones(&mut client).len(), 8);
}

#[test]
fn a_report_of_many_zones_is_not_cut_at_a_batch() {
    let graph = "driver=zoned,file.driver=memory,file.size=4G,zone.mode=host-managed,zone.size=1M";
    let rig = Rig::new(graph);
    let mut client = rig.client();
    let all = client.queue(0).zone_report_all(8 << 20, 2048).unwrap();
    assert_eq!(all.len(), 4096);
    assert_eq!(client.queue(0).zone_report(0, 3000).unwrap().len(), 3000);
}

#[test]
fn appends_say_where_they_went() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client();
    for (pad, at) in [(0, 0), (7, 8), (3, 16)] {
        client.queue(0).set_framing(Framing {
            append_pad: pad,
            chunk: Some(700),
            ..Framing::LINUX
        });
        let data = pattern(at, 4096);
        assert_eq!(client.queue(0).zone_append(SEQ, &data).unwrap(), SEQ + at);
        assert_eq!(client.queue(0).read(SEQ + at, 4096).unwrap(), data);
    }
    drop(client);
    let mut client = rig.client_with(|o| o.engine = EngineKind::VirtioDriver);
    assert_eq!(client.queue(0).zone_append(SEQ, &[1; 4096]).unwrap(), SEQ + 24);
}

#[test]
fn appends_that_break_a_rule_are_invalid() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client();
    assert_eq!(
        status(&mut client, append(0, 4096)),
        Status::ZONE_INVALID_CMD,
        "conventional"
    );
    assert_eq!(
        status(&mut client, append(SEQ + 8, 4096)),
        Status::ZONE_INVALID_CMD,
        "not the first sector"
    );
    assert_eq!(
        status(&mut client, append(SEQ, (64 << 10) + 4096)),
        Status::ZONE_INVALID_CMD,
        "too long"
    );
    assert_eq!(
        status(&mut client, append(zone(8), 4096)),
        Status::ZONE_INVALID_CMD,
        "beyond the end"
    );
    assert_eq!(
        status(&mut client, append(SEQ, 512 * 3)),
        Status::ZONE_UNALIGNED_WP,
        "granularity"
    );
    for _ in 0..11 {
        assert_eq!(status(&mut client, append(SEQ, 64 << 10)), Status::OK);
    }
    assert_eq!(status(&mut client, append(SEQ, 60 << 10)), Status::OK);
    assert_eq!(
        status(&mut client, append(SEQ, 8192)),
        Status::ZONE_INVALID_CMD,
        "remaining capacity"
    );
    assert_eq!(status(&mut client, append(SEQ, 4096)), Status::OK);
    assert_eq!(
        status(&mut client, append(SEQ, 4096)),
        Status::ZONE_INVALID_CMD,
        "full"
    );
    assert_eq!(state(&mut client, 1), (ZoneState::Full, CAPACITY));
}

#[test]
fn a_device_without_append_says_unsupported() {
    let graph = ZONED.replace("max_append_bytes=64k", "max_append_bytes=0");
    let rig = Rig::new(&graph);
    let mut client = rig.client();
    assert_eq!(client.config().max_append_sectors, 0);
    assert_eq!(status(&mut client, append(SEQ, 4096)), Status::UNSUPP);
}

#[test]
fn writes_go_to_the_write_pointer() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client();
    assert_eq!(
        status(&mut client, write(SEQ + 8, 4096)),
        Status::ZONE_UNALIGNED_WP
    );
    assert_eq!(status(&mut client, write(SEQ, 4096)), Status::OK);
    assert_eq!(status(&mut client, write(SEQ, 4096)), Status::ZONE_UNALIGNED_WP);
    assert_eq!(
        status(&mut client, write(SEQ + 8, 512)),
        Status::ZONE_UNALIGNED_WP,
        "granularity"
    );
    assert_eq!(status(&mut client, write(SEQ + 8, 8192)), Status::OK);
    assert_eq!(state(&mut client, 1), (ZoneState::ImplicitlyOpen, 24));
    // Conventional zones take writes anywhere.
    assert_eq!(status(&mut client, write(800, 4096)), Status::OK);
}

#[test]
fn writes_beyond_capacity_or_zone_are_invalid() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client();
    for n in 0..5 {
        assert_eq!(status(&mut client, write(SEQ + n * 256, 128 << 10)), Status::OK);
    }
    let at = SEQ + 5 * 256;
    assert_eq!(
        status(&mut client, write(at, (128 << 10) + 4096)),
        Status::ZONE_INVALID_CMD,
        "capacity"
    );
    assert_eq!(status(&mut client, write(at, 128 << 10)), Status::OK);
    assert_eq!(
        status(&mut client, write(at + 256, 4096)),
        Status::ZONE_INVALID_CMD,
        "full"
    );
    assert_eq!(
        status(&mut client, write(zone(8), 4096)),
        Status::IOERR,
        "beyond the end"
    );
}

#[test]
fn reads_see_zeros_above_the_pointer_and_do_not_cross_zones() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client();
    client.queue(0).write(SEQ, &[7; 4096]).unwrap();
    let data = client.queue(0).read(SEQ, 12288).unwrap();
    assert!(data[..4096].iter().all(|&b| b == 7) && data[4096..].iter().all(|&b| b == 0));
    let read = |sector, len| Request::Read { sector, len };
    assert_eq!(
        status(&mut client, read(zone(2) - 8, 8192)),
        Status::ZONE_INVALID_CMD
    );
    assert_eq!(
        status(&mut client, read(zone(1) - 8, 8192)),
        Status::ZONE_INVALID_CMD,
        "from a conventional zone"
    );
    assert_eq!(
        status(&mut client, read(zone(2) - 8, 4096)),
        Status::OK,
        "up to the end"
    );
    assert_eq!(
        status(&mut client, read(zone(8) - 8, 8192)),
        Status::IOERR,
        "beyond the end"
    );
    let graph = ZONED.replace("conventional_zones=1", "conventional_zones=2");
    let rig = Rig::new(&graph);
    let mut client = rig.client();
    assert_eq!(
        status(&mut client, read(zone(1) - 8, 8192)),
        Status::OK,
        "two conventional zones"
    );
}

#[test]
fn open_and_active_limits_have_their_own_statuses() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client();
    for n in 1..=3 {
        client.queue(0).zone_open(zone(n)).unwrap();
    }
    assert_eq!(
        status(&mut client, Request::ZoneOpen(zone(4))),
        Status::ZONE_OPEN_RESOURCE
    );
    assert_eq!(
        status(&mut client, write(zone(4), 4096)),
        Status::ZONE_OPEN_RESOURCE
    );
    assert_eq!(
        status(&mut client, append(zone(4), 4096)),
        Status::ZONE_OPEN_RESOURCE
    );
    client.queue(0).write(zone(3), &[1; 4096]).unwrap();
    client.queue(0).zone_close(zone(3)).unwrap();
    client.queue(0).zone_open(zone(4)).unwrap();
    // Now 3 open and 4 active: both limits are met, and the active one is named.
    assert_eq!(
        status(&mut client, Request::ZoneOpen(zone(5))),
        Status::ZONE_ACTIVE_RESOURCE
    );
    assert_eq!(
        status(&mut client, write(zone(5), 4096)),
        Status::ZONE_ACTIVE_RESOURCE
    );
    assert_eq!(
        status(&mut client, append(zone(5), 4096)),
        Status::ZONE_ACTIVE_RESOURCE
    );
    client.queue(0).zone_reset(zone(1)).unwrap();
    assert_eq!(status(&mut client, write(zone(5), 4096)), Status::OK);
}

#[test]
fn zone_management_moves_zones_through_their_states() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client();
    let q = |client: &mut Client, request| assert_eq!(status(client, request), Status::OK);
    q(&mut client, Request::ZoneOpen(SEQ));
    q(&mut client, Request::ZoneOpen(SEQ));
    assert_eq!(state(&mut client, 1), (ZoneState::ExplicitlyOpen, 0));
    // Closed with nothing written: empty, unlike on ZNS.
    q(&mut client, Request::ZoneClose(SEQ));
    assert_eq!(state(&mut client, 1), (ZoneState::Empty, 0));
    q(&mut client, write(SEQ, 4096));
    q(&mut client, Request::ZoneClose(SEQ));
    q(&mut client, Request::ZoneClose(SEQ));
    assert_eq!(state(&mut client, 1), (ZoneState::Closed, 8));
    q(&mut client, Request::ZoneFinish(SEQ));
    q(&mut client, Request::ZoneFinish(SEQ));
    assert_eq!(state(&mut client, 1), (ZoneState::Full, CAPACITY));
    assert_eq!(
        status(&mut client, Request::ZoneOpen(SEQ)),
        Status::ZONE_INVALID_CMD
    );
    q(&mut client, Request::ZoneReset(SEQ));
    q(&mut client, Request::ZoneReset(SEQ));
    assert_eq!(state(&mut client, 1), (ZoneState::Empty, 0));
    q(&mut client, Request::ZoneFinish(SEQ));
    q(&mut client, write(zone(2), 4096));
    q(&mut client, Request::ZoneResetAll);
    assert!(
        zones(&mut client)[1..]
            .iter()
            .all(|z| z.state == ZoneState::Empty && z.wp == z.start)
    );
}

#[test]
fn zone_management_of_no_sequential_zone_is_invalid() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client();
    for make in [
        Request::ZoneOpen,
        Request::ZoneClose,
        Request::ZoneFinish,
        Request::ZoneReset,
    ] {
        for sector in [0, SEQ + 8, zone(8), u64::MAX / 512, u64::MAX] {
            assert_eq!(
                status(&mut client, make(sector)),
                Status::ZONE_INVALID_CMD,
                "{sector}"
            );
        }
    }
    let other = Request::Other {
        op: 26,
        sector: 8,
        out: vec![],
        in_len: 0,
    };
    assert_eq!(
        status(&mut client, other),
        Status::ZONE_INVALID_CMD,
        "reset all with a sector"
    );
}

#[test]
fn discard_and_write_zeroes_do_not_exist_on_a_host_managed_device() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client();
    let range = vec![zbdkit_testkit::client::BlockRange {
        sector: 0,
        sectors: 8,
        flags: 0,
    }];
    assert_eq!(
        status(&mut client, Request::Discard(range.clone())),
        Status::UNSUPP
    );
    assert_eq!(status(&mut client, Request::WriteZeroes(range)), Status::UNSUPP);
}

#[test]
fn a_driver_without_zones_is_told_by_reply_by_status_and_by_each_request() {
    let rig = Rig::new(ZONED);
    let unzoned = feature::ALL & !feature::ZONED;
    let error = rig.try_client(|o| o.features = unzoned).unwrap_err();
    assert!(
        matches!(
            error,
            ClientError::Refused {
                message: "SET_FEATURES",
                ..
            }
        ),
        "{error}"
    );
    let status_only = protocol_feature::STATUS | protocol_feature::CONFIG;
    let error = rig
        .try_client(|o| {
            o.features = unzoned;
            o.protocol_features = status_only;
        })
        .unwrap_err();
    assert!(matches!(error, ClientError::FeaturesNotOk { .. }), "{error}");
    let mut client = rig.client_with(|o| {
        o.features = unzoned;
        o.protocol_features = protocol_feature::CONFIG;
    });
    for request in [
        write(0, 4096),
        Request::Read { sector: 0, len: 4096 },
        Request::Flush,
        Request::GetId,
    ] {
        assert_eq!(status(&mut client, request), Status::IOERR);
    }
    for request in [
        Request::ZoneOpen(SEQ),
        append(SEQ, 4096),
        Request::ZoneReport { sector: 0, len: 4096 },
    ] {
        assert_eq!(status(&mut client, request), Status::UNSUPP);
    }
    drop(client);
    let mut client = rig.client();
    assert_eq!(
        status(&mut client, write(SEQ, 4096)),
        Status::OK,
        "one that knows zones is served"
    );
}

#[test]
fn a_legacy_driver_is_refused() {
    let rig = Rig::new(ZONED);
    let error = rig.try_client(|o| o.features &= !feature::VERSION_1).unwrap_err();
    assert!(
        matches!(
            error,
            ClientError::Refused {
                message: "SET_FEATURES",
                ..
            }
        ),
        "{error}"
    );
}

const HOST_AWARE: &str = "driver=zoned,file.driver=memory,file.size=8M,zone.mode=host-aware,zone.size=1M";

#[test]
fn a_host_aware_device_is_an_ordinary_disk_to_a_driver_without_zones() {
    let rig = Rig::new(HOST_AWARE);
    let mut client = rig.client_with(|o| o.features &= !feature::ZONED);
    let config = client.read_config().unwrap();
    assert_eq!(config.raw[72..], [0; 24]);
    let data = pattern(1, 16384);
    client.queue(0).write(zone(3) + 64, &data).unwrap();
    client.queue(0).write(64, &data).unwrap();
    assert_eq!(client.queue(0).read(zone(3) + 64, 16384).unwrap(), data);
    client.queue(0).write(zone(3) - 8, &data[..8192]).unwrap();
    assert_eq!(client.queue(0).read(zone(3) - 8, 8192).unwrap(), data[..8192]);
    assert_eq!(status(&mut client, Request::ZoneResetAll), Status::UNSUPP);
    // After the driver is gone the next one sees zones again.
    client.channel().unwrap().get_vring_base(0).unwrap();
    assert_eq!(client.read_config().unwrap().model, 2);
}

#[test]
fn a_host_aware_device_takes_writes_anywhere() {
    let rig = Rig::new(HOST_AWARE);
    let mut client = rig.client();
    assert_eq!(client.config().model, 2);
    assert_ne!(client.offered() & feature::DISCARD, 0);
    client.queue(0).write(zone(2) + 64, &[1; 4096]).unwrap();
    let zones = zones(&mut client);
    assert_eq!(
        (zones[2].kind, zones[2].wp - zones[2].start),
        (ZoneKind::SequentialPreferred, 72)
    );
    assert_eq!(
        status(&mut client, append(zone(2), 4096)),
        Status::ZONE_INVALID_CMD
    );
}

#[test]
fn sequential_writes_in_flight_together_arrive_in_order() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client();
    for n in 0..32 {
        client
            .queue(0)
            .submit(&Request::Write {
                sector: SEQ + n * 8,
                data: pattern(n, 4096),
            })
            .unwrap();
    }
    for _ in 0..32 {
        assert_eq!(client.queue(0).wait().unwrap().status, Status::OK);
    }
    for n in 0..32 {
        assert_eq!(client.queue(0).read(SEQ + n * 8, 4096).unwrap(), pattern(n, 4096));
    }
}

#[test]
fn appends_of_two_queues_get_places_of_their_own() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client_with(|o| o.queues = 2);
    let places: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = client
            .take_queues()
            .into_iter()
            .map(|mut queue| {
                scope.spawn(move || {
                    for n in 0..24 {
                        queue.submit(&append(SEQ, 4096 * (1 + n % 2))).unwrap();
                    }
                    (0..24)
                        .map(|_| queue.wait().unwrap().append_sector)
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    let mut sorted = places.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), 48);
    let mut client = {
        drop(client);
        rig.client()
    };
    assert_eq!(state(&mut client, 1).1, 48 * 12);
}

#[test]
fn devices_that_virtio_blk_cannot_carry_are_refused_with_the_reason() {
    let bind = |graph: &str| {
        let dir = tempfile::tempdir().unwrap();
        let options = ServeOptions::new(Socket::Path(dir.path().join("s")));
        Server::bind(open(graph), options).err().expect("is refused")
    };
    let error = bind("driver=zoned,file.driver=memory,file.size=9M,zone.mode=host-managed,zone.size=3M");
    assert!(
        matches!(
            error,
            BindError::Unsuitable(Unsuitable::ZoneSizeNotPowerOfTwo(0x300000))
        ),
        "{error}"
    );
    assert!(error.to_string().contains("power of two"), "{error}");
    let error = bind("driver=zoned,file.driver=memory,file.size=8T,zone.mode=host-managed,zone.size=4T");
    assert!(
        matches!(error, BindError::Unsuitable(Unsuitable::ZoneSizeTooBig(_))),
        "{error}"
    );
}

#[test]
fn set_features_may_come_again() {
    let rig = Rig::new(ZONED);
    let mut client = rig.client();
    let features = client.features();
    client
        .channel()
        .unwrap()
        .tell_u64("SET_FEATURES", code::SET_FEATURES, features)
        .unwrap();
    assert_eq!(status(&mut client, write(SEQ, 4096)), Status::OK);
}
