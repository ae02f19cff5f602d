//! The control socket: a thread that does to served images what an operator asks for.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use zbdkit_block::Device;
use zbdkit_io::unix::{Knock, Listener, Reception, Stop};

use super::say;
use crate::control::{Reply, Request, receive, send};
use crate::image::Session;
use crate::output::{complain, describe};
use crate::verbs::set_zone::set_zone;

/// How long a client may take to say what it wants.
const ASKED_WITHIN: Duration = Duration::from_secs(5);

/// A bound control socket.
pub(super) struct Control {
    reception: Reception,
}

/// One that is served.
pub(super) struct Running {
    thread: JoinHandle<()>,
    stop: Stop,
}

impl Control {
    pub(super) fn bind(socket: &Path) -> anyhow::Result<Control> {
        let reception = Listener::bind(socket)
            .map_err(anyhow::Error::from)
            .and_then(|listener| Ok(Reception::new(listener)?))
            .with_context(|| format!("control socket {}", socket.display()))?;
        Ok(Control { reception })
    }

    /// Serves it over these images, each with the name that the user gave it.
    pub(super) fn run(self, devices: Vec<(String, Device)>) -> Running {
        let stop = self.reception.stop().clone();
        let thread = std::thread::spawn(move || {
            if let Err(error) = serve(self.reception, &devices) {
                complain(format_args!("the control socket ended: {}", describe(&error)));
            }
        });
        Running { thread, stop }
    }
}

impl Running {
    /// Ends it; what is asked for already is done before.
    pub(super) fn end(self) {
        self.stop.stop();
        let _ = self.thread.join();
    }
}

fn serve(mut reception: Reception, devices: &[(String, Device)]) -> anyhow::Result<()> {
    let session = Session::new()?;
    while let Some(client) = reception.next_client(&mut |_: Knock<'_>| {})? {
        let mut client = UnixStream::from(client);
        // One that does not listen to the answer has only itself to blame.
        let _ = client.set_nonblocking(false);
        let _ = client.set_write_timeout(Some(ASKED_WITHIN));
        let done = receive(&mut client, ASKED_WITHIN).and_then(|line| carry_out(&session, devices, &line));
        let reply = match done {
            Ok(()) => Reply::Done,
            Err(error) => Reply::Error(describe(&error).to_string()),
        };
        let _ = send(&mut client, &reply);
    }
    Ok(())
}

fn carry_out(session: &Session, devices: &[(String, Device)], line: &str) -> anyhow::Result<()> {
    let request = serde_json::from_str(line).context("the request makes no sense")?;
    let Request::SetZone { image, zone, state } = request;
    let device = find(devices, &image)?;
    session.run(set_zone(device, zone, state))?;
    say(&format!("set-zone: zone {zone} of {image} {}\n", state.said()));
    Ok(())
}

/// The image of that name, or of another name of the same file.
fn find<'a>(devices: &'a [(String, Device)], image: &str) -> anyhow::Result<&'a Device> {
    let file = |name: &str| std::fs::canonicalize(name).ok();
    let wanted = file(image);
    let is_it = |name: &str| name == image || wanted.is_some() && file(name) == wanted;
    let mut found = devices.iter().filter(|(name, _)| is_it(name));
    match (found.next(), found.next()) {
        (Some((_, device)), None) => Ok(device),
        (Some(_), Some(_)) => Err(anyhow::anyhow!("{image}: is served more than once")),
        (None, _) => {
            let names: Vec<_> = devices.iter().map(|(name, _)| name.as_str()).collect();
            Err(anyhow::anyhow!(
                "{image}: is not served there; {} is",
                names.join(", ")
            ))
        }
    }
}
