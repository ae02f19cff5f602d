//! A vhost-user-blk client in this process, for tests and benchmarks.
//!
//! [`Client`] connects to a server's socket, negotiates, and gives [`Queue`]s that speak all of
//! virtio-blk with its zones. The rings and the protocol exist twice ([`EngineKind`]): ours, which is
//! fast, knows indirect tables and can be misused by hand, and those of the `virtio-driver` crate,
//! which we did not write. [`channel`] is the bare socket, for tests of the protocol itself.
//!
//! Everything that waits for the server has a deadline. Constants of the standard come from the kernel's
//! headers (`virtio-bindings`), not from zbdkit, so that a wrong number cannot agree with itself.
//!
//! With our engine the addresses in descriptors differ from those of this process, and shared
//! memory has two regions that touch: see [`Client::scratch`].

pub mod channel;
pub mod config;
mod error;
mod foreign;
pub mod loopback;
pub mod memory;
mod node;
pub mod peer;
mod queue;
pub mod request;
pub mod ring;
mod wait;
pub mod zone;

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use channel::Channel;
pub use config::{BlkConfig, CONFIG_SIZE};
pub use error::ClientError;
pub use node::DoorNode;
pub use queue::{Done, Queue, Slot};
pub use request::{BlockRange, Completion, Framing, Request, Status, Ticket, op};
pub use zone::{Zone, ZoneKind, ZoneState};

use channel::{code, protocol_feature};
use foreign::ForeignLink;
use memory::{RegionSpec, SharedMemory, Window};
use queue::Engine;
use ring::SplitRing;

/// Virtio feature bits, as masks.
#[expect(missing_docs, reason = "names of the standard")]
pub mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const ZONED: u64 = 1 << 17;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;

    /// All that this client understands.
    pub const ALL: u64 = SEG_MAX
        | RO
        | BLK_SIZE
        | FLUSH
        | TOPOLOGY
        | CONFIG_WCE
        | MQ
        | DISCARD
        | WRITE_ZEROES
        | ZONED
        | INDIRECT_DESC
        | EVENT_IDX
        | PROTOCOL_FEATURES
        | VERSION_1;
}

/// Device status bits.
#[expect(missing_docs, reason = "names of the standard")]
pub mod device_status {
    pub const ACKNOWLEDGE: u64 = 1;
    pub const DRIVER: u64 = 2;
    pub const DRIVER_OK: u64 = 4;
    pub const FEATURES_OK: u64 = 8;
    pub const NEEDS_RESET: u64 = 64;
    pub const FAILED: u64 = 128;
}

/// Which implementation of rings and protocol a client uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// The one of this module.
    #[default]
    Ours,
    /// The crate `virtio-driver`.
    VirtioDriver,
}

/// How to connect.
#[derive(Debug, Clone)]
pub struct Options {
    /// Rings and protocol to use.
    pub engine: EngineKind,
    /// Virtio features to take if offered.
    pub features: u64,
    /// Protocol features to take if offered (our engine only).
    pub protocol_features: u64,
    /// Queues to set up.
    pub queues: u16,
    /// Entries of each ring, a power of two.
    pub queue_size: u16,
    /// Requests in flight on each queue.
    pub slots: u16,
    /// Most bytes of data in a request.
    pub max_data: usize,
    /// Bytes of [`Client::scratch`].
    pub scratch: usize,
    /// How long to wait for the server, each time.
    pub patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            engine: EngineKind::Ours,
            features: feature::ALL,
            protocol_features: protocol_feature::MQ
                | protocol_feature::REPLY_ACK
                | protocol_feature::CONFIG
                | protocol_feature::RESET_DEVICE
                | protocol_feature::CONFIGURE_MEM_SLOTS
                | protocol_feature::STATUS,
            queues: 1,
            queue_size: 128,
            slots: 32,
            max_data: 1 << 20,
            scratch: 1 << 20,
            patience: Duration::from_secs(10),
        }
    }
}

/// First guest address of our engine's memory: unlike any address of this process, and above 4 GiB.
const GUEST_BASE: u64 = 0x1_4000_0000;

