//! The shared state of a race: the engine, bells to wait for its events, and what must hold.

use std::sync::Arc;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::{Condvar, Mutex};
use shuttle::{Config, Runner, thread};
use zbdkit_zone::{
    Completion, Condition, Engine, Events, ExclusiveOp, ExclusivePermit, Geometry, GeometrySpec, Model,
    Refused, SlotPool, WritePermit, Zns, ZoneError, ZoneNo, ZoneRecord,
};

pub const BLOCK: u64 = 512;
/// Blocks in a zone.
pub const ZONE: u64 = 4;
pub const EIO: i32 = 5;

pub fn explore(test: impl Fn() + Send + Sync + 'static) {
    let times: usize = std::env::var("RACES").map_or(1, |n| n.parse().expect("a number"));
    let mut config = Config::new();
    config.silence_warnings = true;
    let test = Arc::new(test);
    let pct = Arc::clone(&test);
    Runner::new(RandomScheduler::new(1000 * times), config.clone()).run(move || test());
    Runner::new(PctScheduler::new(4, 1000 * times), config).run(move || pct());
}

/// Lets threads sleep until something was rung since they last listened.
#[derive(Default)]
pub struct Bell {
    rung: Mutex<u64>,
    changed: Condvar,
}

impl Bell {
    pub fn ring(&self) {
        *self.rung.lock().expect("no panic") += 1;
        self.changed.notify_all();
    }

    /// Asks until there is an answer, and sleeps in between.
    pub fn wait<T>(&self, mut ask: impl FnMut() -> Option<T>) -> T {
        loop {
            let heard = *self.rung.lock().expect("no panic");
            if let Some(answer) = ask() {
                return answer;
            }
            let mut rung = self.rung.lock().expect("no panic");
            while *rung == heard {
                rung = self.changed.wait(rung).expect("no panic");
            }
        }
    }
}

/// One bell a slot and a zone, so that an event for the wrong one wakes nobody; and what was published.
pub struct Bells {
    pub slots: Vec<Bell>,
    pub zones: Vec<Bell>,
    pub published: Vec<Mutex<u64>>,
}

impl Events for Bells {
    fn publish(&self, zone: ZoneNo, written: u64) {
        let mut published = self.published[zone.0 as usize].lock().expect("no panic");
        assert!(written > *published, "the published pointer only grows");
        *published = written;
    }
    fn slot_ready(&self, slot: u32) {
        self.slots[slot as usize].ring();
    }
    fn zone_changed(&self, zone: ZoneNo) {
        self.zones[zone.0 as usize].ring();
    }
}

pub struct World {
    pub engine: Engine,
    pub bells: Bells,
    /// Acknowledged writes: zone, generation (resets before), first and last byte.
    pub acked: Mutex<Vec<(ZoneNo, u32, u64, u64)>>,
    /// Writes between admission and completion, a zone.
    pub in_flight: Vec<Mutex<u32>>,
    /// What a durable table holds.
    pub table: Mutex<Vec<ZoneRecord>>,
}

impl World {
    pub fn new(zones: u64, change: impl FnOnce(&mut GeometrySpec)) -> Arc<Self> {
        let mut spec = GeometrySpec {
            model: Model::HostManaged,
            size: zones * ZONE * BLOCK,
            zone_size: ZONE * BLOCK,
            zone_capacity: ZONE * BLOCK,
            nr_conventional: 0,
            block_size: BLOCK as u32,
            max_open: 0,
            max_active: 0,
            max_append: ZONE * BLOCK,
            zns: Zns::NONE,
        };
        change(&mut spec);
        let geometry = Geometry::new(spec).expect("valid");
        let formats = [Some(geometry), geometry.with_block_size(2 * BLOCK as u32).ok()];
        let engine = Engine::new(geometry, |_| ZoneRecord::default())
            .expect("valid")
            .with_formats(formats.into_iter().flatten().collect());
        fn many<T>(n: u64, new: impl Fn() -> T) -> Vec<T> {
            (0..n).map(|_| new()).collect()
        }
        Arc::new(Self {
            engine,
            bells: Bells {
                slots: many(32, Bell::default),
                zones: many(zones, Bell::default),
                published: many(zones, || Mutex::new(0)),
            },
            acked: Mutex::new(vec![]),
            in_flight: many(zones, || Mutex::new(0)),
            table: Mutex::new(vec![ZoneRecord::default(); zones as usize]),
        })
    }

    /// Asks for admission until the answer is not "busy".
    pub fn admitted<T>(
        &self,
        zone: ZoneNo,
        mut ask: impl FnMut() -> Result<T, Refused>,
    ) -> Result<T, ZoneError> {
        self.bells.zones[zone.0 as usize].wait(|| match ask() {
            Ok(permit) => Some(Ok(permit)),
            Err(Refused::Zone(error)) => Some(Err(error)),
            Err(Refused::Busy(busy)) => {
                assert_eq!(busy, zone);
                None
            }
            Err(Refused::NoSlot) => panic!("each thread has the slots that it needs"),
        })
    }

    pub fn append(&self, pool: &mut SlotPool, zone: ZoneNo, blocks: u64) -> Result<WritePermit, ZoneError> {
        let start = self.engine.geometry().start(zone);
        self.admitted(zone, || self.engine.admit_append(pool, start, blocks * BLOCK))
    }

