//! Changing the size of the device.
//!
//! What the device is to be is drawn up beside what it is: an L1 table of the right length, a copy of the L2 table and of
//! the cluster where the shorter of the two devices ends, both without what lies behind that end, and L2 tables that
//! hide a backing image which is longer. One write of the header switches to all of it, and only then what lay behind the
//! end is let go. So a power cut finds the old device or the new one, and what is grown reads as zeros from the first
//! moment, whatever lay there: rests of a larger device, the saved state of a guest, the backing image.

use std::ops::Range;
use std::sync::atomic::Ordering;

use zbdkit_io::IoBuf;
use zbdkit_spec::qcow2::MAX_L1_BYTES;

use crate::create::Preallocation;
use crate::error::Error;
use crate::header::Header;
use crate::image::{Meta, Qcow2, own_table};
use crate::l2::{Entry, Kind, SUBCLUSTERS};
use crate::snapshot::incomplete;
use crate::snapshot::switch::l1_bytes;
use crate::snapshot::table;
use crate::snapshot::tree::{Change, Tables};

/// Sizes of devices are multiples of this, bytes.
const SECTOR: u64 = 512;

/// What is to be done.
struct Plan {
    new: u64,
    /// Where the shorter device ends, bytes.
    end: u64,
    /// Clusters of a longer backing image that a larger device would show.
    hidden: Range<u64>,
    /// See [`Qcow2::tail`].
    tail: Option<Vec<u8>>,
}

/// The mapping after the change, and what is not part of it any more.
#[derive(Default)]
struct Draft {
    l1: Vec<u64>,
    /// Where the new L1 table lies; `None` where the active one serves.
    l1_offset: Option<u64>,
    /// Tables that were written to new clusters: offset and length, bytes.
    placed: Vec<(u64, u64)>,
    /// The cluster that holds a copy of the last one.
    tail: Option<u64>,
    /// L1 entries that go with all that they reach.
    goes: Vec<u64>,
    /// The L2 table whose copy is in the draft.
    copied: Option<u64>,
    /// Entries of that table which the copy does not have.
    dropped: Vec<Entry>,
}

impl Qcow2 {
    /// Makes the device larger or smaller. What is grown reads as zeros, and gets its space as `preallocation` says.
    ///
    /// # Errors
    /// As [`Qcow2::resize_with`].
    pub async fn resize(&self, size: u64, shrink: bool, preallocation: Preallocation) -> Result<(), Error> {
        self.resize_with(size, shrink, preallocation, |_| Ok(())).await
    }

    /// The same; `also` may change extensions in the write of the header that does it. No request may be under way.
    ///
    /// # Errors
    /// [`Error::Refused`] where the size cannot be, or is smaller and `shrink` does not allow that;
    /// [`Error::Unsupported`] where the image cannot change its size. Nothing has changed then, and neither after an
    /// error of `also`.
    pub async fn resize_with(
        &self,
        size: u64,
        shrink: bool,
        preallocation: Preallocation,
        also: impl FnOnce(&mut Header) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.check_change(0, 0)?;
        let old = self.size();
        check_size(size, old, shrink, preallocation)?;
        self.flush().await?;
        let plan = Plan {
            new: size,
            end: old.min(size),
            hidden: self.hidden(old, size)?,
            tail: self.tail(old.min(size), size > old).await?,
        };
        let mut meta = self.lock().await;
        self.check_snapshots(&meta.header).await?;
        let data_len = self.grow_data_file(old, size).await?;
        let tables = Tables::new(&self.file, &meta.header);
        let old_l1 = (meta.header.l1_offset, 8 * u64::from(meta.header.l1_size));
        let mut draft = Draft::default();
        let drawn = self.draw(&mut meta, &tables, &mut draft, &plan).await;
        let switched = match drawn {
            Ok(()) => self.switch_size(&mut meta, &draft, size, also).await,
            Err(error) => Err(error),
        };
        if let Err(error) = switched {
            for (offset, len) in &draft.placed {
                self.unplace(&mut meta, *offset, *len);
            }
            draft
                .tail
                .into_iter()
                .for_each(|cluster| meta.free(cluster..cluster + 1));
            if let (Some(data), Some(len)) = (&self.data, data_len) {
                // Longer than the device, it is of no harm either.
                let _ = data.set_len(len);
            }
            return Err(error);
        }
        self.let_go_old(&mut meta, &tables, draft, size, old_l1).await?;
        drop(meta);
        if size < old {
            return self.cut_data_file(size).await;
        }
        let preallocation = match preallocation {
            // Or there would be parts that the image has for zeros, and a reader of the data file may not.
            Preallocation::Off if self.data_raw => Preallocation::Metadata,
            other => other,
        };
        self.preallocate(old..size, preallocation).await?;
        self.flush().await
    }

    /// The header names the draft.
    async fn switch_size(
        &self,
        meta: &mut Meta,
        draft: &Draft,
        size: u64,
        also: impl FnOnce(&mut Header) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.write_header(meta, |header| {
            header.size = size;
            if let Some(offset) = draft.l1_offset {
                header.l1_offset = offset;
                header.l1_size = draft.l1.len() as u32;
            }
            also(header)
        })
        .await
    }

