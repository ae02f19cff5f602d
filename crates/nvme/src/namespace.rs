//! A namespace: a device of the block graph in logical blocks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;
use zbdkit_block::{CrossZone, Device, Error, Lane, ZoneOp};
use zbdkit_io::{IoBuf, yield_now};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::{Csi, MIN_PAGE_BYTES};
use zbdkit_spec::nvme::zns::{ReportHeader, ZoneDescriptor};
use zbdkit_zone::{Model, Zrwa};

use crate::command::Blocks;
use crate::status::{Failure, Kind, failure};

/// Bytes given back at a time, before others get their turn.
const DEALLOCATE_STEP: u64 = 64 << 20;

/// How a device is shown as a namespace.
#[derive(Clone, Debug, Default)]
pub struct NamespaceOptions {
    /// What the host knows the namespace by. Without, one is made of the subsystem's name and the namespace's number.
    pub uuid: Option<Uuid>,
    /// Reads may cross the borders of zones (RAZB).
    pub read_across_zones: bool,
}

/// A device that cannot be a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NamespaceError {
    /// ZNS knows sequential-write-required zones only.
    #[error("{0} of its zones are conventional: namespaces have sequential zones only (ZNS 1.2, 2.1)")]
    Conventional(u32),
    /// ZNS knows host-managed devices only.
    #[error(
        "it is host-aware: zones of namespaces can only be written at their write pointers (ZNS 1.2, 2.1)"
    )]
    HostAware,
    /// The append limit cannot be told.
    #[error(
        "its zone append limit is {0} bytes: a namespace's is a power of two of at least 8192 (ZNS 1.2, 4.1.5.2)"
    )]
    AppendLimit(u64),
    /// The size or the granularity of random write areas has no place in Identify.
    #[error(
        "its random write areas are of {0} blocks: those of a namespace have at most 65535 (ZNS 1.2, 4.1.5.1)"
    )]
    RandomWriteArea(u64),
}

/// The zones of a namespace.
#[derive(Clone, Copy, Debug)]
pub struct Zones {
    /// Bytes of a zone.
    pub size: u64,
    /// Zones.
    pub count: u32,
    /// Most zones open, 0 without a limit.
    pub max_open: u32,
    /// Most zones active, 0 without a limit.
    pub max_active: u32,
    /// Longest append, bytes; 0 without a limit of its own.
    pub max_append: u64,
    /// Reads may cross their borders.
    pub read_across: bool,
    /// Their random write areas, if they have such.
    pub zrwa: Option<Zrwa>,
    /// Bytes of a descriptor extension, 0 without.
    pub extension_size: u32,
}

/// A namespace. Shared by all controllers of its subsystem.
pub struct Namespace {
    pub(crate) device: Device,
    /// Bytes.
    size: u64,
    uuid: Option<Uuid>,
    zones: Option<Zones>,
    formatting: AtomicBool,
    /// Zones, by their first bytes, that a host's command takes offline: what hosts need not be told.
    own_changes: Mutex<Vec<u64>>,
}

