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

/// An image's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2,
}

impl Format {
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// `zbdkit serve` on a fresh image. Ended by SIGTERM when dropped.
pub struct Zbdkit {
    child: Child,
    pub socket: PathBuf,
    pub image: PathBuf,
}

impl Zbdkit {
    /// Creates an image in `dir`, serves it, and waits for the line that says that it is ready.
    pub fn start(
        program: &Path,
        dir: &Path,
        format: Format,
        geometry: Geometry,
        extra: &[String],
    ) -> Result<Self> {
        let image = dir.join("zbdkit").with_extension(format.name());
        let socket = dir.join(format!("zbdkit-{}.sock", format.name()));
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

/// A qemu-storage-daemon that serves a fresh qcow2 image of its own. Killed when dropped.
pub struct Qcow2Peer {
    child: Child,
    pub socket: PathBuf,
    pub image: PathBuf,
}

impl Qcow2Peer {
    /// Makes an image with `image_tool` (qemu-img) in `dir`; `aio` is the file node's.
    pub fn start(
        daemon: &Path,
        image_tool: &Path,
        dir: &Path,
        aio: &str,
        geometry: Geometry,
        queues: u16,
    ) -> Result<Self> {
        let image = dir.join(format!("peer-{aio}.qcow2"));
        let socket = dir.join(format!("peer-{aio}-qcow2.sock"));
        // The name of an ended daemon's socket would look like one that is ready.
        let _ = std::fs::remove_file(&socket);
        let created = Command::new(image_tool)
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&image)
            .arg(geometry.size.to_string())
            .status()
            .with_context(|| format!("running {}", image_tool.display()))?;
        ensure!(created.success(), "qemu-img create: {created}");
        let child = Command::new(daemon)
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=f,filename={},cache.direct=off,aio={aio}",
                image.display()
            ))
            .args(["--blockdev", "driver=qcow2,node-name=q,file=f,discard=unmap", "--export"])
            .arg(format!(
                "type=vhost-user-blk,id=e,node-name=q,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
                socket.display()
            ))
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("running {}", daemon.display()))?;
        Ok(Qcow2Peer { child, socket, image })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Qcow2Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
