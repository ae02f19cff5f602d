//! NVMe commands that take their time: queues deleted, controllers reset and memory taken away meanwhile.

mod gate;
mod nvme;

use std::sync::Arc;
use std::time::Duration;

use gate::{Gate, State};
use nvme::{DATA, Rig};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::AdminOpcode;
use zbdkit_spec::nvme::controller::offset;
use zbdkit_spec::nvme::nvm::Opcode;
use zbdkit_spec::vfio_user::pci_region;
use zbdkit_testkit::nvme::{Driver, Entry};

/// Commands in each of the two queues.
const COMMANDS: u16 = 6;

/// Two queues on two threads over a gate that is shut, both with commands that wait there.
fn held() -> (Rig, Driver, Arc<State>) {
    let (device, state) = Gate::device();
    let rig = Rig::over(device, |options| options.threads = 2);
    let mut driver = rig.driver();
    enable(&mut driver);
    state.shut();
    submit(&mut driver);
    state.wait_for(2 * usize::from(COMMANDS));
    (rig, driver, state)
}

fn enable(driver: &mut Driver) {
    driver.enable();
    driver.make_io_queues(1);
    driver.make_io_queues(2);
}

fn read(driver: &Driver, cid: u16) -> Entry {
    let prps = driver.prps(DATA + u64::from(cid) * 4096, 4096);
    Entry::rw(Opcode::READ, 0, 8).prps(prps).cid(cid)
}

fn submit(driver: &mut Driver) {
    for qid in 1..=2 {
        for cid in 0..COMMANDS {
            driver.put(qid, read(driver, cid));
        }
        driver.ring(qid);
    }
}

fn works(driver: &mut Driver) {
    for qid in 1..=2 {
        driver.fill(DATA, &[0; 4096]);
        let entry = read(driver, 0);
        assert_eq!(driver.io(qid, entry), Status::SUCCESS);
        assert_eq!(driver.get(DATA, 4096), [0x42; 4096]);
    }
}

fn delete(cid: u16, qid: u32) -> Entry {
    Entry::admin(AdminOpcode::DELETE_IO_SQ).cdw10(qid).cid(cid)
}

#[test]
fn a_queue_is_deleted_once_its_commands_are_done_however_often_it_is_asked_for() {
    let (_rig, mut driver, state) = held();
    for cid in 0..3 {
        driver.put(0, delete(cid, 2));
    }
    driver.ring(0);
    for _ in 0..2 {
        let done = driver.next(0);
        assert_eq!(
            done.status,
            Status::INVALID_QUEUE_IDENTIFIER,
            "it is going already"
        );
        assert_ne!(done.cid, 0);
    }
    let in_use = Entry::admin(AdminOpcode::DELETE_IO_CQ).cdw10(2);
    assert_eq!(driver.admin(in_use), Status::INVALID_QUEUE_DELETION);
    assert!(driver.try_next(0).is_none() && driver.try_next(2).is_none());
    state.open();
    for _ in 0..COMMANDS {
        assert_eq!(driver.next(2).status, Status::SUCCESS);
    }
    let done = driver.next(0);
    assert_eq!((done.cid, done.status), (0, Status::SUCCESS));
    assert_eq!(driver.admin(in_use), Status::SUCCESS);
    driver.make_io_queues(2);
    for _ in 0..COMMANDS {
        assert_eq!(driver.next(1).status, Status::SUCCESS);
    }
    works(&mut driver);
}

/// A reset while a queue is being deleted: `begin` starts it, and `finish` waits for it once the commands can go on.
fn reset_while_deleting(begin: impl FnOnce(&mut Driver), finish: impl FnOnce(&mut Driver)) {
    let (_rig, mut driver, state) = held();
    driver.put(0, delete(0, 2));
    driver.put(0, delete(1, 1));
    driver.ring(0);
    // One that is refused says that those before it have begun.
    assert_eq!(driver.admin(delete(2, 7)), Status::INVALID_QUEUE_IDENTIFIER);
    begin(&mut driver);
    state.open();
    finish(&mut driver);
    driver.forget_queues();
    enable(&mut driver);
    works(&mut driver);
}

#[test]
fn a_controller_is_disabled_while_queues_are_being_deleted() {
    reset_while_deleting(
        |driver| driver.write32(offset::CC, 0),
        |driver| driver.wait_csts(|csts| !csts.rdy()),
    );
}

#[test]
fn a_function_is_reset_while_queues_are_being_deleted() {
    reset_while_deleting(
        |driver| {
            let control = driver.express() + 8;
            driver
                .client
                .region_write(pci_region::CONFIG, control, &[0, 0x80])
                .unwrap();
        },
        |driver| driver.wait_csts(|csts| csts.into_bits() == 0),
    );
}

#[test]
fn a_shutdown_waits_for_commands_and_for_queues_that_are_being_deleted() {
    reset_while_deleting(
        |driver| {
            let cc = driver.read32(offset::CC);
            driver.write32(offset::CC, cc | 1 << 14);
        },
        |driver| {
            driver.wait_csts(|csts| csts.shst() == 2);
            driver.disable();
        },
    );
}

#[test]
fn memory_is_taken_away_once_the_commands_that_use_it_are_done() {
    let (rig, mut driver, state) = held();
    let waiting = state.clone();
    // Whether the server waits already does not matter: it must not answer before.
    let opener = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        waiting.open();
    });
    driver.unmap();
    assert_eq!(state.waiting(), 0, "a command still has the memory");
    opener.join().unwrap();
    driver.wait_csts(|csts| csts.cfs());
    driver.client.reset().unwrap();
    assert_eq!(driver.read32(offset::CSTS), 0);
    drop(driver);
    let mut driver = rig.driver();
    enable(&mut driver);
    works(&mut driver);
}

#[test]
fn a_client_that_goes_under_commands_leaves_a_controller_that_works() {
    let (rig, driver, state) = held();
    drop(driver);
    state.open();
    let mut driver = rig.driver();
    enable(&mut driver);
    works(&mut driver);
}

#[test]
fn requests_for_events_can_be_aborted_and_other_commands_are_not() {
    let (_rig, mut driver, state) = held();
    let abort = |sqid: u32, cid: u32| Entry::admin(AdminOpcode::ABORT).cdw10(sqid | cid << 16);
    driver.put(0, Entry::admin(AdminOpcode::ASYNC_EVENT_REQUEST).cid(5));
    driver.put(0, abort(0, 5).cid(6));
    driver.put(0, abort(1, 0).cid(7));
    driver.put(0, abort(99, 99).cid(8));
    driver.ring(0);
    let mut done: Vec<_> = (0..4).map(|_| driver.next(0)).collect();
    done.sort_by_key(|done| done.cid);
    let seen: Vec<_> = done
        .iter()
        .map(|done| (done.cid, done.status, done.result))
        .collect();
    let expected = [
        (5, Status::ABORT_REQUESTED, 0),
        (6, Status::SUCCESS, 0),
        (7, Status::SUCCESS, 1),
        (8, Status::SUCCESS, 1),
    ];
    assert_eq!(seen, expected);
    state.open();
    for qid in 1..=2 {
        for _ in 0..COMMANDS {
            assert_eq!(driver.next(qid).status, Status::SUCCESS);
        }
    }
    works(&mut driver);
}
