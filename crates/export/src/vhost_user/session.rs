//! One connection's state: what was negotiated, the guest's memory, and the rings.
//!
//! A ring runs while it has a kick eventfd, is enabled, and features and memory are there; whatever changes
//! that (or moves the memory under it) stops it first, which means: every request answered.
//!
//! INFLIGHT_SHMFD is not offered. It would have a new back-end resubmit what the old one had in flight, but
//! a zone write sent twice fails at the write pointer and an append sent twice is there twice.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{GuestAddress, GuestMemoryBackend};
use zbdkit_io::mem::{GuestMemory, MAX_REGIONS, MemError, Region, StillInUse};
use zbdkit_spec::virtio_blk::device_status;

use super::backend::{Backend, ConfigReadOnly, FeatureError, Memory, RingSetup, Stuck};
use super::message::{Malformed, RawMessage, Reply, Request, VringFd, has_own_reply};
use super::wire::{self, MemoryRegion, VringAddr, VringState, code, protocol_feature as pf};

/// Largest ring that virtio has.
const MAX_RING: u32 = 32768;

/// Protocol features on offer.
const PROTOCOL_FEATURES: u64 =
    pf::MQ | pf::REPLY_ACK | pf::CONFIG | pf::CONFIGURE_MEM_SLOTS | pf::STATUS | pf::RESET_DEVICE;

