//! The vocabulary: zone numbers, types, conditions, and what is reported and what persists of a zone.

use std::fmt;

/// The number of a zone, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ZoneNo(pub u32);

impl fmt::Display for ZoneNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What the host must know about writing the device's sequential zones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Model {
    /// Sequential zones are written best, but not only, at their write pointer.
    HostAware,
    /// Sequential zones can be written only at their write pointer.
    HostManaged,
}

/// The type of a zone, numbered as in ZBC, Linux and virtio-blk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ZoneType {
    /// Random writes, no write pointer.
    Conventional = 1,
    /// Writes at the write pointer only.
    SequentialRequired = 2,
    /// Writes anywhere; the write pointer is the highest end written.
    SequentialPreferred = 3,
}

/// The condition of a zone, numbered as in ZBC, Linux and virtio-blk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Condition {
    /// A conventional zone, which has no write pointer.
    NotWritePointer = 0,
    /// Nothing is written.
    Empty = 1,
    /// Opened by a write; the device may close it when it needs the resource.
    ImplicitlyOpen = 2,
    /// Opened by command; stays open until closed, full, finished or reset.
    ExplicitlyOpen = 3,
    /// Partly written and not open, but still active.
    Closed = 4,
    /// Takes no writes; what was written can be read.
    ReadOnly = 0xD,
    /// Written to its capacity, or finished.
    Full = 0xE,
    /// Neither read nor written.
    Offline = 0xF,
}

impl Condition {
    /// Whether the zone holds one of the device's open resources.
    pub fn is_open(self) -> bool {
        matches!(self, Self::ImplicitlyOpen | Self::ExplicitlyOpen)
    }

    /// Whether the zone holds one of the device's active resources.
    pub fn is_active(self) -> bool {
        self.is_open() || self == Self::Closed
    }

    /// The condition that was stored as a byte by this crate.
    pub(crate) fn of_bits(bits: u8) -> Self {
        match bits {
            0 => Self::NotWritePointer,
            1 => Self::Empty,
            2 => Self::ImplicitlyOpen,
            3 => Self::ExplicitlyOpen,
            4 => Self::Closed,
            0xD => Self::ReadOnly,
            0xE => Self::Full,
            _ => Self::Offline,
        }
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::NotWritePointer => "not write pointer",
            Self::Empty => "empty",
            Self::ImplicitlyOpen => "implicitly open",
            Self::ExplicitlyOpen => "explicitly open",
            Self::Closed => "closed",
            Self::ReadOnly => "read-only",
            Self::Full => "full",
            Self::Offline => "offline",
        })
    }
}

/// What happened to a zone over its life. The counters stop at their maximum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Counters {
    /// Resets that were committed.
    pub resets: u32,
    /// Finishes that were committed.
    pub finishes: u32,
    /// Bytes written successfully, overwrites included.
    pub bytes_written: u64,
}

/// What a report shows of a zone. All positions are absolute bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZoneInfo {
    /// Its number.
    pub zone: ZoneNo,
    /// Its first byte.
    pub start: u64,
    /// Its length; the device's last zone may be shorter than the others.
    pub len: u64,
    /// Its writable bytes, at most `len`.
    pub capacity: u64,
    /// The write pointer: `start` for a conventional zone, `start + capacity` when full, else `written_end`.
    pub wp: u64,
    /// The end of the bytes that can hold data; zeros are read above it. Below `wp` after a finish, above it in a zone with
    /// a random write area, whose end it is. `start` for a conventional zone.
    pub written_end: u64,
    /// Its type.
    pub kind: ZoneType,
    /// Its condition.
    pub condition: Condition,
    /// Its counters.
    pub counters: Counters,
    /// What Zoned Namespaces tell of it besides.
    pub attributes: Attributes,
}

/// The attributes of a zone (ZNS 1.2, Zone Descriptor, ZA).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Attributes {
    /// The device made the zone full by itself (ZFC).
    pub finished_by_device: bool,
    /// What the device would have the host do (FZR, RZR).
    pub recommended: Option<Recommendation>,
    /// The zone has a zone random write area (ZRWAV).
    pub zrwa: bool,
    /// The zone has a descriptor extension (ZDEV).
    pub extension: bool,
}

/// What a device would have the host do with a zone, soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Recommendation {
    /// Finish it, or the device will.
    Finish,
    /// Reset it.
    Reset,
}

/// What persists of a zone. The default is an empty zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ZoneRecord {
    /// The written end, in bytes from the zone's start; 0 for a conventional zone. In a zone with a random write area this is
    /// the write pointer, behind which the area begins ([`Geometry::data_end`](crate::Geometry::data_end) has its end).
    pub written: u64,
    /// The zone was finished: it is full whatever `written` says.
    pub finished: bool,
    /// The operator made it read-only.
    pub read_only: bool,
    /// The operator took it offline. Stronger than `read_only`, which is forgotten where both are set.
    pub offline: bool,
    /// It has a random write area. Never a zone that is full.
    pub zrwa: bool,
    /// The checksum of its descriptor extension, where it has one; which checksum is up to whoever keeps the bytes.
    pub extension: Option<u32>,
    /// The device finished it by itself.
    pub finished_by_device: bool,
    /// What the device would have the host do.
    pub recommended: Option<Recommendation>,
    /// Its counters.
    pub counters: Counters,
}

