//! Random write areas, descriptor extensions and attributes.

#![cfg(not(feature = "shuttle"))]

mod support;

use support::*;
use zbdkit_zone::Condition::{Closed, Empty, ExplicitlyOpen, Full, ImplicitlyOpen, ReadOnly};
use zbdkit_zone::{
    CloseEmpty, Engine, ExclusiveOp, Geometry, GeometrySpec, Recommendation, RecordError, Refused, Zns,
    ZoneError, ZoneNo, ZoneRecord, Zrwa,
};

/// Areas of two blocks that move block by block, in zones of six.
fn zns(spec: &mut GeometrySpec) {
    spec.zns = Zns {
        zrwa: Some(Zrwa {
            size: 2 * BLOCK,
            granularity: BLOCK,
            count: 2,
            explicit_commit: true,
        }),
        extension_size: 64,
    };
}

/// Areas of four blocks that move two at a time.
fn coarse(spec: &mut GeometrySpec) {
    zns(spec);
    spec.zns.zrwa = Some(Zrwa {
        size: 4 * BLOCK,
        granularity: 2 * BLOCK,
        count: 0,
        explicit_commit: true,
    });
}

/// A descriptor extension, and one that comes with an area.
const EXTENSION: ExclusiveOp = ExclusiveOp::SetExtension {
    checksum: 7,
    zrwa: false,
};
const BOTH: ExclusiveOp = ExclusiveOp::SetExtension {
    checksum: 7,
    zrwa: true,
};

impl Device {
    /// A whole write of some blocks, so many above the zone's start.
    fn put(&mut self, zone: ZoneNo, at: u64, blocks: u64) {
        let permit = self.admit_at(zone, at, blocks);
        let prefix = self.done(permit);
        self.acknowledge(prefix);
    }

    fn admit_at(&mut self, zone: ZoneNo, at: u64, blocks: u64) -> zbdkit_zone::WritePermit {
        let offset = self.start(zone) + at * BLOCK;
        self.admit(offset, blocks * BLOCK).expect("admitted")
    }

    fn refused_at(&mut self, zone: ZoneNo, at: u64, blocks: u64) -> ZoneError {
        let offset = self.start(zone) + at * BLOCK;
        self.write_error(offset, blocks * BLOCK)
    }

    fn commit(&self, zone: ZoneNo, to: u64) -> Result<(), Refused> {
        let prefix = self
            .engine
            .commit_zrwa(self.start(zone) + to * BLOCK, &self.log)?;
        self.acknowledge(prefix);
        Ok(())
    }

    /// Pointer and end of the data, in blocks from the zone's start.
    fn positions(&self, zone: ZoneNo) -> (u64, u64) {
        let info = self.engine.info(zone);
        (
            (info.wp - info.start) / BLOCK,
            (info.written_end - info.start) / BLOCK,
        )
    }

    fn begin_error(&self, zone: ZoneNo, op: ExclusiveOp) -> ZoneError {
        match self.engine.begin(zone, op).map(|_| ()).expect_err("refused") {
            Refused::Zone(error) => error,
            other => panic!("{other}"),
        }
    }

    /// How many bytes of a read of the whole zone are data.
    fn readable(&self, zone: ZoneNo) -> u64 {
        let permit = self.engine.admit_read(self.start(zone), ZONE).expect("admitted");
        let len = permit.data_len();
        self.engine.end_read(permit, &self.log);
        len / BLOCK
    }
}

#[test]
fn blocks_in_the_area_are_written_in_any_order_and_again() {
    let mut d = Device::new(zns);
    assert!(d.operate(Z2, ExclusiveOp::OpenZrwa));
    assert_eq!(d.condition(Z2), ExplicitlyOpen);
    for at in [1, 0, 1, 0] {
        d.put(Z2, at, 1);
    }
    assert_eq!(
        (d.positions(Z2), d.readable(Z2)),
        ((0, 2), 2),
        "the pointer stays"
    );
    assert_eq!(d.engine.record(Z2).counters.bytes_written, 4 * BLOCK);
}

