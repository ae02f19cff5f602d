//! What is said over the control socket of `serve`: requests of an operator to images that are served. One a connection,
//! as a line of JSON, and one line as its reply.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::verbs::set_zone::State;

/// Longest line, bytes.
pub const MAX_LINE: u64 = 64 << 10;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "command",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case",
    deny_unknown_fields
)]
pub enum Request {
    /// As the verb.
    SetZone {
        /// As the image is named to `serve`, or another name of the same file.
        image: String,
        /// The zone by its number.
        zone: u32,
        state: State,
    },
}

/// Its reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Reply {
    /// It is done.
    Done,
    /// It is not, and why.
    Error(String),
}

/// How long the server may take, which waits for requests in flight.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// Has the server at `socket` carry out a request.
pub fn ask(socket: &Path, request: &Request) -> anyhow::Result<()> {
    let reply = exchange(socket, request).with_context(|| format!("control socket {}", socket.display()))?;
    match reply {
        Reply::Done => Ok(()),
        Reply::Error(error) => Err(anyhow::anyhow!(error)),
    }
}

fn exchange(socket: &Path, request: &Request) -> anyhow::Result<Reply> {
    let mut stream = UnixStream::connect(socket).context("is anything served with '--control' there?")?;
    stream.set_read_timeout(Some(ANSWER_WITHIN))?;
    send(&mut stream, request)?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_LINE)).read_line(&mut line)?;
    serde_json::from_str(&line).context("the reply makes no sense")
}

/// Sends a line.
pub fn send(stream: &mut UnixStream, message: &impl Serialize) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(stream.write_all(&line)?)
}

/// Reads a line of somebody who may send anything, or nothing.
pub fn receive(stream: &mut UnixStream, within: Duration) -> anyhow::Result<String> {
    let deadline = Instant::now() + within;
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        anyhow::ensure!(!left.is_zero(), "no request within {} s", within.as_secs());
        anyhow::ensure!(
            (line.len() as u64) < MAX_LINE,
            "a request of over {MAX_LINE} bytes"
        );
        stream.set_read_timeout(Some(left))?;
        let mut bytes = [0; 4096];
        match stream.read(&mut bytes) {
            Ok(0) => break,
            Ok(got) => line.extend(&bytes[..got]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    String::from_utf8(line).context("the request is no text")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_what_the_manual_says() {
        let text = r#"{"command":"set-zone","image":"disk.raw","zone":5,"state":"read-only"}"#;
        let request = Request::SetZone {
            image: "disk.raw".to_owned(),
            zone: 5,
            state: State::ReadOnly,
        };
        assert_eq!(serde_json::from_str::<Request>(text).unwrap(), request);
        assert_eq!(serde_json::to_string(&request).unwrap(), text);
        assert_eq!(serde_json::to_string(&Reply::Done).unwrap(), r#""done""#);
        let error = serde_json::to_string(&Reply::Error("no".to_owned())).unwrap();
        assert_eq!(error, r#"{"error":"no"}"#);
    }

    #[test]
    fn nobody_is_waited_for_without_end() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"{").unwrap();
        assert!(receive(&mut ours, Duration::from_millis(20)).is_err());
        theirs.write_all(&vec![b' '; MAX_LINE as usize]).unwrap();
        let error = receive(&mut ours, Duration::from_secs(60)).unwrap_err();
        assert!(error.to_string().contains("over"), "{error}");
    }
}
