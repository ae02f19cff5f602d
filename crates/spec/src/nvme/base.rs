//! The base specification: opcodes, status values, Identify Controller (NVM Express Base Specification 2.1).

use bitfield_struct::bitfield;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of every Identify data structure (5.1.13).
pub const IDENTIFY_BYTES: usize = 4096;

/// The smallest memory page that a controller can have, bytes (3.1.4.1, CAP.MPSMIN of 0). Sizes that are given in
/// units of CAP.MPSMIN are at least so large for a host that cannot read that register.
pub const MIN_PAGE_BYTES: u64 = 4096;

open_enum! {
    /// Opcodes of the admin command set (5, figure 142).
    pub struct AdminOpcode(u8) {
        GET_LOG_PAGE = 0x02,
        IDENTIFY = 0x06,
        SET_FEATURES = 0x09,
        GET_FEATURES = 0x0a,
    }
}

open_enum! {
    /// Controller or Namespace Structure: which data Identify returns (5.1.13, figure 310).
    pub struct Cns(u8) {
        /// Identify Namespace of the NVM command set.
        NAMESPACE = 0x00,
        /// Identify Controller.
        CONTROLLER = 0x01,
        /// Identification descriptors of a namespace.
        NAMESPACE_DESCRIPTORS = 0x03,
        /// Identify Namespace of the command set named by CSI.
        NAMESPACE_OF_CSI = 0x05,
        /// Identify Controller of the command set named by CSI.
        CONTROLLER_OF_CSI = 0x06,
    }
}

open_enum! {
    /// Command Set Identifier (NVM Express Base Specification 2.1, figure 311).
    pub struct Csi(u8) {
        /// NVM command set.
        NVM = 0,
        /// Key value command set.
        KEY_VALUE = 1,
        /// Zoned namespace command set.
        ZONED = 2,
    }
}

/// Command dword 10 of Identify.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct IdentifyCdw10 {
    /// A [`Cns`].
    pub cns: u8,
    __: u8,
    /// Controller, where the structure is of one.
    pub cntid: u16,
}

/// Command dword 11 of Identify.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct IdentifyCdw11 {
    /// Command set specific identifier.
    pub cnssid: u16,
    __: u8,
    /// A [`Csi`].
    pub csi: u8,
}

/// The status field of a completion (4.2.3): dword 3, bits 31:17.
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct StatusField {
    /// Status code.
    pub sc: u8,
    /// Status code type.
    #[bits(3)]
    pub sct: u8,
    /// Command retry delay.
    #[bits(2)]
    pub crd: u8,
    /// More: the error information log has more.
    pub more: bool,
    /// Do not retry.
    pub dnr: bool,
    __: bool,
}

impl StatusField {
    /// Status code type and status code, without what is said about retries.
    pub const fn status(self) -> Status {
        Status(u16::from_le_bytes([self.sc(), self.sct()]))
    }
}

open_enum! {
    /// What became of a command: status code type in bits 10:8, status code in bits 7:0 (4.2.3; NVM command set 3.1.2;
    /// ZNS command set 4.1).
    pub struct Status(u16) {
        // Generic command status.
        SUCCESS = 0x000,
        INVALID_OPCODE = 0x001,
        INVALID_FIELD = 0x002,
        COMMAND_ID_CONFLICT = 0x003,
        DATA_TRANSFER_ERROR = 0x004,
        ABORTED_POWER_LOSS = 0x005,
        INTERNAL_ERROR = 0x006,
        ABORT_REQUESTED = 0x007,
        ABORTED_SQ_DELETION = 0x008,
        INVALID_NAMESPACE_OR_FORMAT = 0x00b,
        COMMAND_SEQUENCE_ERROR = 0x00c,
        SANITIZE_FAILED = 0x01c,
        SANITIZE_IN_PROGRESS = 0x01d,
        NAMESPACE_WRITE_PROTECTED = 0x020,
        COMMAND_INTERRUPTED = 0x021,
        TRANSIENT_TRANSPORT_ERROR = 0x022,
        LBA_OUT_OF_RANGE = 0x080,
        CAPACITY_EXCEEDED = 0x081,
        NAMESPACE_NOT_READY = 0x082,
        RESERVATION_CONFLICT = 0x083,
        FORMAT_IN_PROGRESS = 0x084,
        // Command specific status, NVM command set.
        CONFLICTING_ATTRIBUTES = 0x180,
        INVALID_PROTECTION_INFORMATION = 0x181,
        ATTEMPTED_WRITE_TO_READ_ONLY_RANGE = 0x182,
        // Command specific status, ZNS command set.
        INVALID_ZONE_OPERATION = 0x1b6,
        ZRWA_RESOURCES_UNAVAILABLE = 0x1b7,
        ZONE_BOUNDARY_ERROR = 0x1b8,
        ZONE_IS_FULL = 0x1b9,
        ZONE_IS_READ_ONLY = 0x1ba,
        ZONE_IS_OFFLINE = 0x1bb,
        ZONE_INVALID_WRITE = 0x1bc,
        TOO_MANY_ACTIVE_ZONES = 0x1bd,
        TOO_MANY_OPEN_ZONES = 0x1be,
        INVALID_ZONE_STATE_TRANSITION = 0x1bf,
        // Media and data integrity errors.
        WRITE_FAULT = 0x280,
        UNRECOVERED_READ_ERROR = 0x281,
        GUARD_CHECK_ERROR = 0x282,
        APPLICATION_TAG_CHECK_ERROR = 0x283,
        REFERENCE_TAG_CHECK_ERROR = 0x284,
        COMPARE_FAILURE = 0x285,
        ACCESS_DENIED = 0x286,
        DEALLOCATED_OR_UNWRITTEN = 0x287,
        // Path related status.
        INTERNAL_PATH_ERROR = 0x300,
        ANA_PERSISTENT_LOSS = 0x301,
        ANA_INACCESSIBLE = 0x302,
        ANA_TRANSITION = 0x303,
        CONTROLLER_PATHING_ERROR = 0x360,
        HOST_PATHING_ERROR = 0x370,
        ABORTED_BY_HOST = 0x371,
    }
}

