//! The contract of docs/durability.md on qcow2 images, and the format's own promise: a crash leaves nothing corrupt.

mod crash_support;

use crash_support::{
    SEED, case, caught, failing, formattable, hold, host_aware, host_managed, many_zones, mapped, tried,
    zoned_namespace,
};
use zbdkit_block::{CreateOptions, Qcow2Layout, RunStateMode};
use zbdkit_testkit::crash::host::{FaultKind, Lie, Role};
use zbdkit_testkit::crash::image::Image;
use zbdkit_testkit::crash::suite::{Case, Crash, creation, offline};
use zbdkit_testkit::crash::workload::Mix;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn layout(cluster_size: u64) -> Qcow2Layout {
    Qcow2Layout {
        cluster_size,
        ..Qcow2Layout::default()
    }
}

/// Host-managed zones in clusters of this size.
fn managed(cluster_size: u64) -> Image {
    Image::qcow2(host_managed(), layout(cluster_size))
}

/// One conventional zone and five sequential ones of 256 KiB: some clusters of the usual size in each.
fn large_zones() -> CreateOptions {
    CreateOptions {
        zone_size: Some(256 << 10),
        zone_capacity: Some(200 << 10),
        conventional_zones: 1,
        max_open: Some(3),
        max_active: 4,
        max_append: Some(16 << 10),
        ..CreateOptions::new("", 6 * (256 << 10))
    }
}

/// Everything by which conventional zones are written without a flush.
const CONVENTIONAL: Mix = Mix {
    write: 40,
    zeros: 10,
    discard: 16,
    set: 0,
    ..Mix::ALL
};

#[test]
fn host_managed_zones_keep_the_contract() {
    hold(case("qcow2-4k", managed(4096), Mix::ALL), 8);
    hold(mapped(case("qcow2-512", managed(512), Mix::ALL)), 6);
}

#[test]
fn clusters_of_the_usual_size_keep_the_contract() {
    let image = Image::qcow2(large_zones(), layout(65536));
    hold(case("qcow2-64k", image.clone(), Mix::ALL), 6);
    hold(mapped(case("qcow2-64k-crowd", image, Mix::CROWD)), 4);
}

/// Zones with areas and extensions in clusters of this size.
fn namespace(cluster_size: u64) -> Image {
    Image::qcow2(zoned_namespace(), layout(cluster_size))
}

#[test]
fn areas_extensions_and_attributes_keep_the_contract() {
    hold(case("qcow2-zns", namespace(4096), Mix::ZNS), 8);
    hold(mapped(case("qcow2-zns-512", namespace(512), Mix::ZNS)), 8);
    hold(case("qcow2-zns-32k", namespace(32768), Mix::ZNS), 6);
    let subclusters = Qcow2Layout {
        extended_l2: true,
        ..layout(16384)
    };
    let image = Image::qcow2(zoned_namespace(), subclusters);
    hold(mapped(case("qcow2-zns-subclusters", image, Mix::ZNS)), 6);
}

#[test]
fn areas_extensions_and_attributes_keep_the_contract_over_a_base_and_with_snapshots() {
    let over = namespace(4096).over(namespace(8192));
    hold(case("qcow2-zns-over", over, Mix::ZNS), 6);
    let snapshots = namespace(4096).with_snapshots();
    hold(case("qcow2-zns-snapshots", snapshots, Mix::ZNS), 6);
}

#[test]
fn snapshots_with_areas_and_extensions_are_made_applied_and_deleted_wholly_or_not_at_all() {
    tell(short(case("steps-zns", namespace(4096), Mix::ZNS)), 4);
}

#[test]
fn a_format_is_wholly_there_or_has_only_erased() {
    let image = |cluster_size| Image::qcow2(formattable(), layout(cluster_size));
    hold(case("qcow2-format", image(4096), Mix::FORMAT), 8);
    hold(mapped(case("qcow2-format-16k", image(16384), Mix::FORMAT)), 6);
    let snapshots = image(4096).with_snapshots();
    hold(case("qcow2-format-snapshots", snapshots, Mix::FORMAT), 6);
    let over = image(4096).over(image(8192));
    hold(case("qcow2-format-over", over, Mix::FORMAT), 6);
}

#[test]
fn snapshots_bring_back_the_block_size_that_they_were_made_with() {
    let image = Image::qcow2(formattable(), layout(4096));
    tell(short(case("steps-format", image, Mix::FORMAT)), 4);
}

#[test]
fn crowded_zones_keep_the_contract() {
    hold(case("qcow2-crowd", managed(4096), Mix::CROWD), 6);
    hold(mapped(case("qcow2-crowd-mapped", managed(8192), Mix::CROWD)), 6);
}

#[test]
fn conventional_zones_keep_the_contract() {
    hold(case("qcow2-conventional", managed(4096), CONVENTIONAL), 8);
}

#[test]
fn host_aware_zones_keep_the_contract() {
    let image = Image::qcow2(host_aware(), layout(4096));
    hold(case("qcow2-aware", image.clone(), Mix::ALL), 6);
    hold(mapped(case("qcow2-aware-crowd", image, Mix::CROWD)), 6);
}

