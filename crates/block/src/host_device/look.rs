//! A look at a drive's zones by somebody who does not want the drive: a shared, read-only opening, and calls that block.

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
}
