//! What was asked of each zone, and what was acknowledged: the only memory of a round.
//!
//! A clock that counts events gives each request a time of submission (before the device can see it) and of
//! acknowledgement (after the client saw it). Where one request was acknowledged before another was submitted,
//! their order is certain; else either came first.

use super::stamp::{ANYWHERE, Content, Stamp};

/// A point in the order of events.
pub type Time = u64;

/// What a request does to its zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Writes blocks at a place that the request names.
    Write,
    /// Writes blocks where the device chooses.
    Append,
    /// Empties the zone.
    Reset,
    /// Makes the zone full.
    Finish,
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing was heard of it: it happened or not.
    InFlight,
    /// Acknowledged.
    Done(Time),
    /// Refused: it must not have happened.
    Refused,
}

/// A request that may change a zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Number of the request.
    pub id: u64,
    /// What it does.
    pub op: Op,
    /// First block in the zone; of an append [`ANYWHERE`] until it is acknowledged.
    pub at: u32,
    /// How many blocks.
    pub blocks: u32,
    /// When it was submitted.
    pub submitted: Time,
    /// What became of it.
    pub outcome: Outcome,
}

impl Entry {
    /// When it was acknowledged, if it was.
    pub fn done(&self) -> Option<Time> {
        match self.outcome {
            Outcome::Done(time) => Some(time),
            Outcome::InFlight | Outcome::Refused => None,
        }
    }

    /// Whether it certainly came before what was submitted at `time`.
    pub fn precedes(&self, time: Time) -> bool {
        self.done().is_some_and(|done| done < time)
    }

    /// Whether it may have happened.
    pub fn possible(&self) -> bool {
        self.outcome != Outcome::Refused
    }

    /// The stamp of its block `index` in `zone`.
    pub fn stamp(&self, zone: u32, index: u32) -> Stamp {
        let at = match self.op {
            Op::Append => ANYWHERE,
            _ => self.at,
        };
        Stamp {
            id: self.id,
            zone,
            at,
            index,
        }
    }
}

/// What a sequential zone held when the round began, as it was read back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Base {
    /// Its blocks up to the written end.
    pub blocks: Vec<Stamp>,
    /// Whether it was full.
    pub full: bool,
}

/// The log of a sequential zone.
#[derive(Debug)]
pub struct ZoneLog {
    /// Its number.
    pub zone: u32,
    /// Before the first entry.
    pub base: Base,
    /// All requests for it that change it.
    pub entries: Vec<Entry>,
    /// What a read must find as long as no reset is submitted.
    pub known: Vec<Option<Stamp>>,
    /// Resets submitted; who reads looks whether it moved.
    pub resets: u32,
    resets_in_flight: u32,
    last_reset_done: Time,
}

impl ZoneLog {
    /// A log that begins with `base`.
    pub fn new(zone: u32, capacity: u32, base: Base) -> Self {
        let mut known = vec![None; capacity as usize];
        for (slot, stamp) in known.iter_mut().zip(&base.blocks) {
            *slot = Some(*stamp);
        }
        ZoneLog {
            zone,
            base,
            entries: Vec::new(),
            known,
            resets: 0,
            resets_in_flight: 0,
            last_reset_done: 0,
        }
    }

    /// Notes a request, before it is submitted. Returns its place in the log.
    pub fn submit(&mut self, entry: Entry) -> usize {
        if entry.op == Op::Reset {
            self.resets += 1;
            self.resets_in_flight += 1;
            self.known.fill(None);
        }
        self.entries.push(entry);
        self.entries.len() - 1
    }

    /// Notes that a request was acknowledged; `at` is where its blocks went.
    ///
    /// # Errors
    /// If they went where another acknowledged request has its blocks.
    pub fn acknowledge(&mut self, index: usize, at: u32, now: Time) -> Result<(), String> {
        let entry = &mut self.entries[index];
        entry.outcome = Outcome::Done(now);
        let entry = match entry.op {
            Op::Append | Op::Write => {
                entry.at = at;
                *entry
            }
            Op::Reset => {
                self.resets_in_flight -= 1;
                self.last_reset_done = now;
                return Ok(());
            }
            Op::Finish => return Ok(()),
        };
        let end = at.saturating_add(entry.blocks) as usize;
        let Some(range) = self.known.get_mut(at as usize..end) else {
            return Err(format!("{entry:?} went past the zone's capacity"));
        };
        // A reset that was under way may have come after it.
        if self.resets_in_flight > 0 || entry.submitted < self.last_reset_done {
            return Ok(());
        }
        for (index, slot) in (0..).zip(range) {
            if let Some(other) = slot.replace(entry.stamp(self.zone, index)) {
                let block = at + index;
                return Err(format!(
                    "block {block} was given to {entry:?}, and before that to {other}"
                ));
            }
        }
        Ok(())
    }

    /// Notes that a request was refused; with `maybe`, that it may have happened nevertheless (a reset of all
    /// zones of which one could not be reset).
    pub fn refuse(&mut self, index: usize, maybe: bool) {
        let entry = &mut self.entries[index];
        if entry.op == Op::Reset && !maybe {
            self.resets_in_flight -= 1;
        }
        if !maybe {
            entry.outcome = Outcome::Refused;
        }
    }

    /// Where the acknowledged blocks end, as far as that is certain.
    pub fn known_end(&self) -> u32 {
        let last = self.known.iter().rposition(Option::is_some);
        last.map_or(0, |last| last as u32 + 1)
    }
}

/// The log of a conventional zone.
#[derive(Debug)]
pub struct ConventionalLog {
    /// Its number.
    pub zone: u32,
    /// Before the first entry.
    pub base: Vec<Content>,
    /// All writes to it.
    pub entries: Vec<Entry>,
    by_block: Vec<Vec<u32>>,
}

impl ConventionalLog {
    /// A log that begins with these blocks.
    pub fn new(zone: u32, base: Vec<Content>) -> Self {
        ConventionalLog {
            zone,
            entries: Vec::new(),
            by_block: vec![Vec::new(); base.len()],
            base,
        }
    }

    /// Notes a write, before it is submitted. Returns its place in the log.
    pub fn submit(&mut self, entry: Entry) -> usize {
        let index = self.entries.len();
        for block in entry.at..entry.at + entry.blocks {
            self.by_block[block as usize].push(index as u32);
        }
        self.entries.push(entry);
        index
    }

    /// The writes that cover a block.
    pub fn writers(&self, block: u32) -> impl Iterator<Item = &Entry> {
        let indices = self.by_block[block as usize].iter();
        indices.map(|&index| &self.entries[index as usize])
    }
}
