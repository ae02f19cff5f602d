//! The contract of docs/durability.md, held against the zoned driver over simulated raw images.

mod crash_support;

use crash_support::{
    SEED, case, caught, failing, formattable, hold, hold_every, host_aware, host_managed, many_zones, mapped,
    zoned_namespace,
};
use zbdkit_block::RunStateMode;
use zbdkit_testkit::crash::host::{FaultKind, Lie, Role};
use zbdkit_testkit::crash::suite::{Case, Crash, Tally, creation, exhaust};
use zbdkit_testkit::crash::workload::Mix;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn run_state(mut case: Case, mode: RunStateMode) -> Case {
    case.plan.run_state = mode;
    case
}

#[test]
fn host_managed_zones_keep_the_contract() {
    hold(case("managed", host_managed(), Mix::ALL), 24);
}

#[test]
fn a_mapped_run_state_keeps_the_contract() {
    hold(mapped(case("mapped", host_managed(), Mix::ALL)), 20);
}

#[test]
fn crowded_zones_keep_the_contract() {
    hold(case("crowd", host_managed(), Mix::CROWD), 20);
}

#[test]
fn crowded_zones_keep_the_contract_with_a_mapped_run_state() {
    hold(mapped(case("crowd-mapped", host_managed(), Mix::CROWD)), 16);
}

#[test]
fn host_aware_zones_keep_the_contract() {
    hold(case("aware", host_aware(), Mix::ALL), 20);
}

#[test]
fn crowded_host_aware_zones_keep_the_contract() {
    hold(mapped(case("aware-crowd", host_aware(), Mix::CROWD)), 20);
}

#[test]
fn areas_extensions_and_attributes_keep_the_contract() {
    hold(case("zns", zoned_namespace(), Mix::ZNS), 24);
    hold(mapped(case("zns-mapped", zoned_namespace(), Mix::ZNS)), 24);
}

#[test]
fn areas_extensions_and_attributes_keep_the_contract_in_all_modes_and_after_failures() {
    let zns = |name| case(name, zoned_namespace(), Mix::ZNS);
    hold(run_state(zns("zns-sync"), RunStateMode::Sync), 8);
    hold(run_state(zns("zns-none"), RunStateMode::None), 8);
    let write = FaultKind::Write;
    hold(failing(zns("zns-write"), Role::Data, write, ENOSPC), 8);
    hold(failing(zns("zns-table"), Role::Table, write, ENOSPC), 8);
    hold(
        failing(zns("zns-sync-fails"), Role::Table, FaultKind::Sync, EIO),
        8,
    );
}

#[test]
fn every_crash_of_a_short_history_in_an_area_is_allowed() {
    let few = Mix { zones: 2, ..Mix::ZNS };
    hold_every(case("zns-short", zoned_namespace(), few), 128);
}

#[test]
fn a_format_is_wholly_there_or_has_only_erased() {
    hold(case("format", formattable(), Mix::FORMAT), 20);
    hold(mapped(case("format-mapped", formattable(), Mix::FORMAT)), 20);
}

#[test]
fn a_format_keeps_the_contract_in_all_modes_and_after_failures() {
    let format = |name| case(name, formattable(), Mix::FORMAT);
    hold(run_state(format("format-sync"), RunStateMode::Sync), 8);
    hold(run_state(format("format-none"), RunStateMode::None), 8);
    let write = FaultKind::Write;
    hold(failing(format("format-table"), Role::Table, write, ENOSPC), 8);
    hold(
        failing(format("format-sync-fails"), Role::Table, FaultKind::Sync, EIO),
        8,
    );
}

#[test]
fn every_crash_of_a_short_history_with_formats_is_allowed() {
    let few = Mix {
        format: 20,
        zones: 2,
        ..Mix::FORMAT
    };
    hold_every(case("format-short", formattable(), few), 128);
}

#[test]
fn several_table_blocks_keep_the_contract() {
    let busy = Mix {
        reset_all: 4,
        flush: 15,
        ..Mix::ALL
    };
    hold(case("many", many_zones(), busy), 7);
    hold(mapped(case("many-mapped", many_zones(), busy)), 12);
}

#[test]
fn a_new_image_is_durable_once_it_was_made() {
    let states = creation(&host_managed().into(), None, SEED, 600).unwrap_or_else(|why| panic!("{why}"));
    println!("creation: {states} states");
}

#[test]
fn host_aware_zones_keep_the_contract_without_mappings_and_with_syncs() {
    hold(case("aware-written", host_aware(), Mix::CROWD), 8);
    let sync = case("aware-sync", host_aware(), Mix::CROWD);
    hold(run_state(sync, RunStateMode::Sync), 8);
}

