//! Setting refcounts and entries right.
//!
//! Order: counts that are too low are raised and synced first, then entries lose what is wrong with them, synced, then
//! counts that are too high are lowered, synced, and last entries get back the right to be written in place. A new
//! refcount structure is written and synced beside the old one; one write of a sector of the header switches to it. So
//! a cut leaves what was wrong before, and clusters counted too high, but nothing that was right before is wrong.

use std::collections::BTreeSet;
use std::ops::Range;

use zbdkit_spec::qcow2::{L1E_OFFSET_MASK, MAX_REFTABLE_BYTES};

use super::counts::Use;
use super::disk::{Block, Differences, Disk, needed};
use super::entries::{Cluster, Rules};
use super::found::{Found, Mended};
use super::references::{L1, References, mend_l1, runs};
use super::{Image, Progress, Repair};
use crate::error::Error;
use crate::image::read_at;
use crate::l2::COPIED;
use crate::refcounts::{get_count, set_count};

/// Freed runs that are remembered to give their space back; more are not worth the memory.
const FREED: usize = 1 << 16;

/// Which counts a repair is after.
#[derive(Clone, Copy)]
pub struct Aim {
    pub repair: Repair,
    /// Some references are not known, so what seems unused may be used.
    pub incomplete: bool,
    /// The largest count.
    pub max: u64,
}

impl Aim {
    /// The count that a cluster has once the repair is done; `None` where nobody knows it.
    fn count(self, counted: Option<u64>, references: u64) -> Option<u64> {
        let references = references.min(self.max);
        match self.repair {
            Repair::None => counted,
            Repair::Leaks if self.incomplete => counted,
            Repair::Leaks => counted.map(|counted| counted.min(references)),
            Repair::All if self.incomplete => Some(counted.unwrap_or(0).max(references)),
            Repair::All => Some(references),
        }
    }
}

/// Which way counts are corrected.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Up,
    Down,
}

/// Corrects counts in the blocks that have wrong ones. Synced. Returns how many, and the runs that became free.
pub async fn correct(
    image: &mut Image<'_>,
    refs: &References,
    disk: &mut Disk,
    found: &mut Found,
    differences: &Differences,
    way: Way,
) -> Result<(u64, Vec<Range<u64>>), Error> {
    let (order, max, mut corrected, mut freed) = (image.header.refcount_order, disk.max(), 0, Vec::new());
    for index in differences.blocks.iter().copied() {
        let (Block::At(offset), Some(bytes)) = (disk.block(index), disk.bytes(image, index).await?) else {
            continue;
        };
        let (mut block, first, before) = (bytes.to_vec(), index * disk.per_block(), corrected);
        for at in 0..disk.per_block() {
            let (count, cluster) = (get_count(&bytes, order, at), first + at);
            let reference = refs.counts.get(cluster).min(max);
            if (way == Way::Up && count < reference) || (way == Way::Down && count > reference) {
                found.say(format_args!(
                    "Repairing cluster {cluster} refcount={count} reference={reference}"
                ));
                set_count(&mut block, order, at, reference);
                corrected += 1;
                if reference == 0 {
                    free(&mut freed, cluster);
                }
            }
        }
        if corrected > before {
            image.write(offset, &block).await?;
            disk.replace(index, block);
        }
    }
    if corrected > 0 {
        image.sync().await?;
    }
    Ok((corrected, freed))
}

fn free(freed: &mut Vec<Range<u64>>, cluster: u64) {
    let room = freed.len() < FREED;
    match freed.last_mut() {
        Some(run) if run.end == cluster => run.end += 1,
        _ if room => freed.push(cluster..cluster + 1),
        _ => {}
    }
}

/// Gives the space of clusters back that nothing names. A file system that cannot do that keeps it.
pub async fn punch(image: &Image<'_>, freed: Vec<Range<u64>>) {
    for run in freed {
        let (start, len) = (
            run.start * image.cluster_size(),
            (run.end - run.start) * image.cluster_size(),
        );
        if start < image.len
            && image
                .file
                .punch_hole(start, len.min(image.len - start))
                .await
                .is_err()
        {
            return;
        }
    }
}

