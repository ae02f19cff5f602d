//! `create` of qcow2 images: qemu-img's command lines, with and without zones.

use serde_json::json;

use crate::qemu_img::qemu_img;
use crate::support::Bench;

/// The command of the slides in which zoned qcow2 was shown, after the program's name.
const SHOWN: [&str; 20] = [
    "create",
    "-f",
    "qcow2",
    "zbc.qcow2",
    "-o",
    "size=768M",
    "-o",
    "zone.size=64M",
    "-o",
    "zone.capacity=64M",
    "-o",
    "zone.conventional_zones=0",
    "-o",
    "zone.max_append_bytes=4096",
    "-o",
    "zone.max_open_zones=6",
    "-o",
    "zone.max_active_zones=8",
    "-o",
    "zone.mode=host-managed",
];

#[test]
fn the_command_of_the_slides_works_and_prints_qemus_line() {
    let bench = Bench::new();
    assert_eq!(
        bench.run(&SHOWN).ok(),
        "Formatting 'zbc.qcow2', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib \
         zone.mode=host-managed zone.size=67108864 zone.capacity=67108864 zone.conventional_zones=0 \
         zone.max_append_bytes=4096 zone.max_active_zones=8 zone.max_open_zones=6 size=805306368 lazy_refcounts=off \
         refcount_bits=16\n"
    );
    let info = bench.json(&["info", "--json", "zbc.qcow2"]);
    let zoned = &info["format-specific"]["data"]["zoned"];
    for (key, value) in [
        ("mode", json!("host-managed")),
        ("nr-zones", json!(12)),
        ("zone-size", json!(64 << 20)),
        ("zone-capacity", json!(64 << 20)),
        ("conventional-zones", json!(0)),
        ("max-active-zones", json!(8)),
        ("max-open-zones", json!(6)),
        ("max-append-bytes", json!(4096)),
        ("conditions", json!({"empty": 12})),
    ] {
        assert_eq!(zoned[key], value, "{key} of {info}");
    }
    // QEMU knows the format and not yet its zones.
    if let Some(theirs) = qemu_img(&bench, &["info", "zbc.qcow2"]) {
        assert!(
            theirs.err.contains("Unsupported qcow2 feature(s): zoned format"),
            "{theirs:?}"
        );
    }
}

#[test]
fn our_flags_make_the_same_image() {
    let bench = Bench::new();
    bench.run(&SHOWN).ok();
    let flags = [
        "create",
        "disk.qcow2",
        "--size",
        "768M",
        "--zone-size",
        "64M",
        "--max-append",
        "4096",
        "--max-open",
        "6",
        "--max-active",
        "8",
    ];
    let out = bench.run(&flags).ok();
    assert!(out.starts_with("Formatting 'disk.qcow2', fmt=qcow2 "), "{out}");
    assert!(
        out.contains("\n12 zones of 64 MiB, zone table in the image. Next: zbdkit serve disk.qcow2 "),
        "{out}"
    );
    let zoned = |image| {
        let mut info = bench.json(&["info", "--json", image])["format-specific"]["data"].take();
        info["zoned"]["table"].take();
        info
    };
    assert_eq!(zoned("zbc.qcow2"), zoned("disk.qcow2"));
    // The name alone chose the format, so that there are zones; -f qcow2 means what it means to qemu-img.
    bench.run(&["create", "-q", "default.qcow2", "1G"]).ok();
    assert_eq!(zoned("default.qcow2")["zoned"]["zone-size"], 256 << 20);
    for plain in [
        &["create", "-q", "-f", "qcow2", "plain.qcow2", "1G"][..],
        &["create", "-q", "--model", "none", "none.qcow2", "1G"],
        &["create", "-q", "-o", "zone.mode=none", "mode.qcow2", "1G"],
    ] {
        bench.run(plain).ok();
        let image = plain[plain.len() - 2];
        assert_eq!(
            bench.json(&["info", "--json", image])["format-specific"]["data"].get("zoned"),
            None,
            "{image}"
        );
    }
}

