//! The NVMe controller as a PCI function, driven through Cloud Hypervisor's vfio-user client.

mod nvme;

use nvme::{CQ, DATA, Rig, SQ};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::AdminOpcode;
use zbdkit_spec::nvme::controller::offset;
use zbdkit_spec::nvme::feature::FeatureId;
use zbdkit_spec::nvme::nvm::Opcode;
use zbdkit_spec::vfio_user::pci_region;
use zbdkit_testkit::nvme::{ADMIN_ENTRIES as ENTRIES, Driver, Entry, PAGE};

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 512 * 7 + i) as u8 ^ seed).collect()
}

#[test]
fn a_driver_finds_the_controller_and_enables_it() {
    let rig = Rig::new();
    let mut driver = rig.driver();
    let mut class = [0; 4];
    driver
        .client
        .region_read(pci_region::CONFIG, 8, &mut class)
        .unwrap();
    assert_eq!(class[1..], [0x02, 0x08, 0x01]);
    assert_eq!(driver.read32(offset::VS), 0x0002_0100);
    assert_eq!(driver.read32(offset::CSTS), 0);
    // Registers can be read in any width.
    let (mut whole, mut half) = ([0; 8], [0; 2]);
    driver
        .client
        .region_read(pci_region::BAR0, offset::CAP, &mut whole)
        .unwrap();
    driver
        .client
        .region_read(pci_region::BAR0, offset::CAP + 2, &mut half)
        .unwrap();
    assert_eq!(whole[2..4], half);
    driver.enable();
    driver.disable();
    driver.enable();
}

#[test]
fn admin_queues_outside_of_shared_memory_are_fatal_until_a_reset() {
    let rig = Rig::new();
    let mut driver = rig.driver();
    driver.start(0xdead_0000);
    driver.wait_csts(|csts| csts.cfs());
    driver.client.reset().unwrap();
    assert_eq!(driver.read32(offset::CSTS), 0);
    driver.enable();
}

#[test]
fn data_goes_through_prps_of_every_shape() {
    let rig = Rig::new();
    let mut driver = rig.driver();
    driver.enable();
    driver.make_io_queues(1);
    for (seed, at, blocks) in [
        (1, 0, 1),
        (2, 512, 7),
        (3, 2048, 12),
        (4, 4, 8),
        (5, 0, 64),
        (6, 1024, 2048),
    ] {
        let len = blocks as usize * 512;
        let data = pattern(seed, len);
        driver.fill(DATA + at, &data);
        let prps = driver.prps(DATA + at, len as u64);
        assert_eq!(
            driver.io(1, Entry::rw(Opcode::WRITE, 16, blocks).prps(prps)),
            Status::SUCCESS
        );
        driver.fill(DATA + at, &vec![0; len]);
        assert_eq!(
            driver.io(1, Entry::rw(Opcode::READ, 16, blocks).prps(prps)),
            Status::SUCCESS
        );
        assert_eq!(driver.get(DATA + at, len), data, "{blocks} blocks at {at}");
    }
}

#[test]
fn data_goes_through_sgls_too() {
    let rig = Rig::new();
    let mut driver = rig.driver();
    driver.enable();
    driver.make_io_queues(1);
    let data = pattern(9, 1024);
    driver.fill(DATA + 3, &data[..700]);
    driver.fill(DATA + 2 * PAGE, &data[700..]);
    // A segment of two data blocks.
    let mut list = Vec::new();
    for (address, len) in [(DATA + 3, 700u64), (DATA + 2 * PAGE, 324)] {
        list.extend(driver.address(address).to_le_bytes());
        list.extend(len.to_le_bytes());
    }
    driver.fill(DATA + PAGE, &list);
    let sgl = (driver.address(DATA + PAGE), 32 | 0x30 << 56);
    assert_eq!(
        driver.io(1, Entry::rw(Opcode::WRITE, 0, 2).sgl(sgl)),
        Status::SUCCESS
    );
    let one = (driver.address(DATA + 4 * PAGE), 1024);
    assert_eq!(
        driver.io(1, Entry::rw(Opcode::READ, 0, 2).sgl(one)),
        Status::SUCCESS
    );
    assert_eq!(driver.get(DATA + 4 * PAGE, 1024), data);
}

