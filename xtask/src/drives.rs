//! Guest jobs on the guest kernel's own zoned devices: null_blk, scsi_debug, QEMU's NVMe drives.
//!
//! zbdkit runs inside of the guest here, with `zbdkit-drive` of the test kit, which has the suites.

use std::path::{Path, PathBuf};
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
}

/// All of them.
pub const DRIVE_JOBS: &[DriveJob] = &[
    DriveJob {
        name: "host-device-suites",
        about: "the suites on null_blk, scsi_debug and NVMe, straight and through a door; what is refused",
        minutes: 10,
        script: include_str!("../guest/host-device.sh"),
        shows: false,
    },
    DriveJob {
        name: "host-device-errors",
        about: "bad media, dead zones, devices that go away: told apart, and nothing hangs",
        minutes: 10,
        script: include_str!("../guest/host-device-errors.sh"),
        shows: false,
    },
    DriveJob {
        name: "host-device-bench",
        about: "writes and appends on null_blk against fio, a table",
        minutes: 10,
        script: include_str!("../guest/host-device-bench.sh"),
        shows: true,
    },
];

/// What their scripts have in common.
const LIBRARY: &str = include_str!("../guest/drives.sh");

const NAMES: [&str; 2] = ["zbdkit", "zbdkit-drive"];

/// The programs that run in the guest.
#[derive(Debug)]
pub struct Programs([PathBuf; 2]);

impl Programs {
    /// Builds them, optimised; `$ZBDKIT_PROGRAMS` names a directory that has them already.
    pub fn build() -> Result<Programs> {
        if let Some(directory) = std::env::var_os("ZBDKIT_PROGRAMS") {
            return Ok(Programs(NAMES.map(|name| Path::new(&directory).join(name))));
        }
        let mut cargo = proc::command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo
            .args([
                "build",
                "--release",
                "--package",
                "zbdkit",
                "--package",
                "zbdkit-testkit",
            ])
            .args(["--bin", "zbdkit", "--bin", "zbdkit-drive"])
            .current_dir(crate::workspace());
        let status = Running::start(&mut cargo, "cargo build")?.wait_for(Duration::from_secs(3600))?;
        ensure!(
            status.is_some_and(|status| status.success()),
            "cargo build --release of zbdkit and zbdkit-drive failed"
        );
        let at = |name| crate::target_directory().join("release").join(name);
        Ok(Programs(NAMES.map(at)))
    }
}

impl DriveJob {
    /// Runs it in a guest.
    pub fn run(&self, rig: &Rig, programs: &Programs, verbose: bool) -> Result<()> {
        let directory = tempfile::tempdir().context("no temporary directory")?;
        let share = directory.path();
        for program in &programs.0 {
            let name = program.file_name().context("a program without a name")?;
            std::fs::copy(program, share.join(name))
                .with_context(|| format!("cannot copy {}", program.display()))?;
        }
        let drive = share.join("nvme.raw");
        std::fs::File::create(&drive)?.set_len(64 << 20)?;
        let mut guest = Guest::new(rig, self.name, &format!("{LIBRARY}\n{}", self.script));
        guest.memory = 3072;
        guest.timeout = Duration::from_secs(self.minutes * 60);
        guest.stream = verbose || self.shows;
        guest.share = Some(share.to_owned());
        guest.qemu_args = nvme_arguments(&drive.display().to_string().replace(',', ",,"));
        guest.run()?.check().map(drop)
    }
}

/// A zoned NVMe drive: `/dev/nvme0n1`.
fn nvme_arguments(file: &str) -> Vec<String> {
    [
        "-drive",
        &format!("if=none,id=nvm,format=raw,file={file}"),
        "-device",
        "nvme,id=nvme0,serial=zbdkit-nvme",
        "-device",
        "nvme-ns,bus=nvme0,drive=nvm,zoned=on,zoned.zone_size=4M,zoned.zone_capacity=3M,zoned.max_open=4,\
         zoned.max_active=6,logical_block_size=4096,physical_block_size=4096",
    ]
    .map(str::to_owned)
    .into()
}
