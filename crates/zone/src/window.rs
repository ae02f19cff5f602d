//! Random write areas (ZNS 1.2, zone random write area): the writes in them, and the write pointer that moves behind them.
//!
//! An area is the window of the zone that begins at the write pointer: there blocks are written in any order, and again.
//! Behind it lies a region of the same size; a write that ends there moves the pointer, by as few granules as bring its
//! end into the area. A commit moves it by command. What was in the area and was never written reads as zeros: whoever
//! allocates an area makes the zone zeros from its pointer on, so that the window needs no care when it moves.
//!
//! The pointer that counts for admission (`next`) moves when a write is admitted; the one that is shown and lasts (`done`)
//! when it is written, before it is acknowledged. Writes in the area are on their own: nobody waits for another one, and a
//! failure is that write's alone.

use crate::engine::{Engine, Locked, ZRWA};
use crate::error::{Refused, ZoneError};
use crate::permit::{Events, Order, Prefix, WritePermit};
use crate::rules::{Writable, writable};
use crate::types::{Condition, ZoneNo};

impl Engine {
    /// The end of the bytes of a zone that can hold data, from its start.
    pub(crate) fn data_len(&self, z: &Locked<'_>) -> u64 {
        self.geometry.data_len(z.no, z.done, z.is(ZRWA))
    }

    /// Reserves an area for the zone and opens it, with the resources that this takes.
    pub(crate) fn reserve_area(&self, zone: ZoneNo, condition: Condition) -> Result<(), ZoneError> {
        if self.geometry.zrwa().is_none() {
            return Err(ZoneError::NoRandomWriteArea { zone });
        }
        if condition == Condition::Full {
            return Err(ZoneError::InvalidTransition { zone, condition });
        }
        let mut change = self.accounting.change(&self.zones);
        if !condition.is_open() {
            change.available(condition)?;
        }
        // Before the zone is opened, which may close another one.
        change.area_available(zone)?;
        change.open(zone, Condition::ExplicitlyOpen)?;
        change.take_area();
        Ok(())
    }

    /// Undoes [`Engine::reserve_area`] for a zone that was in that condition before.
    pub(crate) fn return_area(&self, z: &mut Locked<'_>, before: Condition) {
        let mut change = self.accounting.change(&self.zones);
        change.release_area();
        if change.condition(z.no) != Condition::ExplicitlyOpen {
            return;
        }
        // Its writes in flight may have failed meanwhile, which left an open zone alone.
        let before = match before {
            Condition::ImplicitlyOpen if z.done == 0 && !z.is_more_than_empty() => Condition::Empty,
            before => before,
        };
        change.set(z.no, before);
    }

    /// Admits a write to a zone that has an area; an append has no offset.
    pub(crate) fn admit_window(
        &self,
        mut z: Locked<'_>,
        offset: Option<u64>,
        len: u64,
    ) -> Result<WritePermit, Refused> {
        let zone = z.no;
        let condition = z.condition();
        let Some(area) = self.geometry.zrwa() else {
            return Err(ZoneError::RandomWriteArea { zone }.into());
        };
        let start = self.geometry.start(zone);
        let place = Writable {
            zone,
            condition,
            wp: start + z.next,
            end: start + self.geometry.capacity(zone),
        };
        let offset = place.place_in_area(offset, len, area)?;
        let (pointer, end) = (z.next, offset - start + len);
        self.open_for_write(zone, condition)?;
        let pointer = match end.checked_sub(pointer + area.size) {
            // At most the write's own end, since an area is whole granules.
            Some(over) => pointer + over.next_multiple_of(area.granularity),
            None => pointer,
        };
        z.next = pointer;
        z.outstanding += 1;
        z.refs += 1;
        Ok(WritePermit {
            engine: self.id,
            zone,
            offset,
            len,
            order: Order::Window { pointer },
        })
    }

    /// Moves the write pointer of a zone with an area to byte `end` of the device, which lies in the area or at its end:
    /// whole granules from the zone's start, or the end of the capacity, which makes the zone full. Make the run
    /// state hold it, then acknowledge.
    ///
    /// # Errors
    /// Range, conventional, offline, read-only, no area; not whole granules, outside of the area; no resources to open a
    /// closed zone. `Busy`: try later.
    pub fn commit_zrwa(&self, end: u64, events: &impl Events) -> Result<Prefix, Refused> {
        let last = end.checked_sub(1).unwrap_or(u64::MAX);
        self.geometry.range(last, 1)?;
        let zone = self.geometry.zone_of(last);
        if self.geometry.is_conventional(zone) {
            return Err(ZoneError::Conventional { zone }.into());
        }
        self.check_lost();
        let mut z = self.lock(zone);
        z.admits_writes()?;
        let condition = z.condition();
        writable(zone, condition)?;
        let Some(area) = self.geometry.zrwa().filter(|_| z.is(ZRWA)) else {
            return Err(ZoneError::NotRandomWritable { zone }.into());
        };
        let start = self.geometry.start(zone);
        let place = Writable {
            zone,
            condition,
            wp: start + z.next,
            end: start + self.geometry.capacity(zone),
        };
        place.commits(start, end, area)?;
        let to = end - start;
        self.open_for_write(zone, condition)?;
        z.next = to;
        z.refs += 1;
        self.grow(&mut z, to, 0, events);
        Ok(self.unordered(zone, zone, to, true))
    }
}
