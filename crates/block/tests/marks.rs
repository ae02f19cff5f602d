//! Blocks that are marked uncorrectable: what reads, writes, resets and restarts make of them.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use support::zns::*;
use support::{Rig, host, pattern};
use zbdkit_block::tool::{self, CompareOptions, CopyOptions};
use zbdkit_block::{
    CreateError, CrossZone, Device, Error, Graph, OpenOptions, Preallocation, Qcow2CreateOptions, Repair,
    RunStateMode, ZoneOp, check, create_qcow2, default_sidecar,
};
use zbdkit_io::IoBuf;
use zbdkit_zone::ZoneError;

const ONE: usize = BLOCK as usize;

fn mark(rig: &Rig, device: &Device, offset: u64, blocks: u64) -> Result<(), Error> {
    rig.block_on(device.mark_uncorrectable(&device.lane(4), offset, blocks * BLOCK))
}

fn try_read(rig: &Rig, device: &Device, offset: u64, blocks: usize) -> Result<Vec<u8>, Error> {
    let buf = IoBuf::alloc(blocks * ONE);
    rig.block_on(device.read(&device.lane(4), buf.clone(), offset, CrossZone::Allow))
        .map(|()| buf.to_vec())
}

fn marked(offset: u64) -> Result<Vec<u8>, Error> {
    Err(Error::Uncorrectable { offset })
}

/// Marks in a conventional zone and in zones written in order, one of which has an area.
fn exercise(rig: &Rig, device: &Device) {
    rig.write(device, 0, &pattern(1, 8 * ONE));
    mark(rig, device, 2 * BLOCK, 2).unwrap();
    rig.write(device, Z1, &pattern(2, 2 * ONE));
    // As a write: at the pointer alone.
    let elsewhere = mark(rig, device, Z1, 1).unwrap_err();
    assert!(matches!(
        elsewhere,
        Error::Zone(ZoneError::NotAtWritePointer { .. })
    ));
    mark(rig, device, Z1 + 2 * BLOCK, 3).unwrap();
    rig.write(device, Z1 + 5 * BLOCK, &pattern(3, ONE));
    rig.op(device, ZoneOp::OpenZrwa, Z2).unwrap();
    mark(rig, device, Z2 + 3 * BLOCK, 2).unwrap();
}

fn verify(rig: &Rig, device: &Device) {
    assert_eq!(device.marks().bytes(), 7 * BLOCK);
    assert_eq!(try_read(rig, device, 0, 8), marked(2 * BLOCK));
    assert_eq!(try_read(rig, device, 3 * BLOCK, 1), marked(3 * BLOCK));
    assert_eq!(
        try_read(rig, device, 4 * BLOCK, 4).unwrap(),
        pattern(1, 8 * ONE)[4 * ONE..]
    );
    assert_eq!(try_read(rig, device, Z1, 2).unwrap(), pattern(2, 2 * ONE));
    assert_eq!(try_read(rig, device, Z1, 3), marked(Z1 + 2 * BLOCK));
    assert_eq!(
        try_read(rig, device, Z1 + 5 * BLOCK, 2).unwrap()[..ONE],
        pattern(3, ONE)
    );
    assert_eq!(rig.zones(device)[1].wp, Z1 + 6 * BLOCK);
    assert_eq!(try_read(rig, device, Z2, 3).unwrap(), vec![0; 3 * ONE]);
    assert_eq!(try_read(rig, device, Z2, 4), marked(Z2 + 3 * BLOCK));
    let map = |at, len| rig.block_on(device.map(at, len)).unwrap();
    assert_eq!(map(0, 8 * BLOCK).len, 2 * BLOCK);
    assert!(map(Z1 + 2 * BLOCK, 4 * BLOCK).data && map(Z1 + 2 * BLOCK, 4 * BLOCK).len == 3 * BLOCK);
}

/// Everything that takes marks away.
fn heal(rig: &Rig, device: &Device) {
    rig.write(device, 2 * BLOCK, &pattern(4, ONE));
    assert_eq!(try_read(rig, device, 2 * BLOCK, 1).unwrap(), pattern(4, ONE));
    assert_eq!(try_read(rig, device, 2 * BLOCK, 2), marked(3 * BLOCK));
    let lane = device.lane(4);
    rig.block_on(device.discard(&lane, 3 * BLOCK, BLOCK)).unwrap();
    // Not what was there before.
    assert_eq!(try_read(rig, device, 3 * BLOCK, 1).unwrap(), vec![0; ONE]);
    rig.block_on(device.write_zeroes(&lane, Z2 + 3 * BLOCK, BLOCK, true))
        .unwrap();
    assert_eq!(try_read(rig, device, Z2 + 3 * BLOCK, 1).unwrap(), vec![0; ONE]);
    rig.op(device, ZoneOp::Reset, Z1).unwrap();
    let rest = Z2 + 4 * BLOCK..Z2 + 5 * BLOCK;
    assert_eq!(device.marks().ranges(), std::slice::from_ref(&rest));
    rig.write(device, Z1, &pattern(5, 4 * ONE));
    assert_eq!(try_read(rig, device, Z1, 4).unwrap(), pattern(5, 4 * ONE));
    rig.block_on(device.reset_all(&lane)).unwrap();
    assert!(device.marks().is_empty());
}

