//! What an image must hold: a model of one small number a sector.
//!
//! The data that is written comes from a set of *sources*, files of 64 KiB each of whose sectors is unlike all
//! others. A write takes its bytes from the start of a source, over and over; so a sector of a source that is found
//! at another place than the model says names the write that it came from.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use anyhow::{Result, bail};

use crate::kill::rng::Rng;

/// Bytes of a sector, the unit of all requests.
pub const SECTOR: u64 = 512;
/// Sectors of a source.
const SOURCE: u64 = 128;
/// Sources whose sectors compress well.
const COMPRESSIBLE: u64 = 24;
/// All sources; what the last ones hold is random, and so does not compress.
pub const SOURCES: u64 = 32;

/// What a sector holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Tag(u16);

impl Tag {
    /// Zeros.
    pub const ZERO: Tag = Tag(0);
    const FIRST_OF_SOURCES: u16 = 256;

    fn of_source(source: u64, sector: u64) -> Tag {
        Tag(Tag::FIRST_OF_SOURCES + (source * SOURCE + sector % SOURCE) as u16)
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("zeros"),
            byte @ 1..Tag::FIRST_OF_SOURCES => write!(f, "bytes {byte:#04x}"),
            tag => {
                let tag = u64::from(tag - Tag::FIRST_OF_SOURCES);
                write!(f, "sector {} of source {}", tag % SOURCE, tag / SOURCE)
            }
        }
    }
}

/// What a write writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// This byte, not zero.
    Byte(u8),
    /// A source, from its start, over and over.
    Source(u64),
}

impl Pattern {
    /// Any pattern.
    pub fn random(rng: &mut Rng) -> Pattern {
        if rng.one_in(4) {
            Pattern::Byte(1 + rng.below(255) as u8)
        } else {
            Pattern::Source(rng.below(SOURCES))
        }
    }

    fn tag(self, sector: u64) -> Tag {
        match self {
            Pattern::Byte(byte) => Tag(byte.into()),
            Pattern::Source(source) => Tag::of_source(source, sector),
        }
    }
}

/// The bytes behind the tags.
#[derive(Debug)]
pub struct Sources {
    bytes: Vec<u8>,
    zeros: [u8; SECTOR as usize],
}

impl Default for Sources {
    fn default() -> Self {
        let mut rng = Rng::new(0x5ec7_0125);
        let mut bytes = Vec::with_capacity((SOURCES * SOURCE * SECTOR) as usize);
        for source in 0..SOURCES {
            for sector in 0..SOURCE {
                let stamp = ((source << 32) | (sector << 8) | 0x5a) ^ 0x4141_4141_0000_0000;
                for word in 0..SECTOR / 8 {
                    let word = if source < COMPRESSIBLE {
                        stamp + ((word & 3) << 56)
                    } else {
                        rng.number()
                    };
                    bytes.extend(word.to_le_bytes());
                }
            }
        }
        Sources {
            bytes,
            zeros: [0; SECTOR as usize],
        }
    }
}

impl Sources {
    /// The name of a source's file.
    pub fn name(source: u64) -> String {
        format!("source{source}")
    }

    /// Writes the sources as files into a directory, for those who take their data from there.
    ///
    /// # Errors
    /// Of the file system.
    pub fn save(&self, directory: &Path) -> Result<()> {
        for (source, bytes) in (0..).zip(self.bytes.chunks((SOURCE * SECTOR) as usize)) {
            std::fs::write(directory.join(Sources::name(source)), bytes)?;
        }
        Ok(())
    }

    /// `len` bytes of a pattern.
    pub fn render(&self, pattern: Pattern, len: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len as usize);
        for sector in 0..len / SECTOR {
            self.push(pattern.tag(sector), &mut bytes);
        }
        bytes
    }

    fn push(&self, tag: Tag, bytes: &mut Vec<u8>) {
        match tag.0 {
            byte @ 0..Tag::FIRST_OF_SOURCES => bytes.resize(bytes.len() + SECTOR as usize, byte as u8),
            tag => {
                let start = usize::from(tag - Tag::FIRST_OF_SOURCES) * SECTOR as usize;
                bytes.extend_from_slice(&self.bytes[start..start + SECTOR as usize]);
            }
        }
    }

    fn is(&self, tag: Tag, sector: &[u8]) -> bool {
        match tag.0 {
            0 => sector == self.zeros,
            byte @ 1..Tag::FIRST_OF_SOURCES => sector.iter().all(|found| u16::from(*found) == byte),
            tag => {
                let start = usize::from(tag - Tag::FIRST_OF_SOURCES) * SECTOR as usize;
                sector == &self.bytes[start..start + SECTOR as usize]
            }
        }
    }

    /// In words, what a sector that should hold something else holds.
    fn describe(&self, sector: &[u8]) -> String {
        let last = Tag::of_source(SOURCES - 1, SOURCE - 1).0;
        (0..=last).map(Tag).find(|tag| self.is(*tag, sector)).map_or_else(
            || format!("unknown bytes {:02x?}...", &sector[..16]),
            |tag| tag.to_string(),
        )
    }
}

/// What a device must hold.
#[derive(Clone, Default)]
pub struct Content {
    tags: Vec<Tag>,
    /// Sectors that hold what their tag says, or zeros: parts of clusters that were discarded.
    maybe: Vec<Range<u64>>,
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Content({} sectors)", self.tags.len())
    }
}

impl Content {
    /// Zeros of that many bytes.
    pub fn zeros(len: u64) -> Content {
        Content {
            tags: vec![Tag::ZERO; (len / SECTOR) as usize],
            maybe: Vec::new(),
        }
    }

