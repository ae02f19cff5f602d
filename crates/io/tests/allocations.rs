//! The path of a request allocates nothing.

#![expect(unsafe_code, reason = "a global allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::fs::MemfdFlags;
use zbdkit_io::mem::{Access, GuestMemory, Region};
use zbdkit_io::{Backend, File, FileKind, IoBuf, Runtime, RuntimeOptions, TaskPool};

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = COUNT.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations() -> u64 {
    COUNT.get()
}

fn requests_allocate_nothing(std: std::fs::File) {
    const DEPTH: u64 = 32;
    let options = RuntimeOptions {
        backend: Backend::IoUring,
        ..RuntimeOptions::default()
    };
    let runtime = Runtime::new(options).expect("a runtime");
    let file = File::from_fd(std.into(), FileKind::default());
    let memory = GuestMemory::new();
    let fd = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&fd, 1 << 20).expect("a size");
    let region = Region {
        guest_addr: 0,
        size: 1 << 20,
        user_addr: 0,
        fd,
        offset: 0,
        writable: true,
    };
    memory.set(vec![region]).expect("a region");
    let done = Rc::new(Cell::new(0));
    runtime.block_on(async {
        file.write(IoBuf::alloc(1 << 20), 0).await.expect("a write");
        let pool = TaskPool::new(DEPTH as usize);
        let mut before = 0;
        for round in 0..200 {
            if round == 100 {
                before = allocations();
            }
            for i in 0..DEPTH {
                // One piece or two, read or written.
                let parts = [
                    (i * 8192, 2048 + 2048 * (i % 2)),
                    (i * 8192 + 6144, 2048 - 2048 * (i % 2)),
                ];
                let access = if i % 3 == 0 { Access::Read } else { Access::Write };
                let buf = memory.guard().iobuf(&parts, access).expect("a buffer");
                let (file, done) = (file.clone(), done.clone());
                let request = async move {
                    let result = match access {
                        Access::Read => file.write(buf, i * 4096).await,
                        Access::Write => file.read(buf, i * 4096).await,
                    };
                    result.expect("a transfer");
                    done.set(done.get() + 1);
                };
                assert!(pool.try_spawn(request).is_ok());
            }
            while pool.in_use() > 0 {
                zbdkit_io::yield_now().await;
            }
        }
        assert_eq!(allocations() - before, 0);
    });
    assert_eq!(done.get(), 200 * DEPTH);
    let before = allocations();
    drop(IoBuf::alloc(1));
    assert!(allocations() > before, "the counter counts");
}

#[test]
fn requests_to_a_disk_allocate_nothing() {
    requests_allocate_nothing(tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).expect("a file"));
}

#[test]
fn requests_to_memory_allocate_nothing() {
    let fd: OwnedFd = rustix::fs::memfd_create("file", MemfdFlags::CLOEXEC).expect("a memfd");
    requests_allocate_nothing(fd.into());
}
