//! The new image that a copy goes to.

use std::path::{Path, PathBuf};

use anyhow::Context;
use zbdkit_block::tool::{self, TargetHolds};
use zbdkit_block::{CreateOptions, Device, Graph, default_sidecar};
use zbdkit_zone::Model;

use super::Convert;
use crate::image::{Session, graph_as};
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
    Plain { size: u64 },
    /// A file and its zone table.
    Zoned(Box<CreateOptions>),
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
    pub fn plan(args: &Convert, format: Format, source: &Device) -> anyhow::Result<Target> {
        let path = PathBuf::from(&args.target);
        let mut asked = Asked::read(format, &args.options)?;
        asked.override_with("backing_file", args.backing.clone());
        asked.override_with("backing_fmt", args.backing_format.clone());
        let drops_zones = asked.text("zone.mode") == Some("none");
        if drops_zones && asked.describes_zones_besides_mode() {
            return Err(Usage(
                "zone.mode=none makes a disk without zones, but other options describe zones: leave out the one or the others"
                    .into(),
            )
            .into());
        }
        let size = size(&asked, source)?;
        let zones = match drops_zones {
            true => None,
            false => zones(&asked, &path, size, source)?,
        };
        let kind = match (format, zones) {
            (Format::Raw, None) => Kind::Plain { size },
            (Format::Raw, Some(options)) => Kind::Zoned(Box::new(options)),
            (Format::Qcow2, _) => anyhow::bail!("format qcow2 is not there yet"),
        };
        Ok(Target {
            path,
            kind,
            holds: TargetHolds::Zeros,
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
        }
        Ok(())
    }

    /// As it is opened.
    pub fn graph(&self) -> anyhow::Result<Graph> {
        match &self.kind {
            Kind::Plain { .. } => graph_as(self.path.as_os_str(), false, Some("raw")),
            Kind::Zoned(options) => zoned_graph(&self.path, options.sidecar.as_deref()),
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
            Kind::Plain { .. } => None,
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

/// The target's zones: the source's with what the options change; of a source without zones those that the options
/// describe, if they do.
fn zones(asked: &Asked, path: &Path, size: u64, source: &Device) -> anyhow::Result<Option<CreateOptions>> {
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
            None => spec.model,
            Some("host-managed") => Model::HostManaged,
            Some("host-aware") => Model::HostAware,
            Some(other) => {
                return Err(Usage(format!(
                    "-o zone.mode={other}: modes are host-managed, host-aware and none"
                ))
                .into());
            }
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
        sidecar: asked.text("sidecar").map(PathBuf::from),
        force: true,
        ..CreateOptions::new(path, size)
    };
    tool::check_zones(source, &options.geometry()?)?;
    Ok(Some(options))
}
