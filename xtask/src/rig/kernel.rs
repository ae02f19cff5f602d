//! The guest's kernel: an unpacked image that starts fast, and its modules.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::tree::Tree;
use crate::{proc, ui::Step};

/// Uncompressing or indexing all modules takes at most this long.
const LIMIT: Duration = Duration::from_secs(600);

/// Parts of the module tree that no storage test loads and that are most of its size.
const PRUNED: &[&str] = &[
    "sound",
    "net/bluetooth",
    "net/mac80211",
    "net/wireless",
    "net/netfilter",
    "net/sched",
    "net/ipv4",
    "net/ipv6",
    "drivers/accel",
    "drivers/bluetooth",
    "drivers/comedi",
    "drivers/gpu",
    "drivers/hid",
    "drivers/hwmon",
    "drivers/iio",
    "drivers/infiniband",
    "drivers/input",
    "drivers/isdn",
    "drivers/leds",
    "drivers/media",
    "drivers/mfd",
    "drivers/misc",
    "drivers/mmc",
    "drivers/mtd",
    "drivers/net",
    "drivers/platform",
    "drivers/power",
    "drivers/spi",
    "drivers/staging",
    "drivers/thunderbolt",
    "drivers/usb",
    "drivers/video",
];

/// A kernel that QEMU can start, and where its modules are.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// What QEMU starts: an unpacked `vmlinux`, or a bzImage.
    pub image: PathBuf,
    /// What a boot loader can start: a bzImage.
    pub packed: PathBuf,
    /// `.../lib/modules/RELEASE`, uncompressed and indexed.
    pub modules: PathBuf,
}

impl Kernel {
    /// The release, such as `7.2.12+deb13-amd64`, which is the name of the module directory.
    pub fn release(&self) -> String {
        self.modules
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }
}

/// Makes a kernel from an unpacked kernel package: prunes, uncompresses and indexes the modules, unpacks the image.
pub fn finish(directory: &Path, tools: &Tree) -> Result<()> {
    let modules = modules_below(directory)?;
    for name in PRUNED {
        let path = modules.join("kernel").join(name);
        if path.exists() {
            std::fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    let step = Step::start("uncompressing and indexing the kernel's modules");
    let mut compressed = Vec::new();
    find_files(&modules.join("kernel"), &mut compressed, &|name| {
        name.ends_with(".ko.xz")
    })?;
    for some in compressed.chunks(200) {
        let mut xz = tools.command("usr/bin/xz");
        proc::capture(
            xz.args(["--decompress", "--threads=2", "--"]).args(some),
            "xz",
            LIMIT,
        )?;
    }
    index(directory, &modules, tools)?;
    step.done();
    let bz_image = image_below(directory)?;
    unpack_image(&bz_image, &directory.join("vmlinux"), tools)
}

/// The kernel that [`finish`] left in `directory`.
pub fn at(directory: &Path) -> Result<Kernel> {
    let unpacked = directory.join("vmlinux");
    let packed = image_below(directory)?;
    let image = if unpacked.is_file() {
        unpacked
    } else {
        packed.clone()
    };
    Ok(Kernel {
        image,
        packed,
        modules: modules_below(directory)?,
    })
}

fn index(directory: &Path, modules: &Path, tools: &Tree) -> Result<()> {
    let release = modules.file_name().context("the module directory has no name")?;
    let mut depmod = tools.command_named("usr/bin/kmod", "depmod");
    depmod.arg("-b").arg(directory).arg(release);
    proc::capture(&mut depmod, "depmod", LIMIT).map(drop)
}

fn modules_below(directory: &Path) -> Result<PathBuf> {
    let parent = directory.join("usr/lib/modules");
    let entries = std::fs::read_dir(&parent).with_context(|| format!("cannot read {}", parent.display()))?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .next()
        .context("the kernel package has no modules")
}

fn image_below(directory: &Path) -> Result<PathBuf> {
    let mut found = Vec::new();
    find_files(directory, &mut found, &|name| name.starts_with("vmlinuz"))?;
    found
        .into_iter()
        .next()
        .context("the kernel package has no vmlinuz")
}

fn find_files(directory: &Path, found: &mut Vec<PathBuf>, wanted: &dyn Fn(&str) -> bool) -> Result<()> {
    let entries =
        std::fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find_files(&entry.path(), found, wanted)?;
        } else if wanted(&entry.file_name().to_string_lossy()) {
            found.push(entry.path());
        }
    }
    Ok(())
}

/// Unpacks the kernel proper out of `bz_image`, which saves the emulated machine seconds at each start.
/// Leaves nothing where the compression is one that we do not know: then the bzImage is started.
fn unpack_image(bz_image: &Path, into: &Path, tools: &Tree) -> Result<()> {
    let bytes = std::fs::read(bz_image).with_context(|| format!("cannot read {}", bz_image.display()))?;
    let Some(payload) = payload(&bytes) else {
        return Ok(());
    };
    let Some((program, payload)) = decompressor(payload) else {
        return Ok(());
    };
    let packed = into.with_extension("packed");
    std::fs::write(&packed, payload)?;
    let mut unpack = tools.command(program);
    let unpacked = proc::capture(unpack.args(["-d", "-c"]).arg(&packed), program, LIMIT)?;
    std::fs::remove_file(&packed)?;
    ensure!(
        unpacked.starts_with(b"\x7fELF"),
        "{} does not hold an ELF kernel",
        bz_image.display()
    );
    std::fs::write(into, unpacked).with_context(|| format!("cannot write {}", into.display()))
}

