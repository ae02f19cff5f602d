//! The new image that a copy goes to.

use std::path::{Path, PathBuf};

use anyhow::Context;
use zbdkit_block::tool::{self, TargetHolds};
use zbdkit_block::{CreateOptions, Device, Graph, Qcow2CreateOptions, ZnsOptions, default_sidecar};
use zbdkit_zone::{GeometrySpec, Model};

use super::Convert;
use crate::image::{Session, graph_as, looking};
use crate::output::Usage;
use crate::verbs::create::options::{Asked, Format};
use crate::verbs::create::qcow2;

/// What is to be made.
pub struct Target {
    path: PathBuf,
    kind: Kind,
    holds: TargetHolds,
    /// The user said that there are to be no zones.
    drops_zones: bool,
}

enum Kind {
    /// A file without zones.
    Plain {
        size: u64,
    },
    /// A file and its zone table.
    Zoned(Box<CreateOptions>),
    Qcow2(Box<Qcow2CreateOptions>),
}

/// The format that was said, or that the name says.
pub fn format(args: &Convert) -> anyhow::Result<Format> {
    Format::of(args.target_format.as_deref(), Path::new(&args.target))
}

/// That source and target are not the same file, where no lock would notice.
pub fn refuse_same_file(args: &Convert, source: &Graph) -> anyhow::Result<()> {
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    let same = source
        .filename()
        .and_then(|source| Some(real(&source)? == real(Path::new(&args.target))?));
    match same {
        Some(true) => Err(Usage("the source and the target are the same file".into()).into()),
        _ => Ok(()),
    }
}

impl Target {
    /// Decides what is to be made, before anything that is there is touched.
    pub async fn plan(
        args: &Convert,
        format: Format,
        session: &Session,
        source: &Source<'_>,
    ) -> anyhow::Result<Target> {
        let path = PathBuf::from(&args.target);
        let mut asked = Asked::read(format, &args.options)?;
        asked.override_with("backing_file", args.backing.clone());
        asked.override_with("backing_fmt", args.backing_format.clone());
        let drops_zones = asked.text("zone.mode") == Some("none");
        if drops_zones && asked.describes_zones_besides_mode() {
            return Err(usage(
                "zone.mode=none makes a disk without zones, but other options describe zones: leave out the one or the others",
            ));
        }
        let size = size(&asked, source.device)?;
        let (kind, holds) = match format {
            Format::Raw => {
                let kind = match zones(&asked, &path, size, source.device)? {
                    None => Kind::Plain { size },
                    Some(options) => Kind::Zoned(Box::new(options)),
                };
                (kind, TargetHolds::Zeros)
            }
            Format::Qcow2 => {
                let mut options = Qcow2CreateOptions {
                    layout: qcow2::layout(&asked)?,
                    force: true,
                    ..Qcow2CreateOptions::new(&path, size)
                };
                let holds = match options.layout.backing.clone() {
                    Some(backing) => check_backing(session, &path, &asked, &backing, source).await?,
                    None => {
                        options.zones = zones(&asked, &path, size, source.device)?;
                        options.size = Some(options.zones.as_ref().map_or(size, |zones| zones.size));
                        TargetHolds::Zeros
                    }
                };
                (Kind::Qcow2(Box::new(options)), holds)
            }
        };
        Ok(Target {
            path,
            kind,
            holds,
            drops_zones,
        })
    }

    /// Makes it, in the place of what is there.
    pub async fn create(&self, session: &Session) -> anyhow::Result<()> {
        let host = session.host();
        match &self.kind {
            Kind::Plain { size } => tool::create_plain(host, &self.path, *size, true).await?,
            Kind::Zoned(options) => {
                zbdkit_block::create(host, options).await?;
            }
            Kind::Qcow2(options) => {
                tool::clear_table(host, &self.path).await?;
                zbdkit_block::create_qcow2(host, options).await?;
            }
        }
        Ok(())
    }

    /// As it is opened.
    pub fn graph(&self) -> anyhow::Result<Graph> {
        match &self.kind {
            Kind::Plain { .. } => graph_as(self.path.as_os_str(), false, Some("raw")),
            Kind::Zoned(options) => zoned_graph(&self.path, options.sidecar.as_deref()),
            Kind::Qcow2(_) => graph_as(self.path.as_os_str(), false, Some("qcow2")),
        }
    }

    /// Removes what was made.
    pub fn remove(&self, session: &Session) {
        let sidecar = match &self.kind {
            Kind::Zoned(options) => Some(
                options
                    .sidecar
                    .clone()
                    .unwrap_or_else(|| default_sidecar(&self.path)),
            ),
            Kind::Plain { .. } | Kind::Qcow2(_) => None,
        };
        tool::remove_target(session.host(), &self.path, sidecar.as_deref());
    }

    /// What it reads as when it is new.
    pub fn holds(&self) -> TargetHolds {
        self.holds
    }

    /// Whether the user wants no zones.
    pub fn drops_zones(&self) -> bool {
        self.drops_zones
    }
}

/// What there is to know of the source.
pub struct Source<'a> {
    pub device: &'a Device,
    /// Where it lies, if it has a name.
    pub path: Option<PathBuf>,
}

