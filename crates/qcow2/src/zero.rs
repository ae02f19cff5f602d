//! Zeroing and discarding.

use std::ops::Range;
use std::sync::atomic::Ordering;

use zbdkit_io::IoBuf;

use crate::ahead::join;
use crate::error::Error;
use crate::image::Qcow2;
use crate::l2::{ALL_ZERO, Entry, Kind, ZERO};

impl Qcow2 {
    /// The range's contents are not needed any more; a hint that whole clusters take. They read as zeros then.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.check_change(offset, len)?;
        let clusters = self.whole_clusters(&(offset..offset + len));
        self.zero_clusters(clusters).await
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
            return self.zero_clusters(clusters).await;
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
                    word: old.word | ZERO,
                    bitmap: 0,
                },
                (true, true) => Entry {
                    word: old.word,
                    bitmap: ALL_ZERO,
                },
            })
        })
        .await
    }

    /// Makes clusters zeros without contents.
    async fn zero_clusters(&self, clusters: Range<u64>) -> Result<(), Error> {
        if clusters.is_empty() {
            return Ok(());
        }
        if self.data_raw {
            let end = (clusters.end << self.cluster_bits).min(self.size());
            self.zero_raw(clusters.start << self.cluster_bits..end).await?;
        }
        let mut left: Vec<Range<u64>> = Vec::new();
        self.remap(clusters, |cluster, old| {
            let backed = self.shows_backing(cluster);
            if (self.version < 3 && backed) || (!backed && old == Entry::default()) {
                return None;
            }
            if self.data.is_some() && self.codec.has_cluster(old) {
                join(&mut left, cluster..cluster + 1);
            }
            Some(if backed {
                self.codec.zero()
            } else {
                Entry::default()
            })
        })
        .await?;
        // Data of its own file lies where the device has it: nobody else uses that place.
        for run in left {
            let (start, end) = (run.start << self.cluster_bits, run.end << self.cluster_bits);
            // Where the file system cannot, the space stays.
            let punched = self.data_file().punch_hole(start, end - start);
            let _ = self.failure.whole(punched).await;
        }
        Ok(())
    }

    /// A raw data file must say the same as the image.
    async fn zero_raw(&self, range: Range<u64>) -> Result<(), Error> {
        let zeroed = self.data_file().zero_range(range.start, range.end - range.start);
        let zeroed = self.failure.whole(zeroed).await;
        zeroed.map_err(|e| Error::io("write zeroes", &e))
    }

    /// Writes zeros as data, but where they are already.
    async fn write_zero_data(&self, range: Range<u64>) -> Result<(), Error> {
        let mut at = range.start;
        while at < range.end {
            let run = self.run(at, range.end - at).await?;
            let zero = match run.kind {
                Kind::Zero => true,
                // Without the backing image there is nothing of it to write beside the zeros: it stays as it is.
                Kind::Unallocated => {
                    self.backing_unknown.load(Ordering::Relaxed)
                        || !self.shows_backing(at >> self.cluster_bits)
                }
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

    /// The whole clusters of a byte range; the last one of the device may be a short one.
    pub(crate) fn whole_clusters(&self, range: &Range<u64>) -> Range<u64> {
        let end = if range.end >= self.size() {
            range.end.div_ceil(self.cluster_size())
        } else {
            range.end >> self.cluster_bits
        };
        let start = range.start.div_ceil(self.cluster_size());
        start..end.max(start)
    }

    /// Whether anything below shows where the image has nothing, or may show once it is opened with its backing image.
    pub(crate) fn shows_backing(&self, cluster: u64) -> bool {
        if self.backing_unknown.load(Ordering::Relaxed) {
            return true;
        }
        let below = self.backing.as_ref().map_or(0, |backing| backing.len());
        cluster << self.cluster_bits < below
    }
}
