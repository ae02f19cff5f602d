//! The client's memory: mapped where it came with a file descriptor, asked for by messages where it did not.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::io::Errno;
use zbdkit_io::MemGuard;
use zbdkit_io::mem::{Access, GuestMemory, MAX_REGIONS, MemError, Region, StillInUse};
use zbdkit_spec::vfio_user::{DmaMap, dma_map};

use crate::peer::Peer;

/// Why the client's memory cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// Not (wholly) memory that the client gave us.
    #[error("address {address:#x} with {len:#x} bytes is not in the client's memory")]
    Outside {
        /// DMA address.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// The client does not let us read, or write, there.
    #[error("the client's memory at {address:#x} does not allow this access")]
    Denied {
        /// DMA address.
        address: u64,
    },
    /// The client took the memory away, or reset the device, meanwhile.
    #[error("the client took the memory away meanwhile")]
    Cancelled,
    /// The client is gone.
    #[error("the client is gone")]
    Disconnected,
    /// The client says no.
    #[error("the client could not carry out the access: {0}")]
    Refused(Errno),
    /// Too many accesses wait.
    #[error("too many accesses to the client's memory wait")]
    Busy,
}

/// Why memory cannot be mapped or unmapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    #[error("memory at {address:#x} with {size:#x} bytes overlaps another region")]
    Overlap { address: u64, size: u64 },
    #[error("more than {MAX_REGIONS} regions of memory")]
    TooMany,
    #[error("unmapping {size:#x} bytes at {address:#x} would cut a region")]
    Cuts { address: u64, size: u64 },
    #[error(transparent)]
    Memory(#[from] MemError),
    #[error(transparent)]
    InUse(#[from] StillInUse),
}

impl MapError {
    pub(crate) fn errno(&self) -> Errno {
        match self {
            MapError::Overlap { .. } => Errno::EXIST,
            MapError::TooMany => Errno::NOSPC,
            MapError::Memory(MemError::Map { source, .. }) => {
                Errno::from_io_error(source).unwrap_or(Errno::INVAL)
            }
            MapError::Memory(_) | MapError::Cuts { .. } => Errno::INVAL,
            MapError::InUse(_) => Errno::BUSY,
        }
    }
}

/// A handle to the client's memory, for any thread. Clones give the same.
///
/// The quick way is [`guard`](Self::guard): buffers right in the memory that is mapped. [`read`](Self::read) and
/// [`write`](Self::write) copy, and reach all of it. Hold no guard over them: the client may be waiting for
/// that guard's end before it answers anything.
#[derive(Clone)]
pub struct Dma {
    memory: GuestMemory,
    shared: Arc<Shared>,
}

struct Shared {
    /// Apart from each other, sorted by address.
    ranges: Mutex<Vec<DmaRange>>,
    peer: Peer,
}

#[derive(Debug, Clone, Copy)]
struct DmaRange {
    address: u64,
    size: u64,
    readable: bool,
    writable: bool,
    /// It came with a file descriptor.
    mapped: bool,
    /// Being taken away: no new access.
    leaving: bool,
}

impl DmaRange {
    fn end(&self) -> u64 {
        self.address + self.size
    }
}

impl Dma {
    pub(crate) fn new() -> io::Result<Dma> {
        Ok(Dma {
            memory: GuestMemory::new(),
            shared: Arc::new(Shared {
                ranges: Mutex::default(),
                peer: Peer::new()?,
            }),
        })
    }

    /// The memory that is mapped, for one request or a batch of them. Buffers over it keep it mapped; whoever unmaps it
    /// waits for them.
    pub fn guard(&self) -> MemGuard {
        self.memory.guard()
    }

    /// Whether all of a range came with file descriptors, so that [`guard`](Self::guard) can have buffers over it.
    pub fn is_mapped(&self, address: u64, len: u64) -> bool {
        let mut done = 0;
        while done < len {
            match self.piece(address.wrapping_add(done), len - done) {
                Some((range, room)) if range.mapped => done += room,
                _ => return false,
            }
        }
        true
    }

    /// Whether all of a range is memory of the client, however it came.
    pub fn covers(&self, address: u64, len: u64) -> bool {
        let mut done = 0;
        while done < len {
            match self.piece(address.wrapping_add(done), len - done) {
                Some((_, room)) => done += room,
                None => return false,
            }
        }
        true
    }

    /// Copies bytes from the client's memory.
    ///
    /// # Errors
    /// See [`DmaError`]; `into` may have been filled in part.
    pub async fn read(&self, address: u64, into: &mut [u8]) -> Result<(), DmaError> {
        let mut done = 0;
        while done < into.len() {
            let at = address.wrapping_add(done as u64);
            let (range, room) = self.require(at, into.len() - done)?;
            if !range.readable {
                return Err(DmaError::Denied { address: at });
            }
            let out = &mut into[done..done + room];
            if range.mapped {
                let buf = self.guard().iobuf(&[(at, room as u64)], Access::Read);
                buf.map_err(|error| denied(&error, at, room))?.copy_to(out);
            } else {
                out.copy_from_slice(&self.shared.peer.read(at, room).await?);
            }
            done += room;
        }
        Ok(())
    }

    /// Copies bytes to the client's memory.
    ///
    /// # Errors
    /// See [`DmaError`]; a part may have been written.
    pub async fn write(&self, address: u64, from: &[u8]) -> Result<(), DmaError> {
        let mut done = 0;
        while done < from.len() {
            let at = address.wrapping_add(done as u64);
            let (range, room) = self.require(at, from.len() - done)?;
            if !range.writable {
                return Err(DmaError::Denied { address: at });
            }
            let data = &from[done..done + room];
            if range.mapped {
                let buf = self.guard().iobuf(&[(at, room as u64)], Access::Write);
                buf.map_err(|error| denied(&error, at, room))?.copy_from(data);
            } else {
                self.shared.peer.write(at, data.to_vec()).await?;
            }
            done += room;
        }
        Ok(())
    }

    /// The range at an address, and how much can be moved there at once: at least a byte.
    fn require(&self, address: u64, len: usize) -> Result<(DmaRange, usize), DmaError> {
        let outside = DmaError::Outside {
            address,
            len: len as u64,
        };
        let (range, room) = self.piece(address, len as u64).ok_or(outside)?;
        let room = room as usize;
        Ok((
            range,
            if range.mapped {
                room
            } else {
                room.min(self.shared.peer.chunk())
            },
        ))
    }

    /// The range at an address, and how much of `len` lies in it.
    fn piece(&self, address: u64, len: u64) -> Option<(DmaRange, u64)> {
        let ranges = self.lock();
        let index = ranges
            .partition_point(|range| range.address <= address)
            .checked_sub(1)?;
        let range = ranges[index];
        if address >= range.end() || range.leaving {
            return None;
        }
        Some((range, len.min(range.end() - address)))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<DmaRange>> {
        self.shared.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // For the session.

    pub(crate) fn peer(&self) -> &Peer {
        &self.shared.peer
    }

    pub(crate) fn map(&self, map: &DmaMap, fd: Option<OwnedFd>) -> Result<(), MapError> {
        let (address, size) = (map.address.get(), map.size.get());
        let flags = map.flags.get();
        let range = DmaRange {
            address,
            size,
            readable: flags & dma_map::READABLE != 0,
            writable: flags & dma_map::WRITEABLE != 0,
            mapped: fd.is_some(),
            leaving: false,
        };
        let mut ranges = self.lock();
        if ranges.len() >= MAX_REGIONS {
            return Err(MapError::TooMany);
        }
        let index = ranges.partition_point(|other| other.end() <= address);
        if ranges.get(index).is_some_and(|next| next.address < range.end()) {
            return Err(MapError::Overlap { address, size });
        }
        if let Some(fd) = fd {
            self.memory.add(Region {
                guest_addr: address,
                size,
                user_addr: address,
                fd,
                offset: map.offset.get(),
                writable: range.writable,
            })?;
        }
        ranges.insert(index, range);
        Ok(())
    }

    /// Stops new access to every region in a range, and ends accesses by message. Returns the bytes that leave.
    pub(crate) fn begin_unmap(&self, address: u64, size: u64) -> Result<u64, MapError> {
        let mut ranges = self.lock();
        let end = address.saturating_add(size);
        let touched = |range: &&mut DmaRange| range.address < end && address < range.end();
        if ranges
            .iter_mut()
            .filter(touched)
            .any(|range| range.address < address || range.end() > end)
        {
            return Err(MapError::Cuts { address, size });
        }
        let mut bytes = 0;
        for range in ranges.iter_mut().filter(touched) {
            if range.mapped && !range.leaving {
                self.memory.remove(range.address, range.size)?;
            }
            range.leaving = true;
            bytes += range.size;
        }
        drop(ranges);
        self.peer().cancel(address, size);
        Ok(bytes)
    }

    /// Whether nothing uses what is leaving any more; if so, it is gone. Waits until `deadline`.
    pub(crate) fn finish_unmap(&self, deadline: Instant) -> Result<(), StillInUse> {
        self.memory.wait_released(deadline)?;
        self.lock().retain(|range| !range.leaving);
        Ok(())
    }

    /// Everything goes. Returns once nothing uses it, at the latest at `deadline`.
    pub(crate) fn revoke(&self, deadline: Instant) -> Result<(), StillInUse> {
        self.lock().iter_mut().for_each(|range| range.leaving = true);
        self.memory.revoke();
        self.finish_unmap(deadline)
    }
}

fn denied(error: &MemError, address: u64, len: usize) -> DmaError {
    match error {
        MemError::ReadOnly { .. } => DmaError::Denied { address },
        // It was unmapped after we looked.
        _ => DmaError::Outside {
            address,
            len: len as u64,
        },
    }
}
