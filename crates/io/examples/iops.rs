//! Operations a second through a runtime: `cargo run --release -p zbdkit-io --example iops -- [DIR] [uring|threads]`.
//!
//! Makes a file of 256 MiB in DIR (default /dev/shm) and prints, for 4 KiB random reads and sequential writes, the
//! rate at queue depths 1 and 32, each request a task of a pool as a virtqueue's would be.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use zbdkit_io::{Backend, File, FileKind, IoBuf, Runtime, RuntimeOptions, TaskPool};

const SIZE: u64 = 256 << 20;
const BLOCK: u64 = 4096;
const TIME: Duration = Duration::from_secs(2);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments.next().unwrap_or_else(|| "/dev/shm".into());
    let backend = match arguments.next().as_deref() {
        None => Backend::Auto,
        Some("uring") => Backend::IoUring,
        Some("threads") => Backend::Threads,
        Some(other) => return Err(format!("no backend {other:?}").into()),
    };
    let runtime = Runtime::new(RuntimeOptions {
        backend,
        ..RuntimeOptions::default()
    })?;
    let file = File::from_fd(tempfile::tempfile_in(&dir)?.into(), FileKind::default());
    runtime.block_on(async {
        let chunk = IoBuf::alloc(1 << 20);
        chunk.fill(0..chunk.len(), 0x5a);
        for offset in (0..SIZE).step_by(chunk.len()) {
            file.write(chunk.clone(), offset).await?;
        }
        Ok::<(), std::io::Error>(())
    })?;
    println!("{dir}, {}", runtime.backend());
    for write in [false, true] {
        for depth in [1, 32] {
            let (count, time) = measure(&runtime, &file, write, depth);
            let name = if write { "sequential write" } else { "random read" };
            let rate = count as f64 / time.as_secs_f64();
            println!(
                "4 KiB {name:16} depth {depth:2}: {:8.0} a second, {:6.0} ns each",
                rate,
                1e9 / rate
            );
        }
    }
    Ok(())
}

fn measure(runtime: &Runtime, file: &File, write: bool, depth: usize) -> (u64, Duration) {
    let pool = TaskPool::new(depth);
    let done = Rc::new(Cell::new(0u64));
    let bufs: Vec<IoBuf> = (0..depth).map(|_| IoBuf::alloc(BLOCK as usize)).collect();
    let start = Instant::now();
    let request = |buf: IoBuf, offset: u64| {
        let (file, done) = (file.clone(), done.clone());
        async move {
            let result = if write {
                file.write(buf, offset).await
            } else {
                file.read(buf, offset).await
            };
            result.expect("the file is ours");
            done.set(done.get() + 1);
        }
    };
    runtime.block_on(async {
        let mut random = 1u64;
        let mut sequence = 0;
        let mut issued = 0usize;
        while !issued.is_multiple_of(256) || start.elapsed() < TIME {
            random = random
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let block = if write { sequence } else { random >> 33 } % (SIZE / BLOCK);
            let mut task = request(bufs[issued % depth].clone(), block * BLOCK);
            while let Err(again) = pool.try_spawn(task) {
                task = again;
                pool.vacancy().await;
            }
            sequence += 1;
            issued += 1;
        }
        while pool.in_use() > 0 {
            zbdkit_io::yield_now().await;
        }
    });
    (done.get(), start.elapsed())
}
