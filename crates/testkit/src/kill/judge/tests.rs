//! Small histories, each with what may and what must not be found after it.

use super::*;
use crate::kill::log::ZoneLog;

const ZONE: u32 = 5;
const CAPACITY: u32 = 16;

/// A history in the making. Time goes by with every call.
struct History {
    log: ZoneLog,
    now: Time,
    secured: Secured,
}

impl History {
    fn new() -> Self {
        Self::after(&[], false)
    }

    /// After a round that left these requests, each of one block.
    fn after(ids: &[u64], full: bool) -> Self {
        let stamp = |(&id, at)| Stamp {
            id,
            zone: ZONE,
            at,
            index: 0,
        };
        let blocks = ids.iter().zip(0..).map(stamp).collect();
        History {
            log: ZoneLog::new(ZONE, CAPACITY, Base { blocks, full }),
            now: 100,
            secured: Secured::ALL,
        }
    }

    fn submit(&mut self, id: u64, op: Op, at: u32, blocks: u32) -> usize {
        self.now += 1;
        self.log.submit(Entry {
            id,
            op,
            at: if op == Op::Write { at } else { ANYWHERE },
            blocks,
            submitted: self.now,
            outcome: Outcome::InFlight,
        })
    }

    fn ack(&mut self, entry: usize, at: u32) {
        self.now += 1;
        self.log.acknowledge(entry, at, self.now).unwrap();
    }

    fn done(&mut self, id: u64, op: Op, at: u32, blocks: u32) {
        let entry = self.submit(id, op, at, blocks);
        self.ack(entry, at);
    }

    /// Judges the blocks of these requests, in this order, from the zone's start.
    fn judge(&self, ids: &[u64], state: ZoneState) -> Result<Verdict, String> {
        let mut blocks = Vec::new();
        for id in ids {
            let old = self.log.base.blocks.iter().find(|stamp| stamp.id == *id);
            match (old, self.log.entries.iter().find(|entry| entry.id == *id)) {
                (Some(stamp), _) => blocks.push(*stamp),
                (None, Some(entry)) => blocks.extend((0..entry.blocks).map(|i| entry.stamp(ZONE, i))),
                (None, None) => panic!("no request {id}"),
            }
        }
        let end = blocks.len() as u64;
        let pointer = if state == ZoneState::Full {
            CAPACITY.into()
        } else {
            end
        };
        self.found(blocks.into_iter().map(Content::Stamp).collect(), pointer, state)
    }

    fn found(&self, mut blocks: Vec<Content>, pointer: u64, state: ZoneState) -> Result<Verdict, String> {
        blocks.resize(CAPACITY as usize, Content::Zeros);
        let found = Found {
            blocks,
            pointer,
            state,
        };
        judge(ZONE, &self.log.base, &self.log.entries, self.secured, &found)
    }
}

use ZoneState::{Closed, Empty, Full};

#[test]
fn acknowledged_writes_are_there() {
    let mut h = History::new();
    h.done(1, Op::Write, 0, 2);
    h.done(2, Op::Append, 2, 3);
    let verdict = h.judge(&[1, 2], Closed).unwrap();
    assert_eq!((verdict.acknowledged, verdict.unacknowledged), (2, 0));
    assert_eq!(verdict.base.blocks.len(), 5);
    h.judge(&[1], Closed).unwrap_err();
    h.judge(&[], Empty).unwrap_err();
}

#[test]
fn requests_in_flight_are_there_wholly_or_not() {
    let mut h = History::new();
    h.done(1, Op::Write, 0, 2);
    h.submit(2, Op::Write, 2, 4);
    h.judge(&[1], Closed).unwrap();
    assert_eq!(h.judge(&[1, 2], Closed).unwrap().unacknowledged, 1);
    let stamps = |range: std::ops::Range<usize>| {
        let all = h.log.entries.iter();
        let all = all.flat_map(|entry| (0..entry.blocks).map(|i| Content::Stamp(entry.stamp(ZONE, i))));
        all.collect::<Vec<_>>()[range].to_vec()
    };
    h.found(stamps(0..6), 6, Closed).unwrap();
    h.found(stamps(0..5), 5, Closed).unwrap_err();
}

#[test]
fn refused_requests_are_not_there() {
    let mut h = History::new();
    let refused = h.submit(1, Op::Write, 0, 1);
    h.log.refuse(refused, false);
    h.judge(&[], Empty).unwrap();
    h.judge(&[1], Closed).unwrap_err();
}

