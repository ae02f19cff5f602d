//! Campaigns: many histories, many crashes in each, every one judged.

mod bare;
mod edges;
mod state;
mod steps;

use std::collections::HashSet;
use std::ops::Range;
use std::path::PathBuf;

use zbdkit_block::RunStateMode;
use zbdkit_io::{Backend, OnPanic, Runtime, RuntimeOptions};

use super::choose::{Choose, Rng, mix};
use super::disk::Disk;
use super::host::Behaviour;
use super::image::{Image, Prepared};
use super::run::{Plan, record};
use super::workload::Mix;
use state::State;

pub use bare::{LATE, bare};
pub use edges::{creation, exhaust};
pub use steps::offline;

/// How the machine goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// The process is killed.
    Kill,
    /// The machine loses power.
    Power,
}

impl Crash {
    fn any(rng: &mut Rng) -> Crash {
        if rng.one_in(2) { Crash::Kill } else { Crash::Power }
    }
}

/// What is tried.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name, for replays.
    pub name: &'static str,
    /// The image.
    pub image: Image,
    /// The run.
    pub plan: Plan,
    /// Which way the machine goes down; both if `None`.
    pub crash: Option<Crash>,
}

/// How much is tried.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Histories.
    pub histories: u64,
    /// Crashes in each.
    pub states: u64,
    /// Of one in so many states the reopened image is used, and crashes again.
    pub again: u64,
}

/// What was tried.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// States that were judged.
    pub states: u64,
    /// Distinct states after a kill, by contents.
    pub kills: HashSet<u64>,
    /// Distinct states after a power cut.
    pub power_cuts: HashSet<u64>,
    /// States that were repaired before they were opened.
    pub repaired: u64,
}

impl Tally {
    fn count(&mut self, crash: Crash, disk: &Disk) {
        self.states += 1;
        match crash {
            Crash::Kill => self.kills.insert(disk.hash()),
            Crash::Power => self.power_cuts.insert(disk.hash()),
        };
    }
}

/// A state that breaks the contract.
#[derive(Debug)]
pub struct Violation {
    /// What to set `ZBDKIT_CRASH_REPLAY` to in order to see it alone.
    pub replay: String,
    /// What is wrong.
    pub what: String,
}

impl Violation {
    fn new(case: &str, seed: u64, state: u64, what: String) -> Violation {
        Violation {
            replay: format!("{case}:{seed:#x}:{state}"),
            what,
        }
    }
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}\n  replay alone with ZBDKIT_CRASH_REPLAY={}",
            self.what, self.replay
        )
    }
}

/// A thread's executor for campaigns.
pub fn runtime() -> Runtime {
    Runtime::new(RuntimeOptions {
        backend: Backend::Threads,
        on_panic: OnPanic::Resume,
        ..RuntimeOptions::default()
    })
    .expect("a runtime needs nothing that could be missing here")
}

/// Runs a case. `replay` is the value of `ZBDKIT_CRASH_REPLAY`, if it is to be replayed.
pub fn campaign(
    case: &Case,
    effort: Effort,
    seed: u64,
    replay: Option<&str>,
    tally: &mut Tally,
) -> Result<(), Violation> {
    let runtime = runtime();
    let image = prepare(&runtime, case)?;
    for (seed, states) in histories(case.name, effort, seed, replay) {
        let violation = |state: u64, what: String| Violation::new(case.name, seed, state, what);
        let plan = plan_of(case, &image, seed);
        let history = record(&runtime, &image.disk, &plan, seed, image.first_id, &mut |_, _| {
            Ok(())
        })
        .map_err(|what| violation(0, what))?;
        let mut state = State {
            runtime: &runtime,
            image: &image,
            history: &history,
            tally,
        };
        state.end().map_err(|what| violation(0, what))?;
        for number in states {
            state
                .sample(case, effort, mix(seed, 1 << 32 | number))
                .map_err(|what| violation(number, what))?;
        }
    }
    Ok(())
}

/// The image of a case; the same one in each of its runs, whatever their seeds.
fn prepare(runtime: &Runtime, case: &Case) -> Result<Prepared, Violation> {
    case.image
        .prepare(runtime, 0x1a6e)
        .map_err(|what| Violation::new(case.name, 0, 0, format!("the image cannot be made: {what}")))
}

/// The histories of a campaign by their seeds, with the numbers of their states; or the one that is replayed.
fn histories(name: &str, effort: Effort, seed: u64, replay: Option<&str>) -> Vec<(u64, Range<u64>)> {
    match replay.map(|text| parse_replay(name, text)) {
        None => (0..effort.histories)
            .map(|number| (mix(seed, number), 0..effort.states))
            .collect(),
        Some(only) => only
            .into_iter()
            .map(|(seed, state)| (seed, state..state + 1))
            .collect(),
    }
}

fn parse_replay(name: &str, text: &str) -> Option<(u64, u64)> {
    let mut parts = text.split(':');
    if parts.next() != Some(name) {
        return None;
    }
    let seed = parts.next()?.trim_start_matches("0x");
    Some((u64::from_str_radix(seed, 16).ok()?, parts.next()?.parse().ok()?))
}

/// The plan with what the case leaves open: the image, and when the fault strikes.
fn plan_of(case: &Case, image: &Prepared, seed: u64) -> Plan {
    let mut plan = Plan {
        image: image.path.clone(),
        ..case.plan.clone()
    };
    if let Some(fault) = &mut plan.behaviour.fault {
        fault.after += Rng::new(mix(seed, 77)).below(20);
    }
    plan
}

/// Mixes and sizes for the cases of the tests.
impl Plan {
    /// Some clients with a bit of everything; the run state beside the image, not mapped.
    pub fn new(mix: Mix, clients: u32, requests: u32) -> Plan {
        Plan {
            image: PathBuf::new(),
            run_state: RunStateMode::Beside,
            behaviour: Behaviour::default(),
            mix,
            clients,
            requests,
            touch: false,
            close: true,
        }
    }
}
