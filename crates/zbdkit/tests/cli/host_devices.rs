//! `list`, and `check` of devices, on a machine that most likely has no zoned drives.

use crate::support::Bench;

#[test]
fn a_list_of_zoned_drives_is_json_with_a_path_for_each() {
    let json = Bench::new().json(&["list", "--json"]);
    let devices = json["devices"].as_array().unwrap();
    assert!(devices.iter().all(|device| device["path"].is_string()), "{json}");
    let run = Bench::new().run(&["list"]);
    assert_eq!(
        run.out.lines().count() > devices.len(),
        !devices.is_empty(),
        "{run:?}"
    );
    assert_eq!(
        (run.status, run.err.is_empty()),
        (Some(0), !devices.is_empty()),
        "{run:?}"
    );
}

#[test]
fn a_device_is_checked_for_use_and_what_hinders_is_a_problem() {
    let bench = Bench::new();
    let run = bench.run(&["check", "/dev/null"]);
    assert_eq!((run.status, &*run.err), (Some(1), ""), "{run:?}");
    assert!(
        run.out.starts_with("ok       device          character device\n"),
        "{run:?}"
    );
    assert!(run.out.contains("\nproblem  opening "), "{run:?}");
    assert!(run.out.ends_with("\n/dev/null: not usable as it is\n"), "{run:?}");
    let quiet = bench.run(&["check", "-q", "/dev/null"]);
    assert!(quiet.out.starts_with("problem  opening "), "{quiet:?}");

    let run = bench.run(&["check", "--json", "/dev/null"]);
    let json: serde_json::Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!((run.status, &json["usable"]), (Some(1), &false.into()));
    assert_eq!(
        json["image"],
        "driver=host_device,filename=/dev/null,cache.direct=on"
    );
    let findings = json["findings"].as_array().unwrap();
    let problems = findings.iter().filter(|finding| finding["verdict"] == "problem");
    assert_eq!(problems.count(), 1, "{json}");
}

#[test]
fn nothing_in_a_device_is_repaired() {
    let run = Bench::new().run(&["check", "-r", "all", "/dev/null"]);
    run.fails(1, "there is nothing to repair in a device");
}

#[test]
fn an_image_behind_a_link_or_an_option_is_no_device() {
    let bench = Bench::with_demo();
    std::os::unix::fs::symlink("disk.raw", bench.path("link.raw")).unwrap();
    std::os::unix::fs::symlink("disk.raw.zones", bench.path("link.raw.zones")).unwrap();
    let said = bench.run(&["check", "link.raw"]).ok();
    assert_eq!(said, bench.run(&["check", "disk.raw"]).ok());
    let run = bench.run(&["check", "-f", "qcow2", "/dev/null"]);
    assert!(
        !run.out.contains("character device") && run.status == Some(1),
        "{run:?}"
    );
}
