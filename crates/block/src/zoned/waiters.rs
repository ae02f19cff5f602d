//! Who waits for the engine: the tasks whose writes wait for earlier ones, and those that found a zone busy.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Waker;

use zbdkit_zone::{Events, MAX_SLOTS, ZoneNo};

use super::run_state::RunState;

const CHUNK: usize = 256;

type Chunk = Box<[Mutex<Option<Waker>>]>;

/// The listener of an image's engine.
pub struct Waiters {
    /// One place a slot, made in chunks as slots come into use.
    slots: Box<[OnceLock<Chunk>]>,
    zones: Mutex<Vec<(ZoneNo, Waker)>>,
    /// Length of `zones`, read without its lock on every completion.
    waiting: AtomicUsize,
    /// Where written ends are published as they move.
    pub run_state: RunState,
}

impl Waiters {
    /// Nobody waits yet.
    pub fn new(run_state: RunState) -> Waiters {
        let chunks = (MAX_SLOTS as usize).div_ceil(CHUNK);
        Waiters {
            slots: (0..chunks).map(|_| OnceLock::new()).collect(),
            zones: Mutex::default(),
            waiting: AtomicUsize::new(0),
            run_state,
        }
    }

    /// Wakes `waker` at the slot's next [`Events::slot_ready`]; look at the outcome again after this.
    pub fn wait_slot(&self, slot: u32, waker: &Waker) {
        let mut place = lock(self.slot(slot));
        match place.as_mut() {
            Some(old) => old.clone_from(waker),
            None => *place = Some(waker.clone()),
        }
    }

    /// Wakes `waker` at the zone's next [`Events::zone_changed`]; look at the zone again after this.
    pub fn wait_zone(&self, zone: ZoneNo, waker: &Waker) {
        let mut zones = lock(&self.zones);
        if !zones
            .iter()
            .any(|(waiting, old)| *waiting == zone && old.will_wake(waker))
        {
            zones.push((zone, waker.clone()));
        }
        // Before the caller's second look, which takes the zone's lock: the one who changes the zone after that
        // look sees it.
        self.waiting.store(zones.len(), Ordering::SeqCst);
    }

    fn slot(&self, slot: u32) -> &Mutex<Option<Waker>> {
        let (chunk, place) = (slot as usize / CHUNK, slot as usize % CHUNK);
        &self.slots[chunk].get_or_init(|| (0..CHUNK).map(|_| Mutex::default()).collect())[place]
    }
}

impl Events for Waiters {
    fn publish(&self, zone: ZoneNo, written: u64) {
        self.run_state.store_mapped(zone, written);
    }

    fn slot_ready(&self, slot: u32) {
        let waker = lock(self.slot(slot)).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn zone_changed(&self, zone: ZoneNo) {
        if self.waiting.load(Ordering::SeqCst) == 0 {
            return;
        }
        let mut woken = Vec::new();
        {
            let mut zones = lock(&self.zones);
            zones.retain(|(waiting, waker)| {
                let wake = *waiting == zone;
                if wake {
                    woken.push(waker.clone());
                }
                !wake
            });
            self.waiting.store(zones.len(), Ordering::SeqCst);
        }
        woken.into_iter().for_each(Waker::wake);
    }
}

/// Takes a lock whose holders cannot leave anything half done.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
