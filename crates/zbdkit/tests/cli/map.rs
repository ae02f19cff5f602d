//! `map`: the table and the JSON of qemu-img.

use std::fs;

use crate::qemu_img::{qemu_img, qemu_io};
use crate::support::Bench;

#[test]
fn zones_end_where_they_are_written() {
    let bench = Bench::with_demo();
    bench
        .io(&["write -q 0 12k", "write -q 64M 8k", "zf 64M 64M"])
        .ok();
    assert_eq!(
        bench.run(&["map", "disk.raw"]).ok(),
        "Offset          Length          Mapped to       File\n\
         0               0x3000          0               disk.raw\n\
         0x4000000       0x2000          0x4000000       disk.raw\n"
    );
    assert_eq!(
        bench
            .run(&["map", "--json", "disk.raw", "--max-length", "128M"])
            .ok(),
        "[{ \"start\": 0, \"length\": 12288, \"depth\": 0, \"present\": true, \"zero\": false, \"data\": true, \"compressed\": false, \"offset\": 0},\n\
         { \"start\": 12288, \"length\": 67096576, \"depth\": 0, \"present\": true, \"zero\": true, \"data\": false, \"compressed\": false},\n\
         { \"start\": 67108864, \"length\": 8192, \"depth\": 0, \"present\": true, \"zero\": false, \"data\": true, \"compressed\": false, \"offset\": 67108864},\n\
         { \"start\": 67117056, \"length\": 67100672, \"depth\": 0, \"present\": true, \"zero\": true, \"data\": false, \"compressed\": false}]\n"
    );
    let window = ["map", "--output", "json", "disk.raw", "-s", "4k", "-l", "4k"];
    assert_eq!(
        bench.run(&window).ok(),
        "[{ \"start\": 4096, \"length\": 4096, \"depth\": 0, \"present\": true, \"zero\": false, \"data\": true, \"compressed\": false, \"offset\": 4096}]\n"
    );
}

#[test]
fn an_empty_range_is_an_entry_of_no_length() {
    let bench = Bench::with_demo();
    for args in [["-s", "1T"], ["-l", "0"]] {
        let run = bench
            .run(&[&["map", "--json", "disk.raw"], &args[..]].concat())
            .ok();
        assert!(
            run.ends_with("\"length\": 0, \"depth\": 0, \"present\": false, \"zero\": false, \"data\": false, \"compressed\": false}]\n"),
            "{run}"
        );
    }
    bench.run(&["map", "nothing"]).fails(1, "nothing");
    assert_eq!(bench.run(&["map", "--output", "xml", "disk.raw"]).status, Some(2));
}

#[test]
fn chains_are_shown_as_qemu_img_shows_them() {
    let bench = Bench::new();
    fs::create_dir(bench.path("sub")).unwrap();
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=2M",
        "compat=0.10",
    ] {
        if qemu_img(
            &bench,
            &["create", "-q", "-f", "qcow2", "-o", options, "base.qcow2", "8M"],
        )
        .is_none()
        {
            return;
        }
        let writes = [
            "write -q -P 1 0 1M",
            "write -q -P 2 4M 128k",
            "write -q -z 5M 64k",
        ];
        qemu_io(&bench, "base.qcow2", &writes).unwrap().ok();
        let create = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "../base.qcow2",
            "-F",
            "qcow2",
            "sub/top.qcow2",
            "10M",
        ];
        qemu_img(&bench, &create).unwrap().ok();
        let writes = [
            "write -q -P 3 512k 64k",
            "write -q -P 3 9M 64k",
            "write -q -z 4M 64k",
        ];
        qemu_io(&bench, "sub/top.qcow2", &writes).unwrap().ok();
        let convert = ["convert", "-c", "-O", "qcow2", "sub/top.qcow2", "packed.qcow2"];
        qemu_img(&bench, &convert).unwrap().ok();
        for image in ["base.qcow2", "sub/top.qcow2", "packed.qcow2"] {
            for more in [
                &["--output", "human"][..],
                &["--output", "json"],
                &["--output", "json", "-s", "100k", "-l", "5000000"],
            ] {
                let args = [&["map"], more, &[image]].concat();
                let (ours, theirs) = (bench.run(&args), qemu_img(&bench, &args).unwrap());
                assert_eq!(
                    (ours.status, ours.out),
                    (theirs.status, theirs.out),
                    "{options} {args:?}"
                );
            }
        }
    }
}
