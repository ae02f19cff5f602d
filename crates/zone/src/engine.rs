//! The engine's state: the zones, and how they are locked and looked at.
//!
//! Locks, in the order in which they are taken: `conventional` (requests that span conventional zones, and
//! operations on those), a zone's `seq`, the accounting. Never two zones at once. All are held for tens of
//! instructions and never across I/O.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::accounting::{Accounting, Conditions};
use crate::dirty::Dirty;
use crate::error::{RecordError, Refused, ZoneError};
use crate::geometry::{Geometry, Zrwa};
use crate::lost::{self, EngineId, Lost};
use crate::permit::Pending;
use crate::slots::{Arena, NIL, SlotPool, State};
use crate::sync::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Mutex, MutexGuard, Ordering, lock};
use crate::types::{Attributes, Condition, Counters, Recommendation, ZoneNo, ZoneRecord, ZoneType};

/// The zones of one image. Shared by reference among all threads that use it.
///
/// Functions that take a [`ZoneNo`] panic where the geometry has no such zone: get numbers from
/// [`Geometry::zone_at`] or [`Geometry::zone_of`].
pub struct Engine {
    pub(crate) id: EngineId,
    /// The shape, which never changes. Its block size is not the one that counts: see [`Engine::geometry`].
    pub(crate) geometry: Geometry,
    /// The same with each block size that the device can have.
    pub(crate) formats: Box<[Geometry]>,
    /// The one that it has.
    pub(crate) format: AtomicU8,
    pub(crate) zones: Zones,
    pub(crate) accounting: Accounting,
    pub(crate) dirty: Dirty,
    pub(crate) arena: Arc<Arena>,
    /// Held while a request takes its place in several conventional zones, and by operations that close one
    /// of them, so that all of them stay as they were checked.
    pub(crate) conventional: Mutex<()>,
    notes_seen: AtomicU64,
    /// Slots whose owners stopped waiting.
    abandoned: Mutex<Vec<u32>>,
}

pub(crate) struct Zones(Vec<Zone>);

/// The state of a zone.
pub(crate) struct Zone {
    seq: Mutex<Seq>,
    /// A [`Condition`]. Changes only under the accounting's lock; from implicitly open to closed without the
    /// zone's own, otherwise with it.
    condition: AtomicU8,
    /// [`BUSY`] and so on. Touched under the zone's lock only; here because there is room.
    flags: AtomicU16,
    /// Checksum of the descriptor extension, where [`EXTENSION`] is set. Touched under the zone's lock only.
    extension: AtomicU32,
}

/// An exclusive operation has the zone.
pub(crate) const BUSY: u16 = 1;
/// A write failed and others of the zone are still in flight.
pub(crate) const FAILING: u16 = 2;
/// A request was dropped before its end.
pub(crate) const POISONED: u16 = 4;
/// The zone was finished.
pub(crate) const FINISHED: u16 = 8;
/// The zone has a random write area.
pub(crate) const ZRWA: u16 = 16;
/// The zone has a descriptor extension.
pub(crate) const EXTENSION: u16 = 32;
/// The device finished the zone.
pub(crate) const BY_DEVICE: u16 = 64;
/// The device recommends to finish the zone.
pub(crate) const ADVISE_FINISH: u16 = 128;
/// The device recommends to reset the zone.
pub(crate) const ADVISE_RESET: u16 = 256;

/// What a zone's lock protects. Positions are bytes from the zone's start.
pub(crate) struct Seq {
    /// Where the next write must start; the highest end admitted in a sequential-preferred zone; where the pointer of a zone
    /// with a random write area stands once all that was admitted is written.
    pub(crate) next: u64,
    /// The written end; with a random write area, the write pointer.
    pub(crate) done: u64,
    pub(crate) bytes_written: u64,
    pub(crate) resets: u32,
    pub(crate) finishes: u32,
    /// The oldest and the youngest write of a sequential-required zone that is not part of the written
    /// prefix.
    pub(crate) head: u32,
    pub(crate) tail: u32,
    /// Reads, and writes that are neither acknowledged nor failed.
    pub(crate) refs: u32,
    /// Writes whose I/O is not over: in a sequential-required zone only those above a failed one, in a
    /// sequential-preferred zone and in a random write area all.
    pub(crate) outstanding: u32,
}

