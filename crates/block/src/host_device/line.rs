//! The order of writes to a sequential zone of a drive.
//!
//! A drive takes a write only where its pointer is when the write arrives, and the way there may reorder what is under way
//! together. So each zone has a line: writes, appends and zone operations wait in it in the order in which they came,
//! from whatever thread, and one at a time goes to the drive. Zones know nothing of each other.
//!
//! - Whoever is first in line and finds nobody at work takes the *turn*, on its own thread. Those behind it that came from
//!   the same thread and continue where it ends go with it, as one write. (Buffers stay on their thread, so what
//!   others brought waits for their turn.)
//! - With nothing else under way the pointer is known exactly when a write's turn comes, so that is when the rules
//!   are asked. What breaks them by a pointer that may be out of date is held against a fresh report first: others
//!   can reset and write zones of a real drive, too.
//! - A failed write leaves the pointer unknown: the zone is reported again before anything else in it. Nobody behind is
//!   dragged along, but what was to continue the failed write is not at the pointer any more.
//! - Where the drive places appends itself ([`Drive::append`]) these do not take turns: any number is under way, and a
//!   write or an operation waits until they are over.
//! - Writes to a zone with a random write area take no turns either. They are in no order, so they go as they are and the
//!   drive holds its rules against them; where it moves the pointer is not followed. One that fails makes the zone be reported
//!   before the next, since it may have lost its area: to a reset or a finish, or because it is full.
//!
//! A line is as long as callers have requests under way; a merged write is at most [`MAX_RUN`] bytes. No lock is held
//! across I/O or an await.

mod aside;
mod turn;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use rustix::io::Errno;
use zbdkit_io::{IoBuf, spawn};
use zbdkit_zone::{Condition, ZoneError, ZoneInfo, ZoneNo, ZoneType};

use self::aside::Aside;
use super::drive::Drive;
use crate::error::Error;
use crate::node::{Lane, Work};

/// Bytes of a merged write at most. One write that is longer goes alone.
pub(super) const MAX_RUN: u64 = 1 << 20;

/// Segments of a merged write at most, what the kernel takes at once.
const MAX_SEGMENTS: usize = 1024;

/// The zones of a drive, each with its line.
pub(super) struct Lines {
    drive: Arc<dyn Drive>,
    zones: Box<[Zone]>,
}

/// What does not change of a zone, and its line.
struct Zone {
    start: u64,
    len: u64,
    capacity: u64,
    kind: ZoneType,
    line: Mutex<Line>,
}

struct Line {
    /// The pointer and the condition as far as is known, which they are if `known`.
    wp: u64,
    condition: Condition,
    /// The zone has a random write area. The pointer is not kept while it has.
    area: bool,
    known: bool,
    /// Somebody has the turn.
    busy: bool,
    /// Requests under way that took no turn ([`Line::goes_aside`]).
    aside: u32,
    /// How many of those there ever were.
    asides: u64,
    waiting: VecDeque<Entry>,
}

/// Somebody in line.
struct Entry {
    wants: Wants,
    /// Whose thread it is.
    thread: u32,
    caller: Caller,
}

/// Who waits for the end of a request.
struct Caller {
    ticket: Arc<Ticket>,
    /// The lane is not quiet before this is over.
    _work: Option<Work>,
}

#[derive(Clone, Copy, Debug)]
enum Wants {
    /// To write `len` bytes, which lie in the thread's outbox, at an offset or wherever the zone's next ones go.
    Write {
        offset: Option<u64>,
        len: u64,
        buf: usize,
    },
    /// To have the zone for itself.
    Turn,
}

/// What somebody in line learns of its fate.
#[derive(Default)]
struct Ticket(Mutex<Fate>);

#[derive(Default)]
struct Fate {
    result: Option<Result<u64, Error>>,
    waker: Option<Waker>,
}

impl Ticket {
    fn fate(&self) -> MutexGuard<'_, Fate> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self) {
        let waker = self.fate().waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn end(&self, result: Result<u64, Error>) {
        self.fate().result.get_or_insert(result);
        self.call();
    }
}

thread_local! {
    /// This thread's number, which is not reused.
    static THREAD: u32 = {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed)
    };
    /// The buffers of this thread's writes in line.
    static OUTBOX: RefCell<Outbox> = const { RefCell::new(Outbox { bufs: Vec::new(), free: Vec::new() }) };
}

