//! The qcow2 format, version 2 and 3, with the drafts of zones in it, and this project's own extension.
//!
//! All integers are big-endian. The image is a row of clusters; the first one holds the header, the header
//! extensions (each an [`Extension`] with its data, padded to a multiple of 8 bytes, ended by [`EXT_END`]) and the
//! name of the backing image. Names and fields are those of QEMU's docs/interop/qcow2.rst; what is ours is marked
//! so, and specified in docs/qcow2.md.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First bytes of an image.
pub const MAGIC: u32 = 0x5146_49fb;

/// Bytes of a version-2 header.
pub const V2_HEADER_LEN: usize = 72;
/// Bytes of the shortest version-3 header.
pub const V3_HEADER_MIN: usize = 104;

/// The smallest clusters have 1 << this bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// The largest clusters have 1 << this bytes (a limit of QEMU's, not of the format).
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Clusters of an image with extended L2 entries have at least 1 << this bytes.
pub const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;
/// Refcounts are at most 1 << this bits wide.
pub const MAX_REFCOUNT_ORDER: u32 = 6;
/// Largest L1 table, bytes.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table, bytes.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Most snapshots.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Largest snapshot table, bytes.
pub const MAX_SNAPSHOTS_BYTES: u64 = 1024 * MAX_SNAPSHOTS as u64;
/// Most extra data of a snapshot, bytes.
pub const MAX_SNAPSHOT_EXTRA: u32 = 1024;
/// Longest name of a backing image, bytes.
pub const MAX_BACKING_NAME: u32 = 1023;
/// Longest name of the backing image's format, bytes.
pub const MAX_BACKING_FORMAT: u32 = 15;
/// Most bitmaps.
pub const MAX_BITMAPS: u32 = 65535;
/// Largest bitmap directory, bytes.
pub const MAX_BITMAP_DIRECTORY: u64 = 1024 * MAX_BITMAPS as u64;
/// No cluster lies at or above this byte of the file: offsets have 56 bits.
pub const MAX_CLUSTER_OFFSET: u64 = 1 << 56;

/// Incompatible: refcounts may be behind; repair them before use.
pub const INCOMPAT_DIRTY: u64 = 1 << 0;
/// Incompatible: metadata is damaged; do not write.
pub const INCOMPAT_CORRUPT: u64 = 1 << 1;
/// Incompatible: data lies in an external file.
pub const INCOMPAT_DATA_FILE: u64 = 1 << 2;
/// Incompatible: [`Header::compression_type`] is not 0.
pub const INCOMPAT_COMPRESSION: u64 = 1 << 3;
/// Incompatible: L2 entries have 16 bytes.
pub const INCOMPAT_EXTENDED_L2: u64 = 1 << 4;
/// Incompatible, a draft of QEMU's: the image has zones and [`EXT_ZONED`].
pub const INCOMPAT_ZONED: u64 = 1 << 5;
/// Incompatible, ours: the image has (or had) zones that the drafts cannot express: host-aware, read-only, offline.
pub const INCOMPAT_ZONE_STATES: u64 = 1 << 40;

/// Compatible: a writer may set [`INCOMPAT_DIRTY`] and write refcounts late.
pub const COMPAT_LAZY_REFCOUNTS: u64 = 1 << 0;

/// Autoclear: the bitmaps are up to date.
pub const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
/// Autoclear: the external data file is a raw image by itself.
pub const AUTOCLEAR_DATA_FILE_RAW: u64 = 1 << 1;
/// Autoclear, ours: what [`EXT_ZBDKIT`] names is up to date.
pub const AUTOCLEAR_ZONE_TABLE: u64 = 1 << 40;

/// Extension: the end of the extensions.
pub const EXT_END: u32 = 0;
/// Extension: the format of the backing image, a string without an end mark.
pub const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Extension: [`FeatureName`]s.
pub const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// Extension: [`BitmapsExtension`].
pub const EXT_BITMAPS: u32 = 0x2385_2875;
/// Extension: [`CryptoExtension`].
pub const EXT_CRYPTO: u32 = 0x0537_be77;
/// Extension: the name of the external data file, a string without an end mark.
pub const EXT_DATA_FILE: u32 = 0x4441_5441;
/// Extension, drafts of QEMU's: zones; the length tells [`ZonedC`], [`ZonedB`] or [`ZonedV7`], [`ZonedA`] apart.
pub const EXT_ZONED: u32 = 0x007a_6264;
/// Extension, ours ("zbdk"): [`ZbdkitExtension`].
pub const EXT_ZBDKIT: u32 = 0x7a62_646b;

