//! What a zoned namespace can have besides: random write areas, descriptor extensions, attributes of zones.

mod host;

use host::{
    BLOCK, CAPACITY, Host, Memory, ZONE, ZONED_NSID, get_log, identify, pattern, zone_receive, zone_send,
};
use zbdkit_block::ZoneOp;
use zbdkit_nvme::{Direction, NamespaceOptions};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::log::LogId;
use zbdkit_spec::nvme::zns::{
    self, Attributes, ChangedZoneList, ReportHeader, SendAction, SendCdw13, ZoneDescriptor, ZoneState,
};
use zbdkit_zone::Recommendation;
use zerocopy::FromBytes;

/// Blocks of an area, and of its granules.
const AREA: u64 = 128;
const GRANULE: u64 = 16;
/// Bytes of an extension.
const EXTENSION: usize = 128;

fn open_with_area(host: &Host, zone: u64) -> Status {
    let option = SendCdw13::new().with_zsaso(true);
    host.send(zone_send(SendAction::OPEN, zone * ZONE, option), &[])
}

/// Commits up to block `end` of the device, which is the first that is left out.
fn commit(host: &Host, end: u64) -> Status {
    host.zone(SendAction::FLUSH_EXPLICIT_ZRWA_RANGE, end - 1)
}

fn set_extension(host: &Host, zone: u64, data: &[u8]) -> Status {
    host.send(
        zone_send(
            SendAction::SET_DESCRIPTOR_EXTENSION,
            zone * ZONE,
            SendCdw13::new(),
        ),
        data,
    )
}

fn attributes(host: &Host, zone: u64) -> Attributes {
    host.report(zone * ZONE, 1, 0, true).1[0].attributes()
}

/// Zones of an extended report with what it shows of their extensions.
fn extended(host: &Host, lba: u64, len: usize, partial: bool) -> (u64, Vec<(ZoneDescriptor, Vec<u8>)>) {
    let mut command = zone_receive(lba, len, 0, partial);
    command.cdw13 = (command.cdw13.get() | 1).into();
    let bytes = host.receive(command);
    let (header, rest) = ReportHeader::read_from_prefix(&bytes).unwrap();
    let zones = rest.chunks_exact(64 + EXTENSION).map(|zone| {
        let (descriptor, extension) = ZoneDescriptor::read_from_prefix(zone).unwrap();
        (descriptor, extension.to_vec())
    });
    let zones = zones.filter(|(descriptor, _)| descriptor.zt != 0).collect();
    (header.nr_zones.get(), zones)
}

#[test]
fn a_namespace_says_what_its_image_has() {
    let host = Host::with_areas();
    let data = zns::IdentifyNamespace::read_from_bytes(&host.ask(identify(5, ZONED_NSID, 2))).unwrap();
    assert_eq!((data.ozcs.get(), data.zoc.get()), (1 << 1, 0));
    assert_eq!(
        (
            data.numzrwa.get(),
            data.zrwafg.get(),
            data.zrwasz.get(),
            data.zrwacap
        ),
        (2, GRANULE as u16, AREA as u16, 1)
    );
    assert_eq!(data.lbafe[0].zdes, 2);
    host.must_work();
}

#[test]
fn without_a_limit_of_areas_the_active_limit_is_one() {
    let graph = format!("{},zone.zrwa_size=64k,zone.zrwa_granularity=8k", host::ZONED);
    let host = Host::over(&[(&graph, NamespaceOptions::default())]);
    let data = zns::IdentifyNamespace::read_from_bytes(&host.ask(identify(5, ZONED_NSID, 2))).unwrap();
    assert_eq!((data.numzrwa.get(), data.lbafe[0].zdes), (4, 0));
    for zone in 0..3 {
        assert_eq!(open_with_area(&host, zone), Status::SUCCESS);
    }
    host.must_work();
}

