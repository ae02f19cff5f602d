//! Internal snapshots.
//!
//! A snapshot is an L1 table that the header does not name, but the snapshot table does. Making one raises the refcount of
//! all that the active L1 table reaches; applying one makes a copy of its L1 table the active one; deleting one lowers
//! the counts again.
//!
//! # Order
//!
//! Each operation is decided by one write of the header ([`switch`] has what they share). What it needs comes before that,
//! what it leaves goes after it, so that a power cut finds the state before or the state after, and clusters that
//! are counted too often at worst. The flag COPIED, which lets a writer change a cluster in place, is taken away
//! before counts rise and set after they fell, each synced: at no moment does it stand at a cluster that is counted twice.
//! The other way round cannot be had as well, since count and flag lie in different sectors: a cut may leave clusters
//! that are counted once without the flag. That costs a copy at the next write there.
//!
//! No request may be under way meanwhile.

pub(crate) mod switch;
pub(crate) mod table;
pub(crate) mod tree;

use std::time::{SystemTime, UNIX_EPOCH};

use zbdkit_io::File;
use zbdkit_spec::qcow2::{MAX_L1_BYTES, MAX_SNAPSHOTS, OFLAG_COPIED};

use crate::error::Error;
use crate::header::Header;
use crate::image::{Meta, Qcow2};
use crate::l2::{COPIED, Entry};
use switch::{l1_bytes, l1_uncopied};
use table::Table;
use tree::{Change, Tables, uncopied};

/// Longest name that QEMU's tools can find again, bytes.
const MAX_NAME: usize = 255;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique, a number in text.
    pub id: String,
    /// Chosen by the user.
    pub name: String,
    /// Where its L1 table lies, bytes.
    pub l1_offset: u64,
    /// Entries of its L1 table.
    pub l1_size: u32,
    /// When it was made, seconds since 1970.
    pub date_sec: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// How long the guest had run, nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of the guest's saved state.
    pub vm_state_size: u64,
    /// Size of the device, bytes.
    pub disk_size: u64,
    /// Instructions that the guest had executed.
    pub icount: Option<u64>,
    /// Extra data that this program does not know.
    pub extra: Vec<u8>,
}

