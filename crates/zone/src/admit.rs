//! Admission: what may be written and read, in the order in which the rules are checked.

use crate::engine::{Engine, ZRWA};
use crate::error::{Refused, ZoneError};
use crate::permit::{Order, ReadPermit, WritePermit};
use crate::rules::{Appends, Writable, blocks, writable};
use crate::slots::{NIL, SlotPool};
use crate::sync::lock;
use crate::types::{Condition, ZoneNo, ZoneType};

impl Engine {
    /// Admits a write. It may lie in one sequential zone or span conventional ones.
    ///
    /// # Errors
    /// The first rule that it breaks: range, alignment, zone boundary, offline, read-only, full, not at the
    /// write pointer (or outside of the random write area), beyond the capacity, active resources, open resources. `Busy`
    /// and `NoSlot`: try later.
    pub fn admit_write(&self, pool: &mut SlotPool, offset: u64, len: u64) -> Result<WritePermit, Refused> {
        let end = self.geometry.range(offset, len)?;
        blocks(offset, len, self.geometry().block_size())?;
        let zone = self.geometry.zone_of(offset);
        let kind = self.geometry.zone_type(zone);
        if kind == ZoneType::Conventional {
            return self.admit_conventional(zone, offset, len);
        }
        let zone_end = self.geometry.end(zone);
        if end > zone_end {
            return Err(ZoneError::Boundary {
                zone,
                offset,
                len,
                end: zone_end,
            }
            .into());
        }
        self.check_lost();
        if kind == ZoneType::SequentialPreferred {
            return self.admit_preferred(zone, offset, len);
        }
        self.admit_ordered(pool, zone, Some(offset), len)
    }

    /// Admits a zone append: a write to wherever the zone's next one goes, which the permit's offset says.
    ///
    /// # Errors
    /// The first rule that it breaks: range, zone start, conventional, not sequential-required, no append,
    /// alignment, too large, a random write area, then as for a write.
    pub fn admit_append(
        &self,
        pool: &mut SlotPool,
        zone_start: u64,
        len: u64,
    ) -> Result<WritePermit, Refused> {
        let zone = self.geometry.zone_at(zone_start)?;
        let appends = Appends {
            max: self.geometry.max_append(),
            granularity: self.geometry().block_size(),
        };
        appends.check(zone, self.geometry.zone_type(zone), zone_start, len)?;
        self.check_lost();
        self.admit_ordered(pool, zone, None, len)
    }

    /// A write to a sequential-required zone, at `offset` or wherever the next one goes.
    fn admit_ordered(
        &self,
        pool: &mut SlotPool,
        zone: ZoneNo,
        offset: Option<u64>,
        len: u64,
    ) -> Result<WritePermit, Refused> {
        debug_assert!(
            std::sync::Arc::ptr_eq(&pool.arena, &self.arena),
            "the pool belongs to another engine"
        );
        let start = self.geometry.start(zone);
        let mut z = self.lock(zone);
        z.admits_writes()?;
        // Once more: the device may have got blocks of another size since.
        blocks(offset.unwrap_or(start), len, self.geometry().block_size())?;
        if z.is(ZRWA) {
            return self.admit_window(z, offset, len);
        }
        let condition = z.condition();
        let writable = Writable {
            zone,
            condition,
            wp: start + z.next,
            end: start + self.geometry.capacity(zone),
        };
        let offset = writable.place(offset, len)?;
        let next = z.next + len;
        let Some(slot) = self.take_slot(pool) else {
            return Err(Refused::NoSlot);
        };
        if let Err(error) = self.open_for_write(zone, condition) {
            pool.put_back(slot);
            return Err(error.into());
        }
        self.arena.slot(slot).start(next);
        match z.tail {
            NIL => z.head = slot,
            tail => self.arena.slot(tail).set_next(slot),
        }
        z.tail = slot;
        z.next = next;
        z.refs += 1;
        Ok(WritePermit {
            engine: self.id,
            zone,
            offset,
            len,
            order: Order::Required { slot },
        })
    }

