//! What is done to an opened image while no request is under way: internal snapshots, and another size.
//!
//! An image with zones has its zone table snapshotted with it. Everything that will be named is written and synced first;
//! one write of the header's first sector then switches mapping, tables and directory together, so that a cut finds
//! all of the old or all of the new. After an operation that replaced the zone table (a snapshot applied, another
//! size) the device can only be closed.

use std::time::SystemTime;

use zbdkit_qcow2::{Header, Preallocation, Qcow2, Snapshot};
use zbdkit_zone::{Geometry, GeometrySpec, ZoneNo, ZoneRecord, ZoneType};

use super::directory::{Directory, Frozen};
use super::extension::{self, Zones};
use super::node::Qcow2Node;
use super::ours::{self, Ours};
use super::zones::{self, Described, Known, Tables};
use crate::device::Device;
use crate::error::Error;
use crate::graph::format_size;
use crate::host::FileId;
use crate::marks::Marks;
use crate::node::Node;
use crate::zoned::{Records, Table, ZonedNode, is_beyond_bare_tables};

impl Device {
    /// The internal snapshots of the image.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>, Error> {
        Ok(self.snapshotted()?.image().snapshots().await?)
    }

    /// Makes an internal snapshot of data and zones. No request may be under way; the device goes on.
    pub async fn snapshot_create(&self, name: &str) -> Result<Snapshot, Error> {
        let node = self.snapshotted()?;
        let now = SystemTime::now();
        match self.zoned_node() {
            Some(zoned) => Offline::begin(zoned, node).await?.create(name, now).await,
            None => Ok(node.image().snapshot_create(name, now, |_, _| Ok(())).await?),
        }
    }

    /// Makes data and zones what they were at a snapshot, by id or name, and the device as large as it was then. What they
    /// are now is lost. No request may be under way, and the device can only be closed afterwards.
    pub async fn snapshot_apply(&self, wanted: &str) -> Result<(), Error> {
        let node = self.snapshotted()?;
        match self.zoned_node() {
            Some(zoned) => Offline::begin(zoned, node).await?.apply(wanted).await,
            None => Ok(node.image().snapshot_apply(wanted, |_| Ok(())).await?),
        }
    }

    /// Deletes a snapshot, by id or name. No request may be under way; the device goes on.
    pub async fn snapshot_delete(&self, wanted: &str) -> Result<(), Error> {
        let node = self.snapshotted()?;
        match self.zoned_node() {
            Some(zoned) => Offline::begin(zoned, node).await?.delete(wanted).await,
            None => Ok(node.image().snapshot_delete(wanted, |_| Ok(())).await?),
        }
    }

    /// Makes the device larger, or with `shrink` smaller. A device with zones keeps what they hold: it grows by whole zones
    /// (and a short last one may stay one), and shrinks only by zones that are empty. No request may be under way, and the
    /// device can only be closed afterwards.
    pub async fn resize(&self, size: u64, shrink: bool, preallocation: Preallocation) -> Result<(), Error> {
        let Some(node) = self.qcow2_node() else {
            return Err(Error::NotSupported("resizing an image that is not qcow2"));
        };
        match self.zoned_node() {
            Some(zoned) => {
                let offline = Offline::begin(zoned, node).await?;
                offline.resize(size, shrink, preallocation).await
            }
            None => Ok(node.image().resize(size, shrink, preallocation).await?),
        }
    }

    fn snapshotted(&self) -> Result<&Qcow2Node, Error> {
        self.qcow2_node()
            .ok_or(Error::NotSupported("an internal snapshot"))
    }
}

/// The work on one image with zones.
struct Offline<'a> {
    zoned: &'a ZonedNode,
    node: &'a Qcow2Node,
    described: Described,
    ours: Ours,
}

