//! The handle to the root of an opened graph: what doors and tools hold.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use zbdkit_io::IoBuf;
use zbdkit_qcow2::Qcow2;
use zbdkit_zone::{Engine, Filter, Geometry, ZoneInfo, ZoneNo, ZoneRecord};

use crate::error::Error;
use crate::limits::Limits;
use crate::marks::{MarkList, Marks};
use crate::node::{Access, CrossZone, Lane, MapExtent, Node, Watcher, ZoneOp};
use crate::qcow2::{BackingImage, Qcow2Node};
use crate::zoned::{ImageStatus, ZonedNode};

/// An opened image. A cheap handle: clones share the graph. Every request is checked here against the root's
/// limits, so that nodes need not.
#[derive(Clone)]
pub struct Device {
    root: Root,
    notices: Arc<[String]>,
    qcow2: Option<Arc<Qcow2Node>>,
}

/// The root, with its type known where the hot path gains by it.
#[derive(Clone)]
enum Root {
    Zoned(Arc<ZonedNode>),
    Other(Arc<dyn Node>),
}

impl Device {
    /// The handle to a graph whose root gives zones to the rest.
    pub fn zoned(root: ZonedNode, notices: Vec<String>) -> Device {
        Device {
            root: Root::Zoned(Arc::new(root)),
            notices: notices.into(),
            qcow2: None,
        }
    }

    /// The handle to any other graph.
    pub fn new(root: Arc<dyn Node>) -> Device {
        Device {
            root: Root::Other(root),
            notices: Arc::default(),
            qcow2: None,
        }
    }

    /// With something that the user should know.
    pub(crate) fn with_notice(mut self, notice: String) -> Device {
        self.notices = self.notices.iter().cloned().chain([notice]).collect();
        self
    }

    /// With the qcow2 image that the bytes lie in.
    pub(crate) fn with_qcow2(mut self, node: Arc<Qcow2Node>) -> Device {
        self.qcow2 = Some(node);
        self
    }

    /// The qcow2 image that the bytes lie in, below its zones.
    pub fn qcow2(&self) -> Option<&Qcow2> {
        self.qcow2.as_ref().map(|node| node.image())
    }

    pub(crate) fn qcow2_node(&self) -> Option<&Qcow2Node> {
        self.qcow2.as_deref()
    }

    pub(crate) fn zoned_node(&self) -> Option<&ZonedNode> {
        match &self.root {
            Root::Zoned(node) => Some(node),
            Root::Other(_) => None,
        }
    }

    /// What that image has below it.
    pub fn backing(&self) -> Option<&BackingImage> {
        self.qcow2.as_ref()?.backing()
    }

    fn node(&self) -> &dyn Node {
        match &self.root {
            Root::Zoned(node) => &**node,
            Root::Other(node) => &**node,
        }
    }

    /// The limits of the image. Only [`Device::format`] changes them.
    pub fn limits(&self) -> &Limits {
        self.node().limits()
    }