#[test]
fn the_pointer_is_where_the_data_ends() {
    let mut h = History::new();
    h.done(1, Op::Write, 0, 2);
    let data: Vec<_> = (0..2)
        .map(|i| Content::Stamp(h.log.entries[0].stamp(ZONE, i)))
        .collect();
    h.found(data.clone(), 2, Closed).unwrap();
    // Covers what nobody wrote, covers less, stands elsewhere in a full zone.
    h.found(data.clone(), 3, Closed).unwrap_err();
    h.found(data.clone(), 1, Closed).unwrap_err();
    h.found(data.clone(), 2, Full).unwrap_err();
    h.found(data, 2, ZoneState::ImplicitlyOpen).unwrap_err();
    History::new().found(vec![], 0, Closed).unwrap_err();
    History::new().found(vec![], 0, Empty).unwrap();
}

#[test]
fn nothing_shows_above_a_hole_and_nothing_is_torn() {
    let mut h = History::new();
    h.done(1, Op::Append, 0, 1);
    h.submit(2, Op::Append, 0, 1);
    let block = |entry: usize| Content::Stamp(h.log.entries[entry].stamp(ZONE, 0));
    h.found(vec![block(0), Content::Zeros, block(1)], 3, Closed)
        .unwrap_err();
    h.found(vec![block(0), Content::Zeros, block(1)], 1, Closed)
        .unwrap_err();
    h.found(vec![block(0), Content::Garbage { torn: None }], 2, Closed)
        .unwrap_err();
    h.found(vec![block(0), block(0)], 2, Closed).unwrap_err();
}

#[test]
fn appends_lie_where_they_were_said_to_go() {
    let mut h = History::new();
    let (first, second) = (h.submit(1, Op::Append, 0, 1), h.submit(2, Op::Append, 0, 1));
    h.ack(first, 1);
    h.ack(second, 0);
    h.judge(&[2, 1], Closed).unwrap();
    h.judge(&[1, 2], Closed).unwrap_err();
}

#[test]
fn no_two_appends_get_a_block() {
    let mut h = History::new();
    h.done(1, Op::Append, 0, 2);
    let second = h.submit(2, Op::Append, 0, 1);
    h.log.acknowledge(second, 1, h.now + 1).unwrap_err();
    let past = h.submit(3, Op::Append, 0, 2);
    h.log.acknowledge(past, CAPACITY - 1, h.now + 1).unwrap_err();
}

#[test]
fn what_was_acknowledged_earlier_lies_below() {
    let mut h = History::new();
    let first = h.submit(1, Op::Append, 0, 1);
    h.ack(first, 0);
    h.submit(2, Op::Append, 0, 1);
    h.judge(&[1, 2], Closed).unwrap();
    // An append in flight cannot have pushed aside one that was acknowledged before it was submitted.
    h.log.entries[0].at = ANYWHERE;
    h.judge(&[2, 1], Closed).unwrap_err();
}

#[test]
fn an_acknowledged_reset_holds() {
    let mut h = History::after(&[7], false);
    h.done(1, Op::Write, 1, 1);
    h.done(2, Op::Reset, 0, 0);
    h.judge(&[], Empty).unwrap();
    h.judge(&[7, 1], Closed).unwrap_err();
    h.judge(&[7], Closed).unwrap_err();
    h.done(3, Op::Write, 0, 1);
    h.judge(&[3], Closed).unwrap();
    h.judge(&[], Empty).unwrap_err();
}

#[test]
fn a_reset_in_flight_happened_or_not() {
    let mut h = History::after(&[7], false);
    h.done(1, Op::Write, 1, 1);
    h.submit(2, Op::Reset, 0, 0);
    h.submit(3, Op::Append, 0, 1);
    h.judge(&[7, 1], Closed).unwrap();
    h.judge(&[7, 1, 3], Closed).unwrap();
    h.judge(&[], Empty).unwrap();
    h.judge(&[3], Closed).unwrap();
    // But not by halves.
    h.judge(&[7], Closed).unwrap_err();
    h.judge(&[7, 3], Closed).unwrap_err();
}

#[test]
fn a_reset_explains_no_loss_of_what_came_after_it() {
    let mut h = History::after(&[7], false);
    h.done(1, Op::Reset, 0, 0);
    h.done(2, Op::Write, 0, 1);
    h.judge(&[2], Closed).unwrap();
    h.judge(&[], Empty).unwrap_err();
    // One that was under way may have come after it.
    let reset = h.submit(3, Op::Reset, 0, 0);
    h.submit(4, Op::Append, 0, 1);
    h.ack(reset, 0);
    h.judge(&[], Empty).unwrap();
    h.judge(&[4], Closed).unwrap();
    h.judge(&[2], Closed).unwrap_err();
}

