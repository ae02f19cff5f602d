//! Shared words: aligned values in a mapped file, 64-bit ones that a killed process leaves behind, and 32-bit ones that another
//! process writes.

#![expect(unsafe_code, reason = "maps a file and accesses it as atomics")]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::file::File;

/// Where words are kept, for tests that look at each store.
pub trait WordStore: Send + Sync {
    /// How many words there are.
    fn count(&self) -> usize;
    /// The value of a word; the index is below `count`.
    fn load(&self, index: usize) -> u64;
    /// Sets a word; the index is below `count`.
    fn store(&self, index: usize, value: u64);
}

/// A row of 64-bit words in native byte order, shared by its clones. Stores are `Release`, loads are `Acquire`.
#[derive(Clone)]
pub struct Words {
    store: Store,
}

#[derive(Clone)]
enum Store {
    Mapped(Arc<Mapping>),
    Custom(Arc<dyn WordStore>),
}

impl Words {
    /// Maps `count` words at `offset` bytes (a multiple of 8) of a file, shared.
    ///
    /// The file must have the words already, and blocks for them: a store to a hole of a full file system, or past
    /// an end that moved, would end the process. `InvalidInput` for a file that is too short or a [`File`] without
    /// a descriptor.
    pub fn map(file: &File, offset: u64, count: usize) -> io::Result<Words> {
        let fd = file
            .as_fd()
            .ok_or_else(|| invalid("words need a file with a descriptor"))?;
        Words::map_fd(fd, offset, count)
    }

    /// [`map`](Words::map) for a plain descriptor, open for reading and writing.
    pub fn map_fd(fd: BorrowedFd<'_>, offset: u64, count: usize) -> io::Result<Words> {
        let bytes = count.checked_mul(8).and_then(|b| u64::try_from(b).ok());
        let end = bytes
            .and_then(|b| b.checked_add(offset))
            .ok_or_else(|| invalid("words overflow"))?;
        if !offset.is_multiple_of(8) {
            return Err(invalid("words are at a multiple of 8 bytes"));
        }
        let stat = rustix::fs::fstat(fd.as_fd())?;
        if u64::try_from(stat.st_size).unwrap_or(0) < end {
            return Err(invalid("the file is too short for the words"));
        }
        let page = rustix::param::page_size() as u64;
        let skip = offset % page;
        let len = usize::try_from(end - (offset - skip))
            .map_err(|_| invalid("words overflow"))?
            .max(8);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                offset - skip,
            )?
        };
        let base = NonNull::new(base).ok_or_else(|| invalid("mapped at zero"))?;
        Ok(Words {
            store: Store::Mapped(Arc::new(Mapping {
                base,
                len,
                skip: skip as usize,
                count,
            })),
        })
    }

    /// Words that are kept elsewhere.
    pub fn custom(store: Arc<dyn WordStore>) -> Words {
        Words {
            store: Store::Custom(store),
        }
    }

    /// How many words there are.
    pub fn count(&self) -> usize {
        match &self.store {
            Store::Mapped(mapping) => mapping.count,
            Store::Custom(store) => store.count(),
        }
    }

    /// The value of a word. Panics for an index past the end.
    pub fn load(&self, index: usize) -> u64 {
        match &self.store {
            Store::Mapped(mapping) => mapping.word(index).load(Ordering::Acquire),
            Store::Custom(store) => store.load(index),
        }
    }

    /// Sets a word; everything this thread did before is visible to who loads it. Panics for an index past the end.
    pub fn store(&self, index: usize, value: u64) {
        match &self.store {
            Store::Mapped(mapping) => mapping.word(index).store(value, Ordering::Release),
            Store::Custom(store) => store.store(index, value),
        }
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Words({})", self.count())
    }
}

/// A row of 32-bit words in native byte order that other processes can map as well, and write at any time: doorbells. Stores
/// are `Release`, loads are `Acquire`.
#[derive(Clone, Debug)]
pub struct SharedDwords {
    fd: Arc<OwnedFd>,
    words: Arc<Mapping>,
}

impl SharedDwords {
    /// Makes `count` words of zero, an even number, in memory that nobody can cut short.
    pub fn new(count: usize) -> io::Result<SharedDwords> {
        let fd = memfd_create("words", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, count as u64 * 4)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        SharedDwords::map(fd, count)
    }

    /// Maps the first `count` words, an even number, of what somebody else made.
    pub fn map(fd: OwnedFd, count: usize) -> io::Result<SharedDwords> {
        let Store::Mapped(words) = Words::map_fd(fd.as_fd(), 0, count / 2)?.store else {
            return Err(invalid("no mapping"));
        };
        Ok(SharedDwords {
            fd: Arc::new(fd),
            words,
        })
    }

    /// What another process maps.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// The value of a word. Panics for an index past the end.
    pub fn load(&self, index: usize) -> u32 {
        self.words.dword(index).load(Ordering::Acquire)
    }

    /// Sets a word. Panics for an index past the end.
    pub fn store(&self, index: usize, value: u32) {
        self.words.dword(index).store(value, Ordering::Release);
    }
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text.to_owned())
}

#[derive(Debug)]
struct Mapping {
    base: NonNull<std::ffi::c_void>,
    len: usize,
    /// Bytes from the start of the mapping to the first word.
    skip: usize,
    count: usize,
}

// SAFETY: the mapping is only accessed through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.count, "word {index} of {}", self.count);
        // SAFETY: inside the mapping, aligned to 8 bytes (pages are, and `skip` is a multiple of 8), alive as long
        // as `self`, and accessed as atomics only.
        unsafe {
            &*self
                .base
                .as_ptr()
                .byte_add(self.skip + index * 8)
                .cast::<AtomicU64>()
        }
    }

    /// Half a word. A mapping is accessed by words or by halves, never by both.
    fn dword(&self, index: usize) -> &AtomicU32 {
        assert!(index / 2 < self.count, "word {index} of {}", 2 * self.count);
        // SAFETY: as in `word`, aligned to 4 bytes.
        unsafe {
            &*self
                .base
                .as_ptr()
                .byte_add(self.skip + index * 4)
                .cast::<AtomicU32>()
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, to which no reference is left. It fails for no mapping that mmap returned.
        let _ = unsafe { munmap(self.base.as_ptr(), self.len) };
    }
}
