//! `zbdkit serve`: the daemon. Opens images, attaches them to doors, and ends cleanly when asked to.

mod config;
mod control;
mod doors;
mod hints;
mod identity;
mod namespace;
mod service;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use zbdkit_block::{Device, Graph, OpenOptions, RunStateMode, parse_size, run_state_of};
use zbdkit_io::BackendKind;

use crate::image::{ImageArgs, Session};
use crate::output::{Out, Usage, complain, describe};
use control::Control;
use doors::{Door, Handle, Server};
use namespace::{Argument, Shown};
use service::{Event, Handed};

/// Serve images to virtual machines until SIGTERM or SIGINT
#[derive(Debug, Args)]
#[command(override_usage = USAGE, after_help = AFTER_HELP)]
pub struct Serve {
    /// The image: a path, driver=... options, or json:{...} (see 'zbdkit help')
    #[arg(value_name = "IMAGE", required_unless_present_any = ["config", "nvme"], requires = "vhost_user_blk")]
    pub image: Option<OsString>,

    /// Take IMAGE, of namespaces too, as driver options whatever it looks like
    #[arg(long)]
    pub image_opts: bool,

    /// Attach the image as a virtio-blk device over vhost-user at this unix socket; 'systemd' takes a socket that
    /// systemd hands over. May be given several times
    #[arg(long, value_name = "SOCKET", required_unless_present_any = ["config", "nvme"], requires = "image")]
    pub vhost_user_blk: Vec<PathBuf>,

    /// Be an NVMe controller over vfio-user at this unix socket; 'systemd' as above
    #[arg(long, value_name = "SOCKET", requires = "namespace", conflicts_with = "image")]
    pub nvme: Option<PathBuf>,

    /// A namespace of the controller: an image, as IMAGE, and behind it how it is opened and shown. Its options are
    /// read-only=on, direct=on, run-state=WHERE, uuid=UUID and read-across-zones=on. What its zones have is the image's:
    /// append limit, random write areas, descriptor extensions (see 'zbdkit create'). May be given several times; the first
    /// is namespace 1
    #[arg(long, value_name = "IMAGE[,OPTION=VALUE]...", requires = "nvme")]
    pub namespace: Vec<OsString>,

    /// Most data of a command of the controller (MDTS): a power of two from 8K to 16M
    #[arg(long, value_name = "BYTES", requires = "nvme", value_parser = max_transfer, default_value = "1M")]
    pub max_transfer: MaxTransfer,

    /// Take requests of an operator at this unix socket: 'zbdkit set-zone --control SOCKET'
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,

    /// Serve what this file says
    #[arg(long, value_name = "FILE", conflicts_with_all = ["image", "image_opts", "vhost_user_blk", "nvme",
        "namespace", "control", "max_transfer", "serial", "read_only", "direct", "run_state", "queues", "queue_size", "poll_us", "poll"])]
    pub config: Option<PathBuf>,

    /// Request queues, each with a thread of its own, 1 to 256 [default: one a CPU, at most 4]. Of an NVMe controller:
    /// I/O queues, 1 to 511, on as many threads as there are CPUs, at most 4 [default: 16]
    #[arg(long, value_name = "N")]
    pub queues: Option<u16>,

    /// Entries of each queue, a power of two
    #[arg(long, value_name = "N", default_value_t = DEFAULT_QUEUE_SIZE)]
    pub queue_size: u16,

    /// The serial number that the guest sees, at most 20 bytes [default: from the image's uuid]
    #[arg(long, value_name = "TEXT")]
    pub serial: Option<String>,

    /// Let nobody write
    #[arg(short, long)]
    pub read_only: bool,

    /// Bypass the host's page cache
    #[arg(long = "direct", visible_alias = "cache.direct")]
    pub direct: bool,

    /// What outlives kill -9 besides what was flushed: everything, by a file 'beside' the zone table or in a DIRECTORY
    /// (fastest on a tmpfs), or by a 'sync' a write; or 'none'
    #[arg(long, value_name = "WHERE", default_value = "beside")]
    pub run_state: String,

    /// How long to watch an idle queue before sleeping, in microseconds
    #[arg(long, value_name = "MICROSECONDS", default_value_t = DEFAULT_POLL_US)]
    pub poll_us: u32,

    /// NVMe: never sleep while the guest has queues. Its driver rings without leaving the guest then, which makes single
    /// requests faster. One thread serves all queues, and takes a CPU as long as the guest runs
    #[arg(long, requires = "nvme")]
    pub poll: bool,
}

