//! Is what a reopened image shows allowed, after what its clients were told?

use zbdkit_zone::{Condition, ZoneInfo, ZoneNo, ZoneType};

use super::oracle::{Answer, Baseline, Found, Kind, Op, Oracle, PIECE, Setting, look};

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

/// Judges all zones.
pub fn judge(oracle: &Oracle, at: Moment, view: &View) -> Verdict {
    let judge = Judge {
        oracle,
        at,
        flushed: last_flush(oracle, at.tick),
    };
    ensure!(
        view.zones.len() == oracle.baseline.zones.len(),
        "{} zones instead of {}",
        view.zones.len(),
        oracle.baseline.zones.len()
    );
    for zone in 0..view.zones.len() {
        judge
            .zone(zone, &view.zones[zone], view.contents[zone].as_deref())
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
}

impl<'a> Judge<'a> {
    fn zone(&self, zone: usize, info: &ZoneInfo, contents: Option<&[u8]>) -> Verdict {
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
        match info.kind {
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

    /// A finish records the written end, over everything acknowledged before.
    fn finished_after(&self, write: &Op, at: u64) -> bool {
        self.ops(write.zone as usize)
            .any(|op| op.kind == Kind::Finish && op.submitted > at && op.acknowledged(self.at.tick).is_some())
    }

    fn counters(&self, zone: usize, info: &ZoneInfo) -> Verdict {
        let before = self.oracle.baseline.zones[zone].counters;
        let tick = self.at.tick;
        let is_reset = |op: &Op| matches!(op.kind, Kind::Reset | Kind::ResetAll);
        let is_finish = |op: &Op| op.kind == Kind::Finish;
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
        let finishes = || self.ops(zone).filter(|op| op.kind == Kind::Finish);
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
        let expected = if written == capacity || must {
            Condition::Full
        } else if info.condition == Condition::Full && may {
            Condition::Full
        } else if written == 0 {
            Condition::Empty
        } else {
            Condition::Closed
        };
        ensure!(
            info.condition == expected,
            "it is {} with {written} bytes written, and should be {expected}",
            info.condition
        );
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
        let ordered = info.kind == ZoneType::SequentialRequired;
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

    /// The zone holds whole writes of its generation, end to end, then zeros.
    fn sequential(&self, zone: usize, info: &ZoneInfo, contents: Option<&[u8]>) -> Verdict {
        let (tick, generation) = (self.at.tick, info.counters.resets);
        let before = &self.oracle.baseline.zones[zone];
        let same = before.counters.resets == generation;
        let kept = if same {
            before.written_end - before.start
        } else {
            0
        };
        let end = info.written_end - info.start;
        let block = u64::from(self.oracle.geometry.block_size());
        ensure!(
            end <= info.capacity && end % block == 0,
            "its written end is at {end}, which no zone can have"
        );
        ensure!(
            end >= kept,
            "{kept} bytes were there at the last opening, now {end}"
        );
        let Some(contents) = contents else { return Ok(()) };
        let mut found: Vec<(*const Op, u64)> = Vec::new();
        let mut at = 0;
        while at < end {
            if at < kept
                && let Some(old) = &self.oracle.baseline.contents[zone]
            {
                let range = at as usize..kept as usize;
                ensure!(
                    contents[range.clone()] == old[range],
                    "what was durable at the last opening changed"
                );
                at = kept;
                continue;
            }
            if at < kept {
                // It was offline at the last opening: nobody knows what it held.
                at = kept;
                continue;
            }
            let op = self.write_at(zone, generation, info.start + at, &contents[at as usize..])?;
            let Kind::Write { id, len, zeros, .. } = op.kind else {
                unreachable!("write_at gives writes")
            };
            ensure!(
                op.may_be_of(generation, tick),
                "at {at} lies write {id} of another generation ({:?}, not {generation})",
                op.generations(tick)
            );
            ensure!(
                at + len <= end,
                "at {at} lies write {id}, which is cut off by the written end {end}"
            );
            ensure!(
                holds(&contents[at as usize..(at + len) as usize], id, zeros),
                "at {at} lies write {id} ({len} bytes), but not all of it"
            );
            found.push((op, at));
            at += len;
        }
        self.zeros_above(contents, end)?;
        for op in self.ops(zone) {
            let Kind::Write {
                id,
                offset: Some(offset),
                len,
                ..
            } = op.kind
            else {
                continue;
            };
            if !(self.required(op) && op.is_of(generation, tick)) {
                continue;
            }
            let at = offset - info.start;
            ensure!(
                at + len <= end,
                "write {id} at {at} ({len} bytes) was promised, but the written end is {end}"
            );
            ensure!(
                found.contains(&(std::ptr::from_ref(op), at)),
                "write {id} at {at} was promised, but something else is there"
            );
        }
        Ok(())
    }

    /// Which write begins here.
    fn write_at(&self, zone: usize, generation: u32, offset: u64, contents: &[u8]) -> Result<&'a Op, String> {
        let place = offset - self.oracle.geometry.start(ZoneNo(zone as u32));
        match look(&contents[..PIECE]) {
            Found::Stamp { id, index: 0 } => {
                let op = self.oracle.writes.get(&id).map(|op| &self.oracle.ops[*op]);
                let op = op.ok_or_else(|| format!("at {place} lies write {id}, of an earlier run"))?;
                let Kind::Write { offset: given, .. } = op.kind else {
                    return Err(format!("stamp {id} is no write's"));
                };
                // Of an append that was not answered nobody knows the place; what was answered later is known.
                let known = given.filter(|_| op.acknowledged(self.at.tick).is_some());
                if op.zone as usize != zone || known.is_some_and(|given| given != offset) {
                    return Err(format!(
                        "at {place} lies write {id}, which belongs to zone {} at {given:?}",
                        op.zone
                    ));
                }
                if !op.may_count(self.at.tick) {
                    return Err(format!(
                        "at {place} lies write {id}, which was refused or not sent yet"
                    ));
                }
                Ok(op)
            }
            Found::Zeros => self
                .zeros_at(zone, generation, offset, contents)
                .ok_or_else(|| format!("at {place} are zeros below the written end, which nobody wrote")),
            other => Err(format!("at {place} begins no write: {other:?}")),
        }
    }

    /// Which write of zeros begins here: they have no stamps, so one that was answered comes first, then one that
    /// another write follows.
    fn zeros_at(&self, zone: usize, generation: u32, offset: u64, contents: &[u8]) -> Option<&'a Op> {
        let len_of = |op: &Op| match op.kind {
            Kind::Write {
                offset: Some(at),
                len,
                zeros: true,
                ..
            } if at == offset => Some(len as usize),
            _ => None,
        };
        let followed = |op: &Op| {
            len_of(op)
                .and_then(|len| contents.get(len..len + PIECE))
                .is_some_and(|next| matches!(look(next), Found::Stamp { index: 0, .. }))
        };
        let tick = self.at.tick;
        let fits = |op: &&Op| len_of(op).is_some() && op.may_be_of(generation, tick);
        let candidates = || self.ops(zone).filter(fits);
        candidates()
            .rfind(|op| op.acknowledged(self.at.tick).is_some())
            .or_else(|| candidates().find(|op| followed(op)))
            .or_else(|| candidates().next())
    }

    fn zeros_above(&self, contents: &[u8], end: u64) -> Verdict {
        let rest = &contents[end as usize..];
        ensure!(
            rest.chunks(PIECE).all(|sector| look(sector) == Found::Zeros),
            "above the written end ({end}) are no zeros"
        );
        Ok(())
    }

    /// Writes anywhere, but a pointer at the highest end.
    fn preferred(&self, zone: usize, info: &ZoneInfo, contents: Option<&[u8]>) -> Verdict {
        let (tick, generation) = (self.at.tick, info.counters.resets);
        let before = &self.oracle.baseline.zones[zone];
        let end = info.written_end - info.start;
        let kept = match before.counters.resets == generation {
            true => before.written_end - before.start,
            false => 0,
        };
        let ends = |of: &dyn Fn(&Op) -> bool| {
            let writes = self.ops(zone).filter(|op| of(op));
            writes
                .filter_map(|op| match op.kind {
                    Kind::Write {
                        offset: Some(offset),
                        len,
                        ..
                    } => Some(offset - info.start + len),
                    _ => None,
                })
                .collect::<Vec<u64>>()
        };
        let least = ends(&|op| self.required(op) && op.is_of(generation, tick));
        let least = least.into_iter().max().unwrap_or(0).max(kept);
        ensure!(
            end >= least,
            "its written end is {end}, but {least} bytes were promised"
        );
        let possible = ends(&|op| op.may_be_of(generation, tick));
        ensure!(
            end == kept || possible.contains(&end),
            "its written end {end} is no end of a write"
        );
        let Some(contents) = contents else { return Ok(()) };
        self.sectors(zone, info, &contents[..end as usize])?;
        self.zeros_above(contents, end)
    }

    /// Each sector holds the last write that covers it, or one that may have come after that.
    fn sectors(&self, zone: usize, info: &ZoneInfo, contents: &[u8]) -> Verdict {
        let covering: Vec<(&Op, u64, u64)> = self
            .oracle
            .ops
            .iter()
            .filter(|op| op.may_count(self.at.tick))
            .filter(|op| {
                op.may_be_of(info.counters.resets, self.at.tick) || info.kind == ZoneType::Conventional
            })
            .filter_map(|op| match op.kind {
                Kind::Write {
                    offset: Some(offset),
                    len,
                    ..
                }
                | Kind::Discard { offset, len } => Some((op, offset, offset + len)),
                _ => None,
            })
            .filter(|(_, start, end)| *start < info.start + info.len && *end > info.start)
            .collect();
        for (number, sector) in contents.chunks_exact(PIECE).enumerate() {
            let at = info.start + (number * PIECE) as u64;
            let here: Vec<&Op> = covering
                .iter()
                .filter(|(_, start, end)| (*start..*end).contains(&at))
                .map(|(op, ..)| *op)
                .collect();
            self.sector(zone, info, at, sector, &here)
                .map_err(|why| format!("at {}: {why}", at - info.start))?;
        }
        Ok(())
    }

    fn sector(&self, zone: usize, info: &ZoneInfo, at: u64, sector: &[u8], here: &[&Op]) -> Verdict {
        let (tick, generation) = (self.at.tick, info.counters.resets);
        let ordered = info.kind != ZoneType::Conventional;
        // The promised write that came after `done` for sure.
        let later = |done: u64| {
            here.iter().find(|op| {
                matches!(op.kind, Kind::Write { .. })
                    && self.required(op)
                    && op.submitted > done
                    && (!ordered || op.is_of(generation, tick))
            })
        };
        let ended = |op: &Op| op.done.map_or(u64::MAX, |(at, _)| at);
        let before = &self.oracle.baseline.zones[zone];
        let same = !ordered || before.counters.resets == generation;
        let offset = (at - info.start) as usize;
        let old = self.oracle.baseline.contents[zone]
            .as_ref()
            .map(|old| &old[offset..offset + PIECE]);
        // It was offline at the last opening: anything that could be read again.
        let unknown = old.is_none() && same;
        if same && old == Some(sector) && later(0).is_none() || unknown {
            return Ok(());
        }
        match look(sector) {
            Found::Zeros => {
                let from_reset = ordered && !same && later(0).is_none();
                let zeroed = here.iter().any(|op| {
                    matches!(op.kind, Kind::Write { zeros: true, .. } | Kind::Discard { .. })
                        && later(ended(op)).is_none()
                });
                ensure!(
                    from_reset || zeroed,
                    "zeros, but {:?} should be there",
                    later(0).map(|op| &op.kind)
                );
                Ok(())
            }
            Found::Stamp { id, index } => {
                let op = here
                    .iter()
                    .find(|op| matches!(op.kind, Kind::Write { id: own, .. } if own == id))
                    .ok_or_else(|| format!("write {id}, which does not belong there now"))?;
                let Kind::Write {
                    offset: Some(start), ..
                } = op.kind
                else {
                    return Err(format!("write {id} has no place"));
                };
                ensure!(
                    u64::from(index) == (at - start) / PIECE as u64,
                    "sector {index} of write {id}, which belongs elsewhere"
                );
                let overwritten = later(ended(op));
                ensure!(
                    overwritten.is_none(),
                    "write {id}, but {:?} came after it",
                    overwritten.map(|op| &op.kind)
                );
                Ok(())
            }
            Found::Garbage => Err("bytes that nobody wrote".into()),
        }
    }
}

fn holds(bytes: &[u8], id: u32, zeros: bool) -> bool {
    bytes.chunks_exact(PIECE).enumerate().all(|(i, sector)| {
        look(sector)
            == if zeros {
                Found::Zeros
            } else {
                Found::Stamp { id, index: i as u32 }
            }
    })
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
