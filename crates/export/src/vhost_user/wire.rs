//! Numbers and layouts of the vhost-user protocol (QEMU, docs/interop/vhost-user.rst).
//!
//! Integers are in the machine's byte order: both ends are on one machine.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What every message starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// One of [`code`].
    pub code: u32,
    /// Version, [`FLAG_REPLY`], [`FLAG_NEED_REPLY`].
    pub flags: u32,
    /// Bytes of the payload that follows.
    pub size: u32,
}

/// Bytes of [`Header`].
pub const HEADER_SIZE: usize = size_of::<Header>();

/// The bits of [`Header::flags`] that hold the version.
pub const VERSION_MASK: u32 = 3;
/// The only version there is.
pub const VERSION: u32 = 1;
/// The message is a reply.
pub const FLAG_REPLY: u32 = 1 << 2;
/// The sender wants an acknowledgement ([`protocol_feature::REPLY_ACK`]).
pub const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Longest payload that is read. The longest valid one, a memory table, has 264 bytes.
pub const MAX_PAYLOAD: usize = 4096;
/// Regions in a memory table, and file descriptors with one message.
pub const MAX_TABLE_REGIONS: usize = 8;
/// Bytes of configuration space that the protocol can address.
pub const MAX_CONFIG: u32 = 256;

/// The virtio feature bit (30) that says that protocol features exist.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// Requests of the front-end.
#[expect(missing_docs, reason = "names of the protocol text")]
pub mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// Protocol feature bits.
#[expect(missing_docs, reason = "names of the protocol text")]
pub mod protocol_feature {
    pub const MQ: u64 = 1 << 0;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const CONFIG: u64 = 1 << 9;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

/// Payload of the messages with a queue index and a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringState {
    /// Queue.
    pub index: u32,
    /// Size, base or flag.
    pub num: u32,
}

/// Payload of SET_VRING_ADDR: where the parts of a ring are, in the front-end's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringAddr {
    /// Queue.
    pub index: u32,
    /// Bit 0 asks for dirty logging, which is not offered.
    pub flags: u32,
    /// Descriptor table.
    pub descriptor: u64,
    /// Used ring.
    pub used: u64,
    /// Avail ring.
    pub available: u64,
    /// Guest address for dirty logging.
    pub log: u64,
}

/// One region of the front-end's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MemoryRegion {
    /// Address in descriptors.
    pub guest_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Address in the front-end's address space.
    pub user_addr: u64,
    /// Where the region starts in its file descriptor.
    pub mmap_offset: u64,
}

/// What precedes the regions of SET_MEM_TABLE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MemoryTableHeader {
    /// Regions that follow, each with a file descriptor.
    pub regions: u32,
    /// Zero.
    pub padding: u32,
}

/// Payload of ADD_MEM_REG and REM_MEM_REG.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SingleRegion {
    /// Zero.
    pub padding: u64,
    /// The region.
    pub region: MemoryRegion,
}

/// What precedes the bytes of GET_CONFIG and SET_CONFIG.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConfigHeader {
    /// First byte of configuration space.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
    /// Whether a migration writes it.
    pub flags: u32,
}

/// In the payload of SET_VRING_KICK, CALL and ERR: the bits with the queue index.
pub const VRING_INDEX_MASK: u64 = 0xff;
/// In the same: no file descriptor comes along.
pub const VRING_NOFD: u64 = 1 << 8;

const _: () = {
    assert!(HEADER_SIZE == 12);
    assert!(size_of::<VringState>() == 8);
    assert!(size_of::<VringAddr>() == 40);
    assert!(size_of::<MemoryRegion>() == 32);
    assert!(size_of::<MemoryTableHeader>() == 8);
    assert!(size_of::<SingleRegion>() == 40);
    assert!(size_of::<ConfigHeader>() == 12);
};
