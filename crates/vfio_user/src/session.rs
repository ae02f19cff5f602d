//! One connection's state, and what each command does to it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use zbdkit_io::mem::StillInUse;
use zbdkit_spec::vfio_user::{
    DeviceInfo, DmaMap, DmaUnmap, IrqInfo, RegionAccess, RegionInfo, RegionWriteOne, SparseArea, SparseMmap,
    device_info, flag, irq_info, region_info,
};
use zerocopy::IntoBytes;

use crate::device::{Device, Link, Mmap, Region, Stuck};
use crate::dma::{Dma, MapError};
use crate::irq::{Interrupts, IrqKind};
use crate::line::Line;
use crate::message::{
    IrqAction, IrqData, Limits, Malformed, RawMessage, Request, SetIrqs, StreamError, error_reply, reply,
};
use crate::peer::PeerError;

/// How often replies of the client are looked for while memory is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Why a command is not done. The client is told the errno.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum Refused {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("command {0} comes before VERSION")]
    Unversioned(u16),
    #[error("VERSION comes a second time")]
    VersionAgain,
    #[error("region {0} does not exist")]
    NoSuchRegion(u32),
    #[error("{count} bytes at {offset:#x} are not in region {region}, or it does not allow this access")]
    Access { region: u32, offset: u64, count: u64 },
    #[error("interrupts {start} to {start} + {count} of kind {index} do not exist")]
    NoSuchIrq { index: u32, start: u32, count: u32 },
    #[error("interrupts of kind {index} do not support this")]
    IrqAction { index: u32 },
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("the device refused access to region {region} at {offset:#x}: {errno}")]
    Device { region: u32, offset: u64, errno: Errno },
    #[error(transparent)]
    Stuck(#[from] Stuck),
}

impl Refused {
    /// What the client is told.
    pub fn errno(&self) -> Errno {
        match self {
            Refused::Malformed(malformed) => malformed.errno(),
            Refused::Map(error) => error.errno(),
            Refused::Device { errno, .. } => *errno,
            Refused::Stuck(_) => Errno::BUSY,
            Refused::IrqAction { .. } => Errno::OPNOTSUPP,
            Refused::Unversioned(_)
            | Refused::VersionAgain
            | Refused::NoSuchRegion(_)
            | Refused::Access { .. }
            | Refused::NoSuchIrq { .. } => Errno::INVAL,
        }
    }
}

/// What came of a command.
#[derive(Debug)]
pub struct Outcome {
    /// To be sent.
    pub reply: Option<Reply>,
    /// Why it is not done.
    pub refused: Option<Refused>,
    /// The connection cannot go on after the reply: there is no version that both know.
    pub ends: bool,
}

/// A reply.
#[derive(Debug)]
pub struct Reply {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What goes with it.
    pub fd: Option<Arc<OwnedFd>>,
}

/// The payload of a reply.
struct Answer {
    payload: Vec<u8>,
    fd: Option<Arc<OwnedFd>>,
}

impl Answer {
    fn of(payload: impl Into<Vec<u8>>) -> Answer {
        Answer {
            payload: payload.into(),
            fd: None,
        }
    }
}

