//! What the kernel says of a block device in sysfs (`Documentation/ABI/stable/sysfs-block` of Linux).
//!
//! Reading only, from a root that is an argument: `/sys`, or a directory that a test made.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use zbdkit_spec::blkzoned::SECTOR_SIZE;
use zbdkit_zone::Model;

/// The number of a device file, as in `8:16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceNumber {
    /// Which driver.
    pub major: u32,
    /// Which of its devices.
    pub minor: u32,
}

impl std::fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl DeviceNumber {
    /// The two halves of a `dev_t`.
    pub fn of(dev: u64) -> DeviceNumber {
        DeviceNumber {
            major: rustix::fs::major(dev),
            minor: rustix::fs::minor(dev),
        }
    }
}

/// A block device as sysfs describes it. Sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockFacts {
    /// The kernel's name, as in `sda` or `nvme0n1`.
    pub name: String,
    /// Its number.
    pub number: DeviceNumber,
    /// The disk that it is a partition of.
    pub partition_of: Option<String>,
    /// Size.
    pub size: u64,
    /// The kernel takes no writes for it.
    pub read_only: bool,
    /// Logical block size: the granularity of reads, and of writes outside sequential zones.
    pub logical_block_size: u32,
    /// Physical block size.
    pub physical_block_size: u32,
    /// The I/O scheduler in use; absent where the disk has none to choose.
    pub scheduler: Option<String>,
    /// The disk has a volatile write cache, which a flush empties. Absent where the kernel does not say.
    pub write_back: Option<bool>,
    /// Devices built on top of this one: device mapper, md.
    pub holders: Vec<String>,
    /// Its zones, where the kernel shows it as zoned. From Linux 6.8 on host-aware disks are not.
    pub zones: Option<ZoneFacts>,
}

/// The zones of a disk as sysfs describes them. Sizes are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZoneFacts {
    /// How sequential zones may be written.
    pub model: Model,
    /// Distance from one zone's start to the next.
    pub zone_size: u64,
    /// Number of zones.
    pub nr_zones: u32,
    /// How many zones may be open; 0 for no limit.
    pub max_open: u32,
    /// How many zones may be open or closed; 0 for no limit.
    pub max_active: u32,
    /// The longest zone append; 0 for none.
    pub max_append: u64,
    /// Writes to sequential zones are multiples of this many bytes.
    pub write_granularity: u32,
}

/// sysfs at a root.
#[derive(Clone, Debug)]
pub struct Sysfs {
    root: PathBuf,
}

impl Default for Sysfs {
    fn default() -> Sysfs {
        Sysfs::new("/sys")
    }
}

impl Sysfs {
    /// sysfs as it lies at `root`.
    pub fn new(root: impl Into<PathBuf>) -> Sysfs {
        Sysfs { root: root.into() }
    }

    /// Every disk of the machine, without partitions, by name. One that goes away meanwhile is left out.
    ///
    /// # Errors
    /// The list cannot be read.
    pub fn disks(&self) -> io::Result<Vec<BlockFacts>> {
        let mut disks = Vec::new();
        for entry in fs::read_dir(self.root.join("block"))? {
            disks.extend(facts(&entry?.path()).ok());
        }
        disks.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(disks)
    }

    /// The block device of that number.
    ///
    /// # Errors
    /// There is no such device, or an attribute that every kernel has is missing or makes no sense.
    pub fn device(&self, number: DeviceNumber) -> io::Result<BlockFacts> {
        facts(&self.root.join("dev/block").join(number.to_string()))
    }
}

fn facts(link: &Path) -> io::Result<BlockFacts> {
    // Device numbers and names are links to the device's place in the tree, where a partition lies in its disk.
    let dir = fs::canonicalize(link)?;
    let is_partition = dir.join("partition").exists();
    let disk = match dir.parent() {
        Some(parent) if is_partition => parent,
        _ => &dir,
    };
    let queue = disk.join("queue");
    let size = sectors(&dir, "size")?;
    Ok(BlockFacts {
        name: name_of(&dir),
        number: text(&dir, "dev")?
            .parse()
            .map_err(|()| nonsense(&dir.join("dev")))?,
        partition_of: is_partition.then(|| name_of(disk)),
        size,
        read_only: number::<u32>(&dir, "ro")? != 0,
        logical_block_size: number(&queue, "logical_block_size")?,
        physical_block_size: number(&queue, "physical_block_size")?,
        scheduler: optional(text(&queue, "scheduler"))?.and_then(|text| chosen(&text)),
        write_back: optional(text(&queue, "write_cache"))?.map(|text| text == "write back"),
        holders: names(&dir.join("holders")),
        zones: zones(&queue, sectors(disk, "size")?)?,
    })
}

