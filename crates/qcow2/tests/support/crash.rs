//! A disk in memory that remembers what was written and what was synced, and what a power cut leaves of it.
//!
//! A sync covers what was completed when it was submitted. Anything else may be on the medium or not, in pieces of 512
//! bytes, whatever the order it was written in.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use zbdkit_io::{File, IoBuf, LocalBoxFuture, Storage, StorageOp, yield_now};

use super::Rng;

const BLOCK: u64 = 4096;
const SECTOR: u64 = 512;

/// The bytes of a file, cheap to copy.
#[derive(Clone, Default)]
pub struct Bytes {
    len: u64,
    blocks: BTreeMap<u64, Arc<[u8; BLOCK as usize]>>,
}

/// One thing that happened to the disk.
#[derive(Clone)]
enum Event {
    Write {
        offset: u64,
        data: Arc<[u8]>,
    },
    Zero {
        offset: u64,
        len: u64,
    },
    Length(u64),
    /// Covers the file's events before this moment.
    Sync(usize),
}

/// A file on the disk.
#[derive(Clone)]
pub struct Disk {
    state: Arc<Mutex<State>>,
}

struct State {
    /// What it began with, durable.
    base: Bytes,
    now: Bytes,
    /// Each with its moment.
    events: Vec<(usize, Event)>,
    clock: Arc<AtomicUsize>,
    /// Delays requests, so that those in flight together end in any order.
    rng: Option<Rng>,
}

impl Bytes {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Copies bytes out; zeros past the end.
    pub fn read(&self, offset: u64, to: &mut [u8]) {
        to.fill(0);
        self.each_block(offset, to.len() as u64, |block, within, at| {
            if let Some(bytes) = self.blocks.get(&block) {
                to[at..at + within.len()].copy_from_slice(&bytes[within]);
            }
        });
    }

    /// Puts bytes in, growing as needed.
    pub fn write(&mut self, offset: u64, from: &[u8]) {
        let mut blocks = std::mem::take(&mut self.blocks);
        self.each_block(offset, from.len() as u64, |block, within, at| {
            let bytes = blocks
                .entry(block)
                .or_insert_with(|| Arc::new([0; BLOCK as usize]));
            let n = within.len();
            Arc::make_mut(bytes)[within].copy_from_slice(&from[at..at + n]);
        });
        self.blocks = blocks;
        self.len = self.len.max(offset + from.len() as u64);
    }

    /// Zeroes what lies below the end.
    pub fn zero(&mut self, offset: u64, len: u64) {
        let end = (offset + len).min(self.len);
        let mut blocks = std::mem::take(&mut self.blocks);
        self.each_block(offset, end.saturating_sub(offset), |block, within, _| {
            if within.len() == BLOCK as usize {
                blocks.remove(&block);
            } else if let Some(bytes) = blocks.get_mut(&block) {
                Arc::make_mut(bytes)[within].fill(0);
            }
        });
        self.blocks = blocks;
    }

    /// Cuts it, or adds zeros.
    pub fn set_len(&mut self, len: u64) {
        self.zero(len, self.len.saturating_sub(len));
        self.len = len;
    }

    /// Calls with the number of each block, the range within it, and where in the whole that begins.
    fn each_block(&self, offset: u64, len: u64, mut each: impl FnMut(u64, Range<usize>, usize)) {
        let mut at = offset;
        while at < offset + len {
            let within = at % BLOCK;
            let n = (BLOCK - within).min(offset + len - at);
            each(
                at / BLOCK,
                within as usize..(within + n) as usize,
                (at - offset) as usize,
            );
            at += n;
        }
    }

    /// All of it.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all = vec![0; self.len as usize];
        self.read(0, &mut all);
        all
    }

    fn apply(&mut self, event: &Event, there: &mut dyn FnMut() -> bool) {
        match event {
            Event::Length(len) => {
                if there() {
                    self.set_len(*len);
                }
            }
            Event::Sync(_) => {}
            Event::Write { offset, data } => {
                pieces(*offset, data.len() as u64, |piece| {
                    if there() {
                        let from = (piece.start - offset) as usize..(piece.end - offset) as usize;
                        self.write(piece.start, &data[from]);
                    }
                });
            }
            Event::Zero { offset, len } => {
                // What lies past the end is zeros already.
                let len = self.len.min(offset + len).saturating_sub(*offset);
                pieces(*offset, len, |piece| {
                    if there() {
                        self.zero(piece.start, piece.end - piece.start);
                    }
                });
            }
        }
    }
}

fn pieces(offset: u64, len: u64, mut each: impl FnMut(Range<u64>)) {
    let mut at = offset;
    while at < offset + len {
        let end = ((at / SECTOR + 1) * SECTOR).min(offset + len);
        each(at..end);
        at = end;
    }
}

impl Disk {
    /// An empty file.
    pub fn new() -> Disk {
        Disk::of(Bytes::default())
    }

    /// A file that holds these bytes, durably.
    pub fn of(bytes: Bytes) -> Disk {
        Disk {
            state: Arc::new(Mutex::new(State {
                base: bytes.clone(),
                now: bytes,
                events: Vec::new(),
                clock: Arc::default(),
                rng: None,
            })),
        }
    }

