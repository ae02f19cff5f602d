//! The conformance suites on every backing, and the fault files that tests build on.

use std::path::Path;
use std::sync::Arc;

use zbdkit_block::{
    CreateOptions, Device, Error, Graph, Host, OpenOptions, OsHost, Qcow2CreateOptions, Qcow2Layout,
    ZnsOptions, check, create, create_qcow2,
};
use zbdkit_io::{Backend, IoBuf, Runtime, RuntimeOptions, spawn, yield_now};
use zbdkit_qcow2::Repair;
use zbdkit_testkit::conformance;
use zbdkit_testkit::fault::{Action, FaultHost, OpKind, Rule};

const ENOSPC: i32 = 28;
const EOPNOTSUPP: i32 = 95;

fn runtime(backend: Backend) -> Option<Runtime> {
    match Runtime::new(RuntimeOptions {
        backend,
        ..RuntimeOptions::default()
    }) {
        Ok(runtime) => Some(runtime),
        Err(error) => {
            println!("SKIPPED: {backend:?} is not to be had here: {error}");
            None
        }
    }
}

fn image(path: &Path) -> CreateOptions {
    CreateOptions {
        zone_size: Some(1 << 20),
        zone_capacity: Some(768 << 10),
        conventional_zones: 2,
        max_open: Some(3),
        max_active: 5,
        max_append: Some(64 << 10),
        zns: ZnsOptions {
            zrwa_size: Some(64 << 10),
            zrwa_granularity: Some(8192),
            max_zrwa: Some(2),
            extension_size: 192,
        },
        ..CreateOptions::new(path, 12 << 20)
    }
}

fn on_both_backends(test: impl Fn(&Runtime)) {
    for backend in [Backend::Threads, Backend::IoUring] {
        if let Some(runtime) = runtime(backend) {
            test(&runtime);
        }
    }
}

async fn conforms(device: &Device) {
    if let Err(broken) = conformance::run(device).await {
        panic!("{broken}");
    }
}

#[test]
fn memory_conforms() {
    on_both_backends(|runtime| {
        runtime.block_on(async {
            let graph = Graph::parse(
                "driver=zoned,file.driver=memory,file.size=12M,zone.size=1M,zone.capacity=768k,\
                 zone.conventional_zones=2,zone.max_open_zones=3,zone.max_active_zones=5,zone.max_append_bytes=64k,\
                 zone.zrwa_size=64k,zone.max_zrwa=2,zone.descr_ext_size=16320",
            );
            let host: Arc<dyn Host> = Arc::new(OsHost);
            let device = graph.unwrap().open(&host, &OpenOptions::default()).await.unwrap();
            conforms(&device).await;
        });
    });
}

#[test]
fn a_host_aware_device_conforms() {
    on_both_backends(|runtime| {
        runtime.block_on(async {
            let graph = Graph::parse(
                "driver=zoned,file.driver=memory,file.size=12M,zone.size=1M,zone.mode=host-aware,\
                 zone.conventional_zones=2,zone.max_append_bytes=64k",
            );
            let host: Arc<dyn Host> = Arc::new(OsHost);
            let device = graph.unwrap().open(&host, &OpenOptions::default()).await.unwrap();
            conforms(&device).await;
        });
    });
}

fn raw_conforms(direct: bool) {
    // Direct I/O needs a file system that has it; the build's own directory is on one more often than /tmp.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    on_both_backends(|runtime| {
        let path = dir
            .path()
            .join(format!("{}.raw", runtime.backend().to_string().len()));
        let host: Arc<dyn Host> = Arc::new(OsHost);
        runtime.block_on(async {
            create(&host, &image(&path)).await.unwrap();
            let options = OpenOptions {
                direct,
                ..OpenOptions::default()
            };
            let opened = Graph::from_path(&path).open(&host, &options).await;
            let device = match opened {
                Err(error) if direct && error.to_string().contains("Invalid argument") => {
                    println!("SKIPPED: O_DIRECT is refused on {}", dir.path().display());
                    return;
                }
                opened => opened.unwrap(),
            };
            conforms(&device).await;
            device.close().await.unwrap();
        });
    });
}

#[test]
fn raw_with_a_sidecar_conforms() {
    raw_conforms(false);
}

