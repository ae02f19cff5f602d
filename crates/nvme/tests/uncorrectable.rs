//! Write Uncorrectable (NVM Command Set 1.1, 3.3.7): blocks whose reads fail until they are written again.

mod host;

use host::{
    BLOCK, CAPACITY, Host, Memory, PLAIN, PLAIN_NSID, ZONE, ZONED, ZONED_NSID, entry, get_log, identify,
    pattern, rw,
};
use zbdkit_nvme::NamespaceOptions;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::log::{ErrorEntry, LogId, Smart};
use zbdkit_spec::nvme::nvm::{CopyRange, DsmRange, Opcode};
use zbdkit_spec::nvme::zns::SendAction;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

fn mark(host: &Host, nsid: u32, lba: u64, count: u64) -> Status {
    host.send(rw(Opcode::WRITE_UNCORRECTABLE.0, nsid, lba, count), &[])
}

fn status(host: &Host, opcode: Opcode, nsid: u32, lba: u64, count: u64) -> Status {
    let data = vec![0; count as usize * BLOCK];
    let completion = host.io(&rw(opcode.0, nsid, lba, count), &Memory::new(data));
    let status = completion.status.status();
    // A host that tried again would find the same.
    assert_eq!(completion.status.dnr(), status != Status::SUCCESS);
    status
}

#[test]
fn whatever_reads_marked_blocks_fails_until_they_are_written() {
    let host = Host::new();
    assert_eq!(host.write(PLAIN_NSID, 0, 64), Status::SUCCESS);
    assert_eq!(mark(&host, PLAIN_NSID, 16, 8), Status::SUCCESS);
    for opcode in [Opcode::READ, Opcode::COMPARE, Opcode::VERIFY] {
        let found = status(&host, opcode, PLAIN_NSID, 8, 16);
        assert_eq!(found, Status::UNRECOVERED_READ_ERROR, "{opcode:?}");
    }
    let mut source = CopyRange::new_zeroed();
    source.slba = 20.into();
    let mut copy = rw(Opcode::COPY.0, PLAIN_NSID, 128, 1);
    copy.cdw12 = 0.into();
    assert_eq!(host.send(copy, source.as_bytes()), Status::UNRECOVERED_READ_ERROR);
    assert!(host.read(PLAIN_NSID, 8, 8) == pattern(8, 8));
    assert_eq!(host.write(PLAIN_NSID, 16, 4), Status::SUCCESS);
    assert!(host.read(PLAIN_NSID, 8, 12) == pattern(8, 12));
    assert_eq!(
        host.send(rw(Opcode::WRITE_ZEROES.0, PLAIN_NSID, 20, 2), &[]),
        Status::SUCCESS
    );
    let mut deallocate = entry(Opcode::DATASET_MANAGEMENT.0, PLAIN_NSID);
    deallocate.cdw11 = 4.into();
    let mut range = DsmRange::new_zeroed();
    (range.slba, range.length) = (22.into(), 2.into());
    assert_eq!(host.send(deallocate, range.as_bytes()), Status::SUCCESS);
    assert!(host.read(PLAIN_NSID, 20, 4) == vec![0; 4 * BLOCK]);
    host.must_work();
}

