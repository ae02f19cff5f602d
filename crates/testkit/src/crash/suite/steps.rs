//! Snapshots made, applied and deleted between runs, and crashes in the middle of that.
//!
//! A story is a row of runs, each ended cleanly or by a crash, with a step after each. A step that a crash cuts short
//! has happened wholly or not at all, and each snapshot that is listed after it brings back what it was made of.

use zbdkit_io::Runtime;

use super::state::{before, crashed, moment, tick_of};
use super::{Case, Crash, Effort, Tally, Violation, histories, prepare, runtime};
use crate::crash::choose::{Choose, Rng};
use crate::crash::disk::Disk;
use crate::crash::image::Prepared;
use crate::crash::judge::{Moment, View, judge};
use crate::crash::run::{History, Plan, record};
use crate::crash::steps::{self, Done, Step};

/// Runs, and steps, of a story.
const STEPS: u64 = 6;
/// Snapshots that an image has at most.
const MOST: usize = 3;

/// Tells stories about a case's image; `effort.states` are those of each step.
pub fn offline(
    case: &Case,
    effort: Effort,
    seed: u64,
    replay: Option<&str>,
    tally: &mut Tally,
) -> Result<(), Violation> {
    let runtime = runtime();
    let image = prepare(&runtime, case)?;
    for (seed, states) in histories(case.name, effort, seed, replay) {
        let mut story = Story {
            runtime: &runtime,
            case,
            image: image.clone(),
            rng: Rng::new(seed),
            tally: &mut *tally,
            lost: false,
        };
        // A story is replayed whole: each step begins where the one before it ended.
        let states = if replay.is_some() {
            effort.states
        } else {
            states.end
        };
        story
            .tell(states)
            .map_err(|what| Violation::new(case.name, seed, 0, what))?;
    }
    Ok(())
}

struct Story<'a> {
    runtime: &'a Runtime,
    case: &'a Case,
    /// The image as it is by now, with its snapshots.
    image: Prepared,
    rng: Rng,
    tally: &'a mut Tally,
    /// Clusters may have been lost, as a crash may do.
    lost: bool,
}

/// How a run ended: what it left, and what the image owes.
struct Ended {
    history: History,
    crash: Option<(usize, Crash)>,
}

