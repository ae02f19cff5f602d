//! The vhost-user socket: typed messages for a client that behaves, and raw ones for tests that do not.
//!
//! Written from the vhost-user protocol text (QEMU, docs/interop/vhost-user), front-end side.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg,
    socket_with,
};

use super::error::ClientError;
use super::memory::SharedMemory;
use super::wait::wait_for;

/// Request numbers of front-end messages.
#[expect(missing_docs, reason = "names of the protocol text")]
pub mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// Protocol feature bits (not virtio features).
#[expect(missing_docs, reason = "names of the protocol text")]
pub mod protocol_feature {
    pub const MQ: u64 = 1 << 0;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

/// Version bits of the flags word.
pub const VERSION: u32 = 1;
/// Flag of a reply.
pub const REPLY: u32 = 1 << 2;
/// Flag that asks for an acknowledgement.
pub const NEED_REPLY: u32 = 1 << 3;

/// Longest payload that is accepted from a server.
const MAX_PAYLOAD: usize = 64 << 10;
const MAX_FDS: usize = 32;

/// A message received.
#[derive(Debug)]
pub struct Message {
    /// Request number.
    pub code: u32,
    /// Flags word, version included.
    pub flags: u32,
    /// Payload bytes.
    pub payload: Vec<u8>,
    /// File descriptors that came along.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The payload as one integer, if it has the size of one.
    pub fn as_u64(&self) -> Option<u64> {
        Some(u64::from_le_bytes(self.payload.as_slice().try_into().ok()?))
    }
}

/// A connected vhost-user socket. All that waits gives up after [`Channel::patience`].
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    patience: Duration,
    reply_ack: bool,
}

impl Channel {
    /// Connects to `path`, and while nobody listens there yet, or the backlog is full, tries again
    /// until `patience` is over.
    ///
    /// # Errors
    /// The last connection error once time is over.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self, ClientError> {
        let deadline = Instant::now() + patience;
        let address = SocketAddrUnix::new(path)?;
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            match connect(&socket, &address) {
                Ok(()) => {
                    return Ok(Channel {
                        socket,
                        patience,
                        reply_ack: false,
                    });
                }
                Err(Errno::AGAIN | Errno::NOENT | Errno::CONNREFUSED) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Wraps a socket that is connected already, for either side of the protocol.
    ///
    /// # Errors
    /// If it cannot be made non-blocking.
    pub fn from_socket(socket: OwnedFd, patience: Duration) -> Result<Self, ClientError> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Channel {
            socket,
            patience,
            reply_ack: false,
        })
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// How long to wait for the other side.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Says that REPLY_ACK was negotiated: [`Channel::tell`] asks for acknowledgements from now on.
    pub fn set_reply_ack(&mut self, on: bool) {
        self.reply_ack = on;
    }

    /// Sends bytes as they are, with file descriptors attached to the first.
    ///
    /// # Errors
    /// Timeout, or the socket's error.
    pub fn send_bytes(&self, mut bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        let deadline = Instant::now() + self.patience;
        let mut fds = fds;
        while !bytes.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(ClientError::Protocol(format!(
                    "{} file descriptors are too many",
                    fds.len()
                )));
            }
            match sendmsg(
                &self.socket,
                &[IoSlice::new(bytes)],
                &mut control,
                SendFlags::NOSIGNAL,
            ) {
                Ok(sent) => {
                    bytes = &bytes[sent..];
                    fds = &[];
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !wait_for(self.socket.as_fd(), PollFlags::OUT, deadline)? {
                        return Err(ClientError::Timeout("room in the socket"));
                    }
                }
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ClientError::Closed("sending")),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Sends one message with a right header.
    ///
    /// # Errors
    /// As [`Channel::send_bytes`].
    pub fn send(
        &self,
        code: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        self.send_bytes(
            &message_bytes(code, VERSION | flags, payload.len() as u32, payload),
            fds,
        )
    }

    /// Receives one message.
    ///
    /// # Errors
    /// `Closed` if the other side hung up between or within messages, `Timeout`, `Protocol` when
    /// the payload is longer than any message.
    pub fn receive(&self) -> Result<Message, ClientError> {
        let deadline = Instant::now() + self.patience;
        let mut fds = Vec::new();
        let mut header = [0; 12];
        self.fill(&mut header, &mut fds, deadline)?;
        let word = |i: usize| u32::from_le_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
        let (code, flags, size) = (word(0), word(4), word(8) as usize);
        if size > MAX_PAYLOAD {
            return Err(ClientError::Protocol(format!(
                "message {code} with a payload of {size} bytes"
            )));
        }
        let mut payload = vec![0; size];
        self.fill(&mut payload, &mut fds, deadline)?;
        Ok(Message {
            code,
            flags,
            payload,
            fds,
        })
    }

