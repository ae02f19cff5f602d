//! The server: socket, threads, and the log of what clients do.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use zbdkit_io::unix::ListenError;
use zbdkit_io::{BackendKind, RuntimeOptions};
use zbdkit_nvme::{ControllerOptions, Subsystem};
use zbdkit_vfio_user::Event;

use super::device::{Function, MAX_IO_QUEUES};
use super::worker::WorkerThread;
use crate::log_limit::{LogLimit, limited_warn};
use crate::socket::Socket;

pub use zbdkit_vfio_user::{ServeError, ServerHandle};

static REFUSALS: LogLimit = LogLimit::new(10, Duration::from_secs(60));
static CONNECTIONS: LogLimit = LogLimit::new(20, Duration::from_secs(60));

/// How to serve a subsystem.
#[derive(Debug)]
pub struct ServeOptions {
    /// Where to listen.
    pub socket: Socket,
    /// I/O queues that the host may make: 1 to 511.
    pub io_queues: u16,
    /// Threads that serve them: 1 to `io_queues`.
    pub threads: u16,
    /// How long to watch idle queues before sleeping.
    pub busy_poll: Duration,
    /// Never sleep while the host has queues: it may then map the doorbells, and ring them without telling anybody. Takes
    /// the CPUs of all threads.
    pub polls: bool,
    /// Which way I/O goes.
    pub backend: zbdkit_io::Backend,
    /// Most data of a command, as a power of two of 4096 bytes (MDTS), 1 to 12.
    pub max_transfer: u8,
    /// How long requests in flight may keep a client from being let go, or the controller from being reset.
    pub drain_within: Duration,
}

impl ServeOptions {
    /// 16 I/O queues on one thread, at `socket`.
    pub fn new(socket: Socket) -> ServeOptions {
        let RuntimeOptions {
            busy_poll, backend, ..
        } = RuntimeOptions::default();
        ServeOptions {
            socket,
            io_queues: 16,
            threads: 1,
            busy_poll,
            polls: false,
            backend,
            max_transfer: ControllerOptions::default().max_transfer,
            drain_within: Duration::from_secs(30),
        }
    }
}

/// Why a subsystem cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Too few or too many queues.
    #[error("{0} queues: there must be 1 to {MAX_IO_QUEUES}")]
    Queues(u16),
    /// Too few or too many threads.
    #[error("{threads} threads: there must be 1 to {queues}, one for each queue")]
    Threads {
        /// Threads.
        threads: u16,
        /// I/O queues.
        queues: u16,
    },
    /// The socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Threads, rings, file descriptors.
    #[error("cannot start: {0}")]
    Start(#[source] io::Error),
}

/// A controller that waits for clients.
pub struct Server {
    server: zbdkit_vfio_user::Server,
    function: Function,
    io: BackendKind,
}

impl Server {
    /// Makes the socket and starts the threads. Clients can connect from now on; they are served by [`Server::run`].
    ///
    /// # Errors
    /// See [`BindError`].
    pub fn bind(subsystem: Arc<Subsystem>, options: ServeOptions) -> Result<Server, BindError> {
        let ServeOptions {
            socket,
            io_queues,
            threads,
            busy_poll,
            polls,
            backend,
            max_transfer,
            drain_within,
        } = options;
        if io_queues == 0 || io_queues > MAX_IO_QUEUES {
            return Err(BindError::Queues(io_queues));
        }
        if threads == 0 || threads > io_queues {
            return Err(BindError::Threads {
                threads,
                queues: io_queues,
            });
        }
        let listener = socket.listen()?;
        let server = zbdkit_vfio_user::Server::new(listener).map_err(BindError::Start)?;
        let mut workers = Vec::with_capacity(threads.into());
        let mut io = BackendKind::IoUring;
        for index in 0..threads.into() {
            let options = RuntimeOptions {
                busy_poll,
                backend,
                ..RuntimeOptions::default()
            };
            let (worker, kind) = WorkerThread::start(index, options, polls).map_err(BindError::Start)?;
            workers.push(worker);
            io = kind;
        }
        let controller = ControllerOptions {
            io_queues,
            max_transfer,
            ..ControllerOptions::default()
        };
        let function = Function::new(subsystem, controller, workers, drain_within, polls);
        Ok(Server {
            server,
            function: function.map_err(BindError::Start)?,
            io,
        })
    }

    /// For other threads.
    pub fn handle(&self) -> ServerHandle {
        self.server.handle()
    }

    /// How the queues do their I/O; its `Display` says why it is not io_uring.
    pub fn io_backend(&self) -> &BackendKind {
        &self.io
    }

    /// Serves one client after the other until [`ServerHandle::shutdown`]. Afterwards no request is in flight, and the
    /// socket is gone.
    ///
    /// # Errors
    /// Where the socket fails, or where requests do not end in time.
    pub fn run(mut self) -> Result<(), ServeError> {
        self.server.run(&mut self.function, log)
    }
}

fn log(event: Event<'_>) {
    match event {
        Event::Connected => tracing::info!("a client connected"),
        Event::Disconnected => tracing::info!("the client disconnected"),
        Event::Waiting => {
            limited_warn!(
                CONNECTIONS,
                "another client waits until the present one disconnects"
            );
        }
        Event::Closed(error) => limited_warn!(CONNECTIONS, "closed the connection to the client: {error}"),
        Event::Shortage(error) => limited_warn!(CONNECTIONS, "cannot accept a connection: {error}"),
        Event::Refused(refused) => limited_warn!(REFUSALS, "refused a message: {refused}"),
    }
}
