//! A vhost-user-blk server in a thread of this process: what the client itself is tested against, and
//! what its own speed is measured with. It trusts its client; zbdkit's door is another program.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::channel::{Channel, Message, NEED_REPLY, REPLY, code, protocol_feature};
use super::config::CONFIG_SIZE;
use super::error::ClientError;
use super::memory::{RegionSpec, SharedMemory, Window};
use super::ring::{Desc, INDIRECT, NEXT, WRITE};
use super::wait::wait_for;
use super::{device_status, feature};

/// What a request gets: the status byte, and the bytes before it from the start of the buffers.
pub type Answer = (u8, Vec<u8>);

/// The device behind a [`Loopback`].
pub trait Device: Send + 'static {
    /// Feature bits to offer; ring and protocol bits are added.
    fn features(&self) -> u64;

    /// The configuration space.
    fn config(&self) -> [u8; CONFIG_SIZE];

    /// Whether the device works with these features.
    fn accepts(&self, features: u64) -> bool;

    /// Runs a request; `None` leaves it in flight for ever. `room` is how many bytes it may return.
    fn request(&mut self, op: u32, sector: u64, out: &[u8], room: usize) -> Option<Answer>;
}

/// Completes everything at once and touches no data: the speed of the client alone.
#[derive(Debug)]
pub struct NullDevice {
    /// Capacity in sectors.
    pub capacity: u64,
}

impl Device for NullDevice {
    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> [u8; CONFIG_SIZE] {
        let mut config = [0; CONFIG_SIZE];
        config[..8].copy_from_slice(&self.capacity.to_le_bytes());
        config
    }

    fn accepts(&self, _features: u64) -> bool {
        true
    }

    fn request(&mut self, _op: u32, _sector: u64, _out: &[u8], _room: usize) -> Option<Answer> {
        Some((0, Vec::new()))
    }
}

/// The running server. It stops when dropped.
#[derive(Debug)]
pub struct Loopback {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Loopback {
    /// Serves `device` at `path`, one client after the other. With `data` false, requests reach the
    /// device without their bytes, which is faster.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn start(path: &Path, device: impl Device, data: bool) -> std::io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut device = device;
            while !stopped.load(Ordering::Relaxed) {
                let soon = Instant::now() + Duration::from_millis(20);
                let waited = wait_for(listener.as_fd(), PollFlags::IN, soon);
                let Ok((socket, _)) = listener.accept() else {
                    if waited.is_err() {
                        return;
                    }
                    continue;
                };
                let Ok(channel) = Channel::from_socket(socket.into(), Duration::from_secs(10)) else {
                    continue;
                };
                let mut session = Session::new(channel, &mut device, data);
                // An error ends the session, as the client will notice.
                let _ = session.serve(&stopped);
            }
        });
        Ok(Loopback {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Default)]
struct Vring {
    size: u16,
    next: u16,
    addresses: [u64; 3],
    parts: Option<[Window; 3]>,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    enabled: bool,
}

struct Session<'a, D> {
    channel: Channel,
    device: &'a mut D,
    data: bool,
    features: u64,
    status: u64,
    memory: Option<Arc<SharedMemory>>,
    /// User address of each region, then guest address and length.
    user: Vec<(u64, u64, u64)>,
    rings: BTreeMap<u32, Vring>,
}

impl<'a, D: Device> Session<'a, D> {
    fn new(channel: Channel, device: &'a mut D, data: bool) -> Self {
        Session {
            channel,
            device,
            data,
            features: 0,
            status: 0,
            memory: None,
            user: Vec::new(),
            rings: BTreeMap::new(),
        }
    }

    /// Looks at the rings all the time, and now and then at the socket.
    fn serve(&mut self, stop: &AtomicBool) -> Result<(), ClientError> {
        while !stop.load(Ordering::Relaxed) {
            let mut idle = true;
            for _ in 0..256 {
                idle &= !self.work()?;
            }
            let running = self.rings.values().any(|ring| ring.enabled);
            let until = Instant::now() + Duration::from_millis(if running { 0 } else { 20 });
            if idle && running {
                std::thread::yield_now();
            }
            if wait_for(self.channel.socket(), PollFlags::IN, until)? {
                let message = self.channel.receive()?;
                self.message(message)?;
            }
        }
        Ok(())
    }

