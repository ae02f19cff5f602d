//! What is wrong with the zones of an image, and how it is made good.
//!
//! Whatever of the tables can be read is used, in this order: the area (either copy), the bare table, and as the last
//! resort where the data of a zone ends. What was taken from where is said. Clusters of tables that are replaced are not
//! freed here: who cannot be believed may name anybody's. The check that follows finds them leaked.

mod snapshots;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use zbdkit_io::File;
use zbdkit_qcow2::{Header, Qcow2};
use zbdkit_spec::qcow2::{AUTOCLEAR_ZONE_TABLE, INCOMPAT_ZONED, ZONED_MAX_ZONES};
use zbdkit_zone::{Geometry, MAX_EXTENSION_SIZE, ZoneRecord, Zrwa};

use super::directory::Directory;
use super::extension::{self, Draft, Zones};
use super::node::Qcow2Node;
use super::ours::{self, Ours};
use super::words;
use super::zones::{self, Known};
use crate::check::{ZoneCheck, data_end, drop_extensions, tell, tell_forgotten, tell_lost_marks};
use crate::host::Host;
use crate::zoned::{
    Finding, Mirror, Records, Salvaged, Slots, Table, bare_words, is_beyond_bare_tables, marks_place,
    read_at, spec_of, table_size, zones_of,
};

use self::snapshots::Snapshots;

/// Everything that can be known of an image's zones without believing any of it.
pub struct Look {
    /// Our autoclear bit is set: the area is the truth.
    trusted: bool,
    /// What the zoned extension says, if it makes sense.
    zones: Result<Zones, String>,
    /// The zoned extension would make sense if its feature bit were set.
    bit_is_clear: bool,
    ours: Option<Ours>,
    area: Result<Salvaged, String>,
    /// What the bare table says: the records of zones whose words make sense, and what is wrong with the others.
    bare: Option<(Records, BTreeMap<u32, String>)>,
    directory: Result<Directory, String>,
    snapshots: Snapshots,
}

impl Look {
    /// Looks at an image. `None` where nothing says that it has zones.
    pub async fn at(file: &File, header: &Header) -> Option<Look> {
        let trusted = header.autoclear & AUTOCLEAR_ZONE_TABLE != 0;
        let len = file.len().unwrap_or(0);
        let mut with_bit = header.clone();
        with_bit.incompatible |= INCOMPAT_ZONED;
        let (zones, bit_is_clear) = match extension::zones(header, len) {
            Ok(None) if !trusted => return None,
            Ok(None) => (Err("the image says that it has no zones".into()), false),
            Ok(Some(zones)) => (Ok(zones), false),
            Err(error) => match extension::zones(&with_bit, len) {
                Ok(Some(zones)) => (Ok(zones), true),
                _ => (Err(error), false),
            },
        };
        let ours = Ours::find(header).filter(|_| trusted);
        let area = match &ours {
            Some(ours) => salvage(file, ours, header).await,
            None if trusted => Err("the header extension that names the zone table is damaged".into()),
            None if Ours::find(header).is_none() => Err("the image has no zone table of zbdkit yet".into()),
            None => Err("a program that does not know zbdkit's zone table wrote to the image".into()),
        };
        let bare = match &zones {
            Ok(zones) => read_at(file, zones.table_offset, zones.table_len() as usize)
                .await
                .ok()
                .map(|bytes| words::salvage(zones, header.size, &bytes)),
            Err(_) => None,
        };
        let mut look = Look {
            trusted,
            zones,
            bit_is_clear,
            ours,
            area,
            bare,
            directory: Ok(Directory::default()),
            snapshots: Snapshots::default(),
        };
        if let Some(ours) = look.ours {
            look.directory = Directory::load(file, ours.snapshots).await;
            if let Ok(directory) = &look.directory {
                look.snapshots = Snapshots::at(file, header, directory, &ours).await;
            }
        }
        Some(look)
    }

    /// The clusters that the format does not find itself.
    pub fn areas(&self) -> Vec<(Range<u64>, &'static str)> {
        let range = |(offset, len): (u64, u64)| offset..offset.saturating_add(len);
        let mut areas = Vec::new();
        if let (true, Ok(zones)) = (self.bit_is_clear, &self.zones) {
            // The format does not look at it then, and must not take its clusters for leaked.
            areas.push((range((zones.table_offset, zones.table_len())), "zoned metadata"));
        }
        let Some(ours) = &self.ours else { return areas };
        areas.push((range(ours.area), "zone table"));
        if ours.snapshots != (0, 0) {
            areas.push((range(ours.snapshots), "directory of zone tables"));
        }
        if let Ok(area) = &self.area {
            let marks = marks_place(area.table.header(), area.table.base());
            let marks = marks.ok().flatten();
            areas.extend(marks.map(|marks| (range(marks), zones::MARKS_NAME)));
        }
        if let Ok(directory) = &self.directory {
            let frozen = directory.entries.iter();
            areas.extend(frozen.map(|frozen| (range(frozen.table), "zone table of a snapshot")));
        }
        areas
    }