#[test]
fn data_pointers_that_are_none_fail_the_command_and_nothing_else() {
    let rig = Rig::new();
    let mut driver = rig.driver();
    driver.enable();
    driver.make_io_queues(1);
    let page = driver.address(DATA);
    let read = |prps| Entry::rw(Opcode::READ, 0, 8).prps(prps);
    assert_eq!(
        driver.io(1, read((page + 2, page + PAGE))),
        Status::PRP_OFFSET_INVALID
    );
    assert_eq!(
        driver.io(1, read((page + 512, page + PAGE + 4))),
        Status::PRP_OFFSET_INVALID
    );
    assert_eq!(driver.io(1, read((0xdead_0000, 0))), Status::DATA_TRANSFER_ERROR);
    assert_eq!(
        driver.io(1, read((u64::MAX - 4095, 0))),
        Status::DATA_TRANSFER_ERROR
    );
    let large = Entry::rw(Opcode::READ, 0, 24).prps((page, 0xdead_0000));
    assert_eq!(driver.io(1, large), Status::DATA_TRANSFER_ERROR);
    let sgl = Entry::rw(Opcode::READ, 0, 8).sgl((page, 4095));
    assert_eq!(driver.io(1, sgl), Status::DATA_SGL_LENGTH_INVALID);
    assert_eq!(driver.io(1, read((page, 0))), Status::SUCCESS);
}

#[test]
fn transfers_are_as_long_as_the_controller_is_told() {
    let rig = Rig::with(|options| options.max_transfer = 1);
    let mut driver = rig.driver();
    driver.enable();
    driver.make_io_queues(1);
    let prps = driver.prps(DATA, 17 * 512);
    for (blocks, expected) in [(16, Status::SUCCESS), (17, Status::INVALID_FIELD)] {
        assert_eq!(
            driver.io(1, Entry::rw(Opcode::READ, 0, blocks).prps(prps)),
            expected
        );
    }
}

#[test]
fn queues_wrap_and_completions_keep_their_phase() {
    let rig = Rig::new();
    let mut driver = rig.driver();
    driver.enable();
    driver.make_io_queues(1);
    let prps = driver.prps(DATA, 512);
    for round in 0..3 * u64::from(ENTRIES) + 1 {
        driver.fill(DATA, &pattern(round as u8, 512));
        assert_eq!(
            driver.io(1, Entry::rw(Opcode::WRITE, round, 1).prps(prps)),
            Status::SUCCESS
        );
    }
    assert_eq!(
        driver.io(1, Entry::rw(Opcode::READ, 20, 1).prps(prps)),
        Status::SUCCESS
    );
    assert_eq!(driver.get(DATA, 512), pattern(20, 512));
}

#[test]
fn completions_wait_for_room_and_none_is_lost() {
    let rig = Rig::new();
    let mut driver = rig.driver();
    driver.enable();
    driver.make_queues(1, CQ, 4, SQ, u32::from(ENTRIES));
    let prps = driver.prps(DATA, 512);
    // Far more than fit the completion queue, before any is taken from it.
    for cid in 0..ENTRIES - 1 {
        driver.put(1, Entry::rw(Opcode::READ, 0, 1).prps(prps).cid(cid));
    }
    driver.ring(1);
    let mut seen: Vec<u16> = (0..ENTRIES - 1).map(|_| driver.next(1).cid).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..ENTRIES - 1).collect::<Vec<_>>());
}

