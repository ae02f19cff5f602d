//! Is what a reopened image shows allowed, after what its clients were told?

mod contents;
mod window;

use zbdkit_zone::{Condition, ZoneInfo, ZoneNo, ZoneType};

use crate::crash::oracle::{Answer, Baseline, Fill, Kind, Op, Oracle, Setting};

/// What acknowledgements were worth at the crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Promise {
    /// What was acknowledged before a flush that completed was submitted.
    Flushed,
    /// That, and every acknowledged write to zones whose pointer moves over each of them.
    Sequential,
    /// Every acknowledged write.
    Acknowledged,
}

/// A moment and what was promised then.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Requests and answers before this tick happened.
    pub tick: u64,
    /// What they were worth.
    pub promise: Promise,
}

/// What the reopened image shows.
pub type View = Baseline;

/// Why it is not allowed.
pub type Verdict = Result<(), String>;

macro_rules! ensure {
    ($condition:expr, $($text:tt)*) => {
        if !$condition {
            return Err(format!($($text)*));
        }
    };
}

use ensure;

/// Judges all zones.
pub fn judge(oracle: &Oracle, at: Moment, view: &View) -> Verdict {
    let judge = Judge {
        oracle,
        at,
        flushed: last_flush(oracle, at.tick),
        block_size: view.block_size,
    };
    judge.format(view)?;
    ensure!(
        view.zones.len() == oracle.baseline.zones.len(),
        "{} zones instead of {}",
        view.zones.len(),
        oracle.baseline.zones.len()
    );
    for zone in 0..view.zones.len() {
        judge
            .zone(zone, view)
            .map_err(|why| format!("zone {zone}: {why}\n  it shows {:?}", view.zones[zone]))?;
    }
    Ok(())
}

/// What was acknowledged before this tick was flushed.
fn last_flush(oracle: &Oracle, tick: u64) -> u64 {
    let flushes = oracle.ops.iter().filter(|op| op.kind == Kind::Flush);
    flushes
        .filter(|op| op.acknowledged(tick).is_some())
        .map(|op| op.submitted)
        .max()
        .unwrap_or(0)
}

struct Judge<'a> {
    oracle: &'a Oracle,
    at: Moment,
    flushed: u64,
    /// What blocks have now.
    block_size: u32,
}

impl<'a> Judge<'a> {
    /// The block size is that of the last format that was acknowledged, or of a later one that was not; and then that one has
    /// erased every zone.
    fn format(&self, view: &View) -> Verdict {
        let (oracle, tick) = (self.oracle, self.at.tick);
        let mut known = oracle.baseline.block_size;
        let mut open = Vec::new();
        for (op, size) in &oracle.formats {
            let op = &oracle.ops[*op];
            if op.acknowledged(tick).is_some() {
                known = *size;
                open.clear();
            } else if op.may_count(tick) {
                open.push((op, *size));
            }
        }
        if self.block_size == known {
            return Ok(());
        }
        let Some((format, _)) = open.into_iter().find(|(_, size)| *size == self.block_size) else {
            return Err(format!("blocks of {} bytes, not of {known}", self.block_size));
        };
        for (zone, info) in view.zones.iter().enumerate() {
            let generation = info.counters.resets;
            let before = &oracle.baseline.zones[zone];
            let held = before.written_end > before.start && before.counters.resets == generation;
            let mut writes = self.ops(zone).filter(|op| matches!(op.kind, Kind::Write { .. }));
            let wrote =
                writes.any(|op| op.acknowledged(format.submitted).is_some() && op.is_of(generation, tick));
            ensure!(
                !held && !wrote,
                "zone {zone}: it was not erased, but blocks are of {} bytes",
                self.block_size
            );
        }
        Ok(())
    }

    fn zone(&self, zone: usize, view: &View) -> Verdict {
        let (info, contents) = (&view.zones[zone], view.contents[zone].as_deref());
        let before = &self.oracle.baseline.zones[zone];
        ensure!(
            (info.zone, info.start, info.len, info.capacity, info.kind)
                == (
                    before.zone,
                    before.start,
                    before.len,
                    before.capacity,
                    before.kind
                ),
            "its shape changed"
        );
        self.counters(zone, info)?;
        self.condition(zone, info)?;
        ensure!(
            contents.is_some() != (info.condition == Condition::Offline),
            "it can be read although offline, or cannot although it is not"
        );
        self.bytes_written(zone, info)?;
        self.attributes(zone, info)?;
        self.extension(zone, info, view.extensions[zone].as_deref())?;
        match info.kind {
            ZoneType::SequentialRequired if self.has_window(zone, info) => self.window(zone, info, contents),
            ZoneType::Conventional => contents.map_or(Ok(()), |contents| self.sectors(zone, info, contents)),
            ZoneType::SequentialRequired => self.sequential(zone, info, contents),
            ZoneType::SequentialPreferred => self.preferred(zone, info, contents),
        }
    }

