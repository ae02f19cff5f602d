//! A zoned namespace that plays by the rules of the ZNS command set, in memory: naive, small, for tests.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zbdkit_io::{
    IoBuf, LocalBoxFuture, NvmeCommand, NvmeCompletion, NvmeQueue, Storage, StorageOp, yield_now,
};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::{AdminOpcode, Cns, Csi, IdentifyCdw10, IdentifyCdw11, IdentifyController};
use zbdkit_spec::nvme::nvm::{self, RwCdw12};
use zbdkit_spec::nvme::zns::{
    self, Attributes, ReceiveAction, ReceiveCdw13, SendAction, SendCdw13, ZoneDescriptor, ZoneState,
};
use zerocopy::{FromZeros, IntoBytes};

/// Bytes of a block.
pub const BLOCK: u64 = 4096;
/// Number of zones.
pub const ZONES: u64 = 8;
/// Blocks of a zone.
pub const ZONE_SIZE: u64 = 256;
/// Blocks that a zone holds.
pub const CAPACITY: u64 = 192;
/// Zones that may be open.
pub const MAX_OPEN: u32 = 3;
/// Zones that may be open or closed.
pub const MAX_ACTIVE: u32 = 5;
/// Transfers of at most 1 << this pages.
pub const MDTS: u8 = 4;
/// Appends of at most 1 << this pages.
pub const ZASL: u8 = 3;
/// Blocks of a zone random write area.
pub const ZRWA_SIZE: u64 = 16;
/// Blocks that its commits are a multiple of.
pub const ZRWA_GRANULARITY: u64 = 4;
/// Zones that may have one.
pub const AREAS: u32 = 2;
/// Bytes of a descriptor extension.
pub const EXTENSION: usize = 64;

#[derive(Clone)]
struct Zone {
    state: ZoneState,
    wp: u64,
    zrwa: bool,
    extension: Option<Vec<u8>>,
}

struct State {
    zones: Vec<Zone>,
    data: Vec<u8>,
    flushes: u32,
    /// Commands that it is not ready for yet.
    not_ready: u32,
    /// Writes and appends stay under way, done but not answered.
    held: bool,
    /// Writes and appends that are.
    under_way: u32,
    /// Writes and appends that broke a rule.
    refused: u32,
}

/// The namespace, as the storage of a character device.
pub struct Simulated {
    state: Arc<Mutex<State>>,
}

