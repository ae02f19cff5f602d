//! What counts as damage, and what a repair makes of it, one rule at a time. Needs no QEMU.

mod check;
mod support;

use check::world::{self, COPIED, Image, OFFSET, layout, set_word, word};
use check::{Class, Counts};
use zbdkit_qcow2::{Header, Layout, Repair};

#[test]
fn images_of_our_own_are_clean() {
    for cluster_bits in [9, 12, 14, 16, 21] {
        for refcount_order in [0, 2, 3, 4, 6]
            .into_iter()
            .filter(|order| cluster_bits < 16 || *order > 3)
        {
            let mut layout = layout(cluster_bits, 1 << refcount_order);
            layout.extended_l2 = cluster_bits >= 14 && refcount_order % 4 == 0;
            if cluster_bits == 21 {
                layout.size = 17 << 21;
            }
            let report = Image::new(&layout).check(Repair::All);
            assert_eq!(
                Counts::from(&report).class(),
                Class::Clean,
                "{layout:?} {report:?}"
            );
            assert_eq!(report.rechecked, None);
        }
    }
    let mut old = layout(12, 16);
    old.version = 2;
    assert_eq!(
        Image::new(&old).check(Repair::None).messages,
        Vec::<String>::new()
    );
}

#[test]
fn a_count_that_is_too_high_is_a_leak() {
    let mut image = Image::plain();
    let cluster = (image.entry(0) & OFFSET) / image.cluster();
    image.set_count(cluster, 7);
    let said = format!("Leaked cluster {cluster} refcount=7 reference=");
    let report = image.check(Repair::None);
    assert_eq!(report.leaks, 1, "{report:?}");
    assert!(report.messages[0].starts_with(&said), "{report:?}");
    let report = image.check(Repair::Leaks);
    assert_eq!(
        (report.leaks, report.leaks_fixed, report.corruptions),
        (0, 1, 0),
        "{report:?}"
    );
    assert!(
        report
            .messages
            .iter()
            .any(|line| line.starts_with("Repairing cluster"))
    );
    assert_eq!(report.rechecked, Some(Vec::new()));
}

#[test]
fn a_cluster_that_nothing_names_is_a_leak_and_gives_its_space_back() {
    let mut image = Image::plain();
    let cluster = image.bytes.len() as u64 / image.cluster();
    image
        .bytes
        .resize(image.bytes.len() + image.cluster() as usize, 0xaa);
    image.set_count(cluster, 1);
    image.expect(
        Class::Leaks,
        &format!("Leaked cluster {cluster} refcount=1 reference=0"),
        Class::Clean,
    );
    assert_eq!(image.count(cluster), 0);
    assert!(
        image.bytes[(cluster * image.cluster()) as usize..]
            .iter()
            .all(|byte| *byte == 0)
    );
}

#[test]
fn a_count_past_the_end_of_the_file_is_a_leak() {
    let mut image = Image::plain();
    let cluster = image.bytes.len() as u64 / image.cluster() + 5;
    image.set_count(cluster, 1);
    image.expect(
        Class::Leaks,
        &format!("Leaked cluster {cluster} refcount=1 reference=0"),
        Class::Clean,
    );
}

#[test]
fn a_count_that_is_too_low_is_a_corruption_that_only_a_full_repair_takes_on() {
    let mut image = Image::plain();
    let cluster = (image.entry(5) & OFFSET) / image.cluster();
    image.set_count(cluster, 0);
    let report = image.check(Repair::Leaks);
    assert_eq!(
        (report.corruptions_fixed, report.leaks_fixed),
        (0, 0),
        "{report:?}"
    );
    let said = format!("ERROR cluster {cluster} refcount=0 reference=");
    image.expect(Class::Corruptions, &said, Class::Clean);
}

#[test]
fn a_flag_that_contradicts_the_count_is_set_right() {
    let mut image = Image::plain();
    // Cluster 3 was written after the snapshot, cluster 0 before it.
    let own = image.entry(3);
    assert_ne!(own & COPIED, 0);
    image.set_entry(3, own & !COPIED);
    let said = format!(
        "Leaked OFLAG_COPIED data cluster: l2_entry={:x} refcount=1",
        own & !COPIED
    );
    // It costs a needless copy.
    image.expect(Class::Leaks, &said, Class::Clean);
    assert_eq!(image.entry(3), own);
    let shared = image.entry(0);
    assert_eq!(shared & COPIED, 0);
    image.set_entry(0, shared | COPIED);
    let said = format!(
        "ERROR OFLAG_COPIED data cluster: l2_entry={:x} refcount=2",
        shared | COPIED
    );
    image.expect(Class::Corruptions, &said, Class::Clean);
    let l1 = image.header.l1_offset;
    let table = word(&image.bytes, l1);
    set_word(&mut image.bytes, l1, table ^ COPIED);
    image.expect(
        Class::Leaks,
        "Leaked OFLAG_COPIED L2 cluster: l1_index=0",
        Class::Clean,
    );
    assert_eq!(word(&image.bytes, l1), table);
}

