//! What L1 and L2 entries may say, and what a repair makes of those that say something else.

use zbdkit_spec::qcow2::L2E_RESERVED_MASK;

use super::Image;
use super::found::Found;
use crate::compress::descriptor;
use crate::l2::{ALL_ALLOCATED, ALL_ZERO, COPIED, Codec, Entry, SUBCLUSTERS, ZERO};

/// The cluster that an L2 entry names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// None.
    Nothing,
    /// An ordinary one.
    Mapped {
        /// Where it lies, bytes.
        offset: u64,
        /// Some of its bytes are read.
        read: bool,
    },
    /// Compressed bytes.
    Compressed {
        /// Where they lie, bytes.
        offset: u64,
        /// Up to the end of their last sector, bytes.
        len: u64,
    },
}

/// The rules for entries of one image.
#[derive(Clone, Copy)]
pub struct Rules {
    pub codec: Codec,
    cluster_bits: u32,
    version: u32,
}

impl Rules {
    pub fn of(image: &Image<'_>) -> Rules {
        Rules {
            codec: Codec {
                extended: image.header.extended_l2(),
                external: image.header.external_data(),
            },
            cluster_bits: image.header.cluster_bits,
            version: image.header.version,
        }
    }

    /// The entries of a table's bytes.
    pub fn entries(self, table: &[u8]) -> impl Iterator<Item = Entry> + '_ {
        let word = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
        table
            .chunks_exact(8 * self.codec.words())
            .map(move |bytes| Entry {
                word: word(&bytes[..8]),
                bitmap: bytes.get(8..16).map_or(0, word),
            })
    }

    /// Writes an entry into a table's bytes.
    pub fn put(self, table: &mut [u8], index: usize, entry: Entry) {
        let size = 8 * self.codec.words();
        let bytes = &mut table[index * size..][..size];
        bytes[..8].copy_from_slice(&entry.word.to_be_bytes());
        if let Some(bitmap) = bytes.get_mut(8..16) {
            bitmap.copy_from_slice(&entry.bitmap.to_be_bytes());
        }
    }

    /// The cluster that an entry names.
    pub fn cluster(self, entry: Entry) -> Cluster {
        if entry.is_compressed() {
            let (offset, len) = descriptor(entry.word, self.cluster_bits);
            return Cluster::Compressed { offset, len };
        }
        let zero = self.is_zero(entry);
        // Of a zero cluster an offset of 0 is none, also in an external data file.
        if !self.codec.has_cluster(entry) || (zero && entry.offset() == 0) {
            return Cluster::Nothing;
        }
        let read = if self.codec.extended {
            entry.bitmap & ALL_ALLOCATED != 0
        } else {
            !zero
        };
        Cluster::Mapped {
            offset: entry.offset(),
            read,
        }
    }

    fn is_zero(self, entry: Entry) -> bool {
        !self.codec.extended && !entry.is_compressed() && entry.word & ZERO != 0
    }

    fn reserved(self) -> u64 {
        L2E_RESERVED_MASK | if self.codec.extended { ZERO } else { 0 }
    }

    fn is_aligned(self, offset: u64) -> bool {
        offset.is_multiple_of(1 << self.cluster_bits)
    }

    /// What a repair makes of an entry, and how many findings go with that. No byte of the device changes: what is
    /// dropped is what no reader looks at.
    pub fn mended(self, entry: Entry) -> (Entry, u64) {
        let (mut mended, mut findings) = (entry, 0);
        if entry.is_compressed() {
            if entry.is_copied() {
                mended.word &= !COPIED;
                findings += 1;
            }
            return (mended, findings);
        }
        if entry.word & self.reserved() != 0 {
            mended.word &= !self.reserved();
            findings += 1;
        }
        if let Cluster::Mapped { offset, read: false } = self.cluster(entry)
            && !self.is_aligned(offset)
        {
            findings += 1;
            mended = if self.codec.extended {
                // Nothing of it is allocated, so the bits that say zero are all there is.
                Entry {
                    word: 0,
                    bitmap: entry.bitmap & ALL_ZERO,
                }
            } else {
                self.codec.zero()
            };
        }
        (mended, findings)
    }

    /// Notes what is wrong with an entry by itself. `repairing`: what [`mended`](Rules::mended) repairs will be. Returns
    /// whether the entry can be taken at its word.
    pub fn judge(self, index: usize, entry: Entry, repairing: bool, found: &mut Found) -> bool {
        let Entry { word, bitmap } = entry;
        if entry.is_compressed() {
            return self.judge_compressed(index, entry, found);
        }
        if word & self.reserved() != 0 {
            found.corruption(format_args!(
                "ERROR found l2 entry with reserved bits set: {word:x}"
            ));
        }
        if self.version < 3 && self.is_zero(entry) {
            found.corruption(format_args!(
                "ERROR zero cluster in a version 2 image: l2_entry={word:x}"
            ));
        }
        let (offset, read) = match self.cluster(entry) {
            Cluster::Mapped { offset, read } => (offset, read),
            _ => {
                if bitmap & ALL_ALLOCATED != 0 {
                    found.corruption(format_args!(
                        "ERROR: Unallocated cluster has non-zero subcluster allocation map"
                    ));
                }
                return true;
            }
        };
        if bitmap & bitmap >> SUBCLUSTERS & ALL_ALLOCATED != 0 {
            found.corruption(format_args!(
                "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
            ));
        }
        if self.is_aligned(offset) {
            return true;
        }
        if read {
            found.corruption(format_args!(
                "ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted."
            ));
        } else {
            found.corruption(format_args!(
                "{} offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted.",
                if repairing { "Repairing" } else { "ERROR" }
            ));
        }
        !read
    }

    fn judge_compressed(self, index: usize, entry: Entry, found: &mut Found) -> bool {
        let Entry { word, bitmap } = entry;
        if entry.is_copied() {
            let (offset, _) = descriptor(word, self.cluster_bits);
            found.corruption(format_args!(
                "ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters"
            ));
        }
        if self.codec.external {
            found.corruption(format_args!(
                "ERROR compressed cluster {index} with data file, entry={word:#x}"
            ));
            return false;
        }
        if bitmap != 0 {
            found.corruption(format_args!(
                "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry={word:#x}"
            ));
            return false;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(cluster_bits: u32, extended: bool, external: bool) -> Rules {
        Rules {
            codec: Codec { extended, external },
            cluster_bits,
            version: 3,
        }
    }

    fn entry(word: u64, bitmap: u64) -> Entry {
        Entry { word, bitmap }
    }

    #[test]
    fn compressed_bytes_end_with_a_sector() {
        // 64 KiB clusters: 54 bits of offset, then 8 of sectors.
        let word = 1 << 62 | 2 << 54 | 0x12_3456;
        let cluster = rules(16, false, false).cluster(entry(word, 0));
        let Cluster::Compressed { offset, len } = cluster else {
            panic!("{cluster:?}")
        };
        assert_eq!((offset, offset + len), (0x12_3456, 0x12_3400 + 3 * 512));
        // 512 byte clusters: 61 bits of offset, then 1.
        let word = 1 << 62 | 1 << 61 | 512;
        assert_eq!(
            rules(9, false, false).cluster(entry(word, 0)),
            Cluster::Compressed {
                offset: 512,
                len: 1024
            }
        );
    }

    #[test]
    fn an_offset_of_zero_is_one_only_in_an_external_file() {
        let word = entry(COPIED, 0);
        assert_eq!(rules(16, false, false).cluster(word), Cluster::Nothing);
        assert_eq!(
            rules(16, false, true).cluster(word),
            Cluster::Mapped {
                offset: 0,
                read: true
            }
        );
        assert_eq!(
            rules(16, false, true).cluster(entry(COPIED | ZERO, 0)),
            Cluster::Nothing
        );
    }

    #[test]
    fn mending_drops_only_what_no_reader_looks_at() {
        let plain = rules(16, false, false);
        let good = entry(COPIED | 0x5_0000, 0);
        assert_eq!(plain.mended(good), (good, 0));
        assert_eq!(plain.mended(entry(good.word | 1 << 60 | 2, 0)), (good, 1));
        // A data cluster that lies nowhere stays what it is.
        let nowhere = entry(COPIED | 0x5_0200, 0);
        assert_eq!(plain.mended(nowhere), (nowhere, 0));
        assert_eq!(plain.mended(entry(nowhere.word | ZERO, 0)), (entry(ZERO, 0), 1));
        let extended = rules(16, true, false);
        assert_eq!(
            extended.mended(entry(nowhere.word, 1 << 32)),
            (entry(0, 1 << 32), 1)
        );
        assert_eq!(
            extended.mended(entry(good.word | ZERO, 1)),
            (entry(good.word, 1), 1)
        );
        let compressed = 1 << 62 | 0x5_0000;
        assert_eq!(
            plain.mended(entry(COPIED | compressed, 0)),
            (entry(compressed, 0), 1)
        );
    }
}
