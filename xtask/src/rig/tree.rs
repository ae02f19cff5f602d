//! Directory trees of unpacked Debian packages, and running the programs in them.
//!
//! A tree needs no root, chroot or mount: its programs run as ordinary processes through the tree's
//! own dynamic linker, so they see the machine's paths and sockets, and only the tree's libraries.

use std::ffi::OsStr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::{proc, ui::Step};

/// Unpacking one package takes at most this long, also on a busy machine.
const UNPACK_LIMIT: Duration = Duration::from_secs(600);

/// An unpacked tree.
#[derive(Debug, Clone)]
pub struct Tree {
    root: PathBuf,
}

impl Tree {
    /// The tree at `root`, which exists already.
    pub fn at(root: &Path) -> Tree {
        Tree {
            root: root.to_owned(),
        }
    }

    /// A path inside the tree.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.root.join(inside.trim_start_matches('/'))
    }

    /// A command for the tree's program `inside` (such as `usr/bin/fio`), run through the tree's dynamic linker.
    pub fn command(&self, inside: &str) -> Command {
        self.command_named(inside, inside.rsplit('/').next().unwrap_or(inside))
    }

    /// Like [`Tree::command`] for a program that looks at the name it is called by.
    pub fn command_named(&self, inside: &str, name: impl AsRef<OsStr>) -> Command {
        let mut command = proc::command(self.path("usr/lib64/ld-linux-x86-64.so.2"));
        command
            .arg("--inhibit-cache")
            .arg("--library-path")
            .arg(self.path("usr/lib/x86_64-linux-gnu"));
        command.arg("--argv0").arg(name).arg(self.path(inside));
        command
    }

    /// Unpacks package files into a new tree at `root`, at most two at a time.
    pub fn unpack(root: &Path, packages: &[PathBuf], what: &str) -> Result<Tree> {
        std::fs::create_dir_all(root)?;
        for link in ["bin", "sbin", "lib", "lib64"] {
            // Debian has merged these; packages that still ship files there follow the links.
            std::fs::create_dir_all(root.join("usr").join(link))?;
            symlink(format!("usr/{link}"), root.join(link)).with_context(|| format!("cannot link {link}"))?;
        }
        let step = Step::start(format!("unpacking {what}: {} packages", packages.len()));
        unpack_all(root, packages, &step)?;
        step.done();
        Ok(Tree::at(root))
    }
}

fn unpack_all(root: &Path, packages: &[PathBuf], step: &Step) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let worker = || {
        while let Some(package) = packages.get(next.fetch_add(1, Ordering::Relaxed)) {
            step.progress(&format!(
                "{} of {}",
                next.load(Ordering::Relaxed).min(packages.len()),
                packages.len()
            ));
            let mut unpack = proc::command("dpkg-deb");
            unpack.arg("--extract").arg(package).arg(root);
            if let Err(error) = proc::capture(&mut unpack, "dpkg-deb", UNPACK_LIMIT) {
                let error = error.context(format!("cannot unpack {}", package.display()));
                failure
                    .lock()
                    .unwrap_or_else(|poisoned| poisoned.into_inner())
                    .get_or_insert(error);
                next.store(packages.len(), Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(worker);
        worker();
    });
    failure
        .into_inner()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
        .map_or(Ok(()), Err)
}

/// Does for a guest's tree what the packages' scripts would have done on installation, as far as a
/// guest that lives for one script needs it, and drops what it never reads.
pub fn finish_guest(tree: &Tree) -> Result<()> {
    for name in ["passwd", "group"] {
        let master = tree.path(&format!("usr/share/base-passwd/{name}.master"));
        let text =
            std::fs::read_to_string(&master).with_context(|| format!("cannot read {}", master.display()))?;
        write(
            tree,
            &format!("etc/{name}"),
            &(text.replace(":*:", ":x:") + extra_accounts(name)),
        )?;
    }
    write(tree, "etc/shadow", "root::20000:0:99999:7:::\n")?;
    write(tree, "etc/hostname", "guest\n")?;
    write(tree, "etc/hosts", "127.0.0.1 localhost guest\n")?;
    write(tree, "etc/machine-id", "00000000000000000000000000000001\n")?;
    write(tree, "etc/fstab", "")?;
    for (link, target) in [
        ("etc/mtab", "../proc/self/mounts"),
        ("usr/bin/awk", "gawk"),
        ("usr/bin/pager", "less"),
    ] {
        let _ = std::fs::remove_file(tree.path(link));
        symlink(target, tree.path(link)).with_context(|| format!("cannot link {link}"))?;
    }
    for directory in [
        "dev", "proc", "sys", "run", "tmp", "mnt", "share", "root", "var/tmp", "var/lib",
    ] {
        std::fs::create_dir_all(tree.path(directory))?;
    }
    for unread in [
        "doc", "man", "locale", "info", "icons", "fonts", "themes", "X11", "bug", "lintian", "gtk-3.0",
        "glib-2.0", "mime",
    ] {
        let path = tree.path(&format!("usr/share/{unread}"));
        if path.exists() {
            std::fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Accounts that udev's rules name and that its package would have added.
fn extra_accounts(file: &str) -> &'static str {
    match file {
        "group" => "input:x:101:\nsgx:x:102:\nclock:x:103:\nkvm:x:104:\nrender:x:105:\n",
        _ => "",
    }
}

fn write(tree: &Tree, inside: &str, text: &str) -> Result<()> {
    let path = tree.path(inside);
    let _ = std::fs::remove_file(&path);
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}
