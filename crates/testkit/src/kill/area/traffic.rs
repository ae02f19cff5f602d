//! What a queue does in its zone with a random write area: writes in any order, again, and beyond, commits, and once in a
//! while an end, by a finish, a commit to the capacity, or a reset.

use super::{AreaLog, AreaOp, Areas};
use crate::client::zone::REPORT_ENTRY;
use crate::client::{Request, ZoneState};
use crate::kill::channel::Channel;
use crate::kill::log::Outcome;
use crate::kill::shared::lock;
use crate::kill::traffic::{Flight, Worker};

/// Such a zone.
#[derive(Debug)]
pub struct AreaZone {
    /// Its log's place.
    number: usize,
    stands: Stands,
    in_flight: u32,
    /// What comes next, once nothing is in flight.
    next: Option<AreaOp>,
}

/// What is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stands {
    /// It must be reported first.
    Unknown,
    /// It takes no writes before something else was done to it: this.
    Needs(AreaOp),
    /// It has an area; where the pointer stands once all is done that was submitted.
    Open(u32),
    /// Something is in flight that it has for itself.
    Busy,
}

impl AreaZone {
    pub(in crate::kill) fn new(number: usize) -> AreaZone {
        AreaZone {
            number,
            stands: Stands::Unknown,
            in_flight: 0,
            next: None,
        }
    }
}

impl Worker<'_> {
    fn area_log(&self) -> std::sync::MutexGuard<'_, AreaLog> {
        let number = self.area.as_ref().map_or(0, |area| area.number);
        lock(&self.shared.areas[number])
    }

    pub(in crate::kill) fn act_in_area(&mut self) -> Result<(), String> {
        let (Some(area), Some(areas)) = (&mut self.area, self.shared.geometry.areas) else {
            return Ok(());
        };
        let alone = area.in_flight == 0;
        let op = match (area.stands, area.next) {
            (Stands::Busy, _) => return Ok(()),
            (Stands::Unknown, _) if alone => {
                area.stands = Stands::Busy;
                return self.ask_area();
            }
            (Stands::Needs(op), _) | (Stands::Open(_), Some(op)) if alone => op,
            (Stands::Unknown | Stands::Needs(_), _) | (Stands::Open(_), Some(_)) => return Ok(()),
            (Stands::Open(pointer), None) => return self.use_area(areas, pointer),
        };
        area.next = None;
        area.stands = Stands::Busy;
        self.send_in_area(op)
    }

    /// Something in a zone with an area whose pointer is there, or will be.
    fn use_area(&mut self, areas: Areas, pointer: u32) -> Result<(), String> {
        let capacity = self.shared.geometry.capacity;
        let window = (pointer + areas.size).min(capacity);
        match self.rng.below(100) {
            0 => self.plan_in_area(AreaOp::Reset),
            1 => self.plan_in_area(AreaOp::Finish),
            2..14 if window == capacity => self.plan_in_area(AreaOp::Commit(capacity)),
            2..14 => {
                let granules = 1 + self.rng.below((areas.size / areas.granularity).into()) as u32;
                let to = pointer + granules * areas.granularity;
                if let Some(area) = &mut self.area {
                    area.stands = Stands::Open(to);
                }
                self.send_in_area(AreaOp::Commit(to))
            }
            _ => {
                let beyond = self.rng.one_in(4);
                let end = match beyond {
                    true => (pointer + 2 * areas.size).min(capacity),
                    false => window,
                };
                let at = pointer + self.rng.below((end - pointer).into()) as u32;
                let blocks = self.length((end - at).min(8));
                let pointer = pointer.max(areas.pointer_after(at + blocks));
                if let Some(area) = &mut self.area {
                    area.stands = Stands::Open(pointer);
                }
                self.send_in_area(AreaOp::Write { at, blocks })
            }
        }
    }

    /// The zone is to itself for this.
    fn plan_in_area(&mut self, op: AreaOp) -> Result<(), String> {
        if let Some(area) = &mut self.area {
            area.next = Some(op);
        }
        Ok(())
    }

    fn send_in_area(&mut self, op: AreaOp) -> Result<(), String> {
        let geometry = self.shared.geometry;
        let entry = self.shared.area_entry(op);
        let mut log = self.area_log();
        let zone = log.zone;
        log.entries.push(entry);
        let flight = Flight::InArea(log.entries.len() - 1);
        drop(log);
        if let Some(area) = &mut self.area {
            area.in_flight += 1;
        }
        let sector = |block| geometry.sector(zone, block);
        let request = match op {
            AreaOp::Write { at, blocks } => Request::Write {
                sector: sector(at),
                data: self.data(|index| entry.stamp(zone, index), blocks),
            },
            AreaOp::Finish => Request::ZoneFinish(sector(0)),
            AreaOp::Reset => Request::ZoneReset(sector(0)),
            AreaOp::Open | AreaOp::Commit(_) => {
                let Channel::Nvme(queue) = &mut self.queue else {
                    return Err("only NVMe has random write areas".into());
                };
                let submitted = match op {
                    AreaOp::Commit(to) => queue.commit(sector(to)),
                    _ => queue.open_area(sector(0)),
                };
                return self.sent(submitted, flight);
            }
        };
        let submitted = self.queue.submit(&request);
        self.sent(submitted, flight)
    }

    fn ask_area(&mut self) -> Result<(), String> {
        let zone = self.area_log().zone;
        let report = Request::ZoneReport {
            sector: self.shared.geometry.sector(zone, 0),
            len: 2 * REPORT_ENTRY as u32,
        };
        let submitted = self.queue.submit(&report);
        self.sent(submitted, Flight::AskArea)
    }

    /// Uses what the device said about the zone.
    pub(in crate::kill) fn asked_area(&mut self, said: Option<(ZoneState, u32)>) {
        let Some(area) = &mut self.area else { return };
        area.stands = match said {
            None => Stands::Unknown,
            Some((ZoneState::Full, _)) => Stands::Needs(AreaOp::Reset),
            Some((ZoneState::ExplicitlyOpen | ZoneState::ImplicitlyOpen, pointer)) => Stands::Open(pointer),
            Some(_) => Stands::Needs(AreaOp::Open),
        };
    }

    /// How that request ended; what it was.
    fn ended_in_area(&mut self, entry: usize, outcome: Outcome) -> AreaOp {
        let mut log = self.area_log();
        log.entries[entry].outcome = outcome;
        let op = log.entries[entry].op;
        drop(log);
        if let Some(area) = &mut self.area {
            area.in_flight -= 1;
        }
        op
    }

    pub(in crate::kill) fn acknowledged_in_area(&mut self, entry: usize) {
        let outcome = Outcome::Done(self.shared.now());
        let op = self.ended_in_area(entry, outcome);
        let capacity = self.shared.geometry.capacity;
        let Some(area) = &mut self.area else { return };
        match op {
            AreaOp::Open => area.stands = Stands::Unknown,
            AreaOp::Reset => area.stands = Stands::Needs(AreaOp::Open),
            AreaOp::Finish => area.stands = Stands::Needs(AreaOp::Reset),
            AreaOp::Commit(to) if to == capacity => area.stands = Stands::Needs(AreaOp::Reset),
            AreaOp::Commit(_) | AreaOp::Write { .. } => {}
        }
    }

    /// It lost a race with others of this queue, or there was no room: then the zone is asked where it stands.
    pub(in crate::kill) fn refused_in_area(&mut self, entry: usize) {
        self.ended_in_area(entry, Outcome::Refused);
        if let Some(area) = &mut self.area {
            area.stands = Stands::Unknown;
            area.next = None;
        }
    }
}
