//! What becomes of the zones when an image is copied.

use std::collections::BTreeMap;
use std::ops::Range;

use zbdkit_zone::{Counters, Engine, Geometry, ZoneNo, ZoneRecord};

use super::ToolError;
use crate::device::Device;

/// What became of the zones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopiedZones {
    /// There were none, and there are none.
    None,
    /// The target's zones are as the source's.
    Kept,
    /// The target has none.
    Dropped,
    /// The source had none: the target's sequential zones were filled from their starts.
    Filled {
        /// So many zones have data.
        written: u32,
        /// So many of them were finished, as more would be partly written than the active limit allows.
        finished: u32,
    },
}

/// What will become of them.
#[derive(Clone, Copy)]
pub enum Plan {
    Nothing,
    Drop,
    Keep,
    Fill(Geometry),
}

/// Whether the zones are kept by something that this process has no hold of.
fn is_drive(device: &Device) -> bool {
    device.limits().zoned.is_some() && device.engine().is_none()
}

impl Plan {
    pub fn new(source: &Device, target: &Device) -> Result<Plan, ToolError> {
        if is_drive(target) {
            return Err(ToolError::Refused(
                "a drive's zones are not set by a copy: its zones take writes at their pointers only".into(),
            ));
        }
        if is_drive(source) && target.limits().zoned.is_some() {
            return Err(ToolError::Refused(
                "a drive's zones cannot be copied, only its contents: to an image without zones (-o zone.mode=none)"
                    .into(),
            ));
        }
        match (source.engine(), target.engine()) {
            (None, None) => Ok(Plan::Nothing),
            (Some(_), None) => Ok(Plan::Drop),
            (None, Some(engine)) => Ok(Plan::Fill(*engine.geometry())),
            (Some(from), Some(to)) => {
                if let Some(problem) = misfit(from.geometry(), to.geometry()) {
                    return Err(ToolError::Refused(problem));
                }
                // Before anything is copied for nothing.
                check_records(from, to)?;
                Ok(Plan::Keep)
            }
        }
    }

    /// Where data ends must be found out if zones are to be filled.
    pub fn ends(&self) -> Option<ZoneEnds> {
        match self {
            Plan::Fill(geometry) => Some(ZoneEnds {
                geometry: *geometry,
                ends: BTreeMap::new(),
            }),
            _ => None,
        }
    }

    /// Empties the zones of a target that is about to be overwritten: no pointer covers what is not copied yet.
    pub async fn empty(&self, target: &Device) -> Result<(), ToolError> {
        if let Plan::Keep | Plan::Fill(_) = self {
            install(target, |_| ZoneRecord::default()).await?;
        }
        Ok(())
    }

    /// Gives the target its zones, once all the bytes are there.
    pub async fn install(
        &self,
        source: &Device,
        target: &Device,
        ends: Option<ZoneEnds>,
    ) -> Result<CopiedZones, ToolError> {
        match (self, source.engine(), ends) {
            (Plan::Keep, Some(from), _) => {
                let nr_zones = from.geometry().nr_zones();
                copy_extensions(source, target).await?;
                install(target, |zone| match zone.0 < nr_zones {
                    true => from.record(zone),
                    false => ZoneRecord::default(),
                })
                .await?;
                Ok(CopiedZones::Kept)
            }
            (Plan::Fill(_), _, Some(ends)) => {
                let filled = ends.records();
                install(target, |zone| filled.get(&zone.0).copied().unwrap_or_default()).await?;
                Ok(CopiedZones::Filled {
                    written: filled.len() as u32,
                    finished: filled.values().filter(|record| record.finished).count() as u32,
                })
            }
            (Plan::Drop, ..) => Ok(CopiedZones::Dropped),
            _ => Ok(CopiedZones::None),
        }
    }
}

/// Gives each zone its record, where it has another one.
pub async fn install(target: &Device, mut record: impl FnMut(ZoneNo) -> ZoneRecord) -> Result<(), ToolError> {
    let Some(engine) = target.engine() else {
        return Ok(());
    };
    let changes: Vec<_> = engine
        .geometry()
        .zones()
        .map(|zone| (zone, record(zone)))
        .filter(|(zone, record)| engine.record(*zone) != *record)
        .collect();
    let installed = target.restore(&changes).await;
    installed.map_err(ToolError::request("writing the target's zone table", 0))
}

