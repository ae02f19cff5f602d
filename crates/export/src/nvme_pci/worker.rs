//! A worker: a thread with a runtime, the queues that it serves, and how others talk to it.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::task::{Poll, Waker};
use std::thread::JoinHandle;

use zbdkit_io::{
    BackendKind, MemGuard, PollSource, Remote, Runtime, RuntimeOptions, TaskPool, add_poll_source, spawn,
};

use super::cq::Cq;
use super::front::Front;
use super::oneshot;
use super::sq::Sq;

/// Commands that execute on a worker at once.
const SLOTS: usize = 1024;

thread_local! {
    static WORKER: RefCell<Option<Rc<Worker>>> = const { RefCell::new(None) };
}

/// The worker of this thread.
pub(super) struct Worker {
    shared: Arc<Shared>,
    /// It does not sleep while it has queues: their doorbells may be written by a host that wakes nobody.
    polls: bool,
    pub(super) sqs: RefCell<Vec<Rc<Sq>>>,
    pub(super) cqs: RefCell<Vec<Rc<Cq>>>,
    /// Host memory, kept while the worker is awake and the map is the newest.
    memory: RefCell<Option<MemGuard>>,
}

/// What other threads reach.
#[derive(Default)]
struct Shared {
    exit: AtomicBool,
    /// Of the serving task.
    waker: Mutex<Option<Waker>>,
}

impl Shared {
    fn wake(&self) {
        let waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// A running worker. It ends when this is dropped.
pub(super) struct WorkerThread {
    handle: WorkerHandle,
    join: Option<JoinHandle<()>>,
}

/// A worker as other threads see it.
#[derive(Clone)]
pub(super) struct WorkerHandle {
    shared: Arc<Shared>,
    remote: Remote,
}

impl WorkerHandle {
    /// There is something to do: a doorbell rang, or memory is being taken away.
    pub(super) fn wake(&self) {
        self.shared.wake();
    }

    /// Runs a task on the worker. Nothing comes of it where the worker has ended.
    pub(super) fn spawn<F: Future<Output = ()> + 'static>(
        &self,
        f: impl FnOnce(Rc<Worker>) -> F + Send + 'static,
    ) {
        self.remote.run(move || {
            if let Some(worker) = WORKER.with_borrow(Option::clone) {
                spawn(f(worker));
            }
        });
    }

    /// Runs a task on the worker, and waits for what comes of it; `None` where the worker has ended.
    pub(super) async fn call<T: Send + 'static, F: Future<Output = T> + 'static>(
        &self,
        f: impl FnOnce(Rc<Worker>) -> F + Send + 'static,
    ) -> Option<T> {
        let (sender, receiver) = oneshot::channel();
        self.spawn(move |worker| {
            let task = f(worker);
            async move { sender.send(task.await) }
        });
        receiver.receive().await
    }
}

impl WorkerThread {
    pub(super) fn start(
        index: usize,
        options: RuntimeOptions,
        polls: bool,
    ) -> io::Result<(WorkerThread, BackendKind)> {
        let shared = Arc::<Shared>::default();
        let theirs = shared.clone();
        let (sender, receiver) = mpsc::channel();
        let join = std::thread::Builder::new()
            .name(format!("nvme{index}"))
            .spawn(move || {
                let runtime = match Runtime::new(options) {
                    Ok(runtime) => runtime,
                    Err(error) => {
                        let _ = sender.send(Err(error));
                        return;
                    }
                };
                let worker = Rc::new(Worker {
                    shared: theirs,
                    polls,
                    sqs: RefCell::default(),
                    cqs: RefCell::default(),
                    memory: RefCell::default(),
                });
                WORKER.set(Some(worker.clone()));
                let _ = sender.send(Ok((runtime.remote(), runtime.backend())));
                runtime.block_on(worker.serve());
                WORKER.set(None);
            })?;
        let (remote, kind) = receiver.recv().map_err(io::Error::other)??;
        let thread = WorkerThread {
            handle: WorkerHandle { shared, remote },
            join: Some(join),
        };
        Ok((thread, kind))
    }

