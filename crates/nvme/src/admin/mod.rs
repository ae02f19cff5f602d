//! The admin queue (Base Specification 2.1, 5).

mod command;
mod features;
mod format;
mod identify;
mod log;

use std::sync::Arc;

use zbdkit_block::Lane;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::AdminOpcode;
use zbdkit_spec::nvme::command::SubmissionEntry;

pub use self::command::{AdminCommand, GetLog, Select};
pub(crate) use self::identify::COPY_FORMATS;
use self::identify::Question;
use crate::controller::Controller;
use crate::error_log::ErrorLog;
use crate::queue::lanes;
use crate::status::{Completion, Failure};
use crate::transport::{Direction, QueueControl, Transfer};

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
        transfer: &T,
        queues: &Q,
    ) -> Result<u64, Failure> {
        let controller = &*self.controller;
        let command = (entry, transfer);
        match AdminCommand::parse(entry)? {
            AdminCommand::CreateCq(queue) => {
                queues.create_cq(queue).await?;
                controller.set_queues_made();
            }
            AdminCommand::CreateSq(queue) => {
                queues.create_sq(queue).await?;
                controller.set_queues_made();
            }
            AdminCommand::DeleteCq(qid) => queues.delete_cq(qid).await?,
            AdminCommand::DeleteSq(qid) => queues.delete_sq(qid).await?,
            AdminCommand::DoorbellBuffers { shadow, event_index } => {
                if !controller.options().doorbell_buffers {
                    return Err(Status::INVALID_OPCODE.into());
                }
                queues.set_doorbell_buffers(shadow, event_index).await?;
            }
            AdminCommand::Abort { sqid, cid } => {
                let aborted = sqid == 0 && controller.events.abort(cid) || queues.abort(sqid, cid).await;
                // Dword 0, bit 0: not aborted.
                return Ok(u64::from(!aborted));
            }
            AdminCommand::Identify {
                cns,
                nsid,
                cntid,
                csi,
            } => {
                let data = controller.identify(&Question {
                    cns,
                    nsid,
                    cntid,
                    csi,
                })?;
                let buf = transfer
                    .buffer(entry, Direction::ControllerToHost, data.len())
                    .await?;
                buf.copy_from(&data);
            }
            AdminCommand::GetLog(log) => self.get_log(command, &log).await?,
            AdminCommand::GetFeatures {
                feature,
                select,
                value,
                ..
            } => {
                return self.get_features(command, feature, select, value).await;
            }
            AdminCommand::SetFeatures {
                feature, save, value, ..
            } => {
                return self.set_features(command, feature, save, value).await;
            }
            AdminCommand::AsyncEventRequest => return controller.events.next(entry.cid.get()).await,
            AdminCommand::KeepAlive => controller.kept_alive()?,
            AdminCommand::Format {
                nsid,
                format,
                protection,
                erase,
            } => {
                return self.format(nsid, format, protection, erase).await;
            }
        }
        Ok(0)
    }

    async fn get_log<T: Transfer>(
        &self,
        (entry, transfer): (&SubmissionEntry, &T),
        log: &GetLog,
    ) -> Result<(), Failure> {
        let len = usize::try_from(log.len)
            .ok()
            .filter(|len| *len <= self.controller.max_transfer());
        let len = len.ok_or(Status::INVALID_FIELD)?;
        // What the host has read is forgotten; so first all is found out that can fail.
        self.controller.log_page(log, true)?;
        let buf = transfer.buffer(entry, Direction::ControllerToHost, len).await?;
        let page = self.controller.log_page(log, log.retain_event)?;
        let copied = buf.copy_from(&page);
        // Behind the end of a page there is nothing.
        buf.fill(copied..len, 0);
        Ok(())
    }
}
