//! Log pages and the events that point to them (NVM Express Base Specification 2.1, 5.1.12.1 and 5.1.2.1).

use bitfield_struct::bitfield;
use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

open_enum! {
    /// Log page identifiers (figure 202).
    pub struct LogId(u8) {
        SUPPORTED_LOG_PAGES = 0x00,
        ERROR_INFORMATION = 0x01,
        SMART = 0x02,
        FIRMWARE_SLOT = 0x03,
        CHANGED_NAMESPACES = 0x04,
        COMMANDS_SUPPORTED_AND_EFFECTS = 0x05,
        FEATURES_SUPPORTED_AND_EFFECTS = 0x12,
        /// Of zoned namespaces.
        CHANGED_ZONES = 0xbf,
    }
}

/// What a log page supports, or a command does to the rest of the controller: an entry of Supported Log Pages.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct SupportedLog {
    /// The page can be read.
    pub lsupp: bool,
    /// Its offset may be an index.
    pub ios: bool,
    #[bits(14)]
    __: u16,
    /// Specific to the page.
    pub lidsp: u16,
}

/// An entry of Commands Supported and Effects.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CommandEffects {
    /// The command is supported.
    pub csupp: bool,
    /// It may change data.
    pub lbcc: bool,
    /// It may change a namespace's capabilities.
    pub ncc: bool,
    /// It may change the inventory of namespaces.
    pub nic: bool,
    /// It may change the controller's capabilities.
    pub ccc: bool,
    #[bits(11)]
    __: u16,
    /// What must not be submitted beside it: 1 other commands of the namespace, 2 of any.
    #[bits(3)]
    pub cse: u8,
    #[bits(13)]
    __: u16,
}

/// An entry of Feature Identifiers Supported and Effects.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct FeatureEffects {
    /// The feature is supported.
    pub fsupp: bool,
    /// Setting it may change user data.
    pub udcc: bool,
    /// Setting it may change a namespace's capabilities.
    pub ncc: bool,
    /// Setting it may change the inventory of namespaces.
    pub nic: bool,
    /// Setting it may change the controller's capabilities.
    pub ccc: bool,
    #[bits(15)]
    __: u16,
    /// Its scope is a namespace.
    pub namespace_scope: bool,
    /// Its scope is a controller.
    pub controller_scope: bool,
    #[bits(10)]
    __: u16,
}

/// Bytes of Commands Supported and Effects.
pub const EFFECTS_BYTES: usize = 4096;

/// An entry of the Error Information log (figure 205).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ErrorEntry {
    /// Which error this is since the subsystem was made, from 1; 0 for an unused entry.
    pub error_count: U64,
    /// The submission queue.
    pub sqid: U16,
    /// The command.
    pub cid: U16,
    /// Its status, as in the completion.
    pub status: U16,
    /// Which of the command's bytes is wrong; all ones where that is not known.
    pub parameter_location: U16,
    /// The first block that it is about.
    pub lba: U64,
    /// The namespace.
    pub nsid: U32,
    /// Vendor specific information.
    pub vendor: u8,
    /// Transport type.
    pub trtype: u8,
    /// The command set, where `lpver` is 1.
    pub csi: u8,
    /// The opcode, where `lpver` is 1.
    pub opcode: u8,
    /// Command specific.
    pub command_specific: U64,
    /// Transport specific.
    pub transport_specific: U16,
    /// Zero.
    pub rsvd42: [u8; 21],
    /// Version of the entry.
    pub lpver: u8,
}

const _: () = assert!(size_of::<ErrorEntry>() == 64);

