//! The qcow2 format by itself under crashes: what was acknowledged or flushed is there, and nothing is corrupt.

mod crash_support;

use crash_support::{SEED, tried};
use zbdkit_qcow2::{Compression, Layout};
use zbdkit_testkit::crash::bare::{Bare, BareMix};
use zbdkit_testkit::crash::host::Behaviour;
use zbdkit_testkit::crash::suite::{Crash, Effort, LATE, Tally, bare};

fn small(cluster_size: u64) -> Layout {
    Layout {
        size: 512 << 10,
        cluster_size,
        ..Layout::default()
    }
}

fn plain(name: &'static str, layout: Layout) -> Bare {
    Bare {
        name,
        layout,
        backing: None,
        behaviour: Behaviour::default(),
        clients: 5,
        requests: 20,
        mix: BareMix::ALL,
    }
}

fn hold(case: Bare, share: u64) {
    tried(case.name, share, 25, |effort, seed, replay, tally| {
        bare(&case, None, effort, seed, replay, tally)
    });
}

#[test]
fn a_disk_with_clusters_of_4k() {
    hold(plain("bare-4k", small(4096)), 8);
}

#[test]
fn a_disk_with_clusters_of_512() {
    hold(plain("bare-512", small(512)), 8);
}

#[test]
fn a_disk_with_clusters_of_64k() {
    let layout = Layout {
        size: 2 << 20,
        ..small(65536)
    };
    hold(plain("bare-64k", layout), 8);
}

#[test]
fn a_disk_with_subclusters() {
    let layout = Layout {
        size: 1 << 20,
        extended_l2: true,
        ..small(16384)
    };
    hold(plain("bare-subclusters", layout), 8);
}

#[test]
fn a_disk_with_refcounts_of_one_bit() {
    let layout = Layout {
        refcount_bits: 1,
        ..small(1024)
    };
    hold(plain("bare-1-bit", layout), 8);
}

#[test]
fn a_disk_with_refcounts_of_64_bits() {
    let layout = Layout {
        refcount_bits: 64,
        compression: Compression::Zstd,
        ..small(512)
    };
    hold(plain("bare-64-bit", layout), 8);
}

#[test]
fn a_disk_over_a_backing_image() {
    let mut case = plain(
        "bare-backing",
        Layout {
            size: 400 << 10,
            ..small(4096)
        },
    );
    // Shorter than the disk, and not whole clusters.
    case.layout.backing = Some(("nothing".into(), Some("raw".into())));
    case.backing = Some((300 << 10) + 512);
    hold(case, 8);
}

#[test]
fn a_disk_with_an_external_data_file() {
    let mut case = plain("bare-data", small(4096));
    case.layout.data_file = Some("bare.data".into());
    case.mix.packed = 0;
    hold(case, 8);
}

#[test]
fn late_syncs_and_late_writes_are_caught() {
    for (lie, crash) in LATE.into_iter().zip([Crash::Power, Crash::Kill]) {
        for layout in [small(512), small(4096)] {
            let mut case = plain("lie", layout);
            case.behaviour.lie = Some(lie);
            let effort = Effort {
                histories: 12,
                states: 25,
                again: 0,
            };
            let result = bare(&case, Some(crash), effort, SEED, None, &mut Tally::default());
            let violation = result.expect_err("the lie was not found out");
            println!("{lie:?}: {}", violation.what.lines().next().unwrap_or_default());
        }
    }
}
