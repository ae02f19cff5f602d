//! A machine without any disk but its NVMe namespaces: one that it boots from, and one with zones.

use anyhow::{Result, ensure};

use super::{Stage, plain_raw};
use crate::drive::Geometry;
use crate::guest::Boot;

const SCRIPT: &str = include_str!("../../guest/nvme-boot.sh");

pub(super) fn play(stage: &Stage<'_>) -> Result<()> {
    let (disk, zones) = (stage.image("disk.raw"), stage.image("zones.qcow2"));
    stage.rig.make_boot_disk(&disk)?;
    stage.zbdkit.create(&zones, &Geometry::DEMO)?;
    let namespaces = [plain_raw(&disk), zones.clone()];
    let mut daemon = stage.serve(&namespaces)?;
    for time in ["first", "second"] {
        let mut guest = stage.guest(time, SCRIPT, &daemon).variable("TIME", time);
        guest.boot = Boot::Disk;
        let result = Geometry::DEMO.describe(guest).run()?.check()?;
        // What GRUB cannot load, it says there.
        ensure!(
            !result.console.contains("error:"),
            "the boot loader complains; see {}",
            result.logs.display()
        );
        daemon.stop()?;
        daemon = stage.serve(&namespaces)?;
    }
    daemon.stop()?;
    stage.zbdkit.check(&zones, false)
}
