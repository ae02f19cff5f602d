//! The bare table of write pointers inside an image (layout C of `spec::qcow2`), for programs that know no other.
//!
//! It has no copies and no checksums, so it decides nothing here: the durable table does, and this one follows it,
//! never ahead. A word that falls (a reset) is written before its record and synced with it, a word that rises after
//! its record was synced: whatever a cut leaves, no word covers bytes that the durable table does not.

use std::collections::{BTreeMap, BTreeSet};

use zbdkit_io::File;
use zbdkit_spec::qcow2::ZONE_WORD_CONVENTIONAL;
use zbdkit_zone::{Geometry, ZoneNo, ZoneRecord};

use super::table::{TableError, read_at, write_at};

/// Bytes of a word.
const WORD: usize = 8;
/// Bytes that are written at once at most.
const PIECE: usize = 1 << 20;

/// The bare table, and what it holds.
pub struct Mirror {
    file: File,
    /// Where in the file it begins, bytes.
    offset: u64,
    geometry: Geometry,
    words: Vec<u64>,
    /// Words of the pieces that can be written: a sector's, or more where the storage asks for it.
    unit: usize,
}

/// Whether a zone's record says what no bare table can, and what a program that knows no other must not overlook: it must
/// not take the zone for an ordinary one.
pub fn is_beyond_bare_tables(record: &ZoneRecord) -> bool {
    record.read_only || record.offline || record.zrwa
}

/// What the word of a zone says: where the write pointer stands on the device, and whether there is one.
pub fn word(geometry: &Geometry, zone: ZoneNo, record: &ZoneRecord) -> u64 {
    let start = geometry.start(zone);
    if geometry.is_conventional(zone) {
        return start | ZONE_WORD_CONVENTIONAL;
    }
    let capacity = geometry.capacity(zone);
    start
        + if record.finished {
            capacity
        } else {
            record.written.min(capacity)
        }
}

/// The words of a device whose zones hold these records, as they lie in the file.
pub fn words(geometry: &Geometry, records: &BTreeMap<u32, ZoneRecord>) -> Vec<u8> {
    let empty = ZoneRecord::default();
    geometry
        .zones()
        .flat_map(|zone| word(geometry, zone, records.get(&zone.0).unwrap_or(&empty)).to_be_bytes())
        .collect()
}

impl Mirror {
    /// Reads the table at `offset` of `file`.
    pub async fn load(file: File, offset: u64, geometry: Geometry) -> Result<Mirror, TableError> {
        let bytes = read_at(&file, offset, WORD * geometry.nr_zones() as usize).await?;
        let words = bytes
            .chunks_exact(WORD)
            .map(|word| u64::from_be_bytes(word.try_into().expect("chunks of eight")))
            .collect();
        let unit = file.direct_align().unwrap_or(512).max(512) as usize / WORD;
        Ok(Mirror {
            file,
            offset,
            geometry,
            words,
            unit,
        })
    }

    /// Brings every word to what the records say, not synced; they must be durable. Returns how many words were not.
    pub async fn repair(&mut self, records: &BTreeMap<u32, ZoneRecord>) -> Result<u32, TableError> {
        let empty = ZoneRecord::default();
        let geometry = self.geometry;
        let zones = geometry.zones();
        let all = zones.map(|zone| (zone, records.get(&zone.0).unwrap_or(&empty)));
        self.change(all, |_, _| true).await
    }

    /// Writes the words that fall with these records, not synced; before the records are.
    pub async fn lower(&mut self, changes: &BTreeMap<u32, ZoneRecord>) -> Result<(), TableError> {
        let changes = changes.iter().map(|(zone, record)| (ZoneNo(*zone), record));
        self.change(changes, |old, new| new < old).await.map(|_| ())
    }

    /// Writes the words that rise with these records, not synced; after the records are.
    pub async fn raise(&mut self, changes: &BTreeMap<u32, ZoneRecord>) -> Result<(), TableError> {
        let changes = changes.iter().map(|(zone, record)| (ZoneNo(*zone), record));
        self.change(changes, |old, new| new > old).await.map(|_| ())
    }

    async fn change<'a>(
        &mut self,
        changes: impl Iterator<Item = (ZoneNo, &'a ZoneRecord)>,
        wanted: impl Fn(u64, u64) -> bool,
    ) -> Result<u32, TableError> {
        let mut changed = 0;
        let mut units = BTreeSet::new();
        for (zone, record) in changes {
            let new = word(&self.geometry, zone, record);
            let old = &mut self.words[zone.0 as usize];
            if *old != new && wanted(*old, new) {
                *old = new;
                changed += 1;
                units.insert(zone.0 as usize / self.unit);
            }
        }
        let mut units = units.into_iter().peekable();
        while let Some(first) = units.next() {
            let mut last = first;
            while let Some(next) =
                units.next_if(|next| *next == last + 1 && (*next - first) * self.unit * WORD < PIECE)
            {
                last = next;
            }
            self.write(first, last).await?;
        }
        Ok(changed)
    }

    /// Writes whole units. Behind the last word there are zeros: the table has its clusters for itself.
    async fn write(&self, first: usize, last: usize) -> Result<(), TableError> {
        let (start, end) = (first * self.unit, (last + 1) * self.unit);
        let mut bytes = vec![0; (end - start) * WORD];
        let words = &self.words[start..end.min(self.words.len())];
        for (place, word) in bytes.chunks_exact_mut(WORD).zip(words) {
            place.copy_from_slice(&word.to_be_bytes());
        }
        write_at(&self.file, &bytes, self.offset + (start * WORD) as u64).await
    }
}
