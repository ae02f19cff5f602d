//! Reference counts: the table, its blocks, and the search for free clusters.
//!
//! A count is raised, and that synced, before anything names the cluster ([`Refcounts::allocate`]); it is lowered only
//! when nothing names the cluster any more. So a cut at any point leaves clusters counted too high, never too low.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use zbdkit_io::File;
use zbdkit_spec::qcow2::{MAX_CLUSTER_OFFSET, MAX_REFTABLE_BYTES, REFTABLE_OFFSET_MASK};

use crate::ahead::join;
use crate::error::Error;
use crate::failure::Syncs;
use crate::header::Header;
use crate::image::{Sectors, file_len, read_at};

/// The counts of an open image.
pub struct Refcounts {
    file: File,
    syncs: Arc<Syncs>,
    sectors: Sectors,
    cluster_bits: u32,
    order: u32,
    /// Offsets of the blocks, 0 where all counts are 0.
    table: Vec<u64>,
    table_offset: u64,
    blocks: BTreeMap<u64, Vec<u8>>,
    /// No cluster below is free.
    hint: u64,
    /// No run of several clusters was found below.
    run_hint: u64,
    /// Length of the file, bytes.
    len: u64,
}

/// What an allocation took.
pub struct Allocated {
    /// Runs of clusters, each at least as long as was asked.
    pub runs: Vec<Range<u64>>,
    /// Clusters that hold counts from now on.
    pub own: Range<u64>,
    /// The table moved: its new place and size in clusters; the header must say so before the old one goes.
    pub moved: Option<(u64, u32)>,
}

/// Blocks that are kept in memory.
const CACHED: usize = 256;
/// Most runs that are taken at once: each is zeroed and counted by itself.
const MOST_RUNS: usize = 1 << 10;
/// What failed where the file cannot be as long as asked.
pub const GROWING: &str = "growing the file";

impl Refcounts {
    /// Reads the table.
    pub async fn load(
        file: File,
        syncs: Arc<Syncs>,
        header: &Header,
        sectors: Sectors,
    ) -> Result<Refcounts, Error> {
        let bytes = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        let table = read_at(&file, header.refcount_table_offset, bytes as usize).await?;
        Ok(Refcounts {
            len: file_len(&file)?,
            sectors,
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            table: table
                .chunks_exact(8)
                .map(|entry| {
                    u64::from_be_bytes(entry.try_into().expect("eight bytes")) & REFTABLE_OFFSET_MASK
                })
                .collect(),
            table_offset: header.refcount_table_offset,
            blocks: BTreeMap::new(),
            hint: 0,
            run_hint: 0,
            syncs,
            file,
        })
    }

    /// The largest count that fits.
    pub fn max(&self) -> u64 {
        u64::MAX >> (64 - (1 << self.order))
    }

    /// Length of the file as far as clusters were taken from it, bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The file was shortened to this.
    pub fn set_len(&mut self, len: u64) {
        self.len = len;
    }