#[test]
fn a_leak_repair_sets_flags_right_where_nothing_else_is_wrong() {
    let mut image = Image::plain();
    let own = image.entry(3);
    image.set_entry(3, own & !COPIED);
    image.set_count((own & OFFSET) / image.cluster(), 2);
    let report = image.check(Repair::Leaks);
    // The wrong flag is only one once the count is right.
    assert_eq!(
        (report.leaks_fixed, Counts::from(&report).class()),
        (2, Class::Clean),
        "{report:?}"
    );
    assert_eq!(image.entry(3), own);
}

#[test]
fn reserved_bits_are_dropped() {
    for bit in [1, 8, 56, 61] {
        let mut image = Image::plain();
        let entry = image.entry(3);
        image.set_entry(3, entry | 1 << bit);
        image.expect(
            Class::Corruptions,
            "ERROR found l2 entry with reserved bits set",
            Class::Clean,
        );
        assert_eq!(image.entry(3), entry);
    }
    for bit in [0, 8, 56, 62] {
        let mut image = Image::plain();
        let l1 = image.header.l1_offset;
        let entry = word(&image.bytes, l1);
        set_word(&mut image.bytes, l1, entry | 1 << bit);
        image.expect(
            Class::Corruptions,
            "ERROR found L1 entry with reserved bits set",
            Class::Clean,
        );
        assert_eq!(word(&image.bytes, l1), entry);
    }
    // Of a snapshot's table, too.
    let mut image = Image::plain();
    let l1 = word(&image.bytes, image.header.snapshots_offset);
    let entry = word(&image.bytes, l1);
    set_word(&mut image.bytes, l1, entry | 2);
    image.expect(
        Class::Corruptions,
        "ERROR found L1 entry with reserved bits set",
        Class::Clean,
    );
}

#[test]
fn compressed_clusters_have_no_flag() {
    let mut image = Image::plain();
    let entry = image.entry(11);
    assert_ne!(entry & 1 << 62, 0);
    image.set_entry(11, entry | COPIED);
    let said = "copied flag must never be set for compressed clusters";
    image.expect(Class::Corruptions, said, Class::Clean);
    assert_eq!(image.entry(11), entry);
}

#[test]
fn an_unaligned_cluster_of_zeros_becomes_zeros_without_one() {
    let mut image = Image::plain();
    let entry = image.entry(3);
    image.set_entry(3, (entry | 1) + 512);
    let said = "Preallocated cluster is not properly aligned; L2 entry corrupted.";
    image.expect(Class::Corruptions, said, Class::Clean);
    assert_eq!(image.entry(3), 1);
}

#[test]
fn what_an_unaligned_data_cluster_meant_is_not_given_away() {
    let mut image = Image::plain();
    let entry = image.entry(3);
    let cluster = (entry & OFFSET) / image.cluster();
    image.set_entry(3, entry + 512);
    let said = "Data cluster is not properly aligned; L2 entry corrupted.";
    image.expect(Class::Corruptions, said, Class::Corruptions);
    assert_ne!(image.count(cluster), 0);
}

#[test]
fn what_an_entry_past_the_end_meant_is_not_given_away() {
    for repair in [Repair::Leaks, Repair::All] {
        let mut image = Image::plain();
        let entry = image.entry(3);
        let cluster = (entry & OFFSET) / image.cluster();
        let before = image.bytes[(cluster * image.cluster()) as usize..][..4096].to_vec();
        image.set_entry(3, entry | 1 << 40);
        let report = image.check(repair);
        assert!(
            report.messages[0].contains("exceeding the end of the file"),
            "{report:?}"
        );
        assert_eq!(Counts::from(&report).class(), Class::Corruptions);
        assert_ne!(image.count(cluster), 0);
        assert!(image.bytes[(cluster * image.cluster()) as usize..][..4096] == before);
    }
}

