//! What the client threads of a round share: the logs, the clock, who writes where, and when it ends.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::area::{AreaBase, AreaEntry, AreaLog, AreaOp, Areas};
use super::channel::Config;
use super::log::{Base, ConventionalLog, Entry, Op, Outcome, Time, ZoneLog};
use super::rng::Rng;
use super::stamp::{ANYWHERE, Content, first_id};

/// Sectors of virtio-blk.
pub const SECTOR: u64 = 512;

/// The device, in its logical blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of a block.
    pub block: u32,
    /// Blocks of a zone, with what lies past its capacity.
    pub zone_blocks: u32,
    /// Blocks that a sequential zone takes.
    pub capacity: u32,
    /// Zones.
    pub zones: u32,
    /// Conventional zones, the first ones.
    pub conventional: u32,
    /// Most blocks of an append.
    pub max_append: u32,
    /// Zones that are used with a random write area, the last ones.
    pub areas: Option<Areas>,
}

impl Geometry {
    /// From the device's configuration; `capacity` and `conventional` are in its report.
    pub fn new(config: &Config, capacity: u64, conventional: u32) -> Option<Self> {
        let block = config.blk_size;
        let blocks = |sectors: u64| u32::try_from(sectors.checked_mul(SECTOR)? / u64::from(block)).ok();
        if block == 0 || config.zone_sectors == 0 {
            return None;
        }
        Some(Geometry {
            block,
            zone_blocks: blocks(config.zone_sectors.into())?,
            capacity: blocks(capacity)?,
            zones: u32::try_from(config.capacity / u64::from(config.zone_sectors)).ok()?,
            conventional,
            max_append: blocks(config.max_append_sectors.into())?,
            areas: config.areas,
        })
    }

    /// The first zone that is used with a random write area; behind the last one where none is.
    pub fn first_area(&self) -> u32 {
        self.zones - self.areas.map_or(0, |areas| areas.zones)
    }

    /// The sector of a zone's block.
    pub fn sector(&self, zone: u32, block: u32) -> u64 {
        (u64::from(zone) * u64::from(self.zone_blocks) + u64::from(block)) * u64::from(self.block) / SECTOR
    }
}

/// How a round ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// SIGKILL in mid-traffic.
    Kill,
    /// SIGKILL when every request is acknowledged.
    KillIdle,
    /// SIGTERM in mid-traffic.
    Term,
}

/// What a round does.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Its number, from 1.
    pub round: u64,
    /// It ends when so many requests are acknowledged,
    pub target: u64,
    /// and this time after that.
    pub delay: Duration,
    /// How.
    pub end: End,
    /// Requests in flight on each queue.
    pub depth: usize,
    /// Longest request, in blocks.
    pub longest: u32,
    /// How likely each request is, in the order of [`Plan::KINDS`].
    pub weights: [u32; Plan::KINDS],
    /// Descriptors as Linux makes them.
    pub indirect: bool,
}

impl Plan {
    /// Kinds of requests: write, append, conventional write, read, flush, reset, finish, open and close, report,
    /// append to a zone that another queue writes, reset of all zones.
    pub const KINDS: usize = 11;
    /// The place of resets of all zones among them.
    pub const RESET_ALL: usize = 10;

    /// What round `round` of that seed does.
    pub fn new(seed: &Rng, round: u64, max_acks: u64, longest: u32) -> Self {
        let mut rng = seed.fork(round);
        let mut weights = [400, 300, 80, 80, 30, 8, 6, 6, 4, 2, 0];
        match rng.below(6) {
            // Many resets and finishes, and sometimes all zones at once.
            0 => weights = [250, 250, 40, 60, 20, 60, 40, 20, 10, 4, 1],
            // Hardly anything but appends.
            1 => weights = [20, 800, 10, 20, 10, 4, 2, 2, 2, 2, 0],
            // A flush every few requests.
            2 => weights = [300, 200, 100, 20, 200, 6, 4, 2, 2, 2, 0],
            _ => {}
        }
        Plan {
            round,
            target: if rng.one_in(3) {
                rng.skewed(1, max_acks)
            } else {
                1 + rng.below(max_acks)
            },
            delay: Duration::from_micros(if rng.one_in(2) { 0 } else { rng.below(500) }),
            end: match rng.below(20) {
                0 | 1 => End::KillIdle,
                2 => End::Term,
                _ => End::Kill,
            },
            depth: [1, 4, 16, 32, 32][rng.below(5) as usize],
            longest: longest.min([1, 4, 16, 64, 256][rng.below(5) as usize]),
            weights,
            indirect: rng.one_in(2),
        }
    }
}

