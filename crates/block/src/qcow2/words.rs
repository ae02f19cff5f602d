//! The bare tables of write pointers that drafts of QEMU's keep: how their words are read, and checked.

use std::collections::BTreeMap;

use zbdkit_spec::qcow2::{
    ZONE_WORD_A_CONVENTIONAL, ZONE_WORD_A_POINTER, ZONE_WORD_CONVENTIONAL, ZONE_WORD_POINTER,
};
use zbdkit_zone::ZoneRecord;

use super::extension::{Draft, Zones};

/// How the words of a table are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reading {
    big_endian: bool,
    /// The bit that marks a conventional zone.
    conventional: u64,
    /// The bits of the write pointer.
    pointer: u64,
    /// Where a full zone's pointer may be beyond its capacity: at the end of the zone.
    full_at_end: bool,
}

const NEWEST: Reading = Reading {
    big_endian: true,
    conventional: ZONE_WORD_CONVENTIONAL,
    pointer: ZONE_WORD_POINTER,
    full_at_end: false,
};
const OLD: Reading = Reading {
    big_endian: true,
    conventional: ZONE_WORD_A_CONVENTIONAL,
    pointer: ZONE_WORD_A_POINTER,
    full_at_end: true,
};

/// The readings that a draft may want. The older ones wrote words in the byte order of the machine.
fn readings(draft: Draft) -> Vec<Reading> {
    let little = |reading| Reading {
        big_endian: false,
        ..reading
    };
    match draft {
        Draft::C => vec![NEWEST],
        Draft::A | Draft::V7 => vec![little(OLD), OLD],
        Draft::B => vec![NEWEST, little(NEWEST), little(OLD), OLD],
    }
}

/// What the words of a table say of the zones: those that are not empty, with their written ends. A full zone is written
/// whole, since no word tells what a finish skipped. The error is QEMU's of the table's first fault.
pub fn records(zones: &Zones, size: u64, bytes: &[u8]) -> Result<BTreeMap<u32, ZoneRecord>, String> {
    let mut found: Option<BTreeMap<u32, ZoneRecord>> = None;
    let mut fault = None;
    for reading in readings(zones.draft) {
        match read(zones, size, bytes, reading) {
            Err(error) => fault = fault.or(Some(error)),
            Ok(records) if found.as_ref().is_none_or(|other| *other == records) => found = Some(records),
            Ok(_) => {
                return Err(
                    "the zone table makes sense in both byte orders, so it cannot be told what it says"
                        .into(),
                );
            }
        }
    }
    match (found, fault) {
        (Some(records), _) => Ok(records),
        (None, fault) => Err(fault.unwrap_or_default()),
    }
}

/// What can be told from a table that is damaged: the zones whose words make sense, and what is wrong with the others.
pub fn salvage(zones: &Zones, size: u64, bytes: &[u8]) -> (BTreeMap<u32, ZoneRecord>, BTreeMap<u32, String>) {
    let sorted = |reading| {
        let mut records = BTreeMap::new();
        let mut faults = BTreeMap::new();
        for (zone, word) in (0..zones.nr_zones).zip(words(bytes, reading)) {
            match written(zones, size, zone, word, reading) {
                Ok(0) => {}
                Ok(written) => drop(records.insert(zone, record(written))),
                Err(fault) => drop(faults.insert(zone, fault)),
            }
        }
        (records, faults)
    };
    let all = readings(zones.draft).into_iter().map(sorted);
    all.min_by_key(|(_, faults)| faults.len()).unwrap_or_default()
}

fn record(written: u64) -> ZoneRecord {
    ZoneRecord {
        written,
        ..ZoneRecord::default()
    }
}

fn words(bytes: &[u8], reading: Reading) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(move |word| {
        let word = word.try_into().expect("chunks of eight");
        match reading.big_endian {
            true => u64::from_be_bytes(word),
            false => u64::from_le_bytes(word),
        }
    })
}

fn read(
    zones: &Zones,
    size: u64,
    bytes: &[u8],
    reading: Reading,
) -> Result<BTreeMap<u32, ZoneRecord>, String> {
    let mut records = BTreeMap::new();
    for (zone, word) in (0..zones.nr_zones).zip(words(bytes, reading)) {
        let written = written(zones, size, zone, word, reading)?;
        if written != 0 {
            records.insert(zone, record(written));
        }
    }
    Ok(records)
}