    /// Whether those are all.
    pub fn knows_areas(&self) -> bool {
        // The area names the list of marked blocks.
        !self.trusted || (self.ours.is_some() && self.directory.is_ok() && self.area.is_ok())
    }

    /// What is wrong, in words.
    pub fn report(&self) -> ZoneCheck {
        let mut found = ZoneCheck::default();
        match &self.zones {
            Err(error) => found.error(error.clone()),
            Ok(_) if self.bit_is_clear => found.error(
                "the image has zones, but its feature bit 5 (\"zoned format\") is clear: a program that does not know zones \
                 may have written to it"
                    .into(),
            ),
            Ok(_) => {}
        }
        match &self.area {
            Ok(area) => tell(area, &mut found),
            Err(error) if self.trusted => found.error(error.clone()),
            Err(error) => found.say(format!("{error}: its write pointers are those of the bare table")),
        }
        self.report_bare(&mut found);
        if let Err(error) = &self.directory {
            found.error(error.clone());
        }
        self.snapshots.report(&mut found);
        found
    }

    fn report_bare(&self, found: &mut ZoneCheck) {
        let Some((_, faults)) = &self.bare else {
            if self.zones.is_ok() {
                found.error("the bare table of write pointers cannot be read".into());
            }
            return;
        };
        match &self.area {
            // It may be behind while an epoch is open, and after a power cut be anything.
            Ok(area) if area.table.header().open != 0 => {}
            Ok(area) => {
                let differ = self.differing(area);
                if let Some(first) = differ.first() {
                    found.error(format!(
                        "the bare table of write pointers differs from the zone table in {} zones, the first is {first}",
                        differ.len()
                    ));
                }
            }
            Err(_) => faults.values().for_each(|fault| found.error(fault.clone())),
        }
    }

    /// The zones of which the bare table says something else.
    fn differing(&self, area: &Salvaged) -> Vec<u32> {
        let (Some((records, faults)), Some(geometry)) = (&self.bare, geometry_of(area)) else {
            return Vec::new();
        };
        let empty = ZoneRecord::default();
        let lost = |zone: u32| {
            area.findings
                .iter()
                .any(|f| matches!(f, Finding::Lost { index } if zones_of(*index, geometry.nr_zones()).contains(&zone)))
        };
        let end = |zone, records: &Records| {
            crate::zoned::bare_word(&geometry, zone, records.get(&zone.0).unwrap_or(&empty))
        };
        geometry
            .zones()
            .filter(|zone| faults.contains_key(&zone.0) || end(*zone, records) != end(*zone, &area.records))
            .filter(|zone| !lost(zone.0))
            .map(|zone| zone.0)
            .collect()
    }

    /// Makes good what is wrong. The image is open for writing, its zones are not. The error is for the user.
    pub async fn mend(
        self,
        host: &Arc<dyn Host>,
        node: &Qcow2Node,
        path: &Path,
        found: &mut ZoneCheck,
    ) -> Result<(), String> {
        let image = node.image();
        let mended = self.mend_tables(host, node, path, found).await;
        let closed = image.close().await.map_err(|e| e.to_string());
        mended.and(closed)
    }

    async fn mend_tables(
        mut self,
        host: &Arc<dyn Host>,
        node: &Qcow2Node,
        path: &Path,
        found: &mut ZoneCheck,
    ) -> Result<(), String> {
        let image = node.image();
        let size = image.size();
        let area = std::mem::replace(&mut self.area, Err(String::new()));
        let area = area.ok().filter(|area| area.table.header().size.get() == size);
        let (known, ours) = match (area, &self.ours) {
            (Some(area), Some(ours)) => (self.mend_area(area, node, found).await?, *ours),
            _ => self.make_area(host, node, path, found).await?,
        };
        extension::expressible(&known.geometry, image.cluster_size())?;
        let zones = self.mend_bare(image, &known, found).await?;
        let ours = self.mend_snapshots(image, ours, found).await?;
        let states = known.records.values().any(is_beyond_bare_tables);
        image
            .update_header(|header| {
                ours::put(header, &zones, &ours, states);
                Ok(())
            })
            .await
            .map_err(|e| e.to_string())
    }

