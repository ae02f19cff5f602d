//! What clients ask for: seeded mixes of requests over all zones.

use std::cell::RefCell;
use std::rc::Rc;

use zbdkit_block::{CrossZone, Device, Error, Lane, ZoneOp};
use zbdkit_io::IoBuf;
use zbdkit_zone::{CloseEmpty, Recommendation, ZoneError, ZoneNo, ZoneType};

use super::choose::{Choose, Rng};
use super::host::Machine;
use super::oracle::{Fill, Kind, Oracle, Setting, extension, payload};

/// Which requests, by weight.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Writes and appends.
    pub write: u64,
    /// Writes of zeros.
    pub zeros: u64,
    /// Marks.
    pub mark: u64,
    /// Flushes.
    pub flush: u64,
    /// Resets of one zone.
    pub reset: u64,
    /// Resets of all zones.
    pub reset_all: u64,
    /// Finishes.
    pub finish: u64,
    /// Opens and closes.
    pub open: u64,
    /// Operator settings.
    pub set: u64,
    /// Reads.
    pub read: u64,
    /// Discards in conventional zones.
    pub discard: u64,
    /// What only Zoned Namespaces have: random write areas, commits, extensions, attributes.
    pub zns: u64,
    /// Formats, to any block size that the device can have.
    pub format: u64,
    /// Only so many zones are used, so that requests meet in them; 0 for all.
    pub zones: u32,
}

impl Mix {
    /// A bit of everything.
    pub const ALL: Mix = Mix {
        write: 60,
        zeros: 4,
        mark: 0,
        flush: 10,
        reset: 8,
        reset_all: 1,
        finish: 3,
        open: 6,
        set: 4,
        read: 4,
        discard: 1,
        zns: 0,
        format: 0,
        zones: 0,
    };
    /// Crowds in few zones, with resets between the writes.
    pub const CROWD: Mix = Mix {
        write: 60,
        zeros: 2,
        mark: 0,
        flush: 10,
        reset: 14,
        reset_all: 3,
        finish: 5,
        open: 2,
        set: 0,
        read: 2,
        discard: 0,
        zns: 0,
        format: 0,
        zones: 3,
    };
    /// Random write areas, extensions and attributes, among a bit of everything.
    pub const ZNS: Mix = Mix {
        reset: 5,
        finish: 1,
        open: 3,
        set: 1,
        zns: 30,
        zones: 4,
        ..Mix::ALL
    };
    /// Marks, and whatever takes them away again, in few zones.
    pub const MARKS: Mix = Mix {
        write: 50,
        mark: 25,
        flush: 6,
        discard: 4,
        set: 1,
        zones: 4,
        ..Mix::ALL
    };
    /// The same with formats, and nothing that only the operator takes back.
    pub const FORMAT: Mix = Mix {
        set: 0,
        format: 4,
        ..Mix::ZNS
    };
    /// Writes and flushes.
    pub const DATA: Mix = Mix {
        write: 80,
        zeros: 0,
        mark: 0,
        flush: 10,
        reset: 0,
        reset_all: 0,
        finish: 0,
        open: 0,
        set: 0,
        read: 0,
        discard: 0,
        zns: 0,
        format: 0,
        zones: 0,
    };

    fn draw(&self, rng: &mut Rng) -> What {
        let weights = [
            (What::Write, self.write),
            (What::Zeros, self.zeros),
            (What::Mark, self.mark),
            (What::Flush, self.flush),
            (What::Reset, self.reset),
            (What::ResetAll, self.reset_all),
            (What::Finish, self.finish),
            (What::Open, self.open),
            (What::Set, self.set),
            (What::Read, self.read),
            (What::Discard, self.discard),
            (What::Zns, self.zns),
            (What::Format, self.format),
        ];
        let total = weights.iter().map(|(_, weight)| weight).sum();
        let mut at = rng.below(total);
        for (what, weight) in weights {
            if at < weight {
                return what;
            }
            at -= weight;
        }
        What::Write
    }
}

