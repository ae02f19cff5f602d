//! Open, close, and the operations that need a zone for themselves.

use crate::engine::{BUSY, Engine, FINISHED, Locked, POISONED, check_record};
use crate::error::{RecordError, Refused, ZoneError};
use crate::permit::{Events, ExclusivePermit, used};
use crate::sync::lock;
use crate::types::{CloseEmpty, Condition, ExclusiveOp, ZoneNo, ZoneRecord};

impl Engine {
    /// Opens a zone explicitly. Writes in flight do not matter.
    ///
    /// # Errors
    /// Conventional, offline, read-only; full (as an invalid transition); no resources. `Busy`: try later.
    pub fn open(&self, zone: ZoneNo) -> Result<(), Refused> {
        let z = self.managed(zone)?;
        let condition = z.condition();
        if condition == Condition::Full {
            return Err(ZoneError::InvalidTransition { zone, condition }.into());
        }
        Ok(self
            .accounting
            .change(&self.zones)
            .open(zone, Condition::ExplicitlyOpen)?)
    }

    /// Closes a zone. One that is not open stays as it is. Writes in flight complete; what becomes of an open
    /// zone to which nothing was admitted yet is the caller's choice.
    ///
    /// # Errors
    /// Conventional, offline, read-only. `Busy`: try later.
    pub fn close(&self, zone: ZoneNo, empty: CloseEmpty) -> Result<(), Refused> {
        let z = self.managed(zone)?;
        let mut change = self.accounting.change(&self.zones);
        if change.condition(zone).is_open() {
            let untouched = z.next == 0 && z.done == 0;
            change.set(
                zone,
                if untouched && empty == CloseEmpty::ToEmpty {
                    Condition::Empty
                } else {
                    Condition::Closed
                },
            );
        }
        Ok(())
    }

