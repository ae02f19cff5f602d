//! KVM or emulation, found out by trying.
//!
//! A `/dev/kvm` that opens says little: on some hosts it starts guests that never get anywhere. So a
//! trivial guest is booted once under KVM with a short limit, and the answer is remembered for this
//! host kernel and this QEMU.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{kernel::Kernel, qemu::Qemu};
use crate::{proc::Running, ui::Step};

/// A guest under working KVM says its word within a second or two.
const LIMIT: Duration = Duration::from_secs(10);

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Accel {
    /// The machine's processor.
    Kvm,
    /// QEMU's translator, some ten times slower.
    Tcg,
}

impl Accel {
    /// The arguments that tell QEMU.
    pub fn arguments(self) -> &'static [&'static str] {
        match self {
            Accel::Kvm => &["-accel", "kvm", "-cpu", "host"],
            Accel::Tcg => &["-accel", "tcg,thread=multi"],
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Remembered {
    host: String,
    accel: Accel,
}

/// The fastest way that works here. `memory` is the file of an earlier answer.
pub fn find(qemu: &Qemu, kernel: &Kernel, initrd: &Path, memory: &Path) -> Result<Accel> {
    match std::env::var("ZBDKIT_ACCEL").as_deref() {
        Ok("kvm") => return Ok(Accel::Kvm),
        Ok("tcg") => return Ok(Accel::Tcg),
        _ => {}
    }
    let kvm = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if kvm.is_err() {
        return Ok(Accel::Tcg);
    }
    drop(kvm);
    let host = format!(
        "{} {}",
        rustix::system::uname().version().to_string_lossy(),
        qemu.version()?
    );
    let earlier = std::fs::read(memory)
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Remembered>(&bytes).ok());
    if let Some(earlier) = earlier.filter(|earlier| earlier.host == host) {
        return Ok(earlier.accel);
    }
    let step = Step::start("trying whether /dev/kvm really boots a kernel");
    let accel = if boots_under_kvm(qemu, kernel, initrd)? {
        Accel::Kvm
    } else {
        Accel::Tcg
    };
    step.done();
    eprintln!(
        "  {}",
        if accel == Accel::Kvm {
            "it does"
        } else {
            "it does not: guests are emulated (TCG), which is slower"
        }
    );
    std::fs::write(memory, serde_json::to_vec(&Remembered { host, accel })?)?;
    Ok(accel)
}

fn boots_under_kvm(qemu: &Qemu, kernel: &Kernel, initrd: &Path) -> Result<bool> {
    let console = tempfile::NamedTempFile::new()?;
    let mut command = qemu.system();
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-machine",
        "q35",
        "-m",
        "256",
    ]);
    command.args(Accel::Kvm.arguments());
    command
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initrd);
    command.args(["-append", "console=ttyS0 loglevel=4 panic=-1 zbdkit.mode=probe"]);
    command
        .arg("-serial")
        .arg(format!("file:{}", console.path().display()));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut running = Running::start(&mut command, "a trial guest")?;
    let ended = running.wait_for(LIMIT)?;
    drop(running);
    let said = std::fs::read(console.path())?;
    Ok(ended.is_some() && String::from_utf8_lossy(&said).contains("zbdkit-probe-ok"))
}