#[test]
fn a_write_beside_a_reset_comes_before_or_after_it() {
    let mut h = History::new();
    let reset = h.submit(1, Op::Reset, 0, 0);
    let append = h.submit(2, Op::Append, 0, 1);
    h.ack(append, 0);
    h.ack(reset, 0);
    h.judge(&[], Empty).unwrap();
    h.judge(&[2], Closed).unwrap();
}

#[test]
fn a_finish_holds_and_keeps_the_data() {
    let mut h = History::new();
    h.done(1, Op::Write, 0, 2);
    h.judge(&[1], Full).unwrap_err();
    let finish = h.submit(2, Op::Finish, 0, 0);
    h.judge(&[1], Full).unwrap();
    h.judge(&[1], Closed).unwrap();
    h.ack(finish, 0);
    let verdict = h.judge(&[1], Full).unwrap();
    assert!(verdict.base.full);
    h.judge(&[1], Closed).unwrap_err();
    h.judge(&[], Full).unwrap_err();
    h.done(3, Op::Reset, 0, 0);
    h.judge(&[1], Full).unwrap_err();
    h.judge(&[], Full).unwrap_err();
    h.judge(&[], Empty).unwrap();
}

#[test]
fn a_zone_that_was_full_stays_full() {
    let h = History::after(&[7], true);
    h.judge(&[7], Full).unwrap();
    h.judge(&[7], Closed).unwrap_err();
    let mut h = History::after(&[], true);
    h.judge(&[], Full).unwrap();
    h.judge(&[], Empty).unwrap_err();
    h.done(1, Op::Reset, 0, 0);
    h.judge(&[], Full).unwrap_err();
    h.done(2, Op::Finish, 0, 0);
    h.judge(&[], Full).unwrap();
}

#[test]
fn a_zone_written_to_its_end_is_full() {
    let mut h = History::new();
    h.done(1, Op::Write, 0, CAPACITY);
    h.judge(&[1], Full).unwrap();
    h.judge(&[1], Closed).unwrap_err();
}

#[test]
fn without_a_run_state_only_flushed_writes_must_be_there() {
    let mut h = History::new();
    h.done(1, Op::Write, 0, 1);
    h.secured = Secured(h.now + 1);
    h.done(2, Op::Write, 1, 1);
    h.judge(&[1, 2], Closed).unwrap();
    h.judge(&[1], Closed).unwrap();
    h.judge(&[], Empty).unwrap_err();
    // A finish keeps what was acknowledged before it.
    h.done(3, Op::Finish, 0, 0);
    h.judge(&[1, 2], Full).unwrap();
    h.judge(&[1], Full).unwrap_err();
}

#[test]
fn a_conventional_block_has_its_last_write_or_one_in_flight() {
    let mut log = ConventionalLog::new(0, vec![Content::Zeros; 4]);
    let write = |id, submitted, outcome| Entry {
        id,
        op: Op::Write,
        at: 1,
        blocks: 2,
        submitted,
        outcome,
    };
    for entry in [
        write(1, 1, Outcome::Done(2)),
        write(2, 3, Outcome::Done(6)),
        write(3, 5, Outcome::Done(7)),
        write(4, 8, Outcome::InFlight),
    ] {
        log.submit(entry);
    }
    let judge = |block, secured, id: u64| {
        let content = match id {
            0 => Content::Zeros,
            id => Content::Stamp(log.entries[id as usize - 1].stamp(0, block - 1)),
        };
        judge_conventional(&log, block, secured, Time::MAX, content)
    };
    for id in [2, 3, 4] {
        judge(1, Secured::ALL, id).unwrap();
        judge(2, Secured::ALL, id).unwrap();
    }
    for id in [0, 1] {
        judge(1, Secured::ALL, id).unwrap_err();
    }
    // With a flush at 3 the first write is the only one that is secured.
    judge(1, Secured(3), 1).unwrap();
    judge(1, Secured(3), 0).unwrap_err();
    let elsewhere = Content::Stamp(log.entries[2].stamp(0, 0));
    judge_conventional(&log, 2, Secured::ALL, Time::MAX, elsewhere).unwrap_err();
    judge_conventional(&log, 3, Secured::ALL, Time::MAX, elsewhere).unwrap_err();
    judge_conventional(&log, 3, Secured::ALL, Time::MAX, Content::Zeros).unwrap();
}
