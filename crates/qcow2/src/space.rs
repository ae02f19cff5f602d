//! Clusters of the file: the reserve that new ones come from, and the way back of those that nothing names any more.

use std::ops::Range;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crate::ahead::join;
use crate::error::Error;
use crate::image::{Meta, Qcow2, max_refill};
use crate::refcounts::{Allocated, GROWING};

/// Freed clusters that make a refill free them first, to take them again.
const WORTH_REAPING: u64 = 256;

impl Qcow2 {
    /// Takes up to `want` clusters in one run from the reserve: counted, zero, and durable, named by nothing.
    pub(crate) async fn take(&self, meta: &mut Meta, want: u64) -> Result<Range<u64>, Error> {
        self.check_failed()?;
        let fits = |meta: &Meta| meta.reserve.iter().position(|run| run.end - run.start >= want);
        let mut found = fits(meta);
        if found.is_none() {
            self.refill(meta, want, want).await?;
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

    /// Brings a run of so many clusters to the front of the reserve; where there is none, `ahead` of them are taken.
    pub(crate) async fn reserve_run(&self, meta: &mut Meta, count: u64, ahead: u64) -> Result<(), Error> {
        let fits = |meta: &Meta| meta.reserve.iter().position(|run| run.end - run.start >= count);
        let mut found = fits(meta);
        if found.is_none() {
            self.refill(meta, count, ahead).await?;
            found = fits(meta);
        }
        if let Some(index) = found {
            meta.reserve.swap(0, index);
        }
        Ok(())
    }

    /// Puts at least `wanted` clusters into the reserve, if there is room, in runs of at least `need`.
    async fn refill(&self, meta: &mut Meta, need: u64, wanted: u64) -> Result<(), Error> {
        let waiting: u64 = meta.pending.iter().map(|run| run.end - run.start).sum();
        if waiting >= WORTH_REAPING.min(need.max(16)) {
            self.reap(meta).await?;
        }
        let device = self.size() / self.cluster_size() + 1;
        let preferred = meta.grow.min(device).max(wanted);
        meta.grow = (meta.grow * 2).min(max_refill(self.cluster_bits));
        let allocated = self.allocate(meta, need, preferred).await?;
        self.metadata
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(allocated.own.clone());
        if let Some((offset, clusters)) = allocated.moved {
            let old = meta.header.refcount_table_offset >> self.cluster_bits;
            let old = old..old + u64::from(meta.header.refcount_table_clusters);
            let named = self.write_header(meta, |header| {
                header.refcount_table_offset = offset;
                header.refcount_table_clusters = clusters;
                Ok(())
            });
            if let Err(error) = named.await {
                // What is counted from now on is counted where nobody will look.
                self.failure.fail(error.errno());
                return Err(error);
            }
            self.free_metadata(meta, old);
        }
        meta.reserve.extend(allocated.runs);
        Ok(())
    }

    /// Takes clusters out of the file, fewer than preferred where it cannot grow by so many.
    async fn allocate(&self, meta: &mut Meta, need: u64, mut preferred: u64) -> Result<Allocated, Error> {
        let is_taken = |range: &Range<u64>| {
            let metadata = self.metadata.read().unwrap_or_else(PoisonError::into_inner);
            let hit = metadata.within(range);
            hit.map(|cluster| format!("metadata (cluster {cluster})"))
        };
        loop {
            let refcounts = meta.refcounts()?;
            let allocated = self.change(refcounts.allocate(need, preferred, &is_taken)).await;
            self.end.fetch_max(refcounts.len(), Ordering::Relaxed);
            match allocated {
                Err(Error::Io { op: GROWING, .. }) if preferred > need => preferred = need.max(preferred / 4),
                result => return result,
            }
        }
    }

    /// Clusters that held metadata which nothing names any more.
    pub(crate) fn free_metadata(&self, meta: &mut Meta, run: Range<u64>) {
        self.forget_metadata(&run);
        meta.free(run);
    }

    fn forget_metadata(&self, run: &Range<u64>) {
        let mut metadata = self.metadata.write().unwrap_or_else(PoisonError::into_inner);
        metadata.remove(run);
    }

    /// Frees what nothing names any more: syncs the removal, waits for requests that may know it, lowers the counts,
    /// and gives the space back.
    pub(crate) async fn reap(&self, meta: &mut Meta) -> Result<(), Error> {
        self.sync().await?;
        if meta.pending.is_empty() {
            return Ok(());
        }
        self.grace.passed().await;
        // A reader that had the mapping may have put it there since that went.
        self.forget_inflated();
        for run in joined(std::mem::take(&mut meta.pending)) {
            if run.contains(&(meta.packing.end.saturating_sub(1) >> self.cluster_bits)) {
                // Its cluster may be somebody else's from now on.
                meta.packing = 0..0;
            }
            match self.change(meta.refcounts()?.add(run.clone(), -1)).await {
                Ok(()) => {}
                // It was named more often than counted. The others are none the worse for it.
                Err(error @ Error::Corrupt(_)) => {
                    tracing::warn!("clusters {run:?} of the file cannot be freed: {error}");
                    continue;
                }
                Err(error) => return Err(error),
            }
            for free in meta.refcounts()?.unused(run).await? {
                let (start, len) = (
                    free.start << self.cluster_bits,
                    (free.end - free.start) << self.cluster_bits,
                );
                self.forget_metadata(&free);
                // A hint: where the file system cannot, the space stays until it is used again.
                let _ = self.failure.whole(self.file.punch_hole(start, len)).await;
            }
        }
        Ok(())
    }

    /// Everything durable, nothing pending, no reserve; the file ends with the last cluster that is used.
    pub(crate) async fn settle(&self, meta: &mut Meta) -> Result<(), Error> {
        self.reap(meta).await?;
        meta.packing = 0..0;
        let reserve = joined(std::mem::take(&mut meta.reserve).into());
        if reserve.is_empty() {
            return Ok(());
        }
        for run in &reserve {
            self.change(meta.refcounts()?.add(run.clone(), -1)).await?;
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

    /// Clusters for a table of `len` bytes that the header will name: in one run, zero, counted, durable.
    pub async fn allocate_area(&self, len: u64) -> Result<u64, Error> {
        self.check_change(0, 0)?;
        let count = len.div_ceil(self.cluster_size()).max(1);
        let mut meta = self.lock().await;
        let run = self.take(&mut meta, count).await?;
        if run.end - run.start < count {
            meta.reserve.push_back(run);
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
}

/// The same runs in order, those that follow each other as one.
fn joined(mut runs: Vec<Range<u64>>) -> Vec<Range<u64>> {
    runs.sort_unstable_by_key(|run| run.start);
    let mut all: Vec<Range<u64>> = Vec::with_capacity(runs.len().min(1 << 10));
    for run in runs {
        join(&mut all, run);
    }
    all
}

impl Meta {
    /// Notes clusters that nothing names any more.
    pub(crate) fn free(&mut self, run: Range<u64>) {
        join(&mut self.pending, run);
    }
}
