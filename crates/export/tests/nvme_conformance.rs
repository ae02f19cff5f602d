//! The conformance suite through an NVMe controller, whatever is behind it.

mod nvme;

use std::path::Path;
use std::sync::Arc;

use nvme::{DATA, Rig, open};
use zbdkit_block::{
    CreateOptions, Device, Graph, Host, OpenOptions, OsHost, Qcow2CreateOptions, ZnsOptions, create,
    create_qcow2,
};
use zbdkit_io::{Runtime, RuntimeOptions};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::base::AdminOpcode;
use zbdkit_spec::nvme::nvm::Opcode;
use zbdkit_spec::nvme::zns::{SendAction, SendCdw13};
use zbdkit_testkit::conformance;
use zbdkit_testkit::nvme::{Driver, Entry, NvmeNode};

/// 12 zones of 1 MiB, three quarters of each writable; 3 may be open, 5 active, 2 have a random write area; with extensions.
const ZONED: &str = "driver=zoned,file.driver=memory,file.size=12M,zone.mode=host-managed,zone.size=1M,\
    zone.capacity=768k,zone.max_open_zones=3,zone.max_active_zones=5,zone.max_append_bytes=64k,zone.zrwa_size=64k,\
    zone.zrwa_granularity=16k,zone.max_zrwa=2,zone.descr_ext_size=192";

fn image(path: &Path) -> CreateOptions {
    CreateOptions {
        zone_size: Some(1 << 20),
        zone_capacity: Some(768 << 10),
        max_open: Some(3),
        max_active: 5,
        max_append: Some(64 << 10),
        zns: ZnsOptions {
            zrwa_size: Some(64 << 10),
            zrwa_granularity: Some(16 << 10),
            max_zrwa: Some(2),
            extension_size: 192,
        },
        ..CreateOptions::new(path, 12 << 20)
    }
}

/// Has a file made, and opens it.
fn opened(path: &Path, make: impl AsyncFnOnce(&Arc<dyn Host>)) -> Device {
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    runtime.block_on(async {
        let host: Arc<dyn Host> = Arc::new(OsHost);
        make(&host).await;
        let graph = Graph::from_path(path);
        graph.open(&host, &OpenOptions::default()).await.unwrap()
    })
}

/// The device conforms behind the door: with doorbells in registers, and then with doorbells in memory.
fn conforms(device: Device) {
    let rig = Rig::over(device, |_| {});
    for shadow in [false, true] {
        let mut driver = rig.driver();
        driver.enable();
        driver.make_io_queues(1);
        if shadow {
            driver.use_shadow_doorbells();
        }
        conform(driver);
    }
}

fn conform(driver: Driver) {
    let node = Arc::new(NvmeNode::new(driver, 1).unwrap());
    let device = Device::new(node.clone());
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    if let Err(broken) = runtime.block_on(conformance::run_on_namespace(&device)) {
        panic!("{broken}");
    }
    // Where the suite takes any error.
    assert_eq!(node.wrong_answers(), 0);
}

/// A server that polls: with doorbells by messages, which it has to understand all the same, and with doorbells that the
/// driver maps, for one driver after the other.
#[test]
fn a_controller_that_polls_conforms_with_doorbells_mapped_and_not() {
    let rig = Rig::over(open(ZONED), |options| options.polls = true);
    for mapped in [false, true, true] {
        let mut driver = rig.driver();
        if mapped {
            driver.map_doorbells();
        }
        driver.enable();
        driver.make_io_queues(1);
        conform(driver);
    }
}

#[test]
fn memory_conforms_through_the_controller() {
    conforms(open(ZONED));
}

#[test]
fn blocks_of_512_bytes_and_whole_zones_conform_through_the_controller() {
    conforms(open(
        "driver=zoned,file.driver=memory,file.size=4M,zone.mode=host-managed,block_size=512,zone.size=256k",
    ));
}

#[test]
fn raw_with_a_sidecar_conforms_through_the_controller() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zones.raw");
    conforms(opened(&path, async |host| {
        create(host, &image(&path)).await.unwrap();
    }));
}

/// Formats the namespace to this of its formats.
fn format(driver: &mut Driver, index: u32) {
    let format = Entry::admin(AdminOpcode::FORMAT_NVM).nsid(1).cdw10(index);
    assert_eq!(driver.admin(format), Status::SUCCESS);
}

