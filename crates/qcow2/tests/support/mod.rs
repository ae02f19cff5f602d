//! What the tests of images share: QEMU's own tools, a disk that loses power, a small generator of random numbers.
#![allow(dead_code, reason = "each test uses its part")]

pub mod crash;
pub mod device;
pub mod power;
pub mod qemu;

use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::Path;

use zbdkit_io::{File, FileKind, Runtime, RuntimeOptions};

/// Runs a future to its end on a runtime of its own.
pub fn block_on<F: Future>(future: F) -> F::Output {
    Runtime::new(RuntimeOptions::default()).unwrap().block_on(future)
}

/// Opens a file for reading and writing; it is made where there is none.
pub fn open_file(path: &Path) -> File {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap();
    File::from_fd(OwnedFd::from(file), FileKind::default())
}

/// SplitMix64: small, and the same on every machine.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// The next 64 bits.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.word() % n
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
