//! Images formatted to blocks of another size, and what is done to them afterwards.

mod support;

use std::fs;

use support::zns::{BLOCK, Z1, Z2, ZONE, attach, zones};
use support::{Rig, host, pattern};
use zbdkit_block::tool::{CompareOptions, CopiedZones, CopyOptions, commit, compare, copy};
use zbdkit_block::{
    CreateOptions, Device, Error, Graph, OpenOptions, Qcow2CreateOptions, Repair, ZoneOp, check, create,
    create_qcow2,
};
use zbdkit_zone::{Condition, ZoneError};

fn sequential(rig: &Rig, name: &str) -> CreateOptions {
    CreateOptions {
        conventional_zones: 0,
        ..zones(rig.path(name))
    }
}

fn raw(rig: &Rig, options: &CreateOptions) -> Device {
    rig.block_on(create(&host(), options)).unwrap();
    rig.open(options.path.file_name().unwrap().to_str().unwrap())
}

fn qcow2(rig: &Rig, name: &str) -> Device {
    let options = Qcow2CreateOptions {
        zones: Some(sequential(rig, name)),
        ..Qcow2CreateOptions::new(rig.path(name), 8 * ZONE)
    };
    rig.block_on(create_qcow2(&host(), &options)).unwrap();
    rig.open(name)
}

fn format(rig: &Rig, device: &Device, block_size: u32) -> Result<(), Error> {
    rig.block_on(device.format(&device.lane(1), block_size))
}

/// Something of everything, in blocks of 4096 bytes.
fn fill(rig: &Rig, device: &Device) {
    rig.op(device, ZoneOp::Finish, 4 * ZONE).unwrap();
    rig.write(device, 0, &pattern(1, 3 * BLOCK as usize));
    rig.op(device, ZoneOp::OpenZrwa, Z1).unwrap();
    rig.write(device, Z1 + 2 * BLOCK, &pattern(2, BLOCK as usize));
    attach(rig, device, Z2, b"extension").unwrap();
    rig.op(device, ZoneOp::Open, 3 * ZONE).unwrap();
    rig.op(device, ZoneOp::SetReadOnly, 5 * ZONE).unwrap();
    rig.op(device, ZoneOp::SetOffline, 6 * ZONE).unwrap();
}

/// Erased, with blocks of 512 bytes, the first three of which are then written.
fn use_small_blocks(rig: &Rig, device: &Device) {
    for zone in rig.zones(device) {
        let expected = match zone.zone.0 {
            5 | 6 => Condition::Offline,
            _ => Condition::Empty,
        };
        assert_eq!(zone.condition, expected, "{zone:?}");
        assert!(!zone.attributes.zrwa && !zone.attributes.extension);
    }
    assert_eq!(device.limits().block_size, 512);
    assert_eq!(device.limits().zoned.unwrap().block_size(), 512);
    assert_eq!(
        rig.read(device, Z1, 4 * BLOCK as usize),
        vec![0; 4 * BLOCK as usize]
    );
    rig.write(device, 0, &pattern(3, 1024));
    rig.write(device, 1024, &pattern(4, 512));
}

/// What [`use_small_blocks`] has written.
fn verify(rig: &Rig, device: &Device) {
    assert_eq!(
        (device.block_size(), device.block_sizes()),
        (512, vec![512, 4096])
    );
    let written = [pattern(3, 1024), pattern(4, 512), vec![0; 512]].concat();
    assert_eq!(rig.read(device, 0, 2048), written);
    assert_eq!(rig.zones(device)[0].wp, 1536);
}

/// That nothing is wrong with an image that nobody has open.
fn sound(rig: &Rig, name: &str) {
    let graph = Graph::from_path(rig.path(name));
    let options = OpenOptions::default();
    let checked = rig.block_on(check(&host(), &graph, &options, Repair::None, &mut |_, _| ()));
    let checked = checked.unwrap();
    let zones = checked.zones.unwrap();
    assert_eq!(zones.errors, 0, "{:?}", zones.messages);
    if let Some(report) = checked.report {
        assert_eq!(report.corruptions, 0, "{:?}", report.messages);
    }
}

#[test]
fn a_format_outlives_a_close_and_a_kill() {
    for name in ["disk.raw", "disk.qcow2"] {
        let rig = Rig::new();
        let device = match name {
            "disk.raw" => raw(&rig, &sequential(&rig, name)),
            _ => qcow2(&rig, name),
        };
        fill(&rig, &device);
        format(&rig, &device, 512).unwrap();
        use_small_blocks(&rig, &device);
        // As if it died.
        drop(device);
        let device = rig.open(name);
        assert_eq!(device.notices(), [""; 0]);
        verify(&rig, &device);
        rig.close(device);
        sound(&rig, name);
        let device = rig.open_read_only(name);
        verify(&rig, &device);
        assert!(matches!(format(&rig, &device, 4096), Err(Error::ReadOnly)));
        rig.close(device);
        let device = rig.open(name);
        format(&rig, &device, 4096).unwrap();
        let error = rig.try_write(&device, 0, &[1; 512]).unwrap_err();
        assert!(
            matches!(error, Error::Unaligned { block_size: 4096, .. }),
            "{error}"
        );
        rig.write(&device, 0, &pattern(1, BLOCK as usize));
        rig.close(device);
        sound(&rig, name);
    }
}