#[cfg(not(feature = "shuttle"))]
const _: () = assert!(size_of::<Zone>() <= 64);

impl Conditions for Zones {
    fn condition(&self, zone: ZoneNo) -> Condition {
        Condition::of_bits(self.0[zone.0 as usize].condition.load(Ordering::Acquire))
    }

    fn set_condition(&self, zone: ZoneNo, condition: Condition) {
        self.0[zone.0 as usize]
            .condition
            .store(condition as u8, Ordering::Release);
    }
}

/// How many zones hold the device's resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resources {
    /// Open zones, implicitly or explicitly.
    pub open: u32,
    /// Open or closed zones. May be above the limit where an image was opened, or a zone was set to normal,
    /// with too many closed zones; no further zone becomes active then until it has fallen.
    pub active: u32,
}

impl Engine {
    /// Makes the state of all zones from what persisted of them. Zones that were open come back closed.
    /// More closed zones than the active limit allows are accepted, since the data is there.
    ///
    /// # Errors
    /// A record that no zone of this geometry can have; too many zones for the memory.
    pub fn new(
        geometry: Geometry,
        mut initial: impl FnMut(ZoneNo) -> ZoneRecord,
    ) -> Result<Self, RecordError> {
        let nr_zones = geometry.nr_zones();
        let accounting = Accounting::new(&geometry);
        let mut zones = Vec::new();
        zones
            .try_reserve_exact(nr_zones as usize)
            .map_err(|_| RecordError::NoMemory { zones: nr_zones })?;
        for zone in geometry.zones() {
            let record = initial(zone);
            check_record(&geometry, zone, &record)?;
            let condition = record.condition(geometry.zone_type(zone), geometry.capacity(zone));
            accounting.count_initial(condition, record.zrwa);
            zones.push(Zone::new(&record, condition));
        }
        Ok(Self {
            id: EngineId::new(),
            zones: Zones(zones),
            accounting,
            dirty: Dirty::new(nr_zones),
            arena: Arc::new(Arena::new()),
            conventional: Mutex::new(()),
            notes_seen: AtomicU64::new(lost::notes()),
            abandoned: Mutex::new(Vec::new()),
            formats: Box::new([geometry]),
            format: AtomicU8::new(0),
            geometry,
        })
    }

    /// Reserves the places of `n` writes in flight, for one lane. The pool is empty (its capacity says so)
    /// where `n` is more than what is left of [`MAX_SLOTS`](crate::MAX_SLOTS).
    pub fn slots(&self, n: u32) -> SlotPool {
        self.collect_lost();
        SlotPool::new(&self.arena, n)
    }

    /// What became of a write that had to wait. A value ends the wait: its slot goes back to the pool, and
    /// asking again gives none.
    pub fn outcome(&self, pending: &Pending) -> Option<Result<(), i32>> {
        debug_assert_eq!(pending.engine, self.id, "the write belongs to another engine");
        let slot = pending.slot.get();
        if slot == NIL {
            return None;
        }
        let State::Ready(errno) = self.arena.slot(slot).state() else {
            return None;
        };
        pending.slot.set(NIL);
        self.arena.release(slot);
        Some(if errno == 0 { Ok(()) } else { Err(errno) })
    }

    /// How many zones hold resources now.
    pub fn resources(&self) -> Resources {
        let (open, active) = self.accounting.counts();
        Resources { open, active }
    }

