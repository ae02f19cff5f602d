//! Making qcow2 images, with zones or without, alone or over a backing image.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use zbdkit_io::File;
use zbdkit_qcow2::{Layout, Preallocation, Qcow2};
use zbdkit_spec::qcow2::{AUTOCLEAR_ZONE_TABLE, INCOMPAT_ZONE_STATES, INCOMPAT_ZONED};
use zbdkit_zone::Geometry;

use super::extension::{self, Zones};
use super::gate::{self, ImageFormat};
use super::ours::{self, Ours};
use super::zones::{Known, Tables};
use crate::create::{CreateError, CreateOptions, replace};
use crate::device::Device;
use crate::error::OpenError;
use crate::graph::{Graph, OpenOptions};
use crate::host::{FileOptions, Host};
use crate::zoned::{Records, host_error, is_beyond_bare_tables};

/// What qcow2 image to make.
#[derive(Clone, Debug)]
pub struct Qcow2CreateOptions {
    /// The image.
    pub path: PathBuf,
    /// What it is like, but for its size.
    pub layout: Layout,
    /// Size of the device, bytes, a multiple of 512; the backing image's if `None`.
    pub size: Option<u64>,
    /// The zones; their path and size do not matter. If `None`, those of the backing image, if that has any.
    pub zones: Option<CreateOptions>,
    /// Do not look at the backing image, which may not be there: then a size is needed, and no zones are inherited.
    pub unsafe_backing: bool,
    /// Replace an image that is there, and its external data file.
    pub force: bool,
}

