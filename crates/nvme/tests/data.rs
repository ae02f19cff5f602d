//! Commands on data: both kinds of namespaces, limits, and what is refused.

mod host;

use host::{BLOCK, Host, Memory, PLAIN, PLAIN_NSID, ZONE, ZONED, ZONED_NSID, ZONES, entry, pattern, rw};
use zbdkit_block::ZoneOp;
use zbdkit_nvme::{ControllerOptions, Direction, NamespaceOptions};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::command::NSID_ALL;
use zbdkit_spec::nvme::nvm::{CopyRange, DsmRange, IdentifyNamespace, Opcode};
use zbdkit_spec::nvme::zns::SendAction;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Blocks of the conventional namespace.
const BLOCKS: u64 = 8 << 20 >> 9;

#[test]
fn what_was_written_is_read() {
    let host = Host::new();
    assert_eq!(host.write(PLAIN_NSID, 100, 16), Status::SUCCESS);
    assert!(host.read(PLAIN_NSID, 100, 16) == pattern(100, 16));
    assert!(host.read(PLAIN_NSID, 96, 4) == vec![0; 4 * BLOCK]);
    assert_eq!(host.write(PLAIN_NSID, BLOCKS - 1, 1), Status::SUCCESS);
    host.must_work();
}

#[test]
fn memory_is_asked_for_once_with_the_right_length_and_direction() {
    let host = Host::new();
    let cases = [
        (Opcode::READ, Some((Direction::ControllerToHost, 8 * BLOCK))),
        (Opcode::WRITE, Some((Direction::HostToController, 8 * BLOCK))),
        (Opcode::COMPARE, Some((Direction::HostToController, 8 * BLOCK))),
        (Opcode::WRITE_ZEROES, None),
        (Opcode::VERIFY, None),
        // Last: what is marked cannot be read.
        (Opcode::WRITE_UNCORRECTABLE, None),
        (Opcode::FLUSH, None),
    ];
    for (opcode, asked) in cases {
        let memory = Memory::new(vec![0; 8 * BLOCK]);
        let completion = host.io(&rw(opcode.0, PLAIN_NSID, 0, 8), &memory);
        assert!(completion.is_success(), "{opcode:?}");
        assert_eq!(memory.asked.get(), asked, "{opcode:?}");
    }
    // What cannot work is refused before.
    let memory = Memory::new(Vec::new());
    let completion = host.io(&rw(Opcode::READ.0, PLAIN_NSID, BLOCKS, 8), &memory);
    assert_eq!(
        (completion.status.status(), memory.asked.get()),
        (Status::LBA_OUT_OF_RANGE, None)
    );
    host.must_work();
}

#[test]
fn a_transport_that_has_no_memory_fails_the_command_and_nothing_is_written() {
    let host = Host::new();
    for status in [Status::DATA_TRANSFER_ERROR, Status::PRP_OFFSET_INVALID] {
        let memory = Memory::failing(status.into());
        let completion = host.io(&rw(Opcode::WRITE.0, ZONED_NSID, 0, 8), &memory);
        assert_eq!(completion.status.status(), status);
        let retried = status == Status::DATA_TRANSFER_ERROR;
        assert_eq!(completion.status.dnr(), !retried);
        assert_eq!(host.state(0).1, 0);
    }
    host.must_work();
}

#[test]
fn ranges_end_inside_the_namespace() {
    let host = Host::new();
    for opcode in [
        Opcode::READ,
        Opcode::WRITE,
        Opcode::COMPARE,
        Opcode::VERIFY,
        Opcode::WRITE_ZEROES,
        Opcode::WRITE_UNCORRECTABLE,
    ] {
        for (nsid, end) in [(PLAIN_NSID, BLOCKS), (ZONED_NSID, ZONES * ZONE)] {
            for (lba, count) in [(end - 1, 2), (end, 1), (u64::MAX, 1), (u64::MAX - 65535, 65536)] {
                let status = host.send(rw(opcode.0, nsid, lba, count), &[]);
                assert_eq!(status, Status::LBA_OUT_OF_RANGE, "{opcode:?} {lba:#x} {count}");
            }
        }
    }
    host.must_work();
}

