//! The zones of an image: found, read, upgraded to what this program writes, opened.
//!
//! While our autoclear bit is set, the *area* that our extension names is the truth: a table like a sidecar's, with
//! copies and checksums. A program that does not know it clears the bit; then the bare table of write pointers is the
//! truth, and opening for writing makes a new area from it. Layouts older than C become C on that occasion.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use zbdkit_io::File;
use zbdkit_qcow2::{Header, Qcow2};
use zbdkit_spec::qcow2::{INCOMPAT_ZONE_STATES, ZONED_MAX_ZONES};
use zbdkit_spec::sidecar::{self, VERSION_MARKS};
use zbdkit_zone::{Geometry, GeometrySpec, MAX_EXTENSION_SIZE, ZoneNo};

use super::directory::{Directory, Frozen};
use super::extension::{self, Draft, Zones};
use super::node::Qcow2Node;
use super::ours::{self, Ours};
use super::words;
use crate::create::default_append;
use crate::device::Device;
use crate::error::{Error, OpenError};
use crate::host::{FileId, Host};
use crate::node::Node;
use crate::zoned::{
    Inside, Loaded, Mirror, Place, Records, RunStateMode, Salvaged, Slots, Table, TableError, ZonedNode,
    bare_words, extension_size, marks_place, new_header, read_at, spec_of, table_size, write_at, zns_of,
};

/// What the clusters of a list of marked blocks are called.
pub const MARKS_NAME: &str = "list of marked blocks";
/// Logical block size of an image that does not say its own: what every writer of such images may have used.
const FOREIGN_BLOCK_SIZE: u32 = 512;

/// What an image's header says of its zones.
#[derive(Clone, Debug)]
pub struct Described {
    pub zones: Zones,
    /// What is ours, if it may be believed.
    pub ours: Option<Ours>,
    /// The snapshots' zone tables, if they may be believed.
    pub directory: Directory,
    /// Where the zone table has its list of marked blocks: offset and length, bytes.
    pub marks: Option<(u64, u64)>,
}

impl Described {
    /// Reads what the header names. `None` where the image has no zones. The error is for the user.
    pub async fn of(file: &File, header: &Header) -> Result<Option<Described>, String> {
        let len = file.len().map_err(|e| format!("cannot be looked at: {e}"))?;
        let Some(zones) = extension::zones(header, len)? else {
            return Ok(None);
        };
        let ours = Ours::current(header)?;
        let directory = match &ours {
            Some(ours) => Directory::load(file, ours.snapshots).await?,
            None => Directory::default(),
        };
        let marks = match &ours {
            // Where its header cannot be read, the opening fails.
            Some(ours) => match Table::load_header(file, ours.area.0, ours.area.1).await {
                Ok(table) => marks_in(header, &table, ours.area.0),
                Err(_) => None,
            },
            None => None,
        };
        Ok(Some(Described {
            zones,
            ours,
            directory,
            marks,
        }))
    }

    /// The clusters that belong to all this, and what they hold; but for the bare table, which the format knows.
    pub fn areas(&self) -> Vec<(Range<u64>, &'static str)> {
        let range = |(offset, len): (u64, u64)| offset..offset.saturating_add(len);
        let mut areas = Vec::new();
        if let Some(ours) = &self.ours {
            areas.push((range(ours.area), "zone table"));
            if ours.snapshots != (0, 0) {
                areas.push((range(ours.snapshots), "directory of zone tables"));
            }
        }
        areas.extend(self.marks.map(|marks| (range(marks), MARKS_NAME)));
        let frozen = self.directory.entries.iter();
        areas.extend(frozen.map(|frozen| (range(frozen.table), "zone table of a snapshot")));
        areas
    }

    /// The zones of a snapshot, by its id. The error is for the user.
    pub async fn frozen(&self, file: &File, id: &str, ours: &Ours) -> Result<Known, String> {
        let Some(frozen) = self.directory.find(id) else {
            return Err(format!(
                "the zones of snapshot {id} are not known: it was made, or its zone table was lost, by a program that does \
                 not know zbdkit's zone tables"
            ));
        };
        let (table, geometry) = read_frozen(file, frozen, ours)
            .await
            .map_err(|why| format!("the zone table of snapshot {id} cannot be used: {why}"))?;
        Ok(Known {
            geometry,
            slots: Slots::of(&table.table),
            records: table.records,
        })
    }

