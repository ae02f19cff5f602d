//! Kills a real daemon in mid-traffic, again and again, and judges what the image holds after each restart.
//!
//! Client threads, one a queue of virtio-blk or of an NVMe controller ([`Door`]), keep many requests in flight and log what
//! they submit and what is acknowledged ([`log`]; of zones with random write areas [`area`]). Every block that is written says which request wrote it ([`stamp`]), so that after a restart the
//! whole device can be read back and judged ([`judge`]) without a copy of the data. The next round goes on from
//! there, on the same image. This is the contract's rule about process death on the real thing: a process, its
//! files, and the kernel below; the crash device explores orders that no kill happens to hit.

mod answers;
pub mod area;
mod channel;
mod check;
pub mod daemon;
pub mod judge;
pub mod log;
pub mod rng;
mod shared;
pub mod stamp;
mod traffic;
mod verify;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::process::Signal;

use crate::client::{Client, Options as ClientOptions};
use area::{AreaBase, judge_area};
use channel::{Channel, Config};
use daemon::{Daemon, Program};
use judge::{Secured, judge, judge_conventional};
use log::{Base, Time};
use rng::Rng;
use shared::{Plan, Shared, lock};
use stamp::Content;
use traffic::Worker;
use verify::{Whole, learn, read_all};

pub use shared::{Counts, End, Geometry};

/// Longest request in bytes.
const MAX_DATA: usize = 128 << 10;
/// Requests in flight on a queue, at most.
const SLOTS: u16 = 32;

/// How long a round's traffic may take.
const ROUND: Duration = Duration::from_secs(120);

/// What must be there after a kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contract {
    /// Every acknowledged write.
    Acknowledged,
    /// Every write acknowledged before a completed flush was submitted.
    Flushed,
}

/// How the image keeps its zones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// In a table beside it.
    Raw,
    /// Inside.
    Qcow2,
}

/// By which door the image is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// virtio-blk over vhost-user.
    VhostUserBlk,
    /// An NVMe controller over vfio-user. Zones at the device's end, one a queue, are used with random write areas, where the
    /// image has some.
    Nvme,
}

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The zbdkit program.
    pub zbdkit: PathBuf,
    /// Where the image is made; what matters is its file system.
    pub dir: PathBuf,
    /// Format of the image.
    pub format: Format,
    /// How it is served.
    pub door: Door,
    /// Rounds.
    pub rounds: u64,
    /// Decides everything but the races.
    pub seed: u64,
    /// Queues, each with a client thread.
    pub queues: u16,
    /// The run-state mode of the image.
    pub run_state: String,
    /// Bypass the page cache.
    pub direct: bool,
    /// What to demand.
    pub contract: Contract,
    /// A round ends after at most so many acknowledgements.
    pub max_acks: u64,
    /// Arguments of `zbdkit create`.
    pub create: Vec<OsString>,
    /// Further arguments of `zbdkit serve`.
    pub serve: Vec<OsString>,
    /// Give up after so many failures.
    pub max_failures: usize,
}

/// A round that failed.
#[derive(Debug)]
pub struct Failure {
    /// Its number.
    pub round: u64,
    /// What was expected and what was found.
    pub what: String,
    /// Where the image is kept.
    pub kept: PathBuf,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Summary {
    /// Rounds that passed.
    pub passed: u64,
    /// Rounds that did not.
    pub failures: Vec<Failure>,
    /// Sums over all rounds.
    pub counts: Counts,
    /// Rounds by how they ended.
    pub ends: BTreeMap<End, u64>,
    /// Daemons killed while they opened the image, or just after.
    pub interrupted: u64,
    /// Checks of the image's format after a daemon's end.
    pub checks: u64,
    /// Of those, how many found clusters that were lost, as a kill may leave them.
    pub leaks: u64,
    /// Repairs, each of which left nothing to be found.
    pub repairs: u64,
}

/// Runs the rounds; `progress` gets a line after each.
///
/// # Errors
/// If the daemon or the image cannot be used at all, in the first round.
pub fn run(options: &Options, progress: &mut dyn FnMut(&str)) -> Result<Summary> {
    std::fs::create_dir_all(&options.dir)?;
    let mut summary = Summary::default();
    let mut bench: Option<Bench> = None;
    for round in 1..=options.rounds {
        let mut current = match bench.take() {
            Some(bench) => bench,
            None => Bench::start(options, round)?,
        };
        let start = Instant::now();
        let plan = current.plan(round);
        let result = current.round(&plan, &mut summary);
        let end = format!("{:?} after {} acknowledgements", plan.end, plan.target);
        *summary.ends.entry(plan.end).or_default() += 1;
        match result {
            Ok(counts) => {
                summary.passed += 1;
                progress(&format!(
                    "round {round}: {end}, {} acknowledged, {} refused, {} in flight; {} + {} requests kept; {:.2} s",
                    counts.total(),
                    counts.total_refused(),
                    counts.in_flight,
                    counts.kept,
                    counts.kept_unacknowledged,
                    start.elapsed().as_secs_f64()
                ));
                summary.counts.add(&counts);
                bench = Some(current);
            }
            Err(error) => {
                let what = format!("seed {} round {round} ({end}): {error:#}", options.seed);
                progress(&format!("FAILED: {what}"));
                let kept = current.keep(round)?;
                summary.failures.push(Failure { round, what, kept });
                if summary.failures.len() >= options.max_failures {
                    break;
                }
            }
        }
    }
    if let Some(mut bench) = bench {
        bench.finish()?;
    }
    Ok(summary)
}

/// A daemon that is ready, with its client.
struct Live {
    daemon: Daemon,
    /// Of virtio-blk; queues of NVMe have theirs themselves.
    client: Option<Client>,
    queues: Vec<Channel>,
    config: Config,
}

/// An image, and what it must hold.
struct Bench<'a> {
    options: &'a Options,
    seed: Rng,
    /// Number of the image: that of its first round, with the seed.
    image: u64,
    program: Program,
    geometry: Geometry,
    conventional: Vec<Vec<Content>>,
    sequential: Vec<Base>,
    areas: Vec<AreaBase>,
    live: Option<Live>,
    /// How long the daemon needs to be ready.
    opening: Duration,
    file: PathBuf,
    /// A daemon was killed since the last repair: clusters may be lost.
    leaky: bool,
}

