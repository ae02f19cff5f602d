//! Transfers that go on while the next commands run; their results are told by aio_flush, in the order of submission.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use zbdkit_block::Error;

use super::transfer::{Request, carry_out};
use super::{Shell, Step};
use crate::verbs::io::stats::Transfer;

/// The transfers whose results were not told yet.
#[derive(Default)]
pub struct InFlight {
    requests: Vec<(Rc<Request>, Slot)>,
}

type Slot = Rc<RefCell<Progress>>;

#[derive(Default)]
struct Progress {
    result: Option<Result<Transfer, Error>>,
    waker: Option<Waker>,
}

impl Shell {
    /// Starts a transfer. It is admitted before this returns, so that writes at the write pointer keep their order.
    pub async fn start(&mut self, request: Request) -> Step {
        let request = Rc::new(request);
        let slot = Slot::default();
        self.in_flight.requests.push((request.clone(), slot.clone()));
        let (device, lane) = (self.device.clone(), self.lane.clone());
        zbdkit_io::spawn(async move {
            let result = carry_out(&device, &lane, &request).await;
            let mut progress = slot.borrow_mut();
            progress.result = Some(result);
            if let Some(waker) = progress.waker.take() {
                waker.wake();
            }
        });
        zbdkit_io::yield_now().await;
        Step::Done
    }

    /// Waits for all transfers and tells their results.
    pub async fn aio_flush(&mut self) -> anyhow::Result<Step> {
        let mut step = Step::Done;
        for (request, slot) in std::mem::take(&mut self.in_flight.requests) {
            let result = poll_fn(|cx| {
                let mut progress = slot.borrow_mut();
                progress.waker = Some(cx.waker().clone());
                progress.result.take().map_or(Poll::Pending, Poll::Ready)
            });
            let result = result.await;
            if self.tell(&request, result)? == Step::Failed {
                step = Step::Failed;
            }
        }
        Ok(step)
    }
}
