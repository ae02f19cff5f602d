//! Open, close, reset, finish and what the operator sets.

#![cfg(not(feature = "shuttle"))]

mod support;

use support::*;
use zbdkit_zone::{
    CloseEmpty, Condition, Counters, ExclusiveOp, RecordError, Refused, ZoneError, ZoneNo, ZoneRecord,
};

use CloseEmpty::{ToClosed, ToEmpty};
use Condition::{Closed, Empty, ExplicitlyOpen, Full, ImplicitlyOpen, NotWritePointer, Offline, ReadOnly};

#[test]
fn open_takes_empty_closed_and_implicitly_open_zones_but_not_full_ones() {
    let mut d = Device::new(|_| ());
    d.engine.open(Z2).expect("empty");
    d.engine.open(Z2).expect("open already");
    d.write(Z3, 1);
    d.engine.open(Z3).expect("implicitly open");
    d.engine.close(Z3, ToEmpty).expect("open");
    assert_eq!(d.condition(Z3), Closed);
    d.engine.open(Z3).expect("closed");
    assert_eq!(
        (d.condition(Z2), d.condition(Z3)),
        (ExplicitlyOpen, ExplicitlyOpen)
    );
    d.write(Z4, 6);
    let error = ZoneError::InvalidTransition {
        zone: Z4,
        condition: Full,
    };
    assert_eq!(d.engine.open(Z4), Err(error.into()));
}

#[test]
fn close_of_an_untouched_zone_is_the_callers_choice() {
    let d = Device::new(|_| ());
    d.engine.open(Z2).expect("empty");
    d.engine.close(Z2, ToEmpty).expect("open");
    assert_eq!((d.condition(Z2), d.engine.resources().active), (Empty, 0));
    d.engine.open(Z2).expect("empty");
    d.engine.close(Z2, ToClosed).expect("open");
    assert_eq!((d.condition(Z2), d.engine.resources().active), (Closed, 1));
    assert!(d.operate(Z2, ExclusiveOp::Reset), "it is not empty");
    assert_eq!(d.condition(Z2), Empty);
}

#[test]
fn close_leaves_zones_that_are_not_open_as_they_are() {
    let mut d = Device::new(|_| ());
    d.write(Z3, 1);
    d.engine.close(Z3, ToEmpty).expect("open");
    d.write(Z4, 6);
    for (zone, condition) in [(Z2, Empty), (Z3, Closed), (Z4, Full)] {
        for empty in [ToEmpty, ToClosed] {
            d.engine.close(zone, empty).expect("nothing to do");
            assert_eq!(d.condition(zone), condition);
        }
    }
}

#[test]
fn close_does_not_forget_a_write_in_flight() {
    let mut d = Device::new(|_| ());
    d.engine.open(Z2).expect("empty");
    let a = d.append(Z2, 1);
    d.engine.close(Z2, ToEmpty).expect("open");
    assert_eq!(d.condition(Z2), Closed);
    let prefix = d.done(a);
    d.acknowledge(prefix);
    assert_eq!((d.condition(Z2), d.written(Z2)), (Closed, 1));
}

#[test]
fn a_closed_zone_that_a_write_fills_is_active_no_more() {
    let mut d = Device::new(|spec| spec.max_active = 1);
    let a = d.append(Z2, 4);
    let b = d.append(Z2, 2);
    d.engine.close(Z2, ToEmpty).expect("open");
    for permit in [a, b] {
        let prefix = d.done(permit);
        d.acknowledge(prefix);
    }
    assert_eq!((d.condition(Z2), d.engine.resources().active), (Full, 0));
    d.write(Z3, 1);
}

#[test]
fn conventional_zones_are_not_managed() {
    let d = Device::new(|_| ());
    let error = Refused::Zone(ZoneError::Conventional { zone: ZoneNo(1) });
    assert_eq!(d.engine.open(ZoneNo(1)), Err(error));
    assert_eq!(d.engine.close(ZoneNo(1), ToEmpty), Err(error));
    for op in [ExclusiveOp::Reset, ExclusiveOp::Finish] {
        assert_eq!(d.engine.begin(ZoneNo(1), op).map(|_| ()), Err(error));
    }
    assert_eq!(d.engine.info(ZoneNo(1)).wp, ZONE);
}

