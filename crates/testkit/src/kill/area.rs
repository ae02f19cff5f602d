//! Zones with a random write area: what is asked of them, and whether what is found after a kill can have come from it.
//!
//! Each belongs to one queue, which has many writes and commits in flight in it, but opens, resets and finishes it alone. So a
//! zone's requests fall into generations, and within one a block holds the last write that covers it, as in a
//! conventional zone, while the pointer only moves on.

mod traffic;

use std::collections::HashSet;

use super::judge::{Found, Secured};
use super::log::{Outcome, Time};
use super::stamp::{Content, Stamp};
use crate::client::ZoneState;

pub(super) use traffic::AreaZone;

/// The areas of a device, in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Areas {
    /// Size of one.
    pub size: u32,
    /// By how many the pointer moves.
    pub granularity: u32,
    /// Zones that are used with an area: the last ones of the device, one a queue.
    pub zones: u32,
}

impl Areas {
    /// Where the pointer stands at least once blocks up to `end` are written.
    pub fn pointer_after(&self, end: u32) -> u32 {
        end.saturating_sub(self.size).next_multiple_of(self.granularity)
    }
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AreaOp {
    /// Writes blocks, anywhere in the area or in the region behind it.
    Write {
        /// The first, from the zone's start.
        at: u32,
        /// How many.
        blocks: u32,
    },
    /// Moves the pointer to this block.
    Commit(u32),
    /// Opens the zone with an area.
    Open,
    /// Makes the zone full.
    Finish,
    /// Empties it.
    Reset,
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AreaEntry {
    /// Its number.
    pub id: u64,
    /// What it does.
    pub op: AreaOp,
    /// When it was submitted.
    pub submitted: Time,
    /// What became of it.
    pub outcome: Outcome,
}

impl AreaEntry {
    fn done(&self) -> Option<Time> {
        match self.outcome {
            Outcome::Done(time) => Some(time),
            Outcome::InFlight | Outcome::Refused => None,
        }
    }

    fn possible(&self) -> bool {
        self.outcome != Outcome::Refused
    }

    /// The stamp of its block `index` in `zone`.
    pub fn stamp(&self, zone: u32, index: u32) -> Stamp {
        let at = match self.op {
            AreaOp::Write { at, .. } => at,
            _ => 0,
        };
        Stamp {
            id: self.id,
            zone,
            at,
            index,
        }
    }

    fn covers(&self, block: u32) -> bool {
        matches!(self.op, AreaOp::Write { at, blocks } if (at..at + blocks).contains(&block))
    }
}

/// What a zone held when a round, or a generation, began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AreaBase {
    /// Every block up to the capacity.
    pub blocks: Vec<Content>,
    /// Its pointer.
    pub pointer: u32,
    /// It has an area.
    pub area: bool,
    /// It is full.
    pub full: bool,
}

impl AreaBase {
    /// An empty zone.
    pub fn empty(capacity: u32) -> AreaBase {
        AreaBase {
            blocks: vec![Content::Zeros; capacity as usize],
            pointer: 0,
            area: false,
            full: false,
        }
    }
}

/// The log of a zone.
#[derive(Debug)]
pub struct AreaLog {
    /// Its number.
    pub zone: u32,
    /// Before the first entry.
    pub base: AreaBase,
    /// All requests that change it, as they were submitted.
    pub entries: Vec<AreaEntry>,
}

/// A zone that is as it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AreaVerdict {
    /// What the next round begins with.
    pub base: AreaBase,
    /// Acknowledged writes of this round of which something is there.
    pub acknowledged: u32,
    /// The same of those in flight.
    pub unacknowledged: u32,
}

/// Judges a zone; `area` is whether it is reported with one.
///
/// # Errors
/// If no order of the requests leads to what was found.
pub fn judge_area(
    log: &AreaLog,
    areas: &Areas,
    secured: Secured,
    found: &Found,
    area: bool,
) -> Result<AreaVerdict, String> {
    let entries = &log.entries;
    let is_reset = |entry: &AreaEntry| entry.op == AreaOp::Reset && entry.possible();
    let last_done = entries
        .iter()
        .rposition(|entry| is_reset(entry) && entry.done().is_some());
    // Nothing is submitted while it is in flight.
    let in_flight = entries
        .iter()
        .rposition(is_reset)
        .filter(|last| Some(*last) > last_done);
    let generation = |reset: Option<usize>| Generation {
        log,
        areas,
        secured,
        base: match reset {
            Some(_) => AreaBase::empty(found.blocks.len() as u32),
            None => log.base.clone(),
        },
        entries: &entries[reset.map_or(0, |reset| reset + 1)..],
    };
    let mut result = generation(last_done).judge(found, area);
    if result.is_err() && in_flight.is_some() {
        result = generation(in_flight).judge(found, area);
    }
    result?;
    let kept: HashSet<u64> = found.blocks.iter().filter_map(number).collect();
    let count = |done: bool| {
        let there = entries.iter().filter(|entry| kept.contains(&entry.id));
        there.filter(|entry| entry.done().is_some() == done).count() as u32
    };
    Ok(AreaVerdict {
        acknowledged: count(true),
        unacknowledged: count(false),
        base: AreaBase {
            blocks: found.blocks.clone(),
            pointer: found.pointer as u32,
            area,
            full: found.state == ZoneState::Full,
        },
    })
}

