//! Making a zone table, and opening an image that has one: checks, recovery, the new epoch.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use zbdkit_io::File;
use zbdkit_spec::sidecar::{Header, MAGIC, OPEN, OPEN_SYNC, VERSION};
use zbdkit_zone::{Engine, Geometry, GeometrySpec, Model, ZoneNo, ZoneRecord, ZoneType};
use zerocopy::FromZeros;

use super::commit::Committer;
use super::gaps::Gaps;
use super::run_state::{self, RunState, Stamp, Word, file_stamp};
use super::table::{Loaded, Table, TableError};
use super::waiters::Waiters;
use super::{Durability, ZonedNode};
use crate::error::{Error, OpenError, errno_of};
use crate::host::{FileId, FileOptions, Host, HostError};
use crate::lock::LockMode;
use crate::node::{Lane, Node};

/// What outlives kill -9 besides what was flushed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RunStateMode {
    /// Every acknowledged write: the written ends are kept in a file beside the sidecar.
    #[default]
    Beside,
    /// The same, with the file in this directory (a tmpfs is fastest).
    In(PathBuf),
    /// The same, by making every write durable before it is acknowledged.
    Sync,
    /// Only what was flushed.
    None,
}

/// How a zoned image is opened.
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

/// What the zone table said of the image when it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageStatus {
    /// The image's identity.
    pub uuid: uuid::Uuid,
    /// The sidecar.
    pub sidecar: PathBuf,
    /// The last epoch before this opening, 0 where the image was never opened for writing.
    pub epoch: u64,
    /// That epoch was closed. If it was not, somebody has the image open, or died with it.
    pub clean: bool,
}

/// Where an image's sidecar is unless told otherwise: `IMAGE.zones`.
pub fn default_sidecar(image: &Path) -> PathBuf {
    with_suffix(image, ".zones")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

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
    let spec = geometry.spec();
    let mut header = Box::new(Header::new_zeroed());
    header.magic = MAGIC;
    header.version = VERSION.into();
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
    header.data_file = file_stamp(host.identity(data).map_err(failed("cannot be identified"))?);
    let table = Table::create(file, header)
        .await
        .map_err(|e| table_error(path, e))?;
    table.file().sync().await.map_err(failed("cannot be synced"))?;
    host.sync_name(path)
        .map_err(failed("its directory cannot be synced"))?;
    // Where the file system has extended attributes, a sidecar cannot be mistaken for another image's.
    host.set_image_id(data, uuid.into_bytes());
    Ok(uuid)
}

impl ZonedNode {
    /// Zones over a child whose contents do not outlive the process.
    pub fn volatile(child: Arc<dyn Node>, geometry: Geometry) -> Result<ZonedNode, OpenError> {
        let engine =
            Engine::new(geometry, |_| ZoneRecord::default()).map_err(|e| OpenError::Graph(e.to_string()))?;
        Ok(ZonedNode::assemble(
            child,
            engine,
            Waiters::new(RunState::None),
            Durability::Volatile,
            false,
            None,
        ))
    }

    /// Opens the zones that the sidecar keeps for `child`. Also returns what the user should be told.
    pub async fn open(
        host: &Arc<dyn Host>,
        child: Arc<dyn Node>,
        options: &ZonedOptions,
    ) -> Result<(ZonedNode, Vec<String>), OpenError> {
        Opening::start(host, child, options).await?.finish().await
    }

    fn assemble(
        child: Arc<dyn Node>,
        engine: Engine,
        waiters: Waiters,
        durability: Durability,
        read_only: bool,
        status: Option<ImageStatus>,
    ) -> ZonedNode {
        let mut limits = child.limits().clone();
        limits.size = engine.geometry().size();
        limits.block_size = engine.geometry().block_size();
        limits.read_only |= read_only;
        limits.zoned = Some(*engine.geometry());
        ZonedNode {
            child,
            limits,
            engine,
            waiters,
            gaps: Gaps::default(),
            durability,
            status,
        }
    }
}