/// [`Header::crypt_method`]: not encrypted.
pub const CRYPT_NONE: u32 = 0;
/// [`Header::crypt_method`]: AES-CBC, long out of use.
pub const CRYPT_AES: u32 = 1;
/// [`Header::crypt_method`]: LUKS.
pub const CRYPT_LUKS: u32 = 2;

/// [`Header::compression_type`]: raw deflate, window of 4 KiB.
pub const COMPRESSION_ZLIB: u8 = 0;
/// [`Header::compression_type`]: Zstandard.
pub const COMPRESSION_ZSTD: u8 = 1;

/// The header. Version 2 ends before `incompatible_features`, the shortest version 3 before `compression_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: U32,
    /// 2 or 3.
    pub version: U32,
    /// Where in the first cluster the name of the backing image lies, 0 for none.
    pub backing_file_offset: U64,
    /// Length of that name, bytes.
    pub backing_file_size: U32,
    /// The cluster size is 1 << this.
    pub cluster_bits: U32,
    /// Size of the device, bytes.
    pub size: U64,
    /// [`CRYPT_NONE`], [`CRYPT_AES`] or [`CRYPT_LUKS`].
    pub crypt_method: U32,
    /// Entries of the active L1 table.
    pub l1_size: U32,
    /// Where the active L1 table lies.
    pub l1_table_offset: U64,
    /// Where the refcount table lies.
    pub refcount_table_offset: U64,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: U32,
    /// Snapshots in the snapshot table.
    pub nb_snapshots: U32,
    /// Where the snapshot table lies.
    pub snapshots_offset: U64,
    /// `INCOMPAT_*`: who does not know a set bit must not open the image.
    pub incompatible_features: U64,
    /// `COMPAT_*`: bits that may be ignored.
    pub compatible_features: U64,
    /// `AUTOCLEAR_*`: a writer clears the bits that it does not know.
    pub autoclear_features: U64,
    /// Refcounts are 1 << this bits wide (4 in version 2).
    pub refcount_order: U32,
    /// Length of the header, a multiple of 8; the extensions follow it.
    pub header_length: U32,
    /// [`COMPRESSION_ZLIB`] or [`COMPRESSION_ZSTD`].
    pub compression_type: u8,
    /// Zero.
    pub padding: [u8; 7],
}
const _: () = assert!(size_of::<Header>() == 112);

/// What precedes the data of each header extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Extension {
    /// `EXT_*`.
    pub magic: U32,
    /// Length of the data without padding, bytes.
    pub len: U32,
}
const _: () = assert!(size_of::<Extension>() == 8);

/// [`FeatureName::kind`] of incompatible features.
pub const FEATURE_INCOMPATIBLE: u8 = 0;
/// [`FeatureName::kind`] of compatible features.
pub const FEATURE_COMPATIBLE: u8 = 1;
/// [`FeatureName::kind`] of autoclear features.
pub const FEATURE_AUTOCLEAR: u8 = 2;

/// One entry of [`EXT_FEATURE_NAMES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FeatureName {
    /// `FEATURE_*`.
    pub kind: u8,
    /// Number of the bit.
    pub bit: u8,
    /// Padded with zeros; all of it may be used.
    pub name: [u8; 46],
}
const _: () = assert!(size_of::<FeatureName>() == 48);

/// [`EXT_BITMAPS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BitmapsExtension {
    /// Number of bitmaps, at least 1.
    pub nb_bitmaps: U32,
    /// Zero.
    pub reserved: U32,
    /// Length of the bitmap directory, bytes.
    pub directory_size: U64,
    /// Where the bitmap directory lies.
    pub directory_offset: U64,
}
const _: () = assert!(size_of::<BitmapsExtension>() == 24);

