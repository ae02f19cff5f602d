//! Opening an image that has a zone table: checks, and the recovery of what an epoch left that was not closed.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use zbdkit_io::File;
use zbdkit_spec::sidecar::{BLOCK, OPEN};
use zbdkit_zone::{Engine, Geometry, ZoneNo, ZoneRecord};

use super::commit::Committer;
use super::extensions::{Extensions, Slots};
use super::format::{formats_of, limits_of};
use super::gaps::Gaps;
use super::make::{Records, spec_of};
use super::mirror::Mirror;
use super::place::{Place, host_error};
use super::run_state::{self, RunState, Stamp, Word};
use super::table::{Loaded, Table};
use super::waiters::Waiters;
use super::{Durability, ZonedNode};
use crate::error::OpenError;
use crate::host::{FileId, FileOptions, Host, HostError};
use crate::lock::LockMode;
use crate::marks::{MarkList, Marks};
use crate::node::{Node, Request};

/// What outlives kill -9 besides what was flushed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RunStateMode {
    /// Every acknowledged write: the written ends are kept in a file beside the zone table.
    #[default]
    Beside,
    /// The same, with the file in this directory (a tmpfs is fastest).
    In(PathBuf),
    /// The same, by making every write durable before it is acknowledged.
    Sync,
    /// Only what was flushed.
    None,
}

/// How an image with a sidecar is opened.
#[derive(Clone, Debug)]
pub struct ZonedOptions {
    /// The sidecar.
    pub sidecar: PathBuf,
    /// What outlives kill -9.
    pub run_state: RunStateMode,
    /// Open for reading only.
    pub read_only: bool,
    /// Bypass the page cache for the table too.
    pub direct: bool,
    /// Take no locks.
    pub force_share: bool,
    /// How long to wait for somebody else's locks.
    pub lock_wait: Duration,
}

/// A table inside an image, found and read.
pub(crate) struct Inside<'a> {
    /// The image, whose locks protect the table too.
    pub image: &'a Path,
    /// The image's file, which identifies the table.
    pub file: File,
    /// The file that the data lies in.
    pub data: File,
    /// The table.
    pub loaded: Loaded,
    /// The bare table that follows it, where the image is opened for writing.
    pub mirror: Option<Mirror>,
    /// Who marks the image before it holds what bare tables cannot express.
    pub holder: Option<Arc<dyn Holder>>,
    /// What outlives kill -9.
    pub run_state: &'a RunStateMode,
    /// Open for reading only.
    pub read_only: bool,
}

/// The image that a zone table lies inside.
pub(crate) trait Holder: Send + Sync {
    /// Marks the image as one whose zones other programs cannot understand, before it is: durable when this returns.
    fn mark<'a>(&'a self) -> Request<'a, ()>;

    /// Takes so many bytes of the image's file for its zones, next to each other; the answer is where they begin. They are
    /// lost space until the table names them.
    fn allocate<'a>(&'a self, len: u64) -> Request<'a, u64>;

    /// Gives back what was allocated and is named by nothing.
    fn free<'a>(&'a self, offset: u64, len: u64) -> Request<'a, ()>;
}

/// What the zone table said of the image when it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageStatus {
    /// The image's identity.
    pub uuid: uuid::Uuid,
    /// The file that holds the zone table: the sidecar, or the image itself.
    pub sidecar: PathBuf,
    /// The last epoch before this opening, 0 where the image was never opened for writing.
    pub epoch: u64,
    /// That epoch was closed. If it was not, somebody has the image open, or died with it.
    pub clean: bool,
}

impl ZonedNode {
    /// Zones over a child whose contents do not outlive the process.
    pub fn volatile(child: Arc<dyn Node>, geometry: Geometry) -> Result<ZonedNode, OpenError> {
        let engine =
            Engine::new(geometry, |_| ZoneRecord::default()).map_err(|e| OpenError::Graph(e.to_string()))?;
        let waiters = Waiters::new(RunState::None);
        let durability = Durability::Volatile;
        let extensions = Extensions::in_memory();
        let marks = MarkList::new(geometry.zone_size());
        Ok(ZonedNode::assemble(
            child, engine, waiters, durability, extensions, marks, None,
        ))
    }

