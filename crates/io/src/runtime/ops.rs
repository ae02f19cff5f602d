//! Operations in flight: a slab that owns everything the kernel may touch until it says that it is done.
//!
//! An operation's buffer belongs to its slot from the submission to the completion, whatever becomes of the future
//! that waits for it. Short transfers are continued here too, so that a dropped future changes nothing about the I/O.

use std::os::fd::RawFd;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::Driver;
use crate::buf::IoBuf;
use crate::file::File;
use crate::nvme::NvmeCommand;
use crate::sys::{IOV_MAX, MAX_RW, NO_OFFSET};

/// Slots are allocated this many at a time and never move.
const CHUNK: usize = 128;

const NONE: u32 = u32::MAX;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Sync {
        data_only: bool,
    },
    Allocate {
        mode: i32,
    },
    /// Wait until the descriptor is readable.
    Poll,
    /// A command for an NVMe device, with the buffer as its data.
    Nvme(NvmeCommand),
}

/// An operation as its future describes it.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) kind: Kind,
    pub(crate) fd: RawFd,
    pub(crate) offset: u64,
    /// Bytes, for everything that has a range.
    pub(crate) len: u64,
    /// Granularity of direct I/O in bytes; 1 if there is none.
    pub(crate) align: u32,
    pub(crate) buf: Option<IoBuf>,
}

/// A memory vector as the kernel wants it.
pub(crate) type IoVec = libc::iovec;

#[derive(Debug, PartialEq, Eq)]
enum State {
    Free {
        next: u32,
    },
    InFlight,
    /// The outcome: zero or a negative errno; of a command for a device its status, too, and its result.
    Done(i32, u64),
}

/// One step of an operation is over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Completion {
    pub(crate) index: u32,
    /// Bytes moved, the status of a command for a device, or a negative errno.
    pub(crate) result: i32,
    /// The result of a command for a device.
    pub(crate) value: u64,
}

/// One operation and its memory.
pub(crate) struct Slot {
    state: State,
    pub(crate) request: Request,
    /// Bytes already moved.
    pub(crate) done: usize,
    waker: Option<Waker>,
    /// The future is gone: nobody takes the result. Holds the file, which the future had borrowed.
    abandoned: Option<Option<File>>,
    inline: [IoVec; 4],
    more: Vec<IoVec>,
}

const NO_IOV: IoVec = IoVec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

impl Slot {
    fn free(next: u32) -> Slot {
        Slot {
            state: State::Free { next },
            request: Request {
                kind: Kind::Poll,
                fd: -1,
                offset: 0,
                len: 0,
                align: 1,
                buf: None,
            },
            done: 0,
            waker: None,
            abandoned: None,
            inline: [NO_IOV; 4],
            more: Vec::new(),
        }
    }

    /// Offset in the file of the next byte to move.
    pub(crate) fn position(&self) -> u64 {
        match self.request.offset {
            NO_OFFSET => NO_OFFSET,
            offset => offset.wrapping_add(self.done as u64),
        }
    }

    /// The rest of the transfer, if it is one piece of memory.
    pub(crate) fn single(&self) -> Option<IoVec> {
        let piece = self.request.buf.as_ref()?.single_from(self.done)?;
        Some(IoVec {
            iov_base: piece.as_ptr().cast(),
            iov_len: piece.len().min(MAX_RW),
        })
    }

    /// The rest of the transfer, as much of it as one operation takes. The array stays where it is until the
    /// operation completes.
    pub(crate) fn vectors(&mut self) -> &[IoVec] {
        let Some(buf) = &self.request.buf else { return &[] };
        let mut room = MAX_RW;
        let mut count = 0;
        let (inline, more) = (&mut self.inline, &mut self.more);
        more.clear();
        buf.pieces_from(self.done, IOV_MAX, |piece| {
            let len = piece.len().min(room);
            room -= len;
            if len == 0 {
                return;
            }
            let vector = IoVec {
                iov_base: piece.as_ptr().cast(),
                iov_len: len,
            };
            if count < inline.len() {
                inline[count] = vector;
            } else {
                if more.is_empty() {
                    more.extend_from_slice(inline);
                }
                more.push(vector);
            }
            count += 1;
        });
        if self.more.is_empty() {
            &self.inline[..count]
        } else {
            &self.more
        }
    }
}

/// Slots that stay where they are, with a free list.
pub(crate) struct Slab {
    chunks: Vec<Box<[Slot]>>,
    first_free: u32,
    in_use: usize,
}

impl Slab {
    fn new(capacity: usize) -> Slab {
        let mut slab = Slab {
            chunks: Vec::new(),
            first_free: NONE,
            in_use: 0,
        };
        while slab.chunks.len() * CHUNK < capacity {
            slab.grow();
        }
        slab
    }

