//! A client that sends whatever an input says, file descriptors included, at a server over a device that uses the client's
//! memory. What the server sends must be messages, the connection must end, and the next client must be served.

mod device;
pub mod steps;

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use device::Device;
use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use zbdkit_io::unix::Listener;
use zbdkit_spec::vfio_user::{DmaAccess, HEADER_SIZE, Header, command, flag};
use zbdkit_vfio_user::{ServeError, Server, ServerHandle};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of the files that come with messages.
const FILE: u64 = 64 << 10;
/// How long a connection may take to end.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest payload of one step.
const MOST: usize = 4096;

/// A running server, for any number of inputs.
pub struct Target {
    socket: PathBuf,
    handle: ServerHandle,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
    files: [OwnedFd; 2],
}

impl Target {
    /// A server whose socket is in this directory.
    pub fn new(directory: &std::path::Path) -> Target {
        let socket = directory.join("s");
        let listener = Listener::bind(&socket).expect("the socket is free");
        let server = Server::new(listener).expect("file descriptors");
        let server = server.release_within(Duration::from_millis(5));
        let handle = server.handle();
        let thread = std::thread::spawn(move || server.run(&mut Device::new(), |_| {}));
        let memory = rustix::fs::memfd_create("client", MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&memory, FILE).expect("memory");
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Target {
            socket,
            handle,
            thread: Some(thread),
            files: [memory, event.expect("an eventfd")],
        }
    }

    /// Plays an input, and then a client that must be served.
    pub fn play(&self, input: &[u8]) {
        let mut client = self.connect();
        let mut input = Input(input);
        // Most inputs would end at the lack of a VERSION.
        if input.byte().is_some_and(|first| first & 1 == 0) {
            client.send(&VERSION.concat(), &[]);
        }
        while let Some(step) = input.byte() {
            if !self.step(&mut client, step, &mut input) {
                break;
            }
        }
        client.end();
        self.must_work();
    }

    /// One step: whether the connection still stands.
    fn step(&self, client: &mut Client, step: u8, input: &mut Input<'_>) -> bool {
        let files = match step >> 5 {
            few @ 0..=3 => usize::from(few),
            // More than may come with one message.
            more => usize::from(more) * 3,
        };
        let which = usize::from(step >> 4 & 1);
        let fds = vec![self.files[which].as_fd(); files];
        match step & 0xf {
            // Bytes without form.
            0 => client.send(input.bytes(), &fds),
            // An answer to what the server asked first, of the right kind or not.
            1..=3 => {
                let Some(asked) = client.asked.pop_front() else {
                    return client.drain();
                };
                let error = u32::from(input.byte().unwrap_or(0) & 0x7);
                let mut payload = asked.payload;
                payload.extend(input.bytes());
                if step & 0xf == 1 {
                    payload.resize(16 + asked.count, 0x5a);
                }
                let flags = flag::REPLY | if error == 0 { 0 } else { flag::ERROR };
                client.send(&message(asked.id, asked.command, flags, error, &payload), &fds)
            }
            // A command with a header that is right.
            _ => {
                let command = u16::from(input.byte().unwrap_or(0) % 18);
                let flags = match input.byte().unwrap_or(0) {
                    0 => flag::NO_REPLY,
                    1 => flag::REPLY,
                    flags @ 2..8 => u32::from(flags),
                    _ => flag::COMMAND,
                };
                client.send(&message(9, command, flags, 0, input.bytes()), &fds)
            }
        }
    }

    fn connect(&self) -> Client {
        let socket = UnixStream::connect(&self.socket).expect("the server listens");
        socket.set_nonblocking(true).expect("a socket");
        Client {
            socket,
            received: Vec::new(),
            replies: Vec::new(),
            asked: VecDeque::new(),
        }
    }

    /// Whatever the client before did.
    pub fn must_work(&self) {
        let mut client = self.connect();
        assert!(client.send(&VERSION.concat(), &[]));
        assert!(client.send(
            &message(
                2,
                command::DEVICE_GET_INFO,
                flag::COMMAND,
                0,
                &[16, 0, 0, 0].repeat(4)
            ),
            &[]
        ));
        let deadline = Instant::now() + PATIENCE;
        while client.replies.len() < 2 {
            assert!(client.drain(), "the server closed a good connection");
            assert!(Instant::now() < deadline, "the server does not answer");
            std::thread::yield_now();
        }
        let errors = client.replies.iter().map(|header| header.error.get());
        assert!(errors.eq([0, 0]), "{:?}", client.replies);
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.handle.shutdown();
        let result = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            result
                .expect("ended once")
                .expect("the server does not panic")
                .expect("the server ends well");
        }
    }
}

