//! The image's own format, checked between two daemons by `zbdkit check`.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// Exit status, as `qemu-img check` has it: something is corrupt.
const CORRUPT: i32 = 2;
/// Nothing is corrupt, but clusters are lost.
const LEAKS: i32 = 3;

/// Checks `image`; whether clusters are lost.
///
/// # Errors
/// If anything is corrupt.
pub fn check(zbdkit: &Path, image: &Path) -> Result<bool> {
    let (status, said) = run(zbdkit, image, &[])?;
    match status {
        0 => Ok(false),
        LEAKS => Ok(true),
        CORRUPT => bail!("the image is corrupt: {said}"),
        other => bail!("zbdkit check ended with {other}: {said}"),
    }
}

/// Repairs `image`; after that nothing is to be found.
///
/// # Errors
/// If something is.
pub fn repair(zbdkit: &Path, image: &Path) -> Result<()> {
    let (status, said) = run(zbdkit, image, &["-r", "all"])?;
    ensure!(status == 0, "zbdkit check -r all ended with {status}: {said}");
    ensure!(!check(zbdkit, image)?, "clusters are lost after a repair: {said}");
    Ok(())
}

fn run(zbdkit: &Path, image: &Path, arguments: &[&str]) -> Result<(i32, String)> {
    let output = Command::new(zbdkit)
        .arg("check")
        .args(arguments)
        .arg(image)
        .output()
        .with_context(|| format!("running {}", zbdkit.display()))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let status = output.status.code().context("zbdkit check was killed")?;
    Ok((status, text(&output.stdout) + &text(&output.stderr)))
}
