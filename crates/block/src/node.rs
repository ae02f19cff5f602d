//! The contract between the nodes of a graph.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::ops::{ControlFlow, Range};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use zbdkit_io::{File, IoBuf};
pub use zbdkit_qcow2::Access;
use zbdkit_zone::{CloseEmpty, Engine, Filter, Recommendation, SlotPool, ZoneInfo, ZoneNo};

use crate::error::Error;
use crate::limits::Limits;
use crate::marks::Marks;
use crate::qcow2::Qcow2Node;

/// A request on its way through a node. Requests of the hot path do not box: see [`Node::resolve`].
pub type Request<'a, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + 'a>>;

/// May one read touch several sequential zones? Protocols differ: virtio and ZNS without RAZB refuse it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrossZone {
    /// A read of a sequential zone ends in that zone, else [`zbdkit_zone::ZoneError::Boundary`].
    Refuse,
    /// Reads may cross zones.
    Allow,
}

/// An operation on one zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZoneOp {
    /// Open explicitly.
    Open,
    /// Open explicitly, with a zone random write area, which the zone has until it is full, reset or finished.
    OpenZrwa,
    /// Close; an opened zone without data becomes what the argument says.
    Close(CloseEmpty),
    /// Make the zone full; an empty one needs resources to be available ([`zbdkit_zone::ExclusiveOp::Finish`]).
    Finish,
    /// Make the zone full whatever resources are available, as ZNS has it.
    FinishUnlimited,
    /// Make the zone empty.
    Reset,
    /// Operator: let nothing be written any more.
    SetReadOnly,
    /// Operator: let nothing be read or written any more.
    SetOffline,
    /// Operator: take back read-only and offline.
    SetNormal,
    /// Operator: the device makes the zone full by itself, as drives do with zones that stay active too long.
    FinishByDevice,
    /// Operator: the device would have the host do this; nothing takes an earlier one back.
    Recommend(Option<Recommendation>),
}

impl ZoneOp {
    /// Whether it is an operator's, whom no protocol speaks for.
    pub fn is_operators(self) -> bool {
        matches!(
            self,
            Self::SetReadOnly
                | Self::SetOffline
                | Self::SetNormal
                | Self::FinishByDevice
                | Self::Recommend(_)
        )
    }
}

/// Who is told of zones that an operator has changed; called on the operator's thread, once the change counts.
pub type Watcher = Arc<dyn Fn(ZoneNo) + Send + Sync>;

/// What a range of the device consists of, as far as it is all alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapExtent {
    /// Bytes, at least 1.
    pub len: u64,
    /// Which image of the chain says so: 0 for this one, 1 for its backing image.
    pub depth: u32,
    /// Some image of the chain says so, rather than none.
    pub present: bool,
    /// It reads as zeros.
    pub zero: bool,
    /// It has bytes that must be read.
    pub data: bool,
    /// Those are compressed.
    pub compressed: bool,
    /// Where the bytes (or the space kept for them) lie in the file, where they lie there as they are.
    pub offset: Option<u64>,
    /// That file.
    pub filename: Option<Arc<str>>,
}

impl MapExtent {
    /// Zeros that this image itself knows of.
    pub fn zeros(len: u64) -> MapExtent {
        MapExtent {
            len,
            depth: 0,
            present: true,
            zero: true,
            data: false,
            compressed: false,
            offset: None,
            filename: None,
        }
    }

    /// Bytes of which is known only that there are some.
    pub fn unknown(len: u64) -> MapExtent {
        MapExtent {
            zero: false,
            data: true,
            ..MapExtent::zeros(len)
        }
    }
}

/// What one queue (one thread) brings to its requests: preallocated in-flight slots.
pub struct Lane {
    slots: Option<RefCell<SlotPool>>,
    background: Arc<Background>,
}

/// What requests of a lane have left to be done behind them, on the same thread.
#[derive(Default)]
struct Background {
    count: AtomicUsize,
    waiting: Mutex<Vec<Waker>>,
}

/// Something goes on behind a lane's requests while this lives.
pub(crate) struct Work(Arc<Background>);

impl Drop for Work {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::SeqCst) == 1 {
            let waiting = std::mem::take(&mut *self.0.waiting());
            waiting.into_iter().for_each(Waker::wake);
        }
    }
}

