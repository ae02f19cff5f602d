//! An open image: opening, reading, flushing, closing.
//!
//! Requests look places up in the cache ([`Qcow2::resolve`]) and go to the file without a lock. What changes the mapping
//! is one task at a time, the holder of [`Meta`]; `write` has the ways that a request takes there.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use zbdkit_io::{File, IoBuf, LocalBoxFuture};
use zbdkit_spec::qcow2::{EXT_ZONED, L1E_OFFSET_MASK};

use crate::check::zone_table;
use crate::compress;
use crate::error::Error;
use crate::failure::{Failure, Syncs};
use crate::grace::{Grace, Pin};
use crate::header::{Compression, Header};
use crate::l2::{Codec, Entry, Kind, L2Cache};
use crate::lock::{AsyncGuard, AsyncMutex, RangeLocks, lock};
use crate::metadata::Metadata;
use crate::refcounts::Refcounts;
use crate::replace::replace_header;
pub(crate) use crate::sectors::{Sectors, file_len, own_table, prepare, read_at, words, write_at};

/// What lies below an image.
pub trait Backing: Send + Sync {
    /// Size in bytes.
    fn len(&self) -> u64;
    /// Whether there is nothing.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Fills `buf` from `offset` on; the range ends within [`Backing::len`]. The error is an errno.
    fn read<'a>(&'a self, buf: IoBuf, offset: u64) -> LocalBoxFuture<'a, Result<(), i32>>;
}

/// How an image is opened.
#[derive(Clone, Default)]
pub struct Options {
    /// Nothing is changed.
    pub read_only: bool,
    /// Bytes of mapping that are kept in memory, 0 for the default (all that the image needs, at most 64 MiB).
    pub l2_cache: u64,
    /// The external data file.
    pub data_file: Option<File>,
    /// The backing image.
    pub backing: Option<Arc<dyn Backing>>,
    /// Incompatible features that the caller takes care of.
    pub known_incompatible: u64,
    /// Autoclear features that the caller keeps true.
    pub known_autoclear: u64,
    /// Clusters that extensions name and the format does not know: bytes, and what they hold.
    pub areas: Vec<(Range<u64>, &'static str)>,
}

/// What a resolved place is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Writing in place.
    Write,
}

/// Where bytes of the device lie; they stay there while this lives.
pub struct Resolved<'a> {
    /// The file.
    pub file: &'a File,
    /// Byte offset there.
    pub offset: u64,
    /// Keeps the clusters.
    pub pin: Pin<'a>,
}

/// What a range of the device is mapped to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Bytes of the (data) file.
    Data {
        /// Where.
        offset: u64,
    },
    /// Zeros.
    Zero {
        /// Space that is kept for it.
        offset: Option<u64>,
    },
    /// Nothing: the backing image's bytes, or zeros.
    Unallocated,
    /// Compressed bytes.
    Compressed,
}

/// A range that is mapped alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub len: u64,
    /// To what.
    pub mapping: Mapping,
}

/// An open image, shared by all threads.
pub struct Qcow2 {
    pub(crate) file: File,
    pub(crate) data: Option<File>,
    pub(crate) sectors: Sectors,
    pub(crate) codec: Codec,
    pub(crate) cluster_bits: u32,
    /// Entries of an L2 table are 1 << this.
    pub(crate) l2_bits: u32,
    pub(crate) version: u32,
    pub(crate) compression: Compression,
    /// The data file is a raw image of its own, which must stay true.
    pub(crate) data_raw: bool,
    pub(crate) read_only: bool,
    size: AtomicU64,
    pub(crate) l1: RwLock<Vec<u64>>,
    pub(crate) l2: L2Cache,
    pub(crate) grace: Grace,
    pub(crate) ranges: RangeLocks,
    /// Clusters that hold metadata, which no data may be written to.
    pub(crate) metadata: RwLock<Metadata>,
    /// No data of the image lies past it: the end of the file, as far as it is known, in bytes.
    pub(crate) end: AtomicU64,
    meta: AsyncMutex<Meta>,
    /// The first failed write of metadata or sync is final.
    pub(crate) failure: Arc<Failure>,
    syncs: Arc<Syncs>,
    data_syncs: Option<Syncs>,
    pub(crate) backing: Option<Arc<dyn Backing>>,
    /// The header names a backing image which was not opened: nobody knows what shows where the image has nothing.
    pub(crate) backing_unknown: AtomicBool,
    /// The compressed cluster that was read last.
    inflated: Mutex<Option<(u64, Arc<Vec<u8>>)>>,
}

