//! The server: socket, connections, and the device as vhost-user sees it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use zbdkit_block::Device;
use zbdkit_io::{BackendKind, RuntimeOptions};

use super::model::{Model, Unsuitable};
use super::queue::Service;
use super::stats::Stats;
use super::thread::{Control, QueueThread};
use crate::log_limit::{LogLimit, limited_warn};
use crate::socket::Socket;
use crate::vhost_user::backend::{Backend, ConfigReadOnly, FeatureError, RingSetup, Stuck};
use crate::vhost_user::message::{Stream, StreamError};
use crate::vhost_user::session::{Refused, Session};
use zbdkit_io::unix::{Awake, Knock, ListenError, Progress, Reception, Stop};

/// Queues that the protocol's index byte can name.
const MAX_QUEUES: u16 = 256;
/// Largest queue, as in the standard for split rings.
const MAX_QUEUE_SIZE: u16 = 32768;

static REFUSALS: LogLimit = LogLimit::new(10, Duration::from_secs(60));
static CONNECTIONS: LogLimit = LogLimit::new(20, Duration::from_secs(60));

/// How to serve a device.
#[derive(Debug)]
pub struct ServeOptions {
    /// Where to listen.
    pub socket: Socket,
    /// Request queues, each with its own thread: 1 to 256.
    pub queues: u16,
    /// The queue size that front-ends are expected to use, a power of two. Requests have up to two segments less.
    /// Larger and smaller rings work too.
    pub queue_size: u16,
    /// What GET_ID answers; at most 20 bytes.
    pub serial: String,
    /// How long to watch an idle queue before sleeping.
    pub busy_poll: Duration,
    /// Which way I/O goes.
    pub backend: zbdkit_io::Backend,
    /// How long requests in flight may keep a front-end from being let go.
    pub drain_within: Duration,
}

impl ServeOptions {
    /// One queue of 256 at `socket`.
    pub fn new(socket: Socket) -> ServeOptions {
        let RuntimeOptions {
            busy_poll, backend, ..
        } = RuntimeOptions::default();
        ServeOptions {
            socket,
            queues: 1,
            queue_size: 256,
            serial: "zbdkit".to_owned(),
            busy_poll,
            backend,
            drain_within: Duration::from_secs(30),
        }
    }
}

