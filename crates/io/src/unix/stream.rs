//! Bytes and file descriptors of a connected unix socket, put together to messages.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{ReceiveError, receive};

/// How long the other side may leave what we send unread.
const SEND_WITHIN: Duration = Duration::from_secs(5);

/// Most bytes that are made room for before they have come.
const GROW: usize = 64 << 10;

/// How a protocol puts its messages into bytes: a header of fixed size, which says how long the payload behind it is.
pub trait Framing {
    /// What every message starts with.
    type Header: FromBytes + IntoBytes + Copy;
    /// Why it is not one.
    type Malformed: std::error::Error + 'static;

    /// How many bytes follow a header. Bounds them: that many are read.
    ///
    /// # Errors
    /// A header that no message can have.
    fn payload_len(header: &Self::Header) -> Result<usize, Self::Malformed>;
}

/// A message as it came from the socket: a header with its payload, and what was attached to it.
#[derive(Debug)]
pub struct RawMessage<H> {
    /// The header, which was checked for the length of its payload.
    pub header: H,
    /// Everything behind it.
    pub payload: Vec<u8>,
    /// What came with it, at most [`MAX_FDS`](super::MAX_FDS).
    pub fds: Vec<OwnedFd>,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum StreamError<M: std::error::Error + 'static> {
    /// A header that no message can have.
    #[error(transparent)]
    Malformed(M),
    /// The socket failed, or a message came with too many file descriptors.
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Io(#[from] io::Error),
    /// Hang-up in the middle.
    #[error("it was closed in the middle of a message")]
    Truncated,
    /// What we send is not taken.
    #[error("no message was read at its other end for {} s", SEND_WITHIN.as_secs())]
    Stalled,
    /// The server is shutting down.
    #[error("shutting down")]
    Stopped,
}

/// What came of looking at the socket.
#[derive(Debug)]
pub enum Progress<H> {
    /// A message is complete.
    Message(RawMessage<H>),
    /// Nothing more to read for now.
    Idle,
    /// The other side is gone, between two messages.
    Closed,
}

/// One connection. The socket is non-blocking; a message that arrives in pieces is kept until it is whole.
#[derive(Debug)]
pub struct Stream<F: Framing> {
    socket: OwnedFd,
    header: F::Header,
    header_len: usize,
    payload: Vec<u8>,
    payload_len: usize,
    fds: Vec<OwnedFd>,
}

impl<F: Framing> Stream<F> {
    /// Takes over a connected socket.
    ///
    /// # Errors
    /// If it cannot be made non-blocking.
    pub fn new(socket: OwnedFd) -> io::Result<Stream<F>> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Stream {
            socket,
            header: F::Header::new_zeroed(),
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
    pub fn advance(&mut self) -> Result<Progress<F::Header>, StreamError<F::Malformed>> {
        while self.header_len < size_of::<F::Header>() {
            let into = &mut self.header.as_mut_bytes()[self.header_len..];
            match receive(&self.socket, into, &mut self.fds)? {
                None => return Ok(Progress::Idle),
                Some(0) if self.header_len == 0 => return Ok(Progress::Closed),
                Some(0) => return Err(StreamError::Truncated),
                Some(got) => self.header_len += got,
            }
        }
        let whole = F::payload_len(&self.header).map_err(StreamError::Malformed)?;
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
            header: self.header,
            payload: std::mem::take(&mut self.payload),
            fds: std::mem::take(&mut self.fds),
        }))
    }

    /// Sends a message whole, with at most one file descriptor. Waits while the other side does not read, but not beyond
    /// `stop`, and not for ever.
    ///
    /// # Errors
    /// `Stopped`, `Stalled`, or the socket's error.
    pub fn send(
        &self,
        mut bytes: &[u8],
        mut fd: Option<BorrowedFd<'_>>,
        stop: BorrowedFd<'_>,
    ) -> Result<(), StreamError<F::Malformed>> {
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
                Err(errno) => return Err(StreamError::Io(errno.into())),
            }
        }
        Ok(())
    }

    fn wait_writable(
        &self,
        stop: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<(), StreamError<F::Malformed>> {
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
            Err(errno) => Err(StreamError::Io(errno.into())),
        }
    }
}

