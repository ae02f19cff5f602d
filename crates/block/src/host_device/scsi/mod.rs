//! Host-aware SCSI disks, whose zones Linux does not show any more since 6.8: zones are reported and managed by commands
//! of our own (SG_IO), bytes go by the block device as on any disk. ZBC-2; ATA disks are the same behind Linux's
//! translation.

mod report;
mod status;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use zbdkit_io::{File, unblock};
use zbdkit_spec::scsi::{
    BlockDeviceCharacteristics, InquiryCdb, NOT_REPORTED, ReportZonesCdb, SenseKey, VpdPage, ZoneOut,
    ZoneOutCdb, Zoned, ZonedCharacteristics, ZonedFlags,
};
use zbdkit_zone::{Model, ZoneInfo, ZoneType};
use zerocopy::big_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

use self::report::{Place, bytes_of};
use super::drive::{Drive, DriveFacts};
use super::sg::{self, Outcome};
use super::sysfs::{BlockFacts, ZoneFacts};
use crate::error::Error;
use crate::node::{Request, ZoneOp};
use status::error;

/// Zones reported by one command at most: a quarter of a MiB of answer.
const REPORT_MAX: usize = 4096;

/// A device answers that something happened (a reset, another host) once before it carries a command out again; several of
/// them may have piled up.
const ATTENTIONS: usize = 8;

/// Bytes that are asked of an INQUIRY page.
const PAGE_BYTES: u16 = 64;

/// A host-aware disk.
pub struct ScsiDrive {
    facts: DriveFacts,
    file: File,
}

/// What a disk says about how its zones are used best (page B6h; ZBC-2, 6.5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZoneAdvice {
    /// How many sequential-preferred zones are best open at a time, where it says so.
    pub open: Option<u32>,
    /// How many of them are best written otherwise than in sequence, where it says so.
    pub non_sequential: Option<u32>,
    /// Sequential-required zones can be read above their pointers (URSWRZ).
    pub reads_above_pointer: bool,
}

impl ZoneAdvice {
    /// What the disk at a path advises; `None` where it has no page for that, or cannot be asked. Blocks until it has
    /// answered.
    pub fn of_disk(path: &Path) -> Option<ZoneAdvice> {
        let disk = looked_at(path).ok()?;
        let cdb = InquiryCdb::vpd(VpdPage::ZONED_BLOCK_DEVICE_CHARACTERISTICS, PAGE_BYTES);
        match attentive(disk.as_fd(), cdb.as_bytes(), PAGE_BYTES.into()).ok()? {
            (Outcome::Good(came), data) => advice(data.get(..came)?),
            _ => None,
        }
    }
}

impl ScsiDrive {
    /// The drive behind an opened whole disk, whose zones [`zone_facts`] has found.
    pub fn new(facts: DriveFacts, file: File) -> ScsiDrive {
        ScsiDrive { facts, file }
    }

    fn place(&self) -> Place {
        Place {
            block_size: self.facts.block_size,
            zone_size: self.facts.zones.zone_size,
        }
    }

    async fn manage(&self, op: &'static str, action: ZoneOut, zone_start: Option<u64>) -> Result<(), Error> {
        let block_size = u64::from(self.facts.block_size);
        let cdb = ZoneOutCdb::new(action, zone_start.map(|start| start / block_size));
        let outcome = execute(&self.file, op, cdb.as_bytes(), 0).await?;
        match outcome {
            (Outcome::Good(_), _) => Ok(()),
            (failed, _) => Err(error(op, failed, zone_start, &self.facts)),
        }
    }
}

impl Drive for ScsiDrive {
    fn facts(&self) -> &DriveFacts {
        &self.facts
    }

    fn file(&self) -> &File {
        &self.file
    }

