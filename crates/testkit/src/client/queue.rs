//! A request queue: slots of shared memory for requests in flight, over one of the two rings.
//!
//! Three levels. Blocking calls ([`Queue::read`], ...) for tests that care about one answer;
//! [`Queue::submit`] and [`Queue::next`] for many in flight; and slots ([`Queue::acquire`],
//! [`Queue::start`], [`Queue::reap`]) without a copy or an allocation, for benchmarks.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::error::ClientError;
use super::foreign::ForeignRing;
use super::memory::Window;
use super::request::{BlockRange, Completion, Framing, MAX_APPEND_PAD, Request, Status, Ticket, op};
use super::ring::{DESC_SIZE, Desc, NEXT, Segment, SplitRing, Used, WRITE};
use super::wait::wait_for;
use super::zone::{REPORT_ENTRY, Zone, parse_report};

const NONE: u16 = u16::MAX;
/// Looks at the used ring before the caller goes to sleep.
const SPINS: u32 = 200;
/// Entries of a slot's indirect table.
pub(super) const INDIRECT_ENTRIES: usize = 1024;
/// Where a slot's parts lie: indirect table, header (just below the data), data, in-header.
const HEADER_SIZE: usize = 16;
const TAIL_SIZE: usize = 16;
const DATA_AT: usize = (INDIRECT_ENTRIES * DESC_SIZE + HEADER_SIZE).next_multiple_of(4096);

#[derive(Debug)]
pub(super) enum Engine {
    Ours(SplitRing),
    Foreign(ForeignRing),
}

/// Names a slot of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot(u16);

impl Slot {
    /// Number of the slot, from 0.
    pub fn index(self) -> usize {
        self.0.into()
    }
}

/// What [`Queue::reap`] gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Whose request it was. The caller may look at the slot's data, then reuses or releases it.
    pub slot: Slot,
    /// Status byte.
    pub status: Status,
    /// Bytes that the device says it wrote, where the engine shows that.
    pub used_len: Option<u32>,
}

#[derive(Debug)]
struct SlotState {
    table: Window,
    /// Header, then data.
    front: Window,
    /// Append sector, padding, status; the status is always the last byte.
    tail: Window,
    ticket: Option<Ticket>,
    in_len: u32,
    append_at: usize,
}

/// One queue. It may be moved to another thread.
#[derive(Debug)]
pub struct Queue {
    engine: Engine,
    slots: Vec<SlotState>,
    free: Vec<Slot>,
    /// Slot by head descriptor.
    owner: Vec<u16>,
    segments: Vec<Segment>,
    framing: Framing,
    indirect_negotiated: bool,
    ready: VecDeque<Completion>,
    by_hand: VecDeque<Used>,
    next_ticket: Ticket,
    patience: Duration,
}

impl Queue {
    /// Bytes that a slot with `max_data` bytes of data takes.
    pub(super) fn slot_size(max_data: usize) -> usize {
        (DATA_AT + max_data.next_multiple_of(TAIL_SIZE) + TAIL_SIZE).next_multiple_of(4096)
    }

    pub(super) fn new(
        engine: Engine,
        queue_size: u16,
        slots: Vec<Window>,
        max_data: usize,
        indirect: bool,
        patience: Duration,
    ) -> Self {
        let slots: Vec<_> = slots
            .into_iter()
            .map(|memory| SlotState {
                table: memory.slice(0, INDIRECT_ENTRIES * DESC_SIZE),
                front: memory.slice(DATA_AT - HEADER_SIZE, HEADER_SIZE + max_data),
                tail: memory.slice(DATA_AT + max_data.next_multiple_of(TAIL_SIZE), TAIL_SIZE),
                ticket: None,
                in_len: 0,
                append_at: 0,
            })
            .collect();
        Queue {
            engine,
            free: (0..slots.len() as u16).rev().map(Slot).collect(),
            slots,
            owner: vec![NONE; queue_size.into()],
            segments: Vec::new(),
            framing: Framing::default(),
            indirect_negotiated: indirect,
            ready: VecDeque::new(),
            by_hand: VecDeque::new(),
            next_ticket: 0,
            patience,
        }
    }

    /// How requests are cut into descriptors from now on.
    pub fn set_framing(&mut self, framing: Framing) {
        assert!(
            framing.append_pad <= MAX_APPEND_PAD && framing.chunk != Some(0),
            "{framing:?}"
        );
        self.framing = framing;
    }

