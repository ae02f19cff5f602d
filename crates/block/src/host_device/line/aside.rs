//! What goes to the drive without a turn: appends that the drive places, and writes to a zone with a random write area.

use std::sync::Arc;

use zbdkit_io::{IoBuf, spawn};
use zbdkit_zone::rules::Writable;
use zbdkit_zone::{Condition, ZoneError, ZoneNo};

use super::{Caller, Lines, Wants};
use crate::error::Error;

/// A request under way beside others. The line counts it as long as this lives.
pub(super) struct Aside {
    lines: Arc<Lines>,
    zone: ZoneNo,
    /// Its number among those of the zone, if no other was under way when it began.
    alone: Option<u64>,
    end: End,
}

/// What became of it, and what the line learns from that.
#[derive(Clone, Copy)]
enum End {
    /// Nobody knows, or it failed: the zone is to be reported.
    Unknown,
    /// An append ended there, and so does what the zone holds, at least.
    Appended(u64),
    /// A write in a random write area, whose pointer is not kept.
    Written,
}

impl Aside {
    /// Begins a write of `len` bytes or an append at once, where it needs no turn and nobody waits in front of it.
    pub(super) fn begin(lines: &Arc<Lines>, zone: ZoneNo, offset: Option<u64>) -> Option<Aside> {
        let mut line = lines.zone(zone).line();
        let wants = Wants::Write {
            offset,
            len: 0,
            buf: 0,
        };
        let may = !line.busy && line.waiting.is_empty() && line.goes_aside(&wants, lines.drive.has_append());
        if !may {
            return None;
        }
        line.add_aside();
        drop(line);
        Some(Aside::counted(lines, zone))
    }

    /// One that the line counts already, and that the drive does not have yet.
    pub(super) fn counted(lines: &Arc<Lines>, zone: ZoneNo) -> Aside {
        let line = lines.zone(zone).line();
        let alone = (line.aside == 1).then_some(line.asides);
        drop(line);
        Aside {
            lines: lines.clone(),
            zone,
            alone,
            end: End::Unknown,
        }
    }

    /// Hands it to the drive and does not wait for it: it goes on where nobody waits any more.
    pub(super) fn start(self, caller: Caller, offset: Option<u64>, buf: IoBuf) {
        spawn(self.work(caller, offset, buf));
    }

    async fn work(mut self, caller: Caller, offset: Option<u64>, buf: IoBuf) {
        let result = match offset {
            None => self.append(buf).await,
            Some(at) => self.write(at, buf).await,
        };
        // Whoever waits for these to end may go on before the answer is given.
        drop(self);
        caller.ticket.end(result);
    }

    async fn append(&mut self, buf: IoBuf) -> Result<u64, Error> {
        let (start, len) = (self.lines.zone(self.zone).start, buf.len() as u64);
        match self.lines.drive.append(buf, start).await {
            Ok(at) => {
                self.end = End::Appended(at.saturating_add(len));
                Ok(at)
            }
            Err(error) => Err(self.reason(error, None, len).await),
        }
    }

    async fn write(&mut self, at: u64, buf: IoBuf) -> Result<u64, Error> {
        let len = buf.len() as u64;
        match self.lines.drive.file().write(buf, at).await {
            Ok(()) => {
                self.end = End::Written;
                Ok(at)
            }
            Err(error) => Err(self.reason(Error::io("write", &error), Some(at), len).await),
        }
    }

    /// Whether no other request was under way in the zone since this one began.
    fn is_alone(&self) -> bool {
        let line = self.lines.zone(self.zone).line();
        self.alone == Some(line.asides)
    }

    /// The rule that the drive holds against the request, if there is one.
    async fn reason(&self, error: Error, offset: Option<u64>, len: u64) -> Error {
        let Error::Io { op, errno } = error else {
            return error;
        };
        let Ok(info) = self.lines.report(self.zone).await else {
            return self.lines.explain(op, errno);
        };
        let zone = self.zone;
        let writable = Writable {
            zone,
            condition: info.condition,
            wp: info.wp,
            end: info.start + info.capacity,
        };
        let area = self.lines.drive.facts().zns.zrwa;
        let rule = match area.filter(|_| info.attributes.zrwa) {
            Some(area) => writable.place_in_area(offset, len, area),
            None => writable.place(offset, len),
        };
        match rule {
            Err(rule) if offset.is_none() || self.is_alone() || was_broken(&rule) => rule.into(),
            _ => self.lines.explain(op, errno),
        }
    }
}

/// Whether a rule that a write in an area breaks now was broken when the write arrived, whatever went on beside it. Others may
/// have moved the area over it since, or filled the zone, and then the failure is the drive's own.
fn was_broken(rule: &ZoneError) -> bool {
    match *rule {
        ZoneError::OutsideRandomWriteArea { offset, len, end, .. } => offset.saturating_add(len) > end,
        ZoneError::NotAtWritePointer { .. } | ZoneError::Full { .. } => false,
        _ => true,
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        let zone = self.lines.zone(self.zone);
        let mut line = zone.line();
        line.aside -= 1;
        match self.end {
            End::Appended(end) => {
                line.wp = line.wp.max(end);
                line.condition = match line.wp >= zone.start + zone.capacity {
                    true => Condition::Full,
                    false => Condition::ImplicitlyOpen,
                };
            }
            End::Written => {}
            End::Unknown => line.known = false,
        }
        let next = line.next(self.lines.drive.has_append());
        drop(line);
        if let Some(next) = next {
            next.call();
        }
    }
}
