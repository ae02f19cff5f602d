//! The admin queue: what is identified, features, logs, events, Format, and what is left to the transport.

mod host;

use std::pin::pin;
use std::task::{Context, Waker};

use host::{
    CAPACITY, ENABLE, Host, Memory, PLAIN, PLAIN_NSID, ZONE, ZONED, ZONED_NSID, ZONES, entry, get_feature,
    get_log, identify, pattern, poll_once, rw, set_feature,
};
use zbdkit_nvme::{
    AdminQueue, Change, Controller, ControllerOptions, Direction, IoQueue, Namespace, NamespaceError,
    NamespaceOptions, Subsystem, SubsystemError, SubsystemOptions,
};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::{AdminOpcode, IdentifyController};
use zbdkit_spec::nvme::command::NSID_ALL;
use zbdkit_spec::nvme::controller::{Cc, SHST_COMPLETE, SHST_OCCURRING};
use zbdkit_spec::nvme::feature::FeatureId;
use zbdkit_spec::nvme::log::{ErrorEntry, LogId, Smart};
use zbdkit_spec::nvme::nvm::{IdentifyNamespace, Opcode};
use zbdkit_spec::nvme::zns::{self, ChangedZoneList, NO_LIMIT, ZoneState};
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
    assert_eq!(data.oncs.get(), 0b1_1101_1101);
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
fn features_have_values_defaults_and_capabilities() {
    let host = Host::new();
    let get = |fid: FeatureId, select, value| host.tell(get_feature(fid.0, select, value), &[]);
    let set = |fid: FeatureId, value| host.tell(set_feature(fid.0, value), &[]).0;
    let cases = [
        (FeatureId::ARBITRATION, 0x7, 0x0101_0103),
        (FeatureId::POWER_MANAGEMENT, 0, 0x20),
        (FeatureId::VOLATILE_WRITE_CACHE, 1, 0),
        (FeatureId::INTERRUPT_COALESCING, 0, 0x0a05),
        (FeatureId::WRITE_ATOMICITY_NORMAL, 0, 1),
        (FeatureId::ASYNC_EVENT_CONFIGURATION, 0, 0x0800_0100),
        (FeatureId::KEEP_ALIVE_TIMER, 0, 5000),
        (FeatureId::TEMPERATURE_THRESHOLD, 343, 400),
    ];
    for (fid, default, other) in cases {
        assert_eq!(get(fid, 0, 0), (Status::SUCCESS, default), "{fid:?}");
        assert_eq!(
            get(fid, 3, 0),
            (Status::SUCCESS, 0b100),
            "{fid:?}: can be changed"
        );
        assert_eq!(set(fid, other), Status::SUCCESS, "{fid:?}");
        assert_eq!(get(fid, 0, 0), (Status::SUCCESS, other.into()), "{fid:?}");
        assert_eq!(get(fid, 1, 0), (Status::SUCCESS, default), "{fid:?}: the default");
        assert_eq!(
            get(fid, 2, 0),
            (Status::SUCCESS, default),
            "{fid:?}: nothing is saved"
        );
    }
    assert_eq!(get(FeatureId::ARBITRATION, 4, 0).0, Status::INVALID_FIELD);
    let mut save = set_feature(FeatureId::ARBITRATION.0, 0);
    save.cdw10 = (1 << 31 | 1).into();
    assert_eq!(host.tell(save, &[]).0, Status::FEATURE_IDENTIFIER_NOT_SAVEABLE);
    let mut named = set_feature(FeatureId::ARBITRATION.0, 0);
    named.nsid = 1.into();
    assert_eq!(host.tell(named, &[]).0, Status::FEATURE_NOT_NAMESPACE_SPECIFIC);
    for fid in [0, 0x03, 0x0c, 0x0d, 0x10, 0x17, 0x78, 0x80, 0x82, 0xff] {
        assert_eq!(
            host.tell(set_feature(fid, 0), &[]).0,
            Status::INVALID_FIELD,
            "{fid:#x}"
        );
        assert_eq!(
            host.tell(get_feature(fid, 0, 0), &[]).0,
            Status::INVALID_FIELD,
            "{fid:#x}"
        );
    }
    // Another power state, another sensor, another combination.
    assert_eq!(set(FeatureId::POWER_MANAGEMENT, 1), Status::INVALID_FIELD);
    assert_eq!(
        set(FeatureId::TEMPERATURE_THRESHOLD, 1 << 16),
        Status::INVALID_FIELD
    );
    assert_eq!(
        set(FeatureId::COMMAND_SET_PROFILE, 1),
        Status::COMMAND_SET_COMBINATION_REJECTED
    );
    assert_eq!(set(FeatureId::COMMAND_SET_PROFILE, 0), Status::SUCCESS);
    assert_eq!(
        get(FeatureId::INTERRUPT_VECTOR_CONFIGURATION, 0, 5),
        (Status::SUCCESS, 5)
    );
    assert_eq!(
        set(FeatureId::INTERRUPT_VECTOR_CONFIGURATION, 1 << 16 | 5),
        Status::SUCCESS
    );
    assert_eq!(
        get(FeatureId::INTERRUPT_VECTOR_CONFIGURATION, 0, 5),
        (Status::SUCCESS, 1 << 16 | 5)
    );
    assert_eq!(
        set(FeatureId::INTERRUPT_VECTOR_CONFIGURATION, 99),
        Status::INVALID_FIELD
    );
    host.controller.reset();
    assert_eq!(
        get(FeatureId::ARBITRATION, 0, 0).1,
        0x7,
        "a reset brings the defaults back"
    );
    host.must_work();
}