    /// Repairs the area in its place; an epoch that is open stays so, and is recovered by the next opening.
    async fn mend_area(
        &self,
        area: Salvaged,
        node: &Qcow2Node,
        found: &mut ZoneCheck,
    ) -> Result<Known, String> {
        let Salvaged {
            mut table,
            mut records,
            findings,
        } = area;
        let header = *table.header();
        let spec = spec_of(&header).map_err(|model| format!("zone model {model} is not known"))?;
        let geometry = Geometry::new(spec).map_err(|e| e.to_string())?;
        drop_extensions("", &findings, &mut records, found);
        for finding in &findings {
            match finding {
                Finding::Lost { index } => {
                    for zone in zones_of(*index, geometry.nr_zones()) {
                        self.restore(&geometry, zone, &mut records, node, found).await?;
                    }
                }
                Finding::Outdated => {
                    let told = tell_forgotten(&table, found).await;
                    told.map_err(|e| e.to_string())?;
                    self.bring_up_to_date(&geometry, &mut records, found);
                }
                _ => {}
            }
        }
        tell_lost_marks(&findings, found);
        if !findings.is_empty() {
            let mended = table.mend(&findings, &records).await;
            mended.map_err(|e| e.to_string())?;
            found.say("both copies of the zone table were made whole again".into());
        }
        Ok(Known {
            geometry,
            records,
            slots: Slots::of(&table),
        })
    }

    /// The newest copies of some blocks are gone: the bare table, which was brought up to date before the image was
    /// closed, tells which zones are meant.
    fn bring_up_to_date(&self, geometry: &Geometry, records: &mut Records, found: &mut ZoneCheck) {
        let Some((bare, faults)) = &self.bare else { return };
        let empty = ZoneRecord::default();
        for zone in geometry.zones().filter(|zone| !faults.contains_key(&zone.0)) {
            let word = |records: &Records| {
                crate::zoned::bare_word(geometry, zone, records.get(&zone.0).unwrap_or(&empty))
            };
            if word(bare) != word(records) {
                let written = bare.get(&zone.0).map_or(0, |record| record.written);
                let record = records.entry(zone.0).or_default();
                let had_area = record.zrwa;
                // A reset is in both copies, so the zone was only written since, and keeps its area while it can have one.
                let keeps = had_area && written > record.written && written < geometry.capacity(zone);
                let fits = |area: Zrwa| written.is_multiple_of(area.granularity);
                let zrwa = keeps && geometry.zrwa().is_some_and(fits);
                (record.written, record.finished, record.zrwa) = (written, false, zrwa);
                found.say(format!(
                    "zone {zone}: its write pointer is taken from the bare table, {:#x}",
                    geometry.start(zone) + written
                ));
                if had_area && !zrwa && written < geometry.capacity(zone) {
                    found.say(format!(
                        "zone {zone}: it has lost its random write area, with what was written in it above the write pointer"
                    ));
                }
            }
        }
    }

    /// One zone whose record is lost: what the bare table says of it, else where its data ends.
    async fn restore(
        &self,
        geometry: &Geometry,
        zone: u32,
        records: &mut Records,
        node: &Qcow2Node,
        found: &mut ZoneCheck,
    ) -> Result<(), String> {
        let no = zbdkit_zone::ZoneNo(zone);
        if geometry.is_conventional(no) {
            return Ok(());
        }
        let bare = self
            .bare
            .as_ref()
            .filter(|(_, faults)| !faults.contains_key(&zone));
        let fits = |written: &u64| written.is_multiple_of(geometry.block_size().into());
        let told = bare.map(|(records, _)| records.get(&zone).map_or(0, |record| record.written));
        let start = geometry.start(no);
        let written = match told.filter(fits) {
            Some(written) => {
                if written != 0 {
                    found.say(format!(
                        "zone {zone}: its write pointer is taken from the bare table, {:#x}",
                        start + written
                    ));
                }
                written
            }
            None => {
                let end = start + geometry.capacity(no);
                let data = data_end(node, start, end, geometry.block_size().into()).await;
                let end = data.map_err(|e| e.to_string())?;
                found.say(format!(
                    "zone {zone}: nothing tells its write pointer any more; it is set to {end:#x}, behind the last data that \
                     is not zeros"
                ));
                end - start
            }
        };
        match written {
            0 => drop(records.remove(&zone)),
            written => {
                let record = ZoneRecord {
                    written,
                    ..ZoneRecord::default()
                };
                records.insert(zone, record);
            }
        }
        Ok(())
    }

