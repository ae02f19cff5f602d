//! A guest: one boot of Linux that runs one script.
//!
//! The script and the guest share a directory with us (9p, `/share` in there). What the script
//! prints comes out of a port of its own, apart from the kernel's console; both are kept as files.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::proc::{self, Running};
use crate::rig::Rig;

/// Helpers that every script can use.
const LIBRARY: &str = include_str!("../guest/lib.sh");
/// The queue size that the drives' virtqueues are given.
const QUEUE_SIZE: u32 = 128;

/// A user may stay in a guest for long, but not for ever.
const INTERACTIVE_LIMIT: Duration = Duration::from_secs(30 * 24 * 3600);

/// A drive that a vhost-user-blk server serves.
#[derive(Debug, Clone)]
pub struct VhostUserDrive {
    /// The server's socket.
    pub socket: PathBuf,
    /// How many queues the guest uses, at least 1.
    pub queues: u32,
}

/// What a guest boots from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// QEMU loads the rig's kernel; the root is the rig's image.
    Kernel,
    /// The firmware looks for a boot loader on the disks among `qemu_args`.
    Disk,
}

/// A guest to be started.
#[derive(Debug, Clone)]
pub struct Guest<'rig> {
    rig: &'rig Rig,
    /// Names its logs: `RIG/logs/NAME/`.
    pub name: String,
    /// Its memory in MiB.
    pub memory: u32,
    /// Its processors.
    pub vcpus: u32,
    /// Its drives: the first is `/dev/vda`.
    pub drives: Vec<VhostUserDrive>,
    /// What it boots from.
    pub boot: Boot,
    /// Whether a reset boots it again; else QEMU ends.
    pub reboots: bool,
    /// More arguments for QEMU.
    pub qemu_args: Vec<String>,
    /// What it runs, with bash, as root. `lib.sh` stands before it.
    pub script: String,
    /// Variables for the script.
    pub variables: Vec<(String, String)>,
    /// The directory that it sees as `/share`; `None`: an empty one beside its logs.
    pub share: Option<PathBuf>,
    /// How long it may take, booting included.
    pub timeout: Duration,
    /// Whether the user sees the script's output as it comes.
    pub stream: bool,
}

/// How a guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The script ran to its end, with this exit status.
    Script(i32),
    /// The machine stopped before the script did.
    Died,
    /// We stopped it because it took too long, or because we wanted to.
    Killed,
}

/// What is left of a guest.
#[derive(Debug)]
pub struct GuestResult {
    /// How it ended.
    pub end: End,
    /// What the script printed.
    pub output: String,
    /// What the kernel printed.
    pub console: String,
    /// The directory with its logs.
    pub logs: PathBuf,
}

impl GuestResult {
    /// Fails unless the script ended with status 0; the error shows both outputs' ends and where the logs are.
    pub fn check(self) -> Result<GuestResult> {
        let why = match self.end {
            End::Script(0) => return Ok(self),
            End::Script(status) => format!("the guest's script failed with status {status}"),
            End::Died => "the guest stopped before its script ended".to_owned(),
            End::Killed => "the guest took too long and was stopped".to_owned(),
        };
        let qemu = std::fs::read_to_string(self.logs.join("qemu.log")).unwrap_or_default();
        let mut message = why;
        for (name, text, lines) in [
            ("output", &self.output, 25),
            ("console", &self.console, 15),
            ("QEMU", &qemu, 8),
        ] {
            if !text.trim().is_empty() {
                message += &format!(
                    "\n  the end of its {name}:\n{}",
                    proc::indent(&proc::tail(text, lines))
                );
            }
        }
        bail!("{}\n  logs: {}", message.trim_end(), self.logs.display())
    }
}

impl<'rig> Guest<'rig> {
    /// A guest of 1 GiB that runs `script` and may take five minutes.
    pub fn new(rig: &'rig Rig, name: &str, script: &str) -> Guest<'rig> {
        Guest {
            rig,
            name: name.to_owned(),
            memory: 1024,
            vcpus: std::thread::available_parallelism().map_or(1, |count| count.get().min(4)) as u32,
            drives: Vec::new(),
            boot: Boot::Kernel,
            reboots: false,
            qemu_args: Vec::new(),
            script: script.to_owned(),
            variables: Vec::new(),
            share: None,
            timeout: Duration::from_secs(300),
            stream: false,
        }
    }

    /// Sets the variable `name` for the script.
    pub fn variable(mut self, name: &str, value: impl ToString) -> Self {
        self.variables.push((name.to_owned(), value.to_string()));
        self
    }

    /// Lets the guest mount a directory of ours read-only, by 9p under that tag.
    pub fn share_read_only(&mut self, directory: &Path, tag: &str) {
        let path = escape(directory);
        self.qemu_args.extend([
            "-fsdev".to_owned(),
            format!("local,id={tag},security_model=none,readonly=on,path={path}"),
            "-device".to_owned(),
            format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
        ]);
    }

    /// Runs the guest to its end.
    pub fn run(self) -> Result<GuestResult> {
        self.start()?.finish()
    }

    /// Starts the guest and returns while it runs.
    pub fn start(self) -> Result<RunningGuest> {
        let (logs, share) = self.directories()?;
        let mut command = self.command(&share, "script");
        command.args([
            "-device",
            "virtio-serial-pci",
            "-chardev",
            "stdio,id=out,signal=off",
        ]);
        command.args(["-device", "virtserialport,chardev=out,name=zbdkit.out"]);
        command
            .arg("-serial")
            .arg(format!("file:{}", escape(&logs.join("console.log"))));
        std::fs::write(logs.join("command"), format!("{command:?}\n"))?;
        // An input that ends would close the port; this one stays open, and silent, as long as QEMU runs.
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(logs.join("qemu.log"))?);
        let deadline = Instant::now() + self.timeout;
        let mut qemu = Running::start(&mut command, "QEMU")?;
        let output = Arc::new(Output::default());
        let pipe = qemu.child().stdout.take().context("QEMU has no output")?;
        let keep = File::create(logs.join("output.log"))?;
        let reader = std::thread::spawn({
            let (output, stream) = (Arc::clone(&output), self.stream);
            move || output.fill(pipe, keep, stream)
        });
        Ok(RunningGuest {
            qemu,
            reader: Some(reader),
            output,
            logs,
            share,
            deadline,
        })
    }

