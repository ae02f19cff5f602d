//! Zoned images on real files: what a user of the library sees.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use zbdkit_block::{
    CreateError, CreateOptions, CrossZone, Device, Error, Graph, Host, OpenError, OpenOptions, OsHost,
    RunStateMode, ZoneOp, create, default_sidecar,
};
use zbdkit_io::{IoBuf, Runtime, RuntimeOptions};
use zbdkit_zone::{CloseEmpty, Condition, Filter, GeometryError, ZoneError, ZoneInfo};

const ZONE: u64 = 1 << 20;
const ZONES: u64 = 8;

struct Image {
    dir: tempfile::TempDir,
    runtime: Runtime,
}

impl Image {
    fn new() -> Image {
        Image::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut CreateOptions)) -> Image {
        let image = Image {
            dir: tempfile::tempdir().unwrap(),
            runtime: Runtime::new(RuntimeOptions::default()).unwrap(),
        };
        let mut options = CreateOptions::new(image.path(), ZONE * ZONES);
        options.zone_size = Some(ZONE);
        options.conventional_zones = 1;
        options.max_open = Some(3);
        options.max_active = 4;
        change(&mut options);
        image.runtime.block_on(create(&host(), &options)).unwrap();
        image
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("disk.raw")
    }

    fn sidecar(&self) -> PathBuf {
        default_sidecar(&self.path())
    }

    fn run_state(&self) -> PathBuf {
        self.dir.path().join("disk.raw.zones.run")
    }

    fn open_with(&self, options: OpenOptions) -> Result<Device, OpenError> {
        let options = OpenOptions {
            lock_wait: Duration::ZERO,
            ..options
        };
        self.runtime
            .block_on(Graph::from_path(self.path()).open(&host(), &options))
    }

    fn open(&self) -> Device {
        self.open_with(OpenOptions::default()).unwrap()
    }

    fn open_error(&self) -> String {
        self.open_with(OpenOptions::default())
            .err()
            .expect("does not open")
            .to_string()
    }

    fn write(&self, device: &Device, offset: u64, byte: u8, len: usize) -> Result<(), Error> {
        let buf = IoBuf::from_vec(vec![byte; len]);
        self.runtime.block_on(device.write(&device.lane(4), buf, offset))
    }

    fn read(&self, device: &Device, offset: u64, len: usize) -> Vec<u8> {
        let buf = IoBuf::alloc(len);
        self.runtime
            .block_on(device.read(&device.lane(4), buf.clone(), offset, CrossZone::Allow))
            .unwrap();
        buf.to_vec()
    }

    fn op(&self, device: &Device, op: ZoneOp, zone: u64) -> Result<(), Error> {
        self.runtime
            .block_on(device.zone_op(&device.lane(4), op, zone * ZONE))
    }

    fn flush(&self, device: &Device) {
        self.runtime.block_on(device.flush(&device.lane(1))).unwrap();
    }

    fn zone(&self, device: &Device, zone: u64) -> ZoneInfo {
        self.runtime
            .block_on(device.report(zone * ZONE, Filter::All, 1))
            .unwrap()[0]
    }

    fn close(&self, device: Device) {
        self.runtime.block_on(device.close()).unwrap();
    }
}

fn host() -> Arc<dyn Host> {
    Arc::new(OsHost)
}

fn flip(path: &Path, offset: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[!byte[0]], offset).unwrap();
}

