//! The device behind a door as a node, so that what runs on devices runs through the door, too.
//!
//! A status says less than an error does. So each refusal is judged again here, from a report that the device gave before the
//! request: the rule that it names is given as the error where the door's status is the one that is due to it, and
//! a wrong status is an error of its own.

use std::ops::ControlFlow;
use std::sync::{Mutex, MutexGuard, PoisonError};

use zbdkit_block::{CrossZone, Error, Lane, Limits, Node, Request as Answer, ZoneOp};
use zbdkit_io::IoBuf;
use zbdkit_zone::rules::{Appends, Writable};
use zbdkit_zone::{
    Attributes, Condition, Counters, Filter, Geometry, GeometrySpec, Model, Zns, ZoneError, ZoneInfo, ZoneNo,
    ZoneType,
};

use super::error::ClientError;
use super::queue::Queue;
use super::request::{Request, Status};
use super::zone::{Zone, ZoneKind, ZoneState};
use super::{Client, feature};

const SECTOR: u64 = 512;

/// A zoned device behind a door. Requests run one at a time and block their thread.
pub struct DoorNode {
    client: Mutex<Client>,
    limits: Limits,
    geometry: Geometry,
}

impl DoorNode {
    /// The device that a client is connected to.
    ///
    /// # Errors
    /// It shows no zones, or such as make no sense.
    pub fn new(mut client: Client) -> Result<DoorNode, ClientError> {
        let config = *client.config();
        if client.features() & feature::ZONED == 0 || config.zone_sectors == 0 {
            return Err(ClientError::Report("the device shows no zones".into()));
        }
        let zone_size = u64::from(config.zone_sectors) * SECTOR;
        let zones = client
            .queue(0)
            .zone_report_all(config.capacity, config.zone_sectors.into())?;
        let conventional = zones
            .iter()
            .take_while(|zone| zone.kind == ZoneKind::Conventional)
            .count();
        let capacity = zones.get(conventional).map_or(0, |zone| zone.cap * SECTOR);
        let geometry = Geometry::new(GeometrySpec {
            model: match config.model {
                1 => Model::HostManaged,
                _ => Model::HostAware,
            },
            size: config.capacity * SECTOR,
            zone_size,
            zone_capacity: capacity,
            nr_conventional: conventional as u32,
            block_size: config.blk_size,
            max_open: config.max_open_zones,
            max_active: config.max_active_zones,
            max_append: u64::from(config.max_append_sectors) * SECTOR,
            zns: Zns::NONE,
        });
        let geometry = geometry.map_err(|error| ClientError::Report(error.to_string()))?;
        let mut limits = Limits::plain(geometry.size(), config.blk_size, false);
        limits.zoned = Some(geometry);
        Ok(DoorNode {
            client: Mutex::new(client),
            limits,
            geometry,
        })
    }

