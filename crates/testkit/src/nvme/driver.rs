//! Registers, queues and doorbells.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use vfio_user::Client;
use zbdkit_io::SharedDwords;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::admin::{CreateCqCdw11, CreateQueueCdw10, CreateSqCdw11};
use zbdkit_spec::nvme::base::AdminOpcode;
use zbdkit_spec::nvme::command::{COMPLETION_ENTRY_BYTES, CompletionEntry, SUBMISSION_ENTRY_BYTES};
use zbdkit_spec::nvme::controller::{CSS_ALL, Cc, Csts, offset};
use zbdkit_spec::vfio_user::{irq_set, pci_irq, pci_region};
use zerocopy::{FromBytes, IntoBytes};

use super::PAGE;
use super::entry::{Done, Entry};
use crate::client::memory::{RegionSpec, SharedMemory, Window};

/// Entries of the admin queues.
pub const ADMIN_ENTRIES: u16 = 32;

/// Guest address of the memory.
const BASE: u64 = 0x1000_0000;
/// Where things are in it.
const ASQ: u64 = 0;
const ACQ: u64 = PAGE;
const SHADOW: u64 = 2 * PAGE;
const EVENT_INDEX: u64 = 3 * PAGE;
const LIST: u64 = 4 * PAGE;
/// From here on there are queues, then data.
const QUEUES: u64 = 16 * PAGE;

/// How to drive a controller.
#[derive(Clone, Copy, Debug)]
pub struct DriverOptions {
    /// Entries of the I/O queues of [`Driver::make_io_queues`], at most 64.
    pub entries: u16,
    /// I/O queues that there is room for.
    pub queues: u16,
    /// Bytes for data, a multiple of the page size.
    pub data: u64,
    /// How long to wait for anything.
    pub patience: Duration,
}

impl Default for DriverOptions {
    fn default() -> DriverOptions {
        DriverOptions {
            entries: 32,
            queues: 16,
            data: 3 << 20,
            patience: Duration::from_secs(30),
        }
    }
}

struct Queue {
    sq: Window,
    sq_entries: u32,
    tail: u32,
    rung: u32,
    cq: Window,
    cq_entries: u32,
    head: u32,
    phase: bool,
}

impl Queue {
    /// The completion that the controller has written, if it has.
    fn completed(&self) -> Option<CompletionEntry> {
        let at = self.head as usize * COMPLETION_ENTRY_BYTES;
        let last = self.cq.load_u32(at + 12, Ordering::Acquire);
        if (last >> 16 & 1 == 1) != self.phase {
            return None;
        }
        let mut bytes = [0; COMPLETION_ENTRY_BYTES];
        self.cq.read(at, &mut bytes);
        CompletionEntry::read_from_bytes(&bytes).ok()
    }
}

/// A driver of one controller.
pub struct Driver {
    /// The vfio-user client.
    pub client: Client,
    options: DriverOptions,
    memory: Window,
    queues: HashMap<u16, Queue>,
    shadow: bool,
    /// The doorbells, where they are mapped, as dwords of the file that holds BAR0.
    mapped: Option<(SharedDwords, usize)>,
}

impl Driver {
    /// Connects to a server, and shares memory with it.
    pub fn connect(socket: &Path, options: DriverOptions) -> Driver {
        let mut client = Client::new(socket).expect("the server takes the client");
        let len = QUEUES + 2 * PAGE * u64::from(options.queues) + options.data;
        let spec = RegionSpec {
            guest: Some(BASE),
            len: len as usize,
        };
        let memory = SharedMemory::new(&[spec]).expect("memory");
        let fd = memory.regions()[0].fd().as_raw_fd();
        client
            .dma_map(0, BASE, len, fd)
            .expect("the server maps the memory");
        Driver {
            client,
            options,
            memory: window(&memory, len),
            queues: HashMap::new(),
            shadow: false,
            mapped: None,
        }
    }

    /// Where memory for data begins; there are [`DriverOptions::data`] bytes of it.
    pub fn data(&self) -> u64 {
        QUEUES + 2 * PAGE * u64::from(self.options.queues)
    }

