//! Group commit: requests that come while a round runs share the next one.

use std::future::poll_fn;
use std::sync::Mutex;
use std::task::{Poll, Waker};

use super::waiters::lock;

/// Rounds of work `W`, one at a time. Whoever finds none running leads the next one for everybody who waits.
pub struct Rounds<W> {
    state: Mutex<State<W>>,
}

struct State<W> {
    work: W,
    running: bool,
    /// A leader was dropped in the middle of its round: nobody knows what was done.
    broken: bool,
    started: u64,
    completed: u64,
    waiting: Vec<Waker>,
}

/// The round was abandoned half-way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

impl<W: Default> Rounds<W> {
    /// No round has run.
    pub fn new() -> Rounds<W> {
        let state = State {
            work: W::default(),
            running: false,
            broken: false,
            started: 0,
            completed: 0,
            waiting: Vec::new(),
        };
        Rounds {
            state: Mutex::new(state),
        }
    }

    /// Adds work and returns once a round that began after this call has done it. `gather` runs before the round
    /// takes its work (so that it takes more), `run` does the round's work.
    pub async fn join(
        &self,
        add: impl FnOnce(&mut W),
        gather: impl Future<Output = ()>,
        run: impl AsyncFnOnce(W),
    ) -> Result<(), Broken> {
        let ticket = {
            let mut state = lock(&self.state);
            add(&mut state.work);
            state.started + 1
        };
        let leads = poll_fn(|cx| {
            let mut state = lock(&self.state);
            if state.broken {
                Poll::Ready(Err(Broken))
            } else if state.completed >= ticket {
                Poll::Ready(Ok(false))
            } else if !state.running {
                state.running = true;
                Poll::Ready(Ok(true))
            } else {
                if !state.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                    state.waiting.push(cx.waker().clone());
                }
                Poll::Pending
            }
        })
        .await?;
        if leads {
            let turn = Turn {
                rounds: self,
                done: false,
            };
            gather.await;
            let work = {
                let mut state = lock(&self.state);
                state.started += 1;
                std::mem::take(&mut state.work)
            };
            run(work).await;
            turn.end();
        }
        Ok(())
    }
}

/// The leader's turn.
struct Turn<'a, W> {
    rounds: &'a Rounds<W>,
    done: bool,
}

impl<W> Turn<'_, W> {
    fn end(mut self) {
        self.done = true;
    }
}

impl<W> Drop for Turn<'_, W> {
    fn drop(&mut self) {
        let waiting = {
            let mut state = lock(&self.rounds.state);
            state.running = false;
            state.broken |= !self.done;
            state.completed = state.started;
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}
