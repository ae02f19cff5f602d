//! Zoned namespaces: the state machine as ZNS has it, every status code of its own, reports.

mod host;

use host::{CAPACITY, Host, PLAIN_NSID, ZONE, ZONED, ZONED_NSID, ZONES, entry, rw, zone_receive, zone_send};
use zbdkit_block::ZoneOp;
use zbdkit_nvme::NamespaceOptions;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::nvm::Opcode;
use zbdkit_spec::nvme::zns::{Opcode as ZonedOpcode, SendAction, SendCdw13, ZoneState};

/// The operator's doing.
fn set(host: &Host, op: ZoneOp, zone: u64) {
    let device = host.subsystem.namespace(ZONED_NSID).unwrap().device();
    let lane = device.lane(1);
    host.runtime
        .block_on(device.zone_op(&lane, op, zone * ZONE * 512))
        .unwrap();
}

/// Fills a zone.
fn fill(host: &Host, zone: u64) {
    assert_eq!(host.write(ZONED_NSID, zone * ZONE, CAPACITY), Status::SUCCESS);
}

#[test]
fn a_write_starts_at_the_write_pointer() {
    let host = Host::new();
    assert_eq!(host.write(ZONED_NSID, 8, 8), Status::ZONE_INVALID_WRITE);
    assert_eq!(host.write(ZONED_NSID, 0, 8), Status::SUCCESS);
    assert_eq!(host.write(ZONED_NSID, 0, 8), Status::ZONE_INVALID_WRITE);
    assert_eq!(host.state(0), (ZoneState::IMPLICITLY_OPENED, 8));
    let zeroes = |lba| host.send(rw(Opcode::WRITE_ZEROES.0, ZONED_NSID, lba, 8), &[]);
    assert_eq!(zeroes(16), Status::ZONE_INVALID_WRITE);
    assert_eq!(zeroes(8), Status::SUCCESS);
    assert_eq!(host.state(0).1, 16);
    host.must_work();
}

#[test]
fn a_write_ends_inside_the_zones_capacity() {
    let host = Host::new();
    assert_eq!(
        host.write(ZONED_NSID, 0, CAPACITY + 1),
        Status::ZONE_BOUNDARY_ERROR
    );
    assert_eq!(host.write(ZONED_NSID, ZONE - 4, 8), Status::ZONE_BOUNDARY_ERROR);
    assert_eq!(host.write(ZONED_NSID, 0, CAPACITY - 4), Status::SUCCESS);
    assert_eq!(host.append(0, 8).0, Status::ZONE_BOUNDARY_ERROR);
    assert_eq!(host.append(0, 4), (Status::SUCCESS, CAPACITY - 4));
    assert_eq!(host.state(0), (ZoneState::FULL, u64::MAX));
    host.must_work();
}

#[test]
fn a_full_zone_takes_no_write_and_no_open_or_close() {
    let host = Host::new();
    fill(&host, 1);
    assert_eq!(host.write(ZONED_NSID, ZONE, 8), Status::ZONE_IS_FULL);
    assert_eq!(host.append(1, 8).0, Status::ZONE_IS_FULL);
    assert_eq!(
        host.zone(SendAction::OPEN, ZONE),
        Status::INVALID_ZONE_STATE_TRANSITION
    );
    assert_eq!(
        host.zone(SendAction::CLOSE, ZONE),
        Status::INVALID_ZONE_STATE_TRANSITION
    );
    assert_eq!(host.zone(SendAction::FINISH, ZONE), Status::SUCCESS);
    host.must_work();
}

