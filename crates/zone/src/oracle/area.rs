//! Random write areas, as naively as the rest.

use super::*;

impl Oracle {
    pub(super) fn area(&self) -> Zrwa {
        self.geometry.zrwa().expect("only where there are areas")
    }

    pub(super) fn admit_in_area(
        &mut self,
        id: u64,
        offset: Option<u64>,
        len: u64,
        zone: ZoneNo,
    ) -> Result<(u64, u64), Refused> {
        let Some(offset) = offset else {
            return Err(E::RandomWriteArea { zone }.into());
        };
        let (zone_start, area) = (self.geometry.start(zone), self.area());
        let start = zone_start + self.zone(zone).pointer;
        let end = start + area.size + area.size;
        if offset < start || offset + len > end {
            return Err(E::OutsideRandomWriteArea {
                zone,
                offset,
                len,
                start,
                end,
            }
            .into());
        }
        let end = zone_start + self.geometry.capacity(zone);
        if offset + len > end {
            return Err(E::ExceedsCapacity {
                zone,
                offset,
                len,
                end,
            }
            .into());
        }
        self.make_open(zone, C::ImplicitlyOpen)?;
        let mut pointer = start;
        while pointer + area.size < offset + len {
            pointer += area.granularity;
        }
        self.clock += 1;
        self.zone(zone).used = self.clock;
        self.zone(zone).pointer = pointer - zone_start;
        self.writes.push(Write {
            id,
            kind: T::SequentialRequired,
            first: zone.0,
            last: zone.0,
            start: offset,
            end: offset + len,
            pointer: Some(pointer - zone_start),
            io_over: false,
            doomed: None,
        });
        Ok((offset, offset))
    }

    /// Moves the pointer of a zone with a random write area; the number is acknowledged like a write.
    pub fn commit_zrwa(&mut self, id: u64, end: u64) -> Result<(), Refused> {
        let size = self.geometry.size();
        if end == 0 || end > size {
            let offset = end.wrapping_sub(1);
            return Err(E::OutOfRange { offset, len: 1, size }.into());
        }
        let zone = self.geometry.zone_of(end - 1);
        let condition = match self.managed(zone) {
            Err(Refused::Zone(error @ (E::Conventional { .. } | E::Offline { .. } | E::ReadOnly { .. }))) => {
                if self.blocked(zone) && !self.geometry.is_conventional(zone) {
                    return Err(Refused::Busy(zone));
                }
                return Err(error.into());
            }
            _ if self.blocked(zone) => return Err(Refused::Busy(zone)),
            other => other?,
        };
        if !self.zone(zone).record.zrwa {
            return Err(E::NotRandomWritable { zone }.into());
        }
        let (zone_start, area) = (self.geometry.start(zone), self.area());
        let capacity_end = zone_start + self.geometry.capacity(zone);
        let start = zone_start + self.zone(zone).pointer;
        let area_end = (start + area.size).min(capacity_end);
        if end <= start || end > area_end {
            return Err(E::OutsideRandomWriteArea {
                zone,
                offset: end,
                len: 0,
                start,
                end: area_end,
            }
            .into());
        }
        if end != capacity_end && !(end - zone_start).is_multiple_of(area.granularity) {
            return Err(E::Unaligned {
                offset: end,
                len: 0,
                granularity: area.granularity as u32,
            }
            .into());
        }
        debug_assert_ne!(condition, C::Empty);
        self.make_open(zone, C::ImplicitlyOpen)?;
        self.clock += 1;
        let clock = self.clock;
        let z = self.zone(zone);
        z.used = clock;
        z.pointer = end - zone_start;
        z.record.written = end - zone_start;
        if end == capacity_end {
            self.fill(zone);
        }
        self.writes.push(Write {
            id,
            kind: T::SequentialRequired,
            first: zone.0,
            last: zone.0,
            start: end,
            end,
            pointer: Some(end - zone_start),
            io_over: true,
            doomed: None,
        });
        Ok(())
    }

    /// The zone is written to its capacity.
    pub(super) fn fill(&mut self, zone: ZoneNo) {
        let z = self.zone(zone);
        z.condition = C::Full;
        z.record.zrwa = false;
        z.record.recommended = z
            .record
            .recommended
            .filter(|what| *what != Recommendation::Finish);
    }

    pub(super) fn area_for(&self, zone: ZoneNo) -> Result<(), E> {
        let has_one = |z: &&Zone| z.record.zrwa || z.reserved.is_some_and(|(_, area)| area);
        let taken = self.zones.iter().filter(has_one).count();
        match self.area().count {
            0 => Ok(()),
            count if taken < count as usize => Ok(()),
            _ => Err(E::NoRandomWriteArea { zone }),
        }
    }

    /// Where zeros begin that nobody has written, absolute.
    pub(super) fn data_end(&self, zone: ZoneNo) -> u64 {
        let record = &self.zones[zone.0 as usize].record;
        let start = self.geometry.start(zone);
        if record.zrwa {
            start + (record.written + self.area().size).min(self.geometry.capacity(zone))
        } else {
            start + record.written
        }
    }
}
