//! Whether what is found after a kill can have come from what was asked and acknowledged.
//!
//! A zone's requests are a history with known acknowledgements, and the device must look as if the requests had
//! happened one after the other, in an order that respects every certain "before", with each acknowledged one in it,
//! each refused one not, and those in flight either way. For a sequential zone that can be decided without search,
//! since its blocks name the requests in order: they are what came after the last effective reset, and all
//! acknowledged requests that are missing must have come before it.

use std::collections::{HashMap, HashSet};

use super::log::{Base, ConventionalLog, Entry, Op, Outcome, Time};
use super::stamp::{ANYWHERE, Content, Stamp};
use crate::client::ZoneState;

/// Which acknowledged writes must be there: those acknowledged before this time.
///
/// After a kill that is all of them; without a run state, those that a completed flush covers. What
/// management operations did must always be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Secured(pub Time);

impl Secured {
    /// Every acknowledged write.
    pub const ALL: Secured = Secured(Time::MAX);

    fn holds(self, entry: &Entry) -> bool {
        entry.precedes(self.0)
    }
}

/// What was found of a sequential zone.
#[derive(Debug, Clone)]
pub struct Found {
    /// Every block up to the capacity.
    pub blocks: Vec<Content>,
    /// The reported pointer, in blocks from the zone's start.
    pub pointer: u64,
    /// The reported state.
    pub state: ZoneState,
}

/// A sequential zone that is as it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// What the next round begins with.
    pub base: Base,
    /// Acknowledged requests of this round whose blocks are there.
    pub acknowledged: u32,
    /// Requests of this round in flight at the kill whose blocks are there.
    pub unacknowledged: u32,
}

/// Judges a sequential zone of that number. The error says what was expected and what was found.
///
/// # Errors
/// If no order of the requests leads to what was found.
pub fn judge(
    zone: u32,
    base: &Base,
    entries: &[Entry],
    secured: Secured,
    found: &Found,
) -> Result<Verdict, String> {
    let contents = contents(found)?;
    pointer(found, contents.len())?;
    let case = Case::new(zone, base, entries, secured, found, &contents)?;
    case.order()?;
    case.resets_hold()?;
    case.nothing_lost()?;
    case.full()?;
    let (acknowledged, unacknowledged) = case.counts();
    Ok(Verdict {
        base: Base {
            full: found.state == ZoneState::Full,
            blocks: contents,
        },
        acknowledged,
        unacknowledged,
    })
}

/// Judges a block of a conventional zone. `now` is when it was read, [`Time::MAX`] after the kill.
///
/// # Errors
/// If that content cannot have been the last.
pub fn judge_conventional(
    log: &ConventionalLog,
    block: u32,
    secured: Secured,
    now: Time,
    found: Content,
) -> Result<(), String> {
    let place = |what: String| format!("block {block} of conventional zone {}: {what}", log.zone);
    // What certainly came before this is gone if a later write must be there.
    let after = match writer(log, block, found) {
        Some(Ok(entry)) => entry.done(),
        Some(Err(what)) => return Err(place(what)),
        None if found == log.base[block as usize] => Some(0),
        None => {
            return Err(place(format!(
                "found {found}, which no request of this round wrote"
            )));
        }
    };
    let later = log.writers(block).find(|later| {
        secured.holds(later) && later.precedes(now) && after.is_some_and(|after| after < later.submitted)
    });
    match later {
        None => Ok(()),
        Some(later) => Err(place(format!("found {found}, which {later:?} had replaced"))),
    }
}

/// The request of this round that wrote a block.
fn writer(log: &ConventionalLog, block: u32, found: Content) -> Option<Result<&Entry, String>> {
    let stamp = match found {
        Content::Stamp(stamp) => stamp,
        Content::Zeros => return None,
        Content::Garbage { .. } => return Some(Err(format!("found {found}"))),
    };
    let entry = log.writers(block).find(|entry| entry.id == stamp.id)?;
    if stamp != entry.stamp(log.zone, block - entry.at) {
        return Some(Err(format!("found {found}, which belongs elsewhere")));
    }
    if !entry.possible() {
        return Some(Err(format!("found {found}, a request that was refused")));
    }
    Some(Ok(entry))
}

