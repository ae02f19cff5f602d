//! Identify (Base Specification 2.1, 5.1.13; NVM Command Set 1.1, 4.1.5; Zoned Namespace Command Set 1.2, 4.1.5).

use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::{
    Cns, Csi, IDENTIFY_BYTES, IdentifyController, IdentifyNamespaceIndependent, Lpa, MIN_PAGE_BYTES, Nidt,
    Oacs, Oncs,
};
use zbdkit_spec::nvme::command::NSID_ALL;
use zbdkit_spec::nvme::nvm::{self, Flbas};
use zbdkit_spec::nvme::zns::{self, NO_LIMIT, Ozcs, ZDES_UNIT, ZrwaCap};
use zbdkit_zone::Zrwa;
use zerocopy::{FromZeros, IntoBytes};

use crate::controller::{Controller, SHUTDOWN_MICROSECONDS, WARNING_TEMPERATURE};
use crate::copy::{COPY_MAX_BYTES, COPY_MAX_RANGES};
use crate::error_log::ERROR_LOG_ENTRIES;
use crate::events::MAX_REQUESTS;
use crate::namespace::{Namespace, Zones};
use crate::status::Failure;
use crate::subsystem::MAX_NAMESPACES;

/// An Identify data structure.
pub(super) type Page = [u8; IDENTIFY_BYTES];

/// The formats of copy descriptors that there are, a bit each: format 0.
pub(crate) const COPY_FORMATS: u16 = 1 << 0;

/// What Identify asks for.
pub(super) struct Question {
    pub(super) cns: Cns,
    pub(super) nsid: u32,
    pub(super) cntid: u16,
    pub(super) csi: Csi,
}

impl Controller {
    /// The data structure that was asked for.
    pub(super) fn identify(&self, question: &Question) -> Result<Page, Failure> {
        let nsid = question.nsid;
        let csi = question.csi;
        match question.cns {
            Cns::CONTROLLER => Ok(page(&self.identify_controller())),
            Cns::CONTROLLER_OF_CSI => self.identify_controller_of(csi),
            Cns::NAMESPACE => self.identify_active(nsid, |namespace| Ok(self.identify_namespace(namespace))),
            Cns::ALLOCATED_NAMESPACE => {
                self.identify_allocated(nsid, |namespace| Ok(self.identify_namespace(namespace)))
            }
            Cns::NAMESPACE_OF_CSI => self.identify_active(nsid, |namespace| namespace_of(namespace, csi)),
            Cns::ALLOCATED_NAMESPACE_OF_CSI => {
                self.identify_allocated(nsid, |namespace| namespace_of(namespace, csi))
            }
            Cns::NAMESPACE_INDEPENDENT => {
                self.identify_active(nsid, |namespace| Ok(page(&self.identify_independent(namespace))))
            }
            Cns::NAMESPACE_DESCRIPTORS => self.descriptors(nsid),
            Cns::ACTIVE_NAMESPACES => self.list(nsid, |namespace| self.is_active(namespace)),
            Cns::ACTIVE_NAMESPACES_OF_CSI => {
                check_csi(csi)?;
                self.list(nsid, |namespace| {
                    self.is_active(namespace) && namespace.csi() == csi
                })
            }
            Cns::ALLOCATED_NAMESPACES => self.list(nsid, |_| true),
            Cns::ALLOCATED_NAMESPACES_OF_CSI => {
                check_csi(csi)?;
                self.list(nsid, |namespace| namespace.csi() == csi)
            }
            // Every namespace is attached to every controller.
            Cns::ATTACHED_CONTROLLERS => {
                self.subsystem()
                    .namespace(nsid)
                    .ok_or(Status::INVALID_NAMESPACE_OR_FORMAT)?;
                Ok(self.controllers(question.cntid))
            }
            Cns::CONTROLLERS => Ok(self.controllers(question.cntid)),
            Cns::COMMAND_SETS => self.command_sets(question.cntid),
            _ => Err(Status::INVALID_FIELD.into()),
        }
    }

