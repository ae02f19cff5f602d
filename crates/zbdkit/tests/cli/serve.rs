//! `serve`: ready, in use, and cleanly gone.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use zbdkit_spec::nvme::base::{Cns, Csi, Status};
use zbdkit_testkit::client::{Client, Options, ZoneState};
use zbdkit_testkit::nvme::{Driver, DriverOptions, Entry};

use crate::support::Bench;

/// A daemon that said that it is ready.
pub struct Daemon {
    child: Child,
    stdout: BufReader<ChildStdout>,
    /// What it printed up to that.
    said: String,
}

impl Daemon {
    pub fn start(mut command: Command) -> Daemon {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut said = String::new();
        while !said
            .lines()
            .last()
            .is_some_and(|line| line.starts_with("ready: "))
        {
            if stdout.read_line(&mut said).unwrap() == 0 {
                let mut err = String::new();
                let _ = child.stderr.take().unwrap().read_to_string(&mut err);
                panic!("not ready: {said}{err}");
            }
        }
        Daemon { child, stdout, said }
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for the end: exit status, and what it said since it was ready.
    pub fn finish(mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().code(), rest)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn serve(bench: &Bench, args: &[&str]) -> Command {
    let mut command = bench.command();
    command.arg("serve").args(args);
    command
}

fn client(bench: &Bench, socket: &str) -> Client {
    Client::connect(&bench.path(socket), &Options::default()).unwrap()
}

#[test]
fn a_served_image_takes_appends_and_is_closed_cleanly_on_sigterm() {
    let bench = Bench::with_demo();
    let daemon = Daemon::start(serve(
        &bench,
        &["disk.raw", "--vhost-user-blk", "s", "--queues", "1"],
    ));
    let socket = bench.path("s").display().to_string();
    for expected in [
        format!("-chardev socket,id=zbd0,path={socket} "),
        "-device vhost-user-test-device-pci,chardev=zbd0,virtio-id=2,config_size=96,num_vqs=1,vq_size=256\n"
            .into(),
        "memory-backend-memfd,id=mem,size=2G,share=on".into(),
        format!("--vhost-user type=block,socket={socket}\n"),
        format!("ready: disk.raw at {socket}\n"),
    ] {
        assert!(
            daemon.said.contains(&expected),
            "{expected:?} is not in {}",
            daemon.said
        );
    }
    let mut client = client(&bench, "s");
    let sector = client.queue(0).zone_append(0x20000, &[7; 8192]).unwrap();
    assert_eq!(sector, 0x20000);
    assert_eq!(
        client.queue(0).zone_report(0x20000, 1).unwrap()[0].state,
        ZoneState::ImplicitlyOpen
    );
    let id = client.queue(0).get_id().unwrap();
    daemon.signal(Signal::TERM);
    let (status, said) = daemon.finish();
    assert_eq!(
        (status, &*said),
        (Some(0), "SIGTERM: stopping\nclosed disk.raw cleanly\n")
    );
    assert!(!bench.path("s").exists());
    let info = bench.json(&["info", "--json", "disk.raw"]);
    assert_eq!(info["table"]["clean"], true);
    let uuid = info["table"]["uuid"].as_str().unwrap().replace('-', "");
    assert!(
        id.starts_with(&uuid.as_bytes()[..20]),
        "{id:?} is not from {uuid}"
    );
    bench.io(&["read -q -P 7 64M 8k"]).ok();
}

#[test]
fn acknowledged_appends_survive_the_daemons_kill() {
    let bench = Bench::with_demo();
    let daemon = Daemon::start(serve(&bench, &["disk.raw", "--vhost-user-blk", "s"]));
    let mut first = client(&bench, "s");
    first.queue(0).zone_append(0, &[9; 4096]).unwrap();
    daemon.signal(Signal::KILL);
    drop(daemon);
    drop(first);
    // The socket is stale now, and replaced.
    let daemon = Daemon::start(serve(&bench, &["disk.raw", "--vhost-user-blk", "s"]));
    let mut second = client(&bench, "s");
    assert_eq!(second.queue(0).read(0, 4096).unwrap(), [9; 4096]);
    assert_eq!(
        second.queue(0).zone_report(0, 1).unwrap()[0].state,
        ZoneState::Closed
    );
    daemon.signal(Signal::INT);
    assert_eq!(daemon.finish().0, Some(0));
}

#[test]
fn sockets_that_cannot_be_are_refused_and_the_image_stays_clean() {
    let bench = Bench::with_demo();
    let _other = UnixListener::bind(bench.path("used")).unwrap();
    std::fs::write(bench.path("precious"), "data").unwrap();
    let long = "x".repeat(200);
    for (socket, message) in [
        ("used", "is in use: another process listens on it"),
        ("precious", "exists and is not a socket"),
        (&long, "has 200 bytes, but the system allows at most 107"),
        ("no/such/directory/s", "No such file or directory"),
        ("systemd", "LISTEN_FDS handed over 0"),
    ] {
        let run = bench.run(&["serve", "disk.raw", "--vhost-user-blk", socket]);
        run.fails(1, message);
        assert!(
            run.err.starts_with("zbdkit: disk.raw: vhost-user-blk: "),
            "{run:?}"
        );
        assert_eq!(
            bench.json(&["info", "--json", "disk.raw"])["table"]["clean"],
            true
        );
    }
    for (args, message) in [
        (&["--queues", "0"][..], "0 queues: there must be 1 to 256"),
        (
            &["--queue-size", "100"],
            "queue size 100: it must be a power of two",
        ),
        (&["--serial", "a serial that is much too long"], "at most 20 fit"),
    ] {
        let args = [&["serve", "disk.raw", "--vhost-user-blk", "s"], args].concat();
        bench.run(&args).fails(1, message);
    }
    let run = bench.run(&[
        "serve",
        "disk.raw",
        "--vhost-user-blk",
        "s",
        "--run-state",
        "nowhere",
    ]);
    run.fails(2, "neither 'beside', 'sync' or 'none', nor a directory");
    assert_eq!(std::fs::read(bench.path("precious")).unwrap(), b"data");
}

#[test]
fn a_served_image_is_not_opened_a_second_time() {
    let bench = Bench::with_demo();
    let daemon = Daemon::start(serve(&bench, &["disk.raw", "--vhost-user-blk", "s"]));
    let run = bench.run(&["serve", "disk.raw", "--vhost-user-blk", "t"]);
    run.fails(1, &format!("zbdkit (process {})", daemon.child.id()));
}

/// Waits until the process has its own handler of SIGTERM.
fn wait_for_handler(child: &Child) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let caught = status
            .lines()
            .find_map(|line| line.strip_prefix("SigCgt:"))
            .unwrap();
        if u64::from_str_radix(caught.trim(), 16).unwrap() & (1 << (Signal::TERM.as_raw() - 1)) != 0 {
            return;
        }
        assert!(Instant::now() < deadline, "no handler");
        std::thread::yield_now();
    }
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let bench = Bench::with_demo();
    let _holder = bench.interactive("disk.raw");
    // It waits some seconds for the image, in which the first signal has no effect yet.
    let mut command = serve(&bench, &["disk.raw", "--vhost-user-blk", "s"]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    wait_for_handler(&child);
    while child.try_wait().unwrap().is_none() {
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
}

#[test]
fn a_configuration_serves_several_devices() {
    let bench = Bench::with_demo();
    let text = "
        [[device]]
        image = \"disk.raw\"
        [[device.vhost-user-blk]]
        socket = \"a\"
        serial = \"first\"
        [[device]]
        image = \"driver=memory,size=1M\"
        [[device.vhost-user-blk]]
        socket = \"b\"
        serial = \"second\"
        queues = 1
    ";
    std::fs::write(bench.path("zbdkit.toml"), text).unwrap();
    let daemon = Daemon::start(serve(&bench, &["--config", "zbdkit.toml"]));
    assert!(
        daemon
            .said
            .contains("vhost-user-blk-pci,chardev=zbd1,num-queues=1"),
        "{}",
        daemon.said
    );
    for (socket, serial) in [("a", &b"first"[..]), ("b", b"second")] {
        assert!(
            client(&bench, socket)
                .queue(0)
                .get_id()
                .unwrap()
                .starts_with(serial)
        );
    }
    daemon.signal(Signal::TERM);
    let (status, said) = daemon.finish();
    assert_eq!(status, Some(0));
    assert!(
        said.ends_with("closed disk.raw cleanly\nclosed driver=memory,size=1M cleanly\n"),
        "{said}"
    );

    std::fs::write(bench.path("bad.toml"), "[[devise]]\nimage = \"disk.raw\"\n").unwrap();
    bench
        .run(&["serve", "--config", "bad.toml"])
        .fails(1, "(did you mean \"device\"?)");
    let run = bench.run(&["serve"]);
    assert_eq!(run.status, Some(2), "{run:?}");
    assert!(run.err.contains("zbdkit serve --config <FILE>"), "{run:?}");
}

#[test]
fn systemd_is_told_and_its_socket_taken() {
    let bench = Bench::with_demo();
    let manager = UnixDatagram::bind(bench.path("notify")).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let told = || {
        let mut buf = [0; 1024];
        let len = manager.recv(&mut buf).unwrap();
        String::from_utf8_lossy(&buf[..len]).into_owned()
    };
    let listener = UnixListener::bind(bench.path("activated")).unwrap();
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\" 3<&0 </dev/null";
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            script,
            env!("CARGO_BIN_EXE_zbdkit"),
            "serve",
            "disk.raw",
            "--vhost-user-blk",
            "systemd",
        ])
        .current_dir(bench.directory())
        .env("NOTIFY_SOCKET", bench.path("notify"))
        .stdin(Stdio::from(OwnedFd::from(listener)));
    let daemon = Daemon::start(command);
    let ready = told();
    assert!(ready.starts_with("READY=1\n"), "{ready}");
    let activated = bench.path("activated").display().to_string();
    assert!(
        daemon.said.contains(&format!("ready: disk.raw at {activated}")),
        "{}",
        daemon.said
    );
    client(&bench, "activated")
        .queue(0)
        .zone_append(0, &[1; 4096])
        .unwrap();
    daemon.signal(Signal::TERM);
    assert_eq!(told(), "STOPPING=1");
    assert_eq!(daemon.finish().0, Some(0));
    assert!(
        bench.path("activated").exists(),
        "systemd's socket is systemd's to remove"
    );
}

