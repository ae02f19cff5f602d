//! Mapping ahead: which clusters a sequential zone gets before they are written.
//!
//! Nothing above a zone's written end is ever read, so clusters can be mapped there early, many at a time and in one
//! run of the file. A zone is kept mapped for at least half of [`AHEAD`] bytes ahead of its writes: whoever writes over a
//! multiple of that half has the next half mapped in the background, and only where that was too slow, or at the first
//! write of a zone, does a write wait for it. One task at a time maps for a zone.
//!
//! Conventional zones, and those of host-aware devices, are read everywhere, so they are never mapped ahead. Nor are zones
//! that have, or had, a random write area: mapping ahead of a write may lose what was written behind it before.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use zbdkit_zone::{Geometry, ZoneNo, ZoneType};

/// Bytes that a zone is mapped ahead at once.
pub const AHEAD: u64 = 16 << 20;

/// The policy for one image, and who maps now.
pub struct Ahead {
    geometry: Geometry,
    cluster_size: u64,
    /// Half of what is mapped at once, whole clusters, bytes.
    step: u64,
    state: Mutex<State>,
    /// There are exempt zones.
    exempts: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Zones that somebody maps for.
    busy: Vec<ZoneNo>,
    waiting: Vec<Waker>,
    /// Zones that are not mapped ahead.
    exempt: BTreeSet<ZoneNo>,
}

/// The right to map for a zone, until dropped.
pub struct Turn {
    ahead: Arc<Ahead>,
    zone: ZoneNo,
}

impl Ahead {
    /// For the zones of a device whose image has clusters of that many bytes.
    pub fn new(geometry: Geometry, cluster_size: u64) -> Ahead {
        let most = AHEAD.min(geometry.zone_capacity());
        Ahead {
            geometry,
            cluster_size,
            step: (most / 2).next_multiple_of(cluster_size),
            state: Mutex::default(),
            exempts: AtomicBool::new(false),
        }
    }

    /// The zones of a range are not mapped ahead from now on; somebody may still be mapping for one.
    pub fn exempt(&self, range: &Range<u64>) {
        let mut state = lock(&self.state);
        state.exempt.extend(self.zones_in(range));
        self.exempts.store(true, Ordering::Release);
    }

    /// The zones of a range are mapped ahead again.
    pub fn admit(&self, range: &Range<u64>) {
        if self.exempts.load(Ordering::Acquire) {
            let mut state = lock(&self.state);
            for zone in self.zones_in(range) {
                state.exempt.remove(&zone);
            }
            self.exempts.store(!state.exempt.is_empty(), Ordering::Release);
        }
    }

    fn zones_in(&self, range: &Range<u64>) -> impl Iterator<Item = ZoneNo> + use<> {
        let last = range.end.saturating_sub(1).max(range.start);
        (self.geometry.zone_of(range.start).0..=self.geometry.zone_of(last).0).map(ZoneNo)
    }

    fn is_exempt(&self, zone: ZoneNo) -> bool {
        // One load for everybody while there are none.
        self.exempts.load(Ordering::Acquire) && lock(&self.state).exempt.contains(&zone)
    }

    /// The zone of a write that may map ahead.
    pub fn zone_of(&self, offset: u64) -> Option<ZoneNo> {
        let zone = self.geometry.zone_of(offset);
        let ordered = self.geometry.zone_type(zone) == ZoneType::SequentialRequired;
        (ordered && !self.is_exempt(zone)).then_some(zone)
    }

    /// Whether it is this write's turn to see to what comes after it: its range has a multiple of half [`AHEAD`] in it.
    pub fn crosses(&self, offset: u64, len: u64) -> bool {
        let Some(zone) = self.zone_of(offset) else {
            return false;
        };
        let first = offset - self.geometry.start(zone);
        let last = first + len.max(1) - 1;
        first.is_multiple_of(self.step) || first / self.step != last / self.step
    }

    /// What a write that found nothing mapped maps before it writes: from its first whole cluster on (of the one before
    /// that, a part may be written already).
    pub fn at_once(&self, zone: ZoneNo, offset: u64, len: u64) -> Range<u64> {
        let start = offset.next_multiple_of(self.cluster_size);
        start..self.end(zone, offset, len).max(start)
    }

    /// What a write that crosses lets map in the background.
    pub fn early(&self, zone: ZoneNo, offset: u64, len: u64) -> Range<u64> {
        let end = self.end(zone, offset, len);
        end.saturating_sub(self.step)
            .max((offset + len).next_multiple_of(self.cluster_size))
            .min(end)..end
    }

    /// The end of what is to be mapped by the time that such a write ends.
    fn end(&self, zone: ZoneNo, offset: u64, len: u64) -> u64 {
        let start = self.geometry.start(zone);
        let last = offset + len.max(1) - 1;
        let wanted = start + ((last - start) / self.step + 2) * self.step;
        let writable = start + self.geometry.capacity(zone);
        wanted
            .min(writable.next_multiple_of(self.cluster_size))
            .min(self.geometry.size())
    }

    /// The right to map for a zone, if nobody has it.
    pub fn try_turn(self: &Arc<Ahead>, zone: ZoneNo) -> Option<Turn> {
        let mut state = lock(&self.state);
        if state.busy.contains(&zone) {
            return None;
        }
        state.busy.push(zone);
        Some(Turn {
            ahead: self.clone(),
            zone,
        })
    }

