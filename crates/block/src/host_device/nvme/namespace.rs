//! Commands to a zoned namespace.

use std::time::Duration;

use zbdkit_io::{File, IoBuf, NvmeCommand, NvmeQueue, sleep};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::{
    AdminOpcode, Cns, Csi, IDENTIFY_BYTES, IdentifyCdw10, IdentifyCdw11, StatusField,
};
use zbdkit_spec::nvme::nvm::{self, RwCdw12, slba};
use zbdkit_spec::nvme::zns::{self, AppendCdw12, ReceiveAction, ReceiveCdw13, SendAction, SendCdw13};
use zbdkit_zone::ZoneInfo;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::facts::{Identified, KernelLimits, NamespaceFacts, NamespaceProblem};
use super::report::{self, bytes_of};
use super::status::Failed;
use crate::error::Error;

/// Zones reported by one command at most: a quarter of a MiB of answer.
const REPORT_MAX: usize = 4096;

/// How often a command that the drive has not begun is sent again, and after how long.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(100);

/// A zoned namespace and the device that commands to it go through. Offsets and lengths are bytes, whole blocks.
pub(super) struct Namespace {
    device: File,
    pub(super) facts: NamespaceFacts,
}

impl Namespace {
    /// Asks the namespace what it is.
    pub(super) async fn identify(
        device: File,
        nsid: u32,
        kernel: KernelLimits,
    ) -> Result<Result<Namespace, NamespaceProblem>, Error> {
        let zoned = identify(&device, nsid, Cns::NAMESPACE_OF_CSI).await;
        let zoned = match zoned? {
            Ok(zoned) => zoned,
            // A namespace of another command set has no such structure.
            Err(Status::INVALID_FIELD | Status::INVALID_NAMESPACE_OR_FORMAT) => {
                return Ok(Err(NamespaceProblem::NotZoned));
            }
            Err(status) => return Err(refused(status)),
        };
        let from = Identified {
            zoned,
            namespace: identify(&device, nsid, Cns::NAMESPACE).await?.map_err(refused)?,
            controller: identify(&device, 0, Cns::CONTROLLER).await?.map_err(refused)?,
            zoned_controller: match identify(&device, 0, Cns::CONTROLLER_OF_CSI).await? {
                Ok(controller) => controller,
                // Without one, MDTS limits appends.
                Err(_) => zns::IdentifyController::new_zeroed(),
            },
        };
        Ok(NamespaceFacts::new(nsid, &from, kernel).map(|facts| Namespace { device, facts }))
    }

    /// The zones from the one that holds `from`, no more than `max` and what one command gives.
    pub(super) async fn report(&self, from: u64, max: usize) -> Result<Vec<ZoneInfo>, Error> {
        let first = from / self.facts.zone_size;
        let room = (self.facts.max_transfer as usize).saturating_sub(bytes_of(0, 0));
        let most = (room / size_of::<zns::ZoneDescriptor>()).clamp(1, REPORT_MAX);
        let zones = max.clamp(1, most);
        let answer = self
            .receive(ReceiveAction::REPORT, first, bytes_of(zones, 0))
            .await?;
        let zones = report::parse(&answer, first as u32, 0, &self.facts).ok_or(NONSENSE)?;
        Ok(zones.into_iter().map(|(zone, _)| zone).collect())
    }

    /// The descriptor extension of the zone that starts at `zone_start`.
    pub(super) async fn extension(&self, zone_start: u64) -> Result<Option<Vec<u8>>, Error> {
        let (first, size) = (zone_start / self.facts.zone_size, self.facts.extension_size);
        let answer = self
            .receive(ReceiveAction::EXTENDED_REPORT, first, bytes_of(1, size))
            .await?;
        let zones = report::parse(&answer, first as u32, size, &self.facts).ok_or(NONSENSE)?;
        let (_, extension) = zones.first().ok_or(NONSENSE)?;
        Ok(extension.map(<[u8]>::to_vec))
    }

    /// The answer to Zone Management Receive for the zones from number `first`.
    async fn receive(&self, action: ReceiveAction, first: u64, len: usize) -> Result<Vec<u8>, Error> {
        let buf = IoBuf::try_alloc(len).map_err(|e| Error::io("zone report", &e))?;
        let dwords = (len / 4 - 1) as u32;
        let cdw13 = ReceiveCdw13::new().with_zra(action.0).with_partial(true);
        let [low, high] = slba(first * self.zone_blocks());
        let command = self.command(
            zns::Opcode::ZONE_MANAGEMENT_RECEIVE.0,
            [low, high, dwords, cdw13.into_bits(), 0, 0],
        );
        match self.send(command, buf.clone()).await {
            Ok(Ok(_)) => Ok(buf.to_vec()),
            Ok(Err(status)) => Err(refused(status)),
            Err(error) => Err(Error::io("zone report", &error)),
        }
    }

