//! The rules once more, as naively as possible: no locks, no lists, no counters, everything found by looking
//! through all there is. Tests compare the engine with it after each step; it shares only types with it.
//!
//! It is told which request is meant by a number that the caller chooses.

mod area;
mod exclusive;

use crate::{
    Attributes, CloseEmpty, Condition as C, ExclusiveOp, Geometry, Recommendation, Refused, Resources,
    ZoneError as E, ZoneInfo, ZoneNo, ZoneRecord, ZoneType as T, Zrwa,
};

/// What the oracle says of a completed write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// These writes, oldest first, wait for their acknowledgement.
    Prefix(Vec<u64>),
    /// An earlier one is still in flight.
    Pending,
    /// It failed.
    Failed(i32),
}

/// All that is known of a device.
#[derive(Debug, Clone)]
pub struct Oracle {
    geometry: Geometry,
    zones: Vec<Zone>,
    writes: Vec<Write>,
    /// Number, first and last zone of each read.
    reads: Vec<(u64, u32, u32)>,
    outcomes: Vec<(u64, Result<(), i32>)>,
    clock: u64,
}

#[derive(Debug, Clone)]
struct Zone {
    condition: C,
    record: ZoneRecord,
    /// Highest end admitted; matters in sequential-preferred zones only.
    high: u64,
    /// Where the pointer of a zone with a random write area stands once all that was admitted is written.
    pointer: u64,
    used: u64,
    busy: bool,
    failing: bool,
    /// What an operation that reserved resources has changed: the condition before, and whether it reserved an area.
    reserved: Option<(C, bool)>,
}

/// A write that is neither acknowledged nor failed. Positions are absolute.
#[derive(Debug, Clone)]
struct Write {
    id: u64,
    kind: T,
    first: u32,
    last: u32,
    start: u64,
    end: u64,
    /// In a random write area: where the pointer stands when it is written, from the zone's start.
    pointer: Option<u64>,
    io_over: bool,
    doomed: Option<i32>,
}

impl Oracle {
    /// A device with these records, as after opening it.
    pub fn new(geometry: Geometry, mut initial: impl FnMut(ZoneNo) -> ZoneRecord) -> Self {
        let zones = geometry.zones().map(|no| {
            let record = initial(no);
            let condition = at_rest(&geometry, no, &record);
            Zone {
                condition,
                record,
                high: record.written,
                pointer: record.written,
                used: 0,
                busy: false,
                failing: false,
                reserved: None,
            }
        });
        let zones = zones.collect();
        Self {
            geometry,
            zones,
            writes: vec![],
            reads: vec![],
            outcomes: vec![],
            clock: 0,
        }
    }

    fn zone(&mut self, no: ZoneNo) -> &mut Zone {
        &mut self.zones[no.0 as usize]
    }

    fn in_zone(&self, no: ZoneNo) -> impl Iterator<Item = &Write> {
        self.writes
            .iter()
            .filter(move |w| (w.first..=w.last).contains(&no.0))
    }

    fn count(&self, which: impl Fn(C) -> bool) -> u32 {
        self.zones.iter().filter(|z| which(z.condition)).count() as u32
    }

    /// Open and active zones.
    pub fn resources(&self) -> Resources {
        Resources {
            open: self.count(C::is_open),
            active: self.count(C::is_active),
        }
    }

    /// Whether the zone's requests are over.
    pub fn drained(&self, no: ZoneNo) -> bool {
        let reads = self.reads.iter().any(|r| (r.1..=r.2).contains(&no.0));
        !reads && self.in_zone(no).next().is_none()
    }

    /// Whether the zone refuses writes for now, whatever they are.
    pub fn blocked(&self, no: ZoneNo) -> bool {
        let z = &self.zones[no.0 as usize];
        z.busy || z.failing
    }

    /// Admits a write: where it goes and where the data below it ends.
    pub fn write(&mut self, id: u64, offset: u64, len: u64) -> Result<(u64, u64), Refused> {
        let g = self.geometry;
        let size = g.size();
        let Some(end) = offset
            .checked_add(len)
            .filter(|&end| end <= size && offset < size)
        else {
            return Err(E::OutOfRange { offset, len, size }.into());
        };
        let granularity = g.block_size();
        if len == 0
            || !offset.is_multiple_of(u64::from(granularity))
            || !len.is_multiple_of(u64::from(granularity))
        {
            return Err(E::Unaligned {
                offset,
                len,
                granularity,
            }
            .into());
        }
        let (first, last) = (g.zone_of(offset), g.zone_of(end - 1));
        self.one_zone(offset, len, first, last)?;
        self.admit(id, Some(offset), len, first, last)
    }

