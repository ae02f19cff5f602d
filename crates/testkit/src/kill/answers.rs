//! What comes back on a client thread's queue: logged, and compared with what is certain already.

use super::judge::{Secured, judge_conventional};
use super::log::Outcome;
use super::shared::{AppendZone, Hint, SECTOR, lock};
use super::stamp::{Content, Stamp};
use super::traffic::{Flight, Own, Purpose, Worker};
use crate::client::{Completion, Status, Zone, ZoneState};

impl Worker<'_> {
    pub(super) fn completed(&mut self, completion: Completion) -> Result<(), String> {
        let Some(flight) = self.flights.remove(&completion.ticket) else {
            return Err(format!("request {} was completed twice", completion.ticket));
        };
        let status = completion.status;
        if [Status::IOERR, Status::UNSUPP, Status::UNTOUCHED].contains(&status) {
            return Err(format!("{flight:?} was answered with {status}"));
        }
        if status != Status::OK {
            *self.counts.refused.entry(status.to_string()).or_default() += 1;
            self.refused(flight, status == Status::ZONE_ACTIVE_RESOURCE);
            return Ok(());
        }
        let kind = flight.kind();
        self.acknowledged(flight, &completion)?;
        *self.counts.acknowledged.entry(kind).or_default() += 1;
        self.shared.count();
        Ok(())
    }

    fn refused(&mut self, flight: Flight, crowded: bool) {
        self.crowded |= crowded;
        // A zone that cannot become active is empty.
        let hint = if crowded { Hint::Empty } else { Hint::Partial };
        match flight {
            Flight::Write { zone, entry, own } => {
                self.shared.zone(zone).refuse(entry, false);
                let own = &mut self.own[own];
                if own.zone != Some(zone) {
                    return;
                }
                own.in_flight = own.in_flight.saturating_sub(1);
                own.next = None;
                own.refusals += 1;
                // Perhaps somebody else writes there all the time.
                if crowded || own.refusals > 40 {
                    lock(&self.shared.pool).release(zone, hint);
                    *own = Own::default();
                }
            }
            Flight::Append { zone, entry } => {
                self.shared.zone(zone).refuse(entry, false);
                let mut pool = lock(&self.shared.pool);
                if pool.append.iter().any(|append| append.zone == zone) {
                    pool.release(zone, hint);
                }
            }
            Flight::Conventional { zone, entry } => {
                lock(&self.shared.conventional[zone as usize]).entries[entry].outcome = Outcome::Refused;
            }
            Flight::Reset { zone, entry, own } => {
                self.shared.zone(zone).refuse(entry, false);
                if let Some(own) = own
                    && self.own[own].zone == Some(zone)
                {
                    self.own[own].asked = false;
                }
            }
            Flight::ResetAll(entries) => {
                for (log, entry) in self.shared.sequential.iter().zip(entries) {
                    lock(log).refuse(entry, true);
                }
            }
            Flight::Finish { zone, entry } => self.shared.zone(zone).refuse(entry, false),
            Flight::InArea(entry) => self.refused_in_area(entry),
            Flight::AskArea => self.asked_area(None),
            Flight::Ask { .. }
            | Flight::Flush(_)
            | Flight::Read { .. }
            | Flight::ReadConventional { .. }
            | Flight::OpenOrClose => {}
        }
    }

    fn acknowledged(&mut self, flight: Flight, completion: &Completion) -> Result<(), String> {
        let shared = self.shared;
        match flight {
            Flight::Write { zone, entry, own } => {
                let mut log = shared.zone(zone);
                let at = log.entries[entry].at;
                log.acknowledge(entry, at, shared.now())?;
                if self.own[own].zone == Some(zone) {
                    self.own[own].in_flight = self.own[own].in_flight.saturating_sub(1);
                    self.own[own].refusals = 0;
                }
            }
            Flight::Append { zone, entry } => {
                let start = shared.geometry.sector(zone, 0);
                let per_block = u64::from(shared.geometry.block) / SECTOR;
                let offset = completion.append_sector.checked_sub(start);
                let at = offset.filter(|offset| offset % per_block == 0);
                let Some(at) = at.and_then(|offset| u32::try_from(offset / per_block).ok()) else {
                    return Err(format!(
                        "an append to zone {zone} went to sector {}",
                        completion.append_sector
                    ));
                };
                shared.zone(zone).acknowledge(entry, at, shared.now())?;
            }
            Flight::Conventional { zone, entry } => {
                let outcome = Outcome::Done(shared.now());
                lock(&shared.conventional[zone as usize]).entries[entry].outcome = outcome;
            }
            Flight::Reset { zone, entry, own } => {
                shared.zone(zone).acknowledge(entry, 0, shared.now())?;
                if let Some(own) = own.map(|own| &mut self.own[own])
                    && own.zone == Some(zone)
                    && own.asked
                {
                    own.asked = false;
                    own.next = (own.in_flight == 0).then_some(0);
                }
            }
            Flight::ResetAll(entries) => {
                let now = shared.now();
                for (log, entry) in shared.sequential.iter().zip(entries) {
                    lock(log).acknowledge(entry, 0, now)?;
                }
            }
            Flight::Finish { zone, entry } => shared.zone(zone).acknowledge(entry, 0, shared.now())?,
            Flight::Flush(submitted) => shared.flushed(submitted),
            Flight::Read {
                zone,
                at,
                expect,
                resets,
            } => {
                if shared.zone(zone).resets == resets {
                    self.compare(zone, at, &expect, &completion.data)?;
                }
            }
            Flight::ReadConventional { zone, at, submitted } => {
                let log = lock(&shared.conventional[zone as usize]);
                let blocks = completion.data.chunks_exact(shared.geometry.block as usize);
                for (block, data) in (at..).zip(blocks) {
                    let content = Content::of(shared.image, data);
                    // A read beside a write of the same block may see parts of both.
                    let beside = log.writers(block).any(|writer| !writer.precedes(submitted));
                    if beside && matches!(content, Content::Garbage { .. }) {
                        continue;
                    }
                    judge_conventional(&log, block, Secured::ALL, submitted, content)
                        .map_err(|what| format!("a read under way: {what}"))?;
                }
                self.counts.verified += completion.data.len() as u64;
            }
            Flight::Ask {
                zone,
                purpose,
                known_end,
                resets,
            } => {
                let report = self.queue.parse_report(&completion.data)?;
                let report = report.ok_or_else(|| format!("no report of zone {zone}"))?;
                let pointer = pointer(&report, shared.geometry.block);
                if shared.zone(zone).resets == resets && pointer < u64::from(known_end) {
                    return Err(format!(
                        "{report:?}: the pointer of zone {zone} is at block {pointer}, but writes up to block {known_end} \
                         were acknowledged before"
                    ));
                }
                self.answered(zone, purpose, report.state, pointer as u32)?;
            }
            Flight::OpenOrClose => {}
            Flight::InArea(entry) => self.acknowledged_in_area(entry),
            Flight::AskArea => {
                let report = self.queue.parse_report(&completion.data)?;
                let report = report.ok_or("no report of a zone with a random write area")?;
                let at = pointer(&report, shared.geometry.block);
                self.asked_area(Some((report.state, at as u32)));
            }
        }
        Ok(())
    }

    /// Uses what the device said about a zone.
    fn answered(&mut self, zone: u32, purpose: Purpose, state: ZoneState, next: u32) -> Result<(), String> {
        let full = state == ZoneState::Full;
        let submitting = self.shared.submitting();
        match purpose {
            Purpose::Own(own) if self.own[own].zone == Some(zone) => {
                if full && submitting {
                    return self.reset(zone, Some(own));
                }
                self.own[own].asked = false;
                self.own[own].next = (!full).then_some(next);
            }
            Purpose::Append => {
                if full && submitting {
                    self.reset(zone, None)?;
                }
                let mut pool = lock(&self.shared.pool);
                pool.append_coming -= 1;
                let reserved = if full { 0 } else { next };
                pool.append.push(AppendZone { zone, reserved });
            }
            Purpose::Own(_) | Purpose::Look => {
                let mut pool = lock(&self.shared.pool);
                if !pool.used[zone as usize] {
                    pool.hints[zone as usize] = match state {
                        ZoneState::Full => Hint::Full,
                        ZoneState::Empty => Hint::Empty,
                        _ => Hint::Partial,
                    };
                }
            }
        }
        Ok(())
    }

    fn compare(&mut self, zone: u32, at: u32, expect: &[Option<Stamp>], data: &[u8]) -> Result<(), String> {
        let size = self.shared.geometry.block as usize;
        for ((block, expect), data) in (at..).zip(expect).zip(data.chunks_exact(size)) {
            let Some(stamp) = expect else { continue };
            let found = Content::of(self.shared.image, data);
            if found != Content::Stamp(*stamp) {
                return Err(format!(
                    "a read under way of zone {zone} block {block} found {found}, where {stamp} was acknowledged"
                ));
            }
            self.counts.verified += size as u64;
        }
        Ok(())
    }
}

/// A reported pointer, in blocks from the zone's start.
pub(super) fn pointer(zone: &Zone, block: u32) -> u64 {
    zone.wp.wrapping_sub(zone.start) * SECTOR / u64::from(block)
}
