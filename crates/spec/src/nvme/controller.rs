//! Controller properties (NVM Express Base Specification 2.1, 3.1.4): what a PCIe host finds in registers, and a
//! fabrics host asks for by Property Get.

use bitfield_struct::bitfield;

/// Offsets of the properties, bytes.
pub mod offset {
    /// [`super::Cap`], 8 bytes.
    pub const CAP: u64 = 0x00;
    /// Version, 4 bytes.
    pub const VS: u64 = 0x08;
    /// Interrupt mask set (PCIe), 4 bytes.
    pub const INTMS: u64 = 0x0c;
    /// Interrupt mask clear (PCIe), 4 bytes.
    pub const INTMC: u64 = 0x10;
    /// [`super::Cc`], 4 bytes.
    pub const CC: u64 = 0x14;
    /// [`super::Csts`], 4 bytes.
    pub const CSTS: u64 = 0x1c;
    /// NVM subsystem reset, 4 bytes.
    pub const NSSR: u64 = 0x20;
    /// Admin queue attributes (PCIe), 4 bytes.
    pub const AQA: u64 = 0x24;
    /// Admin submission queue base address (PCIe), 8 bytes.
    pub const ASQ: u64 = 0x28;
    /// Admin completion queue base address (PCIe), 8 bytes.
    pub const ACQ: u64 = 0x30;
    /// Controller memory buffer location, 4 bytes.
    pub const CMBLOC: u64 = 0x38;
    /// Controller memory buffer size, 4 bytes.
    pub const CMBSZ: u64 = 0x3c;
    /// [`super::Crto`], 4 bytes.
    pub const CRTO: u64 = 0x68;
    /// The first doorbell (PCIe).
    pub const DOORBELLS: u64 = 0x1000;
}

/// Version 2.1, as the version property and Identify Controller have it.
pub const VERSION_2_1: u32 = 0x0002_0100;

/// Controller capabilities (figure 36).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cap {
    /// Most entries of an I/O queue, 0-based.
    pub mqes_z: u16,
    /// Queues must be contiguous.
    pub cqr: bool,
    /// Arbitration mechanisms besides round robin.
    #[bits(2)]
    pub ams: u8,
    #[bits(5)]
    __: u8,
    /// Longest time from enabling to ready, units of 500 ms.
    pub to: u8,
    /// Doorbell stride: 4 bytes times two to this.
    #[bits(4)]
    pub dstrd: u8,
    /// NVM subsystem reset is supported.
    pub nssrs: bool,
    /// The NVM command set can be selected ([`CSS_NVM`]).
    pub css_nvm: bool,
    #[bits(5)]
    __: u8,
    /// All command sets that Identify names can be selected ([`CSS_ALL`]).
    pub css_all: bool,
    /// Only admin commands can be selected ([`CSS_ADMIN_ONLY`]).
    pub css_admin_only: bool,
    /// Boot partitions.
    pub bps: bool,
    /// What is shut down together.
    #[bits(2)]
    pub cps: u8,
    /// Smallest memory page: 4096 bytes times two to this.
    #[bits(4)]
    pub mpsmin: u8,
    /// Largest memory page: 4096 bytes times two to this.
    #[bits(4)]
    pub mpsmax: u8,
    /// Persistent memory region.
    pub pmrs: bool,
    /// Controller memory buffer.
    pub cmbs: bool,
    /// NVM subsystem shutdown.
    pub nsss: bool,
    /// Ready with media, of which [`Crto`] has the time.
    pub crwms: bool,
    /// Ready independent of media.
    pub crims: bool,
    /// NVM subsystem shutdown enhancements.
    pub nsses: bool,
    #[bits(2)]
    __: u8,
}

/// [`Cc::css`]: the NVM command set.
pub const CSS_NVM: u8 = 0b000;
/// [`Cc::css`]: all command sets that the controller has.
pub const CSS_ALL: u8 = 0b110;
/// [`Cc::css`]: admin commands only.
pub const CSS_ADMIN_ONLY: u8 = 0b111;

/// Controller configuration (figure 41).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cc {
    /// Enable.
    pub en: bool,
    #[bits(3)]
    __: u8,
    /// Command set selected.
    #[bits(3)]
    pub css: u8,
    /// Memory page size: 4096 bytes times two to this.
    #[bits(4)]
    pub mps: u8,
    /// Arbitration mechanism.
    #[bits(3)]
    pub ams: u8,
    /// Shutdown notification: 1 normal, 2 abrupt.
    #[bits(2)]
    pub shn: u8,
    /// Submission queue entry size, as a power of two.
    #[bits(4)]
    pub iosqes: u8,
    /// Completion queue entry size, as a power of two.
    #[bits(4)]
    pub iocqes: u8,
    /// Ready independent of media.
    pub crime: bool,
    #[bits(7)]
    __: u8,
}

/// [`Csts::shst`]: no shutdown.
pub const SHST_NORMAL: u8 = 0;
/// [`Csts::shst`]: shutting down.
pub const SHST_OCCURRING: u8 = 1;
/// [`Csts::shst`]: shut down.
pub const SHST_COMPLETE: u8 = 2;

/// Controller status (figure 42).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Csts {
    /// Ready.
    pub rdy: bool,
    /// Controller fatal status.
    pub cfs: bool,
    /// Shutdown status.
    #[bits(2)]
    pub shst: u8,
    /// An NVM subsystem reset occurred; write 1 to clear.
    pub nssro: bool,
    /// Processing paused.
    pub pp: bool,
    /// Shutdown type: of the whole subsystem.
    pub st: bool,
    #[bits(25)]
    __: u32,
}

/// Controller ready timeouts (3.1.4.22), units of 500 ms.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Crto {
    /// Until ready with media.
    pub crwmt: u16,
    /// Until ready independent of media.
    pub crimt: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_have_their_bits_where_the_specification_has_them() {
        assert_eq!(Cap::new().with_to(0xff).into_bits(), 0xff << 24);
        assert_eq!(Cap::new().with_css_nvm(true).into_bits(), 1 << 37);
        assert_eq!(Cap::new().with_css_all(true).into_bits(), 1 << 43);
        assert_eq!(Cap::new().with_mpsmin(0xf).into_bits(), 0xf << 48);
        assert_eq!(Cap::new().with_mpsmax(0xf).into_bits(), 0xf << 52);
        assert_eq!(Cap::new().with_crwms(true).into_bits(), 1 << 59);
        // What Linux writes: both entry sizes, all command sets, enabled.
        let cc = Cc::from_bits(0x0046_0061);
        assert!(cc.en() && cc.css() == CSS_ALL && cc.mps() == 0 && cc.shn() == 0);
        assert_eq!((cc.iosqes(), cc.iocqes()), (6, 4));
        assert_eq!(Cc::new().with_shn(1).into_bits(), 1 << 14);
        assert_eq!(
            Csts::new().with_shst(SHST_COMPLETE).with_rdy(true).into_bits(),
            0x9
        );
    }
}
