//! Where an image's durable table lies, and what that means for names and messages.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::table::TableError;
use crate::error::{Error, OpenError, errno_of};
use crate::host::{FileId, HostError};

/// Where a zone table lies.
#[derive(Clone, Debug)]
pub enum Place {
    /// In a file of its own, beside the image.
    Sidecar(PathBuf),
    /// Inside the image.
    Inside(PathBuf),
}

impl Place {
    /// The file that holds it.
    pub fn path(&self) -> &Path {
        match self {
            Place::Sidecar(path) | Place::Inside(path) => path,
        }
    }

    /// The image's name as the user knows it, as far as the sidecar's name tells.
    pub fn image(&self) -> PathBuf {
        match self {
            Place::Inside(path) => path.clone(),
            Place::Sidecar(path) => path
                .to_string_lossy()
                .strip_suffix(".zones")
                .map_or_else(|| "data file".into(), PathBuf::from),
        }
    }

    /// The directory that holds it, which paths of run states are relative to.
    pub fn directory(&self) -> PathBuf {
        self.path().parent().map(Path::to_path_buf).unwrap_or_default()
    }

    /// Name of the run state beside it.
    pub fn run_state_name(&self) -> OsString {
        with_suffix(self.file_name(), ".run").into_os_string()
    }

    /// Name of the run state in a directory for many images, some of which have the same name: none may replace or
    /// remove another's.
    pub fn run_state_name_among_others(&self, id: FileId) -> PathBuf {
        let FileId { dev, ino, .. } = id;
        with_suffix(self.file_name(), &format!(".{dev:x}-{ino:x}.run"))
    }

    fn file_name(&self) -> &Path {
        Path::new(self.path().file_name().unwrap_or_default())
    }

    /// The table is not what it should be.
    pub fn error(&self, problem: &str) -> OpenError {
        OpenError::Sidecar {
            path: self.path().to_owned(),
            problem: problem.to_owned(),
        }
    }

    /// The table cannot be used; says what helps.
    pub fn table_error(&self, error: TableError) -> OpenError {
        let advice = match (self, &error) {
            (_, TableError::Io("syncing", source)) => {
                return Error::Io {
                    op: "syncing the zone table",
                    errno: errno_of(source),
                }
                .into();
            }
            (_, TableError::Io(..)) => "",
            (_, TableError::Version(_)) => "",
            (Place::Sidecar(_), TableError::NotATable) => "; name the right sidecar with sidecar=FILE",
            (Place::Sidecar(_), _) => "; restore the file from a backup",
            (Place::Inside(_), _) => {
                "; `zbdkit check -r all` rebuilds the zone table from what else is known"
            }
        };
        self.error(&format!("{error}{advice}"))
    }
}

/// Where an image's sidecar is unless told otherwise: `IMAGE.zones`.
pub fn default_sidecar(image: &Path) -> PathBuf {
    with_suffix(image, ".zones")
}

/// A path with something behind it.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
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
