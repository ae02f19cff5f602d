//! Random write areas, descriptor extensions and attributes of zones: over memory, beside a raw image, inside a qcow2
//! image.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use support::{Rig, host, pattern};
use zbdkit_block::tool::{self, CompareOptions, CopiedZones, CopyOptions, compare, copy};
use zbdkit_block::{
    CreateOptions, Device, Error, Graph, OpenOptions, Preallocation, Qcow2CreateOptions, Repair, ZnsOptions,
    ZoneOp, check, create, create_qcow2, default_sidecar,
};
use zbdkit_zone::{CloseEmpty, Condition, Recommendation, ZoneError, ZoneInfo, ZoneNo};

const ZONE: u64 = 1 << 20;
const BLOCK: u64 = 4096;
/// Zone 1, which most of it is about; zone 0 is conventional.
const Z1: u64 = ZONE;
const Z2: u64 = 2 * ZONE;
const AREA: u64 = 16 * BLOCK;

fn zones(path: std::path::PathBuf) -> CreateOptions {
    CreateOptions {
        zone_size: Some(ZONE),
        zone_capacity: Some(ZONE - 4 * BLOCK),
        conventional_zones: 1,
        max_open: Some(3),
        max_active: 4,
        zns: ZnsOptions {
            zrwa_size: Some(AREA),
            zrwa_granularity: Some(2 * BLOCK),
            max_zrwa: Some(2),
            extension_size: 128,
        },
        ..CreateOptions::new(path, 8 * ZONE)
    }
}

fn raw(rig: &Rig) -> Device {
    rig.block_on(create(&host(), &zones(rig.path("disk.raw"))))
        .unwrap();
    rig.open("disk.raw")
}

fn qcow2(rig: &Rig, name: &str) -> Device {
    qcow2_with(rig, name, 65536)
}

fn qcow2_with(rig: &Rig, name: &str, cluster_size: u64) -> Device {
    let mut options = Qcow2CreateOptions {
        zones: Some(zones(rig.path(name))),
        ..Qcow2CreateOptions::new(rig.path(name), 8 * ZONE)
    };
    options.layout.cluster_size = cluster_size;
    rig.block_on(create_qcow2(&host(), &options)).unwrap();
    rig.open(name)
}

fn memory(rig: &Rig) -> Device {
    rig.open_graph(
        "driver=zoned,zone.size=1M,zone.capacity=1008k,zone.conventional_zones=1,zone.max_open_zones=3,\
         zone.max_active_zones=4,zone.zrwa_size=64k,zone.zrwa_granularity=8k,zone.max_zrwa=2,\
         zone.descr_ext_size=128,file.driver=memory,file.size=8M",
    )
    .unwrap()
}

fn commit(rig: &Rig, device: &Device, end: u64) -> Result<(), Error> {
    rig.block_on(device.commit_zrwa(&device.lane(1), end))
}

fn attach(rig: &Rig, device: &Device, zone: u64, bytes: &[u8]) -> Result<(), Error> {
    rig.block_on(device.set_extension(&device.lane(1), zone, bytes))
}

fn extension(rig: &Rig, device: &Device, zone: u64) -> Option<Vec<u8>> {
    rig.block_on(device.extension(zone)).unwrap()
}

fn zone(rig: &Rig, device: &Device, start: u64) -> ZoneInfo {
    rig.zones(device)[(start / ZONE) as usize]
}

fn whole(bytes: &[u8]) -> Vec<u8> {
    let mut whole = bytes.to_vec();
    whole.resize(128, 0);
    whole
}