    /// Gives the user a shell in the guest, on our own terminal, until they leave it.
    pub fn interactive(self) -> Result<()> {
        let (logs, share) = self.directories()?;
        let stdin = std::io::stdin();
        let mut command = self.command(&share, "shell");
        command.args(["-chardev", "stdio,id=tty,signal=off", "-serial", "chardev:tty"]);
        command.stderr(File::create(logs.join("qemu.log"))?);
        // QEMU changes the terminal and restores it, but not if it is killed.
        let saved = stdin
            .is_terminal()
            .then(|| rustix::termios::tcgetattr(&stdin))
            .transpose()?;
        let status =
            Running::start(&mut command, "QEMU").and_then(|mut qemu| qemu.wait_for(INTERACTIVE_LIMIT));
        if let Some(saved) = saved {
            rustix::termios::tcsetattr(&stdin, rustix::termios::OptionalActions::Now, &saved)?;
        }
        let status = status?.context("the guest did not end")?;
        let said = std::fs::read_to_string(logs.join("qemu.log")).unwrap_or_default();
        ensure!(
            status.success(),
            "QEMU failed ({status}):\n{}",
            proc::indent(&proc::tail(&said, 8))
        );
        Ok(())
    }

    fn directories(&self) -> Result<(PathBuf, PathBuf)> {
        let logs = self.rig.directory.join("logs").join(&self.name);
        if logs.exists() {
            std::fs::remove_dir_all(&logs).with_context(|| format!("cannot remove {}", logs.display()))?;
        }
        std::fs::create_dir_all(logs.join("share"))?;
        let share = self.share.clone().unwrap_or_else(|| logs.join("share"));
        let _ = std::fs::remove_file(share.join("status"));
        std::fs::write(share.join("script"), self.whole_script())?;
        Ok((logs, share))
    }

    fn whole_script(&self) -> String {
        let variables = self
            .variables
            .iter()
            .map(|(name, value)| format!("export {name}={}\n", quote(value)));
        format!("{}{LIBRARY}\n{}", variables.collect::<String>(), self.script)
    }

    fn command(&self, share: &Path, mode: &str) -> Command {
        let rig = self.rig;
        let mut command = rig.qemu.system();
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        if !self.reboots {
            command.arg("-no-reboot");
        }
        command.args(rig.accel.arguments());
        command.args([
            "-machine",
            "q35,memory-backend=mem",
            "-smp",
            &self.vcpus.to_string(),
        ]);
        let memory = self.memory;
        // vhost-user and vfio-user servers map the guest's memory.
        command
            .args(["-m", &format!("{memory}M"), "-object"])
            .arg(format!("memory-backend-memfd,id=mem,size={memory}M,share=on"));
        if self.boot == Boot::Kernel {
            command.arg("-kernel").arg(&rig.kernel.image);
            command.arg("-initrd").arg(&rig.initrd);
            command.args(["-append", &kernel_arguments(mode)]);
        }
        for (number, drive) in self.drives.iter().enumerate() {
            command.args([
                "-chardev",
                &format!("socket,id=drive{number},path={}", escape(&drive.socket)),
                "-device",
            ]);
            command.arg(format!(
                "vhost-user-test-device-pci,chardev=drive{number},virtio-id=2,config_size=96,num_vqs={},vq_size={QUEUE_SIZE},addr={:#x}",
                drive.queues,
                number + 4
            ));
        }
        if self.boot == Boot::Kernel {
            // The root comes after the drives on the bus, so that the first drive is /dev/vda.
            command.arg("-drive").arg(format!(
                "if=none,id=root,readonly=on,format=raw,file={}",
                escape(&rig.root_image)
            ));
            command.args([
                "-device",
                "virtio-blk-pci,drive=root,serial=zbdkit-root,addr=0x1c",
            ]);
        }
        command.arg("-fsdev").arg(format!(
            "local,id=share,security_model=none,path={}",
            escape(share)
        ));
        command.args([
            "-device",
            "virtio-9p-pci,fsdev=share,mount_tag=share,addr=0x1d",
            "-device",
            "virtio-rng-pci",
        ]);
        command.args(&self.qemu_args);
        command
    }
}

