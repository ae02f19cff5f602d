//! Real qemu-img beside ours: QEMU 11 out of the rig that `cargo xtask` unpacks, or a new enough one in PATH.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::{Bench, Run};

/// A command for one of QEMU's tools, or `None` and a word about it on stderr where there is none.
pub fn tool(name: &str) -> Option<Command> {
    let rig = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/rig/qemu");
    let program = rig.join("usr/bin").join(name);
    if program.exists() {
        let libraries = rig.join("usr/lib/x86_64-linux-gnu");
        let mut command = Command::new(rig.join("usr/lib64/ld-linux-x86-64.so.2"));
        command
            .env("QEMU_MODULE_DIR", libraries.join("qemu"))
            .arg("--inhibit-cache")
            .arg("--library-path")
            .arg(libraries)
            .args(["--argv0", name])
            .arg(program);
        return Some(command);
    }
    let found = std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|directory| directory.join(name))
        .find(|program: &PathBuf| program.exists());
    let version = Command::new(found.as_ref()?).arg("--version").output().ok()?;
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let major = version
        .split("version ")
        .nth(1)
        .and_then(|rest| rest.split('.').next()?.parse().ok());
    match major {
        Some(11u32..) => found.map(Command::new),
        _ => None,
    }
}

/// qemu-img with these arguments, in the bench's directory.
pub fn qemu_img(bench: &Bench, args: &[&str]) -> Option<Run> {
    run(bench, "qemu-img", args)
}

/// qemu-io with these commands on an image.
pub fn qemu_io(bench: &Bench, image: &str, commands: &[&str]) -> Option<Run> {
    let args: Vec<_> = commands
        .iter()
        .flat_map(|command| ["-c", command])
        .chain([image])
        .collect();
    run(bench, "qemu-io", &args)
}

fn run(bench: &Bench, name: &str, args: &[&str]) -> Option<Run> {
    let Some(mut command) = tool(name) else {
        eprintln!("SKIPPED: there is no {name} 11 to compare with");
        return None;
    };
    let output = command
        .args(args)
        .current_dir(bench.directory())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Some(output.into())
}