    fn message(&mut self, mut message: Message) -> Result<(), ClientError> {
        let number = message.as_u64().unwrap_or(0);
        let (index, high) = (number as u32, (number >> 32) as u32);
        let rings = [
            feature::INDIRECT_DESC,
            feature::EVENT_IDX,
            feature::VERSION_1,
            feature::PROTOCOL_FEATURES,
        ];
        let mut refused = false;
        match message.code {
            code::GET_FEATURES => {
                return self.reply(
                    &message,
                    &(self.device.features() | rings.iter().sum::<u64>()).to_le_bytes(),
                );
            }
            code::GET_PROTOCOL_FEATURES => {
                use protocol_feature::{CONFIG, CONFIGURE_MEM_SLOTS, MQ, REPLY_ACK, STATUS};
                let all = CONFIG | CONFIGURE_MEM_SLOTS | MQ | REPLY_ACK | STATUS;
                return self.reply(&message, &all.to_le_bytes());
            }
            code::GET_QUEUE_NUM | code::GET_MAX_MEM_SLOTS => {
                return self.reply(&message, &8u64.to_le_bytes());
            }
            code::GET_STATUS => return self.reply(&message, &self.status.to_le_bytes()),
            code::GET_CONFIG => {
                let mut payload = message.payload[..12].to_vec();
                payload.extend(self.device.config());
                return self.reply(&message, &payload);
            }
            code::GET_VRING_BASE => {
                let ring = self.rings.entry(index).or_default();
                ring.enabled = false;
                let base = u64::from(index) | u64::from(ring.next) << 32;
                return self.reply(&message, &base.to_le_bytes());
            }
            code::SET_FEATURES => {
                self.features = number;
                refused = !self.device.accepts(number);
            }
            code::SET_STATUS => {
                let withheld = if self.device.accepts(self.features) {
                    0
                } else {
                    device_status::FEATURES_OK
                };
                self.status = number & !withheld;
            }
            code::SET_MEM_TABLE => {
                self.user.clear();
                self.map(&message.payload[8..], std::mem::take(&mut message.fds))?;
            }
            code::ADD_MEM_REG => self.map(&message.payload[8..], std::mem::take(&mut message.fds))?,
            code::SET_VRING_NUM => self.rings.entry(index).or_default().size = high as u16,
            code::SET_VRING_BASE => self.rings.entry(index).or_default().next = high as u16,
            code::SET_VRING_ADDR => {
                let word = |i: usize| u64_at(&message.payload, 8 + 8 * i);
                self.rings.entry(index).or_default().addresses = [word(0), word(1), word(2)];
            }
            code::SET_VRING_KICK => self.rings.entry(index).or_default().kick = message.fds.pop(),
            code::SET_VRING_CALL => self.rings.entry(index).or_default().call = message.fds.pop(),
            code::SET_VRING_ENABLE => self.enable(index, high != 0)?,
            _ => {}
        }
        if message.flags & NEED_REPLY != 0 {
            return self.reply(&message, &u64::from(refused).to_le_bytes());
        }
        Ok(())
    }

    fn reply(&self, to: &Message, payload: &[u8]) -> Result<(), ClientError> {
        self.channel.send(to.code, REPLY, payload, &[])
    }

    /// Adds regions; those there already are mapped again with them.
    fn map(&mut self, regions: &[u8], fds: Vec<OwnedFd>) -> Result<(), ClientError> {
        let mut files = Vec::new();
        for (i, &(_, guest, len)) in self.user.iter().enumerate() {
            let memory = self
                .memory
                .as_ref()
                .ok_or(ClientError::Protocol("no memory".into()))?;
            let fd = memory.regions()[i].fd().try_clone_to_owned()?;
            files.push((
                fd,
                RegionSpec {
                    guest: Some(guest),
                    len: len as usize,
                },
            ));
        }
        for (region, fd) in regions.chunks_exact(32).zip(fds) {
            let (guest, len, user) = (u64_at(region, 0), u64_at(region, 8), u64_at(region, 16));
            files.push((
                fd,
                RegionSpec {
                    guest: Some(guest),
                    len: len as usize,
                },
            ));
            self.user.push((user, guest, len));
        }
        self.memory = Some(SharedMemory::of_others(files)?);
        Ok(())
    }

    fn enable(&mut self, index: u32, enabled: bool) -> Result<(), ClientError> {
        let missing = || ClientError::Protocol("ring outside memory".into());
        let memory = self.memory.as_ref().ok_or_else(missing)?;
        let ring = self.rings.entry(index).or_default();
        let n = usize::from(ring.size);
        let window = |user: u64, len: usize| {
            let (start, guest, _) = self
                .user
                .iter()
                .find(|(at, _, len)| user >= *at && user - at < *len)?;
            memory.window(user - start + guest, len)
        };
        let [desc, used, avail] = ring.addresses;
        let parts = (
            window(desc, n * 16),
            window(avail, n * 2 + 6),
            window(used, n * 8 + 6),
        );
        let (Some(desc), Some(avail), Some(used)) = parts else {
            return Err(missing());
        };
        ring.parts = Some([desc, avail, used]);
        ring.enabled = enabled;
        Ok(())
    }