#[test]
fn queues_that_cannot_be_are_refused_with_the_reason() {
    let rig = Rig::new();
    let mut driver = rig.driver();
    driver.enable();
    let cq = |driver: &Driver, qid: u64, entries: u64, at: u64, flags: u64| {
        let mut entry = Entry::admin(AdminOpcode::CREATE_IO_CQ).prps((driver.address(at), 0));
        entry.0.cdw10.set((qid | (entries - 1) << 16) as u32);
        entry.0.cdw11.set(flags as u32);
        entry
    };
    let sq = |driver: &Driver, qid: u64, entries: u64, at: u64, cqid: u64| {
        let mut entry = Entry::admin(AdminOpcode::CREATE_IO_SQ).prps((driver.address(at), 0));
        entry.0.cdw10.set((qid | (entries - 1) << 16) as u32);
        entry.0.cdw11.set((1 | cqid << 16) as u32);
        entry
    };
    let wrong = [
        (cq(&driver, 0, 8, CQ, 1), Status::INVALID_QUEUE_IDENTIFIER),
        (cq(&driver, 5, 8, CQ, 1), Status::INVALID_QUEUE_IDENTIFIER),
        (cq(&driver, 1, 1, CQ, 1), Status::INVALID_QUEUE_SIZE),
        (cq(&driver, 1, 4097, CQ, 1), Status::INVALID_QUEUE_SIZE),
        (cq(&driver, 1, 8, CQ, 0), Status::INVALID_FIELD),
        (cq(&driver, 1, 8, CQ + 8, 1), Status::PRP_OFFSET_INVALID),
        (cq(&driver, 1, 8, 1 << 40, 1), Status::INVALID_FIELD),
        (
            cq(&driver, 1, 8, CQ, 3 | 5 << 16),
            Status::INVALID_INTERRUPT_VECTOR,
        ),
        (sq(&driver, 1, 8, SQ, 1), Status::COMPLETION_QUEUE_INVALID),
        (sq(&driver, 1, 8, SQ, 99), Status::INVALID_QUEUE_IDENTIFIER),
        (
            Entry::admin(AdminOpcode::DELETE_IO_SQ).cdw10(1),
            Status::INVALID_QUEUE_IDENTIFIER,
        ),
        (
            Entry::admin(AdminOpcode::DELETE_IO_CQ).cdw10(1),
            Status::INVALID_QUEUE_IDENTIFIER,
        ),
    ];
    for (entry, expected) in wrong {
        assert_eq!(driver.admin(entry), expected, "{entry:?}");
    }
    driver.make_io_queues(1);
    let again = cq(&driver, 1, 8, CQ, 1);
    assert_eq!(driver.admin(again), Status::INVALID_QUEUE_IDENTIFIER);
    let in_use = Entry::admin(AdminOpcode::DELETE_IO_CQ).cdw10(1);
    assert_eq!(driver.admin(in_use), Status::INVALID_QUEUE_DELETION);
    assert_eq!(
        driver.admin(Entry::admin(AdminOpcode::DELETE_IO_SQ).cdw10(1)),
        Status::SUCCESS
    );
    assert_eq!(driver.admin(in_use), Status::SUCCESS);
    driver.make_io_queues(1);
    let prps = driver.prps(DATA, 512);
    assert_eq!(
        driver.io(1, Entry::rw(Opcode::READ, 0, 1).prps(prps)),
        Status::SUCCESS
    );
}

#[test]
fn there_are_no_more_queues_than_the_host_was_given() {
    let rig = Rig::new();
    let mut driver = rig.driver();
    driver.enable();
    let create = |driver: &Driver, opcode: AdminOpcode, qid: u32, flags: u32| {
        let mut entry = Entry::admin(opcode).prps((driver.address(CQ), 0));
        entry.0.cdw10.set(qid | 7 << 16);
        entry.0.cdw11.set(flags);
        entry
    };
    let cq = |driver: &Driver, qid| create(driver, AdminOpcode::CREATE_IO_CQ, qid, 1);
    let sq = |driver: &Driver, qid| create(driver, AdminOpcode::CREATE_IO_SQ, qid, 1 | 1 << 16);
    // One submission queue and two completion queues, 0-based.
    let mut number = Entry::admin(AdminOpcode::SET_FEATURES).cdw10(FeatureId::NUMBER_OF_QUEUES.0.into());
    number.0.cdw11.set(1 << 16);
    assert_eq!(driver.run(0, number).result, 1 << 16);
    for (entry, expected) in [
        (cq(&driver, 1), Status::SUCCESS),
        (cq(&driver, 2), Status::SUCCESS),
        (cq(&driver, 3), Status::INVALID_QUEUE_IDENTIFIER),
        (sq(&driver, 2), Status::INVALID_QUEUE_IDENTIFIER),
        (sq(&driver, 1), Status::SUCCESS),
    ] {
        assert_eq!(driver.admin(entry), expected, "{entry:?}");
    }
    // Whoever does not ask may make all of them.
    driver.disable();
    driver.enable();
    for qid in 1..=4 {
        let entry = cq(&driver, qid);
        assert_eq!(driver.admin(entry), Status::SUCCESS);
    }
}

#[test]
fn shadow_doorbells_carry_commands_and_say_when_to_ring() {
    let rig = Rig::new();
    let mut driver = rig.driver();
    driver.enable();
    driver.make_io_queues(1);
    let prps = driver.prps(DATA, 512);
    assert_eq!(
        driver.io(1, Entry::rw(Opcode::READ, 0, 1).prps(prps)),
        Status::SUCCESS
    );
    driver.use_shadow_doorbells();
    // Over the end of the queue, with a ring only where the controller asked for one.
    for round in 0..3 * u64::from(ENTRIES) {
        assert_eq!(
            driver.io(1, Entry::rw(Opcode::READ, round, 1).prps(prps)),
            Status::SUCCESS
        );
    }
    let read = driver.address(DATA);
    let outside = Entry::admin(AdminOpcode::DOORBELL_BUFFER_CONFIG).prps((read, 0xdead_0000));
    assert_eq!(driver.admin(outside), Status::INVALID_FIELD);
}

