//! L2 entries: what they say, and the bounded cache of them.
//!
//! The cache is written through: an entry changes in the file first, then here. So nothing in it is ever dirty, and what
//! is not in it can be read from the file at any time.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

pub use zbdkit_spec::qcow2::{
    L2E_OFFSET_MASK as OFFSET, OFLAG_COMPRESSED as COMPRESSED, OFLAG_COPIED as COPIED, OFLAG_ZERO as ZERO,
};

/// Subclusters in a cluster with extended L2 entries.
pub const SUBCLUSTERS: u64 = zbdkit_spec::qcow2::SUBCLUSTERS as u64;

/// One L2 entry: the first word, and the bitmaps of extended entries (allocated in the low half, zero in the high).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Flags and offset.
    pub word: u64,
    /// 0 where entries are not extended.
    pub bitmap: u64,
}

/// How entries are read, a property of the image.
#[derive(Clone, Copy, Debug)]
pub struct Codec {
    /// Entries have two words.
    pub extended: bool,
    /// Data lies in a file of its own, where 0 is an offset like others.
    pub external: bool,
}

/// What an entry says of one cluster, or of one subcluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes at the cluster's offset.
    Data,
    /// Zeros; the cluster may have an offset all the same.
    Zero,
    /// Nothing.
    Unallocated,
    /// Compressed bytes.
    Compressed,
    /// Contradictory.
    Invalid,
}

impl Entry {
    /// Where the cluster lies, bytes.
    pub fn offset(self) -> u64 {
        self.word & OFFSET
    }

    /// The cluster is this image's alone.
    pub fn is_copied(self) -> bool {
        self.word & COPIED != 0
    }

    /// It is compressed.
    pub fn is_compressed(self) -> bool {
        self.word & COMPRESSED != 0
    }
}

impl Codec {
    /// Whether the entry has a cluster (not compressed).
    pub fn has_cluster(self, entry: Entry) -> bool {
        !entry.is_compressed() && (entry.offset() != 0 || (self.external && entry.is_copied()))
    }

    /// What the entry says of a subcluster (always 0 where entries are not extended).
    pub fn kind(self, entry: Entry, subcluster: u64) -> Kind {
        if entry.is_compressed() {
            // Compressed clusters lie in the image itself, and have no subclusters.
            return if self.external || entry.bitmap != 0 {
                Kind::Invalid
            } else {
                Kind::Compressed
            };
        }
        let mapped = self.has_cluster(entry);
        if !self.extended {
            return match (entry.word & ZERO != 0, mapped) {
                (true, _) => Kind::Zero,
                (false, true) => Kind::Data,
                (false, false) => Kind::Unallocated,
            };
        }
        let allocated = entry.bitmap >> subcluster & 1 != 0;
        let zero = entry.bitmap >> (subcluster + SUBCLUSTERS) & 1 != 0;
        match (allocated, zero) {
            (true, true) => Kind::Invalid,
            (true, false) if mapped => Kind::Data,
            (true, false) => Kind::Invalid,
            (false, true) => Kind::Zero,
            (false, false) => Kind::Unallocated,
        }
    }

    /// Every byte is data of the cluster.
    pub fn is_all_data(self, entry: Entry) -> bool {
        self.has_cluster(entry)
            && if self.extended {
                entry.bitmap == ALL_ALLOCATED
            } else {
                entry.word & ZERO == 0
            }
    }

    /// An entry for a cluster of the image's own, all data.
    pub fn data(self, offset: u64) -> Entry {
        Entry {
            word: offset | COPIED,
            bitmap: if self.extended { ALL_ALLOCATED } else { 0 },
        }
    }

    /// An entry that reads as zeros without a cluster. Version 3 only.
    pub fn zero(self) -> Entry {
        if self.extended {
            Entry {
                word: 0,
                bitmap: ALL_ZERO,
            }
        } else {
            Entry {
                word: ZERO,
                bitmap: 0,
            }
        }
    }

