//! Random write areas, descriptor extensions and attributes, which only NVMe's Zoned Namespaces have.

use std::path::Path;
use std::sync::Arc;

use zbdkit_block::{Graph, Host, OpenOptions, OsHost};
use zbdkit_io::{Runtime, RuntimeOptions};

use crate::support::{Bench, Run};

#[test]
fn a_disk_without_areas_and_extensions_says_so() {
    let bench = Bench::with_demo();
    for (command, what) in [
        ("zo -r 0 64M", "zone open"),
        ("zcm 64k", "zone commit"),
        ("zse 0", "zone set extension"),
        ("zge 0", "zone get extension"),
    ] {
        let run = bench.io(&[command]);
        assert_eq!(run.status, Some(1), "{command}: {run:?}");
        assert_eq!(
            run.out,
            format!("{what} failed: Operation not supported\n"),
            "{run:?}"
        );
    }
    bench.io(&["zo 0 64M", "zc 0 64M"]).ok();
}

#[test]
fn commands_of_areas_and_extensions_are_called_rightly_and_explained() {
    let bench = Bench::with_demo();
    for (command, said) in [
        ("zo -r 0", "bad argument count 1 to zo, expected 2 arguments\n"),
        ("zcm", "bad argument count 0 to zcm, expected 1 arguments\n"),
        ("zcm 0 1", "bad argument count 2 to zcm, expected 1 arguments\n"),
        (
            "zge",
            "bad argument count 0 to zge, expected at least 1 arguments\n",
        ),
    ] {
        let run = bench.io(&[command]);
        assert_eq!((run.status, &*run.err), (Some(1), said), "{command}");
    }
    let usage =
        "zone_set_ext [-f file | -P pattern] [-r] start -- attach a descriptor extension to an empty zone\n";
    assert_eq!(bench.io(&["zse 0 1"]).out, usage);
    assert_eq!(bench.io(&["zse -P 300 0"]).status, Some(1));
    assert_eq!(
        bench.io(&["zse -P 1 -f x 0"]).out,
        "Only one of -f and -P can be specified at the same time\n"
    );
    let absent = bench.io(&["zse -f absent 0"]);
    assert!(absent.out.starts_with("absent: "), "{absent:?}");
    for (command, example) in [
        ("zo", "Example: 'zo -r 64M 64M'"),
        ("wu", "Example: 'wu 64M 4k'"),
        ("zcm", "Example: 'zcm 0x4010000'"),
        ("zse", "Example: 'zse -P 0x5a 64M'"),
        ("zge", "Example: 'zge 64M'"),
    ] {
        let help = bench.io(&[&format!("help {command}")]).ok();
        assert!(help.contains(example), "{help}");
    }
}

/// Zones of 1 MiB in memory; two may have an area of 64 KiB, granules of 16 KiB; extensions of 64 bytes.
const DISK: &str = "driver=zoned,zone.size=1M,zone.zrwa_size=64k,zone.zrwa_granularity=16k,zone.max_zrwa=2,\
                    zone.descr_ext_size=64,file.driver=memory,file.size=8M";

fn on_disk(bench: &Bench, commands: &[&str]) -> Run {
    let mut args = vec!["io", "--image-opts", DISK];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    bench.run(&args)
}

#[test]
fn an_area_is_written_in_any_order_and_committed() {
    let bench = Bench::new();
    let run = on_disk(
        &bench,
        &[
            "zo -r 1M 1M",
            "write -q -P 1 1072k 8k",
            "write -q -P 2 1M 16k",
            "write -q -P 3 1M 4k",
            "zrp 1M 1",
            "zcm 1040k",
            "zrp 1M 1",
            "read -q -P 3 1M 4k",
            "read -q -P 1 1072k 8k",
            "write 1M 4k",
            "zap 1M 4k",
            "zcm 1044k",
            "zone_open 2M 1M -r",
            "zo -r 3M 1M",
            "zf 1M 1M",
            "zo -r 3M 1M",
        ],
    );
    let zone = |wp: u32, condition| {
        format!("start: 0x800, len 0x800, cap 0x800, wptr {wp:#x}, zcond:{condition}, [type: 2]\n")
    };
    let failed = |what: &str, why: &str| format!("{what} failed: {why}\n");
    let io = "Input/output error";
    let expected = [
        zone(0x800, 3),
        zone(0x820, 3),
        failed("write", io),
        failed("zone append", io),
        failed("zone commit", "Invalid argument"),
        failed("zone open", io),
    ];
    assert_eq!(run.out, expected.concat(), "{run:?}");
    let reasons: Vec<&str> = run.err.lines().collect();
    for (reason, words) in reasons.iter().zip([
        "does not lie in the random write area of zone 1",
        "zone 1 has a random write area",
        "is not whole blocks of 16384 bytes",
        "no random write area is left for zone 3",
    ]) {
        assert!(reason.contains(words), "{reason} does not say {words}");
    }
    assert_eq!((reasons.len(), run.status), (4, Some(1)));
}

