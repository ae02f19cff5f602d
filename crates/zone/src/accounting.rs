//! Open and active resources, and which implicitly open zone was used least recently.
//!
//! All changes of a zone's condition happen under the one lock here, so that the counts always agree with the
//! conditions. It is taken inside the zone's lock, and only when a condition changes. Closing the least
//! recently used zone needs that zone's own lock not at all: whoever has it sees the zone closed at its next
//! look, and what was admitted there simply completes.
//!
//! Writes only stamp their zone. The heap here holds an entry for each implicitly open zone with the stamp it
//! had when it was opened or last looked at; entries are corrected when they come up. So the order is exact
//! (but for writes that race with the eviction itself) and a write never takes this lock.
//!
//! Random write areas are counted here as well: a zone holds one from its allocation on, whatever its condition becomes
//! meanwhile, until the area is released.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::error::ZoneError;
use crate::geometry::Geometry;
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering, lock};
use crate::types::{Condition, ZoneNo};

/// Where the conditions are kept; the engine's zones.
pub(crate) trait Conditions {
    fn condition(&self, zone: ZoneNo) -> Condition;
    fn set_condition(&self, zone: ZoneNo, condition: Condition);
}

pub(crate) struct Accounting {
    max_open: u32,
    max_active: u32,
    max_areas: u32,
    counts: Mutex<Counts>,
    /// When each zone was last written or opened. Empty where nothing is evicted for want of an open limit.
    stamps: Box<[AtomicU64]>,
    clock: AtomicU64,
}

#[derive(Default)]
struct Counts {
    implicit: u32,
    explicit: u32,
    closed: u32,
    /// Zones with a random write area.
    areas: u32,
    /// Oldest first. Has an entry for each implicitly open zone; may have stale and double ones.
    recent: BinaryHeap<Reverse<(u64, ZoneNo)>>,
}

impl Accounting {
    pub(crate) fn new(geometry: &Geometry) -> Self {
        let max_open = geometry.max_open();
        let stamps = if max_open == 0 { 0 } else { geometry.nr_zones() };
        let mut counts = Counts::default();
        if max_open != 0 {
            counts.recent.reserve_exact(recent_limit(max_open));
        }
        Self {
            max_open,
            max_active: geometry.max_active(),
            max_areas: geometry.zrwa().map_or(0, |zrwa| zrwa.count),
            counts: Mutex::new(counts),
            stamps: (0..stamps).map(|_| AtomicU64::new(0)).collect(),
            // Ahead of every stamp: a zone that was never used is not the most recent one.
            clock: AtomicU64::new(1),
        }
    }

    /// Counts a zone that has this condition, and maybe a random write area, from the beginning.
    pub(crate) fn count_initial(&self, condition: Condition, area: bool) {
        let mut counts = lock(&self.counts);
        counts.areas += u32::from(area);
        if let Some(count) = counts.of(condition) {
            *count += 1;
        }
    }

    /// Notes that the zone is in use now. Called under the zone's lock.
    pub(crate) fn touch(&self, zone: ZoneNo) {
        if let Some(stamp) = self.stamps.get(zone.0 as usize) {
            // A zone that is the most recent already stays so; this spares streams the shared counter.
            if stamp.load(Ordering::Relaxed) != self.clock.load(Ordering::Relaxed) {
                stamp.store(self.clock.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
            }
        }
    }

    /// Takes the lock under which conditions change. Called under the lock of the zone in question.
    pub(crate) fn change<'a, C: Conditions>(&'a self, zones: &'a C) -> Change<'a, C> {
        Change {
            accounting: self,
            zones,
            counts: lock(&self.counts),
        }
    }

    /// Open and active zones.
    pub(crate) fn counts(&self) -> (u32, u32) {
        let counts = lock(&self.counts);
        (counts.open(), counts.active())
    }

    fn stamp(&self, zone: ZoneNo) -> u64 {
        self.stamps
            .get(zone.0 as usize)
            .map_or(0, |stamp| stamp.load(Ordering::Relaxed))
    }
}

/// How many entries the heap may have: room for as many stale ones as there are open zones, so that clearing
/// them out costs O(1) a change.
fn recent_limit(max_open: u32) -> usize {
    2 * max_open as usize + 16
}

impl Counts {
    fn of(&mut self, condition: Condition) -> Option<&mut u32> {
        match condition {
            Condition::ImplicitlyOpen => Some(&mut self.implicit),
            Condition::ExplicitlyOpen => Some(&mut self.explicit),
            Condition::Closed => Some(&mut self.closed),
            _ => None,
        }
    }

