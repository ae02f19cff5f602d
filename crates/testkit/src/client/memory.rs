//! Memory shared with the server: memfd-backed regions, and bounds-checked windows into them.
//!
//! The only module of the client with `unsafe`. The other side is another process that may change
//! any byte at any time, so nothing here ever forms a reference to shared bytes: scalars are
//! accessed as atomics, runs of bytes are copied through raw pointers.

#![expect(unsafe_code, reason = "maps memory that the server maps too")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Where one region of shared memory appears to the device, and how long it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionSpec {
    /// Address in descriptors ("guest physical"), or `None` for the address in this process.
    pub guest: Option<u64>,
    /// Length in bytes, a multiple of the page size.
    pub len: usize,
}

/// One mapped region.
#[derive(Debug)]
pub struct Region {
    fd: OwnedFd,
    base: NonNull<u8>,
    len: usize,
    guest: u64,
}

// SAFETY: `base` points to a mapping that lives as long as the region and is only accessed by
// atomics and raw copies, which are as valid on one thread as on another.
unsafe impl Send for Region {}
// SAFETY: as above; no access goes through a reference to the shared bytes.
unsafe impl Sync for Region {}

impl Region {
    fn new(spec: RegionSpec) -> io::Result<Self> {
        let fd = memfd_create("zbdkit-client", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, spec.len as u64)?;
        Self::map(fd, spec)
    }

    fn map(fd: OwnedFd, spec: RegionSpec) -> io::Result<Self> {
        // SAFETY: a new shared mapping at an address of the kernel's choice. It stays as long as the
        // region does; a file that is too short or shortened later gives SIGBUS, not wrong memory.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                spec.len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )
        }?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let guest = spec.guest.unwrap_or(base.as_ptr() as u64);
        Ok(Region {
            fd,
            base,
            len: spec.len,
            guest,
        })
    }

    /// Address of the region in descriptors.
    pub fn guest(&self) -> u64 {
        self.guest
    }

    /// Address of the region in this process ("user address" of vhost-user).
    pub fn user(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the region has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memfd behind the region.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; every `Window` into it holds an `Arc` of its owner, so
        // none is left.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// All memory that a client shares with its server.
#[derive(Debug)]
pub struct SharedMemory {
    regions: Vec<Region>,
}

impl SharedMemory {
    /// Maps the given regions, zero-filled.
    ///
    /// # Errors
    /// What memfd_create, ftruncate or mmap say.
    pub fn new(specs: &[RegionSpec]) -> io::Result<Arc<Self>> {
        let regions = specs
            .iter()
            .map(|&spec| Region::new(spec))
            .collect::<io::Result<_>>()?;
        Ok(Arc::new(SharedMemory { regions }))
    }

    /// Maps memory of the other side: each region's file, from its start. The caller trusts it to be
    /// as long as it says.
    ///
    /// # Errors
    /// What mmap says.
    pub(super) fn of_others(files: Vec<(OwnedFd, RegionSpec)>) -> io::Result<Arc<Self>> {
        let regions = files
            .into_iter()
            .map(|(fd, spec)| Region::map(fd, spec))
            .collect::<io::Result<_>>()?;
        Ok(Arc::new(SharedMemory { regions }))
    }

    /// The regions, in the order given.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// A window of `len` bytes at guest address `guest`; `None` unless all of it is in one region.
    pub fn window(self: &Arc<Self>, guest: u64, len: usize) -> Option<Window> {
        let region = self.regions.iter().find(|r| {
            guest >= r.guest
                && guest - r.guest <= r.len as u64
                && r.len as u64 - (guest - r.guest) >= len as u64
        })?;
        let offset = usize::try_from(guest - region.guest).ok()?;
        // SAFETY: `offset <= region.len`, so the pointer stays within (or one past) the mapping.
        let base = unsafe { region.base.add(offset) };
        Some(Window {
            base,
            len,
            guest,
            _memory: Arc::clone(self),
        })
    }
}

/// A bounds-checked piece of shared memory, which it keeps mapped.
///
/// All accessors panic when they are used outside the window: that is a defect of the test, never
/// something that the server can cause.
#[derive(Debug, Clone)]
pub struct Window {
    base: NonNull<u8>,
    len: usize,
    guest: u64,
    _memory: Arc<SharedMemory>,
}

// SAFETY: the mapping is kept alive by `_memory`, and is only accessed by atomics and raw copies.
unsafe impl Send for Window {}
// SAFETY: as above. Two threads that copy over the same bytes get mixed bytes, as with the server.
unsafe impl Sync for Window {}

macro_rules! scalar {
    ($load:ident, $store:ident, $int:ty, $atomic:ty) => {
        /// Loads a little-endian integer at byte `offset`, which must be naturally aligned.
        #[inline]
        pub fn $load(&self, offset: usize, order: Ordering) -> $int {
            let ptr = self.at(offset, size_of::<$int>()).cast::<$int>();
            assert!(ptr.is_aligned(), "unaligned access at {offset}");
            // SAFETY: in bounds and aligned as just checked, mapped as long as `self` lives, and all
            // concurrent accesses of this process to scalars are atomic too.
            <$int>::from_le(unsafe { <$atomic>::from_ptr(ptr.as_ptr()) }.load(order))
        }

        /// Stores a little-endian integer at byte `offset`, which must be naturally aligned.
        #[inline]
        pub fn $store(&self, offset: usize, value: $int, order: Ordering) {
            let ptr = self.at(offset, size_of::<$int>()).cast::<$int>();
            assert!(ptr.is_aligned(), "unaligned access at {offset}");
            // SAFETY: as in the load above.
            unsafe { <$atomic>::from_ptr(ptr.as_ptr()) }.store(value.to_le(), order);
        }
    };
}

impl Window {
    /// Guest address of the first byte.
    pub fn guest(&self) -> u64 {
        self.guest
    }

    /// Address of the first byte in this process.
    pub fn user(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The `len` bytes from `offset` as a window of their own.
    pub fn slice(&self, offset: usize, len: usize) -> Window {
        Window {
            base: self.at(offset, len),
            len,
            guest: self.guest + offset as u64,
            _memory: Arc::clone(&self._memory),
        }
    }

    /// Copies out `into.len()` bytes from `offset`.
    #[inline]
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: `from` is valid for that many bytes; `into` is memory of this process alone, so
        // the two do not overlap. The server may write meanwhile: then the bytes are any mixture.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), into.len()) };
    }

    /// Copies out `len` bytes from `offset`.
    pub fn to_vec(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(offset, &mut bytes);
        bytes
    }

    /// Copies `from` to `offset`.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) {
        let to = self.at(offset, from.len());
        // SAFETY: as in `read`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), from.len()) };
    }

    /// Sets `len` bytes from `offset` to `value`.
    pub fn fill(&self, offset: usize, len: usize, value: u8) {
        let to = self.at(offset, len);
        // SAFETY: `to` is valid for `len` bytes.
        unsafe { std::ptr::write_bytes(to.as_ptr(), value, len) };
    }

    scalar!(load_u16, store_u16, u16, AtomicU16);
    scalar!(load_u32, store_u32, u32, AtomicU32);
    scalar!(load_u64, store_u64, u64, AtomicU64);

    #[inline]
    fn at(&self, offset: usize, len: usize) -> NonNull<u8> {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "{len} bytes at {offset} of a window of {} bytes",
            self.len
        );
        // SAFETY: `offset <= self.len`, within the mapping that `_memory` keeps.
        unsafe { self.base.add(offset) }
    }
}

