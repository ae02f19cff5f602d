//! Zone Management Send and Receive (Zoned Namespace Command Set 1.2, 3.4.2 and 3.4.3).

use std::ops::ControlFlow;

use zbdkit_block::{Device, Lane, ZoneOp};
use zbdkit_io::yield_now;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::zns::{
    ReportFilter, ReportHeader, SendAction, StateByte, TypeByte, ZoneDescriptor, ZoneState, ZoneType,
};
use zbdkit_zone::{CloseEmpty, Condition, Filter, ZoneInfo};
use zerocopy::{FromZeros, IntoBytes};

use crate::command::Blocks;
use crate::namespace::{Namespace, Zones};
use crate::queue::Request;
use crate::status::{Failure, Kind, failure};
use crate::transport::{Direction, Transfer};

/// Zones looked at at a time, before other commands get their turn.
const BATCH: usize = 256;

/// ZNS: an opened zone that is closed before anything was written is closed, not empty.
const CLOSE: ZoneOp = ZoneOp::Close(CloseEmpty::ToClosed);

impl<T: Transfer> Request<'_, T> {
    pub(crate) async fn zone_send(
        &self,
        start: u64,
        action: SendAction,
        all: bool,
        option: bool,
    ) -> Result<u64, Failure> {
        let (namespace, zones, lane) = self.zoned_namespace()?;
        let allocates_zrwa = action == SendAction::OPEN && option;
        if allocates_zrwa || matches!(action, SEND_ZRWA_FLUSH | SEND_SET_EXTENSION) {
            // No namespace has random write areas or descriptor extensions.
            return Err(Status::INVALID_FIELD.into());
        }
        if all {
            return self.send_all(namespace, zones, lane, action).await;
        }
        let (start, _) = namespace.bytes(Blocks { start, count: 1 })?;
        if !start.is_multiple_of(zones.size) {
            return Err(Status::INVALID_FIELD.into());
        }
        let op = match action {
            SendAction::OPEN => ZoneOp::Open,
            SendAction::FINISH => ZoneOp::Finish,
            SendAction::RESET => ZoneOp::Reset,
            // The other protocols close what is not open in silence; here only what is active can be closed.
            SendAction::CLOSE => match condition(&namespace.device, start).await? {
                Condition::Empty | Condition::Full => {
                    return Err(Status::INVALID_ZONE_STATE_TRANSITION.into());
                }
                _ => CLOSE,
            },
            SendAction::OFFLINE => match condition(&namespace.device, start).await? {
                Condition::Offline => return Ok(0),
                Condition::ReadOnly => ZoneOp::SetOffline,
                _ => return Err(Status::INVALID_ZONE_STATE_TRANSITION.into()),
            },
            _ => return Err(Status::INVALID_FIELD.into()),
        };
        manage(&namespace.device, lane, op, start).await?;
        Ok(0)
    }

    /// The action for all zones in the states that it is for.
    async fn send_all(
        &self,
        namespace: &Namespace,
        zones: &Zones,
        lane: &Lane,
        action: SendAction,
    ) -> Result<u64, Failure> {
        use Condition as C;
        let device = &namespace.device;
        let (op, of): (ZoneOp, &[Condition]) = match action {
            SendAction::RESET => {
                let result = device.reset_all(lane).await;
                return result.map(|()| 0).map_err(|error| failure(&error, Kind::Manage));
            }
            SendAction::OPEN => {
                check_open_all(device, zones).await?;
                (ZoneOp::Open, &[C::Closed])
            }
            SendAction::CLOSE => (CLOSE, &[C::ImplicitlyOpen, C::ExplicitlyOpen]),
            SendAction::FINISH => (ZoneOp::Finish, &[C::ImplicitlyOpen, C::ExplicitlyOpen, C::Closed]),
            SendAction::OFFLINE => (ZoneOp::SetOffline, &[C::ReadOnly]),
            _ => return Err(Status::INVALID_FIELD.into()),
        };
        let mut scan = Scan::new(device, 0);
        while let Some(batch) = scan.next().await? {
            for zone in batch.iter().filter(|zone| of.contains(&zone.condition)) {
                manage(device, lane, op, zone.start).await?;
            }
        }
        Ok(0)
    }

    pub(crate) async fn zone_receive(
        &self,
        start: u64,
        len: u64,
        extended: bool,
        filter: ReportFilter,
        partial: bool,
    ) -> Result<u64, Failure> {
        let (namespace, ..) = self.zoned_namespace()?;
        let len = self.transfer_len(len)?;
        let header_len = size_of::<ReportHeader>();
        // There are no descriptor extensions to extend a report with.
        if extended || len < header_len {
            return Err(Status::INVALID_FIELD.into());
        }
        let (start, _) = namespace.bytes(Blocks { start, count: 1 })?;
        let buf = self.data(Direction::ControllerToHost, len).await?;
        let size = size_of::<ZoneDescriptor>();
        let room = (len - header_len) / size;
        let mut count: u64 = 0;
        let mut filled = 0;
        let mut scan = Scan::new(&namespace.device, start);
        while !(partial && filled == room)
            && let Some(batch) = scan.next().await?
        {
            for zone in batch.iter().filter(|zone| shows(filter, zone.condition)) {
                if filled < room {
                    let at = header_len + filled * size;
                    buf.slice(at..at + size)
                        .copy_from(descriptor(zone, namespace).as_bytes());
                    filled += 1;
                } else if partial {
                    break;
                }
                count += 1;
            }
        }
        let mut header = ReportHeader::new_zeroed();
        header.nr_zones = count.into();
        buf.slice(0..header_len).copy_from(header.as_bytes());
        buf.fill(header_len + filled * size..len, 0);
        Ok(0)
    }

    fn zoned_namespace(&self) -> Result<(&Namespace, &Zones, &Lane), Failure> {
        let (namespace, lane) = self.namespace()?;
        let zones = namespace.zones().ok_or(Status::INVALID_OPCODE)?;
        Ok((namespace, zones, lane))
    }
}

