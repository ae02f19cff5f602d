//! The node over a zoned drive.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use zbdkit_io::{File, IoBuf};
use zbdkit_zone::rules::{Appends, Writable, blocks};
use zbdkit_zone::{Condition, Filter, Geometry, GeometrySpec, Zns, ZoneError, ZoneInfo, ZoneNo, ZoneType};

use super::drive::Drive;
use super::line::Lines;
use crate::error::{Error, OpenError, errno_of};
use crate::file;
use crate::limits::Limits;
use crate::node::{CrossZone, Lane, Node, Request, ZoneOp};

/// A zoned drive of this machine. It keeps the zones itself; here is only what the order of writes needs.
pub struct HostDeviceNode {
    drive: Arc<dyn Drive>,
    limits: Limits,
    geometry: Geometry,
    lines: Arc<Lines>,
}

/// Zones asked for at once.
const REPORT_BATCH: usize = 4096;

/// Zeros written at once to a sequential zone.
const ZEROS: u64 = 1 << 20;

impl HostDeviceNode {
    /// The node over a drive, whose zones are reported once.
    ///
    /// # Errors
    /// The report fails, or describes zones that no geometry can have.
    pub async fn open(drive: Arc<dyn Drive>) -> Result<HostDeviceNode, OpenError> {
        let facts = drive.facts();
        let path = &facts.path;
        let zones = all_zones(&*drive).await?;
        let conventional = zones
            .iter()
            .take_while(|info| info.kind == ZoneType::Conventional);
        let nr_conventional = conventional.count() as u32;
        let sequential = zones.get(nr_conventional as usize);
        let limits = &facts.zones;
        let spec = GeometrySpec {
            model: limits.model,
            size: facts.size,
            zone_size: limits.zone_size,
            zone_capacity: sequential.map_or(limits.zone_size, |info| info.capacity),
            nr_conventional,
            block_size: facts.block_size,
            // An open zone is active, so a higher limit of open zones is never met.
            max_open: match limits.max_active {
                0 => limits.max_open,
                max => limits.max_open.min(max),
            },
            max_active: limits.max_active,
            max_append: match limits.max_append {
                // Appends are writes at the pointer here, whatever the kernel can do.
                0 => crate::create::default_append(limits.zone_size),
                max => max,
            },
            zns: facts.zns,
        };
        // A drive whose areas make no sense is of use without them.
        let geometry = Geometry::new(spec).or_else(|error| match spec.zns.zrwa {
            Some(_) => Geometry::new(GeometrySpec {
                zns: Zns {
                    zrwa: None,
                    ..spec.zns
                },
                ..spec
            }),
            None => Err(error),
        });
        let geometry = geometry.map_err(|error| OpenError::data(path, error.to_string()))?;
        if zones.len() != geometry.nr_zones() as usize {
            return Err(OpenError::data(
                path,
                "its zone report has not as many zones as the disk",
            ));
        }
        Ok(HostDeviceNode {
            limits: Limits {
                direct_align: facts.block_size,
                zoned: Some(geometry),
                write_granularity: limits.write_granularity,
                ..Limits::plain(facts.size, facts.block_size, facts.read_only)
            },
            geometry,
            lines: Arc::new(Lines::new(drive.clone(), &zones)),
            drive,
        })
    }

    /// The drive.
    pub fn drive(&self) -> &Arc<dyn Drive> {
        &self.drive
    }

    /// The one zone of a request that lies in one, with its type. The range lies on the device and is not empty.
    fn one_zone(&self, offset: u64, len: u64) -> Result<(ZoneNo, ZoneType), ZoneError> {
        let zone = self.geometry.zone_of(offset);
        let end = self.geometry.end(zone);
        if offset + len > end {
            return Err(ZoneError::Boundary {
                zone,
                offset,
                len,
                end,
            });
        }
        Ok((zone, self.lines.kind(zone)))
    }

    /// Whether the range touches a sequential-required zone.
    fn is_ordered(&self, offset: u64, len: u64) -> bool {
        self.zones_of(offset, len)
            .any(|zone| self.lines.kind(zone) == ZoneType::SequentialRequired)
    }

    fn zones_of(&self, offset: u64, len: u64) -> impl Iterator<Item = ZoneNo> + use<> {
        let last = self.geometry.zone_of(offset + len.saturating_sub(1));
        (self.geometry.zone_of(offset).0..=last.0).map(ZoneNo)
    }