    /// Two pages for lists of data pointers.
    pub(super) fn list(&self) -> u64 {
        LIST
    }

    /// Where the completion queue of [`Driver::make_io_queues`] is; its submission queue is in the next page.
    pub fn queue_at(&self, qid: u16) -> u64 {
        QUEUES + 2 * PAGE * u64::from(qid - 1)
    }

    /// Entries of the queues of [`Driver::make_io_queues`].
    pub fn entries(&self) -> u16 {
        self.options.entries
    }

    /// Reads a register.
    pub fn read32(&mut self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        let read = self.client.region_read(pci_region::BAR0, at, &mut bytes);
        read.expect("registers can be read");
        u32::from_le_bytes(bytes)
    }

    /// Writes a register or a doorbell.
    pub fn write32(&mut self, at: u64, value: u32) {
        let bytes = value.to_le_bytes();
        let written = self.client.region_write(pci_region::BAR0, at, &bytes);
        written.expect("registers can be written");
    }

    fn write64(&mut self, at: u64, value: u64) {
        let bytes = value.to_le_bytes();
        let written = self.client.region_write(pci_region::BAR0, at, &bytes);
        written.expect("registers can be written");
    }

    /// Guest address of a place in memory.
    pub fn address(&self, at: u64) -> u64 {
        BASE + at
    }

    /// Writes to memory.
    pub fn fill(&self, at: u64, bytes: &[u8]) {
        self.memory.write(at as usize, bytes);
    }

