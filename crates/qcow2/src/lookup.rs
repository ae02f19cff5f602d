//! Where bytes of the device lie: in the cache, or in the tables of the file.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use zbdkit_spec::qcow2::L1E_OFFSET_MASK;

use crate::error::Error;
use crate::image::{Access, Extent, Mapping, Qcow2, Resolved, Run};
use crate::l2::{Entries, Entry, Kind, SUBCLUSTERS};
use crate::sectors::{read_at, words};

impl Qcow2 {
    /// Where a range lies, as far as that is known without I/O and is one run of ordinary clusters; to be written, they
    /// must be this image's alone.
    pub fn resolve(&self, offset: u64, len: u64, access: Access) -> Option<Resolved<'_>> {
        if access == Access::Write && (self.read_only || self.check_failed().is_err()) {
            return None;
        }
        // Before the look: whoever frees the clusters after it waits for us.
        let pin = self.grace.pin();
        let (key, index) = self.l2.locate(offset >> self.cluster_bits);
        let view = self.l2.get(key)?;
        let run = self.run_in(view.entries(), index, offset, len)?;
        let usable = run.kind == Kind::Data
            && run.len >= len
            && self.is_place(run.entry)
            && (access == Access::Read || run.entry.is_copied());
        drop(view);
        if !usable || (access == Access::Write && self.overlap(run.offset, len).is_some()) {
            return None;
        }
        Some(Resolved {
            file: self.data_file(),
            offset: run.offset,
            pin,
        })
    }

    /// Why data cannot lie in a range of its file: it holds metadata, or the file has no such place.
    pub(crate) fn overlap(&self, offset: u64, len: u64) -> Option<String> {
        let end = self
            .end
            .load(Ordering::Relaxed)
            .next_multiple_of(self.cluster_size());
        if offset.checked_add(len).is_none_or(|past| past > end) {
            return Some(format!("{offset:#x}, past the end of the file ({end:#x})"));
        }
        if self.data.is_some() {
            return None;
        }
        let metadata = self.metadata.read().unwrap_or_else(PoisonError::into_inner);
        let first = offset >> self.cluster_bits;
        let hit = metadata.within(&(first..((offset + len.max(1) - 1) >> self.cluster_bits) + 1))?;
        Some(format!("cluster {hit} of the file, which holds metadata"))
    }

    /// The run of clusters that are mapped alike from `offset` on, within a slice. `None` for an empty range.
    pub(crate) fn run_in(&self, entries: Entries<'_>, index: usize, offset: u64, len: u64) -> Option<Run> {
        let unit_bits = self.unit_bits();
        let cluster_mask = self.cluster_size() - 1;
        let entry = entries.get(index);
        let subcluster = |at: u64| (at & cluster_mask) >> unit_bits;
        let kind = self.codec.kind(entry, subcluster(offset));
        let host = entry.offset().wrapping_add(offset & cluster_mask);
        let end = offset.checked_add(len)?;
        let mut at = (offset >> unit_bits << unit_bits) + (1 << unit_bits);
        while at < end {
            let next = index + ((at >> self.cluster_bits) - (offset >> self.cluster_bits)) as usize;
            if next >= entries.len() {
                break;
            }
            let other = entries.get(next);
            let same_place = match kind {
                Kind::Data => {
                    other.is_copied() == entry.is_copied()
                        && other.offset().wrapping_add(at & cluster_mask) == host.wrapping_add(at - offset)
                }
                Kind::Compressed => next == index,
                // Those that keep space and those that do not are told apart.
                Kind::Zero => self.codec.has_cluster(other) == self.codec.has_cluster(entry),
                Kind::Unallocated | Kind::Invalid => true,
            };
            if self.codec.kind(other, subcluster(at)) != kind || !same_place {
                break;
            }
            at += 1 << unit_bits;
        }
        Some(Run {
            len: at.min(end) - offset,
            kind,
            entry,
            offset: host,
        })
    }

    fn unit_bits(&self) -> u32 {
        if self.codec.extended {
            self.cluster_bits - SUBCLUSTERS.ilog2()
        } else {
            self.cluster_bits
        }
    }

    /// As [`Qcow2::run_in`], reading the table if it must be.
    pub(crate) async fn run(&self, offset: u64, len: u64) -> Result<Run, Error> {
        let cluster = offset >> self.cluster_bits;
        let (key, index) = self.l2.locate(cluster);
        loop {
            if let Some(view) = self.l2.get(key)
                && let Some(run) = self.run_in(view.entries(), index, offset, len)
            {
                let run_checked = self.check_run(run, offset);
                return run_checked;
            }
            if !self.load(cluster).await? {
                // No table: as far as it would reach.
                let table = 1u64 << (self.cluster_bits + self.l2_bits);
                return Ok(Run {
                    len: len.min(table - offset % table),
                    kind: Kind::Unallocated,
                    entry: Entry::default(),
                    offset: 0,
                });
            }
        }
    }

    /// Whether a cluster can lie where the entry says.
    pub(crate) fn is_place(&self, entry: Entry) -> bool {
        entry.offset() & (self.cluster_size() - 1) == 0
    }

    /// That the file can hold what the entry names.
    fn check_run(&self, run: Run, at: u64) -> Result<Run, Error> {
        let broken = match run.kind {
            Kind::Data => !self.is_place(run.entry),
            // Version 2 has no such entries: the bit is one of an offset, and the offset is wrong.
            Kind::Zero => self.version < 3,
            Kind::Invalid => true,
            Kind::Unallocated | Kind::Compressed => false,
        };
        if broken {
            return Err(Error::Corrupt(format!(
                "the mapping at {at:#x} of the device is {:#x}, which is no cluster",
                run.entry.word
            )));
        }
        Ok(run)
    }

    /// Brings a cluster's slice into the cache; `false` where there is no table for it.
    async fn load(&self, cluster: u64) -> Result<bool, Error> {
        let (key, _) = self.l2.locate(cluster);
        // The table may be replaced, and must not serve something else while we read it.
        let _pin = self.grace.pin();
        let version = self.l2.version(key);
        let Some(table) = self.table_of(cluster)? else {
            return Ok(false);
        };
        let words = self.read_slice(table, key).await?;
        // Where it changed meanwhile, the caller tries again.
        self.l2.insert(key, words, version);
        Ok(true)
    }

    /// Where the L2 table for a cluster lies.
    pub(crate) fn table_of(&self, cluster: u64) -> Result<Option<u64>, Error> {
        let entry = self.l1_entry(cluster);
        let offset = entry & L1E_OFFSET_MASK;
        if offset & (self.cluster_size() - 1) != 0 {
            return Err(Error::Corrupt(format!(
                "L1 entry {} is {entry:#x}, which is no cluster",
                cluster >> self.l2_bits
            )));
        }
        Ok((offset != 0).then_some(offset))
    }

    /// The words of a slice as the file has them.
    pub(crate) async fn read_slice(&self, table: u64, key: u64) -> Result<Box<[u64]>, Error> {
        let slices = (1u64 << self.l2_bits) / self.l2.entries();
        let offset = table + (key % slices) * self.l2.slice_bytes();
        let bytes = read_at(&self.file, offset, self.l2.slice_bytes() as usize).await?;
        Ok(words(&bytes).collect())
    }

    /// The first run of a range that is mapped alike.
    pub async fn map(&self, offset: u64, len: u64) -> Result<Extent, Error> {
        self.check(offset, len)?;
        let mut run = self.run(offset, len).await?;
        let mapping = match run.kind {
            Kind::Data => Mapping::Data { offset: run.offset },
            Kind::Zero => Mapping::Zero {
                offset: self.codec.has_cluster(run.entry).then_some(run.offset),
            },
            Kind::Unallocated => Mapping::Unallocated,
            Kind::Compressed | Kind::Invalid => Mapping::Compressed,
        };
        if matches!(mapping, Mapping::Zero { offset: Some(_) }) {
            // Zeros need not lie in one piece.
            run.len = run.len.min(self.cluster_size() - offset % self.cluster_size());
        }
        Ok(Extent {
            len: run.len,
            mapping,
        })
    }
}