impl Story<'_> {
    fn tell(&mut self, states: u64) -> Result<(), String> {
        for number in 0..STEPS {
            let ended = self.run().map_err(|why| format!("run {number}: {why}"))?;
            let step = self.choose(number);
            self.step(&ended, &step, states).map_err(|why| {
                format!(
                    "step {number}, {step:?}, after a run that ended by {:?}: {why}",
                    ended.crash
                )
            })?;
        }
        Ok(())
    }

    /// Clients use the image for a while; then it is closed, or crashes.
    fn run(&mut self) -> Result<Ended, String> {
        let seed = self.rng.word();
        let plan = Plan {
            image: self.image.path.clone(),
            ..self.case.plan.clone()
        };
        let history = record(
            self.runtime,
            &self.image.disk,
            &plan,
            seed,
            self.image.first_id,
            &mut |_, _| Ok(()),
        )?;
        self.image.first_id = history.oracle.next_id();
        let crash = self.rng.one_in(3).then(|| Crash::any(&mut self.rng));
        let Some(crash) = crash else {
            self.image.disk = history.end.clone();
            if !self.lost {
                self.image.clean(self.runtime, &self.image.disk)?;
            }
            return Ok(Ended { history, crash: None });
        };
        let at = moment(&history.events, &mut self.rng);
        self.image.disk = crashed(&history, at, crash, &mut self.rng);
        self.lost = true;
        Ok(Ended {
            history,
            crash: Some((at, crash)),
        })
    }

    fn choose(&mut self, number: u64) -> Step {
        let names: Vec<&String> = self.image.snapshots.iter().map(|(name, _)| name).collect();
        let some = |rng: &mut Rng| names[rng.below(names.len() as u64) as usize].clone();
        match self.rng.below(4) {
            _ if names.is_empty() => Step::Create(format!("step{number}")),
            0 => Step::Delete(some(&mut self.rng)),
            1 | 2 if names.len() < MOST => Step::Create(format!("step{number}")),
            _ => Step::Apply(some(&mut self.rng)),
        }
    }

    /// Takes the step, and crashes it many times. The story goes on after the step, or after one of the crashes.
    fn step(&mut self, ended: &Ended, step: &Step, states: u64) -> Result<(), String> {
        let behaviour = self.case.plan.behaviour.clone();
        let seed = self.rng.word();
        let start = self.image.disk.clone();
        self.image.inspect(self.runtime, &start)?;
        let done = steps::record(
            self.runtime,
            &start,
            &self.image.path,
            behaviour,
            seed,
            step,
            &mut |view| ended.owes(view, None),
        )?;
        let after = self.expected(step, &done)?;
        steps::same(&after, &done.after).map_err(|why| format!("when it was done: {why}"))?;
        if !self.lost {
            self.image.clean(self.runtime, &done.end)?;
        }
        let mut next = None;
        for _ in 0..states {
            let crash = self.case.crash.unwrap_or_else(|| Crash::any(&mut self.rng));
            let at = moment(&done.events, &mut self.rng);
            let left = self.crashed(&done, at, crash);
            let found = self
                .judge(ended, step, &done, (at, crash), &left)
                .map_err(|why| format!("{crash:?} at event {at} of {} : {why}", done.events.len()))?;
            next = Some((left, found));
        }
        match next.filter(|_| self.rng.one_in(3)) {
            Some((left, found)) => {
                self.image.disk = left;
                self.lost = true;
                self.settle(step, &done, found);
            }
            None => {
                self.image.disk = done.end.clone();
                self.settle(step, &done, Found::After);
            }
        }
        Ok(())
    }

    /// What the image must show after the step.
    fn expected(&self, step: &Step, done: &Done) -> Result<View, String> {
        let names = |snapshots: &[(String, View)]| -> Vec<String> {
            snapshots.iter().map(|(name, _)| name.clone()).collect()
        };
        let (before, mut after) = (names(&self.image.snapshots), names(&self.image.snapshots));
        let view = match step {
            Step::Create(name) => {
                after.push(name.clone());
                done.before.clone()
            }
            Step::Delete(name) => {
                after.retain(|other| other != name);
                done.before.clone()
            }
            Step::Apply(name) => self
                .image
                .snapshots
                .iter()
                .find(|(other, _)| other == name)
                .map(|(_, view)| view.clone())
                .ok_or("the story knows no such snapshot")?,
        };
        for (what, listed, expected) in [
            ("before", &done.listed_before, &before),
            ("after", &done.listed_after, &after),
        ] {
            if listed != expected {
                return Err(format!(
                    "snapshots {what} the step: {listed:?} instead of {expected:?}"
                ));
            }
        }
        Ok(view)
    }

    fn crashed(&mut self, done: &Done, at: usize, crash: Crash) -> Disk {
        let lie = self.case.plan.behaviour.lie;
        let disk = before(&done.start, &done.events[..at], lie);
        match crash {
            Crash::Kill => disk.kill(&mut self.rng, false),
            Crash::Power => disk.power_cut(&mut self.rng),
        }
    }

    /// Whether what the crash left is the image before the step or after it, with all its snapshots.
    fn judge(
        &mut self,
        ended: &Ended,
        step: &Step,
        done: &Done,
        (at, crash): (usize, Crash),
        left: &Disk,
    ) -> Result<Found, String> {
        self.tally.count(crash, left);
        self.image.inspect(self.runtime, left)?;
        let repaired;
        let mut disk = left;
        if self.rng.one_in(8) {
            self.tally.repaired += 1;
            repaired = self.image.repair(self.runtime, left)?;
            disk = &repaired;
        }
        let (view, listed) = steps::look_again(self.runtime, disk, &self.image.path)?;
        let tick = tick_of(&done.events, at);
        let was = steps::same(&done.before, &view);
        let is = steps::same(&done.after, &view);
        let before = was.is_ok() && listed == done.listed_before;
        let after = is.is_ok() && listed == done.listed_after;
        let opening = tick <= done.opened;
        let found = if after && tick > done.opened {
            Found::After
        } else if before && tick <= done.answered {
            Found::Before
        } else if opening && listed == done.listed_before {
            // The image owes what it owed when the run before ended.
            ended.owes(&view, Some(crash))?;
            Found::Other(view)
        } else if tick > done.answered {
            return Err(format!(
                "it was answered, but {}",
                is.err().unwrap_or(format!("{listed:?}"))
            ));
        } else {
            return Err(format!(
                "neither before ({}) nor after ({}); its snapshots are {listed:?}",
                was.err().unwrap_or_default(),
                is.err().unwrap_or_default()
            ));
        };
        if self.rng.one_in(6) {
            let snapshots = self.snapshots(step, done, &listed);
            self.image.snapshots_hold(self.runtime, disk, &snapshots)?;
        }
        Ok(found)
    }

    /// The snapshots of these names, with what they bring back.
    fn snapshots(&self, step: &Step, done: &Done, listed: &[String]) -> Vec<(String, View)> {
        let mut all = self.image.snapshots.clone();
        if let Step::Create(name) = step {
            all.push((name.clone(), done.before.clone()));
        }
        all.retain(|(name, _)| listed.contains(name));
        all
    }

    /// The story goes on from there.
    fn settle(&mut self, step: &Step, done: &Done, found: Found) {
        let listed = match found {
            Found::After => &done.listed_after,
            Found::Before | Found::Other(_) => &done.listed_before,
        };
        self.image.snapshots = self.snapshots(step, done, listed);
    }
}

/// What a crash in a step left.
enum Found {
    Before,
    After,
    /// The opening before the step was cut short, after a run that had crashed.
    Other(#[expect(dead_code, reason = "for a look at it")] View),
}

impl Ended {
    /// Whether the image shows what the run owes: of a clean one all, of a crash what is left of it then, and after
    /// `another` crash while it was opened for the first time since.
    fn owes(&self, view: &View, another: Option<Crash>) -> Result<(), String> {
        let Some((at, crash)) = self.crash else {
            let all = Moment {
                tick: u64::MAX,
                promise: crate::crash::judge::Promise::Acknowledged,
            };
            return judge(&self.history.oracle, all, view);
        };
        let tick = tick_of(&self.history.events, at);
        let worst = match another {
            Some(Crash::Power) => Crash::Power,
            _ => crash,
        };
        let moment = Moment {
            tick,
            promise: super::state::promise(&self.history, tick, worst),
        };
        judge(&self.history.oracle, moment, view)
    }
}
