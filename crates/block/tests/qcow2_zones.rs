//! qcow2 images with zones, on real files: what a user of the library sees.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;

use support::{Rig, host, pattern};
use zbdkit_block::{
    CreateError, CreateOptions, Error, OpenOptions, Qcow2CreateOptions, RunStateMode, ZoneOp, create_qcow2,
};
use zbdkit_qcow2::{Header, Layout};
use zbdkit_spec::qcow2::{
    AUTOCLEAR_ZONE_TABLE, EXT_ZBDKIT, EXT_ZONED, INCOMPAT_ZONE_STATES, INCOMPAT_ZONED, ZbdkitExtension,
    ZonedC,
};
use zbdkit_zone::{Condition, Model, ZoneError};
use zerocopy::FromBytes;

const ZONE: u64 = 1 << 20;
const ZONES: u64 = 8;
const CLUSTER: u64 = 65536;

/// Eight zones of 1 MiB, the first conventional, three of four quarters writable.
fn options(rig: &Rig, name: &str) -> Qcow2CreateOptions {
    let mut zones = CreateOptions::new("", 0);
    zones.zone_size = Some(ZONE);
    zones.zone_capacity = Some(ZONE - 4096);
    zones.conventional_zones = 1;
    zones.max_open = Some(3);
    zones.max_active = 4;
    Qcow2CreateOptions {
        zones: Some(zones),
        ..Qcow2CreateOptions::new(rig.path(name), ZONES * ZONE)
    }
}

fn make(rig: &Rig, name: &str) {
    rig.block_on(create_qcow2(&host(), &options(rig, name))).unwrap();
}

fn rig() -> Rig {
    let rig = Rig::new();
    make(&rig, "disk.qcow2");
    rig
}

fn header(rig: &Rig, name: &str) -> Header {
    let bytes = fs::read(rig.path(name)).unwrap();
    Header::decode(&bytes[..bytes.len().min(CLUSTER as usize)], bytes.len() as u64).unwrap()
}

fn ours(rig: &Rig, name: &str) -> ZbdkitExtension {
    let header = header(rig, name);
    ZbdkitExtension::read_from_bytes(header.extension(EXT_ZBDKIT).unwrap()).unwrap()
}

/// The words of the bare table.
fn words(rig: &Rig, name: &str) -> Vec<u64> {
    let header = header(rig, name);
    let zoned = ZonedC::read_from_bytes(header.extension(EXT_ZONED).unwrap()).unwrap();
    let bytes = fs::read(rig.path(name)).unwrap();
    bytes[zoned.zonedmeta_offset.get() as usize..][..8 * zoned.nr_zones.get() as usize]
        .chunks(8)
        .map(|word| u64::from_be_bytes(word.try_into().unwrap()))
        .collect()
}

fn set_word(rig: &Rig, name: &str, zone: u64, word: u64) {
    let header = header(rig, name);
    let zoned = ZonedC::read_from_bytes(header.extension(EXT_ZONED).unwrap()).unwrap();
    let at = zoned.zonedmeta_offset.get() + 8 * zone;
    poke(rig, name, at, &word.to_be_bytes());
}

