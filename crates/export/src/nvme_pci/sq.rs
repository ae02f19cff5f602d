//! A submission queue in guest memory.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};

use zbdkit_io::MemGuard;
use zbdkit_nvme::{AdminQueue, Completion, IoQueue};
use zbdkit_spec::nvme::command::{CompletionEntry, SUBMISSION_ENTRY_BYTES, SubmissionEntry};
use zerocopy::{FromZeros, IntoBytes};

use super::cq::Cq;
use super::front::Front;
use super::queues::{QueueCommands, Shadow};
use super::transfer::HostData;
use crate::memory::{load_u32, read, store_u32};

/// What carries out a queue's commands.
pub(super) enum Executor {
    Io(IoQueue),
    Admin(AdminQueue, QueueCommands),
}

/// A submission queue.
pub(super) struct Sq {
    pub(super) id: u16,
    pub(super) cq: Rc<Cq>,
    addr: u64,
    entries: u32,
    /// Most commands that execute at once.
    limit: u32,
    head: Cell<u32>,
    pub(super) shadow: Cell<Option<Shadow>>,
    executing: Cell<u32>,
    stopping: Cell<bool>,
    /// Who waits until none executes.
    idle: RefCell<Vec<Waker>>,
    executor: Executor,
}

impl Sq {
    pub(super) fn new(
        id: u16,
        cq: &Rc<Cq>,
        addr: u64,
        entries: u32,
        limit: u32,
        executor: Executor,
    ) -> Rc<Sq> {
        Rc::new(Sq {
            id,
            cq: cq.clone(),
            addr,
            entries,
            limit,
            head: Cell::new(0),
            shadow: Cell::new(None),
            executing: Cell::new(0),
            stopping: Cell::new(false),
            idle: RefCell::default(),
            executor,
        })
    }

    pub(super) fn front(&self) -> &Arc<Front> {
        self.cq.front()
    }

    pub(super) fn is_admin(&self) -> bool {
        matches!(self.executor, Executor::Admin(..))
    }

    /// The host's tail: what it says in shadow memory, or by the doorbell. One that is none counts as "nothing new".
    fn tail(&self, memory: &MemGuard) -> u32 {
        let tail = match self.shadow.get() {
            Some(shadow) => load_u32(memory, shadow.value, Ordering::Acquire).unwrap_or(u32::MAX),
            None => self.front().doorbells.tail(self.id),
        };
        if tail < self.entries {
            tail
        } else {
            self.head.get()
        }
    }

    fn may_take(&self) -> bool {
        !self.stopping.get()
            && self.executing.get() < self.limit
            && !self.cq.is_full()
            && !self.front().is_halted()
    }

    /// Whether there is an entry to take.
    pub(super) fn has_entries(&self, memory: &MemGuard) -> bool {
        self.may_take() && self.tail(memory) != self.head.get()
    }

    /// Takes the next entry. It must be completed by [`execute`](Self::execute).
    pub(super) fn take(&self, memory: &MemGuard) -> Option<SubmissionEntry> {
        if !self.has_entries(memory) {
            return None;
        }
        let head = self.head.get();
        let mut entry = SubmissionEntry::new_zeroed();
        let at = self.addr + u64::from(head) * SUBMISSION_ENTRY_BYTES as u64;
        if read(memory, at, entry.as_mut_bytes()).is_err() {
            tracing::warn!(
                "submission queue {} is not in the host's memory any more",
                self.id
            );
            self.front().halt();
            return None;
        }
        self.head.set((head + 1) % self.entries);
        self.executing.set(self.executing.get() + 1);
        Some(entry)
    }

    /// Carries out an entry that was taken, up to its completion.
    pub(super) async fn execute(&self, entry: SubmissionEntry) {
        let transfer = HostData::new(self.front(), self.is_admin());
        let completion = match &self.executor {
            Executor::Io(queue) => queue.execute(&entry, &transfer).await,
            // Rare and large.
            Executor::Admin(queue, commands) => Box::pin(queue.execute(&entry, &transfer, commands)).await,
        };
        let completion = if transfer.has_copy() {
            Box::pin(transfer.finish(completion)).await
        } else {
            completion
        };
        self.complete(&entry, completion);
    }

    fn complete(&self, entry: &SubmissionEntry, completion: Completion) {
        self.cq.push(CompletionEntry {
            result: completion.result.into(),
            sqhd: (self.head.get() as u16).into(),
            sqid: self.id.into(),
            cid: entry.cid,
            status: CompletionEntry::status_of(completion.status, false),
        });
        self.executing.set(self.executing.get() - 1);
        if self.executing.get() == 0 {
            self.idle.take().into_iter().for_each(Waker::wake);
        }
    }

    /// Takes nothing more.
    pub(super) fn stop(&self) {
        self.stopping.set(true);
    }

    /// Waits until none of its commands executes.
    pub(super) async fn wait_idle(&self) {
        std::future::poll_fn(|cx| {
            if self.executing.get() == 0 {
                return Poll::Ready(());
            }
            self.idle.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
        if let Executor::Io(queue) = &self.executor {
            queue.quiet().await;
        }
    }

    /// Before sleeping: the host shall ring at the next entry. Looks afterwards whether that was too late.
    pub(super) fn ask_for_doorbell(&self, memory: &MemGuard) {
        if let Some(shadow) = self.shadow.get() {
            let _ = store_u32(memory, shadow.event_index, self.tail(memory), Ordering::Release);
        }
    }

    /// Starts to use shadow doorbells, from where the register is.
    pub(super) fn set_shadow(&self, memory: &MemGuard, shadow: Shadow) {
        let tail = self.front().doorbells.tail(self.id);
        let _ = store_u32(memory, shadow.value, tail, Ordering::Release);
        let _ = store_u32(memory, shadow.event_index, tail, Ordering::Release);
        self.shadow.set(Some(shadow));
    }
}
