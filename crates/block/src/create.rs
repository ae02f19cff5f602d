//! Making images: a sparse data file and its zone table.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use zbdkit_io::File;
use zbdkit_zone::{Geometry, GeometryError, GeometrySpec, Model, Zns, Zrwa};

use crate::error::OpenError;
use crate::host::{FileOptions, Host, HostError};
use crate::zoned::{create_sidecar, default_sidecar, host_error};

/// Logical block size unless told otherwise: what direct I/O needs nearly everywhere.
pub const DEFAULT_BLOCK_SIZE: u32 = 4096;
/// Zone size unless told otherwise, as QEMU's.
pub const DEFAULT_ZONE_SIZE: u64 = 256 << 20;

/// Largest append unless told otherwise.
pub fn default_append(zone_capacity: u64) -> u64 {
    zone_capacity.min(1 << 20)
}

/// What is asked for of what only Zoned Namespaces have. Without a size there are no random write areas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZnsOptions {
    /// Size of a random write area, bytes; 0 for none.
    pub zrwa_size: Option<u64>,
    /// Its granularity, bytes; the block size if `None`.
    pub zrwa_granularity: Option<u64>,
    /// Most zones with such an area, 0 for no limit.
    pub max_zrwa: Option<u32>,
    /// Size of a zone descriptor extension, bytes; 0 for none.
    pub extension_size: u32,
}

impl ZnsOptions {
    /// What a device with blocks of that size has.
    pub fn zns(&self, block_size: u32) -> Zns {
        let size = self.zrwa_size.unwrap_or(0);
        // Without a size these are refused, rather than left out in silence.
        let asked = size != 0 || self.zrwa_granularity.is_some() || self.max_zrwa.is_some();
        let zrwa = asked.then(|| Zrwa {
            size,
            granularity: self.zrwa_granularity.unwrap_or(block_size.into()),
            count: self.max_zrwa.unwrap_or(0),
            explicit_commit: true,
        });
        Zns {
            zrwa,
            extension_size: self.extension_size,
        }
    }
}

/// What image to make.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// The data file.
    pub path: PathBuf,
    /// Size of the device, bytes.
    pub size: u64,
    /// How the zones may be written.
    pub model: Model,
    /// Bytes; [`DEFAULT_ZONE_SIZE`] if `None`.
    pub zone_size: Option<u64>,
    /// Bytes; the zone size if `None`.
    pub zone_capacity: Option<u64>,
    /// The first so many zones are conventional.
    pub conventional_zones: u32,
    /// Most open zones; the active limit if `None`, 0 for no limit.
    pub max_open: Option<u32>,
    /// Most active zones, 0 for no limit.
    pub max_active: u32,
    /// Largest append, bytes; 1 MiB or the zone capacity if `None`, 0 for no append.
    pub max_append: Option<u64>,
    /// Logical block size, bytes.
    pub block_size: u32,
    /// What only Zoned Namespaces have.
    pub zns: ZnsOptions,
    /// Where the zone table goes; `PATH.zones` if `None`.
    pub sidecar: Option<PathBuf>,
    /// Replace an image that is there.
    pub force: bool,
}

impl CreateOptions {
    /// Host-managed zones with defaults.
    pub fn new(path: impl Into<PathBuf>, size: u64) -> CreateOptions {
        CreateOptions {
            path: path.into(),
            size,
            model: Model::HostManaged,
            zone_size: None,
            zone_capacity: None,
            conventional_zones: 0,
            max_open: None,
            max_active: 0,
            max_append: None,
            block_size: DEFAULT_BLOCK_SIZE,
            zns: ZnsOptions::default(),
            sidecar: None,
            force: false,
        }
    }

    /// The zones that these options describe.
    pub fn geometry(&self) -> Result<Geometry, GeometryError> {
        let zone_size = self.zone_size.unwrap_or(DEFAULT_ZONE_SIZE);
        let zone_capacity = self.zone_capacity.unwrap_or(zone_size);
        Geometry::new(GeometrySpec {
            model: self.model,
            size: self.size,
            zone_size,
            zone_capacity,
            nr_conventional: self.conventional_zones,
            block_size: self.block_size,
            max_open: self.max_open.unwrap_or(self.max_active),
            max_active: self.max_active,
            max_append: self.max_append.unwrap_or(default_append(zone_capacity)),
            zns: self.zns.zns(self.block_size),
        })
    }
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Created {
    /// The zones.
    pub geometry: Geometry,
    /// The zone table.
    pub sidecar: PathBuf,
    /// The image's identity.
    pub uuid: uuid::Uuid,
}

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The zones do not fit together.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// One of the files is there already.
    #[error("{path} exists already; remove it, choose another name, or say --force to replace it", path = .0.display())]
    Exists(PathBuf),
    /// Options that do not fit together.
    #[error("{0}")]
    Refused(String),
    /// The image's layout is none.
    #[error(transparent)]
    Layout(#[from] zbdkit_qcow2::Error),
    /// A file could not be made.
    #[error(transparent)]
    File(#[from] OpenError),
}

/// Makes an image of empty zones; it is durable when this returns. Nothing is left behind where it fails.
pub async fn create(host: &Arc<dyn Host>, options: &CreateOptions) -> Result<Created, CreateError> {
    let geometry = options.geometry()?;
    let path = &options.path;
    let sidecar = options.sidecar.clone().unwrap_or_else(|| default_sidecar(path));
    for file in [path, &sidecar] {
        let exists = host
            .exists(file)
            .map_err(|e| OpenError::file(file, "cannot be looked for", e))?;
        match (exists, options.force) {
            (true, false) => return Err(CreateError::Exists(file.clone())),
            (true, true) => replace(host, file)?,
            (false, _) => {}
        }
    }
    let uuid = make(host, options, &geometry, &sidecar).await?;
    Ok(Created {
        uuid,
        geometry,
        sidecar,
    })
}

/// Removes a file that nobody uses.
pub(crate) fn replace(host: &Arc<dyn Host>, path: &Path) -> Result<(), OpenError> {
    let failed = |error: HostError| host_error(path, "cannot be replaced", error);
    drop(host.open(path, &FileOptions::existing(false)).map_err(failed)?);
    host.remove(path).map_err(|e| failed(e.into()))
}

async fn make(
    host: &Arc<dyn Host>,
    options: &CreateOptions,
    geometry: &Geometry,
    sidecar: &Path,
) -> Result<uuid::Uuid, OpenError> {
    let path = &options.path;
    let data = host
        .open(path, &FileOptions::new_file())
        .map_err(|e| host_error(path, "cannot be created", e))?;
    let filled = fill(host, path, &data, geometry, sidecar).await;
    if filled.is_err() {
        // Nothing half made stays, and nothing goes that somebody else made in the meantime. What cannot be removed
        // either is named by the error that is returned.
        let _ = host.remove(path);
    }
    filled
}

async fn fill(
    host: &Arc<dyn Host>,
    path: &Path,
    data: &File,
    geometry: &Geometry,
    sidecar: &Path,
) -> Result<uuid::Uuid, OpenError> {
    let failed = |doing| move |source| OpenError::file(path, doing, source);
    data.set_len(geometry.size())
        .map_err(failed("cannot be made that large"))?;
    data.sync().await.map_err(failed("cannot be synced"))?;
    host.sync_name(path)
        .map_err(failed("its directory cannot be synced"))?;
    create_sidecar(host, sidecar, geometry, data).await
}