    /// Receives the reply to message `code`.
    ///
    /// # Errors
    /// As [`Channel::receive`], and `Protocol` if it is anything else.
    pub fn receive_reply(&self, code: u32) -> Result<Message, ClientError> {
        let reply = self.receive()?;
        if reply.code != code || reply.flags != VERSION | REPLY {
            let Message { code: got, flags, .. } = reply;
            return Err(ClientError::Protocol(format!(
                "expected a reply to {code}, got message {got} with flags {flags:#x}"
            )));
        }
        Ok(reply)
    }

    /// Waits until the other side has closed the connection, dropping what it still says.
    ///
    /// # Errors
    /// `Timeout` if it does not.
    pub fn wait_closed(&self) -> Result<(), ClientError> {
        let deadline = Instant::now() + self.patience;
        let mut byte = [0; 256];
        loop {
            match self.fill(&mut byte, &mut Vec::new(), deadline) {
                Ok(()) => {}
                Err(ClientError::Closed(_)) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends a message that has no reply of its own; waits for the acknowledgement if there are any.
    ///
    /// # Errors
    /// `Refused` with a negative acknowledgement, else as send and receive.
    pub fn tell(
        &self,
        name: &'static str,
        code: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        if !self.reply_ack {
            return self.send(code, 0, payload, fds);
        }
        self.send(code, NEED_REPLY, payload, fds)?;
        match self.receive_reply(code)?.as_u64() {
            Some(0) => Ok(()),
            Some(value) => Err(ClientError::Refused { message: name, value }),
            None => Err(ClientError::Protocol(format!(
                "acknowledgement of {name} is not a u64"
            ))),
        }
    }

    /// Sends a message with one integer.
    ///
    /// # Errors
    /// As [`Channel::tell`].
    pub fn tell_u64(&self, name: &'static str, code: u32, value: u64) -> Result<(), ClientError> {
        self.tell(name, code, &value.to_le_bytes(), &[])
    }

    /// Sends a message with a queue index and a number.
    ///
    /// # Errors
    /// As [`Channel::tell`].
    pub fn tell_vring(&self, name: &'static str, code: u32, index: u32, num: u32) -> Result<(), ClientError> {
        self.tell(name, code, &vring_state(index, num), &[])
    }

    /// Asks for one integer.
    ///
    /// # Errors
    /// As send and receive, and `Protocol` if the reply is of another size.
    pub fn ask_u64(&self, code: u32) -> Result<u64, ClientError> {
        self.send(code, 0, &[], &[])?;
        self.receive_reply(code)?
            .as_u64()
            .ok_or_else(|| ClientError::Protocol(format!("reply to {code} is not a u64")))
    }

    /// Reads `len` bytes of configuration space from `offset`.
    ///
    /// # Errors
    /// `Protocol` if the server answers with another range (an empty payload is its error).
    pub fn get_config(&self, offset: u32, len: u32) -> Result<Vec<u8>, ClientError> {
        let payload = config_payload(offset, 0, &vec![0; len as usize]);
        self.send(code::GET_CONFIG, 0, &payload, &[])?;
        let mut reply = self.receive_reply(code::GET_CONFIG)?.payload;
        if reply.len() != payload.len() || reply[..8] != payload[..8] {
            return Err(ClientError::Protocol(format!(
                "GET_CONFIG of {len} bytes at {offset} answered by {} bytes",
                reply.len()
            )));
        }
        Ok(reply.split_off(12))
    }

    /// Writes configuration space.
    ///
    /// # Errors
    /// As [`Channel::tell`].
    pub fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<(), ClientError> {
        self.tell(
            "SET_CONFIG",
            code::SET_CONFIG,
            &config_payload(offset, 0, bytes),
            &[],
        )
    }

    /// Hands over all regions of `memory`.
    ///
    /// # Errors
    /// As [`Channel::tell`].
    pub fn set_mem_table(&self, memory: &SharedMemory) -> Result<(), ClientError> {
        let mut payload = Vec::new();
        payload.extend((memory.regions().len() as u64).to_le_bytes());
        for region in memory.regions() {
            payload.extend(memory_region(
                region.guest(),
                region.len() as u64,
                region.user(),
                0,
            ));
        }
        let fds: Vec<_> = memory.regions().iter().map(|r| r.fd()).collect();
        self.tell("SET_MEM_TABLE", code::SET_MEM_TABLE, &payload, &fds)
    }

    /// Stops queue `index` and returns the avail index at which it stopped.
    ///
    /// # Errors
    /// As send and receive.
    pub fn get_vring_base(&self, index: u32) -> Result<u32, ClientError> {
        self.send(code::GET_VRING_BASE, 0, &vring_state(index, 0), &[])?;
        let value = self
            .receive_reply(code::GET_VRING_BASE)?
            .as_u64()
            .ok_or_else(|| ClientError::Protocol("reply to GET_VRING_BASE has another size".into()))?;
        if value as u32 != index {
            return Err(ClientError::Protocol(format!(
                "GET_VRING_BASE of {index} answered for {}",
                value as u32
            )));
        }
        Ok((value >> 32) as u32)
    }

    fn fill(
        &self,
        mut into: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        deadline: Instant,
    ) -> Result<(), ClientError> {
        while !into.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut slices = [IoSliceMut::new(into)];
            match recvmsg(&self.socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(message) if message.bytes == 0 => return Err(ClientError::Closed("receiving")),
                Ok(message) => {
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(rights) = message {
                            fds.extend(rights);
                        }
                    }
                    into = &mut into[message.bytes..];
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !wait_for(self.socket.as_fd(), PollFlags::IN, deadline)? {
                        return Err(ClientError::Timeout("a vhost-user message"));
                    }
                }
                Err(Errno::CONNRESET) => return Err(ClientError::Closed("receiving")),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

/// A message's bytes with any header: `size` is what the header says, whatever the payload is.
pub fn message_bytes(code: u32, flags: u32, size: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(12 + payload.len());
    for word in [code, flags, size] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(payload);
    bytes
}

/// Payload of GET_CONFIG and SET_CONFIG.
pub fn config_payload(offset: u32, flags: u32, bytes: &[u8]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(12 + bytes.len());
    for word in [offset, bytes.len() as u32, flags] {
        payload.extend(word.to_le_bytes());
    }
    payload.extend(bytes);
    payload
}

/// One memory region as SET_MEM_TABLE and ADD_MEM_REG carry it.
pub fn memory_region(guest: u64, len: u64, user: u64, mmap_offset: u64) -> Vec<u8> {
    [guest, len, user, mmap_offset]
        .into_iter()
        .flat_map(u64::to_le_bytes)
        .collect()
}

/// Payload of the messages with a queue index and a number.
pub fn vring_state(index: u32, num: u32) -> [u8; 8] {
    (u64::from(index) | u64::from(num) << 32).to_le_bytes()
}

/// Payload of SET_VRING_ADDR; the three addresses are user addresses.
pub fn vring_addr(index: u32, flags: u32, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    let mut payload = vring_state(index, flags).to_vec();
    for address in [desc, used, avail, 0] {
        payload.extend(address.to_le_bytes());
    }
    payload
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn pair() -> (Channel, Channel) {
        let (a, b) = UnixStream::pair().unwrap();
        let patience = Duration::from_millis(200);
        (
            Channel::from_socket(a.into(), patience).unwrap(),
            Channel::from_socket(b.into(), patience).unwrap(),
        )
    }

    #[test]
    fn messages_arrive_whole_with_their_fds() {
        let (client, server) = pair();
        let file = tempfile::tempfile().unwrap();
        client
            .send(
                code::SET_VRING_KICK,
                NEED_REPLY,
                &7u64.to_le_bytes(),
                &[file.as_fd(), file.as_fd()],
            )
            .unwrap();
        client.send(code::SET_OWNER, 0, &[], &[]).unwrap();
        let first = server.receive().unwrap();
        assert_eq!((first.code, first.flags, first.as_u64()), (12, 9, Some(7)));
        assert_eq!(first.fds.len(), 2);
        let second = server.receive().unwrap();
        assert_eq!((second.code, second.payload.len(), second.fds.len()), (3, 0, 0));
    }

    #[test]
    fn a_negative_acknowledgement_is_an_error() {
        let (mut client, server) = pair();
        client.set_reply_ack(true);
        server
            .send(code::SET_FEATURES, REPLY, &22u64.to_le_bytes(), &[])
            .unwrap();
        let error = client
            .tell_u64("SET_FEATURES", code::SET_FEATURES, 1)
            .unwrap_err();
        assert!(
            matches!(
                error,
                ClientError::Refused {
                    message: "SET_FEATURES",
                    value: 22
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn silence_ends_in_a_timeout_and_hang_up_is_seen() {
        let (client, server) = pair();
        assert!(matches!(client.receive().unwrap_err(), ClientError::Timeout(_)));
        drop(server);
        client.wait_closed().unwrap();
    }

    #[test]
    fn an_endless_payload_is_refused_before_it_is_allocated() {
        let (client, server) = pair();
        server
            .send_bytes(&message_bytes(1, VERSION | REPLY, u32::MAX, &[]), &[])
            .unwrap();
        assert!(matches!(client.receive().unwrap_err(), ClientError::Protocol(_)));
    }
}
