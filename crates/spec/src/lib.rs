//! Wire and on-disk types.
#![no_std]
#![forbid(unsafe_code)]

pub mod virtio_blk;
