//! What is measured: operations, where they go, and the data by which they are verified.

use serde::Serialize;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Unit of stamping, in bytes. Every block size is a multiple of it.
pub const PAGE: usize = 4096;

/// Size of the device and of its zones, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    pub size: u64,
    pub zone_size: u64,
}

/// What a row does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    RandomRead,
    SequentialWrite,
    /// Zone append; a sequential write where there are no appends.
    Append,
    /// Every write to another zone than the one before it, the zones in turn in an order that looks random.
    SpreadWrite,
}

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Workload {
    pub kind: Kind,
    /// Bytes of each request.
    pub block: u32,
    /// Requests in flight on each queue.
    pub depth: u32,
}

impl Workload {
    pub fn name(&self) -> String {
        let kind = match self.kind {
            Kind::RandomRead => "random read",
            Kind::SequentialWrite => "seq zone write",
            Kind::Append => "zone append",
            Kind::SpreadWrite => "spread write",
        };
        format!("{kind} {:>3}K QD{}", self.block / 1024, self.depth)
    }
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    pub iops: f64,
}

/// Offsets of random reads: xorshift64*, good enough to defeat read-ahead and cheap.
pub struct RandomOffsets {
    state: u64,
    blocks: u64,
    block: u64,
}

impl RandomOffsets {
    pub fn new(geometry: Geometry, block: u32, seed: u64) -> Self {
        let block = u64::from(block);
        RandomOffsets {
            state: seed.wrapping_mul(2).wrapping_add(1),
            blocks: geometry.size / block,
            block,
        }
    }

    /// The next offset in bytes.
    #[inline]
    pub fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        let random = self.state.wrapping_mul(0x2545_F491_4F6C_DD1D);
        ((u128::from(random) * u128::from(self.blocks)) >> 64) as u64 * self.block
    }
}

/// Offsets of a write pass: each of the thread's zones from its start to its end, one after the other, or in turns.
pub struct WriteOffsets {
    geometry: Geometry,
    block: u64,
    thread: u64,
    threads: u64,
    zone: u64,
    within: u64,
    /// Of a spread: how many blocks were given, and how many there are.
    spread: Option<(u64, u64)>,
}

/// Bytes that a thread's share of a spread comes to, all threads together: the same whatever the device's size.
pub const SPREAD: u64 = 512 << 20;

impl WriteOffsets {
    pub fn new(geometry: Geometry, workload: Workload, thread: usize, threads: usize) -> Self {
        let (thread, threads) = (thread as u64, threads as u64);
        let block = u64::from(workload.block);
        let blocks = SPREAD.min(geometry.size) / block / threads;
        WriteOffsets {
            geometry,
            block,
            thread,
            threads,
            zone: thread,
            within: 0,
            spread: (workload.kind == Kind::SpreadWrite).then_some((0, blocks)),
        }
    }

    /// The next block of a spread. Zones are taken in steps that have no divisor in common with their number, a
    /// power of two.
    fn next_spread(&mut self) -> Option<(u64, u64)> {
        let (given, blocks) = self.spread.as_mut()?;
        let zones = self.geometry.size / self.geometry.zone_size / self.threads;
        let zone = given.wrapping_mul(0x9e37_79b9) % zones * self.threads + self.thread;
        let within = *given / zones * self.block;
        if *given >= *blocks || within + self.block > self.geometry.zone_size {
            return None;
        }
        *given += 1;
        let start = zone * self.geometry.zone_size;
        Some((start, start + within))
    }

    /// Start of the zone and offset of the block, in bytes; none once all zones are full.
    #[inline]
    pub fn next(&mut self) -> Option<(u64, u64)> {
        if self.spread.is_some() {
            return self.next_spread();
        }
        if self.within + self.block > self.geometry.zone_size {
            self.zone += self.threads;
            self.within = 0;
        }
        if (self.zone + 1) * self.geometry.zone_size > self.geometry.size {
            return None;
        }
        let start = self.zone * self.geometry.zone_size;
        let at = start + self.within;
        self.within += self.block;
        Some((start, at))
    }

