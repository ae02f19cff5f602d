//! What files hold, what of it is durable, and what a crash may leave.
//!
//! A [`Disk`] is moved by [`Event`]s. A run records its events; moving a copy of the disk that it began with through
//! the first of them gives the disk at that moment, and [`Disk::kill`] and [`Disk::power_cut`] then give what somebody
//! finds who comes after a kill or a power cut there.
//!
//! The model is as mean as the promises of POSIX allow. A sync covers what was completed when it was submitted, in
//! its file; anything else may reach the medium at any time, in any order, torn at 512 bytes, or not. Names are
//! durable after a sync of their directory. What a failed sync should have covered is not covered by later ones.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::choose::{Choose, Pieces};

/// Size in bytes of the blocks in which contents are shared between disks.
const BLOCK: usize = 4096;
/// What is written whole or not at all, bytes.
pub const SECTOR: u64 = 512;

/// The contents of a file.
#[derive(Clone, Debug, Default)]
pub struct Image {
    len: u64,
    blocks: BTreeMap<u64, Arc<[u8; BLOCK]>>,
    /// The identity that was attached to the file.
    pub id: Option<[u8; 16]>,
}

impl Image {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies out `to.len()` bytes at `offset`; zeros past the end.
    pub fn read(&self, offset: u64, to: &mut [u8]) {
        let mut done = 0;
        while done < to.len() {
            let (block, from) = (
                (offset + done as u64) / BLOCK as u64,
                (offset as usize + done) % BLOCK,
            );
            let n = (BLOCK - from).min(to.len() - done);
            match self.blocks.get(&block) {
                Some(bytes) => to[done..done + n].copy_from_slice(&bytes[from..from + n]),
                None => to[done..done + n].fill(0),
            }
            done += n;
        }
    }

    /// Whether the bytes are the same.
    fn same(&self, other: &Image) -> bool {
        let block = |image: &Image, number: &u64| image.blocks.get(number).cloned();
        self.len == other.len
            && self.blocks.keys().chain(other.blocks.keys()).all(|number| {
                match (block(self, number), block(other, number)) {
                    (Some(one), Some(two)) => Arc::ptr_eq(&one, &two) || one == two,
                    // A block of zeros is no different from a hole.
                    (one, two) => one.or(two).is_none_or(|bytes| *bytes == [0; BLOCK]),
                }
            })
    }

    fn write(&mut self, offset: u64, from: &[u8]) {
        let mut done = 0;
        while done < from.len() {
            let (block, at) = (
                (offset + done as u64) / BLOCK as u64,
                (offset as usize + done) % BLOCK,
            );
            let n = (BLOCK - at).min(from.len() - done);
            let bytes = self.blocks.entry(block).or_insert_with(|| Arc::new([0; BLOCK]));
            Arc::make_mut(bytes)[at..at + n].copy_from_slice(&from[done..done + n]);
            done += n;
        }
        self.len = self.len.max(offset + from.len() as u64);
    }

    /// Zeroes below the end.
    fn zero(&mut self, offset: u64, len: u64) {
        let end = (offset + len).min(self.len);
        let mut at = offset;
        while at < end {
            let (block, from) = (at / BLOCK as u64, at as usize % BLOCK);
            let n = (BLOCK - from).min((end - at) as usize);
            if n == BLOCK {
                self.blocks.remove(&block);
            } else if let Some(bytes) = self.blocks.get_mut(&block) {
                Arc::make_mut(bytes)[from..from + n].fill(0);
            }
            at += n as u64;
        }
    }

    fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
        }
        self.len = len;
    }

    fn apply(&mut self, change: &Change, pieces: &Pieces) {
        match (change, pieces) {
            (_, Pieces::None) => {}
            (Change::Length(len), _) => self.set_len(*len),
            (Change::Id(id), _) => self.id = Some(*id),
            (Change::Write { offset, data }, Pieces::All) => self.write(*offset, data),
            (Change::Zero { offset, len }, Pieces::All) => self.zero(*offset, *len),
            (Change::Write { offset, data }, pieces) => each_piece(*offset, data.len() as u64, |i, at, n| {
                if pieces.has(i) {
                    let from = (at - offset) as usize;
                    self.write(at, &data[from..from + n as usize]);
                }
            }),
            (Change::Zero { offset, len }, pieces) => each_piece(*offset, *len, |i, at, n| {
                if pieces.has(i) {
                    self.zero(at, n);
                }
            }),
        }
    }

    fn hash(&self, hash: &mut Hash) {
        hash.add(self.len);
        for (number, block) in &self.blocks {
            // A block of zeros is no different from a hole.
            if block.as_slice() != [0; BLOCK].as_slice() {
                hash.add(*number);
                hash.bytes(block.as_slice());
            }
        }
        hash.bytes(&self.id.unwrap_or_default());
    }
}

