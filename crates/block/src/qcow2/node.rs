//! The format `qcow2`: the node over an open image, below its zones where it has some.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use zbdkit_io::{IoBuf, LocalBoxFuture};
use zbdkit_qcow2::{Backing, Mapping, Qcow2};
use zbdkit_spec::qcow2::INCOMPAT_ZONE_STATES;
use zbdkit_zone::Geometry;

use super::ahead::{Ahead, Turn};
use crate::error::Error;
use crate::limits::Limits;
use crate::node::{Access, CrossZone, Lane, MapExtent, Node, Request, Resolved};
use crate::zoned::Holder;

/// The node over an open qcow2 image. Its zones, if it has some, are a node above it.
pub struct Qcow2Node {
    image: Arc<Qcow2>,
    limits: Limits,
    /// Name of the file that holds the data.
    filename: Arc<str>,
    backing: Option<BackingImage>,
    ahead: Option<Arc<Ahead>>,
    /// The image is marked as one whose zones only this program understands.
    marked: AtomicBool,
}

/// What an image has below it.
#[derive(Clone)]
pub struct BackingImage {
    /// Its name as the image has it.
    pub name: String,
    /// Its format as the image has it.
    pub format: Option<String>,
    /// The opened backing image, below its zones; `None` where the image was opened without it.
    pub node: Option<Arc<dyn Node>>,
}

impl Qcow2Node {
    /// The node over an image whose data lies in the file of that name.
    pub(crate) fn new(image: Qcow2, filename: &str, backing: Option<BackingImage>) -> Qcow2Node {
        let mut limits = Limits::plain(image.size(), 512, image.is_read_only());
        for align in [image.file(), image.data_file()]
            .into_iter()
            .filter_map(|file| file.direct_align())
        {
            limits.direct_align = limits.direct_align.max(align);
            limits.block_size = limits.block_size.max(align);
        }
        Qcow2Node {
            image: Arc::new(image),
            limits,
            filename: filename.into(),
            backing,
            ahead: None,
            marked: AtomicBool::new(false),
        }
    }

    /// With the zones that are mapped ahead; `marked` where the image says already that it has states of ours.
    pub(super) fn with_zones(mut self, geometry: &Geometry, marked: bool) -> Qcow2Node {
        if !self.limits.read_only {
            self.ahead = Some(Arc::new(Ahead::new(*geometry, self.image.cluster_size())));
        }
        self.marked = AtomicBool::new(marked);
        self
    }

    /// The image itself.
    pub fn image(&self) -> &Qcow2 {
        &self.image
    }

    /// What is below it.
    pub fn backing(&self) -> Option<&BackingImage> {
        self.backing.as_ref()
    }

    /// Waits until nothing goes on in the background.
    pub async fn quiet(&self) {
        if let Some(ahead) = &self.ahead {
            ahead.quiet().await;
        }
    }

    /// Sees to it that the write finds clusters, where its zone is one that is mapped ahead.
    async fn prepare_write(&self, lane: &Lane, offset: u64, len: u64) {
        let Some(ahead) = &self.ahead else { return };
        let Some(zone) = ahead.zone_of(offset) else { return };
        let is_mapped = || self.image.resolve(offset, len, Access::Write).is_some();
        if is_mapped() {
            if ahead.crosses(offset, len)
                && let Some(turn) = ahead.try_turn(zone)
            {
                self.map_early(lane, turn, ahead.early(zone, offset, len));
            }
            return;
        }
        let _turn = ahead.turn(zone).await;
        if !is_mapped() {
            // Where this fails, the write maps what it needs itself, or fails in its own words.
            if let Err(error) = self.image.map_ahead(ahead.at_once(zone, offset, len)).await {
                tracing::debug!("zone {zone} could not be mapped ahead: {error}");
            }
        }
    }

    fn map_early(&self, lane: &Lane, turn: Turn, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (image, work) = (self.image.clone(), lane.work());
        zbdkit_io::spawn(async move {
            let _until_done = (turn, work);
            if let Err(error) = image.map_ahead(range).await {
                tracing::debug!("a zone could not be mapped ahead: {error}");
            }
        });
    }

