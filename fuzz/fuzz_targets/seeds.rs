//! Writes the corpora: small valid images with a bit of everything, some forgeries of zones, and what vfio-user clients say.

#[allow(dead_code, reason = "used by the fuzz target")]
#[path = "../../crates/qcow2/tests/hostile/exercise.rs"]
mod exercise;
#[allow(dead_code, reason = "used by the fuzz target")]
#[path = "../../crates/qcow2/tests/hostile/forge.rs"]
mod forge;
#[allow(dead_code, reason = "used by the fuzz target")]
#[path = "../../crates/qcow2/tests/hostile/memory.rs"]
mod memory;
#[path = "../../crates/qcow2/tests/hostile/random.rs"]
mod random;

use std::path::Path;

#[allow(dead_code, reason = "used by the fuzz target")]
#[path = "../../crates/vfio_user/tests/anything/steps.rs"]
mod steps;

use random::Rng;
use zbdkit_io::{Runtime, RuntimeOptions};
use zbdkit_spec::nvme::command::SubmissionEntry;
use zbdkit_spec::vfio_user::command;
use zbdkit_testkit::diff::forged;
use zerocopy::{FromZeros, IntoBytes};

/// The images' bytes in all.
const MOST: usize = 160 << 10;
/// The largest one.
const LARGEST: usize = 14 << 10;

fn main() -> std::io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let runtime = Runtime::new(RuntimeOptions::default())?;
    std::fs::create_dir_all(corpus.join("image"))?;
    let mut left = MOST;
    for seed in 0..400u64 {
        let subject = runtime.block_on(forge::valid(&mut Rng(seed)));
        let mut bytes = seed.to_be_bytes().to_vec();
        bytes.extend(subject.image.read(0, subject.image.len() as usize));
        if bytes.len() <= LARGEST.min(left) {
            left -= bytes.len();
            std::fs::write(corpus.join(format!("image/valid{seed}")), bytes)?;
        }
    }
    std::fs::create_dir_all(corpus.join("zones"))?;
    for image in 0..forged::IMAGES {
        std::fs::write(corpus.join(format!("zones/valid{image}")), [image, 0, 0, 0, 0, 0, 0, 0, 0, 1])?;
    }
    for seed in 0..60 {
        std::fs::write(corpus.join(format!("zones/forged{seed}")), forged::random_input(seed))?;
    }
    std::fs::create_dir_all(corpus.join("vfio_user"))?;
    std::fs::create_dir_all(corpus.join("nvme"))?;
    for (name, seed) in commands() {
        std::fs::write(corpus.join("nvme").join(name), seed)?;
    }
    for (name, seed) in conversations() {
        std::fs::write(corpus.join("vfio_user").join(name), seed)?;
    }
    Ok(())
}

/// Entries for both queues, each with the data that it comes with, as the target takes them.
fn commands() -> Vec<(&'static str, Vec<u8>)> {
    const IO: u8 = 0;
    const ADMIN: u8 = 1;
    let entry = |queue: u8, opcode: u8, nsid: u32, dwords: [u32; 4]| {
        let mut entry = SubmissionEntry::new_zeroed();
        entry.opcode = opcode;
        entry.nsid = nsid.into();
        let [cdw10, cdw11, cdw12, cdw13] = dwords;
        entry.cdw10 = cdw10.into();
        entry.cdw11 = cdw11.into();
        entry.cdw12 = cdw12.into();
        entry.cdw13 = cdw13.into();
        [&[queue], entry.as_bytes()].concat()
    };
    let data = [0x01, 0x02, 0x04, 0x05, 0x08, 0x09, 0x0c, 0x19].map(|opcode| entry(IO, opcode, 2, [0, 0, 7, 0]));
    let zones = [0x203, 0x3, 0x1, 0x11, 0x2, 0x10, 0x5, 0x104].map(|send| entry(IO, 0x79, 1, [0, 0, 0, send]));
    let reports = [0, 1, 0x1_0900].map(|receive| entry(IO, 0x7a, 1, [0, 0, 0xff, receive]));
    let writes = [entry(IO, 0x01, 1, [0, 0, 7, 0]), entry(IO, 0x7d, 1, [2048, 0, 7, 0])];
    let admin = [
        entry(ADMIN, 0x06, 1, [5, 2 << 24, 0, 0]),
        entry(ADMIN, 0x02, 1, [0x03ff_00bf, 0, 0, 0]),
        entry(ADMIN, 0x09, 0, [0x0b, 0x0800_0100, 0, 0]),
        entry(ADMIN, 0x80, 1, [0, 0, 0, 0]),
    ];
    vec![
        ("data", data.concat()),
        ("zones", [&writes[..1], &zones].concat().concat()),
        ("reports", [&writes[..], &reports].concat().concat()),
        ("admin", admin.concat()),
    ]
}

/// What clients of the protocol say.
fn conversations() -> Vec<(&'static str, Vec<u8>)> {
    let talk = |parts: &[Vec<u8>]| [vec![0], parts.concat()].concat();
    let device = [
        steps::ask(command::DEVICE_GET_INFO, 0),
        steps::ask(command::DEVICE_GET_REGION_INFO, 1),
        steps::ask(command::DEVICE_GET_IRQ_INFO, 2),
        steps::read(0, 0x3ffc, 4),
        steps::ask(command::DEVICE_RESET, 0),
    ];
    let memory = [
        steps::map(3, 0, 0x1000, 0x2000, true),
        steps::tell(2, 0x1000, 0xfff),
        steps::tell(3, 0x1ffc, 8),
        steps::tell(4, 0, 0),
        steps::unmap(0, 0x1000, 0x2000),
        steps::unmap(2, 0, 0),
    ];
    let messages = [
        steps::map(3, 0, 0x1000, 0x2000, false),
        steps::tell(0, 0x1000, 0xfff),
        steps::tell(1, 0x1000, 0x1fff),
        steps::answer(),
        steps::refuse(1, &[]),
        steps::refuse(0, &[1, 2, 3]),
        steps::unmap(2, 0, 0),
    ];
    let interrupts = [
        steps::set_irqs(0x24, 2, 0, 3),
        steps::tell(5, 0, 0),
        steps::set_irqs(0x21, 2, 0, 0),
    ];
    vec![
        ("device", talk(&device)),
        ("memory", talk(&memory)),
        ("messages", talk(&messages)),
        ("interrupts", talk(&interrupts)),
    ]
}
