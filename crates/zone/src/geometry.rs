//! The shape of a zoned device, checked once, and the arithmetic on it.

use crate::error::{GeometryError, ZoneError};
use crate::types::{Model, ZoneNo, ZoneRecord, ZoneType};

/// The most zones a device can have. The engine takes 64 bytes of memory a zone, and an image that claims
/// more than this is more likely forged than useful.
pub const MAX_ZONES: u32 = 1 << 24;

/// The longest zone descriptor extension, bytes: the data structures of NVMe count 64 bytes by 8 bits.
pub const MAX_EXTENSION_SIZE: u32 = 255 * 64;

/// The figures that a [`Geometry`] is made from. Sizes are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GeometrySpec {
    /// How sequential zones may be written.
    pub model: Model,
    /// Bytes of the whole device. The last zone is shorter where this is not a multiple of the zone size.
    pub size: u64,
    /// Distance from one zone's start to the next.
    pub zone_size: u64,
    /// Writable bytes of a zone, at most `zone_size`.
    pub zone_capacity: u64,
    /// The first so many zones are conventional.
    pub nr_conventional: u32,
    /// Logical block size, which is also the write granularity.
    pub block_size: u32,
    /// How many zones may be open; 0 for no limit.
    pub max_open: u32,
    /// How many zones may be open or closed; 0 for no limit.
    pub max_active: u32,
    /// The longest zone append; 0 for none.
    pub max_append: u64,
    /// What only Zoned Namespaces have.
    pub zns: Zns,
}

/// What only Zoned Namespaces have (ZNS Command Set 1.2): other protocols do not show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Zns {
    /// Zone random write areas, where the device has them.
    pub zrwa: Option<Zrwa>,
    /// Bytes of a zone descriptor extension: a multiple of 64, at most [`MAX_EXTENSION_SIZE`]; 0 for none.
    pub extension_size: u32,
}

impl Zns {
    /// A device with none of it.
    pub const NONE: Zns = Zns {
        zrwa: None,
        extension_size: 0,
    };
}

/// The zone random write areas of a device (ZNS 1.2, 5.7). Sizes are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Zrwa {
    /// How far behind a zone's write pointer blocks can be written in any order, and again.
    pub size: u64,
    /// The write pointer moves by multiples of this; `size` is one.
    pub granularity: u64,
    /// How many zones can have one at a time; 0 for no limit.
    pub count: u32,
    /// The pointer can be moved by command, not only by writes behind the area.
    pub explicit_commit: bool,
}

/// The shape of a zoned device. What it says is consistent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    spec: GeometrySpec,
    nr_zones: u32,
    /// log2 of the zone size where it is a power of two, which spares most devices a division a request.
    shift: Option<u8>,
}

impl Geometry {
    /// Checks the figures. Limits that reach the number of sequential zones can never be met and become 0 (no
    /// limit); the append limit is cut to whole blocks and to the zone capacity.
    ///
    /// # Errors
    /// The first rule that the figures break, in words for the user who chose them.
    pub fn new(mut spec: GeometrySpec) -> Result<Self, GeometryError> {
        let nr_zones = check_sizes(&spec)?;
        check_limits(&spec, nr_zones)?;
        check_zns(&spec)?;
        let sequential = nr_zones - spec.nr_conventional;
        for limit in [&mut spec.max_open, &mut spec.max_active] {
            if *limit >= sequential {
                *limit = 0;
            }
        }
        let append = spec.max_append.min(spec.zone_capacity);
        spec.max_append = append - append % u64::from(spec.block_size);
        let shift = spec
            .zone_size
            .is_power_of_two()
            .then(|| spec.zone_size.trailing_zeros() as u8);
        Ok(Self {
            spec,
            nr_zones,
            shift,
        })
    }

    /// The same device with blocks of another size: every other figure stays what it is.
    ///
    /// # Errors
    /// A figure that is no multiple of such blocks.
    pub fn with_block_size(&self, block_size: u32) -> Result<Geometry, GeometryError> {
        let other = Geometry::new(GeometrySpec {
            block_size,
            ..self.spec
        })?;
        let max_append = self.spec.max_append;
        if other.spec.max_append != max_append {
            return Err(GeometryError::AppendUnaligned {
                max_append,
                block_size,
            });
        }
        Ok(other)
    }

    /// The figures, as corrected by [`Geometry::new`].
    pub fn spec(&self) -> &GeometrySpec {
        &self.spec
    }

    /// How sequential zones may be written.
    pub fn model(&self) -> Model {
        self.spec.model
    }

