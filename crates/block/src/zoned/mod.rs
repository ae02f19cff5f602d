//! The filter `zoned`: gives zones to any conventional node below it.
//!
//! The engine decides, the child stores, the durable table and the run state remember; docs/durability.md
//! rules the order.
//! What a request does here: it is admitted (or waits while its zone is reset), its data goes to the child, the
//! engine learns what became of it, the run state holds the new written end, and then it is acknowledged.

mod areas;
mod below;
mod commit;
mod epoch;
mod extensions;
mod format;
mod gaps;
mod make;
mod marks;
mod mirror;
mod open;
mod operations;
mod place;
mod rounds;
mod run_state;
mod table;
mod waiters;

use std::future::poll_fn;
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex};
use std::task::Poll;

use zbdkit_io::IoBuf;
use zbdkit_zone::{
    Completion, Engine, Filter, Pending, ReadPermit, Refused, WritePermit, ZoneError, ZoneInfo, ZoneNo,
    ZoneType,
};

use crate::error::Error;
use crate::limits::Limits;
use crate::marks::Marks;
use crate::node::{Access, CrossZone, Lane, MapExtent, Node, Request, Watcher, ZoneOp};
use commit::{Committer, Image};
use extensions::Extensions;
pub(crate) use extensions::Slots;
use gaps::{Gaps, Zeroed};
pub use make::create_sidecar;
pub(crate) use make::{Records, new_header, spec_of, zns_of};
pub(crate) use mirror::{Mirror, is_beyond_bare_tables, word as bare_word, words as bare_words};
pub(crate) use open::{Holder, Inside};
pub use open::{ImageStatus, RunStateMode, ZonedOptions};
pub use place::default_sidecar;
pub(crate) use place::{Place, host_error};
pub(crate) use table::{
    Finding, Loaded, Salvaged, Table, TableError, drop_damaged, extension_size, marks_place, read_at,
    table_size, write_at, zones_of,
};
use waiters::Waiters;
pub(crate) use waiters::lock;

/// Zones over a conventional child.
pub struct ZonedNode {
    child: Arc<dyn Node>,
    /// What the user knows the image as.
    driver: &'static str,
    /// In each of the engine's formats.
    limits: Box<[Limits]>,
    engine: Engine,
    waiters: Waiters,
    gaps: Gaps,
    durability: Durability,
    extensions: Extensions,
    marks: Marks,
    status: Option<ImageStatus>,
    watchers: Mutex<Vec<Watcher>>,
}

/// What outlives the process.
enum Durability {
    /// Nothing (over memory).
    Volatile,
    /// What the image held when it was opened for reading.
    ReadOnly,
    /// The zone table; `sync_writes` where every write is made durable before it is acknowledged, as there is no
    /// run state.
    Table {
        committer: Box<Committer>,
        sync_writes: bool,
    },
}

impl ZonedNode {
    /// The zones.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// What the zone table said when it was opened; `None` over memory.
    pub fn status(&self) -> Option<&ImageStatus> {
        self.status.as_ref()
    }

    /// Makes everything durable that was acknowledged, with its records in the table.
    pub(crate) async fn settle(&self) -> Result<(), Error> {
        self.check_epoch()?;
        self.flush().await
    }

    /// The zone table was replaced by another one: nothing is changed through this node any more, and its run state goes.
    pub(crate) fn end_epoch(&self) {
        if let Durability::Table { committer, .. } = &self.durability {
            committer.abandon(&self.waiters);
        }
    }

    /// As [`Node::read`], without a box.
    pub async fn read(&self, lane: &Lane, buf: IoBuf, offset: u64, cross: CrossZone) -> Result<(), Error> {
        match self.read_in_zone(lane, &buf, offset).await {
            Err(Error::Zone(ZoneError::Boundary { .. }))
                if cross == CrossZone::Allow || !self.is_ordered(offset, buf.len()) =>
            {
                for part in self.parts(offset, buf.len()) {
                    let at = offset + part.start as u64;
                    self.read_in_zone(lane, &buf.slice(part), at).await?;
                }
                Ok(())
            }
            result => result,
        }
    }

