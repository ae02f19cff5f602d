//! Rules of host-aware SCSI disks, held against a real one: the environment variable `ZBDKIT_TEST_SCSI` names it. Everything
//! on it is lost. The guest job `scsi` runs this on scsi_debug.

use std::path::PathBuf;

use zbdkit_block::host_device::{Drive, DriveFacts, ScsiDrive, block_facts};
use zbdkit_block::{FileOptions, Host, OsHost, ZoneOp};
use zbdkit_io::{IoBuf, Runtime, RuntimeOptions};
use zbdkit_testkit::reported;
use zbdkit_zone::{CloseEmpty, Condition, Model, ZoneInfo, ZoneType};

fn open() -> ScsiDrive {
    let path = PathBuf::from(std::env::var_os("ZBDKIT_TEST_SCSI").expect("ZBDKIT_TEST_SCSI names a disk"));
    let facts = block_facts(&OsHost, &path).unwrap().expect("a disk");
    assert!(
        facts.zones_by_command,
        "a host-aware disk of a kernel that hides its zones"
    );
    let options = FileOptions {
        direct: true,
        direct_align: Some(facts.logical_block_size),
        ..FileOptions::existing(false)
    };
    let file = OsHost.open(&path, &options).expect("the disk");
    let about = DriveFacts {
        path,
        size: facts.size,
        block_size: facts.logical_block_size,
        read_only: false,
        zones: facts.zones.expect("zones"),
        zns: zbdkit_zone::Zns::NONE,
    };
    ScsiDrive::new(about, file)
}

async fn zones(drive: &ScsiDrive) -> Vec<ZoneInfo> {
    let facts = drive.facts();
    let mut zones: Vec<ZoneInfo> = Vec::new();
    while let Some(at) = zones
        .last()
        .map_or(Some(0), |z| Some(z.start + z.len).filter(|at| *at < facts.size))
    {
        // A few at a time, so that reports join.
        zones.extend(drive.report(at, 3).await.unwrap());
    }
    reported::same_zones(&zones, &facts.path, facts.block_size).unwrap();
    zones
}

async fn write(drive: &ScsiDrive, offset: u64, seed: u8) {
    let data = IoBuf::alloc(4096);
    data.fill(0..4096, seed);
    drive.file().write(data, offset).await.unwrap();
}

async fn read(drive: &ScsiDrive, offset: u64) -> Vec<u8> {
    let data = IoBuf::alloc(4096);
    drive.file().read(data.clone(), offset).await.unwrap();
    data.to_vec()
}

#[test]
#[ignore = "needs a host-aware disk, named by ZBDKIT_TEST_SCSI"]
fn a_report_follows_every_operation() {
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    runtime.block_on(async {
        let drive = open();
        assert_eq!(drive.facts().zones.model, Model::HostAware);
        drive.reset_all().await.unwrap();
        let all = zones(&drive).await;
        let sequential = |zone: &&ZoneInfo| zone.kind == ZoneType::SequentialPreferred;
        let first = *all.iter().find(sequential).expect("a sequential zone");
        let (start, len) = (first.start, first.len);
        let number = first.zone.0 as usize;
        assert!(
            all.iter()
                .filter(sequential)
                .all(|zone| zone.condition == Condition::Empty)
        );

        let op = async |op| {
            drive.zone_op(op, start, len).await.unwrap();
            zones(&drive).await[number]
        };
        assert_eq!(op(ZoneOp::Open).await.condition, Condition::ExplicitlyOpen);
        assert_eq!(
            op(ZoneOp::Close(CloseEmpty::ToEmpty)).await.condition,
            Condition::Empty
        );
        write(&drive, start, 1).await;
        let written = zones(&drive).await[number];
        assert_eq!(
            (written.condition, written.wp),
            (Condition::ImplicitlyOpen, start + 4096)
        );
        assert_eq!(
            op(ZoneOp::Close(CloseEmpty::ToEmpty)).await.condition,
            Condition::Closed
        );
        let full = op(ZoneOp::Finish).await;
        assert_eq!((full.condition, full.wp), (Condition::Full, start + len));
        let empty = op(ZoneOp::Reset).await;
        assert_eq!((empty.condition, empty.wp), (Condition::Empty, start));

        // Such zones are written best at the pointer, but not only there.
        write(&drive, start, 2).await;
        write(&drive, start + 16384, 3).await;
        assert_eq!(zones(&drive).await[number].wp, start + 20480);
        write(&drive, start, 4).await;
        assert_eq!(read(&drive, start).await, [4; 4096]);
        assert_eq!(zones(&drive).await[number].wp, start + 20480);
        drive.file().datasync().await.unwrap();

        drive.reset_all().await.unwrap();
        let after = zones(&drive).await;
        assert!(
            after
                .iter()
                .filter(sequential)
                .all(|zone| zone.condition == Condition::Empty)
        );
    });
}

#[test]
#[ignore = "needs a host-aware disk, named by ZBDKIT_TEST_SCSI"]
fn what_the_disk_refuses_is_an_error() {
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    runtime.block_on(async {
        let drive = open();
        let all = zones(&drive).await;
        if let Some(zone) = all.iter().find(|zone| zone.kind == ZoneType::Conventional) {
            assert!(drive.zone_op(ZoneOp::Open, zone.start, zone.len).await.is_err());
        }
        let zone = all.last().expect("zones");
        assert!(
            drive
                .zone_op(ZoneOp::Open, zone.start + 4096, zone.len)
                .await
                .is_err(),
            "no start"
        );
        assert!(
            drive
                .zone_op(ZoneOp::Open, drive.facts().size, zone.len)
                .await
                .is_err(),
            "no zone"
        );
        // And not because everything is refused.
        drive.zone_op(ZoneOp::Reset, zone.start, zone.len).await.unwrap();
    });
}