    /// The right to map for a zone, once nobody else has it.
    pub async fn turn(self: &Arc<Ahead>, zone: ZoneNo) -> Turn {
        poll_fn(|cx| match self.try_turn(zone) {
            Some(turn) => Poll::Ready(turn),
            None => {
                self.wait(cx.waker());
                // The other one may have ended in between.
                self.try_turn(zone).map_or(Poll::Pending, Poll::Ready)
            }
        })
        .await
    }

    /// Returns once nobody maps for any of these zones.
    pub async fn idle(&self, zones: RangeInclusive<ZoneNo>) {
        let busy = || lock(&self.state).busy.iter().any(|zone| zones.contains(zone));
        poll_fn(|cx| {
            if !busy() {
                return Poll::Ready(());
            }
            self.wait(cx.waker());
            if busy() { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
    }

    /// Returns once nobody maps for a zone that the range touches.
    pub async fn idle_in(&self, range: &Range<u64>) {
        let last = range.end.saturating_sub(1).max(range.start);
        self.idle(self.geometry.zone_of(range.start)..=self.geometry.zone_of(last))
            .await;
    }

    /// Returns once nobody maps.
    pub async fn quiet(&self) {
        self.idle(ZoneNo(0)..=ZoneNo(u32::MAX)).await;
    }

    fn wait(&self, waker: &Waker) {
        let mut state = lock(&self.state);
        if !state.waiting.iter().any(|waiting| waiting.will_wake(waker)) {
            state.waiting.push(waker.clone());
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let waiting = {
            let mut state = lock(&self.ahead.state);
            state.busy.retain(|zone| *zone != self.zone);
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use zbdkit_zone::{GeometrySpec, Model, Zns};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn ahead(model: Model, zone_size: u64, capacity: u64) -> Arc<Ahead> {
        let spec = GeometrySpec {
            model,
            size: 4 * zone_size - MIB,
            zone_size,
            zone_capacity: capacity,
            nr_conventional: 1,
            block_size: 4096,
            max_open: 0,
            max_active: 0,
            max_append: 0,
            zns: Zns::NONE,
        };
        Arc::new(Ahead::new(Geometry::new(spec).unwrap(), 65536))
    }

    #[test]
    fn the_first_write_and_each_half_of_the_extent_look_ahead() {
        let ahead = ahead(Model::HostManaged, 64 * MIB, 50 * MIB);
        let zone = 64 * MIB;
        assert!(ahead.crosses(zone, 4096));
        assert!(!ahead.crosses(zone + 4096, 4096));
        assert!(!ahead.crosses(zone + 8 * MIB - 4096, 4096));
        assert!(ahead.crosses(zone + 8 * MIB - 4096, 8192));
        assert!(ahead.crosses(zone + 8 * MIB, 4096));
        let one = ZoneNo(1);
        assert_eq!(ahead.at_once(one, zone, 4096), zone..zone + 16 * MIB);
        // A cluster that may be written in part is left alone.
        assert_eq!(
            ahead.at_once(one, zone + 4096, 4096),
            zone + 65536..zone + 16 * MIB
        );
        assert_eq!(
            ahead.early(one, zone + 8 * MIB, 4096),
            zone + 16 * MIB..zone + 24 * MIB
        );
        // No further than what can be written, nor than the device.
        assert_eq!(
            ahead.early(one, zone + 40 * MIB, 4096),
            zone + 42 * MIB..zone + 50 * MIB
        );
        assert_eq!(ahead.end(one, zone + 48 * MIB, 4096), zone + 50 * MIB);
        let last = 3 * zone;
        assert_eq!(ahead.end(ZoneNo(3), last + 40 * MIB, 4096), last + 50 * MIB);
        // A long write has all of itself mapped.
        assert_eq!(ahead.at_once(one, zone, 20 * MIB), zone..zone + 32 * MIB);
    }

    #[test]
    fn small_zones_are_mapped_whole_and_in_halves_of_whole_clusters() {
        let ahead = ahead(Model::HostManaged, MIB, 3 * MIB / 4 + 4096);
        assert_eq!(ahead.step, 458752);
        assert_eq!(ahead.at_once(ZoneNo(1), MIB, 4096), MIB..MIB + 13 * 65536);
    }

    #[test]
    fn only_sequential_required_zones_are_mapped_ahead() {
        let managed = ahead(Model::HostManaged, 64 * MIB, 64 * MIB);
        assert_eq!(managed.zone_of(0), None);
        assert!(!managed.crosses(0, 4096));
        let aware = ahead(Model::HostAware, 64 * MIB, 64 * MIB);
        assert_eq!(aware.zone_of(64 * MIB), None);
        assert!(!aware.crosses(64 * MIB, 4096));
    }

    #[test]
    fn exempt_zones_are_not_mapped_ahead_until_they_are_admitted_again() {
        let ahead = ahead(Model::HostManaged, 64 * MIB, 64 * MIB);
        let zone = 64 * MIB..128 * MIB;
        ahead.exempt(&zone);
        assert_eq!(ahead.zone_of(zone.start), None);
        assert!(!ahead.crosses(zone.start, 4096));
        assert!(ahead.crosses(zone.end, 4096));
        ahead.admit(&zone);
        assert!(ahead.crosses(zone.start, 4096));
    }

    #[test]
    fn one_at_a_time_maps_for_a_zone() {
        let ahead = ahead(Model::HostManaged, 64 * MIB, 64 * MIB);
        let turn = ahead.try_turn(ZoneNo(1)).unwrap();
        assert!(ahead.try_turn(ZoneNo(1)).is_none());
        assert!(ahead.try_turn(ZoneNo(2)).is_some());
        drop(turn);
        assert!(ahead.try_turn(ZoneNo(1)).is_some());
    }
}
