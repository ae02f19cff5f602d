//! What is done in a zone's turn: writes go out, one at a time, and what became of them is found out.

use rustix::io::Errno;
use zbdkit_io::IoBuf;
use zbdkit_zone::rules::Writable;
use zbdkit_zone::{Condition, ZoneError, ZoneInfo, ZoneNo};

use super::aside::Aside;
use super::{Caller, Entry, Line, MAX_RUN, MAX_SEGMENTS, Turn, Wants, Zone, put, take, this_thread};
use crate::error::{Error, errno_of};
use crate::node::Work;

/// What comes next in a turn.
enum Step {
    /// Nothing that this thread could do.
    Over,
    /// The zone is to be reported first.
    Report,
    /// The first in line breaks a rule.
    Refuse(Entry, Error),
    /// What goes to the drive beside others: where, and from which place of the outbox.
    Aside(Caller, Option<u64>, usize),
    /// A write.
    Write(Run),
}

/// Writes that go to the drive as one.
struct Run {
    at: u64,
    len: u64,
    parts: Vec<Part>,
}

/// One of them.
struct Part {
    caller: Caller,
    offset: Option<u64>,
    len: u64,
    at: u64,
    buf: IoBuf,
}

/// What is known while the turn lasts.
#[derive(Clone, Copy, Default)]
struct Known {
    /// The zone was reported and nothing was done to it since.
    fresh: bool,
    /// So many writes go alone, since together they failed.
    alone: usize,
}

impl Turn {
    pub(super) fn zone(&self) -> &Zone {
        self.lines.zone(self.zone)
    }

    /// What the zone holds now is known, since a command made it so.
    pub(in super::super) fn became(&self, condition: Condition) {
        let zone = self.zone();
        let mut line = zone.line();
        line.condition = condition;
        line.wp = match condition {
            Condition::Full => zone.start + zone.capacity,
            _ => zone.start,
        };
        // It goes with what was in it.
        line.area = false;
        line.known = true;
    }

    /// Nobody knows what the zone holds.
    pub(in super::super) fn forget(&self) {
        self.zone().line().known = false;
    }

    /// The zone as it is now, which the line learns, too.
    async fn report(&self) -> Result<ZoneInfo, Error> {
        let info = self.lines.report(self.zone).await?;
        self.zone().line().learn(&info);
        Ok(info)
    }

    /// Serves those of this thread that are first in line, as long as there are some.
    pub(super) async fn work(self, work: Work) {
        let mut known = Known::default();
        loop {
            match self.step(known) {
                Step::Over => break,
                Step::Report => match self.report().await {
                    Ok(_) => known.fresh = true,
                    Err(error) => self.refuse_first(error),
                },
                Step::Refuse(entry, error) => {
                    known.alone = known.alone.saturating_sub(1);
                    entry.caller.ticket.end(Err(error));
                }
                Step::Aside(caller, offset, buf) => {
                    known.fresh = false;
                    Aside::counted(&self.lines, self.zone).start(caller, offset, take(buf));
                }
                Step::Write(run) => known = self.write(run, known).await,
            }
        }
        // The turn passes on before the lane is said to be quiet.
        drop(self);
        drop(work);
    }

    fn step(&self, known: Known) -> Step {
        let zone = self.zone();
        let mut line = zone.line();
        let Some(first) = line.waiting.front() else {
            return Step::Over;
        };
        let Wants::Write { offset, len, buf } = first.wants else {
            return Step::Over;
        };
        if first.thread != this_thread() {
            return Step::Over;
        }
        if line.goes_aside(&first.wants, self.lines.drive.has_append()) {
            let Some(entry) = line.waiting.pop_front() else {
                return Step::Over;
            };
            line.add_aside();
            return Step::Aside(entry.caller, offset, buf);
        }
        if line.aside > 0 {
            return Step::Over;
        }
        if !line.known {
            return Step::Report;
        }
        let placed = match line.area {
            // Only an append comes here, and nobody could tell where it goes.
            true => Err(ZoneError::RandomWriteArea { zone: self.zone }),
            false => line.writable(zone, self.zone).place(offset, len),
        };
        match placed {
            Ok(at) => Step::Write(self.gather(zone, &mut line, at, known.alone > 0)),
            Err(_) if !known.fresh => Step::Report,
            Err(error) => match line.waiting.pop_front() {
                Some(entry) => {
                    take(buf);
                    Step::Refuse(entry, error.into())
                }
                None => Step::Over,
            },
        }
    }

