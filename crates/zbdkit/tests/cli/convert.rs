//! `convert`: copies keep what they should, and say what they do not.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};

use crate::qemu_img::{qemu_img, qemu_io};
use crate::support::Bench;

const ZONES: [&str; 8] = [
    "--size",
    "64M",
    "--zone-size",
    "8M",
    "--max-open",
    "3",
    "--max-active",
    "4",
];

/// `NAME` of eight zones of 8 MiB, of which zone 0 is half written, zone 2 is finished and zone 5 is read-only.
fn used(bench: &Bench, name: &str) {
    bench
        .run_with("create", &[&["-q", name], &ZONES[..]].concat())
        .ok();
    bench
        .run(&[
            "io",
            name,
            "-c",
            "write -q -P 1 0 4M",
            "-c",
            "write -q -P 2 16M 64k",
            "-c",
            "zf 16M 8M",
            "-c",
            "write -q -P 3 40M 4k",
        ])
        .ok();
    bench
        .run(&["set-zone", "-q", name, "--zone", "5", "read-only"])
        .ok();
}

fn report(bench: &Bench, name: &str) -> serde_json::Value {
    bench.json(&["report", "--json", name])
}

#[test]
fn a_copy_is_the_same_and_says_nothing() {
    let bench = Bench::new();
    used(&bench, "disk.raw");
    for target in ["copy.raw", "copy.qcow2"] {
        let run = bench.run(&["convert", "disk.raw", target]);
        assert_eq!((&*run.out, &*run.err), ("", ""), "{run:?}");
        assert_eq!(
            bench.run(&["compare", "disk.raw", target]).ok(),
            "Images are identical.\n"
        );
        assert_eq!(report(&bench, "disk.raw"), report(&bench, target));
        // And back again.
        bench.run(&["convert", target, "back.raw"]).ok();
        assert_eq!(
            bench.run(&["compare", "-s", "disk.raw", "back.raw"]).status,
            Some(0)
        );
    }
    let blocks = |name: &str| fs::metadata(bench.path(name)).unwrap().blocks();
    assert!(blocks("copy.raw") <= blocks("disk.raw"), "holes stay holes");
}

#[test]
fn progress_is_printed_as_qemu_img_does() {
    let bench = Bench::new();
    used(&bench, "disk.raw");
    let out = bench.run(&["convert", "-p", "disk.raw", "copy.raw"]).ok();
    assert!(out.starts_with("    (0.00/100%)\r"), "{out:?}");
    assert!(out.ends_with("    (100.00/100%)\r\n"), "{out:?}");
    let quiet = bench.run(&["convert", "-p", "-q", "disk.raw", "copy.raw"]).ok();
    assert_eq!(quiet, "");
}

#[test]
fn zones_go_only_where_that_is_said() {
    let bench = Bench::new();
    used(&bench, "disk.raw");
    bench
        .run(&["convert", "disk.raw", "driver=memory,size=64M"])
        .fails(2, "to copy only the contents, say -o zone.mode=none");
    bench
        .run(&["convert", "-o", "zone.mode=none", "disk.raw", "flat.img"])
        .ok();
    assert_eq!(fs::metadata(bench.path("flat.img")).unwrap().len(), 64 << 20);
    assert!(!bench.path("flat.img.zones").exists());
    bench
        .run(&["compare", "--no-zones", "disk.raw", "-F", "raw", "flat.img"])
        .ok();
    let zones = bench.run(&["compare", "disk.raw", "-F", "raw", "flat.img"]);
    assert_eq!(
        (zones.status, &*zones.out),
        (
            Some(1),
            "Zones mismatch: one image only has zones: 8 zones in the first image, no zones in the second!\n"
        )
    );
}

#[test]
fn a_disk_without_zones_can_get_some() {
    let bench = Bench::new();
    used(&bench, "disk.raw");
    bench
        .run(&["convert", "-o", "zone.mode=none", "disk.raw", "flat.img"])
        .ok();
    let fill = ["convert", "-f", "raw", "flat.img", "filled.raw", "-o"];
    bench
        .run(&[&fill[..], &["zone.size=8M,zone.max_active_zones=4"]].concat())
        .ok();
    let zones = report(&bench, "filled.raw");
    let state = |zone: usize| {
        let zone = &zones["zones"][zone];
        (
            zone["condition"].as_str().unwrap(),
            zone["written_end"].as_u64().unwrap() - zone["start"].as_u64().unwrap(),
        )
    };
    assert_eq!(state(0), ("closed", 4 << 20));
    assert_eq!(state(2), ("closed", 64 << 10));
    assert_eq!(state(5), ("closed", 4096));
    assert_eq!(state(1), ("empty", 0));
    bench
        .run(&["compare", "--no-zones", "-f", "raw", "flat.img", "filled.raw"])
        .ok();
    let few = bench.run(&[&fill[..], &["zone.size=8M,zone.max_active_zones=2"]].concat());
    assert!(
        few.err.contains("note: 3 of 3 zones with data were finished"),
        "{few:?}"
    );
    few.ok();
    bench
        .run(&[&fill[..], &["zone.size=8M,zone.capacity=2M"]].concat())
        .fails(1, "data up to offset");
    assert!(!bench.path("filled.raw").exists() && !bench.path("filled.raw.zones").exists());
}