#[test]
fn error_recovery_is_each_namespaces_own() {
    let host = Host::new();
    let set = |nsid: u32, value| {
        let mut command = set_feature(FeatureId::ERROR_RECOVERY.0, value);
        command.nsid = nsid.into();
        host.tell(command, &[]).0
    };
    let get = |nsid: u32| {
        let mut command = get_feature(FeatureId::ERROR_RECOVERY.0, 0, 0);
        command.nsid = nsid.into();
        host.tell(command, &[])
    };
    assert_eq!(set(1, 7), Status::SUCCESS);
    assert_eq!((get(1).1, get(2).1), (7, 0));
    assert_eq!(set(NSID_ALL, 9), Status::SUCCESS);
    assert_eq!((get(1).1, get(2).1), (9, 9));
    assert_eq!(set(0, 9), INVALID_NAMESPACE);
    assert_eq!(get(NSID_ALL).0, INVALID_NAMESPACE);
    assert_eq!(
        set(1, 1 << 16),
        Status::INVALID_FIELD,
        "errors for deallocated blocks"
    );
    host.must_work();
}

#[test]
fn features_with_data_keep_it() {
    let host = Host::new();
    let get = |fid: FeatureId, value| host.ask(get_feature(fid.0, 0, value));
    let set = |fid: FeatureId, value, data: &[u8]| host.tell(set_feature(fid.0, value), data).0;
    let day = 86_400_000_u64;
    assert_eq!(
        set(FeatureId::TIMESTAMP, 0, &(day | 0xff << 56).to_le_bytes()),
        Status::SUCCESS
    );
    let now = get(FeatureId::TIMESTAMP, 0);
    assert_eq!((now.len(), now[6] >> 1 & 7), (8, 1), "set by the host");
    let mut milliseconds = [0; 8];
    milliseconds[..6].copy_from_slice(&now[..6]);
    assert!((day..2 * day).contains(&u64::from_le_bytes(milliseconds)));
    let id: Vec<u8> = (1..=16).collect();
    assert_eq!(set(FeatureId::HOST_IDENTIFIER, 1, &id), Status::SUCCESS);
    assert_eq!(get(FeatureId::HOST_IDENTIFIER, 1), id);
    assert_eq!(get(FeatureId::HOST_IDENTIFIER, 0), id[..8]);
    let mut behavior = vec![0; 512];
    behavior[0] = 1;
    assert_eq!(
        set(FeatureId::HOST_BEHAVIOR_SUPPORT, 0, &behavior),
        Status::SUCCESS
    );
    assert_eq!(get(FeatureId::HOST_BEHAVIOR_SUPPORT, 0), behavior);
    behavior[2] = 2;
    assert_eq!(
        set(FeatureId::HOST_BEHAVIOR_SUPPORT, 0, &behavior),
        Status::INVALID_FIELD
    );
    host.must_work();
}

