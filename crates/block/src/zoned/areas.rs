//! What only Zoned Namespaces have: random write areas (ZRWA) and zone descriptor extensions.

use zbdkit_zone::{ExclusiveOp, ZoneNo};

use super::extensions::{Slots, checksum};
use super::table::TableError;
use super::{Durability, ZonedNode};
use crate::error::Error;
use crate::node::Lane;

impl ZonedNode {
    /// Makes what lies above a zone's written end zeros in the child, where failed writes and what a reset could not give
    /// back may have left something: in an area blocks are read that were never written. Not synced.
    pub(super) async fn zero_above(&self, zone: ZoneNo) -> Result<(), Error> {
        let geometry = self.engine.geometry();
        let start = geometry.data_end(zone, &self.engine.record(zone));
        let end = geometry.start(zone) + geometry.capacity(zone);
        self.child
            .write_anywhere(geometry.start(zone)..geometry.end(zone))
            .await?;
        let lane = Lane::new(None, 0);
        let zeroed = self.child.write_zeroes(&lane, start, end - start, true).await;
        lane.quiet().await;
        zeroed
    }

    /// Where the descriptor extensions lie, if it is in a file.
    pub(crate) fn slots(&self) -> Option<&Slots> {
        self.extensions.slots()
    }

    /// As [`Node::commit_zrwa`](crate::Node::commit_zrwa).
    pub(super) async fn commit_area(&self, end: u64) -> Result<(), Error> {
        let Some(area) = self.engine.geometry().zrwa() else {
            return Err(Error::NotSupported("a zone random write area"));
        };
        if !area.explicit_commit {
            return Err(Error::NotSupported(
                "moving the pointer of a random write area by command",
            ));
        }
        self.check_epoch()?;
        let prefix = self.admit(|| self.engine.commit_zrwa(end, &self.waiters)).await?;
        let safe = self.publish(prefix.zone()).await;
        let safe = safe.and_then(|()| self.check_epoch());
        let outcome = safe.as_ref().map(|_| ()).map_err(Error::errno);
        self.engine.acknowledge(prefix, outcome, &self.waiters);
        safe
    }

    /// As [`Node::set_extension`](crate::Node::set_extension).
    pub(super) async fn attach(&self, zone_start: u64, extension: &[u8], zrwa: bool) -> Result<(), Error> {
        let geometry = self.engine.geometry();
        let (zone, size) = (geometry.zone_at(zone_start)?, geometry.extension_size());
        if size == 0 {
            return Err(Error::NotSupported("zone descriptor extensions"));
        }
        if zrwa && geometry.zrwa().is_none() {
            return Err(Error::NotSupported("a zone random write area"));
        }
        let mut whole = extension.to_vec();
        whole.resize(size as usize, 0);
        if extension.len() > whole.len() {
            return Err(Error::OutOfRange {
                offset: 0,
                len: extension.len() as u64,
                size: size.into(),
            });
        }
        self.check_epoch()?;
        let op = ExclusiveOp::SetExtension {
            checksum: checksum(&whole),
            zrwa,
        };
        let Some(permit) = self.begin(zone, op).await? else {
            return Ok(());
        };
        self.drain(&permit).await;
        // Once more: where another one failed with the epoch, its record may be there nevertheless.
        let kept = match self.check_epoch() {
            // Before the record that speaks of them. No other record does: the zone was empty.
            Ok(()) => self.keep_extension(zone, &whole).await,
            Err(error) => Err(error),
        };
        if let Err(error) = kept {
            self.engine.abort(permit, &self.waiters);
            return Err(error);
        }
        self.finish_exclusive(vec![permit], op).await
    }

    /// Makes a zone's extension durable before any record speaks of it.
    pub(crate) async fn keep_extension(&self, zone: ZoneNo, extension: &[u8]) -> Result<(), Error> {
        let written = self.extensions.write(zone, extension).await;
        written.map_err(|error| failed("writing a zone descriptor extension", &error))?;
        match &self.durability {
            Durability::Table { committer, .. } => committer.sync_slots(&self.image()).await,
            Durability::Volatile | Durability::ReadOnly => Ok(()),
        }
    }

    /// As [`Node::extension`](crate::Node::extension).
    pub(crate) async fn extension_of(&self, zone: ZoneNo) -> Result<Option<Vec<u8>>, Error> {
        if self.engine.geometry().extension_size() == 0 {
            return Err(Error::NotSupported("zone descriptor extensions"));
        }
        loop {
            let Some(wanted) = self.engine.record(zone).extension else {
                return Ok(None);
            };
            let found = self.extensions.read(zone).await;
            let found = found.map_err(|error| failed("reading a zone descriptor extension", &error))?;
            if found.as_ref().is_some_and(|bytes| checksum(bytes) == wanted) {
                return Ok(found);
            }
            // The zone may have been reset meanwhile, and have another one now.
            if self.engine.record(zone).extension == Some(wanted) {
                return Err(Error::Io {
                    op: "holding a zone descriptor extension against its checksum",
                    errno: libc::EIO,
                });
            }
        }
    }
}

fn failed(op: &'static str, error: &TableError) -> Error {
    match error {
        TableError::Io(_, source) => Error::io(op, source),
        _ => Error::Io { op, errno: libc::EIO },
    }
}
