//! `snapshot`, beside qemu-img's, and with zones.

use crate::qemu_img::{qemu_img, qemu_io};
use crate::support::Bench;

#[test]
fn snapshots_are_listed_made_applied_and_deleted_and_qemu_agrees() {
    let bench = Bench::new();
    bench.run(&["create", "-q", "-f", "qcow2", "x.qcow2", "64M"]).ok();
    assert_eq!(bench.run(&["snapshot", "-l", "x.qcow2"]).ok(), "");
    assert_eq!(
        bench.json(&["snapshot", "-l", "--json", "x.qcow2"]),
        serde_json::json!([])
    );
    let io = |command: &str| bench.run(&["io", "x.qcow2", "-c", command]).ok();
    io("write -q -P 1 0 1M");
    assert_eq!(bench.run(&["snapshot", "-c", "one", "x.qcow2"]).ok(), "");
    io("write -q -P 2 0 512k");
    bench
        .run(&[
            "snapshot",
            "-c",
            "two, with a name longer than its column",
            "x.qcow2",
        ])
        .ok();
    io("write -q -P 3 0 2M");

    let list = bench.run(&["snapshot", "x.qcow2"]).ok();
    assert_eq!(list.lines().count(), 4, "{list}");
    if let Some(theirs) = qemu_img(&bench, &["snapshot", "-l", "x.qcow2"]) {
        assert_eq!(list, theirs.ok());
        qemu_img(&bench, &["check", "x.qcow2"]).unwrap().ok();
        let info = qemu_img(&bench, &["info", "--output=json", "x.qcow2"])
            .unwrap()
            .ok();
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(bench.json(&["snapshot", "--json", "x.qcow2"]), info["snapshots"]);
    }

    bench.run(&["snapshot", "-a", "one", "x.qcow2"]).ok();
    io("read -q -P 1 0 1M");
    io("read -q -P 0 1M 1M");
    bench.run(&["snapshot", "-a", "2", "x.qcow2"]).ok();
    io("read -q -P 2 0 512k");
    io("read -q -P 1 512k 512k");
    bench.run(&["snapshot", "-d", "one", "x.qcow2"]).ok();
    assert_eq!(bench.run(&["snapshot", "x.qcow2"]).ok().lines().count(), 3);
    if let Some(read) = qemu_io(
        &bench,
        "x.qcow2",
        &["read -q -P 2 0 512k", "read -q -P 1 512k 512k"],
    ) {
        read.ok();
        qemu_img(&bench, &["check", "x.qcow2"]).unwrap().ok();
    }
    for (args, message) in [
        (["-a", "nope"], "Could not apply snapshot 'nope': "),
        (["-d", "one"], "Could not delete snapshot 'one': "),
    ] {
        bench
            .run(&[&["snapshot"], &args[..], &["x.qcow2"]].concat())
            .fails(1, message);
    }
}

#[test]
fn qemus_snapshots_are_ours_too() {
    let bench = Bench::new();
    if qemu_img(&bench, &["create", "-q", "-f", "qcow2", "x.qcow2", "64M"]).is_none() {
        return;
    }
    qemu_io(&bench, "x.qcow2", &["write -q -P 1 0 1M"]).unwrap().ok();
    qemu_img(&bench, &["snapshot", "-c", "theirs", "x.qcow2"])
        .unwrap()
        .ok();
    qemu_io(&bench, "x.qcow2", &["write -q -P 2 0 1M"]).unwrap().ok();
    bench.run(&["snapshot", "-a", "theirs", "x.qcow2"]).ok();
    qemu_io(&bench, "x.qcow2", &["read -q -P 1 0 1M"]).unwrap().ok();
    bench.run(&["snapshot", "-d", "theirs", "x.qcow2"]).ok();
    let checked = qemu_img(&bench, &["check", "x.qcow2"]).unwrap().ok();
    assert!(checked.starts_with("No errors"), "{checked}");
}

#[test]
fn a_snapshot_brings_the_zones_back() {
    let bench = Bench::new();
    bench
        .run(&[
            "create",
            "-q",
            "x.qcow2",
            "768M",
            "--zone-size",
            "64M",
            "--max-active",
            "8",
        ])
        .ok();
    let io = |commands: &[&str]| {
        let commands: Vec<_> = commands.iter().flat_map(|command| ["-c", command]).collect();
        bench.run(&[&["io", "x.qcow2"], &commands[..]].concat()).ok()
    };
    let report = || bench.run(&["report", "x.qcow2"]).ok();
    io(&["write -q -P 7 0 12k", "zf 64M 64M", "write -q -P 8 128M 64k"]);
    let before = report();
    bench.run(&["snapshot", "-c", "before", "x.qcow2"]).ok();
    io(&[
        "write -q -P 9 12k 4k",
        "zrs 64M 64M",
        "write -q 64M 4k",
        "zf 128M 64M",
        "write -q 192M 1M",
    ]);
    assert_ne!(report(), before);
    bench.run(&["snapshot", "-a", "before", "x.qcow2"]).ok();
    assert_eq!(report(), before);
    io(&[
        "read -q -P 7 0 12k",
        "read -q -P 0 12k 4k",
        "read -q -P 8 128M 64k",
        "read -q -P 0 192M 1M",
    ]);
    io(&["write -q -P 1 12k 4k", "read -q -P 1 12k 4k"]);
    bench.run(&["check", "-q", "x.qcow2"]).ok();
    bench.run(&["snapshot", "-d", "before", "x.qcow2"]).ok();
    let checked = bench.run(&["check", "x.qcow2"]);
    assert_eq!(checked.err, "");
    let text = checked.ok();
    assert!(text.starts_with("No errors"), "{text}");
}

#[test]
fn what_has_no_snapshots_says_so() {
    let bench = Bench::with_demo();
    assert_eq!(bench.run(&["snapshot", "-l", "disk.raw"]).ok(), "");
    bench
        .run(&["snapshot", "-c", "x", "disk.raw"])
        .fails(1, "only qcow2 images have internal snapshots");
    bench
        .run(&["snapshot", "-c", "x", "nothing"])
        .fails(1, "No such file");
    let mixed = bench.run(&["snapshot", "-l", "-c", "x", "disk.raw"]);
    assert_eq!(mixed.status, Some(2), "{mixed:?}");
}
