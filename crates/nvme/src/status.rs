//! How commands end: completions, and the map from what went wrong to a status.

use rustix::io::Errno;
use zbdkit_block::Error;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::StatusField;
use zbdkit_zone::ZoneError;

/// What goes into a completion queue entry, as far as the transport does not know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Command specific: dword 0 in the low half, dword 1 in the high one.
    pub result: u64,
    /// The status field, without phase tag.
    pub status: StatusField,
}

impl Completion {
    /// Success.
    pub const fn success(result: u64) -> Completion {
        Completion {
            result,
            status: StatusField::new(),
        }
    }

    /// Whether the command succeeded.
    pub const fn is_success(&self) -> bool {
        self.status.status().0 == Status::SUCCESS.0
    }
}

impl From<Failure> for Completion {
    fn from(failure: Failure) -> Completion {
        Completion {
            result: failure.result,
            status: failure.field(),
        }
    }
}

/// How a command failed. Made of a [`Status`], it says "do not retry" where that is what the status means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The status, never success.
    pub status: Status,
    /// Do not retry: the same command would fail again.
    pub dnr: bool,
    /// Command specific: dwords 0 and 1, as in [`Completion`].
    pub result: u64,
    /// The first byte of the namespace that could not be had, where that is known and not the command's first.
    pub offset: Option<u64>,
}

impl Failure {
    /// One that may be gone at the next try.
    pub const fn passing(status: Status) -> Failure {
        Failure {
            status,
            dnr: false,
            result: 0,
            offset: None,
        }
    }

    /// One that stays.
    pub const fn lasting(status: Status) -> Failure {
        Failure {
            status,
            dnr: true,
            result: 0,
            offset: None,
        }
    }

    /// The same with what the command says besides.
    pub const fn with_result(mut self, result: u64) -> Failure {
        self.result = result;
        self
    }

    /// The status field.
    pub const fn field(self) -> StatusField {
        StatusField::of(self.status).with_dnr(self.dnr)
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Failure {
        match status {
            // Nobody but the moment is to blame.
            Status::DATA_TRANSFER_ERROR
            | Status::INTERNAL_ERROR
            | Status::ABORTED_POWER_LOSS
            | Status::ABORT_REQUESTED
            | Status::ABORTED_SQ_DELETION
            | Status::COMMAND_INTERRUPTED
            | Status::TRANSIENT_TRANSPORT_ERROR
            | Status::NAMESPACE_NOT_READY
            | Status::FORMAT_IN_PROGRESS
            | Status::WRITE_FAULT
            | Status::UNRECOVERED_READ_ERROR
            | Status::ASYNC_EVENT_REQUEST_LIMIT_EXCEEDED
            | Status::ABORT_COMMAND_LIMIT_EXCEEDED => Failure::passing(status),
            status => Failure::lasting(status),
        }
    }
}

/// Which rules a failed request falls under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Read, Compare, Verify, the sources of Copy.
    Read,
    /// Whatever writes data.
    Write,
    /// Zone Management Send and Receive.
    Manage,
    /// The same, where the zone is to get a random write area.
    Allocate,
    /// The commit of a random write area.
    Commit,
}

/// The status of a request of the block graph that failed.
pub(crate) fn failure(error: &Error, kind: Kind) -> Failure {
    let storage = match kind {
        Kind::Read => Status::UNRECOVERED_READ_ERROR,
        Kind::Write => Status::WRITE_FAULT,
        Kind::Manage | Kind::Allocate | Kind::Commit => Status::INTERNAL_ERROR,
    };
    match error {
        Error::Zone(error) => Failure::lasting(zone_status(error, kind)),
        Error::Io { errno, .. } if *errno == Errno::NOSPC.raw_os_error() => {
            Failure::lasting(Status::CAPACITY_EXCEEDED)
        }
        Error::Io { .. } => Failure::passing(storage),
        // Stays so until the image is opened again.
        Error::Epoch { .. } => Failure::lasting(storage),
        Error::Format(_) => Failure::lasting(Status::INTERNAL_ERROR),
        Error::NotSupported(_) => Failure::lasting(Status::INVALID_OPCODE),
        Error::Uncorrectable { offset } => Failure {
            offset: Some(*offset),
            ..Failure::lasting(Status::UNRECOVERED_READ_ERROR)
        },
        // There is no status for a list that is full.
        Error::TooManyMarks { .. } => Failure::lasting(Status::CAPACITY_EXCEEDED),
        Error::ReadOnly => Failure::lasting(Status::NAMESPACE_WRITE_PROTECTED),
        Error::OutOfRange { .. } => Failure::lasting(Status::LBA_OUT_OF_RANGE),
        Error::Unaligned { .. } => Failure::lasting(Status::INVALID_FIELD),
    }
}

