//! The shapes of `--json`: field names are stable, sizes and offsets are bytes, absent things are null.

pub mod qemu;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Serialize, Serializer};
use zbdkit_zone::{
    Attributes, Condition, Counters, Geometry, GeometrySpec, Model, Recommendation, Zns, ZoneInfo, ZoneType,
    Zrwa,
};

/// The zones of a device.
#[derive(Debug, Serialize)]
pub struct Zoned {
    /// "host-managed" or "host-aware".
    pub model: &'static str,
    pub zone_size: u64,
    pub zone_capacity: u64,
    pub nr_zones: u32,
    pub nr_conventional: u32,
    /// 0: no limit.
    pub max_open: u32,
    /// 0: no limit.
    pub max_active: u32,
    /// 0: no zone append.
    pub max_append: u64,
    /// Zone random write areas, if the device has them.
    pub zrwa: Option<ZrwaShape>,
    /// Bytes of a zone descriptor extension; 0: none.
    pub extension_size: u32,
}

/// The zone random write areas of a device.
#[derive(Debug, Serialize)]
pub struct ZrwaShape {
    pub size: u64,
    pub granularity: u64,
    /// 0: no limit.
    pub max: u32,
    pub explicit_commit: bool,
}

impl ZrwaShape {
    pub fn of(zrwa: Zrwa) -> ZrwaShape {
        let Zrwa {
            size,
            granularity,
            count,
            explicit_commit,
        } = zrwa;
        ZrwaShape {
            size,
            granularity,
            max: count,
            explicit_commit,
        }
    }
}

impl Zoned {
    pub fn of(geometry: &Geometry) -> Zoned {
        let GeometrySpec {
            model,
            zone_size,
            zone_capacity,
            nr_conventional,
            max_open,
            max_active,
            max_append,
            size: _,
            block_size: _,
            zns: Zns { zrwa, extension_size },
        } = *geometry.spec();
        Zoned {
            model: model_name(model),
            zone_size,
            zone_capacity,
            nr_zones: geometry.nr_zones(),
            nr_conventional,
            max_open,
            max_active,
            max_append,
            zrwa: zrwa.map(ZrwaShape::of),
            extension_size,
        }
    }
}

/// What `create --json` says.
#[derive(Debug, Serialize)]
pub struct Created {
    pub image: PathBuf,
    pub format: &'static str,
    pub sidecar: Option<PathBuf>,
    pub uuid: Option<String>,
    pub size: u64,
    pub block_size: Option<u32>,
    pub zoned: Option<Zoned>,
}

/// What `info --json` says.
#[derive(Debug, Serialize)]
pub struct ImageInfo {
    pub image: String,
    pub filename: Option<PathBuf>,
    pub driver: &'static str,
    pub size: u64,
    pub block_size: u32,
    /// Bytes that the data file takes on disk.
    pub disk_usage: Option<u64>,
    pub zoned: Option<Zoned>,
    /// How many zones are in which condition; only those that occur.
    pub conditions: Option<Conditions>,
    pub table: Option<Table>,
    /// What opening found: repaired damage, writes that may be lost.
    pub notices: Vec<String>,
}

/// How many zones are in which condition, in the order of the conditions' numbers.
#[derive(Debug, Default)]
pub struct Conditions(pub BTreeMap<u8, (&'static str, u32)>);

impl Conditions {
    pub fn count(&mut self, condition: Condition) {
        self.0
            .entry(condition as u8)
            .or_insert((condition_name(condition), 0))
            .1 += 1;
    }
}

impl Serialize for Conditions {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.values().copied())
    }
}

/// The zone table.
#[derive(Debug, Serialize)]
pub struct Table {
    pub path: PathBuf,
    pub disk_usage: Option<u64>,
    pub uuid: String,
    /// How often the image was opened for writing.
    pub epoch: u64,
    /// The last of them was closed; if not, somebody has the image open, or died with it.
    pub clean: bool,
}

/// A zone, as in `report --json`.
#[derive(Debug, Serialize)]
pub struct Zone {
    pub zone: u32,
    pub start: u64,
    pub len: u64,
    pub capacity: u64,
    pub wp: u64,
    /// The end of the bytes really written; below `wp` after a finish.
    pub written_end: u64,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub condition: &'static str,
    pub resets: u32,
    pub finishes: u32,
    pub bytes_written: u64,
    pub attributes: ZoneAttributes,
}

/// What Zoned Namespaces tell of a zone.
#[derive(Debug, Serialize)]
pub struct ZoneAttributes {
    /// The device made the zone full by itself.
    pub finished_by_device: bool,
    /// "finish" or "reset": what the device would have the host do.
    pub recommended: Option<&'static str>,
    /// The zone has a random write area.
    pub zrwa: bool,
    /// The zone has a descriptor extension.
    pub extension: bool,
}

impl ZoneAttributes {
    fn of(attributes: Attributes) -> ZoneAttributes {
        let Attributes {
            finished_by_device,
            recommended,
            zrwa,
            extension,
        } = attributes;
        ZoneAttributes {
            finished_by_device,
            recommended: recommended.map(|what| match what {
                Recommendation::Finish => "finish",
                Recommendation::Reset => "reset",
            }),
            zrwa,
            extension,
        }
    }
}

impl Zone {
    pub fn of(info: &ZoneInfo) -> Zone {
        let Counters {
            resets,
            finishes,
            bytes_written,
        } = info.counters;
        Zone {
            zone: info.zone.0,
            start: info.start,
            len: info.len,
            capacity: info.capacity,
            wp: info.wp,
            written_end: info.written_end,
            kind: match info.kind {
                ZoneType::Conventional => "conventional",
                ZoneType::SequentialRequired => "sequential-required",
                ZoneType::SequentialPreferred => "sequential-preferred",
            },
            condition: condition_name(info.condition),
            resets,
            finishes,
            bytes_written,
            attributes: ZoneAttributes::of(info.attributes),
        }
    }
}

/// A model's name, as `--model` and zone.mode have it.
pub fn model_name(model: Model) -> &'static str {
    match model {
        Model::HostManaged => "host-managed",
        Model::HostAware => "host-aware",
    }
}

/// A condition's name, as `--filter` has it.
pub fn condition_name(condition: Condition) -> &'static str {
    match condition {
        Condition::NotWritePointer => "not-write-pointer",
        Condition::Empty => "empty",
        Condition::ImplicitlyOpen => "implicitly-open",
        Condition::ExplicitlyOpen => "explicitly-open",
        Condition::Closed => "closed",
        Condition::ReadOnly => "read-only",
        Condition::Full => "full",
        Condition::Offline => "offline",
    }
}
