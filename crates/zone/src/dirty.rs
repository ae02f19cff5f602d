//! Which zones' records changed since somebody last asked: one bit a zone and a summary above it, so that
//! asking costs little where few changed.

use crate::sync::{AtomicU64, Ordering};
use crate::types::ZoneNo;

pub(crate) struct Dirty {
    zones: Box<[AtomicU64]>,
    summary: Box<[AtomicU64]>,
}

impl Dirty {
    pub(crate) fn new(zones: u32) -> Self {
        let words = zones.div_ceil(64);
        let zeros = |n: u32| (0..n).map(|_| AtomicU64::new(0)).collect();
        Self {
            zones: zeros(words),
            summary: zeros(words.div_ceil(64)),
        }
    }

    /// Marks a zone. Called under the zone's lock, after its record changed.
    pub(crate) fn mark(&self, zone: ZoneNo) {
        let word = zone.0 / 64;
        let bit = 1 << (zone.0 % 64);
        // Seen set, the bit was set by an earlier holder of this lock and is not taken yet: who takes it will
        // read the record under the lock after us.
        if self.zones[word as usize].load(Ordering::Relaxed) & bit == 0 {
            self.zones[word as usize].fetch_or(bit, Ordering::AcqRel);
            self.summary[(word / 64) as usize].fetch_or(1 << (word % 64), Ordering::AcqRel);
        }
    }

    /// Clears one zone's mark.
    pub(crate) fn clear(&self, zone: ZoneNo) {
        self.zones[(zone.0 / 64) as usize].fetch_and(!(1 << (zone.0 % 64)), Ordering::AcqRel);
    }

    /// Clears each mark, in ascending order, and names its zone.
    pub(crate) fn take(&self, mut sink: impl FnMut(ZoneNo)) {
        for (i, summary) in self.summary.iter().enumerate() {
            if summary.load(Ordering::Acquire) == 0 {
                continue;
            }
            for word in bits(summary.swap(0, Ordering::AcqRel)).map(|bit| i * 64 + bit) {
                for bit in bits(self.zones[word].swap(0, Ordering::AcqRel)) {
                    sink(ZoneNo((word * 64 + bit) as u32));
                }
            }
        }
    }
}

/// The positions of the set bits, ascending.
fn bits(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        (word != 0).then(|| {
            word &= word - 1;
            bit as usize
        })
    })
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    #[test]
    fn each_marked_zone_is_taken_once_in_order() {
        let dirty = Dirty::new(10_000);
        let marked = [9_999, 0, 63, 64, 4095, 4096, 63];
        marked.iter().for_each(|&zone| dirty.mark(ZoneNo(zone)));
        let take = || {
            let mut taken = Vec::new();
            dirty.take(|zone| taken.push(zone.0));
            taken
        };
        assert_eq!(take(), [0, 63, 64, 4095, 4096, 9_999]);
        assert_eq!(take(), []);
        dirty.mark(ZoneNo(64));
        assert_eq!(take(), [64]);
    }
}
