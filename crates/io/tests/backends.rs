//! One suite of everything that I/O promises, on both backends.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::pin::pin;
use std::rc::Rc;
use std::sync::mpsc;
use std::task::Poll;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use zbdkit_io::mem::{Access, GuestMemory, Region};
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
    rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC)
        .expect("a memfd")
        .into()
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
    direct_io_bounces_memory_and_refuses_ranges
    a_transfer_that_the_kernel_cuts_short_goes_on
    an_operation_outlives_its_future
    memory_in_flight_is_not_released
    more_operations_than_the_ring_holds
    readable_waits_for_data
    a_dropped_readable_leaves_nothing_behind
    sleeping_takes_its_time_and_can_be_given_up
    yielding_lets_others_and_the_io_go_on
    blocking_calls_run_elsewhere
    tasks_stay_between_calls_of_block_on
    a_panicking_task_is_not_overlooked
    a_pool_gives_back_what_it_has_no_room_for
    a_dropped_pool_drops_its_tasks
    the_end_of_a_runtime_ends_its_tasks_and_its_io
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

/// 3000 pieces of 8 bytes, last first: more than one system call takes.
fn many_segments_are_one_request(backend: Backend) {
    const PIECES: u64 = 3000;
    let runtime = runtime(backend);
    let memory = guest_memory();
    let parts: Vec<_> = (0..PIECES).rev().map(|i| (i * 16, 8)).collect();
    let buf = memory.guard().iobuf(&parts, Access::Write).expect("a buffer");
    assert_eq!(buf.segments().len(), PIECES as usize);
    let data = pattern(buf.len(), 3);
    for std in [disk_file(), memory_file()] {
        let file = file(&std);
        buf.copy_from(&data);
        runtime.block_on(file.write(buf.clone(), 3)).expect("a write");
        assert!(contents(&std)[3..] == data);
        buf.fill(0..buf.len(), 0);
        runtime.block_on(file.read(buf.clone(), 3)).expect("a read");
        assert!(buf.to_vec() == data);
    }
}

fn guest_memory() -> GuestMemory {
    const SIZE: u64 = 1 << 20;
    let fd = memory_file();
    fd.set_len(SIZE).expect("a size");
    let memory = GuestMemory::new();
    let region = Region {
        guest_addr: 0,
        size: SIZE,
        user_addr: 0,
        fd: fd.into(),
        offset: 0,
        writable: true,
    };
    memory.set(vec![region]).expect("a region");
    memory
}

fn direct_io_bounces_memory_and_refuses_ranges(backend: Backend) {
    let path = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR"))
        .expect("a file")
        .into_temp_path();
    let mut options = std::fs::OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32);
    let Ok(std) = options.open(&path) else { return };
    let runtime = runtime(backend);
    let file = File::from_fd(
        std.into(),
        FileKind {
            direct_align: Some(4096),
        },
    );
    assert_eq!(file.direct_align(), Some(4096));
    let data = pattern(8192, 1);
    runtime.block_on(async {
        let unaligned = IoBuf::from_vec([&[0; 100], data.as_slice()].concat()).slice(100..8292);
        let unaligned = if unaligned.is_aligned(4096) {
            unaligned.slice(1..8193)
        } else {
            unaligned
        };
        file.write(unaligned.clone(), 4096)
            .await
            .expect("a bounced write");
        unaligned.fill(0..8192, 0);
        file.read(unaligned.clone(), 4096).await.expect("a bounced read");
        assert!(unaligned.to_vec() == data);
        let aligned = IoBuf::alloc(8192);
        file.read(aligned.clone(), 4096).await.expect("an aligned read");
        assert!(aligned.to_vec() == data);
        for (offset, len) in [(512, 4096), (0, 4095), (0, 4097)] {
            let error = file
                .write(IoBuf::alloc(len), offset)
                .await
                .expect_err("not aligned");
            assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
        }
        // The end of the file, in the middle of a block.
        file.set_len(4096 + 1000).expect("a length");
        aligned.fill(0..8192, 0xff);
        file.read(aligned.clone(), 4096)
            .await
            .expect("a read over the end");
        let mut expected = data[..1000].to_vec();
        expected.resize(8192, 0);
        assert!(aligned.to_vec() == expected);
    });
}

