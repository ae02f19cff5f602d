//! What a zoned namespace says of itself, made sense of. Sizes are bytes.

use zbdkit_spec::nvme::base::{IdentifyController, MIN_PAGE_BYTES};
use zbdkit_spec::nvme::nvm::{self, MAX_BLOCKS};
use zbdkit_spec::nvme::zns::{self, NO_LIMIT, Ozcs, ZDES_UNIT, ZrwaCap};
use zbdkit_zone::{Zns, Zrwa};

/// What the kernel's passthrough takes in one command, whatever the drive would.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelLimits {
    /// Bytes.
    pub max_transfer: u64,
    /// Pieces of memory that are not behind one another.
    pub max_segments: usize,
}

impl Default for KernelLimits {
    /// What every kernel takes.
    fn default() -> KernelLimits {
        KernelLimits {
            max_transfer: 128 << 10,
            max_segments: 33,
        }
    }
}

/// A zoned namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceFacts {
    /// Model of the drive.
    pub model: String,
    /// Serial number of the drive.
    pub serial: String,
    /// Number of the namespace.
    pub nsid: u32,
    /// Logical block size.
    pub block_size: u32,
    /// Size.
    pub size: u64,
    /// Distance from one zone's start to the next.
    pub zone_size: u64,
    /// Number of zones.
    pub nr_zones: u32,
    /// How many zones may be open (MOR); 0 for no limit.
    pub max_open: u32,
    /// How many zones may be open or closed (MAR); 0 for no limit.
    pub max_active: u32,
    /// The longest transfer in one command (MDTS, and the kernel's limit).
    pub max_transfer: u64,
    /// The longest append (ZASL).
    pub max_append: u64,
    /// Pieces of memory in one command.
    pub max_segments: usize,
    /// A read may cross from one zone into the next (RAZB).
    pub reads_cross: bool,
    /// Written data may be lost with the power until it is flushed (VWC).
    pub write_cache: bool,
    /// The namespace takes no writes at present (NSATTR).
    pub write_protected: bool,
    /// Zone random write areas, where there are some.
    pub zrwa: Option<ZrwaFacts>,
    /// Size of a zone descriptor extension; 0 where there are none.
    pub extension_size: usize,
}

/// Zone random write areas of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZrwaFacts {
    /// How many zones may have one at a time, as NUMZRWA says.
    pub areas: u32,
    /// How far above the write pointer writes may go.
    pub size: u64,
    /// What flushes are a multiple of.
    pub granularity: u64,
    /// They can be flushed by command.
    pub explicit_flush: bool,
}

/// Why a namespace cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NamespaceProblem {
    /// The namespace has another command set.
    #[error("not a zoned namespace")]
    NotZoned,
    /// Blocks come with metadata.
    #[error("its blocks have {0} bytes of metadata each; format it without")]
    Metadata(u16),
    /// Blocks come with protection information.
    #[error("it is formatted with end-to-end protection; format it without")]
    Protection,
    /// The block size is none that can be.
    #[error("its block size of 2^{0} bytes is not supported (512 bytes to 64 KiB are)")]
    BlockSize(u8),
    /// Zones of no bytes, or none of them, or more than can be counted.
    #[error("it says that it has {blocks} blocks in zones of {zone_blocks}, which makes no sense")]
    Zones {
        /// Blocks of the namespace.
        blocks: u64,
        /// Blocks of a zone.
        zone_blocks: u64,
    },
    /// Not even a block can be transferred.
    #[error("it transfers no more than {0} bytes at once, less than a block")]
    Transfer(u64),
}

/// The answers to the Identify commands.
pub(super) struct Identified {
    pub(super) namespace: nvm::IdentifyNamespace,
    pub(super) zoned: zns::IdentifyNamespace,
    pub(super) controller: IdentifyController,
    pub(super) zoned_controller: zns::IdentifyController,
}

