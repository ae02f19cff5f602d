//! The rig: everything that a guest is started from, made once and kept.
//!
//! | part | from | kept in |
//! |---|---|---|
//! | QEMU | the machine, if new enough; else Debian backports | `qemu/` |
//! | tools of the guest | Debian packages, or a tree of the user's | `guest/`, `root.ext4` |
//! | kernel | Debian backports, or the user's | `kernel/` |
//! | initial root | busybox and two scripts of ours | `initrd.cpio` |
//! | KVM or not | a trial | `accel.json` |
//! | boot loader | Debian packages, when a guest boots from a disk | `grub/` |
//!
//! Each part has a stamp that says what it was made from; a part with the right stamp is left alone.

pub mod accel;
pub mod apt;
mod boot;
mod cpio;
mod initrd;
pub mod kernel;
pub mod qemu;
mod sources;
pub mod tree;

use std::cell::OnceCell;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use self::{accel::Accel, apt::Apt, kernel::Kernel, qemu::Qemu, tree::Tree};
use crate::{proc, ui::Step};

/// Changed when a part is made differently from the same packages.
const RECIPE: u32 = 1;

const QEMU_PACKAGES: &[&str] = &["qemu-system-x86", "qemu-utils", "seabios"];

/// A guest is a small Debian with every tool of the zoned world.
const GUEST_PACKAGES: &[&str] = &[
    "base-files",
    "base-passwd",
    "bash",
    "bc",
    "blktrace",
    "btrfs-progs",
    "busybox-static",
    "coreutils",
    "dash",
    "diffutils",
    "dm-zoned-tools",
    "dmsetup",
    "e2fsprogs",
    "f2fs-tools",
    "findutils",
    "fio",
    "gawk",
    "grep",
    "gzip",
    "hostname",
    "iproute2",
    "jq",
    "kmod",
    "less",
    "libc-bin",
    "mount",
    "ncurses-base",
    "nvme-cli",
    "pciutils",
    "procps",
    "psmisc",
    "sed",
    "sg3-utils",
    "smartmontools",
    "strace",
    "tar",
    "udev",
    "util-linux",
    "xfsprogs",
    "xz-utils",
    "zbd-utils",
    "zonefs-tools",
    "zstd",
];

/// Making the root image takes at most this long.
const IMAGE_LIMIT: Duration = Duration::from_secs(900);
/// How much room the root image has beyond its content, for the file system's own structures.
const IMAGE_SLACK: u64 = 96 << 20;

/// A prepared rig.
#[derive(Debug)]
pub struct Rig {
    /// Where everything is kept.
    pub directory: PathBuf,
    /// What starts guests.
    pub qemu: Qemu,
    /// What guests boot.
    pub kernel: Kernel,
    /// Their initial root.
    pub initrd: PathBuf,
    /// Their root, an ext4 image.
    pub root_image: PathBuf,
    /// How their instructions run.
    pub accel: Accel,
}

impl Rig {
    /// Makes what is missing, saying what and why; does nothing the second time.
    pub fn prepare() -> Result<Rig> {
        let directory = directory();
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let _lock = lock(&directory)?;
        let maker = Maker::new(&directory);
        let qemu = maker.qemu()?;
        let guest = maker.guest_tree()?;
        let kernel = maker.kernel(&guest)?;
        let initrd = maker.initrd(&guest, &kernel)?;
        let root_image = maker.root_image(&guest, &kernel)?;
        let accel = accel::find(&qemu, &kernel, &initrd, &directory.join("accel.json"))?;
        Ok(Rig {
            directory,
            qemu,
            kernel,
            initrd,
            root_image,
            accel,
        })
    }

    /// QEMU alone, for what needs no guest.
    pub fn qemu() -> Result<Qemu> {
        let directory = directory();
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let _lock = lock(&directory)?;
        Maker::new(&directory).qemu()
    }

    /// The unpacked upstream source of a Debian package, in the guest's version, by `tar`.
    pub fn source(&self, package: &str) -> Result<PathBuf> {
        let _lock = lock(&self.directory)?;
        let maker = Maker::new(&self.directory);
        maker.part(&format!("source-{package}"), "1", |into| {
            let downloads = self.directory.join("apt/sources");
            let step = Step::start(format!("getting the source of {package}, for its own tests"));
            let archive = maker.apt()?.source(package, &downloads)?;
            let mut tar = proc::command("tar");
            tar.arg("-x")
                .arg("--strip-components=1")
                .arg("-C")
                .arg(into)
                .arg("-f")
                .arg(&archive);
            proc::capture(&mut tar, "tar", IMAGE_LIMIT)?;
            step.done();
            Ok(())
        })
    }
}

