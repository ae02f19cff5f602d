//! A server over a toy device on a thread of its own, and a client of raw bytes.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::future::{Future, poll_fn};
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use zbdkit_io::unix::Listener;
use zbdkit_io::{Runtime, RuntimeOptions};
use zbdkit_spec::vfio_user::{DmaMap, DmaUnmap, HEADER_SIZE, Header, IrqSet, RegionAccess, command, flag};
use zbdkit_vfio_user::{
    Device, Heard, IrqKind, Line, Link, Mmap, PostedWrite, Region, ServeError, Server, ServerHandle, Stuck,
};
use zerocopy::{FromBytes, IntoBytes};

/// A region that is memory.
pub const BAR0: u32 = 0;
/// A region whose first page can be mapped.
pub const MAPPABLE: u32 = 1;
/// A region that refuses with EPERM.
pub const FORBIDDEN: u32 = 2;
/// Bytes of a region.
pub const SIZE: u64 = 0x4000;

/// What happened to the device.
#[derive(Default)]
pub struct Seen {
    pub link: Option<Link>,
    pub resets: usize,
    pub fatal: bool,
    pub disconnects: usize,
    pub refused: Vec<String>,
    pub closed: Vec<String>,
    /// Writes that a thread of the device took from a line.
    pub taken: usize,
}

pub struct Toy {
    regions: Vec<Region>,
    irqs: Vec<IrqKind>,
    memory: Arc<Mutex<Vec<u8>>>,
    seen: Arc<Mutex<Seen>>,
    /// A thread of it waits at the socket whenever it may.
    waits: bool,
}

impl Toy {
    fn new(seen: Arc<Mutex<Seen>>, waits: bool) -> Toy {
        let plain = Region {
            size: SIZE,
            readable: true,
            writable: true,
            mmap: None,
        };
        let mut regions = vec![plain; 9];
        regions[MAPPABLE as usize].mmap = Some(Mmap {
            fd: Arc::new(memfd(2 * SIZE)),
            offset: SIZE,
            areas: vec![0..4096, 8192..12288],
        });
        let mut irqs = vec![
            IrqKind {
                count: 8,
                ..IrqKind::default()
            };
            5
        ];
        irqs[0].maskable = true;
        Toy {
            regions,
            irqs,
            memory: Arc::new(Mutex::new(vec![0; SIZE as usize])),
            seen,
            waits,
        }
    }
}

impl Device for Toy {
    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn irqs(&self) -> &[IrqKind] {
        &self.irqs
    }

    fn connected(&mut self, link: Link) -> Result<(), Stuck> {
        self.seen.lock().unwrap().link = Some(link);
        Ok(())
    }

    fn region_read(&mut self, region: u32, offset: u64, out: &mut [u8]) -> Result<(), Errno> {
        if region == FORBIDDEN {
            return Err(Errno::PERM);
        }
        out.copy_from_slice(&self.memory.lock().unwrap()[offset as usize..][..out.len()]);
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        if region == FORBIDDEN {
            return Err(Errno::PERM);
        }
        self.memory.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn wants_line(&self) -> bool {
        self.waits
    }

    fn take_line(&mut self, line: Line) {
        let (memory, seen) = (self.memory.clone(), self.seen.clone());
        std::thread::spawn(move || {
            Runtime::new(RuntimeOptions::default())
                .unwrap()
                .block_on(wait_at(line, memory, seen))
        });
    }

    fn reset(&mut self) -> Result<(), Stuck> {
        self.memory.lock().unwrap().fill(0);
        self.seen.lock().unwrap().resets += 1;
        Ok(())
    }

    fn fatal(&mut self) {
        self.seen.lock().unwrap().fatal = true;
    }

    fn disconnected(&mut self) -> Result<(), Stuck> {
        let mut seen = self.seen.lock().unwrap();
        seen.link = None;
        seen.disconnects += 1;
        Ok(())
    }
}

/// Takes dwords that are written to BAR0.
async fn wait_at(mut line: Line, memory: Arc<Mutex<Vec<u8>>>, seen: Arc<Mutex<Seen>>) {
    let takes = |write: PostedWrite| {
        let is_dword = write.region == BAR0
            && write.data().len() == 4
            && write.offset <= SIZE - 4
            && write.offset.is_multiple_of(4);
        is_dword.then_some(write)
    };
    loop {
        let is_recalled = {
            let mut readable = pin!(zbdkit_io::readable(line.as_fd()));
            poll_fn(|cx| match line.is_recalled(cx) {
                true => Poll::Ready(true),
                false => readable.as_mut().poll(cx).map(|_| false),
            })
            .await
        };
        match is_recalled {
            true => return,
            false => match line.listen(takes) {
                Heard::Nothing => {}
                Heard::Else => return,
                Heard::Write(write) => {
                    memory.lock().unwrap()[write.offset as usize..][..4].copy_from_slice(write.data());
                    seen.lock().unwrap().taken += 1;
                }
            },
        }
    }
}

/// A running server. Shut down, and checked to end well, when dropped.
pub struct Rig {
    dir: tempfile::TempDir,
    handle: ServerHandle,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
    pub seen: Arc<Mutex<Seen>>,
}

impl Rig {
    pub fn new() -> Rig {
        Rig::with(Duration::from_secs(20))
    }

