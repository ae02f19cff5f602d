//! What a check makes of features, of what extensions name, and of the snapshot table. Needs no QEMU.

mod check;
mod support;

use check::Class;
use check::world::{self, Areas, Image, OFFSET, set_word, word};
use zbdkit_qcow2::{Header, Repair};

#[test]
fn unknown_autoclear_features_are_cleared_by_what_writes() {
    let ours = 1 << 40;
    let mut image = Image::plain();
    set_word(&mut image.bytes, 88, ours | 1 << 7);
    image.check(Repair::All);
    assert_eq!(word(&image.bytes, 88), ours | 1 << 7, "nothing was written");
    let cluster = (image.entry(5) & OFFSET) / image.cluster();
    image.set_count(cluster, 9);
    image.check(Repair::All);
    assert_eq!(word(&image.bytes, 88), ours);
}

#[test]
fn areas_are_references() {
    let mut image = Image::plain();
    let c = image.cluster();
    let start = image.bytes.len() as u64 / c * c;
    image.bytes.resize((start + 2 * c) as usize, 0);
    image.set_count(start / c, 1);
    image.set_count(start / c + 1, 1);
    assert_eq!(image.check(Repair::None).leaks, 2);
    let areas = vec![(start..start + c + 100, "zone table")];
    assert_eq!(
        image.check_with(&areas, Repair::All).messages,
        Vec::<String>::new()
    );
    // They lie on nothing else.
    let data = image.entry(3) & OFFSET;
    let areas = vec![
        (start..start + c + 100, "zone table"),
        (data..data + 10, "table of a snapshot"),
    ];
    let report = image.check_with(&areas, Repair::None);
    assert!(
        report
            .messages
            .iter()
            .any(|line| line.contains("holds an area of an extension and data")),
        "{report:?}"
    );
    assert!(report.corruptions > 0);
    // And within the file.
    let areas = vec![(1 << 40..1 << 41, "zone table")];
    let report = image.check_with(&areas, Repair::All);
    assert_eq!(
        (report.corruptions, report.leaks, report.leaks_fixed),
        (1, 2, 0),
        "{report:?}"
    );
}

#[test]
fn the_area_of_our_extension_is_not_given_away_by_who_does_not_name_it() {
    let mut image = Image::plain();
    let c = image.cluster();
    let start = image.bytes.len() as u64;
    let mut extension = vec![0, 0, 0, 1, 0, 0, 0, 0];
    extension.extend(start.to_be_bytes());
    extension.extend(c.to_be_bytes());
    extension.resize(56, 0);
    let mut header = image.header.clone();
    header.set_extension(0x7a62_646b, Some(extension));
    header.autoclear = 1 << 40;
    let encoded = header.encode().unwrap();
    image.bytes[..encoded.len()].copy_from_slice(&encoded);
    image.bytes.resize((start + c) as usize, 0);
    image.set_count(start / c, 1);
    for repair in [Repair::Leaks, Repair::All] {
        let report = image.check(repair);
        assert_eq!((report.leaks, report.leaks_fixed), (1, 0), "{report:?}");
    }
    let areas = vec![(start..start + c, "zone table")];
    assert_eq!(image.check_with(&areas, Repair::All).leaks, 0);
    // Whose mark was cleared by another writer, that is nobody's.
    set_word(&mut image.bytes, 88, 0);
    assert_eq!(image.check(Repair::All).leaks_fixed, 1);
}

#[test]
fn features_that_nobody_knows_are_refused() {
    let mut image = Image::plain();
    image.set_incompatible(1 << 20);
    assert!(world::check(&mut image.bytes, &Areas::new(), Repair::None).is_err());
}

/// The snapshot's entry with other extra data.
fn with_extra(image: &mut Image, len: usize) {
    let at = image.header.snapshots_offset as usize;
    let old = image.bytes[at..at + 512].to_vec();
    let extra = u32::from_be_bytes(old[36..40].try_into().unwrap()) as usize;
    let mut new = old[..36].to_vec();
    new.extend((len as u32).to_be_bytes());
    new.extend(old[40..40 + extra.min(len)].iter().chain(&[0; 2000]).take(len));
    new.extend(&old[40 + extra..]);
    image.bytes[at..at + new.len()].copy_from_slice(&new);
}

#[test]
fn a_snapshot_table_that_lacks_or_has_too_much_is_written_anew() {
    for (len, said) in [
        (0, "ERROR snapshot table entry 0 is incomplete"),
        (8, "ERROR snapshot table entry 0 is incomplete"),
        (1032, "ERROR Too much extra metadata in snapshot table entry 0"),
    ] {
        let mut image = Image::plain();
        with_extra(&mut image, len);
        image.expect(Class::Corruptions, said, Class::Clean);
        let header = Header::decode(&image.bytes, image.bytes.len() as u64).unwrap();
        assert_ne!(header.snapshots_offset, image.header.snapshots_offset);
        let file = world::disk_of(&image.bytes).file();
        let snapshots = support::block_on(zbdkit_qcow2::read_snapshots(&file, &header)).unwrap();
        assert_eq!((snapshots.len(), snapshots[0].name.as_str()), (1, "one"));
        assert_eq!(snapshots[0].disk_size, image.header.size);
    }
}

#[test]
fn the_zone_table_of_each_draft_is_a_reference() {
    let c = 4096;
    let at = |fields: &[(usize, u64, usize)], len: usize| {
        let mut data = vec![0; len];
        for (offset, value, size) in fields {
            data[*offset..offset + size].copy_from_slice(&value.to_be_bytes()[8 - size..]);
        }
        data[0] = 1;
        data
    };
    let (size, zone) = (100 * c, 1 << 16);
    let zones = size / zone + 1;
    for extension in 0..4 {
        let mut image = Image::plain();
        let start = image.bytes.len() as u64;
        let data = match extension {
            0 => at(&[(4, zones, 4), (8, zone, 8), (24, start, 8)], 44),
            1 => at(&[(4, zones, 4), (8, zone, 8), (40, start, 8)], 48),
            2 => at(&[(4, zone, 8), (24, zones, 4), (48, start, 8)], 56),
            _ => at(&[(4, zone, 4), (16, zones, 4), (40, start, 8)], 48),
        };
        let mut header = image.header.clone();
        header.set_extension(0x007a_6264, Some(data));
        header.incompatible = 1 << 5;
        let encoded = header.encode().unwrap();
        image.bytes[..encoded.len()].copy_from_slice(&encoded);
        image.bytes.resize((start + c) as usize, 0);
        image.set_count(start / c, 1);
        let report = image.check(Repair::All);
        assert_eq!(report.messages, Vec::<String>::new(), "{extension}");
        image.set_incompatible(0);
        assert_eq!(image.check(Repair::All).leaks_fixed, 1, "{extension}");
    }
}