    /// Byte offsets of the blocks.
    pub fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.table.iter().copied().filter(|offset| *offset != 0)
    }

    /// The table's clusters.
    pub fn table(&self) -> Range<u64> {
        let first = self.table_offset >> self.cluster_bits;
        first..first + ((self.table.len() as u64 * 8) >> self.cluster_bits).max(1)
    }

    fn per_block(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.order)
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// A cluster's count.
    pub async fn get(&mut self, cluster: u64) -> Result<u64, Error> {
        let index = cluster / self.per_block();
        if self.table.get(index as usize).is_none_or(|offset| *offset == 0) {
            return Ok(0);
        }
        let (order, within) = (self.order, cluster % self.per_block());
        Ok(get_count(self.block(index).await?, order, within))
    }

    async fn block(&mut self, index: u64) -> Result<&mut Vec<u8>, Error> {
        if !self.blocks.contains_key(&index) {
            let offset = self.table[index as usize];
            if !offset.is_multiple_of(self.cluster_size()) || offset >= self.len.max(MAX_CLUSTER_OFFSET) {
                return Err(Error::Corrupt(format!(
                    "refcount block {index} lies at {offset:#x}, which is no cluster"
                )));
            }
            let bytes = read_at(&self.file, offset, self.cluster_size() as usize).await?;
            while self.blocks.len() >= CACHED {
                // Work moves upwards, so what lies lowest was left longest ago, more often than not.
                self.blocks.pop_first();
            }
            self.blocks.insert(index, bytes);
        }
        Ok(self.blocks.get_mut(&index).expect("put there if it was not"))
    }

    /// Adds `delta` to the counts of clusters that have blocks. Reaches the kernel; not synced.
    pub async fn add(&mut self, run: Range<u64>, delta: i64) -> Result<(), Error> {
        let mut at = run.start;
        while at < run.end {
            let index = at / self.per_block();
            let end = run.end.min((index + 1) * self.per_block());
            self.add_in_block(
                index,
                at % self.per_block()..at % self.per_block() + (end - at),
                delta,
            )
            .await?;
            at = end;
        }
        if delta < 0 {
            self.hint = self.hint.min(run.start);
            self.run_hint = self.run_hint.min(run.start);
        }
        Ok(())
    }

    /// The parts of a run that nothing counts.
    pub async fn unused(&mut self, run: Range<u64>) -> Result<Vec<Range<u64>>, Error> {
        let mut parts: Vec<Range<u64>> = Vec::new();
        let mut at = run.start;
        while at < run.end {
            let (index, order) = (at / self.per_block(), self.order);
            let base = index * self.per_block();
            let end = run.end.min(base + self.per_block());
            if self.table.get(index as usize).is_none_or(|offset| *offset == 0) {
                join(&mut parts, at..end);
            } else {
                let block = self.block(index).await?;
                let free = (at..end).filter(|cluster| get_count(block, order, cluster - base) == 0);
                free.for_each(|cluster| join(&mut parts, cluster..cluster + 1));
            }
            at = end;
        }
        Ok(parts)
    }

    async fn add_in_block(&mut self, index: u64, within: Range<u64>, delta: i64) -> Result<(), Error> {
        let (order, max, base) = (self.order, self.max(), index * self.per_block());
        if self.table.get(index as usize).is_none_or(|offset| *offset == 0) {
            return Err(Error::Corrupt(format!(
                "cluster {} has no refcount",
                base + within.start
            )));
        }
        let offset = self.table[index as usize];
        let block = self.block(index).await?;
        // First all of them, so that a count that cannot be is found before one is changed.
        for at in within.clone() {
            let count = get_count(block, order, at);
            let new = count.checked_add_signed(delta).filter(|new| *new <= max);
            if new.is_none() {
                return Err(Error::Corrupt(format!(
                    "the refcount of cluster {} is {count}, and cannot change by {delta}",
                    base + at
                )));
            }
        }
        for at in within.clone() {
            let count = get_count(block, order, at);
            set_count(block, order, at, count.wrapping_add_signed(delta));
        }
        let bytes = (within.start << order >> 3) as usize..(((within.end << order) + 7) >> 3) as usize;
        let written = {
            let block = &self.blocks[&index];
            self.sectors.write(&self.file, offset, block, bytes).await
        };
        if written.is_err() {
            // What the file holds is not what we have.
            self.blocks.remove(&index);
        }
        written
    }

    /// Takes free clusters in runs of at least `need`, about `preferred` of them: counts of 1, contents of zeros, both
    /// synced. `is_taken` says what known metadata a range holds, which no free cluster does. The caller makes the
    /// header name a table that moved.
    pub async fn allocate(
        &mut self,
        need: u64,
        preferred: u64,
        is_taken: &dyn Fn(&Range<u64>) -> Option<String>,
    ) -> Result<Allocated, Error> {
        let check = |range: &Range<u64>| match is_taken(range) {
            Some(what) => Err(Error::Corrupt(format!(
                "free clusters from {} on hold {what}",
                range.start
            ))),
            None => Ok(()),
        };
        let runs = self.holes(need, preferred).await?;
        if !runs.is_empty() {
            for run in &runs {
                check(run)?;
                self.clear(run).await?;
                self.add(run.clone(), 1).await?;
            }
            self.syncs.sync().await?;
            let end = runs.last().map_or(0, |run| run.end);
            self.run_hint = end;
            if need == 1 {
                self.hint = end;
            }
            return Ok(Allocated {
                runs,
                own: 0..0,
                moved: None,
            });
        }
        let place = self.find(preferred.max(need)).await?;
        check(&place.all())?;
        self.clear(&place.all()).await?;
        self.raise(&place).await?;
        self.run_hint = place.run.end;
        let moved = (!place.table.is_empty())
            .then(|| (self.table_offset, (place.table.end - place.table.start) as u32));
        Ok(Allocated {
            own: place.table.start..place.blocks.end,
            runs: vec![place.run],
            moved,
        })
    }

    /// Free runs that have blocks for their counts already.
    async fn holes(&mut self, need: u64, preferred: u64) -> Result<Vec<Range<u64>>, Error> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let (mut total, mut at) = (0, if need == 1 { self.hint } else { self.run_hint });
        let mut run = at..at;
        loop {
            let (index, within) = (at / self.per_block(), at % self.per_block());
            let here = self.table.get(index as usize).is_some_and(|offset| *offset != 0);
            let (order, per_block) = (self.order, self.per_block());
            let block = if here {
                self.block(index).await?.as_slice()
            } else {
                &[]
            };
            for cluster in if here { within..per_block } else { 0..1 } {
                let free = here && get_count(block, order, cluster) == 0;
                if free && total + (run.end - run.start) < preferred.max(need) {
                    run.end += 1;
                    continue;
                }
                let len = run.end - run.start;
                if len >= need && len > 0 {
                    total += len;
                    runs.push(run.clone());
                }
                if !here || total >= preferred || runs.len() >= MOST_RUNS {
                    return Ok(runs);
                }
                let next = index * per_block + cluster + 1;
                run = next..next;
            }
            at = (index + 1) * per_block;
        }
    }

    /// Room for a run of `want` clusters, with what must be added for its own counts in front of it.
    async fn find(&mut self, want: u64) -> Result<Place, Error> {
        let mut from = self.run_hint;
        loop {
            let start = self.next_free(from).await?;
            let place = self.place(start, want)?;
            match self.first_used(place.all()).await? {
                None => return Ok(place),
                Some(used) => from = used + 1,
            }
        }
    }

    /// How a run of `want` clusters that begins at `start` is laid out: a new table, new blocks, the run.
    fn place(&self, start: u64, want: u64) -> Result<Place, Error> {
        let (mut table, mut blocks) = (0, 0);
        loop {
            let end = start
                .checked_add(table + blocks + want)
                .filter(|end| *end <= MAX_CLUSTER_OFFSET >> self.cluster_bits)
                .ok_or(Error::Io {
                    op: GROWING,
                    errno: libc::EFBIG,
                })?;
            let per_block = self.per_block();
            let missing = (start / per_block..end.div_ceil(per_block))
                .filter(|index| self.table.get(*index as usize).is_none_or(|offset| *offset == 0))
                .count() as u64;
            let needed = end.div_ceil(per_block);
            let most = MAX_REFTABLE_BYTES / 8;
            if needed > most {
                return Err(Error::Io {
                    op: GROWING,
                    errno: libc::EFBIG,
                });
            }
            let clusters = if needed > self.table.len() as u64 {
                // Half as much again, so that it is seldom done.
                ((needed + needed / 2).min(most) * 8).div_ceil(self.cluster_size())
            } else {
                0
            };
            if (clusters, missing) == (table, blocks) {
                return Ok(Place {
                    table: start..start + table,
                    blocks: start + table..start + table + blocks,
                    run: start + table + blocks..end,
                });
            }
            // Both only grow with the end, so that this ends.
            (table, blocks) = (clusters, missing);
        }
    }

    async fn next_free(&mut self, from: u64) -> Result<u64, Error> {
        let mut at = from;
        loop {
            let (index, within) = (at / self.per_block(), at % self.per_block());
            if self.table.get(index as usize).is_none_or(|offset| *offset == 0) {
                return Ok(at);
            }
            let (order, per_block) = (self.order, self.per_block());
            let block = self.block(index).await?;
            if let Some(free) = (within..per_block).find(|at| get_count(block, order, *at) == 0) {
                return Ok(index * per_block + free);
            }
            at = (index + 1) * per_block;
        }
    }

    /// The first cluster of the range that is counted.
    async fn first_used(&mut self, range: Range<u64>) -> Result<Option<u64>, Error> {
        let mut at = range.start;
        while at < range.end {
            let (index, within) = (at / self.per_block(), at % self.per_block());
            let end = range.end.min((index + 1) * self.per_block());
            if self.table.get(index as usize).is_some_and(|offset| *offset != 0) {
                let (order, count) = (self.order, end - at);
                let block = self.block(index).await?;
                if let Some(used) = (within..within + count).find(|at| get_count(block, order, *at) != 0) {
                    return Ok(Some(at - within + used));
                }
            }
            at = end;
        }
        Ok(None)
    }

    /// Makes clusters read as zeros.
    async fn clear(&mut self, run: &Range<u64>) -> Result<(), Error> {
        let (start, end) = (run.start << self.cluster_bits, run.end << self.cluster_bits);
        let old = self.len;
        if start < old {
            let zeroed = self.file.punch_hole(start, old.min(end) - start).await;
            if zeroed.is_err() {
                let zeroed = self.file.zero_range(start, old.min(end) - start).await;
                zeroed.map_err(|e| Error::io("zeroing clusters", &e))?;
            }
        }
        if end > old {
            self.file.set_len(end).map_err(|e| Error::io(GROWING, &e))?;
            self.len = end;
        }
        Ok(())
    }

    /// Counts the place once, durably.
    async fn raise(&mut self, place: &Place) -> Result<(), Error> {
        let per_block = self.per_block();
        let mut table = self.table.clone();
        let mut next = place.blocks.start;
        let mut new_blocks = Vec::new();
        if !place.table.is_empty() {
            let clusters = place.table.end - place.table.start;
            table.resize(((clusters << self.cluster_bits) / 8) as usize, 0);
        }
        for index in place.all().start / per_block..place.all().end.div_ceil(per_block) {
            if table[index as usize] == 0 && next < place.blocks.end {
                table[index as usize] = next << self.cluster_bits;
                new_blocks.push(index);
                next += 1;
            }
        }
        // The counts of blocks that are there already are raised in them; new blocks are written whole.
        for index in &new_blocks {
            let mut block = vec![0; self.cluster_size() as usize];
            let base = index * per_block;
            for cluster in place.all().start.max(base)..place.all().end.min(base + per_block) {
                set_count(&mut block, self.order, cluster - base, 1);
            }
            let len = block.len();
            self.sectors
                .write(&self.file, table[*index as usize], &block, 0..len)
                .await?;
        }
        let old_table = std::mem::replace(&mut self.table, table);
        let raised = self.raise_old(place, &new_blocks).await;
        if let Err(error) = raised {
            self.table = old_table;
            return Err(error);
        }
        if !place.table.is_empty() {
            let bytes: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            let len = bytes.len();
            let offset = place.table.start << self.cluster_bits;
            let written = self.sectors.write(&self.file, offset, &bytes, 0..len).await;
            if let Err(error) = written {
                self.table = old_table;
                return Err(error);
            }
            self.table_offset = offset;
        }
        self.syncs.sync().await?;
        if place.table.is_empty() && !new_blocks.is_empty() {
            self.name_blocks(&new_blocks).await?;
            self.syncs.sync().await?;
        }
        Ok(())
    }

    /// Writes the table's entries for new blocks.
    async fn name_blocks(&mut self, new_blocks: &[u64]) -> Result<(), Error> {
        let bytes: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let per_sector = self.sectors.align / 8;
        let mut left = new_blocks;
        while let Some(first) = left.first() {
            let here = left.partition_point(|index| index / per_sector == first / per_sector);
            let (now, later) = left.split_at(here);
            let at = *first as usize * 8;
            let written = self
                .sectors
                .write(&self.file, self.table_offset, &bytes, at..at + 8)
                .await;
            if let Err(error) = written {
                // What the file does not name counts nothing, here as there.
                left.iter().for_each(|index| self.table[*index as usize] = 0);
                return Err(error);
            }
            debug_assert!(!now.is_empty());
            left = later;
        }
        Ok(())
    }

    async fn raise_old(&mut self, place: &Place, new_blocks: &[u64]) -> Result<(), Error> {
        let per_block = self.per_block();
        for index in place.all().start / per_block..place.all().end.div_ceil(per_block) {
            if !new_blocks.contains(&index) {
                let base = index * per_block;
                let (start, end) = (
                    place.all().start.max(base) - base,
                    place.all().end.min(base + per_block) - base,
                );
                self.add_in_block(index, start..end, 1).await?;
            }
        }
        Ok(())
    }
}

