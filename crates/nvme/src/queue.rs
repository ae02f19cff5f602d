//! I/O queues: commands carried out on namespaces. The hot ones are here, the rest in the modules below.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use zbdkit_block::Lane;
use zbdkit_io::IoBuf;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::command::SubmissionEntry;

use crate::command::{Blocks, IoCommand};
use crate::controller::Controller;
use crate::error_log::ErrorLog;
use crate::namespace::Namespace;
use crate::stats::QueueStats;
use crate::status::{Completion, Failure, Kind, failure};
use crate::transport::{Direction, Transfer};
use crate::turn::{Turn, Turns};

/// What executes the commands of an I/O queue, on one thread.
pub struct IoQueue {
    controller: Arc<Controller>,
    id: u16,
    /// One for each namespace.
    lanes: Box<[Lane]>,
    max_append: u64,
    stats: Arc<QueueStats>,
    turns: Turns,
}

impl IoQueue {
    /// For the submission queue `id`, of whose commands at most `depth` execute at once.
    pub fn new(controller: &Arc<Controller>, id: u16, depth: u32) -> IoQueue {
        IoQueue {
            controller: controller.clone(),
            id,
            lanes: lanes(controller, depth),
            max_append: controller.max_append(),
            stats: controller.new_stats(),
            turns: Turns::default(),
        }
    }

    /// Carries out a command. The future may be dropped only with the whole queue.
    pub async fn execute<T: Transfer>(&self, entry: &SubmissionEntry, transfer: &T) -> Completion {
        match self.run(entry, transfer).await {
            Ok(result) => Completion::success(result),
            Err(failure) => self.fail(entry, failure),
        }
    }

    /// Returns once nothing goes on behind the commands that have completed. Before the thread's runtime ends.
    pub async fn quiet(&self) {
        for lane in &self.lanes {
            lane.quiet().await;
        }
    }

    async fn run<T: Transfer>(&self, entry: &SubmissionEntry, transfer: &T) -> Result<u64, Failure> {
        let command = IoCommand::parse(entry)?;
        if self.controller.admin_only() {
            return Err(Status::INVALID_OPCODE.into());
        }
        let request = Request {
            queue: self,
            entry,
            transfer,
        };
        match command {
            IoCommand::Read { blocks, fua } => request.read(blocks, fua).await,
            IoCommand::Write { blocks, fua } => request.write(blocks, fua).await,
            IoCommand::Append { blocks, fua } => request.append(blocks, fua).await,
            // The rest is rare and large: its future lies on the heap, so that those above stay small.
            command => Box::pin(request.run_rare(command)).await,
        }
    }

    #[cold]
    fn fail(&self, entry: &SubmissionEntry, failure: Failure) -> Completion {
        tracing::debug!(
            queue = self.id,
            opcode = entry.opcode,
            "command failed: {:?}",
            failure.status
        );
        if ErrorLog::wants(&failure) {
            self.controller.log_error(self.id, entry, &failure);
        }
        failure.into()
    }
}

/// A lane for each namespace.
pub(crate) fn lanes(controller: &Controller, depth: u32) -> Box<[Lane]> {
    let namespaces = controller.subsystem().namespaces();
    namespaces
        .iter()
        .map(|namespace| namespace.device.lane(depth))
        .collect()
}

/// A command with everything that it is carried out with.
pub(crate) struct Request<'a, T> {
    queue: &'a IoQueue,
    pub(crate) entry: &'a SubmissionEntry,
    transfer: &'a T,
}

