//! Moving what an overlay has into the image that it lies over.
//!
//! Order, so that a crash at any point leaves the overlay as it was, readable over the half-changed base: zones of the
//! base that the overlay has reset since become empty, durably; then the bytes; then, with these durable, the zones'
//! records; only when the caller has closed the base may the overlay be emptied. So no pointer of the base ever covers
//! bytes that are not there yet.

use std::ops::Range;

use zbdkit_io::IoBuf;
use zbdkit_zone::{ZoneNo, ZoneRecord, ZoneType};

use super::zones::{check_records, copy_extensions, install, misfit};
use super::{CHUNK, Progress, ToolError, fetch, refuse_marks, store, zero};
use crate::device::Device;
use crate::node::Lane;

/// Writes into `base` what the images above it have. `layers` are those, the top one first, each opened for itself,
/// without its backing image. The base is at least as large as the top one. Durable when this returns.
///
/// # Errors
/// Refused, before anything is changed: the base is smaller or read-only; only one has zones, or they do not fit. Where a
/// request failed the overlay still reads as before, and the commit can be repeated.
pub async fn commit(layers: &[&Device], base: &Device, progress: Progress<'_>) -> Result<(), ToolError> {
    let Some(top) = layers.first() else {
        return Ok(());
    };
    let commit = Commit {
        top,
        layers,
        base,
        size: top.limits().size,
        buf: IoBuf::alloc(CHUNK as usize),
        progress,
    };
    commit.check()?;
    commit.empty_zones().await?;
    progress(0, commit.size);
    for range in commit.ranges() {
        commit.copy(range).await?;
    }
    commit.give_back().await?;
    if let (Some(from), Some(to)) = (top.engine(), base.engine()) {
        let ours = from.geometry().nr_zones();
        copy_extensions(top, base).await?;
        install(base, |zone| {
            if zone.0 < ours {
                from.record(zone)
            } else {
                to.record(zone)
            }
        })
        .await?;
    }
    let lane = base.lane(0);
    let flushed = base.flush(&lane).await;
    flushed.map_err(ToolError::request("flushing the base", 0))?;
    progress(commit.size, commit.size);
    Ok(())
}

struct Commit<'a> {
    top: &'a Device,
    layers: &'a [&'a Device],
    base: &'a Device,
    size: u64,
    buf: IoBuf,
    progress: Progress<'a>,
}

/// What the uppermost image that has a range says of it.
enum Layer<'a> {
    /// None has it: the base's.
    Below,
    Zeros,
    Bytes(&'a Device),
}

impl<'a> Commit<'a> {
    fn check(&self) -> Result<(), ToolError> {
        let refused = |why: String| Err(ToolError::Refused(why));
        for layer in self.layers {
            refuse_marks(layer, "the image")?;
        }
        refuse_marks(self.base, "the base")?;
        let (size, room) = (self.size, self.base.limits().size);
        if self.base.limits().read_only {
            return refused("the base is open read-only".into());
        }
        if size > room {
            return refused(format!(
                "the base is smaller than the image: it has {room} bytes, the image {size}"
            ));
        }
        match (self.top.engine(), self.base.engine()) {
            (None, None) => Ok(()),
            (Some(_), None) => {
                refused("the image has zones, but its base has none that they could go to".into())
            }
            (None, Some(_)) => {
                refused("the base has zones, but the image has none: its data cannot be put into them".into())
            }
            (Some(top), Some(base)) => {
                if let Some(problem) = misfit(top.geometry(), base.geometry()) {
                    return refused(problem);
                }
                check_records(top, base)
            }
        }
    }

    /// Zones of the base that hold something else than the beginning of what the image has there, or in which blocks that
    /// show may have been written again.
    fn is_rewound(&self, zone: ZoneNo) -> bool {
        let (Some(top), Some(base)) = (self.top.engine(), self.base.engine()) else {
            return false;
        };
        if zone.0 >= top.geometry().nr_zones() || base.geometry().is_conventional(zone) {
            return false;
        }
        let (top, base) = (top.record(zone), base.record(zone));
        let is_more_than_empty = base.written > 0 || base.zrwa || base.extension.is_some();
        let is_changed =
            base.zrwa || top.written < base.written || top.counters.resets != base.counters.resets;
        is_more_than_empty && is_changed
    }