    /// The granularity of writes to sequential zones.
    fn granularity(&self) -> u32 {
        self.limits.write_granularity.max(self.limits.block_size)
    }

    /// A failure outside of the lines: the zone may be why.
    async fn reason(&self, op: &'static str, errno: i32, zone: ZoneNo, writes: bool) -> Error {
        match self.lines.report(zone).await.map(|info| info.condition) {
            Ok(Condition::Offline) => ZoneError::Offline { zone }.into(),
            Ok(Condition::ReadOnly) if writes => ZoneError::ReadOnly { zone }.into(),
            _ => self.lines.explain(op, errno),
        }
    }

    async fn manage(&self, op: ZoneOp, zone_start: u64) -> Result<(), Error> {
        let zone = self.geometry.zone_at(zone_start)?;
        let kind = self.lines.kind(zone);
        if kind == ZoneType::Conventional && !op.is_operators() {
            return Err(ZoneError::Conventional { zone }.into());
        }
        let turn = match kind {
            // Reset and finish come after the writes before them. The others do not mind, but the drive might.
            ZoneType::SequentialRequired => Some(self.lines.turn(zone).await),
            _ => None,
        };
        let result = self.drive.zone_op(op, zone_start, self.lines.len(zone)).await;
        if let Some(turn) = &turn {
            match (&result, op) {
                (Ok(()), ZoneOp::Reset) => turn.became(Condition::Empty),
                (Ok(()), ZoneOp::Finish | ZoneOp::FinishUnlimited) => turn.became(Condition::Full),
                _ => turn.forget(),
            }
        }
        match result {
            Err(Error::Io { op: name, errno }) => {
                self.after_failed(op, zone, self.lines.explain(name, errno)).await
            }
            Err(failure @ Error::Zone(ZoneError::InvalidTransition { .. })) => {
                self.after_failed(op, zone, failure).await
            }
            result => result,
        }
    }

    /// What an operation's failure means. Drives differ in what they take for a mistake: there is nothing wrong with closing
    /// a zone that is not open, or with finishing a full one.
    async fn after_failed(&self, op: ZoneOp, zone: ZoneNo, failure: Error) -> Result<(), Error> {
        let Ok(info) = self.lines.report(zone).await else {
            return Err(failure);
        };
        match (op, info.condition) {
            (_, Condition::Offline) => Err(ZoneError::Offline { zone }.into()),
            (_, Condition::ReadOnly) => Err(ZoneError::ReadOnly { zone }.into()),
            (ZoneOp::Close(_), Condition::Empty | Condition::Closed | Condition::Full)
            | (ZoneOp::Finish, Condition::Full)
            | (ZoneOp::Reset, Condition::Empty) => Ok(()),
            (ZoneOp::Open | ZoneOp::OpenZrwa, condition @ Condition::Full) => {
                Err(ZoneError::InvalidTransition { zone, condition }.into())
            }
            _ => Err(failure),
        }
    }

    /// The pointer moves over the writes that came before.
    async fn commit(&self, end: u64) -> Result<(), Error> {
        // The end of one zone is the start of the next.
        let last = end.checked_sub(u64::from(self.limits.block_size));
        let last = last
            .filter(|last| *last < self.limits.size)
            .ok_or(Error::OutOfRange {
                offset: end,
                len: 0,
                size: self.limits.size,
            })?;
        blocks(end, u64::from(self.limits.block_size), self.limits.block_size)?;
        let zone = self.geometry.zone_of(last);
        self.is_sequential(zone)?;
        let turn = self.lines.turn(zone).await;
        let result = self.drive.commit_zrwa(end).await;
        // It may be full now, and have lost its area.
        turn.forget();
        let Err(failure) = result else { return Ok(()) };
        match (self.misses_area(zone, end).await, failure) {
            (Some(rule), _) => Err(rule.into()),
            (None, Error::Io { op, errno }) => Err(self.reason(op, errno, zone, true).await),
            (None, failure) => Err(failure),
        }
    }