#[derive(Debug)]
enum Link {
    Ours(Channel),
    Foreign(ForeignLink),
}

/// A connected client. Dropping it closes the connection.
#[derive(Debug)]
pub struct Client {
    link: Link,
    queues: Vec<Queue>,
    config: BlkConfig,
    offered: u64,
    features: u64,
    protocol_features: u64,
    memory: Arc<SharedMemory>,
    scratch: Window,
}

impl Client {
    /// Connects, negotiates, and starts all queues.
    ///
    /// # Errors
    /// `Refused` and `FeaturesNotOk` when the server does not want what was negotiated; `Timeout`,
    /// `Closed` and `Protocol` when it does not play by the rules.
    pub fn connect(path: &Path, options: &Options) -> Result<Self, ClientError> {
        let plan = Plan::new(options);
        match options.engine {
            EngineKind::Ours => Self::connect_ours(path, options, &plan),
            EngineKind::VirtioDriver => Self::connect_foreign(path, options, &plan),
        }
    }

    fn connect_ours(path: &Path, options: &Options, plan: &Plan) -> Result<Self, ClientError> {
        let mut channel = Channel::connect(path, options.patience)?;
        let offered = channel.ask_u64(code::GET_FEATURES)?;
        let features = offered & options.features;
        let protocol_features = negotiate_protocol(&mut channel, features, options)?;
        let has = |feature| protocol_features & feature != 0;
        channel.tell("SET_OWNER", code::SET_OWNER, &[], &[])?;
        if has(protocol_feature::MQ) {
            let max = channel.ask_u64(code::GET_QUEUE_NUM)?;
            if max < options.queues.into() {
                return Err(ClientError::Protocol(format!("the server has only {max} queues")));
            }
        }
        let config = if has(protocol_feature::CONFIG) {
            read_config(&channel)?
        } else {
            [0; CONFIG_SIZE]
        };
        set_features(&channel, features, has(protocol_feature::STATUS))?;

        let memory = SharedMemory::new(&plan.regions(Some(GUEST_BASE)))?;
        channel.set_mem_table(&memory)?;
        let mut queues = Vec::new();
        for index in 0..options.queues {
            let event_idx = features & feature::EVENT_IDX != 0;
            let ring = SplitRing::new(options.queue_size, plan.ring(&memory, index), event_idx)?;
            start_queue(&channel, index.into(), &ring, 0)?;
            if features & feature::PROTOCOL_FEATURES != 0 {
                channel.tell_vring("SET_VRING_ENABLE", code::SET_VRING_ENABLE, index.into(), 1)?;
            }
            let indirect = features & feature::INDIRECT_DESC != 0;
            queues.push(plan.queue(&memory, index, Engine::Ours(ring), indirect, options));
        }
        if has(protocol_feature::STATUS) {
            use device_status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
            let all = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
            channel.tell_u64("SET_STATUS", code::SET_STATUS, all)?;
        }
        let scratch = plan.scratch(&memory);
        let config = BlkConfig::parse(config);
        let link = Link::Ours(channel);
        Ok(Client {
            link,
            queues,
            config,
            offered,
            features,
            protocol_features,
            memory,
            scratch,
        })
    }

    fn connect_foreign(path: &Path, options: &Options, plan: &Plan) -> Result<Self, ClientError> {
        let memory = SharedMemory::new(&plan.regions(None))?;
        let features = options.features & !feature::INDIRECT_DESC;
        let Options {
            queues,
            queue_size,
            patience,
            ..
        } = *options;
        let connected = ForeignLink::connect(path, features, queues, queue_size, &memory, patience)?;
        let foreign::Connected {
            mut link,
            rings,
            features,
        } = connected;
        let config = link.config()?;
        let queues = rings
            .into_iter()
            .zip(0..)
            .map(|(ring, index)| plan.queue(&memory, index, Engine::Foreign(ring), false, options))
            .collect();
        let scratch = plan.scratch(&memory);
        let link = Link::Foreign(link);
        Ok(Client {
            link,
            queues,
            config,
            offered: features,
            features,
            protocol_features: 0,
            memory,
            scratch,
        })
    }