    async fn empty_zones(&self) -> Result<(), ToolError> {
        let Some(engine) = self.base.engine() else {
            return Ok(());
        };
        install(self.base, |zone| {
            let record = engine.record(zone);
            if !self.is_rewound(zone) {
                return record;
            }
            ZoneRecord {
                written: 0,
                finished: false,
                zrwa: false,
                // It may get another one, whose bytes are written where those of this one are.
                extension: None,
                ..record
            }
        })
        .await
    }

    /// What there may be to copy: all but what lies above the written ends of zones that must be written in order. Above a
    /// random write area there must be zeros.
    fn ranges(&self) -> Vec<Range<u64>> {
        let Some(engine) = self.top.engine() else {
            return std::iter::once(0..self.size).collect();
        };
        let geometry = engine.geometry();
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for zone in geometry.zones() {
            let start = geometry.start(zone);
            let end = match geometry.zone_type(zone) {
                ZoneType::SequentialRequired if !engine.record(zone).zrwa => {
                    start + engine.record(zone).written
                }
                _ => geometry.end(zone),
            };
            match ranges.last_mut() {
                _ if start == end => {}
                Some(range) if range.end == start => range.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }

    async fn copy(&self, range: Range<u64>) -> Result<(), ToolError> {
        let mut at = range.start;
        while at < range.end {
            let (len, layer) = self.layer(at, range.end - at).await?;
            match layer {
                Layer::Below => {}
                Layer::Zeros => zero(self.base, at..at + len).await?,
                Layer::Bytes(device) => self.copy_bytes(device, at..at + len).await?,
            }
            at += len;
            (self.progress)(at, self.size);
        }
        Ok(())
    }

    async fn copy_bytes(&self, device: &Device, range: Range<u64>) -> Result<(), ToolError> {
        for at in range.clone().step_by(CHUNK as usize) {
            let buf = self.buf.slice(0..(range.end - at).min(CHUNK) as usize);
            fetch(device, &buf, at).await?;
            store(self.base, buf, at).await?;
            (self.progress)(at, self.size);
        }
        Ok(())
    }

    /// Who has the first bytes of a range, and how many.
    async fn layer(&self, at: u64, mut len: u64) -> Result<(u64, Layer<'a>), ToolError> {
        for device in self.layers {
            let size = device.limits().size;
            if at >= size {
                // What lies below a smaller image does not show past its end.
                return Ok((len, Layer::Zeros));
            }
            let extent = device.below().map(at, len.min(size - at)).await;
            let extent = extent.map_err(ToolError::request("looking at the image", at))?;
            len = extent.len;
            match extent {
                extent if !extent.present => {}
                extent if extent.zero => return Ok((len, Layer::Zeros)),
                _ => return Ok((len, Layer::Bytes(device))),
            }
        }
        Ok((len, Layer::Below))
    }

    /// Gives the space back of what the image's resets have left behind in the base.
    async fn give_back(&self) -> Result<(), ToolError> {
        let (Some(top), Some(base)) = (self.top.engine(), self.base.engine()) else {
            return Ok(());
        };
        let lane = Lane::new(None, 0);
        for zone in base.geometry().zones() {
            let end = base.geometry().end(zone);
            let is_ours = zone.0 < top.geometry().nr_zones() && !base.geometry().is_conventional(zone);
            // The base's own record was emptied before; its counters tell that there was a reset.
            if is_ours
                && !top.record(zone).zrwa
                && top.record(zone).counters.resets != base.record(zone).counters.resets
            {
                let from = base.geometry().start(zone) + top.record(zone).written;
                if from < end
                    && let Err(error) = self.base.below().discard(&lane, from, end - from).await
                {
                    tracing::warn!("the space of zone {zone} of the base could not be given back: {error}");
                }
            }
        }
        Ok(())
    }
}
