//! What the device shows of itself: features and configuration space (virtio 1.3, 5.2.3 to 5.2.5).

use std::sync::atomic::{AtomicBool, Ordering};

use zbdkit_block::Limits;
use zbdkit_spec::virtio_blk::{
    Config, ID_BYTES, SECTOR_SIZE, Topology, ZonedCharacteristics, feature as f, zone_model,
};
use zbdkit_zone::{Geometry, Model as ZoneModel};
use zerocopy::IntoBytes;

use crate::vhost_user::backend::{ConfigReadOnly, FeatureError};

/// Most ranges in a discard or write zeroes request.
pub(super) const MAX_RANGES: usize = 32;
/// Longest such range in sectors: 1 GiB.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// The least bytes that a driver puts into a segment when it splits data: a page.
const SEGMENT: u64 = 4096;

/// A device that virtio-blk cannot carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unsuitable {
    /// Linux wants powers of two.
    #[error(
        "virtio-blk cannot carry zones of {0} bytes: the zone size must be a power of two (Linux refuses others)"
    )]
    ZoneSizeNotPowerOfTwo(u64),
    /// The field has 32 bits.
    #[error(
        "virtio-blk cannot carry zones of {0} bytes: it counts 512-byte sectors in 32 bits, so less than 2 TiB"
    )]
    ZoneSizeTooBig(u64),
    /// Linux before 7.3 writes single blocks to zones all the same.
    #[error(
        "virtio-blk cannot carry a write granularity of {granularity} bytes above the block size of {block_size}: drivers write \
         single blocks to sequential zones"
    )]
    WriteGranularity {
        /// What writes to sequential zones are multiples of, bytes.
        granularity: u32,
        /// The logical block size, bytes.
        block_size: u32,
    },
    /// Requests count sectors.
    #[error(
        "virtio-blk cannot carry blocks of {0} bytes: the block size must be a power of two of at least 512"
    )]
    BlockSize(u32),
    /// Capacity counts sectors.
    #[error("virtio-blk cannot carry a device of {0} bytes: the size must be a multiple of 512")]
    Size(u64),
}

/// The fixed properties of a device behind this door.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) size: u64,
    pub(super) block_size: u32,
    pub(super) read_only: bool,
    pub(super) zones: Option<Zones>,
    pub(super) serial: [u8; ID_BYTES],
    queues: u16,
    seg_max: u32,
    direct_align: u32,
    write_back: AtomicBool,
    /// The driver asked for write-through.
    write_through_asked: AtomicBool,
}

/// What requests need to know of the zones.
#[derive(Debug, Clone)]
pub(super) struct Zones {
    pub(super) model: ZoneModel,
    /// Zone size as a power of two of bytes.
    pub(super) shift: u32,
    /// First byte of the sequential zones.
    pub(super) sequential: u64,
    /// Longest append in bytes, 0 where there is none.
    pub(super) max_append: u64,
    max_open: u32,
    max_active: u32,
}

impl Model {
    pub(super) fn new(
        limits: &Limits,
        queues: u16,
        queue_size: u16,
        serial: &str,
    ) -> Result<Model, Unsuitable> {
        let block_size = limits.block_size;
        if !block_size.is_power_of_two() || block_size < SECTOR_SIZE as u32 {
            return Err(Unsuitable::BlockSize(block_size));
        }
        if !limits.size.is_multiple_of(SECTOR_SIZE) {
            return Err(Unsuitable::Size(limits.size));
        }
        if limits.zoned.is_some() && limits.write_granularity > block_size {
            return Err(Unsuitable::WriteGranularity {
                granularity: limits.write_granularity,
                block_size,
            });
        }
        // Header and status take a descriptor each.
        let seg_max = u32::from(queue_size).saturating_sub(2).max(1);
        let zones = limits
            .zoned
            .as_ref()
            .map(|geometry| Zones::new(geometry, block_size, seg_max))
            .transpose()?;
        let mut id = [0; ID_BYTES];
        let len = serial.len().min(ID_BYTES);
        id[..len].copy_from_slice(&serial.as_bytes()[..len]);
        Ok(Model {
            size: limits.size,
            block_size,
            read_only: limits.read_only,
            zones,
            serial: id,
            queues,
            seg_max,
            direct_align: limits.direct_align,
            write_back: AtomicBool::new(true),
            write_through_asked: AtomicBool::new(false),
        })
    }

    pub(super) fn is_host_managed(&self) -> bool {
        matches!(&self.zones, Some(zones) if zones.model == ZoneModel::HostManaged)
    }

    /// Feature bits on offer.
    pub(super) fn features(&self) -> u64 {
        let mut bits = vec![
            f::SEG_MAX,
            f::BLK_SIZE,
            f::FLUSH,
            f::TOPOLOGY,
            f::CONFIG_WCE,
            f::MQ,
            f::RING_INDIRECT_DESC,
            f::RING_EVENT_IDX,
            f::VERSION_1,
        ];
        if self.zones.is_some() {
            bits.push(f::ZONED);
        }
        if self.read_only {
            bits.push(f::RO);
        } else if !self.is_host_managed() {
            // On a host-managed device these would go past the write pointers.
            bits.extend([f::DISCARD, f::WRITE_ZEROES]);
        }
        bits.into_iter().fold(0, |features, bit| features | 1 << bit)
    }

    /// Whether the device can work with what the driver took.
    pub(super) fn check_features(&self, features: u64) -> Result<(), FeatureError> {
        let unknown = features & !self.features();
        if unknown != 0 {
            return Err(FeatureError::NotOffered(unknown));
        }
        if !has(features, f::VERSION_1) {
            return Err(FeatureError::Legacy);
        }
        if self.is_host_managed() && !has(features, f::ZONED) {
            return Err(FeatureError::NotZoned);
        }
        Ok(())
    }

