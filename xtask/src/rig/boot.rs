//! A disk that a PC's firmware boots: GRUB, the kernel and its initial root, and the guest's root, all in one image.
//!
//! | bytes | what |
//! |---|---|
//! | 0 | master boot record: GRUB's first sector, and two partitions |
//! | 512 | GRUB itself, which the first sector loads from here |
//! | 1 MiB | partition 1, ext2: `vmlinuz`, `initrd.cpio` |
//! | the next MiB | partition 2: the guest's root image |
//!
//! Made without root and without mounting anything: GRUB's usual installation into the gap before the first partition
//! comes down to these two writes, since its images carry the places by default.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::tree::Tree;
use super::{Maker, Rig};
use crate::guest::kernel_arguments;
use crate::proc;

const PACKAGES: &[&str] = &["grub-common", "grub-pc-bin"];
/// What GRUB has to know to load a kernel from the first partition, and to say what goes wrong on the serial console.
const GRUB_MODULES: &[&str] = &["biosdisk", "ext2", "linux", "part_msdos", "serial", "terminal"];
const GRUB_FILES: &str = "usr/lib/grub/i386-pc";

const SECTOR: u64 = 512;
const MIB: u64 = 1 << 20;
/// How much room the boot partition has beyond its files.
const SLACK: u64 = 8 * MIB;
const LIMIT: Duration = Duration::from_secs(300);

/// A partition: where it begins and how long it is, in bytes.
#[derive(Debug, Clone, Copy)]
struct Partition {
    start: u64,
    len: u64,
}

impl Rig {
    /// Makes a new disk at `path`, which boots into the mode for scripts.
    pub fn make_boot_disk(&self, path: &Path) -> Result<()> {
        let (grub, guest) = {
            let _lock = super::lock(&self.directory)?;
            let maker = Maker::new(&self.directory);
            let grub = maker.part("grub", &PACKAGES.join(" "), |into| {
                let packages = maker.apt()?.download("a boot loader (GRUB)", PACKAGES)?;
                Tree::unpack(into, &packages, "the boot loader").map(drop)
            })?;
            (Tree::at(&grub), maker.guest_tree()?)
        };
        let work = tempfile::tempdir_in(path.parent().context("a disk without a directory")?)?;
        let boot = work.path().join("boot.ext2");
        self.make_boot_partition(&boot, &guest)?;
        let core = grub_core(&grub, work.path())?;
        let first_sector = std::fs::read(grub.path(GRUB_FILES).join("boot.img"))?;

        let first = Partition {
            start: MIB,
            len: boot.metadata()?.len(),
        };
        let second = Partition {
            start: (first.start + first.len).next_multiple_of(MIB),
            len: self.root_image.metadata()?.len().next_multiple_of(SECTOR),
        };
        ensure!(
            core.len() as u64 <= first.start - SECTOR,
            "GRUB does not fit before the first partition"
        );
        let disk = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        disk.set_len((second.start + second.len).next_multiple_of(MIB))?;
        disk.write_all_at(&boot_record(&first_sector, [first, second])?, 0)?;
        disk.write_all_at(&core, SECTOR)?;
        copy_sparse(&boot, &disk, first.start)?;
        copy_sparse(&self.root_image, &disk, second.start)
    }

    fn make_boot_partition(&self, image: &Path, guest: &Tree) -> Result<()> {
        let files = image.with_extension("files");
        std::fs::create_dir(&files)?;
        let mut size = 0;
        for (from, to) in [(&self.kernel.packed, "vmlinuz"), (&self.initrd, "initrd.cpio")] {
            let copied = std::fs::copy(from, files.join(to));
            size += copied.with_context(|| format!("cannot copy {}", from.display()))?;
        }
        let mut format = guest.command("usr/sbin/mke2fs");
        format.env("MKE2FS_CONFIG", guest.path("etc/mke2fs.conf"));
        format.args(["-q", "-F", "-t", "ext2", "-m", "0", "-d"]);
        format
            .arg(&files)
            .arg(image)
            .arg(format!("{}k", (size + SLACK).next_multiple_of(MIB) >> 10));
        proc::capture(&mut format, "mke2fs", LIMIT).map(drop)
    }
}

