//! Starting the servers that are compared.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::workload::Geometry;

/// `zbdkit serve` on a fresh image. Ended by SIGTERM when dropped.
pub struct Zbdkit {
    child: Child,
    pub socket: PathBuf,
    pub image: PathBuf,
}

impl Zbdkit {
    /// Creates an image in `dir`, serves it, and waits for the line that says that it is ready.
    pub fn start(program: &Path, dir: &Path, geometry: Geometry, extra: &[String]) -> Result<Self> {
        let (image, socket) = (dir.join("zbdkit.raw"), dir.join("zbdkit.sock"));
        let created = Command::new(program)
            .arg("create")
            .arg(&image)
            .args([
                "--size",
                &geometry.size.to_string(),
                "--zone-size",
                &geometry.zone_size.to_string(),
            ])
            .stdout(Stdio::null())
            .status()
            .with_context(|| format!("running {}", program.display()))?;
        ensure!(created.success(), "zbdkit create: {created}");
        let mut child = Command::new(program)
            .arg("serve")
            .arg(&image)
            .arg("--vhost-user-blk")
            .arg(&socket)
            .args(extra)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().context("no stdout")?;
        let server = Zbdkit { child, socket, image };
        let (sender, ready) = mpsc::channel();
        // Reads to the end, so that the server never blocks on a full pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if line.to_lowercase().contains("ready") {
                    let _ = sender.send(());
                }
            }
        });
        match ready.recv_timeout(Duration::from_secs(10)) {
            Ok(()) => Ok(server),
            Err(_) => bail!("zbdkit serve did not say that it is ready"),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether the image has (almost) no blocks allocated: resets free them.
    pub fn is_sparse(&self, geometry: Geometry) -> Result<bool> {
        Ok(File::open(&self.image)?.metadata()?.blocks() * 512 < geometry.size / 16)
    }
}

impl Drop for Zbdkit {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id())
            && let Some(pid) = rustix::process::Pid::from_raw(pid)
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.child.wait();
    }
}
