//! A server over a namespace in memory, and a driver for its queues: the little of one that tests need.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use vfio_user::Client;
use zbdkit_block::{Graph, Host, OpenOptions, OsHost};
use zbdkit_export::nvme_pci::{ServeError, ServeOptions, Server, ServerHandle, Socket};
use zbdkit_io::{Runtime, RuntimeOptions};
use zbdkit_nvme::{Namespace, NamespaceOptions, Subsystem, SubsystemOptions};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::{AdminOpcode, StatusField};
use zbdkit_spec::nvme::command::{CompletionEntry, SubmissionEntry};
use zbdkit_spec::nvme::controller::{Cc, Csts, offset};
use zbdkit_spec::nvme::nvm::Opcode;
use zbdkit_spec::vfio_user::{irq_set, pci_irq, pci_region};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

pub const PAGE: u64 = 4096;
/// Entries of the queues of [`Driver::make_io_queues`] and of the admin queues.
pub const ENTRIES: u16 = 32;
/// Guest address of the memory.
const BASE: u64 = 0x1000_0000;
/// Where things are in it.
const ASQ: u64 = 0;
const ACQ: u64 = PAGE;
const SHADOW: u64 = 2 * PAGE;
const EVENT_INDEX: u64 = 3 * PAGE;
pub const CQ: u64 = 0x1_0000;
pub const SQ: u64 = 0x2_0000;
const LIST: u64 = 0x3_0000;
pub const DATA: u64 = 0x10_0000;
const SIZE: u64 = 0x40_0000;

const PATIENCE: Duration = Duration::from_secs(30);

pub struct Rig {
    dir: tempfile::TempDir,
    handle: ServerHandle,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Rig {
    pub fn new() -> Rig {
        Rig::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut ServeOptions)) -> Rig {
        let host: Arc<dyn Host> = Arc::new(OsHost);
        let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
        let graph = Graph::parse("driver=memory,size=8M").unwrap();
        let device = runtime
            .block_on(graph.open(&host, &OpenOptions::default()))
            .unwrap();
        drop(runtime);
        let names = SubsystemOptions {
            nqn: "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-0000-0000-000000000001".into(),
            serial: "1".into(),
            model: "zbdkit".into(),
            firmware: "1".into(),
        };
        let namespace = Namespace::new(device, &NamespaceOptions::default()).unwrap();
        let subsystem = Subsystem::new(names, vec![namespace]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut options = ServeOptions::new(Socket::Path(dir.path().join("s")));
        options.io_queues = 4;
        change(&mut options);
        let server = Server::bind(subsystem, options).unwrap();
        let handle = server.handle();
        let thread = Some(std::thread::spawn(move || server.run()));
        Rig { dir, handle, thread }
    }

    pub fn driver(&self) -> Driver {
        let mut client = Client::new(&self.dir.path().join("s")).unwrap();
        let memory = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memory, SIZE).unwrap();
        client.dma_map(0, BASE, SIZE, memory.as_raw_fd()).unwrap();
        Driver {
            client,
            memory,
            queues: HashMap::new(),
            shadow: false,
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.handle.shutdown();
        let thread = self.thread.take().expect("stopped once");
        let result = thread.join();
        if !std::thread::panicking() {
            result
                .expect("the server does not panic")
                .expect("the server ends well");
        }
    }
}

struct Queue {
    sq: u64,
    sq_entries: u32,
    tail: u32,
    rung: u32,
    cq: u64,
    cq_entries: u32,
    head: u32,
    phase: bool,
}

/// A submission queue entry to be.
#[derive(Clone, Copy, Debug)]
pub struct Entry(pub SubmissionEntry);

impl Entry {
    pub fn admin(opcode: AdminOpcode) -> Entry {
        let mut entry = SubmissionEntry::new_zeroed();
        entry.opcode = opcode.0;
        Entry(entry)
    }

    pub fn rw(opcode: Opcode, block: u64, blocks: u32) -> Entry {
        let mut entry = SubmissionEntry::new_zeroed();
        entry.opcode = opcode.0;
        entry.nsid.set(1);
        entry.cdw10.set(block as u32);
        entry.cdw11.set((block >> 32) as u32);
        entry.cdw12.set(blocks - 1);
        Entry(entry)
    }

    pub fn prps(mut self, (prp1, prp2): (u64, u64)) -> Entry {
        self.0.prp1.set(prp1);
        self.0.prp2.set(prp2);
        self
    }

    pub fn sgl(mut self, (low, high): (u64, u64)) -> Entry {
        self.0.flags = 1 << 6;
        self.prps((low, high))
    }

    pub fn cid(mut self, cid: u16) -> Entry {
        self.0.cid.set(cid);
        self
    }

