//! Who else uses a block device: mounts, swap, devices built on it, processes that have it open.

use std::fmt;
use std::path::{Path, PathBuf};

use super::sysfs::{BlockFacts, DeviceNumber};

/// Somebody who uses a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// A file system on it is mounted here.
    Mount(PathBuf),
    /// Swap space lies on it.
    Swap,
    /// A device is built on it (device mapper, md), by the kernel's name.
    Holder(String),
    /// A process has it open.
    Process {
        /// Its number.
        pid: u32,
        /// Its name.
        name: String,
    },
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            User::Mount(at) => write!(f, "mounted at {}", at.display()),
            User::Swap => f.write_str("used as swap space"),
            User::Holder(name) => write!(f, "part of {name}"),
            User::Process { pid, name } => write!(f, "open in {name} (process {pid})"),
        }
    }
}

/// Who uses the device at `path`, as far as this process may see, from the `/proc` at `proc`. File systems over several
/// devices name only some of them, so that nobody is found is no promise.
pub fn users(facts: &BlockFacts, path: &Path, proc: &Path) -> Vec<User> {
    let read = |name: &str| std::fs::read_to_string(proc.join(name)).unwrap_or_default();
    let mut users: Vec<_> = mounts(&read("self/mountinfo"), facts.number, path)
        .map(User::Mount)
        .collect();
    let swap = read("swaps")
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .any(|file| Path::new(file) == path);
    users.extend(swap.then_some(User::Swap));
    users.extend(facts.holders.iter().cloned().map(User::Holder));
    users.extend(processes(facts.number, proc));
    users
}

/// The mount points of a device, from `mountinfo` (proc_pid_mountinfo(5)): field 3 is the number, field 5 the mount point,
/// the second one after the dash the source. btrfs has numbers of its own and is found by its source.
fn mounts<'a>(
    mountinfo: &'a str,
    number: DeviceNumber,
    path: &'a Path,
) -> impl Iterator<Item = PathBuf> + 'a {
    mountinfo.lines().filter_map(move |line| {
        let (mount, source) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(2);
        let of = fields.next()?.parse().ok();
        let at = fields.nth(1)?;
        let is_it = of == Some(number) || source.split(' ').nth(1).map(Path::new) == Some(path);
        is_it.then(|| PathBuf::from(at.replace("\\040", " ")))
    })
}

/// The other processes that have the device open.
fn processes(number: DeviceNumber, proc: &Path) -> Vec<User> {
    let me = std::process::id();
    let mut found = Vec::new();
    for process in std::fs::read_dir(proc).into_iter().flatten().flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if pid == me {
            continue;
        }
        let is_device = |stat: rustix::fs::Stat| {
            rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::BlockDevice
                && DeviceNumber::of(stat.st_rdev) == number
        };
        let has_it = std::fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten()
            .any(|fd| rustix::fs::stat(fd.path()).is_ok_and(is_device));
        if has_it {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(User::Process {
                pid,
                name: name.trim().to_owned(),
            });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> BlockFacts {
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
            holders: vec!["dm-3".into()],
            zones: None,
        }
    }

    #[test]
    fn mounts_swap_and_holders_are_found() {
        let proc = tempfile::tempdir().unwrap();
        std::fs::create_dir(proc.path().join("self")).unwrap();
        std::fs::write(
            proc.path().join("self/mountinfo"),
            "21 1 8:1 / / rw,noatime shared:1 - ext4 /dev/sda1 rw\n\
             22 21 8:16 / /mnt/my\\040data rw - f2fs /dev/disk/by-id/x rw\n\
             23 21 0:44 /@ /srv rw shared:2 - btrfs /dev/sdb rw,zoned\n",
        )
        .unwrap();
        std::fs::write(
            proc.path().join("swaps"),
            "Filename\tType\tSize\n/dev/sdb partition 1024 0 -2\n",
        )
        .unwrap();
        let found = users(&facts(), Path::new("/dev/sdb"), proc.path());
        assert_eq!(
            found,
            [
                User::Mount("/mnt/my data".into()),
                User::Mount("/srv".into()),
                User::Swap,
                User::Holder("dm-3".into())
            ]
        );
        assert_eq!(found[0].to_string(), "mounted at /mnt/my data");
    }

    #[test]
    fn a_device_that_nobody_uses_has_no_users() {
        let proc = tempfile::tempdir().unwrap();
        let free = BlockFacts {
            holders: Vec::new(),
            ..facts()
        };
        assert_eq!(users(&free, Path::new("/dev/sdb"), proc.path()), []);
    }
}
