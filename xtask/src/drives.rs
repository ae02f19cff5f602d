//! Guest jobs on the guest kernel's own zoned devices: null_blk, scsi_debug, QEMU's NVMe drives.
//!
//! zbdkit runs inside of the guest here, with `zbdkit-drive` of the test kit, which has the suites.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::guest::Guest;
use crate::proc::{self, Running};
use crate::rig::Rig;

/// A script on devices that it makes itself.
#[derive(Debug)]
pub struct DriveJob {
    /// Its name, by which it is chosen.
    pub name: &'static str,
    /// What it is about.
    pub about: &'static str,
    minutes: u64,
    script: &'static str,
    /// Its output is what it is for, so it runs only if it is named.
    pub shows: bool,
    /// Files that it finds in its share, by name.
    files: &'static [(&'static str, &'static str)],
    /// QEMU's NVMe drive.
    nvme: Nvme,
    /// Test programs of the test kit that it runs as `/share/test-NAME`.
    tests: &'static [&'static str],
}

/// QEMU's NVMe drive: `/dev/nvme0`.
#[derive(Debug, Clone, Copy)]
struct Nvme {
    /// Options of the controller, each with a comma before it.
    controller: &'static str,
    /// Options of its namespaces.
    namespaces: &'static [&'static str],
    /// MiB of each namespace.
    size: u64,
}

/// One namespace: `/dev/nvme0n1`.
const ONE: Nvme = Nvme {
    controller: "",
    namespaces: &[
        "zoned=on,zoned.zone_size=4M,zoned.zone_capacity=3M,zoned.max_open=4,zoned.max_active=6,\
         logical_block_size=4096,physical_block_size=4096",
    ],
    size: 64,
};

/// A namespace as the test kit simulates it (`zbdkit_testkit::namespace`), and one without zones.
const AS_SIMULATED: Nvme = Nvme {
    controller: ",mdts=4,zoned.zasl=3",
    namespaces: &[
        "zoned=on,zoned.zone_size=1M,zoned.zone_capacity=768K,zoned.max_open=3,zoned.max_active=5,\
         zoned.descr_ext_size=64,zoned.numzrwa=2,zoned.zrwas=64K,zoned.zrwafg=16K,\
         logical_block_size=4096,physical_block_size=4096",
        "zoned=off",
    ],
    size: 8,
};

/// One with zones that take a while to fill.
const LARGE: Nvme = Nvme {
    controller: "",
    namespaces: &[
        "zoned=on,zoned.zone_size=64M,zoned.max_open=14,zoned.max_active=14,logical_block_size=4096,\
         physical_block_size=4096",
    ],
    size: 1024,
};

/// The commands of QEMU's iotest `zoned`, with qemu-io's answers.
const ZONED: &str = include_str!("../../crates/zbdkit/tests/cli/iotests/zoned.transcript");

/// All of them.
pub const DRIVE_JOBS: &[DriveJob] = &[
    DriveJob {
        name: "host-device-suites",
        about: "the suites on null_blk, scsi_debug and NVMe, straight and through a door; what is refused",
        minutes: 10,
        script: include_str!("../guest/host-device.sh"),
        shows: false,
        files: &[],
        nvme: ONE,
        tests: &[],
    },
    DriveJob {
        name: "host-device-errors",
        about: "bad media, dead zones, devices that go away: told apart, and nothing hangs",
        minutes: 10,
        script: include_str!("../guest/host-device-errors.sh"),
        shows: false,
        files: &[],
        nvme: ONE,
        tests: &[],
    },
    DriveJob {
        name: "host-device-bench",
        about: "writes and appends on null_blk against fio, a table",
        minutes: 10,
        script: include_str!("../guest/host-device-bench.sh"),
        shows: true,
        files: &[],
        nvme: ONE,
        tests: &[],
    },
    DriveJob {
        name: "host-nvme-bench",
        about: "writes and appends by commands to an NVMe namespace against fio, a table",
        minutes: 20,
        script: include_str!("../guest/host-nvme-bench.sh"),
        shows: true,
        files: &[],
        nvme: LARGE,
        tests: &[],
    },
    DriveJob {
        name: "iotest-zoned",
        about: "QEMU's iotest on null_blk, by zbdkit io and by QEMU's own qemu-io",
        minutes: 10,
        script: include_str!("../guest/qemu-iotest-zoned.sh"),
        shows: false,
        files: &[("zoned.transcript", ZONED)],
        nvme: ONE,
        tests: &[],
    },
    DriveJob {
        name: "list-check",
        about: "list and check on null_blk, scsi_debug and NVMe, free and in use",
        minutes: 10,
        script: include_str!("../guest/list-check.sh"),
        shows: false,
        files: &[],
        nvme: ONE,
        tests: &[],
    },
    DriveJob {
        name: "host-nvme",
        about: "an NVMe namespace by its character device: its rules, the suites, what is refused, pulled out",
        minutes: 15,
        script: include_str!("../guest/host-nvme.sh"),
        shows: false,
        files: &[],
        nvme: AS_SIMULATED,
        tests: &["nvme"],
    },
    DriveJob {
        name: "host-aware",
        about: "a host-aware SCSI disk, whose zones Linux does not show: its rules, the suites, as a plain disk",
        minutes: 10,
        script: include_str!("../guest/host-aware.sh"),
        shows: false,
        files: &[],
        nvme: ONE,
        tests: &["scsi"],
    },
];

/// What their scripts have in common.
const LIBRARY: &str = include_str!("../guest/drives.sh");

/// The tag by which a guest mounts the tree with QEMU's tools, where they are in one of ours.
const QEMU_SHARE: &str = "qemu";

const NAMES: [&str; 2] = ["zbdkit", "zbdkit-drive"];