/// An opening that has read and checked the table.
struct Opening<'a> {
    host: &'a Arc<dyn Host>,
    options: &'a ZonedOptions,
    child: Arc<dyn Node>,
    data: File,
    data_id: FileId,
    sidecar_id: FileId,
    table: Table,
    geometry: Geometry,
    records: BTreeMap<u32, ZoneRecord>,
    notices: Vec<String>,
    /// The last epoch that may have lost writes, since the last clean close.
    lost: Option<u64>,
    /// The run state that was believed. It is ours, then, whatever the image says of its place.
    recovered_from: Option<PathBuf>,
}

impl<'a> Opening<'a> {
    async fn start(
        host: &'a Arc<dyn Host>,
        child: Arc<dyn Node>,
        options: &'a ZonedOptions,
    ) -> Result<Opening<'a>, OpenError> {
        let path = &options.sidecar;
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
        let file = host.open(path, &file_options).map_err(|e| match e {
            HostError::Io(e) if e.kind() == std::io::ErrorKind::NotFound => sidecar_error(
                path,
                "the zone table is missing: an image's zones cannot be known without it; \
                 bring it back, or name it with sidecar=FILE",
            ),
            error => host_error(path, "cannot be opened", error),
        })?;
        if file
            .direct_align()
            .is_some_and(|align| align > zbdkit_spec::sidecar::BLOCK as u32)
        {
            return Err(sidecar_error(
                path,
                "the file system's direct I/O needs more than 4096 bytes of alignment",
            ));
        }
        let (data, _) = child.resolve(0, 0).ok_or_else(|| {
            OpenError::Graph("zoned: the node below must be a file or memory, or raw over one".into())
        })?;
        let data = data.clone();
        let data_id = host
            .identity(&data)
            .map_err(|e| OpenError::file("data file", "cannot be identified", e))?;
        let sidecar_id = host
            .identity(&file)
            .map_err(|e| OpenError::file(path, "cannot be identified", e))?;
        let Loaded {
            table,
            records,
            repaired,
        } = Table::load(file).await.map_err(|e| table_error(path, e))?;
        let notices = repaired
            .into_iter()
            .map(|what| format!("{}: {what}", path.display()))
            .collect();
        let geometry = Geometry::new(spec_of(table.header(), path)?)?;
        let opening = Opening {
            host,
            options,
            child,
            data,
            data_id,
            sidecar_id,
            table,
            geometry,
            records,
            notices,
            lost: None,
            recovered_from: None,
        };
        opening.check_data()?;
        Ok(opening)
    }

    /// Is this the file that the table speaks of?
    fn check_data(&self) -> Result<(), OpenError> {
        let header = self.table.header();
        let (actual, expected) = (self.child.limits().size, header.size.get());
        if actual != expected {
            let problem = if actual < expected {
                format!(
                    "has {actual} bytes, but its zone table describes {expected}: the file was truncated; restore it"
                )
            } else {
                format!(
                    "has {actual} bytes, but its zone table describes {expected}: it was extended, or the table is \
                     another image's; set the file's size back to {expected}"
                )
            };
            return Err(OpenError::Data {
                path: self.image_path(),
                problem,
            });
        }
        if self.host.image_id(&self.data).is_some_and(|id| id != header.uuid) {
            return Err(sidecar_error(
                &self.options.sidecar,
                "this zone table belongs to another image; name the right one with sidecar=FILE",
            ));
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

    /// The image's name as the user knows it, as far as the sidecar's name tells.
    fn image_path(&self) -> PathBuf {
        let name = self.options.sidecar.to_string_lossy();
        name.strip_suffix(".zones")
            .map_or_else(|| "data file".into(), PathBuf::from)
    }

    async fn finish(mut self) -> Result<(ZonedNode, Vec<String>), OpenError> {
        let status = Some(self.status());
        let recovered = self.recover().await?;
        let engine = Engine::new(self.geometry, |zone| {
            self.records.get(&zone.0).copied().unwrap_or_default()
        })
        .map_err(|error| {
            sidecar_error(
                &self.options.sidecar,
                &format!("the zone table is damaged: {error}"),
            )
        })?;
        if self.options.read_only {
            let waiters = Waiters::new(RunState::None);
            let node = ZonedNode::assemble(self.child, engine, waiters, Durability::ReadOnly, true, status);
            return Ok((node, self.notices));
        }
        self.settle(recovered).await?;
        let run_state = self.begin_epoch().await?;
        let sync_writes = self.options.run_state == RunStateMode::Sync;
        let durability = Durability::Table {
            committer: Committer::new(self.table),
            sync_writes,
        };
        let node = ZonedNode::assemble(
            self.child,
            engine,
            Waiters::new(run_state),
            durability,
            false,
            status,
        );
        Ok((node, self.notices))
    }

    fn status(&self) -> ImageStatus {
        let header = self.table.header();
        ImageStatus {
            uuid: uuid::Uuid::from_bytes(header.uuid),
            sidecar: self.options.sidecar.clone(),
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
        let place = self.directory().join(std::ffi::OsStr::from_bytes(place));
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
            // The counter of bytes is as old as the table; what was written since is known by how far the end moved.
            let moved = word.written() - record.written;
            record.counters.bytes_written = record.counters.bytes_written.saturating_add(moved);
            record.written = word.written();
        }
    }

    /// Makes durable what this opening found, so that nothing older can come back: what a killed process left in
    /// the page cache counts from now on.
    async fn settle(&mut self, recovered: bool) -> Result<(), OpenError> {
        let path = &self.options.sidecar;
        self.child.flush().await?;
        if self.table.header().open != 0 {
            self.table.rewrite().await.map_err(|e| table_error(path, e))?;
        }
        self.table.sync().await.map_err(|e| table_error(path, e))?;
        if recovered {
            self.table
                .write(&self.records)
                .await
                .map_err(|e| table_error(path, e))?;
            self.table.sync().await.map_err(|e| table_error(path, e))?;
        }
        // Only now that no older pointer can come back, and before the next one is written over it.
        if self.table.header().open != 0 {
            self.zero_above_pointers().await?;
            self.child.flush().await?;
        }
        Ok(())
    }

    /// In a sequential-preferred zone the pointer may pass a write in flight, and if that one fails, what was there
    /// before shows. A crash leaves there what it lost, or what a reset had not yet freed: zeros must be there.
    async fn zero_above_pointers(&self) -> Result<(), OpenError> {
        let lane = Lane::new(None, 0);
        for zone in self.geometry.zones() {
            if self.geometry.zone_type(zone) != ZoneType::SequentialPreferred {
                continue;
            }
            let written = self.records.get(&zone.0).map_or(0, |record| record.written);
            let (start, end) = (self.geometry.start(zone) + written, self.geometry.end(zone));
            if start < end {
                self.child.write_zeroes(&lane, start, end - start, true).await?;
            }
        }
        Ok(())
    }

    /// Ends the last epoch in the image, makes the new one's run state, then records the new epoch in the image.
    async fn begin_epoch(&mut self) -> Result<RunState, OpenError> {
        let path = self.options.sidecar.clone();
        let name = match &self.options.run_state {
            RunStateMode::Beside => Some(PathBuf::from(self.run_state_name())),
            RunStateMode::In(dir) => {
                let dir = std::path::absolute(dir).map_err(|e| OpenError::file(dir, "is no directory", e))?;
                Some(dir.join(self.run_state_name_among_others()))
            }
            RunStateMode::Sync | RunStateMode::None => None,
        };
        let bytes = name.as_ref().map_or(&b""[..], |name| name.as_os_str().as_bytes());
        if bytes.len() > self.table.header().place.len() {
            return Err(sidecar_error(
                &path,
                "the path of the run state is too long (more than 1024 bytes)",
            ));
        }
        let epoch = self.table.header().epoch.get() + 1;
        let data_file = file_stamp(self.data_id);
        let lost_epoch = self.lost.unwrap_or(0);
        // What the last epoch left is in the table by now. A kill before the header names the next one must not find
        // an epoch open whose run state is gone already: that would look like a loss.
        if self.table.header().open != 0 {
            let sum = self.table.generation_sum();
            self.update_header(|header| {
                header.open = 0;
                header.lost_epoch = lost_epoch.into();
                header.generation_sum = sum.into();
            })
            .await?;
        }
        if let Some(old) = self.recovered_from.take()
            && name
                .as_ref()
                .is_none_or(|name| self.directory().join(name) != old)
        {
            // Where the mode or the place was changed since, nobody else would; a failure leaves a file to spare.
            let _ = self.host.remove(&old);
        }
        let run_state = match name {
            None => RunState::None,
            Some(ref name) => {
                let place = self.directory().join(name);
                let records = self.records.iter().map(|(zone, record)| (ZoneNo(*zone), record));
                RunState::create(self.host, &place, &self.stamp(epoch)?, records)
                    .await
                    .map_err(|e| host_error(&place, "the run state cannot be created", e))?
            }
        };
        let open = if self.options.run_state == RunStateMode::Sync {
            OPEN_SYNC
        } else {
            OPEN
        };
        self.update_header(|header| {
            header.epoch = epoch.into();
            header.lost_epoch = lost_epoch.into();
            header.open = open;
            header.data_file = data_file;
            header.place_len = (bytes.len() as u16).into();
            header.place.fill(0);
            header.place[..bytes.len()].copy_from_slice(bytes);
        })
        .await?;
        // A copied image has no identity attached yet.
        self.host.set_image_id(&self.data, self.table.header().uuid);
        Ok(run_state)
    }

    /// Changes the header and syncs it.
    async fn update_header(&mut self, change: impl FnOnce(&mut Header)) -> Result<(), OpenError> {
        let failed = |error| table_error(&self.options.sidecar, error);
        let written = self.table.update_header(change).await;
        written.map_err(failed)?;
        self.table.sync().await.map_err(failed)
    }

    fn run_state_name(&self) -> std::ffi::OsString {
        let name = self.options.sidecar.file_name().unwrap_or_default();
        with_suffix(Path::new(name), ".run").into_os_string()
    }

    /// In a directory for many images, some of which have the same name: none may replace or remove another's.
    fn run_state_name_among_others(&self) -> PathBuf {
        let name = Path::new(self.options.sidecar.file_name().unwrap_or_default());
        let FileId { dev, ino, .. } = self.sidecar_id;
        with_suffix(name, &format!(".{dev:x}-{ino:x}.run"))
    }

    fn directory(&self) -> PathBuf {
        self.options
            .sidecar
            .parent()
            .map(Path::to_path_buf)
            .unwrap_or_default()
    }

    fn stamp(&self, epoch: u64) -> Result<Stamp, OpenError> {
        let boot_id = self
            .host
            .boot_id()
            .map_err(|e| OpenError::file("/proc/sys/kernel/random/boot_id", "cannot be read", e))?;
        Ok(Stamp {
            boot_id,
            uuid: self.table.header().uuid,
            epoch,
            data_file: self.data_id,
            sidecar: self.sidecar_id,
            nr_zones: self.geometry.nr_zones(),
        })
    }
}

fn spec_of(header: &Header, path: &Path) -> Result<GeometrySpec, OpenError> {
    let model = match header.model {
        1 => Model::HostManaged,
        2 => Model::HostAware,
        model => {
            return Err(sidecar_error(
                path,
                &format!("zone model {model} is not known to this zbdkit"),
            ));
        }
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
    })
}

fn sidecar_error(path: &Path, problem: &str) -> OpenError {
    OpenError::Sidecar {
        path: path.to_owned(),
        problem: problem.to_owned(),
    }
}

fn table_error(path: &Path, error: TableError) -> OpenError {
    match error {
        TableError::Io("syncing", source) => Error::Io {
            op: "syncing the zone table",
            errno: errno_of(&source),
        }
        .into(),
        error => sidecar_error(path, &error.to_string()),
    }
}

/// The opening error of a file of the host.
pub(crate) fn host_error(path: &Path, doing: &'static str, error: HostError) -> OpenError {
    match error {
        HostError::Io(source) => OpenError::file(path, doing, source),
        HostError::Locked(conflict) => OpenError::Locked {
            path: path.to_owned(),
            lock: conflict.permission,
            holder: conflict.holder,
        },
    }
}