#[test]
fn subclusters_keep_the_contract() {
    let layout = Qcow2Layout {
        extended_l2: true,
        ..layout(16384)
    };
    hold(
        case(
            "qcow2-subclusters",
            Image::qcow2(host_managed(), layout),
            Mix::ALL,
        ),
        6,
    );
}

#[test]
fn refcounts_of_any_width_keep_the_contract() {
    for (name, refcount_bits, cluster_size) in [("qcow2-1-bit", 1, 1024), ("qcow2-64-bit", 64, 512)] {
        let layout = Qcow2Layout {
            refcount_bits,
            ..layout(cluster_size)
        };
        hold(case(name, Image::qcow2(host_managed(), layout), Mix::ALL), 4);
    }
}

#[test]
fn several_table_blocks_keep_the_contract() {
    let busy = Mix {
        reset_all: 4,
        flush: 15,
        ..Mix::ALL
    };
    let image = Image::qcow2(many_zones(), layout(4096));
    hold(case("qcow2-many", image, busy), 4);
}

#[test]
fn an_external_data_file_keeps_the_contract() {
    let layout = Qcow2Layout {
        data_file: Some("disk.data".into()),
        ..layout(4096)
    };
    hold(
        case("qcow2-data", Image::qcow2(host_managed(), layout), Mix::ALL),
        6,
    );
}

#[test]
fn an_overlay_keeps_the_contract_and_its_base_unchanged() {
    let over = |base: Image| managed(4096).over(base);
    hold(case("qcow2-over-qcow2", over(managed(8192)), Mix::ALL), 5);
    hold(
        case("qcow2-over-raw", over(Image::Raw(host_managed())), CONVENTIONAL),
        5,
    );
}

#[test]
fn an_image_with_snapshots_keeps_the_contract_and_the_snapshots() {
    hold(
        case("qcow2-snapshots", managed(4096).with_snapshots(), CONVENTIONAL),
        6,
    );
    let aware = Image::qcow2(host_aware(), layout(4096)).with_snapshots();
    hold(case("qcow2-aware-snapshots", aware, Mix::CROWD), 4);
}

/// Steps of a story, and the states of each, are what a history is elsewhere.
fn tell(case: Case, share: u64) {
    tried(case.name, share, 150, |effort, seed, replay, tally| {
        offline(&case, effort, seed, replay, tally)
    });
}

fn short(mut case: Case) -> Case {
    case.plan.clients = 3;
    case.plan.requests = 12;
    case
}

#[test]
fn snapshots_are_made_applied_and_deleted_wholly_or_not_at_all() {
    tell(short(case("steps-4k", managed(4096), Mix::ALL)), 3);
    tell(short(case("steps-512", managed(512), Mix::CROWD)), 2);
    let aware = Image::qcow2(host_aware(), layout(4096));
    tell(short(case("steps-aware", aware, Mix::ALL)), 2);
}

#[test]
fn snapshots_of_an_overlay_are_made_applied_and_deleted_wholly_or_not_at_all() {
    let over = managed(4096).over(managed(4096));
    tell(short(case("steps-over", over, Mix::ALL)), 3);
}

#[test]
fn a_new_image_is_durable_once_it_was_made() {
    for cluster_size in [512, 4096, 65536] {
        let states = creation(&managed(cluster_size), None, SEED, 200).unwrap_or_else(|why| panic!("{why}"));
        println!("creation: {states} states");
    }
}

#[test]
fn run_states_of_all_modes_keep_what_they_promise() {
    for (name, mode) in [
        ("qcow2-sync", RunStateMode::Sync),
        ("qcow2-none", RunStateMode::None),
    ] {
        let mut case = case(name, managed(4096), Mix::ALL);
        case.plan.run_state = mode;
        hold(case, 4);
    }
}

#[test]
fn a_failed_sync_is_final() {
    let case = case("qcow2-sync-fails", managed(4096), Mix::ALL);
    hold(failing(case, Role::Data, FaultKind::Sync, EIO), 6);
}

#[test]
fn a_failed_write_costs_nothing_that_was_promised() {
    let case = case("qcow2-write-fails", managed(4096), Mix::ALL);
    hold(failing(case, Role::Data, FaultKind::Write, ENOSPC), 6);
}

#[test]
fn a_run_state_that_cannot_be_written_is_final() {
    let case = case("qcow2-run-fails", managed(4096), Mix::ALL);
    hold(failing(case, Role::RunState, FaultKind::Write, ENOSPC), 4);
}

#[test]
fn left_out_and_late_syncs_are_caught() {
    for lie in [Lie::Sync(Role::Data), Lie::LateSyncs(Role::Data, 12)] {
        caught(case("lie", managed(4096), Mix::ALL), lie, Crash::Power);
    }
}

#[test]
fn late_and_short_writes_are_caught() {
    for lie in [Lie::LateWrites(Role::Data, 6), Lie::ShortWrites(Role::Data)] {
        caught(case("lie", managed(4096), Mix::ALL), lie, Crash::Kill);
    }
}

#[test]
fn a_late_or_lost_run_state_is_caught() {
    for lie in [Lie::LateRunState(6), Lie::NoRunState] {
        caught(case("lie", managed(4096), Mix::CROWD), lie, Crash::Kill);
    }
}
