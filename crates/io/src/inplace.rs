//! Transfers made in place, for files that are memory (see [`file`](crate::file)).

#![expect(unsafe_code, reason = "reads and writes memory shared with a guest")]

use std::io;

use crate::buf::IoBuf;
use crate::runtime::{Kind, Request, advance};
use crate::sys::{self, MAX_RW};

/// Segments handed to the kernel at once.
const BATCH: usize = 64;

/// Carries out a read or a write wholly, with the meaning that it has in the reactor.
pub(crate) fn transfer(request: Request) -> io::Result<()> {
    let mut done = 0;
    loop {
        let result = step(&request, done);
        if result == -libc::EINTR || result == -libc::EAGAIN {
            continue;
        }
        match advance(&mut done, &request, result) {
            Some(0) => return Ok(()),
            Some(error) => return Err(io::Error::from_raw_os_error(-error)),
            None => {}
        }
    }
}

fn step(request: &Request, done: usize) -> i32 {
    let Some(buf) = &request.buf else { return 0 };
    let offset = request.offset + done as u64;
    if let Some(piece) = buf.single_from(done) {
        let (memory, len) = (piece.as_ptr(), piece.len().min(MAX_RW));
        return match request.kind {
            // SAFETY: the piece belongs to `buf`, which is alive throughout the call.
            Kind::Read => unsafe { sys::pread(request.fd, memory, len, offset) },
            // SAFETY: likewise.
            _ => unsafe { sys::pwrite(request.fd, memory, len, offset) },
        };
    }
    let mut vectors = [libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    }; BATCH];
    let count = fill(buf, done, &mut vectors);
    match request.kind {
        // SAFETY: the vectors are pieces of `buf`, which is alive throughout the call.
        Kind::Read => unsafe { sys::preadv(request.fd, &vectors[..count], offset) },
        // SAFETY: likewise.
        _ => unsafe { sys::pwritev(request.fd, &vectors[..count], offset) },
    }
}

fn fill(buf: &IoBuf, done: usize, vectors: &mut [libc::iovec; BATCH]) -> usize {
    let (mut count, mut room) = (0, MAX_RW);
    buf.pieces_from(done, BATCH, |piece| {
        let len = piece.len().min(room);
        room -= len;
        vectors[count] = libc::iovec {
            iov_base: piece.as_ptr().cast(),
            iov_len: len,
        };
        count += 1;
    });
    count
}
