//! zbdkit-bench: zbdkit against qemu-storage-daemon and against the file itself, with one client; and qcow2 images
//! against those of qemu-storage-daemon and against raw ones.
//!
//! Targets take turns in each round, so that what the machine does besides hits all of them alike;
//! the table shows medians, and medians of the ratios within a round. It measures and flags, it does
//! not judge: the exit status says only whether it could measure.

mod direct;
mod formats;
mod load;
mod report;
mod servers;
mod vhost;
mod workload;

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use zbdkit_testkit::client::loopback::{Loopback, NullDevice};
use zbdkit_testkit::client::peer::QemuStorageDaemon;

use direct::DirectTarget;
use formats::Formats;
use load::Load;
use report::{DIRECT, PEER, Row, ZBDKIT, table};
use servers::{Format, Zbdkit};
use vhost::{Manner, VhostTarget, Wait};
use workload::{Geometry, Kind, SECTOR, Sample, Workload};

/// Benchmark zbdkit's vhost-user-blk door against qemu-storage-daemon and bare io_uring.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The zbdkit program; it is left out, with a note, if it is not there
    #[arg(long, default_value = "target/release/zbdkit")]
    zbdkit: PathBuf,
    /// Further argument for `zbdkit serve`; may be given several times
    #[arg(long, allow_hyphen_values = true)]
    serve_arg: Vec<String>,
    /// Directory of the images and sockets, on tmpfs unless the disk is what you measure
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// Size of the images in MiB
    #[arg(long, default_value_t = 1024)]
    size: u64,
    /// Zone size in MiB
    #[arg(long, default_value_t = 64)]
    zone_size: u64,
    /// Rounds; each measures every target once for each row
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Measure a round again, up to so many times, while other processes are busy
    #[arg(long, default_value_t = 2)]
    retries: u32,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Queues, each with its own client thread (io_uring on the file always has one)
    #[arg(long, default_value_t = 1)]
    queues: u16,
    /// Block sizes in KiB
    #[arg(long, value_delimiter = ',', default_value = "4,128")]
    blocks: Vec<u32>,
    /// Requests in flight on each queue
    #[arg(long, value_delimiter = ',', default_value = "1,32")]
    depths: Vec<u32>,
    /// Only these kinds of rows
    #[arg(
        long,
        value_delimiter = ',',
        value_enum,
        default_value = "read,write,append,fresh,full,allocation"
    )]
    only: Vec<RowKind>,
    /// Sizes in GiB of the sparse images of the allocation rows
    #[arg(long, value_delimiter = ',', default_value = "1,16,128,1024")]
    sparse: Vec<u64>,
    /// How the client waits for completions
    #[arg(long, value_enum, default_value = "poll")]
    wait: Wait,
    /// Completions that the client waits for before it submits again
    #[arg(long, default_value_t = 1)]
    batch: u32,
    /// Do not negotiate EVENT_IDX
    #[arg(long)]
    no_event_idx: bool,
    /// What the peer and io_uring write to: blocks that are allocated, or holes
    #[arg(long, value_enum, default_value = "auto")]
    base: Base,
    /// Measure the client alone, against a server in this process that completes everything at once
    #[arg(long)]
    client_limit: bool,
    /// Print JSON instead of the table
    #[arg(long)]
    json: bool,
}

