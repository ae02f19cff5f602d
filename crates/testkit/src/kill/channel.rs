//! A queue of the device under test: of virtio-blk over vhost-user, or of an NVMe controller over vfio-user.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use zbdkit_block::{Limits, Node};
use zbdkit_spec::nvme::Status as NvmeStatus;
use zbdkit_spec::nvme::nvm::Opcode;
use zbdkit_spec::nvme::zns::{
    ReceiveAction, ReportFilter, ReportHeader, SendAction, SendCdw13, ZoneDescriptor, ZoneState as NvmeState,
};
use zerocopy::FromBytes;

use super::area::Areas;
use super::shared::{SECTOR, lock};
use super::{MAX_DATA, SLOTS};
use crate::client::zone::{REPORT_ENTRY, parse_report};
use crate::client::{Completion, Framing, Queue, Request, Status, Ticket, Zone, ZoneKind, ZoneState};
use crate::nvme::{Done, Driver, DriverOptions, Entry, NvmeNode, Pointers};

/// What a device says of itself once and for all. Lengths in 512-byte sectors.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Capacity.
    pub capacity: u64,
    /// Zone size.
    pub zone_sectors: u32,
    /// Longest append.
    pub max_append_sectors: u32,
    /// Logical block size in bytes.
    pub blk_size: u32,
    /// The random write areas of its zones, if they can have any.
    pub areas: Option<Areas>,
}

/// A queue.
pub enum Channel {
    /// Of virtio-blk.
    Virtio(Box<Queue>),
    /// Of an NVMe controller.
    Nvme(NvmeQueue),
}

impl Channel {
    /// How requests are made: `linux`, with descriptors as Linux makes them.
    pub fn set_framing(&mut self, linux: bool) {
        if let Channel::Virtio(queue) = self {
            queue.set_framing(if linux { Framing::LINUX } else { Framing::default() });
        }
    }

    /// Puts a request into the queue.
    pub fn submit(&mut self, request: &Request) -> Result<Ticket, String> {
        match self {
            Channel::Virtio(queue) => queue.submit(request).map_err(|error| error.to_string()),
            Channel::Nvme(queue) => queue.submit(request),
        }
    }

    /// Tells the device of them.
    pub fn publish(&mut self) -> Result<(), String> {
        match self {
            Channel::Virtio(queue) => queue.publish().map_err(|error| error.to_string()),
            Channel::Nvme(queue) => {
                queue.publish();
                Ok(())
            }
        }
    }

    /// Takes a completion, if there is one.
    pub fn poll(&mut self) -> Result<Option<Completion>, String> {
        match self {
            Channel::Virtio(queue) => queue.poll().map_err(|error| error.to_string()),
            Channel::Nvme(queue) => queue.poll(),
        }
    }

    /// Waits until there may be one.
    pub fn wait_used(&mut self, deadline: Instant) -> Result<(), String> {
        match self {
            Channel::Virtio(queue) => {
                let waited = queue.wait_used(deadline);
                waited.map(drop).map_err(|error| error.to_string())
            }
            Channel::Nvme(queue) => {
                queue.wait(deadline);
                Ok(())
            }
        }
    }

    /// Longest request in bytes.
    pub fn max_data(&self) -> usize {
        match self {
            Channel::Virtio(queue) => queue.max_data(),
            Channel::Nvme(_) => MAX_DATA,
        }
    }

    /// Reads, with nothing else in flight.
    pub fn read(&mut self, sector: u64, len: u32) -> Result<Vec<u8>> {
        match self {
            Channel::Virtio(queue) => Ok(queue.read(sector, len)?),
            Channel::Nvme(queue) => Ok(queue.run(&Request::Read { sector, len })?.data),
        }
    }

    /// The first zone of a report that was asked for by a request.
    pub fn parse_report(&self, data: &[u8]) -> Result<Option<Zone>, String> {
        match self {
            Channel::Virtio(_) => {
                let zones = parse_report(data).map_err(|error| error.to_string())?;
                Ok(zones.first().copied())
            }
            Channel::Nvme(queue) => {
                let zones = descriptors(data)?;
                Ok(zones.first().map(|zone| zone_of(zone, queue.block)))
            }
        }
    }

