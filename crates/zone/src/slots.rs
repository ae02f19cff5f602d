//! The preallocated places of writes in flight in sequential-required zones.
//!
//! A slot is one write's link in its zone's list, oldest first. All slots of an engine lie in one arena and
//! are named by index, so that a list can run through the slots of several lanes. A lane takes its slots from
//! a [`SlotPool`] of its own; whoever ends a write pushes its slot back to the pool it came from.
//!
//! Who may touch what: `end` and `next` belong to the zone's list and are touched under the zone's lock; once
//! a chain has been cut out of the list they belong to the one who cut it, until a slot of it is made ready.
//! From then on it belongs to its owner. `state` passes a slot from one to the next.

use std::sync::{Arc, OnceLock};

use crate::sync::{AtomicU32, AtomicU64, Mutex, Ordering, lock};

/// No slot. Index 0 is the home of the first pool, never a write's slot.
pub(crate) const NIL: u32 = 0;

/// The most slots of an engine, over all lanes (each pool costs one besides those that it gives): enough for two
/// doors of 256 queues with 1023 writes in flight each. They are made as lanes ask for them.
pub const MAX_SLOTS: u32 = if cfg!(feature = "shuttle") {
    1 << 16
} else {
    1 << 19
};

// Small where each slot costs the explorer of interleavings something.
const CHUNK: u32 = if cfg!(feature = "shuttle") {
    1 << 4
} else {
    1 << 10
};
const CHUNKS: usize = (MAX_SLOTS / CHUNK) as usize;

/// What a slot is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// In a pool.
    Free,
    /// In its zone's list, its I/O not over.
    InFlight,
    /// In its zone's list, written, and waiting for earlier ones.
    Written,
    /// Out of the list: part of a prefix that is not acknowledged yet.
    Prefix,
    /// Out of the list because an earlier write failed with this errno; its own I/O is not over.
    Doomed(i32),
    /// Over, with this outcome (0 or an errno). The owner may take it.
    Ready(i32),
}

impl State {
    fn to_bits(self) -> u64 {
        let (tag, errno) = match self {
            Self::Free => (0, 0),
            Self::InFlight => (1, 0),
            Self::Written => (2, 0),
            Self::Prefix => (3, 0),
            Self::Doomed(errno) => (4, errno),
            Self::Ready(errno) => (5, errno),
        };
        u64::from(errno.cast_unsigned()) << 8 | tag
    }

    fn of_bits(bits: u64) -> Self {
        let errno = ((bits >> 8) as u32).cast_signed();
        match bits & 0xFF {
            0 => Self::Free,
            1 => Self::InFlight,
            2 => Self::Written,
            3 => Self::Prefix,
            4 => Self::Doomed(errno),
            _ => Self::Ready(errno),
        }
    }
}

pub(crate) struct Slot {
    /// Where the write ends, in bytes from the zone's start.
    end: AtomicU64,
    state: AtomicU64,
    /// The next later write of the zone. In a pool: the next free slot. In a home: the first free slot.
    next: AtomicU32,
    /// The slot that heads the free list of the pool that this one comes from.
    home: AtomicU32,
}

impl Slot {
    fn new() -> Self {
        Self {
            end: AtomicU64::new(0),
            state: AtomicU64::new(State::Free.to_bits()),
            next: AtomicU32::new(NIL),
            home: AtomicU32::new(NIL),
        }
    }

    pub(crate) fn end(&self) -> u64 {
        self.end.load(Ordering::Relaxed)
    }

    pub(crate) fn next(&self) -> u32 {
        self.next.load(Ordering::Relaxed)
    }

    pub(crate) fn set_next(&self, next: u32) {
        self.next.store(next, Ordering::Relaxed);
    }

    pub(crate) fn state(&self) -> State {
        State::of_bits(self.state.load(Ordering::Acquire))
    }

    pub(crate) fn set_state(&self, state: State) {
        self.state.store(state.to_bits(), Ordering::Release);
    }

    /// Makes it the last link of a zone's list.
    pub(crate) fn start(&self, end: u64) {
        self.end.store(end, Ordering::Relaxed);
        self.set_next(NIL);
        self.set_state(State::InFlight);
    }
}