    /// Takes the first write out of the line, and with it those that continue it. The pointer is unknown from here on until
    /// the write is over, in case that nobody is there any more to see its end.
    fn gather(&self, zone: &Zone, line: &mut Line, at: u64, alone: bool) -> Run {
        let mut run = Run {
            at,
            len: 0,
            parts: Vec::new(),
        };
        let mut segments = 0;
        let mut writable = line.writable(zone, self.zone);
        while let Some(first) = line.waiting.front() {
            let Wants::Write { offset, len, buf } = first.wants else {
                break;
            };
            let is_first = run.parts.is_empty();
            let fits = is_first
                || (!alone && first.thread == this_thread() && run.len + len <= MAX_RUN && {
                    // An append that the drive places goes its own way.
                    offset.is_some() || !self.lines.drive.has_append()
                });
            let Ok(at) = writable.place(offset, len) else {
                break;
            };
            if !fits {
                break;
            }
            let Some(entry) = line.waiting.pop_front() else {
                break;
            };
            let buf = take(buf);
            segments += buf.segments().len();
            writable.wp = at + len;
            run.len += len;
            run.parts.push(Part {
                caller: entry.caller,
                offset,
                len,
                at,
                buf,
            });
            if segments >= MAX_SEGMENTS {
                break;
            }
        }
        line.known = false;
        run
    }

    async fn write(&self, run: Run, known: Known) -> Known {
        let end = run.at + run.len;
        let file = self.lines.drive.file();
        let Err(error) = file.write(run.buf(), run.at).await else {
            self.wrote(end);
            run.end(|part| Ok(part.at));
            return Known {
                fresh: false,
                alone: known.alone.saturating_sub(1),
            };
        };
        let failure = self.lines.explain("write", errno_of(&error));
        let Ok(info) = self.report().await else {
            let failure = gone(failure);
            run.end(|_| Err(failure.clone()));
            return Known {
                fresh: false,
                alone: known.alone.saturating_sub(1),
            };
        };
        // The drive kept some of it, or somebody else wrote there: by its account nobody can tell.
        let torn = run.at < info.wp && info.wp <= end;
        let single = run.parts.len() == 1;
        let mut again = Vec::new();
        for part in run.parts {
            let is_append = part.offset.is_none();
            let moved = is_append && info.wp != run.at;
            match self.writable(&info).place(part.offset, part.len) {
                // Together they failed; each has its own fate.
                _ if !single && (is_append || !torn) => again.push(part),
                _ if torn && !moved => part.caller.ticket.end(Err(failure.clone())),
                Err(rule) => part.caller.ticket.end(Err(rule.into())),
                // It was put where somebody else had moved the pointer away from.
                Ok(_) if moved && !known.fresh => again.push(part),
                Ok(_) => part.caller.ticket.end(Err(failure.clone())),
            }
        }
        let alone = known.alone.saturating_sub(1).max(again.len());
        self.put_back(again);
        Known { fresh: true, alone }
    }

    /// The first in line cannot be served, if it is still one of this thread.
    fn refuse_first(&self, error: Error) {
        let ours = |first: &mut Entry| first.thread == this_thread();
        let entry = self.zone().line().waiting.pop_front_if(ours);
        if let Some(entry) = entry {
            if let Wants::Write { buf, .. } = entry.wants {
                take(buf);
            }
            entry.caller.ticket.end(Err(error));
        }
    }

    fn wrote(&self, end: u64) {
        let zone = self.zone();
        let mut line = zone.line();
        line.wp = end;
        line.condition = match end == zone.start + zone.capacity {
            true => Condition::Full,
            false => Condition::ImplicitlyOpen,
        };
        line.known = true;
    }

    /// Puts writes at the front of the line again, in their order.
    fn put_back(&self, parts: Vec<Part>) {
        let mut line = self.zone().line();
        for part in parts.into_iter().rev() {
            let wants = Wants::Write {
                offset: part.offset,
                len: part.len,
                buf: put(part.buf),
            };
            line.waiting.push_front(Entry {
                wants,
                thread: this_thread(),
                caller: part.caller,
            });
        }
    }

    fn writable(&self, info: &ZoneInfo) -> Writable {
        Writable {
            zone: self.zone,
            condition: info.condition,
            wp: info.wp,
            end: info.start + info.capacity,
        }
    }
}

/// What a write's failure means if there is no report either: the kernel has no space on a disk that was removed.
fn gone(failure: Error) -> Error {
    match failure {
        Error::Io { op, errno } if errno == Errno::NOSPC.raw_os_error() => Error::Io {
            op,
            errno: Errno::NODEV.raw_os_error(),
        },
        failure => failure,
    }
}

impl Line {
    fn writable(&self, zone: &Zone, no: ZoneNo) -> Writable {
        Writable {
            zone: no,
            condition: self.condition,
            wp: self.wp,
            end: zone.start + zone.capacity,
        }
    }
}

impl Run {
    fn buf(&self) -> IoBuf {
        match self.parts.as_slice() {
            [only] => only.buf.clone(),
            parts => IoBuf::concat(parts.iter().map(|part| part.buf.clone()).collect()),
        }
    }

    fn end(self, result: impl Fn(&Part) -> Result<u64, Error>) {
        for part in self.parts {
            part.caller.ticket.end(result(&part));
        }
    }
}
