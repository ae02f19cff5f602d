//! What can go wrong with a request, with an opening and with a creation.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;
use zbdkit_zone::{GeometryError, ZoneError};

/// Why a request failed. Doors map it to their protocol's status in one exhaustive match.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A rule of zones forbids the request.
    #[error(transparent)]
    Zone(#[from] ZoneError),
    /// The storage below failed.
    #[error("{op} failed: {}", io::Error::from_raw_os_error(*errno))]
    Io {
        /// What was tried.
        op: &'static str,
        /// The errno it failed with.
        errno: i32,
    },
    /// A write-back or a sync failed earlier: nothing is promised or changed until the image is reopened.
    #[error(
        "an earlier write-back failed ({}): the image takes no changes until it is reopened",
        io::Error::from_raw_os_error(*errno)
    )]
    Epoch {
        /// The errno of that first failure.
        errno: i32,
    },
    /// The image's format: its metadata is damaged, or what is asked makes no sense for it.
    #[error(transparent)]
    Format(zbdkit_qcow2::Error),
    /// The image has no such operation.
    #[error("{0} is not supported by this image")]
    NotSupported(&'static str),
    /// The read touches a block that was marked by [`Device::mark_uncorrectable`](crate::Device::mark_uncorrectable).
    #[error("the block at {offset} is marked uncorrectable: it cannot be read until it is written again")]
    Uncorrectable {
        /// First byte of the first such block.
        offset: u64,
    },
    /// The list of marked blocks has no room for another range.
    #[error("more than {most} ranges of blocks would be marked uncorrectable")]
    TooManyMarks {
        /// Most ranges.
        most: usize,
    },
    /// The image was opened read-only.
    #[error("the image is open read-only")]
    ReadOnly,
    /// The request reaches past the end of the device.
    #[error("{len} bytes at {offset} reach past the end of the device ({size} bytes)")]
    OutOfRange {
        /// First byte of the request.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bytes of the device.
        size: u64,
    },
    /// Offset or length is not a multiple of the logical block size.
    #[error("{len} bytes at {offset} are not a multiple of the logical block size ({block_size} bytes)")]
    Unaligned {
        /// First byte of the request.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Logical block size, bytes.
        block_size: u32,
    },
}

impl Error {
    /// The error of a failed system call below. One of ours that came as an [`io::Error`] is itself again.
    pub fn io(op: &'static str, error: &io::Error) -> Error {
        if let Some(ours) = ours(error) {
            return ours.clone();
        }
        Error::Io {
            op,
            errno: errno_of(error),
        }
    }

    /// The errno a Unix tool would see, as Linux maps zoned errors.
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Error::Io { errno, .. } | Error::Epoch { errno } => return *errno,
            Error::Zone(zone) => zone_errno(zone),
            Error::Format(error) => return error.errno(),
            Error::NotSupported(_) => Errno::OPNOTSUPP,
            Error::ReadOnly => Errno::ROFS,
            Error::OutOfRange { .. } | Error::Uncorrectable { .. } => Errno::IO,
            Error::TooManyMarks { .. } => Errno::NOSPC,
            Error::Unaligned { .. } => Errno::INVAL,
        };
        errno.raw_os_error()
    }
}

impl From<zbdkit_qcow2::Error> for Error {
    fn from(error: zbdkit_qcow2::Error) -> Error {
        use zbdkit_qcow2::Error as Format;
        match error {
            Format::Io { op, errno } => Error::Io { op, errno },
            Format::Failed { errno } => Error::Epoch { errno },
            Format::ReadOnly => Error::ReadOnly,
            Format::OutOfRange { offset, len, size } => Error::OutOfRange { offset, len, size },
            other => Error::Format(other),
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        io::Error::other(error)
    }
}

/// The error of ours that an [`io::Error`] carries.
fn ours(error: &io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref()
}

/// As the Linux block layer and QEMU report them (reference: qemu-zoned.md 1.7, 2.4).
fn zone_errno(error: &ZoneError) -> Errno {
    match error {
        ZoneError::TooManyOpen { .. } => Errno::TOOMANYREFS,
        ZoneError::TooManyActive { .. } => Errno::OVERFLOW,
        ZoneError::Unaligned { .. }
        | ZoneError::NotZoneStart { .. }
        | ZoneError::AppendTooLarge { .. }
        | ZoneError::InvalidTransition { .. } => Errno::INVAL,
        ZoneError::AppendUnsupported => Errno::OPNOTSUPP,
        _ => Errno::IO,
    }
}

/// The errno of an [`io::Error`], EIO where it carries none.
pub fn errno_of(error: &io::Error) -> i32 {
    match (error.raw_os_error(), ours(error)) {
        (Some(errno), _) => errno,
        (None, Some(error)) => error.errno(),
        (None, None) if error.kind() == io::ErrorKind::InvalidInput => Errno::INVAL.raw_os_error(),
        (None, None) => Errno::IO.raw_os_error(),
    }
}

/// Why an image could not be opened. The message says what, where and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file could not be opened or read.
    #[error("{path}: {doing}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Somebody else has the image.
    #[error(
        "{path}: failed to get \"{lock}\" lock: another process is using the image{holder}",
        path = path.display()
    )]
    Locked {
        /// The file.
        path: PathBuf,
        /// The permission that clashes, in QEMU's words.
        lock: &'static str,
        /// Who, where it is known.
        holder: String,
    },
    /// The graph's description is wrong.
    #[error("{0}")]
    Graph(String),
    /// The geometry does not fit together.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The sidecar is missing, damaged, or of another image.
    #[error("{path}: {problem}", path = path.display())]
    Sidecar {
        /// The sidecar.
        path: PathBuf,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// The data file does not fit its sidecar.
    #[error("{path}: {problem}", path = path.display())]
    Data {
        /// The data file.
        path: PathBuf,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// The image itself is not what it should be.
    #[error("{path}: {source}", path = path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// What is wrong and what would be right.
        source: zbdkit_qcow2::Error,
    },
    /// A request of the opening itself failed.
    #[error(transparent)]
    Request(#[from] Error),
}

impl OpenError {
    pub(crate) fn file(path: impl Into<PathBuf>, doing: &'static str, source: io::Error) -> OpenError {
        OpenError::File {
            path: path.into(),
            doing,
            source,
        }
    }

    /// The error of an image of that name.
    pub(crate) fn image(path: &std::path::Path) -> impl Fn(zbdkit_qcow2::Error) -> OpenError + '_ {
        |source| OpenError::Image {
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn data(path: &std::path::Path, problem: impl Into<String>) -> OpenError {
        OpenError::Data {
            path: path.to_owned(),
            problem: problem.into(),
        }
    }
}
