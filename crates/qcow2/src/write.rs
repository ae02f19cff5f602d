//! What changes the mapping: writes to clusters that are not there yet, zeroing, discarding, mapping ahead, releasing.
//!
//! A cluster gets its contents before it is named, and what it replaces is freed after that. New clusters come from
//! the reserve: counted, zero and durable, so that naming one needs no sync. Only where a new cluster stands for contents
//! that are not zeros, those are synced first: a power cut must not bring zeros in their place.

use std::ops::Range;
use std::sync::PoisonError;

use zbdkit_io::IoBuf;
use zbdkit_spec::qcow2::L1E_OFFSET_MASK;

use crate::compress;
use crate::create::Preallocation;
use crate::error::Error;
use crate::image::{Access, MAX_REFILL, Mapping, Meta, Qcow2, Run, own_table, read_at, write_at};
use crate::l2::{COMPRESSED, COPIED, Entry, Kind};

/// Bytes of clusters that a request writes to at once before it names them.
const PIECE: u64 = 4 << 20;
/// Freed clusters that make a refill free them first, to take them again.
const WORTH_REAPING: u64 = 256;

impl Qcow2 {
    /// Writes all of `buf`.
    pub async fn write(&self, buf: IoBuf, offset: u64) -> Result<(), Error> {
        self.check_change(offset, buf.len() as u64)?;
        let mut done = 0;
        while done < buf.len() {
            let (at, rest) = (offset + done as u64, (buf.len() - done) as u64);
            let run = self.run(at, rest).await?;
            done += if run.kind == Kind::Data && run.entry.is_copied() {
                self.write_in_place(buf.slice(done..done + run.len as usize), at, run)
                    .await?
            } else {
                self.write_new(buf.slice(done..buf.len()), at).await?
            };
        }
        Ok(())
    }

    /// Writes to clusters that are there; the answer is how many bytes, 0 where they are not any more.
    async fn write_in_place(&self, buf: IoBuf, at: u64, run: Run) -> Result<usize, Error> {
        let len = buf.len();
        if let Some(place) = self.resolve(at, run.len, Access::Write) {
            let written = place.file.write(buf, place.offset).await;
            written.map_err(|e| Error::io("write", &e))?;
            return Ok(len);
        }
        self.check_failed()?;
        self.check_overlap(run.offset, run.len).await?;
        Ok(0)
    }

    /// That a range of the image's file holds no metadata. If it does, the image is marked corrupt.
    pub(crate) async fn check_overlap(&self, offset: u64, len: u64) -> Result<(), Error> {
        let Some(cluster) = self.overlap(offset, len) else {
            return Ok(());
        };
        let mut meta = self.lock().await;
        let marked = self
            .write_header(&mut meta, |header| {
                if header.version >= 3 {
                    header.incompatible |= zbdkit_spec::qcow2::INCOMPAT_CORRUPT;
                }
                Ok(())
            })
            .await;
        if let Err(error) = marked {
            tracing::warn!("the image could not be marked corrupt: {error}");
        }
        Err(Error::Corrupt(format!(
            "preventing an invalid write to metadata: data is mapped to cluster {cluster} of the file"
        )))
    }

    /// Writes the beginning of `buf` to clusters that are new there; the answer is how many bytes, 0 where clusters
    /// have come meanwhile.
    async fn write_new(&self, buf: IoBuf, at: u64) -> Result<usize, Error> {
        let bits = self.cluster_bits;
        let first = at >> bits;
        let end = (at + buf.len() as u64 - 1 >> bits) + 1;
        let most = (PIECE >> bits).max(1);
        let slice_end = (first | (self.l2.entries() - 1)) + 1;
        let range = first..end.min(first + most).min(slice_end);
        let _alone = self.ranges.lock(range.clone()).await;
        let old = self.entries(range.clone()).await?;
        let is_new = |entry: &Entry| !(self.codec.is_all_data(*entry) && entry.is_copied());
        let count = old.iter().take_while(|entry| is_new(entry)).count() as u64;
        // Nobody else maps anything here: an entry that a request can be resolved by is one that was there before.
        if count == 0 {
            return Ok(0);
        }
        let host = self.take_data(first, count).await?;
        let count = host.end - host.start;
        let written = self
            .fill_new(&buf, at, &old[..count as usize], host.start << bits)
            .await;
        let named = match written {
            Ok(len) => self.name_new(first, &host).await.map(|()| len),
            Err(error) => Err(error),
        };
        if named.is_err() && self.data.is_none() {
            // They are not zeros any more.
            self.lock().await.pending.push(host);
        }
        named
    }

