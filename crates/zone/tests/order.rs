//! Writes in flight: acknowledgement in order, failures, and requests that are lost.

#![cfg(not(feature = "shuttle"))]

mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};

use support::*;
use zbdkit_zone::{Completion, Condition, ExclusiveOp, Model, Refused, ZoneError};

#[test]
fn the_write_that_closes_the_gap_acknowledges_the_whole_prefix() {
    let mut d = Device::new(|_| ());
    let [a, b, c, e] = [1, 2, 1, 1].map(|blocks| d.append(Z2, blocks));
    let (b, e) = (d.waits(b), d.waits(e));
    assert_eq!((d.written(Z2), d.engine.outcome(&b)), (0, None));
    assert_eq!(d.log.take(), [], "nothing is published yet");
    let prefix = d.done(a);
    assert_eq!(
        (prefix.zone(), prefix.written(), prefix.advanced()),
        (Z2, 3 * BLOCK, true)
    );
    assert_eq!(d.log.take(), [Event::Published(Z2, 3 * BLOCK)]);
    assert_eq!(d.engine.outcome(&b), None, "done but not acknowledged");
    d.acknowledge(prefix);
    assert_eq!(
        d.log.take(),
        [Event::Ready(b.slot())],
        "the others are told, the caller knows"
    );
    assert_eq!(d.engine.outcome(&b), Some(Ok(())));
    assert_eq!(d.engine.outcome(&b), None, "once");
    assert_eq!(d.engine.outcome(&e), None);
    let prefix = d.done(c);
    assert_eq!(prefix.written(), 5 * BLOCK);
    d.acknowledge(prefix);
    assert_eq!(d.engine.outcome(&e), Some(Ok(())));
}

#[test]
fn prefixes_may_be_acknowledged_in_any_order() {
    let mut d = Device::new(|_| ());
    let [a, b, c] = [1; 3].map(|blocks| d.append(Z2, blocks));
    let a = d.done(a);
    let c = d.waits(c);
    let b = d.done(b);
    assert_eq!((a.written(), b.written()), (BLOCK, 3 * BLOCK));
    d.acknowledge(b);
    assert_eq!(d.engine.outcome(&c), Some(Ok(())));
    d.acknowledge(a);
}

#[test]
fn a_run_state_that_fails_fails_the_whole_prefix() {
    let mut d = Device::new(|_| ());
    let [a, b] = [1; 2].map(|blocks| d.append(Z2, blocks));
    let b = d.waits(b);
    let prefix = d.done(a);
    d.engine.acknowledge(prefix, Err(ENOSPC), &d.log);
    assert_eq!(d.engine.outcome(&b), Some(Err(ENOSPC)));
}

#[test]
fn a_failure_fails_what_is_above_it_and_nothing_below() {
    let mut d = Device::new(|_| ());
    let [a, b, c, e] = [1; 4].map(|blocks| d.append(Z2, blocks));
    let e = d.waits(e);
    assert_eq!(d.fails(b, EIO), EIO);
    assert_eq!(
        d.log.take(),
        [Event::Ready(e.slot())],
        "it was done, so it fails at once"
    );
    assert_eq!(d.engine.outcome(&e), Some(Err(EIO)));
    let wp = d.start(Z2);
    assert_eq!(d.admit(wp, BLOCK).map(|_| ()), Err(Refused::Busy(Z2)));
    assert!(
        matches!(d.complete(c, Ok(())), Completion::Failed(EIO)),
        "only after its own completion"
    );
    assert_eq!(
        d.admit(wp, BLOCK).map(|_| ()),
        Err(Refused::Busy(Z2)),
        "one is still in flight"
    );
    assert_eq!(d.log.take(), []);
    let prefix = d.done(a);
    assert_eq!(prefix.written(), BLOCK);
    assert_eq!(
        d.log.take(),
        [Event::Published(Z2, BLOCK), Event::Changed(Z2)],
        "the zone goes on"
    );
    d.acknowledge(prefix);
    let next = d.append(Z2, 1);
    assert_eq!(next.offset(), wp + BLOCK, "at its written end");
    let prefix = d.done(next);
    d.acknowledge(prefix);
}

