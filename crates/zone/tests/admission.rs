//! What is admitted and what is refused, one test a rule.

#![cfg(not(feature = "shuttle"))]

mod support;

use support::*;
use zbdkit_zone::{
    Condition, Engine, ExclusiveOp, Geometry, GeometrySpec, MAX_SLOTS, Model, RecordError, Refused,
    ZoneError, ZoneNo, ZoneRecord,
};

const SIZE: u64 = SPEC.size;

#[test]
fn a_write_must_lie_on_the_device() {
    let mut d = Device::new(|_| ());
    for (offset, len) in [
        (SIZE, BLOCK),
        (SIZE - BLOCK, 2 * BLOCK),
        (u64::MAX, 1),
        (u64::MAX - 511, 512),
        (0, u64::MAX),
        (SIZE, 0),
    ] {
        assert_eq!(
            d.write_error(offset, len),
            ZoneError::OutOfRange {
                offset,
                len,
                size: SIZE
            }
        );
    }
    assert!(matches!(
        d.append_error(SIZE, BLOCK),
        ZoneError::OutOfRange { .. }
    ));
    assert!(matches!(
        d.append_error(u64::MAX, u64::MAX),
        ZoneError::OutOfRange { .. }
    ));
}

#[test]
fn a_write_is_some_whole_blocks() {
    let mut d = Device::new(|_| ());
    let wp = d.start(Z2);
    for (offset, len) in [(wp + 1, BLOCK), (wp, 1), (wp, 0), (wp, BLOCK + 256)] {
        assert_eq!(
            d.write_error(offset, len),
            ZoneError::Unaligned {
                offset,
                len,
                granularity: 512
            }
        );
    }
    assert!(matches!(d.append_error(wp, 100), ZoneError::Unaligned { .. }));
    assert!(matches!(d.append_error(wp, 0), ZoneError::Unaligned { .. }));
}

#[test]
fn a_write_stays_in_its_sequential_zone() {
    let mut d = Device::new(|_| ());
    let (offset, len) = (d.start(Z3) - BLOCK, 2 * BLOCK);
    assert_eq!(
        d.write_error(offset, len),
        ZoneError::Boundary {
            zone: Z2,
            offset,
            len,
            end: d.start(Z3)
        }
    );
}

#[test]
fn a_write_may_span_conventional_zones_but_not_leave_them() {
    let mut d = Device::new(|_| ());
    let permit = d.admit(BLOCK, 2 * ZONE - BLOCK).expect("conventional");
    assert_eq!(
        (permit.zone(), permit.slot(), permit.gap()),
        (ZoneNo(0), None, None)
    );
    let prefix = d.done(permit);
    assert!(!prefix.advanced());
    d.acknowledge(prefix);
    let bytes = |zone| d.engine.info(ZoneNo(zone)).counters.bytes_written;
    assert_eq!((bytes(0), bytes(1)), (ZONE - BLOCK, ZONE));
    let (offset, len) = (2 * ZONE - BLOCK, 2 * BLOCK);
    let error = ZoneError::Boundary {
        zone: ZoneNo(1),
        offset,
        len,
        end: 2 * ZONE,
    };
    assert_eq!(d.write_error(offset, len), error);
    assert_eq!(d.engine.admit_read(offset, len).map(|_| ()), Err(error.into()));
    let read = d.engine.admit_read(0, 2 * ZONE).expect("conventional");
    assert_eq!(read.data_len(), 2 * ZONE, "all of it is data");
    d.engine.end_read(read, &d.log);
}

#[test]
fn a_write_starts_where_the_admitted_ones_end() {
    let mut d = Device::new(|_| ());
    let wp = d.start(Z2);
    let first = d.admit(wp, BLOCK).expect("at the pointer");
    for offset in [wp, wp + 2 * BLOCK] {
        let error = ZoneError::NotAtWritePointer {
            zone: Z2,
            offset,
            wp: wp + BLOCK,
        };
        assert_eq!(d.write_error(offset, BLOCK), error);
    }
    let second = d.admit(wp + BLOCK, BLOCK).expect("the first need not be over");
    assert_eq!(
        (d.written(Z2), d.engine.info(Z2).wp),
        (0, wp),
        "a report shows what is written"
    );
    let prefix = d.done(first);
    d.acknowledge(prefix);
    let prefix = d.done(second);
    d.acknowledge(prefix);
    assert_eq!(d.engine.info(Z2).wp, wp + 2 * BLOCK);
}

