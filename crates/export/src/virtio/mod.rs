//! Virtqueues, the device side: what every virtio door needs.
//!
//! Split rings only. Not the `virtio-queue` crate's queue: its chain iterator ends alike at the end of a chain
//! and at whatever is wrong with it, so that a looping chain would pass for a short request; it ignores
//! `VIRTQ_AVAIL_F_NO_INTERRUPT`; and it publishes each used element by itself.

pub(crate) mod chain;
pub(crate) mod ring;
