//! A small seeded generator (splitmix64): the same seed makes the same decisions.

/// Random numbers from a seed.
#[derive(Debug, Clone)]
pub struct Rng(u64);

/// A number that looks unlike its neighbours.
pub(super) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

impl Rng {
    /// The generator of that seed.
    pub fn new(seed: u64) -> Self {
        Rng(mix(seed ^ 0x6b69_6c6c))
    }

    /// A generator of its own for part `n` of what this seed decides.
    pub fn fork(&self, n: u64) -> Self {
        Rng(mix(self.0 ^ mix(n.wrapping_add(1))))
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    /// One of `from..=to`, small ones as likely as large ones of the same number of bits.
    pub fn skewed(&mut self, from: u64, to: u64) -> u64 {
        let span = (to - from + 1).max(1);
        let bits = 64 - span.leading_zeros();
        let end = span.min(1 << self.below(u64::from(bits) + 1).min(63));
        from + self.below(end.max(1))
    }

    /// Yes in one of `n` cases.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
