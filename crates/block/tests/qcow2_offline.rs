//! Snapshots and sizes of qcow2 images, with zones and without.

mod support;

use std::fs;

use support::{Rig, host, pattern};
use zbdkit_block::{CreateOptions, Device, Error, OpenOptions, Qcow2CreateOptions, ZoneOp, create_qcow2};
use zbdkit_qcow2::{CheckReport, Header, Layout, Preallocation, Repair, check};
use zbdkit_spec::qcow2::{AUTOCLEAR_ZONE_TABLE, EXT_ZBDKIT, INCOMPAT_ZONE_STATES, ZbdkitExtension};
use zbdkit_zone::Condition;
use zerocopy::FromBytes;

const ZONE: u64 = 1 << 20;
const ZONES: u64 = 8;

fn options(rig: &Rig, size: u64) -> Qcow2CreateOptions {
    let mut zones = CreateOptions::new("", 0);
    zones.zone_size = Some(ZONE);
    zones.conventional_zones = 1;
    zones.max_open = Some(3);
    zones.max_active = 4;
    Qcow2CreateOptions {
        zones: Some(zones),
        ..Qcow2CreateOptions::new(rig.path("disk.qcow2"), size)
    }
}

fn rig() -> Rig {
    let rig = Rig::new();
    rig.block_on(create_qcow2(&host(), &options(&rig, ZONES * ZONE)))
        .unwrap();
    rig
}

fn header(rig: &Rig) -> Header {
    let bytes = fs::read(rig.path("disk.qcow2")).unwrap();
    Header::decode(&bytes[..65536], bytes.len() as u64).unwrap()
}

/// What the format's own check finds, told where our tables lie.
fn checked(rig: &Rig) -> CheckReport {
    let file = fs::File::open(rig.path("disk.qcow2")).unwrap();
    let file = zbdkit_io::File::from_fd(file.into(), zbdkit_io::FileKind::default());
    let header = header(rig);
    let mut areas = Vec::new();
    if let Some(data) = header.extension(EXT_ZBDKIT) {
        let ours = ZbdkitExtension::read_from_bytes(data).unwrap();
        let range = |offset: u64, len: u64| offset..offset + len;
        areas.push((range(ours.area_offset.get(), ours.area_len.get()), "area"));
        if ours.snapshots_len.get() != 0 {
            let (offset, len) = (ours.snapshots_offset.get(), ours.snapshots_len.get());
            areas.push((range(offset, len), "directory"));
            let bytes = fs::read(rig.path("disk.qcow2")).unwrap();
            let entries = &bytes[offset as usize + 32..(offset + len) as usize];
            for entry in entries.chunks(64) {
                let entry = zbdkit_spec::qcow2::SnapshotZones::read_from_bytes(entry).unwrap();
                areas.push((range(entry.offset.get(), entry.len.get()), "table"));
            }
        }
    }
    rig.block_on(check(&file, &header, None, &areas, Repair::None, &mut |_, _| {}))
        .unwrap()
}

fn is_whole(rig: &Rig) {
    let report = checked(rig);
    assert_eq!(
        (report.corruptions, report.leaks, report.check_errors),
        (0, 0, 0),
        "{:?}",
        report.messages
    );
}

fn conditions(rig: &Rig, device: &Device) -> Vec<Condition> {
    rig.zones(device).iter().map(|zone| zone.condition).collect()
}