#[test]
fn a_write_ends_within_the_capacity() {
    let mut d = Device::new(|_| ());
    d.write(Z2, 5);
    let (offset, len) = (d.start(Z2) + 5 * BLOCK, 2 * BLOCK);
    let error = ZoneError::ExceedsCapacity {
        zone: Z2,
        offset,
        len,
        end: d.start(Z2) + CAPACITY,
    };
    assert_eq!(d.write_error(offset, len), error);
    assert_eq!(d.append_error(d.start(Z2), len), error);
    d.write(Z2, 1);
    assert_eq!(d.condition(Z2), Condition::Full);
    assert_eq!(
        d.write_error(d.start(Z2) + CAPACITY, BLOCK),
        ZoneError::Full { zone: Z2 }
    );
    assert_eq!(d.append_error(d.start(Z2), BLOCK), ZoneError::Full { zone: Z2 });
    assert_eq!(d.engine.info(Z2).wp, d.start(Z2) + CAPACITY);
}

#[test]
fn the_short_last_zone_is_full_at_its_end() {
    let mut d = Device::new(|_| ());
    let last = ZoneNo(9);
    assert_eq!(
        (d.engine.info(last).len, d.engine.info(last).capacity),
        (3 * BLOCK, 3 * BLOCK)
    );
    d.write(last, 3);
    assert_eq!(d.condition(last), Condition::Full);
    assert!(d.operate(last, ExclusiveOp::Reset));
    assert_eq!(d.condition(last), Condition::Empty);
}

#[test]
fn an_append_names_a_sequential_required_zone_by_its_start() {
    let mut d = Device::new(|_| ());
    let offset = d.start(Z2) + BLOCK;
    assert_eq!(d.append_error(offset, BLOCK), ZoneError::NotZoneStart { offset });
    assert_eq!(
        d.append_error(0, BLOCK),
        ZoneError::Conventional { zone: ZoneNo(0) }
    );
    let mut aware = Device::new(|spec| spec.model = Model::HostAware);
    assert_eq!(
        aware.append_error(d.start(Z2), BLOCK),
        ZoneError::NotSequentialRequired { zone: Z2 }
    );
}

#[test]
fn an_append_is_at_most_as_long_as_the_device_says() {
    let mut d = Device::new(|_| ());
    let error = ZoneError::AppendTooLarge {
        len: 5 * BLOCK,
        max: 4 * BLOCK,
    };
    assert_eq!(d.append_error(d.start(Z2), 5 * BLOCK), error);
    let mut none = Device::new(|spec| spec.max_append = 0);
    assert_eq!(
        none.append_error(d.start(Z2), BLOCK),
        ZoneError::AppendUnsupported
    );
}

#[test]
fn appends_get_the_addresses_behind_each_other() {
    let mut d = Device::new(|_| ());
    let permits = [2, 1, 3].map(|blocks| d.append(Z2, blocks));
    let start = d.start(Z2);
    assert_eq!(
        permits.each_ref().map(|p| (p.offset() - start) / BLOCK),
        [0, 2, 3]
    );
    for permit in permits {
        let prefix = d.done(permit);
        d.acknowledge(prefix);
    }
    assert_eq!(d.condition(Z2), Condition::Full);
}

#[test]
fn read_only_and_offline_zones_take_no_writes_and_offline_ones_no_reads() {
    let mut d = Device::new(|_| ());
    d.write(Z2, 2);
    let wp = d.start(Z2) + 2 * BLOCK;
    d.operate(Z2, ExclusiveOp::SetReadOnly);
    assert_eq!(d.write_error(wp, BLOCK), ZoneError::ReadOnly { zone: Z2 });
    let read = d.engine.admit_read(d.start(Z2), BLOCK).expect("readable");
    d.engine.end_read(read, &d.log);
    d.operate(Z2, ExclusiveOp::SetOffline);
    assert_eq!(d.write_error(wp, BLOCK), ZoneError::Offline { zone: Z2 });
    assert_eq!(
        d.append_error(d.start(Z2), BLOCK),
        ZoneError::Offline { zone: Z2 }
    );
    let refused = d.engine.admit_read(d.start(Z2), BLOCK).map(|_| ());
    assert_eq!(refused, Err(ZoneError::Offline { zone: Z2 }.into()));
    d.operate(Z2, ExclusiveOp::SetNormal);
    assert_eq!(
        (d.condition(Z2), d.written(Z2)),
        (Condition::Closed, 2),
        "as it was"
    );
}