#[test]
fn metadata_that_lies_on_other_things_is_a_corruption_to_the_end() {
    // A data cluster on the active L1 table: writes to it must not happen in place.
    let mut image = Image::plain();
    let l1 = image.header.l1_offset;
    image.set_entry(20, l1 | COPIED);
    image.expect(
        Class::Corruptions,
        "holds the active L1 table and data",
        Class::Corruptions,
    );
    assert_eq!(image.entry(20), l1);
    assert_eq!(image.count(l1 / image.cluster()), 2);
    // A table that is data, too.
    let mut image = Image::plain();
    let table = image.l2();
    image.set_entry(20, table | COPIED);
    image.expect(
        Class::Corruptions,
        "holds an L2 table and data",
        Class::Corruptions,
    );
    assert_eq!(image.entry(20), table);
}

#[test]
fn a_damaged_refcount_structure_is_built_anew() {
    type Damage = fn(&mut Image);
    let damages: [(&str, Damage); 8] = [
        ("has reserved bits set", |image| {
            let at = image.header.refcount_table_offset;
            let block = image.block();
            set_word(&mut image.bytes, at, block | 1);
        }),
        (
            "is not cluster aligned; refcount table entry corrupted",
            |image| {
                let at = image.header.refcount_table_offset;
                let block = image.block();
                set_word(&mut image.bytes, at, block + 512);
            },
        ),
        ("refcount block 0 is outside image", |image| {
            let at = image.header.refcount_table_offset;
            set_word(&mut image.bytes, at, 1 << 40);
        }),
        ("refcount block 0 refcount=2", |image| {
            let (at, l1) = (image.header.refcount_table_offset, image.header.l1_offset);
            set_word(&mut image.bytes, at, l1);
        }),
        ("refcount=0 reference=1", |image| {
            let at = image.header.refcount_table_offset;
            set_word(&mut image.bytes, at, 0);
        }),
        ("holds the header and the refcount table", |image| {
            set_word(&mut image.bytes, 48, 0)
        }),
        ("exceeding the end of the file", |image| {
            set_word(&mut image.bytes, 48, 1 << 30)
        }),
        ("refcount=0 reference=1", |image| {
            // No table at all.
            image.bytes[56..60].fill(0);
        }),
    ];
    for (cluster_bits, refcount_bits) in [(9, 64), (9, 16), (12, 1), (12, 16), (16, 8)] {
        for (said, damage) in damages {
            if cluster_bits == 9 && said.contains("aligned") {
                // There is nothing between two clusters.
                continue;
            }
            let mut image = Image::new(&layout(cluster_bits, refcount_bits));
            damage(&mut image);
            let report = image.check(Repair::Leaks);
            assert_eq!(
                (report.leaks_fixed, report.corruptions_fixed),
                (0, 0),
                "{said}: {report:?}"
            );
            let report = image.check(Repair::None);
            assert!(report.corruptions > 0, "{said}: {report:?}");
            assert!(
                report.messages.iter().any(|line| line.contains(said)),
                "{said}: {report:?}"
            );
            let report = image.check(Repair::All);
            assert_eq!(Counts::from(&report).class(), Class::Clean, "{said}: {report:?}");
            assert_eq!(image.check(Repair::None).messages, Vec::<String>::new());
            // It is one that others read, too.
            assert!(world::contents(&image.bytes).is_some());
        }
    }
}

#[test]
fn a_rebuilt_structure_counts_itself_where_blocks_are_small() {
    // A block of 512 bytes has 64 counts of 64 bits: table and blocks need blocks of their own.
    let mut image = Image::new(&Layout {
        size: 4 << 20,
        ..layout(9, 64)
    });
    let c = image.cluster();
    let len = image.bytes.len() as u64;
    // Clusters far away, so that the table has more than one cluster.
    image.bytes.resize(len as usize + (3 << 20), 0);
    let far = image.bytes.len() as u64 - c;
    image.set_entry(30, far | COPIED);
    image.expect(Class::Corruptions, "refcount=0 reference=1", Class::Clean);
    let header = Header::decode(&image.bytes, image.bytes.len() as u64).unwrap();
    assert!(header.refcount_table_clusters > 1);
}