#[derive(Clone, Copy, Debug)]
enum What {
    Write,
    Zeros,
    Mark,
    Flush,
    Reset,
    ResetAll,
    Finish,
    Open,
    Set,
    Read,
    Discard,
    Zns,
    Format,
}

/// One client with its lane.
pub struct Client {
    machine: Machine,
    device: Device,
    lane: Lane,
    oracle: Rc<RefCell<Oracle>>,
    /// Where clients believe the next write of each zone goes.
    cursors: Rc<RefCell<Vec<u64>>>,
    mix: Mix,
    rng: RefCell<Rng>,
}

impl Client {
    /// A client.
    pub fn new(
        machine: Machine,
        device: Device,
        oracle: Rc<RefCell<Oracle>>,
        cursors: Rc<RefCell<Vec<u64>>>,
        mix: Mix,
        seed: u64,
    ) -> Client {
        let lane = device.lane(2);
        let rng = RefCell::new(Rng::new(seed));
        Client {
            machine,
            device,
            lane,
            oracle,
            cursors,
            mix,
            rng,
        }
    }

    fn below(&self, n: u64) -> u64 {
        self.rng.borrow_mut().below(n)
    }

    /// Makes so many requests, one after the other.
    pub async fn run(&self, requests: u32) {
        for _ in 0..requests {
            let zone = self.zone();
            let what = self.mix.draw(&mut self.rng.borrow_mut());
            match what {
                What::Write => self.write(zone, Fill::Stamp).await,
                What::Zeros => self.write(zone, Fill::Zeros).await,
                What::Mark => self.write(zone, Fill::Unreadable).await,
                What::Flush => self.note(0, Kind::Flush, self.device.flush(&self.lane)).await,
                What::Reset => self.manage(zone, ZoneOp::Reset, Kind::Reset).await,
                What::Finish => self.manage(zone, ZoneOp::Finish, Kind::Finish).await,
                What::ResetAll => {
                    self.note(0, Kind::ResetAll, self.device.reset_all(&self.lane))
                        .await
                }
                What::Open => self.open(zone).await,
                What::Set => self.set(zone).await,
                What::Read => self.read(zone).await,
                What::Discard => self.discard().await,
                What::Zns => self.zns(zone).await,
                What::Format => self.format().await,
            }
        }
    }

    fn zone(&self) -> ZoneNo {
        let geometry = self.oracle.borrow().geometry;
        let (nr, conventional) = (geometry.nr_zones(), geometry.nr_conventional());
        match self.mix.zones {
            0 => ZoneNo(self.below(nr.into()) as u32),
            // One conventional zone, where there is one, and the first sequential ones.
            few => ZoneNo((conventional.saturating_sub(1) + self.below(few.into()) as u32).min(nr - 1)),
        }
    }

    fn start(&self, zone: ZoneNo) -> u64 {
        self.oracle.borrow().geometry.start(zone)
    }

    /// Notes the request, carries it out, notes the answer.
    async fn note(&self, zone: u32, kind: Kind, request: impl Future<Output = Result<(), Error>>) {
        let op = self.submit(zone, kind);
        let result = request.await;
        self.answer(op, result.as_ref().map(|()| None));
    }

    fn submit(&self, zone: u32, kind: Kind) -> usize {
        let tick = self.machine.tick();
        self.oracle.borrow_mut().submit(tick, zone, kind, &self.device)
    }

    fn answer(&self, op: usize, result: Result<Option<u64>, &Error>) {
        let tick = self.machine.tick();
        self.oracle.borrow_mut().answer(tick, op, result, &self.device);
    }

    async fn manage(&self, zone: ZoneNo, op: ZoneOp, kind: Kind) {
        let start = self.start(zone);
        self.note(zone.0, kind, self.device.zone_op(&self.lane, op, start))
            .await;
    }