    /// Clusters for data of the device from `first` on: at most `count`, in one run.
    async fn take_data(&self, first: u64, count: u64) -> Result<Range<u64>, Error> {
        if self.data.is_some() {
            // In a file of its own, data lies where the device has it.
            return Ok(first..first + count);
        }
        let mut meta = self.lock().await;
        self.take(&mut meta, count).await
    }

    /// Gives new clusters at `host` their contents: what is written, and around it what was there.
    async fn fill_new(&self, buf: &IoBuf, at: u64, old: &[Entry], host: u64) -> Result<usize, Error> {
        let mask = self.cluster_size() - 1;
        let start = at & !mask;
        let end = start + old.len() as u64 * self.cluster_size();
        let len = (buf.len() as u64).min(end - at);
        let to = |device: u64| host + (device - start);
        let mut replaces = false;
        for (index, entry) in old.iter().enumerate() {
            replaces |= !self.reads_zero(*entry, start + index as u64 * self.cluster_size());
        }
        self.copy_old(start..at, to(start), old[0]).await?;
        let written = self.data_file().write(buf.slice(0..len as usize), to(at)).await;
        written.map_err(|e| Error::io("write", &e))?;
        self.copy_old(at + len..end, to(at + len), old[old.len() - 1])
            .await?;
        if replaces || self.data.is_some() {
            let synced = self
                .data_file()
                .datasync()
                .await
                .map_err(|e| Error::io("write", &e));
            self.note(synced)?;
        }
        Ok(len as usize)
    }

    /// Whether all of a cluster reads as zeros, by its entry alone.
    fn reads_zero(&self, entry: Entry, at: u64) -> bool {
        let below = self.backing.as_ref().map_or(0, |backing| backing.len());
        let parts = if self.codec.extended {
            crate::l2::SUBCLUSTERS
        } else {
            1
        };
        (0..parts).all(|part| match self.codec.kind(entry, part) {
            Kind::Zero => true,
            Kind::Unallocated => at >= below,
            Kind::Data | Kind::Compressed | Kind::Invalid => false,
        })
    }

    /// Copies what the device has in part of a cluster to its new place, which holds zeros (in the image's own file).
    async fn copy_old(&self, range: Range<u64>, to: u64, old: Entry) -> Result<(), Error> {
        if range.is_empty() {
            return Ok(());
        }
        let zero = self.reads_zero(old, range.start & !(self.cluster_size() - 1));
        if zero && self.data.is_none() {
            return Ok(());
        }
        let len = range.end - range.start;
        let buf = IoBuf::try_alloc(len as usize).map_err(|e| Error::io("write", &e))?;
        if !zero {
            let there = self.size().saturating_sub(range.start).min(len) as usize;
            self.read(buf.slice(0..there), range.start).await?;
        }
        let written = self.data_file().write(buf, to).await;
        written.map_err(|e| Error::io("write", &e))
    }

    async fn name_new(&self, first: u64, host: &Range<u64>) -> Result<(), Error> {
        let entries: Vec<Entry> = host
            .clone()
            .map(|cluster| self.codec.data(cluster << self.cluster_bits))
            .collect();
        let mut meta = self.lock().await;
        self.set_entries(&mut meta, first, &entries).await
    }

    /// The entries of clusters of one slice.
    async fn entries(&self, range: Range<u64>) -> Result<Vec<Entry>, Error> {
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
        let written = self.sectors.write(&self.file, base, &bytes, changed).await;
        self.note(written)?;
        self.l2.update(key, index, new);
        for (old, new) in old.iter().zip(new) {
            if let Some(freed) = self.freed(*old, *new) {
                meta.free(freed);
            }
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
            let (offset, len) = compress::descriptor(old.word, self.cluster_bits);
            return Some(offset >> self.cluster_bits..((offset + len - 1) >> self.cluster_bits) + 1);
        }
        let own = self.data.is_none() && self.codec.has_cluster(old);
        let kept = self.codec.has_cluster(new) && new.offset() == old.offset();
        let cluster = old.offset() >> self.cluster_bits;
        (own && !kept).then_some(cluster..cluster + 1)
    }

