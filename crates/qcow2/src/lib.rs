//! The qcow2 format: clusters, their mapping and reference counts, snapshots, check and repair.
//!
//! It knows no zones, no graph and no paths: it works on open [`zbdkit_io::File`]s, and what lies below an image (its
//! backing image) is a [`Backing`]. Everything that an image says is taken for hostile: bounded, checked, never
//! believed by its number alone.

mod ahead;
mod check;
mod compress;
mod create;
mod entries;
mod error;
mod failure;
mod grace;
mod header;
mod image;
mod l2;
mod lock;
mod lookup;
mod metadata;
mod pack;
mod refcounts;
mod replace;
mod resize;
mod sectors;
mod snapshot;
mod space;
mod write;
mod zero;

pub use check::{CheckReport, Repair, check};
pub use compress::compress;
pub use create::{Layout, Preallocation, create, create_with};
pub use error::Error;
pub use header::{Compression, Extension, Header};
pub use image::{Access, Backing, Extent, Mapping, Options, Qcow2, Resolved};
pub use lock::{AsyncGuard, AsyncMutex};
pub use snapshot::{Snapshot, read_snapshots};
