//! A client thread: keeps requests in flight on its queue, and logs them and their acknowledgements.
//!
//! Each queue writes to two zones of its own, several requests in flight in each; all queues append to the same few
//! zones, write to the conventional ones, and reset and finish zones also while requests are in flight in them. A
//! request that loses such a race is refused; then the queue asks the device where the zone stands.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::area::AreaZone;
use super::channel::Channel;
use super::log::{Op, Time};
use super::rng::Rng;
use super::shared::{AppendZone, Counts, Hint, Shared, lock};
use super::stamp::Stamp;
use crate::client::zone::REPORT_ENTRY;
use crate::client::{Request, Ticket};

/// Zones to which a queue writes at one time.
pub const OWN_ZONES: usize = 2;
/// Zones to which all queues append.
pub const APPEND_ZONES: usize = 3;
/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A zone to which only this queue writes.
#[derive(Debug, Default)]
pub(super) struct Own {
    pub(super) zone: Option<u32>,
    /// Where the next write goes, where that is known.
    pub(super) next: Option<u32>,
    /// Somebody is finding out where the zone stands.
    pub(super) asked: bool,
    pub(super) in_flight: u32,
    pub(super) refusals: u32,
}

/// A request in flight, and what its end means.
#[derive(Debug)]
pub(super) enum Flight {
    Write {
        zone: u32,
        entry: usize,
        own: usize,
    },
    Append {
        zone: u32,
        entry: usize,
    },
    Conventional {
        zone: u32,
        entry: usize,
    },
    Reset {
        zone: u32,
        entry: usize,
        own: Option<usize>,
    },
    ResetAll(Vec<usize>),
    Finish {
        zone: u32,
        entry: usize,
    },
    Flush(Time),
    Read {
        zone: u32,
        at: u32,
        expect: Vec<Option<Stamp>>,
        resets: u32,
    },
    ReadConventional {
        zone: u32,
        at: u32,
        submitted: Time,
    },
    /// Where does the zone stand?
    Ask {
        zone: u32,
        purpose: Purpose,
        known_end: u32,
        resets: u32,
    },
    OpenOrClose,
    /// To a zone with a random write area, by its place in the log.
    InArea(usize),
    /// Where does that zone stand?
    AskArea,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Purpose {
    Own(usize),
    Append,
    Look,
}

/// One queue's traffic.
pub struct Worker<'a> {
    pub(super) shared: &'a Shared<'a>,
    pub(super) queue: Channel,
    pub(super) rng: Rng,
    pub(super) flights: HashMap<Ticket, Flight>,
    pub(super) own: [Own; OWN_ZONES],
    pub(super) counts: Counts,
    /// The zone with a random write area that is this queue's own.
    pub(super) area: Option<AreaZone>,
    explicit: u32,
    /// No more zones can be active: one that nobody uses has to give way.
    pub(super) crowded: bool,
}

impl<'a> Worker<'a> {
    /// A worker on `queue`.
    /// `number` counts the queues from 0.
    pub fn new(shared: &'a Shared<'a>, mut queue: Channel, number: usize, rng: Rng) -> Self {
        queue.set_framing(shared.plan.indirect);
        Worker {
            shared,
            queue,
            rng,
            flights: HashMap::new(),
            own: Default::default(),
            counts: Counts::default(),
            area: shared.areas.get(number).map(|_| AreaZone::new(number)),
            explicit: 0,
            crowded: false,
        }
    }

    /// Runs until the round ends. What the device does wrong ends it.
    pub fn run(&mut self) {
        if let Err(what) = self.traffic() {
            self.shared.breach(what);
        }
    }

