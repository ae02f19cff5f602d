//! `zbdkit reset`, `open`, `close` and `finish`: one operation on a range of zones.

use clap::Args;
use zbdkit_block::{Device, Lane, ZoneOp};
use zbdkit_zone::{CloseEmpty, Geometry, ZoneNo};

use crate::args;
use crate::image::{ImageArgs, Session, changing, zones_of};
use crate::output::{Out, Usage, complain};

/// Which zones of which image; the verb says what is done to them.
#[derive(Debug, Args)]
pub struct Zones {
    #[command(flatten)]
    pub image: ImageArgs,

    /// The first byte of the first zone
    #[arg(value_name = "OFFSET", value_parser = args::bytes)]
    pub offset: Option<u64>,

    /// The first zone by its number, from 0
    #[arg(long, value_name = "N", value_parser = args::count, conflicts_with_all = ["offset", "all"])]
    pub zone: Option<u32>,

    /// How many zones, from the first one on
    #[arg(short, long, value_name = "N", value_parser = args::count, default_value = "1", conflicts_with = "all")]
    pub count: u32,

    /// All sequential zones
    #[arg(long, conflicts_with = "offset")]
    pub all: bool,

    /// Print nothing
    #[arg(short, long)]
    pub quiet: bool,
}

pub const RESET_HELP: &str = "\
Examples:
  zbdkit reset disk.raw --zone 3
  zbdkit reset disk.raw 64M --count 2
  zbdkit reset disk.raw --all

What was in the zones is gone, and its space is given back. With --all, zones that are read-only or offline are passed \
over. The reset is durable when the command returns.";

pub const OPEN_HELP: &str = "\
Examples:
  zbdkit open disk.raw --zone 3
  zbdkit open disk.raw 0x8000000 --count 2

An open zone stays open only while a process has the image open: when this command ends, the zones are closed (empty, if \
nothing was written to them). So on an image file it tells whether the zones can be opened, within the device's \
limits. A guest opens the zones of a served image itself.";

pub const CLOSE_HELP: &str = "\
Examples:
  zbdkit close disk.raw --zone 3
  zbdkit close disk.raw --all

No zone of an image file stays open when the process that had it is gone, so there is seldom anything to close.";

pub const FINISH_HELP: &str = "\
Examples:
  zbdkit finish disk.raw --zone 3
  zbdkit finish disk.raw 64M --count 2

A finished zone takes no writes until it is reset; what was not written reads as zeros. Durable when the command \
returns.";

/// What is done to the zones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Reset,
    Open,
    Close,
    Finish,
}

impl Op {
    fn zone_op(self) -> ZoneOp {
        match self {
            Op::Reset => ZoneOp::Reset,
            Op::Open => ZoneOp::Open,
            Op::Close => ZoneOp::Close(CloseEmpty::ToEmpty),
            Op::Finish => ZoneOp::Finish,
        }
    }

    /// The verb and what was done.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Op::Reset => ("reset", "reset"),
            Op::Open => ("open", "opened"),
            Op::Close => ("close", "closed"),
            Op::Finish => ("finish", "finished"),
        }
    }
}

pub fn run(op: Op, args: &Zones) -> anyhow::Result<()> {
    if args.offset.is_none() && args.zone.is_none() && !args.all {
        return Err(Usage("which zones? Say OFFSET, --zone N or --all".into()).into());
    }
    let graph = args.image.graph()?;
    let session = Session::new()?;
    let (done, is_drive) = session.with(&graph, &changing(), async |device| {
        let geometry = zones_of(device)?;
        // A drive keeps its zones open by itself.
        let is_drive = device.engine().is_none();
        let lane = device.lane(1);
        if op == Op::Reset && args.all {
            device.reset_all(&lane).await?;
            return Ok((None, is_drive));
        }
        let zones = range(&geometry, args)?;
        let count = zones.len() as u32;
        each(device, &lane, op, zones).await?;
        Ok((Some(count), is_drive))
    })?;
    if !args.quiet {
        let (_, past) = op.words();
        let mut out = Out::new();
        out.line(match done {
            None => "reset all sequential zones that are neither read-only nor offline".to_owned(),
            Some(1) => format!("{past} 1 zone"),
            Some(n) => format!("{past} {n} zones"),
        })?;
        out.flush()?;
        if op == Op::Open && !is_drive {
            complain("note: this process is done with the image, so the zones are not open any more");
        }
    }
    Ok(())
}

fn range(geometry: &Geometry, args: &Zones) -> anyhow::Result<std::ops::Range<u32>> {
    if args.all {
        return Ok(geometry.nr_conventional()..geometry.nr_zones());
    }
    let nr_zones = geometry.nr_zones();
    let first = match (args.zone, args.offset) {
        (Some(zone), _) => zone,
        (None, offset) => geometry.zone_at(offset.unwrap_or(0))?.0,
    };
    match first.checked_add(args.count) {
        Some(end) if end <= nr_zones => Ok(first..end),
        _ => anyhow::bail!(
            "{} zones from zone {first} on: the device has {nr_zones}, numbered from 0",
            args.count
        ),
    }
}

async fn each(device: &Device, lane: &Lane, op: Op, zones: std::ops::Range<u32>) -> anyhow::Result<()> {
    let Some(geometry) = device.limits().zoned.as_ref() else {
        return Ok(());
    };
    for zone in zones.clone() {
        let start = geometry.start(ZoneNo(zone));
        if let Err(error) = device.zone_op(lane, op.zone_op(), start).await {
            let (verb, past) = op.words();
            let context = match zone - zones.start {
                0 => format!("cannot {verb} zone {zone}"),
                done => format!(
                    "cannot {verb} zone {zone} ({past} {done} of {} before it)",
                    zones.len()
                ),
            };
            return Err(anyhow::Error::new(error).context(context));
        }
    }
    Ok(())
}