/// The kernel's command line; `mode` is for the initial root's script.
pub fn kernel_arguments(mode: &str) -> String {
    format!(
        "console=ttyS0 loglevel=4 panic=-1 mitigations=off nokaslr tsc=reliable nvme_core.multipath=N zbdkit.mode={mode}"
    )
}

/// What a script printed so far.
#[derive(Debug, Default)]
struct Output {
    text: Mutex<(String, bool)>,
    changed: Condvar,
}

impl Output {
    fn fill(&self, mut from: impl Read, mut keep: File, stream: bool) {
        let mut buffer = [0; 4096];
        loop {
            let count = from.read(&mut buffer).unwrap_or(0);
            let _ = keep.write_all(&buffer[..count]);
            if stream {
                let mut out = std::io::stdout().lock();
                let _ = out.write_all(&buffer[..count]).and_then(|()| out.flush());
            }
            let mut text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
            text.0.push_str(&String::from_utf8_lossy(&buffer[..count]));
            text.1 = count == 0;
            self.changed.notify_all();
            if count == 0 {
                return;
            }
        }
    }
}

/// A guest under way. Dropping it stops the machine.
#[derive(Debug)]
pub struct RunningGuest {
    qemu: Running,
    reader: Option<std::thread::JoinHandle<()>>,
    output: Arc<Output>,
    logs: PathBuf,
    share: PathBuf,
    deadline: Instant,
}

impl RunningGuest {
    /// Waits until the script has printed `word`.
    ///
    /// # Errors
    /// When it ends without having done so, or takes longer than the guest's time.
    pub fn wait_for_output(&self, word: &str) -> Result<()> {
        let mut text = self.output.text.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if text.0.contains(word) {
                return Ok(());
            }
            let left = self.deadline.saturating_duration_since(Instant::now());
            let shown = proc::indent(&proc::tail(&text.0, 15));
            ensure!(
                !text.1,
                "the guest ended without saying {word:?}:\n{shown}  logs: {}",
                self.logs.display()
            );
            ensure!(
                !left.is_zero(),
                "the guest did not say {word:?} in time:\n{shown}  logs: {}",
                self.logs.display()
            );
            text = self
                .output
                .changed
                .wait_timeout(text, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits for the guest's end, at most for its time.
    pub fn finish(mut self) -> Result<GuestResult> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let ended = self.qemu.wait_for(left)?.is_some();
        self.result(ended)
    }

    /// Stops the machine at once, as a power cut does.
    pub fn kill(self) -> Result<GuestResult> {
        self.result(false)
    }

    fn result(self, ended: bool) -> Result<GuestResult> {
        let RunningGuest {
            qemu,
            reader,
            output,
            logs,
            share,
            ..
        } = self;
        drop(qemu);
        if let Some(reader) = reader {
            let _ = reader.join();
        }
        let status = std::fs::read_to_string(share.join("status"))
            .ok()
            .and_then(|text| text.trim().parse().ok());
        let end = match status {
            Some(status) => End::Script(status),
            None if ended => End::Died,
            None => End::Killed,
        };
        let console = std::fs::read(logs.join("console.log")).unwrap_or_default();
        let output = std::mem::take(&mut output.text.lock().unwrap_or_else(PoisonError::into_inner).0);
        Ok(GuestResult {
            end,
            output,
            console: String::from_utf8_lossy(&console).into_owned(),
            logs,
        })
    }
}

/// A path as a value in one of QEMU's comma-separated options.
fn escape(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// `value` as one word of the shell.
fn quote(value: &str) -> String {
    format!("'{}'", value.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_reach_the_shell_unchanged() {
        let awkward = "it's $HOME `x` \"y\"\nz";
        let mut shell = proc::command("sh");
        shell.arg("-c").arg(format!("printf %s {}", quote(awkward)));
        let said = proc::capture(&mut shell, "sh", Duration::from_secs(10)).unwrap();
        assert_eq!(String::from_utf8(said).unwrap(), awkward);
    }

    #[test]
    fn commas_in_paths_do_not_end_an_option() {
        assert_eq!(escape(Path::new("/a,b")), "/a,,b");
    }

    #[test]
    fn a_failed_script_is_an_error_that_shows_its_output_and_names_the_logs() {
        let result = |end| GuestResult {
            end,
            output: "last words".into(),
            console: String::new(),
            logs: "/logs".into(),
        };
        assert!(result(End::Script(0)).check().is_ok());
        for end in [End::Script(1), End::Died, End::Killed] {
            let error = result(end).check().unwrap_err().to_string();
            assert!(error.contains("last words") && error.contains("/logs"), "{error}");
        }
    }
}