/// Processors that others may use before a round counts as disturbed.
const QUIET: f64 = 0.1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RowKind {
    /// Random reads, raw images
    Read,
    /// Sequential writes, raw images
    Write,
    /// Zone appends, raw images
    Append,
    /// Sequential writes into new images, qcow2
    Fresh,
    /// Random reads of full images, qcow2
    Full,
    /// Writes all over new sparse images of growing size, qcow2
    Allocation,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Base {
    /// As zbdkit's image is after a reset; without zbdkit, allocated
    Auto,
    Allocated,
    Holes,
}

enum Target {
    Vhost(Box<VhostTarget>),
    Direct(DirectTarget),
}

impl Target {
    fn measure(&mut self, workload: Workload, seed: u64, time: Duration) -> Result<Sample> {
        match self {
            Target::Vhost(target) => target.measure(workload, seed, time),
            Target::Direct(target) => target.measure(workload, seed, time),
        }
    }
}

/// All targets, and the servers that they need. Fields are dropped in this order.
struct Bench {
    targets: Vec<(String, Target)>,
    zbdkit: Option<Zbdkit>,
    peers: Vec<QemuStorageDaemon>,
    _dir: tempfile::TempDir,
    notes: Vec<String>,
    measured: u64,
    /// Rounds that were not quiet, however often tried.
    disturbed: u32,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let geometry = Geometry {
        size: args.size << 20,
        zone_size: args.zone_size << 20,
    };
    ensure!(
        args.zone_size > 0 && args.size % args.zone_size == 0,
        "the size must be a number of zones"
    );
    let blocks_fit = args
        .blocks
        .iter()
        .all(|b| *b > 0 && b % 4 == 0 && *b <= vhost::MAX_BLOCK / 1024);
    ensure!(blocks_fit, "block sizes are multiples of 4 KiB up to 128");
    if args.client_limit {
        return client_limit(&args, geometry);
    }
    let mut notes = Vec::new();
    let raw = raw_rows(&args, geometry, &mut notes)?;
    let qcow2 = qcow2_rows(&args, geometry, &mut notes)?;
    if args.json {
        let value = serde_json::json!({ "notes": notes, "rows": raw, "qcow2": qcow2 });
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    let tables = [table(&raw), table(&qcow2)];
    let tables: Vec<_> = tables.iter().filter(|table| !table.is_empty()).cloned().collect();
    print!("{}", tables.join("\n"));
    notes.iter().for_each(|note| println!("{note}"));
    Ok(())
}

fn disturbed(rounds: u32) -> Option<String> {
    (rounds > 0)
        .then(|| format!("DISTURBED: in {rounds} rounds other processes used over {QUIET} processors."))
}

/// Raw images, and the file itself.
fn raw_rows(args: &Args, geometry: Geometry, notes: &mut Vec<String>) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    if workloads(args, true).is_empty() {
        return Ok(rows);
    }
    let mut bench = Bench::start(args, geometry)?;
    for workload in workloads(args, bench.zbdkit.is_some()) {
        eprintln!("measuring {} ...", workload.name());
        rows.push(bench.row(workload, args)?);
    }
    notes.append(&mut bench.notes);
    notes.extend(disturbed(bench.disturbed));
    Ok(rows)
}

/// qcow2 images.
fn qcow2_rows(args: &Args, geometry: Geometry, notes: &mut Vec<String>) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let kinds = [RowKind::Fresh, RowKind::Full, RowKind::Allocation];
    if !args.zbdkit.exists() || !kinds.iter().any(|kind| args.only.contains(kind)) {
        return Ok(rows);
    }
    let dir = tempfile::Builder::new()
        .prefix("zbdkit-bench")
        .tempdir_in(&args.dir)?;
    let peer = formats::peer();
    if let Err(why) = &peer {
        notes.push(format!("No peer for qcow2: {why}."));
    }
    let mut bench = Formats {
        zbdkit: &args.zbdkit,
        serve: &args.serve_arg,
        peer: peer.ok(),
        dir: dir.path(),
        queues: args.queues,
        manner: manner(args),
        rounds: args.rounds,
        retries: args.retries,
        time: Duration::from_secs_f64(args.seconds),
        quiet: QUIET,
        disturbed: 0,
        measured: 0,
    };
    if args.only.contains(&RowKind::Fresh) {
        for (block, goal) in [(4 << 10, 1.5), (128 << 10, 1.2)] {
            rows.push(bench.fresh(geometry, block, 32, goal)?);
        }
    }
    if args.only.contains(&RowKind::Full) {
        for block in &args.blocks {
            for depth in &args.depths {
                rows.push(bench.read(geometry, block << 10, *depth, 1.2)?);
            }
        }
    }
    if args.only.contains(&RowKind::Allocation) {
        for size in &args.sparse {
            rows.push(bench.spread(size << 30)?);
        }
    }
    notes.extend(disturbed(bench.disturbed));
    Ok(rows)
}

fn manner(args: &Args) -> Manner {
    Manner {
        wait: args.wait,
        batch: args.batch,
        event_idx: !args.no_event_idx,
    }
}

/// What the client can do when the server costs nothing.
fn client_limit(args: &Args, geometry: Geometry) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("null.sock");
    let _server = Loopback::start(
        &socket,
        NullDevice {
            capacity: geometry.size / SECTOR,
        },
        false,
    )?;
    let manner = manner(args);
    let mut target = VhostTarget::connect(&socket, geometry, args.queues, manner)?;
    for workload in workloads(args, false)
        .into_iter()
        .filter(|w| w.kind == Kind::RandomRead)
    {
        let sample = target.measure_unverified(workload, Duration::from_secs_f64(args.seconds))?;
        println!("{:<24} {:>10.0}", workload.name(), sample.iops);
    }
    Ok(())
}

/// Reads first: they need the device as it was filled.
fn workloads(args: &Args, append: bool) -> Vec<Workload> {
    let mut kinds = vec![];
    for (row, kind) in [
        (RowKind::Read, Kind::RandomRead),
        (RowKind::Write, Kind::SequentialWrite),
        (RowKind::Append, Kind::Append),
    ] {
        if args.only.contains(&row) && (kind != Kind::Append || append) {
            kinds.push(kind);
        }
    }
    let mut workloads = Vec::new();
    for kind in kinds {
        for &block in &args.blocks {
            for &depth in &args.depths {
                workloads.push(Workload {
                    kind,
                    block: block << 10,
                    depth,
                });
            }
        }
    }
    workloads
}

