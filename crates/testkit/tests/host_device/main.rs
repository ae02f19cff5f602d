//! The node `host_device` over a drive in memory that judges each write when it arrives: order, errors, what others do to the
//! drive, windows.

mod errors;
mod order;
mod place;
mod window;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use zbdkit_block::host_device::{Drive, HostDeviceNode};
use zbdkit_block::{Device, Error, Graph, Host, Lane, OpenOptions, OsHost, tool};
use zbdkit_io::{Backend, IoBuf, Runtime, RuntimeOptions, yield_now};
use zbdkit_testkit::conformance;
use zbdkit_testkit::drive::FakeDrive;
use zbdkit_zone::{GeometrySpec, Model, Zns, ZoneNo, Zrwa};

const BLOCK: u64 = 4096;
const ZONE: u64 = 1 << 20;
const CAPACITY: u64 = 768 << 10;

const SPEC: GeometrySpec = GeometrySpec {
    model: Model::HostManaged,
    size: 8 * ZONE,
    zone_size: ZONE,
    zone_capacity: CAPACITY,
    nr_conventional: 2,
    block_size: BLOCK as u32,
    max_open: 3,
    max_active: 4,
    max_append: 64 << 10,
    zns: Zns::NONE,
};

/// The same with two areas of eight blocks, and granules of two.
const WITH_AREAS: GeometrySpec = GeometrySpec {
    zns: Zns {
        zrwa: Some(Zrwa {
            size: 8 * BLOCK,
            granularity: 2 * BLOCK,
            count: 2,
            explicit_commit: true,
        }),
        extension_size: 0,
    },
    ..SPEC
};

/// The first sequential zone, and the one after it.
const FIRST: ZoneNo = ZoneNo(2);
const SECOND: ZoneNo = ZoneNo(3);
const START: u64 = 2 * ZONE;

fn drive(append: bool, seed: u64) -> Arc<FakeDrive> {
    Arc::new(FakeDrive::new(SPEC, append, seed))
}

async fn open(drive: &Arc<FakeDrive>) -> Device {
    let drive: Arc<dyn Drive> = drive.clone();
    Device::new(Arc::new(HostDeviceNode::open(drive).await.unwrap()))
}

fn runtime() -> Runtime {
    let options = RuntimeOptions {
        backend: Backend::Threads,
        busy_poll: Duration::ZERO,
        ..RuntimeOptions::default()
    };
    Runtime::new(options).unwrap()
}

/// Runs a test on a drive that is opened for it.
fn with<T>(drive: &Arc<FakeDrive>, test: impl AsyncFnOnce(&Device, &Lane) -> T) -> T {
    runtime().block_on(async {
        let device = open(drive).await;
        let lane = device.lane(64);
        let result = test(&device, &lane).await;
        lane.quiet().await;
        result
    })
}

fn filled(byte: u8, len: u64) -> IoBuf {
    let buf = IoBuf::alloc(len as usize);
    buf.fill(0..len as usize, byte);
    buf
}

async fn write(device: &Device, lane: &Lane, offset: u64, len: u64, byte: u8) -> Result<(), Error> {
    device.write(lane, filled(byte, len), offset).await
}

async fn append(device: &Device, lane: &Lane, zone: ZoneNo, len: u64, byte: u8) -> Result<u64, Error> {
    device
        .append(lane, filled(byte, len), u64::from(zone.0) * ZONE)
        .await
}

async fn wp(device: &Device, zone: ZoneNo) -> u64 {
    let zones = device
        .report(u64::from(zone.0) * ZONE, zbdkit_zone::Filter::All, 1)
        .await;
    zones.unwrap()[0].wp
}

