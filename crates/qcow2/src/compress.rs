//! Compressed clusters.

use crate::error::Error;
use crate::header::Compression;

pub(crate) fn descriptor(word: u64, cluster_bits: u32) -> (u64, u64) {
    let bits = 62 - (cluster_bits - 8);
    let offset = word & ((1 << bits) - 1);
    let sectors = (word & !(3 << 62)) >> bits;
    (offset, (sectors + 1) * 512 - offset % 512)
}

pub(crate) fn encode_descriptor(offset: u64, len: u64, cluster_bits: u32) -> u64 {
    let sectors = (offset + len - 1) / 512 - offset / 512;
    offset | sectors << (62 - (cluster_bits - 8))
}

pub(crate) fn decompress(_: Compression, _: &[u8], _: &mut [u8]) -> Result<(), Error> {
    Err(Error::Unsupported("compression".into()))
}

pub(crate) fn compress(_: Compression, _: &[u8]) -> Option<Vec<u8>> {
    None
}