    fn identify_controller(&self) -> IdentifyController {
        let mut data = IdentifyController::new_zeroed();
        let options = self.options();
        let names = &self.subsystem().options;
        let [vendor, subsystem_vendor] = options.pci_vendor;
        data.vid = vendor.into();
        data.ssvid = subsystem_vendor.into();
        blank_padded(&mut data.sn, &names.serial);
        blank_padded(&mut data.mn, &names.model);
        blank_padded(&mut data.fr, &names.firmware);
        data.rab = 6;
        data.ieee = options.ieee;
        data.cmic = u8::from(options.shared) << 1;
        data.mdts = self.max_transfer_pages();
        data.cntlid = self.id().into();
        data.ver = self.version().into();
        data.rtd3e = SHUTDOWN_MICROSECONDS.into();
        data.oaes = self.offered_events().into_bits().into();
        // 128-bit host identifiers.
        data.ctratt = 1.into();
        data.cntrltype = 1;
        data.oacs = Oacs::new()
            .with_format(true)
            .with_doorbell_buffers(options.doorbell_buffers)
            .into_bits()
            .into();
        data.acl_z = 3;
        data.aerl_z = MAX_REQUESTS as u8 - 1;
        // One slot, read-only.
        data.frmw = 1 << 1 | 1;
        data.lpa = Lpa::new()
            .with_effects(true)
            .with_extended_data(true)
            .with_supported_pages(true)
            .into_bits();
        data.elpe_z = ERROR_LOG_ENTRIES as u8 - 1;
        data.wctemp = WARNING_TEMPERATURE.into();
        data.cctemp = CRITICAL_TEMPERATURE.into();
        data.kas = if options.keep_alive {
            KEEP_ALIVE_GRANULARITY
        } else {
            0
        }
        .into();
        // Entries of 64 and of 16 bytes, no others.
        data.sqes = 0x66;
        data.cqes = 0x44;
        data.nn = (self.subsystem().namespaces().len() as u32).into();
        data.oncs = Oncs::new()
            .with_compare(true)
            .with_write_uncorrectable(self.marks_blocks(None))
            .with_dataset_management(true)
            .with_write_zeroes(true)
            .with_save_and_select(true)
            .with_timestamp(true)
            .with_verify(true)
            .with_copy(true)
            .into_bits()
            .into();
        // There is one, and Flush of all namespaces flushes all.
        data.vwc = 0b111;
        data.ocfs = COPY_FORMATS.into();
        data.sgls = options.sgls.into();
        let nqn = names.nqn.as_bytes();
        data.subnqn[..nqn.len()].copy_from_slice(nqn);
        // 25 W, as good a number as any.
        data.psd0_mp = 2500.into();
        data
    }

    fn identify_controller_of(&self, csi: Csi) -> Result<Page, Failure> {
        match csi {
            Csi::NVM => {
                let mut data = nvm::IdentifyController::new_zeroed();
                // As many ranges as the command can have, so 0: no limit.
                data.dmrl = 0;
                Ok(page(&data))
            }
            Csi::ZONED => {
                let mut data = zns::IdentifyController::new_zeroed();
                let pages = (self.max_append() / MIN_PAGE_BYTES).max(1).ilog2() as u8;
                // Where it is no shorter than any transfer, that limit is the one.
                data.zasl = if pages == self.max_transfer_pages() {
                    0
                } else {
                    pages
                };
                Ok(page(&data))
            }
            _ => Err(Status::INVALID_FIELD.into()),
        }
    }

    /// Of an active namespace; zeros of one that could be, but is not.
    fn identify_active(
        &self,
        nsid: u32,
        data: impl FnOnce(&Namespace) -> Result<Page, Failure>,
    ) -> Result<Page, Failure> {
        let namespace = self
            .subsystem()
            .namespace(nsid)
            .ok_or(Status::INVALID_NAMESPACE_OR_FORMAT)?;
        if self.is_active(namespace) {
            data(namespace)
        } else {
            Ok([0; IDENTIFY_BYTES])
        }
    }

