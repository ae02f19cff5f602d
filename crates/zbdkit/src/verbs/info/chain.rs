//! An image of a format that qemu-img knows, and the chain of images below it.

use std::path::Path;

use anyhow::{Context, bail};
use zbdkit_block::{Device, FileId, Graph, ImageFormat, OpenOptions};
use zbdkit_qcow2::Header;
use zbdkit_zone::Geometry;

use super::qcow2::{self, Described};
use super::{Info, conditions, print_notices, print_state, print_zones};
use crate::image::{Session, looking};
use crate::output::{Out, describe, printable};
use crate::shapes::qemu::{ImageInfo, Specific, Table, Zoned};

/// Most images in a chain, as when it is opened.
const LONGEST: usize = 200;

/// One image of a chain.
struct Link {
    image: Described,
    info: ImageInfo,
    geometry: Option<Geometry>,
}

/// Shows the qcow2 image at the root of `graph`, whose file is `path`.
pub fn show(out: &mut Out, session: &Session, graph: &Graph, path: &Path, args: &Info) -> anyhow::Result<()> {
    let mut links = vec![top(session, graph, path, args)?];
    if args.backing_chain {
        follow(session, &mut links, args)?;
    }
    if args.as_json() {
        return match &links[..] {
            [only] if !args.backing_chain => out.json(&only.info),
            links => out.json(&links.iter().map(|link| &link.info).collect::<Vec<_>>()),
        };
    }
    for (at, link) in links.iter().enumerate() {
        if at > 0 {
            out.line("")?;
        }
        out.text(qcow2::text(&link.info, &link.image.snapshots))?;
        print_zoned(out, link)?;
    }
    Ok(())
}

fn top(session: &Session, graph: &Graph, path: &Path, args: &Info) -> anyhow::Result<Link> {
    let file = qcow2::open(session, path, args.force_share)?;
    let image = session.run(async {
        let header = Header::read(&file)
            .await
            .with_context(|| path.display().to_string())?;
        Described::read(path, &file, Some(header)).await
    })?;
    drop(file);
    link(session, graph, image, args)
}

/// Adds what only an opening tells: the zones.
fn link(session: &Session, graph: &Graph, image: Described, args: &Info) -> anyhow::Result<Link> {
    let zones = match &image.header {
        Some(header) if header.zoned() => zones(session, graph, args),
        _ => Ok((None, None, Vec::new())),
    };
    // What the header says is worth showing also where the rest cannot be opened, as with a missing backing file.
    let (geometry, zoned, notices) = zones.unwrap_or_else(|error| {
        let notice = format!("the zones cannot be shown: {}", describe(&error));
        (None, None, vec![notice])
    });
    let info = image.shape(zoned, notices);
    Ok(Link {
        image,
        info,
        geometry,
    })
}

type Zones = (Option<Geometry>, Option<Zoned>, Vec<String>);

fn zones(session: &Session, graph: &Graph, args: &Info) -> anyhow::Result<Zones> {
    let options = OpenOptions {
        // Zones do not lie there, and it may be gone.
        no_backing: true,
        ..looking(args.force_share)
    };
    session.with(graph, &options, async |device: &Device| {
        let geometry = device.limits().zoned;
        let counts = conditions(device).await?.unwrap_or_default();
        let table = device.status().map(|status| Table {
            uuid: status.uuid.to_string(),
            epoch: status.epoch,
            clean: status.clean,
        });
        let zoned = geometry
            .as_ref()
            .map(|geometry| Zoned::of(geometry, counts, table));
        Ok((geometry, zoned, device.notices().to_vec()))
    })
}

/// Goes down from the last link. Only headers are read, and no file is opened twice.
fn follow(session: &Session, links: &mut Vec<Link>, args: &Info) -> anyhow::Result<()> {
    let mut seen: Vec<FileId> = vec![identity(session, &links[0].image.path)?];
    while let Some((name, path)) = links.last().and_then(|link| link.image.backing()) {
        let name = printable(name);
        if is_no_path(&name) {
            bail!("backing image {name:?} is not a file: the chain cannot be followed further");
        }
        let id = identity(session, &path)?;
        if seen.len() > LONGEST {
            bail!("more than {LONGEST} images lie below each other");
        }
        if seen.contains(&id) {
            bail!(
                "backing image {name:?} creates an infinite loop: 'zbdkit rebase -u' can give the image another one"
            );
        }
        seen.push(id);
        let format = links
            .last()
            .and_then(|link| link.info.backing_filename_format.clone());
        let image = below(session, &path, format.as_deref(), args)?;
        let graph = Graph::from_path(&path);
        links.push(link(session, &graph, image, args)?);
    }
    Ok(())
}

fn identity(session: &Session, path: &Path) -> anyhow::Result<FileId> {
    let file = qcow2::open(session, path, true)?;
    session
        .host()
        .identity(&file)
        .with_context(|| path.display().to_string())
}

/// The image at `path`, of the format that the image above it names or, where it names none, the one that it seems to
/// have: for showing a header that is good enough.
fn below(session: &Session, path: &Path, format: Option<&str>, args: &Info) -> anyhow::Result<Described> {
    let file = qcow2::open(session, path, args.force_share)?;
    session.run(async {
        let header = match format.map(|name| (name, ImageFormat::of_name(name))) {
            Some((_, Some(ImageFormat::Raw))) => None,
            Some((_, Some(ImageFormat::Qcow2))) => Some(Header::read(&file).await),
            None => match Header::read(&file).await {
                Err(zbdkit_qcow2::Error::NotQcow2) => None,
                header => Some(header),
            },
            Some((other, None)) => bail!(
                "{}: format {} is not known; formats are raw, qcow2",
                path.display(),
                printable(other)
            ),
        };
        let header = header.transpose().with_context(|| path.display().to_string())?;
        Described::read(path, &file, header).await
    })
}

/// Whether a name is a URL or a graph, as QEMU tells them: a colon before any slash.
fn is_no_path(name: &str) -> bool {
    let name = name.strip_prefix("file:").unwrap_or(name);
    name.split('/').next().is_some_and(|first| first.contains(':'))
}

/// What `info` says of zones, in the words that it has for raw images.
fn print_zoned(out: &mut Out, link: &Link) -> anyhow::Result<()> {
    if let (Some(geometry), Some(Specific::Qcow2(specific))) = (&link.geometry, &link.info.format_specific) {
        let zoned = specific.zoned.as_ref();
        out.line(format_args!("block size: {} bytes", geometry.block_size()))?;
        print_zones(out, geometry, zoned.map(|zoned| &zoned.conditions))?;
        if let Some(table) = zoned.and_then(|zoned| zoned.table.as_ref()) {
            print_state(out, &table.uuid, table.epoch, table.clean)?;
        }
    }
    print_notices(out, &link.info.notices)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_and_graphs_are_no_paths() {
        for name in [
            "nbd:unix:/x",
            "json:{\"driver\": \"file\"}",
            "https://example.org/x",
            "fat:rw:/dir",
        ] {
            assert!(is_no_path(name), "{name}");
        }
        for name in ["base.qcow2", "/a:b/c", "./a:b", "file:base.qcow2", "dir/nbd:x"] {
            assert!(!is_no_path(name), "{name}");
        }
    }
}
