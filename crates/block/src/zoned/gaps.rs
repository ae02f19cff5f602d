//! Skipped gaps of sequential-preferred zones, which are zeroed before the pointer moves over them.
//!
//! The engine admits the write that leaves a gap and from then on counts the gap as below the pointer, where anybody
//! may write. Zeros that are still on their way must not land on such a write, so meanwhile the zone takes none.

use std::sync::Mutex;

use zbdkit_zone::{Refused, WritePermit, ZoneNo};

use super::waiters::{Waiters, lock};

/// Zones whose gap is being zeroed.
#[derive(Default)]
pub struct Gaps {
    zones: Mutex<Vec<ZoneNo>>,
}

impl Gaps {
    /// Admits a write to the zone unless it has to wait. One that leaves a gap closes the zone until [`Gaps::zeroed`].
    pub fn admit(
        &self,
        zone: ZoneNo,
        admit: impl FnOnce() -> Result<WritePermit, Refused>,
    ) -> Result<WritePermit, Refused> {
        let mut zones = lock(&self.zones);
        if zones.contains(&zone) {
            return Err(Refused::Busy(zone));
        }
        let permit = admit()?;
        if permit.gap().is_some() {
            zones.push(zone);
        }
        Ok(permit)
    }

    /// Lets writes in again when the answer is dropped. Whoever has such a write must get it, whatever becomes of the write.
    pub fn zeroed<'a>(&'a self, zone: ZoneNo, waiters: &'a Waiters) -> Zeroed<'a> {
        Zeroed {
            gaps: self,
            zone,
            waiters,
        }
    }
}

/// The zone's gap is being zeroed while this lives.
pub struct Zeroed<'a> {
    gaps: &'a Gaps,
    zone: ZoneNo,
    waiters: &'a Waiters,
}

impl Drop for Zeroed<'_> {
    fn drop(&mut self) {
        lock(&self.gaps.zones).retain(|zone| *zone != self.zone);
        zbdkit_zone::Events::zone_changed(self.waiters, self.zone);
    }
}