#[test]
fn an_extension_comes_from_a_file_or_a_pattern_and_is_dumped_or_written_to_one() {
    let bench = Bench::new();
    std::fs::write(bench.path("label"), b"volume 7").unwrap();
    std::fs::write(bench.path("long"), [1; 65]).unwrap();
    let run = on_disk(
        &bench,
        &[
            "zse -f label 1M",
            "zge 1M",
            "zse -P 0x5a 2M",
            "zge -f found 2M",
            "zse 3M",
            "zge -f default 3M",
            "zge 0",
            "zrp 1M 1",
        ],
    );
    let row = |at: u32, bytes: &str, text: &str| format!("{at:08x}:  {bytes} {text}\n");
    let zeros = "00 ".repeat(16);
    let expected = [
        row(
            0,
            "76 6f 6c 75 6d 65 20 37 00 00 00 00 00 00 00 00 ",
            "volume.7........",
        ),
        row(16, &zeros, "................"),
        row(32, &zeros, "................"),
        row(48, &zeros, "................"),
        "The zone has no descriptor extension\n".into(),
        "start: 0x800, len 0x800, cap 0x800, wptr 0x800, zcond:4, [type: 2]\n".into(),
    ];
    assert_eq!(run.ok(), expected.concat());
    assert_eq!(std::fs::read(bench.path("found")).unwrap(), [0x5a; 64]);
    assert_eq!(std::fs::read(bench.path("default")).unwrap(), [0xcd; 64]);

    let run = on_disk(
        &bench,
        &[
            "zse -f long 1M",
            "zse -f /dev/zero 1M",
            "zcm 0",
            "zge -f none 1M",
            "zse 1M",
            "zse 1M",
        ],
    );
    let expected = "long does not fit into an extension, which has 64 bytes\n\
                    /dev/zero does not fit into an extension, which has 64 bytes\n\
                    A commit ends behind the start of its zone: END is not 0\n\
                    The zone has no descriptor extension\n\
                    zone set extension failed: Invalid argument\n";
    assert_eq!((&*run.out, run.status), (expected, Some(1)), "{run:?}");
    assert!(!bench.path("none").exists());
}

#[test]
fn an_extension_comes_with_an_area_if_one_is_left() {
    let bench = Bench::new();
    let commands = [
        "zse -r -P 1 1M",
        "write -q -P 2 1028k 4k",
        "read -q -P 2 1028k 4k",
        "zse -P 1 2M -r",
        "zse -r 3M",
        "zge 3M",
    ];
    let run = on_disk(&bench, &commands);
    let expected = "zone set extension failed: Input/output error\nThe zone has no descriptor extension\n";
    assert_eq!((&*run.out, run.status), (expected, Some(1)), "{run:?}");
    assert!(
        run.err.contains("no random write area is left for zone 3"),
        "{run:?}"
    );
}

#[test]
fn the_operator_sets_attributes_and_the_report_shows_them() {
    let bench = Bench::with_demo();
    bench.io(&["write -q 64M 4k", "write -q 128M 4k"]).ok();
    for (zone, state, said) in [
        (
            "1",
            "finished-by-device",
            "zone 1 is full, finished by the device\n",
        ),
        (
            "2",
            "finish-recommended",
            "zone 2 is recommended to be finished\n",
        ),
        ("1", "reset-recommended", "zone 1 is recommended to be reset\n"),
    ] {
        assert_eq!(
            bench.run(&["set-zone", "disk.raw", "--zone", zone, state]).ok(),
            said
        );
    }
    let report = bench.run(&["report", "disk.raw", "-c", "4"]).ok();
    let ends: Vec<&str> = report
        .lines()
        .map(|line| line.split_once(" [type").unwrap().1)
        .collect();
    let kind = ": 2(SEQ_WRITE_REQUIRED)]";
    assert_eq!(
        ends,
        [
            kind.to_owned(),
            format!("{kind} [attributes: finished-by-device reset-recommended]"),
            format!("{kind} [attributes: finish-recommended]"),
            kind.to_owned(),
        ]
    );
    let json = bench.json(&["report", "disk.raw", "--json"]);
    assert_eq!(
        json["zones"][1]["attributes"],
        serde_json::json!({"finished_by_device": true, "recommended": "reset", "zrwa": false, "extension": false})
    );
    bench
        .run(&["set-zone", "-q", "disk.raw", "--zone", "2", "no-recommendation"])
        .ok();
    bench.run(&["reset", "-q", "disk.raw", "--zone", "1"]).ok();
    let report = bench.run(&["report", "disk.raw"]).ok();
    assert!(!report.contains("attributes"), "{report}");
}

