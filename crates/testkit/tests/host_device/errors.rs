//! What a drive holds against a request reaches whoever made it, as what it is; the pointer stays right.

use zbdkit_block::{CrossZone, ZoneOp};
use zbdkit_testkit::drive::Trouble;
use zbdkit_zone::{CloseEmpty, ZoneError};

use super::*;

const EIO: i32 = 5;
const ENODEV: i32 = 19;
const ENODATA: i32 = 61;

fn is_io(result: &Result<(), Error>, wanted: i32) -> bool {
    matches!(result, Err(Error::Io { errno, .. }) if *errno == wanted)
}

#[test]
fn after_a_failed_write_the_zone_is_reported_before_the_next_one() {
    let drive = drive(false, 21);
    with(&drive, async |device, lane| {
        write(device, lane, START, BLOCK, 1).await.unwrap();
        drive.trouble(FIRST, Trouble::Torn(BLOCK, EIO));
        let failed = write(device, lane, START + BLOCK, 2 * BLOCK, 2).await;
        assert!(is_io(&failed, EIO), "{failed:?}");
        // The drive kept one of the two blocks.
        assert_eq!(
            append(device, lane, FIRST, BLOCK, 3).await.unwrap(),
            START + 2 * BLOCK
        );
        write(device, lane, START + 3 * BLOCK, BLOCK, 4).await.unwrap();
    });
}

#[test]
fn of_writes_that_went_together_only_the_bad_one_fails() {
    let drive = drive(false, 22);
    drive.trouble(FIRST, Trouble::BadByte(START + 5 * BLOCK, ENODATA));
    with(&drive, async |device, lane| {
        let writes = (0..8).map(|n| write(device, lane, START + n * BLOCK, BLOCK, n as u8));
        let results = all(writes.collect()).await;
        assert!(results[..5].iter().all(Result::is_ok), "{results:?}");
        assert!(is_io(&results[5], ENODATA), "{results:?}");
        for result in &results[6..] {
            let behind = matches!(result, Err(Error::Zone(ZoneError::NotAtWritePointer { .. })));
            assert!(behind, "{results:?}");
        }
        assert_eq!(wp(device, FIRST).await, START + 5 * BLOCK);
    });
}

#[test]
fn appends_behind_a_failed_one_close_up() {
    let drive = drive(false, 23);
    with(&drive, async |device, lane| {
        drive.trouble(FIRST, Trouble::Fail(EIO));
        drive.trouble(FIRST, Trouble::Fail(ENODATA));
        let results = all((0..4).map(|n| append(device, lane, FIRST, BLOCK, n)).collect()).await;
        // The first trouble met all four together, the second one the first of them alone.
        assert!(
            matches!(results[0], Err(Error::Io { errno: ENODATA, .. })),
            "{results:?}"
        );
        for (n, result) in results[1..].iter().enumerate() {
            assert_eq!(*result, Ok(START + n as u64 * BLOCK));
        }
    });
}

#[test]
fn what_others_did_to_a_zone_is_noticed() {
    let drive = drive(false, 24);
    with(&drive, async |device, lane| {
        write(device, lane, START, 4 * BLOCK, 1).await.unwrap();
        drive.change_behind(FIRST, ZoneOp::Reset);
        write(device, lane, START, BLOCK, 2).await.unwrap();
        drive.write_behind(FIRST, BLOCK);
        write(device, lane, START + 2 * BLOCK, BLOCK, 3).await.unwrap();
        drive.write_behind(FIRST, BLOCK);
        // The append was on its way to where somebody else has written.
        assert_eq!(
            append(device, lane, FIRST, BLOCK, 4).await.unwrap(),
            START + 4 * BLOCK
        );
        drive.write_behind(FIRST, 2 * BLOCK);
        let stale = write(device, lane, START + 5 * BLOCK, BLOCK, 5).await;
        let expected = ZoneError::NotAtWritePointer {
            zone: FIRST,
            offset: START + 5 * BLOCK,
            wp: START + 7 * BLOCK,
        };
        assert_eq!(stale, Err(expected.into()));
        drive.change_behind(FIRST, ZoneOp::Finish);
        let full = append(device, lane, FIRST, BLOCK, 6).await;
        assert_eq!(full, Err(ZoneError::Full { zone: FIRST }.into()));
        drive.change_behind(FIRST, ZoneOp::Reset);
        assert_eq!(append(device, lane, FIRST, BLOCK, 7).await.unwrap(), START);
    });
}

#[test]
fn a_refused_write_is_held_against_a_report_and_a_good_one_costs_none() {
    let drive = drive(false, 25);
    with(&drive, async |device, lane| {
        let opening = drive.sent().reports;
        for n in 0..8 {
            write(device, lane, START + n * BLOCK, BLOCK, 1).await.unwrap();
        }
        assert_eq!(drive.sent().reports, opening);
        assert!(write(device, lane, START, BLOCK, 1).await.is_err());
        assert_eq!(drive.sent().reports, opening + 1);
    });
}

