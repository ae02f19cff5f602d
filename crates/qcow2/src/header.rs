//! The header and its extensions: read, judged, written.
//!
//! [`Header::read`] takes nothing for granted: each number is bounded before anything is allocated or read by it, with
//! QEMU's limits and, where it has one, QEMU's message. What this program does not know (features, header fields,
//! extensions, names of features) is kept and written back.

mod decode;
mod encode;

use std::borrow::Cow;
use std::ops::Range;

use zbdkit_io::File;
use zbdkit_spec::qcow2 as spec;
use zerocopy::FromBytes;

use self::decode::{decode, read_first_cluster};
use crate::error::Error;

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate, window of 4 KiB.
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

/// A header extension, as it lies in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// What it is.
    pub magic: u32,
    /// Its data, without padding.
    pub data: Vec<u8>,
}

/// The decoded header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Size of the device, bytes.
    pub size: u64,
    /// The cluster size is 1 << this.
    pub cluster_bits: u32,
    /// Refcounts are 1 << this bits wide.
    pub refcount_order: u32,
    /// 0, or how it is encrypted.
    pub crypt_method: u32,
    /// Entries of the L1 table.
    pub l1_size: u32,
    /// Where the L1 table lies, bytes.
    pub l1_offset: u64,
    /// Where the refcount table lies, bytes.
    pub refcount_table_offset: u64,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Snapshots in the snapshot table.
    pub nb_snapshots: u32,
    /// Where the snapshot table lies, bytes.
    pub snapshots_offset: u64,
    /// Feature bits; who does not know one must not open the image.
    pub incompatible: u64,
    /// Feature bits that may be ignored.
    pub compatible: u64,
    /// Feature bits that a writer clears who does not know them.
    pub autoclear: u64,
    /// Of compressed clusters.
    pub compression: Compression,
    /// What lies below.
    pub backing_file: Option<String>,
    /// Extensions in the file's order, unknown ones too, without the feature name table.
    pub extensions: Vec<Extension>,
    /// The header's bytes behind the compression type, without zeros at the end (zero means the same as absent).
    unknown_fields: Vec<u8>,
    /// The image's names for features that we do not know, at most one a feature.
    feature_names: Vec<FeatureName>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct FeatureName {
    kind: u8,
    bit: u8,
    name: [u8; 46],
}

/// The features that have names of ours, as QEMU calls those that it has.
const KNOWN_NAMES: [(u8, u64, &str); 8] = [
    (spec::FEATURE_INCOMPATIBLE, spec::INCOMPAT_DIRTY, "dirty bit"),
    (spec::FEATURE_INCOMPATIBLE, spec::INCOMPAT_CORRUPT, "corrupt bit"),
    (
        spec::FEATURE_INCOMPATIBLE,
        spec::INCOMPAT_DATA_FILE,
        "external data file",
    ),
    (
        spec::FEATURE_INCOMPATIBLE,
        spec::INCOMPAT_COMPRESSION,
        "compression type",
    ),
    (
        spec::FEATURE_INCOMPATIBLE,
        spec::INCOMPAT_EXTENDED_L2,
        "extended L2 entries",
    ),
    (
        spec::FEATURE_COMPATIBLE,
        spec::COMPAT_LAZY_REFCOUNTS,
        "lazy refcounts",
    ),
    (spec::FEATURE_AUTOCLEAR, spec::AUTOCLEAR_BITMAPS, "bitmaps"),
    (
        spec::FEATURE_AUTOCLEAR,
        spec::AUTOCLEAR_DATA_FILE_RAW,
        "raw external data",
    ),
];

/// Those that are only named in images with zones.
const ZONE_NAMES: [(u8, u64, &str); 3] = [
    (spec::FEATURE_INCOMPATIBLE, spec::INCOMPAT_ZONED, "zoned format"),
    (
        spec::FEATURE_INCOMPATIBLE,
        spec::INCOMPAT_ZONE_STATES,
        "zbdkit zone states",
    ),
    (
        spec::FEATURE_AUTOCLEAR,
        spec::AUTOCLEAR_ZONE_TABLE,
        "zbdkit zone table",
    ),
];

