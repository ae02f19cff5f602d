//! zbdkit-kill: kills `zbdkit serve` in mid-traffic, many times, and checks what the image holds each time.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use zbdkit_testkit::kill::{Contract, Counts, Door, End, Format, Options, Summary, run};

/// Kill a serving zbdkit in mid-traffic, restart it, and check every acknowledged byte; again and again.
///
/// Exits with 1 if a round failed; its image is kept.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The zbdkit program
    #[arg(long, default_value = "target/release/zbdkit")]
    zbdkit: PathBuf,
    /// Directory of the image: on tmpfs the run state is mapped, elsewhere it is written
    #[arg(long, default_value = "/dev/shm/zbdkit-kill")]
    dir: PathBuf,
    /// The image's format; qcow2 is checked after each end of a daemon
    #[arg(long, value_enum, default_value = "qcow2")]
    format: FormatArg,
    /// How the image is served: over nvme it has no conventional zones, and each queue writes to one with a random write area
    #[arg(long, value_enum, default_value = "vhost-user-blk")]
    door: DoorArg,
    /// Cluster size of a qcow2 image in bytes
    #[arg(long, default_value_t = 65536)]
    cluster_size: u64,
    /// Rounds; each ends with the daemon's end
    #[arg(long, default_value_t = 200)]
    rounds: u64,
    /// Decides what each round does; the races are the machine's
    #[arg(long)]
    seed: Option<u64>,
    /// Queues, each with its own client thread
    #[arg(long, default_value_t = 4)]
    queues: u16,
    /// The image's run-state mode
    #[arg(long, value_enum, default_value = "beside")]
    run_state: RunState,
    /// Bypass the page cache
    #[arg(long)]
    direct: bool,
    /// What must be there after a kill; auto demands what the run-state mode promises
    #[arg(long, value_enum, default_value = "auto")]
    demand: Demand,
    /// A round ends after at most so many acknowledgements
    #[arg(long, default_value_t = 20_000)]
    max_acks: u64,
    /// Zones
    #[arg(long, default_value_t = 96)]
    zones: u64,
    /// Zone size in KiB
    #[arg(long, default_value_t = 1024)]
    zone_size: u64,
    /// Zone capacity in KiB
    #[arg(long, default_value_t = 960)]
    zone_capacity: u64,
    /// Logical block size in bytes
    #[arg(long, default_value_t = 4096)]
    block_size: u32,
    /// Further arguments of `zbdkit create`, in one string with spaces
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    image_args: String,
    /// Further arguments of `zbdkit serve`, in one string with spaces
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    serve_args: String,
    /// Give up after so many failed rounds; each but the last goes on with a new image
    #[arg(long, default_value_t = 3)]
    max_failures: usize,
    /// A line for each round
    #[arg(short, long)]
    verbose: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FormatArg {
    Raw,
    Qcow2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DoorArg {
    VhostUserBlk,
    Nvme,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RunState {
    Beside,
    Sync,
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Demand {
    Auto,
    /// Every acknowledged write
    Acknowledged,
    /// Every flushed write
    Flushed,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    ensure!(
        args.zbdkit.exists(),
        "{} is not there; build it with `cargo build --release -p zbdkit`, or name it with --zbdkit",
        args.zbdkit.display()
    );
    let options = options(&args);
    println!(
        "{} rounds on {} over {}, seed {}, {} queues, run state {}, {}, in {}",
        options.rounds,
        match options.format {
            Format::Raw => "raw".to_owned(),
            Format::Qcow2 => format!("qcow2 with clusters of {}", args.cluster_size),
        },
        match options.door {
            Door::VhostUserBlk => "vhost-user-blk",
            Door::Nvme => "nvme",
        },
        options.seed,
        options.queues,
        options.run_state,
        if options.direct { "direct" } else { "buffered" },
        options.dir.display()
    );
    let start = Instant::now();
    let summary = run(&options, &mut |line| {
        if args.verbose || line.starts_with("FAILED") {
            println!("{line}");
        }
    })?;
    print_summary(&summary, start.elapsed().as_secs_f64());
    Ok(if summary.failures.is_empty() && summary.passed > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn options(args: &Args) -> Options {
    let run_state = match args.run_state {
        RunState::Beside => "beside",
        RunState::Sync => "sync",
        RunState::None => "none",
    };
    let contract = match (args.demand, args.run_state) {
        (Demand::Auto, RunState::None) | (Demand::Flushed, _) => Contract::Flushed,
        (Demand::Auto | Demand::Acknowledged, _) => Contract::Acknowledged,
    };
    let words = |text: &str| text.split_whitespace().map(OsString::from).collect::<Vec<_>>();
    let queues = u64::from(args.queues);
    let (door, with_areas) = match args.door {
        DoorArg::VhostUserBlk => (Door::VhostUserBlk, 0),
        DoorArg::Nvme => (Door::Nvme, 1),
    };
    let mut create = Vec::new();
    for (name, value) in [
        ("--size", (args.zones * args.zone_size) << 10),
        ("--zone-size", args.zone_size << 10),
        ("--zone-capacity", args.zone_capacity << 10),
        ("--block-size", args.block_size.into()),
        // Fewer open than there are zones in use: the least recently used one is closed now and then.
        ("--max-open", (2 + with_areas) * queues + 2),
        ("--max-active", (2 + with_areas) * queues + 8),
        ("--max-append", 128 << 10),
    ] {
        create.extend([name.into(), value.to_string().into()]);
    }
    let more = match door {
        Door::VhostUserBlk => "--conventional 2".to_owned(),
        Door::Nvme => format!("--zrwa-size 128K --zrwa-granularity 16K --max-zrwa {queues}"),
    };
    create.extend(words(&more));
    let format = match args.format {
        FormatArg::Raw => Format::Raw,
        FormatArg::Qcow2 => Format::Qcow2,
    };
    if format == Format::Qcow2 {
        create.extend(["-o".into(), format!("cluster_size={}", args.cluster_size).into()]);
    }
    create.extend(words(&args.image_args));
    Options {
        zbdkit: args.zbdkit.clone(),
        dir: args.dir.clone(),
        format,
        door,
        rounds: args.rounds,
        seed: args.seed.unwrap_or_else(|| u64::from(std::process::id())),
        queues: args.queues,
        run_state: run_state.to_owned(),
        direct: args.direct,
        contract,
        max_acks: args.max_acks,
        create,
        serve: words(&args.serve_args),
        max_failures: args.max_failures,
    }
}

fn print_summary(summary: &Summary, seconds: f64) {
    let ends = |end| summary.ends.get(&end).copied().unwrap_or(0);
    println!(
        "rounds: {} killed in mid-traffic, {} killed idle, {} ended by SIGTERM in mid-traffic; {} more daemons killed \
         while opening or just after; {seconds:.0} s",
        ends(End::Kill),
        ends(End::KillIdle),
        ends(End::Term),
        summary.interrupted
    );
    let Counts {
        acknowledged,
        refused,
        verified,
        in_flight,
        kept,
        kept_unacknowledged,
    } = &summary.counts;
    println!(
        "requests acknowledged: {} {acknowledged:?}",
        summary.counts.total()
    );
    println!(
        "requests refused by zone rules: {} {refused:?}",
        summary.counts.total_refused()
    );
    println!(
        "in flight at the end of a round: {in_flight}; bytes compared: {:.1} GiB",
        *verified as f64 / f64::from(1 << 30)
    );
    println!(
        "requests of a round found at its end: {kept} acknowledged, {kept_unacknowledged} that were in flight"
    );
    if summary.checks > 0 {
        println!(
            "checks of the format: {}, nothing corrupt; {} found lost clusters, {} repairs left nothing to be found",
            summary.checks, summary.leaks, summary.repairs
        );
    }
    for failure in &summary.failures {
        println!(
            "FAILED: {}\n  the image is in {}",
            failure.what,
            failure.kept.display()
        );
    }
    println!("{} passed, {} failed", summary.passed, summary.failures.len());
}
