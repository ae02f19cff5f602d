//! QEMU's image locks, so that QEMU and zbdkit keep off each other's images.
//!
//! Each use of an image is a shared open-file-description lock on one byte: byte 100 + p for a permission that
//! is used, byte 200 + p for one that is not shared with others. Having taken its own bytes, an opener looks
//! whether anybody holds a byte that clashes. The locks live as long as the open file description, so they
//! outlast a killed process's I/O in flight; the last handle of a [`zbdkit_io::File`] gives them back.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::fs;

use crate::ofd;

/// What the opener will do with the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// No locks (force-share, and files that nobody else looks for).
    None,
    /// Reads, and wants nobody to write meanwhile.
    Read,
    /// Writes, alone.
    Write,
}

/// Somebody else's lock is in the way.
#[derive(Clone, Debug)]
pub struct Conflict {
    /// QEMU's name of the permission: "write", "resize", ...
    pub permission: &'static str,
    /// Who has the file open, as far as can be seen; may be empty.
    pub holder: String,
}

const USED: u64 = 100;
const UNSHARED: u64 = 200;

/// QEMU's permission bits and names (block-common.h).
const CONSISTENT_READ: (u64, &str) = (0, "consistent read");
const WRITE: (u64, &str) = (1, "write");
const RESIZE: (u64, &str) = (3, "resize");

/// Takes the locks of `mode` on the description of `fd`, retrying until `wait` is over.
pub fn acquire(fd: BorrowedFd<'_>, mode: LockMode, wait: Duration) -> Result<(), Conflict> {
    let (used, unshared): (&[_], &[_]) = match mode {
        LockMode::None => return Ok(()),
        LockMode::Read => (&[CONSISTENT_READ], &[WRITE, RESIZE]),
        LockMode::Write => (&[CONSISTENT_READ, WRITE, RESIZE], &[WRITE, RESIZE]),
    };
    let deadline = Instant::now() + wait;
    loop {
        match try_acquire(fd, used, unshared) {
            Ok(()) => return Ok(()),
            Err(permission) if Instant::now() >= deadline => {
                return Err(Conflict {
                    permission,
                    holder: holder(fd),
                });
            }
            // A killed holder's I/O may still be in flight, a moved one may be about to let go.
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn try_acquire(
    fd: BorrowedFd<'_>,
    used: &[(u64, &'static str)],
    unshared: &[(u64, &'static str)],
) -> Result<(), &'static str> {
    let ours = used
        .iter()
        .map(|p| USED + p.0)
        .chain(unshared.iter().map(|p| UNSHARED + p.0));
    let clashing = used
        .iter()
        .map(|p| (UNSHARED + p.0, p.1))
        .chain(unshared.iter().map(|p| (USED + p.0, p.1)));
    for byte in ours.clone() {
        // File systems without locks (some FUSE, old NFS) have nobody to tell; neither does QEMU insist there.
        if let Err(error) = ofd::read_lock(fd, byte)
            && !unsupported(&error)
        {
            release(fd, ours);
            return Err(used.last().map_or("consistent read", |p| p.1));
        }
    }
    for (byte, name) in clashing {
        if ofd::is_held_by_other(fd, byte).unwrap_or(false) {
            release(fd, ours);
            return Err(name);
        }
    }
    Ok(())
}

fn release(fd: BorrowedFd<'_>, bytes: impl Iterator<Item = u64>) {
    for byte in bytes {
        // Fails only where taking it failed too.
        let _ = ofd::unlock(fd, byte);
    }
}

fn unsupported(error: &io::Error) -> bool {
    matches!(
        rustix::io::Errno::from_io_error(error),
        Some(
            rustix::io::Errno::OPNOTSUPP
                | rustix::io::Errno::NOSYS
                | rustix::io::Errno::NOLCK
                | rustix::io::Errno::INVAL
        )
    )
}

/// The other processes that have the file open, from /proc: the kernel names no owner of these locks.
fn holder(fd: BorrowedFd<'_>) -> String {
    let Ok(file) = fs::fstat(fd) else {
        return String::new();
    };
    let me = std::process::id();
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let fds = std::fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        let has_it = fds
            .map(|entry| fs::stat(entry.path()))
            .any(|stat| stat.is_ok_and(|stat| stat.st_dev == file.st_dev && stat.st_ino == file.st_ino));
        if has_it && pid != me {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(format!("{} (process {pid})", name.trim()));
        }
    }
    if found.is_empty() {
        String::new()
    } else {
        format!(": {}", found.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use zbdkit_io::{File, FileKind};

    use super::*;

    fn open(path: &std::path::Path) -> std::fs::File {
        std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
    }

    #[test]
    fn a_writer_excludes_writers_and_readers_until_it_is_gone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (first, second) = (open(file.path()), open(file.path()));
        acquire(first.as_fd(), LockMode::Write, Duration::ZERO).unwrap();
        let conflict = acquire(second.as_fd(), LockMode::Write, Duration::ZERO).unwrap_err();
        assert_eq!(conflict.permission, "write");
        assert!(acquire(second.as_fd(), LockMode::Read, Duration::ZERO).is_err());
        drop(first);
        acquire(second.as_fd(), LockMode::Write, Duration::ZERO).unwrap();
    }

    #[test]
    fn the_last_handle_of_a_file_gives_its_locks_back_whoever_keeps_the_description() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (first, second) = (open(file.path()), open(file.path()));
        acquire(first.as_fd(), LockMode::Write, Duration::ZERO).unwrap();
        // As a ring does that has not been told yet that a worker of the kernel is done.
        let _kept = first.try_clone().unwrap();
        let handle = File::from_fd(first.into(), FileKind::default());
        let clone = handle.clone();
        drop(handle);
        assert!(acquire(second.as_fd(), LockMode::Read, Duration::ZERO).is_err());
        drop(clone);
        acquire(second.as_fd(), LockMode::Write, Duration::ZERO).unwrap();
    }

    #[test]
    fn readers_share_and_exclude_writers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (first, second, third) = (open(file.path()), open(file.path()), open(file.path()));
        acquire(first.as_fd(), LockMode::Read, Duration::ZERO).unwrap();
        acquire(second.as_fd(), LockMode::Read, Duration::ZERO).unwrap();
        assert!(acquire(third.as_fd(), LockMode::Write, Duration::ZERO).is_err());
    }
}
