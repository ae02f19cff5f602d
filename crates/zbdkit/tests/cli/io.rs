//! `io` on zones: QEMU's zoned tests (reference: the cases of the `zoned-qcow2` iotest), and what goes beyond them.

use std::io::Write;
use std::process::Stdio;

use crate::support::{Bench, Run};

fn line(zone: u64, written: u64, condition: u32) -> String {
    let start = zone * 0x20000;
    format!(
        "start: {start:#x}, len 0x20000, cap 0x20000, wptr {:#x}, zcond:{condition}, [type: 2]\n",
        start + written
    )
}

#[test]
fn zones_are_reported_up_to_the_last_one() {
    let bench = Bench::with_demo();
    assert_eq!(bench.io(&["zrp 0 1"]).ok(), line(0, 0, 1));
    let ten: String = (0..10).map(|zone| line(zone, 0, 1)).collect();
    assert_eq!(bench.io(&["zrp 0 10"]).ok(), ten);
    assert_eq!(bench.io(&["zrp 0x2C000000 2"]).ok(), line(11, 0, 1));
    assert_eq!(bench.io(&["zrp 0 4294967295"]).ok().lines().count(), 12);
    assert_eq!(bench.io(&["zone_report 64M 1"]).ok(), line(1, 0, 1));
}

#[test]
fn zones_open_close_finish_and_reset() {
    let bench = Bench::with_demo();
    let all = |command: &str| ["0", "64M", "0x2C000000"].map(|zone| format!("{command} {zone} 64M"));
    let mut commands = Vec::new();
    let mut expected = String::new();
    for (command, condition, written) in [("zo", 3, 0), ("zc", 1, 0), ("zf", 14, 0x20000), ("zrs", 1, 0)] {
        for (zone, text) in [0, 1, 11].into_iter().zip(all(command)) {
            commands.push(text);
            commands.push(format!("zrp {} 1", zone << 26));
            expected += &line(zone, written, condition);
        }
    }
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    assert_eq!(bench.io(&commands).ok(), expected);
}

#[test]
fn appends_tell_where_they_went_and_are_there_for_the_next_process() {
    let bench = Bench::with_demo();
    let zap = [
        "zap -p 0 0x1000 0x2000",
        "zrp 0 1",
        "zap -p 0 0x1000 0x2000",
        "zrp 0 1",
        "zap -p 64M 0x1000 0x2000",
        "zap -p 64M 0x1000 0x2000",
    ];
    let told = |sector: &str| format!("After zap done, the append sector is {sector}\n");
    let expected = [
        told("0x0"),
        line(0, 0x18, 2),
        told("0x18"),
        line(0, 0x30, 2),
        told("0x20000"),
        told("0x20018"),
    ];
    assert_eq!(bench.io(&zap).ok(), expected.concat());
    let reset = bench.io(&["zrp 0 3", "zrs 0 768M", "zrp 0 2"]).ok();
    let expected = [
        line(0, 0x30, 4),
        line(1, 0x30, 4),
        line(2, 0, 1),
        line(0, 0, 1),
        line(1, 0, 1),
    ];
    assert_eq!(reset, expected.concat());
}

#[test]
fn appends_fill_a_zone() {
    let bench = Bench::with_demo();
    let run = bench.io(&[
        "zap -p 0 0x1000 0x1000",
        "zap -p 0 0x1000 0x1ffd000",
        "zap -p 0 0x1000000 0x1000000",
        "zrp 0 1",
        "zap 0 4k 4k",
    ]);
    let told = |sector: &str| format!("After zap done, the append sector is {sector}\n");
    let expected = [told("0x0"), told("0x10"), told("0x10000"), line(0, 0x20000, 14)].concat();
    assert_eq!(run.out, expected + "zone append failed: Input/output error\n");
    assert_eq!(run.status, Some(1));
    assert!(run.err.contains("zone 0 is full"), "{run:?}");
    assert_eq!(bench.io(&["zrs 0 64M", "zrp 0 1"]).ok(), line(0, 0, 1));
}