impl<T: Transfer> Request<'_, T> {
    pub(crate) fn namespace(&self) -> Result<(&Namespace, &Lane), Failure> {
        let (index, namespace) = self.queue.controller.io_namespace(self.entry.nsid.get())?;
        Ok((namespace, &self.queue.lanes[index]))
    }

    /// The active namespaces.
    pub(crate) fn all_namespaces(&self) -> impl Iterator<Item = (&Namespace, &Lane)> {
        let controller = &self.queue.controller;
        let namespaces = controller.subsystem().namespaces().iter().zip(&self.queue.lanes);
        namespaces.filter(|(namespace, _)| controller.is_active(namespace))
    }

    /// The memory that the command's data pointer names.
    pub(crate) async fn data(&self, direction: Direction, len: usize) -> Result<IoBuf, Failure> {
        self.transfer.buffer(self.entry, direction, len).await
    }

    /// Whether some namespace has Write Uncorrectable.
    pub(crate) fn marks_blocks(&self) -> bool {
        self.queue.controller.marks_blocks(None)
    }

    /// The right to memory of ours.
    pub(crate) async fn turn(&self) -> Turn<'_> {
        self.queue.turns.take().await
    }

    pub(crate) fn count_read(&self, len: usize) {
        self.queue.stats.reads.add(1);
        self.queue.stats.bytes_read.add(len as u64);
    }

    /// Bytes of a command that transfers its blocks.
    pub(crate) fn transfer_len(&self, len: u64) -> Result<usize, Failure> {
        usize::try_from(len)
            .ok()
            .filter(|len| *len <= self.queue.controller.max_transfer())
            .ok_or(Status::INVALID_FIELD.into())
    }

    async fn read(&self, blocks: Blocks, fua: bool) -> Result<u64, Failure> {
        let (namespace, lane) = self.namespace()?;
        let (offset, len) = namespace.bytes(blocks)?;
        let len = self.transfer_len(len)?;
        if fua {
            // What is read must be on the medium.
            namespace.flush(lane).await?;
        }
        let buf = self.data(Direction::ControllerToHost, len).await?;
        namespace.read(lane, buf, offset).await?;
        self.count_read(len);
        Ok(0)
    }

    async fn write(&self, blocks: Blocks, fua: bool) -> Result<u64, Failure> {
        let (namespace, lane) = self.namespace()?;
        let (offset, len) = namespace.bytes(blocks)?;
        let len = self.transfer_len(len)?;
        let buf = self.data(Direction::HostToController, len).await?;
        namespace.write(lane, buf, offset).await?;
        self.written(namespace, lane, len, fua).await?;
        Ok(0)
    }

    async fn append(&self, blocks: Blocks, fua: bool) -> Result<u64, Failure> {
        let (namespace, lane) = self.namespace()?;
        if namespace.zones().is_none() {
            return Err(Status::INVALID_OPCODE.into());
        }
        let shift = namespace.block_shift();
        let (offset, _) = namespace.bytes_of(Blocks { count: 1, ..blocks }, shift)?;
        let len = self.transfer_len(u64::from(blocks.count) << shift)?;
        if len as u64 > self.queue.max_append {
            return Err(Status::INVALID_FIELD.into());
        }
        let buf = self.data(Direction::HostToController, len).await?;
        let result = namespace.device.append(lane, buf, offset).await;
        let at = result.map_err(|error| failure(&error, Kind::Write))?;
        self.written(namespace, lane, len, fua).await?;
        Ok(at >> shift)
    }

    /// After each change of data: counts it, and makes it durable where that was asked for.
    async fn written(
        &self,
        namespace: &Namespace,
        lane: &Lane,
        len: usize,
        fua: bool,
    ) -> Result<(), Failure> {
        self.queue.stats.writes.add(1);
        self.queue.stats.bytes_written.add(len as u64);
        self.make_durable(namespace, lane, fua).await
    }

    /// After each change of data: makes it durable where that was asked for, or where there is no write cache.
    pub(crate) async fn make_durable(
        &self,
        namespace: &Namespace,
        lane: &Lane,
        fua: bool,
    ) -> Result<(), Failure> {
        if fua || !self.queue.controller.write_cache.load(Ordering::Relaxed) {
            namespace.flush(lane).await?;
        }
        Ok(())
    }

    async fn run_rare(&self, command: IoCommand) -> Result<u64, Failure> {
        match command {
            IoCommand::Flush => self.flush().await,
            IoCommand::Compare { blocks } => self.compare(blocks).await,
            IoCommand::Verify { blocks } => self.verify(blocks).await,
            IoCommand::WriteZeroes {
                blocks,
                deallocate,
                fua,
            } => self.write_zeroes(blocks, deallocate, fua).await,
            IoCommand::WriteUncorrectable { blocks } => self.write_uncorrectable(blocks).await,
            IoCommand::DatasetManagement { ranges, deallocate } => {
                self.dataset_management(ranges, deallocate).await
            }
            IoCommand::Copy {
                start,
                ranges,
                format,
                fua,
            } => self.copy(start, ranges, format, fua).await,
            IoCommand::ZoneSend {
                start,
                action,
                all,
                option,
            } => self.zone_send(start, action, all, option).await,
            IoCommand::ZoneReceive {
                start,
                len,
                action,
                filter,
                partial,
            } => self.zone_receive(start, len, action, filter, partial).await,
            IoCommand::Read { .. } | IoCommand::Write { .. } | IoCommand::Append { .. } => {
                unreachable!("carried out by `run`")
            }
        }
    }
}
