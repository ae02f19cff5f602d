//! `create`, and what its options must not be.

use crate::support::{Bench, DEMO};

#[test]
fn impossible_zones_are_refused_with_what_is_wrong_and_leave_nothing() {
    let bench = Bench::new();
    for (args, message) in [
        (
            &["--size", "64M", "--zone-size", "0"][..],
            "zone size must not be 0",
        ),
        (
            &["--size", "64M", "--zone-size", "1000"],
            "zone size 1000 is not a multiple of 512",
        ),
        (
            &["--size", "64M", "--zone-size", "128M"],
            "is bigger than the device, which has 67108864 bytes",
        ),
        (
            &["--size", "64M", "--zone-size", "16M", "--zone-capacity", "32M"],
            "zone capacity 33554432 is bigger than the zone size 16777216",
        ),
        (
            &[
                "--size",
                "64M",
                "--zone-size",
                "16M",
                "--max-open",
                "3",
                "--max-active",
                "2",
            ],
            "max open zones 3 is more than max active zones 2",
        ),
        (
            &["--size", "64M", "--zone-size", "16M", "--max-zrwa", "2"],
            "ZRWA size must not be 0 where",
        ),
        (
            &["--size", "64M", "--zone-size", "16M", "--zrwa-size", "6000"],
            "ZRWA size 6000 is not a multiple of the ZRWA granularity 4096",
        ),
        (
            &["--size", "64M", "--zone-size", "16M", "--extension-size", "100"],
            "zone descriptor extension size 100 is not a multiple of 64",
        ),
        (
            &[
                "--size",
                "64M",
                "--zone-size",
                "16M",
                "--model",
                "host-aware",
                "--zrwa-size",
                "64k",
            ],
            "are for host-managed devices",
        ),
        (&["--size", "0"], "device size must not be 0"),
        (
            &["--size", "768"],
            "these zones do not work: device size 768 is not a multiple of the block size 4096",
        ),
        (
            &["--size", "64M", "--zone-size", "16M", "--block-size", "777"],
            "block size 777 is not a power of two",
        ),
        (
            &["--size", "64M", "--zone-size", "16M", "--block-size", "16G"],
            "block size 4294967295",
        ),
        (
            &["--size", "64M", "--zone-size", "16M", "--conventional", "4"],
            "leave no sequential one",
        ),
        (&["--size", "8191P", "--zone-size", "4k"], "zones are too many"),
        (
            &["--size", "64M"],
            "say --zone-size: zone size 268435456 is bigger than the device",
        ),
        (
            &["--size", "1G", "--sidecar", "no/such/dir"],
            "No such file or directory",
        ),
    ] {
        bench
            .run(&[&["create", "disk.raw"], args].concat())
            .fails(1, message);
        assert_eq!(
            bench.directory().read_dir().unwrap().count(),
            0,
            "{args:?} left something"
        );
    }
}

#[test]
fn wrong_options_are_usage_errors_that_name_the_near_one() {
    let bench = Bench::new();
    for (args, message) in [
        (
            &["-o", "zone.sise=64M"][..],
            "zone.sise is not known (did you mean \"zone.size\"?)",
        ),
        (&["-o", "zone.size=big"], "-o zone.size=big: not a size"),
        (
            &["-o", "zone.mode=random"],
            "-o zone.mode=random: expected one of host-managed, host-aware",
        ),
        (&["-o", "zone.size"], "write zone.size=VALUE"),
        (
            &["-o", "zone.size=64M", "--zone-size", "64M"],
            "zone.size is given twice",
        ),
        (&["--zone-size", "64M"], "Say --size"),
        (&["-f", "raww", "--size", "1G"], "(did you mean \"raw\"?)"),
    ] {
        bench
            .run(&[&["create", "disk.raw"], args].concat())
            .fails(2, message);
    }
    let run = bench.run(&["create", "disk.raw", "--size", "64Q"]);
    assert_eq!(run.status, Some(2));
    assert!(
        run.err.contains("not a size in bytes, as in 4096, 64M"),
        "{run:?}"
    );
    assert_eq!(bench.directory().read_dir().unwrap().count(), 0);
}

