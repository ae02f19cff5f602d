//! The machine below: opening, naming and identifying files. A trait, so that crash tests can stand in for it.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{self, AtFlags, Mode, OFlags, StatxFlags, XattrFlags};
use zbdkit_io::{File, FileKind, Words};

use crate::host_device::{self, sysfs::DeviceNumber};
use crate::lock::{self, Conflict, LockMode};

/// How a file is opened.
#[derive(Clone, Copy, Debug)]
pub struct FileOptions {
    /// Open for reading only.
    pub read_only: bool,
    /// Bypass the page cache (O_DIRECT), for data and metadata alike.
    pub direct: bool,
    /// The alignment of direct I/O in bytes, where it is known better than the kernel tells it of a file.
    pub direct_align: Option<u32>,
    /// A block device: nobody else may hold it, be it as a file system or by opening it like this (O_EXCL).
    pub exclusive: bool,
    /// Create it: exclusively, never through a link, with mode 0600.
    pub create_new: bool,
    /// QEMU's image locks to take.
    pub lock: LockMode,
    /// How long to retry while somebody else holds the locks.
    pub lock_wait: Duration,
}

impl FileOptions {
    /// An existing file, buffered, locked for the given access.
    pub fn existing(read_only: bool) -> FileOptions {
        let lock = if read_only {
            LockMode::Read
        } else {
            LockMode::Write
        };
        FileOptions {
            read_only,
            direct: false,
            direct_align: None,
            exclusive: false,
            create_new: false,
            lock,
            lock_wait: Duration::from_secs(3),
        }
    }

    /// A new file of our own, which nobody else locks.
    pub fn new_file() -> FileOptions {
        FileOptions {
            create_new: true,
            lock: LockMode::None,
            ..FileOptions::existing(false)
        }
    }
}

/// Which file it is, whatever its name: device, inode and birth time (nanoseconds since 1970; 0 if unknown).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileId {
    /// Device number (major << 32 | minor).
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Birth time.
    pub btime: u64,
}

/// Why a file could not be opened.
#[derive(Debug)]
pub enum HostError {
    /// The system refused.
    Io(io::Error),
    /// Somebody else holds the image.
    Locked(Conflict),
}

impl From<io::Error> for HostError {
    fn from(error: io::Error) -> HostError {
        HostError::Io(error)
    }
}

/// What the block layer asks of the machine besides reading and writing files. Calls may block; none is made
/// on the path of a request but [`Host::write_now`].
pub trait Host: Send + Sync {
    /// Opens (or creates) a file and takes its locks on the description that will carry the I/O.
    fn open(&self, path: &Path, options: &FileOptions) -> Result<File, HostError>;
    /// A sparse file in memory that has no name and dies with its last user.
    fn memory(&self, size: u64) -> io::Result<File>;
    /// Does a file of that name exist?
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// The number of the block device of that name; `None` for anything else, and on a machine that has none.
    fn block_device(&self, _path: &Path) -> io::Result<Option<DeviceNumber>> {
        Ok(None)
    }
    /// Is that the character device of an NVMe namespace?
    fn is_nvme_namespace(&self, _path: &Path) -> bool {
        false
    }
    /// Removes a name.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes the creation or removal of `path` durable.
    fn sync_name(&self, path: &Path) -> io::Result<()>;
    /// Which file `file` is.
    fn identity(&self, file: &File) -> io::Result<FileId>;
    /// The running kernel's boot id.
    fn boot_id(&self) -> io::Result<[u8; 16]>;
    /// Maps `count` words at byte `offset` of `file` with their blocks reserved, where stores into a mapping can
    /// neither fail nor block: on tmpfs. `None` elsewhere.
    fn map_words(&self, file: &File, offset: u64, count: usize) -> io::Result<Option<Words>>;
    /// A small write that the kernel has completed when this returns (page cache, not durable).
    fn write_now(&self, file: &File, data: &[u8], offset: u64) -> io::Result<()>;
    /// The identity that was attached to a data file, if its file system can hold one and it has one.
    fn image_id(&self, file: &File) -> Option<[u8; 16]>;
    /// Attaches an identity to a data file; `false` where the file system cannot hold one.
    fn set_image_id(&self, file: &File, id: [u8; 16]) -> bool;
}

/// The real machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsHost;

const IMAGE_ID: &str = "user.zbdkit.image";
const TMPFS_MAGIC: u64 = 0x0102_1994;