fn pipe() -> (std::fs::File, std::fs::File) {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    (OwnedFd::from(reader).into(), OwnedFd::from(writer).into())
}

fn a_transfer_that_the_kernel_cuts_short_goes_on(backend: Backend) {
    const LEN: usize = 1 << 20;
    let runtime = runtime(backend);
    let (mut reader, writer) = pipe();
    let data = pattern(LEN, 9);
    let thread = std::thread::spawn(move || {
        let mut all = Vec::new();
        reader.read_to_end(&mut all).expect("the pipe");
        all
    });
    let file = File::from_fd(writer.into(), FileKind::default());
    runtime
        .block_on(file.write(IoBuf::from_vec(data.clone()), 0))
        .expect("all of it");
    drop(file);
    assert!(thread.join().expect("no panic") == data);

    let (reader, mut writer) = pipe();
    let data = pattern(LEN, 4);
    let theirs = data.clone();
    let thread = std::thread::spawn(move || {
        for piece in theirs.chunks(10_007) {
            writer.write_all(piece).expect("a write");
        }
    });
    let buf = IoBuf::alloc(LEN + 10);
    let file = File::from_fd(reader.into(), FileKind::default());
    runtime
        .block_on(file.read(buf.clone(), 0))
        .expect("all of it, and the end");
    assert!(buf.slice(0..LEN).to_vec() == data && buf.slice(LEN..LEN + 10).to_vec() == [0; 10]);
    thread.join().expect("no panic");
}

fn an_operation_outlives_its_future(backend: Backend) {
    let runtime = runtime(backend);
    let (reader, mut writer) = pipe();
    let buf = IoBuf::alloc(8);
    runtime.block_on(async {
        {
            // The future and the file go at once, before the operation even reached the kernel.
            let file = File::from_fd(reader.into(), FileKind::default());
            let mut read = pin!(file.read(buf.clone(), 0));
            assert!(poll_once(read.as_mut()).await.is_pending());
        }
        yield_now().await;
        // In two parts: what is left of the operation is carried on, too.
        writer.write_all(b"out").expect("a write");
        until(|| buf.to_vec() == b"out\0\0\0\0\0").await;
        writer.write_all(b"lived").expect("a write");
        until(|| buf.to_vec() == b"outlived").await;
    });
}

/// Lets the runtime go on until something holds.
async fn until(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "it never came");
        sleep(Duration::from_micros(100)).await;
    }
}

fn memory_in_flight_is_not_released(backend: Backend) {
    let runtime = runtime(backend);
    let (reader, mut writer) = pipe();
    let memory = guest_memory();
    runtime.block_on(async {
        {
            let file = File::from_fd(reader.into(), FileKind::default());
            let buf = memory
                .guard()
                .iobuf(&[(4096, 4)], Access::Write)
                .expect("a buffer");
            let mut read = pin!(file.read(buf, 0));
            assert!(poll_once(read.as_mut()).await.is_pending());
        }
        memory.revoke();
        yield_now().await;
        memory
            .wait_released(Instant::now())
            .expect_err("the kernel has it");
        writer.write_all(b"done").expect("a write");
        until(|| memory.wait_released(Instant::now()).is_ok()).await;
    });
}

