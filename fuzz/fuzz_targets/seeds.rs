//! Writes the corpora: small valid images with a bit of everything, and some forgeries of zones.

#[allow(dead_code, reason = "used by the fuzz target")]
#[path = "../../crates/qcow2/tests/hostile/exercise.rs"]
mod exercise;
#[allow(dead_code, reason = "used by the fuzz target")]
#[path = "../../crates/qcow2/tests/hostile/forge.rs"]
mod forge;
#[allow(dead_code, reason = "used by the fuzz target")]
#[path = "../../crates/qcow2/tests/hostile/memory.rs"]
mod memory;
#[path = "../../crates/qcow2/tests/hostile/random.rs"]
mod random;

use std::path::Path;

use random::Rng;
use zbdkit_io::{Runtime, RuntimeOptions};
use zbdkit_testkit::diff::forged;

/// The images' bytes in all.
const MOST: usize = 160 << 10;
/// The largest one.
const LARGEST: usize = 14 << 10;

fn main() -> std::io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let runtime = Runtime::new(RuntimeOptions::default())?;
    std::fs::create_dir_all(corpus.join("image"))?;
    let mut left = MOST;
    for seed in 0..400u64 {
        let subject = runtime.block_on(forge::valid(&mut Rng(seed)));
        let mut bytes = seed.to_be_bytes().to_vec();
        bytes.extend(subject.image.read(0, subject.image.len() as usize));
        if bytes.len() <= LARGEST.min(left) {
            left -= bytes.len();
            std::fs::write(corpus.join(format!("image/valid{seed}")), bytes)?;
        }
    }
    std::fs::create_dir_all(corpus.join("zones"))?;
    for image in 0..forged::IMAGES {
        std::fs::write(corpus.join(format!("zones/valid{image}")), [image, 0, 0, 0, 0, 0, 0, 0, 0, 1])?;
    }
    for seed in 0..60 {
        std::fs::write(corpus.join(format!("zones/forged{seed}")), forged::random_input(seed))?;
    }
    Ok(())
}
