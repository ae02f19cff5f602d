//! zbdkit-diff: random sequences of changes to qcow2 images, by zbdkit and by QEMU in turn.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use zbdkit_testkit::diff::run::{Options, Summary, run};
use zbdkit_testkit::diff::sequence::Skipped;
use zbdkit_testkit::diff::tools::Tools;

/// Change qcow2 images by turns with QEMU's tools, and compare what both find in them.
///
/// Exits with 1 if a sequence failed; its images are kept.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Directory of the images; a tmpfs is fast
    #[arg(long, default_value = "/dev/shm/zbdkit-diff")]
    dir: PathBuf,
    /// Sequences
    #[arg(long, default_value_t = 2000)]
    count: u64,
    /// Seed of the first sequence; the next ones follow
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Steps, or requests of them (STEP.REQUEST), to leave out
    #[arg(long, value_delimiter = ',', value_parser = part)]
    skip: Vec<Skipped>,
    /// Runs that may be spent on making a failing sequence short
    #[arg(long, default_value_t = 150)]
    shrink: u32,
    /// Give up after so many failed sequences
    #[arg(long, default_value_t = 3)]
    max_failures: usize,
    /// The zbdkit program, which then takes part with its command line
    #[arg(long)]
    zbdkit: Option<PathBuf>,
    /// QEMU alone, which shows whether this program itself is right
    #[arg(long)]
    qemu_only: bool,
}

fn part(text: &str) -> Result<Skipped> {
    let number = |text: &str| text.parse().with_context(|| format!("{text} is no number"));
    match text.split_once('.') {
        Some((step, op)) => Ok((number(step)?, Some(number(op)? as usize))),
        None => Ok((number(text)?, None)),
    }
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let tools = Tools::find().map_err(|why| anyhow!("{why}"))?;
    println!(
        "{} sequences from seed {} on, in {}, with {}",
        args.count,
        args.seed,
        args.dir.display(),
        tools.version
    );
    let options = Options {
        tools,
        directory: args.dir,
        seed: args.seed,
        count: args.count,
        jobs: args.jobs,
        shrink: args.shrink,
        most_failures: args.max_failures,
        zbdkit: args.zbdkit.map(std::path::absolute).transpose()?,
        qemu_only: args.qemu_only,
        skip: args.skip.into_iter().collect::<BTreeSet<_>>(),
    };
    let start = Instant::now();
    let summary = run(&options, &|line| println!("{line}"))?;
    print_summary(&summary, start.elapsed().as_secs_f64());
    Ok(if summary.failures.is_empty() && summary.passed > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn print_summary(summary: &Summary, seconds: f64) {
    for ((who, what), (done, refused)) in &summary.counts {
        println!("{who:8} {what:16} {done:8} done {refused:6} refused");
    }
    println!(
        "{} passed, {} failed, {seconds:.0} s",
        summary.passed,
        summary.failures.len()
    );
}
