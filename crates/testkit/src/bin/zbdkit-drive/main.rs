//! zbdkit-drive: what the tests in guests do with a real zoned drive through zbdkit's block layer, or through a door.

mod bench;
mod door;
mod flood;
mod steps;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::{Parser, Subcommand};
use zbdkit_block::{Device, Graph, Host, OpenOptions, OsHost};
use zbdkit_io::{Runtime, RuntimeOptions};
use zbdkit_testkit::{conformance, reported};

/// Run suites, single steps and benchmarks on a zoned drive, whose contents are lost.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// The conformance suites; after each step what the kernel or the tool for such drives reports must be zbdkit's
    Conform {
        /// The drive
        device: PathBuf,
        /// Go through `zbdkit serve --vhost-user-blk`, with this zbdkit program
        #[arg(long, value_name = "ZBDKIT")]
        door: Option<PathBuf>,
    },
    /// Lines 'COMMAND => EXPECTED' from standard input: see steps.rs
    Steps {
        /// The drive
        device: PathBuf,
        /// Go through `zbdkit serve --vhost-user-blk`, with this zbdkit program
        #[arg(long, value_name = "ZBDKIT")]
        door: Option<PathBuf>,
    },
    /// Appends to many zones at once; in the middle of it a shell command does something to the drive
    Flood {
        /// The drive
        device: PathBuf,
        /// The command
        command: String,
    },
    /// Sequential writes and appends, against fio on the device itself
    Bench {
        /// The drive
        device: PathBuf,
        /// Seconds of each measurement
        #[arg(long, default_value_t = 1)]
        seconds: u64,
        /// How often each is measured
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
}

fn main() -> ExitCode {
    match run(Args::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("zbdkit-drive: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<()> {
    let runtime = runtime()?;
    match verb {
        Verb::Conform { device: path, door } => {
            let subject = Subject::open(&runtime, &path, door.as_deref())?;
            let device = &subject.device;
            let seen = std::cell::Cell::new(0);
            let look = || -> zbdkit_io::LocalBoxFuture<'_, Result<(), String>> {
                seen.set(seen.get() + 1);
                Box::pin(reported::same_report(device, &path))
            };
            runtime
                .block_on(conformance::run_observed(device, &look))
                .map_err(|broken| anyhow!("{broken}"))?;
            println!("conforms; {} reports were the same", seen.get());
            Ok(())
        }
        Verb::Steps { device: path, door } => {
            let subject = Subject::open(&runtime, &path, door.as_deref())?;
            runtime.block_on(steps::run(&subject.device, &path, std::io::stdin().lock()))
        }
        Verb::Flood { device, command } => {
            let subject = Subject::open(&runtime, &device, None)?;
            runtime.block_on(flood::run(&subject.device, &command))
        }
        Verb::Bench {
            device,
            seconds,
            rounds,
        } => bench::run(&runtime, &device, Duration::from_secs(seconds), rounds),
    }
}

fn runtime() -> Result<Runtime> {
    Runtime::new(RuntimeOptions::default()).context("cannot start I/O")
}

/// What is tested: the drive, or the drive behind a door, whose server lives as long as this.
struct Subject {
    device: Device,
    _server: Option<door::Server>,
}

impl Subject {
    fn open(runtime: &Runtime, path: &Path, door: Option<&Path>) -> Result<Subject> {
        if let Some(zbdkit) = door {
            let (device, server) = door::open(zbdkit, path)?;
            return Ok(Subject {
                device,
                _server: Some(server),
            });
        }
        Ok(Subject {
            device: runtime.block_on(open(path))?,
            _server: None,
        })
    }
}

/// The drive through the block layer.
async fn open(path: &Path) -> Result<Device> {
    let host: Arc<dyn Host> = Arc::new(OsHost);
    let device = Graph::from_path(path)
        .open(&host, &OpenOptions::default())
        .await?;
    anyhow::ensure!(device.limits().zoned.is_some(), "{} has no zones", path.display());
    Ok(device)
}
