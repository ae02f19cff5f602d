//! Following what refers to clusters: L1 and L2 tables. Each table is read once, however often it is referred to, so
//! that the work follows the length of the file and no number in it.

use std::collections::BTreeMap;

use zbdkit_spec::qcow2::{L1E_OFFSET_MASK, L1E_RESERVED_MASK};

use super::counts::{Counts, Use};
use super::entries::{Cluster, Rules};
use super::found::Found;
use super::{Image, Progress};
use crate::error::Error;
use crate::image::read_at;

/// Entries of an L1 or bitmap table that are read at once.
const WORDS: u64 = 8192;
/// Bytes of L2 tables that are read at once.
const RUN: u64 = 1 << 20;
/// More clusters than anything but data has.
const MANY: u64 = 1 << 26;

/// Everything that refers to clusters.
#[derive(Default)]
pub struct References {
    pub counts: Counts,
    /// L2 tables by their offset.
    pub tables: BTreeMap<u64, Table>,
    /// L1 tables that a repair has to look at: the active one, and those that it can mend.
    pub l1s: Vec<L1>,
    /// Something named clusters that could not be told: which ones nothing refers to is not known.
    pub incomplete: bool,
}

/// An L1 table.
#[derive(Clone, Copy)]
pub struct L1 {
    /// Where it lies, bytes.
    pub offset: u64,
    pub entries: u32,
    /// [`Use::L1`] or [`Use::SnapshotL1`].
    pub for_what: Use,
}

/// What marking bytes as used came upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marked {
    /// Nothing else.
    Alone,
    /// Another use of some of them.
    Shared,
    /// The end of the file: none were marked.
    Outside,
}

/// What refers to an L2 table.
#[derive(Clone, Copy, Default)]
pub struct Table {
    pub references: u32,
    /// Where in the active L1 table.
    pub active: Option<u32>,
    /// It has entries that a repair can mend.
    pub mend: bool,
}

impl References {
    /// Notes that bytes of the file are used.
    pub fn mark(
        &mut self,
        image: &Image<'_>,
        found: &mut Found,
        (offset, len): (u64, u64),
        times: u32,
        for_what: Use,
    ) -> Marked {
        if len == 0 {
            return Marked::Alone;
        }
        let last = offset.saturating_add(len - 1) >> image.header.cluster_bits;
        let first = offset >> image.header.cluster_bits;
        // The rest of a last cluster that nobody wrote to may be missing.
        let past = offset.saturating_add(len).saturating_sub(image.len);
        if past >= image.cluster_size() || last - first > MANY {
            found.corruption(format_args!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
                 offset {offset:#x} size {len:#x}"
            ));
            self.incomplete = true;
            return Marked::Outside;
        }
        let mut marked = Marked::Alone;
        for cluster in first..=last {
            if let Some(other) = self.counts.add(cluster, times, for_what) {
                marked = Marked::Shared;
                let (one, other) = (other.name(), for_what.name());
                if one == other {
                    found.corruption(format_args!("ERROR cluster {cluster} holds {one} twice"));
                } else {
                    found.corruption(format_args!("ERROR cluster {cluster} holds {one} and {other}"));
                }
                if matches!(for_what, Use::SnapshotL1 | Use::Bitmap) {
                    // There may be many of them on one place, and they are not followed.
                    self.incomplete = true;
                    break;
                }
            }
        }
        marked
    }

    /// Notes an L1 table and the L2 tables that it names.
    pub async fn l1(&mut self, image: &Image<'_>, found: &mut Found, l1: L1) {
        let L1 { offset, for_what, .. } = l1;
        let (active, entries) = (for_what == Use::L1, u64::from(l1.entries));
        let marked = self.mark(image, found, (offset, entries * 8), 1, for_what);
        if marked != Marked::Alone && !active {
            // Read once each: tables that lie on each other could be many.
            self.incomplete = true;
            return;
        }
        let mut mend = active;
        let mut at = 0;
        while at < entries && offset + at * 8 < image.len {
            let n = WORDS.min(entries - at);
            let words = match image.words(offset + at * 8, n).await {
                Ok(words) => words,
                Err(e) => {
                    found.error(format_args!("ERROR: I/O error in check_refcounts_l1: {e}"));
                    self.incomplete = true;
                    return;
                }
            };
            for (i, word) in words.into_iter().enumerate() {
                let index = active.then_some((at + i as u64) as u32);
                if word != 0 {
                    if mend_l1(word) != word {
                        mend = true;
                        found.corruption(format_args!(
                            "ERROR found L1 entry with reserved bits set: {word:x}"
                        ));
                    }
                    self.l1_entry(image, found, word, index);
                }
            }
            at += n;
        }
        if mend {
            self.l1s.push(l1);
        }
    }