fn more_operations_than_the_ring_holds(backend: Backend) {
    const OPS: usize = 5000;
    let runtime = runtime_of(backend, 8);
    let std = disk_file();
    let file = file(&std);
    let left = Rc::new(Cell::new(OPS));
    runtime.block_on(async {
        for i in 0..OPS {
            let (file, left) = (file.clone(), left.clone());
            spawn(async move {
                let data = pattern(16, i as u8);
                file.write(IoBuf::from_vec(data.clone()), i as u64 * 16)
                    .await
                    .expect("a write");
                let buf = IoBuf::alloc(16);
                file.read(buf.clone(), i as u64 * 16).await.expect("a read");
                assert_eq!(buf.to_vec(), data);
                left.set(left.get() - 1);
            });
        }
        until(|| left.get() == 0).await;
    });
}

fn readable_waits_for_data(backend: Backend) {
    let runtime = runtime(backend);
    let (mut reader, mut writer) = pipe();
    runtime.block_on(async {
        for round in 0..200u8 {
            {
                let mut wait = pin!(readable(reader.as_fd()));
                assert!(poll_once(wait.as_mut()).await.is_pending());
                yield_now().await;
                assert!(poll_once(wait.as_mut()).await.is_pending(), "nothing was written");
                writer.write_all(&[round]).expect("a write");
                wait.await.expect("readable");
            }
            let mut byte = [0];
            reader.read_exact(&mut byte).expect("a byte");
            assert_eq!(byte, [round]);
        }
        drop(writer);
        readable(reader.as_fd()).await.expect("a hang-up counts");
    });
}

fn a_dropped_readable_leaves_nothing_behind(backend: Backend) {
    let runtime = runtime_of(backend, 8);
    let (reader, writer) = pipe();
    runtime.block_on(async {
        for _ in 0..2000 {
            let mut wait = pin!(readable(reader.as_fd()));
            assert!(poll_once(wait.as_mut()).await.is_pending());
        }
        // A poll that went on would keep the pipe's end open, and the other end would have no error.
        drop(reader);
        until(|| {
            let mut fds = [PollFd::new(&writer, PollFlags::empty())];
            rustix::event::poll(&mut fds, Some(&Timespec::default())).expect("a poll");
            fds[0].revents().contains(PollFlags::ERR)
        })
        .await;
    });
}

fn sleeping_takes_its_time_and_can_be_given_up(backend: Backend) {
    let runtime = runtime(backend);
    let order = Rc::new(RefCell::new(Vec::new()));
    runtime.block_on(async {
        for millis in [15, 5, 10] {
            let order = order.clone();
            spawn(async move {
                let start = Instant::now();
                sleep(Duration::from_millis(millis)).await;
                assert!(start.elapsed() >= Duration::from_millis(millis));
                order.borrow_mut().push(millis);
            });
        }
        {
            let mut long = pin!(sleep(Duration::MAX));
            assert!(poll_once(long.as_mut()).await.is_pending());
        }
        until(|| order.borrow().len() == 3).await;
        sleep(Duration::ZERO).await;
    });
    assert_eq!(*order.borrow(), [5, 10, 15]);
}

fn yielding_lets_others_and_the_io_go_on(backend: Backend) {
    let runtime = runtime(backend);
    let (reader, mut writer) = pipe();
    writer.write_all(b"x").expect("a write");
    let done = Rc::new(Cell::new(0));
    runtime.block_on(async {
        for _ in 0..3 {
            let (done, reader) = (done.clone(), reader.try_clone().expect("a duplicate"));
            spawn(async move {
                readable(reader.as_fd()).await.expect("readable");
                done.set(done.get() + 1);
            });
        }
        // Never idle, and still the others come to their end.
        while done.get() < 3 {
            yield_now().await;
        }
    });
}

fn blocking_calls_run_elsewhere(backend: Backend) {
    let runtime = runtime(backend);
    let here = std::thread::current().id();
    runtime.block_on(async {
        let there = unblock(|| std::thread::current().id()).await;
        assert_ne!(here, there);
        // All at once: each waits for the next, so they must run together.
        let (first, mut wait) = mpsc::channel::<u32>();
        let mut calls = Vec::new();
        for i in 1..8 {
            let (tell, next) = mpsc::channel();
            let before = std::mem::replace(&mut wait, next);
            calls.push(unblock(move || {
                tell.send(before.recv().expect("a number") + i)
                    .expect("a listener")
            }));
        }
        first.send(0).expect("a listener");
        for call in calls {
            call.await;
        }
        assert_eq!(wait.recv().expect("the sum"), 28);
    });
}

