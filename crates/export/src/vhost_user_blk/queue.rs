//! A running queue: takes chains, starts requests, gives chains back.
//!
//! One task does all of it, on the queue's own thread. Each time it is woken (by a completed request, by the
//! driver's kick, or because the avail index was seen to move) it first returns everything that is done, with
//! one update of the used index and at most one interrupt, then takes what is available. The requests that it
//! starts are submitted together, after the round.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io::IoSliceMut;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use rustix::io::{Errno, ReadWriteFlags, preadv2};
use zbdkit_block::{Device, Lane};
use zbdkit_io::unix::{set_nonblocking, signal};
use zbdkit_io::{MemGuard, PollSource, TaskPool, add_poll_source, readable};
use zbdkit_spec::virtio_blk::{Status, feature as f};

use super::execute::Executor;
use super::model::{Model, has};
use super::request::{Negotiated, NoStatus, Request, parse};
use super::thread::Control;
use crate::log_limit::{LogLimit, limited_warn};
use crate::memory::write;
use crate::vhost_user::backend::RingSetup;
use crate::virtio::chain::{Chain, ChainError, Table};
use crate::virtio::ring::{RingError, SplitRing};

static BROKEN: LogLimit = LogLimit::new(10, Duration::from_secs(60));

/// Why a queue cannot be served any further.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error(transparent)]
    NoStatus(#[from] NoStatus),
    #[error("its kick file descriptor is no eventfd")]
    Kick,
}

/// Everything that a queue is served with.
pub(super) struct Service {
    pub(super) device: Device,
    pub(super) model: Arc<Model>,
    pub(super) control: Arc<Control>,
    /// Most descriptors in a chain, whatever the ring's size.
    pub(super) chain_limit: usize,
}

/// Serves a ring until [`Control`] says stop and every request is answered. Returns the avail index of the next
/// chain.
pub(super) async fn serve(service: Service, setup: RingSetup) -> u16 {
    let base = setup.base;
    let kick = setup.kick.clone();
    let Some(queue) = Queue::new(service, setup) else {
        return base;
    };
    let queue = Rc::new(queue);
    let pool = TaskPool::new(usize::from(queue.table.size));
    let start = |request: Started| {
        let queue = queue.clone();
        let task = async move {
            let (status, written) = queue.executor().run(request.request.op).await;
            queue.complete(request.head, request.request.status_at, status, written);
        };
        // There is a slot: the queue takes no more chains than it has slots.
        let _ = pool.try_spawn(task);
    };
    let registration = add_poll_source(queue.clone());
    let mut kicked = pin!(Kick::new(kick));
    let mut chain = Chain::with_limit(queue.table.limit);
    poll_fn(|cx| {
        queue.set_waker(cx.waker());
        if let Err(broken) = kicked.as_mut().poll_kicks(cx) {
            queue.break_off(&broken);
        }
        queue.give_back();
        if queue.control.must_stop() {
            return if pool.in_use() == 0 {
                Poll::Ready(())
            } else {
                Poll::Pending
            };
        }
        let room = pool.capacity() - pool.in_use();
        queue.take(room, &mut chain, &start);
        queue.full.set(pool.in_use() == pool.capacity());
        queue.give_back();
        Poll::Pending
    })
    .await;
    drop(registration);
    queue.lane.quiet().await;
    queue.next_avail()
}

/// A request on its way to a slot.
struct Started {
    head: u16,
    request: Request,
}

struct Queue {
    index: u16,
    device: Device,
    lane: Lane,
    model: Arc<Model>,
    control: Arc<Control>,
    negotiated: Negotiated,
    table: Table,
    memory: MemGuard,
    ring: RefCell<SplitRing>,
    call: RefCell<Option<Arc<OwnedFd>>>,
    err: Option<Arc<OwnedFd>>,
    /// Answered, not yet shown to the driver: head, bytes written.
    done: RefCell<Vec<(u16, u32)>>,
    waker: RefCell<Waker>,
    broken: Cell<bool>,
    /// All slots are taken: what is available has to wait.
    full: Cell<bool>,
}

