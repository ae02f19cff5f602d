//! The engine beside the naive oracle: random operations with several writes in flight, completed in random
//! order and failing at random, on random geometries, compared after each step.
//!
//! `PROPTEST_CASES=100000 cargo test -p zbdkit-zone --release --test model` for a long run.

#![cfg(not(feature = "shuttle"))]

mod inputs;

use std::cell::RefCell;
use std::ops::ControlFlow;

use inputs::{geometry, records, steps};
use proptest::prelude::*;
use zbdkit_zone::oracle::{Oracle, Verdict};
use zbdkit_zone::{
    CloseEmpty, Completion, Condition, Engine, Events, ExclusiveOp, ExclusivePermit, Filter, Geometry,
    Pending, Prefix, ReadPermit, Refused, SlotPool, WritePermit, ZoneNo, ZoneRecord,
};

/// A step. Numbers are taken modulo what there is; lengths and distances are blocks.
#[derive(Debug, Clone)]
enum Step {
    Write {
        zone: u32,
        at: At,
        blocks: u64,
        lane: usize,
    },
    Append {
        zone: u32,
        blocks: u64,
        lane: usize,
        skew: u64,
    },
    Complete {
        which: usize,
        result: Result<(), i32>,
    },
    Acknowledge {
        which: usize,
        result: Result<(), i32>,
    },
    Read {
        zone: u32,
        from: u64,
        bytes: u64,
    },
    EndRead {
        which: usize,
    },
    Open {
        zone: u32,
    },
    Close {
        zone: u32,
        empty: CloseEmpty,
    },
    Begin {
        zone: u32,
        op: ExclusiveOp,
    },
    End {
        which: usize,
        commit: bool,
    },
    /// Commits a random write area up to so many blocks above the pointer, give or take.
    CommitZrwa {
        zone: u32,
        blocks: u64,
        skew: u64,
    },
}

/// Where a write starts.
#[derive(Debug, Clone, Copy)]
enum At {
    /// Where the engine wants it, as far as a report tells: at the end of the zone's youngest write.
    Next,
    /// So many blocks above the zone's start.
    Block(u64),
    /// So many bytes above it.
    Byte(u64),
}

#[derive(Default)]
struct Recorder {
    published: RefCell<Vec<(ZoneNo, u64)>>,
    ready: RefCell<Vec<u32>>,
    changed: RefCell<Vec<ZoneNo>>,
}

impl Events for Recorder {
    fn publish(&self, zone: ZoneNo, written: u64) {
        self.published.borrow_mut().push((zone, written));
    }
    fn slot_ready(&self, slot: u32) {
        self.ready.borrow_mut().push(slot);
    }
    fn zone_changed(&self, zone: ZoneNo) {
        self.changed.borrow_mut().push(zone);
    }
}

struct Made {
    ids: Vec<u64>,
    own: u64,
    lane: Option<usize>,
    prefix: Prefix,
}

const SLOTS: u32 = 5;

struct Run {
    engine: Engine,
    oracle: Oracle,
    pools: [SlotPool; 2],
    /// Slots of each lane that are in use.
    in_use: [u32; 2],
    permits: Vec<(u64, usize, WritePermit)>,
    pending: Vec<(u64, usize, Pending)>,
    prefixes: Vec<Made>,
    reads: Vec<(u64, ReadPermit)>,
    exclusive: Vec<ExclusivePermit>,
    stored: Vec<ZoneRecord>,
    events: Recorder,
    ids: u64,
}

impl Run {
    fn new(geometry: Geometry, records: &[ZoneRecord]) -> Self {
        let initial = |zone: ZoneNo| records[zone.0 as usize];
        let engine = Engine::new(geometry, initial).expect("valid records");
        Self {
            pools: [engine.slots(SLOTS), engine.slots(SLOTS)],
            engine,
            oracle: Oracle::new(geometry, initial),
            in_use: [0; 2],
            permits: vec![],
            pending: vec![],
            prefixes: vec![],
            reads: vec![],
            exclusive: vec![],
            stored: geometry.zones().map(initial).collect(),
            events: Recorder::default(),
            ids: 0,
        }
    }