    /// All zones, and which of them have a random write area; with nothing else in flight.
    pub fn report_all(&mut self, config: &Config) -> Result<Vec<(Zone, bool)>> {
        match self {
            Channel::Virtio(queue) => {
                let zones = queue.zone_report_all(config.capacity, config.zone_sectors.into())?;
                Ok(zones.into_iter().map(|zone| (zone, false)).collect())
            }
            Channel::Nvme(queue) => queue.report_all(config),
        }
    }
}

/// An I/O queue of a controller. All share one driver, whose lock is held for the length of a queue entry.
pub struct NvmeQueue {
    driver: Arc<Mutex<Driver>>,
    qid: u16,
    block: u64,
    slots: Vec<Option<Slot>>,
    next: Ticket,
}

struct Slot {
    ticket: Ticket,
    /// Bytes that come back.
    len: usize,
}

/// Enables the controller at this socket, and makes its queues.
pub fn connect(socket: &std::path::Path, queues: u16) -> Result<(Vec<Channel>, Config)> {
    let options = DriverOptions {
        entries: 2 * SLOTS,
        queues,
        data: u64::from(queues) * u64::from(SLOTS) * MAX_DATA as u64,
        patience: Duration::from_secs(30),
    };
    let mut driver = Driver::connect(socket, options);
    driver.enable();
    (1..=queues).for_each(|qid| driver.make_io_queues(qid));
    let node = NvmeNode::new(driver, 1).context("namespace 1")?;
    let config = config(node.limits(), queues)?;
    let mut driver = node.into_driver();
    driver.use_shadow_doorbells();
    let driver = Arc::new(Mutex::new(driver));
    let queue = |qid| {
        Channel::Nvme(NvmeQueue {
            driver: driver.clone(),
            qid,
            block: config.blk_size.into(),
            slots: (0..SLOTS).map(|_| None).collect(),
            next: 1,
        })
    };
    Ok(((1..=queues).map(queue).collect(), config))
}

fn config(limits: &Limits, queues: u16) -> Result<Config> {
    let geometry = limits.zoned.context("the namespace has no zones")?;
    let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).context("too large for this harness");
    let block = u64::from(geometry.block_size());
    let blocks = |bytes: u64| u32::try_from(bytes / block).context("too large for this harness");
    let areas = match geometry.zrwa() {
        None => None,
        Some(area) => {
            ensure!(
                area.explicit_commit && (area.count == 0 || area.count >= u32::from(queues)),
                "there are not as many random write areas as queues, or no commits"
            );
            Some(Areas {
                size: blocks(area.size)?,
                granularity: blocks(area.granularity)?,
                zones: queues.into(),
            })
        }
    };
    Ok(Config {
        capacity: geometry.size() / SECTOR,
        zone_sectors: sectors(geometry.zone_size())?,
        max_append_sectors: sectors(geometry.max_append().min(MAX_DATA as u64))?,
        blk_size: geometry.block_size(),
        areas,
    })
}

impl NvmeQueue {
    fn block_of(&self, sector: u64) -> u64 {
        sector * SECTOR / self.block
    }

    fn blocks(&self, len: usize) -> u32 {
        (len as u64 / self.block) as u32
    }

