//! The server: one client after the other, until it is told to end.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use zbdkit_io::unix::{Listener, is_shortage, signal};

use crate::device::{Device, Stuck};
use crate::message::{RawMessage, is_reply};
use crate::peer::PeerError;
use crate::session::{CloseError, OpenError, Refused, Session};
use crate::stream::{Progress, Stream, StreamError};

/// How long what is in flight may keep memory that a client takes away. QEMU waits 5 s for an answer.
const RELEASE_WITHIN: Duration = Duration::from_secs(3);
/// Commands that are kept while another one waits for memory.
const MAX_BACKLOG: usize = 64;
/// Messages that are answered before the server looks whether it shall end.
const ROUND: usize = 64;

/// Why serving ended before it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The listening socket or waiting for it failed.
    #[error("vfio-user socket: {0}")]
    Socket(#[from] io::Error),
    /// Requests did not end; what is behind the device must not be closed as if they had.
    #[error(transparent)]
    Stuck(#[from] Stuck),
}

/// What happens, for a log. A client can cause any number of these.
#[derive(Debug)]
pub enum Event<'a> {
    /// A client is served.
    Connected,
    /// It left.
    Disconnected,
    /// Another one waits until it does.
    Waiting,
    /// A command was not carried out, and the client told so, if it listens.
    Refused(&'a Refused),
    /// The connection was closed for this.
    Closed(&'a dyn std::error::Error),
    /// The system has no room for another connection; they wait.
    Shortage(&'a io::Error),
}

/// A vfio-user server on a listening socket.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    stop: Arc<OwnedFd>,
    release_within: Duration,
}

/// Ends a running [`Server`], from any thread.
#[derive(Debug, Clone)]
pub struct ServerHandle {
    stop: Arc<OwnedFd>,
}

impl ServerHandle {
    /// Lets [`Server::run`] stop accepting, bring the device to rest, and return.
    pub fn shutdown(&self) {
        signal(&self.stop);
    }
}

impl Server {
    /// A server on `listener`, which clients can connect to from now on.
    ///
    /// # Errors
    /// Out of file descriptors.
    pub fn new(listener: Listener) -> io::Result<Server> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Server {
            listener,
            stop: Arc::new(stop),
            release_within: RELEASE_WITHIN,
        })
    }

    /// Changes how long what is in flight may keep memory that a client takes away, from 3 s. Longer than a client waits
    /// for an answer (QEMU: 5 s) is of no use.
    #[must_use]
    pub fn release_within(self, release_within: Duration) -> Server {
        Server {
            release_within,
            ..self
        }
    }

    /// For other threads.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle {
            stop: self.stop.clone(),
        }
    }

    /// Serves one client after the other until [`ServerHandle::shutdown`]. Afterwards no access is in flight, and the socket
    /// is gone.
    ///
    /// # Errors
    /// Where the socket fails, or where requests do not end in time.
    pub fn run<D: Device>(
        self,
        device: &mut D,
        mut on_event: impl FnMut(Event<'_>),
    ) -> Result<(), ServeError> {
        let mut waiting = None;
        loop {
            let client = match waiting.take() {
                Some(client) => client,
                None => match self.next_client(&mut on_event)? {
                    Some(client) => client,
                    None => return Ok(()),
                },
            };
            match self.serve(device, client, &mut waiting, &mut on_event) {
                Ok(()) => on_event(Event::Disconnected),
                Err(Ended::Stopped) => return Ok(()),
                Err(Ended::Closed(error)) => on_event(Event::Closed(&error)),
                Err(Ended::Fatal(error)) => return Err(error),
            }
        }
    }

    /// Waits for a client, or for the end.
    fn next_client(&self, on_event: &mut dyn FnMut(Event<'_>)) -> Result<Option<OwnedFd>, ServeError> {
        loop {
            let mut fds = [
                PollFd::new(&self.listener, PollFlags::IN),
                PollFd::new(&self.stop, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(ServeError::Socket(errno.into())),
            }
            if !fds[1].revents().is_empty() {
                return Ok(None);
            }
            if let Some(client) = self.accept(on_event)? {
                return Ok(Some(client));
            }
        }
    }

    fn accept(&self, on_event: &mut dyn FnMut(Event<'_>)) -> Result<Option<OwnedFd>, ServeError> {
        match self.listener.accept() {
            Ok(client) => Ok(client),
            Err(error) if is_shortage(&error) => {
                on_event(Event::Shortage(&error));
                // The connection stays in the backlog, and the socket readable.
                std::thread::sleep(Duration::from_millis(100));
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Serves one client until it goes. Another that connects meanwhile is put into `waiting`.
    fn serve<D: Device>(
        &self,
        device: &mut D,
        client: OwnedFd,
        waiting: &mut Option<OwnedFd>,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Ended> {
        let session = Session::open(device, self.release_within)?;
        on_event(Event::Connected);
        let mut connection = Connection {
            stream: Stream::new(client).map_err(StreamError::from)?,
            backlog: VecDeque::new(),
            session,
            server: self,
        };
        let result = connection.converse(waiting, on_event);
        match connection.session.close() {
            Ok(()) => result,
            Err(CloseError::Stuck(stuck)) if matches!(result, Err(Ended::Stopped)) => {
                Err(Ended::Fatal(stuck.into()))
            }
            Err(error) => result.and(Err(Ended::Closed(error.into()))),
        }
    }
}

/// Why a connection ended without the client's wish.
enum Ended {
    /// The server is to end.
    Stopped,
    /// It was closed for this.
    Closed(Closed),
    /// The server cannot go on.
    Fatal(ServeError),
}

#[derive(Debug, thiserror::Error)]
enum Closed {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Peer(#[from] PeerError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Close(#[from] CloseError),
    #[error("the client was refused before a version was agreed on")]
    NoVersion,
}

impl From<StreamError> for Ended {
    fn from(error: StreamError) -> Ended {
        match error {
            StreamError::Stopped => Ended::Stopped,
            error => Ended::Closed(error.into()),
        }
    }
}

impl From<PeerError> for Ended {
    fn from(error: PeerError) -> Ended {
        Ended::Closed(error.into())
    }
}

impl From<OpenError> for Ended {
    fn from(error: OpenError) -> Ended {
        Ended::Closed(error.into())
    }
}

/// One client that is served.
struct Connection<'a, D: Device> {
    stream: Stream,
    /// Commands that came while one was waiting.
    backlog: VecDeque<RawMessage>,
    session: Session<'a, D>,
    server: &'a Server,
}

impl<D: Device> Connection<'_, D> {
    /// Answers messages until the client or the server goes.
    fn converse(
        &mut self,
        waiting: &mut Option<OwnedFd>,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Ended> {
        loop {
            let [socket, knocked] = self.wait(waiting.is_none())?;
            if knocked && waiting.is_none() {
                *waiting = self.server.accept(on_event).map_err(Ended::Fatal)?;
                if waiting.is_some() {
                    on_event(Event::Waiting);
                }
            }
            self.send_accesses()?;
            if socket && !self.answer(on_event)? {
                return Ok(());
            }
        }
    }

    /// Waits for something to do. Returns whether that is at the client's socket, and at the listening one.
    fn wait(&self, listen: bool) -> Result<[bool; 2], Ended> {
        let peer = self.session.dma().peer();
        loop {
            let timeout = peer
                .deadline()
                .map(|at| at.saturating_duration_since(Instant::now()));
            if timeout.is_some_and(|left| left.is_zero()) {
                return Err(PeerError::Silent.into());
            }
            let timeout = timeout.and_then(|left| Timespec::try_from(left).ok());
            let listen = if listen { PollFlags::IN } else { PollFlags::empty() };
            let mut fds = [
                PollFd::new(&self.stream, PollFlags::IN),
                PollFd::new(&self.server.listener, listen),
                PollFd::new(&self.server.stop, PollFlags::IN),
                PollFd::new(peer, PollFlags::IN),
            ];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(Ended::Fatal(ServeError::Socket(errno.into()))),
            }
            if !fds[2].revents().is_empty() {
                return Err(Ended::Stopped);
            }
            return Ok([0, 1].map(|i| !fds[i].revents().is_empty()));
        }
    }

    /// Sends the accesses to memory that wait and may be sent.
    fn send_accesses(&self) -> Result<(), StreamError> {
        let peer = self.session.dma().peer();
        peer.heard();
        while let Some(bytes) = peer.next() {
            self.stream.send(&bytes, None, self.server.stop.as_fd())?;
        }
        Ok(())
    }

    /// Answers what is there, but not for ever. False when the client is gone.
    fn answer(&mut self, on_event: &mut dyn FnMut(Event<'_>)) -> Result<bool, Ended> {
        for _ in 0..ROUND {
            let message = match self.stream.advance()? {
                Progress::Message(message) => message,
                Progress::Idle => break,
                Progress::Closed => return Ok(false),
            };
            if is_reply(&message.header) {
                self.session.take_reply(&message)?;
                self.send_accesses()?;
                continue;
            }
            self.command(message, on_event)?;
            while let Some(message) = self.backlog.pop_front() {
                self.command(message, on_event)?;
            }
        }
        Ok(true)
    }

    fn command(&mut self, message: RawMessage, on_event: &mut dyn FnMut(Event<'_>)) -> Result<(), Ended> {
        let Connection {
            stream,
            backlog,
            session,
            server,
        } = self;
        let mut pump = |dma: &crate::Dma| {
            while backlog.len() < MAX_BACKLOG {
                match stream.advance()? {
                    Progress::Message(message) if is_reply(&message.header) => {
                        // One that is not expected is found out by whoever waits for the right one.
                        let _ = dma.peer().complete(&message);
                    }
                    Progress::Message(message) => backlog.push_back(message),
                    Progress::Idle | Progress::Closed => break,
                }
            }
            Ok(())
        };
        let outcome = session.dispatch(message, &mut pump)?;
        if let Some(refused) = &outcome.refused {
            on_event(Event::Refused(refused));
        }
        if let Some(reply) = outcome.reply {
            let fd = reply.fd.as_ref().map(|fd| fd.as_fd());
            stream.send(&reply.bytes, fd, server.stop.as_fd())?;
        }
        if outcome.ends {
            return Err(Ended::Closed(Closed::NoVersion));
        }
        Ok(())
    }
}
