//! The snapshot table as it lies in the file: read with bounds, written as QEMU writes it.
//!
//! Entries are kept with their bytes, so that a rewritten table says what the old one said also where this program
//! does not understand it: extra data of later versions, ids and names that are not UTF-8.

use zbdkit_io::File;
use zbdkit_spec::qcow2::{
    MAX_CLUSTER_OFFSET, MAX_L1_BYTES, MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOTS, MAX_SNAPSHOTS_BYTES, SnapshotEntry,
    SnapshotExtra,
};
use zerocopy::{FromBytes, IntoBytes};

use super::Snapshot;
use crate::error::Error;
use crate::header::Header;
use crate::image::{file_len, read_at};

/// Extra data that version 3 asks for: size of the guest's state and of the device.
const REQUIRED_EXTRA: usize = 16;
/// Bytes read at once.
const WINDOW: u64 = 64 << 10;

/// One snapshot, and the bytes that it was read from.
#[derive(Clone, Debug)]
pub struct Entry {
    /// What it says. Id and name are for showing: `id` and `name` below are what was read.
    pub snapshot: Snapshot,
    id: Vec<u8>,
    name: Vec<u8>,
    /// All extra data; its first fields are written from `snapshot`.
    extra: Vec<u8>,
}

/// The table of an image.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// In the file's order.
    pub entries: Vec<Entry>,
    /// Bytes of the table in the file.
    pub len: u64,
    /// Entries that have more extra data in the file than is allowed, and here.
    pub cut: Vec<u32>,
}

impl Table {
    /// Offset and length in bytes of the snapshots' L1 tables, as far as there can be such tables.
    pub fn l1s(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let l1 = |entry: &Entry| (entry.snapshot.l1_offset, 8 * u64::from(entry.snapshot.l1_size));
        self.entries.iter().map(l1).filter(|(offset, len)| {
            *len <= MAX_L1_BYTES
                && offset
                    .checked_add(*len)
                    .is_some_and(|end| end <= MAX_CLUSTER_OFFSET)
        })
    }
}

impl Entry {
    /// A new snapshot; its ids and names are shorter than 64 KiB.
    pub fn new(snapshot: Snapshot) -> Entry {
        Entry {
            id: snapshot.id.clone().into_bytes(),
            name: snapshot.name.clone().into_bytes(),
            extra: vec![0; size_of::<SnapshotExtra>()],
            snapshot,
        }
    }

    /// Whether it says how large the device was, as version 3 demands. QEMU's check calls others incomplete.
    pub fn is_complete(&self) -> bool {
        self.extra.len() >= REQUIRED_EXTRA
    }

    /// Whether this is its id.
    pub fn has_id(&self, id: &str) -> bool {
        self.id == id.as_bytes()
    }

    /// Whether this is its name.
    pub fn has_name(&self, name: &str) -> bool {
        self.name == name.as_bytes()
    }

    /// The number that the id begins with.
    pub fn number(&self) -> u64 {
        let digits = self.id.iter().take_while(|byte| byte.is_ascii_digit());
        digits.fold(0, |number: u64, digit| {
            number.saturating_mul(10).saturating_add(u64::from(digit - b'0'))
        })
    }

    fn encoded(&self) -> Vec<u8> {
        let snapshot = &self.snapshot;
        let mut extra = self.extra.clone();
        extra.resize(extra.len().max(REQUIRED_EXTRA), 0);
        extra[..8].copy_from_slice(&snapshot.vm_state_size.to_be_bytes());
        extra[8..16].copy_from_slice(&snapshot.disk_size.to_be_bytes());
        if let Some(icount) = extra.get_mut(16..24) {
            icount.copy_from_slice(&snapshot.icount.unwrap_or(u64::MAX).to_be_bytes());
        }
        let head = SnapshotEntry {
            l1_table_offset: snapshot.l1_offset.into(),
            l1_size: snapshot.l1_size.into(),
            id_str_size: (self.id.len() as u16).into(),
            name_size: (self.name.len() as u16).into(),
            date_sec: snapshot.date_sec.into(),
            date_nsec: snapshot.date_nsec.into(),
            vm_clock_nsec: snapshot.vm_clock_nsec.into(),
            // A reader that knows this field only must not take a part of the state for all of it.
            vm_state_size: u32::try_from(snapshot.vm_state_size).unwrap_or(0).into(),
            extra_data_size: (extra.len() as u32).into(),
        };
        [head.as_bytes(), &extra, &self.id, &self.name].concat()
    }
}

