//! Requests beside one with which the epoch fails: each gets an answer, and leaves nothing that a later epoch would believe.

mod crash_support;

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

use crash_support::{SEED, host_aware, zoned_namespace};
use zbdkit_block::{CreateOptions, Device, Error, RunStateMode, ZoneOp};
use zbdkit_io::{IoBuf, spawn};
use zbdkit_testkit::crash::choose::mix;
use zbdkit_testkit::crash::disk::{Disk, Event};
use zbdkit_testkit::crash::host::{Behaviour, Fault, FaultKind, Machine, Role};
use zbdkit_testkit::crash::image::Image;
use zbdkit_testkit::crash::run::{drive, open};
use zbdkit_testkit::crash::suite::runtime;

const ZONE: u64 = 64 << 10;
const HISTORIES: u64 = 60;
const EIO: i32 = 5;

type Request = Pin<Box<dyn Future<Output = Result<(), Error>>>>;

/// The requests at once, begun in this order; what became of them.
async fn at_once(requests: Vec<Request>) -> Vec<Result<(), Error>> {
    let left = Rc::new(Cell::new(requests.len()));
    let results: Rc<RefCell<Vec<_>>> = Rc::new(RefCell::new(requests.iter().map(|_| None).collect()));
    for (number, request) in requests.into_iter().enumerate() {
        let (left, results) = (left.clone(), results.clone());
        spawn(async move {
            let result = request.await;
            results.borrow_mut()[number] = Some(result);
            left.set(left.get() - 1);
        });
    }
    poll_fn(|_| match left.get() {
        0 => Poll::Ready(()),
        _ => Poll::Pending,
    })
    .await;
    results.take().into_iter().flatten().collect()
}

fn write(device: &Device, offset: u64, len: usize) -> Request {
    let device = device.clone();
    Box::pin(async move {
        let buf = IoBuf::from_vec(vec![0x77; len]);
        device.write(&device.lane(1), buf, offset).await
    })
}

fn flush(device: &Device) -> Request {
    let device = device.clone();
    Box::pin(async move { device.flush(&device.lane(1)).await })
}

fn reset(device: &Device, zone: u64) -> Request {
    let device = device.clone();
    Box::pin(async move { device.zone_op(&device.lane(1), ZoneOp::Reset, zone * ZONE).await })
}

fn attach(device: &Device, zone: u64, tag: u8) -> Request {
    let device = device.clone();
    Box::pin(async move {
        let lane = device.lane(1);
        device
            .set_extension(&lane, zone * ZONE, &[tag; 1024], false)
            .await
    })
}

/// A new image on a machine on which the sync of the table after `after` others fails, if there is one; `before` is done before
/// that counts, `work` afterwards. The machine after it.
fn run(
    zones: CreateOptions,
    after: Option<u64>,
    seed: u64,
    before: impl AsyncFn(&Device),
    work: impl AsyncFn(&Device) -> Vec<Result<(), Error>>,
    verify: impl AsyncFn(&Device),
) -> (Machine, Vec<Result<(), Error>>) {
    let runtime = runtime();
    let fault = after.map(|after| Fault {
        role: Role::Table,
        kind: FaultKind::Sync,
        after,
        errno: EIO,
    });
    let behaviour = Behaviour {
        fault,
        ..Behaviour::default()
    };
    let machine = Machine::new(Disk::default(), behaviour, seed);
    let host = machine.host();
    let (path, results) = drive(&runtime, &machine, async {
        let path = Image::from(zones).create(&host, "disk").await.unwrap();
        let device = open(&host, &path, &RunStateMode::default()).await.unwrap();
        before(&device).await;
        machine.arm();
        (path, work(&device).await)
    });
    assert_eq!(machine.fault_fired().is_some(), fault.is_some());
    // As a process finds it that comes after this one.
    let next = Machine::new(machine.disk(), Behaviour::default(), seed);
    drive(&runtime, &next, async {
        let device = open(&next.host(), &path, &RunStateMode::default()).await.unwrap();
        verify(&device).await;
    });
    (machine, results)
}

/// Of two writes that wait for a reset, each would leave a gap.
#[test]
fn writes_that_leave_gaps_end_when_the_epoch_fails_before_them() {
    for seed in 0..HISTORIES {
        let (_, results) = run(
            host_aware(),
            Some(0),
            mix(SEED, seed),
            async |device| write(device, ZONE, 4096).await.unwrap(),
            async |device| {
                at_once(vec![
                    reset(device, 1),
                    write(device, ZONE + 8192, 4096),
                    write(device, ZONE + 20480, 4096),
                ])
                .await
            },
            async |_| (),
        );
        assert!(results.iter().all(Result::is_err), "{results:?}");
    }
}

#[test]
fn a_failed_extension_is_not_written_over_by_one_that_waited_for_it() {
    for seed in 0..HISTORIES {
        // The one's slot is synced, its record is not.
        let (_, results) = run(
            zoned_namespace(),
            Some(1),
            mix(SEED, seed),
            async |_| (),
            async |device| at_once(vec![attach(device, 3, 1), attach(device, 3, 2)]).await,
            async |device| {
                let found = device.extension(3 * ZONE).await.unwrap();
                assert!(found.is_none_or(|bytes| bytes == [1; 1024]));
            },
        );
        assert!(results.iter().all(Result::is_err), "{results:?}");
    }
}

/// A failed write-back is told to one sync alone.
#[test]
fn one_sync_of_the_table_at_a_time() {
    for seed in 0..HISTORIES {
        let (machine, results) = run(
            zoned_namespace(),
            None,
            mix(SEED, seed),
            async |_| (),
            async |device| {
                at_once(vec![
                    write(device, 2 * ZONE, 4096),
                    attach(device, 3, 1),
                    flush(device),
                    attach(device, 4, 2),
                    flush(device),
                    attach(device, 5, 3),
                ])
                .await
            },
            async |device| {
                for (zone, tag) in [(3, 1), (4, 2), (5, 3)] {
                    let found = device.extension(zone * ZONE).await.unwrap();
                    assert_eq!(found, Some(vec![tag; 1024]));
                }
            },
        );
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        let mut under_way = Vec::new();
        for recorded in machine.events() {
            match recorded.event {
                Event::SyncSubmitted { id, file } => {
                    let busy = under_way.iter().any(|(_, other)| *other == file);
                    assert!(!busy, "two syncs of one file at once, seed {seed}");
                    under_way.push((id, file));
                }
                Event::Synced { id } => under_way.retain(|(other, _)| *other != id),
                _ => {}
            }
        }
    }
}