#[test]
fn zones_and_data_come_back_after_a_clean_close() {
    let image = Image::new();
    let device = image.open();
    image.write(&device, ZONE, 1, 8192).unwrap();
    image.write(&device, 2 * ZONE, 2, ZONE as usize).unwrap();
    image.write(&device, 3 * ZONE, 3, 4096).unwrap();
    image.op(&device, ZoneOp::Finish, 3).unwrap();
    image.write(&device, 4 * ZONE, 4, 4096).unwrap();
    image.op(&device, ZoneOp::Reset, 4).unwrap();
    image.op(&device, ZoneOp::Open, 5).unwrap();
    image.op(&device, ZoneOp::SetOffline, 6).unwrap();
    assert_eq!(image.zone(&device, 5).condition, Condition::ExplicitlyOpen);
    image.close(device);
    assert!(!image.run_state().exists());

    let device = image.open();
    assert!(device.notices().is_empty());
    let conditions: Vec<_> = (0..ZONES)
        .map(|zone| image.zone(&device, zone).condition)
        .collect();
    use Condition::*;
    assert_eq!(
        conditions,
        [NotWritePointer, Closed, Full, Full, Empty, Empty, Offline, Empty]
    );
    assert_eq!(image.zone(&device, 1).wp, ZONE + 8192);
    assert_eq!(image.zone(&device, 3).written_end, 3 * ZONE + 4096);
    assert_eq!(
        (
            image.zone(&device, 4).counters.resets,
            image.zone(&device, 3).counters.finishes
        ),
        (1, 1)
    );
    assert_eq!(image.read(&device, ZONE, 8192), [1; 8192]);
    assert_eq!(image.read(&device, 3 * ZONE + 4096, 4096), [0; 4096]);
    image.write(&device, ZONE + 8192, 9, 4096).unwrap();
}

#[test]
fn an_acknowledged_write_outlives_the_process() {
    let tmpfs = tempfile::tempdir_in("/dev/shm").unwrap();
    for run_state in [
        RunStateMode::Beside,
        RunStateMode::Sync,
        RunStateMode::In(tmpfs.path().into()),
    ] {
        let image = Image::new();
        let device = image
            .open_with(OpenOptions {
                run_state: run_state.clone(),
                ..Default::default()
            })
            .unwrap();
        image.write(&device, ZONE, 1, 12288).unwrap();
        image.write(&device, 2 * ZONE, 2, 4096).unwrap();
        image.op(&device, ZoneOp::Reset, 2).unwrap();
        image.write(&device, 3 * ZONE, 3, 4096).unwrap();
        image.op(&device, ZoneOp::Finish, 3).unwrap();
        // Not closed: as if killed.
        drop(device);

        let device = image.open();
        assert!(
            device.notices().is_empty(),
            "{run_state:?}: {:?}",
            device.notices()
        );
        assert_eq!(image.zone(&device, 1).wp, ZONE + 12288, "{run_state:?}");
        assert_eq!(image.zone(&device, 1).counters.bytes_written, 12288);
        assert_eq!(image.zone(&device, 2).condition, Condition::Empty);
        assert_eq!(image.zone(&device, 3).condition, Condition::Full);
        assert_eq!(image.read(&device, ZONE, 12288), [1; 12288]);
        image.close(device);
    }
    // The last opening kept its run state elsewhere, and took the one that it had recovered from away.
    assert_eq!(fs::read_dir(tmpfs.path()).unwrap().count(), 0);
}

#[test]
fn without_its_run_state_an_unclosed_image_keeps_what_was_flushed_and_says_so() {
    let image = Image::new();
    let device = image.open();
    image.write(&device, ZONE, 1, 4096).unwrap();
    image.flush(&device);
    image.write(&device, ZONE + 4096, 1, 4096).unwrap();
    drop(device);
    fs::remove_file(image.run_state()).unwrap();
    let device = image.open();
    assert_eq!(image.zone(&device, 1).wp, ZONE + 4096);
    assert!(device.notices()[0].contains("epoch 1"), "{:?}", device.notices());
    // What lies above the pointer is not shown.
    assert_eq!(image.read(&device, ZONE + 4096, 4096), [0; 4096]);
    image.close(device);
}

#[test]
fn a_run_state_of_another_time_is_not_believed() {
    let image = Image::new();
    let device = image.open();
    image.write(&device, ZONE, 1, 4096).unwrap();
    drop(device);
    // As after a restart of the machine: another boot id.
    flip(&image.run_state(), 20);
    let device = image.open();
    assert_eq!(image.zone(&device, 1).condition, Condition::Empty);
    assert!(
        device.notices()[0].contains("run state cannot be used"),
        "{:?}",
        device.notices()
    );
    image.close(device);
}

