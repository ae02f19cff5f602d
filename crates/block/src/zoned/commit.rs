//! The durable side of an epoch: flushes, and the records of resets and finishes, in the order of docs/durability.md.
//!
//! One round at a time writes the table. A round captures the written ends, syncs the data they cover, then
//! writes and syncs exactly what it captured. The records of resets (and what the operator set) need no data to
//! be durable and may come without that sync; a finish brings its data along like a flush.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex};

use zbdkit_spec::sidecar::Header;
use zbdkit_zone::{Engine, ZoneNo, ZoneRecord};

use super::mirror::{Mirror, is_beyond_bare_tables};
use super::open::Holder;
use super::rounds::Rounds;
use super::table::{MARKS_LEN, Table, TableError};
use super::waiters::{Waiters, lock};
use crate::error::{Error, errno_of};
use crate::marks::MarkList;
use crate::node::Node;

/// What a round has to make durable.
#[derive(Default)]
pub struct Work {
    records: Vec<(ZoneNo, ZoneRecord)>,
    /// Also every acknowledged write.
    flush: bool,
    /// Also the slots of descriptor extensions that were written.
    slots: bool,
    /// Also what was written to the child.
    data: bool,
    /// Also this list of marked blocks.
    marks: Option<MarkList>,
    /// Then also that blocks are of this size.
    block_size: Option<u32>,
}

/// The writer of an image's durable table.
pub struct Committer {
    rounds: Rounds<Work>,
    /// Taken by the leader of the running round.
    tables: Mutex<Option<Tables>>,
    /// The first failed write-back, final for the epoch; 0 while there was none.
    failed: AtomicI32,
    /// Why the last list of marks was not taken although the epoch goes on; 0 where it was.
    no_room: AtomicI32,
    /// The table is not the image's any more.
    abandoned: AtomicBool,
}

/// What the rounds write to.
struct Tables {
    table: Table,
    /// What follows it, where the table lies inside an image.
    mirror: Option<Mirror>,
    holder: Option<Arc<dyn Holder>>,
}

impl Committer {
    /// A committer to the table of a new epoch.
    pub fn new(table: Table, mirror: Option<Mirror>, holder: Option<Arc<dyn Holder>>) -> Committer {
        Committer {
            rounds: Rounds::new(),
            tables: Mutex::new(Some(Tables {
                table,
                mirror,
                holder,
            })),
            failed: AtomicI32::new(0),
            no_room: AtomicI32::new(0),
            abandoned: AtomicBool::new(false),
        }
    }