#[test]
fn a_read_has_data_below_the_written_end_only() {
    let mut d = Device::new(|_| ());
    d.write(Z2, 2);
    d.operate(Z2, ExclusiveOp::Finish);
    let start = d.start(Z2);
    for (from, len, data) in [(0, 8, 2), (1, 1, 1), (1, 3, 1), (2, 4, 0), (7, 1, 0)] {
        let read = d
            .engine
            .admit_read(start + from * BLOCK, len * BLOCK)
            .expect("readable");
        assert_eq!(read.data_len(), data * BLOCK, "{len} blocks at {from}");
        d.engine.end_read(read, &d.log);
    }
    let read = d
        .engine
        .admit_read(start + 1000, 3)
        .expect("reads need not be whole blocks");
    assert_eq!(read.data_len(), 3);
    d.engine.end_read(read, &d.log);
    let refused = d.engine.admit_read(start + 7 * BLOCK, 2 * BLOCK).map(|_| ());
    assert!(matches!(refused, Err(Refused::Zone(ZoneError::Boundary { .. }))));
}

#[test]
fn a_write_opens_its_zone_and_both_limits_hold() {
    let mut d = Device::new(|spec| (spec.max_open, spec.max_active) = (2, 3));
    d.write(Z2, 1);
    assert_eq!(d.condition(Z2), Condition::ImplicitlyOpen);
    d.write(Z3, 1);
    d.write(Z4, 1);
    assert_eq!(
        d.condition(Z2),
        Condition::Closed,
        "the least recently used one made room"
    );
    assert_eq!(
        d.write_error(d.start(Z5), BLOCK),
        ZoneError::TooManyActive { limit: 3 },
        "none made room"
    );
    assert_eq!(
        (d.condition(Z3), d.condition(Z4)),
        (Condition::ImplicitlyOpen, Condition::ImplicitlyOpen)
    );
    d.write(Z2, 1);
    assert_eq!(d.condition(Z3), Condition::Closed);
}

#[test]
fn the_zone_that_makes_room_is_the_one_written_longest_ago() {
    let mut d = Device::new(|spec| spec.max_open = 3);
    for zone in [Z2, Z3, Z4] {
        d.write(zone, 1);
    }
    d.write(Z2, 1);
    d.write(Z3, 1);
    d.write(Z5, 1);
    assert_eq!(d.condition(Z4), Condition::Closed);
    d.write(Z4, 1);
    assert_eq!(d.condition(Z2), Condition::Closed);
}

#[test]
fn it_is_still_the_right_one_after_many_openings() {
    let mut d = Device::new(|spec| spec.max_open = 3);
    d.write(Z2, 1);
    d.write(Z3, 1);
    for _ in 0..100 {
        d.write(Z4, 1);
        assert!(
            d.operate(Z4, ExclusiveOp::Reset),
            "frees its place without an eviction"
        );
    }
    d.write(Z2, 1);
    d.write(Z4, 1);
    d.write(Z5, 1);
    assert_eq!(d.condition(Z3), Condition::Closed);
    d.write(Z3, 1);
    assert_eq!(d.condition(Z2), Condition::Closed);
    assert_eq!(d.engine.resources().open, 3);
}

#[test]
fn explicitly_open_zones_do_not_make_room() {
    let mut d = Device::new(|spec| spec.max_open = 2);
    d.engine.open(Z2).expect("opened");
    d.write(Z3, 1);
    d.write(Z4, 1);
    assert_eq!(
        (d.condition(Z2), d.condition(Z3)),
        (Condition::ExplicitlyOpen, Condition::Closed)
    );
    d.engine.open(Z4).expect("converted");
    assert_eq!(
        d.write_error(d.start(Z5), BLOCK),
        ZoneError::TooManyOpen { limit: 2 }
    );
    assert_eq!(d.engine.open(Z3), Err(ZoneError::TooManyOpen { limit: 2 }.into()));
    d.write(Z2, 1);
    assert_eq!(d.condition(Z2), Condition::ExplicitlyOpen, "a write leaves it so");
}

#[test]
fn with_both_limits_met_the_active_one_is_named() {
    let mut d = Device::new(|spec| (spec.max_open, spec.max_active) = (1, 1));
    d.engine.open(Z2).expect("opened");
    assert_eq!(
        d.write_error(d.start(Z3), BLOCK),
        ZoneError::TooManyActive { limit: 1 }
    );
    assert_eq!(
        d.engine.open(Z3),
        Err(ZoneError::TooManyActive { limit: 1 }.into())
    );
}

