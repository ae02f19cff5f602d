//! The zoned drives of a machine, from its sysfs: also those that the kernel does not show as zoned block devices.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::scsi;
use super::sysfs::{BlockFacts, Sysfs};

/// A zoned drive that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The block device; absent for an NVMe namespace that the kernel only offers as a character device.
    pub block: Option<BlockFacts>,
    /// The character device of an NVMe namespace, by the kernel's name, as in `ng0n1`.
    pub generic: Option<String>,
    /// Maker and model, as far as the drive tells them.
    pub model: Option<String>,
    /// Why the kernel does not show the zones.
    pub hidden: Option<Hidden>,
}

/// Why a drive is listed whose zones the kernel does not show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hidden {
    /// A host-aware SCSI disk, which Linux takes for an ordinary one from 6.8 on.
    HostAware,
    /// An NVMe namespace without a block device. Linux makes none for zones that it cannot work with; whether there are
    /// any only the drive can say.
    NoBlockDevice,
}

impl Listed {
    /// The kernel's name.
    pub fn name(&self) -> &str {
        let block = self.block.as_ref().map(|block| block.name.as_str());
        block.or(self.generic.as_deref()).unwrap_or_default()
    }

    /// The device file.
    pub fn path(&self) -> PathBuf {
        Path::new("/dev").join(self.name())
    }
}

impl Sysfs {
    /// Every zoned drive of the machine, by name: block devices first. SCSI disks whose zones the kernel does not show are
    /// asked themselves, below `dev`, where they may be opened for reading.
    ///
    /// # Errors
    /// The list of block devices cannot be read.
    pub fn zoned_drives(&self, dev: &Path) -> io::Result<Vec<Listed>> {
        let mut generics = self.nvme_generics();
        let mut found = Vec::new();
        for mut block in self.disks()? {
            // What makes no sense is not shown.
            let _ = scsi::ask(&dev.join(&block.name), &mut block);
            let generic = generic_of(&block.name);
            let at = generics.iter().position(|name| Some(name) == generic.as_ref());
            let generic = at.map(|at| generics.remove(at));
            let hidden = match block.zones {
                Some(_) if block.zones_by_command => Some(Hidden::HostAware),
                Some(_) => None,
                None if self.is_host_aware(&block.name) => Some(Hidden::HostAware),
                None => continue,
            };
            found.push(Listed {
                model: self.model(&format!("block/{}/device", file_name(&block.name))),
                block: Some(block),
                generic,
                hidden,
            });
        }
        found.extend(generics.into_iter().map(|name| Listed {
            block: None,
            model: self.model(&format!("class/nvme-generic/{name}/device")),
            generic: Some(name),
            hidden: Some(Hidden::NoBlockDevice),
        }));
        Ok(found)
    }

    /// The character devices of NVMe namespaces, by name; there are none without such drives.
    fn nvme_generics(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("class/nvme-generic"));
        let mut names: Vec<String> = entries
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// Whether a SCSI disk says in its block device characteristics (VPD page B1h, SBC-4 6.6.2: byte 8, bits 5:4) that it
    /// is host-aware.
    fn is_host_aware(&self, name: &str) -> bool {
        let page = fs::read(self.path(format!("block/{}/device/vpd_pgb1", file_name(name))));
        page.is_ok_and(|page| {
            page.get(1) == Some(&0xb1) && page.get(8).is_some_and(|byte| byte >> 4 & 3 == 1)
        })
    }

    /// Maker and model of a SCSI disk, or the model of an NVMe controller.
    fn model(&self, device: &str) -> Option<String> {
        let word = |attribute: &str| {
            let text = fs::read_to_string(self.path(device).join(attribute)).ok()?;
            let text = text.trim();
            // NVMe controllers have a vendor that is only a number, elsewhere.
            (!text.is_empty() && !text.starts_with("0x")).then(|| text.to_owned())
        };
        let words: Vec<String> = ["vendor", "model"].into_iter().filter_map(word).collect();
        (!words.is_empty()).then(|| words.join(" "))
    }
}

/// The character device of the namespace whose block device is `nvme0n1`: `ng0n1`.
fn generic_of(name: &str) -> Option<String> {
    name.strip_prefix("nvme").map(|rest| format!("ng{rest}"))
}