    /// Whether the range touches a sequential-required zone. Others are read and written like a disk, across their
    /// borders too.
    fn is_ordered(&self, offset: u64, len: usize) -> bool {
        let geometry = self.engine.geometry();
        let required = |at| geometry.zone_type(geometry.zone_of(at)) == ZoneType::SequentialRequired;
        // Conventional zones come first, and the others are all of one type.
        required(offset + (len as u64).saturating_sub(1))
    }

    /// The range zone by zone, as positions in a buffer.
    fn parts(&self, offset: u64, len: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let geometry = *self.engine.geometry();
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = at;
            if start < len {
                let end = geometry.end(geometry.zone_of(offset + start as u64)) - offset;
                at = usize::try_from(end).unwrap_or(usize::MAX).min(len);
            }
            (start < len).then_some(start..at)
        })
    }

    async fn read_in_zone(&self, lane: &Lane, buf: &IoBuf, offset: u64) -> Result<(), Error> {
        let permit = self
            .admit(|| self.engine.admit_read(offset, buf.len() as u64))
            .await?;
        let data = permit.data_len() as usize;
        let readable = self.marks.check_readable(offset..offset + permit.data_len());
        let result = match data {
            0 => Ok(()),
            _ if readable.is_err() => readable,
            _ if data == buf.len() => self.read_child(lane, buf.clone(), offset).await,
            _ => self.read_child(lane, buf.slice(0..data), offset).await,
        };
        buf.fill(data..buf.len(), 0);
        self.end_read(permit);
        result
    }

    fn end_read(&self, permit: ReadPermit) {
        self.engine.end_read(permit, &self.waiters);
    }

    async fn read_child(&self, lane: &Lane, buf: IoBuf, offset: u64) -> Result<(), Error> {
        match self.child.resolve(offset, buf.len() as u64, Access::Read) {
            Some(at) => at
                .file
                .read(buf, at.offset)
                .await
                .map_err(|e| Error::io("read", &e)),
            None => self.child.read(lane, buf, offset, CrossZone::Allow).await,
        }
    }

    /// As [`Node::write`], without a box.
    pub async fn write(&self, lane: &Lane, buf: IoBuf, offset: u64) -> Result<(), Error> {
        self.write_data(lane, offset, buf.len(), Data::Buf(buf)).await
    }

    async fn write_data(&self, lane: &Lane, offset: u64, len: usize, data: Data) -> Result<(), Error> {
        match self.admit_write(lane, offset, len as u64).await {
            Ok(permit) => self.carry_out(lane, permit, data).await,
            Err(Error::Zone(ZoneError::Boundary { .. })) if !self.is_ordered(offset, len) => {
                for part in self.parts(offset, len) {
                    let at = offset + part.start as u64;
                    let permit = self.admit_write(lane, at, part.len() as u64).await?;
                    self.carry_out(lane, permit, data.part(part)).await?;
                }
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// As [`Node::append`], without a box.
    pub async fn append(&self, lane: &Lane, buf: IoBuf, zone_start: u64) -> Result<u64, Error> {
        self.check_epoch()?;
        let slots = lane.slots().ok_or(Error::NotSupported("zone append"))?;
        let len = buf.len() as u64;
        let permit = self
            .admit(|| self.engine.admit_append(&mut slots.borrow_mut(), zone_start, len))
            .await?;
        let offset = permit.offset();
        self.carry_out(lane, permit, Data::Buf(buf)).await?;
        Ok(offset)
    }

    async fn admit_write(&self, lane: &Lane, offset: u64, len: u64) -> Result<WritePermit, Error> {
        self.check_epoch()?;
        let slots = lane
            .slots()
            .ok_or(Error::NotSupported("writing without a lane of the image"))?;
        let ask = || self.engine.admit_write(&mut slots.borrow_mut(), offset, len);
        let zone = self.engine.geometry().zone_of(offset);
        if self.is_preferred(zone) {
            self.admit(|| self.gaps.admit(zone, ask)).await
        } else {
            self.admit(ask).await
        }
    }

    fn is_preferred(&self, zone: ZoneNo) -> bool {
        self.engine.geometry().zone_type(zone) == ZoneType::SequentialPreferred
    }

    /// Whether every write is durable before it is acknowledged, also where no pointer moves.
    fn syncs_writes(&self) -> bool {
        matches!(
            self.durability,
            Durability::Table {
                sync_writes: true,
                ..
            }
        )
    }

    /// That the operator has closed none of the zones in a range that is not empty.
    fn check_writable(&self, offset: u64, end: u64) -> Result<(), Error> {
        let geometry = self.engine.geometry();
        for zone in (geometry.zone_of(offset).0..=geometry.zone_of(end - 1).0).map(ZoneNo) {
            let record = self.engine.record(zone);
            if record.offline {
                return Err(ZoneError::Offline { zone }.into());
            }
            if record.read_only {
                return Err(ZoneError::ReadOnly { zone }.into());
            }
        }
        Ok(())
    }

    /// The way of an admitted write to its acknowledgement.
    async fn carry_out(&self, lane: &Lane, permit: WritePermit, data: Data) -> Result<(), Error> {
        // Once more: an operation that failed with the epoch may have let it in, and its record may be there nevertheless,
        // with an area that shows what is written now.
        let zeroed = permit
            .gap()
            .map(|_| self.gaps.zeroed(permit.zone(), &self.waiters));
        let stored = match self.check_epoch() {
            Ok(()) => self.store(lane, &permit, data, zeroed).await,
            Err(error) => {
                drop(zeroed);
                Err(error)
            }
        };
        let errno = stored.as_ref().map(|_| ()).map_err(Error::errno);
        match self.engine.complete(permit, errno, &self.waiters) {
            Completion::Prefix(prefix) => {
                let safe = if prefix.advanced() || self.syncs_writes() {
                    self.publish(prefix.zone()).await
                } else {
                    Ok(())
                };
                // In the failed epoch nothing more is acknowledged: its run state is not believed any more.
                let safe = safe.and_then(|()| self.check_epoch());
                let outcome = safe.as_ref().map(|_| ()).map_err(Error::errno);
                self.engine.acknowledge(prefix, outcome, &self.waiters);
                safe
            }
            Completion::Pending(pending) => self.outcome(pending).await,
            // Its own failure, or the one of an earlier write of the zone.
            Completion::Failed(errno) => stored.and(Err(Error::Io {
                op: "an earlier write of the zone",
                errno,
            })),
        }
    }

    /// Writes an admitted write's data, after the zeros of the gap that it leaves; from then on its zone takes writes again.
    async fn store(
        &self,
        lane: &Lane,
        permit: &WritePermit,
        data: Data,
        zeroed: Option<Zeroed<'_>>,
    ) -> Result<(), Error> {
        if let Some(gap) = permit.gap() {
            self.child
                .write_zeroes(lane, gap.start, gap.end - gap.start, true)
                .await?;
        }
        if let Some(gap) = permit.gap() {
            // While nobody else can mark anything there.
            self.unmark(gap, async { Ok(()) }).await?;
        }
        drop(zeroed);
        let range = permit.offset()..permit.offset() + permit.len();
        match data {
            Data::Uncorrectable => self.store_mark(lane, permit, range).await,
            _ if self.marks.first_in(&range).is_some() => {
                self.unmark(range, self.store_data(lane, permit, data)).await
            }
            _ => self.store_data(lane, permit, data).await,
        }
    }

    async fn store_data(&self, lane: &Lane, permit: &WritePermit, data: Data) -> Result<(), Error> {
        match data {
            Data::Uncorrectable => Ok(()),
            Data::Zeroes { unmap } => {
                self.child
                    .write_zeroes(lane, permit.offset(), permit.len(), unmap)
                    .await
            }
            Data::Buf(buf) => match self.child.resolve(permit.offset(), permit.len(), Access::Write) {
                Some(at) => at
                    .file
                    .write(buf, at.offset)
                    .await
                    .map_err(|e| Error::io("write", &e)),
                None => self.child.write(lane, buf, permit.offset()).await,
            },
        }
    }

    /// Makes the zone's written end outlive what it is promised to outlive.
    async fn publish(&self, zone: ZoneNo) -> Result<(), Error> {
        match &self.durability {
            Durability::Table {
                committer,
                sync_writes: true,
            } => committer.flush(&[], &self.image()).await,
            Durability::Table { committer, .. } => {
                let published = self.waiters.run_state.publish(zone, &self.engine).await;
                published.map_err(|errno| {
                    committer.fail(errno, &self.waiters);
                    Error::Io {
                        op: "writing the run state",
                        errno,
                    }
                })
            }
            Durability::Volatile | Durability::ReadOnly => Ok(()),
        }
    }

    async fn outcome(&self, pending: Pending) -> Result<(), Error> {
        let outcome = poll_fn(|cx| {
            if let Some(outcome) = self.engine.outcome(&pending) {
                return Poll::Ready(outcome);
            }
            self.waiters.wait_slot(pending.slot(), cx.waker());
            self.engine.outcome(&pending).map_or(Poll::Pending, Poll::Ready)
        });
        outcome.await.map_err(|errno| Error::Io {
            op: "an earlier write of the zone",
            errno,
        })
    }

    /// Asks until the zone is not busy.
    async fn admit<T>(&self, mut ask: impl FnMut() -> Result<T, Refused>) -> Result<T, Error> {
        loop {
            let busy = match ask() {
                Ok(admitted) => return Ok(admitted),
                Err(Refused::Zone(error)) => return Err(error.into()),
                Err(Refused::NoSlot) => {
                    // One of this lane's own writes gives its slot back.
                    zbdkit_io::yield_now().await;
                    continue;
                }
                Err(Refused::Busy(zone)) => zone,
            };
            let again = poll_fn(|cx| {
                self.waiters.wait_zone(busy, cx.waker());
                match ask() {
                    Err(Refused::Busy(zone)) if zone == busy => Poll::Pending,
                    result => Poll::Ready(result),
                }
            });
            match again.await {
                Ok(admitted) => return Ok(admitted),
                Err(Refused::Zone(error)) => return Err(error.into()),
                Err(Refused::Busy(_) | Refused::NoSlot) => {}
            }
        }
    }

    /// Fails where the epoch has failed. What is final for the child is for its zones, too: a table that goes on could
    /// speak of data that the child has lost.
    fn check_epoch(&self) -> Result<(), Error> {
        match &self.durability {
            Durability::Table { committer, .. } => {
                committer.check()?;
                let child = self.child.check();
                child.inspect_err(|error| committer.fail(error.errno(), &self.waiters))
            }
            Durability::Volatile => Ok(()),
            Durability::ReadOnly => Err(Error::ReadOnly),
        }
    }

    /// A length as one of memory.
    fn whole(&self, offset: u64, len: u64) -> Result<usize, Error> {
        usize::try_from(len).map_err(|_| Error::OutOfRange {
            offset,
            len,
            size: self.limits().size,
        })
    }

    fn image(&self) -> Image<'_> {
        Image {
            engine: &self.engine,
            child: &self.child,
            waiters: &self.waiters,
        }
    }
}

/// What a write brings.
enum Data {
    Buf(IoBuf),
    Zeroes {
        unmap: bool,
    },
    /// None: the blocks cannot be read any more.
    Uncorrectable,
}

impl Data {
    fn part(&self, range: Range<usize>) -> Data {
        match self {
            Data::Buf(buf) => Data::Buf(buf.slice(range)),
            Data::Zeroes { unmap } => Data::Zeroes { unmap: *unmap },
            Data::Uncorrectable => Data::Uncorrectable,
        }
    }
}

impl Node for ZonedNode {
    fn limits(&self) -> &Limits {
        &self.limits[self.engine.format_index()]
    }

    fn driver(&self) -> &'static str {
        self.driver
    }

    fn read<'a>(&'a self, lane: &'a Lane, buf: IoBuf, offset: u64, cross: CrossZone) -> Request<'a, ()> {
        Box::pin(ZonedNode::read(self, lane, buf, offset, cross))
    }

    fn write<'a>(&'a self, lane: &'a Lane, buf: IoBuf, offset: u64) -> Request<'a, ()> {
        Box::pin(ZonedNode::write(self, lane, buf, offset))
    }

    fn append<'a>(&'a self, lane: &'a Lane, buf: IoBuf, zone_start: u64) -> Request<'a, u64> {
        Box::pin(ZonedNode::append(self, lane, buf, zone_start))
    }

    fn flush<'a>(&'a self) -> Request<'a, ()> {
        Box::pin(async move {
            match &self.durability {
                Durability::Volatile => self.child.flush().await,
                Durability::ReadOnly => Ok(()),
                Durability::Table { committer, .. } => committer.flush(&[], &self.image()).await,
            }
        })
    }

    /// Zeros are data here: the write pointer moves over them.
    fn write_zeroes<'a>(&'a self, lane: &'a Lane, offset: u64, len: u64, unmap: bool) -> Request<'a, ()> {
        Box::pin(async move {
            let data = Data::Zeroes { unmap };
            self.write_data(lane, offset, self.whole(offset, len)?, data)
                .await
        })
    }

    /// A write: the pointer moves over marked blocks.
    fn mark_uncorrectable<'a>(&'a self, lane: &'a Lane, offset: u64, len: u64) -> Request<'a, ()> {
        Box::pin(async move {
            // Early, so that no other write fails with this one.
            self.marks.after(|list| list.with(offset..offset + len))?;
            let whole = self.whole(offset, len)?;
            self.write_data(lane, offset, whole, Data::Uncorrectable).await
        })
    }

    fn marks(&self) -> Option<&Marks> {
        Some(&self.marks)
    }

    fn map<'a>(&'a self, offset: u64, len: u64) -> Request<'a, MapExtent> {
        Box::pin(self.map_zones(offset, len))
    }

    /// A hint, and one that sequential zones take only as a reset: space is given back where there is no write
    /// pointer to contradict.
    fn discard<'a>(&'a self, lane: &'a Lane, offset: u64, len: u64) -> Request<'a, ()> {
        Box::pin(async move {
            self.check_epoch()?;
            let geometry = self.engine.geometry();
            let conventional = geometry
                .size()
                .min(geometry.zone_size() * u64::from(geometry.nr_conventional()));
            let end = (offset + len).min(conventional);
            if offset < end {
                self.check_writable(offset, end)?;
                if self.marks.first_in(&(offset..end)).is_some() {
                    // What was marked must not read as before.
                    let (whole, zeros) = (self.whole(offset, end - offset)?, Data::Zeroes { unmap: true });
                    return self.write_data(lane, offset, whole, zeros).await;
                }
                self.child.discard(lane, offset, end - offset).await?;
            }
            Ok(())
        })
    }

    fn zone_op<'a>(&'a self, op: ZoneOp, zone_start: u64) -> Request<'a, ()> {
        Box::pin(self.manage(op, zone_start))
    }

    fn reset_all<'a>(&'a self) -> Request<'a, ()> {
        Box::pin(self.reset_every_zone())
    }

    fn commit_zrwa<'a>(&'a self, end: u64) -> Request<'a, ()> {
        Box::pin(self.commit_area(end))
    }

    fn set_extension<'a>(&'a self, zone_start: u64, extension: &'a [u8], zrwa: bool) -> Request<'a, ()> {
        Box::pin(self.attach(zone_start, extension, zrwa))
    }

    fn extension<'a>(&'a self, zone_start: u64) -> Request<'a, Option<Vec<u8>>> {
        Box::pin(async move {
            let zone = self.engine.geometry().zone_at(zone_start)?;
            self.extension_of(zone).await
        })
    }

    fn watch(&self, watcher: Watcher) {
        lock(&self.watchers).push(watcher);
    }

    fn report<'a>(
        &'a self,
        from: u64,
        filter: Filter,
        sink: &'a mut dyn FnMut(ZoneInfo) -> ControlFlow<()>,
    ) -> Request<'a, ()> {
        Box::pin(async move {
            let size = self.limits().size;
            if from >= size {
                return Err(Error::OutOfRange {
                    offset: from,
                    len: 0,
                    size,
                });
            }
            self.engine.report(from, filter, sink);
            Ok(())
        })
    }

    fn close<'a>(&'a self) -> Request<'a, ()> {
        Box::pin(async move {
            if let Durability::Table { committer, .. } = &self.durability {
                committer.close(&self.image()).await?;
            }
            self.child.close().await
        })
    }
}