/// Builds a new refcount structure, and a new snapshot table where there is one to write, and switches to them.
/// Returns `false` where it would not fit.
pub async fn rebuild(
    image: &mut Image<'_>,
    refs: &mut References,
    disk: &mut Disk,
    aim: Aim,
    snapshots: (u64, Option<Vec<u8>>),
) -> Result<bool, Error> {
    // What lies behind the last reference is only counted; but what is counted may be all that is left of something.
    // References may reach behind the end of the file, less than a cluster.
    let used = refs.counts.highest().map_or(0, |last| last + 1);
    let start = if refs.incomplete {
        used.max(image.len.div_ceil(image.cluster_size()))
    } else {
        used
    };
    let (old_len, new) = snapshots;
    let cluster_size = image.cluster_size();
    let new_clusters = new
        .as_ref()
        .map_or(0, |new| (new.len() as u64).div_ceil(cluster_size));
    disk.unmark(image, refs);
    if new.is_some() {
        let old = image.header.snapshots_offset;
        for cluster in old / cluster_size..(old + old_len).div_ceil(cluster_size) {
            refs.counts.remove(cluster);
        }
    }
    let mut blocks: BTreeSet<u64> = needed(refs, disk.per_block()).into_iter().collect();
    if aim.incomplete {
        blocks.extend(disk.readable());
    }
    let Some((own, table_clusters)) = lay_out(image, disk, &mut blocks, start, new_clusters) else {
        return Ok(false);
    };
    for cluster in own.clone() {
        let for_what = match cluster - start {
            n if n < new_clusters => Use::SnapshotTable,
            n if n < new_clusters + table_clusters => Use::RefcountTable,
            _ => Use::RefcountBlock,
        };
        refs.counts.add(cluster, 1, for_what);
    }
    write_blocks(image, refs, disk, aim, &blocks, own.end).await?;
    let table_offset = (start + new_clusters) * cluster_size;
    let mut table = vec![0; (table_clusters * cluster_size) as usize];
    let first_block = own.end - blocks.len() as u64;
    for (index, cluster) in blocks.iter().zip(first_block..) {
        table[*index as usize * 8..][..8].copy_from_slice(&(cluster * cluster_size).to_be_bytes());
    }
    image.write(table_offset, &table).await?;
    if let Some(mut new) = new {
        new.resize((new_clusters * cluster_size) as usize, 0);
        image.write(start * cluster_size, &new).await?;
        image.header.snapshots_offset = start * cluster_size;
    }
    image.sync().await?;
    image.header.refcount_table_offset = table_offset;
    image.header.refcount_table_clusters = table_clusters as u32;
    image.write_tables().await?;
    image.len = image.len.max(own.end * cluster_size);
    *disk = Disk::reload(image).await?;
    Ok(true)
}

/// Finds the clusters of table and blocks: blocks for themselves, too. Returns all new clusters and those of the table.
fn lay_out(
    image: &Image<'_>,
    disk: &Disk,
    blocks: &mut BTreeSet<u64>,
    start: u64,
    others: u64,
) -> Option<(Range<u64>, u64)> {
    loop {
        let table = (blocks.last().map_or(1, |last| last + 1) * 8).div_ceil(image.cluster_size());
        if table * image.cluster_size() > MAX_REFTABLE_BYTES {
            return None;
        }
        let own = start..start + others + table + blocks.len() as u64;
        let before = blocks.len();
        blocks.extend(own.start / disk.per_block()..=(own.end - 1) / disk.per_block());
        if blocks.len() == before {
            return Some((own, table));
        }
    }
}

