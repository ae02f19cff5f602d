//! The rarer commands on data (NVM Command Set 1.1, 3): Flush, Compare, Verify, Write Zeroes, Write Uncorrectable, Dataset
//! Management.

use std::ops::Range;

use zbdkit_block::Error;
use zbdkit_io::IoBuf;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::command::NSID_ALL;
use zbdkit_spec::nvme::nvm::DsmRange;
use zerocopy::FromBytes;

use crate::command::Blocks;
use crate::queue::Request;
use crate::status::{Failure, Kind, failure};
use crate::transport::{Direction, Transfer};
use crate::zones::check_online;

/// Bytes that Compare and Verify read at a time.
const STEP: usize = 64 << 10;

impl<T: Transfer> Request<'_, T> {
    /// Flushes a namespace, or all.
    pub(crate) async fn flush(&self) -> Result<u64, Failure> {
        if self.entry.nsid.get() == NSID_ALL {
            for (namespace, lane) in self.all_namespaces() {
                namespace.check_ready()?;
                namespace.flush(lane).await?;
            }
        } else {
            let (namespace, lane) = self.namespace()?;
            namespace.flush(lane).await?;
        }
        Ok(0)
    }

    pub(crate) async fn compare(&self, blocks: Blocks) -> Result<u64, Failure> {
        let (namespace, _) = self.namespace()?;
        let range = namespace.bytes(blocks)?;
        let len = self.transfer_len(range.1)?;
        let expected = self.data(Direction::HostToController, len).await?;
        self.read_through(range, |at, found| {
            if found.to_vec() == expected.slice(at..at + found.len()).to_vec() {
                Ok(())
            } else {
                Err(Status::COMPARE_FAILURE.into())
            }
        })
        .await?;
        self.count_read(0);
        Ok(0)
    }

    pub(crate) async fn verify(&self, blocks: Blocks) -> Result<u64, Failure> {
        let (namespace, _) = self.namespace()?;
        self.read_through(namespace.bytes(blocks)?, |_, _| Ok(())).await?;
        Ok(0)
    }

    /// Reads a range of bytes (start and length) piece by piece, and shows each with its place in the range.
    async fn read_through(
        &self,
        (offset, len): (u64, u64),
        mut show: impl FnMut(usize, &IoBuf) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let (namespace, lane) = self.namespace()?;
        namespace.check_cross(offset, len)?;
        let _turn = self.turn().await;
        let len = usize::try_from(len).map_err(|_| Status::INVALID_FIELD)?;
        let buf = IoBuf::try_alloc(len.min(STEP)).map_err(|_| Status::INTERNAL_ERROR)?;
        let mut at = 0;
        while at < len {
            let piece = buf.slice(0..buf.len().min(len - at));
            namespace.read(lane, piece.clone(), offset + at as u64).await?;
            show(at, &piece)?;
            at += piece.len();
        }
        Ok(())
    }

    pub(crate) async fn write_zeroes(
        &self,
        blocks: Blocks,
        deallocate: bool,
        fua: bool,
    ) -> Result<u64, Failure> {
        let (namespace, lane) = self.namespace()?;
        let (offset, len) = namespace.bytes(blocks)?;
        namespace.check_capacity(offset, len)?;
        let result = namespace.device.write_zeroes(lane, offset, len, deallocate).await;
        result.map_err(|error| failure(&error, Kind::Write))?;
        self.make_durable(namespace, lane, fua).await?;
        Ok(0)
    }

    /// Reads of the blocks fail until they are written again. In a zone it is a write as any other.
    pub(crate) async fn write_uncorrectable(&self, blocks: Blocks) -> Result<u64, Failure> {
        let (namespace, lane) = self.namespace()?;
        let (offset, len) = namespace.bytes(blocks)?;
        namespace.check_capacity(offset, len)?;
        let result = namespace.device.mark_uncorrectable(lane, offset, len).await;
        result.map_err(|error| match error {
            // The controller says that it has the command, for another namespace's sake.
            Error::NotSupported(_) if self.marks_blocks() => Status::INVALID_NAMESPACE_OR_FORMAT.into(),
            error => failure(&error, Kind::Write),
        })?;
        self.make_durable(namespace, lane, false).await?;
        Ok(0)
    }

    /// Only deallocating does anything. Zones give their space back when they are reset, so in them not even that.
    pub(crate) async fn dataset_management(&self, ranges: u16, deallocate: bool) -> Result<u64, Failure> {
        let (namespace, lane) = self.namespace()?;
        let shift = namespace.block_shift();
        let len = usize::from(ranges) * size_of::<DsmRange>();
        let data = self.data(Direction::HostToController, len).await?.to_vec();
        if !deallocate {
            return Ok(0);
        }
        if namespace.read_only() {
            return Err(Status::NAMESPACE_WRITE_PROTECTED.into());
        }
        let mut wanted = Vec::with_capacity(ranges.into());
        for range in data.chunks_exact(size_of::<DsmRange>()) {
            let range = DsmRange::read_from_bytes(range).map_err(|_| Status::INTERNAL_ERROR)?;
            let blocks = Blocks {
                start: range.slba.get(),
                count: range.length.get(),
            };
            let range = namespace.bytes_of(blocks, shift)?;
            wanted.extend((blocks.count != 0).then_some(range));
        }
        if namespace.zones().is_some() {
            for range in merged(wanted) {
                check_online(namespace, range.start, range.end - range.start).await?;
            }
            return Ok(0);
        }
        for (offset, len) in wanted {
            namespace.deallocate(lane, offset, len).await?;
        }
        self.make_durable(namespace, lane, false).await?;
        Ok(0)
    }
}

/// The ranges (start and length) in ascending order, each byte in one of them only: however often a host names a zone, it is
/// looked at once.
fn merged(mut ranges: Vec<(u64, u64)>) -> Vec<Range<u64>> {
    ranges.sort_unstable();
    let mut merged: Vec<Range<u64>> = Vec::new();
    for (start, len) in ranges {
        match merged.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(start + len),
            _ => merged.push(start..start + len),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_or_overlap_are_one() {
        let ranges = vec![(8, 4), (0, 4), (4, 2), (0, 1), (9, 1), (20, 5)];
        assert_eq!(merged(ranges), [0..6, 8..12, 20..25]);
        assert_eq!(merged(vec![]), []);
    }
}
