//! Are two images the same?

use std::fmt;

use zbdkit_io::IoBuf;
use zbdkit_zone::{Condition, Engine, Geometry, Model, ZoneNo};

use super::bytes::{data_runs, first_difference};
use super::work::{Worker, all};
use super::{CHUNK, Contents, Progress, ToolError, fetch};
use crate::device::Device;
use crate::node::MapExtent;

/// How images are compared.
#[derive(Clone, Copy, Debug)]
pub struct CompareOptions {
    /// Sizes, what has space and what has not, and the zones' counters must be the same too.
    pub strict: bool,
    /// The zones must be the same.
    pub zones: bool,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compared {
    /// One image is larger; what it has more is zeros where they are the same nevertheless.
    pub sizes_differ: bool,
    /// Up to the end of the smaller image they are the same, as far as was looked.
    pub same_so_far: bool,
    /// The first thing that differs.
    pub difference: Option<Difference>,
}

/// In what two images differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// In their sizes; told if strict.
    Size,
    /// In what has space; told if strict.
    Status {
        /// From here on, bytes.
        offset: u64,
    },
    /// In their contents.
    Content {
        /// The 512 bytes with the first difference begin here.
        offset: u64,
    },
    /// In the shape of their zones, or only one has zones.
    Zones {
        /// In what.
        what: &'static str,
        /// What the first image has.
        a: String,
        /// What the second one has.
        b: String,
    },
    /// In a zone; the first one that differs.
    Zone {
        /// Its number.
        zone: u32,
        /// In what.
        what: &'static str,
        /// What the first image has.
        a: String,
        /// What the second one has.
        b: String,
    },
}

/// Compares two images, their zones first, up to the first difference. Both read as they would when they are opened
/// next: zones that are open now count as closed. The bytes of zones that are offline are compared as well.
///
/// # Errors
/// An image cannot be read.
pub async fn compare(
    a: &Device,
    b: &Device,
    options: &CompareOptions,
    progress: Progress<'_>,
) -> Result<Compared, ToolError> {
    let (a_size, b_size) = (a.limits().size, b.limits().size);
    let sizes_differ = a_size != b_size;
    let found = |difference| {
        Ok(Compared {
            sizes_differ,
            same_so_far: match &difference {
                None => true,
                Some(Difference::Content { offset }) => *offset >= a_size.min(b_size),
                Some(_) => false,
            },
            difference,
        })
    };
    if options.strict && sizes_differ {
        return found(Some(Difference::Size));
    }
    if options.zones
        && let Some(difference) = compare_zones(a.engine(), b.engine(), options.strict)
    {
        return found(Some(difference));
    }
    let pair = Pair {
        a,
        b,
        strict: options.strict,
        buffers: [IoBuf::alloc(CHUNK as usize), IoBuf::alloc(CHUNK as usize)],
        progress,
    };
    found(pair.compare().await?)
}

struct Pair<'a> {
    a: &'a Device,
    b: &'a Device,
    strict: bool,
    buffers: [IoBuf; 2],
    progress: Progress<'a>,
}

impl Pair<'_> {
    async fn compare(&self) -> Result<Option<Difference>, ToolError> {
        let (a, b) = (self.a.limits().size, self.b.limits().size);
        let (common, total) = (a.min(b), a.max(b));
        let mut at = 0;
        (self.progress)(0, total);
        while at < common {
            let left = Contents::of(self.a).map(at, common - at).await?;
            let right = Contents::of(self.b).map(at, common - at).await?;
            let len = left.len.min(right.len);
            if self.strict && status(&left) != status(&right) {
                return Ok(Some(Difference::Status { offset: at }));
            }
            let differs = match (left.zero, right.zero) {
                (true, true) => None,
                _ if is_same_place(&left, &right) => None,
                (false, true) => self.first_data(self.a, at, len).await?,
                (true, false) => self.first_data(self.b, at, len).await?,
                (false, false) => self.first_difference(at, len).await?,
            };
            if let Some(offset) = differs {
                return Ok(Some(Difference::Content { offset }));
            }
            at += len;
            (self.progress)(at, total);
        }
        let longer = if a > b { self.a } else { self.b };
        while at < total {
            let extent = Contents::of(longer).map(at, total - at).await?;
            if !extent.zero
                && let Some(offset) = self.first_data(longer, at, extent.len).await?
            {
                return Ok(Some(Difference::Content { offset }));
            }
            at += extent.len;
            (self.progress)(at, total);
        }
        (self.progress)(total, total);
        Ok(None)
    }

    async fn first_data(&self, device: &Device, start: u64, len: u64) -> Result<Option<u64>, ToolError> {
        for (at, len) in chunks(start, len) {
            let buf = self.buffers[0].slice(0..len);
            fetch(device, &buf, at).await?;
            if let Some(run) = data_runs(&buf, 512).first() {
                return Ok(Some(at + run.start as u64));
            }
        }
        Ok(None)
    }

    async fn first_difference(&self, start: u64, len: u64) -> Result<Option<u64>, ToolError> {
        for (at, len) in chunks(start, len) {
            let [a, b] = [&self.buffers[0], &self.buffers[1]].map(|buf| buf.slice(0..len));
            let both = vec![
                Box::pin(fetch(self.a, &a, at)) as Worker<'_, ToolError>,
                Box::pin(fetch(self.b, &b, at)),
            ];
            all(both).await?;
            if let Some(position) = first_difference(&a, &b) {
                return Ok(Some(at + position as u64));
            }
        }
        Ok(None)
    }
}

