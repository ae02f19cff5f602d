//! The refcounts that the file holds, damaged as they may be, and what they are compared with.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use zbdkit_spec::qcow2::{REFTABLE_OFFSET_MASK, REFTABLE_RESERVED_MASK};

use super::counts::{PAGE, Use};
use super::found::Found;
use super::references::{Marked, References};
use super::{Image, Progress};
use crate::error::Error;
use crate::image::read_at;
use crate::refcounts::get_count;

/// Bytes of refcount blocks that are kept.
const CACHE: u64 = 16 << 20;

/// Where a refcount block lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// All its counts are 0.
    None,
    /// Byte offset of its cluster.
    At(u64),
    /// Byte offset of a cluster that holds something else: what it says are no counts.
    Shared(u64),
    /// Nowhere that can be read.
    Unreadable,
}

/// The refcount structure in the file.
pub struct Disk {
    blocks: Vec<Block>,
    /// It has to be built anew.
    pub damaged: bool,
    /// Clusters of the table that count as used by it.
    table: std::ops::Range<u64>,
    order: u32,
    per_block: u64,
    kept: HashMap<u64, Rc<[u8]>>,
    order_kept: VecDeque<u64>,
    capacity: usize,
}

/// What the comparison says.
#[derive(Default)]
pub struct Differences {
    /// Blocks with counts that are wrong.
    pub blocks: Vec<u64>,
    /// References for which there is no block.
    pub homeless: bool,
    /// The last cluster of the file that is used or counted.
    pub highest: u64,
}

impl Disk {
    /// Reads the table and notes its clusters and blocks, the last references there are.
    pub async fn read(image: &Image<'_>, refs: &mut References, found: &mut Found) -> Result<Disk, Error> {
        let header = &image.header;
        let (offset, clusters) = (
            header.refcount_table_offset,
            u64::from(header.refcount_table_clusters),
        );
        let mut disk = Disk::empty(image);
        let bytes = clusters << header.cluster_bits;
        let (before, incomplete) = (found.report.corruptions, refs.incomplete);
        let marked = refs.mark(image, found, (offset, bytes), 1, Use::RefcountTable);
        found.structure += found.report.corruptions - before;
        if marked == Marked::Outside {
            // It is replaced, and hides no reference.
            refs.incomplete = incomplete;
        } else {
            let first = offset >> header.cluster_bits;
            disk.table = first..first + clusters;
        }
        disk.damaged = bytes == 0 || marked != Marked::Alone;
        if bytes == 0 || offset >= image.len {
            return Ok(disk);
        }
        // Not more than 8 MiB, and not more than the file has.
        let words = bytes.min(image.len - offset).div_ceil(8);
        for (index, word) in image.words(offset, words).await?.into_iter().enumerate() {
            let mut block = disk.judge(image, found, index, word);
            if let Block::At(offset) = block {
                block = disk.mark(image, refs, found, index, offset);
            }
            disk.blocks.push(block);
        }
        Ok(disk)
    }

    /// The structure that was just built.
    pub async fn reload(image: &Image<'_>) -> Result<Disk, Error> {
        let header = &image.header;
        let bytes = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        let words = image.words(header.refcount_table_offset, bytes / 8).await?;
        let block = |word| if word == 0 { Block::None } else { Block::At(word) };
        Ok(Disk {
            blocks: words.into_iter().map(block).collect(),
            ..Disk::empty(image)
        })
    }

    fn empty(image: &Image<'_>) -> Disk {
        Disk {
            blocks: Vec::new(),
            damaged: false,
            table: 0..0,
            order: image.header.refcount_order,
            per_block: image.header.refcounts_per_block(),
            kept: HashMap::new(),
            order_kept: VecDeque::new(),
            capacity: (CACHE / image.cluster_size()) as usize,
        }
    }

