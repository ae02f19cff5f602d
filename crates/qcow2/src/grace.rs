//! Who still uses a cluster that nothing maps any more.
//!
//! A request looks a place up and then reads or writes there without a lock. Meanwhile its cluster may lose its
//! mapping; it must not serve something else before the request has ended. So requests pin the present from before
//! they look until their I/O ends, and whoever frees clusters waits, after the mapping is gone, for all pins that were
//! there. Nobody may await the metadata lock with a pin in hand.

use std::cell::Cell;
use std::future::poll_fn;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Poll, Waker};

use crate::lock::lock;

const SHARDS: usize = 8;

/// Counts the requests that may know clusters.
#[derive(Default)]
pub struct Grace {
    /// Its lowest bit chooses the counters of new pins.
    period: AtomicUsize,
    shards: [Shard; SHARDS],
    waits: AtomicBool,
    waiting: Mutex<Vec<Waker>>,
}

/// On a cache line of its own, so that threads do not disturb each other.
#[derive(Default)]
#[repr(align(128))]
struct Shard {
    pins: [AtomicUsize; 2],
}

/// Keeps clusters from reuse while it lives.
pub struct Pin<'a> {
    grace: &'a Grace,
    shard: u8,
    parity: u8,
}

impl Grace {
    /// Pins what will be looked up after this call.
    pub fn pin(&self) -> Pin<'_> {
        let shard = shard_of_thread();
        loop {
            let period = self.period.load(Ordering::SeqCst);
            let parity = period & 1;
            self.shards[shard].pins[parity].fetch_add(1, Ordering::SeqCst);
            let pin = Pin {
                grace: self,
                shard: shard as u8,
                parity: parity as u8,
            };
            // Counted where nobody waits any more, it would be missed by the next who waits.
            if self.period.load(Ordering::SeqCst) == period {
                return pin;
            }
        }
    }

    /// Returns once every pin that was there at the call is gone. One caller at a time.
    pub async fn passed(&self) {
        self.waits.store(true, Ordering::SeqCst);
        // Somebody who waited before may have been dropped, and these may be pins that he waited for. There are no new
        // ones, or this would wait for ever.
        self.none(!self.period.load(Ordering::SeqCst) & 1).await;
        self.none(self.period.fetch_add(1, Ordering::SeqCst) & 1).await;
        self.waits.store(false, Ordering::SeqCst);
    }

    /// Returns once one half of the counters is zero.
    async fn none(&self, parity: usize) {
        poll_fn(|cx| {
            let mut waiting = lock(&self.waiting);
            waiting.clear();
            waiting.push(cx.waker().clone());
            drop(waiting);
            let pinned = |shard: &Shard| shard.pins[parity].load(Ordering::SeqCst) != 0;
            if self.shards.iter().any(pinned) {
                Poll::Pending
            } else {
                Poll::Ready(())
            }
        })
        .await;
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        let pins = &self.grace.shards[usize::from(self.shard)].pins[usize::from(self.parity)];
        if pins.fetch_sub(1, Ordering::SeqCst) == 1 && self.grace.waits.load(Ordering::SeqCst) {
            let waiting = std::mem::take(&mut *lock(&self.grace.waiting));
            waiting.into_iter().for_each(Waker::wake);
        }
    }
}

fn shard_of_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static SHARD: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    SHARD.with(|shard| {
        if shard.get() == usize::MAX {
            shard.set(NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS);
        }
        shard.get()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::Context;

    fn poll(future: std::pin::Pin<&mut impl Future<Output = ()>>) -> bool {
        future.poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn pins_taken_before_hold_it_up_and_later_ones_do_not() {
        let grace = Grace::default();
        let before = grace.pin();
        let mut passed = pin!(grace.passed());
        assert!(!poll(passed.as_mut()));
        let after = grace.pin();
        assert!(!poll(passed.as_mut()));
        drop(before);
        assert!(poll(passed.as_mut()));
        let mut next = pin!(grace.passed());
        assert!(!poll(next.as_mut()));
        drop(after);
        assert!(poll(next.as_mut()));
    }

    #[test]
    fn who_waits_after_one_that_was_dropped_waits_for_the_same_pins() {
        let grace = Grace::default();
        let before = grace.pin();
        {
            let mut dropped = pin!(grace.passed());
            assert!(!poll(dropped.as_mut()));
        }
        let later = grace.pin();
        let mut passed = pin!(grace.passed());
        assert!(!poll(passed.as_mut()));
        drop(later);
        assert!(!poll(passed.as_mut()));
        drop(before);
        assert!(poll(passed.as_mut()));
    }

    #[test]
    fn the_last_pin_wakes_who_waits() {
        struct Flag(AtomicBool);
        impl std::task::Wake for Flag {
            fn wake(self: std::sync::Arc<Self>) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let grace = Grace::default();
        let (first, second) = (grace.pin(), grace.pin());
        let flag = std::sync::Arc::new(Flag(AtomicBool::new(false)));
        let waker = Waker::from(flag.clone());
        let mut passed = pin!(grace.passed());
        assert!(
            passed
                .as_mut()
                .poll(&mut Context::from_waker(&waker))
                .is_pending()
        );
        drop(first);
        assert!(!flag.0.load(Ordering::SeqCst));
        drop(second);
        assert!(flag.0.load(Ordering::SeqCst));
    }
}