    /// Starts of the zones that this thread writes.
    pub fn zones(&self) -> impl Iterator<Item = u64> {
        let Geometry { size, zone_size } = self.geometry;
        (self.thread..size / zone_size)
            .step_by(self.threads as usize)
            .map(move |zone| zone * zone_size)
    }
}

/// Marks page `number` of pass `seed`.
#[inline]
pub fn stamp(seed: u64, number: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// The bytes of each page behind its stamp.
pub fn background(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| ((i % PAGE).wrapping_mul(167) >> 3) as u8 ^ 0x5a)
        .collect()
}

/// Whether `data` is a block written in pass `seed` whose first page is `number`.
pub fn check(data: &[u8], seed: u64, number: u64) -> bool {
    let background = background(PAGE);
    data.chunks(PAGE).zip(number..).all(|(page, number)| {
        page.len() == PAGE && page[..16] == stamp(seed, number) && page[16..] == background[16..]
    })
}

/// Up to `count` of `0..total`, evenly spread, with the last ones among them.
pub fn sample_positions(total: u64, count: u64) -> Vec<u64> {
    if total <= count * 2 {
        return (0..total).collect();
    }
    let mut positions: Vec<u64> = (0..count).map(|i| i * (total - count) / count).collect();
    positions.extend(total - count..total);
    positions
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry {
        size: 10 * 65536,
        zone_size: 65536,
    };

    const WRITES: Workload = Workload {
        kind: Kind::SequentialWrite,
        block: 4096,
        depth: 1,
    };

    #[test]
    fn a_spread_goes_through_all_zones_in_turn_and_writes_each_in_order() {
        const ZONES: u64 = 64;
        let geometry = Geometry {
            size: ZONES << 20,
            zone_size: 1 << 20,
        };
        let workload = Workload {
            kind: Kind::SpreadWrite,
            block: 65536,
            ..WRITES
        };
        for threads in [1, 2, 4] {
            let mut next = [0; ZONES as usize];
            for thread in 0..threads {
                let mut offsets = WriteOffsets::new(geometry, workload, thread, threads);
                let mut last = u64::MAX;
                while let Some((zone, at)) = offsets.next() {
                    assert_ne!(zone, last);
                    last = zone;
                    let next = &mut next[(zone >> 20) as usize];
                    assert_eq!(at, zone + *next);
                    *next += 65536;
                }
            }
            assert_eq!(next, [1 << 20; ZONES as usize]);
        }
    }

    #[test]
    fn writes_fill_every_zone_once_in_order_over_all_threads() {
        for threads in 1..=3 {
            let mut seen = Vec::new();
            for thread in 0..threads {
                let mut offsets = WriteOffsets::new(GEOMETRY, WRITES, thread, threads);
                let zones: Vec<_> = offsets.zones().collect();
                let mut last = None;
                while let Some((zone, at)) = offsets.next() {
                    assert!(zones.contains(&zone) && last < Some(at));
                    last = Some(at);
                    seen.push(at);
                }
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..160).map(|i| i * 4096).collect::<Vec<_>>());
        }
    }

    #[test]
    fn random_offsets_are_aligned_and_cover_the_device() {
        let mut offsets = RandomOffsets::new(GEOMETRY, 4096, 1);
        let seen: std::collections::BTreeSet<_> = (0..5000).map(|_| offsets.next()).collect();
        assert_eq!(seen.len(), 160);
        assert!(seen.iter().all(|at| at % 4096 == 0 && *at < GEOMETRY.size));
    }

    #[test]
    fn a_block_of_another_pass_or_place_does_not_check() {
        let mut data = background(2 * PAGE);
        data[..16].copy_from_slice(&stamp(7, 20));
        data[PAGE..PAGE + 16].copy_from_slice(&stamp(7, 21));
        assert!(check(&data, 7, 20));
        assert!(!check(&data, 8, 20) && !check(&data, 7, 21));
        data[2 * PAGE - 1] ^= 1;
        assert!(!check(&data, 7, 20));
    }

    #[test]
    fn samples_end_with_the_last() {
        assert_eq!(sample_positions(3, 4), [0, 1, 2]);
        let positions = sample_positions(1000, 10);
        assert!(positions.len() == 20 && positions.ends_with(&[998, 999]));
    }
}
