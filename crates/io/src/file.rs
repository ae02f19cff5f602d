//! Files: a descriptor, or a test's own storage, behind one handle.
//!
//! # Files on tmpfs
//!
//! tmpfs is memory: a read or a write there is a copy that waits for nothing, and its sync does nothing. io_uring
//! sends both to kernel worker threads, since tmpfs does not offer transfers that never wait. On Linux 6.18 with two
//! processors, one thread made 92,000 random 4 KiB reads a second at depth 1 and 356,000 at depth 32 that way, and
//! 910,000 and 1,030,000 with plain system calls (a bare loop of them made 1,160,000). So for a regular
//! file on tmpfs (asked once, of `fstatfs`), reads, writes and syncs are made in place, on the thread that asks for
//! them, on both backends. Only memory that was swapped out could make one wait.

use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;

use crate::buf::IoBuf;
use crate::inplace;
use crate::nvme::{NvmeCommand, NvmeCompletion};
use crate::runtime::{Kind, Operation, Request, yield_now};
use crate::sys;

/// A future that stays on its thread.
pub type LocalBoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// What a descriptor asks of I/O.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileKind {
    /// The descriptor was opened with `O_DIRECT`, and offsets, lengths and memory must be multiples of this many
    /// bytes, a power of two. Memory that is not aligned is copied; offsets and lengths must be right.
    pub direct_align: Option<u32>,
}

/// Storage of a test's own: a device that crashes, fails or holds requests back.
pub trait Storage: Send + Sync {
    /// Carries out one operation wholly, with the meaning that [`File`]'s method of that name has.
    fn submit(&self, op: StorageOp) -> LocalBoxFuture<'static, io::Result<()>>;
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Whether there are no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Sets the length in bytes.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// [`File::nvme`], for what plays an NVMe device.
    fn nvme(
        &self,
        _command: NvmeCommand,
        _buf: IoBuf,
    ) -> LocalBoxFuture<'static, io::Result<NvmeCompletion>> {
        Box::pin(async { Err(io::Error::from_raw_os_error(libc::ENOTTY)) })
    }
}

/// An operation for a [`Storage`]. All numbers are bytes.
#[derive(Debug)]
#[expect(
    missing_docs,
    reason = "the fields are the arguments of the methods of `File`"
)]
pub enum StorageOp {
    /// [`File::read`].
    Read { buf: IoBuf, offset: u64 },
    /// [`File::write`].
    Write { buf: IoBuf, offset: u64 },
    /// [`File::datasync`].
    DataSync,
    /// [`File::sync`].
    Sync,
    /// [`File::punch_hole`].
    PunchHole { offset: u64, len: u64 },
    /// [`File::zero_range`].
    ZeroRange { offset: u64, len: u64 },
    /// [`File::allocate`].
    Allocate { offset: u64, len: u64 },
}

/// An open file or block device; clones share it. Its asynchronous methods need a runtime on their thread.
///
/// A request counts wholly or not at all. Dropping a future does not stop the I/O it issued: the file and the buffer
/// are kept until it ends.
#[derive(Clone)]
pub struct File {
    inner: Arc<Inner>,
}

enum Inner {
    Fd(FdFile),
    Custom(Arc<dyn Storage>),
}

struct FdFile {
    fd: OwnedFd,
    direct_align: Option<u32>,
    /// A pipe or a socket: offsets mean nothing.
    stream: bool,
    /// A regular file on tmpfs.
    in_memory: bool,
}

impl Drop for FdFile {
    fn drop(&mut self) {
        // A ring may keep the open file description after the last operation was completed: where a worker thread of
        // the kernel lets go of it last, that waits until the ring is entered again. No I/O is left in flight here,
        // so nothing is guarded by a lock any more.
        if !self.stream {
            sys::unlock_all(self.fd.as_raw_fd());
        }
    }
}

/// Zeros written at once where the file system cannot make a hole.
const ZEROS: u64 = 1 << 20;

/// Bytes copied at once where direct I/O cannot use the caller's memory.
const BOUNCE: usize = 1 << 20;

impl File {
    /// Takes over a descriptor, open for what will be done with it. For a pipe or a socket offsets are ignored. With the
    /// last handle the locks of its open file description (fcntl(2), F_OFD_SETLK) go, too.
    pub fn from_fd(fd: OwnedFd, kind: FileKind) -> File {
        let (stream, in_memory) = (sys::is_stream(&fd), sys::is_tmpfs(&fd));
        let direct_align = kind.direct_align.filter(|align| *align > 1);
        // tmpfs accepts O_DIRECT and ignores it; whoever asked for an alignment gets it checked all the same.
        File {
            inner: Arc::new(Inner::Fd(FdFile {
                fd,
                direct_align,
                stream,
                in_memory,
            })),
        }
    }

