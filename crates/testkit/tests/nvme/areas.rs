//! Zone random write areas and descriptor extensions through the graph.

use std::pin::pin;

use zbdkit_block::{CrossZone, Lane, RawNode};
use zbdkit_io::yield_now;
use zbdkit_testkit::namespace::{AREAS, EXTENSION, ZRWA_GRANULARITY, ZRWA_SIZE};
use zbdkit_zone::{Attributes, Filter, Zns, Zrwa};

use super::*;

const AREA: u64 = ZRWA_SIZE * BLOCK;

/// The zone that most tests use.
const NUMBER: u64 = 2;
const START: u64 = NUMBER * ZONE;

/// A drive below the graph, and itself, for what others do to it.
struct Below {
    drive: Arc<NvmeDrive>,
    device: Device,
    lane: Lane,
}

async fn below(drive: NvmeDrive) -> Below {
    let drive = Arc::new(drive);
    let device = Device::new(Arc::new(HostDeviceNode::open(drive.clone()).await.unwrap()));
    let lane = device.lane(64);
    Below { drive, device, lane }
}

impl Below {
    async fn write(&self, offset: u64, len: u64, seed: u8) -> Result<(), Error> {
        self.device.write(&self.lane, data(len, seed), offset).await
    }

    async fn append(&self, zone_start: u64) -> Result<u64, Error> {
        self.device.append(&self.lane, data(BLOCK, 1), zone_start).await
    }

    async fn op(&self, op: ZoneOp, number: u64) -> Result<(), Error> {
        self.device.zone_op(&self.lane, op, number * ZONE).await
    }

    async fn commit(&self, end: u64) -> Result<(), Error> {
        self.device.commit_zrwa(&self.lane, end).await
    }

    async fn holds(&self, offset: u64, len: u64, seed: u8) {
        let buf = IoBuf::alloc(len as usize);
        let read = self
            .device
            .read(&self.lane, buf.clone(), offset, CrossZone::Refuse);
        read.await.unwrap();
        assert_eq!(buf.to_vec(), data(len, seed).to_vec(), "at {offset:#x}");
    }

    async fn zone(&self, number: u64) -> ZoneInfo {
        as_nvme_cli_has_it(&self.drive).await;
        self.device.report(number * ZONE, Filter::All, 1).await.unwrap()[0]
    }

    async fn has_area(&self, number: u64) -> bool {
        self.zone(number).await.attributes.zrwa
    }
}

fn broken(result: Result<impl std::fmt::Debug, Error>) -> ZoneError {
    match result {
        Err(Error::Zone(error)) => error,
        other => panic!("{other:?} is not an error of zones"),
    }
}

#[test]
fn the_graph_shows_areas_and_extensions() {
    on_each(|drive| async move {
        let geometry = below(drive).await.device.limits().zoned.unwrap();
        let expected = Zns {
            zrwa: Some(Zrwa {
                size: AREA,
                granularity: ZRWA_GRANULARITY * BLOCK,
                count: AREAS,
                explicit_commit: true,
            }),
            extension_size: EXTENSION as u32,
        };
        assert_eq!(geometry.spec().zns, expected);
    });
}

#[test]
fn an_area_is_written_in_any_order_and_committed() {
    on_each(|drive| async move {
        let it = below(drive).await;
        it.op(ZoneOp::OpenZrwa, NUMBER).await.unwrap();
        // Twice each, and backwards.
        let blocks = (0..ZRWA_SIZE).rev();
        for seed in [3, 5] {
            let writes = blocks
                .clone()
                .map(|n| it.write(START + n * BLOCK, BLOCK, seed + n as u8));
            let results = all(writes.collect()).await;
            assert!(results.iter().all(Result::is_ok), "{results:?}");
        }
        let zone = it.zone(NUMBER).await;
        assert_eq!((zone.condition, zone.wp), (Condition::ExplicitlyOpen, START));
        assert!(zone.attributes.zrwa);
        for n in 0..ZRWA_SIZE {
            it.holds(START + n * BLOCK, BLOCK, 5 + n as u8).await;
        }
        it.commit(START + 2 * ZRWA_GRANULARITY * BLOCK).await.unwrap();
        let wp = START + 2 * ZRWA_GRANULARITY * BLOCK;
        assert_eq!(it.zone(NUMBER).await.wp, wp);
        let zone = ZoneNo(NUMBER as u32);
        for offset in [START + BLOCK, wp + 2 * AREA] {
            let expected = ZoneError::OutsideRandomWriteArea {
                zone,
                offset,
                len: BLOCK,
                start: wp,
                end: wp + 2 * AREA,
            };
            assert_eq!(broken(it.write(offset, BLOCK, 1).await), expected);
        }
        assert_eq!(
            broken(it.append(START).await),
            ZoneError::RandomWriteArea { zone }
        );
        // One that ends behind the area moves the pointer.
        it.write(wp + AREA, ZRWA_GRANULARITY * BLOCK, 9).await.unwrap();
        assert_eq!(it.zone(NUMBER).await.wp, wp + ZRWA_GRANULARITY * BLOCK);
        it.write(wp + ZRWA_GRANULARITY * BLOCK, BLOCK, 10).await.unwrap();
        it.device.flush(&it.lane).await.unwrap();
    });
}