#[test]
fn an_overwrite_that_another_write_overtook_survives_a_kill() {
    let few = Mix {
        zones: 1,
        ..Mix::DATA
    };
    let mut case = case("aware-overtaken", host_aware(), few);
    case.crash = Some(Crash::Kill);
    case.plan.requests = 8;
    hold(case, 16);
}

#[test]
fn what_a_power_cut_left_above_a_pointer_never_shows() {
    let few = Mix {
        flush: 4,
        zones: 2,
        ..Mix::DATA
    };
    let mut case = case("aware-stale", host_aware(), few);
    case.crash = Some(Crash::Power);
    case.plan.requests = 10;
    hold(case, 30);
}

#[test]
fn run_state_sync_keeps_every_acknowledged_write() {
    hold(
        run_state(case("sync", host_managed(), Mix::ALL), RunStateMode::Sync),
        8,
    );
}

#[test]
fn run_state_none_keeps_what_was_flushed() {
    hold(
        run_state(case("none", host_managed(), Mix::ALL), RunStateMode::None),
        8,
    );
}

#[test]
fn a_failed_data_sync_is_final() {
    hold(
        failing(
            case("data-sync", host_managed(), Mix::ALL),
            Role::Data,
            FaultKind::Sync,
            EIO,
        ),
        8,
    );
}

#[test]
fn a_failed_table_sync_is_final() {
    hold(
        failing(
            case("table-sync", host_managed(), Mix::ALL),
            Role::Table,
            FaultKind::Sync,
            EIO,
        ),
        8,
    );
}

#[test]
fn a_failed_table_write_is_final() {
    hold(
        failing(
            case("table-write", host_managed(), Mix::ALL),
            Role::Table,
            FaultKind::Write,
            ENOSPC,
        ),
        8,
    );
}

#[test]
fn a_failed_write_fails_alone() {
    hold(
        failing(
            case("data-write", host_managed(), Mix::ALL),
            Role::Data,
            FaultKind::Write,
            ENOSPC,
        ),
        8,
    );
}

#[test]
fn a_failed_write_fails_alone_in_host_aware_zones() {
    hold(
        failing(
            case("aware-write", host_aware(), Mix::CROWD),
            Role::Data,
            FaultKind::Write,
            EIO,
        ),
        8,
    );
}

#[test]
fn a_run_state_that_cannot_be_written_is_final() {
    hold(
        failing(
            case("run-write", host_managed(), Mix::ALL),
            Role::RunState,
            FaultKind::Write,
            ENOSPC,
        ),
        8,
    );
}

#[test]
fn every_crash_of_a_short_history_is_allowed() {
    let mut total = 0;
    for (number, mix) in [Mix::DATA, Mix::CROWD].into_iter().enumerate() {
        let mut case = case("short", host_managed(), Mix { zones: 2, ..mix });
        case.plan.clients = 2;
        case.plan.requests = 3;
        let mut tally = Tally::default();
        let result = exhaust(&case, SEED + number as u64, 256, &mut tally);
        total += result.unwrap_or_else(|violation| panic!("{violation}"));
    }
    println!("short: {total} states, all that there are up to 256 a moment");
}

#[test]
fn a_left_out_data_sync_is_caught() {
    caught(
        case("lie", host_managed(), Mix::ALL),
        Lie::Sync(Role::Data),
        Crash::Power,
    );
}

#[test]
fn a_left_out_table_sync_is_caught() {
    caught(
        case("lie", host_managed(), Mix::ALL),
        Lie::Sync(Role::Table),
        Crash::Power,
    );
}

#[test]
fn a_left_out_directory_sync_is_caught() {
    let why = creation(&host_managed().into(), Some(Lie::NameSync), SEED, 600)
        .expect_err("the lie was not found out");
    println!("{:?}: {}", Lie::NameSync, why.lines().next().unwrap_or_default());
}

#[test]
fn a_late_run_state_is_caught() {
    for case in [
        case("lie", host_managed(), Mix::CROWD),
        mapped(case("lie", host_managed(), Mix::CROWD)),
    ] {
        caught(case, Lie::LateRunState(6), Crash::Kill);
    }
}

#[test]
fn a_lost_run_state_is_caught() {
    caught(
        case("lie", host_managed(), Mix::ALL),
        Lie::NoRunState,
        Crash::Kill,
    );
}

#[test]
fn a_short_write_is_caught() {
    for role in [Role::Data, Role::Table] {
        caught(
            case("lie", host_managed(), Mix::ALL),
            Lie::ShortWrites(role),
            Crash::Kill,
        );
    }
}