impl Simulated {
    /// An empty namespace, number 1 of its controller.
    pub fn new() -> Arc<Simulated> {
        let zone = |number| Zone {
            state: ZoneState::EMPTY,
            wp: number * ZONE_SIZE,
            zrwa: false,
            extension: None,
        };
        Arc::new(Simulated {
            state: Arc::new(Mutex::new(State {
                zones: (0..ZONES).map(zone).collect(),
                data: vec![0; (ZONES * ZONE_SIZE * BLOCK) as usize],
                flushes: 0,
                not_ready: 0,
                held: false,
                under_way: 0,
                refused: 0,
            })),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// How many flushes there were.
    pub fn flushes(&self) -> u32 {
        self.state().flushes
    }

    /// The next I/O commands are answered with that the namespace is not ready.
    pub fn not_ready_for(&self, commands: u32) {
        self.state().not_ready = commands;
    }

    /// Answers no write or append until it is told otherwise.
    pub fn hold(&self, held: bool) {
        self.state().held = held;
    }

    /// How many writes and appends are under way.
    pub fn under_way(&self) -> u32 {
        self.state().under_way
    }

    /// How many writes and appends broke a rule.
    pub fn refused(&self) -> u32 {
        self.state().refused
    }

    /// Puts a zone into a state that no command brings about.
    pub fn break_zone(&self, zone: usize, state: ZoneState) {
        self.state().zones[zone].state = state;
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Storage for Simulated {
    fn submit(&self, _op: StorageOp) -> LocalBoxFuture<'static, io::Result<()>> {
        unreachable!("a character device of NVMe has no reads and writes")
    }

    fn len(&self) -> io::Result<u64> {
        Ok(0)
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn nvme(&self, command: NvmeCommand, buf: IoBuf) -> LocalBoxFuture<'static, io::Result<NvmeCompletion>> {
        let mut state = self.state();
        let writes = [nvm::Opcode::WRITE.0, zns::Opcode::ZONE_APPEND.0].contains(&command.opcode);
        let answer = match command.queue {
            NvmeQueue::Admin => identify(&command, &buf),
            NvmeQueue::Io if state.not_ready > 0 => {
                state.not_ready -= 1;
                let completion = NvmeCompletion {
                    status: Status::NAMESPACE_NOT_READY.0,
                    result: 0,
                };
                return Box::pin(async move { Ok(completion) });
            }
            NvmeQueue::Io => state.io(&command, &buf),
        };
        let completion = match answer {
            Ok(result) => NvmeCompletion { status: 0, result },
            // Do not retry.
            Err(status) => NvmeCompletion {
                status: status.0 | 0x4000,
                result: 0,
            },
        };
        if !writes || command.queue == NvmeQueue::Admin {
            return Box::pin(async move { Ok(completion) });
        }
        state.under_way += 1;
        state.refused += u32::from(completion.status != 0);
        let state = self.state.clone();
        Box::pin(async move {
            while lock(&state).held {
                yield_now().await;
            }
            lock(&state).under_way -= 1;
            Ok(completion)
        })
    }
}

fn identify(command: &NvmeCommand, buf: &IoBuf) -> Result<u64, Status> {
    assert_eq!((command.opcode, buf.len()), (AdminOpcode::IDENTIFY.0, 4096));
    let cdw10 = IdentifyCdw10::from_bits(command.cdw10_15[0]);
    let csi = Csi(IdentifyCdw11::from_bits(command.cdw10_15[1]).csi());
    match (Cns(cdw10.cns()), csi) {
        (Cns::CONTROLLER, _) => {
            let mut controller = IdentifyController::new_zeroed();
            controller.mdts = MDTS;
            controller.vwc = 1;
            buf.copy_from(controller.as_bytes());
        }
        (Cns::NAMESPACE, _) if command.nsid == 1 => {
            let mut namespace = nvm::IdentifyNamespace::new_zeroed();
            namespace.nsze.set(ZONES * ZONE_SIZE);
            namespace.lbaf[0].lbads = BLOCK.ilog2() as u8;
            buf.copy_from(namespace.as_bytes());
        }
        (Cns::NAMESPACE_OF_CSI, Csi::ZONED) if command.nsid == 1 => {
            let mut namespace = zns::IdentifyNamespace::new_zeroed();
            namespace.mor_z.set(MAX_OPEN - 1);
            namespace.mar_z.set(MAX_ACTIVE - 1);
            namespace.ozcs.set(0b10);
            namespace.numzrwa.set(AREAS);
            namespace.zrwasz.set(ZRWA_SIZE as u16);
            namespace.zrwafg.set(ZRWA_GRANULARITY as u16);
            namespace.zrwacap = 1;
            namespace.lbafe[0].zsze.set(ZONE_SIZE);
            namespace.lbafe[0].zdes = (EXTENSION / 64) as u8;
            buf.copy_from(namespace.as_bytes());
        }
        (Cns::CONTROLLER_OF_CSI, Csi::ZONED) => {
            let mut controller = zns::IdentifyController::new_zeroed();
            controller.zasl = ZASL;
            buf.copy_from(controller.as_bytes());
        }
        _ => return Err(Status::INVALID_FIELD),
    }
    Ok(0)
}

impl State {
    fn io(&mut self, command: &NvmeCommand, buf: &IoBuf) -> Result<u64, Status> {
        assert_eq!(command.nsid, 1);
        assert!(buf.len() as u64 <= 4096 << MDTS, "longer than MDTS allows");
        let [low, high, cdw12, cdw13, ..] = command.cdw10_15;
        let lba = u64::from(high) << 32 | u64::from(low);
        let blocks = u64::from(RwCdw12::from_bits(cdw12).nlb_z()) + 1;
        if command.opcode == nvm::Opcode::FLUSH.0 {
            self.flushes += 1;
            return Ok(0);
        }
        if command.opcode == zns::Opcode::ZONE_MANAGEMENT_SEND.0 {
            return self.send(SendCdw13::from_bits(cdw13), lba, buf).map(|()| 0);
        }
        if command.opcode == zns::Opcode::ZONE_MANAGEMENT_RECEIVE.0 {
            assert_eq!(
                buf.len() as u64,
                (u64::from(cdw12) + 1) * 4,
                "the buffer is what the command says"
            );
            return self.receive(ReceiveCdw13::from_bits(cdw13), lba, buf).map(|()| 0);
        }
        assert_eq!(
            buf.len() as u64,
            blocks * BLOCK,
            "the buffer is what the command says"
        );
        if command.opcode == nvm::Opcode::READ.0 {
            return self.read(lba, blocks, buf).map(|()| 0);
        }
        if command.opcode == nvm::Opcode::WRITE.0 {
            return self.write(lba, blocks, buf).map(|()| 0);
        }
        if command.opcode == zns::Opcode::ZONE_APPEND.0 {
            return self.append(lba, blocks, buf);
        }
        Err(Status::INVALID_OPCODE)
    }

    fn zone(&self, lba: u64) -> Result<usize, Status> {
        let zone = (lba / ZONE_SIZE) as usize;
        if zone < self.zones.len() {
            Ok(zone)
        } else {
            Err(Status::LBA_OUT_OF_RANGE)
        }
    }

    fn read(&self, lba: u64, blocks: u64, buf: &IoBuf) -> Result<(), Status> {
        let zone = self.zone(lba)?;
        if self.zones[zone].state == ZoneState::OFFLINE {
            return Err(Status::ZONE_IS_OFFLINE);
        }
        if lba % ZONE_SIZE + blocks > ZONE_SIZE {
            return Err(Status::ZONE_BOUNDARY_ERROR);
        }
        let (from, len) = ((lba * BLOCK) as usize, (blocks * BLOCK) as usize);
        buf.copy_from(&self.data[from..from + len]);
        Ok(())
    }

    fn append(&mut self, lba: u64, blocks: u64, buf: &IoBuf) -> Result<u64, Status> {
        let zone = self.zone(lba)?;
        if self.zones[zone].zrwa {
            return Err(Status::INVALID_ZONE_OPERATION);
        }
        if !lba.is_multiple_of(ZONE_SIZE) || buf.len() as u64 > 4096 << ZASL {
            return Err(Status::INVALID_FIELD);
        }
        let at = self.zones[zone].wp;
        self.write(at.min(lba + ZONE_SIZE - 1), blocks, buf)?;
        Ok(at)
    }

    fn write(&mut self, lba: u64, blocks: u64, buf: &IoBuf) -> Result<(), Status> {
        let zone = self.zone(lba)?;
        match self.zones[zone].state {
            ZoneState::FULL => return Err(Status::ZONE_IS_FULL),
            ZoneState::READ_ONLY => return Err(Status::ZONE_IS_READ_ONLY),
            ZoneState::OFFLINE => return Err(Status::ZONE_IS_OFFLINE),
            _ => {}
        }
        let end = zone as u64 * ZONE_SIZE + CAPACITY;
        if lba + blocks > end {
            return Err(Status::ZONE_BOUNDARY_ERROR);
        }
        let Zone { wp, zrwa, .. } = self.zones[zone];
        let reach = wp + 2 * ZRWA_SIZE;
        let fits = if zrwa {
            lba >= wp && lba + blocks <= reach
        } else {
            lba == wp
        };
        if !fits {
            return Err(Status::ZONE_INVALID_WRITE);
        }
        self.take_open(zone, ZoneState::IMPLICITLY_OPENED)?;
        let (from, len) = ((lba * BLOCK) as usize, (blocks * BLOCK) as usize);
        buf.copy_to(&mut self.data[from..from + len]);
        let moved = match zrwa {
            false => lba + blocks,
            // What falls out of the window below is committed.
            true => wp.max(
                (lba + blocks)
                    .saturating_sub(ZRWA_SIZE)
                    .next_multiple_of(ZRWA_GRANULARITY),
            ),
        };
        self.move_pointer(zone, moved.min(end));
        Ok(())
    }

    fn move_pointer(&mut self, zone: usize, wp: u64) {
        let full = wp == zone as u64 * ZONE_SIZE + CAPACITY;
        let zone = &mut self.zones[zone];
        zone.wp = wp;
        if full {
            zone.state = ZoneState::FULL;
            zone.zrwa = false;
        }
    }

    fn count(&self, states: &[ZoneState]) -> u32 {
        self.zones
            .iter()
            .filter(|zone| states.contains(&zone.state))
            .count() as u32
    }

    fn take_active(&self) -> Result<(), Status> {
        let active = [
            ZoneState::IMPLICITLY_OPENED,
            ZoneState::EXPLICITLY_OPENED,
            ZoneState::CLOSED,
        ];
        if self.count(&active) == MAX_ACTIVE {
            Err(Status::TOO_MANY_ACTIVE_ZONES)
        } else {
            Ok(())
        }
    }

    fn area_left(&self) -> Result<(), Status> {
        match self.zones.iter().filter(|zone| zone.zrwa).count() as u32 {
            AREAS => Err(Status::ZRWA_RESOURCES_UNAVAILABLE),
            _ => Ok(()),
        }
    }

    /// Opens the zone if it is not; closes another one that was opened by a write if need be.
    fn take_open(&mut self, zone: usize, state: ZoneState) -> Result<(), Status> {
        let open = [ZoneState::IMPLICITLY_OPENED, ZoneState::EXPLICITLY_OPENED];
        if open.contains(&self.zones[zone].state) {
            if state == ZoneState::EXPLICITLY_OPENED {
                self.zones[zone].state = state;
            }
            return Ok(());
        }
        if self.zones[zone].state == ZoneState::EMPTY {
            self.take_active()?;
        }
        if self.count(&open) == MAX_OPEN {
            let implicit = |zone: &&mut Zone| zone.state == ZoneState::IMPLICITLY_OPENED;
            let victim = self.zones.iter_mut().find(implicit);
            victim.ok_or(Status::TOO_MANY_OPEN_ZONES)?.state = ZoneState::CLOSED;
        }
        self.zones[zone].state = state;
        Ok(())
    }

    fn send(&mut self, cdw13: SendCdw13, lba: u64, buf: &IoBuf) -> Result<(), Status> {
        let action = SendAction(cdw13.zsa());
        if cdw13.select_all() {
            assert_eq!(action, SendAction::RESET, "nothing else is asked for all zones");
            let fixed = [ZoneState::READ_ONLY, ZoneState::OFFLINE];
            (0..self.zones.len())
                .filter(|zone| !fixed.contains(&self.zones[*zone].state))
                .collect::<Vec<_>>()
                .into_iter()
                .for_each(|zone| self.reset(zone));
            return Ok(());
        }
        let zone = self.zone(lba)?;
        if !lba.is_multiple_of(ZONE_SIZE) && action != SendAction::FLUSH_EXPLICIT_ZRWA_RANGE {
            return Err(Status::INVALID_FIELD);
        }
        let state = self.zones[zone].state;
        let open = [ZoneState::IMPLICITLY_OPENED, ZoneState::EXPLICITLY_OPENED].contains(&state);
        let usable = open || [ZoneState::EMPTY, ZoneState::CLOSED].contains(&state);
        let refused = Err(Status::INVALID_ZONE_STATE_TRANSITION);
        match action {
            SendAction::OPEN if usable => {
                if cdw13.zsaso() {
                    if open {
                        return Err(Status::INVALID_ZONE_OPERATION);
                    }
                    self.area_left()?;
                }
                self.take_open(zone, ZoneState::EXPLICITLY_OPENED)?;
                self.zones[zone].zrwa |= cdw13.zsaso();
            }
            SendAction::CLOSE if open => self.zones[zone].state = ZoneState::CLOSED,
            SendAction::CLOSE if state == ZoneState::CLOSED => {}
            SendAction::FINISH if usable || state == ZoneState::FULL => {
                self.zones[zone].state = ZoneState::FULL;
                self.zones[zone].zrwa = false;
            }
            SendAction::RESET if usable || state == ZoneState::FULL => self.reset(zone),
            SendAction::OFFLINE if state == ZoneState::READ_ONLY => {
                self.zones[zone].state = ZoneState::OFFLINE;
            }
            SendAction::SET_DESCRIPTOR_EXTENSION if state == ZoneState::EMPTY => {
                assert_eq!(buf.len(), EXTENSION);
                self.take_active()?;
                if cdw13.zsaso() {
                    self.area_left()?;
                }
                self.zones[zone].zrwa = cdw13.zsaso();
                self.zones[zone].extension = Some(buf.to_vec());
                self.zones[zone].state = ZoneState::CLOSED;
            }
            SendAction::FLUSH_EXPLICIT_ZRWA_RANGE if self.zones[zone].zrwa => {
                let wp = self.zones[zone].wp;
                if lba < wp || lba >= wp + ZRWA_SIZE || !(lba + 1 - wp).is_multiple_of(ZRWA_GRANULARITY) {
                    return Err(Status::INVALID_FIELD);
                }
                self.move_pointer(zone, lba + 1);
            }
            SendAction::FLUSH_EXPLICIT_ZRWA_RANGE => return Err(Status::INVALID_FIELD),
            _ => return refused,
        }
        Ok(())
    }

    fn reset(&mut self, zone: usize) {
        let start = zone as u64 * ZONE_SIZE;
        self.zones[zone] = Zone {
            state: ZoneState::EMPTY,
            wp: start,
            zrwa: false,
            extension: None,
        };
        self.data[(start * BLOCK) as usize..((start + ZONE_SIZE) * BLOCK) as usize].fill(0);
    }

    fn receive(&self, cdw13: ReceiveCdw13, lba: u64, buf: &IoBuf) -> Result<(), Status> {
        let first = self.zone(lba)?;
        let extended = ReceiveAction(cdw13.zra()) == ReceiveAction::EXTENDED_REPORT;
        let size = 64 + if extended { EXTENSION } else { 0 };
        let room = (buf.len() - 64) / size;
        let zones = self.zones.iter().enumerate().skip(first);
        let count = zones.clone().count().min(room);
        let mut answer = vec![0; 64];
        answer[..8].copy_from_slice(&(count as u64).to_le_bytes());
        for (number, zone) in zones.take(count) {
            let mut descriptor = ZoneDescriptor::new_zeroed();
            descriptor.zt = 2;
            descriptor.zs = zone.state.0 << 4;
            descriptor.za = Attributes::new()
                .with_zdev(zone.extension.is_some())
                .with_zrwav(zone.zrwa)
                .into_bits();
            descriptor.zcap.set(CAPACITY);
            descriptor.zslba.set(number as u64 * ZONE_SIZE);
            let valid = ![ZoneState::FULL, ZoneState::READ_ONLY, ZoneState::OFFLINE].contains(&zone.state);
            descriptor.wp.set(if valid { zone.wp } else { u64::MAX });
            answer.extend(descriptor.as_bytes());
            if extended {
                answer.extend(zone.extension.clone().unwrap_or(vec![0; EXTENSION]));
            }
        }
        buf.copy_from(&answer);
        Ok(())
    }
}
