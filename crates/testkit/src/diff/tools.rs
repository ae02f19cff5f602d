//! Finding and running QEMU's own image tools.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// The variable that says how to run QEMU's tools: the words of a command, one a line, in which `{}` stands for the
/// tool's name. `cargo xtask diff` sets it.
pub const VARIABLE: &str = "ZBDKIT_QEMU_TOOLS";
/// The first version that is compared with.
pub const OLDEST: (u32, u32) = (10, 2);
/// No tool works longer on one of our small images.
const LIMIT: Duration = Duration::from_secs(60);

/// How to run QEMU's tools.
#[derive(Debug, Clone)]
pub struct Tools {
    words: Vec<String>,
    modules: Option<PathBuf>,
    /// The version line of `qemu-img`.
    pub version: String,
}

/// How a tool ended, and what it said.
#[derive(Debug, Clone)]
pub struct Said {
    /// Its exit status.
    pub status: ExitStatus,
    /// Standard output and standard error, as they came.
    pub text: String,
    /// The command, to be pasted.
    pub command: String,
}

impl Said {
    /// Its exit code; a death by a signal is 255.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(255)
    }

    /// An error unless it succeeded.
    ///
    /// # Errors
    /// With what it said.
    pub fn success(self) -> Result<Self> {
        if !self.status.success() {
            bail!("{} failed ({}): {}", self.command, self.status, self.text.trim());
        }
        Ok(self)
    }
}

impl Tools {
    /// The tools that the environment names, those of the rig below Cargo's target directory, or those in PATH.
    ///
    /// # Errors
    /// Why there are none that will do.
    pub fn find() -> Result<Tools, String> {
        if let Ok(words) = std::env::var(VARIABLE) {
            let words = words.lines().map(str::to_owned).collect();
            return Tools::of(words, None).map_err(|why| format!("{VARIABLE}: {why}"));
        }
        if let Some(tools) =
            rig().and_then(|tree| Tools::of(through_loader(&tree), Some(modules(&tree))).ok())
        {
            return Ok(tools);
        }
        Tools::of(vec!["{}".to_owned()], None)
            .map_err(|why| format!("{why}; `cargo xtask diff` brings a QEMU of its own"))
    }

    /// One program, whatever the tool is called.
    pub fn at(path: &Path) -> Tools {
        Tools {
            words: vec![path.display().to_string()],
            modules: None,
            version: String::new(),
        }
    }

    fn of(words: Vec<String>, modules: Option<PathBuf>) -> Result<Tools, String> {
        let mut tools = Tools {
            words,
            modules,
            version: String::new(),
        };
        for tool in ["qemu-io", "qemu-img"] {
            let said = tools.run(tool, Path::new("."), ["--version"]);
            let said = said
                .and_then(Said::success)
                .map_err(|error| format!("no {tool}: {error:#}"))?;
            tools.version = said.text.lines().next().unwrap_or_default().to_owned();
        }
        if version(&tools.version).is_none_or(|version| version < OLDEST) {
            let (major, minor) = OLDEST;
            return Err(format!("{}: {major}.{minor} or later is needed", tools.version));
        }
        Ok(tools)
    }

    /// Runs a tool in `directory` to its end.
    ///
    /// # Errors
    /// When it cannot be started or does not end; its failure is in [`Said`].
    pub fn run<I: AsRef<str>>(
        &self,
        tool: &str,
        directory: &Path,
        arguments: impl IntoIterator<Item = I>,
    ) -> Result<Said> {
        let mut words = self.words.iter().map(|word| word.replace("{}", tool));
        let mut command = Command::new(words.next().context("no command")?);
        command.args(words).current_dir(directory);
        let mut shown = tool.to_owned();
        for argument in arguments {
            let argument = argument.as_ref();
            command.arg(argument);
            shown.push(' ');
            shown.push_str(&quoted(argument));
        }
        if let Some(modules) = &self.modules {
            command.env("QEMU_MODULE_DIR", modules);
        }
        let (status, text) = finish(command).with_context(|| shown.clone())?;
        Ok(Said {
            status,
            text,
            command: shown,
        })
    }
}

/// Runs a command with its output in a file; so no pipe can fill up, and one wait is enough.
fn finish(mut command: Command) -> Result<(ExitStatus, String)> {
    let mut output = File::from(rustix::fs::memfd_create(
        "output",
        rustix::fs::MemfdFlags::CLOEXEC,
    )?);
    command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output.try_clone()?);
    let mut child = command.spawn().context("it does not start")?;
    let deadline = Instant::now() + LIMIT;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pidfd = pidfd_open(pid.context("no process id")?, PidfdFlags::empty())?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let _ = child.kill();
            let _ = child.wait();
            bail!("it did not end within {} s", LIMIT.as_secs());
        }
        let left = Timespec::try_from(left).context("a time that does not fit")?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    let mut bytes = Vec::new();
    output.rewind()?;
    output.read_to_end(&mut bytes)?;
    Ok((status, String::from_utf8_lossy(&bytes).into_owned()))
}

/// The rig's unpacked QEMU, if the rig was made.
fn rig() -> Option<PathBuf> {
    let rig = match std::env::var_os("ZBDKIT_RIG_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => target()?.join("rig"),
    };
    let tree = std::path::absolute(rig.join("qemu")).ok()?;
    tree.join("usr/bin/qemu-img").is_file().then_some(tree)
}

fn target() -> Option<PathBuf> {
    if let Some(directory) = std::env::var_os("CARGO_TARGET_DIR") {
        return Some(directory.into());
    }
    Some(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .ancestors()
            .nth(2)?
            .join("target"),
    )
}

/// The tools of an unpacked tree run through its own dynamic linker.
fn through_loader(tree: &Path) -> Vec<String> {
    let inside = |path: &str| tree.join(path).display().to_string();
    vec![
        inside("usr/lib64/ld-linux-x86-64.so.2"),
        "--inhibit-cache".to_owned(),
        "--library-path".to_owned(),
        inside("usr/lib/x86_64-linux-gnu"),
        "--argv0".to_owned(),
        "{}".to_owned(),
        inside("usr/bin/{}"),
    ]
}

fn modules(tree: &Path) -> PathBuf {
    tree.join("usr/lib/x86_64-linux-gnu/qemu")
}

/// `11.1` of `qemu-img version 11.1.3 (Debian ...)`.
fn version(line: &str) -> Option<(u32, u32)> {
    let mut numbers = line
        .split("version ")
        .nth(1)?
        .split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// A word for a shell.
pub(super) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_the_version_line() {
        assert_eq!(
            version("qemu-img version 11.1.3 (Debian 1:11.1.3+ds-1)"),
            Some((11, 1))
        );
        assert_eq!(version("something else"), None);
    }

    #[test]
    fn a_command_can_be_pasted_into_a_shell() {
        assert_eq!(quoted("write -P 3 0 4k"), "'write -P 3 0 4k'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted("cluster_size=512"), "cluster_size=512");
    }
}
