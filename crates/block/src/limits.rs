//! What a node offers to whoever stands above it.

use zbdkit_zone::Geometry;

/// The limits of a node. They travel up the graph unchanged unless a node says otherwise.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Size in bytes.
    pub size: u64,
    /// Logical block size in bytes: every offset and length is a multiple of it.
    pub block_size: u32,
    /// The least alignment of offset, length and memory that reaches the storage without a copy, bytes.
    pub direct_align: u32,
    /// Writes to sequential zones are multiples of this many bytes, where that is more than the logical block size.
    pub write_granularity: u32,
    /// Nothing can be written.
    pub read_only: bool,
    /// Zones, where the node has them.
    pub zoned: Option<Geometry>,
}

/// A conventional node's limits.
impl Limits {
    /// Limits of a node of `size` bytes without zones.
    pub fn plain(size: u64, block_size: u32, read_only: bool) -> Limits {
        Limits {
            size,
            block_size,
            direct_align: 1,
            write_granularity: 1,
            read_only,
            zoned: None,
        }
    }
}
