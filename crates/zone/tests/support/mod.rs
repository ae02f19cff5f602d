//! What the rule tests share: a small device, and short words for what they do to it.

#![allow(dead_code, reason = "each test file uses some of it")]

use std::cell::RefCell;

use zbdkit_zone::{
    Completion, Condition, Engine, Events, ExclusiveOp, Geometry, GeometrySpec, Model, Pending, Prefix,
    Refused, SlotPool, WritePermit, Zns, ZoneError, ZoneNo, ZoneRecord,
};

pub const BLOCK: u64 = 512;
/// Zone size. 10 zones, the first 2 conventional, the last one 3 blocks long.
pub const ZONE: u64 = 8 * BLOCK;
pub const CAPACITY: u64 = 6 * BLOCK;
pub const EIO: i32 = 5;
pub const ENOSPC: i32 = 28;

pub const SPEC: GeometrySpec = GeometrySpec {
    model: Model::HostManaged,
    size: 9 * ZONE + 3 * BLOCK,
    zone_size: ZONE,
    zone_capacity: CAPACITY,
    nr_conventional: 2,
    block_size: BLOCK as u32,
    max_open: 0,
    max_active: 0,
    max_append: 4 * BLOCK,
    zns: Zns::NONE,
};

pub const Z2: ZoneNo = ZoneNo(2);
pub const Z3: ZoneNo = ZoneNo(3);
pub const Z4: ZoneNo = ZoneNo(4);
pub const Z5: ZoneNo = ZoneNo(5);

/// What the engine told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Published(ZoneNo, u64),
    Ready(u32),
    Changed(ZoneNo),
}

#[derive(Default)]
pub struct Log(RefCell<Vec<Event>>);

impl Log {
    pub fn take(&self) -> Vec<Event> {
        self.0.take()
    }
}

impl Events for Log {
    fn publish(&self, zone: ZoneNo, written: u64) {
        self.0.borrow_mut().push(Event::Published(zone, written));
    }
    fn slot_ready(&self, slot: u32) {
        self.0.borrow_mut().push(Event::Ready(slot));
    }
    fn zone_changed(&self, zone: ZoneNo) {
        self.0.borrow_mut().push(Event::Changed(zone));
    }
}

pub struct Device {
    pub engine: Engine,
    pub pool: SlotPool,
    pub log: Log,
}

impl Device {
    pub fn new(change: impl FnOnce(&mut GeometrySpec)) -> Self {
        Self::with(change, |_| ZoneRecord::default())
    }

    pub fn with(change: impl FnOnce(&mut GeometrySpec), initial: impl FnMut(ZoneNo) -> ZoneRecord) -> Self {
        let mut spec = SPEC;
        change(&mut spec);
        let engine = Engine::new(Geometry::new(spec).expect("valid"), initial).expect("valid");
        Self {
            pool: engine.slots(16),
            engine,
            log: Log::default(),
        }
    }

    pub fn start(&self, zone: ZoneNo) -> u64 {
        self.engine.geometry().start(zone)
    }

    pub fn condition(&self, zone: ZoneNo) -> Condition {
        self.engine.info(zone).condition
    }

    /// The written end in blocks from the zone's start.
    pub fn written(&self, zone: ZoneNo) -> u64 {
        self.engine.record(zone).written / BLOCK
    }

    pub fn admit(&mut self, offset: u64, len: u64) -> Result<WritePermit, Refused> {
        self.engine.admit_write(&mut self.pool, offset, len)
    }

    /// Why a write is refused.
    pub fn write_error(&mut self, offset: u64, len: u64) -> ZoneError {
        match self.admit(offset, len).expect_err("refused") {
            Refused::Zone(error) => error,
            other => panic!("{other}"),
        }
    }

    /// Why an append is refused.
    pub fn append_error(&mut self, offset: u64, len: u64) -> ZoneError {
        match self
            .engine
            .admit_append(&mut self.pool, offset, len)
            .expect_err("refused")
        {
            Refused::Zone(error) => error,
            other => panic!("{other}"),
        }
    }

    /// Admits an append of some blocks.
    pub fn append(&mut self, zone: ZoneNo, blocks: u64) -> WritePermit {
        let start = self.start(zone);
        self.engine
            .admit_append(&mut self.pool, start, blocks * BLOCK)
            .expect("admitted")
    }

    pub fn complete(&self, permit: WritePermit, result: Result<(), i32>) -> Completion {
        self.engine.complete(permit, result, &self.log)
    }

    pub fn done(&self, permit: WritePermit) -> Prefix {
        match self.complete(permit, Ok(())) {
            Completion::Prefix(prefix) => prefix,
            other => panic!("{other:?}"),
        }
    }

    pub fn waits(&self, permit: WritePermit) -> Pending {
        match self.complete(permit, Ok(())) {
            Completion::Pending(pending) => pending,
            other => panic!("{other:?}"),
        }
    }

    pub fn fails(&self, permit: WritePermit, errno: i32) -> i32 {
        match self.complete(permit, Err(errno)) {
            Completion::Failed(errno) => errno,
            other => panic!("{other:?}"),
        }
    }

    pub fn acknowledge(&self, prefix: Prefix) {
        self.engine.acknowledge(prefix, Ok(()), &self.log);
    }

    /// Writes so many blocks at the zone's write pointer, from admission to acknowledgement.
    pub fn write(&mut self, zone: ZoneNo, blocks: u64) {
        let at = self.start(zone) + self.engine.record(zone).written;
        let permit = self.admit(at, blocks * BLOCK).expect("admitted");
        let prefix = self.done(permit);
        self.acknowledge(prefix);
    }

    /// Does an operation at once; whether there was something to do.
    pub fn operate(&self, zone: ZoneNo, op: ExclusiveOp) -> bool {
        let Some(permit) = self.engine.begin(zone, op).expect("allowed") else {
            return false;
        };
        assert!(self.engine.drained(&permit), "nothing is in flight");
        self.engine.commit(permit, &self.log);
        true
    }
}
