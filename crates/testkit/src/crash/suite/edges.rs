//! Every crash of a short history, and crashes while an image is made.

use std::collections::HashSet;

use super::state::{State, crashed, tick_of};
use super::{Case, Crash, Tally, Violation, plan_of, prepare, runtime};
use crate::crash::choose::{Choose, Odometer, Rng, mix};
use crate::crash::disk::Disk;
use crate::crash::host::{Behaviour, Lie};
use crate::crash::image::Image;
use crate::crash::judge::View;
use crate::crash::oracle::Op;
use crate::crash::run::{History, Plan, record, record_creation};
use crate::crash::workload::Mix;

/// All crashes at all events of one short history, with every change there or not. Returns how many there were.
pub fn exhaust(case: &Case, seed: u64, limit: u64, tally: &mut Tally) -> Result<u64, Violation> {
    let runtime = runtime();
    let image = prepare(&runtime, case)?;
    let violation = |what: String| Violation::new(case.name, seed, 0, what);
    let plan = plan_of(case, &image, seed);
    let history = record(&runtime, &image.disk, &plan, seed, image.first_id, &mut |_, _| {
        Ok(())
    })
    .map_err(violation)?;
    let mut state = State {
        runtime: &runtime,
        image: &image,
        history: &history,
        tally,
    };
    let mut seen = HashSet::new();
    let mut judged = 0;
    for at in 0..=history.events.len() {
        let noted = notes_before(&history, tick_of(&history.events, at));
        for crash in [Crash::Kill, Crash::Power] {
            let mut odometer = Odometer::default();
            for _ in 0..limit {
                let disk = crashed(&history, at, crash, &mut odometer);
                if seen.insert((disk.hash(), noted, crash == Crash::Kill)) {
                    judged += 1;
                    let result = state.crash(&disk, (at, crash, true), false, judged);
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
pub fn creation(image: &Image, lie: Option<Lie>, seed: u64, states: u64) -> Result<u64, String> {
    let runtime = runtime();
    let behaviour = Behaviour {
        lie,
        ..Behaviour::default()
    };
    let (path, events, made) = record_creation(&runtime, image, behaviour, seed)?;
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
            image: path.clone(),
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
    let answered = |op: &Op| op.done.is_some_and(|(at, _)| at < tick);
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