impl NamespaceFacts {
    pub(super) fn new(
        nsid: u32,
        from: &Identified,
        kernel: KernelLimits,
    ) -> Result<NamespaceFacts, NamespaceProblem> {
        let Identified {
            namespace,
            zoned,
            controller,
            zoned_controller,
        } = from;
        let format = namespace.format();
        if format.ms.get() != 0 {
            return Err(NamespaceProblem::Metadata(format.ms.get()));
        }
        if namespace.dps & 0b111 != 0 {
            return Err(NamespaceProblem::Protection);
        }
        if !(9..=16).contains(&format.lbads) {
            return Err(NamespaceProblem::BlockSize(format.lbads));
        }
        let block_size = 1u32 << format.lbads;
        let extension = &zoned.lbafe[namespace.format_index()];
        let (blocks, zone_blocks) = (namespace.nsze.get(), extension.zsze.get());
        let nonsense = NamespaceProblem::Zones { blocks, zone_blocks };
        let bytes = |blocks: u64| blocks.checked_mul(block_size.into()).ok_or(nonsense);
        let nr_zones = blocks.checked_div(zone_blocks).ok_or(nonsense)?;
        let nr_zones = u32::try_from(nr_zones).map_err(|_| nonsense)?;
        if nr_zones == 0 {
            return Err(nonsense);
        }
        let max_transfer = power_of_pages(controller.mdts)
            .min(kernel.max_transfer)
            .min(kernel.max_segments as u64 * MIN_PAGE_BYTES)
            .min(MAX_BLOCKS * u64::from(block_size));
        if max_transfer < u64::from(block_size) {
            return Err(NamespaceProblem::Transfer(max_transfer));
        }
        let max_transfer = max_transfer - max_transfer % u64::from(block_size);
        let max_append = power_of_pages(zoned_controller.zasl).min(max_transfer);
        Ok(NamespaceFacts {
            model: text(&controller.mn),
            serial: text(&controller.sn),
            nsid,
            block_size,
            // Blocks behind the last whole zone belong to none.
            size: bytes(u64::from(nr_zones) * zone_blocks)?,
            zone_size: bytes(zone_blocks)?,
            nr_zones,
            max_open: limit(zoned.mor_z.get()),
            max_active: limit(zoned.mar_z.get()),
            max_transfer,
            max_append: max_append - max_append % u64::from(block_size),
            max_segments: kernel.max_segments,
            reads_cross: Ozcs::from_bits(zoned.ozcs.get()).razb(),
            write_cache: controller.vwc & 1 != 0,
            write_protected: namespace.nsattr & 1 != 0,
            zrwa: Ozcs::from_bits(zoned.ozcs.get()).zrwasup().then(|| ZrwaFacts {
                areas: zoned.numzrwa.get(),
                size: u64::from(zoned.zrwasz.get()) * u64::from(block_size),
                granularity: u64::from(zoned.zrwafg.get()) * u64::from(block_size),
                explicit_flush: ZrwaCap::from_bits(zoned.zrwacap).expflushsup(),
            }),
            extension_size: usize::from(extension.zdes) * ZDES_UNIT,
        })
    }
}

impl NamespaceFacts {
    /// What geometries have of it.
    pub(super) fn zns(&self) -> Zns {
        Zns {
            zrwa: self.zrwa.map(|zrwa| Zrwa {
                size: zrwa.size,
                granularity: zrwa.granularity,
                count: match zrwa.areas {
                    NO_LIMIT => 0,
                    // There are areas, so there is at least one.
                    areas => areas.max(1),
                },
                explicit_commit: zrwa.explicit_flush,
            }),
            // At most 255 units.
            extension_size: self.extension_size as u32,
        }
    }
}

/// A 0-based limit of resources; none is 0 here.
fn limit(limit_z: u32) -> u32 {
    if limit_z == NO_LIMIT { 0 } else { limit_z + 1 }
}

