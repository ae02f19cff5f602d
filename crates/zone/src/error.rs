//! Why the engine refuses: each reason with the values that offend, so that a door can map it to its own
//! status and a message can name it.

use crate::types::{Condition, ZoneNo};

/// Why a request is not admitted, now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The zone is being reset, finished or changed by the operator, or it drains after a failed write: wait
    /// for [`Events::zone_changed`](crate::Events::zone_changed) and ask again.
    #[error("zone {0} is busy")]
    Busy(ZoneNo),
    /// The lane has used up the slots of its pool: wait until one of its own writes is over and ask again.
    #[error("no slot is free for another write in flight")]
    NoSlot,
    /// The request breaks a rule.
    #[error(transparent)]
    Zone(#[from] ZoneError),
}

/// A rule of zoned devices that a request breaks. Offsets and lengths are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ZoneError {
    /// The range ends beyond the device.
    #[error("offset {offset:#x}, length {len:#x} is outside the device of {size:#x} bytes")]
    OutOfRange {
        /// First byte of the request.
        offset: u64,
        /// Its length.
        len: u64,
        /// The device's size.
        size: u64,
    },
    /// Offset or length is not a multiple of the block size, or the length is 0.
    #[error("offset {offset:#x}, length {len:#x} is not whole blocks of {granularity} bytes")]
    Unaligned {
        /// First byte of the request.
        offset: u64,
        /// Its length.
        len: u64,
        /// The block size.
        granularity: u32,
    },
    /// The request touches a zone and the next one.
    #[error("offset {offset:#x}, length {len:#x} crosses the end of zone {zone} at {end:#x}")]
    Boundary {
        /// The zone that it starts in, or the last one that it may touch.
        zone: ZoneNo,
        /// First byte of the request.
        offset: u64,
        /// Its length.
        len: u64,
        /// The end of `zone`.
        end: u64,
    },
    /// A write to a sequential-required zone starts elsewhere than at the write pointer.
    #[error("write at {offset:#x} is not at the write pointer {wp:#x} of zone {zone}")]
    NotAtWritePointer {
        /// The zone.
        zone: ZoneNo,
        /// First byte of the request.
        offset: u64,
        /// Where it should start, the writes in flight taken into account.
        wp: u64,
    },
    /// The write would end above the zone's capacity.
    #[error(
        "write of {len:#x} bytes at {offset:#x} goes beyond the capacity of zone {zone}, which ends at {end:#x}"
    )]
    ExceedsCapacity {
        /// The zone.
        zone: ZoneNo,
        /// First byte of the request; the one it would have got, for an append.
        offset: u64,
        /// Its length.
        len: u64,
        /// The end of the zone's writable bytes.
        end: u64,
    },
    /// The zone is full.
    #[error("zone {zone} is full")]
    Full {
        /// The zone.
        zone: ZoneNo,
    },
    /// The zone is read-only.
    #[error("zone {zone} is read-only")]
    ReadOnly {
        /// The zone.
        zone: ZoneNo,
    },
    /// The zone is offline.
    #[error("zone {zone} is offline")]
    Offline {
        /// The zone.
        zone: ZoneNo,
    },
    /// All open resources are taken by explicitly open zones.
    #[error("too many open zones: {limit} are open and none of them can be closed implicitly")]
    TooManyOpen {
        /// The device's limit.
        limit: u32,
    },
    /// All active resources are taken. Also said where the open resources are exhausted as well.
    #[error("too many active zones: {limit} are open or closed")]
    TooManyActive {
        /// The device's limit.
        limit: u32,
    },
    /// The operation is not for conventional zones.
    #[error("zone {zone} is conventional")]
    Conventional {
        /// The zone.
        zone: ZoneNo,
    },
    /// Zone append is for sequential-required zones only.
    #[error("zone {zone} is not a sequential-write-required zone")]
    NotSequentialRequired {
        /// The zone.
        zone: ZoneNo,
    },
    /// A zone was named by an offset that is not its start.
    #[error("offset {offset:#x} is not the start of a zone")]
    NotZoneStart {
        /// The offset.
        offset: u64,
    },
    /// The append is longer than the device allows.
    #[error("append of {len:#x} bytes is longer than the {max:#x} that the device allows")]
    AppendTooLarge {
        /// Its length.
        len: u64,
        /// The longest append.
        max: u64,
    },
    /// The device has no zone append.
    #[error("the device has no zone append")]
    AppendUnsupported,
    /// The zone's condition does not allow the operation.
    #[error("zone {zone} is {condition}, which does not allow the operation")]
    InvalidTransition {
        /// The zone.
        zone: ZoneNo,
        /// Its condition.
        condition: Condition,
    },
    /// The zone has a random write area (ZRWA), which rules the operation out.
    #[error("zone {zone} has a random write area, which does not allow the operation")]
    RandomWriteArea {
        /// The zone.
        zone: ZoneNo,
    },
    /// All of the device's random write areas (ZRWA) are taken.
    #[error("no random write area is left for zone {zone}")]
    NoRandomWriteArea {
        /// The zone.
        zone: ZoneNo,
    },
    /// The operation is for zones with a random write area (ZRWA).
    #[error("zone {zone} has no random write area")]
    NotRandomWritable {
        /// The zone.
        zone: ZoneNo,
    },
    /// A write lies below or too far above the random write area (ZRWA), or a commit's end does not lie in it.
    #[error(
        "offset {offset:#x}, length {len:#x} does not lie in the random write area of zone {zone}, {start:#x} to {end:#x}"
    )]
    OutsideRandomWriteArea {
        /// The zone.
        zone: ZoneNo,
        /// First byte of the request; where a commit ends.
        offset: u64,
        /// Its length; 0 for a commit.
        len: u64,
        /// The write pointer, at which the area begins.
        start: u64,
        /// The end of what the request may reach: of the area for a commit, of the region behind it for a write.
        end: u64,
    },
    /// A request in the zone was dropped before it was over, so nobody knows what the zone holds above its
    /// written end: it admits nothing until the image is opened again.
    #[error("zone {zone} lost track of a request and is unusable until the image is opened again")]
    Poisoned {
        /// The zone.
        zone: ZoneNo,
    },
}

