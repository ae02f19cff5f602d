//! Devices with random write areas and descriptor extensions, and what all backings do with them alike.

use std::path::PathBuf;

use zbdkit_block::{
    CreateOptions, Device, Error, Qcow2CreateOptions, ZnsOptions, ZoneOp, create, create_qcow2,
};
use zbdkit_zone::{CloseEmpty, Condition, Recommendation, ZoneError, ZoneInfo};

use super::{Rig, host, pattern};

pub const ZONE: u64 = 1 << 20;
pub const BLOCK: u64 = 4096;
/// Zone 1, which most of it is about; zone 0 is conventional.
pub const Z1: u64 = ZONE;
pub const Z2: u64 = 2 * ZONE;
pub const AREA: u64 = 16 * BLOCK;

pub fn zones(path: PathBuf) -> CreateOptions {
    CreateOptions {
        zone_size: Some(ZONE),
        zone_capacity: Some(ZONE - 4 * BLOCK),
        conventional_zones: 1,
        max_open: Some(3),
        max_active: 4,
        zns: ZnsOptions {
            zrwa_size: Some(AREA),
            zrwa_granularity: Some(2 * BLOCK),
            max_zrwa: Some(2),
            extension_size: 128,
        },
        ..CreateOptions::new(path, 8 * ZONE)
    }
}

pub fn raw(rig: &Rig) -> Device {
    rig.block_on(create(&host(), &zones(rig.path("disk.raw"))))
        .unwrap();
    rig.open("disk.raw")
}

pub fn qcow2(rig: &Rig, name: &str) -> Device {
    qcow2_with(rig, name, 65536)
}

pub fn qcow2_with(rig: &Rig, name: &str, cluster_size: u64) -> Device {
    let mut options = Qcow2CreateOptions {
        zones: Some(zones(rig.path(name))),
        ..Qcow2CreateOptions::new(rig.path(name), 8 * ZONE)
    };
    options.layout.cluster_size = cluster_size;
    rig.block_on(create_qcow2(&host(), &options)).unwrap();
    rig.open(name)
}

pub fn memory(rig: &Rig) -> Device {
    rig.open_graph(
        "driver=zoned,zone.size=1M,zone.capacity=1008k,zone.conventional_zones=1,zone.max_open_zones=3,\
         zone.max_active_zones=4,zone.zrwa_size=64k,zone.zrwa_granularity=8k,zone.max_zrwa=2,\
         zone.descr_ext_size=128,file.driver=memory,file.size=8M",
    )
    .unwrap()
}

pub fn commit(rig: &Rig, device: &Device, end: u64) -> Result<(), Error> {
    rig.block_on(device.commit_zrwa(&device.lane(1), end))
}

pub fn attach(rig: &Rig, device: &Device, zone: u64, bytes: &[u8]) -> Result<(), Error> {
    rig.block_on(device.set_extension(&device.lane(1), zone, bytes, false))
}

pub fn extension(rig: &Rig, device: &Device, zone: u64) -> Option<Vec<u8>> {
    rig.block_on(device.extension(zone)).unwrap()
}

pub fn zone(rig: &Rig, device: &Device, start: u64) -> ZoneInfo {
    rig.zones(device)[(start / ZONE) as usize]
}

pub fn whole(bytes: &[u8]) -> Vec<u8> {
    let mut whole = bytes.to_vec();
    whole.resize(128, 0);
    whole
}

