//! The client's socket, at which the worker waits that a doorbell will wake.

use std::future::{Future, poll_fn};
use std::os::fd::AsFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use zbdkit_io::readable;
use zbdkit_spec::nvme::controller::offset;
use zbdkit_spec::vfio_user::pci_region;
use zbdkit_vfio_user::{Heard, Line, PostedWrite};

use super::front::Front;
use super::worker::{Worker, WorkerHandle};

/// Has a worker wait at the socket, and whichever rings next in its place.
pub(super) fn wait_at(line: Line, front: Arc<Front>, workers: Arc<[WorkerHandle]>, at: usize) {
    let here = workers[at].clone();
    here.spawn(move |worker| wait(worker, line, front, workers, at));
}

async fn wait(
    worker: Rc<Worker>,
    mut line: Line,
    front: Arc<Front>,
    workers: Arc<[WorkerHandle]>,
    here: usize,
) {
    while news(&line).await {
        let (at, value) = match line.listen(doorbell) {
            Heard::Write(doorbell) => doorbell,
            Heard::Nothing => continue,
            Heard::Else => return,
        };
        match front.doorbells.ring(at, value) {
            Some(there) if there != here => {
                workers[there].wake();
                return wait_at(line, front, workers, there);
            }
            Some(_) => worker.wake(),
            None => {}
        }
    }
}

/// Waits for something at the socket; false where the server wants it back.
async fn news(line: &Line) -> bool {
    let mut readable = pin!(readable(line.as_fd()));
    poll_fn(|cx| {
        if line.is_recalled(cx) {
            return Poll::Ready(false);
        }
        // An error is found out by who reads.
        readable.as_mut().poll(cx).map(|_| true)
    })
    .await
}

/// The doorbell, as an offset in BAR0, and the value of a write that is nothing else.
fn doorbell(write: PostedWrite) -> Option<(u64, u32)> {
    let value = u32::from_le_bytes(write.data().try_into().ok()?);
    let is_one = write.region == pci_region::BAR0
        && write.offset.is_multiple_of(4)
        && (offset::DOORBELLS..offset::DOORBELLS + super::device::PAGE).contains(&write.offset);
    is_one.then_some((write.offset, value))
}
