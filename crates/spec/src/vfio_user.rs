//! vfio-user: messages between a virtual machine monitor (the client) and a device (the server) in another process
//! (QEMU, docs/interop/vfio-user.rst), and the numbers of `linux/vfio.h` that they carry.
//!
//! Names are the protocol's, in Rust's case. Integers are little-endian here; the protocol says the machine's byte order, and
//! both ends are on one machine. Types only: what a value means, and whether it may occur, is the server's business.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The only major version there is.
pub const MAJOR: u16 = 0;
/// The minor version described here.
pub const MINOR: u16 = 0;

/// Longest data of a message where the peer does not say otherwise, in bytes.
pub const DEFAULT_MAX_DATA_XFER_SIZE: u32 = 1 << 20;
/// File descriptors with a message where the peer does not say otherwise.
pub const DEFAULT_MAX_MSG_FDS: u32 = 1;

/// What every message starts with.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Header {
    /// Chosen by who sends the command; the reply repeats it. Each direction has its own.
    pub message_id: U16,
    /// One of [`command`].
    pub command: U16,
    /// Bytes of the message, this header included.
    pub message_size: U32,
    /// See [`flag`].
    pub flags: U32,
    /// In a reply with [`flag::ERROR`]: an errno.
    pub error: U32,
}

/// Bytes of [`Header`].
pub const HEADER_SIZE: usize = size_of::<Header>();
const _: () = assert!(HEADER_SIZE == 16);

/// Commands. Those from [`DMA_READ`](command::DMA_READ) to [`DMA_WRITE`](command::DMA_WRITE) are the server's, all others the client's.
#[expect(missing_docs, reason = "names of the protocol text")]
pub mod command {
    pub const VERSION: u16 = 1;
    pub const DMA_MAP: u16 = 2;
    pub const DMA_UNMAP: u16 = 3;
    pub const DEVICE_GET_INFO: u16 = 4;
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    pub const DEVICE_GET_REGION_IO_FDS: u16 = 6;
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    pub const DEVICE_SET_IRQS: u16 = 8;
    pub const REGION_READ: u16 = 9;
    pub const REGION_WRITE: u16 = 10;
    pub const DMA_READ: u16 = 11;
    pub const DMA_WRITE: u16 = 12;
    pub const DEVICE_RESET: u16 = 13;
    pub const REGION_WRITE_MULTI: u16 = 15;
    pub const DEVICE_FEATURE: u16 = 16;
}

/// Bits of [`Header::flags`].
pub mod flag {
    /// The bits that hold the type: [`COMMAND`] or [`REPLY`].
    pub const TYPE_MASK: u32 = 0xf;
    /// A command.
    pub const COMMAND: u32 = 0;
    /// A reply.
    pub const REPLY: u32 = 1;
    /// In a command: no reply is wanted, not even an error.
    pub const NO_REPLY: u32 = 1 << 4;
    /// In a reply: the command failed; [`Header::error`](super::Header::error) says why, and no payload follows.
    ///
    /// [`Header::error`]: super::Header::error
    pub const ERROR: u32 = 1 << 5;
}

/// Keys of the JSON text that a VERSION message ends in: `{"capabilities": {...}}`.
pub mod capability {
    /// The object that holds the others.
    pub const CAPABILITIES: &str = "capabilities";
    /// Most file descriptors that the sender takes with a message.
    pub const MAX_MSG_FDS: &str = "max_msg_fds";
    /// Longest data that the sender takes in a message, in bytes.
    pub const MAX_DATA_XFER_SIZE: &str = "max_data_xfer_size";
    /// Most DMA regions at a time.
    pub const MAX_DMA_MAPS: &str = "max_dma_maps";
    /// Page sizes of DMA regions, a bit each.
    pub const PGSIZES: &str = "pgsizes";
    /// Whether the sender takes REGION_WRITE_MULTI.
    pub const WRITE_MULTIPLE: &str = "write_multiple";
}

/// The start of VERSION and its reply. A JSON text and a NUL may follow.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
#[expect(missing_docs, reason = "names of the protocol text")]
pub struct Version {
    pub major: U16,
    pub minor: U16,
}

/// DMA_MAP. The reply has no payload.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct DmaMap {
    /// Bytes of this structure.
    pub argsz: U32,
    /// See [`dma_map`].
    pub flags: U32,
    /// Where in the file the region starts, in bytes.
    pub offset: U64,
    /// DMA address of the region.
    pub address: U64,
    /// Bytes of the region.
    pub size: U64,
}
const _: () = assert!(size_of::<DmaMap>() == 32);

/// Bits of [`DmaMap::flags`].
#[expect(missing_docs, reason = "names of the protocol text")]
pub mod dma_map {
    pub const READABLE: u32 = 1 << 0;
    pub const WRITEABLE: u32 = 1 << 1;
}

/// DMA_UNMAP and its reply.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct DmaUnmap {
    /// Most bytes that the reply's payload may have.
    pub argsz: U32,
    /// See [`dma_unmap`].
    pub flags: U32,
    /// DMA address of the region.
    pub address: U64,
    /// Bytes of the region; in the reply, bytes that were unmapped.
    pub size: U64,
}
const _: () = assert!(size_of::<DmaUnmap>() == 24);

