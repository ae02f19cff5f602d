//! Wake-ups between threads, none of which may be lost: a runtime that misses one sleeps for ever, and the watchdog
//! ends the test.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::task::{Poll, Waker};
use std::time::Duration;

use zbdkit_io::{
    Backend, PollSource, Runtime, RuntimeOptions, TaskPool, add_poll_source, sleep, spawn, submit, yield_now,
};

fn runtime(backend: Backend, busy_poll: Duration) -> Runtime {
    Runtime::new(RuntimeOptions {
        backend,
        busy_poll,
        ..RuntimeOptions::default()
    })
    .expect("a runtime")
}

/// Ends the process if it is not dropped in time; a lost wake-up would otherwise be a test that never ends.
struct Watchdog(Arc<AtomicBool>);

impl Watchdog {
    fn new(what: &'static str) -> Watchdog {
        let done = Arc::new(AtomicBool::new(false));
        let theirs = done.clone();
        std::thread::spawn(move || {
            for _ in 0..1200 {
                std::thread::sleep(Duration::from_millis(100));
                if theirs.load(Ordering::Relaxed) {
                    return;
                }
            }
            eprintln!("{what}: a wake-up was lost");
            std::process::abort();
        });
        Watchdog(done)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A number that one side raises and the other awaits.
#[derive(Default)]
struct Signal {
    value: AtomicU32,
    waker: Mutex<Option<Waker>>,
}

impl Signal {
    fn raise(&self) {
        self.value.fetch_add(1, Ordering::SeqCst);
        let waker = self.waker.lock().expect("no panic").take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    async fn reaches(&self, value: u32) {
        poll_fn(|cx| {
            *self.waker.lock().expect("no panic") = Some(cx.waker().clone());
            if self.value.load(Ordering::SeqCst) >= value {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }
}

/// Two runtimes wake each other by turns, so that each wake-up meets the other falling asleep.
fn ping_pong(backend: Backend, busy_poll: Duration, rounds: u32) {
    let _watchdog = Watchdog::new("ping-pong");
    let signals: Arc<[Signal; 2]> = Arc::default();
    let threads: Vec<_> = (0..2)
        .map(|me| {
            let signals = signals.clone();
            std::thread::spawn(move || {
                runtime(backend, busy_poll).block_on(async {
                    for round in 1..=rounds {
                        if me == 0 {
                            signals[1].raise();
                            signals[0].reaches(round).await;
                        } else {
                            signals[1].reaches(round).await;
                            signals[0].raise();
                        }
                    }
                });
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("no panic");
    }
}

#[test]
fn no_wake_up_is_lost_between_two_sleeping_runtimes() {
    for backend in [Backend::IoUring, Backend::Threads] {
        ping_pong(backend, Duration::ZERO, 20_000);
        ping_pong(backend, Duration::from_micros(50), 5_000);
    }
}

#[test]
fn no_wake_up_is_lost_when_many_threads_wake_many_tasks() {
    const TASKS: usize = 16;
    const WAKERS: usize = 4;
    const ROUNDS: u32 = 2_000;
    for backend in [Backend::IoUring, Backend::Threads] {
        let _watchdog = Watchdog::new("many to many");
        let signals: Arc<Vec<Signal>> = Arc::new((0..TASKS).map(|_| Signal::default()).collect());
        let start = Arc::new(Barrier::new(WAKERS + 1));
        let threads: Vec<_> = (0..WAKERS)
            .map(|_| {
                let (signals, start) = (signals.clone(), start.clone());
                std::thread::spawn(move || {
                    start.wait();
                    for _ in 0..ROUNDS {
                        signals.iter().for_each(Signal::raise);
                    }
                })
            })
            .collect();
        let left = Rc::new(Cell::new(TASKS));
        runtime(backend, Duration::ZERO).block_on(async {
            let pool = TaskPool::new(TASKS);
            for task in 0..TASKS {
                let (signals, left) = (signals.clone(), left.clone());
                let future = async move {
                    for value in 1..=ROUNDS * WAKERS as u32 {
                        signals[task].reaches(value).await;
                    }
                    left.set(left.get() - 1);
                };
                assert!(pool.try_spawn(future).is_ok());
            }
            start.wait();
            while pool.in_use() > 0 {
                sleep(Duration::from_millis(1)).await;
            }
        });
        assert_eq!(left.get(), 0);
        for thread in threads {
            thread.join().expect("no panic");
        }
    }
}

#[test]
fn closures_from_other_threads_run_on_the_runtimes_thread() {
    const CALLS: u32 = 5_000;
    for backend in [Backend::IoUring, Backend::Threads] {
        let _watchdog = Watchdog::new("remote calls");
        let runtime = runtime(backend, Duration::ZERO);
        let remote = runtime.remote();
        let here = std::thread::current().id();
        let done = Arc::new(Signal::default());
        let theirs = done.clone();
        let thread = std::thread::spawn(move || {
            for _ in 0..CALLS {
                let done = theirs.clone();
                let accepted = remote.run(move || {
                    assert_eq!(std::thread::current().id(), here);
                    spawn(async move {
                        yield_now().await;
                        done.raise();
                    });
                });
                assert!(accepted);
            }
        });
        runtime.block_on(done.reaches(CALLS));
        thread.join().expect("no panic");
    }
}

#[test]
fn wakers_may_outlive_their_runtime() {
    let waker = Rc::new(RefCell::new(None));
    let runtime = runtime(Backend::Auto, Duration::ZERO);
    let keep = waker.clone();
    runtime.block_on(async {
        spawn(poll_fn(move |cx| {
            *keep.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        }));
        yield_now().await;
        yield_now().await;
    });
    drop(runtime);
    let waker: Waker = waker.borrow_mut().take().expect("the task ran");
    waker.wake_by_ref();
    std::thread::spawn(move || waker.wake()).join().expect("no panic");
}

/// A producer that notifies only while it is asked to, as a virtqueue's driver does.
#[derive(Default)]
struct Ring {
    produced: AtomicU32,
    notify: AtomicBool,
    kick: Signal,
}

struct Source {
    ring: Arc<Ring>,
    seen: Cell<u32>,
    asleep: Cell<bool>,
    sleeps: Cell<u32>,
    waker: RefCell<Option<Waker>>,
}

impl Source {
    fn look(&self) -> bool {
        let new = self.ring.produced.load(Ordering::SeqCst) != self.seen.get();
        if new && let Some(waker) = self.waker.take() {
            waker.wake();
            return true;
        }
        false
    }
}

impl PollSource for Source {
    fn poll(&self) -> bool {
        self.look()
    }

    fn prepare_sleep(&self) -> bool {
        assert!(!self.asleep.replace(true), "asleep already");
        self.sleeps.set(self.sleeps.get() + 1);
        self.ring.notify.store(true, Ordering::SeqCst);
        self.look()
    }

    fn after_sleep(&self) {
        assert!(self.asleep.replace(false), "was not asleep");
        self.ring.notify.store(false, Ordering::SeqCst);
    }
}

#[test]
fn a_watched_source_that_notifies_only_on_request_misses_nothing() {
    const ITEMS: u32 = 20_000;
    for backend in [Backend::IoUring, Backend::Threads] {
        for busy_poll in [Duration::ZERO, Duration::from_micros(50)] {
            let _watchdog = Watchdog::new("a watched source");
            let ring = Arc::new(Ring::default());
            let theirs = ring.clone();
            let thread = std::thread::spawn(move || {
                let mut kicks = 0;
                for item in 1..=ITEMS {
                    theirs.produced.store(item, Ordering::SeqCst);
                    if theirs.notify.load(Ordering::SeqCst) {
                        theirs.kick.raise();
                        kicks += 1;
                    }
                    if item % 64 == 0 {
                        std::thread::yield_now();
                    }
                }
                kicks
            });
            let runtime = runtime(backend, busy_poll);
            let source = Rc::new(Source {
                ring: ring.clone(),
                seen: Cell::new(0),
                asleep: Cell::new(false),
                sleeps: Cell::new(0),
                waker: RefCell::default(),
            });
            runtime.block_on(async {
                let _watched = add_poll_source(source.clone());
                // What a kick does: it ends the sleep. The source then sees the items itself.
                let kicked = ring.clone();
                spawn(async move {
                    for kick in 1.. {
                        kicked.kick.reaches(kick).await;
                    }
                });
                while source.seen.get() < ITEMS {
                    poll_fn(|cx| {
                        let produced = ring.produced.load(Ordering::SeqCst);
                        if produced != source.seen.replace(produced) {
                            return Poll::Ready(());
                        }
                        *source.waker.borrow_mut() = Some(cx.waker().clone());
                        Poll::Pending
                    })
                    .await;
                }
                submit();
            });
            let kicks: u32 = thread.join().expect("no panic");
            // Whoever was kicked had asked for it.
            assert!(kicks == 0 || source.sleeps.get() > 0);
            assert!(!source.asleep.get());
        }
    }
}

#[test]
fn a_source_is_watched_no_longer_than_its_registration_lives() {
    struct Count(Cell<u32>);
    impl PollSource for Count {
        fn poll(&self) -> bool {
            self.0.set(self.0.get() + 1);
            false
        }
        fn prepare_sleep(&self) -> bool {
            false
        }
        fn after_sleep(&self) {}
    }
    let runtime = runtime(Backend::Auto, Duration::from_micros(50));
    let source = Rc::new(Count(Cell::new(0)));
    runtime.block_on(async {
        let registration = add_poll_source(source.clone());
        sleep(Duration::from_millis(1)).await;
        let polls = source.0.get();
        assert!(polls > 0);
        drop(registration);
        sleep(Duration::from_millis(1)).await;
        assert_eq!(
            source.0.get(),
            polls,
            "the task holds the source still, but nobody watches it"
        );
    });
}

#[test]
fn a_waker_left_over_from_a_larger_pool_wakes_nobody_in_a_smaller_one() {
    let runtime = runtime(Backend::Auto, Duration::ZERO);
    let left = Rc::new(RefCell::new(Vec::new()));
    let keep = |left: Rc<RefCell<Vec<Waker>>>| async move {
        poll_fn(|cx| {
            left.borrow_mut().push(cx.waker().clone());
            Poll::Ready(())
        })
        .await;
    };
    runtime.block_on(async {
        let large = TaskPool::new(8);
        for _ in 0..8 {
            assert!(large.try_spawn(keep(left.clone())).is_ok());
        }
        while large.in_use() > 0 {
            yield_now().await;
        }
        drop(large);
        let small = TaskPool::new(1);
        left.borrow().iter().for_each(Waker::wake_by_ref);
        yield_now().await;
        assert!(small.try_spawn(keep(Rc::default())).is_ok());
        while small.in_use() > 0 {
            yield_now().await;
        }
    });
}
