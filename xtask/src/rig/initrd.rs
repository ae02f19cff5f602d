//! The guest's initial root: busybox, the modules that reach the real root, two scripts.

use std::path::Path;

use anyhow::{Context, Result};

use super::{cpio::Cpio, kernel, kernel::Kernel};

/// The first script: mounts the root and the shared directory.
pub const INIT: &str = include_str!("../../guest/init");
/// The second one, in the real root: starts udev, runs the user's script, ends the machine.
pub const RC: &str = include_str!("../../guest/rc");

/// What it takes to reach the root image, the shared directory and the output port.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "ext4",
    "overlay",
];

/// What it takes besides to reach a root on an NVMe drive, where the command line asks for that.
const NVME_MODULES: &[&str] = &["nvme"];

/// Writes the initial root for `kernel` to `into`, not compressed: unpacking costs an emulated machine more than reading.
pub fn write(into: &Path, busybox: &Path, kernel: &Kernel) -> Result<()> {
    let mut cpio = Cpio::default();
    for directory in ["bin", "dev", "modules", "nvme", "rig"] {
        cpio.directory(directory);
    }
    cpio.character_device("dev/console", 5, 1);
    cpio.character_device("dev/null", 1, 3);
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    cpio.file("bin/busybox", 0o755, &read(busybox)?);
    cpio.file("init", 0o755, INIT.as_bytes());
    cpio.file("rig/rc", 0o755, RC.as_bytes());
    for (directory, wanted) in [("modules", MODULES), ("nvme", NVME_MODULES)] {
        for (number, file) in kernel::load_order(&kernel.modules, wanted)?.iter().enumerate() {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            cpio.file(&format!("{directory}/{number:02}-{name}"), 0o644, &read(file)?);
        }
    }
    std::fs::write(into, cpio.finish()).with_context(|| format!("cannot write {}", into.display()))
}
