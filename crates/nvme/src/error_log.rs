//! The Error Information log (Base Specification 2.1, 5.1.12.1.2).

use std::collections::VecDeque;

use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::command::{CompletionEntry, SubmissionEntry};
use zbdkit_spec::nvme::log::ErrorEntry;
use zerocopy::FromZeros;

use crate::status::Failure;

/// Entries kept, the newest.
pub(crate) const ERROR_LOG_ENTRIES: usize = 64;

/// The newest failures that are worth an entry, newest first.
#[derive(Debug, Default)]
pub(crate) struct ErrorLog {
    entries: VecDeque<ErrorEntry>,
    count: u64,
    media: u64,
}

impl ErrorLog {
    /// Whether a failure belongs into the log: what went wrong here, not what the host asked for in vain. Else a host
    /// that merely tries what there is would make the health report of a healthy device look bad.
    pub(crate) fn wants(failure: &Failure) -> bool {
        let media = is_media_error(failure.status);
        media
            || matches!(
                failure.status,
                Status::INTERNAL_ERROR | Status::DATA_TRANSFER_ERROR
            )
    }

    /// Adds a failure, which the logical block `lba` has, if any.
    pub(crate) fn add(&mut self, sqid: u16, entry: &SubmissionEntry, csi: u8, lba: u64, failure: &Failure) {
        self.count = self.count.saturating_add(1);
        if is_media_error(failure.status) {
            self.media = self.media.saturating_add(1);
        }
        let mut error = ErrorEntry::new_zeroed();
        error.error_count = self.count.into();
        error.sqid = sqid.into();
        error.cid = entry.cid;
        error.status = CompletionEntry::status_of(failure.field(), false);
        error.parameter_location = u16::MAX.into();
        if sqid != 0 {
            error.lba = lba.into();
        }
        error.nsid = entry.nsid;
        error.csi = csi;
        error.opcode = entry.opcode;
        error.lpver = 1;
        self.entries.truncate(ERROR_LOG_ENTRIES - 1);
        self.entries.push_front(error);
    }

    /// The entries, newest first.
    pub(crate) fn entries(&self) -> impl Iterator<Item = &ErrorEntry> {
        self.entries.iter()
    }

    /// Entries ever made.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Media errors ever.
    pub(crate) fn media_errors(&self) -> u64 {
        self.media
    }
}

/// Status code type 2, but for a comparison that only found what it asked for.
fn is_media_error(status: Status) -> bool {
    status.0 >> 8 == 2 && status != Status::COMPARE_FAILURE
}
