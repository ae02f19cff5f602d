//! Several threads, each with a runtime and requests of its own, change one image: each finds what it wrote, and at the end
//! nothing is lost or leaked.

mod support;

use std::cell::Cell;
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant, SystemTime};

use support::crash::Bytes;
use support::device::Device;
use support::power::Below;
use support::qemu::Qemu;
use support::{Rng, block_on};
use zbdkit_io::{File, IoBuf, OnPanic, Runtime, RuntimeOptions, spawn};
use zbdkit_qcow2::{Backing, Error, Header, Layout, Options, Qcow2, Repair, check, create};

const SECTOR: u64 = 512;
const THREADS: u64 = 3;
/// Tasks of a thread.
const TASKS: u64 = 4;
/// Clusters in a row that belong to one task.
const GROUP: u64 = 3;

/// An image that is shared, and what it must hold.
struct Shared {
    image: Qcow2,
    layout: Layout,
    /// The device's contents. Each task changes its own sectors only.
    model: Mutex<Vec<u8>>,
    /// Requests that are left to do.
    left: AtomicUsize,
}

impl Shared {
    fn cluster(&self) -> u64 {
        self.layout.cluster_size
    }

    /// Where the part begins in which whole clusters belong to a task; before that, tasks share clusters.
    fn own_clusters(&self) -> u64 {
        self.layout.size / self.cluster() / 2
    }

    fn expected(&self, range: &Range<u64>) -> Vec<u8> {
        let model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        model[range.start as usize..range.end as usize].to_vec()
    }

    fn expect(&self, range: Range<u64>, byte: u8) {
        let mut model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        model[range.start as usize..range.end as usize].fill(byte);
    }
}

/// A task, which has sectors of its own.
struct Task {
    shared: Arc<Shared>,
    number: u64,
    rng: Rng,
}

impl Task {
    async fn run(mut self) -> Result<(), Error> {
        while self
            .shared
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
            .is_ok()
        {
            if self.rng.one_in(2) {
                self.in_shared_cluster().await?;
            } else {
                self.in_own_clusters().await?;
            }
            if self.rng.one_in(20) {
                self.shared.image.flush().await?;
            }
        }
        Ok(())
    }

    /// Every so many sectors one is ours.
    async fn in_shared_cluster(&mut self) -> Result<(), Error> {
        let shared = self.shared.clone();
        let all = THREADS * TASKS;
        let sectors = shared.own_clusters() * shared.cluster() / SECTOR;
        let at = (self.rng.below(sectors / all) * all + self.number) * SECTOR;
        let range = at..at + SECTOR;
        match self.rng.below(8) {
            0 => {
                let unmap = self.rng.one_in(2);
                shared.image.write_zeroes(at, SECTOR, unmap).await?;
                shared.expect(range, 0);
            }
            1 | 2 => self.verify(range).await?,
            _ => self.write(range).await?,
        }
        Ok(())
    }

    async fn in_own_clusters(&mut self) -> Result<(), Error> {
        let shared = self.shared.clone();
        let (cluster, image) = (shared.cluster(), &shared.image);
        let group = THREADS * TASKS * GROUP;
        let groups = (shared.layout.size / cluster - shared.own_clusters()) / group;
        let first = shared.own_clusters() + self.rng.below(groups) * group + self.number * GROUP;
        let start = (first + self.rng.below(GROUP)) * cluster;
        let whole = start..(start + cluster * (1 + self.rng.below(GROUP))).min((first + GROUP) * cluster);
        let sectors = (whole.end - whole.start) / SECTOR;
        let from = self.rng.below(sectors);
        let part =
            whole.start + from * SECTOR..whole.start + (from + 1 + self.rng.below(sectors - from)) * SECTOR;
        // Version 2 cannot hide the backing image.
        let hides = shared.layout.version > 2 || shared.layout.backing.is_none();
        let len = whole.end - whole.start;
        match self.rng.below(10) {
            0 => {
                let unmap = self.rng.one_in(2);
                image
                    .write_zeroes(part.start, part.end - part.start, unmap)
                    .await?;
                shared.expect(part, 0);
            }
            1 if hides => {
                image.discard(whole.start, len).await?;
                shared.expect(whole, 0);
            }
            2 if hides => {
                image.release(whole.clone()).await?;
                shared.expect(whole, 0);
            }
            3 if shared.expected(&whole).iter().all(|byte| *byte == 0) => {
                image.map_ahead(whole.clone()).await?;
                self.verify(whole).await?;
            }
            4 if shared.layout.data_file.is_none() => {
                let byte = self.byte();
                let data = vec![byte; cluster as usize];
                image.write_compressed(&data, whole.start).await?;
                shared.expect(whole.start..whole.start + cluster, byte);
            }
            5 if shared.layout.backing.is_none() => {
                image.drop_ahead(whole.clone()).await?;
                shared.expect(whole, 0);
            }
            6 | 7 => self.verify(part).await?,
            _ => self.write(part).await?,
        }
        Ok(())
    }