/// The compressed kernel inside a bzImage: `payload_offset` and `payload_length` of the x86 boot
/// protocol (2.08 and later), counted from the protected-mode code behind the setup sectors.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    image.get(start..start.checked_add(word(0x24c)?)?)
}

/// The program that unpacks `payload` and the bytes to give to it. All but gzip are followed by four bytes of size.
fn decompressor(payload: &[u8]) -> Option<(&'static str, &[u8])> {
    let body = payload.get(..payload.len().checked_sub(4)?)?;
    match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(("usr/bin/zstd", body)),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Some(("usr/bin/xz", body)),
        [0x1f, 0x8b, ..] => Some(("usr/bin/gzip", payload)),
        _ => None,
    }
}

/// The files of `wanted` modules and of all that they need, in the order in which to load them.
/// Modules that are built in need no file.
pub fn load_order(modules: &Path, wanted: &[&str]) -> Result<Vec<PathBuf>> {
    let read = |name: &str| {
        std::fs::read_to_string(modules.join(name))
            .with_context(|| format!("cannot read {name} in {}", modules.display()))
    };
    let dependencies = parse_dependencies(&read("modules.dep")?);
    let built_in: Vec<String> = read("modules.builtin")?.lines().map(module_name).collect();
    let mut order: Vec<String> = Vec::new();
    for want in wanted {
        let Some((path, needs)) = dependencies.get(*want) else {
            ensure!(
                built_in.iter().any(|name| name == want),
                "the kernel in {} has no module {want}",
                modules.display()
            );
            continue;
        };
        // modules.dep lists the needs of a module with the deepest last.
        for file in needs.iter().rev().chain([path]) {
            if !order.contains(file) {
                order.push(file.clone());
            }
        }
    }
    Ok(order.iter().map(|file| modules.join(file)).collect())
}

/// `modules.dep`: module name -> its file, and the files that it needs.
fn parse_dependencies(text: &str) -> BTreeMap<String, (String, Vec<String>)> {
    let parse = |line: &str| {
        let (path, needs) = line.split_once(':')?;
        Some((
            module_name(path),
            (
                path.to_owned(),
                needs.split_whitespace().map(str::to_owned).collect(),
            ),
        ))
    };
    text.lines().filter_map(parse).collect()
}

/// `kernel/fs/9p/9p.ko.xz` -> `9p`; dashes and underscores are one.
fn module_name(path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.split(".ko").next().unwrap_or(name).replace('-', "_")
}

/// The variables that name a kernel of the user's own.
pub fn from_environment() -> Result<Option<Kernel>> {
    let (image, modules): (Option<OsString>, Option<OsString>) = (
        std::env::var_os("ZBDKIT_KERNEL"),
        std::env::var_os("ZBDKIT_MODULES"),
    );
    let (Some(image), Some(modules)) = (image, modules) else {
        return Ok(None);
    };
    let kernel = Kernel {
        packed: image.clone().into(),
        image: image.into(),
        modules: modules.into(),
    };
    ensure!(
        kernel.image.is_file(),
        "ZBDKIT_KERNEL={} is not a file",
        kernel.image.display()
    );
    ensure!(
        kernel.modules.join("modules.dep").is_file(),
        "ZBDKIT_MODULES={} is not a directory /lib/modules/RELEASE with a modules.dep",
        kernel.modules.display()
    );
    Ok(Some(kernel))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_what_they_need_and_built_in_ones_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let dep = "kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko kernel/fs/netfs/netfs.ko\n\
            kernel/net/9p/9pnet.ko: kernel/fs/netfs/netfs.ko\nkernel/fs/netfs/netfs.ko:\n\
            kernel/lib/crc-x.ko:\n";
        std::fs::write(directory.path().join("modules.dep"), dep).unwrap();
        std::fs::write(
            directory.path().join("modules.builtin"),
            "kernel/drivers/virtio/virtio_pci.ko\n",
        )
        .unwrap();
        let order = load_order(directory.path(), &["virtio_pci", "9p", "crc_x"]).unwrap();
        let names: Vec<String> = order
            .iter()
            .map(|path| module_name(path.to_str().unwrap()))
            .collect();
        assert_eq!(names, ["netfs", "9pnet", "9p", "crc_x"]);
        assert!(load_order(directory.path(), &["nosuch"]).is_err());
    }

    #[test]
    fn the_payload_of_a_bz_image_is_found_and_a_forged_header_is_refused() {
        let mut image = vec![0; 4096];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&8_u32.to_le_bytes());
        image[1040..1044].copy_from_slice(&[0x28, 0xb5, 0x2f, 0xfd]);
        let found = payload(&image).unwrap();
        assert_eq!(found.len(), 8);
        assert_eq!(decompressor(found).unwrap(), ("usr/bin/zstd", &found[..4]));
        image[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(payload(&image), None);
        assert_eq!(payload(&image[..100]), None);
    }
}