fn number(content: &Content) -> Option<u64> {
    match content {
        Content::Stamp(stamp) => Some(stamp.id),
        Content::Zeros | Content::Garbage { .. } => None,
    }
}

/// What was asked of the zone since it was last emptied.
struct Generation<'a> {
    log: &'a AreaLog,
    areas: &'a Areas,
    secured: Secured,
    base: AreaBase,
    entries: &'a [AreaEntry],
}

impl Generation<'_> {
    /// Must a write or commit be there?
    fn holds(&self, entry: &AreaEntry) -> bool {
        entry.done().is_some_and(|done| done < self.secured.0) || self.finished_after(entry)
    }

    /// A finish is durable with all that was acknowledged before.
    fn finished_after(&self, entry: &AreaEntry) -> bool {
        self.entries.iter().any(|finish| {
            finish.op == AreaOp::Finish
                && finish.done().is_some()
                && entry.done().is_some_and(|done| done < finish.submitted)
        })
    }

    /// Whether some request of this kind happened for sure (`must`), or may have.
    fn any(&self, must: bool, of: impl Fn(AreaOp) -> bool) -> bool {
        self.entries.iter().any(|entry| {
            of(entry.op)
                && match (must, entry.op) {
                    (false, _) => entry.possible(),
                    // What a power cut, or no run state, may take back.
                    (true, AreaOp::Commit(_) | AreaOp::Write { .. }) => self.holds(entry),
                    (true, _) => entry.done().is_some(),
                }
        })
    }

    fn judge(&self, found: &Found, area: bool) -> Result<(), String> {
        let capacity = found.blocks.len() as u32;
        let seen = format!(
            "the zone is reported {:?} with its pointer at block {} of {capacity}, {} an area",
            found.state,
            found.pointer,
            if area { "with" } else { "without" }
        );
        let fills = |op| op == AreaOp::Finish || op == AreaOp::Commit(capacity);
        let full = found.state == ZoneState::Full;
        let must_be_full = self.base.full || self.any(true, fills);
        if full && !(must_be_full || self.any(false, fills)) {
            return Err(format!("nothing made it full; {seen}"));
        }
        if !full && must_be_full {
            return Err(format!("it was made full; {seen}"));
        }
        let had_area = self.base.area || self.any(true, |op| op == AreaOp::Open);
        let may_have = self.base.area || self.any(false, |op| op == AreaOp::Open);
        if area && (full || !may_have) || !area && had_area && !full {
            return Err(format!(
                "it has an area where it has none, or none where it has one; {seen}"
            ));
        }
        if !full {
            self.pointer(found, area, &seen)?;
        }
        for (block, content) in (0..).zip(&found.blocks) {
            self.block(block, *content)
                .map_err(|what| format!("block {block}: {what}; {seen}"))?;
        }
        Ok(())
    }

    fn pointer(&self, found: &Found, area: bool, seen: &str) -> Result<(), String> {
        let capacity = found.blocks.len() as u32;
        let reach = |must: bool| {
            let entries = self.entries.iter().filter(|entry| match must {
                true => self.holds(entry),
                false => entry.possible(),
            });
            let ends = entries.map(|entry| match entry.op {
                AreaOp::Write { at, blocks } => self.areas.pointer_after(at + blocks),
                AreaOp::Commit(to) => to,
                _ => 0,
            });
            ends.max().unwrap_or(0).max(self.base.pointer)
        };
        let (least, most) = (reach(true), reach(false));
        let pointer = found.pointer as u32;
        if pointer < least || pointer > most || !pointer.is_multiple_of(self.areas.granularity) {
            return Err(format!(
                "its pointer is not between blocks {least} and {most}; {seen}"
            ));
        }
        let state = match area || pointer > 0 {
            true => ZoneState::Closed,
            false => ZoneState::Empty,
        };
        if found.state != state {
            return Err(format!("it should be {state:?}; {seen}"));
        }
        let end = if area { pointer + self.areas.size } else { pointer };
        let beyond = found.blocks.iter().skip(end.min(capacity) as usize);
        match beyond.into_iter().find(|content| **content != Content::Zeros) {
            Some(content) => Err(format!("above its area lies {content}; {seen}")),
            None => Ok(()),
        }
    }

    /// The block holds what was last written to it, or may have been.
    fn block(&self, block: u32, found: Content) -> Result<(), String> {
        let writers = || {
            let entries = self.entries.iter();
            entries.filter(|entry| entry.covers(block) && entry.possible())
        };
        let wrote = |entry: &&AreaEntry| {
            let AreaOp::Write { at, .. } = entry.op else {
                return false;
            };
            found == Content::Stamp(entry.stamp(self.log.zone, block - at))
        };
        // What certainly came before this is gone if a later write must be there.
        let after = match writers().find(wrote) {
            Some(entry) => entry.done(),
            None if found == self.base.blocks[block as usize] => Some(0),
            None => return Err(format!("found {found}, which nobody wrote there")),
        };
        let later =
            writers().find(|later| self.holds(later) && after.is_some_and(|after| after < later.submitted));
        match later {
            None => Ok(()),
            Some(later) => Err(format!("found {found}, which {later:?} had replaced")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AREAS: Areas = Areas {
        size: 4,
        granularity: 2,
        zones: 1,
    };

    fn entry(id: u64, op: AreaOp, submitted: Time, outcome: Outcome) -> AreaEntry {
        AreaEntry {
            id,
            op,
            submitted,
            outcome,
        }
    }

    const fn write(at: u32, blocks: u32) -> AreaOp {
        AreaOp::Write { at, blocks }
    }

    /// An opened zone of 12 blocks, blocks 0 and 5 written (which moves the pointer to 2), and block 5 again.
    fn log() -> AreaLog {
        AreaLog {
            zone: 7,
            base: AreaBase::empty(12),
            entries: vec![
                entry(1, AreaOp::Open, 1, Outcome::Done(2)),
                entry(2, write(0, 1), 3, Outcome::Done(4)),
                entry(3, write(5, 1), 5, Outcome::Done(6)),
                entry(4, write(5, 1), 7, Outcome::Done(8)),
            ],
        }
    }

    fn found(log: &AreaLog, pointer: u64, writes: &[usize]) -> Found {
        let mut blocks = vec![Content::Zeros; 12];
        for write in writes {
            let entry = log.entries[*write];
            if let AreaOp::Write { at, .. } = entry.op {
                blocks[at as usize] = Content::Stamp(entry.stamp(log.zone, 0));
            }
        }
        Found {
            blocks,
            pointer,
            state: ZoneState::Closed,
        }
    }

    fn judged(log: &AreaLog, found: &Found, area: bool) -> Result<AreaVerdict, String> {
        judge_area(log, &AREAS, Secured::ALL, found, area)
    }

    #[test]
    fn what_was_acknowledged_is_there() {
        let log = log();
        let verdict = judged(&log, &found(&log, 2, &[1, 3]), true).unwrap();
        assert_eq!((verdict.acknowledged, verdict.unacknowledged), (2, 0));
        for (pointer, writes, area, why) in [
            (2, &[1, 2][..], true, "had replaced"),
            (2, &[3], true, "had replaced"),
            (0, &[1, 3], true, "not between"),
            (4, &[1, 3], true, "not between"),
            (2, &[1, 3], false, "an area"),
        ] {
            let wrong = judged(&log, &found(&log, pointer, writes), area).unwrap_err();
            assert!(wrong.contains(why), "{wrong}");
        }
        let mut full = found(&log, 12, &[1, 3]);
        full.state = ZoneState::Full;
        assert!(
            judged(&log, &full, false)
                .unwrap_err()
                .contains("nothing made it full")
        );
    }

    #[test]
    fn what_was_in_flight_is_there_or_not_and_never_above_the_area() {
        let mut log = log();
        log.entries.push(entry(5, write(7, 1), 9, Outcome::InFlight));
        judged(&log, &found(&log, 2, &[1, 3]), true).unwrap();
        judged(&log, &found(&log, 4, &[1, 3, 4]), true).unwrap();
        let above = judged(&log, &found(&log, 2, &[1, 3, 4]), true).unwrap_err();
        assert!(above.contains("above its area"), "{above}");
        log.entries[4].outcome = Outcome::Refused;
        assert!(judged(&log, &found(&log, 4, &[1, 3, 4]), true).is_err());
    }

    #[test]
    fn a_reset_in_flight_has_happened_wholly_or_not_at_all() {
        let mut log = log();
        log.entries.push(entry(5, AreaOp::Reset, 9, Outcome::InFlight));
        let mut empty = found(&log, 0, &[]);
        empty.state = ZoneState::Empty;
        judged(&log, &empty, false).unwrap();
        judged(&log, &found(&log, 2, &[1, 3]), true).unwrap();
        assert!(judged(&log, &found(&log, 0, &[]), true).is_err());
        log.entries[4].outcome = Outcome::Done(10);
        judged(&log, &empty, false).unwrap();
        assert!(judged(&log, &found(&log, 2, &[1, 3]), true).is_err());
    }

    #[test]
    fn a_finish_and_a_commit_to_the_end_make_it_full() {
        for op in [AreaOp::Finish, AreaOp::Commit(12)] {
            let mut log = log();
            log.entries.push(entry(5, op, 9, Outcome::Done(10)));
            let mut full = found(&log, 12, &[1, 3]);
            assert!(judged(&log, &full, true).is_err());
            full.state = ZoneState::Full;
            assert!(judged(&log, &full, false).unwrap().base.full);
        }
    }

    #[test]
    fn what_was_not_flushed_may_be_gone() {
        let log = log();
        let secured = Secured(5);
        let judged = |found: &Found| judge_area(&log, &AREAS, secured, found, true);
        judged(&found(&log, 0, &[1])).unwrap();
        assert!(judged(&found(&log, 0, &[])).is_err());
    }
}
