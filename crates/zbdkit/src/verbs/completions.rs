//! `zbdkit completions`: what a shell needs to complete our command lines.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::output::Out;

/// Print a completion script for a shell
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Completions {
    /// The shell
    pub shell: Shell,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit completions bash > ~/.local/share/bash-completion/completions/zbdkit
  zbdkit completions zsh > \"${fpath[1]}/_zbdkit\"";

pub fn run(args: &Completions) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "zbdkit", &mut script);
    let mut out = Out::new();
    out.text(String::from_utf8_lossy(&script))?;
    out.flush()
}
