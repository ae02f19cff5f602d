//! Guest memory: regions that a peer gave us as file descriptors, mapped, changeable and revocable.
//!
//! A [`GuestMemory`] is the handle that a device's threads share. The control side publishes a new map with
//! [`set`](GuestMemory::set), [`add`](GuestMemory::add) and [`remove`](GuestMemory::remove); a request takes a
//! [`MemGuard`] and keeps the map that it started with, and so does every I/O operation issued for it, until its
//! completion. [`wait_released`](GuestMemory::wait_released) waits until nothing holds an older map.
//! A region is unmapped when the last map with it goes.
//!
//! What a hostile peer can still do: *truncate a file after it was mapped*. A region that ends past its file is
//! refused, but only a file sealed against shrinking (`F_SEAL_SHRINK`) stays as long as it was. Data that the
//! kernel moves for us (the read, write and their vectored forms) then fails with `EFAULT`; our own accesses to
//! ring indexes, request headers, and copies through [`IoBuf`] would raise `SIGBUS` and end the process. Such a
//! peer only loses its own device, as each daemon serves the guests of one owner;
//! [`shrinkable`](GuestMemory::shrinkable) tells who wants to warn about it.

#![expect(unsafe_code, reason = "hands out addresses of mapped guest memory")]

mod error;

use std::cell::{Cell, RefCell};
use std::fs::File as StdFile;
use std::io;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::ptr;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::buf::{IoBuf, Segment, SegmentList};
pub use error::{MemError, StillInUse};

/// The most regions that one guest may have; vhost-user and vfio-user peers send a few dozen.
pub const MAX_REGIONS: usize = 512;

const PAGE: u64 = 4096;

/// A piece of guest memory as a peer describes it. All numbers are bytes.
#[derive(Debug)]
pub struct Region {
    /// Where the guest sees it.
    pub guest_addr: u64,
    /// Its length.
    pub size: u64,
    /// Where the peer (a virtual machine monitor) has mapped it; vhost-user puts ring addresses in these terms.
    pub user_addr: u64,
    /// The file that holds it.
    pub fd: OwnedFd,
    /// Where in the file it starts; a multiple of the page size.
    pub offset: u64,
    /// Whether the device may write to it.
    pub writable: bool,
}

/// What a device does with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It takes bytes from the guest (the data of a write request).
    Read,
    /// It gives bytes to the guest (the data of a read request).
    Write,
}

/// Memory of one guest, shared by the threads of its device. Cloning gives another handle to the same memory.
#[derive(Clone)]
pub struct GuestMemory {
    handle: Arc<Handle>,
}

struct Handle {
    /// Tells the handles of this process apart in a thread's cache; never reused.
    id: u64,
    /// The generation of `current`, readable without the lock.
    generation: Arc<AtomicU64>,
    current: Mutex<Arc<Map>>,
    live: Arc<Live>,
}

/// One published state of the memory.
struct Map {
    mmap: GuestMemoryMmap,
    /// Sorted by guest address, like the regions of `mmap`.
    info: Vec<RegionInfo>,
    generation: u64,
    /// Declared last, so that everything above is unmapped when this says that the map is gone.
    _token: LiveToken,
}

#[derive(Clone)]
struct RegionInfo {
    guest_addr: u64,
    size: u64,
    user_addr: u64,
    writable: bool,
    shrinkable: bool,
}

/// Generations of the maps that somebody holds.
struct Live {
    generations: Mutex<Vec<u64>>,
    changed: Condvar,
}

struct LiveToken {
    live: Arc<Live>,
    generation: u64,
}

impl LiveToken {
    fn new(live: &Arc<Live>, generation: u64) -> LiveToken {
        lock(&live.generations).push(generation);
        LiveToken {
            live: live.clone(),
            generation,
        }
    }
}

impl Drop for LiveToken {
    fn drop(&mut self) {
        lock(&self.live.generations).retain(|g| *g != self.generation);
        self.live.changed.notify_all();
    }
}

/// A panic elsewhere does not make these locks' contents wrong: each is changed in one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for GuestMemory {
    fn default() -> GuestMemory {
        GuestMemory::new()
    }
}