    /// A file whose operations go to `storage`.
    pub fn custom(storage: Arc<dyn Storage>) -> File {
        File {
            inner: Arc::new(Inner::Custom(storage)),
        }
    }

    /// Fills `buf` from `offset` on. What lies past the end of the file reads as zeros.
    pub async fn read(&self, buf: IoBuf, offset: u64) -> io::Result<()> {
        match &*self.inner {
            Inner::Fd(file) => self.transfer(file, Kind::Read, buf, offset).await,
            Inner::Custom(storage) => storage.submit(StorageOp::Read { buf, offset }).await,
        }
    }

    /// Writes all of `buf` at `offset`. The file grows as needed.
    pub async fn write(&self, buf: IoBuf, offset: u64) -> io::Result<()> {
        match &*self.inner {
            Inner::Fd(file) => self.transfer(file, Kind::Write, buf, offset).await,
            Inner::Custom(storage) => storage.submit(StorageOp::Write { buf, offset }).await,
        }
    }

    /// Makes completed writes durable, and of the metadata what is needed to read them back.
    pub async fn datasync(&self) -> io::Result<()> {
        match &*self.inner {
            Inner::Fd(file) => self.flush(file, true).await,
            Inner::Custom(storage) => storage.submit(StorageOp::DataSync).await,
        }
    }

    /// Makes completed writes and all metadata durable.
    pub async fn sync(&self) -> io::Result<()> {
        match &*self.inner {
            Inner::Fd(file) => self.flush(file, false).await,
            Inner::Custom(storage) => storage.submit(StorageOp::Sync).await,
        }
    }

