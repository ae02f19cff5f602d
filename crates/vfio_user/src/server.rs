//! The server: one client after the other, until it is told to end.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use zbdkit_io::unix::{Awake, Knock, Listener, Progress, Reception, Stop};
use zbdkit_spec::vfio_user::flag;

use crate::device::{Device, Stuck};
use crate::line::{Home, Met};
use crate::message::{RawMessage, Stream, StreamError, is_reply};
use crate::peer::PeerError;
use crate::session::{CloseError, OpenError, Refused, Session};

/// How long what is in flight may keep memory that a client takes away. QEMU waits 5 s for an answer.
const RELEASE_WITHIN: Duration = Duration::from_secs(3);
/// How long a thread of the device may keep the socket that is wanted back: it may be in a system call.
const RECALL_WITHIN: Duration = Duration::from_secs(30);
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
            backlog: VecDeque::new(),
            session,
            stop: self.reception.stop().clone(),
            home: Home::new().map_err(StreamError::from)?,
            is_posting: false,
        };
        let stream = Stream::new(client).map_err(StreamError::from)?;
        let result = connection.converse(stream, &mut self.reception, on_event);
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
    /// Commands that came while one was waiting.
    backlog: VecDeque<RawMessage>,
    session: Session<'a, D>,
    stop: Stop,
    /// Where the socket comes back to from threads of the device.
    home: Arc<Home>,
    /// The last command wanted no answer.
    is_posting: bool,
}

impl<D: Device> Connection<'_, D> {
    /// Answers messages until the client or the server goes.
    fn converse(
        &mut self,
        mut stream: Stream,
        reception: &mut Reception,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Ended> {
        loop {
            let met;
            (stream, met) = self.lend(stream, reception, on_event)?;
            let has_come = met.is_some() || self.wait(&stream, reception, on_event)?;
            self.send_accesses(&stream)?;
            if has_come && !self.answer(&mut stream, met, on_event)? {
                return Ok(());
            }
        }
    }

    /// Lends the socket to the device, where it wants that, and waits until something is to be done here. With what has
    /// come meanwhile.
    fn lend(
        &mut self,
        stream: Stream,
        reception: &mut Reception,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(Stream, Option<Met>), Ended> {
        // Answers of the client are taken here, and what wants one is answered here.
        let is_heard = self.session.dma().peer().deadline().is_some();
        if is_heard || !self.is_posting || !self.session.wants_line() {
            return Ok((stream, None));
        }
        self.session.take_line(self.home.lend(stream));
        let fds = [self.home.as_fd(), self.session.dma().peer().as_fd()];
        let waited = reception.wait(fds, None, &mut |knock| on_event(Event::of(&knock)));
        // Whatever it was: there is no need to know.
        let back = self.home.recall(RECALL_WITHIN);
        match waited.map_err(|error| Ended::Fatal(error.into()))? {
            Awake::Stopped => Err(Ended::Stopped),
            Awake::Ready(_) => back.ok_or(Ended::Fatal(Stuck(RECALL_WITHIN).into())),
        }
    }

    /// Waits for something to do. Whether that is at the client's socket.
    fn wait(
        &self,
        stream: &Stream,
        reception: &mut Reception,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<bool, Ended> {
        let peer = self.session.dma().peer();
        let timeout = peer
            .deadline()
            .map(|at| at.saturating_duration_since(Instant::now()));
        if timeout.is_some_and(|left| left.is_zero()) {
            return Err(PeerError::Silent.into());
        }
        let fds = [stream.as_fd(), peer.as_fd()];
        let awake = reception.wait(fds, timeout, &mut |knock| on_event(Event::of(&knock)));
        match awake.map_err(|error| Ended::Fatal(error.into()))? {
            Awake::Stopped => Err(Ended::Stopped),
            Awake::Ready([has_come, _]) => Ok(has_come),
        }
    }

    /// Sends the accesses to memory that wait and may be sent.
    fn send_accesses(&self, stream: &Stream) -> Result<(), StreamError> {
        let peer = self.session.dma().peer();
        peer.heard();
        while let Some(bytes) = peer.next() {
            stream.send(&bytes, None, self.stop.as_fd())?;
        }
        Ok(())
    }

    /// Answers what has come and what is there, but not for ever. False when the client is gone.
    fn answer(
        &mut self,
        stream: &mut Stream,
        met: Option<Met>,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<bool, Ended> {
        let mut next = met;
        for _ in 0..ROUND {
            let message = match next.take().unwrap_or_else(|| stream.advance())? {
                Progress::Message(message) => message,
                Progress::Idle => break,
                Progress::Closed => return Ok(false),
            };
            if is_reply(&message.header) {
                self.session.take_reply(&message)?;
                self.send_accesses(stream)?;
                continue;
            }
            self.command(stream, message, on_event)?;
            while let Some(message) = self.backlog.pop_front() {
                self.command(stream, message, on_event)?;
            }
        }
        Ok(true)
    }

    fn command(
        &mut self,
        stream: &mut Stream,
        message: RawMessage,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), Ended> {
        let Connection {
            backlog,
            session,
            stop,
            ..
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
        self.is_posting = message.header.flags.get() & flag::NO_REPLY != 0;
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