#[test]
fn blocks_of_an_area_are_written_in_any_order_and_again() {
    let host = Host::with_areas();
    assert_eq!(open_with_area(&host, 1), Status::SUCCESS);
    assert!(attributes(&host, 1).zrwav());
    for lba in [ZONE + 40, ZONE + AREA - 8, ZONE, ZONE + 40] {
        assert_eq!(host.write(ZONED_NSID, lba, 8), Status::SUCCESS, "{lba}");
    }
    assert_eq!(host.state(1), (ZoneState::EXPLICITLY_OPENED, 0));
    let expected = [vec![0; 8 * BLOCK], pattern(ZONE + 40, 8), vec![0; 8 * BLOCK]].concat();
    assert!(host.read(ZONED_NSID, ZONE + 32, 24) == expected);
    // One block into the region behind the area moves it by a granule.
    assert_eq!(host.write(ZONED_NSID, ZONE + AREA, 1), Status::SUCCESS);
    assert_eq!(host.state(1).1, GRANULE);
    let below = host.write(ZONED_NSID, ZONE + GRANULE - 8, 16);
    assert_eq!(below, Status::ZONE_INVALID_WRITE);
    let above = host.write(ZONED_NSID, ZONE + GRANULE + 2 * AREA - 8, 16);
    assert_eq!(above, Status::ZONE_INVALID_WRITE);
    assert_eq!(host.append(1, 8).0, Status::INVALID_ZONE_OPERATION);
    assert_eq!(host.state(1), (ZoneState::EXPLICITLY_OPENED, GRANULE));
    host.must_work();
}

#[test]
fn an_area_is_committed_by_the_last_block_that_it_names() {
    let host = Host::with_areas();
    assert_eq!(
        commit(&host, ZONE + GRANULE),
        Status::INVALID_ZONE_OPERATION,
        "no area"
    );
    assert_eq!(open_with_area(&host, 1), Status::SUCCESS);
    assert_eq!(host.write(ZONED_NSID, ZONE + 20, 4), Status::SUCCESS);
    assert_eq!(commit(&host, ZONE + 2 * GRANULE), Status::SUCCESS);
    assert_eq!(host.state(1).1, 2 * GRANULE);
    assert_eq!(
        commit(&host, ZONE + 2 * GRANULE + 9),
        Status::INVALID_FIELD,
        "no granule"
    );
    let outside = Status::ZONE_BOUNDARY_ERROR;
    assert_eq!(commit(&host, ZONE + GRANULE), outside, "below the area");
    assert_eq!(
        commit(&host, ZONE + 2 * GRANULE + AREA + GRANULE),
        outside,
        "above it"
    );
    assert_eq!(commit(&host, u64::MAX), Status::LBA_OUT_OF_RANGE);
    assert_eq!(
        host.all_zones(SendAction::FLUSH_EXPLICIT_ZRWA_RANGE),
        Status::INVALID_FIELD
    );
    assert_eq!(host.state(1).1, 2 * GRANULE);
    assert_eq!(
        commit(&host, ZONE + 2 * GRANULE + AREA),
        Status::SUCCESS,
        "all of it"
    );
    // What was never written was committed, too.
    let expected = [vec![0; 20 * BLOCK], pattern(ZONE + 20, 4), vec![0; 20 * BLOCK]].concat();
    assert!(host.read(ZONED_NSID, ZONE, 44) == expected);
    host.must_work();
}

