//! A disk that takes its time: requests end in any order, on a thread of its own, in pieces, and whether or not anybody still
//! waits for them; and they fail where a test says so.

use std::future::poll_fn;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::thread::JoinHandle;
use std::time::Duration;

use zbdkit_io::{File, IoBuf, LocalBoxFuture, Storage, StorageOp};

use super::Rng;
use super::crash::Bytes;

/// Bytes that a request moves at once.
const PIECE: usize = 1024;

/// A request, as far as a test chooses failures by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads bytes.
    Read,
    /// Writes bytes.
    Write,
    /// Makes things durable.
    Sync,
    /// Zeroes bytes.
    Zero,
    /// Changes the length.
    Length,
}

/// How a request fails.
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    /// The errno.
    pub errno: i32,
    /// Bytes of a write that get to the disk all the same.
    pub written: usize,
}

/// Says whether and how a request with this offset and length fails.
pub type Fails = Box<dyn FnMut(Kind, u64, u64) -> Option<Failure> + Send>;

/// The disk. Dropping it ends its thread.
pub struct Device {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    queue: Mutex<Queue>,
    more: Condvar,
    bytes: Mutex<Bytes>,
    fails: Mutex<Option<Fails>>,
}

struct Queue {
    requests: Vec<(Request, Arc<Answer>)>,
    rng: Rng,
    busy: bool,
    stop: bool,
}

enum Request {
    Read { offset: u64, len: usize },
    Write { offset: u64, data: Vec<u8> },
    Zero { offset: u64, len: u64 },
    Grow { len: u64 },
    Sync,
}

#[derive(Default)]
struct Answer {
    state: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    result: Option<io::Result<Vec<u8>>>,
    waker: Option<Waker>,
}

impl Device {
    /// A disk that holds these bytes.
    pub fn new(bytes: Bytes, seed: u64) -> Device {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                requests: Vec::new(),
                rng: Rng(seed),
                busy: false,
                stop: false,
            }),
            more: Condvar::new(),
            bytes: Mutex::new(bytes),
            fails: Mutex::default(),
        });
        let theirs = shared.clone();
        let thread = std::thread::spawn(move || theirs.work());
        Device {
            shared,
            thread: Some(thread),
        }
    }

    /// A handle for the code under test.
    pub fn file(&self) -> File {
        File::custom(Arc::new(Handle(self.shared.clone())))
    }

    /// What it holds.
    pub fn bytes(&self) -> Bytes {
        lock(&self.shared.bytes).clone()
    }

    /// Whether requests wait or are being carried out.
    pub fn is_busy(&self) -> bool {
        let queue = lock(&self.shared.queue);
        queue.busy || !queue.requests.is_empty()
    }

    /// Requests fail from now on as `fails` says.
    pub fn fail(&self, fails: Option<Fails>) {
        *lock(&self.shared.fails) = fails;
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        lock(&self.shared.queue).stop = true;
        self.shared.more.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self) {
        loop {
            let mut queue = lock(&self.queue);
            queue.busy = false;
            while queue.requests.is_empty() && !queue.stop {
                queue = self.more.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            if queue.requests.is_empty() {
                return;
            }
            if queue.requests.len() < 4 && queue.rng.one_in(4) {
                // Others may come and overtake.
                let waited = self.more.wait_timeout(queue, Duration::from_micros(200));
                queue = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            let count = queue.requests.len() as u64;
            let index = queue.rng.below(count) as usize;
            let (request, answer) = queue.requests.swap_remove(index);
            queue.busy = true;
            drop(queue);
            answer.give(self.carry_out(request));
        }
    }

    fn carry_out(&self, request: Request) -> io::Result<Vec<u8>> {
        let (kind, offset, len) = match &request {
            Request::Read { offset, len } => (Kind::Read, *offset, *len as u64),
            Request::Write { offset, data } => (Kind::Write, *offset, data.len() as u64),
            Request::Zero { offset, len } => (Kind::Zero, *offset, *len),
            Request::Grow { len } => (Kind::Length, *len, 0),
            Request::Sync => (Kind::Sync, 0, 0),
        };
        let failure = self.failure(kind, offset, len);
        match request {
            Request::Write { offset, data } => {
                let written = failure.map_or(data.len(), |failure| failure.written.min(data.len()));
                for (index, piece) in data[..written].chunks(PIECE).enumerate() {
                    lock(&self.bytes).write(offset + (index * PIECE) as u64, piece);
                }
            }
            _ if failure.is_some() => {}
            Request::Read { offset, len } => {
                let mut data = vec![0; len];
                for (index, piece) in data.chunks_mut(PIECE).enumerate() {
                    lock(&self.bytes).read(offset + (index * PIECE) as u64, piece);
                }
                return Ok(data);
            }
            Request::Zero { offset, len } => lock(&self.bytes).zero(offset, len),
            Request::Grow { len } => {
                let mut bytes = lock(&self.bytes);
                if bytes.len() < len {
                    bytes.set_len(len);
                }
            }
            Request::Sync => {}
        }
        match failure {
            Some(failure) => Err(io::Error::from_raw_os_error(failure.errno)),
            None => Ok(Vec::new()),
        }
    }

    fn failure(&self, kind: Kind, offset: u64, len: u64) -> Option<Failure> {
        lock(&self.fails).as_mut()?(kind, offset, len)
    }
}

impl Answer {
    fn give(&self, result: io::Result<Vec<u8>>) {
        let waker = {
            let mut state = lock(&self.state);
            state.result = Some(result);
            state.waker.take()
        };
        waker.into_iter().for_each(Waker::wake);
    }
}

struct Handle(Arc<Shared>);

impl Storage for Handle {
    fn submit(&self, op: StorageOp) -> LocalBoxFuture<'static, io::Result<()>> {
        let shared = self.0.clone();
        Box::pin(async move {
            let mut reads: Option<IoBuf> = None;
            let request = match op {
                StorageOp::Read { buf, offset } => {
                    let len = buf.len();
                    reads = Some(buf);
                    Request::Read { offset, len }
                }
                StorageOp::Write { buf, offset } => Request::Write {
                    offset,
                    data: buf.to_vec(),
                },
                StorageOp::DataSync | StorageOp::Sync => Request::Sync,
                StorageOp::PunchHole { offset, len } | StorageOp::ZeroRange { offset, len } => {
                    Request::Zero { offset, len }
                }
                StorageOp::Allocate { offset, len } => Request::Grow { len: offset + len },
            };
            let answer = Arc::new(Answer::default());
            lock(&shared.queue).requests.push((request, answer.clone()));
            shared.more.notify_one();
            let data = poll_fn(|cx| {
                let mut state = lock(&answer.state);
                match state.result.take() {
                    Some(result) => Poll::Ready(result),
                    None => {
                        state.waker = Some(cx.waker().clone());
                        Poll::Pending
                    }
                }
            })
            .await?;
            if let Some(buf) = reads {
                buf.copy_from(&data);
            }
            Ok(())
        })
    }

    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.0.bytes).len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if let Some(failure) = self.0.failure(Kind::Length, len, 0) {
            return Err(io::Error::from_raw_os_error(failure.errno));
        }
        lock(&self.0.bytes).set_len(len);
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
