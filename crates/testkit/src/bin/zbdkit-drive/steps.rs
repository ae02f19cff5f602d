//! Single steps with what must come of them, one a line: `COMMAND => EXPECTED`. Empty lines and those with `#` are left out.
//!
//! | command | |
//! |---|---|
//! | `append ZONE BYTES`, `write ZONE OFFSET BYTES`, `read ZONE OFFSET BYTES` | offsets from the zone's start |
//! | `open`, `close`, `finish`, `reset` `ZONE` | |
//! | `reset-all`, `flush` | |
//! | `zone ZONE` | its condition, and the pointer from its start |
//! | `behind reset ZONE`, `behind finish ZONE` | what somebody else does, who takes no notice of O_EXCL |
//! | `sh COMMAND` | the same, with a command |
//!
//! The result is `ok`, with the offset from the zone's start for an append, or the error's name as in the code. It must begin
//! with what is expected.

use std::io::BufRead;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail, ensure};
use zbdkit_block::host_device::{BlockDrive, Drive, DriveFacts, block_facts};
use zbdkit_block::{CrossZone, Device, Error, FileOptions, Host, Lane, LockMode, OsHost, ZoneOp};
use zbdkit_io::IoBuf;
use zbdkit_zone::{CloseEmpty, Filter, Geometry};

/// Carries out the lines.
pub async fn run(device: &Device, path: &Path, lines: impl BufRead) -> Result<()> {
    let geometry = device.limits().zoned.context("no zones")?;
    let lane = device.lane(8);
    let mut count = 0;
    for line in lines.lines() {
        let line = line?;
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (command, expected) = line
            .rsplit_once("=>")
            .with_context(|| format!("{line:?}: what is expected?"))?;
        let (command, expected) = (command.trim(), expected.trim());
        let got = match command.strip_prefix("behind ") {
            Some(command) => behind(path, &geometry, command).await?,
            None => step(device, &lane, &geometry, command).await?,
        };
        println!("{command} => {got}");
        ensure!(
            got.starts_with(expected),
            "{command}: expected {expected}, got {got}"
        );
        count += 1;
    }
    ensure!(count > 0, "there was nothing to do");
    lane.quiet().await;
    Ok(())
}

async fn step(device: &Device, lane: &Lane, geometry: &Geometry, command: &str) -> Result<String> {
    if let Some(shell) = command.strip_prefix("sh ") {
        let status = Command::new("bash").arg("-c").arg(shell).status()?;
        return Ok(if status.success() { "ok" } else { "failed" }.into());
    }
    let mut words = command.split_whitespace();
    let verb = words.next().unwrap_or_default();
    let numbers: Vec<u64> = words
        .map(|word| {
            word.parse()
                .with_context(|| format!("{command}: {word:?} is no number"))
        })
        .collect::<Result<_>>()?;
    let start = numbers.first().map_or(0, |zone| zone * geometry.zone_size());
    let done = |result: Result<(), Error>| result.map_or_else(name, |()| "ok".into());
    let buf = |len: u64| {
        let buf = IoBuf::alloc(len as usize);
        buf.fill(0..len as usize, 0x5a);
        buf
    };
    let op = |op| device.zone_op(lane, op, start);
    Ok(match (verb, numbers.as_slice()) {
        ("append", [_, len]) => match device.append(lane, buf(*len), start).await {
            Ok(at) => format!("ok {}", at - start),
            Err(error) => name(error),
        },
        ("write", [_, offset, len]) => done(device.write(lane, buf(*len), start + offset).await),
        ("read", [_, offset, len]) => done(
            device
                .read(lane, buf(*len), start + offset, CrossZone::Refuse)
                .await,
        ),
        ("open", [_]) => done(op(ZoneOp::Open).await),
        ("close", [_]) => done(op(ZoneOp::Close(CloseEmpty::ToEmpty)).await),
        ("finish", [_]) => done(op(ZoneOp::Finish).await),
        ("reset", [_]) => done(op(ZoneOp::Reset).await),
        ("reset-all", []) => done(device.reset_all(lane).await),
        ("flush", []) => done(device.flush(lane).await),
        ("zone", [_]) => match device.report(start, Filter::All, 1).await {
            Ok(zones) => zones.first().map_or_else(String::new, |zone| {
                format!("{} {}", zone.condition, zone.wp - zone.start)
            }),
            Err(error) => name(error),
        },
        _ => bail!("{command:?} is no command"),
    })
}

/// Changes a zone past everything that knows of it.
async fn behind(path: &Path, geometry: &Geometry, command: &str) -> Result<String> {
    let (op, zone) = command.split_once(' ').context("behind what?")?;
    let op = match op {
        "reset" => ZoneOp::Reset,
        "finish" => ZoneOp::Finish,
        _ => bail!("behind {command:?} is no command"),
    };
    let facts = block_facts(&OsHost, path)?.context("no block device")?;
    let options = FileOptions {
        lock: LockMode::None,
        ..FileOptions::existing(false)
    };
    let file = OsHost
        .open(path, &options)
        .map_err(|error| anyhow!("{error:?}"))?;
    let facts = DriveFacts {
        path: path.to_owned(),
        size: facts.size,
        block_size: facts.logical_block_size,
        read_only: false,
        zones: facts.zones.context("no zones")?,
        zns: zbdkit_zone::Zns::NONE,
    };
    let size = geometry.zone_size();
    let start = zone.parse::<u64>()? * size;
    let done = BlockDrive::new(facts, file).zone_op(op, start, size).await;
    Ok(done.map_or_else(name, |()| "ok".into()))
}

/// The error as the code names it, with what it carries.
pub fn name(error: Error) -> String {
    match error {
        Error::Zone(rule) => format!("{rule:?}"),
        Error::Io { errno, .. } => format!("Io {}", std::io::Error::from_raw_os_error(errno)),
        other => format!("{other:?}"),
    }
}