#[test]
fn limits_may_change_and_shapes_may_not() {
    let bench = Bench::new();
    used(&bench, "disk.raw");
    bench
        .run(&[
            "convert",
            "-o",
            "zone.max_active_zones=3,zone.mode=host-aware",
            "disk.raw",
            "copy.raw",
        ])
        .ok();
    let info = bench.json(&["info", "--json", "copy.raw"]);
    assert_eq!(info["zoned"]["max_active"], 3);
    assert_eq!(info["zoned"]["model"], "host-aware");
    for (option, message) in [
        ("zone.size=16M", "zone.size=16777216: it is 8388608 in the source"),
        ("zone.capacity=4M", "cannot get another shape"),
        ("zone.conventional_zones=1", "cannot get another shape"),
        ("zone.mode=none,zone.size=8M", "leave out the one or the others"),
        ("zone.mode=foo", "expected one of host-managed, host-aware, none"),
        ("size=32M", "a copy is not smaller"),
        ("zone.sice=1", "did you mean \"zone.size\"?"),
    ] {
        let run = bench.run(&["convert", "-o", option, "disk.raw", "other.raw"]);
        run.fails(2, message);
        assert!(!bench.path("other.raw").exists());
    }
    // A block size that the written ends do not fit, found before the target is touched.
    fs::write(bench.path("other.raw"), "precious").unwrap();
    bench
        .run(&["convert", "-o", "block_size=64k", "disk.raw", "other.raw"])
        .fails(1, "the zones do not fit");
    assert_eq!(fs::read(bench.path("other.raw")).unwrap(), b"precious");
}

#[test]
fn what_is_in_use_is_not_replaced() {
    let bench = Bench::new();
    used(&bench, "disk.raw");
    used(&bench, "busy.raw");
    let user = bench.interactive("busy.raw");
    bench
        .run(&["convert", "disk.raw", "busy.raw"])
        .fails(1, "failed to get \"write\" lock");
    assert_eq!(user.finish(), Some(0));
    bench
        .run(&["convert", "disk.raw", "disk.raw"])
        .fails(2, "the source and the target are the same file");
    bench.run(&["convert", "disk.raw", "busy.raw"]).ok();
    // The zone table of what was there before does not outlive it; a stranger of that name does.
    bench
        .run(&["convert", "-o", "zone.mode=none", "disk.raw", "busy.raw"])
        .ok();
    assert!(!bench.path("busy.raw.zones").exists());
    fs::write(bench.path("busy.raw.zones"), "not a table").unwrap();
    bench
        .run(&["convert", "-o", "zone.mode=none", "disk.raw", "busy.raw"])
        .fails(1, "busy.raw.zones exists already");
}

