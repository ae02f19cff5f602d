//! `zbdkit set-zone`: what the operator sets, to see what the other side makes of it.

use clap::{Args, ValueEnum};
use zbdkit_block::ZoneOp;
use zbdkit_zone::ZoneNo;

use crate::args;
use crate::image::{ImageArgs, Session, changing, zones_of};
use crate::output::Out;

/// Make a zone read-only or offline, as a worn drive does, or take that back
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct SetZone {
    #[command(flatten)]
    pub image: ImageArgs,

    /// What the zone is to be
    #[arg(value_name = "STATE")]
    pub state: State,

    /// The zone by its number, from 0
    #[arg(long, value_name = "N", value_parser = args::count)]
    pub zone: u32,

    /// Print nothing
    #[arg(short, long)]
    pub quiet: bool,
}

/// What a zone can be set to.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum State {
    /// Takes no writes and no reset; its data can be read
    ReadOnly,
    /// Neither read nor written
    Offline,
    /// As it was before
    Normal,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit set-zone disk.raw --zone 5 read-only
  zbdkit set-zone disk.raw --zone 6 offline
  zbdkit set-zone disk.raw --zone 5 normal

Durable when the command returns. A zone's data stays where it is, so 'normal' brings it back.";

pub fn run(args: &SetZone) -> anyhow::Result<()> {
    let graph = args.image.graph()?;
    let session = Session::new()?;
    let (op, name) = match args.state {
        State::ReadOnly => (ZoneOp::SetReadOnly, "read-only"),
        State::Offline => (ZoneOp::SetOffline, "offline"),
        State::Normal => (ZoneOp::SetNormal, "normal"),
    };
    session.with(&graph, &changing(), async |device| {
        let geometry = zones_of(device)?;
        anyhow::ensure!(
            args.zone < geometry.nr_zones(),
            "there is no zone {}: the device has {} zones, numbered from 0",
            args.zone,
            geometry.nr_zones()
        );
        let start = geometry.start(ZoneNo(args.zone));
        Ok(device.zone_op(&device.lane(1), op, start).await?)
    })?;
    let mut out = Out::new();
    if !args.quiet {
        out.line(format_args!("zone {} is {name}", args.zone))?;
    }
    out.flush()
}