pub const DEFAULT_QUEUE_SIZE: u16 = 256;
const DEFAULT_POLL_US: u32 = 50;

/// As clap would write it, '--config' would seem to want an image.
const USAGE: &str = "\
zbdkit serve [OPTIONS] <IMAGE> --vhost-user-blk <SOCKET>
       zbdkit serve [OPTIONS] --nvme <SOCKET> --namespace <IMAGE>
       zbdkit serve --config <FILE>";

const AFTER_HELP: &str = "\
Examples:
  zbdkit serve disk.raw --vhost-user-blk /tmp/disk.sock
  zbdkit serve driver=memory,size=1G --vhost-user-blk /tmp/ram.sock --queues 4
  zbdkit serve --nvme /tmp/nvme.sock --namespace boot.qcow2,read-only=on --namespace zones.qcow2
  zbdkit serve --config /etc/zbdkit.toml

It prints the arguments of QEMU and crosvm (NVMe: Cloud Hypervisor) to paste, then a line that begins with 'ready:', and goes on until SIGTERM or \
SIGINT, which closes the images cleanly; a second signal ends it at once. A virtual machine may come, go and come again. \
Under systemd it says when it is ready (Type=notify) and takes sockets (SOCKET is 'systemd'; in the order of the doors).

Configuration:
  control = \"/run/zbdkit.ctl\"  # for 'zbdkit set-zone --control'
  [[device]]
  image = \"disk.raw\"           # as IMAGE above; relative to where zbdkit is started
  read-only = false
  direct = false
  run-state = \"beside\"
  [[device.vhost-user-blk]]    # a door; there may be several
  socket = \"/run/disk.sock\"
  queues = 2
  queue-size = 256
  serial = \"disk-1\"
  poll-us = 50

  [[nvme]]                     # an NVMe controller; there may be several
  socket = \"/run/nvme.sock\"
  queues = 16
  serial = \"nvme-1\"
  poll-us = 50
  max-transfer = \"1M\"
  [[nvme.namespace]]           # with the keys of an image, as above, and:
  image = \"zones.qcow2\"
  read-across-zones = false";

/// What is to be served.
struct Plan {
    devices: Vec<DevicePlan>,
    doors: Vec<DoorPlan>,
    /// Where the operator is listened to.
    control: Option<PathBuf>,
}

struct DevicePlan {
    /// The image as the user names it.
    name: String,
    graph: Graph,
    options: OpenOptions,
    /// As a namespace.
    shown: Shown,
}

/// A way to attach devices.
struct DoorPlan {
    /// A path, or [`SYSTEMD`].
    socket: PathBuf,
    /// The devices behind it, by their place in the plan.
    devices: Vec<usize>,
    kind: DoorKind,
    queues: Option<u16>,
    serial: Option<String>,
    poll: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DoorKind {
    /// virtio-blk over vhost-user, one device, with queues of this size.
    VhostUserBlk { queue_size: u16 },
    /// An NVMe controller over vfio-user.
    Nvme { max_transfer: MaxTransfer, polls: bool },
}

/// Most data of an NVMe command, as a power of two of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaxTransfer(u8);

impl Default for MaxTransfer {
    fn default() -> MaxTransfer {
        MaxTransfer(8)
    }
}

impl MaxTransfer {
    fn bytes(self) -> u64 {
        0x1000 << self.0
    }
}

fn max_transfer(text: &str) -> Result<MaxTransfer, String> {
    match parse_size(text) {
        Some(size @ 0x2000..=0x100_0000) if size.is_power_of_two() => {
            Ok(MaxTransfer(size.ilog2() as u8 - 12))
        }
        _ => Err("it is a power of two from 8K to 16M".to_owned()),
    }
}

impl DoorKind {
    fn name(self) -> &'static str {
        match self {
            DoorKind::VhostUserBlk { .. } => "vhost-user-blk",
            DoorKind::Nvme { .. } => "nvme",
        }
    }
}

