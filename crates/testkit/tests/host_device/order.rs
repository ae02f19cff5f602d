//! Writes arrive in order, from however many threads, and zones do not wait for each other.

use std::sync::atomic::{AtomicBool, Ordering};

use zbdkit_block::{Request, ZoneOp};
use zbdkit_zone::{Condition, Filter};

use super::*;

#[test]
fn writes_in_flight_arrive_in_order_and_go_together() {
    for seed in 0..20 {
        let drive = drive(false, seed);
        with(&drive, async |device, lane| {
            let blocks = CAPACITY / BLOCK;
            let writes = (0..blocks).map(|n| write(device, lane, START + n * BLOCK, BLOCK, n as u8));
            let results = all(writes.collect()).await;
            assert!(results.iter().all(Result::is_ok), "seed {seed}: {results:?}");
        });
        let sent = drive.sent();
        assert_eq!(sent.most_in_zone, 1, "seed {seed}");
        assert!(
            sent.writes < 10,
            "{} writes were sent for {}",
            sent.writes,
            CAPACITY / BLOCK
        );
        for n in 0..CAPACITY / BLOCK {
            assert_eq!(drive.bytes(START + n * BLOCK, 1), [n as u8]);
        }
    }
}

#[test]
fn appends_of_several_threads_share_a_zone_without_gap_or_overlap() {
    for append in [false, true] {
        for seed in 0..8 {
            several_threads_append(append, seed);
        }
    }
}