#[test]
fn a_host_gets_no_more_queues_than_there_are_and_asks_before_it_makes_any() {
    let host = Host::new();
    let ask = |value| host.tell(set_feature(FeatureId::NUMBER_OF_QUEUES.0, value), &[]);
    assert_eq!(ask(0x0003_0001), (Status::SUCCESS, 0x0003_0001));
    assert_eq!(ask(0x00ff_00ff), (Status::SUCCESS, 0x000f_000f));
    assert_eq!(
        host.tell(get_feature(FeatureId::NUMBER_OF_QUEUES.0, 0, 0), &[]).1,
        0x000f_000f
    );
    assert_eq!(ask(0xffff).0, Status::INVALID_FIELD);
    assert_eq!(ask(0xffff_0000).0, Status::INVALID_FIELD);
    assert_eq!(
        host.tell(entry(AdminOpcode::CREATE_IO_CQ.0, 0), &[]).0,
        Status::SUCCESS
    );
    assert_eq!(ask(1).0, Status::COMMAND_SEQUENCE_ERROR);
    host.controller.reset();
    assert_eq!(ask(1), (Status::SUCCESS, 1));
    host.must_work();
}

#[test]
fn without_write_cache_writes_are_durable_at_once_and_nothing_else_changes() {
    let host = Host::new();
    assert_eq!(
        host.tell(set_feature(FeatureId::VOLATILE_WRITE_CACHE.0, 0), &[])
            .0,
        Status::SUCCESS
    );
    host.must_work();
    assert_eq!(
        host.tell(set_feature(FeatureId::VOLATILE_WRITE_CACHE.0, 1), &[])
            .0,
        Status::SUCCESS
    );
    for opcode in [Opcode::WRITE, Opcode::READ, Opcode::WRITE_ZEROES] {
        let mut command = rw(opcode.0, PLAIN_NSID, 0, 8);
        command.cdw12 = (7 | 1 << 30).into();
        assert_eq!(host.send(command, &[]), Status::SUCCESS, "{opcode:?} with FUA");
    }
    host.must_work();
}

#[test]
fn log_pages_are_as_long_as_they_are() {
    let host = Host::new();
    let lengths = [
        (0x00, 1024),
        (0x01, 4096),
        (0x02, 512),
        (0x03, 512),
        (0x04, 4096),
        (0x05, 4096),
        (0x12, 1024),
    ];
    for (lid, len) in lengths {
        let page = host.ask(get_log(lid, 0, len));
        assert_eq!(page.len(), len as usize);
        // More is zeros, a piece is a piece.
        let longer = host.ask(get_log(lid, 0, len + 64));
        assert!(
            longer[..len as usize] == page && longer[len as usize..] == [0; 64],
            "{lid:#x}"
        );
        let mut piece = get_log(lid, 0, 8);
        piece.cdw12 = 4.into();
        assert_eq!(host.ask(piece), page[4..12], "{lid:#x}");
        for offset in [len, 2, u32::MAX & !3] {
            piece.cdw12 = offset.into();
            assert_eq!(
                host.tell(piece, &[]).0,
                Status::INVALID_FIELD,
                "{lid:#x} at {offset}"
            );
        }
    }
    assert_eq!(host.tell(get_log(0x06, 0, 512), &[]).0, Status::INVALID_LOG_PAGE);
    assert_eq!(host.tell(get_log(0xc0, 0, 512), &[]).0, Status::INVALID_LOG_PAGE);
    let limit = host.controller.max_transfer() as u32;
    assert_eq!(
        host.tell(get_log(0x02, 0, limit + 4), &[]).0,
        Status::INVALID_FIELD
    );
    let mut everything = get_log(0x02, 0, 4);
    everything.cdw10 = 0xffff_0002_u32.into();
    everything.cdw11 = 0xffff.into();
    assert_eq!(host.tell(everything, &[]).0, Status::INVALID_FIELD);
    let mut by_index = get_log(0x02, 0, 4);
    by_index.cdw14 = (1 << 23).into();
    assert_eq!(host.tell(by_index, &[]).0, Status::INVALID_FIELD);
    let supported = host.ask(get_log(0, 0, 1024));
    let is_supported = |lid: usize| supported[lid * 4] & 1 == 1;
    for lid in 0..256 {
        let known = host.tell(get_log(lid as u8, 1, 512), &[]).0 != Status::INVALID_LOG_PAGE;
        assert_eq!(is_supported(lid), known, "{lid:#x}");
    }
    host.must_work();
}

