//! `cargo xtask`: the project's own tools: the demonstration, the tests, the guests that they run in.

mod guest;
mod proc;
mod rig;
mod ui;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The demonstration, the tests, and the virtual machines that they run in.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Boots a guest, without a drive
    Guest {
        /// Runs this script instead of giving a shell
        #[arg(long, value_name = "FILE")]
        script: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    match arguments.command {
        Verb::Guest { script } => {
            let rig = rig::Rig::prepare()?;
            match script {
                Some(path) => {
                    let mut guest = guest::Guest::new(&rig, "guest", &std::fs::read_to_string(path)?);
                    guest.stream = true;
                    guest.run()?.check().map(drop)
                }
                None => guest::Guest::new(&rig, "guest", "").interactive(),
            }
        }
    }
}

/// The workspace's root.
pub fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().map(PathBuf::from).unwrap_or_default()
}

/// Cargo's target directory.
pub fn target_directory() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}
