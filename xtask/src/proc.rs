//! Child processes that never outlive us and never run for ever.
//!
//! Three things end a child: its own exit, its time limit, and our death. The last one is the
//! kernel's `PDEATHSIG`, set by `setpriv` so that no code runs between fork and exec. It fires when
//! the *thread* that started the child ends, so children are started on the main thread or on
//! threads that wait for them.

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often a child is asked whether it has ended.
const POLL: Duration = Duration::from_millis(10);

/// A command for `program` that is killed when we die, where the host has `setpriv`.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    static SETPRIV: OnceLock<Option<PathBuf>> = OnceLock::new();
    match SETPRIV.get_or_init(|| find_program("setpriv")) {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", "KILL", "--"]).arg(program);
            command
        }
        None => Command::new(program),
    }
}

/// Looks `name` up in PATH and in the directories that ordinary users often lack there.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
}

/// A running child, killed and reaped when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    what: String,
}

impl Running {
    /// Starts `command`; `what` names it in errors.
    pub fn start(command: &mut Command, what: &str) -> Result<Running> {
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {what} ({command:?})"))?;
        Ok(Running {
            child,
            what: what.to_owned(),
        })
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The exit status when the child has ended.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .with_context(|| format!("cannot wait for {}", self.what))
    }

    /// Waits at most `limit`; `None` means that the child still runs.
    pub fn wait_for(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            std::thread::sleep(POLL);
        }
    }

    /// Sends `signal` to the child.
    pub fn signal(&self, signal: rustix::process::Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        let Some(pid) = pid else {
            bail!("{} has no usable process id", self.what)
        };
        rustix::process::kill_process(pid, signal).with_context(|| format!("cannot signal {}", self.what))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Runs `command` to its end without a terminal and returns its standard output.
///
/// # Errors
/// When it cannot be started, takes longer than `limit` (it is killed then) or fails; the error
/// carries the end of what it printed.
pub fn capture(command: &mut Command, what: &str, limit: Duration) -> Result<Vec<u8>> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut running = Running::start(command, what)?;
    let stdout = read_in_background(running.child().stdout.take());
    let stderr = read_in_background(running.child().stderr.take());
    let status = running.wait_for(limit)?;
    drop(running);
    let (stdout, stderr) = (
        stdout.join().unwrap_or_default(),
        stderr.join().unwrap_or_default(),
    );
    match status {
        Some(status) if status.success() => Ok(stdout),
        Some(status) => {
            let said = if stderr.trim_ascii().is_empty() {
                &stdout
            } else {
                &stderr
            };
            bail!(
                "{what} failed ({status}):\n{}",
                indent(&tail(&String::from_utf8_lossy(said), 20))
            )
        }
        None => bail!("{what} did not end within {} s and was killed", limit.as_secs()),
    }
}

/// Like [`capture`], with its output appended to the file `log`, for long work that is watched.
pub fn logged(command: &mut Command, what: &str, log: &Path) -> Result<Running> {
    let file = std::fs::OpenOptions::new().create(true).append(true).open(log);
    let file = file.with_context(|| format!("cannot write {}", log.display()))?;
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    Running::start(command, what)
}

fn read_in_background(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What arrived before an error is still worth showing.
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// The last `lines` lines of `text`.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// `text` with each line moved right by four columns.
pub fn indent(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_over_its_time_limit_is_killed_and_reported() {
        let error = capture(
            command("sleep").arg("60"),
            "the sleeper",
            Duration::from_millis(50),
        )
        .unwrap_err();
        assert!(error.to_string().contains("the sleeper did not end"), "{error}");
    }

    #[test]
    fn a_failure_carries_what_the_child_said() {
        let mut shell = command("sh");
        shell.args(["-c", "echo all is lost >&2; exit 3"]);
        let error = capture(&mut shell, "the shell", Duration::from_secs(10))
            .unwrap_err()
            .to_string();
        assert!(error.contains("all is lost") && error.contains('3'), "{error}");
    }

    #[test]
    fn output_larger_than_a_pipe_is_captured_whole() {
        let mut shell = command("sh");
        shell.args(["-c", "head -c 300000 /dev/zero"]);
        assert_eq!(
            capture(&mut shell, "head", Duration::from_secs(10))
                .unwrap()
                .len(),
            300_000
        );
    }

    #[test]
    fn tail_returns_the_last_lines_only() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a", 2), "a");
    }
}
