//! SCSI, as far as zoned disks need it: INQUIRY pages, REPORT ZONES and the zone commands, sense data (SPC-6, SBC-4,
//! ZBC-2). All integers are big-endian.

use bitfield_struct::bitfield;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

open_enum! {
    /// Operation codes.
    pub struct Opcode(u8) {
        INQUIRY = 0x12,
        /// Service actions are [`ZoneOut`].
        ZBC_OUT = 0x94,
        /// Service action 0: REPORT ZONES.
        ZBC_IN = 0x95,
    }
}

open_enum! {
    /// Service actions of [`Opcode::ZBC_OUT`] (ZBC-2, 5).
    pub struct ZoneOut(u8) {
        CLOSE_ZONE = 0x01,
        FINISH_ZONE = 0x02,
        OPEN_ZONE = 0x03,
        RESET_WRITE_POINTER = 0x04,
    }
}

open_enum! {
    /// Vital product data pages (SPC-6, 7.7).
    pub struct VpdPage(u8) {
        SUPPORTED_PAGES = 0x00,
        BLOCK_DEVICE_CHARACTERISTICS = 0xb1,
        ZONED_BLOCK_DEVICE_CHARACTERISTICS = 0xb6,
    }
}

/// INQUIRY for a vital product data page (SPC-6, 6.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InquiryCdb {
    /// [`Opcode::INQUIRY`].
    pub opcode: u8,
    /// Bit 0: EVPD, the answer is the page.
    pub evpd: u8,
    /// A [`VpdPage`].
    pub page: u8,
    /// Bytes that the host takes.
    pub allocation_length: U16,
    /// Zero.
    pub control: u8,
}

impl InquiryCdb {
    /// Asks for `page`.
    pub fn vpd(page: VpdPage, allocation_length: u16) -> InquiryCdb {
        InquiryCdb {
            opcode: Opcode::INQUIRY.0,
            evpd: 1,
            page: page.0,
            allocation_length: U16::new(allocation_length),
            control: 0,
        }
    }
}

/// Service action byte, second byte of [`ReportZonesCdb`] and [`ZoneOutCdb`].
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct ServiceAction {
    /// The service action.
    #[bits(5)]
    pub action: u8,
    #[bits(3)]
    __: u8,
}

/// Reporting options of [`ReportZonesCdb`].
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct ReportingOptions {
    /// Which zones: 0 for all.
    #[bits(6)]
    pub options: u8,
    __: bool,
    /// The zone list length tells of what was transferred, not of all that match.
    pub partial: bool,
}

/// REPORT ZONES (ZBC-2, 5.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReportZonesCdb {
    /// [`Opcode::ZBC_IN`].
    pub opcode: u8,
    /// [`ServiceAction`] 0.
    pub service_action: u8,
    /// Logical block in the first zone to report.
    pub zone_start_lba: U64,
    /// Bytes that the host takes.
    pub allocation_length: U32,
    /// [`ReportingOptions`].
    pub options: u8,
    /// Zero.
    pub control: u8,
}

impl ReportZonesCdb {
    /// A partial report of all kinds of zones.
    pub fn partial(zone_start_lba: u64, allocation_length: u32) -> ReportZonesCdb {
        ReportZonesCdb {
            opcode: Opcode::ZBC_IN.0,
            service_action: ServiceAction::new().into_bits(),
            zone_start_lba: U64::new(zone_start_lba),
            allocation_length: U32::new(allocation_length),
            options: ReportingOptions::new().with_partial(true).into_bits(),
            control: 0,
        }
    }
}

/// CLOSE, FINISH, OPEN ZONE and RESET WRITE POINTER (ZBC-2, 5.2 to 5.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ZoneOutCdb {
    /// [`Opcode::ZBC_OUT`].
    pub opcode: u8,
    /// [`ServiceAction`]: a [`ZoneOut`].
    pub service_action: u8,
    /// First logical block of the zone.
    pub zone_id: U64,
    /// Zero.
    pub reserved: [u8; 2],
    /// Zones; 0 and 1 both mean one.
    pub zone_count: U16,
    /// Bit 0: ALL, every zone that the action can be done to; the zone is ignored.
    pub all: u8,
    /// Zero.
    pub control: u8,
}

