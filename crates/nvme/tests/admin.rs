//! The admin queue: what is identified, Format, what is left to the transport, and the controller's own state.

mod host;

use host::{
    CAPACITY, ENABLE, Host, Memory, PLAIN, PLAIN_NSID, ZONE, ZONED, ZONED_NSID, ZONES, entry, identify,
    pattern, rw,
};
use zbdkit_block::ZoneOp;
use zbdkit_nvme::{
    AdminQueue, Change, Controller, ControllerOptions, Direction, IoQueue, Namespace, NamespaceError,
    NamespaceOptions, Subsystem, SubsystemError, SubsystemOptions,
};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::{AdminOpcode, IdentifyController};
use zbdkit_spec::nvme::command::NSID_ALL;
use zbdkit_spec::nvme::controller::{Cc, SHST_COMPLETE, SHST_OCCURRING};
use zbdkit_spec::nvme::nvm::{IdentifyNamespace, Opcode};
use zbdkit_spec::nvme::zns::{self, NO_LIMIT, SendAction, ZoneState};
use zerocopy::FromBytes;

const INVALID_NAMESPACE: Status = Status::INVALID_NAMESPACE_OR_FORMAT;

#[test]
fn the_controller_says_what_it_is() {
    let host = Host::new();
    let memory = Memory::new(Vec::new());
    assert!(host.admin(&identify(1, 0, 0), &memory).is_success());
    assert_eq!(memory.asked.get(), Some((Direction::ControllerToHost, 4096)));
    let data = IdentifyController::read_from_bytes(&memory.received()).unwrap();
    assert_eq!(&data.sn, b"serial              ");
    assert_eq!(&data.fr, b"1.0     ");
    assert_eq!((data.nn.get(), data.mdts, data.ver.get()), (2, 8, 0x2_0100));
    assert_eq!(
        (data.sqes, data.cqes, data.vwc, data.cntrltype),
        (0x66, 0x44, 7, 1)
    );
    assert_eq!(&data.subnqn[..30], b"nqn.2026-11.org.example:test\0\0");
    // Everything that is claimed there is below: Format, no doorbell buffers, no namespace management.
    assert_eq!(data.oacs.get(), 1 << 1);
    assert_eq!(data.oncs.get(), 0b1_1101_1111);
    assert_eq!(data.oaes.get(), 1 << 8 | 1 << 27);
    host.must_work();
}

#[test]
fn namespaces_say_what_they_are() {
    let host = Host::new();
    let plain = IdentifyNamespace::read_from_bytes(&host.ask(identify(0, PLAIN_NSID, 0))).unwrap();
    assert_eq!(
        (plain.nsze.get(), plain.format().lbads, plain.nlbaf_z),
        (16384, 9, 0)
    );
    assert_eq!((plain.mc, plain.dps, plain.format().ms.get()), (0, 0, 0));
    let zoned = IdentifyNamespace::read_from_bytes(&host.ask(identify(0, ZONED_NSID, 0))).unwrap();
    assert_eq!(zoned.nsze.get(), ZONES * ZONE);
    let zoned = zns::IdentifyNamespace::read_from_bytes(&host.ask(identify(5, ZONED_NSID, 2))).unwrap();
    assert_eq!((zoned.mor_z.get(), zoned.mar_z.get()), (2, 3));
    assert_eq!((zoned.lbafe[0].zsze.get(), zoned.lbafe[0].zdes), (ZONE, 0));
    assert_eq!(
        (zoned.ozcs.get(), zoned.zoc.get(), zoned.numzrwa.get()),
        (0, 0, 0)
    );
    // The NVM command set has nothing to say of either.
    assert!(host.ask(identify(5, ZONED_NSID, 0)) == [0; 4096]);
    assert_eq!(
        host.tell(identify(5, PLAIN_NSID, 2), &[]).0,
        Status::INVALID_FIELD
    );
    assert_eq!(
        host.tell(identify(5, PLAIN_NSID, 1), &[]).0,
        Status::INVALID_FIELD
    );
    // 64 KiB of appends are 16 pages.
    assert_eq!(host.ask(identify(6, 0, 2))[0], 4);
    assert!(host.ask(identify(6, 0, 0)) == [0; 4096]);
    assert_eq!(host.tell(identify(6, 0, 1), &[]).0, Status::INVALID_FIELD);
    // Ready.
    assert_eq!(host.ask(identify(8, ZONED_NSID, 0))[14], 1);
    for cns in [0, 5, 8, 0x11, 0x12, 0x1b, 3] {
        for nsid in [0, 3, NSID_ALL] {
            assert_eq!(
                host.tell(identify(cns, nsid, 2), &[]).0,
                INVALID_NAMESPACE,
                "{cns:#x} {nsid}"
            );
        }
    }
    assert!(host.ask(identify(0x11, ZONED_NSID, 0)) == host.ask(identify(0, ZONED_NSID, 0)));
    host.must_work();
}