    /// That every snapshot says how large its device was.
    async fn check_snapshots(&self, header: &Header) -> Result<(), Error> {
        if header.nb_snapshots == 0 {
            return Ok(());
        }
        if header.version < 3 {
            return Err(Error::Unsupported(
                "Can't resize a v2 image which has snapshots".into(),
            ));
        }
        let list = table::read(&self.file, header).await?;
        match list.entries.iter().find(|entry| !entry.is_complete()) {
            Some(entry) => Err(incomplete(&entry.snapshot)),
            None => Ok(()),
        }
    }

    /// The contents of the cluster that the end is in, with zeros behind the end, if something else shows there, or would.
    async fn tail(&self, end: u64, grows: bool) -> Result<Option<Vec<u8>>, Error> {
        let start = end & !(self.cluster_size() - 1);
        if start == end || self.data.is_some() {
            return Ok(None);
        }
        let entry = self.entry_of(start >> self.cluster_bits).await?;
        let parts = if self.codec.extended { SUBCLUSTERS } else { 1 };
        let below = self.backing.as_ref().map_or(0, |backing| backing.len());
        let shows = |part| match self.codec.kind(entry, part) {
            Kind::Data | Kind::Compressed | Kind::Invalid => true,
            Kind::Unallocated => grows && below > end,
            Kind::Zero => false,
        };
        if !(0..parts).any(shows) {
            return Ok(None);
        }
        let buf = IoBuf::try_alloc(self.cluster_size() as usize).map_err(|e| Error::io("read", &e))?;
        self.read(buf.slice(0..(end - start) as usize), start).await?;
        Ok(Some(buf.to_vec()))
    }

    async fn entry_of(&self, cluster: u64) -> Result<Entry, Error> {
        let Some(table) = self.table_of(cluster)? else {
            return Ok(Entry::default());
        };
        let (key, index) = self.l2.locate(cluster);
        let words = self.read_slice(table, key).await?;
        let words = &words[index * self.codec.words()..];
        Ok(Entry {
            word: words[0],
            bitmap: if self.codec.extended { words[1] } else { 0 },
        })
    }

    /// Makes the data file as long as a larger device, with zeros in what is grown. How long it was, if it is longer now.
    async fn grow_data_file(&self, old: u64, new: u64) -> Result<Option<u64>, Error> {
        let Some(data) = self.data.as_ref().filter(|_| new > old) else {
            return Ok(None);
        };
        let len = data
            .len()
            .map_err(|e| Error::io("finding the data file's size", &e))?;
        if old < len {
            let zeroed = data
                .zero_range(old, len.min(new.next_multiple_of(self.cluster_size())) - old)
                .await;
            zeroed.map_err(|e| Error::io("zeroing the data file's end", &e))?;
        }
        if len < new {
            data.set_len(new)
                .map_err(|e| Error::io("growing the data file", &e))?;
        }
        self.sync_data().await?;
        Ok((len < new).then_some(len))
    }

    /// Makes the data file as short as the device.
    async fn cut_data_file(&self, size: u64) -> Result<(), Error> {
        let Some(data) = &self.data else { return Ok(()) };
        data.set_len(size)
            .map_err(|e| Error::io("shortening the data file", &e))
    }

    /// Draws the new mapping up. What it takes is in the draft also where it fails.
    async fn draw(
        &self,
        meta: &mut Meta,
        tables: &Tables,
        draft: &mut Draft,
        plan: &Plan,
    ) -> Result<(), Error> {
        // Whatever cluster has room for compressed data may be let go.
        meta.packing = 0..0;
        let needed = meta.header.l1_entries_for(plan.new);
        if needed > MAX_L1_BYTES / 8 {
            return Err(Error::Io {
                op: "growing the L1 table",
                errno: libc::EFBIG,
            });
        }
        let kept = meta.header.l1_entries_for(plan.end) as usize;
        let active = self.with_l1(|l1| l1.clone());
        draft.l1 = active.clone();
        draft.goes = draft.l1.split_off(kept.min(active.len()));
        draft.l1.resize(needed.max(1) as usize, 0);
        let list = table::read(&self.file, &meta.header).await?;
        let fixed = self.fixed(meta, tables, &list)?;
        tables
            .survey(meta.refcounts()?, &draft.goes, Change::Dropped, &fixed)
            .await?;

        if let Some(last) = kept.checked_sub(1) {
            self.draw_last(meta, tables, draft, plan, last).await?;
            fixed.check(tables, &draft.dropped)?;
        }
        for index in kept..needed as usize {
            let mut entries = vec![Entry::default(); 1 << self.l2_bits];
            if self.hide(plan, index, &mut entries) {
                self.place_l2(meta, tables, draft, index, &entries).await?;
            }
        }
        let same = draft.l1.len() <= active.len()
            && draft.l1 == active[..draft.l1.len()]
            && draft.goes.iter().all(|entry| *entry == 0);
        if !same {
            let offset = self.place(meta, &l1_bytes(&draft.l1)).await?;
            draft.placed.push((offset, 8 * draft.l1.len() as u64));
            draft.l1_offset = Some(offset);
        }
        Ok(())
    }