    fn report<'a>(&'a self, from: u64, max: usize) -> Request<'a, Vec<ZoneInfo>> {
        Box::pin(report(&self.file, self.place(), from, max))
    }

    fn zone_op<'a>(&'a self, op: ZoneOp, zone_start: u64, _len: u64) -> Request<'a, ()> {
        let (name, action) = match op {
            ZoneOp::Open => ("zone open", ZoneOut::OPEN_ZONE),
            ZoneOp::Close(_) => ("zone close", ZoneOut::CLOSE_ZONE),
            ZoneOp::Finish | ZoneOp::FinishUnlimited => ("zone finish", ZoneOut::FINISH_ZONE),
            ZoneOp::Reset => ("zone reset", ZoneOut::RESET_WRITE_POINTER),
            ZoneOp::OpenZrwa => {
                return Box::pin(async { Err(Error::NotSupported("a zone random write area")) });
            }
            ZoneOp::SetReadOnly | ZoneOp::SetOffline | ZoneOp::SetNormal => {
                return Box::pin(async { Err(Error::NotSupported("setting a zone's condition")) });
            }
            ZoneOp::FinishByDevice | ZoneOp::Recommend(_) => {
                return Box::pin(async { Err(Error::NotSupported("setting a zone's attributes")) });
            }
        };
        Box::pin(self.manage(name, action, Some(zone_start)))
    }

    fn reset_all<'a>(&'a self) -> Request<'a, ()> {
        Box::pin(self.manage("zone reset of all zones", ZoneOut::RESET_WRITE_POINTER, None))
    }
}

/// Whether a disk may have zones that the kernel does not show.
fn may_hide_zones(disk: &BlockFacts) -> bool {
    disk.name.starts_with("sd") && disk.partition_of.is_none() && disk.zones.is_none()
}

/// Has the disk at a path say whether it has zones that the kernel does not show, and adds them to its facts. A disk that
/// cannot be opened for reading is not asked.
///
/// # Errors
/// The disk is host-aware and reports zones that make no sense.
pub(super) fn ask(path: &Path, facts: &mut BlockFacts) -> io::Result<()> {
    if may_hide_zones(facts)
        && let Ok(disk) = looked_at(path)
    {
        facts.zones = zone_facts(disk.as_fd(), facts)?;
        facts.zones_by_command = facts.zones.is_some();
    }
    Ok(())
}

/// Opens a disk for a look: one without a medium must not keep us.
fn looked_at(path: &Path) -> io::Result<std::fs::File> {
    let mut options = std::fs::File::options();
    options
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    options.open(path)
}

/// The zones of a disk, if it is a host-aware SCSI disk. `None` for any other disk, and for one that cannot be asked.
/// Blocks until it has answered.
///
/// # Errors
/// The disk is host-aware and reports zones that make no sense.
pub fn zone_facts(fd: BorrowedFd<'_>, disk: &BlockFacts) -> io::Result<Option<ZoneFacts>> {
    let place = Place {
        block_size: disk.logical_block_size,
        zone_size: 0,
    };
    let said = zoned(fd);
    if !matches!(said, Some(Zoned::HOST_AWARE | Zoned::NOT_REPORTED)) {
        return Ok(None);
    }
    // Linux's scsi_debug leaves the page's field empty. Then a disk that reports such zones is host-aware.
    let zones = match first_zones(fd, place) {
        Some(zones) if said == Some(Zoned::HOST_AWARE) || zones.iter().any(is_preferred) => zones,
        Some(_) => return Ok(None),
        None if said == Some(Zoned::NOT_REPORTED) => return Ok(None),
        None => return Err(nonsense()),
    };
    let zone_size = zones.first().map_or(0, |zone| zone.len);
    if zone_size == 0 {
        return Err(nonsense());
    }
    Ok(Some(ZoneFacts {
        model: Model::HostAware,
        zone_size,
        nr_zones: u32::try_from(disk.size.div_ceil(zone_size)).map_err(|_| nonsense())?,
        // Host-aware disks have a best number of open zones, and no limit: they close what they must.
        max_open: 0,
        max_active: 0,
        max_append: 0,
        write_granularity: disk.logical_block_size,
    }))
}

fn is_preferred(zone: &ZoneInfo) -> bool {
    zone.kind == ZoneType::SequentialPreferred
}

fn nonsense() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "its zone report makes no sense")
}

