//! The control task: follows CC, resets, and the end of the connection, one after the other.

use std::rc::Rc;
use std::sync::Arc;

use zbdkit_io::yield_now;
use zbdkit_nvme::{AdminQueue, Change};
use zbdkit_spec::nvme::command::{COMPLETION_ENTRY_BYTES, SUBMISSION_ENTRY_BYTES};
use zbdkit_spec::nvme::controller::Cc;

use super::cq::Cq;
use super::front::{AdminQueueRegisters, Front, Task};
use super::queues::QueueCommands;
use super::sq::{Executor, Sq};
use super::worker::{Worker, WorkerHandle};

/// Admin commands that execute at once; most of them are Asynchronous Event Requests that wait.
const ADMIN_DEPTH: u32 = 32;

/// Follows a connection, on the first worker.
pub(super) async fn follow(worker: Rc<Worker>, front: Arc<Front>, workers: Arc<[WorkerHandle]>) {
    let control = Control {
        worker,
        front,
        workers,
    };
    loop {
        match control.front.next_task().await {
            Task::Configure(cc, admin) => control.configure(cc, admin).await,
            Task::Reset(number) => {
                control.disable(Cc::new()).await;
                control.front.reset_done(number);
            }
            Task::End => {
                control.disable(Cc::new()).await;
                control.front.ended();
                return;
            }
        }
    }
}

struct Control {
    worker: Rc<Worker>,
    front: Arc<Front>,
    workers: Arc<[WorkerHandle]>,
}

impl Control {
    async fn configure(&self, cc: Cc, admin: AdminQueueRegisters) {
        let controller = &self.front.controller;
        if !cc.en() && controller.configuration().en() {
            // Those that wait for events end when the controller hears of it: after the last one was started.
            self.disable(cc).await;
            return;
        }
        match controller.configure(cc) {
            Change::Nothing => {}
            Change::Enable => self.enable(cc, admin),
            Change::Disable => self.disable(cc).await,
            Change::Shutdown => {
                self.each_worker(stop_io).await;
                controller.shut_down().await;
            }
        }
    }

    /// Makes the admin queue (Base Specification 2.1, 3.5.1).
    fn enable(&self, cc: Cc, admin: AdminQueueRegisters) {
        let front = &self.front;
        let page = 4096 << cc.mps();
        front.set_page(page);
        let sq_entries = (admin.aqa & 0xfff) + 1;
        let cq_entries = (admin.aqa >> 16 & 0xfff) + 1;
        let is_queue = |address: u64, entries: u32, bytes: usize| {
            entries >= 2
                && address.is_multiple_of(page)
                && front
                    .link
                    .dma
                    .is_mapped(address, u64::from(entries) * bytes as u64)
        };
        if !is_queue(admin.asq, sq_entries, SUBMISSION_ENTRY_BYTES)
            || !is_queue(admin.acq, cq_entries, COMPLETION_ENTRY_BYTES)
        {
            tracing::warn!(
                "the admin queues at {:#x} and {:#x} are not in memory that the client shares with us",
                admin.asq,
                admin.acq
            );
            front.halt();
            return;
        }
        front.doorbells.open_cq(0, 0);
        front.doorbells.open_sq(0, 0);
        let cq = Cq::new(front, 0, admin.acq, cq_entries, Some(0));
        let commands = QueueCommands::new(front, &self.workers);
        let executor = Executor::Admin(AdminQueue::new(&front.controller), commands);
        let limit = ADMIN_DEPTH.min(sq_entries);
        let sq = Sq::new(0, &cq, admin.asq, sq_entries, limit, executor);
        self.worker.cqs.borrow_mut().push(cq);
        self.worker.sqs.borrow_mut().push(sq);
        front.controller.set_ready();
        self.worker.wake();
    }

    /// Brings all queues to rest and forgets them, then resets the controller.
    async fn disable(&self, cc: Cc) {
        let front = &self.front;
        for sq in self.worker.sqs.borrow().iter() {
            sq.stop();
        }
        // Everything that was taken has begun after this, requests for events too.
        yield_now().await;
        yield_now().await;
        // A controller that is disabled ends those.
        let _ = front.controller.configure(cc);
        self.each_worker(|worker| async move {
            let sqs = worker.sqs.borrow().clone();
            sqs.iter().for_each(|sq| sq.stop());
            for sq in &sqs {
                sq.wait_idle().await;
            }
            worker.sqs.borrow_mut().clear();
            worker.cqs.borrow_mut().clear();
            worker.forget_memory();
        })
        .await;
        front.quiesced();
        front.controller.reset();
    }

    /// Runs the same on all workers, at the same time.
    async fn each_worker<F: Future<Output = ()> + 'static>(
        &self,
        f: impl Fn(Rc<Worker>) -> F + Copy + Send + 'static,
    ) {
        let calls: Vec<_> = self
            .workers
            .iter()
            .map(|worker| {
                let (sender, receiver) = super::oneshot::channel();
                worker.spawn(move |worker| {
                    let task = f(worker);
                    async move {
                        task.await;
                        sender.send(());
                    }
                });
                receiver
            })
            .collect();
        for call in calls {
            call.receive().await;
        }
    }
}

/// Lets the I/O queues of a worker come to rest.
async fn stop_io(worker: Rc<Worker>) {
    let sqs: Vec<_> = worker
        .sqs
        .borrow()
        .iter()
        .filter(|sq| !sq.is_admin())
        .cloned()
        .collect();
    sqs.iter().for_each(|sq| sq.stop());
    for sq in &sqs {
        sq.wait_idle().await;
    }
}
