//! The sidecar: the file beside a raw image that holds its zone table, and the run state beside both.
//!
//! All integers are little-endian. Layout of the sidecar:
//!
//! ```text
//! 0            header, copy 0 (4096 bytes)
//! 4096         header, copy 1
//! 8192         table block 0, copy 0     each block: 64-byte block header + 63 entries of 64 bytes
//! 12288        table block 0, copy 1
//! 16384        table block 1, copy 0     ...
//! then         slots of zone descriptor extensions, one a zone, where the device has extensions
//! then         the list of marks, copy 0 and copy 1 ([`MARKS_COPY`] bytes each), once a block was marked
//! ```
//!
//! Header and blocks are written alternately to their two copies (generation modulo 2), each copy with a CRC-32C
//! over its 4096 bytes, and a copy is overwritten only after the other one was synced: a torn write leaves the
//! older copy. A block whose copies are all zeros was never written and holds empty zones.
//!
//! An extension is never overwritten while an entry speaks of it, so a slot has no second copy: its bytes are synced before
//! the entry is written that has their checksum.
//!
//! Marks are blocks whose reads fail (NVMe: Write Uncorrectable). Their list is written as blocks are, and the header says
//! where it lies.
//!
//! The run state holds one 64-bit word a zone behind a 4096-byte header; it is only believed where the header
//! names the same boot, image, epoch and files (see [`RunHeader`]).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Size in bytes of a header copy and of a table block copy.
pub const BLOCK: usize = 4096;
/// Zone entries in one table block.
pub const ENTRIES_PER_BLOCK: u32 = 63;
/// Byte offset of table block 0, copy 0.
pub const TABLE_OFFSET: u64 = 2 * BLOCK as u64;
/// First bytes of a sidecar header.
pub const MAGIC: [u8; 8] = *b"ZBDZONES";
/// First bytes of a table block.
pub const BLOCK_MAGIC: [u8; 4] = *b"ZTBL";
/// First bytes of a run state.
pub const RUN_MAGIC: [u8; 8] = *b"ZBDRUNST";
/// The version of run states, and of sidecars without [`Header::zns_flags`] and the fields before it, which are zeros there.
pub const VERSION: u32 = 1;
/// The version of sidecars of devices with zone random write areas or descriptor extensions.
pub const VERSION_ZNS: u32 = 2;
/// The version of sidecars with a list of marks ([`Header::marks_offset`]); they may have what [`VERSION_ZNS`] has.
pub const VERSION_MARKS: u32 = 3;

/// An epoch is open: its run state (or, failing that, the table) tells the written ends.
pub const OPEN: u8 = 1;
/// An epoch is open in which every write was made durable before it was acknowledged: the table tells it all.
pub const OPEN_SYNC: u8 = 2;

/// Which file a stamp speaks of: `stx_dev`, `stx_ino` and `stx_btime` of statx(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FileStamp {
    /// Device number (major << 32 | minor).
    pub dev: U64,
    /// Inode number.
    pub ino: U64,
    /// Birth time in nanoseconds since 1970, 0 where the file system knows none.
    pub btime: U64,
}

