//! A zoned namespace behind the door as a node, so that what runs on devices runs through the door, too.
//!
//! As with [`DoorNode`](crate::client::DoorNode), a status is believed only where it is the one that is due: each refusal is
//! judged here from a report that the controller gave before the command. Commands take turns with every kind of data
//! pointer, at every alignment that it may have.

use std::fmt::Display;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use zbdkit_block::{CrossZone, Error, Lane, Limits, Node, Request as Answer, ZoneOp};
use zbdkit_io::IoBuf;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::{Cns, Csi, IDENTIFY_BYTES, IdentifyController, MIN_PAGE_BYTES};
use zbdkit_spec::nvme::nvm::{self, DsmCdw11, DsmRange, Opcode, RwCdw12};
use zbdkit_spec::nvme::zns::{
    self, NO_LIMIT, Ozcs, ReceiveAction, ReportFilter, ReportHeader, SendAction, SendCdw13, ZDES_UNIT,
    ZoneDescriptor, ZoneState, ZrwaCap,
};
use zbdkit_zone::rules::Appends;
use zbdkit_zone::{
    Attributes, Condition, Counters, Filter, Geometry, GeometryError, GeometrySpec, Model, Recommendation,
    Zns, ZoneError, ZoneInfo, ZoneNo, ZoneType, Zrwa,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::driver::Driver;
use super::entry::{Done, Entry};
use super::judge::{Kind, due, report_filter, writable};
use super::pointer::Pointers;

/// The queue that all commands go through.
const QUEUE: u16 = 1;
/// Zones of one report.
const ROOM: usize = 100;
/// Where data lies in its page, by turns.
const OFFSETS: [u64; 4] = [0, 4, 512, 2044];

/// A namespace that cannot be a node.
#[derive(Debug, thiserror::Error)]
pub enum NvmeNodeError {
    /// Identify failed.
    #[error("Identify {cns:?} failed: {status:?}")]
    Identify {
        /// What was asked for.
        cns: Cns,
        /// What became of it.
        status: Status,
    },
    /// The report shows no zones.
    #[error("an empty report")]
    NoZones,
    /// What it shows of its zones makes no sense.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
}

/// A zoned namespace behind the door. Commands run one at a time and block their thread.
pub struct NvmeNode {
    host: Mutex<Host>,
    limits: Limits,
    geometry: Geometry,
    nsid: u32,
    wrong: AtomicUsize,
}

/// The driver, and whose turn it is.
struct Host {
    driver: Driver,
    turn: usize,
}

impl Host {
    /// Runs a command with this data, and returns what came back in `receive` bytes.
    fn run(&mut self, qid: u16, entry: Entry, send: &[u8], receive: usize) -> (Done, Vec<u8>) {
        let len = send.len().max(receive) as u64;
        let mut entry = entry;
        let mut at = self.driver.data();
        if len > 0 {
            self.turn += 1;
            // Admin commands have PRPs only.
            let kind = match qid {
                0 => Pointers::Prps,
                _ => Pointers::ALL[self.turn % Pointers::ALL.len()],
            };
            at += OFFSETS[self.turn % OFFSETS.len()] + u64::from(kind != Pointers::Prps);
            entry = self.driver.pointing(entry, kind, at, len);
            self.driver.fill(at, send);
            self.driver.fill(at + send.len() as u64, &vec![0xee; receive]);
        }
        let done = self.driver.run(qid, entry);
        (done, self.driver.get(at, receive))
    }

    fn identify<T: FromBytes>(&mut self, cns: Cns, nsid: u32, csi: Csi) -> Result<T, NvmeNodeError> {
        let (done, bytes) = self.run(0, Entry::identify(cns, nsid, csi), &[], IDENTIFY_BYTES);
        match T::read_from_bytes(&bytes) {
            Ok(data) if done.status == Status::SUCCESS => Ok(data),
            _ => Err(NvmeNodeError::Identify {
                cns,
                status: done.status,
            }),
        }
    }

    /// At most [`ROOM`] zones that the filter shows, from the one on that holds `block`.
    fn report(&mut self, nsid: u32, filter: ReportFilter, block: u64) -> Result<Vec<ZoneDescriptor>, Status> {
        let zones = self.receive(nsid, ReceiveAction::REPORT, filter, block, ROOM, 0)?;
        Ok(zones.into_iter().map(|(zone, _)| zone).collect())
    }

    /// At most `room` zones, each with an extension of so many bytes.
    fn receive(
        &mut self,
        nsid: u32,
        action: ReceiveAction,
        filter: ReportFilter,
        block: u64,
        room: usize,
        extension: usize,
    ) -> Result<Vec<(ZoneDescriptor, Vec<u8>)>, Status> {
        let size = size_of::<ZoneDescriptor>() + extension;
        let len = size_of::<ReportHeader>() + room * size;
        let entry = Entry::zone_receive(action, filter, block, len).nsid(nsid);
        let (done, bytes) = self.run(QUEUE, entry, &[], len);
        if done.status != Status::SUCCESS {
            return Err(done.status);
        }
        let (header, rest) = ReportHeader::read_from_prefix(&bytes).expect("there is room for a header");
        let count = usize::try_from(header.nr_zones.get()).unwrap_or(usize::MAX);
        assert!(count <= room, "a partial report says how many zones it holds");
        let zones = rest.chunks_exact(size).take(count).map(|zone| {
            let (zone, extension) = ZoneDescriptor::read_from_prefix(zone).expect("of its size");
            (zone, extension.to_vec())
        });
        Ok(zones.collect())
    }
}

impl NvmeNode {
    /// The namespace `nsid` of a controller that is enabled, with queue 1 made.
    ///
    /// # Errors
    /// It shows no zones, or such as make no sense.
    pub fn new(driver: Driver, nsid: u32) -> Result<NvmeNode, NvmeNodeError> {
        let mut host = Host { driver, turn: 0 };
        let namespace: nvm::IdentifyNamespace = host.identify(Cns::NAMESPACE, nsid, Csi::NVM)?;
        let zoned: zns::IdentifyNamespace = host.identify(Cns::NAMESPACE_OF_CSI, nsid, Csi::ZONED)?;
        let controller: IdentifyController = host.identify(Cns::CONTROLLER, 0, Csi::NVM)?;
        let appends: zns::IdentifyController = host.identify(Cns::CONTROLLER_OF_CSI, 0, Csi::ZONED)?;
        let first = host.report(nsid, ReportFilter::ALL, 0).unwrap_or_default();
        let first = first.first().ok_or(NvmeNodeError::NoZones)?;
        let block_size = 1_u32 << namespace.format().lbads;
        let extension = &zoned.lbafe[namespace.format_index()];
        let bytes = |blocks: u64| blocks * u64::from(block_size);
        let limit = |limit_z: u32| if limit_z == NO_LIMIT { 0 } else { limit_z + 1 };
        let zasl = match appends.zasl {
            0 => controller.mdts,
            zasl => zasl,
        };
        let zrwa = Ozcs::from_bits(zoned.ozcs.get()).zrwasup().then(|| Zrwa {
            size: bytes(zoned.zrwasz.get().into()),
            granularity: bytes(zoned.zrwafg.get().into()),
            count: zoned.numzrwa.get(),
            explicit_commit: ZrwaCap::from_bits(zoned.zrwacap).expflushsup(),
        });
        let geometry = Geometry::new(GeometrySpec {
            model: Model::HostManaged,
            size: bytes(namespace.nsze.get()),
            zone_size: bytes(extension.zsze.get()),
            zone_capacity: bytes(first.zcap.get()),
            nr_conventional: 0,
            block_size,
            max_open: limit(zoned.mor_z.get()),
            max_active: limit(zoned.mar_z.get()),
            max_append: MIN_PAGE_BYTES << zasl,
            zns: Zns {
                zrwa,
                extension_size: u32::from(extension.zdes) * ZDES_UNIT as u32,
            },
        })?;
        let mut limits = Limits::plain(geometry.size(), block_size, false);
        limits.zoned = Some(geometry);
        Ok(NvmeNode {
            host: Mutex::new(host),
            limits,
            geometry,
            nsid,
            wrong: AtomicUsize::new(0),
        })
    }

    /// How often the controller has answered otherwise than it should; what it said is printed.
    pub fn wrong_answers(&self) -> usize {
        self.wrong.load(Ordering::Relaxed)
    }

    fn wrong(&self, got: impl Display, due: &str) -> Error {
        println!("the controller answered {got} where {due} was due");
        self.wrong.fetch_add(1, Ordering::Relaxed);
        Error::Io {
            op: "an answer of the controller",
            errno: rustix::io::Errno::IO.raw_os_error(),
        }
    }

    /// The driver alone.
    pub fn into_driver(self) -> Driver {
        self.host
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .driver
    }

    /// The driver, between commands.
    pub fn with_driver<T>(&self, run: impl FnOnce(&mut Driver) -> T) -> T {
        run(&mut self.host().driver)
    }

    fn host(&self) -> MutexGuard<'_, Host> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, entry: Entry, send: &[u8], receive: usize) -> (Done, Vec<u8>) {
        self.host().run(QUEUE, entry.nsid(self.nsid), send, receive)
    }

    fn block(&self, offset: u64) -> u64 {
        offset / u64::from(self.geometry.block_size())
    }

    fn blocks(&self, len: usize) -> u32 {
        self.block(len as u64) as u32
    }

    fn info(&self, zone: ZoneNo) -> Result<ZoneInfo, Error> {
        let start = self.geometry.start(zone);
        let zones = self
            .host()
            .report(self.nsid, ReportFilter::ALL, self.block(start));
        match zones.as_deref() {
            Ok([zone, ..]) => Ok(self.zone_info(zone)),
            other => Err(self.wrong(format_args!("{other:?}"), "a zone")),
        }
    }

    fn zone_info(&self, zone: &ZoneDescriptor) -> ZoneInfo {
        let bytes = |blocks: u64| blocks * u64::from(self.geometry.block_size());
        let start = bytes(zone.zslba.get());
        let no = self.geometry.zone_of(start);
        let capacity = bytes(zone.zcap.get());
        let condition = match zone.state() {
            ZoneState::EMPTY => Condition::Empty,
            ZoneState::IMPLICITLY_OPENED => Condition::ImplicitlyOpen,
            ZoneState::EXPLICITLY_OPENED => Condition::ExplicitlyOpen,
            ZoneState::CLOSED => Condition::Closed,
            ZoneState::READ_ONLY => Condition::ReadOnly,
            ZoneState::FULL => Condition::Full,
            _ => Condition::Offline,
        };
        let wp = match condition {
            Condition::Full => start + capacity,
            // These have none.
            Condition::ReadOnly | Condition::Offline => start,
            _ => bytes(zone.wp.get()),
        };
        let attributes = zone.attributes();
        ZoneInfo {
            zone: no,
            start,
            len: self.geometry.len(no),
            capacity,
            wp,
            written_end: wp,
            kind: ZoneType::SequentialRequired,
            condition,
            counters: Counters::default(),
            attributes: Attributes {
                finished_by_device: attributes.zfc(),
                recommended: match (attributes.rzr(), attributes.fzr()) {
                    (true, _) => Some(Recommendation::Reset),
                    (false, true) => Some(Recommendation::Finish),
                    (false, false) => None,
                },
                zrwa: attributes.zrwav(),
                extension: attributes.zdev(),
            },
        }
    }

    /// What becomes of a command that `rule` allows or forbids by the state before it.
    fn judge(&self, done: Done, kind: Kind, rule: Result<(), ZoneError>) -> Result<u64, Error> {
        match (done.status, rule) {
            (Status::SUCCESS, Ok(())) => Ok(done.result.saturating_mul(self.geometry.block_size().into())),
            (Status::TOO_MANY_OPEN_ZONES, Ok(())) if done.dnr => Err(ZoneError::TooManyOpen {
                limit: self.geometry.max_open(),
            }
            .into()),
            (Status::TOO_MANY_ACTIVE_ZONES, Ok(())) if done.dnr => Err(ZoneError::TooManyActive {
                limit: self.geometry.max_active(),
            }
            .into()),
            (status, Err(rule)) if status == due(&rule, kind) && done.dnr => Err(rule.into()),
            (_, Ok(())) => Err(self.wrong(format_args!("{done:?}"), "success")),
            (_, Err(rule)) => {
                let due = format!("{:?} ({rule})", due(&rule, kind));
                Err(self.wrong(format_args!("{done:?}"), &due))
            }
        }
    }

    /// The one zone of a range, or what forbids it.
    fn one_zone(&self, offset: u64, len: u64) -> Result<ZoneNo, ZoneError> {
        let zone = self.geometry.zone_of(offset);
        let end = self.geometry.end(zone);
        if offset + len <= end {
            return Ok(zone);
        }
        Err(ZoneError::Boundary {
            zone,
            offset,
            len,
            end,
        })
    }

    /// Where a write, or an append, goes in a zone.
    fn place(&self, zone: ZoneNo, offset: Option<u64>, len: u64) -> Result<Result<(), ZoneError>, Error> {
        let info = self.info(zone)?;
        let writable = writable(&info);
        let placed = match self.geometry.zrwa().filter(|_| info.attributes.zrwa) {
            Some(area) => writable.place_in_area(offset, len, area),
            None => writable.place(offset, len),
        };
        Ok(placed.map(drop))
    }

    fn may_write(&self, offset: u64, len: u64) -> Result<Result<(), ZoneError>, Error> {
        match self.one_zone(offset, len) {
            Ok(zone) => self.place(zone, Some(offset), len),
            Err(rule) => Ok(Err(rule)),
        }
    }

    fn may_commit(&self, end: u64) -> Result<Result<(), ZoneError>, Error> {
        let zone = self.geometry.zone_of(end - 1);
        let info = self.info(zone)?;
        let Some(area) = self.geometry.zrwa().filter(|_| info.attributes.zrwa) else {
            return Ok(Err(ZoneError::NotRandomWritable { zone }));
        };
        Ok(writable(&info).commits(info.start, end, area))
    }

    fn may_append(&self, zone_start: u64, len: u64) -> Result<Result<(), ZoneError>, Error> {
        let zone = match self.geometry.zone_at(zone_start) {
            Ok(zone) => zone,
            Err(rule) => return Ok(Err(rule)),
        };
        let appends = Appends {
            max: self.geometry.max_append(),
            granularity: self.geometry.block_size(),
        };
        if let Err(rule) = appends.check(zone, ZoneType::SequentialRequired, zone_start, len) {
            return Ok(Err(rule));
        }
        self.place(zone, None, len)
    }

    fn may_manage(&self, op: ZoneOp, zone_start: u64) -> Result<Result<(), ZoneError>, Error> {
        let zone = match self.geometry.zone_at(zone_start) {
            Ok(zone) => zone,
            Err(rule) => return Ok(Err(rule)),
        };
        let ZoneInfo {
            condition,
            start,
            wp,
            attributes,
            ..
        } = self.info(zone)?;
        let area = self.geometry.zrwa().filter(|_| !attributes.zrwa);
        Ok(match (op, condition) {
            (ZoneOp::SetOffline, Condition::ReadOnly | Condition::Offline) => Ok(()),
            (_, Condition::Offline) => Err(ZoneError::Offline { zone }),
            (_, Condition::ReadOnly) => Err(ZoneError::ReadOnly { zone }),
            (ZoneOp::Open | ZoneOp::OpenZrwa | ZoneOp::Close(_), Condition::Full)
            | (ZoneOp::Close(_), Condition::Empty)
            | (ZoneOp::SetOffline, _) => Err(ZoneError::InvalidTransition { zone, condition }),
            (ZoneOp::OpenZrwa, _)
                if area.is_some_and(|area| !(wp - start).is_multiple_of(area.granularity)) =>
            {
                Err(ZoneError::RandomWriteArea { zone })
            }
            _ => Ok(()),
        })
    }

    fn read_part(&self, buf: &IoBuf, offset: u64) -> Result<(), Error> {
        let rule = match self.one_zone(offset, buf.len() as u64) {
            Ok(zone) if self.info(zone)?.condition == Condition::Offline => Err(ZoneError::Offline { zone }),
            rule => rule.map(drop),
        };
        let entry = Entry::rw(Opcode::READ, self.block(offset), self.blocks(buf.len()));
        let (done, data) = self.run(entry, &[], buf.len());
        self.judge(done, Kind::Data, rule)?;
        buf.copy_from(&data);
        Ok(())
    }
}