/// As a socket's path: one that systemd hands over.
const SYSTEMD: &str = "systemd";

pub fn run(args: Serve) -> anyhow::Result<ExitCode> {
    let (sender, events) = service::signals().context("cannot handle signals")?;
    let plan = match &args.config {
        Some(path) => config::read(path)?,
        None => plan_of(args)?,
    };
    let session = Session::new()?;
    let mut handed = Handed::from_environment();
    let served = Served::start(&session, &plan, &mut handed)?;
    // The place to give up what is not needed any more: images are open, sockets bound, no request was served yet.
    let running = served.run(&plan, sender, events);
    running.wait(&session, &plan)
}

fn plan_of(args: Serve) -> anyhow::Result<Plan> {
    let poll = Duration::from_micros(args.poll_us.into());
    let (images, sockets, kind) = match args.nvme {
        Some(socket) => {
            let parsed = args
                .namespace
                .iter()
                .map(|argument| Argument::parse(argument, args.image_opts));
            let max_transfer = args.max_transfer;
            (
                parsed.collect::<Result<_, _>>()?,
                vec![socket],
                DoorKind::Nvme {
                    max_transfer,
                    polls: args.poll,
                },
            )
        }
        None => {
            let image = args.image.map(|image| Argument {
                image,
                ..Argument::default()
            });
            let queue_size = args.queue_size;
            let images: Vec<_> = image.into_iter().collect();
            (images, args.vhost_user_blk, DoorKind::VhostUserBlk { queue_size })
        }
    };
    let device = |argument: Argument| {
        let image = ImageArgs {
            image: argument.image,
            image_opts: args.image_opts,
        };
        Ok(DevicePlan {
            name: image.image.to_string_lossy().into_owned(),
            graph: image.graph()?,
            options: open_options(
                argument.read_only.unwrap_or(args.read_only),
                argument.direct.unwrap_or(args.direct),
                argument.run_state.as_ref().unwrap_or(&args.run_state),
            )?,
            shown: argument.shown,
        })
    };
    let devices: Vec<_> = images.into_iter().map(device).collect::<anyhow::Result<_>>()?;
    let doors = sockets.into_iter().map(|socket| DoorPlan {
        socket,
        devices: (0..devices.len()).collect(),
        kind,
        queues: args.queues,
        serial: args.serial.clone(),
        poll,
    });
    Ok(Plan {
        doors: doors.collect(),
        devices,
        control: args.control,
    })
}

fn open_options(read_only: bool, direct: bool, run_state: &str) -> anyhow::Result<OpenOptions> {
    let run_state = run_state_of(run_state);
    if let RunStateMode::In(directory) = &run_state
        && !directory.is_dir()
    {
        return Err(Usage(format!(
            "run state {}: it is neither 'beside', 'sync' or 'none', nor a directory",
            directory.display()
        ))
        .into());
    }
    Ok(OpenOptions {
        read_only,
        direct,
        run_state,
        ..OpenOptions::default()
    })
}

/// Open images and bound sockets.
struct Served {
    devices: Vec<Device>,
    doors: Vec<Door>,
    control: Option<Control>,
}

impl Served {
    /// Opens all images, then binds all sockets. What was opened is closed again where that fails.
    fn start(session: &Session, plan: &Plan, handed: &mut Handed) -> anyhow::Result<Served> {
        let mut served = Served {
            devices: Vec::new(),
            doors: Vec::new(),
            control: None,
        };
        match served.fill(session, plan, handed) {
            Ok(()) => Ok(served),
            Err(error) => {
                drop(served.doors);
                for device in served.devices {
                    // The error that is returned comes first.
                    if let Err(error) = session.run(device.close()) {
                        complain(format_args!("closing after a failed start: {error}"));
                    }
                }
                Err(error)
            }
        }
    }

