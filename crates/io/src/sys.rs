//! The system calls that data takes when it does not go through io_uring, and the facts asked of descriptors.

#![expect(
    unsafe_code,
    reason = "vectored reads and writes on memory shared with a guest"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

/// The most segments that the kernel takes in one vectored operation.
pub(crate) const IOV_MAX: usize = 1024;

/// The most bytes that the kernel moves in one operation.
pub(crate) const MAX_RW: usize = 0x7fff_f000;

/// The offset that means "no offset": for pipes and sockets.
pub(crate) const NO_OFFSET: u64 = u64::MAX;

const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Reads into `iov`; the number of bytes, or a negative errno.
///
/// # Safety
/// Each entry must be valid for writes of its length.
pub(crate) unsafe fn preadv(fd: RawFd, iov: &[libc::iovec], offset: u64) -> i32 {
    let count = iov.len().min(IOV_MAX) as libc::c_int;
    // SAFETY: the array has `count` entries, which the caller vouches for.
    result(unsafe { libc::preadv2(fd, iov.as_ptr(), count, offset as libc::off_t, 0) })
}

/// Writes from `iov`; the number of bytes, or a negative errno.
///
/// # Safety
/// Each entry must be valid for reads of its length.
pub(crate) unsafe fn pwritev(fd: RawFd, iov: &[libc::iovec], offset: u64) -> i32 {
    let count = iov.len().min(IOV_MAX) as libc::c_int;
    // SAFETY: the array has `count` entries, which the caller vouches for.
    result(unsafe { libc::pwritev2(fd, iov.as_ptr(), count, offset as libc::off_t, 0) })
}

/// Reads into one piece of memory; the number of bytes, or a negative errno.
///
/// # Safety
/// `memory` must be valid for writes of `len` bytes.
pub(crate) unsafe fn pread(fd: RawFd, memory: *mut u8, len: usize, offset: u64) -> i32 {
    // SAFETY: the caller vouches for the memory.
    result(unsafe { libc::pread64(fd, memory.cast(), len, offset as libc::off64_t) })
}

/// Writes from one piece of memory; the number of bytes, or a negative errno.
///
/// # Safety
/// `memory` must be valid for reads of `len` bytes.
pub(crate) unsafe fn pwrite(fd: RawFd, memory: *const u8, len: usize, offset: u64) -> i32 {
    // SAFETY: the caller vouches for the memory.
    result(unsafe { libc::pwrite64(fd, memory.cast(), len, offset as libc::off64_t) })
}

pub(crate) fn fsync(fd: RawFd, data_only: bool) -> i32 {
    // SAFETY: takes no pointers; a stale descriptor gives EBADF.
    let done = unsafe {
        if data_only {
            libc::fdatasync(fd)
        } else {
            libc::fsync(fd)
        }
    };
    result(done as isize)
}

pub(crate) fn fallocate(fd: RawFd, mode: i32, offset: u64, len: u64) -> i32 {
    // SAFETY: takes no pointers; a stale descriptor gives EBADF.
    result(unsafe { libc::fallocate(fd, mode, offset as libc::off_t, len as libc::off_t) } as isize)
}

/// Gives back what record locks (fcntl(2), F_OFD_SETLK) the descriptor's open file description has.
pub(crate) fn unlock_all(fd: RawFd) {
    let everything = libc::flock {
        l_type: libc::F_UNLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the structure outlives the call, which only reads it. It fails only where there are no locks.
    unsafe { libc::fcntl(fd, libc::F_OFD_SETLK, &raw const everything) };
}

fn result(done: isize) -> i32 {
    if done < 0 {
        // The calls above return -1 on failure only.
        return -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    }
    // The kernel never moves more than MAX_RW bytes.
    done as i32
}

/// Waits until one of the descriptors is readable; `timeout` in milliseconds, -1 for ever.
pub(crate) fn poll(fds: &mut [libc::pollfd], timeout: Option<std::time::Duration>) -> io::Result<usize> {
    let spec = timeout.map(|t| libc::timespec {
        tv_sec: t.as_secs().min(1 << 30) as libc::time_t,
        tv_nsec: t.subsec_nanos().into(),
    });
    let spec = spec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the array is ours and has this length; the time is null or outlives the call; no signal mask.
    let n = unsafe {
        libc::ppoll(
            fds.as_mut_ptr(),
            fds.len() as libc::nfds_t,
            spec,
            std::ptr::null(),
        )
    };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(n as usize)
    }
}

/// Whether reads and writes of the file are copies in memory: it is a regular file on tmpfs.
pub(crate) fn is_tmpfs(fd: impl AsFd) -> bool {
    rustix::fs::fstatfs(&fd).is_ok_and(|s| s.f_type == TMPFS_MAGIC)
        && rustix::fs::fstat(&fd).is_ok_and(|s| file_type(s.st_mode).is_file())
}

/// Whether the descriptor has no position: a pipe or a socket.
pub(crate) fn is_stream(fd: impl AsFd) -> bool {
    rustix::fs::fstat(&fd).is_ok_and(|s| file_type(s.st_mode).is_fifo() || file_type(s.st_mode).is_socket())
}

/// The length in bytes of a file or a block device.
pub(crate) fn length(fd: impl AsFd) -> io::Result<u64> {
    let stat = rustix::fs::fstat(&fd)?;
    if !file_type(stat.st_mode).is_block_device() {
        return Ok(u64::try_from(stat.st_size).unwrap_or(0));
    }
    let mut len: u64 = 0;
    // BLKGETSIZE64, whose number libc does not name everywhere.
    const BLKGETSIZE64: libc::Ioctl = 0x8008_1272_u32 as libc::Ioctl;
    // SAFETY: this request writes one u64 through the pointer.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKGETSIZE64, &raw mut len) };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(len)
    }
}

fn file_type(mode: rustix::fs::RawMode) -> rustix::fs::FileType {
    rustix::fs::FileType::from_raw_mode(mode)
}
