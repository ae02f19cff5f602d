//! The NVM command set: opcodes, the dwords of reads and writes, Identify Namespace (NVM Command Set Specification 1.1).

use bitfield_struct::bitfield;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::base::IDENTIFY_BYTES;

open_enum! {
    /// Opcodes of I/O commands (3, figure 22). Bits 1:0 say which way data goes: 1 to the controller, 2 from it.
    pub struct Opcode(u8) {
        FLUSH = 0x00,
        WRITE = 0x01,
        READ = 0x02,
        WRITE_UNCORRECTABLE = 0x04,
        COMPARE = 0x05,
        WRITE_ZEROES = 0x08,
        DATASET_MANAGEMENT = 0x09,
        VERIFY = 0x0c,
        COPY = 0x19,
    }
}

/// Command dword 12 of Read, Write and Write Zeroes (3.2.4, 3.2.6, 3.2.8).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct RwCdw12 {
    /// Logical blocks, 0-based.
    pub nlb_z: u16,
    #[bits(9)]
    __: u16,
    /// Write Zeroes: the blocks may be deallocated.
    pub deac: bool,
    /// Protection information: action and checks.
    #[bits(4)]
    pub prinfo: u8,
    /// Force unit access.
    pub fua: bool,
    /// Limited retry.
    pub lr: bool,
}

/// Command dword 11 of Dataset Management (3.3.3).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct DsmCdw11 {
    /// The ranges are read as a unit.
    pub idr: bool,
    /// The ranges are written as a unit.
    pub idw: bool,
    /// Deallocate.
    pub ad: bool,
    #[bits(29)]
    __: u32,
}

/// A range of Dataset Management (3.3.3, figure 46).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DsmRange {
    /// Context attributes.
    pub cattr: U32,
    /// Logical blocks.
    pub length: U32,
    /// The first.
    pub slba: U64,
}

const _: () = assert!(size_of::<DsmRange>() == 16);

/// Command dword 12 of Copy (3.3.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CopyCdw12 {
    /// Source ranges, 0-based.
    pub nr_z: u8,
    /// Format of their descriptors.
    #[bits(4)]
    pub desfmt: u8,
    /// Protection information of reads.
    #[bits(4)]
    pub prinfor: u8,
    #[bits(10)]
    __: u16,
    /// Protection information of writes.
    #[bits(4)]
    pub prinfow: u8,
    /// Force unit access.
    pub fua: bool,
    /// Limited retry.
    pub lr: bool,
}

/// A source range of Copy in descriptor format 0 (3.3.2, figure 38).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CopyRange {
    /// Zero.
    pub rsvd0: [u8; 8],
    /// The first block.
    pub slba: U64,
    /// Blocks, 0-based.
    pub nlb_z: U16,
    /// Protection information, which is not used here.
    pub rsvd18: [u8; 14],
}

const _: () = assert!(size_of::<CopyRange>() == 32);

/// Identify Controller of the NVM command set (CNS 06h, CSI 00h; 4.1.5.4).
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyController {
    /// Limit of Verify: a power of two of CAP.MPSMIN pages; 0 without a limit.
    pub vsl: u8,
    /// Limit of Write Zeroes, likewise.
    pub wzsl: u8,
    /// Limit of Write Uncorrectable, likewise.
    pub wusl: u8,
    /// Most ranges of Dataset Management; 0 without a limit.
    pub dmrl: u8,
    /// Most blocks of such a range; 0 without a limit.
    pub dmrsl: U32,
    /// Most blocks of such a command; 0 without a limit.
    pub dmsl: U64,
    /// Bytes 16 to 4095.
    pub rsvd16: [u8; 4080],
}

const _: () = assert!(size_of::<IdentifyController>() == IDENTIFY_BYTES);

/// Most logical blocks that a command can name: [`RwCdw12::nlb_z`] has 16 bits.
pub const MAX_BLOCKS: u64 = 1 << 16;

/// A format of logical blocks (4.1.5.1, figure 116).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LbaFormat {
    /// Bytes of metadata a block.
    pub ms: U16,
    /// The block size in bytes, as a power of two; 9 at least, 0 where the format is not available.
    pub lbads: u8,
    /// Relative performance.
    pub rp: u8,
}

/// [`IdentifyNamespace::flbas`].
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct Flbas {
    /// Index of the format in use, bits 3:0.
    #[bits(4)]
    pub low: u8,
    /// Metadata is transferred at the end of each block.
    pub extended: bool,
    /// Index of the format in use, bits 5:4.
    #[bits(2)]
    pub high: u8,
    __: bool,
}

