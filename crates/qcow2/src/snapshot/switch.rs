//! What snapshots and changes of size have in common: new tables are prepared beside those in use, one write of the
//! header switches, and then what nothing names any more is let go.
//!
//! A power cut finds either all that was before or all that is new, and clusters that are counted too often at worst.

use std::sync::PoisonError;

use zbdkit_spec::qcow2::OFLAG_COPIED;

use super::table::Table;
use super::tree::{Fixed, Tables};
use crate::error::Error;
use crate::image::{Meta, Qcow2};
use crate::l2::Entry;

/// Runs of clusters that are let go together; each time costs a sync.
const LET_GO: usize = 1 << 16;

impl Qcow2 {
    /// Takes new clusters for a table in one run, and writes it there. Counted durably; its contents are not synced. An
    /// empty table lies at 0.
    pub(crate) async fn place(&self, meta: &mut Meta, table: &[u8]) -> Result<u64, Error> {
        if table.is_empty() {
            return Ok(0);
        }
        let count = (table.len() as u64).div_ceil(self.cluster_size());
        let run = self.take(meta, count).await?;
        if run.end - run.start < count {
            meta.free(run);
            return Err(Error::Io {
                op: "allocating a table",
                errno: libc::ENOSPC,
            });
        }
        let offset = run.start << self.cluster_bits;
        let mut bytes = table.to_vec();
        bytes.resize(bytes.len().next_multiple_of(self.sectors.align as usize), 0);
        let len = bytes.len();
        let written = self.sectors.write(&self.file, offset, &bytes, 0..len).await;
        if let Err(error) = self.note(written) {
            meta.free(run);
            return Err(error);
        }
        self.metadata
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(run);
        Ok(offset)
    }

    /// A table of `len` bytes that [`Qcow2::place`] wrote is not needed, or not any more.
    pub(crate) fn unplace(&self, meta: &mut Meta, offset: u64, len: u64) {
        if len > 0 {
            let first = offset >> self.cluster_bits;
            self.free_metadata(meta, first..first + len.div_ceil(self.cluster_size()));
        }
    }

    /// The clusters of all metadata but L2 tables.
    pub(crate) fn fixed<'a>(
        &'a self,
        meta: &mut Meta,
        tables: &Tables,
        list: &Table,
    ) -> Result<Fixed<'a>, Error> {
        let header = meta.header.clone();
        let cluster = |offset: u64| tables.clusters_of(offset, 1);
        let mut clusters = vec![
            cluster(0),
            tables.clusters_of(header.l1_offset, 8 * u64::from(header.l1_size)),
            tables.clusters_of(header.snapshots_offset, list.len),
        ];
        clusters.extend(list.l1s().map(|(offset, len)| tables.clusters_of(offset, len)));
        let refcounts = meta.refcounts()?;
        clusters.push(refcounts.table());
        clusters.extend(refcounts.blocks().map(cluster));
        Ok(Fixed::new(self, clusters))
    }

    /// Lowers the counts of all that an L1 table reaches, which nothing names that way any more, and frees what that leaves
    /// unused. The table's own clusters stay.
    pub(crate) async fn let_go(&self, meta: &mut Meta, tables: &Tables, l1: &[u64]) -> Result<(), Error> {
        for index in 0..l1.len() {
            let Some(offset) = tables.l2_offset(l1, index)? else {
                continue;
            };
            let entries = tables.l2(offset).await?;
            self.let_go_entries(meta, tables, &entries)?;
            meta.free(tables.clusters_of(offset, 1));
            if meta.pending.len() > LET_GO {
                self.reap(meta).await?;
            }
        }
        Ok(())
    }

    /// The same for what L2 entries name.
    pub(crate) fn let_go_entries(
        &self,
        meta: &mut Meta,
        tables: &Tables,
        entries: &[Entry],
    ) -> Result<(), Error> {
        if entries.iter().any(|entry| entry.is_compressed()) {
            self.forget_inflated();
        }
        for run in tables.runs(entries)? {
            for _ in 0..run.times {
                meta.free(run.clusters.clone());
            }
        }
        Ok(())
    }

    /// Writes what differs between two states of an L2 table, in place.
    pub(crate) async fn rewrite_l2(
        &self,
        tables: &Tables,
        offset: u64,
        old: &[Entry],
        new: &[Entry],
    ) -> Result<(), Error> {
        let differs = |(old, new): (&Entry, &Entry)| old != new;
        let Some(first) = old.iter().zip(new).position(differs) else {
            return Ok(());
        };
        let last = old.iter().zip(new).rposition(differs).unwrap_or(first);
        let bytes = 8 * tables.codec().words();
        let changed = first * bytes..(last + 1) * bytes;
        let written = self
            .sectors
            .write(&self.file, offset, &tables.l2_bytes(new), changed)
            .await;
        self.note(written)
    }

    /// Writes the active L1 table in place.
    pub(crate) async fn rewrite_l1(&self, meta: &Meta, new: Vec<u64>) -> Result<(), Error> {
        let mut bytes = l1_bytes(&new);
        bytes.resize(bytes.len().next_multiple_of(self.sectors.align as usize), 0);
        let len = bytes.len();
        let written = self
            .sectors
            .write(&self.file, meta.header.l1_offset, &bytes, 0..len)
            .await;
        self.note(written)?;
        self.with_l1(|l1| *l1 = new);
        Ok(())
    }

    /// The header names this L1 table now, and a device of this size.
    pub(crate) fn switched(&self, tables: &Tables, l1: Vec<u64>, size: u64) -> Result<(), Error> {
        let mut named = Vec::new();
        for index in 0..l1.len() {
            named.extend(tables.l2_offset(&l1, index)?);
        }
        self.metadata
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(named.into_iter().map(|offset| offset >> self.cluster_bits));
        self.with_l1(|active| *active = l1);
        self.l2.forget();
        self.set_size(size);
        Ok(())
    }
}

/// A table of words, as it lies in the file.
pub(crate) fn l1_bytes(l1: &[u64]) -> Vec<u8> {
    l1.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}

/// The entries without the flag COPIED.
pub(crate) fn l1_uncopied(l1: &[u64]) -> Vec<u64> {
    l1.iter().map(|entry| entry & !OFLAG_COPIED).collect()
}