    /// The L2 table for a cluster, made or copied so that it is this image's alone.
    async fn own_table_of(&self, meta: &mut Meta, cluster: u64) -> Result<u64, Error> {
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
            .insert(new);
        if let Some(table) = old {
            meta.free(table >> self.cluster_bits..(table >> self.cluster_bits) + 1);
        }
        Ok(offset)
    }

    /// Tables of the active L1 are known as metadata; one that is not appeared behind our back.
    fn l1_is_unnamed(&self, table: u64) -> bool {
        let metadata = self.metadata.read().unwrap_or_else(PoisonError::into_inner);
        !metadata.contains(&(table >> self.cluster_bits))
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
        let written = write_at(&self.file, at, &bytes).await;
        self.note(written)?;
        self.with_l1(|l1| l1[index] = entry);
        Ok(())
    }

    /// Takes up to `want` clusters in one run from the reserve: counted, zero, and durable, named by nothing.
    pub(crate) async fn take(&self, meta: &mut Meta, want: u64) -> Result<Range<u64>, Error> {
        self.check_failed()?;
        let fits = |meta: &Meta| meta.reserve.iter().position(|run| run.end - run.start >= want);
        let mut found = fits(meta);
        if found.is_none() {
            self.refill(meta, want).await?;
            found = fits(meta);
        }
        let index = found.unwrap_or(0);
        let run = meta.reserve.get_mut(index).ok_or(Error::Io {
            op: "allocating clusters",
            errno: libc::ENOSPC,
        })?;
        let taken = run.start..run.end.min(run.start + want);
        run.start = taken.end;
        if run.is_empty() {
            meta.reserve.remove(index);
        }
        Ok(taken)
    }

    /// Puts clusters into the reserve, runs of at least `need`.
    async fn refill(&self, meta: &mut Meta, need: u64) -> Result<(), Error> {
        let waiting: u64 = meta.pending.iter().map(|run| run.end - run.start).sum();
        if waiting >= WORTH_REAPING.min(need.max(16)) {
            self.reap(meta).await?;
        }
        let device = self.size() / self.cluster_size() + 1;
        let preferred = meta.grow.min(device).max(need);
        meta.grow = (meta.grow * 2).min(MAX_REFILL);
        let is_taken = |range: &Range<u64>| {
            let metadata = self.metadata.read().unwrap_or_else(PoisonError::into_inner);
            let hit = if (metadata.len() as u64) < range.end - range.start {
                metadata.iter().copied().find(|cluster| range.contains(cluster))
            } else {
                range.clone().find(|cluster| metadata.contains(cluster))
            };
            hit.map(|cluster| format!("metadata (cluster {cluster})"))
        };
        let allocated = meta.refcounts()?.allocate(need, preferred, &is_taken).await;
        let allocated = self.note(allocated)?;
        self.metadata
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(allocated.own.clone());
        if let Some((offset, clusters)) = allocated.moved {
            let old = meta.header.refcount_table_offset >> self.cluster_bits;
            let old = old..old + u64::from(meta.header.refcount_table_clusters);
            self.write_header(meta, |header| {
                header.refcount_table_offset = offset;
                header.refcount_table_clusters = clusters;
                Ok(())
            })
            .await?;
            self.free_metadata(meta, old);
        }
        meta.reserve.extend(allocated.runs);
        Ok(())
    }

    /// Clusters that held metadata which nothing names any more.
    pub(crate) fn free_metadata(&self, meta: &mut Meta, run: Range<u64>) {
        let mut metadata = self.metadata.write().unwrap_or_else(PoisonError::into_inner);
        for cluster in run.clone() {
            metadata.remove(&cluster);
        }
        meta.free(run);
    }

    /// Frees what nothing names any more: syncs the removal, waits for requests that may know it, lowers the counts,
    /// and gives the space back.
    pub(crate) async fn reap(&self, meta: &mut Meta) -> Result<(), Error> {
        if meta.pending.is_empty() {
            return self.sync().await;
        }
        self.sync().await?;
        self.grace.passed().await;
        let mut pending = std::mem::take(&mut meta.pending);
        pending.sort_unstable_by_key(|run| run.start);
        for run in pending {
            let lowered = meta.refcounts()?.add(run.clone(), -1).await;
            self.note(lowered)?;
            for free in self.unused(meta, run).await? {
                let (start, len) = (
                    free.start << self.cluster_bits,
                    (free.end - free.start) << self.cluster_bits,
                );
                self.metadata
                    .write()
                    .unwrap_or_else(PoisonError::into_inner)
                    .retain(|cluster| !free.contains(cluster));
                // A hint: where the file system cannot, the space stays until it is used again.
                let _ = self.file.punch_hole(start, len).await;
            }
        }
        Ok(())
    }