impl<'a> Bench<'a> {
    /// Makes an image and serves it.
    fn start(options: &'a Options, round: u64) -> Result<Self> {
        let dir = options.dir.join(format!("image-{}-{round}", options.seed));
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        std::fs::create_dir_all(&dir)?;
        let (name, driver) = match options.format {
            Format::Raw => ("kill.img", "zoned"),
            Format::Qcow2 => ("kill.qcow2", "qcow2"),
        };
        let file = dir.join(name);
        daemon::create(&options.zbdkit, &file, &options.create)?;
        let name = file.to_str().context("the directory's name is not UTF-8")?;
        let direct = if options.direct { "on" } else { "off" };
        // Commas are doubled within a value.
        let graph = format!(
            "driver={driver},run-state={},file.driver=file,file.cache.direct={direct},file.filename={}",
            options.run_state,
            name.replace(',', ",,"),
        );
        let mut arguments = vec![OsString::from("--queues"), options.queues.to_string().into()];
        arguments.extend(options.serve.iter().cloned());
        let served = match options.door {
            Door::VhostUserBlk => vec![graph, "--vhost-user-blk".into()],
            Door::Nvme => vec!["--namespace".into(), graph, "--nvme".into()],
        };
        let program = Program {
            zbdkit: options.zbdkit.clone(),
            dir,
            served: served.into_iter().map(OsString::from).collect(),
            arguments,
        };
        program.forget_messages()?;
        let (mut live, opening) = Live::start(&program, options)?;
        let geometry = learn(&mut live.queues[0], &live.config)?;
        let zone_blocks = geometry.zone_blocks as usize;
        ensure!(geometry.max_append > 0, "the device has no appends");
        Ok(Bench {
            seed: Rng::new(options.seed),
            image: rng::mix(options.seed.wrapping_add(round)),
            program,
            geometry,
            conventional: vec![vec![Content::Zeros; zone_blocks]; geometry.conventional as usize],
            sequential: vec![Base::default(); (geometry.first_area() - geometry.conventional) as usize],
            areas: vec![
                AreaBase::empty(geometry.capacity);
                (geometry.zones - geometry.first_area()) as usize
            ],
            live: Some(live),
            opening,
            options,
            file,
            leaky: false,
        })
    }

    fn plan(&self, round: u64) -> Plan {
        let longest = MAX_DATA as u32 / self.geometry.block;
        let mut plan = Plan::new(&self.seed, round, self.options.max_acks, longest);
        if self.geometry.areas.is_some() {
            // Zones with random write areas are reset by their queues alone.
            plan.weights[Plan::RESET_ALL] = 0;
        }
        plan
    }

