//! A disk whose requests take as long as a test wants.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use zbdkit_block::{CrossZone, Device, Error, Lane, Limits, Node, Request};
use zbdkit_io::IoBuf;

/// A disk of zeros whose requests wait while the gate is shut.
pub struct Gate {
    limits: Limits,
    state: Arc<State>,
}

/// What its maker sees of it.
#[derive(Default)]
pub struct State {
    shut: AtomicBool,
    pub broken: AtomicBool,
    waiting: AtomicUsize,
    pub flushes: AtomicUsize,
    wakers: Mutex<Vec<Waker>>,
}

impl State {
    pub fn shut(&self) {
        self.shut.store(true, Ordering::SeqCst);
    }

    pub fn open(&self) {
        self.shut.store(false, Ordering::SeqCst);
        self.wakers.lock().unwrap().drain(..).for_each(Waker::wake);
    }

    async fn pass(&self) -> Result<(), Error> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        std::future::poll_fn(|cx| {
            // The waker first: whoever opens the gate looks for it afterwards.
            self.wakers.lock().unwrap().push(cx.waker().clone());
            if self.shut.load(Ordering::SeqCst) {
                Poll::Pending
            } else {
                Poll::Ready(())
            }
        })
        .await;
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        if self.broken.load(Ordering::SeqCst) {
            Err(Error::Io { op: "read", errno: 5 })
        } else {
            Ok(())
        }
    }

    /// How many requests wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    pub fn wait_for(&self, count: usize) {
        until("requests are waiting", || self.waiting() == count);
    }
}

impl Gate {
    /// One of 1 MiB, and what its maker sees of it.
    pub fn device() -> (Device, Arc<State>) {
        let state = Arc::new(State::default());
        let gate = Gate {
            limits: Limits::plain(1 << 20, 512, false),
            state: state.clone(),
        };
        (Device::new(Arc::new(gate)), state)
    }
}

impl Node for Gate {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn driver(&self) -> &'static str {
        "gate"
    }

    fn read<'a>(&'a self, _: &'a Lane, buf: IoBuf, _: u64, _: CrossZone) -> Request<'a, ()> {
        Box::pin(async move {
            self.state.pass().await?;
            buf.fill(0..buf.len(), 0x42);
            Ok(())
        })
    }

    fn write<'a>(&'a self, _: &'a Lane, _: IoBuf, _: u64) -> Request<'a, ()> {
        Box::pin(self.state.pass())
    }

    fn flush(&self) -> Request<'_, ()> {
        self.state.flushes.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Ok(()) })
    }

    fn write_zeroes<'a>(&'a self, _: &'a Lane, _: u64, _: u64, _: bool) -> Request<'a, ()> {
        Box::pin(self.state.pass())
    }

    fn discard<'a>(&'a self, _: &'a Lane, _: u64, _: u64) -> Request<'a, ()> {
        Box::pin(self.state.pass())
    }

    fn close(&self) -> Request<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
