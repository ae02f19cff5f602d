//! QEMU: the one of the machine if it is new enough, else Debian's out of an unpacked tree.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use super::tree::Tree;
use crate::proc;

/// The first version that has `vhost-user-test-device-pci`, which passes the zoned feature on.
pub const OLDEST: (u32, u32) = (10, 2);
/// QEMU's answer to a question about itself takes at most this long.
const LIMIT: Duration = Duration::from_secs(60);

/// A QEMU to start guests with.
#[derive(Debug, Clone)]
pub enum Qemu {
    /// A program of the machine.
    Host(PathBuf),
    /// The one in a tree of Debian packages.
    Tree(Tree),
}

impl Qemu {
    /// A command that starts `qemu-system-x86_64` and finds its firmware and modules.
    pub fn system(&self) -> Command {
        match self {
            Qemu::Host(program) => proc::command(program),
            Qemu::Tree(tree) => {
                let mut command = self.tool(tree, "qemu-system-x86_64");
                for directory in ["usr/share/qemu", "usr/share/seabios"] {
                    command.arg("-L").arg(tree.path(directory));
                }
                command
            }
        }
    }

    /// The tree that it and its tools are in, unless they are the machine's.
    pub fn tree(&self) -> Option<&Tree> {
        match self {
            Qemu::Host(_) => None,
            Qemu::Tree(tree) => Some(tree),
        }
    }

    /// A command that starts `qemu-storage-daemon`, for the same version.
    #[allow(dead_code, reason = "the benchmarks compare with it")]
    pub fn storage_daemon(&self) -> Command {
        match self {
            Qemu::Host(program) => proc::command(program.with_file_name("qemu-storage-daemon")),
            Qemu::Tree(tree) => self.tool(tree, "qemu-storage-daemon"),
        }
    }

    /// The words of a command that starts one of QEMU's tools, with `{}` where the tool's name belongs.
    pub fn tool_words(&self) -> Vec<String> {
        let command = match self {
            Qemu::Host(program) => proc::command(program.with_file_name("{}")),
            Qemu::Tree(tree) => self.tool(tree, "{}"),
        };
        let variables = command.get_envs().filter_map(|(name, value)| {
            Some(format!("{}={}", name.to_string_lossy(), value?.to_string_lossy()))
        });
        let words = [command.get_program()].into_iter().chain(command.get_args());
        let words = words.map(|word| word.to_string_lossy().into_owned());
        ["env".to_owned()]
            .into_iter()
            .chain(variables)
            .chain(words)
            .collect()
    }

    fn tool(&self, tree: &Tree, name: &str) -> Command {
        let mut command = tree.command(&format!("usr/bin/{name}"));
        command.env("QEMU_MODULE_DIR", tree.path("usr/lib/x86_64-linux-gnu/qemu"));
        command
    }

    /// Its version line, such as `QEMU emulator version 11.1.3 (...)`.
    pub fn version(&self) -> Result<String> {
        let said = proc::capture(
            self.system().arg("--version"),
            "qemu-system-x86_64 --version",
            LIMIT,
        )?;
        Ok(String::from_utf8_lossy(&said)
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned())
    }
}

/// The QEMU of the machine: the one that ZBDKIT_QEMU names, which must do, or one in PATH that does.
pub fn of_the_machine() -> Result<Option<Qemu>> {
    if let Some(program) = std::env::var_os("ZBDKIT_QEMU") {
        let qemu = Qemu::Host(PathBuf::from(&program));
        let version = qemu.version()?;
        if !new_enough(&version) {
            bail!(
                "ZBDKIT_QEMU={}: {version}: {}.{} or later is needed",
                Path::new(&program).display(),
                OLDEST.0,
                OLDEST.1
            );
        }
        return Ok(Some(qemu));
    }
    let Some(program) = proc::find_program("qemu-system-x86_64") else {
        return Ok(None);
    };
    let qemu = Qemu::Host(program);
    Ok(qemu
        .version()
        .is_ok_and(|version| new_enough(&version))
        .then_some(qemu))
}

/// Whether a version line names a QEMU that passes zones through.
fn new_enough(version: &str) -> bool {
    parse_version(version).is_some_and(|version| version >= OLDEST)
}

fn parse_version(line: &str) -> Option<(u32, u32)> {
    let mut numbers = line
        .split("version ")
        .nth(1)?
        .split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(new_enough(
            "QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)"
        ));
        assert!(new_enough("QEMU emulator version 10.2.0"));
        assert!(!new_enough("QEMU emulator version 10.0.13 (Debian 1:10.0.13+ds)"));
        assert!(!new_enough("QEMU emulator version 9.9"));
        assert!(!new_enough("something else"));
    }
}
