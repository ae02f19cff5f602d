//! Commands of ours to the client: reads and writes of memory that came without a file descriptor.
//!
//! Threads of the device queue accesses; the server's thread sends them, a bounded number at a time, and hands the
//! replies back. Nothing here touches the socket.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use zbdkit_io::unix::signal;
use zbdkit_spec::vfio_user::{DmaAccess, command, flag};
use zerocopy::{FromBytes, IntoBytes};

use crate::dma::DmaError;
use crate::message::{RawMessage, message};

/// Accesses that the client has to answer at a time.
const MAX_SENT: usize = 16;
/// Accesses that wait to be sent; the device's request slots bound them long before.
const MAX_WAITING: usize = 4096;
/// Longest data of an access, in bytes: a large one does not hold up the others.
const MAX_CHUNK: u32 = 64 << 10;
/// How long the client may take for an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A client that does not keep to the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// A reply to nothing that was asked.
    #[error("the client replies to message {id} with command {command}, which was not sent")]
    Unexpected {
        /// Message id.
        id: u16,
        /// Command.
        command: u16,
    },
    /// A reply that does not have what was asked for.
    #[error("the client's reply to a DMA_READ is not what was asked for")]
    Wrong,
    /// No reply.
    #[error("the client has not answered a DMA access for {} s", ANSWER_WITHIN.as_secs())]
    Silent,
}

/// The accesses of one connection.
#[derive(Debug)]
pub(crate) struct Peer {
    state: Mutex<State>,
    /// Readable when there is something to send.
    knock: OwnedFd,
}

#[derive(Debug)]
struct State {
    closed: bool,
    /// The server's thread waits for the device, and would not send anything.
    refuses: bool,
    max_data: u32,
    waiting: VecDeque<Arc<Access>>,
    sent: Vec<Sent>,
    next_id: u16,
}

#[derive(Debug)]
struct Sent {
    id: u16,
    access: Arc<Access>,
    until: Instant,
}

#[derive(Debug)]
struct Access {
    address: u64,
    count: usize,
    /// The data of a write.
    data: Option<Vec<u8>>,
    progress: Mutex<Progress>,
}