fn chunks(start: u64, len: u64) -> impl Iterator<Item = (u64, usize)> {
    let end = start + len;
    (start..end)
        .step_by(CHUNK as usize)
        .map(move |at| (at, (end - at).min(CHUNK) as usize))
}

/// What strict mode compares, as QEMU does.
fn status(extent: &MapExtent) -> (bool, bool, bool, bool, bool) {
    let has_place = extent.offset.is_some();
    (
        extent.present,
        extent.zero,
        extent.data,
        extent.compressed,
        has_place,
    )
}

/// The same bytes of the same file, as those of a backing image that both have.
fn is_same_place(a: &MapExtent, b: &MapExtent) -> bool {
    a.filename.is_some() && a.offset.is_some() && (&a.filename, a.offset) == (&b.filename, b.offset)
}

fn compare_zones(a: Option<&Engine>, b: Option<&Engine>, strict: bool) -> Option<Difference> {
    let (a, b) = match (a, b) {
        (None, None) => return None,
        (Some(a), Some(b)) => (a, b),
        _ => {
            let say = |zones: Option<&Engine>| match zones {
                Some(zones) => format!("{} zones", zones.geometry().nr_zones()),
                None => "no zones".to_owned(),
            };
            return Some(Difference::Zones {
                what: "one image only has zones",
                a: say(a),
                b: say(b),
            });
        }
    };
    compare_geometry(a.geometry(), b.geometry()).or_else(|| {
        let zones = a.geometry().nr_zones().max(b.geometry().nr_zones());
        (0..zones).find_map(|zone| compare_zone(a, b, zone, strict))
    })
}

fn compare_geometry(a: &Geometry, b: &Geometry) -> Option<Difference> {
    let model = |geometry: &Geometry| match geometry.model() {
        Model::HostManaged => "host-managed",
        Model::HostAware => "host-aware",
    };
    let differ = |what, a: &dyn fmt::Display, b: &dyn fmt::Display| {
        let (a, b) = (a.to_string(), b.to_string());
        (a != b).then_some(Difference::Zones { what, a, b })
    };
    differ("model", &model(a), &model(b))
        .or_else(|| differ("zone size", &a.zone_size(), &b.zone_size()))
        .or_else(|| differ("zone capacity", &a.zone_capacity(), &b.zone_capacity()))
        .or_else(|| differ("conventional zones", &a.nr_conventional(), &b.nr_conventional()))
        .or_else(|| differ("block size", &a.block_size(), &b.block_size()))
        .or_else(|| differ("most open zones", &a.max_open(), &b.max_open()))
        .or_else(|| differ("most active zones", &a.max_active(), &b.max_active()))
        .or_else(|| differ("largest append", &a.max_append(), &b.max_append()))
        .or_else(|| {
            let size = |geometry: &Geometry| geometry.zrwa().map_or(0, |area| area.size);
            differ("size of random write areas", &size(a), &size(b))
        })
        .or_else(|| {
            differ(
                "size of descriptor extensions",
                &a.extension_size(),
                &b.extension_size(),
            )
        })
}

/// What a zone is like once nobody has it open. A zone past the end of the smaller image is like an empty one.
fn compare_zone(a: &Engine, b: &Engine, zone: u32, strict: bool) -> Option<Difference> {
    let differ = |what, a: &dyn fmt::Display, b: &dyn fmt::Display| {
        let (a, b) = (a.to_string(), b.to_string());
        (a != b).then_some(Difference::Zone { zone, what, a, b })
    };
    let number = ZoneNo(zone);
    let (x, y) = (State::of(a, number), State::of(b, number));
    let both = [a, b].iter().all(|engine| zone < engine.geometry().nr_zones());
    let capacities = || {
        let [x, y] = [a, b].map(|engine| engine.geometry().capacity(number));
        if both { differ("capacity", &x, &y) } else { None }
    };
    differ("condition", &x.condition, &y.condition)
        .or_else(|| differ("written end", &x.written, &y.written))
        .or_else(|| differ("random write area", &x.area, &y.area))
        .or_else(|| differ("descriptor extension", &x.extension, &y.extension))
        .or_else(capacities)
        .or_else(|| {
            if strict {
                differ("counters", &x.counters, &y.counters)
            } else {
                None
            }
        })
}

/// How a thing is told that a zone has not.
const NONE: &str = "none";

struct State {
    condition: Condition,
    /// Bytes from the zone's start.
    written: u64,
    /// Whether it has a random write area, and where that begins.
    area: String,
    /// Whether it has a descriptor extension, and the checksum of that.
    extension: String,
    counters: String,
}

impl State {
    fn of(engine: &Engine, zone: ZoneNo) -> State {
        let geometry = engine.geometry();
        if zone.0 >= geometry.nr_zones() {
            return State {
                condition: Condition::Empty,
                written: 0,
                area: NONE.to_owned(),
                extension: NONE.to_owned(),
                counters: String::new(),
            };
        }
        let (info, record) = (engine.info(zone), engine.record(zone));
        let is_plain = !record.zrwa && record.extension.is_none();
        let written = info.written_end - info.start;
        let condition = match info.condition {
            open if open.is_open() && written == 0 && is_plain => Condition::Empty,
            open if open.is_open() => Condition::Closed,
            other => other,
        };
        let counters = info.counters;
        State {
            condition,
            written,
            area: match record.zrwa {
                true => format!("at {}", record.written),
                false => NONE.to_owned(),
            },
            extension: match record.extension {
                Some(checksum) => format!("with checksum {checksum:#010x}"),
                None => NONE.to_owned(),
            },
            counters: format!(
                "{} resets, {} finishes, {} bytes written",
                counters.resets, counters.finishes, counters.bytes_written
            ),
        }
    }
}