fn zones(queue: &Path, size: u64) -> io::Result<Option<ZoneFacts>> {
    let model = match optional(text(queue, "zoned"))?.as_deref() {
        Some("host-managed") => Model::HostManaged,
        Some("host-aware") => Model::HostAware,
        _ => return Ok(None),
    };
    let zone_size = sectors(queue, "chunk_sectors")?;
    if zone_size == 0 {
        return Err(nonsense(&queue.join("chunk_sectors")));
    }
    // Kernels before 4.20 do not count them.
    let nr_zones = match optional(number(queue, "nr_zones"))? {
        Some(nr_zones) => nr_zones,
        None => {
            u32::try_from(size.div_ceil(zone_size)).map_err(|_| nonsense(&queue.join("chunk_sectors")))?
        }
    };
    // Kernels before 5.12 do not tell it apart; the physical block is a multiple of what the drive wants.
    let write_granularity = match optional(number(queue, "zone_write_granularity"))? {
        Some(0) | None => number(queue, "physical_block_size")?,
        Some(bytes) => bytes,
    };
    Ok(Some(ZoneFacts {
        model,
        zone_size,
        nr_zones,
        // Since 5.9 and 5.8; 0 is no limit.
        max_open: optional(number(queue, "max_open_zones"))?.unwrap_or(0),
        max_active: optional(number(queue, "max_active_zones"))?.unwrap_or(0),
        max_append: optional(number(queue, "zone_append_max_bytes"))?.unwrap_or(0),
        write_granularity,
    }))
}

impl FromStr for DeviceNumber {
    type Err = ();

    fn from_str(text: &str) -> Result<DeviceNumber, ()> {
        let (major, minor) = text.split_once(':').ok_or(())?;
        Ok(DeviceNumber {
            major: major.parse().map_err(drop)?,
            minor: minor.parse().map_err(drop)?,
        })
    }
}

/// The last part of a device's path; the kernel writes `!` for a slash in a name.
fn name_of(dir: &Path) -> String {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    name.replace('!', "/")
}

/// The one in brackets of `none [mq-deadline] kyber`, or the only one.
fn chosen(text: &str) -> Option<String> {
    let mut names = text.split_whitespace();
    let bracketed = names
        .clone()
        .find_map(|name| name.strip_prefix('[')?.strip_suffix(']'));
    bracketed.or_else(|| names.next()).map(str::to_owned)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| name_of(Path::new(&entry.file_name())))
        .collect();
    names.sort();
    names
}

fn text(dir: &Path, attribute: &str) -> io::Result<String> {
    let path = dir.join(attribute);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(error) => Err(io::Error::new(
            error.kind(),
            format!("{}: {error}", path.display()),
        )),
    }
}

fn number<T: FromStr>(dir: &Path, attribute: &str) -> io::Result<T> {
    text(dir, attribute)?
        .parse()
        .map_err(|_| nonsense(&dir.join(attribute)))
}

/// A number of sectors as bytes.
fn sectors(dir: &Path, attribute: &str) -> io::Result<u64> {
    number::<u64>(dir, attribute)?
        .checked_mul(SECTOR_SIZE)
        .ok_or_else(|| nonsense(&dir.join(attribute)))
}