    /// The rule that a failed commit breaks: drives have several statuses for that, none of which says which it is.
    async fn misses_area(&self, zone: ZoneNo, end: u64) -> Option<ZoneError> {
        let info = self.lines.report(zone).await.ok()?;
        let place = Writable {
            zone,
            condition: info.condition,
            wp: info.wp,
            end: info.start + info.capacity,
        };
        match self.geometry.zrwa().filter(|_| info.attributes.zrwa) {
            Some(area) => place.commits(info.start, end, area).err(),
            None => match info.condition {
                Condition::ReadOnly | Condition::Offline => None,
                _ => Some(ZoneError::NotRandomWritable { zone }),
            },
        }
    }

    fn is_sequential(&self, zone: ZoneNo) -> Result<(), ZoneError> {
        match self.lines.kind(zone) {
            ZoneType::SequentialRequired => Ok(()),
            ZoneType::SequentialPreferred => Err(ZoneError::NotSequentialRequired { zone }),
            ZoneType::Conventional => Err(ZoneError::Conventional { zone }),
        }
    }

    async fn attach_extension(&self, zone_start: u64, extension: &[u8], zrwa: bool) -> Result<(), Error> {
        let zone = self.geometry.zone_at(zone_start)?;
        self.is_sequential(zone)?;
        let turn = self.lines.turn(zone).await;
        let result = self.drive.set_extension(zone_start, extension, zrwa).await;
        turn.forget();
        match result {
            Err(Error::Io { op, errno }) => Err(self.reason(op, errno, zone, true).await),
            result => result,
        }
    }

    async fn reset_every_zone(&self) -> Result<(), Error> {
        let mut turns = Vec::new();
        // In ascending order, so that two of these cannot wait for each other.
        for zone in self.geometry.zones() {
            if self.lines.kind(zone) == ZoneType::SequentialRequired {
                turns.push(self.lines.turn(zone).await);
            }
        }
        let result = self.drive.reset_all().await;
        turns.iter().for_each(|turn| turn.forget());
        result
    }

    /// A request that lies on the device, zone by zone: where each part goes, and which part of its buffer that is. Some drives
    /// refuse commands that go from one zone into the next.
    fn by_zone(&self, offset: u64, len: u64) -> impl Iterator<Item = (ZoneNo, u64, Range<usize>)> + use<> {
        let geometry = self.geometry;
        self.zones_of(offset, len).map(move |zone| {
            let at = offset.max(geometry.start(zone));
            let end = geometry.end(zone).min(offset + len);
            (zone, at, (at - offset) as usize..(end - offset) as usize)
        })
    }

    /// Writes where no order is asked for.
    async fn write_anywhere(&self, buf: IoBuf, offset: u64) -> Result<(), Error> {
        for (zone, at, part) in self.by_zone(offset, buf.len() as u64) {
            if let Err(error) = self.drive.file().write(buf.slice(part), at).await {
                return Err(self.reason("write", errno_of(&error), zone, true).await);
            }
        }
        Ok(())
    }

    /// Zeros in a sequential zone are a write like any other.
    async fn write_zeros(&self, lane: &Lane, zone: ZoneNo, offset: u64, len: u64) -> Result<(), Error> {
        let zeros = IoBuf::try_alloc(len.min(ZEROS) as usize).map_err(|e| Error::io("write zeroes", &e))?;
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let n = (end - at).min(ZEROS);
            let part = zeros.slice(0..n as usize);
            self.lines.write(lane, zone, Some(at), part).await?;
            at += n;
        }
        Ok(())
    }
}

/// Every zone of a drive, in order and without gaps.
async fn all_zones(drive: &dyn Drive) -> Result<Vec<ZoneInfo>, OpenError> {
    let facts = drive.facts();
    let nonsense = || {
        OpenError::data(
            &facts.path,
            "its zone report makes no sense: zones overlap or are missing",
        )
    };
    let mut zones: Vec<ZoneInfo> = Vec::new();
    let mut at = 0;
    while at < facts.size {
        let batch = drive.report(at, REPORT_BATCH).await?;
        if batch.is_empty() {
            return Err(nonsense());
        }
        for info in batch {
            if info.start != at || info.zone.0 as usize != zones.len() || info.len == 0 {
                return Err(nonsense());
            }
            at = info.start.saturating_add(info.len);
            zones.push(info);
        }
    }
    Ok(zones)
}

