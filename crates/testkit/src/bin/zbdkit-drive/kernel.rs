//! What the kernel reports of a drive, by way of `blkzone` of util-linux, and whether zbdkit says the same.

use std::path::Path;
use std::process::Command;

use zbdkit_block::Device;
use zbdkit_zone::{Condition, Filter, ZoneInfo};

/// A zone as blkzone prints it, in sectors.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    start: u64,
    len: u64,
    cap: u64,
    /// From the zone's start; absent where it means nothing.
    wptr: Option<u64>,
    condition: u8,
    kind: u8,
}

/// Compares the report of `device` with the one of the drive at `path`.
pub async fn same_report(device: &Device, path: &Path) -> Result<(), String> {
    let ours = device.report(0, Filter::All, usize::MAX).await;
    let ours = ours.map_err(|error| format!("no report: {error}"))?;
    let output = Command::new("blkzone").arg("report").arg(path).output();
    let output = output.map_err(|error| format!("blkzone: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let theirs: Option<Vec<_>> = text.lines().map(parse).collect();
    let theirs = theirs.ok_or_else(|| format!("blkzone printed {text:?}"))?;
    let ours: Vec<_> = ours.iter().map(line).collect();
    if ours.len() != theirs.len() {
        return Err(format!("{} zones, blkzone shows {}", ours.len(), theirs.len()));
    }
    match ours.iter().zip(&theirs).find(|(ours, theirs)| ours != theirs) {
        Some((ours, theirs)) => Err(format!("zbdkit shows {ours:x?}, blkzone {theirs:x?}")),
        None => Ok(()),
    }
}

fn line(zone: &ZoneInfo) -> Line {
    Line {
        start: zone.start / 512,
        len: zone.len / 512,
        cap: zone.capacity / 512,
        wptr: has_pointer(zone.condition as u8).then_some((zone.wp - zone.start) / 512),
        condition: zone.condition as u8,
        kind: zone.kind as u8,
    }
}

/// Drivers show different pointers of full zones, and anything for those that have none.
fn has_pointer(condition: u8) -> bool {
    let without = [
        Condition::NotWritePointer,
        Condition::ReadOnly,
        Condition::Full,
        Condition::Offline,
    ];
    !without.iter().any(|other| *other as u8 == condition)
}

/// `start: 0x000000000, len 0x020000, cap 0x020000, wptr 0x000008 reset:0 non-seq:0, zcond: 2(oi) [type: 2(SEQ...)]`
fn parse(line: &str) -> Option<Line> {
    let after = |key: &str| line.split_once(key).map(|(_, rest)| rest.trim_start());
    let hex = |key: &str| {
        let digits = after(key)?.strip_prefix("0x")?;
        let end = digits.find(|c: char| !c.is_ascii_hexdigit())?;
        u64::from_str_radix(&digits[..end], 16).ok()
    };
    let number = |key: &str| after(key)?.split('(').next()?.trim().parse::<u8>().ok();
    let condition = number("zcond:")?;
    Some(Line {
        start: hex("start:")?,
        len: hex("len ")?,
        cap: hex("cap ")?,
        wptr: has_pointer(condition).then(|| hex("wptr ")).flatten(),
        condition,
        kind: number("type:")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_blkzone_is_understood() {
        let text = "  start: 0x000040000, len 0x020000, cap 0x018000, wptr 0x000008 reset:0 non-seq:0, zcond: \
                    2(oi) [type: 2(SEQ_WRITE_REQUIRED)]";
        assert_eq!(
            parse(text),
            Some(Line {
                start: 0x40000,
                len: 0x20000,
                cap: 0x18000,
                wptr: Some(8),
                condition: 2,
                kind: 2
            })
        );
        let full = text.replace("zcond: 2(oi)", "zcond:14(fu)");
        assert_eq!(parse(&full).unwrap().wptr, None);
        assert_eq!(parse("blkzone: /dev/x: no such file"), None);
    }
}
