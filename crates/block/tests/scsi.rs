//! Rules of host-aware SCSI disks, held against a real one: the environment variable `ZBDKIT_TEST_SCSI` names it. Everything
//! on it is lost. The guest job `scsi` runs this on scsi_debug.

use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Command;

use zbdkit_block::ZoneOp;
use zbdkit_block::host_device::sysfs::{DeviceNumber, Sysfs};
use zbdkit_block::host_device::{Drive, ScsiDrive};
use zbdkit_io::{File, FileKind, IoBuf, Runtime, RuntimeOptions};
use zbdkit_zone::{CloseEmpty, Condition, Model, ZoneInfo, ZoneType};

/// `O_DIRECT` of Linux.
fn direct() -> i32 {
    rustix::fs::OFlags::DIRECT.bits() as i32
}

async fn open() -> ScsiDrive {
    let path = PathBuf::from(std::env::var_os("ZBDKIT_TEST_SCSI").expect("ZBDKIT_TEST_SCSI names a disk"));
    let disk = std::fs::File::options()
        .read(true)
        .write(true)
        .custom_flags(direct())
        .open(&path)
        .unwrap();
    let number = DeviceNumber::of(rustix::fs::fstat(&disk).unwrap().st_rdev);
    let facts = Sysfs::default().device(number).unwrap();
    let kind = FileKind {
        direct_align: Some(facts.logical_block_size),
    };
    let file = File::from_fd(disk.into(), kind);
    let drive = ScsiDrive::probe(path, &facts, file, false).await.unwrap();
    drive.expect("a host-aware disk")
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
    as_sg3_utils_have_it(drive, &zones);
    zones
}

/// Holds a report against the bytes that `sg_rep_zones --raw` gets.
fn as_sg3_utils_have_it(drive: &ScsiDrive, ours: &[ZoneInfo]) {
    let facts = drive.facts();
    let shown = Command::new("sg_rep_zones")
        .args(["--raw", "--maxlen=262144"])
        .arg(&facts.path)
        .output()
        .expect("sg3_utils");
    let block = u64::from(facts.block_size);
    let number = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().unwrap()).wrapping_mul(block);
    let theirs: Vec<_> = shown.stdout[64..]
        .chunks_exact(64)
        .map(|zone| {
            let positions = [&zone[8..16], &zone[16..24], &zone[24..32]].map(number);
            (zone[0] & 15, zone[1] >> 4, positions)
        })
        .collect();
    assert_eq!(ours.len(), theirs.len());
    assert_eq!(ours.len(), facts.zones.nr_zones as usize);
    for (zone, (kind, condition, [len, start, wp])) in ours.iter().zip(theirs) {
        assert_eq!(
            (zone.kind as u8, zone.condition as u8),
            (kind, condition),
            "{zone:?}"
        );
        assert_eq!((zone.start, zone.len), (start, len));
        let valid = !matches!(
            zone.condition,
            Condition::NotWritePointer | Condition::Full | Condition::ReadOnly | Condition::Offline
        );
        if valid {
            assert_eq!(zone.wp, wp, "{zone:?}");
        }
    }
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
        let drive = open().await;
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
        let drive = open().await;
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

#[test]
fn an_ordinary_file_is_no_host_aware_disk() {
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    let sysfs = tempfile::tempdir().unwrap();
    let disk = sysfs.path().join("sdz");
    for dir in ["queue", "holders"] {
        std::fs::create_dir_all(disk.join(dir)).unwrap();
    }
    std::fs::create_dir_all(sysfs.path().join("dev/block")).unwrap();
    std::os::unix::fs::symlink(&disk, sysfs.path().join("dev/block/8:400")).unwrap();
    for (name, value) in [
        ("size", "2048"),
        ("dev", "8:400"),
        ("ro", "0"),
        ("queue/logical_block_size", "512"),
        ("queue/physical_block_size", "512"),
    ] {
        std::fs::write(disk.join(name), value).unwrap();
    }
    let facts = Sysfs::new(sysfs.path()).device("8:400".parse().unwrap()).unwrap();
    runtime.block_on(async {
        let file = File::from_fd(tempfile::tempfile().unwrap().into(), FileKind::default());
        let probed = ScsiDrive::probe("it".into(), &facts, file, false).await.unwrap();
        assert!(probed.is_none());
    });
}
