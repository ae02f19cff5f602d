//! The virtio-blk configuration space (virtio 1.3, 5.2.4), all 96 bytes of it.

/// Bytes of configuration space with the zoned part.
pub const CONFIG_SIZE: usize = 96;

/// The configuration space, decoded. A field means something only with its feature bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlkConfig {
    /// Capacity in 512-byte sectors.
    pub capacity: u64,
    /// Longest segment in bytes (`SIZE_MAX`).
    pub size_max: u32,
    /// Most data segments in a request (`SEG_MAX`).
    pub seg_max: u32,
    /// Logical block size in bytes (`BLK_SIZE`).
    pub blk_size: u32,
    /// Cache mode: 0 write-through, 1 write-back (`CONFIG_WCE`).
    pub writeback: u8,
    /// Request queues (`MQ`).
    pub num_queues: u16,
    /// Longest discard range in sectors (`DISCARD`).
    pub max_discard_sectors: u32,
    /// Most ranges in a discard (`DISCARD`).
    pub max_discard_seg: u32,
    /// Discard alignment in sectors (`DISCARD`).
    pub discard_sector_alignment: u32,
    /// Longest write zeroes range in sectors (`WRITE_ZEROES`).
    pub max_write_zeroes_sectors: u32,
    /// Most ranges in a write zeroes request (`WRITE_ZEROES`).
    pub max_write_zeroes_seg: u32,
    /// Whether write zeroes may unmap (`WRITE_ZEROES`).
    pub write_zeroes_may_unmap: u8,
    /// Zone size in sectors (`ZONED`, as all that follow).
    pub zone_sectors: u32,
    /// Most open zones, 0 without a limit.
    pub max_open_zones: u32,
    /// Most active zones, 0 without a limit.
    pub max_active_zones: u32,
    /// Longest append in sectors, 0 when appends are not supported.
    pub max_append_sectors: u32,
    /// Write granularity in bytes.
    pub write_granularity: u32,
    /// 0 not zoned, 1 host-managed, 2 host-aware.
    pub model: u8,
    /// The bytes as read.
    pub raw: [u8; CONFIG_SIZE],
}

impl BlkConfig {
    /// Decodes the configuration space.
    pub fn parse(raw: [u8; CONFIG_SIZE]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        BlkConfig {
            capacity: u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32,
            size_max: u32_at(8),
            seg_max: u32_at(12),
            blk_size: u32_at(20),
            writeback: raw[32],
            num_queues: u16_at(34),
            max_discard_sectors: u32_at(36),
            max_discard_seg: u32_at(40),
            discard_sector_alignment: u32_at(44),
            max_write_zeroes_sectors: u32_at(48),
            max_write_zeroes_seg: u32_at(52),
            write_zeroes_may_unmap: raw[56],
            zone_sectors: u32_at(72),
            max_open_zones: u32_at(76),
            max_active_zones: u32_at(80),
            max_append_sectors: u32_at(84),
            write_granularity: u32_at(88),
            model: raw[92],
            raw,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_bindings::virtio_blk::virtio_blk_config;

    #[test]
    fn offsets_are_those_of_the_kernel_header() {
        assert_eq!(size_of::<virtio_blk_config>(), CONFIG_SIZE);
        let raw: [u8; CONFIG_SIZE] = std::array::from_fn(|i| i as u8);
        let config = BlkConfig::parse(raw);
        let offset = |value: u64| (value & 0xff) as usize;
        macro_rules! check {
            ($($ours:ident => $($path:ident).+),* $(,)?) => {$(
                let expected = std::mem::offset_of!(virtio_blk_config, $($path).+);
                assert_eq!(offset(u64::from(config.$ours)), expected, stringify!($ours));
            )*};
        }
        check!(capacity => capacity, size_max => size_max, seg_max => seg_max, blk_size => blk_size,
            writeback => wce, num_queues => num_queues, max_discard_sectors => max_discard_sectors,
            max_discard_seg => max_discard_seg, discard_sector_alignment => discard_sector_alignment,
            max_write_zeroes_sectors => max_write_zeroes_sectors,
            max_write_zeroes_seg => max_write_zeroes_seg, write_zeroes_may_unmap => write_zeroes_may_unmap,
            zone_sectors => zoned.zone_sectors, max_open_zones => zoned.max_open_zones,
            max_active_zones => zoned.max_active_zones, max_append_sectors => zoned.max_append_sectors,
            write_granularity => zoned.write_granularity, model => zoned.model);
    }
}
