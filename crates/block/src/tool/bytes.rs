//! Looking at the bytes of buffers.

use std::ops::Range;

use zbdkit_io::IoBuf;

/// Looked at in one go, so that it stays in the cache.
const STEP: usize = 4096;

/// Whether all bytes of a buffer are zero.
pub fn is_zero(buf: &IoBuf) -> bool {
    let mut step = [0; STEP];
    steps(buf.len(), STEP).all(|range| {
        let step = &mut step[..range.len()];
        buf.slice(range).copy_to(step);
        all_zero(step)
    })
}

/// Where two buffers of the same length first differ, to the beginning of the 512 bytes.
pub fn first_difference(a: &IoBuf, b: &IoBuf) -> Option<usize> {
    debug_assert_eq!(a.len(), b.len());
    let (mut left, mut right) = ([0; STEP], [0; STEP]);
    steps(a.len(), STEP).find_map(|range| {
        let (left, right) = (&mut left[..range.len()], &mut right[..range.len()]);
        a.slice(range.clone()).copy_to(left);
        b.slice(range.clone()).copy_to(right);
        let sector = left
            .chunks(512)
            .zip(right.chunks(512))
            .position(|(a, b)| a != b)?;
        Some(range.start + 512 * sector)
    })
}

/// The clusters in which two buffers differ, as far as the buffers hold them: parts of the device from `at` on.
pub fn differing_clusters(cluster: u64, at: u64, a: &IoBuf, b: &IoBuf) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut start = 0;
    while start < a.len() {
        let left = cluster - (at + start as u64) % cluster;
        let end = a.len().min(start + left as usize);
        if first_difference(&a.slice(start..end), &b.slice(start..end)).is_some() {
            match runs.last_mut() {
                Some(run) if run.end == start => run.end = end,
                _ => runs.push(start..end),
            }
        }
        start = end;
    }
    runs
}

/// The runs of a buffer that have data, where `hole` bytes of zeros or more separate two of them. Runs begin at
/// multiples of a block that is at most `hole` long, and end at them or at the buffer's end.
pub fn data_runs(buf: &IoBuf, hole: usize) -> Vec<Range<usize>> {
    let block = (hole + 1).next_power_of_two() / 2;
    let block = block.clamp(512, STEP);
    let mut step = [0; STEP];
    let mut runs: Vec<Range<usize>> = Vec::new();
    for range in steps(buf.len(), block) {
        let bytes = &mut step[..range.len()];
        buf.slice(range.clone()).copy_to(bytes);
        if all_zero(bytes) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if range.start - run.end < hole => run.end = range.end,
            _ => runs.push(range),
        }
    }
    runs
}

fn steps(len: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(step).map(move |at| at..(at + step).min(len))
}

fn all_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(64)
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(len: usize, data: &[usize]) -> IoBuf {
        let mut bytes = vec![0; len];
        data.iter().for_each(|at| bytes[*at] = 1);
        IoBuf::from_vec(bytes)
    }

    fn up_to(end: usize) -> Vec<Range<usize>> {
        std::iter::once(0..end).collect()
    }

    #[test]
    fn zeros_are_told_from_data_to_the_last_byte() {
        assert!(is_zero(&with(10_000, &[])));
        for at in [0, 4095, 4096, 9_999] {
            assert!(!is_zero(&with(10_000, &[at])), "{at}");
        }
    }

    #[test]
    fn differences_are_found_in_their_sector() {
        let zeros = with(10_000, &[]);
        assert_eq!(first_difference(&zeros, &zeros), None);
        for (at, sector) in [(0, 0), (511, 0), (512, 512), (5000, 4608), (9_999, 9728)] {
            assert_eq!(first_difference(&zeros, &with(10_000, &[at])), Some(sector));
        }
    }

    #[test]
    fn clusters_are_those_of_the_device() {
        let zeros = with(10_000, &[]);
        let other = with(10_000, &[0, 3999, 4000, 9_000]);
        // 96 + 4000 is the beginning of one.
        assert_eq!(differing_clusters(4096, 96, &zeros, &other), up_to(10_000));
        let other = with(10_000, &[3999, 8096]);
        assert_eq!(
            differing_clusters(4096, 96, &zeros, &other),
            [0..4000, 8096..10_000]
        );
    }

    #[test]
    fn only_long_zeros_separate_runs() {
        let buf = with(64 << 10, &[0, 5000, 30_000, (64 << 10) - 1]);
        assert_eq!(data_runs(&buf, 4096), [0..8192, 28_672..32_768, 61_440..65_536]);
        assert_eq!(
            data_runs(&buf, 512),
            [0..512, 4608..5120, 29_696..30_208, 65_024..65_536]
        );
        assert_eq!(data_runs(&buf, 24 << 10), [0..32_768, 61_440..65_536]);
        assert_eq!(data_runs(&buf, 1 << 20), up_to(65_536));
        assert!(data_runs(&with(64 << 10, &[]), 4096).is_empty());
        assert_eq!(data_runs(&with(1000, &[999]), 4096), up_to(1000));
    }
}
