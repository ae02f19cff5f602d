//! The run state: each zone's current written end, for the case that only this process dies.
//!
//! The kernel keeps what was written to the page cache when a process is killed. So an acknowledged write survives
//! that if its zone's written end lies in the page cache too, stored before the acknowledgement: one aligned word a
//! zone, in a file beside the image. On tmpfs the file is mapped and a store is all it takes; elsewhere the words
//! are written once a batch of completions. After a power loss the words mean nothing, and the stamp tells.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use zbdkit_io::{File, IoBuf, Words};
use zbdkit_spec::sidecar::{
    BLOCK, FileStamp, RUN_INVALID_OFFSET, RUN_MAGIC, RunHeader, VERSION, WORD_GENERATION,
    WORD_GENERATION_SHIFT, WORD_VALID, WORD_WRITTEN,
};
use zbdkit_zone::{Engine, ZoneNo, ZoneRecord};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::rounds::Rounds;
use super::table::reserve;
use crate::host::{FileId, FileOptions, Host, HostError};
use crate::lock::LockMode;

/// What the words are true for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The kernel's boot.
    pub boot_id: [u8; 16],
    /// The image.
    pub uuid: [u8; 16],
    /// One opening for writing.
    pub epoch: u64,
    /// The data file.
    pub data_file: FileId,
    /// The sidecar.
    pub sidecar: FileId,
    /// How many words.
    pub nr_zones: u32,
}

/// Where the written ends go before an acknowledgement.
pub enum RunState {
    /// Nowhere: nothing survives the process anyway, or the user waived it.
    None,
    /// Into a mapping, as they move.
    Mapped(Place, Words),
    /// By small writes, once a batch.
    Written(Place, Rounds<Vec<ZoneNo>>),
}

/// The file that holds the words.
pub struct Place {
    host: Arc<dyn Host>,
    path: PathBuf,
    file: File,
    failed: AtomicI32,
}

impl RunState {
    /// Creates the file at `path`, replacing one that an earlier epoch left. `records` are the zones that are not new.
    pub async fn create<'a>(
        host: &Arc<dyn Host>,
        path: &Path,
        stamp: &Stamp,
        records: impl Iterator<Item = (ZoneNo, &'a ZoneRecord)>,
    ) -> Result<RunState, HostError> {
        if host.exists(path)? {
            host.remove(path)?;
        }
        let file = host.open(path, &FileOptions::new_file())?;
        let size = BLOCK as u64 + 8 * u64::from(stamp.nr_zones);
        file.set_len(size)?;
        reserve(&file, size).await?;
        host.write_now(&file, header(stamp).as_bytes(), 0)?;
        let words = host.map_words(&file, BLOCK as u64, stamp.nr_zones as usize)?;
        let place = Place {
            host: host.clone(),
            path: path.to_owned(),
            file,
            failed: AtomicI32::new(0),
        };
        Ok(match words {
            Some(words) => {
                // A store moves only the written end, so the generation must be there before.
                for (zone, record) in records {
                    words.store(zone.0 as usize, generation(record));
                }
                RunState::Mapped(place, words)
            }
            None => RunState::Written(place, Rounds::new()),
        })
    }

    /// Called under the zone's lock whenever its written end moves.
    pub fn store_mapped(&self, zone: ZoneNo, written: u64) {
        if let RunState::Mapped(_, words) = self {
            // Nobody else stores meanwhile: `set` has the zone for itself.
            let index = zone.0 as usize;
            words.store(index, WORD_VALID | words.load(index) & WORD_GENERATION | written);
        }
    }

    /// Makes the zone's current written end safe from a kill, together with those of the batch.
    pub async fn publish(&self, zone: ZoneNo, engine: &Engine) -> Result<(), i32> {
        let RunState::Written(place, rounds) = self else {
            return Ok(());
        };
        let add = |zones: &mut Vec<ZoneNo>| {
            if !zones.contains(&zone) {
                zones.push(zone);
            }
        };
        // One turn of the executor: the other completions of this batch join.
        let joined = rounds.join(add, zbdkit_io::yield_now(), async |zones: Vec<ZoneNo>| {
            for zone in zones {
                place.store(zone, word(&engine.record(zone)));
            }
        });
        joined.await.map_err(|_| rustix::io::Errno::IO.raw_os_error())?;
        place.check()
    }

    /// Stores a zone's record at once; the zone is closed to everybody else, and the durable table has the record.
    pub fn set(&self, zone: ZoneNo, record: &ZoneRecord) -> Result<(), i32> {
        match self {
            RunState::None => Ok(()),
            RunState::Mapped(_, words) => {
                words.store(zone.0 as usize, word(record));
                Ok(())
            }
            RunState::Written(place, _) => {
                place.store(zone, word(record));
                place.check()
            }
        }
    }

