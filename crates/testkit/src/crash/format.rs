//! What of the interfaces below depends on an image's format.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use zbdkit_block::{
    CreateOptions, Device, Graph, Host, OpenOptions, Qcow2CreateOptions, Qcow2Layout, create,
    create_qcow2 as make,
};
use zbdkit_qcow2::Repair;

use super::steps::Step;

/// Makes a raw image with its zone table.
pub async fn create_raw(host: &Arc<dyn Host>, path: &Path, zones: &CreateOptions) -> Result<(), String> {
    let options = CreateOptions {
        path: path.to_owned(),
        ..zones.clone()
    };
    create(host, &options).await.map_err(|error| error.to_string())?;
    Ok(())
}

/// Makes a qcow2 image with zones; over a base with those of the base.
pub async fn create_qcow2(
    host: &Arc<dyn Host>,
    path: &Path,
    zones: &CreateOptions,
    layout: &Qcow2Layout,
    base: Option<&Path>,
) -> Result<(), String> {
    let mut options = Qcow2CreateOptions::new(path, zones.size);
    options.layout = layout.clone();
    match base {
        None => options.zones = Some(zones.clone()),
        Some(base) => {
            let format = if base.extension().is_some_and(|e| e == "qcow2") {
                "qcow2"
            } else {
                "raw"
            };
            let name = base
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            options.layout.backing = Some((name, Some(format.into())));
            options.size = None;
        }
    }
    make(host, &options).await.map_err(|error| error.to_string())?;
    Ok(())
}

/// What a check of a qcow2 image found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Contradictions, and places that could not be checked.
    pub corruptions: u64,
    /// Clusters that nothing refers to.
    pub leaks: u64,
    /// What was found.
    pub messages: Vec<String>,
}

impl Found {
    /// Nothing is wrong but lost clusters.
    pub fn sound(&self) -> Result<(), String> {
        if self.corruptions == 0 {
            return Ok(());
        }
        // Lost clusters are told the same way, and there may be many.
        let wrong: Vec<_> = self
            .messages
            .iter()
            .filter(|text| !text.starts_with("Leaked"))
            .collect();
        Err(format!(
            "{} things in the image are corrupt: {wrong:?}",
            self.corruptions
        ))
    }
}

/// Checks an image, zones included, and repairs all that it can if so wished.
pub async fn check(host: &Arc<dyn Host>, path: &Path, repair: bool) -> Result<Found, String> {
    let options = OpenOptions {
        lock_wait: Duration::ZERO,
        ..OpenOptions::default()
    };
    let repair = if repair { Repair::All } else { Repair::None };
    let checked = zbdkit_block::check(host, &Graph::from_path(path), &options, repair, &mut |_, _| {}).await;
    let checked = checked.map_err(|error| format!("it cannot be checked: {error}"))?;
    let report = checked.report.ok_or("it was not taken for qcow2")?;
    let zones = checked.zones.ok_or("its zones were not checked")?;
    // Without errors they only say what the next opening will do.
    let zone_errors = zones.messages.into_iter().filter(|_| zones.errors > 0);
    Ok(Found {
        corruptions: report.corruptions + report.check_errors + zones.errors,
        leaks: report.leaks,
        messages: report.messages.into_iter().chain(zone_errors).collect(),
    })
}

/// The names of an image's snapshots.
pub async fn snapshots(device: &Device) -> Result<Vec<String>, String> {
    let list = device
        .snapshots()
        .await
        .map_err(|error| format!("no list of snapshots: {error}"))?;
    Ok(list.into_iter().map(|snapshot| snapshot.name).collect())
}

/// Makes, applies or deletes a snapshot.
pub async fn step(device: &Device, step: &Step) -> Result<(), String> {
    let done = match step {
        Step::Create(name) => device.snapshot_create(name).await.map(drop),
        Step::Apply(name) => device.snapshot_apply(name).await,
        Step::Delete(name) => device.snapshot_delete(name).await,
    };
    done.map_err(|error| error.to_string())
}
