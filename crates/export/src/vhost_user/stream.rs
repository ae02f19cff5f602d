//! Bytes and file descriptors of a vhost-user socket, put together to messages.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use zbdkit_io::unix::{MAX_FDS, ReceiveError, receive};

use super::message::{Malformed, RawMessage};
use super::wire::{HEADER_SIZE, Header, MAX_TABLE_REGIONS};

// A memory table has the most descriptors.
const _: () = assert!(MAX_TABLE_REGIONS == MAX_FDS);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// Header that no message can have.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// More file descriptors than any message has.
    #[error("a message carries more than {MAX_FDS} file descriptors")]
    TooManyFds,
    /// Hang-up in the middle.
    #[error("the front-end closed the connection in the middle of a message")]
    Truncated,
    /// The socket failed.
    #[error("vhost-user socket: {0}")]
    Io(#[from] io::Error),
    /// The daemon is shutting down.
    #[error("shutting down")]
    Stopped,
}

impl From<ReceiveError> for StreamError {
    fn from(error: ReceiveError) -> Self {
        match error {
            ReceiveError::TooManyFds => StreamError::TooManyFds,
            ReceiveError::Io(error) => StreamError::Io(error),
        }
    }
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
    /// The front-end is gone, between two messages.
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
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
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
            let Some(got) = receive(&self.socket, &mut self.header[self.header_len..], &mut self.fds)? else {
                return Ok(Progress::Idle);
            };
            if got == 0 {
                return if self.header_len == 0 {
                    Ok(Progress::Closed)
                } else {
                    Err(StreamError::Truncated)
                };
            }
            self.header_len += got;
            if self.header_len == HEADER_SIZE {
                let header = parse_header(&self.header)?;
                self.payload.clear();
                self.payload.resize(header.size as usize, 0);
                self.payload_len = 0;
            }
        }
        while self.payload_len < self.payload.len() {
            match receive(&self.socket, &mut self.payload[self.payload_len..], &mut self.fds)? {
                None => return Ok(Progress::Idle),
                Some(0) => return Err(StreamError::Truncated),
                Some(got) => self.payload_len += got,
            }
        }
        let header = parse_header(&self.header)?;
        self.header_len = 0;
        let payload = std::mem::take(&mut self.payload);
        self.payload_len = 0;
        Ok(Progress::Message(RawMessage {
            header,
            payload,
            fds: std::mem::take(&mut self.fds),
        }))
    }

    /// Sends a reply whole; waits while the front-end does not read, but not beyond `stop`.
    ///
    /// # Errors
    /// `Stopped`, or the socket's error.
    pub fn send(&self, mut bytes: &[u8], stop: BorrowedFd<'_>) -> Result<(), StreamError> {
        while !bytes.is_empty() {
            let mut control = SendAncillaryBuffer::default();
            match sendmsg(
                &self.socket,
                &[IoSlice::new(bytes)],
                &mut control,
                SendFlags::NOSIGNAL,
            ) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let mut fds = [
                        PollFd::new(&self.socket, PollFlags::OUT),
                        PollFd::from_borrowed_fd(stop, PollFlags::IN),
                    ];
                    match poll(&mut fds, None) {
                        Ok(_) if !fds[1].revents().is_empty() => return Err(StreamError::Stopped),
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(errno) => return Err(errno.into()),
                    }
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn parse_header(bytes: &[u8; HEADER_SIZE]) -> Result<Header, Malformed> {
    let header: Header = zerocopy::transmute!(*bytes);
    header.check()?;
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::message::Request;
    use proptest::prelude::*;
    use rustix::net::SendAncillaryMessage;
    use std::io::Write;
    use std::mem::MaybeUninit;
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, Stream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, Stream::new(theirs.into()).unwrap())
    }

    fn send_with_fds(socket: &UnixStream, bytes: &[u8], count: usize) {
        let file = std::fs::File::open("/dev/null").unwrap();
        let fds = vec![file.as_fd(); count];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
    }

    #[test]
    fn a_message_in_single_bytes_is_put_together() {
        let (mut peer, mut stream) = pair();
        let bytes = [2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
        for byte in bytes {
            assert!(matches!(stream.advance().unwrap(), Progress::Idle));
            peer.write_all(&[byte]).unwrap();
        }
        let Progress::Message(message) = stream.advance().unwrap() else {
            panic!("no message")
        };
        assert!(matches!(
            Request::parse(message).unwrap(),
            Request::SetFeatures(0x0807_0605_0403_0201)
        ));
        assert!(matches!(stream.advance().unwrap(), Progress::Idle));
        drop(peer);
        assert!(matches!(stream.advance().unwrap(), Progress::Closed));
    }

    #[test]
    fn file_descriptors_belong_to_their_message() {
        let (mut peer, mut stream) = pair();
        let mut kick = vec![12, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0];
        kick.extend([0; 8]);
        send_with_fds(&peer, &kick, 1);
        peer.write_all(&[3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        let Progress::Message(first) = stream.advance().unwrap() else {
            panic!("no message")
        };
        let Progress::Message(second) = stream.advance().unwrap() else {
            panic!("no message")
        };
        assert_eq!((first.fds.len(), second.fds.len()), (1, 0));
    }

    #[test]
    fn too_many_file_descriptors_end_the_connection() {
        let (peer, mut stream) = pair();
        send_with_fds(&peer, &[3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], 20);
        assert!(matches!(stream.advance().unwrap_err(), StreamError::TooManyFds));
    }

    #[test]
    fn a_hang_up_in_mid_message_is_told_from_one_between() {
        let (mut peer, mut stream) = pair();
        peer.write_all(&[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 1]).unwrap();
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
