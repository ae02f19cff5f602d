//! Campaigns: many histories, many crashes in each, every one judged.

use std::collections::HashSet;

use zbdkit_block::{CreateOptions, RunStateMode};
use zbdkit_io::{Backend, OnPanic, Runtime, RuntimeOptions};

use super::choose::{Choose, Odometer, Rng, mix};
use super::disk::{Change, Disk, Event};
use super::host::{Behaviour, Fault, FaultKind, Lie, Role};
use super::judge::{Moment, Promise, View, history, judge};
use super::oracle::Answer;
use super::run::{History, Plan, make_image, record, record_creation};
use super::workload::Mix;

/// How the machine goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// The process is killed.
    Kill,
    /// The machine loses power.
    Power,
}

/// What is tried.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name, for replays.
    pub name: &'static str,
    /// The image.
    pub image: CreateOptions,
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
    let image = make_image(&runtime, &case.image);
    let histories: Vec<(u64, std::ops::Range<u64>)> = match replay.map(|text| parse_replay(case.name, text)) {
        None => (0..effort.histories)
            .map(|number| (mix(seed, number), 0..effort.states))
            .collect(),
        Some(only) => only
            .into_iter()
            .map(|(seed, state)| (seed, state..state + 1))
            .collect(),
    };
    for (seed, states) in histories {
        let violation = |state: u64, what: String| Violation {
            replay: format!("{}:{seed:#x}:{state}", case.name),
            what,
        };
        let history = record(
            &runtime,
            &image,
            &plan_of(case, seed),
            seed,
            1,
            &mut |_, _| Ok(()),
        )
        .map_err(|what| violation(0, what))?;
        let mut state = State {
            runtime: &runtime,
            history: &history,
            tally,
        };
        for number in states {
            state
                .sample(case, effort, mix(seed, 1 << 32 | number))
                .map_err(|what| violation(number, what))?;
        }
    }
    Ok(())
}

fn parse_replay(name: &str, text: &str) -> Option<(u64, u64)> {
    let mut parts = text.split(':');
    if parts.next() != Some(name) {
        return None;
    }
    let seed = parts.next()?.trim_start_matches("0x");
    Some((u64::from_str_radix(seed, 16).ok()?, parts.next()?.parse().ok()?))
}

/// The plan with what the seed leaves open: when the fault strikes.
fn plan_of(case: &Case, seed: u64) -> Plan {
    let mut plan = case.plan.clone();
    if let Some(fault) = &mut plan.behaviour.fault {
        fault.after += Rng::new(mix(seed, 77)).below(20);
    }
    plan
}

struct State<'a> {
    runtime: &'a Runtime,
    history: &'a History,
    tally: &'a mut Tally,
}