/// Counts of a round, or of all.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    /// Acknowledged requests by kind.
    pub acknowledged: BTreeMap<&'static str, u64>,
    /// Requests that the zone rules refused, by status.
    pub refused: BTreeMap<String, u64>,
    /// Bytes that were compared.
    pub verified: u64,
    /// Requests in flight when the daemon ended.
    pub in_flight: u64,
    /// Acknowledged writes and appends whose data was there afterwards.
    pub kept: u64,
    /// The same of those in flight.
    pub kept_unacknowledged: u64,
}

impl Counts {
    /// Adds another's.
    pub fn add(&mut self, other: &Counts) {
        for (kind, count) in &other.acknowledged {
            *self.acknowledged.entry(kind).or_default() += count;
        }
        for (status, count) in &other.refused {
            *self.refused.entry(status.clone()).or_default() += count;
        }
        self.verified += other.verified;
        self.in_flight += other.in_flight;
        self.kept += other.kept;
        self.kept_unacknowledged += other.kept_unacknowledged;
    }

    /// All acknowledged requests.
    pub fn total(&self) -> u64 {
        self.acknowledged.values().sum()
    }

    /// All refused requests.
    pub fn total_refused(&self) -> u64 {
        self.refused.values().sum()
    }
}

/// What is thought of a zone that nobody uses. It may be wrong; who takes the zone asks the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hint {
    Empty,
    Partial,
    Full,
}

/// A zone to which every queue appends.
#[derive(Debug, Clone, Copy)]
pub(super) struct AppendZone {
    pub zone: u32,
    /// Blocks that are written or asked for.
    pub reserved: u32,
}

/// Who uses which zone.
#[derive(Debug)]
pub(super) struct Pool {
    pub append: Vec<AppendZone>,
    /// Zones that are on their way into `append`.
    pub append_coming: usize,
    pub used: Vec<bool>,
    pub hints: Vec<Hint>,
}

impl Pool {
    /// Takes a zone, rather one that is partly written, since such zones are limited.
    pub fn take(&mut self, rng: &mut Rng) -> Option<u32> {
        let free = |wanted: fn(Hint) -> bool| {
            let hints = self.used.iter().zip(&self.hints).enumerate();
            let free = hints.filter(|(_, (used, hint))| !**used && wanted(**hint));
            free.map(|(zone, _)| zone).collect::<Vec<_>>()
        };
        let mut zones = free(|hint| hint == Hint::Partial);
        if zones.is_empty() {
            zones = free(|_| true);
        }
        if zones.is_empty() {
            return None;
        }
        let zone = zones[rng.below(zones.len() as u64) as usize];
        self.used[zone] = true;
        Some(zone as u32)
    }

    pub fn release(&mut self, zone: u32, hint: Hint) {
        self.used[zone as usize] = false;
        self.hints[zone as usize] = hint;
        self.append.retain(|append| append.zone != zone);
    }
}

const RUN: u8 = 0;
const DRAIN: u8 = 1;
const STOP: u8 = 2;

/// What all threads share.
pub struct Shared<'a> {
    /// The device.
    pub geometry: Geometry,
    /// What happens in this round.
    pub plan: Plan,
    /// Number of the image, in every stamp.
    pub image: u64,
    /// Logs of the conventional zones.
    pub conventional: Vec<Mutex<ConventionalLog>>,
    /// Logs of the sequential zones that are written in their order.
    pub sequential: Vec<Mutex<ZoneLog>>,
    /// Logs of those with random write areas.
    pub areas: Vec<Mutex<AreaLog>>,
    pub(super) pool: Mutex<Pool>,
    /// Ends the daemon, with the signal of the plan.
    end: &'a (dyn Fn() + Sync),
    clock: AtomicU64,
    ids: AtomicU64,
    acknowledged: AtomicU64,
    flushed: AtomicU64,
    phase: AtomicU8,
    signalled: AtomicBool,
    breach: Mutex<Option<String>>,
}

