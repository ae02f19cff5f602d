//! qcow2 rows: our qcow2 against our raw and against qemu-storage-daemon's qcow2, which knows no zones.
//!
//! Writes go into an image that was just made, so that each of them pays for its space; reads are of an image that was
//! just filled. Every round makes all of them anew.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use zbdkit_testkit::client::peer::QemuStorageDaemon;

use crate::load::Load;
use crate::report::{Names, Row};
use crate::servers::{Format, Qcow2Peer, Zbdkit};
use crate::vhost::{Manner, VhostTarget};
use crate::workload::{Geometry, Kind, Sample, Workload};

/// What the rows call their columns.
pub const NAMES: Names = Names {
    ours: "zbdkit qcow2",
    peer: "qsd qcow2",
    limit: "zbdkit raw",
};

/// Lowest ratio to our own raw that a row must have.
const RAW_GOAL: f64 = 0.9;
/// Zones of the sparse images.
const SPREAD_ZONES: u64 = 1024;

/// How the servers are started, and where.
pub struct Formats<'a> {
    pub zbdkit: &'a Path,
    pub serve: &'a [String],
    /// qemu-storage-daemon and qemu-img, if they are there.
    pub peer: Option<(PathBuf, PathBuf)>,
    pub dir: &'a Path,
    pub queues: u16,
    pub manner: Manner,
    pub rounds: u32,
    pub retries: u32,
    pub time: Duration,
    /// Processors that others may use before a round counts as disturbed.
    pub quiet: f64,
    /// Rounds that were not quiet.
    pub disturbed: u32,
    pub measured: u64,
}

/// A server that is compared.
#[derive(Debug, Clone, Copy)]
enum Subject {
    Ours(Format),
    Peer(&'static str),
}

impl Subject {
    fn name(self) -> String {
        match self {
            Subject::Ours(Format::Qcow2) => NAMES.ours.into(),
            Subject::Ours(Format::Raw) => NAMES.limit.into(),
            Subject::Peer(aio) => format!("{} {aio}", NAMES.peer),
        }
    }
}

/// A server at work on its image; the image goes with it.
struct Served {
    target: VhostTarget,
    pid: u32,
    image: PathBuf,
    _server: Server,
}

#[expect(dead_code, reason = "kept for their ends")]
enum Server {
    Ours(Zbdkit),
    Peer(Qcow2Peer),
}

impl Drop for Served {
    fn drop(&mut self) {
        // The space is given back when the server has ended, too. A table beside a raw image has little.
        let _ = std::fs::remove_file(&self.image);
        let _ = std::fs::remove_file(self.image.with_added_extension("zones"));
    }
}

impl Formats<'_> {
    fn subjects(&self) -> Vec<Subject> {
        let mut subjects = vec![Subject::Ours(Format::Qcow2), Subject::Ours(Format::Raw)];
        if self.peer.is_some() {
            subjects.extend([Subject::Peer("threads"), Subject::Peer("io_uring")]);
        }
        subjects
    }

    fn serve(&self, subject: Subject, geometry: Geometry) -> Result<Served> {
        let (server, socket, image, pid) = match (subject, &self.peer) {
            (Subject::Ours(format), _) => {
                let server = Zbdkit::start(self.zbdkit, self.dir, format, geometry, self.serve)?;
                let (socket, image, pid) = (server.socket.clone(), server.image.clone(), server.pid());
                (Server::Ours(server), socket, image, pid)
            }
            (Subject::Peer(aio), peer) => {
                let (daemon, tool) = peer.as_ref().context("no peer")?;
                let server = Qcow2Peer::start(daemon, tool, self.dir, aio, geometry, self.queues)?;
                let (socket, image, pid) = (server.socket.clone(), server.image.clone(), server.pid());
                (Server::Peer(server), socket, image, pid)
            }
        };
        let target = VhostTarget::connect(&socket, geometry, self.queues, self.manner)?;
        Ok(Served {
            target,
            pid,
            image,
            _server: server,
        })
    }

