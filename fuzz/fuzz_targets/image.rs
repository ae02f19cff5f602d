//! A qcow2 image of any bytes: opened, read, mapped, changed, checked, repaired. What is done is what
//! `crates/qcow2/tests/hostile` does.
//!
//! Input: 8 bytes that decide with which arguments, then the image.

#![no_main]

#[path = "../../crates/qcow2/tests/hostile/exercise.rs"]
mod exercise;
#[allow(dead_code, reason = "valid images are made by `seeds`")]
#[path = "../../crates/qcow2/tests/hostile/forge.rs"]
mod forge;
#[path = "../../crates/qcow2/tests/hostile/memory.rs"]
mod memory;
#[path = "../../crates/qcow2/tests/hostile/random.rs"]
mod random;

use exercise::{Subject, exercise};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use memory::Memory;
use random::Rng;
use zbdkit_io::{Runtime, RuntimeOptions};

thread_local! {
    static RUNTIME: Runtime = Runtime::new(RuntimeOptions::default()).expect("a runtime");
}

fuzz_target!(|data: &[u8]| {
    let Some((seed, image)) = data.split_first_chunk() else {
        return;
    };
    let subject = Subject {
        image: Memory::new(image),
        data: Memory::device(&[]),
    };
    let mut rng = Rng(u64::from_be_bytes(*seed));
    RUNTIME.with(|runtime| runtime.block_on(exercise(&subject, &mut rng)));
});

// libFuzzer knows nothing of where an image has its tables; half of the time they are what is changed.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut rng = Rng(seed.into());
    if size < 8 + 512 || rng.one_in(2) {
        return fuzzer_mutate(data, size, max_size);
    }
    let image = Memory::new(&data[8..size]);
    RUNTIME.with(|runtime| runtime.block_on(forge::forge(&image, &mut rng)));
    if rng.one_in(2) {
        data[..8].copy_from_slice(&rng.word().to_be_bytes());
    }
    let len = (image.len() as usize).min(max_size - 8);
    data[8..8 + len].copy_from_slice(&image.read(0, len));
    8 + len
});