#[test]
fn an_image_keeps_areas_and_extensions_for_the_next_process() {
    let bench = Bench::new();
    for image in ["disk.raw", "disk.qcow2"] {
        bench
            .run(&[
                "create",
                "-q",
                image,
                "--size",
                "64M",
                "--zone-size",
                "8M",
                "--zrwa-size",
                "64k",
                "--zrwa-granularity",
                "16k",
                "--max-zrwa",
                "2",
                "--extension-size",
                "64",
            ])
            .ok();
        let io = |commands: &[&str]| {
            let mut args = vec!["io", image];
            args.extend(commands.iter().flat_map(|command| ["-c", command]));
            bench.run(&args)
        };
        let written = [
            "zo -r 8M 8M",
            "write -q -P 2 8240k 8k",
            "write -q -P 1 8M 16k",
            "zcm 8208k",
            "zse 16M",
        ];
        assert_eq!(io(&written).ok(), "", "{image}");
        let report = bench.run(&["report", image, "-c", "3"]).ok();
        let lines: Vec<&str> = report.lines().collect();
        assert!(lines[0].ends_with("_REQUIRED)]"), "{report}");
        assert!(
            lines[1].contains("wptr 0x000020") && lines[1].ends_with(" [attributes: zrwa]"),
            "{report}"
        );
        assert!(
            lines[2].contains("4(cl)") && lines[2].ends_with(" [attributes: extension]"),
            "{report}"
        );
        let later = [
            "write -q -P 3 8208k 4k",
            "read -q -P 2 8240k 8k",
            "read -q -P 1 8M 16k",
            "zge -f found 16M",
        ];
        assert_eq!(io(&later).ok(), "", "{image}");
        assert_eq!(std::fs::read(bench.path("found")).unwrap(), [0xcd; 64]);
        let zones = bench.json(&["report", image, "--json"]);
        assert_eq!(zones["zones"][1]["attributes"]["zrwa"], true);
        assert_eq!(zones["zones"][2]["attributes"]["extension"], true);
        bench.run(&["reset", "-q", image, "--all"]).ok();
        let report = bench.run(&["report", image]).ok();
        assert!(!report.contains("attributes"), "{report}");
    }
}

#[test]
fn marked_blocks_cannot_be_read_until_they_are_written_and_info_tells_of_them() {
    let bench = Bench::with_demo();
    bench.io(&["write -q 0 4k", "wu 4k 8k", "write -q 12k 4k"]).ok();
    let run = bench.io(&["read -q 0 4k", "read -q 12k 4k", "read -q 0 8k"]);
    assert_eq!(
        (run.status, &*run.out),
        (Some(1), "read failed: Input/output error\n")
    );
    assert!(
        run.err.contains("the block at 4096 is marked uncorrectable"),
        "{run:?}"
    );
    let info = bench.run(&["info", "disk.raw"]).ok();
    assert!(
        info.contains("notice: 8192 bytes are marked uncorrectable, the first at offset 4096"),
        "{info}"
    );
    bench
        .run(&["convert", "disk.raw", "copy.raw"])
        .fails(1, "the block at 4096 is marked uncorrectable");
    bench.io(&["zrs 0 64M", "write -q 0 16k", "read -q 0 16k"]).ok();
    assert!(!bench.run(&["info", "disk.raw"]).ok().contains("uncorrectable"));
    let disk = ["io", "--image-opts", "driver=memory,size=1M"];
    bench
        .run(
            &[
                &disk[..],
                &["-c", "wu 4k 4k", "-c", "write -q 4k 4k", "-c", "read -q 0 8k"],
            ]
            .concat(),
        )
        .ok();
    assert_eq!(
        bench.io(&["wu 0"]).err,
        "bad argument count 1 to wu, expected 2 arguments\n"
    );
    assert_eq!(
        bench.io(&["wu 0 100"]).out,
        "write uncorrectable failed: Invalid argument\n"
    );
}

/// What Format NVM does.
fn format(image: &Path, block_size: u32) {
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    runtime.block_on(async {
        let host: Arc<dyn Host> = Arc::new(OsHost);
        let device = Graph::from_path(image).open(&host, &OpenOptions::default()).await;
        let Ok(device) = device else {
            panic!("{} does not open", image.display());
        };
        device.format(&device.lane(1), block_size).await.unwrap();
        device.close().await.unwrap();
    });
}

#[test]
fn an_image_with_another_block_size_is_shown_checked_copied_and_compared() {
    for name in ["zones.raw", "zones.qcow2"] {
        let bench = Bench::new();
        bench
            .run(&["create", name, "--size", "8M", "--zone-size", "1M"])
            .ok();
        bench.run(&["io", name, "-c", "write 0 4k"]).ok();
        format(&bench.path(name), 512);
        bench.run(&["io", name, "-c", "write 1M 1536"]).ok();
        let info = bench.run(&["info", name]).ok();
        assert!(info.contains("block size: 512 bytes"), "{info}");
        let report = bench.run(&["report", name]).ok();
        let zones: Vec<&str> = report.lines().collect();
        assert!(zones[0].contains("zcond: 1(em)"), "{report}");
        assert!(zones[1].contains("wptr 0x000003"), "{report}");
        bench.run(&["check", name]).ok();
        bench.run(&["convert", "-O", "qcow2", name, "copy.qcow2"]).ok();
        bench.run(&["compare", name, "copy.qcow2"]).ok();
        let info = bench.run(&["info", "copy.qcow2"]).ok();
        assert!(info.contains("block size: 512 bytes"), "{info}");
        format(&bench.path("copy.qcow2"), 4096);
        let differs = bench.run(&["compare", name, "copy.qcow2"]);
        assert_eq!(differs.status, Some(1), "{differs:?}");
    }
}