#[test]
fn effects_list_exactly_the_commands_that_there_are() {
    let host = Host::new();
    for (csi, nsid) in [(0, PLAIN_NSID), (2, ZONED_NSID)] {
        let mut command = get_log(LogId::COMMANDS_SUPPORTED_AND_EFFECTS.0, 0, 4096);
        command.cdw14 = (csi << 24).into();
        let page = host.ask(command);
        for opcode in 0..=255_u8 {
            let supported = page[1024 + usize::from(opcode) * 4] & 1 == 1;
            let mut command = entry(opcode, nsid);
            command.cdw13 = 4.into();
            let known = host.send(command, &[]) != Status::INVALID_OPCODE;
            // Receive knows no action 4, which is reset to Send: both are no unknown opcode.
            assert_eq!(supported, known, "{csi} {opcode:#x}");
        }
    }
    let page = host.ask(get_log(LogId::COMMANDS_SUPPORTED_AND_EFFECTS.0, 0, 4096));
    for opcode in (0..=255).filter(|opcode| *opcode != AdminOpcode::ASYNC_EVENT_REQUEST.0) {
        let known = host.tell(entry(opcode, 0), &[]).0 != Status::INVALID_OPCODE;
        // This transport cannot delete completion queues.
        let expected = known || opcode == AdminOpcode::DELETE_IO_CQ.0;
        assert_eq!(page[usize::from(opcode) * 4] & 1 == 1, expected, "{opcode:#x}");
    }
    let mut unknown = get_log(LogId::COMMANDS_SUPPORTED_AND_EFFECTS.0, 0, 4096);
    unknown.cdw14 = (1 << 24).into();
    assert_eq!(host.tell(unknown, &[]).0, Status::INVALID_FIELD);
    host.must_work();
}

#[test]
fn health_counts_what_was_done_and_only_real_errors() {
    let host = Host::new();
    assert_eq!(host.write(PLAIN_NSID, 0, 2000), Status::SUCCESS);
    assert_eq!(host.read(PLAIN_NSID, 0, 8).len(), 4096);
    assert_eq!(host.append(0, 8).0, Status::SUCCESS);
    // In vain, but nothing is wrong with the device.
    assert_eq!(host.write(ZONED_NSID, 0, 8), Status::ZONE_INVALID_WRITE);
    assert_eq!(host.tell(get_log(0xc0, 0, 512), &[]).0, Status::INVALID_LOG_PAGE);
    let smart = |nsid| Smart::read_from_bytes(&host.ask(get_log(2, nsid, 512))).unwrap();
    let health = smart(NSID_ALL);
    assert_eq!(
        (health.host_writes.get(), health.data_units_written.get()),
        (2, 3)
    );
    assert_eq!((health.host_reads.get(), health.data_units_read.get()), (1, 1));
    assert_eq!(
        (
            health.critical_warning,
            health.available_spare,
            health.percentage_used
        ),
        (0, 100, 0)
    );
    assert_eq!((health.media_errors.get(), health.error_entries.get()), (0, 0));
    assert_eq!(
        host.tell(get_log(2, 1, 512), &[]).0,
        Status::INVALID_FIELD,
        "no log of a namespace"
    );
    let mut command = rw(Opcode::READ.0, PLAIN_NSID, 5, 8);
    command.cid = 77.into();
    host.io(&command, &Memory::failing(Status::DATA_TRANSFER_ERROR.into()));
    let errors = host.ask(get_log(1, 0, 4096));
    let error = ErrorEntry::read_from_bytes(&errors[..64]).unwrap();
    assert_eq!(
        (error.error_count.get(), error.sqid.get(), error.cid.get()),
        (1, 1, 77)
    );
    assert_eq!(
        (error.lba.get(), error.nsid.get(), error.opcode),
        (5, PLAIN_NSID, 2)
    );
    assert_eq!(error.status.get() >> 1, Status::DATA_TRANSFER_ERROR.0);
    assert!(errors[64..] == [0; 4096 - 64]);
    assert_eq!(
        (smart(0).error_entries.get(), smart(0).media_errors.get()),
        (1, 0)
    );
    host.must_work();
}

