//! btrfs on a zoned namespace, through what ends machines: the daemon is killed, QEMU is killed, the machine is reset, QEMU
//! quits, each but the first in the middle of writing. Every boot finds each file that was synced before.

use anyhow::{Context, Result};

use super::Stage;
use crate::drive::{Daemon, Geometry};
use crate::guest::{Guest, RunningGuest};
use crate::qmp;

const SCRIPT: &str = include_str!("../../guest/nvme-btrfs.sh");

const GEOMETRY: Geometry = Geometry {
    size: 1024,
    zone_size: 16,
    max_open: 12,
    max_active: 16,
    ..Geometry::DEMO
};

pub(super) fn play(stage: &Stage<'_>) -> Result<()> {
    let image = stage.image("zones.qcow2");
    stage.zbdkit.create(&image, &GEOMETRY)?;
    let qmp = stage.sockets.path().join("qmp.sock");
    let share = stage.image("share");
    std::fs::create_dir(&share)?;
    let guest = |part: &str, task: &str, daemon: &Daemon| -> Guest<'_> {
        let mut guest = GEOMETRY.describe(stage.guest(part, SCRIPT, daemon));
        guest.share = Some(share.clone());
        guest.qemu_args.extend(qmp::arguments(&qmp));
        guest.variable("TASK", task)
    };

    let daemon = stage.serve(&[&image])?;
    guest("make", "make", &daemon).run()?.check()?;
    daemon.kill()?;

    let daemon = stage.serve(&[&image])?;
    let writing = guest("killed", "write", &daemon).start()?;
    wait_for_boot(&writing, 2)?;
    writing.kill()?;

    let mut reset = guest("reset", "write", &daemon);
    reset.reboots = true;
    let writing = reset.start()?;
    wait_for_boot(&writing, 3)?;
    qmp::execute(&qmp, "system_reset")?;
    wait_for_boot(&writing, 4)?;
    qmp::execute(&qmp, "quit")?;
    writing.finish()?;

    guest("last", "check", &daemon).run()?.check()?;
    daemon.stop()?;
    // It was killed once, and may have lost space.
    stage.zbdkit.check(&image, true)
}

/// Waits until that boot is in the middle of its writing.
fn wait_for_boot(guest: &RunningGuest, boot: u32) -> Result<()> {
    guest
        .wait_for_output(&format!("boot {boot}: 6 files synced"))
        .with_context(|| format!("boot {boot} did not come to writing"))
}
