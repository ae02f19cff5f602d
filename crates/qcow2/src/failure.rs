//! Failures after which nobody can say what the file holds: the first one is final for the opening.

use std::future::{Future, poll_fn};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use zbdkit_io::File;

use crate::error::Error;
use crate::lock::lock;

/// The errno of the first final failure, 0 while there was none.
#[derive(Default)]
pub struct Failure(AtomicI32);

impl Failure {
    /// Fails where an earlier failure was final.
    pub fn check(&self) -> Result<(), Error> {
        match self.0.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(Error::Failed { errno }),
        }
    }

    /// Notes a failure that is final.
    pub fn fail(&self, errno: i32) {
        let first = self
            .0
            .compare_exchange(0, errno, Ordering::AcqRel, Ordering::Acquire);
        if first.is_ok() {
            tracing::error!(
                "writing metadata failed ({}): the image takes no changes until it is reopened",
                std::io::Error::from_raw_os_error(errno)
            );
        }
    }

    /// Notes the failure of a change. A full disk is not final: whoever made the change sees to it that memory and file
    /// agree then.
    pub fn note<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        if let Err(Error::Io { errno, .. }) = &result
            && !matches!(*errno, libc::ENOSPC | libc::EDQUOT | libc::EFBIG | libc::ENOMEM)
        {
            self.fail(*errno);
        }
        result
    }

    /// Carries out I/O that must not be cut off. Where its future is dropped half-way, the I/O goes on, and whoever
    /// comes next to the same place might be overtaken by it: so nobody changes anything after that.
    pub async fn whole<T>(&self, io: impl Future<Output = T>) -> T {
        let unless = CutOff(self);
        let result = io.await;
        std::mem::forget(unless);
        result
    }
}

struct CutOff<'a>(&'a Failure);

impl Drop for CutOff<'_> {
    fn drop(&mut self) {
        self.0.fail(libc::ECANCELED);
    }
}

/// The syncs of a file, one at a time. The kernel tells of a failed write-back once only, so two syncs side by side would
/// let one of them believe what the other one knows to be lost. Who comes while one runs shares the next.
pub struct Syncs {
    file: File,
    failure: Arc<Failure>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    running: bool,
    /// Syncs so far; the last of them may be running.
    begun: u64,
    /// The last one that succeeded.
    ended: u64,
    waiting: Vec<Waker>,
}

impl Syncs {
    /// For a file whose failed syncs are final for `failure`.
    pub fn new(file: File, failure: Arc<Failure>) -> Syncs {
        Syncs {
            file,
            failure,
            state: Mutex::default(),
        }
    }

    /// Makes durable what was completed before the call.
    pub async fn sync(&self) -> Result<(), Error> {
        // One that runs may have begun before that.
        let wanted = lock(&self.state).begun + 1;
        let leads = poll_fn(|cx| {
            self.failure.check()?;
            let mut state = lock(&self.state);
            if state.ended >= wanted {
                return Poll::Ready(Ok(false));
            }
            if !state.running {
                state.running = true;
                state.begun += 1;
                return Poll::Ready(Ok(true));
            }
            if !state.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                state.waiting.push(cx.waker().clone());
            }
            Poll::Pending
        });
        if !leads.await? {
            return Ok(());
        }
        let turn = Turn(self);
        // Whatever the errno, also of a full disk: what was written before may be gone.
        let synced = self.failure.whole(self.file.datasync()).await;
        let result = match synced {
            Ok(()) => {
                let mut state = lock(&self.state);
                state.ended = state.begun;
                Ok(())
            }
            Err(error) => {
                let error = Error::io("flush", &error);
                self.failure.fail(error.errno());
                Err(error)
            }
        };
        drop(turn);
        result
    }
}

/// The right to sync, until dropped.
struct Turn<'a>(&'a Syncs);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let waiting = {
            let mut state = lock(&self.0.state);
            state.running = false;
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}