/// What a host of the controller sees of its names: serial number, NQN, and the descriptors of two namespaces.
fn names_of_controller(bench: &Bench, args: &[&str]) -> [Vec<u8>; 4] {
    let mut args = args.to_vec();
    args.extend(["--nvme", "nvme.sock"]);
    let daemon = Daemon::start(serve(bench, &args));
    let mut driver = Driver::connect(&bench.path("nvme.sock"), DriverOptions::default());
    driver.enable();
    let mut identify = |cns, nsid| {
        let data = driver.data();
        let entry = Entry::identify(cns, nsid, Csi::NVM).prps((driver.address(data), 0));
        assert_eq!(driver.admin(entry), Status::SUCCESS);
        driver.get(data, 4096)
    };
    let controller = identify(Cns::CONTROLLER, 0);
    let namespaces = [1, 2].map(|nsid| identify(Cns::NAMESPACE_DESCRIPTORS, nsid));
    drop(driver);
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.finish().0, Some(0));
    let [first, second] = namespaces;
    [
        controller[4..24].to_vec(),
        controller[768..1024].to_vec(),
        first,
        second,
    ]
}

#[test]
fn hosts_find_the_same_controller_over_plain_images_at_each_start() {
    let bench = Bench::new();
    for image in ["a", "b", "c"] {
        bench.run(&["create", "-f", "qcow2", image, "1M"]).ok();
    }
    let first = names_of_controller(&bench, &["--namespace", "a", "--namespace", "b"]);
    assert_ne!(first[2], first[3]);
    let same = ["--namespace", "./a", "--namespace", "b,read-only=on"];
    assert_eq!(names_of_controller(&bench, &same), first);
    let other = names_of_controller(&bench, &["--namespace", "c", "--namespace", "b"]);
    assert_ne!(other[..3], first[..3]);
    assert_eq!(other[3], first[3]);
    let uuid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    let graph = |image| format!("file.driver=file,file.filename={image},driver=qcow2,uuid={uuid}");
    let (a, b) = (graph("a"), graph("b"));
    bench
        .run(&[
            "serve",
            "--image-opts",
            "--nvme",
            "s",
            "--namespace",
            &a,
            "--namespace",
            &b,
        ])
        .fails(1, "namespaces 1 and 2 have the same UUID");
}

#[test]
fn a_controller_whose_commands_are_too_small_for_extensions_says_what_they_need() {
    let bench = Bench::new();
    let image = "driver=zoned,zone.size=1M,zone.descr_ext_size=16320,file.driver=memory,file.size=8M";
    let serve = |size| {
        [
            "serve",
            "--nvme",
            "s",
            "--namespace",
            image,
            "--max-transfer",
            size,
        ]
    };
    for (size, shown) in [("8K", "8 KiB"), ("16K", "16 KiB")] {
        let run = bench.run(&serve(size));
        run.fails(1, "let them transfer 32 KiB (--max-transfer");
        assert!(
            run.err.contains("16448 bytes") && run.err.contains(shown),
            "{run:?}"
        );
    }
    let daemon = Daemon::start(self::serve(&bench, &serve("32K")[1..]));
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.finish().0, Some(0));
}
