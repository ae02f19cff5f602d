//! The leaf `host_device`: a block device of this machine, with its zones where it has some.
//!
//! The drive is the truth: it keeps the zones, their pointers, conditions and limits, and every report asks it. What is
//! here is how a drive is found and described ([`sysfs`], [`users`]) and how it is talked to ([`Drive`]).

mod blockdev;
mod drive;
mod ioctl;
mod nvme;
mod scsi;
mod sg;
pub mod sysfs;
mod users;

pub use blockdev::BlockDrive;
pub use drive::{Drive, DriveFacts};
pub use nvme::{KernelLimits, NamespaceFacts, NvmeDrive, ZrwaFacts};
pub use scsi::ScsiDrive;
pub use users::{User, users};
