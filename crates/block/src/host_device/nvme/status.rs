//! What a drive's status means.

use zbdkit_spec::nvme::Status;
use zbdkit_zone::{Attributes, Condition, Counters, ZoneError, ZoneInfo, ZoneNo, ZoneType};

use super::facts::NamespaceFacts;
use crate::error::Error;

/// A command that failed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failed {
    /// What was tried.
    pub(super) op: &'static str,
    /// First byte of the request.
    pub(super) offset: u64,
    /// Its length, 0 where it has none.
    pub(super) len: u64,
}

impl Failed {
    /// The error that a status is. `zone` is where the request starts, as reported after it failed; the values of some errors
    /// come from there. Without a report they are those of a zone of which nothing is known.
    pub(super) fn error(self, status: Status, zone: Option<&ZoneInfo>, facts: &NamespaceFacts) -> Error {
        let Failed { op, offset, len } = self;
        let zone = zone.copied().unwrap_or_else(|| unknown(offset, facts));
        let no = zone.zone;
        let io = |errno| Error::Io { op, errno };
        match status {
            Status::ZONE_BOUNDARY_ERROR => {
                let end = zone.start.saturating_add(zone.len);
                let writable = zone.start.saturating_add(zone.capacity);
                match offset.saturating_add(len) <= end {
                    true => ZoneError::ExceedsCapacity {
                        zone: no,
                        offset,
                        len,
                        end: writable,
                    },
                    false => ZoneError::Boundary {
                        zone: no,
                        offset,
                        len,
                        end,
                    },
                }
                .into()
            }
            Status::ZONE_IS_FULL => ZoneError::Full { zone: no }.into(),
            Status::ZONE_IS_READ_ONLY => ZoneError::ReadOnly { zone: no }.into(),
            Status::ZONE_IS_OFFLINE => ZoneError::Offline { zone: no }.into(),
            Status::ZONE_INVALID_WRITE if zone.attributes.zrwa => ZoneError::OutsideRandomWriteArea {
                zone: no,
                offset,
                len,
                start: zone.wp,
                end: zone
                    .wp
                    .saturating_add(facts.zrwa.map_or(0, |area| area.size.saturating_mul(2))),
            }
            .into(),
            Status::ZONE_INVALID_WRITE => ZoneError::NotAtWritePointer {
                zone: no,
                offset,
                wp: zone.wp,
            }
            .into(),
            Status::TOO_MANY_ACTIVE_ZONES => ZoneError::TooManyActive {
                limit: facts.max_active,
            }
            .into(),
            Status::TOO_MANY_OPEN_ZONES => ZoneError::TooManyOpen {
                limit: facts.max_open,
            }
            .into(),
            Status::INVALID_ZONE_STATE_TRANSITION => ZoneError::InvalidTransition {
                zone: no,
                condition: zone.condition,
            }
            .into(),
            // An append to a zone with a random write area, or another area for a zone that has one.
            Status::INVALID_ZONE_OPERATION => ZoneError::RandomWriteArea { zone: no }.into(),
            Status::ZRWA_RESOURCES_UNAVAILABLE => ZoneError::NoRandomWriteArea { zone: no }.into(),
            Status::LBA_OUT_OF_RANGE => Error::OutOfRange {
                offset,
                len,
                size: facts.size,
            },
            Status::NAMESPACE_WRITE_PROTECTED | Status::ATTEMPTED_WRITE_TO_READ_ONLY_RANGE => io(libc::EROFS),
            Status::CAPACITY_EXCEEDED => io(libc::ENOSPC),
            Status::INVALID_OPCODE => io(libc::EOPNOTSUPP),
            Status::INVALID_FIELD | Status::INVALID_NAMESPACE_OR_FORMAT | Status::CONFLICTING_ATTRIBUTES => {
                io(libc::EINVAL)
            }
            Status::WRITE_FAULT
            | Status::UNRECOVERED_READ_ERROR
            | Status::ACCESS_DENIED
            | Status::DEALLOCATED_OR_UNWRITTEN => io(libc::ENODATA),
            Status::GUARD_CHECK_ERROR
            | Status::APPLICATION_TAG_CHECK_ERROR
            | Status::REFERENCE_TAG_CHECK_ERROR
            | Status::INVALID_PROTECTION_INFORMATION => io(libc::EILSEQ),
            Status::RESERVATION_CONFLICT => io(libc::EBADE),
            Status::INTERNAL_PATH_ERROR
            | Status::ANA_PERSISTENT_LOSS
            | Status::ANA_INACCESSIBLE
            | Status::ANA_TRANSITION
            | Status::CONTROLLER_PATHING_ERROR
            | Status::HOST_PATHING_ERROR => io(libc::ENOLINK),
            // Everything else says only that it failed.
            _ => io(libc::EIO),
        }
    }
}

