//! `raw` with an offset and a size over a drive.

use zbdkit_block::{Node, RawNode, ZoneOp};
use zbdkit_zone::{Condition, Filter, ZoneError};

use super::*;

async fn window(drive: &Arc<FakeDrive>, offset: u64, size: Option<u64>) -> Result<Device, String> {
    let drive: Arc<dyn Drive> = drive.clone();
    let child: Arc<dyn Node> = Arc::new(HostDeviceNode::open(drive).await.unwrap());
    RawNode::new(child, offset, size)
        .map(|node| Device::new(Arc::new(node)))
        .map_err(|error| error.to_string())
}

#[test]
fn a_window_of_whole_zones_has_those_zones() {
    let drive = drive(false, 31);
    runtime().block_on(async {
        let device = window(&drive, ZONE, Some(4 * ZONE)).await.unwrap();
        let lane = device.lane(8);
        let geometry = device.limits().zoned.unwrap();
        assert_eq!((geometry.nr_zones(), geometry.nr_conventional()), (4, 1));
        // Zone 1 of the window is zone 2 of the drive.
        drive.write_behind(FIRST, BLOCK);
        drive.write_behind(ZoneNo(5), BLOCK);
        let zones = device.report(0, Filter::All, usize::MAX).await.unwrap();
        assert_eq!(zones.len(), 4);
        assert_eq!(
            (zones[1].zone, zones[1].start, zones[1].wp),
            (ZoneNo(1), ZONE, ZONE + BLOCK)
        );
        assert_eq!(
            append(&device, &lane, ZoneNo(1), BLOCK, 1).await.unwrap(),
            ZONE + BLOCK
        );
        let misplaced = write(&device, &lane, ZONE, BLOCK, 1).await;
        let expected = ZoneError::NotAtWritePointer {
            zone: ZoneNo(1),
            offset: ZONE,
            wp: ZONE + 2 * BLOCK,
        };
        assert_eq!(misplaced, Err(expected.into()));
        device.zone_op(&lane, ZoneOp::Finish, 2 * ZONE).await.unwrap();
        // What lies outside of the window stays.
        device.reset_all(&lane).await.unwrap();
        let zones = device.report(ZONE, Filter::All, usize::MAX).await.unwrap();
        assert!(
            zones.iter().all(|zone| zone.condition == Condition::Empty),
            "{zones:?}"
        );
        let outside = open(&drive).await.report(5 * ZONE, Filter::All, 1).await.unwrap()[0];
        assert_eq!(outside.wp, 5 * ZONE + BLOCK);
        assert!(device.zone_op(&lane, ZoneOp::Reset, 4 * ZONE).await.is_err());
        lane.quiet().await;
    });
}

#[test]
fn a_window_of_sequential_zones_conforms() {
    let drive = drive(false, 32);
    runtime().block_on(async {
        let device = window(&drive, START, None).await.unwrap();
        if let Err(broken) = conformance::run_on_drive(&device).await {
            panic!("{broken}");
        }
    });
}

#[test]
fn a_window_of_conventional_zones_is_a_plain_disk() {
    let drive = drive(false, 33);
    runtime().block_on(async {
        let device = window(&drive, 0, Some(2 * ZONE)).await.unwrap();
        let lane = device.lane(8);
        assert!(device.limits().zoned.is_none());
        write(&device, &lane, ZONE - BLOCK, 2 * BLOCK, 1).await.unwrap();
        assert!(matches!(
            device.reset_all(&lane).await,
            Err(Error::NotSupported(_)) | Ok(())
        ));
        assert!(matches!(
            device.report(0, Filter::All, 1).await,
            Err(Error::NotSupported(_))
        ));
    });
}

#[test]
fn a_window_that_cuts_zones_is_refused_with_the_reason() {
    let drive = drive(false, 34);
    runtime().block_on(async {
        for (offset, size, reason) in [
            (
                BLOCK,
                None,
                "offset=4096 is not a multiple of the zone size (1048576 bytes)",
            ),
            (ZONE, Some(ZONE + BLOCK), "does not reach to the end"),
            (0, Some(8 * ZONE + BLOCK), "past the end"),
        ] {
            let error = window(&drive, offset, size).await.err().unwrap();
            assert!(error.contains(reason), "{error}");
        }
    });
}
