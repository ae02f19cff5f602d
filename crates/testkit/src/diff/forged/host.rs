//! A machine whose files lie in memory. An image may name files; here they can do no harm.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use zbdkit_block::{FileId, FileOptions, Host, HostError};
use zbdkit_io::{File, LocalBoxFuture, Storage, StorageOp, Words, yield_now};

/// A file grows by at most this much at once.
const GROWTH: u64 = 128 << 20;
/// No file of a forged image becomes larger: who asks for more gets "no space".
const LARGEST: u64 = 512 << 20;
/// More operations than any run on a small image needs.
const MOST_OPERATIONS: u64 = 400_000;

thread_local! {
    /// Which file was asked for its length last: tells files apart that are behind a [`File`].
    static PROBED: Cell<u64> = const { Cell::new(0) };
}

/// The files, by name.
#[derive(Clone, Default)]
pub struct MemoryHost(Arc<Mutex<BTreeMap<PathBuf, Stored>>>);

#[derive(Clone)]
struct Stored {
    number: u64,
    read_only: bool,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    operations: u64,
}

impl MemoryHost {
    /// Puts a file there.
    pub fn put(&self, path: &Path, bytes: Vec<u8>) {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = files.len() as u64 + 1;
        let state = State { bytes, operations: 0 };
        files.insert(
            path.to_owned(),
            Stored {
                number,
                read_only: false,
                state: Arc::new(Mutex::new(state)),
            },
        );
    }

    /// What a file holds.
    pub fn get(&self, path: &Path) -> Option<Vec<u8>> {
        let stored = self.find(path)?;
        Some(stored.with(|state| state.bytes.clone()))
    }

    fn find(&self, path: &Path) -> Option<Stored> {
        let files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        files.get(path).cloned()
    }

    fn find_file(&self, file: &File) -> io::Result<Stored> {
        PROBED.set(0);
        file.len()?;
        let files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = files.values().find(|stored| stored.number == PROBED.get());
        found
            .cloned()
            .ok_or_else(|| io::Error::other("not a file of this machine"))
    }
}

impl Stored {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn writable(&self) -> io::Result<()> {
        assert!(!self.read_only, "a file that is open read-only is changed");
        Ok(())
    }
}

impl State {
    fn grow(&mut self, end: u64) -> io::Result<()> {
        let len = self.bytes.len() as u64;
        assert!(
            end <= len + GROWTH,
            "a file of {len} bytes is written up to {end}"
        );
        if end > LARGEST {
            return Err(io::Error::from_raw_os_error(28));
        }
        if end > len {
            self.bytes.resize(end as usize, 0);
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.grow(offset.saturating_add(data.len() as u64))?;
        self.bytes[offset as usize..offset as usize + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.bytes.len() as u64);
        if offset < end {
            self.bytes[offset as usize..end as usize].fill(0);
        }
    }
}

impl Storage for Stored {
    fn submit(&self, op: StorageOp) -> LocalBoxFuture<'static, io::Result<()>> {
        let stored = self.clone();
        Box::pin(async move {
            yield_now().await;
            let operations = stored.with(|state| {
                state.operations += 1;
                state.operations
            });
            assert!(operations < MOST_OPERATIONS, "work without end");
            match op {
                StorageOp::Read { buf, offset } => stored.with(|state| {
                    let there = state.bytes.get(offset as usize..).unwrap_or_default();
                    let copied = buf.copy_from(there);
                    buf.fill(copied..buf.len(), 0);
                    Ok(())
                }),
                StorageOp::DataSync | StorageOp::Sync => Ok(()),
                StorageOp::Write { buf, offset } => {
                    stored.writable()?;
                    stored.with(|state| state.write(offset, &buf.to_vec()))
                }
                StorageOp::PunchHole { offset, len } | StorageOp::ZeroRange { offset, len } => {
                    stored.writable()?;
                    stored.with(|state| state.zero(offset, len));
                    Ok(())
                }
                StorageOp::Allocate { offset, len } => {
                    stored.writable()?;
                    stored.with(|state| state.grow(offset.saturating_add(len)))
                }
            }
        })
    }

    fn len(&self) -> io::Result<u64> {
        PROBED.set(self.number);
        Ok(self.with(|state| state.bytes.len() as u64))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.writable()?;
        self.with(|state| {
            state.bytes.truncate(len.min(LARGEST) as usize);
            state.grow(len)
        })
    }
}

impl Host for MemoryHost {
    fn open(&self, path: &Path, options: &FileOptions) -> Result<File, HostError> {
        match (self.find(path), options.create_new) {
            (Some(_), true) => return Err(io::Error::from(io::ErrorKind::AlreadyExists).into()),
            (None, true) => self.put(path, Vec::new()),
            _ => {}
        }
        let stored = self
            .find(path)
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(File::custom(Arc::new(Stored {
            read_only: options.read_only,
            ..stored
        })))
    }

    fn memory(&self, _size: u64) -> io::Result<File> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.find(path).is_some())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Its number stays taken: a placeholder that no path finds.
        match files.remove(path) {
            Some(stored) => {
                let gone = PathBuf::from(format!("/gone/{}", stored.number));
                files.insert(gone, stored);
                Ok(())
            }
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn sync_name(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn identity(&self, file: &File) -> io::Result<FileId> {
        Ok(FileId {
            dev: 8,
            ino: self.find_file(file)?.number,
            btime: 1,
        })
    }

    fn boot_id(&self) -> io::Result<[u8; 16]> {
        Ok([7; 16])
    }

    fn map_words(&self, _file: &File, _offset: u64, _count: usize) -> io::Result<Option<Words>> {
        Ok(None)
    }

    fn write_now(&self, file: &File, data: &[u8], offset: u64) -> io::Result<()> {
        self.find_file(file)?.with(|state| state.write(offset, data))
    }

    fn image_id(&self, _file: &File) -> Option<[u8; 16]> {
        None
    }

    fn set_image_id(&self, _file: &File, _id: [u8; 16]) -> bool {
        false
    }
}
