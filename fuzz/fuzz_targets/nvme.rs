//! Submission entries of any bytes, one after the other, at an NVMe controller over a zoned and a conventional namespace.
//! Afterwards the queue must still work.

#![no_main]

#[path = "../../crates/nvme/tests/host/mod.rs"]
mod host;

use host::{Host, Memory};
use libfuzzer_sys::fuzz_target;
use zbdkit_spec::nvme::base::AdminOpcode;
use zbdkit_spec::nvme::command::{SUBMISSION_ENTRY_BYTES, SubmissionEntry};
use zerocopy::FromBytes;

/// Entries of an input.
const MOST: usize = 32;

fuzz_target!(|data: &[u8]| {
    let host = Host::with_areas();
    let mut rest = data;
    for _ in 0..MOST {
        let Some((admin, after)) = rest.split_first() else {
            break;
        };
        let Ok((entry, after)) = SubmissionEntry::read_from_prefix(after) else {
            break;
        };
        rest = after;
        let memory = Memory::new(after[..after.len().min(SUBMISSION_ENTRY_BYTES)].to_vec());
        if admin & 1 == 0 {
            host.io(&entry, &memory);
        } else if AdminOpcode(entry.opcode) != AdminOpcode::ASYNC_EVENT_REQUEST {
            host.admin(&entry, &memory);
        }
    }
    host.must_work();
});
