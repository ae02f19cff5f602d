//! A 4 KiB read, write or append of a raw image in memory allocates nothing, from the entry to the completion.

mod host;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use host::{Host, PLAIN_NSID, ZONED_NSID, rw};
use zbdkit_io::IoBuf;
use zbdkit_nvme::{Direction, Failure, Transfer};
use zbdkit_spec::nvme::command::SubmissionEntry;
use zbdkit_spec::nvme::nvm::Opcode;
use zbdkit_spec::nvme::zns::Opcode as ZonedOpcode;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

#[expect(unsafe_code, reason = "a global allocator is unsafe by contract")]
// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is the same.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The same memory for every command.
struct Fixed(IoBuf);

impl Transfer for Fixed {
    async fn buffer(&self, _: &SubmissionEntry, _: Direction, len: usize) -> Result<IoBuf, Failure> {
        Ok(self.0.slice(0..len))
    }
}

#[test]
fn the_hot_path_allocates_nothing() {
    let host = Host::new();
    let memory = Fixed(IoBuf::alloc(4096));
    let commands = |round: u64| {
        [
            rw(Opcode::WRITE.0, ZONED_NSID, round * 8, 8),
            rw(Opcode::READ.0, ZONED_NSID, round * 8, 8),
            rw(ZonedOpcode::ZONE_APPEND.0, ZONED_NSID, host::ZONE, 8),
            rw(Opcode::WRITE.0, PLAIN_NSID, round * 8, 8),
            rw(Opcode::READ.0, PLAIN_NSID, round * 8, 8),
        ]
    };
    host.runtime.block_on(async {
        let mut before = 0;
        for round in 0..100 {
            if round == 20 {
                before = ALLOCATIONS.get();
            }
            for command in commands(round) {
                assert!(host.io.execute(&command, &memory).await.is_success());
            }
        }
        assert_eq!(ALLOCATIONS.get() - before, 0);
    });
    let before = ALLOCATIONS.get();
    drop(vec![1_u8]);
    assert_eq!(ALLOCATIONS.get() - before, 1);
    host.must_work();
}

#[test]
fn a_command_is_hardly_larger_than_the_write_below_it() {
    let host = Host::new();
    let memory = Fixed(IoBuf::alloc(4096));
    let command = rw(Opcode::READ.0, PLAIN_NSID, 0, 8);
    let whole = size_of_val(&host.io.execute(&command, &memory));
    let device = host.subsystem.namespace(ZONED_NSID).unwrap().device();
    let lane = device.lane(1);
    let below = size_of_val(&device.write(&lane, IoBuf::empty(), 0));
    assert!(whole <= below + 512, "{whole} bytes over {below}");
}
