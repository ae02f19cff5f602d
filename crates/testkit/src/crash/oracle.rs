//! What was asked and answered, from the side of a client, and what the data looked like when it began.

use std::collections::BTreeMap;

use zbdkit_block::{Device, Error};
use zbdkit_zone::{Geometry, Recommendation, ZoneInfo};

use super::disk::SECTOR;

/// Bytes of a sector.
pub const PIECE: usize = SECTOR as usize;

const STAMP: [u8; 4] = *b"zSTP";

/// The bytes of write `id`, unique in every sector.
pub fn payload(id: u32, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    for (index, sector) in bytes.chunks_exact_mut(PIECE).enumerate() {
        let (words, _) = sector.as_chunks_mut::<16>();
        words.fill(stamp(id, index as u32));
    }
    bytes
}

fn stamp(id: u32, index: u32) -> [u8; 16] {
    let mut stamp = [0; 16];
    stamp[..4].copy_from_slice(&STAMP);
    stamp[4..8].copy_from_slice(&id.to_le_bytes());
    stamp[8..12].copy_from_slice(&index.to_le_bytes());
    stamp[12..].copy_from_slice(&(!(id ^ index.rotate_left(16))).to_le_bytes());
    stamp
}

/// The bytes of the descriptor extension with stamp `id`.
pub fn extension(id: u32, geometry: &Geometry) -> Vec<u8> {
    let size = u64::from(geometry.extension_size());
    let mut bytes = payload(id, size.next_multiple_of(SECTOR));
    bytes.truncate(size as usize);
    bytes
}

/// What a view has where a sector cannot be read.
pub const UNREADABLE: [u8; PIECE] = [b'u'; PIECE];

/// What a write brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Its stamp.
    Stamp,
    /// Zeros.
    Zeros,
    /// Nothing: the blocks are marked uncorrectable.
    Unreadable,
}

impl Fill {
    /// What sector `index` of write `id` holds.
    pub fn found(self, id: u32, index: u32) -> Found {
        match self {
            Fill::Stamp => Found::Stamp { id, index },
            Fill::Zeros => Found::Zeros,
            Fill::Unreadable => Found::Unreadable,
        }
    }
}

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Zeros.
    Zeros,
    /// Sector `index` of write `id`.
    Stamp {
        /// The write.
        id: u32,
        /// Which sector of it.
        index: u32,
    },
    /// It cannot be read.
    Unreadable,
    /// Nothing that anybody wrote.
    Garbage,
}

/// Reads a sector's stamp.
pub fn look(sector: &[u8]) -> Found {
    if sector == [0; PIECE].as_slice() {
        return Found::Zeros;
    }
    if sector == UNREADABLE.as_slice() {
        return Found::Unreadable;
    }
    let word = |at: usize| u32::from_le_bytes([sector[at], sector[at + 1], sector[at + 2], sector[at + 3]]);
    let (id, index) = (word(4), word(8));
    // Each group of sixteen bytes is the same as the one before.
    if sector[..16] == stamp(id, index) && sector[16..] == sector[..PIECE - 16] {
        Found::Stamp { id, index }
    } else {
        Found::Garbage
    }
}

/// What the operator can set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Setting {
    /// Nothing.
    Normal,
    /// Read-only.
    ReadOnly,
    /// Offline.
    Offline,
}

/// A request that matters to the judge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data.
    Write {
        /// Its stamp.
        id: u32,
        /// Where, absolute bytes; unknown for an append that was not answered.
        offset: Option<u64>,
        /// Bytes.
        len: u64,
        /// What it brings.
        fill: Fill,
    },
    /// The bytes may become zeros.
    Discard {
        /// Where, absolute bytes.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Flush; also a clean close.
    Flush,
    /// Reset.
    Reset,
    /// Reset of all zones; also by a format ([`Oracle::formats`]).
    ResetAll,
    /// Finish.
    Finish,
    /// The device finishes the zone by itself.
    FinishByDevice,
    /// The operator's word.
    Set(Setting),
    /// The zone gets a random write area.
    OpenZrwa,
    /// The pointer of a zone with such an area is moved.
    Commit {
        /// To there, absolute bytes.
        end: u64,
    },
    /// The zone gets a descriptor extension.
    Attach {
        /// Its stamp.
        id: u32,
        /// And a random write area.
        zrwa: bool,
    },
    /// The device recommends something.
    Recommend(Option<Recommendation>),
}

impl Kind {
    /// Whether it makes the zone full.
    pub fn is_finish(&self) -> bool {
        matches!(self, Kind::Finish | Kind::FinishByDevice)
    }

    /// Whether it gives the zone a random write area.
    pub fn allocates(&self) -> bool {
        matches!(self, Kind::OpenZrwa | Kind::Attach { zrwa: true, .. })
    }
}

/// How a request was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Ok,
    /// A rule forbade it: nothing was changed.
    Refused,
    /// It failed: anything between nothing and all of it.
    Failed,
}

/// A request and its answer. Ticks are the machine's.
#[derive(Clone, Debug)]
pub struct Op {
    /// What.
    pub kind: Kind,
    /// Of which zone; 0 where it is of none.
    pub zone: u32,
    /// When it was submitted.
    pub submitted: u64,
    /// When and how it was answered.
    pub done: Option<(u64, Answer)>,
    /// Counters of its zone at submission and at the answer.
    pub at_submission: Counts,
    /// As above.
    pub at_answer: Counts,
    /// Its end was seen as a failure of the epoch.
    pub epoch_failed: bool,
}

/// Resets and finishes of a zone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Resets.
    pub resets: u32,
    /// Finishes.
    pub finishes: u32,
}

