//! A completion queue in guest memory.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use zbdkit_io::MemGuard;
use zbdkit_spec::nvme::command::{COMPLETION_ENTRY_BYTES, CompletionEntry};
use zbdkit_spec::vfio_user::pci_irq;
use zerocopy::IntoBytes;

use super::front::Front;
use super::queues::Shadow;
use crate::memory::{load_u32, store_u32, write};

/// A completion queue. Its entries wait here while the host leaves no room for them.
pub(super) struct Cq {
    pub(super) id: u16,
    front: Arc<Front>,
    addr: u64,
    entries: u32,
    vector: Option<u16>,
    tail: Cell<u32>,
    /// Inverts with each round through the queue; entries of the first round have it set.
    phase: Cell<bool>,
    pub(super) shadow: Cell<Option<Shadow>>,
    waiting: RefCell<VecDeque<CompletionEntry>>,
}

impl Cq {
    pub(super) fn new(front: &Arc<Front>, id: u16, addr: u64, entries: u32, vector: Option<u16>) -> Rc<Cq> {
        Rc::new(Cq {
            id,
            front: front.clone(),
            addr,
            entries,
            vector,
            tail: Cell::new(0),
            phase: Cell::new(true),
            shadow: Cell::new(None),
            waiting: RefCell::default(),
        })
    }

    pub(super) fn front(&self) -> &Arc<Front> {
        &self.front
    }

    /// Takes an entry; [`flush`](Self::flush) shows it to the host.
    pub(super) fn push(&self, entry: CompletionEntry) {
        self.waiting.borrow_mut().push_back(entry);
    }

    /// Whether entries wait that do not fit, so that nothing more should be started.
    pub(super) fn is_full(&self) -> bool {
        self.waiting.borrow().len() >= self.entries as usize
    }

    /// Whether there is something to show that fits.
    pub(super) fn can_flush(&self, memory: &MemGuard) -> bool {
        !self.waiting.borrow().is_empty() && self.room(memory) > 0
    }

    /// The host's head: what it says in shadow memory, or by the doorbell. One that is none counts as "full".
    fn room(&self, memory: &MemGuard) -> u32 {
        let head = match self.shadow.get() {
            Some(shadow) => load_u32(memory, shadow.value, Ordering::Acquire).unwrap_or(u32::MAX),
            None => self.front.doorbells.head(self.id),
        };
        if head >= self.entries {
            return 0;
        }
        (head + self.entries - self.tail.get() - 1) % self.entries
    }

    /// Writes as many entries as there is room for, and interrupts the host once.
    pub(super) fn flush(&self, memory: &MemGuard) {
        let mut waiting = self.waiting.borrow_mut();
        if waiting.is_empty() || self.front.is_halted() {
            return;
        }
        let room = self.room(memory) as usize;
        let fit = waiting.len().min(room);
        for entry in waiting.drain(..fit) {
            if self.write(memory, entry).is_err() {
                tracing::warn!(
                    "completion queue {} is not in the host's memory any more",
                    self.id
                );
                self.front.halt();
                return;
            }
        }
        if fit > 0
            && let Some(vector) = self.vector
        {
            self.front.link.interrupts.trigger(pci_irq::MSIX, vector.into());
        }
    }

    fn write(&self, memory: &MemGuard, mut entry: CompletionEntry) -> Result<(), ()> {
        let tail = self.tail.get();
        let at = self.addr + u64::from(tail) * COMPLETION_ENTRY_BYTES as u64;
        entry.status.set(entry.status.get() | u16::from(self.phase.get()));
        let bytes = entry.as_bytes();
        // The phase tag is in the last dword, which makes the entry valid.
        let last = u32::from_le_bytes(bytes[12..].try_into().expect("4 bytes"));
        write(memory, at, &bytes[..12]).map_err(drop)?;
        store_u32(memory, at + 12, last, Ordering::Release).map_err(drop)?;
        let next = (tail + 1) % self.entries;
        self.tail.set(next);
        if next == 0 {
            self.phase.set(!self.phase.get());
        }
        Ok(())
    }

    /// Before sleeping: where entries wait for room, the host shall ring when it makes some.
    pub(super) fn ask_for_doorbell(&self, memory: &MemGuard) {
        if let Some(shadow) = self.shadow.get()
            && !self.waiting.borrow().is_empty()
        {
            let head = load_u32(memory, shadow.value, Ordering::Acquire).unwrap_or(0);
            let _ = store_u32(memory, shadow.event_index, head, Ordering::Release);
        }
    }

    /// Starts to use shadow doorbells, from where the register is.
    pub(super) fn set_shadow(&self, memory: &MemGuard, shadow: Shadow) {
        let head = self.front.doorbells.head(self.id);
        let _ = store_u32(memory, shadow.value, head, Ordering::Release);
        let _ = store_u32(memory, shadow.event_index, head, Ordering::Release);
        self.shadow.set(Some(shadow));
    }
}
