//! Rules of zones and filters of reports in terms of the Zoned Namespace Command Set.

use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::zns::ReportFilter;
use zbdkit_zone::rules::Writable;
use zbdkit_zone::{Condition, Filter, ZoneError, ZoneInfo};

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
        (ZoneError::OutsideRandomWriteArea { .. }, Kind::Commit) => Status::ZONE_BOUNDARY_ERROR,
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

/// Which zones a report shows that has a filter of ours.
pub(super) fn report_filter(filter: Filter) -> ReportFilter {
    let Filter::Only(condition) = filter else {
        return ReportFilter::ALL;
    };
    match condition {
        Condition::Empty => ReportFilter::EMPTY,
        Condition::ImplicitlyOpen => ReportFilter::IMPLICITLY_OPENED,
        Condition::ExplicitlyOpen => ReportFilter::EXPLICITLY_OPENED,
        Condition::Closed => ReportFilter::CLOSED,
        Condition::Full => ReportFilter::FULL,
        Condition::ReadOnly => ReportFilter::READ_ONLY,
        Condition::Offline => ReportFilter::OFFLINE,
        // No namespace has such zones, and there is no filter for them.
        Condition::NotWritePointer => ReportFilter::ALL,
    }
}