/// What all backings do alike.
fn exercise(rig: &Rig, device: &Device) {
    let (a, b) = (pattern(1, BLOCK as usize), pattern(2, BLOCK as usize));
    rig.op(device, ZoneOp::OpenZrwa, Z1).unwrap();
    let at = |n: u64| Z1 + n * BLOCK;
    rig.write(device, at(9), &a);
    rig.write(device, at(3), &a);
    rig.write(device, at(9), &b);
    assert_eq!(rig.read(device, at(9), BLOCK as usize), b);
    assert_eq!(rig.read(device, at(4), BLOCK as usize), vec![0; BLOCK as usize]);
    let info = zone(rig, device, Z1);
    assert_eq!((info.wp, info.written_end), (Z1, Z1 + AREA));
    assert!(info.attributes.zrwa && info.condition == Condition::ExplicitlyOpen);
    rig.write(device, at(16), &a);
    assert_eq!(zone(rig, device, Z1).wp, at(2));
    commit(rig, device, at(4)).unwrap();
    assert!(matches!(
        rig.try_write(device, at(3), &a),
        Err(Error::Zone(ZoneError::OutsideRandomWriteArea { .. }))
    ));
    assert_eq!(rig.read(device, at(3), BLOCK as usize), a);
    rig.op(device, ZoneOp::Close(CloseEmpty::ToEmpty), Z1).unwrap();
    attach(rig, device, Z2, b"whose zone this is").unwrap();
    let refused = attach(rig, device, Z2, b"another");
    assert!(matches!(
        refused,
        Err(Error::Zone(ZoneError::InvalidTransition { .. }))
    ));
    assert_eq!(extension(rig, device, Z2), Some(whole(b"whose zone this is")));
    assert_eq!(zone(rig, device, Z2).condition, Condition::Closed);
    assert!(attach(rig, device, 3 * ZONE, &[1; 129]).is_err());
    assert_eq!(extension(rig, device, 3 * ZONE), None);
    rig.write(device, 3 * ZONE, &a);
    rig.op(device, ZoneOp::FinishByDevice, 3 * ZONE).unwrap();
    rig.op(device, ZoneOp::Recommend(Some(Recommendation::Finish)), Z2)
        .unwrap();
}

/// What must be there of it after reopening.
fn verify(rig: &Rig, device: &Device) {
    let (a, b) = (pattern(1, BLOCK as usize), pattern(2, BLOCK as usize));
    let at = |n: u64| Z1 + n * BLOCK;
    let info = zone(rig, device, Z1);
    assert_eq!((info.wp, info.written_end), (at(4), at(20)));
    assert!(info.attributes.zrwa && info.condition == Condition::Closed);
    for (n, bytes) in [(3, &a), (9, &b), (16, &a)] {
        assert_eq!(rig.read(device, at(n), BLOCK as usize), *bytes, "block {n}");
    }
    for n in [0, 4, 8, 10, 17, 25, 200] {
        assert_eq!(
            rig.read(device, at(n), BLOCK as usize),
            vec![0; BLOCK as usize],
            "block {n}"
        );
    }
    let info = zone(rig, device, Z2);
    assert_eq!(info.condition, Condition::Closed);
    assert_eq!(info.attributes.recommended, Some(Recommendation::Finish));
    assert_eq!(extension(rig, device, Z2), Some(whole(b"whose zone this is")));
    assert!(zone(rig, device, 3 * ZONE).attributes.finished_by_device);
}

/// Goes on with it to the end of both zones.
fn finish(rig: &Rig, device: &Device) {
    let capacity_end = Z1 + ZONE - 4 * BLOCK;
    let a = pattern(3, BLOCK as usize);
    let mut end = Z1 + 4 * BLOCK;
    while end < capacity_end {
        end = (end + AREA).min(capacity_end);
        rig.write(device, end - BLOCK, &a);
        commit(rig, device, end).unwrap();
    }
    let info = zone(rig, device, Z1);
    assert_eq!(
        (info.condition, info.written_end),
        (Condition::Full, capacity_end)
    );
    assert!(!info.attributes.zrwa);
    assert_eq!(rig.read(device, end - BLOCK, BLOCK as usize), a);
    assert_eq!(
        rig.read(device, end - 2 * BLOCK, BLOCK as usize),
        vec![0; BLOCK as usize]
    );
    rig.op(device, ZoneOp::Reset, Z2).unwrap();
    assert_eq!(extension(rig, device, Z2), None);
    attach(rig, device, Z2, b"the next").unwrap();
    assert_eq!(extension(rig, device, Z2), Some(whole(b"the next")));
}

#[test]
fn areas_and_extensions_over_memory() {
    let rig = Rig::new();
    let device = memory(&rig);
    exercise(&rig, &device);
    verify(&rig, &device);
    finish(&rig, &device);
    rig.close(device);
}

