//! `commit`, `rebase` and `check -r all` under kills and power cuts: at every moment the overlay reads as before, no pointer of
//! the base covers what is not there, and what is repaired of a snapshot is not lost.
//!
//! `ZBDKIT_CRASH_STATES=N` judges so many states of each history instead of a small share.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use zbdkit_block::{
    CreateOptions, Device, FileOptions, Graph, Host, OpenOptions, Qcow2CreateOptions, Repair, RunStateMode,
    ZnsOptions, ZoneOp, check, create_qcow2, tool,
};
use zbdkit_io::{IoBuf, Runtime};
use zbdkit_testkit::crash::choose::{Choose, Rng, mix};
use zbdkit_testkit::crash::disk::Disk;
use zbdkit_testkit::crash::host::{Behaviour, Machine, Recorded};
use zbdkit_testkit::crash::judge::View;
use zbdkit_testkit::crash::run::{drive, look_at};
use zbdkit_testkit::crash::suite::runtime;
use zbdkit_zone::{Condition, Model, ZoneInfo};

const ZONE: u64 = 64 << 10;
const BASE: &str = "/image/base.qcow2";
const OTHER: &str = "/image/other.qcow2";
const TOP: &str = "/image/top.qcow2";

fn states() -> u64 {
    match std::env::var("ZBDKIT_CRASH_STATES") {
        Ok(text) => text.parse().expect("a number"),
        Err(_) => 150,
    }
}

fn graph(path: &str) -> Graph {
    Graph::parse_options(&format!("driver=qcow2,file.driver=file,file.filename={path}")).unwrap()
}