    /// A sequential zone that can be opened, closed, reset and finished, locked.
    fn managed(&self, zone: ZoneNo) -> Result<Locked<'_>, Refused> {
        if self.geometry.is_conventional(zone) {
            return Err(ZoneError::Conventional { zone }.into());
        }
        let z = self.lock(zone);
        z.not_busy()?;
        match z.condition() {
            Condition::Offline => Err(ZoneError::Offline { zone }.into()),
            Condition::ReadOnly => Err(ZoneError::ReadOnly { zone }.into()),
            _ => Ok(z),
        }
    }

    /// Closes the zone to all new requests for this operation. Then wait until [`Engine::drained`], make
    /// [`Engine::record_after`] durable, and commit; or abort. None where there is nothing to do: a reset of
    /// an empty zone, a finish of a full one, a condition that the zone has already.
    ///
    /// [`ExclusiveOp::Finish`] of an empty zone needs resources to be available, as opening it would, but neither keeps
    /// them nor closes another zone for them.
    ///
    /// # Errors
    /// For reset and finish: conventional, offline, read-only, no resources. `Busy`: another operation has the
    /// zone, try later. `Poisoned`: the zone would never be drained.
    pub fn begin(&self, zone: ZoneNo, op: ExclusiveOp) -> Result<Option<ExclusivePermit>, Refused> {
        self.check_lost();
        // Requests that span conventional zones rely on this one to keep them as they are.
        let _conventional = self
            .geometry
            .is_conventional(zone)
            .then(|| lock(&self.conventional));
        let mut z = match op {
            ExclusiveOp::Reset | ExclusiveOp::Finish | ExclusiveOp::FinishUnlimited => self.managed(zone)?,
            _ => self.lock(zone),
        };
        z.not_busy()?;
        if z.is(POISONED) {
            return Err(ZoneError::Poisoned { zone }.into());
        }
        let condition = z.condition();
        let nothing_to_do = match op {
            ExclusiveOp::Reset => condition == Condition::Empty,
            ExclusiveOp::Finish | ExclusiveOp::FinishUnlimited => condition == Condition::Full,
            ExclusiveOp::SetReadOnly => condition == Condition::ReadOnly,
            ExclusiveOp::SetOffline => condition == Condition::Offline,
            ExclusiveOp::SetNormal => !matches!(condition, Condition::ReadOnly | Condition::Offline),
        };
        if nothing_to_do {
            return Ok(None);
        }
        if op == ExclusiveOp::Finish && condition == Condition::Empty {
            self.accounting.change(&self.zones).available(condition)?;
        }
        z.set(BUSY);
        Ok(Some(ExclusivePermit {
            engine: self.id,
            zone,
            op,
        }))
    }

    /// Whether all requests of the zone have ended. [`Events::zone_changed`] says when to look again.
    pub fn drained(&self, permit: &ExclusivePermit) -> bool {
        self.lock(permit.zone).refs == 0
    }

    /// The zone's record as the commit will make it. Final once the zone is drained.
    pub fn record_after(&self, permit: &ExclusivePermit) -> ZoneRecord {
        after(permit.op, self.lock(permit.zone).record())
    }

    /// Does the operation and lets requests in again.
    ///
    /// # Panics
    /// Where the zone is not drained.
    pub fn commit(&self, permit: ExclusivePermit, events: &impl Events) {
        debug_assert_eq!(permit.engine, self.id, "the permit belongs to another engine");
        let zone = permit.zone;
        let mut z = self.lock(zone);
        assert_eq!(z.refs, 0, "zone {zone} has requests in flight");
        let record = after(permit.op, z.record());
        self.take_over(&mut z, &record);
        self.end_exclusive(z, permit, events);
    }

    /// Puts a record in the place of what the zone holds, counters included, for tools that have written the zone's
    /// bytes below the engine. As at opening, the active limit may be passed.
    ///
    /// # Errors
    /// A record that no zone of this geometry can have.
    ///
    /// # Panics
    /// Where the zone has requests in flight, or an operation has it.
    pub fn restore(&self, zone: ZoneNo, record: &ZoneRecord) -> Result<(), RecordError> {
        self.check(zone, record)?;
        let mut z = self.lock(zone);
        assert!(z.refs == 0 && !z.is(BUSY), "zone {zone} is in use");
        self.take_over(&mut z, record);
        Ok(())
    }

    /// Whether a zone of this geometry can have such a record.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn check(&self, zone: ZoneNo, record: &ZoneRecord) -> Result<(), RecordError> {
        check_record(&self.geometry, zone, record)
    }

    fn take_over(&self, z: &mut Locked<'_>, record: &ZoneRecord) {
        z.done = record.written;
        z.next = record.written;
        z.bytes_written = record.counters.bytes_written;
        z.resets = record.counters.resets;
        z.finishes = record.counters.finishes;
        if record.finished {
            z.set(FINISHED)
        } else {
            z.clear(FINISHED)
        }
        let condition = record.condition(self.geometry.zone_type(z.no), self.geometry.capacity(z.no));
        self.accounting.change(&self.zones).set(z.no, condition);
        self.dirty.mark(z.no);
    }

    /// Lets requests in again and leaves the zone as it is.
    pub fn abort(&self, permit: ExclusivePermit, events: &impl Events) {
        debug_assert_eq!(permit.engine, self.id, "the permit belongs to another engine");
        let z = self.lock(permit.zone);
        self.end_exclusive(z, permit, events);
    }

    fn end_exclusive(&self, mut z: Locked<'_>, permit: ExclusivePermit, events: &impl Events) {
        z.clear(BUSY);
        drop(z);
        events.zone_changed(permit.zone);
        used(permit);
    }
}

fn after(op: ExclusiveOp, mut record: ZoneRecord) -> ZoneRecord {
    match op {
        ExclusiveOp::Reset => {
            record.written = 0;
            record.finished = false;
            record.counters.resets = record.counters.resets.saturating_add(1);
        }
        ExclusiveOp::Finish | ExclusiveOp::FinishUnlimited => {
            record.finished = true;
            record.counters.finishes = record.counters.finishes.saturating_add(1);
        }
        ExclusiveOp::SetReadOnly => (record.read_only, record.offline) = (true, false),
        ExclusiveOp::SetOffline => (record.read_only, record.offline) = (false, true),
        ExclusiveOp::SetNormal => (record.read_only, record.offline) = (false, false),
    }
    record
}