#[test]
fn areas_and_extensions_outlive_a_close_beside_a_raw_image() {
    let rig = Rig::new();
    let device = raw(&rig);
    exercise(&rig, &device);
    rig.close(device);
    let device = rig.open_read_only("disk.raw");
    verify(&rig, &device);
    rig.close(device);
    let device = rig.open("disk.raw");
    verify(&rig, &device);
    finish(&rig, &device);
    rig.close(device);
}

#[test]
fn areas_and_extensions_outlive_a_close_inside_a_qcow2_image() {
    let rig = Rig::new();
    let device = qcow2(&rig, "disk.qcow2");
    exercise(&rig, &device);
    rig.close(device);
    let device = rig.open_read_only("disk.qcow2");
    verify(&rig, &device);
    rig.close(device);
    let device = rig.open("disk.qcow2");
    verify(&rig, &device);
    finish(&rig, &device);
    rig.close(device);
}

#[test]
fn what_a_killed_process_left_above_an_area_is_zeroed() {
    let rig = Rig::new();
    let device = raw(&rig);
    exercise(&rig, &device);
    // As if it died: a write of it that nobody acknowledged reached the file behind the area.
    drop(device);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(rig.path("disk.raw"))
        .unwrap();
    file.write_all_at(&[9; 4096], Z1 + 25 * BLOCK).unwrap();
    file.write_all_at(&[9; 4096], Z1 + 200 * BLOCK).unwrap();
    let device = rig.open("disk.raw");
    verify(&rig, &device);
    commit(&rig, &device, Z1 + 20 * BLOCK).unwrap();
    assert_eq!(
        rig.read(&device, Z1 + 25 * BLOCK, BLOCK as usize),
        vec![0; BLOCK as usize]
    );
    rig.close(device);
}

#[test]
fn what_failed_writes_left_above_the_pointer_is_zeroed_before_an_area_begins() {
    let rig = Rig::new();
    let device = raw(&rig);
    rig.write(&device, Z1, &pattern(1, 2 * BLOCK as usize));
    let file = fs::OpenOptions::new()
        .write(true)
        .open(rig.path("disk.raw"))
        .unwrap();
    file.write_all_at(&[9; 4096], Z1 + 3 * BLOCK).unwrap();
    rig.op(&device, ZoneOp::OpenZrwa, Z1).unwrap();
    let read = rig.read(&device, Z1, 4 * BLOCK as usize);
    assert_eq!(read[..2 * BLOCK as usize], pattern(1, 2 * BLOCK as usize));
    assert!(read[2 * BLOCK as usize..].iter().all(|byte| *byte == 0));
    rig.close(device);
}

#[test]
fn images_without_these_things_are_as_they_were_and_with_them_of_a_newer_version() {
    let rig = Rig::new();
    let version = |name: &str| {
        let bytes = fs::read(default_sidecar(&rig.path(name))).unwrap();
        (
            bytes[8],
            bytes[144..200].iter().all(|byte| *byte == 0),
            bytes.len(),
        )
    };
    rig.zoned_raw("plain.raw", 8 * ZONE, ZONE);
    assert_eq!(version("plain.raw"), (1, true, 16384));
    rig.close(raw(&rig));
    assert_eq!(version("disk.raw"), (2, false, 16384 + 8 * 4096));
}

