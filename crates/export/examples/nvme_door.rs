//! What the NVMe controller costs: 4 KiB commands through the vfio-user door, from a driver in this process, with nothing
//! slower than memory behind it.
//!
//! `cargo run --release -p zbdkit-export --example nvme_door [SECONDS]` prints for each case commands a second, and commands
//! for a second of the controller's CPU time, which is what a core of the host can serve when the guest takes none of it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use zbdkit_block::{Graph, Host, OpenOptions, OsHost};
use zbdkit_export::nvme_pci::{ServeOptions, Server, Socket};
use zbdkit_io::{Runtime, RuntimeOptions};
use zbdkit_nvme::{Namespace, NamespaceOptions, Subsystem, SubsystemOptions};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::nvm::Opcode;
use zbdkit_spec::nvme::zns::{SendAction, SendCdw13};
use zbdkit_testkit::nvme::{Driver, DriverOptions, Entry, PAGE};

/// Blocks are of 4 KiB, zones of 64 MiB.
const GRAPH: &str =
    "driver=zoned,file.driver=memory,file.size=512M,zone.mode=host-managed,block_size=4096,zone.size=64M";
const ZONE: u64 = (64 << 20) / PAGE;
const ZONES: u64 = 8;
const QUEUE: u16 = 1;
/// The identifier of resets.
const RESET: u16 = 60;

/// What is done with a block.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Append,
}

fn main() {
    let seconds = std::env::args().nth(1).map(|text| text.parse().expect("seconds"));
    let length = Duration::from_secs_f64(seconds.unwrap_or(2.0));
    let directory = tempfile::tempdir().expect("a directory for the socket");
    let socket = directory.path().join("s");
    let server = serve(&socket);
    let handle = server.handle();
    let thread = std::thread::Builder::new().name("nvme-server".into());
    let thread = thread.spawn(move || server.run()).expect("a thread");
    let options = DriverOptions {
        entries: 64,
        ..DriverOptions::default()
    };
    let mut driver = Driver::connect(&socket, options);
    driver.enable();
    driver.make_io_queues(QUEUE);
    driver.use_shadow_doorbells();
    println!(
        "{:8} {:>3} {:>12} {:>16}",
        "", "QD", "commands/s", "per CPU second"
    );
    for (name, kind) in [
        ("write", Kind::Write),
        ("append", Kind::Append),
        ("read", Kind::Read),
    ] {
        for depth in [1, 32] {
            let mut load = Load::new(&mut driver, kind, depth);
            let cpu = controller_cpu();
            let begin = Instant::now();
            let done = load.run(begin + length);
            let (wall, cpu) = (begin.elapsed(), controller_cpu() - cpu);
            println!(
                "{name:8} {depth:>3} {:>12.0} {:>16.0}",
                done as f64 / wall.as_secs_f64(),
                done as f64 / cpu.as_secs_f64()
            );
        }
    }
    drop(driver);
    handle.shutdown();
    thread.join().expect("no panic").expect("a good end");
}

fn serve(socket: &Path) -> Server {
    let host: Arc<dyn Host> = Arc::new(OsHost);
    let runtime = Runtime::new(RuntimeOptions::default()).expect("a runtime");
    let graph = Graph::parse(GRAPH).expect("a graph");
    let device = runtime.block_on(graph.open(&host, &OpenOptions::default()));
    let namespace = Namespace::new(device.expect("memory"), &NamespaceOptions::default());
    let names = SubsystemOptions {
        nqn: "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-0000-0000-000000000001".into(),
        serial: "1".into(),
        model: "zbdkit".into(),
        firmware: "1".into(),
    };
    let subsystem = Subsystem::new(names, vec![namespace.expect("a namespace")]).expect("a subsystem");
    Server::bind(subsystem, ServeOptions::new(Socket::Path(socket.into()))).expect("a server")
}

/// CPU time of the threads that serve: those that are named so, but for the driver's, which has the program's name.
fn controller_cpu() -> Duration {
    let driver = std::process::id().to_string();
    let tasks = std::fs::read_dir("/proc/self/task").expect("/proc").flatten();
    let tasks = tasks.filter(|task| task.file_name() != *driver);
    let times = tasks.filter_map(|task| {
        let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
        let spent = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        let spent = spent.split(' ').next()?.parse().ok()?;
        name.starts_with("nvme").then_some(Duration::from_nanos(spent))
    });
    times.sum()
}

/// A queue kept full.
struct Load<'a> {
    driver: &'a mut Driver,
    kind: Kind,
    depth: u16,
    /// The block that the next command is for.
    next: u64,
    in_flight: u16,
}

impl Load<'_> {
    fn new(driver: &mut Driver, kind: Kind, depth: u16) -> Load<'_> {
        let all = Entry::zone_send(SendAction::RESET, 0, SendCdw13::new().with_select_all(true));
        assert_eq!(driver.io(QUEUE, all), Status::SUCCESS);
        if kind == Kind::Read {
            fill(driver);
        }
        Load {
            driver,
            kind,
            depth,
            next: 0,
            in_flight: 0,
        }
    }

    /// Commands that were done until then.
    fn run(&mut self, end: Instant) -> u64 {
        let mut done = 0;
        for cid in 0..self.depth {
            self.submit(cid);
        }
        self.driver.ring(QUEUE);
        while self.in_flight > 0 {
            let goes_on = done % 64 != 0 || Instant::now() < end;
            let mut taken = 0;
            while let Some(completion) = self.driver.try_next(QUEUE) {
                assert_eq!(completion.status, Status::SUCCESS);
                self.in_flight -= 1;
                taken += 1;
                if completion.cid == RESET {
                    continue;
                }
                done += 1;
                if goes_on {
                    self.submit(completion.cid);
                }
            }
            if taken > 0 {
                self.driver.free(QUEUE, taken);
                self.driver.ring(QUEUE);
            }
        }
        done
    }

    fn submit(&mut self, cid: u16) {
        let block = self.next;
        self.next = (block + 1) % (ZONE * ZONES);
        let at = self.driver.data() + u64::from(cid) * PAGE;
        let entry = match self.kind {
            Kind::Read => Entry::rw(Opcode::READ, block * 0x9e37_79b1 % (ZONE * ZONES), 1),
            Kind::Write => Entry::rw(Opcode::WRITE, block, 1),
            Kind::Append => Entry::append(block / ZONE * ZONE, 1),
        };
        let entry = entry.prps((self.driver.address(at), 0)).cid(cid);
        self.driver.put(QUEUE, entry);
        self.in_flight += 1;
        // Half a zone before it is needed, the next one becomes empty again.
        if self.kind != Kind::Read && block % ZONE == ZONE / 2 {
            let next = (block / ZONE + 1) % ZONES * ZONE;
            let reset = Entry::zone_send(SendAction::RESET, next, SendCdw13::new());
            self.driver.put(QUEUE, reset.cid(RESET));
            self.in_flight += 1;
        }
    }
}

/// Writes every block.
fn fill(driver: &mut Driver) {
    const BLOCKS: u32 = 256;
    let prps = driver.prps(driver.data(), u64::from(BLOCKS) * PAGE);
    for block in (0..ZONE * ZONES).step_by(BLOCKS as usize) {
        let write = Entry::rw(Opcode::WRITE, block, BLOCKS).prps(prps);
        assert_eq!(driver.io(QUEUE, write), Status::SUCCESS);
    }
}