    async fn open(&self, zone: ZoneNo) {
        let op = match self.below(3) {
            0 | 1 => ZoneOp::Open,
            _ => ZoneOp::Close(CloseEmpty::ToEmpty),
        };
        // Whatever comes of it, a crash forgets it.
        let _ = self.device.zone_op(&self.lane, op, self.start(zone)).await;
    }

    /// Settings go to zones of the client's own, one at a time, so that their order is known.
    async fn set(&self, zone: ZoneNo) {
        let pending = |op: &super::oracle::Op| {
            matches!(op.kind, Kind::Set(_)) && op.zone == zone.0 && op.done.is_none()
        };
        if self.oracle.borrow().ops.iter().any(pending) {
            return;
        }
        let (op, setting) = match self.below(5) {
            0 => (ZoneOp::SetReadOnly, Setting::ReadOnly),
            1 => (ZoneOp::SetOffline, Setting::Offline),
            _ => (ZoneOp::SetNormal, Setting::Normal),
        };
        self.manage(zone, op, Kind::Set(setting)).await;
    }

    /// One at a time, so that their order is known.
    async fn format(&self) {
        if self.oracle.borrow().is_formatting() {
            return;
        }
        let sizes = self.device.block_sizes();
        let size = sizes[self.below(sizes.len() as u64) as usize];
        let op = self.submit(0, Kind::ResetAll);
        self.oracle.borrow_mut().formats.insert(op, size);
        let result = self.device.format(&self.lane, size).await;
        self.answer(op, result.as_ref().map(|()| None));
    }

    async fn zns(&self, zone: ZoneNo) {
        let geometry = self.oracle.borrow().geometry;
        let Some(area) = geometry.zrwa() else { return };
        let start = geometry.start(zone);
        match self.below(24) {
            0..6 => self.manage(zone, ZoneOp::OpenZrwa, Kind::OpenZrwa).await,
            6..14 => {
                let Some(wp) = self.area_of(zone) else { return };
                let capacity_end = start + geometry.capacity(zone);
                let granules = 1 + self.below(area.size / area.granularity);
                let end = (wp + granules * area.granularity).min(capacity_end);
                let kind = Kind::Commit { end };
                self.note(zone.0, kind, self.device.commit_zrwa(&self.lane, end))
                    .await;
            }
            14..20 => {
                let id = self.oracle.borrow().next_id();
                let bytes = extension(id, &geometry);
                let zrwa = self.below(2) == 0;
                let attached = self.device.set_extension(&self.lane, start, &bytes, zrwa);
                self.note(zone.0, Kind::Attach { id, zrwa }, attached).await;
            }
            20 => {
                self.manage(zone, ZoneOp::FinishByDevice, Kind::FinishByDevice)
                    .await
            }
            _ => {
                let what = match self.below(3) {
                    0 => None,
                    1 => Some(Recommendation::Finish),
                    _ => Some(Recommendation::Reset),
                };
                self.manage(zone, ZoneOp::Recommend(what), Kind::Recommend(what))
                    .await;
            }
        }
    }

    /// The pointer of a zone that has a random write area now.
    fn area_of(&self, zone: ZoneNo) -> Option<u64> {
        let info = self.device.engine()?.info(zone);
        info.attributes.zrwa.then_some(info.wp)
    }

    /// Somewhere in a zone's area or in the region behind it, in the zone.
    fn in_area(&self, wp: u64, block: u64, end: u64) -> u64 {
        let size = self
            .oracle
            .borrow()
            .geometry
            .zrwa()
            .map_or(block, |area| area.size);
        let blocks = match self.below(3) {
            0 => 2 * size / block,
            _ => size / block,
        };
        (wp + block * self.below(blocks)).min(end - block)
    }

    async fn read(&self, zone: ZoneNo) {
        let len = self.oracle.borrow().geometry.zone_size();
        let buf = IoBuf::alloc(len as usize);
        let _ = self
            .device
            .read(&self.lane, buf, self.start(zone), CrossZone::Refuse)
            .await;
    }