impl Qcow2CreateOptions {
    /// An image without zones, of the given size.
    pub fn new(path: impl Into<PathBuf>, size: u64) -> Qcow2CreateOptions {
        Qcow2CreateOptions {
            path: path.into(),
            layout: Layout::default(),
            size: Some(size),
            zones: None,
            unsafe_backing: false,
            force: false,
        }
    }
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Qcow2Created {
    /// Size of the device, bytes.
    pub size: u64,
    /// The zones, if it has any.
    pub geometry: Option<Geometry>,
    /// Identity of an image with zones.
    pub uuid: Option<uuid::Uuid>,
    /// What the backing image's opening found that the user should know.
    pub notices: Vec<String>,
}

/// Makes a qcow2 image; it is durable when this returns. Nothing is left behind where it fails.
pub async fn create_qcow2(
    host: &Arc<dyn Host>,
    options: &Qcow2CreateOptions,
) -> Result<Qcow2Created, CreateError> {
    let base = open_base(host, options).await?;
    let inherited = base.as_ref().and_then(|base| base.limits().zoned.map(|_| base));
    let size = size_of(options, base.as_ref())?;
    let layout = Layout {
        size,
        ..options.layout.clone()
    };
    let zones = match (&options.zones, inherited) {
        (Some(_), _) if layout.backing.is_some() => {
            return Err(CreateError::Refused(
                "an image over a backing image has the zones of that, or none: leave the zone options out"
                    .into(),
            ));
        }
        (Some(zones), _) => Some(Known {
            geometry: CreateOptions {
                size,
                ..zones.clone()
            }
            .geometry()?,
            records: Records::new(),
            slots: None,
        }),
        (None, Some(base)) => Some(inherit(base, size).await?),
        (None, None) => None,
    };
    check(&layout, zones.as_ref())?;
    let data = match &layout.data_file {
        Some(name) => Some(gate::resolve(&options.path, name, "data file")?),
        None => None,
    };
    for file in data.iter().chain([&options.path]) {
        let exists = host
            .exists(file)
            .map_err(|e| OpenError::file(file, "cannot be looked for", e))?;
        match (exists, options.force) {
            (true, false) => return Err(CreateError::Exists(file.clone())),
            (true, true) => replace(host, file)?,
            (false, _) => {}
        }
    }
    let uuid = make(host, &options.path, data.as_deref(), &layout, zones.as_ref()).await?;
    Ok(Qcow2Created {
        size,
        geometry: zones.map(|known| known.geometry),
        uuid,
        notices: base.map_or(Vec::new(), |base| base.notices().to_vec()),
    })
}

/// Opens the backing image for reading, as the new image will see it.
async fn open_base(
    host: &Arc<dyn Host>,
    options: &Qcow2CreateOptions,
) -> Result<Option<Device>, CreateError> {
    let Some((name, format)) = &options.layout.backing else {
        return Ok(None);
    };
    if options.unsafe_backing {
        return Ok(None);
    }
    let path = gate::resolve(&options.path, name, "backing image")?;
    let Some(format) = format else {
        return Err(CreateError::Refused(format!(
            "which format has the backing image {name}? Say raw or qcow2; it is not guessed, because a guest could make a \
             raw image look like another format"
        )));
    };
    let Some(format) = ImageFormat::of_name(format) else {
        return Err(CreateError::Refused(format!(
            "the backing image cannot have the format {format:?}: zbdkit knows raw and qcow2"
        )));
    };
    let reading = OpenOptions {
        read_only: true,
        format: Some(format),
        ..OpenOptions::default()
    };
    let base = Graph::from_path(path).open(host, &reading).await?;
    Ok(Some(base))
}

fn size_of(options: &Qcow2CreateOptions, base: Option<&Device>) -> Result<u64, CreateError> {
    match (options.size, base) {
        (Some(size), _) => Ok(size),
        (None, Some(base)) => Ok(base.limits().size.next_multiple_of(512)),
        (None, None) => Err(CreateError::Refused(
            "Image creation needs a size parameter".into(),
        )),
    }
}

/// The zones of a backing image, as they are now: an overlay starts with them. Their data becomes durable, since the
/// overlay's pointers will be.
async fn inherit(base: &Device, size: u64) -> Result<Known, CreateError> {
    let engine = base.engine();
    let (Some(geometry), Some(engine)) = (base.limits().zoned, engine) else {
        return Err(CreateError::Refused(
            "the backing image's zones are not known".into(),
        ));
    };
    if size != geometry.size() {
        return Err(CreateError::Refused(format!(
            "an image over a backing image with zones has its size, {} bytes: leave the size out",
            geometry.size()
        )));
    }
    if let Some(marked) = base.marks().ranges().first() {
        return Err(CreateError::Refused(format!(
            "the backing image has blocks that are marked uncorrectable, the first at offset {}, which an overlay would show \
             as zeros: write them again, or reset their zones, first",
            marked.start
        )));
    }
    let records: Records = geometry
        .zones()
        .map(|zone| (zone.0, engine.record(zone)))
        .filter(|(_, record)| *record != Default::default())
        .collect();
    if records.values().any(|record| record.zrwa) && base.status().is_some_and(|status| !status.clean) {
        return Err(CreateError::Refused(
            "the backing image was not closed, and a zone of it has a random write area: open and close it first, so \
             that what lies above the area is zeros"
                .into(),
        ));
    }
    let synced = async {
        match base.qcow2() {
            Some(image) => {
                image.data_file().sync().await?;
                image.file().sync().await
            }
            None => match base.below().file() {
                Some(file) => file.sync().await,
                None => Ok(()),
            },
        }
    };
    synced
        .await
        .map_err(|e| OpenError::file("the backing image", "cannot be synced", e))?;
    let slots = base.zoned_node().and_then(|node| node.slots().cloned());
    Ok(Known {
        geometry,
        records,
        slots,
    })
}

fn check(layout: &Layout, zones: Option<&Known>) -> Result<(), CreateError> {
    layout.check()?;
    if layout.backing.is_some() && layout.effective_preallocation() != Preallocation::Off {
        return Err(CreateError::Refused(
            "preallocation would hide the backing image: leave out the one or the other".into(),
        ));
    }
    let Some(known) = zones else { return Ok(()) };
    if layout.version < 3 {
        return Err(CreateError::Refused(
            "Zoned images are only supported with compatibility level 1.1 and above (use version=v3 or greater)"
                .into(),
        ));
    }
    extension::expressible(&known.geometry, layout.cluster_size).map_err(|why| {
        CreateError::Refused(format!(
            "Invalid zoned device options: {why}; a qcow2 image cannot have such zones, an image in format raw can"
        ))
    })
}

async fn make(
    host: &Arc<dyn Host>,
    path: &Path,
    data: Option<&Path>,
    layout: &Layout,
    zones: Option<&Known>,
) -> Result<Option<uuid::Uuid>, CreateError> {
    let new = |path: &Path| {
        host.open(path, &FileOptions::new_file())
            .map_err(|e| host_error(path, "cannot be created", e))
    };
    let file = new(path)?;
    let made = async {
        let Some(data) = data else {
            return fill(host, path, file, None, layout, zones).await;
        };
        let data_file = new(data)?;
        let made = fill(host, path, file, Some(data_file), layout, zones).await;
        let named = host.sync_name(data);
        if made.is_err() || named.is_err() {
            let _ = host.remove(data);
        }
        named.map_err(|e| OpenError::file(data, "its directory cannot be synced", e))?;
        made
    };
    let made = made.await;
    if made.is_err() {
        // Nothing half made stays, and nothing goes that somebody else made in the meantime. What cannot be removed
        // either is named by the error that is returned.
        let _ = host.remove(path);
    }
    made
}

async fn fill(
    host: &Arc<dyn Host>,
    path: &Path,
    file: File,
    data: Option<File>,
    layout: &Layout,
    zones: Option<&Known>,
) -> Result<Option<uuid::Uuid>, CreateError> {
    let wrong = OpenError::image(path);
    // With its feature bit and no extension yet, an image that is not finished does not open as a disk without zones.
    let unfinished = match zones {
        Some(_) => INCOMPAT_ZONED,
        None => 0,
    };
    let header = zbdkit_qcow2::create_with(&file, data.as_ref(), layout, |header| {
        header.incompatible |= unfinished;
    })
    .await
    .map_err(&wrong)?;
    let preallocation = layout.effective_preallocation();
    let mut uuid = None;
    if zones.is_some() || preallocation != Preallocation::Off {
        let options = zbdkit_qcow2::Options {
            data_file: data.clone(),
            known_incompatible: INCOMPAT_ZONED | INCOMPAT_ZONE_STATES,
            known_autoclear: AUTOCLEAR_ZONE_TABLE,
            ..zbdkit_qcow2::Options::default()
        };
        let image = Qcow2::open(file.clone(), header, options).await.map_err(&wrong)?;
        if let Some(known) = zones {
            uuid = Some(give_zones(host, path, &image, known).await?);
        }
        image
            .preallocate(0..layout.size, preallocation)
            .await
            .map_err(&wrong)?;
        image.close().await.map_err(&wrong)?;
    }
    let synced = async {
        if let Some(data) = &data {
            data.sync().await?;
        }
        file.sync().await
    };
    synced
        .await
        .map_err(|e| OpenError::file(path, "cannot be synced", e))?;
    host.sync_name(path)
        .map_err(|e| OpenError::file(path, "its directory cannot be synced", e))?;
    Ok(uuid)
}

async fn give_zones(
    host: &Arc<dyn Host>,
    path: &Path,
    image: &Qcow2,
    known: &Known,
) -> Result<uuid::Uuid, OpenError> {
    let wrong = OpenError::image(path);
    let data = host
        .identity(image.data_file())
        .map_err(|e| OpenError::file(path, "cannot be identified", e))?;
    let uuid = uuid::Uuid::new_v4();
    let tables = Tables::make(image, known, uuid, data, None, |_| ())
        .await
        .map_err(&wrong)?;
    let zones = Zones::of(&known.geometry, tables.bare.0);
    let ours = Ours {
        area: tables.area,
        snapshots: (0, 0),
        uuid,
    };
    let states = known.records.values().any(is_beyond_bare_tables);
    image
        .update_header(|header| {
            ours::put(header, &zones, &ours, states);
            Ok(())
        })
        .await
        .map_err(&wrong)?;
    Ok(uuid)
}
