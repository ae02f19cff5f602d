//! A split virtqueue, driver side (virtio 1.3, 2.7), that can also be abused by hand.
//!
//! The well-behaved half (`add`, `publish`, `next_used`) keeps its own copy of every chain and believes
//! nothing that it reads back from shared memory. The other half writes descriptors, avail entries
//! and indices as they are given, for tests of what a hostile driver may do.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};

use rustix::event::{EventfdFlags, eventfd};

use super::error::ClientError;
use super::memory::Window;

/// Descriptor continues at `next`.
pub const NEXT: u16 = 1;
/// Descriptor is written by the device.
pub const WRITE: u16 = 2;
/// Descriptor holds a table of descriptors.
pub const INDIRECT: u16 = 4;

const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;
const NONE: u16 = u16::MAX;

/// Bytes of one descriptor.
pub const DESC_SIZE: usize = 16;

/// One descriptor, as it lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Desc {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor with [`NEXT`].
    pub next: u16,
}

impl Desc {
    /// Writes the descriptor as entry `index` of the table in `table`.
    #[inline]
    pub fn store(&self, table: &Window, index: usize) {
        let at = index * DESC_SIZE;
        table.store_u64(at, self.addr, Ordering::Relaxed);
        table.store_u32(at + 8, self.len, Ordering::Relaxed);
        table.store_u16(at + 12, self.flags, Ordering::Relaxed);
        table.store_u16(at + 14, self.next, Ordering::Relaxed);
    }

    /// Reads entry `index` of the table in `table`.
    pub fn load(table: &Window, index: usize) -> Self {
        let at = index * DESC_SIZE;
        Desc {
            addr: table.load_u64(at, Ordering::Relaxed),
            len: table.load_u32(at + 8, Ordering::Relaxed),
            flags: table.load_u16(at + 12, Ordering::Relaxed),
            next: table.load_u16(at + 14, Ordering::Relaxed),
        }
    }
}

/// A piece of a request in shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest address.
    pub guest: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

/// An element of the used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain.
    pub head: u32,
    /// Bytes that the device says it wrote; `None` where the engine hides it.
    pub len: Option<u32>,
}

/// What a chain in the ring is, by its head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InFlight {
    No,
    Chain,
    ByHand,
}

/// The ring of one queue.
#[derive(Debug)]
pub struct SplitRing {
    size: u16,
    desc: Window,
    avail: Window,
    used: Window,
    kick: OwnedFd,
    call: OwnedFd,
    event_idx: bool,
    /// Free-running index of the next avail entry; `published` is what the device may see.
    avail_next: u16,
    published: u16,
    used_next: u16,
    free: Vec<u16>,
    /// Our own copy of each chain, by descriptor; `NONE` ends it.
    next: Vec<u16>,
    in_flight: Vec<InFlight>,
    kicks: u64,
}

impl SplitRing {
    /// Bytes of (descriptor table, avail ring, used ring) with `size` entries.
    pub(super) fn sizes(size: u16) -> [usize; 3] {
        let n = usize::from(size);
        [n * DESC_SIZE, 6 + n * 2, 6 + n * 8]
    }

    pub(super) fn new(size: u16, parts: [Window; 3], event_idx: bool) -> Result<Self, ClientError> {
        let [desc, avail, used] = parts;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let n = usize::from(size);
        let mut ring = SplitRing {
            size,
            desc,
            avail,
            used,
            kick: eventfd(0, flags)?,
            call: eventfd(0, flags)?,
            event_idx,
            avail_next: 0,
            published: 0,
            used_next: 0,
            free: (0..size).rev().collect(),
            next: vec![NONE; n],
            in_flight: vec![InFlight::No; n],
            kicks: 0,
        };
        ring.set_interrupts(false);
        Ok(ring)
    }

    /// Entries of the descriptor table and of both rings.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Descriptors that no chain uses.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Adds a chain of `segments`, which the device does not see before [`SplitRing::publish`].
    #[inline]
    pub fn add(&mut self, segments: &[Segment]) -> Result<u16, ClientError> {
        if segments.is_empty() || segments.len() > self.free.len() {
            return Err(ClientError::QueueFull);
        }
        let mut next = NONE;
        for segment in segments.iter().rev() {
            let index = self.free.pop().unwrap_or(NONE);
            let more = if next == NONE { 0 } else { NEXT };
            let flags = more | if segment.writable { WRITE } else { 0 };
            let shown = if next == NONE { 0 } else { next };
            Desc {
                addr: segment.guest,
                len: segment.len,
                flags,
                next: shown,
            }
            .store(&self.desc, index.into());
            self.next[usize::from(index)] = next;
            next = index;
        }
        self.make_available(next, InFlight::Chain);
        Ok(next)
    }

    /// Adds a chain of one descriptor that names an indirect table of `entries` at `table`, filled by
    /// the caller.
    #[inline]
    pub fn add_indirect(&mut self, table: &Window, entries: usize) -> Result<u16, ClientError> {
        let head = self.free.pop().ok_or(ClientError::QueueFull)?;
        let len = (entries * DESC_SIZE) as u32;
        Desc {
            addr: table.guest(),
            len,
            flags: INDIRECT,
            next: 0,
        }
        .store(&self.desc, head.into());
        self.next[usize::from(head)] = NONE;
        self.make_available(head, InFlight::Chain);
        Ok(head)
    }