/// What only one task at a time changes.
pub(crate) struct Meta {
    pub(crate) header: Header,
    /// `None` where the image is open read-only.
    refcounts: Option<Refcounts>,
    /// Counted, zero, durable, and not named by anything yet.
    pub(crate) reserve: VecDeque<Range<u64>>,
    /// Not named any more, but counted, and maybe still used.
    pub(crate) pending: Vec<Range<u64>>,
    /// Clusters to take at the next refill.
    pub(crate) grow: u64,
    /// Room for compressed clusters: from a byte offset to the end of its cluster.
    pub(crate) packing: Range<u64>,
}

impl Meta {
    /// The counts; only images that are open for writing have them.
    pub(crate) fn refcounts(&mut self) -> Result<&mut Refcounts, Error> {
        self.refcounts.as_mut().ok_or(Error::ReadOnly)
    }
}

/// Bytes of mapping that are kept unless told otherwise: those of 512 GiB with clusters of 64 KiB.
const DEFAULT_L2_CACHE: u64 = 64 << 20;
/// The first refill takes so many bytes of clusters.
const FIRST_REFILL: u64 = 16 << 20;

impl Qcow2 {
    /// Opens an image whose header was read. An image that was left dirty is repaired first, if it may be written.
    pub async fn open(file: File, mut header: Header, options: Options) -> Result<Qcow2, Error> {
        header.check_features(options.known_incompatible)?;
        if header.external_data() != options.data_file.is_some() {
            return Err(Error::Refused(if header.external_data() {
                "the image keeps its data in a file of its own, which was not opened: name it with data-file"
                    .into()
            } else {
                "a data file was given, but the image keeps its data itself".into()
            }));
        }
        if !options.read_only {
            header = prepare(&file, header, &options).await?;
        }
        let codec = Codec {
            extended: header.extended_l2(),
            external: header.external_data(),
        };
        let l2_bits = header.cluster_bits - 3 - u32::from(codec.extended);
        let l1_needed = header.size.div_ceil(1u64 << (header.cluster_bits + l2_bits));
        if u64::from(header.l1_size) < l1_needed {
            return Err(Error::Invalid("L1 table is too small".into()));
        }
        let direct = file.direct_align().unwrap_or(1).max(1);
        let data_direct = options
            .data_file
            .as_ref()
            .and_then(File::direct_align)
            .unwrap_or(1);
        check_direct(&header, direct.max(data_direct))?;
        let sectors = Sectors {
            align: u64::from(direct.max(512)),
        };
        let l1_bytes = read_at(&file, header.l1_offset, 8 * header.l1_size as usize).await?;
        let failure = Arc::new(Failure::default());
        let syncs = Arc::new(Syncs::new(file.clone(), failure.clone()));
        let refcounts = match options.read_only {
            true => None,
            false => Some(Refcounts::load(file.clone(), syncs.clone(), &header, sectors).await?),
        };
        let end = match &options.data_file {
            // Data lies there where the device has it.
            Some(_) => header.size,
            None => file_len(&file)?,
        };
        let entry_bytes = 8 * codec.words() as u64;
        let all = header.size.div_ceil(header.cluster_size()) * entry_bytes;
        let cache = match options.l2_cache {
            0 => all.min(DEFAULT_L2_CACHE),
            bytes => bytes,
        };
        let image = Qcow2 {
            sectors,
            codec,
            cluster_bits: header.cluster_bits,
            l2_bits,
            version: header.version,
            compression: header.compression,
            data_raw: header.data_raw(),
            read_only: options.read_only,
            size: AtomicU64::new(header.size),
            l1: RwLock::new(words(&l1_bytes).collect()),
            l2: L2Cache::new(codec, l2_bits, cache, sectors.align),
            grace: Grace::default(),
            ranges: RangeLocks::default(),
            metadata: RwLock::default(),
            data_syncs: options
                .data_file
                .as_ref()
                .map(|data| Syncs::new(data.clone(), failure.clone())),
            failure,
            syncs,
            end: AtomicU64::new(end),
            data: options.data_file,
            backing_unknown: AtomicBool::new(options.backing.is_none() && header.backing_file.is_some()),
            backing: options.backing,
            inflated: Mutex::new(None),
            meta: AsyncMutex::new(Meta {
                reserve: VecDeque::new(),
                pending: Vec::new(),
                grow: (FIRST_REFILL >> header.cluster_bits).clamp(1, max_refill(header.cluster_bits)),
                packing: 0..0,
                refcounts,
                header,
            }),
            file,
        };
        if !image.read_only {
            image.find_metadata(&options.areas).await?;
        }
        Ok(image)
    }

