//! What the SMART log counts. Each queue counts for itself, so that counting is a plain load and store.

use std::sync::Arc;
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

/// The counters of a controller: of the queues that there are, and the sum of those that were.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    queues: Vec<Arc<QueueStats>>,
    gone: Totals,
}

impl Stats {
    /// Counters for a new queue. A host may make and delete queues as often as it likes, so those of deleted ones are
    /// added up and forgotten.
    pub(crate) fn queue(&mut self) -> Arc<QueueStats> {
        let gone = &mut self.gone;
        self.queues.retain(|queue| {
            let alive = Arc::strong_count(queue) > 1;
            if !alive {
                gone.add(queue);
            }
            alive
        });
        let queue = Arc::new(QueueStats::default());
        self.queues.push(queue.clone());
        queue
    }

    /// What all of them have counted.
    pub(crate) fn totals(&self) -> Totals {
        let mut totals = self.gone;
        self.queues.iter().for_each(|queue| totals.add(queue));
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_deleted_queues_counted_stays_and_they_do_not() {
        let mut stats = Stats::default();
        for _ in 0..10 {
            stats.queue().reads.add(2);
        }
        let last = stats.queue();
        last.reads.add(1);
        assert_eq!((stats.totals().reads, stats.queues.len()), (21, 1));
    }
}
