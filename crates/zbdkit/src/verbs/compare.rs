//! `zbdkit compare`: are two images the same?

use std::cell::RefCell;
use std::ffi::OsString;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use zbdkit_block::Device;
use zbdkit_block::tool::{self, CompareOptions, Compared, Difference};

use crate::image::{Session, graph_as, looking};
use crate::output::{Out, complain, describe, is_usage};
use crate::progress::{Progress, Show};

/// Compare the contents of two images, and their zones
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Compare {
    /// The first image: a path, driver=... options, or json:{...}
    #[arg(value_name = "IMAGE1")]
    pub a: OsString,

    /// The second image
    #[arg(value_name = "IMAGE2")]
    pub b: OsString,

    /// Format of the first image: raw or qcow2 [default: what it looks like]
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub a_format: Option<String>,

    /// Format of the second image
    #[arg(short = 'F', long, value_name = "FORMAT")]
    pub b_format: Option<String>,

    /// Take both as driver options whatever they look like
    #[arg(long)]
    pub image_opts: bool,

    /// The sizes, what has space in which image, and the zones' counters must be the same too
    #[arg(short, long)]
    pub strict: bool,

    /// Compare only the contents
    #[arg(long)]
    pub no_zones: bool,

    /// Look even while another process writes the images
    #[arg(short = 'U', long)]
    pub force_share: bool,

    /// Print how far it is, as qemu-img does
    #[arg(short, long)]
    pub progress: bool,

    /// Print nothing; the exit status tells
    #[arg(short, long)]
    pub quiet: bool,

    /// Print the result as JSON
    #[arg(long, conflicts_with_all = ["quiet", "progress"])]
    pub json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit compare disk.raw disk.qcow2
  zbdkit compare -s -f raw old.img -F qcow2 new.qcow2
  zbdkit compare --no-zones zoned.qcow2 copy.raw

What is compared:
  What a reader of the device finds, whatever lies above the zones' written
  ends; the bytes of offline zones too. Then the zones: model, sizes, limits,
  and of each zone its condition and written end. A zone that is open counts as
  closed, for so it is once nobody has the image. Of two images of different
  size, what the larger one has more must be zeros, and its zones empty.

Exit status:
  0  the same
  1  different
  2  the command line is wrong, or an image cannot be read

JSON:
  {identical, sizes_differ, difference: {kind, offset, zone, what, image1,
  image2}}; kind is size, status, content, zones or zone; absent things are
  null";

/// What `--json` says.
#[derive(Debug, Serialize)]
struct Report<'a> {
    identical: bool,
    sizes_differ: bool,
    difference: Option<Reported<'a>>,
}

#[derive(Debug, Default, Serialize)]
struct Reported<'a> {
    kind: &'static str,
    offset: Option<u64>,
    zone: Option<u32>,
    what: Option<&'static str>,
    image1: Option<&'a str>,
    image2: Option<&'a str>,
}

pub fn run(args: &Compare) -> anyhow::Result<ExitCode> {
    match compare(args) {
        Ok(compared) => {
            print(args, &compared)?;
            let same = compared.difference.is_none();
            Ok(ExitCode::from(if same { 0 } else { 1 }))
        }
        Err(error) if is_usage(&error) => Err(error),
        // 1 means that they differ.
        Err(error) => {
            complain(describe(&error));
            Ok(ExitCode::from(2))
        }
    }
}

fn compare(args: &Compare) -> anyhow::Result<Compared> {
    let a = graph_as(&args.a, args.image_opts, args.a_format.as_deref())?;
    let b = graph_as(&args.b, args.image_opts, args.b_format.as_deref())?;
    let session = Session::new()?;
    let options = looking(args.force_share);
    let show = Show::of(args.progress, args.quiet || args.json);
    session.with(&a, &options, async |a| {
        let b = b.open(session.host(), &options).await?;
        let progress = RefCell::new(Progress::new(show, "comparing"));
        let result = contents(args, a, &b, &progress).await;
        drop(progress);
        b.close().await?;
        result
    })
}

async fn contents(
    args: &Compare,
    a: &Device,
    b: &Device,
    progress: &RefCell<Progress>,
) -> anyhow::Result<Compared> {
    let options = CompareOptions {
        strict: args.strict,
        zones: !args.no_zones,
    };
    let show = |done, total| progress.borrow_mut().set(done, total);
    Ok(tool::compare(a, b, &options, &show).await?)
}

fn print(args: &Compare, compared: &Compared) -> anyhow::Result<()> {
    let mut out = Out::new();
    if args.json {
        out.json(&Report {
            identical: compared.difference.is_none(),
            sizes_differ: compared.sizes_differ,
            difference: compared.difference.as_ref().map(reported),
        })?;
    } else if !args.quiet {
        // As qemu-img, which finds out when it has come to the end of the smaller one.
        if compared.sizes_differ && compared.same_so_far {
            out.line("Warning: Image size mismatch!")?;
        }
        out.line(sentence(compared.difference.as_ref()))?;
    }
    out.flush()
}

/// qemu-img's words, and ours where it has none.
fn sentence(difference: Option<&Difference>) -> String {
    match difference {
        None => "Images are identical.".to_owned(),
        Some(Difference::Size) => "Strict mode: Image size mismatch!".to_owned(),
        Some(Difference::Status { offset }) => {
            format!("Strict mode: Offset {offset} block status mismatch!")
        }
        Some(Difference::Content { offset }) => format!("Content mismatch at offset {offset}!"),
        Some(Difference::Zones { what, a, b }) => {
            format!("Zones mismatch: {what}: {a} in the first image, {b} in the second!")
        }
        Some(Difference::Zone { zone, what, a, b }) => {
            format!("Zone mismatch at zone {zone}: {what}: {a} in the first image, {b} in the second!")
        }
    }
}

fn reported(difference: &Difference) -> Reported<'_> {
    match difference {
        Difference::Size => Reported {
            kind: "size",
            ..Reported::default()
        },
        Difference::Status { offset } => Reported {
            kind: "status",
            offset: Some(*offset),
            ..Reported::default()
        },
        Difference::Content { offset } => Reported {
            kind: "content",
            offset: Some(*offset),
            ..Reported::default()
        },
        Difference::Zones { what, a, b } => Reported {
            kind: "zones",
            what: Some(*what),
            image1: Some(a),
            image2: Some(b),
            ..Reported::default()
        },
        Difference::Zone { zone, what, a, b } => Reported {
            kind: "zone",
            zone: Some(*zone),
            what: Some(*what),
            image1: Some(a),
            image2: Some(b),
            ..Reported::default()
        },
    }
}
