//! Zones with a random write area, and what else only Zoned Namespaces have: extensions and attributes.

use zbdkit_zone::{Condition, Recommendation, ZoneInfo, Zrwa};

use super::{Judge, Verdict, ensure};
use crate::crash::oracle::{Kind, Op, extension};

impl<'a> Judge<'a> {
    /// Requests of the zone that may belong to its generation.
    fn of_generation(&self, zone: usize, info: &ZoneInfo) -> impl Iterator<Item = &'a Op> {
        let (generation, tick) = (info.counters.resets, self.at.tick);
        self.ops(zone).filter(move |op| op.may_be_of(generation, tick))
    }

    /// It happened for sure, and in the zone's generation.
    fn is_certain(&self, op: &Op, info: &ZoneInfo) -> bool {
        op.acknowledged(self.at.tick).is_some() && op.is_of(info.counters.resets, self.at.tick)
    }

    /// What the zone was like at the last opening, if it was not reset since.
    fn earlier(&self, zone: usize, info: &ZoneInfo) -> Option<&'a ZoneInfo> {
        let before = &self.oracle.baseline.zones[zone];
        (before.counters.resets == info.counters.resets).then_some(before)
    }

    fn had_area(&self, zone: usize, info: &ZoneInfo) -> bool {
        self.earlier(zone, info)
            .is_some_and(|before| before.attributes.zrwa)
    }

    /// Whether the zone has or may have had a random write area since its last reset.
    pub(super) fn has_window(&self, zone: usize, info: &ZoneInfo) -> bool {
        info.attributes.zrwa
            || self.had_area(zone, info)
            || self.of_generation(zone, info).any(|op| op.kind.allocates())
    }

    /// The same, whatever was reset.
    pub(super) fn ever_had_window(&self, zone: usize) -> bool {
        self.oracle.baseline.zones[zone].attributes.zrwa || self.ops(zone).any(|op| op.kind.allocates())
    }

    /// Blocks are written in any order and again, behind a pointer that only moves on.
    pub(super) fn window(&self, zone: usize, info: &ZoneInfo, contents: Option<&[u8]>) -> Verdict {
        let area = self.oracle.geometry.zrwa().ok_or("no zone can have an area")?;
        self.area(zone, info)?;
        let end = info.written_end - info.start;
        let pointers = self.pointers(zone, info, area);
        let mut ends: Vec<u64> = pointers
            .iter()
            .flat_map(|pointer| [*pointer, (pointer + area.size).min(info.capacity)])
            .collect();
        ends.extend(
            self.earlier(zone, info)
                .map(|before| before.written_end - before.start),
        );
        if info.attributes.zrwa {
            // An operator's condition does not touch the pointer.
            let pointer = info.wp - info.start;
            ensure!(
                pointers.contains(&pointer) && end == (pointer + area.size).min(info.capacity),
                "its pointer is at {pointer} and its data end at {end}; possible pointers are {pointers:?}"
            );
            let least = self.least_pointer(zone, info);
            ensure!(
                pointer >= least,
                "its pointer is at {pointer}, and was at {least} before"
            );
        } else {
            ensure!(
                ends.contains(&end) || end == info.capacity,
                "its data end at {end}; possible are {ends:?}"
            );
        }
        if let Some(before) = self.earlier(zone, info) {
            let kept = before.written_end - before.start;
            ensure!(
                end >= kept,
                "{kept} bytes were there at the last opening, now {end}"
            );
        }
        for op in self.of_generation(zone, info) {
            let Kind::Write {
                id,
                offset: Some(offset),
                len,
                ..
            } = op.kind
            else {
                continue;
            };
            let at = offset - info.start;
            ensure!(
                !(self.required(op) && self.is_certain(op, info)) || at + len <= end,
                "write {id} at {at} ({len} bytes) was promised, but the data end at {end}"
            );
        }
        let Some(contents) = contents else { return Ok(()) };
        self.sectors(zone, info, &contents[..end as usize])?;
        self.zeros_above(contents, end)
    }

    /// The zone has its area from the acknowledgement on until it is full.
    fn area(&self, zone: usize, info: &ZoneInfo) -> Verdict {
        let opened = |of: &dyn Fn(&Op) -> bool| {
            self.of_generation(zone, info)
                .any(|op| op.kind.allocates() && of(op))
        };
        if info.attributes.zrwa {
            ensure!(
                self.had_area(zone, info) || opened(&|_| true),
                "it has a random write area that nobody asked for"
            );
            ensure!(info.condition != Condition::Full, "it is full and has an area");
        } else {
            ensure!(
                self.may_be_over(zone, info)
                    || !(self.had_area(zone, info) || opened(&|op| self.is_certain(op, info))),
                "its random write area is gone"
            );
        }
        Ok(())
    }

    /// Whether a zone that had an area may have become full.
    fn may_be_over(&self, zone: usize, info: &ZoneInfo) -> bool {
        let capacity_end = info.start + info.capacity;
        self.of_generation(zone, info)
            .any(|op| op.kind.is_finish() || matches!(op.kind, Kind::Commit { end } if end == capacity_end))
    }

    /// Where the pointer may be, bytes from the zone's start.
    fn pointers(&self, zone: usize, info: &ZoneInfo, area: Zrwa) -> Vec<u64> {
        let mut pointers = vec![0];
        if let Some(before) = self.earlier(zone, info) {
            pointers.push(before.wp - before.start);
        }
        for op in self.of_generation(zone, info) {
            match op.kind {
                Kind::Write {
                    offset: Some(offset),
                    len,
                    ..
                } => {
                    let end = offset - info.start + len;
                    let over = end.saturating_sub(area.size);
                    // As a write before there was an area, and as one in it.
                    pointers.extend([end, over.next_multiple_of(area.granularity)]);
                }
                Kind::Commit { end } => pointers.push(end - info.start),
                _ => {}
            }
        }
        pointers.sort_unstable();
        pointers.dedup();
        pointers
    }

    /// Where the pointer must be at least, but for what the ends of writes demand.
    fn least_pointer(&self, zone: usize, info: &ZoneInfo) -> u64 {
        let earlier = self
            .earlier(zone, info)
            .map_or(0, |before| before.wp - before.start);
        let commits = self.of_generation(zone, info).filter_map(|op| match op.kind {
            Kind::Commit { end } if self.required(op) && self.is_certain(op, info) => Some(end - info.start),
            _ => None,
        });
        commits.max().unwrap_or(0).max(earlier)
    }

    /// An extension is there wholly or not at all, and once it was acknowledged.
    pub(super) fn extension(&self, zone: usize, info: &ZoneInfo, found: Option<&[u8]>) -> Verdict {
        ensure!(
            info.attributes.extension == found.is_some(),
            "a report says something else of its descriptor extension than a look at it"
        );
        let attached = || {
            self.of_generation(zone, info)
                .filter(|op| matches!(op.kind, Kind::Attach { .. }))
        };
        let old = self
            .earlier(zone, info)
            .and(self.oracle.baseline.extensions[zone].as_deref());
        let Some(found) = found else {
            let lost = attached().find(|op| self.is_certain(op, info));
            ensure!(
                lost.is_none() && old.is_none(),
                "its descriptor extension is gone"
            );
            let alone = self.of_generation(zone, info).any(|op| op.kind == Kind::OpenZrwa);
            ensure!(
                !info.attributes.zrwa || alone || self.had_area(zone, info),
                "it has the random write area that was to come with an extension, and no extension"
            );
            return Ok(());
        };
        let is = |op: &Op| match op.kind {
            Kind::Attach { id, .. } => extension(id, &self.oracle.geometry) == found,
            _ => false,
        };
        match old {
            Some(old) => ensure!(old == found, "its descriptor extension changed"),
            None => {
                let given = attached()
                    .find(|op| is(op))
                    .ok_or("its descriptor extension is none that anybody gave it")?;
                ensure!(
                    info.attributes.zrwa || !given.kind.allocates() || self.may_be_over(zone, info),
                    "it has a descriptor extension, and not the random write area that was to come with it"
                );
            }
        }
        let other = attached().find(|op| self.is_certain(op, info) && !is(op));
        ensure!(
            other.is_none(),
            "it has another descriptor extension than was acknowledged"
        );
        Ok(())
    }

    /// What the device says of the zone lasts from the acknowledgement on.
    pub(super) fn attributes(&self, zone: usize, info: &ZoneInfo) -> Verdict {
        let earlier = self.earlier(zone, info).map(|before| before.attributes);
        let by_device = || {
            self.of_generation(zone, info)
                .filter(|op| op.kind == Kind::FinishByDevice)
        };
        let before = earlier.is_some_and(|attributes| attributes.finished_by_device);
        // Of two finishes at once only one counts, and the other one is answered as well.
        let others = self
            .of_generation(zone, info)
            .any(|op| op.kind == Kind::Finish || matches!(op.kind, Kind::Write { .. } | Kind::Commit { .. }));
        if info.attributes.finished_by_device {
            ensure!(
                before || by_device().next().is_some(),
                "the device did not finish it"
            );
        } else {
            let certain = by_device().any(|op| self.is_certain(op, info));
            let was_full = self
                .earlier(zone, info)
                .is_some_and(|before| before.condition == Condition::Full);
            ensure!(
                !before && (!certain || others || was_full),
                "nothing tells any more that the device finished it"
            );
        }
        self.recommended(zone, info, earlier.and_then(|attributes| attributes.recommended))
    }

    fn recommended(&self, zone: usize, info: &ZoneInfo, before: Option<Recommendation>) -> Verdict {
        let said = || {
            self.of_generation(zone, info).filter_map(|op| match op.kind {
                Kind::Recommend(what) => Some((op, what)),
                _ => None,
            })
        };
        let found = info.attributes.recommended;
        // A full zone is not to be finished, and a crash may undo what filled it.
        let may_be_full = self
            .of_generation(zone, info)
            .any(|op| op.kind.is_finish() || matches!(op.kind, Kind::Write { .. } | Kind::Commit { .. }));
        let is_finish = |what: Option<Recommendation>| what == Some(Recommendation::Finish);
        if let Some(found) = found {
            ensure!(
                before == Some(found) || said().any(|(_, what)| what == Some(found)),
                "{found:?} is recommended, which nobody said"
            );
        }
        // What was said last, where nothing else can have come after it.
        for (op, what) in said().filter(|(op, _)| self.is_certain(op, info)) {
            let newer = said().any(|(other, _)| {
                !std::ptr::eq(op, other) && other.done.is_none_or(|(at, _)| at > op.submitted)
            });
            ensure!(
                newer || found == what || may_be_full && (is_finish(found) || is_finish(what)),
                "{found:?} is recommended, and {what:?} was said last"
            );
        }
        Ok(())
    }
}