#[test]
fn conventional_zones_take_no_append_of_any_length() {
    let bench = Bench::new();
    let arguments = [
        "disk.raw",
        "--size",
        "768M",
        "--zone-size",
        "64M",
        "--conventional",
        "1",
    ];
    bench.run_with("create", &arguments).ok();
    let run = bench.io(&[
        "zap -p 0 4k 4k",
        "zap -p 0 32M 4k",
        "read -q -P 0 0 64M",
        "zap -p 64M 32M 4k",
    ]);
    let failed = "zone append failed: Input/output error\n".repeat(2);
    assert_eq!(run.out, failed + "After zap done, the append sector is 0x20000\n");
    assert_eq!(run.err, "zbdkit: zone append: zone 0 is conventional\n".repeat(2));
}

#[test]
fn asynchronous_writes_keep_their_order_and_a_reset_zone_reads_zeros() {
    let bench = Bench::with_demo();
    let run = bench.io(&[
        "aio_write -q -P 1 320M 4k",
        "aio_write -q -P 2 327684k 4k",
        "aio_write -q -P 3 327688k 4k",
        "aio_flush",
        "zrp 320M 1",
        "read -q -P 1 320M 4k",
        "read -q -P 2 327684k 4k",
        "read -q -P 3 327688k 4k",
        "aio_write -q 384M 4k",
        "aio_write -q 448M 4k",
        "aio_write -q 576M 4k",
        "aio_flush",
        "zrp 384M 1",
        "zrs 320M 128M",
        "read -q -P 0 320M 128M",
        "zrp 448M 1",
        "zrs 0 768M",
        "read -q -P 0 576M 64M",
        "zrp 576M 1",
    ]);
    let expected = [line(5, 0x18, 2), line(6, 8, 2), line(7, 8, 2), line(9, 0, 1)];
    assert_eq!(run.ok(), expected.concat());
}

#[test]
fn a_failed_asynchronous_write_is_reported_and_counts() {
    let bench = Bench::with_demo();
    for commands in [&["aio_write 4k 4k", "aio_flush"][..], &["aio_write 4k 4k"]] {
        let run = bench.io(commands);
        assert_eq!(
            (run.status, &*run.out),
            (Some(1), "aio_write failed: Input/output error\n"),
            "{run:?}"
        );
        assert!(
            run.err.contains("not at the write pointer 0x0 of zone 0"),
            "{run:?}"
        );
    }
}

#[test]
fn errors_read_as_qemu_ios_with_the_reason_on_stderr() {
    let bench = Bench::with_demo();
    for (command, out, reason) in [
        (
            "zrp 768M 1",
            "zone report failed: Invalid argument",
            "past the end of the device",
        ),
        (
            "zo 4k 64M",
            "zone open failed: Invalid argument",
            "is not the start of a zone",
        ),
        (
            "zo 0 4k",
            "zone open failed: Invalid argument",
            "is not the start of a zone",
        ),
        (
            "zrs 768M 64M",
            "zone reset failed: Input/output error",
            "past the end of the device",
        ),
        (
            "zo 0 768M",
            "zone open failed: Too many references: cannot splice",
            "too many open zones: 6",
        ),
        (
            "zap 4k 4k",
            "zone append failed: Invalid argument",
            "is not the start of a zone",
        ),
        (
            "zap 0 128M",
            "zone append failed: Invalid argument",
            "longer than",
        ),
        (
            "zap 0 100",
            "zone append failed: Invalid argument",
            "whole blocks",
        ),
        (
            "write 4k 4k",
            "write failed: Input/output error",
            "not at the write pointer 0x0 of zone 0",
        ),
        (
            "write 1 3",
            "write failed: Invalid argument",
            "not a multiple of the logical block size",
        ),
        (
            "read 768M 4k",
            "read failed: Input/output error",
            "past the end of the device",
        ),
    ] {
        let run = bench.io(&[command]);
        assert_eq!(
            (run.status, &*run.out),
            (Some(1), &*format!("{out}\n")),
            "{command}: {run:?}"
        );
        assert!(
            run.err.starts_with("zbdkit: ") && run.err.contains(reason),
            "{command}: {run:?}"
        );
    }
}

