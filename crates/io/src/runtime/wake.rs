//! Wakers, and the two queues they fill: the thread's own, and a lock-free one for every other thread.
//!
//! Each task has one [`Entry`] for as long as its slot exists. An entry is in at most one queue at a time, which
//! its `scheduled` flag ensures, so the remote queue can link the entries themselves and a wake-up allocates nothing.
//! A waker left over from an earlier task of a slot wakes the slot's present task for nothing, which is harmless.

#![expect(unsafe_code, reason = "the remote queue is an intrusive lock-free stack")]

use std::io;
use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Wake;

use rustix::event::EventfdFlags;

use super::CURRENT;

/// What the scheduler knows of a task: where it is, and whether it has been woken.
pub(crate) struct Entry {
    pub(crate) target: u32,
    pub(crate) index: u32,
    scheduled: AtomicBool,
    next: AtomicPtr<Entry>,
    shared: Arc<Shared>,
}

impl Entry {
    pub(crate) fn new(shared: &Arc<Shared>, target: u32, index: u32) -> Arc<Entry> {
        Arc::new(Entry {
            target,
            index,
            scheduled: AtomicBool::new(false),
            next: AtomicPtr::new(ptr::null_mut()),
            shared: shared.clone(),
        })
    }

    /// Called by the run loop before it polls the task: from here on a wake-up queues the entry again. A read and
    /// a write in one, so that everything written before the wake-ups so far is seen by the poll.
    pub(crate) fn begin(&self) {
        self.scheduled.swap(false, Ordering::AcqRel);
    }

    /// Claims the right to queue the entry.
    fn claim(&self) -> bool {
        !self.scheduled.swap(true, Ordering::AcqRel)
    }
}

impl Wake for Entry {
    fn wake(self: Arc<Self>) {
        if self.claim() {
            enqueue(self);
        }
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.claim() {
            enqueue(self.clone());
        }
    }
}

fn enqueue(entry: Arc<Entry>) {
    let mut entry = Some(entry);
    // On a thread that is ending there is no current runtime any more; then this is a remote wake-up.
    let _ = CURRENT.try_with(|current| {
        if let Some(inner) = &*current.borrow()
            && entry.as_ref().is_some_and(|e| e.shared.id == inner.shared.id)
        {
            inner.ready.borrow_mut().extend(entry.take());
        }
    });
    if let Some(entry) = entry {
        let shared = entry.shared.clone();
        shared.push(entry);
        shared.notify();
    }
}

/// The part of a runtime that other threads may touch.
pub(crate) struct Shared {
    pub(crate) id: u64,
    /// The runtime is asleep, or about to be: write the eventfd.
    sleeping: AtomicBool,
    closed: AtomicBool,
    woken: AtomicPtr<Entry>,
    calls: Mutex<Vec<Call>>,
    calls_pending: AtomicBool,
    /// A backend's completions are waiting (worker threads only).
    pub(crate) completions: AtomicBool,
    pub(crate) eventfd: OwnedFd,
}

/// A closure that another thread asks the runtime to run.
pub(crate) type Call = Box<dyn FnOnce() + Send>;

impl Shared {
    pub(crate) fn new() -> io::Result<Arc<Shared>> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Ok(Arc::new(Shared {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            sleeping: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            woken: AtomicPtr::new(ptr::null_mut()),
            calls: Mutex::new(Vec::new()),
            calls_pending: AtomicBool::new(false),
            completions: AtomicBool::new(false),
            eventfd: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        }))
    }

    /// Announces that the runtime is about to sleep. It must look for work once more after this.
    pub(crate) fn begin_sleep(&self) {
        self.sleeping.store(true, Ordering::Relaxed);
        // Pairs with the fence in `notify`: either the notifier sees `sleeping`, or we see its work.
        fence(Ordering::SeqCst);
    }

    pub(crate) fn end_sleep(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }

    /// Wakes the runtime if it sleeps. The work must have been published before.
    pub(crate) fn notify(&self) {
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) && self.sleeping.swap(false, Ordering::AcqRel) {
            // Fails only where the counter is full, and then the runtime has a wake-up already.
            let _ = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
        }
    }

    /// Empties the eventfd.
    pub(crate) fn drain_eventfd(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.eventfd, &mut count);
    }

    /// Whether another thread has left work.
    pub(crate) fn has_work(&self) -> bool {
        !self.woken.load(Ordering::Relaxed).is_null()
            || self.calls_pending.load(Ordering::Relaxed)
            || self.completions.load(Ordering::Relaxed)
    }

    fn push(&self, entry: Arc<Entry>) {
        let entry = Arc::into_raw(entry).cast_mut();
        let mut head = self.woken.load(Ordering::Relaxed);
        loop {
            // SAFETY: `entry` is alive: the stack holds the reference that `into_raw` gave us.
            unsafe { (*entry).next.store(head, Ordering::Relaxed) };
            match self
                .woken
                .compare_exchange_weak(head, entry, Ordering::Release, Ordering::Relaxed)
            {
                Ok(_) => break,
                Err(now) => head = now,
            }
        }
        // Pairs with the fence in `close`: either that takes the entry, or we see that nobody will.
        fence(Ordering::SeqCst);
        if self.closed.load(Ordering::Relaxed) {
            // Nobody will come for it: do not leave entries that keep us, who hold them, alive.
            self.take_woken(drop);
        }
    }

    /// Takes all entries that other threads woke, the first woken first.
    pub(crate) fn take_woken(&self, mut f: impl FnMut(Arc<Entry>)) {
        if self.woken.load(Ordering::Relaxed).is_null() {
            return;
        }
        let mut newest = self.woken.swap(ptr::null_mut(), Ordering::Acquire);
        let mut oldest: *mut Entry = ptr::null_mut();
        while !newest.is_null() {
            // SAFETY: the whole list is ours since the swap; each entry is alive, held by the list.
            let next = unsafe { (*newest).next.swap(oldest, Ordering::Relaxed) };
            oldest = newest;
            newest = next;
        }
        while !oldest.is_null() {
            // SAFETY: as above. The link is read before the entry is given away, since it may be queued again.
            let (entry, next) = unsafe {
                (
                    Arc::from_raw(oldest.cast_const()),
                    (*oldest).next.load(Ordering::Relaxed),
                )
            };
            oldest = next;
            f(entry);
        }
    }

    /// Leaves a closure for the runtime's thread; false if the runtime is gone.
    pub(crate) fn call(&self, call: Call) -> bool {
        {
            let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
            if self.closed.load(Ordering::SeqCst) {
                return false;
            }
            calls.push(call);
            self.calls_pending.store(true, Ordering::Relaxed);
        }
        self.notify();
        true
    }

    pub(crate) fn take_calls(&self) -> Vec<Call> {
        if !self.calls_pending.load(Ordering::Relaxed) {
            return Vec::new();
        }
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        self.calls_pending.store(false, Ordering::Relaxed);
        std::mem::take(&mut calls)
    }

    /// The runtime ends: later wake-ups and calls go nowhere.
    pub(crate) fn close(&self) {
        let calls = {
            let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
            self.closed.store(true, Ordering::SeqCst);
            std::mem::take(&mut *calls)
        };
        drop(calls);
        fence(Ordering::SeqCst);
        self.take_woken(drop);
    }
}
