//! The leaves `file` and `memory`: bytes in one file, on disk or without a name in memory.

use std::path::Path;
use std::sync::Arc;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use zbdkit_io::{File, IoBuf};

use crate::error::{Error, OpenError};
use crate::host::{FileId, Host};
use crate::limits::Limits;
use crate::marks::{MarkList, Marks};
use crate::node::{Access, CrossZone, Lane, MapExtent, Node, Request, Resolved};

/// A file, or (driver `memory`) a sparse file in RAM: it grows with what is written, not with its size.
pub struct FileNode {
    driver: &'static str,
    name: Option<Arc<str>>,
    file: File,
    limits: Limits,
    /// Marked blocks, of memory.
    marks: Option<Marks>,
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
            name: None,
            file,
            limits,
            marks: None,
        })
    }

    /// A block device without zones.
    pub(crate) fn host_device(file: File, block_size: u32, read_only: bool) -> std::io::Result<FileNode> {
        let mut node = FileNode::new(file, read_only)?;
        node.driver = "host_device";
        node.limits.block_size = node.limits.block_size.max(block_size);
        Ok(node)
    }

    /// A node of `size` zero bytes in memory.
    pub fn memory(host: &dyn Host, size: u64, read_only: bool) -> std::io::Result<FileNode> {
        let file = host.memory(size)?;
        Ok(FileNode {
            driver: "memory",
            name: None,
            file,
            limits: Limits::plain(size, 512, read_only),
            marks: Some(Marks::new(MarkList::default())),
        })
    }

    /// With the name that maps show.
    #[must_use]
    pub fn named(mut self, path: &Path) -> FileNode {
        self.name = Some(path.to_string_lossy().into());
        self
    }

    /// The file alone.
    pub(crate) fn into_file(self) -> File {
        self.file
    }

    fn is_marked(&self, offset: u64, len: u64) -> bool {
        let marks = self.marks.as_ref();
        marks.is_some_and(|marks| marks.first_in(&(offset..offset + len)).is_some())
    }

    /// What `write` puts into the range can be read afterwards; meanwhile nobody marks blocks.
    async fn unmark(
        &self,
        offset: u64,
        len: u64,
        write: impl Future<Output = Result<(), Error>>,
    ) -> Result<(), Error> {
        match &self.marks {
            Some(marks) if self.is_marked(offset, len) => {
                let _turn = marks.turn().await;
                write.await?;
                marks.change(|list| list.without(&(offset..offset + len)))
            }
            _ => write.await,
        }
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

    fn resolve(&self, offset: u64, len: u64, _access: Access) -> Option<Resolved<'_>> {
        if self.is_marked(offset, len) {
            return None;
        }
        Some(Resolved::fixed(&self.file, offset))
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn read<'a>(&'a self, _lane: &'a Lane, buf: IoBuf, offset: u64, _cross: CrossZone) -> Request<'a, ()> {
        Box::pin(async move {
            if let Some(marks) = &self.marks {
                marks.check_readable(offset..offset + buf.len() as u64)?;
            }
            self.file
                .read(buf, offset)
                .await
                .map_err(|e| Error::io("read", &e))
        })
    }

    fn write<'a>(&'a self, _lane: &'a Lane, buf: IoBuf, offset: u64) -> Request<'a, ()> {
        Box::pin(async move {
            let len = buf.len() as u64;
            let write = async {
                let written = self.file.write(buf, offset).await;
                written.map_err(|e| Error::io("write", &e))
            };
            self.unmark(offset, len, write).await
        })
    }

    fn flush<'a>(&'a self) -> Request<'a, ()> {
        Box::pin(async move { self.file.datasync().await.map_err(|e| Error::io("flush", &e)) })
    }

    fn write_zeroes<'a>(&'a self, _lane: &'a Lane, offset: u64, len: u64, unmap: bool) -> Request<'a, ()> {
        Box::pin(async move {
            let write = zero(&self.file, offset, len, unmap);
            self.unmark(offset, len, write).await
        })
    }

    fn mark_uncorrectable<'a>(&'a self, _lane: &'a Lane, offset: u64, len: u64) -> Request<'a, ()> {
        Box::pin(async move {
            match &self.marks {
                Some(marks) => {
                    let _turn = marks.turn().await;
                    marks.change(|list| list.with(offset..offset + len))
                }
                None => Err(Error::NotSupported("marking blocks uncorrectable")),
            }
        })
    }

    fn marks(&self) -> Option<&Marks> {
        self.marks.as_ref()
    }

    fn discard<'a>(&'a self, lane: &'a Lane, offset: u64, len: u64) -> Request<'a, ()> {
        Box::pin(async move {
            if self.is_marked(offset, len) {
                // What was marked must not read as before.
                return self.write_zeroes(lane, offset, len, true).await;
            }
            discard(&self.file, offset, len).await
        })
    }

    fn map<'a>(&'a self, offset: u64, len: u64) -> Request<'a, MapExtent> {
        Box::pin(async move {
            let marks = self.marks.as_ref();
            let len = match marks.and_then(|marks| marks.first_in(&(offset..offset + len))) {
                Some(marked) if marked.start == offset => {
                    return Ok(MapExtent::unknown(marked.end - offset));
                }
                Some(marked) => marked.start - offset,
                None => len,
            };
            let (data, len) = extent(&self.file, offset, len);
            Ok(MapExtent {
                zero: !data,
                data,
                offset: Some(offset),
                filename: self.name.clone(),
                ..MapExtent::zeros(len)
            })
        })
    }

    fn close<'a>(&'a self) -> Request<'a, ()> {
        self.flush()
    }
}

/// Whether the range begins with data or with a hole, and how long that is. Data where nobody can tell.
fn extent(file: &File, offset: u64, len: u64) -> (bool, u64) {
    let Some(fd) = file.as_fd() else {
        return (true, len);
    };
    // The position that this moves is nobody's: all I/O says where it goes.
    match seek(fd, SeekFrom::Data(offset)) {
        Ok(at) if at > offset => (false, (at - offset).min(len)),
        Ok(_) => match seek(fd, SeekFrom::Hole(offset)) {
            Ok(at) if at > offset => (true, (at - offset).min(len)),
            _ => (true, len),
        },
        // No data up to the end.
        Err(Errno::NXIO) => (false, len),
        Err(_) => (true, len),
    }
}

/// Says that a range's contents are not needed any more.
pub(crate) async fn discard(file: &File, offset: u64, len: u64) -> Result<(), Error> {
    match file.punch_hole(offset, len).await {
        // A file system that cannot punch holes keeps the space: discard is a hint.
        Err(error) if !is_unsupported(&error) => Err(Error::io("discard", &error)),
        _ => Ok(()),
    }
}

/// Makes a range of a file read as zeros: a hole if it may be one, else zeroed blocks, else plain zeros.
pub(crate) async fn zero(file: &File, offset: u64, len: u64, unmap: bool) -> Result<(), Error> {
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
    matches!(Errno::from_io_error(error), Some(Errno::OPNOTSUPP | Errno::NOSYS))
        || error.kind() == std::io::ErrorKind::Unsupported
}
