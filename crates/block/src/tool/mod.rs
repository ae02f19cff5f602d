//! Work on whole images: copies, comparisons, and what moves data between an image and its backing image.
//!
//! It works on opened [`Device`]s, below their zones: bytes are copied in any order, whatever conditions the zones are
//! in, and the zones' records are installed when the bytes are there. What lies above a zone's written end is zeros to
//! everybody, so nothing of it is read or written. Names, formats and messages are the caller's.

mod backing;
mod bytes;
mod commit;
mod compare;
mod copy;
mod rebase;
mod target;
mod work;
mod zones;

pub use backing::{backing_path, empty, set_backing};
pub use commit::commit;
pub use compare::{CompareOptions, Compared, Difference, compare};
pub use copy::{CopyOptions, TargetHolds, copy};
pub use rebase::rebase;
pub use target::{check_zones, clear_table, create_plain, remove_target};
pub use zones::CopiedZones;

use std::ops::Range;

use zbdkit_io::IoBuf;
use zbdkit_qcow2::Qcow2;

use crate::device::Device;
use crate::error::Error;
use crate::node::{CrossZone, Lane, MapExtent};

/// Bytes of one step of a tool; a multiple of every cluster size.
const CHUNK: u64 = 2 << 20;

/// Told how far the work is: bytes done, bytes in all.
pub type Progress<'a> = &'a dyn Fn(u64, u64);

/// Why a tool's work failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// A request to one of the images failed.
    #[error("{doing} at offset {offset}: {source}")]
    Request {
        /// What was tried.
        doing: &'static str,
        /// First byte.
        offset: u64,
        /// Why it failed.
        source: Error,
    },
    /// The images are not such that the work could be done; nothing was changed.
    #[error("{0}")]
    Refused(String),
}

impl ToolError {
    fn request(doing: &'static str, offset: u64) -> impl FnOnce(Error) -> ToolError {
        move |source| ToolError::Request {
            doing,
            offset,
            source,
        }
    }
}

/// That no block of an image is marked uncorrectable, whose bytes are to be moved below its zones.
fn refuse_marks(device: &Device, what: &str) -> Result<(), ToolError> {
    match device.marks().ranges().first() {
        None => Ok(()),
        Some(marked) => Err(ToolError::Refused(format!(
            "{what} has blocks that are marked uncorrectable, the first at offset {}: write them again, or reset their zones, \
             first",
            marked.start
        ))),
    }
}

/// Fills `buf` with bytes that are known to be there, from `offset` of an image on, below its zones.
async fn fetch(device: &Device, buf: &IoBuf, offset: u64) -> Result<(), ToolError> {
    let lane = Lane::new(None, 0);
    let read = match device.check_readable(offset..offset + buf.len() as u64) {
        Ok(()) => {
            device
                .below()
                .read(&lane, buf.clone(), offset, CrossZone::Allow)
                .await
        }
        Err(error) => Err(error),
    };
    read.map_err(ToolError::request("reading", offset))
}

/// Writes bytes into an image below its zones. A qcow2 image is written directly: the node over it would give zones
/// space ahead of a guest that fills them.
async fn store(device: &Device, buf: IoBuf, offset: u64) -> Result<(), ToolError> {
    let written = match device.qcow2() {
        Some(image) => image.write(buf, offset).await.map_err(Error::from),
        None => device.below().write(&Lane::new(None, 0), buf, offset).await,
    };
    written.map_err(ToolError::request("writing", offset))
}

/// Makes a range of an image read as zeros, below its zones.
async fn zero(device: &Device, range: Range<u64>) -> Result<(), ToolError> {
    let (offset, len) = (range.start, range.end - range.start);
    let zeroed = match device.qcow2() {
        Some(image) => image.write_zeroes(offset, len, true).await.map_err(Error::from),
        None => {
            let lane = Lane::new(None, 0);
            device.below().write_zeroes(&lane, offset, len, true).await
        }
    };
    zeroed.map_err(ToolError::request("writing zeros", offset))
}

/// The clusters of an image that has some.
fn cluster_size(device: &Device) -> u64 {
    device.qcow2().map_or(4096, Qcow2::cluster_size)
}

/// What an image reads as, whatever conditions its zones are in; zeros past its end.
#[derive(Clone, Copy)]
struct Contents<'a> {
    device: &'a Device,
    /// Above the written ends of its zones there are zeros.
    zones: bool,
}

impl<'a> Contents<'a> {
    fn of(device: &'a Device) -> Contents<'a> {
        Contents { device, zones: true }
    }

    /// As an overlay reads it, which knows nothing of its zones.
    fn below(device: &'a Device) -> Contents<'a> {
        Contents { device, zones: false }
    }

    /// How many bytes at the beginning of a range are zeros, without reading any.
    async fn zeros(&self, range: &Range<u64>) -> Result<u64, ToolError> {
        let (at, len) = (range.start, range.end - range.start);
        match self.device.limits().size.saturating_sub(at).min(len) {
            0 => Ok(len),
            inside => match self.map(at, inside).await? {
                extent if extent.zero => Ok(extent.len),
                _ => Ok(0),
            },
        }
    }

    async fn fill(&self, buf: &IoBuf, offset: u64) -> Result<(), ToolError> {
        let size = self.device.limits().size;
        let mut done = 0;
        while done < buf.len() {
            let (at, left) = (offset + done as u64, (buf.len() - done) as u64);
            let (len, zero) = match size.saturating_sub(at).min(left) {
                0 => (left, true),
                inside => {
                    let extent = self.map(at, inside).await?;
                    (extent.len, extent.zero)
                }
            };
            let range = done..done + len as usize;
            done = range.end;
            if zero {
                buf.fill(range, 0);
            } else {
                fetch(self.device, &buf.slice(range), at).await?;
            }
        }
        Ok(())
    }

    async fn map(&self, at: u64, len: u64) -> Result<MapExtent, ToolError> {
        let extent = if self.zones {
            self.device.map(at, len).await
        } else {
            self.device.below().map(at, len).await
        };
        extent.map_err(ToolError::request("looking at the image", at))
    }
}