    /// Reads the table in the area.
    pub async fn load(&self, file: &File, ours: &Ours, path: &Path) -> Result<Loaded, OpenError> {
        let place = Place::Inside(path.to_owned());
        let contradiction = || {
            OpenError::data(
                path,
                "its zone table and its zoned header extension contradict each other; `zbdkit check -r all` makes them \
                 agree",
            )
        };
        // Before anything is read by a number that only the table says.
        let possible =
            table_size(self.zones.nr_zones, 0)..=table_size(self.zones.nr_zones, MAX_EXTENSION_SIZE);
        if !possible.contains(&ours.area.1) {
            return Err(contradiction());
        }
        let loaded = Table::load(file.clone(), ours.area.0, ours.area.1).await;
        let loaded = loaded.map_err(|e| place.table_error(e))?;
        let header = loaded.table.header();
        let zones = &self.zones;
        let agrees = header.uuid == ours.uuid.into_bytes()
            && header.nr_zones.get() == zones.nr_zones
            && ours.area.1 == table_size(zones.nr_zones, extension_size(header))
            && header.zone_size.get() == zones.zone_size
            && header.zone_capacity.get() == zones.zone_capacity
            && header.nr_conventional.get() == zones.conventional
            && zones.draft == Draft::C
            && self.marks == marks_place(header, ours.area.0).ok().flatten();
        match agrees {
            true => Ok(loaded),
            false => Err(contradiction()),
        }
    }
}

/// Reads the table of a snapshot, if it can be used and is such as this program makes for one. The error is for the user.
pub async fn read_frozen(file: &File, frozen: &Frozen, ours: &Ours) -> Result<(Salvaged, Geometry), String> {
    let (offset, len) = frozen.table;
    if len > table_size(ZONED_MAX_ZONES, MAX_EXTENSION_SIZE) {
        return Err(format!("it has {len} bytes, more than it can have"));
    }
    // The header first: it says where else something would be read.
    let header = Table::load_header(file, offset, len)
        .await
        .map_err(|error| error.to_string())?;
    if header.version.get() == VERSION_MARKS {
        // Nothing vouches for the place of such a list: anybody's clusters may lie there.
        return Err("it names a list of marked blocks, which no snapshot has".into());
    }
    if header.uuid != ours.uuid.into_bytes() || header.open != 0 {
        return Err("it is not this image's".into());
    }
    let spec = spec_of(&header).map_err(|model| format!("zone model {model} is not known"))?;
    let geometry = Geometry::new(spec).map_err(|error| error.to_string())?;
    let table = Table::salvage(file.clone(), offset, len).await;
    let table = table.map_err(|error| error.to_string())?;
    match table.unusable() {
        Some(error) => Err(error.to_string()),
        None => Ok((table, geometry)),
    }
}

/// Where a table in an area has its list of marked blocks, if it is a place for tables.
fn marks_in(header: &Header, table: &sidecar::Header, area: u64) -> Option<(u64, u64)> {
    let place = marks_place(table, area).ok().flatten();
    place.filter(|(offset, _)| *offset != 0 && offset.is_multiple_of(header.cluster_size()))
}

/// What the zones of an image are, by whichever of its tables is the truth.
pub struct Known {
    pub geometry: Geometry,
    pub records: Records,
    /// Where the descriptor extensions lie that the records speak of.
    pub slots: Option<Slots>,
}

/// The zones that the bare table describes, for an image whose area is not to be believed.
pub async fn from_bare_table(
    file: &File,
    header: &Header,
    zones: &Zones,
    path: &Path,
) -> Result<Known, OpenError> {
    let bytes = read_at(file, zones.table_offset, zones.table_len() as usize).await;
    let bytes = bytes.map_err(|e| Place::Inside(path.to_owned()).table_error(e))?;
    let records = words::records(zones, header.size, &bytes).map_err(|e| OpenError::data(path, e))?;
    Ok(Known {
        geometry: geometry_for(file, header, zones, &records).await?,
        records,
        slots: None,
    })
}

