//! A host in this process: submission entries in, completions out, over devices in memory.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use zbdkit_block::{Device, Graph, Host as BlockHost, OpenOptions, OsHost, ZoneOp};
use zbdkit_io::{IoBuf, Runtime, RuntimeOptions};
use zbdkit_nvme::{
    AdminQueue, Change, Completion, Controller, ControllerOptions, CreateCq, CreateSq, Direction, Failure,
    IoQueue, Namespace, NamespaceOptions, QueueControl, Subsystem, SubsystemOptions, Transfer,
};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::AdminOpcode;
use zbdkit_spec::nvme::command::SubmissionEntry;
use zbdkit_spec::nvme::controller::Cc;
use zbdkit_spec::nvme::nvm::Opcode;
use zbdkit_spec::nvme::zns::{Opcode as ZonedOpcode, ReportHeader, SendAction, SendCdw13, ZoneDescriptor};
use zerocopy::{FromBytes, FromZeros};

/// Bytes of a block of all namespaces here.
pub const BLOCK: usize = 512;
/// Blocks of a zone.
pub const ZONE: u64 = 2048;
/// Writable blocks of a zone.
pub const CAPACITY: u64 = 1536;
/// The zoned namespace.
pub const ZONED_NSID: u32 = 1;
/// The conventional namespace.
pub const PLAIN_NSID: u32 = 2;
/// Zones of the zoned namespace.
pub const ZONES: u64 = 8;

/// 8 zones of 1 MiB, three quarters of each writable; 3 may be open, 4 active.
pub const ZONED: &str = "driver=zoned,file.driver=memory,file.size=8M,zone.mode=host-managed,block_size=512,zone.size=1M,\
    zone.capacity=768k,zone.max_open_zones=3,zone.max_active_zones=4,zone.max_append_bytes=64k";
/// The same, two of which may have a random write area of 64 KiB in granules of 8 KiB; with extensions of 128 bytes.
pub const AREAS: &str = "driver=zoned,file.driver=memory,file.size=8M,zone.mode=host-managed,block_size=512,zone.size=1M,\
    zone.capacity=768k,zone.max_open_zones=3,zone.max_active_zones=4,zone.max_append_bytes=64k,zone.zrwa_size=64k,\
    zone.zrwa_granularity=8k,zone.max_zrwa=2,zone.descr_ext_size=128";
/// A disk without zones.
pub const PLAIN: &str = "driver=memory,size=8M";
/// The namespaces that most hosts have.
pub const BOTH: [&str; 2] = [ZONED, PLAIN];

/// CC as Linux enables a controller: all command sets.
pub const ENABLE: u32 = 0x0046_0061;

/// A host with its controller, enabled, and one I/O queue.
pub struct Host {
    pub runtime: Runtime,
    pub subsystem: Arc<Subsystem>,
    pub controller: Arc<Controller>,
    pub admin: AdminQueue,
    pub io: IoQueue,
    pub queues: Queues,
}

/// What the host's side of a command is.
pub struct Memory {
    /// What the host sends.
    pub data: Vec<u8>,
    /// What the controller asked for.
    pub asked: Cell<Option<(Direction, usize)>>,
    /// What it was given to write to.
    received: RefCell<Option<IoBuf>>,
    fails: Option<Failure>,
}

impl Memory {
    pub fn new(data: Vec<u8>) -> Memory {
        Memory {
            data,
            asked: Cell::new(None),
            received: RefCell::new(None),
            fails: None,
        }
    }

    /// Memory that is not there.
    pub fn failing(failure: Failure) -> Memory {
        Memory {
            fails: Some(failure),
            ..Memory::new(Vec::new())
        }
    }

    /// What the controller wrote.
    pub fn received(&self) -> Vec<u8> {
        self.received
            .borrow()
            .as_ref()
            .map_or_else(Vec::new, IoBuf::to_vec)
    }
}