impl Background {
    fn waiting(&self) -> MutexGuard<'_, Vec<Waker>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Most writes to sequential zones that one lane has in flight; more wait for one of them. A driver chooses the size
/// of its queues, and one with huge ones must not leave other lanes without slots.
const MAX_DEPTH: u32 = 1023;

impl Lane {
    /// A lane for at most `depth` writes in flight over `engine`'s zones, if there are any.
    pub(crate) fn new(engine: Option<&Engine>, depth: u32) -> Lane {
        Lane {
            slots: engine.and_then(|engine| some_slots(engine, depth.min(MAX_DEPTH))),
            background: Arc::default(),
        }
    }

    /// Returns once nothing goes on behind the lane's requests. Before a thread's runtime ends: what is cut off half-way
    /// there is as good as a failure.
    pub async fn quiet(&self) {
        let is_quiet = || self.background.count.load(Ordering::SeqCst) == 0;
        poll_fn(|cx| {
            if is_quiet() {
                return Poll::Ready(());
            }
            let mut waiting = self.background.waiting();
            if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                waiting.push(cx.waker().clone());
            }
            drop(waiting);
            if is_quiet() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }

    /// Something begins that goes on behind a request.
    pub(crate) fn work(&self) -> Work {
        self.background.count.fetch_add(1, Ordering::SeqCst);
        Work(self.background.clone())
    }

    /// The slots; `None` on a device without zones, or where other lanes have taken them all.
    pub(crate) fn slots(&self) -> Option<&RefCell<SlotPool>> {
        self.slots.as_ref()
    }
}

/// As many slots as there are, up to `depth`. None rather than a pool that would never give one.
fn some_slots(engine: &Engine, depth: u32) -> Option<RefCell<SlotPool>> {
    std::iter::successors(Some(depth), |depth| Some(depth / 2))
        .take_while(|depth| *depth > 0)
        .map(|depth| engine.slots(depth))
        .find(|pool| pool.capacity() > 0)
        .map(RefCell::new)
}

/// Where bytes of a node lie: one file, one offset. They stay there while this lives, so it is kept until the I/O that
/// it was asked for is over.
pub struct Resolved<'a> {
    /// The file.
    pub file: &'a File,
    /// Byte offset there.
    pub offset: u64,
    /// What keeps a format from moving the bytes; nothing where they cannot move.
    _guard: Option<zbdkit_qcow2::Resolved<'a>>,
}

impl<'a> Resolved<'a> {
    /// A place in a file that is always there.
    pub fn fixed(file: &'a File, offset: u64) -> Resolved<'a> {
        Resolved {
            file,
            offset,
            _guard: None,
        }
    }
}

impl<'a> From<zbdkit_qcow2::Resolved<'a>> for Resolved<'a> {
    fn from(place: zbdkit_qcow2::Resolved<'a>) -> Resolved<'a> {
        Resolved {
            file: place.file,
            offset: place.offset,
            _guard: Some(place),
        }
    }
}

/// A node of the block graph.
///
/// Contract: offsets and lengths are bytes. The handle at the root ([`crate::Device`]) has checked them against
/// the root's limits (range, alignment, read-only); a node checks again only what it changes itself. A request
/// counts wholly or not at all, answers exactly once, never panics for any argument, and may run on any thread
/// that has a [`zbdkit_io::Runtime`]. Buffers are kept alive by the requests that use them.
pub trait Node: Send + Sync {
    /// Limits, fixed at opening; but for the block size where [`crate::Device::format`] changes it.
    fn limits(&self) -> &Limits;

    /// The driver's name, as in `driver=`.
    fn driver(&self) -> &'static str;

    /// Where the bytes lie, if that is known at once, is one run of one file, and nothing but that I/O is to be done:
    /// the requests of the hot path then go straight to the file. `None` sends them through the methods below.
    fn resolve(&self, _offset: u64, _len: u64, _access: Access) -> Option<Resolved<'_>> {
        None
    }

    /// The file that all bytes of this node lie in, one behind the other.
    fn file(&self) -> Option<&File> {
        None
    }

    /// The node as a qcow2 image, if it is one.
    fn as_qcow2(&self) -> Option<&Qcow2Node> {
        None
    }

    /// Fails where an earlier failure of this node was final: it takes no changes until it is reopened.
    fn check(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Reads into all of `buf`.
    fn read<'a>(&'a self, lane: &'a Lane, buf: IoBuf, offset: u64, cross: CrossZone) -> Request<'a, ()>;

    /// Writes all of `buf`.
    fn write<'a>(&'a self, lane: &'a Lane, buf: IoBuf, offset: u64) -> Request<'a, ()>;

    /// Makes what was acknowledged before the call durable.
    fn flush<'a>(&'a self) -> Request<'a, ()>;

    /// Makes the range read as zeros; `unmap` allows to give its space back.
    fn write_zeroes<'a>(&'a self, lane: &'a Lane, offset: u64, len: u64, unmap: bool) -> Request<'a, ()>;