    /// How long blocking calls wait from now on.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    // Blocking.

    /// Runs one request to its end, whatever its status. Others may be in flight.
    ///
    /// # Errors
    /// `Timeout`, or what submitting and polling give.
    pub fn run(&mut self, request: &Request) -> Result<Completion, ClientError> {
        let ticket = self.submit(request)?;
        self.wait_ticket(ticket)
    }

    /// Waits for one request.
    ///
    /// # Errors
    /// `Timeout`, or what polling gives.
    pub fn wait_ticket(&mut self, ticket: Ticket) -> Result<Completion, ClientError> {
        self.publish()?;
        let deadline = Instant::now() + self.patience;
        loop {
            if let Some(at) = self.ready.iter().position(|c| c.ticket == ticket)
                && let Some(completion) = self.ready.remove(at)
            {
                return Ok(completion);
            }
            while let Some(done) = self.reap()? {
                self.collect(done);
            }
            if !self.ready.iter().any(|c| c.ticket == ticket) && !self.wait_used(deadline)? {
                return Err(ClientError::Timeout("a request"));
            }
        }
    }

    fn expect_ok(&mut self, request: &Request) -> Result<Completion, ClientError> {
        let completion = self.run(request)?;
        match completion.status {
            Status::OK => Ok(completion),
            status => Err(ClientError::Status(status)),
        }
    }

    /// Reads `len` bytes.
    ///
    /// # Errors
    /// `Status` if the request fails, and as [`Queue::run`]; so with all calls below.
    pub fn read(&mut self, sector: u64, len: u32) -> Result<Vec<u8>, ClientError> {
        Ok(self.expect_ok(&Request::Read { sector, len })?.data)
    }

    /// Writes `data`.
    ///
    /// # Errors
    /// As [`Queue::read`].
    pub fn write(&mut self, sector: u64, data: &[u8]) -> Result<(), ClientError> {
        self.expect_ok(&Request::Write {
            sector,
            data: data.to_vec(),
        })
        .map(drop)
    }

    /// Flushes.
    ///
    /// # Errors
    /// As [`Queue::read`].
    pub fn flush(&mut self) -> Result<(), ClientError> {
        self.expect_ok(&Request::Flush).map(drop)
    }

    /// Discards one range.
    ///
    /// # Errors
    /// As [`Queue::read`].
    pub fn discard(&mut self, sector: u64, sectors: u32) -> Result<(), ClientError> {
        self.expect_ok(&Request::Discard(vec![BlockRange {
            sector,
            sectors,
            flags: 0,
        }]))
        .map(drop)
    }

    /// Writes zeroes over one range, and unmaps it if `unmap`.
    ///
    /// # Errors
    /// As [`Queue::read`].
    pub fn write_zeroes(&mut self, sector: u64, sectors: u32, unmap: bool) -> Result<(), ClientError> {
        let range = BlockRange {
            sector,
            sectors,
            flags: u32::from(unmap),
        };
        self.expect_ok(&Request::WriteZeroes(vec![range])).map(drop)
    }

    /// The id string, without the zeroes at its end.
    ///
    /// # Errors
    /// As [`Queue::read`].
    pub fn get_id(&mut self) -> Result<Vec<u8>, ClientError> {
        let mut id = self.expect_ok(&Request::GetId)?.data;
        id.truncate(id.iter().position(|&b| b == 0).unwrap_or(id.len()));
        Ok(id)
    }

    /// Appends to the zone that starts at `sector`; the sector where the data went.
    ///
    /// # Errors
    /// As [`Queue::read`].
    pub fn zone_append(&mut self, sector: u64, data: &[u8]) -> Result<u64, ClientError> {
        Ok(self
            .expect_ok(&Request::ZoneAppend {
                sector,
                data: data.to_vec(),
            })?
            .append_sector)
    }

    /// Reports up to `count` zones from the one that holds `sector`.
    ///
    /// # Errors
    /// As [`Queue::read`], and `Report`.
    pub fn zone_report(&mut self, sector: u64, count: usize) -> Result<Vec<Zone>, ClientError> {
        let len = (REPORT_ENTRY * (count + 1)) as u32;
        parse_report(&self.expect_ok(&Request::ZoneReport { sector, len })?.data)
    }