#[test]
fn a_commit_lies_in_the_area_on_its_granularity() {
    on_each(|drive| async move {
        let it = below(drive).await;
        let zone = ZoneNo(NUMBER as u32);
        let none = ZoneError::NotRandomWritable { zone };
        assert_eq!(broken(it.commit(START + 4 * BLOCK).await), none);
        it.op(ZoneOp::OpenZrwa, NUMBER).await.unwrap();
        it.write(START, 8 * BLOCK, 1).await.unwrap();
        it.commit(START + 4 * BLOCK).await.unwrap();
        let unaligned = broken(it.commit(START + 5 * BLOCK).await);
        assert!(matches!(unaligned, ZoneError::Unaligned { .. }), "{unaligned}");
        let wp = START + 4 * BLOCK;
        for offset in [START + 4 * BLOCK, wp + AREA + ZRWA_GRANULARITY * BLOCK] {
            let outside = ZoneError::OutsideRandomWriteArea {
                zone,
                offset,
                len: 0,
                start: wp,
                end: wp + AREA,
            };
            assert_eq!(broken(it.commit(offset).await), outside);
        }
        assert!(it.commit(0).await.is_err() && it.commit(ZONES * ZONE + BLOCK).await.is_err());
        assert_eq!(it.zone(NUMBER).await.wp, wp);
        it.commit(wp + AREA).await.unwrap();
        assert_eq!(it.zone(NUMBER).await.wp, wp + AREA);
    });
}

#[test]
fn a_zone_loses_its_area_to_a_reset_a_finish_and_when_it_is_full() {
    on_each(|drive| async move {
        let it = below(drive).await;
        let no_area = |result| {
            assert_eq!(broken(result), ZoneError::NoRandomWriteArea { zone: ZoneNo(7) });
        };
        for number in 0..u64::from(AREAS) {
            it.op(ZoneOp::OpenZrwa, number).await.unwrap();
        }
        no_area(it.op(ZoneOp::OpenZrwa, 7).await);
        it.write(3 * BLOCK, BLOCK, 1).await.unwrap();
        it.op(ZoneOp::Finish, 0).await.unwrap();
        assert_eq!(it.zone(0).await.condition, Condition::Full);
        assert!(!it.has_area(0).await);
        it.op(ZoneOp::OpenZrwa, 3).await.unwrap();
        no_area(it.op(ZoneOp::OpenZrwa, 7).await);
        it.write(3 * ZONE + 3 * BLOCK, BLOCK, 1).await.unwrap();
        it.op(ZoneOp::Reset, 3).await.unwrap();
        assert!(!it.has_area(3).await);
        in_order(&it, 3).await;
        it.op(ZoneOp::OpenZrwa, 4).await.unwrap();
        for at in (0..ROOM).step_by(AREA as usize) {
            assert!(it.has_area(4).await);
            it.write(4 * ZONE + at, AREA, 6).await.unwrap();
            it.commit(4 * ZONE + at + AREA).await.unwrap();
        }
        assert_eq!(it.zone(4).await.condition, Condition::Full);
        assert!(!it.has_area(4).await);
        let full = ZoneError::Full { zone: ZoneNo(4) };
        assert_eq!(broken(it.write(4 * ZONE, BLOCK, 1).await), full);
        it.op(ZoneOp::Reset, 4).await.unwrap();
        in_order(&it, 4).await;
        it.op(ZoneOp::OpenZrwa, 7).await.unwrap();
        it.write(7 * ZONE + BLOCK, BLOCK, 1).await.unwrap();
    });
}

