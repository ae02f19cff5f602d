//! Doors: each module attaches a block device to one kind of client.

mod log_limit;
mod memory;
pub mod nvme_pci;
mod socket;
pub mod vhost_user;
pub mod vhost_user_blk;
mod virtio;

pub use socket::Socket;
