//! Campaigns over the format by itself.

use zbdkit_io::Runtime;
use zbdkit_qcow2::Repair;

use super::state::{before, moment, tick_of};
use super::{Crash, Effort, Tally, Violation, histories, runtime};
use crate::crash::bare::{Bare, Story};
use crate::crash::choose::{Rng, mix};
use crate::crash::disk::Disk;
use crate::crash::host::{Behaviour, Lie, Role};

/// Runs a case.
pub fn bare(
    case: &Bare,
    crash: Option<Crash>,
    effort: Effort,
    seed: u64,
    replay: Option<&str>,
    tally: &mut Tally,
) -> Result<(), Violation> {
    let runtime = runtime();
    let violation = |seed, state: u64, what: String| Violation::new(case.name, seed, state, what);
    let image = case.make(&runtime).map_err(|what| violation(0, 0, what))?;
    for (seed, states) in histories(case.name, effort, seed, replay) {
        let behaviour = &case.behaviour;
        let load = (case.clients, case.requests);
        let story = case
            .record(&runtime, &image, behaviour, load, (seed, 1), &mut |_| Ok(()))
            .map_err(|what| violation(seed, 0, what))?;
        let mut run = Run {
            runtime: &runtime,
            case,
            story: &story,
            tally,
        };
        run.clean_end().map_err(|what| violation(seed, 0, what))?;
        for number in states {
            run.sample(crash, effort, mix(seed, 1 << 32 | number))
                .map_err(|what| violation(seed, number, what))?;
        }
    }
    Ok(())
}

struct Run<'a> {
    runtime: &'a Runtime,
    case: &'a Bare,
    story: &'a Story,
    tally: &'a mut Tally,
}

impl Run<'_> {
    /// A run that was closed lost nothing, not even space.
    fn clean_end(&self) -> Result<(), String> {
        if self.story.fault.is_some() || self.case.behaviour.lie.is_some() {
            return Ok(());
        }
        let (report, _) = self.case.check(self.runtime, &self.story.end, Repair::None)?;
        match report.corruptions + report.check_errors + report.leaks {
            0 => Ok(()),
            _ => Err(format!("after a clean close: {report:?}")),
        }
    }

    fn sample(&mut self, crash: Option<Crash>, effort: Effort, seed: u64) -> Result<(), String> {
        let mut rng = Rng::biased(seed);
        let crash = crash.unwrap_or_else(|| Crash::any(&mut rng));
        let at = moment(&self.story.events, &mut rng);
        let disk = self.crashed(at, crash, &mut rng);
        let again = effort.again > 0 && rng.one_in(effort.again);
        let load = if again { (2, 8) } else { (0, 0) };
        let next = self
            .judge(&disk, at, crash, load, &mut rng)
            .map_err(|why| self.explain(at, crash, &why))?;
        if !again {
            return Ok(());
        }
        let mut second = Run {
            runtime: self.runtime,
            case: self.case,
            story: &next,
            tally: self.tally,
        };
        for _ in 0..3 {
            let crash_again = Crash::any(&mut rng);
            let at_again = moment(&next.events, &mut rng);
            // An opening changes nothing that was promised, but after it all that was seen is.
            if tick_of(&next.events, at_again) <= next.log.opened {
                continue;
            }
            let disk = second.crashed(at_again, crash_again, &mut rng);
            // What was read after a kill need not be durable yet.
            if crash == Crash::Kill && crash_again == Crash::Power {
                continue;
            }
            second
                .judge(&disk, at_again, crash_again, (0, 0), &mut rng)
                .map_err(|why| {
                    let why = second.explain(at_again, crash_again, &why);
                    format!("after a second crash; the first was {crash:?} at event {at}: {why}")
                })?;
        }
        Ok(())
    }

    fn crashed(&self, at: usize, crash: Crash, rng: &mut Rng) -> Disk {
        let disk = before(
            &self.story.start,
            &self.story.events[..at],
            self.case.behaviour.lie,
        );
        let dropped = self.story.fault.is_some();
        match crash {
            Crash::Kill => disk.kill(rng, dropped),
            Crash::Power => disk.power_cut(rng),
        }
    }

    /// Checks what is left, and judges what it holds.
    fn judge(
        &mut self,
        disk: &Disk,
        at: usize,
        crash: Crash,
        load: (u32, u32),
        rng: &mut Rng,
    ) -> Result<Story, String> {
        self.tally.count(crash, disk);
        let (report, _) = self.case.check(self.runtime, disk, Repair::None)?;
        if report.corruptions + report.check_errors > 0 {
            return Err(format!("the image is corrupt: {report:?}"));
        }
        let mut disk = disk.clone();
        if rng.one_in(16) {
            self.tally.repaired += 1;
            (_, disk) = self.case.check(self.runtime, &disk, Repair::All)?;
            let (report, _) = self.case.check(self.runtime, &disk, Repair::None)?;
            if report.corruptions + report.check_errors + report.leaks > 0 {
                return Err(format!("after a repair: {report:?}"));
            }
        }
        let tick = tick_of(&self.story.events, at);
        let log = &self.story.log;
        let failed = self.story.fault.is_some_and(|fault| fault < tick);
        let promised = match crash {
            Crash::Kill if !failed => tick,
            _ => log.flushed(tick),
        };
        let behaviour = Behaviour::default();
        self.case.record(
            self.runtime,
            &disk,
            &behaviour,
            load,
            (rng.word(), self.story.next_id()),
            &mut |found| log.allows(0, found, promised, tick),
        )
    }

    fn explain(&self, at: usize, crash: Crash, why: &str) -> String {
        let mut text = format!("{crash:?} at event {at} of {}: {why}", self.story.events.len());
        for recorded in &self.story.events[at.saturating_sub(16)..at] {
            let event = format!("{:?}", recorded.event);
            let brief: String = event.chars().take(140).collect();
            text += &format!("\n  event {:>5}: {brief}", recorded.tick);
        }
        text
    }
}

/// The lies that each case must find out: syncs and writes that come late.
pub const LATE: [Lie; 2] = [Lie::LateSyncs(Role::Data, 12), Lie::LateWrites(Role::Data, 6)];
