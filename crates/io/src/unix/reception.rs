//! Where a server of one client at a time waits: for clients, for what its present client wants, and for its end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::{Listener, is_shortage, signal};

/// How long connections are left alone where the system has no room for another.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);

/// What happens at the listening socket, for a log. Clients can cause any number of these.
#[derive(Debug)]
pub enum Knock<'a> {
    /// A client waits until the present one leaves.
    Waiting,
    /// The system has no room for another connection; they wait.
    Shortage(&'a io::Error),
}

/// Why a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awake<const N: usize> {
    /// The server is to end.
    Stopped,
    /// Which descriptors are ready. None may be: time has passed, or something else was seen to.
    Ready([bool; N]),
}

/// A listening socket with at most one client that waits for its turn, and a way to end it all.
#[derive(Debug)]
pub struct Reception {
    listener: Listener,
    stop: Stop,
    waiting: Option<OwnedFd>,
}

/// Ends a [`Reception`], from any thread. Clones are of the same one.
#[derive(Debug, Clone)]
pub struct Stop(Arc<OwnedFd>);

impl Stop {
    /// Lets all waiting end, now and from now on.
    pub fn stop(&self) {
        signal(&self.0);
    }
}

/// Readable once it was stopped.
impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Reception {
    /// Takes over a listening socket.
    ///
    /// # Errors
    /// Out of file descriptors.
    pub fn new(listener: Listener) -> io::Result<Reception> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Reception {
            listener,
            stop: Stop(Arc::new(stop)),
            waiting: None,
        })
    }

    /// What ends it.
    pub fn stop(&self) -> &Stop {
        &self.stop
    }

    /// Waits for the next client; none where the server is to end.
    ///
    /// # Errors
    /// The listening socket, or waiting for it, failed.
    pub fn next_client(&mut self, on_knock: &mut dyn FnMut(Knock<'_>)) -> io::Result<Option<OwnedFd>> {
        loop {
            if let Some(client) = self.waiting.take() {
                return Ok(Some(client));
            }
            // Nobody is kept waiting here: what is said of those who wait is not said.
            let mut shortage = |knock: Knock<'_>| {
                if let Knock::Shortage(_) = knock {
                    on_knock(knock);
                }
            };
            if self.wait([], None, &mut shortage)? == Awake::Stopped {
                return Ok(None);
            }
        }
    }

    /// Waits until one of `fds` can be read, but not longer than `timeout`. A client that connects meanwhile is kept for
    /// [`Reception::next_client`]; others stay outside.
    ///
    /// # Errors
    /// The listening socket, or waiting, failed.
    pub fn wait<const N: usize>(
        &mut self,
        fds: [BorrowedFd<'_>; N],
        timeout: Option<Duration>,
        on_knock: &mut dyn FnMut(Knock<'_>),
    ) -> io::Result<Awake<N>> {
        let timeout = timeout.and_then(|left| Timespec::try_from(left).ok());
        let listen = match self.waiting {
            None => PollFlags::IN,
            Some(_) => PollFlags::empty(),
        };
        let mut polled = Vec::with_capacity(N + 2);
        polled.extend(fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        polled.push(PollFd::new(&self.stop, PollFlags::IN));
        polled.push(PollFd::new(&self.listener, listen));
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Awake::Ready([false; N])),
            Err(errno) => return Err(errno.into()),
        }
        let ready = |at: usize| !polled[at].revents().is_empty();
        let (stopped, knocked) = (ready(N), ready(N + 1));
        let awake = std::array::from_fn(ready);
        drop(polled);
        if stopped {
            return Ok(Awake::Stopped);
        }
        if knocked && self.waiting.is_none() {
            self.admit(on_knock)?;
        }
        Ok(Awake::Ready(awake))
    }

    fn admit(&mut self, on_knock: &mut dyn FnMut(Knock<'_>)) -> io::Result<()> {
        match self.listener.accept() {
            Ok(client) => self.waiting = client,
            Err(error) if is_shortage(&error) => {
                on_knock(Knock::Shortage(&error));
                // The connection stays in the backlog, and the socket readable.
                std::thread::sleep(SHORTAGE_PAUSE);
            }
            Err(error) => return Err(error),
        }
        if self.waiting.is_some() {
            on_knock(Knock::Waiting);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    struct Place {
        dir: tempfile::TempDir,
        reception: Reception,
    }

    impl Place {
        fn new() -> Place {
            let dir = tempfile::tempdir().unwrap();
            let listener = Listener::bind(&dir.path().join("s")).unwrap();
            Place {
                reception: Reception::new(listener).unwrap(),
                dir,
            }
        }

        fn connect(&self) -> UnixStream {
            UnixStream::connect(self.dir.path().join("s")).unwrap()
        }
    }

    #[test]
    fn a_second_client_is_kept_and_a_third_stays_outside() {
        let mut place = Place::new();
        let _first = place.connect();
        let mut silent = |knock: Knock<'_>| panic!("{knock:?}");
        let present = place.reception.next_client(&mut silent).unwrap().unwrap();

        let [mut second, _third] = [place.connect(), place.connect()];
        let mut knocks = 0;
        for _ in 0..3 {
            let awake = place
                .reception
                .wait([present.as_fd()], Some(Duration::ZERO), &mut |_| knocks += 1);
            assert_eq!(awake.unwrap(), Awake::Ready([false]));
        }
        assert_eq!(knocks, 1);

        second.write_all(b"2").unwrap();
        let next = place.reception.next_client(&mut silent).unwrap().unwrap();
        let mut byte = [0];
        rustix::io::read(&next, &mut byte).unwrap();
        assert_eq!(&byte, b"2");
    }

    #[test]
    fn it_says_which_descriptors_are_ready() {
        let mut place = Place::new();
        let [(mut a, b), (_c, d)] = [UnixStream::pair().unwrap(), UnixStream::pair().unwrap()];
        a.write_all(b"x").unwrap();
        let awake = place
            .reception
            .wait([d.as_fd(), b.as_fd()], None, &mut |_| ())
            .unwrap();
        assert_eq!(awake, Awake::Ready([false, true]));
    }

    #[test]
    fn once_stopped_everything_ends_even_with_clients_at_the_door() {
        let mut place = Place::new();
        let _client = place.connect();
        place.reception.stop().clone().stop();
        assert_eq!(
            place.reception.wait([], None, &mut |_| ()).unwrap(),
            Awake::Stopped
        );
        assert!(place.reception.next_client(&mut |_| ()).unwrap().is_none());
    }
}
