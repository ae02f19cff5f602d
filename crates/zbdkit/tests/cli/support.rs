//! Running `zbdkit` on images in a directory of its own.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

/// How a run ended.
#[derive(Debug)]
pub struct Run {
    pub status: Option<i32>,
    pub out: String,
    pub err: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Run {
        Run {
            status: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Run {
    /// It succeeded; what it printed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.status, Some(0), "{self:?}");
        self.out
    }

    /// It failed with that status, saying so in one line that contains `message`.
    #[track_caller]
    pub fn fails(&self, status: i32, message: &str) {
        assert_eq!(self.status, Some(status), "{self:?}");
        assert!(self.err.starts_with("zbdkit: "), "{self:?}");
        assert!(self.err.contains(message), "expected {message:?} in {self:?}");
    }
}

/// A directory with images, and the directory that commands run in.
pub struct Bench {
    dir: TempDir,
}

/// The drive of the demonstration.
pub const DEMO: [&str; 9] = [
    "disk.raw",
    "--size",
    "768M",
    "--zone-size",
    "64M",
    "--max-open",
    "6",
    "--max-active",
    "8",
];

impl Bench {
    pub fn new() -> Bench {
        Bench {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// With `disk.raw` made.
    pub fn with_demo() -> Bench {
        let bench = Bench::new();
        bench.run_with("create", &DEMO).ok();
        bench
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn directory(&self) -> &Path {
        self.dir.path()
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_zbdkit"));
        command
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .env_remove("RUST_LOG")
            .env_remove("NOTIFY_SOCKET")
            .env_remove("LISTEN_FDS");
        command
    }

    pub fn run(&self, args: &[&str]) -> Run {
        self.command().args(args).output().unwrap().into()
    }

    pub fn run_with(&self, verb: &str, args: &[&str]) -> Run {
        self.command().arg(verb).args(args).output().unwrap().into()
    }

    /// `zbdkit io disk.raw -c ... -c ...`
    pub fn io(&self, commands: &[&str]) -> Run {
        let mut command = self.command();
        command.args(["io", "disk.raw"]);
        commands.iter().for_each(|c| {
            command.args(["-c", c]);
        });
        command.output().unwrap().into()
    }

    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.run(args).ok()).unwrap()
    }

    /// An interactive `zbdkit io IMAGE`, which has the image once this returns.
    pub fn interactive(&self, image: &str) -> Interactive {
        self.interactive_with(&[], image)
    }

    pub fn interactive_with(&self, options: &[&str], image: &str) -> Interactive {
        let mut child = self
            .command()
            .arg("io")
            .args(options)
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut interactive = Interactive {
            stdin: child.stdin.take(),
            child,
        };
        interactive.answer();
        interactive
    }
}

/// A running `zbdkit io`; ends with its stdin.
pub struct Interactive {
    pub child: Child,
    stdin: Option<std::process::ChildStdin>,
}

const PROMPT: &str = "qemu-io> ";

impl Interactive {
    /// What is printed until the next prompt.
    fn answer(&mut self) -> String {
        let stdout = self.child.stdout.as_mut().unwrap();
        let mut text = Vec::new();
        let mut byte = [0];
        while !text.ends_with(PROMPT.as_bytes()) {
            if stdout.read(&mut byte).unwrap() == 0 {
                let mut err = String::new();
                let _ = self.child.stderr.as_mut().unwrap().read_to_string(&mut err);
                panic!("ended after {:?}: {err}", String::from_utf8_lossy(&text));
            }
            text.push(byte[0]);
        }
        text.truncate(text.len() - PROMPT.len());
        String::from_utf8(text).unwrap()
    }

    /// Runs a command; what it printed.
    pub fn command(&mut self, command: &str) -> String {
        writeln!(self.stdin.as_mut().unwrap(), "{command}").unwrap();
        self.answer()
    }

    /// Ends it; its exit status.
    pub fn finish(mut self) -> Option<i32> {
        drop(self.stdin.take());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Interactive {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