    fn identify_allocated(
        &self,
        nsid: u32,
        data: impl FnOnce(&Namespace) -> Result<Page, Failure>,
    ) -> Result<Page, Failure> {
        data(
            self.subsystem()
                .namespace(nsid)
                .ok_or(Status::INVALID_NAMESPACE_OR_FORMAT)?,
        )
    }

    fn identify_namespace(&self, namespace: &Namespace) -> Page {
        let mut data = nvm::IdentifyNamespace::new_zeroed();
        let (formats, format) = namespace.formats();
        let blocks = namespace.blocks();
        data.nsze = blocks.into();
        data.ncap = blocks.into();
        data.nuse = blocks.into();
        data.nlbaf_z = (formats.len() - 1) as u8;
        data.flbas = Flbas::new().with_low(format as u8).into_bits();
        // Blocks of less than a page cost a page's work each.
        let best = formats.len() - 1;
        for (index, (place, size)) in data.lbaf.iter_mut().zip(&formats).enumerate() {
            place.lbads = size.ilog2() as u8;
            place.rp = if index == best { BEST } else { BETTER };
        }
        data.nmic = self.sharing();
        // What is deallocated reads as zeros, and Write Zeroes can deallocate.
        data.dlfeat = 0b1001;
        let copy_blocks = COPY_MAX_BYTES >> namespace.block_shift();
        data.mssrl = u16::try_from(copy_blocks).unwrap_or(u16::MAX).into();
        data.mcl = u32::try_from(copy_blocks).unwrap_or(u32::MAX).into();
        data.msrc_z = (COPY_MAX_RANGES - 1) as u8;
        data.nsattr = namespace.read_only().into();
        page(&data)
    }

    fn identify_independent(&self, namespace: &Namespace) -> IdentifyNamespaceIndependent {
        let mut data = IdentifyNamespaceIndependent::new_zeroed();
        data.nmic = self.sharing();
        data.nsattr = namespace.read_only().into();
        data.nstat = 1;
        data
    }

    fn sharing(&self) -> u8 {
        self.options().shared.into()
    }

    fn descriptors(&self, nsid: u32) -> Result<Page, Failure> {
        let namespace = self.active(nsid).ok_or(Status::INVALID_NAMESPACE_OR_FORMAT)?;
        let uuid = self.subsystem().uuid(nsid, namespace);
        let mut page = [0; IDENTIFY_BYTES];
        let mut at = 0;
        for (kind, value) in [
            (Nidt::UUID, uuid.as_bytes().as_slice()),
            (Nidt::CSI, &[namespace.csi().0]),
        ] {
            page[at] = kind.0;
            page[at + 1] = value.len() as u8;
            page[at + 4..][..value.len()].copy_from_slice(value);
            at += 4 + value.len();
        }
        Ok(page)
    }

    /// Identifiers above `after` of the namespaces that are wanted.
    fn list(&self, after: u32, wanted: impl Fn(&Namespace) -> bool) -> Result<Page, Failure> {
        if after >= NSID_ALL - 1 {
            return Err(Status::INVALID_NAMESPACE_OR_FORMAT.into());
        }
        let mut page = [0; IDENTIFY_BYTES];
        let ids = self
            .subsystem()
            .numbered()
            .filter(|(nsid, namespace)| *nsid > after && wanted(namespace));
        for (place, (nsid, _)) in page.as_chunks_mut().0.iter_mut().zip(ids) {
            *place = nsid.to_le_bytes();
        }
        Ok(page)
    }

    /// Identifiers of the subsystem's controllers from `from` on.
    fn controllers(&self, from: u16) -> Page {
        let mut ids: Vec<u16> = self
            .subsystem()
            .alive()
            .iter()
            .map(|controller| controller.id())
            .collect();
        ids.retain(|id| *id >= from);
        ids.sort_unstable();
        let mut page = [0; IDENTIFY_BYTES];
        let (count, places) = page.split_at_mut(2);
        let places = places.as_chunks_mut().0;
        ids.truncate(places.len());
        count.copy_from_slice(&(ids.len() as u16).to_le_bytes());
        for (place, id) in places.iter_mut().zip(ids) {
            *place = id.to_le_bytes();
        }
        page
    }

