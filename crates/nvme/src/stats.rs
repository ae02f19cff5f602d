//! What the SMART log counts. Each queue counts for itself, so that counting is a plain load and store.

use std::sync::atomic::{AtomicU64, Ordering};

/// A count with one writer.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters of one queue, written by its thread only.
#[derive(Debug, Default)]
pub(crate) struct QueueStats {
    pub(crate) reads: Counter,
    pub(crate) writes: Counter,
    pub(crate) bytes_read: Counter,
    pub(crate) bytes_written: Counter,
}

/// The sum over queues.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) bytes_read: u64,
    pub(crate) bytes_written: u64,
}

impl Totals {
    pub(crate) fn add(&mut self, queue: &QueueStats) {
        self.reads += queue.reads.get();
        self.writes += queue.writes.get();
        self.bytes_read += queue.bytes_read.get();
        self.bytes_written += queue.bytes_written.get();
    }
}