#[test]
fn writes_obey_the_zones_and_data_is_read_below_the_pointer_only() {
    let image = Image::new();
    let device = image.open();
    let not_at_wp = image.write(&device, ZONE + 4096, 1, 4096).unwrap_err();
    assert!(
        matches!(not_at_wp, Error::Zone(ZoneError::NotAtWritePointer { .. })),
        "{not_at_wp}"
    );
    let unaligned = image.write(&device, ZONE, 1, 512).unwrap_err();
    assert!(matches!(unaligned, Error::Unaligned { .. }), "{unaligned}");
    let outside = image.write(&device, ZONE * ZONES, 1, 4096).unwrap_err();
    assert!(matches!(outside, Error::OutOfRange { .. }), "{outside}");
    image.write(&device, ZONE, 7, 4096).unwrap();
    let mut expected = vec![7; 4096];
    expected.extend([0; 4096]);
    assert_eq!(image.read(&device, ZONE, 8192), expected);
    image.write(&device, 4096, 5, 8192).unwrap();
    assert_eq!(image.read(&device, 0, 16384)[4096..12288], [5; 8192]);
    image.close(device);
}

#[test]
fn reads_across_zones_are_the_protocols_choice() {
    let image = Image::new();
    let device = image.open();
    image.write(&device, ZONE, 1, ZONE as usize).unwrap();
    image.write(&device, 2 * ZONE, 2, 4096).unwrap();
    let lane = device.lane(1);
    let refused = device.read(&lane, IoBuf::alloc(8192), 2 * ZONE - 4096, CrossZone::Refuse);
    assert!(matches!(
        image.runtime.block_on(refused),
        Err(Error::Zone(ZoneError::Boundary { .. }))
    ));
    let read = image.read(&device, 2 * ZONE - 4096, 12288);
    assert_eq!((read[0], read[4096], read[8192]), (1, 2, 0));
}

#[test]
fn open_and_active_limits_hold() {
    let image = Image::new();
    let device = image.open();
    (1..4).for_each(|zone| image.op(&device, ZoneOp::Open, zone).unwrap());
    assert!(matches!(
        image.op(&device, ZoneOp::Open, 4),
        Err(Error::Zone(ZoneError::TooManyOpen { limit: 3 }))
    ));
    image.write(&device, ZONE, 1, 4096).unwrap();
    image.op(&device, ZoneOp::Close(CloseEmpty::ToEmpty), 1).unwrap();
    image.write(&device, 4 * ZONE, 1, 4096).unwrap();
    let active = image.write(&device, 5 * ZONE, 1, 4096).unwrap_err();
    assert!(
        matches!(active, Error::Zone(ZoneError::TooManyActive { limit: 4 })),
        "{active}"
    );
    image.close(device);
}

#[test]
fn reset_gives_the_space_back_and_reset_all_spares_what_cannot_be_reset() {
    let image = Image::new();
    let device = image.open();
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&fs::metadata(image.path()).unwrap());
    (1..4).for_each(|zone| image.write(&device, zone * ZONE, 1, ZONE as usize).unwrap());
    image.op(&device, ZoneOp::SetReadOnly, 3).unwrap();
    let before = blocks();
    image.runtime.block_on(device.reset_all(&device.lane(1))).unwrap();
    assert!(
        before - blocks() >= 2 * ZONE / 512 - 64,
        "{before} blocks before, {} after",
        blocks()
    );
    use Condition::*;
    let conditions: Vec<_> = (1..4).map(|zone| image.zone(&device, zone).condition).collect();
    assert_eq!(conditions, [Empty, Empty, ReadOnly]);
    assert_eq!(image.read(&device, ZONE, 4096), [0; 4096]);
    assert_eq!(image.read(&device, 3 * ZONE, 4096), [1; 4096]);
    image.close(device);
}

