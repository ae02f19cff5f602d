//! The tokens of requests in flight, and what the engine tells its callers.
//!
//! A token is used up by the call that ends its request. One that is dropped instead leaves its zone in a
//! state that nobody knows: a debug build panics, and the zone admits nothing until the image is reopened.

use std::cell::Cell;
use std::mem;
use std::ops::Range;

use crate::lost::{self, EngineId, Lost};
use crate::slots::NIL;
use crate::types::{Condition, ExclusiveOp, ZoneNo};

/// What the engine tells the callers of an image. Called on the thread that called the engine.
pub trait Events {
    /// The zone's written end is now `written` bytes from its start. Called under the zone's lock, in order:
    /// `written` only grows until a reset is committed. A mapped run state stores here. It must not call the
    /// engine.
    fn publish(&self, zone: ZoneNo, written: u64);
    /// [`Engine::outcome`](crate::Engine::outcome) of this slot's write has a value: wake who waits. May come before the waiting
    /// side has its [`Pending`], and, rarely, once for a slot that has a new user already.
    fn slot_ready(&self, slot: u32);
    /// The zone's requests in flight have ended, or it is no longer busy: wake who waits for either.
    fn zone_changed(&self, zone: ZoneNo);
}

/// Nobody listens.
impl Events for () {
    fn publish(&self, _: ZoneNo, _: u64) {}
    fn slot_ready(&self, _: u32) {}
    fn zone_changed(&self, _: ZoneNo) {}
}

impl<E: Events + ?Sized> Events for &E {
    fn publish(&self, zone: ZoneNo, written: u64) {
        (**self).publish(zone, written);
    }
    fn slot_ready(&self, slot: u32) {
        (**self).slot_ready(slot);
    }
    fn zone_changed(&self, zone: ZoneNo) {
        (**self).zone_changed(zone);
    }
}

/// How a write relates to the others of its zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Sequential-required: acknowledged in order; its link in the zone's list.
    Required { slot: u32 },
    /// In a random write area: on its own. `pointer` is where the zone's write pointer stands once it is written, from the
    /// zone's start.
    Window { pointer: u64 },
    /// Sequential-preferred: on its own. `next` is where the zone's admitted data ended before it.
    Preferred { next: u64 },
    /// Conventional: on its own, up to this zone.
    Conventional { last: ZoneNo },
}

/// A write that was admitted and must be ended by [`Engine::complete`](crate::Engine::complete).
#[must_use = "a write that is not completed leaves its zone unusable"]
#[derive(Debug)]
pub struct WritePermit {
    pub(crate) engine: EngineId,
    pub(crate) zone: ZoneNo,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) order: Order,
}

impl WritePermit {
    /// Where the data goes, in bytes on the device. For an append this is the address that it got.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How many bytes go there.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: there are no empty writes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The zone; the first one of a write that spans conventional zones.
    pub fn zone(&self) -> ZoneNo {
        self.zone
    }

    /// The slot that [`Events::slot_ready`] may name for this write; none where it cannot have to wait.
    pub fn slot(&self) -> Option<u32> {
        match self.order {
            Order::Required { slot } => Some(slot),
            Order::Window { .. } | Order::Preferred { .. } | Order::Conventional { .. } => None,
        }
    }

    /// The bytes between the data admitted so far and this write, in a sequential-preferred zone: they must
    /// read as zeros before the write is completed, since the pointer moves over them. Absolute.
    pub fn gap(&self) -> Option<Range<u64>> {
        match self.order {
            Order::Preferred { next } if next < self.offset => Some(next..self.offset),
            _ => None,
        }
    }

    pub(crate) fn last_zone(&self) -> ZoneNo {
        match self.order {
            Order::Conventional { last } => last,
            _ => self.zone,
        }
    }
}

impl Drop for WritePermit {
    fn drop(&mut self) {
        lost::request(self.engine, self.zone, self.last_zone(), "the write permit");
    }
}

/// A read that was admitted and must be ended by [`Engine::end_read`](crate::Engine::end_read).
#[must_use = "a read that is not ended keeps its zone from being reset"]
#[derive(Debug)]
pub struct ReadPermit {
    pub(crate) engine: EngineId,
    pub(crate) zone: ZoneNo,
    pub(crate) last: ZoneNo,
    pub(crate) data_len: u64,
}

