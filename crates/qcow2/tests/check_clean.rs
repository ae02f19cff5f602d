//! Images that QEMU made have no finding, and both checks count the same in them.
//!
//! With `ZBDKIT_CHECK_CASES` set, of all cluster sizes.

mod check;
mod support;

use check::{Class, Counts, FEATURES, Feature, Kind};
use support::qemu::Qemu;
use zbdkit_qcow2::Repair;

fn agree(qemu: &Qemu, kind: Kind) {
    let directory = tempfile::tempdir().unwrap();
    let image = kind.make(qemu, directory.path());
    let (theirs, words) = check::ask(qemu, &image, None);
    let theirs = theirs.unwrap_or_else(|| panic!("{kind:?}: {words}"));
    assert_eq!(theirs.class(), Class::Clean, "{kind:?}: {words}");
    let ours = check::check(&image, Repair::None).unwrap();
    assert_eq!(Counts::from(&ours), theirs, "{kind:?}: {:?}", ours.messages);
    // A repair has nothing to do, and does nothing.
    let before = std::fs::read(&image).unwrap();
    let repaired = check::check(&image, Repair::All).unwrap();
    assert_eq!(repaired, ours, "{kind:?}");
    assert!(before == std::fs::read(&image).unwrap(), "{kind:?}");
}

#[test]
fn images_of_every_cluster_size_and_refcount_width_are_clean() {
    let Some(qemu) = Qemu::find() else { return };
    let mut feature = FEATURES.iter().cycle();
    let all = std::env::var_os("ZBDKIT_CHECK_CASES").is_some();
    for cluster_bits in (9..=21).filter(|bits| all || [9, 12, 16, 21].contains(bits)) {
        for width in 0..=6 {
            let kind = |feature: &Feature| Kind {
                cluster_size: 1 << cluster_bits,
                refcount_bits: 1 << width,
                feature: *feature,
            };
            // Every pair of size and width with the next feature that goes with it.
            let next = feature.by_ref().map(kind).find(Kind::is_possible);
            agree(&qemu, next.unwrap());
        }
    }
}

#[test]
fn images_with_every_feature_are_clean() {
    let Some(qemu) = Qemu::find() else { return };
    for feature in FEATURES {
        for (cluster_bits, refcount_bits) in [(9, 16), (16, 16), (14, 8), (12, 64)] {
            let kind = Kind {
                cluster_size: 1 << cluster_bits,
                refcount_bits,
                feature,
            };
            if kind.is_possible() {
                agree(&qemu, kind);
            }
        }
    }
}
