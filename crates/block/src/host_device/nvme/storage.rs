//! A namespace as a file: reads and writes become commands, cut to what one command may do.

use std::io;
use std::sync::Arc;

use zbdkit_io::{IoBuf, LocalBoxFuture, Storage, StorageOp};

use super::namespace::Namespace;
use crate::error::Error;

/// Zeros written at once.
const ZEROS: u64 = 1 << 20;

pub(super) struct NamespaceStorage {
    namespace: Arc<Namespace>,
}

impl NamespaceStorage {
    pub(super) fn new(namespace: Arc<Namespace>) -> NamespaceStorage {
        NamespaceStorage { namespace }
    }
}

impl Storage for NamespaceStorage {
    fn submit(&self, op: StorageOp) -> LocalBoxFuture<'static, io::Result<()>> {
        let namespace = self.namespace.clone();
        Box::pin(async move {
            match op {
                StorageOp::Read { buf, offset } => read(&namespace, buf, offset).await,
                StorageOp::Write { buf, offset } => write(&namespace, buf, offset).await,
                StorageOp::DataSync | StorageOp::Sync => namespace.flush().await,
                StorageOp::ZeroRange { offset, len } => write_zeros(&namespace, offset, len).await,
                // Space is given back by a reset and by nothing else.
                StorageOp::PunchHole { .. } | StorageOp::Allocate { .. } => Err(Error::Io {
                    op: "allocating",
                    errno: libc::EOPNOTSUPP,
                }),
            }
            .map_err(io::Error::from)
        })
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.namespace.facts.size)
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

async fn read(namespace: &Namespace, buf: IoBuf, offset: u64) -> Result<(), Error> {
    let facts = &namespace.facts;
    let mut done = 0;
    while done < buf.len() {
        let at = offset + done as u64;
        let mut len = (buf.len() - done) as u64;
        len = len.min(facts.max_transfer);
        if !facts.reads_cross {
            len = len.min(facts.zone_size - at % facts.zone_size);
        }
        let end = done + len as usize;
        namespace.read(buf.slice(done..end), at).await?;
        done = end;
    }
    Ok(())
}

/// Piece after piece, since the next one starts where the zone's pointer is after this one. Whoever writes to a zone
/// from several tasks sees to their order.
async fn write(namespace: &Namespace, buf: IoBuf, offset: u64) -> Result<(), Error> {
    let most = namespace.facts.max_transfer as usize;
    let mut done = 0;
    while done < buf.len() {
        let end = buf.len().min(done + most);
        namespace
            .write(buf.slice(done..end), offset + done as u64)
            .await?;
        done = end;
    }
    Ok(())
}

async fn write_zeros(namespace: &Namespace, offset: u64, len: u64) -> Result<(), Error> {
    let zeros = IoBuf::try_alloc(len.min(ZEROS) as usize).map_err(|e| Error::io("write zeroes", &e))?;
    let mut done = 0;
    while done < len {
        let n = (len - done).min(ZEROS);
        write(namespace, zeros.slice(0..n as usize), offset + done).await?;
        done += n;
    }
    Ok(())
}
