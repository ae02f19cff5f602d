//! Log pages, and the events that point to them.

mod host;

use std::pin::pin;
use std::task::{Context, Waker};

use host::{ENABLE, Host, Memory, PLAIN_NSID, ZONE, ZONED_NSID, entry, get_log, poll_once, rw, set_feature};
use zbdkit_block::ZoneOp;
use zbdkit_nvme::Change;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::AdminOpcode;
use zbdkit_spec::nvme::command::NSID_ALL;
use zbdkit_spec::nvme::controller::Cc;
use zbdkit_spec::nvme::feature::FeatureId;
use zbdkit_spec::nvme::log::{ErrorEntry, LogId, Smart};
use zbdkit_spec::nvme::nvm::Opcode;
use zbdkit_spec::nvme::zns::{ChangedZoneList, SendAction};
use zerocopy::FromBytes;

const INVALID_NAMESPACE: Status = Status::INVALID_NAMESPACE_OR_FORMAT;

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
        (0x13, 4096),
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
        for offset in [len, 2, !3] {
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
    host.set(ZoneOp::SetReadOnly, 3);
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
fn a_list_that_was_not_delivered_is_kept_with_its_event() {
    let host = Host::new();
    let memory = Memory::new(Vec::new());
    let events = set_feature(FeatureId::ASYNC_EVENT_CONFIGURATION.0, 1 << 8 | 1 << 27);
    assert_eq!(host.tell(events, &[]).0, Status::SUCCESS);
    let event = || {
        let aer = entry(AdminOpcode::ASYNC_EVENT_REQUEST.0, 0);
        host.runtime
            .block_on(poll_once(host.admin.execute(&aer, &memory, &host.queues)))
    };
    for (lid, nsid) in [
        (LogId::CHANGED_ZONES, ZONED_NSID),
        (LogId::CHANGED_NAMESPACES, NSID_ALL),
    ] {
        let change = || match lid {
            LogId::CHANGED_ZONES => host.subsystem.zone_changed(ZONED_NSID, ZONE * 512),
            _ => host.subsystem.namespace_changed(PLAIN_NSID),
        };
        change();
        assert!(event().is_some(), "{lid:?}");
        let command = get_log(lid.0, nsid, 4096);
        let mut past = command;
        past.cdw12 = 4096.into();
        assert_eq!(host.tell(past, &[]).0, Status::INVALID_FIELD);
        let nowhere = Memory::failing(Status::DATA_TRANSFER_ERROR.into());
        let lost = host.admin(&command, &nowhere).status.status();
        assert_eq!(lost, Status::DATA_TRANSFER_ERROR);
        // What is told already is not told again before it is read.
        change();
        assert!(event().is_none(), "{lid:?}");
        assert!(host.ask(command) != [0; 4096], "{lid:?}: it is still there");
        assert_eq!(host.ask(command), [0; 4096], "{lid:?}: it was read");
    }
    host.must_work();
}

#[test]
fn a_host_is_not_told_of_what_it_does_itself() {
    let host = Host::new();
    let events = set_feature(FeatureId::ASYNC_EVENT_CONFIGURATION.0, 1 << 27);
    assert_eq!(host.tell(events, &[]).0, Status::SUCCESS);
    let changed = || {
        let page = host.ask(get_log(LogId::CHANGED_ZONES.0, ZONED_NSID, 4096));
        let list = ChangedZoneList::read_from_bytes(&page).unwrap();
        let count = usize::from(list.nrzid.get());
        list.zid[..count]
            .iter()
            .map(|zid| zid.get() / ZONE)
            .collect::<Vec<_>>()
    };
    for zone in [2, 5, 6] {
        host.set(ZoneOp::SetReadOnly, zone);
    }
    assert_eq!(changed(), [2, 5, 6]);
    assert_eq!(host.zone(SendAction::OFFLINE, 5 * ZONE), Status::SUCCESS);
    assert_eq!(host.all_zones(SendAction::OFFLINE), Status::SUCCESS);
    assert_eq!(changed(), [0; 0], "the host took them offline");
    host.set(ZoneOp::SetNormal, 5);
    host.set(ZoneOp::SetOffline, 5);
    assert_eq!(changed(), [5], "the operator did");
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
