//! Marked blocks: their reads fail until they are written again (NVMe: Write Uncorrectable).
//!
//! Who has them in hand sees to it that they last; here is only what they are. Images without any pay one load of a flag
//! for each request.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use zbdkit_qcow2::{AsyncGuard, AsyncMutex};
use zbdkit_spec::sidecar::MAX_MARKS;

use crate::error::Error;
use crate::zoned::lock;

/// Ranges of bytes, ascending, as few as there can be. None goes over a border of zones, so that zones can be taken out
/// of a list that is full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MarkList {
    ranges: Vec<Range<u64>>,
    /// There is a border at each multiple of this.
    zone_size: u64,
}

impl Default for MarkList {
    /// That of a device without zones, with nothing marked.
    fn default() -> MarkList {
        MarkList::new(u64::MAX)
    }
}

impl MarkList {
    /// Nothing is marked in zones of this size.
    pub fn new(zone_size: u64) -> MarkList {
        MarkList {
            ranges: Vec::new(),
            zone_size,
        }
    }

    /// A list that somebody else has kept; `None` unless the ranges are what those of a list are.
    pub fn of(zone_size: u64, ranges: Vec<Range<u64>>) -> Option<MarkList> {
        let mut list = MarkList::new(zone_size);
        let is_one = |range: &Range<u64>| {
            range.start < range.end && range.start / zone_size == (range.end - 1) / zone_size
        };
        let apart = ranges.windows(2).all(|pair| {
            pair[0].end < pair[1].start || pair[0].end == pair[1].start && list.borders_at(pair[1].start)
        });
        let fits = apart && ranges.iter().all(is_one) && ranges.len() <= MAX_MARKS;
        list.ranges = ranges;
        fits.then_some(list)
    }

    fn borders_at(&self, at: u64) -> bool {
        at.is_multiple_of(self.zone_size)
    }

    /// The ranges.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// Whether nothing is marked.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Bytes that are marked.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }

    /// The first marked bytes of a range.
    pub fn first_in(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let first = self.ranges.partition_point(|marked| marked.end <= range.start);
        let marked = self.ranges.get(first).filter(|marked| marked.start < range.end)?;
        Some(marked.start.max(range.start)..marked.end.min(range.end))
    }

    /// The same with a range marked.
    #[must_use]
    pub fn with(&self, range: Range<u64>) -> MarkList {
        let mut list = self.clone();
        let mut at = range.start;
        // Of a list that is too long for certain, it does not matter how long it is.
        while at < range.end && list.ranges.len() <= MAX_MARKS {
            let border = (at / self.zone_size + 1).saturating_mul(self.zone_size);
            let end = range.end.min(border);
            list.add(at..end);
            at = end;
        }
        list
    }

    /// Marks a range of one zone.
    fn add(&mut self, mut new: Range<u64>) {
        let before = |marked: &Range<u64>| {
            marked.end < new.start || marked.end == new.start && self.borders_at(new.start)
        };
        let reached = |marked: &Range<u64>| {
            marked.start < new.end || marked.start == new.end && !self.borders_at(new.end)
        };
        let first = self.ranges.partition_point(before);
        let behind = self.ranges.partition_point(reached);
        if first < behind {
            new.start = new.start.min(self.ranges[first].start);
            new.end = new.end.max(self.ranges[behind - 1].end);
        }
        self.ranges.splice(first..behind, [new]);
    }

    /// The same with nothing marked in a range.
    #[must_use]
    pub fn without(&self, gone: &Range<u64>) -> MarkList {
        let left = |marked: &Range<u64>| {
            let before = marked.start..marked.end.min(gone.start);
            let after = marked.start.max(gone.end)..marked.end;
            [before, after].into_iter().filter(|part| part.start < part.end)
        };
        MarkList {
            ranges: self.ranges.iter().flat_map(left).collect(),
            zone_size: self.zone_size,
        }
    }
}

/// The marked blocks of a device in use.
pub struct Marks {
    /// Whether there are any.
    any: AtomicBool,
    list: Mutex<MarkList>,
    /// Whoever changes the list has it from its look at the list to the end of the change.
    turn: AsyncMutex<()>,
}

impl Marks {
    /// Those of a list.
    pub fn new(list: MarkList) -> Marks {
        Marks {
            any: AtomicBool::new(!list.is_empty()),
            list: Mutex::new(list),
            turn: AsyncMutex::new(()),
        }
    }

    /// The list as it is now.
    pub fn list(&self) -> MarkList {
        lock(&self.list).clone()
    }

    /// Fails where a read of the range would touch a marked block.
    pub fn check_readable(&self, range: Range<u64>) -> Result<(), Error> {
        match self.first_in(&range) {
            None => Ok(()),
            Some(marked) => Err(Error::Uncorrectable { offset: marked.start }),
        }
    }

