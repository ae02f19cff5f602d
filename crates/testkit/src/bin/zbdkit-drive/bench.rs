//! Sequential writes and appends through the block layer against fio on the device, in pairs in one run.

use std::cell::Cell;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
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
pub fn run(runtime: &Runtime, path: &Path, time: Duration) -> Result<()> {
    println!("4 KiB writes in sequence; MiB/s, zbdkit against fio (io_uring, direct)");
    println!(
        "{:>6} {:>6} {:>10} {:>10} {:>10} {:>8} {:>8}",
        "zones", "depth", "fio", "write", "append", "w/fio", "a/fio"
    );
    for zones in [1, 8] {
        for depth in [1, 32] {
            let ours = |way| runtime.block_on(measure(path, zones, depth, way, time));
            // In turns, so that what the machine does meanwhile meets both.
            let mut sums = [0.0; 3];
            for _ in 0..2 {
                sums[0] += fio(path, zones, depth, time)? / 2.0;
                sums[1] += ours(Way::Write)? / 2.0;
                sums[2] += ours(Way::Append)? / 2.0;
            }
            let [fio, write, append] = sums;
            println!(
                "{zones:>6} {depth:>6} {fio:>10.1} {write:>10.1} {append:>10.1} {:>8.2} {:>8.2}",
                write / fio,
                append / fio
            );
        }
    }
    Ok(())
}

/// MiB a second of fio with `zones` jobs, which share the depth.
fn fio(path: &Path, zones: u32, depth: u32, time: Duration) -> Result<f64> {
    reset(path)?;
    let geometry = kernel_geometry(path)?;
    let mut fio = Command::new("fio");
    fio.arg("--output-format=json")
        .args([
            "--ioengine=io_uring",
            "--direct=1",
            "--zonemode=zbd",
            "--rw=write",
            "--thread=1",
        ])
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

fn reset(path: &Path) -> Result<()> {
    let status = Command::new("blkzone").arg("reset").arg(path).status()?;
    ensure!(status.success(), "blkzone reset");
    Ok(())
}

fn kernel_geometry(path: &Path) -> Result<Geometry> {
    let runtime = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                let runtime = super::runtime()?;
                runtime.block_on(async {
                    let device = super::open(path).await?;
                    device.limits().zoned.context("no zones")
                })
            })
            .join()
    });
    runtime.map_err(|_| anyhow::anyhow!("a panic"))?
}

/// MiB a second through the block layer: `depth` requests under way, dealt over `zones` zones.
async fn measure(path: &Path, zones: u32, depth: u32, way: Way, time: Duration) -> Result<f64> {
    reset(path)?;
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
