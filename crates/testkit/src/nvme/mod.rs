//! An NVMe driver in this process, for tests and benchmarks of the vfio-user door.
//!
//! [`Driver`] is the little of a driver that tests need, over the client of the `vfio_user` crate, which is Cloud
//! Hypervisor's and not ours: registers, queues in shared memory, doorbells and shadow doorbells, data pointers of every
//! kind. Nothing in it is checked for the caller, so that it can be misused. [`NvmeNode`] makes a zoned namespace behind
//! that door into a node, so that what runs on devices runs through the door, too.
//!
//! Everything that waits for the controller has an end; what the controller breaks ends the test by a panic that says what.

mod driver;
mod entry;
mod judge;
mod node;
mod pointer;

pub use driver::{ADMIN_ENTRIES, Driver, DriverOptions};
pub use entry::{Done, Entry};
pub use node::{NvmeNode, NvmeNodeError};
pub use pointer::Pointers;

/// Bytes of a memory page of the controller's host.
pub const PAGE: u64 = 4096;
