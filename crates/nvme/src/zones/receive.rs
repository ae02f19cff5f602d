//! Zone Management Receive (Zoned Namespace Command Set 1.2, 3.4.2): reports, with descriptor extensions or without.

use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::zns::{
    self, ReceiveAction, ReportFilter, ReportHeader, StateByte, TypeByte, ZoneDescriptor, ZoneState, ZoneType,
};
use zbdkit_zone::{Attributes, Condition, Recommendation, ZoneInfo};
use zerocopy::{FromZeros, IntoBytes};

use super::Scan;
use crate::command::Blocks;
use crate::namespace::Namespace;
use crate::queue::Request;
use crate::status::{Failure, Kind, failure};
use crate::transport::{Direction, Transfer};

const HEADER: usize = size_of::<ReportHeader>();
const DESCRIPTOR: usize = size_of::<ZoneDescriptor>();

impl<T: Transfer> Request<'_, T> {
    pub(crate) async fn zone_receive(
        &self,
        start: u64,
        len: u64,
        action: ReceiveAction,
        filter: ReportFilter,
        partial: bool,
    ) -> Result<u64, Failure> {
        let (namespace, zones, _) = self.zoned_namespace()?;
        let len = self.transfer_len(len)?;
        let extension = match action {
            ReceiveAction::REPORT => 0,
            ReceiveAction::EXTENDED_REPORT if zones.extension_size > 0 => zones.extension_size as usize,
            _ => return Err(Status::INVALID_FIELD.into()),
        };
        if filter.name().is_none() || len < HEADER {
            return Err(Status::INVALID_FIELD.into());
        }
        let shift = namespace.block_shift();
        let (start, _) = namespace.bytes_of(Blocks { start, count: 1 }, shift)?;
        let buf = self.data(Direction::ControllerToHost, len).await?;
        let size = DESCRIPTOR + extension;
        let room = (len - HEADER) / size;
        let mut count: u64 = 0;
        let mut filled = 0;
        let mut scan = Scan::new(&namespace.device, start);
        while !(partial && filled == room)
            && let Some(batch) = scan.next().await?
        {
            for zone in batch.iter().filter(|zone| shows(filter, zone)) {
                if filled < room {
                    let at = HEADER + filled * size;
                    let place = buf.slice(at..at + size);
                    let copied = place.copy_from(descriptor(zone, shift).as_bytes());
                    place.fill(copied..size, 0);
                    if extension > 0 && zone.attributes.extension {
                        let bytes = extension_of(namespace, zone).await?;
                        place.slice(copied..size).copy_from(&bytes);
                    }
                    filled += 1;
                } else if partial {
                    break;
                }
                count += 1;
            }
        }
        let mut header = ReportHeader::new_zeroed();
        header.nr_zones = count.into();
        buf.slice(0..HEADER).copy_from(header.as_bytes());
        buf.fill(HEADER + filled * size..len, 0);
        Ok(0)
    }
}

/// The descriptor extension of a zone that had one a moment ago.
async fn extension_of(namespace: &Namespace, zone: &ZoneInfo) -> Result<Vec<u8>, Failure> {
    let extension = namespace.device.extension(zone.start).await;
    let extension = extension.map_err(|error| failure(&error, Kind::Read))?;
    Ok(extension.unwrap_or_default())
}

/// Whether a report has a zone.
fn shows(filter: ReportFilter, zone: &ZoneInfo) -> bool {
    let wanted = match filter {
        ReportFilter::EMPTY => Condition::Empty,
        ReportFilter::IMPLICITLY_OPENED => Condition::ImplicitlyOpen,
        ReportFilter::EXPLICITLY_OPENED => Condition::ExplicitlyOpen,
        ReportFilter::CLOSED => Condition::Closed,
        ReportFilter::FULL => Condition::Full,
        ReportFilter::READ_ONLY => Condition::ReadOnly,
        ReportFilter::OFFLINE => Condition::Offline,
        ReportFilter::WITH_ATTRIBUTES => {
            return zone.attributes.finished_by_device || zone.attributes.recommended.is_some();
        }
        // All; the others were refused.
        _ => return true,
    };
    zone.condition == wanted
}

/// With positions in blocks of 2^`shift` bytes.
fn descriptor(zone: &ZoneInfo, shift: u32) -> ZoneDescriptor {
    let mut descriptor = ZoneDescriptor::new_zeroed();
    descriptor.zt = TypeByte::new()
        .with_zt(ZoneType::SEQUENTIAL_WRITE_REQUIRED.0)
        .into_bits();
    descriptor.zs = StateByte::new().with_zs(state(zone.condition).0).into_bits();
    descriptor.za = attributes(zone.attributes).into_bits();
    descriptor.zcap = (zone.capacity >> shift).into();
    descriptor.zslba = (zone.start >> shift).into();
    descriptor.wp = match zone.condition {
        Condition::Full | Condition::ReadOnly | Condition::Offline => u64::MAX,
        _ => zone.wp >> shift,
    }
    .into();
    descriptor
}

fn attributes(attributes: Attributes) -> zns::Attributes {
    let Attributes {
        finished_by_device,
        recommended,
        zrwa,
        extension,
    } = attributes;
    zns::Attributes::new()
        .with_zfc(finished_by_device)
        .with_fzr(recommended == Some(Recommendation::Finish))
        .with_rzr(recommended == Some(Recommendation::Reset))
        .with_zrwav(zrwa)
        .with_zdev(extension)
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