#[test]
fn read_only_and_offline_zones_have_their_own_statuses() {
    let host = Host::new();
    assert_eq!(host.write(ZONED_NSID, ZONE, 8), Status::SUCCESS);
    set(&host, ZoneOp::SetReadOnly, 1);
    assert_eq!(host.state(1), (ZoneState::READ_ONLY, u64::MAX.wrapping_sub(ZONE)));
    assert_eq!(host.write(ZONED_NSID, ZONE + 8, 8), Status::ZONE_IS_READ_ONLY);
    assert_eq!(host.append(1, 8).0, Status::ZONE_IS_READ_ONLY);
    assert!(host.read(ZONED_NSID, ZONE, 8) == host::pattern(ZONE, 8));
    let actions = [
        SendAction::OPEN,
        SendAction::CLOSE,
        SendAction::FINISH,
        SendAction::RESET,
    ];
    for action in actions {
        assert_eq!(
            host.zone(action, ZONE),
            Status::INVALID_ZONE_STATE_TRANSITION,
            "{action:?}"
        );
    }
    assert_eq!(host.zone(SendAction::OFFLINE, ZONE), Status::SUCCESS);
    assert_eq!(host.state(1).0, ZoneState::OFFLINE);
    assert_eq!(host.zone(SendAction::OFFLINE, ZONE), Status::SUCCESS, "it is");
    assert_eq!(host.write(ZONED_NSID, ZONE + 8, 8), Status::ZONE_IS_OFFLINE);
    for opcode in [Opcode::READ, Opcode::COMPARE, Opcode::VERIFY] {
        assert_eq!(
            host.send(rw(opcode.0, ZONED_NSID, ZONE, 8), &[]),
            Status::ZONE_IS_OFFLINE,
            "{opcode:?}"
        );
    }
    for action in actions {
        assert_eq!(
            host.zone(action, ZONE),
            Status::INVALID_ZONE_STATE_TRANSITION,
            "{action:?}"
        );
    }
    assert_eq!(
        host.zone(SendAction::OFFLINE, 0),
        Status::INVALID_ZONE_STATE_TRANSITION
    );
    host.must_work();
}

#[test]
fn open_and_active_zones_are_limited() {
    let host = Host::new();
    for zone in 0..3 {
        assert_eq!(host.zone(SendAction::OPEN, zone * ZONE), Status::SUCCESS);
    }
    assert_eq!(host.zone(SendAction::OPEN, 3 * ZONE), Status::TOO_MANY_OPEN_ZONES);
    assert_eq!(host.write(ZONED_NSID, 3 * ZONE, 8), Status::TOO_MANY_OPEN_ZONES);
    assert_eq!(host.append(3, 8).0, Status::TOO_MANY_OPEN_ZONES);
    assert_eq!(host.zone(SendAction::CLOSE, 0), Status::SUCCESS);
    assert_eq!(host.write(ZONED_NSID, 3 * ZONE, 8), Status::SUCCESS);
    assert_eq!(host.write(ZONED_NSID, 4 * ZONE, 8), Status::TOO_MANY_ACTIVE_ZONES);
    assert_eq!(host.append(4, 8).0, Status::TOO_MANY_ACTIVE_ZONES);
    assert_eq!(
        host.zone(SendAction::OPEN, 4 * ZONE),
        Status::TOO_MANY_ACTIVE_ZONES
    );
    assert_eq!(
        host.zone(SendAction::FINISH, 4 * ZONE),
        Status::TOO_MANY_ACTIVE_ZONES
    );
    host.must_work();
}

#[test]
fn an_opened_zone_is_closed_even_where_nothing_was_written() {
    let host = Host::new();
    assert_eq!(host.zone(SendAction::OPEN, 0), Status::SUCCESS);
    assert_eq!(host.state(0), (ZoneState::EXPLICITLY_OPENED, 0));
    assert_eq!(host.zone(SendAction::OPEN, 0), Status::SUCCESS);
    assert_eq!(host.zone(SendAction::CLOSE, 0), Status::SUCCESS);
    assert_eq!(host.state(0), (ZoneState::CLOSED, 0));
    assert_eq!(host.zone(SendAction::CLOSE, 0), Status::SUCCESS);
    assert_eq!(host.zone(SendAction::RESET, 0), Status::SUCCESS);
    assert_eq!(host.zone(SendAction::RESET, 0), Status::SUCCESS);
    assert_eq!(
        host.zone(SendAction::CLOSE, 0),
        Status::INVALID_ZONE_STATE_TRANSITION
    );
    host.must_work();
}

