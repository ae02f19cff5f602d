//! Timers: an ordered map, since there are few and most end before their time.

use std::collections::BTreeMap;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::{CURRENT, with_current};

type Key = (Instant, u64);

#[derive(Default)]
pub(super) struct Timers {
    waiting: BTreeMap<Key, Waker>,
    next_id: u64,
}

impl Timers {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.waiting.first_key_value().map(|((at, _), _)| *at)
    }

    pub(super) fn pop_due(&mut self, now: Instant) -> Option<Waker> {
        let first = self.waiting.first_entry()?;
        if first.key().0 > now {
            None
        } else {
            Some(first.remove())
        }
    }
}

/// Ends after a time; see [`sleep`].
#[derive(Debug)]
pub struct Sleep {
    at: Instant,
    key: Option<Key>,
    /// The timer is in this thread's runtime.
    _local: PhantomData<Rc<()>>,
}

/// Waits for `time`, rounded up to what the kernel's clock does. Dropping it early is fine.
pub fn sleep(time: Duration) -> Sleep {
    let now = Instant::now();
    // A time that the clock cannot express is as good as for ever.
    let at = now
        .checked_add(time)
        .unwrap_or(now + Duration::from_secs(1 << 31));
    Sleep {
        at,
        key: None,
        _local: PhantomData,
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.at {
            return Poll::Ready(());
        }
        with_current(|inner| {
            let timers = &mut *inner.timers.borrow_mut();
            let at = self.at;
            let key = *self.key.get_or_insert_with(|| {
                timers.next_id += 1;
                (at, timers.next_id)
            });
            timers.waiting.insert(key, cx.waker().clone());
        });
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            let _ = CURRENT.try_with(|current| {
                let inner = current.borrow();
                inner
                    .as_ref()
                    .map(|inner| inner.timers.borrow_mut().waiting.remove(&key))
            });
        }
    }
}
