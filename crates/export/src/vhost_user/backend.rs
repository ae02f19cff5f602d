//! What a device has to offer to be served over vhost-user.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use zbdkit_io::mem::GuestMemory;

/// A virtio device behind the protocol. All calls come from the control thread of the one connection.
pub trait Backend {
    /// Virtio feature bits on offer.
    fn features(&self) -> u64;
    /// Virtqueues.
    fn queues(&self) -> u16;
    /// Takes the driver's features. The device remembers them, also where it returns an error: then it fails
    /// every request, since not every front-end can be told.
    ///
    /// # Errors
    /// The features that it cannot work with.
    fn set_features(&mut self, features: u64) -> Result<(), FeatureError>;
    /// Fills `out` from `offset` of the configuration space, zeros beyond its end.
    fn read_config(&self, offset: usize, out: &mut [u8]);
    /// Takes a write of the driver to the configuration space.
    ///
    /// # Errors
    /// Where it would change a field that drivers may not write.
    fn write_config(&mut self, offset: usize, bytes: &[u8]) -> Result<(), ConfigReadOnly>;
    /// Starts serving a ring. The session has checked that it lies in the guest's memory.
    ///
    /// # Errors
    /// Where the queue did not come to rest from the last time.
    fn start_queue(&mut self, ring: RingSetup) -> Result<(), Stuck>;
    /// Tells a queue to take nothing more; [`Backend::wait_stopped`] follows.
    fn begin_stop(&mut self, index: u16);
    /// Waits until every request of the queue is answered and it holds no guest memory. Returns the avail
    /// index of the next chain.
    ///
    /// # Errors
    /// Where requests did not end in time.
    fn wait_stopped(&mut self, index: u16) -> Result<u16, Stuck>;
    /// Replaces the eventfd that interrupts the driver. The queue may be running.
    fn set_call(&mut self, index: u16, fd: Option<Arc<OwnedFd>>);
    /// Whether a queue is broken and only a reset helps.
    fn needs_reset(&self) -> bool;
    /// A front-end connected, and with it maybe another guest.
    fn connected(&mut self);
    /// No ring runs any more, as after a reset or when the driver is gone: negotiation starts afresh.
    fn quiesced(&mut self);
}

/// A ring to serve. Addresses are guest addresses.
#[derive(Debug)]
pub struct RingSetup {
    /// Queue.
    pub index: u16,
    /// What the driver took.
    pub features: u64,
    /// Entries, a power of two.
    pub size: u16,
    /// Descriptor table.
    pub desc: u64,
    /// Avail ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
    /// Avail index of the first chain to take.
    pub base: u16,
    /// Tells the device that there are chains.
    pub kick: Arc<OwnedFd>,
    /// Tells the driver that chains were used; `None` where it polls.
    pub call: Option<Arc<OwnedFd>>,
    /// Tells the front-end that the queue is broken.
    pub err: Option<Arc<OwnedFd>>,
    /// The guest's memory.
    pub memory: Memory,
}

/// A handle to guest memory that can be shown in debug output.
#[derive(Clone)]
pub struct Memory(pub GuestMemory);

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Memory")
    }
}

/// Features that the device cannot work with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FeatureError {
    /// Bits that were not on offer.
    #[error("the driver set feature bits {0:#x} that were not offered")]
    NotOffered(u64),
    /// The driver is not a virtio 1 driver.
    #[error("the driver does not accept VIRTIO_F_VERSION_1, without which this device does not work")]
    Legacy,
    /// The driver knows nothing of zones, and the device cannot be used without.
    #[error("the driver does not accept VIRTIO_BLK_F_ZONED; a host-managed device cannot be used without it")]
    NotZoned,
}

/// A write to a configuration field that only the device writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the driver may not write this part of the configuration space")]
pub struct ConfigReadOnly;

/// Requests in flight that did not end in time; the queue keeps the guest's memory until they do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("requests of queue {index} are still in flight after {seconds} s")]
pub struct Stuck {
    /// Queue.
    pub index: u16,
    /// How long was waited.
    pub seconds: u64,
}