impl Node for NvmeNode {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn driver(&self) -> &'static str {
        "nvme door"
    }

    fn read<'a>(&'a self, _lane: &'a Lane, buf: IoBuf, offset: u64, cross: CrossZone) -> Answer<'a, ()> {
        Box::pin(async move {
            let len = buf.len() as u64;
            let first = self.geometry.end(self.geometry.zone_of(offset)) - offset;
            if len <= first || cross == CrossZone::Refuse {
                return self.read_part(&buf, offset);
            }
            // A command that reads across zones is refused; several are not.
            let first = first as usize;
            self.read_part(&buf.slice(0..first), offset)?;
            self.read_part(&buf.slice(first..buf.len()), offset + first as u64)
        })
    }

    fn write<'a>(&'a self, _lane: &'a Lane, buf: IoBuf, offset: u64) -> Answer<'a, ()> {
        Box::pin(async move {
            let rule = self.may_write(offset, buf.len() as u64)?;
            let entry = Entry::rw(Opcode::WRITE, self.block(offset), self.blocks(buf.len()));
            let (done, _) = self.run(entry, &buf.to_vec(), 0);
            self.judge(done, Kind::Data, rule).map(drop)
        })
    }

    fn flush<'a>(&'a self) -> Answer<'a, ()> {
        Box::pin(async {
            let (done, _) = self.run(Entry::new(Opcode::FLUSH.0, self.nsid), &[], 0);
            self.judge(done, Kind::Data, Ok(())).map(drop)
        })
    }

    fn write_zeroes<'a>(&'a self, _lane: &'a Lane, offset: u64, len: u64, unmap: bool) -> Answer<'a, ()> {
        Box::pin(async move {
            let rule = self.may_write(offset, len)?;
            let mut entry = Entry::rw(Opcode::WRITE_ZEROES, self.block(offset), self.block(len) as u32);
            let cdw12 = RwCdw12::from_bits(entry.0.cdw12.get()).with_deac(unmap);
            entry.0.cdw12.set(cdw12.into_bits());
            let (done, _) = self.run(entry, &[], 0);
            self.judge(done, Kind::Data, rule).map(drop)
        })
    }

    fn discard<'a>(&'a self, _lane: &'a Lane, offset: u64, len: u64) -> Answer<'a, ()> {
        Box::pin(async move {
            let mut range = DsmRange::new_zeroed();
            range.slba.set(self.block(offset));
            range.length.set(self.block(len) as u32);
            let mut entry = Entry::new(Opcode::DATASET_MANAGEMENT.0, self.nsid);
            entry.0.cdw11.set(DsmCdw11::new().with_ad(true).into_bits());
            let (done, _) = self.run(entry, range.as_bytes(), 0);
            self.judge(done, Kind::Data, Ok(())).map(drop)
        })
    }

    fn append<'a>(&'a self, _lane: &'a Lane, buf: IoBuf, zone_start: u64) -> Answer<'a, u64> {
        Box::pin(async move {
            let rule = self.may_append(zone_start, buf.len() as u64)?;
            let entry = Entry::append(self.block(zone_start), self.blocks(buf.len()));
            let (done, _) = self.run(entry, &buf.to_vec(), 0);
            self.judge(done, Kind::Data, rule)
        })
    }

    fn zone_op<'a>(&'a self, op: ZoneOp, zone_start: u64) -> Answer<'a, ()> {
        Box::pin(async move {
            let action = match op {
                ZoneOp::Open | ZoneOp::OpenZrwa => SendAction::OPEN,
                ZoneOp::Close(_) => SendAction::CLOSE,
                ZoneOp::Finish | ZoneOp::FinishUnlimited => SendAction::FINISH,
                ZoneOp::Reset => SendAction::RESET,
                ZoneOp::SetOffline => SendAction::OFFLINE,
                ZoneOp::SetReadOnly | ZoneOp::SetNormal | ZoneOp::FinishByDevice | ZoneOp::Recommend(_) => {
                    return Err(Error::NotSupported("setting a zone's condition"));
                }
            };
            let rule = self.may_manage(op, zone_start)?;
            let option = SendCdw13::new().with_zsaso(op == ZoneOp::OpenZrwa);
            let (done, _) = self.run(Entry::zone_send(action, self.block(zone_start), option), &[], 0);
            let zone = self.geometry.zone_of(zone_start);
            match (done.status, &rule) {
                (Status::ZRWA_RESOURCES_UNAVAILABLE, Ok(())) if op == ZoneOp::OpenZrwa => {
                    Err(ZoneError::NoRandomWriteArea { zone }.into())
                }
                _ => self.judge(done, Kind::Manage, rule).map(drop),
            }
        })
    }

    fn commit_zrwa<'a>(&'a self, end: u64) -> Answer<'a, ()> {
        Box::pin(async move {
            let rule = self.may_commit(end)?;
            // The command names the last block.
            let entry = Entry::zone_send(
                SendAction::FLUSH_EXPLICIT_ZRWA_RANGE,
                self.block(end) - 1,
                SendCdw13::new(),
            );
            let (done, _) = self.run(entry, &[], 0);
            self.judge(done, Kind::Commit, rule).map(drop)
        })
    }

    fn set_extension<'a>(&'a self, zone_start: u64, extension: &'a [u8], zrwa: bool) -> Answer<'a, ()> {
        Box::pin(async move {
            let size = self.geometry.extension_size() as usize;
            if extension.len() > size {
                return Err(Error::NotSupported("so long an extension"));
            }
            let zone = self.geometry.zone_at(zone_start)?;
            let rule = match self.info(zone)?.condition {
                Condition::Empty => Ok(()),
                condition => Err(ZoneError::InvalidTransition { zone, condition }),
            };
            let mut data = extension.to_vec();
            data.resize(size, 0);
            let action = SendAction::SET_DESCRIPTOR_EXTENSION;
            let option = SendCdw13::new().with_zsaso(zrwa);
            let entry = Entry::zone_send(action, self.block(zone_start), option);
            let (done, _) = self.run(entry, &data, 0);
            self.judge(done, Kind::Manage, rule).map(drop)
        })
    }

    fn extension<'a>(&'a self, zone_start: u64) -> Answer<'a, Option<Vec<u8>>> {
        Box::pin(async move {
            let size = self.geometry.extension_size() as usize;
            let (action, filter) = (ReceiveAction::EXTENDED_REPORT, ReportFilter::ALL);
            let block = self.block(zone_start);
            let zones = self.host().receive(self.nsid, action, filter, block, 1, size);
            match zones.as_deref() {
                Ok([(zone, bytes)]) if zone.attributes().zdev() => Ok(Some(bytes.clone())),
                Ok([(_, bytes)]) if *bytes == vec![0; size] => Ok(None),
                other => Err(self.wrong(
                    format_args!("{other:?}"),
                    "a zone, with zeros where nothing is attached",
                )),
            }
        })
    }

    fn reset_all<'a>(&'a self) -> Answer<'a, ()> {
        Box::pin(async {
            let all = SendCdw13::new().with_select_all(true);
            let (done, _) = self.run(Entry::zone_send(SendAction::RESET, 0, all), &[], 0);
            self.judge(done, Kind::Manage, Ok(())).map(drop)
        })
    }

    fn report<'a>(
        &'a self,
        from: u64,
        filter: Filter,
        sink: &'a mut dyn FnMut(ZoneInfo) -> ControlFlow<()>,
    ) -> Answer<'a, ()> {
        Box::pin(async move {
            let size = self.geometry.size();
            let mut at = from;
            loop {
                let zones = self
                    .host()
                    .report(self.nsid, report_filter(filter), self.block(at));
                let zones = zones.map_err(|status| match status {
                    Status::LBA_OUT_OF_RANGE if at >= size => Error::OutOfRange {
                        offset: at,
                        len: 0,
                        size,
                    },
                    status => self.wrong(format_args!("{status:?}"), "a report"),
                })?;
                for zone in zones.iter().map(|zone| self.zone_info(zone)) {
                    if !filter.matches(zone.condition) {
                        return Err(self.wrong(format_args!("{zone:?}"), &format!("{filter:?}")));
                    }
                    at = self.geometry.end(zone.zone);
                    if sink(zone).is_break() {
                        return Ok(());
                    }
                }
                if zones.len() < ROOM || at >= size {
                    return Ok(());
                }
            }
        })
    }

    fn close<'a>(&'a self) -> Answer<'a, ()> {
        self.flush()
    }
}
