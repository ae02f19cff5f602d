//! Queue entries: 64 bytes in, 16 bytes out (NVM Express Base Specification 2.1, 4.1 and 4.2).

use bitfield_struct::bitfield;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::base::StatusField;

/// Bytes of a submission queue entry.
pub const SUBMISSION_ENTRY_BYTES: usize = 64;
/// Bytes of a completion queue entry.
pub const COMPLETION_ENTRY_BYTES: usize = 16;

/// The namespace identifier that means all namespaces.
pub const NSID_ALL: u32 = u32::MAX;

/// Second byte of a submission queue entry (figure 91, command dword 0).
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct CommandFlags {
    /// Fused operation: 0 for none.
    #[bits(2)]
    pub fuse: u8,
    #[bits(4)]
    __: u8,
    /// What the data pointer is: 0 for PRPs, 1 and 2 for SGLs.
    #[bits(2)]
    pub psdt: u8,
}

/// A submission queue entry in the common format (figure 92).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SubmissionEntry {
    /// Opcode of the queue's command set.
    pub opcode: u8,
    /// [`CommandFlags`].
    pub flags: u8,
    /// Command identifier, unique among the commands of its queue that are not completed.
    pub cid: U16,
    /// Namespace; 0 where none is used, [`NSID_ALL`] for all.
    pub nsid: U32,
    /// Command dword 2.
    pub cdw2: U32,
    /// Command dword 3.
    pub cdw3: U32,
    /// Metadata pointer.
    pub mptr: U64,
    /// First half of the data pointer: PRP entry 1, or the address of an SGL descriptor.
    pub prp1: U64,
    /// Second half of the data pointer: PRP entry 2, or the rest of an SGL descriptor.
    pub prp2: U64,
    /// Command dword 10.
    pub cdw10: U32,
    /// Command dword 11.
    pub cdw11: U32,
    /// Command dword 12.
    pub cdw12: U32,
    /// Command dword 13.
    pub cdw13: U32,
    /// Command dword 14.
    pub cdw14: U32,
    /// Command dword 15.
    pub cdw15: U32,
}

const _: () = assert!(size_of::<SubmissionEntry>() == SUBMISSION_ENTRY_BYTES);

impl SubmissionEntry {
    /// The entry's flags.
    pub const fn command_flags(&self) -> CommandFlags {
        CommandFlags::from_bits(self.flags)
    }

    /// Starting LBA of I/O commands: command dwords 10 (low) and 11.
    pub const fn slba(&self) -> u64 {
        (self.cdw11.get() as u64) << 32 | self.cdw10.get() as u64
    }
}

/// A completion queue entry (figure 97).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CompletionEntry {
    /// Command specific: dword 0 low, dword 1 high.
    pub result: U64,
    /// The submission queue's head pointer.
    pub sqhd: U16,
    /// The submission queue.
    pub sqid: U16,
    /// The command.
    pub cid: U16,
    /// Phase tag in bit 0, [`StatusField`] above it.
    pub status: U16,
}

const _: () = assert!(size_of::<CompletionEntry>() == COMPLETION_ENTRY_BYTES);

impl CompletionEntry {
    /// The last field, put together.
    pub const fn status_of(field: StatusField, phase: bool) -> U16 {
        U16::new(field.into_bits() << 1 | phase as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvme::Status;
    use core::mem::offset_of;

    #[test]
    fn a_submission_entry_has_its_fields_where_the_specification_has_them() {
        assert_eq!(offset_of!(SubmissionEntry, cid), 2);
        assert_eq!(offset_of!(SubmissionEntry, nsid), 4);
        assert_eq!(offset_of!(SubmissionEntry, mptr), 16);
        assert_eq!(offset_of!(SubmissionEntry, prp1), 24);
        assert_eq!(offset_of!(SubmissionEntry, prp2), 32);
        assert_eq!(offset_of!(SubmissionEntry, cdw10), 40);
        assert_eq!(offset_of!(SubmissionEntry, cdw15), 60);
        assert_eq!(CommandFlags::new().with_psdt(1).with_fuse(2).into_bits(), 0x42);
    }

    #[test]
    fn a_completion_has_its_status_above_the_phase_tag() {
        assert_eq!(offset_of!(CompletionEntry, sqhd), 8);
        assert_eq!(offset_of!(CompletionEntry, cid), 12);
        let field = StatusField::of(Status::ZONE_IS_FULL).with_dnr(true);
        assert_eq!(CompletionEntry::status_of(field, true).get(), 0x8373);
        assert_eq!(CompletionEntry::status_of(StatusField::new(), false).get(), 0);
    }
}
