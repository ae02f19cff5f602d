//! A drive behind vhost-user-blk: `zbdkit serve`, and a client in this process.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use zbdkit_block::Device;
use zbdkit_testkit::client::{Client, DoorNode, Options};

/// A running server. Dropping it ends it.
pub struct Server {
    child: Child,
    _directory: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves the drive and connects to it.
pub fn open(zbdkit: &Path, drive: &Path) -> Result<(Device, Server)> {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("z.sock");
    let mut serve = Command::new(zbdkit);
    serve.arg("serve").arg(drive).arg("--vhost-user-blk").arg(&socket);
    let mut child = serve
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", zbdkit.display()))?;
    let output = child.stdout.take().context("no output")?;
    let server = Server {
        child,
        _directory: directory,
    };
    let mut lines = BufReader::new(output).lines();
    let ready = lines.any(|line| line.is_ok_and(|line| line.contains("ready")));
    if !ready {
        bail!("zbdkit serve ended before it was ready");
    }
    // So that it never meets a full pipe.
    std::thread::spawn(move || lines.for_each(drop));
    let options = Options {
        max_data: 4 << 20,
        slots: 4,
        ..Options::default()
    };
    let client = Client::connect(&socket, &options)?;
    Ok((Device::new(Arc::new(DoorNode::new(client)?)), server))
}
