//! How the verbs name and open an image.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use zbdkit_block::{Device, Graph, Host, OpenOptions, OsHost, RunStateMode, default_sidecar, did_you_mean};
use zbdkit_io::{Runtime, RuntimeOptions};
use zbdkit_zone::Geometry;

use crate::output::Usage;

/// The image argument.
#[derive(Clone, Debug, Args)]
pub struct ImageArgs {
    /// The image: a path, driver=... options, or json:{...} (see 'zbdkit help')
    #[arg(value_name = "IMAGE")]
    pub image: OsString,

    /// Take IMAGE as driver options whatever it looks like (as qemu-io does)
    #[arg(long)]
    pub image_opts: bool,
}

impl ImageArgs {
    /// The graph that IMAGE describes.
    pub fn graph(&self) -> anyhow::Result<Graph> {
        graph_of(&self.image, self.image_opts)
    }

    /// The same, of a format that the user may have said with `-f`.
    pub fn graph_as(&self, format: Option<&str>) -> anyhow::Result<Graph> {
        graph_as(&self.image, self.image_opts, format)
    }
}

/// The graph that a name describes.
pub fn graph_of(image: &OsStr, image_opts: bool) -> anyhow::Result<Graph> {
    let graph = match (image.to_str(), image_opts) {
        (Some(text), true) => Graph::parse_options(text),
        (Some(text), false) => Graph::parse(text),
        (None, _) => Ok(Graph::from_path(image)),
    };
    graph.with_context(|| format!("{}", image.display()))
}

/// The graph that a name describes, of a format that the user may have said.
pub fn graph_as(image: &OsStr, image_opts: bool, format: Option<&str>) -> anyhow::Result<Graph> {
    match format {
        None => graph_of(image, image_opts),
        Some(_) if image_opts => Err(Usage(
            "a format is said with --image-opts already: write driver=FORMAT,... there".into(),
        )
        .into()),
        Some("raw") => raw_graph(Path::new(image)),
        Some("qcow2") => {
            let filename = image
                .to_str()
                .context("a path that is not UTF-8 cannot be opened with -f qcow2")?;
            let json = serde_json::json!({
                "driver": "qcow2",
                "file": { "driver": "file", "filename": filename },
            });
            Ok(Graph::parse_json(&json.to_string())?)
        }
        Some(other) => Err(Usage(format!(
            "format {other:?} is not known{}; formats are raw, qcow2",
            did_you_mean(other, &["raw", "qcow2"])
        ))
        .into()),
    }
}

/// This thread's runtime and the machine below.
pub struct Session {
    runtime: Runtime,
    host: Arc<dyn Host>,
}

impl Session {
    pub fn new() -> anyhow::Result<Session> {
        let options = RuntimeOptions {
            busy_poll: Duration::ZERO,
            ..RuntimeOptions::default()
        };
        Ok(Session {
            runtime: Runtime::new(options).context("cannot start I/O")?,
            host: Arc::new(OsHost),
        })
    }

    pub fn host(&self) -> &Arc<dyn Host> {
        &self.host
    }

    pub fn run<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// Opens a graph. The error names the file already.
    pub fn open(&self, graph: &Graph, options: &OpenOptions) -> anyhow::Result<Device> {
        Ok(self.run(graph.open(&self.host, options))?)
    }

    /// Opens an image, lets `work` do its work, and closes the image whatever came of it.
    pub fn with<T>(
        &self,
        graph: &Graph,
        options: &OpenOptions,
        work: impl AsyncFnOnce(&Device) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let device = self.open(graph, options)?;
        self.run(async {
            let result = work(&device).await;
            let closed = device.close().await;
            let result = result?;
            closed.context("closing the image")?;
            Ok(result)
        })
    }
}

/// Options for looking at an image.
pub fn looking(force_share: bool) -> OpenOptions {
    OpenOptions {
        read_only: true,
        force_share,
        ..OpenOptions::default()
    }
}

/// Options for a tool that changes an image and is soon gone: it needs no run state beside the image.
pub fn changing() -> OpenOptions {
    OpenOptions {
        run_state: RunStateMode::Sync,
        ..OpenOptions::default()
    }
}

/// The zones of a device, or an error that says that it has none.
pub fn zones_of(device: &Device) -> anyhow::Result<Geometry> {
    device
        .limits()
        .zoned
        .context("the image has no zones (make one that has with 'zbdkit create')")
}

/// The graph of a path whose format the user named: zones where there is a zone table or a drive has them, else a plain
/// disk.
pub fn raw_graph(path: &Path) -> anyhow::Result<Graph> {
    if default_sidecar(path).exists() || is_block_device(path) {
        return Ok(Graph::from_path(path));
    }
    let filename = path
        .to_str()
        .context("a path that is not UTF-8 cannot be opened with -f raw")?;
    let json = serde_json::json!({
        "driver": "raw",
        "file": { "driver": "file", "filename": filename },
    });
    Ok(Graph::parse_json(&json.to_string())?)
}

fn is_block_device(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|file| file.file_type().is_block_device())
}

/// A path for a shell.
pub fn shell_quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:,@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.into_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A path that holds wherever the reader stands.
pub fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_can_be_pasted_into_a_shell() {
        assert_eq!(shell_quoted(Path::new("/tmp/a-b.raw")), "/tmp/a-b.raw");
        assert_eq!(shell_quoted(Path::new("my disk's")), r"'my disk'\''s'");
    }
}