#[test]
fn many_appends_in_flight_get_addresses_of_their_own() {
    let image = Image::new();
    let device = image.open();
    let lane = device.lane(32);
    let offsets = image.runtime.block_on(async {
        let appends = (0..32u8).map(|i| device.append(&lane, IoBuf::from_vec(vec![i; 4096]), ZONE));
        futures_join(appends.collect()).await
    });
    let mut sorted: Vec<u64> = offsets.iter().map(|offset| *offset.as_ref().unwrap()).collect();
    for (i, offset) in sorted.iter().enumerate() {
        assert_eq!(image.read(&device, *offset, 4096), [i as u8; 4096]);
    }
    sorted.sort_unstable();
    assert_eq!(sorted, (0..32).map(|i| ZONE + i * 4096).collect::<Vec<_>>());
    image.close(device);
}

/// Polls all of them until each is done.
async fn futures_join<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut futures: Vec<_> = futures.into_iter().map(|f| (Box::pin(f), None)).collect();
    std::future::poll_fn(move |cx| {
        for (future, output) in futures.iter_mut().filter(|(_, output)| output.is_none()) {
            if let std::task::Poll::Ready(value) = future.as_mut().poll(cx) {
                *output = Some(value);
            }
        }
        if futures.iter().all(|(_, output)| output.is_some()) {
            std::task::Poll::Ready(
                futures
                    .iter_mut()
                    .map(|(_, output)| output.take().unwrap())
                    .collect(),
            )
        } else {
            std::task::Poll::Pending
        }
    })
    .await
}

#[test]
fn one_damaged_copy_is_made_good_and_two_are_refused() {
    let image = Image::new();
    let device = image.open();
    image.write(&device, ZONE, 1, 4096).unwrap();
    image.flush(&device);
    image.write(&device, ZONE + 4096, 1, 4096).unwrap();
    image.close(device);
    // The older copy of block 0 (generation 1), and one of the header's.
    flip(&image.sidecar(), 8192 + 4096 + 80);
    flip(&image.sidecar(), 4096 + 40);
    let device = image.open();
    assert_eq!(image.zone(&device, 1).wp, ZONE + 8192);
    assert_eq!(device.notices().len(), 2, "{:?}", device.notices());
    image.close(device);
    flip(&image.sidecar(), 8192 + 80);
    let error = image.open_error();
    assert!(
        error.contains("both copies of zone table block 0 (zones 0 to 7) are damaged"),
        "{error}"
    );
    flip(&image.sidecar(), 41);
    flip(&image.sidecar(), 4096 + 41);
    let error = image.open_error();
    assert!(error.contains("both copies of the header are damaged"), "{error}");
}

#[test]
fn a_copy_that_a_power_cut_has_torn_is_whole_again_when_its_epoch_ends() {
    let image = Image::new();
    let without_run_state = || OpenOptions {
        run_state: RunStateMode::None,
        ..OpenOptions::default()
    };
    let device = image.open_with(without_run_state()).unwrap();
    for block in 0..2 {
        image.write(&device, ZONE + block * 4096, 1, 4096).unwrap();
        image.flush(&device);
    }
    drop(device);
    // The older copy of block 0 (generation 1): the flush that the cut came into was about to write it.
    flip(&image.sidecar(), 8192 + 4096 + 80);
    let device = image.open_with(without_run_state()).unwrap();
    assert!(
        device.notices()[0].contains("one copy of zone table block 0"),
        "{:?}",
        device.notices()
    );
    image.close(device);
    let device = image.open();
    assert!(device.notices().is_empty(), "{:?}", device.notices());
    assert_eq!(image.zone(&device, 1).wp, ZONE + 8192);
    image.close(device);
}

