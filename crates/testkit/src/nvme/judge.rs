//! Which status a rule of zones is due, as the Zoned Namespace Command Set has it.

use zbdkit_block::Error;
use zbdkit_spec::nvme::Status;
use zbdkit_zone::rules::Writable;
use zbdkit_zone::{ZoneError, ZoneInfo};

/// Which rules a command falls under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// What reads or writes data.
    Data,
    /// Zone Management Send.
    Manage,
    /// The commit of a random write area.
    Commit,
}

/// The controller answered otherwise than it should.
pub(super) fn wrong(got: impl std::fmt::Display, due: &str) -> Error {
    println!("the controller answered {got} where {due} was due");
    Error::Io {
        op: "an answer of the controller",
        errno: rustix::io::Errno::IO.raw_os_error(),
    }
}

/// What decides whether a zone takes a write.
pub(super) fn writable(info: &ZoneInfo) -> Writable {
    Writable {
        zone: info.zone,
        condition: info.condition,
        wp: info.wp,
        end: info.start + info.capacity,
    }
}

/// The status that ZNS has for a rule (Zoned Namespace Command Set 1.2, 3.1 and 3.4).
pub(super) fn due(rule: &ZoneError, kind: Kind) -> Status {
    match (rule, kind) {
        (ZoneError::Unaligned { .. }, Kind::Commit) => Status::INVALID_FIELD,
        (_, Kind::Commit) | (ZoneError::RandomWriteArea { .. }, _) => Status::INVALID_ZONE_OPERATION,
        (ZoneError::NotAtWritePointer { .. } | ZoneError::OutsideRandomWriteArea { .. }, _) => {
            Status::ZONE_INVALID_WRITE
        }
        (ZoneError::Boundary { .. } | ZoneError::ExceedsCapacity { .. }, _) => Status::ZONE_BOUNDARY_ERROR,
        (ZoneError::Full { .. }, Kind::Data) => Status::ZONE_IS_FULL,
        (ZoneError::ReadOnly { .. }, Kind::Data) => Status::ZONE_IS_READ_ONLY,
        (ZoneError::Offline { .. }, Kind::Data) => Status::ZONE_IS_OFFLINE,
        (
            ZoneError::InvalidTransition { .. }
            | ZoneError::Full { .. }
            | ZoneError::ReadOnly { .. }
            | ZoneError::Offline { .. },
            _,
        ) => Status::INVALID_ZONE_STATE_TRANSITION,
        (ZoneError::OutOfRange { .. }, _) => Status::LBA_OUT_OF_RANGE,
        _ => Status::INVALID_FIELD,
    }
}