#[test]
fn an_action_names_a_zone_by_its_first_block() {
    let host = Host::new();
    for action in [
        SendAction::OPEN,
        SendAction::CLOSE,
        SendAction::FINISH,
        SendAction::RESET,
        SendAction::OFFLINE,
    ] {
        assert_eq!(host.zone(action, 1), Status::INVALID_FIELD, "{action:?}");
        assert_eq!(
            host.zone(action, ZONES * ZONE),
            Status::LBA_OUT_OF_RANGE,
            "{action:?}"
        );
        assert_eq!(
            host.zone(action, u64::MAX),
            Status::LBA_OUT_OF_RANGE,
            "{action:?}"
        );
    }
    assert_eq!(host.zone(SendAction(0), 0), Status::INVALID_FIELD);
    assert_eq!(host.zone(SendAction(0x12), 0), Status::INVALID_FIELD);
    host.must_work();
}

#[test]
fn what_no_namespace_has_is_refused() {
    let host = Host::new();
    assert_eq!(
        host.zone(SendAction::SET_DESCRIPTOR_EXTENSION, 0),
        Status::INVALID_FIELD
    );
    assert_eq!(
        host.zone(SendAction::FLUSH_EXPLICIT_ZRWA_RANGE, 0),
        Status::INVALID_FIELD
    );
    assert_eq!(
        host.all_zones(SendAction::SET_DESCRIPTOR_EXTENSION),
        Status::INVALID_FIELD
    );
    let with_zrwa = zone_send(SendAction::OPEN, 0, SendCdw13::new().with_zsaso(true));
    assert_eq!(host.send(with_zrwa, &[]), Status::INVALID_FIELD);
    assert_eq!(host.state(0).0, ZoneState::EMPTY);
    let mut extended = zone_receive(0, 4096, 0, false);
    extended.cdw13 = 1.into();
    assert_eq!(host.send(extended, &[]), Status::INVALID_FIELD);
    host.must_work();
}

#[test]
fn actions_for_all_zones_leave_out_those_that_they_are_not_for() {
    let host = Host::new();
    host.zone(SendAction::OPEN, 0);
    host.write(ZONED_NSID, ZONE, 8);
    fill(&host, 2);
    set(&host, ZoneOp::SetReadOnly, 5);
    set(&host, ZoneOp::SetOffline, 6);
    let states = |host: &Host| (0..ZONES).map(|zone| host.state(zone).0).collect::<Vec<_>>();
    let (empty, full, closed) = (ZoneState::EMPTY, ZoneState::FULL, ZoneState::CLOSED);
    let tail = |sixth| [empty, empty, sixth, ZoneState::OFFLINE, empty];
    assert_eq!(host.all_zones(SendAction::CLOSE), Status::SUCCESS);
    assert_eq!(
        states(&host),
        [&[closed, closed, full][..], &tail(ZoneState::READ_ONLY)].concat()
    );
    assert_eq!(host.all_zones(SendAction::OPEN), Status::SUCCESS);
    let open = ZoneState::EXPLICITLY_OPENED;
    assert_eq!(
        states(&host),
        [&[open, open, full][..], &tail(ZoneState::READ_ONLY)].concat()
    );
    assert_eq!(host.all_zones(SendAction::FINISH), Status::SUCCESS);
    assert_eq!(
        states(&host),
        [&[full, full, full][..], &tail(ZoneState::READ_ONLY)].concat()
    );
    assert_eq!(host.all_zones(SendAction::RESET), Status::SUCCESS);
    assert_eq!(
        states(&host),
        [&[empty, empty, empty][..], &tail(ZoneState::READ_ONLY)].concat()
    );
    assert_eq!(host.all_zones(SendAction::OFFLINE), Status::SUCCESS);
    assert_eq!(
        states(&host),
        [&[empty, empty, empty][..], &tail(ZoneState::OFFLINE)].concat()
    );
    host.must_work();
}