    /// The first marked bytes of a range.
    pub fn first_in(&self, range: &Range<u64>) -> Option<Range<u64>> {
        if self.any.load(Ordering::Acquire) {
            lock(&self.list).first_in(range)
        } else {
            None
        }
    }

    /// The right to change the list.
    pub async fn turn(&self) -> AsyncGuard<'_, ()> {
        self.turn.lock().await
    }

    /// What the list becomes by a change, if there is room for it.
    pub fn after(&self, change: impl FnOnce(&MarkList) -> MarkList) -> Result<MarkList, Error> {
        fitting(change(&lock(&self.list)))
    }

    /// Puts a list in the place of the one before. Only by whoever has its turn.
    pub fn set(&self, list: MarkList) {
        let mut current = lock(&self.list);
        self.any.store(!list.is_empty(), Ordering::Release);
        *current = list;
    }

    /// Changes a list that nobody keeps.
    pub fn change(&self, change: impl FnOnce(&MarkList) -> MarkList) -> Result<(), Error> {
        let mut current = lock(&self.list);
        *current = fitting(change(&current))?;
        self.any.store(!current.is_empty(), Ordering::Release);
        Ok(())
    }
}

fn fitting(list: MarkList) -> Result<MarkList, Error> {
    match list.ranges.len() <= MAX_MARKS {
        true => Ok(list),
        false => Err(Error::TooManyMarks { most: MAX_MARKS }),
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a list may have one range")]
mod tests {
    use super::*;

    fn list(ranges: &[Range<u64>]) -> MarkList {
        MarkList::of(16, ranges.to_vec()).expect("a list")
    }

    #[test]
    fn ranges_that_touch_in_a_zone_are_one_and_a_hole_makes_two() {
        let both = list(&[0..4, 8..12]);
        assert_eq!(both.with(4..8), list(&[0..12]));
        assert_eq!(both.with(5..7), list(&[0..4, 5..7, 8..12]));
        assert_eq!(both.with(2..20), list(&[0..16, 16..20]));
        assert_eq!(both.with(12..16).with(16..17), list(&[0..4, 8..16, 16..17]));
        assert_eq!(both.without(&(1..2)), list(&[0..1, 2..4, 8..12]));
        assert_eq!(both.without(&(0..20)), MarkList::new(16));
        assert_eq!(both.first_in(&(4..9)), Some(8..9));
        assert_eq!(both.first_in(&(4..8)), None);
        assert_eq!(both.bytes(), 8);
    }

    #[test]
    fn what_is_no_list_is_not_taken_for_one() {
        let backwards = Range { start: 5, end: 3 };
        for ranges in [
            vec![0..4, 4..8],
            vec![8..12, 0..4],
            vec![3..3],
            vec![backwards],
            vec![8..20],
        ] {
            assert_eq!(MarkList::of(16, ranges), None);
        }
        let many = |n: u64| (0..n).map(|at| 2 * at..2 * at + 1).collect::<Vec<_>>();
        assert!(MarkList::of(16, many(MAX_MARKS as u64)).is_some());
        assert!(MarkList::of(16, many(MAX_MARKS as u64 + 1)).is_none());
    }

    #[test]
    fn a_full_list_takes_what_needs_no_room_and_loses_zones() {
        let full = (0..MAX_MARKS as u64).map(|at| 4 * at..4 * at + 2).collect();
        let marks = Marks::new(MarkList::of(16, full).expect("a list"));
        let error = marks
            .change(|list| list.with(1 << 40..1 << 60))
            .expect_err("full");
        assert_eq!(error, Error::TooManyMarks { most: MAX_MARKS });
        assert!(marks.change(|list| list.with(2..3)).is_ok());
        assert!(marks.change(|list| list.without(&(1..2))).is_err());
        assert!(marks.change(|list| list.without(&(32..48))).is_ok());
    }

    #[test]
    fn a_list_is_the_set_of_its_blocks() {
        let (mut list, mut set, mut seed) = (MarkList::new(16), [false; 64], 7_u64);
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (mark, start, len) = (seed >> 63 == 1, (seed >> 40) % 48, 1 + (seed >> 50) % 16);
            let range = start..start + len;
            list = if mark {
                list.with(range.clone())
            } else {
                list.without(&range)
            };
            set[start as usize..(start + len) as usize].fill(mark);
            let marked = |at: u64| list.first_in(&(at..at + 1)).is_some();
            assert!((0..64).all(|at| marked(at) == set[at as usize]));
            assert_eq!(MarkList::of(16, list.ranges.clone()).as_ref(), Some(&list));
        }
    }
}