#[test]
fn a_lost_newest_copy_of_a_cleanly_closed_image_is_noticed() {
    let image = Image::new();
    let device = image.open();
    image.write(&device, ZONE, 1, 4096).unwrap();
    image.flush(&device);
    image.write(&device, ZONE + 4096, 1, 4096).unwrap();
    image.close(device);
    // Generation 2 is in copy 0; without it, generation 1 looks intact but is old.
    flip(&image.sidecar(), 8192 + 80);
    let error = image.open_error();
    assert!(error.contains("newest state"), "{error}");
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let image = Image::new();
    let mut options = CreateOptions::new(image.dir.path().join("other"), ZONE * ZONES);
    options.zone_size = Some(ZONE);
    let other = image.runtime.block_on(create(&host(), &options)).unwrap();
    fs::rename(image.sidecar(), image.dir.path().join("aside")).unwrap();
    let error = image.open_error();
    assert!(
        error.contains("its zone table") && error.contains("missing"),
        "{error}"
    );
    fs::copy(other.sidecar, image.sidecar()).unwrap();
    let error = image.open_error();
    assert!(error.contains("belongs to another image"), "{error}");
    fs::rename(image.dir.path().join("aside"), image.sidecar()).unwrap();

    fs::OpenOptions::new()
        .write(true)
        .open(image.path())
        .unwrap()
        .set_len(ZONE * 3)
        .unwrap();
    let error = image.open_error();
    assert!(
        error.contains("3145728 bytes") && error.contains("truncated"),
        "{error}"
    );
    fs::OpenOptions::new()
        .write(true)
        .open(image.path())
        .unwrap()
        .set_len(ZONE * ZONES)
        .unwrap();
    fs::OpenOptions::new()
        .write(true)
        .open(image.sidecar())
        .unwrap()
        .set_len(9000)
        .unwrap();
    let error = image.open_error();
    assert!(error.contains("truncated"), "{error}");
}

#[test]
fn a_second_opener_is_told_who_has_the_image() {
    let image = Image::new();
    let device = image.open();
    let error = image.open_error();
    assert!(error.contains("failed to get \"write\" lock"), "{error}");
    assert!(
        image
            .open_with(OpenOptions {
                read_only: true,
                ..Default::default()
            })
            .is_err()
    );
    let peek = image
        .open_with(OpenOptions {
            read_only: true,
            force_share: true,
            ..Default::default()
        })
        .unwrap();
    assert!(matches!(image.write(&peek, ZONE, 1, 4096), Err(Error::ReadOnly)));
    drop(peek);
    image.close(device);
    image.open();
}

#[test]
fn impossible_zones_are_not_created() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    let attempt = |change: fn(&mut CreateOptions)| {
        let mut options = CreateOptions::new(dir.path().join("x"), 8 << 20);
        options.zone_size = Some(1 << 20);
        change(&mut options);
        let error = runtime.block_on(create(&host(), &options)).unwrap_err();
        assert!(!dir.path().join("x").exists());
        error
    };
    let geometry = |change| match attempt(change) {
        CreateError::Geometry(error) => error,
        error => panic!("{error}"),
    };
    assert!(matches!(
        geometry(|o| o.zone_size = Some(0)),
        GeometryError::ZoneSizeZero
    ));
    assert!(matches!(
        geometry(|o| o.zone_size = Some(1000)),
        GeometryError::ZoneSizeSectors(1000)
    ));
    assert!(matches!(
        geometry(|o| o.zone_size = Some(16 << 20)),
        GeometryError::ZoneSizeTooBig { .. }
    ));
    geometry(|o| o.zone_capacity = Some(2 << 20));
    geometry(|o| {
        o.max_open = Some(5);
        o.max_active = 4;
    });
}

#[test]
fn an_existing_image_is_replaced_only_by_force() {
    let image = Image::new();
    let mut options = CreateOptions::new(image.path(), 4 << 20);
    options.zone_size = Some(ZONE);
    let error = image.runtime.block_on(create(&host(), &options)).unwrap_err();
    assert!(
        matches!(&error, CreateError::Exists(path) if *path == image.path()),
        "{error}"
    );
    assert_eq!(image.open().limits().size, ZONE * ZONES);
    options.force = true;
    image.runtime.block_on(create(&host(), &options)).unwrap();
    assert_eq!(image.open().limits().size, 4 << 20);
}

