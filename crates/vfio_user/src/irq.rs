//! Interrupts: the eventfds that a client gave us, and their masks.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zbdkit_io::unix::{set_nonblocking, signal};

/// A kind of interrupts of a device, such as MSI-X. Its index is its place in [`Device::irqs`](crate::Device::irqs).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IrqKind {
    /// How many there are.
    pub count: u32,
    /// They can be masked and unmasked.
    pub maskable: bool,
    /// They mask themselves when they are signalled. Only for maskable ones.
    pub automasked: bool,
}

/// The interrupts of one connection. Signalled from any thread.
pub struct Interrupts {
    kinds: Vec<(IrqKind, Box<[Mutex<Vector>]>)>,
}

#[derive(Default)]
struct Vector {
    eventfd: Option<Arc<OwnedFd>>,
    masked: bool,
    /// Signalled while it was masked.
    pending: bool,
}

impl fmt::Debug for Interrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = self.kinds.iter().map(|(kind, _)| kind);
        f.debug_list().entries(kinds).finish()
    }
}

fn lock(vector: &Mutex<Vector>) -> MutexGuard<'_, Vector> {
    vector.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Interrupts {
    /// Without any eventfd yet.
    pub(crate) fn new(kinds: &[IrqKind]) -> Interrupts {
        let vectors = |kind: &IrqKind| (0..kind.count).map(|_| Mutex::default()).collect();
        Interrupts {
            kinds: kinds.iter().map(|kind| (*kind, vectors(kind))).collect(),
        }
    }

    /// Interrupts the driver; does nothing where there is no such interrupt or the client did not set it up. Never blocks.
    pub fn trigger(&self, index: u32, vector: u32) {
        let Some((kind, vectors)) = self.kinds.get(index as usize) else {
            return;
        };
        if let Some(vector) = vectors.get(vector as usize) {
            lock(vector).trigger(*kind);
        }
    }

    pub(crate) fn kind(&self, index: u32) -> Option<IrqKind> {
        self.kinds.get(index as usize).map(|(kind, _)| *kind)
    }

    /// Sets or takes away the eventfd of an interrupt.
    pub(crate) fn assign(&self, index: u32, vector: u32, eventfd: Option<OwnedFd>) {
        self.with(index, vector, |vector, _| {
            vector.pending = false;
            vector.eventfd = eventfd.map(|fd| {
                set_nonblocking(&fd);
                Arc::new(fd)
            });
        });
    }

    pub(crate) fn mask(&self, index: u32, vector: u32) {
        self.with(index, vector, |vector, _| vector.masked = true);
    }

    pub(crate) fn unmask(&self, index: u32, vector: u32) {
        self.with(index, vector, |vector, kind| {
            vector.masked = false;
            if std::mem::take(&mut vector.pending) {
                vector.trigger(kind);
            }
        });
    }

    /// Takes away every eventfd of a kind, and its masks.
    pub(crate) fn disable(&self, index: u32) {
        if let Some((_, vectors)) = self.kinds.get(index as usize) {
            vectors
                .iter()
                .for_each(|vector| *lock(vector) = Vector::default());
        }
    }

    /// Takes away every eventfd: the client is gone.
    pub(crate) fn disable_all(&self) {
        (0..self.kinds.len() as u32).for_each(|index| self.disable(index));
    }

    fn with(&self, index: u32, vector: u32, f: impl FnOnce(&mut Vector, IrqKind)) {
        if let Some((kind, vectors)) = self.kinds.get(index as usize)
            && let Some(vector) = vectors.get(vector as usize)
        {
            f(&mut lock(vector), *kind);
        }
    }
}

impl Vector {
    fn trigger(&mut self, kind: IrqKind) {
        if self.masked {
            self.pending = true;
            return;
        }
        if let Some(eventfd) = &self.eventfd {
            signal(eventfd);
            self.masked = kind.automasked;
        }
    }
}
