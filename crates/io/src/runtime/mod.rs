//! One thread's executor and reactor.
//!
//! A round of the run loop polls every ready task, hands all queued operations to the kernel in one system call,
//! takes completions, looks at the poll sources and the timers, and starts over. When a round finds nothing, the
//! thread watches memory for a bounded, adaptive time (see [`spin`]), and then sleeps in the kernel.
//!
//! Nothing here is shared with other threads but [`wake::Shared`].

mod future;
mod ops;
mod passthrough;
mod spin;
mod task;
mod threads;
mod timer;
mod uring;
pub(crate) mod wake;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

pub(crate) use future::Operation;
pub use future::{readable, yield_now};
pub(crate) use ops::{Kind, Request, advance};
pub use spin::{PollRegistration, PollSource, add_poll_source};
pub use task::{TaskPool, spawn};
pub use timer::{Sleep, sleep};

use ops::{Completion, Reactor, Slab};
use spin::Spinner;
use task::{Boxed, Target};
use timer::Timers;
use wake::{Entry, Shared};

/// Which way I/O goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// io_uring, or worker threads where the kernel or a sandbox does not allow it. The environment variable
    /// `ZBDKIT_IO` (`uring` or `threads`) decides if it is set.
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// Worker threads.
    Threads,
}

/// The backend that a runtime uses, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// io_uring.
    IoUring,
    /// Worker threads that make blocking system calls.
    Threads {
        /// Why not io_uring.
        reason: String,
    },
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BackendKind::IoUring => f.write_str("io_uring"),
            BackendKind::Threads { reason } => write!(f, "worker threads ({reason})"),
        }
    }
}

/// What happens when a task (not the future given to `block_on`, whose panic simply unwinds) panics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnPanic {
    /// The process ends with a message: a request is lost, and nobody could say what it had done.
    #[default]
    Abort,
    /// `block_on` panics with it. For tests.
    Resume,
}

/// How to make a [`Runtime`].
#[derive(Clone, Debug)]
pub struct RuntimeOptions {
    /// Which way I/O goes.
    pub backend: Backend,
    /// Operations in flight without allocating more; also the size of the submission queue. More is never an error.
    pub entries: u32,
    /// The longest time to watch memory before sleeping; zero turns that off.
    pub busy_poll: Duration,
    /// What a panic of a task does.
    pub on_panic: OnPanic,
}

impl Default for RuntimeOptions {
    fn default() -> RuntimeOptions {
        RuntimeOptions {
            backend: Backend::Auto,
            entries: 256,
            busy_poll: Duration::from_micros(50),
            on_panic: OnPanic::Abort,
        }
    }
}

/// The executor and reactor of the thread that made it. A thread has one at a time.
pub struct Runtime {
    inner: Rc<Inner>,
    kind: BackendKind,
}

thread_local! {
    pub(crate) static CURRENT: RefCell<Option<Rc<Inner>>> = const { RefCell::new(None) };
}

/// Runs `f` with this thread's runtime. Panics where there is none.
pub(crate) fn with_current<R>(f: impl FnOnce(&Rc<Inner>) -> R) -> R {
    CURRENT.with_borrow(|current| f(current.as_ref().expect("this thread has no io::Runtime")))
}

pub(crate) struct Inner {
    pub(crate) shared: Arc<Shared>,
    /// Tasks to poll, in the order in which they were woken.
    pub(crate) ready: RefCell<VecDeque<Arc<Entry>>>,
    /// Tasks that let the others and the I/O go first.
    deferred: RefCell<Vec<Waker>>,
    pub(crate) reactor: RefCell<Reactor>,
    targets: RefCell<Vec<Option<Rc<dyn Target>>>>,
    boxed: Rc<Boxed>,
    timers: RefCell<Timers>,
    spinner: Spinner,
    running: Cell<bool>,
    on_panic: OnPanic,
}

/// The future given to `block_on`.
const ROOT: u32 = 0;
/// Tasks of `spawn`.
const BOXED: u32 = 1;

/// Polls in one round before the I/O gets its turn.
const ROUND: usize = 1024;

/// How long a runtime that is dropped waits for its operations.
const DRAIN: Duration = Duration::from_secs(30);