impl ZoneRecord {
    /// Moves the written end of a sequential zone. At the capacity the zone becomes full: it has no random write area any
    /// more, and nothing is to be finished.
    pub fn write_to(&mut self, written: u64, capacity: u64) {
        self.written = written;
        if written >= capacity {
            self.zrwa = false;
            self.recommended = self.recommended.filter(|what| *what != Recommendation::Finish);
        }
    }

    /// The condition of a zone with this record when nobody has it open.
    pub(crate) fn condition(&self, kind: ZoneType, capacity: u64) -> Condition {
        if self.offline {
            Condition::Offline
        } else if self.read_only {
            Condition::ReadOnly
        } else if kind == ZoneType::Conventional {
            Condition::NotWritePointer
        } else if self.finished || self.written >= capacity {
            Condition::Full
        } else if self.written == 0 && !self.zrwa && self.extension.is_none() {
            Condition::Empty
        } else {
            Condition::Closed
        }
    }
}

/// Which zones a report shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// Every zone.
    All,
    /// Only zones in this condition; `NotWritePointer` for the conventional ones.
    Only(Condition),
}

#[expect(
    non_upper_case_globals,
    reason = "one name a condition, as the protocols list their report options"
)]
impl Filter {
    /// Only empty zones.
    pub const Empty: Self = Self::Only(Condition::Empty);
    /// Only implicitly open zones.
    pub const ImplicitlyOpen: Self = Self::Only(Condition::ImplicitlyOpen);
    /// Only explicitly open zones.
    pub const ExplicitlyOpen: Self = Self::Only(Condition::ExplicitlyOpen);
    /// Only closed zones.
    pub const Closed: Self = Self::Only(Condition::Closed);
    /// Only full zones.
    pub const Full: Self = Self::Only(Condition::Full);
    /// Only read-only zones.
    pub const ReadOnly: Self = Self::Only(Condition::ReadOnly);
    /// Only offline zones.
    pub const Offline: Self = Self::Only(Condition::Offline);
    /// Only zones without a write pointer.
    pub const NotWritePointer: Self = Self::Only(Condition::NotWritePointer);

    /// Whether a zone in this condition is shown.
    pub fn matches(self, condition: Condition) -> bool {
        match self {
            Self::All => true,
            Self::Only(wanted) => wanted == condition,
        }
    }
}

/// What becomes of an open zone that is closed before anything was written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseEmpty {
    /// Empty, as virtio-blk, ZBC and ZAC have it.
    ToEmpty,
    /// Closed, as ZNS has it.
    ToClosed,
}

/// An operation that has the zone for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExclusiveOp {
    /// The zone becomes empty.
    Reset,
    /// The zone becomes empty, or offline if it is read-only or offline, and holds nothing (ZNS 1.2, 2.1.1.3). Also an empty
    /// one is held until then, so that no request is anywhere while the block size changes ([`crate::Engine::set_format`]).
    Format,
    /// The zone becomes full without being written further. An empty one needs resources to be available, as if it were
    /// opened, as virtio-blk, ZBC and ZAC have it.
    Finish,
    /// The same, whatever resources are available, as ZNS has it.
    FinishUnlimited,
    /// The same, by the device itself, which the zone's attributes say until it is reset (ZNS 1.2, 5.6: an excursion).
    FinishByDevice,
    /// The zone is opened explicitly and gets a random write area, which it has until it is full, finished or reset. One that
    /// has an area is opened and keeps it.
    OpenZrwa,
    /// The empty zone gets a descriptor extension and is closed (ZNS 1.2, 5.3). Only a reset takes it away.
    SetExtension {
        /// See [`ZoneRecord::extension`].
        checksum: u32,
        /// The zone gets a random write area as well, as by [`ExclusiveOp::OpenZrwa`]; both or neither.
        zrwa: bool,
    },
    /// The device would have the host do this. A recommendation to finish goes when the zone is full, any with a reset.
    Recommend(Option<Recommendation>),
    /// The operator makes the zone read-only.
    SetReadOnly,
    /// The operator takes the zone offline.
    SetOffline,
    /// The operator undoes either; the zone is as it was, closed if it was open.
    SetNormal,
}

impl ExclusiveOp {
    /// Whether it makes the zone full.
    pub fn is_finish(self) -> bool {
        matches!(self, Self::Finish | Self::FinishUnlimited | Self::FinishByDevice)
    }

    /// Whether the zone gets a random write area by it: what its child holds above the pointer must read as zeros before
    /// that is recorded.
    pub fn allocates(self) -> bool {
        matches!(self, Self::OpenZrwa | Self::SetExtension { zrwa: true, .. })
    }
}