    /// Queue `index`.
    pub fn queue(&mut self, index: usize) -> &mut Queue {
        &mut self.queues[index]
    }

    /// Takes all queues, to use them on threads of their own. The client must stay alive meanwhile.
    pub fn take_queues(&mut self) -> Vec<Queue> {
        std::mem::take(&mut self.queues)
    }

    /// Features that both sides have.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Features that the server offered (with virtio-driver: those that both sides have).
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Protocol features that both sides have (with virtio-driver: 0).
    pub fn protocol_features(&self) -> u64 {
        self.protocol_features
    }

    /// The configuration space as read when connecting.
    pub fn config(&self) -> &BlkConfig {
        &self.config
    }

    /// Reads the configuration space again.
    ///
    /// # Errors
    /// As [`Channel::get_config`].
    pub fn read_config(&mut self) -> Result<BlkConfig, ClientError> {
        match &mut self.link {
            Link::Ours(channel) => Ok(BlkConfig::parse(read_config(channel)?)),
            Link::Foreign(link) => link.config(),
        }
    }

    /// The socket, for any other message.
    ///
    /// # Errors
    /// `Engine` with virtio-driver.
    pub fn channel(&mut self) -> Result<&mut Channel, ClientError> {
        match &mut self.link {
            Link::Ours(channel) => Ok(channel),
            Link::Foreign(_) => Err(ClientError::Engine("the socket belongs to virtio-driver")),
        }
    }

    /// All memory shared with the server: the region of rings and slots, then that of the scratch.
    pub fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    /// Shared memory for chains made by hand. It is the whole second region. With our engine it
    /// starts, for the device, where the first region ends, so that a descriptor may span the two; right
    /// after it nothing is mapped.
    pub fn scratch(&self) -> &Window {
        &self.scratch
    }

    /// Stops queue `index` and returns the avail index at which the server stopped.
    ///
    /// # Errors
    /// `Engine` with virtio-driver, and as [`Channel::get_vring_base`].
    pub fn stop_queue(&mut self, index: u32) -> Result<u32, ClientError> {
        self.channel()?.get_vring_base(index)
    }

    /// Starts queue `index` again at avail index `base`, its ring as it is.
    ///
    /// # Errors
    /// `Engine` with virtio-driver, and as [`Channel::tell`].
    pub fn restart_queue(&mut self, index: u32, base: u32) -> Result<(), ClientError> {
        let Link::Ours(channel) = &self.link else {
            return Err(ClientError::Engine("the socket belongs to virtio-driver"));
        };
        let ring = self.queues[index as usize].ring()?;
        start_queue(channel, index, ring, base)?;
        channel.tell_vring("SET_VRING_ENABLE", code::SET_VRING_ENABLE, index, 1)
    }
}

fn negotiate_protocol(channel: &mut Channel, features: u64, options: &Options) -> Result<u64, ClientError> {
    if features & feature::PROTOCOL_FEATURES == 0 {
        return Ok(0);
    }
    let protocol_features = channel.ask_u64(code::GET_PROTOCOL_FEATURES)? & options.protocol_features;
    channel.tell_u64(
        "SET_PROTOCOL_FEATURES",
        code::SET_PROTOCOL_FEATURES,
        protocol_features,
    )?;
    channel.set_reply_ack(protocol_features & protocol_feature::REPLY_ACK != 0);
    Ok(protocol_features)
}

fn read_config(channel: &Channel) -> Result<[u8; CONFIG_SIZE], ClientError> {
    let bytes = channel.get_config(0, CONFIG_SIZE as u32)?;
    let len = bytes.len();
    bytes
        .try_into()
        .map_err(|_| ClientError::Protocol(format!("configuration space of {len} bytes")))
}

