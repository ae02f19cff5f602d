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