#[test]
fn marks_over_memory_are_kept_until_they_are_written_over() {
    let rig = Rig::new();
    let device = memory(&rig);
    exercise(&rig, &device);
    verify(&rig, &device);
    heal(&rig, &device);
    rig.close(device);
}

#[test]
fn marks_outlive_a_close_and_a_kill() {
    for (name, make) in [
        ("disk.raw", raw as fn(&Rig) -> Device),
        ("disk.qcow2", |rig| qcow2(rig, "disk.qcow2")),
        ("disk.qcow2", |rig| qcow2_with(rig, "disk.qcow2", 4096)),
    ] {
        let rig = Rig::new();
        let device = make(&rig);
        exercise(&rig, &device);
        rig.close(device);
        let device = rig.open_read_only(name);
        assert!(
            device
                .notices()
                .iter()
                .any(|notice| notice.contains("28672 bytes are marked uncorrectable"))
        );
        verify(&rig, &device);
        rig.close(device);
        let device = rig.open(name);
        verify(&rig, &device);
        // As if it died.
        drop(device);
        let device = rig.open(name);
        verify(&rig, &device);
        heal(&rig, &device);
        drop(device);
        let device = rig.open(name);
        assert!(device.marks().is_empty());
        rig.close(device);
        // A kill loses clusters, and nothing else.
        assert!(!checked(&rig, name, Repair::None).1.contains("ERROR"));
    }
}

/// Errors that are left, leaks among them, and what was said.
fn checked(rig: &Rig, name: &str, repair: Repair) -> (u64, String) {
    let graph = Graph::from_path(rig.path(name));
    let options = OpenOptions::default();
    let outcome = rig.block_on(check(&host(), &graph, &options, repair, &mut |_, _| ()));
    let outcome = outcome.unwrap();
    let (zones, report) = (outcome.zones.unwrap(), outcome.report.unwrap_or_default());
    let errors = zones.errors + report.corruptions + report.leaks;
    (errors, zones.messages.join("\n"))
}

#[test]
fn memory_without_zones_has_marks_and_other_disks_without_zones_have_none() {
    let rig = Rig::new();
    let device = rig.open_graph("driver=memory,size=1M").unwrap();
    rig.write(&device, 0, &pattern(1, 4 * ONE));
    mark(&rig, &device, BLOCK, 2).unwrap();
    assert_eq!(try_read(&rig, &device, 0, 4), marked(BLOCK));
    rig.write(&device, BLOCK, &pattern(2, ONE));
    assert_eq!(try_read(&rig, &device, 0, 2).unwrap()[ONE..], pattern(2, ONE));
    let lane = device.lane(1);
    rig.block_on(device.discard(&lane, 2 * BLOCK, BLOCK)).unwrap();
    assert_eq!(try_read(&rig, &device, 2 * BLOCK, 1).unwrap(), vec![0; ONE]);
    assert!(device.marks().is_empty());
    fs::write(rig.path("plain.raw"), vec![0; 1 << 20]).unwrap();
    rig.plain(
        "plain.qcow2",
        &zbdkit_block::Qcow2Layout {
            size: 1 << 20,
            ..Default::default()
        },
    );
    for name in ["plain.raw", "plain.qcow2"] {
        let graph = format!(
            "driver={},file.driver=file,file.filename={}",
            &name[6..],
            rig.path(name).display()
        );
        let device = rig.open_graph(&graph).unwrap();
        assert!(!device.keeps_marks());
        assert!(matches!(mark(&rig, &device, 0, 1), Err(Error::NotSupported(_))));
        rig.close(device);
    }
}