#[test]
fn raw_with_a_sidecar_conforms_with_direct_io() {
    raw_conforms(true);
}

/// A qcow2 image of this layout, with zones of `zone_size` bytes, over `base` if there is one.
async fn qcow2(path: &Path, layout: Qcow2Layout, zone_size: u64, base: Option<&Path>) -> Arc<dyn Host> {
    let host: Arc<dyn Host> = Arc::new(OsHost);
    let mut zones = image(path);
    zones.size = 12 * zone_size;
    zones.zone_size = Some(zone_size);
    zones.zone_capacity = Some(zone_size / 4 * 3);
    let mut options = Qcow2CreateOptions::new(path, zones.size);
    options.layout = layout;
    match base {
        None => options.zones = Some(zones),
        Some(base) => {
            let name = base.file_name().unwrap().to_str().unwrap();
            options.layout.backing = Some((name.to_owned(), Some("qcow2".into())));
            options.size = None;
        }
    }
    create_qcow2(&host, &options).await.unwrap();
    host
}

/// The image conforms, also after it was closed and opened again, and nothing in it is damaged or lost.
async fn qcow2_conforms(host: &Arc<dyn Host>, path: &Path, options: &OpenOptions) {
    for _ in 0..2 {
        let opened = Graph::from_path(path).open(host, options).await;
        let device = match opened {
            Err(error) if options.direct && error.to_string().contains("Invalid argument") => {
                println!("SKIPPED: O_DIRECT is refused for {}", path.display());
                return;
            }
            opened => opened.unwrap(),
        };
        assert_eq!(device.driver(), "qcow2");
        conforms(&device).await;
        device.close().await.unwrap();
    }
    let graph = Graph::from_path(path);
    let checked = check(host, &graph, options, Repair::None, &mut |_, _| {})
        .await
        .unwrap();
    let (report, zones) = (checked.report.unwrap(), checked.zones.unwrap());
    assert_eq!(
        (
            report.corruptions,
            report.check_errors,
            report.leaks,
            zones.errors
        ),
        (0, 0, 0, 0),
        "{report:?} {zones:?}"
    );
}

fn layouts() -> impl Iterator<Item = (&'static str, Qcow2Layout, u64)> {
    let layout = |cluster_size| Qcow2Layout {
        cluster_size,
        ..Qcow2Layout::default()
    };
    let subclusters = Qcow2Layout {
        extended_l2: true,
        ..layout(16384)
    };
    let external = Qcow2Layout {
        data_file: Some("external.data".into()),
        ..layout(65536)
    };
    [
        ("512", layout(512), 1 << 20),
        ("4k", layout(4096), 1 << 20),
        ("64k", layout(65536), 1 << 20),
        ("2m", layout(2 << 20), 2 << 20),
        ("subclusters", subclusters, 1 << 20),
        ("external", external, 1 << 20),
    ]
    .into_iter()
}

#[test]
fn qcow2_conforms_with_all_sizes_of_clusters() {
    on_both_backends(|runtime| {
        for (name, layout, zone_size) in layouts() {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(name).with_extension("qcow2");
            runtime.block_on(async {
                let host = qcow2(&path, layout, zone_size, None).await;
                qcow2_conforms(&host, &path, &OpenOptions::default()).await;
            });
        }
    });
}

#[test]
fn qcow2_conforms_with_direct_io() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    on_both_backends(|runtime| {
        for (name, layout, zone_size) in layouts().filter(|(name, ..)| ["4k", "64k"].contains(name)) {
            let path = dir.path().join(format!("{}-{name}.qcow2", runtime.backend()));
            runtime.block_on(async {
                let host = qcow2(&path, layout, zone_size, None).await;
                let options = OpenOptions {
                    direct: true,
                    ..OpenOptions::default()
                };
                qcow2_conforms(&host, &path, &options).await;
            });
        }
    });
}