    /// One action on the zone that starts at `zone_start`.
    pub(super) async fn manage(
        &self,
        op: &'static str,
        action: SendAction,
        zone_start: u64,
    ) -> Result<(), Error> {
        let cdw13 = SendCdw13::new().with_zsa(action.0);
        self.act(op, cdw13, zone_start, IoBuf::empty()).await
    }

    pub(super) async fn reset_all(&self) -> Result<(), Error> {
        let cdw13 = SendCdw13::new()
            .with_zsa(SendAction::RESET.0)
            .with_select_all(true);
        self.act("zone reset of all zones", cdw13, 0, IoBuf::empty())
            .await
    }

    pub(super) async fn open_with_zrwa(&self, zone_start: u64) -> Result<(), Error> {
        let cdw13 = SendCdw13::new().with_zsa(SendAction::OPEN.0).with_zsaso(true);
        self.act("zone open", cdw13, zone_start, IoBuf::empty()).await
    }

    pub(super) async fn flush_zrwa(&self, end: u64) -> Result<(), Error> {
        let cdw13 = SendCdw13::new().with_zsa(SendAction::FLUSH_EXPLICIT_ZRWA_RANGE.0);
        // The command names the last block of the range.
        let last = end.saturating_sub(self.facts.block_size.into());
        self.act("flush of a zone random write area", cdw13, last, IoBuf::empty())
            .await
    }

    pub(super) async fn set_extension(
        &self,
        zone_start: u64,
        extension: &[u8],
        zrwa: bool,
    ) -> Result<(), Error> {
        let cdw13 = SendCdw13::new()
            .with_zsa(SendAction::SET_DESCRIPTOR_EXTENSION.0)
            .with_zsaso(zrwa);
        let mut bytes = extension.to_vec();
        bytes.resize(self.facts.extension_size, 0);
        let op = "setting a zone descriptor extension";
        self.act(op, cdw13, zone_start, IoBuf::from_vec(bytes)).await
    }

    /// Zone Management Send.
    async fn act(&self, op: &'static str, cdw13: SendCdw13, offset: u64, data: IoBuf) -> Result<(), Error> {
        let [low, high] = slba(self.block(offset));
        let opcode = zns::Opcode::ZONE_MANAGEMENT_SEND.0;
        let command = self.command(opcode, [low, high, 0, cdw13.into_bits(), 0, 0]);
        let failed = Failed { op, offset, len: 0 };
        self.run(command, data, failed).await.map(drop)
    }

    /// Reads into `buf`, at most a transfer, within what one command may read.
    pub(super) async fn read(&self, buf: IoBuf, offset: u64) -> Result<(), Error> {
        let memory = self.memory(&buf)?;
        let target = memory.clone().unwrap_or_else(|| buf.clone());
        self.transfer("read", nvm::Opcode::READ, target, offset).await?;
        if let Some(memory) = memory {
            buf.copy_from_buf(&memory);
        }
        Ok(())
    }

    /// Writes `buf`, at most a transfer.
    pub(super) async fn write(&self, buf: IoBuf, offset: u64) -> Result<(), Error> {
        let source = self.filled(buf)?;
        self.transfer("write", nvm::Opcode::WRITE, source, offset).await
    }

    async fn transfer(
        &self,
        op: &'static str,
        opcode: nvm::Opcode,
        buf: IoBuf,
        offset: u64,
    ) -> Result<(), Error> {
        let [low, high] = slba(self.block(offset));
        let cdw12 = RwCdw12::new().with_nlb_z(self.blocks_z(&buf));
        let command = self.command(opcode.0, [low, high, cdw12.into_bits(), 0, 0, 0]);
        let len = buf.len() as u64;
        self.run(command, buf, Failed { op, offset, len }).await.map(drop)
    }

    /// Appends `buf`, at most `max_append`; the answer is where it went.
    pub(super) async fn append(&self, buf: IoBuf, zone_start: u64) -> Result<u64, Error> {
        let len = buf.len() as u64;
        if len == 0 || len > self.facts.max_append || !len.is_multiple_of(self.facts.block_size.into()) {
            return Err(Error::Io {
                op: "zone append",
                errno: libc::EINVAL,
            });
        }
        let [low, high] = slba(self.block(zone_start));
        let cdw12 = AppendCdw12::new().with_nlb_z(self.blocks_z(&buf));
        let opcode = zns::Opcode::ZONE_APPEND.0;
        let command = self.command(opcode, [low, high, cdw12.into_bits(), 0, 0, 0]);
        let failed = Failed {
            op: "zone append",
            offset: zone_start,
            len,
        };
        let block = self.run(command, self.filled(buf)?, failed).await?;
        block
            .checked_mul(self.facts.block_size.into())
            .filter(|at| {
                at.checked_sub(zone_start)
                    .is_some_and(|within| within <= self.facts.zone_size - len)
            })
            .ok_or(NONSENSE)
    }

