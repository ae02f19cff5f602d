//! Blocks that are marked uncorrectable, held against docs/durability.md: a mark that was acknowledged is there, and goes only
//! with data that is; nothing that nobody marked is lost.

mod crash_support;

use crash_support::{
    case, caught, failing, hold, hold_every, host_aware, host_managed, mapped, zoned_namespace,
};
use zbdkit_block::{CreateOptions, Qcow2Layout, RunStateMode};
use zbdkit_testkit::crash::host::{FaultKind, Lie, Role};
use zbdkit_testkit::crash::image::Image;
use zbdkit_testkit::crash::suite::Crash;
use zbdkit_testkit::crash::workload::Mix;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

const AREAS: Mix = Mix {
    zns: 14,
    ..Mix::MARKS
};

fn qcow2(cluster_size: u64) -> Image {
    let layout = Qcow2Layout {
        cluster_size,
        ..Qcow2Layout::default()
    };
    Image::qcow2(host_managed(), layout)
}

/// Blocks of a sector, most of them conventional: the list of marks becomes longer than what a device writes at once.
fn scattered() -> CreateOptions {
    CreateOptions {
        block_size: 512,
        conventional_zones: 9,
        ..host_managed()
    }
}

#[test]
fn long_lists_of_marks_keep_the_contract() {
    let mostly = Mix {
        mark: 100,
        set: 0,
        zones: 0,
        ..Mix::MARKS
    };
    let mut case = case("marks-many", scattered(), mostly);
    case.plan.requests = 40;
    hold(case, 12);
}

#[test]
fn marks_keep_the_contract() {
    hold(case("marks", host_managed(), Mix::MARKS), 24);
    hold(mapped(case("marks-mapped", host_managed(), Mix::MARKS)), 24);
}

#[test]
fn marks_in_host_aware_zones_keep_the_contract() {
    hold(case("marks-aware", host_aware(), Mix::MARKS), 16);
    hold(mapped(case("marks-aware-mapped", host_aware(), Mix::MARKS)), 16);
}

#[test]
fn marks_in_areas_keep_the_contract() {
    hold(case("marks-zns", zoned_namespace(), AREAS), 24);
    hold(mapped(case("marks-zns-mapped", zoned_namespace(), AREAS)), 16);
}

#[test]
fn marks_in_qcow2_keep_the_contract() {
    hold(case("marks-qcow2", qcow2(4096), Mix::MARKS), 8);
    hold(mapped(case("marks-qcow2-512", qcow2(512), Mix::MARKS)), 6);
    hold(case("marks-qcow2-64k", qcow2(65536), Mix::MARKS), 6);
}

#[test]
fn marks_keep_the_contract_in_all_modes_and_after_failures() {
    let marks = |name| case(name, host_managed(), Mix::MARKS);
    for (name, mode) in [
        ("marks-sync", RunStateMode::Sync),
        ("marks-none", RunStateMode::None),
    ] {
        let mut case = marks(name);
        case.plan.run_state = mode;
        hold(case, 8);
    }
    for (name, role, kind, errno) in [
        ("marks-data-write", Role::Data, FaultKind::Write, ENOSPC),
        ("marks-data-sync", Role::Data, FaultKind::Sync, EIO),
        ("marks-table-write", Role::Table, FaultKind::Write, ENOSPC),
        ("marks-table-sync", Role::Table, FaultKind::Sync, EIO),
    ] {
        hold(failing(marks(name), role, kind, errno), 8);
    }
}

#[test]
fn every_crash_of_a_short_history_with_marks_is_allowed() {
    let few = Mix {
        mark: 60,
        zones: 2,
        ..Mix::MARKS
    };
    hold_every(case("marks-short", host_managed(), few), 64);
}

#[test]
fn left_out_syncs_under_marks_are_caught() {
    for lie in [Lie::Sync(Role::Data), Lie::Sync(Role::Table)] {
        caught(case("lie", host_managed(), Mix::MARKS), lie, Crash::Power);
    }
}
