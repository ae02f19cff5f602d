//! Checking an image, and repairing it.

use std::ops::Range;

use zbdkit_io::File;

use crate::error::Error;
use crate::header::Header;

/// What a check repairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    None,
    /// Clusters that nothing refers to.
    Leaks,
    /// All that can be repaired.
    All,
}

/// What a check found.
#[derive(Clone, Debug, Default)]
pub struct CheckReport {
    /// Contradictions that put data at risk.
    pub corruptions: u64,
    /// Clusters with space that nothing refers to.
    pub leaks: u64,
    /// Repaired.
    pub corruptions_fixed: u64,
    /// Repaired.
    pub leaks_fixed: u64,
    /// Places that could not be checked.
    pub check_errors: u64,
    /// Where the used part of the file ends, bytes.
    pub image_end_offset: u64,
    /// Clusters of the device.
    pub total_clusters: u64,
    /// Those with data.
    pub allocated_clusters: u64,
    /// Those that do not follow the one before them in the file.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
    /// What was found, in QEMU's words.
    pub messages: Vec<String>,
}

/// Checks an image. `areas` are clusters that extensions name, which the format itself does not know.
pub async fn check(
    _file: &File,
    _header: &Header,
    _data: Option<&File>,
    _areas: &[(Range<u64>, &'static str)],
    _repair: Repair,
    _progress: &mut dyn FnMut(u64, u64),
) -> Result<CheckReport, Error> {
    Err(Error::NotQcow2)
}
