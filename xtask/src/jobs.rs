//! `cargo xtask test`: everything that is to pass before a change goes in, quick checks first.
//!
//! A guest job is a script that runs in a guest on a new drive of a stated geometry. Its exit status
//! says whether it passed, its output why not.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::demo::{self, log_of, socket_directory};
use crate::drive::{Device, Format, Geometry, Zbdkit, remove_image};
use crate::drives::{DRIVE_JOBS, DriveJob, Programs};
use crate::guest::Guest;
use crate::nvme::{NVME_JOBS, NvmeJob};
use crate::proc::{self, Running};
use crate::rig::Rig;
use crate::tally::Tally;
use crate::ui::{heading, say};

/// Compiling and running the workspace's own tests takes at most this long.
const CARGO_LIMIT: Duration = Duration::from_secs(7200);

/// What the user asks for.
#[derive(Debug, Args)]
pub struct Test {
    /// Leaves out everything that needs a guest
    #[arg(long)]
    fast: bool,
    /// What the guest jobs run on: null_blk checks the jobs themselves
    #[arg(long, value_enum, default_value = "zbdkit")]
    device: Device,
    /// The format of the images that the guest jobs run on; without it, what each job names
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Shows the guests' output as it comes
    #[arg(long, short)]
    verbose: bool,
    /// Names the jobs and ends
    #[arg(long)]
    list: bool,
    /// Runs only the jobs whose name contains this
    filter: Option<String>,
}

