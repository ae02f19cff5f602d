//! Forged images: whatever a file says, nothing panics, hangs, takes memory by its numbers, or writes where it must not.
//!
//! ZBDKIT_HOSTILE_CASES makes it longer, ZBDKIT_HOSTILE_SEED plays the one case that failed with that seed again. The fuzz
//! targets in `fuzz/` do the same with what libFuzzer thinks of.

mod exercise;
mod forge;
mod memory;
mod random;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use proptest::prelude::*;
use rustix::process::{Resource, Rlimit, setrlimit};
use zbdkit_io::{Runtime, RuntimeOptions};
use zbdkit_qcow2::{Header, Repair, check};

use exercise::{Subject, exercise};
use memory::Memory;
use random::Rng;

/// Longer than a case takes on the slowest machine.
const HANGS: Duration = Duration::from_secs(120);
/// What all of this may take of memory, bytes: what a case of a few MiB and its copies need, several times over.
const MEMORY: u64 = 1 << 30;

fn cases(usual: u32) -> ProptestConfig {
    let cases = std::env::var("ZBDKIT_HOSTILE_CASES")
        .ok()
        .and_then(|text| text.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(usual),
        failure_persistence: None,
        // A seed is not made smaller.
        max_shrink_iters: 0,
        ..ProptestConfig::default()
    }
}

/// The seed of a case.
fn seeds() -> BoxedStrategy<u64> {
    match std::env::var("ZBDKIT_HOSTILE_SEED") {
        Ok(seed) => Just(seed.parse().expect("a number")).boxed(),
        Err(_) => any::<u64>().boxed(),
    }
}

/// Runs a case, with little memory, and ends the process where it does not end.
fn limited(seed: u64, case: impl AsyncFnOnce(&mut Rng)) {
    let limit = Rlimit {
        current: Some(MEMORY),
        maximum: Some(MEMORY),
    };
    setrlimit(Resource::Data, limit).unwrap();
    let (ended, wait) = mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if wait.recv_timeout(HANGS) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("the case of seed {seed} hangs");
            std::process::abort();
        }
    });
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    runtime.block_on(case(&mut Rng(seed)));
    drop(ended);
    watchdog.join().unwrap();
}

/// How many forgeries were refused, and how many were used.
static OPENED: [AtomicU32; 2] = [const { AtomicU32::new(0) }; 2];

/// What a seed of the structured forgeries does.
async fn forged(rng: &mut Rng) {
    let subject = forge::valid(rng).await;
    forge::forge(&subject.image, rng).await;
    let opened = exercise(&subject, rng).await;
    OPENED[usize::from(opened)].fetch_add(1, Ordering::Relaxed);
    // Both are many, or little was tried.
    let [refused, used] = OPENED.each_ref().map(|count| count.load(Ordering::Relaxed));
    assert!(
        refused + used < 100 || refused.min(used) * 10 > refused + used,
        "{refused} refused, {used} used"
    );
}

proptest! {
    #![proptest_config(cases(120))]

    #[test]
    fn a_forged_field_does_no_harm(seed in seeds()) {
        limited(seed, forged);
    }

    #[test]
    fn bytes_changed_at_random_do_no_harm(seed in seeds()) {
        limited(seed, async |rng: &mut Rng| {
            let subject = forge::valid(rng).await;
            forge::noise(&subject.image, rng);
            exercise(&subject, rng).await;
        });
    }

    #[test]
    fn a_header_of_random_bytes_does_no_harm(seed in seeds()) {
        limited(seed, async |rng: &mut Rng| {
            let mut bytes: Vec<u8> = (0..4096).map(|_| rng.word() as u8).collect();
            bytes[..8].copy_from_slice(&[b'Q', b'F', b'I', 0xfb, 0, 0, 0, 2 + rng.below(2) as u8]);
            // Some fields are right, or nothing would get far.
            bytes[20..24].copy_from_slice(&(9 + rng.below(3) as u32).to_be_bytes());
            bytes[32..36].fill(0);
            let subject = Subject { image: Memory::new(&bytes), data: Memory::device(&[]) };
            exercise(&subject, rng).await;
        });
    }
}

#[test]
fn an_image_that_nobody_forged_takes_everything() {
    for seed in 0..12 {
        limited(seed, async |rng: &mut Rng| {
            let subject = forge::valid(rng).await;
            let file = subject.image.file();
            let header = Header::read(&file).await.unwrap();
            let mut unseen = |_, _| {};
            let report = check(&file, &header, None, &[], Repair::None, &mut unseen);
            let report = report.await.unwrap();
            assert_eq!(
                (report.corruptions, report.check_errors),
                (0, 0),
                "{:?}",
                report.messages
            );
            assert!(exercise(&subject, rng).await);
        });
    }
}