    /// Makes completed writes durable.
    pub(super) async fn flush(&self) -> Result<(), Error> {
        if !self.facts.write_cache {
            return Ok(());
        }
        let command = self.command(nvm::Opcode::FLUSH.0, [0; 6]);
        match self.send(command, IoBuf::empty()).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Error::Io {
                op: "flush",
                errno: libc::EIO,
            }),
            Err(error) => Err(Error::io("flush", &error)),
        }
    }

    /// Sends an I/O command. A failure is explained, with the zone's report where that helps.
    async fn run(&self, command: NvmeCommand, data: IoBuf, failed: Failed) -> Result<u64, Error> {
        match self.send(command, data).await {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(status)) => {
                let zones = self.report(failed.offset, 1).await.unwrap_or_default();
                Err(failed.error(status, zones.first(), &self.facts))
            }
            Err(error) => Err(Error::io(failed.op, &error)),
        }
    }

    async fn send(&self, command: NvmeCommand, data: IoBuf) -> std::io::Result<Result<u64, Status>> {
        send(&self.device, command, data).await
    }

    fn command(&self, opcode: u8, cdw10_15: [u32; 6]) -> NvmeCommand {
        NvmeCommand {
            queue: NvmeQueue::Io,
            opcode,
            nsid: self.facts.nsid,
            cdw10_15,
            timeout_ms: 0,
        }
    }

    /// Memory for a command on `buf`, where that itself is in more pieces than a command takes.
    fn memory(&self, buf: &IoBuf) -> Result<Option<IoBuf>, Error> {
        let pages = buf.len().div_ceil(zbdkit_io::BUF_ALIGN);
        // A piece that is not aligned to pages lies on one more of them.
        if pages + buf.segments().len() <= self.facts.max_segments {
            return Ok(None);
        }
        let memory = IoBuf::try_alloc(buf.len()).map_err(|e| Error::io("finding memory", &e))?;
        Ok(Some(memory))
    }

    /// `buf`, or a copy of it in fewer pieces.
    fn filled(&self, buf: IoBuf) -> Result<IoBuf, Error> {
        let memory = self.memory(&buf)?;
        Ok(match memory {
            Some(memory) => {
                memory.copy_from_buf(&buf);
                memory
            }
            None => buf,
        })
    }

    /// The number of blocks of a buffer that is no longer than a transfer and not empty, as commands count them.
    fn blocks_z(&self, buf: &IoBuf) -> u16 {
        (buf.len() as u64 / u64::from(self.facts.block_size) - 1) as u16
    }

    fn block(&self, offset: u64) -> u64 {
        offset / u64::from(self.facts.block_size)
    }

    fn zone_blocks(&self) -> u64 {
        self.block(self.facts.zone_size)
    }
}

/// The drive's answer is not one that it may give.
const NONSENSE: Error = Error::Io {
    op: "making sense of the drive's answer",
    errno: libc::EIO,
};

/// A command that is not about any zone failed.
fn refused(status: Status) -> Error {
    Error::Io {
        op: "an NVMe command",
        errno: match status {
            Status::INVALID_OPCODE => libc::EOPNOTSUPP,
            Status::INVALID_FIELD | Status::INVALID_NAMESPACE_OR_FORMAT => libc::EINVAL,
            _ => libc::EIO,
        },
    }
}

async fn identify<T: FromBytes + IntoBytes>(
    device: &File,
    nsid: u32,
    cns: Cns,
) -> Result<Result<T, Status>, Error> {
    let csi = match cns {
        Cns::NAMESPACE_OF_CSI | Cns::CONTROLLER_OF_CSI => Csi::ZONED,
        _ => Csi::NVM,
    };
    let cdw10 = IdentifyCdw10::new().with_cns(cns.0).into_bits();
    let cdw11 = IdentifyCdw11::new().with_csi(csi.0).into_bits();
    let command = NvmeCommand {
        queue: NvmeQueue::Admin,
        opcode: AdminOpcode::IDENTIFY.0,
        nsid,
        cdw10_15: [cdw10, cdw11, 0, 0, 0, 0],
        timeout_ms: 0,
    };
    let failed = |error: std::io::Error| Error::io("identifying the namespace", &error);
    let buf = IoBuf::try_alloc(IDENTIFY_BYTES).map_err(failed)?;
    let answer = send(device, command, buf.clone()).await.map_err(failed)?;
    Ok(match answer {
        Ok(_) => Ok(T::read_from_bytes(&buf.to_vec()).map_err(|_| NONSENSE)?),
        Err(status) => Err(status),
    })
}

/// Sends a command. One that the drive could not begin, and says may be sent again, is.
async fn send(device: &File, command: NvmeCommand, data: IoBuf) -> std::io::Result<Result<u64, Status>> {
    let mut attempt = 1;
    loop {
        let answer = device.nvme(command, data.clone()).await?;
        let field = StatusField::from_bits(answer.status);
        match field.status() {
            Status::SUCCESS => return Ok(Ok(answer.result)),
            Status::NAMESPACE_NOT_READY | Status::ANA_TRANSITION if attempt < ATTEMPTS && !field.dnr() => {
                attempt += 1;
                sleep(PAUSE).await;
            }
            status => return Ok(Err(status)),
        }
    }
}