    fn fill(&mut self, session: &Session, plan: &Plan, handed: &mut Handed) -> anyhow::Result<()> {
        for device in &plan.devices {
            self.devices.push(session.open(&device.graph, &device.options)?);
        }
        for door in &plan.doors {
            let names: Vec<_> = door
                .devices
                .iter()
                .map(|index| plan.devices[*index].name.as_str())
                .collect();
            let devices = door
                .devices
                .iter()
                .map(|index| (self.devices[*index].clone(), &plan.devices[*index]))
                .collect();
            let door = Door::bind(door, devices, handed)
                .with_context(|| format!("{}: {}", names.join(", "), door.kind.name()))?;
            self.doors.push(door);
        }
        self.control = plan.control.as_deref().map(Control::bind).transpose()?;
        Ok(())
    }

    /// Prints what to paste, starts serving, and says that it is ready.
    fn run(self, plan: &Plan, sender: mpsc::Sender<Event>, events: mpsc::Receiver<Event>) -> Running {
        let images = plan.devices.iter().map(|planned| planned.name.clone());
        let images = images.zip(self.devices.iter().cloned()).collect();
        let mut running = Running {
            devices: self.devices,
            control: self.control.map(|control| control.run(images)),
            threads: Vec::new(),
            handles: Vec::new(),
            events,
        };
        let mut text = String::new();
        let mut names = Vec::new();
        for (index, (door, planned)) in self.doors.into_iter().zip(&plan.doors).enumerate() {
            if let BackendKind::Threads { .. } = door.server.io_backend() {
                complain(format_args!("note: I/O by {}", door.server.io_backend()));
            }
            let images: Vec<_> = planned
                .devices
                .iter()
                .map(|index| plan.devices[*index].name.as_str())
                .collect();
            let name = format!("{} at {}", images.join(", "), door.hint.socket());
            text.push_str(&door.hint.text(index, &name));
            names.push(name);
            running.handles.push(door.server.handle());
            running.threads.push(start(door.server, sender.clone()));
        }
        text.push_str(&format!("ready: {}\n", names.join(", ")));
        say(&text);
        service::notify(&format!("READY=1\nSTATUS=serving {}", names.join(", ")));
        running
    }
}

/// How a door ended.
type Ending = anyhow::Result<()>;

fn start(server: Server, events: mpsc::Sender<Event>) -> JoinHandle<Ending> {
    std::thread::spawn(move || {
        let result = server.run();
        // Nobody listens any more once the end has begun.
        let _ = events.send(Event::Ended);
        result
    })
}

/// Doors that serve.
struct Running {
    devices: Vec<Device>,
    control: Option<control::Running>,
    threads: Vec<JoinHandle<Ending>>,
    handles: Vec<Handle>,
    events: mpsc::Receiver<Event>,
}

impl Running {
    /// Serves until a signal comes or a door fails, then ends in order: doors, images, process.
    fn wait(self, session: &Session, plan: &Plan) -> anyhow::Result<ExitCode> {
        match self.events.recv() {
            Ok(Event::Signal(name)) => say(&format!("{name}: stopping\n")),
            Ok(Event::Ended) | Err(_) => {}
        }
        service::notify("STOPPING=1");
        self.handles.iter().for_each(Handle::shutdown);
        let mut failed = false;
        for thread in self.threads {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    complain(describe(&error));
                    failed = true;
                }
                Err(_) => {
                    complain("a door's thread panicked");
                    failed = true;
                }
            }
        }
        if failed {
            // Requests may still be in flight: the images are left as after a kill, which the next opening recovers.
            complain("the images are not closed; the next opening recovers them");
            return Ok(ExitCode::FAILURE);
        }
        // Only now: it may have waited for requests of the doors, all of which are over.
        if let Some(control) = self.control {
            control.end();
        }
        for (device, plan) in self.devices.into_iter().zip(&plan.devices) {
            match session.run(device.close()) {
                Ok(()) => say(&format!("closed {} cleanly\n", plan.name)),
                Err(error) => {
                    complain(format_args!("closing {}: {error}", plan.name));
                    failed = true;
                }
            }
        }
        Ok(if failed {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        })
    }
}

/// Prints at once. Serving goes on if nobody reads it.
fn say(text: &str) {
    let mut out = Out::new();
    let _ = out.text(text).and_then(|()| out.flush());
}