/// The size that MDTS and ZASL give as an exponent; 0 is no limit. The unit is CAP.MPSMIN, which only the kernel can see:
/// the smallest that it can be is safe.
fn power_of_pages(exponent: u8) -> u64 {
    match exponent {
        0 => u64::MAX,
        n => MIN_PAGE_BYTES
            .checked_shl(n.into())
            .filter(|bytes| *bytes >= MIN_PAGE_BYTES)
            .unwrap_or(u64::MAX),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

#[cfg(test)]
pub(super) mod tests_support {
    use super::*;

    /// Eight zones of 0x4000 blocks of 4 KiB.
    pub(crate) fn facts() -> NamespaceFacts {
        NamespaceFacts {
            model: "model".into(),
            serial: "serial".into(),
            nsid: 1,
            block_size: 4096,
            size: 8 * (0x4000 * 4096),
            zone_size: 0x4000 * 4096,
            nr_zones: 8,
            max_open: 3,
            max_active: 4,
            max_transfer: 128 << 10,
            max_append: 64 << 10,
            max_segments: 33,
            reads_cross: false,
            write_cache: true,
            write_protected: false,
            zrwa: None,
            extension_size: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    fn identified() -> Identified {
        let mut from = Identified {
            namespace: nvm::IdentifyNamespace::new_zeroed(),
            zoned: zns::IdentifyNamespace::new_zeroed(),
            controller: IdentifyController::new_zeroed(),
            zoned_controller: zns::IdentifyController::new_zeroed(),
        };
        from.namespace.nsze.set(0x1_8007);
        from.namespace.flbas = 1;
        from.namespace.lbaf[1].lbads = 12;
        from.zoned.lbafe[1].zsze.set(0x8000);
        from.zoned.lbafe[1].zdes = 2;
        from.zoned.mor_z.set(5);
        from.zoned.mar_z.set(NO_LIMIT);
        from.controller.mdts = 7;
        from.controller.sn = *b"ABC                 ";
        from
    }

    fn facts(from: &Identified) -> Result<NamespaceFacts, NamespaceProblem> {
        let kernel = KernelLimits {
            max_transfer: 1 << 30,
            max_segments: 1 << 20,
        };
        NamespaceFacts::new(1, from, kernel)
    }

    #[test]
    fn limits_are_counted_from_one_and_none_is_none() {
        let facts = facts(&identified()).unwrap();
        assert_eq!((facts.max_open, facts.max_active), (6, 0));
        assert_eq!(
            (facts.block_size, facts.zone_size, facts.nr_zones),
            (4096, 128 << 20, 3)
        );
        assert_eq!((facts.size, facts.extension_size), (3 * (128 << 20), 128));
        assert_eq!((facts.serial.as_str(), facts.zrwa), ("ABC", None));
    }

    #[test]
    fn transfers_are_limited_by_drive_and_kernel_and_appends_by_zasl_too() {
        let mut from = identified();
        assert_eq!(facts(&from).unwrap().max_transfer, 512 << 10);
        assert_eq!(facts(&from).unwrap().max_append, 512 << 10, "ZASL 0 means MDTS");
        from.zoned_controller.zasl = 5;
        assert_eq!(facts(&from).unwrap().max_append, 128 << 10);
        from.controller.mdts = 0;
        assert_eq!(facts(&from).unwrap().max_transfer, 256 << 20, "65536 blocks");
        from.controller.mdts = 255;
        assert_eq!(facts(&from).unwrap().max_transfer, 256 << 20);
        let kernel = NamespaceFacts::new(1, &from, KernelLimits::default()).unwrap();
        assert_eq!((kernel.max_transfer, kernel.max_append), (128 << 10, 128 << 10));
    }

    #[test]
    fn random_write_areas_are_read_where_they_are_supported() {
        let mut from = identified();
        from.zoned.ozcs.set(0b11);
        from.zoned.zrwasz.set(16);
        from.zoned.zrwafg.set(4);
        from.zoned.numzrwa.set(8);
        from.zoned.zrwacap = 1;
        let facts = facts(&from).unwrap();
        assert!(facts.reads_cross);
        let zrwa = ZrwaFacts {
            areas: 8,
            size: 65536,
            granularity: 16384,
            explicit_flush: true,
        };
        assert_eq!(facts.zrwa, Some(zrwa));
        assert_eq!(
            facts.zns(),
            Zns {
                zrwa: Some(Zrwa {
                    size: 65536,
                    granularity: 16384,
                    count: 8,
                    explicit_commit: true,
                }),
                extension_size: 128,
            }
        );
        from.zoned.numzrwa.set(NO_LIMIT);
        assert_eq!(self::facts(&from).unwrap().zns().zrwa.unwrap().count, 0);
    }

    #[test]
    fn what_a_drive_says_without_sense_is_refused() {
        let problem = |change: fn(&mut Identified)| {
            let mut from = identified();
            change(&mut from);
            facts(&from).expect_err("no sense")
        };
        assert_eq!(
            problem(|i| i.namespace.lbaf[1].lbads = 8),
            NamespaceProblem::BlockSize(8)
        );
        assert_eq!(
            problem(|i| i.namespace.lbaf[1].lbads = 255),
            NamespaceProblem::BlockSize(255)
        );
        assert_eq!(
            problem(|i| i.namespace.lbaf[1].ms.set(8)),
            NamespaceProblem::Metadata(8)
        );
        assert_eq!(problem(|i| i.namespace.dps = 1), NamespaceProblem::Protection);
        let zones = |problem| matches!(problem, NamespaceProblem::Zones { .. });
        assert!(zones(problem(|i| i.zoned.lbafe[1].zsze.set(0))));
        assert!(zones(problem(|i| i.zoned.lbafe[1].zsze.set(u64::MAX))));
        assert!(zones(problem(|i| i.namespace.nsze.set(0))));
        assert!(zones(problem(|i| {
            i.namespace.nsze.set(u64::MAX);
            i.zoned.lbafe[1].zsze.set(1);
        })));
        assert!(zones(problem(|i| {
            i.namespace.nsze.set(u64::MAX);
            i.zoned.lbafe[1].zsze.set(u64::MAX / 2);
        })));
    }
}
