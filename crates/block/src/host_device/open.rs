//! Opening a block device: what is refused, and in which words.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use zbdkit_io::File;
use zbdkit_zone::Zns;

use super::blockdev::BlockDrive;
use super::drive::{Drive, DriveFacts};
use super::node::HostDeviceNode;
use super::nvme::NvmeDrive;
use super::scsi::{self, ScsiDrive};
use super::sysfs::{BlockFacts, DeviceNumber, Sysfs};
use super::users::{User, users};
use crate::error::OpenError;
use crate::file::FileNode;
use crate::host::{FileOptions, Host, HostError};
use crate::lock::LockMode;
use crate::node::Node;
use crate::zoned::host_error;

/// A block device that is described, not opened yet.
#[derive(Clone, Debug)]
pub(crate) struct HostDevice {
    pub path: PathBuf,
    pub direct: bool,
    pub read_only: bool,
    pub lock: LockMode,
    pub lock_wait: Duration,
}

/// The facts of the block device at a path; `None` where something else lies there. A SCSI disk that the kernel shows
/// without zones is asked itself, where it may be opened for reading.
///
/// # Errors
/// The path or what sysfs says of the device cannot be read, or a host-aware disk reports zones that make no sense.
pub fn block_facts(host: &dyn Host, path: &Path) -> io::Result<Option<BlockFacts>> {
    let Some(number) = host.block_device(path)? else {
        return Ok(None);
    };
    let mut facts = Sysfs::default().device(number)?;
    scsi::ask(path, &mut facts)?;
    Ok(Some(facts))
}

impl HostDevice {
    /// Opens it: with its zones where it has some, else as a plain disk.
    pub(crate) async fn open(&self, host: &dyn Host) -> Result<Arc<dyn Node>, OpenError> {
        let path = self.path.as_path();
        if host.is_nvme_namespace(path) {
            let drive = NvmeDrive::open(path, self.read_only).await?;
            return Ok(Arc::new(HostDeviceNode::open(Arc::new(drive)).await?));
        }
        let facts = block_facts(host, path)
            .map_err(|e| OpenError::file(path, "cannot be looked up", e))?
            .ok_or_else(|| OpenError::data(path, "is neither a block device nor the character device of an NVMe namespace; say driver=file for a file"))?;
        let found = users(&facts, path, Path::new("/proc"));
        if let Some(problem) = refusal(&facts, &found, self.direct, self.read_only) {
            return Err(OpenError::data(path, problem));
        }
        let options = FileOptions {
            direct: self.direct,
            direct_align: Some(facts.logical_block_size),
            exclusive: !self.read_only,
            lock: self.lock,
            lock_wait: self.lock_wait,
            ..FileOptions::existing(self.read_only)
        };
        let file = self.open_file(host, &options, &found).await?;
        let Some(zones) = facts.zones else {
            let node = FileNode::host_device(file, facts.logical_block_size, self.read_only);
            let node = node.map_err(|e| OpenError::file(path, "cannot be looked at", e))?;
            return Ok(Arc::new(node.named(path)));
        };
        let about = DriveFacts {
            path: path.to_owned(),
            size: facts.size,
            block_size: facts.logical_block_size,
            read_only: self.read_only,
            zones,
            // The kernel's block layer does not know them.
            zns: Zns::NONE,
        };
        let drive: Arc<dyn Drive> = match facts.zones_by_command {
            true => Arc::new(ScsiDrive::new(about, file)),
            false => Arc::new(BlockDrive::new(about, file)),
        };
        Ok(Arc::new(HostDeviceNode::open(drive).await?))
    }
}

impl HostDevice {
    /// Opens the file, and waits a little for somebody who is on the way out: a ring of the kernel's lets go of a device some
    /// time after the process that had it has ended.
    async fn open_file(
        &self,
        host: &dyn Host,
        options: &FileOptions,
        users: &[User],
    ) -> Result<File, OpenError> {
        let path = self.path.as_path();
        let deadline = Instant::now() + self.lock_wait;
        loop {
            match host.open(path, options) {
                Ok(file) => return Ok(file),
                Err(error) if !busy(&error) => return Err(host_error(path, "cannot be opened", error)),
                Err(_) if Instant::now() >= deadline => return Err(OpenError::data(path, held(users))),
                Err(_) => zbdkit_io::sleep(Duration::from_millis(20)).await,
            }
        }
    }
}

/// Whether the device at a path has zones, as far as can be found out.
pub(crate) fn has_zones(host: &dyn Host, path: &Path) -> bool {
    let facts = || block_facts(host, path).ok()?;
    host.is_nvme_namespace(path) || facts().is_some_and(|facts| facts.zones.is_some())
}

/// What `driver=file` is told of a zoned device, whose order of writes it would not keep. Host-aware disks take writes in
/// any order.
pub(crate) fn needs_host_device(host: &dyn Host, path: &Path) -> Option<String> {
    let facts = block_facts(host, path).ok()??;
    facts.zones.filter(|_| !facts.zones_by_command).map(|_| {
        format!(
            "is a zoned device, whose zones driver=file does not know: say \
             driver=host_device,filename={},cache.direct=on",
            path.display()
        )
    })
}

