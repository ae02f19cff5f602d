//! What other tools report of a drive of this machine, and whether zbdkit says the same: `blkzone` of util-linux where the
//! kernel shows the zones, `nvme` of nvme-cli for the character device of an NVMe namespace, `sg_rep_zones` of sg3_utils for a
//! SCSI disk whose zones the kernel does not show.

use std::path::Path;
use std::process::Command;

use zbdkit_block::Device;
use zbdkit_spec::nvme::zns;
use zbdkit_zone::{Attributes, Condition, Filter, Recommendation, ZoneInfo};

/// A zone as the tools print it. Bytes.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    start: u64,
    /// Absent where the tool does not print it.
    len: Option<u64>,
    capacity: u64,
    /// Absent where it means nothing.
    wp: Option<u64>,
    condition: u8,
    kind: u8,
    /// As a descriptor of ZNS has them (ZA); absent where the tool does not print them.
    attributes: Option<u8>,
}

/// Compares the report of `device` with what the tool says of the drive at `path`.
pub async fn same_report(device: &Device, path: &Path) -> Result<(), String> {
    let ours = device.report(0, Filter::All, usize::MAX).await;
    let ours = ours.map_err(|error| format!("no report: {error}"))?;
    same_zones(&ours, path, device.limits().block_size)
}

/// Compares all zones of a drive, as zbdkit reports them, with what the tool says of the drive at `path`.
pub fn same_zones(ours: &[ZoneInfo], path: &Path, block_size: u32) -> Result<(), String> {
    let (tool, theirs) = by_tool(path, block_size.into())?;
    let ours: Vec<_> = ours.iter().map(line).collect();
    if ours.len() != theirs.len() {
        return Err(format!("{} zones, {tool} shows {}", ours.len(), theirs.len()));
    }
    let same = |ours: &Line, theirs: &Line| {
        let len = theirs.len.or(ours.len);
        (ours.len, ours.start, ours.capacity, ours.wp) == (len, theirs.start, theirs.capacity, theirs.wp)
            && (ours.condition, ours.kind) == (theirs.condition, theirs.kind)
            && theirs
                .attributes
                .is_none_or(|theirs| ours.attributes == Some(theirs))
    };
    match ours
        .iter()
        .zip(&theirs)
        .find(|(ours, theirs)| !same(ours, theirs))
    {
        Some((ours, theirs)) => Err(format!("zbdkit shows {ours:x?}, {tool} {theirs:x?}")),
        None => Ok(()),
    }
}

/// The zones of the drive as the tool for such drives shows them.
fn by_tool(path: &Path, block_size: u64) -> Result<(&'static str, Vec<Line>), String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if name.starts_with("ng") {
        let text = output("nvme", &["zns", "report-zones"], path)?;
        let lines = text.lines().filter(|line| line.starts_with("SLBA"));
        let zones: Option<Vec<_>> = lines.map(|line| nvme(line, block_size)).collect();
        return understood("nvme", zones, &text);
    }
    let zoned = std::fs::read_to_string(format!("/sys/block/{name}/queue/zoned")).unwrap_or_default();
    if zoned.trim() == "none" {
        // As hexadecimal digits, which no locale and no version changes.
        let text = output(
            "sg_rep_zones",
            &["--hex", "--hex", "--hex", "--maxlen=262144"],
            path,
        )?;
        let zones = bytes(&text).and_then(|bytes| scsi(&bytes, block_size));
        return understood("sg_rep_zones", zones, &text);
    }
    let text = output("blkzone", &["report"], path)?;
    let zones: Option<Vec<_>> = text.lines().map(blkzone).collect();
    understood("blkzone", zones, &text)
}

