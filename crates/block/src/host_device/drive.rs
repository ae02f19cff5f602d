//! The way a zoned drive is talked to: block ioctls, and whatever else can be put in their place.

use std::path::PathBuf;

use zbdkit_io::{File, IoBuf};
use zbdkit_zone::{Zns, ZoneInfo};

use super::sysfs::ZoneFacts;
use crate::error::Error;
use crate::node::{Request, ZoneOp};

/// What is known of a drive at its opening; none of it changes. Sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriveFacts {
    /// What the user named it by.
    pub path: PathBuf,
    /// Size.
    pub size: u64,
    /// Logical block size.
    pub block_size: u32,
    /// It takes no writes, or was opened without the right to make any.
    pub read_only: bool,
    /// Its zones.
    pub zones: ZoneFacts,
    /// What only Zoned Namespaces have, where it can be had over this way to the drive.
    pub zns: Zns,
}

/// A zoned drive.
///
/// Contract: offsets and lengths are bytes, whole blocks within the drive, and a zone is named by its first byte.
/// Nothing here orders or checks anything: the drive is the truth, and the node above sees to the order of
/// writes. Calls may come from any thread that has a [`zbdkit_io::Runtime`] and must not block it
/// ([`zbdkit_io::unblock`] helps). Where a call's future is dropped the call goes on.
///
/// Errors are what the drive says: [`Error::Io`] with the errno for what comes as one, [`Error::Zone`] where the way to the
/// drive knows more.
pub trait Drive: Send + Sync {
    /// What is known of the drive.
    fn facts(&self) -> &DriveFacts;

    /// Where its bytes are read and written. Its `datasync` empties the drive's write cache.
    fn file(&self) -> &File;

    /// The zones from the one that holds byte `from`, as they are now; at most `max`, at least one where `from` is on
    /// the drive, and as many as one command gives. No counters, and `written_end` is the write pointer.
    fn report<'a>(&'a self, from: u64, max: usize) -> Request<'a, Vec<ZoneInfo>>;

    /// One operation on the zone of `len` bytes that starts at `zone_start`.
    fn zone_op<'a>(&'a self, op: ZoneOp, zone_start: u64, len: u64) -> Request<'a, ()>;

    /// Resets all zones that can be reset, as one command.
    fn reset_all<'a>(&'a self) -> Request<'a, ()>;

    /// Whether the drive places appends itself: [`Drive::append`] is then used for them, many at a time in one zone.
    fn has_append(&self) -> bool {
        false
    }

    /// Appends `buf`, at most `max_append` bytes; the answer is the byte offset that it got.
    fn append<'a>(&'a self, _buf: IoBuf, _zone_start: u64) -> Request<'a, u64> {
        Box::pin(async { Err(Error::NotSupported("zone append")) })
    }

    /// See [`crate::Node::commit_zrwa`].
    fn commit_zrwa<'a>(&'a self, _end: u64) -> Request<'a, ()> {
        Box::pin(async { Err(Error::NotSupported("a zone random write area")) })
    }

    /// See [`crate::Node::set_extension`].
    fn set_extension<'a>(&'a self, _zone_start: u64, _extension: &'a [u8], _zrwa: bool) -> Request<'a, ()> {
        Box::pin(async { Err(Error::NotSupported("zone descriptor extensions")) })
    }

    /// See [`crate::Node::extension`].
    fn extension<'a>(&'a self, _zone_start: u64) -> Request<'a, Option<Vec<u8>>> {
        Box::pin(async { Err(Error::NotSupported("zone descriptor extensions")) })
    }
}
