//! Zones in every condition, and the daemon stopped, and killed: they are as they were. QEMU's own drive, which keeps its data
//! in a file as well, has forgotten all of them.

use anyhow::{Result, ensure};

use super::{Stage, Zones, qemu};

const SCRIPT: &str = include_str!("../../guest/nvme-state.sh");

const ZONES: Zones = Zones {
    count: 16,
    size: 4,
    capacity: 3,
    max_open: 6,
    max_active: 8,
    extras: true,
};

/// What only an operator can do to a zone.
const BY_OPERATOR: [(u32, &str); 2] = [(14, "read-only"), (15, "offline")];

pub(super) fn play(stage: &Stage<'_>) -> Result<()> {
    let image = stage.image("zones.qcow2");
    ZONES.create(stage.zbdkit, &image)?;
    let share = stage.image("share");
    std::fs::create_dir(&share)?;
    let boot = |part: &str| -> Result<()> {
        let daemon = stage.serve(&[&image])?;
        let mut guest = ZONES.describe(stage.guest(part, SCRIPT, &daemon));
        guest.share = Some(share.clone());
        guest
            .qemu_args
            .extend(qemu::arguments(&stage.image("qemu.raw"), &ZONES)?);
        guest.variable("PART", part).run()?.check()?;
        // Killed between the parts, stopped at last.
        if part == "again" {
            daemon.stop()
        } else {
            daemon.kill()
        }
    };
    boot("make")?;
    for (zone, state) in BY_OPERATOR {
        stage.zbdkit.set_zone(&image, zone, state)?;
    }
    let shown = |name: &str| std::fs::read_to_string(share.join(name));
    let made = shown("zbdkit-made")?;
    ensure!(
        made == shown("qemu-made")?,
        "the two drives were not made alike; see {}",
        share.display()
    );
    boot("look")?;
    boot("again")?;
    stage.zbdkit.check(&image, true)
}
