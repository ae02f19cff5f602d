//! `cargo xtask diff`: qcow2 images changed by zbdkit and by QEMU in turn, with the rig's QEMU.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::bench::HandedOn;
use crate::drive::Zbdkit;
use crate::rig::Rig;

/// Says how `zbdkit-diff` runs QEMU's tools: a command's words, one a line, with `{}` for the tool's name.
const VARIABLE: &str = "ZBDKIT_QEMU_TOOLS";

/// Runs `zbdkit-diff`, built in release.
pub fn run(options: &HandedOn) -> Result<()> {
    let words = Rig::qemu()?.tool_words();
    let zbdkit = Zbdkit::build()?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .current_dir(crate::workspace())
        .args([
            "run",
            "--release",
            "--package",
            "zbdkit-testkit",
            "--bin",
            "zbdkit-diff",
            "--",
        ])
        .arg("--zbdkit")
        .arg(zbdkit.program())
        .args(options.arguments())
        .env(VARIABLE, words.join("\n"))
        .status()
        .context("cannot start cargo")?;
    ensure!(status.success(), "it failed ({status})");
    Ok(())
}