    /// Makes a new area, from what the bare table says.
    async fn make_area(
        &self,
        host: &Arc<dyn Host>,
        node: &Qcow2Node,
        path: &Path,
        found: &mut ZoneCheck,
    ) -> Result<(Known, Ours), String> {
        let image = node.image();
        let zones = self.zones.as_ref().map_err(|error| {
            format!("neither the zoned header extension nor the zone table can be read ({error}): the zones are lost")
        })?;
        let header = image.header().await;
        let bare = self.bare.clone().unwrap_or_default();
        let geometry = zones::geometry_for(image.file(), &header, zones, &bare.0)
            .await
            .map_err(|e| e.to_string())?;
        let mut records = bare.0;
        for zone in bare.1.keys() {
            self.restore(&geometry, *zone, &mut records, node, found).await?;
        }
        let known = Known {
            geometry,
            records,
            slots: None,
        };
        let data = host
            .identity(image.data_file())
            .map_err(|e| format!("{}: {e}", path.display()))?;
        let uuid = uuid::Uuid::new_v4();
        let area = zones::make_area(image, &known, uuid, data, |_| ()).await;
        let area = area.map_err(|e| e.to_string())?;
        if self.trusted {
            found.say(
                "a new zone table was made from the bare table of write pointers: counters, how far finished zones were \
                 written, zones made read-only or offline, random write areas, descriptor extensions, attributes, which \
                 blocks were marked uncorrectable, and the zones of snapshots are lost, and writes since the last flush may \
                 be"
                    .into(),
            );
        }
        let ours = Ours {
            area,
            snapshots: (0, 0),
            uuid,
        };
        Ok((known, ours))
    }

    /// The bare table says what the records say: in its place, or in a new one if there is none that could.
    async fn mend_bare(&self, image: &Qcow2, known: &Known, found: &mut ZoneCheck) -> Result<Zones, String> {
        let place = match &self.zones {
            Ok(zones)
                if zones.draft == Draft::C
                    && zones.nr_zones == known.geometry.nr_zones()
                    && zones.table_offset.is_multiple_of(image.cluster_size()) =>
            {
                let mirror = Mirror::load(image.file().clone(), zones.table_offset, known.geometry).await;
                let mut mirror = mirror.map_err(|e| e.to_string())?;
                let changed = mirror.repair(&known.records).await.map_err(|e| e.to_string())?;
                if changed != 0 {
                    found.say(format!(
                        "{changed} words of the bare table of write pointers were repaired"
                    ));
                }
                zones.table_offset
            }
            _ => {
                let words = bare_words(&known.geometry, &known.records);
                let (offset, _) = zones::place(image, &words).await.map_err(|e| e.to_string())?;
                found.say("a new bare table of write pointers was made".into());
                offset
            }
        };
        Ok(Zones::of(&known.geometry, place))
    }
}

/// Whether the zoned extension says something, with its feature bit or without.
pub fn zones_make_sense(header: &Header, file: &File) -> bool {
    let mut with_bit = header.clone();
    with_bit.incompatible |= INCOMPAT_ZONED;
    matches!(extension::zones(&with_bit, file.len().unwrap_or(0)), Ok(Some(_)))
}

async fn salvage(file: &File, ours: &Ours, header: &Header) -> Result<Salvaged, String> {
    if ours.area.1 > table_size(ZONED_MAX_ZONES, MAX_EXTENSION_SIZE) {
        return Err(format!(
            "a zone table of {} bytes is larger than it can be",
            ours.area.1
        ));
    }
    let salvaged = Table::salvage(file.clone(), ours.area.0, ours.area.1).await;
    let mut salvaged = salvaged.map_err(|error| error.to_string())?;
    let damaged = salvaged.check_extensions().await;
    damaged.map_err(|error| error.to_string())?;
    let table = salvaged.table.header();
    if table.uuid != ours.uuid.into_bytes() {
        return Err("the zone table is another image's".into());
    }
    if table.size.get() != header.size {
        return Err(format!(
            "the zone table is of a device of {} bytes, the image of one of {}",
            table.size.get(),
            header.size
        ));
    }
    Ok(salvaged)
}

fn geometry_of(area: &Salvaged) -> Option<Geometry> {
    Geometry::new(spec_of(area.table.header()).ok()?).ok()
}