/// The blocks from the start, and after them only zeros.
fn contents(found: &Found) -> Result<Vec<Stamp>, String> {
    let mut stamps = Vec::new();
    for (block, content) in found.blocks.iter().enumerate() {
        match *content {
            Content::Stamp(stamp) if stamps.len() == block => stamps.push(stamp),
            Content::Zeros => {}
            other => {
                let end = stamps.len();
                return Err(format!(
                    "block {block} holds {other}, where the data from the zone's start ends at block {end}; {}",
                    seen(found)
                ));
            }
        }
    }
    Ok(stamps)
}

/// The pointer is where the data ends, and the state is one that a zone has after opening.
fn pointer(found: &Found, end: usize) -> Result<(), String> {
    let capacity = found.blocks.len();
    let right = match found.state {
        ZoneState::Full => found.pointer == capacity as u64,
        ZoneState::Empty => found.pointer == 0 && end == 0,
        ZoneState::Closed => found.pointer == end as u64 && end > 0 && end < capacity,
        _ => false,
    };
    if right {
        return Ok(());
    }
    Err(format!("the data ends at block {end}, but {}", seen(found)))
}

fn seen(found: &Found) -> String {
    let Found { pointer, state, .. } = found;
    format!(
        "the zone is reported {state:?} with its pointer at block {pointer} of {}",
        found.blocks.len()
    )
}

/// A zone's history next to what was found, taken apart.
struct Case<'a> {
    base: &'a Base,
    entries: &'a [Entry],
    secured: Secured,
    capacity: u32,
    full: bool,
    /// All that was there before is there.
    base_kept: bool,
    /// Requests of this round whose blocks are there, in their order.
    kept: Vec<&'a Entry>,
}

impl<'a> Case<'a> {
    fn new(
        zone: u32,
        base: &'a Base,
        entries: &'a [Entry],
        secured: Secured,
        found: &Found,
        contents: &[Stamp],
    ) -> Result<Self, String> {
        let full = found.state == ZoneState::Full;
        let common = contents
            .iter()
            .zip(&base.blocks)
            .take_while(|(a, b)| a == b)
            .count();
        let whole = common == base.blocks.len();
        if common > 0 && (!whole || (base.full && !full)) {
            return Err(format!(
                "of the {} blocks from before this round {common} are there; {}",
                base.blocks.len(),
                seen(found)
            ));
        }
        let kept = requests(zone, entries, contents, common)?;
        if common > 0 && base.full && !kept.is_empty() {
            return Err(format!("{:?} was written to a zone that was full", kept[0]));
        }
        let base_kept = whole && (full || !base.full);
        Ok(Case {
            base,
            entries,
            secured,
            capacity: found.blocks.len() as u32,
            full,
            base_kept,
            kept,
        })
    }

    /// Requests lie in the zone in an order in which they can have been done.
    fn order(&self) -> Result<(), String> {
        let mut earliest: Option<&Entry> = None;
        for entry in self.kept.iter().rev() {
            if let Some(later) = earliest
                && later.precedes(entry.submitted)
            {
                return Err(format!(
                    "{entry:?} lies before {later:?}, which was acknowledged before"
                ));
            }
            let time = |entry: &Entry| entry.done().unwrap_or(Time::MAX);
            if earliest.is_none_or(|other| time(entry) < time(other)) {
                earliest = Some(entry);
            }
        }
        Ok(())
    }