/// Calls with number, offset and length of each piece.
fn each_piece(offset: u64, len: u64, mut piece: impl FnMut(usize, u64, u64)) {
    let (mut at, mut index) = (offset, 0);
    while at < offset + len {
        let n = (SECTOR - at % SECTOR).min(offset + len - at);
        piece(index, at, n);
        at += n;
        index += 1;
    }
}

/// A change of a file.
#[derive(Clone, Debug)]
pub enum Change {
    /// Bytes.
    Write {
        /// Where, bytes.
        offset: u64,
        /// What.
        data: Arc<[u8]>,
    },
    /// A range reads as zeros; the length stays.
    Zero {
        /// Where, bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// The length in bytes.
    Length(u64),
    /// The attached identity.
    Id([u8; 16]),
}

impl Change {
    /// How many pieces may take effect one without the other.
    pub fn pieces(&self) -> usize {
        match self {
            Change::Write { offset, data } => {
                ((offset + data.len() as u64).div_ceil(SECTOR) - offset / SECTOR) as usize
            }
            Change::Zero { offset, len } => ((offset + len).div_ceil(SECTOR) - offset / SECTOR) as usize,
            Change::Length(_) | Change::Id(_) => 1,
        }
    }
}

/// A file, whatever its name: its inode number.
pub type FileNo = u64;

/// What happened. `id`s tell the operations of a run apart.
#[derive(Clone, Debug)]
pub enum Event {
    /// A change was handed to the kernel.
    Submitted {
        /// The operation.
        id: u64,
        /// The file.
        file: FileNo,
        /// What it will do.
        change: Change,
    },
    /// It is over; with [`Pieces::All`] it succeeded.
    Completed {
        /// The operation.
        id: u64,
        /// What it did.
        pieces: Pieces,
    },
    /// A change by one short system call, or by a store.
    Changed {
        /// The file.
        file: FileNo,
        /// What it did.
        change: Change,
    },
    /// A sync was handed to the kernel.
    SyncSubmitted {
        /// The operation.
        id: u64,
        /// The file.
        file: FileNo,
    },
    /// It succeeded.
    Synced {
        /// The operation.
        id: u64,
    },
    /// It failed.
    SyncFailed {
        /// The operation.
        id: u64,
    },
    /// A name now means this (new) file, or nothing.
    Named {
        /// The name.
        path: PathBuf,
        /// The file.
        file: Option<FileNo>,
    },
    /// The directory of this name was synced.
    NamesSynced {
        /// A name in it.
        path: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Durability {
    Durable,
    /// The next sync makes it durable.
    Dirty,
    /// Its sync failed: no later one will say what became of it.
    Doubtful,
}

#[derive(Clone, Debug)]
struct Done {
    serial: u64,
    change: Change,
    pieces: Pieces,
    durability: Durability,
}

#[derive(Clone, Debug, Default)]
struct Inode {
    /// What is durable, up to the first of `later` that is not.
    base: Image,
    /// Completed changes since, in order.
    later: Vec<Done>,
    /// All of it applied: what a reader sees.
    live: Image,
}

impl Inode {
    fn change(&mut self, serial: u64, change: Change, pieces: Pieces) {
        self.live.apply(&change, &pieces);
        self.later.push(Done {
            serial,
            change,
            pieces,
            durability: Durability::Dirty,
        });
    }

    /// A sync of what was completed before `serial` is over.
    fn synced(&mut self, serial: u64, durability: Durability) {
        for done in self.later.iter_mut().filter(|done| done.serial < serial) {
            if done.durability == Durability::Dirty {
                done.durability = durability;
            }
        }
        let durable = self
            .later
            .iter()
            .take_while(|done| done.durability == Durability::Durable)
            .count();
        for done in self.later.drain(..durable) {
            self.base.apply(&done.change, &done.pieces);
        }
    }

    /// Draws what became of each change that `uncertain` says is uncertain.
    fn settle(&self, choose: &mut dyn Choose, uncertain: impl Fn(&Done) -> bool) -> Inode {
        let mut inode = Inode {
            base: self.base.clone(),
            later: Vec::new(),
            live: self.base.clone(),
        };
        for done in &self.later {
            let mut done = done.clone();
            if uncertain(&done) {
                done.pieces = cut(choose, &done.change, &done.pieces);
            }
            inode.live.apply(&done.change, &done.pieces);
            inode.later.push(done);
        }
        inode
    }

    /// What a failed sync left in doubt is dirty again.
    fn forgive(&mut self) {
        for done in &mut self.later {
            if done.durability == Durability::Doubtful {
                done.durability = Durability::Dirty;
            }
        }
    }

    /// All that is there is durable.
    fn harden(&mut self) {
        self.base = self.live.clone();
        self.later.clear();
    }
}

/// What of a change that took effect in these pieces is left.
fn cut(choose: &mut dyn Choose, change: &Change, pieces: &Pieces) -> Pieces {
    let count = change.pieces();
    match (choose.pieces(count), pieces) {
        (cut, Pieces::All) => cut,
        (Pieces::All, pieces) => pieces.clone(),
        (cut, pieces) => Pieces::Some((0..count).map(|i| cut.has(i) && pieces.has(i)).collect()),
    }
}

/// Names, with what of them is not durable yet.
#[derive(Clone, Debug, Default)]
struct Names {
    durable: BTreeMap<PathBuf, FileNo>,
    later: Vec<(PathBuf, Option<FileNo>)>,
    live: BTreeMap<PathBuf, FileNo>,
}

fn set_name(names: &mut BTreeMap<PathBuf, FileNo>, path: &Path, file: Option<FileNo>) {
    match file {
        Some(file) => names.insert(path.to_owned(), file),
        None => names.remove(path),
    };
}

/// All files of a machine, and the operations in flight.
#[derive(Clone, Debug)]
pub struct Disk {
    inodes: BTreeMap<FileNo, Inode>,
    names: Names,
    in_flight: BTreeMap<u64, (FileNo, Change)>,
    /// File, and the serial number of the first change that is not covered.
    syncs: BTreeMap<u64, (FileNo, u64)>,
    serial: u64,
    next_file: FileNo,
    /// The running kernel's boot id.
    pub boot: u64,
}

impl Default for Disk {
    fn default() -> Disk {
        Disk {
            inodes: BTreeMap::new(),
            names: Names::default(),
            in_flight: BTreeMap::new(),
            syncs: BTreeMap::new(),
            serial: 0,
            next_file: 100,
            boot: 1,
        }
    }
}

impl Disk {
    /// The file of that name.
    pub fn find(&self, path: &Path) -> Option<FileNo> {
        self.names.live.get(path).copied()
    }

    /// The name of the file, if it has one.
    pub fn path_of(&self, file: FileNo) -> Option<&Path> {
        let mut names = self.names.live.iter();
        names
            .find(|(_, named)| **named == file)
            .map(|(path, _)| path.as_path())
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &Path> {
        self.names.live.keys().map(PathBuf::as_path)
    }

    /// The file that an operation in flight is about.
    pub fn file_of(&self, id: u64) -> Option<FileNo> {
        let change = self.in_flight.get(&id).map(|(file, _)| *file);
        change.or_else(|| self.syncs.get(&id).map(|(file, _)| *file))
    }

    /// What a reader of the file sees.
    pub fn contents(&self, file: FileNo) -> &Image {
        &self.inodes[&file].live
    }

    /// Whether the file of that name is the same, byte for byte, as it was on another disk.
    pub fn same(&self, path: &Path, before: &Disk) -> bool {
        match (self.find(path), before.find(path)) {
            (Some(now), Some(then)) => self.contents(now).same(before.contents(then)),
            (now, then) => now == then,
        }
    }

    /// A number that no file has had.
    pub fn new_file_no(&self) -> FileNo {
        self.next_file
    }

    /// Moves the disk by one event.
    pub fn apply(&mut self, event: &Event) {
        self.serial += 1;
        match event {
            Event::Submitted { id, file, change } => {
                self.in_flight.insert(*id, (*file, change.clone()));
            }
            Event::Completed { id, pieces } => {
                if let Some((file, change)) = self.in_flight.remove(id) {
                    self.change(file, change, pieces.clone());
                }
            }
            Event::Changed { file, change } => self.change(*file, change.clone(), Pieces::All),
            Event::SyncSubmitted { id, file } => {
                self.syncs.insert(*id, (*file, self.serial));
            }
            Event::Synced { id } => self.end_sync(*id, Durability::Durable),
            Event::SyncFailed { id } => self.end_sync(*id, Durability::Doubtful),
            Event::Named { path, file } => {
                if let Some(file) = file {
                    self.inodes.entry(*file).or_default();
                    self.next_file = self.next_file.max(file + 1);
                }
                set_name(&mut self.names.live, path, *file);
                self.names.later.push((path.clone(), *file));
            }
            Event::NamesSynced { path } => {
                let (synced, later) = std::mem::take(&mut self.names.later)
                    .into_iter()
                    .partition(|(other, _)| other.parent() == path.parent());
                self.names.later = later;
                for (path, file) in Vec::from_iter::<Vec<_>>(synced) {
                    set_name(&mut self.names.durable, &path, file);
                }
            }
        }
    }

    fn change(&mut self, file: FileNo, change: Change, pieces: Pieces) {
        let serial = self.serial;
        self.inodes
            .entry(file)
            .or_default()
            .change(serial, change, pieces);
    }

    fn end_sync(&mut self, id: u64, durability: Durability) {
        if let Some((file, serial)) = self.syncs.remove(&id)
            && let Some(inode) = self.inodes.get_mut(&file)
        {
            // What is completed while a sync runs may have been what made it fail.
            let serial = if durability == Durability::Doubtful {
                self.serial
            } else {
                serial
            };
            inode.synced(serial, durability);
        }
    }

    /// The process dies: what it completed is there, what was in flight in part; the kernel lives on. What a failed
    /// sync left clean in the page cache may have been dropped from there, if `dropped` allows it. If it is still there
    /// it reads well, but no sync writes it: of a zone table that is part of the model; of data it is not, since no
    /// opening could rewrite all data.
    pub fn kill(&self, choose: &mut dyn Choose, dropped: bool) -> Disk {
        let mut disk = self.clone();
        disk.syncs.clear();
        let doubtful = |done: &Done| done.durability == Durability::Doubtful;
        for (file, inode) in &mut disk.inodes {
            if !inode.later.iter().any(doubtful) {
                continue;
            }
            if dropped {
                *inode = inode.settle(choose, doubtful);
            }
            let path = self.path_of(*file);
            if path.is_none_or(|path| path.extension().is_none_or(|e| e != "zones")) {
                inode.forgive();
            }
        }
        for (file, change) in std::mem::take(&mut disk.in_flight).into_values() {
            disk.serial += 1;
            let pieces = choose.pieces(change.pieces());
            disk.change(file, change, pieces);
        }
        disk
    }

    /// The machine loses power: what was synced is there, of all else any part.
    pub fn power_cut(&self, choose: &mut dyn Choose) -> Disk {
        let mut disk = self.clone();
        disk.syncs.clear();
        disk.boot += 1;
        for (file, change) in std::mem::take(&mut disk.in_flight).into_values() {
            disk.serial += 1;
            disk.change(file, change, Pieces::All);
        }
        let mut versions: BTreeMap<PathBuf, Vec<Option<FileNo>>> = BTreeMap::new();
        for (path, file) in std::mem::take(&mut disk.names.later) {
            versions.entry(path).or_default().push(file);
        }
        for (path, later) in versions {
            let version = choose.below(later.len() as u64 + 1) as usize;
            if version > 0 {
                set_name(&mut disk.names.durable, &path, later[version - 1]);
            }
        }
        disk.names.live = disk.names.durable.clone();
        let named: Vec<FileNo> = disk.names.live.values().copied().collect();
        disk.inodes.retain(|file, _| named.contains(file));
        for inode in disk.inodes.values_mut() {
            *inode = inode.settle(choose, |done| done.durability != Durability::Durable);
            inode.harden();
        }
        disk
    }

    /// A number that differs where names or contents of files differ.
    pub fn hash(&self) -> u64 {
        let mut hash = Hash(0xcbf2_9ce4_8422_2325);
        hash.add(self.boot);
        for (path, file) in &self.names.live {
            hash.bytes(path.as_os_str().as_encoded_bytes());
            hash.add(*file);
            self.inodes[file].live.hash(&mut hash);
        }
        hash.0
    }
}

struct Hash(u64);

impl Hash {
    fn add(&mut self, word: u64) {
        self.0 = (self.0 ^ word)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.add(bytes.len() as u64);
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().for_each(|word| self.add(u64::from_le_bytes(*word)));
        rest.iter().for_each(|byte| self.add((*byte).into()));
    }
}
