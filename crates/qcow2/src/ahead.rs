//! Mapping before there is data, and keeping the mapping when the data goes: what sequential zones and preallocation use.

use std::ops::Range;

use zbdkit_io::{File, IoBuf};

use crate::create::Preallocation;
use crate::error::Error;
use crate::image::{MAX_REFILL, Mapping, Meta, Qcow2};
use crate::l2::Entry;

impl Qcow2 {
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
                    self.reserve_run(&mut meta, count, ahead).await?;
                }
                let mut taken = Vec::new();
                let named = self.name_ahead(&mut meta, at, &old, &mut taken).await;
                if let Err(error) = named {
                    // Still zero, and named by nothing.
                    meta.reserve.extend(taken);
                    return Err(error);
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Gives those of the clusters that need one a cluster of the file; `taken` says which those are.
    async fn name_ahead(
        &self,
        meta: &mut Meta,
        first: u64,
        old: &[Entry],
        taken: &mut Vec<Range<u64>>,
    ) -> Result<(), Error> {
        let mut new = old.to_vec();
        for (cluster, entry) in (first..).zip(&mut new) {
            if self.codec.is_all_data(*entry) && entry.is_copied() {
                continue;
            }
            let host = match self.data {
                Some(_) => cluster,
                None => self.take(meta, 1).await?.start,
            };
            join(taken, host..host + 1);
            *entry = self.codec.data(host << self.cluster_bits);
        }
        let runs = std::mem::take(taken);
        if self.data.is_some() {
            // There they are not zeros because nobody named them.
            self.zero_data(&runs).await?;
        }
        // What fails here may have named them.
        self.set_entries(meta, first, &new).await
    }

    /// Makes clusters of the data file zeros, durably.
    async fn zero_data(&self, runs: &[Range<u64>]) -> Result<(), Error> {
        for run in runs {
            self.punch(run).await?;
        }
        self.sync_data().await
    }

    /// Makes clusters of the data file zeros, and gives their space back where its file system can.
    async fn punch(&self, run: &Range<u64>) -> Result<(), Error> {
        let (start, len) = (
            run.start << self.cluster_bits,
            (run.end - run.start) << self.cluster_bits,
        );
        let zeroed = self.failure.whole(async {
            match self.data_file().punch_hole(start, len).await {
                Ok(()) => Ok(()),
                Err(_) => self.data_file().zero_range(start, len).await,
            }
        });
        zeroed.await.map_err(|e| Error::io("zeroing clusters", &e))
    }

    /// A zone was reset: its contents go. Clusters of its own stay mapped, and give their space back to the file's
    /// file system; all others are not mapped any more. Reads as zeros afterwards. No request may be under way there.
    pub async fn release(&self, range: Range<u64>) -> Result<(), Error> {
        self.check_change(range.start, range.end - range.start)?;
        let mut kept: Vec<Range<u64>> = Vec::new();
        self.remap(self.whole_clusters(&range), |cluster, old| {
            // One that was zeroed is none of those: as data it would show what it held before, until it is punched.
            if self.codec.is_all_data(old) && old.is_copied() {
                let host = old.offset() >> self.cluster_bits;
                join(&mut kept, host..host + 1);
                return None;
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
            self.punch(&run).await?;
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
}

/// Adds a run to runs, joined to the last one where it follows it.
pub(crate) fn join(runs: &mut Vec<Range<u64>>, run: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => runs.push(run),
    }
}

async fn write_zeros(file: &File, mut offset: u64, len: u64) -> std::io::Result<()> {
    let end = offset + len;
    let zeros = IoBuf::try_alloc(len.min(1 << 20) as usize)?;
    while offset < end {
        let n = (end - offset).min(1 << 20);
        file.write(zeros.slice(0..n as usize), offset).await?;
        offset += n;
    }
    Ok(())
}