impl Namespace {
    /// Shows a device as a namespace.
    ///
    /// # Errors
    /// Zones that ZNS does not know.
    pub fn new(device: Device, options: &NamespaceOptions) -> Result<Namespace, NamespaceError> {
        let limits = device.limits();
        let zones = match &limits.zoned {
            None => None,
            Some(geometry) if geometry.model() != Model::HostManaged => {
                return Err(NamespaceError::HostAware);
            }
            Some(geometry) if geometry.nr_conventional() != 0 => {
                return Err(NamespaceError::Conventional(geometry.nr_conventional()));
            }
            Some(geometry) if geometry.max_append() < 2 * MIN_PAGE_BYTES => {
                return Err(NamespaceError::AppendLimit(geometry.max_append()));
            }
            Some(geometry) => Some(Zones {
                size: geometry.zone_size(),
                count: geometry.nr_zones(),
                max_open: geometry.max_open(),
                max_active: geometry.max_active(),
                max_append: geometry.max_append(),
                read_across: options.read_across_zones,
                zrwa: geometry.zrwa(),
                extension_size: geometry.extension_size(),
            }),
        };
        if let Some(zrwa) = zones.and_then(|zones| zones.zrwa) {
            let blocks = zrwa.size.max(zrwa.granularity) / u64::from(limits.block_size);
            if blocks > u16::MAX.into() {
                return Err(NamespaceError::RandomWriteArea(blocks));
            }
        }
        Ok(Namespace {
            // A short last zone is shown at full size, with a smaller capacity.
            size: zones.map_or(limits.size, |zones| zones.size * u64::from(zones.count)),
            uuid: options.uuid,
            zones,
            formatting: AtomicBool::new(false),
            own_changes: Mutex::default(),
            device,
        })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes of a logical block now, as a power of two. Format NVM may change it: a command asks once.
    #[inline]
    pub fn block_shift(&self) -> u32 {
        self.device.block_size().ilog2()
    }

    /// Size in logical blocks.
    pub fn blocks(&self) -> u64 {
        self.size >> self.block_shift()
    }

    /// Bytes of a logical block in each of its LBA formats, by their indexes, and the index of the one that it has.
    pub(crate) fn formats(&self) -> (Vec<u32>, usize) {
        let sizes = self.device.block_sizes();
        let now = self.device.block_size();
        let index = sizes.iter().position(|size| *size == now);
        (sizes, index.unwrap_or_default())
    }

    /// Bytes that one command must be able to transfer, at least (MDTS): a report of one zone with its descriptor extension
    /// (ZNS 1.2, Extended Report Zones), which is longer than the extension alone. 0 without extensions.
    pub fn least_transfer(&self) -> u64 {
        match self.zones.map_or(0, |zones| zones.extension_size) {
            0 => 0,
            size => size_of::<ReportHeader>() as u64 + size_of::<ZoneDescriptor>() as u64 + u64::from(size),
        }
    }

    /// Its zones, if it is zoned.
    pub fn zones(&self) -> Option<&Zones> {
        self.zones.as_ref()
    }

    /// Its command set.
    pub fn csi(&self) -> Csi {
        if self.zones.is_some() {
            Csi::ZONED
        } else {
            Csi::NVM
        }
    }

    /// Nothing can be written.
    pub fn read_only(&self) -> bool {
        self.device.limits().read_only
    }

    pub(crate) fn uuid(&self) -> Option<Uuid> {
        self.uuid
    }

    /// Takes the namespace out of use; false where somebody else has.
    pub(crate) fn begin_format(&self) -> bool {
        !self.formatting.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn end_format(&self) {
        self.formatting.store(false, Ordering::Release);
    }

    /// Takes the zone that starts at this byte offline on behalf of a host.
    pub(crate) async fn set_offline(&self, lane: &Lane, start: u64) -> Result<(), Failure> {
        self.own_changes().push(start);
        let result = self.device.zone_op(lane, ZoneOp::SetOffline, start).await;
        let mut own = self.own_changes();
        if let Some(at) = own.iter().position(|zone| *zone == start) {
            own.swap_remove(at);
        }
        result.map_err(|error| failure(&error, Kind::Manage))
    }

    /// Whether [`Namespace::set_offline`] is what changes a zone.
    pub(crate) fn changes_itself(&self, start: u64) -> bool {
        self.own_changes().contains(&start)
    }

    fn own_changes(&self) -> MutexGuard<'_, Vec<u64>> {
        self.own_changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether commands can be carried out now.
    pub(crate) fn check_ready(&self) -> Result<(), Failure> {
        if self.formatting.load(Ordering::Acquire) {
            return Err(Status::FORMAT_IN_PROGRESS.into());
        }
        Ok(())
    }

    /// Byte offset and length of a range, within the namespace. A command with several ranges asks [`Self::bytes_of`].
    pub(crate) fn bytes(&self, blocks: Blocks) -> Result<(u64, u64), Failure> {
        self.bytes_of(blocks, self.block_shift())
    }

    /// The same in blocks of that size: the namespace may be formatted while a command waits for its data, and a command must
    /// not see it half before and half after that.
    pub(crate) fn bytes_of(&self, blocks: Blocks, shift: u32) -> Result<(u64, u64), Failure> {
        let end = blocks.start.checked_add(blocks.count.into());
        if end.is_none_or(|end| end > self.size >> shift) {
            return Err(Status::LBA_OUT_OF_RANGE.into());
        }
        Ok((blocks.start << shift, u64::from(blocks.count) << shift))
    }

    pub(crate) fn cross(&self) -> CrossZone {
        match &self.zones {
            Some(zones) if !zones.read_across => CrossZone::Refuse,
            _ => CrossZone::Allow,
        }
    }

    /// Reads into all of `buf`.
    pub(crate) async fn read(&self, lane: &Lane, buf: IoBuf, offset: u64) -> Result<(), Failure> {
        let cross = self.cross();
        let result = if self.ends_inside(offset, buf.len() as u64) {
            self.device.read(lane, buf, offset, cross).await
        } else {
            self.read_past_end(lane, &buf, offset, cross).await
        };
        result.map_err(|error| failure(&error, Kind::Read))
    }

    /// The last zone is shown larger than it is: what is behind its end was never written.
    #[cold]
    async fn read_past_end(
        &self,
        lane: &Lane,
        buf: &IoBuf,
        offset: u64,
        cross: CrossZone,
    ) -> Result<(), Error> {
        let inside = self.device.limits().size.saturating_sub(offset) as usize;
        buf.fill(inside..buf.len(), 0);
        if inside == 0 {
            return Ok(());
        }
        self.device.read(lane, buf.slice(0..inside), offset, cross).await
    }

    /// Writes all of `buf`.
    pub(crate) async fn write(&self, lane: &Lane, buf: IoBuf, offset: u64) -> Result<(), Failure> {
        self.check_capacity(offset, buf.len() as u64)?;
        let result = self.device.write(lane, buf, offset).await;
        result.map_err(|error| failure(&error, Kind::Write))
    }

    /// A write behind the end of a short last zone is one above its capacity.
    pub(crate) fn check_capacity(&self, offset: u64, len: u64) -> Result<(), Failure> {
        if self.ends_inside(offset, len) {
            Ok(())
        } else {
            Err(Status::ZONE_BOUNDARY_ERROR.into())
        }
    }

    fn ends_inside(&self, offset: u64, len: u64) -> bool {
        offset + len <= self.device.limits().size
    }

    /// Whether a range may be read that is read piece by piece.
    pub(crate) fn check_cross(&self, offset: u64, len: u64) -> Result<(), Failure> {
        match &self.zones {
            Some(zones) if !zones.read_across && offset / zones.size != (offset + len - 1) / zones.size => {
                Err(Status::ZONE_BOUNDARY_ERROR.into())
            }
            _ => Ok(()),
        }
    }

    /// Makes a range of a conventional namespace read as zeros and gives its space back, however long it is.
    pub(crate) async fn deallocate(&self, lane: &Lane, offset: u64, len: u64) -> Result<(), Failure> {
        let mut done = 0;
        while done < len {
            let step = DEALLOCATE_STEP.min(len - done);
            let result = self.device.write_zeroes(lane, offset + done, step, true).await;
            result.map_err(|error| failure(&error, Kind::Write))?;
            done += step;
            yield_now().await;
        }
        Ok(())
    }

    pub(crate) async fn flush(&self, lane: &Lane) -> Result<(), Failure> {
        let result = self.device.flush(lane).await;
        result.map_err(|error| failure(&error, Kind::Write))
    }
}