/// SET_FEATURES, and where there is a device status, FEATURES_OK and whether it stayed.
fn set_features(channel: &Channel, features: u64, status: bool) -> Result<(), ClientError> {
    use device_status::{ACKNOWLEDGE, DRIVER, FEATURES_OK};
    if status {
        channel.tell_u64("SET_STATUS", code::SET_STATUS, ACKNOWLEDGE | DRIVER)?;
    }
    channel.tell_u64("SET_FEATURES", code::SET_FEATURES, features)?;
    if status {
        channel.tell_u64("SET_STATUS", code::SET_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)?;
        let status = channel.ask_u64(code::GET_STATUS)?;
        if status & FEATURES_OK == 0 {
            return Err(ClientError::FeaturesNotOk { features, status });
        }
    }
    Ok(())
}

fn start_queue(channel: &Channel, index: u32, ring: &SplitRing, base: u32) -> Result<(), ClientError> {
    channel.tell_vring("SET_VRING_NUM", code::SET_VRING_NUM, index, ring.size().into())?;
    channel.tell_vring("SET_VRING_BASE", code::SET_VRING_BASE, index, base)?;
    let (desc, used, avail) = (ring.descriptors().user(), ring.used().user(), ring.avail().user());
    let addresses = channel::vring_addr(index, 0, desc, used, avail);
    channel.tell("SET_VRING_ADDR", code::SET_VRING_ADDR, &addresses, &[])?;
    let number = u64::from(index).to_le_bytes();
    channel.tell(
        "SET_VRING_CALL",
        code::SET_VRING_CALL,
        &number,
        &[ring.call_fd().as_fd()],
    )?;
    channel.tell(
        "SET_VRING_KICK",
        code::SET_VRING_KICK,
        &number,
        &[ring.kick_fd().as_fd()],
    )
}

/// Where rings and slots lie in the first region.
struct Plan {
    ring_parts: [(usize, usize); 3],
    ring_size: usize,
    slot_size: usize,
    slots: u16,
    main: usize,
    scratch: usize,
}

impl Plan {
    fn new(options: &Options) -> Self {
        // Each part on cache lines of its own: one side writes it while the other reads the next.
        let mut at = 0;
        let ring_parts = SplitRing::sizes(options.queue_size).map(|len| {
            let start = at;
            at = (start + len).next_multiple_of(128);
            (start, len)
        });
        let ring_size = at.next_multiple_of(4096);
        let slot_size = Queue::slot_size(options.max_data);
        let queue = ring_size + slot_size * usize::from(options.slots);
        Plan {
            ring_parts,
            ring_size,
            slot_size,
            slots: options.slots,
            main: queue * usize::from(options.queues),
            scratch: options.scratch.next_multiple_of(4096),
        }
    }

    fn regions(&self, guest: Option<u64>) -> [RegionSpec; 2] {
        [
            RegionSpec {
                guest,
                len: self.main,
            },
            RegionSpec {
                guest: guest.map(|g| g + self.main as u64),
                len: self.scratch,
            },
        ]
    }

    fn window(&self, memory: &Arc<SharedMemory>, queue: u16, offset: usize, len: usize) -> Window {
        let queue_size = self.ring_size + self.slot_size * usize::from(self.slots);
        let at = queue_size * usize::from(queue) + offset;
        let whole = &memory.regions()[0];
        memory
            .window(whole.guest() + at as u64, len)
            .expect("the plan fits the region")
    }

    fn ring(&self, memory: &Arc<SharedMemory>, queue: u16) -> [Window; 3] {
        self.ring_parts
            .map(|(offset, len)| self.window(memory, queue, offset, len))
    }

    fn queue(
        &self,
        memory: &Arc<SharedMemory>,
        index: u16,
        engine: Engine,
        indirect: bool,
        options: &Options,
    ) -> Queue {
        let slots = (0..usize::from(self.slots))
            .map(|slot| {
                self.window(
                    memory,
                    index,
                    self.ring_size + slot * self.slot_size,
                    self.slot_size,
                )
            })
            .collect();
        Queue::new(
            engine,
            options.queue_size,
            slots,
            options.max_data,
            indirect,
            options.patience,
        )
    }

    fn scratch(&self, memory: &Arc<SharedMemory>) -> Window {
        memory
            .window(memory.regions()[1].guest(), self.scratch)
            .expect("the region is that long")
    }
}
