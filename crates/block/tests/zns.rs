//! Random write areas, descriptor extensions and attributes of zones, over memory and beside a raw image.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use support::zns::*;
use support::{Rig, host, pattern};
use zbdkit_block::tool::{CompareOptions, CopiedZones, CopyOptions, compare, copy};
use zbdkit_block::{
    Device, Error, Graph, OpenOptions, Repair, ZnsOptions, ZoneOp, check, create, default_sidecar,
};
use zbdkit_zone::ZoneNo;

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

/// Resets and readers of one extension at the same time.
#[test]
fn an_extension_in_memory_is_there_as_long_as_its_record() {
    let rig = Rig::new();
    let device = memory(&rig);
    attach(&rig, &device, Z2, b"this").unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers = [(); 2].map(|()| {
            scope.spawn(|| {
                let rig = Rig::new();
                while !over.load(Ordering::Relaxed) {
                    match rig.block_on(device.extension(Z2)) {
                        Ok(Some(found)) if found == whole(b"this") => {}
                        Ok(None) => {}
                        wrong => panic!("{wrong:?}"),
                    }
                }
            })
        });
        // Also where this panics.
        let _over = SetAtLast(&over);
        for _ in 0..20_000 {
            if readers.iter().any(|reader| reader.is_finished()) {
                break;
            }
            rig.op(&device, ZoneOp::Reset, Z2).unwrap();
            attach(&rig, &device, Z2, b"this").unwrap();
        }
    });
    rig.close(device);
}

struct SetAtLast<'a>(&'a AtomicBool);

impl Drop for SetAtLast<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