async fn write_blocks(
    image: &mut Image<'_>,
    refs: &References,
    disk: &mut Disk,
    aim: Aim,
    blocks: &BTreeSet<u64>,
    end: u64,
) -> Result<(), Error> {
    let (order, per_block) = (image.header.refcount_order, disk.per_block());
    let first_block = end - blocks.len() as u64;
    for (index, cluster) in blocks.iter().copied().zip(first_block..) {
        let mut block = vec![0; image.cluster_size() as usize];
        if aim.incomplete
            && let Ok(Some(old)) = disk.bytes(image, index).await
        {
            block.copy_from_slice(&old);
        }
        let first = index * per_block;
        for cluster in refs.counts.referenced(first..first + per_block) {
            let counted = get_count(&block, order, cluster - first);
            let count = aim.count(Some(counted), refs.counts.get(cluster)).unwrap_or(0);
            set_count(&mut block, order, cluster - first, count);
        }
        image.write(cluster * image.cluster_size(), &block).await?;
    }
    Ok(())
}

/// Looks at the COPIED flags of the active tables, and mends entries of all tables where the aim is to.
pub struct Flags<'a> {
    pub aim: Aim,
    /// Flags are set right, not only looked at.
    pub repair: bool,
    pub refs: &'a References,
    pub disk: &'a mut Disk,
    pub found: &'a mut Found,
    /// Guest data lies in a file of its own.
    pub external: bool,
    /// Flags that can only be set when the counts were lowered.
    pub later: u64,
}