/// Sidecar header (one copy).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION`], [`VERSION_ZNS`] or [`VERSION_MARKS`].
    pub version: U32,
    /// CRC-32C of the copy's 4096 bytes with this field zero.
    pub crc: U32,
    /// Counts the header writes; the valid copy with the larger one is current.
    pub generation: U64,
    /// Identity of the image.
    pub uuid: [u8; 16],
    /// 1 host-managed, 2 host-aware (the numbers of virtio).
    pub model: u8,
    /// 0, or [`OPEN`] or [`OPEN_SYNC`] while an epoch is open.
    pub open: u8,
    /// Bytes used of `place`; 0 while no run state is kept.
    pub place_len: U16,
    /// Write granularity and logical block size, bytes.
    pub block_size: U32,
    /// Size of the device, bytes.
    pub size: U64,
    /// Zone size, bytes.
    pub zone_size: U64,
    /// Zone capacity, bytes.
    pub zone_capacity: U64,
    /// Largest append, bytes; 0 where append is not supported.
    pub max_append: U64,
    /// Number of zones.
    pub nr_zones: U32,
    /// The first so many zones are conventional.
    pub nr_conventional: U32,
    /// Most open zones, 0 for no limit.
    pub max_open: U32,
    /// Most active zones, 0 for no limit.
    pub max_active: U32,
    /// The running (or last) epoch.
    pub epoch: U64,
    /// Sum of the generations of all table blocks at the last clean close (wrapping): tells that a newer copy was lost.
    pub generation_sum: U64,
    /// The data file when it was last opened for writing.
    pub data_file: FileStamp,
    /// The last epoch whose unflushed writes may be lost, 0 if none since the last clean close: kept here so that an
    /// opening which ends before anybody heard of it is no silence.
    pub lost_epoch: U64,
    /// Size of a zone random write area, bytes; 0 where the device has none.
    pub zrwa_size: U64,
    /// The write pointer of a zone with such an area moves by multiples of this, bytes.
    pub zrwa_granularity: U64,
    /// Most zones with such an area, 0 for no limit.
    pub zrwa_count: U32,
    /// Size of a zone descriptor extension, bytes; 0 where the device has none.
    pub extension_size: U32,
    /// [`ZNS_EXPLICIT_COMMIT`]; other bits zero.
    pub zns_flags: u8,
    /// Zero.
    pub reserved: [u8; 7],
    /// Where the list of marks lies, bytes from the beginning of the file; 0 in versions before [`VERSION_MARKS`].
    pub marks_offset: U64,
    /// Zero.
    pub reserved2: [u8; 16],
    /// Path of the run state, not terminated.
    pub place: [u8; 1024],
    /// Zero.
    pub tail: [u8; BLOCK - 1224],
}
const _: () = assert!(size_of::<Header>() == BLOCK);

/// Pointers of zones with a random write area can be moved by command.
pub const ZNS_EXPLICIT_COMMIT: u8 = 1;
/// Slots of descriptor extensions are whole multiples of this many bytes, so that one can be written whatever alignment
/// direct I/O demands. What is behind the extension in its slot is zeros.
pub const EXTENSION_SLOT: u32 = BLOCK as u32;

/// First bytes of a list of marks.
pub const MARKS_MAGIC: [u8; 8] = *b"ZBDMARKS";
/// Bytes from one copy of the list of marks to the next, and of the last one.
pub const MARKS_COPY: u64 = 1 << 16;
/// Most ranges in a list of marks.
pub const MAX_MARKS: usize = (MARKS_COPY as usize - size_of::<MarksHead>()) / size_of::<Mark>();

/// Head of one copy of the list of marks; [`Mark`]s follow it, ascending, with gaps between them.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MarksHead {
    /// [`MARKS_MAGIC`].
    pub magic: [u8; 8],
    /// CRC-32C of the head with this field zero and of the marks.
    pub crc: U32,
    /// How many marks follow, at most [`MAX_MARKS`].
    pub count: U32,
    /// Counts the writes of the list; the valid copy with the larger one is current. It lies in copy `generation` modulo 2.
    pub generation: U64,
    /// UUID of the image.
    pub uuid: [u8; 16],
    /// Zero.
    pub reserved: [u8; 24],
}
const _: () = assert!(size_of::<MarksHead>() == 64);

/// A range of marked blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Mark {
    /// First byte on the device.
    pub start: U64,
    /// The byte behind the last one.
    pub end: U64,
}

/// One zone in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Entry {
    /// Written end, bytes from the zone's start; with [`ATTRIBUTE_ZRWA`] the write pointer, behind which the area begins.
    pub written: U64,
    /// Bytes written to the zone since the image was made.
    pub bytes_written: U64,
    /// Resets of the zone since the image was made.
    pub resets: U32,
    /// Finishes of the zone since the image was made.
    pub finishes: U32,
    /// [`ENTRY_FINISHED`], [`ENTRY_READ_ONLY`], [`ENTRY_OFFLINE`]; others zero.
    pub flags: u8,
    /// Zone attributes with the bits of ZNS (Zone Descriptor, ZA): [`ATTRIBUTE_BY_DEVICE`] and so on; others zero.
    pub attributes: u8,
    /// Zero.
    pub padding: [u8; 2],
    /// CRC-32C of the zone's descriptor extension (all bytes of the device's extension size), with [`ATTRIBUTE_EXTENSION`].
    pub extension_crc: U32,
    /// Zero.
    pub reserved: [u8; 32],
}
const _: () = assert!(size_of::<Entry>() == 64);

