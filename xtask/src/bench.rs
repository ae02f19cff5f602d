//! `cargo xtask bench|kill|crash`: the long measurements of testkit, built in release.

use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::drive::Zbdkit;

/// Arguments that are handed on.
#[derive(Debug, Args)]
pub struct HandedOn {
    /// Arguments for the program behind it; `-- --help` shows them
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

impl HandedOn {
    /// The arguments.
    pub fn arguments(&self) -> &[OsString] {
        &self.arguments
    }
}

/// How many states the long crash run judges, campaign by campaign.
#[derive(Debug, Args)]
pub struct Crash {
    /// States for each campaign, of which there are some fifty
    #[arg(long, default_value_t = 10_000)]
    states: u64,
}

/// The benchmark against qemu-storage-daemon and bare io_uring.
pub fn bench(options: &HandedOn) -> Result<()> {
    tool("zbdkit-bench", options)
}

/// The daemon killed in mid-traffic, again and again.
pub fn kill(options: &HandedOn) -> Result<()> {
    tool("zbdkit-kill", options)
}

/// The crash device, with many states.
pub fn crash(options: &Crash) -> Result<()> {
    let mut command = cargo();
    command
        .args([
            "test",
            "--release",
            "--package",
            "zbdkit-testkit",
            "--test",
            "crash",
            "--test",
            "crash_qcow2",
            "--test",
            "crash_bare",
            "--test",
            "crash_marks",
            "--",
            "--nocapture",
        ])
        .env("ZBDKIT_CRASH_STATES", options.states.to_string());
    run(&mut command)
}

fn tool(name: &str, options: &HandedOn) -> Result<()> {
    let zbdkit = Zbdkit::build()?;
    let mut command = cargo();
    command
        .args([
            "run",
            "--release",
            "--package",
            "zbdkit-testkit",
            "--bin",
            name,
            "--",
            "--zbdkit",
        ])
        .arg(zbdkit.program())
        .args(&options.arguments);
    run(&mut command)
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(crate::workspace());
    command
}

/// These programs end by themselves, print as they go, and may be interrupted.
fn run(command: &mut Command) -> Result<()> {
    let status = command.status().context("cannot start cargo")?;
    if !status.success() {
        bail!("it failed ({status})");
    }
    Ok(())
}
