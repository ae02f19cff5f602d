//! One crash of a history, and what is asked of what it left.

use zbdkit_block::RunStateMode;
use zbdkit_io::Runtime;

use super::{Case, Crash, Effort, Tally};
use crate::crash::choose::{Choose, Rng};
use crate::crash::disk::{Change, Disk, Event};
use crate::crash::host::{Behaviour, Fault, FaultKind, Lie, Recorded, Role};
use crate::crash::image::Prepared;
use crate::crash::judge::{Moment, Promise, View, history, judge};
use crate::crash::oracle::{Answer, Kind, Op};
use crate::crash::run::{History, Plan, record};

/// A history that crashes.
pub struct State<'a> {
    pub runtime: &'a Runtime,
    pub image: &'a Prepared,
    pub history: &'a History,
    pub tally: &'a mut Tally,
}

impl State<'_> {
    /// What a run that was closed without a fault leaves: nothing lost, not even space.
    pub fn end(&self) -> Result<(), String> {
        if self.history.oracle.closed.is_none() || self.history.fault.is_some() {
            return Ok(());
        }
        let clean = self.image.clean(self.runtime, &self.history.end);
        clean.map_err(|why| format!("after a clean close: {why}"))
    }

    /// One crash somewhere in the history.
    pub fn sample(&mut self, case: &Case, effort: Effort, seed: u64) -> Result<(), String> {
        let mut rng = Rng::biased(seed);
        let crash = case.crash.unwrap_or_else(|| Crash::any(&mut rng));
        let at = moment(&self.history.events, &mut rng);
        let disk = crashed(self.history, at, crash, &mut rng);
        let again = effort.again > 0 && rng.one_in(effort.again);
        let next = self
            .crash(&disk, (at, crash, true), again, rng.word())
            .map_err(|why| self.explain(at, crash, &why))?;
        for _ in 0..if again { 3 } else { 0 } {
            self.second((at, crash), &next, &mut rng)?;
        }
        Ok(())
    }

    /// A crash of what was done after another one, which was at event `at` of the first run.
    fn second(&mut self, (at, crash): (usize, Crash), next: &History, rng: &mut Rng) -> Result<(), String> {
        let crash_again = Crash::any(rng);
        let at_again = moment(&next.events, rng);
        let disk = crashed(next, at_again, crash_again, rng);
        let why = if tick_of(&next.events, at_again) <= next.oracle.opened {
            // The opening never answered: the image still owes what it owed before.
            let both = if crash == Crash::Power {
                Crash::Power
            } else {
                crash_again
            };
            let result = self.crash(&disk, (at, both, false), false, rng.word());
            result.err().map(|why| self.explain(at, crash, &why))
        } else {
            let mut second = State {
                runtime: self.runtime,
                image: self.image,
                history: next,
                tally: self.tally,
            };
            let result = second.crash(&disk, (at_again, crash_again, true), false, rng.word());
            result
                .err()
                .map(|why| second.explain(at_again, crash_again, &why))
        };
        let Some(why) = why else { return Ok(()) };
        Err(format!(
            "after a second crash ({crash_again:?} at event {at_again} of {}, opened at tick {}, run state {:?}; the \
             first was {crash:?} at event {at}): {why}",
            next.events.len(),
            next.oracle.opened,
            next.plan.run_state
        ))
    }

    /// Judges what a crash left: its files as they are, then what an opening makes of them.
    pub fn crash(
        &mut self,
        disk: &Disk,
        (at, crash, first): (usize, Crash, bool),
        again: bool,
        seed: u64,
    ) -> Result<History, String> {
        self.tally.count(crash, disk);
        self.image.inspect(self.runtime, disk)?;
        let of = Rng::new(seed).below(32);
        if of == 0 {
            self.image
                .snapshots_hold(self.runtime, disk, &self.image.snapshots)?;
        }
        if of < 2 && self.image.qcow2 {
            self.tally.repaired += 1;
            let repaired = self.image.repair(self.runtime, disk)?;
            let reopened = self.reopen(&repaired, (at, crash, first), again, seed);
            return reopened.map_err(|why| format!("after a repair: {why}"));
        }
        self.reopen(disk, (at, crash, first), again, seed)
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
        let tick = tick_of(&self.history.events, at);
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
            image: before.image.clone(),
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
        let next = record(
            self.runtime,
            disk,
            &plan,
            seed,
            oracle.next_id(),
            &mut |view: &View, notices| {
                judge(oracle, moment, view)?;
                self.image.drafts(disk, view, |zone| self.stale(tick, zone))?;
                self.told(moment, crash, first, view, notices)
            },
        )?;
        if next.oracle.closed.is_some() {
            let sound = self.image.inspect(self.runtime, &next.end);
            sound.map_err(|why| format!("after it was used again and closed: {why}"))?;
        }
        Ok(next)
    }

    /// Whether the drafts' table may hold a pointer from before a reset of that zone. It follows the table of our own,
    /// and the next flush but one finds it written.
    fn stale(&self, tick: u64, zone: usize) -> bool {
        let ops = &self.history.oracle.ops;
        let resets = ops.iter().filter(|op| match op.kind {
            Kind::Reset => op.zone as usize == zone,
            Kind::ResetAll => true,
            _ => false,
        });
        let flushed = |from: u64| {
            let flushes = ops
                .iter()
                .filter(move |op| op.kind == Kind::Flush && op.submitted > from);
            flushes.filter_map(|op| op.acknowledged(tick)).min()
        };
        let old = |reset: &Op| {
            let once = reset.acknowledged(tick).and_then(flushed);
            once.and_then(flushed).is_some()
        };
        resets.filter(|op| op.may_count(tick)).any(|reset| !old(reset))
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

    pub fn explain(&self, at: usize, crash: Crash, why: &str) -> String {
        let tick = tick_of(&self.history.events, at);
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

/// Somewhere in a history; sometimes right at its ends.
pub fn moment(events: &[Recorded], rng: &mut Rng) -> usize {
    let events = events.len();
    match rng.below(16) {
        0 => events,
        1 => rng.below(events.min(40) as u64 + 1) as usize,
        _ => rng.below(events as u64 + 1) as usize,
    }
}

/// Everything before this tick happened before event `at`.
pub fn tick_of(events: &[Recorded], at: usize) -> u64 {
    events.get(at).map_or(u64::MAX, |event| event.tick)
}

/// What a crash at event `at` of the history leaves.
pub fn crashed(history: &History, at: usize, crash: Crash, choose: &mut dyn Choose) -> Disk {
    let disk = before(&history.start, &history.events[..at], history.plan.behaviour.lie);
    match crash {
        Crash::Kill => disk.kill(choose, at > given_up(history)),
        Crash::Power => disk.power_cut(choose),
    }
}

/// The disk after these events, as far as a lie about its last ones lets them be.
pub fn before(start: &Disk, events: &[Recorded], lie: Option<Lie>) -> Disk {
    let mut disk = start.clone();
    let now = events.last().map_or(0, |event| event.tick);
    for recorded in events {
        if !lie.is_some_and(|lie| forgotten(&disk, recorded, lie, now)) {
            disk.apply(&recorded.event);
        }
    }
    disk
}

/// Whether the machine lied about this event, and it has not happened yet.
fn forgotten(disk: &Disk, recorded: &Recorded, lie: Lie, now: u64) -> bool {
    let of = |id: u64, role: Role| {
        let path = disk.file_of(id).and_then(|file| disk.path_of(file));
        path.is_some_and(|path| Role::of(path) == role)
    };
    match (lie, &recorded.event) {
        (Lie::LateWrites(role, ticks), Event::Completed { id, .. })
        | (Lie::LateSyncs(role, ticks), Event::Synced { id }) => recorded.tick + ticks > now && of(*id, role),
        _ => false,
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
    let invalid = |recorded: &&Recorded| {
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
pub fn promise(history: &History, tick: u64, crash: Crash) -> Promise {
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