#[test]
fn a_qcow2_overlay_over_a_used_base_conforms() {
    on_both_backends(|runtime| {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (dir.path().join("base.qcow2"), dir.path().join("over.qcow2"));
        runtime.block_on(async {
            let host = qcow2(&base, Qcow2Layout::default(), 1 << 20, None).await;
            let device = Graph::from_path(&base)
                .open(&host, &OpenOptions::default())
                .await
                .unwrap();
            let lane = device.lane(4);
            for at in [0, ZONE, ZONE + 4096] {
                device.write(&lane, block(0x33), at).await.unwrap();
            }
            drop(lane);
            device.close().await.unwrap();
            let before = std::fs::read(&base).unwrap();
            let host = qcow2(&path, Qcow2Layout::default(), 1 << 20, Some(&base)).await;
            qcow2_conforms(&host, &path, &OpenOptions::default()).await;
            assert_eq!(std::fs::read(&base).unwrap(), before, "the base was changed");
        });
    });
}

/// An image on files with rules before them; the rules are found by the path of the data file.
async fn faulty(dir: &Path) -> (Device, FaultHost) {
    let host = FaultHost::new(Arc::new(OsHost));
    let path = dir.join("faulty.raw");
    let shared: Arc<dyn Host> = Arc::new(host.clone());
    create(&shared, &image(&path)).await.unwrap();
    let device = Graph::from_path(&path)
        .open(&shared, &OpenOptions::default())
        .await
        .unwrap();
    (device, host)
}

fn block(byte: u8) -> IoBuf {
    let buf = IoBuf::alloc(4096);
    buf.fill(0..4096, byte);
    buf
}

const ZONE: u64 = 2 << 20;

#[test]
fn a_device_behind_fault_files_without_rules_conforms() {
    let dir = tempfile::tempdir().unwrap();
    runtime(Backend::Threads).unwrap().block_on(async {
        let (device, _host) = faulty(dir.path()).await;
        conforms(&device).await;
        device.close().await.unwrap();
    });
}

#[test]
fn a_failed_write_fails_alone_and_the_zone_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    runtime(Backend::Threads).unwrap().block_on(async {
        let (device, host) = faulty(dir.path()).await;
        let faults = host.faults(dir.path().join("faulty.raw"));
        faults.add(Rule::nth(OpKind::Write, 1, Action::Fail(ENOSPC)).within(ZONE..ZONE + (1 << 20)));
        let lane = device.lane(4);
        device.write(&lane, block(1), ZONE).await.unwrap();
        let failed = device.write(&lane, block(2), ZONE + 4096).await;
        assert!(
            matches!(failed, Err(Error::Io { errno: ENOSPC, .. })),
            "{failed:?}"
        );
        assert_eq!(faults.taken(), 1);
        device.write(&lane, block(3), ZONE + 4096).await.unwrap();
        device.flush(&lane).await.unwrap();
        drop(lane);
        device.close().await.unwrap();
    });
}

#[test]
fn the_first_mark_fails_alone_without_room_for_it_and_later_ones_need_none() {
    let dir = tempfile::tempdir().unwrap();
    runtime(Backend::Threads).unwrap().block_on(async {
        let (device, host) = faulty(dir.path()).await;
        let sidecar = zbdkit_block::default_sidecar(&dir.path().join("faulty.raw"));
        let len = || std::fs::metadata(&sidecar).unwrap().len();
        let behind = len();
        let faults = host.faults(&sidecar);
        let lane = device.lane(4);
        faults.add(Rule::nth(OpKind::Allocate, 0, Action::Fail(ENOSPC)));
        // Where the file system knows no such thing, zeros are written.
        faults.add(Rule::every(OpKind::Allocate, Action::Fail(EOPNOTSUPP)));
        let no_room = Rule::nth(OpKind::Write, 0, Action::Fail(ENOSPC));
        faults.add(no_room.within(behind + (64 << 10)..behind + (128 << 10)));
        for taken in [1, 3] {
            let failed = device.mark_uncorrectable(&lane, ZONE, 4096).await;
            assert!(
                matches!(failed, Err(Error::Io { errno: ENOSPC, .. })),
                "{failed:?}"
            );
            assert_eq!(faults.taken(), taken);
            device.flush(&lane).await.unwrap();
        }
        device.mark_uncorrectable(&lane, ZONE, 4096).await.unwrap();
        assert_eq!(faults.taken(), 4);
        assert_eq!(len(), behind + (128 << 10));
        device.mark_uncorrectable(&lane, ZONE + 4096, 4096).await.unwrap();
        assert_eq!(faults.taken(), 4);
        drop(lane);
        device.close().await.unwrap();
    });
}

