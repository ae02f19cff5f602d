//! Opening the character device of a namespace.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use zbdkit_io::{File, FileKind, unblock};

use super::super::ioctl;
use super::super::sysfs::DeviceNumber;
use super::{KernelLimits, NvmeDrive};
use crate::error::OpenError;

impl NvmeDrive {
    /// Opens a namespace by its character device (`/dev/ng0n1`).
    ///
    /// Its block device is claimed meanwhile, so that nobody mounts it or opens it exclusively; where somebody has it so
    /// already, that is an error.
    ///
    /// # Errors
    /// There is no such device or it is none of a namespace, it may not be opened, its block device is in use, or see
    /// [`NvmeDrive::new`].
    pub async fn open(path: &Path, read_only: bool) -> Result<NvmeDrive, OpenError> {
        let at = path.to_owned();
        let opened = unblock(move || open(&at, read_only)).await?;
        let mut drive = NvmeDrive::new(
            path.to_owned(),
            File::from_fd(opened.device.into(), FileKind::default()),
            opened.nsid,
            read_only,
            opened.kernel,
        )
        .await?;
        drive._claim = opened.claim;
        Ok(drive)
    }
}

struct Opened {
    device: fs::File,
    nsid: u32,
    kernel: KernelLimits,
    claim: Option<fs::File>,
}

fn open(path: &Path, read_only: bool) -> Result<Opened, OpenError> {
    let failed = |doing| move |error| OpenError::file(path, doing, error);
    let device = fs::File::options().read(true).write(!read_only).open(path);
    let device = device.map_err(failed("opening the device"))?;
    let nsid = ioctl::nvme_nsid(device.as_fd()).map_err(failed("asking for the namespace's number"))?;
    let stat = rustix::fs::fstat(&device).map_err(|e| OpenError::file(path, "looking at it", e.into()))?;
    let block = block_device(Path::new("/sys"), DeviceNumber::of(stat.st_rdev));
    let claim = match &block {
        Some(dir) if !read_only => claim(path, dir)?,
        _ => None,
    };
    Ok(Opened {
        device,
        nsid,
        kernel: block.and_then(|dir| kernel_limits(&dir)).unwrap_or_default(),
        claim,
    })
}

/// Where sysfs has the block device of the namespace whose character device has this number.
fn block_device(sysfs: &Path, number: DeviceNumber) -> Option<PathBuf> {
    let link = sysfs.join("dev/char").join(number.to_string());
    let dir = fs::canonicalize(link).ok()?;
    let name = dir.file_name()?.to_str()?.strip_prefix("ng")?;
    let block = dir.parent()?.join(format!("nvme{name}"));
    block.join("queue").exists().then_some(block)
}

fn kernel_limits(block: &Path) -> Option<KernelLimits> {
    let number = |name: &str| -> Option<u64> {
        let text = fs::read_to_string(block.join("queue").join(name)).ok()?;
        text.trim().parse().ok()
    };
    Some(KernelLimits {
        max_transfer: number("max_hw_sectors_kb")?.checked_mul(1024)?,
        max_segments: usize::try_from(number("max_segments")?).ok()?.max(2),
    })
}

/// Opens the block device exclusively, where it has a node in /dev.
fn claim(path: &Path, block: &Path) -> Result<Option<fs::File>, OpenError> {
    let Some(name) = block.file_name() else {
        return Ok(None);
    };
    let node = Path::new("/dev").join(name);
    let opened = fs::File::options()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(&node);
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Err(OpenError::data(
            path,
            format!("{} is mounted or otherwise in use", node.display()),
        )),
        // The way over the block device is not ours: whether it can be opened does not matter.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_device_and_what_the_kernel_takes_are_found_by_the_character_devices_number() {
        let root = tempfile::tempdir().unwrap();
        let controller = root.path().join("devices/pci0/nvme/nvme3");
        fs::create_dir_all(controller.join("ng3n2")).unwrap();
        fs::create_dir_all(controller.join("nvme3n2/queue")).unwrap();
        fs::create_dir_all(root.path().join("dev/char")).unwrap();
        let number = DeviceNumber { major: 240, minor: 7 };
        std::os::unix::fs::symlink(controller.join("ng3n2"), root.path().join("dev/char/240:7")).unwrap();
        let queue = controller.join("nvme3n2/queue");
        let block = block_device(root.path(), number).unwrap();
        assert_eq!(block.file_name().unwrap(), "nvme3n2");
        assert_eq!(kernel_limits(&block), None, "nothing is said");
        fs::write(queue.join("max_hw_sectors_kb"), "512\n").unwrap();
        fs::write(queue.join("max_segments"), "127\n").unwrap();
        let limits = KernelLimits {
            max_transfer: 512 << 10,
            max_segments: 127,
        };
        assert_eq!(kernel_limits(&block), Some(limits));
        assert_eq!(
            block_device(root.path(), DeviceNumber { minor: 8, ..number }),
            None
        );
    }
}
