//! Copy (NVM Command Set 1.1, 3.3.2): all sources are read, then written as one.

use zbdkit_io::IoBuf;
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::nvm::CopyRange;
use zerocopy::FromBytes;

use crate::admin::COPY_FORMATS;
use crate::command::Blocks;
use crate::namespace::Namespace;
use crate::queue::Request;
use crate::status::Failure;
use crate::transport::{Direction, Transfer};

/// Most bytes of a command (MCL) and of a source range (MSSRL).
pub(crate) const COPY_MAX_BYTES: u64 = 1 << 20;
/// Most source ranges (MSRC): as many as fit a page.
pub(crate) const COPY_MAX_RANGES: u16 = 128;

impl<T: Transfer> Request<'_, T> {
    /// Copies. The completion's dword 0 is the first range that was not copied: as all are written at once, the first.
    pub(crate) async fn copy(&self, start: u64, ranges: u16, format: u8, fua: bool) -> Result<u64, Failure> {
        let (namespace, lane) = self.namespace()?;
        if COPY_FORMATS & 1_u16 << format == 0 {
            return Err(Status::INVALID_FIELD.into());
        }
        if ranges > COPY_MAX_RANGES {
            return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED.into());
        }
        let shift = namespace.block_shift();
        let sources = self.sources(namespace, ranges, shift).await?;
        let total = sources.iter().map(|(_, len)| len).sum::<usize>();
        let count = (total >> shift) as u32;
        let (offset, _) = namespace.bytes_of(Blocks { start, count }, shift)?;
        let _turn = self.turn().await;
        let buf = IoBuf::try_alloc(total).map_err(|_| Status::INTERNAL_ERROR)?;
        let mut at = 0;
        for (source, len) in sources {
            namespace.read(lane, buf.slice(at..at + len), source).await?;
            at += len;
        }
        namespace.write(lane, buf, offset).await?;
        self.make_durable(namespace, lane, fua).await?;
        Ok(0)
    }

    /// Byte offsets and lengths of the sources, within the namespace and within the limits.
    async fn sources(
        &self,
        namespace: &Namespace,
        ranges: u16,
        shift: u32,
    ) -> Result<Vec<(u64, usize)>, Failure> {
        let len = usize::from(ranges) * size_of::<CopyRange>();
        let data = self.data(Direction::HostToController, len).await?.to_vec();
        let mut sources = Vec::with_capacity(ranges.into());
        let mut total = 0;
        for range in data.chunks_exact(size_of::<CopyRange>()) {
            let range = CopyRange::read_from_bytes(range).map_err(|_| Status::INTERNAL_ERROR)?;
            let blocks = Blocks {
                start: range.slba.get(),
                count: u32::from(range.nlb_z.get()) + 1,
            };
            let (offset, len) = namespace.bytes_of(blocks, shift)?;
            total += len;
            if total > COPY_MAX_BYTES {
                return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED.into());
            }
            sources.push((offset, len as usize));
        }
        Ok(sources)
    }
}