#[test]
fn a_rebuilt_structure_lies_behind_what_reaches_past_the_end_of_the_file() {
    let mut image = Image::plain();
    let c = image.cluster();
    // The L1 table begins in the last cluster of the file and ends behind it, which is no error.
    let last = image.bytes.len() as u64 / c;
    let l1 = last * c;
    let table = image.bytes[image.header.l1_offset as usize..][..8].to_vec();
    image.bytes.resize((l1 + c - 8) as usize, 0);
    image.bytes[l1 as usize..l1 as usize + 8].copy_from_slice(&table);
    set_word(&mut image.bytes, 40, l1);
    image.bytes[36..40].copy_from_slice(&(2 * c as u32 / 8 - 2).to_be_bytes());
    // Something is not known, and the structure is damaged.
    let entry = image.entry_at(l1, 3);
    image.set_entry_at(l1, 3, entry | 1 << 40);
    let at = image.header.refcount_table_offset;
    set_word(&mut image.bytes, at, 1 << 40);
    let report = image.check(Repair::All);
    let header = Header::decode(&image.bytes, image.bytes.len() as u64).unwrap();
    assert!(header.refcount_table_offset >= l1 + 2 * c, "{report:?}");
    assert_eq!((report.corruptions, report.check_errors), (1, 0), "{report:?}");
}

#[test]
fn a_count_that_does_not_fit_is_a_corruption_that_stays() {
    let mut image = Image::new(&layout(12, 1));
    let entry = image.entry(0);
    image.set_entry(20, entry & !COPIED);
    image.expect(
        Class::Corruptions,
        "ERROR: overflow cluster offset=",
        Class::Corruptions,
    );
}

#[test]
fn marks_of_damage_go_when_nothing_is_left_of_it() {
    let (dirty, corrupt) = (1, 2);
    for repair in [Repair::Leaks, Repair::All] {
        let mut image = Image::plain();
        image.set_incompatible(dirty | corrupt);
        image.check(Repair::None);
        assert_eq!(image.incompatible(), dirty | corrupt);
        image.check(repair);
        assert_eq!(image.incompatible(), 0);
    }
    let mut image = Image::plain();
    image.set_incompatible(corrupt);
    let entry = image.entry(3);
    image.set_entry(3, entry | 1 << 40);
    image.check(Repair::All);
    assert_eq!(image.incompatible(), corrupt, "something is left of it");
}

#[test]
fn contradictory_subclusters_are_corruptions_that_stay() {
    let mut layout = layout(14, 16);
    layout.extended_l2 = true;
    let bitmap = |image: &Image, cluster: u64| image.l2() + cluster * 16 + 8;
    let mut image = Image::new(&layout);
    let at = bitmap(&image, 3);
    assert_eq!(word(&image.bytes, at), 0xffff_ffff);
    set_word(&mut image.bytes, at, 1 << 32 | 0xffff_ffff);
    let said = "Allocated cluster has corrupted subcluster allocation bitmap";
    image.expect(Class::Corruptions, said, Class::Corruptions);
    let mut image = Image::new(&layout);
    let at = bitmap(&image, 40);
    set_word(&mut image.bytes, at, 4);
    let said = "Unallocated cluster has non-zero subcluster allocation map";
    image.expect(Class::Corruptions, said, Class::Corruptions);
    let mut image = Image::new(&layout);
    let at = bitmap(&image, 11);
    set_word(&mut image.bytes, at, 4);
    let said = "ERROR compressed cluster 11 with non-zero subcluster allocation bitmap";
    image.expect(Class::Corruptions, said, Class::Corruptions);
    // The flag of ordinary entries for zeros means nothing here.
    let mut image = Image::new(&layout);
    let at = image.l2() + 3 * 16;
    let entry = word(&image.bytes, at);
    set_word(&mut image.bytes, at, entry | 1);
    image.expect(Class::Corruptions, "reserved bits set", Class::Clean);
}

#[test]
fn version_2_has_no_zero_clusters() {
    let mut old = layout(12, 16);
    old.version = 2;
    let mut image = Image::new(&old);
    image.set_entry(50, 1);
    image.expect(
        Class::Corruptions,
        "ERROR zero cluster in a version 2 image",
        Class::Corruptions,
    );
}

#[test]
fn with_an_external_data_file_clusters_lie_where_they_are_in_the_device() {
    let mut image = Image::plain();
    image.set_incompatible(4);
    let report = image.check(Repair::None);
    for said in [
        "ERROR 1 snapshots in image with data file",
        "ERROR compressed cluster 10 with data file",
        "does not match guest cluster offset: 0x3000",
        "OFLAG_COPIED data cluster",
    ] {
        assert!(
            report.messages.iter().any(|line| line.contains(said)),
            "{said}: {report:?}"
        );
    }
    // In it they have no counts.
    let data = (image.entry(3) & OFFSET) / image.cluster();
    let said = format!("Leaked cluster {data} refcount=1 reference=0");
    assert!(report.messages.contains(&said), "{report:?}");
}