#[test]
fn in_a_zone_it_is_a_write_and_a_reset_takes_it_back() {
    let host = Host::new();
    assert_eq!(host.write(ZONED_NSID, 0, 8), Status::SUCCESS);
    assert_eq!(mark(&host, ZONED_NSID, 0, 8), Status::ZONE_INVALID_WRITE);
    assert_eq!(mark(&host, ZONED_NSID, 8, 8), Status::SUCCESS);
    assert_eq!(host.state(0).1, 16);
    assert_eq!(mark(&host, ZONED_NSID, 16, CAPACITY), Status::ZONE_BOUNDARY_ERROR);
    assert_eq!(host.write(ZONED_NSID, 16, 8), Status::SUCCESS);
    assert_eq!(
        status(&host, Opcode::READ, ZONED_NSID, 0, 24),
        Status::UNRECOVERED_READ_ERROR
    );
    assert!(host.read(ZONED_NSID, 16, 8) == pattern(16, 8));
    assert_eq!(host.zone(SendAction::RESET, 0), Status::SUCCESS);
    assert!(host.read(ZONED_NSID, 0, 24) == vec![0; 24 * BLOCK]);
    assert_eq!(mark(&host, ZONED_NSID, ZONE, CAPACITY), Status::SUCCESS);
    assert_eq!(mark(&host, ZONED_NSID, ZONE, 1), Status::ZONE_IS_FULL);
    host.must_work();
}

#[test]
fn the_error_log_names_the_block_and_health_counts_a_media_error() {
    let host = Host::new();
    assert_eq!(mark(&host, PLAIN_NSID, 20, 1), Status::SUCCESS);
    assert_eq!(
        status(&host, Opcode::READ, PLAIN_NSID, 16, 8),
        Status::UNRECOVERED_READ_ERROR
    );
    let newest = host.ask(get_log(LogId::ERROR_INFORMATION.0, 0, 64));
    let newest = ErrorEntry::read_from_bytes(&newest).unwrap();
    assert_eq!((newest.lba.get(), newest.opcode), (20, Opcode::READ.0));
    let health = Smart::read_from_bytes(&host.ask(get_log(LogId::SMART.0, u32::MAX, 512))).unwrap();
    assert_eq!(health.media_errors.get(), 1);
    host.must_work();
}

#[test]
fn a_format_takes_all_marks_away() {
    let host = Host::new();
    assert_eq!(mark(&host, PLAIN_NSID, 20, 1), Status::SUCCESS);
    assert_eq!(mark(&host, ZONED_NSID, 0, 8), Status::SUCCESS);
    let mut format = entry(0x80, u32::MAX);
    format.cdw10 = 0.into();
    assert_eq!(host.tell(format, &[]).0, Status::SUCCESS);
    assert!(host.read(PLAIN_NSID, 20, 1) == vec![0; BLOCK]);
    assert!(host.read(ZONED_NSID, 0, 8) == vec![0; 8 * BLOCK]);
    host.must_work();
}

#[test]
fn a_namespace_that_keeps_no_list_refuses_and_a_controller_of_such_claims_nothing() {
    // A window: its blocks are somebody else's.
    let plain = "driver=raw,file.driver=memory,file.size=1M";
    let over = |graphs: &[&str]| {
        let graphs: Vec<_> = graphs
            .iter()
            .map(|graph| (*graph, NamespaceOptions::default()))
            .collect();
        Host::over(&graphs)
    };
    let claims = |host: &Host, csi: u32| {
        let oncs = host.ask(identify(1, 0, 0))[520] & 2 != 0;
        let mut log = get_log(LogId::COMMANDS_SUPPORTED_AND_EFFECTS.0, 0, 4096);
        log.cdw14 = (csi << 24).into();
        (oncs, host.ask(log)[1024 + 4 * 4] & 1 == 1)
    };
    let alone = over(&[plain]);
    assert_eq!(
        (claims(&alone, 0), claims(&alone, 2)),
        ((false, false), (false, false))
    );
    assert_eq!(mark(&alone, 1, 0, 8), Status::INVALID_OPCODE);
    drop(alone);
    let beside = over(&[ZONED, plain]);
    assert_eq!(
        (claims(&beside, 0), claims(&beside, 2)),
        ((true, false), (true, true))
    );
    assert_eq!(mark(&beside, 2, 0, 8), Status::INVALID_NAMESPACE_OR_FORMAT);
    drop(beside);
    let memory = over(&[PLAIN]);
    assert_eq!(
        (claims(&memory, 0), claims(&memory, 2)),
        ((true, true), (true, false))
    );
}