/// A client that cannot be served.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum OpenError {
    #[error(transparent)]
    Stuck(#[from] Stuck),
    #[error("cannot make an eventfd: {0}")]
    Io(#[from] io::Error),
}

/// A client that left something in flight behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum CloseError {
    #[error(transparent)]
    Stuck(#[from] Stuck),
    #[error(transparent)]
    StillInUse(#[from] StillInUse),
}

/// A connection to a client.
pub struct Session<'a, D: Device> {
    device: &'a mut D,
    link: Link,
    version: Option<Limits>,
    release_within: Duration,
}

impl<'a, D: Device> Session<'a, D> {
    /// A fresh connection. `release_within` is how long the I/O in flight may keep memory that the client takes
    /// away.
    ///
    /// # Errors
    /// Where the device is not at rest yet.
    pub fn open(device: &'a mut D, release_within: Duration) -> Result<Self, OpenError> {
        let link = Link {
            dma: Dma::new()?,
            interrupts: Arc::new(Interrupts::new(device.irqs())),
        };
        device.connected(link.clone())?;
        Ok(Session {
            device,
            link,
            version: None,
            release_within,
        })
    }

    pub(crate) fn dma(&self) -> &Dma {
        &self.link.dma
    }

    pub(crate) fn wants_line(&self) -> bool {
        self.device.wants_line()
    }

    pub(crate) fn take_line(&mut self, line: Line) {
        self.device.take_line(line);
    }

    /// Takes a reply to a command of ours.
    ///
    /// # Errors
    /// Where the connection must be closed.
    pub(crate) fn take_reply(&self, message: &RawMessage) -> Result<(), PeerError> {
        self.link.dma.peer().complete(message)
    }

    /// Does what a command asks. Where that waits for memory, `pump` is called now and then: it has to take replies
    /// that arrive, and must not wait.
    ///
    /// # Errors
    /// What `pump` says.
    pub fn dispatch(
        &mut self,
        message: RawMessage,
        pump: &mut dyn FnMut(&Dma) -> Result<(), StreamError>,
    ) -> Result<Outcome, StreamError> {
        let header = message.header;
        let command = header.command.get();
        let result = Request::parse(message).map_err(Refused::from);
        let was_version = self.version.is_some();
        let result = match result {
            Ok(request) => self.handle(command, request, pump)?,
            Err(refused) => Err(refused),
        };
        let wanted = header.flags.get() & flag::NO_REPLY == 0;
        let (reply, refused) = match result {
            Ok(answer) => {
                let bytes = reply(&header, &answer.payload);
                (Reply { bytes, fd: answer.fd }, None)
            }
            Err(refused) => {
                let bytes = error_reply(&header, refused.errno());
                (Reply { bytes, fd: None }, Some(refused))
            }
        };
        Ok(Outcome {
            reply: wanted.then_some(reply),
            ends: refused.is_some() && !was_version,
            refused,
        })
    }

    /// Ends the connection: the device comes to rest, and the client's memory is given up.
    ///
    /// # Errors
    /// Where that did not happen in time.
    pub fn close(self) -> Result<(), CloseError> {
        self.link.dma.peer().close();
        let result = self.device.disconnected();
        self.link.interrupts.disable_all();
        let released = self.link.dma.revoke(Instant::now() + self.release_within);
        result?;
        Ok(released?)
    }

    /// The outer error is that of `pump`.
    fn handle(
        &mut self,
        command: u16,
        request: Request,
        pump: &mut dyn FnMut(&Dma) -> Result<(), StreamError>,
    ) -> Result<Result<Answer, Refused>, StreamError> {
        let done = || Answer::of([]);
        let result = match (self.version, request) {
            (None, Request::Version(limits)) => {
                self.link.dma.peer().limit(limits.max_data);
                self.version = Some(limits);
                Ok(Answer::of(limits.reply()))
            }
            (None, _) => Err(Refused::Unversioned(command)),
            (Some(_), Request::Version(_)) => Err(Refused::VersionAgain),
            (Some(_), request) => match request {
                Request::Version(_) => Err(Refused::VersionAgain),
                Request::DmaMap { map, fd } => self.map(&map, fd).map(|()| done()),
                Request::DmaUnmap { address, size } => return self.unmap(address, size, false, pump),
                Request::DmaUnmapAll => return self.unmap(0, u64::MAX, true, pump),
                Request::GetInfo => Ok(self.info()),
                Request::GetRegionInfo { argsz, index } => self.region_info(argsz, index),
                Request::GetIrqInfo { index } => self.irq_info(index),
                Request::SetIrqs(set) => self.set_irqs(set).map(|()| done()),
                Request::RegionRead(access) => self.region_read(&access),
                Request::RegionWrite(access, data) => self
                    .region_write(&access, &data)
                    .map(|()| Answer::of(access.as_bytes())),
                Request::RegionWriteMulti(writes) => self.region_write_multi(&writes),
                Request::Reset => self.reset().map(|()| done()),
            },
        };
        Ok(result)
    }

    // Memory.

    fn map(&self, map: &DmaMap, fd: Option<OwnedFd>) -> Result<(), Refused> {
        Ok(self.link.dma.map(map, fd)?)
    }

    /// Stops new access, and says so to the client only when the last one in flight has ended.
    fn unmap(
        &mut self,
        address: u64,
        size: u64,
        all: bool,
        pump: &mut dyn FnMut(&Dma) -> Result<(), StreamError>,
    ) -> Result<Result<Answer, Refused>, StreamError> {
        let dma = &self.link.dma;
        let bytes = match dma.begin_unmap(address, size) {
            Ok(bytes) => bytes,
            Err(error) => return Ok(Err(error.into())),
        };
        self.device.unmapping(address, size);
        let deadline = Instant::now() + self.release_within;
        loop {
            let until = deadline.min(Instant::now() + LOOK_EVERY);
            match dma.finish_unmap(until) {
                Ok(()) => break,
                Err(in_use) if until == deadline => {
                    self.device.fatal();
                    return Ok(Err(MapError::from(in_use).into()));
                }
                Err(_) => pump(dma)?,
            }
        }
        let entry = DmaUnmap {
            argsz: (size_of::<DmaUnmap>() as u32).into(),
            address: if all { 0 } else { address }.into(),
            size: bytes.into(),
            ..DmaUnmap::default()
        };
        Ok(Ok(Answer::of(entry.as_bytes())))
    }

    // What the device is.

    fn info(&self) -> Answer {
        let info = DeviceInfo {
            argsz: (size_of::<DeviceInfo>() as u32).into(),
            flags: (device_info::RESET | device_info::PCI).into(),
            num_regions: (self.device.regions().len() as u32).into(),
            num_irqs: (self.device.irqs().len() as u32).into(),
        };
        Answer::of(info.as_bytes())
    }

    fn region(&self, index: u32) -> Result<&Region, Refused> {
        let regions = self.device.regions();
        regions.get(index as usize).ok_or(Refused::NoSuchRegion(index))
    }

    /// A client that makes too little room for the areas gets the rest, and asks again with what `argsz` says. It hears where
    /// they would be all the same: QEMU takes a region with capabilities at offset 0 for an error.
    fn region_info(&self, room: u32, index: u32) -> Result<Answer, Refused> {
        let region = self.region(index)?;
        let bit = |set: bool, bit: u32| if set { bit } else { 0 };
        let areas = region.mmap.as_ref().map(sparse_mmap).unwrap_or_default();
        let whole = size_of::<RegionInfo>() + areas.len();
        let fits = whole <= room as usize;
        let flags = bit(region.readable, region_info::READ)
            | bit(region.writable, region_info::WRITE)
            | bit(region.mmap.is_some(), region_info::MMAP | region_info::CAPS);
        let info = RegionInfo {
            argsz: (whole as u32).into(),
            flags: flags.into(),
            index: index.into(),
            cap_offset: match areas.is_empty() {
                true => 0.into(),
                false => (size_of::<RegionInfo>() as u32).into(),
            },
            size: region.size.into(),
            offset: region.mmap.as_ref().map_or(0, |mmap| mmap.offset).into(),
        };
        let mut payload = info.as_bytes().to_vec();
        if fits {
            payload.extend(areas);
        }
        let fd = region.mmap.as_ref().map(|mmap| mmap.fd.clone());
        Ok(Answer { payload, fd })
    }

    fn irq_kind(&self, index: u32) -> Result<IrqKind, Refused> {
        let (start, count) = (0, 0);
        let kind = self.link.interrupts.kind(index);
        kind.ok_or(Refused::NoSuchIrq { index, start, count })
    }

    fn irq_info(&self, index: u32) -> Result<Answer, Refused> {
        let kind = self.irq_kind(index)?;
        let bit = |set: bool, bit: u32| if set { bit } else { 0 };
        let flags = irq_info::EVENTFD
            | bit(kind.maskable, irq_info::MASKABLE)
            | bit(kind.automasked, irq_info::AUTOMASKED);
        let info = IrqInfo {
            argsz: (size_of::<IrqInfo>() as u32).into(),
            flags: flags.into(),
            index: index.into(),
            count: kind.count.into(),
        };
        Ok(Answer::of(info.as_bytes()))
    }

    // Interrupts.

    fn set_irqs(&mut self, set: SetIrqs) -> Result<(), Refused> {
        let SetIrqs {
            index,
            start,
            count,
            action,
            data,
        } = set;
        let kind = self.irq_kind(index)?;
        let end = start.checked_add(count).filter(|end| *end <= kind.count);
        let end = end.ok_or(Refused::NoSuchIrq { index, start, count })?;
        if action != IrqAction::Trigger && !kind.maskable {
            return Err(Refused::IrqAction { index });
        }
        let interrupts = &self.link.interrupts;
        let act = |vector| match action {
            IrqAction::Mask => interrupts.mask(index, vector),
            IrqAction::Unmask => interrupts.unmask(index, vector),
            IrqAction::Trigger => interrupts.trigger(index, vector),
        };
        match data {
            IrqData::None if count == 0 && start == 0 && action == IrqAction::Trigger => {
                interrupts.disable(index)
            }
            IrqData::None => (start..end).for_each(act),
            IrqData::Bool(bools) => (start..end)
                .zip(bools)
                .filter(|(_, b)| *b != 0)
                .for_each(|(v, _)| act(v)),
            // Eventfds that would tell us of masks: nobody sends those.
            IrqData::Eventfd(_) if action != IrqAction::Trigger => return Err(Refused::IrqAction { index }),
            IrqData::Eventfd(fds) => {
                let mut fds = fds.into_iter();
                (start..end).for_each(|vector| interrupts.assign(index, vector, fds.next()));
            }
        }
        Ok(())
    }

    // Regions.

    fn check_access(&self, access: &RegionAccess, allowed: impl Fn(&Region) -> bool) -> Result<(), Refused> {
        let (index, offset) = (access.region.get(), access.offset.get());
        let region = self.region(index)?;
        let count = u64::from(access.count.get());
        let end = offset.checked_add(count).filter(|end| *end <= region.size);
        if end.is_none() || !allowed(region) {
            return Err(Refused::Access {
                region: index,
                offset,
                count,
            });
        }
        Ok(())
    }

    fn region_read(&mut self, access: &RegionAccess) -> Result<Answer, Refused> {
        self.check_access(access, |region| region.readable)?;
        let (region, offset) = (access.region.get(), access.offset.get());
        let mut payload = access.as_bytes().to_vec();
        let data = payload.len();
        payload.resize(data + access.count.get() as usize, 0);
        let result = self.device.region_read(region, offset, &mut payload[data..]);
        result.map_err(|errno| Refused::Device {
            region,
            offset,
            errno,
        })?;
        Ok(Answer::of(payload))
    }

    fn region_write(&mut self, access: &RegionAccess, data: &[u8]) -> Result<(), Refused> {
        self.check_access(access, |region| region.writable)?;
        let (region, offset) = (access.region.get(), access.offset.get());
        let result = self.device.region_write(region, offset, data);
        result.map_err(|errno| Refused::Device {
            region,
            offset,
            errno,
        })
    }

    /// Stops at the first write that fails, and says how many were done.
    fn region_write_multi(&mut self, writes: &[RegionWriteOne]) -> Result<Answer, Refused> {
        for (index, one) in writes.iter().enumerate() {
            let data = &one.data[..one.access.count.get() as usize];
            match self.region_write(&one.access, data) {
                Ok(()) => {}
                Err(refused) if index == 0 => return Err(refused),
                Err(_) => return Ok(Answer::of((index as u64).to_le_bytes())),
            }
        }
        Ok(Answer::of((writes.len() as u64).to_le_bytes()))
    }

    fn reset(&mut self) -> Result<(), Refused> {
        // What waits for the client would wait for us, now and as long as we wait for the device.
        let peer = self.link.dma.peer();
        peer.refuse();
        let result = self.device.reset();
        peer.allow();
        Ok(result?)
    }
}

fn sparse_mmap(mmap: &Mmap) -> Vec<u8> {
    let header = SparseMmap {
        id: SparseMmap::ID.into(),
        version: 1.into(),
        next: 0.into(),
        nr_areas: (mmap.areas.len() as u32).into(),
        reserved: 0.into(),
    };
    let mut bytes = header.as_bytes().to_vec();
    for area in &mmap.areas {
        let area = SparseArea {
            offset: area.start.into(),
            size: (area.end - area.start).into(),
        };
        bytes.extend(area.as_bytes());
    }
    bytes
}
