//! `zbdkit info`: what an image is.

use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use clap::Args;
use zbdkit_block::{Device, format_size};
use zbdkit_zone::{Filter, Geometry, Model};

use crate::image::{ImageArgs, Session, looking};
use crate::output::Out;
use crate::shapes::{Conditions, ImageInfo, Table, Zoned};

/// Show what an image is: geometry, limits, how many zones are in which condition
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Info {
    #[command(flatten)]
    pub image: ImageArgs,

    /// Look even while another process writes the image; what is shown may be a moment old
    #[arg(short = 'U', long)]
    pub force_share: bool,

    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit info disk.raw
  zbdkit info -U --json disk.raw | jq .conditions

Looking takes QEMU's read locks and changes nothing, so damage that is reported as made good is still there until the \
image is next opened for writing.

JSON:
  {image, filename, driver, size, block_size, disk_usage, zoned: {model,
  zone_size, zone_capacity, nr_zones, nr_conventional, max_open, max_active,
  max_append} or null, conditions: {CONDITION: COUNT, ...} or null, table:
  {path, disk_usage, uuid, epoch, clean} or null, notices: [TEXT, ...]}; sizes
  in bytes, a limit of 0 is no limit";

pub fn run(args: &Info) -> anyhow::Result<()> {
    let graph = args.image.graph()?;
    let session = Session::new()?;
    let info = session.with(&graph, &looking(args.force_share), async |device| {
        Ok(ImageInfo {
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
        })
        .map(|info| (info, device.limits().zoned))
    });
    let (info, geometry) = info?;
    let mut out = Out::new();
    if args.json {
        out.json(&info)?;
    } else {
        print(&mut out, &info, geometry.as_ref())?;
    }
    out.flush()
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
        Some(geometry) => print_zones(out, info, geometry)?,
        None => out.line("zones: none")?,
    }
    if let Some(table) = &info.table {
        out.line(format_args!("zone table: {}", table.path.display()))?;
        out.line(format_args!("uuid: {}", table.uuid))?;
        out.line(match (table.epoch, table.clean) {
            (0, _) => "state: never opened for writing".to_owned(),
            (n, true) => format!("state: closed cleanly (epoch {n})"),
            (n, false) => {
                format!("state: not closed (epoch {n}): in use, or its process died and the next opening recovers it")
            }
        })?;
    }
    for notice in &info.notices {
        out.line(format_args!("notice: {notice}"))?;
    }
    Ok(())
}

fn print_zones(out: &mut Out, info: &ImageInfo, geometry: &Geometry) -> anyhow::Result<()> {
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
    let conditions = info
        .conditions
        .iter()
        .flat_map(|conditions| conditions.0.values());
    let counts: Vec<_> = conditions
        .map(|(name, count)| format!("{count} {name}"))
        .collect();
    out.line(format_args!("conditions: {}", counts.join(", ")))
}