    /// Zones that nobody changes and that are known by other means than a durable table.
    pub(crate) fn read_only(
        child: Arc<dyn Node>,
        geometry: Geometry,
        records: &Records,
        slots: Option<Slots>,
        driver: &'static str,
    ) -> Result<ZonedNode, OpenError> {
        let engine = engine_of(geometry, records).map_err(|e| OpenError::Graph(e.to_string()))?;
        let waiters = Waiters::new(RunState::None);
        let extensions = slots.map_or(Extensions::None, Extensions::Slots);
        let durability = Durability::ReadOnly;
        let marks = MarkList::new(geometry.zone_size());
        let mut node = ZonedNode::assemble(child, engine, waiters, durability, extensions, marks, None);
        node.driver = driver;
        Ok(node)
    }

    /// Opens the zones that the sidecar keeps for `child`. Also returns what the user should be told.
    pub async fn open(
        host: &Arc<dyn Host>,
        child: Arc<dyn Node>,
        options: &ZonedOptions,
    ) -> Result<(ZonedNode, Vec<String>), OpenError> {
        Opening::beside(host, child, options).await?.finish().await
    }

    /// Opens the zones whose table lies inside the image that `child` is.
    pub(crate) async fn open_inside(
        host: &Arc<dyn Host>,
        child: Arc<dyn Node>,
        inside: Inside<'_>,
    ) -> Result<(ZonedNode, Vec<String>), OpenError> {
        let driver = child.driver();
        let (mut node, notices) = Opening::inside(host, child, inside)?.finish().await?;
        node.driver = driver;
        Ok((node, notices))
    }

    fn assemble(
        child: Arc<dyn Node>,
        engine: Engine,
        waiters: Waiters,
        durability: Durability,
        extensions: Extensions,
        marks: MarkList,
        status: Option<ImageStatus>,
    ) -> ZonedNode {
        let formats = formats_of(engine.geometry(), child.limits());
        let engine = engine.with_formats(formats);
        let read_only = matches!(durability, Durability::ReadOnly);
        let limits = limits_of(&engine, child.limits(), read_only);
        ZonedNode {
            child,
            driver: "zoned",
            limits,
            engine,
            waiters,
            gaps: Gaps::default(),
            durability,
            extensions,
            marks: Marks::new(marks),
            status,
            watchers: Mutex::default(),
        }
    }
}

fn engine_of(geometry: Geometry, records: &Records) -> Result<Engine, zbdkit_zone::RecordError> {
    Engine::new(geometry, |zone| records.get(&zone.0).copied().unwrap_or_default())
}

/// An opening that has read and checked the table.
pub(super) struct Opening<'a> {
    pub(super) host: &'a Arc<dyn Host>,
    pub(super) place: Place,
    pub(super) run_state: &'a RunStateMode,
    read_only: bool,
    pub(super) child: Arc<dyn Node>,
    pub(super) data_id: FileId,
    pub(super) table_id: FileId,
    pub(super) table: Table,
    pub(super) mirror: Option<Mirror>,
    holder: Option<Arc<dyn Holder>>,
    pub(super) geometry: Geometry,
    pub(super) records: Records,
    pub(super) notices: Vec<String>,
    /// The last epoch that may have lost writes, since the last clean close.
    pub(super) lost: Option<u64>,
    /// The run state that was believed. It is ours, then, whatever the image says of its place.
    pub(super) recovered_from: Option<PathBuf>,
}