impl<'a> Offline<'a> {
    /// Everything that was acknowledged is durable and in the table, and nothing goes on in the background.
    async fn begin(zoned: &'a ZonedNode, node: &'a Qcow2Node) -> Result<Offline<'a>, Error> {
        let image = node.image();
        if image.is_read_only() {
            return Err(Error::ReadOnly);
        }
        zoned.settle().await?;
        node.quiet().await;
        let header = image.header().await;
        let described = Described::of(image.file(), &header)
            .await
            .map_err(zones::refused)?
            .ok_or_else(|| zones::refused("the image has no zones any more"))?;
        let ours = described
            .ours
            .ok_or_else(|| zones::refused("the image has no zone table of zbdkit any more"))?;
        Ok(Offline {
            zoned,
            node,
            described,
            ours,
        })
    }

    /// A list of marked blocks is the image's as it is now: no other table has one.
    fn refuse_marks(&self, what: &str) -> Result<(), Error> {
        match self.zoned.marks().map(Marks::list) {
            Some(list) if !list.is_empty() => Err(zones::refused(format!(
                "{what} while blocks are marked uncorrectable, the first at offset {}: write them again, or reset their \
                 zones, first",
                list.ranges()[0].start
            ))),
            _ => Ok(()),
        }
    }

    fn image(&self) -> &Qcow2 {
        self.node.image()
    }

    fn geometry(&self) -> &Geometry {
        self.zoned.engine().geometry()
    }

    fn records(&self) -> Records {
        let engine = self.zoned.engine();
        self.geometry()
            .zones()
            .map(|zone| (zone.0, engine.record(zone)))
            .filter(|(_, record)| *record != Default::default())
            .collect()
    }

    async fn create(&self, name: &str, now: SystemTime) -> Result<Snapshot, Error> {
        self.refuse_marks("no snapshot can be made")?;
        self.drop_ahead().await?;
        let id = self.image().next_snapshot_id().await?;
        let known = Known {
            geometry: *self.geometry(),
            records: self.records(),
            slots: self.zoned.slots().cloned(),
        };
        let table = zones::make_area(self.image(), &known, self.ours.uuid, FileId::default(), |_| ()).await?;
        let frozen = Frozen {
            id: id.clone(),
            table,
        };
        let Some(directory) = self.described.directory.with(frozen) else {
            zones::free(self.image(), table).await;
            return Err(zones::refused(format!(
                "{id:?} is no id for a snapshot with zones"
            )));
        };
        let made = self
            .switch_directory(&directory, async |ours: Ours| {
                self.image()
                    .snapshot_create(name, now, |header, snapshot| {
                        if snapshot.id != id {
                            return Err(zbdkit_qcow2::Error::Refused(
                                "another snapshot was made meanwhile".into(),
                            ));
                        }
                        ours.put(header);
                        Ok(())
                    })
                    .await
            })
            .await;
        if made.is_err() {
            zones::free(self.image(), table).await;
        }
        Ok(made?)
    }

    /// Unmaps what was mapped ahead of the zones' data: a snapshot would hold it for ever.
    async fn drop_ahead(&self) -> Result<(), Error> {
        let (geometry, cluster_size) = (self.geometry(), self.image().cluster_size());
        for zone in geometry.zones() {
            if geometry.zone_type(zone) != ZoneType::SequentialRequired {
                continue;
            }
            let written = geometry.data_end(zone, &self.zoned.engine().record(zone));
            let (start, end) = (written.next_multiple_of(cluster_size), geometry.end(zone));
            if start < end {
                self.image().discard(start, end - start).await?;
            }
        }
        Ok(self.image().flush().await?)
    }

    async fn delete(&self, wanted: &str) -> Result<(), Error> {
        let Some(id) = self.id_of(wanted).await? else {
            // Which fails, in its own words.
            return Ok(self.image().snapshot_delete(wanted, |_| Ok(())).await?);
        };
        let old = &self.described.directory;
        let frozen = old.find(&id).map(|frozen| frozen.table);
        self.switch_directory(&old.without(&id), async |ours: Ours| {
            let also = |header: &mut Header| {
                ours.put(header);
                Ok(())
            };
            self.image().snapshot_delete(&id, also).await
        })
        .await?;
        if let Some(table) = frozen {
            zones::free(self.image(), table).await;
        }
        Ok(self.image().flush().await?)
    }

    /// Writes another directory, lets `switch` make the header name it, and frees the one that is not named any more.
    async fn switch_directory<T>(
        &self,
        directory: &Directory,
        switch: impl AsyncFnOnce(Ours) -> Result<T, zbdkit_qcow2::Error>,
    ) -> Result<T, zbdkit_qcow2::Error> {
        let bytes = directory.encode();
        let place = match bytes.is_empty() {
            true => (0, 0),
            false => zones::place(self.image(), &bytes).await?,
        };
        let new = Ours {
            snapshots: place,
            ..self.ours
        };
        let switched = switch(new).await;
        let unnamed = if switched.is_ok() {
            self.ours.snapshots
        } else {
            place
        };
        if unnamed != (0, 0) {
            zones::free(self.image(), unnamed).await;
        }
        switched
    }

    async fn apply(&self, wanted: &str) -> Result<(), Error> {
        let Some(id) = self.id_of(wanted).await? else {
            let refuse = |_: &mut Header| Err(zbdkit_qcow2::Error::Refused(format!("no snapshot {wanted}")));
            return Ok(self.image().snapshot_apply(wanted, refuse).await?);
        };
        let known = self
            .described
            .frozen(self.image().file(), &id, &self.ours)
            .await
            .map_err(zones::refused)?;
        extension::expressible(&known.geometry, self.image().cluster_size()).map_err(zones::refused)?;
        let also = async |change: &mut dyn FnMut(&mut Header)| {
            let also = |header: &mut Header| {
                if header.size != known.geometry.size() {
                    return Err(zbdkit_qcow2::Error::Refused(format!(
                        "snapshot {id} is of {}, its zone table of {}: one of them is damaged",
                        format_size(header.size),
                        format_size(known.geometry.size())
                    )));
                }
                change(header);
                Ok(())
            };
            self.image().snapshot_apply(&id, also).await
        };
        self.replace_tables(&known, also).await
    }

    async fn resize(&self, size: u64, shrink: bool, preallocation: Preallocation) -> Result<(), Error> {
        self.refuse_marks("the size cannot be changed")?;
        let mut known = resized(self.geometry(), self.records(), size).map_err(zones::refused)?;
        known.slots = self.zoned.slots().cloned();
        extension::expressible(&known.geometry, self.image().cluster_size()).map_err(zones::refused)?;
        let also = async |change: &mut dyn FnMut(&mut Header)| {
            let also = |header: &mut Header| {
                change(header);
                Ok(())
            };
            self.image().resize_with(size, shrink, preallocation, also).await
        };
        self.replace_tables(&known, also).await
    }

    /// Writes new tables for other zones, lets `switch` make the header name them together with what it does itself, and
    /// ends the epoch of the old ones.
    async fn replace_tables(
        &self,
        known: &Known,
        switch: impl AsyncFnOnce(&mut dyn FnMut(&mut Header)) -> Result<(), zbdkit_qcow2::Error>,
    ) -> Result<(), Error> {
        let image = self.image();
        let (area_offset, area_len) = self.ours.area;
        let old = Table::load_header(image.file(), area_offset, area_len)
            .await
            .map_err(|error| zones::refused(error.to_string()))?;
        let tables = Tables::make(image, known, self.ours.uuid, FileId::default(), None, |header| {
            // It is closed, and epochs go on counting: no run state of an earlier one is believed again.
            header.epoch = old.epoch;
        })
        .await?;
        let zones = Zones::of(&known.geometry, tables.bare.0);
        let ours = Ours {
            area: tables.area,
            ..self.ours
        };
        let states = known.records.values().any(is_beyond_bare_tables);
        let switched = switch(&mut |header| ours::put(header, &zones, &ours, states)).await;
        if let Err(error) = switched {
            tables.free(image).await;
            return Err(error.into());
        }
        self.zoned.end_epoch();
        zones::free(image, self.ours.area).await;
        if let Some(marks) = self.described.marks {
            zones::free(image, marks).await;
        }
        let bare = &self.described.zones;
        zones::free(image, (bare.table_offset, bare.table_len())).await;
        Ok(image.flush().await?)
    }

    /// The id of a snapshot that is named by its id or its name.
    async fn id_of(&self, wanted: &str) -> Result<Option<String>, Error> {
        let all = self.image().snapshots().await?;
        let by_id = all.iter().find(|snapshot| snapshot.id == wanted);
        let mut by_name = all.iter().filter(|snapshot| snapshot.name == wanted);
        let found = match (by_id, by_name.next(), by_name.next()) {
            (Some(snapshot), _, _) | (None, Some(snapshot), None) => Some(snapshot.id.clone()),
            _ => None,
        };
        Ok(found)
    }
}