/// Gives the target the bytes of the source's descriptor extensions, durably, before any of its records speaks of them. A
/// zone that has the same one keeps it; no other extension of the target may be in force where the source has one.
pub async fn copy_extensions(source: &Device, target: &Device) -> Result<(), ToolError> {
    let (Some(from), Some(to)) = (source.engine(), target.engine()) else {
        return Ok(());
    };
    for zone in from.geometry().zones() {
        let wanted = from.record(zone).extension;
        if wanted.is_none() || to.record(zone).extension == wanted {
            continue;
        }
        let start = from.geometry().start(zone);
        let bytes = source.extension(start).await;
        let bytes = bytes.map_err(ToolError::request("reading a zone descriptor extension", start))?;
        let kept = target.keep_extension(zone, &bytes.unwrap_or_default()).await;
        kept.map_err(ToolError::request("writing a zone descriptor extension", start))?;
    }
    Ok(())
}

/// That each zone of a device can become the same one of another.
pub fn check_records(from: &Engine, to: &Engine) -> Result<(), ToolError> {
    let refused = |why: String| Err(ToolError::Refused(format!("the zones do not fit: {why}")));
    let (here, there) = (from.geometry(), to.geometry());
    for zone in here.zones() {
        let record = from.record(zone);
        if let Err(error) = to.check(zone, &record) {
            return refused(error.to_string());
        }
        if record.zrwa && here.zrwa().map(|area| area.size) != there.zrwa().map(|area| area.size) {
            return refused(format!(
                "zone {zone} has a random write area, and areas of the target have another size"
            ));
        }
        if record.extension.is_some() && here.extension_size() != there.extension_size() {
            return refused(format!(
                "zone {zone} has a descriptor extension, and those of the target have another size"
            ));
        }
    }
    Ok(())
}

/// Why the zones of one device cannot become those of another.
pub fn misfit(from: &Geometry, to: &Geometry) -> Option<String> {
    let differs = |what: &str, from: u64, to: u64| {
        (from != to).then(|| {
            format!(
                "the source's zones cannot become the target's: the {what} is {from} in the source and {to} in the \
                 target; leave that option out, or drop the zones first by copying to an image without"
            )
        })
    };
    differs("zone size", from.zone_size(), to.zone_size())
        .or_else(|| differs("zone capacity", from.zone_capacity(), to.zone_capacity()))
        .or_else(|| {
            differs(
                "number of conventional zones",
                from.nr_conventional().into(),
                to.nr_conventional().into(),
            )
        })
}

/// Where the data of a device without zones ends in each zone that it is to have.
pub struct ZoneEnds {
    geometry: Geometry,
    /// Of zones with data: bytes from the zone's start.
    ends: BTreeMap<u32, u64>,
}

impl ZoneEnds {
    /// There is data in a range.
    pub fn note(&mut self, data: Range<u64>) -> Result<(), ToolError> {
        let mut at = data.start;
        while at < data.end {
            let zone = self.geometry.zone_of(at);
            let (start, end) = (self.geometry.start(zone), data.end.min(self.geometry.end(zone)));
            at = end;
            if self.geometry.is_conventional(zone) {
                continue;
            }
            let capacity = self.geometry.capacity(zone);
            if end - start > capacity {
                return Err(ToolError::Refused(format!(
                    "the source has data up to offset {end}, but zone {zone} can be written only up to {}: its \
                     capacity is {capacity} bytes; make the capacity as large as the zones are",
                    start + capacity
                )));
            }
            let known = self.ends.entry(zone.0).or_default();
            *known = (*known).max(end - start);
        }
        Ok(())
    }

    /// The records of the zones that have data: written up to the end of their last block with data. Where more would
    /// be partly written than may be active, those are finished: no device could have got them otherwise.
    fn records(&self) -> BTreeMap<u32, ZoneRecord> {
        let block = u64::from(self.geometry.block_size());
        let written = |(zone, end): (&u32, &u64)| (*zone, end.next_multiple_of(block));
        let written: BTreeMap<u32, u64> = self.ends.iter().map(written).collect();
        let is_partly = |zone: u32, written: u64| written < self.geometry.capacity(ZoneNo(zone));
        let partly = written
            .iter()
            .filter(|(zone, written)| is_partly(**zone, **written))
            .count();
        let limit = self.geometry.max_active() as usize;
        let too_many = limit != 0 && partly > limit;
        written
            .into_iter()
            .map(|(zone, written)| {
                let finished = too_many && is_partly(zone, written);
                let counters = Counters {
                    finishes: finished.into(),
                    bytes_written: written,
                    ..Counters::default()
                };
                let record = ZoneRecord {
                    written,
                    finished,
                    counters,
                    ..ZoneRecord::default()
                };
                (zone, record)
            })
            .collect()
    }
}