impl ZoneOutCdb {
    /// `action` on the zone that starts at `zone_id`, or on all zones.
    pub fn new(action: ZoneOut, zone_id: Option<u64>) -> ZoneOutCdb {
        ZoneOutCdb {
            opcode: Opcode::ZBC_OUT.0,
            service_action: ServiceAction::new().with_action(action.0).into_bits(),
            zone_id: U64::new(zone_id.unwrap_or(0)),
            reserved: [0; 2],
            zone_count: U16::ZERO,
            all: zone_id.is_none().into(),
            control: 0,
        }
    }
}

/// Header of a vital product data page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct VpdHeader {
    /// Peripheral qualifier and device type.
    pub peripheral: u8,
    /// A [`VpdPage`].
    pub page: u8,
    /// Bytes that follow.
    pub page_length: U16,
}

open_enum! {
    /// What [`BlockDeviceCharacteristics`] says of zones.
    pub struct Zoned(u8) {
        /// Nothing.
        NOT_REPORTED = 0b00,
        /// Sequential write preferred zones.
        HOST_AWARE = 0b01,
        /// The device hides its zones.
        DEVICE_MANAGED = 0b10,
    }
}

/// A byte of [`BlockDeviceCharacteristics`].
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct ZonedByte {
    #[bits(4)]
    __: u8,
    /// A [`Zoned`].
    #[bits(2)]
    pub zoned: u8,
    #[bits(2)]
    __: u8,
}

/// Block Device Characteristics (page B1h; SBC-4, 6.6.2), its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BlockDeviceCharacteristics {
    /// Header.
    pub header: VpdHeader,
    /// Medium rotation rate.
    pub rotation_rate: U16,
    /// Product type.
    pub product_type: u8,
    /// Form factor and others.
    pub form_factor: u8,
    /// [`ZonedByte`].
    pub zoned: u8,
}

impl BlockDeviceCharacteristics {
    /// What is said of zones.
    pub const fn zoned(&self) -> Zoned {
        Zoned(ZonedByte::from_bits(self.zoned).zoned())
    }
}

/// A byte of [`ZonedCharacteristics`].
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct ZonedFlags {
    /// Sequential write required zones can be read above their write pointer.
    pub urswrz: bool,
    /// An activated or reported zone may be outside its domain (AAORB).
    pub aaorb: bool,
    #[bits(6)]
    __: u8,
}

/// A count of [`ZonedCharacteristics`] that is not reported.
pub const NOT_REPORTED: u32 = u32::MAX;

/// Zoned Block Device Characteristics (page B6h; ZBC-2, 6.5.2), its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ZonedCharacteristics {
    /// Header.
    pub header: VpdHeader,
    /// [`ZonedFlags`].
    pub flags: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// Best number of open sequential write preferred zones; [`NOT_REPORTED`].
    pub optimal_open_preferred: U32,
    /// Best number of such zones that are written otherwise than in sequence; [`NOT_REPORTED`].
    pub optimal_non_sequential_preferred: U32,
    /// Most open sequential write required zones; [`NOT_REPORTED`], 0 where there are none.
    pub max_open_required: U32,
}

/// What the parameter data of REPORT ZONES begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReportHeader {
    /// Bytes of the descriptors.
    pub zone_list_length: U32,
    /// Which zones are alike.
    pub same: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// The device's last logical block.
    pub maximum_lba: U64,
    /// Zero.
    pub reserved16: [u8; 48],
}

const _: () = assert!(size_of::<ReportHeader>() == 64);

open_enum! {
    /// Zone type.
    pub struct ZoneType(u8) {
        CONVENTIONAL = 0x1,
        SEQUENTIAL_WRITE_REQUIRED = 0x2,
        SEQUENTIAL_WRITE_PREFERRED = 0x3,
    }
}