/// `None` for an attribute that this kernel or this kind of device has not.
fn optional<T>(value: io::Result<T>) -> io::Result<Option<T>> {
    match value {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn nonsense(path: &Path) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{} makes no sense", path.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sysfs with a zoned disk `nullb0` (252:0) and its partition `nullb0p1` (259:3).
    fn machine(attributes: &[(&str, &str)]) -> (tempfile::TempDir, Sysfs) {
        let root = tempfile::tempdir().unwrap();
        let disk = root.path().join("devices/virtual/block/nullb0");
        for dir in ["queue", "holders/dm-0", "nullb0p1/holders"] {
            fs::create_dir_all(disk.join(dir)).unwrap();
        }
        let usual = [
            ("dev", "252:0\n"),
            ("size", "2097152\n"),
            ("ro", "0\n"),
            ("queue/logical_block_size", "512\n"),
            ("queue/physical_block_size", "4096\n"),
            ("queue/zoned", "host-managed\n"),
            ("queue/chunk_sectors", "131072\n"),
            ("nullb0p1/dev", "259:3\n"),
            ("nullb0p1/size", "131072\n"),
            ("nullb0p1/ro", "1\n"),
            ("nullb0p1/partition", "1\n"),
        ];
        for (name, value) in usual.iter().chain(attributes) {
            fs::write(disk.join(name), value).unwrap();
        }
        fs::create_dir_all(root.path().join("dev/block")).unwrap();
        fs::create_dir_all(root.path().join("block")).unwrap();
        for (link, to) in [
            ("dev/block/252:0", ""),
            ("dev/block/259:3", "nullb0p1"),
            ("block/nullb0", ""),
        ] {
            std::os::unix::fs::symlink(disk.join(to), root.path().join(link)).unwrap();
        }
        let sysfs = Sysfs::new(root.path());
        (root, sysfs)
    }

    const DISK: DeviceNumber = DeviceNumber { major: 252, minor: 0 };

    #[test]
    fn a_zoned_disk_shows_all_its_limits() {
        let (_root, sysfs) = machine(&[
            ("queue/nr_zones", "16\n"),
            ("queue/max_open_zones", "6\n"),
            ("queue/max_active_zones", "8\n"),
            ("queue/zone_append_max_bytes", "65536\n"),
            ("queue/zone_write_granularity", "512\n"),
            ("queue/scheduler", "none [mq-deadline] kyber\n"),
            ("queue/write_cache", "write back\n"),
        ]);
        let facts = sysfs.device(DISK).unwrap();
        assert_eq!(
            facts.zones,
            Some(ZoneFacts {
                model: Model::HostManaged,
                zone_size: 64 << 20,
                nr_zones: 16,
                max_open: 6,
                max_active: 8,
                max_append: 65536,
                write_granularity: 512,
            })
        );
        assert_eq!(
            (facts.size, facts.logical_block_size, facts.physical_block_size),
            (1 << 30, 512, 4096)
        );
        assert_eq!(facts.scheduler.as_deref(), Some("mq-deadline"));
        assert_eq!(facts.write_back, Some(true));
        assert_eq!(facts.holders, ["dm-0"]);
        assert_eq!((facts.partition_of.as_deref(), facts.read_only), (None, false));
        assert_eq!(sysfs.disks().unwrap(), [facts]);
    }

    #[test]
    fn old_kernels_leave_limits_out() {
        let (_root, sysfs) = machine(&[]);
        let zones = sysfs.device(DISK).unwrap().zones.unwrap();
        assert_eq!((zones.nr_zones, zones.max_open, zones.max_active), (16, 0, 0));
        assert_eq!(zones.write_granularity, 4096, "the physical block size is safe");
    }

    #[test]
    fn a_partition_knows_its_disk_and_has_the_disks_queue() {
        let (_root, sysfs) = machine(&[]);
        let partition = sysfs.device("259:3".parse().unwrap()).unwrap();
        assert_eq!(partition.name, "nullb0p1");
        assert_eq!(partition.partition_of.as_deref(), Some("nullb0"));
        assert_eq!((partition.size, partition.read_only), (64 << 20, true));
        assert!(partition.zones.is_some());
    }

    #[test]
    fn a_disk_without_zones_is_no_zoned_disk() {
        for model in ["none\n", "drive-managed\n"] {
            let (_root, sysfs) = machine(&[("queue/zoned", model)]);
            assert_eq!(sysfs.device(DISK).unwrap().zones, None);
        }
    }

    #[test]
    fn what_makes_no_sense_is_an_error_that_names_the_attribute() {
        for (attribute, value) in [
            ("queue/chunk_sectors", "0"),
            ("queue/chunk_sectors", "18446744073709551615"),
            ("queue/nr_zones", "-1"),
            ("size", "many"),
            ("dev", "252"),
        ] {
            let (_root, sysfs) = machine(&[(attribute, value)]);
            let error = sysfs.device(DISK).unwrap_err();
            assert!(error.to_string().contains(attribute), "{error}");
        }
        let (_root, sysfs) = machine(&[]);
        assert!(sysfs.device("1:1".parse().unwrap()).is_err());
    }
}