impl Runtime {
    /// Makes this thread's runtime.
    ///
    /// Fails if the thread has one already, if `Backend::IoUring` is not to be had, if `ZBDKIT_IO` has another
    /// value than `uring` or `threads`, or if the process is out of descriptors or memory.
    pub fn new(options: RuntimeOptions) -> io::Result<Runtime> {
        if CURRENT.with_borrow(Option::is_some) {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "this thread has an io::Runtime",
            ));
        }
        let shared = Shared::new()?;
        let entries = options.entries.clamp(8, 4096);
        let (driver, kind) = Driver::new(options.backend, entries, &shared)?;
        let boxed = Rc::new(Boxed::new(shared.clone(), BOXED));
        let inner = Rc::new(Inner {
            shared,
            ready: RefCell::new(VecDeque::with_capacity(64)),
            deferred: RefCell::default(),
            reactor: RefCell::new(Reactor::new(driver, entries)),
            targets: RefCell::new(vec![None, Some(boxed.clone())]),
            boxed,
            timers: RefCell::default(),
            spinner: Spinner::new(options.busy_poll),
            running: Cell::new(false),
            on_panic: options.on_panic,
        });
        CURRENT.set(Some(inner.clone()));
        Ok(Runtime { inner, kind })
    }

    /// The backend in use; its `Display` says why it is not io_uring.
    pub fn backend(&self) -> BackendKind {
        self.kind.clone()
    }

    /// Runs `future` and all tasks of this runtime until `future` is done. Tasks that are not stay, and go on in
    /// the next call. Panics inside another `block_on`.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let inner = &*self.inner;
        assert!(!inner.running.replace(true), "block_on inside block_on");
        let _running = Reset(&inner.running);
        let mut future = pin!(future);
        let root = Entry::new(&inner.shared, ROOT, 0);
        let waker = Waker::from(root);
        waker.wake_by_ref();
        loop {
            for _ in 0..ROUND {
                let Some(entry) = inner.ready.borrow_mut().pop_front() else {
                    break;
                };
                entry.begin();
                if entry.target != ROOT {
                    inner.run(&entry);
                } else if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                    return output;
                }
            }
            inner.turn();
        }
    }

    /// A handle for other threads.
    pub fn remote(&self) -> Remote {
        Remote {
            shared: self.inner.shared.clone(),
        }
    }
}

struct Reset<'a>(&'a Cell<bool>);

impl Drop for Reset<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

impl Inner {
    /// Polls one task.
    fn run(&self, entry: &Entry) {
        let target = self.targets.borrow()[entry.target as usize].clone();
        let Some(target) = target else { return };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target.run(entry.index))) {
            match self.on_panic {
                OnPanic::Resume => std::panic::resume_unwind(panic),
                OnPanic::Abort => {
                    let text = panic.downcast_ref::<&str>().map(|s| s.to_string());
                    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
                    die(&format!("a task panicked: {}", text.unwrap_or_default()));
                }
            }
        }
    }

    /// Everything between two rounds of polling tasks.
    fn turn(&self) {
        self.reactor.borrow_mut().submit();
        self.collect();
        self.wake_deferred();
        if self.ready.borrow().is_empty() {
            self.idle();
            self.collect();
        }
    }

    /// Moves everything that has happened into the ready queue.
    fn collect(&self) {
        self.reap();
        self.shared
            .take_woken(|entry| self.ready.borrow_mut().push_back(entry));
        for call in self.shared.take_calls() {
            call();
        }
        self.spinner.poll();
        self.fire_timers();
    }

    fn wake_deferred(&self) {
        let mut wakers = self.deferred.take();
        for waker in wakers.drain(..) {
            waker.wake();
        }
        // Keep the space.
        wakers.append(&mut self.deferred.borrow_mut());
        self.deferred.replace(wakers);
    }

    fn reap(&self) {
        let mut finished = {
            let mut reactor = self.reactor.borrow_mut();
            reactor.reap();
            std::mem::take(&mut reactor.finished)
        };
        for waker in finished.wakers.drain(..) {
            waker.wake();
        }
        finished.bufs.clear();
        finished.files.clear();
        // Keep the space. What came meanwhile (an operation abandoned while we dropped things) stays for later.
        let now = &mut self.reactor.borrow_mut().finished;
        finished.wakers.append(&mut now.wakers);
        finished.bufs.append(&mut now.bufs);
        finished.files.append(&mut now.files);
        *now = finished;
    }

    fn fire_timers(&self) {
        if self.timers.borrow().is_empty() {
            return;
        }
        let now = Instant::now();
        loop {
            let due = self.timers.borrow_mut().pop_due(now);
            match due {
                Some(waker) => waker.wake(),
                None => break,
            }
        }
    }

    fn has_news(&self) -> bool {
        !self.ready.borrow().is_empty() || self.shared.has_work()
    }

    /// Nothing is ready: watches for a while, then sleeps.
    fn idle(&self) {
        // Transfers that came back short are queued again.
        self.reactor.borrow_mut().submit();
        let next_timer = self.timers.borrow().next();
        let in_flight = self.reactor.borrow().in_flight();
        let watch = || self.has_news() || self.reactor.borrow_mut().has_completions();
        if self.spinner.watch(in_flight > 0, next_timer, watch) {
            return;
        }
        self.shared.begin_sleep();
        if !self.has_news() && self.spinner.prepare_sleep() {
            if !self.has_news() {
                let start = Instant::now();
                let timeout = next_timer.map(|at| at.saturating_duration_since(start));
                self.reactor.borrow_mut().wait(timeout);
                self.spinner.slept(start.elapsed());
            }
            self.spinner.after_sleep();
        }
        self.shared.end_sleep();
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        let inner = &*self.inner;
        inner.boxed.clear();
        for target in inner.targets.take() {
            drop(target);
        }
        inner.shared.close();
        drop(inner.ready.take());
        drop(inner.deferred.take());
        inner.timers.take();
        inner.spinner.clear();
        inner.drain();
        let current = CURRENT.take();
        drop(current);
    }
}