    /// Gives the blocks of a range back; it reads as zeros. The length of the file stays.
    pub async fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        match &*self.inner {
            Inner::Fd(file) => self.fallocate(file, PUNCH_HOLE, offset, len).await,
            Inner::Custom(storage) => storage.submit(StorageOp::PunchHole { offset, len }).await,
        }
    }

    /// Makes a range read as zeros by the cheapest way that the file system has. It may keep its blocks or lose them.
    pub async fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        let file = match &*self.inner {
            Inner::Fd(file) => file,
            Inner::Custom(storage) => return storage.submit(StorageOp::ZeroRange { offset, len }).await,
        };
        for mode in [ZERO_RANGE, PUNCH_HOLE] {
            match self.fallocate(file, mode, offset, len).await {
                Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {}
                other => return other,
            }
        }
        self.write_zeros(offset, len).await
    }

    async fn write_zeros(&self, mut offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        let zeros = IoBuf::try_alloc(len.min(ZEROS) as usize)?;
        while offset < end {
            let n = (end - offset).min(ZEROS);
            self.write(zeros.slice(0..n as usize), offset).await?;
            offset += n;
            yield_now().await;
        }
        Ok(())
    }

    /// Gives the file blocks for a range, so that writes to it cannot fail for want of space. It grows as needed.
    pub async fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        match &*self.inner {
            Inner::Fd(file) => self.fallocate(file, 0, offset, len).await,
            Inner::Custom(storage) => storage.submit(StorageOp::Allocate { offset, len }).await,
        }
    }

    /// Length in bytes of the file or block device.
    pub fn len(&self) -> io::Result<u64> {
        match &*self.inner {
            Inner::Fd(file) => sys::length(&file.fd),
            Inner::Custom(storage) => storage.len(),
        }
    }

    /// Whether the length is zero.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Sets the length in bytes. Blocks for as long as the file system takes.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        match &*self.inner {
            Inner::Fd(file) => Ok(rustix::fs::ftruncate(&file.fd, len)?),
            Inner::Custom(storage) => storage.set_len(len),
        }
    }

    /// The descriptor, if there is one.
    pub fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        match &*self.inner {
            Inner::Fd(file) => Some(file.fd.as_fd()),
            Inner::Custom(_) => None,
        }
    }

    /// The alignment in bytes that offsets and lengths need, if the file is open for direct I/O.
    pub fn direct_align(&self) -> Option<u32> {
        match &*self.inner {
            Inner::Fd(file) => file.direct_align,
            Inner::Custom(_) => None,
        }
    }

    async fn transfer(&self, file: &FdFile, kind: Kind, buf: IoBuf, offset: u64) -> io::Result<()> {
        let len = buf.len() as u64;
        if len == 0 {
            return Ok(());
        }
        if offset.checked_add(len).is_none_or(|end| end > i64::MAX as u64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let Some(align) = file.direct_align else {
            return self.transfer_aligned(file, kind, 1, buf, offset).await;
        };
        if (offset | len) & u64::from(align - 1) != 0 {
            let text = format!("offset {offset} and length {len} need to be multiples of {align} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        if buf.is_aligned(align as usize) {
            return self.transfer_aligned(file, kind, align, buf, offset).await;
        }
        self.bounce(file, kind, align, buf, offset).await
    }

    /// Direct I/O with memory that is not aligned goes through a copy that is: piece by piece, since a guest chooses
    /// the length, and can make it longer than all of its memory.
    async fn bounce(&self, file: &FdFile, kind: Kind, align: u32, buf: IoBuf, offset: u64) -> io::Result<()> {
        let len = buf.len();
        let piece = BOUNCE.max(align as usize);
        let copy = IoBuf::try_alloc(len.min(piece))?;
        let mut done = 0;
        while done < len {
            let n = (len - done).min(piece);
            let (ours, theirs) = (copy.slice(0..n), buf.slice(done..done + n));
            if kind == Kind::Write {
                ours.copy_from_buf(&theirs);
            }
            self.transfer_aligned(file, kind, align, ours.clone(), offset + done as u64)
                .await?;
            if kind == Kind::Read {
                theirs.copy_from_buf(&ours);
            }
            done += n;
        }
        Ok(())
    }

    async fn transfer_aligned(
        &self,
        file: &FdFile,
        kind: Kind,
        align: u32,
        buf: IoBuf,
        offset: u64,
    ) -> io::Result<()> {
        let offset = if file.stream { sys::NO_OFFSET } else { offset };
        let len = buf.len() as u64;
        let request = Request {
            kind,
            fd: file.fd.as_raw_fd(),
            offset,
            len,
            align,
            buf: Some(buf),
        };
        if file.in_memory {
            inplace::transfer(request)
        } else {
            Operation::new(request, Some(self)).await
        }
    }

    async fn flush(&self, file: &FdFile, data_only: bool) -> io::Result<()> {
        let fd = file.fd.as_raw_fd();
        if file.in_memory {
            return done(sys::fsync(fd, data_only));
        }
        let kind = Kind::Sync { data_only };
        let request = Request {
            kind,
            fd,
            offset: 0,
            len: 0,
            align: 1,
            buf: None,
        };
        Operation::new(request, Some(self)).await
    }

    /// Has the device behind the file, a character device of NVMe, carry out `command` with `buf` as its data, which may
    /// be empty. The answer is the device's; errors are those of getting the command there and back.
    ///
    /// A command is never sent twice. After an error the device may have carried it out all the same, unless the
    /// error is one of not supporting such commands (EOPNOTSUPP, ENOTTY).
    pub async fn nvme(&self, command: NvmeCommand, buf: IoBuf) -> io::Result<NvmeCompletion> {
        let file = match &*self.inner {
            Inner::Fd(file) => file,
            Inner::Custom(storage) => return storage.nvme(command, buf).await,
        };
        if buf.segments().len() > sys::IOV_MAX || buf.len() > sys::MAX_RW {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let request = Request {
            kind: Kind::Nvme(command),
            fd: file.fd.as_raw_fd(),
            offset: 0,
            len: buf.len() as u64,
            align: 1,
            buf: Some(buf),
        };
        let (status, result) = Operation::new(request, Some(self)).outcome().await;
        match u16::try_from(status) {
            Ok(status) => Ok(NvmeCompletion { status, result }),
            Err(_) if status < 0 => Err(io::Error::from_raw_os_error(-status)),
            Err(_) => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    async fn fallocate(&self, file: &FdFile, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > i64::MAX as u64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if len == 0 {
            return Ok(());
        }
        let kind = Kind::Allocate { mode };
        let request = Request {
            kind,
            fd: file.fd.as_raw_fd(),
            offset,
            len,
            align: 1,
            buf: None,
        };
        Operation::new(request, Some(self)).await
    }
}

const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

fn done(result: i32) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::from_raw_os_error(-result))
    } else {
        Ok(())
    }
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.inner {
            Inner::Fd(file) => write!(f, "File(fd {})", file.fd.as_raw_fd()),
            Inner::Custom(_) => f.write_str("File(custom)"),
        }
    }
}