/// The device that the extension describes, with what it does not say taken from the area if that still says it.
pub async fn geometry_for(
    file: &File,
    header: &Header,
    zones: &Zones,
    records: &Records,
) -> Result<Geometry, OpenError> {
    let append = zones
        .max_append
        .map_or(default_append(zones.zone_capacity), u64::from);
    let plain = zones.geometry(header.size, FOREIGN_BLOCK_SIZE, append)?;
    let former = former_geometry(file, header, zones, records).await;
    Ok(former.unwrap_or(plain))
}

/// What the area said of block size, append limit, random write areas and descriptor extensions before somebody else wrote to the image, if it still says so: a
/// guest had better not find them changed.
async fn former_geometry(file: &File, header: &Header, zones: &Zones, records: &Records) -> Option<Geometry> {
    let former = former_header(file, header).await?;
    let (block_size, append) = (former.block_size.get(), former.max_append.get());
    let geometry = zones.geometry(header.size, block_size, append).ok()?;
    let geometry = Geometry::new(GeometrySpec {
        zns: zns_of(&former),
        ..*geometry.spec()
    })
    .ok()?;
    let fits = |written: u64| written.is_multiple_of(block_size.into());
    records
        .values()
        .all(|record| fits(record.written))
        .then_some(geometry)
}

/// The header of the area that is not believed any more, if it was not written over.
async fn former_header(file: &File, header: &Header) -> Option<Box<sidecar::Header>> {
    let former = Ours::find(header)?;
    let table = Table::load_header(file, former.area.0, former.area.1)
        .await
        .ok()?;
    (table.uuid == former.uuid.into_bytes()).then_some(table)
}

/// Opens the zones of an image as a node above it.
pub async fn open(
    host: &Arc<dyn Host>,
    node: Qcow2Node,
    described: Described,
    path: &Path,
    run_state: &RunStateMode,
) -> Result<(ZonedNode, Arc<Qcow2Node>, Vec<String>), OpenError> {
    let header = node.image().header().await;
    let file = node.image().file().clone();
    let read_only = node.limits().read_only;
    let mut notices = described.zones.warnings.clone();
    let (described, ours) = match described.ours {
        Some(ours) => (described, ours),
        None if read_only => {
            let known = from_bare_table(&file, &header, &described.zones, path).await?;
            notices.extend(lost(&header, former_header(&file, &header).await.as_deref()));
            let node = Arc::new(node);
            let zoned = ZonedNode::read_only(node.clone(), known.geometry, &known.records, None, "qcow2")?;
            return Ok((zoned, node, notices));
        }
        None => {
            let (described, ours, told) = upgrade(host, node.image(), &header, described, path).await?;
            notices.extend(told);
            (described, ours)
        }
    };
    let loaded = described.load(&file, &ours, path).await?;
    let spec = spec_of(loaded.table.header())
        .map_err(|model| OpenError::data(path, format!("zone model {model} is not known to this zbdkit")))?;
    let geometry = Geometry::new(spec)?;
    let mirror = match read_only {
        true => None,
        false => {
            let mirror = Mirror::load(file.clone(), described.zones.table_offset, geometry).await;
            Some(mirror.map_err(|e| Place::Inside(path.to_owned()).table_error(e))?)
        }
    };
    let marked = header.incompatible & INCOMPAT_ZONE_STATES != 0;
    let node = Arc::new(node.with_zones(&geometry, marked));
    let inside = Inside {
        image: path,
        data: node.image().data_file().clone(),
        file,
        loaded,
        mirror,
        holder: Some(node.clone()),
        run_state,
        read_only,
    };
    let (zoned, told) = ZonedNode::open_inside(host, node.clone(), inside).await?;
    notices.extend(told);
    Ok((zoned, node, notices))
}

