//! NVMe passthrough: commands for the device behind a namespace's or a controller's character device (`/dev/ng0n1`,
//! `/dev/nvme0`), as linux/nvme_ioctl.h has them.
//!
//! On a ring they are IORING_OP_URING_CMD (Linux 5.19); where the kernel does not take one there, a worker thread makes
//! the ioctl. What a command means is its caller's business.

#![expect(unsafe_code, reason = "the ioctl of NVMe passthrough takes a pointer")]

use std::io;
use std::os::fd::RawFd;

use zerocopy::{Immutable, IntoBytes};

/// Which queue of the controller a command is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NvmeQueue {
    /// The admin queue.
    Admin,
    /// One of the I/O queues.
    Io,
}

/// A command for an NVMe device.
///
/// The two lowest bits of the opcode say which way data goes (NVM Express Base Specification, 4.1.1); the kernel
/// goes by them. A device moves as much data as the command's dwords say, and the kernel does not look at those: whoever
/// makes a command sees to it that they name just the bytes of the buffer that goes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NvmeCommand {
    /// The queue.
    pub queue: NvmeQueue,
    /// The opcode.
    pub opcode: u8,
    /// The namespace.
    pub nsid: u32,
    /// Command dwords 10 to 15.
    pub cdw10_15: [u32; 6],
    /// Milliseconds until the kernel gives the command up and resets the controller; 0 for the kernel's own time.
    pub timeout_ms: u32,
}

/// What a device answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NvmeCompletion {
    /// The status field without its phase tag: 0 for success.
    pub status: u16,
    /// Dwords 0 and 1, the first one low.
    pub result: u64,
}

/// `struct nvme_uring_cmd`: what follows the head of the ring's entry.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct UringCommand {
    opcode: u8,
    flags: u8,
    rsvd1: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10_15: [u32; 6],
    timeout_ms: u32,
    rsvd2: u32,
}

const _: () = assert!(size_of::<UringCommand>() == 72);

/// `struct nvme_passthru_cmd64`: the argument of the ioctl.
#[repr(C)]
struct Passthru64 {
    command: UringCommand,
    result: u64,
}

const _: () = assert!(size_of::<Passthru64>() == 80);

/// `_IOWR('N', number, T)`.
const fn iowr<T>(number: u32) -> u32 {
    (3 << 30) | ((size_of::<T>() as u32) << 16) | ((b'N' as u32) << 8) | number
}

const URING_CMD_IO: u32 = iowr::<UringCommand>(0x80);
const URING_CMD_IO_VEC: u32 = iowr::<UringCommand>(0x81);
const URING_CMD_ADMIN: u32 = iowr::<UringCommand>(0x82);
const URING_CMD_ADMIN_VEC: u32 = iowr::<UringCommand>(0x83);

const IOCTL_ADMIN64_CMD: u32 = iowr::<Passthru64>(0x47);
const IOCTL_IO64_CMD: u32 = iowr::<Passthru64>(0x48);
const IOCTL_IO64_CMD_VEC: u32 = iowr::<Passthru64>(0x49);

/// The command with the memory that goes with it, and whether that is told as a list of vectors.
fn with_memory(command: &NvmeCommand, vectors: &[libc::iovec]) -> (UringCommand, bool) {
    let (addr, data_len, listed) = match vectors {
        [] => (0, 0, false),
        // No longer than MAX_RW, as `File::nvme` has checked.
        [one] => (one.iov_base.addr() as u64, one.iov_len as u32, false),
        // No more than IOV_MAX.
        many => (many.as_ptr().addr() as u64, many.len() as u32, true),
    };
    let whole = UringCommand {
        opcode: command.opcode,
        flags: 0,
        rsvd1: 0,
        nsid: command.nsid,
        cdw2: 0,
        cdw3: 0,
        metadata: 0,
        addr,
        metadata_len: 0,
        data_len,
        cdw10_15: command.cdw10_15,
        timeout_ms: command.timeout_ms,
        rsvd2: 0,
    };
    (whole, listed)
}

