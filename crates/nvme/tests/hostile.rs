//! Entries of any bytes: parsed and carried out without a panic, and the next good command works.

mod host;

use host::{Host, Memory, PLAIN_NSID, ZONED_NSID};
use proptest::prelude::*;
use zbdkit_nvme::{AdminCommand, IoCommand};
use zbdkit_spec::nvme::base::AdminOpcode;
use zbdkit_spec::nvme::command::SubmissionEntry;
use zerocopy::FromBytes;

/// Any bytes, with an opcode and a namespace that something may be done with.
fn entries() -> impl Strategy<Value = SubmissionEntry> {
    let opcode = prop_oneof![
        any::<u8>(),
        prop::sample::select(vec![0, 1, 2, 4, 5, 8, 9, 0x0c, 0x19, 0x79, 0x7a, 0x7d]),
        prop::sample::select(vec![2, 6, 8, 9, 0x0a, 0x18, 0x80]),
    ];
    let nsid = prop_oneof![any::<u32>(), Just(ZONED_NSID), Just(PLAIN_NSID), Just(u32::MAX)];
    let small = prop_oneof![any::<u32>(), 0..32_u32, (0..8_u32).prop_map(|zone| zone * 2048)];
    let dwords = prop::collection::vec(small, 6);
    (any::<[[u8; 32]; 2]>(), opcode, nsid, dwords, any::<bool>()).prop_map(
        |(bytes, opcode, nsid, dwords, plain)| {
            let mut entry = SubmissionEntry::read_from_bytes(&bytes.concat()).unwrap();
            entry.opcode = opcode;
            entry.nsid = nsid.into();
            if plain {
                entry.flags = 0;
            }
            entry.cdw10 = dwords[0].into();
            entry.cdw11 = if plain { 0 } else { dwords[1] }.into();
            entry.cdw12 = dwords[2].into();
            entry.cdw13 = dwords[3].into();
            entry.cdw14 = dwords[4].into();
            entry
        },
    )
}

#[test]
fn any_entry_is_parsed_or_refused() {
    proptest!(|(bytes in any::<[[u8; 32]; 2]>())| {
        let entry = SubmissionEntry::read_from_bytes(&bytes.concat()).unwrap();
        let _ = IoCommand::parse(&entry);
        let _ = AdminCommand::parse(&entry);
    });
}

/// How many; ZBDKIT_HOSTILE_CASES changes it.
fn cases() -> u32 {
    std::env::var("ZBDKIT_HOSTILE_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(2000)
}

#[test]
fn any_command_ends_and_the_queue_goes_on() {
    let host = Host::with_areas();
    let data = || prop::collection::vec(any::<u8>(), 0..256);
    let config = ProptestConfig::with_cases(cases());
    proptest!(config, |(entry in entries(), data in data())| {
        host.io(&entry, &Memory::new(data.clone()));
        if AdminOpcode(entry.opcode) != AdminOpcode::ASYNC_EVENT_REQUEST {
            host.admin(&entry, &Memory::new(data));
        }
    });
    host.must_work();
}
