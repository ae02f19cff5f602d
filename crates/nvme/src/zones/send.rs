//! Zone Management Send (Zoned Namespace Command Set 1.2, 3.4.3).

use zbdkit_block::{Device, Lane, ZoneOp};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::zns::SendAction;
use zbdkit_zone::{CloseEmpty, Condition};

use super::{Scan, condition, manage, set_offline};
use crate::command::Blocks;
use crate::namespace::{Namespace, Zones};
use crate::queue::Request;
use crate::status::{Failure, Kind, failure};
use crate::transport::{Direction, Transfer};

/// ZNS: an opened zone that is closed before anything was written is closed, not empty.
const CLOSE: ZoneOp = ZoneOp::Close(CloseEmpty::ToClosed);

impl<T: Transfer> Request<'_, T> {
    /// `option` is the action's: for the two that have one, that the zone gets a random write area (ZRWAA).
    pub(crate) async fn zone_send(
        &self,
        start: u64,
        action: SendAction,
        all: bool,
        option: bool,
    ) -> Result<u64, Failure> {
        let (namespace, zones, lane) = self.zoned_namespace()?;
        let takes_option = matches!(action, SendAction::OPEN | SendAction::SET_DESCRIPTOR_EXTENSION);
        let with_zrwa = option && takes_option;
        if with_zrwa && (all || zones.zrwa.is_none()) {
            return Err(Status::INVALID_FIELD.into());
        }
        if all {
            return self.send_all(namespace, zones, lane, action).await;
        }
        let (start, len) = namespace.bytes(Blocks { start, count: 1 })?;
        if action == SendAction::FLUSH_EXPLICIT_ZRWA_RANGE {
            // The only action that names the last block that it is for.
            return commit_zrwa(namespace, zones, lane, start + len).await;
        }
        if !start.is_multiple_of(zones.size) {
            return Err(Status::INVALID_FIELD.into());
        }
        let op = match action {
            SendAction::OPEN if with_zrwa => ZoneOp::OpenZrwa,
            SendAction::OPEN => ZoneOp::Open,
            SendAction::FINISH => ZoneOp::FinishUnlimited,
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
                Condition::ReadOnly => {
                    return namespace.set_offline(lane, start).await.map(|()| 0);
                }
                _ => return Err(Status::INVALID_ZONE_STATE_TRANSITION.into()),
            },
            SendAction::SET_DESCRIPTOR_EXTENSION => {
                return self.set_extension(start, with_zrwa).await;
            }
            _ => return Err(Status::INVALID_FIELD.into()),
        };
        manage(&namespace.device, lane, op, start).await?;
        Ok(0)
    }

    /// Attaches a descriptor extension to the empty zone that starts at byte `start`, which is closed afterwards.
    async fn set_extension(&self, start: u64, with_zrwa: bool) -> Result<u64, Failure> {
        let (namespace, zones, lane) = self.zoned_namespace()?;
        if zones.extension_size == 0 {
            return Err(Status::INVALID_FIELD.into());
        }
        let len = self.transfer_len(zones.extension_size.into())?;
        let data = self.data(Direction::HostToController, len).await?.to_vec();
        let device = &namespace.device;
        let result = device.set_extension(lane, start, &data, with_zrwa).await;
        result.map(|()| 0).map_err(|error| failure(&error, Kind::Manage))
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
            SendAction::FINISH => (
                ZoneOp::FinishUnlimited,
                &[C::ImplicitlyOpen, C::ExplicitlyOpen, C::Closed],
            ),
            SendAction::OFFLINE => return set_offline(namespace, lane).await.map(|()| 0),
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
}

/// Moves the write pointer of a zone with a random write area to byte `end`.
async fn commit_zrwa(namespace: &Namespace, zones: &Zones, lane: &Lane, end: u64) -> Result<u64, Failure> {
    if zones.zrwa.is_none_or(|zrwa| !zrwa.explicit_commit) {
        return Err(Status::INVALID_FIELD.into());
    }
    let result = namespace.device.commit_zrwa(lane, end).await;
    result.map(|()| 0).map_err(|error| failure(&error, Kind::Commit))
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