impl Qcow2 {
    /// The snapshots, in the order of the image's table.
    ///
    /// # Errors
    /// [`Error::Invalid`] and [`Error::Truncated`] where the table cannot be.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>, Error> {
        let header = self.lock().await.header.clone();
        read_snapshots(&self.file, &header).await
    }

    /// The id that the next snapshot will have.
    ///
    /// # Errors
    /// As [`Qcow2::snapshots`].
    pub async fn next_snapshot_id(&self) -> Result<String, Error> {
        let header = self.lock().await.header.clone();
        Ok(next_id(&table::read(&self.file, &header).await?))
    }

    /// Makes a snapshot of what the device holds. `also` may change extensions in the write of the header that makes it.
    ///
    /// # Errors
    /// [`Error::Refused`] where the image cannot have (another) one: refcounts without room, too many snapshots, a name
    /// that cannot be, data in a file of its own. Nothing has changed then, and neither after an error of `also`.
    pub async fn snapshot_create(
        &self,
        name: &str,
        now: SystemTime,
        also: impl FnOnce(&mut Header, &Snapshot) -> Result<(), Error>,
    ) -> Result<Snapshot, Error> {
        check_name(name)?;
        let mut meta = self.lock().await;
        let mut list = self.begin(&mut meta).await?;
        if list.entries.len() >= MAX_SNAPSHOTS as usize {
            return Err(Error::Refused(format!(
                "an image has at most {MAX_SNAPSHOTS} snapshots"
            )));
        }
        let tables = Tables::new(&self.file, &meta.header);
        let l1 = self.with_l1(|l1| l1.clone());
        let fixed = self.fixed(&mut meta, &tables, &list)?;
        tables
            .survey(meta.refcounts()?, &l1, Change::Shared, &fixed)
            .await?;

        let mut snapshot = new_snapshot(next_id(&list), name, now, &meta.header);
        let (old_table, old_len) = (meta.header.snapshots_offset, list.len);
        let l1_len = 8 * l1.len() as u64;
        snapshot.l1_offset = self.place(&mut meta, &l1_bytes(&l1_uncopied(&l1))).await?;
        list.entries.push(table::Entry::new(snapshot.clone()));
        let switched = async {
            let (offset, len) = self.place_list(&mut meta, &list).await?;
            let switched = async {
                // What could be refused comes before what cannot be taken back.
                let mut header = with_list(&meta.header, offset, &list);
                also(&mut header, &snapshot)?;
                self.share_active(&mut meta, &tables, &l1).await?;
                self.switch_header(&mut meta, header).await
            };
            let switched = switched.await;
            if switched.is_err() {
                self.unplace(&mut meta, offset, len);
            }
            switched
        };
        if let Err(error) = switched.await {
            self.unplace(&mut meta, snapshot.l1_offset, l1_len);
            return Err(error);
        }
        self.unplace(&mut meta, old_table, old_len);
        self.reap(&mut meta).await?;
        Ok(snapshot)
    }

    /// Makes the device what it was at a snapshot, its size too. What it is now is lost, unless another snapshot has it.
    /// `wanted` is an id, or else a name. `also` may change extensions in the write of the header that does it.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is no such snapshot, several have the name, or refcounts have no room.
    pub async fn snapshot_apply(
        &self,
        wanted: &str,
        also: impl FnOnce(&mut Header) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut meta = self.lock().await;
        let list = self.begin(&mut meta).await?;
        let snapshot = list.entries[find(&list, wanted)?].clone();
        if !snapshot.is_complete() && meta.header.version >= 3 {
            return Err(incomplete(&snapshot.snapshot));
        }
        let snapshot = snapshot.snapshot;
        let tables = Tables::new(&self.file, &meta.header);
        let new = self.active_after(&meta.header, &tables, &snapshot).await?;
        let old = self.with_l1(|l1| l1.clone());

        // An entry that stays the same keeps its references, whatever the flags at it.
        let stays = |index: usize| {
            let entry = |l1: &[u64]| l1.get(index).map_or(0, |entry| entry & !OFLAG_COPIED);
            entry(&old) == entry(&new)
        };
        let only = |l1: &[u64]| -> Vec<u64> {
            let changed = |(index, entry): (usize, &u64)| if stays(index) { 0 } else { *entry };
            l1.iter().enumerate().map(changed).collect()
        };
        let (comes, goes) = (only(&new), only(&old));
        let fixed = self.fixed(&mut meta, &tables, &list)?;
        let refcounts = meta.refcounts()?;
        let copied = tables.survey(refcounts, &comes, Change::Shared, &fixed).await?;
        tables.survey(refcounts, &goes, Change::Dropped, &fixed).await?;

        let (old_offset, old_len) = (meta.header.l1_offset, 8 * old.len() as u64);
        let offset = self.place(&mut meta, &l1_bytes(&new)).await?;
        let switched = async {
            let mut header = meta.header.clone();
            header.l1_offset = offset;
            header.l1_size = new.len() as u32;
            header.size = snapshot.disk_size;
            also(&mut header)?;
            if copied {
                // Another program left the flags in the snapshot's tables.
                self.clear_copied(&tables, &comes).await?;
                self.sync().await?;
            }
            let raised = tables.raise(meta.refcounts()?, &comes).await;
            self.note(raised)?;
            // Synced by what writes the header.
            self.switch_header(&mut meta, header).await
        };
        if let Err(error) = switched.await {
            self.unplace(&mut meta, offset, 8 * new.len() as u64);
            return Err(error);
        }
        self.switched(&tables, new, snapshot.disk_size)?;
        self.let_go(&mut meta, &tables, &goes).await?;
        self.unplace(&mut meta, old_offset, old_len);
        self.reap(&mut meta).await
    }

    /// Deletes a snapshot: `wanted` is an id, or else a name. `also` may change extensions in the write of the header that
    /// does it.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is no such snapshot, or several have the name.
    pub async fn snapshot_delete(
        &self,
        wanted: &str,
        also: impl FnOnce(&mut Header) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut meta = self.lock().await;
        let mut list = self.begin(&mut meta).await?;
        let index = find(&list, wanted)?;
        let tables = Tables::new(&self.file, &meta.header);
        let fixed = self.fixed(&mut meta, &tables, &list)?;
        let snapshot = list.entries.remove(index).snapshot;
        let l1 = tables.l1(snapshot.l1_offset, snapshot.l1_size).await?;
        tables
            .survey(meta.refcounts()?, &l1, Change::Dropped, &fixed)
            .await?;

        let (old_table, old_len) = (meta.header.snapshots_offset, list.len);
        let (offset, len) = self.place_list(&mut meta, &list).await?;
        let mut header = with_list(&meta.header, offset, &list);
        let switched = match also(&mut header) {
            Ok(()) => self.switch_header(&mut meta, header).await,
            Err(error) => Err(error),
        };
        if let Err(error) = switched {
            self.unplace(&mut meta, offset, len);
            return Err(error);
        }
        self.unplace(&mut meta, old_table, old_len);
        self.let_go(&mut meta, &tables, &l1).await?;
        self.unplace(&mut meta, snapshot.l1_offset, 8 * l1.len() as u64);
        self.reap(&mut meta).await?;
        // The counts before the flags that rely on them.
        self.sync().await?;
        self.set_copied(&mut meta, &tables).await
    }

    /// What every change of snapshots begins with: nothing half done, and the table.
    async fn begin(&self, meta: &mut Meta) -> Result<Table, Error> {
        self.check_change(0, 0)?;
        if self.data.is_some() {
            return Err(Error::Unsupported(
                "an image with an external data file cannot have internal snapshots".into(),
            ));
        }
        // What has room for compressed data may be let go.
        meta.packing = 0..0;
        self.reap(meta).await?;
        table::read(&self.file, &meta.header).await
    }

    /// Writes a snapshot table to new clusters; it is not named yet. Where it lies, and its length.
    async fn place_list(&self, meta: &mut Meta, list: &Table) -> Result<(u64, u64), Error> {
        let bytes = table::encode(&list.entries)?;
        Ok((self.place(meta, &bytes).await?, bytes.len() as u64))
    }

    /// Writes the header that switches; what it names is synced before.
    async fn switch_header(&self, meta: &mut Meta, new: Header) -> Result<(), Error> {
        self.write_header(meta, |header| {
            *header = new;
            Ok(())
        })
        .await
    }

    /// Counts everything that the active table reaches once more, after its flags said so durably. The counts are synced
    /// by what writes the header.
    async fn share_active(&self, meta: &mut Meta, tables: &Tables, l1: &[u64]) -> Result<(), Error> {
        let cleared = self.clear_copied(tables, l1).await;
        // Also where it failed half-way, the cache must not say more than the file.
        self.l2.forget();
        cleared?;
        self.rewrite_l1(meta, l1_uncopied(l1)).await?;
        self.sync().await?;
        let raised = tables.raise(meta.refcounts()?, l1).await;
        self.note(raised)
    }

    /// Clears the flag COPIED in all L2 tables of an L1 table.
    async fn clear_copied(&self, tables: &Tables, l1: &[u64]) -> Result<(), Error> {
        for index in 0..l1.len() {
            if let Some(offset) = tables.l2_offset(l1, index)? {
                let old = tables.l2(offset).await?;
                let new: Vec<Entry> = old.iter().copied().map(uncopied).collect();
                self.rewrite_l2(tables, offset, &old, &new).await?;
            }
        }
        Ok(())
    }

    /// Sets the flag COPIED in the active tables where a cluster is counted once, and only there.
    async fn set_copied(&self, meta: &mut Meta, tables: &Tables) -> Result<(), Error> {
        let mut l1 = self.with_l1(|l1| l1.clone());
        let before = l1.clone();
        for index in 0..l1.len() {
            let Some(offset) = tables.l2_offset(&l1, index)? else {
                continue;
            };
            let old = tables.l2(offset).await?;
            let mut new = old.clone();
            for entry in new.iter_mut().filter(|entry| !entry.is_compressed()) {
                let mut named = tables.named(*entry)?;
                if let Some(cluster) = named.next() {
                    let flag = flag_for(meta.refcounts()?.get(cluster).await?);
                    entry.word = entry.word & !COPIED | flag;
                }
            }
            self.rewrite_l2(tables, offset, &old, &new).await?;
            let flag = flag_for(meta.refcounts()?.get(offset >> self.cluster_bits).await?);
            l1[index] = l1[index] & !OFLAG_COPIED | flag;
        }
        self.l2.forget();
        if l1 != before {
            self.rewrite_l1(meta, l1).await?;
        }
        Ok(())
    }

    /// The L1 table that is to be active after a snapshot was applied: its own as far as the device reaches. What lies
    /// behind is the saved state of a guest, which is not the device's.
    async fn active_after(
        &self,
        header: &Header,
        tables: &Tables,
        snapshot: &Snapshot,
    ) -> Result<Vec<u64>, Error> {
        let size = snapshot.disk_size;
        if !size.is_multiple_of(512)
            || size > i64::MAX as u64
            || header.l1_entries_for(size) > MAX_L1_BYTES / 8
        {
            return Err(Error::Invalid(format!(
                "snapshot {} is of a device of {size} bytes, which no device has with clusters of {} bytes",
                snapshot.id,
                self.cluster_size()
            )));
        }
        let mut l1 = tables.l1(snapshot.l1_offset, snapshot.l1_size).await?;
        l1.resize(header.l1_entries_for(size).max(1) as usize, 0);
        Ok(l1_uncopied(&l1))
    }
}

