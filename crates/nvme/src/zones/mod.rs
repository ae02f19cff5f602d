//! What only zoned namespaces have (Zoned Namespace Command Set 1.2): Zone Management Send and Receive, and what becomes of
//! zones at a shutdown and at a format.

mod receive;
mod send;

use std::ops::ControlFlow;

use zbdkit_block::{Device, Lane, ZoneOp};
use zbdkit_io::yield_now;
use zbdkit_spec::nvme::Status;
use zbdkit_zone::{CloseEmpty, Condition, Filter, ZoneInfo};

use crate::namespace::{Namespace, Zones};
use crate::queue::Request;
use crate::status::{Failure, Kind, failure};
use crate::transport::Transfer;

/// Zones looked at at a time, before other commands get their turn.
const BATCH: usize = 256;

impl<T: Transfer> Request<'_, T> {
    pub(super) fn zoned_namespace(&self) -> Result<(&Namespace, &Zones, &Lane), Failure> {
        let (namespace, lane) = self.namespace()?;
        let zones = namespace.zones().ok_or(Status::INVALID_OPCODE)?;
        Ok((namespace, zones, lane))
    }
}

async fn manage(device: &Device, lane: &Lane, op: ZoneOp, start: u64) -> Result<(), Failure> {
    let kind = match op {
        ZoneOp::OpenZrwa => Kind::Allocate,
        _ => Kind::Manage,
    };
    let result = device.zone_op(lane, op, start).await;
    result.map_err(|error| failure(&error, kind))
}

/// The condition of the zone that starts at `start`.
async fn condition(device: &Device, start: u64) -> Result<Condition, Failure> {
    let zones = device.report(start, Filter::All, 1).await;
    let zones = zones.map_err(|error| failure(&error, Kind::Manage))?;
    Ok(zones.first().ok_or(Status::LBA_OUT_OF_RANGE)?.condition)
}

/// The zones of a device in order, some at a time.
struct Scan<'a> {
    device: &'a Device,
    batch: Vec<ZoneInfo>,
    next: Option<u64>,
}

impl<'a> Scan<'a> {
    /// From the zone that holds byte `from`.
    fn new(device: &'a Device, from: u64) -> Scan<'a> {
        Scan {
            device,
            batch: Vec::with_capacity(BATCH),
            next: Some(from),
        }
    }

    async fn next(&mut self) -> Result<Option<&[ZoneInfo]>, Failure> {
        let Some(from) = self.next else {
            return Ok(None);
        };
        if !self.batch.is_empty() {
            yield_now().await;
        }
        self.batch.clear();
        let batch = &mut self.batch;
        let mut sink = |zone: ZoneInfo| {
            batch.push(zone);
            if batch.len() == BATCH {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        let result = self.device.report_to(from, Filter::All, &mut sink).await;
        result.map_err(|error| failure(&error, Kind::Manage))?;
        let end = self.batch.last().map(|zone| zone.start + zone.len);
        self.next = end.filter(|end| *end < self.device.limits().size);
        Ok(Some(&self.batch))
    }
}

/// Brings all zones into the state in which they are after a shutdown of the subsystem (2.1.1.3): none is open, and one
/// that holds nothing is empty, unless it has what only active zones have.
pub(crate) async fn settle(namespace: &Namespace, lane: &Lane) -> Result<(), Failure> {
    if namespace.read_only() {
        return Ok(());
    }
    let device = &namespace.device;
    let close = ZoneOp::Close(CloseEmpty::ToEmpty);
    let mut scan = Scan::new(device, 0);
    while let Some(batch) = scan.next().await? {
        for zone in batch.iter().filter(|zone| zone.condition.is_open()) {
            manage(device, lane, close, zone.start).await?;
        }
    }
    // Now that none is open, there is room to open those for a moment that hosts have closed before they wrote anything.
    let mut scan = Scan::new(device, 0);
    while let Some(batch) = scan.next().await? {
        let unwritten = |zone: &&ZoneInfo| zone.condition == Condition::Closed && zone.wp == zone.start;
        for zone in batch.iter().filter(unwritten) {
            manage(device, lane, ZoneOp::Open, zone.start).await?;
            manage(device, lane, close, zone.start).await?;
        }
    }
    Ok(())
}

/// Empties all zones; those that are read-only go offline, since a format leaves no others (2.1.1.3). Blocks have that many
/// bytes afterwards.
pub(crate) async fn format(namespace: &Namespace, lane: &Lane, block_size: u32) -> Result<(), Failure> {
    let device = &namespace.device;
    let failed = |error| failure(&error, Kind::Write);
    // The zones of a drive are the drive's, and so is the size of its blocks.
    if device.engine().is_none() {
        device.reset_all(lane).await.map_err(failed)?;
        return set_offline(namespace, lane).await;
    }
    device.format(lane, block_size).await.map_err(failed)
}

/// Takes all read-only zones offline.
async fn set_offline(namespace: &Namespace, lane: &Lane) -> Result<(), Failure> {
    let mut scan = Scan::new(&namespace.device, 0);
    while let Some(batch) = scan.next().await? {
        for zone in batch.iter().filter(|zone| zone.condition == Condition::ReadOnly) {
            namespace.set_offline(lane, zone.start).await?;
        }
    }
    Ok(())
}

/// Refuses a range with an offline zone in it.
pub(crate) async fn check_online(namespace: &Namespace, offset: u64, len: u64) -> Result<(), Failure> {
    let end = offset + len;
    let mut scan = Scan::new(&namespace.device, offset);
    while let Some(batch) = scan.next().await? {
        for zone in batch.iter().take_while(|zone| zone.start < end) {
            if zone.condition == Condition::Offline {
                return Err(Status::ZONE_IS_OFFLINE.into());
            }
        }
        if batch.last().is_none_or(|last| last.start + last.len >= end) {
            return Ok(());
        }
    }
    Ok(())
}
