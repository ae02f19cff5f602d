//! What a SCSI disk's answers mean.

use zbdkit_spec::scsi::{AdditionalSense, Sense, SenseKey, Status};
use zbdkit_zone::{ZoneError, ZoneNo};

use crate::error::Error;
use crate::host_device::drive::DriveFacts;
use crate::host_device::sg::Outcome;

/// The error of a command for the zone that starts at `zone_start`, or for all of them.
pub(super) fn error(op: &'static str, failed: Outcome, zone_start: Option<u64>, facts: &DriveFacts) -> Error {
    let (Outcome::Refused(_, Some(sense)), Some(start)) = (failed, zone_start) else {
        return unspecific(op, failed);
    };
    let number = start.checked_div(facts.zones.zone_size).unwrap_or(0);
    let zone = ZoneNo(u32::try_from(number).unwrap_or(u32::MAX));
    match sense.additional {
        AdditionalSense::INSUFFICIENT_ZONE_RESOURCES => ZoneError::TooManyOpen {
            limit: facts.zones.max_open,
        }
        .into(),
        AdditionalSense::ZONE_IS_READ_ONLY => ZoneError::ReadOnly { zone }.into(),
        AdditionalSense::ZONE_IS_OFFLINE => ZoneError::Offline { zone }.into(),
        AdditionalSense::LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE => Error::OutOfRange {
            offset: start,
            len: 0,
            size: facts.size,
        },
        _ => unspecific(op, failed),
    }
}

/// The error of a command that is about no zone, or that failed for no reason of zones.
pub(super) fn unspecific(op: &'static str, failed: Outcome) -> Error {
    let errno = match failed {
        Outcome::Refused(_, Some(Sense { key, additional })) => match key {
            SenseKey::ILLEGAL_REQUEST if additional == AdditionalSense::INVALID_COMMAND_OPERATION_CODE => {
                libc::EOPNOTSUPP
            }
            SenseKey::ILLEGAL_REQUEST => libc::EINVAL,
            SenseKey::DATA_PROTECT => libc::EROFS,
            SenseKey::MEDIUM_ERROR => libc::ENODATA,
            _ => libc::EIO,
        },
        Outcome::Refused(Status::BUSY | Status::TASK_SET_FULL, None) => libc::EBUSY,
        Outcome::Refused(Status::RESERVATION_CONFLICT, None) => libc::EBADE,
        Outcome::Lost(_) => libc::ENOLINK,
        Outcome::Good(_) | Outcome::Refused(..) => libc::EIO,
    };
    Error::Io { op, errno }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_device::sysfs::ZoneFacts;
    use zbdkit_zone::Model;

    fn failed(key: SenseKey, additional: AdditionalSense) -> Error {
        let facts = DriveFacts {
            path: "/dev/sdb".into(),
            size: 1 << 30,
            block_size: 512,
            read_only: false,
            zones: ZoneFacts {
                model: Model::HostAware,
                zone_size: 64 << 20,
                nr_zones: 16,
                max_open: 0,
                max_active: 0,
                max_append: 0,
                write_granularity: 512,
            },
            zns: zbdkit_zone::Zns::NONE,
        };
        let outcome = Outcome::Refused(Status::CHECK_CONDITION, Some(Sense { key, additional }));
        error("zone open", outcome, Some(128 << 20), &facts)
    }

    #[test]
    fn reasons_of_zones_are_kept() {
        use AdditionalSense as A;
        let zone = ZoneNo(2);
        for (additional, expected) in [
            (
                A::INSUFFICIENT_ZONE_RESOURCES,
                ZoneError::TooManyOpen { limit: 0 },
            ),
            (A::ZONE_IS_READ_ONLY, ZoneError::ReadOnly { zone }),
            (A::ZONE_IS_OFFLINE, ZoneError::Offline { zone }),
        ] {
            assert_eq!(failed(SenseKey::DATA_PROTECT, additional), Error::Zone(expected));
        }
    }

    #[test]
    fn other_refusals_have_the_errno_of_their_kind() {
        let errno = |key, additional| failed(key, additional).errno();
        assert_eq!(
            errno(
                SenseKey::ILLEGAL_REQUEST,
                AdditionalSense::INVALID_COMMAND_OPERATION_CODE
            ),
            libc::EOPNOTSUPP
        );
        assert_eq!(
            errno(SenseKey::ILLEGAL_REQUEST, AdditionalSense::INVALID_FIELD_IN_CDB),
            libc::EINVAL
        );
        assert_eq!(
            errno(SenseKey::HARDWARE_ERROR, AdditionalSense(0x4400)),
            libc::EIO
        );
    }
}
