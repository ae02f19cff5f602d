//! `report`, `reset`, `open`, `close`, `finish`, `set-zone`, and what all verbs share.

use std::process::Stdio;

use crate::support::Bench;

#[test]
fn a_report_reads_as_blkzones() {
    let bench = Bench::with_demo();
    bench.io(&["write 0 12k", "zf 64M 64M"]).ok();
    let report = bench.run(&["report", "disk.raw", "-c", "3"]).ok();
    assert_eq!(
        report,
        "  start: 0x000000000, len 0x020000, cap 0x020000, wptr 0x000018 reset:0 non-seq:0, zcond: 4(cl) [type: 2(SEQ_WRITE_REQUIRED)]\n  \
           start: 0x000020000, len 0x020000, cap 0x020000, wptr 0x020000 reset:0 non-seq:0, zcond:14(fu) [type: 2(SEQ_WRITE_REQUIRED)]\n  \
           start: 0x000040000, len 0x020000, cap 0x020000, wptr 0x000000 reset:0 non-seq:0, zcond: 1(em) [type: 2(SEQ_WRITE_REQUIRED)]\n"
    );
    let lines = |args: &[&str]| bench.run_with("report", args).ok().lines().count();
    assert_eq!(lines(&["disk.raw"]), 12);
    assert_eq!(lines(&["disk.raw", "-o", "0x20001s"]), 11);
    assert_eq!(lines(&["disk.raw", "--filter", "full"]), 1);
    assert_eq!(lines(&["disk.raw", "--filter", "em", "-c", "4"]), 4);
    assert_eq!(lines(&["disk.raw", "-c", "0"]), 0);
    bench
        .run(&["report", "disk.raw", "-o", "768M"])
        .fails(1, "past the end of the device (805306368 bytes)");
}

#[test]
fn json_reports_are_whole_documents() {
    let bench = Bench::with_demo();
    bench.io(&["write 64M 12k", "zf 64M 64M"]).ok();
    let report = bench.json(&["report", "disk.raw", "--json"]);
    assert_eq!(report["zones"].as_array().unwrap().len(), 12);
    assert_eq!(
        report["zones"][1],
        serde_json::json!({
            "zone": 1, "start": 64 << 20, "len": 64 << 20, "capacity": 64 << 20, "wp": 128 << 20,
            "written_end": (64 << 20) + (12 << 10), "type": "sequential-required", "condition": "full",
            "resets": 0, "finishes": 1, "bytes_written": 12 << 10,
            "attributes": {"finished_by_device": false, "recommended": null, "zrwa": false, "extension": false},
        })
    );
    let none = bench.json(&["report", "disk.raw", "--json", "--filter", "offline"]);
    assert_eq!(none, serde_json::json!({"zones": []}));
}

#[test]
fn zones_are_managed_by_number_offset_and_all() {
    let bench = Bench::with_demo();
    assert_eq!(
        bench.run(&["finish", "disk.raw", "--zone", "1", "-c", "2"]).ok(),
        "finished 2 zones\n"
    );
    assert_eq!(
        bench.run(&["finish", "disk.raw", "0x160000s"]).ok(),
        "finished 1 zone\n"
    );
    let full = || {
        bench
            .run(&["report", "disk.raw", "--filter", "full"])
            .ok()
            .lines()
            .count()
    };
    assert_eq!(full(), 3);
    assert_eq!(
        bench.run(&["reset", "disk.raw", "--zone", "2"]).ok(),
        "reset 1 zone\n"
    );
    assert_eq!(full(), 2);
    bench.run(&["reset", "disk.raw", "--all", "-q"]).ok();
    assert_eq!(full(), 0);
    let open = bench.run(&["open", "disk.raw", "--zone", "0", "-c", "6"]);
    assert!(open.err.contains("not open any more"), "{open:?}");
    open.ok();
    bench.run(&["close", "disk.raw", "--all"]).ok();

    bench
        .run(&["reset", "disk.raw"])
        .fails(2, "Say OFFSET, --zone N or --all");
    bench
        .run(&["reset", "disk.raw", "--zone", "12"])
        .fails(1, "the device has 12, numbered from 0");
    bench
        .run(&["reset", "disk.raw", "4k"])
        .fails(1, "0x1000 is not the start of a zone");
    bench
        .run(&["open", "disk.raw", "--all"])
        .fails(1, "cannot open zone 6 (opened 6 of 12 before it): too many");
}

