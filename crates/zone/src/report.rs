//! What can be seen of the zones: reports for the doors, records for what persists.

use std::ops::ControlFlow;

use crate::engine::Engine;
use crate::types::{Condition, Filter, ZoneInfo, ZoneNo, ZoneRecord};

impl Engine {
    /// What a report shows of one zone.
    pub fn info(&self, zone: ZoneNo) -> ZoneInfo {
        let start = self.geometry.start(zone);
        let capacity = self.geometry.capacity(zone);
        let z = self.lock(zone);
        let condition = z.condition();
        ZoneInfo {
            zone,
            start,
            len: self.geometry.len(zone),
            capacity,
            wp: start
                + if condition == Condition::Full {
                    capacity
                } else {
                    z.done
                },
            written_end: start + self.data_len(&z),
            kind: self.geometry.zone_type(zone),
            condition,
            counters: z.counters(),
            attributes: z.attributes(),
        }
    }

    /// What persists of one zone.
    pub fn record(&self, zone: ZoneNo) -> ZoneRecord {
        self.lock(zone).record()
    }

    /// Shows the zones that match, in order, from the one that contains `from_offset`, until the sink breaks.
    /// None where the offset lies beyond the device. Each zone is shown as it is at its turn.
    pub fn report(
        &self,
        from_offset: u64,
        filter: Filter,
        sink: &mut dyn FnMut(ZoneInfo) -> ControlFlow<()>,
    ) {
        for zone in (self.geometry.zone_of(from_offset).0..self.geometry.nr_zones()).map(ZoneNo) {
            let info = self.info(zone);
            if filter.matches(info.condition) && sink(info).is_break() {
                return;
            }
        }
    }

    /// Names each zone whose record changed since the last call, in ascending order. A change that comes
    /// during the call is named by this one or by the next. Callers take turns: a change is named to one of
    /// them only.
    ///
    /// A zone that an exclusive operation has is named too, with its record before the commit. Whoever stores
    /// both must not let that one overwrite [`Engine::record_after`].
    pub fn take_dirty(&self, sink: &mut dyn FnMut(ZoneNo, ZoneRecord)) {
        self.dirty.take(|zone| sink(zone, self.record(zone)));
    }

    /// Forgets that the zone's record changed. For whoever stores [`Engine::record_after`] of a drained zone:
    /// the record from before the commit must not be stored after it.
    pub fn clear_dirty(&self, zone: ZoneNo) {
        self.dirty.clear(zone);
    }
}