#[test]
fn a_damaged_extension_is_noticed_when_it_is_read_and_by_a_check() {
    for (name, make) in [
        ("disk.raw", raw as fn(&Rig) -> Device),
        ("disk.qcow2", |rig| qcow2(rig, "disk.qcow2")),
    ] {
        let rig = Rig::new();
        let device = make(&rig);
        attach(&rig, &device, Z2, b"soon to be damaged").unwrap();
        rig.close(device);
        let holder = match name {
            "disk.raw" => default_sidecar(&rig.path(name)),
            _ => rig.path(name),
        };
        let mut bytes = fs::read(&holder).unwrap();
        let at = bytes.windows(4).position(|four| four == b"soon").unwrap();
        bytes[at] ^= 1;
        fs::write(&holder, bytes).unwrap();
        let device = rig.open(name);
        let read = rig.block_on(device.extension(Z2));
        assert!(
            matches!(read, Err(Error::Io { errno: libc::EIO, .. })),
            "{read:?}"
        );
        rig.close(device);
        let run = |repair| {
            let graph = Graph::from_path(rig.path(name));
            let options = OpenOptions::default();
            rig.block_on(check(&host(), &graph, &options, repair, &mut |_, _| ()))
                .unwrap()
                .zones
                .unwrap()
        };
        let found = run(Repair::None);
        assert_eq!(found.errors, 1);
        let said = found.messages.join("\n");
        assert!(said.contains("extension of zone 2 is damaged"), "{said}");
        run(Repair::All);
        assert_eq!(run(Repair::None).errors, 0);
        let device = rig.open(name);
        assert_eq!(extension(&rig, &device, Z2), None);
        rig.close(device);
    }
}

#[test]
fn snapshots_keep_areas_and_extensions() {
    let rig = Rig::new();
    let device = qcow2(&rig, "disk.qcow2");
    exercise(&rig, &device);
    rig.block_on(device.snapshot_create("then")).unwrap();
    // The area goes on over clusters that are shared with the snapshot.
    for n in [5, 4, 19, 11] {
        rig.write(&device, Z1 + n * BLOCK, &pattern(7, BLOCK as usize));
    }
    assert_eq!(
        rig.read(&device, Z1 + 9 * BLOCK, BLOCK as usize),
        pattern(2, BLOCK as usize)
    );
    finish(&rig, &device);
    rig.close(device);
    let device = rig.open("disk.qcow2");
    rig.block_on(device.snapshot_apply("then")).unwrap();
    rig.close(device);
    let device = rig.open("disk.qcow2");
    verify(&rig, &device);
    finish(&rig, &device);
    rig.close(device);
}

/// Blocks of an area that lie behind a write in clusters that must be copied before they are written.
#[test]
fn what_an_area_holds_behind_a_write_outlives_it_in_clusters_of_a_snapshot_or_a_base() {
    let rig = Rig::new();
    let device = qcow2_with(&rig, "disk.qcow2", BLOCK);
    exercise(&rig, &device);
    rig.block_on(device.snapshot_create("then")).unwrap();
    let below = |device: &Device| {
        rig.write(device, Z1 + 5 * BLOCK, &pattern(7, BLOCK as usize));
        for (n, seed) in [(5, 7), (9, 2), (16, 1)] {
            let read = rig.read(device, Z1 + n * BLOCK, BLOCK as usize);
            assert!(read == pattern(seed, BLOCK as usize), "block {n}");
        }
    };
    below(&device);
    rig.close(device);
    let mut options = Qcow2CreateOptions::new(rig.path("over.qcow2"), 0);
    options.size = None;
    options.layout.cluster_size = BLOCK;
    options.layout.backing = Some(("disk.qcow2".into(), Some("qcow2".into())));
    rig.block_on(create_qcow2(&host(), &options)).unwrap();
    let device = rig.open("over.qcow2");
    below(&device);
    rig.close(device);
}

#[test]
fn an_overlay_begins_with_the_areas_and_extensions_of_its_backing_image() {
    let rig = Rig::new();
    let device = qcow2(&rig, "base.qcow2");
    exercise(&rig, &device);
    rig.close(device);
    let mut options = Qcow2CreateOptions::new(rig.path("over.qcow2"), 0);
    options.size = None;
    options.layout.backing = Some(("base.qcow2".into(), Some("qcow2".into())));
    rig.block_on(create_qcow2(&host(), &options)).unwrap();
    let device = rig.open("over.qcow2");
    verify(&rig, &device);
    finish(&rig, &device);
    rig.close(device);
}

