//! `check`, beside qemu-img's.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use serde_json::Value;

use crate::qemu_img::{qemu_img, qemu_io};
use crate::support::Bench;

/// Sets the refcount of a cluster of an image with 16-bit refcounts in its first refcount block.
fn set_refcount(bench: &Bench, image: &str, cluster: u64, count: u16) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(bench.path(image))
        .unwrap();
    let offset = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let block = offset(offset(48));
    file.write_all_at(&count.to_be_bytes(), block + 2 * cluster)
        .unwrap();
}

/// An image of 1 MiB of data in clusters 5 to 20; `None` where there is no QEMU.
fn written(bench: &Bench, image: &str) -> Option<()> {
    qemu_img(bench, &["create", "-q", "-f", "qcow2", image, "1G"])?.ok();
    qemu_io(bench, image, &["write -q 0 1M"])?.ok();
    // Room for clusters that nothing refers to.
    let file = OpenOptions::new().write(true).open(bench.path(image)).unwrap();
    file.set_len(64 * 65536).unwrap();
    Some(())
}

/// The same check by both; status, stdout, and stderr without our name.
fn both(bench: &Bench, args: &[&str]) -> [(Option<i32>, String, String); 2] {
    let copy = |from: &str, to: &str| std::fs::copy(bench.path(from), bench.path(to)).unwrap();
    copy("x.qcow2", "save");
    let theirs = qemu_img(bench, &[&["check"], args, &["x.qcow2"]].concat()).unwrap();
    copy("save", "x.qcow2");
    let ours = bench.run(&[&["check"], args, &["x.qcow2"]].concat());
    copy("save", "x.qcow2");
    [
        (ours.status, ours.out, ours.err),
        (theirs.status, theirs.out, theirs.err),
    ]
}

#[test]
fn a_sound_image_is_called_that_as_by_qemu_img() {
    let bench = Bench::new();
    if written(&bench, "x.qcow2").is_none() {
        return;
    }
    for args in [&[][..], &["-q"], &["-r", "leaks"], &["-r", "all"], &["-U"]] {
        let [ours, theirs] = both(&bench, args);
        assert_eq!(ours, theirs, "{args:?}");
        assert_eq!(ours.0, Some(0));
    }
    let [ours, theirs] = both(&bench, &["--output=json"]);
    let parsed = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    assert_eq!(parsed(&ours.1), parsed(&theirs.1));
}

#[test]
fn leaks_and_corruptions_are_told_and_repaired_as_by_qemu_img() {
    let bench = Bench::new();
    if written(&bench, "x.qcow2").is_none() {
        return;
    }
    for (what, counts, status) in [
        ("a leak", &[(30, 1)][..], 3),
        ("corruption", &[(8, 0)], 2),
        ("both", &[(30, 1), (8, 0)], 2),
    ] {
        for &(cluster, count) in counts {
            set_refcount(&bench, "x.qcow2", cluster, count);
        }
        for args in [&[][..], &["-q"]] {
            let [ours, theirs] = both(&bench, args);
            assert_eq!(ours, theirs, "{what} {args:?}");
            assert_eq!(ours.0, Some(status), "{what}");
        }
        let [ours, theirs] = both(&bench, &["--output=json"]);
        let parsed = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!(parsed(&ours.1), parsed(&theirs.1), "{what}");
        if what == "a leak" {
            let [ours, theirs] = both(&bench, &["-r", "leaks"]);
            assert_eq!(ours, theirs, "{what}");
        }
        bench.run(&["check", "-r", "all", "-q", "x.qcow2"]);
        let again = bench.run(&["check", "x.qcow2"]).ok();
        assert!(
            again.starts_with("No errors were found on the image.\n"),
            "{again}"
        );
        qemu_img(&bench, &["check", "x.qcow2"]).unwrap().ok();
        qemu_io(&bench, "x.qcow2", &["read -P 0xcd -q 0 1M"])
            .unwrap()
            .ok();
    }
}

