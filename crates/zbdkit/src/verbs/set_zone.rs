//! `zbdkit set-zone`: what the operator sets, to see what the other side makes of it.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use zbdkit_block::{Device, OpenError, ZoneOp};
use zbdkit_zone::{Recommendation, ZoneNo};

use crate::args;
use crate::control::{self, Request};
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

    /// The image is served, by 'zbdkit serve --control SOCKET': do it there, while guests use it
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,

    /// Print nothing
    #[arg(short, long)]
    pub quiet: bool,
}

/// What a zone can be set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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

    /// What is said of a zone that is set to it.
    pub fn said(self) -> &'static str {
        self.op().1
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
  zbdkit set-zone disk.raw --control /run/zbdkit.ctl --zone 5 offline

Durable when the command returns. An image that is served belongs to its server: with --control the server does it, waits \
for what is in flight in the zone, and tells NVMe hosts (Changed Zone List). A zone's data stays where it is, so 'normal' brings it back. Only NVMe shows who \
finished a zone and what is recommended; 'zbdkit report' does, too. On a drive, 'offline' is for read-only zones of NVMe \
namespaces, and the drive itself decides everything else.";

const SERVED: &str = "the image is in use; where 'zbdkit serve --control SOCKET' has it, say 'zbdkit set-zone --control SOCKET'";

pub fn run(args: &SetZone) -> anyhow::Result<()> {
    match &args.control {
        Some(socket) => {
            let image = args.image.image.to_string_lossy();
            // The server may be at home elsewhere.
            let file = std::fs::canonicalize(&args.image.image).ok();
            let image = file.map_or(image.clone(), |file| file.to_string_lossy().into_owned().into());
            let request = Request::SetZone {
                image: image.into_owned(),
                zone: args.zone,
                state: args.state,
            };
            control::ask(socket, &request)?;
        }
        None => {
            let graph = args.image.graph()?;
            let done = Session::new()?.with(&graph, &changing(), async |device| {
                set_zone(device, args.zone, args.state).await
            });
            done.map_err(|error| match error.downcast_ref() {
                Some(OpenError::Locked { .. }) => error.context(SERVED),
                _ => error,
            })?;
        }
    }
    let mut out = Out::new();
    if !args.quiet {
        out.line(format_args!("zone {} {}", args.zone, args.state.said()))?;
    }
    out.flush()
}

/// Sets one zone of an open device.
pub async fn set_zone(device: &Device, zone: u32, state: State) -> anyhow::Result<()> {
    let geometry = zones_of(device)?;
    anyhow::ensure!(
        zone < geometry.nr_zones(),
        "there is no zone {zone}: the device has {} zones, numbered from 0",
        geometry.nr_zones()
    );
    let start = geometry.start(ZoneNo(zone));
    Ok(device.zone_op(&device.lane(1), state.op().0, start).await?)
}