#[test]
fn an_eviction_leaves_the_writes_of_its_victim_alone() {
    let mut d = Device::new(|spec| spec.max_open = 1);
    let first = d.append(Z2, 1);
    d.write(Z3, 1);
    assert_eq!(d.condition(Z2), Condition::Closed);
    let rest = d.append(Z2, 4);
    assert_eq!(
        (d.condition(Z2), d.condition(Z3)),
        (Condition::ImplicitlyOpen, Condition::Closed)
    );
    d.write(Z4, 1);
    for permit in [first, rest] {
        let prefix = d.done(permit);
        d.acknowledge(prefix);
    }
    assert_eq!((d.condition(Z2), d.written(Z2)), (Condition::Closed, 5));
    assert_eq!(d.engine.resources().open, 1);
}

#[test]
fn a_lane_has_as_many_writes_in_flight_as_it_has_slots() {
    let mut d = Device::new(|_| ());
    d.pool = d.engine.slots(2);
    let (a, b) = (d.append(Z2, 1), d.append(Z3, 1));
    assert_eq!(d.admit(d.start(Z4), BLOCK).map(|_| ()), Err(Refused::NoSlot));
    assert_eq!(d.condition(Z4), Condition::Empty, "nothing was opened for it");
    let prefix = d.done(a);
    assert_eq!(
        d.admit(d.start(Z4), BLOCK).map(|_| ()),
        Err(Refused::NoSlot),
        "not acknowledged yet"
    );
    d.acknowledge(prefix);
    d.write(Z4, 1);
    let prefix = d.done(b);
    d.acknowledge(prefix);
    assert_eq!(d.engine.slots(MAX_SLOTS).capacity(), 0);
}

#[test]
fn sequential_preferred_zones_take_writes_anywhere() {
    let mut d = Device::new(|spec| (spec.model, spec.max_open) = (Model::HostAware, 1));
    let start = d.start(Z2);
    let write = |d: &mut Device, from: u64, len: u64, gap: Option<(u64, u64)>| {
        let permit = d.admit(start + from * BLOCK, len * BLOCK).expect("anywhere");
        assert_eq!(
            permit.gap(),
            gap.map(|(from, to)| start + from * BLOCK..start + to * BLOCK)
        );
        let prefix = d.done(permit);
        assert!(
            prefix.advanced(),
            "it may have been another write that moved the pointer over this one"
        );
        d.acknowledge(prefix);
    };
    write(&mut d, 2, 1, Some((0, 2)));
    // Below the pointer, then across it.
    write(&mut d, 0, 2, None);
    write(&mut d, 2, 2, None);
    assert_eq!((d.written(Z2), d.condition(Z2)), (4, Condition::ImplicitlyOpen));
    write(&mut d, 5, 1, Some((4, 5)));
    assert_eq!(d.condition(Z2), Condition::Full);
    // A full zone can be overwritten.
    write(&mut d, 0, 6, None);
    assert_eq!(d.condition(Z2), Condition::Full);
    let error = d.write_error(start + 5 * BLOCK, 2 * BLOCK);
    assert!(matches!(error, ZoneError::ExceedsCapacity { .. }), "{error}");
    let error = d.write_error(start + 5 * BLOCK, 4 * BLOCK);
    assert!(matches!(error, ZoneError::Boundary { .. }), "{error}");
    assert_eq!(
        d.engine.info(Z2).counters.bytes_written,
        (1 + 2 + 2 + 1 + 6) * BLOCK
    );
}

#[test]
fn zones_come_back_as_their_records_say() {
    let mut records = vec![ZoneRecord::default(); 10];
    records[2].written = 2 * BLOCK;
    records[3].written = CAPACITY;
    (records[4].written, records[4].finished) = (BLOCK, true);
    records[5].read_only = true;
    records[6].offline = true;
    records[0].offline = true;
    records[7].counters.resets = 7;
    let d = Device::with(|spec| spec.max_active = 1, |zone| records[zone.0 as usize]);
    let conditions: Vec<_> = d
        .engine
        .geometry()
        .zones()
        .map(|zone| d.condition(zone))
        .collect();
    use Condition::*;
    let expected = [
        Offline,
        NotWritePointer,
        Closed,
        Full,
        Full,
        ReadOnly,
        Offline,
        Empty,
        Empty,
        Empty,
    ];
    assert_eq!(conditions, expected);
    for zone in d.engine.geometry().zones() {
        assert_eq!(d.engine.record(zone), records[zone.0 as usize]);
    }
    assert_eq!(
        (d.engine.info(Z4).wp, d.engine.info(Z4).written_end),
        (5 * ZONE - 2 * BLOCK, 4 * ZONE + BLOCK)
    );
}