impl<F: Framing> AsFd for Stream<F> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;
    use rustix::event::{EventfdFlags, eventfd};
    use zerocopy::little_endian::U32;
    use zerocopy::{Immutable, KnownLayout};

    use super::super::{MAX_FDS, signal};
    use super::*;

    /// A tag, and the length of the payload.
    #[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(C)]
    struct PlainHeader {
        tag: U32,
        len: U32,
    }

    #[derive(Debug, thiserror::Error)]
    #[error("{0} bytes are too many")]
    struct TooLong(u32);

    const LONGEST: u32 = 1 << 20;

    #[derive(Debug)]
    struct Plain;

    impl Framing for Plain {
        type Header = PlainHeader;
        type Malformed = TooLong;

        fn payload_len(header: &PlainHeader) -> Result<usize, TooLong> {
            match header.len.get() {
                len if len <= LONGEST => Ok(len as usize),
                len => Err(TooLong(len)),
            }
        }
    }

    fn pair() -> (UnixStream, Stream<Plain>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, Stream::new(theirs.into()).unwrap())
    }

    fn message(tag: u32, len: u32, payload: &[u8]) -> Vec<u8> {
        let header = PlainHeader {
            tag: tag.into(),
            len: len.into(),
        };
        [header.as_bytes(), payload].concat()
    }

    fn send_with_fds(socket: &UnixStream, bytes: &[u8], count: usize) {
        let file = std::fs::File::open("/dev/null").unwrap();
        let fds = vec![file.as_fd(); count];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
    }

    fn whole(stream: &mut Stream<Plain>) -> RawMessage<PlainHeader> {
        match stream.advance().unwrap() {
            Progress::Message(message) => message,
            other => panic!("no message but {other:?}"),
        }
    }

    #[test]
    fn a_message_in_single_bytes_is_put_together() {
        let (mut peer, mut stream) = pair();
        for byte in message(7, 3, b"abc") {
            assert!(matches!(stream.advance().unwrap(), Progress::Idle));
            peer.write_all(&[byte]).unwrap();
        }
        let message = whole(&mut stream);
        assert_eq!((message.header.tag.get(), &*message.payload), (7, &b"abc"[..]));
        assert!(matches!(stream.advance().unwrap(), Progress::Idle));
        drop(peer);
        assert!(matches!(stream.advance().unwrap(), Progress::Closed));
    }

    #[test]
    fn file_descriptors_belong_to_their_message() {
        let (mut peer, mut stream) = pair();
        send_with_fds(&peer, &message(1, 2, b"ab"), 1);
        peer.write_all(&message(2, 0, b"")).unwrap();
        let [first, second] = [whole(&mut stream), whole(&mut stream)];
        assert_eq!((first.fds.len(), second.fds.len()), (1, 0));
    }

    #[test]
    fn too_many_file_descriptors_end_the_connection() {
        let (peer, mut stream) = pair();
        send_with_fds(&peer, &message(1, 0, b""), MAX_FDS + 12);
        assert!(matches!(
            stream.advance().unwrap_err(),
            StreamError::Receive(ReceiveError::TooManyFds)
        ));
    }

    #[test]
    fn a_header_that_no_message_has_ends_the_connection_before_anything_is_allocated() {
        let (mut peer, mut stream) = pair();
        peer.write_all(&message(1, LONGEST + 1, b"")).unwrap();
        assert!(matches!(
            stream.advance().unwrap_err(),
            StreamError::Malformed(TooLong(_))
        ));
        assert_eq!(stream.payload.capacity(), 0);
    }

    #[test]
    fn room_is_made_only_for_bytes_that_come() {
        let (mut peer, mut stream) = pair();
        peer.write_all(&message(1, LONGEST, b"")).unwrap();
        assert!(matches!(stream.advance().unwrap(), Progress::Idle));
        assert!(stream.payload.capacity() <= GROW);
    }

    #[test]
    fn a_hang_up_in_mid_message_is_told_from_one_between() {
        for bytes in [&message(1, 8, b"1")[..], &[1, 0, 0]] {
            let (mut peer, mut stream) = pair();
            peer.write_all(bytes).unwrap();
            drop(peer);
            assert!(matches!(stream.advance().unwrap_err(), StreamError::Truncated));
        }
    }

    #[test]
    fn sending_to_who_does_not_read_ends_with_the_server() {
        let (_peer, stream) = pair();
        let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        signal(&stop);
        let much = vec![0; 8 << 20];
        assert!(matches!(
            stream.send(&much, None, stop.as_fd()).unwrap_err(),
            StreamError::Stopped
        ));
    }

    proptest! {
        #[test]
        fn hostile_bytes_end_in_a_message_an_error_or_silence(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let (mut peer, mut stream) = pair();
            peer.write_all(&bytes).unwrap();
            drop(peer);
            // Each step consumes at least a header: the loop is bounded by the input.
            for _ in 0..=bytes.len() / size_of::<PlainHeader>() + 1 {
                match stream.advance() {
                    Ok(Progress::Message(_)) => {}
                    Ok(Progress::Idle) => prop_assert!(false, "idle on a closed socket"),
                    Ok(Progress::Closed) | Err(_) => return Ok(()),
                }
            }
            prop_assert!(false, "more messages than bytes");
        }
    }
}