/// GRUB with its modules and commands in one file, which begins with the sector that loads the rest of it.
fn grub_core(grub: &Tree, work: &Path) -> Result<Vec<u8>> {
    let (commands, core) = (work.join("grub.cfg"), work.join("core.img"));
    let arguments = format!("{} zbdkit.root=nvme", kernel_arguments("script"));
    std::fs::write(
        &commands,
        format!(
            "serial --unit=0 --speed=115200\nterminal_output serial\nset root=(hd0,msdos1)\n\
             linux /vmlinuz {arguments}\ninitrd /initrd.cpio\nboot\n"
        ),
    )?;
    let mut make = grub.command("usr/bin/grub-mkimage");
    make.args(["--format=i386-pc", "--prefix=/grub", "--directory"])
        .arg(grub.path(GRUB_FILES));
    make.arg("--config")
        .arg(&commands)
        .arg("--output")
        .arg(&core)
        .args(GRUB_MODULES);
    proc::capture(&mut make, "grub-mkimage", LIMIT)?;
    Ok(std::fs::read(&core)?)
}

/// A master boot record: the loader's code, and primary partitions of Linux, the first one active.
fn boot_record(loader: &[u8], partitions: [Partition; 2]) -> Result<[u8; SECTOR as usize]> {
    /// Behind the code: disk signature, partition table, mark.
    const CODE: usize = 440;
    const TABLE: usize = 446;
    const ENTRY: usize = 16;
    const LINUX: u8 = 0x83;
    let mut record = [0; SECTOR as usize];
    let code = loader.get(..CODE).context("GRUB's first sector is too short")?;
    record[..CODE].copy_from_slice(code);
    for (number, partition) in partitions.iter().enumerate() {
        let at = TABLE + number * ENTRY;
        let entry = &mut record[at..at + ENTRY];
        entry[0] = if number == 0 { 0x80 } else { 0 };
        // No cylinders, heads and sectors: whoever boots this knows block addresses.
        entry[1..4].fill(0xff);
        entry[4] = LINUX;
        entry[5..8].fill(0xff);
        entry[8..12].copy_from_slice(&u32::try_from(partition.start / SECTOR)?.to_le_bytes());
        entry[12..].copy_from_slice(&u32::try_from(partition.len / SECTOR)?.to_le_bytes());
    }
    record[510..].copy_from_slice(&[0x55, 0xaa]);
    Ok(record)
}

/// Copies a file to `at`, leaving holes where it has nothing but zeros.
fn copy_sparse(from: &Path, to: &File, at: u64) -> Result<()> {
    let source = File::open(from).with_context(|| format!("cannot open {}", from.display()))?;
    let len = source.metadata()?.len();
    let mut buffer = vec![0; MIB as usize];
    let mut offset = 0;
    while offset < len {
        let part = &mut buffer[..(len - offset).min(MIB) as usize];
        source.read_exact_at(part, offset)?;
        if part.iter().any(|byte| *byte != 0) {
            to.write_all_at(part, at + offset)?;
        }
        offset += part.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_record_has_the_loader_the_partitions_and_the_mark() {
        let partitions = [(MIB, 3 * MIB), (4 * MIB, 5 * MIB)].map(|(start, len)| Partition { start, len });
        let record = boot_record(&[0xeb; 512], partitions).unwrap();
        assert!(record[..440].iter().all(|byte| *byte == 0xeb));
        assert_eq!((record[446], record[462]), (0x80, 0), "only the first is active");
        assert_eq!(record[446 + 4], 0x83);
        assert_eq!(
            record[454..462],
            [0, 8, 0, 0, 0, 24, 0, 0],
            "1 MiB and 3 MiB in sectors"
        );
        assert_eq!(
            record[470..478],
            [0, 32, 0, 0, 0, 40, 0, 0],
            "4 MiB and 5 MiB in sectors"
        );
        assert_eq!(record[478..510], [0; 32], "no other partition");
        assert_eq!(record[510..], [0x55, 0xaa]);
        assert!(boot_record(&[0; 100], partitions).is_err());
    }

    #[test]
    fn a_copy_is_whole_and_leaves_zeros_out() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        let mut bytes = vec![0; 3 * MIB as usize + 100];
        bytes[5] = 1;
        *bytes.last_mut().unwrap() = 2;
        std::fs::write(&from, &bytes).unwrap();
        let disk = File::create_new(&to).unwrap();
        disk.set_len(8 * MIB).unwrap();
        copy_sparse(&from, &disk, MIB).unwrap();
        let copied = std::fs::read(&to).unwrap();
        assert_eq!(copied.len() as u64, 8 * MIB);
        assert!(copied[MIB as usize..].starts_with(&bytes));
        assert!(copied[..MIB as usize].iter().all(|byte| *byte == 0));
    }
}