    /// The parts of a run that nothing counts.
    async fn unused(&self, meta: &mut Meta, run: Range<u64>) -> Result<Vec<Range<u64>>, Error> {
        let mut parts: Vec<Range<u64>> = Vec::new();
        for cluster in run {
            if meta.refcounts()?.get(cluster).await? != 0 {
                continue;
            }
            match parts.last_mut() {
                Some(part) if part.end == cluster => part.end += 1,
                _ => parts.push(cluster..cluster + 1),
            }
        }
        Ok(parts)
    }

    /// Everything durable, nothing pending, no reserve; the file ends with the last cluster that is used.
    pub(crate) async fn settle(&self, meta: &mut Meta) -> Result<(), Error> {
        self.reap(meta).await?;
        meta.packing = 0..0;
        let mut reserve = std::mem::take(&mut meta.reserve);
        if reserve.is_empty() {
            return Ok(());
        }
        reserve.sort_unstable_by_key(|run| run.start);
        for run in &reserve {
            let lowered = meta.refcounts()?.add(run.clone(), -1).await;
            self.note(lowered)?;
        }
        self.sync().await?;
        let len = meta.refcounts()?.len();
        let mut end = len;
        for run in reserve.iter().rev() {
            if run.end << self.cluster_bits != end {
                break;
            }
            end = run.start << self.cluster_bits;
        }
        if end < len && self.file.set_len(end).is_ok() {
            meta.refcounts()?.set_len(end);
        }
        Ok(())
    }