    /// Makes added chains visible and notifies the device if it wants that.
    ///
    /// # Errors
    /// If the eventfd cannot be written.
    #[inline]
    pub fn publish(&mut self) -> Result<(), ClientError> {
        let (old, new) = (self.published, self.avail_next);
        if old == new {
            return Ok(());
        }
        self.avail.store_u16(2, new, Ordering::Release);
        self.published = new;
        // The index must be visible before we look whether the device sleeps.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self
                .used
                .load_u16(4 + 8 * usize::from(self.size), Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.used.load_u16(0, Ordering::Relaxed) & NO_NOTIFY == 0
        };
        if wanted { self.kick() } else { Ok(()) }
    }

    /// Takes the next used element. Its descriptors become free if the chain was ours.
    ///
    /// # Errors
    /// `UnexpectedUsed` for a chain that was not in flight.
    #[inline]
    pub fn next_used(&mut self) -> Result<Option<Used>, ClientError> {
        if !self.has_used() {
            return Ok(None);
        }
        let (head, len) = self.used_entry(self.used_next);
        self.used_next = self.used_next.wrapping_add(1);
        let state = self.in_flight.get_mut(head as usize);
        match state.map(|s| std::mem::replace(s, InFlight::No)) {
            Some(InFlight::Chain) => {
                let mut index = head as u16;
                while index != NONE {
                    self.free.push(index);
                    index = self.next[usize::from(index)];
                }
            }
            Some(InFlight::ByHand) => {}
            Some(InFlight::No) | None => return Err(ClientError::UnexpectedUsed(head)),
        }
        Ok(Some(Used { head, len: Some(len) }))
    }

    /// Whether [`SplitRing::next_used`] has something.
    #[inline]
    pub fn has_used(&self) -> bool {
        self.used_index() != self.used_next
    }

    /// Asks for interrupts at the next used element, or for none.
    pub fn set_interrupts(&mut self, on: bool) {
        if self.event_idx {
            // With the event one behind, the device passes it once in 65536 elements.
            let event = if on {
                self.used_next
            } else {
                self.used_next.wrapping_sub(1)
            };
            self.avail
                .store_u16(4 + 2 * usize::from(self.size), event, Ordering::Relaxed);
        } else {
            self.avail
                .store_u16(0, if on { 0 } else { NO_INTERRUPT }, Ordering::Relaxed);
        }
        // Visible before the caller looks at the used index for the last time before it sleeps.
        fence(Ordering::SeqCst);
    }

    /// The eventfd by which the device interrupts.
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// The eventfd by which the device is notified.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// Notifications sent so far.
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// Takes pending interrupts off the eventfd; how many there were.
    pub fn take_interrupts(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.call, &mut count) {
            Ok(8) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }

    // By hand.

    /// Notifies the device, wanted or not.
    ///
    /// # Errors
    /// If the eventfd cannot be written.
    pub fn kick(&mut self) -> Result<(), ClientError> {
        self.kicks += 1;
        match rustix::io::write(&self.kick, &1u64.to_ne_bytes()) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Takes `count` descriptors out of use, for chains made by hand.
    ///
    /// # Errors
    /// `QueueFull` without that many.
    pub fn reserve(&mut self, count: usize) -> Result<Vec<u16>, ClientError> {
        let rest = self.free.len().checked_sub(count).ok_or(ClientError::QueueFull)?;
        Ok(self.free.split_off(rest))
    }

    /// Gives descriptors of [`SplitRing::reserve`] back.
    pub fn release(&mut self, descriptors: Vec<u16>) {
        self.free.extend(descriptors);
    }

    /// Makes the chain at `head`, written by hand, available. When it is used, nothing is freed.
    /// Any number may be given, also one outside the table; the device then may or may not use it.
    pub fn push_by_hand(&mut self, head: u16) {
        self.make_available(head, InFlight::ByHand);
    }

    /// Forgets that `head` is in flight, after the device has had its chance.
    pub fn forget(&mut self, head: u16) {
        if let Some(state) = self.in_flight.get_mut(usize::from(head)) {
            *state = InFlight::No;
        }
    }

    /// The descriptor table, to write entries with [`Desc::store`].
    pub fn descriptors(&self) -> &Window {
        &self.desc
    }

    /// The avail ring: flags, index, entries, used event.
    pub fn avail(&self) -> &Window {
        &self.avail
    }

    /// The used ring: flags, index, elements, avail event.
    pub fn used(&self) -> &Window {
        &self.used
    }

    /// The device's index in the used ring.
    pub fn used_index(&self) -> u16 {
        self.used.load_u16(2, Ordering::Acquire)
    }

    /// The used element at free-running index `index`: (head, length).
    #[inline]
    pub fn used_entry(&self, index: u16) -> (u32, u32) {
        let at = 4 + 8 * usize::from(index % self.size);
        (
            self.used.load_u32(at, Ordering::Relaxed),
            self.used.load_u32(at + 4, Ordering::Relaxed),
        )
    }

    /// Shows the device any avail index, and notifies it. The well-behaved half is out of step with the
    /// ring afterwards: use the queue for nothing else.
    ///
    /// # Errors
    /// If the eventfd cannot be written.
    pub fn force_avail_index(&mut self, index: u16) -> Result<(), ClientError> {
        self.avail.store_u16(2, index, Ordering::Release);
        self.kick()
    }

    #[inline]
    fn make_available(&mut self, head: u16, state: InFlight) {
        let at = 4 + 2 * usize::from(self.avail_next % self.size);
        self.avail.store_u16(at, head, Ordering::Relaxed);
        self.avail_next = self.avail_next.wrapping_add(1);
        if let Some(slot) = self.in_flight.get_mut(usize::from(head)) {
            *slot = state;
        }
    }
}
