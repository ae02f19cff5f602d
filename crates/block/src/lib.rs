//! The block graph: protocol nodes at the leaves, formats above, filters between, a [`Device`] at the root.
//!
//! A node publishes its limits, and they travel up unchanged unless a node says otherwise. Requests go down:
//! the device checks range and alignment once, `zoned` asks the engine, formats map, leaves do the I/O. Where a
//! node is but an offset into a file ([`Node::resolve`]) a request becomes one operation on that file.

mod check;
mod create;
mod device;
mod error;
mod file;
mod graph;
mod host;
pub mod host_device;
mod limits;
mod lock;
mod marks;
mod node;
mod ofd;
mod qcow2;
mod raw;
pub mod tool;
mod zoned;

pub use check::{CheckError, CheckOutcome, ZoneCheck, check};
pub use create::{
    CreateError, CreateOptions, Created, DEFAULT_BLOCK_SIZE, DEFAULT_ZONE_SIZE, ZnsOptions, create,
    default_append,
};
pub use device::Device;
pub use error::{Error, OpenError, errno_of};
pub use file::FileNode;
pub use graph::{Graph, OpenOptions, did_you_mean, format_size, parse_size, run_state_of};
pub use host::{FileId, FileOptions, Host, HostError, OsHost};
pub use limits::Limits;
pub use lock::{Conflict, LockMode};
pub use marks::MarkList;
pub use node::{Access, CrossZone, Lane, MapExtent, Node, Request, Resolved, Watcher, ZoneOp};
pub use qcow2::{BackingImage, ImageFormat, Qcow2CreateOptions, Qcow2Created, Qcow2Node, create_qcow2};
pub use raw::RawNode;
pub use zbdkit_qcow2::{CheckReport, Layout as Qcow2Layout, Preallocation, Repair};
pub use zoned::{ImageStatus, RunStateMode, ZonedNode, ZonedOptions, create_sidecar, default_sidecar};