impl GuestMemory {
    /// Memory without any region yet.
    pub fn new() -> GuestMemory {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let live = Arc::new(Live {
            generations: Mutex::new(Vec::new()),
            changed: Condvar::new(),
        });
        let map = Map {
            mmap: GuestMemoryMmap::default(),
            info: Vec::new(),
            generation: 1,
            _token: LiveToken::new(&live, 1),
        };
        GuestMemory {
            handle: Arc::new(Handle {
                id: NEXT.fetch_add(1, Ordering::Relaxed),
                generation: Arc::new(AtomicU64::new(1)),
                current: Mutex::new(Arc::new(map)),
                live,
            }),
        }
    }

    /// Replaces all regions. New requests see only these; where one is refused, nothing changes.
    pub fn set(&self, regions: Vec<Region>) -> Result<(), MemError> {
        let mut mapped = Vec::with_capacity(regions.len().min(MAX_REGIONS));
        for region in regions {
            if mapped.len() == MAX_REGIONS {
                return Err(MemError::TooManyRegions);
            }
            mapped.push(map_region(region)?);
        }
        let mut current = lock(&self.handle.current);
        self.publish(&mut current, mapped)
    }

    /// Adds a region.
    pub fn add(&self, region: Region) -> Result<(), MemError> {
        let region = map_region(region)?;
        let mut current = lock(&self.handle.current);
        let mut regions = current.parts();
        if regions.len() >= MAX_REGIONS {
            return Err(MemError::TooManyRegions);
        }
        regions.push(region);
        self.publish(&mut current, regions)
    }

    /// Removes the region with exactly this guest address and size. Use [`wait_released`](Self::wait_released)
    /// before telling the peer that it is gone.
    pub fn remove(&self, guest_addr: u64, size: u64) -> Result<(), MemError> {
        let mut current = lock(&self.handle.current);
        let mut regions = current.parts();
        let before = regions.len();
        regions.retain(|(_, info)| (info.guest_addr, info.size) != (guest_addr, size));
        if regions.len() == before {
            return Err(MemError::NoSuchRegion { guest_addr, size });
        }
        self.publish(&mut current, regions)
    }

    /// Removes every region: new requests reach no memory.
    pub fn revoke(&self) {
        let mut current = lock(&self.handle.current);
        self.publish(&mut current, Vec::new())
            .expect("no regions do not overlap");
    }

    fn publish(
        &self,
        current: &mut Arc<Map>,
        mut regions: Vec<(Arc<GuestRegionMmap>, RegionInfo)>,
    ) -> Result<(), MemError> {
        regions.sort_by_key(|(_, info)| info.guest_addr);
        for pair in regions.windows(2) {
            let (first, second) = (&pair[0].1, &pair[1].1);
            if first.guest_addr + first.size > second.guest_addr {
                return Err(MemError::Overlap {
                    guest_addr: second.guest_addr,
                });
            }
        }
        let (maps, info): (Vec<_>, Vec<_>) = regions.into_iter().unzip();
        let mmap = if maps.is_empty() {
            GuestMemoryMmap::default()
        } else {
            GuestMemoryMmap::from_arc_regions(maps).expect("regions are sorted and apart")
        };
        let generation = current.generation + 1;
        let token = LiveToken::new(&self.handle.live, generation);
        let old = std::mem::replace(
            current,
            Arc::new(Map {
                mmap,
                info,
                generation,
                _token: token,
            }),
        );
        self.handle.generation.store(generation, Ordering::Release);
        drop(old);
        Ok(())
    }

    /// The current map, for one request or one batch of them. Hold it no longer than that (not over a sleep), or
    /// [`wait_released`](Self::wait_released) waits for you.
    ///
    /// While the thread holds another guard of the same map this touches nothing that other threads write.
    pub fn guard(&self) -> MemGuard {
        let local = LOCALS.with_borrow_mut(|locals| self.local(locals));
        local.users.set(local.users.get() + 1);
        let map = local.map.borrow().as_ref().map_or(ptr::null(), Arc::as_ptr);
        MemGuard { local, map }
    }