#[test]
fn read_only_and_offline_zones_are_not_managed() {
    let d = Device::new(|_| ());
    for (op, error) in [
        (ExclusiveOp::SetReadOnly, ZoneError::ReadOnly { zone: Z2 }),
        (ExclusiveOp::SetOffline, ZoneError::Offline { zone: Z2 }),
    ] {
        assert!(d.operate(Z2, op));
        let error = Refused::Zone(error);
        assert_eq!(d.engine.open(Z2), Err(error));
        assert_eq!(d.engine.close(Z2, ToEmpty), Err(error));
        for op in [ExclusiveOp::Reset, ExclusiveOp::Finish] {
            assert_eq!(d.engine.begin(Z2, op).map(|_| ()), Err(error));
        }
    }
}

#[test]
fn the_operator_sets_any_zone_and_frees_its_resources() {
    let mut d = Device::new(|_| ());
    d.engine.open(Z2).expect("empty");
    d.write(Z3, 1);
    d.write(Z4, 2);
    d.operate(Z4, ExclusiveOp::Finish);
    assert_eq!(d.engine.resources().active, 2);
    for zone in [ZoneNo(0), Z2, Z3, Z4, Z5] {
        assert!(d.operate(zone, ExclusiveOp::SetReadOnly));
        assert!(!d.operate(zone, ExclusiveOp::SetReadOnly), "nothing to do");
        assert_eq!(d.condition(zone), ReadOnly);
        assert!(d.operate(zone, ExclusiveOp::SetOffline));
        assert!(!d.operate(zone, ExclusiveOp::SetOffline), "nothing to do");
        assert_eq!(d.condition(zone), Offline);
    }
    assert_eq!(d.engine.resources().active, 0);
    let normal = [
        (ZoneNo(0), NotWritePointer),
        (Z2, Empty),
        (Z3, Closed),
        (Z4, Full),
        (Z5, Empty),
    ];
    for (zone, condition) in normal {
        assert!(d.operate(zone, ExclusiveOp::SetNormal));
        assert!(!d.operate(zone, ExclusiveOp::SetNormal), "nothing to do");
        assert_eq!(d.condition(zone), condition);
    }
    assert_eq!(d.written(Z4), 2, "a finished zone keeps its written end");
}

#[test]
fn reset_takes_every_zone_that_holds_something() {
    let mut d = Device::new(|_| ());
    d.write(Z2, 1);
    d.write(Z3, 1);
    d.engine.open(Z3).expect("open");
    d.write(Z4, 1);
    d.engine.close(Z4, ToEmpty).expect("open");
    d.write(Z5, 1);
    d.operate(Z5, ExclusiveOp::Finish);
    for (zone, condition) in [
        (Z2, ImplicitlyOpen),
        (Z3, ExplicitlyOpen),
        (Z4, Closed),
        (Z5, Full),
    ] {
        assert_eq!(d.condition(zone), condition);
        assert!(d.operate(zone, ExclusiveOp::Reset));
        assert!(!d.operate(zone, ExclusiveOp::Reset), "nothing to do");
        let info = d.engine.info(zone);
        assert_eq!(
            (info.condition, info.wp, info.counters.resets),
            (Empty, info.start, 1)
        );
    }
    assert_eq!(d.engine.resources().active, 0);
    d.write(Z5, 6);
    assert_eq!(d.condition(Z5), Full);
}

#[test]
fn finish_fills_a_zone_and_keeps_its_written_end() {
    let mut d = Device::new(|_| ());
    d.write(Z2, 2);
    for (zone, written) in [(Z2, 2), (Z3, 0)] {
        assert!(d.operate(zone, ExclusiveOp::Finish));
        assert!(!d.operate(zone, ExclusiveOp::Finish), "nothing to do");
        let info = d.engine.info(zone);
        assert_eq!((info.condition, info.counters.finishes), (Full, 1));
        assert_eq!(
            (info.wp, info.written_end),
            (info.start + CAPACITY, info.start + written * BLOCK)
        );
        assert!(d.engine.record(zone).finished);
    }
    assert_eq!(d.engine.resources().active, 0);
}