    /// A write to a sequential-preferred zone, below, at or above the pointer.
    fn admit_preferred(&self, zone: ZoneNo, offset: u64, len: u64) -> Result<WritePermit, Refused> {
        let start = self.geometry.start(zone);
        let mut z = self.lock(zone);
        z.admits_writes()?;
        let condition = z.condition();
        writable(zone, condition)?;
        let end = offset - start + len;
        let capacity = self.geometry.capacity(zone);
        if end > capacity {
            return Err(ZoneError::ExceedsCapacity {
                zone,
                offset,
                len,
                end: start + capacity,
            }
            .into());
        }
        if condition != Condition::Full {
            self.open_for_write(zone, condition)?;
        }
        let next = start + z.next;
        z.next = z.next.max(end);
        z.outstanding += 1;
        z.refs += 1;
        Ok(WritePermit {
            engine: self.id,
            zone,
            offset,
            len,
            order: Order::Preferred { next },
        })
    }

    /// A write to conventional zones.
    fn admit_conventional(&self, zone: ZoneNo, offset: u64, len: u64) -> Result<WritePermit, Refused> {
        let last = self.conventional_span(zone, offset, len)?;
        self.check_lost();
        self.enter_conventional(zone, last, |z| {
            z.admits_writes()?;
            Ok(writable(z.no, z.condition())?)
        })?;
        Ok(WritePermit {
            engine: self.id,
            zone,
            offset,
            len,
            order: Order::Conventional { last },
        })
    }

    /// Admits a read of one sequential zone or of conventional ones. It need not be whole blocks.
    ///
    /// # Errors
    /// Range, zone boundary, offline. `Busy`: try later.
    pub fn admit_read(&self, offset: u64, len: u64) -> Result<ReadPermit, Refused> {
        let end = self.geometry.range(offset, len)?;
        let zone = self.geometry.zone_of(offset);
        let permit = |last, data_len| ReadPermit {
            engine: self.id,
            zone,
            last,
            data_len,
        };
        if self.geometry.is_conventional(zone) {
            let last = self.conventional_span(zone, offset, len)?;
            self.enter_conventional(zone, last, |z| {
                z.not_busy()?;
                Ok(readable(z.no, z.condition())?)
            })?;
            return Ok(permit(last, len));
        }
        let zone_end = self.geometry.end(zone);
        if end > zone_end {
            return Err(ZoneError::Boundary {
                zone,
                offset,
                len,
                end: zone_end,
            }
            .into());
        }
        let mut z = self.lock(zone);
        z.not_busy()?;
        readable(zone, z.condition())?;
        z.refs += 1;
        let written_end = self.geometry.start(zone) + self.data_len(&z);
        Ok(permit(zone, written_end.saturating_sub(offset).min(len)))
    }

    /// The last zone of a request that starts in a conventional one.
    fn conventional_span(&self, first: ZoneNo, offset: u64, len: u64) -> Result<ZoneNo, ZoneError> {
        let last = self.geometry.zone_of(offset + len.saturating_sub(1));
        if self.geometry.is_conventional(last.max(first)) {
            return Ok(last.max(first));
        }
        let zone = ZoneNo(self.geometry.nr_conventional() - 1);
        Err(ZoneError::Boundary {
            zone,
            offset,
            len,
            end: self.geometry.end(zone),
        })
    }

    /// Takes a place in all of these zones or in none.
    fn enter_conventional(
        &self,
        first: ZoneNo,
        last: ZoneNo,
        check: impl Fn(&crate::engine::Locked<'_>) -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        if first == last {
            let mut z = self.lock(first);
            check(&z)?;
            z.refs += 1;
            return Ok(());
        }
        // Nothing can close one of the zones while this is held, so what was checked stays true.
        let _unchanged = lock(&self.conventional);
        for zone in first.0..=last.0 {
            check(&self.lock(ZoneNo(zone)))?;
        }
        for zone in first.0..=last.0 {
            self.lock(ZoneNo(zone)).refs += 1;
        }
        Ok(())
    }

    /// Makes sure that the zone is open and counts as just used. Called under its lock.
    pub(crate) fn open_for_write(&self, zone: ZoneNo, condition: Condition) -> Result<(), ZoneError> {
        if condition.is_open() {
            self.accounting.touch(zone);
            return Ok(());
        }
        self.accounting
            .change(&self.zones)
            .open(zone, Condition::ImplicitlyOpen)
    }

    fn take_slot(&self, pool: &mut SlotPool) -> Option<u32> {
        pool.take().or_else(|| self.take_abandoned(pool))
    }

    #[cold]
    fn take_abandoned(&self, pool: &mut SlotPool) -> Option<u32> {
        self.release_abandoned();
        pool.take()
    }
}

fn readable(zone: ZoneNo, condition: Condition) -> Result<(), ZoneError> {
    if condition == Condition::Offline {
        Err(ZoneError::Offline { zone })
    } else {
        Ok(())
    }
}