/// Locks, whatever became of who held it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl<'a> Shared<'a> {
    /// A round that begins with these contents.
    pub fn new(
        geometry: Geometry,
        plan: Plan,
        image: u64,
        conventional: &[Vec<Content>],
        sequential: &[Base],
        areas: &[AreaBase],
        end: &'a (dyn Fn() + Sync),
    ) -> Self {
        let hint = |base: &Base| match (base.full, base.blocks.is_empty()) {
            (true, _) => Hint::Full,
            (false, true) => Hint::Empty,
            (false, false) => Hint::Partial,
        };
        let skipped = conventional.len();
        let pool = Pool {
            append: Vec::new(),
            append_coming: 0,
            used: (0..geometry.first_area() as usize)
                .map(|zone| zone < skipped)
                .collect(),
            hints: std::iter::repeat_n(Hint::Full, skipped)
                .chain(sequential.iter().map(hint))
                .collect(),
        };
        let conventional = conventional.iter().cloned().zip(0..);
        let sequential = sequential.iter().cloned().zip(skipped as u32..);
        Shared {
            geometry,
            image,
            conventional: conventional
                .map(|(base, zone)| Mutex::new(ConventionalLog::new(zone, base)))
                .collect(),
            sequential: sequential
                .map(|(base, zone)| Mutex::new(ZoneLog::new(zone, geometry.capacity, base)))
                .collect(),
            areas: areas
                .iter()
                .cloned()
                .zip(geometry.first_area()..)
                .map(|(base, zone)| {
                    Mutex::new(AreaLog {
                        zone,
                        base,
                        entries: Vec::new(),
                    })
                })
                .collect(),
            pool: Mutex::new(pool),
            end,
            clock: AtomicU64::new(1),
            ids: AtomicU64::new(first_id(plan.round)),
            acknowledged: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            phase: AtomicU8::new(RUN),
            signalled: AtomicBool::new(false),
            breach: Mutex::new(None),
            plan,
        }
    }

    /// The time now.
    pub fn now(&self) -> Time {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// A new request, as it is before it is submitted.
    pub(super) fn entry(&self, op: Op, at: u32, blocks: u32) -> Entry {
        Entry {
            id: self.ids.fetch_add(1, Ordering::Relaxed),
            op,
            at: if op == Op::Write { at } else { ANYWHERE },
            blocks,
            submitted: self.now(),
            outcome: Outcome::InFlight,
        }
    }

    /// A new request to a zone with a random write area.
    pub(super) fn area_entry(&self, op: AreaOp) -> AreaEntry {
        AreaEntry {
            id: self.ids.fetch_add(1, Ordering::Relaxed),
            op,
            submitted: self.now(),
            outcome: Outcome::InFlight,
        }
    }

    pub(super) fn zone(&self, zone: u32) -> MutexGuard<'_, ZoneLog> {
        lock(&self.sequential[(zone - self.geometry.conventional) as usize])
    }

    pub(super) fn flushed(&self, submitted: Time) {
        self.flushed.fetch_max(submitted, Ordering::SeqCst);
    }

    /// Writes acknowledged before this time were flushed.
    pub fn flushed_before(&self) -> Time {
        self.flushed.load(Ordering::SeqCst)
    }

    /// Counts an acknowledgement; the one that the plan waits for ends the daemon.
    pub(super) fn count(&self) {
        let count = self.acknowledged.fetch_add(1, Ordering::SeqCst) + 1;
        if count == self.plan.target && self.submitting() {
            self.finish();
        }
    }

    fn finish(&self) {
        if self.plan.end == End::KillIdle {
            let _ = self
                .phase
                .compare_exchange(RUN, DRAIN, Ordering::SeqCst, Ordering::SeqCst);
            return;
        }
        let until = Instant::now() + self.plan.delay;
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        self.signalled.store(true, Ordering::SeqCst);
        (self.end)();
        self.stop();
    }

    /// The daemon was told to end.
    pub fn ended(&self) -> bool {
        self.signalled.load(Ordering::SeqCst)
    }

    /// Ends the traffic.
    pub fn stop(&self) {
        self.phase.store(STOP, Ordering::SeqCst);
    }

    /// The traffic is over: nothing is submitted or waited for.
    pub fn stopped(&self) -> bool {
        self.phase.load(Ordering::SeqCst) == STOP
    }

    pub(super) fn submitting(&self) -> bool {
        self.phase.load(Ordering::SeqCst) == RUN
    }

    /// Notes that the device did what it must not, and ends the traffic. The first one counts.
    pub fn breach(&self, what: String) {
        lock(&self.breach).get_or_insert(what);
        self.stop();
    }

    /// What the device did wrong under way.
    pub fn broken(&self) -> Option<String> {
        lock(&self.breach).clone()
    }
}