impl State<'_> {
    /// One crash somewhere in the history.
    fn sample(&mut self, case: &Case, effort: Effort, seed: u64) -> Result<(), String> {
        let mut rng = Rng::biased(seed);
        let crash = case
            .crash
            .unwrap_or(if rng.one_in(2) { Crash::Kill } else { Crash::Power });
        let at = moment(self.history, &mut rng);
        let disk = crashed(self.history, at, crash, &mut rng);
        let again = effort.again > 0 && rng.one_in(effort.again);
        self.tally.count(crash, &disk);
        let next = self
            .reopen(&disk, (at, crash, true), again, rng.word())
            .map_err(|why| self.explain(at, crash, &why))?;
        for _ in 0..if again { 3 } else { 0 } {
            let crash_again = if rng.one_in(2) { Crash::Kill } else { Crash::Power };
            let at_again = moment(&next, &mut rng);
            let disk = crashed(&next, at_again, crash_again, &mut rng);
            self.tally.count(crash_again, &disk);
            let tick = tick_of(&next, at_again);
            let why = if tick <= next.oracle.opened {
                // The opening never answered: the image still owes what it owed before.
                let both = if crash == Crash::Power {
                    Crash::Power
                } else {
                    crash_again
                };
                let result = self.reopen(&disk, (at, both, false), false, rng.word());
                result.err().map(|why| self.explain(at, crash, &why))
            } else {
                let second = State {
                    runtime: self.runtime,
                    history: &next,
                    tally: self.tally,
                };
                let result = second.reopen(&disk, (at_again, crash_again, true), false, rng.word());
                result
                    .err()
                    .map(|why| second.explain(at_again, crash_again, &why))
            };
            if let Some(why) = why {
                return Err(format!(
                    "after a second crash ({crash_again:?} at event {at_again} of {}, opened at tick {}, run state {:?}; the first was \
                     {crash:?} at event {at}): {why}",
                    next.events.len(),
                    next.oracle.opened,
                    next.plan.run_state
                ));
            }
        }
        Ok(())
    }

    /// Opens what is left and judges it; goes on to use it if `again`.
    fn reopen(
        &self,
        disk: &Disk,
        (at, crash, first): (usize, Crash, bool),
        again: bool,
        seed: u64,
    ) -> Result<History, String> {
        let before = &self.history.plan;
        let tick = tick_of(self.history, at);
        let moment = Moment {
            tick,
            promise: promise(self.history, tick, crash),
        };
        let run_state = match again {
            true => [
                before.run_state.clone(),
                RunStateMode::Beside,
                RunStateMode::Sync,
                RunStateMode::None,
            ][(seed % 4) as usize]
                .clone(),
            false => before.run_state.clone(),
        };
        let plan = Plan {
            run_state,
            behaviour: Behaviour {
                mapped: before.behaviour.mapped,
                lie: None,
                fault: None,
            },
            mix: before.mix,
            clients: if again { 3 } else { 0 },
            requests: if again { 8 } else { 0 },
            touch: again && seed & 16 == 0,
            close: again,
        };
        let oracle = &self.history.oracle;
        record(
            self.runtime,
            disk,
            &plan,
            seed,
            oracle.next_id(),
            &mut |view: &View, notices| {
                judge(oracle, moment, view)?;
                self.told(moment, crash, first, view, notices)
            },
        )
    }

    /// Whether the user heard of what may be lost. Where `first`, this is the crash of the history itself, and more
    /// is known of what the opening must say.
    fn told(
        &self,
        moment: Moment,
        crash: Crash,
        first: bool,
        view: &View,
        notices: &[String],
    ) -> Result<(), String> {
        let (oracle, plan) = (&self.history.oracle, &self.history.plan);
        let lost = notices.iter().any(|notice| notice.contains("may be lost"));
        let sync = plan.run_state == RunStateMode::Sync;
        let all = if sync {
            Promise::Sequential
        } else {
            Promise::Acknowledged
        };
        if !lost
            && let Err(why) = judge(
                oracle,
                Moment {
                    promise: all,
                    ..moment
                },
                view,
            )
        {
            return Err(format!("writes were lost in silence: {why}"));
        }
        let tick = moment.tick;
        let in_use = tick > oracle.opened && oracle.closing.is_none_or(|closing| tick <= closing);
        let failed = self.history.fault.is_some_and(|fault| fault < tick);
        // What was lost before this run may be told again.
        let repeated = lost
            && self
                .history
                .notices
                .iter()
                .any(|notice| notice.contains("may be lost"));
        if !first || !in_use || sync || failed || repeated {
            return Ok(());
        }
        let waived = plan.run_state == RunStateMode::None;
        match (crash == Crash::Power || waived, lost) {
            (true, false) => Err("nobody is told that writes may be lost".into()),
            (false, true) => Err(format!("the run state is not believed: {notices:?}")),
            _ => Ok(()),
        }
    }

    fn explain(&self, at: usize, crash: Crash, why: &str) -> String {
        let tick = tick_of(self.history, at);
        let mut text = format!(
            "{crash:?} at event {at} of {} (tick {tick}): {why}",
            self.history.events.len()
        );
        let zone = why
            .split("zone ")
            .nth(1)
            .and_then(|rest| rest.split(':').next()?.parse().ok());
        if let Some(zone) = zone {
            text += &format!(
                "\n  requests before it:{}",
                history(&self.history.oracle, tick, zone)
            );
        }
        if let Some(fault) = self.history.fault {
            text += &format!("\n  a fault struck at tick {fault}");
        }
        let from = at.saturating_sub(12);
        for recorded in &self.history.events[from..at] {
            text += &format!("\n  event {:>5}: {}", recorded.tick, brief(&recorded.event));
        }
        text
    }
}

