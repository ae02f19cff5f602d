//! What an L1 table names, directly and through its L2 tables.
//!
//! Each L1 table (the active one, a snapshot's) that reaches a cluster counts once in the cluster's refcount: L2 tables
//! and data alike, compressed data by the clusters that it touches. So a snapshot raises all counts of the active tree,
//! and a table that leaves lowers all of its own.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use zbdkit_io::File;
use zbdkit_spec::qcow2::{L1E_OFFSET_MASK, L1E_RESERVED_MASK, MAX_L1_BYTES};

use crate::compress;
use crate::error::Error;
use crate::header::Header;
use crate::image::{Qcow2, read_at, words};
use crate::l2::{COPIED, Codec, Entry};
use crate::refcounts::Refcounts;

/// Reads the tables of an image.
#[derive(Clone)]
pub struct Tables {
    file: File,
    cluster_bits: u32,
    refcount_bits: u32,
    codec: Codec,
}

/// Clusters of the file, and how often they are named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The clusters.
    pub clusters: Range<u64>,
    /// Each of them so often.
    pub times: i64,
}

/// What is to become of the counts of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Somebody else names all of it too: counts rise by one for each reference.
    Shared,
    /// Nobody names it this way any more: counts fall.
    Dropped,
}

/// Clusters that no L1 table may reach.
pub struct Fixed<'a> {
    /// Knows all metadata, L2 tables too, which are no data.
    image: &'a Qcow2,
    /// Metadata other than L2 tables, sorted.
    clusters: Vec<Range<u64>>,
}

