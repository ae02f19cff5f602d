//! Operations on whole zones: reset, finish, the allocation of random write areas, and what the operator sets. A zone is closed to everybody else, drained,
//! made durable as it will be, and only then is.

use std::future::poll_fn;
use std::task::Poll;

use zbdkit_zone::{ExclusiveOp, ExclusivePermit, ZoneError, ZoneNo, ZoneRecord, ZoneType};

use super::commit::Committer;
use super::waiters::lock;
use super::{Durability, ZonedNode};
use crate::error::Error;
use crate::node::{Lane, ZoneOp};

impl ZonedNode {
    /// Closes the zone to everybody else and waits until nobody is left in it.
    pub(super) async fn begin(
        &self,
        zone: ZoneNo,
        op: ExclusiveOp,
    ) -> Result<Option<ExclusivePermit>, Error> {
        self.admit(|| self.engine.begin(zone, op)).await
    }

    pub(super) async fn drain(&self, permit: &ExclusivePermit) {
        poll_fn(|cx| {
            if self.engine.drained(permit) {
                return Poll::Ready(());
            }
            self.waiters.wait_zone(permit.zone(), cx.waker());
            if self.engine.drained(permit) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }

    /// An operation on a zone: durable, then done.
    async fn exclusive(&self, zone: ZoneNo, op: ExclusiveOp) -> Result<(), Error> {
        self.check_epoch()?;
        let Some(permit) = self.begin(zone, op).await? else {
            // A zone that its writes have filled is full only in so far as they are durable.
            return match &self.durability {
                Durability::Table { committer, .. } if op.is_finish() => {
                    committer.flush(&[], &self.image()).await
                }
                // There was nothing to do. It may have waited until there was not, and the epoch may have failed meanwhile.
                _ => self.check_epoch(),
            };
        };
        self.drain(&permit).await;
        if let Err(error) = self.engine.confirm(&permit) {
            self.engine.abort(permit, &self.waiters);
            return Err(error.into());
        }
        self.finish_exclusive(vec![permit], op).await
    }

    /// The rest of an operation on drained zones.
    pub(super) async fn finish_exclusive(
        &self,
        permits: Vec<ExclusivePermit>,
        op: ExclusiveOp,
    ) -> Result<(), Error> {
        let result = self.make_durable(&self.changes(&permits), op).await;
        self.end(permits, &result);
        result
    }

    /// The records that operations on drained zones will change.
    pub(super) fn changes(&self, permits: &[ExclusivePermit]) -> Vec<(ZoneNo, ZoneRecord)> {
        let after = permits
            .iter()
            .map(|permit| (permit.zone(), self.engine.record_after(permit)));
        after
            .filter(|(zone, record)| *record != self.engine.record(*zone))
            .collect()
    }

    /// Lets requests in again, into zones as the operation leaves them, or as they were where it failed.
    pub(super) fn end(&self, permits: Vec<ExclusivePermit>, result: &Result<(), Error>) {
        for permit in permits {
            match result {
                Ok(()) => self.engine.commit(permit, &self.waiters),
                Err(_) => self.engine.abort(permit, &self.waiters),
            }
        }
    }

    pub(super) async fn make_durable(
        &self,
        records: &[(ZoneNo, ZoneRecord)],
        op: ExclusiveOp,
    ) -> Result<(), Error> {
        if op.allocates() {
            // The flush below syncs these zeros before it writes the record that lets them be read.
            for (zone, _) in records {
                self.zero_above(*zone).await?;
                let geometry = self.engine.geometry();
                let above = geometry.data_end(*zone, &self.engine.record(*zone))..geometry.end(*zone);
                self.forget_marks(&[above]).await?;
            }
        }
        match (&self.durability, op) {
            (Durability::ReadOnly, _) => return Err(Error::ReadOnly),
            // The table alone decides: a word of the run state counts only while its generation is the table's, so
            // a crash finds the zone either as it was or reset and counted.
            (Durability::Table { committer, .. }, ExclusiveOp::Reset | ExclusiveOp::Format) => {
                committer.record(records, &self.image()).await?;
                self.set_run_state(committer, records)?;
            }
            // Here the data comes first: the record must not cover bytes that a power cut could still lose. The
            // written end stays, so the run state knows it.
            (Durability::Table { committer, .. }, _) => committer.flush(records, &self.image()).await?,
            (Durability::Volatile, _) => {}
        }
        if matches!(op, ExclusiveOp::Reset | ExclusiveOp::Format)
            && let Err(error) = self.give_back(records, op).await
        {
            // The table says empty, the engine will not: neither may be believed further.
            if let Durability::Table { committer, .. } = &self.durability {
                committer.fail(error.errno(), &self.waiters);
            }
            return Err(error);
        }
        Ok(())
    }

    pub(super) fn set_run_state(
        &self,
        committer: &Committer,
        records: &[(ZoneNo, ZoneRecord)],
    ) -> Result<(), Error> {
        for (zone, record) in records {
            if let Err(errno) = self.waiters.run_state.set(*zone, record) {
                committer.fail(errno, &self.waiters);
                return Err(Error::Io {
                    op: "writing the run state",
                    errno,
                });
            }
        }
        Ok(())
    }

    /// What is left of reset zones goes, before they take writes again: marks first, which must not meet new data. A format
    /// leaves none anywhere: those that are not in force may not fit the new blocks.
    async fn give_back(&self, records: &[(ZoneNo, ZoneRecord)], op: ExclusiveOp) -> Result<(), Error> {
        let geometry = self.engine.geometry();
        let ranges: Vec<_> = match op {
            ExclusiveOp::Format => std::iter::once(0..geometry.size()).collect(),
            _ => records
                .iter()
                .map(|(zone, _)| geometry.start(*zone)..geometry.end(*zone))
                .collect(),
        };
        self.forget_marks(&ranges).await?;
        self.free(records).await
    }

    /// Gives the space of reset zones back, before they take writes again. Reads do not need it, since nothing
    /// above the written end is read from below; only a sequential-preferred zone, whose writes may leave holes
    /// when they fail, must really be zeros.
    async fn free(&self, records: &[(ZoneNo, ZoneRecord)]) -> Result<(), Error> {
        let geometry = self.engine.geometry();
        let lane = Lane::new(None, 0);
        let mut zones = records.iter().map(|(zone, _)| *zone).peekable();
        while let Some(first) = zones.next() {
            let mut last = first;
            while let Some(next) = zones.next_if(|next| next.0 == last.0 + 1) {
                last = next;
            }
            let range = geometry.start(first)..geometry.end(last);
            if geometry.zone_type(first) == ZoneType::SequentialPreferred {
                let len = range.end - range.start;
                self.child.write_zeroes(&lane, range.start, len, true).await?;
            } else if let Err(error) = self.child.release(range).await {
                tracing::warn!("the space of zone {first} could not be given back: {error}");
            }
        }
        Ok(())
    }

    fn zone_at(&self, zone_start: u64) -> Result<ZoneNo, Error> {
        Ok(self.engine.geometry().zone_at(zone_start)?)
    }

    pub(super) async fn manage(&self, op: ZoneOp, zone_start: u64) -> Result<(), Error> {
        let zone = self.zone_at(zone_start)?;
        self.operate(op, zone).await?;
        if op.is_operators() {
            // Not under the lock: a watcher may look at the device.
            let watchers = lock(&self.watchers).clone();
            watchers.iter().for_each(|watcher| watcher(zone));
        }
        Ok(())
    }

    async fn operate(&self, op: ZoneOp, zone: ZoneNo) -> Result<(), Error> {
        match op {
            ZoneOp::Open => {
                self.check_epoch()?;
                self.admit(|| self.engine.open(zone)).await
            }
            ZoneOp::Close(empty) => {
                self.check_epoch()?;
                self.admit(|| self.engine.close(zone, empty)).await
            }
            ZoneOp::Finish => self.exclusive(zone, ExclusiveOp::Finish).await,
            ZoneOp::FinishUnlimited => self.exclusive(zone, ExclusiveOp::FinishUnlimited).await,
            ZoneOp::Reset => self.exclusive(zone, ExclusiveOp::Reset).await,
            ZoneOp::SetReadOnly => self.exclusive(zone, ExclusiveOp::SetReadOnly).await,
            ZoneOp::SetOffline => self.exclusive(zone, ExclusiveOp::SetOffline).await,
            ZoneOp::SetNormal => self.exclusive(zone, ExclusiveOp::SetNormal).await,
            ZoneOp::OpenZrwa if self.engine.geometry().zrwa().is_none() => {
                Err(Error::NotSupported("a zone random write area"))
            }
            ZoneOp::OpenZrwa => self.exclusive(zone, ExclusiveOp::OpenZrwa).await,
            ZoneOp::FinishByDevice => self.exclusive(zone, ExclusiveOp::FinishByDevice).await,
            ZoneOp::Recommend(what) => self.exclusive(zone, ExclusiveOp::Recommend(what)).await,
        }
    }

    /// One operation, made durable by one write of the table.
    pub(super) async fn reset_every_zone(&self) -> Result<(), Error> {
        let permits = self.close_every_zone(ExclusiveOp::Reset).await?;
        self.finish_exclusive(permits, ExclusiveOp::Reset).await
    }

    /// Closes all sequential zones, in ascending order (so that two operations on all cannot block each other), and drains
    /// them; those to which the operation has nothing to do, or which it cannot change, are left alone.
    pub(super) async fn close_every_zone(&self, op: ExclusiveOp) -> Result<Vec<ExclusivePermit>, Error> {
        self.check_epoch()?;
        let mut permits = Vec::new();
        let mut failed = None;
        for zone in self
            .engine
            .geometry()
            .zones()
            .skip(self.engine.geometry().nr_conventional() as usize)
        {
            match self.begin(zone, op).await {
                Ok(permit) => permits.extend(permit),
                // Not to be reset: passed over.
                Err(Error::Zone(ZoneError::ReadOnly { .. } | ZoneError::Offline { .. })) => {}
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        for permit in &permits {
            self.drain(permit).await;
        }
        match failed {
            None => Ok(permits),
            Some(error) => {
                let held = permits.into_iter();
                held.for_each(|permit| self.engine.abort(permit, &self.waiters));
                Err(error)
            }
        }
    }
}