    /// Traffic, an end, a restart, and the judgement.
    fn round(&mut self, plan: &Plan, summary: &mut Summary) -> Result<Counts> {
        let mut rng = self.seed.fork(plan.round).fork(1);
        let mut live = self.live.take().context("nothing is served")?;
        let daemon = live.daemon;
        let signal = match plan.end {
            End::Kill | End::KillIdle => Signal::KILL,
            End::Term => Signal::TERM,
        };
        let end = || daemon.signal(signal);
        let shared = Shared::new(
            self.geometry,
            plan.clone(),
            self.image,
            &self.conventional,
            &self.sequential,
            &self.areas,
            &end,
        );
        let mut workers: Vec<_> = std::mem::take(&mut live.queues)
            .into_iter()
            .enumerate()
            .map(|(n, queue)| Worker::new(&shared, queue, n, rng.fork(100 + n as u64)))
            .collect();
        traffic(&shared, &mut workers, &daemon)?;
        if plan.end == End::KillIdle || shared.broken().is_some() {
            daemon.signal(Signal::KILL);
        }
        let status = daemon.wait(Duration::from_secs(30))?;
        let mut counts = Counts::default();
        for worker in &mut workers {
            counts.add(&worker.drain());
        }
        drop((workers, live.client));
        if let Some(what) = shared.broken() {
            return Err(anyhow!("{what}\n{}", self.program.tail()));
        }
        // A device that refuses everything loses nothing.
        let (done, refused) = (counts.total(), counts.total_refused());
        ensure!(
            refused < 200 + done / 2,
            "{refused} requests were refused, and {done} acknowledged: {:?}",
            counts.refused
        );
        let clean = plan.end == End::Term;
        ensure!(
            !clean || status.success(),
            "the daemon ended with {status} after SIGTERM: {}",
            self.program.tail()
        );

        self.check(clean, &mut rng, summary)?;
        self.program.forget_messages()?;
        let interrupted = self.interrupt(&mut rng)?;
        if interrupted > 0 {
            self.check(false, &mut rng, summary)?;
        }
        summary.interrupted += interrupted;
        let (mut live, opening) = Live::start(&self.program, self.options)?;
        self.opening = opening;
        self.said(clean)?;
        let (queues, whole) = read_all(live.queues, &live.config, &self.geometry, self.image)?;
        live.queues = queues;
        self.live = Some(live);
        let secured = match self.options.contract {
            Contract::Flushed if !clean => Secured(shared.flushed_before()),
            _ => Secured::ALL,
        };
        self.judge(&shared, whole, secured, &mut counts)?;
        Ok(counts)
    }

    /// Nothing in the image is corrupt, and none of it is lost but by kills; once in a while the losses are repaired.
    fn check(&mut self, clean: bool, rng: &mut Rng, summary: &mut Summary) -> Result<()> {
        if self.options.format == Format::Raw {
            return Ok(());
        }
        self.leaky |= !clean;
        let leaks = check::check(&self.options.zbdkit, &self.file)?;
        summary.checks += 1;
        summary.leaks += u64::from(leaks);
        ensure!(
            !leaks || self.leaky,
            "clusters are lost, though nobody was killed"
        );
        if rng.one_in(8) {
            check::repair(&self.options.zbdkit, &self.file)?;
            summary.repairs += 1;
            self.leaky = false;
        }
        Ok(())
    }

    /// Once in a while: kills the daemon while it opens the image, or when it is ready, with or without a client.
    fn interrupt(&mut self, rng: &mut Rng) -> Result<u64> {
        if !rng.one_in(4) {
            return Ok(0);
        }
        let times = 1 + rng.below(3);
        for _ in 0..times {
            match rng.below(4) {
                0 => {
                    let (daemon, opening) = self.program.start_ready()?;
                    self.opening = opening;
                    daemon.kill()?;
                }
                1 => {
                    let (live, _) = Live::start(&self.program, self.options)?;
                    live.daemon.kill()?;
                }
                _ => {
                    let daemon = self.program.start()?;
                    let longest = self.opening.as_micros() as u64 * 5 / 4;
                    std::thread::sleep(Duration::from_micros(rng.below(longest.max(1))));
                    daemon.kill()?;
                }
            }
        }
        Ok(times)
    }

    /// What may be lost is said, and only then.
    fn said(&self, clean: bool) -> Result<()> {
        let messages = std::fs::read(self.program.messages())?;
        let messages = String::from_utf8_lossy(&messages);
        let said = messages.contains("may be lost");
        // A daemon that was killed while it opened may have been the one to say it, or not.
        let (must, may) = match self.options.run_state.as_str() {
            "none" => (!clean, true),
            _ => (false, false),
        };
        ensure!(
            said || !must,
            "opening did not say that writes may be lost: {messages}"
        );
        ensure!(!said || may, "opening says that writes may be lost: {messages}");
        Ok(())
    }