    /// Once the daemon is gone: takes what it completed, and gives back the counts.
    pub fn drain(&mut self) -> Counts {
        loop {
            match self.queue.poll() {
                Ok(Some(completion)) => {
                    if let Err(what) = self.completed(completion) {
                        self.shared.breach(what);
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    self.shared.breach(error);
                    break;
                }
            }
        }
        self.counts.in_flight = self.flights.len() as u64;
        std::mem::take(&mut self.counts)
    }

    fn traffic(&mut self) -> Result<(), String> {
        let mut heard = Instant::now();
        while !self.shared.stopped() {
            // Attempts, not requests: there may be nothing to do for a while.
            for _ in 0..2 * self.shared.plan.depth {
                if !self.shared.submitting() || self.flights.len() >= self.shared.plan.depth {
                    break;
                }
                self.act()?;
            }
            if self.flights.is_empty() && !self.shared.submitting() {
                return Ok(());
            }
            self.queue.publish()?;
            while let Some(completion) = self.queue.poll()? {
                heard = Instant::now();
                self.completed(completion)?;
            }
            let soon = Instant::now() + Duration::from_millis(20);
            let full = self.flights.len() >= self.shared.plan.depth || !self.shared.submitting();
            if full && !self.flights.is_empty() {
                self.queue.wait_used(soon)?;
            }
            if heard.elapsed() > PATIENCE && !self.shared.stopped() {
                return Err(format!(
                    "nothing was completed for {PATIENCE:?}: {:?}",
                    self.flights
                ));
            }
        }
        Ok(())
    }

    fn send(&mut self, request: &Request, flight: Flight) -> Result<(), String> {
        let submitted = self.queue.submit(request);
        self.sent(submitted, flight)
    }

    pub(super) fn sent(&mut self, submitted: Result<Ticket, String>, flight: Flight) -> Result<(), String> {
        match submitted {
            Ok(ticket) => {
                self.flights.insert(ticket, flight);
                Ok(())
            }
            // The plan keeps less in flight than the queue holds.
            Err(error) => Err(format!("{flight:?} could not be submitted: {error}")),
        }
    }

    fn act(&mut self) -> Result<(), String> {
        if std::mem::take(&mut self.crowded) {
            return self.make_room();
        }
        if self.area.is_some() && self.rng.one_in(3) {
            return self.act_in_area();
        }
        let weights = self.shared.plan.weights;
        let mut roll = self
            .rng
            .below(weights.iter().map(|&weight| u64::from(weight)).sum());
        let kind = weights.iter().position(|&weight| {
            let hit = roll < u64::from(weight);
            roll = roll.saturating_sub(weight.into());
            hit
        });
        match kind {
            Some(0) => self.write(),
            Some(1) => self.append(),
            Some(2) => self.write_conventional(),
            Some(3) => self.read(),
            Some(4) => self.send(&Request::Flush, Flight::Flush(self.shared.now())),
            Some(5) => self.reset_some(),
            Some(6) => self.finish_some(),
            Some(7) => self.open_or_close(),
            Some(8) => {
                let zone = self.any_sequential();
                self.ask(zone, Purpose::Look)
            }
            Some(9) => {
                let zone = self.any_sequential();
                self.append_to(zone, 1)
            }
            _ => self.reset_all(),
        }
    }

    fn any_sequential(&mut self) -> u32 {
        let first = self.shared.geometry.conventional;
        first
            + self
                .rng
                .below(u64::from(self.shared.geometry.first_area() - first)) as u32
    }

    pub(super) fn length(&mut self, room: u32) -> u32 {
        self.rng.skewed(1, self.shared.plan.longest.min(room).into()) as u32
    }

    pub(super) fn data(&self, stamp: impl Fn(u32) -> Stamp, blocks: u32) -> Vec<u8> {
        let size = self.shared.geometry.block as usize;
        let mut data = vec![0; size * blocks as usize];
        for (block, index) in data.chunks_exact_mut(size).zip(0..) {
            stamp(index).fill(self.shared.image, block);
        }
        data
    }

    fn write(&mut self) -> Result<(), String> {
        let own = self.rng.below(OWN_ZONES as u64) as usize;
        let Some(zone) = self.own[own].zone else {
            self.own[own] = Own::default();
            self.own[own].zone = lock(&self.shared.pool).take(&mut self.rng);
            return Ok(());
        };
        let Some(at) = self.own[own].next else {
            if self.own[own].asked || self.own[own].in_flight > 0 {
                return Ok(());
            }
            self.own[own].asked = true;
            return self.ask(zone, Purpose::Own(own));
        };
        let capacity = self.shared.geometry.capacity;
        if at >= capacity {
            lock(&self.shared.pool).release(zone, Hint::Full);
            self.own[own] = Own::default();
            return Ok(());
        }
        let blocks = self.length(capacity - at);
        let entry = self.shared.entry(Op::Write, at, blocks);
        let data = self.data(|index| entry.stamp(zone, index), blocks);
        let entry = self.shared.zone(zone).submit(entry);
        self.own[own].next = Some(at + blocks);
        self.own[own].in_flight += 1;
        let sector = self.shared.geometry.sector(zone, at);
        self.send(
            &Request::Write { sector, data },
            Flight::Write { zone, entry, own },
        )
    }

    fn append(&mut self) -> Result<(), String> {
        let capacity = self.shared.geometry.capacity;
        let longest = self.shared.plan.longest.min(self.shared.geometry.max_append);
        let wanted = self.length(longest);
        let mut pool = lock(&self.shared.pool);
        if pool.append.len() + pool.append_coming < APPEND_ZONES {
            let Some(zone) = pool.take(&mut self.rng) else {
                return Ok(());
            };
            pool.append_coming += 1;
            drop(pool);
            return self.ask(zone, Purpose::Append);
        }
        if pool.append.is_empty() {
            return Ok(());
        }
        let chosen = self.rng.below(pool.append.len() as u64) as usize;
        let AppendZone { zone, reserved } = pool.append[chosen];
        let blocks = wanted.min(capacity.saturating_sub(reserved));
        if blocks == 0 {
            pool.release(zone, Hint::Full);
            return Ok(());
        }
        pool.append[chosen].reserved += blocks;
        drop(pool);
        self.append_to(zone, blocks)
    }

    fn append_to(&mut self, zone: u32, blocks: u32) -> Result<(), String> {
        let entry = self.shared.entry(Op::Append, 0, blocks);
        let data = self.data(|index| entry.stamp(zone, index), blocks);
        let entry = self.shared.zone(zone).submit(entry);
        let sector = self.shared.geometry.sector(zone, 0);
        self.send(
            &Request::ZoneAppend { sector, data },
            Flight::Append { zone, entry },
        )
    }

    fn write_conventional(&mut self) -> Result<(), String> {
        let geometry = self.shared.geometry;
        if geometry.conventional == 0 {
            return Ok(());
        }
        let zone = self.rng.below(geometry.conventional.into()) as u32;
        let at = self.rng.below(geometry.zone_blocks.into()) as u32;
        let blocks = self.length((geometry.zone_blocks - at).min(8));
        let entry = self.shared.entry(Op::Write, at, blocks);
        let data = self.data(|index| entry.stamp(zone, index), blocks);
        let entry = lock(&self.shared.conventional[zone as usize]).submit(entry);
        let sector = geometry.sector(zone, at);
        self.send(
            &Request::Write { sector, data },
            Flight::Conventional { zone, entry },
        )
    }

    fn read(&mut self) -> Result<(), String> {
        let geometry = self.shared.geometry;
        let blocks = self.length(32);
        let len = blocks * geometry.block;
        if geometry.conventional > 0 && self.rng.one_in(4) {
            let zone = self.rng.below(geometry.conventional.into()) as u32;
            let at = self
                .rng
                .below(u64::from(geometry.zone_blocks - blocks.min(geometry.zone_blocks)) + 1);
            let at = at as u32;
            let flight = Flight::ReadConventional {
                zone,
                at,
                submitted: self.shared.now(),
            };
            let sector = geometry.sector(zone, at);
            return self.send(&Request::Read { sector, len }, flight);
        }
        let zone = self.any_sequential();
        let log = self.shared.zone(zone);
        let end = log.known_end().max(blocks);
        let at = self.rng.below(u64::from(end - blocks) + 1) as u32;
        let end = (at + blocks).min(geometry.capacity);
        let flight = Flight::Read {
            zone,
            at,
            expect: log.known[at as usize..end as usize].to_vec(),
            resets: log.resets,
        };
        drop(log);
        let (sector, len) = (geometry.sector(zone, at), (end - at) * geometry.block);
        self.send(&Request::Read { sector, len }, flight)
    }

    fn ask(&mut self, zone: u32, purpose: Purpose) -> Result<(), String> {
        let log = self.shared.zone(zone);
        let (known_end, resets) = (log.known_end(), log.resets);
        drop(log);
        let sector = self.shared.geometry.sector(zone, 0);
        let len = 2 * REPORT_ENTRY as u32;
        let flight = Flight::Ask {
            zone,
            purpose,
            known_end,
            resets,
        };
        self.send(&Request::ZoneReport { sector, len }, flight)
    }

    /// A zone that somebody uses, or any. Requests are in flight in it, if it is an own one or one for appends.
    fn victim(&mut self) -> (u32, Option<usize>) {
        match self.rng.below(3) {
            0 => {
                let own = self.rng.below(OWN_ZONES as u64) as usize;
                if let Some(zone) = self.own[own].zone {
                    return (zone, Some(own));
                }
            }
            1 => {
                let pool = lock(&self.shared.pool);
                if !pool.append.is_empty() {
                    let chosen = self.rng.below(pool.append.len() as u64) as usize;
                    return (pool.append[chosen].zone, None);
                }
            }
            _ => {}
        }
        (self.any_sequential(), None)
    }

    fn reset_some(&mut self) -> Result<(), String> {
        let (zone, own) = self.victim();
        let mut pool = lock(&self.shared.pool);
        for append in pool.append.iter_mut().filter(|append| append.zone == zone) {
            append.reserved = 0;
        }
        if !pool.used[zone as usize] {
            pool.hints[zone as usize] = Hint::Empty;
        }
        drop(pool);
        self.reset(zone, own)?;
        if let Some(own) = own {
            // Either go on at once, before the reset is done, or wait for it.
            let at_once = self.rng.one_in(2);
            self.own[own].next = at_once.then_some(0);
            self.own[own].asked = !at_once;
        }
        Ok(())
    }

    pub(super) fn reset(&mut self, zone: u32, own: Option<usize>) -> Result<(), String> {
        let entry = self.shared.entry(Op::Reset, 0, 0);
        let entry = self.shared.zone(zone).submit(entry);
        let request = Request::ZoneReset(self.shared.geometry.sector(zone, 0));
        self.send(&request, Flight::Reset { zone, entry, own })
    }

    fn reset_all(&mut self) -> Result<(), String> {
        let entry = self.shared.entry(Op::Reset, 0, 0);
        let logs = &self.shared.sequential;
        let entries = logs.iter().map(|log| lock(log).submit(entry)).collect();
        let mut pool = lock(&self.shared.pool);
        pool.hints.fill(Hint::Empty);
        for append in &mut pool.append {
            append.reserved = 0;
        }
        drop(pool);
        self.send(&Request::ZoneResetAll, Flight::ResetAll(entries))
    }

    /// Resets or finishes a zone that nobody uses and that may be partly written.
    fn make_room(&mut self) -> Result<(), String> {
        let mut pool = lock(&self.shared.pool);
        let free = |wanted: Hint| {
            let zones = pool.used.iter().zip(&pool.hints).zip(0..);
            let free = zones.filter(|((used, hint), _)| !**used && **hint == wanted);
            free.map(|(_, zone)| zone).collect::<Vec<u32>>()
        };
        let mut zones = free(Hint::Partial);
        if zones.is_empty() {
            zones = free(Hint::Full);
        }
        if zones.is_empty() {
            return Ok(());
        }
        let zone = zones[self.rng.below(zones.len() as u64) as usize];
        let finish = self.rng.one_in(2);
        pool.hints[zone as usize] = if finish { Hint::Full } else { Hint::Empty };
        drop(pool);
        if finish {
            self.finish(zone)
        } else {
            self.reset(zone, None)
        }
    }

    fn finish_some(&mut self) -> Result<(), String> {
        let (zone, own) = self.victim();
        let mut pool = lock(&self.shared.pool);
        match own {
            Some(own) => {
                pool.release(zone, Hint::Full);
                self.own[own] = Own::default();
            }
            None if pool.append.iter().any(|append| append.zone == zone) => pool.release(zone, Hint::Full),
            None if !pool.used[zone as usize] => pool.hints[zone as usize] = Hint::Full,
            None => {}
        }
        drop(pool);
        self.finish(zone)
    }

    fn finish(&mut self, zone: u32) -> Result<(), String> {
        let entry = self.shared.entry(Op::Finish, 0, 0);
        let entry = self.shared.zone(zone).submit(entry);
        let request = Request::ZoneFinish(self.shared.geometry.sector(zone, 0));
        self.send(&request, Flight::Finish { zone, entry })
    }

    fn open_or_close(&mut self) -> Result<(), String> {
        let own = self.rng.below(OWN_ZONES as u64) as usize;
        let Some(zone) = self.own[own].zone else {
            return Ok(());
        };
        let sector = self.shared.geometry.sector(zone, 0);
        // Explicitly open zones are never closed by the device: not too many of them.
        let open = self.explicit == 0 || self.rng.one_in(3);
        self.explicit = u32::from(open);
        let request = if open {
            Request::ZoneOpen(sector)
        } else {
            Request::ZoneClose(sector)
        };
        self.send(&request, Flight::OpenOrClose)
    }
}

impl Flight {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Flight::Write { .. } => "writes",
            Flight::Append { .. } => "appends",
            Flight::Conventional { .. } => "conventional writes",
            Flight::Reset { .. } => "resets",
            Flight::ResetAll(_) => "resets of all zones",
            Flight::Finish { .. } => "finishes",
            Flight::Flush(_) => "flushes",
            Flight::Read { .. } | Flight::ReadConventional { .. } => "reads",
            Flight::Ask { .. } => "reports",
            Flight::OpenOrClose => "opens and closes",
            Flight::InArea(_) => "requests in random write areas",
            Flight::AskArea => "reports",
        }
    }
}
