//! A zoned drive as the kernel's block layer shows it: blkzoned ioctls.

use std::io;
use std::os::fd::BorrowedFd;

use zbdkit_io::{File, unblock};
use zbdkit_spec::blkzoned::{
    CLOSE_ZONE, FINISH_ZONE, OPEN_ZONE, REPORT_CAPACITY, RESET_ZONE, SECTOR_SIZE, Zone, ZoneRange,
    zone_condition, zone_type,
};
use zbdkit_zone::{Attributes, Condition, Counters, ZoneInfo, ZoneNo, ZoneType};

use super::drive::{Drive, DriveFacts};
use super::ioctl;
use crate::error::Error;
use crate::node::{Request, ZoneOp};

/// Zones reported by one ioctl at most: a quarter of a MiB of answer.
const REPORT_MAX: usize = 4096;

/// A zoned block device.
pub struct BlockDrive {
    facts: DriveFacts,
    file: File,
}

impl BlockDrive {
    /// The drive behind an opened whole disk.
    pub fn new(facts: DriveFacts, file: File) -> BlockDrive {
        BlockDrive { facts, file }
    }

    /// Runs an ioctl on a helper thread.
    async fn ioctl<T: Send + 'static>(
        &self,
        op: &'static str,
        call: impl FnOnce(BorrowedFd<'_>) -> io::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let file = self.file.clone();
        let result = unblock(move || match file.as_fd() {
            Some(fd) => call(fd),
            None => Err(io::ErrorKind::Unsupported.into()),
        });
        result.await.map_err(|error| Error::io(op, &error))
    }

    async fn manage(&self, op: &'static str, request: u32, start: u64, len: u64) -> Result<(), Error> {
        let range = ZoneRange {
            sector: start / SECTOR_SIZE,
            nr_sectors: len / SECTOR_SIZE,
        };
        self.ioctl(op, move |fd| ioctl::manage(fd, request, range)).await
    }
}

impl Drive for BlockDrive {
    fn facts(&self) -> &DriveFacts {
        &self.facts
    }

    fn file(&self) -> &File {
        &self.file
    }

    fn report<'a>(&'a self, from: u64, max: usize) -> Request<'a, Vec<ZoneInfo>> {
        Box::pin(async move {
            let max = max.clamp(1, REPORT_MAX) as u32;
            let sector = from / SECTOR_SIZE;
            let (flags, zones) = self
                .ioctl("zone report", move |fd| ioctl::report(fd, sector, max))
                .await?;
            let zone_size = self.facts.zones.zone_size;
            zones
                .iter()
                .map(|zone| {
                    zone_info(zone, flags, zone_size).ok_or(Error::Io {
                        op: "making sense of the zone report",
                        errno: libc::EIO,
                    })
                })
                .collect()
        })
    }

    fn zone_op<'a>(&'a self, op: ZoneOp, zone_start: u64, len: u64) -> Request<'a, ()> {
        Box::pin(async move {
            let (name, request) = match op {
                ZoneOp::Open => ("zone open", OPEN_ZONE),
                ZoneOp::Close(_) => ("zone close", CLOSE_ZONE),
                ZoneOp::Finish | ZoneOp::FinishUnlimited => ("zone finish", FINISH_ZONE),
                ZoneOp::Reset => ("zone reset", RESET_ZONE),
                ZoneOp::OpenZrwa => return Err(Error::NotSupported("a zone random write area")),
                ZoneOp::SetReadOnly | ZoneOp::SetOffline | ZoneOp::SetNormal => {
                    return Err(Error::NotSupported("setting a zone's condition"));
                }
                ZoneOp::FinishByDevice | ZoneOp::Recommend(_) => {
                    return Err(Error::NotSupported("setting a zone's attributes"));
                }
            };
            self.manage(name, request, zone_start, len).await
        })
    }

    fn reset_all<'a>(&'a self) -> Request<'a, ()> {
        // The kernel makes one command of a reset of the whole disk where the drive has one.
        Box::pin(self.manage("zone reset of all zones", RESET_ZONE, 0, self.facts.size))
    }
}