#[test]
fn a_resized_image_keeps_areas_and_extensions() {
    let rig = Rig::new();
    let device = qcow2(&rig, "disk.qcow2");
    exercise(&rig, &device);
    rig.block_on(device.resize(10 * ZONE, false, Preallocation::Off))
        .unwrap();
    rig.close(device);
    let device = rig.open("disk.qcow2");
    verify(&rig, &device);
    attach(&rig, &device, 9 * ZONE, b"in a new zone").unwrap();
    rig.close(device);
    let device = rig.open("disk.qcow2");
    assert_eq!(extension(&rig, &device, 9 * ZONE), Some(whole(b"in a new zone")));
    let shrunk = rig.block_on(device.resize(8 * ZONE, true, Preallocation::Off));
    assert!(shrunk.unwrap_err().to_string().contains("not empty"));
    finish(&rig, &device);
    rig.close(device);
}

#[test]
fn a_stranger_loses_extensions_and_nothing_else_and_the_next_opening_says_so() {
    let rig = Rig::new();
    let device = qcow2(&rig, "disk.qcow2");
    attach(&rig, &device, Z2, b"lost soon").unwrap();
    rig.write(&device, Z1, &pattern(1, BLOCK as usize));
    rig.close(device);
    // What a program does that does not know the autoclear bit 40.
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(rig.path("disk.qcow2"))
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 90).unwrap();
    assert_eq!(byte, [1]);
    file.write_all_at(&[0], 90).unwrap();
    let device = rig.open("disk.qcow2");
    let told = device.notices().join(" ");
    assert!(told.contains("descriptor extensions"), "{told}");
    assert_eq!(extension(&rig, &device, Z2), None);
    assert_eq!(zone(&rig, &device, Z2).condition, Condition::Empty);
    assert_eq!(zone(&rig, &device, Z1).wp, Z1 + BLOCK);
    // The device has what it had.
    rig.op(&device, ZoneOp::OpenZrwa, 3 * ZONE).unwrap();
    attach(&rig, &device, Z2, b"again").unwrap();
    rig.close(device);
}

#[test]
fn an_image_with_an_area_is_marked_for_programs_that_know_none() {
    let rig = Rig::new();
    let marked = || {
        let bytes = fs::read(rig.path("disk.qcow2")).unwrap();
        bytes[74] & 1 == 1
    };
    let device = qcow2(&rig, "disk.qcow2");
    attach(&rig, &device, Z2, b"an extension alone").unwrap();
    assert!(!marked());
    rig.op(&device, ZoneOp::OpenZrwa, Z1).unwrap();
    assert!(marked());
    rig.close(device);
}

#[test]
fn a_copy_keeps_areas_extensions_and_attributes() {
    let rig = Rig::new();
    let device = raw(&rig);
    exercise(&rig, &device);
    rig.close(device);
    let source = rig.open_read_only("disk.raw");
    let target = qcow2(&rig, "copy.qcow2");
    let copied = rig.block_on(copy(&source, &target, &CopyOptions::default(), &|_, _| ()));
    assert_eq!(copied.unwrap(), CopiedZones::Kept);
    let options = CompareOptions {
        strict: false,
        zones: true,
    };
    let compared = rig
        .block_on(compare(&source, &target, &options, &|_, _| ()))
        .unwrap();
    assert_eq!(compared.difference, None);
    rig.close(target);
    let target = rig.open("copy.qcow2");
    verify(&rig, &target);
    finish(&rig, &target);
    rig.close(target);
    rig.close(source);
}

#[test]
fn a_copy_to_a_device_that_cannot_have_them_is_refused() {
    let rig = Rig::new();
    let device = memory(&rig);
    exercise(&rig, &device);
    let mut options = zones(rig.path("plain.raw"));
    options.zns = ZnsOptions::default();
    rig.block_on(create(&host(), &options)).unwrap();
    let target = rig.open("plain.raw");
    let copied = rig.block_on(copy(&device, &target, &CopyOptions::default(), &|_, _| ()));
    let error = copied.unwrap_err().to_string();
    assert!(error.contains("random write area that it cannot have"), "{error}");
    rig.close(target);
    rig.close(device);
}

