//! Formats: the block sizes that an image can have, and the change from one to another.
//!
//! An image has another block size only together with zones that hold nothing: every zone is closed to all requests, drained and
//! erased, durably; then the table's header says the new block size, durably; then it counts, and the zones take requests
//! again. A cut leaves the old size with zones that may be erased, or the new one with zones that all are. Requests that
//! waited meanwhile are checked against the block size that they find.

use zbdkit_zone::{Engine, ExclusiveOp, Geometry, Model};

use super::{Durability, ZonedNode};
use crate::error::Error;
use crate::limits::Limits;

/// The block sizes that hosts know, which an image of one of them may be formatted to.
const BLOCK_SIZES: [u32; 2] = [512, 4096];

/// The formats that a device of that shape can have over such a child, by ascending block size. Only namespaces of NVMe are
/// formatted, so an image that is none has its own format alone.
pub fn formats_of(own: &Geometry, child: &Limits) -> Vec<Geometry> {
    let may_change = own.model() == Model::HostManaged
        && own.nr_conventional() == 0
        && BLOCK_SIZES.contains(&own.block_size());
    if !may_change {
        return vec![*own];
    }
    let least = child.block_size.max(child.direct_align);
    let fits = |size: &u32| *size == own.block_size() || *size >= least;
    BLOCK_SIZES
        .into_iter()
        .filter(fits)
        .filter_map(|size| own.with_block_size(size).ok())
        .collect()
}

/// The limits of a node over `child` in each of the engine's formats.
pub fn limits_of(engine: &Engine, child: &Limits, read_only: bool) -> Box<[Limits]> {
    let limits = |format: &Geometry| Limits {
        size: format.size(),
        block_size: format.block_size(),
        read_only: child.read_only || read_only,
        zoned: Some(*format),
        ..child.clone()
    };
    engine.formats().iter().map(limits).collect()
}

impl ZonedNode {
    /// Erases every zone and gives the image blocks of that size; see [`Device::format`](crate::Device::format).
    pub(crate) async fn format(&self, block_size: u32) -> Result<(), Error> {
        if self.engine.geometry().nr_conventional() != 0 {
            return Err(Error::NotSupported("a format of conventional zones"));
        }
        let mut sizes = self.engine.formats().iter().map(Geometry::block_size);
        let index = sizes
            .position(|size| size == block_size)
            .ok_or(Error::NotSupported("blocks of that size"))?;
        let permits = self.close_every_zone(ExclusiveOp::Format).await?;
        let mut result = self
            .make_durable(&self.changes(&permits), ExclusiveOp::Format)
            .await;
        if index != self.engine.format_index() && result.is_ok() {
            result = self.record_block_size(block_size).await;
            if result.is_ok() {
                self.engine.set_format(index, &permits);
            }
        }
        self.end(permits, &result);
        result
    }

    /// No record of a zone may be unfit for that size: neither what is durable, nor what the run state says.
    async fn record_block_size(&self, block_size: u32) -> Result<(), Error> {
        match &self.durability {
            Durability::ReadOnly => Err(Error::ReadOnly),
            Durability::Table { committer, .. } => committer.set_block_size(block_size, &self.image()).await,
            Durability::Volatile => Ok(()),
        }
    }
}
