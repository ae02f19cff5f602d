//! What one connection has in common for all threads: link, controller, doorbells, and what registers were written.

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use zbdkit_io::SharedDwords;
use zbdkit_nvme::Controller;
use zbdkit_spec::nvme::controller::{Cc, offset};
use zbdkit_vfio_user::Link;

/// The first doorbell as a dword of BAR0.
const FIRST_DOORBELL: usize = offset::DOORBELLS as usize / 4;

/// One connection.
pub(super) struct Front {
    pub(super) link: Link,
    pub(super) controller: Arc<Controller>,
    pub(super) doorbells: Doorbells,
    /// Queues take and post nothing any more.
    halted: AtomicBool,
    /// CC.MPS when the controller was enabled, as bytes.
    page: AtomicU64,
    /// Bytes that commands hold to copy their data.
    pub(super) copies: AtomicUsize,
    written: Mutex<Written>,
    changed: Condvar,
}

/// The doorbell registers: submission queue tails and completion queue heads in turn, as the host wrote them. A client that
/// maps their page writes them itself.
pub(super) struct Doorbells {
    page: SharedDwords,
    /// The worker that serves the queue of a doorbell, plus one.
    workers: Box<[AtomicU32]>,
}

impl Doorbells {
    fn new(page: SharedDwords, queues: usize) -> Doorbells {
        let doorbells = Doorbells {
            page,
            workers: (0..2 * queues).map(|_| AtomicU32::new(0)).collect(),
        };
        (0..2 * queues).for_each(|index| doorbells.set(index, 0));
        doorbells
    }

    fn get(&self, index: usize) -> u32 {
        self.page.load(FIRST_DOORBELL + index)
    }

    fn set(&self, index: usize, value: u32) {
        self.page.store(FIRST_DOORBELL + index, value);
    }

    /// A submission queue's tail, which may be anything.
    pub(super) fn tail(&self, qid: u16) -> u32 {
        self.get(tail_of(qid))
    }

    /// A completion queue's head, which may be anything.
    pub(super) fn head(&self, qid: u16) -> u32 {
        self.get(head_of(qid))
    }

    /// Starts a submission queue's doorbell, on this worker.
    pub(super) fn open_sq(&self, qid: u16, worker: usize) {
        self.open(tail_of(qid), worker);
    }

    /// Starts a completion queue's doorbell.
    pub(super) fn open_cq(&self, qid: u16, worker: usize) {
        self.open(head_of(qid), worker);
    }

    fn open(&self, index: usize, worker: usize) {
        self.set(index, 0);
        self.workers[index].store(worker as u32 + 1, Ordering::Release);
    }

    /// The host rings the doorbell at this offset in BAR0. Returns the worker to wake; `None` where there is no such queue.
    pub(super) fn ring(&self, at: u64, value: u32) -> Option<usize> {
        let index = (at - offset::DOORBELLS) as usize / 4;
        let worker = self.workers.get(index)?.load(Ordering::Acquire).checked_sub(1);
        match worker {
            Some(_) => self.set(index, value & 0xffff),
            None => tracing::debug!("the host rang doorbell {index}, which no queue has"),
        }
        worker.map(|worker| worker as usize)
    }

    fn close(&self) {
        self.workers
            .iter()
            .for_each(|worker| worker.store(0, Ordering::Release));
    }
}

fn tail_of(qid: u16) -> usize {
    2 * usize::from(qid)
}

fn head_of(qid: u16) -> usize {
    2 * usize::from(qid) + 1
}

/// Registers that the control task follows.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AdminQueueRegisters {
    pub(super) aqa: u32,
    pub(super) asq: u64,
    pub(super) acq: u64,
}

#[derive(Default)]
struct Written {
    cc: Cc,
    /// The control task has seen `cc`.
    cc_seen: bool,
    admin: AdminQueueRegisters,
    resets_wanted: u64,
    resets_done: u64,
    ends: bool,
    ended: bool,
    waker: Option<Waker>,
}

/// What the control task has to do.
#[derive(Debug)]
pub(super) enum Task {
    /// CC was written, with these admin queue registers.
    Configure(Cc, AdminQueueRegisters),
    /// Reset everything.
    Reset(u64),
    /// Reset everything, and end.
    End,
}

