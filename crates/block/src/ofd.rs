//! Open-file-description locks (fcntl(2), F_OFD_SETLK): the two calls that rustix does not wrap.
#![expect(unsafe_code, reason = "fcntl with a struct flock")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

fn flock(kind: libc::c_int, byte: u64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte as libc::off_t,
        l_len: 1,
        l_pid: 0,
    }
}

fn set(fd: BorrowedFd<'_>, kind: libc::c_int, byte: u64) -> io::Result<()> {
    let lock = flock(kind, byte);
    // SAFETY: `fd` is open for the duration of the call and `lock` is a valid flock that the kernel only reads.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Takes a shared lock on one byte.
pub fn read_lock(fd: BorrowedFd<'_>, byte: u64) -> io::Result<()> {
    set(fd, libc::F_RDLCK, byte)
}

/// Gives the lock on one byte back.
pub fn unlock(fd: BorrowedFd<'_>, byte: u64) -> io::Result<()> {
    set(fd, libc::F_UNLCK, byte)
}

/// Does another open file description hold any lock on the byte?
pub fn is_held_by_other(fd: BorrowedFd<'_>, byte: u64) -> io::Result<bool> {
    let mut lock = flock(libc::F_WRLCK, byte);
    // SAFETY: `fd` is open for the duration of the call and `lock` is a valid flock that the kernel may fill.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(lock.l_type != libc::F_UNLCK as libc::c_short),
    }
}