    fn id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    fn step(&mut self, step: &Step) {
        let geometry = *self.engine.geometry();
        let zone = |no: u32| ZoneNo(no % geometry.nr_zones());
        let block = u64::from(geometry.block_size());
        let before: Vec<_> = geometry.zones().map(|zone| self.waits(zone)).collect();
        match *step {
            Step::Write {
                zone: no,
                at,
                blocks,
                lane,
            } => {
                let start = geometry.start(zone(no));
                let offset = match at {
                    At::Next => {
                        let ends = self
                            .permits
                            .iter()
                            .map(|(_, _, p)| p)
                            .filter(|p| p.zone() == zone(no));
                        ends.map(|p| p.offset() + p.len())
                            .max()
                            .unwrap_or(0)
                            .max(self.info(zone(no)))
                    }
                    At::Block(n) => start + n * block,
                    At::Byte(n) => start + n,
                };
                self.admit(lane % 2, |engine, pool, oracle, id| {
                    let len = blocks * block;
                    (
                        engine.admit_write(pool, offset, len),
                        oracle.write(id, offset, len),
                    )
                });
            }
            Step::Append {
                zone: no,
                blocks,
                lane,
                skew,
            } => {
                let offset = geometry.start(zone(no)) + skew;
                self.admit(lane % 2, |engine, pool, oracle, id| {
                    let len = blocks * block;
                    (
                        engine.admit_append(pool, offset, len),
                        oracle.append(id, offset, len),
                    )
                });
            }
            Step::Complete { which, result } if !self.permits.is_empty() => {
                self.complete(which % self.permits.len(), result);
            }
            Step::CommitZrwa {
                zone: no,
                blocks,
                skew,
            } => {
                let end = (self.oracle.info(zone(no)).wp + blocks * block + skew).saturating_sub(block);
                let id = self.id();
                let real = self.engine.commit_zrwa(end, &self.events);
                let model = self.oracle.commit_zrwa(id, end);
                assert_eq!(real.as_ref().map(drop).map_err(|e| *e), model);
                self.prefixes.extend(real.ok().map(|prefix| Made {
                    ids: vec![id],
                    own: id,
                    lane: None,
                    prefix,
                }));
            }
            Step::Acknowledge { which, result } if !self.prefixes.is_empty() => {
                self.acknowledge(which % self.prefixes.len(), result);
            }
            Step::Read {
                zone: no,
                from,
                bytes,
            } => {
                let offset = geometry.start(zone(no)) + from;
                let id = self.id();
                let (real, model) = (
                    self.engine.admit_read(offset, bytes),
                    self.oracle.read(id, offset, bytes),
                );
                assert_eq!(real.as_ref().map(ReadPermit::data_len).map_err(|e| *e), model);
                self.reads.extend(real.ok().map(|permit| (id, permit)));
            }
            Step::EndRead { which } if !self.reads.is_empty() => {
                let (id, permit) = self.reads.swap_remove(which % self.reads.len());
                self.engine.end_read(permit, &self.events);
                self.oracle.end_read(id);
            }
            Step::Open { zone: no } => {
                assert_eq!(self.engine.open(zone(no)), self.oracle.open(zone(no)));
            }
            Step::Close { zone: no, empty } => {
                assert_eq!(
                    self.engine.close(zone(no), empty),
                    self.oracle.close(zone(no), empty)
                );
            }
            Step::Begin { zone: no, op } => {
                let real = self.engine.begin(zone(no), op);
                let model = self.oracle.begin(zone(no), op);
                assert_eq!(real.as_ref().map(Option::is_some).map_err(|e| *e), model);
                self.exclusive.extend(real.ok().flatten());
            }
            Step::End { which, commit } if !self.exclusive.is_empty() => {
                self.end(which % self.exclusive.len(), commit);
            }
            _ => {}
        }
        self.compare(&before);
    }