/// All slots of an engine.
pub(crate) struct Arena {
    chunks: Box<[OnceLock<Box<[Slot]>>]>,
    ranges: Mutex<Ranges>,
}

/// Which indices belong to no pool. Only touched when pools come and go.
#[derive(Default)]
struct Ranges {
    /// The first index that no pool ever had.
    fresh: u32,
    /// Ranges of dropped pools, `(home, length with the home)`.
    free: Vec<(u32, u32)>,
    /// Ranges of dropped pools with writes still in flight: `(home, length, slots back so far)`.
    draining: Vec<(u32, u32, u32)>,
}

impl Arena {
    pub(crate) fn new() -> Self {
        Self {
            chunks: (0..CHUNKS).map(|_| OnceLock::new()).collect(),
            ranges: Mutex::new(Ranges::default()),
        }
    }

    pub(crate) fn slot(&self, index: u32) -> &Slot {
        let chunk = self.chunks[(index / CHUNK) as usize]
            .get()
            .expect("a slot in use has its chunk");
        &chunk[(index % CHUNK) as usize]
    }

    /// Returns a slot to the pool that it came from. Any thread may do it.
    pub(crate) fn release(&self, index: u32) {
        let slot = self.slot(index);
        slot.set_state(State::Free);
        let home = self.slot(slot.home.load(Ordering::Relaxed));
        let mut first = home.next.load(Ordering::Relaxed);
        loop {
            slot.set_next(first);
            // Only the pool takes from this list, and it takes all at once, so there is no ABA.
            match home
                .next
                .compare_exchange_weak(first, index, Ordering::Release, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(now) => first = now,
            }
        }
    }

    /// Takes everything that was returned to a pool since the last time.
    fn take_returned(&self, home: u32) -> u32 {
        self.slot(home).next.swap(NIL, Ordering::Acquire)
    }

    fn count(&self, mut index: u32) -> u32 {
        let mut count = 0;
        while index != NIL {
            count += 1;
            index = self.slot(index).next();
        }
        count
    }

    /// Finds `length` indices in a row.
    fn reserve(&self, length: u32) -> Option<u32> {
        let mut ranges = lock(&self.ranges);
        let Ranges {
            fresh,
            free,
            draining,
        } = &mut *ranges;
        draining.retain_mut(|(home, length, back)| {
            *back += self.count(self.take_returned(*home));
            let drained = *back + 1 == *length;
            if drained {
                free.push((*home, *length));
            }
            !drained
        });
        merge(free);
        if let Some(at) = free.iter().position(|&(_, free)| free >= length) {
            let (home, found) = free[at];
            if found == length {
                free.remove(at);
            } else {
                free[at] = (home + length, found - length);
            }
            return Some(home);
        }
        // The fresh indices start at 1: index 0 is NIL.
        let home = (*fresh).max(1);
        let end = home.checked_add(length).filter(|&end| end <= MAX_SLOTS)?;
        *fresh = end;
        for chunk in &self.chunks[..end.div_ceil(CHUNK) as usize] {
            chunk.get_or_init(|| (0..CHUNK).map(|_| Slot::new()).collect());
        }
        Some(home)
    }
}

/// Joins neighbouring free ranges, so that lanes of other sizes find room.
fn merge(free: &mut Vec<(u32, u32)>) {
    free.sort_unstable();
    free.dedup_by(|next, previous| {
        let joined = previous.0 + previous.1 == next.0;
        if joined {
            previous.1 += next.1;
        }
        joined
    });
}

/// The slots of one lane: as many writes to sequential-required zones as it can have in flight at once.
///
/// A slot is taken at admission and comes back when the write is over: at [`Engine::acknowledge`] of the
/// prefix that its own completion began, at [`Completion::Failed`], or when [`Engine::outcome`] gives it. A
/// pool that is dropped while writes are in flight does them no harm; its slots are used again once all of
/// them are back.
///
/// [`Engine::acknowledge`]: crate::Engine::acknowledge
/// [`Engine::outcome`]: crate::Engine::outcome
/// [`Completion::Failed`]: crate::Completion::Failed
pub struct SlotPool {
    pub(crate) arena: Arc<Arena>,
    home: u32,
    capacity: u32,
    /// Free slots that only this pool knows of.
    local: u32,
}