    /// Bytes of the whole device.
    pub fn size(&self) -> u64 {
        self.spec.size
    }

    /// Distance from one zone's start to the next, in bytes.
    pub fn zone_size(&self) -> u64 {
        self.spec.zone_size
    }

    /// Writable bytes of a full-length sequential zone; see [`Geometry::capacity`] for a given one.
    pub fn zone_capacity(&self) -> u64 {
        self.spec.zone_capacity
    }

    /// Number of zones, at least 1.
    pub fn nr_zones(&self) -> u32 {
        self.nr_zones
    }

    /// The first so many zones are conventional; fewer than [`Geometry::nr_zones`].
    pub fn nr_conventional(&self) -> u32 {
        self.spec.nr_conventional
    }

    /// Logical block size and write granularity, in bytes.
    pub fn block_size(&self) -> u32 {
        self.spec.block_size
    }

    /// How many zones may be open; 0 for no limit.
    pub fn max_open(&self) -> u32 {
        self.spec.max_open
    }

    /// How many zones may be open or closed; 0 for no limit.
    pub fn max_active(&self) -> u32 {
        self.spec.max_active
    }

    /// Zone random write areas, where the device has them.
    pub fn zrwa(&self) -> Option<Zrwa> {
        self.spec.zns.zrwa
    }

    /// Bytes of a zone descriptor extension; 0 for none.
    pub fn extension_size(&self) -> u32 {
        self.spec.zns.extension_size
    }

    /// The longest zone append in bytes; 0 for none.
    pub fn max_append(&self) -> u64 {
        self.spec.max_append
    }

    /// The zone that holds this byte. Beyond the device it is a number at or above [`Geometry::nr_zones`].
    pub fn zone_of(&self, offset: u64) -> ZoneNo {
        let zone = match self.shift {
            Some(shift) => offset >> shift,
            None => offset / self.spec.zone_size,
        };
        ZoneNo(u32::try_from(zone).unwrap_or(u32::MAX))
    }

    /// The zone that starts exactly here.
    ///
    /// # Errors
    /// `OutOfRange` beyond the device, `NotZoneStart` inside a zone.
    pub fn zone_at(&self, offset: u64) -> Result<ZoneNo, ZoneError> {
        if offset >= self.spec.size {
            return Err(ZoneError::OutOfRange {
                offset,
                len: 0,
                size: self.spec.size,
            });
        }
        let zone = self.zone_of(offset);
        if self.start(zone) == offset {
            Ok(zone)
        } else {
            Err(ZoneError::NotZoneStart { offset })
        }
    }

    /// The zone's first byte.
    pub fn start(&self, zone: ZoneNo) -> u64 {
        u64::from(zone.0) * self.spec.zone_size
    }

    /// The byte after the zone's last.
    pub fn end(&self, zone: ZoneNo) -> u64 {
        self.start(zone)
            .saturating_add(self.spec.zone_size)
            .min(self.spec.size)
    }

    /// The zone's length in bytes; the last one may be short.
    pub fn len(&self, zone: ZoneNo) -> u64 {
        self.end(zone) - self.start(zone)
    }

    /// The zone's writable bytes. A conventional zone can be written whole.
    pub fn capacity(&self, zone: ZoneNo) -> u64 {
        if self.is_conventional(zone) {
            self.len(zone)
        } else {
            self.spec.zone_capacity.min(self.len(zone))
        }
    }

    /// The end of the bytes that can hold data in a sequential zone with that record; above it zeros are read. Absolute.
    pub fn data_end(&self, zone: ZoneNo, record: &ZoneRecord) -> u64 {
        self.start(zone) + self.data_len(zone, record.written, record.zrwa)
    }

    /// The same from the zone's start, for a written end, which is a write pointer where the zone has a random write area.
    pub(crate) fn data_len(&self, zone: ZoneNo, written: u64, zrwa: bool) -> u64 {
        match self.spec.zns.zrwa.filter(|_| zrwa) {
            Some(area) => (written + area.size).min(self.capacity(zone)),
            None => written,
        }
    }

    /// Whether the zone is conventional.
    pub fn is_conventional(&self, zone: ZoneNo) -> bool {
        zone.0 < self.spec.nr_conventional
    }

    /// The zone's type.
    pub fn zone_type(&self, zone: ZoneNo) -> ZoneType {
        if self.is_conventional(zone) {
            return ZoneType::Conventional;
        }
        match self.spec.model {
            Model::HostAware => ZoneType::SequentialPreferred,
            Model::HostManaged => ZoneType::SequentialRequired,
        }
    }

