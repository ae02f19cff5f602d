//! Forged zone extensions and zone tables in qcow2 images do no harm. The fuzz target `zones` does the same with what
//! libFuzzer thinks of.
//!
//! ZBDKIT_HOSTILE_CASES makes it longer, ZBDKIT_HOSTILE_SEED plays one case again.

use std::sync::mpsc;
use std::time::Duration;

use zbdkit_io::{Runtime, RuntimeOptions};
use zbdkit_testkit::diff::forged::{IMAGES, random_input, run};

/// Longer than a case takes on the slowest machine.
const HANGS: Duration = Duration::from_secs(120);

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable)
        .ok()
        .map(|text| text.parse().expect("a number"))
}

/// Runs a case, and ends the process where it does not end. Whether the image could be opened for writing.
fn watched(runtime: &Runtime, what: String, input: &[u8]) -> bool {
    let (ended, wait) = mpsc::channel::<()>();
    let told = what.clone();
    let watchdog = std::thread::spawn(move || {
        if wait.recv_timeout(HANGS) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{told} hangs");
            std::process::abort();
        }
    });
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(runtime, input)));
    drop(ended);
    watchdog.join().unwrap();
    result.unwrap_or_else(|panic| {
        eprintln!("{what} failed");
        std::panic::resume_unwind(panic)
    })
}

#[test]
fn forged_zones_do_no_harm() {
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    let seeds = match number("ZBDKIT_HOSTILE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("ZBDKIT_HOSTILE_CASES").unwrap_or(400),
    };
    let mut opened = [0; 2];
    for seed in seeds {
        let could = watched(&runtime, format!("seed {seed}"), &random_input(seed));
        opened[usize::from(could)] += 1;
    }
    // What is refused and what is used with its forgery are both many, or little was tried.
    println!("{} refused, {} opened", opened[0], opened[1]);
    let all = opened[0] + opened[1];
    assert!(
        all < 100 || opened.iter().all(|part| part * 10 > all),
        "{opened:?}"
    );
}

#[test]
fn images_that_nobody_forged_take_everything() {
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    for image in 0..IMAGES {
        let input = [image, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        assert!(watched(&runtime, format!("image {image}"), &input));
    }
}