#[test]
fn doorbells_of_queues_that_are_none_and_values_out_of_range_do_nothing() {
    let rig = Rig::new();
    let mut driver = rig.driver();
    driver.write32(offset::DOORBELLS, 1);
    driver.enable();
    driver.make_io_queues(1);
    for at in [0x1010, 0x1014, 0x1ffc] {
        driver.write32(at, 1);
    }
    driver.write32(0x1008, 60000);
    driver.write32(0x100c, 60000);
    driver
        .client
        .region_write(pci_region::BAR0, 0x1009, &[0xff; 4])
        .unwrap();
    driver
        .client
        .region_write(pci_region::BAR0, 0x1008, &[0xff; 2])
        .unwrap();
    driver.write32(0x100c, 0);
    let prps = driver.prps(DATA, 512);
    assert_eq!(
        driver.io(1, Entry::rw(Opcode::READ, 0, 1).prps(prps)),
        Status::SUCCESS
    );
}

#[test]
fn queues_on_several_threads_work_side_by_side() {
    let rig = Rig::with(|options| options.threads = 2);
    let mut driver = rig.driver();
    driver.enable();
    for qid in 1..=4 {
        driver.make_io_queues(qid);
    }
    driver.use_shadow_doorbells();
    let prps = driver.prps(DATA, 512);
    for round in 0..8 {
        for qid in 1..=4 {
            driver.put(
                qid,
                Entry::rw(Opcode::WRITE, u64::from(qid) * 8 + round, 1).prps(prps),
            );
            driver.ring(qid);
        }
        for qid in 1..=4 {
            assert_eq!(driver.next(qid).status, Status::SUCCESS);
        }
    }
}

#[test]
fn a_reset_in_mid_flight_leaves_a_controller_that_works() {
    let rig = Rig::with(|options| options.threads = 2);
    let mut driver = rig.driver();
    for kind in 0..6 {
        driver.enable();
        driver.make_io_queues(1);
        driver.make_io_queues(2);
        let prps = driver.prps(DATA, 65536);
        for cid in 0..8 {
            driver.put(
                1 + cid % 2,
                Entry::rw(Opcode::WRITE, 128 * u64::from(cid), 128)
                    .prps(prps)
                    .cid(cid),
            );
        }
        driver.ring(1);
        driver.ring(2);
        match kind % 3 {
            0 => driver.disable(),
            1 => driver.client.reset().unwrap(),
            _ => {
                // Function level reset.
                let control = driver.express() + 8;
                driver
                    .client
                    .region_write(pci_region::CONFIG, control, &[0, 0x80])
                    .unwrap();
                driver.wait_csts(|csts| csts.into_bits() == 0);
            }
        }
        driver.forget_queues();
        assert_eq!(driver.read32(offset::CSTS), 0);
    }
}

#[test]
fn a_shutdown_says_when_it_is_complete() {
    let rig = Rig::new();
    let mut driver = rig.driver();
    driver.enable();
    driver.make_io_queues(1);
    let cc = driver.read32(offset::CC);
    driver.write32(offset::CC, cc | 1 << 14);
    driver.wait_csts(|csts| csts.shst() == 2);
    driver.disable();
    driver.forget_queues();
    driver.enable();
}

#[test]
fn memory_that_is_taken_away_makes_the_controller_fatal_and_the_next_client_finds_it_well() {
    let rig = Rig::new();
    let mut driver = rig.driver();
    driver.enable();
    driver.make_io_queues(1);
    driver.unmap();
    driver.put(1, Entry::rw(Opcode::FLUSH, 0, 1));
    driver.ring(1);
    driver.wait_csts(|csts| csts.cfs());
    drop(driver);
    let mut driver = rig.driver();
    driver.enable();
}

#[test]
fn interrupts_come_on_the_vector_of_the_completion_queue() {
    let rig = Rig::new();
    let mut driver = rig.driver();
    let events = driver.set_vectors(3);
    driver.enable();
    driver.make_io_queues(2);
    assert!(nvme::wait(&events[0]), "two admin commands");
    let prps = driver.prps(DATA, 512);
    driver.put(2, Entry::rw(Opcode::READ, 0, 1).prps(prps));
    driver.ring(2);
    assert!(nvme::wait(&events[2]));
    assert_eq!(driver.next(2).status, Status::SUCCESS);
    assert!(!nvme::is_set(&events[1]));
}