impl<'a> Fixed<'a> {
    /// Puts ranges in order, however many there are and wherever they overlap.
    pub fn new(image: &'a Qcow2, mut clusters: Vec<Range<u64>>) -> Fixed<'a> {
        clusters.sort_unstable_by_key(|run| run.start);
        let mut sorted: Vec<Range<u64>> = Vec::new();
        for run in clusters {
            match sorted.last_mut() {
                Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
                _ => sorted.push(run),
            }
        }
        Fixed {
            image,
            clusters: sorted,
        }
    }

    fn contains(&self, cluster: u64) -> bool {
        let after = self.clusters.partition_point(|run| run.start <= cluster);
        after > 0 && self.clusters[after - 1].contains(&cluster)
    }

    /// What L2 entries name, none of it metadata.
    pub fn check(&self, tables: &Tables, entries: &[Entry]) -> Result<Vec<Run>, Error> {
        let runs = tables.runs(entries)?;
        for run in &runs {
            let first = run.clusters.start << tables.cluster_bits;
            let len = (run.clusters.end - run.clusters.start) << tables.cluster_bits;
            if let Some(place) = self.image.overlap(first, len) {
                return Err(Error::Corrupt(format!("data is mapped to {place}")));
            }
        }
        Ok(runs)
    }
}

impl Tables {
    /// The tables of the image with this header.
    pub fn new(file: &File, header: &Header) -> Tables {
        Tables {
            file: file.clone(),
            cluster_bits: header.cluster_bits,
            refcount_bits: header.refcount_bits(),
            codec: Codec {
                extended: header.extended_l2(),
                external: header.external_data(),
            },
        }
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// How entries are read.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// The clusters that `len` bytes touch.
    pub fn clusters_of(&self, offset: u64, len: u64) -> Range<u64> {
        offset >> self.cluster_bits..offset.saturating_add(len).div_ceil(self.cluster_size())
    }

    /// Reads an L1 table of a snapshot.
    pub async fn l1(&self, offset: u64, entries: u32) -> Result<Vec<u64>, Error> {
        let len = u64::from(entries) * 8;
        if len > MAX_L1_BYTES {
            return Err(Error::Invalid(format!(
                "Snapshot L1 table too large: {entries} entries, at most {} are allowed",
                MAX_L1_BYTES / 8
            )));
        }
        if !offset.is_multiple_of(self.cluster_size()) || offset.checked_add(len).is_none() {
            return Err(Error::Invalid(format!(
                "Snapshot L1 table offset invalid: {offset:#x} is not where a cluster of {} bytes begins",
                self.cluster_size()
            )));
        }
        let bytes = read_at(&self.file, offset, len as usize).await?;
        Ok(words(&bytes).collect())
    }

    /// Where an entry of an L1 table says that its L2 table lies.
    pub fn l2_offset(&self, l1: &[u64], index: usize) -> Result<Option<u64>, Error> {
        let entry = l1[index];
        let offset = entry & L1E_OFFSET_MASK;
        if entry & L1E_RESERVED_MASK != 0 || !offset.is_multiple_of(self.cluster_size()) {
            return Err(Error::Corrupt(format!(
                "entry {index} of an L1 table is {entry:#x}, which names no cluster"
            )));
        }
        Ok((offset != 0).then_some(offset))
    }

    /// Reads an L2 table.
    pub async fn l2(&self, offset: u64) -> Result<Vec<Entry>, Error> {
        let bytes = read_at(&self.file, offset, self.cluster_size() as usize).await?;
        let words: Vec<u64> = words(&bytes).collect();
        let entry = |words: &[u64]| Entry {
            word: words[0],
            bitmap: words.get(1).copied().unwrap_or(0),
        };
        Ok(words.chunks_exact(self.codec.words()).map(entry).collect())
    }

    /// The bytes of an L2 table.
    pub fn l2_bytes(&self, entries: &[Entry]) -> Vec<u8> {
        let words = entries
            .iter()
            .flat_map(|entry| [entry.word, entry.bitmap].into_iter().take(self.codec.words()));
        words.flat_map(u64::to_be_bytes).collect()
    }

    /// The clusters of the image that an L2 entry names; none where data lies in a file of its own.
    pub fn named(&self, entry: Entry) -> Result<Range<u64>, Error> {
        if entry.is_compressed() {
            if self.codec.external {
                return Err(Error::Corrupt(format!(
                    "an L2 entry is {:#x}, a compressed cluster, but data lies in a file of its own",
                    entry.word
                )));
            }
            let (offset, len) = compress::descriptor(entry.word, self.cluster_bits);
            return Ok(self.clusters_of(offset, len));
        }
        if self.codec.external {
            return Ok(0..0);
        }
        let offset = entry.offset();
        if !offset.is_multiple_of(self.cluster_size()) {
            return Err(Error::Corrupt(format!(
                "an L2 entry is {:#x}, which names no cluster",
                entry.word
            )));
        }
        let first = offset >> self.cluster_bits;
        Ok(first..first + u64::from(offset != 0))
    }

    /// All that L2 entries name, sorted.
    pub fn runs(&self, entries: &[Entry]) -> Result<Vec<Run>, Error> {
        let mut clusters = Vec::new();
        for entry in entries {
            clusters.extend(self.named(*entry)?);
        }
        clusters.sort_unstable();
        let mut runs: Vec<Run> = Vec::new();
        for same in clusters.chunk_by(|a, b| a == b) {
            let (cluster, times) = (same[0], same.len() as i64);
            match runs.last_mut() {
                Some(run) if run.clusters.end == cluster && run.times == times => run.clusters.end += 1,
                _ => runs.push(Run {
                    clusters: cluster..cluster + 1,
                    times,
                }),
            }
        }
        Ok(runs)
    }

    /// Looks at a whole tree before its counts change: every table and entry makes sense, every cluster that it names is
    /// counted and holds no metadata, and the counts can change as said. Whether any entry has the flag COPIED.
    ///
    /// # Errors
    /// [`Error::Corrupt`]; [`Error::Refused`] where a count would not fit.
    pub async fn survey(
        &self,
        refcounts: &mut Refcounts,
        l1: &[u64],
        change: Change,
        fixed: &Fixed<'_>,
    ) -> Result<bool, Error> {
        let mut counts = Headroom::new(self, change, refcounts.max());
        let (mut copied, mut seen) = (false, HashSet::new());
        for index in 0..l1.len() {
            let Some(offset) = self.l2_offset(l1, index)? else {
                continue;
            };
            let cluster = offset >> self.cluster_bits;
            if !seen.insert(cluster) {
                return Err(Error::Corrupt(format!(
                    "an L1 table names the L2 table at {offset:#x} twice"
                )));
            }
            if fixed.contains(cluster) {
                return Err(Error::Corrupt(format!(
                    "an L1 table names an L2 table at {offset:#x}, where other metadata lies"
                )));
            }
            counts.see(refcounts, cluster, 1).await?;
            let entries = self.l2(offset).await?;
            copied |= entries.iter().any(|entry| uncopied(*entry) != *entry);
            for run in fixed.check(self, &entries)? {
                for cluster in run.clusters {
                    counts.see(refcounts, cluster, run.times as u64).await?;
                }
            }
        }
        Ok(copied)
    }

    /// Raises the counts of a whole tree. Reaches the kernel; not synced.
    pub async fn raise(&self, refcounts: &mut Refcounts, l1: &[u64]) -> Result<(), Error> {
        for index in 0..l1.len() {
            let Some(offset) = self.l2_offset(l1, index)? else {
                continue;
            };
            let entries = self.l2(offset).await?;
            for run in self.runs(&entries)? {
                refcounts.add(run.clusters, run.times).await?;
            }
            refcounts.add(self.clusters_of(offset, 1), 1).await?;
        }
        Ok(())
    }
}

/// Whether counts have room for what a tree adds to them, or hold what it takes away.
struct Headroom<'a> {
    tables: &'a Tables,
    change: Change,
    max: u64,
    /// References so far, of those clusters where one tree alone could go past the limits.
    seen: HashMap<u64, u64>,
}

impl<'a> Headroom<'a> {
    fn new(tables: &'a Tables, change: Change, max: u64) -> Headroom<'a> {
        Headroom {
            tables,
            change,
            max,
            seen: HashMap::new(),
        }
    }

    /// The tree names the cluster so many times (more).
    async fn see(&mut self, refcounts: &mut Refcounts, cluster: u64, times: u64) -> Result<(), Error> {
        let count = refcounts.get(cluster).await?;
        // Where all is well, a tree has no more references than are counted; then only clusters whose count could not
        // double can go past the limit, and no others are remembered.
        let total = match self.change {
            Change::Shared if count >= times && count <= self.max / 2 => return Ok(()),
            Change::Dropped if times == 1 && count > 0 => return Ok(()),
            _ => {
                let seen = self.seen.entry(cluster).or_insert(0);
                *seen += times;
                *seen
            }
        };
        if count < total {
            return Err(Error::Corrupt(format!(
                "the refcount of cluster {cluster} is {count}, but it is named {total} times"
            )));
        }
        if self.change == Change::Shared && total > self.max - count {
            return Err(self.saturated(cluster, count));
        }
        Ok(())
    }

    fn saturated(&self, cluster: u64, count: u64) -> Error {
        let bits = self.tables.refcount_bits;
        Error::Refused(format!(
            "this image has refcounts of {bits} bit{}, which count to {}, and cluster {cluster} is in use {count} time{} \
             already: delete a snapshot, or widen the refcounts with `qemu-img amend -o refcount_bits=16`",
            if bits == 1 { "" } else { "s" },
            self.max,
            if count == 1 { "" } else { "s" },
        ))
    }
}

/// The entry without the flag COPIED, which compressed clusters do not have.
pub fn uncopied(entry: Entry) -> Entry {
    if entry.is_compressed() {
        return entry;
    }
    Entry {
        word: entry.word & !COPIED,
        ..entry
    }
}
