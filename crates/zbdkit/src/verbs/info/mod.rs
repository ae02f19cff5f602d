//! `zbdkit info`: what an image is.

mod chain;
mod qcow2;
pub mod snapshots;

use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use clap::Args;
use zbdkit_block::{Device, Graph, ImageFormat, format_size};
use zbdkit_zone::{Filter, Geometry, Model};

use crate::args::OutputArg;
use crate::image::{ImageArgs, Session, looking};
use crate::output::Out;
use crate::shapes::{Conditions, ImageInfo, Table, Zoned};

/// Show what an image is: geometry, limits, how many zones are in which condition
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Info {
    #[command(flatten)]
    pub image: ImageArgs,

    /// Take the image for this format instead of finding out
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,

    /// Show the images below a qcow2 image too
    #[arg(long)]
    pub backing_chain: bool,

    /// Look even while another process writes the image; what is shown may be a moment old
    #[arg(short = 'U', long)]
    pub force_share: bool,

    /// How to print it
    #[arg(long, value_name = "FORM", default_value = "human")]
    pub output: OutputArg,

    /// The same as --output json
    #[arg(long)]
    pub json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit info disk.qcow2
  zbdkit info --backing-chain --json overlay.qcow2
  zbdkit info -U --json disk.raw | jq .conditions

Looking takes QEMU's read locks and changes nothing, so damage that is reported as made good is still there until the \
image is next opened for writing.

JSON of a qcow2 image:
  As qemu-img prints it: {filename, format, virtual-size, actual-size,
  cluster-size, dirty-flag, backing-filename, full-backing-filename,
  backing-filename-format, snapshots, children, format-specific: {type, data:
  {compat, compression-type, lazy-refcounts, refcount-bits, corrupt,
  extended-l2, data-file, zoned: {mode, nr-zones, zone-size, zone-capacity,
  conventional-zones, max-active-zones, max-open-zones}}}}; ours are in zoned
  {max-append-bytes, zrwa: {size, granularity, max, explicit-commit},
  descr-ext-size, block-size, conditions: {CONDITION: COUNT, ...}, table:
  {uuid, epoch, clean}} and notices: [TEXT, ...]. Absent things are left out.
  With --backing-chain an array, the image itself first.

JSON of other images:
  {image, filename, driver, size, block_size, disk_usage, zoned: {model,
  zone_size, zone_capacity, nr_zones, nr_conventional, max_open, max_active,
  max_append, zrwa: {size, granularity, max, explicit_commit} or null,
  extension_size} or null, conditions: {CONDITION: COUNT, ...} or null, table:
  {path, disk_usage, uuid, epoch, clean} or null, notices: [TEXT, ...]}; sizes
  in bytes, a limit of 0 is no limit";

pub fn run(args: &Info) -> anyhow::Result<()> {
    let graph = args.image.graph_as(args.format.as_deref())?;
    let session = Session::new()?;
    let format = session.run(graph.format(session.host(), &looking(args.force_share)))?;
    let mut out = Out::new();
    match (format, graph.filename()) {
        (ImageFormat::Qcow2, Some(path)) => chain::show(&mut out, &session, &graph, &path, args)?,
        _ => show(&mut out, &session, &graph, args)?,
    }
    out.flush()
}

impl Info {
    fn as_json(&self) -> bool {
        self.json || self.output == OutputArg::Json
    }
}

/// Shows an image that is not qcow2.
fn show(out: &mut Out, session: &Session, graph: &Graph, args: &Info) -> anyhow::Result<()> {
    let (info, geometry) = session.with(graph, &looking(args.force_share), async |device| {
        let info = ImageInfo {
            image: args.image.image.to_string_lossy().into_owned(),
            disk_usage: graph.filename().as_deref().and_then(disk_usage),
            filename: graph.filename(),
            driver: device.driver(),
            size: device.limits().size,
            block_size: device.limits().block_size,
            zoned: device.limits().zoned.as_ref().map(Zoned::of),
            conditions: conditions(device).await?,
            table: device.status().map(|status| Table {
                path: status.sidecar.clone(),
                disk_usage: disk_usage(&status.sidecar),
                uuid: status.uuid.to_string(),
                epoch: status.epoch,
                clean: status.clean,
            }),
            notices: device.notices().to_vec(),
        };
        Ok((info, device.limits().zoned))
    })?;
    if args.as_json() {
        out.json(&info)
    } else {
        print(out, &info, geometry.as_ref())
    }
}

fn disk_usage(path: &Path) -> Option<u64> {
    // Linux counts blocks in 512 bytes, whatever the file system's are.
    std::fs::metadata(path).ok().map(|file| file.blocks() * 512)
}

async fn conditions(device: &Device) -> anyhow::Result<Option<Conditions>> {
    if device.limits().zoned.is_none() {
        return Ok(None);
    }
    let mut counts = Conditions::default();
    device
        .report_to(0, Filter::All, &mut |zone| {
            counts.count(zone.condition);
            ControlFlow::Continue(())
        })
        .await?;
    Ok(Some(counts))
}

fn print(out: &mut Out, info: &ImageInfo, geometry: Option<&Geometry>) -> anyhow::Result<()> {
    let sized = |bytes: u64| format!("{} ({bytes} bytes)", format_size(bytes));
    out.line(format_args!("image: {}", info.image))?;
    out.line(format_args!("driver: {}", info.driver))?;
    out.line(format_args!("virtual size: {}", sized(info.size)))?;
    if let Some(usage) = info.disk_usage {
        out.line(format_args!("disk size: {}", format_size(usage)))?;
    }
    out.line(format_args!("block size: {} bytes", info.block_size))?;
    match geometry {
        Some(geometry) => print_zones(out, geometry, info.conditions.as_ref())?,
        None => out.line("zones: none")?,
    }
    if let Some(table) = &info.table {
        out.line(format_args!("zone table: {}", table.path.display()))?;
        print_state(out, &table.uuid, table.epoch, table.clean)?;
    }
    print_notices(out, &info.notices)
}

fn print_state(out: &mut Out, uuid: &str, epoch: u64, clean: bool) -> anyhow::Result<()> {
    out.line(format_args!("uuid: {uuid}"))?;
    out.line(match (epoch, clean) {
        (0, _) => "state: never opened for writing".to_owned(),
        (n, true) => format!("state: closed cleanly (epoch {n})"),
        (n, false) => {
            format!(
                "state: not closed (epoch {n}): in use, or its process died and the next opening recovers it"
            )
        }
    })
}

fn print_notices(out: &mut Out, notices: &[String]) -> anyhow::Result<()> {
    notices
        .iter()
        .try_for_each(|notice| out.line(format_args!("notice: {notice}")))
}

fn print_zones(out: &mut Out, geometry: &Geometry, conditions: Option<&Conditions>) -> anyhow::Result<()> {
    let spec = geometry.spec();
    let limit = |n: u32| match n {
        0 => "no limit".to_owned(),
        n => n.to_string(),
    };
    let last = spec.size - spec.zone_size * u64::from(geometry.nr_zones() - 1);
    let short = if last < spec.zone_size {
        format!(", the last one of {}", format_size(last))
    } else {
        String::new()
    };
    out.line(match spec.model {
        Model::HostManaged => "model: host-managed",
        Model::HostAware => "model: host-aware",
    })?;
    out.line(format_args!(
        "zones: {} of {}{short}",
        geometry.nr_zones(),
        format_size(spec.zone_size)
    ))?;
    out.line(format_args!("zone capacity: {}", format_size(spec.zone_capacity)))?;
    out.line(format_args!("conventional zones: {}", spec.nr_conventional))?;
    out.line(format_args!("max open zones: {}", limit(spec.max_open)))?;
    out.line(format_args!("max active zones: {}", limit(spec.max_active)))?;
    out.line(match spec.max_append {
        0 => "max append: not supported".to_owned(),
        bytes => format!("max append: {}", format_size(bytes)),
    })?;
    if let Some(zrwa) = spec.zns.zrwa {
        out.line(format_args!(
            "random write areas: {}, granularity {}, at most {}",
            format_size(zrwa.size),
            format_size(zrwa.granularity),
            limit(zrwa.count)
        ))?;
    }
    if spec.zns.extension_size != 0 {
        out.line(format_args!(
            "descriptor extensions: {} bytes",
            spec.zns.extension_size
        ))?;
    }
    let conditions = conditions.iter().flat_map(|conditions| conditions.0.values());
    let counts: Vec<_> = conditions
        .map(|(name, count)| format!("{count} {name}"))
        .collect();
    out.line(format_args!("conditions: {}", counts.join(", ")))
}
