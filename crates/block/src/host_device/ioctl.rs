//! Zone ioctls of a block device. Each blocks until the drive has answered.
#![expect(unsafe_code, reason = "ioctl with structures of the kernel's interface")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use zbdkit_spec::blkzoned::{REPORT_ZONE, ReportHeader, Zone, ZoneRange};
use zerocopy::{FromBytes, IntoBytes};

/// The report of at most `max` zones from the one that holds `sector`: its flags and the zones.
pub fn report(fd: BorrowedFd<'_>, sector: u64, max: u32) -> io::Result<(u32, Vec<Zone>)> {
    const HEADER: usize = size_of::<ReportHeader>();
    // 64-bit words, so that the structures lie aligned.
    let mut words = vec![0u64; (HEADER + max as usize * size_of::<Zone>()) / size_of::<u64>()];
    let header = ReportHeader {
        sector,
        nr_zones: max,
        flags: 0,
    };
    let bytes = words.as_mut_bytes();
    bytes[..HEADER].copy_from_slice(header.as_bytes());
    loop {
        // SAFETY: `fd` is open for the duration of the call; the kernel reads the header at the start of `bytes` and
        // writes no more than the header and the `max` zones behind it, for which `bytes` has room.
        match unsafe { libc::ioctl(fd.as_raw_fd(), REPORT_ZONE as libc::Ioctl, bytes.as_mut_ptr()) } {
            -1 => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
            _ => break,
        }
    }
    let header = ReportHeader::read_from_bytes(&bytes[..HEADER]).unwrap_or_default();
    let zones = bytes[HEADER..]
        .chunks_exact(size_of::<Zone>())
        .take(header.nr_zones.min(max) as usize)
        .filter_map(|bytes| Zone::read_from_bytes(bytes).ok())
        .collect();
    Ok((header.flags, zones))
}

/// One of the operations that take a range of zones: reset, open, close, finish.
pub fn manage(fd: BorrowedFd<'_>, request: u32, range: ZoneRange) -> io::Result<()> {
    loop {
        // SAFETY: `fd` is open for the duration of the call, and the kernel only reads `range`.
        match unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, &raw const range) } {
            -1 => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
            _ => return Ok(()),
        }
    }
}

/// The number of the namespace behind its character device.
pub fn nvme_nsid(fd: BorrowedFd<'_>) -> io::Result<u32> {
    /// `NVME_IOCTL_ID` of linux/nvme_ioctl.h: `_IO('N', 0x40)`.
    const NVME_IOCTL_ID: libc::Ioctl = 0x4e40;
    // SAFETY: `fd` is open for the duration of the call, which takes no argument.
    match unsafe { libc::ioctl(fd.as_raw_fd(), NVME_IOCTL_ID) } {
        -1 => Err(io::Error::last_os_error()),
        // The kernel returns its unsigned number as it is.
        nsid => Ok(nsid as u32),
    }
}