    /// Requests of the zone that were submitted and may have changed something.
    fn ops(&self, zone: usize) -> impl DoubleEndedIterator<Item = &'a Op> {
        let tick = self.at.tick;
        let sequential = self.oracle.baseline.zones[zone].kind != ZoneType::Conventional;
        let of_zone = move |op: &&Op| match op.kind {
            Kind::ResetAll => sequential,
            _ => op.zone as usize == zone,
        };
        self.oracle
            .ops
            .iter()
            .filter(of_zone)
            .filter(move |op| op.may_count(tick))
    }

    /// Must the write be there (unless its zone was reset since)?
    fn required(&self, op: &Op) -> bool {
        let Some(at) = op.acknowledged(self.at.tick) else {
            return false;
        };
        let worth = match self.oracle.geometry.zone_type(ZoneNo(op.zone)) {
            ZoneType::SequentialRequired => Promise::Sequential,
            _ => Promise::Acknowledged,
        };
        self.at.promise >= worth || at < self.flushed || self.finished_after(op, at)
    }

    /// A mark of blocks that could be read already lasts from its acknowledgement on, whatever was flushed.
    fn is_durable_mark(&self, op: &Op) -> bool {
        let marks = matches!(
            op.kind,
            Kind::Write {
                fill: Fill::Unreadable,
                ..
            }
        );
        marks && op.acknowledged(self.at.tick).is_some()
    }

    /// A finish records the written end, over everything acknowledged before.
    fn finished_after(&self, write: &Op, at: u64) -> bool {
        self.ops(write.zone as usize)
            .any(|op| op.kind.is_finish() && op.submitted > at && op.acknowledged(self.at.tick).is_some())
    }

    fn counters(&self, zone: usize, info: &ZoneInfo) -> Verdict {
        let before = self.oracle.baseline.zones[zone].counters;
        let tick = self.at.tick;
        let is_reset = |op: &Op| matches!(op.kind, Kind::Reset | Kind::ResetAll);
        let is_finish = |op: &Op| op.kind.is_finish();
        let open = |of: &dyn Fn(&Op) -> bool| {
            self.ops(zone).filter(|op| of(op) && op.open_ended(tick)).count() as u32
        };
        // What anybody saw of a counter was durable.
        let (mut resets, mut finishes) = (before.resets, before.finishes);
        for op in self.ops(zone).filter(|op| op.zone as usize == zone) {
            resets = resets.max(op.at_submission.resets);
            finishes = finishes.max(op.at_submission.finishes);
            if op.done.is_some_and(|(at, _)| at < tick) {
                resets = resets.max(op.at_answer.resets);
                finishes = finishes.max(op.at_answer.finishes);
            }
        }
        for (_, _, seen) in self
            .oracle
            .seen
            .iter()
            .filter(|(at, of, _)| *at < tick && *of as usize == zone)
        {
            resets = resets.max(seen.resets);
            finishes = finishes.max(seen.finishes);
        }
        // And what happened for sure must count, whatever was seen.
        resets = resets.max(before.resets + self.certain_resets(zone));
        let got = info.counters;
        ensure!(
            got.resets >= resets && got.resets <= resets + open(&is_reset),
            "{} resets, but {resets} were acknowledged and {} more are possible",
            got.resets,
            open(&is_reset)
        );
        ensure!(
            got.finishes >= finishes && got.finishes <= finishes + open(&is_finish),
            "{} finishes, but {finishes} were acknowledged and {} more are possible",
            got.finishes,
            open(&is_finish)
        );
        let asked = |of: &dyn Fn(&Op) -> bool| self.ops(zone).filter(|op| of(op)).count() as u32;
        ensure!(
            got.resets <= before.resets + asked(&is_reset)
                && got.finishes <= before.finishes + asked(&is_finish),
            "more resets or finishes than anybody asked for: {got:?}"
        );
        Ok(())
    }

    /// Resets that came after a write and before the next, so that they cannot have been for nothing.
    fn certain_resets(&self, zone: usize) -> u32 {
        let tick = self.at.tick;
        let (mut certain, mut since) = (0, 0);
        for reset in self
            .ops(zone)
            .filter(|op| matches!(op.kind, Kind::Reset | Kind::ResetAll))
        {
            let Some(done) = reset.acknowledged(tick) else {
                continue;
            };
            let overlaps = self.ops(zone).any(|other| {
                !std::ptr::eq(other, reset)
                    && matches!(other.kind, Kind::Reset | Kind::ResetAll | Kind::Set(_))
                    && other.submitted < done
                    && other.done.is_none_or(|(at, _)| at > reset.submitted)
            });
            let written = self.ops(zone).any(|op| {
                matches!(op.kind, Kind::Write { .. })
                    && op.submitted > since
                    && op.acknowledged(tick).is_some_and(|at| at < reset.submitted)
            });
            // An all-zone reset passes over read-only zones: only certain where there is no such thing.
            let set = self.ops(zone).any(|op| matches!(op.kind, Kind::Set(_)))
                || matches!(
                    self.oracle.baseline.zones[zone].condition,
                    Condition::ReadOnly | Condition::Offline
                );
            if written && !overlaps && !(set && reset.kind == Kind::ResetAll) {
                certain += 1;
            }
            since = since.max(done);
        }
        certain
    }

    fn condition(&self, zone: usize, info: &ZoneInfo) -> Verdict {
        let before = &self.oracle.baseline.zones[zone];
        let mut settings = vec![match before.condition {
            Condition::ReadOnly => Setting::ReadOnly,
            Condition::Offline => Setting::Offline,
            _ => Setting::Normal,
        }];
        for op in self.ops(zone) {
            let Kind::Set(setting) = op.kind else { continue };
            if op.acknowledged(self.at.tick).is_some() {
                settings.clear();
            }
            settings.push(setting);
        }
        let setting = match info.condition {
            Condition::ReadOnly => Setting::ReadOnly,
            Condition::Offline => Setting::Offline,
            _ => Setting::Normal,
        };
        ensure!(
            settings.contains(&setting),
            "it is {setting:?}, but the operator set {settings:?}"
        );
        if setting != Setting::Normal || info.kind == ZoneType::Conventional {
            return Ok(());
        }
        let generation = info.counters.resets;
        let (written, capacity) = (info.written_end - info.start, info.capacity);
        let finishes = || self.ops(zone).filter(|op| op.kind.is_finish());
        let was_full = before.counters.resets == generation
            && before.condition == Condition::Full
            && before.written_end < before.start + capacity;
        let must = was_full
            || finishes()
                .any(|op| op.acknowledged(self.at.tick).is_some() && op.is_of(generation, self.at.tick));
        // A zone that was read-only or offline when this run began may have been finished before that.
        let hidden = matches!(before.condition, Condition::ReadOnly | Condition::Offline)
            && before.counters.resets == generation;
        let may = must || hidden || finishes().any(|op| op.may_be_of(generation, self.at.tick));
        let is_plain = !info.attributes.zrwa && !info.attributes.extension;
        let expected = if (written == capacity && !info.attributes.zrwa)
            || must
            || info.condition == Condition::Full && may
        {
            Condition::Full
        } else if written == 0 && is_plain {
            Condition::Empty
        } else {
            Condition::Closed
        };
        ensure!(
            info.condition == expected,
            "it is {} with {written} bytes written, and should be {expected}",
            info.condition
        );
        if info.attributes.zrwa {
            return Ok(());
        }
        let wp = if expected == Condition::Full {
            capacity
        } else {
            written
        };
        ensure!(info.wp == info.start + wp, "its pointer is at {}", info.wp);
        Ok(())
    }

    fn bytes_written(&self, zone: usize, info: &ZoneInfo) -> Verdict {
        let before = self.oracle.baseline.zones[zone].counters.bytes_written;
        let got = info.counters.bytes_written;
        let (start, end) = (info.start, info.start + info.len);
        let sum = |of: &dyn Fn(&Op) -> bool| -> u64 {
            let ops = self
                .oracle
                .ops
                .iter()
                .filter(|op| op.may_count(self.at.tick) && of(op));
            ops.map(|op| match op.kind {
                // One write may span conventional zones.
                Kind::Write {
                    offset: Some(at),
                    len,
                    ..
                } => (at + len).min(end).saturating_sub(at.max(start)),
                Kind::Write {
                    offset: None, len, ..
                } if op.zone as usize == zone => len,
                _ => 0,
            })
            .sum()
        };
        // Overwrites move no pointer, so before a flush only the bytes of growing zones are kept.
        let ordered = info.kind == ZoneType::SequentialRequired && !self.ever_had_window(zone);
        let least = sum(&|op| {
            op.acknowledged(self.at.tick).is_some_and(|at| at < self.flushed) || ordered && self.required(op)
        });
        ensure!(
            got >= before + least,
            "{got} bytes written in all, but {before} and {least} were"
        );
        let most = sum(&|_| true);
        ensure!(
            !ordered || got <= before + most,
            "{got} bytes written in all, but only {before} and {most} were asked for"
        );
        Ok(())
    }
}

/// For messages: the requests of a zone, as they stood at a moment.
pub fn history(oracle: &Oracle, tick: u64, zone: u32) -> String {
    let mut text = String::new();
    let ops = oracle.ops.iter().filter(|op| op.submitted < tick);
    for op in ops.filter(|op| op.zone == zone || matches!(op.kind, Kind::Flush | Kind::ResetAll)) {
        let end = match op.done {
            Some((at, answer)) if at < tick => {
                let word = match answer {
                    Answer::Ok => "ok",
                    Answer::Refused => "refused",
                    Answer::Failed => "failed",
                };
                format!("{word} at {at}")
            }
            _ => "in flight".to_owned(),
        };
        text += &format!(
            "\n    {:>6} {:?} (resets {} to {}): {end}",
            op.submitted, op.kind, op.at_submission.resets, op.at_answer.resets
        );
    }
    text
}