#[test]
fn qemus_option_names_and_ours_make_the_same_image() {
    let bench = Bench::new();
    let ours = bench.run_with("create", &DEMO).ok();
    assert_eq!(
        ours.lines().next().unwrap(),
        "Formatting 'disk.raw', fmt=raw zone.mode=host-managed zone.size=67108864 zone.capacity=67108864 \
         zone.conventional_zones=0 zone.max_active_zones=8 zone.max_open_zones=6 zone.max_append_bytes=1048576 \
         block_size=4096 size=805306368"
    );
    assert!(ours.contains("zbdkit serve disk.raw --vhost-user-blk"), "{ours}");
    let options = "zone.size=64M,zone.max_active_zones=8,zone.max-open-zones=6";
    let qemus = bench.run(&[
        "create",
        "-f",
        "raw",
        "-o",
        options,
        "-o",
        "zone.mode=host-managed",
        "2.raw",
        "768M",
    ]);
    assert_eq!(qemus.ok().replace("2.raw", "disk.raw"), ours);
}

#[test]
fn an_image_is_replaced_only_by_force_and_not_in_use() {
    let bench = Bench::with_demo();
    bench.io(&["write 0 4k"]).ok();
    bench
        .run_with("create", &DEMO)
        .fails(1, "disk.raw exists already; remove it");
    let mut user = bench.interactive("disk.raw");
    let force = [&DEMO[..], &["--force", "-q"]].concat();
    bench
        .run_with("create", &force)
        .fails(1, "another process is using the image: zbdkit (process");
    user.command("write 4k 4k");
    assert_eq!(user.finish(), Some(0));
    assert_eq!(bench.run_with("create", &force).ok(), "");
    let info = bench.json(&["info", "--json", "disk.raw"]);
    assert_eq!(info["conditions"], serde_json::json!({"empty": 12}));
}

#[test]
fn json_tells_what_was_made_in_bytes() {
    let bench = Bench::new();
    let made = bench.json(&[&["create", "--json", "--zone-capacity", "48M"], &DEMO[..]].concat());
    let info = bench.json(&["info", "--json", "disk.raw"]);
    let zoned = serde_json::json!({
        "model": "host-managed", "zone_size": 64 << 20, "zone_capacity": 48 << 20, "nr_zones": 12,
        "nr_conventional": 0, "max_open": 6, "max_active": 8, "max_append": 1 << 20,
        "zrwa": null, "extension_size": 0,
    });
    assert_eq!(made["zoned"], zoned);
    assert_eq!(info["zoned"], zoned);
    assert_eq!(
        (&made["size"], &made["block_size"]),
        (&info["size"], &info["block_size"])
    );
    assert_eq!(made["uuid"], info["table"]["uuid"]);
    assert_eq!(info["table"]["clean"], true);
}

#[test]
fn what_only_nvme_has_is_shown_and_copied() {
    let bench = Bench::new();
    let zns = [
        "--size",
        "64M",
        "--zone-size",
        "16M",
        "--zrwa-size",
        "64k",
        "--zrwa-granularity",
        "8k",
        "--max-zrwa",
        "2",
        "--extension-size",
        "128",
    ];
    for name in ["z.raw", "z.qcow2"] {
        let mut args = vec!["create", name];
        args.extend(zns);
        let said = bench.run(&args).ok();
        assert!(said.contains(
            "zone.zrwa_size=65536 zone.zrwa_granularity=8192 zone.max_zrwa=2 zone.descr_ext_size=128"
        ));
        let said = bench.run(&["info", name]).ok();
        assert!(said.contains("descriptor extensions: 128 bytes"), "{said}");
        assert!(
            said.contains("random write areas: 64 KiB, granularity 8 KiB, at most 2"),
            "{said}"
        );
    }
    let json = bench.run(&["info", "--json", "z.raw"]).ok();
    assert!(
        json.contains(r#""explicit_commit": true"#) || json.contains(r#""explicit_commit":true"#),
        "{json}"
    );
    bench.run(&["convert", "-O", "raw", "z.qcow2", "copy.raw"]).ok();
    let said = bench.run(&["info", "copy.raw"]).ok();
    assert!(
        said.contains("random write areas: 64 KiB, granularity 8 KiB, at most 2"),
        "{said}"
    );
    bench
        .run(&[
            "convert",
            "-O",
            "raw",
            "-o",
            "zone.zrwa_size=0",
            "z.qcow2",
            "without.raw",
        ])
        .ok();
    assert!(!bench.run(&["info", "without.raw"]).ok().contains("random write"));
}
