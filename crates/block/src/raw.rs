//! The format `raw`: the child's bytes as they are, or a window of them.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use zbdkit_io::{File, IoBuf};
use zbdkit_zone::{Filter, ZoneInfo};

use crate::error::OpenError;
use crate::limits::Limits;
use crate::node::{Access, CrossZone, Lane, MapExtent, Node, Request, Resolved, ZoneOp};

/// `raw` over a child.
pub struct RawNode {
    child: Arc<dyn Node>,
    offset: u64,
    limits: Limits,
}

impl RawNode {
    /// The window of `size` bytes (to the child's end if `None`) at `offset` of `child`.
    pub fn new(child: Arc<dyn Node>, offset: u64, size: Option<u64>) -> Result<RawNode, OpenError> {
        let mut limits = child.limits().clone();
        let rest = limits.size.checked_sub(offset).ok_or_else(|| {
            OpenError::Graph(format!(
                "raw: offset {offset} lies past the end of the file ({} bytes)",
                limits.size
            ))
        })?;
        let window = size.unwrap_or(rest);
        if window > rest {
            return Err(OpenError::Graph(format!(
                "raw: size {window} at offset {offset} reaches past the end of the file ({} bytes)",
                limits.size
            )));
        }
        let block = u64::from(limits.block_size);
        if (offset != 0 || size.is_some()) && !(offset.is_multiple_of(block) && window.is_multiple_of(block))
        {
            return Err(OpenError::Graph(format!(
                "raw: offset and size must be multiples of {block} bytes"
            )));
        }
        if limits.zoned.is_some() && (offset != 0 || window != limits.size) {
            return Err(OpenError::Graph(
                "raw: a window over a zoned device is not supported".into(),
            ));
        }
        limits.size = window;
        Ok(RawNode {
            child,
            offset,
            limits,
        })
    }
}

impl Node for RawNode {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn driver(&self) -> &'static str {
        "raw"
    }

    fn resolve(&self, offset: u64, len: u64, access: Access) -> Option<Resolved<'_>> {
        self.child.resolve(self.offset + offset, len, access)
    }

    fn file(&self) -> Option<&File> {
        self.child.file()
    }

    fn read<'a>(&'a self, lane: &'a Lane, buf: IoBuf, offset: u64, cross: CrossZone) -> Request<'a, ()> {
        self.child.read(lane, buf, self.offset + offset, cross)
    }

    fn write<'a>(&'a self, lane: &'a Lane, buf: IoBuf, offset: u64) -> Request<'a, ()> {
        self.child.write(lane, buf, self.offset + offset)
    }

    fn flush<'a>(&'a self) -> Request<'a, ()> {
        self.child.flush()
    }

    fn write_zeroes<'a>(&'a self, lane: &'a Lane, offset: u64, len: u64, unmap: bool) -> Request<'a, ()> {
        self.child.write_zeroes(lane, self.offset + offset, len, unmap)
    }

    fn discard<'a>(&'a self, lane: &'a Lane, offset: u64, len: u64) -> Request<'a, ()> {
        self.child.discard(lane, self.offset + offset, len)
    }

    fn map<'a>(&'a self, offset: u64, len: u64) -> Request<'a, MapExtent> {
        self.child.map(self.offset + offset, len)
    }

    fn release<'a>(&'a self, range: Range<u64>) -> Request<'a, ()> {
        self.child
            .release(self.offset + range.start..self.offset + range.end)
    }

    // A window has no zones (see `new`), so below a zoned child's offsets are ours.

    fn append<'a>(&'a self, lane: &'a Lane, buf: IoBuf, zone_start: u64) -> Request<'a, u64> {
        self.child.append(lane, buf, zone_start)
    }

    fn zone_op<'a>(&'a self, op: ZoneOp, zone_start: u64) -> Request<'a, ()> {
        self.child.zone_op(op, zone_start)
    }

    fn reset_all<'a>(&'a self) -> Request<'a, ()> {
        self.child.reset_all()
    }

    fn report<'a>(
        &'a self,
        from: u64,
        filter: Filter,
        sink: &'a mut dyn FnMut(ZoneInfo) -> ControlFlow<()>,
    ) -> Request<'a, ()> {
        self.child.report(from, filter, sink)
    }

    fn close<'a>(&'a self) -> Request<'a, ()> {
        self.child.close()
    }
}
