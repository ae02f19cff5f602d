//! Rules of zoned namespaces, each held against a simulated one, and against a real one where the environment variable
//! `ZBDKIT_TEST_NVME` names its character device. Everything on it is lost.
//!
//! That one has the geometry of the simulated one, its limits, extensions and random write areas; the guest job `nvme` gives
//! QEMU the options for them.

mod areas;

use std::future::{Future, poll_fn};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use zbdkit_block::host_device::{Drive, HostDeviceNode, KernelLimits, NvmeDrive};
use zbdkit_block::{Device, Error, OpenError, ZoneOp};
use zbdkit_io::{File, IoBuf, Runtime, RuntimeOptions};
use zbdkit_spec::nvme::zns::ZoneState;
use zbdkit_testkit::namespace::{
    BLOCK, CAPACITY, MAX_ACTIVE, MAX_OPEN, MDTS, Simulated, ZASL, ZONE_SIZE, ZONES,
};
use zbdkit_testkit::{conformance, reported};
use zbdkit_zone::{CloseEmpty, Condition, ZoneError, ZoneInfo, ZoneNo};

const ZONE: u64 = ZONE_SIZE * BLOCK;
const ROOM: u64 = CAPACITY * BLOCK;

/// One test at a time has the real namespace.
static REAL: Mutex<()> = Mutex::new(());

fn on_each<F>(test: impl Fn(NvmeDrive) -> F)
where
    F: Future<Output = ()>,
{
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    runtime.block_on(async {
        let (drive, _) = simulated().await;
        test(drive).await;
    });
    if let Some(path) = std::env::var_os("ZBDKIT_TEST_NVME") {
        let _alone = REAL.lock().unwrap_or_else(PoisonError::into_inner);
        runtime.block_on(async {
            let drive = NvmeDrive::open(Path::new(&path), false).await.unwrap();
            drive.reset_all().await.unwrap();
            test(drive).await;
        });
    }
}

fn on_simulated<F>(test: impl FnOnce(NvmeDrive, Arc<Simulated>) -> F)
where
    F: Future<Output = ()>,
{
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    runtime.block_on(async {
        let (drive, namespace) = simulated().await;
        test(drive, namespace).await;
    });
}

async fn simulated() -> (NvmeDrive, Arc<Simulated>) {
    let namespace = Simulated::new();
    let device = File::custom(namespace.clone());
    let kernel = KernelLimits {
        max_transfer: 1 << 20,
        max_segments: 64,
    };
    let drive = NvmeDrive::new(PathBuf::from("simulated"), device, 1, false, kernel).await;
    (drive.unwrap(), namespace)
}

fn data(len: u64, seed: u8) -> IoBuf {
    IoBuf::from_vec((0..len).map(|i| seed ^ (i as u8) ^ ((i >> 12) as u8)).collect())
}

async fn read(drive: &NvmeDrive, offset: u64, len: u64) -> Vec<u8> {
    let buf = IoBuf::alloc(len as usize);
    drive.file().read(buf.clone(), offset).await.unwrap();
    buf.to_vec()
}

async fn write(drive: &NvmeDrive, offset: u64, len: u64, seed: u8) -> Result<(), Error> {
    let written = drive.file().write(data(len, seed), offset).await;
    written.map_err(|error| Error::io("write", &error))
}

async fn zone(drive: &NvmeDrive, number: u64) -> ZoneInfo {
    as_nvme_cli_has_it(drive).await;
    drive.report(number * ZONE, 1).await.unwrap()[0]
}

async fn op(drive: &NvmeDrive, op: ZoneOp, number: u64) -> Result<(), Error> {
    let result = drive.zone_op(op, number * ZONE, ZONE).await;
    as_nvme_cli_has_it(drive).await;
    result
}

/// Holds the report of a real namespace against nvme-cli's.
async fn as_nvme_cli_has_it(drive: &NvmeDrive) {
    let path = &drive.facts().path;
    if path.starts_with("/dev") {
        let ours = drive.report(0, ZONES as usize).await.unwrap();
        reported::same_zones(&ours, path, BLOCK as u32).unwrap();
    }
}