/// The programs that run in the guest.
#[derive(Debug)]
pub struct Programs {
    /// By the names that they have there.
    files: Vec<(String, PathBuf)>,
}

impl Programs {
    /// Builds what these jobs need, optimised but for tests; `$ZBDKIT_PROGRAMS` names a directory that has it already.
    pub fn build(jobs: &[&DriveJob]) -> Result<Programs> {
        let mut tests: Vec<&str> = jobs.iter().flat_map(|job| job.tests).copied().collect();
        tests.dedup();
        if let Some(directory) = std::env::var_os("ZBDKIT_PROGRAMS") {
            let names = NAMES.map(str::to_owned).into_iter();
            let names = names.chain(tests.iter().map(|name| test_name(name)));
            let files = names.map(|name| (name.clone(), Path::new(&directory).join(name)));
            return Ok(Programs {
                files: files.collect(),
            });
        }
        let mut cargo = cargo();
        cargo
            .args(["build", "--release", "--package", "zbdkit", "--package"])
            .args(["zbdkit-testkit", "--bin", "zbdkit", "--bin", "zbdkit-drive"]);
        let status = Running::start(&mut cargo, "cargo build")?.wait_for(BUILD_LIMIT)?;
        ensure!(
            status.is_some_and(|status| status.success()),
            "cargo build --release of zbdkit and zbdkit-drive failed"
        );
        let at = |name: &str| crate::target_directory().join("release").join(name);
        let mut files: Vec<_> = NAMES.map(|name| (name.to_owned(), at(name))).into();
        for name in tests {
            files.push((test_name(name), test_program(name)?));
        }
        Ok(Programs { files })
    }

    fn get(&self, name: &str) -> Result<&Path> {
        let file = self.files.iter().find(|(other, _)| other == name);
        Ok(&file.with_context(|| format!("{name} was not built"))?.1)
    }
}

/// Compiling takes at most this long.
const BUILD_LIMIT: Duration = Duration::from_secs(3600);

fn cargo() -> Command {
    let mut cargo = proc::command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(crate::workspace());
    cargo
}

fn test_name(name: &str) -> String {
    format!("test-{name}")
}

/// Builds a test of the test kit and gives its program.
fn test_program(name: &str) -> Result<PathBuf> {
    let mut cargo = cargo();
    cargo
        .args(["test", "--no-run", "--package", "zbdkit-testkit", "--test", name])
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit());
    let output = cargo.output().context("cannot run cargo test")?;
    ensure!(
        output.status.success(),
        "cargo test --no-run --test {name} failed"
    );
    // One JSON object a line (the Cargo Book, External tools). The package's programs are built beside its test, and
    // which of them cargo names last is left to chance.
    let messages = String::from_utf8_lossy(&output.stdout);
    executable_of_test(&messages, name).with_context(|| format!("cargo names no program of the test {name}"))
}

fn executable_of_test(messages: &str, name: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| {
            let target = &message["target"];
            target["name"] == name && target["kind"] == serde_json::json!(["test"])
        })
        .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
}

impl DriveJob {
    /// Runs it in a guest.
    pub fn run(&self, rig: &Rig, programs: &Programs, verbose: bool) -> Result<()> {
        let directory = tempfile::tempdir().context("no temporary directory")?;
        let share = directory.path();
        let tests = self.tests.iter().map(|name| test_name(name));
        for name in NAMES.map(str::to_owned).into_iter().chain(tests) {
            let program = programs.get(&name)?;
            std::fs::copy(program, share.join(name))
                .with_context(|| format!("cannot copy {}", program.display()))?;
        }
        for (name, content) in self.files {
            std::fs::write(share.join(name), content)?;
        }
        let mut guest = Guest::new(rig, self.name, &format!("{LIBRARY}\n{}", self.script));
        guest.memory = 3072;
        guest.timeout = Duration::from_secs(self.minutes * 60);
        guest.stream = verbose || self.shows;
        guest.share = Some(share.to_owned());
        guest.qemu_args = self.nvme.arguments(share)?;
        if let Some(tree) = rig.qemu.tree() {
            guest.share_read_only(&tree.path(""), QEMU_SHARE);
            guest = guest.variable("QEMU_SHARE", QEMU_SHARE);
        }
        guest.run()?.check().map(drop)
    }
}

impl Nvme {
    /// QEMU's arguments for it, with its files in `directory`.
    fn arguments(&self, directory: &Path) -> Result<Vec<String>> {
        let mut arguments = vec![
            "-device".to_owned(),
            format!("nvme,id=nvme0,serial=zbdkit-nvme{}", self.controller),
        ];
        for (n, options) in self.namespaces.iter().enumerate() {
            let file = directory.join(format!("nvme{n}.raw"));
            std::fs::File::create(&file)?.set_len(self.size << 20)?;
            let file = file.display().to_string().replace(',', ",,");
            arguments.extend([
                "-drive".to_owned(),
                format!("if=none,id=nvm{n},format=raw,file={file}"),
                "-device".to_owned(),
                format!("nvme-ns,bus=nvme0,drive=nvm{n},nsid={},{options}", n + 1),
            ]);
        }
        Ok(arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_of_a_test_is_told_from_those_built_beside_it() {
        let messages = r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"nvme"},"executable":null}
{"reason":"compiler-artifact","target":{"kind":["bin"],"name":"nvme"},"executable":"/t/bin"}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"nvme"},"executable":"/t/test"}
{"reason":"compiler-artifact","target":{"kind":["bin"],"name":"zbdkit-nvme"},"executable":"/t/other"}
{"reason":"build-finished","success":true}"#;
        let found = |name| executable_of_test(messages, name);
        assert_eq!(found("nvme"), Some(PathBuf::from("/t/test")));
        assert_eq!(found("zbdkit-nvme"), None);
    }
}