impl Flags<'_> {
    /// The whole round. Synced where it wrote.
    pub async fn go(&mut self, image: &mut Image<'_>, progress: &mut Progress<'_>) -> Result<(), Error> {
        let written = image.writes;
        for l1 in &self.refs.l1s {
            if l1.for_what == Use::L1 || self.aim.repair == Repair::All {
                self.l1(image, *l1).await?;
            }
        }
        let all = self.aim.repair == Repair::All;
        let tables = self.refs.tables.iter();
        let tables = tables.filter(|(_, table)| table.active.is_some() || (all && table.mend));
        let offsets: Vec<u64> = tables.map(|(offset, _)| *offset).collect();
        for (first, n) in runs(offsets.into_iter(), image.cluster_size()) {
            progress.step(n);
            let size = image.cluster_size() as usize;
            // What cannot be read was told before.
            if let Ok(bytes) = read_at(image.file, first, n as usize * size).await {
                for (offset, table) in (first..).step_by(size).zip(bytes.chunks(size)) {
                    self.table(image, offset, table).await?;
                }
            }
        }
        if image.writes != written {
            image.sync().await?;
        }
        Ok(())
    }

    async fn l1(&mut self, image: &mut Image<'_>, l1: L1) -> Result<(), Error> {
        let L1 { offset, for_what, .. } = l1;
        let size = image.cluster_size();
        let end = offset + u64::from(l1.entries) * 8;
        for start in (offset..end.min(image.len)).step_by(size as usize) {
            let Ok(mut bytes) = read_at(image.file, start, size as usize).await else {
                continue;
            };
            let (mut changed, mut fixed) = (false, Mended::default());
            let used = ((end - start).min(size) / 8) as usize;
            for (i, bytes) in bytes.chunks_exact_mut(8).take(used).enumerate() {
                let word = u64::from_be_bytes((&*bytes).try_into().expect("eight bytes"));
                let index = (start - offset) / 8 + i as u64;
                let (new, n) = self.l1_entry(image, word, index, for_what).await;
                fixed += n;
                changed |= new != word;
                bytes.copy_from_slice(&new.to_be_bytes());
            }
            if changed && self.refs.counts.used_for(start / size) == for_what {
                image.write(start, &bytes).await?;
                self.found.mended(fixed);
            }
        }
        Ok(())
    }

    /// What becomes of an L1 entry, and the findings that fixes.
    async fn l1_entry(&mut self, image: &Image<'_>, word: u64, index: u64, for_what: Use) -> (u64, Mended) {
        let offset = word & L1E_OFFSET_MASK;
        let (mut new, mut fixed) = (word, Mended::default());
        if self.aim.repair == Repair::All && mend_l1(word) != word {
            new = mend_l1(word);
            fixed.corruptions += 1;
        }
        if offset == 0 || for_what != Use::L1 || !image.is_aligned(offset) {
            return (new, fixed);
        }
        let what = format_args!("L2 cluster: l1_index={index} l1_entry={word:x}").to_string();
        let (aim, now) = self.counts(image, offset >> image.header.cluster_bits).await;
        let (flag, more) = self.judge(aim, aim == now, word & COPIED, &what);
        fixed += more;
        (new & !COPIED | flag, fixed)
    }

    async fn table(&mut self, image: &mut Image<'_>, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let rules = Rules::of(image);
        let Some(table) = self.refs.tables.get(&offset).copied() else {
            return Ok(());
        };
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        let (mut new, mut fixed) = (bytes.to_vec(), Mended::default());
        for (index, entry) in rules.entries(bytes).enumerate() {
            let mut mended = entry;
            if self.aim.repair == Repair::All {
                let (entry, n) = rules.mended(entry);
                mended = entry;
                fixed.corruptions += n;
            }
            if table.active.is_some()
                && let Cluster::Mapped { offset, .. } = rules.cluster(mended)
            {
                let flag = mended.word & COPIED;
                let (flag, more) = if rules.codec.external {
                    self.judge(
                        Some(1),
                        true,
                        flag,
                        &format!("data cluster: l2_entry={:x}", mended.word),
                    )
                } else {
                    let cluster = offset >> image.header.cluster_bits;
                    // Most flags are right: no text is made for those.
                    let (aim, now) = self.counts(image, cluster).await;
                    if aim.is_none_or(|count| (count == 1) == (flag != 0)) {
                        (flag, Mended::default())
                    } else {
                        let what = format!("data cluster: l2_entry={:x}", mended.word);
                        self.judge(aim, aim == now, flag, &what)
                    }
                };
                mended.word = mended.word & !COPIED | flag;
                fixed += more;
            }
            if mended != entry {
                rules.put(&mut new, index, mended);
            }
        }
        if new != bytes && self.refs.counts.used_for(offset >> image.header.cluster_bits) == Use::L2 {
            image.write(offset, &new).await?;
            self.found.mended(fixed);
        }
        Ok(())
    }

    /// The count that the repair is after, and the one in the file.
    async fn counts(&mut self, image: &Image<'_>, cluster: u64) -> (Option<u64>, Option<u64>) {
        let now = self.disk.get(image, cluster).await;
        (self.aim.count(now, self.refs.counts.get(cluster)), now)
    }

    /// What becomes of a flag, and the findings that fixes. `settled`: the file has the count already.
    ///
    /// A flag that is missing costs a needless copy and harms nothing, so it counts as a leak: a snapshot that was cut
    /// short leaves such ones, since flags and counts lie in different clusters. Not so with a data file, where nothing
    /// may move.
    fn judge(&mut self, count: Option<u64>, settled: bool, flag: u64, what: &str) -> (u64, Mended) {
        let Some(count) = count else {
            return (flag, Mended::default());
        };
        let wanted = if count == 1 { COPIED } else { 0 };
        if wanted == flag {
            return (flag, Mended::default());
        }
        if self.repair && wanted != 0 && !settled {
            self.later += 1;
            return (flag, Mended::default());
        }
        let leak = wanted != 0 && !self.external;
        let verb = match (self.repair, leak) {
            (true, _) => "Repairing",
            (false, true) => "Leaked",
            (false, false) => "ERROR",
        };
        let text = format_args!("{verb} OFLAG_COPIED {what} refcount={count}");
        let mended = if leak {
            self.found.leak(text);
            Mended {
                leaks: 1,
                ..Mended::default()
            }
        } else {
            self.found.corruption(text);
            Mended {
                corruptions: 1,
                ..Mended::default()
            }
        };
        if self.repair {
            (wanted, mended)
        } else {
            (flag, Mended::default())
        }
    }
}
