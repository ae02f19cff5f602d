//! The directory of the snapshots' zone tables, in clusters that our header extension names.
//!
//! It is never changed in place: another one is written and synced, and the write of the header that makes or deletes
//! the snapshot switches to it.

use zbdkit_io::File;
use zbdkit_spec::qcow2::{
    MAX_SNAPSHOTS, SNAPSHOT_DIRECTORY_MAGIC, SnapshotDirectory, SnapshotZones, ZBDKIT_VERSION,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::zoned::read_at;

/// The zone tables of an image's snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    pub entries: Vec<Frozen>,
}

/// The zone table of one snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frozen {
    /// Id of the snapshot.
    pub id: String,
    /// Where it lies: offset and length, bytes.
    pub table: (u64, u64),
}

/// Longest id of a snapshot, bytes.
const MAX_ID: usize = 32;

impl Directory {
    /// Reads the directory at offset and length, (0, 0) for none. The error says what is wrong with it.
    pub async fn load(file: &File, (offset, len): (u64, u64)) -> Result<Directory, String> {
        if len == 0 {
            return Ok(Directory::default());
        }
        let most = size_of::<SnapshotDirectory>() + MAX_SNAPSHOTS as usize * size_of::<SnapshotZones>();
        if len > most as u64 {
            return Err(format!(
                "the directory of the snapshots' zone tables has {len} bytes, more than it can have"
            ));
        }
        let bytes = read_at(file, offset, len as usize)
            .await
            .map_err(|error| error.to_string())?;
        Directory::decode(&bytes)
            .ok_or_else(|| "the directory of the snapshots' zone tables is damaged".to_owned())
    }

    fn decode(bytes: &[u8]) -> Option<Directory> {
        let (head, rest) = SnapshotDirectory::read_from_prefix(bytes).ok()?;
        let valid = head.magic == SNAPSHOT_DIRECTORY_MAGIC
            && head.version.get() == ZBDKIT_VERSION
            && rest.len() == head.count.get() as usize * size_of::<SnapshotZones>()
            && head.crc.get() == checksum(head, rest);
        if !valid {
            return None;
        }
        let entries = rest.chunks_exact(size_of::<SnapshotZones>()).map(|bytes| {
            let entry = SnapshotZones::read_from_bytes(bytes).ok()?;
            let id = entry.id.split(|byte| *byte == 0).next()?;
            Some(Frozen {
                id: String::from_utf8(id.to_vec()).ok()?,
                table: (entry.offset.get(), entry.len.get()),
            })
        });
        Some(Directory {
            entries: entries.collect::<Option<_>>()?,
        })
    }

    /// Its bytes; none where there are no entries.
    pub fn encode(&self) -> Vec<u8> {
        if self.entries.is_empty() {
            return Vec::new();
        }
        let entries: Vec<u8> = self
            .entries
            .iter()
            .flat_map(|frozen| {
                let mut entry = SnapshotZones::new_zeroed();
                entry.id[..frozen.id.len()].copy_from_slice(frozen.id.as_bytes());
                entry.offset = frozen.table.0.into();
                entry.len = frozen.table.1.into();
                entry.as_bytes().to_vec()
            })
            .collect();
        let mut head = SnapshotDirectory::new_zeroed();
        head.magic = SNAPSHOT_DIRECTORY_MAGIC;
        head.version = ZBDKIT_VERSION.into();
        head.count = (self.entries.len() as u32).into();
        head.crc = checksum(head, &entries).into();
        [head.as_bytes(), &entries].concat()
    }

    /// The zone table of a snapshot.
    pub fn find(&self, id: &str) -> Option<&Frozen> {
        self.entries.iter().find(|frozen| frozen.id == id)
    }

    /// With one more. Ids are short decimal numbers, but for those that a stranger chose.
    pub fn with(&self, frozen: Frozen) -> Option<Directory> {
        let fits = frozen.id.len() <= MAX_ID && !frozen.id.is_empty() && !frozen.id.contains('\0');
        let mut new = self.without(&frozen.id);
        new.entries.push(frozen);
        fits.then_some(new)
    }

    /// Without one.
    pub fn without(&self, id: &str) -> Directory {
        let mut new = self.clone();
        new.entries.retain(|frozen| frozen.id != id);
        new
    }
}

fn checksum(mut head: SnapshotDirectory, entries: &[u8]) -> u32 {
    head.crc = 0.into();
    crc32c::crc32c_append(crc32c::crc32c(head.as_bytes()), entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frozen(id: &str) -> Frozen {
        Frozen {
            id: id.into(),
            table: (1 << 20, 16384),
        }
    }

    #[test]
    fn a_directory_comes_back_and_damage_is_noticed() {
        let one = Directory::default().with(frozen("1")).unwrap();
        let both = one.with(frozen("a-stranger's")).unwrap();
        let bytes = both.encode();
        assert_eq!(Directory::decode(&bytes), Some(both.clone()));
        assert_eq!(both.without("a-stranger's"), one);
        assert!(Directory::default().encode().is_empty());
        for at in [0, 12, 16, 40, bytes.len() - 1] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(Directory::decode(&damaged), None, "{at}");
        }
        assert_eq!(Directory::decode(&bytes[..bytes.len() - 64]), None);
    }

    #[test]
    fn an_id_that_has_no_room_is_not_cut() {
        assert!(Directory::default().with(frozen(&"1".repeat(33))).is_none());
        assert!(Directory::default().with(frozen("")).is_none());
    }
}