#[test]
fn zones_over_memory_need_no_files() {
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    let text = "driver=zoned,zone.size=64M,zone.max_open_zones=2,file.driver=memory,file.size=1T";
    runtime.block_on(async {
        let device = Graph::parse(text)
            .unwrap()
            .open(&host(), &OpenOptions::default())
            .await
            .unwrap();
        assert_eq!(device.limits().zoned.as_ref().unwrap().nr_zones(), 16384);
        let lane = device.lane(1);
        device
            .write(&lane, IoBuf::from_vec(vec![3; 4096]), 1 << 39)
            .await
            .unwrap();
        let buf = IoBuf::alloc(8192);
        device
            .read(&lane, buf.clone(), 1 << 39, CrossZone::Refuse)
            .await
            .unwrap();
        assert_eq!(buf.to_vec()[4095..4097], [3, 0]);
        device.flush(&lane).await.unwrap();
        device.close().await.unwrap();
    });
}

#[test]
fn unknown_drivers_and_options_are_named_with_the_near_one() {
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    let error = |text: &str| -> String {
        let graph = Graph::parse(text)
            .and_then(|graph| runtime.block_on(graph.open(&host(), &OpenOptions::default())));
        graph.err().unwrap().to_string()
    };
    let memroy = error("driver=memroy,size=1M");
    assert!(memroy.contains("did you mean \"memory\"?"), "{memroy}");
    assert!(error("driver=memory,sise=1M,size=1M").contains("did you mean \"size\"?"));
    assert!(
        error("driver=raw,file.driver=flie,file.filename=x").contains("file.driver \"flie\" is not known")
    );
    assert!(error("driver=memory,size=many").contains("size=many is not a size"));
    assert!(error("driver=zoned,file.driver=memory,file.size=1M").contains("zone.size is missing"));
}

#[test]
fn direct_io_carries_data_and_table() {
    let image = Image::new();
    let device = match image.open_with(OpenOptions {
        direct: true,
        ..Default::default()
    }) {
        Ok(device) => device,
        Err(error) => {
            println!("skipped: the temporary directory's file system has no direct I/O ({error})");
            return;
        }
    };
    image.write(&device, ZONE, 6, 8192).unwrap();
    image.flush(&device);
    image.op(&device, ZoneOp::Finish, 1).unwrap();
    assert_eq!(image.read(&device, ZONE, 12288)[8190..8194], [6, 6, 0, 0]);
    image.close(device);
    assert_eq!(image.zone(&image.open(), 1).condition, Condition::Full);
}

#[test]
fn a_host_aware_image_is_written_like_a_disk_across_zones_and_with_gaps() {
    let image = Image::with(|options| options.model = zbdkit_zone::Model::HostAware);
    let device = image.open();
    image.write(&device, ZONE - 4096, 1, 8192).unwrap();
    image.write(&device, 2 * ZONE - 4096, 2, 12288).unwrap();
    assert_eq!(image.zone(&device, 1).condition, Condition::Full);
    assert_eq!(image.zone(&device, 2).wp, 2 * ZONE + 8192);
    // The skipped part of zone 1 reads as zeros, below its pointer too.
    let data = image.read(&device, ZONE, ZONE as usize + 8192);
    assert_eq!(
        (
            data[0],
            data[4096],
            data[ZONE as usize - 4097],
            data[ZONE as usize]
        ),
        (1, 0, 0, 2)
    );
    let zeroes = device.lane(1);
    image
        .runtime
        .block_on(device.write_zeroes(&zeroes, 2 * ZONE - 4096, 8192, true))
        .unwrap();
    assert_eq!(image.read(&device, 2 * ZONE - 4096, 8192), [0; 8192]);
    image.close(device);
}
