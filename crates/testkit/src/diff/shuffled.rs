//! A file whose operations take their time, so that requests in flight overtake each other in any order.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use zbdkit_io::{File, LocalBoxFuture, Storage, StorageOp, yield_now};

use crate::kill::rng::Rng;

struct Shuffled {
    file: File,
    rng: Mutex<Rng>,
}

/// `file` with a random number of turns of the executor before and after each operation.
pub fn shuffled(file: File, rng: Rng) -> File {
    File::custom(Arc::new(Shuffled {
        file,
        rng: Mutex::new(rng),
    }))
}

impl Storage for Shuffled {
    fn submit(&self, op: StorageOp) -> LocalBoxFuture<'static, io::Result<()>> {
        let mut rng = self.rng.lock().unwrap_or_else(PoisonError::into_inner);
        let (before, after) = (turns(&mut rng), turns(&mut rng));
        let file = self.file.clone();
        Box::pin(async move {
            wait(before).await;
            let result = match op {
                StorageOp::Read { buf, offset } => file.read(buf, offset).await,
                StorageOp::Write { buf, offset } => file.write(buf, offset).await,
                StorageOp::DataSync => file.datasync().await,
                StorageOp::Sync => file.sync().await,
                StorageOp::PunchHole { offset, len } => file.punch_hole(offset, len).await,
                StorageOp::ZeroRange { offset, len } => file.zero_range(offset, len).await,
                StorageOp::Allocate { offset, len } => file.allocate(offset, len).await,
            };
            wait(after).await;
            result
        })
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }
}

/// Mostly few.
fn turns(rng: &mut Rng) -> u64 {
    if rng.one_in(8) {
        rng.below(20)
    } else {
        rng.below(3)
    }
}

async fn wait(turns: u64) {
    for _ in 0..turns {
        yield_now().await;
    }
}