    fn open(&self) -> u32 {
        self.implicit + self.explicit
    }

    fn active(&self) -> u32 {
        self.open() + self.closed
    }
}

/// The right to change conditions.
pub(crate) struct Change<'a, C> {
    accounting: &'a Accounting,
    zones: &'a C,
    counts: MutexGuard<'a, Counts>,
}

impl<C: Conditions> Change<'_, C> {
    pub(crate) fn condition(&self, zone: ZoneNo) -> Condition {
        self.zones.condition(zone)
    }

    /// Gives the zone another condition, whatever resources that takes or frees.
    pub(crate) fn set(&mut self, zone: ZoneNo, to: Condition) {
        let from = self.zones.condition(zone);
        if from == to {
            return;
        }
        if let Some(count) = self.counts.of(from) {
            *count -= 1;
        }
        if let Some(count) = self.counts.of(to) {
            *count += 1;
        }
        self.zones.set_condition(zone, to);
        if to == Condition::ImplicitlyOpen && self.accounting.max_open != 0 {
            self.remember(zone);
        }
    }

    /// Opens an empty, closed or open zone. Explicitly open zones stay so.
    pub(crate) fn open(&mut self, zone: ZoneNo, to: Condition) -> Result<(), ZoneError> {
        let from = self.condition(zone);
        if !from.is_open() {
            self.available(from)?;
            if self.counts.open() >= self.accounting.max_open && self.accounting.max_open != 0 {
                self.close_least_recent();
            }
        }
        if from != Condition::ExplicitlyOpen {
            self.set(zone, to);
        }
        Ok(())
    }

    /// Whether a zone in this condition could be active.
    pub(crate) fn active_available(&self, from: Condition) -> Result<(), ZoneError> {
        let max_active = self.accounting.max_active;
        if max_active != 0 && !from.is_active() && self.counts.active() >= max_active {
            return Err(ZoneError::TooManyActive { limit: max_active });
        }
        Ok(())
    }

    /// Whether the zone could get a random write area.
    pub(crate) fn area_available(&self, zone: ZoneNo) -> Result<(), ZoneError> {
        let max_areas = self.accounting.max_areas;
        if max_areas != 0 && self.counts.areas >= max_areas {
            return Err(ZoneError::NoRandomWriteArea { zone });
        }
        Ok(())
    }

    /// A zone gets a random write area, whether one is left or not.
    pub(crate) fn take_area(&mut self) {
        self.counts.areas += 1;
    }

    /// A zone's random write area is free again.
    pub(crate) fn release_area(&mut self) {
        self.counts.areas -= 1;
    }

    /// Whether a zone in this condition could be opened.
    pub(crate) fn available(&self, from: Condition) -> Result<(), ZoneError> {
        self.active_available(from)?;
        let max_open = self.accounting.max_open;
        if max_open != 0 && self.counts.explicit >= max_open {
            return Err(ZoneError::TooManyOpen { limit: max_open });
        }
        Ok(())
    }

    fn close_least_recent(&mut self) {
        // Bounded although writers may keep making entries out of date: then a very recent one is as good.
        let mut corrections = self.counts.recent.len();
        while let Some(Reverse((recorded, zone))) = self.counts.recent.pop() {
            if self.zones.condition(zone) != Condition::ImplicitlyOpen {
                continue;
            }
            let stamp = self.accounting.stamp(zone);
            if stamp != recorded && corrections > 0 {
                corrections -= 1;
                self.counts.recent.push(Reverse((stamp, zone)));
                continue;
            }
            self.set(zone, Condition::Closed);
            return;
        }
        debug_assert!(false, "an implicitly open zone is always remembered");
    }

    fn remember(&mut self, zone: ZoneNo) {
        let accounting = self.accounting;
        accounting.touch(zone);
        if self.counts.recent.len() >= recent_limit(accounting.max_open) {
            let mut entries = std::mem::take(&mut self.counts.recent).into_vec();
            entries.retain(|Reverse((_, zone))| self.zones.condition(*zone) == Condition::ImplicitlyOpen);
            // The smallest stamp of a zone is enough: it is corrected when it comes up.
            entries.sort_unstable_by_key(|&Reverse((stamp, zone))| (zone, stamp));
            entries.dedup_by_key(|Reverse((_, zone))| *zone);
            self.counts.recent = entries.into();
        }
        self.counts.recent.push(Reverse((accounting.stamp(zone), zone)));
    }
}