#[test]
fn a_namespace_without_limits_and_with_reads_across_zones_says_so() {
    let graph = "driver=zoned,file.driver=memory,file.size=8M,zone.size=1M,zone.max_append_bytes=1M";
    let options = NamespaceOptions {
        read_across_zones: true,
        ..NamespaceOptions::default()
    };
    let host = Host::over(&[(graph, options)]);
    let zoned = zns::IdentifyNamespace::read_from_bytes(&host.ask(identify(5, 1, 2))).unwrap();
    assert_eq!((zoned.mor_z.get(), zoned.mar_z.get()), (NO_LIMIT, NO_LIMIT));
    assert_eq!(zoned.ozcs.get(), 1);
    assert_eq!(host.ask(identify(6, 0, 2))[0], 0, "as long as any transfer");
}

#[test]
fn lists_of_namespaces_start_behind_the_one_named() {
    let host = Host::new();
    let ids = |cns, after, csi| -> Vec<u32> {
        let page = host.ask(identify(cns, after, csi));
        let (ids, _) = page.as_chunks::<4>();
        ids.iter()
            .map(|id| u32::from_le_bytes(*id))
            .take_while(|id| *id != 0)
            .collect()
    };
    for cns in [2, 0x10] {
        assert_eq!(ids(cns, 0, 0), [1, 2]);
        assert_eq!(ids(cns, 1, 0), [2]);
        assert_eq!(ids(cns, 2, 0), [0; 0]);
        assert_eq!(
            host.tell(identify(cns, NSID_ALL - 1, 0), &[]).0,
            INVALID_NAMESPACE
        );
    }
    for cns in [7, 0x1a] {
        assert_eq!(ids(cns, 0, 0), [PLAIN_NSID]);
        assert_eq!(ids(cns, 0, 2), [ZONED_NSID]);
        assert_eq!(host.tell(identify(cns, 0, 1), &[]).0, Status::INVALID_FIELD);
    }
    host.must_work();
}

#[test]
fn namespaces_keep_their_identifiers() {
    let uuid = |host: &Host, nsid| host.ask(identify(3, nsid, 0))[..25].to_vec();
    let host = Host::new();
    let first = uuid(&host, 1);
    assert_eq!(first[..4], [3, 16, 0, 0]);
    assert_eq!(first[20..25], [4, 1, 0, 0, 2], "the command set");
    assert_ne!(first, uuid(&host, 2));
    host.must_work();
    drop(host);
    assert_eq!(uuid(&Host::new(), 1), first, "made of names, not of chance");
}

#[test]
fn controllers_of_a_subsystem_are_listed() {
    let host = Host::new();
    let list = |cntid: u16, cns, nsid| {
        let mut command = identify(cns, nsid, 0);
        command.cdw10 = (u32::from(cntid) << 16 | u32::from(cns)).into();
        host.ask(command)[..6].to_vec()
    };
    assert_eq!(list(0, 0x13, 0), [1, 0, 0, 0, 0, 0]);
    let second = Controller::new(&host.subsystem, ControllerOptions::default());
    assert_eq!(second.id(), 1);
    assert_eq!(list(0, 0x13, 0), [2, 0, 0, 0, 1, 0]);
    assert_eq!(list(1, 0x12, 1), [1, 0, 1, 0, 0, 0]);
    drop(second);
    assert_eq!(list(0, 0x13, 0), [1, 0, 0, 0, 0, 0]);
    // The NVM command set and zoned namespaces.
    assert_eq!(list(u16::MAX, 0x1c, 0), [5, 0, 0, 0, 0, 0]);
    assert_eq!(list(0, 0x1c, 0), [5, 0, 0, 0, 0, 0]);
    let mut other = identify(0x1c, 0, 0);
    other.cdw10 = (7 << 16 | 0x1c).into();
    assert_eq!(host.tell(other, &[]).0, Status::INVALID_FIELD);
    host.must_work();
}