/// Reads the table that the header names.
///
/// # Errors
/// [`Error::Invalid`] where it breaks a bound, [`Error::Truncated`] where the file ends before it.
pub async fn read(file: &File, header: &Header) -> Result<Table, Error> {
    read_window(&mut Window::new(file, header, true)?, header).await
}

/// Like [`read`] for who repairs the image: what lies past the end of the file is zeros, as for QEMU, and of too much
/// extra data the beginning is kept ([`Table::cut`]).
///
/// # Errors
/// [`Error::Invalid`] where there are too many entries, or too long ones.
pub async fn read_for_check(file: &File, header: &Header) -> Result<Table, Error> {
    read_window(&mut Window::new(file, header, false)?, header).await
}

async fn read_window(window: &mut Window<'_>, header: &Header) -> Result<Table, Error> {
    if header.nb_snapshots > MAX_SNAPSHOTS {
        return Err(Error::Invalid(format!(
            "the header names {} snapshots; there are at most {MAX_SNAPSHOTS}",
            header.nb_snapshots
        )));
    }
    // Not reserved by the number in the header.
    let (mut entries, mut cut) = (Vec::new(), Vec::new());
    for index in 0..header.nb_snapshots {
        window.align().await?;
        entries.push(read_entry(window, header, index, &mut cut).await?);
        if window.used() > MAX_SNAPSHOTS_BYTES {
            return Err(Error::Invalid(format!(
                "Snapshot table is too big: entry {index} ends past its {MAX_SNAPSHOTS_BYTES} bytes"
            )));
        }
    }
    Ok(Table {
        entries,
        len: window.used(),
        cut,
    })
}

async fn read_entry(
    window: &mut Window<'_>,
    header: &Header,
    index: u32,
    cut: &mut Vec<u32>,
) -> Result<Entry, Error> {
    let head = window.take(size_of::<SnapshotEntry>()).await?;
    let head = SnapshotEntry::read_from_bytes(&head).expect("as many bytes as were asked for");
    let extra_len = head.extra_data_size.get();
    if extra_len > MAX_SNAPSHOT_EXTRA && window.strict {
        return Err(Error::Invalid(format!(
            "Too much extra metadata in snapshot table entry {index}: {extra_len} bytes, at most \
             {MAX_SNAPSHOT_EXTRA} are allowed; `zbdkit check -r all` removes them"
        )));
    }
    let kept = extra_len.min(MAX_SNAPSHOT_EXTRA);
    let extra = window.take(kept as usize).await?;
    if extra_len > kept {
        cut.push(index);
        window.skip(extra_len - kept);
    }
    let id = window.take(usize::from(head.id_str_size.get())).await?;
    let name = window.take(usize::from(head.name_size.get())).await?;
    let field = |at: usize| {
        let bytes = extra.get(at..at + 8)?;
        Some(u64::from_be_bytes(bytes.try_into().expect("eight bytes")))
    };
    let snapshot = Snapshot {
        id: String::from_utf8_lossy(&id).into_owned(),
        name: String::from_utf8_lossy(&name).into_owned(),
        l1_offset: head.l1_table_offset.get(),
        l1_size: head.l1_size.get(),
        date_sec: head.date_sec.get(),
        date_nsec: head.date_nsec.get(),
        vm_clock_nsec: head.vm_clock_nsec.get(),
        vm_state_size: field(0).unwrap_or(u64::from(head.vm_state_size.get())),
        disk_size: field(8).unwrap_or(header.size),
        icount: field(16).filter(|icount| *icount != u64::MAX),
        extra: extra
            .get(size_of::<SnapshotExtra>()..)
            .unwrap_or_default()
            .to_vec(),
    };
    Ok(Entry {
        snapshot,
        id,
        name,
        extra,
    })
}

/// The bytes of a table of these snapshots.
///
/// # Errors
/// [`Error::Refused`] where it would be larger than readers accept.
pub fn encode(entries: &[Entry]) -> Result<Vec<u8>, Error> {
    let mut table = Vec::new();
    for entry in entries {
        table.resize(table.len().next_multiple_of(8), 0);
        table.extend(entry.encoded());
        if table.len() as u64 > MAX_SNAPSHOTS_BYTES {
            return Err(Error::Refused(format!(
                "the snapshot table would be larger than {MAX_SNAPSHOTS_BYTES} bytes: delete snapshots first"
            )));
        }
    }
    Ok(table)
}