fn several_threads_append(place: bool, seed: u64) {
    const THREADS: u64 = 4;
    let drive = drive(place, seed);
    let device = runtime().block_on(open(&drive));
    let each = CAPACITY / BLOCK / THREADS;
    let got: Vec<(u64, u8)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let device = device.clone();
                scope.spawn(move || {
                    runtime().block_on(async {
                        let lane = device.lane(each as u32);
                        let byte = 1 + thread as u8;
                        let appends = (0..each).map(|_| append(&device, &lane, FIRST, BLOCK, byte));
                        let places = all(appends.collect()).await;
                        lane.quiet().await;
                        places
                            .into_iter()
                            .map(|at| (at.unwrap(), byte))
                            .collect::<Vec<_>>()
                    })
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    let mut places: Vec<_> = got.iter().map(|(at, _)| *at).collect();
    places.sort_unstable();
    let expected: Vec<_> = (0..CAPACITY / BLOCK).map(|n| START + n * BLOCK).collect();
    assert_eq!(places, expected, "seed {seed}");
    for (at, byte) in got {
        assert_eq!(drive.bytes(at, BLOCK as usize), vec![byte; BLOCK as usize]);
    }
    let info = runtime().block_on(device.report(START, Filter::All, 1)).unwrap()[0];
    assert_eq!(info.condition, Condition::Full);
    match place {
        true => assert_eq!(drive.sent().writes, 0, "the drive places appends"),
        false => assert_eq!(drive.sent().most_in_zone, 1, "seed {seed}"),
    }
}

#[test]
fn a_merged_write_has_a_bound() {
    let spec = GeometrySpec {
        size: 32 * ZONE,
        zone_size: 4 * ZONE,
        zone_capacity: 4 * ZONE,
        nr_conventional: 0,
        ..SPEC
    };
    let drive = Arc::new(FakeDrive::new(spec, false, 5));
    with(&drive, async |device, lane| {
        let len = 96 << 10;
        let writes = (0..32).map(|n| write(device, lane, n * len, len, n as u8));
        assert!(all(writes.collect()).await.iter().all(Result::is_ok));
    });
    assert!(drive.sent().longest <= 1 << 20, "{:?}", drive.sent());
    assert!(drive.sent().longest > 96 << 10, "{:?}", drive.sent());
}

#[test]
fn zones_do_not_wait_for_each_other() {
    let drive = drive(false, 6);
    with(&drive, async |device, lane| {
        drive.hold(Some(FIRST));
        let mut held = pin!(write(device, lane, START, BLOCK, 1));
        assert!(begin(&mut held).await.is_none());
        for n in 0..4 {
            write(device, lane, START + ZONE + n * BLOCK, BLOCK, 2)
                .await
                .unwrap();
        }
        assert!(
            drive.is_writing(FIRST),
            "the first zone's write is still under way"
        );
        drive.hold(None);
        held.await.unwrap();
    });
    assert_eq!(drive.sent().most, 2);
}

#[test]
fn a_reset_comes_after_the_writes_before_it_and_before_those_after() {
    for seed in 0..10 {
        let drive = drive(false, seed);
        with(&drive, async |device, lane| {
            let requests: Vec<Request<'_, ()>> = vec![
                Box::pin(write(device, lane, START, 2 * BLOCK, 1)),
                Box::pin(device.zone_op(lane, ZoneOp::Reset, START)),
                Box::pin(write(device, lane, START, BLOCK, 2)),
            ];
            let results = all(requests).await;
            assert!(results.iter().all(Result::is_ok), "seed {seed}: {results:?}");
            assert_eq!(wp(device, FIRST).await, START + BLOCK);
        });
    }
}

#[test]
fn a_reset_of_all_zones_waits_for_their_writes() {
    let drive = drive(true, 7);
    with(&drive, async |device, lane| {
        let mut writes = pin!(all((0..3)
            .map(|n| append(device, lane, ZoneNo(2 + n), BLOCK, 1))
            .collect()));
        assert!(begin(&mut writes).await.is_none());
        device.reset_all(lane).await.unwrap();
        assert!(writes.await.iter().all(Result::is_ok));
        let zones = device.report(START, Filter::All, usize::MAX).await.unwrap();
        assert!(
            zones.iter().all(|zone| zone.condition == Condition::Empty),
            "{zones:?}"
        );
        append(device, lane, FIRST, BLOCK, 2).await.unwrap();
    });
}

#[test]
fn a_write_of_another_thread_waits_for_the_one_under_way() {
    let drive = drive(false, 8);
    let in_line = Arc::new(AtomicBool::new(false));
    with(&drive, async |device, lane| {
        drive.hold(Some(FIRST));
        let mut first = pin!(write(device, lane, START, BLOCK, 1));
        assert!(begin(&mut first).await.is_none());
        until(|| drive.is_writing(FIRST)).await;
        let (theirs, told) = (device.clone(), in_line.clone());
        let other = std::thread::spawn(move || {
            runtime().block_on(async {
                let lane = theirs.lane(8);
                let mut second = pin!(write(&theirs, &lane, START + BLOCK, BLOCK, 2));
                assert!(begin(&mut second).await.is_none());
                told.store(true, Ordering::SeqCst);
                let result = second.await;
                lane.quiet().await;
                result
            })
        });
        until(|| in_line.load(Ordering::SeqCst)).await;
        for _ in 0..100 {
            yield_now().await;
        }
        assert_eq!(drive.sent().writes, 1);
        drive.hold(None);
        first.await.unwrap();
        other.join().unwrap().unwrap();
    });
    assert_eq!((drive.sent().writes, drive.sent().most_in_zone), (2, 1));
}

#[test]
fn writes_in_an_area_pass_each_other_and_come_from_several_threads() {
    for seed in 0..20 {
        let drive = Arc::new(FakeDrive::new(WITH_AREAS, false, seed));
        with(&drive, async |device, lane| {
            device.zone_op(lane, ZoneOp::OpenZrwa, START).await.unwrap();
            let theirs = device.clone();
            let other = std::thread::spawn(move || {
                runtime().block_on(async {
                    let lane = theirs.lane(8);
                    let writes =
                        (0..8).map(|n| write(&theirs, &lane, START + n * BLOCK, BLOCK, 0x80 | n as u8));
                    let results = all(writes.collect()).await;
                    lane.quiet().await;
                    results
                })
            });
            let writes = (0..8).map(|n| write(device, lane, START + n * BLOCK, BLOCK, n as u8));
            let mut results = all(writes.collect()).await;
            results.extend(other.join().unwrap());
            assert!(results.iter().all(Result::is_ok), "seed {seed}: {results:?}");
            device.commit_zrwa(lane, START + 8 * BLOCK).await.unwrap();
            assert_eq!(wp(device, FIRST).await, START + 8 * BLOCK);
        });
        assert_eq!(
            (drive.sent().writes, drive.sent().longest),
            (16, BLOCK),
            "none is merged"
        );
        assert!(drive.sent().most_in_zone > 1, "seed {seed}");
        for n in 0..8 {
            assert_eq!(drive.bytes(START + n * BLOCK, 1)[0] & 0x7f, n as u8);
        }
    }
}

#[test]
fn a_zone_is_in_order_again_once_its_area_is_gone() {
    for op in [ZoneOp::Reset, ZoneOp::Finish] {
        let drive = Arc::new(FakeDrive::new(WITH_AREAS, false, 9));
        with(&drive, async |device, lane| {
            device.zone_op(lane, ZoneOp::OpenZrwa, START).await.unwrap();
            let requests: Vec<Request<'_, ()>> = vec![
                Box::pin(write(device, lane, START + 2 * BLOCK, BLOCK, 1)),
                Box::pin(write(device, lane, START, BLOCK, 1)),
                Box::pin(device.zone_op(lane, op, START)),
                Box::pin(device.zone_op(lane, ZoneOp::Reset, START)),
            ];
            assert!(all(requests).await.iter().all(Result::is_ok));
            let writes = (0..8).map(|n| write(device, lane, START + n * BLOCK, BLOCK, n as u8));
            assert!(all(writes.collect()).await.iter().all(Result::is_ok));
        });
        assert!(drive.sent().writes < 10, "those in order went together");
    }
}