#[test]
fn transfers_are_no_longer_than_the_limit() {
    let options = ControllerOptions {
        max_transfer: 5,
        ..ControllerOptions::default()
    };
    let graphs = [
        (ZONED, NamespaceOptions::default()),
        (PLAIN, NamespaceOptions::default()),
    ];
    let host = Host::with(&graphs, options, host::ENABLE);
    for opcode in [Opcode::READ, Opcode::WRITE, Opcode::COMPARE] {
        assert_eq!(
            host.send(rw(opcode.0, PLAIN_NSID, 0, 257), &[]),
            Status::INVALID_FIELD,
            "{opcode:?}"
        );
        assert_eq!(
            host.send(rw(opcode.0, PLAIN_NSID, 0, 256), &[]),
            Status::SUCCESS,
            "{opcode:?}"
        );
    }
    // What transfers nothing has no limit.
    assert_eq!(
        host.send(rw(Opcode::WRITE_ZEROES.0, PLAIN_NSID, 0, BLOCKS), &[]),
        Status::SUCCESS
    );
    assert_eq!(
        host.send(rw(Opcode::VERIFY.0, PLAIN_NSID, 0, BLOCKS), &[]),
        Status::SUCCESS
    );
    host.must_work();
}

#[test]
fn a_namespace_that_is_not_there_is_refused() {
    let host = Host::new();
    for nsid in [0, 3, 0x8000_0000, NSID_ALL] {
        for opcode in [0x01, 0x02, 0x04, 0x05, 0x08, 0x09, 0x0c, 0x19, 0x79, 0x7a, 0x7d] {
            let mut command = rw(opcode, nsid, 0, 1);
            command.cdw13 = u32::from(opcode == 0x79).into();
            assert_eq!(
                host.send(command, &[]),
                Status::INVALID_NAMESPACE_OR_FORMAT,
                "{nsid} {opcode:#x}"
            );
        }
        let flush = host.send(entry(Opcode::FLUSH.0, nsid), &[]);
        let expected = if nsid == NSID_ALL {
            Status::SUCCESS
        } else {
            Status::INVALID_NAMESPACE_OR_FORMAT
        };
        assert_eq!(flush, expected, "{nsid}");
    }
    host.must_work();
}

#[test]
fn unknown_opcodes_and_fused_commands_are_refused() {
    let host = Host::new();
    // Reservations, I/O management, what no specification names.
    for opcode in [0x0d, 0x0e, 0x11, 0x12, 0x15, 0x1d, 0x03, 0x80, 0xff] {
        assert_eq!(
            host.send(entry(opcode, PLAIN_NSID), &[]),
            Status::INVALID_OPCODE,
            "{opcode:#x}"
        );
    }
    for flags in [1, 2, 3, 0xc0] {
        let mut command = rw(Opcode::READ.0, PLAIN_NSID, 0, 1);
        command.flags = flags;
        assert_eq!(host.send(command, &[]), Status::INVALID_FIELD, "{flags:#x}");
    }
    host.must_work();
}