    pub(crate) fn lock(&self, no: ZoneNo) -> Locked<'_> {
        let zone = &self.zones.0[no.0 as usize];
        Locked {
            no,
            zone,
            seq: lock(&zone.seq),
        }
    }

    /// Looks whether a token of this engine was dropped since the last time.
    pub(crate) fn check_lost(&self) {
        let notes = lost::notes();
        if notes != self.notes_seen.load(Ordering::Relaxed) {
            // Seen before they are taken: a note that comes in between is looked for once more.
            self.notes_seen.store(notes, Ordering::Relaxed);
            self.collect_lost();
        }
    }

    #[cold]
    pub(crate) fn collect_lost(&self) {
        let mut requests = Vec::new();
        self.id.collect(|lost| match lost {
            Lost::Request(first, last) => requests.push((first, last)),
            Lost::Wait(slot) => lock(&self.abandoned).push(slot),
        });
        self.release_abandoned();
        for (first, last) in requests {
            (first.0..=last.0).for_each(|zone| self.lock(ZoneNo(zone)).set(POISONED));
        }
    }

    /// Frees the slots that nobody waits for any more and whose writes are over.
    pub(crate) fn release_abandoned(&self) {
        lock(&self.abandoned).retain(|&slot| {
            let over = matches!(self.arena.slot(slot).state(), State::Ready(_));
            if over {
                self.arena.release(slot);
            }
            !over
        });
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.id.collect(|_| ());
    }
}

impl Zone {
    fn new(record: &ZoneRecord, condition: Condition) -> Self {
        let seq = Seq {
            next: record.written,
            done: record.written,
            bytes_written: record.counters.bytes_written,
            resets: record.counters.resets,
            finishes: record.counters.finishes,
            head: NIL,
            tail: NIL,
            refs: 0,
            outstanding: 0,
        };
        Self {
            seq: Mutex::new(seq),
            condition: AtomicU8::new(condition as u8),
            flags: AtomicU16::new(lasting_flags(record)),
            extension: AtomicU32::new(record.extension.unwrap_or(0)),
        }
    }
}

/// The flags that come from a record.
const LASTING: u16 = FINISHED | ZRWA | EXTENSION | BY_DEVICE | ADVISE_FINISH | ADVISE_RESET;

fn lasting_flags(record: &ZoneRecord) -> u16 {
    let flag = |set: bool, flag: u16| if set { flag } else { 0 };
    flag(record.finished, FINISHED)
        | flag(record.zrwa, ZRWA)
        | flag(record.extension.is_some(), EXTENSION)
        | flag(record.finished_by_device, BY_DEVICE)
        | match record.recommended {
            None => 0,
            Some(Recommendation::Finish) => ADVISE_FINISH,
            Some(Recommendation::Reset) => ADVISE_RESET,
        }
}

/// A zone with its lock held.
pub(crate) struct Locked<'a> {
    pub(crate) no: ZoneNo,
    zone: &'a Zone,
    seq: MutexGuard<'a, Seq>,
}