#[test]
fn a_snapshot_brings_data_and_zones_back_together() {
    let rig = rig();
    let device = rig.open("disk.qcow2");
    rig.write(&device, 4096, &pattern(9, 4096));
    rig.write(&device, ZONE, &pattern(1, 12288));
    rig.write(&device, 2 * ZONE, &pattern(2, ZONE as usize));
    rig.write(&device, 3 * ZONE, &pattern(3, 4096));
    rig.op(&device, ZoneOp::Finish, 3 * ZONE).unwrap();
    rig.op(&device, ZoneOp::SetReadOnly, 4 * ZONE).unwrap();
    let snapshot = rig.block_on(device.snapshot_create("first")).unwrap();
    assert_eq!((snapshot.id.as_str(), snapshot.disk_size), ("1", ZONES * ZONE));
    // The device goes on, in other clusters.
    rig.write(&device, ZONE + 12288, &pattern(4, 8192));
    rig.op(&device, ZoneOp::Reset, 2 * ZONE).unwrap();
    rig.write(&device, 2 * ZONE, &pattern(5, 8192));
    rig.op(&device, ZoneOp::SetNormal, 4 * ZONE).unwrap();
    rig.write(&device, 5 * ZONE, &pattern(6, 4096));
    rig.write(&device, 4096, &pattern(7, 4096));
    assert_eq!(rig.read(&device, 2 * ZONE, 8192), pattern(5, 8192));
    rig.block_on(device.snapshot_create("second")).unwrap();
    rig.close(device);
    is_whole(&rig);

    let device = rig.open("disk.qcow2");
    assert_eq!(device.notices(), [""; 0]);
    let all = rig.block_on(device.snapshots()).unwrap();
    let names: Vec<_> = all.iter().map(|s| (s.id.as_str(), s.name.as_str())).collect();
    assert_eq!(names, [("1", "first"), ("2", "second")]);
    rig.block_on(device.snapshot_apply("first")).unwrap();
    assert!(!rig.path("disk.qcow2.run").exists());
    // What is left of it is no device any more.
    assert!(matches!(
        rig.try_write(&device, 5 * ZONE + 4096, &pattern(0, 4096)),
        Err(Error::Epoch { .. })
    ));
    rig.close(device);
    is_whole(&rig);
    let device = rig.open("disk.qcow2");
    assert_eq!(device.notices(), [""; 0]);
    use Condition::*;
    assert_eq!(
        conditions(&rig, &device),
        [NotWritePointer, Closed, Full, Full, ReadOnly, Empty, Empty, Empty]
    );
    let zones = rig.zones(&device);
    assert_eq!(
        (zones[1].wp, zones[3].written_end),
        (ZONE + 12288, 3 * ZONE + 4096)
    );
    assert_eq!(zones[2].counters.resets, 0);
    assert_eq!(rig.read(&device, ZONE, 12288), pattern(1, 12288));
    assert!(rig.read(&device, 2 * ZONE, ZONE as usize) == pattern(2, ZONE as usize));
    assert_eq!(rig.read(&device, 4096, 4096), pattern(9, 4096));
    rig.write(&device, ZONE + 12288, &pattern(8, 4096));
    rig.close(device);
    is_whole(&rig);

    let device = rig.open("disk.qcow2");
    rig.block_on(device.snapshot_apply("2")).unwrap();
    rig.close(device);
    let device = rig.open("disk.qcow2");
    let zones = rig.zones(&device);
    assert_eq!((zones[1].wp, zones[2].wp), (ZONE + 20480, 2 * ZONE + 8192));
    assert_eq!((zones[2].counters.resets, zones[4].condition), (1, Empty));
    assert_eq!(rig.read(&device, ZONE + 12288, 8192), pattern(4, 8192));
    rig.block_on(device.snapshot_delete("first")).unwrap();
    rig.close(device);
    is_whole(&rig);
    let device = rig.open("disk.qcow2");
    rig.block_on(device.snapshot_delete("2")).unwrap();
    assert_eq!(rig.block_on(device.snapshots()).unwrap(), []);
    assert_eq!(rig.read(&device, ZONE, 12288), pattern(1, 12288));
    rig.close(device);
    is_whole(&rig);
    let ours = header(&rig).extension(EXT_ZBDKIT).unwrap().to_vec();
    let ours = ZbdkitExtension::read_from_bytes(&ours).unwrap();
    assert_eq!((ours.snapshots_offset.get(), ours.snapshots_len.get()), (0, 0));
}

#[test]
fn a_snapshot_does_not_hold_what_was_only_mapped_ahead() {
    let rig = rig();
    let device = rig.open("disk.qcow2");
    rig.write(&device, ZONE, &pattern(1, 4096));
    let image = device.qcow2().unwrap();
    let mapped = || {
        let extent = rig.block_on(image.map(ZONE, ZONE)).unwrap();
        (
            extent.len,
            matches!(extent.mapping, zbdkit_qcow2::Mapping::Data { .. }),
        )
    };
    assert_eq!(mapped(), (ZONE, true));
    rig.block_on(device.snapshot_create("x")).unwrap();
    assert_eq!(mapped(), (65536, true));
    rig.write(&device, ZONE + 4096, &pattern(2, 131072));
    assert_eq!(rig.read(&device, ZONE, 4096), pattern(1, 4096));
    assert_eq!(rig.read(&device, ZONE + 4096, 131072), pattern(2, 131072));
    rig.close(device);
    is_whole(&rig);
}

