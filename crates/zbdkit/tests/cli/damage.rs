//! Images that are not as they were left, and images that somebody else has.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use crate::support::Bench;

const BLOCK: u64 = 4096;

fn sidecar(bench: &Bench) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(bench.path("disk.raw.zones"))
        .unwrap()
}

/// Flips a byte in the 4096-byte block of that number.
fn damage(file: &File, block: u64) {
    let mut byte = [0];
    let at = block * BLOCK + 100;
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0xff], at).unwrap();
}

#[test]
fn a_truncated_or_extended_image_is_refused() {
    let bench = Bench::with_demo();
    let data = OpenOptions::new()
        .write(true)
        .open(bench.path("disk.raw"))
        .unwrap();
    data.set_len(700 << 20).unwrap();
    bench
        .run(&["info", "disk.raw"])
        .fails(1, "describes 805306368: the file was truncated; restore it");
    data.set_len(800 << 20).unwrap();
    bench
        .run(&["info", "disk.raw"])
        .fails(1, "set the file's size back to 805306368");
    data.set_len(768 << 20).unwrap();
    bench.run(&["info", "disk.raw"]).ok();
}

#[test]
fn a_missing_zone_table_is_named() {
    let bench = Bench::with_demo();
    std::fs::rename(bench.path("disk.raw.zones"), bench.path("elsewhere")).unwrap();
    bench.run(&["info", "disk.raw"]).fails(1, "disk.raw.zones");
    bench
        .run(&["info", "driver=zoned,file.filename=disk.raw"])
        .fails(1, "the zone table is missing");
    bench
        .run(&["info", "driver=zoned,file.filename=disk.raw,sidecar=elsewhere"])
        .ok();
    bench
        .run(&["info", "elsewhere"])
        .fails(1, "is a zone table; name the image that it belongs to");
    bench
        .run(&["info", "nothing.raw"])
        .fails(1, "nothing.raw: cannot be opened: No such file or directory");
}

#[test]
fn a_zone_table_of_another_image_is_refused() {
    let bench = Bench::with_demo();
    bench
        .run(&["create", "-q", "2.raw", "--size", "768M", "--zone-size", "64M"])
        .ok();
    let run = bench.run(&["info", "driver=zoned,file.filename=disk.raw,sidecar=2.raw.zones"]);
    if run.status == Some(0) {
        eprintln!("SKIPPED: the file system of the temporary directory keeps no extended attributes");
        return;
    }
    run.fails(1, "this zone table belongs to another image");
}

#[test]
fn one_damaged_copy_is_made_good_with_a_notice_and_both_are_not() {
    let bench = Bench::with_demo();
    // Several writes of table block 0, an even number, so that both its copies exist; the older one is copy 1.
    bench.run(&["finish", "-q", "disk.raw", "--zone", "3"]).ok();
    bench.run(&["finish", "-q", "disk.raw", "--zone", "4"]).ok();
    let table = sidecar(&bench);
    damage(&table, 3);
    let info = bench.run(&["info", "disk.raw"]);
    let notice = "one copy of zone table block 0 is damaged; the other one (generation";
    assert!(info.out.contains(notice), "{info:?}");
    assert!(info.ok().contains("10 empty, 2 full"));
    let json = bench.json(&["info", "--json", "disk.raw"]);
    assert!(json["notices"][0].as_str().unwrap().contains(notice), "{json}");
    let report = bench.run(&["report", "disk.raw", "-c", "1"]);
    assert!(
        report.err.contains(notice) && report.err.starts_with("zbdkit: warning: "),
        "{report:?}"
    );

    damage(&table, 2);
    bench
        .run(&["info", "disk.raw"])
        .fails(1, "both copies of zone table block 0 (zones 0 to 11) are damaged");
}

#[test]
fn a_damaged_newest_copy_is_not_replaced_by_an_older_one() {
    let bench = Bench::with_demo();
    bench.run(&["finish", "-q", "disk.raw", "--zone", "3"]).ok();
    bench.run(&["finish", "-q", "disk.raw", "--zone", "4"]).ok();
    damage(&sidecar(&bench), 2);
    bench
        .run(&["info", "disk.raw"])
        .fails(1, "a damaged copy held the newest state");
}

#[test]
fn the_header_has_two_copies_too() {
    let bench = Bench::with_demo();
    let table = sidecar(&bench);
    damage(&table, 0);
    let info = bench.run(&["info", "disk.raw"]).ok();
    assert!(
        info.contains("notice: disk.raw.zones: one copy of the zone table's header is damaged"),
        "{info}"
    );
    damage(&table, 1);
    bench
        .run(&["info", "disk.raw"])
        .fails(1, "both copies of the header are damaged");
    table.set_len(100).unwrap();
    bench.run(&["info", "disk.raw"]).fails(1, "truncated");
}

#[test]
fn a_second_opener_is_told_who_has_the_image() {
    let bench = Bench::with_demo();
    let mut user = bench.interactive("disk.raw");
    user.command("write 0 4k");
    let holder = format!("zbdkit (process {})", user.child.id());
    for args in [&["info", "disk.raw"][..], &["reset", "disk.raw", "--all"]] {
        let run = bench.run(args);
        run.fails(1, "lock: another process is using the image");
        assert!(run.err.contains(&holder), "{run:?}");
    }
    let info = bench.json(&["info", "-U", "--json", "disk.raw"]);
    assert_eq!(info["table"]["clean"], false);
    assert_eq!(
        info["conditions"]["closed"], 1,
        "the write is seen through the run state: {info}"
    );
    let report = bench.run(&["report", "-U", "disk.raw", "-c", "1"]).ok();
    assert!(report.contains("wptr 0x000008"), "{report}");
    assert_eq!(user.finish(), Some(0));
    bench.run(&["reset", "disk.raw", "--all"]).ok();
}

#[test]
fn what_a_killed_process_wrote_is_there() {
    let bench = Bench::with_demo();
    let mut user = bench.interactive("disk.raw");
    user.command("write -P 5 0 12k");
    user.child.kill().unwrap();
    user.child.wait().unwrap();
    let info = bench.run(&["info", "disk.raw"]).ok();
    assert!(info.contains("state: not closed (epoch 1)"), "{info}");
    assert!(info.contains("11 empty, 1 closed"), "{info}");
    bench.io(&["read -q -P 5 0 12k", "write -q 12k 4k"]).ok();
    assert!(
        bench
            .run(&["info", "disk.raw"])
            .ok()
            .contains("closed cleanly (epoch 2)")
    );
}
