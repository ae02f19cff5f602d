//! `cargo xtask demo`: a zoned drive in a real virtual machine, from nothing to a file that survives restarts.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use clap::Args;
use tempfile::TempDir;

use crate::drive::{Device, Format, Geometry, QUEUES, Zbdkit};
use crate::guest::{Guest, GuestResult};
use crate::rig::{Rig, accel::Accel};
use crate::ui::{heading, say};

const FIRST: &str = include_str!("../guest/demo-first.sh");
const SECOND: &str = include_str!("../guest/demo-second.sh");

/// What the user asks for.
#[derive(Debug, Args)]
pub struct Demo {
    /// Leaves you in the guest with the drive instead of playing the story
    #[arg(long)]
    shell: bool,
    /// The image's format
    #[arg(long, value_enum, default_value = "qcow2")]
    format: Format,
}

impl Demo {
    /// Plays it.
    pub fn run(self) -> Result<()> {
        heading("Getting ready");
        let zbdkit = Zbdkit::build()?;
        let rig = Rig::prepare()?;
        let image = rig
            .directory
            .join("images/demo")
            .with_extension(self.format.name());
        if self.shell {
            shell(&rig, &zbdkit, &image)
        } else {
            story(&rig, &zbdkit, &image, "demo", true).map(drop)
        }
    }
}

/// A directory for sockets, whose names must be short.
pub fn socket_directory() -> Result<TempDir> {
    Ok(tempfile::Builder::new().prefix("zbdkit-").tempdir_in("/tmp")?)
}

/// Plays the story on a new drive at `image`, checking each step; `stream` shows the guest's output as it comes.
/// Returns what the second guest left.
pub fn story(rig: &Rig, zbdkit: &Zbdkit, image: &Path, name: &str, stream: bool) -> Result<GuestResult> {
    let sockets = socket_directory()?;
    let socket = sockets.path().join("z.sock");
    let log = log_of(rig, name)?;
    let tell = |text: &str| {
        if stream {
            heading(text)
        }
    };
    // New in each run, so that finding it again means something.
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
    let hello = format!("Hello from a zoned drive, written at {now}");

    tell("A new drive: 768 MiB in 12 zones of 64 MiB, at most 6 open and 8 active");
    show(
        stream,
        &format!(
            "zbdkit create {} {}",
            file_name(image),
            Geometry::DEMO.create_arguments().join(" ")
        ),
    );
    let said = zbdkit.create(image, &Geometry::DEMO)?;
    if stream {
        say(said.trim_end());
    }

    tell("The daemon serves it, over vhost-user");
    show(
        stream,
        &format!(
            "zbdkit serve {} --vhost-user-blk {} --queues {QUEUES}",
            file_name(image),
            socket.display()
        ),
    );
    let daemon = zbdkit.serve(image, &socket, &log)?;

    tell(if rig.accel == Accel::Kvm {
        "A virtual machine boots, with the drive"
    } else {
        "A virtual machine boots, with the drive (emulated: some seconds)"
    });
    let guest = |part: &str, script: &str| {
        let mut guest = Guest::new(rig, &format!("{name}-{part}"), script).variable("HELLO", &hello);
        guest.drives = vec![daemon.drive()];
        guest.stream = stream;
        guest.timeout = Duration::from_secs(300);
        Geometry::DEMO.give_to(guest, Device::Zbdkit)
    };
    let (first, second) = (guest("first", FIRST), guest("second", SECOND));
    first.run()?.check()?;

    tell("The machine is off; the daemon is stopped, and started again");
    show(stream, "kill -TERM $(pidof zbdkit)");
    daemon.stop()?;
    show(
        stream,
        &format!(
            "zbdkit serve {} --vhost-user-blk {} --queues {QUEUES}",
            file_name(image),
            socket.display()
        ),
    );
    let daemon = zbdkit.serve(image, &socket, &log)?;

    tell("A new machine boots, with the same drive");
    let result = second.run()?.check()?;
    ensure!(result.output.contains(&hello), "the file's content was not shown");
    daemon.stop()?;
    if Format::of(image) == Format::Qcow2 {
        tell("The image is whole: data, zones and the space that they take");
        show(stream, &format!("zbdkit check {}", file_name(image)));
        zbdkit.check(image, false)?;
    }
    tell("Done: the file was there, the file system is clean, and each step was checked");
    Ok(result)
}

fn shell(rig: &Rig, zbdkit: &Zbdkit, image: &Path) -> Result<()> {
    let sockets = socket_directory()?;
    let socket = sockets.path().join("z.sock");
    zbdkit.create(image, &Geometry::DEMO)?;
    let daemon = zbdkit.serve(image, &socket, &log_of(rig, "demo-shell")?)?;
    heading("A guest with the zoned drive /dev/vda");
    say(
        "Try `lsblk -z`, `blkzone report /dev/vda`, `mkfs.btrfs -O zoned -d single -m single /dev/vda`, fio, ...",
    );
    say("`exit` ends the machine.");
    let mut guest = Guest::new(rig, "demo-shell", "");
    guest.drives = vec![daemon.drive()];
    Geometry::DEMO.give_to(guest, Device::Zbdkit).interactive()?;
    daemon.stop()?;
    say(&format!("The image is {}", image.display()));
    Ok(())
}

/// A new, empty log for a daemon.
pub fn log_of(rig: &Rig, name: &str) -> Result<PathBuf> {
    let directory = rig.directory.join("logs");
    std::fs::create_dir_all(&directory)?;
    let log = directory.join(format!("{name}-zbdkit.log"));
    std::fs::write(&log, "")?;
    Ok(log)
}

fn show(stream: bool, command: &str) {
    if stream {
        say(&format!("host$ {command}"));
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}
