//! Sequential writes and appends through the block layer against fio on the device, in pairs in one run.

use std::cell::Cell;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use zbdkit_block::{Device, ZoneOp};
use zbdkit_io::{IoBuf, Runtime, spawn};
use zbdkit_zone::{Geometry, ZoneNo};

const BLOCK: u64 = 4096;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Write,
    Append,
}

/// Measures and prints a table.
pub fn run(runtime: &Runtime, path: &Path, time: Duration, rounds: usize) -> Result<()> {
    let geometry = runtime.block_on(async { super::open(path).await?.limits().zoned.context("no zones") })?;
    println!(
        "4 KiB writes and appends in sequence, MiB/s: fio (io_uring, direct; or its own NVMe commands, which are writes) and \
         zbdkit by turns, medians of {rounds} rounds; ratios to fio in the same round, from the least to the most"
    );
    println!(
        "{:>6} {:>6} {:>8} {:>8} {:>8}   {:<18} {:<18}",
        "zones", "depth", "fio", "write", "append", "write/fio", "append/fio"
    );
    for zones in [1, 8] {
        for depth in [1, 32] {
            let ours = |way| {
                reset(runtime, path)?;
                runtime.block_on(measure(path, zones, depth, way, time))
            };
            let (mut theirs, mut writes, mut appends) = (Vec::new(), Vec::new(), Vec::new());
            // In turns, so that what the machine does meanwhile meets both.
            for _ in 0..rounds {
                writes.push(ours(Way::Write)?);
                reset(runtime, path)?;
                theirs.push(fio(path, &geometry, zones, depth, time)?);
                appends.push(ours(Way::Append)?);
            }
            println!(
                "{zones:>6} {depth:>6} {:>8.1} {:>8.1} {:>8.1}   {:<18} {:<18}",
                median(&theirs),
                median(&writes),
                median(&appends),
                ratios(&writes, &theirs),
                ratios(&appends, &theirs)
            );
        }
    }
    Ok(())
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// The median ratio of figures of the same round, and in which range all lie.
fn ratios(ours: &[f64], theirs: &[f64]) -> String {
    let ratios: Vec<f64> = ours
        .iter()
        .zip(theirs)
        .map(|(ours, theirs)| ours / theirs)
        .collect();
    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ratios.iter().copied().fold(0.0, f64::max);
    format!("{:.2} ({least:.2}-{most:.2})", median(&ratios))
}

/// MiB a second of fio with `zones` jobs, which share the depth.
fn fio(path: &Path, geometry: &Geometry, zones: u32, depth: u32, time: Duration) -> Result<f64> {
    let mut fio = Command::new("fio");
    fio.arg("--output-format=json");
    match is_namespace(path) {
        false => fio.args(["--ioengine=io_uring", "--direct=1"]),
        // One queue of the drive for each job: where a job changes its processor in between, its writes pass each other.
        true => fio
            .args(["--ioengine=io_uring_cmd", "--cmd_type=nvme"])
            .arg(format!("--cpus_allowed=0-{}", processors() - 1))
            .arg("--cpus_allowed_policy=split"),
    };
    fio.args(["--zonemode=zbd", "--rw=write", "--thread=1"])
        .args(["--group_reporting=1", "--time_based=1"]);
    fio.arg(format!("--bs={BLOCK}"))
        .arg(format!("--runtime={}", time.as_secs()));
    fio.arg(format!("--iodepth={}", depth.div_ceil(zones)));
    fio.arg(format!("--filename={}", path.display()));
    for n in 0..zones {
        let zone = ZoneNo(geometry.nr_conventional() + n);
        fio.arg(format!("--name=zone{n}"))
            .arg(format!("--offset={}", geometry.start(zone)))
            .arg(format!("--size={}", geometry.zone_size()));
    }
    let output = fio.output().context("fio")?;
    ensure!(
        output.status.success(),
        "fio: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let json = output.stdout.iter().position(|byte| *byte == b'{').unwrap_or(0);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout[json..])?;
    let bytes = report["jobs"][0]["write"]["bw_bytes"].as_f64();
    Ok(bytes.context("fio says no bandwidth")? / f64::from(1 << 20))
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Resets all zones; blkzone wants the device for itself, of which the ring lets go in its own time.
fn reset(runtime: &Runtime, path: &Path) -> Result<()> {
    let (tool, arguments) = match is_namespace(path) {
        true => ("nvme", &["zns", "reset-zone", "--select-all"][..]),
        false => ("blkzone", &["reset"][..]),
    };
    for _ in 0..250 {
        let output = Command::new(tool).args(arguments).arg(path).output()?;
        if output.status.success() {
            return Ok(());
        }
        runtime.block_on(zbdkit_io::sleep(Duration::from_millis(20)));
    }
    bail!("{tool} does not reset the zones");
}

/// Whether it is the character device of an NVMe namespace.
fn is_namespace(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().starts_with("ng")
}

/// MiB a second through the block layer: `depth` requests under way, dealt over `zones` zones.
async fn measure(path: &Path, zones: u32, depth: u32, way: Way, time: Duration) -> Result<f64> {
    let device = super::open(path).await?;
    let geometry = device.limits().zoned.context("no zones")?;
    let end = Instant::now() + time;
    let begun = Instant::now();
    let bytes = Rc::new(Cell::new(0u64));
    let running = Rc::new(Cell::new(zones));
    let failed = Rc::new(Cell::new(false));
    for n in 0..zones {
        let stream = Stream {
            device: device.clone(),
            zone: geometry.start(ZoneNo(geometry.nr_conventional() + n)),
            capacity: geometry.zone_capacity(),
            way,
            end,
            next: Cell::new(0),
            under_way: Cell::new(0),
            bytes: bytes.clone(),
            failed: failed.clone(),
        };
        let running = running.clone();
        spawn(async move {
            Rc::new(stream).run(depth.div_ceil(zones)).await;
            running.set(running.get() - 1);
        });
    }
    while running.get() > 0 {
        zbdkit_io::sleep(Duration::from_millis(20)).await;
    }
    let seconds = begun.elapsed().as_secs_f64();
    ensure!(!failed.get(), "a write failed");
    device.close().await?;
    Ok(bytes.get() as f64 / seconds / f64::from(1 << 20))
}

/// One zone, written from its start to its end, reset, and again.
struct Stream {
    device: Device,
    zone: u64,
    capacity: u64,
    way: Way,
    end: Instant,
    next: Cell<u64>,
    under_way: Cell<u32>,
    bytes: Rc<Cell<u64>>,
    failed: Rc<Cell<bool>>,
}

impl Stream {
    async fn run(self: Rc<Self>, depth: u32) {
        let lane = self.device.lane(depth);
        while Instant::now() < self.end && !self.failed.get() {
            self.next.set(0);
            self.under_way.set(depth);
            for _ in 0..depth {
                spawn(self.clone().worker());
            }
            while self.under_way.get() > 0 {
                zbdkit_io::sleep(Duration::from_micros(500)).await;
            }
            let reset = self.device.zone_op(&lane, ZoneOp::Reset, self.zone).await;
            self.failed.set(self.failed.get() || reset.is_err());
        }
    }

    async fn worker(self: Rc<Self>) {
        let lane = self.device.lane(1);
        let buf = IoBuf::alloc(BLOCK as usize);
        while self.next.get() + BLOCK <= self.capacity && Instant::now() < self.end && !self.failed.get() {
            let at = self.zone + self.next.get();
            self.next.set(self.next.get() + BLOCK);
            let done = match self.way {
                Way::Write => self.device.write(&lane, buf.clone(), at).await,
                Way::Append => self.device.append(&lane, buf.clone(), self.zone).await.map(drop),
            };
            if let Err(error) = done {
                println!("{error}");
                self.failed.set(true);
            }
            self.bytes.set(self.bytes.get() + BLOCK);
        }
        self.under_way.set(self.under_way.get() - 1);
    }
}