#[test]
fn a_repair_says_what_it_did() {
    let bench = Bench::new();
    bench.run(&["create", "-q", "-f", "qcow2", "x.qcow2", "1G"]).ok();
    std::fs::OpenOptions::new()
        .write(true)
        .open(bench.path("x.qcow2"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    set_refcount(&bench, "x.qcow2", 10, 1);
    set_refcount(&bench, "x.qcow2", 11, 1);
    let found = bench.run(&["check", "x.qcow2"]);
    assert_eq!(found.status, Some(3), "{found:?}");
    assert_eq!(
        found.err,
        "Leaked cluster 10 refcount=1 reference=0\nLeaked cluster 11 refcount=1 reference=0\n"
    );
    let json = bench.run(&["check", "--json", "x.qcow2"]);
    assert_eq!(json.status, Some(3));
    assert_eq!(serde_json::from_str::<Value>(&json.out).unwrap()["leaks"], 2);
    let repaired = bench.run(&["check", "-r", "leaks", "x.qcow2"]);
    assert!(
        repaired.out.starts_with(
            "The following inconsistencies were found and repaired:\n\n    2 leaked clusters\n    0 corruptions\n\n\
             Double checking the fixed image now...\nNo errors were found on the image.\n"
        ),
        "{repaired:?}"
    );
    repaired.ok();
}

#[test]
fn zones_are_checked_too_and_their_table_is_no_leak() {
    let bench = Bench::new();
    bench
        .run(&["create", "-q", "x.qcow2", "768M", "--zone-size", "64M"])
        .ok();
    bench
        .run(&["io", "x.qcow2", "-c", "write -q 0 1M", "-c", "zf 64M 64M"])
        .ok();
    let sound = bench.run(&["check", "x.qcow2"]);
    assert_eq!(sound.err, "");
    assert!(sound.ok().starts_with("No errors were found on the image.\n"));
    let json = bench.json(&["check", "--json", "x.qcow2"]);
    assert_eq!(
        json["zones"],
        serde_json::json!({"errors": 0, "fixed": 0, "messages": []})
    );
}

/// Where the area with the zone table lies, from the header extension that names it.
fn area(bench: &Bench, image: &str) -> u64 {
    let bytes = std::fs::read(bench.path(image)).unwrap();
    let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let mut at = word(100) as usize;
    while word(at) != 0x7a62_646b {
        assert_ne!(word(at), 0, "there is no such extension");
        at += 8 + word(at + 4).next_multiple_of(8) as usize;
    }
    u64::from_be_bytes(bytes[at + 16..at + 24].try_into().unwrap())
}

#[test]
fn a_damaged_zone_table_in_an_image_is_told_and_repaired() {
    let bench = Bench::new();
    bench
        .run(&["create", "-q", "x.qcow2", "768M", "--zone-size", "64M"])
        .ok();
    bench.run(&["finish", "-q", "x.qcow2", "--zone", "3"]).ok();
    bench.run(&["io", "x.qcow2", "-c", "write -q -P 7 64M 64k"]).ok();
    let report = || bench.run(&["report", "x.qcow2"]);
    let before = report().ok();
    let file = OpenOptions::new()
        .write(true)
        .open(bench.path("x.qcow2"))
        .unwrap();
    let area = area(&bench, "x.qcow2");
    let damage = |block: u64| file.write_all_at(&[0x55; 64], area + block * 4096 + 100).unwrap();
    // The header's older copy, then both of the table's first block.
    for (blocks, message) in [(&[1][..], "header"), (&[2, 3], "zone")] {
        blocks.iter().copied().for_each(damage);
        let found = bench.run(&["check", "x.qcow2"]);
        assert_eq!(found.status, Some(2), "{found:?}");
        assert!(
            found.err.contains("ERROR ") && found.err.contains(message),
            "{found:?}"
        );
        assert!(found.out.contains("errors were found on the image."), "{found:?}");
        let json = bench.run(&["check", "--json", "x.qcow2"]);
        let json: Value = serde_json::from_str(&json.out).unwrap();
        assert!(json["zones"]["errors"].as_u64() > Some(0), "{json}");
        assert_eq!(json["corruptions"], json["zones"]["errors"], "{json}");
        // Leaks are not what is wrong.
        assert_eq!(bench.run(&["check", "-r", "leaks", "x.qcow2"]).status, Some(2));

        let repaired = bench.run(&["check", "-r", "all", "x.qcow2"]);
        assert_eq!(repaired.status, Some(0), "{repaired:?}");
        assert!(
            repaired.out.starts_with(
                "The following inconsistencies were found and repaired:\n\n    0 leaked clusters\n"
            ),
            "{repaired:?}"
        );
        assert_eq!(bench.run(&["check", "x.qcow2"]).err, "");
    }
    // Where data ends is known; that a zone was finished is not, unless the bare table tells.
    let after = report().ok();
    assert_eq!(after.lines().nth(1), before.lines().nth(1));
    bench.run(&["io", "x.qcow2", "-c", "read -q -P 7 64M 64k"]).ok();
}

#[test]
fn an_image_in_use_is_left_alone() {
    let bench = Bench::new();
    bench
        .run(&["create", "-q", "x.qcow2", "768M", "--zone-size", "64M"])
        .ok();
    let mut user = bench.interactive("x.qcow2");
    user.command("write 0 4k");
    let holder = format!("zbdkit (process {})", user.child.id());
    let denied = [
        &["check", "x.qcow2"][..],
        &["check", "-r", "all", "x.qcow2"],
        &["snapshot", "-l", "x.qcow2"],
        &["snapshot", "-c", "x", "x.qcow2"],
        &["resize", "x.qcow2", "1G"],
        &["info", "x.qcow2"],
        &["create", "--force", "x.qcow2", "1G"],
    ];
    let (shared, holder) = (&bench, &holder);
    // All at once, since each waits some seconds for the image.
    std::thread::scope(|scope| {
        for args in denied {
            scope.spawn(move || {
                let run = shared.run(args);
                run.fails(1, "another process is using the image");
                assert!(run.err.contains(holder), "{args:?}: {run:?}");
            });
        }
    });
    bench.run(&["info", "-U", "x.qcow2"]).ok();
    bench.run(&["snapshot", "-l", "-U", "x.qcow2"]).ok();
    // What is under way may look like a leak.
    let check = bench.run(&["check", "-U", "x.qcow2"]);
    assert!(matches!(check.status, Some(0 | 3)), "{check:?}");
    user.command("write 4k 4k");
    assert_eq!(user.finish(), Some(0));
    bench.run(&["check", "-q", "x.qcow2"]).ok();
}

#[test]
fn the_zone_table_of_a_raw_image_is_checked() {
    let bench = Bench::with_demo();
    let sound = bench.run(&["check", "disk.raw"]).ok();
    assert_eq!(sound, "No errors were found on the image.\n");
    bench.run(&["finish", "-q", "disk.raw", "--zone", "3"]).ok();
    bench.run(&["finish", "-q", "disk.raw", "--zone", "4"]).ok();
    let table = OpenOptions::new()
        .write(true)
        .open(bench.path("disk.raw.zones"))
        .unwrap();
    table.write_all_at(&[0x55], 3 * 4096 + 100).unwrap();
    let found = bench.run(&["check", "disk.raw"]);
    assert_eq!(found.status, Some(2), "{found:?}");
    assert!(
        found.err.contains("one copy of zone table block 0 is damaged"),
        "{found:?}"
    );
    let repaired = bench.run(&["check", "-r", "all", "disk.raw"]);
    assert_eq!(repaired.status, Some(0), "{repaired:?}");
    bench.run(&["check", "-q", "disk.raw"]).ok();
    assert_eq!(
        bench.json(&["info", "--json", "disk.raw"])["conditions"]["full"],
        2
    );
}

#[test]
fn statuses_are_qemu_imgs() {
    let bench = Bench::new();
    std::fs::write(bench.path("plain.raw"), [0; 4096]).unwrap();
    bench
        .run(&["check", "-f", "raw", "plain.raw"])
        .fails(63, "this image format has nothing to check");
    bench.run(&["check", "nothing.qcow2"]).fails(1, "No such file");
    // 2 would say that the image is corrupt.
    for args in [
        &["check"][..],
        &["check", "-r", "most", "x"],
        &["check", "-r", "all", "-U", "x"],
        &["-v", "check"],
    ] {
        assert_eq!(bench.run(args).status, Some(1), "{args:?}");
    }
    assert_eq!(bench.run(&["check", "--help"]).status, Some(0));
}