#[test]
fn a_host_without_zones_has_no_zoned_namespace() {
    let graphs = [
        (ZONED, NamespaceOptions::default()),
        (PLAIN, NamespaceOptions::default()),
    ];
    let host = Host::with(&graphs, ControllerOptions::default(), 0x0046_0001);
    assert_eq!(host.write(ZONED_NSID, 0, 1), Status::INVALID_NAMESPACE_OR_FORMAT);
    assert_eq!(host.write(PLAIN_NSID, 0, 1), Status::SUCCESS);
    assert_eq!(host.ask(host::identify(2, 0, 0))[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
    drop(host);
    let host = Host::with(&graphs, ControllerOptions::default(), 0x0046_0071);
    assert_eq!(
        host.write(PLAIN_NSID, 0, 1),
        Status::INVALID_OPCODE,
        "admin commands only"
    );
    drop(host);
    Host::new().must_work();
}

#[test]
fn compare_tells_whether_the_data_is_the_same() {
    let host = Host::new();
    // Longer than what is read at a time.
    assert_eq!(host.write(PLAIN_NSID, 0, 300), Status::SUCCESS);
    let compare = |data: &[u8]| host.send(rw(Opcode::COMPARE.0, PLAIN_NSID, 0, 300), data);
    let mut data = pattern(0, 300);
    assert_eq!(compare(&data), Status::SUCCESS);
    data[299 * BLOCK] ^= 1;
    assert_eq!(compare(&data), Status::COMPARE_FAILURE);
    host.must_work();
}

#[test]
fn write_zeroes_is_a_write() {
    let host = Host::new();
    assert_eq!(host.write(PLAIN_NSID, 0, 32), Status::SUCCESS);
    assert_eq!(
        host.send(rw(Opcode::WRITE_ZEROES.0, PLAIN_NSID, 8, 8), &[]),
        Status::SUCCESS
    );
    let mut deallocate = rw(Opcode::WRITE_ZEROES.0, PLAIN_NSID, 24, 8);
    deallocate.cdw12 = (7 | 1 << 25).into();
    assert_eq!(host.send(deallocate, &[]), Status::SUCCESS);
    let expected = [
        pattern(0, 8),
        vec![0; 8 * BLOCK],
        pattern(16, 8),
        vec![0; 8 * BLOCK],
    ]
    .concat();
    assert!(host.read(PLAIN_NSID, 0, 32) == expected);
    host.must_work();
}

/// Dataset Management with these ranges.
fn dsm(host: &Host, nsid: u32, ranges: &[(u64, u32)], attributes: u32) -> Status {
    let mut command = entry(Opcode::DATASET_MANAGEMENT.0, nsid);
    command.cdw10 = (ranges.len() as u32 - 1).into();
    command.cdw11 = attributes.into();
    let mut data = Vec::new();
    for (slba, length) in ranges {
        let range = DsmRange {
            cattr: 0.into(),
            length: (*length).into(),
            slba: (*slba).into(),
        };
        data.extend(range.as_bytes());
    }
    host.send(command, &data)
}

#[test]
fn deallocated_blocks_read_as_zeros() {
    let host = Host::new();
    assert_eq!(host.write(PLAIN_NSID, 0, 64), Status::SUCCESS);
    assert_eq!(
        dsm(&host, PLAIN_NSID, &[(0, 8), (16, 16), (40, 0)], 4),
        Status::SUCCESS
    );
    let zeros = |count: usize| vec![0; count * BLOCK];
    let expected = [zeros(8), pattern(8, 8), zeros(16), pattern(32, 32)].concat();
    assert!(host.read(PLAIN_NSID, 0, 64) == expected);
    assert_eq!(
        dsm(&host, PLAIN_NSID, &[(32, 8), (BLOCKS, 1)], 4),
        Status::LBA_OUT_OF_RANGE
    );
    assert_eq!(
        dsm(&host, PLAIN_NSID, &[(u64::MAX, u32::MAX)], 4),
        Status::LBA_OUT_OF_RANGE
    );
    assert!(
        host.read(PLAIN_NSID, 32, 32) == pattern(32, 32),
        "all ranges are checked before"
    );
    assert_eq!(
        dsm(&host, PLAIN_NSID, &[(u64::MAX, u32::MAX)], 3),
        Status::SUCCESS,
        "hints"
    );
    assert_eq!(dsm(&host, PLAIN_NSID, &[(0, 8); 256], 4), Status::SUCCESS);
    // What a zone holds stays until it is reset.
    assert_eq!(host.write(ZONED_NSID, 0, 8), Status::SUCCESS);
    assert_eq!(dsm(&host, ZONED_NSID, &[(0, 8)], 4), Status::SUCCESS);
    assert!(host.read(ZONED_NSID, 0, 8) == pattern(0, 8));
    host.set(ZoneOp::SetOffline, 3);
    assert_eq!(
        dsm(
            &host,
            ZONED_NSID,
            &[(0, 8), (ZONE, 0), (2 * ZONE, ZONE as u32)],
            4
        ),
        Status::SUCCESS
    );
    assert_eq!(
        dsm(&host, ZONED_NSID, &[(0, 8), (2 * ZONE, ZONE as u32 + 1)], 4),
        Status::ZONE_IS_OFFLINE
    );
    host.must_work();
}

/// Copy of these ranges.
fn copy(host: &Host, nsid: u32, to: u64, ranges: &[(u64, u32)], format: u32) -> Status {
    let mut command = rw(Opcode::COPY.0, nsid, to, 1);
    command.cdw12 = ((ranges.len() as u32 - 1) | (format << 8)).into();
    let mut data = Vec::new();
    for (slba, count) in ranges {
        let mut range = CopyRange::new_zeroed();
        range.slba = (*slba).into();
        range.nlb_z = ((*count - 1) as u16).into();
        data.extend(range.as_bytes());
    }
    host.send(command, &data)
}

#[test]
fn copy_gathers_its_sources() {
    let host = Host::new();
    for nsid in [PLAIN_NSID, ZONED_NSID] {
        assert_eq!(host.write(nsid, 0, 64), Status::SUCCESS);
        let to = ZONE;
        assert_eq!(copy(&host, nsid, to, &[(32, 8), (0, 16)], 0), Status::SUCCESS);
        assert!(host.read(nsid, to, 24) == [pattern(32, 8), pattern(0, 16)].concat());
    }
    assert_eq!(host.state(1).1, 24);
    // Sources are read before anything is written, so they may overlap.
    assert_eq!(copy(&host, PLAIN_NSID, 8, &[(0, 32)], 0), Status::SUCCESS);
    assert!(host.read(PLAIN_NSID, 8, 32) == pattern(0, 32));
    host.must_work();
}

#[test]
fn copy_has_limits_and_the_rules_of_reads_and_writes() {
    let host = Host::new();
    assert_eq!(
        copy(&host, PLAIN_NSID, 0, &[(0, 1); 129], 0),
        Status::COMMAND_SIZE_LIMIT_EXCEEDED
    );
    assert_eq!(copy(&host, PLAIN_NSID, 0, &[(0, 1); 128], 0), Status::SUCCESS);
    assert_eq!(
        copy(&host, PLAIN_NSID, 0, &[(0, 2049)], 0),
        Status::COMMAND_SIZE_LIMIT_EXCEEDED
    );
    assert_eq!(
        copy(&host, PLAIN_NSID, 0, &[(0, 2048), (0, 1)], 0),
        Status::COMMAND_SIZE_LIMIT_EXCEEDED
    );
    assert_eq!(copy(&host, PLAIN_NSID, 4096, &[(0, 2048)], 0), Status::SUCCESS);
    for format in 1..16 {
        assert_eq!(
            copy(&host, PLAIN_NSID, 0, &[(0, 1)], format),
            Status::INVALID_FIELD,
            "{format}"
        );
    }
    assert_eq!(
        copy(&host, PLAIN_NSID, BLOCKS - 1, &[(0, 2)], 0),
        Status::LBA_OUT_OF_RANGE
    );
    assert_eq!(
        copy(&host, PLAIN_NSID, 0, &[(BLOCKS, 1)], 0),
        Status::LBA_OUT_OF_RANGE
    );
    assert_eq!(
        copy(&host, ZONED_NSID, 8, &[(0, 8)], 0),
        Status::ZONE_INVALID_WRITE
    );
    assert_eq!(
        copy(&host, ZONED_NSID, 0, &[(ZONE - 8, 16)], 0),
        Status::ZONE_BOUNDARY_ERROR
    );
    assert_eq!(copy(&host, ZONED_NSID, 0, &[(ZONE, 8)], 0), Status::SUCCESS);
    assert_eq!(host.zone(SendAction::FINISH, 0), Status::SUCCESS);
    assert_eq!(copy(&host, ZONED_NSID, 8, &[(0, 8)], 0), Status::ZONE_IS_FULL);
    host.must_work();
}

#[test]
fn commands_that_need_memory_of_ours_take_turns_and_all_end() {
    let host = Host::new();
    assert_eq!(host.write(PLAIN_NSID, 0, 300), Status::SUCCESS);
    let verify = rw(Opcode::VERIFY.0, PLAIN_NSID, 0, 300);
    let memory = Memory::new(Vec::new());
    let mut all: Vec<_> = (0..20)
        .map(|_| Box::pin(host.io.execute(&verify, &memory)))
        .collect();
    host.runtime.block_on(async {
        let mut left = all.len();
        std::future::poll_fn(|cx| {
            all.retain_mut(|command| match command.as_mut().poll(cx) {
                std::task::Poll::Ready(completion) => {
                    assert!(completion.is_success());
                    left -= 1;
                    false
                }
                std::task::Poll::Pending => true,
            });
            if left == 0 {
                std::task::Poll::Ready(())
            } else {
                std::task::Poll::Pending
            }
        })
        .await;
    });
    drop(all);
    host.must_work();
}

#[test]
fn a_read_only_namespace_takes_no_changes() {
    let host = Host::over(&[("driver=memory,size=8M,read-only=on", NamespaceOptions::default())]);
    assert_eq!(host.write(1, 0, 1), Status::NAMESPACE_WRITE_PROTECTED);
    assert_eq!(
        host.send(rw(Opcode::WRITE_ZEROES.0, 1, 0, 1), &[]),
        Status::NAMESPACE_WRITE_PROTECTED
    );
    assert_eq!(dsm(&host, 1, &[(0, 1)], 4), Status::NAMESPACE_WRITE_PROTECTED);
    assert_eq!(copy(&host, 1, 0, &[(8, 1)], 0), Status::NAMESPACE_WRITE_PROTECTED);
    assert_eq!(host.ask(host::identify(0, 1, 0))[99], 1);
    assert!(host.read(1, 0, 8) == vec![0; 8 * BLOCK]);
}

#[test]
fn blocks_of_4096_bytes_are_shown_as_such() {
    let graph =
        "driver=zoned,file.driver=memory,file.size=8M,block_size=4096,zone.size=1M,zone.max_append_bytes=64k";
    let host = Host::over(&[(graph, NamespaceOptions::default())]);
    let namespace = host.subsystem.namespace(1).unwrap();
    assert_eq!((namespace.block_shift(), namespace.blocks()), (12, 2048));
    let data = pattern(0, 16);
    assert_eq!(host.send(rw(Opcode::WRITE.0, 1, 256, 2), &data), Status::SUCCESS);
    assert!(host.read(1, 256, 2) == data);
    let shown = IdentifyNamespace::read_from_bytes(&host.ask(host::identify(0, 1, 0))).unwrap();
    assert_eq!(shown.format().lbads, 12);
}
