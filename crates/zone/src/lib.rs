//! The zone engine: the one place that knows the rules of zoned devices (ZBC, ZAC, ZNS, virtio-blk).
//!
//! It knows geometry, conditions, write pointers, open and active limits, the order of writes in flight and
//! what persists of a zone. It does no I/O, has no clock, no async and no unsafe, and allocates nothing on
//! the write path. An [`Engine`] is shared by every door and thread of an image.
//!
//! The life of a write:
//!
//! 1. [`Engine::admit_write`] or [`Engine::admit_append`] checks it and gives a [`WritePermit`], whose offset
//!    is where the data goes.
//! 2. The caller writes the data, then calls [`Engine::complete`] with what became of it.
//! 3. [`Completion::Prefix`]: the written end moved, over this write and maybe others that were done earlier.
//!    The caller makes the run state hold it and calls [`Engine::acknowledge`], which gives everyone in the
//!    prefix the outcome. [`Completion::Pending`]: an earlier write of the zone is still in flight; whoever
//!    completes that one acknowledges this one too, and [`Engine::outcome`] says when.
//!    [`Completion::Failed`]: it is over.
//!
//! Offsets and lengths are bytes. Positions within a zone (`written` in [`ZoneRecord`], [`Prefix`] and
//! [`Events::publish`]) count from the zone's start; all others are absolute.
//!
//! The bytes of zone descriptor extensions are kept elsewhere; a zone's record has their checksum.

mod accounting;
mod admit;
mod complete;
mod dirty;
mod engine;
mod error;
mod format;
mod geometry;
mod lost;
mod manage;
#[cfg(feature = "oracle")]
pub mod oracle;
mod permit;
mod report;
pub mod rules;
mod slots;
mod sync;
mod types;
mod window;

pub use engine::{Engine, Resources};
pub use error::{GeometryError, RecordError, Refused, ZoneError};
pub use geometry::{Geometry, GeometrySpec, MAX_EXTENSION_SIZE, MAX_ZONES, Zns, Zrwa};
pub use permit::{Completion, Events, ExclusivePermit, Pending, Prefix, ReadPermit, WritePermit};
pub use slots::{MAX_SLOTS, SlotPool};
pub use types::{
    Attributes, CloseEmpty, Condition, Counters, ExclusiveOp, Filter, Model, Recommendation, ZoneInfo,
    ZoneNo, ZoneRecord, ZoneType,
};