impl Queue {
    fn new(service: Service, setup: RingSetup) -> Option<Queue> {
        let Service {
            device,
            model,
            control,
            chain_limit,
        } = service;
        let features = setup.features;
        let memory = setup.memory.0.guard();
        let table = Table {
            addr: setup.desc,
            size: setup.size,
            indirect: has(features, f::RING_INDIRECT_DESC),
            limit: usize::from(setup.size).max(chain_limit),
        };
        let event_idx = has(features, f::RING_EVENT_IDX);
        let ring = SplitRing::new(&memory, table, setup.avail, setup.used, setup.base, event_idx);
        let ring = match ring.and_then(|ring| ring.disable_notifications(&memory).map(|()| ring)) {
            Ok(ring) => ring,
            Err(error) => {
                report_broken(setup.index, &error.into(), &control, setup.err.as_deref());
                return None;
            }
        };
        if let Some(call) = &setup.call {
            set_nonblocking(call);
        }
        Some(Queue {
            index: setup.index,
            lane: device.lane(setup.size.into()),
            device,
            negotiated: Negotiated::new(features, &model),
            model,
            control,
            table,
            memory,
            ring: RefCell::new(ring),
            call: RefCell::new(setup.call),
            err: setup.err,
            done: RefCell::new(Vec::with_capacity(setup.size.into())),
            waker: RefCell::new(Waker::noop().clone()),
            broken: Cell::new(false),
            full: Cell::new(false),
        })
    }

    fn executor(&self) -> Executor<'_> {
        Executor {
            device: &self.device,
            lane: &self.lane,
            model: &self.model,
            stats: &self.control.stats,
            zoned: self.negotiated.zoned,
        }
    }

    fn next_avail(&self) -> u16 {
        self.ring.borrow().next_avail()
    }

    /// Takes up to `room` chains and starts their requests.
    fn take(&self, room: usize, chain: &mut Chain, start: &impl Fn(Started)) {
        for _ in 0..room {
            if self.broken.get() {
                return;
            }
            match self.next(chain) {
                Ok(Some(started)) => match started.request.op {
                    super::request::Op::Fail(status) => {
                        self.control.stats.others.add(1);
                        self.control.stats.errors.add(1);
                        self.complete(started.head, started.request.status_at, status, 0);
                    }
                    _ => start(started),
                },
                Ok(None) => return,
                Err(broken) => self.break_off(&broken),
            }
        }
    }

    fn next(&self, chain: &mut Chain) -> Result<Option<Started>, Broken> {
        let Some(head) = self.ring.borrow_mut().pop(&self.memory)? else {
            return Ok(None);
        };
        chain.walk(&self.memory, self.table, head)?;
        let request = parse(chain, &self.memory, &self.model, self.negotiated)?;
        Ok(Some(Started { head, request }))
    }

    /// Answers a request. The driver hears of it with the others of the round.
    fn complete(&self, head: u16, status_at: u64, status: Status, written: u32) {
        // The address was in memory when the request was parsed, and the memory is still the same.
        let _ = write(&self.memory, status_at, &[status as u8]);
        self.done.borrow_mut().push((head, written.saturating_add(1)));
        self.waker.borrow().wake_by_ref();
    }

    /// Returns what is done to the driver, and interrupts it if it wants that.
    fn give_back(&self) {
        let mut done = self.done.borrow_mut();
        if done.is_empty() {
            return;
        }
        let mut ring = self.ring.borrow_mut();
        let mut result = Ok(());
        for (head, len) in done.drain(..) {
            result = result.and_then(|()| ring.push_used(&self.memory, head, len));
        }
        match result.and_then(|()| ring.publish(&self.memory)) {
            Ok(true) => self.interrupt(),
            Ok(false) => {}
            Err(error) => self.break_off(&error.into()),
        }
    }

    fn interrupt(&self) {
        if let Some(call) = self.control.take_new_call() {
            if let Some(call) = &call {
                set_nonblocking(call);
            }
            *self.call.borrow_mut() = call;
        }
        if let Some(call) = &*self.call.borrow() {
            signal(call);
        }
    }

    /// Stops taking chains; what was taken is still answered. Only a reset helps the driver.
    fn break_off(&self, why: &Broken) {
        if !self.broken.replace(true) {
            report_broken(self.index, why, &self.control, self.err.as_deref());
        }
    }

    /// Whether there is no use in looking for chains.
    fn is_quiet(&self) -> bool {
        self.broken.get() || self.full.get() || self.control.must_stop()
    }

    /// Remembers whom to wake. Almost always it is who it was, and then no lock is taken.
    fn set_waker(&self, waker: &Waker) {
        if !self.waker.borrow().will_wake(waker) {
            self.waker.borrow_mut().clone_from(waker);
            self.control.set_waker(waker);
        }
    }

    fn wake(&self) -> bool {
        self.waker.borrow().wake_by_ref();
        true
    }
}

