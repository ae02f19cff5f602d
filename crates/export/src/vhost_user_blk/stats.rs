//! Counts of requests, by kind. Each queue counts for itself, so that counting is a plain load and store.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Requests since the server started, by kind. A failed request counts as one of its kind and as an error.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
        }

        /// The counters of one queue, written by its thread only.
        #[derive(Debug, Default)]
        pub(super) struct QueueStats {
            $(pub(super) $name: Counter,)*
        }

        impl QueueStats {
            /// Adds what this queue counted to `sum`.
            pub(super) fn add_to(&self, sum: &mut Stats) {
                $(sum.$name += self.$name.0.load(Ordering::Relaxed);)*
            }
        }
    };
}

counters! {
    /// IN.
    reads,
    /// OUT.
    writes,
    /// ZONE_APPEND.
    appends,
    /// FLUSH.
    flushes,
    /// DISCARD.
    discards,
    /// WRITE_ZEROES.
    write_zeroes,
    /// Zone open, close, finish, reset, reset all.
    zone_management,
    /// ZONE_REPORT.
    zone_reports,
    /// GET_ID, and whatever is not supported.
    others,
    /// Requests that ended with another status than OK.
    errors,
    /// Bytes read.
    bytes_read,
    /// Bytes written and appended.
    bytes_written,
}

/// A count with one writer.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, n: u64) {
        self.0
            .store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }
}
