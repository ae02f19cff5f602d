//! The end of writes and reads: in what order writes are acknowledged, and what a failed one drags along.

use crate::engine::{ADVISE_FINISH, Engine, FAILING, Locked, ZRWA};
use crate::permit::{Completion, Events, Order, Pending, Prefix, ReadPermit, WritePermit, used};
use crate::slots::{NIL, State};
use crate::types::{Condition, ZoneNo};

impl Engine {
    /// Ends a write's I/O: its data reached the kernel, whole, or it failed with an errno (an errno of 0 is
    /// taken for `EIO`). Any thread may do it.
    ///
    /// Where it failed in a sequential-required zone, the writes above it fail too, with its errno, each only
    /// after its own completion; the zone refuses writes as busy until all of them are over, and then goes on
    /// at its written end.
    pub fn complete(&self, permit: WritePermit, result: Result<(), i32>, events: &impl Events) -> Completion {
        debug_assert_eq!(permit.engine, self.id, "the permit belongs to another engine");
        let result = result.map_err(errno);
        let completion = match permit.order {
            Order::Required { slot } => self.complete_ordered(permit.zone, slot, result, events),
            Order::Window { pointer } => self.complete_unordered(&permit, pointer, result, events),
            Order::Preferred { .. } => {
                let end = permit.offset - self.geometry.start(permit.zone) + permit.len;
                self.complete_unordered(&permit, end, result, events)
            }
            Order::Conventional { last } => self.complete_conventional(&permit, last, result, events),
        };
        used(permit);
        completion
    }

    fn complete_ordered(
        &self,
        zone: ZoneNo,
        slot: u32,
        result: Result<(), i32>,
        events: &impl Events,
    ) -> Completion {
        let z = self.lock(zone);
        match (self.arena.slot(slot).state(), result) {
            (State::InFlight, Ok(())) if z.head == slot => self.advance(z, slot, events),
            (State::InFlight, Ok(())) => {
                self.arena.slot(slot).set_state(State::Written);
                Completion::Pending(Pending {
                    engine: self.id,
                    slot: slot.into(),
                })
            }
            (State::InFlight, Err(errno)) => self.fail(z, slot, errno, events),
            (State::Doomed(errno), _) => {
                let mut z = z;
                z.outstanding -= 1;
                self.end_failed(z, 1, events);
                self.arena.release(slot);
                Completion::Failed(errno)
            }
            (state, _) => unreachable!("a permit's slot is in flight, not {state:?}"),
        }
    }

    /// The oldest write of the zone is done: the written end moves over it and over those behind it that were
    /// done before.
    fn advance(&self, mut z: Locked<'_>, slot: u32, events: &impl Events) -> Completion {
        let zone = z.no;
        let mut count = 0;
        let mut end = z.done;
        let mut rest = slot;
        while rest == slot || (rest != NIL && self.arena.slot(rest).state() == State::Written) {
            let link = self.arena.slot(rest);
            link.set_state(State::Prefix);
            end = link.end();
            count += 1;
            rest = link.next();
        }
        z.head = rest;
        if rest == NIL {
            z.tail = NIL;
        }
        let written = end - z.done;
        self.grow(&mut z, end, written, events);
        let settled = self.settle(&mut z);
        drop(z);
        if settled {
            events.zone_changed(zone);
        }
        Completion::Prefix(Prefix {
            engine: self.id,
            zone,
            last: zone,
            first: slot,
            count,
            own: slot,
            written: end,
            advanced: true,
        })
    }

    /// Moves the written end to `end` after `bytes` were written.
    pub(crate) fn grow(&self, z: &mut Locked<'_>, end: u64, bytes: u64, events: &impl Events) {
        z.done = end;
        z.bytes_written = z.bytes_written.saturating_add(bytes);
        if end == self.geometry.capacity(z.no) {
            self.become_full(z);
        }
        events.publish(z.no, end);
        self.dirty.mark(z.no);
    }

    /// The zone is written to its capacity: a random write area is free again, and nothing is to be finished any more.
    fn become_full(&self, z: &mut Locked<'_>) {
        let mut change = self.accounting.change(&self.zones);
        change.set(z.no, Condition::Full);
        if z.is(ZRWA) {
            change.release_area();
        }
        z.clear(ZRWA | ADVISE_FINISH);
    }

    /// A write of the list failed. Those above it leave the list with it: what is written already fails now,
    /// what is in flight fails when its I/O is over.
    fn fail(&self, mut z: Locked<'_>, slot: u32, errno: i32, events: &impl Events) -> Completion {
        z.set(FAILING);
        let mut above = self.arena.slot(slot).next();
        self.cut(&mut z, slot);
        let mut written = NIL;
        let mut count = 1;
        while above != NIL {
            let link = self.arena.slot(above);
            let next = link.next();
            if link.state() == State::Written {
                link.set_next(written);
                written = above;
                count += 1;
            } else {
                link.set_state(State::Doomed(errno));
                z.outstanding += 1;
            }
            above = next;
        }
        self.end_failed(z, count, events);
        while written != NIL {
            written = self.make_ready(written, errno, events);
        }
        self.arena.release(slot);
        Completion::Failed(errno)
    }

    /// Ends the zone's list before this slot.
    fn cut(&self, z: &mut Locked<'_>, slot: u32) {
        let mut before = NIL;
        let mut at = z.head;
        while at != slot {
            before = at;
            at = self.arena.slot(at).next();
        }
        z.tail = before;
        match before {
            NIL => z.head = NIL,
            before => self.arena.slot(before).set_next(NIL),
        }
    }

