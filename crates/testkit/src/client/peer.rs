//! qemu-storage-daemon as a server to compare with, and to develop the client against.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A running qemu-storage-daemon that exports one raw file over vhost-user-blk. Killed when dropped.
#[derive(Debug)]
pub struct QemuStorageDaemon {
    child: Child,
    socket: PathBuf,
}

impl QemuStorageDaemon {
    /// Name of the program.
    pub const PROGRAM: &str = "qemu-storage-daemon";

    /// Why it cannot be used here, if so.
    pub fn missing() -> Option<String> {
        let run = Command::new(Self::PROGRAM)
            .arg("--version")
            .stdout(Stdio::null())
            .status();
        match run {
            Ok(status) if status.success() => None,
            Ok(status) => Some(format!("{} --version: {status}", Self::PROGRAM)),
            Err(error) => Some(format!("{}: {error}", Self::PROGRAM)),
        }
    }

    /// Starts it on `file` (options of the file node, such as `aio=io_uring`, in `options`); the socket
    /// is made at `socket` some time later.
    ///
    /// # Errors
    /// If the process does not start.
    pub fn start(file: &Path, options: &str, socket: &Path, queues: u16) -> io::Result<Self> {
        let file = file.display();
        let comma = if options.is_empty() { "" } else { "," };
        let child = Command::new(Self::PROGRAM)
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=f,filename={file}{comma}{options}"))
            .args(["--blockdev", "driver=raw,node-name=r,file=f,discard=unmap", "--export"])
            .arg(format!(
                "type=vhost-user-blk,id=e,node-name=r,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
                socket.display()
            ))
            .stdin(Stdio::null())
            .spawn()?;
        Ok(QemuStorageDaemon {
            child,
            socket: socket.to_owned(),
        })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for QemuStorageDaemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