#[test]
fn what_is_not_claimed_is_refused() {
    let host = Host::new();
    for cns in [0x04, 0x09, 0x0a, 0x14, 0x15, 0x16, 0x18, 0x1d, 0x1f, 0xff] {
        assert_eq!(
            host.tell(identify(cns, 1, 0), &[]).0,
            Status::INVALID_FIELD,
            "{cns:#x}"
        );
    }
    for opcode in [
        AdminOpcode::NAMESPACE_MANAGEMENT,
        AdminOpcode::NAMESPACE_ATTACHMENT,
        AdminOpcode::FIRMWARE_COMMIT,
        AdminOpcode::FIRMWARE_DOWNLOAD,
        AdminOpcode::DEVICE_SELF_TEST,
        AdminOpcode::DIRECTIVE_SEND,
        AdminOpcode::DIRECTIVE_RECEIVE,
        AdminOpcode::SECURITY_SEND,
        AdminOpcode::SECURITY_RECEIVE,
        AdminOpcode::SANITIZE,
        AdminOpcode::DOORBELL_BUFFER_CONFIG,
        AdminOpcode(0x7f),
        AdminOpcode(0xff),
    ] {
        assert_eq!(
            host.tell(entry(opcode.0, 1), &[]).0,
            Status::INVALID_OPCODE,
            "{opcode:?}"
        );
    }
    host.must_work();
}

#[test]
fn queues_and_doorbells_are_the_transports() {
    let options = ControllerOptions {
        doorbell_buffers: true,
        ..ControllerOptions::default()
    };
    let host = Host::with(&[(PLAIN, NamespaceOptions::default())], options, ENABLE);
    let mut create = entry(AdminOpcode::CREATE_IO_CQ.0, 0);
    create.cdw10 = 0xffff_0001_u32.into();
    create.cdw11 = 0x0002_0003.into();
    create.prp1 = 0x1000.into();
    assert_eq!(host.tell(create, &[]).0, Status::SUCCESS);
    create.opcode = AdminOpcode::CREATE_IO_SQ.0;
    assert_eq!(host.tell(create, &[]).0, Status::SUCCESS);
    assert_eq!(
        host.tell(entry(AdminOpcode::DELETE_IO_SQ.0, 0), &[]).0,
        Status::INVALID_QUEUE_IDENTIFIER
    );
    assert_eq!(
        host.tell(entry(AdminOpcode::DELETE_IO_CQ.0, 0), &[]).0,
        Status::INVALID_OPCODE
    );
    let mut doorbells = entry(AdminOpcode::DOORBELL_BUFFER_CONFIG.0, 0);
    doorbells.prp1 = 0x2000.into();
    doorbells.prp2 = 0x3000.into();
    assert_eq!(host.tell(doorbells, &[]).0, Status::SUCCESS);
    assert_eq!(
        *host.queues.calls.borrow(),
        [
            "CreateCq { qid: 1, entries: 65536, prp1: 4096, contiguous: true, vector: Some(2) }",
            "CreateSq { qid: 1, entries: 65536, prp1: 4096, contiguous: true, cqid: 2 }",
            "delete 0",
            "0x2000 0x3000",
        ]
    );
    // Not aborted.
    assert_eq!(
        host.tell(entry(AdminOpcode::ABORT.0, 0), &[]),
        (Status::SUCCESS, 1)
    );
}