/// The zones of a device that is made another size. The error says what would be right.
fn resized(old: &Geometry, mut records: Records, size: u64) -> Result<Known, String> {
    let zone_size = old.zone_size();
    let (rest, old_rest) = (size % zone_size, old.size() % zone_size);
    if size == 0 || (rest != 0 && rest != old_rest) {
        let below = size / zone_size * zone_size;
        return Err(format!(
            "the device has zones of {}: its size can become {} or {} bytes",
            format_size(zone_size),
            below.max(zone_size),
            below + zone_size
        ));
    }
    let geometry = Geometry::new(GeometrySpec { size, ..*old.spec() }).map_err(|error| error.to_string())?;
    for zone in old.zones() {
        let Some(record) = records.get_mut(&zone.0) else {
            continue;
        };
        if zone.0 >= geometry.nr_zones() {
            let is_empty = ZoneRecord {
                counters: record.counters,
                ..ZoneRecord::default()
            } == *record;
            if !is_empty {
                return Err(format!(
                    "zone {zone} would go, and it is not empty: reset it first"
                ));
            }
            continue;
        }
        let (before, after) = (old.capacity(zone), geometry.capacity(zone));
        if record.written > after || (record.zrwa && after < before) {
            return Err(format!(
                "zone {zone} would become shorter than what is written in it: reset it first"
            ));
        }
        // A short zone that was full stays so, though it is longer now.
        record.finished |= record.written == before && before < after && !old.is_conventional(zone);
    }
    let gone = geometry.nr_zones()..old.nr_conventional();
    if !gone.is_empty()
        || (geometry.size() < old.size() && old.is_conventional(ZoneNo(geometry.nr_zones() - 1)))
    {
        return Err("conventional zones would go, and nobody knows what of them is needed".into());
    }
    records.retain(|zone, _| *zone < geometry.nr_zones());
    Ok(Known {
        geometry,
        records,
        slots: None,
    })
}