    /// The driver at the root.
    pub fn driver(&self) -> &'static str {
        self.node().driver()
    }

    /// What the opening found that the user should know: repaired damage, writes that may be lost.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// What the zone table said when the image was opened, where there is one.
    pub fn status(&self) -> Option<&ImageStatus> {
        match &self.root {
            Root::Zoned(node) => node.status(),
            Root::Other(_) => None,
        }
    }

    /// The zones, where they are kept by this process.
    pub fn engine(&self) -> Option<&Engine> {
        match &self.root {
            Root::Zoned(node) => Some(node.engine()),
            Root::Other(_) => None,
        }
    }

    /// A lane for one queue: at most `depth` writes in flight.
    pub fn lane(&self, depth: u32) -> Lane {
        Lane::new(self.engine(), depth)
    }

    /// Reads into all of `buf`.
    pub async fn read(&self, lane: &Lane, buf: IoBuf, offset: u64, cross: CrossZone) -> Result<(), Error> {
        self.check(offset, buf.len() as u64)?;
        match &self.root {
            _ if buf.is_empty() => Ok(()),
            Root::Zoned(node) => node.read(lane, buf, offset, cross).await,
            Root::Other(node) => match node.resolve(offset, buf.len() as u64, Access::Read) {
                Some(at) => at
                    .file
                    .read(buf, at.offset)
                    .await
                    .map_err(|e| Error::io("read", &e)),
                None => node.read(lane, buf, offset, cross).await,
            },
        }
    }

    /// Writes all of `buf`.
    pub async fn write(&self, lane: &Lane, buf: IoBuf, offset: u64) -> Result<(), Error> {
        self.check_change(offset, buf.len() as u64)?;
        match &self.root {
            _ if buf.is_empty() => Ok(()),
            Root::Zoned(node) => node.write(lane, buf, offset).await,
            Root::Other(node) => match node.resolve(offset, buf.len() as u64, Access::Write) {
                Some(at) => at
                    .file
                    .write(buf, at.offset)
                    .await
                    .map_err(|e| Error::io("write", &e)),
                None => node.write(lane, buf, offset).await,
            },
        }
    }

    /// Appends `buf` to the zone that starts at `zone_start`; the answer is the byte offset that it got.
    pub async fn append(&self, lane: &Lane, buf: IoBuf, zone_start: u64) -> Result<u64, Error> {
        self.check_writable()?;
        match &self.root {
            Root::Zoned(node) => node.append(lane, buf, zone_start).await,
            Root::Other(node) => node.append(lane, buf, zone_start).await,
        }
    }

    /// Makes everything durable that was acknowledged before the call, on any lane.
    pub async fn flush(&self, _lane: &Lane) -> Result<(), Error> {
        self.node().flush().await
    }

    /// The range's contents are not needed any more; a hint.
    pub async fn discard(&self, lane: &Lane, offset: u64, len: u64) -> Result<(), Error> {
        self.check_change(offset, len)?;
        if len == 0 {
            Ok(())
        } else {
            self.node().discard(lane, offset, len).await
        }
    }

    /// Makes the range read as zeros; in a sequential zone this is a write.
    pub async fn write_zeroes(&self, lane: &Lane, offset: u64, len: u64, unmap: bool) -> Result<(), Error> {
        self.check_change(offset, len)?;
        if len == 0 {
            Ok(())
        } else {
            self.node().write_zeroes(lane, offset, len, unmap).await
        }
    }

    /// Makes reads of the range's blocks fail until they are written again; see [`Node::mark_uncorrectable`].
    ///
    /// # Errors
    /// [`Error::NotSupported`] where the image has no place for such marks ([`Device::keeps_marks`]), and
    /// [`Error::TooManyMarks`]; in a sequential zone those of a write.
    pub async fn mark_uncorrectable(&self, lane: &Lane, offset: u64, len: u64) -> Result<(), Error> {
        self.check_change(offset, len)?;
        if len == 0 {
            Ok(())
        } else {
            self.node().mark_uncorrectable(lane, offset, len).await
        }
    }

    /// Whether blocks can be marked by [`Device::mark_uncorrectable`]: images with zones have a list of them, and so has
    /// memory.
    pub fn keeps_marks(&self) -> bool {
        self.node().marks().is_some()
    }

    /// The blocks that are marked.
    pub fn marks(&self) -> MarkList {
        self.node().marks().map(Marks::list).unwrap_or_default()
    }

    /// Fails where a read of the range would touch a marked block.
    pub(crate) fn check_readable(&self, range: Range<u64>) -> Result<(), Error> {
        self.node()
            .marks()
            .map_or(Ok(()), |marks| marks.check_readable(range))
    }

    /// One operation on the zone that starts at `zone_start`. Durable once acknowledged, but for open and close.
    pub async fn zone_op(&self, _lane: &Lane, op: ZoneOp, zone_start: u64) -> Result<(), Error> {
        self.check_writable()?;
        self.node().zone_op(op, zone_start).await
    }

    /// Moves the write pointer of a zone with a random write area to byte `end`; see [`Node::commit_zrwa`].
    pub async fn commit_zrwa(&self, _lane: &Lane, end: u64) -> Result<(), Error> {
        self.check_writable()?;
        self.node().commit_zrwa(end).await
    }

    /// Attaches a descriptor extension to an empty zone, with a random write area if `zrwa`; see [`Node::set_extension`].
    pub async fn set_extension(
        &self,
        _lane: &Lane,
        zone_start: u64,
        extension: &[u8],
        zrwa: bool,
    ) -> Result<(), Error> {
        self.check_writable()?;
        self.node().set_extension(zone_start, extension, zrwa).await
    }

    /// The descriptor extension of a zone, where it has one.
    pub async fn extension(&self, zone_start: u64) -> Result<Option<Vec<u8>>, Error> {
        self.node().extension(zone_start).await
    }

    /// Resets every sequential zone that is neither read-only nor offline, as one operation.
    pub async fn reset_all(&self, _lane: &Lane) -> Result<(), Error> {
        self.check_writable()?;
        self.node().reset_all().await
    }

    /// The block sizes that [`Device::format`] can give the device, ascending; the one that it has among them. An image keeps
    /// its own unless it has a zone table and nothing but sequential-required zones, and only where each of its figures and
    /// the way it was opened allow the other.
    pub fn block_sizes(&self) -> Vec<u32> {
        match &self.root {
            Root::Zoned(node) => node.engine().formats().iter().map(Geometry::block_size).collect(),
            Root::Other(node) => vec![node.limits().block_size],
        }
    }

    /// The logical block size that the device has now, bytes.
    pub fn block_size(&self) -> u32 {
        match &self.root {
            Root::Zoned(node) => node.engine().geometry().block_size(),
            Root::Other(node) => node.limits().block_size,
        }
    }

    /// Erases all zones, as one operation, and gives the device blocks of `block_size` bytes: each zone is empty afterwards,
    /// or offline where it was read-only or offline. Durable once acknowledged; a crash before that leaves the old block size
    /// and zones that may be erased, or all of it. [`Device::limits`] says the new size from then on. Requests in flight are
    /// carried out before, or are held against the new size; whoever shares the device has to follow.
    ///
    /// # Errors
    /// `NotSupported` where it is none of [`Device::block_sizes`], where zones are conventional, and where this process does not keep
    /// the zones.
    pub async fn format(&self, _lane: &Lane, block_size: u32) -> Result<(), Error> {
        self.check_writable()?;
        match &self.root {
            Root::Zoned(node) => node.format(block_size).await,
            Root::Other(_) => Err(Error::NotSupported("formatting")),
        }
    }

    /// At most `max` zones that the filter shows, from the one that holds byte `from`.
    pub async fn report(&self, from: u64, filter: Filter, max: usize) -> Result<Vec<ZoneInfo>, Error> {
        let mut zones = Vec::new();
        self.report_to(from, filter, &mut |zone| {
            if zones.len() == max {
                return ControlFlow::Break(());
            }
            zones.push(zone);
            ControlFlow::Continue(())
        })
        .await?;
        Ok(zones)
    }

    /// As [`Device::report`], zone by zone into a sink, until that breaks.
    pub async fn report_to(
        &self,
        from: u64,
        filter: Filter,
        sink: &mut dyn FnMut(ZoneInfo) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        self.node().report(from, filter, sink).await
    }

    /// What the first bytes of a range consist of; the extent is at most `len` long, and above a zone's written end
    /// there are zeros.
    pub async fn map(&self, offset: u64, len: u64) -> Result<MapExtent, Error> {
        let size = self.limits().size;
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::OutOfRange { offset, len, size });
        }
        self.node().map(offset, len).await
    }

    /// Puts records in the place of what zones hold, durably; for tools that have written the zones' bytes below them.
    /// The bytes are durable before the records are. No request may be in flight. A record speaks of a descriptor extension
    /// only where the zone has that one already.
    pub async fn restore(&self, records: &[(ZoneNo, ZoneRecord)]) -> Result<(), Error> {
        match &self.root {
            Root::Zoned(node) => node.restore(records).await,
            Root::Other(_) => Err(Error::NotSupported("a zone table")),
        }
    }

    /// Keeps the bytes of a zone's descriptor extension, durably, before [`Device::restore`] installs the record that speaks of
    /// them. No record may speak of another one of the zone.
    pub(crate) async fn keep_extension(&self, zone: ZoneNo, extension: &[u8]) -> Result<(), Error> {
        match &self.root {
            Root::Zoned(node) => node.keep_extension(zone, extension).await,
            Root::Other(_) => Err(Error::NotSupported("zone descriptor extensions")),
        }
    }

    /// The node that holds the bytes whatever the zones say of them; the root itself without zones.
    pub(crate) fn below(&self) -> &dyn Node {
        match &self.root {
            Root::Zoned(node) => node.child(),
            Root::Other(node) => &**node,
        }
    }

    /// Has `watcher` told of each zone that an operator changes (read-only, offline, finished by the device, recommended):
    /// what no request of a door's own says. See [`Node::watch`].
    pub fn watch(&self, watcher: Watcher) {
        self.node().watch(watcher);
    }

    /// Closes cleanly. No request may be in flight; requests through other clones fail from now on or are lost.
    pub async fn close(self) -> Result<(), Error> {
        self.node().close().await
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), Error> {
        let limits = self.limits();
        if offset.checked_add(len).is_none_or(|end| end > limits.size) {
            return Err(Error::OutOfRange {
                offset,
                len,
                size: limits.size,
            });
        }
        let block_size = limits.block_size;
        if !(offset | len).is_multiple_of(block_size.into()) {
            return Err(Error::Unaligned {
                offset,
                len,
                block_size,
            });
        }
        Ok(())
    }

    fn check_change(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.check_writable()?;
        self.check(offset, len)
    }

    fn check_writable(&self) -> Result<(), Error> {
        if self.limits().read_only {
            Err(Error::ReadOnly)
        } else {
            Ok(())
        }
    }
}