impl Front {
    /// `page` holds the doorbells where BAR0 has them.
    pub(super) fn new(link: Link, controller: Arc<Controller>, page: SharedDwords) -> Front {
        let queues = usize::from(controller.options().io_queues) + 1;
        Front {
            link,
            controller,
            doorbells: Doorbells::new(page, queues),
            halted: AtomicBool::new(false),
            page: AtomicU64::new(4096),
            copies: AtomicUsize::new(0),
            written: Mutex::new(Written {
                cc_seen: true,
                ..Written::default()
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether queues have to leave host memory alone.
    pub(super) fn is_halted(&self) -> bool {
        self.halted.load(Ordering::Acquire)
    }

    /// Something is broken beyond repair but by a reset: CSTS.CFS, and no queue goes on.
    pub(super) fn halt(&self) {
        self.halted.store(true, Ordering::Release);
        self.controller.set_fatal();
    }

    /// Bytes of a host page.
    pub(super) fn page(&self) -> u64 {
        self.page.load(Ordering::Relaxed)
    }

    pub(super) fn set_page(&self, bytes: u64) {
        self.page.store(bytes, Ordering::Relaxed);
    }

    // The server's thread.

    pub(super) fn cc(&self) -> Cc {
        self.lock().cc
    }

    pub(super) fn admin_registers(&self) -> AdminQueueRegisters {
        self.lock().admin
    }

    /// The host writes CC. Where it writes faster than the control task follows, the task sees the last value.
    pub(super) fn write_cc(&self, cc: Cc) {
        let mut written = self.lock();
        written.cc = cc;
        written.cc_seen = false;
        Front::wake(written);
    }

    /// The host writes AQA, ASQ or ACQ, which are read when the controller is enabled.
    pub(super) fn write_admin_registers(&self, change: impl FnOnce(&mut AdminQueueRegisters)) {
        change(&mut self.lock().admin);
    }

    /// Asks for a reset.
    pub(super) fn begin_reset(&self) -> u64 {
        let mut written = self.lock();
        written.resets_wanted += 1;
        // Now, not when it is done: as soon as the host sees that, it may write them.
        written.admin = AdminQueueRegisters::default();
        written.cc = Cc::new();
        written.cc_seen = true;
        let wanted = written.resets_wanted;
        Front::wake(written);
        wanted
    }

    /// Waits for a reset; false where it is not done in time.
    pub(super) fn wait_reset(&self, number: u64, patience: Duration) -> bool {
        self.wait(patience, |written| written.resets_done >= number || written.ended)
    }

    /// Resets for good: the client is gone.
    pub(super) fn begin_end(&self) {
        let mut written = self.lock();
        written.ends = true;
        Front::wake(written);
    }

    /// Waits for the end; false where it is not reached in time.
    pub(super) fn wait_end(&self, patience: Duration) -> bool {
        self.wait(patience, |written| written.ended)
    }

    fn wait(&self, patience: Duration, done: impl Fn(&Written) -> bool) -> bool {
        let deadline = Instant::now() + patience;
        let mut written = self.lock();
        while !done(&written) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.changed.wait_timeout(written, left);
            written = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn wake(mut written: MutexGuard<'_, Written>) {
        let waker = written.waker.take();
        drop(written);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    // The control task.

    /// The next thing to do.
    pub(super) async fn next_task(&self) -> Task {
        poll_fn(|cx| {
            let mut written = self.lock();
            if written.ends {
                return Poll::Ready(Task::End);
            }
            if written.resets_done < written.resets_wanted {
                return Poll::Ready(Task::Reset(written.resets_wanted));
            }
            if !written.cc_seen {
                written.cc_seen = true;
                return Poll::Ready(Task::Configure(written.cc, written.admin));
            }
            written.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// All queues are gone, and nothing is in flight.
    pub(super) fn quiesced(&self) {
        self.doorbells.close();
        self.halted.store(false, Ordering::Release);
    }

    pub(super) fn reset_done(&self, number: u64) {
        let mut written = self.lock();
        written.resets_done = number;
        drop(written);
        self.changed.notify_all();
    }

    pub(super) fn ended(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }
}
