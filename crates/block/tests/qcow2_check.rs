//! Checking and repairing images: the zone table too, from whatever is left of it.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;

use support::{Rig, host, pattern};
use zbdkit_block::{
    CheckError, CheckOutcome, CreateOptions, Graph, OpenOptions, Qcow2CreateOptions, Repair, ZoneOp, check,
    create_qcow2,
};
use zbdkit_qcow2::{Header, Layout};
use zbdkit_spec::qcow2::{
    AUTOCLEAR_ZONE_TABLE, EXT_ZBDKIT, EXT_ZONED, INCOMPAT_ZONED, ZbdkitExtension, ZonedA, ZonedB, ZonedC,
    ZonedV7,
};
use zbdkit_spec::sidecar::{self, MARKS_COPY, MARKS_MAGIC, MarksHead, VERSION_MARKS};
use zbdkit_zone::Condition;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

const ZONE: u64 = 1 << 20;
const ZONES: u64 = 100;
const NAME: &str = "disk.qcow2";

/// A hundred zones, so that the table has two blocks; zones 0 to 3 and 70 to 72 in use.
fn rig() -> Rig {
    let rig = Rig::new();
    let mut zones = CreateOptions::new("", 0);
    zones.zone_size = Some(ZONE);
    zones.conventional_zones = 1;
    let options = Qcow2CreateOptions {
        zones: Some(zones),
        ..Qcow2CreateOptions::new(rig.path(NAME), ZONES * ZONE)
    };
    rig.block_on(create_qcow2(&host(), &options)).unwrap();
    let device = rig.open(NAME);
    for base in [0, 69 * ZONE] {
        rig.write(&device, base + ZONE, &pattern(1, 12288));
        rig.write(&device, base + 2 * ZONE, &pattern(2, ZONE as usize));
        rig.write(&device, base + 3 * ZONE, &pattern(3, 4096));
        rig.op(&device, ZoneOp::Finish, base + 3 * ZONE).unwrap();
    }
    rig.close(device);
    // Every block has been written an even number of times, so that both copies have something in them.
    let device = rig.open(NAME);
    rig.write(&device, ZONE + 12288, &pattern(4, 4096));
    rig.write(&device, 70 * ZONE + 12288, &pattern(4, 4096));
    rig.close(device);
    rig
}

fn run_named(rig: &Rig, name: &str, repair: Repair) -> Result<CheckOutcome, CheckError> {
    let options = OpenOptions {
        lock_wait: std::time::Duration::ZERO,
        ..OpenOptions::default()
    };
    rig.block_on(check(
        &host(),
        &Graph::from_path(rig.path(name)),
        &options,
        repair,
        &mut |_, _| {},
    ))
}

fn run(rig: &Rig, repair: Repair) -> CheckOutcome {
    run_named(rig, NAME, repair).unwrap()
}

/// Nothing is wrong with format or zones.
fn is_whole(rig: &Rig) {
    let outcome = run(rig, Repair::None);
    let (report, zones) = (outcome.report.unwrap(), outcome.zones.unwrap());
    assert_eq!(
        (
            report.corruptions,
            report.leaks,
            report.check_errors,
            zones.errors
        ),
        (0, 0, 0, 0),
        "{:?} {:?}",
        report.messages,
        zones.messages
    );
}

/// The check finds it, `-r leaks` leaves it, `-r all` repairs it and says so.
fn repaired(rig: &Rig, found: &str, done: &str) -> String {
    for repair in [Repair::None, Repair::Leaks] {
        let zones = run(rig, repair).zones.unwrap();
        assert!(zones.errors > 0 && zones.fixed == 0, "{:?}", zones.messages);
        let all = zones.messages.join("\n");
        assert!(all.contains(found), "{all}");
    }
    let outcome = run(rig, Repair::All);
    let zones = outcome.zones.unwrap();
    let all = zones.messages.join("\n");
    assert!(zones.errors == 0 && zones.fixed > 0, "{all}");
    assert!(all.contains(done), "{all}");
    is_whole(rig);
    all
}

