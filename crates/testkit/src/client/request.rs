//! virtio-blk requests and what comes back (virtio 1.3, 5.2.6).

use std::fmt;

use virtio_bindings::virtio_blk as vb;

/// Request types. Numbers from the kernel's header, not from zbdkit's own.
#[expect(missing_docs, reason = "names of the standard")]
pub mod op {
    use virtio_bindings::virtio_blk as vb;

    pub const READ: u32 = vb::VIRTIO_BLK_T_IN;
    pub const WRITE: u32 = vb::VIRTIO_BLK_T_OUT;
    pub const FLUSH: u32 = vb::VIRTIO_BLK_T_FLUSH;
    pub const GET_ID: u32 = vb::VIRTIO_BLK_T_GET_ID;
    pub const DISCARD: u32 = vb::VIRTIO_BLK_T_DISCARD;
    pub const WRITE_ZEROES: u32 = vb::VIRTIO_BLK_T_WRITE_ZEROES;
    pub const SECURE_ERASE: u32 = vb::VIRTIO_BLK_T_SECURE_ERASE;
    pub const ZONE_APPEND: u32 = vb::VIRTIO_BLK_T_ZONE_APPEND;
    pub const ZONE_REPORT: u32 = vb::VIRTIO_BLK_T_ZONE_REPORT;
    pub const ZONE_OPEN: u32 = vb::VIRTIO_BLK_T_ZONE_OPEN;
    pub const ZONE_CLOSE: u32 = vb::VIRTIO_BLK_T_ZONE_CLOSE;
    pub const ZONE_FINISH: u32 = vb::VIRTIO_BLK_T_ZONE_FINISH;
    pub const ZONE_RESET: u32 = vb::VIRTIO_BLK_T_ZONE_RESET;
    pub const ZONE_RESET_ALL: u32 = vb::VIRTIO_BLK_T_ZONE_RESET_ALL;
}

/// The status byte of a request.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(pub u8);

#[expect(missing_docs, reason = "names of the standard")]
impl Status {
    pub const OK: Status = Status(vb::VIRTIO_BLK_S_OK as u8);
    pub const IOERR: Status = Status(vb::VIRTIO_BLK_S_IOERR as u8);
    pub const UNSUPP: Status = Status(vb::VIRTIO_BLK_S_UNSUPP as u8);
    pub const ZONE_INVALID_CMD: Status = Status(vb::VIRTIO_BLK_S_ZONE_INVALID_CMD as u8);
    pub const ZONE_UNALIGNED_WP: Status = Status(vb::VIRTIO_BLK_S_ZONE_UNALIGNED_WP as u8);
    pub const ZONE_OPEN_RESOURCE: Status = Status(vb::VIRTIO_BLK_S_ZONE_OPEN_RESOURCE as u8);
    pub const ZONE_ACTIVE_RESOURCE: Status = Status(vb::VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE as u8);
    /// What the client puts there before it submits: the device did not write the byte.
    pub const UNTOUCHED: Status = Status(0xff);
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Status::OK => "OK",
            Status::IOERR => "IOERR",
            Status::UNSUPP => "UNSUPP",
            Status::ZONE_INVALID_CMD => "ZONE_INVALID_CMD",
            Status::ZONE_UNALIGNED_WP => "ZONE_UNALIGNED_WP",
            Status::ZONE_OPEN_RESOURCE => "ZONE_OPEN_RESOURCE",
            Status::ZONE_ACTIVE_RESOURCE => "ZONE_ACTIVE_RESOURCE",
            Status::UNTOUCHED => "UNTOUCHED",
            Status(other) => return write!(f, "Status({other})"),
        };
        f.write_str(name)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A range of a discard or write zeroes request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRange {
    /// First sector.
    pub sector: u64,
    /// Sectors.
    pub sectors: u32,
    /// Flags word: bit 0 is unmap, for write zeroes.
    pub flags: u32,
}