    /// A file that holds these bytes, durably, next to this one: moments are of both, syncs of one.
    pub fn beside(&self, bytes: Bytes) -> Disk {
        let disk = Disk::of(bytes);
        let clock = self.with(|state| state.clock.clone());
        disk.with(|state| state.clock = clock);
        disk
    }

    /// A file that holds these bytes, durably.
    pub fn from_vec(from: &[u8]) -> Disk {
        let mut bytes = Bytes::default();
        bytes.write(0, from);
        Disk::of(bytes)
    }

    /// Lets requests take a while, so that they overtake each other.
    pub fn delay(&self, seed: u64) {
        self.with(|state| state.rng = Some(Rng(seed)));
    }

    /// A handle for the code under test.
    pub fn file(&self) -> File {
        File::custom(Arc::new(self.clone()))
    }

    /// What it holds now.
    pub fn now(&self) -> Bytes {
        self.with(|state| state.now.clone())
    }

    /// The present, a moment to cut the power at: what happens from now on is later.
    pub fn moment(&self) -> usize {
        self.with(|state| state.clock.load(Ordering::SeqCst))
    }

    /// A moment up to now, more often than not one just before a sync: most is at stake then.
    pub fn some_moment(&self, rng: &mut Rng) -> usize {
        let syncs: Vec<usize> = self.with(|state| {
            let moment =
                |(moment, event): &(usize, Event)| matches!(event, Event::Sync(_)).then_some(*moment);
            state.events.iter().filter_map(moment).collect()
        });
        if syncs.is_empty() || rng.one_in(3) {
            return rng.below(self.moment() as u64 + 1) as usize;
        }
        syncs[rng.below(syncs.len() as u64) as usize]
    }

    /// What a power cut at a moment leaves, one possibility by `rng`: all that a sync covered, and of the rest what chance
    /// would have.
    pub fn power_cut(&self, moment: usize, rng: &mut Rng) -> Bytes {
        // Nearly nothing and nearly everything come up as well as the middle.
        let bias = [0, 1, 8, 8, 15, 16][rng.below(6) as usize];
        // Whole changes or pieces of them.
        let torn = rng.one_in(2);
        self.with(|state| {
            let covered = state.until(moment).map(|(_, event)| match event {
                Event::Sync(upto) => *upto,
                _ => 0,
            });
            let covered = covered.max().unwrap_or(0);
            let mut bytes = state.base.clone();
            for (at, event) in state.until(moment) {
                if *at < covered {
                    bytes.apply(event, &mut || true);
                } else if torn {
                    bytes.apply(event, &mut || rng.below(16) < bias);
                } else {
                    let there = rng.below(16) < bias;
                    bytes.apply(event, &mut || there);
                }
            }
            bytes
        })
    }

    /// What the death of the process at a moment leaves: all that happened.
    pub fn kill(&self, moment: usize) -> Bytes {
        self.with(|state| {
            let mut bytes = state.base.clone();
            for (_, event) in state.until(moment) {
                bytes.apply(event, &mut || true);
            }
            bytes
        })
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn change(&self, event: Event) {
        self.with(|state| {
            state.now.apply(&event, &mut || true);
            let moment = state.clock.fetch_add(1, Ordering::SeqCst);
            state.events.push((moment, event));
        });
    }
}

impl State {
    /// What happened before a moment.
    fn until(&self, moment: usize) -> impl Iterator<Item = &(usize, Event)> {
        self.events.iter().take_while(move |(at, _)| *at < moment)
    }
}

impl Default for Disk {
    fn default() -> Disk {
        Disk::new()
    }
}

impl Storage for Disk {
    fn submit(&self, op: StorageOp) -> LocalBoxFuture<'static, io::Result<()>> {
        let disk = self.clone();
        let (covers, turns) = self.with(|state| {
            let turns = state.rng.as_mut().map_or(0, |rng| rng.below(4));
            (state.clock.load(Ordering::SeqCst), turns)
        });
        Box::pin(async move {
            for _ in 0..turns {
                yield_now().await;
            }
            match op {
                StorageOp::Read { buf, offset } => read(&disk.now(), &buf, offset),
                StorageOp::Write { buf, offset } => disk.change(Event::Write {
                    offset,
                    data: buf.to_vec().into(),
                }),
                StorageOp::DataSync | StorageOp::Sync => disk.change(Event::Sync(covers)),
                StorageOp::PunchHole { offset, len } => disk.change(Event::Zero { offset, len }),
                StorageOp::ZeroRange { offset, len } => {
                    disk.grow(offset + len);
                    disk.change(Event::Zero { offset, len });
                }
                StorageOp::Allocate { offset, len } => disk.grow(offset + len),
            }
            Ok(())
        })
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.now().len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Event::Length(len));
        Ok(())
    }
}

impl Disk {
    fn grow(&self, len: u64) {
        if self.now().len() < len {
            self.change(Event::Length(len));
        }
    }
}

fn read(bytes: &Bytes, buf: &IoBuf, offset: u64) {
    let mut copy = vec![0; buf.len()];
    bytes.read(offset, &mut copy);
    buf.copy_from(&copy);
}