#[test]
fn a_write_behind_the_area_moves_the_pointer_as_little_as_it_must() {
    let mut d = Device::new(zns);
    d.operate(Z2, ExclusiveOp::OpenZrwa);
    d.put(Z2, 2, 1);
    assert_eq!(d.positions(Z2), (1, 3));
    assert_eq!(d.log.take().first(), Some(&Event::Changed(Z2)));
    d.put(Z2, 2, 2);
    assert_eq!(d.positions(Z2), (2, 4));
    let start = d.start(Z2);
    let below = d.refused_at(Z2, 1, 1);
    assert_eq!(
        below,
        ZoneError::OutsideRandomWriteArea {
            zone: Z2,
            offset: start + BLOCK,
            len: BLOCK,
            start: start + 2 * BLOCK,
            end: start + 6 * BLOCK
        }
    );
    let mut d = Device::new(coarse);
    d.operate(Z2, ExclusiveOp::OpenZrwa);
    d.put(Z2, 4, 1);
    assert_eq!(d.positions(Z2), (2, 6), "by whole granules, up to the capacity");
}

#[test]
fn no_write_goes_beyond_the_region_behind_the_area_or_the_capacity() {
    let mut d = Device::new(zns);
    d.operate(Z2, ExclusiveOp::OpenZrwa);
    assert!(matches!(
        d.refused_at(Z2, 4, 1),
        ZoneError::OutsideRandomWriteArea { .. }
    ));
    d.put(Z2, 3, 1);
    d.put(Z2, 5, 1);
    assert_eq!(d.positions(Z2), (4, 6));
    assert!(matches!(
        d.refused_at(Z2, 5, 2),
        ZoneError::ExceedsCapacity { .. }
    ));
    assert_eq!(
        d.condition(Z2),
        ExplicitlyOpen,
        "only a commit or a finish makes it full"
    );
}

#[test]
fn the_pointer_moves_for_admission_at_once_and_for_reports_when_it_is_written() {
    let mut d = Device::new(zns);
    d.operate(Z2, ExclusiveOp::OpenZrwa);
    let first = d.admit_at(Z2, 3, 1);
    assert_eq!(d.positions(Z2), (0, 2));
    assert!(matches!(
        d.refused_at(Z2, 1, 1),
        ZoneError::OutsideRandomWriteArea { .. }
    ));
    // Written later and over earlier, it brings the pointer along that it was admitted behind.
    let second = d.admit_at(Z2, 2, 1);
    let second = d.done(second);
    assert_eq!(d.positions(Z2), (2, 4));
    assert!(second.advanced() && second.written() == 2 * BLOCK);
    d.acknowledge(second);
    let first = d.done(first);
    d.acknowledge(first);
    assert_eq!(d.positions(Z2), (2, 4));
}

#[test]
fn a_failed_write_fails_alone_and_its_pointer_is_taken_back() {
    let mut d = Device::new(zns);
    d.operate(Z2, ExclusiveOp::OpenZrwa);
    let far = d.admit_at(Z2, 3, 1);
    let near = d.admit_at(Z2, 2, 1);
    assert_eq!(d.fails(far, EIO), EIO);
    assert!(matches!(
        d.refused_at(Z2, 1, 1),
        ZoneError::OutsideRandomWriteArea { .. }
    ));
    assert_eq!(d.fails(near, ENOSPC), ENOSPC);
    d.put(Z2, 0, 1);
    assert_eq!((d.positions(Z2), d.condition(Z2)), ((0, 2), ExplicitlyOpen));
}

#[test]
fn a_commit_moves_the_pointer_and_at_the_capacity_fills_the_zone() {
    let d = Device::new(zns);
    assert!(matches!(
        d.commit(Z2, 1),
        Err(Refused::Zone(ZoneError::NotRandomWritable { zone: Z2 }))
    ));
    d.operate(Z2, ExclusiveOp::OpenZrwa);
    for outside in [0, 3] {
        assert!(matches!(
            d.commit(Z2, outside),
            Err(Refused::Zone(
                ZoneError::OutsideRandomWriteArea { .. } | ZoneError::Conventional { .. }
            ))
        ));
    }
    d.log.take();
    d.commit(Z2, 2).expect("in the area");
    assert_eq!(d.positions(Z2), (2, 4));
    assert!(d.log.take().contains(&Event::Published(Z2, 2 * BLOCK)));
    assert!(d.commit(Z2, 2).is_err(), "it is committed already");
    d.engine.close(Z2, CloseEmpty::ToEmpty).expect("open");
    d.commit(Z2, 4).expect("opens the zone");
    assert_eq!(d.condition(Z2), ImplicitlyOpen);
    d.commit(Z2, 6).expect("to the end");
    assert_eq!((d.condition(Z2), d.positions(Z2)), (Full, (6, 6)));
    assert!(!d.engine.info(Z2).attributes.zrwa);
}