#[test]
fn resources_that_the_drive_has_not_are_told_apart() {
    let drive = drive(false, 26);
    with(&drive, async |device, lane| {
        for n in 0..3 {
            device
                .zone_op(lane, ZoneOp::Open, START + n * ZONE)
                .await
                .unwrap();
        }
        let fourth = START + 3 * ZONE;
        let no_open = Err(ZoneError::TooManyOpen { limit: 3 }.into());
        assert_eq!(write(device, lane, fourth, BLOCK, 1).await, no_open);
        assert_eq!(device.zone_op(lane, ZoneOp::Open, fourth).await, no_open);
        for n in 0..3 {
            write(device, lane, START + n * ZONE, BLOCK, 1).await.unwrap();
            let close = ZoneOp::Close(CloseEmpty::ToEmpty);
            device.zone_op(lane, close, START + n * ZONE).await.unwrap();
        }
        write(device, lane, fourth, BLOCK, 1).await.unwrap();
        let no_active = Err(ZoneError::TooManyActive { limit: 4 }.into());
        assert_eq!(write(device, lane, fourth + ZONE, BLOCK, 1).await, no_active);
        // The zones that are active take writes all the same.
        write(device, lane, fourth + BLOCK, BLOCK, 1).await.unwrap();
    });
}

#[test]
fn zones_that_died_are_told_apart_from_broken_media() {
    for place in [false, true] {
        let drive = drive(place, 27);
        with(&drive, async |device, lane| {
            append(device, lane, FIRST, BLOCK, 1).await.unwrap();
            drive.change_behind(FIRST, ZoneOp::SetReadOnly);
            let read_only = ZoneError::ReadOnly { zone: FIRST };
            assert_eq!(append(device, lane, FIRST, BLOCK, 1).await, Err(read_only.into()));
            assert_eq!(
                write(device, lane, START + BLOCK, BLOCK, 1).await,
                Err(read_only.into())
            );
            assert_eq!(
                device.zone_op(lane, ZoneOp::Reset, START).await,
                Err(read_only.into())
            );
            device
                .read(lane, IoBuf::alloc(BLOCK as usize), START, CrossZone::Refuse)
                .await
                .unwrap();
            drive.change_behind(FIRST, ZoneOp::SetOffline);
            let offline = ZoneError::Offline { zone: FIRST };
            assert_eq!(append(device, lane, FIRST, BLOCK, 1).await, Err(offline.into()));
            assert_eq!(
                device.zone_op(lane, ZoneOp::Finish, START).await,
                Err(offline.into())
            );
            append(device, lane, SECOND, BLOCK, 1).await.unwrap();
        });
    }
}

#[test]
fn a_bad_block_in_an_area_that_moved_over_it_is_no_rule_of_zones() {
    for seed in 0..8 {
        let drive = Arc::new(FakeDrive::new(WITH_AREAS, false, seed));
        drive.trouble(FIRST, Trouble::BadByte(START, ENODATA));
        with(&drive, async |device, lane| {
            let area = device.limits().zoned.unwrap().zrwa().unwrap();
            device.zone_op(lane, ZoneOp::OpenZrwa, START).await.unwrap();
            let far = START + 2 * area.size - BLOCK;
            let both = vec![
                write(device, lane, START, BLOCK, 1),
                write(device, lane, far, BLOCK, 2),
            ];
            let results = all(both).await;
            assert!(is_io(&results[0], ENODATA) && results[1].is_ok(), "{results:?}");
            assert!(wp(device, FIRST).await > START, "the area has moved");
            // What lies above the area now did so before.
            let beyond = write(device, lane, START + 4 * area.size, BLOCK, 3).await;
            let outside = matches!(beyond, Err(Error::Zone(ZoneError::OutsideRandomWriteArea { .. })));
            assert!(outside, "{beyond:?}");
        });
    }
}

#[test]
fn a_drive_that_is_pulled_out_fails_everything_and_hangs_nothing() {
    for place in [false, true] {
        let drive = drive(place, 28);
        with(&drive, async |device, lane| {
            drive.hold(Some(FIRST));
            let requests: Vec<_> = (0..16)
                .map(|n| append(device, lane, ZoneNo(2 + n % 3), BLOCK, 1))
                .collect();
            let mut requests = pin!(all(requests));
            assert!(begin(&mut requests).await.is_none());
            drive.pull();
            drive.hold(None);
            let results = requests.await;
            assert!(results.iter().any(Result::is_err), "{results:?}");
            for result in results
                .into_iter()
                .chain([append(device, lane, SECOND, BLOCK, 1).await])
            {
                assert!(
                    matches!(result, Ok(_) | Err(Error::Io { errno: ENODEV, .. })),
                    "{result:?}"
                );
            }
            assert!(is_io(
                &write(device, lane, START + 3 * ZONE, BLOCK, 1).await,
                ENODEV
            ));
        });
    }
}