impl ReadPermit {
    /// How many of the bytes asked for lie below the written end. The rest reads as zeros, whatever the
    /// backing holds there.
    pub fn data_len(&self) -> u64 {
        self.data_len
    }

    /// The zone; the first one of a read that spans conventional zones.
    pub fn zone(&self) -> ZoneNo {
        self.zone
    }
}

impl Drop for ReadPermit {
    fn drop(&mut self) {
        lost::request(self.engine, self.zone, self.last, "the read permit");
    }
}

/// A zone that an operation has closed to everybody else. Ended by
/// [`Engine::commit`](crate::Engine::commit) or [`Engine::abort`](crate::Engine::abort).
#[must_use = "a zone stays closed until the operation is committed or aborted"]
#[derive(Debug)]
pub struct ExclusivePermit {
    pub(crate) engine: EngineId,
    pub(crate) zone: ZoneNo,
    pub(crate) op: ExclusiveOp,
    /// The zone's condition before.
    pub(crate) before: Condition,
}

impl ExclusivePermit {
    /// The zone.
    pub fn zone(&self) -> ZoneNo {
        self.zone
    }

    /// What is being done to it.
    pub fn op(&self) -> ExclusiveOp {
        self.op
    }
}

impl Drop for ExclusivePermit {
    fn drop(&mut self) {
        lost::request(self.engine, self.zone, self.zone, "the exclusive permit");
    }
}

/// What [`Engine::complete`](crate::Engine::complete) makes of a write.
#[derive(Debug)]
pub enum Completion {
    /// The write is done and so is all before it: make the run state hold it, then acknowledge.
    Prefix(Prefix),
    /// The write is done but an earlier one is not: wait, then ask for the outcome.
    Pending(Pending),
    /// The write is over and counts as not written, with its own errno or, where an earlier write of the
    /// zone failed first, that one's.
    Failed(i32),
}

/// Writes that are done and wait to be acknowledged, by
/// [`Engine::acknowledge`](crate::Engine::acknowledge).
#[must_use = "the writes of a prefix wait until it is acknowledged"]
#[derive(Debug)]
pub struct Prefix {
    pub(crate) engine: EngineId,
    pub(crate) zone: ZoneNo,
    pub(crate) last: ZoneNo,
    /// Oldest slot of the chain, and how many there are. None for unordered writes.
    pub(crate) first: u32,
    pub(crate) count: u32,
    /// The slot of the write whose completion made the prefix.
    pub(crate) own: u32,
    pub(crate) written: u64,
    pub(crate) advanced: bool,
}

impl Prefix {
    /// The zone; the first one for a write that spanned conventional zones.
    pub fn zone(&self) -> ZoneNo {
        self.zone
    }

    /// The zone's written end when the prefix was made, in bytes from the zone's start. Prefixes of a zone
    /// may be acknowledged in any order, so a run state that is not stored in [`Events::publish`] must not go
    /// back to a lower value: take the highest that was made so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Whether the written end moved, or may have been moved over this write by another one that is not acknowledged yet
    /// (in a random write area and in sequential-preferred zones). If not (conventional zones) there is nothing to make
    /// durable before acknowledging.
    pub fn advanced(&self) -> bool {
        self.advanced
    }
}

impl Drop for Prefix {
    fn drop(&mut self) {
        lost::request(self.engine, self.zone, self.last, "the unacknowledged prefix");
    }
}

/// A write that is done but waits for earlier ones. It may be dropped: its slot then comes back by itself.
#[must_use = "the outcome of the write is not known yet"]
#[derive(Debug)]
pub struct Pending {
    pub(crate) engine: EngineId,
    pub(crate) slot: Cell<u32>,
}

impl Pending {
    /// The slot that [`Events::slot_ready`] will name.
    pub fn slot(&self) -> u32 {
        self.slot.get()
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if self.slot.get() != NIL {
            self.engine.report(Lost::Wait(self.slot.get()));
        }
    }
}

/// Ends a token without the consequences of dropping it.
pub(crate) fn used<T>(token: T) {
    mem::forget(token);
}
