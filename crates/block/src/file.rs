//! The leaves `file` and `memory`: bytes in one file, on disk or without a name in memory.

use std::sync::Arc;

use zbdkit_io::{File, IoBuf};

use crate::error::{Error, OpenError};
use crate::host::{FileId, Host};
use crate::limits::Limits;
use crate::node::{CrossZone, Lane, Node, Request};

/// A file, or (driver `memory`) a sparse file in RAM: it grows with what is written, not with its size.
pub struct FileNode {
    driver: &'static str,
    file: File,
    limits: Limits,
}

impl FileNode {
    /// The node over an opened file.
    pub fn new(file: File, read_only: bool) -> std::io::Result<FileNode> {
        let mut limits = Limits::plain(file.len()?, 512, read_only);
        if let Some(align) = file.direct_align() {
            limits.direct_align = align;
            limits.block_size = limits.block_size.max(align);
        }
        Ok(FileNode {
            driver: "file",
            file,
            limits,
        })
    }

    /// A node of `size` zero bytes in memory.
    pub fn memory(host: &dyn Host, size: u64, read_only: bool) -> std::io::Result<FileNode> {
        let file = host.memory(size)?;
        Ok(FileNode {
            driver: "memory",
            file,
            limits: Limits::plain(size, 512, read_only),
        })
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Which file it is.
    pub fn identity(&self, host: &Arc<dyn Host>) -> Result<FileId, OpenError> {
        host.identity(&self.file)
            .map_err(|source| OpenError::file("data file", "cannot be identified", source))
    }
}

impl Node for FileNode {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn driver(&self) -> &'static str {
        self.driver
    }

    fn resolve(&self, offset: u64, _len: u64) -> Option<(&File, u64)> {
        Some((&self.file, offset))
    }

    fn read<'a>(&'a self, _lane: &'a Lane, buf: IoBuf, offset: u64, _cross: CrossZone) -> Request<'a, ()> {
        Box::pin(async move {
            self.file
                .read(buf, offset)
                .await
                .map_err(|e| Error::io("read", &e))
        })
    }

    fn write<'a>(&'a self, _lane: &'a Lane, buf: IoBuf, offset: u64) -> Request<'a, ()> {
        Box::pin(async move {
            self.file
                .write(buf, offset)
                .await
                .map_err(|e| Error::io("write", &e))
        })
    }

    fn flush<'a>(&'a self) -> Request<'a, ()> {
        Box::pin(async move { self.file.datasync().await.map_err(|e| Error::io("flush", &e)) })
    }

    fn write_zeroes<'a>(&'a self, _lane: &'a Lane, offset: u64, len: u64, unmap: bool) -> Request<'a, ()> {
        Box::pin(async move { zero(&self.file, offset, len, unmap).await })
    }

    fn discard<'a>(&'a self, _lane: &'a Lane, offset: u64, len: u64) -> Request<'a, ()> {
        Box::pin(async move {
            match self.file.punch_hole(offset, len).await {
                // A file system that cannot punch holes keeps the space: discard is a hint.
                Err(error) if !is_unsupported(&error) => Err(Error::io("discard", &error)),
                _ => Ok(()),
            }
        })
    }

    fn close<'a>(&'a self) -> Request<'a, ()> {
        self.flush()
    }
}

/// Makes a range of a file read as zeros: a hole if it may be one, else zeroed blocks, else plain zeros.
async fn zero(file: &File, offset: u64, len: u64, unmap: bool) -> Result<(), Error> {
    let fast = if unmap {
        file.punch_hole(offset, len).await
    } else {
        file.zero_range(offset, len).await
    };
    match fast {
        Ok(()) => return Ok(()),
        Err(error) if is_unsupported(&error) => {}
        Err(error) => return Err(Error::io("write zeroes", &error)),
    }
    const CHUNK: u64 = 1 << 20;
    let zeros = IoBuf::alloc(len.min(CHUNK) as usize);
    let mut at = 0;
    while at < len {
        let n = (len - at).min(CHUNK);
        let chunk = zeros.slice(0..n as usize);
        file.write(chunk, offset + at)
            .await
            .map_err(|e| Error::io("write zeroes", &e))?;
        at += n;
    }
    Ok(())
}

/// The file system has no such operation.
pub(crate) fn is_unsupported(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    matches!(Errno::from_io_error(error), Some(Errno::OPNOTSUPP | Errno::NOSYS))
        || error.kind() == std::io::ErrorKind::Unsupported
}