fn tasks_stay_between_calls_of_block_on(backend: Backend) {
    let runtime = runtime(backend);
    let (sender, receiver) = mpsc::channel();
    runtime.block_on(async {
        spawn(async move {
            sleep(Duration::from_millis(1)).await;
            sender.send(5).expect("a listener");
        });
    });
    assert!(receiver.try_recv().is_err());
    runtime.block_on(until(|| receiver.try_recv() == Ok(5)));
}

fn a_panicking_task_is_not_overlooked(backend: Backend) {
    let runtime = runtime(backend);
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        runtime.block_on(async {
            spawn(async { panic!("on purpose") });
            sleep(Duration::from_secs(60)).await;
        })
    }));
    assert_eq!(panic.expect_err("the panic").downcast_ref(), Some(&"on purpose"));
    runtime.block_on(async { yield_now().await });
}

fn a_pool_gives_back_what_it_has_no_room_for(backend: Backend) {
    async fn task(gate: Rc<Cell<u32>>, sum: Rc<Cell<u32>>, number: u32) {
        until(|| gate.get() > 0).await;
        gate.set(gate.get() - 1);
        sum.set(sum.get() + number);
    }
    let runtime = runtime(backend);
    let (gate, sum) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
    runtime.block_on(async {
        let pool = TaskPool::new(3);
        for number in [1, 10, 100] {
            assert!(pool.try_spawn(task(gate.clone(), sum.clone(), number)).is_ok());
        }
        let rejected = pool
            .try_spawn(task(gate.clone(), sum.clone(), 1000))
            .expect_err("no room");
        assert_eq!((pool.in_use(), pool.capacity()), (3, 3));
        for left in [2, 1, 0] {
            gate.set(1);
            until(|| pool.in_use() == left).await;
        }
        assert_eq!(sum.get(), 111);
        pool.vacancy().await;
        assert!(pool.try_spawn(rejected).is_ok());
        gate.set(1);
        until(|| sum.get() == 1111).await;
    });
}

fn a_dropped_pool_drops_its_tasks(backend: Backend) {
    let runtime = runtime(backend);
    let token = Rc::new(());
    runtime.block_on(async {
        let pool = TaskPool::new(4);
        for _ in 0..4 {
            let token = token.clone();
            let task = async move {
                sleep(Duration::from_secs(1000)).await;
                drop(token);
            };
            assert!(pool.try_spawn(task).is_ok());
        }
        yield_now().await;
        assert_eq!(Rc::strong_count(&token), 5);
        drop(pool);
        assert_eq!(Rc::strong_count(&token), 1);
        yield_now().await;
    });
}

fn the_end_of_a_runtime_ends_its_tasks_and_its_io(backend: Backend) {
    let runtime = runtime(backend);
    let remote = runtime.remote();
    let (reader, _writer) = pipe();
    let token = Rc::new(());
    let std = disk_file();
    let file = file(&std);
    {
        let token = token.clone();
        runtime.block_on(async {
            spawn(async move {
                readable(reader.as_fd()).await.expect("never");
                drop(token);
            });
            let mut write = pin!(file.write(IoBuf::from_vec(vec![1; 100_000]), 0));
            assert!(poll_once(write.as_mut()).await.is_pending());
        });
    }
    drop(runtime);
    assert_eq!(Rc::strong_count(&token), 1);
    assert!(contents(&std) == [1; 100_000], "what was issued was done");
    assert!(!remote.run(|| {}), "nobody is there to run it");
}