#[test]
fn images_without_marks_are_as_they_were_and_with_marks_of_a_newer_version() {
    let rig = Rig::new();
    let sidecar = |rig: &Rig| fs::read(default_sidecar(&rig.path("disk.raw"))).unwrap();
    let device = raw(&rig);
    rig.write(&device, Z1, &pattern(1, ONE));
    rig.close(device);
    let before = sidecar(&rig);
    assert_eq!(
        (before[8], before[4096 + 8], before.len()),
        (2, 2, 16384 + 8 * 4096)
    );
    let device = rig.open("disk.raw");
    mark(&rig, &device, 0, 1).unwrap();
    rig.close(device);
    let after = sidecar(&rig);
    assert_eq!((after[8], after[4096 + 8]), (3, 3));
    assert_eq!(after.len(), before.len() + (128 << 10));
}

#[test]
fn a_list_that_is_full_takes_no_more_and_still_loses_zones() {
    let rig = Rig::new();
    let device = rig
        .open_graph("driver=zoned,zone.size=64M,zone.conventional_zones=1,file.driver=memory,file.size=192M")
        .unwrap();
    let lane = device.lane(1);
    rig.block_on(async {
        for at in 0..4092 {
            device
                .mark_uncorrectable(&lane, at * 2 * BLOCK, BLOCK)
                .await
                .unwrap();
        }
    });
    let full = mark(&rig, &device, 64 << 20, 1).unwrap_err();
    assert_eq!(full, Error::TooManyMarks { most: 4092 });
    assert_eq!(rig.zones(&device)[1].wp, 64 << 20);
    rig.write(&device, 0, &pattern(1, ONE));
    mark(&rig, &device, 64 << 20, 1).unwrap();
    rig.op(&device, ZoneOp::Reset, 64 << 20).unwrap();
    assert_eq!(device.marks().ranges().len(), 4091);
}

fn flip(path: PathBuf, at: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}

/// The two copies of the list in a file.
fn copies(path: &std::path::Path) -> Vec<u64> {
    let bytes = fs::read(path).unwrap();
    let found = (0..bytes.len() as u64).step_by(4096);
    found
        .filter(|at| bytes[*at as usize..].starts_with(b"ZBDMARKS"))
        .collect()
}

#[test]
fn one_damaged_copy_of_the_list_is_made_good_and_two_are_told_and_mended() {
    for (name, make) in [
        ("disk.raw", raw as fn(&Rig) -> Device),
        ("disk.qcow2", |rig| qcow2(rig, "disk.qcow2")),
    ] {
        let rig = Rig::new();
        let device = make(&rig);
        exercise(&rig, &device);
        rig.close(device);
        let holder = match name {
            "disk.raw" => default_sidecar(&rig.path(name)),
            _ => rig.path(name),
        };
        let list = copies(&holder);
        assert_eq!(list.len(), 2, "{list:?}");
        // Three lists were written, so the newest one is copy 1.
        flip(holder.clone(), list[0] + 70);
        let (errors, said) = checked(&rig, name, Repair::None);
        assert!(
            errors == 1 && said.contains("one copy of the list of blocks"),
            "{said}"
        );
        assert_eq!(checked(&rig, name, Repair::All).0, 0);
        assert_eq!(checked(&rig, name, Repair::None).0, 0);
        let device = rig.open(name);
        verify(&rig, &device);
        rig.close(device);
        let list = copies(&holder);
        list.iter().for_each(|at| flip(holder.clone(), at + 70));
        let error = rig.open_error(name);
        assert!(
            error.contains("both copies of the list of blocks that are marked"),
            "{error}"
        );
        let (errors, said) = checked(&rig, name, Repair::All);
        assert!(
            errors == 0 && said.contains("nothing tells any more which blocks"),
            "{said}"
        );
        let device = rig.open(name);
        assert!(device.marks().is_empty());
        rig.close(device);
        assert_eq!(checked(&rig, name, Repair::None).0, 0);
    }
}

#[test]
fn a_newest_list_that_is_lost_is_noticed() {
    let rig = Rig::new();
    let device = raw(&rig);
    exercise(&rig, &device);
    rig.close(device);
    let sidecar = default_sidecar(&rig.path("disk.raw"));
    let list = copies(&sidecar);
    flip(sidecar, list[1] + 70);
    let error = rig.open_error("disk.raw");
    assert!(error.contains("held the newest state"), "{error}");
}

/// Moves the only mark of the newest list up by so many blocks.
fn move_mark(path: &std::path::Path, blocks: u64) {
    let mut bytes = fs::read(path).unwrap();
    let generation = |at: &u64| bytes[*at as usize + 16];
    let at = copies(path).into_iter().max_by_key(generation).unwrap() as usize;
    for field in [at + 64, at + 72] {
        let field = &mut bytes[field..field + 8];
        let offset = u64::from_le_bytes(field.try_into().unwrap());
        field.copy_from_slice(&(offset + blocks * BLOCK).to_le_bytes());
    }
    bytes[at + 8..at + 12].fill(0);
    let crc = crc32c::crc32c(&bytes[at..at + 80]).to_le_bytes();
    bytes[at + 8..at + 12].copy_from_slice(&crc);
    fs::write(path, bytes).unwrap();
}