/// A name as a file in sysfs, which writes `!` for a slash.
fn file_name(name: &str) -> String {
    name.replace('/', "!")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, model, character device, why it is hidden.
    type Told = (String, Option<String>, Option<String>, Option<Hidden>);

    /// A sysfs in a directory of its own, with no disks yet.
    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new() -> Machine {
            let machine = Machine(tempfile::tempdir().unwrap());
            fs::create_dir(machine.0.path().join("block")).unwrap();
            machine
        }

        fn write(&self, path: &str, content: impl AsRef<[u8]>) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }

        /// A disk of 1 GiB, zones of 64 MiB.
        fn disk(&self, name: &str, number: &str, zoned: &str) {
            for (attribute, value) in [
                ("dev", number),
                ("size", "2097152"),
                ("ro", "0"),
                ("queue/logical_block_size", "512"),
                ("queue/physical_block_size", "4096"),
                ("queue/zoned", zoned),
                ("queue/chunk_sectors", "131072"),
                ("queue/nr_zones", "16"),
            ] {
                self.write(&format!("block/{name}/{attribute}"), format!("{value}\n"));
            }
        }

        fn drives(&self) -> Vec<Told> {
            let drives = Sysfs::new(self.0.path())
                .zoned_drives(Path::new("/nonexistent"))
                .unwrap();
            let told = drives
                .into_iter()
                .map(|drive| (drive.name().to_owned(), drive.model, drive.generic, drive.hidden));
            told.collect()
        }
    }

    #[test]
    fn disks_without_zones_are_not_listed() {
        let machine = Machine::new();
        machine.disk("sda", "8:0", "none");
        machine.disk("sdb", "8:16", "host-managed");
        machine.disk("sdc", "8:32", "drive-managed");
        machine.write("block/sdb/device/vendor", "ATA     \n");
        machine.write("block/sdb/device/model", "HGST HSH721414AL\n");
        let model = Some("ATA HGST HSH721414AL".to_owned());
        assert_eq!(machine.drives(), [("sdb".to_owned(), model, None, None)]);
    }

    #[test]
    fn a_host_aware_disk_is_listed_though_the_kernel_hides_its_zones() {
        let machine = Machine::new();
        let page = |zoned: u8| [&[0, 0xb1, 0, 60, 0, 1, 0, 0, zoned << 4], &[0; 55][..]].concat();
        machine.disk("sda", "8:0", "none");
        machine.write("block/sda/device/vpd_pgb1", page(1));
        machine.disk("sdb", "8:16", "none");
        machine.write("block/sdb/device/vpd_pgb1", page(2));
        machine.disk("sdc", "8:32", "none");
        machine.write("block/sdc/device/vpd_pgb1", [0, 0xb1]);
        assert_eq!(
            machine.drives(),
            [("sda".to_owned(), None, None, Some(Hidden::HostAware))]
        );
    }

    #[test]
    fn an_nvme_namespace_has_its_character_device_beside_it() {
        let machine = Machine::new();
        machine.disk("nvme0n1", "259:0", "host-managed");
        machine.disk("nvme0n2", "259:1", "none");
        machine.write("block/nvme0n1/device/model", "ZN540\n");
        machine.write("block/nvme0n1/device/vendor", "0x1b96\n");
        for name in ["ng0n1", "ng0n2", "ng1n1"] {
            machine.write(&format!("class/nvme-generic/{name}/dev"), "237:0\n");
        }
        machine.write("class/nvme-generic/ng1n1/device/model", "Odd zones\n");
        assert_eq!(
            machine.drives(),
            [
                (
                    "nvme0n1".to_owned(),
                    Some("ZN540".to_owned()),
                    Some("ng0n1".to_owned()),
                    None
                ),
                (
                    "ng1n1".to_owned(),
                    Some("Odd zones".to_owned()),
                    Some("ng1n1".to_owned()),
                    Some(Hidden::NoBlockDevice)
                ),
            ]
        );
    }

    #[test]
    fn a_machine_without_zoned_drives_has_none() {
        assert_eq!(Machine::new().drives(), []);
        let nothing = tempfile::tempdir().unwrap();
        assert!(
            Sysfs::new(nothing.path())
                .zoned_drives(Path::new("/nonexistent"))
                .is_err()
        );
    }
}
