//! Zoned namespaces: opcodes, management dwords, Identify structures, reports (Zoned Namespace Command Set
//! Specification 1.2).

use bitfield_struct::bitfield;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::base::IDENTIFY_BYTES;

open_enum! {
    /// Opcodes that zoned namespaces have besides those of [`super::nvm::Opcode`] (3, figure 19).
    pub struct Opcode(u8) {
        ZONE_MANAGEMENT_SEND = 0x79,
        ZONE_MANAGEMENT_RECEIVE = 0x7a,
        ZONE_APPEND = 0x7d,
    }
}

open_enum! {
    /// Zone Send Action (3.4.3, figure 34).
    pub struct SendAction(u8) {
        CLOSE = 0x01,
        FINISH = 0x02,
        OPEN = 0x03,
        RESET = 0x04,
        OFFLINE = 0x05,
        SET_DESCRIPTOR_EXTENSION = 0x10,
        FLUSH_EXPLICIT_ZRWA_RANGE = 0x11,
    }
}

/// Command dword 13 of Zone Management Send (3.4.3).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct SendCdw13 {
    /// A [`SendAction`].
    pub zsa: u8,
    /// The action is for all zones that it can be done to; the starting LBA is ignored.
    pub select_all: bool,
    /// Zone send action specific option; with Open Zone: allocate a zone random write area (ZRWAA).
    pub zsaso: bool,
    #[bits(22)]
    __: u32,
}

open_enum! {
    /// Zone Receive Action (3.4.2, figure 29).
    pub struct ReceiveAction(u8) {
        /// [`ReportHeader`] and [`ZoneDescriptor`]s.
        REPORT = 0x00,
        /// Each descriptor is followed by the zone's descriptor extension.
        EXTENDED_REPORT = 0x01,
    }
}

open_enum! {
    /// Zone Receive Action Specific Field of a report: which zones it has (3.4.2, figure 31).
    pub struct ReportFilter(u8) {
        ALL = 0,
        EMPTY = 1,
        IMPLICITLY_OPENED = 2,
        EXPLICITLY_OPENED = 3,
        CLOSED = 4,
        FULL = 5,
        READ_ONLY = 6,
        OFFLINE = 7,
    }
}

/// Command dword 13 of Zone Management Receive (3.4.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct ReceiveCdw13 {
    /// A [`ReceiveAction`].
    pub zra: u8,
    /// A [`ReportFilter`].
    pub zrasf: u8,
    /// The number of zones says how many descriptors were transferred, not how many match.
    pub partial: bool,
    #[bits(15)]
    __: u16,
}

/// Command dword 12 of Zone Append (3.4.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct AppendCdw12 {
    /// Logical blocks, 0-based.
    pub nlb_z: u16,
    #[bits(9)]
    __: u16,
    /// The controller makes the reference tags fit the address that it gives.
    pub piremap: bool,
    /// Protection information: action and checks.
    #[bits(4)]
    pub prinfo: u8,
    /// Force unit access.
    pub fua: bool,
    /// Limited retry.
    pub lr: bool,
}

open_enum! {
    /// Zone type (figure 37).
    pub struct ZoneType(u8) {
        /// Written at the write pointer only, the only type that there is.
        SEQUENTIAL_WRITE_REQUIRED = 0x02,
    }
}

open_enum! {
    /// Zone state (figure 37), numbered as in ZBC.
    pub struct ZoneState(u8) {
        EMPTY = 0x1,
        IMPLICITLY_OPENED = 0x2,
        EXPLICITLY_OPENED = 0x3,
        CLOSED = 0x4,
        READ_ONLY = 0xd,
        FULL = 0xe,
        OFFLINE = 0xf,
    }
}

/// First byte of a [`ZoneDescriptor`].
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct TypeByte {
    /// A [`ZoneType`].
    #[bits(4)]
    pub zt: u8,
    #[bits(4)]
    __: u8,
}

/// Second byte of a [`ZoneDescriptor`].
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct StateByte {
    #[bits(4)]
    __: u8,
    /// A [`ZoneState`].
    #[bits(4)]
    pub zs: u8,
}

