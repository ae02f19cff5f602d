//! virtio-blk: configuration space, requests, zone reports (virtio 1.3, 5.2).
//!
//! Names are the standard's, in Rust's case; all integers are little-endian, as on a device with
//! `VIRTIO_F_VERSION_1`. A sector is 512 bytes, whatever the block size. Types only: what a value
//! means, and whether it may occur, is the device's business.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a sector, the unit of every position and length of the protocol.
pub const SECTOR_SIZE: u64 = 512;

/// The virtio device number of a block device (5.2.1).
pub const DEVICE_ID: u32 = 2;

/// Numbers of the device's feature bits (5.2.3), and of those that any virtio device has (6).
#[expect(missing_docs, reason = "names of the standard")]
pub mod feature {
    pub const SIZE_MAX: u32 = 1;
    pub const SEG_MAX: u32 = 2;
    pub const GEOMETRY: u32 = 4;
    pub const RO: u32 = 5;
    pub const BLK_SIZE: u32 = 6;
    pub const FLUSH: u32 = 9;
    pub const TOPOLOGY: u32 = 10;
    pub const CONFIG_WCE: u32 = 11;
    pub const MQ: u32 = 12;
    pub const DISCARD: u32 = 13;
    pub const WRITE_ZEROES: u32 = 14;
    pub const LIFETIME: u32 = 15;
    pub const SECURE_ERASE: u32 = 16;
    pub const ZONED: u32 = 17;

    pub const RING_INDIRECT_DESC: u32 = 28;
    pub const RING_EVENT_IDX: u32 = 29;
    pub const VERSION_1: u32 = 32;
}

/// Bits of the device status (2.1).
#[expect(missing_docs, reason = "names of the standard")]
pub mod device_status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const DEVICE_NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
}

/// `struct virtio_blk_config` (5.2.4). A field means something only with its feature bit.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Config {
    /// Sectors of the device.
    pub capacity: U64,
    /// Longest segment in bytes (`SIZE_MAX`).
    pub size_max: U32,
    /// Most data segments in a request (`SEG_MAX`).
    pub seg_max: U32,
    /// Disk-style geometry (`GEOMETRY`).
    pub geometry: Geometry,
    /// Bytes of a logical block (`BLK_SIZE`).
    pub blk_size: U32,
    /// Hints for alignment (`TOPOLOGY`).
    pub topology: Topology,
    /// Cache mode: 0 write-through, 1 write-back (`CONFIG_WCE`). The only byte that a driver writes.
    pub writeback: u8,
    /// Zero.
    pub unused0: u8,
    /// Request queues (`MQ`).
    pub num_queues: U16,
    /// Longest range of a discard in sectors (`DISCARD`).
    pub max_discard_sectors: U32,
    /// Most ranges of a discard (`DISCARD`).
    pub max_discard_seg: U32,
    /// Alignment for splitting discards, in sectors (`DISCARD`).
    pub discard_sector_alignment: U32,
    /// Longest range of a write zeroes in sectors (`WRITE_ZEROES`).
    pub max_write_zeroes_sectors: U32,
    /// Most ranges of a write zeroes (`WRITE_ZEROES`).
    pub max_write_zeroes_seg: U32,
    /// Whether write zeroes may deallocate (`WRITE_ZEROES`).
    pub write_zeroes_may_unmap: u8,
    /// Zero.
    pub unused1: [u8; 3],
    /// Longest range of a secure erase in sectors (`SECURE_ERASE`).
    pub max_secure_erase_sectors: U32,
    /// Most ranges of a secure erase (`SECURE_ERASE`).
    pub max_secure_erase_seg: U32,
    /// Alignment for splitting secure erases, in sectors (`SECURE_ERASE`).
    pub secure_erase_sector_alignment: U32,
    /// Zones (`ZONED`).
    pub zoned: ZonedCharacteristics,
}

const _: () = assert!(size_of::<Config>() == 96);

/// The disk-style geometry inside [`Config`].
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
#[expect(missing_docs, reason = "names of the standard")]
pub struct Geometry {
    pub cylinders: U16,
    pub heads: u8,
    pub sectors: u8,
}

/// The hints for alignment inside [`Config`].
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Topology {
    /// Logical blocks in a physical block, as a power of two.
    pub physical_block_exp: u8,
    /// First aligned logical block.
    pub alignment_offset: u8,
    /// Smallest good request in logical blocks.
    pub min_io_size: U16,
    /// Best request in logical blocks.
    pub opt_io_size: U32,
}