    /// The cache mode when a front-end connects.
    pub(super) fn reset_cache_mode(&self) {
        self.write_back.store(true, Ordering::Relaxed);
        self.write_through_asked.store(false, Ordering::Relaxed);
    }

    /// The cache mode once the driver took `features`: one that cannot flush relies on write-through (5.2.5.2).
    ///
    /// What a driver asked for by itself stays, since a virtual machine that is stopped and continued looks just
    /// like one that is reset, and the standard leaves open which mode a reset results in.
    pub(super) fn set_cache_mode(&self, features: u64) {
        let write_back = has(features, f::FLUSH) && !self.write_through_asked.load(Ordering::Relaxed);
        self.write_back.store(write_back, Ordering::Relaxed);
    }

    /// Whether a write is only answered when it is durable.
    pub(super) fn write_through(&self) -> bool {
        !self.write_back.load(Ordering::Relaxed)
    }

    /// The configuration space for a driver that took `features`, or before any did.
    fn config(&self, features: Option<u64>) -> Config {
        let block_size = self.block_size;
        let mut config = Config {
            capacity: (self.size / SECTOR_SIZE).into(),
            seg_max: self.seg_max.into(),
            blk_size: block_size.into(),
            topology: Topology {
                min_io_size: 1.into(),
                ..Topology::default()
            },
            writeback: self.write_back.load(Ordering::Relaxed).into(),
            num_queues: self.queues.into(),
            ..Config::default()
        };
        if self.zones.is_none() && self.direct_align > block_size && self.direct_align.is_power_of_two() {
            config.topology.physical_block_exp = (self.direct_align / block_size).ilog2() as u8;
        }
        if has(self.features(), f::DISCARD) {
            config.max_discard_sectors = MAX_RANGE_SECTORS.into();
            config.max_discard_seg = (MAX_RANGES as u32).into();
            config.discard_sector_alignment = (block_size / SECTOR_SIZE as u32).into();
            config.max_write_zeroes_sectors = MAX_RANGE_SECTORS.into();
            config.max_write_zeroes_seg = (MAX_RANGES as u32).into();
            config.write_zeroes_may_unmap = 1;
        }
        if let Some(zones) = &self.zones
            && features.is_none_or(|features| has(features, f::ZONED))
        {
            config.zoned = zones.characteristics(block_size);
        }
        config
    }

    /// Fills `out` from `offset` of the configuration space, zeros beyond it.
    pub(super) fn read_config(&self, features: Option<u64>, offset: usize, out: &mut [u8]) {
        let config = self.config(features);
        let bytes = config.as_bytes().get(offset..).unwrap_or_default();
        let len = bytes.len().min(out.len());
        out[..len].copy_from_slice(&bytes[..len]);
        out[len..].fill(0);
    }

    /// Takes a write. Some front-ends write the whole space back, so all other bytes may be there, unchanged.
    pub(super) fn write_config(
        &self,
        features: Option<u64>,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), ConfigReadOnly> {
        let mut now = vec![0; bytes.len()];
        self.read_config(features, offset, &mut now);
        let mode = std::mem::offset_of!(Config, writeback)
            .checked_sub(offset)
            .filter(|at| *at < bytes.len());
        if let Some(at) = mode {
            now[at] = bytes[at];
        }
        if now != bytes {
            return Err(ConfigReadOnly);
        }
        if let Some(at) = mode {
            self.write_back.store(bytes[at] != 0, Ordering::Relaxed);
            self.write_through_asked.store(bytes[at] == 0, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Zones {
    fn new(geometry: &Geometry, block_size: u32, seg_max: u32) -> Result<Zones, Unsuitable> {
        let size = geometry.zone_size();
        if !size.is_power_of_two() {
            return Err(Unsuitable::ZoneSizeNotPowerOfTwo(size));
        }
        if size / SECTOR_SIZE > u64::from(u32::MAX) {
            return Err(Unsuitable::ZoneSizeTooBig(size));
        }
        // An append of full pages must fit the segments of one request.
        let longest = geometry
            .max_append()
            .min(geometry.zone_capacity())
            .min(u64::from(seg_max) * SEGMENT);
        Ok(Zones {
            model: geometry.model(),
            shift: size.ilog2(),
            sequential: u64::from(geometry.nr_conventional()) * size,
            max_append: longest - longest % u64::from(block_size),
            max_open: geometry.max_open(),
            max_active: geometry.max_active(),
        })
    }

    fn characteristics(&self, block_size: u32) -> ZonedCharacteristics {
        ZonedCharacteristics {
            zone_sectors: saturating_u32((1 << self.shift) / SECTOR_SIZE).into(),
            max_open_zones: self.max_open.into(),
            max_active_zones: self.max_active.into(),
            max_append_sectors: saturating_u32(self.max_append / SECTOR_SIZE).into(),
            write_granularity: block_size.into(),
            model: match self.model {
                ZoneModel::HostManaged => zone_model::HOST_MANAGED,
                ZoneModel::HostAware => zone_model::HOST_AWARE,
            },
            unused2: [0; 3],
        }
    }

    /// Whether a range touches a sequential-required zone and any other.
    pub(super) fn crosses(&self, offset: u64, len: u64) -> bool {
        let last = offset.saturating_add(len.saturating_sub(1));
        self.model == ZoneModel::HostManaged
            && last >= self.sequential
            && offset >> self.shift != last >> self.shift
    }
}

/// Whether feature bit `bit` is among `features`.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}

fn saturating_u32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
