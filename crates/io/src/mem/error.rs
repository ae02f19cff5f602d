//! What can be wrong with guest memory.

use std::io;

use super::MAX_REGIONS;

/// Why guest memory cannot be mapped or reached.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// A region of no bytes.
    #[error("guest memory region at {guest_addr:#x} is empty")]
    Empty {
        /// Guest address of the region.
        guest_addr: u64,
    },
    /// An address or file offset plus the size does not fit 64 bits (or this machine).
    #[error("guest memory region at {guest_addr:#x} with {size:#x} bytes overflows")]
    Overflow {
        /// Guest address of the region.
        guest_addr: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// The offset is not at a page of the file.
    #[error("guest memory region at {guest_addr:#x}: file offset {offset:#x} is not aligned to pages")]
    Unaligned {
        /// Guest address of the region.
        guest_addr: u64,
        /// Offset in the file in bytes.
        offset: u64,
    },
    /// The file ends before the region does.
    #[error("guest memory region at {guest_addr:#x} ends at {end:#x} of a file with {file_len:#x} bytes")]
    PastEndOfFile {
        /// Guest address of the region.
        guest_addr: u64,
        /// Where the region ends in the file.
        end: u64,
        /// The length of the file.
        file_len: u64,
    },
    /// The region shares guest addresses with another one.
    #[error("guest memory region at {guest_addr:#x} overlaps another")]
    Overlap {
        /// Guest address of the region.
        guest_addr: u64,
    },
    /// More than [`MAX_REGIONS`].
    #[error("more than {MAX_REGIONS} guest memory regions")]
    TooManyRegions,
    /// No region with this address and size to remove.
    #[error("no guest memory region at {guest_addr:#x} with {size:#x} bytes")]
    NoSuchRegion {
        /// Guest address of the region.
        guest_addr: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// The kernel did not map the file.
    #[error("guest memory region at {guest_addr:#x} cannot be mapped")]
    Map {
        /// Guest address of the region.
        guest_addr: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// Bytes that are not (wholly) in guest memory.
    #[error("guest address {addr:#x} with {len:#x} bytes is not in guest memory")]
    Outside {
        /// First guest address.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The device would write to memory that it may only read.
    #[error("guest address {addr:#x} is not writable")]
    ReadOnly {
        /// First guest address.
        addr: u64,
    },
    /// The segments add up to more than a buffer can have.
    #[error("guest buffers are too long together")]
    TooLong,
}

impl From<MemError> for io::Error {
    fn from(error: MemError) -> io::Error {
        let kind = match error {
            MemError::Map { ref source, .. } => source.kind(),
            MemError::Outside { .. } | MemError::ReadOnly { .. } => io::ErrorKind::PermissionDenied,
            _ => io::ErrorKind::InvalidInput,
        };
        io::Error::new(kind, error)
    }
}

/// An older map of guest memory was still held at the deadline: by a request, or by an I/O operation in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest memory is still in use by {maps} older maps")]
pub struct StillInUse {
    /// How many maps, older than the current one, are held.
    pub maps: usize,
}