    fn judge(&mut self, image: &Image<'_>, found: &mut Found, index: usize, word: u64) -> Block {
        let offset = word & REFTABLE_OFFSET_MASK;
        if word & REFTABLE_RESERVED_MASK != 0 {
            self.damaged = true;
            found.structure(format_args!(
                "ERROR refcount table entry {index} has reserved bits set"
            ));
        }
        if !image.is_aligned(offset) {
            self.damaged = true;
            found.structure(format_args!(
                "ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
            ));
            return Block::Unreadable;
        }
        if offset >= image.len.next_multiple_of(image.cluster_size()) {
            self.damaged = true;
            found.structure(format_args!("ERROR refcount block {index} is outside image"));
            // Past the end there are zeros, but not past where a file can end.
            return if offset > i64::MAX as u64 {
                Block::Unreadable
            } else {
                Block::None
            };
        }
        if offset == 0 {
            Block::None
        } else {
            Block::At(offset)
        }
    }

    fn mark(
        &mut self,
        image: &Image<'_>,
        refs: &mut References,
        found: &mut Found,
        index: usize,
        offset: u64,
    ) -> Block {
        let cluster = offset >> image.header.cluster_bits;
        if refs.counts.add(cluster, 1, Use::RefcountBlock).is_none() {
            return Block::At(offset);
        }
        self.damaged = true;
        found.structure(format_args!(
            "ERROR refcount block {index} refcount={}",
            refs.counts.get(cluster)
        ));
        Block::Shared(offset)
    }

    /// Takes the references of the structure itself back: it will be replaced.
    pub fn unmark(&self, image: &Image<'_>, refs: &mut References) {
        let blocks = self.blocks.iter().filter_map(|block| match block {
            Block::At(offset) | Block::Shared(offset) => Some(offset >> image.header.cluster_bits),
            Block::None | Block::Unreadable => None,
        });
        for cluster in blocks.chain(self.table.clone()) {
            refs.counts.remove(cluster);
        }
    }

    /// Clusters whose counts lie in a block.
    pub fn per_block(&self) -> u64 {
        self.per_block
    }

    /// The largest count that fits.
    pub fn max(&self) -> u64 {
        u64::MAX >> (64 - (1 << self.order))
    }

    /// Where a block lies.
    pub fn block(&self, index: u64) -> Block {
        usize::try_from(index)
            .ok()
            .and_then(|index| self.blocks.get(index).copied())
            .unwrap_or(Block::None)
    }