async fn open(host: &Arc<dyn Host>, path: &str, no_backing: bool) -> Device {
    let options = OpenOptions {
        run_state: RunStateMode::Sync,
        lock_wait: Duration::ZERO,
        no_backing,
        ..OpenOptions::default()
    };
    let opened = graph(path).open(host, &options).await;
    opened.unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn image(path: &str, model: Model) -> Qcow2CreateOptions {
    let mut options = Qcow2CreateOptions::new(path, 8 * ZONE);
    options.layout.cluster_size = 4096;
    options.zones = Some(CreateOptions {
        model,
        zone_size: Some(ZONE),
        conventional_zones: 1,
        block_size: 512,
        max_active: 6,
        zns: match model {
            Model::HostManaged => ZnsOptions {
                zrwa_size: Some(16 << 10),
                extension_size: 640,
                ..ZnsOptions::default()
            },
            Model::HostAware => ZnsOptions::default(),
        },
        ..CreateOptions::new(path, 8 * ZONE)
    });
    options
}

/// Writes at a zone's pointer, bytes that say who wrote them and where.
async fn write(device: &Device, zone: u64, at: u64, len: u64, tag: u8) {
    let lane = device.lane(4);
    let offset = zone * ZONE + at;
    let bytes = (0..len)
        .map(|i| {
            if i % 2 == 0 {
                tag
            } else {
                ((offset + i) / 512) as u8
            }
        })
        .collect();
    device.write(&lane, IoBuf::from_vec(bytes), offset).await.unwrap();
}

async fn op(device: &Device, zone: u64, op: ZoneOp) {
    device.zone_op(&device.lane(4), op, zone * ZONE).await.unwrap();
}

async fn attach(device: &Device, zone: u64, tag: u8) {
    let (lane, bytes) = (device.lane(1), [tag; 640]);
    device
        .set_extension(&lane, zone * ZONE, &bytes, false)
        .await
        .unwrap();
}

/// A base with zones in several conditions, another one that has some of it differently, and an overlay over the first
/// that has gone on: written further, reset, reset and written less, written more, written in an area, given another extension, set read-only.
async fn make(host: &Arc<dyn Host>, model: Model) {
    for (path, tag) in [(BASE, 0xb0), (OTHER, 0xc0)] {
        create_qcow2(host, &image(path, model)).await.unwrap();
        let base = open(host, path, false).await;
        write(&base, 0, 0, 9 << 10, tag).await;
        write(&base, 1, 0, 20 << 10, 0xb0).await;
        write(&base, 2, 0, 12 << 10, tag).await;
        op(&base, 2, ZoneOp::Finish).await;
        write(&base, 3, 0, 16 << 10, 0xb0).await;
        write(&base, 4, 0, 16 << 10, tag).await;
        write(&base, 6, 0, 10 << 10, tag).await;
        if model == Model::HostManaged {
            op(&base, 5, ZoneOp::OpenZrwa).await;
            write(&base, 5, 9 << 10, 6 << 10, tag).await;
            attach(&base, 7, tag).await;
        }
        base.close().await.unwrap();
    }
    let mut overlay = Qcow2CreateOptions::new(TOP, 8 * ZONE);
    overlay.layout.cluster_size = 4096;
    overlay.layout.backing = Some(("base.qcow2".into(), Some("qcow2".into())));
    create_qcow2(host, &overlay).await.unwrap();
    let top = open(host, TOP, false).await;
    write(&top, 0, 5 << 10, 2 << 10, 0x10).await;
    write(&top, 1, 20 << 10, 11 << 10, 0x10).await;
    op(&top, 2, ZoneOp::Reset).await;
    op(&top, 3, ZoneOp::Reset).await;
    write(&top, 3, 0, 5 << 10, 0x10).await;
    op(&top, 4, ZoneOp::Reset).await;
    write(&top, 4, 0, 24 << 10, 0x10).await;
    write(&top, 5, 0, 3 << 10, 0x10).await;
    if model == Model::HostManaged {
        // Over some of what the base has there, and behind the area.
        write(&top, 5, 12 << 10, 8 << 10, 0x10).await;
        op(&top, 7, ZoneOp::Reset).await;
        attach(&top, 7, 0x10).await;
    }
    op(&top, 6, ZoneOp::SetReadOnly).await;
    top.close().await.unwrap();
}

async fn commit(host: &Arc<dyn Host>) {
    let top = open(host, TOP, true).await;
    let base = open(host, BASE, false).await;
    tool::commit(&[&top], &base, &|_, _| ()).await.unwrap();
    base.close().await.unwrap();
    tool::empty(&top).await.unwrap();
    top.close().await.unwrap();
}

async fn rebase(host: &Arc<dyn Host>, to: Option<&str>) {
    let top = open(host, TOP, false).await;
    let new = match to {
        Some(path) => Some(open(host, path, false).await),
        None => None,
    };
    tool::rebase(&top, new.as_ref(), &|_, _| ()).await.unwrap();
    let name = to.map(|path| (path, Some("qcow2")));
    tool::set_backing(&top, name).await.unwrap();
    if let Some(new) = new {
        new.close().await.unwrap();
    }
    top.close().await.unwrap();
}

async fn look(host: &Arc<dyn Host>, path: &str) -> View {
    let device = open(host, path, false).await;
    let view = look_at(&device).await.unwrap();
    device.close().await.unwrap();
    view
}

/// What was recorded of one tool at work.
struct History {
    runtime: Runtime,
    start: Disk,
    events: Vec<Recorded>,
    /// Top and base before it, which the top must be after it too.
    top: View,
    base: View,
}

impl History {
    fn record(model: Model, seed: u64, work: impl AsyncFnOnce(&Arc<dyn Host>)) -> History {
        History::of(seed, async |host| make(host, model).await, work)
    }

    fn of(
        seed: u64,
        make: impl AsyncFnOnce(&Arc<dyn Host>),
        work: impl AsyncFnOnce(&Arc<dyn Host>),
    ) -> History {
        let runtime = runtime();
        let machine = Machine::new(Disk::default(), Behaviour::default(), seed);
        let (top, base) = drive(&runtime, &machine, async {
            let host = machine.host();
            make(&host).await;
            (look(&host, TOP).await, look(&host, BASE).await)
        });
        let start = machine.disk();
        let machine = Machine::new(start.clone(), Behaviour::default(), seed);
        drive(&runtime, &machine, async { work(&machine.host()).await });
        History {
            runtime,
            start,
            events: machine.events(),
            top,
            base,
        }
    }

    /// What a crash at a random moment left.
    fn crashed(&self, rng: &mut Rng) -> (usize, bool, Machine) {
        let at = rng.below(self.events.len() as u64 + 1) as usize;
        let mut disk = self.start.clone();
        self.events[..at]
            .iter()
            .for_each(|recorded| disk.apply(&recorded.event));
        let power = rng.one_in(2);
        let left = if power {
            disk.power_cut(rng)
        } else {
            disk.kill(rng, false)
        };
        (at, power, Machine::new(left, Behaviour::default(), rng.word()))
    }

    fn judge(&self, seed: u64, judge: impl AsyncFn(&Arc<dyn Host>, &str)) {
        for number in 0..states() {
            let mut rng = Rng::biased(mix(seed, number));
            let (at, power, machine) = self.crashed(&mut rng);
            let crash = if power { "power cut" } else { "kill" };
            let what = format!("{crash} at event {at} of {}", self.events.len());
            drive(&self.runtime, &machine, judge(&machine.host(), &what));
        }
    }
}

fn same(a: &View, b: &View, what: &str) {
    for ((a, b), (x, y)) in a
        .zones
        .iter()
        .zip(&b.zones)
        .zip(a.contents.iter().zip(&b.contents))
    {
        assert_eq!(a, b, "{what}");
        assert!(x == y, "{what}: the contents of zone {} differ", a.zone);
    }
    assert!(a.extensions == b.extensions, "{what}: extensions differ");
}

fn written<'a>(zone: &ZoneInfo, view: &'a View) -> &'a [u8] {
    let contents = view.contents[zone.zone.0 as usize].as_deref().unwrap_or_default();
    &contents[..(zone.written_end - zone.start) as usize]
}

