//! The files of a copy's target.

use std::path::Path;
use std::sync::Arc;

use zbdkit_io::{File, IoBuf};
use zbdkit_spec::sidecar;
use zbdkit_zone::{Engine, Geometry};

use super::ToolError;
use super::zones::{check_records, misfit};
use crate::create::{CreateError, replace};
use crate::device::Device;
use crate::error::OpenError;
use crate::host::{FileOptions, Host};
use crate::zoned::{default_sidecar, host_error};

/// Makes a file of `size` zero bytes, a disk without zones; durable when this returns. Nothing is left behind where it
/// fails. With `force` it takes the place of an image that nobody uses, and of that one's zone table.
pub async fn create_plain(
    host: &Arc<dyn Host>,
    path: &Path,
    size: u64,
    force: bool,
) -> Result<(), CreateError> {
    if exists(host, path)? {
        if !force {
            return Err(CreateError::Exists(path.to_owned()));
        }
        replace(host, path)?;
    }
    clear_table(host, path).await?;
    let file = host
        .open(path, &FileOptions::new_file())
        .map_err(|e| host_error(path, "cannot be created", e))?;
    let filled = fill(host, path, &file, size).await;
    if filled.is_err() {
        let _ = host.remove(path);
    }
    Ok(filled?)
}

/// Removes the zone table that an earlier image of that name has left: it would be taken for the new one's. Another file
/// of the table's name is an error.
pub async fn clear_table(host: &Arc<dyn Host>, path: &Path) -> Result<(), CreateError> {
    let table = default_sidecar(path);
    if exists(host, &table)? {
        if !is_table(host, &table).await? {
            return Err(CreateError::Exists(table));
        }
        replace(host, &table)?;
    }
    Ok(())
}

fn exists(host: &Arc<dyn Host>, path: &Path) -> Result<bool, OpenError> {
    host.exists(path)
        .map_err(|e| OpenError::file(path, "cannot be looked for", e))
}

async fn fill(host: &Arc<dyn Host>, path: &Path, file: &File, size: u64) -> Result<(), OpenError> {
    let failed = |doing| move |source| OpenError::file(path, doing, source);
    file.set_len(size).map_err(failed("cannot be made that large"))?;
    file.sync().await.map_err(failed("cannot be synced"))?;
    host.sync_name(path)
        .map_err(failed("its directory cannot be synced"))
}

async fn is_table(host: &Arc<dyn Host>, path: &Path) -> Result<bool, OpenError> {
    let file = host
        .open(path, &FileOptions::existing(true))
        .map_err(|e| host_error(path, "cannot be opened", e))?;
    let buf = IoBuf::alloc(sidecar::MAGIC.len());
    Ok(file.read(buf.clone(), 0).await.is_ok() && buf.to_vec() == sidecar::MAGIC)
}

/// Removes a target that could not be finished, as far as it is there.
pub fn remove_target(host: &Arc<dyn Host>, path: &Path, sidecar: Option<&Path>) {
    for path in std::iter::once(path).chain(sidecar) {
        if let Err(error) = host.remove(path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!("{}: could not be removed: {error}", path.display());
        }
    }
}

/// Whether a device of that geometry could take over the zones of `source`; to be asked before a target is made.
///
/// # Errors
/// Refused: why not.
pub fn check_zones(source: &Device, geometry: &Geometry) -> Result<(), ToolError> {
    let Some(from) = source.engine() else {
        return Ok(());
    };
    if let Some(problem) = misfit(from.geometry(), geometry) {
        return Err(ToolError::Refused(problem));
    }
    let ours = from.geometry().nr_zones();
    let record = |zone: zbdkit_zone::ZoneNo| match zone.0 < ours {
        true => from.record(zone),
        false => zbdkit_zone::ZoneRecord::default(),
    };
    let target = Engine::new(*geometry, record)
        .map_err(|error| ToolError::Refused(format!("the zones do not fit: {error}")))?;
    check_records(from, &target)
}