impl Bench {
    fn start(args: &Args, geometry: Geometry) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("zbdkit-bench")
            .tempdir_in(&args.dir)?;
        let manner = manner(args);
        let mut notes = Vec::new();
        let mut targets = Vec::new();
        let mut zbdkit = None;
        if args.zbdkit.exists() {
            let server = Zbdkit::start(&args.zbdkit, dir.path(), Format::Raw, geometry, &args.serve_arg)?;
            let target = VhostTarget::connect(&server.socket, geometry, args.queues, manner)?;
            ensure!(target.zoned(), "zbdkit does not offer zones");
            targets.push((ZBDKIT.to_string(), Target::Vhost(Box::new(target))));
            zbdkit = Some(server);
        } else {
            notes.push(format!(
                "No zbdkit at {}: only its peers were measured.",
                args.zbdkit.display()
            ));
        }
        let file = dir.path().join("peer.raw");
        File::create(&file)?.set_len(geometry.size)?;
        let mut peers = Vec::new();
        if let Some(why) = QemuStorageDaemon::missing() {
            notes.push(format!("No peer: {why}."));
        } else {
            // Two daemons on one file: only one of them is at work at any time.
            for (i, options) in ["aio=threads", "cache.direct=off,aio=io_uring"]
                .into_iter()
                .enumerate()
            {
                let socket = dir.path().join(format!("peer{i}.sock"));
                let locking = format!("{options},locking=off");
                let daemon = QemuStorageDaemon::start(&file, &locking, &socket, args.queues)?;
                let target = VhostTarget::connect(&socket, geometry, args.queues, manner)?;
                let name = format!("{PEER} {}", options.rsplit('=').next().unwrap_or(options));
                targets.push((name, Target::Vhost(Box::new(target))));
                peers.push(daemon);
            }
        }
        let opened = File::options().read(true).write(true).open(&file)?;
        targets.push((
            DIRECT.to_string(),
            Target::Direct(DirectTarget::new(opened, geometry)),
        ));
        let mut bench = Bench {
            targets,
            zbdkit,
            peers,
            _dir: dir,
            notes,
            measured: 0,
            disturbed: 0,
        };
        bench.prepare(args, geometry, &file)?;
        Ok(bench)
    }

    /// Finds out what resets leave, has all targets write alike, and fills the devices.
    fn prepare(&mut self, args: &Args, geometry: Geometry, file: &std::path::Path) -> Result<()> {
        let mut holes = args.base == Base::Holes;
        for (name, target) in &mut self.targets {
            let target = match target {
                Target::Vhost(target) => target,
                // The peers' file: filled again so that it is full without them, too.
                Target::Direct(target) => {
                    target.fill()?;
                    continue;
                }
            };
            target.fill().with_context(|| format!("filling {name}"))?;
            if let (Base::Auto, Some(zbdkit), ZBDKIT) = (args.base, &self.zbdkit, name.as_str()) {
                target.reset()?;
                // Freed behind the acknowledgement, so give it time.
                std::thread::sleep(Duration::from_secs(1));
                holes = zbdkit.is_sparse(geometry)?;
                target.fill().with_context(|| format!("filling {name}"))?;
            }
            self.notes
                .push(format!("{name}: features {:#x}.", target.features()));
        }
        let left = if holes {
            "holes (blocks are freed before each pass)"
        } else {
            "allocated blocks"
        };
        self.notes.push(format!("The peer and io_uring write to {left}."));
        for (name, target) in &mut self.targets {
            match target {
                Target::Vhost(target) if holes && name != ZBDKIT => {
                    target.set_punch(Some(File::options().write(true).open(file)?));
                }
                Target::Vhost(_) => {}
                Target::Direct(target) => target.set_punch(holes),
            }
        }
        Ok(())
    }

    /// Processes that take part.
    fn pids(&self) -> Vec<u32> {
        let peers = self.peers.iter().map(QemuStorageDaemon::pid);
        peers
            .chain(self.zbdkit.as_ref().map(Zbdkit::pid))
            .chain([std::process::id()])
            .collect()
    }

    fn row(&mut self, workload: Workload, args: &Args) -> Result<Row> {
        let time = Duration::from_secs_f64(args.seconds);
        let mut samples: Vec<(String, Vec<f64>)> = self
            .targets
            .iter()
            .map(|(name, _)| (name.clone(), Vec::new()))
            .collect();
        for _ in 0..args.rounds {
            let (mut best, mut others) = self.round(workload, time)?;
            for _ in 0..args.retries {
                if others <= QUIET {
                    break;
                }
                std::thread::sleep(time);
                let (again, load) = self.round(workload, time)?;
                if load < others {
                    (best, others) = (again, load);
                }
            }
            self.disturbed += u32::from(others > QUIET);
            for (sample, (_, list)) in best.into_iter().zip(&mut samples) {
                list.push(sample.iops);
            }
        }
        Ok(Row::new(workload, samples))
    }

    /// Measures each target once; also how many processors others used meanwhile.
    fn round(&mut self, workload: Workload, time: Duration) -> Result<(Vec<Sample>, f64)> {
        let pids = self.pids();
        let load = Load::now(&pids);
        let mut samples = Vec::new();
        for (name, target) in &mut self.targets {
            // Never the same data twice: nobody passes with what another one wrote before.
            self.measured += 1;
            let sample = target
                .measure(workload, self.measured << 32, time)
                .with_context(|| format!("{name}, {}", workload.name()))?;
            samples.push(sample);
        }
        Ok((samples, load.others_since(&pids)))
    }
}
