//! A zoned drive in memory that is as strict as a real one: it judges a write when that arrives, at whatever moment the
//! scheduler makes of that, and keeps count of what it was sent.
//!
//! Its zones are the engine's, which shares no code with the ordering under test.

use std::collections::VecDeque;
use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zbdkit_block::host_device::sysfs::ZoneFacts;
use zbdkit_block::host_device::{Drive, DriveFacts};
use zbdkit_block::{Error, Request, ZoneOp};
use zbdkit_io::{File, IoBuf, LocalBoxFuture, Storage, StorageOp, yield_now};
use zbdkit_zone::{
    Completion, Engine, ExclusiveOp, Filter, Geometry, GeometrySpec, Refused, SlotPool, ZoneError, ZoneInfo,
    ZoneNo, ZoneRecord, ZoneType,
};

/// A drive in memory.
pub struct FakeDrive {
    facts: DriveFacts,
    file: File,
    disk: Arc<Disk>,
}

/// What a drive was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Writes that arrived, whatever became of them.
    pub writes: u64,
    /// The most writes that were under way in one zone at once.
    pub most_in_zone: u32,
    /// The most writes that were under way at once.
    pub most: u32,
    /// The longest write, bytes.
    pub longest: u64,
    /// Appends that arrived, where the drive places them.
    pub appends: u64,
    /// Reports of zones.
    pub reports: u64,
}

/// What becomes of the next write to a zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It fails with this errno when it arrives, and nothing is done.
    Fail(i32),
    /// Each write that covers this byte fails with this errno, and nothing is done.
    BadByte(u64, i32),
    /// So many bytes are written, then it fails with this errno.
    Torn(u64, i32),
}

struct Disk {
    engine: Engine,
    append: bool,
    placing: Mutex<()>,
    state: Mutex<State>,
}

struct State {
    data: Vec<u8>,
    slots: SlotPool,
    seed: u64,
    under_way: Vec<u32>,
    sent: Sent,
    trouble: VecDeque<(ZoneNo, Trouble)>,
    /// Writes to this zone arrive only once it is released.
    held: Option<ZoneNo>,
    gone: bool,
}

impl FakeDrive {
    /// An empty drive, which places appends itself if `append`. The seed decides how long requests are under way.
    pub fn new(spec: GeometrySpec, append: bool, seed: u64) -> FakeDrive {
        let geometry = Geometry::new(spec).expect("a geometry of a test");
        let engine = Engine::new(geometry, |_| ZoneRecord::default()).expect("empty zones");
        let slots = engine.slots(1);
        let disk = Arc::new(Disk {
            append,
            placing: Mutex::new(()),
            state: Mutex::new(State {
                data: vec![0; spec.size as usize],
                slots,
                seed,
                under_way: vec![0; geometry.nr_zones() as usize],
                sent: Sent::default(),
                trouble: VecDeque::new(),
                held: None,
                gone: false,
            }),
            engine,
        });
        FakeDrive {
            facts: DriveFacts {
                path: PathBuf::from("fake"),
                size: spec.size,
                block_size: spec.block_size,
                read_only: false,
                zones: ZoneFacts {
                    model: spec.model,
                    zone_size: spec.zone_size,
                    nr_zones: geometry.nr_zones(),
                    max_open: spec.max_open,
                    max_active: spec.max_active,
                    max_append: spec.max_append,
                    write_granularity: spec.block_size,
                },
                zns: spec.zns,
            },
            file: File::custom(Arc::new(Bytes(disk.clone()))),
            disk,
        }
    }

    /// It says that writes to its sequential zones are multiples of so many bytes.
    #[must_use]
    pub fn with_granularity(mut self, bytes: u32) -> FakeDrive {
        self.facts.zones.write_granularity = bytes;
        self
    }

    /// What it was sent so far.
    pub fn sent(&self) -> Sent {
        self.disk.state().sent
    }

    /// Something becomes of a write to a zone: of the next one, or for a bad byte of all.
    pub fn trouble(&self, zone: ZoneNo, trouble: Trouble) {
        self.disk.state().trouble.push_back((zone, trouble));
    }

    /// Lets no write of this zone arrive until another zone, or none, is held.
    pub fn hold(&self, zone: Option<ZoneNo>) {
        self.disk.state().held = zone;
    }

    /// Whether a write of the zone is under way.
    pub fn is_writing(&self, zone: ZoneNo) -> bool {
        self.disk.state().under_way[zone.0 as usize] > 0
    }

    /// The drive is pulled out.
    pub fn pull(&self) {
        self.disk.state().gone = true;
    }

    /// Somebody else changes a zone.
    pub fn change_behind(&self, zone: ZoneNo, op: ZoneOp) {
        self.disk.zone_op(zone, op).expect("a change of a test");
    }

    /// Somebody else writes `len` bytes at a zone's pointer.
    pub fn write_behind(&self, zone: ZoneNo, len: u64) {
        let at = self.disk.engine.info(zone).wp;
        self.disk
            .put(at, &vec![0xbb; len as usize])
            .expect("a write of a test");
    }

