//! `compare`: qemu-img's words and exit statuses.

use std::fs;
use std::os::unix::fs::FileExt;

use crate::qemu_img::{qemu_img, qemu_io};
use crate::support::{Bench, Run};

fn plain(bench: &Bench, name: &str, len: u64, data: &[u64]) {
    let file = fs::File::create(bench.path(name)).unwrap();
    file.set_len(len).unwrap();
    data.iter().for_each(|at| file.write_all_at(&[1], *at).unwrap());
}

fn said(run: &Run) -> (Option<i32>, &str) {
    (run.status, &run.out)
}

#[test]
fn differences_are_told_in_qemu_imgs_words() {
    let bench = Bench::new();
    plain(&bench, "a", 1 << 20, &[5000]);
    plain(&bench, "same", 1 << 20, &[5000]);
    plain(&bench, "other", 1 << 20, &[5000, 100_000]);
    plain(&bench, "larger", 2 << 20, &[5000]);
    plain(&bench, "more", 2 << 20, &[5000, 1_500_000]);
    let compare = |args: &[&str]| bench.run(&[&["compare", "-f", "raw", "-F", "raw"], args].concat());
    for (args, status, out) in [
        (&["a", "same"][..], 0, "Images are identical.\n"),
        (&["-s", "a", "same"], 0, "Images are identical.\n"),
        (&["a", "other"], 1, "Content mismatch at offset 99840!\n"),
        (&["-q", "a", "other"], 1, ""),
        (
            &["a", "larger"],
            0,
            "Warning: Image size mismatch!\nImages are identical.\n",
        ),
        (&["-s", "a", "larger"], 1, "Strict mode: Image size mismatch!\n"),
        (
            &["a", "more"],
            1,
            "Warning: Image size mismatch!\nContent mismatch at offset 1499648!\n",
        ),
        (
            &["more", "a"],
            1,
            "Warning: Image size mismatch!\nContent mismatch at offset 1499648!\n",
        ),
        (
            &["-s", "a", "other"],
            1,
            "Strict mode: Offset 98304 block status mismatch!\n",
        ),
    ] {
        assert_eq!(said(&compare(args)), (Some(status), out), "{args:?}");
    }
}

#[test]
fn what_cannot_be_compared_is_not_a_difference() {
    let bench = Bench::new();
    plain(&bench, "a", 1 << 20, &[]);
    bench
        .run(&["compare", "-f", "raw", "a", "nothing"])
        .fails(2, "nothing");
    bench
        .run(&["compare", "-f", "foo", "a", "a"])
        .fails(2, "format \"foo\" is not known");
    assert_eq!(bench.run(&["compare", "a"]).status, Some(2));
}

#[test]
fn zones_count_unless_told_otherwise() {
    let bench = Bench::with_demo();
    bench.run(&["convert", "disk.raw", "copy.raw"]).ok();
    bench.run(&["finish", "-q", "copy.raw", "--zone", "3"]).ok();
    let zones = bench.run(&["compare", "disk.raw", "copy.raw"]);
    assert_eq!(
        said(&zones),
        (
            Some(1),
            "Zone mismatch at zone 3: condition: empty in the first image, full in the second!\n"
        )
    );
    bench.run(&["compare", "--no-zones", "disk.raw", "copy.raw"]).ok();
    let json = bench.run(&["compare", "--json", "disk.raw", "copy.raw"]);
    assert_eq!(json.status, Some(1));
    let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(
        json,
        serde_json::json!({
            "identical": false, "sizes_differ": false,
            "difference": {"kind": "zone", "offset": null, "zone": 3, "what": "condition", "image1": "empty", "image2": "full"},
        })
    );
    bench.run(&["finish", "-q", "disk.raw", "--zone", "3"]).ok();
    bench.run(&["compare", "disk.raw", "copy.raw"]).ok();
    // Their history may differ, unless that is asked for.
    bench.run(&["reset", "-q", "disk.raw", "--zone", "3"]).ok();
    bench.run(&["finish", "-q", "disk.raw", "--zone", "3"]).ok();
    bench.run(&["compare", "disk.raw", "copy.raw"]).ok();
    let strict = bench.run(&["compare", "-s", "disk.raw", "copy.raw"]);
    assert!(
        strict.out.contains("zone 3: counters: 0 resets") || strict.out.contains("1 resets"),
        "{strict:?}"
    );
    assert_eq!(strict.status, Some(1));
}

#[test]
fn qemu_img_says_the_same() {
    let bench = Bench::new();
    if qemu_img(&bench, &["create", "-q", "-f", "qcow2", "a.qcow2", "8M"]).is_none() {
        return;
    }
    qemu_io(
        &bench,
        "a.qcow2",
        &[
            "write -q -P 1 1M 100k",
            "write -q -P 0 2M 64k",
            "write -q -z 3M 64k",
        ],
    )
    .unwrap()
    .ok();
    for (name, size, commands) in [
        ("same.qcow2", "8M", &["write -q -P 1 1M 100k"][..]),
        (
            "zero.qcow2",
            "8M",
            &["write -q -P 1 1M 100k", "write -q -P 0 5M 64k"],
        ),
        (
            "other.qcow2",
            "8M",
            &["write -q -P 1 1M 100k", "write -q -P 1 7000000 1"],
        ),
        ("less.qcow2", "8M", &["write -q -P 1 1M 99k"]),
        ("large.qcow2", "9M", &["write -q -P 1 1M 100k"]),
        (
            "more.qcow2",
            "9M",
            &["write -q -P 1 1M 100k", "write -q -P 1 8800000 3"],
        ),
    ] {
        qemu_img(&bench, &["create", "-q", "-f", "qcow2", name, size])
            .unwrap()
            .ok();
        qemu_io(&bench, name, commands).unwrap().ok();
    }
    let images = [
        "a.qcow2",
        "same.qcow2",
        "zero.qcow2",
        "other.qcow2",
        "less.qcow2",
        "large.qcow2",
        "more.qcow2",
    ];
    // QEMU's strict mode also takes the end of the image for a change of status, so its offset may be an earlier one.
    let kind = |out: String| match out.split_once("Strict mode: Offset ") {
        Some(_) => "Strict mode: Offset\n".to_owned(),
        None => out,
    };
    for strict in [&[][..], &["-s"]] {
        for a in images {
            for b in images {
                let args = [&["compare"], strict, &[a, b]].concat();
                let (ours, theirs) = (bench.run(&args), qemu_img(&bench, &args).unwrap());
                assert_eq!(
                    (ours.status, kind(ours.out)),
                    (theirs.status, kind(theirs.out)),
                    "{args:?}"
                );
            }
        }
    }
}