/// Bytes of the file in order, a piece of them in memory.
struct Window<'a> {
    file: &'a File,
    file_len: u64,
    start: u64,
    /// The next byte that is taken.
    at: u64,
    held: Vec<u8>,
    held_at: u64,
    /// Bytes past the end of the file are an error.
    strict: bool,
}

impl<'a> Window<'a> {
    fn new(file: &'a File, header: &Header, strict: bool) -> Result<Window<'a>, Error> {
        Ok(Window {
            file,
            file_len: file_len(file)?,
            start: header.snapshots_offset,
            at: header.snapshots_offset,
            held: Vec::new(),
            held_at: header.snapshots_offset,
            strict,
        })
    }

    fn used(&self) -> u64 {
        self.at - self.start
    }

    /// Skips what pads entries to a multiple of 8 bytes.
    async fn align(&mut self) -> Result<(), Error> {
        let padding = self.used().next_multiple_of(8) - self.used();
        self.take(padding as usize).await.map(drop)
    }

    fn skip(&mut self, len: u32) {
        self.at = self.at.saturating_add(u64::from(len));
    }

    /// The next bytes: at most 64 KiB.
    async fn take(&mut self, len: usize) -> Result<Vec<u8>, Error> {
        let end = self
            .at
            .checked_add(len as u64)
            .filter(|end| *end <= self.file_len || !self.strict);
        let end = end.ok_or(Error::Truncated {
            what: "the snapshot table",
            offset: self.at,
            len: self.file_len,
        })?;
        if end > self.held_at + self.held.len() as u64 {
            let n = WINDOW.min(self.file_len.saturating_sub(self.at)).max(len as u64);
            self.held = if self.at < self.file_len {
                read_at(self.file, self.at, n as usize).await?
            } else {
                vec![0; len]
            };
            self.held_at = self.at;
        }
        let from = (self.at - self.held_at) as usize;
        self.at = end;
        Ok(self.held[from..from + len].to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    use zbdkit_io::{FileKind, Runtime, RuntimeOptions};

    const OFFSET: u64 = 1 << 16;

    fn snapshot(id: &str, name: &str) -> Snapshot {
        Snapshot {
            id: id.to_owned(),
            name: name.to_owned(),
            l1_offset: 0x5_0000,
            l1_size: 7,
            date_sec: 1_700_000_000,
            date_nsec: 5,
            vm_clock_nsec: 1 << 40,
            vm_state_size: 0,
            disk_size: 3 << 20,
            icount: None,
            extra: Vec::new(),
        }
    }

    /// Reads a table of `count` entries from these bytes.
    fn parse(bytes: &[u8], count: u32) -> Result<Table, Error> {
        let (file, header) = file_of(bytes, count);
        let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
        runtime.block_on(read(&file, &header))
    }

    fn parse_for_check(bytes: &[u8], count: u32) -> Result<Table, Error> {
        let (file, header) = file_of(bytes, count);
        let runtime = Runtime::new(RuntimeOptions::default()).unwrap();
        runtime.block_on(read_for_check(&file, &header))
    }

    fn file_of(bytes: &[u8], count: u32) -> (File, Header) {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &vec![0xff; OFFSET as usize]).unwrap();
        std::io::Write::write_all(&mut file, bytes).unwrap();
        let file = File::from_fd(OwnedFd::from(file), FileKind::default());
        let mut header = Header::new(16);
        header.size = 9 << 20;
        header.snapshots_offset = OFFSET;
        header.nb_snapshots = count;
        (file, header)
    }

    #[test]
    fn what_is_written_is_read() {
        let mut first = snapshot("1", "before the upgrade");
        first.vm_state_size = 1 << 33;
        let mut second = snapshot("17", "");
        second.icount = Some(3);
        let entries = [Entry::new(first.clone()), Entry::new(second.clone())];
        let bytes = encode(&entries).unwrap();
        let table = parse(&bytes, 2).unwrap();
        assert_eq!(table.len, bytes.len() as u64);
        let read: Vec<Snapshot> = table.entries.iter().map(|entry| entry.snapshot.clone()).collect();
        assert_eq!(read, [first, second]);
        assert_eq!(table.entries[1].number(), 17);
        // Older readers see no state rather than a part of it.
        assert_eq!(bytes[32..36], [0; 4]);
    }

    #[test]
    fn what_is_not_understood_survives_a_rewrite() {
        let mut entry = Entry::new(snapshot("", ""));
        entry.id = b"\xff\xfe".to_vec();
        entry.name = b"caf\xe9".to_vec();
        entry.extra = [vec![0; 24], b"of a later version".to_vec()].concat();
        let bytes = encode(&[entry]).unwrap();
        let table = parse(&bytes, 1).unwrap();
        assert_eq!(table.entries[0].snapshot.name, "caf\u{fffd}");
        assert_eq!(table.entries[0].snapshot.extra, b"of a later version");
        assert_eq!(encode(&table.entries).unwrap(), bytes);
    }

    #[test]
    fn an_entry_without_sizes_takes_them_from_the_image_and_is_incomplete() {
        for extra in [0, 8] {
            let mut entry = Entry::new(snapshot("1", "old"));
            entry.extra.truncate(0);
            let mut bytes = entry.encoded();
            bytes[39] = extra;
            bytes.drain(40..40 + REQUIRED_EXTRA - usize::from(extra));
            let table = parse(&bytes, 1).unwrap();
            assert!(!table.entries[0].is_complete());
            assert_eq!(table.entries[0].snapshot.disk_size, 9 << 20);
            // A rewrite repairs it.
            let table = parse(&encode(&table.entries).unwrap(), 1).unwrap();
            assert!(table.entries[0].is_complete());
        }
    }

    #[test]
    fn a_table_past_the_end_of_the_file_is_an_error() {
        let bytes = encode(&[Entry::new(snapshot("1", "one"))]).unwrap();
        assert!(parse(&bytes, 1).is_ok());
        for cut in [0, 1, 39, 40, 63, bytes.len() - 1] {
            let error = parse(&bytes[..cut], 1).unwrap_err();
            assert!(matches!(error, Error::Truncated { .. }), "{cut}: {error}");
        }
        assert!(matches!(parse(&bytes, 65536), Err(Error::Truncated { .. })));
        assert!(matches!(parse(&bytes, 65537), Err(Error::Invalid(_))));
    }

    #[test]
    fn extra_data_without_bounds_is_an_error() {
        let mut entry = Entry::new(snapshot("1", "one"));
        entry.extra = vec![0; 1024];
        assert!(parse(&encode(&[entry.clone()]).unwrap(), 1).is_ok());
        entry.extra.push(0);
        let bytes = encode(&[entry.clone(), entry]).unwrap();
        let error = parse(&bytes, 2).unwrap_err();
        assert!(error.to_string().contains("Too much extra metadata"), "{error}");
        // A check keeps what is allowed of it, and goes on with the next one.
        let table = parse_for_check(&bytes, 2).unwrap();
        assert_eq!((table.cut, table.len), (vec![0, 1], bytes.len() as u64));
        assert_eq!(table.entries[1].snapshot.name, "one");
        assert!(parse(&encode(&table.entries).unwrap(), 2).is_ok());
    }

    #[test]
    fn for_a_check_there_are_zeros_past_the_end_of_the_file() {
        let bytes = encode(&[Entry::new(snapshot("1", "one"))]).unwrap();
        let table = parse_for_check(&bytes[..41], 3).unwrap();
        assert_eq!(table.entries[0].snapshot.l1_offset, 0x5_0000);
        assert_eq!(table.entries[0].snapshot.id, "\0");
        assert!(table.entries[0].is_complete() && !table.entries[2].is_complete());
        let mut endless = bytes;
        endless[36..40].fill(0xff);
        assert!(parse_for_check(&endless, 1).is_err());
    }

    #[test]
    fn a_table_larger_than_readers_accept_is_neither_written_nor_read() {
        let mut entry = Entry::new(snapshot("1", "one"));
        entry.name = vec![b'n'; 65535];
        let entries = vec![entry; 1024];
        assert!(matches!(encode(&entries), Err(Error::Refused(_))));
        let mut bytes = encode(&entries[..1020]).unwrap();
        for entry in &entries[..8] {
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes.extend(entry.encoded());
        }
        let error = parse(&bytes, 1028).unwrap_err();
        assert!(error.to_string().contains("too big"), "{error}");
    }
}
