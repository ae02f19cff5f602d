//! What a transport brings: memory to transfer data with, and control of its queues.

use std::future::{Future, ready};

use zbdkit_io::IoBuf;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::command::SubmissionEntry;

use crate::status::Failure;

/// Which way a command's data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The controller reads it.
    HostToController,
    /// The controller writes it.
    ControllerToHost,
}

/// The data of one command. A transport makes one for each that it executes, or one for all where the entry says
/// everything, as with PRPs.
pub trait Transfer {
    /// The memory that the entry's data pointer names, as a buffer of exactly `len` bytes, which is neither 0 nor more
    /// than the controller's limit. Asked for once a command at most, after everything else about it was checked.
    ///
    /// For [`Direction::HostToController`] the host's data is in it (and may change at any time, where it is the host's
    /// memory). For [`Direction::ControllerToHost`] the bytes become the host's when the command completes with
    /// success: at once where the buffer is the host's memory, else the transport keeps a clone and sends it on.
    ///
    /// # Errors
    /// The status of a malformed or too short PRP list or SGL, or of memory that is not there.
    fn buffer(
        &self,
        entry: &SubmissionEntry,
        direction: Direction,
        len: usize,
    ) -> impl Future<Output = Result<IoBuf, Failure>>;
}

/// A completion queue to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateCq {
    /// Its identifier, as the host wrote it.
    pub qid: u16,
    /// Its entries, 1 to 65536.
    pub entries: u32,
    /// Where it is, or the list of its pages.
    pub prp1: u64,
    /// It is contiguous.
    pub contiguous: bool,
    /// The interrupt vector, where interrupts are enabled.
    pub vector: Option<u16>,
}

/// A submission queue to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateSq {
    /// Its identifier, as the host wrote it.
    pub qid: u16,
    /// Its entries, 1 to 65536.
    pub entries: u32,
    /// Where it is, or the list of its pages.
    pub prp1: u64,
    /// It is contiguous.
    pub contiguous: bool,
    /// The completion queue.
    pub cqid: u16,
}

/// What admin commands do to the queues of a transport. Where a transport has no such command (fabrics make their
/// queues otherwise) it is refused as an unknown opcode. All numbers are unchecked.
pub trait QueueControl {
    /// Create I/O Completion Queue.
    fn create_cq(&self, _queue: CreateCq) -> impl Future<Output = Result<(), Failure>> {
        ready(Err(Status::INVALID_OPCODE.into()))
    }

    /// Create I/O Submission Queue.
    fn create_sq(&self, _queue: CreateSq) -> impl Future<Output = Result<(), Failure>> {
        ready(Err(Status::INVALID_OPCODE.into()))
    }

    /// Delete I/O Completion Queue.
    fn delete_cq(&self, _qid: u16) -> impl Future<Output = Result<(), Failure>> {
        ready(Err(Status::INVALID_OPCODE.into()))
    }

    /// Delete I/O Submission Queue: returns once none of its commands is executing.
    fn delete_sq(&self, _qid: u16) -> impl Future<Output = Result<(), Failure>> {
        ready(Err(Status::INVALID_OPCODE.into()))
    }

    /// Doorbell Buffer Config: the guest addresses of the shadow doorbells and of the event indexes. Comes only where
    /// [`crate::ControllerOptions::doorbell_buffers`] is set.
    fn set_doorbell_buffers(
        &self,
        _shadow: u64,
        _event_index: u64,
    ) -> impl Future<Output = Result<(), Failure>> {
        ready(Err(Status::INVALID_OPCODE.into()))
    }

    /// Abort: whether the command was aborted (and completes, or has completed, with
    /// [`Status::ABORT_REQUESTED`]). Not to abort one is always right.
    fn abort(&self, _sqid: u16, _cid: u16) -> impl Future<Output = bool> {
        ready(false)
    }
}
