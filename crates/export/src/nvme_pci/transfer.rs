//! A command's data: right in guest memory where that is mapped, copied where it has to be asked for.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use zbdkit_io::IoBuf;
use zbdkit_io::mem::{Access, MemError};
use zbdkit_nvme::{Completion, Direction, Failure, Transfer};
use zbdkit_spec::nvme::Status;
use zbdkit_spec::nvme::command::SubmissionEntry;
use zbdkit_vfio_user::Dma;

use super::front::Front;
use super::pointer::{Pieces, ReadHost, prps, sgl};

/// The data of one command.
pub(super) struct HostData<'a> {
    front: &'a Arc<Front>,
    admin: bool,
    /// What goes to the host when the command succeeds.
    copy: RefCell<Option<(IoBuf, Pieces)>>,
    /// Bytes of its share of [`Front::copies`].
    share: Cell<usize>,
}

/// Bytes of commands' data that is copied, at a time, over all queues.
const MAX_COPIES: usize = 32 << 20;

impl<'a> HostData<'a> {
    pub(super) fn new(front: &'a Arc<Front>, admin: bool) -> HostData<'a> {
        HostData {
            front,
            admin,
            copy: RefCell::new(None),
            share: Cell::new(0),
        }
    }

    /// Whether [`finish`](Self::finish) has something to do.
    pub(super) fn has_copy(&self) -> bool {
        self.copy.borrow().is_some()
    }

    /// Sends what the command gave to the host on its way.
    pub(super) async fn finish(&self, completion: Completion) -> Completion {
        let copy = self.copy.take();
        let Some((buf, pieces)) = copy.filter(|_| completion.is_success()) else {
            return completion;
        };
        let mut done = 0;
        for (address, len) in pieces.iter() {
            let bytes = buf.slice(done..done + len as usize).to_vec();
            if self.front.link.dma.write(address, &bytes).await.is_err() {
                return Failure::from(Status::DATA_TRANSFER_ERROR).into();
            }
            done += len as usize;
        }
        completion
    }

    async fn pieces(&self, entry: &SubmissionEntry, len: u64) -> Result<Pieces, Failure> {
        let host = Host(&self.front.link.dma);
        match entry.command_flags().psdt() {
            0 => prps(&host, entry, len, self.front.page()).await,
            // Admin commands have PRPs on this transport (Base Specification 2.1, 4.3.2).
            1 | 2 if !self.admin => sgl(&host, entry, len).await,
            _ => Err(Status::INVALID_FIELD.into()),
        }
    }

    /// Takes a share of the memory for copies, until this is dropped.
    fn reserve(&self, len: usize) -> bool {
        let taken = self.front.copies.fetch_add(len, Ordering::Relaxed);
        self.share.set(self.share.get() + len);
        taken.saturating_add(len) <= MAX_COPIES
    }

    /// A buffer of our own, filled from the host where the data comes from there. Only for memory that the client has, and
    /// only so much at a time: a host can ask for anything.
    #[cold]
    async fn copied(&self, direction: Direction, pieces: Pieces, len: usize) -> Result<IoBuf, Failure> {
        let dma = &self.front.link.dma;
        if !pieces.iter().all(|(address, len)| dma.covers(address, len)) {
            return Err(Status::DATA_TRANSFER_ERROR.into());
        }
        if !self.reserve(len) {
            return Err(Status::INTERNAL_ERROR.into());
        }
        let buf = IoBuf::try_alloc(len).map_err(|_| Status::INTERNAL_ERROR)?;
        let mut done = 0;
        if direction == Direction::HostToController {
            for (address, len) in pieces.iter() {
                let mut bytes = vec![0; len as usize];
                Host(&self.front.link.dma).read(address, &mut bytes).await?;
                buf.slice(done..done + len as usize).copy_from(&bytes);
                done += len as usize;
            }
        } else {
            *self.copy.borrow_mut() = Some((buf.clone(), pieces));
        }
        Ok(buf)
    }
}

impl Drop for HostData<'_> {
    fn drop(&mut self) {
        if self.share.get() > 0 {
            self.front.copies.fetch_sub(self.share.get(), Ordering::Relaxed);
        }
    }
}

impl Transfer for HostData<'_> {
    async fn buffer(
        &self,
        entry: &SubmissionEntry,
        direction: Direction,
        len: usize,
    ) -> Result<IoBuf, Failure> {
        let pieces = self.pieces(entry, len as u64).await?;
        let access = match direction {
            Direction::HostToController => Access::Read,
            Direction::ControllerToHost => Access::Write,
        };
        let buf = self.front.link.dma.guard().iobuf_from(pieces.iter(), access);
        match buf {
            Ok(buf) => Ok(buf),
            // Maybe it came without a file descriptor.
            Err(MemError::Outside { .. }) => Box::pin(self.copied(direction, pieces, len)).await,
            Err(_) => Err(Status::DATA_TRANSFER_ERROR.into()),
        }
    }
}

struct Host<'a>(&'a Dma);

impl ReadHost for Host<'_> {
    async fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Failure> {
        let result = self.0.read(address, into).await;
        result.map_err(|error| {
            tracing::debug!("cannot read the host's memory: {error}");
            Status::DATA_TRANSFER_ERROR.into()
        })
    }
}
