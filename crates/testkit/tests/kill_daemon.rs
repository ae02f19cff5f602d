//! A short run of `zbdkit-kill`'s rounds. The daemon is another package's program, so it is tested where it was built:
//! `ZBDKIT_BIN` names it, or it lies beside this test.

use std::ffi::OsString;
use std::path::PathBuf;

use zbdkit_testkit::kill::{Contract, Door, Format, Options, run};

/// The daemon, or `None` with a note.
fn program() -> Option<PathBuf> {
    if let Some(program) = std::env::var_os("ZBDKIT_BIN") {
        return Some(program.into());
    }
    let test = std::env::current_exe().expect("this test has a path");
    let beside = test.parent()?.parent()?.join("zbdkit");
    if beside.exists() {
        return Some(beside);
    }
    eprintln!(
        "SKIPPED: {} is not there; build it with `cargo build -p zbdkit` or name one in ZBDKIT_BIN",
        beside.display()
    );
    None
}

fn rounds(format: Format, run_state: &str, contract: Contract) {
    let create =
        "--size 20M --zone-size 1M --zone-capacity 960K --conventional 2 --max-open 6 --max-active 12";
    rounds_by(Door::VhostUserBlk, create, format, run_state, contract);
}

fn nvme_rounds(format: Format, run_state: &str, contract: Contract) {
    let create = "--size 20M --zone-size 1M --zone-capacity 960K --max-open 8 --max-active 14 --zrwa-size 64K \
                  --zrwa-granularity 16K --max-zrwa 2";
    rounds_by(Door::Nvme, create, format, run_state, contract);
}

fn rounds_by(door: Door, create: &str, format: Format, run_state: &str, contract: Contract) {
    let Some(zbdkit) = program() else { return };
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        zbdkit,
        dir: dir.path().to_owned(),
        format,
        door,
        rounds: 6,
        seed: 42,
        queues: 2,
        run_state: run_state.to_owned(),
        direct: false,
        contract,
        max_acks: 1500,
        create: create.split_whitespace().map(OsString::from).collect(),
        serve: Vec::new(),
        max_failures: 1,
    };
    let summary = run(&options, &mut |line| println!("{line}")).unwrap();
    assert!(summary.failures.is_empty(), "{:?}", summary.failures);
    assert_eq!(summary.passed, 6);
    // Not passing because nothing happens.
    assert!(
        summary.counts.total() > 200 && summary.counts.kept > 50,
        "{:?}",
        summary.counts
    );
}

#[test]
fn acknowledged_writes_survive_a_kill() {
    rounds(Format::Raw, "beside", Contract::Acknowledged);
}

#[test]
fn acknowledged_writes_to_qcow2_survive_a_kill_and_nothing_is_corrupt() {
    rounds(Format::Qcow2, "beside", Contract::Acknowledged);
}

#[test]
fn flushed_writes_survive_a_kill_without_a_run_state() {
    rounds(Format::Raw, "none", Contract::Flushed);
    rounds(Format::Qcow2, "none", Contract::Flushed);
}

#[test]
fn over_nvme_acknowledged_writes_survive_a_kill_in_random_write_areas_too() {
    nvme_rounds(Format::Raw, "beside", Contract::Acknowledged);
    nvme_rounds(Format::Qcow2, "beside", Contract::Acknowledged);
}

#[test]
fn over_nvme_flushed_writes_survive_a_kill_without_a_run_state() {
    nvme_rounds(Format::Raw, "none", Contract::Flushed);
}