/// How a guest job is played.
#[derive(Debug, Clone, Copy)]
enum Play {
    /// One guest runs this script.
    Script(&'static str),
    /// One guest runs this script, with the drive and one without zones as namespaces of an NVMe controller.
    Nvme(&'static str),
    /// The story of the demonstration.
    Story,
    /// The daemon is killed while the first script runs; the second checks what is left.
    Kill(&'static str, &'static str),
    /// What the first script left is put aside, the second script changes it, and the third must find it as it was.
    Back(Way, [&'static str; 3]),
}

/// How a drive's state is put aside, and brought back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// A snapshot in the image is made, and applied.
    Snapshot,
    /// The changes go to an overlay, and the image below it is served again.
    Overlay,
}

#[derive(Debug)]
struct Job {
    name: &'static str,
    about: &'static str,
    geometry: Geometry,
    memory: u32,
    minutes: u64,
    formats: &'static [Format],
    play: Play,
}

/// Most jobs: what format the image has does not show.
const USUAL: &[Format] = &[Format::Qcow2];
const BOTH: &[Format] = &[Format::Qcow2, Format::Raw];

const SMALL_ZONES: Geometry = Geometry {
    size: 1024,
    zone_size: 16,
    conventional: 0,
    max_open: 8,
    max_active: 12,
    block_size: 512,
};
const WITH_CONVENTIONAL: Geometry = Geometry {
    size: 2048,
    zone_size: 16,
    conventional: 16,
    max_open: 16,
    max_active: 24,
    block_size: 4096,
};
/// dm-zoned closes no zones of its own: no limits.
const FOR_DM_ZONED: Geometry = Geometry {
    max_open: 0,
    max_active: 0,
    ..WITH_CONVENTIONAL
};

macro_rules! script {
    ($name:literal) => {
        include_str!(concat!("../guest/", $name, ".sh"))
    };
}

const BACK: [&str; 3] = [
    script!("back-first"),
    script!("back-second"),
    script!("back-third"),
];

const JOBS: &[Job] = &[
    Job {
        name: "lsblk",
        about: "shown as it was made; the report follows writes, reset, finish, open, close and the limits",
        geometry: Geometry::DEMO,
        memory: 1024,
        minutes: 5,
        formats: BOTH,
        play: Play::Script(script!("lsblk")),
    },
    Job {
        name: "fio-zbd-verify",
        about: "fio writes zones in sequence and at random and verifies checksums",
        geometry: SMALL_ZONES,
        memory: 1024,
        minutes: 10,
        formats: USUAL,
        play: Play::Script(script!("fio-zbd-verify")),
    },
    Job {
        name: "zonefs",
        about: "mkzonefs, appending, remount, truncation",
        geometry: Geometry::DEMO,
        memory: 1024,
        minutes: 5,
        formats: USUAL,
        play: Play::Script(script!("zonefs")),
    },
    Job {
        name: "btrfs",
        about: "files, snapshot, balance, scrub, check",
        geometry: Geometry {
            size: 2048,
            max_open: 12,
            max_active: 16,
            ..Geometry::DEMO
        },
        memory: 1024,
        minutes: 10,
        formats: USUAL,
        play: Play::Script(script!("btrfs")),
    },
    Job {
        name: "f2fs",
        about: "a drive with conventional zones; files, remount, fsck",
        geometry: WITH_CONVENTIONAL,
        memory: 1024,
        minutes: 10,
        formats: USUAL,
        play: Play::Script(script!("f2fs")),
    },
    Job {
        name: "dm-zoned",
        about: "ext4 on dm-zoned on a drive with conventional zones",
        geometry: FOR_DM_ZONED,
        memory: 1024,
        minutes: 10,
        formats: USUAL,
        play: Play::Script(script!("dm-zoned")),
    },
    Job {
        name: "restart",
        about: "the demonstration's story: guest and daemon restarted, the file is there",
        geometry: Geometry::DEMO,
        memory: 1024,
        minutes: 10,
        formats: BOTH,
        play: Play::Story,
    },
    Job {
        name: "restart-kill",
        about: "kill -9 of the daemon under fio; what was acknowledged is there",
        geometry: SMALL_ZONES,
        memory: 1024,
        minutes: 10,
        formats: BOTH,
        play: Play::Kill(script!("kill-first"), script!("kill-second")),
    },
    Job {
        name: "snapshot",
        about: "a snapshot of a drive with btrfs brings its files and its zones back",
        geometry: Geometry::DEMO,
        memory: 1024,
        minutes: 5,
        formats: USUAL,
        play: Play::Back(Way::Snapshot, BACK),
    },
    Job {
        name: "nvme",
        about: "an NVMe controller with a zoned and a plain namespace; zone management, fio on both, a reset",
        geometry: Geometry {
            size: 512,
            zone_size: 16,
            ..Geometry::DEMO
        },
        memory: 1024,
        minutes: 5,
        formats: BOTH,
        play: Play::Nvme(script!("nvme")),
    },
    Job {
        name: "overlay",
        about: "an overlay begins with the files and zones of the drive below, and never changes it",
        geometry: Geometry::DEMO,
        memory: 1024,
        minutes: 5,
        formats: BOTH,
        play: Play::Back(Way::Overlay, BACK),
    },
];

/// Whether a job is to run. One that is only shown, and takes its time for that, must be asked for by its whole name.
fn is_wanted(name: &str, shows: bool, filter: Option<&str>) -> bool {
    match shows {
        true => filter == Some(name),
        false => filter.is_none_or(|filter| name.contains(filter)),
    }
}

impl Test {
    /// Runs the checks.
    pub fn run(self) -> Result<()> {
        if self.list {
            for (name, arguments) in QUICK {
                say(&format!("{name:16} cargo {}", arguments.join(" ")));
            }
            for job in JOBS {
                let formats: Vec<_> = job.formats.iter().map(|format| format.name()).collect();
                say(&format!("{:16} {} ({})", job.name, job.about, formats.join(", ")));
            }
            for job in NVME_JOBS {
                say(&format!("{:16} {}", job.name, job.about));
            }
            for job in DRIVE_JOBS {
                say(&format!("{:16} {}", job.name, job.about));
            }
            return Ok(());
        }
        let wanted = |name: &str| self.filter.as_deref().is_none_or(|filter| name.contains(filter));
        let mut tally = Tally::default();
        for (name, arguments) in QUICK.iter().filter(|(name, _)| wanted(name)) {
            heading(&format!("{name}: cargo {}", arguments.join(" ")));
            tally.run(name, || cargo(arguments));
        }
        let jobs: Vec<&Job> = JOBS
            .iter()
            .filter(|job| !self.fast && wanted(job.name) && self.can_run(job))
            .collect();
        let on_zbdkit = |name: &str, shows: bool| {
            !self.fast && self.device == Device::Zbdkit && is_wanted(name, shows, self.filter.as_deref())
        };
        let nvme: Vec<&NvmeJob> = NVME_JOBS
            .iter()
            .filter(|job| on_zbdkit(job.name, job.shows))
            .collect();
        if !jobs.is_empty() || !nvme.is_empty() {
            self.run_jobs(&jobs, &nvme, &mut tally)?;
        }
        let drives: Vec<&DriveJob> = DRIVE_JOBS
            .iter()
            .filter(|job| on_zbdkit(job.name, job.shows))
            .collect();
        if !drives.is_empty() {
            heading("Drives of the guest's own kernel");
            let programs = Programs::build(&drives)?;
            let rig = Rig::prepare()?;
            for job in drives {
                heading(&format!("{}: {}", job.name, job.about));
                tally.run(job.name, || job.run(&rig, &programs, self.verbose));
            }
        }
        tally.finish()
    }

    /// Restarts need a drive that outlives the guest.
    fn can_run(&self, job: &Job) -> bool {
        self.device == Device::Zbdkit || matches!(job.play, Play::Script(_))
    }

    fn run_jobs(&self, jobs: &[&Job], nvme: &[&NvmeJob], tally: &mut Tally) -> Result<()> {
        heading("Guests");
        let zbdkit = if self.device == Device::Zbdkit {
            Some(Zbdkit::build()?)
        } else {
            None
        };
        let rig = Rig::prepare()?;
        for job in jobs {
            for (format, name) in self.variants(job) {
                heading(&format!("{name}: {}", job.about));
                tally.run(&name, || self.run_job(&rig, zbdkit.as_ref(), job, format, &name));
            }
        }
        for job in nvme {
            heading(&format!("{}: {}", job.name, job.about));
            tally.run(job.name, || {
                job.run(&rig, zbdkit.as_ref().context("it needs zbdkit")?, self.verbose)
            });
        }
        Ok(())
    }

    /// The formats that a job runs on, and what it is called there: null_blk has none.
    fn variants(&self, job: &Job) -> Vec<(Format, String)> {
        if self.device != Device::Zbdkit {
            return vec![(Format::Raw, job.name.to_owned())];
        }
        let formats = match (self.format, job.play) {
            // Only qcow2 has snapshots.
            (Some(Format::Raw), Play::Back(Way::Snapshot, _)) => Vec::new(),
            (Some(format), _) => vec![format],
            (None, _) => job.formats.to_vec(),
        };
        let named = |format: Format| (format, format!("{}-{}", job.name, format.name()));
        formats.into_iter().map(named).collect()
    }

    fn run_job(
        &self,
        rig: &Rig,
        zbdkit: Option<&Zbdkit>,
        job: &Job,
        format: Format,
        name: &str,
    ) -> Result<()> {
        let Some(zbdkit) = zbdkit else {
            let Play::Script(script) = job.play else {
                bail!("{name} needs zbdkit")
            };
            return self.guest(rig, job, name, script).run()?.check().map(drop);
        };
        let image = rig
            .directory
            .join("images")
            .join(name)
            .with_extension(format.name());
        let on = On {
            rig,
            zbdkit,
            job,
            name,
            image: &image,
        };
        match job.play {
            Play::Script(script) => self.on_drive(&on, script)?,
            Play::Nvme(script) => self.on_nvme(&on, script)?,
            Play::Story => demo::story(rig, zbdkit, &image, name, self.verbose).map(drop)?,
            Play::Kill(first, second) => self.kill(&on, (first, second))?,
            Play::Back(way, scripts) => self.back(&on, way, scripts)?,
        }
        // A failed job's image stays for a look at it.
        remove_image(&image)
    }

    /// One guest on a new drive; the daemon must outlive it and end cleanly.
    fn on_drive(&self, on: &On<'_>, script: &str) -> Result<()> {
        on.zbdkit.create(on.image, &on.job.geometry)?;
        self.boot(on, on.image, "", script, None)?;
        on.zbdkit.check(on.image, false)
    }

    /// One guest on a controller with a new drive and a plain one; the daemon must outlive it and end cleanly.
    fn on_nvme(&self, on: &On<'_>, script: &str) -> Result<()> {
        on.zbdkit.create(on.image, &on.job.geometry)?;
        let plain = on.image.with_file_name(format!("{}-plain.qcow2", on.name));
        on.zbdkit.create_plain(&plain, 256)?;
        let sockets = socket_directory()?;
        let socket = sockets.path().join("n.sock");
        let daemon = on
            .zbdkit
            .serve_nvme(&[on.image, &plain], &socket, &log_of(on.rig, on.name)?)?;
        let mut guest = self.guest(on.rig, on.job, on.name, script);
        guest.qemu_args.extend(daemon.nvme_arguments());
        let result = guest.run()?;
        let stopped = daemon.stop();
        result.check()?;
        stopped?;
        on.zbdkit.check(on.image, false)?;
        on.zbdkit.check(&plain, false)?;
        remove_image(&plain)
    }

    /// Serves `image` to one guest, which may see what an earlier one shared; returns what it shares itself.
    fn boot(
        &self,
        on: &On<'_>,
        image: &Path,
        part: &str,
        script: &str,
        share: Option<&Path>,
    ) -> Result<PathBuf> {
        let sockets = socket_directory()?;
        let socket = sockets.path().join("z.sock");
        let daemon = on.zbdkit.serve(image, &socket, &log_of(on.rig, on.name)?)?;
        let mut guest = self.guest(on.rig, on.job, &format!("{}{part}", on.name), script);
        guest.drives = vec![daemon.drive()];
        guest.share = share.map(Path::to_owned);
        let result = guest.run()?;
        let stopped = daemon.stop();
        let shared = share.map_or_else(|| result.logs.join("share"), Path::to_owned);
        result.check()?;
        stopped?;
        Ok(shared)
    }

    /// The daemon dies while a guest writes; the guest is cut off too; another one checks the drive.
    fn kill(&self, on: &On<'_>, scripts: (&str, &str)) -> Result<()> {
        let sockets = socket_directory()?;
        let (socket, log) = (sockets.path().join("z.sock"), log_of(on.rig, on.name)?);
        on.zbdkit.create(on.image, &on.job.geometry)?;
        let daemon = on.zbdkit.serve(on.image, &socket, &log)?;
        let mut first = self.guest(on.rig, on.job, &format!("{}-first", on.name), scripts.0);
        first.drives = vec![daemon.drive()];
        let running = first.start()?;
        running
            .wait_for_output("acknowledged 300 blocks")
            .context("the writers did not get going")?;
        daemon.kill()?;
        let cut = running.kill()?;
        on.zbdkit.check(on.image, true)?;
        let share = cut.logs.join("share");
        self.boot(on, on.image, "-second", scripts.1, Some(&share))?;
        on.zbdkit.check(on.image, true)
    }

    /// A guest makes something, another one changes it, a third one finds it as it was.
    fn back(&self, on: &On<'_>, way: Way, scripts: [&str; 3]) -> Result<()> {
        on.zbdkit.create(on.image, &on.job.geometry)?;
        let share = self.boot(on, on.image, "-first", scripts[0], None)?;
        let overlay = on.image.with_file_name(format!("{}-over.qcow2", on.name));
        let changed = match way {
            Way::Snapshot => {
                on.zbdkit.snapshot(on.image, "-c", "before")?;
                on.image
            }
            Way::Overlay => {
                on.zbdkit.create_over(&overlay, on.image)?;
                &overlay
            }
        };
        self.boot(on, changed, "-second", scripts[1], Some(&share))?;
        on.zbdkit.check(changed, false)?;
        if way == Way::Snapshot {
            on.zbdkit.snapshot(on.image, "-a", "before")?;
            on.zbdkit.check(on.image, false)?;
        }
        self.boot(on, on.image, "-third", scripts[2], Some(&share))?;
        if way == Way::Snapshot {
            on.zbdkit.snapshot(on.image, "-d", "before")?;
        }
        on.zbdkit.check(on.image, false)?;
        remove_image(&overlay)
    }

    fn guest<'rig>(&self, rig: &'rig Rig, job: &Job, name: &str, script: &str) -> Guest<'rig> {
        let mut guest = Guest::new(rig, name, script);
        guest.memory = job.memory;
        guest.timeout = Duration::from_secs(job.minutes * 60);
        guest.stream = self.verbose;
        job.geometry.give_to(guest, self.device)
    }
}

/// What a job runs on.
struct On<'a> {
    rig: &'a Rig,
    zbdkit: &'a Zbdkit,
    job: &'a Job,
    /// The job's name with the format's.
    name: &'a str,
    image: &'a Path,
}

