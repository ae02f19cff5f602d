//! Watching memory before sleeping, as long as that pays.
//!
//! A sleep and a wake-up cost microseconds on both sides, so a thread whose next request is about to come better
//! waits awake; but one that waits in vain takes the processor from whoever would send the request. The time to
//! watch therefore adapts: it grows while sleeps turn out shorter than the cap, and shrinks to nothing when they
//! turn out longer.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use super::with_current;

/// Something in memory that other parties change without telling, such as the index of a virtqueue.
pub trait PollSource {
    /// Looks. True if there is something to do now, and its task has been woken. Called often: keep it to a load.
    fn poll(&self) -> bool;
    /// The thread wants to sleep: ask to be notified from here on (through a descriptor that a task awaits with
    /// [`readable`](super::readable)), then look once more. True if there is something, and its task has been woken.
    fn prepare_sleep(&self) -> bool;
    /// The thread is awake again, or does not sleep after all; called for each `prepare_sleep`. Notifications are
    /// not needed any more.
    fn after_sleep(&self);
}

/// Watches `source` on this thread's runtime until the registration is dropped.
pub fn add_poll_source(source: Rc<dyn PollSource>) -> PollRegistration {
    let registered = Rc::new(source);
    let weak = Rc::downgrade(&registered);
    with_current(|inner| inner.spinner.sources.borrow_mut().push(weak));
    PollRegistration {
        _registered: registered,
    }
}

/// The outer reference is the registration's alone.
type Registered = Rc<Rc<dyn PollSource>>;

/// Keeps a poll source watched.
#[must_use = "the source is watched only while this lives"]
pub struct PollRegistration {
    _registered: Registered,
}

/// The first time to watch after sleeps turned out short.
const FIRST: Duration = Duration::from_micros(5);
/// Below this, watching is not worth a look at the clock.
const LEAST: Duration = Duration::from_micros(2);
/// Looks between two readings of the clock.
const LOOKS: u32 = 16;

pub(super) struct Spinner {
    sources: RefCell<Vec<Weak<Rc<dyn PollSource>>>>,
    /// What is called between `prepare_sleep` and `after_sleep`, or during a round; kept for its space.
    awake: RefCell<Vec<Rc<dyn PollSource>>>,
    cap: Duration,
    now: Cell<Duration>,
}

impl Spinner {
    pub(super) fn new(cap: Duration) -> Spinner {
        Spinner {
            sources: RefCell::default(),
            awake: RefCell::default(),
            cap,
            now: Cell::new(cap),
        }
    }

    /// Looks at all sources.
    pub(super) fn poll(&self) -> bool {
        let mut any = false;
        self.each(|source| {
            any |= source.poll();
            true
        });
        any
    }

    /// Calls `f` with the sources until it says false, without holding the list.
    fn each(&self, mut f: impl FnMut(&Rc<dyn PollSource>) -> bool) {
        let mut index = 0;
        loop {
            let Some(weak) = self.sources.borrow().get(index).cloned() else {
                return;
            };
            match weak.upgrade() {
                Some(source) => {
                    if !f(&source) {
                        return;
                    }
                    index += 1;
                }
                None => drop(self.sources.borrow_mut().swap_remove(index)),
            }
        }
    }

    /// Watches for the present time. True if something came.
    pub(super) fn watch(
        &self,
        in_flight: bool,
        until: Option<Instant>,
        mut news: impl FnMut() -> bool,
    ) -> bool {
        let time = self.now.get();
        if time.is_zero() || (!in_flight && self.sources.borrow().is_empty()) {
            return false;
        }
        let deadline = Instant::now() + time;
        let deadline = until.map_or(deadline, |until| until.min(deadline));
        loop {
            for _ in 0..LOOKS {
                if self.poll() || news() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if Instant::now() >= deadline {
                return false;
            }
        }
    }

    /// Has every source ask for notifications. False if one has something: then all are awake again.
    pub(super) fn prepare_sleep(&self) -> bool {
        let mut asleep = self.awake.take();
        let mut any = false;
        self.each(|source| {
            asleep.push(source.clone());
            any = source.prepare_sleep();
            !any
        });
        *self.awake.borrow_mut() = asleep;
        if any {
            self.after_sleep();
        }
        !any
    }

    /// Tells every source that was prepared.
    pub(super) fn after_sleep(&self) {
        let mut asleep = self.awake.take();
        for source in asleep.drain(..) {
            source.after_sleep();
        }
        *self.awake.borrow_mut() = asleep;
    }

    /// Learns from a sleep that watching did not spare us.
    pub(super) fn slept(&self, time: Duration) {
        let now = self.now.get();
        let next = if time < self.cap {
            (now * 2).max(FIRST).min(self.cap)
        } else {
            now / 2
        };
        self.now.set(if next < LEAST { Duration::ZERO } else { next });
    }

    pub(super) fn clear(&self) {
        drop(self.sources.take());
        drop(self.awake.take());
    }
}
