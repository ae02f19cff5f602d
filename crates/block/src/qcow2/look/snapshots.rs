//! The zone tables of an image's snapshots: which can be used, and what is dropped of those that are damaged in part.

use zbdkit_io::File;
use zbdkit_qcow2::{Header, Qcow2, Snapshot, read_snapshots};
use zbdkit_spec::qcow2::ZONED_MAX_ZONES;
use zbdkit_zone::MAX_EXTENSION_SIZE;

use super::Look;
use crate::check::{ZoneCheck, drop_extensions};
use crate::qcow2::directory::{Directory, Frozen};
use crate::qcow2::ours::Ours;
use crate::qcow2::zones;
use crate::zoned::{Finding, Salvaged, Table, TableError, table_size};

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
    pub(super) async fn at(file: &File, header: &Header, directory: &Directory) -> Snapshots {
        let mut found = Snapshots::default();
        let snapshots: Vec<Snapshot> = read_snapshots(file, header).await.unwrap_or_default();
        for entry in &directory.entries {
            let why = if !snapshots.iter().any(|snapshot| snapshot.id == entry.id) {
                Some("there is no such snapshot".to_owned())
            } else if entry.table.1 > table_size(ZONED_MAX_ZONES, MAX_EXTENSION_SIZE) {
                Some("it is larger than it can be".to_owned())
            } else {
                match usable(file, entry).await {
                    Ok(table) => {
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
                    Err(error) => Some(error.to_string()),
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
        for (entry, _) in &self.snapshots.damaged {
            let mended = drop_damaged_of(image.file(), entry, found).await;
            mended.map_err(|e| format!("the zone table of snapshot {}: {e}", entry.id))?;
        }
        if self.directory.is_ok() && self.snapshots.unusable.is_empty() {
            return Ok(ours);
        }
        for (id, _) in &self.snapshots.unusable {
            directory = directory.without(id);
        }
        let bytes = directory.encode();
        let snapshots = match bytes.is_empty() {
            true => (0, 0),
            false => zones::place(image, &bytes).await.map_err(|e| e.to_string())?,
        };
        found.say("what cannot be used is taken out of the directory of the snapshots' zone tables".into());
        Ok(Ours { snapshots, ..ours })
    }
}

/// A snapshot's zone table, with what is wrong with it though it can be used.
async fn usable(file: &File, entry: &Frozen) -> Result<Salvaged, TableError> {
    let (offset, len) = entry.table;
    let mut table = Table::salvage(file.clone(), offset, len).await?;
    if let Some(error) = table.unusable() {
        return Err(error);
    }
    table.check_extensions().await?;
    Ok(table)
}

/// In its place: of each block one copy is whole at any moment.
async fn drop_damaged_of(file: &File, entry: &Frozen, found: &mut ZoneCheck) -> Result<(), TableError> {
    let Salvaged {
        mut table,
        mut records,
        findings,
    } = usable(file, entry).await?;
    drop_extensions(
        &format!("snapshot {}, ", entry.id),
        &findings,
        &mut records,
        found,
    );
    table.mend(&findings, &records).await
}
