//! A look at a drive by somebody who does not want it: shared, read-only openings, and calls that block.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use zbdkit_spec::blkzoned::SECTOR_SIZE;
use zbdkit_zone::{ZoneInfo, ZoneType};

use super::blockdev::zone_info;
use super::ioctl;

/// Zones asked for in one call at most.
const REPORT_MAX: u32 = 4096;

/// A zoned block device that is looked at.
#[derive(Debug)]
pub struct Look {
    file: File,
    zone_size: u64,
}

impl Look {
    /// Opens the device at `path`, whose zones are `zone_size` bytes apart.
    ///
    /// # Errors
    /// It cannot be opened for reading.
    pub fn at(path: &Path, zone_size: u64) -> io::Result<Look> {
        let mut options = OpenOptions::new();
        // A drive without a medium must not keep us.
        options
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
        let file = options.open(path)?;
        Ok(Look { file, zone_size })
    }

    /// The zones from the one that holds byte `from`, as many as one call gives; none past the end.
    ///
    /// # Errors
    /// The device's, or that its answer makes no sense.
    pub fn report(&self, from: u64) -> io::Result<Vec<ZoneInfo>> {
        let (flags, zones) = ioctl::report(self.file.as_fd(), from / SECTOR_SIZE, REPORT_MAX)?;
        let info = |zone| zone_info(zone, flags, self.zone_size);
        let zones: Option<Vec<ZoneInfo>> = zones.iter().map(info).collect();
        zones.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "its zone report makes no sense"))
    }

    /// The capacity of the first zone that is written in sequence, which others share on any drive that is known;
    /// `None` where the first zones are all conventional.
    ///
    /// # Errors
    /// As for [`Look::report`].
    pub fn capacity(&self) -> io::Result<Option<u64>> {
        let zones = self.report(0)?;
        let sequential = zones.iter().find(|zone| zone.kind != ZoneType::Conventional);
        Ok(sequential.map(|zone| zone.capacity))
    }
}

/// What this process may do with a device file, and whom it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// It may read.
    pub read: bool,
    /// It may write.
    pub write: bool,
    /// The group that the file belongs to.
    pub group: u32,
    /// The file's permissions (chmod's bits).
    pub mode: u32,
}

impl Access {
    /// By the file's permissions; a device that a container's rules deny may look accessible.
    ///
    /// # Errors
    /// There is no such file.
    pub fn to(path: &Path) -> io::Result<Access> {
        let stat = rustix::fs::stat(path)?;
        let may = |access| {
            rustix::fs::accessat(rustix::fs::CWD, path, access, rustix::fs::AtFlags::EACCESS).is_ok()
        };
        Ok(Access {
            read: may(rustix::fs::Access::READ_OK),
            write: may(rustix::fs::Access::WRITE_OK),
            group: stat.st_gid,
            mode: stat.st_mode & 0o7777,
        })
    }
}

/// Whether somebody has claimed the block device for themselves: a mounted file system, device mapper, md, swap, another
/// program that opened it with O_EXCL.
///
/// # Errors
/// It cannot be opened for reading.
pub fn is_claimed(path: &Path) -> io::Result<bool> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_EXCL);
    match options.open(path) {
        Ok(_) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(true),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_zoned_device_has_no_report() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let look = Look::at(file.path(), 64 << 20).unwrap();
        assert!(look.report(0).is_err());
        assert!(look.capacity().is_err());
        assert!(Look::at(Path::new("/nonexistent"), 1).is_err());
    }

    #[test]
    fn access_is_what_the_files_mode_gives() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o640)).unwrap();
        let access = Access::to(file.path()).unwrap();
        assert_eq!((access.read, access.write, access.mode), (true, true, 0o640));
        assert!(Access::to(Path::new("/nonexistent")).is_err());
    }
}
