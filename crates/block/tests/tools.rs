//! Copies and comparisons of whole images, on real files.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use zbdkit_block::tool::{
    self, CompareOptions, Compared, CopiedZones, CopyOptions, Difference, TargetHolds, ToolError,
};
use zbdkit_block::{
    CreateOptions, CrossZone, Device, Graph, Host, OpenOptions, OsHost, RunStateMode, ZoneOp, create,
};
use zbdkit_io::{IoBuf, Runtime, RuntimeOptions};
use zbdkit_zone::{Condition, Filter, Model, ZoneInfo};

const ZONE: u64 = 1 << 20;
const ZONES: u64 = 8;

struct Bench {
    dir: tempfile::TempDir,
    runtime: Runtime,
}

fn host() -> Arc<dyn Host> {
    Arc::new(OsHost)
}

impl Bench {
    fn new() -> Bench {
        Bench {
            dir: tempfile::tempdir().unwrap(),
            runtime: Runtime::new(RuntimeOptions::default()).unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a zoned image of eight zones, the first of them conventional.
    fn zoned(&self, name: &str, change: impl FnOnce(&mut CreateOptions)) -> Device {
        let mut options = CreateOptions::new(self.path(name), ZONE * ZONES);
        options.zone_size = Some(ZONE);
        options.zone_capacity = Some(ZONE - 65536);
        options.conventional_zones = 1;
        options.max_open = Some(3);
        options.max_active = 4;
        change(&mut options);
        self.runtime.block_on(create(&host(), &options)).unwrap();
        self.open(name)
    }

    /// Makes a file without zones.
    fn plain(&self, name: &str, len: u64) -> Device {
        fs::File::create(self.path(name)).unwrap().set_len(len).unwrap();
        self.open_plain(name)
    }

    fn open_plain(&self, name: &str) -> Device {
        self.graph(&format!(
            "driver=raw,file.driver=file,file.filename={}",
            self.path(name).display()
        ))
    }

    fn open(&self, name: &str) -> Device {
        self.graph(&self.path(name).display().to_string())
    }

    fn graph(&self, graph: &str) -> Device {
        let options = OpenOptions {
            run_state: RunStateMode::Sync,
            lock_wait: Duration::ZERO,
            ..OpenOptions::default()
        };
        let graph = Graph::parse(graph).unwrap();
        self.runtime.block_on(graph.open(&host(), &options)).unwrap()
    }

    fn write(&self, device: &Device, offset: u64, byte: u8, len: usize) {
        let buf = IoBuf::from_vec(vec![byte; len]);
        self.runtime
            .block_on(device.write(&device.lane(4), buf, offset))
            .unwrap();
    }

    fn op(&self, device: &Device, op: ZoneOp, zone: u64) {
        self.runtime
            .block_on(device.zone_op(&device.lane(4), op, zone * ZONE))
            .unwrap();
    }

    fn read(&self, device: &Device, offset: u64, len: usize) -> Vec<u8> {
        let buf = IoBuf::alloc(len);
        self.runtime
            .block_on(device.read(&device.lane(4), buf.clone(), offset, CrossZone::Allow))
            .unwrap();
        buf.to_vec()
    }

    fn zones(&self, device: &Device) -> Vec<ZoneInfo> {
        self.runtime
            .block_on(device.report(0, Filter::All, usize::MAX))
            .unwrap()
    }

    fn close(&self, device: Device) {
        self.runtime.block_on(device.close()).unwrap();
    }

    fn copy(&self, from: &Device, to: &Device, options: &CopyOptions) -> Result<CopiedZones, ToolError> {
        self.runtime.block_on(tool::copy(from, to, options, &|_, _| ()))
    }

    fn compare(&self, a: &Device, b: &Device, strict: bool, zones: bool) -> Compared {
        let options = CompareOptions { strict, zones };
        self.runtime
            .block_on(tool::compare(a, b, &options, &|_, _| ()))
            .unwrap()
    }

    fn difference(&self, a: &Device, b: &Device) -> Option<Difference> {
        self.compare(a, b, false, true).difference
    }
}

fn conditions(zones: &[ZoneInfo]) -> Vec<Condition> {
    zones.iter().map(|zone| zone.condition).collect()
}

/// A zone in each condition: conventional with data, empty, open, closed, full by writing, full by finish, read-only
/// with data, offline with data.
fn of_every_kind(bench: &Bench, name: &str, model: Model) -> Device {
    let device = bench.zoned(name, |options| options.model = model);
    bench.write(&device, 512 << 10, 1, 8192);
    bench.write(&device, 2 * ZONE, 2, 12288);
    bench.write(&device, 3 * ZONE, 3, 4096);
    bench.op(&device, ZoneOp::Reset, 3);
    bench.write(&device, 3 * ZONE, 4, 8192);
    bench.write(&device, 4 * ZONE, 5, (ZONE - 65536) as usize);
    bench.write(&device, 5 * ZONE, 6, 4096);
    bench.op(&device, ZoneOp::Finish, 5);
    bench.write(&device, 6 * ZONE, 7, 4096);
    bench.op(&device, ZoneOp::SetReadOnly, 6);
    bench.write(&device, 7 * ZONE, 8, 4096);
    bench.op(&device, ZoneOp::SetOffline, 7);
    device
}

#[test]
fn a_copy_has_the_zones_with_their_conditions_limits_and_counters() {
    use Condition::*;
    let bench = Bench::new();
    for (model, name) in [(Model::HostManaged, "managed"), (Model::HostAware, "aware")] {
        let source = of_every_kind(&bench, name, model);
        let target = bench.zoned(&format!("{name} copy"), |options| options.model = model);
        let copied = bench.copy(&source, &target, &CopyOptions::default()).unwrap();
        assert_eq!(copied, CopiedZones::Kept);
        bench.close(target);
        let target = bench.open(&format!("{name} copy"));
        let zones = bench.zones(&target);
        let expected = [
            NotWritePointer,
            Empty,
            Closed,
            Closed,
            Full,
            Full,
            ReadOnly,
            Offline,
        ];
        assert_eq!(conditions(&zones), expected);
        let (old, new) = (bench.zones(&source), zones);
        for (old, new) in old.iter().zip(&new) {
            assert_eq!(
                (old.wp, old.written_end, old.counters),
                (new.wp, new.written_end, new.counters)
            );
        }
        assert_eq!(bench.compare(&source, &target, false, true).difference, None);
        // The bytes of a zone that cannot be read came along too.
        bench.op(&target, ZoneOp::SetNormal, 7);
        assert_eq!(
            bench.read(&target, 7 * ZONE, 8192),
            [vec![8; 4096], vec![0; 4096]].concat()
        );
        assert_eq!(
            bench.read(&target, 512 << 10, 12288),
            [vec![1; 8192], vec![0; 4096]].concat()
        );
        // And it goes on where it was.
        bench.write(&target, 3 * ZONE + 8192, 9, 4096);
    }
}

#[test]
fn what_lies_above_a_written_end_is_not_copied() {
    let bench = Bench::new();
    let source = bench.zoned("source", |_| ());
    bench.write(&source, 2 * ZONE, 2, 8192);
    bench.close(source);
    let data = fs::OpenOptions::new()
        .write(true)
        .open(bench.path("source"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&data, &[9; 4096], 2 * ZONE + 8192).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&data, &[9; 4096], 5 * ZONE).unwrap();
    let source = bench.open("source");
    let plain = bench.plain("plain", ZONE * ZONES);
    assert_eq!(
        bench.copy(&source, &plain, &CopyOptions::default()).unwrap(),
        CopiedZones::Dropped
    );
    assert_eq!(
        bench.read(&plain, 2 * ZONE, 12288),
        [vec![2; 8192], vec![0; 4096]].concat()
    );
    assert_eq!(bench.read(&plain, 5 * ZONE, 4096), [0; 4096]);
    assert_eq!(bench.compare(&source, &plain, false, false).difference, None);
}

#[test]
fn zeros_are_left_out_and_holes_stay_holes() {
    let bench = Bench::new();
    let source = bench.plain("source", 64 << 20);
    bench.write(&source, 1 << 20, 1, 4096);
    bench.write(&source, 8 << 20, 0, 4 << 20);
    bench.write(&source, (63 << 20) + 512, 1, 512);
    let blocks =
        |name: &str| std::os::unix::fs::MetadataExt::blocks(&fs::metadata(bench.path(name)).unwrap());
    let target = bench.plain("target", 64 << 20);
    bench.copy(&source, &target, &CopyOptions::default()).unwrap();
    assert_eq!(bench.difference(&source, &target), None);
    assert!(blocks("source") >= 4096 * 2, "{}", blocks("source"));
    assert!(blocks("target") <= 64, "{} blocks of 512 bytes", blocks("target"));
    let full = bench.plain("full", 64 << 20);
    let all = CopyOptions {
        sparse: 0,
        ..CopyOptions::default()
    };
    bench.copy(&source, &full, &all).unwrap();
    assert_eq!(bench.difference(&source, &full), None);
    assert!(blocks("full") >= 64 << 11, "{}", blocks("full"));
}

#[test]
fn a_target_of_unknown_contents_is_overwritten_whole_whatever_the_order() {
    let bench = Bench::new();
    for in_order in [true, false] {
        let source = bench.plain("source", 9 << 20);
        for (i, at) in [0, 1 << 20, (2 << 20) - 4096, 5 << 20, (9 << 20) - 512]
            .into_iter()
            .enumerate()
        {
            bench.write(&source, at, i as u8 + 1, 512);
        }
        let target = bench.plain("target", 10 << 20);
        bench.write(&target, 0, 0xee, 10 << 20);
        let options = CopyOptions {
            target: TargetHolds::Anything,
            in_order,
            workers: 3,
            ..CopyOptions::default()
        };
        bench.copy(&source, &target, &options).unwrap();
        let compared = bench.compare(&source, &target, false, true);
        assert_eq!((compared.sizes_differ, compared.difference), (true, None));
    }
}

#[test]
fn zones_that_are_overwritten_become_the_sources() {
    let bench = Bench::new();
    let source = of_every_kind(&bench, "source", Model::HostManaged);
    let target = bench.zoned("target", |_| ());
    for zone in [1, 2, 5] {
        bench.write(&target, zone * ZONE, 0xee, 65536);
    }
    bench.write(&target, 0, 0xee, 65536);
    let options = CopyOptions {
        target: TargetHolds::Anything,
        ..CopyOptions::default()
    };
    bench.copy(&source, &target, &options).unwrap();
    assert_eq!(bench.difference(&source, &target), None);
    // What a reset zone had is gone, also below.
    bench.write(&target, ZONE, 1, 4096);
    assert_eq!(bench.read(&target, ZONE + 4096, 4096), [0; 4096]);
}

#[test]
fn a_disk_without_zones_fills_zones_from_their_starts() {
    use Condition::*;
    let bench = Bench::new();
    let source = bench.plain("source", ZONE * ZONES);
    bench.write(&source, 512 << 10, 1, 4096);
    bench.write(&source, 2 * ZONE + 8192, 2, 512);
    bench.write(&source, 3 * ZONE, 3, (ZONE - 65536) as usize);
    let target = bench.zoned("target", |_| ());
    let copied = bench.copy(&source, &target, &CopyOptions::default()).unwrap();
    assert_eq!(
        copied,
        CopiedZones::Filled {
            written: 2,
            finished: 0
        }
    );
    let zones = bench.zones(&target);
    assert_eq!(
        conditions(&zones),
        [NotWritePointer, Empty, Closed, Full, Empty, Empty, Empty, Empty]
    );
    assert_eq!(zones[2].wp, 2 * ZONE + 12288);
    assert_eq!(bench.compare(&source, &target, false, false).difference, None);
    assert!(matches!(
        bench.difference(&source, &target),
        Some(Difference::Zones { .. })
    ));
}

#[test]
fn zones_are_finished_where_more_would_be_active_than_may_be() {
    let bench = Bench::new();
    let source = bench.plain("source", ZONE * ZONES);
    for zone in 1..=5 {
        bench.write(&source, zone * ZONE, 1, 4096);
    }
    let target = bench.zoned("target", |_| ());
    let copied = bench.copy(&source, &target, &CopyOptions::default()).unwrap();
    assert_eq!(
        copied,
        CopiedZones::Filled {
            written: 5,
            finished: 5
        }
    );
    assert_eq!(bench.zones(&target)[1].condition, Condition::Full);
    bench.write(&target, 7 * ZONE, 1, 4096);
}

#[test]
fn data_that_no_zone_can_hold_is_refused() {
    let bench = Bench::new();
    let source = bench.plain("source", ZONE * ZONES);
    bench.write(&source, 3 * ZONE - 512, 1, 512);
    let target = bench.zoned("target", |_| ());
    let error = bench.copy(&source, &target, &CopyOptions::default()).unwrap_err();
    assert!(
        error.to_string().contains("zone 2 can be written only up to"),
        "{error}"
    );
    // In a conventional zone there is room.
    let source = bench.plain("other", ZONE * ZONES);
    bench.write(&source, ZONE - 512, 1, 512);
    bench.copy(&source, &target, &CopyOptions::default()).unwrap();
}

#[test]
fn zones_of_another_shape_and_small_targets_are_refused_before_anything_is_written() {
    let bench = Bench::new();
    let source = of_every_kind(&bench, "source", Model::HostManaged);
    for (name, change, message) in [
        (
            "size",
            (|options| {
                options.zone_size = Some(2 * ZONE);
                options.zone_capacity = None;
            }) as fn(&mut CreateOptions),
            "the zone size is 1048576 in the source and 2097152",
        ),
        (
            "capacity",
            |options| options.zone_capacity = None,
            "the zone capacity is",
        ),
        (
            "conventional",
            |options| options.conventional_zones = 2,
            "the number of conventional zones is 1 in the source and 2",
        ),
        (
            "small",
            |options| options.size = 7 * ZONE,
            "is smaller than the source",
        ),
        (
            "blocks",
            |options| options.block_size = 65536,
            "the zones do not fit",
        ),
    ] {
        let target = bench.zoned(name, change);
        let error = bench.copy(&source, &target, &CopyOptions::default()).unwrap_err();
        assert!(error.to_string().contains(message), "{name}: {error}");
        let zones = bench.zones(&target);
        assert!(zones.iter().all(|zone| zone.written_end == zone.start), "{name}");
    }
}

#[test]
fn comparisons_name_the_first_difference() {
    let bench = Bench::new();
    let a = of_every_kind(&bench, "a", Model::HostManaged);
    let b = bench.zoned("b", |_| ());
    bench.copy(&a, &b, &CopyOptions::default()).unwrap();
    assert_eq!(bench.compare(&a, &b, true, true).difference, None, "counters too");
    bench.write(&b, 512 << 10, 1, 4096);
    assert_eq!(
        bench.difference(&a, &b),
        None,
        "the same bytes were written once more"
    );
    assert!(matches!(
        bench.compare(&a, &b, true, true).difference,
        Some(Difference::Zone {
            zone: 0,
            what: "counters",
            ..
        })
    ));
    bench.write(&b, (512 << 10) + 4096, 7, 4096);
    assert_eq!(
        bench.difference(&a, &b),
        Some(Difference::Content {
            offset: (512 << 10) + 4096
        })
    );
    bench.write(&b, 2 * ZONE + 12288, 0, 4096);
    assert_eq!(
        bench.difference(&a, &b),
        Some(Difference::Zone {
            zone: 2,
            what: "written end",
            a: "12288".into(),
            b: "16384".into()
        })
    );
    bench.op(&b, ZoneOp::Finish, 1);
    assert_eq!(
        bench.difference(&a, &b),
        Some(Difference::Zone {
            zone: 1,
            what: "condition",
            a: "empty".into(),
            b: "full".into()
        })
    );
    let other = bench.zoned("other", |options| options.max_active = 3);
    assert_eq!(
        bench.difference(&a, &other),
        Some(Difference::Zones {
            what: "most active zones",
            a: "4".into(),
            b: "3".into()
        })
    );
}

#[test]
fn a_larger_image_is_the_same_if_what_it_has_more_is_zeros() {
    let bench = Bench::new();
    let (small, large) = (bench.plain("small", 4 << 20), bench.plain("large", 8 << 20));
    for device in [&small, &large] {
        bench.write(device, 1 << 20, 1, 4096);
    }
    for (a, b) in [(&small, &large), (&large, &small)] {
        let compared = bench.compare(a, b, false, true);
        assert_eq!((compared.sizes_differ, compared.difference), (true, None));
        assert_eq!(bench.compare(a, b, true, true).difference, Some(Difference::Size));
    }
    bench.write(&large, (6 << 20) + 1024, 1, 512);
    for (a, b) in [(&small, &large), (&large, &small)] {
        assert_eq!(
            bench.difference(a, b),
            Some(Difference::Content {
                offset: (6 << 20) + 1024
            })
        );
    }
}

#[test]
fn zones_in_memory_are_copied_as_well() {
    let bench = Bench::new();
    let source = of_every_kind(&bench, "source", Model::HostManaged);
    let memory = bench.graph(&format!(
        "driver=zoned,file.driver=memory,file.size={},zone.size={ZONE},zone.capacity={},zone.conventional_zones=1,\
         zone.max_open_zones=3,zone.max_active_zones=4",
        ZONE * ZONES,
        ZONE - 65536
    ));
    bench.copy(&source, &memory, &CopyOptions::default()).unwrap();
    assert_eq!(bench.difference(&source, &memory), None);
    bench.write(&memory, 3 * ZONE + 8192, 9, 4096);
    let back = bench.zoned("back", |_| ());
    bench.copy(&memory, &back, &CopyOptions::default()).unwrap();
    assert_eq!(bench.difference(&memory, &back), None);
    assert!(bench.difference(&source, &back).is_some());
}

#[test]
fn files_show_their_holes_and_zones_their_ends() {
    let bench = Bench::new();
    let device = of_every_kind(&bench, "source", Model::HostManaged);
    let map = |offset: u64, len: u64| bench.runtime.block_on(device.map(offset, len)).unwrap();
    let path: &Path = &bench.path("source");
    let data = map(2 * ZONE + 4096, ZONE);
    assert_eq!((data.len, data.data, data.zero), (8192, true, false));
    assert_eq!(data.offset, Some(2 * ZONE + 4096));
    assert_eq!(data.filename.as_deref(), path.to_str());
    // Above the written end, up to the next zone that has any data.
    let zeros = map(2 * ZONE + 12288, 4 * ZONE);
    assert_eq!((zeros.len, zeros.zero, zeros.offset), (ZONE - 12288, true, None));
    assert_eq!(map(ZONE, 512).len, 512);
    // Conventional zones are as the file is.
    assert_eq!(map(0, 8 * ZONE).len, 512 << 10);
    assert!(bench.runtime.block_on(device.map(8 * ZONE, 1)).is_err());
}