    /// Admits an append.
    pub fn append(&mut self, id: u64, offset: u64, len: u64) -> Result<(u64, u64), Refused> {
        let g = self.geometry;
        if offset >= g.size() {
            return Err(E::OutOfRange {
                offset,
                len: 0,
                size: g.size(),
            }
            .into());
        }
        let zone = g.zone_of(offset);
        let granularity = g.block_size();
        let max = g.max_append();
        let error = if !offset.is_multiple_of(g.zone_size()) {
            E::NotZoneStart { offset }
        } else if g.zone_type(zone) == T::Conventional {
            E::Conventional { zone }
        } else if g.zone_type(zone) == T::SequentialPreferred {
            E::NotSequentialRequired { zone }
        } else if max == 0 {
            E::AppendUnsupported
        } else if len == 0 || !len.is_multiple_of(u64::from(granularity)) {
            E::Unaligned {
                offset,
                len,
                granularity,
            }
        } else if len > max {
            E::AppendTooLarge { len, max }
        } else {
            return self.admit(id, None, len, zone, zone);
        };
        Err(error.into())
    }

    fn one_zone(&self, offset: u64, len: u64, first: ZoneNo, last: ZoneNo) -> Result<(), Refused> {
        let g = &self.geometry;
        if first == last || g.zone_type(last) == T::Conventional {
            return Ok(());
        }
        let zone = if g.is_conventional(first) {
            ZoneNo(g.nr_conventional() - 1)
        } else {
            first
        };
        Err(E::Boundary {
            zone,
            offset,
            len,
            end: g.end(zone),
        }
        .into())
    }

    fn admit(
        &mut self,
        id: u64,
        offset: Option<u64>,
        len: u64,
        first: ZoneNo,
        last: ZoneNo,
    ) -> Result<(u64, u64), Refused> {
        for zone in (first.0..=last.0).map(ZoneNo) {
            let z = self.zone(zone);
            match z.condition {
                _ if z.busy || z.failing => return Err(Refused::Busy(zone)),
                C::Offline => return Err(E::Offline { zone }.into()),
                C::ReadOnly => return Err(E::ReadOnly { zone }.into()),
                _ => {}
            }
        }
        let (zone, kind) = (first, self.geometry.zone_type(first));
        if self.zone(zone).record.zrwa {
            return self.admit_in_area(id, offset, len, zone);
        }
        let start = self.geometry.start(zone);
        let done = start + self.zone(zone).record.written;
        let mut next = done.max(start + self.zone(zone).high);
        if kind == T::SequentialRequired {
            if self.zone(zone).condition == C::Full {
                return Err(E::Full { zone }.into());
            }
            next = self.in_zone(zone).map(|w| w.end).fold(done, u64::max);
        }
        let offset = offset.unwrap_or(next);
        if kind == T::SequentialRequired && offset != next {
            return Err(E::NotAtWritePointer {
                zone,
                offset,
                wp: next,
            }
            .into());
        }
        let end = start + self.geometry.capacity(zone);
        if kind != T::Conventional && offset + len > end {
            return Err(E::ExceedsCapacity {
                zone,
                offset,
                len,
                end,
            }
            .into());
        }
        if kind != T::Conventional && self.zone(zone).condition != C::Full {
            self.make_open(zone, C::ImplicitlyOpen)?;
        }
        self.clock += 1;
        self.zone(zone).used = self.clock;
        let high = &mut self.zones[zone.0 as usize].high;
        *high = (*high).max(offset + len - start);
        self.writes.push(Write {
            id,
            kind,
            first: first.0,
            last: last.0,
            start: offset,
            end: offset + len,
            pointer: None,
            io_over: false,
            doomed: None,
        });
        Ok((
            offset,
            if kind == T::SequentialPreferred {
                next
            } else {
                offset
            },
        ))
    }

    fn make_open(&mut self, zone: ZoneNo, to: C) -> Result<(), Refused> {
        let (limit_open, limit_active) = (self.geometry.max_open(), self.geometry.max_active());
        let condition = self.zone(zone).condition;
        if !condition.is_open() {
            self.resources_for(condition)?;
            if limit_open != 0 && self.count(C::is_open) >= limit_open {
                let implicit = self.zones.iter_mut().filter(|z| z.condition == C::ImplicitlyOpen);
                implicit
                    .min_by_key(|z| z.used)
                    .expect("one can be closed")
                    .condition = C::Closed;
            }
        }
        let Resources { active, .. } = self.resources();
        debug_assert!(limit_active == 0 || condition.is_active() || active < limit_active);
        let z = self.zone(zone);
        if z.condition != C::ExplicitlyOpen {
            z.condition = to;
        }
        Ok(())
    }