impl Locked<'_> {
    /// The condition. Until the lock is released it can only change from implicitly open to closed.
    pub(crate) fn condition(&self) -> Condition {
        Condition::of_bits(self.zone.condition.load(Ordering::Acquire))
    }

    /// Whether one of these flags is set.
    pub(crate) fn is(&self, flag: u16) -> bool {
        self.zone.flags.load(Ordering::Relaxed) & flag != 0
    }

    pub(crate) fn set(&mut self, flag: u16) {
        self.zone
            .flags
            .store(self.zone.flags.load(Ordering::Relaxed) | flag, Ordering::Relaxed);
    }

    pub(crate) fn clear(&mut self, flag: u16) {
        self.zone
            .flags
            .store(self.zone.flags.load(Ordering::Relaxed) & !flag, Ordering::Relaxed);
    }

    /// That no exclusive operation has the zone.
    pub(crate) fn not_busy(&self) -> Result<(), Refused> {
        if self.is(BUSY) {
            Err(Refused::Busy(self.no))
        } else {
            Ok(())
        }
    }

    /// That the zone takes writes at all, now.
    pub(crate) fn admits_writes(&self) -> Result<(), Refused> {
        if self.is(POISONED) {
            return Err(ZoneError::Poisoned { zone: self.no }.into());
        }
        if self.is(BUSY | FAILING) {
            Err(Refused::Busy(self.no))
        } else {
            Ok(())
        }
    }

    /// Ends `n` requests. Whether an exclusive operation waited for just that.
    #[must_use]
    pub(crate) fn release(&mut self, n: u32) -> bool {
        self.refs -= n;
        self.refs == 0 && self.is(BUSY)
    }

    /// Takes from a record what is not a position, a counter or a condition.
    pub(crate) fn set_lasting(&mut self, record: &ZoneRecord) {
        self.clear(LASTING);
        self.set(lasting_flags(record));
        let extension = record.extension.unwrap_or(0);
        self.zone.extension.store(extension, Ordering::Relaxed);
    }

    fn recommended(&self) -> Option<Recommendation> {
        if self.is(ADVISE_FINISH) {
            Some(Recommendation::Finish)
        } else if self.is(ADVISE_RESET) {
            Some(Recommendation::Reset)
        } else {
            None
        }
    }

    pub(crate) fn attributes(&self) -> Attributes {
        Attributes {
            finished_by_device: self.is(BY_DEVICE),
            recommended: self.recommended(),
            zrwa: self.is(ZRWA),
            extension: self.is(EXTENSION),
        }
    }

    /// Whether the zone has something that an empty one cannot have, though nothing is written.
    pub(crate) fn is_more_than_empty(&self) -> bool {
        self.is(ZRWA | EXTENSION)
    }

    pub(crate) fn record(&self) -> ZoneRecord {
        let condition = self.condition();
        let checksum = self.zone.extension.load(Ordering::Relaxed);
        ZoneRecord {
            written: self.done,
            finished: self.is(FINISHED),
            read_only: condition == Condition::ReadOnly,
            offline: condition == Condition::Offline,
            zrwa: self.is(ZRWA),
            extension: self.is(EXTENSION).then_some(checksum),
            finished_by_device: self.is(BY_DEVICE),
            recommended: self.recommended(),
            counters: self.counters(),
        }
    }

    pub(crate) fn counters(&self) -> Counters {
        Counters {
            resets: self.resets,
            finishes: self.finishes,
            bytes_written: self.bytes_written,
        }
    }
}

impl Deref for Locked<'_> {
    type Target = Seq;
    fn deref(&self) -> &Seq {
        &self.seq
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Seq {
        &mut self.seq
    }
}

pub(crate) fn check_record(
    geometry: &Geometry,
    zone: ZoneNo,
    record: &ZoneRecord,
) -> Result<(), RecordError> {
    let written = record.written;
    if geometry.zone_type(zone) == ZoneType::Conventional {
        let plain = written == 0
            && !record.finished
            && !record.zrwa
            && record.extension.is_none()
            && !record.finished_by_device
            && record.recommended.is_none();
        return if plain {
            Ok(())
        } else {
            Err(RecordError::Conventional { zone })
        };
    }
    let capacity = geometry.capacity(zone);
    if written > capacity {
        return Err(RecordError::BeyondCapacity {
            zone,
            written,
            capacity,
        });
    }
    let granularity = geometry.block_size();
    if !written.is_multiple_of(u64::from(granularity)) {
        return Err(RecordError::Unaligned {
            zone,
            written,
            granularity,
        });
    }
    let may_have_area =
        |area: Zrwa| !record.finished && written < capacity && written.is_multiple_of(area.granularity);
    if record.zrwa && !geometry.zrwa().is_some_and(may_have_area) {
        return Err(RecordError::RandomWriteArea { zone });
    }
    if record.extension.is_some() && geometry.extension_size() == 0 {
        return Err(RecordError::Extension { zone });
    }
    Ok(())
}
