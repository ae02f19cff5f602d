//! Races in the engine, explored by shuttle: `cargo test -p zbdkit-zone --features shuttle`.
//!
//! Each test runs a few threads through many interleavings, at random and by priority changes (PCT). Threads
//! wait only for the engine's events, so that a lost wake-up is a deadlock, which shuttle reports.
//! `RACES=20` multiplies the number of interleavings.

#![cfg(feature = "shuttle")]

mod world;

use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;
use world::{BLOCK, EIO, World, ZONE, explore, join, spawn};
use zbdkit_zone::{
    CloseEmpty, Completion, Condition, ExclusiveOp, Recommendation, Refused, ZoneError, ZoneNo, Zrwa,
};

/// One in three fails.
fn some_fail() -> Result<(), i32> {
    if thread_rng().gen_range(0..3) == 0 {
        Err(EIO)
    } else {
        Ok(())
    }
}

const Z: ZoneNo = ZoneNo(0);

#[test]
fn acknowledged_appends_never_overlap_and_cover_the_written_end() {
    explore(|| {
        let world = World::new(1, |_| ());
        let appends = |world: &World| {
            let mut pool = world.engine.slots(2);
            let first = world.append(&mut pool, Z, 1).expect("room for four");
            let second = world.append(&mut pool, Z, 1);
            world.write(first, Ok(())).expect("nothing fails");
            world
                .write(second.expect("room for four"), Ok(()))
                .expect("nothing fails");
        };
        join([spawn(&world, appends), spawn(&world, appends)]);
        assert_eq!(world.check_acked(Z), ZONE * BLOCK);
        assert_eq!(world.engine.info(Z).condition, Condition::Full);
        world.check_counts();
    });
}

#[test]
fn a_failure_fails_what_is_above_it_and_the_zone_goes_on_at_the_written_end() {
    explore(|| {
        let world = World::new(1, |_| ());
        let appends = |world: &World| {
            let mut pool = world.engine.slots(2);
            for _ in 0..2 {
                let permit = world.append(&mut pool, Z, 1).expect("room for all");
                if let Err(errno) = world.write(permit, some_fail()) {
                    assert_eq!(errno, EIO);
                }
            }
        };
        join([spawn(&world, appends), spawn(&world, appends)]);
        let info = world.engine.info(Z);
        assert_eq!(
            world.check_acked(Z),
            info.written_end,
            "all that counts as written was acknowledged"
        );
        let mut pool = world.engine.slots(1);
        if info.written_end < ZONE * BLOCK {
            let permit = world.append(&mut pool, Z, 1).expect("the zone goes on");
            assert_eq!(permit.offset(), info.written_end);
            world.write(permit, Err(EIO)).expect_err("failed");
        }
        let empty = info.written_end == 0;
        assert_eq!(world.engine.info(Z).condition == Condition::Empty, empty);
        world.check_counts();
    });
}

#[test]
fn writes_completed_in_any_order_are_acknowledged_or_fail_with_what_is_below_them() {
    explore(|| {
        let world = World::new(1, |_| ());
        // Admitted in order here and completed by four threads in any order.
        let mut pool = world.engine.slots(4);
        let permits: Vec<_> = (0..4)
            .map(|_| world.append(&mut pool, Z, 1).expect("room"))
            .collect();
        join(permits.into_iter().map(|permit| {
            spawn(&world, move |world| {
                let _ = world.write(permit, some_fail());
            })
        }));
        assert_eq!(world.check_acked(Z), world.engine.info(Z).written_end);
        let again: Vec<_> = (0..4).map(|_| world.append(&mut pool, Z, 1)).collect();
        let slots = again.iter().filter(|permit| permit.is_ok()).count() as u64;
        assert_eq!(
            slots,
            ZONE - world.engine.info(Z).written_end / BLOCK,
            "all slots came back"
        );
        for permit in again.into_iter().rev().flatten() {
            assert!(matches!(
                world.engine.complete(permit, Err(EIO), &world.bells),
                Completion::Failed(EIO)
            ));
        }
        world.check_counts();
    });
}

#[test]
fn no_write_of_the_old_block_size_comes_into_a_formatted_zone() {
    explore(|| {
        let world = World::new(1, |_| ());
        let writes = |world: &World| {
            let mut pool = world.engine.slots(1);
            match world.append(&mut pool, Z, 1) {
                Ok(permit) => world.write(permit, Ok(())).expect("nothing fails"),
                Err(error) => assert!(matches!(error, ZoneError::Unaligned { .. }), "{error}"),
            }
        };
        join([spawn(&world, writes), spawn(&world, |world| world.format(Z))]);
        let info = world.engine.info(Z);
        assert_eq!(info.written_end, 0, "before the format, or not at all");
        assert_eq!(u64::from(world.engine.geometry().block_size()), 2 * BLOCK);
        world.check_counts();
    });
}

