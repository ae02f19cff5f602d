//! New zone tables: beside an image, or inside one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use zbdkit_io::File;
use zbdkit_spec::sidecar::{Header, MAGIC, VERSION, VERSION_ZNS, ZNS_EXPLICIT_COMMIT};
use zbdkit_zone::{Geometry, GeometrySpec, Model, Zns, ZoneRecord, Zrwa};
use zerocopy::FromZeros;

use super::place::{Place, host_error};
use super::run_state::file_stamp;
use super::table::{RESERVED, Table, extension_size, reserve, slots_offset, table_size};
use crate::error::OpenError;
use crate::host::{FileId, FileOptions, Host};

/// Makes the sidecar of a new image whose zones are all empty, durable when this returns. The file must not exist, and
/// does not where this fails.
pub async fn create_sidecar(
    host: &Arc<dyn Host>,
    path: &Path,
    geometry: &Geometry,
    data: &File,
) -> Result<uuid::Uuid, OpenError> {
    let file = host
        .open(path, &FileOptions::new_file())
        .map_err(|e| host_error(path, "cannot be created", e))?;
    let filled = fill_sidecar(host, path, file, geometry, data).await;
    if filled.is_err() {
        // Only here is it certain that the file is ours.
        let _ = host.remove(path);
    }
    filled
}

async fn fill_sidecar(
    host: &Arc<dyn Host>,
    path: &Path,
    file: File,
    geometry: &Geometry,
    data: &File,
) -> Result<uuid::Uuid, OpenError> {
    let failed = |doing| move |source| OpenError::file(path, doing, source);
    let uuid = uuid::Uuid::new_v4();
    let data_id = host.identity(data).map_err(failed("cannot be identified"))?;
    let size = table_size(geometry.nr_zones(), geometry.extension_size());
    file.set_len(size).map_err(failed("cannot be made that large"))?;
    // The slots of descriptor extensions stay sparse: a full disk fails the command that sets one.
    reserve(&file, slots_offset(geometry.nr_zones()).min(RESERVED))
        .await
        .map_err(failed("gets no space"))?;
    let header = new_header(geometry, uuid, data_id);
    let table = Table::create(file, 0, header, &BTreeMap::new())
        .await
        .map_err(|e| Place::Sidecar(path.to_owned()).table_error(e))?;
    table.file().sync().await.map_err(failed("cannot be synced"))?;
    host.sync_name(path)
        .map_err(failed("its directory cannot be synced"))?;
    // Where the file system has extended attributes, a sidecar cannot be mistaken for another image's.
    host.set_image_id(data, uuid.into_bytes());
    Ok(uuid)
}

/// The header of a table that no epoch has opened.
pub fn new_header(geometry: &Geometry, uuid: uuid::Uuid, data: FileId) -> Box<Header> {
    let spec = geometry.spec();
    let mut header = Box::new(Header::new_zeroed());
    header.magic = MAGIC;
    // A table of a device without these things stays one that older programs read.
    header.version = match spec.zns {
        Zns::NONE => VERSION,
        _ => VERSION_ZNS,
    }
    .into();
    header.uuid = uuid.into_bytes();
    header.model = match spec.model {
        Model::HostManaged => 1,
        Model::HostAware => 2,
    };
    header.block_size = spec.block_size.into();
    header.size = spec.size.into();
    header.zone_size = spec.zone_size.into();
    header.zone_capacity = spec.zone_capacity.into();
    header.max_append = spec.max_append.into();
    header.nr_zones = geometry.nr_zones().into();
    header.nr_conventional = spec.nr_conventional.into();
    header.max_open = spec.max_open.into();
    header.max_active = spec.max_active.into();
    header.data_file = file_stamp(data);
    header.extension_size = spec.zns.extension_size.into();
    if let Some(zrwa) = spec.zns.zrwa {
        header.zrwa_size = zrwa.size.into();
        header.zrwa_granularity = zrwa.granularity.into();
        header.zrwa_count = zrwa.count.into();
        header.zns_flags = if zrwa.explicit_commit {
            ZNS_EXPLICIT_COMMIT
        } else {
            0
        };
    }
    header
}

/// What only Zoned Namespaces have, as a header says.
pub fn zns_of(header: &Header) -> Zns {
    if header.version.get() == VERSION {
        return Zns::NONE;
    }
    let zrwa = Zrwa {
        size: header.zrwa_size.get(),
        granularity: header.zrwa_granularity.get(),
        count: header.zrwa_count.get(),
        explicit_commit: header.zns_flags & ZNS_EXPLICIT_COMMIT != 0,
    };
    Zns {
        zrwa: (zrwa.size != 0).then_some(zrwa),
        extension_size: extension_size(header),
    }
}

/// The geometry that a header describes, or its model that nobody knows.
pub fn spec_of(header: &Header) -> Result<GeometrySpec, u8> {
    let model = match header.model {
        1 => Model::HostManaged,
        2 => Model::HostAware,
        model => return Err(model),
    };
    Ok(GeometrySpec {
        model,
        size: header.size.get(),
        zone_size: header.zone_size.get(),
        zone_capacity: header.zone_capacity.get(),
        nr_conventional: header.nr_conventional.get(),
        block_size: header.block_size.get(),
        max_open: header.max_open.get(),
        max_active: header.max_active.get(),
        max_append: header.max_append.get(),
        zns: zns_of(header),
    })
}

/// Zone records by the zone's number; the zones that are not among them are empty and untouched.
pub type Records = BTreeMap<u32, ZoneRecord>;