/// The zone was finished: full, whatever its written end.
pub const ENTRY_FINISHED: u8 = 1;
/// The operator made the zone read-only.
pub const ENTRY_READ_ONLY: u8 = 2;
/// The operator took the zone offline.
pub const ENTRY_OFFLINE: u8 = 4;

/// The device finished the zone by itself (ZFC).
pub const ATTRIBUTE_BY_DEVICE: u8 = 1 << 0;
/// The device recommends to finish the zone (FZR).
pub const ATTRIBUTE_FINISH_RECOMMENDED: u8 = 1 << 1;
/// The device recommends to reset the zone (RZR).
pub const ATTRIBUTE_RESET_RECOMMENDED: u8 = 1 << 2;
/// The zone has a random write area (ZRWAV).
pub const ATTRIBUTE_ZRWA: u8 = 1 << 3;
/// The zone has a descriptor extension (ZDEV).
pub const ATTRIBUTE_EXTENSION: u8 = 1 << 7;

/// One copy of a table block.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TableBlock {
    /// [`BLOCK_MAGIC`].
    pub magic: [u8; 4],
    /// CRC-32C of the copy's 4096 bytes with this field zero.
    pub crc: U32,
    /// Counts this block's writes; the valid copy with the larger one is current.
    pub generation: U64,
    /// Number of this block: a copy that was written to the wrong place is not believed.
    pub index: U64,
    /// UUID of the image: a block left from another image is not believed.
    pub uuid: [u8; 16],
    /// Zero.
    pub reserved: [u8; 24],
    /// The zones `index * 63 ..`.
    pub entries: [Entry; ENTRIES_PER_BLOCK as usize],
}
const _: () = assert!(size_of::<TableBlock>() == BLOCK);

/// Header of the run state (4096 bytes with padding); words of 64 bits a zone follow at [`BLOCK`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RunHeader {
    /// [`RUN_MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION`].
    pub version: U32,
    /// CRC-32C of these bytes with this field zero and without `invalid`.
    pub crc: U32,
    /// Boot id of the kernel: its page cache is what makes the words true.
    pub boot_id: [u8; 16],
    /// The image's UUID.
    pub uuid: [u8; 16],
    /// The epoch that wrote it.
    pub epoch: U64,
    /// Number of words.
    pub nr_zones: U32,
    /// Zero.
    pub reserved: U32,
    /// The data file.
    pub data_file: FileStamp,
    /// The sidecar.
    pub sidecar: FileStamp,
    /// Not zero once the epoch failed: the words are not believed any more.
    pub invalid: U64,
}
const _: () = assert!(size_of::<RunHeader>() == 120);

/// Offset of [`RunHeader::invalid`] in the file, bytes.
pub const RUN_INVALID_OFFSET: u64 = 112;

/// Run-state word: set once the zone's written end moved in this epoch; without it the table speaks for the zone.
pub const WORD_VALID: u64 = 1 << 63;
/// Run-state word: the low bits of the zone's counter of resets, from [`WORD_GENERATION_SHIFT`] on. A word whose bits
/// differ from the table's counter is older than the reset that the table has: then the table speaks for the zone.
pub const WORD_GENERATION: u64 = 0x3f << WORD_GENERATION_SHIFT;
/// Where [`WORD_GENERATION`] begins.
pub const WORD_GENERATION_SHIFT: u32 = 56;
/// Run-state word: the written end, bytes from the zone's start.
pub const WORD_WRITTEN: u64 = (1 << 56) - 1;

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::*;

    #[test]
    fn fields_lie_where_docs_sidecar_says() {
        assert_eq!(offset_of!(Header, lost_epoch), 136);
        assert_eq!(offset_of!(Header, zrwa_size), 144);
        assert_eq!(offset_of!(Header, zrwa_granularity), 152);
        assert_eq!(offset_of!(Header, zrwa_count), 160);
        assert_eq!(offset_of!(Header, extension_size), 164);
        assert_eq!(offset_of!(Header, zns_flags), 168);
        assert_eq!(offset_of!(Header, marks_offset), 176);
        assert_eq!(offset_of!(Header, place), 200);
        assert_eq!(offset_of!(MarksHead, generation), 16);
        assert_eq!(offset_of!(MarksHead, uuid), 24);
        assert_eq!(MAX_MARKS, 4092);
        assert_eq!(offset_of!(Entry, flags), 24);
        assert_eq!(offset_of!(Entry, attributes), 25);
        assert_eq!(offset_of!(Entry, extension_crc), 28);
    }
}