/// Identify Namespace of the NVM command set (CNS 00h), as far as it is used (4.1.5.1).
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// Size in logical blocks.
    pub nsze: U64,
    /// Capacity in logical blocks.
    pub ncap: U64,
    /// Utilisation in logical blocks.
    pub nuse: U64,
    /// Features.
    pub nsfeat: u8,
    /// Number of LBA formats, 0-based.
    pub nlbaf_z: u8,
    /// The format in use: a [`Flbas`].
    pub flbas: u8,
    /// Metadata capabilities.
    pub mc: u8,
    /// Protection capabilities.
    pub dpc: u8,
    /// Protection in use; 0 for none in bits 2:0.
    pub dps: u8,
    /// Multi-path I/O and sharing: bit 0, may be attached to several controllers.
    pub nmic: u8,
    /// Reservations.
    pub rescap: u8,
    /// Format progress: bit 7 supported, bits 6:0 per cent left.
    pub fpi: u8,
    /// Deallocated blocks: bits 2:0 how they read (1: as zeros), bit 3 Write Zeroes can deallocate.
    pub dlfeat: u8,
    /// Bytes 34 to 73.
    pub rsvd34: [u8; 40],
    /// Most blocks of a source range of Copy.
    pub mssrl: U16,
    /// Most blocks of a Copy.
    pub mcl: U32,
    /// Most source ranges of a Copy, 0-based.
    pub msrc_z: u8,
    /// Bytes 81 to 98.
    pub rsvd81: [u8; 18],
    /// Attributes: bit 0, write protected.
    pub nsattr: u8,
    /// NVM set.
    pub nvmsetid: U16,
    /// Endurance group.
    pub endgid: U16,
    /// Globally unique identifier.
    pub nguid: [u8; 16],
    /// IEEE extended unique identifier.
    pub eui64: [u8; 8],
    /// The formats that there are, as many as `nlbaf_z` says.
    pub lbaf: [LbaFormat; 64],
    /// Bytes 384 to 4095.
    pub rsvd384: [u8; 3712],
}

const _: () = assert!(size_of::<IdentifyNamespace>() == IDENTIFY_BYTES);

impl IdentifyNamespace {
    /// Index of the LBA format in use, below 64.
    pub fn format_index(&self) -> usize {
        let flbas = Flbas::from_bits(self.flbas);
        usize::from(flbas.low()) | usize::from(flbas.high()) << 4
    }

    /// The LBA format in use.
    pub fn format(&self) -> LbaFormat {
        self.lbaf[self.format_index()]
    }
}

/// First and second dword of a starting LBA, command dwords 10 and 11.
pub fn slba(lba: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = lba.to_le_bytes();
    [
        U32::from_bytes([a, b, c, d]).get(),
        U32::from_bytes([e, f, g, h]).get(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::offset_of;

    #[test]
    fn identify_namespace_has_its_fields_where_the_specification_has_them() {
        assert_eq!(offset_of!(IdentifyNamespace, flbas), 26);
        assert_eq!(offset_of!(IdentifyNamespace, dps), 29);
        assert_eq!(offset_of!(IdentifyNamespace, nmic), 30);
        assert_eq!(offset_of!(IdentifyNamespace, dlfeat), 33);
        assert_eq!(offset_of!(IdentifyNamespace, mssrl), 74);
        assert_eq!(offset_of!(IdentifyNamespace, msrc_z), 80);
        assert_eq!(offset_of!(IdentifyNamespace, nsattr), 99);
        assert_eq!(offset_of!(IdentifyNamespace, nguid), 104);
        assert_eq!(offset_of!(IdentifyNamespace, eui64), 120);
        assert_eq!(offset_of!(IdentifyNamespace, lbaf), 128);
    }

    #[test]
    fn the_format_in_use_is_found_by_both_parts_of_its_index() {
        let mut bytes = [0; IDENTIFY_BYTES];
        bytes[26] = 0b0100_0011;
        bytes[128 + 4 * 35..][..4].copy_from_slice(&[8, 0, 12, 0]);
        let namespace = IdentifyNamespace::read_from_bytes(&bytes).expect("the size is right");
        assert_eq!(namespace.format_index(), 35);
        let format = namespace.format();
        assert_eq!((format.ms.get(), format.lbads), (8, 12));
    }

    #[test]
    fn dword_12_of_a_write_has_its_bits_where_the_specification_has_them() {
        let cdw12 = RwCdw12::new().with_nlb_z(7).with_fua(true).with_deac(true);
        assert_eq!(cdw12.into_bits(), 0x4200_0007);
        assert_eq!(
            RwCdw12::new().with_lr(true).with_prinfo(0xf).into_bits(),
            0xbc00_0000
        );
    }

    #[test]
    fn a_starting_lba_takes_two_dwords_low_first() {
        assert_eq!(slba(0x1122_3344_5566_7788), [0x5566_7788, 0x1122_3344]);
    }
}