    fn admit(
        &mut self,
        lane: usize,
        ask: impl FnOnce(
            &Engine,
            &mut SlotPool,
            &mut Oracle,
            u64,
        ) -> (Result<WritePermit, Refused>, Result<(u64, u64), Refused>),
    ) {
        let id = self.id();
        let untouched = self.oracle.clone();
        let (real, model) = ask(&self.engine, &mut self.pools[lane], &mut self.oracle, id);
        if let Err(Refused::NoSlot) = real {
            assert_eq!(self.in_use[lane], SLOTS, "all slots of the lane are in use");
            self.oracle = untouched;
            return;
        }
        let seen = real
            .as_ref()
            .map(|p| (p.offset(), p.gap().map_or(p.offset(), |gap| gap.start)));
        // The oracle says where the data below ends also where the write starts below that.
        let model = model.map(|(offset, next)| (offset, next.min(offset)));
        assert_eq!(seen.map_err(|e| *e), model);
        if let Ok(permit) = real {
            self.in_use[lane] += u32::from(permit.slot().is_some());
            assert!(
                self.in_use[lane] <= SLOTS,
                "no more in flight than there are slots"
            );
            self.permits.push((id, lane, permit));
        }
    }

    fn complete(&mut self, which: usize, result: Result<(), i32>) {
        let (id, lane, permit) = self.permits.swap_remove(which);
        let slot = permit.slot();
        let zone = permit.zone();
        let verdict = self.oracle.complete(id, result);
        match (self.engine.complete(permit, result, &self.events), verdict) {
            (Completion::Prefix(prefix), Verdict::Prefix(ids)) => {
                assert_eq!(prefix.zone(), zone);
                assert_eq!(prefix.written(), self.oracle.record(zone).written);
                self.prefixes.push(Made {
                    ids,
                    own: id,
                    lane: slot.map(|_| lane),
                    prefix,
                });
            }
            (Completion::Pending(pending), Verdict::Pending) => {
                assert_eq!(Some(pending.slot()), slot);
                self.pending.push((id, lane, pending));
            }
            (Completion::Failed(errno), Verdict::Failed(expected)) => {
                assert_eq!(errno, expected);
                self.in_use[lane] -= u32::from(slot.is_some());
            }
            (real, model) => panic!("{real:?} instead of {model:?}"),
        }
    }

    fn acknowledge(&mut self, which: usize, result: Result<(), i32>) {
        let Made {
            ids,
            own,
            lane,
            prefix,
        } = self.prefixes.swap_remove(which);
        self.oracle.acknowledge(&ids, own, result);
        self.engine.acknowledge(prefix, result, &self.events);
        if let Some(lane) = lane {
            self.in_use[lane] -= 1;
        }
    }

    fn end(&mut self, which: usize, commit: bool) {
        let drained = self.engine.drained(&self.exclusive[which]);
        assert_eq!(drained, self.oracle.drained(self.exclusive[which].zone()));
        let permit = self.exclusive.swap_remove(which);
        let (zone, op) = (permit.zone(), permit.op());
        if drained {
            assert_eq!(self.engine.confirm(&permit), self.oracle.confirm(zone, op));
        }
        let commit = commit && drained && self.engine.confirm(&permit).is_ok();
        let planned = self.engine.record_after(&permit);
        if commit {
            self.engine.commit(permit, &self.events);
            assert_eq!(planned, self.engine.record(zone));
        } else {
            self.engine.abort(permit, &self.events);
        }
        self.oracle.end(zone, op, commit);
    }

    fn info(&self, zone: ZoneNo) -> u64 {
        self.oracle.info(zone).written_end
    }

    /// Whether a request could be waiting for the zone to admit, and whether an operation could be waiting
    /// for it to drain.
    fn waits(&self, zone: ZoneNo) -> (bool, bool) {
        let operation = self.exclusive.iter().any(|permit| permit.zone() == zone);
        (self.oracle.blocked(zone), operation && !self.oracle.drained(zone))
    }

    fn compare(&mut self, before: &[(bool, bool)]) {
        let geometry = *self.engine.geometry();
        let changed = self.events.changed.take();
        for zone in geometry.zones() {
            assert_eq!(self.engine.info(zone), self.oracle.info(zone));
            assert_eq!(self.engine.record(zone), self.oracle.record(zone));
            let ((was_blocked, was_draining), (blocked, draining)) =
                (before[zone.0 as usize], self.waits(zone));
            if (was_blocked && !blocked) || (was_draining && !draining) {
                assert!(changed.contains(&zone), "who waits for zone {zone} is woken");
            }
        }
        for (zone, written) in self.events.published.take() {
            assert_eq!(written, self.oracle.record(zone).written);
        }
        self.compare_outcomes();
        let resources = self.engine.resources();
        assert_eq!(resources, self.oracle.resources());
        assert!(geometry.max_open() == 0 || resources.open <= geometry.max_open());
        for permit in &self.exclusive {
            assert_eq!(self.engine.drained(permit), self.oracle.drained(permit.zone()));
        }
        let stored = &mut self.stored;
        self.engine
            .take_dirty(&mut |zone, record| stored[zone.0 as usize] = record);
        for zone in geometry.zones() {
            assert_eq!(
                self.stored[zone.0 as usize],
                self.engine.record(zone),
                "zone {zone} is marked"
            );
        }
    }

