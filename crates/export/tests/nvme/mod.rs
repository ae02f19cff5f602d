//! A server over a namespace in memory (or whatever a graph describes), on a thread of its own.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use zbdkit_block::{Device, Graph, Host, OpenOptions, OsHost};
use zbdkit_export::nvme_pci::{ServeError, ServeOptions, Server, ServerHandle, Socket};
use zbdkit_io::{Runtime, RuntimeOptions};
use zbdkit_nvme::{Namespace, NamespaceOptions, Subsystem, SubsystemOptions};
use zbdkit_testkit::nvme::{Driver, DriverOptions};

/// Where the driver has the queues of identifier 1, and its data.
pub const CQ: u64 = 0x1_0000;
pub const SQ: u64 = 0x1_1000;
pub const DATA: u64 = 0x3_0000;

const PATIENCE: Duration = Duration::from_secs(30);

pub struct Rig {
    dir: tempfile::TempDir,
    handle: ServerHandle,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

/// Opens a graph.
pub fn open(graph: &str) -> Device {
    let host: Arc<dyn Host> = Arc::new(OsHost);
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    let graph = Graph::parse(graph).unwrap();
    runtime
        .block_on(graph.open(&host, &OpenOptions::default()))
        .unwrap()
}

impl Rig {
    /// Over a disk without zones.
    pub fn new() -> Rig {
        Rig::with(|_| {})
    }

    /// Over a disk without zones, with changed options.
    pub fn with(change: impl FnOnce(&mut ServeOptions)) -> Rig {
        Rig::over(open("driver=memory,size=8M"), change)
    }

    /// Over this device.
    pub fn over(device: Device, change: impl FnOnce(&mut ServeOptions)) -> Rig {
        let names = SubsystemOptions {
            nqn: "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-0000-0000-000000000001".into(),
            serial: "1".into(),
            model: "zbdkit".into(),
            firmware: "1".into(),
        };
        let namespace = Namespace::new(device, &NamespaceOptions::default()).unwrap();
        let subsystem = Subsystem::new(names, vec![namespace]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut options = ServeOptions::new(Socket::Path(dir.path().join("s")));
        options.io_queues = 4;
        change(&mut options);
        let server = Server::bind(subsystem, options).unwrap();
        let handle = server.handle();
        let thread = Some(std::thread::spawn(move || server.run()));
        Rig { dir, handle, thread }
    }

    pub fn driver(&self) -> Driver {
        let driver = Driver::connect(&self.dir.path().join("s"), DriverOptions::default());
        assert_eq!((driver.queue_at(1), driver.data()), (CQ, DATA));
        driver
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.handle.shutdown();
        let thread = self.thread.take().expect("stopped once");
        let result = thread.join();
        if !std::thread::panicking() {
            result
                .expect("the server does not panic")
                .expect("the server ends well");
        }
    }
}

/// Waits until an eventfd is signalled.
pub fn wait(event: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(event, PollFlags::IN)];
    let timeout = Timespec::try_from(PATIENCE).unwrap();
    poll(&mut fds, Some(&timeout)).unwrap() == 1
}

/// Whether it is.
pub fn is_set(event: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(event, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).unwrap() == 1
}
