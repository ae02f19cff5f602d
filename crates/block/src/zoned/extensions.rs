//! The bytes of zone descriptor extensions.
//!
//! A zone's record says whether it has one, and its checksum. The bytes lie in slots behind the durable table, one a zone;
//! over memory in this process. A slot is written only while no record speaks of it, and synced before one does. It keeps its
//! bytes until it is written again.

use std::collections::HashMap;
use std::sync::Mutex;

use zbdkit_io::File;
use zbdkit_zone::ZoneNo;

use super::table::{Table, TableError, extension_size, read_at, slot_size, slots_offset, write_at};
use super::waiters::lock;

/// Where a device keeps its extensions.
pub enum Extensions {
    /// In this process.
    Memory(Mutex<HashMap<u32, Vec<u8>>>),
    /// In a file.
    Slots(Slots),
    /// Nowhere: the device has none.
    None,
}

/// The slots behind a durable table. A cheap handle.
#[derive(Clone)]
pub struct Slots {
    file: File,
    /// Where slot 0 begins, bytes.
    offset: u64,
    /// Bytes of an extension.
    size: u32,
}

/// What a record has of its zone's extension.
pub fn checksum(extension: &[u8]) -> u32 {
    crc32c::crc32c(extension)
}

impl Slots {
    /// The slots of a table's device, where it has extensions.
    pub fn of(table: &Table) -> Option<Slots> {
        let header = table.header();
        let size = extension_size(header);
        (size != 0).then(|| Slots {
            file: table.file().clone(),
            offset: table.base() + slots_offset(header.nr_zones.get()),
            size,
        })
    }

    fn place(&self, zone: ZoneNo) -> u64 {
        self.offset + u64::from(zone.0) * slot_size(self.size)
    }

    /// Reads what is in a zone's slot.
    pub async fn read(&self, zone: ZoneNo) -> Result<Vec<u8>, TableError> {
        read_at(&self.file, self.place(zone), self.size as usize).await
    }

    /// Reads a zone's extension, and holds it against what its record has of it.
    pub async fn checked(&self, zone: ZoneNo, wanted: u32) -> Result<Vec<u8>, TableError> {
        let bytes = self.read(zone).await?;
        match checksum(&bytes) == wanted {
            true => Ok(bytes),
            false => Err(TableError::ExtensionDamaged { zone }),
        }
    }

    /// Writes a zone's slot, not synced.
    pub async fn write(&self, zone: ZoneNo, extension: &[u8]) -> Result<(), TableError> {
        let mut slot = vec![0; slot_size(self.size) as usize];
        slot[..extension.len()].copy_from_slice(extension);
        write_at(&self.file, &slot, self.place(zone)).await
    }
}

impl Extensions {
    /// Those of a table.
    pub fn of(table: &Table) -> Extensions {
        Slots::of(table).map_or(Extensions::None, Extensions::Slots)
    }

    /// None yet, kept in this process.
    pub fn in_memory() -> Extensions {
        Extensions::Memory(Mutex::default())
    }

    /// Reads a zone's extension, if there may be one: what its record has must be held against it.
    pub async fn read(&self, zone: ZoneNo) -> Result<Option<Vec<u8>>, TableError> {
        match self {
            Extensions::Memory(all) => Ok(lock(all).get(&zone.0).cloned()),
            Extensions::Slots(slots) => slots.read(zone).await.map(Some),
            Extensions::None => Ok(None),
        }
    }

    /// Keeps a zone's extension, not synced.
    pub async fn write(&self, zone: ZoneNo, extension: &[u8]) -> Result<(), TableError> {
        match self {
            Extensions::Memory(all) => {
                lock(all).insert(zone.0, extension.to_vec());
                Ok(())
            }
            Extensions::Slots(slots) => slots.write(zone, extension).await,
            Extensions::None => Ok(()),
        }
    }

    /// The slots, where they are in a file.
    pub fn slots(&self) -> Option<&Slots> {
        match self {
            Extensions::Slots(slots) => Some(slots),
            Extensions::Memory(_) | Extensions::None => None,
        }
    }
}
