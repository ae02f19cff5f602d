//! Formats: every zone is emptied and held, and then the block size is another.

#![cfg(not(feature = "shuttle"))]

mod support;

use support::{BLOCK, Device, Z2, Z3, Z4, Z5, ZONE};
use zbdkit_zone::{
    Condition, ExclusiveOp, ExclusivePermit, Geometry, GeometryError, Refused, ZoneError, ZoneNo, ZoneRecord,
};

/// Eight zones, as they are in the records.
fn device(initial: impl FnMut(ZoneNo) -> ZoneRecord) -> Device {
    let change = |spec: &mut zbdkit_zone::GeometrySpec| {
        spec.nr_conventional = 0;
        spec.size = 8 * ZONE;
    };
    let mut device = Device::with(change, initial);
    let geometry = *device.engine.geometry();
    let formats = vec![geometry, geometry.with_block_size(1024).unwrap()];
    device.engine = device.engine.with_formats(formats);
    device
}

/// Holds every zone.
fn hold(device: &Device) -> Vec<ExclusivePermit> {
    let zones = device.engine.geometry().zones();
    zones
        .map(|zone| {
            let permit = device.engine.begin(zone, ExclusiveOp::Format).unwrap();
            let permit = permit.expect("an empty zone is held too");
            assert!(device.engine.drained(&permit));
            permit
        })
        .collect()
}

fn format(device: &Device, index: usize) {
    let permits = hold(device);
    device.engine.set_format(index, &permits);
    for permit in permits {
        device.engine.commit(permit, &device.log);
    }
}

#[test]
fn a_format_leaves_empty_and_offline_zones_only() {
    let device = device(|zone| ZoneRecord {
        written: if zone == Z5 { 0 } else { BLOCK },
        finished: zone == Z2,
        read_only: zone == Z3,
        offline: zone == Z4,
        ..ZoneRecord::default()
    });
    device.engine.open(Z5).unwrap();
    format(&device, 0);
    for zone in device.engine.geometry().zones() {
        let offline = zone == Z3 || zone == Z4;
        let record = device.engine.record(zone);
        let expected = ZoneRecord {
            offline,
            counters: record.counters,
            ..ZoneRecord::default()
        };
        assert_eq!(record, expected, "{zone}");
        // What held nothing needs no record.
        assert_eq!(record.counters.resets, u32::from(zone != Z5), "{zone}");
        let condition = if offline {
            Condition::Offline
        } else {
            Condition::Empty
        };
        assert_eq!(device.condition(zone), condition);
    }
    let resources = device.engine.resources();
    assert_eq!((resources.open, resources.active), (0, 0));
}

#[test]
fn after_a_format_the_other_block_size_counts() {
    let mut device = device(|_| ZoneRecord::default());
    let start = device.start(Z2);
    assert_eq!(device.engine.formats().len(), 2);
    device.write(Z2, 1);

    format(&device, 1);
    assert_eq!(device.engine.geometry().block_size(), 1024);
    let unaligned = ZoneError::Unaligned {
        offset: start,
        len: BLOCK,
        granularity: 1024,
    };
    assert_eq!(device.write_error(start, BLOCK), unaligned);
    assert_eq!(device.append_error(start, BLOCK), unaligned);
    let record = ZoneRecord {
        written: BLOCK,
        ..ZoneRecord::default()
    };
    device.engine.check(Z2, &record).expect_err("half a block");

    format(&device, 0);
    device.engine.check(Z2, &record).unwrap();
    device.write(Z2, 1);
}

#[test]
fn nobody_comes_in_while_a_format_holds_the_zones() {
    let mut device = device(|_| ZoneRecord::default());
    let start = device.start(Z2);
    let permits = hold(&device);
    assert_eq!(device.admit(start, 1024).unwrap_err(), Refused::Busy(Z2));
    assert_eq!(device.engine.open(Z3), Err(Refused::Busy(Z3)));
    for permit in permits {
        device.engine.abort(permit, &device.log);
    }
    device.write(Z2, 1);
}

#[test]
#[should_panic(expected = "zones are in use")]
fn the_block_size_does_not_change_under_a_zone_that_is_not_held() {
    let device = device(|_| ZoneRecord::default());
    let permit = device.engine.begin(Z2, ExclusiveOp::Format).unwrap();
    device.engine.set_format(1, permit.as_slice());
}

#[test]
fn a_format_is_refused_where_a_figure_does_not_fit() {
    let geometry = |change: fn(&mut zbdkit_zone::GeometrySpec)| {
        let mut spec = support::SPEC;
        spec.size = 10 * ZONE;
        change(&mut spec);
        Geometry::new(spec).unwrap()
    };
    assert_eq!(geometry(|_| ()).with_block_size(1024).unwrap().max_append(), 2048);
    let append = geometry(|spec| spec.max_append = 3 * BLOCK);
    let unaligned = GeometryError::AppendUnaligned {
        max_append: 1536,
        block_size: 1024,
    };
    assert_eq!(append.with_block_size(1024), Err(unaligned));
    let capacity = geometry(|spec| spec.zone_capacity = 5 * BLOCK);
    assert!(matches!(
        capacity.with_block_size(1024),
        Err(GeometryError::CapacityUnaligned { .. })
    ));
    let conventional = Device::new(|_| ());
    assert_eq!(
        conventional
            .engine
            .begin(ZoneNo(0), ExclusiveOp::Format)
            .map(|_| ()),
        Err(Refused::Zone(ZoneError::Conventional { zone: ZoneNo(0) }))
    );
}