fn brief(event: &Event) -> String {
    let text = format!("{event:?}");
    match text.char_indices().nth(100) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// Somewhere in the history; sometimes right at its ends.
fn moment(history: &History, rng: &mut Rng) -> usize {
    let events = history.events.len();
    match rng.below(16) {
        0 => events,
        1 => rng.below(events.min(40) as u64 + 1) as usize,
        _ => rng.below(events as u64 + 1) as usize,
    }
}

/// Everything before this tick happened before event `at`.
fn tick_of(history: &History, at: usize) -> u64 {
    history.events.get(at).map_or(u64::MAX, |event| event.tick)
}

fn crashed(history: &History, at: usize, crash: Crash, choose: &mut dyn Choose) -> Disk {
    let mut disk = history.start.clone();
    history.events[..at]
        .iter()
        .for_each(|recorded| disk.apply(&recorded.event));
    match crash {
        Crash::Kill => disk.kill(choose, at > given_up(history)),
        Crash::Power => disk.power_cut(choose),
    }
}

/// The event by which the run state says that the epoch failed. A kill between a failed sync and this event finds a
/// run state that is believed, over data that the kernel may drop later: nothing that runs in the process can help, so
/// that is left out.
fn given_up(history: &History) -> usize {
    let Some(fault) = history.fault else { return 0 };
    if !matches!(history.plan.run_state, RunStateMode::Beside | RunStateMode::In(_)) {
        return 0;
    }
    let invalid = |recorded: &&super::host::Recorded| {
        let offset = zbdkit_spec::sidecar::RUN_INVALID_OFFSET;
        recorded.tick > fault
            && matches!(recorded.event, Event::Changed { change: Change::Write { offset: at, .. }, .. } if at == offset)
    };
    // By the time that anybody is told, it must be there.
    let failures = history.oracle.ops.iter().filter_map(|op| op.done);
    let told = failures
        .filter(|(at, answer)| *answer == Answer::Failed && *at > fault)
        .map(|(at, _)| at)
        .min()
        .unwrap_or(u64::MAX);
    let events = &history.events;
    let found = events
        .iter()
        .position(|recorded| invalid(&recorded) || recorded.tick > told);
    found.unwrap_or(events.len())
}

/// What acknowledgements before `tick` are worth after such a crash.
fn promise(history: &History, tick: u64, crash: Crash) -> Promise {
    let behaviour = &history.plan.behaviour;
    // A client's write that fails, fails alone; other failures end the epoch.
    let ended = history.oracle.ops.iter().any(|op| op.epoch_failed);
    let alone = |fault: Fault| fault.role == Role::Data && fault.kind == FaultKind::Write && !ended;
    let failed = history.fault.is_some_and(|fault| fault < tick) && !behaviour.fault.is_some_and(alone);
    match (&history.plan.run_state, crash) {
        (RunStateMode::Sync, Crash::Kill) if !failed => Promise::Acknowledged,
        (RunStateMode::Sync, _) => Promise::Sequential,
        (RunStateMode::Beside | RunStateMode::In(_), Crash::Kill) if !failed => Promise::Acknowledged,
        _ => Promise::Flushed,
    }
}

/// All crashes at all events of one short history, with every change there or not. Returns how many there were.
pub fn exhaust(case: &Case, seed: u64, limit: u64, tally: &mut Tally) -> Result<u64, Violation> {
    let runtime = runtime();
    let image = make_image(&runtime, &case.image);
    let violation = |what: String| Violation {
        replay: format!("{}:{seed:#x}:0", case.name),
        what,
    };
    let history = record(
        &runtime,
        &image,
        &plan_of(case, seed),
        seed,
        1,
        &mut |_, _| Ok(()),
    )
    .map_err(violation)?;
    let state = State {
        runtime: &runtime,
        history: &history,
        tally,
    };
    let mut seen = HashSet::new();
    let mut judged = 0;
    for at in 0..=history.events.len() {
        let noted = notes_before(&history, tick_of(&history, at));
        for crash in [Crash::Kill, Crash::Power] {
            let mut odometer = Odometer::default();
            for _ in 0..limit {
                let disk = crashed(&history, at, crash, &mut odometer);
                if seen.insert((disk.hash(), noted, crash == Crash::Kill)) {
                    judged += 1;
                    state.tally.count(crash, &disk);
                    let result = state.reopen(&disk, (at, crash, true), false, 7);
                    result.map_err(|why| violation(state.explain(at, crash, &why)))?;
                }
                if !odometer.advance() {
                    break;
                }
            }
        }
    }
    Ok(judged)
}

/// Crashes while an image is made, and after: before the making has answered there may be anything but a wrong image,
/// after it there must be an image of empty zones. Returns how many states there were.
pub fn creation(options: &CreateOptions, lie: Option<Lie>, seed: u64, states: u64) -> Result<u64, String> {
    let runtime = runtime();
    let behaviour = Behaviour {
        lie,
        ..Behaviour::default()
    };
    let (events, made) = record_creation(&runtime, options, behaviour, seed)?;
    for number in 0..states {
        let mut rng = Rng::biased(mix(seed, number));
        let at = rng.below(events.len() as u64 + 1) as usize;
        let mut disk = Disk::default();
        events[..at]
            .iter()
            .for_each(|recorded| disk.apply(&recorded.event));
        let power = rng.one_in(2);
        let disk = if power {
            disk.power_cut(&mut rng)
        } else {
            disk.kill(&mut rng, false)
        };
        let plan = Plan {
            clients: 0,
            touch: true,
            ..Plan::new(Mix::DATA, 0, 0)
        };
        let mut empty =
            |view: &View, _: &[String]| match view.zones.iter().find(|zone| zone.written_end != zone.start) {
                Some(zone) => Err(format!("zone {} of a new image is not empty", zone.zone)),
                None => Ok(()),
            };
        let opened = record(&runtime, &disk, &plan, number, 1, &mut empty);
        let answered = events.get(at).is_none_or(|event| event.tick > made);
        match opened {
            Err(why) if answered || !why.starts_with("the image does not open") => {
                return Err(format!(
                    "state {number} of seed {seed:#x}, event {at} of {}: {why}",
                    events.len()
                ));
            }
            _ => {}
        }
    }
    Ok(states)
}

/// How many requests and answers there were: states that look the same but follow different promises differ.
fn notes_before(history: &History, tick: u64) -> usize {
    let answered = |op: &super::oracle::Op| op.done.is_some_and(|(at, _)| at < tick);
    let oracle = &history.oracle;
    let phase = usize::from(oracle.opened < tick) + usize::from(oracle.closing.is_some_and(|at| at < tick));
    oracle
        .ops
        .iter()
        .map(|op| usize::from(op.submitted < tick) + usize::from(answered(op)))
        .sum::<usize>()
        * 4
        + phase
}

/// Mixes and sizes for the cases of the tests.
impl Plan {
    /// Some clients with a bit of everything; the run state beside the image, not mapped.
    pub fn new(mix: Mix, clients: u32, requests: u32) -> Plan {
        Plan {
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