#[test]
fn a_zone_keeps_its_area_until_it_is_full_finished_or_reset() {
    let host = Host::with_areas();
    let has = |zone| attributes(&host, zone).zrwav();
    for zone in 0..2 {
        assert_eq!(open_with_area(&host, zone), Status::SUCCESS);
    }
    assert_eq!(open_with_area(&host, 2), Status::ZRWA_RESOURCES_UNAVAILABLE);
    assert_eq!(host.state(2).0, ZoneState::EMPTY);
    assert_eq!(host.zone(SendAction::CLOSE, 0), Status::SUCCESS);
    assert_eq!((host.state(0).0, has(0)), (ZoneState::CLOSED, true));
    assert_eq!(open_with_area(&host, 2), Status::ZRWA_RESOURCES_UNAVAILABLE);
    assert_eq!(open_with_area(&host, 0), Status::SUCCESS, "it has one");
    assert_eq!(host.zone(SendAction::RESET, 0), Status::SUCCESS);
    assert!(!has(0));
    assert_eq!(open_with_area(&host, 2), Status::SUCCESS);
    assert_eq!(host.zone(SendAction::FINISH, 2 * ZONE), Status::SUCCESS);
    assert_eq!((host.state(2).0, has(2)), (ZoneState::FULL, false));
    assert_eq!(open_with_area(&host, 0), Status::SUCCESS);
    // To the end of the capacity, an area's length at a time.
    for lba in (ZONE..ZONE + CAPACITY).step_by(AREA as usize) {
        assert_eq!(host.write(ZONED_NSID, lba, AREA), Status::SUCCESS);
    }
    assert_eq!(host.state(1), (ZoneState::EXPLICITLY_OPENED, CAPACITY - AREA));
    let beyond = host.write(ZONED_NSID, ZONE + CAPACITY - 8, 16);
    assert_eq!(beyond, Status::ZONE_BOUNDARY_ERROR);
    assert_eq!(commit(&host, ZONE + CAPACITY), Status::SUCCESS);
    assert_eq!((host.state(1).0, has(1)), (ZoneState::FULL, false));
    assert_eq!(open_with_area(&host, 3), Status::SUCCESS);
    host.must_work();
}

#[test]
fn an_area_begins_at_a_granule_in_a_zone_that_can_be_opened() {
    let host = Host::with_areas();
    assert_eq!(host.write(ZONED_NSID, 0, GRANULE), Status::SUCCESS);
    assert_eq!(open_with_area(&host, 0), Status::SUCCESS);
    assert_eq!(host.state(0), (ZoneState::EXPLICITLY_OPENED, GRANULE));
    assert_eq!(host.write(ZONED_NSID, GRANULE + 8, 8), Status::SUCCESS);
    assert_eq!(host.write(ZONED_NSID, ZONE, 8), Status::SUCCESS);
    assert_eq!(open_with_area(&host, 1), Status::INVALID_ZONE_OPERATION);
    assert_eq!(host.state(1), (ZoneState::IMPLICITLY_OPENED, 8));
    assert_eq!(host.write(ZONED_NSID, 2 * ZONE, CAPACITY), Status::SUCCESS);
    assert_eq!(open_with_area(&host, 2), Status::INVALID_ZONE_STATE_TRANSITION);
    host.set(ZoneOp::SetReadOnly, 3);
    assert_eq!(open_with_area(&host, 3), Status::INVALID_ZONE_STATE_TRANSITION);
    host.set(ZoneOp::SetOffline, 3);
    assert_eq!(open_with_area(&host, 3), Status::INVALID_ZONE_STATE_TRANSITION);
    let everywhere = SendCdw13::new().with_zsaso(true).with_select_all(true);
    let refused = host.send(zone_send(SendAction::OPEN, 0, everywhere), &[]);
    assert_eq!(refused, Status::INVALID_FIELD);
    for zone in [4, 5] {
        assert_eq!(host.zone(SendAction::OPEN, zone * ZONE), Status::SUCCESS);
    }
    assert_eq!(open_with_area(&host, 6), Status::TOO_MANY_ACTIVE_ZONES);
    assert_eq!(host.zone(SendAction::RESET, ZONE), Status::SUCCESS);
    assert_eq!(open_with_area(&host, 6), Status::TOO_MANY_OPEN_ZONES);
    assert_eq!(host.state(6).0, ZoneState::EMPTY);
    host.must_work();
}

