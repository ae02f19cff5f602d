//! `zbdkit convert`: copies an image into a new one, of another format if asked.

mod target;

use std::cell::RefCell;
use std::ffi::OsString;
use std::path::Path;

use anyhow::Context;
use clap::Args;
use zbdkit_block::tool::{self, CopiedZones, CopyOptions, TargetHolds};
use zbdkit_block::{Device, OpenOptions};

use crate::args;
use crate::image::{Session, changing, graph_as, graph_of, looking};
use crate::output::{Out, Usage, complain};
use crate::progress::{Progress, Show};
use crate::verbs::create::options::{self, Format};
use target::{Source, Target};

/// Copy an image, with its zones, into a new one of any format
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Convert {
    /// The image to copy: a path, driver=... options, or json:{...}
    #[arg(value_name = "SOURCE")]
    pub source: OsString,

    /// The file to make; what is there is replaced, if nobody uses it
    #[arg(value_name = "TARGET")]
    pub target: OsString,

    /// Format of the source: raw or qcow2 [default: what it looks like]
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub source_format: Option<String>,

    /// Format of the target: raw or qcow2 [default: qcow2 where TARGET ends in .qcow2, else raw]
    #[arg(short = 'O', long, value_name = "FORMAT")]
    pub target_format: Option<String>,

    /// Options of the target by QEMU's names, as in 'create -o'; several with commas ('-o help' lists them)
    #[arg(short = 'o', long = "options", value_name = "OPTIONS")]
    pub options: Vec<String>,

    /// Take SOURCE as driver options whatever it looks like
    #[arg(long)]
    pub image_opts: bool,

    /// Take TARGET as driver options whatever it looks like; it is written into as it is
    #[arg(long, requires = "no_create")]
    pub target_image_opts: bool,

    /// Write into a target that is there, over what it has and over its zones
    #[arg(short, long)]
    pub no_create: bool,

    /// With -n: the target reads as zeros already
    #[arg(long, requires = "no_create")]
    pub target_is_zero: bool,

    /// Compress the data (qcow2)
    #[arg(short, long)]
    pub compress: bool,

    /// Make the target an overlay of this image: only what differs from it is copied (qcow2)
    #[arg(short = 'b', long, visible_short_alias = 'B', value_name = "IMAGE")]
    pub backing: Option<String>,

    /// Format of the backing image: qcow2 or raw
    #[arg(short = 'F', long, value_name = "FORMAT")]
    pub backing_format: Option<String>,

    /// Copy an internal snapshot of the source, by its id or its name
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,

    /// Leave out so many bytes of zeros in a row; 0 leaves out nothing: the target takes its full space
    #[arg(short = 'S', long, value_name = "BYTES", value_parser = args::bytes, default_value = "4k")]
    pub sparse_size: u64,

    /// Work on so many parts at a time, 1 to 16
    #[arg(short = 'm', long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16), default_value = "8")]
    pub parallel: u8,

    /// Write the parts in any order, which may be faster
    #[arg(short = 'W', long)]
    pub oob_writes: bool,

    /// Copy even while another process writes the source; what is copied may be torn
    #[arg(short = 'U', long)]
    pub force_share: bool,

    /// Print how far it is, as qemu-img does
    #[arg(short, long)]
    pub progress: bool,

    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit convert disk.raw disk.qcow2
  zbdkit convert -c -o compression_type=zstd disk.qcow2 archive.qcow2
  zbdkit convert -O raw -o zone.mode=none disk.qcow2 flat.img
  zbdkit convert -o zone.size=64M,zone.max_open_zones=14 plain.img zoned.qcow2
  zbdkit convert -b base.qcow2 -F qcow2 full.qcow2 overlay.qcow2

The target is durable when the command returns, and is removed if it fails. Zeros are not copied, nor is what lies above \
the zones' written ends.

Zones:
  A target has the source's zones: model, sizes, limits, and of each zone its
  write pointer, condition (open ones are closed) and counters; read-only and
  offline zones with their data. Options change the model and the limits, not
  the size, the capacity and the number of conventional zones.
  To an image without zones (-o zone.mode=none) only the contents go.
  From an image without zones to one with (any zone option): the data stays
  where it is. Conventional zones take it as it is; a sequential zone with data
  is written from its start to the end of its last data, and stays partly
  written if max_active_zones allows so many, else all such zones are finished.
  Data above a zone's capacity is an error.

Compatibility:
  -O: qemu-img makes a raw image unless told otherwise, also as NAME.qcow2.
  -b: an image that is not the source's own backing image is compared with the
  source, where qemu-img takes for granted that it is the same.";

pub fn run(args: &Convert) -> anyhow::Result<()> {
    let format = target::format(args)?;
    if options::asks_for_help(&args.options) {
        let mut out = Out::new();
        options::print_help(&mut out, format)?;
        return out.flush();
    }
    check(args, format)?;
    let graph = graph_as(&args.source, args.image_opts, args.source_format.as_deref())?;
    let session = Session::new()?;
    let options = OpenOptions {
        snapshot: args.snapshot.clone(),
        ..looking(args.force_share)
    };
    session.with(&graph, &options, async |source| {
        target::refuse_same_file(args, &graph)?;
        if args.no_create || is_graph(&args.target) {
            into_existing(args, &session, source).await
        } else {
            let source = Source {
                device: source,
                path: graph.filename(),
            };
            into_new(args, &session, &source, format).await
        }
    })
}

/// Whether a target is described rather than named; what is described is there already.
fn is_graph(target: &std::ffi::OsStr) -> bool {
    let text = target.as_encoded_bytes();
    [&b"driver="[..], b"json:", b"{"]
        .iter()
        .any(|start| text.starts_with(start))
}

/// What clap cannot know.
fn check(args: &Convert, format: Format) -> anyhow::Result<()> {
    let usage = |text: &str| Err(Usage(text.to_owned()).into());
    let exists = args.no_create || is_graph(&args.target);
    if !args.sparse_size.is_multiple_of(512) || args.sparse_size > 16 << 20 {
        return usage(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to 16777216. Select 0 \
             to disable sparse detection (fully allocates output).",
        );
    }
    if args.compress && !exists && format != Format::Qcow2 {
        return usage("Compression not supported for this file format: say -O qcow2");
    }
    if args.backing.is_some() && !exists && format != Format::Qcow2 {
        return usage("Backing file not supported for file format 'raw': say -O qcow2");
    }
    if args.compress && exists {
        return usage("-c writes new images only: leave out -n");
    }
    if exists && !args.options.is_empty() {
        return usage("-o describes a new image: it means nothing for one that is there");
    }
    if exists && args.backing.is_some() {
        return usage("-b describes a new image: it means nothing for one that is there");
    }
    Ok(())
}

fn copy_options(args: &Convert, target: TargetHolds) -> CopyOptions {
    CopyOptions {
        sparse: args.sparse_size as usize,
        compress: args.compress,
        target,
        workers: args.parallel.into(),
        in_order: !args.oob_writes,
    }
}

async fn into_existing(args: &Convert, session: &Session, source: &Device) -> anyhow::Result<()> {
    let graph = if is_graph(&args.target) || args.target_image_opts {
        graph_of(&args.target, args.target_image_opts)?
    } else {
        graph_as(&args.target, false, args.target_format.as_deref())?
    };
    let device = graph.open(session.host(), &changing()).await?;
    let holds = if args.target_is_zero {
        TargetHolds::Zeros
    } else {
        TargetHolds::Anything
    };
    let result = copy(args, source, &device, holds, false).await;
    finish(device, result).await
}

async fn into_new(
    args: &Convert,
    session: &Session,
    source: &Source<'_>,
    format: Format,
) -> anyhow::Result<()> {
    let target = Target::plan(args, format, session, source).await?;
    target.create(session).await?;
    let result = fill(args, session, source.device, &target).await;
    if result.is_err() {
        target.remove(session);
    }
    result
}

async fn fill(args: &Convert, session: &Session, source: &Device, target: &Target) -> anyhow::Result<()> {
    let device = target.graph()?.open(session.host(), &changing()).await?;
    let result = copy(args, source, &device, target.holds(), target.drops_zones()).await;
    finish(device, result).await
}

async fn finish(device: Device, result: anyhow::Result<()>) -> anyhow::Result<()> {
    let closed = device.close().await;
    result?;
    closed.context("closing the target")
}

async fn copy(
    args: &Convert,
    source: &Device,
    target: &Device,
    holds: TargetHolds,
    drop_zones: bool,
) -> anyhow::Result<()> {
    if source.limits().zoned.is_some() && target.limits().zoned.is_none() && !drop_zones {
        return Err(Usage(format!(
            "{} has no zones, but the source has: to copy only the contents, say -o zone.mode=none and leave out -n",
            Path::new(&args.target).display()
        ))
        .into());
    }
    let progress = RefCell::new(Progress::new(Show::of(args.progress, args.quiet), "converting"));
    let show = |done, total| progress.borrow_mut().set(done, total);
    let zones = tool::copy(source, target, &copy_options(args, holds), &show).await?;
    drop(progress);
    if let CopiedZones::Filled { written, finished } = zones
        && !args.quiet
        && finished > 0
    {
        complain(format_args!(
            "note: {finished} of {written} zones with data were finished: more would be partly written than may be active"
        ));
    }
    Ok(())
}
