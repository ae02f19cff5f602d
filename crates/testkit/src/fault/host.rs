//! A machine all of whose files have rules before them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use zbdkit_block::{FileId, FileOptions, Host, HostError};
use zbdkit_io::{File, Words};

use super::Faults;

thread_local! {
    /// The file behind the wrapper whose length was asked for last.
    static ASKED: RefCell<Option<File>> = const { RefCell::new(None) };
}

pub(super) fn note(inner: &File) {
    ASKED.set(Some(inner.clone()));
}

/// The file behind a wrapper of this module, or the file itself.
fn behind(file: &File) -> File {
    ASKED.set(None);
    // The length itself does not matter, only who is asked for it.
    let _ = file.len();
    ASKED.take().unwrap_or_else(|| file.clone())
}

/// A [`Host`] that wraps the files that another one opens. Run states are mapped as that one maps them.
#[derive(Clone)]
pub struct FaultHost {
    inner: Arc<dyn Host>,
    files: Arc<Mutex<BTreeMap<PathBuf, Faults>>>,
}

impl FaultHost {
    /// Wraps the files of `inner`.
    pub fn new(inner: Arc<dyn Host>) -> FaultHost {
        FaultHost {
            inner,
            files: Arc::default(),
        }
    }

    /// The rules of the file of that name, whoever opens it and when. A file in memory has the empty name.
    pub fn faults(&self, path: impl Into<PathBuf>) -> Faults {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.entry(path.into()).or_default().clone()
    }
}

impl Host for FaultHost {
    fn open(&self, path: &Path, options: &FileOptions) -> Result<File, HostError> {
        let file = self.inner.open(path, options)?;
        Ok(self.faults(path).wrap(file))
    }

    fn memory(&self, size: u64) -> io::Result<File> {
        Ok(self.faults("").wrap(self.inner.memory(size)?))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.inner.exists(path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.inner.remove(path)
    }

    fn sync_name(&self, path: &Path) -> io::Result<()> {
        self.inner.sync_name(path)
    }

    fn identity(&self, file: &File) -> io::Result<FileId> {
        self.inner.identity(&behind(file))
    }

    fn boot_id(&self) -> io::Result<[u8; 16]> {
        self.inner.boot_id()
    }

    fn map_words(&self, file: &File, offset: u64, count: usize) -> io::Result<Option<Words>> {
        self.inner.map_words(&behind(file), offset, count)
    }

    fn write_now(&self, file: &File, data: &[u8], offset: u64) -> io::Result<()> {
        self.inner.write_now(&behind(file), data, offset)
    }

    fn image_id(&self, file: &File) -> Option<[u8; 16]> {
        self.inner.image_id(&behind(file))
    }

    fn set_image_id(&self, file: &File, id: [u8; 16]) -> bool {
        self.inner.set_image_id(&behind(file), id)
    }
}
