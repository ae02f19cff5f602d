//! Get Log Page (Base Specification 2.1, 5.1.12; Zoned Namespace Command Set 1.2, 4.1.4).

use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::{AdminOpcode, Csi};
use zbdkit_spec::nvme::command::NSID_ALL;
use zbdkit_spec::nvme::feature::FeatureId;
use zbdkit_spec::nvme::log::{
    CommandEffects, EFFECTS_BYTES, FeatureEffects, FirmwareSlots, LogId, MAX_CHANGED_NAMESPACES, Smart,
    SupportedLog,
};
use zbdkit_spec::nvme::nvm;
use zbdkit_spec::nvme::zns::{self, ChangedZoneList, MAX_CHANGED_ZONES};
use zerocopy::{FromZeros, IntoBytes};

use super::GetLog;
use crate::controller::Controller;
use crate::error_log::ERROR_LOG_ENTRIES;
use crate::events::WARNING_TEMPERATURE;
use crate::features::{FEATURES, TEMPERATURE};
use crate::status::Failure;

/// The pages that there are.
const PAGES: [LogId; 9] = [
    LogId::SUPPORTED_LOG_PAGES,
    LogId::ERROR_INFORMATION,
    LogId::SMART,
    LogId::FIRMWARE_SLOT,
    LogId::CHANGED_NAMESPACES,
    LogId::COMMANDS_SUPPORTED_AND_EFFECTS,
    LogId::FEATURES_SUPPORTED_AND_EFFECTS,
    LogId::MI_COMMANDS_SUPPORTED_AND_EFFECTS,
    LogId::CHANGED_ZONES,
];

/// Bytes in a unit of the SMART log's data counters.
const DATA_UNIT: u64 = 512_000;

impl Controller {
    /// A log page, as much of it as there is from the offset on, and at most as long as asked for. Unless `keep`, the event
    /// that belongs to it counts as told, and what the page lists as read.
    pub(super) fn log_page(&self, log: &GetLog, keep: bool) -> Result<Vec<u8>, Failure> {
        if log.by_index {
            return Err(Status::INVALID_FIELD.into());
        }
        let mut page = match log.page {
            LogId::SUPPORTED_LOG_PAGES => supported_pages(),
            LogId::ERROR_INFORMATION => self.error_information(),
            LogId::SMART => self.smart(log, keep)?,
            LogId::FIRMWARE_SLOT => self.firmware_slots(),
            LogId::CHANGED_NAMESPACES => self.changed_namespaces(keep),
            LogId::COMMANDS_SUPPORTED_AND_EFFECTS => self.command_effects(log.csi)?,
            LogId::FEATURES_SUPPORTED_AND_EFFECTS => self.feature_effects(),
            // There are no such commands.
            LogId::MI_COMMANDS_SUPPORTED_AND_EFFECTS => vec![0; EFFECTS_BYTES],
            LogId::CHANGED_ZONES => self.changed_zones(log, keep)?,
            _ => return Err(Status::INVALID_LOG_PAGE.into()),
        };
        let offset = usize::try_from(log.offset)
            .ok()
            .filter(|offset| *offset < page.len() && offset % 4 == 0);
        page.drain(..offset.ok_or(Status::INVALID_FIELD)?);
        page.truncate(usize::try_from(log.len).unwrap_or(usize::MAX));
        Ok(page)
    }

    fn error_information(&self) -> Vec<u8> {
        let mut page: Vec<u8> = self
            .errors()
            .entries()
            .flat_map(|entry| entry.as_bytes().to_vec())
            .collect();
        page.resize(ERROR_LOG_ENTRIES * 64, 0);
        page
    }

    fn smart(&self, log: &GetLog, keep: bool) -> Result<Vec<u8>, Failure> {
        // There is one for the controller, none for each namespace.
        if log.nsid != 0 && log.nsid != NSID_ALL {
            return Err(Status::INVALID_FIELD.into());
        }
        if !keep {
            self.events.smart_read();
        }
        let totals = self.totals();
        let errors = self.errors();
        let mut smart = Smart::new_zeroed();
        if self.features().is_temperature_critical() {
            smart.critical_warning = WARNING_TEMPERATURE;
        }
        smart.temperature = TEMPERATURE.into();
        smart.available_spare = 100;
        smart.available_spare_threshold = 10;
        smart.data_units_read = u128::from(totals.bytes_read.div_ceil(DATA_UNIT)).into();
        smart.data_units_written = u128::from(totals.bytes_written.div_ceil(DATA_UNIT)).into();
        smart.host_reads = u128::from(totals.reads).into();
        smart.host_writes = u128::from(totals.writes).into();
        smart.power_cycles = 1.into();
        smart.power_on_hours = u128::from(self.age().as_secs() / 3600).into();
        smart.media_errors = u128::from(errors.media_errors()).into();
        smart.error_entries = u128::from(errors.count()).into();
        Ok(smart.as_bytes().to_vec())
    }

    fn firmware_slots(&self) -> Vec<u8> {
        let mut slots = FirmwareSlots::new_zeroed();
        slots.afi = 1;
        let revision = self.subsystem().options.firmware.as_bytes();
        slots.frs[0] = [b' '; 8];
        slots.frs[0][..revision.len()].copy_from_slice(revision);
        slots.as_bytes().to_vec()
    }

