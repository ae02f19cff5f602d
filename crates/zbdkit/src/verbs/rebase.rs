//! `zbdkit rebase`: another backing image for an overlay.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use zbdkit_block::tool;
use zbdkit_block::{Device, Graph, ImageFormat, OpenOptions};

use crate::image::{ImageArgs, Session, changing, graph_as, looking};
use crate::output::Usage;
use crate::progress::{Progress, Show};

/// Give an overlay another backing image; it reads as before
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Rebase {
    #[command(flatten)]
    pub image: ImageArgs,

    /// Format of the image: qcow2 [default: what it looks like]
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,

    /// The new backing image, named as IMAGE's directory sees it; "" for none
    #[arg(short, long, value_name = "BACKING")]
    pub backing: String,

    /// Format of the new backing image: qcow2 or raw; qemu-img's -B is the same
    #[arg(short = 'F', long, value_name = "FORMAT", visible_short_alias = 'B')]
    pub backing_format: Option<String>,

    /// Change the name only: the new image must hold the same as the old one, as after it was moved or converted
    #[arg(short = 'u', long)]
    pub backing_unsafe: bool,

    /// Print how far it is, as qemu-img does
    #[arg(short, long)]
    pub progress: bool,

    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit rebase -b new-base.qcow2 -F qcow2 overlay.qcow2
  zbdkit rebase -b '' overlay.qcow2
  zbdkit rebase -u -b moved/base.raw -F raw overlay.qcow2

What the overlay has not, and what the old and the new backing image have differently, is copied into the overlay; then \
its header names the new one. A crash leaves the overlay readable over the one or the other. The zones of a zoned \
overlay are its own and stay as they are. With -b '' everything that is needed is copied, and the image stands \
alone.

With -u only the header changes, and the old backing image need not be there. If the new one holds something else, the \
overlay is damaged.";

pub fn run(args: &Rebase) -> anyhow::Result<()> {
    let new = named(args)?;
    let graph = args.image.graph_as(args.format.as_deref())?;
    let path = graph.filename();
    let session = Session::new()?;
    let options = OpenOptions {
        no_backing: args.backing_unsafe,
        ..changing()
    };
    session.with(&graph, &options, async |overlay| {
        anyhow::ensure!(
            overlay.qcow2().is_some(),
            "{}: only a qcow2 image has a backing image",
            args.image.image.display()
        );
        let path = path.unwrap_or_else(|| PathBuf::from(&args.image.image));
        if let Some((name, format)) = &new {
            refuse_itself(&path, name)?;
            if !args.backing_unsafe {
                let new = open_new(&session, &path, name, *format).await?;
                let copied = copy(args, overlay, Some(&new)).await;
                new.close().await?;
                copied?;
            }
        } else if !args.backing_unsafe {
            copy(args, overlay, None).await?;
        }
        let named = new.as_ref().map(|(name, format)| (&**name, Some(format.name())));
        Ok(tool::set_backing(overlay, named).await?)
    })
}

/// The new backing image's name and format; `None` for none.
fn named(args: &Rebase) -> anyhow::Result<Option<(String, ImageFormat)>> {
    let name = &args.backing;
    match (name.is_empty(), args.backing_format.as_deref()) {
        (true, None) => Ok(None),
        (true, Some(_)) => Err(Usage("a format is given, but no backing image: leave out -F".into()).into()),
        (false, None) => Err(Usage(format!(
            "which format has the backing image {name}? Say -F qcow2 or -F raw; it is not guessed, because a guest could \
             make a raw image look like another format"
        ))
        .into()),
        (false, Some(format)) => match ImageFormat::of_name(format) {
            Some(format) => Ok(Some((name.clone(), format))),
            None => Err(Usage(format!("format {format:?} is not known; formats are raw, qcow2")).into()),
        },
    }
}

/// An image under itself could never be read. Longer ways round are found when the new image is opened.
fn refuse_itself(path: &Path, name: &str) -> anyhow::Result<()> {
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    let new = tool::backing_path(path, name)?;
    match (real(path), real(&new)) {
        (Some(image), Some(new)) if image == new => {
            Err(Usage("an image cannot be its own backing image".into()).into())
        }
        _ => Ok(()),
    }
}

async fn open_new(session: &Session, path: &Path, name: &str, format: ImageFormat) -> anyhow::Result<Device> {
    let new = tool::backing_path(path, name)?;
    let graph: Graph = graph_as(new.as_os_str(), false, Some(format.name()))?;
    graph
        .open(session.host(), &looking(false))
        .await
        .context("the new backing image")
}

async fn copy(args: &Rebase, overlay: &Device, new: Option<&Device>) -> anyhow::Result<()> {
    let progress = RefCell::new(Progress::new(Show::of(args.progress, args.quiet), "rebasing"));
    let show = |done, total| progress.borrow_mut().set(done, total);
    tool::rebase(overlay, new, &show).await?;
    Ok(())
}