#[test]
fn commits_are_whole_granules_but_at_the_capacity() {
    let mut d = Device::new(|spec| {
        coarse(spec);
        spec.zone_capacity = 5 * BLOCK;
    });
    d.operate(Z2, ExclusiveOp::OpenZrwa);
    assert!(matches!(
        d.commit(Z2, 1),
        Err(Refused::Zone(ZoneError::Unaligned { .. }))
    ));
    d.commit(Z2, 2).expect("whole granules");
    d.commit(Z2, 5).expect("the capacity");
    assert_eq!(d.condition(Z2), Full);
    assert!(matches!(d.refused_at(Z2, 5, 1), ZoneError::Full { .. }));
}

#[test]
fn appends_go_to_no_area() {
    let mut d = Device::new(zns);
    d.operate(Z2, ExclusiveOp::OpenZrwa);
    let start = d.start(Z2);
    assert_eq!(
        d.append_error(start, BLOCK),
        ZoneError::RandomWriteArea { zone: Z2 }
    );
}

#[test]
fn an_area_needs_a_pointer_at_a_granule_in_a_zone_that_is_not_full() {
    let mut d = Device::new(coarse);
    d.write(Z2, 1);
    let permit = d.engine.begin(Z2, ExclusiveOp::OpenZrwa).unwrap().unwrap();
    assert!(matches!(
        d.engine.confirm(&permit),
        Err(ZoneError::Unaligned { .. })
    ));
    d.engine.abort(permit, &d.log);
    assert_eq!(d.condition(Z2), ImplicitlyOpen, "as it was");
    d.write(Z2, 1);
    assert!(d.operate(Z2, ExclusiveOp::OpenZrwa));
    assert_eq!(d.positions(Z2), (2, 6));
    d.write(Z3, 6);
    assert!(matches!(
        d.begin_error(Z3, ExclusiveOp::OpenZrwa),
        ZoneError::InvalidTransition { condition: Full, .. }
    ));
    // Writes in flight fill the zone before the operation has it.
    let last = d.append(Z4, 4);
    let permit = d.engine.begin(Z4, ExclusiveOp::OpenZrwa).unwrap().unwrap();
    let prefix = d.done(last);
    d.acknowledge(prefix);
    assert_eq!(d.engine.confirm(&permit), Ok(()));
    d.engine.abort(permit, &d.log);
    let last = d.append(Z4, 2);
    let permit = d.engine.begin(Z4, ExclusiveOp::OpenZrwa).unwrap().unwrap();
    let prefix = d.done(last);
    d.acknowledge(prefix);
    assert!(matches!(
        d.engine.confirm(&permit),
        Err(ZoneError::InvalidTransition { condition: Full, .. })
    ));
    d.engine.abort(permit, &d.log);
    assert_eq!(d.condition(Z4), Full);
}

#[test]
fn areas_are_counted_until_their_zone_is_full_finished_or_reset() {
    let d = Device::new(zns);
    d.operate(Z2, ExclusiveOp::OpenZrwa);
    d.operate(Z3, ExclusiveOp::OpenZrwa);
    assert!(!d.operate(Z3, ExclusiveOp::OpenZrwa), "it has one");
    let none = ZoneError::NoRandomWriteArea { zone: Z4 };
    assert_eq!(d.begin_error(Z4, ExclusiveOp::OpenZrwa), none);
    assert_eq!(d.condition(Z4), Empty, "nothing was taken");
    d.engine.close(Z2, CloseEmpty::ToEmpty).expect("open");
    assert_eq!(d.condition(Z2), Closed, "a zone with an area is not empty");
    d.operate(Z2, ExclusiveOp::SetReadOnly);
    assert_eq!((d.condition(Z2), d.readable(Z2)), (ReadOnly, 2));
    assert_eq!(d.begin_error(Z4, ExclusiveOp::OpenZrwa), none);
    d.operate(Z2, ExclusiveOp::SetNormal);
    d.operate(Z2, ExclusiveOp::Reset);
    let reserved = d.engine.begin(Z4, ExclusiveOp::OpenZrwa).unwrap().unwrap();
    let five = ZoneError::NoRandomWriteArea { zone: Z5 };
    assert_eq!(d.begin_error(Z5, ExclusiveOp::OpenZrwa), five, "one is reserved");
    d.engine.abort(reserved, &d.log);
    assert_eq!(d.condition(Z4), Empty);
    d.operate(Z4, ExclusiveOp::OpenZrwa);
    d.operate(Z3, ExclusiveOp::FinishUnlimited);
    d.operate(Z5, ExclusiveOp::OpenZrwa);
    for end in [2, 4, 6] {
        d.commit(Z5, end).expect("in the area");
    }
    assert!(d.operate(Z2, ExclusiveOp::OpenZrwa));
}

