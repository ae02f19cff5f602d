//! Open, close, and the operations that need a zone for themselves.

use crate::engine::{BUSY, Engine, Locked, POISONED, ZRWA, check_record};
use crate::error::{RecordError, Refused, ZoneError};
use crate::permit::{Events, ExclusivePermit, used};
use crate::sync::lock;
use crate::types::{CloseEmpty, Condition, ExclusiveOp, Recommendation, ZoneNo, ZoneRecord};

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
            let untouched = z.next == 0 && z.done == 0 && !z.is_more_than_empty();
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
    /// [`Engine::record_after`] durable, and commit; or abort, as [`Engine::confirm`] may demand. None where there is nothing to do: a reset of
    /// an empty zone, a finish of a full one, a condition that the zone has already.
    ///
    /// [`ExclusiveOp::Finish`] of an empty zone needs resources to be available, as opening it would, but neither keeps
    /// them nor closes another zone for them.
    ///
    /// # Errors
    /// For all but what the operator does to any zone: conventional, offline, read-only, a condition that does not allow it,
    /// no resources. `Busy`: another operation has the zone, try later. `Poisoned`: the zone would never be drained.
    pub fn begin(&self, zone: ZoneNo, op: ExclusiveOp) -> Result<Option<ExclusivePermit>, Refused> {
        self.check_lost();
        // Requests that span conventional zones rely on this one to keep them as they are.
        let _conventional = self
            .geometry
            .is_conventional(zone)
            .then(|| lock(&self.conventional));
        let mut z = match op {
            ExclusiveOp::Reset
            | ExclusiveOp::Finish
            | ExclusiveOp::FinishUnlimited
            | ExclusiveOp::FinishByDevice
            | ExclusiveOp::OpenZrwa
            | ExclusiveOp::SetExtension { .. }
            | ExclusiveOp::Recommend(_) => self.managed(zone)?,
            ExclusiveOp::Format if self.geometry.is_conventional(zone) => {
                return Err(ZoneError::Conventional { zone }.into());
            }
            ExclusiveOp::Format
            | ExclusiveOp::SetReadOnly
            | ExclusiveOp::SetOffline
            | ExclusiveOp::SetNormal => self.lock(zone),
        };
        z.not_busy()?;
        if z.is(POISONED) {
            return Err(ZoneError::Poisoned { zone }.into());
        }
        let condition = z.condition();
        let nothing_to_do = match op {
            ExclusiveOp::Reset => condition == Condition::Empty,
            ExclusiveOp::Finish | ExclusiveOp::FinishUnlimited | ExclusiveOp::FinishByDevice => {
                condition == Condition::Full
            }
            ExclusiveOp::Format | ExclusiveOp::OpenZrwa | ExclusiveOp::SetExtension { .. } => false,
            ExclusiveOp::Recommend(what) => z.attributes().recommended == what,
            ExclusiveOp::SetReadOnly => condition == Condition::ReadOnly,
            ExclusiveOp::SetOffline => condition == Condition::Offline,
            ExclusiveOp::SetNormal => !matches!(condition, Condition::ReadOnly | Condition::Offline),
        };
        if nothing_to_do {
            return Ok(None);
        }
        match op {
            ExclusiveOp::Finish if condition == Condition::Empty => {
                self.accounting.change(&self.zones).available(condition)?;
            }
            ExclusiveOp::OpenZrwa if z.is(ZRWA) => {
                let mut change = self.accounting.change(&self.zones);
                change.open(zone, Condition::ExplicitlyOpen)?;
                return Ok(None);
            }
            ExclusiveOp::OpenZrwa => self.reserve_area(zone, condition)?,
            ExclusiveOp::SetExtension { zrwa, .. } => self.reserve_closed(zone, condition, zrwa)?,
            ExclusiveOp::Recommend(what) => recommendable(zone, condition, what)?,
            _ => {}
        }
        z.set(BUSY);
        Ok(Some(ExclusivePermit {
            engine: self.id,
            zone,
            op,
            before: condition,
        }))
    }

    /// What could not be told before the zone was drained, as its last writes may have filled it, or failed: an area begins at
    /// a multiple of its granularity, in a zone that is not full; and what is recommended makes sense.
    ///
    /// # Errors
    /// Why the operation must be aborted.
    pub fn confirm(&self, permit: &ExclusivePermit) -> Result<(), ZoneError> {
        let (zone, z) = (permit.zone, self.lock(permit.zone));
        if let ExclusiveOp::Recommend(what) = permit.op {
            return recommendable(zone, z.condition(), what);
        }
        let Some(area) = self
            .geometry
            .zrwa()
            .filter(|_| permit.op == ExclusiveOp::OpenZrwa)
        else {
            return Ok(());
        };
        if z.condition() == Condition::Full {
            let condition = Condition::Full;
            return Err(ZoneError::InvalidTransition { zone, condition });
        }
        if !z.done.is_multiple_of(area.granularity) {
            return Err(ZoneError::Unaligned {
                offset: self.geometry.start(zone) + z.done,
                len: 0,
                granularity: u32::try_from(area.granularity).unwrap_or(u32::MAX),
            });
        }
        Ok(())
    }

    /// Whether all requests of the zone have ended. [`Events::zone_changed`] says when to look again.
    pub fn drained(&self, permit: &ExclusivePermit) -> bool {
        self.lock(permit.zone).refs == 0
    }

    /// The zone's record as the commit will make it. Final once the zone is drained.
    pub fn record_after(&self, permit: &ExclusivePermit) -> ZoneRecord {
        self.after(permit.op, &self.lock(permit.zone))
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
        let record = self.after(permit.op, &z);
        if permit.op.allocates() {
            // Its area was counted when it was reserved.
            z.set(ZRWA);
        }
        let condition = match permit.op {
            ExclusiveOp::OpenZrwa | ExclusiveOp::Recommend(_) => None,
            _ => Some(self.at_rest(zone, &record)),
        };
        self.take_over(&mut z, &record, condition);
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
        self.take_over(&mut z, record, Some(self.at_rest(zone, record)));
        Ok(())
    }

    /// Whether a zone of this geometry can have such a record.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn check(&self, zone: ZoneNo, record: &ZoneRecord) -> Result<(), RecordError> {
        check_record(self.geometry(), zone, record)
    }

    /// The condition of a zone with that record that nobody has open.
    fn at_rest(&self, zone: ZoneNo, record: &ZoneRecord) -> Condition {
        record.condition(self.geometry.zone_type(zone), self.geometry.capacity(zone))
    }

    /// Without a condition the zone keeps the one that it has, which an eviction may change until the accounting's lock is held.
    fn take_over(&self, z: &mut Locked<'_>, record: &ZoneRecord, condition: Option<Condition>) {
        z.done = record.written;
        z.next = record.written;
        z.bytes_written = record.counters.bytes_written;
        z.resets = record.counters.resets;
        z.finishes = record.counters.finishes;
        let mut change = self.accounting.change(&self.zones);
        match (z.is(ZRWA), record.zrwa) {
            (true, false) => change.release_area(),
            (false, true) => change.take_area(),
            (true, true) | (false, false) => {}
        }
        z.set_lasting(record);
        if let Some(condition) = condition {
            change.set(z.no, condition);
        }
        drop(change);
        self.dirty.mark(z.no);
    }

    /// Lets requests in again and leaves the zone as it is.
    pub fn abort(&self, permit: ExclusivePermit, events: &impl Events) {
        debug_assert_eq!(permit.engine, self.id, "the permit belongs to another engine");
        let mut z = self.lock(permit.zone);
        match permit.op {
            ExclusiveOp::OpenZrwa => self.return_area(&mut z, permit.before),
            ExclusiveOp::SetExtension { zrwa, .. } => {
                let mut change = self.accounting.change(&self.zones);
                change.set(permit.zone, permit.before);
                if zrwa {
                    change.release_area();
                }
            }
            _ => {}
        }
        self.end_exclusive(z, permit, events);
    }

    /// The zone's record as the operation leaves it.
    fn after(&self, op: ExclusiveOp, z: &Locked<'_>) -> ZoneRecord {
        let mut record = z.record();
        match op {
            ExclusiveOp::Reset => {
                let mut counters = record.counters;
                counters.resets = counters.resets.saturating_add(1);
                record = ZoneRecord {
                    counters,
                    ..ZoneRecord::default()
                };
            }
            ExclusiveOp::Format => {
                let mut erased = ZoneRecord {
                    offline: record.offline || record.read_only,
                    counters: record.counters,
                    ..ZoneRecord::default()
                };
                // Most zones are empty already, and nothing of them has to be written then.
                if erased != record {
                    erased.counters.resets = erased.counters.resets.saturating_add(1);
                }
                record = erased;
            }
            ExclusiveOp::Finish | ExclusiveOp::FinishUnlimited | ExclusiveOp::FinishByDevice => {
                record.written = self.data_len(z);
                record.zrwa = false;
                record.finished = true;
                record.finished_by_device |= op == ExclusiveOp::FinishByDevice;
                record.recommended = record.recommended.filter(|what| *what != Recommendation::Finish);
                record.counters.finishes = record.counters.finishes.saturating_add(1);
            }
            ExclusiveOp::OpenZrwa => record.zrwa = true,
            ExclusiveOp::SetExtension { checksum, zrwa } => {
                record.extension = Some(checksum);
                record.zrwa |= zrwa;
            }
            ExclusiveOp::Recommend(what) => record.recommended = what,
            ExclusiveOp::SetReadOnly => (record.read_only, record.offline) = (true, false),
            ExclusiveOp::SetOffline => (record.read_only, record.offline) = (false, true),
            ExclusiveOp::SetNormal => (record.read_only, record.offline) = (false, false),
        }
        record
    }

    /// Takes the resources of a zone that gets a descriptor extension, and maybe a random write area.
    fn reserve_closed(&self, zone: ZoneNo, condition: Condition, zrwa: bool) -> Result<(), ZoneError> {
        if condition != Condition::Empty || self.geometry.extension_size() == 0 {
            return Err(ZoneError::InvalidTransition { zone, condition });
        }
        if zrwa && self.geometry.zrwa().is_none() {
            return Err(ZoneError::NoRandomWriteArea { zone });
        }
        let mut change = self.accounting.change(&self.zones);
        change.active_available(condition)?;
        if zrwa {
            change.area_available(zone)?;
            change.take_area();
        }
        change.set(zone, Condition::Closed);
        Ok(())
    }

    fn end_exclusive(&self, mut z: Locked<'_>, permit: ExclusivePermit, events: &impl Events) {
        z.clear(BUSY);
        drop(z);
        events.zone_changed(permit.zone);
        used(permit);
    }
}

/// Whether the device may recommend that of a zone in this condition (ZNS 1.2, 5.4 and 5.5).
fn recommendable(zone: ZoneNo, condition: Condition, what: Option<Recommendation>) -> Result<(), ZoneError> {
    let fits = match what {
        None => true,
        Some(Recommendation::Finish) => condition.is_active(),
        Some(Recommendation::Reset) => condition.is_active() || condition == Condition::Full,
    };
    match fits {
        true => Ok(()),
        false => Err(ZoneError::InvalidTransition { zone, condition }),
    }
}