    fn submit(&mut self, request: &Request) -> Result<Ticket, String> {
        let manage = |action, sector| Entry::zone_send(action, self.block_of(sector), SendCdw13::new());
        let (entry, send, receive): (Entry, &[u8], usize) = match request {
            Request::Read { sector, len } => {
                let len = *len as usize;
                (
                    Entry::rw(Opcode::READ, self.block_of(*sector), self.blocks(len)),
                    &[],
                    len,
                )
            }
            Request::Write { sector, data } => {
                let block = self.block_of(*sector);
                (Entry::rw(Opcode::WRITE, block, self.blocks(data.len())), data, 0)
            }
            Request::ZoneAppend { sector, data } => {
                let block = self.block_of(*sector);
                (Entry::append(block, self.blocks(data.len())), data, 0)
            }
            Request::Flush => (Entry::new(Opcode::FLUSH.0, 1), &[], 0),
            Request::ZoneReport { sector, len } => {
                let (action, len) = (ReceiveAction::REPORT, *len as usize);
                let block = self.block_of(*sector);
                (
                    Entry::zone_receive(action, ReportFilter::ALL, block, len),
                    &[],
                    len,
                )
            }
            Request::ZoneOpen(sector) => (manage(SendAction::OPEN, *sector), &[], 0),
            Request::ZoneClose(sector) => (manage(SendAction::CLOSE, *sector), &[], 0),
            Request::ZoneFinish(sector) => (manage(SendAction::FINISH, *sector), &[], 0),
            Request::ZoneReset(sector) => (manage(SendAction::RESET, *sector), &[], 0),
            Request::ZoneResetAll => {
                let all = SendCdw13::new().with_select_all(true);
                (Entry::zone_send(SendAction::RESET, 0, all), &[], 0)
            }
            other => return Err(format!("{other:?} is no request of NVMe")),
        };
        self.put(entry, send, receive)
    }

    /// Opens the zone at `sector` with a random write area.
    pub fn open_area(&mut self, sector: u64) -> Result<Ticket, String> {
        let option = SendCdw13::new().with_zsaso(true);
        let entry = Entry::zone_send(SendAction::OPEN, self.block_of(sector), option);
        self.put(entry, &[], 0)
    }

    /// Moves the pointer of a zone with an area to `sector`.
    pub fn commit(&mut self, sector: u64) -> Result<Ticket, String> {
        // The command names the last block.
        let action = SendAction::FLUSH_EXPLICIT_ZRWA_RANGE;
        let entry = Entry::zone_send(action, self.block_of(sector) - 1, SendCdw13::new());
        self.put(entry, &[], 0)
    }

    fn put(&mut self, entry: Entry, send: &[u8], receive: usize) -> Result<Ticket, String> {
        let free = self.slots.iter().position(Option::is_none);
        let slot = free.ok_or("queue full")?;
        let len = send.len().max(receive);
        let mut driver = lock(&self.driver);
        let at = driver.data() + (u64::from(self.qid - 1) * u64::from(SLOTS) + slot as u64) * MAX_DATA as u64;
        let mut entry = entry.cid(slot as u16);
        if len > 0 {
            driver.fill(at, send);
            entry = driver.pointing(entry, Pointers::Sgl, at, len as u64);
        }
        driver.put(self.qid, entry);
        let ticket = self.next;
        self.next += 1;
        self.slots[slot] = Some(Slot { ticket, len: receive });
        Ok(ticket)
    }

    /// Whether the daemon still hears it is not this queue's to tell: it may be killed any time.
    fn publish(&mut self) {
        let _ = lock(&self.driver).try_ring(self.qid);
    }

    fn poll(&mut self) -> Result<Option<Completion>, String> {
        let mut driver = lock(&self.driver);
        let Some(done) = driver.try_next(self.qid) else {
            return Ok(None);
        };
        let _ = driver.try_free(self.qid, 1);
        let number = usize::from(done.cid);
        let slot = self.slots.get_mut(number).and_then(Option::take);
        let slot = slot.ok_or_else(|| format!("command {number} was completed, which is not in flight"))?;
        let at =
            driver.data() + (u64::from(self.qid - 1) * u64::from(SLOTS) + number as u64) * MAX_DATA as u64;
        let data = driver.get(at, slot.len);
        drop(driver);
        let status = status(done);
        if status == Status::IOERR {
            return Err(format!(
                "command {:?} was answered with {:?}",
                slot.ticket, done.status
            ));
        }
        Ok(Some(Completion {
            ticket: slot.ticket,
            status,
            used_len: None,
            append_sector: done.result.wrapping_mul(self.block) / SECTOR,
            data,
        }))
    }

