//! `serve --control`: an operator and the images that are served.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use rustix::process::Signal;
use zbdkit_spec::nvme::base::{AdminOpcode, Status};
use zbdkit_spec::nvme::feature::FeatureId;
use zbdkit_spec::nvme::nvm::Opcode;
use zbdkit_testkit::nvme::{Driver, DriverOptions, Entry};

use crate::serve::{Daemon, serve};
use crate::support::Bench;

/// Two zoned images, with the same zones.
fn images() -> Bench {
    let bench = Bench::new();
    for image in ["a.raw", "b.qcow2"] {
        bench
            .run(&["create", image, "--size", "64M", "--zone-size", "8M"])
            .ok();
    }
    bench
}

fn condition(bench: &Bench, image: &str, zone: usize) -> String {
    let report = bench.json(&["report", image, "--json"]);
    report["zones"][zone]["condition"]
        .as_str()
        .unwrap_or_else(|| panic!("{report}"))
        .to_owned()
}

/// Sends a line, or what is none, and reads the reply.
fn say(bench: &Bench, line: &str) -> String {
    let mut stream = UnixStream::connect(bench.path("ctl")).unwrap();
    stream.write_all(line.as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    reply
}

#[test]
fn hosts_are_told_of_a_zone_that_an_operator_changes_under_them() {
    let bench = images();
    let daemon = Daemon::start(serve(
        &bench,
        &[
            "--nvme",
            "nvme",
            "--namespace",
            "a.raw",
            "--namespace",
            "b.qcow2",
            "--control",
            "ctl",
        ],
    ));
    let mode = bench.path("ctl").metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut driver = Driver::connect(&bench.path("nvme"), DriverOptions::default());
    driver.enable();
    driver.make_io_queues(1);
    let mut configure =
        Entry::admin(AdminOpcode::SET_FEATURES).cdw10(FeatureId::ASYNC_EVENT_CONFIGURATION.0.into());
    configure.0.cdw11.set(1 << 27);
    assert_eq!(driver.admin(configure), Status::SUCCESS);
    driver.put(0, Entry::admin(AdminOpcode::ASYNC_EVENT_REQUEST).cid(77));
    driver.ring(0);
    let block = |zone: u64| zone * (8 << 20) / 4096;
    let data = driver.data();
    let write = |driver: &mut Driver, zone| {
        let entry = Entry::rw(Opcode::WRITE, block(zone), 1)
            .nsid(2)
            .prps((driver.address(data), 0));
        driver.io(1, entry)
    };
    assert_eq!(write(&mut driver, 3), Status::SUCCESS);

    let set = |image: &str, zone: &str, state: &str| {
        bench.run(&["set-zone", image, "--control", "ctl", "--zone", zone, state])
    };
    assert_eq!(set("b.qcow2", "3", "offline").ok(), "zone 3 is offline\n");
    let told = driver.next(0);
    assert_eq!((told.cid, told.result), (77, 2 << 32 | 0x00bf_ef02));
    assert_eq!(write(&mut driver, 3), Status::ZONE_IS_OFFLINE);
    assert_eq!(write(&mut driver, 4), Status::SUCCESS);

    // By another name of the same file, and the other image.
    let other = bench.path("a.raw");
    set(other.to_str().unwrap(), "0", "read-only").ok();
    set("a.raw", "8", "read-only").fails(1, "there is no zone 8: the device has 8 zones");
    set("c.raw", "1", "read-only").fails(1, "c.raw: is not served there; a.raw, b.qcow2 is");
    bench
        .run(&["set-zone", "a.raw", "--zone", "1", "read-only"])
        .fails(1, "set-zone --control");

    drop(driver);
    daemon.signal(Signal::TERM);
    let (code, said) = daemon.finish();
    assert_eq!(code, Some(0));
    assert!(said.contains("set-zone: zone 3 of"), "{said}");
    assert!(!bench.path("ctl").exists());
    assert_eq!(condition(&bench, "a.raw", 0), "read-only");
    assert_eq!(condition(&bench, "b.qcow2", 3), "offline");
    set("a.raw", "1", "normal").fails(1, "is anything served with '--control' there?");
}

#[test]
fn what_makes_no_sense_is_answered_and_the_next_request_is_served() {
    let bench = images();
    let toml =
        "control = \"ctl\"\n[[device]]\nimage = \"a.raw\"\n[[device.vhost-user-blk]]\nsocket = \"vub\"\n";
    std::fs::write(bench.path("zbdkit.toml"), toml).unwrap();
    let daemon = Daemon::start(serve(&bench, &["--config", "zbdkit.toml"]));
    for nonsense in [
        "",
        "\n",
        "{}\n",
        "\u{0}\n",
        r#"{"command":"set-zone","image":"a.raw","zone":-1,"state":"offline"}"#,
        r#"{"command":"set-zone","image":"a.raw","zone":1,"state":"shiny"}"#,
        r#"{"command":"set-zone","image":"a.raw","zone":1,"state":"offline","more":1}"#,
    ] {
        let reply = say(&bench, nonsense);
        assert!(
            reply.starts_with(r#"{"error":"the request makes no sense"#),
            "{nonsense:?}: {reply}"
        );
    }
    let right = r#"{"command":"set-zone","image":"a.raw","zone":1,"state":"offline"}"#;
    assert_eq!(say(&bench, right), "\"done\"\n");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.finish().0, Some(0));
    assert_eq!(condition(&bench, "a.raw", 1), "offline");
}