impl Transfer for Memory {
    async fn buffer(&self, _: &SubmissionEntry, direction: Direction, len: usize) -> Result<IoBuf, Failure> {
        assert!(len > 0, "a command without data asks for none");
        assert_eq!(
            self.asked.replace(Some((direction, len))),
            None,
            "memory is asked for once"
        );
        if let Some(failure) = self.fails {
            return Err(failure);
        }
        if direction == Direction::HostToController {
            let mut data = self.data.clone();
            data.resize(len, 0);
            return Ok(IoBuf::from_vec(data));
        }
        // Not zeros, so that what was not written shows.
        let buf = IoBuf::from_vec(vec![0xee; len]);
        *self.received.borrow_mut() = Some(buf.clone());
        Ok(buf)
    }
}

/// Queues that remember what was asked.
#[derive(Default)]
pub struct Queues {
    pub calls: RefCell<Vec<String>>,
}

impl QueueControl for Queues {
    async fn create_cq(&self, queue: CreateCq) -> Result<(), Failure> {
        self.calls.borrow_mut().push(format!("{queue:?}"));
        Ok(())
    }

    async fn create_sq(&self, queue: CreateSq) -> Result<(), Failure> {
        self.calls.borrow_mut().push(format!("{queue:?}"));
        Ok(())
    }

    async fn delete_sq(&self, qid: u16) -> Result<(), Failure> {
        self.calls.borrow_mut().push(format!("delete {qid}"));
        Err(Status::INVALID_QUEUE_IDENTIFIER.into())
    }

    async fn set_doorbell_buffers(&self, shadow: u64, event_index: u64) -> Result<(), Failure> {
        self.calls
            .borrow_mut()
            .push(format!("{shadow:#x} {event_index:#x}"));
        Ok(())
    }
}

/// Opens a graph.
pub fn open(runtime: &Runtime, graph: &str) -> Device {
    let host: Arc<dyn BlockHost> = Arc::new(OsHost);
    let graph = Graph::parse(graph).unwrap();
    runtime
        .block_on(graph.open(&host, &OpenOptions::default()))
        .unwrap()
}

/// What the subsystem of these tests is known by.
pub fn names() -> SubsystemOptions {
    SubsystemOptions {
        nqn: "nqn.2026-11.org.example:test".into(),
        serial: "serial".into(),
        model: "model".into(),
        firmware: "1.0".into(),
    }
}

impl Host {
    /// Over the zoned and the conventional device.
    pub fn new() -> Host {
        Host::over(&[
            (ZONED, NamespaceOptions::default()),
            (PLAIN, NamespaceOptions::default()),
        ])
    }

    /// Over a zoned device with all that one can have, and the conventional one.
    pub fn with_areas() -> Host {
        Host::over(&[
            (AREAS, NamespaceOptions::default()),
            (PLAIN, NamespaceOptions::default()),
        ])
    }

    /// Over devices of these graphs.
    pub fn over(graphs: &[(&str, NamespaceOptions)]) -> Host {
        Host::with(graphs, ControllerOptions::default(), ENABLE)
    }

    /// With these options, enabled by this CC.
    pub fn with(graphs: &[(&str, NamespaceOptions)], options: ControllerOptions, cc: u32) -> Host {
        let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
        let namespaces = graphs
            .iter()
            .map(|(graph, options)| Namespace::new(open(&runtime, graph), options).unwrap())
            .collect();
        let subsystem = Subsystem::new(names(), namespaces).unwrap();
        let controller = Controller::new(&subsystem, options);
        assert_eq!(controller.configure(Cc::from_bits(cc)), Change::Enable);
        controller.set_ready();
        Host {
            runtime,
            admin: AdminQueue::new(&controller),
            io: IoQueue::new(&controller, 1, 32),
            subsystem,
            controller,
            queues: Queues::default(),
        }
    }

    /// Submits an I/O command.
    pub fn io(&self, entry: &SubmissionEntry, memory: &Memory) -> Completion {
        self.runtime.block_on(self.io.execute(entry, memory))
    }

    /// Submits an admin command.
    pub fn admin(&self, entry: &SubmissionEntry, memory: &Memory) -> Completion {
        self.runtime
            .block_on(self.admin.execute(entry, memory, &self.queues))
    }