    /// Runs an admitted write to its end, which may fail, and checks what must hold then.
    pub fn write(&self, permit: WritePermit, result: Result<(), i32>) -> Result<(), i32> {
        let (zone, offset, len) = (permit.zone(), permit.offset(), permit.len());
        let resets = self.engine.info(zone).counters.resets;
        let flying = |by: i32| {
            let mut n = self.in_flight[zone.0 as usize].lock().expect("no panic");
            *n = n.checked_add_signed(by).expect("balanced");
        };
        flying(1);
        thread::yield_now();
        flying(-1);
        let outcome = match self.engine.complete(permit, result, &self.bells) {
            Completion::Prefix(prefix) => {
                let written = *self.bells.published[zone.0 as usize].lock().expect("no panic");
                assert!(
                    written >= prefix.written(),
                    "published before it can be acknowledged"
                );
                assert_eq!(
                    self.engine.info(zone).counters.resets,
                    resets,
                    "no reset before the end"
                );
                self.engine.acknowledge(prefix, Ok(()), &self.bells);
                Ok(())
            }
            Completion::Pending(pending) => {
                let slot = pending.slot() as usize;
                self.bells.slots[slot].wait(|| self.engine.outcome(&pending))
            }
            Completion::Failed(errno) => Err(errno),
        };
        if outcome.is_ok() {
            self.acked
                .lock()
                .expect("no panic")
                .push((zone, resets, offset, offset + len));
        }
        outcome
    }

    /// Waits until the zone is this operation's alone. None where there is nothing to do.
    pub fn alone(&self, zone: ZoneNo, op: ExclusiveOp) -> Option<ExclusivePermit> {
        let permit = self
            .admitted(zone, || self.engine.begin(zone, op))
            .expect("allowed")?;
        self.bells.zones[zone.0 as usize].wait(|| self.engine.drained(&permit).then_some(()));
        assert_eq!(
            *self.in_flight[zone.0 as usize].lock().expect("no panic"),
            0,
            "no write in flight"
        );
        Some(permit)
    }

    pub fn reset(&self, zone: ZoneNo) {
        if let Some(permit) = self.alone(zone, ExclusiveOp::Reset) {
            *self.bells.published[zone.0 as usize].lock().expect("no panic") = 0;
            self.engine.commit(permit, &self.bells);
        }
    }

    /// Gives a device of one zone its other format.
    pub fn format(&self, zone: ZoneNo) {
        let permit = self.alone(zone, ExclusiveOp::Format).expect("for any zone");
        *self.bells.published[zone.0 as usize].lock().expect("no panic") = 0;
        self.engine.set_format(1, std::slice::from_ref(&permit));
        self.engine.commit(permit, &self.bells);
    }

    pub fn finish(&self, zone: ZoneNo) -> u64 {
        let Some(permit) = self.alone(zone, ExclusiveOp::Finish) else {
            return 0;
        };
        let written = self.engine.info(zone).written_end;
        assert_eq!(self.engine.record_after(&permit).finishes_and_end(), (1, written));
        self.engine.commit(permit, &self.bells);
        written
    }

    /// That acknowledged writes do not overlap within a generation, and how many bytes the last one has.
    pub fn check_acked(&self, zone: ZoneNo) -> u64 {
        let mut acked = self.acked.lock().expect("no panic").clone();
        acked.retain(|a| a.0 == zone);
        acked.sort_unstable();
        for pair in acked.windows(2) {
            let ((_, a, _, end), (_, b, start, _)) = (pair[0], pair[1]);
            assert!(a != b || end <= start, "{pair:?} overlap");
        }
        let info = self.engine.info(zone);
        acked.retain(|a| a.1 == info.counters.resets);
        assert!(
            acked.iter().all(|a| a.3 <= info.written_end),
            "nothing is acknowledged above the written end"
        );
        acked.iter().map(|a| a.3 - a.2).sum()
    }

    pub fn check_resources(&self) {
        let (geometry, resources) = (self.engine.geometry(), self.engine.resources());
        let limit = |limit: u32| if limit == 0 { u32::MAX } else { limit };
        assert!(resources.open <= limit(geometry.max_open()), "{resources:?}");
        assert!(resources.active <= limit(geometry.max_active()), "{resources:?}");
    }

    /// That the counts are those of the conditions, when nobody is at work.
    pub fn check_counts(&self) {
        let count = |which: fn(Condition) -> bool| {
            let zones = self.engine.geometry().zones();
            zones
                .filter(|&zone| which(self.engine.info(zone).condition))
                .count() as u32
        };
        let resources = self.engine.resources();
        assert_eq!(
            (resources.open, resources.active),
            (count(Condition::is_open), count(Condition::is_active))
        );
        self.check_resources();
    }

    pub fn take_dirty(&self) {
        let mut table = self.table.lock().expect("no panic");
        self.engine
            .take_dirty(&mut |zone, record| table[zone.0 as usize] = record);
    }
}

trait Finished {
    fn finishes_and_end(&self) -> (u32, u64);
}

impl Finished for ZoneRecord {
    fn finishes_and_end(&self) -> (u32, u64) {
        (self.counters.finishes, self.written)
    }
}

pub fn spawn(world: &Arc<World>, work: impl FnOnce(&World) + Send + 'static) -> thread::JoinHandle<()> {
    let world = Arc::clone(world);
    thread::spawn(move || work(&world))
}

pub fn join(threads: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    // All of them run before the first is waited for.
    let threads: Vec<_> = threads.into_iter().collect();
    threads
        .into_iter()
        .for_each(|thread| thread.join().expect("no panic"));
}
