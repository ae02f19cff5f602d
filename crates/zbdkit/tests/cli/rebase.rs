//! `rebase` and `commit`: what an overlay reads as stays, and moves down.

use std::fs;

use crate::qemu_img::{qemu_img, qemu_io};
use crate::support::Bench;

const SIZE: [&str; 2] = ["--size", "64M"];

/// `base.qcow2` with zones, some of them used, and `top.qcow2` over it, which has gone on from there; `ref.raw` is what
/// the top reads as.
fn zoned(bench: &Bench) {
    bench
        .run(
            &[
                &[
                    "create",
                    "-q",
                    "base.qcow2",
                    "--zone-size",
                    "8M",
                    "--conventional",
                    "1",
                    "--max-active",
                    "4",
                ],
                &SIZE[..],
            ]
            .concat(),
        )
        .ok();
    bench
        .run(&[
            "io",
            "base.qcow2",
            "-c",
            "write -q -P 1 0 1M",
            "-c",
            "write -q -P 2 8M 1000k",
            "-c",
            "zf 8M 8M",
            "-c",
            "write -q -P 3 16M 640k",
            "-c",
            "write -q -P 4 32M 64k",
        ])
        .ok();
    overlay(bench, "top.qcow2");
    bench
        .run(&[
            "io",
            "top.qcow2",
            "-c",
            "write -q -P 9 512k 100k",
            "-c",
            "zrs 16M 8M",
            "-c",
            "write -q -P 8 16M 68k",
            "-c",
            "write -q -P 7 33619968 8k",
            "-c",
            "write -q -P 6 40M 8k",
            "-c",
            "zrs 8M 8M",
        ])
        .ok();
    bench
        .run(&["set-zone", "-q", "top.qcow2", "--zone", "5", "read-only"])
        .ok();
    bench.run(&["convert", "top.qcow2", "ref.raw"]).ok();
}

fn overlay(bench: &Bench, name: &str) {
    bench
        .run(&["create", "-q", "-b", "base.qcow2", "-F", "qcow2", name])
        .ok();
}

#[track_caller]
fn same(bench: &Bench, a: &str, b: &str) {
    assert_eq!(bench.run(&["compare", a, b]).ok(), "Images are identical.\n");
}

#[track_caller]
fn sound(bench: &Bench, name: &str) {
    let check = bench.run(&["check", name]);
    assert_eq!(check.status, Some(0), "{check:?}");
}

#[test]
fn a_rebased_overlay_reads_as_before_and_keeps_its_zones() {
    let bench = Bench::new();
    zoned(&bench);
    bench.run(&["convert", "base.qcow2", "other.qcow2"]).ok();
    bench
        .run(&[
            "io",
            "other.qcow2",
            "-c",
            "write -q -P 77 0 2M",
            "-c",
            "write -q -P 77 48M 1M",
        ])
        .ok();
    for (backing, format) in [
        ("other.qcow2", "qcow2"),
        ("ref.raw", "raw"),
        ("base.qcow2", "qcow2"),
    ] {
        let run = bench.run(&["rebase", "-b", backing, "-F", format, "top.qcow2"]);
        assert_eq!((run.status, &*run.out), (Some(0), ""), "{run:?}");
        same(&bench, "top.qcow2", "ref.raw");
        sound(&bench, "top.qcow2");
    }
    bench.run(&["rebase", "-b", "", "top.qcow2"]).ok();
    for gone in ["base.qcow2", "other.qcow2"] {
        fs::remove_file(bench.path(gone)).unwrap();
    }
    same(&bench, "top.qcow2", "ref.raw");
    sound(&bench, "top.qcow2");
}

#[test]
fn an_unsafe_rebase_changes_the_name_only() {
    let bench = Bench::new();
    zoned(&bench);
    fs::create_dir(bench.path("moved")).unwrap();
    fs::rename(bench.path("base.qcow2"), bench.path("moved/base.qcow2")).unwrap();
    bench
        .run(&["compare", "top.qcow2", "ref.raw"])
        .fails(2, "base.qcow2");
    let before = fs::metadata(bench.path("top.qcow2")).unwrap().len();
    bench
        .run(&[
            "rebase",
            "-u",
            "-b",
            "moved/base.qcow2",
            "-F",
            "qcow2",
            "top.qcow2",
        ])
        .ok();
    same(&bench, "top.qcow2", "ref.raw");
    assert_eq!(fs::metadata(bench.path("top.qcow2")).unwrap().len(), before);
}

#[test]
fn what_cannot_be_rebased_is_left_alone() {
    let bench = Bench::new();
    zoned(&bench);
    for (args, status, message) in [
        (
            &["-b", "other.raw"][..],
            2,
            "which format has the backing image other.raw?",
        ),
        (
            &["-b", "other.raw", "-F", "vmdk"],
            2,
            "format \"vmdk\" is not known",
        ),
        (&["-b", "", "-F", "raw"], 2, "no backing image"),
        (&["-b", "other.raw", "-F", "raw"], 1, "other.raw"),
        (&["-b", "top.qcow2", "-F", "qcow2"], 2, "its own backing image"),
        (&["-b", "nbd://host/x", "-F", "raw"], 1, "only files are opened"),
    ] {
        let run = bench.run(&[&["rebase"], args, &["top.qcow2"]].concat());
        run.fails(status, message);
        same(&bench, "top.qcow2", "ref.raw");
    }
    bench
        .run(&["rebase", "-b", "base.qcow2", "-F", "qcow2", "ref.raw"])
        .fails(1, "only a qcow2 image has a backing image");
}

