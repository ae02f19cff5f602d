//! `zbdkit check /dev/X`: whether and how zbdkit can use a device of this machine.
//!
//! Here is how it is found out; what follows from it is in [`super::findings`].

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::Context;
use zbdkit_block::host_device::sysfs::{DeviceNumber, Sysfs};
use zbdkit_block::host_device::{Access, Look, ZoneAdvice, is_claimed, users};
use zbdkit_block::{Limits, OpenOptions};
use zbdkit_zone::{Condition, ZoneType};

use super::findings::{Counts, Examination, image_of};
use crate::image::{Session, graph_of};
use crate::output::{Out, describe};

/// Whether IMAGE is a device rather than an image that may lie on one.
pub fn is_device(path: &Path) -> bool {
    let Ok(metadata) = std::fs::metadata(path) else {
        return false;
    };
    let kind = metadata.file_type();
    if kind.is_char_device() {
        return true;
    }
    kind.is_block_device() && (is_zoned(metadata.rdev()) || !holds_image(path))
}

fn is_zoned(rdev: u64) -> bool {
    let facts = Sysfs::default().device(DeviceNumber::of(rdev));
    facts.is_ok_and(|facts| facts.zones.is_some())
}

/// Whether a block device begins as a qcow2 image does, or has a zone table beside it.
fn holds_image(path: &Path) -> bool {
    use io::Read;
    let mut magic = [0; 4];
    let begins = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    (begins.is_ok() && u32::from_be_bytes(magic) == zbdkit_spec::qcow2::MAGIC)
        || zbdkit_block::default_sidecar(path).exists()
}

/// Looks at the device and tells; `true` if zbdkit can use it.
pub fn run(path: &Path, json: bool, quiet: bool) -> anyhow::Result<bool> {
    let examination = examine(path)?;
    let report = examination.report();
    let mut out = Out::new();
    if json {
        out.json(&report)?;
    } else {
        out.text(report.lines(quiet))?;
    }
    out.flush()?;
    Ok(report.usable)
}

fn examine(path: &Path) -> anyhow::Result<Examination> {
    let metadata = std::fs::metadata(path).with_context(|| path.display().to_string())?;
    let facts = match metadata.file_type().is_block_device() {
        true => Some(
            Sysfs::default()
                .device(DeviceNumber::of(metadata.rdev()))
                .with_context(|| path.display().to_string())?,
        ),
        false => None,
    };
    let access = Access::to(path).with_context(|| path.display().to_string())?;
    // Mounts and swap are told by the kernel's name, whatever link leads to it.
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let (claimed, denied) = match facts.as_ref().filter(|_| access.read).map(|_| is_claimed(path)) {
        Some(Ok(claimed)) => (Some(claimed), None),
        Some(Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => {
            (None, Some(error.to_string()))
        }
        Some(Err(_)) | None => (None, None),
    };
    let readable = access.read && denied.is_none();
    let zones = facts.as_ref().filter(|_| readable).and_then(|facts| {
        let zones = facts.zones?;
        Some(counts(path, zones.zone_size, facts.size).map_err(|error| error.to_string()))
    });
    let partition = facts
        .as_ref()
        .is_some_and(|facts| facts.zones.is_some() && facts.partition_of.is_some());
    let hopeless = !readable || claimed == Some(true) || partition;
    let opened = (!hopeless).then(|| open(path).map_err(|error| describe(&error)));
    Ok(Examination {
        path: path.to_owned(),
        access,
        denied,
        group: group_name(access.group),
        users: facts
            .as_ref()
            .map(|facts| users(facts, &real, Path::new("/proc")))
            .unwrap_or_default(),
        claimed,
        zones,
        // Disks that the kernel shows as zoned say all of it there.
        advice: facts
            .as_ref()
            .filter(|facts| readable && facts.zones.is_none())
            .and_then(|_| ZoneAdvice::of_disk(path)),
        opened,
        facts,
    })
}

/// Opens it as a door would, only without the right to write, and looks at its limits.
fn open(path: &Path) -> anyhow::Result<Limits> {
    let options = OpenOptions {
        read_only: true,
        direct: true,
        ..OpenOptions::default()
    };
    let graph = graph_of(image_of(path).as_ref(), true)?;
    Session::new()?.with(&graph, &options, async |device| Ok(device.limits().clone()))
}

fn counts(path: &Path, zone_size: u64, size: u64) -> io::Result<Counts> {
    let look = Look::at(path, zone_size)?;
    let mut counts = Counts::default();
    let mut from = 0;
    while from < size {
        let zones = look.report(from)?;
        for zone in &zones {
            counts.conventional += u32::from(zone.kind == ZoneType::Conventional);
            match zone.condition {
                Condition::Offline => counts.offline += 1,
                Condition::ReadOnly => counts.read_only += 1,
                Condition::ImplicitlyOpen | Condition::ExplicitlyOpen => counts.open += 1,
                _ => {}
            }
        }
        // A report that does not go on would keep us for ever.
        match zones.last().map(|zone| zone.start.saturating_add(zone.len)) {
            Some(end) if end > from => from = end,
            _ => break,
        }
    }
    Ok(counts)
}

/// The name of a group, from the machine's own list.
fn group_name(group: u32) -> Option<String> {
    let groups = std::fs::read_to_string("/etc/group").ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(group)).then(|| name.to_owned())
    })
}