#[test]
fn an_area_takes_open_and_active_resources() {
    let mut d = Device::new(|spec| {
        zns(spec);
        (spec.max_open, spec.max_active) = (1, 2);
    });
    d.write(Z3, 1);
    d.operate(Z2, ExclusiveOp::OpenZrwa);
    assert_eq!((d.condition(Z2), d.condition(Z3)), (ExplicitlyOpen, Closed));
    assert_eq!(
        d.begin_error(Z3, ExclusiveOp::OpenZrwa),
        ZoneError::TooManyOpen { limit: 1 }
    );
    assert_eq!(
        d.begin_error(Z4, ExclusiveOp::OpenZrwa),
        ZoneError::TooManyActive { limit: 2 }
    );
    assert_eq!(
        d.begin_error(Z4, EXTENSION),
        ZoneError::TooManyActive { limit: 2 }
    );
}

#[test]
fn a_finish_keeps_what_was_in_the_area() {
    let mut d = Device::new(zns);
    d.operate(Z2, ExclusiveOp::OpenZrwa);
    d.put(Z2, 2, 1);
    d.operate(Z2, ExclusiveOp::Finish);
    let record = d.engine.record(Z2);
    assert!(record.finished && !record.zrwa && record.written == 3 * BLOCK);
    assert_eq!((d.positions(Z2), d.readable(Z2)), ((6, 3), 3));
}

#[test]
fn an_extension_closes_an_empty_zone_until_it_is_reset() {
    let mut d = Device::new(zns);
    let set = EXTENSION;
    assert!(d.operate(Z2, set));
    assert_eq!(
        (d.condition(Z2), d.engine.record(Z2).extension),
        (Closed, Some(7))
    );
    assert!(d.engine.info(Z2).attributes.extension);
    assert!(matches!(
        d.begin_error(Z2, set),
        ZoneError::InvalidTransition {
            condition: Closed,
            ..
        }
    ));
    // A first write that fails does not make it empty, nor does closing it.
    let permit = d.append(Z2, 1);
    d.fails(permit, EIO);
    d.engine.open(Z2).expect("closed");
    d.engine.close(Z2, CloseEmpty::ToEmpty).expect("open");
    assert_eq!(d.condition(Z2), Closed);
    d.operate(Z2, ExclusiveOp::FinishUnlimited);
    assert!(d.engine.info(Z2).attributes.extension);
    d.operate(Z2, ExclusiveOp::Reset);
    assert_eq!((d.condition(Z2), d.engine.record(Z2).extension), (Empty, None));
    let permit = d.engine.begin(Z2, set).unwrap().unwrap();
    d.engine.abort(permit, &d.log);
    assert_eq!(d.condition(Z2), Empty);
    assert_eq!(d.engine.resources().active, 0);
}