/// Runs futures side by side.
async fn all<T>(futures: Vec<impl Future<Output = T>>) -> Vec<T> {
    let mut running: Vec<_> = futures
        .into_iter()
        .map(|future| (Some(Box::pin(future)), None))
        .collect();
    poll_fn(|cx| {
        let mut pending = false;
        for (future, result) in &mut running {
            if let Some(running) = future {
                match Pin::new(running).poll(cx) {
                    Poll::Ready(value) => (*future, *result) = (None, Some(value)),
                    Poll::Pending => pending = true,
                }
            }
        }
        if pending { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    running.into_iter().filter_map(|(_, result)| result).collect()
}

const CLOSE: ZoneOp = ZoneOp::Close(CloseEmpty::ToClosed);

#[test]
fn facts_are_those_of_the_namespace() {
    on_each(|drive| async move {
        let facts = drive.facts();
        assert_eq!((facts.size, facts.block_size), (ZONES * ZONE, BLOCK as u32));
        assert_eq!(
            (facts.zones.zone_size, facts.zones.nr_zones),
            (ZONE, ZONES as u32)
        );
        assert_eq!(
            (facts.zones.max_open, facts.zones.max_active),
            (MAX_OPEN, MAX_ACTIVE)
        );
        assert_eq!(facts.zones.max_append, 4096 << ZASL);
        let namespace = drive.namespace();
        assert_eq!(namespace.max_transfer, 4096 << MDTS);
        assert_eq!(namespace.extension_size, 64);
        let zrwa = namespace.zrwa.unwrap();
        assert_eq!(
            (zrwa.size, zrwa.granularity, zrwa.explicit_flush),
            (16 * BLOCK, 4 * BLOCK, true)
        );
    });
}

#[test]
fn a_report_follows_every_operation() {
    on_each(|drive| async move {
        let zones = drive.report(0, 100).await.unwrap();
        assert_eq!(zones.len() as u64, ZONES);
        assert!(
            zones
                .iter()
                .all(|zone| zone.condition == Condition::Empty && zone.capacity == ROOM)
        );
        let second = drive.report(2 * ZONE - BLOCK, 2).await.unwrap();
        assert_eq!(second.iter().map(|zone| zone.zone.0).collect::<Vec<_>>(), [1, 2]);

        op(&drive, ZoneOp::Open, 1).await.unwrap();
        assert_eq!(zone(&drive, 1).await.condition, Condition::ExplicitlyOpen);
        op(&drive, CLOSE, 1).await.unwrap();
        assert_eq!(
            zone(&drive, 1).await.condition,
            Condition::Closed,
            "as ZNS has it"
        );
        write(&drive, ZONE, 3 * BLOCK, 1).await.unwrap();
        let written = zone(&drive, 1).await;
        assert_eq!(
            (written.condition, written.wp),
            (Condition::ImplicitlyOpen, ZONE + 3 * BLOCK)
        );
        op(&drive, ZoneOp::Finish, 1).await.unwrap();
        let full = zone(&drive, 1).await;
        assert_eq!((full.condition, full.wp), (Condition::Full, ZONE + ROOM));
        op(&drive, ZoneOp::Reset, 1).await.unwrap();
        let empty = zone(&drive, 1).await;
        assert_eq!((empty.condition, empty.wp), (Condition::Empty, ZONE));
        assert!(read(&drive, ZONE, 3 * BLOCK).await.iter().all(|byte| *byte == 0));
    });
}

#[test]
fn one_command_resets_all_zones() {
    on_each(|drive| async move {
        for number in [0, 3, 7] {
            write(&drive, number * ZONE, BLOCK, 1).await.unwrap();
        }
        op(&drive, ZoneOp::Finish, 3).await.unwrap();
        drive.reset_all().await.unwrap();
        let zones = drive.report(0, 100).await.unwrap();
        assert!(zones.iter().all(|zone| zone.condition == Condition::Empty));
    });
}

#[test]
fn what_is_written_is_read_however_many_commands_it_takes() {
    on_each(|drive| async move {
        let len = (4096 << MDTS) * 2 + 5 * BLOCK;
        write(&drive, 0, len, 0x5a).await.unwrap();
        assert_eq!(zone(&drive, 0).await.wp, len);
        assert_eq!(read(&drive, 0, len).await, data(len, 0x5a).to_vec());
        assert_eq!(
            read(&drive, BLOCK, BLOCK).await,
            data(len, 0x5a).to_vec()[4096..8192]
        );
        write(&drive, ZONE, BLOCK, 0x11).await.unwrap();
        let across = read(&drive, ZONE - BLOCK, 2 * BLOCK).await;
        assert_eq!(across[4096..], data(BLOCK, 0x11).to_vec());
        drive.file().datasync().await.unwrap();
    });
}

#[test]
fn memory_in_many_pieces_is_written_and_read_whole() {
    on_each(|drive| async move {
        // More pieces than a command takes, and none of them aligned.
        let whole = IoBuf::alloc(600 * 1024);
        let pieces = (0..512).map(|i| whole.slice(i * 1100 + 4..i * 1100 + 516));
        let pieces: Vec<IoBuf> = pieces.collect();
        let scattered = IoBuf::concat(pieces.clone());
        scattered.copy_from(&data(512 * 512, 0x77).to_vec());
        assert!(scattered.segments().len() > 100);
        drive.file().write(scattered.clone(), 0).await.unwrap();
        assert_eq!(read(&drive, 0, 512 * 512).await, data(512 * 512, 0x77).to_vec());
        scattered.fill(0..512 * 512, 0);
        drive.file().read(scattered.clone(), 0).await.unwrap();
        assert_eq!(scattered.to_vec(), data(512 * 512, 0x77).to_vec());
        // A few pieces go as they are.
        let few = IoBuf::concat(pieces[..8].to_vec());
        assert!(few.segments().len() > 1);
        drive.append(few, 2 * ZONE).await.unwrap();
        assert_eq!(read(&drive, 2 * ZONE, 4096).await, data(4096, 0x77).to_vec());
    });
}

#[test]
fn the_drive_places_appends_and_many_are_under_way() {
    on_each(|drive| async move {
        let appends = (0..40u8).map(|i| drive.append(data(BLOCK, i), ZONE)).collect();
        let mut places = Vec::new();
        for (i, place) in all(appends).await.into_iter().enumerate() {
            let place = place.unwrap();
            assert_eq!(read(&drive, place, BLOCK).await, data(BLOCK, i as u8).to_vec());
            places.push(place);
        }
        places.sort_unstable();
        assert_eq!(places, (0..40).map(|i| ZONE + i * BLOCK).collect::<Vec<_>>());
        assert_eq!(zone(&drive, 1).await.wp, ZONE + 40 * BLOCK);
        let most = data(4096 << ZASL, 9);
        assert_eq!(drive.append(most, ZONE).await.unwrap(), ZONE + 40 * BLOCK);
    });
}

#[test]
fn every_broken_rule_has_its_own_error() {
    on_each(|drive| async move {
        let zone_error = |result: Result<(), Error>| match result {
            Err(Error::Zone(error)) => error,
            other => panic!("{other:?} is not an error of zones"),
        };
        write(&drive, 0, 2 * BLOCK, 1).await.unwrap();
        assert_eq!(
            zone_error(write(&drive, 5 * BLOCK, BLOCK, 1).await),
            ZoneError::NotAtWritePointer {
                zone: ZoneNo(0),
                offset: 5 * BLOCK,
                wp: 2 * BLOCK
            }
        );
        for at in (2 * BLOCK..ROOM - BLOCK).step_by(BLOCK as usize) {
            write(&drive, at, BLOCK, 1).await.unwrap();
        }
        assert_eq!(
            zone_error(write(&drive, ROOM - BLOCK, 2 * BLOCK, 1).await),
            ZoneError::ExceedsCapacity {
                zone: ZoneNo(0),
                offset: ROOM - BLOCK,
                len: 2 * BLOCK,
                end: ROOM
            }
        );
        write(&drive, ROOM - BLOCK, BLOCK, 1).await.unwrap();
        let full = ZoneError::Full { zone: ZoneNo(0) };
        assert_eq!(zone_error(write(&drive, 0, BLOCK, 1).await), full);
        assert_eq!(zone_error(drive.append(data(BLOCK, 1), 0).await.map(drop)), full);
        let condition = Condition::Full;
        assert_eq!(
            zone_error(op(&drive, ZoneOp::Open, 0).await),
            ZoneError::InvalidTransition {
                zone: ZoneNo(0),
                condition
            }
        );
        let condition = Condition::Empty;
        assert_eq!(
            zone_error(op(&drive, CLOSE, 1).await),
            ZoneError::InvalidTransition {
                zone: ZoneNo(1),
                condition
            }
        );
        for number in 1..=u64::from(MAX_OPEN) {
            op(&drive, ZoneOp::Open, number).await.unwrap();
        }
        assert_eq!(
            zone_error(op(&drive, ZoneOp::Open, 4).await),
            ZoneError::TooManyOpen { limit: MAX_OPEN }
        );
        for number in 1..=u64::from(MAX_ACTIVE) {
            op(&drive, ZoneOp::Open, number).await.unwrap();
            op(&drive, CLOSE, number).await.unwrap();
        }
        assert_eq!(
            zone_error(write(&drive, 7 * ZONE, BLOCK, 1).await),
            ZoneError::TooManyActive { limit: MAX_ACTIVE }
        );
        let range = drive.file().read(IoBuf::alloc(4096), ZONES * ZONE).await;
        assert!(range.is_err());
        // And not because everything is refused.
        op(&drive, ZoneOp::Reset, 0).await.unwrap();
        op(&drive, ZoneOp::Finish, 1).await.unwrap();
        write(&drive, 0, BLOCK, 1).await.unwrap();
    });
}

#[test]
fn an_append_that_no_command_can_carry_is_refused() {
    on_each(|drive| async move {
        for len in [0, 512, (4096 << ZASL) + BLOCK] {
            let error = drive.append(data(len, 1), ZONE).await.unwrap_err();
            assert_eq!(error.errno(), libc_einval(), "{len} bytes");
        }
        assert_eq!(zone(&drive, 1).await.condition, Condition::Empty);
        drive.append(data(BLOCK, 1), ZONE).await.unwrap();
    });
}

fn libc_einval() -> i32 {
    rustix::io::Errno::INVAL.raw_os_error()
}

#[test]
fn a_descriptor_extension_stays_until_the_reset() {
    on_each(|drive| async move {
        assert_eq!(drive.extension(3 * ZONE).await.unwrap(), None);
        drive
            .set_extension(3 * ZONE, b"a stripe of mine", false)
            .await
            .unwrap();
        let mut expected = b"a stripe of mine".to_vec();
        expected.resize(64, 0);
        assert_eq!(drive.extension(3 * ZONE).await.unwrap(), Some(expected));
        assert_eq!(zone(&drive, 3).await.condition, Condition::Closed);
        assert_eq!(drive.extension(2 * ZONE).await.unwrap(), None);
        assert!(matches!(
            drive.set_extension(3 * ZONE, b"another", false).await,
            Err(Error::Zone(ZoneError::InvalidTransition { .. }))
        ));
        assert_eq!(
            drive.set_extension(0, &[1; 65], false).await.unwrap_err().errno(),
            libc_einval()
        );
        op(&drive, ZoneOp::Reset, 3).await.unwrap();
        assert_eq!(drive.extension(3 * ZONE).await.unwrap(), None);
    });
}

#[test]
fn a_descriptor_extension_comes_with_an_area_both_or_neither() {
    on_simulated(|drive, _| async move {
        for number in [2, 3] {
            drive.set_extension(number * ZONE, b"mine", true).await.unwrap();
            let attributes = zone(&drive, number).await.attributes;
            assert!(attributes.extension && attributes.zrwa, "{attributes:?}");
        }
        assert_eq!(
            drive.set_extension(4 * ZONE, b"mine", true).await,
            Err(Error::Zone(ZoneError::NoRandomWriteArea { zone: ZoneNo(4) }))
        );
        assert_eq!(zone(&drive, 4).await.condition, Condition::Empty);
        drive.set_extension(4 * ZONE, b"mine", false).await.unwrap();
        assert!(!zone(&drive, 4).await.attributes.zrwa);
    });
}

#[test]
fn a_random_write_area_is_overwritten_until_it_is_flushed() {
    on_each(|drive| async move {
        op(&drive, ZoneOp::OpenZrwa, 2).await.unwrap();
        let at = 2 * ZONE;
        for (block, seed) in [(3, 1), (0, 2), (1, 3), (3, 4), (2, 5)] {
            write(&drive, at + block * BLOCK, BLOCK, seed).await.unwrap();
        }
        assert_eq!(zone(&drive, 2).await.wp, at, "nothing is committed");
        assert_eq!(read(&drive, at + 3 * BLOCK, BLOCK).await, data(BLOCK, 4).to_vec());
        drive.commit_zrwa(at + 4 * BLOCK).await.unwrap();
        assert_eq!(zone(&drive, 2).await.wp, at + 4 * BLOCK);
        assert!(matches!(
            write(&drive, at + BLOCK, BLOCK, 9).await,
            Err(Error::Zone(ZoneError::OutsideRandomWriteArea { .. }))
        ));
        assert_eq!(
            drive.append(data(BLOCK, 1), at).await.unwrap_err(),
            Error::Zone(ZoneError::RandomWriteArea { zone: ZoneNo(2) })
        );
        op(&drive, ZoneOp::OpenZrwa, 3).await.unwrap();
        assert_eq!(
            op(&drive, ZoneOp::OpenZrwa, 4).await.unwrap_err(),
            Error::Zone(ZoneError::NoRandomWriteArea { zone: ZoneNo(4) })
        );
        op(&drive, ZoneOp::Reset, 2).await.unwrap();
        op(&drive, ZoneOp::OpenZrwa, 4).await.unwrap();
    });
}

#[test]
fn a_namespace_conforms() {
    on_each(|drive| async move {
        let node = HostDeviceNode::open(Arc::new(drive)).await.unwrap();
        if let Err(broken) = conformance::run_on_drive(&Device::new(Arc::new(node))).await {
            panic!("{broken}");
        }
    });
}

#[test]
fn zones_that_broke_say_so() {
    on_simulated(|drive, namespace| async move {
        write(&drive, 0, BLOCK, 1).await.unwrap();
        namespace.break_zone(0, ZoneState::READ_ONLY);
        let read_only = ZoneError::ReadOnly { zone: ZoneNo(0) };
        assert_eq!(write(&drive, BLOCK, BLOCK, 1).await, Err(Error::Zone(read_only)));
        assert_eq!(read(&drive, 0, BLOCK).await, data(BLOCK, 1).to_vec());
        op(&drive, ZoneOp::SetOffline, 0).await.unwrap();
        let error = drive.file().read(IoBuf::alloc(4096), 0).await.unwrap_err();
        let offline = ZoneError::Offline { zone: ZoneNo(0) };
        assert_eq!(Error::io("read", &error), Error::Zone(offline));
        assert_eq!(zone(&drive, 0).await.condition, Condition::Offline);
    });
}

#[test]
fn a_flush_reaches_the_drive() {
    on_simulated(|drive, namespace| async move {
        drive.file().datasync().await.unwrap();
        assert_eq!(namespace.flushes(), 1);
    });
}

#[test]
fn a_namespace_that_is_not_ready_is_asked_again_but_not_for_ever() {
    on_simulated(|drive, namespace| async move {
        namespace.not_ready_for(2);
        write(&drive, 0, BLOCK, 1).await.unwrap();
        assert_eq!(zone(&drive, 0).await.wp, BLOCK);
        namespace.not_ready_for(u32::MAX);
        let error = drive.report(0, 1).await.unwrap_err();
        assert_eq!(error.errno(), rustix::io::Errno::IO.raw_os_error());
        namespace.not_ready_for(0);
        write(&drive, BLOCK, BLOCK, 1).await.unwrap();
    });
}

#[test]
fn a_namespace_without_zones_is_refused_with_the_reason() {
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    runtime.block_on(async {
        let device = File::custom(Simulated::new());
        let opened = NvmeDrive::new("it".into(), device, 2, false, KernelLimits::default()).await;
        let Err(OpenError::Data { problem, .. }) = opened.map(drop) else {
            panic!("it has no namespace 2")
        };
        assert_eq!(problem, "not a zoned namespace");
    });
}