/// Memory for the rings of the `virtio-driver` crate, whose API wants a plain slice of it.
#[derive(Debug)]
pub(super) struct LeakedMemory {
    pub(super) fd: OwnedFd,
    pub(super) bytes: &'static mut [u8],
}

impl LeakedMemory {
    /// Maps `len` bytes and never unmaps them: a few pages for each connection of a test.
    pub(super) fn new(len: usize) -> io::Result<Self> {
        let region = Region::new(RegionSpec { guest: None, len })?;
        let region = std::mem::ManuallyDrop::new(region);
        // SAFETY: the region is never dropped, so the mapping lives for ever, it is `len` bytes of
        // initialised (zero) memory, and nobody else in this process has a pointer to it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(region.base.as_ptr(), len) };
        Ok(LeakedMemory {
            fd: region.fd.try_clone()?,
            bytes,
        })
    }
}

/// The configuration space as `virtio-driver` reads it.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(super) struct ConfigBytes(pub(super) [u8; super::config::CONFIG_SIZE]);

// SAFETY: an array of bytes: no padding, every bit pattern is valid, and it holds no reference.
unsafe impl virtio_driver::ByteValued for ConfigBytes {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_lies_in_one_region_only() {
        let specs = [
            RegionSpec {
                guest: Some(0x1000),
                len: 4096,
            },
            RegionSpec {
                guest: Some(0x2000),
                len: 4096,
            },
        ];
        let memory = SharedMemory::new(&specs).unwrap();
        assert!(memory.window(0x1000, 4096).is_some());
        assert!(memory.window(0x2fff, 1).is_some());
        assert!(memory.window(0x1fff, 2).is_none());
        assert!(memory.window(0xfff, 1).is_none());
        assert!(memory.window(0x3000, 1).is_none());
        assert!(memory.window(u64::MAX, 2).is_none());
    }

    #[test]
    fn integers_are_little_endian() {
        let memory = SharedMemory::new(&[RegionSpec {
            guest: Some(0),
            len: 4096,
        }])
        .unwrap();
        let window = memory.window(64, 64).unwrap();
        window.store_u32(4, 0x0102_0304, Ordering::Relaxed);
        assert_eq!(window.to_vec(3, 6), [0, 4, 3, 2, 1, 0]);
        assert_eq!(window.load_u16(4, Ordering::Relaxed), 0x0304);
    }

    #[test]
    #[should_panic(expected = "2 bytes at 63")]
    fn accesses_past_the_window_are_refused() {
        let memory = SharedMemory::new(&[RegionSpec {
            guest: Some(0),
            len: 4096,
        }])
        .unwrap();
        memory.window(0, 64).unwrap().write(63, &[1, 2]);
    }
}