    /// Notes every cluster that holds metadata, and refuses an image two of whose tables share one.
    async fn find_metadata(&self, areas: &[(Range<u64>, &'static str)]) -> Result<(), Error> {
        let mut meta = self.lock().await;
        let header = meta.header.clone();
        let snapshots = crate::snapshot::table::read(&self.file, &header).await?;
        let end = self
            .file
            .len()
            .map_err(|e| Error::io("finding the file's size", &e))?;
        let mut found = Metadata::default();
        let mut add = |offset: u64, bytes: u64, what: &'static str| {
            let run = offset >> self.cluster_bits..offset.saturating_add(bytes).div_ceil(self.cluster_size());
            if bytes > 0 && offset >= end {
                return Err(Error::Truncated {
                    what,
                    offset,
                    len: end,
                });
            }
            found.add(run).map_err(|cluster| {
                Error::Corrupt(format!(
                    "{what} at {offset:#x} overlaps other metadata in cluster {cluster}"
                ))
            })
        };
        add(0, self.cluster_size(), "the header")?;
        add(header.l1_offset, 8 * u64::from(header.l1_size), "the L1 table")?;
        add(header.snapshots_offset, snapshots.len, "the snapshot table")?;
        if header.zoned()
            && let Some((offset, zones)) = header
                .extension(EXT_ZONED)
                .and_then(|extension| zone_table(extension, header.size))
        {
            add(offset, 8 * u64::from(zones), "the zone table")?;
        }
        for (range, what) in areas {
            add(range.start, range.end - range.start, what)?;
        }
        for (offset, bytes) in snapshots.l1s() {
            add(offset, bytes, "a snapshot's L1 table")?;
        }
        let refcounts = meta.refcounts()?;
        let table = refcounts.table();
        let bytes = (table.end - table.start) << self.cluster_bits;
        add(table.start << self.cluster_bits, bytes, "the refcount table")?;
        for offset in refcounts.blocks() {
            add(offset, self.cluster_size(), "a refcount block")?;
        }
        self.with_l1(|l1| {
            let tables = l1
                .iter()
                .map(|entry| entry & L1E_OFFSET_MASK)
                .filter(|offset| *offset != 0);
            tables
                .into_iter()
                .try_for_each(|offset| add(offset, self.cluster_size(), "an L2 table"))
        })?;
        *self.metadata.write().unwrap_or_else(PoisonError::into_inner) = found;
        Ok(())
    }

    /// Size of the device, bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    pub(crate) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Relaxed);
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The header as it is now.
    pub async fn header(&self) -> Header {
        self.lock().await.header.clone()
    }

    /// The file that holds the image.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The file that holds the data: the image's own, or the external one.
    pub fn data_file(&self) -> &File {
        self.data.as_ref().unwrap_or(&self.file)
    }

    /// Whether it is open for reading only.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Takes the right to change metadata. Never with a pin in hand.
    pub(crate) async fn lock(&self) -> AsyncGuard<'_, Meta> {
        self.meta.lock().await
    }

    pub(crate) fn with_l1<T>(&self, look: impl FnOnce(&mut Vec<u64>) -> T) -> T {
        look(&mut self.l1.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// The L1 entry for a cluster of the device.
    pub(crate) fn l1_entry(&self, cluster: u64) -> u64 {
        let l1 = self.l1.read().unwrap_or_else(PoisonError::into_inner);
        l1.get((cluster >> self.l2_bits) as usize).copied().unwrap_or(0)
    }

    /// Fails with [`Error::Failed`] where an earlier failure was final: the image takes no changes until it is reopened.
    pub fn check_failed(&self) -> Result<(), Error> {
        self.failure.check()
    }

    /// Notes a failure whose outcome in the file is not known; see [`Failure::note`].
    pub(crate) fn note<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        self.failure.note(result)
    }

    /// A change of metadata, which must not be cut off, and whose failure may be final.
    pub(crate) async fn change<T>(&self, io: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        self.failure.note(self.failure.whole(io).await)
    }

    /// Reads into all of `buf`.
    pub async fn read(&self, buf: IoBuf, offset: u64) -> Result<(), Error> {
        self.check(offset, buf.len() as u64)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let pin = self.grace.pin();
            let run = self.run(at, (buf.len() - done) as u64).await?;
            let part = buf.slice(done..done + run.len as usize);
            match run.kind {
                Kind::Data => self
                    .data_file()
                    .read(part, run.offset)
                    .await
                    .map_err(|e| Error::io("read", &e))?,
                Kind::Zero => part.fill(0..part.len(), 0),
                Kind::Unallocated => {
                    drop(pin);
                    self.read_backing(part, at).await?;
                }
                Kind::Compressed | Kind::Invalid => {
                    let cluster = self.inflate(run.entry).await?;
                    let within = (at & (self.cluster_size() - 1)) as usize;
                    part.copy_from(&cluster[within..within + part.len()]);
                }
            }
            done += run.len as usize;
        }
        Ok(())
    }

