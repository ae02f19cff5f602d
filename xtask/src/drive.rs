//! The drive under test: zbdkit's image and daemon, or the guest's own null_blk as the reference.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use rustix::process::Signal;

use crate::guest::{Guest, VhostUserDrive};
use crate::proc::{self, Running};

/// Commands of `zbdkit` that do not stay.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// How long the daemon may take to be ready, or to end once it is asked to.
const DAEMON_LIMIT: Duration = Duration::from_secs(30);
/// The queues that guests use. More than one, so that requests really meet.
pub const QUEUES: u32 = 2;

/// What a drive is run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// zbdkit, through vhost-user
    Zbdkit,
    /// The guest kernel's null_blk with the same geometry, as the reference
    #[value(name = "null_blk")]
    NullBlk,
}

impl Device {
    /// Its name as the user writes it.
    pub fn name(self) -> &'static str {
        match self {
            Device::Zbdkit => "zbdkit",
            Device::NullBlk => "null_blk",
        }
    }
}

/// An image format of zbdkit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The data alone, with the zones in a table beside it
    Raw,
    /// One file with data and zones
    Qcow2,
}

impl Format {
    /// Its name as the user writes it, and the end of its images' names, by which zbdkit chooses it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }

    /// The format that the name of an image chooses.
    pub fn of(image: &Path) -> Format {
        match image.extension() {
            Some(extension) if extension == "qcow2" => Format::Qcow2,
            _ => Format::Raw,
        }
    }
}

/// The geometry of a drive. Sizes in MiB; a limit of 0 is none.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// The whole drive.
    pub size: u32,
    /// Each zone.
    pub zone_size: u32,
    /// How many of the first zones are conventional.
    pub conventional: u32,
    /// How many zones may be open.
    pub max_open: u32,
    /// How many zones may be active.
    pub max_active: u32,
    /// The logical block size in bytes.
    pub block_size: u32,
}

impl Geometry {
    /// The drive of the demonstration.
    pub const DEMO: Geometry = Geometry {
        size: 768,
        zone_size: 64,
        conventional: 0,
        max_open: 6,
        max_active: 8,
        block_size: 4096,
    };

    /// The arguments of `zbdkit create` for this geometry.
    pub fn create_arguments(&self) -> Vec<String> {
        let mut arguments = vec!["--size".into(), format!("{}M", self.size)];
        arguments.extend(["--zone-size".into(), format!("{}M", self.zone_size)]);
        let mut option = |name: &str, value: u32, default: u32| {
            if value != default {
                arguments.extend([name.to_owned(), value.to_string()]);
            }
        };
        option("--max-open", self.max_open, 0);
        option("--max-active", self.max_active, 0);
        option("--conventional", self.conventional, 0);
        option("--block-size", self.block_size, 4096);
        arguments
    }

    /// Adds what a script needs to know: the variables, and for null_blk the device itself.
    pub fn give_to<'rig>(&self, mut guest: Guest<'rig>, device: Device) -> Guest<'rig> {
        if device == Device::NullBlk {
            guest.script = format!("make_null_blk\n{}", guest.script);
            guest.memory += self.size;
        }
        let device = if device == Device::NullBlk {
            "/dev/nullb0"
        } else {
            "/dev/vda"
        };
        self.describe(guest.variable("DEV", device))
    }

    /// Adds the variables about the geometry.
    pub fn describe<'rig>(&self, guest: Guest<'rig>) -> Guest<'rig> {
        guest
            .variable("SIZE_MB", self.size)
            .variable("ZONE_MB", self.zone_size)
            .variable("CONVENTIONAL", self.conventional)
            .variable("MAX_OPEN", self.max_open)
            .variable("MAX_ACTIVE", self.max_active)
            // Not BLOCK_SIZE, which coreutils obey.
            .variable("SECTOR_BYTES", self.block_size)
    }
}

/// The program `zbdkit`.
#[derive(Debug)]
pub struct Zbdkit {
    program: PathBuf,
}

