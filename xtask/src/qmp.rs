//! Commands to a running QEMU, by its machine protocol (QMP).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// QEMU answers at most this late.
const LIMIT: Duration = Duration::from_secs(30);

/// QEMU's arguments for a socket of the protocol.
pub fn arguments(socket: &Path) -> [String; 2] {
    let path = socket.display().to_string().replace(',', ",,");
    ["-qmp".to_owned(), format!("unix:{path},server=on,wait=off")]
}

/// Has QEMU execute a command without arguments, such as `system_reset`.
///
/// # Errors
/// When QEMU does not answer in time, or refuses.
pub fn execute(socket: &Path, command: &str) -> Result<()> {
    let stream = UnixStream::connect(socket).context("cannot reach QEMU's socket")?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut lines = BufReader::new(stream.try_clone()?);
    for command in ["qmp_capabilities", command] {
        let text = json!({ "execute": command }).to_string();
        (&stream).write_all(format!("{text}\n").as_bytes())?;
        answer(&mut lines).with_context(|| format!("QEMU's {command}"))?;
    }
    Ok(())
}

/// The answer to one command, past the greeting and events.
fn answer(lines: &mut impl BufRead) -> Result<()> {
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line)? == 0 {
            bail!("no answer");
        }
        let message: Value = serde_json::from_str(&line)?;
        if let Some(error) = message.get("error") {
            bail!("{error}");
        }
        if message.get("return").is_some() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greeting_and_events_are_no_answers_and_an_error_is_one() {
        let mut good = &b"{\"QMP\":{}}\n{\"event\":\"RESET\"}\n{\"return\":{}}\n{\"return\":{}}\n"[..];
        answer(&mut good).unwrap();
        assert_eq!(good, b"{\"return\":{}}\n", "one answer a command");
        let mut bad = &b"{\"error\":{\"class\":\"CommandNotFound\"}}\n"[..];
        assert!(
            answer(&mut bad)
                .unwrap_err()
                .to_string()
                .contains("CommandNotFound")
        );
        assert!(answer(&mut &b""[..]).is_err());
    }
}