/// Bits of [`DmaUnmap::flags`]: `VFIO_DMA_UNMAP_FLAG_*` of `linux/vfio.h`.
pub mod dma_unmap {
    /// The reply shall hold a bitmap of dirty pages.
    pub const GET_DIRTY_BITMAP: u32 = 1 << 0;
    /// Every region goes; address and size are zero.
    pub const ALL: u32 = 1 << 1;
}

/// DEVICE_GET_INFO and its reply: `struct vfio_device_info`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct DeviceInfo {
    /// Most bytes that the reply's payload may have; in the reply, what it needs.
    pub argsz: U32,
    /// See [`device_info`].
    pub flags: U32,
    /// Regions, those of no bytes included.
    pub num_regions: U32,
    /// Kinds of interrupts.
    pub num_irqs: U32,
}
const _: () = assert!(size_of::<DeviceInfo>() == 16);

/// Bits of [`DeviceInfo::flags`].
pub mod device_info {
    /// DEVICE_RESET works.
    pub const RESET: u32 = 1 << 0;
    /// A PCI device.
    pub const PCI: u32 = 1 << 1;
}

/// The regions of a PCI device (`VFIO_PCI_*_REGION_INDEX`).
#[expect(missing_docs, reason = "names of linux/vfio.h")]
pub mod pci_region {
    pub const BAR0: u32 = 0;
    pub const ROM: u32 = 6;
    pub const CONFIG: u32 = 7;
    pub const VGA: u32 = 8;
    /// How many there are.
    pub const COUNT: usize = 9;
}

/// The kinds of interrupts of a PCI device (`VFIO_PCI_*_IRQ_INDEX`).
#[expect(missing_docs, reason = "names of linux/vfio.h")]
pub mod pci_irq {
    pub const INTX: u32 = 0;
    pub const MSI: u32 = 1;
    pub const MSIX: u32 = 2;
    pub const ERR: u32 = 3;
    pub const REQ: u32 = 4;
    /// How many there are.
    pub const COUNT: usize = 5;
}

/// DEVICE_GET_REGION_INFO and its reply: `struct vfio_region_info`. In the reply capabilities may follow.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RegionInfo {
    /// Most bytes that the reply's payload may have; in the reply, what it needs.
    pub argsz: U32,
    /// See [`region_info`].
    pub flags: U32,
    /// The region.
    pub index: U32,
    /// Where the first capability is, from the start of this structure; zero for none.
    pub cap_offset: U32,
    /// Bytes of the region.
    pub size: U64,
    /// Where it starts in the file that comes with the reply.
    pub offset: U64,
}
const _: () = assert!(size_of::<RegionInfo>() == 32);

/// Bits of [`RegionInfo::flags`].
#[expect(missing_docs, reason = "names of linux/vfio.h")]
pub mod region_info {
    pub const READ: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const MMAP: u32 = 1 << 2;
    pub const CAPS: u32 = 1 << 3;
}

/// A capability of a region that says which parts of it can be mapped: `struct vfio_region_info_cap_sparse_mmap` with its
/// header. [`SparseArea`]s follow.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct SparseMmap {
    /// [`SparseMmap::ID`].
    pub id: U16,
    /// 1.
    pub version: U16,
    /// Where the next capability is, from the start of [`RegionInfo`]; zero for none.
    pub next: U32,
    /// Areas that follow.
    pub nr_areas: U32,
    /// Zero.
    pub reserved: U32,
}

impl SparseMmap {
    /// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`.
    pub const ID: u16 = 1;
}
const _: () = assert!(size_of::<SparseMmap>() == 16);

/// A part of a region that can be mapped, in bytes from the region's start.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
#[expect(missing_docs, reason = "names of linux/vfio.h")]
pub struct SparseArea {
    pub offset: U64,
    pub size: U64,
}

/// DEVICE_GET_IRQ_INFO and its reply: `struct vfio_irq_info`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct IrqInfo {
    /// Most bytes that the reply's payload may have; in the reply, what it needs.
    pub argsz: U32,
    /// See [`irq_info`].
    pub flags: U32,
    /// The kind of interrupt.
    pub index: U32,
    /// How many interrupts there are of it.
    pub count: U32,
}
const _: () = assert!(size_of::<IrqInfo>() == 16);

/// Bits of [`IrqInfo::flags`].
pub mod irq_info {
    /// It is signalled by eventfds.
    pub const EVENTFD: u32 = 1 << 0;
    /// It can be masked and unmasked.
    pub const MASKABLE: u32 = 1 << 1;
    /// It masks itself when it is signalled.
    pub const AUTOMASKED: u32 = 1 << 2;
    /// All its interrupts are set up at once.
    pub const NORESIZE: u32 = 1 << 3;
}

