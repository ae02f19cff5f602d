//! The thread of a queue, and how the control side talks to it.
//!
//! A queue's thread lives as long as the server, with its own runtime; the queue that runs on it comes and goes
//! with connections.

use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::task::{Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use zbdkit_io::{BackendKind, Remote, Runtime, RuntimeOptions, spawn};

use super::queue::{Service, serve};
use super::stats::QueueStats;
use crate::vhost_user::backend::{RingSetup, Stuck};

/// What both sides of a queue see.
#[derive(Debug, Default)]
pub(super) struct Control {
    stop: AtomicBool,
    broken: AtomicBool,
    has_new_call: AtomicBool,
    exit: AtomicBool,
    state: Mutex<State>,
    stopped: Condvar,
    pub(super) stats: QueueStats,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    next_avail: u16,
    new_call: Option<Arc<OwnedFd>>,
    waker: Option<Waker>,
    root: Option<Waker>,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the queue has to come to rest.
    pub(super) fn must_stop(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Whom to wake when that changes.
    pub(super) fn set_waker(&self, waker: &Waker) {
        let mut state = self.lock();
        match &mut state.waker {
            Some(old) => old.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
    }

    /// Only a reset helps.
    pub(super) fn set_broken(&self) {
        self.broken.store(true, Ordering::Release);
    }

    /// The interrupt's new eventfd, if it was changed.
    pub(super) fn take_new_call(&self) -> Option<Option<Arc<OwnedFd>>> {
        if !self.has_new_call.load(Ordering::Acquire) {
            return None;
        }
        let mut state = self.lock();
        self.has_new_call.store(false, Ordering::Relaxed);
        Some(state.new_call.take())
    }

    fn finished(&self, next_avail: u16) {
        let mut state = self.lock();
        state.running = false;
        state.next_avail = next_avail;
        state.waker = None;
        self.stopped.notify_all();
    }
}

/// A queue's thread.
#[derive(Debug)]
pub(super) struct QueueThread {
    index: u16,
    control: Arc<Control>,
    remote: RemoteHandle,
    join: Option<JoinHandle<()>>,
}

struct RemoteHandle(Remote);

impl std::fmt::Debug for RemoteHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Remote")
    }
}

impl QueueThread {
    /// Starts the thread of queue `index`.
    pub(super) fn start(index: u16, options: RuntimeOptions) -> io::Result<(QueueThread, BackendKind)> {
        let control = Arc::new(Control::default());
        let (sender, receiver) = mpsc::channel();
        let theirs = control.clone();
        let join = std::thread::Builder::new()
            .name(format!("vq{index}"))
            .spawn(move || {
                let runtime = match Runtime::new(options) {
                    Ok(runtime) => runtime,
                    Err(error) => {
                        let _ = sender.send(Err(error));
                        return;
                    }
                };
                let _ = sender.send(Ok((runtime.remote(), runtime.backend())));
                runtime.block_on(poll_fn(|cx| {
                    // The waker first: whoever sets the flag wakes it afterwards.
                    theirs.lock().root = Some(cx.waker().clone());
                    if theirs.exit.load(Ordering::Acquire) {
                        Poll::Ready(())
                    } else {
                        Poll::Pending
                    }
                }));
            })?;
        let (remote, kind) = receiver.recv().map_err(io::Error::other)??;
        Ok((
            QueueThread {
                index,
                control,
                remote: RemoteHandle(remote),
                join: Some(join),
            },
            kind,
        ))
    }

    pub(super) fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// Serves a ring. The queue must be at rest.
    pub(super) fn serve(&self, service: Service, setup: RingSetup) -> Result<(), Stuck> {
        let mut state = self.control.lock();
        if state.running {
            return Err(Stuck {
                index: self.index,
                seconds: 0,
            });
        }
        *state = State {
            running: true,
            next_avail: setup.base,
            root: state.root.take(),
            ..State::default()
        };
        self.control.stop.store(false, Ordering::Release);
        self.control.broken.store(false, Ordering::Release);
        self.control.has_new_call.store(false, Ordering::Release);
        drop(state);
        let control = self.control.clone();
        self.remote.0.run(move || {
            spawn(async move {
                let next_avail = serve(service, setup).await;
                control.finished(next_avail);
            });
        });
        Ok(())
    }

    /// Tells the queue to come to rest.
    pub(super) fn begin_stop(&self) {
        self.control.stop.store(true, Ordering::Release);
        let waker = self.control.lock().waker.clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits until it has, at most for `patience`.
    pub(super) fn wait_stopped(&self, patience: Duration) -> Result<u16, Stuck> {
        let deadline = Instant::now() + patience;
        let mut state = self.control.lock();
        while state.running {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Stuck {
                    index: self.index,
                    seconds: patience.as_secs(),
                });
            }
            state = self
                .control
                .stopped
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(state.next_avail)
    }

    /// Changes the eventfd of the running queue's interrupt.
    pub(super) fn set_call(&self, call: Option<Arc<OwnedFd>>) {
        let mut state = self.control.lock();
        state.new_call = call;
        self.control.has_new_call.store(true, Ordering::Release);
    }

    /// Whether the queue is broken until it is started again.
    pub(super) fn is_broken(&self) -> bool {
        self.control.broken.load(Ordering::Acquire)
    }

    /// Forgets that it was broken.
    pub(super) fn clear_broken(&self) {
        self.control.broken.store(false, Ordering::Release);
    }
}

impl Drop for QueueThread {
    fn drop(&mut self) {
        self.begin_stop();
        self.control.exit.store(true, Ordering::Release);
        let root = self.control.lock().root.take();
        if let Some(root) = root {
            root.wake();
        }
        if let Some(join) = self.join.take() {
            let _ = join.join();
        }
    }
}