fn poke(rig: &Rig, name: &str, offset: u64, bytes: &[u8]) {
    let file = fs::OpenOptions::new().write(true).open(rig.path(name)).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

/// As a program leaves an image that knows layout C and not what is ours.
fn clear_autoclear(rig: &Rig, name: &str) {
    let mut header = header(rig, name);
    header.autoclear &= !AUTOCLEAR_ZONE_TABLE;
    poke(rig, name, 0, &header.encode().unwrap());
}

fn conditions(rig: &Rig, device: &zbdkit_block::Device) -> Vec<Condition> {
    rig.zones(device).iter().map(|zone| zone.condition).collect()
}

#[test]
fn a_new_image_is_layout_c_with_our_area_and_both_features() {
    let rig = rig();
    let header = header(&rig, "disk.qcow2");
    assert_eq!(header.incompatible, INCOMPAT_ZONED);
    assert_eq!(header.autoclear, AUTOCLEAR_ZONE_TABLE);
    let zoned = ZonedC::read_from_bytes(header.extension(EXT_ZONED).unwrap()).unwrap();
    assert_eq!(
        (
            zoned.zoned,
            zoned.nr_zones.get(),
            zoned.zone_capacity.get(),
            zoned.max_open_zones.get()
        ),
        (1, 8, ZONE - 4096, 3)
    );
    let ours = ours(&rig, "disk.qcow2");
    assert_eq!(
        (ours.area_offset.get() % CLUSTER, ours.snapshots_len.get()),
        (0, 0)
    );
    let expected: Vec<u64> = (0..ZONES)
        .map(|zone| (zone * ZONE) | if zone == 0 { 1 << 63 } else { 0 })
        .collect();
    assert_eq!(words(&rig, "disk.qcow2"), expected);
    // The tables are in the first 512 bytes' reach: one sector switches all of it.
    let bytes = fs::read(rig.path("disk.qcow2")).unwrap();
    let place = |magic: u32| {
        bytes
            .windows(4)
            .position(|four| four == magic.to_be_bytes())
            .unwrap()
    };
    assert!(place(EXT_ZONED) < 512 - 52 && place(EXT_ZBDKIT) < 512 - 64);
}

#[test]
fn zones_and_data_come_back_after_a_clean_close() {
    let rig = rig();
    let device = rig.open("disk.qcow2");
    assert_eq!(device.driver(), "qcow2");
    rig.write(&device, ZONE, &pattern(1, 8192));
    rig.write(&device, 2 * ZONE, &pattern(2, ZONE as usize - 4096));
    rig.write(&device, 3 * ZONE, &pattern(3, 4096));
    rig.op(&device, ZoneOp::Finish, 3 * ZONE).unwrap();
    rig.write(&device, 4 * ZONE, &pattern(4, 4096));
    rig.op(&device, ZoneOp::Reset, 4 * ZONE).unwrap();
    rig.write(&device, 4096, &pattern(5, 8192));
    rig.close(device);
    assert!(!rig.path("disk.qcow2.run").exists());
    assert_eq!(
        words(&rig, "disk.qcow2"),
        [
            1 << 63,
            ZONE + 8192,
            3 * ZONE - 4096,
            4 * ZONE - 4096,
            4 * ZONE,
            5 * ZONE,
            6 * ZONE,
            7 * ZONE
        ]
    );
    let device = rig.open("disk.qcow2");
    assert_eq!(device.notices(), [""; 0]);
    use Condition::*;
    assert_eq!(
        conditions(&rig, &device),
        [NotWritePointer, Closed, Full, Full, Empty, Empty, Empty, Empty]
    );
    let zones = rig.zones(&device);
    assert_eq!(
        (zones[3].written_end, zones[4].counters.resets),
        (3 * ZONE + 4096, 1)
    );
    assert_eq!(rig.read(&device, ZONE, 8192), pattern(1, 8192));
    assert_eq!(
        rig.read(&device, 2 * ZONE, ZONE as usize - 4096),
        pattern(2, ZONE as usize - 4096)
    );
    assert_eq!(rig.read(&device, 3 * ZONE + 4096, 4096), [0; 4096]);
    assert_eq!(rig.read(&device, 4096, 8192), pattern(5, 8192));
    rig.write(&device, ZONE + 8192, &pattern(9, 4096));
    let above = rig.try_write(&device, ZONE, &pattern(9, 4096)).unwrap_err();
    assert!(
        matches!(above, Error::Zone(ZoneError::NotAtWritePointer { .. })),
        "{above}"
    );
    rig.close(device);
}

#[test]
fn an_acknowledged_write_outlives_the_process() {
    let tmpfs = tempfile::tempdir_in("/dev/shm").unwrap();
    for run_state in [
        RunStateMode::Beside,
        RunStateMode::Sync,
        RunStateMode::In(tmpfs.path().into()),
    ] {
        let rig = rig();
        let with = OpenOptions {
            run_state: run_state.clone(),
            ..OpenOptions::default()
        };
        let device = rig.try_open("disk.qcow2", with).unwrap();
        rig.write(&device, ZONE, &pattern(1, 12288));
        rig.write(&device, 2 * ZONE, &pattern(2, 4096));
        rig.op(&device, ZoneOp::Reset, 2 * ZONE).unwrap();
        rig.write(&device, 3 * ZONE, &pattern(3, 4096));
        rig.op(&device, ZoneOp::Finish, 3 * ZONE).unwrap();
        if run_state == RunStateMode::Beside {
            assert!(rig.path("disk.qcow2.run").exists());
        }
        // Not closed: as if killed.
        drop(device);
        // Somebody who only looks sees it too, and changes nothing.
        let before = fs::read(rig.path("disk.qcow2")).unwrap();
        let device = rig.open_read_only("disk.qcow2");
        assert_eq!(rig.zones(&device)[1].wp, ZONE + 12288, "{run_state:?}");
        drop(device);
        assert!(fs::read(rig.path("disk.qcow2")).unwrap() == before);
        let device = rig.open("disk.qcow2");
        assert_eq!(device.notices(), [""; 0], "{run_state:?}");
        let zones = rig.zones(&device);
        assert_eq!(zones[1].wp, ZONE + 12288, "{run_state:?}");
        assert_eq!(
            (zones[2].condition, zones[3].condition),
            (Condition::Empty, Condition::Full)
        );
        assert_eq!(rig.read(&device, ZONE, 12288), pattern(1, 12288));
        // The bare table was repaired by the opening.
        assert_eq!(words(&rig, "disk.qcow2")[1], ZONE + 12288);
        rig.close(device);
    }
    assert_eq!(fs::read_dir(tmpfs.path()).unwrap().count(), 0);
}

#[test]
fn without_its_run_state_an_unclosed_image_keeps_what_was_flushed_and_says_so() {
    let rig = rig();
    let device = rig.open("disk.qcow2");
    rig.write(&device, ZONE, &pattern(1, 4096));
    rig.flush(&device);
    rig.write(&device, ZONE + 4096, &pattern(2, 4096));
    drop(device);
    fs::remove_file(rig.path("disk.qcow2.run")).unwrap();
    let device = rig.open("disk.qcow2");
    assert_eq!(rig.zones(&device)[1].wp, ZONE + 4096);
    assert!(device.notices()[0].contains("epoch 1"), "{:?}", device.notices());
    assert_eq!(rig.read(&device, ZONE + 4096, 4096), [0; 4096]);
    rig.close(device);
}

#[test]
fn the_bare_table_follows_each_flush_and_each_reset() {
    let rig = rig();
    let device = rig.open("disk.qcow2");
    rig.write(&device, ZONE, &pattern(1, 4096));
    assert_eq!(words(&rig, "disk.qcow2")[1], ZONE);
    rig.flush(&device);
    assert_eq!(words(&rig, "disk.qcow2")[1], ZONE + 4096);
    rig.op(&device, ZoneOp::Reset, ZONE).unwrap();
    assert_eq!(words(&rig, "disk.qcow2")[1], ZONE);
    rig.op(&device, ZoneOp::Finish, 2 * ZONE).unwrap();
    assert_eq!(words(&rig, "disk.qcow2")[2], 3 * ZONE - 4096);
    rig.close(device);
}

#[test]
fn a_sequential_zone_is_mapped_ahead_in_one_run_and_others_are_not() {
    let rig = Rig::new();
    let mut options = options(&rig, "disk.qcow2");
    let zones = options.zones.as_mut().unwrap();
    zones.zone_size = Some(32 << 20);
    zones.zone_capacity = None;
    options.size = Some(4 * (32 << 20));
    rig.block_on(create_qcow2(&host(), &options)).unwrap();
    let device = rig.open("disk.qcow2");
    let image = device.qcow2().unwrap();
    let zone = 32 << 20;
    let mapped = |offset: u64| {
        let extent = rig.block_on(image.map(offset, 32 << 20)).unwrap();
        match extent.mapping {
            zbdkit_qcow2::Mapping::Data { .. } => extent.len,
            _ => 0,
        }
    };
    rig.write(&device, 0, &pattern(1, 4096));
    assert_eq!(mapped(0), CLUSTER);
    rig.write(&device, zone, &pattern(1, 4096));
    assert_eq!(mapped(zone), 16 << 20);
    // What was only mapped is not shown to be there.
    let extent = rig.block_on(device.map(zone, 1 << 20)).unwrap();
    assert_eq!((extent.len, extent.data), (4096, true));
    rig.write(&device, zone + 4096, &pattern(2, (8 << 20) - 8192));
    assert_eq!(mapped(zone), 16 << 20);
    let lane = device.lane(4);
    let crossing = zbdkit_io::IoBuf::from_vec(pattern(3, 8192));
    rig.block_on(device.write(&lane, crossing, zone + (8 << 20) - 4096))
        .unwrap();
    // The next half comes in the background.
    rig.block_on(lane.quiet());
    assert!(mapped(zone + (16 << 20)) == 8 << 20);
    rig.close(device);
    let device = rig.open("disk.qcow2");
    assert_eq!(rig.read(&device, zone + (8 << 20) - 4096, 8192), pattern(3, 8192));
    rig.close(device);
}

#[test]
fn a_reset_gives_space_back_and_what_was_there_is_not_read_again() {
    let rig = rig();
    let device = rig.open("disk.qcow2");
    let blocks =
        || std::os::unix::fs::MetadataExt::blocks(&fs::metadata(rig.path("disk.qcow2")).unwrap()) * 512;
    let before = blocks();
    (1..4).for_each(|zone| rig.write(&device, zone * ZONE, &pattern(1, ZONE as usize - 4096)));
    assert!(blocks() > before + 2 * ZONE);
    rig.block_on(device.reset_all(&device.lane(1))).unwrap();
    assert!(blocks() < before + ZONE, "{} then {}", before, blocks());
    assert_eq!(rig.read(&device, ZONE, 4096), [0; 4096]);
    rig.write(&device, ZONE, &pattern(2, 4096));
    rig.op(&device, ZoneOp::Finish, ZONE).unwrap();
    assert_eq!(rig.read(&device, ZONE, 8192)[4096..], [0; 4096]);
    rig.close(device);
}

#[test]
fn read_only_and_offline_zones_mark_the_image_before_they_are_there() {
    let rig = rig();
    let device = rig.open("disk.qcow2");
    rig.write(&device, 3 * ZONE, &pattern(1, 4096));
    assert_eq!(header(&rig, "disk.qcow2").incompatible & INCOMPAT_ZONE_STATES, 0);
    rig.op(&device, ZoneOp::SetReadOnly, 3 * ZONE).unwrap();
    assert_ne!(header(&rig, "disk.qcow2").incompatible & INCOMPAT_ZONE_STATES, 0);
    rig.op(&device, ZoneOp::SetOffline, 4 * ZONE).unwrap();
    rig.close(device);
    let device = rig.open("disk.qcow2");
    let zones = rig.zones(&device);
    assert_eq!(
        (zones[3].condition, zones[4].condition),
        (Condition::ReadOnly, Condition::Offline)
    );
    rig.op(&device, ZoneOp::SetNormal, 3 * ZONE).unwrap();
    rig.op(&device, ZoneOp::SetNormal, 4 * ZONE).unwrap();
    rig.close(device);
    // It had them once.
    assert_ne!(header(&rig, "disk.qcow2").incompatible & INCOMPAT_ZONE_STATES, 0);
}

#[test]
fn host_aware_images_are_marked_from_the_start() {
    let rig = Rig::new();
    let mut options = options(&rig, "disk.qcow2");
    let zones = options.zones.as_mut().unwrap();
    (zones.model, zones.zone_capacity) = (Model::HostAware, None);
    rig.block_on(create_qcow2(&host(), &options)).unwrap();
    let header = header(&rig, "disk.qcow2");
    assert_eq!(header.incompatible, INCOMPAT_ZONED | INCOMPAT_ZONE_STATES);
    let device = rig.open("disk.qcow2");
    assert_eq!(device.limits().zoned.unwrap().model(), Model::HostAware);
    rig.write(&device, ZONE + 65536, &pattern(1, 4096));
    rig.write(&device, ZONE + 4096, &pattern(2, 4096));
    drop(device);
    let device = rig.open("disk.qcow2");
    assert_eq!(rig.zones(&device)[1].wp, ZONE + 65536 + 4096);
    assert_eq!(rig.read(&device, ZONE + 4096, 4096), pattern(2, 4096));
    rig.close(device);
}

#[test]
fn what_a_program_left_that_does_not_know_our_table_counts_and_what_was_lost_is_told() {
    let rig = rig();
    let device = rig.open("disk.qcow2");
    rig.write(&device, ZONE, &pattern(1, 8192));
    rig.write(&device, 2 * ZONE, &pattern(2, 4096));
    rig.op(&device, ZoneOp::Finish, 2 * ZONE).unwrap();
    rig.op(&device, ZoneOp::Reset, 3 * ZONE).unwrap();
    rig.close(device);
    let before = ours(&rig, "disk.qcow2");
    clear_autoclear(&rig, "disk.qcow2");
    set_word(&rig, "disk.qcow2", 1, ZONE + 4096);
    let device = rig.open_read_only("disk.qcow2");
    assert_eq!(rig.zones(&device)[1].wp, ZONE + 4096);
    assert!(
        device.notices()[0].contains("does not know"),
        "{:?}",
        device.notices()
    );
    drop(device);
    assert_eq!(header(&rig, "disk.qcow2").autoclear, 0);
    let device = rig.open("disk.qcow2");
    assert!(
        device.notices()[0].contains("does not know"),
        "{:?}",
        device.notices()
    );
    let zones = rig.zones(&device);
    assert_eq!((zones[1].wp, zones[2].condition), (ZONE + 4096, Condition::Full));
    // Nothing tells any more that the finish skipped something.
    assert_eq!(zones[2].written_end, 3 * ZONE - 4096);
    assert_eq!(device.limits().block_size, 4096);
    rig.write(&device, ZONE + 4096, &pattern(7, 4096));
    rig.close(device);
    let after = ours(&rig, "disk.qcow2");
    assert!(after.uuid != before.uuid && header(&rig, "disk.qcow2").autoclear == AUTOCLEAR_ZONE_TABLE);
    let device = rig.open("disk.qcow2");
    assert_eq!(device.notices(), [""; 0]);
    assert_eq!(rig.read(&device, ZONE, 8192)[4096..], pattern(7, 4096));
    rig.close(device);
}

#[test]
fn a_loss_that_a_strangers_writing_hid_is_told_all_the_same() {
    let rig = rig();
    let device = rig.open("disk.qcow2");
    rig.write(&device, ZONE, &pattern(1, 8192));
    drop(device);
    clear_autoclear(&rig, "disk.qcow2");
    let device = rig.open("disk.qcow2");
    let notices = device.notices().join("\n");
    assert!(
        notices.contains("epoch 1") && notices.contains("may be lost"),
        "{notices}"
    );
    // Nobody may have heard it yet.
    drop(device);
    let device = rig.open("disk.qcow2");
    assert!(device.notices()[0].contains("epoch 1"), "{:?}", device.notices());
    rig.close(device);
    assert_eq!(rig.open("disk.qcow2").notices(), [""; 0]);
}

#[test]
fn the_bare_table_is_checked_where_it_is_the_truth_and_repaired_where_it_is_not() {
    let rig = rig();
    rig.close(rig.open("disk.qcow2"));
    for (zone, word, says) in [
        (
            3,
            0,
            "Zone 3 has write pointer 0x0 outside its writable range 0x300000..0x3ff000",
        ),
        (
            1,
            ZONE + 0x201,
            "Zone 1 has write pointer 0x100201 that is not sector aligned",
        ),
        (
            2,
            (2 * ZONE) | (1 << 63),
            "Zone 2 contradicts the header, which declares the first 1 zones conventional",
        ),
    ] {
        set_word(&rig, "disk.qcow2", zone, word);
        rig.close(rig.open("disk.qcow2"));
        let good = zone * ZONE;
        assert_eq!(words(&rig, "disk.qcow2")[zone as usize], good);
        clear_autoclear(&rig, "disk.qcow2");
        set_word(&rig, "disk.qcow2", zone, word);
        let error = rig.open_error("disk.qcow2");
        assert!(error.contains(says), "{error}");
        set_word(&rig, "disk.qcow2", zone, good);
        rig.close(rig.open("disk.qcow2"));
    }
}

#[test]
fn an_image_of_a_stranger_with_layout_c_gets_an_area_when_it_is_written() {
    let rig = rig();
    // As QEMU would make it: no extension of ours.
    let mut header = header(&rig, "disk.qcow2");
    header.set_extension(EXT_ZBDKIT, None);
    header.autoclear = 0;
    poke(&rig, "disk.qcow2", 0, &header.encode().unwrap());
    set_word(&rig, "disk.qcow2", 5, 5 * ZONE + 512);
    let device = rig.open_read_only("disk.qcow2");
    assert_eq!(rig.zones(&device)[5].wp, 5 * ZONE + 512);
    assert_eq!((device.limits().block_size, device.notices().len()), (512, 0));
    drop(device);
    let device = rig.open("disk.qcow2");
    rig.write(&device, 5 * ZONE + 512, &pattern(1, 512));
    drop(device);
    let device = rig.open("disk.qcow2");
    assert_eq!(rig.zones(&device)[5].wp, 5 * ZONE + 1024);
    assert_eq!(device.notices(), [""; 0]);
    rig.close(device);
}

#[test]
fn zones_that_qcow2_cannot_express_are_refused_with_the_reason_and_nothing_is_left() {
    let rig = Rig::new();
    let refused = |change: &dyn Fn(&mut Qcow2CreateOptions)| {
        let mut options = options(&rig, "disk.qcow2");
        change(&mut options);
        let error = rig.block_on(create_qcow2(&host(), &options)).unwrap_err();
        assert!(!rig.path("disk.qcow2").exists(), "{error}");
        error.to_string()
    };
    let zones = |o: &mut Qcow2CreateOptions, size: u64| {
        let zones = o.zones.as_mut().unwrap();
        (zones.zone_size, zones.zone_capacity) = (Some(size), None);
    };
    assert!(refused(&|o| zones(o, 3 << 18)).contains("not a power of 2"));
    assert!(refused(&|o| zones(o, 32768)).contains("not a multiple of the cluster size 65536"));
    assert!(
        refused(&|o| {
            o.layout.cluster_size = 512;
            zones(o, 4096);
            o.size = Some((4096 << 20) + 4096);
        })
        .contains("exceeds maximum 1048576")
    );
    assert!(refused(&|o| o.layout.version = 2).contains("compatibility level"));
    assert!(refused(&|o| o.zones.as_mut().unwrap().conventional_zones = 8).contains("conventional"));
    assert!(refused(&|o| o.size = None).contains("size"));
    assert!(refused(&|o| o.layout.cluster_size = 100).contains("Cluster size must be"));
}

#[test]
fn a_file_that_is_there_stays_unless_forced() {
    let rig = rig();
    let again = rig.block_on(create_qcow2(&host(), &options(&rig, "disk.qcow2")));
    assert!(matches!(again, Err(CreateError::Exists(_))));
    let forced = Qcow2CreateOptions {
        force: true,
        ..options(&rig, "disk.qcow2")
    };
    let device = rig.open("disk.qcow2");
    assert!(rig.block_on(create_qcow2(&host(), &forced)).is_err(), "in use");
    rig.close(device);
    rig.block_on(create_qcow2(&host(), &forced)).unwrap();
    rig.close(rig.open("disk.qcow2"));
}

fn overlay(rig: &Rig, base: &str, format: &str) -> Qcow2CreateOptions {
    let mut options = Qcow2CreateOptions::new(rig.path("top.qcow2"), 0);
    options.size = None;
    options.layout = Layout {
        backing: Some((base.into(), Some(format.into()))),
        ..Layout::default()
    };
    options
}

#[test]
fn an_overlay_starts_with_its_bases_zones_and_diverges() {
    let rig = rig();
    let device = rig.open("disk.qcow2");
    rig.write(&device, 0, &pattern(9, 4096));
    rig.write(&device, ZONE, &pattern(1, 12288));
    rig.write(&device, 2 * ZONE, &pattern(2, 4096));
    rig.op(&device, ZoneOp::Finish, 2 * ZONE).unwrap();
    rig.write(&device, 3 * ZONE, &pattern(3, 131072));
    rig.op(&device, ZoneOp::SetReadOnly, 4 * ZONE).unwrap();
    rig.close(device);
    let before = fs::read(rig.path("disk.qcow2")).unwrap();
    let made = rig
        .block_on(create_qcow2(&host(), &overlay(&rig, "disk.qcow2", "qcow2")))
        .unwrap();
    assert_eq!(made.geometry.unwrap().nr_conventional(), 1);
    let top = rig.open("top.qcow2");
    use Condition::*;
    assert_eq!(
        conditions(&rig, &top),
        [
            NotWritePointer,
            Closed,
            Full,
            Closed,
            ReadOnly,
            Empty,
            Empty,
            Empty
        ]
    );
    assert_eq!(rig.zones(&top)[2].written_end, 2 * ZONE + 4096);
    assert_eq!(rig.read(&top, ZONE, 12288), pattern(1, 12288));
    // The cluster that the pointer stands in is the base's until it is written.
    rig.write(&top, ZONE + 12288, &pattern(5, 4096));
    let mut expected = pattern(1, 12288);
    expected.extend(pattern(5, 4096));
    assert_eq!(rig.read(&top, ZONE, 16384), expected);
    // A reset hides what the base has.
    rig.op(&top, ZoneOp::Reset, 3 * ZONE).unwrap();
    rig.write(&top, 3 * ZONE, &pattern(6, 4096));
    rig.op(&top, ZoneOp::Finish, 3 * ZONE).unwrap();
    let mut expected = pattern(6, 4096);
    expected.resize(131072, 0);
    assert_eq!(rig.read(&top, 3 * ZONE, 131072), expected);
    rig.write(&top, 4096, &pattern(7, 4096));
    assert_eq!(rig.read(&top, 0, 4096), pattern(9, 4096));
    drop(top);
    let top = rig.open("top.qcow2");
    assert_eq!(rig.zones(&top)[1].wp, ZONE + 16384);
    assert_eq!(rig.read(&top, ZONE, 4096), pattern(1, 4096));
    rig.close(top);
    assert!(fs::read(rig.path("disk.qcow2")).unwrap() == before, "the base");
}

#[test]
fn an_overlay_over_a_base_that_was_killed_has_what_was_acknowledged() {
    let rig = rig();
    let device = rig.open("disk.qcow2");
    rig.write(&device, ZONE, &pattern(1, 12288));
    drop(device);
    rig.block_on(create_qcow2(&host(), &overlay(&rig, "disk.qcow2", "qcow2")))
        .unwrap();
    let top = rig.open("top.qcow2");
    assert_eq!(rig.read(&top, ZONE, 12288), pattern(1, 12288));
    rig.close(top);
}

#[test]
fn an_overlay_over_a_raw_image_with_a_sidecar_has_its_zones() {
    let rig = Rig::new();
    rig.zoned_raw("base.raw", 8 * ZONE, ZONE);
    let base = rig.open("base.raw");
    rig.write(&base, 2 * ZONE, &pattern(1, 8192));
    rig.close(base);
    rig.block_on(create_qcow2(&host(), &overlay(&rig, "base.raw", "raw")))
        .unwrap();
    let top = rig.open("top.qcow2");
    assert_eq!(rig.zones(&top)[2].wp, 2 * ZONE + 8192);
    assert_eq!(rig.read(&top, 2 * ZONE, 8192), pattern(1, 8192));
    rig.close(top);
}

#[test]
fn zones_of_an_overlay_are_its_bases_or_none() {
    let rig = rig();
    let mut given = overlay(&rig, "disk.qcow2", "qcow2");
    given.zones = options(&rig, "").zones;
    assert!(rig.block_on(create_qcow2(&host(), &given)).is_err());
    let mut larger = overlay(&rig, "disk.qcow2", "qcow2");
    larger.size = Some(16 * ZONE);
    let error = rig
        .block_on(create_qcow2(&host(), &larger))
        .unwrap_err()
        .to_string();
    assert!(error.contains("leave the size out"), "{error}");
    let mut large_clusters = overlay(&rig, "disk.qcow2", "qcow2");
    large_clusters.layout.cluster_size = 2 << 20;
    assert!(rig.block_on(create_qcow2(&host(), &large_clusters)).is_err());
    assert!(!rig.path("top.qcow2").exists());
    let mut unlooked = overlay(&rig, "gone.qcow2", "qcow2");
    assert!(rig.block_on(create_qcow2(&host(), &unlooked)).is_err());
    (unlooked.unsafe_backing, unlooked.size) = (true, Some(4 * ZONE));
    let made = rig.block_on(create_qcow2(&host(), &unlooked)).unwrap();
    assert_eq!((made.size, made.geometry), (4 * ZONE, None));
}

#[test]
fn zones_work_with_small_and_extended_clusters_and_an_external_data_file() {
    let layouts = [
        Layout {
            cluster_size: 512,
            refcount_bits: 64,
            ..Layout::default()
        },
        Layout {
            cluster_size: 1 << 20,
            refcount_bits: 1,
            ..Layout::default()
        },
        Layout {
            cluster_size: 16384,
            extended_l2: true,
            ..Layout::default()
        },
        Layout {
            data_file: Some("data.raw".into()),
            ..Layout::default()
        },
        Layout {
            data_file: Some("data.raw".into()),
            data_file_raw: true,
            ..Layout::default()
        },
    ];
    for layout in layouts {
        let rig = Rig::new();
        let mut options = options(&rig, "disk.qcow2");
        options.layout = layout.clone();
        rig.block_on(create_qcow2(&host(), &options)).unwrap();
        let device = rig.open("disk.qcow2");
        for round in 0..2 {
            for at in (0..ZONE - 4096).step_by(12288) {
                let len = 12288.min(ZONE - 4096 - at) as usize;
                rig.write(&device, ZONE + at, &pattern(round ^ at as u8, len));
            }
            for at in (0..ZONE - 4096).step_by(12288) {
                let len = 12288.min(ZONE - 4096 - at) as usize;
                assert!(rig.read(&device, ZONE + at, len) == pattern(round ^ at as u8, len));
            }
            if round == 0 {
                rig.op(&device, ZoneOp::Reset, ZONE).unwrap();
            }
        }
        drop(device);
        let device = rig.open("disk.qcow2");
        assert_eq!(device.notices(), [""; 0], "{layout:?}");
        assert_eq!(rig.zones(&device)[1].condition, Condition::Full);
        assert!(rig.read(&device, ZONE, 12288) == pattern(1, 12288), "{layout:?}");
        rig.close(device);
    }
}
