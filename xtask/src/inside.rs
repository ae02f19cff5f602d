//! zbdkit inside a guest, on zoned devices of the guest's own kernel, with QEMU's tools at hand.

use std::path::Path;

use anyhow::{Context, Result};

use crate::drive::Zbdkit;
use crate::guest::Guest;
use crate::rig::Rig;

/// The commands of QEMU's iotest `zoned`, with qemu-io's answers.
const ZONED: &str = include_str!("../../crates/zbdkit/tests/cli/iotests/zoned.transcript");

/// An NVMe drive with a zoned namespace of 1 GiB, whose data are nowhere.
pub const NVME_ZNS: &[&str] = &[
    "-drive",
    "if=none,id=zns,driver=null-co,size=1G,read-zeroes=on",
    "-device",
    "nvme,id=nvme0,serial=zns",
    "-device",
    "nvme-ns,drive=zns,bus=nvme0,logical_block_size=4096,physical_block_size=4096,zoned=on,zoned.zone_size=16M,\
     zoned.zone_capacity=12M,zoned.max_open=8,zoned.max_active=12",
];

/// Gives the guest what a script needs that runs zbdkit itself: the program in its PATH, the transcript of the iotest at
/// `$TRANSCRIPT`, and, where QEMU's tools come from a tree of ours, that tree as the 9p share `$QEMU_SHARE`.
pub fn prepare(guest: &mut Guest<'_>, rig: &Rig, zbdkit: &Zbdkit, directory: &Path) -> Result<()> {
    if directory.exists() {
        std::fs::remove_dir_all(directory)?;
    }
    std::fs::create_dir_all(directory)?;
    let program = zbdkit.program();
    std::fs::copy(program, directory.join("zbdkit"))
        .with_context(|| format!("cannot copy {}", program.display()))?;
    std::fs::write(directory.join("zoned.transcript"), ZONED)?;
    guest.share = Some(directory.to_owned());
    // It would be slow to run from the share.
    guest.script = format!("run install -D -t /usr/local/bin /share/zbdkit\n{}", guest.script);
    let mut variables = vec![("TRANSCRIPT", "/share/zoned.transcript".to_owned())];
    if let Some(root) = rig.qemu.tree() {
        guest.share_read_only(&root.path(""), "qemu");
        variables.push(("QEMU_SHARE", "qemu".to_owned()));
    }
    let named = variables
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value));
    guest.variables.extend(named);
    Ok(())
}