    /// What lies below, zeros past its end.
    async fn read_backing(&self, buf: IoBuf, offset: u64) -> Result<(), Error> {
        let len = buf.len() as u64;
        let below = self.backing.as_ref().map_or(0, |backing| backing.len());
        let there = below.saturating_sub(offset).min(len) as usize;
        if let Some(backing) = &self.backing
            && there > 0
        {
            let read = backing.read(buf.slice(0..there), offset).await;
            read.map_err(|errno| Error::Io {
                op: "reading the backing image",
                errno,
            })?;
        }
        buf.fill(there..buf.len(), 0);
        Ok(())
    }

    /// The contents of a compressed cluster.
    async fn inflate(&self, entry: Entry) -> Result<Arc<Vec<u8>>, Error> {
        if let Some((word, cluster)) = &*lock(&self.inflated)
            && *word == entry.word
        {
            return Ok(cluster.clone());
        }
        let (offset, max) = compress::descriptor(entry.word, self.cluster_bits);
        let bytes = read_at(&self.file, offset, max as usize).await?;
        let mut cluster = vec![0; self.cluster_size() as usize];
        compress::decompress(self.compression, &bytes, &mut cluster)?;
        let cluster = Arc::new(cluster);
        *lock(&self.inflated) = Some((entry.word, cluster.clone()));
        Ok(cluster)
    }

    /// A compressed cluster's place may serve another one now.
    pub(crate) fn forget_inflated(&self) {
        *lock(&self.inflated) = None;
    }

    /// Makes what was completed before the call durable, and then frees what nothing maps any more.
    pub async fn flush(&self) -> Result<(), Error> {
        if self.read_only {
            return Ok(());
        }
        self.check_failed()?;
        if self.data.is_some() {
            self.sync_data().await?;
        }
        let mut meta = self.lock().await;
        if meta.pending.is_empty() {
            drop(meta);
            self.sync().await
        } else {
            self.reap(&mut meta).await
        }
    }

    /// Syncs the image's file. A failure is final.
    pub(crate) async fn sync(&self) -> Result<(), Error> {
        self.syncs.sync().await
    }

    /// Syncs the file that holds the data. A failure is final.
    pub(crate) async fn sync_data(&self) -> Result<(), Error> {
        self.data_syncs.as_ref().unwrap_or(&self.syncs).sync().await
    }

    /// Closes cleanly: everything durable, clusters that were taken and not used given back.
    pub async fn close(&self) -> Result<(), Error> {
        if self.read_only {
            return Ok(());
        }
        self.flush().await?;
        let mut meta = self.lock().await;
        self.settle(&mut meta).await
    }

    /// Changes the header by one write of what differs, synced before and after.
    pub async fn update_header(
        &self,
        change: impl FnOnce(&mut Header) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut meta = self.lock().await;
        self.write_header(&mut meta, change).await
    }

    pub(crate) async fn write_header(
        &self,
        meta: &mut Meta,
        change: impl FnOnce(&mut Header) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        self.check_failed()?;
        let mut new = meta.header.clone();
        change(&mut new)?;
        let written = self
            .failure
            .whole(replace_header(&self.file, self.sectors, &new))
            .await;
        if let Err(Error::Io { errno, .. }) = &written {
            // Whatever the errno: nobody knows which of the two headers counts.
            self.failure.fail(*errno);
        }
        written?;
        if self.backing.is_none() {
            let named = new.backing_file.is_some();
            self.backing_unknown.store(named, Ordering::Relaxed);
        }
        meta.header = new;
        Ok(())
    }

    pub(crate) fn check(&self, offset: u64, len: u64) -> Result<(), Error> {
        let size = self.size();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::OutOfRange { offset, len, size }),
        }
    }

    pub(crate) fn check_change(&self, offset: u64, len: u64) -> Result<(), Error> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        self.check_failed()?;
        self.check(offset, len)
    }
}

/// A run of clusters that are mapped alike.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    /// Bytes.
    pub(crate) len: u64,
    pub(crate) kind: Kind,
    /// The first cluster's entry.
    pub(crate) entry: Entry,
    /// Where its first byte lies, if it is data.
    pub(crate) offset: u64,
}

/// Most clusters that are mapped ahead at once.
pub(crate) const MAX_REFILL: u64 = 1 << 16;

/// Most clusters that one refill takes unasked: a crash leaves them leaked.
pub(crate) fn max_refill(cluster_bits: u32) -> u64 {
    ((1 << 30) >> cluster_bits).min(MAX_REFILL)
}

/// That all I/O can be as aligned as the files are opened for: the smallest piece of data that is mapped by itself is a
/// cluster, or a subcluster.
fn check_direct(header: &Header, align: u32) -> Result<(), Error> {
    let (what, size) = match header.extended_l2() {
        true => ("subclusters", header.subcluster_size()),
        false => ("clusters", header.cluster_size()),
    };
    if u64::from(align) > size {
        return Err(Error::Unsupported(format!(
            "cache.direct=on needs {what} of at least {align} bytes here, but the image's have {size}"
        )));
    }
    Ok(())
}