#[test]
fn an_existing_target_is_written_over_whole() {
    let bench = Bench::new();
    used(&bench, "disk.raw");
    used(&bench, "other.raw");
    bench
        .run(&[
            "io",
            "other.raw",
            "-c",
            "write -q -P 9 8M 1M",
            "-c",
            "write -q -P 9 4M 1M",
        ])
        .ok();
    bench.run(&["convert", "-n", "disk.raw", "other.raw"]).ok();
    assert_eq!(bench.run(&["compare", "disk.raw", "other.raw"]).status, Some(0));
    bench
        .run(&["convert", "-n", "-o", "size=1M", "disk.raw", "other.raw"])
        .fails(2, "-o describes a new image");
    bench
        .run(&["convert", "-n", "disk.raw", "nothing.raw"])
        .fails(1, "nothing.raw");
    fs::File::create(bench.path("small.img"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    fs::File::create(bench.path("large.img"))
        .unwrap()
        .set_len(2 << 20)
        .unwrap();
    bench
        .run(&[
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "raw",
            "large.img",
            "small.img",
        ])
        .fails(1, "is smaller than the source");
    fs::File::options()
        .write(true)
        .open(bench.path("large.img"))
        .unwrap()
        .write_all_at(&[0xee; 4096], (1 << 20) + 8192)
        .unwrap();
    bench
        .run(&[
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "raw",
            "small.img",
            "large.img",
        ])
        .ok();
    assert!(
        fs::read(bench.path("large.img"))
            .unwrap()
            .iter()
            .all(|byte| *byte == 0)
    );
}

#[test]
fn a_failed_copy_leaves_nothing() {
    let bench = Bench::new();
    used(&bench, "disk.raw");
    bench
        .run(&["convert", "nothing.raw", "copy.raw"])
        .fails(1, "nothing.raw");
    bench
        .run(&["convert", "disk.raw", "no/such/directory"])
        .fails(1, "no/such/directory");
    assert!(!bench.path("copy.raw").exists());
    for (args, message) in [
        (
            &["-S", "3"][..],
            "Valid sizes are multiples of 512 up to 16777216",
        ),
        (&["-S", "32M"], "Valid sizes are multiples of 512 up to 16777216"),
        (&["-c"], "Compression not supported for this file format"),
        (&["-O", "vmdk"], "format \"vmdk\" is not known"),
        (
            &["-b", "x", "-F", "raw"],
            "Backing file not supported for file format 'raw'",
        ),
        (&["-f", "foo"], "format \"foo\" is not known"),
    ] {
        let run = bench.run(&[&["convert"], args, &["disk.raw", "copy.raw"]].concat());
        run.fails(2, message);
    }
    assert!(!bench.path("copy.raw").exists());
}

#[test]
fn compressed_copies_are_smaller_and_the_same() {
    let bench = Bench::new();
    used(&bench, "disk.raw");
    bench.run(&["convert", "disk.raw", "plain.qcow2"]).ok();
    let blocks = |name: &str| fs::metadata(bench.path(name)).unwrap().blocks();
    for (options, name) in [
        (&["-c"][..], "zlib.qcow2"),
        (
            &["-c", "-o", "compression_type=zstd,cluster_size=2M"],
            "zstd.qcow2",
        ),
        (&["-c", "-W", "-m", "16", "-o", "cluster_size=4k"], "small.qcow2"),
        (&["-c", "-o", "extended_l2=on"], "extended.qcow2"),
    ] {
        bench
            .run(&[&["convert"], options, &["disk.raw", name]].concat())
            .ok();
        assert_eq!(
            bench.run(&["compare", "disk.raw", name]).status,
            Some(0),
            "{name}"
        );
        assert_eq!(bench.run(&["check", name]).status, Some(0), "{name}");
        assert!(blocks(name) * 4 < blocks("plain.qcow2"), "{name}");
    }
    // Zones go on from the middle of a compressed cluster.
    bench
        .run(&[
            "io",
            "zlib.qcow2",
            "-c",
            "write -q -P 4 4M 4k",
            "-c",
            "read -q -P 1 0 4M",
        ])
        .ok();
    assert_eq!(bench.run(&["check", "zlib.qcow2"]).status, Some(0));
    bench
        .run(&["convert", "-n", "-c", "disk.raw", "zlib.qcow2"])
        .fails(2, "-c writes new images only");
}

#[test]
fn an_overlay_holds_only_what_differs() {
    let bench = Bench::new();
    used(&bench, "disk.raw");
    bench.run(&["convert", "disk.raw", "base.qcow2"]).ok();
    bench.run(&["convert", "base.qcow2", "new.qcow2"]).ok();
    bench
        .run(&[
            "io",
            "new.qcow2",
            "-c",
            "write -q -P 7 4M 64k",
            "-c",
            "zrs 16M 8M",
            "-c",
            "write -q -P 2 16M 8k",
        ])
        .ok();
    bench
        .run(&[
            "convert",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
            "new.qcow2",
            "top.qcow2",
        ])
        .ok();
    assert_eq!(bench.run(&["compare", "new.qcow2", "top.qcow2"]).status, Some(0));
    let map = bench.run(&["map", "top.qcow2"]).ok();
    let own: Vec<_> = map.lines().filter(|line| line.ends_with("top.qcow2")).collect();
    assert_eq!(own.len(), 1, "{map}");
    assert!(own[0].starts_with("0x400000        0x10000 "), "{map}");
    // From an overlay of the same base nothing but its own is looked at.
    bench
        .run(&[
            "convert",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
            "top.qcow2",
            "again.qcow2",
        ])
        .ok();
    assert_eq!(
        bench.run(&["compare", "new.qcow2", "again.qcow2"]).status,
        Some(0)
    );
    for (args, message) in [
        (&["-b", "base.qcow2"][..], "which format has the backing image"),
        (
            &["-b", "base.qcow2", "-F", "qcow2", "-o", "zone.size=8M"],
            "leave out zone.size",
        ),
    ] {
        bench
            .run(&[&["convert"], args, &["new.qcow2", "no.qcow2"]].concat())
            .fails(2, message);
    }
    bench
        .run(&["convert", "-o", "zone.mode=none", "disk.raw", "flat.img"])
        .ok();
    bench
        .run(&["convert", "-b", "flat.img", "-F", "raw", "new.qcow2", "no.qcow2"])
        .fails(2, "the backing image has none");
    bench
        .run(&[
            "convert",
            "-f",
            "raw",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
            "flat.img",
            "no.qcow2",
        ])
        .fails(2, "but the source has none");
    assert!(!bench.path("no.qcow2").exists());
}

#[test]
fn a_snapshot_is_copied_with_the_zones_that_it_has() {
    let bench = Bench::new();
    used(&bench, "disk.raw");
    bench.run(&["convert", "disk.raw", "disk.qcow2"]).ok();
    bench.run(&["snapshot", "-c", "before", "disk.qcow2"]).ok();
    bench
        .run(&["io", "disk.qcow2", "-c", "zrs 0 8M", "-c", "write -q -P 9 8M 4k"])
        .ok();
    for name in ["before", "1"] {
        bench.run(&["convert", "-l", name, "disk.qcow2", "copy.raw"]).ok();
        assert_eq!(
            bench.run(&["compare", "disk.raw", "copy.raw"]).status,
            Some(0),
            "{name}"
        );
    }
    bench
        .run(&["convert", "-l", "never", "disk.qcow2", "copy.raw"])
        .fails(1, "never");
    assert_eq!(bench.run(&["compare", "disk.raw", "copy.raw"]).status, Some(0));
}

#[test]
fn qemu_reads_what_was_converted_and_the_other_way_round() {
    let bench = Bench::new();
    fs::File::create(bench.path("disk.img"))
        .unwrap()
        .set_len((9 << 20) + 512)
        .unwrap();
    let Some(_) = qemu_io(&bench, "disk.img", &["write -q -P 1 0 70000"]) else {
        return;
    };
    let disk = fs::File::options()
        .write(true)
        .open(bench.path("disk.img"))
        .unwrap();
    for at in [0, 65_000, (3 << 20) - 512, (5 << 20) + 100, 9 << 20] {
        disk.write_all_at(&[0x5a; 400], at).unwrap();
    }
    for options in [
        "",
        "cluster_size=512",
        "cluster_size=2M,compression_type=zstd",
        "extended_l2=on",
        "compat=0.10",
        "refcount_bits=1",
        "refcount_bits=64",
    ] {
        for compress in [false, true] {
            let mut args = vec!["-f", "raw", "-O", "qcow2"];
            args.extend(["-o", options].iter().filter(|_| !options.is_empty()));
            args.extend(["-c"].iter().filter(|_| compress));
            bench
                .run(&[&["convert"], &args[..], &["disk.img", "ours.qcow2"]].concat())
                .ok();
            qemu_img(
                &bench,
                &[&["convert"], &args[..], &["disk.img", "theirs.qcow2"]].concat(),
            )
            .unwrap()
            .ok();
            let what = format!("{args:?}");
            qemu_img(&bench, &["check", "ours.qcow2"]).unwrap().ok();
            for image in ["ours.qcow2", "theirs.qcow2"] {
                let same = ["compare", "-f", "raw", "-F", "qcow2", "disk.img", image];
                assert_eq!(
                    qemu_img(&bench, &same).unwrap().ok(),
                    "Images are identical.\n",
                    "{what}"
                );
                assert_eq!(bench.run(&same).ok(), "Images are identical.\n", "{what}");
            }
            bench
                .run(&["convert", "-O", "raw", "theirs.qcow2", "back.img"])
                .ok();
            assert!(
                fs::read(bench.path("disk.img")).unwrap() == fs::read(bench.path("back.img")).unwrap(),
                "{what}"
            );
            let (ours, theirs) = (bench.path("ours.qcow2"), bench.path("theirs.qcow2"));
            let len = |path: &std::path::Path| fs::metadata(path).unwrap().len();
            assert!(
                len(&ours) <= len(&theirs) + (len(&theirs) / 8).max(4 << 20),
                "{what}: larger than QEMU's"
            );
        }
    }
}