    /// This thread's holder of the current map.
    fn local(&self, locals: &mut Vec<Rc<Local>>) -> Rc<Local> {
        let generation = self.handle.generation.load(Ordering::Acquire);
        if let Some(index) = locals.iter().position(|l| l.handle_id == self.handle.id) {
            let local = &locals[index];
            if local.users.get() > 0 {
                if local.generation.get() == generation {
                    return local.clone();
                }
                // Its users keep the old map until they end; new ones get a holder of their own.
                locals.swap_remove(index);
            } else {
                local.take(&self.handle);
                return local.clone();
            }
        }
        locals.retain(|l| l.users.get() > 0 || l.handle.strong_count() > 0);
        let local = Rc::new(Local {
            handle_id: self.handle.id,
            handle: Arc::downgrade(&self.handle),
            newest: self.handle.generation.clone(),
            generation: Cell::new(0),
            users: Cell::new(0),
            map: RefCell::new(None),
        });
        local.take(&self.handle);
        locals.push(local.clone());
        local
    }

    /// Waits until no guard and no operation in flight holds a map older than the current one, at most until
    /// `deadline`. Blocks the thread: it must not be one whose own requests hold the memory.
    pub fn wait_released(&self, deadline: Instant) -> Result<(), StillInUse> {
        let current = self.handle.generation.load(Ordering::Acquire);
        let mut generations = lock(&self.handle.live.generations);
        loop {
            let maps = generations.iter().filter(|g| **g < current).count();
            if maps == 0 {
                return Ok(());
            }
            let Some(left) = deadline
                .checked_duration_since(Instant::now())
                .filter(|left| !left.is_zero())
            else {
                return Err(StillInUse { maps });
            };
            let changed = self.handle.live.changed.wait_timeout(generations, left);
            generations = changed.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// How many current regions the peer could shrink under us: their files are not sealed (see the module's notes).
    pub fn shrinkable(&self) -> usize {
        lock(&self.handle.current)
            .info
            .iter()
            .filter(|info| info.shrinkable)
            .count()
    }
}

impl Map {
    fn parts(&self) -> Vec<(Arc<GuestRegionMmap>, RegionInfo)> {
        // `GuestRegionCollection` gives its regions by reference only; a second region over the same mapping
        // shares it.
        let regions = self.mmap.iter().map(|region| {
            let again = GuestRegionMmap::with_arc(region.get_mmap(), region.start_addr());
            Arc::new(again.expect("it was a region before"))
        });
        regions.zip(self.info.iter().cloned()).collect()
    }

    /// The address of `addr` in this process, the bytes from there to the end of its region, and the region.
    fn find(&self, addr: u64) -> Option<(*mut u8, u64, &RegionInfo)> {
        let index = self
            .info
            .partition_point(|info| info.guest_addr <= addr)
            .checked_sub(1)?;
        let info = &self.info[index];
        let within = addr - info.guest_addr;
        if within >= info.size {
            return None;
        }
        let region = self.mmap.find_region(GuestAddress(addr))?;
        let host = region
            .get_host_address(region.to_region_addr(GuestAddress(addr))?)
            .ok()?;
        Some((host, info.size - within, info))
    }
}

fn map_region(region: Region) -> Result<(Arc<GuestRegionMmap>, RegionInfo), MemError> {
    let Region {
        guest_addr,
        size,
        user_addr,
        fd,
        offset,
        writable,
    } = region;
    let overflow = MemError::Overflow { guest_addr, size };
    if size == 0 {
        return Err(MemError::Empty { guest_addr });
    }
    let Ok(len) = usize::try_from(size) else {
        return Err(overflow);
    };
    let end = offset.checked_add(size).filter(|end| *end <= i64::MAX as u64);
    let (Some(end), Some(_), Some(_)) = (end, guest_addr.checked_add(size), user_addr.checked_add(size))
    else {
        return Err(overflow);
    };
    if !offset.is_multiple_of(PAGE) {
        return Err(MemError::Unaligned { guest_addr, offset });
    }
    let failed = |source: io::Error| MemError::Map { guest_addr, source };
    let stat = rustix::fs::fstat(&fd).map_err(|e| failed(e.into()))?;
    let file_len = u64::try_from(stat.st_size).unwrap_or(0);
    if file_len < end {
        return Err(MemError::PastEndOfFile {
            guest_addr,
            end,
            file_len,
        });
    }
    let sealed = rustix::fs::fcntl_get_seals(&fd).is_ok_and(|s| s.contains(rustix::fs::SealFlags::SHRINK));
    let prot = if writable {
        libc::PROT_READ | libc::PROT_WRITE
    } else {
        libc::PROT_READ
    };
    let mapping = MmapRegionBuilder::new(len)
        .with_mmap_prot(prot)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(StdFile::from(fd), offset))
        .build()
        .map_err(|e| {
            failed(match e {
                vm_memory::mmap::MmapRegionError::Mmap(e) => e,
                other => io::Error::other(other),
            })
        })?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(guest_addr)).ok_or(overflow)?;
    Ok((
        Arc::new(region),
        RegionInfo {
            guest_addr,
            size,
            user_addr,
            writable,
            shrinkable: !sealed,
        },
    ))
}

