//! An open image.

use std::sync::Arc;

use zbdkit_io::{File, IoBuf, LocalBoxFuture};

use crate::error::Error;
use crate::header::Header;

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
    /// Bytes of mapping that are kept in memory, 0 for the default.
    pub l2_cache: u64,
    /// The external data file.
    pub data_file: Option<File>,
    /// The backing image.
    pub backing: Option<Arc<dyn Backing>>,
    /// Incompatible features that the caller takes care of.
    pub known_incompatible: u64,
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
    #[expect(dead_code, reason = "written next")]
    header: Header,
}

impl Qcow2 {
    /// Opens an image whose header was read.
    pub async fn open(_file: File, _header: Header, _options: Options) -> Result<Qcow2, Error> {
        Err(Error::NotQcow2)
    }
}
