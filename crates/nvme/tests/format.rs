//! Format NVM to blocks of another size.

mod host;

use std::cell::Cell;
use std::future::poll_fn;
use std::task::Poll;

use host::{
    AREAS, ENABLE, Host, Memory, PLAIN_NSID, ZONED, ZONED_NSID, ZONES, entry, get_log, identify, names, open,
    pattern, poll_once, rw, set_feature, zone_receive, zone_send,
};
use zbdkit_block::ZoneOp;
use zbdkit_io::{IoBuf, Runtime, RuntimeOptions};
use zbdkit_nvme::{
    AdminQueue, Change, Completion, Controller, ControllerOptions, Direction, Failure, Namespace,
    NamespaceOptions, Subsystem, Transfer,
};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::AdminOpcode;
use zbdkit_spec::nvme::command::{NSID_ALL, SubmissionEntry};
use zbdkit_spec::nvme::controller::Cc;
use zbdkit_spec::nvme::feature::FeatureId;
use zbdkit_spec::nvme::log::LogId;
use zbdkit_spec::nvme::nvm::{CopyRange, IdentifyNamespace, Opcode};
use zbdkit_spec::nvme::zns::{
    self, ChangedZoneList, Opcode as ZonedOpcode, SendAction, SendCdw13, ZoneDescriptor, ZoneState,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Blocks of 4096 bytes in a zone.
const ZONE: u64 = 256;
/// And its writable ones.
const CAPACITY: u64 = 192;

fn format(host: &Host, nsid: u32, cdw10: u32) -> Status {
    let mut command = entry(AdminOpcode::FORMAT_NVM.0, nsid);
    command.cdw10 = cdw10.into();
    host.tell(command, &[]).0
}

fn namespace(host: &Host, nsid: u32) -> IdentifyNamespace {
    IdentifyNamespace::read_from_bytes(&host.ask(identify(0, nsid, 0))).unwrap()
}

fn zoned_namespace(host: &Host) -> zns::IdentifyNamespace {
    zns::IdentifyNamespace::read_from_bytes(&host.ask(identify(5, ZONED_NSID, 2))).unwrap()
}

/// The zone that starts at this block.
fn descriptor(host: &Host, lba: u64) -> ZoneDescriptor {
    let report = host.receive(zone_receive(lba, 128, 0, true));
    ZoneDescriptor::read_from_bytes(&report[64..128]).unwrap()
}

#[test]
fn everything_is_told_in_the_new_blocks() {
    let host = Host::with_areas();
    let before = namespace(&host, ZONED_NSID);
    let sizes = |namespace: &IdentifyNamespace| {
        let formats = &namespace.lbaf[..=usize::from(namespace.nlbaf_z)];
        formats.iter().map(|format| format.lbads).collect::<Vec<_>>()
    };
    assert_eq!((sizes(&before), before.format_index()), (vec![9, 12], 0));
    assert!(before.lbaf[0].rp > before.lbaf[1].rp, "a page is best");
    assert_eq!(before.lbaf[2], FromZeros::new_zeroed());
    assert_eq!(format(&host, ZONED_NSID, 1), Status::SUCCESS);

    let after = namespace(&host, ZONED_NSID);
    assert_eq!((sizes(&after), after.format_index()), (vec![9, 12], 1));
    let blocks = (ZONES * ZONE).into();
    assert_eq!((after.nsze, after.ncap, after.nuse), (blocks, blocks, blocks));
    assert_eq!((after.mssrl.get(), after.mcl.get()), (256, 256));
    let zoned = zoned_namespace(&host);
    assert_eq!([0, 1].map(|i: usize| zoned.lbafe[i].zsze.get()), [2048, ZONE]);
    assert_eq!([0, 1].map(|i: usize| zoned.lbafe[i].zdes), [2, 2]);
    assert_eq!((zoned.zrwasz.get(), zoned.zrwafg.get()), (16, 2));
    let zone = descriptor(&host, 3 * ZONE);
    assert_eq!(
        (zone.zslba.get(), zone.zcap.get(), zone.wp.get()),
        (3 * ZONE, CAPACITY, 3 * ZONE)
    );

    assert_eq!(format(&host, ZONED_NSID, 0), Status::SUCCESS);
    assert!(host.ask(identify(0, ZONED_NSID, 0)) == zerocopy::IntoBytes::as_bytes(&before));
    assert_eq!(
        (
            zoned_namespace(&host).zrwasz.get(),
            zoned_namespace(&host).zrwafg.get()
        ),
        (128, 16)
    );
    host.must_work();
}

#[test]
fn a_formatted_namespace_is_erased_and_takes_the_new_blocks() {
    let host = Host::with_areas();
    // A zone of each kind, extensions and areas among them.
    assert_eq!(host.write(ZONED_NSID, 0, 9), Status::SUCCESS);
    assert_eq!(
        host.write(ZONED_NSID, host::ZONE, host::CAPACITY),
        Status::SUCCESS
    );
    let with_area = SendCdw13::new().with_zsaso(true);
    let area = zone_send(SendAction::OPEN, 2 * host::ZONE, with_area);
    assert_eq!(host.send(area, &[]), Status::SUCCESS);
    assert_eq!(host.write(ZONED_NSID, 2 * host::ZONE + 3, 1), Status::SUCCESS);
    let extension = zone_send(
        SendAction::SET_DESCRIPTOR_EXTENSION,
        3 * host::ZONE,
        SendCdw13::new(),
    );
    assert_eq!(host.send(extension, &[7; 128]), Status::SUCCESS);
    assert_eq!(host.zone(SendAction::OPEN, 4 * host::ZONE), Status::SUCCESS);
    host.set(ZoneOp::SetReadOnly, 5);
    host.set(ZoneOp::SetOffline, 6);

    assert_eq!(format(&host, ZONED_NSID, 1), Status::SUCCESS);
    for zone in 0..ZONES {
        let zone = descriptor(&host, zone * ZONE);
        let expected = match zone.zslba.get() / ZONE {
            5 | 6 => ZoneState::OFFLINE,
            _ => ZoneState::EMPTY,
        };
        assert_eq!((zone.state(), zone.za), (expected, 0), "{zone:?}");
    }
    assert_eq!(host.read(ZONED_NSID, 0, 16), vec![0; 16 * 4096]);

    // Two blocks, which are sixteen of the old ones, then one by append.
    let two = pattern(0, 16);
    assert_eq!(
        host.send(rw(Opcode::WRITE.0, ZONED_NSID, ZONE, 2), &two),
        Status::SUCCESS
    );
    let append = rw(ZonedOpcode::ZONE_APPEND.0, ZONED_NSID, ZONE, 1);
    let appended = host.io(&append, &Memory::new(pattern(0, 8)));
    assert_eq!((appended.is_success(), appended.result), (true, ZONE + 2));
    let read = host.read(ZONED_NSID, ZONE, 3);
    assert!(read == [two, pattern(0, 8)].concat());
    assert_eq!(descriptor(&host, ZONE).wp.get(), ZONE + 3);
    let past_capacity = rw(Opcode::WRITE.0, ZONED_NSID, 2 * ZONE, CAPACITY + 1);
    assert_eq!(host.send(past_capacity, &[0; 4096]), Status::ZONE_BOUNDARY_ERROR);
    let past_end = rw(Opcode::READ.0, ZONED_NSID, ZONES * ZONE, 1);
    assert_eq!(host.send(past_end, &[]), Status::LBA_OUT_OF_RANGE);

    assert_eq!(format(&host, ZONED_NSID, 0), Status::SUCCESS);
    assert_eq!(host.state(1), (ZoneState::EMPTY, 0));
    host.must_work();
}

#[test]
fn a_format_that_a_namespace_does_not_have_changes_none() {
    let host = Host::new();
    let plain = namespace(&host, PLAIN_NSID);
    assert_eq!((plain.nlbaf_z, plain.flbas), (0, 0));
    assert_eq!(host.write(ZONED_NSID, 0, 8), Status::SUCCESS);
    // Unknown, with metadata, with protection information; of all namespaces, one of which has only the first.
    for cdw10 in [2, 15, 1 << 12, 1 | 1 << 4, 1 | 1 << 5] {
        assert_eq!(
            format(&host, ZONED_NSID, cdw10),
            Status::INVALID_FORMAT,
            "{cdw10:#x}"
        );
    }
    assert_eq!(format(&host, NSID_ALL, 1), Status::INVALID_FORMAT);
    assert_eq!(format(&host, ZONED_NSID, 1 | 2 << 9), Status::INVALID_FIELD);
    assert_eq!(host.state(0), (ZoneState::IMPLICITLY_OPENED, 8));
    assert_eq!(format(&host, ZONED_NSID, 1 | 1 << 9), Status::SUCCESS);
    assert_eq!(format(&host, NSID_ALL, 0), Status::SUCCESS);
    assert_eq!(namespace(&host, ZONED_NSID).format_index(), 0);
    host.must_work();
}

#[test]
fn images_list_the_formats_that_their_figures_allow() {
    let formats = |graph: &str| {
        let host = Host::over(&[(graph, NamespaceOptions::default())]);
        let namespace = namespace(&host, ZONED_NSID);
        let sizes = &namespace.lbaf[..=usize::from(namespace.nlbaf_z)];
        let sizes = sizes.iter().map(|format| 1 << format.lbads).collect::<Vec<u32>>();
        (sizes, 1 << namespace.format().lbads)
    };
    let other = |from: &str, to: &str| ZONED.replace(from, to);
    assert_eq!(
        formats(&other("block_size=512", "block_size=4096")),
        (vec![512, 4096], 4096)
    );
    // No host knows blocks of such a size, or the capacity, the longest append or a granule is not some of the others.
    assert_eq!(
        formats(&other("block_size=512", "block_size=8192")),
        (vec![8192], 8192)
    );
    assert_eq!(
        formats(&other("zone.capacity=768k", "zone.capacity=786944")),
        (vec![512], 512)
    );
    assert_eq!(
        formats(&other("max_append_bytes=64k", "max_append_bytes=66048")),
        (vec![512], 512)
    );
    assert_eq!(
        formats(&AREAS.replace("granularity=8k", "granularity=2k")),
        (vec![512], 512)
    );
}

#[test]
fn the_hosts_of_other_controllers_are_told_of_a_new_block_size() {
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    let device = open(&runtime, ZONED);
    let namespace = Namespace::new(device, &NamespaceOptions::default()).unwrap();
    let subsystem = Subsystem::new(names(), vec![namespace]).unwrap();
    let controller = || {
        let controller = Controller::new(&subsystem, ControllerOptions::default());
        assert_eq!(controller.configure(Cc::from_bits(ENABLE)), Change::Enable);
        controller.set_ready();
        (AdminQueue::new(&controller), controller)
    };
    let ((one, _one), (two, _two)) = (controller(), controller());
    let queues = host::Queues::default();
    let run = |admin: &AdminQueue, command| {
        let memory = Memory::new(Vec::new());
        let done = runtime.block_on(poll_once(admin.execute(&command, &memory, &queues)));
        done.map(|done| (done.status.status(), done.result, memory.received()))
    };
    let aer = || entry(AdminOpcode::ASYNC_EVENT_REQUEST.0, 0);
    for admin in [&one, &two] {
        let events = set_feature(FeatureId::ASYNC_EVENT_CONFIGURATION.0, 1 << 8);
        assert_eq!(run(admin, events).unwrap().0, Status::SUCCESS);
    }
    let formatted = |index: u32| {
        let mut command = entry(AdminOpcode::FORMAT_NVM.0, ZONED_NSID);
        command.cdw10 = index.into();
        assert_eq!(run(&one, command).unwrap().0, Status::SUCCESS);
    };
    formatted(0);
    assert!(run(&two, aer()).is_none(), "erased, but as it was");
    formatted(1);
    assert!(run(&one, aer()).is_none(), "its host knows");
    assert_eq!(run(&two, aer()).unwrap().1, 0x0004_0002);
    let (_, _, list) = run(&two, get_log(LogId::CHANGED_NAMESPACES.0, NSID_ALL, 4096)).unwrap();
    assert_eq!(list[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn changed_zones_are_listed_in_the_blocks_that_there_are_when_the_list_is_read() {
    let host = Host::new();
    host.set(ZoneOp::SetReadOnly, 3);
    assert_eq!(format(&host, ZONED_NSID, 1), Status::SUCCESS);
    let page = host.ask(get_log(LogId::CHANGED_ZONES.0, ZONED_NSID, 4096));
    let list = ChangedZoneList::read_from_bytes(&page).unwrap();
    assert_eq!((list.nrzid.get(), list.zid[0].get()), (1, 3 * ZONE));
    assert_eq!(format(&host, ZONED_NSID, 0), Status::SUCCESS);
    host.must_work();
}

/// Data that does not come before it is let.
struct Held {
    data: Vec<u8>,
    is_open: Cell<bool>,
}

impl Transfer for Held {
    async fn buffer(&self, _: &SubmissionEntry, _: Direction, len: usize) -> Result<IoBuf, Failure> {
        assert_eq!(len, self.data.len());
        poll_fn(|_| match self.is_open.get() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
        Ok(IoBuf::from_vec(self.data.clone()))
    }
}

/// What came of a command whose data came after the namespace was formatted to blocks of 4096 bytes.
fn overtaken(host: &Host, command: SubmissionEntry, data: Vec<u8>) -> Completion {
    assert_eq!(format(host, ZONED_NSID, 0), Status::SUCCESS);
    assert_eq!(host.write(ZONED_NSID, 0, 16), Status::SUCCESS);
    let held = Held {
        data,
        is_open: Cell::new(false),
    };
    let mut running = Box::pin(host.io.execute(&command, &held));
    assert!(host.runtime.block_on(poll_once(&mut running)).is_none());
    assert_eq!(format(host, ZONED_NSID, 1), Status::SUCCESS);
    held.is_open.set(true);
    host.runtime.block_on(running)
}

#[test]
fn a_command_that_waits_for_its_data_keeps_the_blocks_that_it_began_with() {
    let host = Host::with_areas();
    let compare = rw(Opcode::COMPARE.0, ZONED_NSID, 0, 16);
    let compared = overtaken(&host, compare, pattern(0, 16));
    assert_eq!(compared.status.status(), Status::COMPARE_FAILURE, "it was erased");

    // The first sixteen blocks of zone 0 to zone 2: neither other sources nor another zone.
    let mut copy = entry(Opcode::COPY.0, ZONED_NSID);
    copy.cdw10 = (2 * host::ZONE as u32).into();
    let mut range = CopyRange::new_zeroed();
    range.nlb_z = 15.into();
    let copied = overtaken(&host, copy, range.as_bytes().to_vec());
    assert!(copied.is_success(), "{copied:?}");
    assert_eq!(descriptor(&host, 2 * ZONE).wp.get(), 2 * ZONE + 2);

    let append = rw(ZonedOpcode::ZONE_APPEND.0, ZONED_NSID, host::ZONE, 8);
    let appended = overtaken(&host, append, pattern(0, 8));
    assert!(appended.is_success(), "{appended:?}");
    assert_eq!(descriptor(&host, ZONE).wp.get(), ZONE + 1);
    assert_eq!(host.read(ZONED_NSID, ZONE, 1), pattern(0, 8));
}
