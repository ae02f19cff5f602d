//! From what went wrong to the status byte (virtio 1.3, 5.2.6).

use zbdkit_block::Error;
use zbdkit_spec::virtio_blk::Status;
use zbdkit_zone::ZoneError;

/// Which rules of the standard a failed request falls under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// IN.
    Read,
    /// OUT and zone append.
    Write,
    /// Zone management and report.
    Manage,
    /// Everything that has nothing to do with zones.
    Plain,
}

/// The status for a request that failed. Without `zoned`, the driver has not heard of zones and gets none of
/// their statuses.
pub(super) fn status_of(error: &Error, kind: Kind, zoned: bool) -> Status {
    let status = match error {
        Error::Zone(error) => zone_status(error, kind),
        Error::Io { .. }
        | Error::Epoch { .. }
        | Error::Format(_)
        | Error::ReadOnly
        | Error::Uncorrectable { .. }
        | Error::TooManyMarks { .. } => Status::IoErr,
        Error::NotSupported(_) => Status::Unsupp,
        Error::OutOfRange { .. } => out_of_range(kind),
        Error::Unaligned { .. } => unaligned(kind),
    };
    match status {
        Status::Ok | Status::IoErr | Status::Unsupp => status,
        _ if zoned => status,
        _ => Status::IoErr,
    }
}

fn zone_status(error: &ZoneError, kind: Kind) -> Status {
    match error {
        ZoneError::OutOfRange { .. } => out_of_range(kind),
        ZoneError::Unaligned { .. } => unaligned(kind),
        ZoneError::NotAtWritePointer { .. } | ZoneError::OutsideRandomWriteArea { .. } => {
            Status::ZoneUnalignedWp
        }
        ZoneError::TooManyOpen { .. } => Status::ZoneOpenResource,
        ZoneError::TooManyActive { .. } => Status::ZoneActiveResource,
        ZoneError::AppendUnsupported => Status::Unsupp,
        ZoneError::Boundary { .. }
        | ZoneError::ExceedsCapacity { .. }
        | ZoneError::Full { .. }
        | ZoneError::ReadOnly { .. }
        | ZoneError::Offline { .. }
        | ZoneError::Conventional { .. }
        | ZoneError::NotSequentialRequired { .. }
        | ZoneError::NotZoneStart { .. }
        | ZoneError::AppendTooLarge { .. }
        | ZoneError::InvalidTransition { .. }
        | ZoneError::RandomWriteArea { .. }
        | ZoneError::NoRandomWriteArea { .. }
        | ZoneError::NotRandomWritable { .. } => Status::ZoneInvalidCmd,
        // Not the driver's fault, and no rule of zones either.
        ZoneError::Poisoned { .. } => Status::IoErr,
    }
}

fn out_of_range(kind: Kind) -> Status {
    match kind {
        Kind::Manage => Status::ZoneInvalidCmd,
        Kind::Read | Kind::Write | Kind::Plain => Status::IoErr,
    }
}

/// "The offset and size alignment constraint for OUT and ZONE_APPEND" is the write granularity.
fn unaligned(kind: Kind) -> Status {
    match kind {
        Kind::Write => Status::ZoneUnalignedWp,
        Kind::Manage => Status::ZoneInvalidCmd,
        Kind::Read | Kind::Plain => Status::IoErr,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zbdkit_zone::ZoneNo;

    #[test]
    fn each_reason_has_its_own_status() {
        let zone = ZoneNo(3);
        let cases = [
            (
                ZoneError::NotAtWritePointer {
                    zone,
                    offset: 4096,
                    wp: 0,
                },
                Status::ZoneUnalignedWp,
            ),
            (
                ZoneError::Unaligned {
                    offset: 512,
                    len: 512,
                    granularity: 4096,
                },
                Status::ZoneUnalignedWp,
            ),
            (ZoneError::TooManyOpen { limit: 6 }, Status::ZoneOpenResource),
            (ZoneError::TooManyActive { limit: 8 }, Status::ZoneActiveResource),
            (ZoneError::Full { zone }, Status::ZoneInvalidCmd),
            (ZoneError::AppendUnsupported, Status::Unsupp),
            (ZoneError::Poisoned { zone }, Status::IoErr),
        ];
        for (error, status) in cases {
            assert_eq!(status_of(&error.into(), Kind::Write, true), status, "{error}");
        }
        assert_eq!(
            status_of(&Error::Epoch { errno: 5 }, Kind::Write, true),
            Status::IoErr
        );
        assert_eq!(status_of(&Error::ReadOnly, Kind::Write, true), Status::IoErr);
    }

    #[test]
    fn a_driver_without_zones_sees_none_of_their_statuses() {
        for limit in [1, 2] {
            let error = ZoneError::TooManyOpen { limit }.into();
            assert_eq!(status_of(&error, Kind::Write, false), Status::IoErr);
        }
        assert_eq!(
            status_of(&Error::NotSupported("discard"), Kind::Plain, false),
            Status::Unsupp
        );
    }
}
