//! `zbdkit commit`: writes what an overlay has into the image below it.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use zbdkit_block::{Device, Graph, OpenOptions, tool};
use zbdkit_qcow2::Preallocation;

use crate::image::{ImageArgs, Session, changing, graph_as, looking};
use crate::output::Out;
use crate::progress::{Progress, Show};

/// Write what an overlay has, and its zones, into its backing image
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Commit {
    #[command(flatten)]
    pub image: ImageArgs,

    /// Format of the image: qcow2 [default: what it looks like]
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,

    /// Write into this image of the chain, not into the next one; implies -d, and makes the images between useless
    #[arg(short, long, value_name = "IMAGE")]
    pub base: Option<PathBuf>,

    /// Leave the overlay as it is; otherwise it is emptied, as the backing image has everything then
    #[arg(short, long)]
    pub drop: bool,

    /// Print how far it is, as qemu-img does
    #[arg(short, long)]
    pub progress: bool,

    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit commit overlay.qcow2
  zbdkit commit -d overlay.qcow2 && rm overlay.qcow2
  zbdkit commit -b base.qcow2 top.qcow2

The backing image has the overlay's contents afterwards, and its zones: write pointers, conditions and counters. Other \
overlays of the same backing image are damaged by that.

A crash leaves the overlay whole, and commit can be run again; only when the backing image is durable is the overlay \
emptied. The backing image's zones never promise data that is not there.";

pub fn run(args: &Commit) -> anyhow::Result<()> {
    let graph = args.image.graph_as(args.format.as_deref())?;
    let session = Session::new()?;
    session.with(&graph, &alone(changing()), async |top| {
        let path = graph
            .filename()
            .unwrap_or_else(|| PathBuf::from(&args.image.image));
        let chain = Chain::of(&session, args, &path, top).await?;
        let committed = commit(args, &session, top, &chain).await;
        for image in chain.between {
            image.close().await?;
        }
        committed?;
        if !args.drop && args.base.is_none() {
            tool::empty(top).await?;
        }
        Ok(())
    })?;
    let mut out = Out::new();
    if !args.quiet {
        out.line("Image committed.")?;
    }
    out.flush()
}

/// Opened for itself: what is below is looked at image by image.
fn alone(options: OpenOptions) -> OpenOptions {
    OpenOptions {
        no_backing: true,
        ..options
    }
}

/// What lies below the top image, down to the one that is written.
struct Chain {
    between: Vec<Device>,
    base: PathBuf,
    graph: Graph,
}

impl Chain {
    async fn of(session: &Session, args: &Commit, path: &Path, top: &Device) -> anyhow::Result<Chain> {
        let mut between = Vec::new();
        let mut path = path.to_owned();
        loop {
            let image = between.last().unwrap_or(top);
            let Some((next, format)) = below(&path, image)? else {
                return Err(match &args.base {
                    Some(base) => anyhow::anyhow!(
                        "Did not find '{}' in the backing chain of '{}'",
                        base.display(),
                        args.image.image.display()
                    ),
                    None => anyhow::anyhow!("{}: Image does not have a backing file", path.display()),
                });
            };
            let graph = graph_as(next.as_os_str(), false, Some(&format))
                .with_context(|| format!("the backing image of {}", path.display()))?;
            if args.base.as_ref().is_none_or(|base| is_same(base, &next)) {
                return Ok(Chain {
                    between,
                    base: next,
                    graph,
                });
            }
            anyhow::ensure!(between.len() < 200, "the chain of {} has no end", path.display());
            between.push(graph.open(session.host(), &alone(looking(false))).await?);
            path = next;
        }
    }
}

/// The backing image of an image, and its format.
fn below(path: &Path, image: &Device) -> anyhow::Result<Option<(PathBuf, String)>> {
    let Some(backing) = image.backing() else {
        return Ok(None);
    };
    let next = tool::backing_path(path, &backing.name)?;
    let format = backing.format.clone().with_context(|| {
        format!(
            "{} does not say what format its backing image has; say it once: zbdkit rebase -u -b {} -F FORMAT {}",
            path.display(),
            backing.name,
            path.display()
        )
    })?;
    Ok(Some((next, format)))
}

fn is_same(a: &Path, b: &Path) -> bool {
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    real(a) == real(b)
}

async fn commit(args: &Commit, session: &Session, top: &Device, chain: &Chain) -> anyhow::Result<()> {
    let base = open_base(session, chain, top.limits().size).await?;
    let result = write(args, top, chain, &base).await;
    // Durable before the overlay loses what it has.
    let closed = base.close().await;
    result?;
    closed.with_context(|| format!("closing {}", chain.base.display()))
}

/// The base, made as large as the top image if it is smaller: there it showed as zeros.
async fn open_base(session: &Session, chain: &Chain, size: u64) -> anyhow::Result<Device> {
    let base = chain.graph.open(session.host(), &changing()).await?;
    if base.limits().size >= size {
        return Ok(base);
    }
    let grown = grow(&base, &chain.base, size).await;
    base.close().await?;
    grown.with_context(|| format!("{} is to become as large as the image", chain.base.display()))?;
    Ok(chain.graph.open(session.host(), &changing()).await?)
}

async fn grow(base: &Device, path: &Path, size: u64) -> anyhow::Result<()> {
    if base.qcow2().is_none() && base.engine().is_none() {
        let file = std::fs::File::options().write(true).open(path)?;
        file.set_len(size)?;
        return Ok(file.sync_all()?);
    }
    Ok(base.resize(size, false, Preallocation::Off).await?)
}

async fn write(args: &Commit, top: &Device, chain: &Chain, base: &Device) -> anyhow::Result<()> {
    let progress = RefCell::new(Progress::new(Show::of(args.progress, args.quiet), "committing"));
    let show = |done, total| progress.borrow_mut().set(done, total);
    let layers: Vec<&Device> = std::iter::once(top).chain(&chain.between).collect();
    Ok(tool::commit(&layers, base, &show).await?)
}