impl<'a> Opening<'a> {
    async fn beside(
        host: &'a Arc<dyn Host>,
        child: Arc<dyn Node>,
        options: &'a ZonedOptions,
    ) -> Result<Opening<'a>, OpenError> {
        let place = Place::Sidecar(options.sidecar.clone());
        let file = open_sidecar(host, options, &place)?;
        let data = child.file().ok_or_else(|| {
            OpenError::Graph("zoned: the node below must be a file or memory, or raw over one".into())
        })?;
        let data_id = host
            .identity(data)
            .map_err(|e| OpenError::file("data file", "cannot be identified", e))?;
        let table_id = host
            .identity(&file)
            .map_err(|e| OpenError::file(place.path(), "cannot be identified", e))?;
        let len = file
            .len()
            .map_err(|e| OpenError::file(place.path(), "cannot be looked at", e))?;
        let Loaded {
            table,
            records,
            repaired,
        } = Table::load(file, 0, len)
            .await
            .map_err(|e| place.table_error(e))?;
        let opening = Opening {
            host,
            run_state: &options.run_state,
            read_only: options.read_only,
            child,
            data_id,
            table_id,
            geometry: geometry_of(&table, &place)?,
            table,
            mirror: None,
            holder: None,
            records,
            notices: notices_of(repaired, &place),
            lost: None,
            recovered_from: None,
            place,
        };
        opening.check_data()?;
        opening.check_identity()?;
        Ok(opening)
    }

    fn inside(
        host: &'a Arc<dyn Host>,
        child: Arc<dyn Node>,
        inside: Inside<'a>,
    ) -> Result<Opening<'a>, OpenError> {
        let place = Place::Inside(inside.image.to_owned());
        let identity = |file: &File| {
            host.identity(file)
                .map_err(|e| OpenError::file(inside.image, "cannot be identified", e))
        };
        let Loaded {
            table,
            records,
            repaired,
        } = inside.loaded;
        let opening = Opening {
            host,
            run_state: inside.run_state,
            read_only: inside.read_only,
            child,
            data_id: identity(&inside.data)?,
            table_id: identity(&inside.file)?,
            geometry: geometry_of(&table, &place)?,
            table,
            mirror: inside.mirror,
            holder: inside.holder,
            records,
            notices: notices_of(repaired, &place),
            lost: None,
            recovered_from: None,
            place,
        };
        opening.check_data()?;
        Ok(opening)
    }

    /// Is this what the table speaks of?
    fn check_data(&self) -> Result<(), OpenError> {
        let header = self.table.header();
        let (actual, expected) = (self.child.limits().size, header.size.get());
        if actual != expected {
            let problem = match &self.place {
                Place::Inside(_) => format!(
                    "the image is a device of {actual} bytes, but its zone table describes {expected}: it was resized by \
                     a program that does not know its zones; resize it back to {expected} with that program"
                ),
                Place::Sidecar(_) if actual < expected => format!(
                    "has {actual} bytes, but its zone table describes {expected}: the file was truncated; restore it"
                ),
                Place::Sidecar(_) => format!(
                    "has {actual} bytes, but its zone table describes {expected}: it was extended, or the table is \
                     another image's; set the file's size back to {expected}"
                ),
            };
            return Err(OpenError::Data {
                path: self.place.image(),
                problem,
            });
        }
        let needed = self.child.limits().direct_align;
        if self.geometry.block_size() < needed {
            return Err(OpenError::Graph(format!(
                "cache.direct=on needs blocks of at least {needed} bytes here, but the image's are {}: open it without \
                 cache.direct, or create it with --block-size {needed}",
                self.geometry.block_size()
            )));
        }
        Ok(())
    }

    /// Is the sidecar this image's?
    fn check_identity(&self) -> Result<(), OpenError> {
        let id = self.child.file().and_then(|data| self.host.image_id(data));
        if id.is_some_and(|id| id != self.table.header().uuid) {
            return Err(self
                .place
                .error("this zone table belongs to another image; name the right one with sidecar=FILE"));
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<(ZonedNode, Vec<String>), OpenError> {
        let status = Some(self.status());
        let recovered = self.recover().await?;
        self.tell_marks();
        let engine = engine_of(self.geometry, &self.records)
            .map_err(|error| self.place.error(&format!("the zone table is damaged: {error}")))?;
        if self.read_only {
            let waiters = Waiters::new(RunState::None);
            let extensions = Extensions::of(&self.table);
            let durability = Durability::ReadOnly;
            let marks = self.valid_marks();
            let node =
                ZonedNode::assemble(self.child, engine, waiters, durability, extensions, marks, status);
            return Ok((node, self.notices));
        }
        self.settle(recovered).await?;
        let run_state = self.begin_epoch().await?;
        self.drop_marks().await?;
        let sync_writes = *self.run_state == RunStateMode::Sync;
        let extensions = Extensions::of(&self.table);
        let marks = self.table.marks().clone();
        let durability = Durability::Table {
            committer: Box::new(Committer::new(self.table, self.mirror, self.holder)),
            sync_writes,
        };
        let waiters = Waiters::new(run_state);
        let node = ZonedNode::assemble(self.child, engine, waiters, durability, extensions, marks, status);
        Ok((node, self.notices))
    }

    fn status(&self) -> ImageStatus {
        let header = self.table.header();
        ImageStatus {
            uuid: uuid::Uuid::from_bytes(header.uuid),
            sidecar: self.place.path().to_owned(),
            epoch: header.epoch.get(),
            clean: header.open == 0 && header.lost_epoch.get() == 0,
        }
    }

    /// After an epoch that was not closed: takes the written ends from its run state, or says what may be lost.
    async fn recover(&mut self) -> Result<bool, OpenError> {
        let header = self.table.header();
        let told = header.lost_epoch.get();
        if told != 0 {
            self.lost = Some(told);
            self.notices.push(format!(
                "epoch {told} of this image was not closed and its run state could not be used: writes since its last \
                 flush may be lost (an opening since then may have said so already)"
            ));
        }
        if header.open != OPEN {
            return Ok(false);
        }
        let epoch = header.epoch.get();
        let lost = |why: &str| {
            format!(
                "epoch {epoch} of this image was not closed and its run state cannot be used ({why}): \
                 writes since its last flush may be lost"
            )
        };
        let place = &header.place[..usize::from(header.place_len.get()).min(header.place.len())];
        if place.is_empty() {
            self.notices.push(lost("none was kept"));
            self.lost = Some(epoch);
            return Ok(false);
        }
        let place = self.place.directory().join(std::ffi::OsStr::from_bytes(place));
        let stamp = self.stamp(epoch)?;
        let mut found = Vec::new();
        let believed =
            run_state::recover(self.host, &place, &stamp, |zone, word| found.push((zone, word))).await;
        match believed {
            Ok(()) => {
                found
                    .into_iter()
                    .for_each(|(zone, word)| self.overlay(zone, word));
                self.recovered_from = Some(place);
                Ok(true)
            }
            Err(why) => {
                self.notices.push(lost(&why));
                self.lost = Some(epoch);
                Ok(false)
            }
        }
    }

    /// Takes the written end from the run state. All else of a zone, its resets included, is durable before it counts,
    /// so that the table says it; where it tells of a later reset, the word is from before that.
    fn overlay(&mut self, zone: ZoneNo, word: Word) {
        if zone.0 >= self.geometry.nr_zones() {
            return;
        }
        let record = self.records.entry(zone.0).or_default();
        // A flush may have captured a write whose word was not stored yet.
        if word.is_of(record) && word.written() > record.written {
            // The counter of bytes is as old as the table; what was written since is known by how far the end moved, but for
            // pointers that move over what was written before, or never.
            let moved = match record.zrwa {
                false => word.written() - record.written,
                true => 0,
            };
            record.counters.bytes_written = record.counters.bytes_written.saturating_add(moved);
            record.write_to(word.written(), self.geometry.capacity(zone));
        }
    }

    pub(super) fn stamp(&self, epoch: u64) -> Result<Stamp, OpenError> {
        let boot_id = self
            .host
            .boot_id()
            .map_err(|e| OpenError::file("/proc/sys/kernel/random/boot_id", "cannot be read", e))?;
        Ok(Stamp {
            boot_id,
            uuid: self.table.header().uuid,
            epoch,
            data_file: self.data_id,
            sidecar: self.table_id,
            nr_zones: self.geometry.nr_zones(),
        })
    }
}

fn open_sidecar(host: &Arc<dyn Host>, options: &ZonedOptions, place: &Place) -> Result<File, OpenError> {
    let lock = match (options.force_share, options.read_only) {
        (true, _) => LockMode::None,
        (false, true) => LockMode::Read,
        (false, false) => LockMode::Write,
    };
    let file_options = FileOptions {
        direct: options.direct,
        lock,
        lock_wait: options.lock_wait,
        ..FileOptions::existing(options.read_only)
    };
    let file = host.open(place.path(), &file_options).map_err(|e| match e {
        HostError::Io(e) if e.kind() == std::io::ErrorKind::NotFound => place.error(
            "the zone table is missing: an image's zones cannot be known without it; bring it back, or name it with \
             sidecar=FILE",
        ),
        error => host_error(place.path(), "cannot be opened", error),
    })?;
    match file.direct_align() {
        Some(align) if align > BLOCK as u32 => {
            Err(place.error("the file system's direct I/O needs more than 4096 bytes of alignment"))
        }
        _ => Ok(file),
    }
}

fn geometry_of(table: &Table, place: &Place) -> Result<Geometry, OpenError> {
    let spec = spec_of(table.header())
        .map_err(|model| place.error(&format!("zone model {model} is not known to this zbdkit")))?;
    Ok(Geometry::new(spec)?)
}

fn notices_of(repaired: Vec<String>, place: &Place) -> Vec<String> {
    let named = |what| format!("{}: {what}", place.path().display());
    repaired.into_iter().map(named).collect()
}