impl ZoneError {
    /// The same for somebody who sees the device from a zone on: `zones` zones and `bytes` bytes lie before it.
    #[must_use]
    pub fn seen_from(self, zones: u32, bytes: u64) -> ZoneError {
        let mut error = self;
        use ZoneError as E;
        match &mut error {
            E::Boundary {
                zone, offset, end, ..
            }
            | E::ExceedsCapacity {
                zone, offset, end, ..
            } => {
                zone.0 = zone.0.saturating_sub(zones);
                *offset = offset.saturating_sub(bytes);
                *end = end.saturating_sub(bytes);
            }
            E::OutsideRandomWriteArea {
                zone,
                offset,
                start,
                end,
                ..
            } => {
                zone.0 = zone.0.saturating_sub(zones);
                for at in [offset, start, end] {
                    *at = at.saturating_sub(bytes);
                }
            }
            E::NotAtWritePointer { zone, offset, wp } => {
                zone.0 = zone.0.saturating_sub(zones);
                *offset = offset.saturating_sub(bytes);
                *wp = wp.saturating_sub(bytes);
            }
            E::OutOfRange { offset, size, .. } => {
                *offset = offset.saturating_sub(bytes);
                *size = size.saturating_sub(bytes);
            }
            E::Unaligned { offset, .. } | E::NotZoneStart { offset } => {
                *offset = offset.saturating_sub(bytes);
            }
            E::Full { zone }
            | E::ReadOnly { zone }
            | E::Offline { zone }
            | E::Conventional { zone }
            | E::NotSequentialRequired { zone }
            | E::InvalidTransition { zone, .. }
            | E::RandomWriteArea { zone }
            | E::NoRandomWriteArea { zone }
            | E::NotRandomWritable { zone }
            | E::Poisoned { zone } => zone.0 = zone.0.saturating_sub(zones),
            E::TooManyOpen { .. }
            | E::TooManyActive { .. }
            | E::AppendTooLarge { .. }
            | E::AppendUnsupported => {}
        }
        error
    }
}

/// A stored record that no zone of this geometry can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// More is written than the zone can hold.
    #[error("zone {zone} has {written:#x} bytes written, more than its capacity of {capacity:#x}")]
    BeyondCapacity {
        /// The zone.
        zone: ZoneNo,
        /// Bytes written from its start.
        written: u64,
        /// Its capacity.
        capacity: u64,
    },
    /// The written end lies inside a block.
    #[error("zone {zone} has {written:#x} bytes written, which is not whole blocks of {granularity} bytes")]
    Unaligned {
        /// The zone.
        zone: ZoneNo,
        /// Bytes written from its start.
        written: u64,
        /// The block size.
        granularity: u32,
    },
    /// A conventional zone with a write pointer, or finished.
    #[error("zone {zone} is conventional but its record has a write pointer")]
    Conventional {
        /// The zone.
        zone: ZoneNo,
    },
    /// A random write area where none can be: the device has none, the zone is full, or its pointer is not a multiple of the
    /// granularity.
    #[error("zone {zone} has a random write area that it cannot have")]
    RandomWriteArea {
        /// The zone.
        zone: ZoneNo,
    },
    /// A descriptor extension, but the device has none.
    #[error("zone {zone} has a descriptor extension, but the device has none")]
    Extension {
        /// The zone.
        zone: ZoneNo,
    },
    /// The state of so many zones does not fit into memory.
    #[error("no memory for the state of {zones} zones")]
    NoMemory {
        /// The number of zones.
        zones: u32,
    },
}