    /// Judges every zone. What was found is the beginning of the next round.
    fn judge(
        &mut self,
        shared: &Shared<'_>,
        whole: Whole,
        secured: Secured,
        counts: &mut Counts,
    ) -> Result<()> {
        let mut wrong = Vec::new();
        for (log, contents) in shared.conventional.iter().zip(&whole.conventional) {
            let log = lock(log);
            for (content, block) in contents.iter().zip(0..) {
                wrong.extend(judge_conventional(&log, block, secured, Time::MAX, *content).err());
            }
        }
        for ((log, found), base) in shared
            .sequential
            .iter()
            .zip(&whole.sequential)
            .zip(&mut self.sequential)
        {
            let log = lock(log);
            match judge(log.zone, &log.base, &log.entries, secured, found) {
                Ok(verdict) => {
                    counts.kept += u64::from(verdict.acknowledged);
                    counts.kept_unacknowledged += u64::from(verdict.unacknowledged);
                    *base = verdict.base;
                }
                Err(what) => wrong.push(format!("zone {}: {what}", log.zone)),
            }
        }
        if let Some(areas) = &self.geometry.areas {
            let found = whole
                .sequential
                .iter()
                .zip(&whole.areas)
                .skip(self.sequential.len());
            for ((log, (found, area)), base) in shared.areas.iter().zip(found).zip(&mut self.areas) {
                let log = lock(log);
                match judge_area(&log, areas, secured, found, *area) {
                    Ok(verdict) => {
                        counts.kept += u64::from(verdict.acknowledged);
                        counts.kept_unacknowledged += u64::from(verdict.unacknowledged);
                        *base = verdict.base;
                    }
                    Err(what) => wrong.push(format!("zone {} with an area: {what}", log.zone)),
                }
            }
        }
        counts.verified += whole.bytes;
        self.conventional = whole.conventional;
        match wrong.as_slice() {
            [] => Ok(()),
            [first, ..] => Err(anyhow!("{first} ({} things are wrong)", wrong.len())),
        }
    }

    /// Ends the daemon, and keeps the image of a failed round.
    fn keep(mut self, round: u64) -> Result<PathBuf> {
        drop(self.live.take());
        let kept = self
            .options
            .dir
            .join(format!("failed-{}-{round}", self.options.seed));
        if kept.exists() {
            std::fs::remove_dir_all(&kept)?;
        }
        std::fs::rename(&self.program.dir, &kept)?;
        Ok(kept)
    }

    /// Ends the daemon as a user would, and removes the image.
    fn finish(&mut self) -> Result<()> {
        if let Some(live) = self.live.take() {
            live.daemon.signal(Signal::TERM);
            let status = live.daemon.wait(Duration::from_secs(30))?;
            ensure!(status.success(), "the daemon ended with {status} after SIGTERM");
        }
        Ok(std::fs::remove_dir_all(&self.program.dir)?)
    }
}

impl Live {
    fn start(program: &Program, options: &Options) -> Result<(Self, Duration)> {
        let (daemon, opening) = program.start_ready()?;
        let (client, queues, config) = match options.door {
            Door::VhostUserBlk => {
                let (client, queues, config) = connect(program, options.queues)?;
                (Some(client), queues, config)
            }
            Door::Nvme => {
                let (queues, config) = channel::connect(&program.socket(), options.queues)?;
                (None, queues, config)
            }
        };
        let live = Live {
            daemon,
            client,
            queues,
            config,
        };
        Ok((live, opening))
    }
}

/// A virtio driver with so many queues.
fn connect(program: &Program, queues: u16) -> Result<(Client, Vec<Channel>, Config)> {
    let options = ClientOptions {
        queues,
        queue_size: 256,
        slots: SLOTS,
        max_data: MAX_DATA,
        scratch: 4096,
        patience: Duration::from_secs(30),
        ..ClientOptions::default()
    };
    let mut client = Client::connect(&program.socket(), &options)
        .with_context(|| format!("connecting to {}", program.socket().display()))?;
    let queues = client.take_queues().into_iter();
    let queues = queues.map(|queue| Channel::Virtio(Box::new(queue))).collect();
    let config = client.config();
    let config = Config {
        capacity: config.capacity,
        zone_sectors: config.zone_sectors,
        max_append_sectors: config.max_append_sectors,
        blk_size: config.blk_size,
        areas: None,
    };
    Ok((client, queues, config))
}

/// Runs all workers to the round's end.
fn traffic(shared: &Shared<'_>, workers: &mut [Worker<'_>], daemon: &Daemon) -> Result<()> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = workers
            .iter_mut()
            .map(|worker| scope.spawn(move || worker.run()))
            .collect();
        let start = Instant::now();
        while !threads.iter().all(|thread| thread.is_finished()) {
            if start.elapsed() > ROUND && !shared.stopped() {
                shared.breach(format!("the round did not come to its end in {ROUND:?}"));
            }
            if let Some(status) = daemon.exited()?
                && !shared.ended()
            {
                shared.breach(format!("the daemon ended by itself: {status}"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| anyhow!("a client thread panicked")))
    })
}
