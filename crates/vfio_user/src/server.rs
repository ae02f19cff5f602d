//! The server: one client after the other, until it is told to end.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use zbdkit_io::unix::{Awake, Knock, Listener, Progress, Reception, Stop};

use crate::device::{Device, Stuck};
use crate::message::{RawMessage, Stream, StreamError, is_reply};
use crate::peer::PeerError;
use crate::session::{CloseError, OpenError, Refused, Session};

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

impl<'a> Event<'a> {
    fn of(knock: &Knock<'a>) -> Event<'a> {
        match knock {
            Knock::Waiting => Event::Waiting,
            Knock::Shortage(error) => Event::Shortage(error),
        }
    }
}

/// A vfio-user server on a listening socket.
#[derive(Debug)]
pub struct Server {
    reception: Reception,
    release_within: Duration,
}

/// Ends a running [`Server`], from any thread.
#[derive(Debug, Clone)]
pub struct ServerHandle {
    stop: Stop,
}

impl ServerHandle {
    /// Lets [`Server::run`] stop accepting, bring the device to rest, and return.
    pub fn shutdown(&self) {
        self.stop.stop();
    }
}

impl Server {
    /// A server on `listener`, which clients can connect to from now on.
    ///
    /// # Errors
    /// Out of file descriptors.
    pub fn new(listener: Listener) -> io::Result<Server> {
        Ok(Server {
            reception: Reception::new(listener)?,
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
            stop: self.reception.stop().clone(),
        }
    }

    /// Serves one client after the other until [`ServerHandle::shutdown`]. Afterwards no access is in flight, and the socket
    /// is gone.
    ///
    /// # Errors
    /// Where the socket fails, or where requests do not end in time.
    pub fn run<D: Device>(
        mut self,
        device: &mut D,
        mut on_event: impl FnMut(Event<'_>),
    ) -> Result<(), ServeError> {
        loop {
            let client = self
                .reception
                .next_client(&mut |knock| on_event(Event::of(&knock)))?;
            let Some(client) = client else {
                return Ok(());
            };
            match self.serve(device, client, &mut on_event) {
                Ok(()) => on_event(Event::Disconnected),
                Err(Ended::Stopped) => return Ok(()),
                Err(Ended::Closed(error)) => on_event(Event::Closed(&error)),
                Err(Ended::Fatal(error)) => return Err(error),
            }
        }
    }

    /// Serves one client until it goes.
    fn serve<D: Device>(
        &mut self,
        device: &mut D,
        client: OwnedFd,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Ended> {
        let session = Session::open(device, self.release_within)?;
        on_event(Event::Connected);
        let mut connection = Connection {
            stream: Stream::new(client).map_err(StreamError::from)?,
            backlog: VecDeque::new(),
            session,
            stop: self.reception.stop().clone(),
        };
        let result = connection.converse(&mut self.reception, on_event);
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
    #[error("vfio-user socket: {0}")]
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
    stop: Stop,
}

impl<D: Device> Connection<'_, D> {
    /// Answers messages until the client or the server goes.
    fn converse(
        &mut self,
        reception: &mut Reception,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Ended> {
        loop {
            let has_come = self.wait(reception, on_event)?;
            self.send_accesses()?;
            if has_come && !self.answer(on_event)? {
                return Ok(());
            }
        }
    }

    /// Waits for something to do. Whether that is at the client's socket.
    fn wait(&self, reception: &mut Reception, on_event: &mut dyn FnMut(Event<'_>)) -> Result<bool, Ended> {
        let peer = self.session.dma().peer();
        let timeout = peer
            .deadline()
            .map(|at| at.saturating_duration_since(Instant::now()));
        if timeout.is_some_and(|left| left.is_zero()) {
            return Err(PeerError::Silent.into());
        }
        let fds = [self.stream.as_fd(), peer.as_fd()];
        let awake = reception.wait(fds, timeout, &mut |knock| on_event(Event::of(&knock)));
        match awake.map_err(|error| Ended::Fatal(error.into()))? {
            Awake::Stopped => Err(Ended::Stopped),
            Awake::Ready([has_come, _]) => Ok(has_come),
        }
    }

    /// Sends the accesses to memory that wait and may be sent.
    fn send_accesses(&self) -> Result<(), StreamError> {
        let peer = self.session.dma().peer();
        peer.heard();
        while let Some(bytes) = peer.next() {
            self.stream.send(&bytes, None, self.stop.as_fd())?;
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
            stop,
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
            stream.send(&reply.bytes, fd, stop.as_fd())?;
        }
        if outcome.ends {
            return Err(Ended::Closed(Closed::NoVersion));
        }
        Ok(())
    }
}