    /// Changes the entries of whole clusters as `change` says, by the cluster's number and entry; `None` leaves one.
    async fn remap(
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
            }
            at = end;
        }
        Ok(())
    }

    /// The whole clusters of a byte range; the last one of the device may be a short one.
    fn whole_clusters(&self, range: &Range<u64>) -> Range<u64> {
        let end = if range.end >= self.size() {
            range.end.div_ceil(self.cluster_size())
        } else {
            range.end >> self.cluster_bits
        };
        let start = range.start.div_ceil(self.cluster_size());
        start..end.max(start)
    }

    /// Whether anything below shows where the image has nothing.
    fn shows_backing(&self, cluster: u64) -> bool {
        let below = self.backing.as_ref().map_or(0, |backing| backing.len());
        cluster << self.cluster_bits < below
    }

    /// The range's contents are not needed any more; a hint that whole clusters take. They read as zeros then.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.check_change(offset, len)?;
        let clusters = self.whole_clusters(&(offset..offset + len));
        self.zero_clusters(clusters, true).await
    }

    /// Makes clusters zeros without contents; with `keep_plain`, those that would need more than that stay.
    async fn zero_clusters(&self, clusters: Range<u64>, hint: bool) -> Result<(), Error> {
        let mut punched: Vec<Range<u64>> = Vec::new();
        self.remap(clusters, |cluster, old| {
            let backed = self.shows_backing(cluster);
            if self.version < 3 && backed {
                return None;
            }
            let new = if backed {
                self.codec.zero()
            } else {
                Entry::default()
            };
            if !backed && old == Entry::default() {
                return None;
            }
            if self.data.is_some() && self.codec.has_cluster(old) {
                join(&mut punched, cluster..cluster + 1);
            }
            Some(new)
        })
        .await?;
        // Data of its own file lies where the device has it, and nobody else uses that place.
        let Some(data) = &self.data else { return Ok(()) };
        for run in punched {
            let (start, len) = (
                run.start << self.cluster_bits,
                (run.end - run.start) << self.cluster_bits,
            );
            let freed = data.punch_hole(start, len).await;
            if self.data_raw && !hint {
                if freed.is_err() {
                    let zeroed = data.zero_range(start, len).await;
                    zeroed.map_err(|e| Error::io("write zeroes", &e))?;
                }
            }
        }
        Ok(())
    }

    /// Makes the range read as zeros; `unmap` allows to give its space back.
    pub async fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), Error> {
        self.check_change(offset, len)?;
        let clusters = self.whole_clusters(&(offset..offset + len));
        let end = offset + len;
        if clusters.is_empty() {
            return self.write_zero_data(offset..end).await;
        }
        let (start, stop) = (
            clusters.start << self.cluster_bits,
            (clusters.end << self.cluster_bits).min(end),
        );
        self.write_zero_data(offset..start).await?;
        self.write_zero_data(stop..end).await?;
        if self.version < 3 && self.shows_backing(clusters.start) {
            return self.write_zero_data(start..stop).await;
        }
        if unmap || self.data.is_some() {
            if self.data_raw {
                self.zero_raw(start..stop).await?;
            }
            return self.zero_clusters(clusters, false).await;
        }
        self.remap(clusters, |cluster, old| {
            let backed = self.shows_backing(cluster);
            if old == Entry::default() && !backed {
                return None;
            }
            if self.version < 3 {
                return Some(Entry::default());
            }
            // Its space stays.
            let keeps = self.codec.has_cluster(old) && old.is_copied();
            Some(match (keeps, self.codec.extended) {
                (false, _) => self.codec.zero(),
                (true, false) => Entry {
                    word: old.word | crate::l2::ZERO,
                    bitmap: 0,
                },
                (true, true) => Entry {
                    word: old.word,
                    bitmap: crate::l2::ALL_ZERO,
                },
            })
        })
        .await
    }

    /// A raw data file must say the same as the image.
    async fn zero_raw(&self, range: Range<u64>) -> Result<(), Error> {
        let zeroed = self
            .data_file()
            .zero_range(range.start, range.end - range.start)
            .await;
        zeroed.map_err(|e| Error::io("write zeroes", &e))
    }

    /// Writes zeros as data, but where they are already.
    async fn write_zero_data(&self, range: Range<u64>) -> Result<(), Error> {
        let mut at = range.start;
        while at < range.end {
            let run = self.run(at, range.end - at).await?;
            let zero = match run.kind {
                Kind::Zero => true,
                Kind::Unallocated => !self.shows_backing(at >> self.cluster_bits),
                _ => false,
            };
            let len = run.len.min(1 << 20);
            if !zero || self.data_raw {
                self.write(IoBuf::alloc(len as usize), at).await?;
            }
            at += if zero && !self.data_raw { run.len } else { len };
        }
        Ok(())
    }

    /// Gives the clusters of the range that are not mapped space: contiguous in the file, and zero there. What such a
    /// cluster showed until now is gone, so the caller knows that none of it is wanted.
    pub async fn map_ahead(&self, range: Range<u64>) -> Result<(), Error> {
        self.check_change(range.start, range.end - range.start)?;
        let clusters = self.whole_clusters(&range);
        let mut at = clusters.start;
        while at < clusters.end {
            let end = ((at | (self.l2.entries() - 1)) + 1).min(clusters.end);
            let _alone = self.ranges.lock(at..end).await;
            let old = self.entries(at..end).await?;
            let missing = |entry: &&Entry| !(self.codec.is_all_data(**entry) && entry.is_copied());
            let count = old.iter().filter(missing).count() as u64;
            if count > 0 {
                let mut meta = self.lock().await;
                // The table first, so that it does not lie between the clusters.
                self.own_table_of(&mut meta, at).await?;
                let wanted = old.iter().take_while(missing).count() as u64;
                if wanted == count && self.data.is_none() {
                    let ahead = (clusters.end - at).min(MAX_REFILL);
                    self.reserve_run(&mut meta, ahead.max(count)).await?;
                }
                let mut new = old.clone();
                for (index, entry) in new.iter_mut().enumerate() {
                    if missing(&&*entry) {
                        let cluster = match self.data {
                            Some(_) => at + index as u64,
                            None => self.take(&mut meta, 1).await?.start,
                        };
                        *entry = self.codec.data(cluster << self.cluster_bits);
                    }
                }
                self.set_entries(&mut meta, at, &new).await?;
            }
            at = end;
        }
        Ok(())
    }

    /// Brings a run of so many clusters to the front of the reserve.
    async fn reserve_run(&self, meta: &mut Meta, count: u64) -> Result<(), Error> {
        let fits = |meta: &Meta| meta.reserve.iter().position(|run| run.end - run.start >= count);
        let mut found = fits(meta);
        if found.is_none() {
            self.refill(meta, count).await?;
            found = fits(meta);
        }
        if let Some(index) = found {
            meta.reserve.swap(0, index);
        }
        Ok(())
    }

    /// A zone was reset: its contents go. Clusters of its own stay mapped, and give their space back to the file's
    /// file system; all others are not mapped any more. Reads as zeros afterwards. No request may be under way there.
    pub async fn release(&self, range: Range<u64>) -> Result<(), Error> {
        self.check_change(range.start, range.end - range.start)?;
        let mut kept: Vec<Range<u64>> = Vec::new();
        self.remap(self.whole_clusters(&range), |cluster, old| {
            if self.codec.has_cluster(old) && old.is_copied() {
                let host = match self.data {
                    Some(_) => cluster,
                    None => old.offset() >> self.cluster_bits,
                };
                join(&mut kept, host..host + 1);
                return Some(self.codec.data(host << self.cluster_bits));
            }
            match (self.shows_backing(cluster), self.version < 3) {
                (true, true) => None,
                (true, false) => Some(self.codec.zero()),
                (false, _) => (old != Entry::default()).then(Entry::default),
            }
        })
        .await?;
        for run in kept {
            let (start, len) = (
                run.start << self.cluster_bits,
                (run.end - run.start) << self.cluster_bits,
            );
            self.check_overlap(start, len).await?;
            let freed = self.data_file().punch_hole(start, len).await;
            if freed.is_err() {
                let zeroed = self.data_file().zero_range(start, len).await;
                zeroed.map_err(|e| Error::io("release", &e))?;
            }
        }
        Ok(())
    }

    /// Unmaps the whole clusters of a range, whatever they hold: the backing image shows again.
    pub async fn drop_ahead(&self, range: Range<u64>) -> Result<(), Error> {
        self.check_change(range.start, range.end - range.start)?;
        self.remap(self.whole_clusters(&range), |_, old| {
            (old != Entry::default()).then(Entry::default)
        })
        .await
    }

    /// Gives a range its mapping, and as `mode` says its space.
    pub async fn preallocate(&self, range: Range<u64>, mode: Preallocation) -> Result<(), Error> {
        if mode == Preallocation::Off {
            return Ok(());
        }
        self.map_ahead(range.clone()).await?;
        if mode == Preallocation::Metadata {
            return Ok(());
        }
        let mut at = range.start;
        while at < range.end {
            let extent = self.map(at, range.end - at).await?;
            if let Mapping::Data { offset } = extent.mapping {
                let file = self.data_file();
                let given = match mode {
                    Preallocation::Full => write_zeros(file, offset, extent.len).await,
                    _ => file.allocate(offset, extent.len).await,
                };
                given.map_err(|e| Error::io("preallocating", &e))?;
            }
            at += extent.len;
        }
        Ok(())
    }

    /// Writes one cluster compressed, or as it is where that does not make it smaller. `data` is the cluster, or what of it
    /// lies within the device.
    pub async fn write_compressed(&self, data: &[u8], offset: u64) -> Result<(), Error> {
        let mut cluster = data.to_vec();
        cluster.resize(self.cluster_size() as usize, 0);
        match compress::compress(self.compression, &cluster) {
            Some(packed) => self.write_packed(vec![(offset, packed)]).await,
            None => self.write(IoBuf::from_vec(data.to_vec()), offset).await,
        }
    }

    /// Writes clusters that were compressed, by the offset of each on the device.
    pub async fn write_packed(&self, clusters: Vec<(u64, Vec<u8>)>) -> Result<(), Error> {
        if self.data.is_some() {
            return Err(Error::Refused(
                "compressed clusters cannot lie in an external data file".into(),
            ));
        }
        for (offset, _) in &clusters {
            self.check_change(*offset, 1)?;
            if offset & (self.cluster_size() - 1) != 0 {
                return Err(Error::Refused(format!(
                    "{offset} is not the beginning of a cluster"
                )));
            }
        }
        let mut meta = self.lock().await;
        let mut named = Vec::new();
        for (offset, packed) in &clusters {
            let place = self.pack(&mut meta, packed.len() as u64).await?;
            self.write_bytes(place, packed).await?;
            let entry = Entry {
                word: COMPRESSED | compress::encode_descriptor(place, packed.len() as u64, self.cluster_bits),
                bitmap: 0,
            };
            named.push((offset >> self.cluster_bits, entry));
        }
        // The counts before the names, and the bytes too, where they stand for something.
        self.sync().await?;
        drop(meta);
        for (cluster, entry) in named {
            let _alone = self.ranges.lock(cluster..cluster + 1).await;
            let mut meta = self.lock().await;
            self.set_entries(&mut meta, cluster, &[entry]).await?;
        }
        Ok(())
    }

    /// Room for `len` bytes, each cluster of it counted once more. Not synced.
    async fn pack(&self, meta: &mut Meta, len: u64) -> Result<u64, Error> {
        let cluster = meta.packing.start >> self.cluster_bits;
        let room = meta.packing.end - meta.packing.start;
        let shares = room >= len && {
            let max = meta.refcounts()?.max();
            meta.refcounts()?.get(cluster).await? < max
        };
        if shares {
            let raised = meta.refcounts()?.add(cluster..cluster + 1, 1).await;
            self.note(raised)?;
        } else {
            let new = self.take(meta, 1).await?.start;
            meta.packing = new << self.cluster_bits..(new + 1) << self.cluster_bits;
        }
        let at = meta.packing.start;
        meta.packing.start += len;
        Ok(at)
    }

    /// Writes bytes anywhere, also where direct I/O wants more than these.
    async fn write_bytes(&self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        let align = u64::from(self.file.direct_align().unwrap_or(1).max(1));
        if align == 1 {
            return write_at(&self.file, at, bytes).await;
        }
        let start = at / align * align;
        let end = (at + bytes.len() as u64).div_ceil(align) * align;
        let mut all = read_at(&self.file, start, (end - start) as usize).await?;
        all[(at - start) as usize..][..bytes.len()].copy_from_slice(bytes);
        write_at(&self.file, start, &all).await
    }

    /// Clusters for a table of `len` bytes that the header will name: in one run, zero, counted, durable.
    pub async fn allocate_area(&self, len: u64) -> Result<u64, Error> {
        self.check_change(0, 0)?;
        let count = len.div_ceil(self.cluster_size()).max(1);
        let mut meta = self.lock().await;
        let run = self.take(&mut meta, count).await?;
        if run.end - run.start < count {
            meta.reserve.push(run);
            return Err(Error::Io {
                op: "allocating a table",
                errno: libc::ENOSPC,
            });
        }
        let start = run.start << self.cluster_bits;
        self.metadata
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(run);
        Ok(start)
    }

    /// Frees a table that nothing names any more.
    pub async fn free_area(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.check_change(0, 0)?;
        let run = offset >> self.cluster_bits..(offset + len).div_ceil(self.cluster_size());
        let mut meta = self.lock().await;
        for cluster in run.clone() {
            let count = meta.refcounts()?.get(cluster).await?;
            if count != 1 {
                return Err(Error::Corrupt(format!(
                    "cluster {cluster} of a table has refcount {count}"
                )));
            }
        }
        self.free_metadata(&mut meta, run);
        Ok(())
    }

    /// A table that an extension names is metadata from now on. Fails where it overlaps other metadata.
    pub fn adopt_area(&self, area: Range<u64>, what: &'static str) -> Result<(), Error> {
        let run = area.start >> self.cluster_bits..area.end.div_ceil(self.cluster_size());
        let mut metadata = self.metadata.write().unwrap_or_else(PoisonError::into_inner);
        let within = |cluster: &&u64| run.contains(*cluster);
        if let Some(cluster) = metadata.iter().find(within) {
            return Err(Error::Corrupt(format!(
                "{what} overlaps other metadata in cluster {cluster}"
            )));
        }
        metadata.extend(run);
        Ok(())
    }
}

impl Meta {
    /// Notes clusters that nothing names any more.
    pub(crate) fn free(&mut self, run: Range<u64>) {
        match self.pending.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => self.pending.push(run),
        }
    }
}

/// Adds a run to runs, joined to the last one where it follows it.
fn join(runs: &mut Vec<Range<u64>>, run: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => runs.push(run),
    }
}

async fn write_zeros(file: &zbdkit_io::File, mut offset: u64, len: u64) -> std::io::Result<()> {
    let end = offset + len;
    let zeros = IoBuf::try_alloc(len.min(1 << 20) as usize)?;
    while offset < end {
        let n = (end - offset).min(1 << 20);
        file.write(zeros.slice(0..n as usize), offset).await?;
        offset += n;
    }
    Ok(())
}