#[test]
fn a_commit_moves_data_and_zones_down() {
    let bench = Bench::new();
    zoned(&bench);
    let out = bench.run(&["commit", "top.qcow2"]).ok();
    assert_eq!(out, "Image committed.\n");
    for image in ["base.qcow2", "top.qcow2"] {
        same(&bench, image, "ref.raw");
        sound(&bench, image);
    }
    let zones = |name: &str| bench.json(&["report", "--json", name]);
    assert_eq!(zones("base.qcow2"), zones("ref.raw"), "counters too");
    // The top has nothing of its own any more, and goes on from there.
    let map = bench.run(&["map", "top.qcow2"]).ok();
    assert!(
        map.lines().skip(1).all(|line| line.ends_with("base.qcow2")),
        "{map}"
    );
    bench
        .run(&["io", "top.qcow2", "-c", "write -q -P 5 33628160 8k"])
        .ok();
    assert_eq!(bench.run(&["compare", "base.qcow2", "ref.raw"]).status, Some(0));
    assert_eq!(bench.run(&["compare", "top.qcow2", "ref.raw"]).status, Some(1));
}

#[test]
fn a_commit_may_leave_the_overlay_or_pass_over_images() {
    let bench = Bench::new();
    zoned(&bench);
    bench
        .run(&["create", "-q", "-b", "top.qcow2", "-F", "qcow2", "new.qcow2"])
        .ok();
    bench.run(&["io", "new.qcow2", "-c", "write -q -P 3 48M 4k"]).ok();
    bench.run(&["convert", "new.qcow2", "new.raw"]).ok();
    bench
        .run(&["commit", "-b", "ref.raw", "new.qcow2"])
        .fails(1, "Did not find 'ref.raw' in the backing chain of 'new.qcow2'");
    let before = bench.run(&["map", "--json", "new.qcow2"]).ok();
    bench.run(&["commit", "-b", "base.qcow2", "new.qcow2"]).ok();
    same(&bench, "base.qcow2", "new.raw");
    same(&bench, "new.qcow2", "new.raw");
    assert_eq!(bench.run(&["map", "--json", "new.qcow2"]).ok(), before);
    bench
        .run(&["commit", "base.qcow2"])
        .fails(1, "Image does not have a backing file");
    let other = Bench::new();
    zoned(&other);
    let before = other.run(&["map", "--json", "top.qcow2"]).ok();
    other.run(&["commit", "-q", "-d", "top.qcow2"]).ok();
    assert_eq!(other.run(&["map", "--json", "top.qcow2"]).ok(), before);
    same(&other, "base.qcow2", "ref.raw");
}

#[test]
fn a_commit_makes_the_base_as_large_as_the_overlay() {
    let bench = Bench::new();
    zoned(&bench);
    bench.run(&["resize", "-q", "top.qcow2", "+16M"]).ok();
    bench.run(&["io", "top.qcow2", "-c", "write -q -P 3 72M 4k"]).ok();
    bench.run(&["convert", "top.qcow2", "ref.raw"]).ok();
    bench.run(&["commit", "top.qcow2"]).ok();
    same(&bench, "base.qcow2", "ref.raw");
    sound(&bench, "base.qcow2");
    fs::write(bench.path("small.img"), vec![1; 1 << 20]).unwrap();
    bench
        .run(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "small.img",
            "-F",
            "raw",
            "over.qcow2",
            "3M",
        ])
        .ok();
    bench.run(&["io", "over.qcow2", "-c", "write -q -P 2 2M 4k"]).ok();
    bench.run(&["commit", "over.qcow2"]).ok();
    assert_eq!(fs::metadata(bench.path("small.img")).unwrap().len(), 3 << 20);
    bench
        .run(&["compare", "-f", "raw", "small.img", "over.qcow2"])
        .ok();
}

#[test]
fn qemu_agrees_on_plain_images() {
    let bench = Bench::new();
    for (name, zbdkit) in [("ours", true), ("theirs", false)] {
        let file = |image: &str| format!("{name}-{image}.qcow2");
        let (base, other, top) = (file("base"), file("other"), file("top"));
        let write = |image: &str, commands: &[&str]| qemu_io(&bench, image, commands).map(|run| run.ok());
        if qemu_img(&bench, &["create", "-q", "-f", "qcow2", &base, "8M"]).is_none() {
            return;
        }
        write(
            &base,
            &[
                "write -q -P 1 0 3M",
                "write -q -P 2 4M 128k",
                "write -q -z 5M 64k",
            ],
        );
        fs::copy(bench.path(&base), bench.path(&other)).unwrap();
        write(&other, &["write -q -P 9 2M 70k", "write -q -P 9 7M 64k"]);
        qemu_img(
            &bench,
            &[
                "create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top, "10M",
            ],
        );
        write(
            &top,
            &[
                "write -q -P 3 512k 100k",
                "write -q -P 3 9M 64k",
                "write -q -z 4M 64k",
            ],
        );
        let whole = file("whole");
        qemu_img(&bench, &["convert", "-O", "qcow2", &top, &whole])
            .unwrap()
            .ok();
        let agrees = |image: &str| {
            qemu_img(&bench, &["compare", image, &whole]).unwrap().ok();
            qemu_img(&bench, &["check", image]).unwrap().ok();
        };
        let run = |args: &[&str]| match zbdkit {
            true => bench.run(args).ok(),
            false => qemu_img(&bench, args).unwrap().ok(),
        };
        assert_eq!(run(&["rebase", "-b", &other, "-B", "qcow2", &top]), "");
        agrees(&top);
        assert_eq!(run(&["commit", &top]), "Image committed.\n");
        agrees(&top);
        agrees(&other);
        assert_eq!(run(&["rebase", "-b", "", &top]), "");
        agrees(&top);
        let info = qemu_img(&bench, &["info", &top]).unwrap().ok();
        assert!(!info.contains("backing"), "{info}");
    }
}