/// Incompatible features that this crate does itself.
const KNOWN_INCOMPATIBLE: u64 = spec::INCOMPAT_DIRTY
    | spec::INCOMPAT_CORRUPT
    | spec::INCOMPAT_DATA_FILE
    | spec::INCOMPAT_COMPRESSION
    | spec::INCOMPAT_EXTENDED_L2;

impl Header {
    /// A version-3 header without anything: tables, features, extensions.
    pub fn new(cluster_bits: u32) -> Header {
        Header {
            version: 3,
            size: 0,
            cluster_bits,
            refcount_order: 4,
            crypt_method: spec::CRYPT_NONE,
            l1_size: 0,
            l1_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            compression: Compression::Zlib,
            backing_file: None,
            extensions: Vec::new(),
            unknown_fields: Vec::new(),
            feature_names: Vec::new(),
        }
    }

    /// Reads and checks the header of an image, of version 2 or 3. Does not judge its features: see
    /// [`check_features`](Header::check_features).
    pub async fn read(file: &File) -> Result<Header, Error> {
        let (cluster, len) = read_first_cluster(file).await?;
        Header::decode(&cluster, len)
    }

    /// Like [`read`](Header::read) for who repairs the image: leaves out what a repair can set right, namely a missing
    /// refcount table, the place of the snapshot table, and tables past the end of the file.
    pub async fn read_for_check(file: &File) -> Result<Header, Error> {
        let (cluster, _) = read_first_cluster(file).await?;
        decode(&cluster, None)
    }

    /// Decodes a header. `bytes` is the first cluster of the image, or the beginning of it with the rest zeros; `len`
    /// the length of the file in bytes.
    pub fn decode(bytes: &[u8], len: u64) -> Result<Header, Error> {
        decode(bytes, Some(len))
    }

    /// Refuses images with incompatible features that neither this crate knows nor, by `also_known`, the caller, and
    /// encrypted ones. Names features as the image does.
    pub fn check_features(&self, also_known: u64) -> Result<(), Error> {
        let unknown = self.incompatible & !(KNOWN_INCOMPATIBLE | also_known);
        if unknown != 0 {
            return Err(Error::Unsupported(self.name_unsupported(unknown)));
        }
        match self.crypt_method {
            spec::CRYPT_NONE => Ok(()),
            spec::CRYPT_AES | spec::CRYPT_LUKS => Err(Error::Encrypted),
            other => Err(Error::Unsupported(format!(
                "Unsupported encryption method {other}"
            ))),
        }
    }

    fn name_unsupported(&self, mut unknown: u64) -> String {
        let mut names: Vec<Cow<'_, str>> = Vec::new();
        for (kind, bit, name) in ZONE_NAMES {
            if kind == spec::FEATURE_INCOMPATIBLE && unknown & bit != 0 {
                names.push(name.into());
                unknown &= !bit;
            }
        }
        for feature in &self.feature_names {
            if feature.kind == spec::FEATURE_INCOMPATIBLE && unknown & (1 << feature.bit) != 0 {
                names.push(printable(until_nul(&feature.name)).into());
                unknown &= !(1 << feature.bit);
            }
        }
        if unknown != 0 {
            names.push(format!("Unknown incompatible feature: {unknown:x}").into());
        }
        format!("Unsupported qcow2 feature(s): {}", names.join(", "))
    }

