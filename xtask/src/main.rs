//! `cargo xtask`: the project's own tools: the demonstration, the tests, the guests that they run in.

mod bench;
mod demo;
mod diff;
mod drive;
mod drives;
mod guest;
mod jobs;
mod nvme;
mod proc;
mod qmp;
mod rig;
mod suite;
mod tally;
mod ui;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::guest::{Guest, VhostUserDrive};
use crate::rig::Rig;

const AFTER_HELP: &str = "\
Start with `cargo xtask demo`: it makes a zoned drive, boots Linux on it, puts btrfs on it, restarts
everything and finds its file again.

The first command that needs a guest gets QEMU, a Linux kernel and the guest's tools as Debian
packages (some 330 MB) and keeps them unpacked below target/rig; nothing is installed and nothing
needs root. A QEMU >= 10.2 in PATH is used instead. Guests run under KVM where it works, else they are
emulated, which takes about 4 seconds for a boot.

Environment:
  ZBDKIT_RIG_DIR       where the rig is kept, instead of target/rig
  ZBDKIT_QEMU          a qemu-system-x86_64 to use
  ZBDKIT_KERNEL, ZBDKIT_MODULES   a kernel image and its /lib/modules/RELEASE to boot
  ZBDKIT_GUEST_TREE    an unpacked Linux with the guest's tools
  ZBDKIT_ACCEL         kvm or tcg, instead of trying
  ZBDKIT               a zbdkit program to test, instead of building one
  ZBDKIT_PROGRAMS      a directory with zbdkit and zbdkit-drive for the jobs on the guest's own drives
  ZBDKIT_FIO_SOURCE, ZBDKIT_ZONEFS_TOOLS_SOURCE   sources of the suites, instead of Debian's

Logs of each guest: target/rig/logs/NAME/ (console.log, output.log, qemu.log, command).";

/// The project's own tools: the demonstration, the tests, and the virtual machines that they run in
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", after_help = AFTER_HELP)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Plays the story: a zoned drive in a virtual machine, restarted, nothing lost
    Demo(demo::Demo),
    /// Runs every check and test; --fast leaves out those that need a guest
    Test(jobs::Test),
    /// Boots a guest and gives you a shell in it, or runs a script
    Guest(GuestOptions),
    /// Runs another project's suite on zbdkit and on the kernel's null_blk, and compares
    Suite(suite::Suite),
    /// Measures against qemu-storage-daemon and bare io_uring, in pairs
    Bench(bench::HandedOn),
    /// Kills the daemon in mid-traffic, again and again, and checks what it promised
    Kill(bench::HandedOn),
    /// Judges many states that a kill or a power cut could have left
    Crash(bench::Crash),
    /// Changes qcow2 images by turns with QEMU, and compares what both find in them
    Diff(bench::HandedOn),
}

#[derive(Debug, Args)]
struct GuestOptions {
    /// Runs this bash script in the guest instead of giving a shell
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// Attaches the drive that is served at this socket, as /dev/vda
    #[arg(long, value_name = "SOCKET")]
    vhost_user_blk: Vec<PathBuf>,
    /// How many queues the drives have
    #[arg(long, value_name = "COUNT", default_value_t = drive::QUEUES)]
    queues: u32,
    /// Memory in MiB
    #[arg(long, default_value_t = 1024)]
    memory: u32,
    /// A directory that the guest sees as /share
    #[arg(long, value_name = "DIRECTORY")]
    share: Option<PathBuf>,
    /// How many seconds a script may take
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// More arguments for QEMU
    #[arg(last = true)]
    qemu: Vec<String>,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    match arguments.command {
        Some(Verb::Demo(demo)) => demo.run(),
        Some(Verb::Test(test)) => test.run(),
        Some(Verb::Guest(options)) => run_guest(options),
        Some(Verb::Suite(suite)) => suite.run(),
        Some(Verb::Bench(options)) => bench::bench(&options),
        Some(Verb::Kill(options)) => bench::kill(&options),
        Some(Verb::Crash(options)) => bench::crash(&options),
        Some(Verb::Diff(options)) => diff::run(&options),
        None => Ok(Arguments::command().print_help()?),
    }
}

fn run_guest(options: GuestOptions) -> Result<()> {
    let script = options.script.as_ref().map(|path| {
        std::fs::read_to_string(path).with_context(|| format!("cannot read the script {}", path.display()))
    });
    let rig = Rig::prepare()?;
    let mut guest = Guest::new(&rig, "guest", script.transpose()?.as_deref().unwrap_or_default());
    let drive = |socket| VhostUserDrive {
        socket,
        queues: options.queues,
    };
    guest.drives = options.vhost_user_blk.into_iter().map(drive).collect();
    guest.memory = options.memory;
    guest.share = options.share;
    guest.timeout = Duration::from_secs(options.timeout);
    guest.qemu_args = options.qemu;
    guest.stream = true;
    let guest = guest.variable("DEV", "/dev/vda");
    if options.script.is_some() {
        guest.run()?.check().map(drop)
    } else {
        guest.interactive()
    }
}

/// The workspace's root.
pub fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(PathBuf::from)
        .unwrap_or_default()
}

/// Cargo's target directory.
pub fn target_directory() -> PathBuf {
    let directory =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from);
    std::path::absolute(&directory).unwrap_or(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }
}