#[test]
fn sequential_zones_cannot_be_written_through_a_read_only_opening() {
    let bench = Bench::with_demo();
    let run = bench.run(&[
        "io",
        "-r",
        "disk.raw",
        "-c",
        "write 0 4k",
        "-c",
        "zrs 0 64M",
        "-c",
        "zrp 0 1",
    ]);
    let failed = "write failed: Read-only file system\nzone reset failed: Read-only file system\n";
    assert_eq!(run.out, failed.to_owned() + &line(0, 0, 1));
    assert_eq!(bench.json(&["info", "--json", "disk.raw"])["table"]["epoch"], 0);
}

fn interactive(bench: &Bench, input: &str) -> Run {
    let mut command = bench.command();
    command.args(["io", "disk.raw"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap().into()
}

#[test]
fn commands_from_stdin_follow_a_prompt() {
    let bench = Bench::with_demo();
    let run = interactive(&bench, "zrp 0 1\n\nbogus\nzrp 64M 1\nquit\nzrp 0 1\n");
    let expected = [
        "qemu-io> ",
        &line(0, 0, 1),
        "qemu-io> qemu-io> qemu-io> ",
        &line(1, 0, 1),
        "qemu-io> ",
    ]
    .concat();
    assert_eq!(run.out, expected);
    assert_eq!(
        (run.status, &*run.err),
        (Some(1), "command \"bogus\" not found\n")
    );
    let run = interactive(&bench, "length");
    assert_eq!((run.status, &*run.out), (Some(0), "qemu-io> 768 MiB\nqemu-io> "));
}

/// Whether `zbdkit io` with these options has `disk.raw` open past the page cache.
fn is_direct(bench: &Bench, options: &[&str]) -> bool {
    let interactive = bench.interactive_with(options, "disk.raw");
    let process = format!("/proc/{}", interactive.child.id());
    let image = bench.path("disk.raw").canonicalize().unwrap();
    let mut descriptors = std::fs::read_dir(format!("{process}/fd")).unwrap();
    let of_image = descriptors.find_map(|entry| {
        let entry = entry.unwrap();
        let target = std::fs::read_link(entry.path()).ok()?;
        (target == image).then(|| entry.file_name())
    });
    let number = of_image.expect("the image is open").into_string().unwrap();
    let facts = std::fs::read_to_string(format!("{process}/fdinfo/{number}")).unwrap();
    let flags = facts
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .unwrap();
    let flags = u32::from_str_radix(flags.trim(), 8).unwrap();
    assert_eq!(interactive.finish(), Some(0));
    flags & rustix::fs::OFlags::DIRECT.bits() != 0
}

#[test]
fn the_page_cache_is_bypassed_as_the_last_of_n_and_t_says() {
    let bench = Bench::with_demo();
    for (options, direct) in [
        (&[][..], false),
        (&["-n"], true),
        (&["-t", "none"], true),
        (&["--cache=directsync"], true),
        (&["-t", "writeback"], false),
        (&["-t", "writethrough"], false),
        (&["--cache", "writeback", "--aio", "threads", "-n"], true),
        (&["-n", "--cache", "writeback"], false),
    ] {
        assert_eq!(is_direct(&bench, options), direct, "{options:?}");
    }
    for wrong in [["-t", "sometimes"], ["-i", "magic"]] {
        let run = bench.run(&["io", wrong[0], wrong[1], "disk.raw", "-c", "length"]);
        assert_eq!(run.status, Some(2), "{run:?}");
        assert!(run.err.contains("possible values"), "{run:?}");
    }
}