/// Zone attributes, third byte of a [`ZoneDescriptor`].
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct Attributes {
    /// Zone finished by controller.
    pub zfc: bool,
    /// Finish zone recommended.
    pub fzr: bool,
    /// Reset zone recommended.
    pub rzr: bool,
    /// The zone has a zone random write area.
    pub zrwav: bool,
    #[bits(3)]
    __: u8,
    /// The descriptor extension is valid.
    pub zdev: bool,
}

/// Zone descriptor (3.4.2.2.3). Positions and lengths in logical blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ZoneDescriptor {
    /// A [`TypeByte`].
    pub zt: u8,
    /// A [`StateByte`].
    pub zs: u8,
    /// [`Attributes`].
    pub za: u8,
    /// Zone attributes information.
    pub zai: u8,
    /// Zero.
    pub rsvd4: [u8; 4],
    /// Capacity.
    pub zcap: U64,
    /// First block.
    pub zslba: U64,
    /// Write pointer, absolute; all ones where there is none: full, read-only and offline zones.
    pub wp: U64,
    /// Zero.
    pub rsvd32: [u8; 32],
}

const _: () = assert!(size_of::<ZoneDescriptor>() == 64);

impl ZoneDescriptor {
    /// The zone's type.
    pub const fn zone_type(&self) -> ZoneType {
        ZoneType(TypeByte::from_bits(self.zt).zt())
    }

    /// The zone's state.
    pub const fn state(&self) -> ZoneState {
        ZoneState(StateByte::from_bits(self.zs).zs())
    }

    /// The zone's attributes.
    pub const fn attributes(&self) -> Attributes {
        Attributes::from_bits(self.za)
    }
}

/// What a report begins with (3.4.2.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReportHeader {
    /// Zones that match, or (partial report) whose descriptors were transferred.
    pub nr_zones: U64,
    /// Zero.
    pub rsvd8: [u8; 56],
}

const _: () = assert!(size_of::<ReportHeader>() == 64);

/// Zone Operation Characteristics.
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct Zoc {
    /// Zone capacities may change at a format.
    pub variable_zone_capacity: bool,
    /// The controller may change zone states by itself.
    pub zone_active_excursions: bool,
    #[bits(14)]
    __: u16,
}

/// Optional Zoned Command Support.
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct Ozcs {
    /// Read across zone boundaries.
    pub razb: bool,
    /// There are zone random write areas.
    pub zrwasup: bool,
    #[bits(14)]
    __: u16,
}

/// ZRWA Capability.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct ZrwaCap {
    /// Zone random write areas can be flushed by command.
    pub expflushsup: bool,
    #[bits(7)]
    __: u8,
}

/// What a zoned namespace adds to an LBA format (4.1.5.1, figure 49).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LbaFormatExtension {
    /// Zone size in logical blocks; 0 where the format is not for zones.
    pub zsze: U64,
    /// Zone descriptor extension size in units of 64 bytes.
    pub zdes: u8,
    /// Zero.
    pub rsvd9: [u8; 7],
}

/// A limit of [`IdentifyNamespace::mar`] or `mor` that is none.
pub const NO_LIMIT: u32 = u32::MAX;

/// Bytes of a unit of [`LbaFormatExtension::zdes`].
pub const ZDES_UNIT: usize = 64;

/// Identify Namespace of zoned namespaces (CNS 05h, CSI 02h; 4.1.5.1).
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// [`Zoc`].
    pub zoc: U16,
    /// [`Ozcs`].
    pub ozcs: U16,
    /// Maximum active resources, 0-based; [`NO_LIMIT`].
    pub mar_z: U32,
    /// Maximum open resources, 0-based; [`NO_LIMIT`].
    pub mor_z: U32,
    /// Reset recommended limit, seconds.
    pub rrl: U32,
    /// Finish recommended limit, seconds.
    pub frl: U32,
    /// Bytes 20 to 43: further limits of that kind.
    pub rsvd20: [u8; 24],
    /// Zone random write areas that there can be at once.
    pub numzrwa: U32,
    /// Granularity of flushing a zone random write area, logical blocks.
    pub zrwafg: U16,
    /// Size of a zone random write area, logical blocks.
    pub zrwasz: U16,
    /// [`ZrwaCap`].
    pub zrwacap: u8,
    /// Bytes 53 to 2815.
    pub rsvd53: [u8; 2763],
    /// One for each LBA format of the namespace.
    pub lbafe: [LbaFormatExtension; 64],
    /// Vendor specific.
    pub vs: [u8; 256],
}