#[test]
fn finish_of_an_empty_zone_needs_resources_and_keeps_none() {
    let mut d = Device::new(|spec| (spec.max_open, spec.max_active) = (1, 2));
    let finish = |d: &Device| d.engine.begin(Z5, ExclusiveOp::Finish).map(|_| ());
    d.engine.open(Z2).expect("empty");
    assert_eq!(finish(&d), Err(ZoneError::TooManyOpen { limit: 1 }.into()));
    d.engine.close(Z2, ToClosed).expect("open");
    d.write(Z3, 1);
    assert_eq!(finish(&d), Err(ZoneError::TooManyActive { limit: 2 }.into()));
    assert!(
        d.operate(Z4, ExclusiveOp::FinishUnlimited),
        "but not where the protocol has it otherwise"
    );
    assert_eq!((d.condition(Z4), d.engine.resources().active), (Full, 2));
    d.operate(Z2, ExclusiveOp::Reset);
    assert!(
        d.operate(Z5, ExclusiveOp::Finish),
        "an implicitly open zone could make room"
    );
    assert_eq!(
        (d.condition(Z3), d.engine.resources().active),
        (ImplicitlyOpen, 1),
        "but need not"
    );
    d.engine.close(Z3, ToEmpty).expect("open");
    d.engine.open(Z2).expect("empty");
    assert!(d.operate(Z3, ExclusiveOp::Finish), "a closed zone needs none");
}

#[test]
fn a_busy_zone_refuses_everything() {
    let mut d = Device::new(|_| ());
    d.write(Z2, 1);
    let start = d.start(Z2);
    let permit = d
        .engine
        .begin(Z2, ExclusiveOp::Finish)
        .expect("allowed")
        .expect("something to do");
    let busy = Err(Refused::Busy(Z2));
    assert_eq!(d.admit(start + BLOCK, BLOCK).map(|_| ()), busy);
    assert_eq!(d.engine.admit_append(&mut d.pool, start, BLOCK).map(|_| ()), busy);
    assert_eq!(d.engine.admit_read(start, BLOCK).map(|_| ()), busy);
    assert_eq!(d.engine.open(Z2), busy);
    assert_eq!(d.engine.close(Z2, ToEmpty), busy);
    for op in [
        ExclusiveOp::Reset,
        ExclusiveOp::Finish,
        ExclusiveOp::SetReadOnly,
        ExclusiveOp::SetOffline,
        ExclusiveOp::SetNormal,
    ] {
        assert_eq!(d.engine.begin(Z2, op).map(|_| ()), busy);
    }
    assert_eq!(
        d.engine.info(Z2).condition,
        ImplicitlyOpen,
        "a report is still possible"
    );
    d.log.take();
    d.engine.abort(permit, &d.log);
    assert_eq!(d.log.take(), [Event::Changed(Z2)]);
    assert_eq!((d.condition(Z2), d.written(Z2)), (ImplicitlyOpen, 1), "as it was");
    d.write(Z2, 1);
}

#[test]
fn an_exclusive_operation_waits_for_reads_and_for_acknowledgements() {
    let mut d = Device::new(|_| ());
    let [a, b, c] = [1; 3].map(|blocks| d.append(Z2, blocks));
    let read = d.engine.admit_read(d.start(Z2), BLOCK).expect("readable");
    let permit = d
        .engine
        .begin(Z2, ExclusiveOp::Reset)
        .expect("allowed")
        .expect("something to do");
    let prefix = d.done(a);
    d.acknowledge(prefix);
    d.fails(b, EIO);
    let c = d.complete(c, Ok(()));
    assert!(matches!(c, zbdkit_zone::Completion::Failed(EIO)));
    assert!(!d.engine.drained(&permit), "the read is not over");
    d.log.take();
    d.engine.end_read(read, &d.log);
    assert_eq!(d.log.take(), [Event::Changed(Z2)]);
    assert!(d.engine.drained(&permit));
    let record = d.engine.record_after(&permit);
    assert_eq!((record.written, record.counters.resets), (0, 1));
    d.engine.commit(permit, &d.log);
    assert_eq!(d.log.take(), [Event::Changed(Z2)]);
    assert_eq!(d.engine.record(Z2), record);

    let a = d.append(Z2, 1);
    let permit = d
        .engine
        .begin(Z2, ExclusiveOp::Finish)
        .expect("allowed")
        .expect("something to do");
    let prefix = d.done(a);
    assert!(!d.engine.drained(&permit), "not acknowledged");
    d.acknowledge(prefix);
    assert!(d.engine.drained(&permit));
    d.engine.commit(permit, &d.log);
    assert_eq!((d.condition(Z2), d.written(Z2)), (Full, 1));
}