/// Why a message is not done. Whether the front-end hears of it or is disconnected depends on the message.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum Refused {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("queue {index} does not exist, there are {queues}")]
    NoSuchQueue { index: u32, queues: u16 },
    #[error("ring of {size} entries: it must be a power of two of at most {MAX_RING}")]
    RingSize { size: u32 },
    #[error("ring base {base:#x} does not fit 16 bits")]
    RingBase { base: u32 },
    #[error("the {part} of queue {index} at {addr:#x} is not in the memory of the guest, or not aligned")]
    RingAddress {
        index: u16,
        part: &'static str,
        addr: u64,
    },
    #[error("queue {0} without a kick eventfd (polling) is not supported")]
    NoKick(u32),
    #[error("dirty logging was not offered")]
    Log,
    #[error(transparent)]
    Features(#[from] FeatureError),
    #[error("protocol features {0:#x} were not offered")]
    ProtocolFeatures(u64),
    #[error("configuration space has {} bytes, not {size} at {offset}", wire::MAX_CONFIG)]
    ConfigRange { offset: u32, size: u32 },
    #[error(transparent)]
    ConfigReadOnly(#[from] ConfigReadOnly),
    #[error("device status {0:#x} does not fit a byte")]
    Status(u64),
    #[error(transparent)]
    Memory(#[from] MemError),
    #[error(transparent)]
    Stuck(#[from] Stuck),
    #[error(transparent)]
    StillInUse(#[from] StillInUse),
}

impl Refused {
    /// Nothing more can be done for this front-end.
    fn is_fatal(&self) -> bool {
        matches!(self, Refused::Stuck(_) | Refused::StillInUse(_))
    }

    /// The front-end can go on without hearing of it: the device keeps to it by itself.
    fn is_soft(&self) -> bool {
        matches!(self, Refused::Features(_) | Refused::ConfigReadOnly(_))
    }
}

#[derive(Debug, Default)]
struct Vring {
    size: u16,
    addr: Option<VringAddr>,
    base: u16,
    kick: Option<Arc<OwnedFd>>,
    call: Option<Arc<OwnedFd>>,
    err: Option<Arc<OwnedFd>>,
    enabled: bool,
    running: bool,
}

/// A connection to a front-end.
pub struct Session<'a, B: Backend> {
    backend: &'a mut B,
    vrings: Vec<Vring>,
    memory: GuestMemory,
    has_memory: bool,
    features: Option<u64>,
    features_refused: bool,
    /// The backend was told that negotiation starts afresh, and no features came since.
    quiet: bool,
    protocol_features: u64,
    status: u8,
    release_within: Duration,
}

impl<'a, B: Backend> Session<'a, B> {
    /// A fresh connection. `release_within` is how long the I/O in flight may keep guest memory that the
    /// front-end takes away.
    pub fn new(backend: &'a mut B, release_within: Duration) -> Self {
        let vrings = (0..backend.queues()).map(|_| Vring::default()).collect();
        backend.connected();
        backend.quiesced();
        Session {
            backend,
            vrings,
            memory: GuestMemory::new(),
            has_memory: false,
            features: None,
            features_refused: false,
            quiet: true,
            protocol_features: 0,
            status: 0,
            release_within,
        }
    }

    /// Does what a message asks. Returns the bytes of the reply, if one is due.
    ///
    /// # Errors
    /// Where the message is not done and there is no way to tell: the connection must be closed. `on_refused`
    /// hears of what is told to the front-end, or can go on.
    pub fn dispatch(
        &mut self,
        message: RawMessage,
        mut on_refused: impl FnMut(&Refused),
    ) -> Result<Option<Vec<u8>>, Refused> {
        let header = message.header;
        let result = Request::parse(message)
            .map_err(Refused::from)
            .and_then(|request| self.handle(request));
        let ack = header.wants_ack() && self.protocol_features & pf::REPLY_ACK != 0;
        let reply = match result {
            Ok(Some(reply)) => Some(reply),
            Ok(None) => ack.then_some(Reply::U64(0)),
            Err(refused) if refused.is_fatal() => return Err(refused),
            Err(refused) => {
                let reply = match header.code {
                    code::GET_CONFIG => Some(Reply::ConfigError),
                    code if !has_own_reply(code) && ack => Some(Reply::U64(1)),
                    _ if refused.is_soft() => None,
                    _ => return Err(refused),
                };
                on_refused(&refused);
                reply
            }
        };
        Ok(reply.map(|reply| reply.to_bytes(header.code)))
    }

    /// Ends the connection: queues come to rest, and the guest's memory is given up.
    ///
    /// # Errors
    /// Where that did not happen in time.
    pub fn close(mut self) -> Result<(), Refused> {
        let result = self.reset_rings();
        self.memory.revoke();
        result?;
        Ok(self.memory.wait_released(Instant::now() + self.release_within)?)
    }

    fn handle(&mut self, request: Request) -> Result<Option<Reply>, Refused> {
        match request {
            Request::GetFeatures => {
                return Ok(Some(Reply::U64(
                    self.backend.features() | wire::F_PROTOCOL_FEATURES,
                )));
            }
            Request::GetProtocolFeatures => return Ok(Some(Reply::U64(PROTOCOL_FEATURES))),
            Request::GetQueueNum => return Ok(Some(Reply::U64(self.backend.queues().into()))),
            Request::GetMaxMemSlots => return Ok(Some(Reply::U64(MAX_REGIONS as u64))),
            Request::GetStatus => return Ok(Some(Reply::U64(self.status().into()))),
            Request::GetConfig { offset, size, flags } => {
                return self.get_config(offset, size, flags).map(Some);
            }
            Request::GetVringBase(VringState { index, .. }) => return self.get_vring_base(index).map(Some),
            Request::SetFeatures(features) => self.set_features(features)?,
            Request::SetProtocolFeatures(features) => self.set_protocol_features(features)?,
            // The owner is who is connected.
            Request::SetOwner => {}
            Request::ResetOwner => self.disable_rings()?,
            Request::ResetDevice => self.reset_device()?,
            Request::SetStatus(status) => self.set_status(status)?,
            Request::SetConfig { offset, bytes } => self.set_config(offset, &bytes)?,
            Request::SetMemTable(table) => self.set_mem_table(table)?,
            Request::AddMemReg(region, fd) => self.add_mem_reg(region, fd)?,
            Request::RemMemReg(region) => self.rem_mem_reg(region)?,
            Request::SetVringNum(state) => self.set_vring_num(state)?,
            Request::SetVringAddr(addr) => self.set_vring_addr(addr)?,
            Request::SetVringBase(state) => self.set_vring_base(state)?,
            Request::SetVringKick(vring_fd) => self.set_vring_kick(vring_fd)?,
            Request::SetVringCall(vring_fd) => self.set_vring_call(vring_fd)?,
            Request::SetVringErr(vring_fd) => {
                let index = self.queue(vring_fd.index)?;
                self.change_ring(index, |vring| vring.err = vring_fd.fd.map(Arc::new))?;
            }
            Request::SetVringEnable(VringState { index, num }) => {
                let index = self.queue(index)?;
                self.change_ring(index, |vring| vring.enabled = num != 0)?;
            }
        }
        Ok(None)
    }

    // Negotiation.

    fn set_features(&mut self, features: u64) -> Result<(), Refused> {
        if self.features == Some(features) && !self.features_refused && !self.quiet {
            return Ok(());
        }
        self.stop_all()?;
        self.features = Some(features);
        self.quiet = false;
        let result = self.backend.set_features(features & !wire::F_PROTOCOL_FEATURES);
        self.features_refused = result.is_err();
        self.start_all()?;
        Ok(result?)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<(), Refused> {
        if features & !PROTOCOL_FEATURES != 0 {
            return Err(Refused::ProtocolFeatures(features & !PROTOCOL_FEATURES));
        }
        self.protocol_features = features;
        Ok(())
    }

    fn status(&self) -> u8 {
        let needs_reset = if self.backend.needs_reset() {
            device_status::DEVICE_NEEDS_RESET
        } else {
            0
        };
        self.status | needs_reset
    }

    fn set_status(&mut self, status: u64) -> Result<(), Refused> {
        let mut status = u8::try_from(status).map_err(|_| Refused::Status(status))?;
        if status == 0 {
            return self.reset_device();
        }
        if self.features.is_none() || self.features_refused {
            status &= !device_status::FEATURES_OK;
        }
        self.status = status & !device_status::DEVICE_NEEDS_RESET;
        Ok(())
    }

    fn reset_device(&mut self) -> Result<(), Refused> {
        self.reset_rings()?;
        self.features = None;
        self.features_refused = false;
        self.status = 0;
        Ok(())
    }

    fn get_config(&self, offset: u32, size: u32, flags: u32) -> Result<Reply, Refused> {
        check_config_range(offset, size)?;
        let mut bytes = vec![0; size as usize];
        self.backend.read_config(offset as usize, &mut bytes);
        Ok(Reply::Config { offset, flags, bytes })
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Refused> {
        check_config_range(offset, bytes.len() as u32)?;
        Ok(self.backend.write_config(offset as usize, bytes)?)
    }

    // Memory.

    fn set_mem_table(&mut self, table: Vec<(MemoryRegion, OwnedFd)>) -> Result<(), Refused> {
        let has_memory = !table.is_empty();
        let regions = table
            .into_iter()
            .map(|(region, fd)| to_region(region, fd))
            .collect();
        self.change_memory(|memory| memory.set(regions))?;
        self.has_memory = has_memory;
        self.start_all()
    }

    fn add_mem_reg(&mut self, region: MemoryRegion, fd: OwnedFd) -> Result<(), Refused> {
        self.change_memory(|memory| memory.add(to_region(region, fd)))?;
        self.has_memory = true;
        self.start_all()
    }

    fn rem_mem_reg(&mut self, region: MemoryRegion) -> Result<(), Refused> {
        self.change_memory(|memory| memory.remove(region.guest_addr, region.size))?;
        self.start_all()
    }

    /// Changes the memory while no queue uses it. The rings stay stopped where it fails half-way; where the
    /// change itself is refused they go on.
    fn change_memory(
        &mut self,
        change: impl FnOnce(&GuestMemory) -> Result<(), MemError>,
    ) -> Result<(), Refused> {
        self.stop_all()?;
        let result = change(&self.memory);
        if result.is_err() {
            self.start_all()?;
        }
        result?;
        Ok(self.memory.wait_released(Instant::now() + self.release_within)?)
    }

    // Rings.

    fn queue(&self, index: u32) -> Result<u16, Refused> {
        let queues = self.backend.queues();
        u16::try_from(index)
            .ok()
            .filter(|i| *i < queues)
            .ok_or(Refused::NoSuchQueue { index, queues })
    }

    fn set_vring_num(&mut self, VringState { index, num: size }: VringState) -> Result<(), Refused> {
        let index = self.queue(index)?;
        if !size.is_power_of_two() || size > MAX_RING {
            return Err(Refused::RingSize { size });
        }
        self.change_ring(index, |vring| vring.size = size as u16)
    }

    fn set_vring_addr(&mut self, addr: VringAddr) -> Result<(), Refused> {
        let index = self.queue(addr.index)?;
        if addr.flags != 0 {
            return Err(Refused::Log);
        }
        self.change_ring(index, |vring| vring.addr = Some(addr))
    }

    fn set_vring_base(&mut self, VringState { index, num: base }: VringState) -> Result<(), Refused> {
        let index = self.queue(index)?;
        let base = u16::try_from(base).map_err(|_| Refused::RingBase { base })?;
        self.change_ring(index, |vring| vring.base = base)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<Reply, Refused> {
        let index = self.queue(index)?;
        self.change_ring(index, |vring| vring.kick = None)?;
        if self.vrings.iter().all(|vring| vring.kick.is_none()) {
            self.quiesce();
        }
        let base = self.vrings[usize::from(index)].base;
        Ok(Reply::Vring(VringState {
            index: index.into(),
            num: base.into(),
        }))
    }

    fn set_vring_kick(&mut self, VringFd { index, fd }: VringFd) -> Result<(), Refused> {
        let queue = self.queue(index)?;
        let fd = fd.ok_or(Refused::NoKick(index))?;
        self.change_ring(queue, |vring| vring.kick = Some(Arc::new(fd)))
    }

    /// Front-ends mask and unmask interrupts by this, so the queue is not stopped for it.
    fn set_vring_call(&mut self, VringFd { index, fd }: VringFd) -> Result<(), Refused> {
        let index = self.queue(index)?;
        let fd = fd.map(Arc::new);
        let vring = &mut self.vrings[usize::from(index)];
        vring.call = fd.clone();
        if vring.running {
            self.backend.set_call(index, fd);
        }
        Ok(())
    }

    /// Changes a ring while it does not run.
    fn change_ring(&mut self, index: u16, change: impl FnOnce(&mut Vring)) -> Result<(), Refused> {
        self.stop(index..index + 1)?;
        change(&mut self.vrings[usize::from(index)]);
        self.start(index)
    }

    /// Starts a ring that has all it needs.
    fn start(&mut self, index: u16) -> Result<(), Refused> {
        let vring = &self.vrings[usize::from(index)];
        let (Some(kick), Some(addr), Some(features)) = (&vring.kick, vring.addr, self.features) else {
            return Ok(());
        };
        let enabled = vring.enabled || features & wire::F_PROTOCOL_FEATURES == 0;
        if vring.running || !enabled || vring.size == 0 || !self.has_memory {
            return Ok(());
        }
        let size = u64::from(vring.size);
        let setup = RingSetup {
            index,
            features: features & !wire::F_PROTOCOL_FEATURES,
            size: vring.size,
            desc: self.ring_part(index, "descriptor table", addr.descriptor, size * 16, 16)?,
            avail: self.ring_part(index, "avail ring", addr.available, size * 2 + 6, 2)?,
            used: self.ring_part(index, "used ring", addr.used, size * 8 + 6, 4)?,
            base: vring.base,
            kick: kick.clone(),
            call: vring.call.clone(),
            err: vring.err.clone(),
            memory: Memory(self.memory.clone()),
        };
        self.backend.start_queue(setup)?;
        self.vrings[usize::from(index)].running = true;
        Ok(())
    }

    /// The guest address of a part of a ring, all of which is in the guest's memory.
    fn ring_part(
        &self,
        index: u16,
        part: &'static str,
        user: u64,
        len: u64,
        align: u64,
    ) -> Result<u64, Refused> {
        let memory = self.memory.guard();
        let guest = memory.user_to_guest(user);
        // Neighbours in the front-end's address space need not be neighbours in the guest's.
        let end = user
            .checked_add(len - 1)
            .and_then(|last| memory.user_to_guest(last));
        guest
            .filter(|guest| end == guest.checked_add(len - 1) && guest % align == 0)
            .filter(|guest| memory.check_range(GuestAddress(*guest), len as usize))
            .ok_or(Refused::RingAddress {
                index,
                part,
                addr: user,
            })
    }

    /// Brings running rings to rest, all at the same time.
    fn stop(&mut self, range: std::ops::Range<u16>) -> Result<(), Refused> {
        for index in range.clone() {
            if self.vrings[usize::from(index)].running {
                self.backend.begin_stop(index);
            }
        }
        let mut result = Ok(());
        for index in range {
            let vring = &mut self.vrings[usize::from(index)];
            if std::mem::take(&mut vring.running) {
                match self.backend.wait_stopped(index) {
                    Ok(base) => vring.base = base,
                    Err(stuck) => result = Err(stuck.into()),
                }
            }
        }
        result
    }

    fn stop_all(&mut self) -> Result<(), Refused> {
        self.stop(0..self.backend.queues())
    }

    fn start_all(&mut self) -> Result<(), Refused> {
        (0..self.backend.queues()).try_for_each(|index| self.start(index))
    }

    fn disable_rings(&mut self) -> Result<(), Refused> {
        self.stop_all()?;
        self.vrings.iter_mut().for_each(|vring| vring.enabled = false);
        Ok(())
    }

    /// Stops and forgets all rings, but for the eventfds to the driver: front-ends set those once a connection.
    fn reset_rings(&mut self) -> Result<(), Refused> {
        let result = self.stop_all();
        for vring in &mut self.vrings {
            let (call, err) = (vring.call.take(), vring.err.take());
            *vring = Vring {
                call,
                err,
                ..Vring::default()
            };
        }
        self.quiesce();
        result
    }

    fn quiesce(&mut self) {
        self.quiet = true;
        self.backend.quiesced();
    }
}

fn check_config_range(offset: u32, size: u32) -> Result<(), Refused> {
    match offset.checked_add(size) {
        Some(end) if size > 0 && end <= wire::MAX_CONFIG => Ok(()),
        _ => Err(Refused::ConfigRange { offset, size }),
    }
}

fn to_region(region: MemoryRegion, fd: OwnedFd) -> Region {
    Region {
        guest_addr: region.guest_addr,
        size: region.size,
        user_addr: region.user_addr,
        fd,
        offset: region.mmap_offset,
        writable: true,
    }
}