    fn changed_namespaces(&self, keep: bool) -> Vec<u8> {
        let list = self.events.changed_namespaces(keep);
        let mut page: Vec<u8> = list.iter().flat_map(|nsid| nsid.to_le_bytes()).collect();
        page.resize(MAX_CHANGED_NAMESPACES * 4, 0);
        page
    }

    fn changed_zones(&self, log: &GetLog, keep: bool) -> Result<Vec<u8>, Failure> {
        let namespace = self.active(log.nsid).ok_or(Status::INVALID_NAMESPACE_OR_FORMAT)?;
        if namespace.zones().is_none() {
            return Err(Status::INVALID_LOG_PAGE.into());
        }
        let zones = self.events.changed_zones(log.nsid, keep);
        let mut list = ChangedZoneList::new_zeroed();
        if zones.len() > MAX_CHANGED_ZONES {
            list.nrzid = u16::MAX.into();
        } else {
            list.nrzid = (zones.len() as u16).into();
            let shift = namespace.block_shift();
            for (place, start) in list.zid.iter_mut().zip(zones) {
                *place = (start >> shift).into();
            }
        }
        Ok(list.as_bytes().to_vec())
    }

    fn feature_effects(&self) -> Vec<u8> {
        let mut page = vec![0; 256 * 4];
        for feature in FEATURES {
            let Some(traits) = self.feature_traits(feature, 0) else {
                continue;
            };
            let namespace = traits.namespace_specific;
            let effects = FeatureEffects::new()
                .with_fsupp(true)
                .with_ccc(feature == FeatureId::NUMBER_OF_QUEUES)
                .with_namespace_scope(namespace)
                .with_controller_scope(!namespace);
            page[usize::from(feature.0) * 4..][..4].copy_from_slice(&effects.into_bits().to_le_bytes());
        }
        page
    }

    fn command_effects(&self, csi: Csi) -> Result<Vec<u8>, Failure> {
        let supported = CommandEffects::new().with_csupp(true);
        let changes = supported.with_lbcc(true);
        let mut page = vec![0; EFFECTS_BYTES];
        let mut set = |at: usize, effects: CommandEffects| {
            page[at * 4..][..4].copy_from_slice(&effects.into_bits().to_le_bytes());
        };
        for opcode in [
            AdminOpcode::GET_LOG_PAGE,
            AdminOpcode::IDENTIFY,
            AdminOpcode::ABORT,
            AdminOpcode::SET_FEATURES,
            AdminOpcode::GET_FEATURES,
            AdminOpcode::ASYNC_EVENT_REQUEST,
        ] {
            set(opcode.0.into(), supported);
        }
        if self.options().has_queue_commands {
            for opcode in [
                AdminOpcode::DELETE_IO_SQ,
                AdminOpcode::CREATE_IO_SQ,
                AdminOpcode::DELETE_IO_CQ,
                AdminOpcode::CREATE_IO_CQ,
            ] {
                set(opcode.0.into(), supported);
            }
        }
        if self.options().keep_alive {
            set(AdminOpcode::KEEP_ALIVE.0.into(), supported);
        }
        if self.options().doorbell_buffers {
            set(AdminOpcode::DOORBELL_BUFFER_CONFIG.0.into(), supported);
        }
        // Nothing else of the namespace beside it.
        set(
            AdminOpcode::FORMAT_NVM.0.into(),
            changes.with_ncc(true).with_cse(1),
        );
        let io = 256;
        let nvm = [
            (nvm::Opcode::FLUSH, supported),
            (nvm::Opcode::WRITE, changes),
            (nvm::Opcode::READ, supported),
            (nvm::Opcode::COMPARE, supported),
            (nvm::Opcode::WRITE_ZEROES, changes),
            (nvm::Opcode::DATASET_MANAGEMENT, changes),
            (nvm::Opcode::VERIFY, supported),
            (nvm::Opcode::COPY, changes),
        ];
        let zoned = [
            (zns::Opcode::ZONE_MANAGEMENT_SEND, changes),
            (zns::Opcode::ZONE_MANAGEMENT_RECEIVE, supported),
            (zns::Opcode::ZONE_APPEND, changes),
        ];
        if self.marks_blocks(Some(csi)) {
            set(io + usize::from(nvm::Opcode::WRITE_UNCORRECTABLE.0), changes);
        }
        let zoned = match csi {
            Csi::NVM => &[][..],
            Csi::ZONED => &zoned[..],
            _ => return Err(Status::INVALID_FIELD.into()),
        };
        for (opcode, effects) in nvm {
            set(io + usize::from(opcode.0), effects);
        }
        for (opcode, effects) in zoned {
            set(io + usize::from(opcode.0), *effects);
        }
        Ok(page)
    }
}

fn supported_pages() -> Vec<u8> {
    let mut page = vec![0; 256 * 4];
    for id in PAGES {
        let supported = SupportedLog::new().with_lsupp(true);
        page[usize::from(id.0) * 4..][..4].copy_from_slice(&supported.into_bits().to_le_bytes());
    }
    page
}