    /// Submits an I/O command with data, and returns its status.
    pub fn send(&self, entry: SubmissionEntry, data: &[u8]) -> Status {
        let completion = self.io(&entry, &Memory::new(data.to_vec()));
        check_dnr(&completion);
        completion.status.status()
    }

    /// Submits an I/O command that must succeed, and returns its data.
    pub fn receive(&self, entry: SubmissionEntry) -> Vec<u8> {
        let memory = Memory::new(Vec::new());
        let completion = self.io(&entry, &memory);
        assert_eq!(completion.status.status(), Status::SUCCESS, "{entry:?}");
        memory.received()
    }

    /// Submits an admin command that must succeed, and returns its data.
    pub fn ask(&self, entry: SubmissionEntry) -> Vec<u8> {
        let memory = Memory::new(Vec::new());
        let completion = self.admin(&entry, &memory);
        assert_eq!(completion.status.status(), Status::SUCCESS, "{entry:?}");
        memory.received()
    }

    /// Submits an admin command, and returns its status and result.
    pub fn tell(&self, entry: SubmissionEntry, data: &[u8]) -> (Status, u64) {
        let completion = self.admin(&entry, &Memory::new(data.to_vec()));
        check_dnr(&completion);
        (completion.status.status(), completion.result)
    }

    /// Writes `count` blocks that tell where they belong.
    pub fn write(&self, nsid: u32, lba: u64, count: u64) -> Status {
        self.send(rw(Opcode::WRITE.0, nsid, lba, count), &pattern(lba, count))
    }

    /// Reads.
    pub fn read(&self, nsid: u32, lba: u64, count: u64) -> Vec<u8> {
        self.receive(rw(Opcode::READ.0, nsid, lba, count))
    }

    /// Appends to a zone: the status, and the address.
    pub fn append(&self, zone: u64, count: u64) -> (Status, u64) {
        let entry = rw(ZonedOpcode::ZONE_APPEND.0, ZONED_NSID, zone * ZONE, count);
        let completion = self.io(&entry, &Memory::new(pattern(zone * ZONE, count)));
        (completion.status.status(), completion.result)
    }

    /// An action on the zone that starts at this block.
    pub fn zone(&self, action: SendAction, lba: u64) -> Status {
        self.send(zone_send(action, lba, SendCdw13::new()), &[])
    }

    /// An action on all zones.
    pub fn all_zones(&self, action: SendAction) -> Status {
        self.send(zone_send(action, 0, SendCdw13::new().with_select_all(true)), &[])
    }

    /// The operator changes a zone.
    pub fn set(&self, op: ZoneOp, zone: u64) {
        let device = self.subsystem.namespace(ZONED_NSID).unwrap().device();
        let lane = device.lane(1);
        self.runtime
            .block_on(device.zone_op(&lane, op, zone * ZONE * 512))
            .unwrap();
    }

    /// A report: the header's number and the descriptors in a buffer for `room` of them.
    pub fn report(&self, lba: u64, room: usize, filter: u8, partial: bool) -> (u64, Vec<ZoneDescriptor>) {
        let bytes = self.receive(zone_receive(lba, 64 + room * 64, filter, partial));
        let (header, rest) = ReportHeader::read_from_prefix(&bytes).unwrap();
        let zones = rest
            .chunks_exact(64)
            .map(|zone| ZoneDescriptor::read_from_bytes(zone).unwrap());
        let zones = zones.filter(|zone| zone.zt != 0).collect();
        (header.nr_zones.get(), zones)
    }

    /// The state and the write pointer of a zone, the latter in blocks from its start.
    pub fn state(&self, zone: u64) -> (zbdkit_spec::nvme::zns::ZoneState, u64) {
        let (_, zones) = self.report(zone * ZONE, 1, 0, true);
        (zones[0].state(), zones[0].wp.get().wrapping_sub(zone * ZONE))
    }

    /// What must succeed at the end of a suite: so that "everything is refused" cannot pass.
    pub fn must_work(&self) {
        assert_eq!(self.all_zones(SendAction::RESET), Status::SUCCESS);
        assert_eq!(self.write(ZONED_NSID, 0, 8), Status::SUCCESS);
        assert_eq!(self.append(0, 8), (Status::SUCCESS, 8));
        let expected = [pattern(0, 8), pattern(0, 8), vec![0; 8 * BLOCK]].concat();
        assert!(self.read(ZONED_NSID, 0, 24) == expected);
    }
}

