//! Linux's zoned block device ioctls (`include/uapi/linux/blkzoned.h`): their numbers and what they carry.
//!
//! Native byte order, since it is an interface of the running kernel. A sector is 512 bytes, whatever the block size.
//! Names are the kernel's, in Rust's case. Types only.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a sector, the unit of every position and length here.
pub const SECTOR_SIZE: u64 = 512;

/// `BLKREPORTZONE`: fills a [`ReportHeader`] and the [`Zone`]s behind it, as many as it says there is room for.
pub const REPORT_ZONE: u32 = ioctl(READ | WRITE, 130, size_of::<ReportHeader>());
/// `BLKRESETZONE`: resets the zones of a [`ZoneRange`].
pub const RESET_ZONE: u32 = ioctl(WRITE, 131, size_of::<ZoneRange>());
/// `BLKGETZONESZ`: the zone size in sectors, 32 bits.
pub const GET_ZONE_SIZE: u32 = ioctl(READ, 132, size_of::<u32>());
/// `BLKGETNRZONES`: the number of zones, 32 bits.
pub const GET_NR_ZONES: u32 = ioctl(READ, 133, size_of::<u32>());
/// `BLKOPENZONE` (Linux 5.5): opens the zones of a [`ZoneRange`] explicitly.
pub const OPEN_ZONE: u32 = ioctl(WRITE, 134, size_of::<ZoneRange>());
/// `BLKCLOSEZONE` (Linux 5.5): closes them.
pub const CLOSE_ZONE: u32 = ioctl(WRITE, 135, size_of::<ZoneRange>());
/// `BLKFINISHZONE` (Linux 5.5): makes them full.
pub const FINISH_ZONE: u32 = ioctl(WRITE, 136, size_of::<ZoneRange>());

/// The flag of [`ReportHeader::flags`] by which a kernel (5.9 and later) says that [`Zone::capacity`] means something.
pub const REPORT_CAPACITY: u32 = 1 << 0;

/// Where the direction stands in an ioctl number, and its bits, seen from the program.
const DIRECTION_SHIFT: u32 = 30;
const WRITE: u32 = 1;
const READ: u32 = 2;

// Other architectures number the directions otherwise, and their kernels would refuse or misread ours.
#[cfg(any(
    target_arch = "mips",
    target_arch = "mips64",
    target_arch = "powerpc",
    target_arch = "powerpc64",
    target_arch = "sparc",
    target_arch = "sparc64"
))]
compile_error!("ioctl numbers of this architecture are not known");

/// An ioctl number of the block layer (type 0x12), as `_IOC` makes it (`asm-generic/ioctl.h`).
const fn ioctl(direction: u32, number: u32, size: usize) -> u32 {
    direction << DIRECTION_SHIFT | (size as u32) << 16 | 0x12 << 8 | number
}

/// `struct blk_zone_report`, without the zones behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReportHeader {
    /// In: a sector of the first zone to report.
    pub sector: u64,
    /// In: for how many zones there is room. Out: how many are there.
    pub nr_zones: u32,
    /// Out: [`REPORT_CAPACITY`].
    pub flags: u32,
}

/// `struct blk_zone`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Zone {
    /// First sector.
    pub start: u64,
    /// Sectors.
    pub len: u64,
    /// The write pointer, a sector of the device; means nothing in some conditions.
    pub wp: u64,
    /// A value of [`zone_type`].
    pub kind: u8,
    /// A value of [`zone_condition`].
    pub condition: u8,
    /// Writes that were not sequential were seen (host-aware).
    pub non_seq: u8,
    /// The drive recommends a reset.
    pub reset: u8,
    /// Zero.
    pub reserved0: [u8; 4],
    /// Sectors that can be written, with [`REPORT_CAPACITY`].
    pub capacity: u64,
    /// Zero.
    pub reserved1: [u8; 24],
}

/// `struct blk_zone_range`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ZoneRange {
    /// First sector, the start of a zone.
    pub sector: u64,
    /// Sectors, whole zones.
    pub nr_sectors: u64,
}

/// Values of [`Zone::kind`]: `enum blk_zone_type`.
#[expect(missing_docs, reason = "names of the kernel")]
pub mod zone_type {
    pub const CONVENTIONAL: u8 = 1;
    pub const SEQWRITE_REQ: u8 = 2;
    pub const SEQWRITE_PREF: u8 = 3;
}

/// Values of [`Zone::condition`]: `enum blk_zone_cond`.
#[expect(missing_docs, reason = "names of the kernel")]
pub mod zone_condition {
    pub const NOT_WP: u8 = 0x0;
    pub const EMPTY: u8 = 0x1;
    pub const IMP_OPEN: u8 = 0x2;
    pub const EXP_OPEN: u8 = 0x3;
    pub const CLOSED: u8 = 0x4;
    pub const READONLY: u8 = 0xd;
    pub const FULL: u8 = 0xe;
    pub const OFFLINE: u8 = 0xf;
}

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::*;

    #[test]
    fn ioctl_numbers_are_the_kernels() {
        // As strace prints them on x86-64 and arm64.
        assert_eq!(
            [
                REPORT_ZONE,
                RESET_ZONE,
                GET_ZONE_SIZE,
                GET_NR_ZONES,
                OPEN_ZONE,
                CLOSE_ZONE,
                FINISH_ZONE
            ],
            [
                0xc010_1282,
                0x4010_1283,
                0x8004_1284,
                0x8004_1285,
                0x4010_1286,
                0x4010_1287,
                0x4010_1288
            ]
        );
    }

    #[test]
    fn layouts_are_the_kernels() {
        assert_eq!(size_of::<ReportHeader>(), 16);
        assert_eq!(
            (
                offset_of!(ReportHeader, nr_zones),
                offset_of!(ReportHeader, flags)
            ),
            (8, 12)
        );
        assert_eq!(size_of::<Zone>(), 64);
        assert_eq!(
            (
                offset_of!(Zone, wp),
                offset_of!(Zone, kind),
                offset_of!(Zone, condition)
            ),
            (16, 24, 25)
        );
        assert_eq!((offset_of!(Zone, reset), offset_of!(Zone, capacity)), (27, 32));
        assert_eq!(size_of::<ZoneRange>(), 16);
    }
}
