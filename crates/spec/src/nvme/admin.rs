//! Dwords of admin commands (NVM Express Base Specification 2.1, 5).

use bitfield_struct::bitfield;

/// Command dword 10 of Create I/O Submission Queue and Create I/O Completion Queue (5.2.1, 5.2.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CreateQueueCdw10 {
    /// The queue.
    pub qid: u16,
    /// Its entries, 0-based.
    pub qsize_z: u16,
}

/// Command dword 11 of Create I/O Completion Queue (5.2.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CreateCqCdw11 {
    /// The queue is contiguous.
    pub pc: bool,
    /// Interrupts are enabled.
    pub ien: bool,
    #[bits(14)]
    __: u16,
    /// Interrupt vector.
    pub iv: u16,
}

/// Command dword 11 of Create I/O Submission Queue (5.2.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CreateSqCdw11 {
    /// The queue is contiguous.
    pub pc: bool,
    /// Priority class.
    #[bits(2)]
    pub qprio: u8,
    #[bits(13)]
    __: u16,
    /// The completion queue that it uses.
    pub cqid: u16,
}

/// Command dword 10 of Abort (5.1.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct AbortCdw10 {
    /// The command's submission queue.
    pub sqid: u16,
    /// The command.
    pub cid: u16,
}

/// Command dword 10 of Get Log Page (5.1.12).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct GetLogCdw10 {
    /// A [`super::log::LogId`].
    pub lid: u8,
    /// Log specific.
    #[bits(7)]
    pub lsp: u8,
    /// Retain the asynchronous event that the page belongs to.
    pub rae: bool,
    /// Dwords to return, 0-based, low half.
    pub numdl_z: u16,
}

/// Command dword 11 of Get Log Page.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct GetLogCdw11 {
    /// Dwords to return, 0-based, high half.
    pub numdu: u16,
    /// Log specific identifier.
    pub lsi: u16,
}

/// Command dword 14 of Get Log Page.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct GetLogCdw14 {
    #[bits(7)]
    pub uuid_index: u8,
    #[bits(16)]
    __: u16,
    /// The offset is an index rather than bytes.
    pub ot: bool,
    /// A [`super::base::Csi`].
    pub csi: u8,
}

/// Command dword 10 of Set Features (5.1.25).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct SetFeaturesCdw10 {
    /// A [`super::feature::FeatureId`].
    pub fid: u8,
    #[bits(23)]
    __: u32,
    /// Save across power cycles.
    pub sv: bool,
}

/// Command dword 10 of Get Features (5.1.11).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct GetFeaturesCdw10 {
    /// A [`super::feature::FeatureId`].
    pub fid: u8,
    /// 0 current, 1 default, 2 saved, 3 supported capabilities.
    #[bits(3)]
    pub sel: u8,
    #[bits(21)]
    __: u32,
}

/// Command dword 10 of Format NVM (5.1.10).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct FormatCdw10 {
    /// LBA format, bits 3:0.
    #[bits(4)]
    pub lbafl: u8,
    /// Metadata is transferred with the data.
    pub mset: bool,
    /// Protection information type.
    #[bits(3)]
    pub pi: u8,
    /// Protection information comes first.
    pub pil: bool,
    /// Secure erase: 0 none, 1 user data, 2 cryptographic.
    #[bits(3)]
    pub ses: u8,
    /// LBA format, bits 5:4.
    #[bits(2)]
    pub lbafu: u8,
    #[bits(18)]
    __: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dwords_have_their_bits_where_the_specification_has_them() {
        let queue = CreateQueueCdw10::new().with_qid(0x1234).with_qsize_z(0xabcd);
        assert_eq!(queue.into_bits(), 0xabcd_1234);
        let cq = CreateCqCdw11::new().with_iv(7).with_ien(true).with_pc(true);
        assert_eq!(cq.into_bits(), 0x0007_0003);
        let sq = CreateSqCdw11::new().with_cqid(7).with_qprio(2).with_pc(true);
        assert_eq!(sq.into_bits(), 0x0007_0005);
        let log = GetLogCdw10::new()
            .with_lid(0xbf)
            .with_rae(true)
            .with_numdl_z(0x3ff);
        assert_eq!(log.into_bits(), 0x03ff_80bf);
        assert_eq!(
            GetLogCdw14::new().with_csi(2).with_ot(true).into_bits(),
            0x0280_0000
        );
        assert_eq!(SetFeaturesCdw10::new().with_sv(true).into_bits(), 1 << 31);
        assert_eq!(GetFeaturesCdw10::new().with_sel(3).into_bits(), 0x300);
        let format = FormatCdw10::new().with_ses(1).with_pi(1).with_lbafu(1);
        assert_eq!(format.into_bits(), 0x1220);
    }
}