fn poke(rig: &Rig, name: &str, offset: u64, bytes: &[u8]) {
    let file = fs::OpenOptions::new().write(true).open(rig.path(name)).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

fn header(rig: &Rig) -> Header {
    let bytes = fs::read(rig.path(NAME)).unwrap();
    Header::decode(&bytes[..65536], bytes.len() as u64).unwrap()
}

fn set_header(rig: &Rig, change: impl FnOnce(&mut Header)) {
    let mut header = header(rig);
    change(&mut header);
    poke(rig, NAME, 0, &header.encode().unwrap());
}

fn area(rig: &Rig) -> u64 {
    let ours = ZbdkitExtension::read_from_bytes(header(rig).extension(EXT_ZBDKIT).unwrap()).unwrap();
    ours.area_offset.get()
}

fn bare(rig: &Rig) -> u64 {
    let zoned = ZonedC::read_from_bytes(header(rig).extension(EXT_ZONED).unwrap()).unwrap();
    zoned.zonedmeta_offset.get()
}

fn copy(rig: &Rig, block: u64, copy: u64) -> u64 {
    area(rig) + 8192 + 8192 * block + 4096 * copy
}

/// What the zones in use look like: condition, pointer, written end.
fn zones(rig: &Rig) -> Vec<(Condition, u64, u64)> {
    let device = rig.open_read_only(NAME);
    let all = rig.zones(&device);
    [1, 2, 3, 70, 71, 72]
        .map(|zone| {
            let zone: &zbdkit_zone::ZoneInfo = &all[zone];
            (
                zone.condition,
                zone.wp - zone.start,
                zone.written_end - zone.start,
            )
        })
        .to_vec()
}

const CLOSED: (Condition, u64, u64) = (Condition::Closed, 16384, 16384);
const WRITTEN: (Condition, u64, u64) = (Condition::Full, ZONE, ZONE);
const FINISHED: (Condition, u64, u64) = (Condition::Full, ZONE, 4096);

fn as_before() -> Vec<(Condition, u64, u64)> {
    vec![CLOSED, WRITTEN, FINISHED, CLOSED, WRITTEN, FINISHED]
}

#[test]
fn a_good_image_is_found_good_and_not_changed() {
    let rig = rig();
    is_whole(&rig);
    let before = fs::read(rig.path(NAME)).unwrap();
    assert_eq!(run(&rig, Repair::All).zones.unwrap().messages, [""; 0]);
    assert!(fs::read(rig.path(NAME)).unwrap() == before);
    assert_eq!(zones(&rig), as_before());
    let device = rig.open(NAME);
    assert!(run_named(&rig, NAME, Repair::None).is_err(), "in use");
    rig.write(&device, 10 * ZONE, &pattern(1, 4096));
    drop(device);
    // Somebody was killed: that is no damage, and leaves clusters leaked at most.
    let outcome = run(&rig, Repair::None);
    let zones = outcome.zones.unwrap();
    assert_eq!((outcome.report.unwrap().corruptions, zones.errors), (0, 0));
    let said = zones.messages.join("\n");
    assert!(said.contains("was not closed"), "{said}");
    assert_eq!(rig.zones(&rig.open(NAME))[10].wp, 10 * ZONE + 4096);
}

#[test]
fn a_damaged_copy_is_repaired_from_the_other_one() {
    let rig = rig();
    // The one that is not used, of block 0, and one of the headers.
    let used = |block: u64| {
        let bytes = fs::read(rig.path(NAME)).unwrap();
        let generation = |at: u64| bytes[copy(&rig, block, at) as usize + 8];
        u64::from(generation(1) > generation(0))
    };
    poke(&rig, NAME, copy(&rig, 0, 1 - used(0)) + 100, &[0xee; 64]);
    let bytes = fs::read(rig.path(NAME)).unwrap();
    let generation = |at: u64| bytes[(area(&rig) + 4096 * at) as usize + 16];
    let older = u64::from(generation(1) < generation(0));
    poke(&rig, NAME, area(&rig) + 4096 * older + 300, &[0xee]);
    repaired(
        &rig,
        "one copy of zone table block 0 is damaged",
        "both copies of the zone table",
    );
    assert_eq!(zones(&rig), as_before());
}

#[test]
fn a_block_with_no_good_copy_is_taken_from_the_bare_table() {
    let rig = rig();
    for at in 0..2 {
        poke(&rig, NAME, copy(&rig, 1, at) + 100, &[0xee; 64]);
    }
    assert!(rig.open_error(NAME).contains("zbdkit check -r all"));
    let said = repaired(
        &rig,
        "both copies of zone table block 1",
        "taken from the bare table, 0x4604000",
    );
    assert!(said.contains("zone 70"), "{said}");
    // Of a finish the bare table knows nothing.
    assert_eq!(zones(&rig), [CLOSED, WRITTEN, FINISHED, CLOSED, WRITTEN, WRITTEN]);
    let device = rig.open(NAME);
    assert_eq!(rig.read(&device, 70 * ZONE, 12288), pattern(1, 12288));
    rig.write(&device, 70 * ZONE + 16384, &pattern(7, 4096));
    rig.close(device);
    is_whole(&rig);
}

#[test]
fn the_newest_copy_of_a_closed_image_that_is_gone_is_made_good_from_the_bare_table() {
    let rig = rig();
    // Damaged, or lost without a trace.
    for damage in [0xee, 0] {
        let bytes = fs::read(rig.path(NAME)).unwrap();
        let generation = |at: u64| bytes[copy(&rig, 0, at) as usize + 8];
        let newest = u64::from(generation(1) > generation(0));
        poke(&rig, NAME, copy(&rig, 0, newest), &[damage; 4096]);
        assert!(rig.open_error(NAME).contains("newest state"));
        repaired(
            &rig,
            "newest state",
            "zone 1: its write pointer is taken from the bare table",
        );
        assert_eq!(zones(&rig), as_before());
        let device = rig.open(NAME);
        rig.op(&device, ZoneOp::Reset, ZONE).unwrap();
        rig.write(&device, ZONE, &pattern(1, 16384));
        rig.close(device);
    }
}

#[test]
fn where_both_tables_are_gone_the_data_tells() {
    let rig = rig();
    for at in 0..2 {
        poke(&rig, NAME, copy(&rig, 1, at) + 100, &[0xee; 64]);
    }
    poke(&rig, NAME, bare(&rig) + 8 * 70, &[0xff; 24]);
    let said = repaired(
        &rig,
        "both copies of zone table block 1",
        "zone 70: nothing tells its write pointer any more; it is set to 0x4604000",
    );
    assert!(said.contains("zone 72: nothing tells"), "{said}");
    let ended = (Condition::Closed, 4096, 4096);
    assert_eq!(zones(&rig), [CLOSED, WRITTEN, FINISHED, CLOSED, WRITTEN, ended]);
}

#[test]
fn a_whole_area_that_is_gone_is_made_anew_and_the_old_clusters_are_freed() {
    let rig = rig();
    let old = area(&rig);
    poke(&rig, NAME, old, &[0xee; 8192]);
    assert!(rig.open_error(NAME).contains("not a zone table"));
    let said = repaired(
        &rig,
        "not a zone table",
        "a new zone table was made from the bare table",
    );
    let lost = "zones made read-only or offline, random write areas, descriptor extensions, attributes, which blocks were \
                marked uncorrectable, and the zones of snapshots are lost";
    assert!(said.contains(lost), "{said}");
    assert_eq!(zones(&rig), [CLOSED, WRITTEN, WRITTEN, CLOSED, WRITTEN, WRITTEN]);
}

#[test]
fn a_bare_table_that_is_damaged_is_repaired_from_the_area() {
    let rig = rig();
    poke(&rig, NAME, bare(&rig) + 8, &[0x12; 16]);
    repaired(
        &rig,
        "differs from the zone table in 2 zones, the first is 1",
        "2 words of the bare table",
    );
    assert_eq!(zones(&rig), as_before());
    set_header(&rig, |header| {
        header.set_extension(EXT_ZONED, Some(vec![1; 44]));
    });
    assert!(rig.open_error(NAME).contains("Invalid zoned extension header"));
    repaired(&rig, "Invalid zoned extension header", "a new bare table");
    assert_eq!(zones(&rig), as_before());
}

#[test]
fn faults_of_a_bare_table_that_is_the_truth_are_told_in_qemus_words() {
    let rig = rig();
    set_header(&rig, |header| header.autoclear &= !AUTOCLEAR_ZONE_TABLE);
    poke(&rig, NAME, bare(&rig) + 8 * 70, &(70 * ZONE + 1).to_be_bytes());
    let said = repaired(
        &rig,
        "Zone 70 has write pointer 0x4600001 that is not sector aligned",
        "zone 70: nothing tells",
    );
    assert!(said.contains("does not know"), "{said}");
    assert_eq!(zones(&rig), [CLOSED, WRITTEN, WRITTEN, CLOSED, WRITTEN, WRITTEN]);
}

#[test]
fn a_feature_bit_that_somebody_cleared_is_set_again() {
    let rig = rig();
    set_header(&rig, |header| header.incompatible &= !INCOMPAT_ZONED);
    assert!(rig.open_error(NAME).contains("feature bit 5"));
    // What the format does not look at then is not leaked.
    assert_eq!(run(&rig, Repair::None).report.unwrap().leaks, 0);
    repaired(&rig, "feature bit 5", "");
    assert_ne!(header(&rig).incompatible & INCOMPAT_ZONED, 0);
    assert_eq!(zones(&rig), as_before());
}

#[test]
fn the_snapshots_directory_is_cleared_of_what_cannot_be_used() {
    let rig = rig();
    let device = rig.open(NAME);
    rig.block_on(device.snapshot_create("a")).unwrap();
    rig.block_on(device.snapshot_create("b")).unwrap();
    rig.close(device);
    is_whole(&rig);
    let ours = || ZbdkitExtension::read_from_bytes(header(&rig).extension(EXT_ZBDKIT).unwrap()).unwrap();
    let bytes = fs::read(rig.path(NAME)).unwrap();
    let entry = &bytes[ours().snapshots_offset.get() as usize + 32..][..64];
    let entry = zbdkit_spec::qcow2::SnapshotZones::read_from_bytes(entry).unwrap();
    poke(&rig, NAME, entry.offset.get(), &[0xee; 8192]);
    repaired(&rig, "zone table of snapshot 1 cannot be used", "taken out");
    let device = rig.open(NAME);
    assert!(rig.block_on(device.snapshot_apply("1")).is_err());
    rig.block_on(device.snapshot_apply("2")).unwrap();
    rig.close(device);
    poke(&rig, NAME, ours().snapshots_offset.get(), &[0xee; 8]);
    assert!(rig.open_error(NAME).contains("directory"));
    repaired(
        &rig,
        "directory of the snapshots' zone tables is damaged",
        "taken out",
    );
    assert_eq!(zones(&rig), as_before());
}

#[test]
fn a_snapshots_table_with_a_list_of_marks_is_refused() {
    let rig = rig();
    let device = rig.open(NAME);
    rig.block_on(device.snapshot_create("a")).unwrap();
    rig.close(device);
    let ours = ZbdkitExtension::read_from_bytes(header(&rig).extension(EXT_ZBDKIT).unwrap()).unwrap();
    let bytes = fs::read(rig.path(NAME)).unwrap();
    let entry = &bytes[ours.snapshots_offset.get() as usize + 32..][..64];
    let entry = zbdkit_spec::qcow2::SnapshotZones::read_from_bytes(entry).unwrap();
    // A list without marks behind all clusters, which no check would take for damaged.
    let place = (bytes.len() as u64).next_multiple_of(65536);
    let mut list = MarksHead::new_zeroed();
    (list.magic, list.generation, list.uuid) = (MARKS_MAGIC, 1.into(), ours.uuid);
    list.crc = crc32c::crc32c(list.as_bytes()).into();
    poke(&rig, NAME, place + MARKS_COPY, list.as_bytes());
    poke(&rig, NAME, place + 2 * MARKS_COPY - 1, &[0]);
    for copy in 0..2 {
        let at = entry.offset.get() + 4096 * copy;
        let bytes = &bytes[at as usize..][..4096];
        let mut table = sidecar::Header::read_from_bytes(bytes).unwrap();
        table.version = VERSION_MARKS.into();
        table.marks_offset = place.into();
        table.generation_sum = (table.generation_sum.get() + 1).into();
        table.crc = 0.into();
        table.crc = crc32c::crc32c(table.as_bytes()).into();
        poke(&rig, NAME, at, table.as_bytes());
    }
    let device = rig.open(NAME);
    let refused = rig.block_on(device.snapshot_apply("1")).unwrap_err().to_string();
    assert!(refused.contains("names a list of marked blocks"), "{refused}");
    rig.close(device);
    let said = run(&rig, Repair::None).zones.unwrap().messages.join("\n");
    assert!(
        said.contains("snapshot 1 cannot be used: it names a list of marked blocks"),
        "{said}"
    );
    let zones = run(&rig, Repair::All).zones.unwrap();
    assert_eq!(zones.errors, 0, "{:?}", zones.messages);
    is_whole(&rig);
}

#[test]
fn leaked_clusters_are_freed_and_ours_are_not() {
    let rig = rig();
    let device = rig.open(NAME);
    rig.block_on(device.snapshot_create("a")).unwrap();
    rig.block_on(device.qcow2().unwrap().allocate_area(200_000))
        .unwrap();
    rig.close(device);
    let report = run(&rig, Repair::None).report.unwrap();
    assert_eq!(
        (report.leaks, report.corruptions),
        (4, 0),
        "{:?}",
        report.messages
    );
    let report = run(&rig, Repair::Leaks).report.unwrap();
    assert_eq!(
        (report.leaks, report.leaks_fixed),
        (0, 4),
        "{:?}",
        report.messages
    );
    is_whole(&rig);
    assert_eq!(zones(&rig), as_before());
}

#[test]
fn older_drafts_are_read_and_become_layout_c_when_they_are_written() {
    for draft in 0..3 {
        let rig = rig();
        let c = ZonedC::read_from_bytes(header(&rig).extension(EXT_ZONED).unwrap()).unwrap();
        let (old, host_order): (Vec<u8>, bool) = match draft {
            0 => {
                let mut a = ZonedA::read_from_bytes(&[0; 56]).unwrap();
                (a.zoned, a.nr_zones, a.zone_size, a.zone_capacity) =
                    (1, c.nr_zones, c.zone_size, c.zone_capacity);
                a.conventional_zones = c.conventional_zones;
                a.max_append_bytes = 65536.into();
                (a.zonedmeta_offset, a.zonedmeta_size) = (c.zonedmeta_offset, 800.into());
                (a.as_bytes().to_vec(), true)
            }
            1 => {
                let mut b = ZonedB::read_from_bytes(&[0; 48]).unwrap();
                (b.zoned, b.nr_zones, b.zone_size, b.zone_capacity) =
                    (1, c.nr_zones, c.zone_size, c.zone_capacity);
                b.conventional_zones = c.conventional_zones;
                b.max_append_bytes = 65536.into();
                b.zonedmeta_offset = c.zonedmeta_offset;
                (b.as_bytes().to_vec(), false)
            }
            _ => {
                let mut v7 = ZonedV7::read_from_bytes(&[0; 48]).unwrap();
                (v7.zoned, v7.nr_zones) = (1, c.nr_zones);
                v7.zone_size = (ZONE as u32).into();
                v7.zone_capacity = (ZONE as u32).into();
                v7.conventional_zones = c.conventional_zones;
                v7.max_append_bytes = 65536.into();
                (v7.zonedmeta_offset, v7.zonedmeta_size) = (c.zonedmeta_offset, 800.into());
                (v7.as_bytes().to_vec(), true)
            }
        };
        if host_order {
            let table: Vec<u8> = (0..ZONES)
                .map(|zone| match zone {
                    0 => 1 << 59,
                    1 | 70 => zone * ZONE + 16384,
                    2 | 3 | 71 | 72 => (zone + 1) * ZONE,
                    _ => zone * ZONE,
                })
                .flat_map(u64::to_le_bytes)
                .collect();
            poke(&rig, NAME, bare(&rig), &table);
        }
        set_header(&rig, |header| {
            header.set_extension(EXT_ZONED, Some(old));
            header.set_extension(EXT_ZBDKIT, None);
            header.autoclear = 0;
        });
        let before = fs::read(rig.path(NAME)).unwrap();
        let expected = vec![CLOSED, WRITTEN, WRITTEN, CLOSED, WRITTEN, WRITTEN];
        assert_eq!(zones(&rig), expected, "{draft}");
        assert!(
            fs::read(rig.path(NAME)).unwrap() == before,
            "reading changes nothing"
        );
        let device = rig.open(NAME);
        assert_eq!(device.limits().zoned.unwrap().max_append(), 65536);
        rig.write(&device, ZONE + 16384, &pattern(5, 4096));
        rig.op(&device, ZoneOp::Reset, 70 * ZONE).unwrap();
        rig.close(device);
        assert_eq!(header(&rig).extension(EXT_ZONED).unwrap().len(), 44);
        assert_eq!(header(&rig).autoclear, AUTOCLEAR_ZONE_TABLE);
        // The old table, where it was replaced, is leaked, and that is all.
        let outcome = run(&rig, Repair::Leaks);
        assert_eq!(
            (outcome.report.unwrap().corruptions, outcome.zones.unwrap().errors),
            (0, 0)
        );
        is_whole(&rig);
        assert_eq!(zones(&rig)[0].1, 20480);
        assert_eq!(zones(&rig)[3].0, Condition::Empty);
    }
}

#[test]
fn images_without_zones_and_sidecars_are_checked_too() {
    let rig = Rig::new();
    rig.plain(
        "plain.qcow2",
        &Layout {
            size: ZONE,
            ..Layout::default()
        },
    );
    let outcome = run_named(&rig, "plain.qcow2", Repair::None).unwrap();
    assert!(outcome.zones.is_none() && outcome.report.unwrap().corruptions == 0);
    fs::write(rig.path("plain.raw"), [0; 65536]).unwrap();
    assert!(matches!(
        run_named(&rig, "plain.raw", Repair::None),
        Err(CheckError::NothingToCheck)
    ));
    rig.zoned_raw("disk.raw", 8 * ZONE, ZONE);
    let device = rig.open("disk.raw");
    rig.write(&device, ZONE, &pattern(1, 8192));
    rig.close(device);
    let outcome = run_named(&rig, "disk.raw", Repair::None).unwrap();
    assert_eq!(
        (outcome.zones.unwrap().errors, outcome.report.is_none()),
        (0, true)
    );
    // Both copies of the only block.
    poke(&rig, "disk.raw.zones", 8192 + 100, &[0xee; 8]);
    poke(&rig, "disk.raw.zones", 8192 + 4096 + 100, &[0xee; 8]);
    let zones = run_named(&rig, "disk.raw", Repair::None).unwrap().zones.unwrap();
    assert!(zones.errors > 0, "{:?}", zones.messages);
    let zones = run_named(&rig, "disk.raw", Repair::All).unwrap().zones.unwrap();
    assert!(zones.errors == 0 && zones.fixed > 0, "{:?}", zones.messages);
    let device = rig.open("disk.raw");
    assert_eq!(rig.zones(&device)[1].wp, ZONE + 8192);
    assert_eq!(rig.read(&device, ZONE, 8192), pattern(1, 8192));
    rig.close(device);
}