    fn grow(&mut self) {
        let base = (self.chunks.len() * CHUNK) as u32;
        let last = CHUNK as u32 - 1;
        let slots = (0..=last)
            .map(|i| Slot::free(if i == last { self.first_free } else { base + i + 1 }))
            .collect();
        self.chunks.push(slots);
        self.first_free = base;
    }

    pub(crate) fn get(&mut self, index: u32) -> &mut Slot {
        &mut self.chunks[index as usize / CHUNK][index as usize % CHUNK]
    }

    fn take(&mut self, request: Request, waker: Waker) -> u32 {
        if self.first_free == NONE {
            self.grow();
        }
        let index = self.first_free;
        let slot = self.get(index);
        let State::Free { next } = slot.state else {
            unreachable!("slot {index} is on the free list")
        };
        slot.state = State::InFlight;
        slot.request = request;
        slot.done = 0;
        slot.waker = Some(waker);
        self.first_free = next;
        self.in_use += 1;
        index
    }

    fn give_back(&mut self, index: u32) -> (Option<Waker>, Option<File>) {
        let next = self.first_free;
        let slot = self.get(index);
        slot.state = State::Free { next };
        let held = (slot.waker.take(), slot.abandoned.take().flatten());
        self.first_free = index;
        self.in_use -= 1;
        held
    }
}

/// Operations of one runtime and the driver that carries them out.
pub(crate) struct Reactor {
    slab: Slab,
    pub(crate) driver: Driver,
    /// Operations that the driver has not completed yet.
    in_flight: usize,
    completions: Vec<Completion>,
    /// What completed operations held and woke; handled when the reactor is not borrowed, since it may run code
    /// that wants it.
    pub(crate) finished: Finished,
}

/// Wakers to call and things to drop after a round of completions.
#[derive(Default)]
pub(crate) struct Finished {
    pub(crate) wakers: Vec<Waker>,
    pub(crate) bufs: Vec<IoBuf>,
    pub(crate) files: Vec<File>,
}

