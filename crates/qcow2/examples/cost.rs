//! What the format costs above the file: 4 KiB requests one after the other through an image and to a plain file.
//!
//! `cargo run --release -p zbdkit-qcow2 --example cost -- DIRECTORY` (on a tmpfs the file itself costs least).

use std::path::PathBuf;
use std::time::{Duration, Instant};

use zbdkit_io::{File, FileKind, IoBuf, Runtime, RuntimeOptions};
use zbdkit_qcow2::{Access, Layout, Options, Qcow2, create};

const SIZE: u64 = 1 << 30;
const BLOCK: u64 = 4096;

fn open(path: &PathBuf) -> File {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .expect("the directory can be written");
    File::from_fd(file.into(), FileKind::default())
}

fn show(what: &str, image: Duration, plain: Duration) {
    let each = |time: Duration| time.as_nanos() as u64 / (SIZE / BLOCK);
    println!(
        "{what:<30} image {:>6} ns, plain file {:>6} ns, {:.2}x",
        each(image),
        each(plain),
        plain.as_secs_f64() / image.as_secs_f64()
    );
}

async fn image_time(image: &Qcow2, buf: &IoBuf, access: Access, at: impl Fn(u64) -> u64) -> Duration {
    let start = Instant::now();
    for n in 0..SIZE / BLOCK {
        let offset = at(n);
        match (image.resolve(offset, BLOCK, access), access) {
            (Some(place), Access::Read) => place.file.read(buf.clone(), place.offset).await.expect("read"),
            (Some(place), Access::Write) => place.file.write(buf.clone(), place.offset).await.expect("write"),
            (None, Access::Read) => image.read(buf.clone(), offset).await.expect("read"),
            (None, Access::Write) => image.write(buf.clone(), offset).await.expect("write"),
        }
    }
    start.elapsed()
}

async fn plain_time(file: &File, buf: &IoBuf, access: Access, at: impl Fn(u64) -> u64) -> Duration {
    let start = Instant::now();
    for n in 0..SIZE / BLOCK {
        match access {
            Access::Read => file.read(buf.clone(), at(n)).await.expect("read"),
            Access::Write => file.write(buf.clone(), at(n)).await.expect("write"),
        }
    }
    start.elapsed()
}

fn main() {
    let directory = std::env::args()
        .nth(1)
        .map_or_else(std::env::temp_dir, PathBuf::from);
    let (image_path, plain_path) = (directory.join("cost.qcow2"), directory.join("cost.raw"));
    let runtime = Runtime::new(RuntimeOptions::default()).expect("a runtime");
    runtime.block_on(async {
        let file = open(&image_path);
        let layout = Layout {
            size: SIZE,
            ..Layout::default()
        };
        let header = create(&file, None, &layout).await.expect("create");
        let image = Qcow2::open(file, header, Options::default()).await.expect("open");
        let plain = open(&plain_path);
        let buf = IoBuf::from_vec(vec![7; BLOCK as usize]);
        let in_order = |n| n * BLOCK;
        let at_random = |n: u64| n.wrapping_mul(0x9e37_79b9) % (SIZE / BLOCK) * BLOCK;
        show(
            "write, allocating each cluster",
            image_time(&image, &buf, Access::Write, in_order).await,
            plain_time(&plain, &buf, Access::Write, in_order).await,
        );
        show(
            "write again",
            image_time(&image, &buf, Access::Write, in_order).await,
            plain_time(&plain, &buf, Access::Write, in_order).await,
        );
        show(
            "read at random",
            image_time(&image, &buf, Access::Read, at_random).await,
            plain_time(&plain, &buf, Access::Read, at_random).await,
        );
        let start = Instant::now();
        for n in 0..SIZE / BLOCK {
            std::hint::black_box(image.resolve(at_random(n), BLOCK, Access::Write).is_some());
        }
        println!(
            "resolve alone: {} ns",
            start.elapsed().as_nanos() as u64 / (SIZE / BLOCK)
        );
        image.close().await.expect("close");
    });
    for path in [image_path, plain_path] {
        std::fs::remove_file(path).expect("our own files");
    }
}