#[test]
fn all_closed_zones_are_opened_or_none() {
    let host = Host::new();
    for zone in 0..4 {
        assert_eq!(host.write(ZONED_NSID, zone * ZONE, 8), Status::SUCCESS);
    }
    assert_eq!(host.all_zones(SendAction::CLOSE), Status::SUCCESS);
    assert_eq!(host.all_zones(SendAction::OPEN), Status::TOO_MANY_OPEN_ZONES);
    assert!((0..4).all(|zone| host.state(zone).0 == ZoneState::CLOSED));
    host.must_work();
}

#[test]
fn an_append_names_a_zone_and_is_no_longer_than_the_limit() {
    let host = Host::new();
    assert_eq!(host.append(2, 8), (Status::SUCCESS, 2 * ZONE));
    assert_eq!(host.append(2, 8), (Status::SUCCESS, 2 * ZONE + 8));
    assert_eq!(
        host.append(2, 128),
        (Status::SUCCESS, 2 * ZONE + 16),
        "64 KiB is the limit"
    );
    assert_eq!(host.append(2, 129).0, Status::INVALID_FIELD);
    let append = |lba, count| host.send(rw(ZonedOpcode::ZONE_APPEND.0, ZONED_NSID, lba, count), &[]);
    assert_eq!(append(2 * ZONE + 8, 8), Status::INVALID_FIELD);
    assert_eq!(append(ZONES * ZONE, 8), Status::LBA_OUT_OF_RANGE);
    host.must_work();
}

#[test]
fn reads_cross_zones_only_where_the_namespace_says_so() {
    let host = Host::new();
    fill(&host, 0);
    assert_eq!(host.write(ZONED_NSID, ZONE, 8), Status::SUCCESS);
    for opcode in [Opcode::READ, Opcode::COMPARE, Opcode::VERIFY] {
        let crossing = rw(opcode.0, ZONED_NSID, ZONE - 8, 16);
        assert_eq!(
            host.send(crossing, &[]),
            Status::ZONE_BOUNDARY_ERROR,
            "{opcode:?}"
        );
    }
    drop(host);
    let options = NamespaceOptions {
        read_across_zones: true,
        ..NamespaceOptions::default()
    };
    let host = Host::over(&[(ZONED, options)]);
    fill(&host, 0);
    assert_eq!(host.write(ZONED_NSID, ZONE, 8), Status::SUCCESS);
    let expected = [
        host::pattern(CAPACITY - 8, 8),
        vec![0; 512 * 512],
        host::pattern(ZONE, 8),
    ]
    .concat();
    assert!(host.read(ZONED_NSID, CAPACITY - 8, 528) == expected);
    assert_eq!(
        host.send(rw(Opcode::VERIFY.0, ZONED_NSID, 0, ZONES * ZONE), &[]),
        Status::SUCCESS
    );
    host.must_work();
}