    /// One combination: the NVM command set and zoned namespaces.
    fn command_sets(&self, cntid: u16) -> Result<Page, Failure> {
        if cntid != u16::MAX && cntid != self.id() {
            return Err(Status::INVALID_FIELD.into());
        }
        let mut page = [0; IDENTIFY_BYTES];
        let combination = 1_u64 << Csi::NVM.0 | 1 << Csi::ZONED.0;
        page[..8].copy_from_slice(&combination.to_le_bytes());
        Ok(page)
    }
}

/// Identify Namespace of a command set.
fn namespace_of(namespace: &Namespace, csi: Csi) -> Result<Page, Failure> {
    match (csi, namespace.zones()) {
        // Zoned namespaces have what those of the NVM command set have: nothing here.
        (Csi::NVM, _) => Ok([0; IDENTIFY_BYTES]),
        (Csi::ZONED, Some(zones)) => {
            let mut data = zns::IdentifyNamespace::new_zeroed();
            // No operation characteristics: Linux takes no namespace that has some.
            data.ozcs = Ozcs::new()
                .with_razb(zones.read_across)
                .with_zrwasup(zones.zrwa.is_some())
                .into_bits()
                .into();
            data.mar_z = limit_z(zones.max_active).into();
            data.mor_z = limit_z(zones.max_open).into();
            for (place, size) in data.lbafe.iter_mut().zip(namespace.formats().0) {
                place.zsze = (zones.size / u64::from(size)).into();
                place.zdes = (zones.extension_size as usize / ZDES_UNIT) as u8;
            }
            if let Some(zrwa) = zones.zrwa {
                let shift = namespace.block_shift();
                let blocks = |bytes: u64| (bytes >> shift) as u16;
                data.numzrwa = zrwa_count(zones, zrwa).into();
                data.zrwafg = blocks(zrwa.granularity).into();
                data.zrwasz = blocks(zrwa.size).into();
                data.zrwacap = ZrwaCap::new().with_expflushsup(zrwa.explicit_commit).into_bits();
            }
            Ok(page(&data))
        }
        _ => Err(Status::INVALID_FIELD.into()),
    }
}

/// A limit, 0-based; 0 stands for none.
fn limit_z(limit: u32) -> u32 {
    limit.checked_sub(1).unwrap_or(NO_LIMIT)
}

/// How many random write areas there can be at once; not 0-based, as QEMU has it. Only active zones have one.
fn zrwa_count(zones: &Zones, zrwa: Zrwa) -> u32 {
    [zrwa.count, zones.max_active, zones.count]
        .into_iter()
        .filter(|limit| *limit != 0)
        .min()
        .unwrap_or(0)
}

fn check_csi(csi: Csi) -> Result<(), Failure> {
    match csi {
        Csi::NVM | Csi::ZONED => Ok(()),
        _ => Err(Status::INVALID_FIELD.into()),
    }
}

/// A structure's bytes; all of them are 4096 long.
fn page(data: &(impl IntoBytes + zerocopy::Immutable)) -> Page {
    let mut page = [0; IDENTIFY_BYTES];
    page.copy_from_slice(data.as_bytes());
    page
}

fn blank_padded(field: &mut [u8], text: &str) {
    field.fill(b' ');
    field[..text.len()].copy_from_slice(text.as_bytes());
}

/// Relative performance of LBA formats.
const BEST: u8 = 0;
const BETTER: u8 = 1;
/// Composite temperature from which on it fails, kelvins.
const CRITICAL_TEMPERATURE: u16 = 373;
/// Keep alive timers run in units of this many times 100 ms.
const KEEP_ALIVE_GRANULARITY: u16 = 10;

const _: () = assert!(MAX_NAMESPACES * 4 <= IDENTIFY_BYTES);
