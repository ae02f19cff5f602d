//! The admin queue (Base Specification 2.1, 5).

mod command;

use std::sync::Arc;

use zbdkit_block::Lane;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::AdminOpcode;
use zbdkit_spec::nvme::command::SubmissionEntry;

pub use self::command::AdminCommand;
use crate::controller::Controller;
use crate::error_log::ErrorLog;
use crate::queue::lanes;
use crate::status::{Completion, Failure};
use crate::transport::{QueueControl, Transfer};

/// What executes the commands of the admin queue.
pub struct AdminQueue {
    controller: Arc<Controller>,
    /// One for each namespace.
    lanes: Box<[Lane]>,
}

impl AdminQueue {
    /// For the admin queue of a controller.
    pub fn new(controller: &Arc<Controller>) -> AdminQueue {
        AdminQueue {
            controller: controller.clone(),
            lanes: lanes(controller, 1),
        }
    }

    /// Carries out a command. Some wait: Asynchronous Event Request until there is an event or the controller is
    /// disabled, whereupon it completes as aborted.
    pub async fn execute<T: Transfer, Q: QueueControl>(
        &self,
        entry: &SubmissionEntry,
        transfer: &T,
        queues: &Q,
    ) -> Completion {
        match self.run(entry, transfer, queues).await {
            Ok(result) => Completion::success(result),
            Err(failure) => self.fail(entry, failure),
        }
    }

    fn fail(&self, entry: &SubmissionEntry, failure: Failure) -> Completion {
        let opcode = AdminOpcode(entry.opcode);
        tracing::debug!(?opcode, "admin command failed: {:?}", failure.status);
        if ErrorLog::wants(&failure) {
            self.controller.log_error(0, entry, &failure);
        }
        failure.into()
    }

    async fn run<T: Transfer, Q: QueueControl>(
        &self,
        entry: &SubmissionEntry,
        _transfer: &T,
        queues: &Q,
    ) -> Result<u64, Failure> {
        match AdminCommand::parse(entry)? {
            AdminCommand::CreateCq(queue) => queues.create_cq(queue).await?,
            AdminCommand::CreateSq(queue) => queues.create_sq(queue).await?,
            AdminCommand::DeleteCq(qid) => queues.delete_cq(qid).await?,
            AdminCommand::DeleteSq(qid) => queues.delete_sq(qid).await?,
            AdminCommand::DoorbellBuffers { shadow, event_index } => {
                if !self.controller.options().doorbell_buffers {
                    return Err(Status::INVALID_OPCODE.into());
                }
                queues.set_doorbell_buffers(shadow, event_index).await?;
            }
            // Dword 0, bit 0: not aborted.
            AdminCommand::Abort { sqid, cid } => return Ok(u64::from(!queues.abort(sqid, cid).await)),
            _ => return Err(Status::INVALID_OPCODE.into()),
        }
        Ok(0)
    }
}