    fn compare_outcomes(&mut self) {
        let mut woken = self.events.ready.take();
        let mut pending = std::mem::take(&mut self.pending);
        pending.retain(|(id, lane, pending)| {
            let slot = pending.slot();
            let outcome = self.engine.outcome(pending);
            assert_eq!(outcome, self.oracle.outcome(*id));
            let Some(at) = woken.iter().position(|&s| s == slot) else {
                assert_eq!(outcome, None, "who waits for slot {slot} is woken");
                return true;
            };
            woken.swap_remove(at);
            assert!(outcome.is_some(), "slot {slot} is ready as was said");
            self.in_use[*lane] -= 1;
            false
        });
        self.pending = pending;
        assert!(woken.is_empty(), "nobody waits for the slots {woken:?}");
    }

    /// Ends all that is in flight; nothing may be left.
    fn finish(mut self) {
        while !self.permits.is_empty() {
            self.step(&Step::Complete {
                which: 0,
                result: Ok(()),
            });
        }
        while !self.prefixes.is_empty() {
            self.step(&Step::Acknowledge {
                which: 0,
                result: Ok(()),
            });
        }
        while !self.reads.is_empty() {
            self.step(&Step::EndRead { which: 0 });
        }
        assert!(self.exclusive.iter().all(|permit| self.engine.drained(permit)));
        while !self.exclusive.is_empty() {
            self.step(&Step::End {
                which: 0,
                commit: true,
            });
        }
        assert!(self.pending.is_empty(), "everybody has an outcome");
        assert_eq!(self.in_use, [0; 2]);
        let mut shown = vec![];
        self.engine.report(0, Filter::All, &mut |info| {
            shown.push(info);
            ControlFlow::Continue(())
        });
        assert!(
            shown
                .into_iter()
                .eq(self.engine.geometry().zones().map(|zone| self.oracle.info(zone)))
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_engine_does_what_the_oracle_says(
        geometry in geometry(),
        seeds in proptest::collection::vec(any::<u16>(), 1..8),
        steps in proptest::collection::vec(steps(), 1..300),
    ) {
        let mut run = Run::new(geometry, &records(&geometry, &seeds));
        steps.iter().for_each(|step| run.step(step));
        run.finish();
    }

    #[test]
    fn a_report_shows_what_matches_from_the_zone_of_its_offset(
        geometry in geometry(),
        seeds in proptest::collection::vec(any::<u16>(), 1..8),
        offset in any::<u64>(),
        condition in 0u8..16,
        max in 0usize..9,
    ) {
        let records = records(&geometry, &seeds);
        let engine = Engine::new(geometry, |zone| records[zone.0 as usize]).expect("valid");
        let conditions = [Condition::Empty, Condition::Closed, Condition::Full, Condition::ReadOnly,
            Condition::Offline, Condition::NotWritePointer, Condition::ImplicitlyOpen];
        let filter = conditions.get(usize::from(condition)).map_or(Filter::All, |&c| Filter::Only(c));
        let offset = offset % (geometry.size() + 1);
        let mut shown = vec![];
        engine.report(offset, filter, &mut |info| {
            shown.push(info);
            if shown.len() == max { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let all = geometry.zones().map(|zone| engine.info(zone));
        let matching = all.filter(|info| info.start + info.len > offset)
            .filter(|info| filter == Filter::All || filter == Filter::Only(info.condition));
        let expected: Vec<_> = if max == 0 { matching.collect() } else { matching.take(max).collect() };
        prop_assert_eq!(shown, expected);
    }
}