/// Identify Controller (CNS 01h), as far as it is used (5.1.13.2.1).
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyController {
    /// PCI vendor.
    pub vid: U16,
    /// PCI subsystem vendor.
    pub ssvid: U16,
    /// Serial number: ASCII, padded with blanks.
    pub sn: [u8; 20],
    /// Model number: ASCII, padded with blanks.
    pub mn: [u8; 40],
    /// Firmware revision: ASCII, padded with blanks.
    pub fr: [u8; 8],
    /// Recommended arbitration burst.
    pub rab: u8,
    /// IEEE OUI of the vendor.
    pub ieee: [u8; 3],
    /// Multi-path I/O and namespace sharing capabilities.
    pub cmic: u8,
    /// Maximum data transfer size: a power of two of CAP.MPSMIN pages; 0 without a limit.
    pub mdts: u8,
    /// Controller.
    pub cntlid: U16,
    /// Version.
    pub ver: U32,
    /// Bytes 84 to 511.
    pub rsvd84: [u8; 428],
    /// Submission queue entry sizes.
    pub sqes: u8,
    /// Completion queue entry sizes.
    pub cqes: u8,
    /// Most commands outstanding.
    pub maxcmd: U16,
    /// Number of namespaces.
    pub nn: U32,
    /// Optional NVM commands.
    pub oncs: U16,
    /// Fused operations.
    pub fuses: U16,
    /// Format NVM attributes.
    pub fna: u8,
    /// Volatile write cache: bit 0, whether there is one.
    pub vwc: u8,
    /// Bytes 526 to 767.
    pub rsvd526: [u8; 242],
    /// NVM subsystem NQN: UTF-8, ended by a zero.
    pub subnqn: [u8; 256],
    /// Bytes 1024 to 4095.
    pub rsvd1024: [u8; 3072],
}

const _: () = assert!(size_of::<IdentifyController>() == IDENTIFY_BYTES);

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::offset_of;

    #[test]
    fn identify_controller_has_its_fields_where_the_specification_has_them() {
        assert_eq!(offset_of!(IdentifyController, mn), 24);
        assert_eq!(offset_of!(IdentifyController, fr), 64);
        assert_eq!(offset_of!(IdentifyController, cmic), 76);
        assert_eq!(offset_of!(IdentifyController, mdts), 77);
        assert_eq!(offset_of!(IdentifyController, ver), 80);
        assert_eq!(offset_of!(IdentifyController, sqes), 512);
        assert_eq!(offset_of!(IdentifyController, nn), 516);
        assert_eq!(offset_of!(IdentifyController, oncs), 520);
        assert_eq!(offset_of!(IdentifyController, vwc), 525);
        assert_eq!(offset_of!(IdentifyController, subnqn), 768);
    }

    #[test]
    fn identify_dwords_have_their_bits_where_the_specification_has_them() {
        let cdw10 = IdentifyCdw10::new()
            .with_cns(Cns::CONTROLLER_OF_CSI.0)
            .with_cntid(0xabcd);
        assert_eq!(cdw10.into_bits(), 0xabcd_0006);
        let cdw11 = IdentifyCdw11::new().with_cnssid(0x1234).with_csi(Csi::ZONED.0);
        assert_eq!(cdw11.into_bits(), 0x0200_1234);
    }

    #[test]
    fn a_status_field_is_taken_apart_as_the_specification_lays_it_out() {
        // Do not retry, retry delay 2, zone is full.
        let field = StatusField::from_bits(0b101_0001_1011_1001);
        assert_eq!((field.sct(), field.sc()), (1, 0xb9));
        assert_eq!((field.crd(), field.more(), field.dnr()), (2, false, true));
        assert_eq!(field.status(), Status::ZONE_IS_FULL);
        assert_eq!(StatusField::from_bits(0x2000).status(), Status::SUCCESS);
        assert!(StatusField::from_bits(0x2000).more());
    }

    #[test]
    fn a_status_without_a_name_survives() {
        extern crate std;
        let status = StatusField::from_bits(0x07ff).status();
        assert_eq!((status.0, status.name()), (0x7ff, None));
        assert_eq!(std::format!("{status:?}"), "Status(0x7ff)");
        assert_eq!(std::format!("{:?}", Status::ZONE_IS_FULL), "ZONE_IS_FULL");
    }
}