#[test]
fn an_extension_comes_with_an_area_or_not_at_all() {
    let mut d = Device::new(|spec| {
        zns(spec);
        spec.max_active = 4;
    });
    assert!(d.operate(Z2, BOTH));
    let record = d.engine.record(Z2);
    assert_eq!((record.extension, record.zrwa), (Some(7), true));
    assert_eq!((d.condition(Z2), d.positions(Z2)), (Closed, (0, 2)));
    let reserved = d.engine.begin(Z3, BOTH).unwrap().unwrap();
    let none = ZoneError::NoRandomWriteArea { zone: Z4 };
    assert_eq!(d.begin_error(Z4, BOTH), none);
    assert_eq!(
        (d.condition(Z4), d.engine.resources().active),
        (Empty, 2),
        "nothing was taken"
    );
    d.engine.abort(reserved, &d.log);
    assert_eq!((d.condition(Z3), d.engine.record(Z3).extension), (Empty, None));
    assert!(d.operate(Z4, BOTH), "the area was given back, and once");
    assert_eq!(d.begin_error(Z3, BOTH), ZoneError::NoRandomWriteArea { zone: Z3 });
    d.put(Z2, 1, 1);
    d.operate(Z2, ExclusiveOp::Reset);
    d.write(Z2, 1);
    assert!(matches!(
        d.begin_error(Z2, BOTH),
        ZoneError::InvalidTransition { .. }
    ));
    let mut d = Device::new(|spec| {
        zns(spec);
        spec.zns.zrwa = spec.zns.zrwa.map(|area| Zrwa { count: 1, ..area });
        spec.max_active = 1;
    });
    d.write(Z3, 1);
    assert_eq!(d.begin_error(Z2, BOTH), ZoneError::TooManyActive { limit: 1 });
    d.operate(Z3, ExclusiveOp::Reset);
    assert!(d.operate(Z2, BOTH), "the area was not taken in vain");
    let d = Device::new(|spec| spec.zns.extension_size = 64);
    assert_eq!(d.begin_error(Z2, BOTH), ZoneError::NoRandomWriteArea { zone: Z2 });
}

#[test]
fn attributes_last_until_the_reset_and_a_recommendation_until_it_is_followed() {
    let mut d = Device::new(zns);
    let finish = ExclusiveOp::Recommend(Some(Recommendation::Finish));
    let reset = ExclusiveOp::Recommend(Some(Recommendation::Reset));
    assert!(matches!(
        d.begin_error(Z2, finish),
        ZoneError::InvalidTransition { condition: Empty, .. }
    ));
    d.write(Z2, 1);
    assert!(d.operate(Z2, finish));
    assert!(!d.operate(Z2, finish), "nothing to do");
    assert_eq!(d.condition(Z2), ImplicitlyOpen, "it stays open");
    d.write(Z2, 5);
    assert_eq!(d.engine.info(Z2).attributes.recommended, None, "it is full");
    d.operate(Z2, reset);
    assert_eq!(
        d.engine.info(Z2).attributes.recommended,
        Some(Recommendation::Reset)
    );
    d.write(Z3, 1);
    assert!(d.operate(Z3, ExclusiveOp::FinishByDevice));
    assert_eq!(d.condition(Z3), Full);
    assert!(d.engine.info(Z3).attributes.finished_by_device);
    for zone in [Z2, Z3] {
        d.operate(zone, ExclusiveOp::Reset);
        assert_eq!(d.engine.info(zone).attributes, Default::default());
    }
}

#[test]
fn zones_come_back_with_their_areas_and_no_record_claims_an_impossible_one() {
    let record = ZoneRecord {
        zrwa: true,
        ..ZoneRecord::default()
    };
    let mut d = Device::with(zns, |zone| match zone {
        Z2 | Z3 => record,
        _ => ZoneRecord::default(),
    });
    assert_eq!((d.condition(Z2), d.positions(Z2)), (Closed, (0, 2)));
    assert_eq!(
        d.begin_error(Z4, ExclusiveOp::OpenZrwa),
        ZoneError::NoRandomWriteArea { zone: Z4 }
    );
    d.put(Z2, 1, 1);
    let mut spec = SPEC;
    zns(&mut spec);
    let with = |spec, record: ZoneRecord| {
        let geometry = Geometry::new(spec).expect("valid");
        Engine::new(
            geometry,
            |zone| if zone == Z2 { record } else { ZoneRecord::default() },
        )
        .err()
    };
    let impossible = Some(RecordError::RandomWriteArea { zone: Z2 });
    assert_eq!(with(SPEC, record), impossible);
    for record in [
        ZoneRecord {
            finished: true,
            ..record
        },
        ZoneRecord {
            written: CAPACITY,
            ..record
        },
    ] {
        assert_eq!(with(spec, record), impossible);
    }
    let extension = ZoneRecord {
        extension: Some(0),
        ..ZoneRecord::default()
    };
    assert_eq!(with(SPEC, extension), Some(RecordError::Extension { zone: Z2 }));
    assert_eq!(with(spec, extension), None);
}
