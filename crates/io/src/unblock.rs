//! Helper threads for calls that block and have no asynchronous form: zone ioctls, opening files, fsync of directories.

use std::any::Any;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

/// Helper threads of the process at once; further calls wait for one.
const MAX_THREADS: usize = 32;

/// A helper without work ends after this time.
const LINGER: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

struct Pool {
    queue: Mutex<Queue>,
    work: Condvar,
}

struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    threads: usize,
}

static POOL: Pool = Pool {
    queue: Mutex::new(Queue {
        jobs: VecDeque::new(),
        idle: 0,
        threads: 0,
    }),
    work: Condvar::new(),
};

/// Runs `f` on a helper thread, at once, and waits for its result. Dropping the future does not stop `f`.
///
/// Where no thread can be started it runs on this one. A panic of `f` is passed on.
pub fn unblock<T, F>(f: F) -> impl Future<Output = T>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let answer = Arc::new(Mutex::new(Answer {
        result: None,
        waker: None,
    }));
    let theirs = answer.clone();
    POOL.run(Box::new(move || {
        let result = catch_unwind(AssertUnwindSafe(f));
        let waker = {
            let mut answer = lock(&theirs);
            answer.result = Some(result);
            answer.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }));
    poll_fn(move |cx| {
        let mut answer = lock(&answer);
        match answer.result.take() {
            Some(Ok(value)) => Poll::Ready(value),
            Some(Err(panic)) => {
                drop(answer);
                resume_unwind(panic)
            }
            None => {
                answer.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    })
}

struct Answer<T> {
    result: Option<Result<T, Box<dyn Any + Send>>>,
    waker: Option<Waker>,
}

impl Pool {
    fn run(&'static self, job: Job) {
        let mut queue = lock(&self.queue);
        queue.jobs.push_back(job);
        if queue.idle >= queue.jobs.len() || queue.threads >= MAX_THREADS {
            self.work.notify_one();
            return;
        }
        queue.threads += 1;
        drop(queue);
        let spawned = std::thread::Builder::new()
            .name("zbdkit-unblock".into())
            .spawn(|| self.work());
        if spawned.is_err() {
            let mut queue = lock(&self.queue);
            queue.threads -= 1;
            if queue.threads == 0 {
                let jobs = std::mem::take(&mut queue.jobs);
                drop(queue);
                jobs.into_iter().for_each(|job| job());
            }
        }
    }

    fn work(&self) {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                job();
                queue = lock(&self.queue);
                continue;
            }
            queue.idle += 1;
            let (again, timeout) = self
                .work
                .wait_timeout(queue, LINGER)
                .unwrap_or_else(PoisonError::into_inner);
            queue = again;
            queue.idle -= 1;
            if timeout.timed_out() && queue.jobs.is_empty() {
                queue.threads -= 1;
                return;
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