open_enum! {
    /// Zone condition.
    pub struct ZoneCondition(u8) {
        NOT_WRITE_POINTER = 0x0,
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
    pub zone_type: u8,
    #[bits(4)]
    __: u8,
}

/// Second byte of a [`ZoneDescriptor`].
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct ConditionByte {
    /// The device recommends a reset.
    pub reset: bool,
    /// The zone was written otherwise than in sequence.
    pub non_seq: bool,
    #[bits(2)]
    __: u8,
    /// A [`ZoneCondition`].
    #[bits(4)]
    pub condition: u8,
}

/// Zone descriptor. Positions and lengths in logical blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ZoneDescriptor {
    /// [`TypeByte`].
    pub zone_type: u8,
    /// [`ConditionByte`].
    pub condition: u8,
    /// Zero.
    pub reserved: [u8; 6],
    /// Length.
    pub zone_length: U64,
    /// First block.
    pub zone_start_lba: U64,
    /// Write pointer, absolute; invalid for conventional, full, read-only and offline zones.
    pub write_pointer_lba: U64,
    /// Zero.
    pub reserved32: [u8; 32],
}

const _: () = assert!(size_of::<ZoneDescriptor>() == 64);

impl ZoneDescriptor {
    /// The zone's type.
    pub const fn zone_type(&self) -> ZoneType {
        ZoneType(TypeByte::from_bits(self.zone_type).zone_type())
    }

    /// The zone's condition.
    pub const fn condition(&self) -> ZoneCondition {
        ZoneCondition(ConditionByte::from_bits(self.condition).condition())
    }
}

open_enum! {
    /// Status of a command (SAM-6, 5.3).
    pub struct Status(u8) {
        GOOD = 0x00,
        CHECK_CONDITION = 0x02,
        BUSY = 0x08,
        RESERVATION_CONFLICT = 0x18,
        TASK_SET_FULL = 0x28,
        TASK_ABORTED = 0x40,
    }
}

open_enum! {
    /// Sense key (SPC-6, 4.4.7).
    pub struct SenseKey(u8) {
        NO_SENSE = 0x0,
        RECOVERED_ERROR = 0x1,
        NOT_READY = 0x2,
        MEDIUM_ERROR = 0x3,
        HARDWARE_ERROR = 0x4,
        ILLEGAL_REQUEST = 0x5,
        UNIT_ATTENTION = 0x6,
        DATA_PROTECT = 0x7,
        ABORTED_COMMAND = 0xb,
    }
}

open_enum! {
    /// Additional sense code in the upper byte, its qualifier in the lower one (SPC-6, annex F).
    pub struct AdditionalSense(u16) {
        INVALID_COMMAND_OPERATION_CODE = 0x2000,
        LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE = 0x2100,
        UNALIGNED_WRITE_COMMAND = 0x2104,
        WRITE_BOUNDARY_VIOLATION = 0x2105,
        ATTEMPT_TO_READ_INVALID_DATA = 0x2106,
        READ_BOUNDARY_VIOLATION = 0x2107,
        INVALID_FIELD_IN_CDB = 0x2400,
        WRITE_PROTECTED = 0x2700,
        ZONE_IS_READ_ONLY = 0x2708,
        ZONE_IS_OFFLINE = 0x2c0e,
        INSUFFICIENT_ZONE_RESOURCES = 0x550e,
    }
}

/// Sense data as far as it is understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense {
    /// What kind of trouble.
    pub key: SenseKey,
    /// Which.
    pub additional: AdditionalSense,
}

/// A byte of sense data that has the key in its lower half.
#[bitfield(u8)]
struct KeyByte {
    #[bits(4)]
    key: u8,
    #[bits(4)]
    __: u8,
}

/// First byte of sense data.
#[bitfield(u8)]
struct ResponseByte {
    #[bits(7)]
    code: u8,
    valid: bool,
}

