//! What goes to stdout, and how errors are explained.

use std::io::{self, BufWriter, StdoutLock, Write};
use std::process::ExitCode;

use serde::Serialize;

/// The command line asks for something that cannot be; found after clap was done with it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Nobody reads our output any more: not worth a word.
#[derive(Debug, thiserror::Error)]
#[error("stdout is closed")]
struct Closed;

/// Buffered stdout. Once the reader is gone (`zbdkit report | head`), writing ends the program silently.
pub struct Out(BufWriter<StdoutLock<'static>>);

impl Out {
    pub fn new() -> Out {
        Out(BufWriter::with_capacity(1 << 16, io::stdout().lock()))
    }

    /// Writes a line.
    pub fn line(&mut self, line: impl std::fmt::Display) -> anyhow::Result<()> {
        writeln!(self.0, "{line}").map_err(stdout_error)
    }

    /// Writes text as it is.
    pub fn text(&mut self, text: impl std::fmt::Display) -> anyhow::Result<()> {
        write!(self.0, "{text}").map_err(stdout_error)
    }

    /// Writes a value as JSON for people and programs.
    pub fn json(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(value)?;
        self.line(text)
    }

    /// Hands over what is buffered.
    pub fn flush(&mut self) -> anyhow::Result<()> {
        self.0.flush().map_err(stdout_error)
    }
}

fn stdout_error(error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Closed.into(),
        _ => anyhow::Error::new(error).context("writing to stdout"),
    }
}

/// Prints what clap has to say, which may be the help that was asked for, and gives the exit status.
pub fn usage(error: &clap::Error) -> ExitCode {
    // Nobody may be reading; that is no failure.
    let _ = error.print();
    if error.exit_code() == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(usage_status())
    }
}

/// The exit status of a wrong command line: 2, but for `check`, whose 2 says that the image is damaged.
fn usage_status() -> u8 {
    let verb = std::env::args_os()
        .skip(1)
        .find(|arg| !arg.as_encoded_bytes().starts_with(b"-"));
    if verb.is_some_and(|verb| verb == "check") {
        1
    } else {
        2
    }
}

/// Prints an error and gives the exit status that belongs to it.
pub fn explain(error: &anyhow::Error) -> ExitCode {
    if error.is::<Closed>() {
        return ExitCode::SUCCESS;
    }
    complain(format_args!("{}", describe(error)));
    if error.is::<Usage>() {
        complain("try 'zbdkit help', or the verb with --help");
        return ExitCode::from(usage_status());
    }
    ExitCode::FAILURE
}

/// Whether an error is the command line's.
pub fn is_usage(error: &anyhow::Error) -> bool {
    error.is::<Usage>()
}

/// Writes a line of ours to stderr, if there is one.
pub fn complain(message: impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "zbdkit: {message}");
}

/// Writes a line to stderr in the name of a command.
pub fn complain_as(command: &str, message: impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "{command}: {message}");
}

/// Writes a line to stderr as it is.
pub fn complain_plain(message: impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "{message}");
}

/// The error and its causes in one line, but for causes that the message before them tells already.
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

/// Text out of an image as a terminal may get it: without control characters.
pub fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escaped = c.is_control().then(|| c.escape_default());
            let plain = escaped.is_none().then_some(c);
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}

/// A size as qemu-img prints it: three significant digits, `196 KiB`, `10.6 MiB`, `0 B`.
pub fn qemu_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    // From 1000 on the next unit is taken, so that three digits are enough.
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = match value {
        _ if value >= 99.95 => 0,
        _ if value >= 9.995 => 1,
        _ if value >= 0.9995 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    let text = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => &text,
    };
    format!("{text} {}B", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_out_of_images_do_not_move_the_cursor() {
        assert_eq!(
            printable("\u{1b}[2Jb\u{e4}se\n.raw"),
            "\\u{1b}[2Jb\u{e4}se\\n.raw"
        );
    }

    #[test]
    fn sizes_are_printed_as_qemu_img_prints_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (12800, "12.5 KiB"),
            (200704, "196 KiB"),
            (590336, "576 KiB"),
            (11141120, "10.6 MiB"),
            (1 << 30, "1 GiB"),
            (1 << 48, "256 TiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(qemu_size(bytes), text);
        }
    }

    #[test]
    fn causes_are_told_once() {
        let inner = anyhow::anyhow!("no such file");
        assert_eq!(
            describe(&inner.context("disk: no such file")),
            "disk: no such file"
        );
        let inner = anyhow::anyhow!("no such file");
        assert_eq!(describe(&inner.context("disk")), "disk: no such file");
    }
}