/// Looks whether the backing image and the source go together, and whether it is the source's own.
async fn check_backing(
    session: &Session,
    path: &Path,
    asked: &Asked,
    (name, format): &(String, Option<String>),
    source: &Source<'_>,
) -> anyhow::Result<TargetHolds> {
    if let Some(option) = asked.zone_option() {
        return Err(usage(&format!(
            "an image over a backing image has the zones of that, or none: leave out {option}"
        )));
    }
    let base_path = tool::backing_path(path, name)?;
    let base = graph_as(base_path.as_os_str(), false, format.as_deref())?;
    let base = base.open(session.host(), &looking(false)).await?;
    let fits = match (source.device.engine(), base.limits().zoned) {
        (Some(_), Some(geometry)) => tool::check_zones(source.device, &geometry).map_err(Into::into),
        (None, None) => Ok(()),
        (Some(_), None) => Err(usage(
            "the source has zones, but the backing image has none: the overlay would have none",
        )),
        (None, Some(_)) => Err(usage(
            "the backing image has zones, and so would the overlay, but the source has none",
        )),
    };
    base.close().await?;
    fits?;
    let own = source.device.backing().and_then(|backing| {
        let own = tool::backing_path(source.path.as_deref()?, &backing.name).ok()?;
        std::fs::canonicalize(own).ok()
    });
    let shared = own.is_some() && own == std::fs::canonicalize(&base_path).ok();
    Ok(TargetHolds::Backing { shared })
}

fn usage(text: &str) -> anyhow::Error {
    Usage(text.to_owned()).into()
}

fn zoned_graph(path: &Path, sidecar: Option<&Path>) -> anyhow::Result<Graph> {
    let Some(sidecar) = sidecar else {
        return Ok(Graph::from_path(path));
    };
    let text = |path: &Path| {
        path.to_str()
            .map(str::to_owned)
            .context("a path that is not UTF-8 goes with a zone table of the usual name only")
    };
    let json = serde_json::json!({
        "driver": "zoned",
        "sidecar": text(sidecar)?,
        "file": { "driver": "file", "filename": text(path)? },
    });
    Ok(Graph::parse_json(&json.to_string())?)
}

/// The target's size: what was asked for, or the source's, in whole sectors.
fn size(asked: &Asked, source: &Device) -> anyhow::Result<u64> {
    let least = source.limits().size.next_multiple_of(512);
    match asked.number("size") {
        Some(size) if size < source.limits().size => Err(Usage(format!(
            "-o size={size}: the source has {} bytes, and a copy is not smaller",
            source.limits().size
        ))
        .into()),
        Some(size) => Ok(size.next_multiple_of(512)),
        None => Ok(least),
    }
}

/// What only Zoned Namespaces have: the source's with what the options change.
fn zns(asked: &Asked, spec: &GeometrySpec) -> ZnsOptions {
    let here = spec.zns.zrwa;
    let size = asked.number("zone.zrwa_size").or(here.map(|zrwa| zrwa.size));
    // Without areas there is nothing more to be said of them.
    let kept = here.filter(|_| size != Some(0));
    let granularity = asked.number("zone.zrwa_granularity");
    let count = asked.count("zone.max_zrwa");
    ZnsOptions {
        zrwa_size: size,
        zrwa_granularity: granularity.or(kept.map(|zrwa| zrwa.granularity)),
        max_zrwa: count.or(kept.map(|zrwa| zrwa.count)),
        extension_size: asked
            .count("zone.descr_ext_size")
            .unwrap_or(spec.zns.extension_size),
    }
}

/// The target's zones: the source's with what the options change; of a source without zones those that the options
/// describe, if they do.
fn zones(asked: &Asked, path: &Path, size: u64, source: &Device) -> anyhow::Result<Option<CreateOptions>> {
    if asked.text("zone.mode") == Some("none") {
        return Ok(None);
    }
    let Some(engine) = source.engine() else {
        if asked.zone_option().is_none() {
            return Ok(None);
        }
        let options = qcow2::zone_options(asked, path, size, false)?;
        let size = size.next_multiple_of(options.block_size.into());
        let options = CreateOptions {
            size,
            force: true,
            ..options
        };
        options.geometry()?;
        return Ok(Some(options));
    };
    let spec = *engine.geometry().spec();
    let conventional = u64::from(spec.nr_conventional);
    for (name, here) in [
        ("zone.size", spec.zone_size),
        ("zone.capacity", spec.zone_capacity),
        ("zone.conventional_zones", conventional),
    ] {
        if asked.number(name).is_some_and(|asked| asked != here) {
            return Err(Usage(format!(
                "-o {name}={}: it is {here} in the source, and zones that have data cannot get another shape; leave it \
                 out, or go through an image without zones (-o zone.mode=none)",
                asked.number(name).unwrap_or_default()
            ))
            .into());
        }
    }
    let options = CreateOptions {
        model: match asked.text("zone.mode") {
            Some("host-managed") => Model::HostManaged,
            Some("host-aware") => Model::HostAware,
            _ => spec.model,
        },
        zone_size: Some(asked.number("zone.size").unwrap_or(spec.zone_size)),
        zone_capacity: Some(asked.number("zone.capacity").unwrap_or(spec.zone_capacity)),
        conventional_zones: asked
            .count("zone.conventional_zones")
            .unwrap_or(spec.nr_conventional),
        max_open: Some(asked.count("zone.max_open_zones").unwrap_or(spec.max_open)),
        max_active: asked.count("zone.max_active_zones").unwrap_or(spec.max_active),
        max_append: Some(asked.number("zone.max_append_bytes").unwrap_or(spec.max_append)),
        block_size: asked.count("block_size").unwrap_or(spec.block_size),
        zns: zns(asked, &spec),
        sidecar: asked.text("sidecar").map(PathBuf::from),
        force: true,
        ..CreateOptions::new(path, size)
    };
    tool::check_zones(source, &options.geometry()?)?;
    Ok(Some(options))
}
