//! A directory for images, a runtime, and what tests do with devices.
#![allow(dead_code, reason = "each test program uses some of it")]

pub mod zns;

use std::fs::File as StdFile;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use zbdkit_block::{
    CreateOptions, CrossZone, Device, Error, Graph, Host, OpenError, OpenOptions, OsHost, ZoneOp, create,
};
use zbdkit_io::{File, FileKind, IoBuf, Runtime, RuntimeOptions};
use zbdkit_qcow2::Layout;
use zbdkit_zone::{Filter, ZoneInfo};

pub struct Rig {
    dir: tempfile::TempDir,
    runtime: Runtime,
}

pub fn host() -> Arc<dyn Host> {
    Arc::new(OsHost)
}

/// Bytes that tell where they were written, and by whom.
pub fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| seed ^ (i as u8) ^ ((i >> 8) as u8).wrapping_mul(31))
        .collect()
}

impl Rig {
    pub fn new() -> Rig {
        Rig::within(tempfile::tempdir().unwrap())
    }

    /// In a directory where direct I/O works as on disks, if there is one.
    pub fn on_disk() -> Rig {
        let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        Rig::within(tempfile::tempdir_in(target).unwrap())
    }

    fn within(dir: tempfile::TempDir) -> Rig {
        Rig {
            dir,
            runtime: Runtime::new(RuntimeOptions::default()).unwrap(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// An image without zones, made by the format alone.
    pub fn plain(&self, name: &str, layout: &Layout) {
        let make = |name: &str| {
            let file = StdFile::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(self.path(name));
            File::from_fd(file.unwrap().into(), FileKind::default())
        };
        let file = make(name);
        let data = layout.data_file.as_deref().map(make);
        self.block_on(zbdkit_qcow2::create(&file, data.as_ref(), layout))
            .unwrap();
    }

    pub fn zoned_raw(&self, name: &str, size: u64, zone_size: u64) {
        let mut options = CreateOptions::new(self.path(name), size);
        options.zone_size = Some(zone_size);
        self.block_on(create(&host(), &options)).unwrap();
    }

    pub fn try_open(&self, name: &str, options: OpenOptions) -> Result<Device, OpenError> {
        let options = OpenOptions {
            // The kernel may let go of a closed file a little later.
            lock_wait: Duration::from_secs(3),
            ..options
        };
        self.block_on(Graph::from_path(self.path(name)).open(&host(), &options))
    }

    pub fn open(&self, name: &str) -> Device {
        match self.try_open(name, OpenOptions::default()) {
            Ok(device) => device,
            Err(error) => panic!("{error}"),
        }
    }

    pub fn open_read_only(&self, name: &str) -> Device {
        let options = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        match self.try_open(name, options) {
            Ok(device) => device,
            Err(error) => panic!("{error}"),
        }
    }

    pub fn open_error(&self, name: &str) -> String {
        let opened = self.try_open(name, OpenOptions::default());
        opened.err().expect("does not open").to_string()
    }

    pub fn open_graph(&self, text: &str) -> Result<Device, OpenError> {
        let options = OpenOptions {
            // The kernel may let go of a closed file a little later.
            lock_wait: Duration::from_secs(3),
            ..OpenOptions::default()
        };
        self.block_on(Graph::parse(text)?.open(&host(), &options))
    }

    pub fn try_write(&self, device: &Device, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let buf = IoBuf::from_vec(bytes.to_vec());
        self.block_on(device.write(&device.lane(4), buf, offset))
    }

    pub fn write(&self, device: &Device, offset: u64, bytes: &[u8]) {
        self.try_write(device, offset, bytes).unwrap();
    }

    pub fn read(&self, device: &Device, offset: u64, len: usize) -> Vec<u8> {
        let buf = IoBuf::alloc(len);
        self.block_on(device.read(&device.lane(4), buf.clone(), offset, CrossZone::Allow))
            .unwrap();
        buf.to_vec()
    }

    pub fn flush(&self, device: &Device) {
        self.block_on(device.flush(&device.lane(1))).unwrap();
    }

    pub fn op(&self, device: &Device, op: ZoneOp, zone_start: u64) -> Result<(), Error> {
        self.block_on(device.zone_op(&device.lane(4), op, zone_start))
    }

    pub fn zones(&self, device: &Device) -> Vec<ZoneInfo> {
        self.block_on(device.report(0, Filter::All, usize::MAX)).unwrap()
    }

    pub fn close(&self, device: Device) {
        self.block_on(device.close()).unwrap();
    }
}