    /// Bytes as the drive holds them.
    pub fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        self.disk.state().data[offset as usize..][..len].to_vec()
    }
}

impl Disk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The way to the drive and back takes its time.
    async fn travel(&self) {
        let steps = {
            let mut state = self.state();
            state.seed = state
                .seed
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            state.seed >> 61
        };
        for _ in 0..steps {
            yield_now().await;
        }
    }

    async fn arrive(&self, zone: ZoneNo) -> io::Result<()> {
        self.travel().await;
        while self.state().held == Some(zone) {
            yield_now().await;
        }
        match self.state().gone {
            true => Err(io::Error::from_raw_os_error(libc_errno::ENODEV)),
            false => Ok(()),
        }
    }

    /// Writes, where the zone's rules allow it.
    fn put(&self, offset: u64, bytes: &[u8]) -> Result<(), i32> {
        let mut state = self.state();
        let state = &mut *state;
        let len = bytes.len() as u64;
        let admitted = self.engine.admit_write(&mut state.slots, offset, len);
        let permit = admitted.map_err(|refused| errno(&refused))?;
        state.data[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        if let Completion::Prefix(prefix) = self.engine.complete(permit, Ok(()), &()) {
            self.engine.acknowledge(prefix, Ok(()), &());
        }
        Ok(())
    }

    fn trouble(&self, zone: ZoneNo, offset: u64, len: u64) -> Option<Trouble> {
        let mut state = self.state();
        let covers = |byte: u64| (offset..offset + len).contains(&byte);
        let at = state.trouble.iter().position(|(of, trouble)| {
            *of == zone && !matches!(trouble, Trouble::BadByte(byte, _) if !covers(*byte))
        })?;
        match state.trouble[at].1 {
            bad @ Trouble::BadByte(..) => Some(bad),
            _ => state.trouble.remove(at).map(|(_, trouble)| trouble),
        }
    }

    fn write(&self, zone: ZoneNo, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let (done, failure) = match self.trouble(zone, offset, bytes.len() as u64) {
            None => (bytes.len(), None),
            Some(Trouble::Fail(errno) | Trouble::BadByte(_, errno)) => (0, Some(errno)),
            Some(Trouble::Torn(done, errno)) => (done as usize, Some(errno)),
        };
        if done > 0 {
            self.put(offset, &bytes[..done])
                .map_err(io::Error::from_raw_os_error)?;
        }
        match failure {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(()),
        }
    }

    async fn receive(&self, buf: IoBuf, offset: u64) -> io::Result<()> {
        let zone = self.engine.geometry().zone_of(offset);
        {
            let mut state = self.state();
            let here = &mut state.under_way[zone.0 as usize];
            *here += 1;
            let here = *here;
            let all = state.under_way.iter().sum();
            let sent = &mut state.sent;
            sent.writes += 1;
            sent.most_in_zone = sent.most_in_zone.max(here);
            sent.most = sent.most.max(all);
            sent.longest = sent.longest.max(buf.len() as u64);
        }
        let result = match self.arrive(zone).await {
            Ok(()) => self.write(zone, offset, &buf.to_vec()),
            Err(error) => Err(error),
        };
        self.travel().await;
        self.state().under_way[zone.0 as usize] -= 1;
        result
    }

    fn zone_op(&self, zone: ZoneNo, op: ZoneOp) -> Result<(), Error> {
        let exclusive = match op {
            ZoneOp::Open => return self.engine.open(zone).map_err(|e| failure(&e)),
            ZoneOp::Close(empty) => return self.engine.close(zone, empty).map_err(|e| failure(&e)),
            ZoneOp::Finish => ExclusiveOp::Finish,
            ZoneOp::FinishUnlimited => ExclusiveOp::FinishUnlimited,
            ZoneOp::Reset => ExclusiveOp::Reset,
            ZoneOp::SetReadOnly => ExclusiveOp::SetReadOnly,
            ZoneOp::SetOffline => ExclusiveOp::SetOffline,
            ZoneOp::SetNormal => ExclusiveOp::SetNormal,
            ZoneOp::OpenZrwa => ExclusiveOp::OpenZrwa,
            ZoneOp::FinishByDevice | ZoneOp::Recommend(_) => {
                return Err(Error::NotSupported("zone attributes"));
            }
        };
        if let Some(permit) = self.engine.begin(zone, exclusive).map_err(|e| failure(&e))? {
            if exclusive == ExclusiveOp::Reset {
                let (start, end) = (
                    self.engine.geometry().start(zone),
                    self.engine.geometry().end(zone),
                );
                self.state().data[start as usize..end as usize].fill(0);
            }
            self.engine.commit(permit, &());
        }
        Ok(())
    }
}

/// What becomes of an operation: areas are known only by commands, which say what is wrong.
fn failure(refused: &Refused) -> Error {
    match refused {
        Refused::Zone(
            error @ (ZoneError::NoRandomWriteArea { .. }
            | ZoneError::NotRandomWritable { .. }
            | ZoneError::OutsideRandomWriteArea { .. }),
        ) => (*error).into(),
        refused => Error::Io {
            op: "zone management",
            errno: errno(refused),
        },
    }
}

