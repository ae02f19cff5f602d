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
        DELETE_IO_SQ = 0x00,
        CREATE_IO_SQ = 0x01,
        GET_LOG_PAGE = 0x02,
        DELETE_IO_CQ = 0x04,
        CREATE_IO_CQ = 0x05,
        IDENTIFY = 0x06,
        ABORT = 0x08,
        SET_FEATURES = 0x09,
        GET_FEATURES = 0x0a,
        ASYNC_EVENT_REQUEST = 0x0c,
        NAMESPACE_MANAGEMENT = 0x0d,
        FIRMWARE_COMMIT = 0x10,
        FIRMWARE_DOWNLOAD = 0x11,
        DEVICE_SELF_TEST = 0x14,
        NAMESPACE_ATTACHMENT = 0x15,
        KEEP_ALIVE = 0x18,
        DIRECTIVE_SEND = 0x19,
        DIRECTIVE_RECEIVE = 0x1a,
        DOORBELL_BUFFER_CONFIG = 0x7c,
        FORMAT_NVM = 0x80,
        SECURITY_SEND = 0x81,
        SECURITY_RECEIVE = 0x82,
        SANITIZE = 0x84,
    }
}

open_enum! {
    /// Controller or Namespace Structure: which data Identify returns (5.1.13, figure 310).
    pub struct Cns(u8) {
        /// Identify Namespace of the NVM command set.
        NAMESPACE = 0x00,
        /// Identify Controller.
        CONTROLLER = 0x01,
        /// Identifiers of the active namespaces.
        ACTIVE_NAMESPACES = 0x02,
        /// Identification descriptors of a namespace.
        NAMESPACE_DESCRIPTORS = 0x03,
        /// Identify Namespace of the command set named by CSI.
        NAMESPACE_OF_CSI = 0x05,
        /// Identify Controller of the command set named by CSI.
        CONTROLLER_OF_CSI = 0x06,
        /// Identifiers of the active namespaces of the command set named by CSI.
        ACTIVE_NAMESPACES_OF_CSI = 0x07,
        /// Identify Namespace, as far as it is the same for all command sets.
        NAMESPACE_INDEPENDENT = 0x08,
        /// Identifiers of the allocated namespaces.
        ALLOCATED_NAMESPACES = 0x10,
        /// Identify Namespace of an allocated namespace.
        ALLOCATED_NAMESPACE = 0x11,
        /// Controllers that a namespace is attached to.
        ATTACHED_CONTROLLERS = 0x12,
        /// Controllers of the subsystem.
        CONTROLLERS = 0x13,
        /// Identifiers of the allocated namespaces of the command set named by CSI.
        ALLOCATED_NAMESPACES_OF_CSI = 0x1a,
        /// Identify Namespace, of the command set named by CSI, of an allocated namespace.
        ALLOCATED_NAMESPACE_OF_CSI = 0x1b,
        /// Combinations of command sets.
        COMMAND_SETS = 0x1c,
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
    /// The field of a status, with nothing said about retries.
    pub const fn of(status: Status) -> StatusField {
        let [sc, sct] = status.0.to_le_bytes();
        StatusField::new().with_sc(sc).with_sct(sct)
    }

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
        ABORTED_FAILED_FUSED = 0x009,
        ABORTED_MISSING_FUSED = 0x00a,
        INVALID_NAMESPACE_OR_FORMAT = 0x00b,
        COMMAND_SEQUENCE_ERROR = 0x00c,
        INVALID_SGL_SEGMENT_DESCRIPTOR = 0x00d,
        INVALID_NUMBER_OF_SGL_DESCRIPTORS = 0x00e,
        DATA_SGL_LENGTH_INVALID = 0x00f,
        METADATA_SGL_LENGTH_INVALID = 0x010,
        SGL_DESCRIPTOR_TYPE_INVALID = 0x011,
        INVALID_USE_OF_CMB = 0x012,
        PRP_OFFSET_INVALID = 0x013,
        SGL_OFFSET_INVALID = 0x016,
        HOST_IDENTIFIER_INCONSISTENT_FORMAT = 0x018,
        KEEP_ALIVE_TIMER_EXPIRED = 0x019,
        KEEP_ALIVE_TIMEOUT_INVALID = 0x01a,
        SANITIZE_FAILED = 0x01c,
        SANITIZE_IN_PROGRESS = 0x01d,
        SGL_DATA_BLOCK_GRANULARITY_INVALID = 0x01e,
        NAMESPACE_WRITE_PROTECTED = 0x020,
        COMMAND_INTERRUPTED = 0x021,
        TRANSIENT_TRANSPORT_ERROR = 0x022,
        LBA_OUT_OF_RANGE = 0x080,
        CAPACITY_EXCEEDED = 0x081,
        NAMESPACE_NOT_READY = 0x082,
        RESERVATION_CONFLICT = 0x083,
        FORMAT_IN_PROGRESS = 0x084,
        // Command specific status.
        COMPLETION_QUEUE_INVALID = 0x100,
        INVALID_QUEUE_IDENTIFIER = 0x101,
        INVALID_QUEUE_SIZE = 0x102,
        ABORT_COMMAND_LIMIT_EXCEEDED = 0x103,
        ASYNC_EVENT_REQUEST_LIMIT_EXCEEDED = 0x105,
        INVALID_FIRMWARE_SLOT = 0x106,
        INVALID_INTERRUPT_VECTOR = 0x108,
        INVALID_LOG_PAGE = 0x109,
        INVALID_FORMAT = 0x10a,
        INVALID_QUEUE_DELETION = 0x10c,
        FEATURE_IDENTIFIER_NOT_SAVEABLE = 0x10d,
        FEATURE_NOT_CHANGEABLE = 0x10e,
        FEATURE_NOT_NAMESPACE_SPECIFIC = 0x10f,
        CONTROLLER_LIST_INVALID = 0x11c,
        COMMAND_SET_NOT_SUPPORTED = 0x129,
        COMMAND_SET_COMBINATION_REJECTED = 0x12b,
        INVALID_COMMAND_SET = 0x12c,
        // Command specific status, NVM command set.
        CONFLICTING_ATTRIBUTES = 0x180,
        INVALID_PROTECTION_INFORMATION = 0x181,
        ATTEMPTED_WRITE_TO_READ_ONLY_RANGE = 0x182,
        COMMAND_SIZE_LIMIT_EXCEEDED = 0x183,
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
    /// RTD3 resume latency, microseconds; 0 where it is not told.
    pub rtd3r: U32,
    /// RTD3 entry latency, microseconds: how long a shutdown may take.
    pub rtd3e: U32,
    /// Optional asynchronous events: a [`super::feature::EventConfiguration`].
    pub oaes: U32,
    /// Controller attributes.
    pub ctratt: U32,
    /// Bytes 100 to 110.
    pub rsvd100: [u8; 11],
    /// Controller type: 1 for I/O.
    pub cntrltype: u8,
    /// Bytes 112 to 255.
    pub rsvd112: [u8; 144],
    /// Optional admin commands: an [`Oacs`].
    pub oacs: U16,
    /// Abort command limit, 0-based.
    pub acl_z: u8,
    /// Asynchronous event request limit, 0-based.
    pub aerl_z: u8,
    /// Firmware updates: bit 0, slot 1 is read-only; bits 3:1, slots.
    pub frmw: u8,
    /// Log page attributes: a [`Lpa`].
    pub lpa: u8,
    /// Error log entries, 0-based.
    pub elpe_z: u8,
    /// Power states, 0-based.
    pub npss_z: u8,
    /// Bytes 264 to 265.
    pub rsvd264: [u8; 2],
    /// Warning composite temperature, kelvins.
    pub wctemp: U16,
    /// Critical composite temperature, kelvins.
    pub cctemp: U16,
    /// Bytes 270 to 319.
    pub rsvd270: [u8; 50],
    /// Keep alive granularity, units of 100 ms; 0 without keep alive.
    pub kas: U16,
    /// Bytes 322 to 511.
    pub rsvd322: [u8; 190],
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
    /// Atomic write unit normal, blocks, 0-based.
    pub awun_z: U16,
    /// Atomic write unit at power failure, blocks, 0-based.
    pub awupf_z: U16,
    /// Vendor specific I/O commands have the common format.
    pub icsvscc: u8,
    /// Namespace write protection.
    pub nwpc: u8,
    /// Atomic compare and write unit, blocks, 0-based.
    pub acwu_z: U16,
    /// Formats of copy descriptors, a bit each.
    pub ocfs: U16,
    /// SGL support.
    pub sgls: U32,
    /// Most namespaces that may be active; 0 for `nn`.
    pub mnan: U32,
    /// Bytes 544 to 767.
    pub rsvd544: [u8; 224],
    /// NVM subsystem NQN: UTF-8, ended by a zero.
    pub subnqn: [u8; 256],
    /// Bytes 1024 to 2047.
    pub rsvd1024: [u8; 1024],
    /// Power state 0: most power, units of 10 mW.
    pub psd0_mp: U16,
    /// Bytes 2050 to 4095.
    pub rsvd2050: [u8; 2046],
}

const _: () = assert!(size_of::<IdentifyController>() == IDENTIFY_BYTES);

/// [`IdentifyController::oacs`].
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct Oacs {
    /// Security Send and Receive.
    pub security: bool,
    /// Format NVM.
    pub format: bool,
    /// Firmware Commit and Image Download.
    pub firmware: bool,
    /// Namespace Management and Attachment.
    pub namespaces: bool,
    #[bits(4)]
    __: u8,
    /// Doorbell Buffer Config.
    pub doorbell_buffers: bool,
    #[bits(7)]
    __: u8,
}

/// [`IdentifyController::lpa`].
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct Lpa {
    /// The SMART log exists for each namespace.
    pub smart_per_namespace: bool,
    /// Commands Supported and Effects.
    pub effects: bool,
    /// Length and offset of Get Log Page have all their bits.
    pub extended_data: bool,
    /// Telemetry.
    pub telemetry: bool,
    /// Persistent Event.
    pub persistent_event: bool,
    /// Supported Log Pages, Feature Identifiers Supported and Effects and the like.
    pub supported_pages: bool,
    #[bits(2)]
    __: u8,
}

/// [`IdentifyController::oncs`].
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct Oncs {
    /// Compare.
    pub compare: bool,
    /// Write Uncorrectable.
    pub write_uncorrectable: bool,
    /// Dataset Management.
    pub dataset_management: bool,
    /// Write Zeroes.
    pub write_zeroes: bool,
    /// Saving features, and the Select field of Get Features.
    pub save_and_select: bool,
    /// Reservations.
    pub reservations: bool,
    /// The Timestamp feature.
    pub timestamp: bool,
    /// Verify.
    pub verify: bool,
    /// Copy.
    pub copy: bool,
    #[bits(7)]
    __: u8,
}

/// Identify Namespace, as far as it is the same for all command sets (CNS 08h, 5.1.13.2.8).
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IdentifyNamespaceIndependent {
    /// Features: bit 0 thin provisioning ..., bit 4 rotational.
    pub nsfeat: u8,
    /// As in Identify Namespace.
    pub nmic: u8,
    /// Reservations.
    pub rescap: u8,
    /// Format progress: bit 7 supported, bits 6:0 per cent left.
    pub fpi: u8,
    /// ANA group.
    pub anagrpid: U32,
    /// Attributes: bit 0, write protected.
    pub nsattr: u8,
    /// Zero.
    pub rsvd9: u8,
    /// NVM set.
    pub nvmsetid: U16,
    /// Endurance group.
    pub endgid: U16,
    /// Status: bit 0, ready.
    pub nstat: u8,
    /// Bytes 15 to 4095.
    pub rsvd15: [u8; 4081],
}

const _: () = assert!(size_of::<IdentifyNamespaceIndependent>() == IDENTIFY_BYTES);

open_enum! {
    /// Types of identification descriptors of a namespace (CNS 03h, figure 315).
    pub struct Nidt(u8) {
        EUI64 = 1,
        NGUID = 2,
        UUID = 3,
        CSI = 4,
    }
}

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
        assert_eq!(offset_of!(IdentifyController, oaes), 92);
        assert_eq!(offset_of!(IdentifyController, cntrltype), 111);
        assert_eq!(offset_of!(IdentifyController, oacs), 256);
        assert_eq!(offset_of!(IdentifyController, npss_z), 263);
        assert_eq!(offset_of!(IdentifyController, wctemp), 266);
        assert_eq!(offset_of!(IdentifyController, kas), 320);
        assert_eq!(offset_of!(IdentifyController, awun_z), 526);
        assert_eq!(offset_of!(IdentifyController, ocfs), 534);
        assert_eq!(offset_of!(IdentifyController, sgls), 536);
        assert_eq!(offset_of!(IdentifyController, psd0_mp), 2048);
        assert_eq!(offset_of!(IdentifyController, sqes), 512);
        assert_eq!(offset_of!(IdentifyController, nn), 516);
        assert_eq!(offset_of!(IdentifyController, oncs), 520);
        assert_eq!(offset_of!(IdentifyController, vwc), 525);
        assert_eq!(offset_of!(IdentifyController, subnqn), 768);
    }

    #[test]
    fn capabilities_have_their_bits_where_the_specification_has_them() {
        assert_eq!(
            Oacs::new()
                .with_doorbell_buffers(true)
                .with_format(true)
                .into_bits(),
            0x102
        );
        assert_eq!(Lpa::new().with_supported_pages(true).into_bits(), 0x20);
        assert_eq!(
            Oncs::new().with_copy(true).with_timestamp(true).into_bits(),
            0x140
        );
        assert_eq!(offset_of!(IdentifyNamespaceIndependent, nstat), 14);
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
