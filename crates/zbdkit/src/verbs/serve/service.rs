//! What surrounds a daemon: signals, systemd's readiness and sockets.

use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::Context;
use listenfd::ListenFd;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::output::complain;

/// Why serving should end.
pub enum Event {
    /// The process was asked to end by this signal.
    Signal(&'static str),
    /// A door ended.
    Ended,
}

/// Signals this close to the first are the same wish: timeout(1) and terminals signal a process and its group.
const SAME_WISH: Duration = Duration::from_millis(200);

/// Turns the first SIGTERM, SIGINT or SIGHUP into an event. A later one ends the process at once.
pub fn signals() -> io::Result<(mpsc::Sender<Event>, mpsc::Receiver<Event>)> {
    let (sender, receiver) = mpsc::channel();
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let to = sender.clone();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut first = None;
            for signal in signals.forever() {
                let name = match signal {
                    SIGTERM => "SIGTERM",
                    SIGINT => "SIGINT",
                    _ => "SIGHUP",
                };
                let since = first.get_or_insert_with(Instant::now).elapsed();
                if since > SAME_WISH {
                    complain(format_args!(
                        "{name} again: ended at once, the next opening recovers the images"
                    ));
                    signal_hook::low_level::exit(128 + signal);
                }
                // Nobody minds hearing it twice.
                let _ = to.send(Event::Signal(name));
            }
        })?;
    Ok((sender, receiver))
}

/// Tells systemd about our state, where it wants to know.
pub fn notify(state: &str) {
    let Some(address) = std::env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty()) else {
        return;
    };
    let address = match address.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&address),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        tracing::warn!("cannot tell systemd {state:?}: {error}");
    }
}

/// The sockets that systemd hands over (LISTEN_FDS), in its order.
pub struct Handed {
    sockets: ListenFd,
    next: usize,
}

impl Handed {
    pub fn from_environment() -> Handed {
        Handed {
            sockets: ListenFd::from_env(),
            next: 0,
        }
    }

    /// The next one, and where it listens.
    pub fn next(&mut self) -> anyhow::Result<(OwnedFd, Option<PathBuf>)> {
        let count = self.sockets.len();
        anyhow::ensure!(
            self.next < count,
            "socket 'systemd': {} sockets are wanted, but LISTEN_FDS handed over {count}",
            self.next + 1
        );
        let listener = self.sockets.take_unix_listener(self.next);
        let listener = listener.with_context(|| format!("socket {} of LISTEN_FDS", self.next))?;
        self.next += 1;
        let listener = listener.context("a socket of LISTEN_FDS was taken already")?;
        let path = listener
            .local_addr()
            .ok()
            .and_then(|address| address.as_pathname().map(Into::into));
        Ok((listener.into(), path))
    }
}