/// SMART / Health Information (figure 206), as far as it is used.
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Smart {
    /// Critical warning.
    pub critical_warning: u8,
    /// Composite temperature, kelvins.
    pub temperature: U16,
    /// Available spare, per cent.
    pub available_spare: u8,
    /// Threshold of that, per cent.
    pub available_spare_threshold: u8,
    /// Life used, per cent.
    pub percentage_used: u8,
    /// Critical warnings of endurance groups.
    pub endurance_group_warning: u8,
    /// Zero.
    pub rsvd7: [u8; 25],
    /// Thousands of 512 bytes read, rounded up.
    pub data_units_read: U128,
    /// Thousands of 512 bytes written, rounded up.
    pub data_units_written: U128,
    /// Read and Compare commands.
    pub host_reads: U128,
    /// Write commands.
    pub host_writes: U128,
    /// Minutes busy.
    pub busy_time: U128,
    /// Power cycles.
    pub power_cycles: U128,
    /// Power on hours.
    pub power_on_hours: U128,
    /// Unsafe shutdowns.
    pub unsafe_shutdowns: U128,
    /// Unrecovered errors of the media.
    pub media_errors: U128,
    /// Error Information entries since the subsystem was made.
    pub error_entries: U128,
    /// Bytes 192 to 511: times and sensors.
    pub rsvd192: [u8; 320],
}

const _: () = assert!(size_of::<Smart>() == 512);

/// Firmware Slot Information (figure 207).
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FirmwareSlots {
    /// The active slot in bits 2:0.
    pub afi: u8,
    /// Zero.
    pub rsvd1: [u8; 7],
    /// Revisions of slots 1 to 7: ASCII, padded with blanks; zeros where there is none.
    pub frs: [[u8; 8]; 7],
    /// Zero.
    pub rsvd64: [u8; 448],
}

const _: () = assert!(size_of::<FirmwareSlots>() == 512);

/// Most namespaces in the Changed Namespace List; more are told by one entry of all ones.
pub const MAX_CHANGED_NAMESPACES: usize = 1024;

open_enum! {
    /// Asynchronous event types (figure 149).
    pub struct EventType(u8) {
        ERROR = 0,
        SMART = 1,
        NOTICE = 2,
        IMMEDIATE = 3,
    }
}

/// Information of a notice: attributes of a namespace changed.
pub const NOTICE_NAMESPACE_ATTRIBUTE: u8 = 0x00;
/// Information of a notice: descriptors of zones changed.
pub const NOTICE_ZONE_DESCRIPTOR: u8 = 0xef;

/// Dword 0 of the completion of an Asynchronous Event Request (figure 148).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Event {
    /// An [`EventType`].
    #[bits(3)]
    pub kind: u8,
    #[bits(5)]
    __: u8,
    /// What it is.
    pub info: u8,
    /// The [`LogId`] to read, which lets further events of the type come.
    pub lid: u8,
    __: u8,
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::offset_of;

    #[test]
    fn log_pages_have_their_fields_where_the_specification_has_them() {
        assert_eq!(offset_of!(ErrorEntry, lba), 16);
        assert_eq!(offset_of!(ErrorEntry, nsid), 24);
        assert_eq!(offset_of!(ErrorEntry, command_specific), 32);
        assert_eq!(offset_of!(ErrorEntry, lpver), 63);
        assert_eq!(offset_of!(Smart, temperature), 1);
        assert_eq!(offset_of!(Smart, data_units_read), 32);
        assert_eq!(offset_of!(Smart, power_cycles), 112);
        assert_eq!(offset_of!(Smart, error_entries), 176);
        assert_eq!(offset_of!(FirmwareSlots, frs), 8);
    }

    #[test]
    fn entries_have_their_bits_where_the_specification_has_them() {
        assert_eq!(SupportedLog::new().with_lidsp(1).into_bits(), 1 << 16);
        assert_eq!(CommandEffects::new().with_cse(1).into_bits(), 1 << 16);
        assert_eq!(CommandEffects::new().with_lbcc(true).into_bits(), 2);
        assert_eq!(
            FeatureEffects::new().with_namespace_scope(true).into_bits(),
            1 << 20
        );
        let event = Event::new()
            .with_kind(EventType::NOTICE.0)
            .with_info(NOTICE_ZONE_DESCRIPTOR)
            .with_lid(LogId::CHANGED_ZONES.0);
        assert_eq!(event.into_bits(), 0x00bf_ef02);
    }
}