    pub fn with(release_within: Duration) -> Rig {
        Rig::of(release_within, false)
    }

    /// A thread of the device waits at the socket whenever it may.
    pub fn waiting() -> Rig {
        Rig::of(Duration::from_secs(20), true)
    }

    fn of(release_within: Duration, waits: bool) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&dir.path().join("s")).unwrap();
        let server = Server::new(listener).unwrap().release_within(release_within);
        let handle = server.handle();
        let seen = Arc::<Mutex<Seen>>::default();
        let theirs = seen.clone();
        let thread = std::thread::spawn(move || {
            let mut toy = Toy::new(theirs.clone(), waits);
            server.run(&mut toy, |event| match event {
                zbdkit_vfio_user::Event::Refused(refused) => {
                    theirs.lock().unwrap().refused.push(refused.to_string());
                }
                zbdkit_vfio_user::Event::Closed(error) => {
                    theirs.lock().unwrap().closed.push(error.to_string());
                }
                _ => {}
            })
        });
        Rig {
            dir,
            handle,
            thread: Some(thread),
            seen,
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// A client of raw bytes that has not said anything yet.
    pub fn connect(&self) -> Raw {
        let socket = UnixStream::connect(self.socket()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Raw { socket, next_id: 2 }
    }

    /// A client that speaks as QEMU does, after VERSION.
    pub fn qemu(&self) -> Raw {
        let mut raw = self.connect();
        raw.send(
            1,
            command::VERSION,
            flag::COMMAND,
            &version(QEMU_CAPABILITIES),
            &[],
        );
        let (header, payload) = raw.receive();
        assert_eq!((header.message_id.get(), header.flags.get()), (1, flag::REPLY));
        assert_eq!(payload.last(), Some(&0));
        raw
    }

    /// What the device works with.
    pub fn link(&self) -> Link {
        self.seen.lock().unwrap().link.clone().expect("connected")
    }

    pub fn stop(&mut self) -> Result<(), ServeError> {
        self.handle.shutdown();
        let thread = self.thread.take().expect("stopped once");
        thread.join().expect("the server does not panic")
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if self.thread.is_some() && !std::thread::panicking() {
            self.stop().expect("the server ends well");
            assert!(!self.socket().exists(), "the socket is removed");
        }
    }
}

pub const QEMU_CAPABILITIES: &str = r#"{"capabilities": {"migration": {"max_bitmap_size": 268435456, "pgsize": 4096},
    "max_msg_fds": 16, "max_data_xfer_size": 1048576, "pgsizes": 4096, "max_dma_maps": 65535, "write_multiple": true}}"#;

/// The payload of a VERSION command.
pub fn version(text: &str) -> Vec<u8> {
    let mut payload = vec![0; 4];
    payload.extend(text.bytes());
    payload.push(0);
    payload
}

/// A client that sends just the bytes it is told to.
pub struct Raw {
    pub socket: UnixStream,
    next_id: u16,
}

impl Raw {
    pub fn send(&mut self, id: u16, command: u16, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let header = Header {
            message_id: id.into(),
            command: command.into(),
            message_size: ((HEADER_SIZE + payload.len()) as u32).into(),
            flags: flags.into(),
            error: 0.into(),
        };
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend(payload);
        self.send_bytes(&bytes, fds);
    }