    fn client(&self) -> MutexGuard<'_, Client> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, run: impl FnOnce(&mut Queue) -> Result<T, ClientError>) -> Result<T, Error> {
        run(self.client().queue(0)).map_err(|error| {
            println!("client: {error}");
            Error::Io {
                op: "the door",
                errno: libc_eio(),
            }
        })
    }

    fn info(&self, zone: ZoneNo) -> Result<ZoneInfo, Error> {
        let sector = self.geometry.start(zone) / SECTOR;
        let zones = self.with(|queue| queue.zone_report(sector, 1))?;
        match zones.first() {
            Some(zone) => Ok(self.zone_info(zone)),
            None => Err(self.wrong("an empty report", "a zone")),
        }
    }

    fn zone_info(&self, zone: &Zone) -> ZoneInfo {
        let start = zone.start * SECTOR;
        let no = self.geometry.zone_of(start);
        let capacity = zone.cap * SECTOR;
        let condition = match zone.state {
            ZoneState::NotWritePointer => Condition::NotWritePointer,
            ZoneState::Empty => Condition::Empty,
            ZoneState::ImplicitlyOpen => Condition::ImplicitlyOpen,
            ZoneState::ExplicitlyOpen => Condition::ExplicitlyOpen,
            ZoneState::Closed => Condition::Closed,
            ZoneState::ReadOnly => Condition::ReadOnly,
            ZoneState::Full => Condition::Full,
            ZoneState::Offline | ZoneState::Unknown(_) => Condition::Offline,
        };
        let wp = match condition {
            Condition::Full => start + capacity,
            Condition::NotWritePointer | Condition::Offline => start,
            _ => zone.wp * SECTOR,
        };
        ZoneInfo {
            zone: no,
            start,
            len: self.geometry.len(no),
            capacity,
            wp,
            written_end: wp,
            kind: match zone.kind {
                ZoneKind::Conventional => ZoneType::Conventional,
                ZoneKind::SequentialPreferred => ZoneType::SequentialPreferred,
                ZoneKind::SequentialRequired | ZoneKind::Unknown(_) => ZoneType::SequentialRequired,
            },
            condition,
            counters: Counters::default(),
            attributes: Attributes::default(),
        }
    }

    /// The door answered otherwise than it should.
    fn wrong(&self, got: impl std::fmt::Display, due: &str) -> Error {
        println!("the door answered {got} where {due} was due");
        Error::Io {
            op: "an answer of the door",
            errno: libc_eio(),
        }
    }

    /// Runs a request that `rule` allows or forbids, by the state before it.
    fn judged(&self, request: &Request, rule: Result<(), ZoneError>) -> Result<u64, Error> {
        let done = self.with(|queue| queue.run(request))?;
        let limits = (self.geometry.max_open(), self.geometry.max_active());
        match (done.status, rule) {
            (Status::OK, Ok(())) => Ok(done.append_sector.saturating_mul(SECTOR)),
            // For ZBC there is nothing wrong with opening a full zone.
            (Status::OK, Err(ZoneError::InvalidTransition { .. })) => Ok(0),
            (Status::ZONE_OPEN_RESOURCE, Ok(())) => Err(ZoneError::TooManyOpen { limit: limits.0 }.into()),
            (Status::ZONE_ACTIVE_RESOURCE, Ok(())) => {
                Err(ZoneError::TooManyActive { limit: limits.1 }.into())
            }
            (Status::IOERR, Ok(())) => Err(Error::Io {
                op: "a request",
                errno: libc_eio(),
            }),
            (status, Err(rule)) if status == due(&rule) => Err(rule.into()),
            (status, Ok(())) => Err(self.wrong(status, "success")),
            (status, Err(rule)) => Err(self.wrong(status, &format!("{} ({rule})", due(&rule)))),
        }
    }

    /// The one zone of a range, or what forbids it.
    fn one_zone(&self, offset: u64, len: u64) -> Result<ZoneNo, ZoneError> {
        let zone = self.geometry.zone_of(offset);
        let end = self.geometry.end(zone);
        let last = self.geometry.zone_of(offset + len - 1);
        if zone == last || self.geometry.is_conventional(last) {
            return Ok(zone);
        }
        Err(ZoneError::Boundary {
            zone,
            offset,
            len,
            end,
        })
    }

    fn may_write(&self, offset: u64, len: u64) -> Result<Result<(), ZoneError>, Error> {
        let zone = match self.one_zone(offset, len) {
            Ok(zone) => zone,
            // A host-aware device is a disk to those who do not know zones.
            Err(_) if self.geometry.model() == Model::HostAware => return Ok(Ok(())),
            Err(rule) => return Ok(Err(rule)),
        };
        if self.geometry.is_conventional(zone) {
            return Ok(Ok(()));
        }
        let info = self.info(zone)?;
        // Where writes may go anywhere, only what the zone is counts.
        if info.kind == ZoneType::SequentialPreferred {
            return Ok(match info.condition {
                Condition::ReadOnly => Err(ZoneError::ReadOnly { zone }),
                Condition::Offline => Err(ZoneError::Offline { zone }),
                _ => Ok(()),
            });
        }
        Ok(writable(&info).place(Some(offset), len).map(drop))
    }

    fn write_now(&self, data: Vec<u8>, offset: u64) -> Result<(), Error> {
        let rule = self.may_write(offset, data.len() as u64)?;
        let sector = offset / SECTOR;
        self.judged(&Request::Write { sector, data }, rule).map(drop)
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
        if let Err(rule) = appends.check(zone, self.geometry.zone_type(zone), zone_start, len) {
            return Ok(Err(rule));
        }
        let info = self.info(zone)?;
        Ok(writable(&info).place(None, len).map(drop))
    }

    fn may_manage(&self, op: ZoneOp, zone_start: u64) -> Result<Result<(), ZoneError>, Error> {
        let zone = match self.geometry.zone_at(zone_start) {
            Ok(zone) => zone,
            Err(rule) => return Ok(Err(rule)),
        };
        let info = self.info(zone)?;
        let condition = info.condition;
        Ok(match (op, condition) {
            _ if info.kind == ZoneType::Conventional => Err(ZoneError::Conventional { zone }),
            (_, Condition::Offline) => Err(ZoneError::Offline { zone }),
            (_, Condition::ReadOnly) => Err(ZoneError::ReadOnly { zone }),
            (ZoneOp::Open, Condition::Full) => Err(ZoneError::InvalidTransition { zone, condition }),
            _ => Ok(()),
        })
    }
}

fn libc_eio() -> i32 {
    rustix::io::Errno::IO.raw_os_error()
}

fn writable(info: &ZoneInfo) -> Writable {
    Writable {
        zone: info.zone,
        condition: info.condition,
        wp: info.wp,
        end: info.start + info.capacity,
    }
}