#[test]
fn the_zone_waits_for_all_that_is_above_a_failed_write() {
    let mut d = Device::new(|_| ());
    let [a, b, c] = [1; 3].map(|blocks| d.append(Z2, blocks));
    let wp = d.start(Z2);
    d.fails(a, EIO);
    for permit in [c, b] {
        assert_eq!(d.admit(wp, BLOCK).map(|_| ()), Err(Refused::Busy(Z2)));
        assert_eq!(d.log.take(), []);
        assert!(matches!(d.complete(permit, Ok(())), Completion::Failed(EIO)));
    }
    assert_eq!(d.log.take(), [Event::Changed(Z2)]);
    d.write(Z2, 1);
}

#[test]
fn what_is_above_two_failures_fails_with_the_one_that_came_first() {
    let mut d = Device::new(|_| ());
    let [a, b, c, e] = [1; 4].map(|blocks| d.append(Z2, blocks));
    assert_eq!(d.fails(c, EIO), EIO);
    assert_eq!(d.fails(a, ENOSPC), ENOSPC);
    assert_eq!(d.fails(e, 1), EIO, "the cause, not its own");
    assert_eq!(d.fails(b, 2), ENOSPC);
    assert_eq!((d.written(Z2), d.condition(Z2)), (0, Condition::Empty));
    assert_eq!(d.log.take(), [Event::Changed(Z2)]);
}

#[test]
fn an_errno_of_zero_is_not_success() {
    let mut d = Device::new(|_| ());
    let a = d.append(Z2, 1);
    assert_eq!(d.fails(a, 0), EIO);
}

#[test]
fn a_zone_opened_by_a_failed_write_is_empty_again() {
    let mut d = Device::new(|spec| (spec.max_open, spec.max_active) = (1, 1));
    let a = d.append(Z2, 1);
    assert_eq!(d.condition(Z2), Condition::ImplicitlyOpen);
    d.fails(a, EIO);
    assert_eq!(d.condition(Z2), Condition::Empty);
    d.write(Z3, 1);
    assert_eq!(d.written(Z3), 1, "its resources were freed");
}

#[test]
fn a_zone_closed_while_its_failing_write_was_in_flight_is_empty_again() {
    let mut d = Device::new(|spec| (spec.max_open, spec.max_active) = (1, 2));
    let a = d.append(Z2, 1);
    d.write(Z3, 1);
    assert_eq!(d.condition(Z2), Condition::Closed);
    d.fails(a, EIO);
    assert_eq!(d.condition(Z2), Condition::Empty);
    assert_eq!(d.engine.resources().active, 1);
}

#[test]
fn an_explicitly_open_zone_stays_open_over_a_failure_and_a_written_one_too() {
    let mut d = Device::new(|_| ());
    d.engine.open(Z2).expect("opened");
    d.write(Z3, 1);
    for zone in [Z2, Z3] {
        let a = d.append(zone, 1);
        d.fails(a, EIO);
    }
    assert_eq!(d.condition(Z2), Condition::ExplicitlyOpen);
    assert_eq!(d.condition(Z3), Condition::ImplicitlyOpen);
}

#[test]
fn counters_count_what_is_written_and_only_that() {
    let mut d = Device::new(|_| ());
    d.write(Z2, 3);
    let a = d.append(Z2, 1);
    d.fails(a, EIO);
    d.operate(Z2, ExclusiveOp::Reset);
    d.write(Z2, 1);
    d.operate(Z2, ExclusiveOp::Finish);
    let counters = d.engine.info(Z2).counters;
    assert_eq!(
        (counters.bytes_written, counters.resets, counters.finishes),
        (4 * BLOCK, 1, 1)
    );
    assert_eq!(d.engine.record(Z2).counters, counters);
}