    pub fn send_bytes(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let slice = [IoSlice::new(bytes)];
        let sent = sendmsg(&self.socket, &slice, &mut control, SendFlags::NOSIGNAL).unwrap();
        self.socket.write_all(&bytes[sent..]).unwrap();
    }

    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut header = [0; HEADER_SIZE];
        self.socket.read_exact(&mut header).unwrap();
        let header = Header::read_from_bytes(&header).unwrap();
        let mut payload = vec![0; header.message_size.get() as usize - HEADER_SIZE];
        self.socket.read_exact(&mut payload).unwrap();
        (header, payload)
    }

    /// Sends a command and takes its reply: the errno of an error, or the payload.
    pub fn call(&mut self, command: u16, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Vec<u8>, u32> {
        let id = self.next_id;
        self.next_id += 1;
        self.send(id, command, flag::COMMAND, payload, fds);
        let (header, payload) = self.receive();
        assert_eq!((header.message_id.get(), header.command.get()), (id, command));
        match header.flags.get() {
            flag::REPLY => {
                assert_eq!(header.error.get(), 0);
                Ok(payload)
            }
            flags => {
                assert_eq!(flags, flag::REPLY | flag::ERROR);
                assert!(payload.is_empty() && header.error.get() != 0);
                Err(header.error.get())
            }
        }
    }

    pub fn read(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, u32> {
        let reply = self.call(
            command::REGION_READ,
            access(region, offset, count).as_bytes(),
            &[],
        )?;
        assert_eq!(reply.len(), 16 + count as usize);
        Ok(reply[16..].to_vec())
    }

    pub fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<Vec<u8>, u32> {
        let mut payload = access(region, offset, data.len() as u32).as_bytes().to_vec();
        payload.extend(data);
        self.call(command::REGION_WRITE, &payload, &[])
    }

    /// Writes without asking for an answer, as QEMU does.
    pub fn post(&mut self, region: u32, offset: u64, data: &[u8]) {
        let payload = [access(region, offset, data.len() as u32).as_bytes(), data].concat();
        let flags = flag::COMMAND | flag::NO_REPLY;
        self.send(0, command::REGION_WRITE, flags, &payload, &[]);
    }

    pub fn map(&mut self, address: u64, size: u64, fd: Option<&OwnedFd>) -> Result<Vec<u8>, u32> {
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
        self.call(command::DMA_MAP, dma_map(address, size, 3).as_bytes(), &fds)
    }

    pub fn unmap(&mut self, address: u64, size: u64) -> Result<Vec<u8>, u32> {
        self.call(command::DMA_UNMAP, dma_unmap(0, address, size).as_bytes(), &[])
    }

    pub fn set_irqs(
        &mut self,
        flags: u32,
        index: u32,
        start: u32,
        count: u32,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, u32> {
        self.call(
            command::DEVICE_SET_IRQS,
            irq_set(flags, index, start, count).as_bytes(),
            fds,
        )
    }

    /// Whether the server has closed the connection, once everything that it sent was read.
    pub fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.socket.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

pub fn access(region: u32, offset: u64, count: u32) -> RegionAccess {
    RegionAccess {
        offset: offset.into(),
        region: region.into(),
        count: count.into(),
    }
}

pub fn dma_map(address: u64, size: u64, flags: u32) -> DmaMap {
    DmaMap {
        argsz: 32.into(),
        flags: flags.into(),
        offset: 0.into(),
        address: address.into(),
        size: size.into(),
    }
}

pub fn dma_unmap(flags: u32, address: u64, size: u64) -> DmaUnmap {
    DmaUnmap {
        argsz: 24.into(),
        flags: flags.into(),
        address: address.into(),
        size: size.into(),
    }
}

pub fn irq_set(flags: u32, index: u32, start: u32, count: u32) -> IrqSet {
    IrqSet {
        argsz: 20.into(),
        flags: flags.into(),
        index: index.into(),
        start: start.into(),
        count: count.into(),
    }
}

pub fn memfd(size: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("client", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, size).unwrap();
    fd
}

pub fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// How often an eventfd was signalled since the last time.
pub fn count(eventfd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(eventfd, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(errno) => {
            assert_eq!(errno, Errno::AGAIN);
            0
        }
    }
}
