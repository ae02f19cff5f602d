//! The listening socket: made with care for what is in its place, and removed at the end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
    sockopt,
};

/// Longest path of a socket in bytes: `sun_path` has 108, the last of which ends it.
pub const MAX_SOCKET_PATH: usize = 107;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 8;

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The path does not fit an address.
    #[error(
        "socket path {path} has {len} bytes, but the system allows at most {MAX_SOCKET_PATH}: use a shorter one",
        path = .path.display()
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// Somebody listens there.
    #[error("socket {} is in use: another process listens on it", .0.display())]
    InUse(PathBuf),
    /// Something else is there, which is not removed.
    #[error("{} exists and is not a socket: remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// A file descriptor that was handed over is not a listening unix stream socket.
    #[error("the file descriptor given is not a listening unix stream socket")]
    NotListening,
    /// A system call failed.
    #[error("socket {}: {doing}: {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// A listening unix socket, non-blocking.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    /// What to remove at the end: the path, and which file it was when we made it.
    made: Option<(PathBuf, FileId)>,
}

type FileId = (u64, u64);

impl Listener {
    /// Listens at `path`, where only this user may connect. A socket that nobody listens on any more is
    /// replaced.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn bind(path: &Path) -> Result<Listener, ListenError> {
        let len = path.as_os_str().len();
        if len > MAX_SOCKET_PATH {
            return Err(ListenError::PathTooLong {
                path: path.into(),
                len,
            });
        }
        let failed = |doing| {
            move |errno: Errno| ListenError::Io {
                path: path.into(),
                doing,
                source: errno.into(),
            }
        };
        let address = SocketAddrUnix::new(path).map_err(failed("not a valid path"))?;
        clear(path, &address)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed("socket"))?;
        // The file gets the socket's mode less the umask: no moment when others could connect, and no
        // change of the umask, which all threads share.
        rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(failed("cannot restrict its mode"))?;
        match bind(&fd, &address) {
            Err(Errno::ADDRINUSE) => return Err(ListenError::InUse(path.into())),
            result => result.map_err(failed("cannot bind"))?,
        }
        let id = file_id(path).map_err(failed("cannot stat"))?;
        let listener = Listener {
            fd,
            made: Some((path.into(), id)),
        };
        listen(&listener.fd, BACKLOG).map_err(failed("cannot listen"))?;
        Ok(listener)
    }

    /// Takes over a socket that listens already, as service managers hand them over. Its path is left alone.
    ///
    /// # Errors
    /// `NotListening`, or what the system says.
    pub fn from_fd(fd: OwnedFd) -> Result<Listener, ListenError> {
        let listening = sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(&fd) == Ok(SocketType::STREAM)
            && sockopt::socket_acceptconn(&fd) == Ok(true);
        if !listening {
            return Err(ListenError::NotListening);
        }
        rustix::io::ioctl_fionbio(&fd, true).map_err(|errno| ListenError::Io {
            path: PathBuf::from("(inherited)"),
            doing: "cannot make it non-blocking",
            source: errno.into(),
        })?;
        Ok(Listener { fd, made: None })
    }

    /// Takes a connection that waits, if there is one.
    ///
    /// # Errors
    /// What accept says, but for the failures of a single connection.
    pub fn accept(&self) -> io::Result<Option<OwnedFd>> {
        loop {
            match accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(fd) => return Ok(Some(fd)),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, id)) = &self.made
            && file_id(path) == Ok(*id)
        {
            let _ = rustix::fs::unlink(path);
        }
    }
}

/// Makes room for a socket at `path`, or says why not.
fn clear(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let failed = |doing| {
        move |errno: Errno| ListenError::Io {
            path: path.into(),
            doing,
            source: errno.into(),
        }
    };
    let stat = match rustix::fs::lstat(path) {
        Err(Errno::NOENT) => return Ok(()),
        result => result.map_err(failed("cannot stat"))?,
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(ListenError::NotASocket(path.into()));
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed("socket"))?;
    match connect(&probe, address) {
        // A full backlog has a listener too.
        Ok(()) | Err(Errno::AGAIN) => Err(ListenError::InUse(path.into())),
        Err(Errno::CONNREFUSED) => {
            tracing::info!("removing the stale socket {}", path.display());
            match rustix::fs::unlink(path) {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                Err(errno) => Err(failed("cannot remove the stale socket")(errno)),
            }
        }
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(failed("cannot find out whether it is in use")(errno)),
    }
}

fn file_id(path: &Path) -> rustix::io::Result<FileId> {
    rustix::fs::statat(CWD, path, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
        .map(|stat| (stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn the_socket_is_for_its_user_only_and_goes_with_the_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind(&path).unwrap();
        let metadata = std::fs::symlink_metadata(&path).unwrap();
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        assert!(listener.accept().unwrap().is_none());
        let _client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_in_use_is_refused_and_a_stale_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let other = UnixListener::bind(&path).unwrap();
        assert!(matches!(
            Listener::bind(&path).unwrap_err(),
            ListenError::InUse(_)
        ));
        drop(other);
        assert!(path.exists());
        Listener::bind(&path).unwrap();
    }

    #[test]
    fn what_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert!(matches!(
            Listener::bind(&path).unwrap_err(),
            ListenError::NotASocket(_)
        ));
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_path_that_is_too_long_is_named_with_its_length_and_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let fill = |len: usize| {
            dir.path()
                .join("x".repeat(len - dir.path().as_os_str().len() - 1))
        };
        let error = Listener::bind(&fill(108)).unwrap_err().to_string();
        assert!(
            error.contains("has 108 bytes") && error.contains("at most 107"),
            "{error}"
        );
        Listener::bind(&fill(107)).unwrap();
    }

    #[test]
    fn a_socket_put_in_our_place_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists());
    }

    #[test]
    fn only_a_listening_unix_socket_can_be_handed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let inherited = UnixListener::bind(&path).unwrap();
        let listener = Listener::from_fd(inherited.into()).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        drop(listener);
        assert!(path.exists());
        let (end, _other) = UnixStream::pair().unwrap();
        assert!(matches!(
            Listener::from_fd(end.into()).unwrap_err(),
            ListenError::NotListening
        ));
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(
            Listener::from_fd(file.into()).unwrap_err(),
            ListenError::NotListening
        ));
    }
}