#[test]
fn a_report_shows_the_zones_that_its_filter_asks_for() {
    let host = Host::new();
    host.write(ZONED_NSID, 0, 8);
    host.zone(SendAction::OPEN, ZONE);
    host.write(ZONED_NSID, 2 * ZONE, 8);
    host.zone(SendAction::CLOSE, 2 * ZONE);
    fill(&host, 3);
    set(&host, ZoneOp::SetReadOnly, 4);
    set(&host, ZoneOp::SetOffline, 5);
    let starts = |filter| {
        let (count, zones) = host.report(0, 16, filter, false);
        let starts: Vec<u64> = zones.iter().map(|zone| zone.zslba.get() / ZONE).collect();
        assert_eq!(count, starts.len() as u64);
        starts
    };
    assert_eq!(starts(0), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(starts(1), [6, 7]);
    for (filter, zone) in (2..8).zip(0..6) {
        assert_eq!(starts(filter), [zone], "filter {filter}");
    }
    assert_eq!(
        host.send(zone_receive(0, 4096, 8, false), &[]),
        Status::INVALID_FIELD
    );
    let (_, zones) = host.report(0, 16, 0, false);
    assert!(
        zones
            .iter()
            .all(|zone| zone.zt == 2 && zone.zcap.get() == CAPACITY && zone.za == 0)
    );
    assert_eq!(zones[2].zs, 0x40);
    host.must_work();
}

#[test]
fn a_report_counts_what_matches_or_what_it_has() {
    let host = Host::new();
    let (count, zones) = host.report(2 * ZONE + 5, 3, 0, false);
    assert_eq!((count, zones.len()), (6, 3), "all from the zone of that block on");
    assert_eq!(zones[0].zslba.get(), 2 * ZONE);
    let (count, zones) = host.report(0, 3, 0, true);
    assert_eq!((count, zones.len()), (3, 3));
    let (count, zones) = host.report(0, 0, 0, false);
    assert_eq!((count, zones.len()), (8, 0));
    let (count, _) = host.report(0, 0, 0, true);
    assert_eq!(count, 0);
    // A descriptor that does not fit is not begun.
    let bytes = host.receive(zone_receive(0, 64 + 64 + 32, 0, true));
    assert!(bytes[128..].iter().all(|byte| *byte == 0));
    host.must_work();
}

#[test]
fn a_report_has_bounds() {
    let host = Host::new();
    assert_eq!(
        host.send(zone_receive(0, 60, 0, false), &[]),
        Status::INVALID_FIELD
    );
    assert_eq!(
        host.send(zone_receive(ZONES * ZONE, 4096, 0, false), &[]),
        Status::LBA_OUT_OF_RANGE
    );
    let limit = host.controller.max_transfer();
    assert_eq!(
        host.send(zone_receive(0, limit + 4, 0, false), &[]),
        Status::INVALID_FIELD
    );
    assert_eq!(host.send(zone_receive(0, limit, 0, false), &[]), Status::SUCCESS);
    let mut unknown = zone_receive(0, 4096, 0, false);
    unknown.cdw13 = 2.into();
    assert_eq!(host.send(unknown, &[]), Status::INVALID_FIELD);
    host.must_work();
}

#[test]
fn a_conventional_namespace_knows_no_zone_commands() {
    let host = Host::new();
    for opcode in [
        ZonedOpcode::ZONE_APPEND,
        ZonedOpcode::ZONE_MANAGEMENT_SEND,
        ZonedOpcode::ZONE_MANAGEMENT_RECEIVE,
    ] {
        let mut command = entry(opcode.0, PLAIN_NSID);
        command.cdw13 = u32::from(opcode == ZonedOpcode::ZONE_MANAGEMENT_SEND).into();
        assert_eq!(host.send(command, &[]), Status::INVALID_OPCODE, "{opcode:?}");
    }
    host.must_work();
}

#[test]
fn a_short_last_zone_is_shown_at_full_size_with_less_capacity() {
    let graph = "driver=zoned,file.driver=memory,file.size=2560k,zone.mode=host-managed,block_size=512,zone.size=1M,\
        zone.max_append_bytes=64k";
    let host = Host::over(&[(graph, NamespaceOptions::default())]);
    let (count, zones) = host.report(0, 8, 0, false);
    assert_eq!(count, 3);
    assert_eq!(zones[2].zcap.get(), ZONE / 2);
    let last = 2 * ZONE;
    assert!(host.read(ZONED_NSID, last + ZONE / 2 - 8, 16) == vec![0; 16 * 512]);
    assert!(host.read(ZONED_NSID, last + ZONE - 8, 8) == vec![0; 8 * 512]);
    assert_eq!(
        host.write(ZONED_NSID, last, ZONE / 2 + 8),
        Status::ZONE_BOUNDARY_ERROR
    );
    assert_eq!(
        host.write(ZONED_NSID, last + ZONE / 2, 8),
        Status::ZONE_BOUNDARY_ERROR
    );
    assert_eq!(
        host.send(rw(Opcode::READ.0, ZONED_NSID, last + ZONE, 8), &[]),
        Status::LBA_OUT_OF_RANGE
    );
    assert_eq!(host.write(ZONED_NSID, last, ZONE / 2), Status::SUCCESS);
    assert_eq!(host.state(2).0, ZoneState::FULL);
    host.must_work();
}
