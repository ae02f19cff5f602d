//! The driver for where io_uring is not allowed: worker threads that make the system calls.

#![expect(
    unsafe_code,
    reason = "worker threads use memory that the operation's slot owns"
)]

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::ops::{Completion, IoVec, Kind, Slab};
use super::wake::Shared;
use crate::{nvme, sys};

/// Requests that one runtime has in the kernel at once.
const MAX_WORKERS: usize = 16;

/// While the thread is busy, descriptors are looked at every so many rounds.
const POLL_ROUNDS: u32 = 16;

pub(crate) struct Threads {
    shared: Arc<Shared>,
    crew: Arc<Crew>,
    workers: usize,
    pending: Vec<Job>,
    polls: Vec<(RawFd, u32)>,
    rounds: u32,
    pollfds: Vec<libc::pollfd>,
}

/// What the workers share with the runtime.
struct Crew {
    queue: Mutex<Queue>,
    work: Condvar,
    done: Mutex<Vec<Completion>>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

struct Job {
    index: u32,
    kind: Kind,
    fd: RawFd,
    offset: u64,
    len: u64,
    vectors: Vec<IoVec>,
}

// SAFETY: the vectors point to memory that the operation's slot keeps until the job's completion was taken; the
// worker touches it before it posts that completion, and only through the kernel.
unsafe impl Send for Job {}

impl Threads {
    pub(crate) fn new(shared: Arc<Shared>) -> Threads {
        let crew = Crew {
            queue: Mutex::default(),
            work: Condvar::new(),
            done: Mutex::default(),
            shared: shared.clone(),
        };
        Threads {
            shared,
            crew: Arc::new(crew),
            workers: 0,
            pending: Vec::new(),
            polls: Vec::new(),
            rounds: 0,
            pollfds: Vec::new(),
        }
    }

    pub(crate) fn push(&mut self, slab: &mut Slab, index: u32) {
        let slot = slab.get(index);
        let (kind, fd, offset, len) = (
            slot.request.kind,
            slot.request.fd,
            slot.position(),
            slot.request.len,
        );
        let vectors = match kind {
            Kind::Poll => return self.polls.push((fd, index)),
            Kind::Read | Kind::Write | Kind::Nvme(_) => slot.vectors().to_vec(),
            _ => Vec::new(),
        };
        self.pending.push(Job {
            index,
            kind,
            fd,
            offset,
            len,
            vectors,
        });
    }

    pub(crate) fn submit(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let count = self.pending.len();
        let mut queue = lock(&self.crew.queue);
        queue.jobs.extend(self.pending.drain(..));
        let wanted = queue
            .jobs
            .len()
            .saturating_sub(queue.idle)
            .min(MAX_WORKERS - self.workers);
        drop(queue);
        for _ in 0..count {
            self.crew.work.notify_one();
        }
        for _ in 0..wanted {
            self.hire();
        }
    }

    fn hire(&mut self) {
        let crew = self.crew.clone();
        match std::thread::Builder::new()
            .name("zbdkit-io".into())
            .spawn(move || crew.work())
        {
            Ok(_) => self.workers += 1,
            // Those that are there do the work, only slower.
            Err(_) if self.workers > 0 => {}
            Err(e) => super::die(&format!("cannot start a thread for I/O: {e}")),
        }
    }

    /// Whether the operation is cancelled: it was a poll.
    pub(crate) fn cancel(&mut self, index: u32) -> bool {
        let before = self.polls.len();
        self.polls.retain(|(_, i)| *i != index);
        self.polls.len() != before
    }

    pub(crate) fn reap(&mut self, out: &mut Vec<Completion>) {
        if self.shared.completions.load(Ordering::Relaxed) {
            let mut done = lock(&self.crew.done);
            self.shared.completions.store(false, Ordering::Relaxed);
            out.append(&mut done);
        }
        if !self.polls.is_empty() {
            self.rounds += 1;
            if self.rounds >= POLL_ROUNDS {
                self.look(Some(Duration::ZERO));
            }
            self.take_ready(out);
        }
    }

    pub(crate) fn has_completions(&mut self) -> bool {
        self.shared.completions.load(Ordering::Relaxed)
    }

    pub(crate) fn wait(&mut self, timeout: Option<Duration>) {
        self.submit();
        self.look(timeout);
    }

    /// poll(2) on the eventfd and everything whose readiness somebody awaits.
    fn look(&mut self, timeout: Option<Duration>) {
        self.rounds = 0;
        self.pollfds.clear();
        let fds =
            std::iter::once(self.shared.eventfd.as_raw_fd()).chain(self.polls.iter().map(|(fd, _)| *fd));
        self.pollfds.extend(fds.map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        }));
        // Fails with EINTR, or ENOMEM, which the next round tries again; then nothing is ready.
        if sys::poll(&mut self.pollfds, timeout).is_err() {
            self.pollfds.clear();
        } else if self.pollfds[0].revents != 0 {
            self.shared.drain_eventfd();
        }
    }

    /// Completes the polls that the last look found ready. Polls were only added since, at the end, or removed
    /// together with their position: then the descriptors do not match and the next look finds them.
    fn take_ready(&mut self, out: &mut Vec<Completion>) {
        if self.pollfds.len() <= 1 {
            return;
        }
        let ready: Vec<RawFd> = self.pollfds[1..]
            .iter()
            .filter(|p| p.revents != 0)
            .map(|p| p.fd)
            .collect();
        self.pollfds.clear();
        self.polls.retain(|(fd, index)| {
            let found = ready.contains(fd);
            if found {
                out.push(Completion {
                    index: *index,
                    result: 0,
                    value: 0,
                });
            }
            !found
        });
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        lock(&self.crew.queue).closed = true;
        self.crew.work.notify_all();
    }
}

impl Crew {
    fn work(&self) {
        loop {
            let mut queue = lock(&self.queue);
            let job = loop {
                if let Some(job) = queue.jobs.pop_front() {
                    break job;
                }
                if queue.closed {
                    return;
                }
                queue.idle += 1;
                queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            };
            drop(queue);
            let (result, value) = job.run();
            {
                let mut done = lock(&self.done);
                done.push(Completion {
                    index: job.index,
                    result,
                    value,
                });
                self.shared.completions.store(true, Ordering::Relaxed);
            }
            self.shared.notify();
        }
    }
}

impl Job {
    fn run(&self) -> (i32, u64) {
        let result = match self.kind {
            // SAFETY: the slot keeps the memory until the completion; see `Send`.
            Kind::Read => unsafe { sys::preadv(self.fd, &self.vectors, self.offset) },
            // SAFETY: likewise.
            Kind::Write => unsafe { sys::pwritev(self.fd, &self.vectors, self.offset) },
            Kind::Sync { data_only } => sys::fsync(self.fd, data_only),
            Kind::Allocate { mode } => sys::fallocate(self.fd, mode, self.offset, self.len),
            // SAFETY: likewise.
            Kind::Nvme(command) => return unsafe { nvme::ioctl(self.fd, &command, &self.vectors) },
            Kind::Poll => unreachable!("polls are not jobs"),
        };
        (result, 0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