/// A mark whose write failed is left above the data by a clean close. It goes with the next opening, and one that gets no further
/// than that leaves an image that can be opened.
#[test]
fn an_opening_that_drops_marks_can_end_anywhere() {
    for (name, make) in [
        ("disk.raw", raw as fn(&Rig) -> Device),
        ("disk.qcow2", |rig| qcow2(rig, "disk.qcow2")),
    ] {
        let rig = Rig::new();
        let device = make(&rig);
        mark(&rig, &device, Z1, 1).unwrap();
        rig.close(device);
        let holder = match name {
            "disk.raw" => default_sidecar(&rig.path(name)),
            _ => rig.path(name),
        };
        move_mark(&holder, 2);
        // It ends where the new epoch would begin.
        let nowhere = OpenOptions {
            run_state: RunStateMode::In(rig.path("nowhere")),
            ..OpenOptions::default()
        };
        let error = rig
            .try_open(name, nowhere)
            .err()
            .expect("no run state")
            .to_string();
        assert!(error.contains("the run state cannot be created"), "{error}");
        assert_eq!(checked(&rig, name, Repair::None), (0, String::new()));
        let device = rig.open(name);
        assert!(device.marks().is_empty());
        rig.write(&device, Z1 + BLOCK, &pattern(1, 2 * ONE));
        // As if it died.
        drop(device);
        let device = rig.open(name);
        assert_eq!(
            try_read(&rig, &device, Z1, 3).unwrap()[ONE..],
            pattern(1, 2 * ONE)
        );
        rig.close(device);
        // The kill has lost clusters of the qcow2 image, and nothing else.
        assert!(!checked(&rig, name, Repair::None).1.contains("ERROR"));
    }
}

#[test]
fn copies_and_comparisons_fail_at_the_first_marked_block() {
    let rig = Rig::new();
    let source = raw(&rig);
    exercise(&rig, &source);
    let target = qcow2(&rig, "target.qcow2");
    let one = CopyOptions {
        workers: 1,
        ..CopyOptions::default()
    };
    let copied = rig.block_on(tool::copy(&source, &target, &one, &|_, _| ()));
    let error = copied.unwrap_err().to_string();
    assert!(
        error.contains("the block at 8192 is marked uncorrectable"),
        "{error}"
    );
    let options = CompareOptions {
        strict: false,
        zones: false,
    };
    rig.write(&target, 0, &pattern(1, 8 * ONE));
    let compared = rig.block_on(tool::compare(&source, &target, &options, &|_, _| ()));
    let error = compared.unwrap_err().to_string();
    assert!(
        error.contains("the block at 8192 is marked uncorrectable"),
        "{error}"
    );
    // Nor is one written over by a copy.
    let back = rig.block_on(tool::copy(&target, &source, &CopyOptions::default(), &|_, _| ()));
    let error = back.unwrap_err().to_string();
    assert!(error.contains("the target has blocks that are marked"), "{error}");
}

#[test]
fn snapshots_sizes_and_overlays_want_an_image_without_marks() {
    let rig = Rig::new();
    let device = qcow2(&rig, "disk.qcow2");
    rig.block_on(device.snapshot_create("before")).unwrap();
    exercise(&rig, &device);
    let refused = rig
        .block_on(device.snapshot_create("with"))
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("the first at offset 8192: write them again, or reset"),
        "{refused}"
    );
    let refused = rig.block_on(device.resize(16 * ZONE, false, Preallocation::Off));
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains("the first at offset 8192")
    );
    rig.close(device);
    let mut over = Qcow2CreateOptions::new(rig.path("over.qcow2"), 0);
    over.size = None;
    over.layout.backing = Some(("disk.qcow2".into(), Some("qcow2".into())));
    match rig.block_on(create_qcow2(&host(), &over)) {
        Err(CreateError::Refused(why)) => assert!(why.contains("the first at offset 8192"), "{why}"),
        other => panic!("{other:?}"),
    }
    // A snapshot from before brings back an image without, and their list gives its space back.
    let device = rig.open("disk.qcow2");
    rig.block_on(device.snapshot_apply("before")).unwrap();
    rig.close(device);
    assert_eq!(checked(&rig, "disk.qcow2", Repair::None), (0, String::new()));
    let device = rig.open("disk.qcow2");
    assert!(device.marks().is_empty());
    assert_eq!(try_read(&rig, &device, 0, 8).unwrap(), vec![0; 8 * ONE]);
    rig.close(device);
}