    fn resources_for(&self, condition: C) -> Result<(), E> {
        self.active_resource_for(condition)?;
        let open = self.geometry.max_open();
        if open != 0 && self.count(|c| c == C::ExplicitlyOpen) >= open {
            return Err(E::TooManyOpen { limit: open });
        }
        Ok(())
    }

    fn active_resource_for(&self, condition: C) -> Result<(), E> {
        let active = self.geometry.max_active();
        if active != 0 && condition == C::Empty && self.count(C::is_active) >= active {
            return Err(E::TooManyActive { limit: active });
        }
        Ok(())
    }

    /// Ends a write's I/O.
    pub fn complete(&mut self, id: u64, result: Result<(), i32>) -> Verdict {
        let at = self.writes.iter().position(|w| w.id == id).expect("in flight");
        self.writes[at].io_over = true;
        let w = self.writes[at].clone();
        let zone = ZoneNo(w.first);
        if let Some(errno) = w.doomed.or(result.err()) {
            self.writes.remove(at);
            if w.kind == T::SequentialRequired && w.pointer.is_none() {
                self.doom(zone, w.start, errno);
            }
            self.settle(zone);
            return Verdict::Failed(errno);
        }
        let verdict = match w.kind {
            T::SequentialRequired if w.pointer.is_some() => {
                let record = &mut self.zone(zone).record;
                record.written = record.written.max(w.pointer.unwrap_or(0));
                Verdict::Prefix(vec![id])
            }
            T::SequentialRequired => self.advance(zone, id),
            T::SequentialPreferred => {
                let end = w.end - self.geometry.start(zone);
                let record = &mut self.zone(zone).record;
                record.written = record.written.max(end);
                Verdict::Prefix(vec![id])
            }
            T::Conventional => Verdict::Prefix(vec![id]),
        };
        let covered: Vec<Write> = match &verdict {
            Verdict::Prefix(ids) => self
                .writes
                .iter()
                .filter(|w| ids.contains(&w.id))
                .cloned()
                .collect(),
            _ => vec![],
        };
        for block in covered.iter().flat_map(|w| (w.start..w.end).step_by(512)) {
            self.zone(self.geometry.zone_of(block))
                .record
                .counters
                .bytes_written += 512;
        }
        let capacity = self.geometry.capacity(zone);
        if w.kind != T::Conventional && self.zone(zone).record.written == capacity {
            self.fill(zone);
        }
        self.settle(zone);
        verdict
    }

    /// Moves the written end over what is written just above it.
    fn advance(&mut self, zone: ZoneNo, id: u64) -> Verdict {
        let mut ids = vec![];
        loop {
            let start = self.geometry.start(zone);
            let done = start + self.zone(zone).record.written;
            let written = |w: &&mut Write| w.first == zone.0 && w.io_over && w.doomed.is_none();
            let Some(w) = self.writes.iter_mut().filter(written).find(|w| w.start == done) else {
                break;
            };
            let (end, id) = (w.end, w.id);
            ids.push(id);
            self.zone(zone).record.written = end - start;
        }
        if ids.contains(&id) {
            Verdict::Prefix(ids)
        } else {
            Verdict::Pending
        }
    }

    /// Fails what lies above a failed write.
    fn doom(&mut self, zone: ZoneNo, start: u64, errno: i32) {
        self.zone(zone).failing = true;
        let outcomes = &mut self.outcomes;
        self.writes.retain_mut(|w| {
            if w.first != zone.0 || w.start <= start || w.doomed.is_some() {
                return true;
            }
            w.doomed = Some(errno);
            if w.io_over {
                outcomes.push((w.id, Err(errno)));
            }
            !w.io_over
        });
    }

    /// With no I/O left in the zone the next write goes to the written end.
    fn settle(&mut self, zone: ZoneNo) {
        let kind = self.geometry.zone_type(zone);
        if kind == T::Conventional || self.in_zone(zone).any(|w| !w.io_over) {
            return;
        }
        let z = self.zone(zone);
        let rolled_back = z.failing || kind == T::SequentialPreferred;
        z.failing = false;
        z.high = z.record.written;
        z.pointer = z.record.written;
        if rolled_back
            && z.high == 0
            && is_plain(&z.record)
            && matches!(z.condition, C::ImplicitlyOpen | C::Closed)
        {
            z.condition = C::Empty;
        }
    }

    /// Acknowledges the writes of a prefix; all but `own` get their outcome.
    pub fn acknowledge(&mut self, ids: &[u64], own: u64, result: Result<(), i32>) {
        self.writes.retain(|w| !ids.contains(&w.id));
        self.outcomes
            .extend(ids.iter().filter(|&&id| id != own).map(|&id| (id, result)));
    }

