//! What tools do below the zones: they see what the bytes consist of, copy them in any order, and install zone records.

use std::ops::Range;

use zbdkit_zone::{RecordError, ZoneNo, ZoneRecord};

use super::{Durability, ZonedNode};
use crate::error::Error;
use crate::node::{MapExtent, Node};

/// Records of one durable write of the table: a device may have millions of zones.
const BATCH: usize = 1 << 16;

impl ZonedNode {
    /// The node that holds the bytes.
    pub(crate) fn child(&self) -> &dyn Node {
        &*self.child
    }

    /// As [`Node::map`]: the child's extents below the written ends, zeros above them.
    pub(super) async fn map_zones(&self, offset: u64, len: u64) -> Result<MapExtent, Error> {
        let geometry = self.engine.geometry();
        let end = offset + len;
        let zone = geometry.zone_of(offset);
        if geometry.is_conventional(zone) {
            let conventional = geometry.start(ZoneNo(geometry.nr_conventional()));
            return self.map_data(offset..end.min(conventional)).await;
        }
        let data_end = geometry.data_end(zone, &self.engine.record(zone));
        if offset < data_end {
            return self.map_data(offset..end.min(data_end)).await;
        }
        let with_data = (zone.0 + 1..geometry.nr_zones())
            .map(ZoneNo)
            .take_while(|zone| geometry.start(*zone) < end)
            .find(|zone| geometry.data_end(*zone, &self.engine.record(*zone)) != geometry.start(*zone));
        let zeros_end = with_data.map_or(end, |zone| geometry.start(zone));
        Ok(MapExtent::zeros(zeros_end - offset))
    }

    /// The child's extents; marked blocks are something that must be read, which fails.
    async fn map_data(&self, range: Range<u64>) -> Result<MapExtent, Error> {
        let end = match self.marks.first_in(&range) {
            Some(marked) if marked.start == range.start => {
                return Ok(MapExtent::unknown(marked.end - marked.start));
            }
            Some(marked) => marked.start,
            None => range.end,
        };
        self.child.map(range.start, end - range.start).await
    }

    /// Puts records in the place of what zones hold: the child's bytes are made durable, then the records, then they
    /// count. No request may be in flight.
    pub(crate) async fn restore(&self, records: &[(ZoneNo, ZoneRecord)]) -> Result<(), Error> {
        self.check_epoch()?;
        for (zone, record) in records {
            self.engine.check(*zone, record).map_err(impossible)?;
            if record.zrwa {
                let geometry = self.engine.geometry();
                let range = geometry.start(*zone)..geometry.end(*zone);
                self.child.write_anywhere(range).await?;
            }
        }
        for batch in records.chunks(BATCH) {
            match &self.durability {
                Durability::ReadOnly => return Err(Error::ReadOnly),
                Durability::Table { committer, .. } => {
                    committer.flush(batch, &self.image()).await?;
                    self.set_run_state(committer, batch)?;
                }
                Durability::Volatile => {}
            }
            for (zone, record) in batch {
                self.engine.restore(*zone, record).map_err(impossible)?;
            }
        }
        Ok(())
    }
}

/// A record that no zone of this device can have: the tool should have looked before.
fn impossible(_: RecordError) -> Error {
    Error::Io {
        op: "installing a zone record",
        errno: libc::EINVAL,
    }
}