#[test]
fn the_error_log_keeps_the_newest() {
    let host = Host::new();
    for cid in 0..100 {
        let mut command = rw(Opcode::READ.0, PLAIN_NSID, 0, 8);
        command.cid = cid.into();
        host.io(&command, &Memory::failing(Status::DATA_TRANSFER_ERROR.into()));
    }
    let errors = host.ask(get_log(1, 0, 4096));
    let counts = errors
        .chunks_exact(64)
        .map(|entry| ErrorEntry::read_from_bytes(entry).unwrap().error_count.get());
    assert!(counts.eq((37..=100).rev()));
    host.must_work();
}

#[test]
fn a_host_is_told_of_zones_that_change_by_themselves() {
    let host = Host::new();
    let aer = entry(AdminOpcode::ASYNC_EVENT_REQUEST.0, 0);
    let memory = Memory::new(Vec::new());
    let events = set_feature(FeatureId::ASYNC_EVENT_CONFIGURATION.0, 1 << 27);
    assert_eq!(host.tell(events, &[]).0, Status::SUCCESS);
    let mut request = Box::pin(host.admin.execute(&aer, &memory, &host.queues));
    assert!(host.runtime.block_on(poll_once(&mut request)).is_none());
    host.subsystem.zone_changed(ZONED_NSID, 3 * ZONE * 512);
    let told = host.runtime.block_on(request);
    assert_eq!((told.is_success(), told.result), (true, 1 << 32 | 0x00bf_ef02));
    let list = |rae: u32| {
        let mut command = get_log(LogId::CHANGED_ZONES.0, ZONED_NSID, 4096);
        command.cdw10 = (command.cdw10.get() | rae << 15).into();
        ChangedZoneList::read_from_bytes(&host.ask(command)).unwrap()
    };
    assert_eq!((list(1).nrzid.get(), list(1).zid[0].get()), (1, 3 * ZONE));
    assert_eq!(list(0).nrzid.get(), 1);
    assert_eq!(list(0).nrzid.get(), 0);
    for start in 0..600 {
        host.subsystem.zone_changed(ZONED_NSID, start * 512);
    }
    assert_eq!(
        (list(1).nrzid.get(), list(0).zid[0].get()),
        (u16::MAX, 0),
        "too many to list"
    );
    let page = |nsid| host.tell(get_log(LogId::CHANGED_ZONES.0, nsid, 4096), &[]).0;
    assert_eq!(page(PLAIN_NSID), Status::INVALID_LOG_PAGE);
    assert_eq!(page(NSID_ALL), INVALID_NAMESPACE);
    host.must_work();
}