#[test]
fn more_closed_zones_than_may_be_active_are_accepted_and_no_more_admitted() {
    let closed = ZoneRecord {
        written: BLOCK,
        ..ZoneRecord::default()
    };
    let initial = |zone: ZoneNo| {
        if (2..5).contains(&zone.0) {
            closed
        } else {
            ZoneRecord::default()
        }
    };
    let mut d = Device::with(|spec| spec.max_active = 2, initial);
    assert_eq!(d.engine.resources().active, 3);
    assert_eq!(
        d.write_error(d.start(Z5), BLOCK),
        ZoneError::TooManyActive { limit: 2 }
    );
    d.write(Z2, 1);
    d.operate(Z2, ExclusiveOp::Reset);
    assert_eq!(
        d.write_error(d.start(Z5), BLOCK),
        ZoneError::TooManyActive { limit: 2 }
    );
    d.operate(Z3, ExclusiveOp::Finish);
    d.write(Z5, 1);
}

#[test]
fn records_that_no_zone_can_have_are_refused() {
    let geometry = Geometry::new(SPEC).expect("valid");
    let open = |zone: u32, record: ZoneRecord| {
        Engine::new(geometry, |at| {
            if at.0 == zone {
                record
            } else {
                ZoneRecord::default()
            }
        })
        .map(|_| ())
        .unwrap_err()
    };
    let written = |written| ZoneRecord {
        written,
        ..ZoneRecord::default()
    };
    let beyond = RecordError::BeyondCapacity {
        zone: Z2,
        written: 7 * BLOCK,
        capacity: CAPACITY,
    };
    assert_eq!(open(2, written(7 * BLOCK)), beyond);
    assert!(matches!(
        open(9, written(4 * BLOCK)),
        RecordError::BeyondCapacity { .. }
    ));
    assert!(matches!(
        open(2, written(u64::MAX)),
        RecordError::BeyondCapacity { .. }
    ));
    assert_eq!(
        open(2, written(700)),
        RecordError::Unaligned {
            zone: Z2,
            written: 700,
            granularity: 512
        }
    );
    assert_eq!(
        open(1, written(BLOCK)),
        RecordError::Conventional { zone: ZoneNo(1) }
    );
    let finished = ZoneRecord {
        finished: true,
        ..ZoneRecord::default()
    };
    assert_eq!(open(0, finished), RecordError::Conventional { zone: ZoneNo(0) });
}

#[test]
fn a_million_zones() {
    let million = 1 << 20;
    let spec = GeometrySpec {
        size: million << 28,
        zone_size: 1 << 28,
        zone_capacity: 1 << 28,
        max_open: 128,
        nr_conventional: 0,
        ..SPEC
    };
    let engine = Engine::new(Geometry::new(spec).expect("valid"), |zone| ZoneRecord {
        finished: zone.0 % 2 == 0,
        ..ZoneRecord::default()
    })
    .expect("valid");
    let mut shown = 0;
    engine.report(0, zbdkit_zone::Filter::Full, &mut |info| {
        assert_eq!(info.zone.0 % 2, 0);
        shown += 1;
        std::ops::ControlFlow::Continue(())
    });
    assert_eq!(shown, million / 2);
    let mut pool = engine.slots(1);
    for zone in (1..million as u32).step_by(2).map(ZoneNo).step_by(64) {
        let permit = engine
            .admit_append(&mut pool, engine.geometry().start(zone), 512)
            .expect("empty");
        let zbdkit_zone::Completion::Prefix(prefix) = engine.complete(permit, Ok(()), &()) else {
            panic!("alone in its zone")
        };
        engine.acknowledge(prefix, Ok(()), &());
    }
    assert_eq!(engine.resources().open, 128);
    let mut dirty = 0;
    engine.take_dirty(&mut |_, record| {
        assert_eq!(record.written, 512);
        dirty += 1;
    });
    assert_eq!(dirty, million / 128);
}