    /// Words of an entry.
    pub fn words(self) -> usize {
        if self.extended { 2 } else { 1 }
    }
}

/// Extended entries: all subclusters are allocated.
pub const ALL_ALLOCATED: u64 = 0xffff_ffff;
/// Extended entries: all subclusters are zeros.
pub const ALL_ZERO: u64 = 0xffff_ffff_0000_0000;

const SHARDS: u64 = 16;

/// Slices of L2 tables.
pub struct L2Cache {
    codec: Codec,
    /// Entries in a slice are 1 << this.
    slice_bits: u32,
    shards: Vec<RwLock<Shard>>,
    /// Slices that one shard keeps.
    capacity: usize,
}

struct Shard {
    slices: HashMap<u64, Slice, BuildHasherDefault<Mix>>,
    /// In the order in which they are looked at when one has to go.
    order: VecDeque<u64>,
    /// Counts changes: what was read from the file before one may be too old to be kept.
    version: u64,
}

struct Slice {
    words: Box<[u64]>,
    used: AtomicBool,
}

/// One slice, to be read.
pub struct View<'a> {
    shard: RwLockReadGuard<'a, Shard>,
    key: u64,
    codec: Codec,
}

impl L2Cache {
    /// A cache of at most about `bytes` bytes of tables of `1 << table_bits` entries. Slices are 4096 bytes, or `least`
    /// where that is more.
    pub fn new(codec: Codec, table_bits: u32, bytes: u64, least: u64) -> L2Cache {
        let entry_bits = codec.words().ilog2() + 3;
        let slice_bits = table_bits.min(least.max(4096).ilog2() - entry_bits);
        let slice_bytes = 1u64 << (slice_bits + entry_bits);
        let empty = || Shard {
            slices: HashMap::default(),
            order: VecDeque::new(),
            version: 0,
        };
        L2Cache {
            codec,
            slice_bits,
            shards: (0..SHARDS).map(|_| RwLock::new(empty())).collect(),
            capacity: (bytes / slice_bytes / SHARDS).max(4) as usize,
        }
    }

    /// Entries of a slice.
    pub fn entries(&self) -> u64 {
        1 << self.slice_bits
    }

    /// The slice that holds a cluster of the device, and where in it.
    pub fn locate(&self, cluster: u64) -> (u64, usize) {
        (
            cluster >> self.slice_bits,
            (cluster & (self.entries() - 1)) as usize,
        )
    }

    /// Bytes of a slice in the file.
    pub fn slice_bytes(&self) -> u64 {
        self.entries() * 8 * self.codec.words() as u64
    }

    /// The slice, if it is here.
    pub fn get(&self, key: u64) -> Option<View<'_>> {
        let shard = self.shard(key).read().unwrap_or_else(PoisonError::into_inner);
        let slice = shard.slices.get(&key)?;
        if !slice.used.load(Ordering::Relaxed) {
            slice.used.store(true, Ordering::Relaxed);
        }
        Some(View {
            shard,
            key,
            codec: self.codec,
        })
    }

    /// The count of changes so far, for [`L2Cache::insert`].
    pub fn version(&self, key: u64) -> u64 {
        self.shard(key)
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .version
    }

    /// Keeps what was read from the file since `version`; `false` where something changed meanwhile.
    pub fn insert(&self, key: u64, words: Box<[u64]>, version: u64) -> bool {
        let mut shard = self.write(key);
        if shard.version != version {
            return false;
        }
        if shard.slices.contains_key(&key) {
            return true;
        }
        while shard.slices.len() >= self.capacity {
            shard.evict();
        }
        let slice = Slice {
            words,
            used: AtomicBool::new(true),
        };
        shard.slices.insert(key, slice);
        shard.order.push_back(key);
        true
    }

    /// Entries from `index` on of a slice are these in the file now.
    pub fn update(&self, key: u64, index: usize, entries: &[Entry]) {
        let mut shard = self.write(key);
        shard.version += 1;
        let words = self.codec.words();
        if let Some(slice) = shard.slices.get_mut(&key) {
            for (entry, to) in entries
                .iter()
                .zip(slice.words[index * words..].chunks_exact_mut(words))
            {
                to[0] = entry.word;
                if let Some(bitmap) = to.get_mut(1) {
                    *bitmap = entry.bitmap;
                }
            }
        }
    }

    /// Drops a slice: nobody knows what the file has there.
    pub fn forget_slice(&self, key: u64) {
        let mut shard = self.write(key);
        shard.version += 1;
        shard.slices.remove(&key);
    }

    /// Drops all slices: tables moved.
    pub fn forget(&self) {
        for shard in &self.shards {
            let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
            shard.version += 1;
            shard.slices.clear();
            shard.order.clear();
        }
    }

    fn shard(&self, key: u64) -> &RwLock<Shard> {
        &self.shards[(key % SHARDS) as usize]
    }

    fn write(&self, key: u64) -> RwLockWriteGuard<'_, Shard> {
        self.shard(key).write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shard {
    /// Drops a slice that was not used since it was last looked at.
    fn evict(&mut self) {
        while let Some(key) = self.order.pop_front() {
            match self.slices.get(&key) {
                Some(slice) if slice.used.swap(false, Ordering::Relaxed) => self.order.push_back(key),
                Some(_) => {
                    self.slices.remove(&key);
                    return;
                }
                None => {}
            }
        }
    }
}