    pub fn cdw10(mut self, value: u32) -> Entry {
        self.0.cdw10.set(value);
        self
    }
}

/// A completion.
#[derive(Debug)]
pub struct Done {
    pub cid: u16,
    pub status: Status,
    pub result: u64,
}

pub struct Driver {
    pub client: Client,
    memory: OwnedFd,
    queues: HashMap<u16, Queue>,
    shadow: bool,
}

impl Driver {
    pub fn read32(&mut self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.client.region_read(pci_region::BAR0, at, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }

    pub fn write32(&mut self, at: u64, value: u32) {
        self.client
            .region_write(pci_region::BAR0, at, &value.to_le_bytes())
            .unwrap();
    }

    /// Guest address of a place in memory.
    pub fn address(&self, at: u64) -> u64 {
        BASE + at
    }

    pub fn fill(&self, at: u64, bytes: &[u8]) {
        assert_eq!(rustix::io::pwrite(&self.memory, bytes, at), Ok(bytes.len()));
    }

    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert_eq!(rustix::io::pread(&self.memory, &mut bytes, at), Ok(len));
        bytes
    }

    fn get32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.get(at, 4).try_into().unwrap())
    }

    pub fn wait_csts(&mut self, f: impl Fn(Csts) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !f(Csts::from_bits(self.read32(offset::CSTS))) {
            assert!(
                Instant::now() < deadline,
                "CSTS is {:#x}",
                self.read32(offset::CSTS)
            );
            std::thread::yield_now();
        }
    }

    /// Enables the controller, with its admin submission queue at this address.
    pub fn start(&mut self, asq: u64) {
        self.fill(ASQ, &[0; 2 * PAGE as usize]);
        let entries = u32::from(ENTRIES) - 1;
        self.write32(offset::AQA, entries << 16 | entries);
        self.client
            .region_write(pci_region::BAR0, offset::ASQ, &asq.to_le_bytes())
            .unwrap();
        let acq = self.address(ACQ);
        self.client
            .region_write(pci_region::BAR0, offset::ACQ, &acq.to_le_bytes())
            .unwrap();
        let cc = Cc::new()
            .with_en(true)
            .with_css(0b110)
            .with_iosqes(6)
            .with_iocqes(4);
        self.write32(offset::CC, cc.into_bits());
    }

    pub fn enable(&mut self) {
        self.start(self.address(ASQ));
        self.wait_csts(|csts| csts.rdy());
        self.add_queue(0, ACQ, ENTRIES.into(), ASQ, ENTRIES.into());
    }

    pub fn disable(&mut self) {
        let cc = Cc::from_bits(self.read32(offset::CC)).with_en(false).with_shn(0);
        self.write32(offset::CC, cc.into_bits());
        self.wait_csts(|csts| !csts.rdy());
        self.forget_queues();
    }

    /// After a reset.
    pub fn forget_queues(&mut self) {
        self.queues.clear();
        self.shadow = false;
    }

    fn add_queue(&mut self, qid: u16, cq: u64, cq_entries: u32, sq: u64, sq_entries: u32) {
        let queue = Queue {
            sq,
            sq_entries,
            tail: 0,
            rung: 0,
            cq,
            cq_entries,
            head: 0,
            phase: true,
        };
        self.queues.insert(qid, queue);
    }

    /// Makes queue `qid` with [`ENTRIES`] entries, and its vector.
    pub fn make_io_queues(&mut self, qid: u16) {
        let offset = u64::from(qid - 1) * PAGE;
        self.make_queues(qid, CQ + offset, ENTRIES.into(), SQ + offset, ENTRIES.into());
    }

    pub fn make_queues(&mut self, qid: u16, cq: u64, cq_entries: u32, sq: u64, sq_entries: u32) {
        self.fill(cq, &[0; PAGE as usize]);
        let mut create = Entry::admin(AdminOpcode::CREATE_IO_CQ).prps((self.address(cq), 0));
        create.0.cdw10.set(u32::from(qid) | (cq_entries - 1) << 16);
        create.0.cdw11.set(3 | u32::from(qid) << 16);
        assert_eq!(self.admin(create), Status::SUCCESS);
        let mut create = Entry::admin(AdminOpcode::CREATE_IO_SQ).prps((self.address(sq), 0));
        create.0.cdw10.set(u32::from(qid) | (sq_entries - 1) << 16);
        create.0.cdw11.set(1 | u32::from(qid) << 16);
        assert_eq!(self.admin(create), Status::SUCCESS);
        self.add_queue(qid, cq, cq_entries, sq, sq_entries);
    }

    pub fn use_shadow_doorbells(&mut self) {
        let pages = (self.address(SHADOW), self.address(EVENT_INDEX));
        let config = Entry::admin(AdminOpcode::DOORBELL_BUFFER_CONFIG).prps(pages);
        assert_eq!(self.admin(config), Status::SUCCESS);
        self.shadow = true;
    }

    /// Puts an entry into a queue, without telling.
    pub fn put(&mut self, qid: u16, entry: Entry) {
        let queue = self.queues.get_mut(&qid).unwrap();
        let at = queue.sq + u64::from(queue.tail) * 64;
        queue.tail = (queue.tail + 1) % queue.sq_entries;
        self.fill(at, entry.0.as_bytes());
    }

    /// Tells the controller of the entries that were put.
    pub fn ring(&mut self, qid: u16) {
        let queue = self.queues.get_mut(&qid).unwrap();
        let (old, new) = (queue.rung, queue.tail);
        queue.rung = new;
        self.doorbell(2 * u64::from(qid), old, new);
    }

    fn doorbell(&mut self, index: u64, old: u32, new: u32) {
        if self.shadow && index > 1 {
            self.fill(SHADOW + index * 4, &new.to_le_bytes());
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            let event = self.get32(EVENT_INDEX + index * 4) as u16;
            // As Linux decides it: whether `event` was passed.
            let passed =
                (new as u16).wrapping_sub(event).wrapping_sub(1) < (new as u16).wrapping_sub(old as u16);
            if !passed {
                return;
            }
        }
        self.write32(offset::DOORBELLS + index * 4, new);
    }

    /// Waits for a completion and takes it.
    pub fn next(&mut self, qid: u16) -> Done {
        let queue = &self.queues[&qid];
        let (at, phase) = (queue.cq + u64::from(queue.head) * 16, queue.phase);
        let deadline = Instant::now() + PATIENCE;
        while (self.get32(at + 12) >> 16 & 1 == 1) != phase {
            assert!(Instant::now() < deadline, "no completion in queue {qid}");
            std::thread::yield_now();
        }
        let entry = CompletionEntry::read_from_bytes(&self.get(at, 16)).unwrap();
        assert_eq!(entry.sqid.get(), qid);
        let queue = self.queues.get_mut(&qid).unwrap();
        let old = queue.head;
        queue.head = (old + 1) % queue.cq_entries;
        queue.phase ^= queue.head == 0;
        let new = queue.head;
        self.doorbell(2 * u64::from(qid) + 1, old, new);
        let field = StatusField::from_bits(entry.status.get() >> 1);
        Done {
            cid: entry.cid.get(),
            status: field.status(),
            result: entry.result.get(),
        }
    }

    pub fn io(&mut self, qid: u16, entry: Entry) -> Status {
        self.put(qid, entry.cid(77));
        self.ring(qid);
        let done = self.next(qid);
        assert_eq!(done.cid, 77);
        done.status
    }

    pub fn admin(&mut self, entry: Entry) -> Status {
        self.io(0, entry)
    }

    /// PRPs for `len` bytes from a place in memory on, in pages that follow each other.
    pub fn prps(&self, at: u64, len: u64) -> (u64, u64) {
        let first = PAGE - at % PAGE;
        if len <= first {
            return (self.address(at), 0);
        }
        let rest: Vec<u64> = (at + first..at + len)
            .step_by(PAGE as usize)
            .map(|at| self.address(at))
            .collect();
        if let [one] = rest[..] {
            return (self.address(at), one);
        }
        assert!(rest.len() <= 512);
        let bytes: Vec<u8> = rest.iter().flat_map(|address| address.to_le_bytes()).collect();
        self.fill(LIST, &bytes);
        (self.address(at), self.address(LIST))
    }

    /// Takes the memory away.
    pub fn unmap(&mut self) {
        self.client.dma_unmap(BASE, SIZE).unwrap();
    }

    /// Sets eventfds for the first vectors.
    pub fn set_vectors(&mut self, count: u32) -> Vec<OwnedFd> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let events: Vec<_> = (0..count)
            .map(|_| rustix::event::eventfd(0, flags).unwrap())
            .collect();
        let fds: Vec<_> = events.iter().map(|event| event.as_raw_fd()).collect();
        let set = irq_set::DATA_EVENTFD | irq_set::ACTION_TRIGGER;
        self.client.set_irqs(pci_irq::MSIX, set, 0, count, &fds).unwrap();
        events
    }

    /// Where the PCI Express capability is in configuration space.
    pub fn express(&mut self) -> u64 {
        let mut at = [0];
        self.client
            .region_read(pci_region::CONFIG, 0x34, &mut at)
            .unwrap();
        loop {
            let mut header = [0; 2];
            self.client
                .region_read(pci_region::CONFIG, at[0].into(), &mut header)
                .unwrap();
            if header[0] == 0x10 {
                return at[0].into();
            }
            at[0] = header[1];
            assert_ne!(at[0], 0, "no PCI Express capability");
        }
    }
}

/// Waits until an eventfd is signalled.
pub fn wait(event: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(event, PollFlags::IN)];
    let timeout = Timespec::try_from(PATIENCE).unwrap();
    poll(&mut fds, Some(&timeout)).unwrap() == 1
}

/// Whether it is.
pub fn is_set(event: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(event, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).unwrap() == 1
}