#[test]
fn the_operator_sets_and_takes_back() {
    let bench = Bench::with_demo();
    bench.io(&["write -P 7 0 4k"]).ok();
    assert_eq!(
        bench
            .run(&["set-zone", "disk.raw", "--zone", "0", "read-only"])
            .ok(),
        "zone 0 is read-only\n"
    );
    bench
        .run(&["reset", "disk.raw", "--zone", "0"])
        .fails(1, "zone 0 is read-only");
    bench.io(&["read -q -P 7 0 4k"]).ok();
    bench
        .run(&["set-zone", "disk.raw", "--zone", "0", "offline"])
        .ok();
    assert_eq!(bench.io(&["read 0 4k"]).out, "read failed: Input/output error\n");
    bench.run(&["set-zone", "disk.raw", "--zone", "0", "normal"]).ok();
    bench.io(&["read -q -P 7 0 4k", "write -q 4k 4k"]).ok();
    bench
        .run(&["set-zone", "disk.raw", "--zone", "99", "normal"])
        .fails(1, "there is no zone 99");
}

#[test]
fn info_is_for_people() {
    let bench = Bench::with_demo();
    bench.io(&["write 0 12k"]).ok();
    let info = bench.run(&["info", "disk.raw"]).ok();
    for line in [
        "image: disk.raw",
        "virtual size: 768 MiB (805306368 bytes)",
        "zones: 12 of 64 MiB",
        "max open zones: 6",
        "conditions: 1 empty",
        "zone table: disk.raw.zones",
        "state: closed cleanly (epoch 1)",
    ] {
        let line = line.replace("1 empty", "11 empty, 1 closed");
        assert!(info.contains(&format!("{line}\n")), "{line:?} is not in {info}");
    }
}

#[test]
fn a_disk_without_zones_says_so() {
    let bench = Bench::new();
    bench
        .run(&["report", "driver=memory,size=1M"])
        .fails(1, "the image has no zones");
    let info = bench.json(&["info", "--json", "driver=memory,size=1M"]);
    assert_eq!(
        (&info["zoned"], &info["driver"]),
        (&serde_json::Value::Null, &"memory".into())
    );
}

#[test]
fn graphs_are_dotted_or_json_and_wrong_names_get_a_suggestion() {
    let bench = Bench::with_demo();
    let dotted = "driver=zoned,file.driver=file,file.filename=disk.raw";
    let json = r#"json:{"driver": "zoned", "file": {"driver": "file", "filename": "disk.raw"}}"#;
    let conditions = |image| bench.json(&["info", "--json", image])["conditions"].clone();
    assert_eq!(conditions(dotted), conditions("disk.raw"));
    assert_eq!(conditions(json), conditions("disk.raw"));
    for (image, message) in [
        (
            "driver=zonde,file.driver=file",
            "driver \"zonde\" is not known (did you mean \"zoned\"?)",
        ),
        (
            "driver=file,filname=x",
            "filename is missing; filname is not an option (did you mean \"filename\"?)",
        ),
        ("driver=memory,sise=1M,size=1M", "did you mean \"size\"?"),
        ("{", "the JSON description of the graph is wrong"),
        ("driver=memory", "size is missing, as in size=1G"),
    ] {
        bench.run(&["info", image]).fails(1, message);
    }
}

#[test]
fn a_reader_that_stops_reading_is_no_error() {
    let bench = Bench::new();
    bench
        .run(&["create", "-q", "disk.raw", "--size", "1G", "--zone-size", "64k"])
        .ok();
    let mut child = bench
        .command()
        .args(["report", "disk.raw"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &*output.stderr), (Some(0), &b""[..]));
}

#[test]
fn completions_and_man_pages_are_made() {
    let bench = Bench::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(bench.run(&["completions", shell]).ok().contains("zbdkit"));
    }
    bench.run(&["man", "pages"]).ok();
    for page in ["zbdkit.1", "zbdkit-serve.1", "zbdkit-set-zone.1"] {
        assert!(bench.path("pages").join(page).exists(), "{page}");
    }
    assert!(bench.run(&["man"]).ok().contains(".TH ZBDKIT 1"));
}
