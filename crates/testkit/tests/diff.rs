//! Images that QEMU and our driver change in turn hold what a model says. Skipped where there is no QEMU.
//!
//! ZBDKIT_DIFF_SEQUENCES makes the runs longer; `cargo xtask diff` is the long run.

use std::collections::BTreeSet;
use std::path::Path;

use zbdkit_testkit::diff::damage::Damage;
use zbdkit_testkit::diff::run::{Options, Summary, attempt, run};
use zbdkit_testkit::diff::sequence::Plan;
use zbdkit_testkit::diff::tools::Tools;

/// Options for a run below `directory`; `None`, loudly, where there is no QEMU.
fn options(directory: &Path, count: u64) -> Option<Options> {
    let tools = match Tools::find() {
        Ok(tools) => tools,
        Err(why) => {
            eprintln!("SKIPPED: needs QEMU's tools: {why}");
            return None;
        }
    };
    let count = match std::env::var("ZBDKIT_DIFF_SEQUENCES") {
        Ok(text) => text.parse().expect("ZBDKIT_DIFF_SEQUENCES is a number"),
        Err(_) => count,
    };
    Some(Options {
        tools,
        directory: directory.to_owned(),
        seed: 1,
        count,
        jobs: 2,
        shrink: 60,
        most_failures: 1,
        zbdkit: None,
        qemu_only: false,
        skip: BTreeSet::new(),
    })
}

/// A directory in memory, if there is one.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

fn passes(options: &Options) -> Summary {
    let summary = run(options, &|line| println!("{line}")).unwrap();
    assert!(summary.failures.is_empty(), "see above");
    assert_eq!(summary.passed, options.count);
    summary
}

#[test]
fn images_hold_what_the_model_says_whoever_changed_them() {
    let directory = directory();
    let Some(options) = options(directory.path(), 40) else {
        return;
    };
    let summary = passes(&options);
    // Nobody passes by having everything refused.
    for who in ["qemu", "zbdkit"] {
        for what in ["create", "write", "write zeroes", "discard", "verify"] {
            let (done, refused) = summary.counts.get(&(who, what)).copied().unwrap_or_default();
            assert!(done > 4 * refused, "{who} {what}: {done} done, {refused} refused");
        }
    }
}

#[test]
fn the_comparison_finds_nothing_wrong_with_qemu_alone() {
    let directory = directory();
    let Some(mut options) = options(directory.path(), 8) else {
        return;
    };
    options.qemu_only = true;
    passes(&options);
}

/// Damages images in the end, until one had something to damage, and returns what was said.
fn said_of(damage: Damage, qemu_only: bool) -> Option<String> {
    let directory = directory();
    let mut options = options(directory.path(), 1)?;
    options.qemu_only = qemu_only;
    (1..40)
        .map(|seed| {
            let plan = Plan {
                seed,
                damage: Some(damage),
                ..Plan::default()
            };
            let ran = attempt(&options, &plan, &directory.path().join("job")).unwrap();
            ran.error.expect("damage is found, or there is nothing to damage")
        })
        .find(|said| !said.ends_with("to damage"))
        .or_else(|| panic!("no image had anything to damage"))
}

#[test]
fn a_byte_that_changed_behind_everybody_is_found() {
    for qemu_only in [true, false] {
        let Some(said) = said_of(Damage::Byte, qemu_only) else {
            return;
        };
        assert!(said.contains("sectors are wrong"), "{said}");
    }
}

#[test]
fn a_cluster_that_fell_out_of_the_mapping_is_found() {
    for qemu_only in [true, false] {
        let Some(said) = said_of(Damage::Mapping, qemu_only) else {
            return;
        };
        assert!(said.contains("\"leaks\": 1"), "{said}");
    }
}

#[test]
fn a_cluster_in_use_that_counts_as_free_is_found() {
    for qemu_only in [true, false] {
        let Some(said) = said_of(Damage::Refcount, qemu_only) else {
            return;
        };
        assert!(said.contains("\"corruptions\":"), "{said}");
    }
}
