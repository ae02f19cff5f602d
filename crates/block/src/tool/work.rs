//! Several workers on one thread, which take pieces of a device in order and may have to write them in order.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Poll, Waker};

/// One worker.
pub type Worker<'a, E> = Pin<Box<dyn Future<Output = Result<(), E>> + 'a>>;

/// Runs workers side by side until all have ended; the first error. None is dropped halfway: what it does may not be
/// left halfway done.
pub async fn all<E>(workers: Vec<Worker<'_, E>>) -> Result<(), E> {
    let mut workers: Vec<_> = workers.into_iter().map(Some).collect();
    let mut failed = None;
    poll_fn(|cx| {
        for slot in &mut workers {
            if let Some(worker) = slot
                && let Poll::Ready(result) = worker.as_mut().poll(cx)
            {
                *slot = None;
                if let Err(error) = result {
                    failed.get_or_insert(error);
                }
            }
        }
        if workers.iter().all(Option::is_none) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
    failed.map_or(Ok(()), Err)
}

/// Who writes next: pieces follow each other without gaps, each waits for the one before it.
pub struct Turns {
    next: Cell<u64>,
    in_order: bool,
    stopped: Cell<bool>,
    waiting: RefCell<Vec<Waker>>,
}

impl Turns {
    /// Turns from offset 0 on. If not `in_order`, nobody waits.
    pub fn new(in_order: bool) -> Turns {
        Turns {
            next: Cell::new(0),
            in_order,
            stopped: Cell::new(false),
            waiting: RefCell::default(),
        }
    }

    /// Waits until all before `start` is done. `false` where the work was stopped.
    pub async fn wait(&self, start: u64) -> bool {
        poll_fn(|cx| {
            if self.stopped.get() {
                return Poll::Ready(false);
            }
            if !self.in_order || self.next.get() == start {
                return Poll::Ready(true);
            }
            self.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// All before `end` is done.
    pub fn pass(&self, end: u64) {
        self.next.set(end.max(self.next.get()));
        self.wake();
    }

    /// Something failed: nobody begins anything new.
    pub fn stop(&self) {
        self.stopped.set(true);
        self.wake();
    }

    /// Whether to begin nothing new.
    pub fn is_stopped(&self) -> bool {
        self.stopped.get()
    }

    /// How far the work is, bytes.
    pub fn done(&self) -> u64 {
        self.next.get()
    }

    fn wake(&self) {
        self.waiting.borrow_mut().drain(..).for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zbdkit_io::{Runtime, RuntimeOptions, yield_now};

    fn run<F: Future>(future: F) -> F::Output {
        Runtime::new(RuntimeOptions::default()).unwrap().block_on(future)
    }

    #[test]
    fn pieces_are_written_in_order_whoever_is_ready_first() {
        let turns = Turns::new(true);
        let order = RefCell::new(Vec::new());
        let piece = |start: u64, yields: u32| {
            let (turns, order) = (&turns, &order);
            Box::pin(async move {
                for _ in 0..yields {
                    yield_now().await;
                }
                assert!(turns.wait(start).await);
                order.borrow_mut().push(start);
                yield_now().await;
                turns.pass(start + 1);
                Ok::<(), ()>(())
            }) as Worker<'_, ()>
        };
        run(all(vec![piece(2, 0), piece(0, 9), piece(1, 3), piece(3, 0)])).unwrap();
        assert_eq!(*order.borrow(), [0, 1, 2, 3]);
    }

    #[test]
    fn a_failure_stops_those_that_wait_and_lets_the_others_end() {
        let turns = Turns::new(true);
        let ended = Cell::new(0);
        let waiting = Box::pin(async {
            assert!(!turns.wait(5).await);
            ended.set(ended.get() + 1);
            Ok(())
        });
        let failing = Box::pin(async {
            yield_now().await;
            turns.stop();
            Err("failed")
        });
        let slow = Box::pin(async {
            for _ in 0..5 {
                yield_now().await;
            }
            ended.set(ended.get() + 1);
            Err("too late")
        });
        assert_eq!(run(all(vec![waiting, failing, slow])), Err("failed"));
        assert_eq!(ended.get(), 2);
    }
}