/// A geometry that no device can have. The messages say what would be right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// The block size is not 512, 1024, ... 65536.
    #[error("block size {0} is not a power of two from 512 to 65536")]
    BlockSize(u32),
    /// The device has no bytes.
    #[error("device size must not be 0")]
    SizeZero,
    /// The device's size is not whole blocks.
    #[error("device size {size} is not a multiple of the block size {block_size}; {} would be", size.checked_next_multiple_of(u64::from(*block_size)).unwrap_or(0))]
    SizeUnaligned {
        /// The device's size.
        size: u64,
        /// The block size.
        block_size: u32,
    },
    /// The zone size is 0.
    #[error("zone size must not be 0")]
    ZoneSizeZero,
    /// The zone size is not whole sectors.
    #[error("zone size {0} is not a multiple of 512")]
    ZoneSizeSectors(u64),
    /// The zone size is not whole blocks.
    #[error("zone size {zone_size} is not a multiple of the block size {block_size}")]
    ZoneSizeUnaligned {
        /// The zone size.
        zone_size: u64,
        /// The block size.
        block_size: u32,
    },
    /// Not even one zone fits.
    #[error("zone size {zone_size} is bigger than the device, which has {size} bytes")]
    ZoneSizeTooBig {
        /// The zone size.
        zone_size: u64,
        /// The device's size.
        size: u64,
    },
    /// There would be too many zones.
    #[error("{zones} zones are too many, at most {max} are possible: choose a zone size of at least {}", zone_size.saturating_mul(zones.div_ceil(u64::from(*max))))]
    TooManyZones {
        /// The number of zones.
        zones: u64,
        /// The highest possible number.
        max: u32,
        /// The zone size.
        zone_size: u64,
    },
    /// The zone capacity is 0.
    #[error("zone capacity must not be 0")]
    CapacityZero,
    /// The zone capacity is above the zone size.
    #[error("zone capacity {capacity} is bigger than the zone size {zone_size}")]
    CapacityTooBig {
        /// The zone capacity.
        capacity: u64,
        /// The zone size.
        zone_size: u64,
    },
    /// The zone capacity is not whole blocks.
    #[error("zone capacity {capacity} is not a multiple of the block size {block_size}")]
    CapacityUnaligned {
        /// The zone capacity.
        capacity: u64,
        /// The block size.
        block_size: u32,
    },
    /// No sequential zone is left.
    #[error(
        "{conventional} conventional zones leave no sequential one: the device has {zones} zones, so at most {} can be conventional", zones - 1
    )]
    TooManyConventional {
        /// Conventional zones asked for.
        conventional: u32,
        /// All zones.
        zones: u32,
    },
    /// More zones may be open than active.
    #[error(
        "max open zones {max_open} is more than max active zones {max_active}: an open zone is active, so max open must be at most {max_active}"
    )]
    OpenAboveActive {
        /// The open limit.
        max_open: u32,
        /// The active limit.
        max_active: u32,
    },
    /// What only Zoned Namespaces have on a device that cannot be one.
    #[error("zone random write areas and descriptor extensions are for host-managed devices")]
    ZnsHostAware,
    /// The granularity of random write areas is not whole blocks.
    #[error("ZRWA granularity {granularity} is not a multiple of the block size {block_size}")]
    ZrwaGranularity {
        /// The granularity.
        granularity: u64,
        /// The block size.
        block_size: u32,
    },
    /// Random write areas of no size.
    #[error("ZRWA size must not be 0 where a granularity or a number of ZRWAs is given")]
    ZrwaSizeZero,
    /// The size of random write areas is not whole granules.
    #[error("ZRWA size {size} is not a multiple of the ZRWA granularity {granularity}")]
    ZrwaSize {
        /// The size.
        size: u64,
        /// The granularity.
        granularity: u64,
    },
    /// The size of random write areas is out of range.
    #[error("ZRWA size {size} is too large: it can be at most {max}, which is 65535 blocks")]
    ZrwaTooLarge {
        /// The size.
        size: u64,
        /// The largest possible.
        max: u64,
    },
    /// More zones may have a random write area than be active.
    #[error(
        "max ZRWA {count} is more than max active zones {max_active}: a zone with a ZRWA is active, so it must be at most {max_active}"
    )]
    ZrwaAboveActive {
        /// The limit of areas.
        count: u32,
        /// The active limit.
        max_active: u32,
    },
    /// The size of a descriptor extension is not one that a descriptor can tell.
    #[error("zone descriptor extension size {0} is not a multiple of 64 up to 16320")]
    ExtensionSize(u32),
    /// Not even one block can be appended.
    #[error("max append {max_append} is less than the block size {block_size} (0 means no zone append)")]
    AppendTooSmall {
        /// The append limit.
        max_append: u64,
        /// The block size.
        block_size: u32,
    },
    /// The append limit of a device is not some of the blocks that it should get.
    #[error("max append {max_append} is not a multiple of the block size {block_size}")]
    AppendUnaligned {
        /// The append limit.
        max_append: u64,
        /// The block size.
        block_size: u32,
    },
}