    pub(super) fn handle(&self) -> &WorkerHandle {
        &self.handle
    }
}

impl Drop for WorkerThread {
    fn drop(&mut self) {
        self.handle.shared.exit.store(true, Ordering::Release);
        self.handle.wake();
        if let Some(join) = self.join.take() {
            let _ = join.join();
        }
    }
}

impl Worker {
    /// Serves all queues until the thread is to end.
    async fn serve(self: Rc<Worker>) {
        let pool = TaskPool::new(SLOTS);
        let start = |sq: Rc<Sq>, entry| {
            let worker = self.clone();
            let task = async move {
                sq.execute(entry).await;
                worker.shared.wake();
            };
            // There is a slot: no more is taken than there are slots.
            let _ = pool.try_spawn(task);
        };
        let registration = add_poll_source(self.clone() as Rc<dyn PollSource>);
        poll_fn(|cx| {
            self.set_waker(cx.waker());
            if self.shared.exit.load(Ordering::Acquire) {
                return Poll::Ready(());
            }
            self.flush();
            let mut room = pool.capacity() - pool.in_use();
            for sq in self.sqs.borrow().iter() {
                let memory = self.memory(sq.front());
                while room > 0
                    && let Some(entry) = sq.take(&memory)
                {
                    start(sq.clone(), entry);
                    room -= 1;
                }
            }
            Poll::Pending
        })
        .await;
        drop(registration);
    }

    fn flush(&self) {
        for cq in self.cqs.borrow().iter() {
            cq.flush(&self.memory(cq.front()));
        }
    }

    /// The newest map of host memory.
    pub(super) fn memory(&self, front: &Front) -> MemGuard {
        let mut held = self.memory.borrow_mut();
        if let Some(guard) = held.as_ref().filter(|guard| guard.is_current()) {
            return guard.clone();
        }
        // The old one first, so that nobody waits for it.
        *held = None;
        let guard = front.link.dma.guard();
        *held = Some(guard.clone());
        guard
    }

    /// Lets host memory go. For good once there is no queue.
    pub(super) fn forget_memory(&self) {
        *self.memory.borrow_mut() = None;
    }

    /// Something about the queues changed.
    pub(super) fn wake(&self) {
        self.shared.wake();
    }

    fn set_waker(&self, waker: &Waker) {
        let mut ours = self.shared.waker.lock().unwrap_or_else(PoisonError::into_inner);
        if ours.as_ref().is_none_or(|ours| !ours.will_wake(waker)) {
            *ours = Some(waker.clone());
        }
    }

    fn look(&self) -> bool {
        let sqs = self.sqs.borrow();
        let cqs = self.cqs.borrow();
        let something = sqs.iter().any(|sq| sq.has_entries(&self.memory(sq.front())))
            || cqs.iter().any(|cq| cq.can_flush(&self.memory(cq.front())));
        if something {
            self.wake();
        }
        something
    }
}

impl PollSource for Worker {
    fn poll(&self) -> bool {
        if self
            .memory
            .borrow()
            .as_ref()
            .is_some_and(|guard| !guard.is_current())
        {
            self.forget_memory();
        }
        self.look()
    }

    fn prepare_sleep(&self) -> bool {
        if self.polls && !self.sqs.borrow().is_empty() {
            // Whoever waits for this CPU may be who has the next request.
            std::thread::yield_now();
            self.poll();
            return true;
        }
        for sq in self.sqs.borrow().iter() {
            sq.ask_for_doorbell(&self.memory(sq.front()));
        }
        for cq in self.cqs.borrow().iter() {
            cq.ask_for_doorbell(&self.memory(cq.front()));
        }
        // Either the host sees the event index and rings, or we see what it put into shadow memory.
        fence(Ordering::SeqCst);
        let something = self.look();
        self.forget_memory();
        something
    }

    fn after_sleep(&self) {}
}
