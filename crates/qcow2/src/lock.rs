//! Locks that are awaited: one value for one task at a time, and ranges of the device.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// A value that one task at a time has, also across awaits.
pub struct AsyncMutex<T> {
    state: Mutex<State<T>>,
}

struct State<T> {
    /// `None` while somebody has it.
    value: Option<Box<T>>,
    waiting: VecDeque<Waker>,
}

/// The value, until dropped.
pub struct AsyncGuard<'a, T> {
    mutex: &'a AsyncMutex<T>,
    value: Option<Box<T>>,
}

impl<T> AsyncMutex<T> {
    /// A free lock.
    pub fn new(value: T) -> AsyncMutex<T> {
        let state = State {
            value: Some(Box::new(value)),
            waiting: VecDeque::new(),
        };
        AsyncMutex {
            state: Mutex::new(state),
        }
    }

    /// Waits for the value.
    pub async fn lock(&self) -> AsyncGuard<'_, T> {
        let value = poll_fn(|cx| {
            let mut state = lock(&self.state);
            if let Some(value) = state.value.take() {
                return Poll::Ready(value);
            }
            if !state.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                state.waiting.push_back(cx.waker().clone());
            }
            Poll::Pending
        });
        AsyncGuard {
            mutex: self,
            value: Some(value.await),
        }
    }
}

impl<T> Deref for AsyncGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect("only dropping takes it")
    }
}

impl<T> DerefMut for AsyncGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("only dropping takes it")
    }
}

impl<T> Drop for AsyncGuard<'_, T> {
    fn drop(&mut self) {
        let waiting = {
            let mut state = lock(&self.mutex.state);
            state.value = self.value.take();
            // All of them: one that was woken may be gone by now.
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// Ranges of clusters whose mapping somebody changes.
#[derive(Default)]
pub struct RangeLocks {
    state: Mutex<Ranges>,
}

#[derive(Default)]
struct Ranges {
    held: Vec<Range<u64>>,
    waiting: Vec<Waker>,
}

/// A range, until dropped.
pub struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    range: Range<u64>,
}

impl RangeLocks {
    /// Waits until nobody else has any of the range.
    pub async fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        poll_fn(|cx| {
            let mut state = lock(&self.state);
            let taken = |held: &Range<u64>| held.start < range.end && range.start < held.end;
            if !state.held.iter().any(taken) {
                state.held.push(range.clone());
                return Poll::Ready(());
            }
            if !state.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                state.waiting.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
        RangeGuard { locks: self, range }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let waiting = {
            let mut state = lock(&self.locks.state);
            if let Some(index) = state.held.iter().position(|held| *held == self.range) {
                state.held.swap_remove(index);
            }
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// A lock whose holders cannot panic half-way.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
