//! Wire and on-disk types, and nothing else: no I/O, no policy, no unsafe code. Names and sections are the
//! specifications' own.

#![no_std]
#![forbid(unsafe_code)]

pub mod qcow2;
pub mod sidecar;
pub mod vfio_user;
pub mod virtio_blk;
