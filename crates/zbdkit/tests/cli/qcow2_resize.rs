//! `resize`, beside qemu-img's, and with zones.

use crate::qemu_img::qemu_img;
use crate::support::Bench;

fn size(bench: &Bench, image: &str) -> u64 {
    bench.json(&["info", "--json", image])["virtual-size"]
        .as_u64()
        .unwrap()
}

#[test]
fn sizes_are_absolute_or_relative_and_shrinking_is_asked_for() {
    let bench = Bench::new();
    bench.run(&["create", "-q", "-f", "qcow2", "x.qcow2", "1G"]).ok();
    for (args, bytes) in [
        (&["x.qcow2", "2G"][..], 2 << 30),
        (&["x.qcow2", "+512M"], 5 << 29),
        (&["x.qcow2", "5G", "--preallocation=metadata"], 5 << 30),
        (&["--shrink", "x.qcow2", "-4G"], 1 << 30),
        (&["x.qcow2", "--shrink", "--", "-512M"], 1 << 29),
        (&["x.qcow2", "-256M", "--shrink"], 1 << 28),
        (&["--shrink", "x.qcow2", "64M"], 1 << 26),
        (&["x.qcow2", "64M"], 1 << 26),
    ] {
        assert_eq!(
            bench.run_with("resize", args).ok(),
            "Image resized.\n",
            "{args:?}"
        );
        assert_eq!(size(&bench, "x.qcow2"), bytes, "{args:?}");
        if let Some(checked) = qemu_img(&bench, &["check", "x.qcow2"]) {
            checked.ok();
        }
    }
    assert_eq!(bench.run(&["resize", "-q", "x.qcow2", "128M"]).ok(), "");
    for (args, message) in [
        (
            &["x.qcow2", "64M"][..],
            "Use the --shrink option to perform a shrink operation.",
        ),
        (
            &["--shrink", "x.qcow2", "-100G"],
            "New image size must be positive",
        ),
        (&["x.qcow2", "0"], "New image size must be positive"),
        (
            &["--shrink", "--preallocation=metadata", "x.qcow2", "64M"],
            "can only be used for growing",
        ),
        (&["nothing.qcow2", "64M"], "No such file"),
    ] {
        let run = bench.run_with("resize", args);
        run.fails(1, message);
    }
    for args in [
        &["x.qcow2", "foo"][..],
        &["x.qcow2"],
        &["--preallocation=foo", "x.qcow2", "1G"],
    ] {
        assert_eq!(bench.run_with("resize", args).status, Some(2), "{args:?}");
    }
    assert_eq!(size(&bench, "x.qcow2"), 128 << 20);
}

#[test]
fn a_zoned_image_grows_by_whole_zones() {
    let bench = Bench::new();
    bench
        .run(&[
            "create",
            "-q",
            "x.qcow2",
            "768M",
            "--zone-size",
            "64M",
            "--conventional",
            "2",
        ])
        .ok();
    bench
        .run(&[
            "io",
            "x.qcow2",
            "-c",
            "write -q -P 7 128M 64k",
            "-c",
            "zf 192M 64M",
        ])
        .ok();
    let zones = || {
        bench.json(&["report", "--json", "x.qcow2"])["zones"]
            .as_array()
            .unwrap()
            .clone()
    };
    let before = zones();
    bench.run(&["resize", "x.qcow2", "+32M"]).fails(1, "zone");
    assert_eq!(
        bench.run(&["resize", "x.qcow2", "+256M"]).ok(),
        "Image resized.\n"
    );
    let after = zones();
    assert_eq!(after.len(), 16);
    assert_eq!(after[..12], before[..]);
    assert!(after[12..].iter().all(|zone| zone["condition"] == "empty"));
    bench
        .run(&[
            "io",
            "x.qcow2",
            "-c",
            "read -q -P 7 128M 64k",
            "-c",
            "write -q -P 9 960M 1M",
            "-c",
            "read -q -P 9 960M 1M",
        ])
        .ok();
    bench.run(&["check", "-q", "x.qcow2"]).ok();
}
