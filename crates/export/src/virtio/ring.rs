//! A split ring (virtio 1.3, 2.7): what is available, what was used, and who is told when.

use std::sync::atomic::{Ordering, fence};

use vm_memory::{GuestMemoryError, GuestMemoryMmap};

use super::chain::Table;
use crate::memory::{load_u16, store_u16, write};

const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// The ring cannot be used any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RingError {
    #[error("the avail index {avail} is more than the ring's {size} entries ahead of {next}")]
    AvailIndex { avail: u16, next: u16, size: u16 },
    #[error("the ring is not in the guest's memory")]
    Memory,
}

impl From<GuestMemoryError> for RingError {
    fn from(_: GuestMemoryError) -> Self {
        RingError::Memory
    }
}

/// The device's view of a ring. The memory it lies in comes with each call.
#[derive(Debug)]
pub(crate) struct SplitRing {
    table: Table,
    avail: u64,
    used: u64,
    event_idx: bool,
    /// Index of the next chain to take, and where the driver was when we last looked.
    next_avail: u16,
    seen_avail: u16,
    /// Index of the next used element, and up to where the driver was told.
    next_used: u16,
    told_used: u16,
}

impl SplitRing {
    /// A ring whose driver has `base` chains behind it. The used index is where the ring says it is.
    pub(crate) fn new(
        memory: &GuestMemoryMmap,
        table: Table,
        avail: u64,
        used: u64,
        base: u16,
        event_idx: bool,
    ) -> Result<SplitRing, RingError> {
        let next_used = load_u16(memory, used + 2, Ordering::Acquire)?;
        Ok(SplitRing {
            table,
            avail,
            used,
            event_idx,
            next_avail: base,
            seen_avail: base,
            next_used,
            told_used: next_used,
        })
    }

    /// Index of the next chain to take.
    pub(crate) fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Whether the driver has made more chains available. Cheap: one load.
    pub(crate) fn has_available(&self, memory: &GuestMemoryMmap) -> bool {
        self.seen_avail != self.next_avail
            || self
                .load_avail_index(memory)
                .is_ok_and(|index| index != self.next_avail)
    }