impl SlotPool {
    /// Reserves `capacity` slots, or none where the arena is exhausted.
    pub(crate) fn new(arena: &Arc<Arena>, capacity: u32) -> Self {
        let mut pool = Self {
            arena: Arc::clone(arena),
            home: NIL,
            capacity: 0,
            local: NIL,
        };
        let length = capacity.saturating_add(1);
        if capacity == 0 {
            return pool;
        }
        let Some(home) = arena.reserve(length) else {
            return pool;
        };
        arena.slot(home).set_next(NIL);
        for index in home + 1..home + length {
            let slot = arena.slot(index);
            slot.home.store(home, Ordering::Relaxed);
            slot.set_next(if index + 1 < home + length { index + 1 } else { NIL });
        }
        (pool.home, pool.capacity, pool.local) = (home, capacity, home + 1);
        pool
    }

    /// How many writes it can hold: what was asked for, or 0 where the engine's [`MAX_SLOTS`] are used up.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    pub(crate) fn take(&mut self) -> Option<u32> {
        if self.local == NIL {
            if self.home == NIL {
                return None;
            }
            self.local = self.arena.take_returned(self.home);
        }
        let index = self.local;
        if index == NIL {
            return None;
        }
        self.local = self.arena.slot(index).next();
        Some(index)
    }

    /// Undoes [`SlotPool::take`].
    pub(crate) fn put_back(&mut self, index: u32) {
        self.arena.slot(index).set_next(self.local);
        self.local = index;
    }
}

impl Drop for SlotPool {
    fn drop(&mut self) {
        if self.home == NIL {
            return;
        }
        let back = self.arena.count(self.local);
        lock(&self.arena.ranges)
            .draining
            .push((self.home, self.capacity + 1, back));
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    #[test]
    fn a_state_survives_its_encoding() {
        for errno in [0, 5, 28, i32::MAX, -1, i32::MIN] {
            for state in [
                State::Ready(errno),
                State::Doomed(errno),
                State::Written,
                State::Free,
            ] {
                assert_eq!(State::of_bits(state.to_bits()), state);
            }
        }
    }

    #[test]
    fn a_pool_gives_each_slot_once_and_gets_it_back() {
        let arena = Arc::new(Arena::new());
        let mut pool = SlotPool::new(&arena, 3);
        let mut other = SlotPool::new(&arena, 2);
        let mut taken: Vec<u32> = std::iter::from_fn(|| pool.take()).collect();
        taken.extend(std::iter::from_fn(|| other.take()));
        assert_eq!(taken.len(), 5);
        taken.sort_unstable();
        taken.dedup();
        assert_eq!(taken.len(), 5, "no slot twice");
        taken.into_iter().for_each(|slot| arena.release(slot));
        assert_eq!(std::iter::from_fn(|| pool.take()).count(), 3);
        assert_eq!(std::iter::from_fn(|| other.take()).count(), 2);
    }

    #[test]
    fn slots_of_a_dropped_pool_are_used_again_once_all_are_back() {
        let arena = Arc::new(Arena::new());
        let mut pool = SlotPool::new(&arena, MAX_SLOTS - 2);
        let (a, b) = (pool.take().expect("free"), pool.take().expect("free"));
        drop(pool);
        arena.release(a);
        assert_eq!(SlotPool::new(&arena, 1).capacity(), 0, "one is still in flight");
        arena.release(b);
        let half = SlotPool::new(&arena, MAX_SLOTS / 2 - 1);
        let rest = SlotPool::new(&arena, MAX_SLOTS / 2 - 2);
        assert_eq!(
            (half.capacity(), rest.capacity()),
            (MAX_SLOTS / 2 - 1, MAX_SLOTS / 2 - 2)
        );
        drop((half, rest));
        assert_eq!(
            SlotPool::new(&arena, MAX_SLOTS - 2).capacity(),
            MAX_SLOTS - 2,
            "ranges are joined again"
        );
    }

    #[test]
    fn more_slots_than_there_are_gives_an_empty_pool() {
        let arena = Arc::new(Arena::new());
        for wanted in [0, MAX_SLOTS, u32::MAX] {
            let mut pool = SlotPool::new(&arena, wanted);
            assert_eq!((pool.capacity(), pool.take()), (0, None));
        }
    }
}
