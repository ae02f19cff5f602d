//! What was dropped that must not be: permits and prefixes whose request never ended, and waits that nobody
//! finished.
//!
//! These tokens are plain values that own nothing of the engine, so their `Drop` cannot reach it; it leaves a
//! note here, and each engine looks for notes addressed to it when their number has changed (one relaxed load
//! an admission). The registry is a static because it must outlive any engine.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::types::ZoneNo;

/// Something that was dropped.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Lost {
    /// A request in these zones (first to last) was never ended.
    Request(ZoneNo, ZoneNo),
    /// Nobody waits for this slot's outcome any more.
    Wait(u32),
}

static ENGINES: AtomicU64 = AtomicU64::new(1);
static NOTES: AtomicU64 = AtomicU64::new(0);
static LOST: Mutex<Vec<(EngineId, Lost)>> = Mutex::new(Vec::new());

/// Tells the engines of a process apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EngineId(u64);

impl EngineId {
    pub(crate) fn new() -> Self {
        Self(ENGINES.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) fn report(self, lost: Lost) {
        LOST.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((self, lost));
        NOTES.fetch_add(1, Ordering::Release);
    }

    /// Takes the notes for this engine.
    pub(crate) fn collect(self, mut sink: impl FnMut(Lost)) {
        LOST.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|&(engine, lost)| {
                if engine == self {
                    sink(lost);
                }
                engine != self
            });
    }
}

/// How many notes were left so far, for all engines.
pub(crate) fn notes() -> u64 {
    NOTES.load(Ordering::Acquire)
}

/// A request in these zones is dropped before its end, which is a mistake of the caller: the zones admit
/// nothing from now on, and a debug build panics.
#[track_caller]
pub(crate) fn request(engine: EngineId, first: ZoneNo, last: ZoneNo, what: &str) {
    engine.report(Lost::Request(first, last));
    debug_assert!(
        std::thread::panicking(),
        "{what} of zone {first} was dropped before its end"
    );
}