    /// Reads from memory.
    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        self.memory.to_vec(at as usize, len)
    }

    /// Waits until CSTS is as it should be.
    pub fn wait_csts(&mut self, f: impl Fn(Csts) -> bool) {
        let deadline = Instant::now() + self.options.patience;
        loop {
            let csts = Csts::from_bits(self.read32(offset::CSTS));
            if f(csts) {
                return;
            }
            assert!(Instant::now() < deadline, "CSTS is {csts:?}");
            std::thread::yield_now();
        }
    }

    /// Enables the controller, with its admin submission queue at this address.
    pub fn start(&mut self, asq: u64) {
        self.memory.fill(ASQ as usize, 2 * PAGE as usize, 0);
        let entries = u32::from(ADMIN_ENTRIES) - 1;
        self.write32(offset::AQA, entries << 16 | entries);
        self.write64(offset::ASQ, asq);
        self.write64(offset::ACQ, self.address(ACQ));
        let cc = Cc::new()
            .with_en(true)
            .with_css(CSS_ALL)
            .with_iosqes(6)
            .with_iocqes(4);
        self.write32(offset::CC, cc.into_bits());
    }

    /// Enables the controller, and waits until it is ready.
    pub fn enable(&mut self) {
        self.start(self.address(ASQ));
        self.wait_csts(|csts| csts.rdy());
        self.add_queue(0, ACQ, ADMIN_ENTRIES.into(), ASQ, ADMIN_ENTRIES.into());
    }

    /// Resets the controller by CC.EN.
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
        let window =
            |at: u64, entries: u32, bytes: usize| self.memory.slice(at as usize, entries as usize * bytes);
        let queue = Queue {
            sq: window(sq, sq_entries, SUBMISSION_ENTRY_BYTES),
            sq_entries,
            tail: 0,
            rung: 0,
            cq: window(cq, cq_entries, COMPLETION_ENTRY_BYTES),
            cq_entries,
            head: 0,
            phase: true,
        };
        self.queues.insert(qid, queue);
    }

    /// Makes queue `qid` with [`DriverOptions::entries`] entries, and its vector.
    pub fn make_io_queues(&mut self, qid: u16) {
        let (at, entries) = (self.queue_at(qid), self.options.entries.into());
        self.make_queues(qid, at, entries, at + PAGE, entries);
    }

    /// Makes queue `qid` at these places in memory, in a page each.
    pub fn make_queues(&mut self, qid: u16, cq: u64, cq_entries: u32, sq: u64, sq_entries: u32) {
        self.memory.fill(cq as usize, PAGE as usize, 0);
        let cdw10 = |entries: u32| {
            CreateQueueCdw10::new()
                .with_qid(qid)
                .with_qsize_z((entries - 1) as u16)
        };
        let mut create = Entry::admin(AdminOpcode::CREATE_IO_CQ).prps((self.address(cq), 0));
        create.0.cdw10.set(cdw10(cq_entries).into_bits());
        let cdw11 = CreateCqCdw11::new().with_pc(true).with_ien(true).with_iv(qid);
        create.0.cdw11.set(cdw11.into_bits());
        assert_eq!(self.admin(create), Status::SUCCESS);
        let mut create = Entry::admin(AdminOpcode::CREATE_IO_SQ).prps((self.address(sq), 0));
        create.0.cdw10.set(cdw10(sq_entries).into_bits());
        let cdw11 = CreateSqCdw11::new().with_pc(true).with_cqid(qid);
        create.0.cdw11.set(cdw11.into_bits());
        assert_eq!(self.admin(create), Status::SUCCESS);
        self.add_queue(qid, cq, cq_entries, sq, sq_entries);
    }

    /// Doorbell Buffer Config; the doorbells of I/O queues are in memory from now on.
    pub fn use_shadow_doorbells(&mut self) {
        let pages = (self.address(SHADOW), self.address(EVENT_INDEX));
        let config = Entry::admin(AdminOpcode::DOORBELL_BUFFER_CONFIG).prps(pages);
        assert_eq!(self.admin(config), Status::SUCCESS);
        self.shadow = true;
    }

    /// Maps the doorbells; no message rings them from now on.
    ///
    /// # Panics
    /// Where the server does not let them be mapped.
    pub fn map_doorbells(&mut self) {
        let region = self.client.region(pci_region::BAR0).expect("BAR0");
        let file = region.file_offset.as_ref().expect("a file");
        let areas = region.sparse_areas.iter();
        let areas: Vec<_> = areas.map(|area| (area.offset, area.size)).collect();
        assert_eq!(areas, [(offset::DOORBELLS, PAGE)]);
        let fd = file.file().as_fd().try_clone_to_owned().expect("a descriptor");
        let first = (file.start() + offset::DOORBELLS) / 4;
        let words = first as usize + PAGE as usize / 4;
        let mapped = SharedDwords::map(fd, words).expect("the doorbells can be mapped");
        self.mapped = Some((mapped, first as usize));
    }

    /// Puts an entry into a queue, without telling.
    pub fn put(&mut self, qid: u16, entry: Entry) {
        let queue = self.queues.get_mut(&qid).expect("the queue was made");
        let at = queue.tail as usize * SUBMISSION_ENTRY_BYTES;
        queue.sq.write(at, entry.0.as_bytes());
        queue.tail = (queue.tail + 1) % queue.sq_entries;
    }

    /// Tells the controller of the entries that were put.
    pub fn ring(&mut self, qid: u16) {
        self.try_ring(qid).expect("doorbells can be written");
    }

    /// The same, where the server may be gone.
    pub fn try_ring(&mut self, qid: u16) -> Result<(), vfio_user::Error> {
        let queue = self.queues.get_mut(&qid).expect("the queue was made");
        let (old, new) = (queue.rung, queue.tail);
        queue.rung = new;
        self.doorbell(2 * u64::from(qid), old, new)
    }

    fn doorbell(&mut self, index: u64, old: u32, new: u32) -> Result<(), vfio_user::Error> {
        if let Some((doorbells, first)) = &self.mapped {
            doorbells.store(first + index as usize, new);
            return Ok(());
        }
        let at = index * 4;
        if self.shadow && index > 1 {
            self.memory
                .store_u32((SHADOW + at) as usize, new, Ordering::Release);
            fence(Ordering::SeqCst);
            let event = self
                .memory
                .load_u32((EVENT_INDEX + at) as usize, Ordering::Acquire) as u16;
            // As Linux decides it: whether `event` was passed.
            let passed =
                (new as u16).wrapping_sub(event).wrapping_sub(1) < (new as u16).wrapping_sub(old as u16);
            if !passed {
                return Ok(());
            }
        }
        let bytes = new.to_le_bytes();
        let at = offset::DOORBELLS + at;
        self.client.region_write(pci_region::BAR0, at, &bytes)
    }

    /// Whether there is a completion.
    pub fn is_ready(&self, qid: u16) -> bool {
        self.queues[&qid].completed().is_some()
    }

    /// Takes a completion if there is one, without telling.
    pub fn try_next(&mut self, qid: u16) -> Option<Done> {
        let queue = self.queues.get_mut(&qid).expect("the queue was made");
        let entry = queue.completed()?;
        assert_eq!(entry.sqid.get(), qid, "the completion is of this queue");
        queue.head = (queue.head + 1) % queue.cq_entries;
        queue.phase ^= queue.head == 0;
        Some(entry.into())
    }

    /// Tells the controller that completions were taken; `count` of them since it was told last.
    pub fn free(&mut self, qid: u16, count: u32) {
        self.try_free(qid, count).expect("doorbells can be written");
    }

    /// The same, where the server may be gone.
    pub fn try_free(&mut self, qid: u16, count: u32) -> Result<(), vfio_user::Error> {
        let queue = &self.queues[&qid];
        let new = queue.head;
        let old = (new + queue.cq_entries - count % queue.cq_entries) % queue.cq_entries;
        self.doorbell(2 * u64::from(qid) + 1, old, new)
    }

    /// Waits for a completion and takes it.
    pub fn next(&mut self, qid: u16) -> Done {
        let deadline = Instant::now() + self.options.patience;
        loop {
            if let Some(done) = self.try_next(qid) {
                self.free(qid, 1);
                return done;
            }
            assert!(Instant::now() < deadline, "no completion in queue {qid}");
            std::thread::yield_now();
        }
    }

    /// Has one command carried out.
    pub fn run(&mut self, qid: u16, entry: Entry) -> Done {
        const CID: u16 = 77;
        self.put(qid, entry.cid(CID));
        self.ring(qid);
        let done = self.next(qid);
        assert_eq!(done.cid, CID, "the completion is of this command");
        done
    }

    /// The status of a command of an I/O queue.
    pub fn io(&mut self, qid: u16, entry: Entry) -> Status {
        self.run(qid, entry).status
    }

    /// The status of an admin command.
    pub fn admin(&mut self, entry: Entry) -> Status {
        self.run(0, entry).status
    }

    /// Takes the memory away.
    pub fn unmap(&mut self) {
        let len = self.memory.len() as u64;
        self.client
            .dma_unmap(BASE, len)
            .expect("the server unmaps the memory");
    }

    /// Sets eventfds for the first vectors.
    pub fn set_vectors(&mut self, count: u32) -> Vec<OwnedFd> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let events: Vec<OwnedFd> = (0..count)
            .map(|_| eventfd(0, flags).expect("an eventfd"))
            .collect();
        let fds: Vec<_> = events.iter().map(|event| event.as_fd().as_raw_fd()).collect();
        let set = irq_set::DATA_EVENTFD | irq_set::ACTION_TRIGGER;
        let done = self.client.set_irqs(pci_irq::MSIX, set, 0, count, &fds);
        done.expect("the server takes the vectors");
        events
    }

    /// Where the PCI Express capability is in configuration space.
    pub fn express(&mut self) -> u64 {
        const CAPABILITIES: u64 = 0x34;
        const EXPRESS: u8 = 0x10;
        let mut read = |at: u64| {
            let mut header = [0; 2];
            let read = self.client.region_read(pci_region::CONFIG, at, &mut header);
            read.expect("configuration space can be read");
            header
        };
        let mut at = read(CAPABILITIES)[0];
        loop {
            let [id, next] = read(at.into());
            if id == EXPRESS {
                return at.into();
            }
            at = next;
            assert_ne!(at, 0, "no PCI Express capability");
        }
    }
}

fn window(memory: &Arc<SharedMemory>, len: u64) -> Window {
    memory.window(BASE, len as usize).expect("one region")
}