/// An entry of the bitmap directory; extra data and name follow, and padding to a multiple of 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BitmapEntry {
    /// Where the bitmap table lies.
    pub table_offset: U64,
    /// Entries of the bitmap table.
    pub table_size: U32,
    /// Bit 0: in use (inconsistent), bit 1: auto.
    pub flags: U32,
    /// 1: dirty tracking.
    pub kind: u8,
    /// A bit stands for 1 << this bytes.
    pub granularity_bits: u8,
    /// Length of the name, bytes.
    pub name_size: U16,
    /// Length of the extra data, bytes.
    pub extra_data_size: U32,
}
const _: () = assert!(size_of::<BitmapEntry>() == 24);

/// [`EXT_CRYPTO`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CryptoExtension {
    /// Where the encryption header lies.
    pub offset: U64,
    /// Its length, bytes.
    pub length: U64,
}
const _: () = assert!(size_of::<CryptoExtension>() == 16);

/// An entry of the snapshot table; extra data, id and name follow, and padding to a multiple of 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SnapshotEntry {
    /// Where its L1 table lies.
    pub l1_table_offset: U64,
    /// Entries of its L1 table.
    pub l1_size: U32,
    /// Length of the id, bytes.
    pub id_str_size: U16,
    /// Length of the name, bytes.
    pub name_size: U16,
    /// When it was made, seconds since 1970.
    pub date_sec: U32,
    /// And nanoseconds.
    pub date_nsec: U32,
    /// How long the guest had run, nanoseconds.
    pub vm_clock_nsec: U64,
    /// Bytes of the guest's state; the extra data has the wider field.
    pub vm_state_size: U32,
    /// Length of the extra data, bytes.
    pub extra_data_size: U32,
}
const _: () = assert!(size_of::<SnapshotEntry>() == 40);

/// The extra data of a snapshot that is known; version 3 has the first two fields at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SnapshotExtra {
    /// Bytes of the guest's state.
    pub vm_state_size_large: U64,
    /// Size of the device, bytes.
    pub disk_size: U64,
    /// Instructions that the guest had executed, all ones for unknown.
    pub icount: U64,
}
const _: () = assert!(size_of::<SnapshotExtra>() == 24);

/// L1 and L2 entries: the cluster's refcount is exactly one.
pub const OFLAG_COPIED: u64 = 1 << 63;
/// L2 entries: a compressed cluster.
pub const OFLAG_COMPRESSED: u64 = 1 << 62;
/// L2 entries of version 3, not extended: the cluster reads as zeros, whatever it points to.
pub const OFLAG_ZERO: u64 = 1;

/// L1 entries: where the L2 table lies.
pub const L1E_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// L1 entries: zero.
pub const L1E_RESERVED_MASK: u64 = 0x7f00_0000_0000_01ff;
/// L2 entries of clusters that are not compressed: where the cluster lies.
pub const L2E_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// L2 entries of clusters that are not compressed, version 3 and not extended: zero.
pub const L2E_RESERVED_MASK: u64 = 0x3f00_0000_0000_01fe;
/// Refcount table entries: where the refcount block lies.
pub const REFTABLE_OFFSET_MASK: u64 = 0xffff_ffff_ffff_fe00;
/// Refcount table entries: zero.
pub const REFTABLE_RESERVED_MASK: u64 = 0x1ff;
/// Bitmap table entries: where the cluster lies.
pub const BITMAP_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bitmap table entries: zero.
pub const BITMAP_RESERVED_MASK: u64 = 0xff00_0000_0000_01fe;
/// Bitmap table entries without an offset: the cluster's bits are all ones.
pub const BITMAP_ALL_ONES: u64 = 1;

/// Compressed data is addressed and counted in units of so many bytes.
pub const COMPRESSED_SECTOR: u64 = 512;
/// Subclusters of a cluster with an extended L2 entry; the second word has a bit "allocated" for each in its lower
/// half, and a bit "reads as zeros" in its upper half.
pub const SUBCLUSTERS: u32 = 32;