/// Where an allocation goes.
struct Place {
    table: Range<u64>,
    blocks: Range<u64>,
    run: Range<u64>,
}

impl Place {
    fn all(&self) -> Range<u64> {
        self.table.start..self.run.end
    }
}

/// The count at a position of a block; widths under a byte fill bytes from their low bits on.
pub fn get_count(block: &[u8], order: u32, at: u64) -> u64 {
    let at = at as usize;
    match order {
        0..=2 => {
            let bits = 1 << order;
            let per_byte = 8 / bits;
            u64::from(block[at / per_byte] >> (at % per_byte * bits)) & ((1 << bits) - 1)
        }
        _ => {
            let bytes = 1 << (order - 3);
            block[at * bytes..][..bytes]
                .iter()
                .fold(0, |count, byte| count << 8 | u64::from(*byte))
        }
    }
}

/// Sets the count at a position of a block.
pub fn set_count(block: &mut [u8], order: u32, at: u64, count: u64) {
    let at = at as usize;
    match order {
        0..=2 => {
            let bits = 1 << order;
            let per_byte = 8 / bits;
            let shift = at % per_byte * bits;
            let mask = ((1u16 << bits) - 1) as u8;
            let byte = &mut block[at / per_byte];
            *byte = *byte & !(mask << shift) | (count as u8 & mask) << shift;
        }
        _ => {
            let bytes = 1 << (order - 3);
            block[at * bytes..][..bytes].copy_from_slice(&count.to_be_bytes()[8 - bytes..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_keep_apart() {
        for order in 0..=6 {
            let mut block = vec![0; 512];
            let max = u64::MAX >> (64 - (1 << order));
            let n = 4096u64 >> order;
            for at in 0..n {
                set_count(&mut block, order, at, at & max);
            }
            for at in 0..n {
                assert_eq!(get_count(&block, order, at), at & max, "width {}", 1 << order);
            }
            set_count(&mut block, order, 3, 0);
            assert_eq!(get_count(&block, order, 2), 2 & max);
            assert_eq!(get_count(&block, order, 4), 4 & max);
        }
    }
}