    /// What this image itself has for the first bytes of a range; `None` for what lies below it.
    async fn map_here(&self, offset: u64, len: u64) -> Result<(u64, Option<MapExtent>), Error> {
        let extent = self.image.map(offset, len).await?;
        let zeros = MapExtent::zeros(extent.len);
        let at = |place: Option<u64>| MapExtent {
            offset: place,
            filename: place.map(|_| self.filename.clone()),
            ..zeros.clone()
        };
        let found = match extent.mapping {
            Mapping::Data { offset } => MapExtent {
                data: true,
                zero: false,
                ..at(Some(offset))
            },
            Mapping::Zero { offset } => at(offset),
            Mapping::Compressed => MapExtent {
                data: true,
                zero: false,
                compressed: true,
                ..zeros
            },
            Mapping::Unallocated => return Ok((extent.len, None)),
        };
        Ok((extent.len, Some(found)))
    }

    /// What lies below, and how far from `offset` it reaches.
    fn below(&self, offset: u64) -> Option<(&dyn Node, u64)> {
        let node = &**self.backing.as_ref()?.node.as_ref()?;
        let there = node.limits().size.saturating_sub(offset);
        (there > 0).then_some((node, there))
    }

    /// As [`Node::map`], over the images of the chain one after the other: it may be long.
    async fn map_chain(&self, offset: u64, len: u64) -> Result<MapExtent, Error> {
        let (mut image, mut len, mut depth) = (self, len, 0);
        loop {
            let (alike, found) = image.map_here(offset, len).await?;
            if let Some(found) = found {
                return Ok(MapExtent { depth, ..found });
            }
            let Some((node, there)) = image.below(offset) else {
                return Ok(MapExtent {
                    depth,
                    present: false,
                    ..MapExtent::zeros(alike)
                });
            };
            len = alike.min(there);
            depth += 1;
            match node.as_qcow2() {
                Some(next) => image = next,
                None => {
                    let found = node.map(offset, len).await?;
                    return Ok(MapExtent {
                        depth: found.depth + depth,
                        ..found
                    });
                }
            }
        }
    }
}

impl Node for Qcow2Node {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn driver(&self) -> &'static str {
        "qcow2"
    }

    fn as_qcow2(&self) -> Option<&Qcow2Node> {
        Some(self)
    }

    fn check(&self) -> Result<(), Error> {
        Ok(self.image.check_failed()?)
    }

    fn resolve(&self, offset: u64, len: u64, access: Access) -> Option<Resolved<'_>> {
        if access == Access::Write
            && let Some(ahead) = &self.ahead
            && ahead.crosses(offset, len)
        {
            return None;
        }
        self.image.resolve(offset, len, access).map(Resolved::from)
    }

    fn read<'a>(&'a self, _lane: &'a Lane, buf: IoBuf, offset: u64, _cross: CrossZone) -> Request<'a, ()> {
        Box::pin(async move { Ok(self.image.read(buf, offset).await?) })
    }

    fn write<'a>(&'a self, lane: &'a Lane, buf: IoBuf, offset: u64) -> Request<'a, ()> {
        Box::pin(async move {
            self.prepare_write(lane, offset, buf.len() as u64).await;
            Ok(self.image.write(buf, offset).await?)
        })
    }

    fn flush<'a>(&'a self) -> Request<'a, ()> {
        Box::pin(async move { Ok(self.image.flush().await?) })
    }

    fn write_zeroes<'a>(&'a self, _lane: &'a Lane, offset: u64, len: u64, unmap: bool) -> Request<'a, ()> {
        Box::pin(async move { Ok(self.image.write_zeroes(offset, len, unmap).await?) })
    }

    fn discard<'a>(&'a self, _lane: &'a Lane, offset: u64, len: u64) -> Request<'a, ()> {
        Box::pin(async move { Ok(self.image.discard(offset, len).await?) })
    }

    fn write_anywhere<'a>(&'a self, range: Range<u64>) -> Request<'a, ()> {
        Box::pin(async move {
            if let Some(ahead) = &self.ahead {
                ahead.exempt(&range);
                ahead.idle_in(&range).await;
            }
            Ok(())
        })
    }

    fn release<'a>(&'a self, range: Range<u64>) -> Request<'a, ()> {
        Box::pin(async move {
            if let Some(ahead) = &self.ahead {
                ahead.idle_in(&range).await;
                ahead.admit(&range);
            }
            Ok(self.image.release(range).await?)
        })
    }

    fn map<'a>(&'a self, offset: u64, len: u64) -> Request<'a, MapExtent> {
        Box::pin(self.map_chain(offset, len))
    }

    fn close<'a>(&'a self) -> Request<'a, ()> {
        Box::pin(async move {
            self.quiet().await;
            Ok(self.image.close().await?)
        })
    }
}