/// The snapshots of an image that need not be open: backing and data files are not looked for.
///
/// # Errors
/// [`Error::Invalid`] and [`Error::Truncated`] where the table cannot be.
pub async fn read_snapshots(file: &File, header: &Header) -> Result<Vec<Snapshot>, Error> {
    let list = table::read(file, header).await?;
    Ok(list.entries.into_iter().map(|entry| entry.snapshot).collect())
}

/// The header, once it names this snapshot table.
fn with_list(header: &Header, offset: u64, list: &Table) -> Header {
    let mut header = header.clone();
    header.snapshots_offset = offset;
    header.nb_snapshots = list.entries.len() as u32;
    header
}

fn flag_for(count: u64) -> u64 {
    if count == 1 { COPIED } else { 0 }
}

fn check_name(name: &str) -> Result<(), Error> {
    if name.len() > MAX_NAME || name.contains('\0') {
        return Err(Error::Refused(format!(
            "a snapshot's name has at most {MAX_NAME} bytes, none of them 0: {name:?}"
        )));
    }
    Ok(())
}

fn new_snapshot(id: String, name: &str, now: SystemTime, header: &Header) -> Snapshot {
    let date = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    Snapshot {
        id,
        name: name.to_owned(),
        l1_offset: 0,
        l1_size: header.l1_size,
        date_sec: u32::try_from(date.as_secs()).unwrap_or(u32::MAX),
        date_nsec: date.subsec_nanos(),
        vm_clock_nsec: 0,
        vm_state_size: 0,
        disk_size: header.size,
        icount: None,
        extra: Vec::new(),
    }
}