/// A VERSION message.
const VERSION: [&[u8]; 2] = [
    &[1, 0, 1, 0, 70, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    b"{\"capabilities\":{\"max_data_xfer_size\":4096}}     \0",
];

fn message(id: u16, command: u16, flags: u32, error: u32, payload: &[u8]) -> Vec<u8> {
    let header = Header {
        message_id: id.into(),
        command: command.into(),
        message_size: ((HEADER_SIZE + payload.len()) as u32).into(),
        flags: flags.into(),
        error: error.into(),
    };
    [header.as_bytes(), payload].concat()
}

/// What is left of an input.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// A length, and so many bytes.
    fn bytes(&mut self) -> &'a [u8] {
        let len = match self.byte() {
            None => 0,
            // Few are longer.
            Some(0xff) => MOST,
            Some(len) => len.into(),
        };
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes
    }
}

/// What the server asks of its client.
struct Asked {
    id: u16,
    command: u16,
    payload: Vec<u8>,
    count: usize,
}

struct Client {
    socket: UnixStream,
    received: Vec<u8>,
    replies: Vec<Header>,
    asked: VecDeque<Asked>,
}

impl Client {
    /// Sends bytes; false once the server has closed the connection.
    fn send(&mut self, mut bytes: &[u8], mut fds: &[BorrowedFd<'_>]) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while !bytes.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
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
                Err(Errno::AGAIN) => {
                    assert!(Instant::now() < deadline, "the server takes nothing");
                    std::thread::yield_now();
                }
                Err(_) => return false,
            }
            if !self.drain() {
                return false;
            }
        }
        true
    }

    /// Takes what the server has sent; false once it has closed the connection.
    fn drain(&mut self) -> bool {
        let mut bytes = [0; 4096];
        loop {
            match self.socket.read(&mut bytes) {
                Ok(0) => return false,
                Ok(got) => self.received.extend(&bytes[..got]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
                    return false;
                }
            }
        }
        self.parse();
        true
    }

    /// What the server sends are messages.
    fn parse(&mut self) {
        while let Ok((header, _)) = Header::read_from_prefix(&self.received) {
            let size = header.message_size.get() as usize;
            assert!((HEADER_SIZE..2 << 20).contains(&size), "{header:?}");
            if self.received.len() < size {
                return;
            }
            let rest = self.received.split_off(size);
            let payload = std::mem::replace(&mut self.received, rest).split_off(HEADER_SIZE);
            match header.flags.get() {
                flag::COMMAND => self.ask(&header, payload),
                flag::REPLY => {
                    assert_eq!(header.error.get(), 0, "{header:?}");
                    self.replies.push(header);
                }
                flags => {
                    assert_eq!(flags, flag::REPLY | flag::ERROR, "{header:?}");
                    assert!(header.error.get() != 0 && payload.is_empty(), "{header:?}");
                    self.replies.push(header);
                }
            }
        }
    }

    fn ask(&mut self, header: &Header, payload: Vec<u8>) {
        let command = header.command.get();
        assert!(
            matches!(command, command::DMA_READ | command::DMA_WRITE),
            "{header:?}"
        );
        let (wire, data) = DmaAccess::read_from_prefix(&payload).expect("an access");
        let count = usize::try_from(wire.count.get()).expect("a length");
        assert!((1..=4096).contains(&count), "the client's limit");
        let expected = if command == command::DMA_WRITE { count } else { 0 };
        assert_eq!(data.len(), expected);
        self.asked.push_back(Asked {
            id: header.message_id.get(),
            command,
            payload: wire.as_bytes().to_vec(),
            count: if command == command::DMA_READ { count } else { 0 },
        });
    }

    /// Hangs up, and waits until the server has done so, too.
    fn end(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Write);
        let deadline = Instant::now() + PATIENCE;
        while self.drain() {
            assert!(
                Instant::now() < deadline,
                "the server does not end the connection"
            );
            std::thread::yield_now();
        }
    }
}
