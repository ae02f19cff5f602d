//! The change from the last epoch to the next: what was found is made durable, the old epoch ends, a new one begins.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use zbdkit_spec::sidecar::{Header, OPEN, OPEN_SYNC};
use zbdkit_zone::{ZoneNo, ZoneType};

use super::open::{Opening, RunStateMode};
use super::place::{Place, host_error};
use super::run_state::{RunState, file_stamp};
use crate::error::OpenError;
use crate::node::Lane;

impl Opening<'_> {
    /// Makes durable what this opening found, so that nothing older can come back: what a killed process left in
    /// the page cache counts from now on.
    pub(super) async fn settle(&mut self, recovered: bool) -> Result<(), OpenError> {
        for (zone, _) in self.records.iter().filter(|(_, record)| record.zrwa) {
            let zone = ZoneNo(*zone);
            let range = self.geometry.start(zone)..self.geometry.end(zone);
            self.child.write_anywhere(range).await?;
        }
        self.child.flush().await?;
        let place = &self.place;
        let failed = |error| place.table_error(error);
        if self.table.header().open != 0 {
            self.table.rewrite().await.map_err(failed)?;
            self.table.sync().await.map_err(failed)?;
            self.table.restore().await.map_err(failed)?;
        }
        self.table.sync().await.map_err(failed)?;
        if recovered {
            self.table.write(&self.records).await.map_err(failed)?;
            self.table.sync().await.map_err(failed)?;
        }
        // Only now that no older pointer can come back, and before the next one is written over it.
        if self.table.header().open != 0 {
            self.zero_above_pointers().await?;
            self.child.flush().await?;
            self.settle_marks().await?;
        }
        let failed = |error| self.place.table_error(error);
        if let Some(mirror) = &mut self.mirror
            && mirror.repair(&self.records).await.map_err(failed)? != 0
        {
            // Before the header says that the epoch is closed: then the two tables say the same.
            self.table.sync().await.map_err(failed)?;
        }
        Ok(())
    }

    /// In a sequential-preferred zone the pointer may pass a write in flight, and if that one fails, what was there
    /// before shows. A random write area moves over blocks that nobody writes. A crash leaves there what it lost, or what
    /// a reset had not yet freed: zeros must be there.
    async fn zero_above_pointers(&self) -> Result<(), OpenError> {
        let lane = Lane::new(None, 0);
        for zone in self.geometry.zones() {
            let record = self.records.get(&zone.0).copied().unwrap_or_default();
            if self.geometry.zone_type(zone) != ZoneType::SequentialPreferred && !record.zrwa {
                continue;
            }
            let (start, end) = (self.geometry.data_end(zone, &record), self.geometry.end(zone));
            if start < end {
                self.child.write_zeroes(&lane, start, end - start, true).await?;
            }
        }
        Ok(())
    }

    /// Ends the last epoch in the image, makes the new one's run state, then records the new epoch in the image.
    pub(super) async fn begin_epoch(&mut self) -> Result<RunState, OpenError> {
        let name = match self.run_state {
            RunStateMode::Beside => Some(PathBuf::from(self.place.run_state_name())),
            RunStateMode::In(dir) => {
                let dir = std::path::absolute(dir).map_err(|e| OpenError::file(dir, "is no directory", e))?;
                Some(dir.join(self.place.run_state_name_among_others(self.table_id)))
            }
            RunStateMode::Sync | RunStateMode::None => None,
        };
        let bytes = name.as_ref().map_or(&b""[..], |name| name.as_os_str().as_bytes());
        if bytes.len() > self.table.header().place.len() {
            return Err(self
                .place
                .error("the path of the run state is too long (more than 1024 bytes)"));
        }
        let epoch = self.table.header().epoch.get() + 1;
        let data_file = file_stamp(self.data_id);
        let lost_epoch = self.lost.unwrap_or(0);
        // What the last epoch left is in the table by now. A kill before the header names the next one must not find
        // an epoch open whose run state is gone already: that would look like a loss.
        if self.table.header().open != 0 {
            let sum = self.table.generation_sum();
            self.update_header(|header| {
                header.open = 0;
                header.lost_epoch = lost_epoch.into();
                header.generation_sum = sum.into();
            })
            .await?;
        }
        if let Some(old) = self.recovered_from.take()
            && name
                .as_ref()
                .is_none_or(|name| self.place.directory().join(name) != old)
        {
            // Where the mode or the place was changed since, nobody else would; a failure leaves a file to spare.
            let _ = self.host.remove(&old);
        }
        let run_state = match name {
            None => RunState::None,
            Some(ref name) => {
                let place = self.place.directory().join(name);
                let records = self.records.iter().map(|(zone, record)| (ZoneNo(*zone), record));
                RunState::create(self.host, &place, &self.stamp(epoch)?, records)
                    .await
                    .map_err(|e| host_error(&place, "the run state cannot be created", e))?
            }
        };
        let open = if *self.run_state == RunStateMode::Sync {
            OPEN_SYNC
        } else {
            OPEN
        };
        self.update_header(|header| {
            header.epoch = epoch.into();
            header.lost_epoch = lost_epoch.into();
            header.open = open;
            header.data_file = data_file;
            header.place_len = (bytes.len() as u16).into();
            header.place.fill(0);
            header.place[..bytes.len()].copy_from_slice(bytes);
        })
        .await?;
        if let (Place::Sidecar(_), Some(data)) = (&self.place, self.child.file()) {
            // A copied image has no identity attached yet.
            self.host.set_image_id(data, self.table.header().uuid);
        }
        Ok(run_state)
    }

    /// Changes the header and syncs it.
    async fn update_header(&mut self, change: impl FnOnce(&mut Header)) -> Result<(), OpenError> {
        let failed = |error| self.place.table_error(error);
        let written = self.table.update_header(change).await;
        written.map_err(failed)?;
        self.table.sync().await.map_err(failed)
    }
}