struct Outbox {
    bufs: Vec<IoBuf>,
    free: Vec<usize>,
}

fn this_thread() -> u32 {
    THREAD.with(|thread| *thread)
}

fn put(buf: IoBuf) -> usize {
    OUTBOX.with_borrow_mut(|outbox| match outbox.free.pop() {
        Some(at) => {
            outbox.bufs[at] = buf;
            at
        }
        None => {
            outbox.bufs.push(buf);
            outbox.bufs.len() - 1
        }
    })
}

fn take(at: usize) -> IoBuf {
    OUTBOX.with_borrow_mut(|outbox| {
        outbox.free.push(at);
        std::mem::replace(&mut outbox.bufs[at], IoBuf::empty())
    })
}

impl Zone {
    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    /// Who is to be called: the first in line, if the turn is to be had.
    fn next(&self, drive_places: bool) -> Option<Arc<Ticket>> {
        let first = self.waiting.front()?;
        let may = self.aside == 0 || self.goes_aside(&first.wants, drive_places);
        (!self.busy && may).then(|| first.caller.ticket.clone())
    }

    /// Whether it takes no turn but goes to the drive beside others; `drive_places` appends ([`Drive::has_append`]).
    fn goes_aside(&self, wants: &Wants, drive_places: bool) -> bool {
        match wants {
            Wants::Write { offset: None, .. } => drive_places,
            Wants::Write { offset: Some(_), .. } => self.known && self.area,
            Wants::Turn => false,
        }
    }

    /// Counts a request that takes no turn.
    fn add_aside(&mut self) {
        self.aside += 1;
        self.asides += 1;
    }

    /// The zone is as reported.
    fn learn(&mut self, info: &ZoneInfo) {
        self.wp = info.wp;
        self.condition = info.condition;
        self.area = info.attributes.zrwa;
        self.known = true;
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        // Whoever is left without an answer was cut off together with its thread.
        self.ticket.end(Err(Error::Io {
            op: "waiting for an earlier write of the zone",
            errno: Errno::CANCELED.raw_os_error(),
        }));
    }
}

impl Lines {
    /// Lines for all zones of a drive, which reports them as `zones`, in order.
    pub(super) fn new(drive: Arc<dyn Drive>, zones: &[ZoneInfo]) -> Lines {
        let zones = zones.iter().map(|info| Zone {
            start: info.start,
            len: info.len,
            capacity: info.capacity,
            kind: info.kind,
            line: Mutex::new(Line {
                wp: info.wp,
                condition: info.condition,
                area: info.attributes.zrwa,
                known: true,
                busy: false,
                aside: 0,
                asides: 0,
                waiting: VecDeque::new(),
            }),
        });
        Lines {
            zones: zones.collect(),
            drive,
        }
    }

    /// The zone's type.
    pub(super) fn kind(&self, zone: ZoneNo) -> ZoneType {
        self.zone(zone).kind
    }

    /// Its length in bytes.
    pub(super) fn len(&self, zone: ZoneNo) -> u64 {
        self.zone(zone).len
    }

    /// Zones are numbered by [`zbdkit_zone::Geometry`], which was made from the same report.
    fn zone(&self, zone: ZoneNo) -> &Zone {
        &self.zones[zone.0 as usize]
    }

    /// Writes `buf` at `offset` of a sequential-required zone, or where the zone's next write goes; where it went. Range,
    /// alignment and boundary were checked.
    pub(super) async fn write(
        self: &Arc<Self>,
        lane: &Lane,
        zone: ZoneNo,
        offset: Option<u64>,
        buf: IoBuf,
    ) -> Result<u64, Error> {
        let len = buf.len() as u64;
        let work = Some(lane.work());
        let mut place = match Aside::begin(self, zone, offset) {
            Some(aside) => {
                let place = Place::beside(self, zone);
                aside.start(place.caller(work), offset, buf);
                place
            }
            None => {
                let buf = put(buf);
                Place::join(self, zone, Wants::Write { offset, len, buf }, work)
            }
        };
        poll_fn(|cx| {
            if let Some(result) = place.result(cx.waker()) {
                return Poll::Ready(result);
            }
            if place.take_turn(false) {
                let turn = Turn {
                    lines: self.clone(),
                    zone,
                };
                spawn(turn.work(lane.work()));
            }
            Poll::Pending
        })
        .await
    }

