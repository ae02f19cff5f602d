//! QEMU's tools, as the rig unpacked them (`cargo xtask` fetches them), run through their own loader.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(120);

/// The tools of one tree.
pub struct Qemu {
    root: PathBuf,
}

/// What a tool did.
pub struct Output {
    /// Its exit status, `None` for a signal.
    pub code: Option<i32>,
    /// Standard output, then standard error.
    pub text: String,
    /// Standard output.
    pub stdout: String,
}

impl Qemu {
    /// The rig's tools; where there are none, says that the test is skipped.
    pub fn find() -> Option<Qemu> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/rig/qemu");
        let root = root.canonicalize().unwrap_or(root);
        if root.join("usr/bin/qemu-img").is_file() {
            return Some(Qemu { root });
        }
        eprintln!(
            "SKIPPED: needs qemu-img in {} (`cargo xtask guest` puts it there)",
            root.display()
        );
        None
    }

    /// Runs `qemu-img`.
    pub fn try_img(&self, args: &[&str]) -> Output {
        self.run("qemu-img", args)
    }

    /// Runs `qemu-img`, which must succeed, and gives its standard output.
    pub fn img(&self, args: &[&str]) -> String {
        let output = self.try_img(args);
        assert_eq!(output.code, Some(0), "qemu-img {args:?}: {}", output.text);
        output.stdout
    }

    /// Runs commands in `qemu-io`; each must succeed.
    pub fn io(&self, image: &Path, commands: &[String]) {
        let mut args = vec!["-f", "qcow2", "--discard", "unmap"];
        args.extend(commands.iter().flat_map(|command| ["-c", command]));
        args.push(image.to_str().unwrap());
        let output = self.run("qemu-io", &args);
        // Its status is 0 also where a command failed.
        let failed = output.text.contains("failed") || output.text.contains("rror");
        assert!(
            output.code == Some(0) && !failed,
            "qemu-io {args:?}: {}",
            output.text
        );
    }

    /// The image must have neither errors nor leaks.
    pub fn check(&self, image: &Path) {
        let output = self.try_img(&["check", "-f", "qcow2", image.to_str().unwrap()]);
        assert_eq!(output.code, Some(0), "{}: {}", image.display(), output.text);
        assert!(output.text.contains("No errors were found"), "{}", output.text);
    }

    /// The contents of the image, or of one of its snapshots.
    pub fn contents(&self, image: &Path, snapshot: Option<&str>) -> Vec<u8> {
        let raw = image.with_extension("contents");
        let id = snapshot.map(|id| format!("snapshot.id={id}"));
        let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
        args.extend(id.iter().flat_map(|id| ["-l", id]));
        args.extend([image.to_str().unwrap(), raw.to_str().unwrap()]);
        self.img(&args);
        let contents = std::fs::read(&raw).unwrap();
        std::fs::remove_file(raw).unwrap();
        contents
    }

    fn run(&self, tool: &str, args: &[&str]) -> Output {
        let mut command = Command::new(self.root.join("usr/lib64/ld-linux-x86-64.so.2"));
        command
            .arg("--inhibit-cache")
            .arg("--library-path")
            .arg(self.root.join("usr/lib/x86_64-linux-gnu"))
            .args(["--argv0", tool])
            .arg(self.root.join("usr/bin").join(tool))
            .args(args)
            .env("QEMU_MODULE_DIR", self.root.join("usr/lib/x86_64-linux-gnu/qemu"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdout = read_all(child.stdout.take());
        let stderr = read_all(child.stderr.take());
        let code = wait(&mut child, || format!("{tool} {args:?}"));
        let stdout = stdout.join().unwrap();
        Output {
            code,
            text: format!("{stdout}{}", stderr.join().unwrap()),
            stdout,
        }
    }
}

fn wait(child: &mut Child, what: impl Fn() -> String) -> Option<i32> {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{} did not end within {} s", what(), LIMIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn read_all(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.unwrap().read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
