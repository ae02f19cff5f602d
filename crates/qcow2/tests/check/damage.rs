//! Damaging images in their metadata.

use std::ops::Range;
use std::path::Path;

use zbdkit_qcow2::Header;

use crate::support::Rng;

/// What kind of metadata lies somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Header,
    L1,
    L2,
    RefcountTable,
    RefcountBlock,
    SnapshotTable,
    SnapshotL1,
    BitmapDirectory,
    BitmapTable,
}

/// Where the metadata of an undamaged image lies.
pub struct Map {
    pub header: Header,
    pub places: Vec<(Place, Range<u64>)>,
    pub len: u64,
}

fn word(bytes: &[u8], at: u64) -> u64 {
    let at = at as usize;
    let mut word = [0; 8];
    if let Some(from) = bytes.get(at..at + 8) {
        word.copy_from_slice(from);
    }
    u64::from_be_bytes(word)
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

impl Map {
    pub fn of(bytes: &[u8]) -> Map {
        let header = Header::decode(bytes, bytes.len() as u64).unwrap();
        let mut map = Map {
            places: Vec::new(),
            len: bytes.len() as u64,
            header,
        };
        let (l1, l1_size) = (map.header.l1_offset, map.header.l1_size);
        let (refcounts, clusters) = (
            map.header.refcount_table_offset,
            u64::from(map.header.refcount_table_clusters),
        );
        let cluster = map.header.cluster_size();
        map.add(Place::Header, 0, if map.header.version == 2 { 72 } else { 112 });
        map.l1(bytes, Place::L1, l1, l1_size);
        map.add(Place::RefcountTable, refcounts, clusters * cluster);
        for at in (refcounts..refcounts + clusters * cluster).step_by(8) {
            map.add(Place::RefcountBlock, word(bytes, at) & OFFSET, cluster);
        }
        map.snapshots(bytes);
        map.bitmaps(bytes);
        map
    }

    fn add(&mut self, place: Place, offset: u64, len: u64) {
        if len > 0 && (offset > 0 || place == Place::Header) && offset < self.len {
            self.places.push((place, offset..(offset + len).min(self.len)));
        }
    }

    fn l1(&mut self, bytes: &[u8], place: Place, offset: u64, size: u32) {
        let len = u64::from(size) * 8;
        self.add(place, offset, len);
        for at in (offset..offset + len).step_by(8) {
            self.add(Place::L2, word(bytes, at) & OFFSET, self.header.cluster_size());
        }
    }

    fn snapshots(&mut self, bytes: &[u8]) {
        let mut at = self.header.snapshots_offset;
        for _ in 0..self.header.nb_snapshots {
            let at_32 = |at: u64| (word(bytes, at) >> 32) as u32;
            let (offset, size) = (word(bytes, at), at_32(at + 8));
            let strings = u64::from(at_32(at + 12) >> 16) + u64::from(at_32(at + 12) & 0xffff);
            let len = 40 + u64::from(at_32(at + 36)) + strings;
            self.add(Place::SnapshotTable, at, len);
            self.l1(bytes, Place::SnapshotL1, offset, size);
            at += len.next_multiple_of(8);
        }
    }

    fn bitmaps(&mut self, bytes: &[u8]) {
        let Some(bitmaps) = self.header.bitmaps() else {
            return;
        };
        let (offset, size) = (bitmaps.directory_offset.get(), bitmaps.directory_size.get());
        self.add(Place::BitmapDirectory, offset, size);
        let entries = (word(bytes, offset + 8) >> 32) * 8;
        self.add(Place::BitmapTable, word(bytes, offset), entries);
    }

    fn pick(&self, rng: &mut Rng, place: Option<Place>) -> Option<(Place, Range<u64>)> {
        let places: Vec<_> = self
            .places
            .iter()
            .filter(|(p, _)| place.is_none_or(|place| place == *p))
            .collect();
        // First the kind, so that few tables are hit as often as many.
        let kind = places.get(rng.below(places.len().max(1) as u64) as usize)?.0;
        let kinds: Vec<Place> = places
            .iter()
            .map(|(place, _)| *place)
            .fold(Vec::new(), |mut all, place| {
                if !all.contains(&place) {
                    all.push(place);
                }
                all
            });
        let kind = if rng.one_in(3) {
            kind
        } else {
            kinds[rng.below(kinds.len() as u64) as usize]
        };
        let of_kind: Vec<_> = places.iter().filter(|(place, _)| *place == kind).collect();
        Some((*of_kind[rng.below(of_kind.len() as u64) as usize]).clone())
    }

    /// A word in a place, often one that is not zero.
    fn pick_word(&self, bytes: &[u8], range: &Range<u64>, rng: &mut Rng) -> u64 {
        let words = (range.end - range.start).div_ceil(8);
        let at = |n: u64| range.start + n * 8;
        let used: Vec<u64> = (0..words).map(at).filter(|at| word(bytes, *at) != 0).collect();
        if used.is_empty() || rng.one_in(5) {
            at(rng.below(words))
        } else {
            used[rng.below(used.len() as u64) as usize]
        }
    }

    fn new_word(&self, bytes: &[u8], old: u64, range: &Range<u64>, rng: &mut Rng) -> u64 {
        let cluster = self.header.cluster_size();
        let flags = old & !OFFSET;
        match rng.below(9) {
            0 => rng.word(),
            1 => 0,
            2 => word(bytes, self.pick_word(bytes, range, rng)),
            3 => flags | (rng.below(self.len / cluster + 1) * cluster),
            4 => flags | (self.len + rng.below(1 << 30)) & OFFSET,
            5 => old ^ 1 << rng.below(64),
            6 => old ^ 1 << 63,
            7 => old | 1 << rng.below(9),
            _ => old ^ 0x200,
        }
    }

    /// Damages the bytes of an image, and says how.
    pub fn damage(&self, bytes: &mut Vec<u8>, rng: &mut Rng) -> String {
        let Some((place, range)) = self.pick(rng, None) else {
            return "nothing".to_owned();
        };
        let cluster = self.header.cluster_size();
        match rng.below(12) {
            0 => {
                let from = range.start as usize;
                let to = range.end.min(range.start + 64).min(bytes.len() as u64) as usize;
                bytes
                    .get_mut(from..to)
                    .into_iter()
                    .flatten()
                    .for_each(|byte| *byte = rng.word() as u8);
                format!("64 random bytes at {from:#x} in {place:?}")
            }
            1 if place != Place::Header => {
                let range = range.start as usize..(range.end as usize).min(bytes.len());
                bytes
                    .get_mut(range.clone())
                    .into_iter()
                    .flatten()
                    .for_each(|byte| *byte = 0);
                format!("zeros over {range:?} in {place:?}")
            }
            2 => {
                let clusters = self.len.div_ceil(cluster);
                let len =
                    (clusters - rng.below(clusters / 2)) * cluster - if rng.one_in(2) { 0 } else { 512 };
                bytes.truncate(len as usize);
                format!("truncated to {len:#x}")
            }
            3 => {
                let at = range.start + rng.below(range.end - range.start);
                if let Some(byte) = bytes.get_mut(at as usize) {
                    *byte = rng.word() as u8;
                }
                format!("a random byte at {at:#x} in {place:?}")
            }
            4 | 5 => self.recount(bytes, rng),
            _ => {
                let at = self.pick_word(bytes, &range, rng);
                let old = word(bytes, at);
                let new = self.new_word(bytes, old, &range, rng);
                if let Some(bytes) = bytes.get_mut(at as usize..at as usize + 8) {
                    bytes.copy_from_slice(&new.to_be_bytes());
                }
                format!("{old:#x} became {new:#x} at {at:#x} in {place:?}")
            }
        }
    }

    /// Changes the refcounts of some clusters: bytes of a block.
    pub fn recount(&self, bytes: &mut [u8], rng: &mut Rng) -> String {
        let Some((_, range)) = self.pick(rng, Some(Place::RefcountBlock)) else {
            return "nothing".to_owned();
        };
        let used = (self.len / self.header.cluster_size()) << self.header.refcount_order >> 3;
        let mut said = "counts".to_owned();
        for _ in 0..1 + rng.below(4) {
            let at = range.start + rng.below((range.end - range.start).min(used + 2));
            let new = rng.below(4) as u8;
            if let Some(byte) = bytes.get_mut(at as usize) {
                said += &format!(" {at:#x}: {byte} -> {new}");
                *byte = new;
            }
        }
        said
    }
}

/// An image's bytes.
pub fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}
