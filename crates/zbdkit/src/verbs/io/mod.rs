//! `zbdkit io`: qemu-io's commands, with its spelling, its output and its exit status.
//!
//! What follows qemu-io is its interface (names, options, messages, which stream they go to). Where an operation fails,
//! the reason that qemu-io does not tell goes to stderr besides.

mod aio;
mod command;
mod number;
mod options;
mod stats;
mod transfer;
mod zns;
mod zone;

use std::io::BufRead;
use std::process::ExitCode;
use std::rc::Rc;

use anyhow::Context;
use clap::{Args, ValueEnum};
use zbdkit_block::{Device, Error, Lane, OpenOptions};

use crate::image::{ImageArgs, Session};
use crate::output::{Out, complain};
use aio::InFlight;

/// Exercise an image with qemu-io's commands: zrp zo zc zf zrs zap, read, write, ...; and wu zcm zse zge for what only NVMe has
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Io {
    #[command(flatten)]
    pub image: ImageArgs,

    /// Run a command; may be given several times. Without any, commands are read from stdin
    #[arg(short, long = "cmd", value_name = "COMMAND")]
    pub cmd: Vec<String>,

    /// Open read-only
    #[arg(short, long)]
    pub read_only: bool,

    /// Bypass the host's page cache (cache.direct=on): short for -t none. Zoned block devices need it
    #[arg(short, long, overrides_with = "cache")]
    pub nocache: bool,

    /// Cache mode, of which the last given counts
    #[arg(
        short = 't',
        long,
        value_name = "MODE",
        default_value = "writeback",
        overrides_with = "nocache"
    )]
    pub cache: CacheMode,

    /// Accepted because qemu-io has it, and without effect: ZBDKIT_IO chooses how I/O is done
    #[arg(short = 'i', long, value_name = "MODE")]
    pub aio: Option<AioMode>,

    /// Look even while another process writes the image; needs -r
    #[arg(short = 'U', long, requires = "read_only")]
    pub force_share: bool,

    /// Format of the image: raw or qcow2. A raw file without a zone table is then opened as a disk without zones
    #[arg(short, long, value_name = "FORMAT", conflicts_with = "image_opts")]
    pub format: Option<String>,
}

/// qemu-io's cache modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CacheMode {
    /// Past the page cache
    None,
    /// Through the page cache
    Writeback,
    /// Through the page cache, with a flush after each write
    Writethrough,
    /// Past the page cache, with a flush after each write
    Directsync,
    /// The same as writeback: a flush is never left out
    Unsafe,
}

impl CacheMode {
    fn is_direct(self) -> bool {
        matches!(self, CacheMode::None | CacheMode::Directsync)
    }

    /// Whether a write is done only once it is flushed.
    fn flushes(self) -> bool {
        matches!(self, CacheMode::Writethrough | CacheMode::Directsync)
    }
}

/// qemu-io's ways of asynchronous I/O.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum AioMode {
    Threads,
    Native,
    #[value(name = "io_uring")]
    IoUring,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit io disk.raw -c 'zrp 0 12'
  zbdkit io disk.raw -c 'zap -p 0 0x1000 0x2000' -c 'read -P 0xcd 0 12k'
  zbdkit io -r disk.raw -c 'read -v 0 512'
  zbdkit io --image-opts driver=memory,size=1G -c 'write 0 64k'
  zbdkit io -n --image-opts driver=host_device,filename=/dev/nullb0 -c 'zrp 0 3'
  zbdkit io /dev/ng0n1 -c 'zo -r 0 64M' -c 'write 4k 4k' -c 'write 0 4k' -c 'zcm 8k'
  echo help | zbdkit io disk.raw

