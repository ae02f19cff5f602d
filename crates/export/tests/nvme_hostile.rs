//! Drivers that mean harm, or nothing at all: data pointers, queues and doorbells of any kind, and the controller goes on.

mod nvme;

use std::cell::RefCell;

use nvme::{DATA, Rig, open};
use proptest::prelude::*;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::admin::{CreateCqCdw11, CreateQueueCdw10, CreateSqCdw11};
use zbdkit_spec::nvme::base::AdminOpcode;
use zbdkit_spec::nvme::controller::offset;
use zbdkit_spec::nvme::nvm::Opcode;
use zbdkit_spec::vfio_user::pci_region;
use zbdkit_testkit::nvme::{Driver, Entry, PAGE};

/// Where lists and data of any kind are; queues of any kind are behind them.
const PAGES: u64 = 64;
const QUEUES: u64 = DATA + PAGES * PAGE;

/// How many; ZBDKIT_HOSTILE_CASES changes it.
fn cases() -> u32 {
    std::env::var("ZBDKIT_HOSTILE_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(100)
}

/// A namespace with zones, queue 1, and blocks that a good read finds.
fn rig(threads: u16) -> (Rig, Driver) {
    let device = open(
        "driver=zoned,file.driver=memory,file.size=8M,zone.mode=host-managed,block_size=512,zone.size=1M,\
         zone.max_append_bytes=64k,zone.zrwa_size=64k,zone.zrwa_granularity=8k,zone.descr_ext_size=64",
    );
    let rig = Rig::over(device, |options| options.threads = threads);
    let mut driver = rig.driver();
    driver.enable();
    driver.make_io_queues(1);
    (rig, driver)
}

/// What must succeed whatever came before.
fn works(driver: &mut Driver) {
    let (at, len) = (DATA, 4096);
    let reset = Entry::zone_send(zbdkit_spec::nvme::zns::SendAction::RESET, 14336, <_>::default());
    assert_eq!(driver.io(1, reset), Status::SUCCESS);
    driver.fill(at, &[0x5a; 4096]);
    let write = Entry::rw(Opcode::WRITE, 14336, 8).prps(driver.prps(at, len));
    assert_eq!(driver.io(1, write), Status::SUCCESS);
    driver.fill(at, &[0; 4096]);
    let read = Entry::rw(Opcode::READ, 14336, 8).prps(driver.prps(at, len));
    assert_eq!(driver.io(1, read), Status::SUCCESS);
    assert_eq!(driver.get(at, 4096), [0x5a; 4096]);
}

/// A word of a data pointer or of a list: an address of ours, near the end of memory or outside, or an SGL descriptor's rest.
fn word(base: u64) -> impl Strategy<Value = u64> {
    let address = move |at: u64| base + DATA + at;
    prop_oneof![
        6 => (0..PAGES).prop_map(move |page| address(page * PAGE)),
        2 => (0..PAGES * PAGE).prop_map(address),
        2 => (0u64..4096, prop::sample::select(vec![0u64, 0x20, 0x30, 0x10, 0x01]))
            .prop_map(|(len, kind)| kind << 56 | len),
        2 => (0u64..64, prop::sample::select(vec![0x20u64, 0x30]))
            .prop_map(|(count, kind)| (kind << 56) | (count * 16)),
        1 => Just(0xdead_0000),
        1 => any::<u64>(),
    ]
}

#[test]
fn whatever_data_pointers_say_commands_end_and_the_next_one_works() {
    let (_rig, driver) = rig(1);
    let base = driver.address(0);
    let driver = RefCell::new(driver);
    let opcodes = vec![0x01u8, 0x02, 0x05, 0x09, 0x19, 0x79, 0x7a, 0x7d];
    let command = (
        prop::sample::select(opcodes),
        0u8..4,
        prop::array::uniform2(word(base)),
        (0u64..16384, 0u32..2048, prop_oneof![0u32..0x400, any::<u32>()]),
    );
    let lists = prop::collection::vec(word(base), 1..128);
    proptest!(ProptestConfig::with_cases(cases()), |(command in command, lists in lists)| {
        let driver = &mut *driver.borrow_mut();
        let (opcode, psdt, pointer, (block, blocks_z, cdw13)) = command;
        let bytes: Vec<u8> = lists.iter().flat_map(|word| word.to_le_bytes()).collect();
        for page in 0..8 {
            driver.fill(DATA + page * PAGE, &bytes);
        }
        let mut entry = Entry::new(opcode, 1).slba(block).prps(pointer.into());
        entry.0.flags = psdt << 6;
        entry.0.cdw12.set(blocks_z);
        entry.0.cdw13.set(cdw13);
        driver.io(1, entry);
        works(driver);
    });
}

/// Something that a driver does beside queue 1.
#[derive(Clone, Debug)]
enum Step {
    CreateCq {
        qid: u16,
        size_z: u16,
        at: u64,
        cdw11: u32,
    },
    CreateSq {
        qid: u16,
        size_z: u16,
        at: u64,
        cdw11: u32,
    },
    Delete {
        sq: bool,
        qid: u16,
    },
    Ring {
        index: u16,
        value: u32,
    },
    Abort {
        sqid: u16,
        cid: u16,
    },
    Write {
        at: u64,
        bytes: Vec<u8>,
    },
    Shadow {
        values: u64,
        events: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    // Queue 1 is the one that must go on.
    let qid = || prop_oneof![8 => 2u16..7, 1 => any::<u16>()].prop_filter("queue 1", |qid| *qid != 1);
    let size = || prop_oneof![4 => 0u16..64, 1 => any::<u16>()];
    let at = || prop_oneof![6 => (0u64..32).prop_map(|page| QUEUES + page * PAGE), 1 => QUEUES..QUEUES + 32 * PAGE, 1 => 1u64 << 32..1 << 33];
    let cq = (0u32..8, 0u32..8).prop_map(|(flags, vector)| {
        CreateCqCdw11::from_bits(flags)
            .with_iv(vector as u16)
            .with_pc(flags != 0)
            .into_bits()
    });
    let sq = (any::<bool>(), prop_oneof![8 => 0u16..7, 1 => any::<u16>()])
        .prop_map(|(pc, cqid)| CreateSqCdw11::new().with_pc(pc).with_cqid(cqid).into_bits());
    prop_oneof![
        (qid(), size(), at(), cq).prop_map(|(qid, size_z, at, cdw11)| Step::CreateCq {
            qid,
            size_z,
            at,
            cdw11
        }),
        (qid(), size(), at(), sq).prop_map(|(qid, size_z, at, cdw11)| Step::CreateSq {
            qid,
            size_z,
            at,
            cdw11
        }),
        (any::<bool>(), qid()).prop_map(|(sq, qid)| Step::Delete { sq, qid }),
        // Not the doorbells of the admin queue and of queue 1.
        (4u16..1100, prop_oneof![0u32..80, any::<u32>()])
            .prop_map(|(index, value)| Step::Ring { index, value }),
        (0u16..7, any::<u16>()).prop_map(|(sqid, cid)| Step::Abort { sqid, cid }),
        // Registers but CC, in any width; within the region, since the client waits for ever for what is refused.
        (
            prop_oneof![0u64..0xd, 0x1c..0x20u64, 0x24..0x1000u64, 0x3000..0x3ff8u64],
            prop::collection::vec(any::<u8>(), 1..9),
        )
            .prop_map(|(at, bytes)| Step::Write { at, bytes }),
        (at(), at()).prop_map(|(values, events)| Step::Shadow { values, events }),
    ]
}

fn play(driver: &mut Driver, step: &Step) {
    let create = |driver: &Driver, opcode, qid, size_z, at, cdw11| {
        let mut entry = Entry::admin(opcode).prps((driver.address(at), 0));
        let cdw10 = CreateQueueCdw10::new().with_qid(qid).with_qsize_z(size_z);
        entry.0.cdw10.set(cdw10.into_bits());
        entry.0.cdw11.set(cdw11);
        entry
    };
    match *step {
        Step::CreateCq {
            qid,
            size_z,
            at,
            cdw11,
        } => {
            let entry = create(driver, AdminOpcode::CREATE_IO_CQ, qid, size_z, at, cdw11);
            driver.admin(entry);
        }
        Step::CreateSq {
            qid,
            size_z,
            at,
            cdw11,
        } => {
            let entry = create(driver, AdminOpcode::CREATE_IO_SQ, qid, size_z, at, cdw11);
            driver.admin(entry);
        }
        Step::Delete { sq, qid } => {
            let opcode = if sq {
                AdminOpcode::DELETE_IO_SQ
            } else {
                AdminOpcode::DELETE_IO_CQ
            };
            driver.admin(Entry::admin(opcode).cdw10(qid.into()));
        }
        Step::Ring { index, value } => driver.write32(offset::DOORBELLS + u64::from(index) * 4, value),
        Step::Abort { sqid, cid } => {
            let done = driver.run(
                0,
                Entry::admin(AdminOpcode::ABORT).cdw10(u32::from(sqid) | u32::from(cid) << 16),
            );
            assert_eq!(
                (done.status, done.result),
                (Status::SUCCESS, 1),
                "nothing is there to be aborted"
            );
        }
        Step::Write { at, ref bytes } => {
            // Whether it is taken is the server's business.
            let _ = driver.client.region_write(pci_region::BAR0, at, bytes);
        }
        Step::Shadow { values, events } => {
            let pages = (driver.address(values), driver.address(events));
            let config = Entry::admin(AdminOpcode::DOORBELL_BUFFER_CONFIG).prps(pages);
            if driver.admin(config) == Status::SUCCESS {
                // Queue 1 has its doorbells there now, which this driver does not follow.
                driver.disable();
                driver.enable();
                driver.make_io_queues(1);
            }
        }
    }
}

#[test]
fn whatever_a_driver_does_with_queues_and_doorbells_others_go_on() {
    let (_rig, driver) = rig(2);
    let driver = RefCell::new(driver);
    let steps = prop::collection::vec(step(), 1..24);
    proptest!(ProptestConfig::with_cases(cases()), |(steps in steps)| {
        let driver = &mut *driver.borrow_mut();
        // Flushes of no namespace, should somebody ring.
        driver.fill(QUEUES, &vec![0; 32 * PAGE as usize]);
        for step in &steps {
            play(driver, step);
        }
        works(driver);
        driver.disable();
        driver.enable();
        driver.make_io_queues(1);
    });
}