    /// Fails where the epoch has failed.
    pub fn check(&self) -> Result<(), Error> {
        match self.failed.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(Error::Epoch { errno }),
        }
    }

    /// The epoch is over: what the page cache holds is not known any more, so nothing is promised on it.
    pub fn fail(&self, errno: i32, waiters: &Waiters) {
        if self
            .failed
            .compare_exchange(0, errno, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
        {
            waiters.run_state.invalidate();
            let error = std::io::Error::from_raw_os_error(errno);
            tracing::error!("a write-back failed ({error}): the image takes no changes until it is reopened");
        }
    }

    /// Makes everything durable that was acknowledged before the call, and `records` with it.
    pub async fn flush(&self, records: &[(ZoneNo, ZoneRecord)], at: &Image<'_>) -> Result<(), Error> {
        let add = |work: &mut Work| {
            work.records.extend_from_slice(records);
            work.flush = true;
        };
        self.round(add, at).await
    }

    /// Makes these records durable.
    pub async fn record(&self, records: &[(ZoneNo, ZoneRecord)], at: &Image<'_>) -> Result<(), Error> {
        self.round(|work| work.records.extend_from_slice(records), at)
            .await
    }

    /// Makes the slots durable that were written before the call. Only a round syncs the table's file: a failed write-back is
    /// told to one sync alone, and if that were another's, the round's own would be believed.
    pub async fn sync_slots(&self, at: &Image<'_>) -> Result<(), Error> {
        self.round(|work| work.slots = true, at).await
    }

    /// Makes a list of marked blocks durable; before it, where `data` is set, what was written to the child. One at a time. The
    /// first one fails alone where the disk is too full for any.
    pub async fn keep_marks(&self, list: MarkList, data: bool, at: &Image<'_>) -> Result<(), Error> {
        let add = |work: &mut Work| {
            work.data |= data;
            work.marks = Some(list);
        };
        self.round(add, at).await?;
        match self.no_room.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(Error::Io {
                op: "making room for the list of marked blocks",
                errno,
            }),
        }
    }

    /// Makes it durable that the image has blocks of another size. What zones hold must be durable before, and fit it.
    pub async fn set_block_size(&self, block_size: u32, at: &Image<'_>) -> Result<(), Error> {
        self.round(|work| work.block_size = Some(block_size), at).await
    }

    async fn round(&self, add: impl FnOnce(&mut Work), at: &Image<'_>) -> Result<(), Error> {
        self.check()?;
        let joined = self.rounds.join(add, async {}, async |work: Work| {
            let tables = lock(&self.tables).take();
            let Some(mut tables) = tables else { return };
            if self.failed.load(Ordering::Acquire) == 0
                && let Err(errno) = run(work, &mut tables, at, &self.no_room).await
            {
                self.fail(errno, at.waiters);
            }
            *lock(&self.tables) = Some(tables);
        });
        if joined.await.is_err() {
            self.fail(rustix::io::Errno::CANCELED.raw_os_error(), at.waiters);
        }
        self.check()
    }

    /// The table was replaced by another one: nothing is written to this one any more.
    pub fn abandon(&self, waiters: &Waiters) {
        drop(lock(&self.tables).take());
        self.abandoned.store(true, Ordering::Release);
        let over = rustix::io::Errno::CANCELED.raw_os_error();
        let _ = self
            .failed
            .compare_exchange(0, over, Ordering::AcqRel, Ordering::Acquire);
        if let Err(error) = waiters.run_state.remove() {
            tracing::warn!("the run state could not be removed: {error}");
        }
    }

    /// Ends the epoch cleanly: everything durable, then the mark cleared, then the run state removed.
    pub async fn close(&self, at: &Image<'_>) -> Result<(), Error> {
        if self.abandoned.load(Ordering::Acquire) {
            return Ok(());
        }
        self.flush(&[], at).await?;
        let tables = lock(&self.tables).take();
        // Whatever still comes would find no table to be recorded in, and must not seem to have been.
        let over = rustix::io::Errno::CANCELED.raw_os_error();
        let _ = self
            .failed
            .compare_exchange(0, over, Ordering::AcqRel, Ordering::Acquire);
        let Some(tables) = tables else {
            return Err(Error::Epoch {
                errno: libc::ECANCELED,
            });
        };
        let closed = end(tables).await;
        closed.map_err(|error| Error::Io {
            op: "closing the zone table",
            errno: table_errno(&error),
        })?;
        if let Err(error) = at.waiters.run_state.remove() {
            tracing::warn!("the run state could not be removed: {error}");
        }
        Ok(())
    }
}

/// What a round works on.
pub struct Image<'a> {
    /// The zones.
    pub engine: &'a Engine,
    /// The data.
    pub child: &'a Arc<dyn Node>,
    /// The listeners.
    pub waiters: &'a Waiters,
}

/// Clears the epoch's mark. All records are durable.
async fn end(tables: Tables) -> Result<(), TableError> {
    let Tables {
        mut table, mirror, ..
    } = tables;
    if mirror.is_some() {
        // Its last words are not durable yet, and who finds the image closed may read nothing else.
        table.sync().await?;
    }
    let sum = table.generation_sum();
    table
        .update_header(|header| {
            header.open = 0;
            header.lost_epoch = 0.into();
            header.place_len = 0.into();
            header.generation_sum = sum.into();
        })
        .await?;
    table.sync().await
}

