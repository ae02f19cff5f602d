//! fio on zbdkit's controller and on QEMU's in one guest, by turns, with both images in memory: a table of medians,
//! once as zbdkit is, and once with doorbells that the guest writes and a thread that never sleeps.

use anyhow::{Context, Result};

use super::{Stage, Zones, qemu};
use crate::ui::say;

const SCRIPT: &str = include_str!("../../guest/nvme-bench.sh");

const ZONES: Zones = Zones {
    count: 64,
    size: 16,
    capacity: 16,
    max_open: 14,
    max_active: 14,
    extras: false,
};

pub(super) fn play(stage: &Stage<'_>) -> Result<()> {
    let ways: [(&str, &[&str]); 2] = [("sleeping", &[]), ("polling", &["--poll"])];
    for (name, options) in ways {
        say(&format!("zbdkit serve, {name}"));
        let memory = tempfile::tempdir_in("/dev/shm").context("no memory for the images")?;
        let zones = memory.path().join("zones.raw");
        ZONES.create(stage.zbdkit, &zones)?;
        let daemon = stage.serve_with(options, &[zones])?;
        let mut guest = ZONES.describe(stage.guest(name, SCRIPT, &daemon));
        guest
            .qemu_args
            .extend(qemu::arguments(&memory.path().join("qemu.raw"), &ZONES)?);
        guest.run()?.check()?;
        daemon.stop()?;
    }
    Ok(())
}