    /// Reports all zones, in as many requests as it takes; `zone_sectors` is from the configuration.
    ///
    /// # Errors
    /// As [`Queue::zone_report`]; `Report` also if zones are not in order or do not follow each other.
    pub fn zone_report_all(&mut self, capacity: u64, zone_sectors: u64) -> Result<Vec<Zone>, ClientError> {
        let mut zones: Vec<Zone> = Vec::new();
        let mut next = 0;
        while next < capacity {
            let batch = self.zone_report(next, 1000)?;
            if batch.is_empty() {
                return Err(ClientError::Report(format!("no zone at sector {next}")));
            }
            for zone in batch {
                if zone.start != next {
                    return Err(ClientError::Report(format!(
                        "zone at {} where {next} was due",
                        zone.start
                    )));
                }
                next += zone_sectors;
                zones.push(zone);
            }
        }
        Ok(zones)
    }

    /// Opens a zone explicitly.
    ///
    /// # Errors
    /// As [`Queue::read`].
    pub fn zone_open(&mut self, sector: u64) -> Result<(), ClientError> {
        self.expect_ok(&Request::ZoneOpen(sector)).map(drop)
    }

    /// Closes a zone.
    ///
    /// # Errors
    /// As [`Queue::read`].
    pub fn zone_close(&mut self, sector: u64) -> Result<(), ClientError> {
        self.expect_ok(&Request::ZoneClose(sector)).map(drop)
    }

    /// Finishes a zone.
    ///
    /// # Errors
    /// As [`Queue::read`].
    pub fn zone_finish(&mut self, sector: u64) -> Result<(), ClientError> {
        self.expect_ok(&Request::ZoneFinish(sector)).map(drop)
    }

    /// Resets a zone.
    ///
    /// # Errors
    /// As [`Queue::read`].
    pub fn zone_reset(&mut self, sector: u64) -> Result<(), ClientError> {
        self.expect_ok(&Request::ZoneReset(sector)).map(drop)
    }

    /// Resets all zones.
    ///
    /// # Errors
    /// As [`Queue::read`].
    pub fn zone_reset_all(&mut self) -> Result<(), ClientError> {
        self.expect_ok(&Request::ZoneResetAll).map(drop)
    }

    // Many in flight.

    /// Puts a request in the ring. The device need not see it before [`Queue::publish`].
    ///
    /// # Errors
    /// `QueueFull`, or `TooLarge` for this client's slots.
    pub fn submit(&mut self, request: &Request) -> Result<Ticket, ClientError> {
        let (op, sector, out, in_len) = request.parts();
        let slot = self.acquire().ok_or(ClientError::QueueFull)?;
        let ticket = self.next_ticket;
        let max = self.max_data();
        let started = if out.len().max(in_len as usize) > max {
            Err(ClientError::TooLarge(format!("data of more than {max} bytes")))
        } else {
            let front = &self.slots[slot.index()].front;
            front.write(HEADER_SIZE, &out);
            // What the device does not write must not look like data.
            front.fill(HEADER_SIZE + out.len(), in_len as usize, 0xA5);
            self.start(slot, op, sector, out.len() as u32, in_len)
        };
        if let Err(error) = started {
            self.release(slot);
            return Err(error);
        }
        self.slots[slot.index()].ticket = Some(ticket);
        self.next_ticket += 1;
        Ok(ticket)
    }

    /// Shows the device all requests submitted so far, and notifies it if it wants that.
    ///
    /// # Errors
    /// If the eventfd cannot be written.
    #[inline]
    pub fn publish(&mut self) -> Result<(), ClientError> {
        match &mut self.engine {
            Engine::Ours(ring) => ring.publish(),
            Engine::Foreign(ring) => ring.publish(),
        }
    }

    /// The next completion if there is one now.
    ///
    /// # Errors
    /// `UnexpectedUsed` if the device completed what was not in flight.
    pub fn poll(&mut self) -> Result<Option<Completion>, ClientError> {
        while self.ready.is_empty() {
            match self.reap()? {
                Some(done) => self.collect(done),
                None => return Ok(None),
            }
        }
        Ok(self.ready.pop_front())
    }

