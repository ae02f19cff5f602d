//! What a block says about itself, so that reading it back needs no copy of what was written.
//!
//! A block holds the number of the request that wrote it, where in the request it stood, and where it was meant to
//! go; the rest of it is a pattern that follows from those. A block that is torn, stale, of another image or in the
//! wrong place cannot look right.

use std::fmt;

use super::rng::mix;

/// The place of an append's block: the device chooses it.
pub const ANYWHERE: u32 = u32::MAX;

/// One block of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Number of the request, never used twice on an image; [`round_of`] is in it.
    pub id: u64,
    /// Zone that the request was for.
    pub zone: u32,
    /// Block of the zone that it was meant for, or [`ANYWHERE`].
    pub at: u32,
    /// Which block of the request this is.
    pub index: u32,
}

/// What was found in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Only zeros.
    Zeros,
    /// A whole stamp.
    Stamp(Stamp),
    /// Neither.
    Garbage {
        /// The stamp at the block's start, if it has one and the rest does not fit it.
        torn: Option<Stamp>,
    },
}

/// The round in which a request was made.
pub fn round_of(id: u64) -> u64 {
    id >> 40
}

/// The first number of a round's requests.
pub fn first_id(round: u64) -> u64 {
    round << 40
}

const MAGIC: u64 = u64::from_le_bytes(*b"zbd-kill");
const HEADER_WORDS: usize = 4;

impl Stamp {
    /// Fills a block. `image` is the number of the image, which is in the pattern.
    pub fn fill(&self, image: u64, block: &mut [u8]) {
        for (i, word) in block.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&self.word(image, i).to_le_bytes());
        }
    }

    fn word(&self, image: u64, i: usize) -> u64 {
        match i {
            0 => MAGIC,
            1 => self.id,
            2 => u64::from(self.zone) | u64::from(self.at) << 32,
            3 => u64::from(self.index),
            _ => {
                let header = self.id ^ mix(self.word(image, 2)) ^ mix(u64::from(self.index) ^ image);
                mix(header.wrapping_add(i as u64))
            }
        }
    }
}

impl Content {
    /// Looks at a block.
    pub fn of(image: u64, block: &[u8]) -> Content {
        let word = |i: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&block[8 * i..8 * i + 8]);
            u64::from_le_bytes(bytes)
        };
        if word(0) != MAGIC {
            let zeros = block.iter().all(|&byte| byte == 0);
            return if zeros {
                Content::Zeros
            } else {
                Content::Garbage { torn: None }
            };
        }
        let stamp = Stamp {
            id: word(1),
            zone: word(2) as u32,
            at: (word(2) >> 32) as u32,
            index: word(3) as u32,
        };
        let whole = (HEADER_WORDS - 1..block.len() / 8).all(|i| word(i) == stamp.word(image, i));
        if whole {
            Content::Stamp(stamp)
        } else {
            Content::Garbage { torn: Some(stamp) }
        }
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stamp { id, zone, at, index } = *self;
        let number = id & ((1 << 40) - 1);
        write!(f, "block {index} of request {number} of round {}", round_of(id))?;
        match at {
            ANYWHERE => write!(f, ", an append to zone {zone}"),
            _ => write!(f, ", a write to zone {zone} block {at}"),
        }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Content::Zeros => f.write_str("zeros"),
            Content::Stamp(stamp) => stamp.fmt(f),
            Content::Garbage { torn: Some(stamp) } => write!(f, "a damaged block ({stamp})"),
            Content::Garbage { torn: None } => f.write_str("bytes that nobody wrote"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp {
        id: 3 << 40 | 77,
        zone: 9,
        at: 100,
        index: 2,
    };

    #[test]
    fn a_block_tells_its_stamp() {
        for size in [512, 4096] {
            let mut block = vec![0; size];
            assert_eq!(Content::of(1, &block), Content::Zeros);
            STAMP.fill(1, &mut block);
            assert_eq!(Content::of(1, &block), Content::Stamp(STAMP));
        }
    }

    #[test]
    fn every_damaged_byte_is_seen() {
        let mut good = vec![0; 512];
        STAMP.fill(1, &mut good);
        for at in 0..good.len() {
            let mut block = good.clone();
            block[at] ^= 0x10;
            assert!(
                matches!(Content::of(1, &block), Content::Garbage { .. }),
                "byte {at}"
            );
        }
        let mut tail = vec![0; 512];
        tail[511] = 1;
        assert_eq!(Content::of(1, &tail), Content::Garbage { torn: None });
    }

    #[test]
    fn a_block_of_another_image_is_damaged() {
        let mut block = vec![0; 512];
        STAMP.fill(1, &mut block);
        assert_eq!(Content::of(2, &block), Content::Garbage { torn: Some(STAMP) });
    }
}