/// [`EXT_ZONED`] of 44 bytes: the newest draft of QEMU's, and what is written here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ZonedC {
    /// [`ZONED_NONE`], [`ZONED_HOST_MANAGED`] or ours, [`ZONED_HOST_AWARE`].
    pub zoned: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// Number of zones.
    pub nr_zones: U32,
    /// Zone size, bytes, a power of two.
    pub zone_size: U64,
    /// Zone capacity, bytes.
    pub zone_capacity: U64,
    /// Where the table lies: `nr_zones` words.
    pub zonedmeta_offset: U64,
    /// The first so many zones are conventional.
    pub conventional_zones: U32,
    /// Most active zones, 0 for no limit.
    pub max_active_zones: U32,
    /// Most open zones, 0 for no limit.
    pub max_open_zones: U32,
}
const _: () = assert!(size_of::<ZonedC>() == 44);

/// [`EXT_ZONED`] of 48 bytes, series version 12 and 13.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[expect(
    missing_docs,
    reason = "the fields of ZonedC, and the one that ZonedA has besides"
)]
pub struct ZonedB {
    pub zoned: u8,
    pub reserved: [u8; 3],
    pub nr_zones: U32,
    pub zone_size: U64,
    pub zone_capacity: U64,
    pub conventional_zones: U32,
    pub max_active_zones: U32,
    pub max_open_zones: U32,
    pub max_append_bytes: U32,
    pub zonedmeta_offset: U64,
}
const _: () = assert!(size_of::<ZonedB>() == 48);

/// [`EXT_ZONED`] of 56 bytes, series version 8 to 11. Its table was written in the byte order of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ZonedA {
    /// As in [`ZonedC`].
    pub zoned: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// As in [`ZonedC`].
    pub zone_size: U64,
    /// As in [`ZonedC`].
    pub zone_capacity: U64,
    /// As in [`ZonedC`].
    pub conventional_zones: U32,
    /// As in [`ZonedC`].
    pub nr_zones: U32,
    /// As in [`ZonedC`].
    pub max_active_zones: U32,
    /// As in [`ZonedC`].
    pub max_open_zones: U32,
    /// Largest append, bytes.
    pub max_append_bytes: U32,
    /// Length of the table, bytes.
    pub zonedmeta_size: U64,
    /// As in [`ZonedC`].
    pub zonedmeta_offset: U64,
}
const _: () = assert!(size_of::<ZonedA>() == 56);

/// [`EXT_ZONED`] of 48 bytes, series version 4 to 7: [`ZonedA`] with narrow sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[expect(missing_docs, reason = "the fields of ZonedA")]
pub struct ZonedV7 {
    pub zoned: u8,
    pub reserved: [u8; 3],
    pub zone_size: U32,
    pub zone_capacity: U32,
    pub conventional_zones: U32,
    pub nr_zones: U32,
    pub max_active_zones: U32,
    pub max_open_zones: U32,
    pub max_append_bytes: U32,
    pub zonedmeta_size: U64,
    pub zonedmeta_offset: U64,
}
const _: () = assert!(size_of::<ZonedV7>() == 48);

/// `zoned`: no zones; the rest is to be ignored.
pub const ZONED_NONE: u8 = 0;
/// `zoned`: host-managed.
pub const ZONED_HOST_MANAGED: u8 = 1;
/// `zoned`, ours (the number of virtio), only together with [`INCOMPAT_ZONE_STATES`]: host-aware.
pub const ZONED_HOST_AWARE: u8 = 2;
/// Most zones that QEMU's drafts take.
pub const ZONED_MAX_ZONES: u32 = 1 << 20;

/// Words of the tables of [`ZonedC`]: the zone is conventional.
pub const ZONE_WORD_CONVENTIONAL: u64 = 1 << 63;
/// Words of the tables of [`ZonedC`]: the write pointer, a byte of the device.
pub const ZONE_WORD_POINTER: u64 = ZONE_WORD_CONVENTIONAL - 1;
/// Words of the tables of [`ZonedA`] and [`ZonedV7`]: the zone is conventional.
pub const ZONE_WORD_A_CONVENTIONAL: u64 = 1 << 59;
/// Words of the tables of [`ZonedA`] and [`ZonedV7`]: the write pointer, a byte of the device.
pub const ZONE_WORD_A_POINTER: u64 = ZONE_WORD_A_CONVENTIONAL - 1;