/// What may be tried again says so, what may not says that.
fn check_dnr(completion: &Completion) {
    let status = completion.status.status();
    if status.0 >> 8 < 2
        && !matches!(
            status,
            Status::SUCCESS | Status::INTERNAL_ERROR | Status::DATA_TRANSFER_ERROR
        )
    {
        assert!(completion.status.dnr(), "{status:?} stays");
    }
}

/// Blocks that tell where they belong.
pub fn pattern(lba: u64, count: u64) -> Vec<u8> {
    (lba..lba + count)
        .flat_map(|lba| (0..BLOCK as u64).map(move |i| (lba * 31 + i * 7 + 1) as u8))
        .collect()
}

/// An empty entry with an opcode.
pub fn entry(opcode: u8, nsid: u32) -> SubmissionEntry {
    let mut entry = SubmissionEntry::new_zeroed();
    entry.opcode = opcode;
    entry.nsid = nsid.into();
    entry
}

/// An entry with the first block and the number of blocks.
pub fn rw(opcode: u8, nsid: u32, lba: u64, count: u64) -> SubmissionEntry {
    let mut entry = entry(opcode, nsid);
    entry.cdw10 = (lba as u32).into();
    entry.cdw11 = ((lba >> 32) as u32).into();
    entry.cdw12 = ((count - 1) as u32).into();
    entry
}

/// Zone Management Send.
pub fn zone_send(action: SendAction, lba: u64, cdw13: SendCdw13) -> SubmissionEntry {
    let mut entry = rw(ZonedOpcode::ZONE_MANAGEMENT_SEND.0, ZONED_NSID, lba, 1);
    entry.cdw13 = cdw13.with_zsa(action.0).into_bits().into();
    entry
}

/// Zone Management Receive of so many bytes.
pub fn zone_receive(lba: u64, len: usize, filter: u8, partial: bool) -> SubmissionEntry {
    let mut entry = rw(
        ZonedOpcode::ZONE_MANAGEMENT_RECEIVE.0,
        ZONED_NSID,
        lba,
        len as u64 / 4,
    );
    let cdw13 = zbdkit_spec::nvme::zns::ReceiveCdw13::new()
        .with_zrasf(filter)
        .with_partial(partial);
    entry.cdw13 = cdw13.into_bits().into();
    entry
}

/// Identify.
pub fn identify(cns: u8, nsid: u32, csi: u8) -> SubmissionEntry {
    let mut entry = entry(AdminOpcode::IDENTIFY.0, nsid);
    entry.cdw10 = u32::from(cns).into();
    entry.cdw11 = (u32::from(csi) << 24).into();
    entry
}

/// Get Log Page of so many bytes.
pub fn get_log(lid: u8, nsid: u32, len: u32) -> SubmissionEntry {
    let mut entry = entry(AdminOpcode::GET_LOG_PAGE.0, nsid);
    let dwords_z = len / 4 - 1;
    entry.cdw10 = (u32::from(lid) | (dwords_z & 0xffff) << 16).into();
    entry.cdw11 = (dwords_z >> 16).into();
    entry
}

/// Set Features.
pub fn set_feature(fid: u8, value: u32) -> SubmissionEntry {
    let mut entry = entry(AdminOpcode::SET_FEATURES.0, 0);
    entry.cdw10 = u32::from(fid).into();
    entry.cdw11 = value.into();
    entry
}

/// Get Features.
pub fn get_feature(fid: u8, select: u8, value: u32) -> SubmissionEntry {
    let mut entry = entry(AdminOpcode::GET_FEATURES.0, 0);
    entry.cdw10 = (u32::from(fid) | u32::from(select) << 8).into();
    entry.cdw11 = value.into();
    entry
}

/// Polls a future once.
pub async fn poll_once<F: Future>(future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    poll_fn(|cx| {
        Poll::Ready(match future.as_mut().poll(cx) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        })
    })
    .await
}
