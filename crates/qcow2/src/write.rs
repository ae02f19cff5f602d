//! Writing: in place where a cluster is there and the image's alone, else to new clusters.
//!
//! A cluster gets its contents before it is named, and what it replaces is freed after that. New clusters come from
//! the reserve: counted, zero and durable, so that naming one needs no sync. Only where a new cluster stands for contents
//! that are not zeros, those are synced first: a power cut must not bring zeros in their place.

use std::ops::Range;

use zbdkit_io::IoBuf;

use crate::error::Error;
use crate::image::{Access, Qcow2, Run};
use crate::l2::{Entry, Kind, SUBCLUSTERS};

/// Bytes of clusters that a request writes to at once before it names them.
const PIECE: u64 = 4 << 20;

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
            let written = self.failure.whole(place.file.write(buf, place.offset)).await;
            written.map_err(|e| Error::io("write", &e))?;
            return Ok(len);
        }
        self.check_failed()?;
        let broken = {
            // What was looked up before may have been freed since, and hold metadata by good right.
            let _pin = self.grace.pin();
            let again = self.run(at, run.len).await?;
            let same = again.offset == run.offset && again.kind == run.kind;
            same && self.overlap(run.offset, run.len).is_some()
        };
        if broken {
            self.check_overlap(run.offset, run.len).await?;
        }
        Ok(0)
    }

    /// That data may lie in a range of its file. If it does, the image is marked corrupt.
    pub(crate) async fn check_overlap(&self, offset: u64, len: u64) -> Result<(), Error> {
        let Some(place) = self.overlap(offset, len) else {
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
            "an invalid write was prevented: data is mapped to {place}"
        )))
    }

    /// Writes the beginning of `buf` to clusters that are new there; the answer is how many bytes, 0 where clusters
    /// have come meanwhile.
    async fn write_new(&self, buf: IoBuf, at: u64) -> Result<usize, Error> {
        let bits = self.cluster_bits;
        let first = at >> bits;
        let end = ((at + buf.len() as u64 - 1) >> bits) + 1;
        let most = (PIECE >> bits).max(1);
        let slice_end = (first | (self.l2.entries() - 1)) + 1;
        let range = first..end.min(first + most).min(slice_end);
        let _alone = self.ranges.lock(range.clone()).await;
        let old = self.entries(range.clone()).await?;
        let is_new = |entry: &Entry| !(self.codec.is_all_data(*entry) && entry.is_copied());
        let count = old.iter().take_while(|entry| is_new(entry)).count() as u64;
        if count == 0 {
            return Ok(0);
        }
        if self.codec.extended && self.codec.has_cluster(old[0]) && old[0].is_copied() {
            // Others may be writing to those parts of it that are there, so it stays where it is.
            self.complete(first, old[0]).await?;
            return Ok(0);
        }
        let stays =
            |entry: &Entry| self.codec.extended && self.codec.has_cluster(*entry) && entry.is_copied();
        let count = old
            .iter()
            .take(count as usize)
            .take_while(|entry| !stays(entry))
            .count() as u64;
        let host = self.take_data(first, count).await?;
        let count = host.end - host.start;
        let written = self
            .fill_new(&buf, at, &old[..count as usize], host.start << bits)
            .await;
        let mut meta = self.lock().await;
        let ready = match written {
            Ok(len) => self.own_table_of(&mut meta, first).await.map(|_| len),
            Err(error) => Err(error),
        };
        if ready.is_err() && self.data.is_none() {
            // Nothing names them, but they are not zeros any more.
            meta.pending.push(host);
            return ready;
        }
        let len = ready?;
        let entries: Vec<Entry> = host
            .map(|cluster| self.codec.data(cluster << self.cluster_bits))
            .collect();
        self.set_entries(&mut meta, first, &entries).await?;
        Ok(len)
    }

    /// Gives a cluster of the image's own, of which only some subclusters are there, all of them.
    async fn complete(&self, cluster: u64, old: Entry) -> Result<(), Error> {
        let size = self.cluster_size() / SUBCLUSTERS;
        let start = cluster << self.cluster_bits;
        self.check_overlap(old.offset(), self.cluster_size()).await?;
        for part in 0..SUBCLUSTERS {
            if self.codec.kind(old, part) == Kind::Data {
                continue;
            }
            let at = start + part * size;
            let buf = IoBuf::try_alloc(size as usize).map_err(|e| Error::io("write", &e))?;
            let there = self.size().saturating_sub(at).min(size) as usize;
            if there > 0 {
                self.read(buf.slice(0..there), at).await?;
            }
            let to = old.offset() + part * size;
            // Others could soon be writing there.
            let written = self.failure.whole(self.data_file().write(buf, to)).await;
            written.map_err(|e| Error::io("write", &e))?;
        }
        self.sync_data().await?;
        let mut meta = self.lock().await;
        self.set_entries(&mut meta, cluster, &[self.codec.data(old.offset())])
            .await
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
        self.write_data(buf.slice(0..len as usize), to(at)).await?;
        self.copy_old(at + len..end, to(at + len), old[old.len() - 1])
            .await?;
        if replaces || self.data.is_some() {
            self.sync_data().await?;
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
        let there = self.size().saturating_sub(range.start).min(len) as usize;
        if !zero && there > 0 {
            self.read(buf.slice(0..there), range.start).await?;
        }
        self.write_data(buf, to).await
    }

    /// Writes to clusters that nothing names yet.
    async fn write_data(&self, buf: IoBuf, to: u64) -> Result<(), Error> {
        let write = self.data_file().write(buf, to);
        let written = match self.data {
            // In a file of its own it is the place of that part of the device for good.
            Some(_) => self.failure.whole(write).await,
            None => write.await,
        };
        written.map_err(|e| Error::io("write", &e))
    }
}