/// As the block layer of Linux hands it up.
fn errno(refused: &Refused) -> i32 {
    match refused {
        Refused::Zone(error) => match Error::from(*error).errno() {
            // Only resources have errnos of their own.
            errno @ (libc_errno::ETOOMANYREFS | libc_errno::EOVERFLOW) => errno,
            _ => libc_errno::EIO,
        },
        Refused::Busy(_) | Refused::NoSlot => libc_errno::EIO,
    }
}

mod libc_errno {
    pub const EIO: i32 = 5;
    pub const ENODEV: i32 = 19;
    pub const EOVERFLOW: i32 = 75;
    pub const ETOOMANYREFS: i32 = 109;
}

/// The drive's bytes as a file.
struct Bytes(Arc<Disk>);

impl Storage for Bytes {
    fn submit(&self, op: StorageOp) -> LocalBoxFuture<'static, io::Result<()>> {
        let disk = self.0.clone();
        Box::pin(async move {
            match op {
                StorageOp::Write { buf, offset } => disk.receive(buf, offset).await,
                StorageOp::Read { buf, offset } => {
                    disk.travel().await;
                    let state = disk.state();
                    buf.copy_from(&state.data[offset as usize..][..buf.len()]);
                    Ok(())
                }
                StorageOp::DataSync | StorageOp::Sync => Ok(()),
                StorageOp::PunchHole { .. } | StorageOp::ZeroRange { .. } | StorageOp::Allocate { .. } => {
                    Err(io::ErrorKind::Unsupported.into())
                }
            }
        })
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.engine.geometry().size())
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Drive for FakeDrive {
    fn facts(&self) -> &DriveFacts {
        &self.facts
    }

    fn file(&self) -> &File {
        &self.file
    }

    fn report<'a>(&'a self, from: u64, max: usize) -> Request<'a, Vec<ZoneInfo>> {
        Box::pin(async move {
            self.disk.travel().await;
            self.disk.state().sent.reports += 1;
            if self.disk.state().gone {
                return Err(Error::Io {
                    op: "zone report",
                    errno: libc_errno::ENODEV,
                });
            }
            let mut zones = Vec::new();
            self.disk
                .engine
                .report(from, Filter::All, &mut |mut zone: ZoneInfo| {
                    // A drive knows its pointer and nothing else.
                    zone.written_end = zone.wp;
                    zone.counters = Default::default();
                    zones.push(zone);
                    match zones.len() < max {
                        true => ControlFlow::Continue(()),
                        false => ControlFlow::Break(()),
                    }
                });
            Ok(zones)
        })
    }

    fn zone_op<'a>(&'a self, op: ZoneOp, zone_start: u64, _len: u64) -> Request<'a, ()> {
        Box::pin(async move {
            let zone = self.disk.engine.geometry().zone_of(zone_start);
            self.disk.travel().await;
            let done = self.disk.zone_op(zone, op);
            self.disk.travel().await;
            done
        })
    }

    fn commit_zrwa<'a>(&'a self, end: u64) -> Request<'a, ()> {
        Box::pin(async move {
            self.disk.travel().await;
            let committed = self.disk.engine.commit_zrwa(end, &());
            let done = committed.map(|prefix| self.disk.engine.acknowledge(prefix, Ok(()), &()));
            self.disk.travel().await;
            done.map(drop).map_err(|refused| failure(&refused))
        })
    }

    fn reset_all<'a>(&'a self) -> Request<'a, ()> {
        Box::pin(async move {
            self.disk.travel().await;
            let geometry = self.disk.engine.geometry();
            for zone in geometry.zones() {
                if geometry.zone_type(zone) != ZoneType::Conventional {
                    // Zones that cannot be reset are passed over.
                    let _ = self.disk.zone_op(zone, ZoneOp::Reset);
                }
            }
            Ok(())
        })
    }

    fn has_append(&self) -> bool {
        self.disk.append
    }

    fn append<'a>(&'a self, buf: IoBuf, zone_start: u64) -> Request<'a, u64> {
        Box::pin(async move {
            let zone = self.disk.engine.geometry().zone_of(zone_start);
            self.disk.state().sent.appends += 1;
            let io = |error: io::Error| Error::io("append", &error);
            self.disk.arrive(zone).await.map_err(io)?;
            let (at, done) = {
                let _one_at_a_time = self.disk.placing.lock().unwrap_or_else(PoisonError::into_inner);
                let info = self.disk.engine.info(zone);
                let written = match info.attributes.zrwa {
                    true => Err(io::Error::from_raw_os_error(libc_errno::EIO)),
                    false => self.disk.write(zone, info.wp, &buf.to_vec()),
                };
                (info.wp, written.map_err(io))
            };
            self.disk.travel().await;
            done.map(|()| at)
        })
    }
}