    fn resets(&self) -> impl Iterator<Item = &'a Entry> {
        self.entries
            .iter()
            .filter(|entry| entry.op == Op::Reset && entry.possible())
    }

    /// Nothing is there that certainly came before an acknowledged reset.
    fn resets_hold(&self) -> Result<(), String> {
        for reset in self.resets().filter(|reset| reset.done().is_some()) {
            if self.base_kept && !self.base.blocks.is_empty() {
                return Err(format!(
                    "{reset:?} was acknowledged, but what was there before still is"
                ));
            }
            if let Some(entry) = self.kept.iter().find(|entry| entry.precedes(reset.submitted)) {
                return Err(format!(
                    "{reset:?} was acknowledged, but {entry:?} from before is there"
                ));
            }
        }
        Ok(())
    }

    /// What is missing and should be there, unless a reset came after it.
    fn lost(&self) -> Vec<&'a Entry> {
        let kept: HashSet<u64> = self.kept.iter().map(|entry| entry.id).collect();
        let finishes = || self.entries.iter().filter(|entry| entry.op == Op::Finish);
        let finished_after = |entry: &Entry| {
            finishes().any(|finish| finish.done().is_some() && entry.precedes(finish.submitted))
        };
        self.entries
            .iter()
            .filter(|entry| match entry.op {
                Op::Write | Op::Append => {
                    !kept.contains(&entry.id) && (self.secured.holds(entry) || finished_after(entry))
                }
                Op::Finish => !self.full && entry.done().is_some(),
                Op::Reset => false,
            })
            .collect()
    }

    /// A reset that can have been the last one that happened.
    fn last_reset(&self, lost: &[&Entry]) -> Option<&'a Entry> {
        if self.base_kept && !self.base.blocks.is_empty() {
            return None;
        }
        self.resets().find(|reset| {
            lost.iter().all(|entry| !reset.precedes(entry.submitted))
                && self.kept.iter().all(|entry| !entry.precedes(reset.submitted))
        })
    }

    /// Whatever is missing was taken by a reset.
    fn nothing_lost(&self) -> Result<(), String> {
        let lost = self.lost();
        let base_lost = !self.base_kept;
        if (lost.is_empty() && !base_lost) || self.last_reset(&lost).is_some() {
            return Ok(());
        }
        let resets: Vec<_> = self.resets().collect();
        // The last one is what resets explain least.
        let what = match lost.iter().max_by_key(|entry| entry.done()) {
            Some(entry) => format!("{entry:?} was acknowledged"),
            None => format!("{} blocks were there before this round", self.base.blocks.len()),
        };
        Err(format!(
            "{what} ({} requests in all are missing), the data of {} requests of this round is there, and none of the \
             resets explains that: {resets:?}",
            lost.len(),
            self.kept.len(),
        ))
    }

    /// A zone that is full without being written to its end was finished.
    fn full(&self) -> Result<(), String> {
        let written: u32 = self.kept.iter().map(|entry| entry.blocks).sum();
        let at_start = if self.base_kept {
            self.base.blocks.len() as u32
        } else {
            0
        };
        let at_end = at_start + written == self.capacity;
        let was_full = self.base.full && self.base_kept && self.resets().all(|reset| reset.done().is_none());
        if !self.full || at_end || was_full {
            return Ok(());
        }
        let holds = |finish: &&Entry| {
            finish.op == Op::Finish
                && finish.possible()
                && self.kept.iter().all(|entry| !finish.precedes(entry.submitted))
                && self
                    .resets()
                    .all(|reset| reset.done().is_none() || !finish.precedes(reset.submitted))
        };
        if self.entries.iter().any(|entry| holds(&entry)) {
            return Ok(());
        }
        Err(format!(
            "the zone is full with {} blocks and nothing finished it",
            at_start + written
        ))
    }

    fn counts(&self) -> (u32, u32) {
        let done = self.kept.iter().filter(|entry| entry.done().is_some()).count();
        (done as u32, (self.kept.len() - done) as u32)
    }
}

/// The requests whose blocks lie from block `fresh`: whole ones, each once, each in its place.
fn requests<'a>(
    zone: u32,
    entries: &'a [Entry],
    contents: &[Stamp],
    fresh: usize,
) -> Result<Vec<&'a Entry>, String> {
    let by_id: HashMap<u64, &Entry> = entries
        .iter()
        .filter(|entry| matches!(entry.op, Op::Write | Op::Append))
        .map(|entry| (entry.id, entry))
        .collect();
    let mut kept: Vec<&Entry> = Vec::new();
    let mut at = fresh;
    while at < contents.len() {
        let first = contents[at];
        let Some(&entry) = by_id.get(&first.id) else {
            return Err(format!(
                "block {at} holds {first}, which is no request of this round to this zone"
            ));
        };
        if entry.outcome == Outcome::Refused {
            return Err(format!("block {at} holds {first}, a request that was refused"));
        }
        if entry.at != ANYWHERE && entry.at as usize != at {
            return Err(format!(
                "block {at} holds {first}, which went to block {}",
                entry.at
            ));
        }
        if kept.iter().any(|other| other.id == entry.id) {
            return Err(format!("block {at} holds {first}, which is there already"));
        }
        for index in 0..entry.blocks {
            let block = at + index as usize;
            let expected = entry.stamp(zone, index);
            if contents.get(block) != Some(&expected) {
                let found = contents.get(block).map_or("nothing".into(), Stamp::to_string);
                return Err(format!(
                    "block {block} holds {found}, where {expected} belongs: {entry:?}"
                ));
            }
        }
        kept.push(entry);
        at += entry.blocks as usize;
    }
    Ok(kept)
}

#[cfg(test)]
mod tests;