fn unknown(offset: u64, facts: &NamespaceFacts) -> ZoneInfo {
    let number = u32::try_from(offset / facts.zone_size).unwrap_or(u32::MAX);
    let start = u64::from(number).saturating_mul(facts.zone_size);
    ZoneInfo {
        zone: ZoneNo(number),
        start,
        len: facts.zone_size,
        capacity: facts.zone_size,
        wp: start,
        written_end: start,
        kind: ZoneType::SequentialRequired,
        condition: Condition::Empty,
        counters: Counters::default(),
        attributes: Attributes::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_device::nvme::facts::ZrwaFacts;
    use crate::host_device::nvme::facts::tests_support::facts;

    const START: u64 = 0x4000 * 4096;
    const ZONE: ZoneInfo = ZoneInfo {
        zone: ZoneNo(1),
        start: START,
        len: 0x4000 * 4096,
        capacity: 0x3000 * 4096,
        wp: START + 8192,
        written_end: START + 8192,
        kind: ZoneType::SequentialRequired,
        condition: Condition::Closed,
        counters: Counters {
            resets: 0,
            finishes: 0,
            bytes_written: 0,
        },
        attributes: Attributes {
            finished_by_device: false,
            recommended: None,
            zrwa: false,
            extension: false,
        },
    };

    fn error(status: Status, offset: u64, len: u64) -> Error {
        let failed = Failed {
            op: "write",
            offset,
            len,
        };
        failed.error(status, Some(&ZONE), &facts())
    }

    #[test]
    fn every_status_of_zones_has_its_own_error() {
        let zone = ZoneNo(1);
        let (offset, len) = (START + 4096, 4096);
        let condition = Condition::Closed;
        let wp = START + 8192;
        for (status, expected) in [
            (
                Status::INVALID_ZONE_OPERATION,
                ZoneError::RandomWriteArea { zone },
            ),
            (
                Status::ZRWA_RESOURCES_UNAVAILABLE,
                ZoneError::NoRandomWriteArea { zone },
            ),
            (Status::ZONE_IS_FULL, ZoneError::Full { zone }),
            (Status::ZONE_IS_READ_ONLY, ZoneError::ReadOnly { zone }),
            (Status::ZONE_IS_OFFLINE, ZoneError::Offline { zone }),
            (
                Status::ZONE_INVALID_WRITE,
                ZoneError::NotAtWritePointer { zone, offset, wp },
            ),
            (
                Status::TOO_MANY_ACTIVE_ZONES,
                ZoneError::TooManyActive { limit: 4 },
            ),
            (Status::TOO_MANY_OPEN_ZONES, ZoneError::TooManyOpen { limit: 3 }),
            (
                Status::INVALID_ZONE_STATE_TRANSITION,
                ZoneError::InvalidTransition { zone, condition },
            ),
        ] {
            assert_eq!(error(status, offset, len), Error::Zone(expected));
        }
    }

    #[test]
    fn a_write_that_misses_an_area_is_told_where_that_is() {
        let zone = ZoneInfo {
            attributes: Attributes {
                zrwa: true,
                ..ZONE.attributes
            },
            ..ZONE
        };
        let facts = NamespaceFacts {
            zrwa: Some(ZrwaFacts {
                areas: 2,
                size: 16 * 4096,
                granularity: 4096,
                explicit_flush: true,
            }),
            ..facts()
        };
        let (op, offset, len) = ("write", START, 4096);
        let failed = Failed { op, offset, len };
        let expected = ZoneError::OutsideRandomWriteArea {
            zone: ZoneNo(1),
            offset,
            len,
            start: START + 8192,
            end: START + 8192 + 32 * 4096,
        };
        assert_eq!(
            failed.error(Status::ZONE_INVALID_WRITE, Some(&zone), &facts),
            expected.into()
        );
    }

    #[test]
    fn a_boundary_is_the_capacity_or_the_next_zone() {
        let (zone, writable, end) = (ZoneNo(1), START + 0x3000 * 4096, START + 0x4000 * 4096);
        let (offset, len) = (writable - 4096, 8192);
        let expected = ZoneError::ExceedsCapacity {
            zone,
            offset,
            len,
            end: writable,
        };
        assert_eq!(
            error(Status::ZONE_BOUNDARY_ERROR, offset, len),
            Error::Zone(expected)
        );
        let (offset, len) = (end - 4096, 8192);
        let expected = ZoneError::Boundary {
            zone,
            offset,
            len,
            end,
        };
        assert_eq!(
            error(Status::ZONE_BOUNDARY_ERROR, offset, len),
            Error::Zone(expected)
        );
    }

    #[test]
    fn the_reason_is_kept_where_the_zone_cannot_be_reported() {
        let (op, offset, len) = ("write", START + 4096, 4096);
        let error = Failed { op, offset, len }.error(Status::ZONE_IS_FULL, None, &facts());
        assert_eq!(error, Error::Zone(ZoneError::Full { zone: ZoneNo(1) }));
        let offset = u64::MAX;
        let error = Failed { op, offset, len }.error(Status::LBA_OUT_OF_RANGE, None, &facts());
        assert!(matches!(error, Error::OutOfRange { .. }));
    }

    #[test]
    fn a_status_that_nobody_knows_is_an_io_error() {
        assert_eq!(error(Status(0x7ff), START, 4096).errno(), libc::EIO);
        assert_eq!(
            error(Status::UNRECOVERED_READ_ERROR, START, 4096).errno(),
            libc::ENODATA
        );
    }
}