    /// Marks the range's blocks: their reads fail with [`Error::Uncorrectable`] until they are written again, also by
    /// [`Node::write_zeroes`], or their zone is reset. In a sequential zone it is a write, which moves the pointer. Kept as
    /// long as the image is, once acknowledged; above a write pointer as long as a write there would be.
    fn mark_uncorrectable<'a>(&'a self, _lane: &'a Lane, _offset: u64, _len: u64) -> Request<'a, ()> {
        Box::pin(async { Err(Error::NotSupported("marking blocks uncorrectable")) })
    }

    /// The blocks that are marked so; `None` where none can be.
    fn marks(&self) -> Option<&Marks> {
        None
    }

    /// The range's contents are not needed any more: they may read as zeros or as before.
    fn discard<'a>(&'a self, lane: &'a Lane, offset: u64, len: u64) -> Request<'a, ()>;

    /// What the first bytes of a range that is not empty consist of; the extent is at most `len` long.
    fn map<'a>(&'a self, _offset: u64, len: u64) -> Request<'a, MapExtent> {
        Box::pin(async move { Ok(MapExtent::unknown(len)) })
    }

    /// A sequential zone was reset: nothing below its start counts any more, and nobody reads the range before it is
    /// written again. Gives its space back.
    fn release<'a>(&'a self, range: Range<u64>) -> Request<'a, ()> {
        Box::pin(async move {
            let lane = Lane::new(None, 0);
            self.discard(&lane, range.start, range.end - range.start).await
        })
    }

    /// The sequential zone at that range takes writes in any order from now on, until [`Node::release`]: what is not written
    /// yet above a write matters too. For nodes that make use of the order of writes.
    fn write_anywhere<'a>(&'a self, _range: Range<u64>) -> Request<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    /// Appends `buf` to the zone that starts at `zone_start`; the answer is the byte offset it got.
    fn append<'a>(&'a self, _lane: &'a Lane, _buf: IoBuf, _zone_start: u64) -> Request<'a, u64> {
        Box::pin(async { Err(Error::NotSupported("zone append")) })
    }

    /// One operation on the zone that starts at `zone_start`.
    fn zone_op<'a>(&'a self, _op: ZoneOp, _zone_start: u64) -> Request<'a, ()> {
        Box::pin(async { Err(Error::NotSupported("zone management")) })
    }

    /// Commits a zone random write area up to byte `end`, which lies in it or at its end and is a multiple of the
    /// granularity from the zone's start, or the end of the capacity: the write pointer moves there.
    fn commit_zrwa<'a>(&'a self, _end: u64) -> Request<'a, ()> {
        Box::pin(async { Err(Error::NotSupported("a zone random write area")) })
    }

    /// Attaches a descriptor extension to the empty zone that starts at `zone_start`, which is closed afterwards and takes
    /// an active resource. With `zrwa` it gets a random write area as well, both or neither. Durable once acknowledged. A
    /// shorter extension than the device's is filled up with zeros.
    fn set_extension<'a>(&'a self, _zone_start: u64, _extension: &'a [u8], _zrwa: bool) -> Request<'a, ()> {
        Box::pin(async { Err(Error::NotSupported("zone descriptor extensions")) })
    }

    /// The descriptor extension of the zone that starts at `zone_start`, where it has one: of the device's size.
    fn extension<'a>(&'a self, _zone_start: u64) -> Request<'a, Option<Vec<u8>>> {
        Box::pin(async { Err(Error::NotSupported("zone descriptor extensions")) })
    }

    /// Resets every sequential zone that can be reset, as one operation.
    fn reset_all<'a>(&'a self) -> Request<'a, ()> {
        Box::pin(async { Err(Error::NotSupported("zone management")) })
    }

    /// Reports the zones from the one that holds `from`, until the sink breaks.
    fn report<'a>(
        &'a self,
        _from: u64,
        _filter: Filter,
        _sink: &'a mut dyn FnMut(ZoneInfo) -> ControlFlow<()>,
    ) -> Request<'a, ()> {
        Box::pin(async { Err(Error::NotSupported("zone report")) })
    }

    /// Has `watcher` told of each zone that an operation of [`ZoneOp::is_operators`] changes through this node, for as long
    /// as the node lives; a watcher that ends earlier holds its own end weakly.
    fn watch(&self, _watcher: Watcher) {}

    /// Closes cleanly: nothing is in flight any more, and everything is durable when it succeeds.
    fn close<'a>(&'a self) -> Request<'a, ()>;
}