impl Zbdkit {
    /// Builds the release program; `$ZBDKIT` names one to use instead.
    pub fn build() -> Result<Zbdkit> {
        if let Some(program) = std::env::var_os("ZBDKIT") {
            return Ok(Zbdkit {
                program: program.into(),
            });
        }
        let mut cargo = proc::command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo
            .args(["build", "--release", "--package", "zbdkit"])
            .current_dir(crate::workspace());
        let status = Running::start(&mut cargo, "cargo build")?.wait_for(Duration::from_secs(3600))?;
        ensure!(
            status.is_some_and(|status| status.success()),
            "cargo build --release -p zbdkit failed"
        );
        Ok(Zbdkit {
            program: crate::target_directory().join("release/zbdkit"),
        })
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// A command of it.
    pub fn command(&self) -> Command {
        proc::command(&self.program)
    }

    /// Makes a new image, in place of an old one; returns what zbdkit said.
    pub fn create(&self, image: &Path, geometry: &Geometry) -> Result<String> {
        remove_image(image)?;
        let mut create = self.command();
        create.arg("create").arg(image).args(geometry.create_arguments());
        let said = proc::capture(&mut create, "zbdkit create", COMMAND_LIMIT)?;
        Ok(String::from_utf8_lossy(&said).into_owned())
    }

    /// Makes a new image with these arguments, in place of an old one.
    pub fn create_with(&self, image: &Path, arguments: &[&str]) -> Result<()> {
        remove_image(image)?;
        let mut create = self.command();
        create.arg("create").arg(image).args(arguments);
        proc::capture(&mut create, "zbdkit create", COMMAND_LIMIT).map(drop)
    }

    /// Sets a zone's condition, as the operator of a drive that nobody uses.
    pub fn set_zone(&self, image: &Path, zone: u32, state: &str) -> Result<()> {
        let mut set = self.command();
        set.arg("set-zone").arg(image).arg(state);
        set.args(["--zone", &zone.to_string()]);
        proc::capture(&mut set, "zbdkit set-zone", COMMAND_LIMIT).map(drop)
    }

    /// Makes a new image without zones, of `size` MiB, in place of an old one.
    pub fn create_plain(&self, image: &Path, size: u32) -> Result<()> {
        remove_image(image)?;
        let mut create = self.command();
        create
            .args(["create", "-f", "qcow2"])
            .arg(image)
            .arg(format!("{size}M"));
        proc::capture(&mut create, "zbdkit create", COMMAND_LIMIT).map(drop)
    }

    /// Makes an empty overlay over `base`, with its zones, in place of an old one; returns what zbdkit said.
    pub fn create_over(&self, overlay: &Path, base: &Path) -> Result<String> {
        remove_image(overlay)?;
        let mut create = self.command();
        create
            .arg("create")
            .arg(overlay)
            .arg("-b")
            .arg(base)
            .args(["-F", Format::of(base).name()]);
        let said = proc::capture(&mut create, "zbdkit create -b", COMMAND_LIMIT)?;
        Ok(String::from_utf8_lossy(&said).into_owned())
    }

    /// Does `what` (`-c`, `-a` or `-d`) with the snapshot `name` of an image that nobody uses.
    pub fn snapshot(&self, image: &Path, what: &str, name: &str) -> Result<()> {
        let mut snapshot = self.command();
        snapshot.args(["snapshot", what, name]).arg(image);
        let said = format!("zbdkit snapshot {what} {name}");
        proc::capture(&mut snapshot, &said, COMMAND_LIMIT).map(drop)
    }

    /// Checks the inside of an image that nobody uses: nothing may be corrupt, and space may be lost only after a kill.
    pub fn check(&self, image: &Path, killed: bool) -> Result<()> {
        if Format::of(image) == Format::Raw {
            return Ok(());
        }
        let mut check = self.command();
        check.arg("check").arg(image).stdin(Stdio::null());
        let output = check.output().context("cannot start zbdkit check")?;
        // As qemu-img's: 3 says that clusters are lost and nothing worse.
        let code = output.status.code();
        ensure!(
            code == Some(0) || killed && code == Some(3),
            "zbdkit check ended with {}:\n{}{}",
            output.status,
            proc::indent(&String::from_utf8_lossy(&output.stdout)),
            proc::indent(&String::from_utf8_lossy(&output.stderr))
        );
        Ok(())
    }

    /// Serves `image` at `socket` and returns once the daemon says that it is ready. What it prints goes to `log` as well.
    pub fn serve(&self, image: &Path, socket: &Path, log: &Path) -> Result<Daemon> {
        let mut serve = self.command();
        serve
            .arg("serve")
            .arg(image)
            .arg("--vhost-user-blk")
            .arg(socket)
            .args(["--queues", &QUEUES.to_string()]);
        Zbdkit::start(serve, socket, log)
    }

    /// Serves `images` as the namespaces of an NVMe controller, as [`serve`](Self::serve) does.
    pub fn serve_nvme(&self, images: &[&Path], socket: &Path, log: &Path) -> Result<Daemon> {
        self.serve_nvme_with(&[], images, socket, log)
    }

    /// The same with more options.
    pub fn serve_nvme_with(
        &self,
        options: &[&str],
        images: &[&Path],
        socket: &Path,
        log: &Path,
    ) -> Result<Daemon> {
        let mut serve = self.command();
        serve.arg("serve").args(options).arg("--nvme").arg(socket);
        for image in images {
            serve.arg("--namespace").arg(image);
        }
        Zbdkit::start(serve, socket, log)
    }

    fn start(mut serve: Command, socket: &Path, log: &Path) -> Result<Daemon> {
        let mut keep = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        serve
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(keep.try_clone()?);
        let mut running = Running::start(&mut serve, "zbdkit serve")?;
        let lines = BufReader::new(running.child().stdout.take().context("zbdkit has no output")?).lines();
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            // Reads on after the receiver is gone, so that the daemon never meets a full pipe.
            for line in lines.map_while(Result::ok) {
                let _ = writeln!(keep, "{line}");
                let _ = tell.send(line);
            }
        });
        let daemon = Daemon {
            running,
            socket: socket.to_owned(),
            log: log.to_owned(),
        };
        let deadline = std::time::Instant::now() + DAEMON_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            match told.recv_timeout(left) {
                Ok(line) if line.contains("ready") => return Ok(daemon),
                Ok(_) => {}
                Err(error) => {
                    let what = match error {
                        mpsc::RecvTimeoutError::Timeout => "did not say that it is ready",
                        mpsc::RecvTimeoutError::Disconnected => "ended before it was ready",
                    };
                    bail!("zbdkit serve {what}:\n{}", daemon.said());
                }
            }
        }
    }
}

