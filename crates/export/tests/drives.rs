//! Drives behind the door: the suites run through it, and what the drive holds against a request arrives as its status.

mod common;

use std::sync::Arc;

use common::{Rig, ZONED};
use zbdkit_block::Device;
use zbdkit_block::host_device::{Drive, HostDeviceNode};
use zbdkit_export::vhost_user_blk::{BindError, ServeOptions, Server, Socket, Unsuitable};
use zbdkit_io::{Runtime, RuntimeOptions};
use zbdkit_testkit::client::{Client, DoorNode, Options};
use zbdkit_testkit::conformance;
use zbdkit_testkit::drive::FakeDrive;
use zbdkit_zone::{GeometrySpec, Model, Zns};

const SPEC: GeometrySpec = GeometrySpec {
    model: Model::HostManaged,
    size: 8 << 20,
    zone_size: 1 << 20,
    zone_capacity: 768 << 10,
    nr_conventional: 2,
    block_size: 4096,
    max_open: 3,
    max_active: 4,
    max_append: 64 << 10,
    zns: Zns::NONE,
};

fn runtime() -> Runtime {
    Runtime::new(RuntimeOptions::default()).unwrap()
}

fn device(runtime: &Runtime, drive: FakeDrive) -> Device {
    let drive: Arc<dyn Drive> = Arc::new(drive);
    Device::new(Arc::new(runtime.block_on(HostDeviceNode::open(drive)).unwrap()))
}

fn conforms(runtime: &Runtime, client: Client) {
    let device = Device::new(Arc::new(DoorNode::new(client).unwrap()));
    if let Err(broken) = runtime.block_on(conformance::run_on_drive(&device)) {
        panic!("{broken}");
    }
}

fn large(options: &mut Options) {
    options.max_data = 2 << 20;
    options.slots = 2;
}

#[test]
fn a_drive_conforms_through_the_door_whoever_places_appends() {
    for place in [false, true] {
        let runtime = runtime();
        let rig = Rig::with(device(&runtime, FakeDrive::new(SPEC, place, 5)), |_| {});
        conforms(&runtime, rig.client_with(large));
    }
}

#[test]
fn an_image_conforms_through_the_door() {
    let rig = Rig::new(ZONED);
    conforms(&runtime(), rig.client_with(large));
}

#[test]
fn a_geometry_that_the_door_cannot_show_is_refused_at_start_up() {
    let runtime = runtime();
    let odd = GeometrySpec {
        size: 8 * (768 << 10),
        zone_size: 768 << 10,
        ..SPEC
    };
    let refused = |drive: FakeDrive| {
        let directory = tempfile::tempdir().unwrap();
        let options = ServeOptions::new(Socket::Path(directory.path().join("z.sock")));
        let device = device(&runtime, drive);
        match Server::bind(device, options).err().expect("is refused") {
            BindError::Unsuitable(why) => why,
            other => panic!("{other}"),
        }
    };
    assert!(matches!(
        refused(FakeDrive::new(odd, false, 6)),
        Unsuitable::ZoneSizeNotPowerOfTwo(786432)
    ));
    let coarse = FakeDrive::new(SPEC, false, 6).with_granularity(8192);
    assert!(matches!(
        refused(coarse),
        Unsuitable::WriteGranularity {
            granularity: 8192,
            block_size: 4096
        }
    ));
}