/// A zone as the kernel describes it; `None` where that makes no sense.
pub(super) fn zone_info(zone: &Zone, flags: u32, zone_size: u64) -> Option<ZoneInfo> {
    let bytes = |sectors: u64| sectors.checked_mul(SECTOR_SIZE);
    let (start, len) = (bytes(zone.start)?, bytes(zone.len)?);
    // Kernels before 5.9 report no capacity.
    let capacity = match flags & REPORT_CAPACITY {
        0 => len,
        _ => bytes(zone.capacity)?.min(len),
    };
    let kind = match zone.kind {
        zone_type::CONVENTIONAL => ZoneType::Conventional,
        zone_type::SEQWRITE_REQ => ZoneType::SequentialRequired,
        zone_type::SEQWRITE_PREF => ZoneType::SequentialPreferred,
        _ => return None,
    };
    let condition = match zone.condition {
        zone_condition::NOT_WP => Condition::NotWritePointer,
        zone_condition::EMPTY => Condition::Empty,
        zone_condition::IMP_OPEN => Condition::ImplicitlyOpen,
        zone_condition::EXP_OPEN => Condition::ExplicitlyOpen,
        zone_condition::CLOSED => Condition::Closed,
        zone_condition::READONLY => Condition::ReadOnly,
        zone_condition::FULL => Condition::Full,
        zone_condition::OFFLINE => Condition::Offline,
        _ => return None,
    };
    let end = start.checked_add(len)?;
    let wp = match condition {
        Condition::NotWritePointer | Condition::Empty => start,
        // Drivers differ in what they say of a full zone, whose pointer means nothing; it is one thing here.
        Condition::Full => start + capacity,
        // Valid pointers only: read-only and offline zones may show anything.
        _ => bytes(zone.wp)
            .filter(|wp| (start..=end).contains(wp))
            .unwrap_or(start),
    };
    Some(ZoneInfo {
        zone: ZoneNo(u32::try_from(start.checked_div(zone_size)?).ok()?),
        start,
        len,
        capacity,
        wp,
        written_end: wp,
        kind,
        condition,
        counters: Counters::default(),
        attributes: Attributes::default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZONE: Zone = Zone {
        start: 0x40000,
        len: 0x20000,
        wp: 0x40008,
        kind: zone_type::SEQWRITE_REQ,
        condition: zone_condition::CLOSED,
        non_seq: 0,
        reset: 0,
        reserved0: [0; 4],
        capacity: 0x18000,
        reserved1: [0; 24],
    };

    fn info(zone: Zone, flags: u32) -> Option<ZoneInfo> {
        zone_info(&zone, flags, 64 << 20)
    }

    #[test]
    fn sectors_become_bytes() {
        let zone = info(ZONE, REPORT_CAPACITY).unwrap();
        assert_eq!(
            (zone.zone, zone.start, zone.len, zone.capacity, zone.wp),
            (ZoneNo(2), 128 << 20, 64 << 20, 48 << 20, (128 << 20) + 4096)
        );
        assert_eq!(
            (zone.kind, zone.condition),
            (ZoneType::SequentialRequired, Condition::Closed)
        );
    }

    #[test]
    fn without_a_reported_capacity_it_is_the_size() {
        let zone = info(Zone { capacity: 0, ..ZONE }, 0).unwrap();
        assert_eq!(zone.capacity, zone.len);
    }

    #[test]
    fn pointers_that_mean_nothing_are_not_shown() {
        let wp = |condition, wp| {
            info(
                Zone {
                    condition,
                    wp,
                    ..ZONE
                },
                REPORT_CAPACITY,
            )
            .unwrap()
            .wp
        };
        let start = 128 << 20;
        assert_eq!(wp(zone_condition::FULL, 0x60000), start + (48 << 20));
        assert_eq!(wp(zone_condition::OFFLINE, u64::MAX), start);
        assert_eq!(wp(zone_condition::READONLY, 0x40010), start + 8192);
        assert_eq!(wp(zone_condition::CLOSED, 0x80000), start, "outside of the zone");
    }

    #[test]
    fn a_report_that_makes_no_sense_is_none() {
        assert_eq!(info(Zone { kind: 9, ..ZONE }, 0), None);
        assert_eq!(info(Zone { condition: 7, ..ZONE }, 0), None);
        assert_eq!(
            info(
                Zone {
                    start: u64::MAX,
                    ..ZONE
                },
                0
            ),
            None
        );
        assert_eq!(
            info(
                Zone {
                    len: u64::MAX / 512,
                    ..ZONE
                },
                0
            ),
            None,
            "ends nowhere"
        );
        assert_eq!(zone_info(&ZONE, 0, 0), None);
    }
}
