//! `zbdkit snapshot`: internal snapshots of qcow2 images, zones included.

use anyhow::{Context, bail};
use clap::Args;
use zbdkit_block::Device;
use zbdkit_qcow2::Snapshot;

use crate::image::{ImageArgs, Session, changing, looking};
use crate::output::{Out, printable};
use crate::shapes::qemu::SnapshotInfo;
use crate::verbs::info::snapshots;

/// List, make, apply and delete the internal snapshots of a qcow2 image
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct SnapshotArgs {
    #[command(flatten)]
    pub image: ImageArgs,

    /// Take the image for this format instead of finding out
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,

    /// List the snapshots; this is what is done where nothing else is said
    #[arg(short, long, group = "what")]
    pub list: bool,

    /// Make a snapshot of the image as it is
    #[arg(short, long, value_name = "NAME", group = "what")]
    pub create: Option<String>,

    /// Bring contents and zones back to a snapshot, by its id or name; what was written since is lost
    #[arg(short, long, value_name = "SNAPSHOT", group = "what")]
    pub apply: Option<String>,

    /// Delete a snapshot, by its id or name
    #[arg(short, long, value_name = "SNAPSHOT", group = "what")]
    pub delete: Option<String>,

    /// List even while another process writes the image
    #[arg(short = 'U', long, conflicts_with_all = ["create", "apply", "delete"])]
    pub force_share: bool,

    /// Print the list as JSON
    #[arg(long, conflicts_with_all = ["create", "apply", "delete"])]
    pub json: bool,

    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit snapshot -c before-mkfs disk.qcow2
  zbdkit snapshot -l disk.qcow2
  zbdkit snapshot -a before-mkfs disk.qcow2
  zbdkit snapshot -d before-mkfs disk.qcow2

A snapshot holds the contents and, of a zoned image, every zone's write pointer and condition: applying it brings back \
both, in one step. Nobody else may have the image open meanwhile, but for listing with -U. Names need not be unique; \
an id is, and is looked for first.

JSON:
  As in qemu-img info: [{id, name, vm-state-size, date-sec, date-nsec,
  vm-clock-sec, vm-clock-nsec, icount}, ...]";

pub fn run(args: &SnapshotArgs) -> anyhow::Result<()> {
    let graph = args.image.graph_as(args.format.as_deref())?;
    let session = Session::new()?;
    let (create, apply, delete) = (&args.create, &args.apply, &args.delete);
    if create.is_none() && apply.is_none() && delete.is_none() {
        let listed = session.with(&graph, &looking(args.force_share), list)?;
        return print(args, &listed);
    }
    session.with(&graph, &changing(), async |device| {
        if device.qcow2().is_none() {
            bail!(
                "only qcow2 images have internal snapshots; 'zbdkit convert -O qcow2' makes one of this image"
            );
        }
        if let Some(name) = create {
            let made = device.snapshot_create(name).await;
            made.with_context(|| format!("Could not create snapshot '{}'", printable(name)))?;
        }
        if let Some(which) = apply {
            let applied = device.snapshot_apply(which).await;
            applied.with_context(|| format!("Could not apply snapshot '{}'", printable(which)))?;
        }
        if let Some(which) = delete {
            let deleted = device.snapshot_delete(which).await;
            deleted.with_context(|| format!("Could not delete snapshot '{}'", printable(which)))?;
        }
        Ok(())
    })
}

/// The snapshots; none of a format that has none, as with qemu-img.
async fn list(device: &Device) -> anyhow::Result<Vec<Snapshot>> {
    match device.qcow2() {
        Some(_) => Ok(device.snapshots().await?),
        None => Ok(Vec::new()),
    }
}

fn print(args: &SnapshotArgs, listed: &[Snapshot]) -> anyhow::Result<()> {
    let mut out = Out::new();
    if args.json {
        let shapes: Vec<_> = listed.iter().map(SnapshotInfo::of).collect();
        out.json(&shapes)?;
    } else if !listed.is_empty() {
        out.text(snapshots::table(listed))?;
    }
    out.flush()
}
