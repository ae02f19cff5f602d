//! Commands for NVMe devices, as far as they can be tried without one. /dev/null takes any command by ring and answers
//! success (Linux 6.1); an ordinary file takes none, neither by ring nor by ioctl.

use std::fs::OpenOptions;
use std::future::Future;
use std::task::{Context, Waker};

use zbdkit_io::{
    Backend, File, FileKind, IoBuf, NvmeCommand, NvmeCompletion, NvmeQueue, Runtime, RuntimeOptions, TaskPool,
};

fn runtime(backend: Backend) -> Runtime {
    let options = RuntimeOptions {
        backend,
        entries: 8,
        ..RuntimeOptions::default()
    };
    Runtime::new(options).expect("a runtime")
}

fn open(path: &str) -> File {
    let file = OpenOptions::new().read(true).write(true).open(path);
    File::from_fd(file.expect("the file").into(), FileKind::default())
}

fn read(queue: NvmeQueue) -> NvmeCommand {
    NvmeCommand {
        queue,
        opcode: 2,
        nsid: 1,
        cdw10_15: [0; 6],
        timeout_ms: 0,
    }
}

const DONE: NvmeCompletion = NvmeCompletion { status: 0, result: 0 };

#[test]
fn a_command_by_ring_is_answered() {
    let (runtime, null) = (runtime(Backend::IoUring), open("/dev/null"));
    runtime.block_on(async {
        for buf in [IoBuf::empty(), IoBuf::alloc(4096)] {
            assert_eq!(
                null.nvme(read(NvmeQueue::Io), buf.clone())
                    .await
                    .expect("an answer"),
                DONE
            );
            assert_eq!(
                null.nvme(read(NvmeQueue::Admin), buf).await.expect("an answer"),
                DONE
            );
        }
    });
}

#[test]
fn more_commands_than_the_ring_has_room_for_are_all_answered() {
    let (runtime, null) = (runtime(Backend::IoUring), open("/dev/null"));
    let pool = TaskPool::new(1000);
    let answers = std::rc::Rc::new(std::cell::Cell::new(0));
    runtime.block_on(async {
        for _ in 0..1000 {
            let (null, answers) = (null.clone(), answers.clone());
            let spawned = pool.try_spawn(async move {
                let answer = null.nvme(read(NvmeQueue::Io), IoBuf::alloc(512)).await;
                assert_eq!(answer.expect("an answer"), DONE);
                answers.set(answers.get() + 1);
            });
            assert!(spawned.is_ok(), "the pool has room");
        }
        while pool.in_use() > 0 {
            zbdkit_io::yield_now().await;
        }
    });
    assert_eq!(answers.get(), 1000);
}

#[test]
fn a_file_that_takes_no_commands_says_so_by_ring_and_by_ioctl() {
    for backend in [Backend::IoUring, Backend::Threads] {
        let runtime = runtime(backend);
        let file = File::from_fd(tempfile::tempfile().expect("a file").into(), FileKind::default());
        runtime.block_on(async {
            for queue in [NvmeQueue::Io, NvmeQueue::Admin] {
                let error = file
                    .nvme(read(queue), IoBuf::alloc(512))
                    .await
                    .expect_err("no device");
                assert_eq!(error.raw_os_error(), Some(libc::ENOTTY), "{backend:?} {queue:?}");
            }
        });
    }
}

#[test]
fn a_dropped_command_leaves_its_memory_alone_and_others_go_on() {
    let (runtime, null) = (runtime(Backend::IoUring), open("/dev/null"));
    runtime.block_on(async {
        let mut dropped = Box::pin(null.nvme(read(NvmeQueue::Io), IoBuf::alloc(4096)));
        let pending = dropped.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(pending.is_pending(), "the first poll only starts it");
        drop(dropped);
        assert_eq!(
            null.nvme(read(NvmeQueue::Io), IoBuf::empty())
                .await
                .expect("an answer"),
            DONE
        );
    });
}

#[test]
fn ordinary_requests_and_commands_share_a_thread() {
    let (runtime, null) = (runtime(Backend::IoUring), open("/dev/null"));
    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
    let file = File::from_fd(file.into(), FileKind::default());
    runtime.block_on(async {
        for round in 0..100_u64 {
            let data = IoBuf::from_vec(vec![round as u8; 512]);
            file.write(data, round * 512).await.expect("a write");
            assert_eq!(
                null.nvme(read(NvmeQueue::Io), IoBuf::empty())
                    .await
                    .expect("an answer"),
                DONE
            );
        }
    });
    assert_eq!(file.len().expect("a length"), 51200);
}