/// The status that the standard has for a rule (virtio 1.3, 5.2.6).
fn due(rule: &ZoneError) -> Status {
    match rule {
        ZoneError::NotAtWritePointer { .. } | ZoneError::Unaligned { .. } => Status::ZONE_UNALIGNED_WP,
        ZoneError::AppendUnsupported => Status::UNSUPP,
        ZoneError::TooManyOpen { .. } => Status::ZONE_OPEN_RESOURCE,
        ZoneError::TooManyActive { .. } => Status::ZONE_ACTIVE_RESOURCE,
        _ => Status::ZONE_INVALID_CMD,
    }
}

impl Node for DoorNode {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn driver(&self) -> &'static str {
        "door"
    }

    fn read<'a>(&'a self, _lane: &'a Lane, buf: IoBuf, offset: u64, cross: CrossZone) -> Answer<'a, ()> {
        Box::pin(async move {
            let len = buf.len() as u64;
            // A door of the standard's lets no read cross zones; several do.
            let parts = match (self.one_zone(offset, len), cross) {
                (Err(_), CrossZone::Allow) => {
                    let first = self.geometry.end(self.geometry.zone_of(offset)) - offset;
                    vec![0..first, first..len]
                }
                _ => vec![0..len; 1],
            };
            for part in parts {
                let at = offset + part.start;
                let len = part.end - part.start;
                let sector = at / SECTOR;
                let zone = self.geometry.zone_of(at);
                let request = Request::Read {
                    sector,
                    len: len as u32,
                };
                let done = self.with(|queue| queue.run(&request))?;
                let rule = match self.one_zone(at, len) {
                    Ok(_) if self.info(zone)?.condition == Condition::Offline => {
                        Err(ZoneError::Offline { zone })
                    }
                    rule => rule.map(drop),
                };
                match (done.status, rule) {
                    (Status::OK, Ok(())) => {}
                    (status, Err(rule)) if status == due(&rule) => return Err(rule.into()),
                    (status, rule) => return Err(self.wrong(status, &format!("{rule:?}"))),
                }
                buf.slice(part.start as usize..part.end as usize)
                    .copy_from(&done.data);
            }
            Ok(())
        })
    }

    fn write<'a>(&'a self, _lane: &'a Lane, buf: IoBuf, offset: u64) -> Answer<'a, ()> {
        Box::pin(async move { self.write_now(buf.to_vec(), offset) })
    }

    fn flush<'a>(&'a self) -> Answer<'a, ()> {
        Box::pin(async { self.with(Queue::flush) })
    }

    fn write_zeroes<'a>(&'a self, _lane: &'a Lane, offset: u64, len: u64, _unmap: bool) -> Answer<'a, ()> {
        // A host-managed device behind this door has no such request.
        Box::pin(async move { self.write_now(vec![0; len as usize], offset) })
    }

    fn discard<'a>(&'a self, _lane: &'a Lane, _offset: u64, _len: u64) -> Answer<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn append<'a>(&'a self, _lane: &'a Lane, buf: IoBuf, zone_start: u64) -> Answer<'a, u64> {
        Box::pin(async move {
            let rule = self.may_append(zone_start, buf.len() as u64)?;
            let request = Request::ZoneAppend {
                sector: zone_start / SECTOR,
                data: buf.to_vec(),
            };
            self.judged(&request, rule)
        })
    }

    fn zone_op<'a>(&'a self, op: ZoneOp, zone_start: u64) -> Answer<'a, ()> {
        Box::pin(async move {
            let sector = zone_start / SECTOR;
            let request = match op {
                ZoneOp::Open => Request::ZoneOpen(sector),
                ZoneOp::Close(_) => Request::ZoneClose(sector),
                ZoneOp::Finish | ZoneOp::FinishUnlimited => Request::ZoneFinish(sector),
                ZoneOp::Reset => Request::ZoneReset(sector),
                ZoneOp::OpenZrwa => return Err(Error::NotSupported("a zone random write area")),
                ZoneOp::SetReadOnly
                | ZoneOp::SetOffline
                | ZoneOp::SetNormal
                | ZoneOp::FinishByDevice
                | ZoneOp::Recommend(_) => {
                    return Err(Error::NotSupported("setting a zone's condition"));
                }
            };
            let rule = self.may_manage(op, zone_start)?;
            self.judged(&request, rule).map(drop)
        })
    }

    fn reset_all<'a>(&'a self) -> Answer<'a, ()> {
        Box::pin(async { self.judged(&Request::ZoneResetAll, Ok(())).map(drop) })
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
            if at >= size {
                return Err(Error::OutOfRange {
                    offset: at,
                    len: 0,
                    size,
                });
            }
            while at < size {
                let zones = self.with(|queue| queue.zone_report(at / SECTOR, 256))?;
                let Some(last) = zones.last() else { break };
                at = last.start * SECTOR + self.geometry.zone_size();
                for zone in zones.iter().map(|zone| self.zone_info(zone)) {
                    if filter.matches(zone.condition) && sink(zone).is_break() {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })
    }

    fn close<'a>(&'a self) -> Answer<'a, ()> {
        self.flush()
    }
}