#[test]
fn zones_in_memory_are_formatted() {
    let rig = Rig::new();
    let graph = "driver=zoned,file.driver=memory,file.size=8M,zone.size=1M,zone.max_open_zones=3,\
        zone.max_active_zones=8,zone.zrwa_size=64k,zone.zrwa_granularity=8k,zone.descr_ext_size=128";
    let device = rig.open_graph(graph).unwrap();
    fill(&rig, &device);
    format(&rig, &device, 512).unwrap();
    use_small_blocks(&rig, &device);
    verify(&rig, &device);
    rig.close(device);
}

#[test]
fn what_is_no_namespace_keeps_its_block_size() {
    let rig = Rig::new();
    let conventional = zones(rig.path("conventional.raw"));
    let host_aware = CreateOptions {
        model: zbdkit_zone::Model::HostAware,
        zone_size: Some(ZONE),
        ..CreateOptions::new(rig.path("aware.raw"), 8 * ZONE)
    };
    for options in [conventional, host_aware] {
        let device = raw(&rig, &options);
        rig.write(&device, Z1, &pattern(1, BLOCK as usize));
        assert_eq!(device.block_sizes(), [4096]);
        assert!(matches!(format(&rig, &device, 512), Err(Error::NotSupported(_))));
        assert_eq!(rig.read(&device, Z1, BLOCK as usize), pattern(1, BLOCK as usize));
        match options.model {
            zbdkit_zone::Model::HostAware => {
                format(&rig, &device, 4096).unwrap();
                assert_eq!(rig.zones(&device)[1].condition, Condition::Empty);
            }
            _ => assert!(matches!(format(&rig, &device, 4096), Err(Error::NotSupported(_)))),
        }
        rig.close(device);
    }
    let plain = rig.open_graph("driver=memory,size=8M").unwrap();
    assert_eq!(plain.block_sizes(), [512]);
    assert!(matches!(format(&rig, &plain, 512), Err(Error::NotSupported(_))));
}

#[test]
fn with_direct_io_the_blocks_of_the_storage_are_the_smallest() {
    let rig = Rig::on_disk();
    let device = raw(&rig, &sequential(&rig, "disk.raw"));
    rig.close(device);
    let options = OpenOptions {
        direct: true,
        ..OpenOptions::default()
    };
    let Ok(device) = rig.try_open("disk.raw", options) else {
        return;
    };
    let least = device.limits().direct_align;
    let expected: &[u32] = if least > 512 { &[4096] } else { &[512, 4096] };
    assert_eq!(device.block_sizes(), expected, "{least}");
    rig.close(device);
}

#[test]
fn copies_and_comparisons_know_the_block_size() {
    let rig = Rig::new();
    let source = qcow2(&rig, "source.qcow2");
    format(&rig, &source, 512).unwrap();
    rig.write(&source, 0, &pattern(3, 1536));
    let target = raw(&rig, &sequential(&rig, "copy.raw"));
    let copied = || rig.block_on(copy(&source, &target, &CopyOptions::default(), &|_, _| ()));
    let error = copied().unwrap_err().to_string();
    assert!(
        error.contains("zone 0 has") && error.contains("blocks of 4096 bytes"),
        "{error}"
    );
    let options = CompareOptions {
        strict: false,
        zones: true,
    };
    let differ = || {
        let compared = rig.block_on(compare(&source, &target, &options, &|_, _| ()));
        compared.unwrap().difference
    };
    assert!(differ().is_some());
    format(&rig, &target, 512).unwrap();
    assert_eq!(copied().unwrap(), CopiedZones::Kept);
    assert_eq!(differ(), None);
    rig.close(source);
    rig.close(target);
}