#[test]
fn a_reset_sees_no_writes_in_flight() {
    explore(|| {
        let world = World::new(1, |_| ());
        let appends = |world: &World| {
            let mut pool = world.engine.slots(2);
            let first = world.append(&mut pool, Z, 1).expect("room");
            let second = match world.engine.admit_append(&mut pool, 0, BLOCK) {
                Ok(permit) => Some(permit),
                Err(Refused::Busy(_)) => None,
                Err(refused) => panic!("{refused}"),
            };
            let _ = world.write(first, some_fail());
            let _ = second.map(|permit| world.write(permit, some_fail()));
        };
        join([
            spawn(&world, appends),
            spawn(&world, appends),
            spawn(&world, |world| {
                world.reset(Z);
                world.reset(Z);
            }),
        ]);
        assert_eq!(world.check_acked(Z), world.engine.info(Z).written_end);
        world.check_counts();
    });
}

#[test]
fn nothing_is_written_after_a_finish() {
    explore(|| {
        let world = World::new(1, |_| ());
        let appends = |world: &World| {
            let mut pool = world.engine.slots(1);
            while let Ok(permit) = world.append(&mut pool, Z, 1) {
                let _ = world.write(permit, some_fail());
            }
        };
        let finish = |world: &World| {
            let written = world.finish(Z);
            let info = world.engine.info(Z);
            assert!(written == 0 || info.written_end == written);
            assert_eq!((info.condition, info.wp), (Condition::Full, ZONE * BLOCK));
        };
        join([
            spawn(&world, appends),
            spawn(&world, appends),
            spawn(&world, finish),
        ]);
        assert_eq!(world.check_acked(Z), world.engine.info(Z).written_end);
        world.check_counts();
    });
}

#[test]
fn a_reset_waits_for_reads_and_a_read_keeps_its_data() {
    explore(|| {
        let world = World::new(1, |_| ());
        let mut pool = world.engine.slots(1);
        let permit = world.append(&mut pool, Z, 2).expect("room");
        world.write(permit, Ok(())).expect("written");
        let reads = |world: &World| {
            let permit = world
                .admitted(Z, || world.engine.admit_read(BLOCK, 2 * BLOCK))
                .expect("readable");
            thread::yield_now();
            assert!(
                world.engine.info(Z).written_end >= permit.data_len(),
                "the data is still there"
            );
            if permit.data_len() != 0 {
                assert!(world.engine.info(Z).written_end >= BLOCK + permit.data_len());
            }
            world.engine.end_read(permit, &world.bells);
        };
        let appends = |world: &World| {
            let permit = world.append(&mut world.engine.slots(1), Z, 1).expect("room");
            let _ = world.write(permit, some_fail());
        };
        join([
            spawn(&world, reads),
            spawn(&world, reads),
            spawn(&world, |w| w.reset(Z)),
            spawn(&world, appends),
        ]);
        world.check_counts();
    });
}

#[test]
fn an_aborted_operation_lets_everybody_in_again() {
    explore(|| {
        let world = World::new(1, |_| ());
        let appends = |world: &World| {
            let permit = world.append(&mut world.engine.slots(1), Z, 1).expect("room");
            world.write(permit, Ok(())).expect("written");
        };
        let abort = |op: ExclusiveOp| {
            move |world: &World| {
                let permit = world.admitted(Z, || world.engine.begin(Z, op)).expect("allowed");
                if let Some(permit) = permit {
                    world.engine.abort(permit, &world.bells);
                }
            }
        };
        join([
            spawn(&world, appends),
            spawn(&world, appends),
            spawn(&world, abort(ExclusiveOp::Reset)),
            spawn(&world, abort(ExclusiveOp::SetOffline)),
        ]);
        assert_eq!(world.check_acked(Z), 2 * BLOCK);
        world.check_counts();
    });
}