/// `struct virtio_blk_zoned_characteristics` inside [`Config`].
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ZonedCharacteristics {
    /// Zone size in sectors; the last zone may be shorter.
    pub zone_sectors: U32,
    /// Most open zones, 0 without a limit.
    pub max_open_zones: U32,
    /// Most active zones, 0 without a limit.
    pub max_active_zones: U32,
    /// Longest zone append in sectors, 0 where there is none.
    pub max_append_sectors: U32,
    /// Alignment of offset and length of writes to sequential zones, in bytes.
    pub write_granularity: U32,
    /// One of [`zone_model`].
    pub model: u8,
    /// Zero.
    pub unused2: [u8; 3],
}

/// Values of [`ZonedCharacteristics::model`].
#[expect(missing_docs, reason = "names of the standard")]
pub mod zone_model {
    pub const NONE: u8 = 0;
    pub const HOST_MANAGED: u8 = 1;
    pub const HOST_AWARE: u8 = 2;
}

/// Request types: [`RequestHeader::kind`] (5.2.6).
#[expect(missing_docs, reason = "names of the standard")]
pub mod request_type {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const GET_LIFETIME: u32 = 10;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
    pub const SECURE_ERASE: u32 = 14;
    pub const ZONE_APPEND: u32 = 15;
    pub const ZONE_REPORT: u32 = 16;
    pub const ZONE_OPEN: u32 = 18;
    pub const ZONE_CLOSE: u32 = 20;
    pub const ZONE_FINISH: u32 = 22;
    pub const ZONE_RESET: u32 = 24;
    pub const ZONE_RESET_ALL: u32 = 26;
}

/// The status byte, last byte of every request (5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[expect(missing_docs, reason = "names of the standard")]
pub enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupp = 2,
    ZoneInvalidCmd = 3,
    ZoneUnalignedWp = 4,
    ZoneOpenResource = 5,
    ZoneActiveResource = 6,
}

/// What every request starts with: type, reserved, sector (5.2.6).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RequestHeader {
    /// One of [`request_type`]; `type` in the standard.
    pub kind: U32,
    /// Once the priority; ignored.
    pub reserved: U32,
    /// First sector.
    pub sector: U64,
}

const _: () = assert!(size_of::<RequestHeader>() == 16);

/// `struct virtio_blk_discard_write_zeroes`: a range in the data of such a request (5.2.6).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct DiscardWriteZeroes {
    /// First sector.
    pub sector: U64,
    /// Sectors.
    pub num_sectors: U32,
    /// [`Self::FLAG_UNMAP`]; the other bits are reserved.
    pub flags: U32,
}

impl DiscardWriteZeroes {
    /// The device may deallocate what it zeroes.
    pub const FLAG_UNMAP: u32 = 1;
}

const _: () = assert!(size_of::<DiscardWriteZeroes>() == 16);

/// Bytes that a GET_ID request returns: text, padded with zeros.
pub const ID_BYTES: usize = 20;

/// What follows the data of a zone append, both written by the device (`struct virtio_blk_req_za`).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ZoneAppendIn {
    /// First sector of the data written.
    pub append_sector: U64,
    /// A [`Status`].
    pub status: u8,
}

const _: () = assert!(size_of::<ZoneAppendIn>() == 9);

/// `struct virtio_blk_zone_report`: header of a zone report; descriptors follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ZoneReport {
    /// Descriptors that follow whole in this buffer.
    pub nr_zones: U64,
    /// Zero.
    pub reserved: [u8; 56],
}

const _: () = assert!(size_of::<ZoneReport>() == 64);

impl ZoneReport {
    /// The header of a report of `nr_zones`.
    pub fn new(nr_zones: u64) -> Self {
        ZoneReport {
            nr_zones: U64::new(nr_zones),
            reserved: [0; 56],
        }
    }
}

/// `struct virtio_blk_zone_descriptor`: one zone of a report. Positions in sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ZoneDescriptor {
    /// Capacity.
    pub z_cap: U64,
    /// First sector.
    pub z_start: U64,
    /// Write pointer, absolute. Undefined for conventional, read-only, full and offline zones.
    pub z_wp: U64,
    /// 1 conventional, 2 sequential write required, 3 sequential write preferred.
    pub z_type: u8,
    /// State: the numbers of ZBC.
    pub z_state: u8,
    /// Zero.
    pub reserved: [u8; 38],
}

const _: () = assert!(size_of::<ZoneDescriptor>() == 64);