#[test]
fn format_erases_and_keeps_the_format() {
    let host = Host::new();
    let format = |nsid, cdw10: u32| {
        let mut command = entry(AdminOpcode::FORMAT_NVM.0, nsid);
        command.cdw10 = cdw10.into();
        host.tell(command, &[]).0
    };
    let write = || {
        assert_eq!(host.write(PLAIN_NSID, 0, 8), Status::SUCCESS);
        assert_eq!(host.write(ZONED_NSID, 0, CAPACITY), Status::SUCCESS);
    };
    let is_erased = |nsid| host.read(nsid, 0, 8) == vec![0; 4096];
    write();
    // Other formats, metadata, protection information, cryptographic erase, nobody's namespace.
    for cdw10 in [1, 15, 1 << 12, 1 << 4, 1 << 5] {
        assert_eq!(format(PLAIN_NSID, cdw10), Status::INVALID_FORMAT, "{cdw10:#x}");
    }
    for ses in [2, 3, 7] {
        assert_eq!(format(PLAIN_NSID, ses << 9), Status::INVALID_FIELD);
    }
    for nsid in [0, 3] {
        assert_eq!(format(nsid, 0), INVALID_NAMESPACE);
    }
    assert!(!is_erased(PLAIN_NSID) && !is_erased(ZONED_NSID));
    assert_eq!(format(ZONED_NSID, 1 << 9), Status::SUCCESS);
    assert_eq!(host.state(0), (ZoneState::EMPTY, 0));
    assert!(is_erased(ZONED_NSID) && !is_erased(PLAIN_NSID));
    assert_eq!(format(PLAIN_NSID, 0), Status::SUCCESS);
    assert!(is_erased(PLAIN_NSID));
    write();
    assert_eq!(format(NSID_ALL, 0), Status::SUCCESS);
    assert!(is_erased(PLAIN_NSID) && is_erased(ZONED_NSID));
    host.set(ZoneOp::SetReadOnly, 5);
    assert_eq!(format(ZONED_NSID, 0), Status::SUCCESS);
    assert_eq!(host.state(5).0, ZoneState::OFFLINE, "zones are empty or offline");
    host.must_work();
}

#[test]
fn a_controller_is_enabled_disabled_and_shut_down_by_cc() {
    let host = Host::new();
    let controller = &host.controller;
    assert!(controller.status().rdy());
    assert_eq!(host.write(ZONED_NSID, 0, 8), Status::SUCCESS);
    for zone in [1, 2] {
        assert_eq!(host.zone(SendAction::OPEN, zone * ZONE), Status::SUCCESS);
    }
    assert_eq!(host.zone(SendAction::CLOSE, 2 * ZONE), Status::SUCCESS);
    assert_eq!(
        controller.configure(Cc::from_bits(ENABLE | 1 << 14)),
        Change::Shutdown
    );
    assert_eq!(controller.status().shst(), SHST_OCCURRING);
    host.runtime.block_on(controller.shut_down());
    assert_eq!(controller.status().shst(), SHST_COMPLETE);
    assert_eq!(host.state(0), (ZoneState::CLOSED, 8), "a shutdown closes zones");
    assert_eq!(
        (host.state(1).0, host.state(2).0),
        (ZoneState::EMPTY, ZoneState::EMPTY)
    );
    assert_eq!(
        controller.configure(Cc::from_bits(ENABLE | 1 << 14)),
        Change::Nothing
    );
    assert_eq!(controller.configure(Cc::new()), Change::Disable);
    controller.reset();
    assert_eq!(controller.status().into_bits(), 0);
    // A page size, a command set, an arbitration and entry sizes that there are not.
    for wrong in [1 << 7, 1 << 5, 1 << 11, 1 << 16, 1 << 20] {
        assert_eq!(
            controller.configure(Cc::from_bits(ENABLE ^ wrong)),
            Change::Nothing,
            "{wrong:#x}"
        );
        assert!(controller.status().cfs(), "{wrong:#x}");
        assert_eq!(controller.configure(Cc::new()), Change::Disable);
        controller.reset();
        assert!(!controller.status().cfs());
    }
    assert_eq!(controller.configure(Cc::from_bits(ENABLE)), Change::Enable);
    host.must_work();
}