    /// Serves what all rings have; whether there was anything.
    fn work(&mut self) -> Result<bool, ClientError> {
        let Some(memory) = &self.memory else {
            return Ok(false);
        };
        let event_idx = self.features & feature::EVENT_IDX != 0;
        let mut any = false;
        for ring in self.rings.values_mut().filter(|ring| ring.enabled) {
            let Some([desc, avail, used]) = &ring.parts else {
                continue;
            };
            let old = ring.next;
            let available = avail.load_u16(2, Ordering::Acquire);
            if available == old {
                continue;
            }
            any = true;
            let mut used_index = used.load_u16(2, Ordering::Relaxed);
            let used_old = used_index;
            while ring.next != available {
                let at = usize::from(ring.next % ring.size);
                let head = avail.load_u16(4 + 2 * at, Ordering::Relaxed);
                ring.next = ring.next.wrapping_add(1);
                let chain = if self.data {
                    serve_chain(self.device, memory, desc, head)?
                } else {
                    serve_blindly(memory, desc, head)?
                };
                let Some(len) = chain else { continue };
                let at = 4 + 8 * usize::from(used_index % ring.size);
                used.store_u32(at, head.into(), Ordering::Relaxed);
                used.store_u32(at + 4, len, Ordering::Relaxed);
                used_index = used_index.wrapping_add(1);
            }
            used.store_u16(2, used_index, Ordering::Release);
            // We look at the ring all the time: no notifications.
            if event_idx {
                used.store_u16(
                    4 + 8 * usize::from(ring.size),
                    ring.next.wrapping_sub(1),
                    Ordering::Relaxed,
                );
            } else {
                used.store_u16(0, 1, Ordering::Relaxed);
            }
            fence(Ordering::SeqCst);
            let wanted = if event_idx {
                let event = avail.load_u16(4 + 2 * usize::from(ring.size), Ordering::Relaxed);
                used_index.wrapping_sub(event).wrapping_sub(1) < used_index.wrapping_sub(used_old)
            } else {
                avail.load_u16(0, Ordering::Relaxed) & 1 == 0
            };
            if let (true, Some(call)) = (wanted, &ring.call) {
                rustix::io::write(call, &1u64.to_ne_bytes())?;
            }
        }
        Ok(any)
    }
}

/// Status OK into the last byte of the chain, and nothing else.
fn serve_blindly(memory: &Arc<SharedMemory>, table: &Window, head: u16) -> Result<Option<u32>, ClientError> {
    let mut desc = Desc::load(table, head.into());
    while desc.flags & NEXT != 0 {
        desc = Desc::load(table, desc.next.into());
    }
    let last = desc.addr.wrapping_add(desc.len.into()).wrapping_sub(1);
    memory.window(last, 1).ok_or_else(outside)?.write(0, &[0]);
    Ok(Some(1))
}

fn serve_chain(
    device: &mut impl Device,
    memory: &Arc<SharedMemory>,
    table: &Window,
    head: u16,
) -> Result<Option<u32>, ClientError> {
    let (mut out, mut room) = (Vec::new(), Vec::new());
    let first = Desc::load(table, head.into());
    let indirect = first.flags & INDIRECT != 0;
    let window = |desc: Desc| memory.window(desc.addr, desc.len as usize).ok_or_else(outside);
    let table = if indirect { window(first)? } else { table.clone() };
    let mut desc = if indirect { Desc::load(&table, 0) } else { first };
    loop {
        let part = window(desc)?;
        if desc.flags & WRITE != 0 {
            room.push(part);
        } else {
            out.extend(part.to_vec(0, part.len()));
        }
        if desc.flags & NEXT == 0 {
            break;
        }
        desc = Desc::load(&table, desc.next.into());
    }
    if out.len() < 16 || room.is_empty() {
        return Err(ClientError::Protocol("a request without header or status".into()));
    }
    let op = u64_at(&out, 0) as u32;
    let total: usize = room.iter().map(Window::len).sum();
    let Some((status, mut data)) = device.request(op, u64_at(&out, 8), &out[16..], total - 1) else {
        return Ok(None);
    };
    data.resize(total - 1, 0);
    data.push(status);
    let mut rest = data.as_slice();
    for part in room {
        let (now, later) = rest.split_at(part.len());
        part.write(0, now);
        rest = later;
    }
    Ok(Some(total as u32))
}

fn outside() -> ClientError {
    ClientError::Protocol("a descriptor outside memory".into())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}