#[test]
fn an_extension_is_attached_to_an_empty_zone_and_reported() {
    let host = Host::with_areas();
    let data = pattern(7, 1)[..EXTENSION].to_vec();
    let memory = Memory::new(data.clone());
    let command = zone_send(SendAction::SET_DESCRIPTOR_EXTENSION, 2 * ZONE, SendCdw13::new());
    assert!(host.io(&command, &memory).is_success());
    assert_eq!(memory.asked.get(), Some((Direction::HostToController, EXTENSION)));
    assert_eq!(host.state(2), (ZoneState::CLOSED, 0));
    assert_eq!(attributes(&host, 2).into_bits(), 1 << 7);
    let (count, zones) = extended(&host, ZONE, 64 + 3 * (64 + EXTENSION), false);
    assert_eq!((count, zones.len()), (7, 3));
    assert!(zones[0].1 == [0; EXTENSION] && zones[1].1 == data && zones[2].1 == [0; EXTENSION]);
    assert_eq!(zones[1].0.zslba.get(), 2 * ZONE);
    // Half a descriptor is none, and neither is one without its extension.
    let (count, zones) = extended(&host, 2 * ZONE, 64 + 64 + EXTENSION + 64, true);
    assert_eq!((count, zones.len()), (1, 1));
    let transition = Status::INVALID_ZONE_STATE_TRANSITION;
    assert_eq!(set_extension(&host, 2, &data), transition, "it has one");
    assert_eq!(host.write(ZONED_NSID, 0, 8), Status::SUCCESS);
    assert_eq!(set_extension(&host, 0, &data), transition, "it is not empty");
    assert_eq!(host.write(ZONED_NSID, 2 * ZONE, 8), Status::SUCCESS);
    assert_eq!(host.zone(SendAction::FINISH, 2 * ZONE), Status::SUCCESS);
    assert_eq!(attributes(&host, 2).into_bits(), 1 << 7, "a finish keeps it");
    assert_eq!(host.zone(SendAction::RESET, 2 * ZONE), Status::SUCCESS);
    assert_eq!(
        (host.state(2).0, attributes(&host, 2).into_bits()),
        (ZoneState::EMPTY, 0)
    );
    let (_, zones) = extended(&host, 2 * ZONE, 64 + 64 + EXTENSION, true);
    assert!(zones[0].1 == [0; EXTENSION]);
    host.must_work();
}

#[test]
fn an_extension_takes_an_active_zone_and_a_zones_first_block() {
    let host = Host::with_areas();
    for zone in 0..4 {
        assert_eq!(set_extension(&host, zone, &[1; EXTENSION]), Status::SUCCESS);
    }
    assert_eq!(
        set_extension(&host, 4, &[1; EXTENSION]),
        Status::TOO_MANY_ACTIVE_ZONES
    );
    assert_eq!(host.state(4).0, ZoneState::EMPTY);
    let inside = zone_send(
        SendAction::SET_DESCRIPTOR_EXTENSION,
        4 * ZONE + 8,
        SendCdw13::new(),
    );
    assert_eq!(host.send(inside, &[]), Status::INVALID_FIELD);
    assert_eq!(
        host.all_zones(SendAction::SET_DESCRIPTOR_EXTENSION),
        Status::INVALID_FIELD
    );
    let mut missing = Memory::failing(Status::DATA_TRANSFER_ERROR.into());
    missing.data = vec![1; EXTENSION];
    assert_eq!(host.zone(SendAction::RESET, 0), Status::SUCCESS);
    let command = zone_send(SendAction::SET_DESCRIPTOR_EXTENSION, 0, SendCdw13::new());
    let failed = host.io(&command, &missing);
    assert_eq!(failed.status.status(), Status::DATA_TRANSFER_ERROR);
    assert_eq!(host.state(0).0, ZoneState::EMPTY, "nothing was done");
    host.must_work();
}