/// Why a device cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The device does not fit virtio-blk.
    #[error(transparent)]
    Unsuitable(#[from] Unsuitable),
    /// Too few or too many queues.
    #[error("{0} queues: there must be 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// Not a queue size.
    #[error("queue size {0}: it must be a power of two from 4 to {MAX_QUEUE_SIZE}")]
    QueueSize(u16),
    /// The serial does not fit.
    #[error("serial number {serial:?} has {len} bytes, at most 20 fit")]
    Serial {
        /// The serial number.
        serial: String,
        /// Its length in bytes.
        len: usize,
    },
    /// The socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Threads, rings, file descriptors.
    #[error("cannot start the queue threads: {0}")]
    Threads(#[source] io::Error),
}

/// Why serving ended before it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The listening socket or waiting for it failed.
    #[error("vhost-user socket: {0}")]
    Socket(#[from] io::Error),
    /// Requests did not end; the device must not be closed as if they had.
    #[error(transparent)]
    Stuck(#[from] Stuck),
}

/// A device that waits for front-ends.
pub struct Server {
    reception: Reception,
    blk: Blk,
    release_within: Duration,
    /// How the queues do their I/O.
    io: BackendKind,
}

/// What other threads can do with a running [`Server`]: end it, and look at its counts.
#[derive(Debug, Clone)]
pub struct ServerHandle {
    stop: Stop,
    queues: Arc<[Arc<Control>]>,
}

impl ServerHandle {
    /// Lets [`Server::run`] stop accepting, bring its queues to rest, and return.
    pub fn shutdown(&self) {
        self.stop.stop();
    }

    /// Counts since the start, over all queues.
    pub fn stats(&self) -> Stats {
        let mut sum = Stats::default();
        self.queues.iter().for_each(|queue| queue.stats.add_to(&mut sum));
        sum
    }
}

impl Server {
    /// Makes the socket and starts the threads. Front-ends can connect from now on; they are served by
    /// [`Server::run`].
    ///
    /// # Errors
    /// See [`BindError`].
    pub fn bind(device: Device, options: ServeOptions) -> Result<Server, BindError> {
        let ServeOptions {
            socket,
            queues,
            queue_size,
            serial,
            busy_poll,
            backend,
            drain_within,
        } = options;
        if queues == 0 || queues > MAX_QUEUES {
            return Err(BindError::Queues(queues));
        }
        if !queue_size.is_power_of_two() || !(4..=MAX_QUEUE_SIZE).contains(&queue_size) {
            return Err(BindError::QueueSize(queue_size));
        }
        if serial.len() > zbdkit_spec::virtio_blk::ID_BYTES {
            return Err(BindError::Serial {
                len: serial.len(),
                serial,
            });
        }
        let model = Arc::new(Model::new(device.limits(), queues, queue_size, &serial)?);
        let reception = Reception::new(socket.listen()?).map_err(BindError::Threads)?;
        let mut threads = Vec::with_capacity(queues.into());
        let mut io = BackendKind::IoUring;
        for index in 0..queues {
            let entries = u32::from(queue_size).max(64);
            let options = RuntimeOptions {
                entries,
                busy_poll,
                backend,
                ..RuntimeOptions::default()
            };
            let (thread, kind) = QueueThread::start(index, options).map_err(BindError::Threads)?;
            threads.push(thread);
            io = kind;
        }
        let blk = Blk {
            device,
            model,
            threads,
            features: None,
            chain_limit: queue_size.into(),
            drain_within,
        };
        Ok(Server {
            reception,
            blk,
            release_within: drain_within,
            io,
        })
    }

    /// For other threads.
    pub fn handle(&self) -> ServerHandle {
        let queues = self
            .blk
            .threads
            .iter()
            .map(|thread| thread.control().clone())
            .collect();
        ServerHandle {
            stop: self.reception.stop().clone(),
            queues,
        }
    }

    /// How the queues do their I/O; its `Display` says why it is not io_uring.
    pub fn io_backend(&self) -> &BackendKind {
        &self.io
    }

    /// Serves one front-end after the other until [`ServerHandle::shutdown`]. Afterwards no request is in flight,
    /// and the socket is gone.
    ///
    /// # Errors
    /// Where the socket fails, or where requests do not end in time.
    pub fn run(mut self) -> Result<(), ServeError> {
        loop {
            let Some(client) = self.reception.next_client(&mut log_knock)? else {
                return self.at_rest();
            };
            tracing::info!("a front-end connected");
            match self.serve(client) {
                Ok(()) => tracing::info!("the front-end disconnected"),
                Err(Ended::Stopped) => return self.at_rest(),
                Err(Ended::Failed(error)) => {
                    limited_warn!(CONNECTIONS, "closed the connection to the front-end: {error}");
                }
                Err(Ended::Fatal(error)) => return Err(error),
            }
        }
    }

    /// Whether no request is in flight any more: those of a front-end that was let go may still be.
    fn at_rest(&self) -> Result<(), ServeError> {
        let patience = self.blk.drain_within;
        for thread in &self.blk.threads {
            thread.wait_stopped(patience)?;
        }
        Ok(())
    }

    /// Serves one front-end until it goes.
    fn serve(&mut self, client: OwnedFd) -> Result<(), Ended> {
        let mut stream = Stream::new(client).map_err(|error| Ended::Failed(Failure::Stream(error.into())))?;
        let mut session = Session::new(&mut self.blk, self.release_within);
        let result = converse(&mut stream, &mut session, &mut self.reception);
        match session.close() {
            Ok(()) => result,
            Err(Refused::Stuck(stuck)) if matches!(result, Err(Ended::Stopped)) => {
                Err(Ended::Fatal(stuck.into()))
            }
            Err(refused) => result.and(Err(Ended::Failed(refused.into()))),
        }
    }
}

/// Why a connection ended without the front-end's wish.
enum Ended {
    /// The server is to end.
    Stopped,
    /// It was closed for this.
    Failed(Failure),
    /// The server cannot go on.
    Fatal(ServeError),
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("vhost-user socket: {0}")]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Refused(#[from] Refused),
}

impl From<StreamError> for Ended {
    fn from(error: StreamError) -> Ended {
        match error {
            StreamError::Stopped => Ended::Stopped,
            error => Ended::Failed(error.into()),
        }
    }
}

/// Answers messages until the front-end or the server goes.
fn converse(
    stream: &mut Stream,
    session: &mut Session<'_, Blk>,
    reception: &mut Reception,
) -> Result<(), Ended> {
    let stop = reception.stop().clone();
    loop {
        let awake = reception.wait([stream.as_fd()], None, &mut log_knock);
        match awake.map_err(|error| Ended::Fatal(error.into()))? {
            Awake::Stopped => return Err(Ended::Stopped),
            Awake::Ready([false]) => continue,
            Awake::Ready([true]) => {}
        }
        match stream.advance()? {
            Progress::Idle => {}
            Progress::Closed => return Ok(()),
            Progress::Message(message) => {
                let reply = session
                    .dispatch(message, |refused| {
                        limited_warn!(REFUSALS, "refused a message: {refused}")
                    })
                    .map_err(|refused| Ended::Failed(refused.into()))?;
                if let Some(reply) = reply {
                    stream.send(&reply, None, stop.as_fd())?;
                }
            }
        }
    }
}

fn log_knock(knock: Knock<'_>) {
    match knock {
        Knock::Waiting => limited_warn!(
            CONNECTIONS,
            "another front-end waits until the present one disconnects"
        ),
        Knock::Shortage(error) => limited_warn!(CONNECTIONS, "cannot accept a connection: {error}"),
    }
}

/// The device behind the protocol.
struct Blk {
    device: Device,
    model: Arc<Model>,
    threads: Vec<QueueThread>,
    /// What the present driver took, once it did.
    features: Option<u64>,
    chain_limit: usize,
    drain_within: Duration,
}

impl Backend for Blk {
    fn features(&self) -> u64 {
        self.model.features()
    }

    fn queues(&self) -> u16 {
        self.threads.len() as u16
    }

    fn set_features(&mut self, features: u64) -> Result<(), FeatureError> {
        self.features = Some(features);
        self.model.set_cache_mode(features);
        self.model.check_features(features)
    }

    fn read_config(&self, offset: usize, out: &mut [u8]) {
        self.model.read_config(self.features, offset, out);
    }

    fn write_config(&mut self, offset: usize, bytes: &[u8]) -> Result<(), ConfigReadOnly> {
        self.model.write_config(self.features, offset, bytes)
    }

    fn start_queue(&mut self, ring: RingSetup) -> Result<(), Stuck> {
        let thread = &self.threads[usize::from(ring.index)];
        let service = Service {
            device: self.device.clone(),
            model: self.model.clone(),
            control: thread.control().clone(),
            chain_limit: self.chain_limit,
        };
        thread.serve(service, ring)
    }

    fn begin_stop(&mut self, index: u16) {
        self.threads[usize::from(index)].begin_stop();
    }

    fn wait_stopped(&mut self, index: u16) -> Result<u16, Stuck> {
        self.threads[usize::from(index)].wait_stopped(self.drain_within)
    }

    fn set_call(&mut self, index: u16, fd: Option<Arc<OwnedFd>>) {
        self.threads[usize::from(index)].set_call(fd);
    }

    fn needs_reset(&self) -> bool {
        self.threads.iter().any(QueueThread::is_broken)
    }

    fn connected(&mut self) {
        self.model.reset_cache_mode();
    }

    fn quiesced(&mut self) {
        self.features = None;
        self.threads.iter().for_each(QueueThread::clear_broken);
    }
}