impl Holder for Qcow2Node {
    fn mark<'a>(&'a self) -> Request<'a, ()> {
        Box::pin(async move {
            if self.marked.load(Ordering::Acquire) {
                return Ok(());
            }
            self.image
                .update_header(|header| {
                    header.incompatible |= INCOMPAT_ZONE_STATES;
                    Ok(())
                })
                .await?;
            self.marked.store(true, Ordering::Release);
            Ok(())
        })
    }

    fn allocate<'a>(&'a self, len: u64) -> Request<'a, u64> {
        Box::pin(async move { Ok(self.image.allocate_area(len).await?) })
    }

    fn free<'a>(&'a self, offset: u64, len: u64) -> Request<'a, ()> {
        Box::pin(async move { Ok(self.image.free_area(offset, len).await?) })
    }
}

/// A node as what lies below an image: its bytes, whatever its zones say of them.
pub(crate) struct NodeBacking(pub Arc<dyn Node>);

impl Backing for NodeBacking {
    fn len(&self) -> u64 {
        self.0.limits().size
    }

    fn read<'a>(&'a self, buf: IoBuf, offset: u64) -> LocalBoxFuture<'a, Result<(), i32>> {
        Box::pin(async move {
            let mut done = 0;
            while done < buf.len() {
                done += read_some(&*self.0, buf.slice(done..buf.len()), offset + done as u64).await?;
            }
            Ok(())
        })
    }
}

/// Reads the first bytes of a range that one image of the chain has; the answer is how many. Not by recursion: the chain
/// may be long, and a stack is not.
async fn read_some(node: &dyn Node, buf: IoBuf, offset: u64) -> Result<usize, i32> {
    let failed = |error: Error| error.errno();
    let there = node.limits().size.saturating_sub(offset).min(buf.len() as u64);
    if there == 0 {
        buf.fill(0..buf.len(), 0);
        return Ok(buf.len());
    }
    let (mut node, mut len) = (Some(node), there);
    loop {
        let buf = buf.slice(0..len as usize);
        let Some(image) = node.and_then(Node::as_qcow2) else {
            match node {
                Some(node) => read_plain(node, buf, offset).await?,
                None => buf.fill(0..buf.len(), 0),
            }
            return Ok(len as usize);
        };
        let (alike, found) = image.map_here(offset, len).await.map_err(failed)?;
        if found.is_some() {
            let read = image.image.read(buf.slice(0..alike as usize), offset).await;
            read.map_err(|error| error.errno())?;
            return Ok(alike as usize);
        }
        len = alike;
        node = match image.below(offset) {
            Some((below, there)) => {
                len = len.min(there);
                Some(below)
            }
            None => None,
        };
    }
}

/// Reads from a node that is no chain of its own.
async fn read_plain(node: &dyn Node, buf: IoBuf, offset: u64) -> Result<(), i32> {
    let align = u64::from(node.limits().block_size);
    let end = offset + buf.len() as u64;
    if (offset | end).is_multiple_of(align) {
        return read_aligned(node, buf, offset).await;
    }
    // Direct I/O wants more than what was asked for; what lies past the end of a file are zeros.
    let (start, end) = (offset / align * align, end.next_multiple_of(align));
    let whole = IoBuf::try_alloc((end - start) as usize).map_err(|_| libc::ENOMEM)?;
    read_aligned(node, whole.clone(), start).await?;
    let within = (offset - start) as usize;
    buf.copy_from_buf(&whole.slice(within..within + buf.len()));
    Ok(())
}

async fn read_aligned(node: &dyn Node, buf: IoBuf, offset: u64) -> Result<(), i32> {
    if let Some(at) = node.resolve(offset, buf.len() as u64, Access::Read) {
        let read = at.file.read(buf, at.offset).await;
        return read.map_err(|error| crate::error::errno_of(&error));
    }
    let lane = Lane::new(None, 0);
    let read = node.read(&lane, buf, offset, CrossZone::Allow).await;
    read.map_err(|error| error.errno())
}
