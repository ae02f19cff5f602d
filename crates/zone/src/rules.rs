//! Rules that need no engine: whoever keeps the state of a zone elsewhere, as a real drive does, asks them directly.

use crate::error::ZoneError;
use crate::geometry::Zrwa;
use crate::types::{Condition, ZoneNo, ZoneType};

/// What decides whether a sequential-required zone takes a write. Positions are absolute bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Writable {
    /// The zone.
    pub zone: ZoneNo,
    /// Its condition.
    pub condition: Condition,
    /// Where the next write must start, the writes in flight taken into account.
    pub wp: u64,
    /// The end of its writable bytes.
    pub end: u64,
}

impl Writable {
    /// Where a write of `len` bytes at `offset` goes, or an append, which goes wherever it is put. Range, alignment and the
    /// zone's boundary were checked before; resources are not looked at.
    ///
    /// # Errors
    /// The first rule that it breaks: offline, read-only, full, not at the write pointer, beyond the capacity.
    pub fn place(&self, offset: Option<u64>, len: u64) -> Result<u64, ZoneError> {
        let Writable { zone, wp, end, .. } = *self;
        writable(zone, self.condition)?;
        if self.condition == Condition::Full {
            return Err(ZoneError::Full { zone });
        }
        let offset = offset.unwrap_or(wp);
        if offset != wp {
            return Err(ZoneError::NotAtWritePointer { zone, offset, wp });
        }
        if len > end.saturating_sub(wp) {
            return Err(ZoneError::ExceedsCapacity {
                zone,
                offset,
                len,
                end,
            });
        }
        Ok(offset)
    }
}

impl Writable {
    /// The same in a zone with a random write area, which begins at `wp`: anywhere in it, or in the region of its size behind
    /// it. Nobody could tell where an append goes.
    ///
    /// # Errors
    /// The first rule that it breaks: offline, read-only, full, an append, outside of the area, beyond the capacity.
    pub fn place_in_area(&self, offset: Option<u64>, len: u64, area: Zrwa) -> Result<u64, ZoneError> {
        let Writable { zone, wp, end, .. } = *self;
        writable(zone, self.condition)?;
        if self.condition == Condition::Full {
            return Err(ZoneError::Full { zone });
        }
        let offset = offset.ok_or(ZoneError::RandomWriteArea { zone })?;
        let reach = wp.saturating_add(area.size.saturating_mul(2));
        let last = offset.saturating_add(len);
        if offset < wp || last > reach {
            return Err(ZoneError::OutsideRandomWriteArea {
                zone,
                offset,
                len,
                start: wp,
                end: reach,
            });
        }
        if last > end {
            return Err(ZoneError::ExceedsCapacity {
                zone,
                offset,
                len,
                end,
            });
        }
        Ok(offset)
    }

    /// That a commit can move the pointer to `to` in a zone with a random write area: in it or to its end, by whole granules of
    /// the zone, which begins at `start`, or to the end of its writable bytes.
    ///
    /// # Errors
    /// The first rule that it breaks: offline, read-only, full, outside of the area, not whole granules.
    pub fn commits(&self, start: u64, to: u64, area: Zrwa) -> Result<(), ZoneError> {
        let Writable { zone, wp, end, .. } = *self;
        writable(zone, self.condition)?;
        if self.condition == Condition::Full {
            return Err(ZoneError::Full { zone });
        }
        let area_end = wp.saturating_add(area.size).min(end);
        if to <= wp || to > area_end {
            return Err(ZoneError::OutsideRandomWriteArea {
                zone,
                offset: to,
                len: 0,
                start: wp,
                end: area_end,
            });
        }
        if !(to - start).is_multiple_of(area.granularity) && to != end {
            return Err(ZoneError::Unaligned {
                offset: to,
                len: 0,
                granularity: u32::try_from(area.granularity).unwrap_or(u32::MAX),
            });
        }
        Ok(())
    }
}

/// What a device says of zone appends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appends {
    /// The longest one in bytes; 0 where there are none.
    pub max: u64,
    /// They are multiples of this many bytes, a power of two.
    pub granularity: u32,
}

impl Appends {
    /// That `len` bytes can be appended to a zone of that type, whatever its state.
    ///
    /// # Errors
    /// The first rule that it breaks: conventional, not sequential-required, no append, alignment, too large.
    pub fn check(&self, zone: ZoneNo, kind: ZoneType, start: u64, len: u64) -> Result<(), ZoneError> {
        match kind {
            ZoneType::Conventional => return Err(ZoneError::Conventional { zone }),
            ZoneType::SequentialPreferred => return Err(ZoneError::NotSequentialRequired { zone }),
            ZoneType::SequentialRequired => {}
        }
        let max = self.max;
        if max == 0 {
            return Err(ZoneError::AppendUnsupported);
        }
        blocks(start, len, self.granularity)?;
        if len > max {
            return Err(ZoneError::AppendTooLarge { len, max });
        }
        Ok(())
    }
}

/// That a range is some whole blocks of `granularity` bytes, a power of two.
///
/// # Errors
/// `Unaligned`, also where the length is 0.
pub fn blocks(offset: u64, len: u64, granularity: u32) -> Result<(), ZoneError> {
    if len == 0 || (offset | len) & u64::from(granularity - 1) != 0 {
        return Err(ZoneError::Unaligned {
            offset,
            len,
            granularity,
        });
    }
    Ok(())
}

/// That a zone in this condition takes writes, if it has room.
pub(crate) fn writable(zone: ZoneNo, condition: Condition) -> Result<(), ZoneError> {
    match condition {
        Condition::Offline => Err(ZoneError::Offline { zone }),
        Condition::ReadOnly => Err(ZoneError::ReadOnly { zone }),
        _ => Ok(()),
    }
}