    /// All zones, in order.
    pub fn zones(&self) -> impl ExactSizeIterator<Item = ZoneNo> + use<> {
        (0..self.nr_zones).map(ZoneNo)
    }

    /// The end of a range that lies on the device.
    pub(crate) fn range(&self, offset: u64, len: u64) -> Result<u64, ZoneError> {
        let size = self.spec.size;
        match offset.checked_add(len) {
            Some(end) if end <= size && offset < size => Ok(end),
            _ => Err(ZoneError::OutOfRange { offset, len, size }),
        }
    }
}

/// Checks everything but the limits and counts the zones.
fn check_sizes(spec: &GeometrySpec) -> Result<u32, GeometryError> {
    let &GeometrySpec {
        size,
        zone_size,
        zone_capacity: capacity,
        block_size,
        ..
    } = spec;
    if !block_size.is_power_of_two() || !(512..=65536).contains(&block_size) {
        return Err(GeometryError::BlockSize(block_size));
    }
    let block = u64::from(block_size);
    if size == 0 {
        return Err(GeometryError::SizeZero);
    }
    if !size.is_multiple_of(block) {
        return Err(GeometryError::SizeUnaligned { size, block_size });
    }
    if zone_size == 0 {
        return Err(GeometryError::ZoneSizeZero);
    }
    if !zone_size.is_multiple_of(512) {
        return Err(GeometryError::ZoneSizeSectors(zone_size));
    }
    if !zone_size.is_multiple_of(block) {
        return Err(GeometryError::ZoneSizeUnaligned {
            zone_size,
            block_size,
        });
    }
    if zone_size > size {
        return Err(GeometryError::ZoneSizeTooBig { zone_size, size });
    }
    if capacity == 0 {
        return Err(GeometryError::CapacityZero);
    }
    if capacity > zone_size {
        return Err(GeometryError::CapacityTooBig { capacity, zone_size });
    }
    if !capacity.is_multiple_of(block) {
        return Err(GeometryError::CapacityUnaligned { capacity, block_size });
    }
    let zones = size.div_ceil(zone_size);
    match u32::try_from(zones) {
        Ok(zones) if zones <= MAX_ZONES => Ok(zones),
        _ => Err(GeometryError::TooManyZones {
            zones,
            max: MAX_ZONES,
            zone_size,
        }),
    }
}

fn check_limits(spec: &GeometrySpec, zones: u32) -> Result<(), GeometryError> {
    let &GeometrySpec {
        nr_conventional: conventional,
        max_open,
        max_active,
        max_append,
        block_size,
        ..
    } = spec;
    if conventional >= zones {
        return Err(GeometryError::TooManyConventional { conventional, zones });
    }
    if max_active != 0 && max_open > max_active {
        return Err(GeometryError::OpenAboveActive { max_open, max_active });
    }
    if max_append != 0 && max_append < u64::from(block_size) {
        return Err(GeometryError::AppendTooSmall {
            max_append,
            block_size,
        });
    }
    Ok(())
}

fn check_zns(spec: &GeometrySpec) -> Result<(), GeometryError> {
    let &GeometrySpec { zns, block_size, .. } = spec;
    if zns != Zns::NONE && spec.model == Model::HostAware {
        return Err(GeometryError::ZnsHostAware);
    }
    if !zns.extension_size.is_multiple_of(64) || zns.extension_size > MAX_EXTENSION_SIZE {
        return Err(GeometryError::ExtensionSize(zns.extension_size));
    }
    let Some(Zrwa {
        size,
        granularity,
        count,
        ..
    }) = zns.zrwa
    else {
        return Ok(());
    };
    let block = u64::from(block_size);
    if granularity == 0 || !granularity.is_multiple_of(block) {
        return Err(GeometryError::ZrwaGranularity {
            granularity,
            block_size,
        });
    }
    if size == 0 {
        return Err(GeometryError::ZrwaSizeZero);
    }
    if !size.is_multiple_of(granularity) {
        return Err(GeometryError::ZrwaSize { size, granularity });
    }
    // Blocks are counted by 16 bits in the data structures of NVMe.
    let max = block * u64::from(u16::MAX);
    if size > max {
        return Err(GeometryError::ZrwaTooLarge { size, max });
    }
    if spec.max_active != 0 && count > spec.max_active {
        return Err(GeometryError::ZrwaAboveActive {
            count,
            max_active: spec.max_active,
        });
    }
    Ok(())
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
