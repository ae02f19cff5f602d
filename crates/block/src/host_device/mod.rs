//! The leaf `host_device`: a block device of this machine, with its zones where it has some, or the character device of a
//! zoned NVMe namespace.
//!
//! The drive is the truth: it keeps the zones, their pointers, conditions and limits, and every report asks it. What is
//! here is how a drive is found and described ([`sysfs`], [`users()`]), how it is talked to ([`Drive`]), and the order of writes
//! to it, which no host keeps by itself ([`HostDeviceNode`]).

mod blockdev;
mod drive;
mod ioctl;
mod line;
mod node;
mod nvme;
mod open;
mod scsi;
mod sg;
pub mod sysfs;
mod users;

pub use blockdev::BlockDrive;
pub use drive::{Drive, DriveFacts};
pub use node::HostDeviceNode;
pub(crate) use nvme::is_nvme_namespace;
pub use nvme::{KernelLimits, NamespaceFacts, NvmeDrive, ZrwaFacts};
pub use open::block_facts;
pub(crate) use open::{HostDevice, has_zones, needs_host_device, number_of};
pub use scsi::{ScsiDrive, ZoneAdvice};
pub use users::{User, users};
