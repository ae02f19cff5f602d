//! What the protocol servers need of unix sockets and eventfds: listening with care, one client after the other, bytes
//! that come with file descriptors put together to messages, and signals that never block.

mod listener;
mod reception;
mod stream;

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

pub use listener::{ListenError, Listener, MAX_SOCKET_PATH};
pub use reception::{Awake, Knock, Reception, Stop};
pub use stream::{Framing, Progress, RawMessage, Stream, StreamError};

/// File descriptors with one message that [`receive`] takes: the most that a vhost-user message has, and what we tell
/// vfio-user clients.
pub const MAX_FDS: usize = 8;

/// Why nothing could be received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// More file descriptors than any message has.
    #[error("a message carries more than {MAX_FDS} file descriptors")]
    TooManyFds,
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads once from a non-blocking socket, and adds the file descriptors that came with the bytes to `fds`. `None` where
/// there is nothing yet, `Some(0)` at the end.
///
/// # Errors
/// More than [`MAX_FDS`] descriptors in `fds`, or what the system says.
fn receive(
    socket: impl AsFd,
    into: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<Option<usize>, ReceiveError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    loop {
        let mut slices = [IoSliceMut::new(into)];
        match recvmsg(&socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => {
                for message in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(rights) = message {
                        fds.extend(rights);
                    }
                }
                if message.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
                    return Err(ReceiveError::TooManyFds);
                }
                return Ok(Some(message.bytes));
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::CONNRESET) => return Ok(Some(0)),
            Err(errno) => return Err(ReceiveError::Io(errno.into())),
        }
    }
}

/// Whether accepting a connection failed for want of descriptors or memory: connections wait in the backlog until there are
/// some again.
fn is_shortage(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)
    )
}

/// Makes sure that a descriptor from the other side does not block us. It may be anything; then using it fails.
pub fn set_nonblocking(fd: impl AsFd) {
    if let Ok(flags) = rustix::fs::fcntl_getfl(&fd) {
        let _ = rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK);
    }
}

/// Counts an eventfd up. One that is full has been signalled already: looking first matters, since the other side
/// shares the description and can take the flag of [`set_nonblocking`] back.
pub fn signal(eventfd: impl AsFd) {
    let mut ready = [PollFd::new(&eventfd, PollFlags::OUT)];
    if matches!(poll(&mut ready, Some(&Timespec::default())), Ok(1)) {
        let _ = rustix::io::write(&eventfd, &1u64.to_ne_bytes());
    }
}