/// One more than the largest number that an id has, as QEMU does it.
fn next_id(list: &Table) -> String {
    let largest = list.entries.iter().map(table::Entry::number).max().unwrap_or(0);
    let taken = |id: &String| list.entries.iter().any(|entry| entry.has_id(id));
    let after = (0..=largest).rev().map(|below| below.to_string());
    let mut ids = largest
        .checked_add(1)
        .map(|id| id.to_string())
        .into_iter()
        .chain(after);
    ids.find(|id| !taken(id)).unwrap_or_default()
}

/// The snapshot with this id, or else the one with this name.
fn find(list: &Table, wanted: &str) -> Result<usize, Error> {
    let with_id = |entry: &table::Entry| entry.has_id(wanted);
    if let Some(index) = list.entries.iter().position(with_id) {
        return Ok(index);
    }
    let mut named = (0..list.entries.len()).filter(|index| list.entries[*index].has_name(wanted));
    match (named.next(), named.next()) {
        (Some(index), None) => Ok(index),
        (None, _) => Err(Error::Refused(format!(
            "no snapshot has the id or name {wanted:?}"
        ))),
        (Some(one), Some(two)) => {
            let all = [one, two].into_iter().chain(named);
            let ids: Vec<&str> = all
                .map(|index| list.entries[index].snapshot.id.as_str())
                .collect();
            Err(Error::Refused(format!(
                "several snapshots have the name {wanted:?}; say which one by its id: {}",
                ids.join(", ")
            )))
        }
    }
}

/// The error for a snapshot of version 3 that does not say how large the device was.
pub(crate) fn incomplete(snapshot: &Snapshot) -> Error {
    Error::Invalid(format!(
        "the snapshot table's entry of snapshot {} is incomplete: it does not say how large the device was; \
         `zbdkit check -r all` takes it to be as large as now",
        snapshot.id
    ))
}
