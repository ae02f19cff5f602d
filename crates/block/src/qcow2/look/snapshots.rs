//! The zone tables of an image's snapshots: which can be used, and what is dropped of those that are damaged in part.

use zbdkit_io::File;
use zbdkit_qcow2::{Header, Qcow2, Snapshot, read_snapshots};
use zbdkit_zone::Geometry;

use super::Look;
use crate::check::{ZoneCheck, drop_extensions};
use crate::host::FileId;
use crate::qcow2::directory::{Directory, Frozen};
use crate::qcow2::ours::Ours;
use crate::qcow2::zones::{self, Known};
use crate::zoned::{Finding, Salvaged, Slots};

/// What is wrong with them. Snapshots go by their ids.
#[derive(Default)]
pub(super) struct Snapshots {
    /// Entries that cannot be used, and why.
    unusable: Vec<(String, String)>,
    /// Entries whose tables have damaged descriptor extensions, and can be used but for those.
    damaged: Vec<(Frozen, Vec<Finding>)>,
    /// Snapshots that have no entry.
    missing: Vec<String>,
}

impl Snapshots {
    /// Looks at the tables that a directory names.
    pub(super) async fn at(file: &File, header: &Header, directory: &Directory, ours: &Ours) -> Snapshots {
        let mut found = Snapshots::default();
        let snapshots: Vec<Snapshot> = read_snapshots(file, header).await.unwrap_or_default();
        for entry in &directory.entries {
            let why = if !snapshots.iter().any(|snapshot| snapshot.id == entry.id) {
                Some("there is no such snapshot".to_owned())
            } else {
                match usable(file, entry, ours).await {
                    Ok((table, _)) => {
                        let extensions: Vec<Finding> = table
                            .findings
                            .into_iter()
                            .filter(|finding| matches!(finding, Finding::Extension { .. }))
                            .collect();
                        if !extensions.is_empty() {
                            found.damaged.push((entry.clone(), extensions));
                        }
                        None
                    }
                    Err(error) => Some(error),
                }
            };
            found.unusable.extend(why.map(|why| (entry.id.clone(), why)));
        }
        let has_entry = |snapshot: &&Snapshot| directory.find(&snapshot.id).is_none();
        let missing = snapshots.iter().filter(has_entry);
        found.missing = missing.map(|snapshot| snapshot.id.clone()).collect();
        found
    }

    /// What is wrong, in words.
    pub(super) fn report(&self, found: &mut ZoneCheck) {
        for (id, why) in &self.unusable {
            found.error(format!("the zone table of snapshot {id} cannot be used: {why}"));
        }
        for (entry, extensions) in &self.damaged {
            for finding in extensions {
                found.error(format!("snapshot {}: {finding}", entry.id));
            }
        }
        for id in &self.missing {
            found.say(format!(
                "the zones of snapshot {id} are not known: it cannot be applied"
            ));
        }
    }
}

impl Look {
    /// Drops damaged extensions from tables that are good otherwise, and tables that are not from the directory.
    pub(super) async fn mend_snapshots(
        &self,
        image: &Qcow2,
        ours: Ours,
        found: &mut ZoneCheck,
    ) -> Result<Ours, String> {
        let mut directory = self.directory.clone().unwrap_or_default();
        if Some(ours.uuid) != self.ours.map(|ours| ours.uuid) && self.directory.is_ok() {
            // A new area is another image's to the snapshots' tables.
            return Ok(Ours {
                snapshots: (0, 0),
                ..ours
            });
        }
        let Snapshots {
            unusable, damaged, ..
        } = &self.snapshots;
        if self.directory.is_ok() && unusable.is_empty() && damaged.is_empty() {
            return Ok(ours);
        }
        for (entry, _) in damaged {
            let table = without_damaged(image, entry, &ours, found).await;
            let table = table.map_err(|e| format!("the zone table of snapshot {}: {e}", entry.id))?;
            let named = directory.entries.iter_mut().filter(|named| *named == entry);
            named.for_each(|named| named.table = table);
        }
        for (id, _) in unusable {
            directory = directory.without(id);
        }
        let bytes = directory.encode();
        let snapshots = match bytes.is_empty() {
            true => (0, 0),
            false => zones::place(image, &bytes).await.map_err(|e| e.to_string())?,
        };
        if self.directory.is_err() || !unusable.is_empty() {
            found.say(
                "what cannot be used is taken out of the directory of the snapshots' zone tables".into(),
            );
        }
        Ok(Ours { snapshots, ..ours })
    }
}

/// A snapshot's zone table, with what is wrong with it though it can be used.
async fn usable(file: &File, entry: &Frozen, ours: &Ours) -> Result<(Salvaged, Geometry), String> {
    let (mut table, geometry) = zones::read_frozen(file, entry, ours).await?;
    let checked = table.check_extensions().await;
    checked.map_err(|error| error.to_string())?;
    Ok((table, geometry))
}

/// Writes a table without the damaged extensions; where it lies. Not in the place of the old one: that has no epoch which
/// could be open meanwhile, so that a cut would leave it outdated. The directory switches from one to the other.
async fn without_damaged(
    image: &Qcow2,
    entry: &Frozen,
    ours: &Ours,
    found: &mut ZoneCheck,
) -> Result<(u64, u64), String> {
    let (table, geometry) = usable(image.file(), entry, ours).await?;
    let mut records = table.records;
    drop_extensions(
        &format!("snapshot {}, ", entry.id),
        &table.findings,
        &mut records,
        found,
    );
    let known = Known {
        geometry,
        records,
        slots: Slots::of(&table.table),
    };
    let made = zones::make_area(image, &known, ours.uuid, FileId::default(), |_| ()).await;
    made.map_err(|error| error.to_string())
}