impl Inner {
    /// Waits for the operations that are left, since the kernel may still touch their memory.
    fn drain(&self) {
        let deadline = Instant::now() + DRAIN;
        self.reactor.borrow_mut().cancel_endless();
        loop {
            self.reactor.borrow_mut().submit();
            self.reap();
            if self.reactor.borrow().in_flight() == 0 {
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.reactor.borrow_mut().leak();
                return;
            }
            self.shared.begin_sleep();
            if !self.shared.has_work() {
                self.reactor.borrow_mut().wait(Some(left));
            }
            self.shared.end_sleep();
        }
    }
}

/// Runs closures on a runtime's thread, from any thread.
#[derive(Clone)]
pub struct Remote {
    shared: Arc<Shared>,
}

impl Remote {
    /// Has the runtime's thread run `f` soon, between tasks; `f` may [`spawn`]. False if the runtime is gone; true
    /// does not promise that it runs before it goes.
    pub fn run(&self, f: impl FnOnce() + Send + 'static) -> bool {
        self.shared.call(Box::new(f))
    }
}

/// Hands the queued operations to the kernel now. The run loop does so after each round of tasks anyway.
pub fn submit() {
    with_current(|inner| inner.reactor.borrow_mut().submit());
}

/// Ends the process: its state can no longer be vouched for.
pub(crate) fn die(message: &str) -> ! {
    // Not through `eprintln`, which a test harness may catch and then lose.
    let _ = rustix::io::write(
        rustix::stdio::stderr(),
        format!("zbdkit: fatal: {message}\n").as_bytes(),
    );
    std::process::abort();
}

/// Carries out operations. Both kinds behave the same to the reactor.
pub(crate) enum Driver {
    Uring(Box<uring::Uring>),
    Threads(threads::Threads),
}

impl Driver {
    fn new(backend: Backend, entries: u32, shared: &Arc<Shared>) -> io::Result<(Driver, BackendKind)> {
        let threads = |reason: String| {
            Ok((
                Driver::Threads(threads::Threads::new(shared.clone())),
                BackendKind::Threads { reason },
            ))
        };
        let forced = match (backend, std::env::var("ZBDKIT_IO").ok().as_deref()) {
            (Backend::IoUring, _) | (Backend::Auto, Some("uring")) => true,
            (Backend::Threads, _) => return threads("as configured".into()),
            (Backend::Auto, Some("threads")) => return threads("ZBDKIT_IO=threads".into()),
            (Backend::Auto, None | Some("")) => false,
            (Backend::Auto, Some(other)) => {
                let text = format!("ZBDKIT_IO={other}: it is \"uring\" or \"threads\"");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
        };
        match uring::Uring::new(entries, shared.clone()) {
            Ok(ring) => Ok((Driver::Uring(Box::new(ring)), BackendKind::IoUring)),
            Err(e) if forced => Err(io::Error::new(e.kind(), format!("io_uring: {e}"))),
            Err(e) => {
                let text = e.to_string();
                let text = text.split(" (os error").next().unwrap_or_default();
                threads(format!("io_uring: {text}"))
            }
        }
    }

    fn push(&mut self, slab: &mut Slab, index: u32) {
        match self {
            Driver::Uring(ring) => ring.push(slab, index),
            Driver::Threads(threads) => threads.push(slab, index),
        }
    }

    fn submit(&mut self, slab: &mut Slab) {
        match self {
            Driver::Uring(ring) => ring.submit(slab),
            Driver::Threads(threads) => threads.submit(),
        }
    }

    /// Asks for the end of an operation; true if it is over already and no completion will come.
    fn cancel(&mut self, _slab: &mut Slab, index: u32) -> bool {
        match self {
            Driver::Uring(ring) => {
                ring.cancel(index);
                false
            }
            Driver::Threads(threads) => threads.cancel(index),
        }
    }

    fn reap(&mut self, slab: &mut Slab, out: &mut Vec<Completion>) {
        match self {
            Driver::Uring(ring) => ring.reap(slab, out),
            Driver::Threads(threads) => threads.reap(out),
        }
    }

    fn has_completions(&mut self) -> bool {
        match self {
            Driver::Uring(ring) => ring.has_completions(),
            Driver::Threads(threads) => threads.has_completions(),
        }
    }

    fn wait(&mut self, slab: &mut Slab, timeout: Option<Duration>) {
        match self {
            Driver::Uring(ring) => ring.wait(slab, timeout),
            Driver::Threads(threads) => threads.wait(timeout),
        }
    }
}