#[derive(Debug)]
enum Progress {
    Waiting(Option<Waker>),
    Done(Result<Vec<u8>, DmaError>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Access {
    fn finish(&self, result: Result<Vec<u8>, DmaError>) {
        let mut progress = lock(&self.progress);
        if let Progress::Waiting(waker) = &mut *progress {
            let waker = waker.take();
            *progress = Progress::Done(result);
            drop(progress);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    fn command(&self) -> u16 {
        match self.data {
            Some(_) => command::DMA_WRITE,
            None => command::DMA_READ,
        }
    }

    fn touches(&self, address: u64, size: u64) -> bool {
        // Neither end overflows: both lie in ranges that were checked when they were mapped.
        self.address < address.saturating_add(size)
            && address < self.address.saturating_add(self.count as u64)
    }
}

impl Peer {
    pub(crate) fn new() -> io::Result<Peer> {
        Ok(Peer {
            state: Mutex::new(State {
                closed: false,
                refuses: false,
                max_data: MAX_CHUNK,
                waiting: VecDeque::new(),
                sent: Vec::new(),
                next_id: 0,
            }),
            knock: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Longest data of one access, in bytes.
    pub(crate) fn chunk(&self) -> usize {
        lock(&self.state).max_data as usize
    }

    /// Takes what the client can take.
    pub(crate) fn limit(&self, max_data: u32) {
        lock(&self.state).max_data = max_data.min(MAX_CHUNK);
    }

    /// Reads `count` bytes, at most [`chunk`](Self::chunk).
    pub(crate) async fn read(&self, address: u64, count: usize) -> Result<Vec<u8>, DmaError> {
        self.access(address, count, None).await
    }

    /// Writes at most [`chunk`](Self::chunk) bytes.
    pub(crate) async fn write(&self, address: u64, data: Vec<u8>) -> Result<(), DmaError> {
        self.access(address, data.len(), Some(data)).await.map(drop)
    }

    async fn access(&self, address: u64, count: usize, data: Option<Vec<u8>>) -> Result<Vec<u8>, DmaError> {
        let access = Arc::new(Access {
            address,
            count,
            data,
            progress: Mutex::new(Progress::Waiting(None)),
        });
        {
            let mut state = lock(&self.state);
            if state.closed {
                return Err(DmaError::Disconnected);
            }
            if state.refuses {
                return Err(DmaError::Cancelled);
            }
            if state.waiting.len() == MAX_WAITING {
                return Err(DmaError::Busy);
            }
            state.waiting.push_back(access.clone());
        }
        signal(&self.knock);
        poll_fn(|cx| match &mut *lock(&access.progress) {
            Progress::Waiting(waker) => {
                *waker = Some(cx.waker().clone());
                Poll::Pending
            }
            Progress::Done(result) => Poll::Ready(std::mem::replace(result, Err(DmaError::Disconnected))),
        })
        .await
    }

    /// The next message to send, if the client may be asked for more.
    pub(crate) fn next(&self) -> Option<Vec<u8>> {
        let mut state = lock(&self.state);
        if state.sent.len() >= MAX_SENT {
            return None;
        }
        let access = state.waiting.pop_front()?;
        let mut id = state.next_id;
        while state.sent.iter().any(|sent| sent.id == id) {
            id = id.wrapping_add(1);
        }
        state.next_id = id.wrapping_add(1);
        let wire = DmaAccess {
            address: access.address.into(),
            count: (access.count as u64).into(),
        };
        let mut payload = wire.as_bytes().to_vec();
        payload.extend(access.data.iter().flatten());
        let bytes = message(id, access.command(), flag::COMMAND, 0, &payload);
        let until = Instant::now() + ANSWER_WITHIN;
        state.sent.push(Sent { id, access, until });
        Some(bytes)
    }

    /// Forgets that there was something to send, before [`next`](Self::next) is asked.
    pub(crate) fn heard(&self) {
        let _ = rustix::io::read(&self.knock, &mut [0; 8]);
    }

    /// Takes a reply.
    pub(crate) fn complete(&self, reply: &RawMessage) -> Result<(), PeerError> {
        let (id, command) = (reply.header.message_id.get(), reply.header.command.get());
        let sent = {
            let mut state = lock(&self.state);
            let matches = |sent: &Sent| sent.id == id && sent.access.command() == command;
            let Some(index) = state.sent.iter().position(matches) else {
                return Err(PeerError::Unexpected { id, command });
            };
            state.sent.swap_remove(index)
        };
        let access = sent.access;
        if reply.header.flags.get() & flag::ERROR != 0 {
            access.finish(Err(DmaError::Refused(errno(reply.header.error.get()))));
            return Ok(());
        }
        if access.data.is_some() {
            access.finish(Ok(Vec::new()));
            return Ok(());
        }
        match DmaAccess::read_from_prefix(&reply.payload) {
            Ok((wire, data)) if wire.address.get() == access.address && data.len() == access.count => {
                access.finish(Ok(data.to_vec()));
                Ok(())
            }
            _ => {
                access.finish(Err(DmaError::Disconnected));
                Err(PeerError::Wrong)
            }
        }
    }

    /// When the client's patience with us ends, or rather ours with it.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        lock(&self.state).sent.iter().map(|sent| sent.until).min()
    }

    /// Ends every access to a range. The client may still answer those that were sent.
    pub(crate) fn cancel(&self, address: u64, size: u64) {
        self.end(DmaError::Cancelled, |access| access.touches(address, size));
    }

    /// Ends every access, and begins none until they are [allowed](Self::allow) again.
    pub(crate) fn refuse(&self) {
        lock(&self.state).refuses = true;
        self.end(DmaError::Cancelled, |_| true);
    }

    /// Takes accesses again.
    pub(crate) fn allow(&self) {
        lock(&self.state).refuses = false;
    }

    /// Ends every access, and takes no more: the client is gone.
    pub(crate) fn close(&self) {
        lock(&self.state).closed = true;
        self.end(DmaError::Disconnected, |_| true);
        lock(&self.state).sent.clear();
    }

    fn end(&self, why: DmaError, which: impl Fn(&Access) -> bool) {
        let mut ended = Vec::new();
        {
            let mut state = lock(&self.state);
            state.waiting.retain(|access| {
                let ends = which(access);
                if ends {
                    ended.push(access.clone());
                }
                !ends
            });
            // Those that were sent stay, so that their replies are known.
            ended.extend(
                state
                    .sent
                    .iter()
                    .map(|sent| &sent.access)
                    .filter(|a| which(a))
                    .cloned(),
            );
        }
        ended.iter().for_each(|access| access.finish(Err(why.clone())));
    }
}

/// A number of the client as an errno. The protocol allows 0, and a client may say anything.
fn errno(number: u32) -> Errno {
    match i32::try_from(number) {
        Ok(number @ 1..=4095) => Errno::from_raw_os_error(number),
        _ => Errno::IO,
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.knock.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::Context;

    use super::*;

    #[test]
    fn while_they_are_refused_accesses_end_at_once() {
        let peer = Peer::new().unwrap();
        let mut cx = Context::from_waker(Waker::noop());
        let cancelled = Poll::Ready(Err(DmaError::Cancelled));
        let mut before = pin!(peer.read(0, 4));
        assert!(before.as_mut().poll(&mut cx).is_pending());
        peer.refuse();
        assert_eq!(before.poll(&mut cx), cancelled);
        assert_eq!(pin!(peer.read(0, 4)).poll(&mut cx), cancelled);
        peer.allow();
        assert!(pin!(peer.read(0, 4)).poll(&mut cx).is_pending());
    }
}