#[test]
fn event_requests_end_with_an_abort_or_with_the_controller() {
    let host = Host::new();
    let memory = Memory::new(Vec::new());
    let requests: Vec<_> = (0..5)
        .map(|cid| {
            let mut command = entry(AdminOpcode::ASYNC_EVENT_REQUEST.0, 0);
            command.cid = cid.into();
            command
        })
        .collect();
    let mut waiting: Vec<_> = requests
        .iter()
        .map(|aer| Box::pin(host.admin.execute(aer, &memory, &host.queues)))
        .collect();
    let last = host.runtime.block_on(async {
        for request in &mut waiting[..4] {
            assert!(poll_once(request).await.is_none());
        }
        poll_once(&mut waiting[4]).await.unwrap()
    });
    assert_eq!(last.status.status(), Status::ASYNC_EVENT_REQUEST_LIMIT_EXCEEDED);
    let mut abort = entry(AdminOpcode::ABORT.0, 0);
    abort.cdw10 = (2 << 16).into();
    assert_eq!(host.tell(abort, &[]), (Status::SUCCESS, 0));
    let mut status = |at: usize| host.runtime.block_on(&mut waiting[at]).status.status();
    assert_eq!(status(2), Status::ABORT_REQUESTED);
    assert_eq!(
        host.controller.configure(Cc::from_bits(ENABLE & !1)),
        Change::Disable
    );
    assert_eq!(status(0), Status::ABORTED_SQ_DELETION);
    drop(waiting);
    host.controller.reset();
    Host::must_work(&host);
}

#[test]
fn a_temperature_threshold_below_what_it_is_warns() {
    let host = Host::new();
    let aer = entry(AdminOpcode::ASYNC_EVENT_REQUEST.0, 0);
    let memory = Memory::new(Vec::new());
    host.tell(set_feature(FeatureId::ASYNC_EVENT_CONFIGURATION.0, 2), &[]);
    let mut request = pin!(host.admin.execute(&aer, &memory, &host.queues));
    assert!(
        request
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
            .is_pending()
    );
    host.tell(set_feature(FeatureId::TEMPERATURE_THRESHOLD.0, 300), &[]);
    assert_eq!(host.runtime.block_on(request).result, 0x0002_0101);
    assert_eq!(host.ask(get_log(2, 0, 512))[0], 2);
    host.tell(set_feature(FeatureId::TEMPERATURE_THRESHOLD.0, 343), &[]);
    assert_eq!(host.ask(get_log(2, 0, 512))[0], 0);
    host.must_work();
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
    host.must_work();
}

#[test]
fn keep_alives_are_counted_and_their_timeout_is_told() {
    let host = Host::new();
    assert_eq!(host.controller.keep_alive_timeout(), None);
    host.tell(set_feature(FeatureId::KEEP_ALIVE_TIMER.0, 1500), &[]);
    assert_eq!(host.controller.keep_alive_timeout().unwrap().as_millis(), 1500);
    assert_eq!(
        host.tell(entry(AdminOpcode::KEEP_ALIVE.0, 0), &[]).0,
        Status::SUCCESS
    );
    assert_eq!(host.controller.keep_alives(), 1);
    host.must_work();
}

#[test]
fn a_controller_is_enabled_disabled_and_shut_down_by_cc() {
    let host = Host::new();
    let controller = &host.controller;
    assert!(controller.status().rdy());
    assert_eq!(host.write(ZONED_NSID, 0, 8), Status::SUCCESS);
    assert_eq!(
        controller.configure(Cc::from_bits(ENABLE | 1 << 14)),
        Change::Shutdown
    );
    assert_eq!(controller.status().shst(), SHST_OCCURRING);
    host.runtime.block_on(controller.shut_down());
    assert_eq!(controller.status().shst(), SHST_COMPLETE);
    assert_eq!(host.state(0), (ZoneState::CLOSED, 8), "a shutdown closes zones");
    assert_eq!(
        controller.configure(Cc::from_bits(ENABLE | 1 << 14)),
        Change::Nothing
    );
    assert_eq!(controller.configure(Cc::new()), Change::Disable);
    controller.reset();
    assert_eq!(controller.status().into_bits(), 0);
    // A page size, a command set, an arbitration and entry sizes that there are not.
    for wrong in [1 << 7, 1 << 4, 1 << 11, 1 << 16, 1 << 20] {
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
    let open = |graph| host::open(&host.runtime, graph);
    let namespace = |graph| Namespace::new(open(graph), &NamespaceOptions::default()).err();
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
