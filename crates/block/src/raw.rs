//! The format `raw`: the child's bytes as they are, or a window of them. Whole zones of a zoned child stay zones.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use zbdkit_io::{File, IoBuf};
use zbdkit_zone::{Condition, Filter, Geometry, GeometrySpec, ZoneInfo, ZoneNo, ZoneType};

use crate::error::{Error, OpenError};
use crate::limits::Limits;
use crate::node::{Access, CrossZone, Lane, MapExtent, Node, Request, Resolved, Watcher, ZoneOp};

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
        if let Some(geometry) = limits.zoned
            && (offset != 0 || window != limits.size)
        {
            limits.zoned = zones_of_window(&geometry, offset, window)?;
        }
        limits.size = window;
        Ok(RawNode {
            child,
            offset,
            limits,
        })
    }
}

/// The zones of a window over zones; none where all of them are conventional.
fn zones_of_window(zones: &Geometry, offset: u64, window: u64) -> Result<Option<Geometry>, OpenError> {
    let size = zones.zone_size();
    let refused = |what: &str, bytes: u64, end: &str| {
        Err(OpenError::Graph(format!(
            "raw: {what}={bytes} is not a multiple of the zone size ({size} bytes){end}: a window over a zoned device is \
             made of whole zones"
        )))
    };
    if !offset.is_multiple_of(size) {
        return refused("offset", offset, "");
    }
    if !window.is_multiple_of(size) && offset + window != zones.size() {
        return refused("size", window, " and does not reach to the end");
    }
    let skipped = zones.zone_of(offset).0;
    let spec = GeometrySpec {
        size: window,
        nr_conventional: zones.nr_conventional().saturating_sub(skipped),
        // A window of nothing but a short last zone has zones of that size.
        zone_size: size.min(window),
        zone_capacity: zones.zone_capacity().min(window),
        ..*zones.spec()
    };
    if u64::from(spec.nr_conventional) * size >= window {
        return Ok(None);
    }
    Geometry::new(spec)
        .map(Some)
        .map_err(|error| OpenError::Graph(format!("raw: {error}")))
}

fn may_be_reset(zone: &ZoneInfo) -> bool {
    zone.kind != ZoneType::Conventional
        && !matches!(
            zone.condition,
            Condition::Empty | Condition::ReadOnly | Condition::Offline
        )
}

impl RawNode {
    /// That one of the window's zones starts here.
    fn zone_at(&self, zone_start: u64) -> Result<(), Error> {
        match &self.limits.zoned {
            Some(geometry) => Ok(geometry.zone_at(zone_start).map(drop)?),
            None => Err(Error::NotSupported("zone management")),
        }
    }

    /// How many of the child's zones lie before the window.
    fn skipped(&self) -> u32 {
        let zones = self.child.limits().zoned;
        zones.map_or(0, |geometry| geometry.zone_of(self.offset).0)
    }

    fn in_window(&self, zone: ZoneInfo) -> ZoneInfo {
        ZoneInfo {
            zone: ZoneNo(zone.zone.0 - self.skipped()),
            start: zone.start - self.offset,
            wp: zone.wp - self.offset,
            written_end: zone.written_end - self.offset,
            ..zone
        }
    }

    /// The child's error, with the window's numbers.
    fn here(&self, error: Error) -> Error {
        match error {
            Error::Zone(rule) => rule.seen_from(self.skipped(), self.offset).into(),
            other => other,
        }
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
        Box::pin(async move {
            let read = self.child.read(lane, buf, self.offset + offset, cross).await;
            read.map_err(|error| self.here(error))
        })
    }

    fn write<'a>(&'a self, lane: &'a Lane, buf: IoBuf, offset: u64) -> Request<'a, ()> {
        Box::pin(async move {
            let written = self.child.write(lane, buf, self.offset + offset).await;
            written.map_err(|error| self.here(error))
        })
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

    fn append<'a>(&'a self, lane: &'a Lane, buf: IoBuf, zone_start: u64) -> Request<'a, u64> {
        Box::pin(async move {
            self.zone_at(zone_start)?;
            let at = self.child.append(lane, buf, self.offset + zone_start).await;
            at.map(|at| at - self.offset).map_err(|error| self.here(error))
        })
    }

    fn zone_op<'a>(&'a self, op: ZoneOp, zone_start: u64) -> Request<'a, ()> {
        Box::pin(async move {
            self.zone_at(zone_start)?;
            let done = self.child.zone_op(op, self.offset + zone_start).await;
            done.map_err(|error| self.here(error))
        })
    }

    fn commit_zrwa<'a>(&'a self, end: u64) -> Request<'a, ()> {
        Box::pin(async move {
            let size = self.limits.size;
            // The end of the zone before the window is the start of its first one.
            if end == 0 || end > size {
                return Err(Error::OutOfRange {
                    offset: end,
                    len: 0,
                    size,
                });
            }
            let done = self.child.commit_zrwa(self.offset + end).await;
            done.map_err(|error| self.here(error))
        })
    }

    fn set_extension<'a>(&'a self, zone_start: u64, extension: &'a [u8], zrwa: bool) -> Request<'a, ()> {
        Box::pin(async move {
            self.zone_at(zone_start)?;
            let set = self
                .child
                .set_extension(self.offset + zone_start, extension, zrwa)
                .await;
            set.map_err(|error| self.here(error))
        })
    }

    fn extension<'a>(&'a self, zone_start: u64) -> Request<'a, Option<Vec<u8>>> {
        Box::pin(async move {
            self.zone_at(zone_start)?;
            let found = self.child.extension(self.offset + zone_start).await;
            found.map_err(|error| self.here(error))
        })
    }

    /// Zones outside of the window are nobody's business here.
    fn watch(&self, watcher: Watcher) {
        let Some(window) = self.limits.zoned else { return };
        let skipped = self.skipped();
        self.child.watch(Arc::new(move |zone: ZoneNo| {
            if let Some(zone) = zone
                .0
                .checked_sub(skipped)
                .filter(|zone| *zone < window.nr_zones())
            {
                watcher(ZoneNo(zone));
            }
        }));
    }

    fn reset_all<'a>(&'a self) -> Request<'a, ()> {
        if self.offset == 0 && self.limits.size == self.child.limits().size {
            return self.child.reset_all();
        }
        // The child's would reset what lies outside of the window, too.
        Box::pin(async move {
            let mut starts = Vec::new();
            let sink = &mut |zone: ZoneInfo| {
                starts.extend(may_be_reset(&zone).then_some(zone.start));
                ControlFlow::Continue(())
            };
            self.report(0, Filter::All, sink).await?;
            for start in starts {
                self.zone_op(ZoneOp::Reset, start).await?;
            }
            Ok(())
        })
    }

    fn report<'a>(
        &'a self,
        from: u64,
        filter: Filter,
        sink: &'a mut dyn FnMut(ZoneInfo) -> ControlFlow<()>,
    ) -> Request<'a, ()> {
        Box::pin(async move {
            let size = self.limits.size;
            if self.limits.zoned.is_none() {
                return Err(Error::NotSupported("zone report"));
            }
            if from >= size {
                return Err(Error::OutOfRange {
                    offset: from,
                    len: 0,
                    size,
                });
            }
            let mut window = |zone: ZoneInfo| match zone.start - self.offset < size {
                true => sink(self.in_window(zone)),
                false => ControlFlow::Break(()),
            };
            self.child.report(self.offset + from, filter, &mut window).await
        })
    }

    fn close<'a>(&'a self) -> Request<'a, ()> {
        self.child.close()
    }
}