#[test]
fn snapshots_and_bases_keep_their_own_block_size() {
    let rig = Rig::new();
    let device = qcow2(&rig, "base.qcow2");
    rig.write(&device, 0, &pattern(1, BLOCK as usize));
    rig.block_on(device.snapshot_create("large")).unwrap();
    format(&rig, &device, 512).unwrap();
    rig.write(&device, 0, &pattern(3, 1536));
    rig.block_on(device.snapshot_create("small")).unwrap();
    rig.close(device);
    sound(&rig, "base.qcow2");
    let apply = |name: &str| {
        let device = rig.open("base.qcow2");
        rig.block_on(device.snapshot_apply(name)).unwrap();
        rig.close(device);
        sound(&rig, "base.qcow2");
        rig.open("base.qcow2")
    };
    let device = apply("small");
    assert_eq!(
        (device.block_size(), rig.read(&device, 0, 1536)),
        (512, pattern(3, 1536))
    );
    rig.close(device);
    let device = apply("large");
    assert_eq!(device.block_size(), 4096);
    assert_eq!(rig.read(&device, 0, BLOCK as usize), pattern(1, BLOCK as usize));
    rig.close(device);

    // An overlay goes its own way, and comes back as far as its blocks are some of the base's.
    let mut options = Qcow2CreateOptions::new(rig.path("over.qcow2"), 0);
    options.size = None;
    options.layout.backing = Some(("base.qcow2".into(), Some("qcow2".into())));
    rig.block_on(create_qcow2(&host(), &options)).unwrap();
    let over = rig.open("over.qcow2");
    assert_eq!(over.block_size(), 4096);
    let before = fs::read(rig.path("base.qcow2")).unwrap();
    format(&rig, &over, 512).unwrap();
    assert_eq!(rig.read(&over, 0, BLOCK as usize), vec![0; BLOCK as usize]);
    assert_eq!(fs::read(rig.path("base.qcow2")).unwrap(), before);
    rig.write(&over, 0, &pattern(5, 512));
    rig.close(over);
    let committed = || {
        let alone = OpenOptions {
            read_only: true,
            no_backing: true,
            ..OpenOptions::default()
        };
        let Ok(over) = rig.try_open("over.qcow2", alone) else {
            panic!("the overlay does not open alone");
        };
        let base = rig.open("base.qcow2");
        let committed = rig.block_on(commit(&[&over], &base, &|_, _| ()));
        rig.close(over);
        (committed, base)
    };
    let (refused, base) = committed();
    let error = refused.unwrap_err().to_string();
    assert!(
        error.contains("do not fit") && error.contains("blocks of 4096 bytes"),
        "{error}"
    );
    rig.close(base);
    let over = rig.open("over.qcow2");
    rig.write(&over, 512, &pattern(6, 7 * 512));
    rig.close(over);
    let (done, base) = committed();
    done.unwrap();
    assert_eq!(base.block_size(), 4096);
    assert_eq!(
        rig.read(&base, 0, 4096),
        [pattern(5, 512), pattern(6, 7 * 512)].concat()
    );
    rig.close(base);
}

/// A write that comes while a format is under way finds the blocks that there are when its zone takes it.
#[test]
fn writes_and_formats_at_the_same_time_leave_whole_blocks() {
    let rig = Rig::new();
    let graph =
        "driver=zoned,file.driver=memory,file.size=4M,zone.size=1M,zone.max_append_bytes=64k,block_size=512";
    let device = rig.open_graph(graph).unwrap();
    std::thread::scope(|scope| {
        for start in [0, 0, ZONE] {
            let device = device.clone();
            scope.spawn(move || {
                let rig = Rig::new();
                let lane = device.lane(4);
                for _ in 0..2000 {
                    let buf = zbdkit_io::IoBuf::from_vec(vec![1; 512]);
                    match rig.block_on(device.append(&lane, buf, start)) {
                        Ok(at) => assert!(at.is_multiple_of(512)),
                        Err(Error::Zone(ZoneError::Unaligned {
                            granularity: 4096, ..
                        })) => {}
                        Err(Error::Zone(ZoneError::Full { .. } | ZoneError::ExceedsCapacity { .. })) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        for round in 0..200 {
            let size = if round % 2 == 0 { 4096 } else { 512 };
            format(&rig, &device, size).unwrap();
            if size == 4096 {
                let whole = |at: u64| at.is_multiple_of(4096);
                assert!(rig.zones(&device).iter().all(|zone| whole(zone.written_end)));
            }
        }
    });
    rig.close(device);
}

#[test]
fn marks_of_small_blocks_are_gone_with_them() {
    let sidecar = |rig: &Rig| raw(rig, &sequential(rig, "zones"));
    let inside = |rig: &Rig| qcow2(rig, "zones");
    for (make, killed) in [
        (sidecar as fn(&Rig) -> Device, false),
        (sidecar, true),
        (inside, false),
        (inside, true),
    ] {
        let rig = Rig::new();
        let device = make(&rig);
        format(&rig, &device, 512).unwrap();
        rig.write(&device, 0, &pattern(1, 512));
        rig.block_on(device.mark_uncorrectable(&device.lane(1), 512, 1024))
            .unwrap();
        assert_eq!(device.marks().bytes(), 1024);
        format(&rig, &device, 4096).unwrap();
        assert!(device.marks().is_empty());
        rig.write(&device, 0, &pattern(2, 4096));
        if killed {
            // The list in the table counts.
            drop(device);
        } else {
            rig.close(device);
            sound(&rig, "zones");
        }
        let device = rig.open("zones");
        // The older copy of the list still speaks of small blocks.
        assert_eq!(device.notices(), [""; 0]);
        assert_eq!(rig.read(&device, 0, 4096), pattern(2, 4096));
        rig.close(device);
        sound(&rig, "zones");
    }
}