    /// The zone for oneself, once all that came before is over.
    pub(super) async fn turn(self: &Arc<Self>, zone: ZoneNo) -> Turn {
        let mut place = Place::join(self, zone, Wants::Turn, None);
        poll_fn(|cx| {
            place.listen(cx.waker());
            match place.take_turn(true) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
        Turn {
            lines: self.clone(),
            zone,
        }
    }

    /// The zone as the drive reports it now.
    pub(super) async fn report(&self, zone: ZoneNo) -> Result<ZoneInfo, Error> {
        let start = self.zone(zone).start;
        let zones = self.drive.report(start, 1).await?;
        zones
            .into_iter()
            .next()
            .filter(|info| info.start == start)
            .ok_or(Error::Io {
                op: "zone report",
                errno: Errno::IO.raw_os_error(),
            })
    }
}

impl Lines {
    /// What a failure of the drive means by its errno alone (`blk_status_to_errno` of Linux).
    pub(super) fn explain(&self, op: &'static str, errno: i32) -> Error {
        let limits = &self.drive.facts().zones;
        match Errno::from_raw_os_error(errno) {
            Errno::TOOMANYREFS => ZoneError::TooManyOpen {
                limit: limits.max_open,
            }
            .into(),
            Errno::OVERFLOW => ZoneError::TooManyActive {
                limit: limits.max_active,
            }
            .into(),
            _ => Error::Io { op, errno },
        }
    }
}

/// A place in line, or one beside it, for a request that is under way; who drops it leaves the line. I/O that has begun goes on all the same.
struct Place<'a> {
    lines: &'a Arc<Lines>,
    zone: ZoneNo,
    ticket: Arc<Ticket>,
    left: bool,
}

impl<'a> Place<'a> {
    fn join(lines: &'a Arc<Lines>, zone: ZoneNo, wants: Wants, work: Option<Work>) -> Place<'a> {
        let mut place = Place::beside(lines, zone);
        place.left = false;
        lines.zone(zone).line().waiting.push_back(Entry {
            wants,
            thread: this_thread(),
            caller: place.caller(work),
        });
        place
    }

    fn beside(lines: &'a Arc<Lines>, zone: ZoneNo) -> Place<'a> {
        Place {
            lines,
            zone,
            ticket: Arc::default(),
            left: true,
        }
    }

    fn caller(&self, work: Option<Work>) -> Caller {
        Caller {
            ticket: self.ticket.clone(),
            _work: work,
        }
    }

    fn listen(&self, waker: &Waker) {
        self.ticket.fate().waker = Some(waker.clone());
    }

    fn result(&mut self, waker: &Waker) -> Option<Result<u64, Error>> {
        let mut fate = self.ticket.fate();
        match fate.result.take() {
            Some(result) => {
                self.left = true;
                Some(result)
            }
            None => {
                fate.waker = Some(waker.clone());
                None
            }
        }
    }

    /// Takes the turn if it is ours; `leave` the line with it.
    fn take_turn(&mut self, leave: bool) -> bool {
        if self.left {
            return false;
        }
        let mut line = self.lines.zone(self.zone).line();
        let next = line.next(self.lines.drive.has_append());
        let ours = next.is_some_and(|next| Arc::ptr_eq(&next, &self.ticket));
        if ours {
            line.busy = true;
            if leave {
                self.left = true;
                let entry = line.waiting.pop_front();
                drop(line);
                drop(entry);
            }
        }
        ours
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.left {
            return;
        }
        let mut line = self.lines.zone(self.zone).line();
        let at = line
            .waiting
            .iter()
            .position(|entry| Arc::ptr_eq(&entry.caller.ticket, &self.ticket));
        let entry = at.and_then(|at| line.waiting.remove(at));
        let next = line.next(self.lines.drive.has_append());
        drop(line);
        if let Some(entry) = &entry
            && let Wants::Write { buf, .. } = entry.wants
        {
            take(buf);
        }
        if let Some(next) = next {
            next.call();
        }
    }
}

/// The turn in a zone: nothing else is under way there, and nobody else begins anything.
pub(super) struct Turn {
    lines: Arc<Lines>,
    zone: ZoneNo,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut line = self.zone().line();
        line.busy = false;
        let next = line.next(self.lines.drive.has_append());
        drop(line);
        if let Some(next) = next {
            next.call();
        }
    }
}