/// A request. Sectors are of 512 bytes, lengths in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Read `len` bytes.
    Read {
        /// First sector.
        sector: u64,
        /// Bytes.
        len: u32,
    },
    /// Write.
    Write {
        /// First sector.
        sector: u64,
        /// What to write.
        data: Vec<u8>,
    },
    /// Flush.
    Flush,
    /// Discard.
    Discard(Vec<BlockRange>),
    /// Write zeroes.
    WriteZeroes(Vec<BlockRange>),
    /// Get the 20-byte id string.
    GetId,
    /// Append to the zone that starts at `sector`.
    ZoneAppend {
        /// First sector of the zone.
        sector: u64,
        /// What to append.
        data: Vec<u8>,
    },
    /// Report zones from the one that holds `sector`, into a buffer of `len` bytes.
    ZoneReport {
        /// A sector of the first zone.
        sector: u64,
        /// Bytes of the report buffer.
        len: u32,
    },
    /// Open a zone explicitly.
    ZoneOpen(u64),
    /// Close a zone.
    ZoneClose(u64),
    /// Finish a zone.
    ZoneFinish(u64),
    /// Reset a zone.
    ZoneReset(u64),
    /// Reset all zones.
    ZoneResetAll,
    /// Anything else, also what no standard knows.
    Other {
        /// Request type.
        op: u32,
        /// Sector field.
        sector: u64,
        /// Bytes for the device.
        out: Vec<u8>,
        /// Bytes from the device.
        in_len: u32,
    },
}

impl Request {
    /// Type, sector, bytes for the device and number of bytes from it.
    pub(super) fn parts(&self) -> (u32, u64, std::borrow::Cow<'_, [u8]>, u32) {
        use std::borrow::Cow::{Borrowed, Owned};
        let none = Borrowed(&[][..]);
        match self {
            Request::Read { sector, len } => (op::READ, *sector, none, *len),
            Request::Write { sector, data } => (op::WRITE, *sector, Borrowed(data), 0),
            Request::Flush => (op::FLUSH, 0, none, 0),
            Request::Discard(ranges) => (op::DISCARD, 0, Owned(range_bytes(ranges)), 0),
            Request::WriteZeroes(ranges) => (op::WRITE_ZEROES, 0, Owned(range_bytes(ranges)), 0),
            Request::GetId => (op::GET_ID, 0, none, vb::VIRTIO_BLK_ID_BYTES),
            Request::ZoneAppend { sector, data } => (op::ZONE_APPEND, *sector, Borrowed(data), 0),
            Request::ZoneReport { sector, len } => (op::ZONE_REPORT, *sector, none, *len),
            Request::ZoneOpen(sector) => (op::ZONE_OPEN, *sector, none, 0),
            Request::ZoneClose(sector) => (op::ZONE_CLOSE, *sector, none, 0),
            Request::ZoneFinish(sector) => (op::ZONE_FINISH, *sector, none, 0),
            Request::ZoneReset(sector) => (op::ZONE_RESET, *sector, none, 0),
            Request::ZoneResetAll => (op::ZONE_RESET_ALL, 0, none, 0),
            Request::Other {
                op,
                sector,
                out,
                in_len,
            } => (*op, *sector, Borrowed(out), *in_len),
        }
    }
}

fn range_bytes(ranges: &[BlockRange]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(ranges.len() * 16);
    for range in ranges {
        bytes.extend(range.sector.to_le_bytes());
        bytes.extend(range.sectors.to_le_bytes());
        bytes.extend(range.flags.to_le_bytes());
    }
    bytes
}

/// How a request is cut into descriptors. A device must not care (virtio 1.3, 2.7.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Framing {
    /// Cut header, data and status into descriptors of at most so many bytes.
    pub chunk: Option<u32>,
    /// Put header and outgoing data into one descriptor.
    pub merge_header: bool,
    /// Use an indirect table, if that was negotiated.
    pub indirect: bool,
    /// Padding between append sector and status byte: Linux has 7 bytes there, the standard none.
    pub append_pad: u8,
}

impl Framing {
    /// The descriptors that Linux makes: header, data, in-header, in an indirect table.
    pub const LINUX: Framing = Framing {
        chunk: None,
        merge_header: false,
        indirect: true,
        append_pad: MAX_APPEND_PAD,
    };
}

/// Most that [`Framing::append_pad`] can be.
pub(super) const MAX_APPEND_PAD: u8 = 7;

/// Names a request in flight. Counts up, never used twice on a queue.
pub type Ticket = u64;

/// A completed request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// Which request.
    pub ticket: Ticket,
    /// Its status byte; [`Status::UNTOUCHED`] if the device did not write one.
    pub status: Status,
    /// Bytes that the device says it wrote, where the engine shows that.
    pub used_len: Option<u32>,
    /// Where an append went. Set by a device also when it fails, so look at `status` first.
    pub append_sector: u64,
    /// Incoming data, as long as asked for, whatever the status.
    pub data: Vec<u8>,
}
