//! Changing the mapping: L2 entries, the tables that hold them, and the L1 entries that name those.

use std::ops::Range;
use std::sync::PoisonError;

use zbdkit_spec::qcow2::L1E_OFFSET_MASK;

use crate::compress;
use crate::error::Error;
use crate::image::{Meta, Qcow2, own_table, read_at, write_at};
use crate::l2::{COPIED, Entry};

/// Runs of clusters that wait to be freed before that is done, flush or not.
const MOST_PENDING: usize = 1 << 16;

impl Qcow2 {
    /// The entries of clusters of one slice.
    pub(crate) async fn entries(&self, range: Range<u64>) -> Result<Vec<Entry>, Error> {
        let (key, index) = self.l2.locate(range.start);
        let count = (range.end - range.start) as usize;
        loop {
            if let Some(view) = self.l2.get(key) {
                let entries = view.entries();
                return Ok((index..index + count).map(|at| entries.get(at)).collect());
            }
            // Brings the slice in.
            let run = self.run(range.start << self.cluster_bits, 1).await?;
            if run.entry == Entry::default() && self.table_of(range.start)?.is_none() {
                return Ok(vec![Entry::default(); count]);
            }
        }
    }

    /// Makes clusters of one slice from `first` on what `new` says, in the file and in the cache, and lets go of what
    /// they were.
    pub(crate) async fn set_entries(&self, meta: &mut Meta, first: u64, new: &[Entry]) -> Result<(), Error> {
        self.check_failed()?;
        let table = self.own_table_of(meta, first).await?;
        let (key, index) = self.l2.locate(first);
        let words = self.codec.words();
        let cached = self.l2.get(key).map(|view| {
            let entries = view.entries();
            (0..entries.len()).map(|at| entries.get(at)).collect::<Vec<_>>()
        });
        let mut slice = match cached {
            Some(entries) => entries,
            None => {
                let version = self.l2.version(key);
                let read = self.read_slice(table, key).await?;
                let entry = |words: &[u64]| Entry {
                    word: words[0],
                    bitmap: words.get(1).copied().unwrap_or(0),
                };
                let entries = read.chunks_exact(words).map(entry).collect();
                self.l2.insert(key, read, version);
                entries
            }
        };
        let old = slice[index..index + new.len()].to_vec();
        slice[index..index + new.len()].copy_from_slice(new);
        let bytes: Vec<u8> = slice
            .iter()
            .flat_map(|entry| {
                let both = [entry.word.to_be_bytes(), entry.bitmap.to_be_bytes()];
                both.into_iter().take(words).flatten()
            })
            .collect();
        let slices = (1u64 << self.l2_bits) / self.l2.entries();
        let base = table + (key % slices) * self.l2.slice_bytes();
        let changed = 8 * words * index..8 * words * (index + new.len());
        let written = self
            .change(self.sectors.write(&self.file, base, &bytes, changed))
            .await;
        if let Err(error) = written {
            // Some of the entries may be in the file: it decides. What either of them names stays counted.
            self.l2.forget_slice(key);
            return Err(error);
        }
        self.l2.update(key, index, new);
        for (old, new) in old.iter().zip(new) {
            if let Some(freed) = self.freed(*old, *new) {
                self.free_data(meta, freed);
            }
        }
        Ok(())
    }

    /// Changes the entries of whole clusters as `change` says, by the cluster's number and entry; `None` leaves one.
    pub(crate) async fn remap(
        &self,
        range: Range<u64>,
        mut change: impl FnMut(u64, Entry) -> Option<Entry>,
    ) -> Result<(), Error> {
        let mut at = range.start;
        while at < range.end {
            if self.l1_entry(at) & L1E_OFFSET_MASK == 0 && change(at, Entry::default()).is_none() {
                // No table, and none needed.
                at = ((at >> self.l2_bits) + 1) << self.l2_bits;
                continue;
            }
            let end = ((at | (self.l2.entries() - 1)) + 1).min(range.end);
            let _alone = self.ranges.lock(at..end).await;
            let old = self.entries(at..end).await?;
            let new: Vec<Entry> = (at..end)
                .zip(&old)
                .map(|(cluster, entry)| change(cluster, *entry).unwrap_or(*entry))
                .collect();
            let first = old.iter().zip(&new).position(|(old, new)| old != new);
            if let Some(first) = first {
                let last = old
                    .iter()
                    .zip(&new)
                    .rposition(|(old, new)| old != new)
                    .unwrap_or(first);
                let mut meta = self.lock().await;
                self.set_entries(&mut meta, at + first as u64, &new[first..=last])
                    .await?;
                if meta.pending.len() > MOST_PENDING {
                    self.reap(&mut meta).await?;
                }
            }
            at = end;
        }
        Ok(())
    }