/// An empty zone without an area takes writes in their order, however many are under way.
async fn in_order(it: &Below, number: u64) {
    let writes = (0..32).map(|n| it.write(number * ZONE + n * BLOCK, BLOCK, n as u8));
    let results = all(writes.collect()).await;
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    let offset = number * ZONE + 40 * BLOCK;
    let error = broken(it.write(offset, BLOCK, 1).await);
    assert!(matches!(error, ZoneError::NotAtWritePointer { .. }), "{error}");
    assert_eq!(it.zone(number).await.wp, number * ZONE + 32 * BLOCK);
    assert_eq!(
        it.append(number * ZONE).await.unwrap(),
        number * ZONE + 32 * BLOCK
    );
}

#[test]
fn an_area_that_was_there_before_is_found() {
    on_each(|drive| async move {
        op(&drive, ZoneOp::OpenZrwa, NUMBER).await.unwrap();
        let it = below(drive).await;
        it.write(START + 5 * BLOCK, BLOCK, 1).await.unwrap();
        it.write(START, BLOCK, 1).await.unwrap();
        // And one that comes later, from somebody else.
        it.drive
            .zone_op(ZoneOp::OpenZrwa, START + ZONE, ZONE)
            .await
            .unwrap();
        it.write(START + ZONE + 5 * BLOCK, BLOCK, 1).await.unwrap();
        it.write(START + ZONE, BLOCK, 1).await.unwrap();
    });
}

#[test]
fn in_an_area_writes_are_under_way_together_and_elsewhere_one() {
    on_simulated(|drive, namespace| async move {
        let it = below(drive).await;
        it.op(ZoneOp::OpenZrwa, NUMBER).await.unwrap();
        for (number, under_way) in [(NUMBER, 8), (0, 1)] {
            namespace.hold(true);
            let mut writes = pin!(all((0..8)
                .map(|n| it.write(number * ZONE + n * BLOCK, BLOCK, 1))
                .collect()));
            assert!(begun(&mut writes).await.is_none());
            assert_eq!(namespace.under_way(), under_way, "zone {number}");
            namespace.hold(false);
            assert!(writes.await.iter().all(Result::is_ok));
        }
    });
}

#[test]
fn a_commit_and_a_reset_come_after_the_writes_before_them() {
    on_simulated(|drive, namespace| async move {
        let it = below(drive).await;
        it.op(ZoneOp::OpenZrwa, NUMBER).await.unwrap();
        namespace.hold(true);
        let mut write = pin!(it.write(START, 4 * BLOCK, 1));
        assert!(begun(&mut write).await.is_none());
        let mut commit = pin!(it.commit(START + 4 * BLOCK));
        assert!(begun(&mut commit).await.is_none());
        let mut reset = pin!(it.op(ZoneOp::Reset, NUMBER));
        assert!(begun(&mut reset).await.is_none());
        let zone = it.zone(NUMBER).await;
        assert_eq!(
            (zone.wp, zone.attributes.zrwa),
            (START, true),
            "neither has begun"
        );
        namespace.hold(false);
        write.await.unwrap();
        commit.await.unwrap();
        reset.await.unwrap();
        let zone = it.zone(NUMBER).await;
        assert_eq!((zone.condition, zone.attributes.zrwa), (Condition::Empty, false));
        one_at_a_time(&it, &namespace).await;
        // A finished zone has lost its area as well.
        it.op(ZoneOp::Reset, NUMBER).await.unwrap();
        it.op(ZoneOp::OpenZrwa, NUMBER).await.unwrap();
        it.op(ZoneOp::Finish, NUMBER).await.unwrap();
        let full = it.write(START + BLOCK, BLOCK, 1).await;
        assert_eq!(
            broken(full),
            ZoneError::Full {
                zone: ZoneNo(NUMBER as u32)
            }
        );
        assert_eq!(namespace.refused(), 0, "the drive did not need to say so");
    });
}

