//! Random write areas, descriptor extensions and attributes of zones inside qcow2 images, with what is done to those.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;

use support::zns::*;
use support::{Rig, host, pattern};
use zbdkit_block::{
    Device, Graph, OpenOptions, Preallocation, Qcow2CreateOptions, Repair, ZoneOp, check, create_qcow2, tool,
};
use zbdkit_zone::Condition;

/// Makes `over.qcow2` over `base.qcow2`.
fn overlay(rig: &Rig) {
    let mut options = Qcow2CreateOptions::new(rig.path("over.qcow2"), 0);
    options.size = None;
    options.layout.backing = Some(("base.qcow2".into(), Some("qcow2".into())));
    rig.block_on(create_qcow2(&host(), &options)).unwrap();
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

/// What a check says of the zones of `disk.qcow2`, and how many faults are left.
fn checked(rig: &Rig, repair: Repair) -> (String, u64) {
    let graph = Graph::from_path(rig.path("disk.qcow2"));
    let options = OpenOptions::default();
    let outcome = rig.block_on(check(&host(), &graph, &options, repair, &mut |_, _| ()));
    let zones = outcome.unwrap().zones.unwrap();
    (zones.messages.join("\n"), zones.errors)
}

/// Damages the last place in `disk.qcow2` where these bytes are.
fn damage_last(rig: &Rig, wanted: &[u8]) {
    let mut bytes = fs::read(rig.path("disk.qcow2")).unwrap();
    let at = bytes
        .windows(wanted.len())
        .rposition(|found| found == wanted)
        .expect("they are there");
    bytes[at] ^= 1;
    fs::write(rig.path("disk.qcow2"), bytes).unwrap();
}

#[test]
fn a_damaged_extension_of_a_snapshot_is_noticed_and_dropped_alone() {
    let rig = Rig::new();
    let device = qcow2(&rig, "disk.qcow2");
    attach(&rig, &device, Z2, b"in the snapshot").unwrap();
    attach(&rig, &device, 3 * ZONE, b"beside it").unwrap();
    rig.write(&device, Z1, &pattern(1, BLOCK as usize));
    rig.block_on(device.snapshot_create("then")).unwrap();
    rig.op(&device, ZoneOp::Reset, Z1).unwrap();
    rig.close(device);
    // The image's own lies before the snapshot's.
    damage_last(&rig, b"in the");
    let (said, errors) = checked(&rig, Repair::None);
    assert!(
        errors == 1 && said.contains("snapshot 1: the descriptor extension of zone 2 is damaged"),
        "{said}"
    );
    let device = rig.open("disk.qcow2");
    let applied = rig.block_on(device.snapshot_apply("then"));
    assert!(
        applied
            .unwrap_err()
            .to_string()
            .contains("extension of zone 2 is damaged")
    );
    assert_eq!(extension(&rig, &device, Z2), Some(whole(b"in the snapshot")));
    rig.close(device);

    let (said, errors) = checked(&rig, Repair::All);
    assert!(
        errors == 0 && said.contains("snapshot 1, zone 2: its descriptor extension is damaged and dropped"),
        "{said}"
    );
    assert_eq!(checked(&rig, Repair::None), (String::new(), 0));
    let device = rig.open("disk.qcow2");
    assert_eq!(
        extension(&rig, &device, Z2),
        Some(whole(b"in the snapshot")),
        "the image has its own still"
    );
    rig.block_on(device.snapshot_apply("then")).unwrap();
    rig.close(device);
    let device = rig.open("disk.qcow2");
    assert_eq!(extension(&rig, &device, Z2), None);
    assert_eq!(zone(&rig, &device, Z2).condition, Condition::Empty);
    assert_eq!(extension(&rig, &device, 3 * ZONE), Some(whole(b"beside it")));
    assert_eq!(rig.read(&device, Z1, BLOCK as usize), pattern(1, BLOCK as usize));
    rig.close(device);
}

#[test]
fn a_lost_copy_of_the_table_takes_no_area_or_extension_along_and_two_of_them_say_so() {
    let rig = Rig::new();
    let device = qcow2(&rig, "disk.qcow2");
    rig.op(&device, ZoneOp::OpenZrwa, Z1).unwrap();
    attach(&rig, &device, Z2, b"in both copies").unwrap();
    rig.write(&device, Z1 + AREA, &pattern(1, 2 * BLOCK as usize));
    rig.close(device);
    lose_newest(&rig, 1);
    let (said, errors) = checked(&rig, Repair::None);
    assert!(errors > 0 && said.contains("newest state"), "{said}");
    let (said, errors) = checked(&rig, Repair::All);
    assert!(errors == 0 && !said.contains("zone 2"), "{said}");
    let device = rig.open("disk.qcow2");
    assert_eq!(extension(&rig, &device, Z2), Some(whole(b"in both copies")));
    let area = zone(&rig, &device, Z1);
    assert_eq!((area.wp, area.attributes.zrwa), (Z1 + 2 * BLOCK, true));
    assert_eq!(
        rig.read(&device, Z1 + AREA, 2 * BLOCK as usize),
        pattern(1, 2 * BLOCK as usize)
    );
    rig.close(device);

    lose_newest(&rig, 2);
    let (said, errors) = checked(&rig, Repair::All);
    assert_eq!(errors, 0, "{said}");
    for told in [
        "where no copy of a block is left all counters, descriptor extensions, random write areas",
        "zone 2: it has lost its descriptor extension",
        "zone 1: its write pointer is taken from the bare table",
    ] {
        assert!(said.contains(told), "{told}: {said}");
    }
    let device = rig.open("disk.qcow2");
    assert_eq!(extension(&rig, &device, Z2), None);
    assert!(!zone(&rig, &device, Z1).attributes.zrwa);
    rig.close(device);
}

/// Makes zeros of the newest copies of the only block of the table in `disk.qcow2`.
fn lose_newest(rig: &Rig, copies: usize) {
    let mut bytes = fs::read(rig.path("disk.qcow2")).unwrap();
    let magic = zbdkit_spec::sidecar::BLOCK_MAGIC;
    for _ in 0..copies {
        let all = (0..bytes.len())
            .step_by(4096)
            .filter(|at| bytes[*at..].starts_with(&magic));
        let generation = |at: &usize| u64::from_le_bytes(bytes[at + 8..at + 16].try_into().unwrap());
        let newest = all.max_by_key(generation).expect("a table");
        bytes[newest..newest + 4096].fill(0);
    }
    fs::write(rig.path("disk.qcow2"), bytes).unwrap();
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
    overlay(&rig);
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
fn a_commit_moves_areas_and_extensions_into_the_base() {
    let rig = Rig::new();
    let device = qcow2(&rig, "base.qcow2");
    exercise(&rig, &device);
    rig.close(device);
    overlay(&rig);
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
    overlay(&rig);
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

/// What a recovery makes zeros must stay zeros where it cannot see what lies below: `commit` and `rebase` open an overlay so.
#[test]
fn an_overlay_that_is_recovered_without_its_base_shows_nothing_of_it_above_an_area() {
    let rig = Rig::new();
    let base = qcow2(&rig, "base.qcow2");
    rig.write(&base, Z1, &pattern(9, (ZONE - 4 * BLOCK) as usize));
    // The area of this one ends in the middle of a cluster, which the overlay has not.
    rig.write(&base, 3 * ZONE, &pattern(8, 4 * BLOCK as usize));
    rig.op(&base, ZoneOp::OpenZrwa, 3 * ZONE).unwrap();
    rig.write(&base, 3 * ZONE + 17 * BLOCK, &pattern(7, BLOCK as usize));
    rig.close(base);
    overlay(&rig);
    let over = rig.open("over.qcow2");
    rig.op(&over, ZoneOp::Reset, Z1).unwrap();
    rig.op(&over, ZoneOp::OpenZrwa, Z1).unwrap();
    rig.write(&over, Z1, &pattern(1, 4 * BLOCK as usize));
    rig.flush(&over);
    // As if it died.
    drop(over);
    let options = OpenOptions {
        no_backing: true,
        ..OpenOptions::default()
    };
    let over = rig.try_open("over.qcow2", options);
    rig.close(over.unwrap_or_else(|error| panic!("{error}")));
    let over = rig.open("over.qcow2");
    commit(&rig, &over, Z1 + 4 * BLOCK).unwrap();
    let above = (ZONE - 8 * BLOCK) as usize;
    assert_eq!(
        rig.read(&over, Z1, 4 * BLOCK as usize),
        pattern(1, 4 * BLOCK as usize)
    );
    assert!(rig.read(&over, Z1 + 4 * BLOCK, above) == vec![0; above]);
    for (n, seed) in [(0, 8), (17, 7)] {
        let (at, len) = (3 * ZONE + n * BLOCK, BLOCK as usize);
        assert!(rig.read(&over, at, len) == pattern(seed, len), "block {n}");
    }
    rig.close(over);
}

/// An overlay reads its base's bytes below the written ends of its own zones, wherever the base's end.
#[test]
fn an_overlay_that_is_copied_hides_what_its_base_has_above_its_pointers() {
    let rig = Rig::new();
    let base = raw(&rig);
    rig.write(&base, 3 * ZONE, &pattern(1, BLOCK as usize));
    rig.close(base);
    // What failed writes may leave.
    let file = fs::OpenOptions::new()
        .write(true)
        .open(rig.path("disk.raw"))
        .unwrap();
    for (start, from) in [(Z1, 0), (3 * ZONE, 1), (4 * ZONE, 0)] {
        let garbage = vec![0xbb; ((64 - from) * BLOCK) as usize];
        file.write_all_at(&garbage, start + from * BLOCK).unwrap();
    }
    let source = qcow2(&rig, "source.qcow2");
    rig.op(&source, ZoneOp::OpenZrwa, Z1).unwrap();
    rig.write(&source, Z1 + 9 * BLOCK, &pattern(2, BLOCK as usize));
    rig.write(&source, 3 * ZONE, &pattern(1, BLOCK as usize));
    rig.write(&source, 3 * ZONE + BLOCK, &vec![0; 15 * BLOCK as usize]);
    // Nothing but zeros, not even clusters.
    let lane = source.lane(1);
    let zeroed = source.write_zeroes(&lane, 4 * ZONE, 32 * BLOCK, true);
    rig.block_on(zeroed).unwrap();
    for compress in [false, true] {
        let name = format!("over-{compress}.qcow2");
        let mut options = Qcow2CreateOptions::new(rig.path(&name), 0);
        options.size = None;
        options.layout.cluster_size = BLOCK;
        options.layout.backing = Some(("disk.raw".into(), Some("raw".into())));
        rig.block_on(create_qcow2(&host(), &options)).unwrap();
        let over = rig.open(&name);
        let options = tool::CopyOptions {
            compress,
            target: tool::TargetHolds::Backing { shared: false },
            ..tool::CopyOptions::default()
        };
        rig.block_on(tool::copy(&source, &over, &options, &|_, _| ()))
            .unwrap();
        for start in [Z1, 3 * ZONE, 4 * ZONE] {
            let (read, wanted) = (
                rig.read(&over, start, ZONE as usize),
                rig.read(&source, start, ZONE as usize),
            );
            let differs = read.iter().zip(&wanted).position(|(a, b)| a != b);
            assert_eq!(differs, None, "zone at {start:#x}, compressed: {compress}");
        }
        rig.close(over);
    }
    rig.close(source);
}
