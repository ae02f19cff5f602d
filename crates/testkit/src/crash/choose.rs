//! Where decisions come from: a seeded generator, or a counter that walks through all of them.

/// A source of decisions.
pub trait Choose {
    /// A number below `n`, which is not 0.
    fn below(&mut self, n: u64) -> u64;

    /// Which pieces of something that was cut short are there.
    fn pieces(&mut self, count: usize) -> Pieces;
}

/// Which of the 512-byte pieces of a change took effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pieces {
    /// None of them.
    None,
    /// The whole change.
    All,
    /// Those marked.
    Some(Vec<bool>),
}

impl Pieces {
    /// Whether piece `index` is there.
    pub fn has(&self, index: usize) -> bool {
        match self {
            Pieces::None => false,
            Pieces::All => true,
            Pieces::Some(there) => there.get(index).copied().unwrap_or(false),
        }
    }
}

/// Mixes two numbers into a seed.
pub fn mix(a: u64, b: u64) -> u64 {
    let mut rng = Rng::new(a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    rng.word() ^ b
}

/// SplitMix64: small, and the same on every machine.
#[derive(Clone, Debug)]
pub struct Rng {
    state: u64,
    /// How much of what is uncertain survives, in sixteenths; drawn once a state, so that states in which nearly
    /// everything or nearly nothing survived come up too.
    bias: u64,
}

impl Rng {
    /// The generator of this seed.
    pub fn new(seed: u64) -> Rng {
        Rng { state: seed, bias: 8 }
    }

    /// The generator of this seed with a survival rate drawn from it.
    pub fn biased(seed: u64) -> Rng {
        let mut rng = Rng::new(seed);
        rng.bias = [0, 1, 4, 8, 8, 12, 15, 16][rng.below(8) as usize];
        rng
    }

    /// The next 64 bits.
    pub fn word(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

impl Choose for Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.word() % n
    }

    fn pieces(&mut self, count: usize) -> Pieces {
        let kept = self.below(16) < self.bias;
        if count > 1 && self.one_in(3) {
            let cut = self.below(count as u64 + 1) as usize;
            let at = |index: usize| index < cut;
            return Pieces::Some(match self.below(3) {
                0 => (0..count).map(at).collect(),
                1 => (0..count).map(|index| !at(index)).collect(),
                _ => (0..count).map(|_| self.below(16) < self.bias).collect(),
            });
        }
        if kept { Pieces::All } else { Pieces::None }
    }
}

/// Walks through all sequences of decisions, the last one fastest.
#[derive(Clone, Debug, Default)]
pub struct Odometer {
    /// Decision and number of choices at each turn.
    digits: Vec<(u64, u64)>,
    at: usize,
}

impl Odometer {
    /// Prepares the next sequence; false when all have been walked.
    pub fn advance(&mut self) -> bool {
        self.at = 0;
        while let Some((digit, n)) = self.digits.pop() {
            if digit + 1 < n {
                self.digits.push((digit + 1, n));
                return true;
            }
        }
        false
    }
}

impl Choose for Odometer {
    fn below(&mut self, n: u64) -> u64 {
        if self.at == self.digits.len() {
            self.digits.push((0, n));
        }
        self.at += 1;
        self.digits[self.at - 1].0
    }

    /// None, all, the first half, the second half.
    fn pieces(&mut self, count: usize) -> Pieces {
        let half = count / 2;
        match self.below(if count > 1 { 4 } else { 2 }) {
            0 => Pieces::None,
            1 => Pieces::All,
            2 => Pieces::Some((0..count).map(|index| index < half).collect()),
            _ => Pieces::Some((0..count).map(|index| index >= half).collect()),
        }
    }
}
