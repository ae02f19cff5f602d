//! Commands for devices, beside a thread's ordinary ring: they need entries of twice the size (IORING_SETUP_SQE128 and
//! CQE32), which other requests would pay for, too. So they get a ring of their own, made when the first one comes. Its
//! completions ring the eventfd that the ordinary ring watches, so the thread sleeps in one place.
//!
//! What this ring or the file behind it does not take goes to worker threads, which make the ioctl.

#![expect(
    unsafe_code,
    reason = "submission entries carry pointers to memory that their slots own"
)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode, squeue};

use super::ops::{Completion, Kind, Slab};
use super::threads::Threads;
use super::wake::Shared;
use crate::nvme;

/// Commands in the submission queue at once; more wait for a system call.
const ENTRIES: u32 = 128;

type Ring = IoUring<squeue::Entry128, cqueue::Entry32>;

pub(crate) struct Passthrough {
    /// `None` where the kernel has no such ring.
    ring: Option<Ring>,
    threads: Threads,
    /// What found no room in the submission queue.
    backlog: VecDeque<u32>,
}

impl Passthrough {
    pub(crate) fn new(shared: Arc<Shared>) -> Passthrough {
        Passthrough {
            ring: build(&shared).ok(),
            threads: Threads::new(shared),
            backlog: VecDeque::new(),
        }
    }

    pub(crate) fn push(&mut self, slab: &mut Slab, index: u32) {
        if self.ring.is_none() {
            self.threads.push(slab, index);
        } else if !self.backlog.is_empty() || !self.try_push(slab, index) {
            self.backlog.push_back(index);
        }
    }

    fn try_push(&mut self, slab: &mut Slab, index: u32) -> bool {
        let Some(ring) = &mut self.ring else { return false };
        let slot = slab.get(index);
        let (Kind::Nvme(command), fd) = (slot.request.kind, Fd(slot.request.fd)) else {
            unreachable!("slot {index} is no command for a device")
        };
        let (operation, bytes) = nvme::uring_cmd(&command, slot.vectors());
        let entry = opcode::UringCmd80::new(fd, operation).cmd(bytes).build();
        // SAFETY: the vectors and the memory that they point to belong to the slot, which keeps both until the
        // completion arrives.
        unsafe { ring.submission().push(&entry.user_data(u64::from(index))).is_ok() }
    }

    pub(crate) fn submit(&mut self, slab: &mut Slab) {
        self.enter();
        while let Some(index) = self.backlog.pop_front() {
            if !self.try_push(slab, index) {
                self.enter();
                if !self.try_push(slab, index) {
                    self.backlog.push_front(index);
                    break;
                }
            }
        }
        self.enter();
        self.threads.submit();
    }

    /// Hands what is queued to the kernel, and lets it do what it holds back.
    fn enter(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        let idle = {
            let submission = ring.submission();
            submission.is_empty() && !submission.taskrun() && !submission.cq_overflow()
        };
        if idle {
            return;
        }
        match ring.submit().map_err(|e| e.raw_os_error()) {
            // Interrupted, or short of memory or of room for completions: the caller comes again.
            Ok(_) | Err(Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
            Err(errno) => {
                let error = io::Error::from_raw_os_error(errno.unwrap_or(libc::EIO));
                super::die(&format!("io_uring_enter failed: {error}"));
            }
        }
    }

    pub(crate) fn reap(&mut self, slab: &mut Slab, out: &mut Vec<Completion>) {
        self.enter();
        if let Some(ring) = &mut self.ring {
            for entry in ring.completion() {
                let (index, result) = (entry.user_data() as u32, entry.result());
                // The file has no commands by ring, or not this one: the kernel has not touched it.
                if matches!(-result, libc::EOPNOTSUPP | libc::ENOTTY) {
                    self.threads.push(slab, index);
                } else {
                    out.push(Completion {
                        index,
                        result,
                        value: entry.big_cqe()[0],
                    });
                }
            }
        }
        self.threads.submit();
        self.threads.reap(out);
    }

    pub(crate) fn has_completions(&mut self) -> bool {
        let in_ring = self.ring.as_mut().is_some_and(|ring| {
            let held_back = {
                let submission = ring.submission();
                submission.taskrun() || submission.cq_overflow()
            };
            held_back || !ring.completion().is_empty()
        });
        in_ring || self.threads.has_completions()
    }

    /// Whether something waits for room in the submission queue.
    pub(crate) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }
}

/// All these flags are as old as entries of this size (Linux 5.19).
fn build(shared: &Shared) -> io::Result<Ring> {
    let ring = IoUring::<squeue::Entry128, cqueue::Entry32>::builder()
        .setup_clamp()
        .setup_submit_all()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .dontfork()
        .build(ENTRIES)?;
    ring.submitter().register_eventfd(shared.eventfd.as_raw_fd())?;
    Ok(ring)
}