impl Host for OsHost {
    fn open(&self, path: &Path, options: &FileOptions) -> Result<File, HostError> {
        let mut flags = OFlags::CLOEXEC;
        flags |= if options.read_only {
            OFlags::RDONLY
        } else {
            OFlags::RDWR
        };
        if options.create_new {
            flags |= OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        }
        if options.exclusive {
            flags |= OFlags::EXCL;
        }
        if options.direct {
            flags |= OFlags::DIRECT;
        }
        if !options.create_new {
            // Before it is opened: that alone waits for ever on a pipe, or starts something on a device, and an
            // image from a stranger names the file of its run state itself.
            check_kind(&fs::stat(path).map_err(io::Error::from)?)?;
        }
        let fd = fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(io::Error::from)?;
        check_kind(&fs::fstat(&fd).map_err(io::Error::from)?)?;
        lock::acquire(fd.as_fd(), options.lock, options.lock_wait).map_err(HostError::Locked)?;
        let direct_align = if options.direct {
            Some(options.direct_align.unwrap_or_else(|| direct_align(&fd)))
        } else {
            None
        };
        Ok(File::from_fd(fd, FileKind { direct_align }))
    }

    fn memory(&self, size: u64) -> io::Result<File> {
        let fd = fs::memfd_create("zbdkit-memory", fs::MemfdFlags::CLOEXEC)?;
        fs::ftruncate(&fd, size)?;
        Ok(File::from_fd(fd, FileKind { direct_align: None }))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        path.try_exists()
    }

    fn block_device(&self, path: &Path) -> io::Result<Option<DeviceNumber>> {
        host_device::number_of(path)
    }

    fn is_nvme_namespace(&self, path: &Path) -> bool {
        host_device::is_nvme_namespace(path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn sync_name(&self, path: &Path) -> io::Result<()> {
        let dir = fs::open(
            parent(path),
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(fs::fsync(dir)?)
    }

    fn identity(&self, file: &File) -> io::Result<FileId> {
        let Some(fd) = file.as_fd() else {
            return Ok(FileId::default());
        };
        let stat = fs::statx(
            fd,
            "",
            AtFlags::EMPTY_PATH,
            StatxFlags::BASIC_STATS | StatxFlags::BTIME,
        )?;
        let btime = if StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::BTIME) {
            (stat.stx_btime.tv_sec as u64)
                .wrapping_mul(1_000_000_000)
                .wrapping_add(stat.stx_btime.tv_nsec.into())
        } else {
            0
        };
        Ok(FileId {
            dev: u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor),
            ino: stat.stx_ino,
            btime,
        })
    }

    fn boot_id(&self) -> io::Result<[u8; 16]> {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        uuid::Uuid::parse_str(text.trim())
            .map(uuid::Uuid::into_bytes)
            .map_err(io::Error::other)
    }

    fn map_words(&self, file: &File, offset: u64, count: usize) -> io::Result<Option<Words>> {
        let Some(fd) = file.as_fd() else { return Ok(None) };
        if fs::fstatfs(fd)?.f_type as u64 != TMPFS_MAGIC {
            return Ok(None);
        }
        fs::fallocate(fd, fs::FallocateFlags::empty(), 0, offset + count as u64 * 8)?;
        Words::map(file, offset, count).map(Some)
    }

    fn write_now(&self, file: &File, mut data: &[u8], mut offset: u64) -> io::Result<()> {
        let Some(fd) = file.as_fd() else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        while !data.is_empty() {
            match rustix::io::pwrite(fd, data, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    data = &data[n..];
                    offset += n as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn image_id(&self, file: &File) -> Option<[u8; 16]> {
        let mut id = [0; 16];
        let len = fs::fgetxattr(file.as_fd()?, IMAGE_ID, &mut id).ok()?;
        (len == id.len()).then_some(id)
    }

    fn set_image_id(&self, file: &File, id: [u8; 16]) -> bool {
        file.as_fd()
            .is_some_and(|fd| fs::fsetxattr(fd, IMAGE_ID, &id, XattrFlags::empty()).is_ok())
    }
}

/// That bytes can be kept in it.
fn check_kind(stat: &fs::Stat) -> io::Result<()> {
    match fs::FileType::from_raw_mode(stat.st_mode) {
        fs::FileType::RegularFile | fs::FileType::BlockDevice => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "neither a regular file nor a block device",
        )),
    }
}

/// The least alignment of direct I/O: what the kernel says, else the page size, which always works.
fn direct_align(fd: impl AsFd) -> u32 {
    fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        .ok()
        .filter(|stat| StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN))
        .map(|stat| stat.stx_dio_offset_align.max(stat.stx_dio_mem_align))
        .filter(|align| align.is_power_of_two())
        .unwrap_or(4096)
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_path_buf(),
        _ => PathBuf::from("."),
    }
}