impl Sense {
    /// Reads fixed or descriptor format (SPC-6, 4.4); `None` for any other, and where bytes are missing.
    pub fn parse(bytes: &[u8]) -> Option<Sense> {
        let (key, asc, ascq) = match ResponseByte::from_bits(*bytes.first()?).code() {
            0x70 | 0x71 => (*bytes.get(2)?, *bytes.get(12)?, *bytes.get(13)?),
            0x72 | 0x73 => (*bytes.get(1)?, *bytes.get(2)?, *bytes.get(3)?),
            _ => return None,
        };
        Some(Sense {
            key: SenseKey(KeyByte::from_bits(key).key()),
            additional: AdditionalSense(u16::from_be_bytes([asc, ascq])),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_blocks_are_laid_out_as_the_standards_have_them() {
        let inquiry = InquiryCdb::vpd(VpdPage::ZONED_BLOCK_DEVICE_CHARACTERISTICS, 0x140);
        assert_eq!(inquiry.as_bytes(), [0x12, 1, 0xb6, 0x01, 0x40, 0]);
        let report = ReportZonesCdb::partial(0x0102_0304_0506_0708, 0x0a0b_0c0d);
        let expected = [0x95, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0xa, 0xb, 0xc, 0xd, 0x80, 0];
        assert_eq!(report.as_bytes(), expected);
        let finish = ZoneOutCdb::new(ZoneOut::FINISH_ZONE, Some(0x1_0000));
        assert_eq!(
            finish.as_bytes(),
            [0x94, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
        );
        let reset_all = ZoneOutCdb::new(ZoneOut::RESET_WRITE_POINTER, None);
        assert_eq!(
            reset_all.as_bytes(),
            [0x94, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
        );
    }

    #[test]
    fn pages_are_read_as_the_standards_lay_them_out() {
        let page = BlockDeviceCharacteristics::read_from_bytes(&[0, 0xb1, 0, 0x3c, 0x1c, 0x20, 0, 3, 0x10]);
        let page = page.expect("the size is right");
        assert_eq!(
            (page.rotation_rate.get(), page.zoned()),
            (7200, Zoned::HOST_AWARE)
        );
        let mut bytes = [0; 20];
        bytes[..5].copy_from_slice(&[0x14, 0xb6, 0, 0x3c, 1]);
        bytes[8..].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 0, 0, 1, 0]);
        let page = ZonedCharacteristics::read_from_bytes(&bytes).expect("the size is right");
        assert!(ZonedFlags::from_bits(page.flags).urswrz());
        assert_eq!(page.optimal_open_preferred.get(), NOT_REPORTED);
        assert_eq!(page.optimal_non_sequential_preferred.get(), 1);
        assert_eq!(page.max_open_required.get(), 256);
    }

    #[test]
    fn a_zone_descriptor_is_read_as_the_standard_lays_it_out() {
        let mut bytes = [0; 64];
        bytes[..2].copy_from_slice(&[0x03, 0x23]);
        bytes[8..16].copy_from_slice(&0x8_0000_u64.to_be_bytes());
        bytes[16..24].copy_from_slice(&0x10_0000_u64.to_be_bytes());
        bytes[24..32].copy_from_slice(&0x10_0018_u64.to_be_bytes());
        let zone = ZoneDescriptor::read_from_bytes(&bytes).expect("the size is right");
        assert_eq!(zone.zone_type(), ZoneType::SEQUENTIAL_WRITE_PREFERRED);
        assert_eq!(zone.condition(), ZoneCondition::IMPLICITLY_OPENED);
        let flags = ConditionByte::from_bits(zone.condition);
        assert!(flags.reset() && flags.non_seq());
        let positions = (
            zone.zone_length.get(),
            zone.zone_start_lba.get(),
            zone.write_pointer_lba.get(),
        );
        assert_eq!(positions, (0x8_0000, 0x10_0000, 0x10_0018));
    }

    #[test]
    fn sense_is_read_in_both_formats() {
        let wanted = Some(Sense {
            key: SenseKey::DATA_PROTECT,
            additional: AdditionalSense::INSUFFICIENT_ZONE_RESOURCES,
        });
        let fixed = [0xf0, 0, 0x07, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x55, 0x0e, 0, 0, 0, 0];
        assert_eq!(Sense::parse(&fixed), wanted);
        assert_eq!(Sense::parse(&[0x72, 0x07, 0x55, 0x0e, 0, 0, 0, 0]), wanted);
    }

    #[test]
    fn sense_that_is_short_or_of_another_format_is_none() {
        assert_eq!(Sense::parse(&[]), None);
        assert_eq!(
            Sense::parse(&[0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x21]),
            None
        );
        assert_eq!(Sense::parse(&[0x7f, 0, 5, 0x21, 0]), None);
    }
}