    fn wait(&mut self, deadline: Instant) {
        while !lock(&self.driver).is_ready(self.qid) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// Runs a request, with nothing else in flight.
    fn run(&mut self, request: &Request) -> Result<Completion> {
        self.submit(request).map_err(anyhow::Error::msg)?;
        self.finish().with_context(|| format!("{request:?}"))
    }

    /// Waits for the only command in flight.
    fn finish(&mut self) -> Result<Completion> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let rung = lock(&self.driver).try_ring(self.qid);
        rung.context("the daemon does not hear it")?;
        loop {
            self.wait(deadline);
            if let Some(done) = self.poll().map_err(anyhow::Error::msg)? {
                ensure!(done.status == Status::OK, "it was answered with {}", done.status);
                return Ok(done);
            }
            ensure!(Instant::now() < deadline, "it was not answered");
        }
    }

    fn report_all(&mut self, config: &Config) -> Result<Vec<(Zone, bool)>> {
        const BATCH: u64 = 64;
        let mut zones = Vec::new();
        let count = config.capacity.div_ceil(config.zone_sectors.into());
        while (zones.len() as u64) < count {
            let block = self.block_of(zones.len() as u64 * u64::from(config.zone_sectors));
            let len = REPORT_ENTRY * (1 + BATCH.min(count - zones.len() as u64) as usize);
            let entry = Entry::zone_receive(ReceiveAction::REPORT, ReportFilter::ALL, block, len);
            self.put(entry, &[], len).map_err(anyhow::Error::msg)?;
            let batch = descriptors(&self.finish()?.data).map_err(anyhow::Error::msg)?;
            ensure!(!batch.is_empty(), "an empty report");
            let shown = batch.iter();
            zones.extend(shown.map(|zone| (zone_of(zone, self.block), zone.attributes().zrwav())));
        }
        Ok(zones)
    }
}

/// The zones of a report.
fn descriptors(report: &[u8]) -> Result<Vec<ZoneDescriptor>, String> {
    let (header, rest) = ReportHeader::read_from_prefix(report).map_err(|_| "a report without a header")?;
    let room = rest.len() / REPORT_ENTRY;
    let count = usize::try_from(header.nr_zones.get()).unwrap_or(usize::MAX);
    if count > room {
        return Err(format!("{count} zones said to be where {room} have room"));
    }
    let zones = rest.chunks_exact(REPORT_ENTRY).take(count);
    Ok(zones
        .filter_map(|zone| ZoneDescriptor::read_from_bytes(zone).ok())
        .collect())
}

fn zone_of(zone: &ZoneDescriptor, block: u64) -> Zone {
    let sectors = |blocks: u64| blocks * block / SECTOR;
    let (start, cap) = (sectors(zone.zslba.get()), sectors(zone.zcap.get()));
    let state = match zone.state() {
        NvmeState::EMPTY => ZoneState::Empty,
        NvmeState::IMPLICITLY_OPENED => ZoneState::ImplicitlyOpen,
        NvmeState::EXPLICITLY_OPENED => ZoneState::ExplicitlyOpen,
        NvmeState::CLOSED => ZoneState::Closed,
        NvmeState::FULL => ZoneState::Full,
        NvmeState::READ_ONLY => ZoneState::ReadOnly,
        _ => ZoneState::Offline,
    };
    Zone {
        start,
        cap,
        // A full zone has none.
        wp: match state {
            ZoneState::Full => start + cap,
            _ => sectors(zone.wp.get()),
        },
        kind: ZoneKind::SequentialRequired,
        state,
    }
}

/// What a status means, in the words of virtio-blk.
fn status(done: Done) -> Status {
    match done.status {
        NvmeStatus::SUCCESS => Status::OK,
        NvmeStatus::ZONE_INVALID_WRITE => Status::ZONE_UNALIGNED_WP,
        NvmeStatus::ZONE_BOUNDARY_ERROR
        | NvmeStatus::ZONE_IS_FULL
        | NvmeStatus::INVALID_ZONE_STATE_TRANSITION
        | NvmeStatus::INVALID_ZONE_OPERATION => Status::ZONE_INVALID_CMD,
        NvmeStatus::TOO_MANY_OPEN_ZONES => Status::ZONE_OPEN_RESOURCE,
        NvmeStatus::TOO_MANY_ACTIVE_ZONES => Status::ZONE_ACTIVE_RESOURCE,
        _ => Status::IOERR,
    }
}