fn output(tool: &str, arguments: &[&str], path: &Path) -> Result<String, String> {
    let output = Command::new(tool).args(arguments).arg(path).output();
    let output = output.map_err(|error| format!("{tool}: {error}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn understood(
    tool: &'static str,
    zones: Option<Vec<Line>>,
    text: &str,
) -> Result<(&'static str, Vec<Line>), String> {
    let zones = zones.ok_or_else(|| format!("{tool} printed {text:?}"))?;
    Ok((tool, zones))
}

fn line(zone: &ZoneInfo) -> Line {
    Line {
        start: zone.start,
        len: Some(zone.len),
        capacity: zone.capacity,
        wp: has_pointer(zone.condition as u8).then_some(zone.wp),
        condition: zone.condition as u8,
        kind: zone.kind as u8,
        attributes: Some(bits(zone.attributes)),
    }
}

fn bits(attributes: Attributes) -> u8 {
    zns::Attributes::new()
        .with_zfc(attributes.finished_by_device)
        .with_fzr(attributes.recommended == Some(Recommendation::Finish))
        .with_rzr(attributes.recommended == Some(Recommendation::Reset))
        .with_zrwav(attributes.zrwa)
        .with_zdev(attributes.extension)
        .into_bits()
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

/// `start: 0x000000000, len 0x020000, cap 0x020000, wptr 0x000008 reset:0 non-seq:0, zcond: 2(oi) [type: 2(SEQ...)]`, in
/// sectors, the pointer from the zone's start.
fn blkzone(line: &str) -> Option<Line> {
    let after = |key: &str| line.split_once(key).map(|(_, rest)| rest.trim_start());
    let hex = |key: &str| {
        let digits = after(key)?.strip_prefix("0x")?;
        let end = digits.find(|c: char| !c.is_ascii_hexdigit())?;
        u64::from_str_radix(&digits[..end], 16).ok()?.checked_mul(512)
    };
    let number = |key: &str| after(key)?.split('(').next()?.trim().parse::<u8>().ok();
    let condition = number("zcond:")?;
    let start = hex("start:")?;
    Some(Line {
        start,
        len: Some(hex("len ")?),
        capacity: hex("cap ")?,
        wp: has_pointer(condition)
            .then(|| hex("wptr ")?.checked_add(start))
            .flatten(),
        condition,
        kind: number("type:")?,
        attributes: None,
    })
}

/// `SLBA: 0x100 WP: 0x101 Cap: 0xc0 State: 0x20 Type: 0x2 Attrs: 0 AttrsInfo: 0`, in blocks.
fn nvme(line: &str, block_size: u64) -> Option<Line> {
    let mut words = line.split_whitespace();
    let mut number = |key: &str| -> Option<u64> {
        (words.next()? == key).then_some(())?;
        let word = words.next()?;
        match word.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => word.parse().ok(),
        }
    };
    let (start, wp, capacity) = (number("SLBA:")?, number("WP:")?, number("Cap:")?);
    let (state, kind) = (number("State:")?, number("Type:")?);
    let attributes = number("Attrs:")?;
    let condition = u8::try_from(state >> 4).ok()?;
    Some(Line {
        start: start.checked_mul(block_size)?,
        len: None,
        capacity: capacity.checked_mul(block_size)?,
        wp: has_pointer(condition)
            .then(|| wp.checked_mul(block_size))
            .flatten(),
        condition,
        kind: u8::try_from(kind).ok()?,
        attributes: Some(u8::try_from(attributes).ok()?),
    })
}

/// Bytes that are printed as pairs of hexadecimal digits.
fn bytes(text: &str) -> Option<Vec<u8>> {
    text.split_whitespace()
        .map(|pair| u8::from_str_radix(pair, 16).ok())
        .collect()
}

/// The parameter data of REPORT ZONES: 64 bytes, then 64 for each zone, in blocks.
fn scsi(answer: &[u8], block_size: u64) -> Option<Vec<Line>> {
    let zone = |zone: &[u8]| {
        let number = |at: usize| Some(u64::from_be_bytes(zone.get(at..at + 8)?.try_into().ok()?));
        let place = |at: usize| number(at)?.checked_mul(block_size);
        let condition = zone.get(1)? >> 4;
        Some(Line {
            start: place(16)?,
            len: Some(place(8)?),
            capacity: place(8)?,
            wp: has_pointer(condition).then(|| place(24)).flatten(),
            condition,
            kind: zone.first()? & 15,
            attributes: None,
        })
    };
    answer.get(64..)?.chunks_exact(64).map(zone).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_blkzone_is_understood() {
        let text = "  start: 0x000040000, len 0x020000, cap 0x018000, wptr 0x000008 reset:0 non-seq:0, zcond: \
                    2(oi) [type: 2(SEQ_WRITE_REQUIRED)]";
        assert_eq!(
            blkzone(text),
            Some(Line {
                start: 128 << 20,
                len: Some(64 << 20),
                capacity: 48 << 20,
                wp: Some((128 << 20) + 4096),
                condition: 2,
                kind: 2,
                attributes: None,
            })
        );
        let full = text.replace("zcond: 2(oi)", "zcond:14(fu)");
        assert_eq!(blkzone(&full).unwrap().wp, None);
        assert_eq!(blkzone("blkzone: /dev/x: no such file"), None);
    }

    #[test]
    fn a_line_of_nvme_is_understood() {
        let text =
            "SLBA: 0x100      WP: 0x101      Cap: 0xc0       State: 0x20 Type: 0x2  Attrs: 0x8  AttrsInfo: 0";
        assert_eq!(
            nvme(text, 4096),
            Some(Line {
                start: 1 << 20,
                len: None,
                capacity: 768 << 10,
                wp: Some((1 << 20) + 4096),
                condition: 2,
                kind: 2,
                attributes: Some(8),
            })
        );
        assert_eq!(
            nvme(
                "SLBA: 0 WP: 0xffffffffffffffff Cap: 0xc0 State: 0xe0 Type: 0x2 Attrs: 0",
                512
            )
            .unwrap()
            .wp,
            None
        );
        assert_eq!(nvme("nr_zones: 8", 4096), None);
    }

    #[test]
    fn the_bytes_of_a_scsi_report_are_understood() {
        let mut report = [0u8; 128];
        (report[64], report[65]) = (3, 0x41);
        report[64 + 8..][..8].copy_from_slice(&0x2000u64.to_be_bytes());
        report[64 + 16..][..8].copy_from_slice(&0x4000u64.to_be_bytes());
        report[64 + 24..][..8].copy_from_slice(&0x4008u64.to_be_bytes());
        let text: Vec<String> = report.iter().map(|byte| format!("{byte:02x}")).collect();
        let zones = scsi(&bytes(&text.join(" ")).unwrap(), 512).unwrap();
        let expected = Line {
            start: 8 << 20,
            len: Some(4 << 20),
            capacity: 4 << 20,
            wp: Some((8 << 20) + 4096),
            condition: 4,
            kind: 3,
            attributes: None,
        };
        assert_eq!(zones, [expected]);
        assert_eq!(bytes("no digits"), None);
        assert_eq!(scsi(&[0; 63], 512), None);
    }
}
