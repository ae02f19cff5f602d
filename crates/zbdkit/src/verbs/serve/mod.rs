//! tmp
use clap::Args;
/// Serve
#[derive(Debug, Args)]
pub struct Serve {}
pub fn run(_: Serve) -> anyhow::Result<std::process::ExitCode> {
    todo!()
}