/// Where the rig is kept: `$ZBDKIT_RIG_DIR`, or `target/rig`.
pub fn directory() -> PathBuf {
    match std::env::var_os("ZBDKIT_RIG_DIR") {
        Some(directory) => std::path::absolute(&directory).unwrap_or_else(|_| directory.into()),
        None => crate::target_directory().join("rig"),
    }
}

/// Lets one process at a time make parts.
fn lock(directory: &Path) -> Result<File> {
    let file = File::create(directory.join("lock"))?;
    if file.try_lock().is_err() {
        eprintln!(
            "  waiting for another xtask that prepares {}",
            directory.display()
        );
        file.lock()?;
    }
    Ok(file)
}

struct Maker {
    directory: PathBuf,
    apt: OnceCell<Apt>,
}

impl Maker {
    fn new(directory: &Path) -> Maker {
        Maker {
            directory: directory.to_owned(),
            apt: OnceCell::new(),
        }
    }

    /// The part `name` made by `make` into an empty directory, unless it is there with the stamp `key`.
    fn part(&self, name: &str, key: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let (path, stamp) = (
            self.directory.join(name),
            self.directory.join(format!("{name}.stamp")),
        );
        let key = format!("recipe {RECIPE}\n{key}\n");
        if path.exists() && std::fs::read_to_string(&stamp).is_ok_and(|made| made == key) {
            return Ok(path);
        }
        let unfinished = self.directory.join(format!("{name}.unfinished"));
        let _ = std::fs::remove_file(&stamp);
        for old in [&unfinished, &path] {
            remove(old)?;
        }
        std::fs::create_dir(&unfinished)?;
        make(&unfinished)?;
        std::fs::rename(&unfinished, &path)?;
        std::fs::write(&stamp, key)?;
        Ok(path)
    }

    fn apt(&self) -> Result<&Apt> {
        if let Some(apt) = self.apt.get() {
            return Ok(apt);
        }
        can_use_debian()?;
        let apt = Apt::open(&self.directory.join("apt"))?;
        Ok(self.apt.get_or_init(|| apt))
    }

    fn qemu(&self) -> Result<Qemu> {
        if let Some(qemu) = qemu::of_the_machine()? {
            return Ok(qemu);
        }
        let path = self.part("qemu", &QEMU_PACKAGES.join(" "), |into| {
            let packages = self
                .apt()?
                .download("QEMU (there is none >= 10.2 in PATH)", QEMU_PACKAGES)?;
            Tree::unpack(into, &packages, "QEMU").map(drop)
        })?;
        Ok(Qemu::Tree(Tree::at(&path)))
    }

    fn guest_tree(&self) -> Result<Tree> {
        if let Some(path) = std::env::var_os("ZBDKIT_GUEST_TREE") {
            let tree = Tree::at(Path::new(&path));
            for needed in [
                "usr/bin/bash",
                "usr/bin/busybox",
                "usr/bin/fio",
                "usr/sbin/mke2fs",
            ] {
                if !tree.path(needed).is_file() {
                    bail!(
                        "ZBDKIT_GUEST_TREE={}: it has no {needed}",
                        Path::new(&path).display()
                    );
                }
            }
            return Ok(tree);
        }
        let path = self.part("guest", &GUEST_PACKAGES.join(" "), |into| {
            let packages = self.apt()?.download(
                "the guest's tools (fio, blkzone, btrfs-progs, ...)",
                GUEST_PACKAGES,
            )?;
            tree::finish_guest(&Tree::unpack(into, &packages, "the guest's tools")?)
        })?;
        Ok(Tree::at(&path))
    }

    fn kernel(&self, tools: &Tree) -> Result<Kernel> {
        if let Some(kernel) = kernel::from_environment()? {
            return Ok(kernel);
        }
        let path = self.part("kernel", "linux-image-amd64", |into| {
            let is_kernel = |file: &str| {
                ["linux-image-", "linux-binary-", "linux-modules-", "linux-base-"]
                    .iter()
                    .any(|prefix| {
                        file.strip_prefix(prefix)
                            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
                    })
            };
            let packages =
                self.apt()?
                    .download_where("the guest's kernel", &["linux-image-amd64"], is_kernel)?;
            Tree::unpack(into, &packages, "the kernel")?;
            kernel::finish(into, tools)
        })?;
        kernel::at(&path)
    }

    fn initrd(&self, guest: &Tree, kernel: &Kernel) -> Result<PathBuf> {
        let key = format!("{}\n{}\n{}", kernel.modules.display(), initrd::INIT, initrd::RC);
        let made = self.part("initrd", &key, |into| {
            initrd::write(&into.join("initrd.cpio"), &guest.path("usr/bin/busybox"), kernel)
        })?;
        Ok(made.join("initrd.cpio"))
    }