impl PollSource for Queue {
    fn poll(&self) -> bool {
        !self.is_quiet() && self.ring.borrow().has_available(&self.memory) && self.wake()
    }

    fn prepare_sleep(&self) -> bool {
        if self.is_quiet() {
            return false;
        }
        match self.ring.borrow().enable_notifications(&self.memory) {
            Ok(more) => more && self.wake(),
            Err(error) => {
                self.break_off(&error.into());
                false
            }
        }
    }

    fn after_sleep(&self) {
        if !self.is_quiet() && self.ring.borrow().disable_notifications(&self.memory).is_err() {
            self.break_off(&RingError::Memory.into());
        }
    }
}

fn report_broken(index: u16, why: &Broken, control: &Control, err: Option<&OwnedFd>) {
    limited_warn!(
        BROKEN,
        "queue {index} is broken and stopped until the driver resets it: {why}"
    );
    control.set_broken();
    if let Some(err) = err {
        set_nonblocking(err);
        signal(err);
    }
}

/// Takes an eventfd's count without ever waiting for one, whatever the other side makes of its flags.
fn take_count(eventfd: &OwnedFd) -> Result<usize, Errno> {
    let mut count = [0; 8];
    // Offset -1: where the file stands, as read(2).
    let taken = preadv2(
        eventfd,
        &mut [IoSliceMut::new(&mut count)],
        u64::MAX,
        ReadWriteFlags::NOWAIT,
    );
    match taken {
        // Kernels before 5.8.
        Err(Errno::OPNOTSUPP) => rustix::io::read(eventfd, &mut count),
        taken => taken,
    }
}

type Wait = Pin<Box<dyn Future<Output = std::io::Result<()>>>>;

/// The driver's notifications.
struct Kick {
    fd: Arc<OwnedFd>,
    wait: Option<Wait>,
}

impl Kick {
    fn new(fd: Arc<OwnedFd>) -> Kick {
        set_nonblocking(&fd);
        let wait = wait_for(fd.clone());
        Kick { fd, wait: Some(wait) }
    }

    /// Takes notifications, and waits for the next.
    fn poll_kicks(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Result<(), Broken> {
        while let Some(wait) = &mut self.wait {
            if wait.as_mut().poll(cx).is_pending() {
                return Ok(());
            }
            self.wait = match take_count(&self.fd) {
                Ok(8) | Err(Errno::AGAIN | Errno::INTR) => Some(wait_for(self.fd.clone())),
                _ => None,
            };
            if self.wait.is_none() {
                return Err(Broken::Kick);
            }
        }
        Ok(())
    }
}

fn wait_for(fd: Arc<OwnedFd>) -> Wait {
    Box::pin(async move { readable(fd.as_fd()).await })
}
