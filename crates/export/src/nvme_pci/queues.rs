//! Queues made and deleted by admin commands (Base Specification 2.1, 5.2), and shadow doorbells.

use std::cell::RefCell;
use std::sync::Arc;

use zbdkit_nvme::{CreateCq, CreateSq, Failure, IoQueue, QueueControl};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::command::{COMPLETION_ENTRY_BYTES, SUBMISSION_ENTRY_BYTES};

use super::cq::Cq;
use super::front::Front;
use super::sq::{Executor, Sq};
use super::worker::WorkerHandle;

/// Most commands of an I/O queue that execute at once.
pub(super) const QUEUE_DEPTH: u32 = 256;

/// Where a queue's doorbell is in shadow memory, and the host's notice when to ring it (5.2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shadow {
    pub(super) value: u64,
    pub(super) event_index: u64,
}

/// The pages of shadow doorbells.
#[derive(Clone, Copy, Debug)]
struct ShadowPages {
    values: u64,
    event_indexes: u64,
}

impl ShadowPages {
    /// Doorbells lie as the registers do, four bytes each.
    fn of(self, qid: u16, is_cq: bool) -> Shadow {
        let at = (2 * u64::from(qid) + u64::from(is_cq)) * 4;
        Shadow {
            value: self.values + at,
            event_index: self.event_indexes + at,
        }
    }
}

/// The admin queue's way to the other queues.
pub(super) struct QueueCommands {
    front: Arc<Front>,
    workers: Arc<[WorkerHandle]>,
    registry: RefCell<Registry>,
}

#[derive(Default)]
struct Registry {
    /// Which completion queues exist.
    cqs: Vec<bool>,
    /// The submission queues that exist.
    sqs: Vec<Option<SqEntry>>,
    shadow: Option<ShadowPages>,
}

/// A submission queue that exists.
#[derive(Clone, Copy, Debug)]
struct SqEntry {
    cqid: u16,
    /// A command deletes it: it exists until its own commands are done.
    leaving: bool,
}

impl QueueCommands {
    pub(super) fn new(front: &Arc<Front>, workers: &Arc<[WorkerHandle]>) -> QueueCommands {
        let queues = usize::from(front.controller.options().io_queues) + 1;
        QueueCommands {
            front: front.clone(),
            workers: workers.clone(),
            registry: RefCell::new(Registry {
                cqs: vec![false; queues],
                sqs: vec![None; queues],
                shadow: None,
            }),
        }
    }

    /// The worker of a completion queue, and of its submission queues.
    fn worker(&self, cqid: u16) -> (usize, &WorkerHandle) {
        let index = usize::from(cqid - 1) % self.workers.len();
        (index, &self.workers[index])
    }

    /// `most_z` is the largest identifier less one, which is what the Number of Queues feature says (5.2.1, 5.2.2).
    fn check(
        &self,
        qid: u16,
        most_z: u16,
        entries: u32,
        prp1: u64,
        contiguous: bool,
        entry_bytes: usize,
    ) -> Result<(), Failure> {
        let options = self.front.controller.options();
        if qid == 0 || qid - 1 > most_z {
            return Err(Status::INVALID_QUEUE_IDENTIFIER.into());
        }
        if entries < 2 || entries > options.queue_entries {
            return Err(Status::INVALID_QUEUE_SIZE.into());
        }
        // CAP.CQR: queues must be contiguous.
        if !contiguous {
            return Err(Status::INVALID_FIELD.into());
        }
        if !prp1.is_multiple_of(self.front.page()) {
            return Err(Status::PRP_OFFSET_INVALID.into());
        }
        // Queues are not asked for by messages.
        if !self
            .front
            .link
            .dma
            .is_mapped(prp1, u64::from(entries) * entry_bytes as u64)
        {
            return Err(Status::INVALID_FIELD.into());
        }
        Ok(())
    }
}

impl QueueControl for QueueCommands {
    async fn create_cq(&self, queue: CreateCq) -> Result<(), Failure> {
        let CreateCq {
            qid,
            entries,
            prp1,
            contiguous,
            vector,
        } = queue;
        let most_z = self.front.controller.allotted().ncq_z();
        self.check(qid, most_z, entries, prp1, contiguous, COMPLETION_ENTRY_BYTES)?;
        if vector.is_some_and(|vector| vector > self.front.controller.options().io_queues) {
            return Err(Status::INVALID_INTERRUPT_VECTOR.into());
        }
        let shadow = {
            let mut registry = self.registry.borrow_mut();
            let exists = &mut registry.cqs[usize::from(qid)];
            if std::mem::replace(exists, true) {
                return Err(Status::INVALID_QUEUE_IDENTIFIER.into());
            }
            registry.shadow.map(|pages| pages.of(qid, true))
        };
        let (index, worker) = self.worker(qid);
        let front = self.front.clone();
        let made = worker.call(move |worker| async move {
            front.doorbells.open_cq(qid, index);
            let cq = Cq::new(&front, qid, prp1, entries, vector);
            if let Some(shadow) = shadow {
                cq.set_shadow(&worker.memory(&front), shadow);
            }
            worker.cqs.borrow_mut().push(cq);
        });
        made.await.ok_or(Status::INTERNAL_ERROR.into())
    }