    fn root_image(&self, guest: &Tree, kernel: &Kernel) -> Result<PathBuf> {
        let key = format!(
            "{}\n{}\n{}",
            guest.path("").display(),
            kernel.modules.display(),
            GUEST_PACKAGES.join(" ")
        );
        let made = self.part("root", &key, |into| {
            let step = Step::start("making the guest's root image");
            make_root_image(&into.join("root.ext4"), guest, kernel)?;
            step.done();
            Ok(())
        })?;
        Ok(made.join("root.ext4"))
    }
}

/// An ext4 image of the guest tree with the kernel's modules in it, made without mounting anything.
fn make_root_image(image: &Path, guest: &Tree, kernel: &Kernel) -> Result<()> {
    let staging = image.with_extension("staging");
    let modules = staging.join("usr/lib/modules").join(kernel.release());
    for (from, to) in [(guest.path(""), &staging), (kernel.modules.clone(), &modules)] {
        std::fs::create_dir_all(to.parent().context("a path without parent")?)?;
        let mut copy = proc::command("cp");
        // Links to the same data where the file system can: nothing is changed in the copy.
        copy.args(["-a", "--link", "--no-target-directory"])
            .arg(&from)
            .arg(to);
        if proc::capture(&mut copy, "cp --link", IMAGE_LIMIT).is_err() {
            let mut copy = proc::command("cp");
            proc::capture(
                copy.args(["-a", "--no-target-directory"]).arg(&from).arg(to),
                "cp",
                IMAGE_LIMIT,
            )?;
        }
    }
    let mut usage = proc::command("du");
    let usage = proc::capture(
        usage.args(["-s", "--block-size=1"]).arg(&staging),
        "du",
        IMAGE_LIMIT,
    )?;
    let used: u64 = String::from_utf8_lossy(&usage)
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .parse()?;
    let size = (used + used / 8 + IMAGE_SLACK) >> 10;
    let mut format = guest.command("usr/sbin/mke2fs");
    format.env("MKE2FS_CONFIG", guest.path("etc/mke2fs.conf"));
    format.args([
        "-q",
        "-F",
        "-t",
        "ext4",
        "-m",
        "0",
        "-O",
        "^has_journal",
        "-E",
        "root_owner=0:0",
        "-L",
        "zbdkit-root",
        "-d",
    ]);
    format.arg(&staging).arg(image).arg(format!("{size}k"));
    proc::capture(&mut format, "mke2fs", IMAGE_LIMIT)?;
    remove(&staging)
}

fn remove(path: &Path) -> Result<()> {
    let result = if path.is_dir() {
        std::fs::remove_dir_all(path)
    } else {
        std::fs::remove_file(path)
    };
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Says what to install where packages cannot be got by themselves.
fn can_use_debian() -> Result<()> {
    let id = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let debian = id.lines().any(|line| {
        line.strip_prefix("ID=")
            .is_some_and(|id| id.trim_matches('"') == "debian")
    });
    let tools = ["apt-get", "apt-config", "dpkg-deb"]
        .iter()
        .all(|name| proc::find_program(name).is_some());
    if debian && tools && cfg!(target_arch = "x86_64") {
        return Ok(());
    }
    bail!(
        "This machine is not a Debian on x86-64, so the guest's parts cannot be got automatically. Please install them\n\
         and name them in the environment, then run the same command again:\n\
         \n\
         - QEMU {}.{} or later with qemu-system-x86_64 and qemu-storage-daemon, in PATH or as\n\
         \x20     ZBDKIT_QEMU=/path/to/qemu-system-x86_64\n\
         - a Linux kernel >= 6.10 for x86-64 with CONFIG_BLK_DEV_ZONED, btrfs, f2fs, zonefs, null_blk, dm-zoned, 9p\n\
         \x20 and virtio, and its modules, not compressed:\n\
         \x20     ZBDKIT_KERNEL=/path/to/vmlinuz  ZBDKIT_MODULES=/path/to/lib/modules/RELEASE\n\
         - a directory with an unpacked Linux for x86-64 (a container image of debian:trixie will do) that has these\n\
         \x20 packages installed:\n\
         \x20     {}\n\
         \x20     ZBDKIT_GUEST_TREE=/path/to/tree\n\
         \n\
         Everything that needs no guest works without them: cargo xtask test --fast",
        qemu::OLDEST.0,
        qemu::OLDEST.1,
        GUEST_PACKAGES.join(" ")
    )
}