const _: () = assert!(size_of::<IdentifyNamespace>() == IDENTIFY_BYTES);

/// Identify Controller of zoned namespaces (CNS 06h, CSI 02h; 4.1.5.2).
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyController {
    /// Zone append size limit: a power of two of CAP.MPSMIN pages; 0 means that MDTS limits appends.
    pub zasl: u8,
    /// Zero.
    pub rsvd1: [u8; 4095],
}

const _: () = assert!(size_of::<IdentifyController>() == IDENTIFY_BYTES);

/// Most zones of a [`ChangedZoneList`].
pub const MAX_CHANGED_ZONES: usize = 511;

/// Changed Zone List (log page BFh, 4.1.4.1).
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChangedZoneList {
    /// How many zones follow; all ones where there are more than [`MAX_CHANGED_ZONES`], and none follows.
    pub nrzid: U16,
    /// Zero.
    pub rsvd2: [u8; 6],
    /// First blocks of the zones.
    pub zid: [U64; MAX_CHANGED_ZONES],
}

const _: () = assert!(size_of::<ChangedZoneList>() == 4096);

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::offset_of;

    #[test]
    fn identify_namespace_has_its_fields_where_the_specification_has_them() {
        assert_eq!(offset_of!(IdentifyNamespace, ozcs), 2);
        assert_eq!(offset_of!(IdentifyNamespace, mar_z), 4);
        assert_eq!(offset_of!(IdentifyNamespace, mor_z), 8);
        assert_eq!(offset_of!(IdentifyNamespace, numzrwa), 44);
        assert_eq!(offset_of!(IdentifyNamespace, zrwafg), 48);
        assert_eq!(offset_of!(IdentifyNamespace, zrwasz), 50);
        assert_eq!(offset_of!(IdentifyNamespace, zrwacap), 52);
        assert_eq!(offset_of!(IdentifyNamespace, lbafe), 2816);
        assert_eq!(offset_of!(IdentifyNamespace, vs), 3840);
        assert_eq!(size_of::<LbaFormatExtension>(), 16);
    }

    #[test]
    fn a_zone_descriptor_is_read_as_the_specification_lays_it_out() {
        let mut bytes = [0; 64];
        bytes[..4].copy_from_slice(&[0x02, 0xe0, 0x81, 0]);
        bytes[8..16].copy_from_slice(&0x3000_u64.to_le_bytes());
        bytes[16..24].copy_from_slice(&0x4000_u64.to_le_bytes());
        bytes[24..32].copy_from_slice(&[0xff; 8]);
        let zone = ZoneDescriptor::read_from_bytes(&bytes).expect("the size is right");
        assert_eq!(zone.zone_type(), ZoneType::SEQUENTIAL_WRITE_REQUIRED);
        assert_eq!(zone.state(), ZoneState::FULL);
        assert!(zone.attributes().zdev() && zone.attributes().zfc() && !zone.attributes().zrwav());
        assert_eq!(
            (zone.zcap.get(), zone.zslba.get(), zone.wp.get()),
            (0x3000, 0x4000, u64::MAX)
        );
    }

    #[test]
    fn management_dwords_have_their_bits_where_the_specification_has_them() {
        let reset_all = SendCdw13::new()
            .with_zsa(SendAction::RESET.0)
            .with_select_all(true);
        assert_eq!(reset_all.into_bits(), 0x104);
        let open_zrwa = SendCdw13::new().with_zsa(SendAction::OPEN.0).with_zsaso(true);
        assert_eq!(open_zrwa.into_bits(), 0x203);
        let report = ReceiveCdw13::new()
            .with_zra(ReceiveAction::EXTENDED_REPORT.0)
            .with_zrasf(5)
            .with_partial(true);
        assert_eq!(report.into_bits(), 0x0001_0501);
        let append = AppendCdw12::new()
            .with_nlb_z(0xffff)
            .with_piremap(true)
            .with_fua(true);
        assert_eq!(append.into_bits(), 0x4200_ffff);
    }
}