/// Opens the view of a snapshot, read-only, with the zones that it has. Where those are not known, its data can still
/// be read.
pub async fn open_snapshot(
    node: Qcow2Node,
    described: &Described,
    id: &str,
    path: &Path,
) -> Result<Device, OpenError> {
    let node = Arc::new(node);
    let Some(ours) = described.ours.filter(|_| described.directory.find(id).is_some()) else {
        let notice = format!("the zones of snapshot {id} are not known: it is shown as a disk without zones");
        return Ok(Device::new(node.clone()).with_qcow2(node).with_notice(notice));
    };
    let wrong = |problem: String| OpenError::data(path, problem);
    let known = described
        .frozen(node.image().file(), id, &ours)
        .await
        .map_err(wrong)?;
    if known.geometry.size() != node.limits().size {
        return Err(wrong(format!(
            "the zone table of snapshot {id} is of another size than it"
        )));
    }
    let Known {
        geometry,
        records,
        slots,
    } = known;
    let zoned = ZonedNode::read_only(node.clone(), geometry, &records, slots, "qcow2")?;
    Ok(Device::zoned(zoned, Vec::new()).with_qcow2(node))
}

/// What the user is told of an image whose area somebody else's writing has made stale.
fn lost(header: &Header, former: Option<&sidecar::Header>) -> Vec<String> {
    if Ours::find(header).is_none() {
        return Vec::new();
    }
    let mut told = vec![
        "the image was changed by a program that does not know zbdkit's zone table: the write pointers are those that it \
         left; what only that table held is lost (how far finished zones were written, counters, zones made read-only or \
         offline, descriptor extensions, the zones of snapshots)"
            .to_owned(),
    ];
    if let Some(former) = former
        && (former.open != 0 || former.lost_epoch.get() != 0)
    {
        told.push(format!(
            "epoch {} of this image was not closed before that: writes since its last flush may be lost",
            former.epoch.get()
        ));
    }
    told
}

/// Gives an image whose zones only a bare table describes an area, and layout C.
async fn upgrade(
    host: &Arc<dyn Host>,
    image: &Qcow2,
    header: &Header,
    described: Described,
    path: &Path,
) -> Result<(Described, Ours, Vec<String>), OpenError> {
    let encoded = header.encode().map_err(OpenError::image(path))?;
    if !ours::has_room(&encoded) {
        return Err(OpenError::data(
            path,
            "header fields that are not known to this zbdkit leave no room for its extension in the first sector: the \
             image's zones can only be read",
        ));
    }
    let known = from_bare_table(image.file(), header, &described.zones, path).await?;
    let former = former_header(image.file(), header).await;
    let told = lost(header, former.as_deref());
    let data = host
        .identity(image.data_file())
        .map_err(|e| OpenError::file(path, "cannot be identified", e))?;
    let keeps = described.zones.draft == Draft::C
        && described.zones.table_offset.is_multiple_of(image.cluster_size());
    let keep = keeps.then_some(described.zones.table_offset);
    let uuid = uuid::Uuid::new_v4();
    let made = Tables::make(image, &known, uuid, data, keep, |header| {
        if let Some(former) = &former {
            // Epochs go on where they were, and a loss stays known until a clean close.
            header.epoch = former.epoch;
            header.lost_epoch = match former.open {
                0 => former.lost_epoch,
                _ => former.epoch,
            };
        }
    });
    let made = made.await.map_err(OpenError::image(path))?;
    let ours = Ours {
        area: made.area,
        snapshots: (0, 0),
        uuid,
    };
    let zones = Zones::of(&known.geometry, made.bare.0);
    let switched = image
        .update_header(|header| {
            ours::put(header, &zones, &ours, false);
            Ok(())
        })
        .await;
    if let Err(error) = switched {
        made.free(image).await;
        return Err(OpenError::image(path)(error));
    }
    let described = Described {
        zones,
        ours: Some(ours),
        directory: Directory::default(),
        marks: None,
    };
    Ok((described, ours, told))
}

/// New tables in an image, durable, which nothing names yet.
pub struct Tables {
    /// The area: offset and length, bytes.
    pub area: (u64, u64),
    /// The bare table.
    pub bare: (u64, u64),
    /// The bare table was there before.
    kept: bool,
}

