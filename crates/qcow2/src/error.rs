//! What can go wrong with an image.

use std::io;

use rustix::io::Errno;

/// Why an image cannot be used, or a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The file below failed.
    #[error("{op} failed: {}", io::Error::from_raw_os_error(*errno))]
    Io {
        /// What was tried.
        op: &'static str,
        /// The errno that it failed with.
        errno: i32,
    },
    /// It does not begin as a qcow2 image does.
    #[error("Image is not in qcow2 format")]
    NotQcow2,
    /// The file ends before what its header says.
    #[error("the image is truncated: {what} lies at {offset}, past the end of the file ({len} bytes)")]
    Truncated {
        /// What is missing.
        what: &'static str,
        /// Where it should be, bytes.
        offset: u64,
        /// Length of the file, bytes.
        len: u64,
    },
    /// A field that no writer may leave like this.
    #[error("{0}")]
    Invalid(String),
    /// Metadata that contradicts itself, found in use.
    #[error("the image is corrupt: {0}; run `zbdkit check` on it")]
    Corrupt(String),
    /// Something that this program does not do with images.
    #[error("{0}")]
    Unsupported(String),
    /// LUKS or AES.
    #[error("the image is encrypted, which is not supported: decrypt it with `qemu-img convert` first")]
    Encrypted,
    /// An operation with arguments that make no sense for this image.
    #[error("{0}")]
    Refused(String),
    /// Past the end of the image.
    #[error("{len} bytes at {offset} reach past the end of the image ({size} bytes)")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Size of the image, bytes.
        size: u64,
    },
    /// The image was opened for reading only.
    #[error("the image is open read-only")]
    ReadOnly,
    /// A write of metadata or a sync failed earlier.
    #[error(
        "an earlier write of metadata failed ({}): the image takes no changes until it is reopened",
        io::Error::from_raw_os_error(*errno)
    )]
    Failed {
        /// The errno of that first failure.
        errno: i32,
    },
}

impl Error {
    /// The error of a failed operation of the file below.
    pub fn io(op: &'static str, error: &io::Error) -> Error {
        Error::Io {
            op,
            errno: error.raw_os_error().unwrap_or(match error.kind() {
                io::ErrorKind::InvalidInput => libc::EINVAL,
                io::ErrorKind::OutOfMemory => libc::ENOMEM,
                _ => libc::EIO,
            }),
        }
    }

    /// The errno that a Unix tool would see.
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Error::Io { errno, .. } | Error::Failed { errno } => return *errno,
            Error::NotQcow2 | Error::Invalid(_) | Error::Truncated { .. } | Error::Refused(_) => Errno::INVAL,
            Error::Corrupt(_) | Error::OutOfRange { .. } => Errno::IO,
            Error::Unsupported(_) | Error::Encrypted => Errno::OPNOTSUPP,
            Error::ReadOnly => Errno::ROFS,
        };
        errno.raw_os_error()
    }
}