const SEND_ZRWA_FLUSH: SendAction = SendAction::FLUSH_EXPLICIT_ZRWA_RANGE;
const SEND_SET_EXTENSION: SendAction = SendAction::SET_DESCRIPTOR_EXTENSION;

async fn manage(device: &Device, lane: &Lane, op: ZoneOp, start: u64) -> Result<(), Failure> {
    let result = device.zone_op(lane, op, start).await;
    result.map_err(|error| failure(&error, Kind::Manage))
}

/// The condition of the zone that starts at `start`.
async fn condition(device: &Device, start: u64) -> Result<Condition, Failure> {
    let zones = device.report(start, Filter::All, 1).await;
    let zones = zones.map_err(|error| failure(&error, Kind::Manage))?;
    Ok(zones.first().ok_or(Status::LBA_OUT_OF_RANGE)?.condition)
}

/// All closed zones are opened or none: whether there is room for them beside those open explicitly.
async fn check_open_all(device: &Device, zones: &Zones) -> Result<(), Failure> {
    if zones.max_open == 0 {
        return Ok(());
    }
    let mut wanted = 0;
    let mut scan = Scan::new(device, 0);
    while let Some(batch) = scan.next().await? {
        let conditions = batch.iter().map(|zone| zone.condition);
        wanted += conditions
            .filter(|condition| matches!(condition, Condition::Closed | Condition::ExplicitlyOpen))
            .count();
    }
    if wanted > zones.max_open as usize {
        return Err(Status::TOO_MANY_OPEN_ZONES.into());
    }
    Ok(())
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

/// Whether a report has a zone in this condition.
fn shows(filter: ReportFilter, condition: Condition) -> bool {
    let wanted = match filter {
        ReportFilter::EMPTY => Condition::Empty,
        ReportFilter::IMPLICITLY_OPENED => Condition::ImplicitlyOpen,
        ReportFilter::EXPLICITLY_OPENED => Condition::ExplicitlyOpen,
        ReportFilter::CLOSED => Condition::Closed,
        ReportFilter::FULL => Condition::Full,
        ReportFilter::READ_ONLY => Condition::ReadOnly,
        ReportFilter::OFFLINE => Condition::Offline,
        // All; the others are refused by the parser.
        _ => return true,
    };
    condition == wanted
}

fn descriptor(zone: &ZoneInfo, namespace: &Namespace) -> ZoneDescriptor {
    let shift = namespace.block_shift();
    let mut descriptor = ZoneDescriptor::new_zeroed();
    descriptor.zt = TypeByte::new()
        .with_zt(ZoneType::SEQUENTIAL_WRITE_REQUIRED.0)
        .into_bits();
    descriptor.zs = StateByte::new().with_zs(state(zone.condition).0).into_bits();
    descriptor.zcap = (zone.capacity >> shift).into();
    descriptor.zslba = (zone.start >> shift).into();
    descriptor.wp = match zone.condition {
        Condition::Full | Condition::ReadOnly | Condition::Offline => u64::MAX,
        _ => zone.wp >> shift,
    }
    .into();
    descriptor
}

fn state(condition: Condition) -> ZoneState {
    match condition {
        Condition::Empty => ZoneState::EMPTY,
        Condition::ImplicitlyOpen => ZoneState::IMPLICITLY_OPENED,
        Condition::ExplicitlyOpen => ZoneState::EXPLICITLY_OPENED,
        Condition::Closed => ZoneState::CLOSED,
        Condition::ReadOnly => ZoneState::READ_ONLY,
        Condition::Full => ZoneState::FULL,
        Condition::Offline => ZoneState::OFFLINE,
        // Of conventional zones, which namespaces do not have.
        Condition::NotWritePointer => ZoneState(0),
    }
}

/// Closes all open zones, as a shutdown does.
pub(crate) async fn close_all(namespace: &Namespace, lane: &Lane) -> Result<(), Failure> {
    if namespace.read_only() {
        return Ok(());
    }
    let mut scan = Scan::new(&namespace.device, 0);
    while let Some(batch) = scan.next().await? {
        for zone in batch.iter().filter(|zone| zone.condition.is_open()) {
            manage(&namespace.device, lane, CLOSE, zone.start).await?;
        }
    }
    Ok(())
}