#[test]
fn a_shutdown_closes_zones_however_many_are_open() {
    let host = Host::new();
    assert_eq!(host.zone(SendAction::OPEN, 0), Status::SUCCESS);
    assert_eq!(host.zone(SendAction::CLOSE, 0), Status::SUCCESS);
    // As many as can be.
    for zone in 1..4 {
        assert_eq!(host.zone(SendAction::OPEN, zone * ZONE), Status::SUCCESS);
    }
    host.runtime.block_on(host.controller.shut_down());
    assert!((0..4).all(|zone| host.state(zone).0 == ZoneState::EMPTY));
    host.must_work();
}

#[test]
fn controllers_share_their_namespaces() {
    let host = Host::new();
    let options = ControllerOptions {
        shared: true,
        ..ControllerOptions::default()
    };
    let second = Controller::new(&host.subsystem, options);
    let _ = second.configure(Cc::from_bits(ENABLE));
    assert_eq!(host.write(ZONED_NSID, 0, 8), Status::SUCCESS);
    let memory = Memory::new(Vec::new());
    let queue = IoQueue::new(&second, 1, 8);
    let completion = host
        .runtime
        .block_on(queue.execute(&rw(Opcode::READ.0, ZONED_NSID, 0, 8), &memory));
    assert!(completion.is_success() && memory.received() == pattern(0, 8));
    // What the other has open stays open.
    host.runtime.block_on(second.shut_down());
    assert_eq!(host.state(0), (ZoneState::IMPLICITLY_OPENED, 8));
    let admin = AdminQueue::new(&second);
    let memory = Memory::new(Vec::new());
    host.runtime
        .block_on(admin.execute(&identify(0, 1, 0), &memory, &host.queues));
    assert_eq!(memory.received()[30], 1);
    host.must_work();
}

#[test]
fn what_cannot_be_a_namespace_or_a_subsystem_is_refused_with_the_reason() {
    let host = Host::new();
    let namespace =
        |graph: &str| Namespace::new(host::open(&host.runtime, graph), &NamespaceOptions::default()).err();
    let zoned = "driver=zoned,file.driver=memory,file.size=8M,zone.size=1M";
    assert_eq!(
        namespace(&format!("{zoned},zone.mode=host-aware")),
        Some(NamespaceError::HostAware)
    );
    let conventional = format!("{zoned},zone.conventional_zones=2");
    assert_eq!(namespace(&conventional), Some(NamespaceError::Conventional(2)));
    let short = format!("{zoned},zone.max_append_bytes=4k");
    assert_eq!(namespace(&short), Some(NamespaceError::AppendLimit(4096)));
    assert_eq!(namespace(ZONED), None);
    let subsystem = |options| Subsystem::new(options, Vec::new()).err().unwrap();
    assert_eq!(subsystem(host::names()), SubsystemError::Namespaces(0));
    let long = SubsystemOptions {
        serial: "x".repeat(21),
        ..host::names()
    };
    assert!(matches!(subsystem(long), SubsystemError::Name { max: 20, .. }));
    let unprintable = SubsystemOptions {
        model: "é".into(),
        ..host::names()
    };
    assert!(matches!(
        subsystem(unprintable),
        SubsystemError::Name { max: 40, .. }
    ));
    host.must_work();
}

#[test]
fn two_namespaces_with_the_same_uuid_are_refused() {
    let host = Host::new();
    let (mine, other) = (uuid::Uuid::from_u128(7), uuid::Uuid::from_u128(8));
    let subsystem = |uuids: [Option<uuid::Uuid>; 3]| {
        let namespaces = uuids.map(|uuid| {
            let options = NamespaceOptions {
                uuid,
                ..NamespaceOptions::default()
            };
            Namespace::new(host::open(&host.runtime, host::PLAIN), &options).unwrap()
        });
        Subsystem::new(host::names(), namespaces.into()).err()
    };
    assert_eq!(subsystem([Some(mine), None, Some(other)]), None);
    assert_eq!(subsystem([None, None, None]), None);
    let same = SubsystemError::SameUuid {
        first: 1,
        second: 3,
        uuid: mine,
    };
    assert_eq!(subsystem([Some(mine), None, Some(mine)]), Some(same));
    host.must_work();
}