    /// Writes into images that were just made, one pass over them.
    pub fn fresh(&mut self, geometry: Geometry, block: u32, depth: u32, goal: f64) -> Result<Row> {
        let workload = Workload {
            kind: Kind::SequentialWrite,
            block,
            depth,
        };
        let name = format!("fresh seq write {:>3}K QD{depth}", block / 1024);
        self.row(name, workload, (goal, Some(RAW_GOAL)), |bench, subject, seed| {
            bench.once(subject, geometry, workload, seed)
        })
    }

    /// Writes all over a sparse image that was just made.
    pub fn spread(&mut self, size: u64) -> Result<Row> {
        let geometry = Geometry {
            size,
            zone_size: size / SPREAD_ZONES,
        };
        let workload = Workload {
            kind: Kind::SpreadWrite,
            block: 64 << 10,
            depth: 32,
        };
        let name = format!("spread 64K QD32, {:>4} GiB", size >> 30);
        self.row(name, workload, (0.0, None), |bench, subject, seed| {
            bench.once(subject, geometry, workload, seed)
        })
    }

    fn once(
        &self,
        subject: Subject,
        geometry: Geometry,
        workload: Workload,
        seed: u64,
    ) -> Result<(Sample, f64)> {
        let mut served = self.serve(subject, geometry)?;
        let pids = [served.pid, std::process::id()];
        let load = Load::now(&pids);
        let sample = served.target.measure_pass(workload, seed)?;
        Ok((sample, load.others_since(&pids)))
    }

    /// Random reads of full images, which are made anew for each measurement: which pages of memory an image happens to
    /// get makes a third of the speed of large reads, and stays as it is while the image does.
    pub fn read(&mut self, geometry: Geometry, block: u32, depth: u32, goal: f64) -> Result<Row> {
        let workload = Workload {
            kind: Kind::RandomRead,
            block,
            depth,
        };
        let name = format!("full random read {:>3}K QD{depth}", block / 1024);
        self.row(name, workload, (goal, Some(RAW_GOAL)), |bench, subject, seed| {
            let mut served = bench.serve(subject, geometry)?;
            served.target.fill().context("filling the image")?;
            let pids = [served.pid, std::process::id()];
            let load = Load::now(&pids);
            let sample = served.target.measure(workload, seed, bench.time)?;
            Ok((sample, load.others_since(&pids)))
        })
    }

    /// Rounds in which each subject is measured once, in turn.
    fn row(
        &mut self,
        name: String,
        workload: Workload,
        (goal, raw_goal): (f64, Option<f64>),
        mut measure: impl FnMut(&Self, Subject, u64) -> Result<(Sample, f64)>,
    ) -> Result<Row> {
        eprintln!("measuring {name} ...");
        let subjects = self.subjects();
        let mut samples: Vec<(String, Vec<f64>)> = subjects
            .iter()
            .map(|subject| (subject.name(), Vec::new()))
            .collect();
        for _ in 0..self.rounds {
            let mut best: Option<(Vec<f64>, f64)> = None;
            for _ in 0..=self.retries {
                let (mut round, mut others) = (Vec::new(), 0.0f64);
                for &subject in &subjects {
                    self.measured += 1;
                    let seed = self.measured << 32;
                    let (sample, load) = measure(self, subject, seed)
                        .with_context(|| format!("{}, {name}", subject.name()))?;
                    round.push(sample.iops);
                    others = others.max(load);
                }
                if best.as_ref().is_none_or(|(_, load)| others < *load) {
                    best = Some((round, others));
                }
                if others <= self.quiet {
                    break;
                }
            }
            let (round, others) = best.context("no round was measured")?;
            self.disturbed += u32::from(others > self.quiet);
            for (iops, (_, list)) in round.into_iter().zip(&mut samples) {
                list.push(iops);
            }
        }
        ensure!(samples.iter().all(|(_, list)| !list.is_empty()), "no rounds");
        Ok(Row::named(name, workload, samples, NAMES, goal, raw_goal))
    }
}

/// The peer's programs, or why there is none.
pub fn peer() -> std::result::Result<(PathBuf, PathBuf), String> {
    match QemuStorageDaemon::missing() {
        Some(why) => Err(why),
        None => Ok((QemuStorageDaemon::PROGRAM.into(), "qemu-img".into())),
    }
}
