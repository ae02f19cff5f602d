//! Writing compressed clusters, one behind the other in clusters that they share.

use zbdkit_io::IoBuf;

use crate::compress;
use crate::error::Error;
use crate::image::{Meta, Qcow2, read_at, write_at};
use crate::l2::{COMPRESSED, Entry};

impl Qcow2 {
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
        for (offset, packed) in &clusters {
            self.check_change(*offset, 1)?;
            if packed.is_empty() || packed.len() as u64 >= self.cluster_size() {
                return Err(Error::Refused(format!(
                    "{} bytes are no compressed cluster of {} bytes",
                    packed.len(),
                    self.cluster_size()
                )));
            }
            if offset & (self.cluster_size() - 1) != 0 {
                return Err(Error::Refused(format!(
                    "{offset} is not the beginning of a cluster"
                )));
            }
        }
        let mut meta = self.lock().await;
        let mut placed = Vec::new();
        let written = self.place_packed(&mut meta, &clusters, &mut placed).await;
        if let Err(error) = written {
            placed
                .iter()
                .for_each(|(_, entry)| self.free_packed(&mut meta, *entry));
            return Err(error);
        }
        drop(meta);
        let mut placed = placed.into_iter();
        for (cluster, entry) in placed.by_ref() {
            let _alone = self.ranges.lock(cluster..cluster + 1).await;
            let mut meta = self.lock().await;
            let named = self.set_entries(&mut meta, cluster, &[entry]).await;
            if let Err(error) = named {
                // This one may be named all the same; the others are not.
                placed.for_each(|(_, entry)| self.free_packed(&mut meta, entry));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Writes compressed clusters where there is room, durably; which cluster of the device each is, and its entry.
    async fn place_packed(
        &self,
        meta: &mut Meta,
        clusters: &[(u64, Vec<u8>)],
        placed: &mut Vec<(u64, Entry)>,
    ) -> Result<(), Error> {
        for (offset, packed) in clusters {
            let len = packed.len() as u64;
            let place = self.pack(meta, len).await?;
            let entry = Entry {
                word: COMPRESSED | compress::encode_descriptor(place, len, self.cluster_bits),
                bitmap: 0,
            };
            placed.push((offset >> self.cluster_bits, entry));
            self.failure.whole(self.write_bytes(place, packed)).await?;
        }
        // The counts before the names, and the bytes too, where they stand for something.
        self.sync().await
    }

    /// A compressed cluster that was written will not be named.
    fn free_packed(&self, meta: &mut Meta, entry: Entry) {
        meta.free(compress::clusters(entry.word, self.cluster_bits));
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
            let raised = meta.refcounts()?.add(cluster..cluster + 1, 1);
            self.change(raised).await?;
        } else {
            let new = self.take(meta, 1).await?.start;
            meta.packing = new << self.cluster_bits..(new + 1) << self.cluster_bits;
        }
        if meta.packing.start + len > compress::offset_limit(self.cluster_bits) {
            return Err(Error::Unsupported(format!(
                "compressed clusters cannot lie past {} in the file",
                compress::offset_limit(self.cluster_bits)
            )));
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
}