    /// What became of a write that had to wait.
    pub fn outcome(&mut self, id: u64) -> Option<Result<(), i32>> {
        let at = self.outcomes.iter().position(|o| o.0 == id)?;
        Some(self.outcomes.remove(at).1)
    }

    /// Admits a read: how many of its bytes are data.
    pub fn read(&mut self, id: u64, offset: u64, len: u64) -> Result<u64, Refused> {
        let g = self.geometry;
        let size = g.size();
        if offset >= size || len > size - offset {
            return Err(E::OutOfRange { offset, len, size }.into());
        }
        let (first, last) = (g.zone_of(offset), g.zone_of(offset + len.max(1) - 1));
        self.one_zone(offset, len, first, last)?;
        for zone in (first.0..=last.0).map(ZoneNo) {
            match self.zone(zone) {
                z if z.busy => return Err(Refused::Busy(zone)),
                z if z.condition == C::Offline => return Err(E::Offline { zone }.into()),
                _ => {}
            }
        }
        self.reads.push((id, first.0, last.0));
        let written_end = self.data_end(first);
        let all = g.is_conventional(first);
        Ok(if all {
            len
        } else {
            (offset..offset + len).end.min(written_end.max(offset)) - offset
        })
    }

    /// Ends a read.
    pub fn end_read(&mut self, id: u64) {
        self.reads.retain(|r| r.0 != id);
    }

    fn managed(&mut self, zone: ZoneNo) -> Result<C, Refused> {
        if self.geometry.is_conventional(zone) {
            return Err(E::Conventional { zone }.into());
        }
        match self.zone(zone) {
            z if z.busy => Err(Refused::Busy(zone)),
            z if z.condition == C::Offline => Err(E::Offline { zone }.into()),
            z if z.condition == C::ReadOnly => Err(E::ReadOnly { zone }.into()),
            z => Ok(z.condition),
        }
    }

    /// Opens a zone explicitly.
    pub fn open(&mut self, zone: ZoneNo) -> Result<(), Refused> {
        match self.managed(zone)? {
            condition @ C::Full => Err(E::InvalidTransition { zone, condition }.into()),
            _ => self.make_open(zone, C::ExplicitlyOpen),
        }
    }

    /// Closes a zone.
    pub fn close(&mut self, zone: ZoneNo, empty: CloseEmpty) -> Result<(), Refused> {
        if self.managed(zone)?.is_open() {
            // A write that failed counts as admitted until those above it are over.
            let z = self.zone(zone);
            let touched = z.record.written > 0 || z.high > 0 || !is_plain(&z.record);
            z.condition = if touched || empty == CloseEmpty::ToClosed {
                C::Closed
            } else {
                C::Empty
            };
        }
        Ok(())
    }

    /// What a report shows.
    pub fn info(&self, zone: ZoneNo) -> ZoneInfo {
        let (g, z) = (&self.geometry, &self.zones[zone.0 as usize]);
        let (start, capacity) = (g.start(zone), g.capacity(zone));
        ZoneInfo {
            zone,
            start,
            len: g.len(zone),
            capacity,
            wp: if z.condition == C::Full {
                start + capacity
            } else {
                start + z.record.written
            },
            written_end: self.data_end(zone),
            kind: g.zone_type(zone),
            condition: z.condition,
            counters: z.record.counters,
            attributes: Attributes {
                finished_by_device: z.record.finished_by_device,
                recommended: z.record.recommended,
                zrwa: z.record.zrwa,
                extension: z.record.extension.is_some(),
            },
        }
    }

    /// What persists.
    pub fn record(&self, zone: ZoneNo) -> ZoneRecord {
        self.zones[zone.0 as usize].record
    }
}

/// The condition of a zone that was just opened from its record.
fn at_rest(g: &Geometry, zone: ZoneNo, record: &ZoneRecord) -> C {
    match *record {
        ZoneRecord { offline: true, .. } => C::Offline,
        ZoneRecord { read_only: true, .. } => C::ReadOnly,
        _ if g.is_conventional(zone) => C::NotWritePointer,
        ZoneRecord { finished: true, .. } => C::Full,
        ZoneRecord { written, .. } if written == g.capacity(zone) => C::Full,
        ZoneRecord { written: 0, .. } if is_plain(record) => C::Empty,
        _ => C::Closed,
    }
}

/// Whether a zone with that record is empty when nothing is written to it.
fn is_plain(record: &ZoneRecord) -> bool {
    !record.zrwa && record.extension.is_none()
}