    /// Publishes, and waits for the next completion.
    ///
    /// # Errors
    /// `Timeout`, and as [`Queue::poll`].
    pub fn wait(&mut self) -> Result<Completion, ClientError> {
        self.publish()?;
        let deadline = Instant::now() + self.patience;
        loop {
            if let Some(completion) = self.poll()? {
                return Ok(completion);
            }
            if !self.wait_used(deadline)? {
                return Err(ClientError::Timeout("a request"));
            }
        }
    }

    /// Requests that are submitted and not given back yet.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    // Slots.

    /// Takes a free slot.
    pub fn acquire(&mut self) -> Option<Slot> {
        self.free.pop()
    }

    /// Gives back a slot that is not in flight.
    pub fn release(&mut self, slot: Slot) {
        self.slots[slot.index()].ticket = None;
        self.free.push(slot);
    }

    /// Bytes of data that a slot holds.
    pub fn max_data(&self) -> usize {
        self.slots
            .first()
            .map_or(0, |slot| slot.front.len() - HEADER_SIZE)
    }

    /// Writes a slot's outgoing data.
    #[inline]
    pub fn write_data(&self, slot: Slot, offset: usize, data: &[u8]) {
        self.slots[slot.index()].front.write(HEADER_SIZE + offset, data);
    }

    /// Reads a slot's data.
    #[inline]
    pub fn read_data(&self, slot: Slot, offset: usize, into: &mut [u8]) {
        self.slots[slot.index()].front.read(HEADER_SIZE + offset, into);
    }

    /// The sector that a completed append was given.
    #[inline]
    pub fn append_sector(&self, slot: Slot) -> u64 {
        let state = &self.slots[slot.index()];
        let mut word = [0; 8];
        state.tail.read(state.append_at, &mut word);
        u64::from_le_bytes(word)
    }

    /// Puts the request of `slot` in the ring, its `out_len` bytes of data being in the slot already.
    ///
    /// # Errors
    /// `QueueFull` without enough descriptors, `TooLarge` when an indirect table is too short.
    #[inline]
    pub fn start(
        &mut self,
        slot: Slot,
        op: u32,
        sector: u64,
        out_len: u32,
        in_len: u32,
    ) -> Result<(), ClientError> {
        let framing = self.framing;
        let state = &mut self.slots[slot.index()];
        state.front.store_u32(0, op, Ordering::Relaxed);
        state.front.store_u32(4, 0, Ordering::Relaxed);
        state.front.store_u64(8, sector, Ordering::Relaxed);
        let tail_len = if op == op::ZONE_APPEND {
            8 + usize::from(framing.append_pad) + 1
        } else {
            1
        };
        state.append_at = TAIL_SIZE - tail_len.max(9);
        state.tail.fill(0, TAIL_SIZE, Status::UNTOUCHED.0);
        state.in_len = in_len;

        let header = state.front.guest();
        let data = header + HEADER_SIZE as u64;
        let tail = state.tail.guest() + (TAIL_SIZE - tail_len) as u64;
        self.segments.clear();
        let mut add = |guest, len, writable| cut(&mut self.segments, framing.chunk, guest, len, writable);
        if framing.merge_header {
            add(header, HEADER_SIZE as u32 + out_len, false);
        } else {
            add(header, HEADER_SIZE as u32, false);
            add(data, out_len, false);
        }
        add(data, in_len, true);
        add(tail, tail_len as u32, true);

        let head = match &mut self.engine {
            Engine::Ours(ring) if framing.indirect && self.indirect_negotiated => {
                if self.segments.len() > INDIRECT_ENTRIES {
                    return Err(ClientError::TooLarge(format!("{} segments", self.segments.len())));
                }
                fill_table(&state.table, &self.segments);
                ring.add_indirect(&state.table, self.segments.len())?
            }
            Engine::Ours(ring) => ring.add(&self.segments)?,
            Engine::Foreign(ring) => ring.add(&self.segments)?,
        };
        self.owner[usize::from(head)] = slot.0;
        Ok(())
    }

    /// The next completed slot. Chains made by hand go to [`Queue::wait_by_hand`] instead.
    ///
    /// # Errors
    /// `UnexpectedUsed` if the device completed what was not in flight.
    #[inline]
    pub fn reap(&mut self) -> Result<Option<Done>, ClientError> {
        loop {
            let used = match &mut self.engine {
                Engine::Ours(ring) => ring.next_used()?,
                Engine::Foreign(ring) => ring.next_used()?,
            };
            let Some(used) = used else { return Ok(None) };
            match std::mem::replace(&mut self.owner[used.head as usize], NONE) {
                NONE => self.by_hand.push_back(used),
                slot => {
                    let mut status = [0];
                    self.slots[usize::from(slot)]
                        .tail
                        .read(TAIL_SIZE - 1, &mut status);
                    let status = Status(status[0]);
                    return Ok(Some(Done {
                        slot: Slot(slot),
                        status,
                        used_len: used.len,
                    }));
                }
            }
        }
    }