    fn l1_entry(&mut self, image: &Image<'_>, found: &mut Found, word: u64, index: Option<u32>) {
        let offset = word & L1E_OFFSET_MASK;
        if offset == 0 {
            return;
        }
        if !image.is_aligned(offset) {
            found.corruption(format_args!(
                "ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
            ));
            self.incomplete = true;
            return;
        }
        // The messages are for each entry, the table is looked at once.
        self.mark(image, found, (offset, image.cluster_size()), 1, Use::L2);
        if offset < image.len {
            let table = self.tables.entry(offset).or_default();
            table.references = table.references.saturating_add(1);
            table.active = table.active.or(index);
        }
    }

    /// Notes the clusters that the L2 tables name. `repairing`: entries that can be mended will be.
    pub async fn l2(
        &mut self,
        image: &Image<'_>,
        found: &mut Found,
        repairing: bool,
        progress: &mut Progress<'_>,
    ) -> Result<(), Error> {
        let mut tables = std::mem::take(&mut self.tables);
        let rules = Rules::of(image);
        for (first, n) in runs(tables.keys().copied(), image.cluster_size()) {
            progress.step(n);
            let size = image.cluster_size();
            let bytes = match read_at(image.file, first, (n * size) as usize).await {
                Ok(bytes) => bytes,
                Err(e) => {
                    found.error(format_args!("ERROR: I/O error in check_refcounts_l2: {e}"));
                    self.incomplete = true;
                    continue;
                }
            };
            for (offset, bytes) in (first..).step_by(size as usize).zip(bytes.chunks(size as usize)) {
                if let Some(table) = tables.get_mut(&offset) {
                    self.table(image, found, rules, table, bytes, repairing);
                }
            }
        }
        self.tables = tables;
        Ok(())
    }

    fn table(
        &mut self,
        image: &Image<'_>,
        found: &mut Found,
        rules: Rules,
        table: &mut Table,
        bytes: &[u8],
        repairing: bool,
    ) {
        if bytes.iter().all(|byte| *byte == 0) {
            return;
        }
        let mut next = None;
        for (index, entry) in rules.entries(bytes).enumerate() {
            if entry.word == 0 && entry.bitmap == 0 {
                continue;
            }
            if !rules.judge(index, entry, repairing, found) {
                self.incomplete = true;
            }
            let (mended, findings) = rules.mended(entry);
            table.mend |= findings > 0;
            match rules.cluster(if repairing { mended } else { entry }) {
                Cluster::Nothing => {}
                Cluster::Compressed { offset, len } => {
                    if rules.codec.external || entry.bitmap != 0 {
                        continue;
                    }
                    if table.active.is_some() {
                        // Compressed clusters are read by themselves, as QEMU counts.
                        found.report.allocated_clusters += 1;
                        found.report.compressed_clusters += 1;
                        found.report.fragmented_clusters += 1;
                    }
                    self.mark(image, found, (offset, len), table.references, Use::Data);
                }
                Cluster::Mapped { offset, .. } => {
                    if let Some(l1_index) = table.active {
                        found.report.allocated_clusters += 1;
                        found.report.fragmented_clusters +=
                            u64::from(next.is_some_and(|next| next != offset));
                        next = Some(offset + image.cluster_size());
                        if rules.codec.external {
                            let of_table = u64::from(l1_index) * image.header.l2_entries();
                            external(image, found, of_table + index as u64, offset);
                        }
                    }
                    if !rules.codec.external {
                        let range = (offset, image.cluster_size());
                        self.mark(image, found, range, table.references, Use::Data);
                    }
                }
            }
        }
    }
}

/// What a repair makes of an L1 entry: what no reader looks at goes.
pub fn mend_l1(word: u64) -> u64 {
    if word & L1E_OFFSET_MASK == 0 {
        0
    } else {
        word & !L1E_RESERVED_MASK
    }
}

/// In an external data file each cluster lies where it lies in the device.
fn external(image: &Image<'_>, found: &mut Found, cluster: u64, offset: u64) {
    let expected = u128::from(cluster) << image.header.cluster_bits;
    if u128::from(offset) != expected {
        found.corruption(format_args!(
            "ERROR: External data file host cluster offset {offset:#x} does not match guest cluster offset: \
             {expected:#x}"
        ));
    }
}

/// Joins tables that lie behind each other: first offset and number.
pub fn runs(offsets: impl Iterator<Item = u64>, cluster_size: u64) -> Vec<(u64, u64)> {
    let most = (RUN / cluster_size).max(1);
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for offset in offsets {
        match runs.last_mut() {
            Some((first, n)) if *first + *n * cluster_size == offset && *n < most => *n += 1,
            _ => runs.push((offset, 1)),
        }
    }
    runs
}