#[test]
fn limits_are_never_exceeded() {
    explore(|| {
        let world = World::new(4, |spec| (spec.max_open, spec.max_active) = (1, 2));
        let writer = |first: u32| {
            move |world: &World| {
                let mut pool = world.engine.slots(1);
                for zone in [first, (first + 1) % 3, first].map(ZoneNo) {
                    match world.append(&mut pool, zone, 2) {
                        Ok(permit) => _ = world.write(permit, some_fail()),
                        Err(ZoneError::TooManyActive { .. } | ZoneError::TooManyOpen { .. }) => {}
                        Err(ZoneError::Full { .. } | ZoneError::ExceedsCapacity { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                    world.check_resources();
                }
            }
        };
        let operator = |world: &World| {
            let _ = world.engine.open(ZoneNo(1));
            world.check_resources();
            let _ = world.engine.close(ZoneNo(1), CloseEmpty::ToEmpty);
            world.reset(ZoneNo(0));
            world.check_resources();
        };
        join([
            spawn(&world, writer(0)),
            spawn(&world, writer(1)),
            spawn(&world, operator),
        ]);
        for zone in world.engine.geometry().zones() {
            let start = world.engine.geometry().start(zone);
            assert_eq!(
                world.check_acked(zone),
                world.engine.info(zone).written_end - start
            );
        }
        world.check_counts();
    });
}

#[test]
fn a_recommendation_opens_no_zone_that_was_closed_for_another_meanwhile() {
    explore(|| {
        let world = World::new(2, |spec| spec.max_open = 1);
        let append = |zone: ZoneNo| {
            move |world: &World| {
                let mut pool = world.engine.slots(1);
                let permit = world.append(&mut pool, zone, 1).expect("room");
                world.write(permit, Ok(())).expect("nothing fails");
            }
        };
        join([spawn(&world, append(Z))]);
        let recommend = |world: &World| {
            let what = ExclusiveOp::Recommend(Some(Recommendation::Finish));
            let permit = world.alone(Z, what).expect("something to do");
            world.engine.commit(permit, &world.bells);
        };
        join([spawn(&world, recommend), spawn(&world, append(ZoneNo(1)))]);
        assert!(world.engine.info(Z).attributes.recommended.is_some());
        world.check_counts();
    });
}

#[test]
fn a_request_over_conventional_zones_has_all_or_none() {
    explore(|| {
        let world = World::new(4, |spec| spec.nr_conventional = 3);
        let write = |world: &World| {
            let mut pool = world.engine.slots(1);
            let ask = || world.engine.admit_write(&mut pool, BLOCK, 2 * ZONE * BLOCK);
            let permit = match world.admitted(ZoneNo(1), ask) {
                Ok(permit) => permit,
                Err(error) => return assert_eq!(error, ZoneError::Offline { zone: ZoneNo(1) }),
            };
            for zone in [0, 1, 2] {
                *world.in_flight[zone].lock().expect("no panic") += 1;
            }
            thread::yield_now();
            assert_ne!(
                world.engine.info(ZoneNo(1)).condition,
                Condition::Offline,
                "not while it is written"
            );
            for zone in [0, 1, 2] {
                *world.in_flight[zone].lock().expect("no panic") -= 1;
            }
            match world.engine.complete(permit, some_fail(), &world.bells) {
                Completion::Prefix(prefix) => world.engine.acknowledge(prefix, Ok(()), &world.bells),
                Completion::Failed(errno) => assert_eq!(errno, EIO),
                Completion::Pending(_) => panic!("conventional writes are not ordered"),
            }
        };
        let operator = |world: &World| {
            for op in [ExclusiveOp::SetOffline, ExclusiveOp::SetNormal] {
                let permit = world.alone(ZoneNo(1), op).expect("something to do");
                world.engine.commit(permit, &world.bells);
            }
        };
        join([
            spawn(&world, write),
            spawn(&world, write),
            spawn(&world, operator),
        ]);
        for zone in [0, 1, 2].map(ZoneNo) {
            assert!(world.alone(zone, ExclusiveOp::SetReadOnly).is_some_and(|permit| {
                world.engine.commit(permit, &world.bells);
                true
            }));
        }
    });
}

#[test]
fn a_flush_finds_what_was_acknowledged_before_it() {
    explore(|| {
        let world = World::new(2, |_| ());
        let writes = |zone: u32| {
            move |world: &World| {
                let zone = ZoneNo(zone);
                let mut pool = world.engine.slots(1);
                for _ in 0..2 {
                    let permit = world.append(&mut pool, zone, 1).expect("room");
                    let end = permit.offset() + BLOCK - world.engine.geometry().start(zone);
                    world.write(permit, Ok(())).expect("written");
                    world.take_dirty();
                    let table = world.table.lock().expect("no panic");
                    assert!(
                        table[zone.0 as usize].written >= end,
                        "acknowledged before the flush"
                    );
                }
            }
        };
        join([
            spawn(&world, writes(0)),
            spawn(&world, writes(0)),
            spawn(&world, writes(1)),
        ]);
        world.take_dirty();
        let table = world.table.lock().expect("no panic");
        for zone in world.engine.geometry().zones() {
            assert_eq!(table[zone.0 as usize], world.engine.record(zone));
        }
    });
}

#[test]
fn slots_that_other_threads_return_are_neither_lost_nor_given_twice() {
    explore(|| {
        let world = World::new(2, |_| ());
        // Both lanes write both zones, so each returns slots that the other took.
        let lane = |world: &World| {
            let mut pool = world.engine.slots(2);
            for _ in 0..2 {
                let permits: Vec<_> = [0, 1]
                    .map(|zone| world.append(&mut pool, ZoneNo(zone), 1).expect("room"))
                    .into();
                for permit in permits {
                    world.write(permit, Ok(())).expect("written");
                }
            }
        };
        join([spawn(&world, lane), spawn(&world, lane)]);
        assert_eq!(
            world.check_acked(ZoneNo(0)) + world.check_acked(ZoneNo(1)),
            2 * ZONE * BLOCK
        );
    });
}

/// An area of two blocks that moves block by block, one at a time, and a zone that has it.
fn with_area() -> std::sync::Arc<World> {
    let world = World::new(2, |spec| {
        spec.zns.zrwa = Some(Zrwa {
            size: 2 * BLOCK,
            granularity: BLOCK,
            count: 1,
            explicit_commit: true,
        });
    });
    let permit = world.alone(Z, ExclusiveOp::OpenZrwa).expect("it is empty");
    world.engine.commit(permit, &world.bells);
    world
}

/// A write of one block in the area, if it is still there.
fn write_in_area(world: &World, block: u64) {
    let mut pool = world.engine.slots(1);
    let offset = block * BLOCK;
    let permit = match world.admitted(Z, || world.engine.admit_write(&mut pool, offset, BLOCK)) {
        Ok(permit) => permit,
        Err(
            ZoneError::OutsideRandomWriteArea { .. }
            | ZoneError::NotAtWritePointer { .. }
            | ZoneError::Full { .. },
        ) => return,
        Err(error) => panic!("{error}"),
    };
    let _ = world.write(permit, some_fail());
}

#[test]
fn acknowledged_writes_of_an_area_lie_below_its_end_and_the_published_pointer_leads_there() {
    explore(|| {
        let world = with_area();
        join([
            spawn(&world, |world| write_in_area(world, 3)),
            spawn(&world, |world| {
                write_in_area(world, 1);
                write_in_area(world, 2);
            }),
            spawn(&world, |world| {
                let committed = world.admitted(Z, || world.engine.commit_zrwa(BLOCK, &world.bells));
                if let Ok(prefix) = committed {
                    world.engine.acknowledge(prefix, Ok(()), &world.bells);
                }
            }),
        ]);
        let info = world.engine.info(Z);
        let acked = world.acked.lock().expect("no panic").clone();
        assert!(acked.iter().all(|write| write.3 <= info.written_end));
        assert_eq!(*world.bells.published[0].lock().expect("no panic"), info.wp);
        assert_eq!(info.written_end, info.wp + 2 * BLOCK);
        // Whatever failed, the area begins where it is said to.
        let mut pool = world.engine.slots(1);
        let permit = world
            .engine
            .admit_write(&mut pool, info.wp, BLOCK)
            .expect("the pointer is right");
        world.write(permit, Ok(())).expect("nothing fails");
        world.check_counts();
    });
}

#[test]
fn an_area_is_free_again_once_its_zone_is_full_finished_or_reset() {
    explore(|| {
        let world = with_area();
        let other = ZoneNo(1);
        let refused = world.engine.begin(other, ExclusiveOp::OpenZrwa).err();
        assert_eq!(
            refused,
            Some(Refused::Zone(ZoneError::NoRandomWriteArea { zone: other }))
        );
        join([
            spawn(&world, |world| write_in_area(world, 1)),
            spawn(&world, |world| {
                for end in [2, 4] {
                    let committed = world.admitted(Z, || world.engine.commit_zrwa(end * BLOCK, &world.bells));
                    if let Ok(prefix) = committed {
                        world.engine.acknowledge(prefix, Ok(()), &world.bells);
                    }
                }
            }),
            spawn(&world, |world| world.reset(Z)),
        ]);
        if world.engine.info(Z).attributes.zrwa {
            world.reset(Z);
        }
        let permit = world.alone(other, ExclusiveOp::OpenZrwa).expect("one is free");
        world.engine.commit(permit, &world.bells);
        world.check_counts();
    });
}