#[test]
fn a_failed_write_in_an_area_makes_the_zone_be_reported() {
    on_simulated(|drive, namespace| async move {
        let it = below(drive).await;
        it.op(ZoneOp::OpenZrwa, NUMBER).await.unwrap();
        it.write(START + BLOCK, BLOCK, 1).await.unwrap();
        // Somebody else takes the area away.
        it.drive.zone_op(ZoneOp::Reset, START, ZONE).await.unwrap();
        let lost = broken(it.write(START + BLOCK, BLOCK, 1).await);
        assert!(matches!(lost, ZoneError::NotAtWritePointer { .. }), "{lost}");
        one_at_a_time(&it, &namespace).await;
    });
}

/// The zone, which is empty, is written in order.
async fn one_at_a_time(it: &Below, namespace: &Simulated) {
    namespace.hold(true);
    let writes = (0..8).map(|n| it.write(START + n * BLOCK, BLOCK, n as u8));
    let mut writes = pin!(all(writes.collect()));
    assert!(begun(&mut writes).await.is_none());
    assert_eq!(namespace.under_way(), 1);
    namespace.hold(false);
    assert!(writes.await.iter().all(Result::is_ok));
}

/// Lets a future, and what it set going, come as far as it gets.
async fn begun<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    for _ in 0..50 {
        let polled = poll_fn(|cx| Poll::Ready(Pin::new(&mut *future).poll(cx))).await;
        if let Poll::Ready(output) = polled {
            return Some(output);
        }
        yield_now().await;
    }
    None
}

#[test]
fn an_extension_goes_through_the_graph_and_a_window() {
    on_each(|drive| async move {
        let node = Arc::new(HostDeviceNode::open(Arc::new(drive)).await.unwrap());
        let whole = Device::new(node.clone());
        let window = Device::new(Arc::new(RawNode::new(node, START, Some(3 * ZONE)).unwrap()));
        let lane = window.lane(1);
        assert_eq!(
            window.limits().zoned.unwrap().extension_size() as usize,
            EXTENSION
        );
        window.set_extension(&lane, ZONE, b"mine", false).await.unwrap();
        let mut expected = b"mine".to_vec();
        expected.resize(EXTENSION, 0);
        assert_eq!(window.extension(ZONE).await.unwrap(), Some(expected.clone()));
        assert_eq!(whole.extension(START + ZONE).await.unwrap(), Some(expected));
        assert_eq!(window.extension(0).await.unwrap(), None);
        let zone = whole.report(START + ZONE, Filter::All, 1).await.unwrap()[0];
        let attributes = Attributes {
            extension: true,
            ..Attributes::default()
        };
        assert_eq!((zone.condition, zone.attributes), (Condition::Closed, attributes));
        let refused = broken(window.set_extension(&lane, ZONE, b"again", false).await);
        let expected = ZoneError::InvalidTransition {
            zone: ZoneNo(1),
            condition: Condition::Closed,
        };
        assert_eq!(refused, expected, "in the window's numbers");
        assert!(matches!(
            window.extension(3 * ZONE).await,
            Err(Error::Zone(_) | Error::OutOfRange { .. })
        ));
        assert!(window.set_extension(&lane, BLOCK, b"x", false).await.is_err());
        window.zone_op(&lane, ZoneOp::OpenZrwa, 2 * ZONE).await.unwrap();
        window.write(&lane, data(4 * BLOCK, 1), 2 * ZONE).await.unwrap();
        window.commit_zrwa(&lane, 2 * ZONE + 4 * BLOCK).await.unwrap();
        assert_eq!(
            whole.report(START + 2 * ZONE, Filter::All, 1).await.unwrap()[0].wp,
            START + 2 * ZONE + 4 * BLOCK
        );
        for end in [0, 3 * ZONE + BLOCK] {
            let refused = window.commit_zrwa(&lane, end).await;
            assert!(matches!(refused, Err(Error::OutOfRange { .. })), "{refused:?}");
        }
    });
}

#[test]
fn a_read_only_zone_is_taken_offline() {
    on_simulated(|drive, namespace| async move {
        let it = below(drive).await;
        namespace.break_zone(NUMBER as usize, ZoneState::READ_ONLY);
        it.op(ZoneOp::SetOffline, NUMBER).await.unwrap();
        assert_eq!(it.zone(NUMBER).await.condition, Condition::Offline);
    });
}