#[test]
fn plain_images_are_those_of_qemu_img() {
    let bench = Bench::new();
    if qemu_img(&bench, &["create", "-q", "-f", "qcow2", "base.qcow2", "64M"]).is_none() {
        return;
    }
    for (options, size) in [
        (&[][..], &["1G"][..]),
        (&["-o", "cluster_size=4k,compat=0.10"], &["1M"]),
        (&["-o", "size=1000000"], &[]),
        (&["-b", "base.qcow2", "-F", "qcow2"], &[]),
        (&["-b", "base.qcow2", "-B", "qcow2"], &["128M"]),
        (&["-o", "backing_file=base.qcow2,backing_fmt=qcow2"], &[]),
        (&["-u", "-b", "not/there", "-F", "raw"], &["2G"]),
        (
            &[
                "-o",
                "extended_l2=on,cluster_size=128k,lazy_refcounts=on,refcount_bits=1",
            ],
            &["10M"],
        ),
        (&["-o", "compression_type=zstd,preallocation=metadata"], &["10M"]),
        (&["-o", "preallocation=falloc"], &["4M"]),
        (&["-o", "preallocation=full,cluster_size=512"], &["1M"]),
        (&[], &["0"]),
    ] {
        let command = |image| [&["create", "-f", "qcow2"], options, &[image], size].concat();
        let theirs = qemu_img(&bench, &command("theirs.qcow2")).unwrap().ok();
        let ours = bench.run(&command("ours.qcow2")).ok();
        assert_eq!(ours.replace("ours.qcow2", "theirs.qcow2"), theirs, "{options:?}");
        let described = |image| {
            let told = qemu_img(&bench, &["info", "--output=json", image]).unwrap().ok();
            let mut info: serde_json::Value = serde_json::from_str(&told).unwrap();
            for figure in ["filename", "actual-size", "children"] {
                info[figure].take();
            }
            info
        };
        assert_eq!(described("ours.qcow2"), described("theirs.qcow2"), "{options:?}");
        let checked = qemu_img(&bench, &["check", "ours.qcow2"]).unwrap();
        // An orphan cannot be checked.
        assert!(
            checked.status == Some(0) || checked.err.contains("not/there"),
            "{options:?}: {checked:?}"
        );
        for image in ["ours.qcow2", "theirs.qcow2"] {
            std::fs::remove_file(bench.path(image)).unwrap();
        }
    }
}

#[test]
fn an_external_data_file_is_made_beside() {
    let bench = Bench::new();
    for (image, data) in [
        ("raw.qcow2", "data_file=raw.data,data_file_raw=on"),
        ("own.qcow2", "data_file=own.data"),
    ] {
        bench
            .run(&["create", "-q", "-f", "qcow2", "-o", data, image, "8M"])
            .ok();
        let info = bench.json(&["info", "--json", image]);
        let name = image.replace("qcow2", "data");
        assert_eq!(info["format-specific"]["data"]["data-file"], name);
        assert!(bench.path(&name).exists());
        if let Some(checked) = qemu_img(&bench, &["check", image]) {
            checked.ok();
        }
    }
}

#[test]
fn an_overlay_begins_with_the_zones_of_its_base() {
    let bench = Bench::new();
    bench
        .run(&[
            "create",
            "-q",
            "base.qcow2",
            "768M",
            "--zone-size",
            "64M",
            "--max-open",
            "3",
        ])
        .ok();
    bench.run(&["finish", "-q", "base.qcow2", "--zone", "2"]).ok();
    let out = bench
        .run(&[
            "create",
            "-f",
            "qcow2",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
            "top.qcow2",
        ])
        .ok();
    assert!(
        out.contains(" zone.size=67108864 ") && out.contains(" backing_file=base.qcow2 "),
        "{out}"
    );
    let report = |image| bench.run(&["report", image]).ok();
    assert_eq!(report("top.qcow2"), report("base.qcow2"));
    bench.run(&["finish", "-q", "top.qcow2", "--zone", "3"]).ok();
    assert_ne!(report("top.qcow2"), report("base.qcow2"), "they diverge");
    bench
        .run(&[
            "create",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
            "--zone-size",
            "32M",
            "x.qcow2",
        ])
        .fails(2, "has the zones of that, or none: leave out zone.size");
    assert!(!bench.path("x.qcow2").exists());
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    let bench = Bench::new();
    for (args, status, message) in [
        (
            &["-o", "cluster_size=1000", "1M"][..],
            1,
            "Cluster size must be a power of two between 512 and 2048k",
        ),
        (
            &["-o", "extended_l2=on,cluster_size=4k", "1M"],
            1,
            "at least 16384 bytes",
        ),
        (
            &["-o", "refcount_bits=3", "1M"],
            1,
            "Refcount width must be a power of two",
        ),
        (
            &["-o", "refcount_bits=8,compat=0.10", "1M"],
            1,
            "compatibility level 1.1",
        ),
        (
            &["-o", "cluster_size=512", "1T"],
            1,
            "too large for file format 'qcow2'",
        ),
        (
            &["-o", "data_file_raw=on", "1M"],
            1,
            "data-file-raw requires data-file",
        ),
        (
            &["-o", "encryption=on", "1M"],
            2,
            "zbdkit neither makes nor opens encrypted images",
        ),
        (
            &["-o", "encrypt.format=luks,encrypt.key-secret=s", "1M"],
            2,
            "encrypted images",
        ),
        (&["-b", "not-there", "-F", "qcow2"], 1, "not-there"),
        (&["-b", "not-there", "1M"], 2, "Say -F qcow2 or -F raw"),
        (&["-u", "-b", "not-there", "-F", "qcow2"], 2, "Say --size"),
        (&["-F", "qcow2", "1M"], 2, "no backing_file"),
        (&["-o", "size=1M", "2M"], 2, "size is given twice"),
        (&[], 2, "Say --size"),
        (
            &["-o", "clustersize=4k", "1M"],
            2,
            "(did you mean \"cluster_size\"?)",
        ),
        (&["--sidecar", "x", "1G"], 2, "holds its zone table itself"),
        // What the zone table of the format cannot say.
        (&["--zone-size", "96M", "768M"], 1, "power of"),
        (&["--zone-size", "32k", "1M"], 1, "cluster size"),
        (&["-o", "zone.size=64M,compat=0.10", "768M"], 1, "version=v3"),
        (
            &["--zone-size", "4M", "--conventional", "16", "64M"],
            1,
            "leave no sequential one",
        ),
        (&["--zone-size", "64M", "8191P"], 1, "zones"),
    ] {
        bench
            .run(&[&["create", "-f", "qcow2", "x.qcow2"], args].concat())
            .fails(status, message);
        assert_eq!(
            bench.directory().read_dir().unwrap().count(),
            0,
            "{args:?} left something"
        );
    }
}

