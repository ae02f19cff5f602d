//! Doors: each module attaches a block device to one kind of client.

mod log_limit;
pub mod vhost_user;
pub mod vhost_user_blk;
mod virtio;
