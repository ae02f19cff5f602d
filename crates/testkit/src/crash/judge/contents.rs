//! What the zones hold, sector by sector.

use zbdkit_zone::{ZoneInfo, ZoneNo, ZoneType};

use super::{Judge, Verdict, ensure};
use crate::crash::oracle::{Fill, Found, Kind, Op, PIECE, look};

impl<'a> Judge<'a> {
    /// The zone holds whole writes of its generation, end to end, then zeros.
    pub(super) fn sequential(&self, zone: usize, info: &ZoneInfo, contents: Option<&[u8]>) -> Verdict {
        let (tick, generation) = (self.at.tick, info.counters.resets);
        let before = &self.oracle.baseline.zones[zone];
        let same = before.counters.resets == generation;
        let kept = if same {
            before.written_end - before.start
        } else {
            0
        };
        let end = info.written_end - info.start;
        ensure!(
            end <= info.capacity && end.is_multiple_of(self.block_size.into()),
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
            let Kind::Write { id, len, fill, .. } = op.kind else {
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
                holds(&contents[at as usize..(at + len) as usize], id, fill),
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
                .unstamped_at(zone, generation, offset, contents, Fill::Zeros)
                .ok_or_else(|| format!("at {place} are zeros below the written end, which nobody wrote")),
            Found::Unreadable => self
                .unstamped_at(zone, generation, offset, contents, Fill::Unreadable)
                .ok_or_else(|| format!("at {place} nothing can be read, and nobody marked it")),
            other => Err(format!("at {place} begins no write: {other:?}")),
        }
    }

    /// Which write of zeros, or of nothing, begins here: they have no stamps, so one that was answered comes first, then one
    /// that another write follows.
    fn unstamped_at(
        &self,
        zone: usize,
        generation: u32,
        offset: u64,
        contents: &[u8],
        wanted: Fill,
    ) -> Option<&'a Op> {
        let len_of = |op: &Op| match op.kind {
            Kind::Write {
                offset: Some(at),
                len,
                fill,
                ..
            } if at == offset && fill == wanted => Some(len as usize),
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

    pub(super) fn zeros_above(&self, contents: &[u8], end: u64) -> Verdict {
        let rest = &contents[end as usize..];
        ensure!(
            rest.chunks(PIECE).all(|sector| look(sector) == Found::Zeros),
            "above the written end ({end}) are no zeros"
        );
        Ok(())
    }

    /// Writes anywhere, but a pointer at the highest end.
    pub(super) fn preferred(&self, zone: usize, info: &ZoneInfo, contents: Option<&[u8]>) -> Verdict {
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
    pub(super) fn sectors(&self, zone: usize, info: &ZoneInfo, contents: &[u8]) -> Verdict {
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
                    && (self.required(op) || self.is_durable_mark(op))
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
                    matches!(
                        op.kind,
                        Kind::Write {
                            fill: Fill::Zeros,
                            ..
                        } | Kind::Discard { .. }
                    ) && later(ended(op)).is_none()
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
            Found::Unreadable => {
                let marks = |op: &&&Op| {
                    matches!(
                        op.kind,
                        Kind::Write {
                            fill: Fill::Unreadable,
                            ..
                        }
                    )
                };
                ensure!(
                    here.iter().filter(marks).any(|op| later(ended(op)).is_none()),
                    "nothing can be read, but {:?} should be there",
                    later(0).map(|op| &op.kind)
                );
                Ok(())
            }
            Found::Garbage => Err("bytes that nobody wrote".into()),
        }
    }
}

fn holds(bytes: &[u8], id: u32, fill: Fill) -> bool {
    bytes
        .chunks_exact(PIECE)
        .enumerate()
        .all(|(i, sector)| look(sector) == fill.found(id, i as u32))
}