#[test]
fn an_extension_may_come_with_an_area_both_or_neither() {
    let host = Host::with_areas();
    let option = SendCdw13::new().with_zsaso(true);
    let both = |zone: u64| {
        let command = zone_send(SendAction::SET_DESCRIPTOR_EXTENSION, zone * ZONE, option);
        host.send(command, &[3; EXTENSION])
    };
    for zone in 0..2 {
        assert_eq!(both(zone), Status::SUCCESS);
        assert_eq!(host.state(zone), (ZoneState::CLOSED, 0));
        assert!(attributes(&host, zone).zrwav() && attributes(&host, zone).zdev());
    }
    assert_eq!(both(2), Status::ZRWA_RESOURCES_UNAVAILABLE);
    assert_eq!(
        (host.state(2).0, attributes(&host, 2)),
        (ZoneState::EMPTY, Attributes::new())
    );
    let (_, zones) = extended(&host, 2 * ZONE, 64 + 64 + EXTENSION, true);
    assert!(zones[0].1 == [0; EXTENSION]);
    assert_eq!(host.write(ZONED_NSID, 40, 8), Status::SUCCESS);
    host.must_work();
}

#[test]
fn a_shutdown_leaves_zones_closed_that_have_an_area_or_an_extension() {
    let host = Host::with_areas();
    assert_eq!(open_with_area(&host, 0), Status::SUCCESS);
    assert_eq!(set_extension(&host, 1, &[1; EXTENSION]), Status::SUCCESS);
    assert_eq!(host.zone(SendAction::OPEN, ZONE), Status::SUCCESS);
    assert_eq!(host.zone(SendAction::OPEN, 2 * ZONE), Status::SUCCESS);
    host.runtime.block_on(host.controller.shut_down());
    let states = [0, 1, 2].map(|zone| host.state(zone).0);
    assert_eq!(states, [ZoneState::CLOSED, ZoneState::CLOSED, ZoneState::EMPTY]);
    assert!(attributes(&host, 0).zrwav() && attributes(&host, 1).zdev());
    host.must_work();
}

#[test]
fn what_the_device_does_to_zones_and_would_have_done_is_told_and_reported() {
    let host = Host::with_areas();
    let list = || {
        let page = host.ask(get_log(LogId::CHANGED_ZONES.0, ZONED_NSID, 4096));
        let list = ChangedZoneList::read_from_bytes(&page).unwrap();
        list.zid[..list.nrzid.get().into()]
            .iter()
            .map(|zid| zid.get() / ZONE)
            .collect::<Vec<_>>()
    };
    for zone in 0..3 {
        assert_eq!(host.write(ZONED_NSID, zone * ZONE, 8), Status::SUCCESS);
    }
    host.set(ZoneOp::FinishByDevice, 0);
    host.set(ZoneOp::Recommend(Some(Recommendation::Finish)), 1);
    assert_eq!(list(), [0, 1]);
    assert_eq!(
        (host.state(0).0, attributes(&host, 0).into_bits()),
        (ZoneState::FULL, 1 << 0)
    );
    assert_eq!(attributes(&host, 1).into_bits(), 1 << 1);
    let (_, zones) = host.report(0, 8, 9, true);
    assert!(zones.iter().map(|zone| zone.zslba.get() / ZONE).eq([0, 1]));
    assert_eq!(host.zone(SendAction::FINISH, ZONE), Status::SUCCESS);
    assert_eq!(attributes(&host, 1).into_bits(), 0, "the host did as it was told");
    host.set(ZoneOp::Recommend(Some(Recommendation::Reset)), 1);
    assert_eq!(attributes(&host, 1).into_bits(), 1 << 2);
    assert_eq!(host.zone(SendAction::RESET, ZONE), Status::SUCCESS);
    assert_eq!(host.zone(SendAction::RESET, 0), Status::SUCCESS);
    assert_eq!(
        (attributes(&host, 0).into_bits(), attributes(&host, 1).into_bits()),
        (0, 0)
    );
    assert_eq!(list(), [1]);
    host.must_work();
}