impl Tables {
    /// Writes an area for zones with these records, and a bare table unless the one at `keep` stays. `change` has the
    /// last word on the area's header.
    pub async fn make(
        image: &Qcow2,
        known: &Known,
        uuid: uuid::Uuid,
        data: FileId,
        keep: Option<u64>,
        change: impl FnOnce(&mut sidecar::Header),
    ) -> Result<Tables, zbdkit_qcow2::Error> {
        let geometry = &known.geometry;
        let area = make_area(image, known, uuid, data, change).await?;
        let bare_len = 8 * u64::from(geometry.nr_zones());
        let bare = match keep {
            Some(offset) => Ok(offset),
            None => make_bare(image, geometry, &known.records).await,
        };
        match bare {
            Ok(offset) => Ok(Tables {
                area,
                bare: (offset, bare_len),
                kept: keep.is_some(),
            }),
            Err(error) => {
                free(image, area).await;
                Err(error)
            }
        }
    }

    /// Gives the clusters back, where the header was not written.
    pub async fn free(self, image: &Qcow2) {
        free(image, self.area).await;
        if !self.kept {
            free(image, self.bare).await;
        }
    }
}

/// Frees clusters that nothing names. If that fails they are leaked, which harms nobody and which a check finds.
pub async fn free(image: &Qcow2, (offset, len): (u64, u64)) {
    if let Err(error) = image.free_area(offset, len).await {
        tracing::warn!("the clusters of a zone table could not be freed: {error}");
    }
}

/// Writes a table like a sidecar's into new clusters, synced.
pub async fn make_area(
    image: &Qcow2,
    known: &Known,
    uuid: uuid::Uuid,
    data: FileId,
    change: impl FnOnce(&mut sidecar::Header),
) -> Result<(u64, u64), zbdkit_qcow2::Error> {
    let len = table_size(known.geometry.nr_zones(), known.geometry.extension_size());
    let offset = image.allocate_area(len).await?;
    let mut header = new_header(&known.geometry, uuid, data);
    change(&mut header);
    let written = async {
        let table = Table::create(image.file().clone(), offset, header, &known.records).await?;
        copy_extensions(known, &table).await?;
        table.sync().await
    };
    match written.await {
        Ok(()) => Ok((offset, len)),
        Err(error) => {
            free(image, (offset, len)).await;
            Err(format_error(error))
        }
    }
}

/// Copies the descriptor extensions that records speak of into the slots of a new table, which nothing names yet.
async fn copy_extensions(known: &Known, table: &Table) -> Result<(), TableError> {
    let (Some(from), Some(to)) = (&known.slots, Slots::of(table)) else {
        return Ok(());
    };
    for (zone, record) in &known.records {
        if let Some(checksum) = record.extension {
            let zone = ZoneNo(*zone);
            to.write(zone, &from.checked(zone, checksum).await?).await?;
        }
    }
    Ok(())
}

async fn make_bare(
    image: &Qcow2,
    geometry: &Geometry,
    records: &Records,
) -> Result<u64, zbdkit_qcow2::Error> {
    place(image, &bare_words(geometry, records))
        .await
        .map(|(offset, _)| offset)
}

/// Writes bytes into new clusters of our own, synced; where they lie, and their length.
pub async fn place(image: &Qcow2, bytes: &[u8]) -> Result<(u64, u64), zbdkit_qcow2::Error> {
    let len = bytes.len() as u64;
    let offset = image.allocate_area(len).await?;
    let align = image.file().direct_align().unwrap_or(512).max(512) as usize;
    let mut whole = bytes.to_vec();
    whole.resize(bytes.len().next_multiple_of(align), 0);
    let written = async {
        let written = write_at(image.file(), &whole, offset).await;
        written.map_err(format_error)?;
        let synced = image.file().datasync().await;
        synced.map_err(|error| zbdkit_qcow2::Error::io("syncing a zone table", &error))
    };
    match written.await {
        Ok(()) => Ok((offset, len)),
        Err(error) => {
            free(image, (offset, len)).await;
            Err(error)
        }
    }
}

fn format_error(error: TableError) -> zbdkit_qcow2::Error {
    match error {
        TableError::Io(op, source) => zbdkit_qcow2::Error::io(op, &source),
        other => zbdkit_qcow2::Error::Invalid(other.to_string()),
    }
}

/// The refusal of what makes no sense for the image.
pub fn refused(what: impl Into<String>) -> Error {
    zbdkit_qcow2::Error::Refused(what.into()).into()
}
