//! `zbdkit set-zone`: what the operator sets, to see what the other side makes of it.

use clap::{Args, ValueEnum};
use zbdkit_block::ZoneOp;
use zbdkit_zone::{Recommendation, ZoneNo};

use crate::args;
use crate::image::{ImageArgs, Session, changing, zones_of};
use crate::output::Out;

/// Make a zone read-only or offline, as a worn drive does, finish it as drives do, or recommend something; or take that back
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
    /// As it was before read-only or offline
    Normal,
    /// Full, and marked as finished by the device itself
    FinishedByDevice,
    /// Marked: the device would have the host reset it
    ResetRecommended,
    /// Marked: the device would have the host finish it
    FinishRecommended,
    /// Without such a mark
    NoRecommendation,
}

impl State {
    /// How it is brought about, and what is said of the zone then.
    fn op(self) -> (ZoneOp, &'static str) {
        match self {
            State::ReadOnly => (ZoneOp::SetReadOnly, "is read-only"),
            State::Offline => (ZoneOp::SetOffline, "is offline"),
            State::Normal => (ZoneOp::SetNormal, "is normal"),
            State::FinishedByDevice => (ZoneOp::FinishByDevice, "is full, finished by the device"),
            State::ResetRecommended => (
                ZoneOp::Recommend(Some(Recommendation::Reset)),
                "is recommended to be reset",
            ),
            State::FinishRecommended => (
                ZoneOp::Recommend(Some(Recommendation::Finish)),
                "is recommended to be finished",
            ),
            State::NoRecommendation => (ZoneOp::Recommend(None), "has no recommendation"),
        }
    }
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit set-zone disk.raw --zone 5 read-only
  zbdkit set-zone disk.raw --zone 6 offline
  zbdkit set-zone disk.raw --zone 5 normal
  zbdkit set-zone disk.raw --zone 7 reset-recommended
  zbdkit set-zone disk.raw --zone 7 no-recommendation
  zbdkit set-zone disk.raw --zone 8 finished-by-device

Durable when the command returns. A zone's data stays where it is, so 'normal' brings it back. Only NVMe shows who \
finished a zone and what is recommended; 'zbdkit report' does, too. On a drive, 'offline' is for read-only zones of NVMe \
namespaces, and the drive itself decides everything else.";

pub fn run(args: &SetZone) -> anyhow::Result<()> {
    let graph = args.image.graph()?;
    let session = Session::new()?;
    let (op, said) = args.state.op();
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
        out.line(format_args!("zone {} {said}", args.zone))?;
    }
    out.flush()
}