    /// Draws up the L2 table that the end of the shorter device is in.
    async fn draw_last(
        &self,
        meta: &mut Meta,
        tables: &Tables,
        draft: &mut Draft,
        plan: &Plan,
        index: usize,
    ) -> Result<(), Error> {
        let old = match tables.l2_offset(&draft.l1, index)? {
            Some(offset) => tables.l2(offset).await?,
            None => vec![Entry::default(); 1 << self.l2_bits],
        };
        let first = (index as u64) << self.l2_bits;
        let mut new = old.clone();
        let end = (plan.end.div_ceil(self.cluster_size()) - first) as usize;
        for entry in &mut new[end..] {
            if *entry != Entry::default() {
                draft.dropped.push(std::mem::take(entry));
            }
        }
        self.hide(plan, index, &mut new);
        if let Some(contents) = &plan.tail {
            let cluster = self.take(meta, 1).await?.start;
            draft.tail = Some(cluster);
            let offset = cluster << self.cluster_bits;
            let written = self
                .sectors
                .write(&self.file, offset, contents, 0..contents.len())
                .await;
            self.note(written)?;
            let last = (plan.end >> self.cluster_bits) - first;
            let replaced = std::mem::replace(&mut new[last as usize], self.codec.data(offset));
            draft.dropped.push(replaced);
        }
        if new != old {
            draft.copied = tables.l2_offset(&draft.l1, index)?;
            self.place_l2(meta, tables, draft, index, &new).await?;
        }
        Ok(())
    }

    /// Makes zeros of the clusters of an L2 table that must hide the backing image; whether there are any.
    fn hide(&self, plan: &Plan, index: usize, entries: &mut [Entry]) -> bool {
        let first = (index as u64) << self.l2_bits;
        let from = plan.hidden.start.max(first);
        let to = plan.hidden.end.min(first + entries.len() as u64);
        if from >= to {
            return false;
        }
        entries[(from - first) as usize..(to - first) as usize].fill(self.codec.zero());
        true
    }

    /// Writes an L2 table to a new place and names it in the draft.
    async fn place_l2(
        &self,
        meta: &mut Meta,
        tables: &Tables,
        draft: &mut Draft,
        index: usize,
        entries: &[Entry],
    ) -> Result<(), Error> {
        let offset = self.place(meta, &tables.l2_bytes(entries)).await?;
        draft.placed.push((offset, self.cluster_size()));
        draft.l1[index] = own_table(offset);
        Ok(())
    }

    /// The draft is the mapping now; lets go of what it does not have.
    async fn let_go_old(
        &self,
        meta: &mut Meta,
        tables: &Tables,
        draft: Draft,
        size: u64,
        old_l1: (u64, u64),
    ) -> Result<(), Error> {
        if self.data.is_some() {
            // Data may lie there now.
            self.end.fetch_max(size, Ordering::Relaxed);
        }
        if draft.l1_offset.is_none() {
            self.set_size(size);
            return Ok(());
        }
        self.switched(tables, draft.l1, size)?;
        self.let_go(meta, tables, &draft.goes).await?;
        self.let_go_entries(meta, tables, &draft.dropped)?;
        if let Some(offset) = draft.copied {
            meta.free(tables.clusters_of(offset, 1));
        }
        self.unplace(meta, old_l1.0, old_l1.1);
        self.reap(meta).await
    }

    /// The clusters of a longer backing image that a larger device would show.
    fn hidden(&self, old: u64, new: u64) -> Result<Range<u64>, Error> {
        let below = self.backing.as_ref().map_or(0, |backing| backing.len());
        let first = old.div_ceil(self.cluster_size());
        let hidden = first..new.min(below).div_ceil(self.cluster_size()).max(first);
        if self.version < 3 && !hidden.is_empty() {
            return Err(Error::Unsupported(
                "Failed to zero out the new area: the backing image is longer than the device, and an image of version 2 \
                 cannot hide what it holds there"
                    .into(),
            ));
        }
        Ok(hidden)
    }
}

/// Refuses what no device can be, in QEMU's words.
fn check_size(new: u64, old: u64, shrink: bool, preallocation: Preallocation) -> Result<(), Error> {
    let refused = |text: String| Err(Error::Refused(text));
    if !new.is_multiple_of(SECTOR) {
        return refused(format!("The new size must be a multiple of {SECTOR}"));
    }
    if new > i64::MAX as u64 {
        return refused(format!(
            "The new size must be at most {} bytes",
            i64::MAX as u64 / SECTOR * SECTOR
        ));
    }
    if new < old && preallocation != Preallocation::Off {
        return refused("Preallocation can only be used for growing images".into());
    }
    if new < old && !shrink {
        return refused(
            "Use the --shrink option to perform a shrink operation. Shrinking an image deletes all data beyond its new end"
                .into(),
        );
    }
    Ok(())
}