/// The device's number, where a path names a block device.
pub(crate) fn number_of(path: &Path) -> io::Result<Option<DeviceNumber>> {
    let stat = rustix::fs::stat(path)?;
    let is_block = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::BlockDevice;
    Ok(is_block.then(|| DeviceNumber::of(stat.st_rdev)))
}

fn busy(error: &HostError) -> bool {
    matches!(error, HostError::Io(error) if Errno::from_io_error(error) == Some(Errno::BUSY))
}

/// Why a device is not opened, and what to do about it.
fn refusal(facts: &BlockFacts, users: &[User], direct: bool, read_only: bool) -> Option<String> {
    if facts.zones.is_some() {
        if let Some(disk) = &facts.partition_of {
            return Some(format!(
                "is a partition of the zoned disk {disk}, and zones are the whole disk's: name /dev/{disk}, and a \
                 part of it with driver=raw,offset=...,size=..."
            ));
        }
        if !direct {
            // QEMU's words, and why.
            return Some(
                "The driver supports zoned devices, and it requires cache.direct=on, which was not specified. \
                 (The page cache would write to a zone in another order than the one it was given.)"
                    .into(),
            );
        }
    }
    if read_only {
        return None;
    }
    if facts.read_only {
        return Some("is read-only: open it so, with read-only=on".into());
    }
    users
        .iter()
        .any(|user| !matches!(user, User::Process { .. }))
        .then(|| held(users))
}

/// The device is somebody else's: whose, and how it becomes free.
fn held(users: &[User]) -> String {
    let Some(first) = users.first() else {
        return "is in use by somebody whom this user cannot see: it can be opened once that has ended, or with \
                read-only=on"
            .into();
    };
    let list: Vec<_> = users.iter().map(User::to_string).collect();
    let fix = match first {
        User::Mount(at) => format!("unmount it first (umount {})", at.display()),
        User::Swap => "turn that off first (swapoff)".into(),
        User::Holder(name) => format!("take {name} apart first (dmsetup remove, mdadm --stop)"),
        User::Process { .. } => "end that first".into(),
    };
    format!(
        "is in use: {}; {fix}, or open it with read-only=on",
        list.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use zbdkit_zone::Model;

    use super::super::sysfs::ZoneFacts;
    use super::*;

    fn disk(zoned: bool) -> BlockFacts {
        BlockFacts {
            name: "sdb".into(),
            number: "8:16".parse().unwrap(),
            partition_of: None,
            size: 1 << 30,
            read_only: false,
            logical_block_size: 512,
            physical_block_size: 4096,
            scheduler: None,
            write_back: None,
            holders: Vec::new(),
            zones: zoned.then_some(ZoneFacts {
                model: Model::HostManaged,
                zone_size: 64 << 20,
                nr_zones: 16,
                max_open: 0,
                max_active: 0,
                max_append: 65536,
                write_granularity: 4096,
            }),
            zones_by_command: false,
        }
    }

    #[test]
    fn a_zoned_device_needs_direct_io_and_is_told_in_qemus_words() {
        let problem = refusal(&disk(true), &[], false, false).unwrap();
        assert!(problem.starts_with(
            "The driver supports zoned devices, and it requires cache.direct=on, which was not specified."
        ));
        assert!(
            refusal(&disk(true), &[], false, true).is_some(),
            "reports may not be cached either"
        );
        assert_eq!(refusal(&disk(true), &[], true, false), None);
        assert_eq!(refusal(&disk(false), &[], false, false), None);
    }

    #[test]
    fn a_partition_of_a_zoned_disk_is_refused_and_names_the_disk() {
        let partition = |zoned| BlockFacts {
            partition_of: Some("sdb".into()),
            ..disk(zoned)
        };
        assert!(
            refusal(&partition(true), &[], true, false)
                .unwrap()
                .contains("/dev/sdb")
        );
        assert_eq!(refusal(&partition(false), &[], true, false), None);
    }

    #[test]
    fn a_device_in_use_is_not_opened_for_writing_and_the_fix_is_named() {
        for (user, fix) in [
            (User::Mount("/srv".into()), "umount /srv"),
            (User::Swap, "swapoff"),
            (User::Holder("dm-0".into()), "take dm-0 apart"),
        ] {
            let users = [user];
            let problem = refusal(&disk(true), &users, true, false).unwrap();
            assert!(problem.contains(fix), "{problem}");
            assert_eq!(
                refusal(&disk(true), &users, true, true),
                None,
                "looking is allowed"
            );
        }
        let reader = [User::Process {
            pid: 7,
            name: "blkzone".into(),
        }];
        assert_eq!(refusal(&disk(true), &reader, true, false), None, "O_EXCL decides");
        assert!(held(&reader).contains("blkzone (process 7)"));
    }

    #[test]
    fn a_read_only_device_is_opened_read_only() {
        let facts = BlockFacts {
            read_only: true,
            ..disk(true)
        };
        assert!(
            refusal(&facts, &[], true, false)
                .unwrap()
                .contains("read-only=on")
        );
        assert_eq!(refusal(&facts, &[], true, true), None);
    }

    #[test]
    fn only_block_devices_have_numbers() {
        assert_eq!(number_of(Path::new("/dev/null")).unwrap(), None);
        assert!(number_of(Path::new("/nonexistent")).is_err());
    }
}