/// Removes an image and what lies beside it under names that begin with the image's.
pub fn remove_image(image: &Path) -> Result<()> {
    let directory = image.parent().context("an image without a directory")?;
    let name = image
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    std::fs::create_dir_all(directory)?;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let beside = entry
            .file_name()
            .to_string_lossy()
            .trim_start_matches('.')
            .starts_with(&name);
        if beside && entry.file_type()?.is_file() {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// A running `zbdkit serve`. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    running: Running,
    socket: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// The drive for a guest.
    pub fn drive(&self) -> VhostUserDrive {
        VhostUserDrive {
            socket: self.socket.clone(),
            queues: QUEUES,
        }
    }

    /// QEMU's arguments for the NVMe controller that the daemon serves.
    pub fn nvme_arguments(&self) -> [String; 2] {
        let socket = self.socket.display();
        let device = format!(r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{socket}"}}}}"#);
        ["-device".to_owned(), device]
    }

    /// Asks the daemon to end; fails unless it does so in time and with status 0.
    pub fn stop(mut self) -> Result<()> {
        if let Some(status) = self.running.try_wait()? {
            bail!("zbdkit serve had ended already ({status}):\n{}", self.said());
        }
        self.running.signal(Signal::TERM)?;
        match self.running.wait_for(DAEMON_LIMIT)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("zbdkit serve ended with {status} on SIGTERM:\n{}", self.said()),
            None => bail!(
                "zbdkit serve did not end within {} s of SIGTERM:\n{}",
                DAEMON_LIMIT.as_secs(),
                self.said()
            ),
        }
    }

    /// Kills the daemon as `kill -9` does.
    pub fn kill(mut self) -> Result<()> {
        if let Some(status) = self.running.try_wait()? {
            bail!("zbdkit serve had ended already ({status}):\n{}", self.said());
        }
        self.running.signal(Signal::KILL)?;
        self.running
            .wait_for(DAEMON_LIMIT)?
            .context("zbdkit serve survived SIGKILL")?;
        Ok(())
    }

    fn said(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        format!(
            "{}  log: {}",
            proc::indent(&proc::tail(&log, 15)),
            self.log.display()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_drive_is_created_with_the_documented_command() {
        let words = Geometry::DEMO.create_arguments().join(" ");
        assert_eq!(words, "--size 768M --zone-size 64M --max-open 6 --max-active 8");
    }

    #[test]
    fn the_name_of_an_image_chooses_its_format() {
        for format in [Format::Raw, Format::Qcow2] {
            assert_eq!(
                Format::of(&Path::new("a.b").with_extension(format.name())),
                format
            );
        }
        assert_eq!(Format::of(Path::new("disk.img")), Format::Raw);
    }

    #[test]
    fn an_image_goes_with_its_companions_and_no_other() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a.raw", "a.raw.zones", ".a.raw.run", "b.raw", "aa.raw"] {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        remove_image(&directory.path().join("a.raw")).unwrap();
        let mut left: Vec<_> = std::fs::read_dir(directory.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["aa.raw", "b.raw"]);
    }
}
