//! Guest jobs on the NVMe door: booting from it, file systems that meet kills and resets, zones that outlive the daemon,
//! and QEMU's own NVMe drive beside it, for comparison.

mod bench;
mod boot;
mod btrfs;
mod qemu;
mod state;
mod verbs;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use tempfile::TempDir;

use crate::demo::{log_of, socket_directory};
use crate::drive::{Daemon, Zbdkit};
use crate::guest::Guest;
use crate::rig::Rig;

/// A guest may take this long, on a machine that is busy with other things.
const LIMIT: Duration = Duration::from_secs(600);

/// A job.
#[derive(Debug)]
pub struct NvmeJob {
    /// Its name, by which it is chosen.
    pub name: &'static str,
    /// What it is about.
    pub about: &'static str,
    /// Its output is what it is for, so it runs only if it is named.
    pub shows: bool,
    play: fn(&Stage<'_>) -> Result<()>,
}

/// All of them.
pub const NVME_JOBS: &[NvmeJob] = &[
    NvmeJob {
        name: "nvme-boot",
        about: "firmware, boot loader, kernel and root from one namespace, twice; btrfs on a zoned one beside it",
        shows: false,
        play: boot::play,
    },
    NvmeJob {
        name: "nvme-btrfs",
        about: "btrfs through kill -9 of the daemon, power cut, reset and quit of the machine in mid-write",
        shows: false,
        play: btrfs::play,
    },
    NvmeJob {
        name: "nvme-state",
        about: "every zone condition outlives the daemon, stopped or killed; QEMU's nvme-ns forgets them",
        shows: false,
        play: state::play,
    },
    NvmeJob {
        name: "nvme-verbs",
        about: "some hundred commands, right and wrong, to zbdkit's controller and QEMU's: the known differences, no others",
        shows: false,
        play: verbs::play,
    },
    NvmeJob {
        name: "nvme-bench",
        about: "fio on zbdkit's controller and on QEMU's by turns, images in memory, a table",
        shows: true,
        play: bench::play,
    },
];

impl NvmeJob {
    /// Plays it in guests.
    pub fn run(&self, rig: &Rig, zbdkit: &Zbdkit, verbose: bool) -> Result<()> {
        let images = rig.directory.join("images").join(self.name);
        if images.exists() {
            std::fs::remove_dir_all(&images)?;
        }
        std::fs::create_dir_all(&images)?;
        let sockets = socket_directory()?;
        (self.play)(&Stage {
            rig,
            zbdkit,
            name: self.name,
            stream: verbose || self.shows,
            images: images.clone(),
            sockets,
            log: log_of(rig, self.name)?,
        })?;
        // A failed job's images stay for a look at them.
        Ok(std::fs::remove_dir_all(&images)?)
    }
}

/// What a job has at hand.
struct Stage<'a> {
    rig: &'a Rig,
    zbdkit: &'a Zbdkit,
    name: &'static str,
    stream: bool,
    /// An empty directory.
    images: PathBuf,
    sockets: TempDir,
    log: PathBuf,
}

impl Stage<'_> {
    /// A path for an image.
    fn image(&self, name: &str) -> PathBuf {
        self.images.join(name)
    }

    /// A daemon with a controller of these namespaces: paths or graphs.
    fn serve<N: AsRef<Path>>(&self, namespaces: &[N]) -> Result<Daemon> {
        self.serve_with(&[], namespaces)
    }

    fn serve_with<N: AsRef<Path>>(&self, options: &[&str], namespaces: &[N]) -> Result<Daemon> {
        let namespaces: Vec<&Path> = namespaces.iter().map(AsRef::as_ref).collect();
        let socket = self.sockets.path().join("n.sock");
        self.zbdkit
            .serve_nvme_with(options, &namespaces, &socket, &self.log)
    }

    /// A guest with the controller of `daemon`.
    fn guest(&self, part: &str, script: &str, daemon: &Daemon) -> Guest<'_> {
        let mut guest = Guest::new(self.rig, &format!("{}-{part}", self.name), script);
        guest.timeout = LIMIT;
        guest.stream = self.stream;
        guest.qemu_args.extend(daemon.nvme_arguments());
        guest
    }
}

/// Zones that zbdkit and QEMU are given alike. Sizes in MiB; blocks are of 4096 bytes.
#[derive(Debug, Clone, Copy)]
struct Zones {
    count: u32,
    size: u32,
    capacity: u32,
    max_open: u32,
    max_active: u32,
    /// Whether they have descriptor extensions of 64 bytes and two random write areas, of 64 KiB, committed by 16 KiB.
    extras: bool,
}

impl Zones {
    /// Makes an image with them.
    fn create(&self, zbdkit: &Zbdkit, image: &Path) -> Result<()> {
        let mut arguments = format!(
            "--size {}M --zone-size {}M --zone-capacity {}M --max-open {} --max-active {}",
            self.count * self.size,
            self.size,
            self.capacity,
            self.max_open,
            self.max_active
        );
        if self.extras {
            arguments += " --extension-size 64 --max-zrwa 2 --zrwa-size 64K --zrwa-granularity 16K";
        }
        let arguments: Vec<&str> = arguments.split(' ').collect();
        zbdkit.create_with(image, &arguments)
    }

    /// Tells a script.
    fn describe<'rig>(&self, guest: Guest<'rig>) -> Guest<'rig> {
        guest
            .variable("SIZE_MB", self.count * self.size)
            .variable("ZONE_MB", self.size)
            .variable("CAPACITY_MB", self.capacity)
            .variable("MAX_OPEN", self.max_open)
            .variable("MAX_ACTIVE", self.max_active)
    }
}

/// A graph of a raw image without zones.
fn plain_raw(image: &Path) -> PathBuf {
    let path = image.display().to_string().replace(',', ",,");
    format!("driver=raw,file.driver=file,file.filename={path}").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn job_names_are_unique() {
        for (number, job) in NVME_JOBS.iter().enumerate() {
            let others = &NVME_JOBS[..number];
            assert!(others.iter().all(|other| other.name != job.name), "{}", job.name);
        }
    }
}