impl Op {
    /// Whether it was submitted before `tick` and may have changed something.
    pub fn may_count(&self, tick: u64) -> bool {
        self.submitted < tick && !matches!(self.done, Some((at, Answer::Refused)) if at < tick)
    }

    /// When it was acknowledged, if that was before `tick`.
    pub fn acknowledged(&self, tick: u64) -> Option<u64> {
        self.done
            .filter(|(at, answer)| *answer == Answer::Ok && *at < tick)
            .map(|(at, _)| at)
    }

    /// Whether its fate is open at `tick`: in flight or failed.
    pub fn open_ended(&self, tick: u64) -> bool {
        self.may_count(tick) && self.acknowledged(tick).is_none()
    }

    /// The generations (resets of its zone) that it may belong to.
    pub fn generations(&self, tick: u64) -> (u32, u32) {
        let last = match self.acknowledged(tick) {
            Some(_) => self.at_answer.resets,
            None => u32::MAX,
        };
        (self.at_submission.resets, last)
    }

    /// Whether it may belong to that generation.
    pub fn may_be_of(&self, generation: u32, tick: u64) -> bool {
        let (first, last) = self.generations(tick);
        first <= generation && generation <= last
    }

    /// Whether it belongs to that generation for sure.
    pub fn is_of(&self, generation: u32, tick: u64) -> bool {
        self.generations(tick) == (generation, generation)
    }
}

/// What an image showed when it was opened: all of it durable from then on.
#[derive(Clone, Debug)]
pub struct Baseline {
    /// The logical block size.
    pub block_size: u32,
    /// The zones.
    pub zones: Vec<ZoneInfo>,
    /// What each zone read as; none where it was offline.
    pub contents: Vec<Option<Vec<u8>>>,
    /// The zones' descriptor extensions.
    pub extensions: Vec<Option<Vec<u8>>>,
}

/// The log of one run.
#[derive(Clone, Debug)]
pub struct Oracle {
    /// The device.
    pub geometry: Geometry,
    /// How it began.
    pub baseline: Baseline,
    /// What happened.
    pub ops: Vec<Op>,
    /// Where in `ops` a write is.
    pub writes: BTreeMap<u32, usize>,
    /// Which of the resets of all zones gave the device a block size, and which one. One ends before the next.
    pub formats: BTreeMap<usize, u32>,
    /// What was seen of zones' counters besides: tick, zone, counters.
    pub seen: Vec<(u64, u32, Counts)>,
    next_id: u32,
    /// The run's opening was over at this tick.
    pub opened: u64,
    /// The run's clean close was asked for at this tick.
    pub closing: Option<u64>,
    /// The clean close was answered at this tick.
    pub closed: Option<u64>,
}

impl Oracle {
    /// The log of a run over an image that looked like this. Stamps start at `first_id`.
    pub fn new(geometry: Geometry, baseline: Baseline, first_id: u32) -> Oracle {
        Oracle {
            geometry,
            baseline,
            ops: Vec::new(),
            writes: BTreeMap::new(),
            formats: BTreeMap::new(),
            seen: Vec::new(),
            next_id: first_id,
            opened: u64::MAX,
            closing: None,
            closed: None,
        }
    }

    /// Whether a format is under way.
    pub fn is_formatting(&self) -> bool {
        let last = self.formats.last_key_value();
        last.is_some_and(|(op, _)| self.ops[*op].done.is_none())
    }

    /// The stamp of the next write.
    pub fn next_id(&self) -> u32 {
        self.next_id
    }

    /// Notes a request; its number.
    pub fn submit(&mut self, tick: u64, zone: u32, kind: Kind, device: &Device) -> usize {
        if let Kind::Write { id, .. } = kind {
            self.writes.insert(id, self.ops.len());
        }
        if let Kind::Write { id, .. } | Kind::Attach { id, .. } = kind {
            self.next_id = self.next_id.max(id + 1);
        }
        let counts = counts(device, zone);
        self.ops.push(Op {
            kind,
            zone,
            submitted: tick,
            done: None,
            at_submission: counts,
            at_answer: counts,
            epoch_failed: false,
        });
        self.ops.len() - 1
    }

    /// Notes the answer; `offset` is where an append went.
    pub fn answer(&mut self, tick: u64, op: usize, result: Result<Option<u64>, &Error>, device: &Device) {
        if self.ops[op].kind == Kind::ResetAll {
            let zones = 0..self.geometry.nr_zones();
            self.seen
                .extend(zones.map(|zone| (tick, zone, counts(device, zone))));
        }
        let op = &mut self.ops[op];
        op.at_answer = counts(device, op.zone);
        op.epoch_failed = matches!(result, Err(Error::Epoch { .. }));
        op.done = Some((
            tick,
            match result {
                Ok(at) => {
                    if let (Kind::Write { offset, .. }, Some(at)) = (&mut op.kind, at) {
                        *offset = Some(at);
                    }
                    Answer::Ok
                }
                Err(Error::Io { .. } | Error::Epoch { .. } | Error::Format(_)) => Answer::Failed,
                Err(_) => Answer::Refused,
            },
        ));
    }

    /// The answer of the epoch's failure is final: a later change that was acknowledged all the same.
    pub fn acknowledged_after_the_end(&self) -> Option<&Op> {
        let end = self
            .ops
            .iter()
            .filter(|op| op.epoch_failed)
            .filter_map(|op| op.done.map(|(at, _)| at))
            .min()?;
        self.ops
            .iter()
            .find(|op| op.submitted > end && matches!(op.done, Some((_, Answer::Ok))))
    }
}

fn counts(device: &Device, zone: u32) -> Counts {
    let Some(engine) = device.engine() else {
        return Counts::default();
    };
    let counters = engine.info(zbdkit_zone::ZoneNo(zone)).counters;
    Counts {
        resets: counters.resets,
        finishes: counters.finishes,
    }
}