/// What needs no guest.
const QUICK: &[(&str, &[&str])] = &[
    ("fmt", &["fmt", "--all", "--check"]),
    (
        "clippy",
        &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"],
    ),
    ("unit", &["test", "--workspace"]),
    (
        "races",
        &[
            "test",
            "--package",
            "zbdkit-zone",
            "--features",
            "shuttle",
            "--test",
            "races",
        ],
    ),
];

fn cargo(arguments: &[&str]) -> Result<()> {
    let mut command: Command = proc::command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(crate::workspace());
    match Running::start(&mut command, "cargo")?.wait_for(CARGO_LIMIT)? {
        Some(status) if status.success() => Ok(()),
        Some(status) => bail!("cargo {} failed ({status})", arguments.join(" ")),
        None => bail!("cargo {} did not end in time", arguments.join(" ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn benchmarks_run_only_by_their_whole_names() {
        let wanted = |filter| -> Vec<&str> {
            let drives = DRIVE_JOBS.iter().map(|job| (job.name, job.shows));
            let nvme = NVME_JOBS.iter().map(|job| (job.name, job.shows));
            let jobs = drives.chain(nvme).filter(|job| is_wanted(job.0, job.1, filter));
            jobs.map(|job| job.0).collect()
        };
        assert_eq!(wanted(Some("host-nvme")), ["host-nvme"]);
        assert_eq!(wanted(Some("host-nvme-bench")), ["host-nvme-bench"]);
        assert_eq!(wanted(Some("nvme-bench")), ["nvme-bench"]);
        assert!(wanted(None).contains(&"host-nvme") && !wanted(None).contains(&"host-nvme-bench"));
    }

    #[test]
    fn job_names_are_unique_and_every_geometry_is_whole() {
        for (number, job) in JOBS.iter().enumerate() {
            assert!(
                JOBS[..number].iter().all(|other| other.name != job.name),
                "{}",
                job.name
            );
            assert_eq!(job.geometry.size % job.geometry.zone_size, 0, "{}", job.name);
            assert!(job.geometry.max_open <= job.geometry.max_active, "{}", job.name);
        }
    }
}
