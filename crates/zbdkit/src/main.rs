//! `zbdkit`: the command line and the daemon.
//!
//! Each verb is one module of [`verbs`]. What they share is here: how an image is named and opened ([`image`]), how
//! results and errors are printed ([`output`]), how far long work is ([`progress`]), what numbers look like ([`args`])
//! and the shapes of `--json` ([`shapes`]).

mod args;
mod cli;
mod control;
mod image;
mod log;
mod output;
mod progress;
mod shapes;
mod verbs;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return output::usage(&error),
    };
    log::init(cli.verbose, &cli.verb);
    match verbs::run(cli.verb) {
        Ok(code) => code,
        Err(error) => output::explain(&error),
    }
}