    /// Takes the next chain, by its head.
    pub(crate) fn pop(&mut self, memory: &GuestMemoryMmap) -> Result<Option<u16>, RingError> {
        if self.seen_avail == self.next_avail {
            let avail = self.load_avail_index(memory)?;
            let (next, size) = (self.next_avail, self.table.size);
            if avail.wrapping_sub(next) > size {
                return Err(RingError::AvailIndex { avail, next, size });
            }
            self.seen_avail = avail;
            if avail == next {
                return Ok(None);
            }
        }
        let slot = u64::from(self.next_avail & (self.table.size - 1));
        let head = load_u16(memory, self.avail + 4 + 2 * slot, Ordering::Relaxed)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Writes a used element. The driver sees it after [`SplitRing::publish`].
    pub(crate) fn push_used(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        len: u32,
    ) -> Result<(), RingError> {
        let slot = u64::from(self.next_used & (self.table.size - 1));
        let mut element = [0; 8];
        element[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        element[4..].copy_from_slice(&len.to_le_bytes());
        write(memory, self.used + 4 + 8 * slot, &element)?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver all used elements. True if it wants to be interrupted for one of them.
    pub(crate) fn publish(&mut self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        let (old, new) = (self.told_used, self.next_used);
        if old == new {
            return Ok(false);
        }
        store_u16(memory, self.used + 2, new, Ordering::Release)?;
        self.told_used = new;
        // The index must be visible before we look whether the driver sleeps.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = self.avail + 4 + 2 * u64::from(self.table.size);
            let event = load_u16(memory, at, Ordering::Relaxed)?;
            Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            let flags = load_u16(memory, self.avail, Ordering::Relaxed)?;
            Ok(flags & NO_INTERRUPT == 0)
        }
    }

    /// Asks the driver for notifications from here on. True if there are chains already, which it would not
    /// tell of.
    pub(crate) fn enable_notifications(&self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        if self.event_idx {
            let at = self.used + 4 + 8 * u64::from(self.table.size);
            store_u16(memory, at, self.next_avail, Ordering::Relaxed)?;
        } else {
            store_u16(memory, self.used, 0, Ordering::Relaxed)?;
        }
        // Visible before we look at the index for the last time.
        fence(Ordering::SeqCst);
        Ok(self.has_available(memory))
    }

    /// Notifications are not needed for now; some may come all the same.
    pub(crate) fn disable_notifications(&self, memory: &GuestMemoryMmap) -> Result<(), RingError> {
        if !self.event_idx {
            store_u16(memory, self.used, NO_NOTIFY, Ordering::Relaxed)?;
        }
        // With EVENT_IDX the index that we asked for is soon passed, and left behind.
        Ok(())
    }

    fn load_avail_index(&self, memory: &GuestMemoryMmap) -> Result<u16, RingError> {
        Ok(load_u16(memory, self.avail + 2, Ordering::Acquire)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    const SIZE: u16 = 4;
    const AVAIL: u64 = 0x100;
    const USED: u64 = 0x200;

    struct Driver {
        memory: GuestMemoryMmap,
    }

    impl Driver {
        fn new() -> Driver {
            Driver {
                memory: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap(),
            }
        }

        fn set(&self, at: u64, value: u16) {
            self.memory.write_obj(value, GuestAddress(at)).unwrap();
        }

        fn get(&self, at: u64) -> u16 {
            self.memory.read_obj(GuestAddress(at)).unwrap()
        }

        fn ring(&self, base: u16, event_idx: bool) -> SplitRing {
            let table = Table {
                addr: 0,
                size: SIZE,
                indirect: false,
                limit: 4,
            };
            SplitRing::new(&self.memory, table, AVAIL, USED, base, event_idx).unwrap()
        }
    }

    #[test]
    fn chains_are_taken_in_order_across_the_wrap_of_the_index() {
        let driver = Driver::new();
        driver.set(AVAIL + 2, 0xfffe);
        let mut ring = driver.ring(0xfffe, false);
        assert_eq!(ring.pop(&driver.memory), Ok(None));
        for (slot, head) in [(2, 7), (3, 8), (0, 9)] {
            driver.set(AVAIL + 4 + 2 * slot, head);
        }
        driver.set(AVAIL + 2, 1);
        assert!(ring.has_available(&driver.memory));
        let taken: Vec<_> = std::iter::from_fn(|| ring.pop(&driver.memory).unwrap()).collect();
        assert_eq!(taken, [7, 8, 9]);
        assert_eq!(ring.next_avail(), 1);
        assert!(!ring.has_available(&driver.memory));
    }

    #[test]
    fn an_avail_index_that_jumps_is_an_error() {
        let driver = Driver::new();
        let mut ring = driver.ring(0, false);
        driver.set(AVAIL + 2, SIZE + 1);
        let error = RingError::AvailIndex {
            avail: 5,
            next: 0,
            size: 4,
        };
        assert_eq!(ring.pop(&driver.memory), Err(error));
        driver.set(AVAIL + 2, SIZE);
        assert_eq!(ring.pop(&driver.memory), Ok(Some(0)));
    }

    #[test]
    fn used_elements_show_with_publish_only() {
        let driver = Driver::new();
        driver.set(USED + 2, 10);
        let mut ring = driver.ring(0, false);
        assert_eq!(ring.publish(&driver.memory), Ok(false));
        ring.push_used(&driver.memory, 3, 0x0102_0304).unwrap();
        assert_eq!(driver.get(USED + 2), 10);
        assert_eq!(ring.publish(&driver.memory), Ok(true));
        assert_eq!(driver.get(USED + 2), 11);
        let element = [USED + 4 + 16, USED + 6 + 16, USED + 8 + 16, USED + 10 + 16].map(|at| driver.get(at));
        assert_eq!(element, [3, 0, 0x0304, 0x0102]);
        driver.set(AVAIL, NO_INTERRUPT);
        ring.push_used(&driver.memory, 3, 1).unwrap();
        assert_eq!(ring.publish(&driver.memory), Ok(false));
    }

    #[test]
    fn with_event_idx_the_driver_is_interrupted_when_its_event_is_passed() {
        let driver = Driver::new();
        let mut ring = driver.ring(0, true);
        driver.set(AVAIL + 4 + 2 * u64::from(SIZE), 2);
        let mut told = Vec::new();
        for count in [1, 1, 1, 3] {
            for _ in 0..count {
                ring.push_used(&driver.memory, 0, 0).unwrap();
            }
            told.push(ring.publish(&driver.memory).unwrap());
        }
        assert_eq!(told, [false, false, true, false]);
    }

    #[test]
    fn asking_for_notifications_finds_what_came_before() {
        for event_idx in [false, true] {
            let driver = Driver::new();
            let mut ring = driver.ring(0, event_idx);
            ring.disable_notifications(&driver.memory).unwrap();
            assert_eq!(driver.get(USED), u16::from(!event_idx));
            assert_eq!(ring.enable_notifications(&driver.memory), Ok(false));
            assert_eq!(driver.get(USED), 0);
            driver.set(AVAIL + 2, 1);
            assert_eq!(ring.enable_notifications(&driver.memory), Ok(true));
            assert_eq!(ring.pop(&driver.memory), Ok(Some(0)));
            assert_eq!(ring.enable_notifications(&driver.memory), Ok(false));
            let event = driver.get(USED + 4 + 8 * u64::from(SIZE));
            assert_eq!(event, u16::from(event_idx), "avail event");
        }
    }
}
