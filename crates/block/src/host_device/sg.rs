//! Commands for SCSI devices by the ioctl SG_IO (linux `include/scsi/sg.h`). Each blocks until the device has answered.

#![expect(unsafe_code, reason = "ioctl with a structure of the kernel's interface")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use zbdkit_spec::scsi::{Sense, Status};

const SG_IO: libc::Ioctl = 0x2285;
/// The version of the interface that the structure below is of.
const INTERFACE: libc::c_int = b'S' as libc::c_int;
const DIRECTION_NONE: libc::c_int = -1;
const DIRECTION_FROM_DEVICE: libc::c_int = -3;

/// Milliseconds that a command may take. Finishing or resetting all zones of a large disk takes its time.
const TIMEOUT_MS: u32 = 120_000;

/// Bytes of sense data that are of use.
const SENSE_BYTES: usize = 64;

/// `struct sg_io_hdr`.
#[repr(C)]
struct SgIoHdr {
    interface_id: libc::c_int,
    dxfer_direction: libc::c_int,
    cmd_len: u8,
    mx_sb_len: u8,
    iovec_count: u16,
    dxfer_len: u32,
    dxferp: *mut u8,
    cmdp: *const u8,
    sbp: *mut u8,
    timeout: u32,
    flags: u32,
    pack_id: libc::c_int,
    usr_ptr: *mut u8,
    status: u8,
    masked_status: u8,
    msg_status: u8,
    sb_len_wr: u8,
    host_status: u16,
    driver_status: u16,
    resid: libc::c_int,
    duration: u32,
    info: u32,
}

#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<SgIoHdr>() == 88);

/// What became of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was carried out, and that many bytes came.
    Good(usize),
    /// The device refused it. Sense data may be missing or of an unknown format.
    Refused(Status, Option<Sense>),
    /// It did not reach the device, or the answer did not come back: the host adapter's status.
    Lost(u16),
}

/// Has the device carry out the command block `cdb`, whose answer goes to `data`.
///
/// # Errors
/// The file takes no such commands, or not these without CAP_SYS_RAWIO (EPERM).
pub fn execute(fd: BorrowedFd<'_>, cdb: &[u8], data: &mut [u8]) -> io::Result<Outcome> {
    let mut sense = [0u8; SENSE_BYTES];
    let (Ok(cmd_len), Ok(dxfer_len)) = (u8::try_from(cdb.len()), u32::try_from(data.len())) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut header = SgIoHdr {
        interface_id: INTERFACE,
        dxfer_direction: match data.is_empty() {
            true => DIRECTION_NONE,
            false => DIRECTION_FROM_DEVICE,
        },
        cmd_len,
        mx_sb_len: SENSE_BYTES as u8,
        iovec_count: 0,
        dxfer_len,
        dxferp: data.as_mut_ptr(),
        cmdp: cdb.as_ptr(),
        sbp: sense.as_mut_ptr(),
        timeout: TIMEOUT_MS,
        flags: 0,
        pack_id: 0,
        usr_ptr: ptr::null_mut(),
        status: 0,
        masked_status: 0,
        msg_status: 0,
        sb_len_wr: 0,
        host_status: 0,
        driver_status: 0,
        resid: 0,
        duration: 0,
        info: 0,
    };
    // SAFETY: the header and what it points to live until the call returns; the kernel reads `cmd_len` bytes of the
    // command, and writes at most `dxfer_len` bytes of data and `mx_sb_len` of sense.
    if unsafe { libc::ioctl(fd.as_raw_fd(), SG_IO, &raw mut header) } == -1 {
        return Err(io::Error::last_os_error());
    }
    let came = data
        .len()
        .saturating_sub(usize::try_from(header.resid).unwrap_or(0));
    let sense = &sense[..usize::from(header.sb_len_wr).min(SENSE_BYTES)];
    Ok(match (header.host_status, Status(header.status)) {
        (0, Status::GOOD) => Outcome::Good(came),
        (0, status) => Outcome::Refused(status, Sense::parse(sense)),
        (lost, _) => Outcome::Lost(lost),
    })
}