    /// Clears the autoclear features that a writer must clear who neither knows them here nor, by `also_known`, in the
    /// caller. Bitmaps are not tracked, so their bit goes; their extension and clusters stay, marked inconsistent that
    /// way. Returns whether there is something to write.
    pub fn clear_unknown_autoclear(&mut self, also_known: u64) -> bool {
        let before = self.autoclear;
        self.autoclear &= spec::AUTOCLEAR_DATA_FILE_RAW | also_known;
        self.autoclear != before
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 entry: 8, or 16 with extended ones.
    pub fn l2_entry_size(&self) -> u64 {
        if self.extended_l2() { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// Entries that an L1 table needs for a device of `size` bytes.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.cluster_size() * self.l2_entries())
    }

    /// Whether L2 entries have a bitmap of subclusters.
    pub fn extended_l2(&self) -> bool {
        self.incompatible & spec::INCOMPAT_EXTENDED_L2 != 0
    }

    /// Bytes that are allocated together: a cluster, or a subcluster with extended L2 entries.
    pub fn subcluster_size(&self) -> u64 {
        if self.extended_l2() {
            self.cluster_size() / u64::from(spec::SUBCLUSTERS)
        } else {
            self.cluster_size()
        }
    }

    /// Whether refcounts may be behind.
    pub fn dirty(&self) -> bool {
        self.incompatible & spec::INCOMPAT_DIRTY != 0
    }

    /// Whether somebody found the metadata damaged.
    pub fn corrupt(&self) -> bool {
        self.incompatible & spec::INCOMPAT_CORRUPT != 0
    }

    /// Whether data lies in an external file.
    pub fn external_data(&self) -> bool {
        self.incompatible & spec::INCOMPAT_DATA_FILE != 0
    }

    /// Whether the external data file is to be a raw image by itself.
    pub fn data_raw(&self) -> bool {
        self.autoclear & spec::AUTOCLEAR_DATA_FILE_RAW != 0
    }

    /// Whether a writer may be late with refcounts.
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible & spec::COMPAT_LAZY_REFCOUNTS != 0
    }

    /// Whether the image has zones, of whatever draft.
    pub fn zoned(&self) -> bool {
        self.incompatible & spec::INCOMPAT_ZONED != 0
    }

    /// Width of a refcount.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// Refcounts in a refcount block.
    pub fn refcounts_per_block(&self) -> u64 {
        1 << (self.cluster_bits + 3 - self.refcount_order)
    }

    /// Format of the backing image.
    pub fn backing_format(&self) -> Option<&str> {
        self.string(spec::EXT_BACKING_FORMAT)
    }

    /// Name of the external data file.
    pub fn data_file_name(&self) -> Option<&str> {
        self.string(spec::EXT_DATA_FILE)
    }

    fn string(&self, magic: u32) -> Option<&str> {
        let text = std::str::from_utf8(until_nul(self.extension(magic)?)).ok()?;
        (!text.is_empty()).then_some(text)
    }

    /// The bitmaps extension, if there is one that says what such an extension may.
    pub fn bitmaps(&self) -> Option<spec::BitmapsExtension> {
        spec::BitmapsExtension::read_from_bytes(self.extension(spec::EXT_BITMAPS)?).ok()
    }

    /// The data of the first extension of this kind.
    pub fn extension(&self, magic: u32) -> Option<&[u8]> {
        self.extensions
            .iter()
            .find(|extension| extension.magic == magic)
            .map(|extension| extension.data.as_slice())
    }

    /// Sets, replaces or removes an extension. Feature names and the end mark are [`encode`](Header::encode)'s.
    pub fn set_extension(&mut self, magic: u32, data: Option<Vec<u8>>) {
        debug_assert!(magic != spec::EXT_END && magic != spec::EXT_FEATURE_NAMES);
        let found = self
            .extensions
            .iter()
            .position(|extension| extension.magic == magic);
        match (found, data) {
            (Some(i), Some(data)) => self.extensions[i].data = data,
            (Some(i), None) => drop(self.extensions.remove(i)),
            (None, Some(data)) => self.extensions.push(Extension { magic, data }),
            (None, None) => {}
        }
    }

    /// Bytes of the file that the header itself names: its own cluster, the L1 table, the refcount table. No two of
    /// them overlap in an image that may be written.
    pub fn metadata_ranges(&self) -> Vec<(Range<u64>, &'static str)> {
        let range = |offset: u64, len: u64| offset..offset.saturating_add(len);
        let reftable = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        [
            (range(0, self.cluster_size()), "header"),
            (
                range(self.l1_offset, u64::from(self.l1_size) * 8),
                "active L1 table",
            ),
            (range(self.refcount_table_offset, reftable), "refcount table"),
        ]
        .into_iter()
        .filter(|(range, _)| !range.is_empty())
        .collect()
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A name that a terminal can take, whoever wrote it.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}
