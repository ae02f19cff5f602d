//! A server over a device in memory (or whatever a graph describes), on a thread of its own.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use zbdkit_block::{Device, Graph, Host, OpenOptions, OsHost};
use zbdkit_export::vhost_user_blk::{ServeError, ServeOptions, Server, ServerHandle, Socket};
use zbdkit_io::{Runtime, RuntimeOptions};
use zbdkit_testkit::client::{Client, ClientError, Options};

/// Bytes of the zones that [`ZONED`] has.
pub const ZONE: u64 = 1 << 20;
/// The same in sectors.
pub const ZONE_SECTORS: u64 = ZONE / 512;

/// 8 zones of 1 MiB, the first conventional, three quarters of each writable; 3 may be open, 4 active.
pub const ZONED: &str = "driver=zoned,file.driver=memory,file.size=8M,zone.mode=host-managed,zone.size=1M,\
    zone.capacity=768k,zone.conventional_zones=1,zone.max_open_zones=3,zone.max_active_zones=4,\
    zone.max_append_bytes=64k";
/// A disk without zones.
pub const PLAIN: &str = "driver=memory,size=8M";

/// Opens a graph.
pub fn open(graph: &str) -> Device {
    open_with(graph, &OpenOptions::default())
}

/// Opens a graph.
pub fn open_with(graph: &str, options: &OpenOptions) -> Device {
    let host: Arc<dyn Host> = Arc::new(OsHost);
    let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
    let graph = Graph::parse(graph).unwrap();
    runtime.block_on(graph.open(&host, options)).unwrap()
}

/// A running server. Shut down, and checked to end well, when dropped.
pub struct Rig {
    dir: tempfile::TempDir,
    handle: ServerHandle,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Rig {
    /// Serves a graph.
    pub fn new(graph: &str) -> Rig {
        Rig::with(open(graph), |_| {})
    }

    /// Serves a device with changed options.
    pub fn with(device: Device, change: impl FnOnce(&mut ServeOptions)) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let mut options = ServeOptions::new(Socket::Path(dir.path().join("s")));
        options.queues = 2;
        options.queue_size = 128;
        change(&mut options);
        let server = Server::bind(device, options).unwrap();
        let handle = server.handle();
        let thread = Some(std::thread::spawn(move || server.run()));
        Rig { dir, handle, thread }
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// Connects with everything that client and server know.
    pub fn client(&self) -> Client {
        self.client_with(|_| {})
    }

    /// Connects with changed options.
    pub fn client_with(&self, change: impl FnOnce(&mut Options)) -> Client {
        self.try_client(change).unwrap()
    }

    /// Connects with changed options, or not.
    pub fn try_client(&self, change: impl FnOnce(&mut Options)) -> Result<Client, ClientError> {
        let mut options = options();
        change(&mut options);
        Client::connect(&self.socket(), &options)
    }

    /// Ends the server.
    pub fn stop(&mut self) -> Result<(), ServeError> {
        self.handle.shutdown();
        self.thread
            .take()
            .expect("stopped once")
            .join()
            .expect("the server does not panic")
    }

    /// Asks the server to end, without waiting.
    pub fn begin_stop(&self) {
        self.handle.shutdown();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if self.thread.is_some() && !std::thread::panicking() {
            self.stop().expect("the server ends well");
            assert!(!Path::exists(&self.socket()), "the socket is removed");
        }
    }
}

/// What clients of these tests start from.
pub fn options() -> Options {
    Options {
        max_data: 256 << 10,
        scratch: 64 << 10,
        patience: Duration::from_secs(20),
        ..Options::default()
    }
}

/// Data that tells where it belongs.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| (seed.wrapping_mul(31) + i / 512 * 7 + i) as u8)
        .collect()
}