#[test]
fn a_snapshot_is_looked_at_without_applying_it() {
    let rig = rig();
    let device = rig.open("disk.qcow2");
    rig.write(&device, ZONE, &pattern(1, 8192));
    rig.block_on(device.snapshot_create("old")).unwrap();
    rig.op(&device, ZoneOp::Reset, ZONE).unwrap();
    rig.write(&device, ZONE, &pattern(2, 4096));
    rig.close(device);
    let view = |read_only| OpenOptions {
        read_only,
        snapshot: Some("old".into()),
        ..OpenOptions::default()
    };
    let device = rig.try_open("disk.qcow2", view(true)).unwrap();
    assert_eq!(rig.zones(&device)[1].wp, ZONE + 8192);
    assert_eq!(rig.read(&device, ZONE, 8192), pattern(1, 8192));
    assert_eq!(rig.try_write(&device, ZONE, &[0; 4096]), Err(Error::ReadOnly));
    drop(device);
    assert!(rig.try_open("disk.qcow2", view(false)).is_err());
    let missing = OpenOptions {
        snapshot: Some("new".into()),
        ..view(true)
    };
    let error = rig.try_open("disk.qcow2", missing).err().unwrap().to_string();
    assert!(error.contains("no snapshot \"new\""), "{error}");
}