#[test]
fn an_operation_on_a_zone_that_fails_meanwhile_still_gets_it() {
    let mut d = Device::new(|_| ());
    let [a, b] = [1; 2].map(|blocks| d.append(Z2, blocks));
    d.fails(b, EIO);
    let permit = d
        .engine
        .begin(Z2, ExclusiveOp::Finish)
        .expect("allowed")
        .expect("something to do");
    d.fails(a, ENOSPC);
    assert!(d.engine.drained(&permit));
    assert_eq!(d.condition(Z2), Empty);
    d.engine.commit(permit, &d.log);
    assert_eq!(
        (d.condition(Z2), d.engine.info(Z2).wp),
        (Full, d.start(Z2) + CAPACITY)
    );
}

#[test]
fn all_zones_are_reset_one_after_the_other() {
    let mut d = Device::new(|_| ());
    for zone in [Z2, Z3, Z5] {
        d.write(zone, 2);
    }
    d.operate(Z4, ExclusiveOp::SetReadOnly);
    let permits: Vec<_> = d
        .engine
        .geometry()
        .zones()
        .filter_map(|z| d.engine.begin(z, ExclusiveOp::Reset).ok()?)
        .collect();
    assert_eq!(
        permits.iter().map(|permit| permit.zone()).collect::<Vec<_>>(),
        [Z2, Z3, Z5]
    );
    permits
        .into_iter()
        .for_each(|permit| d.engine.commit(permit, &d.log));
    assert_eq!((d.written(Z2), d.written(Z3), d.written(Z5)), (0, 0, 0));
    assert_eq!(d.condition(Z4), ReadOnly);
}

#[test]
fn a_restored_zone_is_as_its_record_says_whatever_it_was() {
    let mut d = Device::with(|spec| spec.max_active = 1, |_| ZoneRecord::default());
    d.write(Z2, 2);
    let closed = ZoneRecord {
        written: 3 * BLOCK,
        counters: Counters {
            resets: 4,
            finishes: 5,
            bytes_written: 6,
        },
        ..ZoneRecord::default()
    };
    let full = ZoneRecord {
        finished: true,
        ..closed
    };
    for (zone, record, condition) in [
        (Z2, ZoneRecord::default(), Empty),
        (Z3, closed, Closed),
        (Z4, closed, Closed),
        (Z5, full, Full),
        (Z5, closed, Closed),
    ] {
        d.engine.restore(zone, &record).expect("possible");
        assert_eq!((d.engine.record(zone), d.condition(zone)), (record, condition));
    }
    // The limit is passed as it may be at opening, and the counts are right.
    assert_eq!(d.engine.resources().active, 3);
    let mut dirty = Vec::new();
    d.engine.take_dirty(&mut |zone, _| dirty.push(zone));
    assert_eq!(dirty, [Z2, Z3, Z4, Z5]);
    for zone in [Z4, Z5] {
        d.engine.restore(zone, &ZoneRecord::default()).expect("possible");
    }
    d.write(Z3, 1);
    assert_eq!(d.written(Z3), 4);
    let beyond = ZoneRecord {
        written: 7 * BLOCK,
        ..ZoneRecord::default()
    };
    let refused = RecordError::BeyondCapacity {
        zone: Z3,
        written: 7 * BLOCK,
        capacity: CAPACITY,
    };
    assert_eq!(d.engine.restore(Z3, &beyond), Err(refused));
    assert_eq!(d.written(Z3), 4);
}
