//! The shapes that qemu-img prints as JSON, with our keys added: names with hyphens, absent things left out.

use serde::Serialize;
use zbdkit_qcow2::{CheckReport, Snapshot};
use zbdkit_zone::Geometry;

use super::{Conditions, model_name};

/// `info --json` of an image whose format qemu-img knows.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    pub children: Vec<Child>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    pub virtual_size: u64,
    pub filename: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    pub format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<Specific>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encrypted: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    pub dirty_flag: bool,
    /// Ours: what opening the zones found.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notices: Vec<String>,
}

/// A node below an image.
#[derive(Debug, Serialize)]
pub struct Child {
    pub name: &'static str,
    pub info: FileInfo,
}

/// A file below an image.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FileInfo {
    pub children: [(); 0],
    pub virtual_size: u64,
    pub filename: String,
    pub format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    pub format_specific: FileSpecific,
    pub dirty_flag: bool,
}

/// What is particular to a file: nothing.
#[derive(Debug, Serialize)]
pub struct FileSpecific {
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub data: std::collections::BTreeMap<&'static str, ()>,
}

/// What is particular to the format.
#[derive(Debug, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum Specific {
    Qcow2(Box<Qcow2Info>),
}

/// What is particular to qcow2.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2Info {
    pub compat: &'static str,
    pub compression_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lazy_refcounts: Option<bool>,
    pub refcount_bits: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encrypt: Option<Encryption>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file_raw: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zoned: Option<Zoned>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corrupt: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extended_l2: Option<bool>,
}

/// How an image is encrypted.
#[derive(Debug, Serialize)]
pub struct Encryption {
    pub format: &'static str,
}

/// The zones of an image. The first seven are those of the series that brings zones to QEMU.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Zoned {
    pub mode: &'static str,
    pub nr_zones: u32,
    pub zone_size: u64,
    pub zone_capacity: u64,
    pub conventional_zones: u32,
    pub max_active_zones: u32,
    pub max_open_zones: u32,
    pub max_append_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zrwa: Option<Zrwa>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub descr_ext_size: Option<u32>,
    pub block_size: u32,
    pub conditions: Conditions,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table: Option<Table>,
}

/// The zone random write areas of an image.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Zrwa {
    pub size: u64,
    pub granularity: u64,
    /// 0: no limit.
    pub max: u32,
    pub explicit_commit: bool,
}

/// The zone table in an image.
#[derive(Debug, Serialize)]
pub struct Table {
    pub uuid: String,
    /// How often the image was opened for writing.
    pub epoch: u64,
    /// The last of them was closed.
    pub clean: bool,
}

impl Zoned {
    pub fn of(geometry: &Geometry, conditions: Conditions, table: Option<Table>) -> Zoned {
        Zoned {
            mode: model_name(geometry.model()),
            nr_zones: geometry.nr_zones(),
            zone_size: geometry.zone_size(),
            zone_capacity: geometry.zone_capacity(),
            conventional_zones: geometry.nr_conventional(),
            max_active_zones: geometry.max_active(),
            max_open_zones: geometry.max_open(),
            max_append_bytes: geometry.max_append(),
            zrwa: geometry.zrwa().map(|zrwa| Zrwa {
                size: zrwa.size,
                granularity: zrwa.granularity,
                max: zrwa.count,
                explicit_commit: zrwa.explicit_commit,
            }),
            descr_ext_size: Some(geometry.extension_size()).filter(|size| *size != 0),
            block_size: geometry.block_size(),
            conditions,
            table,
        }
    }
}

/// An internal snapshot.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icount: Option<u64>,
    pub vm_clock_nsec: u64,
    pub name: String,
    pub date_sec: u32,
    pub date_nsec: u32,
    pub vm_clock_sec: u64,
    pub id: String,
    pub vm_state_size: u64,
}

impl SnapshotInfo {
    pub fn of(snapshot: &Snapshot) -> SnapshotInfo {
        const SECOND: u64 = 1_000_000_000;
        SnapshotInfo {
            icount: snapshot.icount,
            vm_clock_nsec: snapshot.vm_clock_nsec % SECOND,
            name: snapshot.name.clone(),
            date_sec: snapshot.date_sec,
            date_nsec: snapshot.date_nsec,
            vm_clock_sec: snapshot.vm_clock_nsec / SECOND,
            id: snapshot.id.clone(),
            vm_state_size: snapshot.vm_state_size,
        }
    }
}

/// `check --json`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageCheck {
    #[serde(skip_serializing_if = "is_zero")]
    pub image_end_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub total_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions: u64,
    pub check_errors: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub allocated_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub fragmented_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub compressed_clusters: u64,
    pub filename: String,
    pub format: &'static str,
    /// Ours: the zone table. Its errors are counted as corruptions above too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zones: Option<ZonesCheck>,
}

/// What a check of the zone table found.
#[derive(Clone, Debug, Serialize)]
pub struct ZonesCheck {
    pub errors: u64,
    pub fixed: u64,
    pub messages: Vec<String>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl ImageCheck {
    pub fn of(
        filename: String,
        format: &'static str,
        report: &CheckReport,
        zones: Option<ZonesCheck>,
    ) -> ImageCheck {
        let (errors, fixed) = zones.as_ref().map_or((0, 0), |zones| (zones.errors, zones.fixed));
        ImageCheck {
            image_end_offset: report.image_end_offset,
            total_clusters: report.total_clusters,
            corruptions: report.corruptions + errors,
            check_errors: report.check_errors,
            leaks: report.leaks,
            corruptions_fixed: report.corruptions_fixed + fixed,
            leaks_fixed: report.leaks_fixed,
            allocated_clusters: report.allocated_clusters,
            fragmented_clusters: report.fragmented_clusters,
            compressed_clusters: report.compressed_clusters,
            filename,
            format,
            zones,
        }
    }
}
