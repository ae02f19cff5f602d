//! One suite of everything that I/O promises, on both backends.

use std::future::{Future, poll_fn};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::task::Poll;
use std::time::{Duration, Instant};

use zbdkit_io::{
    Backend, BackendKind, File, FileKind, IoBuf, OnPanic, Runtime, RuntimeOptions, TaskPool, readable, sleep,
    spawn, unblock, yield_now,
};

/// Polls a future once.
async fn poll_once<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
    let mut future = Some(future);
    poll_fn(|cx| Poll::Ready(future.take().expect("polled once").poll(cx))).await
}

fn runtime(backend: Backend) -> Runtime {
    runtime_of(backend, 64)
}

fn runtime_of(backend: Backend, entries: u32) -> Runtime {
    let options = RuntimeOptions {
        backend,
        entries,
        on_panic: OnPanic::Resume,
        ..RuntimeOptions::default()
    };
    let runtime = Runtime::new(options).expect("a runtime");
    match backend {
        Backend::IoUring => assert_eq!(runtime.backend(), BackendKind::IoUring),
        _ => assert!(matches!(runtime.backend(), BackendKind::Threads { .. })),
    }
    runtime
}

/// A file on a real file system, so that operations go through the reactor.
fn disk_file() -> std::fs::File {
    tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary file")
}

/// A file in memory, so that they do not.
fn memory_file() -> std::fs::File {
    OwnedFd::from(rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd")).into()
}

fn file(std: &std::fs::File) -> File {
    File::from_fd(std.try_clone().expect("a duplicate").into(), FileKind::default())
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 256) as u8 ^ seed).collect()
}

fn contents(mut std: &std::fs::File) -> Vec<u8> {
    let mut all = Vec::new();
    std.seek(SeekFrom::Start(0)).expect("a seek");
    std.read_to_end(&mut all).expect("the contents");
    all
}

macro_rules! on_both_backends {
    ($($name:ident)*) => {
        mod uring { $(#[test] fn $name() { super::$name(super::Backend::IoUring) })* }
        mod threads { $(#[test] fn $name() { super::$name(super::Backend::Threads) })* }
    };
}

on_both_backends! {
    what_is_written_is_read
    reading_past_the_end_gives_zeros
    errors_come_with_their_errno
    holes_zeros_and_allocation
    many_segments_are_one_request
}

fn what_is_written_is_read(backend: Backend) {
    let runtime = runtime(backend);
    for std in [disk_file(), memory_file()] {
        let file = file(&std);
        runtime.block_on(async {
            for (len, offset) in [(1, 0), (4096, 4096), (100_000, 12_345)] {
                let data = pattern(len, offset as u8);
                file.write(IoBuf::from_vec(data.clone()), offset)
                    .await
                    .expect("a write");
                let buf = IoBuf::alloc(len);
                file.read(buf.clone(), offset).await.expect("a read");
                assert!(buf.to_vec() == data, "{len} bytes at {offset}");
            }
            file.write(IoBuf::empty(), 1 << 40)
                .await
                .expect("nothing to write");
            file.datasync().await.expect("a datasync");
            file.sync().await.expect("a sync");
            assert_eq!(file.len().expect("a length"), 112_345);
            file.set_len(5).expect("another length");
            assert_eq!(std.metadata().expect("metadata").len(), 5);
        });
    }
}

fn reading_past_the_end_gives_zeros(backend: Backend) {
    let runtime = runtime(backend);
    for std in [disk_file(), memory_file()] {
        (&std).write_all(&[9; 5000]).expect("a write");
        let file = file(&std);
        runtime.block_on(async {
            let buf = IoBuf::from_vec(vec![0xff; 8192]);
            file.read(buf.clone(), 4096).await.expect("a read");
            let mut expected = vec![9; 904];
            expected.resize(8192, 0);
            assert!(buf.to_vec() == expected);
            let buf = IoBuf::from_vec(vec![0xff; 512]);
            file.read(buf.clone(), 1 << 30).await.expect("a read");
            assert!(buf.to_vec() == [0; 512]);
        });
    }
}

fn errors_come_with_their_errno(backend: Backend) {
    let runtime = runtime(backend);
    let null = std::fs::File::open("/dev/null").expect("/dev/null");
    let dir = std::fs::File::open("/").expect("the root directory");
    runtime.block_on(async {
        let error = file(&null)
            .write(IoBuf::alloc(8), 0)
            .await
            .expect_err("opened for reading");
        assert_eq!(error.raw_os_error(), Some(libc_ebadf()));
        let error = file(&dir)
            .read(IoBuf::alloc(8), 0)
            .await
            .expect_err("a directory");
        assert_eq!(error.raw_os_error(), Some(21), "EISDIR");
        let error = file(&disk_file())
            .read(IoBuf::alloc(8), u64::MAX - 3)
            .await
            .expect_err("an overflow");
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    });
}

fn libc_ebadf() -> i32 {
    rustix::io::Errno::BADF.raw_os_error()
}

fn holes_zeros_and_allocation(backend: Backend) {
    let runtime = runtime(backend);
    for std in [disk_file(), memory_file()] {
        let file = file(&std);
        runtime.block_on(async {
            file.write(IoBuf::from_vec(vec![7; 65536]), 0)
                .await
                .expect("a write");
            file.punch_hole(4096, 8192).await.expect("a hole");
            file.zero_range(32768, 4096).await.expect("zeros");
            file.allocate(65536, 4096).await.expect("blocks");
        });
        let mut expected = vec![7; 65536];
        expected[4096..12288].fill(0);
        expected[32768..36864].fill(0);
        expected.resize(65536 + 4096, 0);
        assert!(contents(&std) == expected);
    }
}

fn many_segments_are_one_request(backend: Backend) {
    let runtime = runtime(backend);
    let data = pattern(3000 * 8, 3);
    for std in [disk_file(), memory_file()] {
        let file = file(&std);
        let whole = IoBuf::from_vec(data.clone());
        runtime.block_on(file.write(whole, 0)).expect("a write");
        assert!(contents(&std) == data);
    }
}