impl View<'_> {
    /// The entries, found once.
    pub fn entries(&self) -> Entries<'_> {
        Entries {
            words: &self.shard.slices[&self.key].words,
            codec: self.codec,
        }
    }
}

/// The entries of a slice.
#[derive(Clone, Copy)]
pub struct Entries<'a> {
    words: &'a [u64],
    codec: Codec,
}

impl Entries<'_> {
    /// The entry at a place.
    pub fn get(&self, index: usize) -> Entry {
        if self.codec.extended {
            Entry {
                word: self.words[2 * index],
                bitmap: self.words[2 * index + 1],
            }
        } else {
            Entry {
                word: self.words[index],
                bitmap: 0,
            }
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.words.len() / self.codec.words()
    }
}

/// Numbers of slices and clusters need no more than to be spread.
#[derive(Default)]
pub struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 29);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Codec = Codec {
        extended: false,
        external: false,
    };
    const EXTENDED: Codec = Codec {
        extended: true,
        external: false,
    };

    #[test]
    fn what_was_read_before_a_change_is_not_kept() {
        let cache = L2Cache::new(PLAIN, 13, 1 << 20, 512);
        let version = cache.version(5);
        cache.update(5, 0, &[PLAIN.data(1 << 20)]);
        assert!(!cache.insert(5, vec![0; 512].into(), version));
        assert!(cache.get(5).is_none());
        assert!(cache.insert(5, vec![0; 512].into(), cache.version(5)));
        cache.update(5, 7, &[PLAIN.data(1 << 20)]);
        assert_eq!(cache.get(5).unwrap().entries().get(7), PLAIN.data(1 << 20));
    }

    #[test]
    fn it_keeps_no_more_than_it_may() {
        let cache = L2Cache::new(EXTENDED, 12, 0, 512);
        for key in 0..10_000 {
            assert!(cache.insert(key, vec![0; 512].into(), cache.version(key)));
        }
        let kept = (0..10_000).filter(|key| cache.get(*key).is_some()).count();
        assert_eq!(kept, 4 * SHARDS as usize);
    }

    #[test]
    fn contradictory_subclusters_are_told() {
        let both = Entry {
            word: 1 << 16,
            bitmap: 1 | 1 << 32,
        };
        assert_eq!(EXTENDED.kind(both, 0), Kind::Invalid);
        let nowhere = Entry { word: 0, bitmap: 1 };
        assert_eq!(EXTENDED.kind(nowhere, 0), Kind::Invalid);
        assert_eq!(EXTENDED.kind(nowhere, 1), Kind::Unallocated);
    }
}