#[test]
fn a_sequential_preferred_write_fails_alone() {
    let mut d = Device::new(|spec| spec.model = Model::HostAware);
    let start = d.start(Z2);
    let a = d.admit(start, BLOCK).expect("anywhere");
    let b = d.admit(start + BLOCK, BLOCK).expect("anywhere");
    assert_eq!(b.gap(), None, "the first is admitted");
    assert_eq!(d.fails(a, EIO), EIO);
    let c = d.admit(start + 2 * BLOCK, BLOCK).expect("the zone does not stop");
    let prefix = d.done(b);
    assert_eq!(prefix.written(), 2 * BLOCK);
    d.acknowledge(prefix);
    d.fails(c, EIO);
    let e = d.admit(start + 3 * BLOCK, BLOCK).expect("anywhere");
    assert_eq!(
        e.gap(),
        Some(start + 2 * BLOCK..start + 3 * BLOCK),
        "what the failed one left"
    );
    d.fails(e, EIO);
    assert_eq!(d.condition(Z2), Condition::ImplicitlyOpen);
    let f = d.admit(d.start(Z3), BLOCK).expect("anywhere");
    d.fails(f, EIO);
    assert_eq!(d.condition(Z3), Condition::Empty);
}

#[test]
fn each_change_of_a_record_marks_its_zone() {
    let mut d = Device::new(|_| ());
    let take = |d: &Device| {
        let mut zones = vec![];
        d.engine.take_dirty(&mut |zone, record| {
            assert_eq!(record, d.engine.record(zone));
            zones.push(zone.0);
        });
        zones
    };
    assert_eq!(take(&d), []);
    let a = d.append(Z3, 1);
    let b = d.append(Z2, 1);
    assert_eq!(take(&d), [], "an admission changes nothing");
    let b = d.done(b);
    let a = d.done(a);
    assert_eq!(take(&d), [2, 3]);
    d.acknowledge(a);
    d.acknowledge(b);
    assert_eq!(take(&d), []);
    for op in [
        ExclusiveOp::Finish,
        ExclusiveOp::SetOffline,
        ExclusiveOp::SetNormal,
        ExclusiveOp::Reset,
    ] {
        assert!(d.operate(Z2, op));
        assert_eq!(take(&d), [2]);
    }
}

#[test]
fn a_wait_that_is_given_up_gives_its_slot_back() {
    let mut d = Device::new(|_| ());
    d.pool = d.engine.slots(2);
    for _ in 0..3 {
        let [a, b] = [1; 2].map(|blocks| d.append(Z2, blocks));
        drop(d.waits(b));
        let prefix = d.done(a);
        d.acknowledge(prefix);
    }
    assert_eq!(d.condition(Z2), Condition::Full);
}

#[test]
fn a_pool_that_is_dropped_does_not_harm_its_writes() {
    let mut d = Device::new(|_| ());
    let [a, b] = [1; 2].map(|blocks| d.append(Z2, blocks));
    d.pool = d.engine.slots(16);
    let c = d.append(Z2, 1);
    let (b, c) = (d.waits(b), d.waits(c));
    let prefix = d.done(a);
    d.acknowledge(prefix);
    assert_eq!(
        (d.engine.outcome(&b), d.engine.outcome(&c)),
        (Some(Ok(())), Some(Ok(())))
    );
}

#[test]
fn a_zone_with_a_lost_request_admits_nothing_more() {
    let mut d = Device::new(|_| ());
    let lose = |token: Box<dyn FnOnce() + '_>| {
        let panicked = catch_unwind(AssertUnwindSafe(token)).is_err();
        assert_eq!(panicked, cfg!(debug_assertions), "a debug build says so");
    };
    let write = d.append(Z2, 1);
    lose(Box::new(move || drop(write)));
    let unacknowledged = d.append(Z3, 1);
    let unacknowledged = d.done(unacknowledged);
    lose(Box::new(move || drop(unacknowledged)));
    let read = d.engine.admit_read(d.start(Z4), BLOCK).expect("readable");
    lose(Box::new(move || drop(read)));
    d.write(Z5, 1);
    let reset = d
        .engine
        .begin(Z5, ExclusiveOp::Reset)
        .expect("allowed")
        .expect("not empty");
    lose(Box::new(move || drop(reset)));
    for zone in [Z2, Z3, Z4, Z5] {
        let wp = d.start(zone);
        assert_eq!(d.write_error(wp, BLOCK), ZoneError::Poisoned { zone });
    }
    assert_eq!(
        d.engine.begin(Z2, ExclusiveOp::Reset).map(|_| ()),
        Err(ZoneError::Poisoned { zone: Z2 }.into())
    );
    d.write(zbdkit_zone::ZoneNo(6), 1);
}