/// From one format to the other with zones in use, over ends that nobody announced; in each it conforms.
fn conforms_formatted(path: &Path, make: impl AsyncFnOnce(&Arc<dyn Host>)) {
    let mut device = opened(path, make);
    for (index, block_size) in [(0, 512), (1, 4096), (0, 512)] {
        let rig = Rig::over(device, |_| {});
        let mut driver = rig.driver();
        driver.enable();
        driver.make_io_queues(1);
        // The suite left zones in many conditions, in the other blocks.
        format(&mut driver, index);
        let zone = (1 << 20) / u64::from(block_size);
        let write = Entry::rw(Opcode::WRITE, 2 * zone, 1).prps(driver.prps(DATA, block_size.into()));
        let extension = Entry::zone_send(SendAction::SET_DESCRIPTOR_EXTENSION, 3 * zone, SendCdw13::new())
            .prps(driver.prps(DATA, 192));
        let area = Entry::zone_send(SendAction::OPEN, 4 * zone, SendCdw13::new().with_zsaso(true));
        for entry in [write, extension, area] {
            assert_eq!(driver.io(1, entry), Status::SUCCESS, "{entry:?}");
        }
        drop((driver, rig));

        device = opened(path, async |_| ());
        assert_eq!(device.block_size(), block_size);
        let rig = Rig::over(device, |_| {});
        let mut driver = rig.driver();
        driver.enable();
        driver.make_io_queues(1);
        format(&mut driver, index);
        conform(driver);
        drop(rig);
        device = opened(path, async |_| ());
        assert_eq!(device.block_size(), block_size);
    }
}

#[test]
fn a_formatted_raw_image_conforms_through_the_controller_and_stays_formatted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zones.raw");
    conforms_formatted(&path, async |host| {
        create(host, &image(&path)).await.unwrap();
    });
}

#[test]
fn a_formatted_qcow2_image_conforms_through_the_controller_and_stays_formatted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zones.qcow2");
    conforms_formatted(&path, async |host| {
        let mut options = Qcow2CreateOptions::new(&path, 12 << 20);
        options.zones = Some(image(&path));
        create_qcow2(host, &options).await.unwrap();
    });
}

#[test]
fn qcow2_conforms_through_the_controller() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zones.qcow2");
    conforms(opened(&path, async |host| {
        let mut options = Qcow2CreateOptions::new(&path, 12 << 20);
        options.zones = Some(image(&path));
        create_qcow2(host, &options).await.unwrap();
    }));
}

#[test]
fn what_a_host_marks_cannot_be_read_after_a_restart_either() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zones.raw");
    let mut device = opened(&path, async |host| {
        create(host, &image(&path)).await.unwrap();
    });
    for start in 0..3 {
        let rig = Rig::over(device, |_| {});
        let mut driver = rig.driver();
        driver.enable();
        driver.make_io_queues(1);
        let mut on = |opcode, block| driver.io(1, Entry::rw(opcode, block, 8));
        if start == 0 {
            assert_eq!(on(Opcode::WRITE_ZEROES, 0), Status::SUCCESS);
            assert_eq!(on(Opcode::WRITE_UNCORRECTABLE, 0), Status::ZONE_INVALID_WRITE);
            assert_eq!(on(Opcode::WRITE_UNCORRECTABLE, 8), Status::SUCCESS);
            assert_eq!(on(Opcode::WRITE_ZEROES, 16), Status::SUCCESS);
        }
        for (block, expected) in [
            (0, Status::SUCCESS),
            (8, Status::UNRECOVERED_READ_ERROR),
            (15, Status::UNRECOVERED_READ_ERROR),
            (16, Status::SUCCESS),
        ] {
            assert_eq!(
                on(Opcode::VERIFY, block),
                expected,
                "start {start}, block {block}"
            );
        }
        if start == 2 {
            let reset = Entry::zone_send(SendAction::RESET, 0, SendCdw13::new());
            assert_eq!(driver.io(1, reset), Status::SUCCESS);
            assert_eq!(driver.io(1, Entry::rw(Opcode::VERIFY, 8, 8)), Status::SUCCESS);
        }
        drop(driver);
        drop(rig);
        device = opened(&path, async |_| {});
    }
    assert!(device.marks().is_empty());
}