/// What the disk says of zones (page B1h). A disk that does not know that page, or takes no commands, says nothing at
/// all.
fn zoned(fd: BorrowedFd<'_>) -> Option<Zoned> {
    let cdb = InquiryCdb::vpd(VpdPage::BLOCK_DEVICE_CHARACTERISTICS, PAGE_BYTES);
    let (Outcome::Good(came), data) = attentive(fd, cdb.as_bytes(), PAGE_BYTES.into()).ok()? else {
        return None;
    };
    let (page, _) = BlockDeviceCharacteristics::read_from_prefix(data.get(..came)?).ok()?;
    let is_it = VpdPage(page.header.page) == VpdPage::BLOCK_DEVICE_CHARACTERISTICS;
    is_it.then(|| page.zoned())
}

fn advice(page: &[u8]) -> Option<ZoneAdvice> {
    let (page, _) = ZonedCharacteristics::read_from_prefix(page).ok()?;
    let number = |count: U32| (count.get() != NOT_REPORTED).then_some(count.get());
    (VpdPage(page.header.page) == VpdPage::ZONED_BLOCK_DEVICE_CHARACTERISTICS).then(|| ZoneAdvice {
        open: number(page.optimal_open_preferred),
        non_sequential: number(page.optimal_non_sequential_preferred),
        reads_above_pointer: ZonedFlags::from_bits(page.flags).urswrz(),
    })
}

/// The first zones of the disk, if it reports any.
fn first_zones(fd: BorrowedFd<'_>, place: Place) -> Option<Vec<ZoneInfo>> {
    let len = bytes_of(REPORT_MAX);
    let cdb = ReportZonesCdb::partial(0, len as u32);
    let (Outcome::Good(came), data) = attentive(fd, cdb.as_bytes(), len).ok()? else {
        return None;
    };
    report::parse(data.get(..came)?, place)
}

/// REPORT ZONES from the zone that holds byte `from`.
async fn report(file: &File, place: Place, from: u64, max: usize) -> Result<Vec<ZoneInfo>, Error> {
    let op = "zone report";
    let len = bytes_of(max.clamp(1, REPORT_MAX));
    let cdb = ReportZonesCdb::partial(from / u64::from(place.block_size), len as u32);
    let (outcome, data) = execute(file, op, cdb.as_bytes(), len).await?;
    let zones = match outcome {
        Outcome::Good(came) => report::parse(data.get(..came).unwrap_or_default(), place),
        failed => return Err(status::unspecific(op, failed)),
    };
    zones.ok_or(Error::Io {
        op: "making sense of the zone report",
        errno: libc::EIO,
    })
}

/// Has the disk carry out a command on a helper thread. Data comes from the disk, `len` bytes at most.
async fn execute(file: &File, op: &'static str, cdb: &[u8], len: usize) -> Result<(Outcome, Vec<u8>), Error> {
    let (file, cdb) = (file.clone(), cdb.to_vec());
    let outcome = unblock(move || match file.as_fd() {
        Some(fd) => attentive(fd, &cdb, len),
        None => Err(io::ErrorKind::Unsupported.into()),
    });
    outcome.await.map_err(|error| Error::io(op, &error))
}

/// Sends a command again where the disk wanted to say something else first.
fn attentive(fd: BorrowedFd<'_>, cdb: &[u8], len: usize) -> io::Result<(Outcome, Vec<u8>)> {
    let mut data = vec![0; len];
    let mut outcome = sg::execute(fd, cdb, &mut data)?;
    for _ in 0..ATTENTIONS {
        match outcome {
            Outcome::Refused(_, Some(sense)) if sense.key == SenseKey::UNIT_ATTENTION => {
                outcome = sg::execute(fd, cdb, &mut data)?;
            }
            _ => break,
        }
    }
    Ok((outcome, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_taken_from_its_page_and_none_is_none() {
        let mut page = vec![0; 64];
        page[..5].copy_from_slice(&[0, 0xb6, 0, 0x3c, 1]);
        page[8..16].copy_from_slice(&[0, 0, 0, 128, 0xff, 0xff, 0xff, 0xff]);
        let expected = ZoneAdvice {
            open: Some(128),
            non_sequential: None,
            reads_above_pointer: true,
        };
        assert_eq!(advice(&page), Some(expected));
        assert_eq!(advice(&page[..12]), None);
        page[1] = 0xb1;
        assert_eq!(advice(&page), None, "another page");
    }
}
