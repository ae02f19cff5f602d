//! How long things take that must not grow with the image. Not run by default: `cargo test --release -p zbdkit-qcow2 --test
//! cliffs -- --ignored --nocapture --test-threads=1` prints the times.

mod support;

use std::cell::Cell;
use std::future::poll_fn;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Instant;

use support::{Rng, block_on, open_file};
use zbdkit_io::{IoBuf, Runtime, RuntimeOptions, spawn};
use zbdkit_qcow2::{Header, Layout, Options, Preallocation, Qcow2, create};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

async fn open(path: &Path) -> Qcow2 {
    let file = open_file(path);
    let header = Header::read(&file).await.unwrap();
    Qcow2::open(file, header, Options::default()).await.unwrap()
}

fn image(dir: &Path, cluster_size: u64, size: u64) -> std::path::PathBuf {
    let path = dir.join("image.qcow2");
    let layout = Layout {
        cluster_size,
        size,
        ..Layout::default()
    };
    block_on(create(&open_file(&path), None, &layout)).unwrap();
    path
}

fn took(what: &str, since: Instant) {
    println!("{what}: {:.1} ms", since.elapsed().as_secs_f64() * 1e3);
}

#[test]
#[ignore = "a measurement"]
fn a_large_image_that_is_all_mapped() {
    let dir = tempfile::tempdir().unwrap();
    for (cluster_size, size) in [(65536, 1024 * GIB), (512, 2 * GIB), (2 * MIB, 1024 * GIB)] {
        println!("clusters of {cluster_size}, {} GiB", size / GIB);
        let path = image(dir.path(), cluster_size, size);
        block_on(async {
            let image = open(&path).await;
            let since = Instant::now();
            image
                .preallocate(0..size - 64 * MIB, Preallocation::Metadata)
                .await
                .unwrap();
            took("mapping all but 64 MiB", since);
            let since = Instant::now();
            image.close().await.unwrap();
            took("closing", since);
            let since = Instant::now();
            let image = open(&path).await;
            took("opening", since);
            let since = Instant::now();
            image.write(IoBuf::alloc(4096), size - MIB).await.unwrap();
            took("the first write of a new cluster", since);
            let since = Instant::now();
            image.write(IoBuf::alloc(4096), size - 2 * MIB).await.unwrap();
            took("the second one", since);
            let since = Instant::now();
            image.discard(MIB, MIB).await.unwrap();
            image.flush().await.unwrap();
            took("a discard and a flush", since);
            let since = Instant::now();
            image
                .write(IoBuf::alloc(4 * MIB as usize), size - 32 * MIB)
                .await
                .unwrap();
            took("a write of 4 MiB to new clusters", since);
            let since = Instant::now();
            image.discard(0, size).await.unwrap();
            took("discarding all", since);
            let since = Instant::now();
            image.flush().await.unwrap();
            took("the flush that frees it", since);
            let since = Instant::now();
            image.write(IoBuf::alloc(4096), 0).await.unwrap();
            took("a write of a new cluster", since);
            image.close().await.unwrap();
        });
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
#[ignore = "a measurement"]
fn an_image_full_of_holes() {
    let dir = tempfile::tempdir().unwrap();
    let size = 16 * GIB;
    let path = image(dir.path(), 65536, size);
    block_on(async {
        let image = open(&path).await;
        image
            .preallocate(0..size / 2, Preallocation::Metadata)
            .await
            .unwrap();
        let since = Instant::now();
        for cluster in 0..size / 2 / 65536 / 2 {
            image.discard(cluster * 2 * 65536, 65536).await.unwrap();
        }
        took("discarding every other cluster of 8 GiB", since);
        let since = Instant::now();
        image.flush().await.unwrap();
        took("the flush that frees them", since);
        let (mut worst, since) = (0f64, Instant::now());
        for cluster in 0..size / 2 / 65536 / 2 {
            let one = Instant::now();
            let at = size / 2 + cluster * 65536;
            image.write(IoBuf::alloc(4096), at).await.unwrap();
            worst = worst.max(one.elapsed().as_secs_f64());
        }
        took("filling them one by one", since);
        println!("  the slowest: {:.1} ms", worst * 1e3);
        let since = Instant::now();
        for cluster in 0..64 {
            let at = size - (cluster + 1) * MIB;
            image.write(IoBuf::alloc(MIB as usize / 2), at).await.unwrap();
        }
        took("64 writes of 8 clusters", since);
        image.close().await.unwrap();
    });
}

#[test]
#[ignore = "a measurement"]
fn many_writes_of_new_clusters_at_once() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for (threads, depth) in [(1, 1), (1, 32), (1, 128), (2, 128)] {
        let size = 4 * GIB;
        let path = image(dir.path(), 65536, size);
        let image = Arc::new(block_on(open(&path)));
        for round in ["new clusters", "in place"] {
            let since = Instant::now();
            let all: Vec<_> = (0..threads)
                .map(|thread| {
                    let image = image.clone();
                    std::thread::spawn(move || {
                        let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
                        runtime.block_on(writers(image, thread, threads, depth));
                    })
                })
                .collect();
            all.into_iter().for_each(|thread| thread.join().unwrap());
            let writes = size / 65536;
            println!(
                "{threads} threads, {depth} each, {round}: {:.0} writes a second",
                writes as f64 / since.elapsed().as_secs_f64()
            );
        }
        block_on(image.close()).unwrap();
        std::fs::remove_file(path).unwrap();
    }
}

/// Writes 4 KiB to each cluster of this thread's, in random order, `depth` at a time.
async fn writers(image: Arc<Qcow2>, thread: u64, threads: u64, depth: u64) {
    let mut clusters: Vec<u64> = (0..image.size() / 65536)
        .filter(|at| at % threads == thread)
        .collect();
    let mut rng = Rng(thread);
    for at in (1..clusters.len()).rev() {
        clusters.swap(at, rng.below(at as u64 + 1) as usize);
    }
    let next = Rc::new(Cell::new(0));
    let clusters = Rc::new(clusters);
    let running = Rc::new(Cell::new(depth));
    let root = Rc::new(Cell::new(None::<Waker>));
    for _ in 0..depth {
        let (image, next, clusters) = (image.clone(), next.clone(), clusters.clone());
        let (running, root) = (running.clone(), root.clone());
        spawn(async move {
            let buf = IoBuf::from_vec(vec![7; 4096]);
            while let Some(cluster) = clusters.get(next.replace(next.get() + 1)) {
                image.write(buf.clone(), cluster * 65536).await.unwrap();
            }
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
}