#[test]
fn limits_that_cannot_be_met_are_cut_with_qemus_warning() {
    let bench = Bench::new();
    let made = bench.run(&[
        "create",
        "-f",
        "qcow2",
        "-o",
        "zone.size=64M,zone.max_active_zones=13,zone.max_open_zones=14",
        "x.qcow2",
        "768M",
    ]);
    assert_eq!(
        made.err,
        "zbdkit: warning: max_active_zones 13 exceeds nr_zones 12, clamping to nr_zones\n\
         zbdkit: warning: max_open_zones 14 exceeds the number of SWR zones, clamping to 12\n"
    );
    made.ok();
}

#[test]
fn a_qcow2_image_is_replaced_only_by_force() {
    let bench = Bench::new();
    let command = ["create", "-q", "-f", "qcow2", "x.qcow2", "1M"];
    bench.run(&command).ok();
    bench.run(&command).fails(1, "x.qcow2 exists already; remove it");
    bench.run(&[&command[..], &["--force"]].concat()).ok();
}

#[test]
fn json_tells_what_was_made() {
    let bench = Bench::new();
    let made = bench.json(&["create", "--json", "x.qcow2", "768M", "--zone-size", "64M"]);
    assert_eq!(
        (&made["format"], &made["sidecar"]),
        (&json!("qcow2"), &json!(null))
    );
    assert_eq!(
        (&made["size"], &made["zoned"]["nr_zones"]),
        (&json!(768 << 20), &json!(12))
    );
    let info = bench.json(&["info", "--json", "x.qcow2"]);
    assert_eq!(
        info["format-specific"]["data"]["zoned"]["table"]["uuid"],
        made["uuid"]
    );
    let plain = bench.json(&["create", "--json", "-f", "qcow2", "plain.qcow2", "1M"]);
    assert_eq!((&plain["zoned"], &plain["uuid"]), (&json!(null), &json!(null)));
}

#[test]
fn options_are_listed_in_the_shape_of_qemu_img() {
    let bench = Bench::new();
    let ours = bench.run(&["create", "-f", "qcow2", "-o", "help"]).ok();
    assert_eq!(bench.run(&["create", "-o", "size=1G,?", "x.qcow2"]).ok(), ours);
    bench
        .run(&["create", "-o", "size=1G"])
        .fails(2, "which file is to be made?");
    let names = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| line.starts_with("  "));
        lines
            .filter_map(|line| line.split(" - ").next())
            .map(|name| name.trim().to_owned())
            .collect()
    };
    let ours_names = names(&ours);
    assert!(
        ours.starts_with("Supported qcow2 options:\n  backing_file=<str>     - "),
        "{ours}"
    );
    assert!(
        ours_names
            .iter()
            .any(|name| name == "zone.max_append_bytes=<size>"),
        "{ours}"
    );
    let Some(theirs) = qemu_img(&bench, &["create", "-f", "qcow2", "-o", "help"]) else {
        return;
    };
    for name in names(&theirs.ok()) {
        let left_out = name.starts_with("encrypt") || name.starts_with("keep_data_file");
        assert!(left_out || ours_names.contains(&name), "{name} is missing");
    }
}