#[test]
fn a_commit_moves_areas_and_extensions_into_the_base() {
    let rig = Rig::new();
    let device = qcow2(&rig, "base.qcow2");
    exercise(&rig, &device);
    rig.close(device);
    let mut options = Qcow2CreateOptions::new(rig.path("over.qcow2"), 0);
    options.size = None;
    options.layout.backing = Some(("base.qcow2".into(), Some("qcow2".into())));
    rig.block_on(create_qcow2(&host(), &options)).unwrap();
    let over = rig.open("over.qcow2");
    rig.write(&over, Z1 + 9 * BLOCK, &pattern(8, BLOCK as usize));
    rig.op(&over, ZoneOp::Reset, Z2).unwrap();
    attach(&rig, &over, Z2, b"from above").unwrap();
    rig.close(over);
    // Each layer alone, without what is below it.
    let over = rig
        .try_open(
            "over.qcow2",
            OpenOptions {
                read_only: true,
                no_backing: true,
                ..OpenOptions::default()
            },
        )
        .unwrap_or_else(|error| panic!("{error}"));
    let base = rig.open("base.qcow2");
    rig.block_on(tool::commit(&[&over], &base, &|_, _| ())).unwrap();
    rig.close(base);
    let base = rig.open("base.qcow2");
    assert_eq!(
        rig.read(&base, Z1 + 9 * BLOCK, BLOCK as usize),
        pattern(8, BLOCK as usize)
    );
    assert_eq!(
        rig.read(&base, Z1 + 3 * BLOCK, BLOCK as usize),
        pattern(1, BLOCK as usize)
    );
    assert_eq!(extension(&rig, &base, Z2), Some(whole(b"from above")));
    finish(&rig, &base);
    rig.close(base);
    rig.close(over);
}

#[test]
fn what_lies_above_an_area_is_zeros_over_another_base_too() {
    let rig = Rig::new();
    let device = qcow2(&rig, "base.qcow2");
    exercise(&rig, &device);
    rig.close(device);
    let other = qcow2(&rig, "other.qcow2");
    rig.write(&other, Z1, &pattern(9, (ZONE - 4 * BLOCK) as usize));
    rig.close(other);
    let mut options = Qcow2CreateOptions::new(rig.path("over.qcow2"), 0);
    options.size = None;
    options.layout.backing = Some(("base.qcow2".into(), Some("qcow2".into())));
    rig.block_on(create_qcow2(&host(), &options)).unwrap();
    let over = rig.open("over.qcow2");
    let other = rig.open_read_only("other.qcow2");
    rig.block_on(tool::rebase(&over, Some(&other), &|_, _| ()))
        .unwrap();
    rig.block_on(tool::set_backing(&over, Some(("other.qcow2", Some("qcow2")))))
        .unwrap();
    rig.close(over);
    rig.close(other);
    let over = rig.open("over.qcow2");
    verify(&rig, &over);
    finish(&rig, &over);
    rig.close(over);
}

#[test]
fn who_watches_hears_of_what_the_operator_does_and_of_nothing_else() {
    let rig = Rig::new();
    let device = memory(&rig);
    let seen: Arc<Mutex<Vec<ZoneNo>>> = Arc::default();
    let log = seen.clone();
    device.watch(Arc::new(move |zone| log.lock().unwrap().push(zone)));
    exercise(&rig, &device);
    rig.op(&device, ZoneOp::SetOffline, 4 * ZONE).unwrap();
    rig.op(&device, ZoneOp::Finish, 5 * ZONE).unwrap();
    assert!(rig.op(&device, ZoneOp::FinishByDevice, 4 * ZONE).is_err());
    assert_eq!(*seen.lock().unwrap(), [ZoneNo(3), ZoneNo(2), ZoneNo(4)]);
    rig.close(device);
}

#[test]
fn devices_without_these_things_say_so() {
    let rig = Rig::new();
    rig.zoned_raw("plain.raw", 8 * ZONE, ZONE);
    let device = rig.open("plain.raw");
    let unsupported = |result: Result<(), Error>| assert!(matches!(result, Err(Error::NotSupported(_))));
    unsupported(rig.op(&device, ZoneOp::OpenZrwa, Z1));
    unsupported(commit(&rig, &device, Z1 + BLOCK));
    unsupported(attach(&rig, &device, Z1, b"none"));
    unsupported(rig.block_on(device.extension(Z1)).map(drop));
    rig.close(device);
}
