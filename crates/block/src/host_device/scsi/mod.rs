//! Host-aware SCSI disks, whose zones Linux does not show any more since 6.8: zones are reported and managed by commands
//! of our own (SG_IO), bytes go by the block device as on any disk. ZBC-2; ATA disks are the same behind Linux's
//! translation.

mod report;
mod status;

use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use zbdkit_io::{File, unblock};
use zbdkit_spec::scsi::{
    BlockDeviceCharacteristics, InquiryCdb, ReportZonesCdb, SenseKey, VpdPage, ZoneOut, ZoneOutCdb, Zoned,
};
use zbdkit_zone::{Model, ZoneInfo, ZoneType};
use zerocopy::{FromBytes, IntoBytes};

use self::report::{Place, bytes_of};
use super::drive::{Drive, DriveFacts};
use super::sg::{self, Outcome};
use super::sysfs::{BlockFacts, ZoneFacts};
use crate::error::{Error, OpenError};
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

impl ScsiDrive {
    /// The drive behind an opened whole disk, if it is a host-aware SCSI disk. `None` for any other disk, and for one that
    /// cannot be asked.
    ///
    /// # Errors
    /// The disk says that it is host-aware and does not report its zones, or not in a way that makes sense.
    pub async fn probe(
        path: PathBuf,
        disk: &BlockFacts,
        file: File,
        read_only: bool,
    ) -> Result<Option<ScsiDrive>, OpenError> {
        let place = Place {
            block_size: disk.logical_block_size,
            zone_size: 0,
        };
        let is_disk = disk.name.starts_with("sd") && disk.partition_of.is_none();
        if !is_disk || !is_host_aware(&file, place).await {
            return Ok(None);
        }
        let first = report(&file, place, 0, 1).await?;
        let zone_size = first.first().map_or(0, |zone| zone.len);
        let nr_zones = disk
            .size
            .checked_div(zone_size)
            .map(|whole| whole + u64::from(!disk.size.is_multiple_of(zone_size)))
            .and_then(|zones| u32::try_from(zones).ok());
        let Some(nr_zones) = nr_zones else {
            return Err(OpenError::data(&path, "its zone report makes no sense"));
        };
        let facts = DriveFacts {
            path,
            size: disk.size,
            block_size: disk.logical_block_size,
            read_only: read_only || disk.read_only,
            zones: ZoneFacts {
                model: Model::HostAware,
                zone_size,
                nr_zones,
                // Host-aware disks have a best number of open zones, and no limit: they close what they must.
                max_open: 0,
                max_active: 0,
                max_append: 0,
                write_granularity: disk.logical_block_size,
            },
        };
        Ok(Some(ScsiDrive { facts, file }))
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
            ZoneOp::Finish => ("zone finish", ZoneOut::FINISH_ZONE),
            ZoneOp::Reset => ("zone reset", ZoneOut::RESET_WRITE_POINTER),
            ZoneOp::SetReadOnly | ZoneOp::SetOffline | ZoneOp::SetNormal => {
                return Box::pin(async { Err(Error::NotSupported("setting a zone's condition")) });
            }
        };
        Box::pin(self.manage(name, action, Some(zone_start)))
    }

    fn reset_all<'a>(&'a self) -> Request<'a, ()> {
        Box::pin(self.manage("zone reset of all zones", ZoneOut::RESET_WRITE_POINTER, None))
    }
}

/// What the disk says of zones (page B1h). A disk that does not know that page, or takes no commands, says nothing at
/// all.
async fn zoned(file: &File) -> Option<Zoned> {
    let cdb = InquiryCdb::vpd(VpdPage::BLOCK_DEVICE_CHARACTERISTICS, PAGE_BYTES);
    let answer = execute(file, "inquiry", cdb.as_bytes(), PAGE_BYTES.into()).await;
    let Ok((Outcome::Good(came), data)) = answer else {
        return None;
    };
    let (page, _) = BlockDeviceCharacteristics::read_from_prefix(data.get(..came)?).ok()?;
    let is_it = VpdPage(page.header.page) == VpdPage::BLOCK_DEVICE_CHARACTERISTICS;
    is_it.then(|| page.zoned())
}

/// Whether the disk is host-aware. Where its page leaves that open, as Linux's scsi_debug does, it is if it reports
/// such zones.
async fn is_host_aware(file: &File, place: Place) -> bool {
    match zoned(file).await {
        Some(Zoned::HOST_AWARE) => true,
        Some(Zoned::NOT_REPORTED) => {
            let is_preferred = |zone: &ZoneInfo| zone.kind == ZoneType::SequentialPreferred;
            let zones = report(file, place, 0, REPORT_MAX).await;
            zones.is_ok_and(|zones| zones.iter().any(is_preferred))
        }
        _ => false,
    }
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
        None => Err(std::io::ErrorKind::Unsupported.into()),
    });
    outcome.await.map_err(|error| Error::io(op, &error))
}

/// Sends a command again where the disk wanted to say something else first.
fn attentive(fd: BorrowedFd<'_>, cdb: &[u8], len: usize) -> std::io::Result<(Outcome, Vec<u8>)> {
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