thread_local! {
    /// This thread's holders, one for each guest memory that it serves.
    static LOCALS: RefCell<Vec<Rc<Local>>> = const { RefCell::new(Vec::new()) };
}

/// One thread's share of a map: many guards, one count in the shared `Arc`, and that only while a guard lives.
struct Local {
    handle_id: u64,
    handle: Weak<Handle>,
    newest: Arc<AtomicU64>,
    generation: Cell<u64>,
    users: Cell<usize>,
    map: RefCell<Option<Arc<Map>>>,
}

impl Local {
    /// Takes hold of the current map; there is no user.
    fn take(&self, handle: &Handle) {
        debug_assert_eq!(self.users.get(), 0);
        let map = lock(&handle.current).clone();
        self.generation.set(map.generation);
        *self.map.borrow_mut() = Some(map);
    }
}

/// A map of guest memory, kept as it is and mapped while this lives. Stays on its thread; cloning is cheap.
pub struct MemGuard {
    local: Rc<Local>,
    map: *const Map,
}

impl MemGuard {
    fn map(&self) -> &Map {
        // SAFETY: `local` holds an `Arc` of this map, and lets it go only when the last guard, which counts
        // itself in `users`, is dropped.
        unsafe { &*self.map }
    }

    /// A buffer over the guest's memory at these addresses, each with its length in bytes, one after the other.
    /// Entries of no bytes are skipped. The buffer keeps the memory mapped.
    pub fn iobuf(&self, parts: &[(u64, u64)], access: Access) -> Result<IoBuf, MemError> {
        self.iobuf_from(parts.iter().copied(), access)
    }

    /// [`iobuf`](Self::iobuf) from an iterator, for callers that keep no list.
    pub fn iobuf_from(
        &self,
        parts: impl IntoIterator<Item = (u64, u64)>,
        access: Access,
    ) -> Result<IoBuf, MemError> {
        let map = self.map();
        let mut list = SegmentList::new();
        for (addr, len) in parts {
            let outside = || MemError::Outside { addr, len };
            addr.checked_add(len).ok_or_else(outside)?;
            if usize::try_from(len)
                .ok()
                .and_then(|len| len.checked_add(list.len()))
                .is_none()
            {
                return Err(MemError::TooLong);
            }
            let mut done = 0;
            while done < len {
                let (host, room, info) = map.find(addr + done).ok_or_else(outside)?;
                if access == Access::Write && !info.writable {
                    return Err(MemError::ReadOnly { addr });
                }
                let n = room.min(len - done);
                list.push(Segment::new(host, n as usize));
                done += n;
            }
        }
        Ok(IoBuf::from_guest(self.clone(), list))
    }

    /// The guest address of an address in the peer's own mapping (vhost-user's ring addresses).
    pub fn user_to_guest(&self, user_addr: u64) -> Option<u64> {
        self.map().info.iter().find_map(|info| {
            let within = user_addr
                .checked_sub(info.user_addr)
                .filter(|within| *within < info.size)?;
            Some(info.guest_addr + within)
        })
    }

    /// Whether no newer map has been published. A batch over several requests asks this in between.
    pub fn is_current(&self) -> bool {
        self.local.newest.load(Ordering::Acquire) == self.local.generation.get()
    }
}

impl Deref for MemGuard {
    type Target = GuestMemoryMmap;

    fn deref(&self) -> &GuestMemoryMmap {
        &self.map().mmap
    }
}

impl Clone for MemGuard {
    fn clone(&self) -> MemGuard {
        self.local.users.set(self.local.users.get() + 1);
        MemGuard {
            local: self.local.clone(),
            map: self.map,
        }
    }
}

impl Drop for MemGuard {
    fn drop(&mut self) {
        let users = self.local.users.get() - 1;
        self.local.users.set(users);
        if users == 0 {
            drop(self.local.map.take());
        }
    }
}