impl Reactor {
    pub(crate) fn new(driver: Driver, entries: u32) -> Reactor {
        let entries = entries as usize;
        Reactor {
            slab: Slab::new(entries),
            driver,
            in_flight: 0,
            completions: Vec::with_capacity(2 * entries),
            finished: Finished {
                wakers: Vec::with_capacity(2 * entries),
                bufs: Vec::with_capacity(2 * entries),
                files: Vec::new(),
            },
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Queues an operation. [`submit`](Self::submit) tells the kernel.
    pub(crate) fn start(&mut self, request: Request, waker: Waker) -> u32 {
        let index = self.slab.take(request, waker);
        self.in_flight += 1;
        self.driver.push(&mut self.slab, index);
        index
    }

    /// The outcome of an operation, as in [`State::Done`]. Ready gives the slot back.
    pub(crate) fn poll(&mut self, index: u32, cx: &Context<'_>) -> Poll<(i32, u64)> {
        let slot = self.slab.get(index);
        match slot.state {
            State::Done(result, value) => {
                let _ = self.slab.give_back(index);
                Poll::Ready((result, value))
            }
            State::InFlight => {
                match &mut slot.waker {
                    Some(waker) => waker.clone_from(cx.waker()),
                    none => *none = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
            State::Free { .. } => unreachable!("slot {index} belongs to its future"),
        }
    }

    /// The future of an operation is gone. The operation goes on; `file` keeps its descriptor open until it ends.
    pub(crate) fn abandon(&mut self, index: u32, file: Option<File>) -> Option<Waker> {
        if self.slab.chunks.is_empty() {
            // Leaked at the end of the runtime.
            return None;
        }
        let slot = self.slab.get(index);
        if matches!(slot.state, State::Done(..)) {
            return self.slab.give_back(index).0;
        }
        slot.abandoned = Some(file);
        let waker = slot.waker.take();
        if slot.request.kind == Kind::Poll {
            self.cancel(index);
        }
        waker
    }

    fn cancel(&mut self, index: u32) {
        if self.driver.cancel(&mut self.slab, index) {
            self.completed(Completion {
                index,
                result: -libc::ECANCELED,
                value: 0,
            });
        }
    }

    /// Hands everything queued to the kernel: one system call.
    pub(crate) fn submit(&mut self) {
        self.driver.submit(&mut self.slab);
    }

    /// Takes completions. Afterwards `finished` holds whom to wake.
    pub(crate) fn reap(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        self.driver.reap(&mut self.slab, &mut completions);
        for completion in completions.drain(..) {
            self.completed(completion);
        }
        self.completions = completions;
    }

    /// Whether `reap` would find something.
    pub(crate) fn has_completions(&mut self) -> bool {
        self.driver.has_completions()
    }

    /// Sleeps until something happens, at most `timeout`.
    pub(crate) fn wait(&mut self, timeout: Option<Duration>) {
        self.driver.wait(&mut self.slab, timeout);
    }

    fn completed(&mut self, completion: Completion) {
        let Completion { index, result, value } = completion;
        let slot = self.slab.get(index);
        let outcome = match slot.request.kind {
            Kind::Poll => Some(result.min(0)),
            // Interrupted means given up half-way: a command is never sent twice.
            Kind::Nvme(_) => Some(result),
            _ if result == -libc::EINTR || result == -libc::EAGAIN => None,
            Kind::Read | Kind::Write => advance(&mut slot.done, &slot.request, result),
            _ => Some(result.min(0)),
        };
        match outcome {
            Some(result) => self.finish(index, result, value),
            None => self.driver.push(&mut self.slab, index),
        }
    }

    fn finish(&mut self, index: u32, result: i32, value: u64) {
        self.in_flight -= 1;
        let slot = self.slab.get(index);
        slot.state = State::Done(result, value);
        self.finished.bufs.extend(slot.request.buf.take());
        self.finished.wakers.extend(slot.waker.take());
        if slot.abandoned.is_some() {
            let (_, file) = self.slab.give_back(index);
            self.finished.files.extend(file);
        }
    }

    /// The runtime ends: asks for the end of everything that could wait for ever.
    pub(crate) fn cancel_endless(&mut self) {
        for index in 0..(self.slab.chunks.len() * CHUNK) as u32 {
            let slot = self.slab.get(index);
            let endless = slot.request.kind == Kind::Poll || slot.request.offset == NO_OFFSET;
            if slot.state == State::InFlight && endless {
                self.cancel(index);
            }
        }
    }

    /// Operations are still in flight and will not end: nothing of theirs may ever be freed.
    pub(crate) fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.slab.chunks));
    }
}

/// Accounts for `result` bytes moved. The operation's outcome, or `None` if there is more to move.
pub(crate) fn advance(done: &mut usize, request: &Request, result: i32) -> Option<i32> {
    if result < 0 {
        return Some(result);
    }
    let total = request.len as usize;
    let moved = (result as usize).min(total - *done);
    *done += moved;
    if *done == total {
        return Some(0);
    }
    // Direct I/O moves whole blocks, but for the end of the file.
    let ragged = *done % request.align as usize;
    if request.kind == Kind::Read {
        if moved == 0 || ragged != 0 {
            if let Some(buf) = &request.buf {
                buf.fill(*done..total, 0);
            }
            return Some(0);
        }
        return None;
    }
    *done -= ragged;
    if moved <= ragged { Some(-libc::EIO) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kind: Kind, len: u64, align: u32) -> (Request, IoBuf) {
        let buf = IoBuf::from_vec(vec![0xff; len as usize]);
        (
            Request {
                kind,
                fd: -1,
                offset: 0,
                len,
                align,
                buf: Some(buf.clone()),
            },
            buf,
        )
    }

    #[test]
    fn short_transfers_go_on_until_everything_is_moved() {
        for kind in [Kind::Read, Kind::Write] {
            let (request, _) = request(kind, 100, 1);
            let mut done = 0;
            assert_eq!(advance(&mut done, &request, 60), None);
            assert_eq!(advance(&mut done, &request, 39), None);
            assert_eq!((advance(&mut done, &request, 1), done), (Some(0), 100));
        }
    }

    #[test]
    fn the_end_of_the_file_reads_as_zeros() {
        let (request, buf) = request(Kind::Read, 8, 1);
        let mut done = 0;
        assert_eq!(advance(&mut done, &request, 3), None);
        assert_eq!(advance(&mut done, &request, 0), Some(0));
        assert_eq!(buf.to_vec(), [0xff, 0xff, 0xff, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_write_that_makes_no_progress_is_an_error() {
        let (request, _) = request(Kind::Write, 8, 1);
        let mut done = 5;
        assert_eq!(advance(&mut done, &request, 0), Some(-libc::EIO));
        assert_eq!(advance(&mut done, &request, -libc::ENOSPC), Some(-libc::ENOSPC));
    }

    #[test]
    fn direct_io_continues_at_block_boundaries_only() {
        let (read, buf) = request(Kind::Read, 2048, 512);
        let mut done = 0;
        assert_eq!(advance(&mut done, &read, 1024), None);
        assert_eq!(
            advance(&mut done, &read, 100),
            Some(0),
            "a ragged read is the end of the file"
        );
        assert!(buf.to_vec()[1124..].iter().all(|b| *b == 0));

        let (write, _) = request(Kind::Write, 2048, 512);
        let mut done = 0;
        assert_eq!(advance(&mut done, &write, 700), None);
        assert_eq!(done, 512, "the torn block is written again");
        assert_eq!(advance(&mut done, &write, 100), Some(-libc::EIO));
    }
}