    fn byte(&mut self) -> u8 {
        1 + self.rng.below(255) as u8
    }

    async fn write(&mut self, range: Range<u64>) -> Result<(), Error> {
        let byte = self.byte();
        let data = vec![byte; (range.end - range.start) as usize];
        self.shared
            .image
            .write(IoBuf::from_vec(data), range.start)
            .await?;
        self.shared.expect(range, byte);
        Ok(())
    }

    async fn verify(&self, range: Range<u64>) -> Result<(), Error> {
        let buf = IoBuf::alloc((range.end - range.start) as usize);
        self.shared.image.read(buf.clone(), range.start).await?;
        compare(&buf.to_vec(), &self.shared.expected(&range), range.start);
        Ok(())
    }
}

fn compare(found: &[u8], expected: &[u8], start: u64) {
    if let Some(at) = (0..found.len()).find(|at| found[*at] != expected[*at]) {
        panic!(
            "byte {:#x} is {:#x} and not {:#x}",
            start + at as u64,
            found[at],
            expected[at]
        );
    }
}

/// Runs tasks on a thread of their own until all have ended.
fn on_a_thread(shared: Arc<Shared>, thread: u64, seed: u64) {
    let options = RuntimeOptions {
        on_panic: OnPanic::Resume,
        ..RuntimeOptions::default()
    };
    Runtime::new(options).unwrap().block_on(async move {
        let running = Rc::new(Cell::new(TASKS));
        let root = Rc::new(Cell::new(None::<Waker>));
        for task in 0..TASKS {
            let number = thread * TASKS + task;
            let task = Task {
                shared: shared.clone(),
                number,
                rng: Rng(seed * 1000 + number),
            };
            let (running, root) = (running.clone(), root.clone());
            spawn(async move {
                task.run().await.unwrap();
                running.set(running.get() - 1);
                root.take().into_iter().for_each(Waker::wake);
            });
        }
        poll_fn(|cx| {
            root.set(Some(cx.waker().clone()));
            if running.get() == 0 {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    });
}

fn below(layout: &Layout) -> Option<Vec<u8>> {
    layout.backing.as_ref()?;
    let sectors = layout.size / SECTOR * 3 / 4;
    Some(
        (0..sectors)
            .flat_map(|sector| [(sector % 251) as u8; 512])
            .collect(),
    )
}

async fn open(file: File, data: Option<File>, below: Option<&Vec<u8>>) -> Qcow2 {
    let header = Header::read(&file).await.unwrap();
    let options = Options {
        l2_cache: 1,
        data_file: data,
        backing: below.map(|bytes| Arc::new(Below(bytes.clone())) as Arc<dyn Backing>),
        ..Options::default()
    };
    Qcow2::open(file, header, options).await.unwrap()
}

fn requests() -> usize {
    let long = std::env::var("ZBDKIT_LONG").ok().and_then(|n| n.parse().ok());
    800 * long.unwrap_or(1)
}

fn stress(layout: Layout, seed: u64) {
    println!("seed {seed}: {layout:?}");
    let below = below(&layout);
    let mut model = vec![0; layout.size as usize];
    if let Some(below) = &below {
        model[..below.len()].copy_from_slice(below);
    }
    let device = Device::new(Bytes::default(), seed);
    let data = layout
        .data_file
        .is_some()
        .then(|| Device::new(Bytes::default(), seed + 1));
    let data = || data.as_ref().map(Device::file);
    block_on(async {
        create(&device.file(), data().as_ref(), &layout).await.unwrap();
    });
    for round in 0..2 {
        let image = block_on(open(device.file(), data(), below.as_ref()));
        let shared = Arc::new(Shared {
            image,
            layout: layout.clone(),
            model: Mutex::new(model),
            left: AtomicUsize::new(requests()),
        });
        run_threads(&shared, seed * 2 + round);
        let Ok(shared) = Arc::try_unwrap(shared).map_err(|_| "somebody still has the image") else {
            panic!("a thread has not let go of the image");
        };
        model = shared.model.into_inner().unwrap();
        block_on(async {
            let image = shared.image;
            let buf = IoBuf::alloc(model.len());
            image.read(buf.clone(), 0).await.unwrap();
            compare(&buf.to_vec(), &model, 0);
            if round == 0 && layout.data_file.is_none() {
                // What follows finds clusters that are not this image's alone.
                let made = image.snapshot_create("s", SystemTime::UNIX_EPOCH, |_, _| Ok(()));
                made.await.unwrap();
            }
            image.close().await.unwrap();
            let image = open(device.file(), data(), below.as_ref()).await;
            let buf = IoBuf::alloc(model.len());
            image.read(buf.clone(), 0).await.unwrap();
            compare(&buf.to_vec(), &model, 0);
            image.close().await.unwrap();
            let file = device.file();
            let header = Header::read(&file).await.unwrap();
            let report = check(&file, &header, data().as_ref(), &[], Repair::None, &mut |_, _| {})
                .await
                .unwrap();
            assert!(
                report.corruptions == 0 && report.leaks == 0,
                "{:#?}",
                report.messages
            );
        });
    }
    if layout.data_file.is_none() && layout.backing.is_none() {
        let Some(qemu) = Qemu::find() else { return };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.qcow2");
        std::fs::write(&path, device.bytes().to_vec()).unwrap();
        qemu.check(&path);
        compare(&qemu.contents(&path, None), &model, 0);
    }
}

fn run_threads(shared: &Arc<Shared>, seed: u64) {
    let (sender, ended) = channel();
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| {
            let (shared, sender) = (shared.clone(), sender.clone());
            std::thread::spawn(move || {
                on_a_thread(shared, thread, seed);
                let _ = sender.send(());
            })
        })
        .collect();
    drop(sender);
    let mut deadline = Instant::now() + Duration::from_secs(60);
    let mut last = shared.left.load(Ordering::Relaxed);
    loop {
        match ended.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(()) => {}
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                let left = shared.left.load(Ordering::Relaxed);
                assert!(left < last, "nothing moves any more, {left} requests are left");
                last = left;
                deadline = Instant::now() + Duration::from_secs(60);
            }
        }
    }
    for thread in threads {
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }
}

fn layout(cluster_size: u64, size: u64) -> Layout {
    Layout {
        cluster_size,
        size,
        ..Layout::default()
    }
}

#[test]
fn small_clusters() {
    stress(layout(512, 128 << 10), 1);
}

#[test]
fn clusters_that_many_tasks_share() {
    stress(layout(4096, 1 << 20), 2);
}

#[test]
fn large_clusters() {
    stress(layout(65536, 8 << 20), 3);
}

#[test]
fn over_a_backing_image() {
    let layout = Layout {
        backing: Some(("below".into(), Some("raw".into()))),
        ..layout(4096, 1 << 20)
    };
    stress(layout, 4);
}

#[test]
fn version_2() {
    let layout = Layout {
        version: 2,
        ..layout(1024, 256 << 10)
    };
    stress(layout, 5);
}

#[test]
fn subclusters() {
    let layout = Layout {
        extended_l2: true,
        ..layout(16384, 4 << 20)
    };
    stress(layout, 6);
}

#[test]
fn an_external_data_file() {
    for raw in [false, true] {
        let layout = Layout {
            data_file: Some("data".into()),
            data_file_raw: raw,
            ..layout(4096, 1 << 20)
        };
        stress(layout, 7 + u64::from(raw));
    }
}
