//! Damaged images: both checks judge them alike, and a repair leaves nothing for QEMU's check to find.
//!
//! `ZBDKIT_CHECK_CASES` sets the number of cases, `ZBDKIT_CHECK_SEED` the first one.

mod check;
mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use check::damage::{self, Map};
use check::{Class, Counts, Feature, Kind};
use support::Rng;
use support::qemu::Qemu;
use zbdkit_qcow2::Repair;

const KINDS: [(u32, u32, Feature); 10] = [
    (16, 16, Feature::Plain),
    (9, 16, Feature::Snapshots),
    (12, 1, Feature::Plain),
    (14, 8, Feature::Mixed),
    (16, 16, Feature::Snapshots),
    (14, 16, Feature::ExtendedL2),
    (12, 64, Feature::Bitmaps),
    (9, 32, Feature::Zlib),
    (16, 4, Feature::Lazy),
    (16, 16, Feature::Version2),
];

#[test]
fn both_checks_judge_damage_alike() {
    let Some(qemu) = Qemu::find() else { return };
    let directory = tempfile::tempdir().unwrap();
    let images: Vec<_> = KINDS
        .iter()
        .enumerate()
        .map(|(i, (cluster_bits, refcount_bits, feature))| {
            let directory = directory.path().join(i.to_string());
            std::fs::create_dir(&directory).unwrap();
            let kind = Kind {
                cluster_size: 1 << cluster_bits,
                refcount_bits: *refcount_bits,
                feature: *feature,
            };
            let bytes = damage::read(&kind.make(&qemu, &directory));
            let map = Map::of(&bytes);
            (kind, bytes, map)
        })
        .collect();
    let cases: u64 = std::env::var("ZBDKIT_CHECK_CASES").map_or(40, |n| n.parse().unwrap());
    let first: u64 = std::env::var("ZBDKIT_CHECK_SEED").map_or(1, |n| n.parse().unwrap());
    let mut wrong = Vec::new();
    for seed in first..first + cases {
        let mut rng = Rng(seed);
        let (kind, bytes, map) = &images[rng.below(images.len() as u64) as usize];
        let mut bytes = bytes.clone();
        let mut said = format!("seed {seed}: {kind:?}");
        for _ in 0..1 + rng.below(3) / 2 {
            said += &format!("\n  {}", map.damage(&mut bytes, &mut rng));
        }
        let all = AssertUnwindSafe(|| case(&qemu, directory.path(), kind, &bytes, &said));
        if catch_unwind(all).is_err() {
            wrong.push(seed);
        }
    }
    assert!(wrong.is_empty(), "ZBDKIT_CHECK_SEED of {wrong:?}");
}

fn case(qemu: &Qemu, directory: &Path, kind: &Kind, bytes: &[u8], said: &str) {
    let image = |name: &str| {
        let path = directory.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let (image, ours_fixed, theirs_fixed) = (image("damaged"), image("ours"), image("theirs"));
    let (theirs, their_words) = check::class_by_qemu(qemu, &image, None);
    let (ours, our_words) = check::class_by_us(&image);
    let said = format!("{said}\nOURS {ours:?}: {our_words}\nQEMU {theirs:?}: {their_words}");
    assert!(
        ours == theirs || differ_on_purpose(bytes, (ours, &our_words), (theirs, &their_words)),
        "{said}"
    );
    let Ok(repaired) = check::check(&ours_fixed, Repair::All) else {
        assert_eq!(ours, Class::CannotCheck, "{said}");
        return;
    };
    let said = format!("{said}\nREPAIRED {repaired:?}");
    let after = Counts::from(&repaired).class();
    assert!(after <= ours, "{said}");
    let (by_qemu, words) = check::class_by_qemu(qemu, &ours_fixed, None);
    let refuses = ["bitmap", "read the snapshot table"];
    let refuses = refuses.iter().any(|what| words.to_lowercase().contains(what));
    assert!(
        by_qemu <= after || theirs > ours || refuses,
        "{said}\nAFTER {words}"
    );
    // Where QEMU can repair everything, so can we, unless it drops snapshots (those that it finds no table of, and in
    // some images with bitmaps all) or
    // bitmaps or snapshots lie on other metadata, where we do not follow them. And it makes the file
    // as long as the refcount table says, so that what lay past its end is in it afterwards.
    let drops = [
        "Snapshot table is too big",
        "snapshots; there are at most",
        "the L1 table of a snapshot",
        "is incomplete",
        "is outside image",
        " and bitmaps",
        "bitmaps twice",
    ];
    let drops = kind.feature == Feature::Mixed || drops.iter().any(|what| our_words.contains(what));
    if !drops && by_qemu != Class::Clean && theirs <= ours {
        let (by_theirs, _) = check::class_by_qemu(qemu, &theirs_fixed, Some("all"));
        assert_ne!(by_theirs, Class::Clean, "{said}\nAFTER {words}");
    }
    if after == Class::Clean && by_qemu == Class::Clean {
        for snapshot in [None, Some("1"), Some("2")] {
            if let Some(before) = contents(qemu, &image, snapshot) {
                let after = contents(qemu, &ours_fixed, snapshot);
                assert!(
                    after == Some(before),
                    "{said}\nthe contents of {snapshot:?} changed"
                );
            }
        }
    }
}

/// Where our check says something else than QEMU's, and why.
fn differ_on_purpose(
    bytes: &[u8],
    (ours, our_words): (Class, &str),
    (theirs, their_words): (Class, &str),
) -> bool {
    // Bitmaps that QEMU does not take: it does not open the image at all.
    if theirs == Class::CannotCheck && their_words.to_lowercase().contains("bitmap") {
        return true;
    }
    // Without snapshots it does not matter where their table is; how data is encrypted does not matter here. Zones it
    // does not know. And what lies past the end of any file is past the end of this one.
    let no_matter = [
        "snapshot table offset invalid",
        "encryption method",
        "CRYPTO header",
        "Unknown incompatible feature: 20",
        "Check failed: Input/output error",
        "Check failed: Invalid argument",
    ];
    if no_matter.iter().any(|what| their_words.contains(what)) {
        return ours < theirs;
    }
    // What QEMU only looks at when it repairs.
    if our_words.contains("Too much extra metadata") && their_words.contains("Too much extra metadata") {
        return ours <= theirs;
    }
    // The specification wants a multiple of 8, and the name of a backing file behind the header.
    if our_words.contains("qcow2 header length") || our_words.contains("Invalid backing file offset") {
        return ours == Class::CannotCheck;
    }
    // Counts of clusters that the file does not have are not looked at by QEMU.
    let cluster = 1u64 << u32::from_be_bytes(bytes[20..24].try_into().unwrap()).min(21);
    let end = (bytes.len() as u64).div_ceil(cluster);
    let past = |line: &str| {
        let number = line.strip_prefix("Leaked cluster ")?.split(' ').next()?;
        Some(number.parse::<u64>().ok()? >= end)
    };
    ours == Class::Leaks && theirs == Class::Clean && our_words.lines().all(|line| past(line) == Some(true))
}

fn contents(qemu: &Qemu, image: &Path, snapshot: Option<&str>) -> Option<Vec<u8>> {
    let raw = image.with_extension("raw");
    let id = snapshot.map(|id| format!("snapshot.id={id}"));
    let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
    args.extend(id.iter().flat_map(|id| ["-l", id]));
    args.extend([check::text(image), check::text(&raw)]);
    let output = qemu.try_img(&args);
    let contents = std::fs::read(&raw);
    let _ = std::fs::remove_file(&raw);
    contents.ok().filter(|_| output.code == Some(0))
}
