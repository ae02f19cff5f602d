//! What a device has to offer to be served over vfio-user.

use std::fmt;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use crate::dma::Dma;
use crate::irq::{Interrupts, IrqKind};
use crate::line::Line;

/// A region: a BAR, the expansion ROM, or configuration space. Its index is its place in [`Device::regions`].
#[derive(Debug, Clone, Default)]
pub struct Region {
    /// Bytes; zero where the device does not have this region.
    pub size: u64,
    /// The client may read it.
    pub readable: bool,
    /// The client may write it.
    pub writable: bool,
    /// Parts that the client may map instead. QEMU posts no writes to a device that has any.
    pub mmap: Option<Mmap>,
}

/// Parts of a region that the client may map.
#[derive(Debug, Clone)]
pub struct Mmap {
    /// The file that holds the region.
    pub fd: Arc<OwnedFd>,
    /// Where in the file the region starts, in bytes.
    pub offset: u64,
    /// The parts, in bytes from the region's start, each aligned to pages.
    pub areas: Vec<Range<u64>>,
}

/// What a device works with while a client is connected. Clones give the same.
#[derive(Clone)]
pub struct Link {
    /// The client's memory.
    pub dma: Dma,
    /// The client's interrupts.
    pub interrupts: Arc<Interrupts>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").finish_non_exhaustive()
    }
}

/// A device behind the protocol. All calls come from the server's thread, one at a time; none may wait for
/// [`Dma::read`] or [`Dma::write`], whose answers that thread takes.
pub trait Device {
    /// Its regions, the same every time. A PCI device has nine, those it lacks with no bytes.
    fn regions(&self) -> &[Region];

    /// Its kinds of interrupts, the same every time. A PCI device has five.
    fn irqs(&self) -> &[IrqKind];

    /// A client connected. The device starts as after a reset.
    ///
    /// # Errors
    /// Where it did not come to rest from the last client; the new one is sent away.
    fn connected(&mut self, link: Link) -> Result<(), Stuck>;

    /// Fills `out` from a readable region. The range lies in the region.
    ///
    /// # Errors
    /// What the client is told.
    fn region_read(&mut self, region: u32, offset: u64, out: &mut [u8]) -> Result<(), Errno>;

    /// Takes a write to a writable region. The range lies in the region.
    ///
    /// # Errors
    /// What the client is told, if it listens.
    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;

    /// Whether a thread of the device wants to wait at the connection's socket now. One that sleeps until the client posts
    /// a write is then woken by that itself. Asked whenever the server has answered everything.
    fn wants_line(&self) -> bool {
        false
    }

    /// The socket, after [`wants_line`](Self::wants_line). To be dropped without delay where something else than such writes
    /// comes, and where the server wants it back.
    fn take_line(&mut self, line: Line) {
        drop(line);
    }

    /// Resets the device, to the state that it had when the client connected. No access to the client's memory is in flight
    /// afterwards.
    ///
    /// # Errors
    /// Where requests did not end in time.
    fn reset(&mut self) -> Result<(), Stuck>;

    /// Memory from `address`, `size` bytes, is about to be taken away: new access fails already. The server waits for
    /// what is in flight; the device may cut that short.
    fn unmapping(&mut self, address: u64, size: u64) {
        let _ = (address, size);
    }

    /// What touched memory that the client takes away did not end in time: it is told so, and the device must not
    /// answer another request until a reset succeeds.
    fn fatal(&mut self);

    /// The client is gone. No access to its memory is in flight afterwards.
    ///
    /// # Errors
    /// Where requests did not end in time.
    fn disconnected(&mut self) -> Result<(), Stuck>;
}

/// Requests in flight that did not end in time; they keep the client's memory until they do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("requests are still in flight after {} s", .0.as_secs())]
pub struct Stuck(
    /// How long was waited.
    pub Duration,
);
