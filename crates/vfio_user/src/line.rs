//! A connection's socket, lent to a thread of the device.
//!
//! What a running client sends is mostly posted writes that wake a thread of the device. A thread that is asleep anyway can
//! sleep at the socket itself: then nobody has to be woken only to wake it. Whatever is not such a write goes to the
//! server's thread, with the socket, so that messages are dealt with in their order.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use zbdkit_io::unix::{Progress, signal};
use zbdkit_spec::vfio_user::{Header, RegionAccess, command, flag};
use zerocopy::FromBytes;

use crate::message::{RawMessage, Stream, StreamError};

/// Longest data of a posted write that a [`Line`] tells, bytes: a doorbell, or two.
const MAX_POSTED: usize = 8;

/// A write to a region that the client wants no answer to, as it came: neither region nor range are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PostedWrite {
    /// The region.
    pub region: u32,
    /// Bytes from its start.
    pub offset: u64,
    data: [u8; MAX_POSTED],
    len: usize,
}

impl PostedWrite {
    /// What is written, at most 8 bytes.
    pub fn data(&self) -> &[u8] {
        &self.data[..self.len]
    }

    fn of(message: &RawMessage) -> Option<PostedWrite> {
        let flags = message.header.flags.get();
        let is_posted = flags & (flag::TYPE_MASK | flag::NO_REPLY) == flag::COMMAND | flag::NO_REPLY;
        if !is_posted || message.header.command.get() != command::REGION_WRITE || !message.fds.is_empty() {
            return None;
        }
        let (access, written) = RegionAccess::read_from_prefix(&message.payload).ok()?;
        if written.len() > MAX_POSTED || written.len() as u64 != u64::from(access.count.get()) {
            return None;
        }
        let mut data = [0; MAX_POSTED];
        data[..written.len()].copy_from_slice(written);
        Some(PostedWrite {
            region: access.region.get(),
            offset: access.offset.get(),
            data,
            len: written.len(),
        })
    }
}

/// What came of looking at a [`Line`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard<T> {
    /// A write that the device's thread takes, as it understands it.
    Write(T),
    /// Nothing more for now.
    Nothing,
    /// Something for the server: the line is to be dropped.
    Else,
}

/// A connection's socket while the server has nothing to do for it. Dropping it gives it back.
#[derive(Debug)]
pub struct Line {
    /// `None` once it is given back.
    stream: Option<Stream>,
    met: Option<Met>,
    home: Arc<Home>,
}

/// What ended a loan, for the server to deal with.
pub(crate) type Met = Result<Progress<Header>, StreamError>;

/// Where a line comes back to.
#[derive(Debug)]
pub(crate) struct Home {
    state: Mutex<State>,
    back: Condvar,
    /// Readable once the line is back.
    bell: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    stream: Option<Stream>,
    met: Option<Met>,
    recalled: bool,
    waker: Option<Waker>,
}

impl Line {
    /// Looks at the socket. Writes that `takes` understands are told; everything else is the server's.
    pub fn listen<T>(&mut self, takes: impl FnOnce(PostedWrite) -> Option<T>) -> Heard<T> {
        let Some(stream) = &mut self.stream else {
            return Heard::Else;
        };
        let met = stream.advance();
        match &met {
            Ok(Progress::Idle) => return Heard::Nothing,
            Ok(Progress::Message(message)) => {
                if let Some(write) = PostedWrite::of(message).and_then(takes) {
                    return Heard::Write(write);
                }
            }
            Ok(Progress::Closed) | Err(_) => {}
        }
        self.met = Some(met);
        Heard::Else
    }

    /// Whether the server wants it back; if not, `cx` is woken when it does.
    pub fn is_recalled(&self, cx: &mut Context<'_>) -> bool {
        let mut state = self.home.lock();
        if !state.recalled {
            state.waker = Some(cx.waker().clone());
        }
        state.recalled
    }
}

/// The socket, to wait at.
impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.stream {
            Some(stream) => stream.as_fd(),
            None => self.home.bell.as_fd(),
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let mut state = self.home.lock();
        state.stream = self.stream.take();
        state.met = self.met.take();
        state.waker = None;
        drop(state);
        self.home.back.notify_all();
        signal(&self.home.bell);
    }
}

impl Home {
    /// For the lines of one connection.
    pub(crate) fn new() -> io::Result<Arc<Home>> {
        Ok(Arc::new(Home {
            state: Mutex::default(),
            back: Condvar::new(),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a line of a socket that is at rest.
    pub(crate) fn lend(self: &Arc<Home>, stream: Stream) -> Line {
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        self.lock().recalled = false;
        Line {
            stream: Some(stream),
            met: None,
            home: self.clone(),
        }
    }

    /// Asks for the line, and waits for it; `None` where it does not come in time.
    pub(crate) fn recall(&self, patience: Duration) -> Option<(Stream, Option<Met>)> {
        let mut state = self.lock();
        state.recalled = true;
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
        let missing = |state: &mut State| state.stream.is_none();
        let waited = self.back.wait_timeout_while(state, patience, missing);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        let stream = state.stream.take()?;
        Some((stream, state.met.take()))
    }
}

/// Readable once the line is back.
impl AsFd for Home {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