/// What all backings do alike.
pub fn exercise(rig: &Rig, device: &Device) {
    let (a, b) = (pattern(1, BLOCK as usize), pattern(2, BLOCK as usize));
    rig.op(device, ZoneOp::OpenZrwa, Z1).unwrap();
    let at = |n: u64| Z1 + n * BLOCK;
    rig.write(device, at(9), &a);
    rig.write(device, at(3), &a);
    rig.write(device, at(9), &b);
    assert_eq!(rig.read(device, at(9), BLOCK as usize), b);
    assert_eq!(rig.read(device, at(4), BLOCK as usize), vec![0; BLOCK as usize]);
    let info = zone(rig, device, Z1);
    assert_eq!((info.wp, info.written_end), (Z1, Z1 + AREA));
    assert!(info.attributes.zrwa && info.condition == Condition::ExplicitlyOpen);
    rig.write(device, at(16), &a);
    assert_eq!(zone(rig, device, Z1).wp, at(2));
    commit(rig, device, at(4)).unwrap();
    assert!(matches!(
        rig.try_write(device, at(3), &a),
        Err(Error::Zone(ZoneError::OutsideRandomWriteArea { .. }))
    ));
    assert_eq!(rig.read(device, at(3), BLOCK as usize), a);
    rig.op(device, ZoneOp::Close(CloseEmpty::ToEmpty), Z1).unwrap();
    attach(rig, device, Z2, b"whose zone this is").unwrap();
    let refused = attach(rig, device, Z2, b"another");
    assert!(matches!(
        refused,
        Err(Error::Zone(ZoneError::InvalidTransition { .. }))
    ));
    assert_eq!(extension(rig, device, Z2), Some(whole(b"whose zone this is")));
    assert_eq!(zone(rig, device, Z2).condition, Condition::Closed);
    assert!(attach(rig, device, 3 * ZONE, &[1; 129]).is_err());
    assert_eq!(extension(rig, device, 3 * ZONE), None);
    rig.write(device, 3 * ZONE, &a);
    rig.op(device, ZoneOp::FinishByDevice, 3 * ZONE).unwrap();
    rig.op(device, ZoneOp::Recommend(Some(Recommendation::Finish)), Z2)
        .unwrap();
}

/// What must be there of it after reopening.
pub fn verify(rig: &Rig, device: &Device) {
    let (a, b) = (pattern(1, BLOCK as usize), pattern(2, BLOCK as usize));
    let at = |n: u64| Z1 + n * BLOCK;
    let info = zone(rig, device, Z1);
    assert_eq!((info.wp, info.written_end), (at(4), at(20)));
    assert!(info.attributes.zrwa && info.condition == Condition::Closed);
    for (n, bytes) in [(3, &a), (9, &b), (16, &a)] {
        assert_eq!(rig.read(device, at(n), BLOCK as usize), *bytes, "block {n}");
    }
    for n in [0, 4, 8, 10, 17, 25, 200] {
        assert_eq!(
            rig.read(device, at(n), BLOCK as usize),
            vec![0; BLOCK as usize],
            "block {n}"
        );
    }
    let info = zone(rig, device, Z2);
    assert_eq!(info.condition, Condition::Closed);
    assert_eq!(info.attributes.recommended, Some(Recommendation::Finish));
    assert_eq!(extension(rig, device, Z2), Some(whole(b"whose zone this is")));
    assert!(zone(rig, device, 3 * ZONE).attributes.finished_by_device);
}

/// Goes on with it to the end of both zones.
pub fn finish(rig: &Rig, device: &Device) {
    let capacity_end = Z1 + ZONE - 4 * BLOCK;
    let a = pattern(3, BLOCK as usize);
    let mut end = Z1 + 4 * BLOCK;
    while end < capacity_end {
        end = (end + AREA).min(capacity_end);
        rig.write(device, end - BLOCK, &a);
        commit(rig, device, end).unwrap();
    }
    let info = zone(rig, device, Z1);
    assert_eq!(
        (info.condition, info.written_end),
        (Condition::Full, capacity_end)
    );
    assert!(!info.attributes.zrwa);
    assert_eq!(rig.read(device, end - BLOCK, BLOCK as usize), a);
    assert_eq!(
        rig.read(device, end - 2 * BLOCK, BLOCK as usize),
        vec![0; BLOCK as usize]
    );
    rig.op(device, ZoneOp::Reset, Z2).unwrap();
    assert_eq!(extension(rig, device, Z2), None);
    attach(rig, device, Z2, b"the next").unwrap();
    assert_eq!(extension(rig, device, Z2), Some(whole(b"the next")));
}