/// Zoned Namespace Command Set 1.2, 3.4 and 4.1.
fn zone_status(error: &ZoneError, kind: Kind) -> Status {
    let condition = |status| match kind {
        // What an action does not allow is a transition that is none.
        Kind::Manage | Kind::Allocate => Status::INVALID_ZONE_STATE_TRANSITION,
        // Whatever makes it impossible.
        Kind::Commit => Status::INVALID_ZONE_OPERATION,
        Kind::Read | Kind::Write => status,
    };
    match error {
        ZoneError::OutOfRange { .. } => Status::LBA_OUT_OF_RANGE,
        ZoneError::Boundary { .. } | ZoneError::ExceedsCapacity { .. } => Status::ZONE_BOUNDARY_ERROR,
        ZoneError::NotAtWritePointer { .. } => Status::ZONE_INVALID_WRITE,
        ZoneError::OutsideRandomWriteArea { .. } => match kind {
            // The end of a commit, as in QEMU.
            Kind::Manage | Kind::Allocate | Kind::Commit => Status::ZONE_BOUNDARY_ERROR,
            Kind::Read | Kind::Write => Status::ZONE_INVALID_WRITE,
        },
        ZoneError::Full { .. } => condition(Status::ZONE_IS_FULL),
        ZoneError::ReadOnly { .. } => condition(Status::ZONE_IS_READ_ONLY),
        ZoneError::Offline { .. } => condition(Status::ZONE_IS_OFFLINE),
        ZoneError::TooManyOpen { .. } => Status::TOO_MANY_OPEN_ZONES,
        ZoneError::TooManyActive { .. } => Status::TOO_MANY_ACTIVE_ZONES,
        ZoneError::InvalidTransition { .. } => Status::INVALID_ZONE_STATE_TRANSITION,
        ZoneError::RandomWriteArea { .. } | ZoneError::NotRandomWritable { .. } => {
            Status::INVALID_ZONE_OPERATION
        }
        ZoneError::NoRandomWriteArea { .. } => Status::ZRWA_RESOURCES_UNAVAILABLE,
        // The write pointer is where no area can begin.
        ZoneError::Unaligned { .. } if kind == Kind::Allocate => Status::INVALID_ZONE_OPERATION,
        ZoneError::Unaligned { .. }
        | ZoneError::NotZoneStart { .. }
        | ZoneError::AppendTooLarge { .. }
        // Namespaces have no such zones.
        | ZoneError::Conventional { .. }
        | ZoneError::NotSequentialRequired { .. } => Status::INVALID_FIELD,
        ZoneError::AppendUnsupported => Status::INVALID_OPCODE,
        // Not the host's fault, and no rule of zones either.
        ZoneError::Poisoned { .. } => Status::INTERNAL_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zbdkit_zone::{Condition, ZoneNo};

    #[test]
    fn each_reason_has_its_own_status() {
        let zone = ZoneNo(3);
        let (offset, len, end) = (4096, 4096, 4096);
        let cases = [
            (
                ZoneError::Boundary {
                    zone,
                    offset,
                    len,
                    end,
                },
                Status::ZONE_BOUNDARY_ERROR,
            ),
            (
                ZoneError::ExceedsCapacity {
                    zone,
                    offset,
                    len,
                    end,
                },
                Status::ZONE_BOUNDARY_ERROR,
            ),
            (
                ZoneError::NotAtWritePointer { zone, offset, wp: 0 },
                Status::ZONE_INVALID_WRITE,
            ),
            (ZoneError::Full { zone }, Status::ZONE_IS_FULL),
            (ZoneError::ReadOnly { zone }, Status::ZONE_IS_READ_ONLY),
            (ZoneError::Offline { zone }, Status::ZONE_IS_OFFLINE),
            (ZoneError::TooManyOpen { limit: 1 }, Status::TOO_MANY_OPEN_ZONES),
            (
                ZoneError::TooManyActive { limit: 1 },
                Status::TOO_MANY_ACTIVE_ZONES,
            ),
            (
                ZoneError::RandomWriteArea { zone },
                Status::INVALID_ZONE_OPERATION,
            ),
            (
                ZoneError::NoRandomWriteArea { zone },
                Status::ZRWA_RESOURCES_UNAVAILABLE,
            ),
            (ZoneError::NotZoneStart { offset }, Status::INVALID_FIELD),
        ];
        for (error, status) in cases {
            assert_eq!(
                failure(&error.into(), Kind::Write),
                Failure::lasting(status),
                "{error}"
            );
        }
    }

    #[test]
    fn an_action_that_the_condition_does_not_allow_is_an_invalid_transition() {
        let zone = ZoneNo(3);
        let condition = Condition::Full;
        for error in [
            ZoneError::Full { zone },
            ZoneError::ReadOnly { zone },
            ZoneError::Offline { zone },
            ZoneError::InvalidTransition { zone, condition },
        ] {
            let status = failure(&error.into(), Kind::Manage).status;
            assert_eq!(status, Status::INVALID_ZONE_STATE_TRANSITION, "{error}");
        }
    }

    #[test]
    fn only_what_may_pass_may_be_retried() {
        let io = |errno: Errno| Error::Io {
            op: "write",
            errno: errno.raw_os_error(),
        };
        assert_eq!(
            failure(&io(Errno::IO), Kind::Write),
            Failure::passing(Status::WRITE_FAULT)
        );
        assert_eq!(
            failure(&io(Errno::IO), Kind::Read),
            Failure::passing(Status::UNRECOVERED_READ_ERROR)
        );
        assert_eq!(
            failure(&io(Errno::NOSPC), Kind::Write),
            Failure::lasting(Status::CAPACITY_EXCEEDED)
        );
        assert_eq!(
            failure(&Error::Epoch { errno: 5 }, Kind::Write),
            Failure::lasting(Status::WRITE_FAULT)
        );
        assert_eq!(
            failure(&Error::ReadOnly, Kind::Write).status,
            Status::NAMESPACE_WRITE_PROTECTED
        );
        let marked = failure(&Error::Uncorrectable { offset: 4096 }, Kind::Read);
        assert_eq!(
            (marked.status, marked.dnr, marked.offset),
            (Status::UNRECOVERED_READ_ERROR, true, Some(4096))
        );
        assert!(!Failure::from(Status::ABORT_REQUESTED).dnr);
        assert!(Failure::from(Status::INVALID_FIELD).dnr);
        assert_eq!(Failure::from(Status::INVALID_FIELD).field().into_bits(), 0x4002);
    }
}
