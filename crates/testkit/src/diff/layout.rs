//! What the images of a sequence are like.

use crate::kill::rng::Rng;

use super::content::SECTOR;

/// The largest device of a sequence, bytes.
const LARGEST: u64 = 24 << 20;
/// Cluster sizes are powers of two from 512 bytes to 2 MiB.
pub const CLUSTER_BITS: std::ops::RangeInclusive<u64> = 9..=21;

/// The options of a qcow2 image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// 2 or 3.
    pub version: u32,
    /// Bytes.
    pub cluster_size: u64,
    /// 1 to 64.
    pub refcount_bits: u32,
    /// Clusters in 32 parts.
    pub extended_l2: bool,
    /// Compressed clusters are so by zstd.
    pub zstd: bool,
    /// Refcounts may be late.
    pub lazy_refcounts: bool,
    /// What has its space from the start.
    pub preallocation: Preallocation,
    /// Data lies in a file of its own.
    pub data_file: bool,
    /// And that is a raw image.
    pub data_file_raw: bool,
}

/// What has its space from the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "QEMU's names")]
pub enum Preallocation {
    Off,
    Metadata,
    Falloc,
    Full,
}

impl Preallocation {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        }
    }

    /// Mostly none.
    pub fn random(rng: &mut Rng) -> Preallocation {
        match rng.below(10) {
            0 => Preallocation::Metadata,
            1 => Preallocation::Falloc,
            2 => Preallocation::Full,
            _ => Preallocation::Off,
        }
    }
}

impl Layout {
    /// Any layout that QEMU makes, of an image with or without a backing image.
    pub fn random(rng: &mut Rng, backing: bool) -> Layout {
        let mut layout = Layout {
            version: if rng.one_in(6) { 2 } else { 3 },
            cluster_size: 1
                << (CLUSTER_BITS.start() + rng.below(CLUSTER_BITS.end() - CLUSTER_BITS.start() + 1)),
            refcount_bits: 16,
            extended_l2: false,
            zstd: false,
            lazy_refcounts: false,
            preallocation: Preallocation::Off,
            data_file: false,
            data_file_raw: false,
        };
        if layout.version == 3 {
            layout.refcount_bits = 1 << rng.below(7);
            layout.extended_l2 = layout.cluster_size >= 16 << 10 && rng.one_in(3);
            layout.zstd = rng.one_in(2);
            layout.lazy_refcounts = rng.one_in(4);
            layout.data_file = rng.one_in(6);
            layout.data_file_raw = layout.data_file && !backing && rng.one_in(2);
        }
        if !backing {
            layout.preallocation = Preallocation::random(rng);
        }
        layout
    }

    /// A size for a device of this layout, bytes.
    pub fn random_size(&self, rng: &mut Rng) -> u64 {
        let most = (self.cluster_size * 4096).clamp(1 << 20, LARGEST);
        let size = SECTOR * rng.skewed(1, most / SECTOR);
        if rng.one_in(2) {
            size.next_multiple_of(self.cluster_size).min(most)
        } else {
            size
        }
    }

    /// The `-o` of `qemu-img create`.
    pub fn options(&self, data_file: Option<&str>) -> String {
        let on = |yes| if yes { "on" } else { "off" };
        let mut options = format!("compat={},cluster_size={}", self.compat(), self.cluster_size);
        if self.version == 3 {
            let kind = if self.zstd { "zstd" } else { "zlib" };
            options += &format!(
                ",refcount_bits={},extended_l2={},compression_type={kind},lazy_refcounts={}",
                self.refcount_bits,
                on(self.extended_l2),
                on(self.lazy_refcounts)
            );
        }
        if self.preallocation != Preallocation::Off {
            options += &format!(",preallocation={}", self.preallocation.name());
        }
        if let Some(file) = data_file {
            options += &format!(",data_file={file},data_file_raw={}", on(self.data_file_raw));
        }
        options
    }

    /// QEMU's name of the version.
    pub fn compat(&self) -> &'static str {
        if self.version == 2 { "0.10" } else { "1.1" }
    }

    /// How many snapshots a cluster can be in before its refcount is full, the active contents not counted.
    pub fn most_snapshots(&self) -> u64 {
        1_u64
            .checked_shl(self.refcount_bits)
            .map_or(u64::MAX, |end| end - 1)
            - 1
    }
}