    /// Sleeps until the used ring may have something; false once `deadline` is past.
    ///
    /// # Errors
    /// What poll says.
    pub fn wait_used(&mut self, deadline: Instant) -> Result<bool, ClientError> {
        for _ in 0..SPINS {
            if self.has_used() {
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        self.set_interrupts(true);
        let ready = self.has_used() || wait_for(self.call_fd(), PollFlags::IN, deadline)?;
        self.set_interrupts(false);
        let mut count = [0; 8];
        if wait_for(self.call_fd(), PollFlags::IN, Instant::now())? {
            let _ = rustix::io::read(self.call_fd(), &mut count);
        }
        Ok(ready)
    }

    /// Whether [`Queue::reap`] has something to look at.
    #[inline]
    pub fn has_used(&mut self) -> bool {
        match &mut self.engine {
            Engine::Ours(ring) => ring.has_used(),
            Engine::Foreign(ring) => ring.has_used(),
        }
    }

    /// Asks for interrupts, or for none (the default).
    pub fn set_interrupts(&mut self, on: bool) {
        match &mut self.engine {
            Engine::Ours(ring) => ring.set_interrupts(on),
            Engine::Foreign(ring) => ring.set_interrupts(on),
        }
    }

    /// The eventfd by which the device interrupts.
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        match &self.engine {
            Engine::Ours(ring) => ring.call_fd(),
            Engine::Foreign(ring) => ring.call_fd(),
        }
    }

    // By hand.

    /// The ring itself, for chains made by hand.
    ///
    /// # Errors
    /// `Engine` with virtio-driver, which has no such access.
    pub fn ring(&mut self) -> Result<&mut SplitRing, ClientError> {
        match &mut self.engine {
            Engine::Ours(ring) => Ok(ring),
            Engine::Foreign(_) => Err(ClientError::Engine("the ring belongs to virtio-driver")),
        }
    }

    /// Publishes, and waits until the device has used a chain made by hand.
    ///
    /// # Errors
    /// `Timeout` if it does not (which may be right), and as [`Queue::poll`].
    pub fn wait_by_hand(&mut self) -> Result<Used, ClientError> {
        self.publish()?;
        let deadline = Instant::now() + self.patience;
        loop {
            while let Some(done) = self.reap()? {
                self.collect(done);
            }
            if let Some(used) = self.by_hand.pop_front() {
                return Ok(used);
            }
            if !self.wait_used(deadline)? {
                return Err(ClientError::Timeout("a chain made by hand"));
            }
        }
    }

    fn collect(&mut self, done: Done) {
        let state = &mut self.slots[done.slot.index()];
        let Some(ticket) = state.ticket.take() else { return };
        let data = state.front.to_vec(HEADER_SIZE, state.in_len as usize);
        let append_sector = self.append_sector(done.slot);
        let Done {
            slot,
            status,
            used_len,
        } = done;
        self.ready.push_back(Completion {
            ticket,
            status,
            used_len,
            append_sector,
            data,
        });
        self.release(slot);
    }
}

#[inline]
fn cut(segments: &mut Vec<Segment>, chunk: Option<u32>, guest: u64, len: u32, writable: bool) {
    let mut at = 0;
    while at < len {
        let piece = (len - at).min(chunk.unwrap_or(u32::MAX));
        segments.push(Segment {
            guest: guest + u64::from(at),
            len: piece,
            writable,
        });
        at += piece;
    }
}

fn fill_table(table: &Window, segments: &[Segment]) {
    for (i, segment) in segments.iter().enumerate() {
        let more = if i + 1 < segments.len() { NEXT } else { 0 };
        let flags = more | if segment.writable { WRITE } else { 0 };
        let next = if more == 0 { 0 } else { i as u16 + 1 };
        Desc {
            addr: segment.guest,
            len: segment.len,
            flags,
            next,
        }
        .store(table, i);
    }
}