/// Operation and command of the entry for a ring. The vectors stay where they are until the command is over.
pub(crate) fn uring_cmd(command: &NvmeCommand, vectors: &[libc::iovec]) -> (u32, [u8; 80]) {
    let (whole, listed) = with_memory(command, vectors);
    let operation = match (command.queue, listed) {
        (NvmeQueue::Io, false) => URING_CMD_IO,
        (NvmeQueue::Io, true) => URING_CMD_IO_VEC,
        (NvmeQueue::Admin, false) => URING_CMD_ADMIN,
        (NvmeQueue::Admin, true) => URING_CMD_ADMIN_VEC,
    };
    let mut bytes = [0; 80];
    bytes[..size_of::<UringCommand>()].copy_from_slice(whole.as_bytes());
    (operation, bytes)
}

/// Carries a command out by ioctl: the status or a negative errno, and the result.
///
/// # Safety
/// Each vector must be valid for reads and writes of its length.
pub(crate) unsafe fn ioctl(fd: RawFd, command: &NvmeCommand, vectors: &[libc::iovec]) -> (i32, u64) {
    let (whole, listed) = with_memory(command, vectors);
    let request = match (command.queue, listed) {
        (NvmeQueue::Io, false) => IOCTL_IO64_CMD,
        (NvmeQueue::Io, true) => IOCTL_IO64_CMD_VEC,
        (NvmeQueue::Admin, false) => IOCTL_ADMIN64_CMD,
        // There is no such ioctl.
        (NvmeQueue::Admin, true) => return (-libc::EINVAL, 0),
    };
    let mut argument = Passthru64 {
        command: whole,
        result: 0,
    };
    // SAFETY: these requests read and write one `nvme_passthru_cmd64`, and through it the memory that the caller
    // vouches for; other files answer ENOTTY.
    let done = unsafe { libc::ioctl(fd, request as libc::Ioctl, &raw mut argument) };
    if done < 0 {
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        return (-errno, 0);
    }
    (done, argument.result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_the_kernel_header() {
        assert_eq!(URING_CMD_IO, 0xc048_4e80);
        assert_eq!(URING_CMD_ADMIN_VEC, 0xc048_4e83);
        assert_eq!(IOCTL_ADMIN64_CMD, 0xc050_4e47);
        assert_eq!(IOCTL_IO64_CMD_VEC, 0xc050_4e49);
    }

    #[test]
    fn a_command_is_laid_out_as_the_kernel_header_has_it() {
        let command = NvmeCommand {
            queue: NvmeQueue::Io,
            opcode: 0x7d,
            nsid: 1,
            cdw10_15: [10, 11, 12, 13, 14, 15],
            timeout_ms: 500,
        };
        let mut memory = [0u8; 32];
        let vector = |from: usize, to: usize, memory: &mut [u8]| libc::iovec {
            iov_base: memory[from..to].as_mut_ptr().cast(),
            iov_len: to - from,
        };
        let one = [vector(0, 32, &mut memory)];
        let (operation, bytes) = uring_cmd(&command, &one);
        let dword = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        assert_eq!((operation, bytes[0], dword(4)), (URING_CMD_IO, 0x7d, 1));
        assert_eq!(bytes[24..32], (one[0].iov_base.addr() as u64).to_ne_bytes());
        assert_eq!(dword(36), 32, "bytes");
        assert_eq!((dword(40), dword(60), dword(64)), (10, 15, 500));
        let two = [vector(0, 16, &mut memory), vector(16, 32, &mut memory)];
        let (operation, bytes) = uring_cmd(&command, &two);
        assert_eq!(operation, URING_CMD_IO_VEC);
        assert_eq!(bytes[24..32], (two.as_ptr().addr() as u64).to_ne_bytes());
        assert_eq!(bytes[36..40], 2_u32.to_ne_bytes(), "vectors");
    }
}