/// Bytes written to a zone.
fn written(zones: &Zones, size: u64, zone: u32, word: u64, reading: Reading) -> Result<u64, String> {
    let start = u64::from(zone) * zones.zone_size;
    let conventional = zone < zones.conventional;
    if (word & reading.conventional != 0) != conventional {
        return Err(format!(
            "Zone {zone} contradicts the header, which declares the first {} zones conventional",
            zones.conventional
        ));
    }
    if conventional {
        return Ok(0);
    }
    let pointer = word & reading.pointer;
    let device_end = size.min(start + zones.zone_size);
    let end = device_end.min(start + zones.zone_capacity);
    let is_end = reading.full_at_end && pointer == start + zones.zone_size;
    if pointer < start || (pointer > end && !is_end) {
        return Err(format!(
            "Zone {zone} has write pointer {pointer:#x} outside its writable range {start:#x}..{end:#x}"
        ));
    }
    if !pointer.is_multiple_of(512) {
        return Err(format!(
            "Zone {zone} has write pointer {pointer:#x} that is not sector aligned"
        ));
    }
    Ok(pointer.min(end) - start)
}

#[cfg(test)]
mod tests {
    use zbdkit_zone::Model;

    use super::*;

    const ZONE: u64 = 64 << 20;
    const SIZE: u64 = 4 * ZONE - (1 << 20);

    fn zones(draft: Draft) -> Zones {
        Zones {
            draft,
            model: Model::HostManaged,
            nr_zones: 4,
            zone_size: ZONE,
            zone_capacity: ZONE,
            conventional: 1,
            max_active: 0,
            max_open: 0,
            max_append: None,
            table_offset: 0,
            warnings: Vec::new(),
        }
    }

    fn table(words: [u64; 4]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    const GOOD: [u64; 4] = [1 << 63, ZONE, 2 * ZONE + 4096, SIZE];

    #[test]
    fn written_ends_are_read_and_the_short_last_zone_is_full_at_its_end() {
        let found = records(&zones(Draft::C), SIZE, &table(GOOD)).unwrap();
        let written: Vec<_> = found
            .iter()
            .map(|(zone, record)| (*zone, record.written))
            .collect();
        assert_eq!(written, [(2, 4096), (3, ZONE - (1 << 20))]);
    }

    #[test]
    fn faults_are_told_in_qemus_words() {
        let fault = |zone: usize, word| {
            let mut words = GOOD;
            words[zone] = word;
            records(&zones(Draft::C), SIZE, &table(words)).unwrap_err()
        };
        assert_eq!(
            fault(3, 0),
            "Zone 3 has write pointer 0x0 outside its writable range 0xc000000..0xff00000"
        );
        assert_eq!(
            fault(2, 3 * ZONE + 512),
            "Zone 2 has write pointer 0xc000200 outside its writable range 0x8000000..0xc000000"
        );
        assert_eq!(
            fault(1, ZONE + 0x201),
            "Zone 1 has write pointer 0x4000201 that is not sector aligned"
        );
        assert_eq!(
            fault(2, (2 * ZONE) | (1 << 63)),
            "Zone 2 contradicts the header, which declares the first 1 zones conventional"
        );
        assert_eq!(
            fault(0, 0),
            "Zone 0 contradicts the header, which declares the first 1 zones conventional"
        );
    }

    #[test]
    fn old_tables_are_read_in_the_byte_order_that_makes_sense() {
        let old = [1 << 59, ZONE, 2 * ZONE + 4096, 4 * ZONE];
        let big = table(old);
        let little: Vec<u8> = old.iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
        for draft in [Draft::A, Draft::V7, Draft::B] {
            let found = records(&zones(draft), SIZE, &big).unwrap();
            assert_eq!(found, records(&zones(draft), SIZE, &little).unwrap());
            // A finish went to the end of the zone, past the end of the device.
            assert_eq!((found[&2].written, found[&3].written), (4096, ZONE - (1 << 20)));
        }
        assert!(records(&zones(Draft::C), SIZE, &little).is_err());
    }
}