#[test]
fn writes_of_a_zone_are_acknowledged_in_order_whatever_completes_first() {
    let dir = tempfile::tempdir().unwrap();
    runtime(Backend::Threads).unwrap().block_on(async {
        let (device, host) = faulty(dir.path()).await;
        let faults = host.faults(dir.path().join("faulty.raw"));
        faults.add(Rule::every(OpKind::Write, Action::HoldAnswer));
        let order = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
        for n in 0..3u64 {
            let (device, order) = (device.clone(), order.clone());
            spawn(async move {
                let lane = device.lane(1);
                device
                    .write(&lane, block(n as u8), ZONE + n * 4096)
                    .await
                    .unwrap();
                order.borrow_mut().push(n);
            });
        }
        faults.until_held(3).await;
        assert!(faults.release(2), "the youngest first");
        assert!(faults.release(1));
        for _ in 0..100 {
            yield_now().await;
        }
        assert_eq!(*order.borrow(), [0u64; 0], "an earlier write is still in flight");
        faults.release_all();
        while order.borrow().len() < 3 {
            yield_now().await;
        }
        let written = device.engine().unwrap().info(zbdkit_zone::ZoneNo(2)).written_end;
        assert_eq!(written, ZONE + 3 * 4096);
        faults.clear();
        device.close().await.unwrap();
    });
}

#[test]
fn a_reset_waits_for_writes_in_flight() {
    let dir = tempfile::tempdir().unwrap();
    runtime(Backend::Threads).unwrap().block_on(async {
        let (device, host) = faulty(dir.path()).await;
        let faults = host.faults(dir.path().join("faulty.raw"));
        faults.add(Rule::nth(OpKind::Write, 0, Action::Hold));
        let (wrote, reset) = (
            std::rc::Rc::new(std::cell::Cell::new(false)),
            std::rc::Rc::new(std::cell::Cell::new(false)),
        );
        let (one, done) = (device.clone(), wrote.clone());
        spawn(async move {
            one.write(&one.lane(1), block(1), ZONE).await.unwrap();
            done.set(true);
        });
        faults.until_held(1).await;
        let (one, done) = (device.clone(), reset.clone());
        // Something must be there for the reset to be one.
        spawn(async move {
            one.zone_op(&one.lane(1), zbdkit_block::ZoneOp::Reset, ZONE)
                .await
                .unwrap();
            done.set(true);
        });
        for _ in 0..100 {
            yield_now().await;
        }
        assert!(!reset.get() && !wrote.get(), "neither can be over");
        faults.release_all();
        while !(reset.get() && wrote.get()) {
            yield_now().await;
        }
        assert_eq!(
            device.engine().unwrap().info(zbdkit_zone::ZoneNo(2)).written_end,
            ZONE
        );
        device.close().await.unwrap();
    });
}

#[test]
fn a_failed_sync_is_final_until_the_image_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    runtime(Backend::Threads).unwrap().block_on(async {
        let (device, host) = faulty(dir.path()).await;
        let lane = device.lane(4);
        device.write(&lane, block(1), ZONE).await.unwrap();
        host.faults(dir.path().join("faulty.raw"))
            .add(Rule::nth(OpKind::Sync, 0, Action::Fail(ENOSPC)));
        device.flush(&lane).await.unwrap_err();
        for _ in 0..2 {
            let later = device.flush(&lane).await;
            assert!(matches!(later, Err(Error::Epoch { errno: ENOSPC })), "{later:?}");
        }
        device.write(&lane, block(2), ZONE + 4096).await.unwrap_err();
        drop(lane);
        drop(device);
        let shared: Arc<dyn Host> = Arc::new(host);
        let path = dir.path().join("faulty.raw");
        let device = Graph::from_path(&path)
            .open(&shared, &OpenOptions::default())
            .await
            .unwrap();
        assert!(
            device
                .notices()
                .iter()
                .any(|notice| notice.contains("may be lost")),
            "{:?}",
            device.notices()
        );
        conforms(&device).await;
        device.close().await.unwrap();
    });
}
