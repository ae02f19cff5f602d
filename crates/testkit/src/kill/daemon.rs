//! The daemon under test, as a process that can be killed.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// How to start it.
#[derive(Debug, Clone)]
pub struct Program {
    /// The zbdkit program.
    pub zbdkit: PathBuf,
    /// Where the socket and its messages go.
    pub dir: PathBuf,
    /// How the image is served: the arguments before the socket.
    pub served: Vec<OsString>,
    /// Further arguments.
    pub arguments: Vec<OsString>,
}

impl Program {
    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("kill.sock")
    }

    /// What the daemon says, of all its runs since the file was last emptied.
    pub fn messages(&self) -> PathBuf {
        self.dir.join("messages")
    }

    /// Empties the messages.
    pub fn forget_messages(&self) -> Result<()> {
        File::create(self.messages())?;
        Ok(())
    }

    /// Starts the daemon without waiting for it.
    pub fn start(&self) -> Result<Daemon> {
        let messages = File::options().create(true).append(true).open(self.messages())?;
        let mut child = Command::new(&self.zbdkit)
            .arg("serve")
            .args(&self.served)
            .arg(self.socket())
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(messages)
            .spawn()
            .with_context(|| format!("running {}", self.zbdkit.display()))?;
        let stdout = child.stdout.take().context("no stdout")?;
        Ok(Daemon::new(child, stdout))
    }

    /// Starts the daemon and waits until it is ready. Returns how long that took, too.
    pub fn start_ready(&self) -> Result<(Daemon, Duration)> {
        let start = Instant::now();
        let daemon = self.start()?;
        while !daemon.ready() {
            if let Some(status) = daemon.exited()? {
                bail!("zbdkit serve ended with {status}: {}", self.tail());
            }
            ensure!(
                start.elapsed() < Duration::from_secs(30),
                "zbdkit serve was not ready after 30 s: {}",
                self.tail()
            );
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok((daemon, start.elapsed()))
    }

    /// The last messages.
    pub fn tail(&self) -> String {
        let text = std::fs::read(self.messages()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }
}

/// A running daemon. Killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Mutex<Child>,
    pid: Option<Pid>,
    /// It was waited for: its number may belong to another process now.
    gone: AtomicBool,
    ready: Arc<AtomicBool>,
}

impl Daemon {
    fn new(child: Child, stdout: ChildStdout) -> Self {
        let ready = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&ready);
        // Reads to the end, so that the daemon never blocks on a full pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if line.to_lowercase().contains("ready") {
                    seen.store(true, Ordering::SeqCst);
                }
            }
        });
        Daemon {
            pid: i32::try_from(child.id()).ok().and_then(Pid::from_raw),
            child: Mutex::new(child),
            gone: AtomicBool::new(false),
            ready,
        }
    }

    /// Whether it has said that it is ready.
    pub fn ready(&self) -> bool {
        self.ready.load(Ordering::SeqCst)
    }

    fn child(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Sends a signal, unless it has been waited for.
    pub fn signal(&self, signal: Signal) {
        // Under the lock that waiting takes: the process exists, if only as a zombie.
        let _child = self.child();
        if let (Some(pid), false) = (self.pid, self.gone.load(Ordering::SeqCst)) {
            let _ = kill_process(pid, signal);
        }
    }

    /// How it ended, if it did.
    pub fn exited(&self) -> Result<Option<ExitStatus>> {
        let status = self.child().try_wait()?;
        if status.is_some() {
            self.gone.store(true, Ordering::SeqCst);
        }
        Ok(status)
    }

    /// Waits for its end.
    pub fn wait(&self, patience: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            ensure!(
                Instant::now() < deadline,
                "the daemon did not end within {patience:?}"
            );
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Kills it and waits for it.
    pub fn kill(&self) -> Result<ExitStatus> {
        self.signal(Signal::KILL);
        self.wait(Duration::from_secs(30))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Runs `zbdkit create`.
pub fn create(zbdkit: &Path, image: &Path, arguments: &[OsString]) -> Result<()> {
    let output = Command::new(zbdkit)
        .arg("create")
        .arg(image)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {}", zbdkit.display()))?;
    ensure!(
        output.status.success(),
        "zbdkit create: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