    /// Size in bytes.
    pub fn len(&self) -> u64 {
        self.tags.len() as u64 * SECTOR
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.tags.is_empty()
    }

    /// The device has another size; what is new reads as zeros.
    pub fn resize(&mut self, len: u64) {
        self.tags.resize((len / SECTOR) as usize, Tag::ZERO);
        self.certain(len / SECTOR..u64::MAX);
    }

    /// A write of `pattern`.
    pub fn write(&mut self, range: Range<u64>, pattern: Pattern) {
        let sectors = range.start / SECTOR..range.end / SECTOR;
        for (position, sector) in sectors.clone().enumerate() {
            self.tags[sector as usize] = pattern.tag(position as u64);
        }
        self.certain(sectors);
    }

    /// A range becomes zeros.
    pub fn zero(&mut self, range: Range<u64>) {
        let sectors = range.start / SECTOR..range.end / SECTOR;
        self.tags[sectors.start as usize..sectors.end as usize].fill(Tag::ZERO);
        self.certain(sectors);
    }

    /// A range keeps what it holds, or becomes zeros, sector by sector.
    pub fn perhaps_zero(&mut self, range: Range<u64>) {
        if !range.is_empty() {
            self.maybe.push(range.start / SECTOR..range.end / SECTOR);
        }
    }

    /// Takes over what another device holds, as far as both reach.
    pub fn take(&mut self, other: &Content) {
        let both = self.tags.len().min(other.tags.len());
        self.tags[..both].copy_from_slice(&other.tags[..both]);
        self.certain(0..both as u64);
        let within = |range: &Range<u64>| range.start..range.end.min(both as u64);
        self.maybe
            .extend(other.maybe.iter().map(within).filter(|range| !range.is_empty()));
    }

    /// All bytes.
    pub fn render(&self, sources: &Sources) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.len() as usize);
        for tag in &self.tags {
            sources.push(*tag, &mut bytes);
        }
        bytes
    }

    /// Compares bytes that were read at `offset`. What was uncertain is from now on what was read.
    ///
    /// # Errors
    /// Where they differ, and how.
    pub fn compare(&mut self, sources: &Sources, bytes: &[u8], offset: u64) -> Result<()> {
        let first = offset / SECTOR;
        let range = first..first + bytes.len() as u64 / SECTOR;
        let mut wrong = Vec::new();
        for (sector, found) in range.clone().zip(bytes.chunks(SECTOR as usize)) {
            let Some(tag) = self.tags.get_mut(sector as usize) else {
                bail!("there is something at {}, past the end", sector * SECTOR);
            };
            if sources.is(*tag, found) {
                continue;
            }
            if sources.is(Tag::ZERO, found) && self.maybe.iter().any(|range| range.contains(&sector)) {
                *tag = Tag::ZERO;
                continue;
            }
            wrong.push(sector);
        }
        self.certain(range);
        let Some(at) = wrong.first() else {
            return Ok(());
        };
        let found = &bytes[((at - first) * SECTOR) as usize..][..SECTOR as usize];
        let run = wrong.iter().zip(*at..).take_while(|(a, b)| *a == b).count();
        bail!(
            "{} sectors are wrong, the first {run} from offset {} on: {}, should be {}",
            wrong.len(),
            at * SECTOR,
            sources.describe(found),
            self.tags[*at as usize]
        )
    }

    /// A range is no longer uncertain.
    fn certain(&mut self, sectors: Range<u64>) {
        if self.maybe.is_empty() {
            return;
        }
        let old = std::mem::take(&mut self.maybe);
        for range in old {
            for part in [
                range.start..range.end.min(sectors.start),
                range.start.max(sectors.end)..range.end,
            ] {
                if !part.is_empty() {
                    self.maybe.push(part);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sector_of_the_sources_is_unlike_all_others_and_no_pattern_of_bytes() {
        let sources = Sources::default();
        let mut seen = std::collections::HashSet::new();
        for sector in sources.bytes.chunks(SECTOR as usize) {
            assert!(seen.insert(sector.to_vec()));
            assert!(sector.iter().any(|byte| *byte != sector[0]));
        }
        assert_eq!(seen.len() as u64, SOURCES * SOURCE);
    }

    #[test]
    fn a_wrong_sector_is_named_with_the_write_that_it_came_from() {
        let sources = Sources::default();
        let mut content = Content::zeros(8 * SECTOR);
        content.write(SECTOR..4 * SECTOR, Pattern::Source(3));
        let mut bytes = content.render(&sources);
        content.compare(&sources, &bytes, 0).unwrap();
        bytes.copy_within(512..1024, 2048);
        let said = content.compare(&sources, &bytes, 0).unwrap_err().to_string();
        assert!(
            said.contains("offset 2048 on: sector 0 of source 3, should be zeros"),
            "{said}"
        );
        let mut other = content.clone();
        other.write(2048..2560, Pattern::Byte(7));
        other.compare(&sources, &bytes, 0).unwrap_err();
    }

    #[test]
    fn what_was_discarded_in_part_is_what_is_read_first_and_then_stays() {
        let sources = Sources::default();
        let mut content = Content::zeros(4 * SECTOR);
        content.write(0..4 * SECTOR, Pattern::Source(1));
        let before = content.render(&sources);
        content.perhaps_zero(SECTOR..3 * SECTOR);
        let mut after = before.clone();
        after[512..1024].fill(0);
        content.compare(&sources, &after, 0).unwrap();
        content.compare(&sources, &before, 0).unwrap_err();
        after[1024..1536].fill(0);
        content.compare(&sources, &after, 0).unwrap_err();
    }
}