    async fn discard(&self) {
        let (block, conventional) = {
            let oracle = self.oracle.borrow();
            let geometry = &oracle.geometry;
            let bytes = geometry.zone_size() * u64::from(geometry.nr_conventional());
            (u64::from(self.device.block_size()), bytes)
        };
        if conventional == 0 {
            return;
        }
        let offset = block * self.below(conventional / block);
        let zone = self.oracle.borrow().geometry.zone_of(offset).0;
        let kind = Kind::Discard { offset, len: block };
        self.note(zone, kind, self.device.discard(&self.lane, offset, block))
            .await;
    }

    async fn write(&self, zone: ZoneNo, fill: Fill) {
        let (kind, block, start, capacity, append) = {
            let oracle = self.oracle.borrow();
            let geometry = &oracle.geometry;
            (
                geometry.zone_type(zone),
                u64::from(self.device.block_size()),
                geometry.start(zone),
                geometry.capacity(zone),
                geometry.max_append() > 0,
            )
        };
        let len = block * (1 + self.below(3));
        let id = self.oracle.borrow().next_id();
        let area = self.area_of(zone).filter(|_| self.below(16) != 0);
        if kind == ZoneType::SequentialRequired
            && append
            && fill == Fill::Stamp
            && area.is_none()
            && self.below(2) == 0
        {
            return self.append(zone, id, len).await;
        }
        let offset = match kind {
            _ if area.is_some() => self.in_area(area.unwrap_or(start), block, start + capacity),
            ZoneType::SequentialRequired => self.claim(zone, len, start + capacity),
            // Mostly near the pointer, so that gaps, overwrites and meetings all come up.
            ZoneType::SequentialPreferred if self.below(2) == 0 => self.claim(zone, len, start + capacity),
            ZoneType::SequentialPreferred => start + block * self.below((capacity - len) / block + 1),
            ZoneType::Conventional => start + block * self.below(capacity / block),
        };
        let kind = Kind::Write {
            id,
            offset: Some(offset),
            len,
            fill,
        };
        let op = self.submit(zone.0, kind);
        let result = match fill {
            Fill::Stamp => {
                let buf = IoBuf::from_vec(payload(id, len));
                self.device.write(&self.lane, buf, offset).await
            }
            Fill::Zeros => {
                let unmap = self.below(2) == 0;
                self.device.write_zeroes(&self.lane, offset, len, unmap).await
            }
            Fill::Unreadable => self.device.mark_uncorrectable(&self.lane, offset, len).await,
        };
        self.answer(op, result.as_ref().map(|()| Some(offset)));
        match result {
            Err(Error::Zone(ZoneError::NotAtWritePointer { wp, .. })) => {
                self.cursors.borrow_mut()[zone.0 as usize] = wp
            }
            Err(_) => self.cursors.borrow_mut()[zone.0 as usize] = start,
            Ok(()) => {}
        }
    }

    async fn append(&self, zone: ZoneNo, id: u32, len: u64) {
        let kind = Kind::Write {
            id,
            offset: None,
            len,
            fill: Fill::Stamp,
        };
        let op = self.submit(zone.0, kind);
        let buf = IoBuf::from_vec(payload(id, len));
        let result = self.device.append(&self.lane, buf, self.start(zone)).await;
        if let Ok(at) = result {
            let next = &mut self.cursors.borrow_mut()[zone.0 as usize];
            *next = (*next).max(at + len);
        }
        self.answer(op, result.as_ref().map(|at| Some(*at)));
    }

    /// The place that the next writer takes; from the start again where none is left.
    fn claim(&self, zone: ZoneNo, len: u64, end: u64) -> u64 {
        let start = self.start(zone);
        let next = &mut self.cursors.borrow_mut()[zone.0 as usize];
        if *next + len > end {
            *next = start;
        }
        let offset = *next;
        *next += len;
        offset
    }
}
