//! Random requests, with a liking for the borders of clusters and for places that were written before.

use std::ops::Range;

use crate::kill::rng::Rng;

use super::content::{Pattern, SECTOR};
use super::layout::Layout;
use super::world::Op;

/// A request has at most so many bytes.
const LONGEST: u64 = 4 << 20;
/// And a batch writes at most so many in all.
const MOST: u64 = 8 << 20;

/// Requests for a device of `size` bytes, in waves whose members touch different bytes.
pub fn batch(rng: &mut Rng, layout: &Layout, size: u64) -> Vec<Vec<Op>> {
    let mut left = MOST;
    let mut generator = Generator {
        cluster: layout.cluster_size,
        compressed: !layout.data_file && rng.one_in(3),
        size,
        hot: rng.below(size.div_ceil(layout.cluster_size)) * layout.cluster_size,
        rng,
    };
    (0..generator.rng.skewed(1, 4))
        .map(|_| {
            let mut wave = Vec::new();
            for _ in 0..generator.rng.skewed(1, 10) {
                let op = generator.op();
                let len = op.range().map_or(0, |range| range.end - range.start);
                if len <= left && wave.iter().all(|other| generator.apart(&op, other)) {
                    left -= len;
                    wave.push(op);
                }
            }
            wave
        })
        .collect()
}

struct Generator<'a> {
    rng: &'a mut Rng,
    cluster: u64,
    size: u64,
    /// Start of the cluster near which half of the requests are.
    hot: u64,
    compressed: bool,
}

impl Generator<'_> {
    fn op(&mut self) -> Op {
        let pattern = Pattern::random(self.rng);
        match self.rng.below(20) {
            0..=8 => Op::Write {
                range: self.range(),
                pattern,
            },
            9..=11 if self.compressed => {
                let start = self.start() / self.cluster * self.cluster;
                Op::WriteCompressed {
                    range: start..(start + self.cluster).min(self.size),
                    pattern,
                }
            }
            9..=11 => Op::Write {
                range: self.clusters(),
                pattern,
            },
            12..=13 => Op::WriteZeroes {
                range: self.range(),
                unmap: self.rng.one_in(2),
            },
            14 => Op::WriteZeroes {
                range: self.clusters(),
                unmap: self.rng.one_in(2),
            },
            15 => Op::Discard { range: self.range() },
            16 => Op::Discard {
                range: self.clusters(),
            },
            17..=18 => Op::Read { range: self.range() },
            _ => Op::Flush,
        }
    }

    fn start(&mut self) -> u64 {
        let near = match self.rng.below(5) {
            0..=2 => self.hot + self.rng.below(4 * self.cluster),
            3 => self.size.saturating_sub(self.rng.below(2 * self.cluster)),
            _ => self.rng.below(self.size),
        };
        near.min(self.size - SECTOR) / SECTOR * SECTOR
    }

    fn range(&mut self) -> Range<u64> {
        let start = self.start();
        let start = match self.rng.below(3) {
            0 => start / self.cluster * self.cluster,
            1 => start / (self.cluster / 32).max(SECTOR) * (self.cluster / 32).max(SECTOR),
            _ => start,
        };
        let len = match self.rng.below(4) {
            0 => SECTOR,
            1 => SECTOR * self.rng.skewed(1, self.cluster / SECTOR),
            2 => (self.cluster / 32).max(SECTOR) * self.rng.skewed(1, 64),
            _ => SECTOR * self.rng.skewed(1, 6 * self.cluster / SECTOR),
        };
        start..(start + len.min(LONGEST)).min(self.size)
    }

    /// Whole clusters, but for the device's end.
    fn clusters(&mut self) -> Range<u64> {
        let start = self.start() / self.cluster * self.cluster;
        let len = (self.cluster * self.rng.skewed(1, 8)).min(LONGEST);
        start..(start + len).min(self.size)
    }

    /// Whether both can go at once; a compressed cluster is one thing.
    fn apart(&self, a: &Op, b: &Op) -> bool {
        let (Some(first), Some(second)) = (a.range(), b.range()) else {
            return true;
        };
        let whole = [a, b].iter().any(|op| matches!(op, Op::WriteCompressed { .. }));
        let unit = if whole { self.cluster } else { SECTOR };
        let spread = |range: &Range<u64>| range.start / unit..range.end.div_ceil(unit);
        let (first, second) = (spread(first), spread(second));
        first.end <= second.start || second.end <= first.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_of_a_wave_touch_different_sectors_inside_the_device() {
        for seed in 0..300 {
            let mut rng = Rng::new(seed);
            let layout = Layout::random(&mut rng, false);
            let size = layout.random_size(&mut rng);
            for wave in batch(&mut rng, &layout, size) {
                for (index, op) in wave.iter().enumerate() {
                    let Some(range) = op.range() else { continue };
                    assert!(range.start < range.end && range.end <= size, "{op:?}");
                    assert_eq!((range.start | range.end) % SECTOR, 0, "{op:?}");
                    for other in wave[..index].iter().filter_map(Op::range) {
                        assert!(range.end <= other.start || other.end <= range.start, "{wave:?}");
                    }
                }
            }
        }
    }
}