    /// The clusters of the image's file that an entry held and its successor does not.
    fn freed(&self, old: Entry, new: Entry) -> Option<Range<u64>> {
        if old.is_compressed() {
            if new.word == old.word {
                return None;
            }
            self.forget_inflated();
            return Some(compress::clusters(old.word, self.cluster_bits));
        }
        let own = self.data.is_none() && self.codec.has_cluster(old) && self.is_place(old);
        let kept = self.codec.has_cluster(new) && new.offset() == old.offset();
        let cluster = old.offset() >> self.cluster_bits;
        (own && !kept).then_some(cluster..cluster + 1)
    }

    /// Lets go of clusters that held data, unless they hold metadata as well: a broken image says so.
    fn free_data(&self, meta: &mut Meta, run: Range<u64>) {
        let metadata = self.metadata.read().unwrap_or_else(PoisonError::into_inner);
        match metadata.within(&run) {
            Some(cluster) => {
                tracing::warn!("data was mapped to cluster {cluster} of the file, which holds metadata")
            }
            None => meta.free(run),
        }
    }

    /// The L2 table for a cluster, made or copied so that it is this image's alone.
    pub(crate) async fn own_table_of(&self, meta: &mut Meta, cluster: u64) -> Result<u64, Error> {
        let entry = self.l1_entry(cluster);
        let old = self.table_of(cluster)?;
        if let Some(table) = old {
            if self.l1_is_unnamed(table) {
                return Err(Error::Corrupt(format!(
                    "the L2 table at {table:#x} is no metadata cluster"
                )));
            }
            if entry & COPIED != 0 {
                return Ok(table);
            }
        }
        let new = self.take(meta, 1).await?.start;
        let offset = new << self.cluster_bits;
        if let Some(table) = old {
            let copied = async {
                let bytes = read_at(&self.file, table, self.cluster_size() as usize).await?;
                write_at(&self.file, offset, &bytes).await?;
                // Before it is named: it stands for what is there.
                self.sync().await
            };
            if let Err(error) = copied.await {
                meta.pending.push(new..new + 1);
                return self.note(Err(error));
            }
        }
        self.set_l1(meta, (cluster >> self.l2_bits) as usize, own_table(offset))
            .await?;
        self.metadata
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .extend([new]);
        if let Some(table) = old {
            meta.free(table >> self.cluster_bits..(table >> self.cluster_bits) + 1);
        }
        Ok(offset)
    }

    /// Tables of the active L1 are known as metadata; one that is not appeared behind our back.
    fn l1_is_unnamed(&self, table: u64) -> bool {
        let metadata = self.metadata.read().unwrap_or_else(PoisonError::into_inner);
        !metadata.contains(table >> self.cluster_bits)
    }

    /// Changes one L1 entry.
    async fn set_l1(&self, meta: &mut Meta, index: usize, entry: u64) -> Result<(), Error> {
        let bytes: Vec<u8> = self.with_l1(|l1| {
            let per_write = self.sectors.align as usize / 8;
            let start = index / per_write * per_write;
            let mut part: Vec<u64> = l1[start..l1.len().min(start + per_write)].to_vec();
            part[index - start] = entry;
            // The rest of the cluster is the table's too.
            part.resize(per_write, 0);
            part.iter().flat_map(|word| word.to_be_bytes()).collect()
        });
        let at = meta.header.l1_offset + (index as u64 * 8) / self.sectors.align * self.sectors.align;
        self.change(write_at(&self.file, at, &bytes)).await?;
        self.with_l1(|l1| l1[index] = entry);
        Ok(())
    }
}
