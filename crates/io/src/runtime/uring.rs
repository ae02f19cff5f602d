//! The io_uring driver: one ring a thread.

#![expect(
    unsafe_code,
    reason = "submission entries carry pointers to memory that their slots own"
)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};

use super::ops::{Completion, IoVec, Kind, Slab};
use super::passthrough::Passthrough;
use super::wake::Shared;
use crate::sys::IOV_MAX;

/// The eventfd by which other threads wake us is readable.
const WAKE: u64 = u64::MAX;
/// A completion that nobody waits for.
const IGNORE: u64 = u64::MAX - 1;

const _: () = assert!(IOV_MAX <= u32::MAX as usize);

pub(crate) struct Uring {
    ring: IoUring,
    shared: Arc<Shared>,
    /// A poll of the eventfd is in flight.
    armed: bool,
    /// What found no room in the submission queue.
    backlog: VecDeque<u32>,
    cancels: VecDeque<u64>,
    /// For commands to devices, once there was one.
    passthrough: Option<Box<Passthrough>>,
}

impl Uring {
    /// Sets up a ring with the best flags that the kernel has.
    pub(crate) fn new(entries: u32, shared: Arc<Shared>) -> io::Result<Uring> {
        let ring = build(entries)?;
        let params = ring.params();
        if !params.is_feature_nodrop() || !params.is_feature_ext_arg() || !params.is_feature_submit_stable() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel's io_uring is older than 5.11",
            ));
        }
        Ok(Uring {
            ring,
            shared,
            armed: false,
            backlog: VecDeque::new(),
            cancels: VecDeque::new(),
            passthrough: None,
        })
    }

    pub(crate) fn push(&mut self, slab: &mut Slab, index: u32) {
        if let Kind::Nvme(_) = slab.get(index).request.kind {
            let shared = &self.shared;
            let passthrough = self
                .passthrough
                .get_or_insert_with(|| Box::new(Passthrough::new(shared.clone())));
            return passthrough.push(slab, index);
        }
        let entry = entry(slab, index);
        if !self.backlog.is_empty() || !self.try_push(&entry) {
            self.enter(0, None);
            if !self.backlog.is_empty() || !self.try_push(&entry) {
                self.backlog.push_back(index);
            }
        }
    }

    fn try_push(&mut self, entry: &Entry) -> bool {
        // SAFETY: the memory that an operation's entry points to belongs to its slot, which keeps it until the
        // completion arrives; other entries point to none.
        unsafe { self.ring.submission().push(entry).is_ok() }
    }

    pub(crate) fn submit(&mut self, slab: &mut Slab) {
        if !self.ring.submission().is_empty() {
            self.enter(0, None);
        }
        while let Some(user_data) = self.cancels.pop_front() {
            if !self.try_push(&cancel_entry(user_data)) {
                self.cancels.push_front(user_data);
                break;
            }
        }
        while let Some(index) = self.backlog.pop_front() {
            if !self.try_push(&entry(slab, index)) {
                self.backlog.push_front(index);
                break;
            }
        }
        if !self.ring.submission().is_empty() {
            self.enter(0, None);
        }
        if let Some(passthrough) = &mut self.passthrough {
            passthrough.submit(slab);
        }
    }

    pub(crate) fn cancel(&mut self, index: u32) {
        let user_data = u64::from(index);
        if !self.try_push(&cancel_entry(user_data)) {
            self.cancels.push_back(user_data);
        }
    }

    pub(crate) fn reap(&mut self, slab: &mut Slab, out: &mut Vec<Completion>) {
        if self.has_task_work() {
            self.enter(0, None);
        }
        let mut woken = false;
        for completion in self.ring.completion() {
            match completion.user_data() {
                WAKE => woken = true,
                IGNORE => {}
                index => out.push(Completion {
                    index: index as u32,
                    result: completion.result(),
                    value: 0,
                }),
            }
        }
        if woken {
            self.armed = false;
            self.shared.drain_eventfd();
        }
        // After the eventfd was emptied: what comes later rings it again.
        if let Some(passthrough) = &mut self.passthrough {
            passthrough.reap(slab, out);
        }
    }

    pub(crate) fn has_completions(&mut self) -> bool {
        let commands = self.passthrough.as_mut().is_some_and(|p| p.has_completions());
        commands || !self.ring.completion().is_empty() || self.has_task_work()
    }

    /// Whether the kernel holds completions back until it is entered.
    fn has_task_work(&mut self) -> bool {
        let submission = self.ring.submission();
        submission.taskrun() || submission.cq_overflow()
    }

    pub(crate) fn wait(&mut self, slab: &mut Slab, timeout: Option<Duration>) {
        if !self.armed {
            let poll = opcode::PollAdd::new(Fd(self.shared.eventfd.as_raw_fd()), libc::POLLIN as u32);
            if !self.try_push(&poll.build().user_data(WAKE)) {
                return self.submit(slab);
            }
            self.armed = true;
        }
        let waiting = self.passthrough.as_ref().is_some_and(|p| p.has_backlog());
        if self.backlog.is_empty() && self.cancels.is_empty() && !waiting {
            self.enter(1, timeout);
        } else {
            self.submit(slab);
        }
    }

    /// Submits what is queued and waits for `want` completions.
    fn enter(&mut self, want: usize, timeout: Option<Duration>) {
        let result = match timeout {
            Some(timeout) => {
                let spec = Timespec::from(timeout);
                self.ring
                    .submitter()
                    .submit_with_args(want, &SubmitArgs::new().timespec(&spec))
            }
            None => self.ring.submit_and_wait(want),
        };
        match result.map_err(|e| e.raw_os_error()) {
            // Interrupted, timed out, or short of memory or of room for completions: the caller takes
            // completions and comes again.
            Ok(_) | Err(Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN)) => {}
            Err(errno) => {
                // The ring is ours and set up: this is a defect or a filter that came later. Nothing that is
                // in flight could ever be completed.
                let error = io::Error::from_raw_os_error(errno.unwrap_or(libc::EIO));
                super::die(&format!("io_uring_enter failed: {error}"));
            }
        }
    }
}