impl Node for HostDeviceNode {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn driver(&self) -> &'static str {
        "host_device"
    }

    fn file(&self) -> Option<&File> {
        Some(self.drive.file())
    }

    fn read<'a>(&'a self, _lane: &'a Lane, buf: IoBuf, offset: u64, cross: CrossZone) -> Request<'a, ()> {
        Box::pin(async move {
            let len = buf.len() as u64;
            if cross == CrossZone::Refuse && self.is_ordered(offset, len) {
                self.one_zone(offset, len)?;
            }
            for (zone, at, part) in self.by_zone(offset, len) {
                if let Err(error) = self.drive.file().read(buf.slice(part), at).await {
                    return Err(self.reason("read", errno_of(&error), zone, false).await);
                }
            }
            Ok(())
        })
    }

    fn write<'a>(&'a self, lane: &'a Lane, buf: IoBuf, offset: u64) -> Request<'a, ()> {
        Box::pin(async move {
            let len = buf.len() as u64;
            if !self.is_ordered(offset, len) {
                return self.write_anywhere(buf, offset).await;
            }
            blocks(offset, len, self.granularity())?;
            let (zone, _) = self.one_zone(offset, len)?;
            self.lines.write(lane, zone, Some(offset), buf).await.map(drop)
        })
    }

    fn append<'a>(&'a self, lane: &'a Lane, buf: IoBuf, zone_start: u64) -> Request<'a, u64> {
        Box::pin(async move {
            let zone = self.geometry.zone_at(zone_start)?;
            let appends = Appends {
                max: self.geometry.max_append(),
                granularity: self.granularity(),
            };
            appends.check(zone, self.lines.kind(zone), zone_start, buf.len() as u64)?;
            self.lines.write(lane, zone, None, buf).await
        })
    }

    fn flush<'a>(&'a self) -> Request<'a, ()> {
        Box::pin(async move {
            let flushed = self.drive.file().datasync().await;
            flushed.map_err(|error| Error::io("flush", &error))
        })
    }

    fn write_zeroes<'a>(&'a self, lane: &'a Lane, offset: u64, len: u64, unmap: bool) -> Request<'a, ()> {
        Box::pin(async move {
            if !self.is_ordered(offset, len) {
                return file::zero(self.drive.file(), offset, len, unmap).await;
            }
            blocks(offset, len, self.granularity())?;
            let (zone, _) = self.one_zone(offset, len)?;
            self.write_zeros(lane, zone, offset, len).await
        })
    }

    fn discard<'a>(&'a self, _lane: &'a Lane, offset: u64, len: u64) -> Request<'a, ()> {
        Box::pin(async move {
            // Written sequential zones are given back by a reset and by nothing else.
            if self.is_ordered(offset, len) {
                return Ok(());
            }
            file::discard(self.drive.file(), offset, len).await
        })
    }

    fn zone_op<'a>(&'a self, op: ZoneOp, zone_start: u64) -> Request<'a, ()> {
        Box::pin(self.manage(op, zone_start))
    }

    fn commit_zrwa<'a>(&'a self, end: u64) -> Request<'a, ()> {
        Box::pin(self.commit(end))
    }

    fn set_extension<'a>(&'a self, zone_start: u64, extension: &'a [u8], zrwa: bool) -> Request<'a, ()> {
        Box::pin(self.attach_extension(zone_start, extension, zrwa))
    }

    fn extension<'a>(&'a self, zone_start: u64) -> Request<'a, Option<Vec<u8>>> {
        Box::pin(async move {
            self.geometry.zone_at(zone_start)?;
            self.drive.extension(zone_start).await
        })
    }

    fn reset_all<'a>(&'a self) -> Request<'a, ()> {
        Box::pin(self.reset_every_zone())
    }

    fn report<'a>(
        &'a self,
        from: u64,
        filter: Filter,
        sink: &'a mut dyn FnMut(ZoneInfo) -> ControlFlow<()>,
    ) -> Request<'a, ()> {
        Box::pin(async move {
            let size = self.limits.size;
            if from >= size {
                return Err(Error::OutOfRange {
                    offset: from,
                    len: 0,
                    size,
                });
            }
            let mut at = from;
            while at < size {
                let zones = self.drive.report(at, REPORT_BATCH).await?;
                let Some(last) = zones.last() else { break };
                let next = last.start.saturating_add(last.len);
                if next <= at {
                    break;
                }
                at = next;
                for zone in zones {
                    if filter.matches(zone.condition) && sink(zone).is_break() {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })
    }

    fn close<'a>(&'a self) -> Request<'a, ()> {
        self.flush()
    }
}