/// A zone that is written in order holds the beginning of what it held or of what it is to hold, never both or neither.
fn covered(base: &View, before: &View, after: &View, what: &str) {
    for zone in base
        .zones
        .iter()
        .filter(|zone| zone.condition != Condition::NotWritePointer)
    {
        let now = written(zone, base);
        let number = zone.zone.0 as usize;
        let begins = |view: &View| written(&view.zones[number], view).starts_with(now);
        assert!(
            begins(before) || begins(after),
            "{what}: zone {} of the base covers {} bytes that are neither the old nor the new ones",
            zone.zone,
            now.len()
        );
    }
}

#[test]
fn a_commit_may_be_cut_at_any_moment_and_repeated() {
    for (model, seed) in [
        (Model::HostManaged, 1),
        (Model::HostAware, 2),
        (Model::HostManaged, 3),
    ] {
        let history = History::record(model, seed, async |host| commit(host).await);
        let mut rng = Rng::new(seed);
        let again: Vec<bool> = (0..states()).map(|_| rng.one_in(6)).collect();
        let count = std::cell::Cell::new(0);
        history.judge(seed, async |host, what| {
            same(&look(host, TOP).await, &history.top, what);
            covered(&look(host, BASE).await, &history.base, &history.top, what);
            let number = count.replace(count.get() + 1);
            if again[number] {
                commit(host).await;
                same(&look(host, BASE).await, &history.top, what);
                same(&look(host, TOP).await, &history.top, what);
            }
        });
    }
}

#[test]
fn a_rebase_may_be_cut_at_any_moment() {
    for (to, seed) in [(Some(OTHER), 11), (None, 12)] {
        let history = History::record(Model::HostManaged, seed, async |host| rebase(host, to).await);
        history.judge(seed, async |host, what| {
            same(&look(host, TOP).await, &history.top, what);
        });
    }
}

/// Makes a snapshot of the base, and damages the extension that its last zone has there.
async fn make_damaged(host: &Arc<dyn Host>) {
    make(host, Model::HostManaged).await;
    let base = open(host, BASE, false).await;
    base.snapshot_create("then").await.unwrap();
    base.close().await.unwrap();
    let file = host.open(Path::new(BASE), &FileOptions::existing(false)).unwrap();
    let bytes = IoBuf::alloc(file.len().unwrap() as usize);
    file.read(bytes.clone(), 0).await.unwrap();
    // The image's own lies before the snapshot's.
    let last = bytes
        .to_vec()
        .windows(640)
        .rposition(|found| found == [0xb0; 640]);
    host.write_now(&file, &[0], last.unwrap() as u64).unwrap();
    file.datasync().await.unwrap();
}

/// Checks the base, and repairs all of it; what is said.
async fn repair(host: &Arc<dyn Host>, what: &str) -> Vec<String> {
    let options = OpenOptions {
        lock_wait: Duration::ZERO,
        ..OpenOptions::default()
    };
    let checked = check(host, &graph(BASE), &options, Repair::All, &mut |_, _| ()).await;
    let checked = checked.unwrap_or_else(|error| panic!("{what}: {error}"));
    let (report, zones) = (checked.report.unwrap(), checked.zones.unwrap());
    let said = [report.messages, zones.messages].concat();
    let wrong = report.corruptions + report.check_errors + report.leaks + zones.errors;
    assert_eq!(wrong, 0, "{what}: {said:?}");
    said
}

#[test]
fn a_repair_of_a_snapshots_table_may_be_cut_at_any_moment_and_repeated() {
    let history = History::of(21, make_damaged, async |host| {
        let said = repair(host, "at first").await;
        let dropped = |text: &String| {
            text.contains("snapshot 1, zone 7: its descriptor extension is damaged and dropped")
        };
        assert!(said.iter().any(dropped), "{said:?}");
    });
    history.judge(21, async |host, what| {
        repair(host, what).await;
        let base = open(host, BASE, false).await;
        let applied = base.snapshot_apply("then").await;
        applied.unwrap_or_else(|error| panic!("{what}: {error}"));
        base.close().await.unwrap();
        let mut view = look(host, BASE).await;
        assert_eq!(view.extensions[7], None, "{what}");
        // Which is all that the last zone had.
        view.zones[7] = history.base.zones[7];
        view.extensions[7] = history.base.extensions[7].clone();
        same(&view, &history.base, what);
    });
}