    /// The epoch failed: what the words say is not believed any more.
    pub fn invalidate(&self) {
        if let RunState::Mapped(place, _) | RunState::Written(place, _) = self {
            let written = place
                .host
                .write_now(&place.file, &1u64.to_le_bytes(), RUN_INVALID_OFFSET);
            // If not even that can be written, the file goes; if that fails too, the log has the failure.
            if written.is_err() {
                let _ = place.host.remove(&place.path);
            }
        }
    }

    /// After a clean close: the table says it all.
    pub fn remove(&self) -> io::Result<()> {
        match self {
            RunState::None => Ok(()),
            RunState::Mapped(place, _) | RunState::Written(place, _) => place.host.remove(&place.path),
        }
    }
}

impl Place {
    fn store(&self, zone: ZoneNo, word: u64) {
        let offset = BLOCK as u64 + 8 * u64::from(zone.0);
        if let Err(error) = self.host.write_now(&self.file, &word.to_le_bytes(), offset) {
            self.failed
                .store(crate::error::errno_of(&error), Ordering::Release);
        }
    }

    fn check(&self) -> Result<(), i32> {
        match self.failed.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(errno),
        }
    }
}

/// A word of the run state that is in use.
#[derive(Clone, Copy, Debug)]
pub struct Word(u64);

impl Word {
    /// The written end, bytes from the zone's start.
    pub fn written(self) -> u64 {
        self.0 & WORD_WRITTEN
    }

    /// Whether it is as old as the last reset that `record` knows.
    pub fn is_of(self, record: &ZoneRecord) -> bool {
        self.0 & WORD_GENERATION == generation(record)
    }
}

/// Tells the words of the run state at `path` that are in use. The error says why none is believed.
pub async fn recover(
    host: &Arc<dyn Host>,
    path: &Path,
    expected: &Stamp,
    mut found: impl FnMut(ZoneNo, Word),
) -> Result<(), String> {
    let gone = |error: HostError| match error {
        HostError::Io(error) => format!("{}: {error}", path.display()),
        HostError::Locked(_) => format!("{}: in use", path.display()),
    };
    let options = FileOptions {
        lock: LockMode::None,
        ..FileOptions::existing(true)
    };
    let file = host.open(path, &options).map_err(gone)?;
    let size = BLOCK + 8 * expected.nr_zones as usize;
    if file.len().map_err(|e| gone(e.into()))? < size as u64 {
        return Err(format!("{}: truncated", path.display()));
    }
    let buf = IoBuf::alloc(size);
    file.read(buf.clone(), 0).await.map_err(|e| gone(e.into()))?;
    let bytes = buf.to_vec();
    check_header(&bytes, expected).map_err(|why| format!("{}: {why}", path.display()))?;
    for (zone, word) in bytes[BLOCK..].chunks_exact(8).enumerate() {
        let word = u64::from_le_bytes(word.try_into().expect("chunks of eight"));
        if word & WORD_VALID != 0 {
            found(ZoneNo(zone as u32), Word(word));
        }
    }
    Ok(())
}

fn check_header(bytes: &[u8], expected: &Stamp) -> Result<(), &'static str> {
    let (found, _) = RunHeader::read_from_prefix(bytes).map_err(|_| "truncated")?;
    let wanted = header(expected);
    if found.invalid.get() != 0 {
        return Err("its epoch failed, so it is not valid");
    }
    if found.as_bytes() == wanted.as_bytes() {
        return Ok(());
    }
    Err(if found.magic != RUN_MAGIC || found.version != wanted.version {
        "not a run state"
    } else if found.uuid != wanted.uuid {
        "of another image"
    } else if found.boot_id != wanted.boot_id {
        "the machine was restarted since"
    } else if found.epoch != wanted.epoch {
        "of another epoch"
    } else if found.data_file != wanted.data_file || found.sidecar != wanted.sidecar {
        "the image's files were replaced since"
    } else {
        "damaged"
    })
}

fn header(stamp: &Stamp) -> RunHeader {
    let mut header = RunHeader::new_zeroed();
    header.magic = RUN_MAGIC;
    header.version = VERSION.into();
    header.boot_id = stamp.boot_id;
    header.uuid = stamp.uuid;
    header.epoch = stamp.epoch.into();
    header.nr_zones = stamp.nr_zones.into();
    header.data_file = file_stamp(stamp.data_file);
    header.sidecar = file_stamp(stamp.sidecar);
    header.crc = crc32c::crc32c(&header.as_bytes()[..RUN_INVALID_OFFSET as usize]).into();
    header
}

/// The on-disk form of a file's identity.
pub fn file_stamp(id: FileId) -> FileStamp {
    FileStamp {
        dev: id.dev.into(),
        ino: id.ino.into(),
        btime: id.btime.into(),
    }
}

fn word(record: &ZoneRecord) -> u64 {
    WORD_VALID | generation(record) | (record.written & WORD_WRITTEN)
}

fn generation(record: &ZoneRecord) -> u64 {
    u64::from(record.counters.resets) << WORD_GENERATION_SHIFT & WORD_GENERATION
}