    async fn create_sq(&self, queue: CreateSq) -> Result<(), Failure> {
        let CreateSq {
            qid,
            entries,
            prp1,
            contiguous,
            cqid,
        } = queue;
        let most_z = self.front.controller.allotted().nsq_z();
        self.check(qid, most_z, entries, prp1, contiguous, SUBMISSION_ENTRY_BYTES)?;
        let shadow = {
            let mut registry = self.registry.borrow_mut();
            match registry.cqs.get(usize::from(cqid)) {
                None => return Err(Status::INVALID_QUEUE_IDENTIFIER.into()),
                Some(exists) if cqid == 0 || !exists => return Err(Status::COMPLETION_QUEUE_INVALID.into()),
                Some(_) => {}
            }
            if registry.sqs[usize::from(qid)].is_some() {
                return Err(Status::INVALID_QUEUE_IDENTIFIER.into());
            }
            registry.sqs[usize::from(qid)] = Some(SqEntry { cqid, leaving: false });
            registry.shadow.map(|pages| pages.of(qid, false))
        };
        let (index, worker) = self.worker(cqid);
        let front = self.front.clone();
        let made = worker.call(move |worker| async move {
            front.doorbells.open_sq(qid, index);
            let cq = worker.cqs.borrow().iter().find(|cq| cq.id == cqid).cloned();
            let Some(cq) = cq else { return false };
            let limit = QUEUE_DEPTH.min(entries);
            let executor = Executor::Io(IoQueue::new(&front.controller, qid, limit));
            let sq = Sq::new(qid, &cq, prp1, entries, limit, executor);
            if let Some(shadow) = shadow {
                sq.set_shadow(&worker.memory(&front), shadow);
            }
            worker.sqs.borrow_mut().push(sq);
            worker.wake();
            true
        });
        match made.await {
            Some(true) => Ok(()),
            _ => Err(Status::INTERNAL_ERROR.into()),
        }
    }

    async fn delete_cq(&self, qid: u16) -> Result<(), Failure> {
        {
            let mut registry = self.registry.borrow_mut();
            if qid == 0 || registry.cqs.get(usize::from(qid)) != Some(&true) {
                return Err(Status::INVALID_QUEUE_IDENTIFIER.into());
            }
            if registry.sqs.iter().flatten().any(|sq| sq.cqid == qid) {
                return Err(Status::INVALID_QUEUE_DELETION.into());
            }
            registry.cqs[usize::from(qid)] = false;
        }
        let (_, worker) = self.worker(qid);
        let deleted = worker.call(move |worker| async move {
            worker.cqs.borrow_mut().retain(|cq| cq.id != qid);
        });
        deleted.await.ok_or(Status::INTERNAL_ERROR.into())
    }

    async fn delete_sq(&self, qid: u16) -> Result<(), Failure> {
        let cqid = {
            let mut registry = self.registry.borrow_mut();
            let sq = registry.sqs.get_mut(usize::from(qid)).and_then(Option::as_mut);
            let sq = sq
                .filter(|sq| !sq.leaving)
                .ok_or(Status::INVALID_QUEUE_IDENTIFIER)?;
            sq.leaving = true;
            sq.cqid
        };
        let (_, worker) = self.worker(cqid);
        let deleted = worker.call(move |worker| async move {
            let sq = worker.sqs.borrow().iter().find(|sq| sq.id == qid).cloned();
            if let Some(sq) = sq {
                sq.stop();
                sq.wait_idle().await;
                worker.sqs.borrow_mut().retain(|other| other.id != qid);
            }
        });
        let deleted = deleted.await;
        self.registry.borrow_mut().sqs[usize::from(qid)] = None;
        deleted.ok_or(Status::INTERNAL_ERROR.into())
    }

    async fn set_doorbell_buffers(&self, shadow: u64, event_index: u64) -> Result<(), Failure> {
        let page = self.front.page();
        let in_place =
            |address: u64| address.is_multiple_of(page) && self.front.link.dma.is_mapped(address, page);
        if !in_place(shadow) || !in_place(event_index) {
            return Err(Status::INVALID_FIELD.into());
        }
        let pages = ShadowPages {
            values: shadow,
            event_indexes: event_index,
        };
        self.registry.borrow_mut().shadow = Some(pages);
        // The admin queue goes on with its registers, which the host has to write in any case (5.2.5).
        for worker in self.workers.iter() {
            let front = self.front.clone();
            let set = worker.call(move |worker| async move {
                let memory = worker.memory(&front);
                for sq in worker.sqs.borrow().iter().filter(|sq| !sq.is_admin()) {
                    sq.set_shadow(&memory, pages.of(sq.id, false));
                }
                for cq in worker.cqs.borrow().iter().filter(|cq| cq.id != 0) {
                    cq.set_shadow(&memory, pages.of(cq.id, true));
                }
                worker.wake();
            });
            set.await.ok_or(Status::INTERNAL_ERROR)?;
        }
        Ok(())
    }
}