    /// Lets go of `n` failed writes.
    fn end_failed(&self, mut z: Locked<'_>, n: u32, events: &impl Events) {
        let drained = z.release(n);
        let settled = self.settle(&mut z);
        let zone = z.no;
        drop(z);
        if drained || settled {
            events.zone_changed(zone);
        }
    }

    /// Once the last write in flight of a failing zone is over, the zone goes on at its written end.
    fn settle(&self, z: &mut Locked<'_>) -> bool {
        let over = z.is(FAILING) && z.head == NIL && z.outstanding == 0;
        if over {
            z.clear(FAILING);
            self.roll_back(z);
        }
        over
    }

    /// The next write goes to the written end. A zone that a failed write opened is empty again; one that was
    /// opened by command stays open.
    fn roll_back(&self, z: &mut Locked<'_>) {
        z.next = z.done;
        if z.done == 0 && !z.is_more_than_empty() {
            let mut change = self.accounting.change(&self.zones);
            if matches!(
                change.condition(z.no),
                Condition::ImplicitlyOpen | Condition::Closed
            ) {
                change.set(z.no, Condition::Empty);
            }
        }
    }

    /// `end`: where the zone's written end is at least, once this is written.
    fn complete_unordered(
        &self,
        permit: &WritePermit,
        end: u64,
        result: Result<(), i32>,
        events: &impl Events,
    ) -> Completion {
        let zone = permit.zone;
        let mut z = self.lock(zone);
        z.outstanding -= 1;
        if result.is_ok() && end > z.done {
            self.grow(&mut z, end, permit.len, events);
        } else if result.is_ok() {
            z.bytes_written = z.bytes_written.saturating_add(permit.len);
            self.dirty.mark(zone);
        }
        // With nothing in flight, a failed write above the pointer has not moved it: in a sequential-preferred zone it leaves
        // a gap that the next one must zero.
        if z.outstanding == 0 {
            self.roll_back(&mut z);
        }
        if let Err(errno) = result {
            self.end_failed(z, 1, events);
            return Completion::Failed(errno);
        }
        // Another write may have moved the pointer over this one just now, and its end may be on its way to the run state still:
        // without it this one would not be read.
        Completion::Prefix(self.unordered(zone, zone, z.done, true))
    }

    fn complete_conventional(
        &self,
        permit: &WritePermit,
        last: ZoneNo,
        result: Result<(), i32>,
        events: &impl Events,
    ) -> Completion {
        let end = permit.offset + permit.len;
        for zone in (permit.zone.0..=last.0).map(ZoneNo) {
            let mut z = self.lock(zone);
            if result.is_err() {
                self.end_failed(z, 1, events);
                continue;
            }
            let part = end.min(self.geometry.end(zone)) - permit.offset.max(self.geometry.start(zone));
            z.bytes_written = z.bytes_written.saturating_add(part);
            self.dirty.mark(zone);
        }
        match result {
            Ok(()) => Completion::Prefix(self.unordered(permit.zone, last, 0, false)),
            Err(errno) => Completion::Failed(errno),
        }
    }

    pub(crate) fn unordered(&self, zone: ZoneNo, last: ZoneNo, written: u64, advanced: bool) -> Prefix {
        Prefix {
            engine: self.id,
            zone,
            last,
            first: NIL,
            count: 1,
            own: NIL,
            written,
            advanced,
        }
    }

    /// Gives all writes of a prefix their outcome, once the run state holds it or failed to (then with the
    /// errno). The caller knows its own; the others are told by [`Events::slot_ready`].
    pub fn acknowledge(&self, prefix: Prefix, result: Result<(), i32>, events: &impl Events) {
        debug_assert_eq!(prefix.engine, self.id, "the prefix belongs to another engine");
        let errno = result.map_err(errno).err().unwrap_or(0);
        if prefix.own != NIL {
            let mut slot = prefix.first;
            for _ in 0..prefix.count {
                if slot == prefix.own {
                    slot = self.arena.slot(slot).next();
                    self.arena.release(prefix.own);
                } else {
                    slot = self.make_ready(slot, errno, events);
                }
            }
        }
        for zone in (prefix.zone.0..=prefix.last.0).map(ZoneNo) {
            self.leave(zone, prefix.count, events);
        }
        used(prefix);
    }

    /// Ends a read.
    pub fn end_read(&self, permit: ReadPermit, events: &impl Events) {
        debug_assert_eq!(permit.engine, self.id, "the permit belongs to another engine");
        for zone in (permit.zone.0..=permit.last.0).map(ZoneNo) {
            self.leave(zone, 1, events);
        }
        used(permit);
    }

    fn leave(&self, zone: ZoneNo, n: u32, events: &impl Events) {
        // Bound first: the lock must be gone when the event is raised.
        let drained = self.lock(zone).release(n);
        if drained {
            events.zone_changed(zone);
        }
    }

    /// Hands a slot to its owner. The slot after it in the chain, which was ours until now.
    fn make_ready(&self, slot: u32, errno: i32, events: &impl Events) -> u32 {
        let link = self.arena.slot(slot);
        let next = link.next();
        link.set_state(State::Ready(errno));
        events.slot_ready(slot);
        next
    }
}

/// An errno that cannot be mistaken for success.
fn errno(errno: i32) -> i32 {
    const EIO: i32 = 5;
    if errno == 0 { EIO } else { errno }
}
