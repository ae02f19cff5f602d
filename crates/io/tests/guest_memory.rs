//! Guest memory: what is refused, how requests keep what they started with, and how memory is taken away.

use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags};
use zbdkit_io::mem::{Access, GuestMemory, MAX_REGIONS, MemError, Region};

const MIB: u64 = 1 << 20;

fn memfd(size: u64) -> OwnedFd {
    let fd =
        rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a memfd");
    rustix::fs::ftruncate(&fd, size).expect("its size");
    fd
}

fn region(guest_addr: u64, size: u64) -> Region {
    Region {
        guest_addr,
        size,
        user_addr: guest_addr + (1 << 40),
        fd: memfd(size),
        offset: 0,
        writable: true,
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

#[test]
fn regions_that_cannot_be_are_refused_and_change_nothing() {
    let memory = GuestMemory::new();
    memory.set(vec![region(0, MIB)]).expect("a good region");
    let with = |change: &dyn Fn(&mut Region)| {
        let mut region = region(4 * MIB, MIB);
        change(&mut region);
        region
    };
    let refused = [
        ("Empty", with(&|r| r.size = 0)),
        ("Overflow", with(&|r| r.guest_addr = u64::MAX - 5)),
        ("Overflow", with(&|r| r.user_addr = u64::MAX - 5)),
        ("Overflow", with(&|r| r.offset = u64::MAX - 4095)),
        ("Overflow", with(&|r| r.offset = i64::MAX as u64 & !4095)),
        ("Overflow", with(&|r| (r.size, r.guest_addr) = (u64::MAX, 0))),
        ("Unaligned", with(&|r| (r.offset, r.size) = (512, 4096))),
        ("PastEndOfFile", with(&|r| r.offset = 4096)),
        ("PastEndOfFile", with(&|r| r.size = MIB + 1)),
        ("Overlap", with(&|r| r.guest_addr = MIB - 4096)),
        (
            "Map",
            with(&|r| r.fd = std::fs::File::open("/").expect("a directory").into()),
        ),
    ];
    for (name, region) in refused {
        let error = format!("{:?}", memory.add(region).expect_err(name));
        // A directory may say that it is too short before the kernel says that it cannot be mapped.
        assert!(error.starts_with(name) || name == "Map", "{error} is not {name}");
        assert!(memory.guard().iobuf(&[(0, MIB)], Access::Write).is_ok());
        assert!(memory.guard().iobuf(&[(4 * MIB, 1)], Access::Read).is_err());
    }
    assert!(matches!(
        memory.remove(0, MIB - 1),
        Err(MemError::NoSuchRegion { .. })
    ));
    assert!(matches!(
        memory.remove(1, MIB),
        Err(MemError::NoSuchRegion { .. })
    ));
}

#[test]
fn the_number_of_regions_is_bounded() {
    let memory = GuestMemory::new();
    let fd = memfd(4096);
    let page = |i: usize| Region {
        guest_addr: i as u64 * 8192,
        size: 4096,
        user_addr: 0,
        fd: fd.try_clone().expect("a duplicate"),
        offset: 0,
        writable: true,
    };
    memory
        .set((0..MAX_REGIONS).map(page).collect())
        .expect("as many as there may be");
    assert!(matches!(
        memory.add(page(MAX_REGIONS)),
        Err(MemError::TooManyRegions)
    ));
    assert!(matches!(
        memory.set((0..=MAX_REGIONS).map(page).collect()),
        Err(MemError::TooManyRegions)
    ));
}

#[test]
fn addresses_outside_memory_are_refused_and_regions_may_be_crossed() {
    let memory = GuestMemory::new();
    memory
        .set(vec![region(0, MIB), region(MIB, MIB), region(3 * MIB, MIB)])
        .expect("regions");
    let guard = memory.guard();
    for (addr, len) in [
        (2 * MIB, 1),
        (2 * MIB - 1, 2),
        (4 * MIB - 1, 2),
        (u64::MAX, 1),
        (u64::MAX, 2),
        (0, u64::MAX),
    ] {
        let result = guard.iobuf(&[(0, 16), (addr, len)], Access::Read);
        assert!(
            matches!(result, Err(MemError::Outside { .. } | MemError::TooLong)),
            "{addr:#x} {len:#x}"
        );
    }
    let buf = guard
        .iobuf(&[(MIB - 100, 200), (5, 0), (3 * MIB, 7)], Access::Write)
        .expect("a buffer");
    assert_eq!(buf.len(), 207);
    let data: Vec<u8> = (0..207).map(|i| i as u8).collect();
    buf.copy_from(&data);
    assert_eq!(
        guard
            .iobuf(&[(MIB, 100)], Access::Read)
            .expect("a buffer")
            .to_vec(),
        &data[100..200]
    );
    assert_eq!(
        guard
            .iobuf(&[(3 * MIB, 7)], Access::Read)
            .expect("a buffer")
            .to_vec(),
        &data[200..]
    );
    assert_eq!(guard.user_to_guest((1 << 40) + 3 * MIB + 5), Some(3 * MIB + 5));
    assert_eq!(guard.user_to_guest((1 << 40) + 2 * MIB), None);
    assert_eq!(guard.user_to_guest(0), None);
}

#[test]
fn memory_that_the_device_may_only_read_gives_no_buffer_to_write() {
    let memory = GuestMemory::new();
    memory
        .set(vec![Region {
            writable: false,
            ..region(0, MIB)
        }])
        .expect("a region");
    let guard = memory.guard();
    assert_eq!(
        guard.iobuf(&[(0, 512)], Access::Read).expect("a buffer").to_vec(),
        [0; 512]
    );
    assert!(matches!(
        guard.iobuf(&[(0, 512)], Access::Write),
        Err(MemError::ReadOnly { .. })
    ));
}

#[test]
fn a_request_keeps_the_memory_it_started_with() {
    let memory = GuestMemory::new();
    memory.set(vec![region(0, MIB)]).expect("a region");
    let guard = memory.guard();
    let buf = guard.iobuf(&[(0, 4)], Access::Write).expect("a buffer");
    buf.copy_from(b"old!");
    memory.set(vec![region(0, MIB)]).expect("another region");
    assert!(!guard.is_current());
    drop(guard);
    assert_eq!(buf.to_vec(), b"old!", "still mapped");
    let now = memory.guard();
    assert!(now.is_current());
    assert_eq!(
        now.iobuf(&[(0, 4)], Access::Read).expect("a buffer").to_vec(),
        [0; 4]
    );

    assert_eq!(
        memory
            .wait_released(Instant::now())
            .expect_err("`buf` holds it")
            .maps,
        1
    );
    drop(buf);
    memory
        .wait_released(Instant::now())
        .expect("`now` holds the current one only");
}

#[test]
fn taking_memory_away_waits_for_other_threads_requests() {
    let memory = GuestMemory::new();
    memory.set(vec![region(0, MIB)]).expect("a region");
    let (has, wait_has) = mpsc::channel();
    let (let_go, wait_let_go) = mpsc::channel::<()>();
    let theirs = memory.clone();
    let thread = std::thread::spawn(move || {
        let buf = theirs
            .guard()
            .iobuf(&[(0, 4096)], Access::Write)
            .expect("a buffer");
        has.send(()).expect("a listener");
        wait_let_go.recv().expect("a word");
        buf.fill(0..4096, 1);
        drop(buf);
        // The thread lives on without holding anything.
        wait_let_go.recv().expect_err("the end");
    });
    wait_has.recv().expect("the thread has it");
    memory.remove(0, MIB).expect("the region");
    assert!(
        memory
            .wait_released(Instant::now() + Duration::from_millis(5))
            .is_err()
    );
    assert!(
        memory.guard().iobuf(&[(0, 1)], Access::Read).is_err(),
        "new requests do not reach it"
    );
    let_go.send(()).expect("a listener");
    memory.wait_released(soon()).expect("the thread lets go");
    drop(let_go);
    thread.join().expect("no panic");
}

#[test]
fn memory_is_unmapped_when_nobody_holds_it() {
    let mappings = |name: &str| {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("our mappings");
        maps.lines().filter(|line| line.contains(name)).count()
    };
    let memory = GuestMemory::new();
    let fd = rustix::fs::memfd_create("unmap-me", MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&fd, MIB).expect("its size");
    memory
        .set(vec![Region { fd, ..region(0, MIB) }])
        .expect("a region");
    memory.add(region(MIB, MIB)).expect("a second region");
    let buf = memory.guard().iobuf(&[(0, 1)], Access::Read).expect("a buffer");
    memory.remove(0, MIB).expect("the region");
    assert_eq!(mappings("unmap-me"), 1);
    drop(buf);
    memory.wait_released(soon()).expect("nobody holds it");
    assert_eq!(mappings("unmap-me"), 0);
    memory
        .guard()
        .iobuf(&[(MIB, MIB)], Access::Read)
        .expect("the second region is still there");
    memory.revoke();
    assert!(memory.guard().iobuf(&[(MIB, 1)], Access::Read).is_err());
}

#[test]
fn files_that_can_shrink_are_known() {
    let memory = GuestMemory::new();
    memory.set(vec![region(0, MIB)]).expect("a region");
    assert_eq!(memory.shrinkable(), 1);
    let sealed = region(0, MIB);
    rustix::fs::fcntl_add_seals(&sealed.fd, SealFlags::SHRINK).expect("a seal");
    memory.set(vec![sealed]).expect("a region");
    assert_eq!(memory.shrinkable(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A buffer is the concatenation of its parts, however they lie, and slices of it are those of the bytes.
    #[test]
    fn buffers_are_their_parts_in_order(
        parts in proptest::collection::vec((0..3 * 8192u64, 0..3000u64), 0..40),
        cut in (any::<prop::sample::Index>(), any::<prop::sample::Index>()),
    ) {
        let memory = GuestMemory::new();
        memory.set((0..3).map(|i| region(i * 8192, 8192)).collect()).expect("regions");
        let guard = memory.guard();
        let all = guard.iobuf(&[(0, 3 * 8192)], Access::Write).expect("all of it");
        let model: Vec<u8> = (0..3 * 8192u32).map(|i| (i.wrapping_mul(2654435761) >> 24) as u8).collect();
        all.copy_from(&model);
        let parts: Vec<_> = parts.into_iter().map(|(addr, len)| (addr, len.min(3 * 8192 - addr))).collect();
        let mut expected = Vec::new();
        for (addr, len) in &parts {
            expected.extend_from_slice(&model[*addr as usize..(addr + len) as usize]);
        }
        let buf = guard.iobuf(&parts, Access::Read).expect("a buffer");
        prop_assert!(buf.to_vec() == expected);
        prop_assert!(buf.segments().iter().all(|s| !s.is_empty()));
        let (a, b) = (cut.0.index(buf.len() + 1), cut.1.index(buf.len() + 1));
        let range = a.min(b)..a.max(b);
        prop_assert!(buf.slice(range.clone()).to_vec() == expected[range]);
    }
}