/// [`EXT_ZBDKIT`], ours: where the checked zone table lies. Only believed while [`AUTOCLEAR_ZONE_TABLE`] is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ZbdkitExtension {
    /// [`ZBDKIT_VERSION`].
    pub version: U32,
    /// Zero.
    pub reserved: U32,
    /// Where the area lies, in whole contiguous clusters: it is laid out like a sidecar.
    pub area_offset: U64,
    /// Length of the area, bytes, without the rest of its last cluster.
    pub area_len: U64,
    /// Where the [`SnapshotDirectory`] lies, in whole contiguous clusters, 0 for none.
    pub snapshots_offset: U64,
    /// Length of the directory, bytes, without the rest of its last cluster.
    pub snapshots_len: U64,
    /// Identity of the image, as in the area's headers.
    pub uuid: [u8; 16],
}
const _: () = assert!(size_of::<ZbdkitExtension>() == 56);

/// The only version of [`ZbdkitExtension`] and [`SnapshotDirectory`] so far.
pub const ZBDKIT_VERSION: u32 = 1;
/// First bytes of a [`SnapshotDirectory`].
pub const SNAPSHOT_DIRECTORY_MAGIC: [u8; 8] = *b"ZBDSNAPS";

/// Ours: the zone tables of the snapshots; `count` times [`SnapshotZones`] follow. It is never changed in place:
/// another one is written and synced, and the header's write switches to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SnapshotDirectory {
    /// [`SNAPSHOT_DIRECTORY_MAGIC`].
    pub magic: [u8; 8],
    /// [`ZBDKIT_VERSION`].
    pub version: U32,
    /// CRC-32C of the directory's bytes, entries included, with this field zero.
    pub crc: U32,
    /// Number of entries.
    pub count: U32,
    /// Zero.
    pub reserved: [u8; 12],
}
const _: () = assert!(size_of::<SnapshotDirectory>() == 32);

/// Ours: where the zone table of one snapshot lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SnapshotZones {
    /// Id of the snapshot, padded with zeros.
    pub id: [u8; 32],
    /// Where the table lies, in whole contiguous clusters, laid out like the area.
    pub offset: U64,
    /// Length of the table, bytes, without the rest of its last cluster.
    pub len: U64,
    /// Zero.
    pub reserved: [u8; 16],
}
const _: () = assert!(size_of::<SnapshotZones>() == 64);

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::*;

    #[test]
    fn header_fields_lie_where_the_specification_says() {
        assert_eq!(offset_of!(Header, backing_file_offset), 8);
        assert_eq!(offset_of!(Header, size), 24);
        assert_eq!(offset_of!(Header, l1_table_offset), 40);
        assert_eq!(offset_of!(Header, snapshots_offset), 64);
        assert_eq!(offset_of!(Header, incompatible_features), V2_HEADER_LEN);
        assert_eq!(offset_of!(Header, refcount_order), 96);
        assert_eq!(offset_of!(Header, compression_type), V3_HEADER_MIN);
    }

    #[test]
    fn drafts_of_zones_lie_where_their_series_put_them() {
        assert_eq!(offset_of!(ZonedC, zonedmeta_offset), 24);
        assert_eq!(offset_of!(ZonedC, max_open_zones), 40);
        assert_eq!(offset_of!(ZonedB, zonedmeta_offset), 40);
        assert_eq!(offset_of!(ZonedA, zone_size), 4);
        assert_eq!(offset_of!(ZonedA, nr_zones), 24);
        assert_eq!(offset_of!(ZonedA, zonedmeta_offset), 48);
        assert_eq!(offset_of!(ZonedV7, nr_zones), 16);
        assert_eq!(offset_of!(ZonedV7, zonedmeta_size), 32);
    }

    #[test]
    fn integers_are_big_endian() {
        let bytes: [u8; 48] = core::array::from_fn(|i| i as u8);
        let zoned = ZonedC::ref_from_bytes(&bytes[..44]).expect("44 bytes");
        assert_eq!(zoned.nr_zones.get(), 0x0405_0607);
        assert_eq!(zoned.zonedmeta_offset.get(), 0x1819_1a1b_1c1d_1e1f);
        assert_eq!(zoned.max_open_zones.get(), 0x2829_2a2b);
    }
}
