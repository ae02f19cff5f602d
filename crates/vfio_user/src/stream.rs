//! Bytes and file descriptors of a vfio-user socket, put together to messages.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use zbdkit_io::unix::{ReceiveError, receive};
use zbdkit_spec::vfio_user::{HEADER_SIZE, Header};

use crate::message::{Malformed, RawMessage, check_header};

/// How long a client may leave what we send unread.
const SEND_WITHIN: Duration = Duration::from_secs(5);

/// Most bytes that are made room for before they have come.
const GROW: usize = 64 << 10;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// A header that no message can have.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The socket failed, or a message came with too many file descriptors.
    #[error("vfio-user socket: {0}")]
    Receive(#[from] ReceiveError),
    /// The socket failed.
    #[error("vfio-user socket: {0}")]
    Io(#[from] io::Error),
    /// Hang-up in the middle.
    #[error("the client closed the connection in the middle of a message")]
    Truncated,
    /// What we send is not taken.
    #[error("the client has not read a message for {} s", SEND_WITHIN.as_secs())]
    Stalled,
    /// The server is shutting down.
    #[error("shutting down")]
    Stopped,
}

impl From<Errno> for StreamError {
    fn from(errno: Errno) -> Self {
        StreamError::Io(errno.into())
    }
}

/// What came of looking at the socket.
#[derive(Debug)]
pub enum Progress {
    /// A message is complete.
    Message(RawMessage),
    /// Nothing more to read for now.
    Idle,
    /// The client is gone, between two messages.
    Closed,
}

/// One connection. The socket is non-blocking; a message that arrives in pieces is kept until it is whole.
#[derive(Debug)]
pub struct Stream {
    socket: OwnedFd,
    header: [u8; HEADER_SIZE],
    header_len: usize,
    payload: Vec<u8>,
    payload_len: usize,
    fds: Vec<OwnedFd>,
}

impl Stream {
    /// Takes over a connected socket.
    ///
    /// # Errors
    /// If it cannot be made non-blocking.
    pub fn new(socket: OwnedFd) -> io::Result<Stream> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Stream {
            socket,
            header: [0; HEADER_SIZE],
            header_len: 0,
            payload: Vec::new(),
            payload_len: 0,
            fds: Vec::new(),
        })
    }

    /// Reads what is there, up to the end of one message.
    ///
    /// # Errors
    /// After any of them the stream is out of step and must be closed.
    pub fn advance(&mut self) -> Result<Progress, StreamError> {
        while self.header_len < HEADER_SIZE {
            match receive(&self.socket, &mut self.header[self.header_len..], &mut self.fds)? {
                None => return Ok(Progress::Idle),
                Some(0) if self.header_len == 0 => return Ok(Progress::Closed),
                Some(0) => return Err(StreamError::Truncated),
                Some(got) => self.header_len += got,
            }
        }
        let header: Header = zerocopy::transmute!(self.header);
        check_header(&header)?;
        let whole = header.message_size.get() as usize - HEADER_SIZE;
        while self.payload_len < whole {
            if self.payload_len == self.payload.len() {
                self.payload.resize(whole.min(self.payload_len + GROW), 0);
            }
            match receive(&self.socket, &mut self.payload[self.payload_len..], &mut self.fds)? {
                None => return Ok(Progress::Idle),
                Some(0) => return Err(StreamError::Truncated),
                Some(got) => self.payload_len += got,
            }
        }
        self.header_len = 0;
        self.payload_len = 0;
        Ok(Progress::Message(RawMessage {
            header,
            payload: std::mem::take(&mut self.payload),
            fds: std::mem::take(&mut self.fds),
        }))
    }

    /// Sends a message whole, with at most one file descriptor. Waits while the client does not read, but not beyond
    /// `stop`, and not for ever.
    ///
    /// # Errors
    /// `Stopped`, `Stalled`, or the socket's error.
    pub fn send(
        &self,
        mut bytes: &[u8],
        mut fd: Option<BorrowedFd<'_>>,
        stop: BorrowedFd<'_>,
    ) -> Result<(), StreamError> {
        let deadline = Instant::now() + SEND_WITHIN;
        while !bytes.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if let Some(fd) = fd.as_slice().first() {
                control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(fd)));
            }
            match sendmsg(
                &self.socket,
                &[IoSlice::new(bytes)],
                &mut control,
                SendFlags::NOSIGNAL,
            ) {
                Ok(sent) => {
                    bytes = &bytes[sent..];
                    fd = None;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait_writable(stop, deadline)?,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn wait_writable(&self, stop: BorrowedFd<'_>, deadline: Instant) -> Result<(), StreamError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or_default();
        let mut fds = [
            PollFd::new(&self.socket, PollFlags::OUT),
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
        ];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => Err(StreamError::Stalled),
            Ok(_) if !fds[1].revents().is_empty() => Err(StreamError::Stopped),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Request;
    use proptest::prelude::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, Stream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, Stream::new(theirs.into()).unwrap())
    }

    #[test]
    fn a_message_in_single_bytes_is_put_together() {
        let (mut peer, mut stream) = pair();
        let bytes = crate::message::message(7, 13, 0, 0, &[]);
        for byte in bytes {
            assert!(matches!(stream.advance().unwrap(), Progress::Idle));
            peer.write_all(&[byte]).unwrap();
        }
        let Progress::Message(message) = stream.advance().unwrap() else {
            panic!("no message")
        };
        assert!(matches!(Request::parse(message).unwrap(), Request::Reset));
        assert!(matches!(stream.advance().unwrap(), Progress::Idle));
        drop(peer);
        assert!(matches!(stream.advance().unwrap(), Progress::Closed));
    }

    #[test]
    fn sizes_that_no_message_has_end_the_connection_before_anything_is_allocated() {
        for size in [
            0u32,
            15,
            (HEADER_SIZE + crate::message::MAX_PAYLOAD) as u32 + 1,
            u32::MAX,
        ] {
            let (mut peer, mut stream) = pair();
            let mut bytes = crate::message::message(7, 9, 0, 0, &[]);
            bytes[4..8].copy_from_slice(&size.to_le_bytes());
            peer.write_all(&bytes).unwrap();
            assert!(
                matches!(stream.advance(), Err(StreamError::Malformed(_))),
                "{size}"
            );
            assert_eq!(stream.payload.capacity(), 0);
        }
    }

    #[test]
    fn room_is_made_only_for_bytes_that_come() {
        let (mut peer, mut stream) = pair();
        let mut bytes = crate::message::message(7, 9, 0, 0, &[]);
        bytes[4..8].copy_from_slice(&(1u32 << 20).to_le_bytes());
        peer.write_all(&bytes).unwrap();
        assert!(matches!(stream.advance().unwrap(), Progress::Idle));
        assert!(stream.payload.capacity() <= GROW);
    }

    #[test]
    fn a_hang_up_in_mid_message_is_told_from_one_between() {
        let (mut peer, mut stream) = pair();
        peer.write_all(&[1, 0, 13, 0, 16]).unwrap();
        drop(peer);
        assert!(matches!(stream.advance().unwrap_err(), StreamError::Truncated));
    }

    proptest! {
        #[test]
        fn hostile_bytes_end_in_a_message_an_error_or_silence(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let (mut peer, mut stream) = pair();
            peer.write_all(&bytes).unwrap();
            drop(peer);
            // Each step consumes at least a header: the loop is bounded by the input.
            for _ in 0..=bytes.len() / HEADER_SIZE + 1 {
                match stream.advance() {
                    Ok(Progress::Message(message)) => {
                        let _ = Request::parse(message);
                    }
                    Ok(Progress::Idle) => prop_assert!(false, "idle on a closed socket"),
                    Ok(Progress::Closed) | Err(_) => return Ok(()),
                }
            }
            prop_assert!(false, "more messages than bytes");
        }
    }
}