Commands:
  zone_report (zrp) OFFSET NUMBER     report zones, in 512-byte sectors
  zone_open (zo) OFFSET LEN           open, close, finish or reset
  zone_close (zc) OFFSET LEN          the zones of a range; resetting
  zone_finish (zf) OFFSET LEN         the whole device is one operation
  zone_reset (zrs) OFFSET LEN
  zone_append (zap) [-p] OFFSET LEN.. append to the zone at OFFSET, -p shows where it went
  zone_open -r (zo -r) OFFSET LEN     open with a random write area (NVMe's ZRWA),
  zone_commit (zcm) END               and move the write pointer over what is in it
  zone_set_ext (zse) [-f FILE | -P PATTERN] START   attach a descriptor extension,
  zone_get_ext (zge) [-f FILE] START                and show it or write it to a file
  write_uncor (wu) OFFSET LEN         make reads fail until the range is written again
  read write readv writev discard flush aio_read aio_write aio_flush length info sleep help quit
  'help COMMAND' explains one. Numbers are bytes, with k, M, G, T, P, E, or 0x...

Exit status:
  0  it worked
  1  the image could not be opened, or a command failed (an aio_ command: when its result is reported)
  2  the command line is wrong";

/// What the commands work on.
pub struct Shell {
    device: Device,
    lane: Rc<Lane>,
    in_flight: InFlight,
    /// Every write is flushed before it is done.
    write_through: bool,
    out: Out,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Done,
    Failed,
    Quit,
}

/// Writes in flight at most; more wait.
const DEPTH: u32 = 128;

pub fn run(args: &Io) -> anyhow::Result<ExitCode> {
    let graph = args.image.graph_as(args.format.as_deref())?;
    let options = OpenOptions {
        read_only: args.read_only,
        force_share: args.force_share,
        direct: args.nocache || args.cache.is_direct(),
        ..OpenOptions::default()
    };
    let session = Session::new()?;
    let ok = session.with(&graph, &options, async |device| {
        let mut shell = Shell {
            device: device.clone(),
            lane: Rc::new(device.lane(DEPTH)),
            in_flight: InFlight::default(),
            write_through: args.cache.flushes(),
            out: Out::new(),
        };
        let commanded = shell.commands(&args.cmd).await;
        // Also where nobody reads the results any more: the image is closed next.
        let drained = shell.aio_flush().await;
        let ok = commanded? & (drained? == Step::Done);
        shell.out.flush()?;
        Ok(ok)
    })?;
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Shell {
    /// Runs the given commands, or those of stdin; `false` if one of them failed.
    async fn commands(&mut self, given: &[String]) -> anyhow::Result<bool> {
        let mut ok = true;
        for line in given {
            match self.command(line).await? {
                Step::Done => {}
                Step::Failed => ok = false,
                Step::Quit => return Ok(ok),
            }
        }
        if given.is_empty() {
            ok = self.interact().await?;
        }
        Ok(ok)
    }

    async fn interact(&mut self) -> anyhow::Result<bool> {
        let mut ok = true;
        let mut stdin = std::io::stdin().lock();
        loop {
            self.out.text("qemu-io> ")?;
            self.out.flush()?;
            // What was submitted goes on while the user thinks.
            zbdkit_io::submit();
            let mut line = Vec::new();
            if stdin.read_until(b'\n', &mut line).context("reading stdin")? == 0 {
                return Ok(ok);
            }
            match self.command(&String::from_utf8_lossy(&line)).await? {
                Step::Done => {}
                Step::Failed => ok = false,
                Step::Quit => return Ok(ok),
            }
        }
    }

    /// Reports the failure of `what` as qemu-io does, and the reason on stderr.
    fn failed(&mut self, what: &str, error: &Error) -> anyhow::Result<Step> {
        self.failed_as(what, error, error.errno())
    }

    fn failed_as(&mut self, what: &str, reason: &dyn std::fmt::Display, errno: i32) -> anyhow::Result<Step> {
        self.out
            .line(format_args!("{what} failed: {}", strerror(errno)))?;
        self.out.flush()?;
        complain(format_args!("{what}: {reason}"));
        Ok(Step::Failed)
    }

    /// A message that qemu-io prints on stdout.
    fn wrong(&mut self, message: impl std::fmt::Display) -> anyhow::Result<Step> {
        self.out.line(message)?;
        Ok(Step::Failed)
    }
}

/// What C's strerror says.
fn strerror(errno: i32) -> String {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    let end = text.find(" (os error").unwrap_or(text.len());
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_read_as_in_c() {
        assert_eq!(strerror(5), "Input/output error");
        assert_eq!(strerror(95), "Operation not supported");
    }
}