/// An error is final for the epoch; a list of marks that there is no room for is none.
async fn run(work: Work, tables: &mut Tables, at: &Image<'_>, no_room: &AtomicI32) -> Result<(), i32> {
    if work.slots {
        tables.table.sync().await.map_err(|error| table_errno(&error))?;
    }
    let mut changes = BTreeMap::new();
    if work.flush {
        at.engine.take_dirty(&mut |zone, record| {
            changes.insert(zone.0, record);
        });
    }
    for (zone, record) in work.records {
        // Its zone is drained and closed, so this is its newest record, whatever was captured; and no later
        // capture may bring the older one back before the engine has this one.
        at.engine.clear_dirty(zone);
        changes.insert(zone.0, record);
    }
    if work.flush || work.data {
        at.child.flush().await.map_err(|error| error.errno())?;
    }
    if let Some(list) = &work.marks {
        let full = match place_of_marks(tables).await {
            Err(errno) if is_full(errno) => {
                // Nothing was to be made durable, unless the image itself could not note what it gave.
                at.child.check().map_err(|error| error.errno())?;
                errno
            }
            place => {
                keep_marks(tables, place?, list).await?;
                0
            }
        };
        no_room.store(full, Ordering::Release);
    }
    if let Some(holder) = &tables.holder
        && changes.values().any(is_beyond_bare_tables)
    {
        holder.mark().await.map_err(|error| error.errno())?;
    }
    let written = async {
        if !changes.is_empty() {
            write(tables, &changes).await?;
        }
        if let Some(block_size) = work.block_size {
            write_block_size(&mut tables.table, block_size).await?;
        }
        Ok(())
    };
    written.await.map_err(|error| table_errno(&error))
}

/// A place for a list of marks, with its space, where the table has none yet.
async fn place_of_marks(Tables { table, holder, .. }: &Tables) -> Result<Option<u64>, i32> {
    if table.has_marks() {
        return Ok(None);
    }
    let place = match holder {
        Some(holder) => holder.allocate(MARKS_LEN).await.map_err(|error| error.errno())?,
        None => table.behind(),
    };
    if let Err(error) = table.make_room(place).await {
        if let Some(holder) = holder {
            // Where that fails, too, it stays lost space.
            let _ = holder.free(place, MARKS_LEN).await;
        }
        return Err(table_errno(&error));
    }
    Ok(Some(place))
}

/// Makes a list durable, the first one at `place`.
async fn keep_marks(tables: &mut Tables, place: Option<u64>, list: &MarkList) -> Result<(), i32> {
    let Tables { table, holder, .. } = tables;
    let errno = |error: TableError| table_errno(&error);
    let Some(place) = place else {
        table.write_marks(list).await.map_err(errno)?;
        return table.sync().await.map_err(errno);
    };
    if let Some(holder) = holder {
        // Programs that know no marks must not read the image, and so write to it, as if there were none.
        holder.mark().await.map_err(|error| error.errno())?;
    }
    table.add_marks(place, list).await.map_err(errno)
}

/// Whether an error says no more than that something does not fit.
fn is_full(errno: i32) -> bool {
    matches!(errno, libc::ENOSPC | libc::EDQUOT | libc::EFBIG)
}

async fn write(tables: &mut Tables, changes: &BTreeMap<u32, ZoneRecord>) -> Result<(), TableError> {
    if let Some(mirror) = &mut tables.mirror {
        mirror.lower(changes).await?;
    }
    tables.table.write(changes).await?;
    tables.table.sync().await?;
    if let Some(mirror) = &mut tables.mirror {
        // Durable with the next sync: until then it is behind, which the table makes good.
        mirror.raise(changes).await?;
    }
    Ok(())
}

/// Behind a sync and before another: a header that is torn leaves its other copy, and the old size.
async fn write_block_size(table: &mut Table, block_size: u32) -> Result<(), TableError> {
    let change = |header: &mut Header| header.block_size = block_size.into();
    table.update_header(change).await?;
    table.sync().await
}

fn table_errno(error: &TableError) -> i32 {
    match error {
        TableError::Io(_, source) => errno_of(source),
        _ => rustix::io::Errno::IO.raw_os_error(),
    }
}