#[test]
fn snapshots_whose_zones_are_not_known_are_not_applied() {
    let rig = rig();
    let device = rig.open("disk.qcow2");
    rig.write(&device, ZONE, &pattern(1, 8192));
    rig.block_on(device.snapshot_create("old")).unwrap();
    rig.close(device);
    // Somebody who does not know our tables wrote to the image.
    let mut stale = header(&rig);
    stale.autoclear &= !AUTOCLEAR_ZONE_TABLE;
    let bytes = stale.encode().unwrap();
    let file = fs::OpenOptions::new()
        .write(true)
        .open(rig.path("disk.qcow2"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
    let device = rig.open("disk.qcow2");
    let error = rig
        .block_on(device.snapshot_apply("old"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("zones of snapshot 1 are not known"), "{error}");
    let error = rig
        .block_on(device.snapshot_apply("none"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("none"), "{error}");
    // Its data can be read.
    let view = OpenOptions {
        read_only: true,
        force_share: true,
        snapshot: Some("old".into()),
        ..OpenOptions::default()
    };
    let old = rig.try_open("disk.qcow2", view).unwrap();
    assert!(old.limits().zoned.is_none() && old.notices()[0].contains("not known"));
    assert_eq!(rig.read(&old, ZONE, 8192), pattern(1, 8192));
    drop(old);
    // It was refused before anything: the device goes on.
    rig.write(&device, ZONE + 8192, &pattern(2, 4096));
    rig.block_on(device.snapshot_delete("old")).unwrap();
    rig.close(device);
    let device = rig.open("disk.qcow2");
    assert_eq!(rig.read(&device, ZONE + 8192, 4096), pattern(2, 4096));
    rig.close(device);
}

#[test]
fn states_that_a_snapshot_brings_back_mark_the_image() {
    let rig = rig();
    let device = rig.open("disk.qcow2");
    rig.op(&device, ZoneOp::SetOffline, 3 * ZONE).unwrap();
    rig.block_on(device.snapshot_create("with")).unwrap();
    rig.close(device);
    assert_ne!(header(&rig).incompatible & INCOMPAT_ZONE_STATES, 0);
    let device = rig.open("disk.qcow2");
    rig.block_on(device.snapshot_apply("with")).unwrap();
    rig.close(device);
    let device = rig.open("disk.qcow2");
    assert_eq!(rig.zones(&device)[3].condition, Condition::Offline);
    rig.close(device);
}

#[test]
fn an_image_grows_by_whole_zones_and_keeps_what_they_hold() {
    let rig = Rig::new();
    rig.block_on(create_qcow2(&host(), &options(&rig, 5 * ZONE + 262144)))
        .unwrap();
    let device = rig.open("disk.qcow2");
    rig.write(&device, ZONE, &pattern(1, 8192));
    rig.write(&device, 5 * ZONE, &pattern(2, 262144));
    assert_eq!(rig.zones(&device)[5].condition, Condition::Full);
    let error = rig.block_on(device.resize(7 * ZONE + 4096, false, Preallocation::Off));
    assert!(error.unwrap_err().to_string().contains("7340032 or 8388608"));
    rig.block_on(device.resize(200 * ZONE, false, Preallocation::Off))
        .unwrap();
    rig.close(device);
    is_whole(&rig);
    let device = rig.open("disk.qcow2");
    let zones = rig.zones(&device);
    assert_eq!((device.limits().size, zones.len()), (200 * ZONE, 200));
    assert_eq!(
        (zones[1].wp, zones[5].condition, zones[5].written_end),
        (ZONE + 8192, Condition::Full, 5 * ZONE + 262144)
    );
    let geometry = device.limits().zoned.unwrap();
    assert_eq!((geometry.max_open(), geometry.max_active()), (3, 4));
    assert_eq!(rig.read(&device, 5 * ZONE, 262144), pattern(2, 262144));
    rig.write(&device, 199 * ZONE, &pattern(3, 4096));
    let error = rig.block_on(device.resize(100 * ZONE, true, Preallocation::Off));
    assert!(error.unwrap_err().to_string().contains("zone 199"));
    rig.op(&device, ZoneOp::Reset, 199 * ZONE).unwrap();
    let refused = rig.block_on(device.resize(100 * ZONE, false, Preallocation::Off));
    assert!(refused.is_err(), "without shrink");
    rig.block_on(device.resize(100 * ZONE, true, Preallocation::Off))
        .unwrap();
    rig.close(device);
    is_whole(&rig);
    let device = rig.open("disk.qcow2");
    assert_eq!(rig.zones(&device).len(), 100);
    assert_eq!(rig.read(&device, ZONE, 8192), pattern(1, 8192));
    rig.close(device);
}

#[test]
fn a_snapshot_of_another_size_brings_its_size_and_zones_back() {
    let rig = rig();
    let device = rig.open("disk.qcow2");
    rig.write(&device, 7 * ZONE, &pattern(1, 4096));
    rig.block_on(device.snapshot_create("small")).unwrap();
    rig.block_on(device.resize(16 * ZONE, false, Preallocation::Off))
        .unwrap();
    rig.close(device);
    let device = rig.open("disk.qcow2");
    rig.write(&device, 15 * ZONE, &pattern(2, 4096));
    rig.block_on(device.snapshot_apply("small")).unwrap();
    rig.close(device);
    is_whole(&rig);
    let device = rig.open("disk.qcow2");
    assert_eq!(rig.zones(&device).len(), 8);
    assert_eq!(rig.zones(&device)[7].wp, 7 * ZONE + 4096);
    rig.close(device);
}

#[test]
fn images_without_zones_have_snapshots_and_sizes_too() {
    let rig = Rig::new();
    rig.plain(
        "disk.qcow2",
        &Layout {
            size: 4 * ZONE,
            ..Layout::default()
        },
    );
    let device = rig.open("disk.qcow2");
    rig.write(&device, 0, &pattern(1, 65536));
    rig.block_on(device.snapshot_create("a")).unwrap();
    rig.write(&device, 0, &pattern(2, 65536));
    rig.block_on(device.resize(5 * ZONE, false, Preallocation::Off))
        .unwrap();
    rig.close(device);
    let device = rig.open("disk.qcow2");
    assert_eq!(device.limits().size, 5 * ZONE);
    rig.block_on(device.snapshot_apply("a")).unwrap();
    rig.close(device);
    let device = rig.open("disk.qcow2");
    assert_eq!(
        (device.limits().size, rig.read(&device, 0, 65536)),
        (4 * ZONE, pattern(1, 65536))
    );
    rig.block_on(device.snapshot_delete("a")).unwrap();
    rig.close(device);
    is_whole(&rig);
}

#[test]
fn other_images_say_that_they_have_none() {
    let rig = Rig::new();
    rig.zoned_raw("disk.raw", 8 * ZONE, ZONE);
    let device = rig.open("disk.raw");
    assert!(matches!(
        rig.block_on(device.snapshots()),
        Err(Error::NotSupported(_))
    ));
    rig.close(device);
    rig.block_on(create_qcow2(&host(), &options(&rig, ZONES * ZONE)))
        .unwrap();
    let device = rig.open_read_only("disk.qcow2");
    assert_eq!(rig.block_on(device.snapshots()).unwrap(), []);
    assert_eq!(
        rig.block_on(device.snapshot_create("x")).err(),
        Some(Error::ReadOnly)
    );
}
