//! Marked blocks of an image with zones: what is durable of them, and when.
//!
//! A mark is durable before the write that moves a pointer over it, and stays until the data is durable that replaces it:
//! a crash leaves an error or the new data, never what was there before. So the list speaks of nothing but marks that were
//! asked for, and a mark above the end of a sequential zone's data was never in force: opening drops it before the zone
//! takes writes, and so does whatever lets blocks be read that nobody wrote.

use std::ops::Range;

use zbdkit_zone::{Geometry, WritePermit, ZoneRecord, ZoneType};

use super::make::Records;
use super::open::Opening;
use super::{Durability, ZonedNode};
use crate::error::{Error, OpenError};
use crate::marks::MarkList;
use crate::node::Lane;

impl ZonedNode {
    /// Marks the blocks of an admitted write.
    pub(super) async fn store_mark(
        &self,
        lane: &Lane,
        permit: &WritePermit,
        range: Range<u64>,
    ) -> Result<(), Error> {
        let _turn = self.marks.turn().await;
        self.change_marks(|list| list.with(range.clone()), false).await?;
        if permit.slot().is_none() {
            // Where the blocks could be read already, what lies there stays: a read that is under way may not find zeros.
            return Ok(());
        }
        self.child
            .write_zeroes(lane, range.start, range.end - range.start, true)
            .await
    }

    /// What `write` puts into the range can be read, once it is durable. Until then nobody marks blocks: whoever does so after
    /// that write must find its mark kept, and one of before must not come back.
    pub(super) async fn unmark(
        &self,
        range: Range<u64>,
        write: impl Future<Output = Result<(), Error>>,
    ) -> Result<(), Error> {
        if self.marks.first_in(&range).is_none() {
            return write.await;
        }
        let _turn = self.marks.turn().await;
        write.await?;
        self.change_marks(|list| list.without(&range), true).await
    }

    /// Drops the marks in ranges of which nothing can be read.
    pub(super) async fn forget_marks(&self, ranges: &[Range<u64>]) -> Result<(), Error> {
        if ranges.iter().all(|range| self.marks.first_in(range).is_none()) {
            return Ok(());
        }
        let without = |list: &MarkList| {
            // There may be millions of zones, few of which have marks.
            let with_marks = ranges.iter().filter(|range| list.first_in(range).is_some());
            with_marks.fold(list.clone(), |list, range| list.without(range))
        };
        let _turn = self.marks.turn().await;
        self.change_marks(without, false).await
    }

    /// Changes the list, durably, for whoever has its turn; before it, with `data`, what was written to the child becomes durable.
    async fn change_marks(
        &self,
        change: impl FnOnce(&MarkList) -> MarkList,
        data: bool,
    ) -> Result<(), Error> {
        let list = self.marks.after(change)?;
        match &self.durability {
            Durability::Volatile => {}
            Durability::ReadOnly => return Err(Error::ReadOnly),
            Durability::Table { committer, .. } => {
                committer.keep_marks(list.clone(), data, &self.image()).await?;
            }
        }
        self.marks.set(list);
        Ok(())
    }
}

impl Opening<'_> {
    /// The marks that are in force.
    pub(super) fn valid_marks(&self) -> MarkList {
        in_force(self.table.marks(), &self.geometry, &self.records)
    }

    /// Whoever opens the image should know why reads will fail.
    pub(super) fn tell_marks(&mut self) {
        let marks = self.valid_marks();
        if let Some(first) = marks.ranges().first() {
            self.notices.push(format!(
                "{} bytes are marked uncorrectable, the first at offset {}: they cannot be read until they are written again",
                marks.bytes(),
                first.start
            ));
        }
    }

    /// Drops the others, durably: whoever writes there next must be able to read it. Only while the header says that an epoch is
    /// open: the sum of a closed one's generations is that of the list before.
    pub(super) async fn drop_marks(&mut self) -> Result<(), OpenError> {
        match self.valid_marks() == *self.table.marks() {
            true => Ok(()),
            false => self.settle_marks().await,
        }
    }

    /// The same after an unclean end, when both copies of the list become whole, too.
    pub(super) async fn settle_marks(&mut self) -> Result<(), OpenError> {
        if !self.table.has_marks() {
            return Ok(());
        }
        let list = self.valid_marks();
        let failed = |error| self.place.table_error(error);
        self.table.write_marks(&list).await.map_err(failed)?;
        self.table.sync().await.map_err(failed)
    }
}

/// Without the marks above the data of sequential zones.
fn in_force(list: &MarkList, geometry: &Geometry, records: &Records) -> MarkList {
    let empty = ZoneRecord::default();
    let mut kept = list.clone();
    for marked in list.ranges() {
        let zone = geometry.zone_of(marked.start);
        let record = records.get(&zone.0).unwrap_or(&empty);
        let data_end = geometry.data_end(zone, record);
        if geometry.zone_type(zone) != ZoneType::Conventional && marked.end > data_end {
            kept = kept.without(&(data_end..geometry.end(zone)));
        }
    }
    kept
}