/// DEVICE_SET_IRQS: `struct vfio_irq_set`. With [`irq_set::DATA_BOOL`] a byte for each interrupt follows. The reply has no payload.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct IrqSet {
    /// Bytes of this structure and what follows.
    pub argsz: U32,
    /// One kind of data and one action of [`irq_set`].
    pub flags: U32,
    /// The kind of interrupt.
    pub index: U32,
    /// The first interrupt.
    pub start: U32,
    /// How many interrupts.
    pub count: U32,
}
const _: () = assert!(size_of::<IrqSet>() == 20);

/// Bits of [`IrqSet::flags`].
#[expect(missing_docs, reason = "names of linux/vfio.h")]
pub mod irq_set {
    pub const DATA_NONE: u32 = 1 << 0;
    pub const DATA_BOOL: u32 = 1 << 1;
    pub const DATA_EVENTFD: u32 = 1 << 2;
    pub const ACTION_MASK: u32 = 1 << 3;
    pub const ACTION_UNMASK: u32 = 1 << 4;
    pub const ACTION_TRIGGER: u32 = 1 << 5;
    pub const DATA_MASK: u32 = DATA_NONE | DATA_BOOL | DATA_EVENTFD;
    pub const ACTION_TYPE_MASK: u32 = ACTION_MASK | ACTION_UNMASK | ACTION_TRIGGER;
}

/// REGION_READ, REGION_WRITE and their replies. Data follows in the reply of the one and the command of the other.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RegionAccess {
    /// Bytes from the region's start.
    pub offset: U64,
    /// The region.
    pub region: U32,
    /// Bytes of data.
    pub count: U32,
}
const _: () = assert!(size_of::<RegionAccess>() == 16);

/// One write of REGION_WRITE_MULTI, after a [`U64`] that counts them. The reply is the count of those done.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RegionWriteOne {
    /// Where to.
    pub access: RegionAccess,
    /// The first [`RegionAccess::count`] bytes are written.
    pub data: [u8; 8],
}
const _: () = assert!(size_of::<RegionWriteOne>() == 24);

/// DMA_READ, DMA_WRITE and their replies. Data follows in the reply of the one and the command of the other.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct DmaAccess {
    /// DMA address.
    pub address: U64,
    /// Bytes of data.
    pub count: U64,
}
const _: () = assert!(size_of::<DmaAccess>() == 16);

#[cfg(test)]
mod tests {
    use super::*;

    /// A REGION_WRITE as QEMU posts it: 4 bytes 0x11223344 to offset 0x1000 of BAR 0.
    const POSTED_WRITE: [u8; 36] = [
        2, 0, 10, 0, 36, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, // header
        0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, // access
        0x44, 0x33, 0x22, 0x11,
    ];

    #[test]
    fn a_posted_write_has_qemus_layout() {
        let (header, rest) = Header::read_from_prefix(&POSTED_WRITE).unwrap();
        assert_eq!(header.message_id.get(), 2);
        assert_eq!(header.command.get(), command::REGION_WRITE);
        assert_eq!(header.message_size.get() as usize, POSTED_WRITE.len());
        assert_eq!(header.flags.get(), flag::COMMAND | flag::NO_REPLY);
        let (access, data) = RegionAccess::read_from_prefix(rest).unwrap();
        assert_eq!(
            (access.offset.get(), access.region.get(), access.count.get()),
            (0x1000, 0, 4)
        );
        assert_eq!(data, [0x44, 0x33, 0x22, 0x11]);
    }

    #[test]
    fn a_map_and_an_unmap_have_the_kernels_layout() {
        let map = DmaMap {
            argsz: 32.into(),
            flags: (dma_map::READABLE | dma_map::WRITEABLE).into(),
            offset: 0x1000.into(),
            address: 0x1_0000_0000.into(),
            size: 0x20_0000.into(),
        };
        let bytes = [
            32, 0, 0, 0, 3, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0x20, 0, 0, 0,
            0, 0,
        ];
        assert_eq!(map.as_bytes(), bytes);
        let all = DmaUnmap {
            argsz: 24.into(),
            flags: dma_unmap::ALL.into(),
            ..DmaUnmap::default()
        };
        let mut bytes = [0; 24];
        (bytes[0], bytes[4]) = (24, 2);
        assert_eq!(all.as_bytes(), bytes);
    }

    #[test]
    fn an_irq_set_without_descriptors_has_qemus_layout() {
        let set = IrqSet {
            argsz: 20.into(),
            flags: (irq_set::DATA_EVENTFD | irq_set::ACTION_TRIGGER).into(),
            index: pci_irq::MSIX.into(),
            start: 0.into(),
            count: 4.into(),
        };
        let bytes = [20, 0, 0, 0, 0x24, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0];
        assert_eq!(set.as_bytes(), bytes);
    }

    #[test]
    fn an_error_reply_has_both_bits() {
        let header = Header {
            message_id: 7.into(),
            command: command::REGION_READ.into(),
            message_size: 16.into(),
            flags: (flag::REPLY | flag::ERROR).into(),
            error: 1.into(),
        };
        assert_eq!(
            header.as_bytes(),
            [7, 0, 9, 0, 16, 0, 0, 0, 0x21, 0, 0, 0, 1, 0, 0, 0]
        );
    }
}