/// Runs all futures at once and gives their results in their order.
async fn all<T>(futures: Vec<impl Future<Output = T>>) -> Vec<T> {
    let mut futures: Vec<_> = futures.into_iter().map(Box::pin).collect();
    let mut results: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    std::future::poll_fn(|cx| {
        for (future, result) in futures.iter_mut().zip(&mut results) {
            if result.is_none()
                && let Poll::Ready(value) = future.as_mut().poll(cx)
            {
                *result = Some(value);
            }
        }
        match results.iter().all(Option::is_some) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
    results.into_iter().flatten().collect()
}

/// Polls a future once.
async fn begin<F: Future>(future: &mut std::pin::Pin<&mut F>) -> Option<F::Output> {
    std::future::poll_fn(|cx| {
        Poll::Ready(match future.as_mut().poll(cx) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        })
    })
    .await
}

/// Lets others go on until something is so.
async fn until(mut so: impl FnMut() -> bool) {
    while !so() {
        yield_now().await;
    }
}

#[test]
fn a_drive_conforms_whoever_places_appends() {
    for place in [false, true] {
        with(&drive(place, 1), async |device, _| {
            if let Err(broken) = conformance::run_on_drive(device).await {
                panic!("{broken}");
            }
        });
    }
}

#[test]
fn a_drive_with_areas_conforms_whatever_the_way_there_does() {
    for place in [false, true] {
        for seed in 0..4 {
            let drive = Arc::new(FakeDrive::new(WITH_AREAS, place, seed));
            with(&drive, async |device, _| {
                if let Err(broken) = conformance::run_on_drive(device).await {
                    panic!("{broken}");
                }
            });
        }
    }
}

#[test]
fn requests_that_are_dropped_leave_the_line_and_nobody_hangs() {
    let drive = drive(false, 2);
    with(&drive, async |device, lane| {
        drive.hold(Some(FIRST));
        let mut first = pin!(write(device, lane, START, BLOCK, 1));
        assert!(begin(&mut first).await.is_none());
        until(|| drive.is_writing(FIRST)).await;
        let mut third = pin!(write(device, lane, START + 2 * BLOCK, BLOCK, 3));
        {
            let mut second = pin!(write(device, lane, START + BLOCK, BLOCK, 2));
            assert!(begin(&mut second).await.is_none());
            assert!(begin(&mut third).await.is_none());
        }
        drive.hold(None);
        first.await.unwrap();
        // What was to continue the one that left is not at the pointer.
        assert!(matches!(
            third.await,
            Err(Error::Zone(zbdkit_zone::ZoneError::NotAtWritePointer { .. }))
        ));
        write(device, lane, START + BLOCK, BLOCK, 4).await.unwrap();
        assert_eq!(wp(device, FIRST).await, START + 2 * BLOCK);
    });
}

#[test]
fn a_thread_that_ends_with_a_write_under_way_leaves_the_zone_to_others() {
    let drive = drive(false, 3);
    let device = runtime().block_on(open(&drive));
    drive.hold(Some(FIRST));
    std::thread::scope(|scope| {
        let theirs = device.clone();
        scope
            .spawn(move || {
                runtime().block_on(async {
                    let lane = theirs.lane(8);
                    let mut cut = pin!(write(&theirs, &lane, START, BLOCK, 1));
                    assert!(begin(&mut cut).await.is_none());
                    // Its turn has come once others have.
                    yield_now().await;
                    yield_now().await;
                });
            })
            .join()
            .unwrap();
    });
    drive.hold(None);
    runtime().block_on(async {
        let lane = device.lane(8);
        // A storage of a test does not go on once its thread is gone: the write never arrived.
        assert_eq!(append(&device, &lane, FIRST, BLOCK, 2).await.unwrap(), START);
        lane.quiet().await;
    });
}

#[test]
fn a_copy_neither_sets_a_drives_zones_nor_makes_some_up() {
    let drive = drive(false, 4);
    with(&drive, async |device, _| {
        let host: Arc<dyn Host> = Arc::new(OsHost);
        let memory = async |graph: &str| {
            let graph = Graph::parse(graph).unwrap();
            graph.open(&host, &OpenOptions::default()).await.unwrap()
        };
        let plain = memory("driver=memory,size=8M").await;
        let zoned = memory("driver=zoned,zone.size=1M,file.driver=memory,file.size=8M").await;
        let copy = async |from: &Device, to: &Device| {
            let result = tool::copy(from, to, &tool::CopyOptions::default(), &|_, _| {}).await;
            result.map_err(|error| error.to_string())
        };
        assert!(
            copy(&plain, device)
                .await
                .unwrap_err()
                .contains("not set by a copy")
        );
        assert!(
            copy(device, &zoned)
                .await
                .unwrap_err()
                .contains("only its contents")
        );
        copy(device, &plain).await.unwrap();
    });
}