/// Drops flags one by one until the kernel knows those that are left.
fn build(entries: u32) -> io::Result<IoUring> {
    let entries = entries.clamp(8, 4096).next_power_of_two();
    let mut result = Err(io::Error::from_raw_os_error(libc::EINVAL));
    for level in (0..=3).rev() {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(entries * 4).dontfork();
        if level >= 1 {
            builder.setup_submit_all();
        }
        if level >= 2 {
            builder.setup_coop_taskrun().setup_taskrun_flag();
        }
        if level >= 3 {
            builder.setup_single_issuer().setup_defer_taskrun();
        }
        result = builder.build(entries);
        match &result {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            _ => break,
        }
    }
    result
}

fn cancel_entry(user_data: u64) -> Entry {
    opcode::AsyncCancel::new(user_data).build().user_data(IGNORE)
}

/// The submission entry for what is left of an operation.
fn entry(slab: &mut Slab, index: u32) -> Entry {
    let slot = slab.get(index);
    let (kind, fd, offset) = (slot.request.kind, Fd(slot.request.fd), slot.position());
    let entry = match kind {
        Kind::Read | Kind::Write => match slot.single() {
            Some(IoVec { iov_base, iov_len }) => match kind {
                Kind::Read => opcode::Read::new(fd, iov_base.cast(), iov_len as u32)
                    .offset(offset)
                    .build(),
                _ => opcode::Write::new(fd, iov_base.cast(), iov_len as u32)
                    .offset(offset)
                    .build(),
            },
            None => {
                let vectors = slot.vectors();
                let (list, count) = (vectors.as_ptr().cast(), vectors.len() as u32);
                match kind {
                    Kind::Read => opcode::Readv::new(fd, list, count).offset(offset).build(),
                    _ => opcode::Writev::new(fd, list, count).offset(offset).build(),
                }
            }
        },
        Kind::Sync { data_only } => {
            let flags = if data_only {
                FsyncFlags::DATASYNC
            } else {
                FsyncFlags::empty()
            };
            opcode::Fsync::new(fd).flags(flags).build()
        }
        Kind::Allocate { mode } => opcode::Fallocate::new(fd, slot.request.len)
            .offset(offset)
            .mode(mode)
            .build(),
        Kind::Poll => opcode::PollAdd::new(fd, libc::POLLIN as u32).build(),
        Kind::Nvme(_) => unreachable!("commands for devices have a ring of their own"),
    };
    entry.user_data(u64::from(index))
}