    /// Indices of the blocks that can be read.
    pub fn readable(&self) -> impl Iterator<Item = u64> + '_ {
        let at = |(index, block): (usize, &Block)| matches!(block, Block::At(_)).then_some(index as u64);
        self.blocks.iter().enumerate().filter_map(at)
    }

    /// The bytes of a block that can be read.
    pub async fn bytes(&mut self, image: &Image<'_>, index: u64) -> Result<Option<Rc<[u8]>>, Error> {
        let Block::At(offset) = self.block(index) else {
            return Ok(None);
        };
        if let Some(bytes) = self.kept.get(&index) {
            return Ok(Some(bytes.clone()));
        }
        let bytes = read_at(image.file, offset, image.cluster_size() as usize).await;
        let Ok(bytes) = bytes else {
            self.blocks[index as usize] = Block::Unreadable;
            self.damaged = true;
            return bytes.map(|_| None);
        };
        let bytes: Rc<[u8]> = bytes.into();
        while self.order_kept.len() >= self.capacity {
            if let Some(oldest) = self.order_kept.pop_front() {
                self.kept.remove(&oldest);
            }
        }
        self.order_kept.push_back(index);
        self.kept.insert(index, bytes.clone());
        Ok(Some(bytes))
    }

    /// A block was written.
    pub fn replace(&mut self, index: u64, bytes: Vec<u8>) {
        if let Some(kept) = self.kept.get_mut(&index) {
            *kept = bytes.into();
        }
    }

    /// A cluster's count in the file; `None` where it cannot be read.
    pub async fn get(&mut self, image: &Image<'_>, cluster: u64) -> Option<u64> {
        let index = cluster / self.per_block;
        if let Some(bytes) = self.kept.get(&index) {
            return Some(get_count(bytes, self.order, cluster % self.per_block));
        }
        match self.bytes(image, index).await {
            Ok(Some(bytes)) => Some(get_count(&bytes, self.order, cluster % self.per_block)),
            Ok(None) if self.block(index) == Block::None => Some(0),
            _ => None,
        }
    }

    /// Compares the file's counts with the references.
    pub async fn compare(
        &mut self,
        image: &Image<'_>,
        refs: &References,
        found: &mut Found,
        progress: &mut Progress<'_>,
    ) -> Differences {
        let mut differences = Differences::default();
        let in_file = image.len.div_ceil(image.cluster_size());
        let referenced = refs.counts.highest().unwrap_or(0);
        differences.highest = referenced.min(in_file.saturating_sub(1));
        for index in self.indices(refs) {
            progress.step(1);
            match self.bytes(image, index).await {
                _ if matches!(self.block(index), Block::Shared(_)) => {}
                Ok(bytes) if self.block(index) != Block::Unreadable => {
                    let before = (found.low, found.report.leaks);
                    self.compare_block(image, refs, found, index, bytes.as_deref(), &mut differences);
                    if before != (found.low, found.report.leaks) {
                        differences.blocks.push(index);
                    }
                }
                // It was told that the block is nowhere; what it does not count is not there.
                _ if index * self.per_block >= in_file => {}
                _ => {
                    found.unreadable_blocks += 1;
                    let first = index * self.per_block;
                    found.error(format_args!(
                        "Can't get refcount for clusters {first} to {}: refcount block {index} cannot be read",
                        first + self.per_block - 1
                    ));
                }
            }
        }
        differences
    }

    /// Blocks that exist or should exist, rising.
    fn indices(&self, refs: &References) -> Vec<u64> {
        let exists = |(index, block): (usize, &Block)| (*block != Block::None).then_some(index as u64);
        let mut indices: Vec<u64> = self.blocks.iter().enumerate().filter_map(exists).collect();
        indices.extend(needed(refs, self.per_block));
        indices.sort_unstable();
        indices.dedup();
        indices
    }

    fn compare_block(
        &self,
        image: &Image<'_>,
        refs: &References,
        found: &mut Found,
        index: u64,
        bytes: Option<&[u8]>,
        differences: &mut Differences,
    ) {
        let first = index * self.per_block;
        let in_file = image.len.div_ceil(image.cluster_size());
        let mut at = 0;
        while at < self.per_block {
            let n = PAGE.min(self.per_block - at);
            // Widths times numbers here are whole bytes.
            let part = bytes
                .map(|bytes| &bytes[((at << self.order) / 8) as usize..][..((n << self.order) / 8) as usize]);
            let clusters = first + at..first + at + n;
            if part.is_none_or(|part| part.iter().all(|byte| *byte == 0)) {
                for cluster in refs.counts.referenced(clusters) {
                    differences.homeless |= bytes.is_none();
                    self.compare_cluster(image, found, cluster, 0, refs.counts.get(cluster));
                }
                at += n;
                continue;
            }
            for cluster in clusters {
                let count = part.map_or(0, |part| get_count(part, self.order, cluster - first - at));
                let reference = refs.counts.get(cluster);
                if count > 0 && cluster < in_file {
                    differences.highest = differences.highest.max(cluster);
                }
                if count != reference {
                    self.compare_cluster(image, found, cluster, count, reference);
                }
            }
            at += n;
        }
    }

    fn compare_cluster(
        &self,
        image: &Image<'_>,
        found: &mut Found,
        cluster: u64,
        count: u64,
        reference: u64,
    ) {
        if reference > self.max() {
            found.corruption(format_args!(
                "ERROR: overflow cluster offset={:#x}",
                cluster << image.header.cluster_bits
            ));
        }
        let reference = reference.min(self.max());
        if count < reference {
            found.low += 1;
            found.corruption(format_args!(
                "ERROR cluster {cluster} refcount={count} reference={reference}"
            ));
        } else if count > reference {
            found.report.leaks += 1;
            found.say(format_args!(
                "Leaked cluster {cluster} refcount={count} reference={reference}"
            ));
        }
    }
}

/// Blocks that the references need, rising.
pub fn needed(refs: &References, per_block: u64) -> Vec<u64> {
    let mut indices = Vec::new();
    for page in refs.counts.pages() {
        for cluster in refs.counts.referenced(page..page + PAGE) {
            let index = cluster / per_block;
            if indices.last() != Some(&index) {
                indices.push(index);
            }
        }
    }
    indices
}
