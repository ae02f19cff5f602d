//! Where a door that speaks over a unix socket listens.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use zbdkit_io::unix::{ListenError, Listener};

/// Where to listen.
#[derive(Debug)]
pub enum Socket {
    /// A unix socket that is made here, and removed at the end.
    Path(PathBuf),
    /// A unix socket that listens already.
    Listening(OwnedFd),
}

impl Socket {
    /// Begins to listen.
    pub(crate) fn listen(self) -> Result<Listener, ListenError> {
        match self {
            Socket::Path(path) => Listener::bind(&path),
            Socket::Listening(fd) => Listener::from_fd(fd),
        }
    }
}
