//! What a pass found.

use std::fmt;
use std::ops::AddAssign;

use super::CheckReport;

/// Messages of one pass; what is more is only counted.
const MESSAGES: usize = 1000;

/// The findings of a pass, by what can be done about them.
#[derive(Default)]
pub struct Found {
    pub report: CheckReport,
    /// Corruptions of the refcount table and its blocks.
    pub structure: u64,
    /// Clusters whose refcount is too low.
    pub low: u64,
    /// Snapshot table entries that a newly written table would not have.
    pub snapshot_entries: u64,
    /// Places whose refcounts could not be read.
    pub unreadable_blocks: u64,
    unlisted: u64,
}

/// Findings that are done away with.
#[derive(Clone, Copy, Default)]
pub struct Mended {
    pub corruptions: u64,
    pub leaks: u64,
}

impl AddAssign for Mended {
    fn add_assign(&mut self, other: Mended) {
        self.corruptions += other.corruptions;
        self.leaks += other.leaks;
    }
}

impl Found {
    /// A line for the user.
    pub fn say(&mut self, what: fmt::Arguments<'_>) {
        if self.report.messages.len() < MESSAGES {
            self.report.messages.push(what.to_string());
        } else {
            self.unlisted += 1;
        }
    }

    /// A contradiction.
    pub fn corruption(&mut self, what: fmt::Arguments<'_>) {
        self.report.corruptions += 1;
        self.say(what);
    }

    /// A contradiction that new refcount structures do away with.
    pub fn structure(&mut self, what: fmt::Arguments<'_>) {
        self.structure += 1;
        self.corruption(what);
    }

    /// Something that could not be looked at.
    pub fn error(&mut self, what: fmt::Arguments<'_>) {
        self.report.check_errors += 1;
        self.say(what);
    }

    /// Something that wastes space and harms nothing.
    pub fn leak(&mut self, what: fmt::Arguments<'_>) {
        self.report.leaks += 1;
        self.say(what);
    }

    /// So many of the corruptions are no more.
    pub fn fixed(&mut self, corruptions: u64) {
        self.report.corruptions -= corruptions.min(self.report.corruptions);
        self.report.corruptions_fixed += corruptions;
    }

    /// So much is no more.
    pub fn mended(&mut self, mended: Mended) {
        self.fixed(mended.corruptions);
        self.report.leaks -= mended.leaks.min(self.report.leaks);
        self.report.leaks_fixed += mended.leaks;
    }

    /// None of the leaks is any more.
    pub fn fixed_leaks(&mut self) {
        self.report.leaks_fixed += std::mem::take(&mut self.report.leaks);
    }

    pub fn into_report(mut self) -> CheckReport {
        if self.unlisted > 0 {
            let line = format!("and {} more findings", self.unlisted);
            self.report.messages.push(line);
        }
        self.report
    }
}