#[cfg(test)]
mod tests {
    use zbdkit_zone::{Model, Zns};

    use super::*;

    const ZONE: u64 = 1 << 20;

    fn geometry(size: u64) -> Geometry {
        Geometry::new(GeometrySpec {
            model: Model::HostManaged,
            size,
            zone_size: ZONE,
            zone_capacity: ZONE - 4096,
            nr_conventional: 2,
            block_size: 4096,
            max_open: 2,
            max_active: 3,
            max_append: 0,
            zns: Zns::NONE,
        })
        .unwrap()
    }

    fn written(zone: u32, written: u64) -> Records {
        let record = ZoneRecord {
            written,
            ..ZoneRecord::default()
        };
        Records::from([(zone, record)])
    }

    #[test]
    fn a_device_grows_by_whole_zones_and_keeps_its_limits() {
        let known = resized(&geometry(8 * ZONE), written(3, 8192), 16 * ZONE).unwrap();
        assert_eq!((known.geometry.nr_zones(), known.geometry.max_open()), (16, 2));
        assert_eq!(known.records, written(3, 8192));
        let error = resized(&geometry(8 * ZONE), Records::new(), 8 * ZONE + 4096)
            .err()
            .unwrap();
        assert!(error.contains("8388608 or 9437184"), "{error}");
    }

    #[test]
    fn a_short_last_zone_becomes_whole_and_stays_full_if_it_was() {
        let short = geometry(8 * ZONE + 65536);
        let known = resized(&short, written(8, 65536), 9 * ZONE).unwrap();
        let record = known.records[&8];
        assert!(record.finished && record.written == 65536);
        let known = resized(&short, written(8, 4096), 10 * ZONE + 65536).unwrap();
        assert!(!known.records[&8].finished && known.geometry.len(ZoneNo(10)) == 65536);
    }

    #[test]
    fn a_device_shrinks_only_by_empty_sequential_zones() {
        let old = geometry(8 * ZONE);
        assert_eq!(
            resized(&old, written(3, 4096), 4 * ZONE)
                .unwrap()
                .geometry
                .nr_zones(),
            4
        );
        assert!(resized(&old, written(4, 4096), 4 * ZONE).is_err());
        assert!(resized(&old, Records::new(), 2 * ZONE).is_err());
        assert!(resized(&old, Records::new(), 0).is_err());
        let short = geometry(8 * ZONE + 65536);
        assert!(resized(&short, written(7, 131072), 7 * ZONE + 65536).is_err());
    }
}