impl ZoneDescriptor {
    /// All bytes zero.
    pub const ZERO: Self = ZoneDescriptor {
        z_cap: U64::ZERO,
        z_start: U64::ZERO,
        z_wp: U64::ZERO,
        z_type: 0,
        z_state: 0,
        reserved: [0; 38],
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::offset_of;
    use virtio_bindings::{virtio_blk as vb, virtio_config, virtio_ring};

    macro_rules! same_offsets {
        ($ours:ty, $theirs:ty: $($field:ident).+ $(=> $($other:ident).+)? $(, $($rest:tt)*)?) => {
            same_offsets!(@one $ours, $theirs, $($field).+ $(=> $($other).+)?);
            $(same_offsets!($ours, $theirs: $($rest)*);)?
        };
        ($ours:ty, $theirs:ty:) => {};
        (@one $ours:ty, $theirs:ty, $($field:ident).+) => {
            assert_eq!(offset_of!($ours, $($field).+), offset_of!($theirs, $($field).+));
        };
        (@one $ours:ty, $theirs:ty, $($field:ident).+ => $($other:ident).+) => {
            assert_eq!(offset_of!($ours, $($field).+), offset_of!($theirs, $($other).+));
        };
    }

    #[test]
    fn layouts_are_those_of_the_kernel_header() {
        assert_eq!(size_of::<Config>(), size_of::<vb::virtio_blk_config>());
        same_offsets!(Config, vb::virtio_blk_config: capacity, size_max, seg_max, geometry, blk_size,
            topology.physical_block_exp => physical_block_exp, topology.alignment_offset => alignment_offset,
            topology.min_io_size => min_io_size, topology.opt_io_size => opt_io_size, writeback => wce,
            num_queues, max_discard_sectors, max_discard_seg, discard_sector_alignment,
            max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap,
            max_secure_erase_sectors, max_secure_erase_seg, secure_erase_sector_alignment,
            zoned.zone_sectors, zoned.max_open_zones, zoned.max_active_zones,
            zoned.max_append_sectors, zoned.write_granularity, zoned.model);
        assert_eq!(size_of::<RequestHeader>(), size_of::<vb::virtio_blk_outhdr>());
        same_offsets!(RequestHeader, vb::virtio_blk_outhdr: kind => type_, sector);
        assert_eq!(
            size_of::<DiscardWriteZeroes>(),
            size_of::<vb::virtio_blk_discard_write_zeroes>()
        );
        same_offsets!(DiscardWriteZeroes, vb::virtio_blk_discard_write_zeroes: sector, num_sectors, flags);
        assert_eq!(size_of::<ZoneReport>(), size_of::<vb::virtio_blk_zone_report>());
        assert_eq!(
            size_of::<ZoneDescriptor>(),
            size_of::<vb::virtio_blk_zone_descriptor>()
        );
        same_offsets!(ZoneDescriptor, vb::virtio_blk_zone_descriptor: z_cap, z_start, z_wp, z_type, z_state);
    }

    #[test]
    fn numbers_are_those_of_the_kernel_header() {
        use request_type as t;
        let types = [
            (t::IN, vb::VIRTIO_BLK_T_IN),
            (t::OUT, vb::VIRTIO_BLK_T_OUT),
            (t::FLUSH, vb::VIRTIO_BLK_T_FLUSH),
            (t::GET_ID, vb::VIRTIO_BLK_T_GET_ID),
            (t::DISCARD, vb::VIRTIO_BLK_T_DISCARD),
            (t::WRITE_ZEROES, vb::VIRTIO_BLK_T_WRITE_ZEROES),
            (t::SECURE_ERASE, vb::VIRTIO_BLK_T_SECURE_ERASE),
            (t::ZONE_APPEND, vb::VIRTIO_BLK_T_ZONE_APPEND),
            (t::ZONE_REPORT, vb::VIRTIO_BLK_T_ZONE_REPORT),
            (t::ZONE_OPEN, vb::VIRTIO_BLK_T_ZONE_OPEN),
            (t::ZONE_CLOSE, vb::VIRTIO_BLK_T_ZONE_CLOSE),
            (t::ZONE_FINISH, vb::VIRTIO_BLK_T_ZONE_FINISH),
            (t::ZONE_RESET, vb::VIRTIO_BLK_T_ZONE_RESET),
            (t::ZONE_RESET_ALL, vb::VIRTIO_BLK_T_ZONE_RESET_ALL),
            (Status::Ok as u32, vb::VIRTIO_BLK_S_OK),
            (Status::IoErr as u32, vb::VIRTIO_BLK_S_IOERR),
            (Status::Unsupp as u32, vb::VIRTIO_BLK_S_UNSUPP),
            (Status::ZoneInvalidCmd as u32, vb::VIRTIO_BLK_S_ZONE_INVALID_CMD),
            (Status::ZoneUnalignedWp as u32, vb::VIRTIO_BLK_S_ZONE_UNALIGNED_WP),
            (
                Status::ZoneOpenResource as u32,
                vb::VIRTIO_BLK_S_ZONE_OPEN_RESOURCE,
            ),
            (
                Status::ZoneActiveResource as u32,
                vb::VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE,
            ),
            (ID_BYTES as u32, vb::VIRTIO_BLK_ID_BYTES),
            (
                DiscardWriteZeroes::FLAG_UNMAP,
                vb::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
            ),
        ];
        for (index, (ours, theirs)) in types.into_iter().enumerate() {
            assert_eq!(ours, theirs, "entry {index}");
        }
        let models = [
            (zone_model::NONE, vb::VIRTIO_BLK_Z_NONE),
            (zone_model::HOST_MANAGED, vb::VIRTIO_BLK_Z_HM),
            (zone_model::HOST_AWARE, vb::VIRTIO_BLK_Z_HA),
        ];
        assert!(models.iter().all(|&(ours, theirs)| u32::from(ours) == theirs));
        let features = [
            (feature::SIZE_MAX, vb::VIRTIO_BLK_F_SIZE_MAX),
            (feature::SEG_MAX, vb::VIRTIO_BLK_F_SEG_MAX),
            (feature::GEOMETRY, vb::VIRTIO_BLK_F_GEOMETRY),
            (feature::RO, vb::VIRTIO_BLK_F_RO),
            (feature::BLK_SIZE, vb::VIRTIO_BLK_F_BLK_SIZE),
            (feature::FLUSH, vb::VIRTIO_BLK_F_FLUSH),
            (feature::TOPOLOGY, vb::VIRTIO_BLK_F_TOPOLOGY),
            (feature::CONFIG_WCE, vb::VIRTIO_BLK_F_CONFIG_WCE),
            (feature::MQ, vb::VIRTIO_BLK_F_MQ),
            (feature::DISCARD, vb::VIRTIO_BLK_F_DISCARD),
            (feature::WRITE_ZEROES, vb::VIRTIO_BLK_F_WRITE_ZEROES),
            (feature::SECURE_ERASE, vb::VIRTIO_BLK_F_SECURE_ERASE),
            (feature::ZONED, vb::VIRTIO_BLK_F_ZONED),
            (
                feature::RING_INDIRECT_DESC,
                virtio_ring::VIRTIO_RING_F_INDIRECT_DESC,
            ),
            (feature::RING_EVENT_IDX, virtio_ring::VIRTIO_RING_F_EVENT_IDX),
            (feature::VERSION_1, virtio_config::VIRTIO_F_VERSION_1),
        ];
        for (ours, theirs) in features {
            assert_eq!(ours, theirs);
        }
        let bits = [
            (
                device_status::ACKNOWLEDGE,
                virtio_config::VIRTIO_CONFIG_S_ACKNOWLEDGE,
            ),
            (device_status::DRIVER, virtio_config::VIRTIO_CONFIG_S_DRIVER),
            (device_status::DRIVER_OK, virtio_config::VIRTIO_CONFIG_S_DRIVER_OK),
            (
                device_status::FEATURES_OK,
                virtio_config::VIRTIO_CONFIG_S_FEATURES_OK,
            ),
            (
                device_status::DEVICE_NEEDS_RESET,
                virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET,
            ),
            (device_status::FAILED, virtio_config::VIRTIO_CONFIG_S_FAILED),
        ];
        assert!(bits.iter().all(|&(ours, theirs)| u32::from(ours) == theirs));
    }

    #[test]
    fn a_request_header_is_these_sixteen_bytes() {
        let header = RequestHeader {
            kind: U32::new(request_type::ZONE_REPORT),
            reserved: U32::ZERO,
            sector: U64::new(0x0807_0605_0403_0201),
        };
        assert_eq!(
            header.as_bytes(),
            [16, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
        );
    }

    #[test]
    fn a_host_managed_drive_has_these_zoned_bytes() {
        let zoned = ZonedCharacteristics {
            zone_sectors: U32::new(0x20000),
            max_open_zones: U32::new(6),
            max_active_zones: U32::new(8),
            max_append_sectors: U32::new(0x7f0),
            write_granularity: U32::new(4096),
            model: zone_model::HOST_MANAGED,
            unused2: [0; 3],
        };
        let config = Config {
            zoned,
            ..Config::default()
        };
        let expected = [
            0, 0, 2, 0, 6, 0, 0, 0, 8, 0, 0, 0, 0xf0, 7, 0, 0, 0, 0x10, 0, 0, 1, 0, 0, 0,
        ];
        assert_eq!(config.as_bytes()[72..], expected);
        assert_eq!(Config::read_from_bytes(config.as_bytes()).unwrap(), config);
    }

    #[test]
    fn a_zone_descriptor_is_these_sixty_four_bytes() {
        let zone = ZoneDescriptor {
            z_cap: U64::new(0x10000),
            z_start: U64::new(0x20000),
            z_wp: U64::new(0x20008),
            z_type: 2,
            z_state: 14,
            reserved: [0; 38],
        };
        let mut expected = [0; 64];
        expected[2] = 1;
        expected[10] = 2;
        expected[16] = 8;
        expected[18] = 2;
        expected[24] = 2;
        expected[25] = 14;
        assert_eq!(zone.as_bytes(), expected);
    }
}
