//! Compressed clusters: their descriptors in L2 entries, and their bytes.
//!
//! A compressed cluster lies anywhere in the file, in units of bytes for its beginning and of 512 bytes for its end, so
//! what is read has a foreign end: decompression ends when the cluster is full.
//!
//! Deflate has no header and, when written, a window of 4 KiB: readers need not keep more of what they produced. QEMU
//! inflates a cluster in one piece and so never looks at its window; a reader with a piece less may.

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};

use crate::error::Error;
use crate::header::Compression;

/// Bytes in a sector, the unit in which descriptors count.
const SECTOR: u64 = zbdkit_spec::qcow2::COMPRESSED_SECTOR;

/// The window of deflate as it is written: distances are below 1 << this bytes.
const WINDOW_BITS: u8 = 12;

/// How much the writer of deflate tries; QEMU's.
const ZLIB_LEVEL: u32 = 6;

/// How much the writer of zstd tries; QEMU's.
#[cfg(feature = "zstd")]
const ZSTD_LEVEL: i32 = 3;

/// Bits of a descriptor that tell where the data begins.
fn offset_bits(cluster_bits: u32) -> u32 {
    62 - (cluster_bits - 8)
}

/// Where the data of a compressed cluster begins, and how many bytes it has at most: to the end of its last sector,
/// which other data may share. Fits into 64 bits whatever the word says, and may lie past the end of the file.
pub(crate) fn descriptor(word: u64, cluster_bits: u32) -> (u64, u64) {
    let bits = offset_bits(cluster_bits);
    let offset = word & ((1 << bits) - 1);
    let more_sectors = (word >> bits) & ((1 << (62 - bits)) - 1);
    (offset, (more_sectors + 1) * SECTOR - offset % SECTOR)
}

/// The clusters of the file that the data of a compressed cluster touches.
pub(crate) fn clusters(word: u64, cluster_bits: u32) -> std::ops::Range<u64> {
    let (offset, len) = descriptor(word, cluster_bits);
    offset >> cluster_bits..((offset + len - 1) >> cluster_bits) + 1
}

/// The descriptor for `len` bytes (at least 1, less than a cluster) at `offset`, without the flag. None past
/// [`offset_limit`].
pub(crate) fn encode_descriptor(offset: u64, len: u64, cluster_bits: u32) -> u64 {
    debug_assert!(len > 0 && len < 1 << cluster_bits && offset + len <= offset_limit(cluster_bits));
    let more_sectors = (offset + len - 1) / SECTOR - offset / SECTOR;
    offset | more_sectors << offset_bits(cluster_bits)
}

/// The byte of the file up to which compressed data can lie: 512 TiB with clusters of 2 MiB, 64 PiB with those of up to
/// 16 KiB.
pub(crate) fn offset_limit(cluster_bits: u32) -> u64 {
    (1 << offset_bits(cluster_bits)).min(zbdkit_spec::qcow2::MAX_CLUSTER_OFFSET)
}

/// Fills `out`, one cluster, from `input`, which may end in bytes that do not belong to it.
pub(crate) fn decompress(compression: Compression, input: &[u8], out: &mut [u8]) -> Result<(), Error> {
    let whole = match compression {
        Compression::Zlib => inflate(input, out),
        Compression::Zstd => unzstd(input, out)?,
    };
    if whole {
        Ok(())
    } else {
        let len = out.len();
        Err(Error::Corrupt(format!(
            "the data of a compressed cluster does not make up its {len} bytes"
        )))
    }
}

/// The bytes of one whole cluster compressed, None if they do not get fewer. Without the feature `zstd` no cluster is
/// compressed with it.
pub fn compress(compression: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    if cluster.len() < 2 {
        return None;
    }
    match compression {
        Compression::Zlib => deflate(cluster),
        Compression::Zstd => zstd(cluster),
    }
}

/// Whether the stream fills `out`. It need not end there.
fn inflate(input: &[u8], out: &mut [u8]) -> bool {
    let mut stream = Decompress::new(false);
    loop {
        let (read, written) = (stream.total_in(), stream.total_out());
        let (from, to) = (&input[read as usize..], &mut out[written as usize..]);
        let status = stream.decompress(from, to, FlushDecompress::Finish);
        let full = stream.total_out() == out.len() as u64;
        match status {
            Err(_) => return false,
            Ok(Status::StreamEnd) => return full,
            Ok(Status::Ok | Status::BufError) if full => return true,
            Ok(Status::Ok | Status::BufError) => {
                if (stream.total_in(), stream.total_out()) == (read, written) {
                    return false;
                }
            }
        }
    }
}

fn deflate(cluster: &[u8]) -> Option<Vec<u8>> {
    let level = flate2::Compression::new(ZLIB_LEVEL);
    let mut stream = Compress::new_with_window_bits(level, false, WINDOW_BITS);
    let mut out = vec![0; cluster.len() - 1];
    match stream.compress(cluster, &mut out, FlushCompress::Finish) {
        Ok(Status::StreamEnd) => {
            out.truncate(stream.total_out() as usize);
            Some(out)
        }
        _ => None,
    }
}

/// Whether the frames fill `out`. Frames are taken one by one, each into its place: that way no window is allocated,
/// which would be as large as the frame says.
#[cfg(feature = "zstd")]
fn unzstd(mut input: &[u8], out: &mut [u8]) -> Result<bool, Error> {
    let mut context = zstd::zstd_safe::DCtx::create();
    let mut filled = 0;
    while filled < out.len() {
        let Ok(len) = zstd::zstd_safe::find_frame_compressed_size(input) else {
            return Ok(false);
        };
        let Some((frame, rest)) = input.split_at_checked(len) else {
            return Ok(false);
        };
        match context.decompress(&mut out[filled..], frame) {
            Ok(written) => filled += written,
            Err(_) => return Ok(false),
        }
        input = rest;
    }
    Ok(true)
}

#[cfg(feature = "zstd")]
fn zstd(cluster: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0; cluster.len() - 1];
    let len = zstd::zstd_safe::compress(&mut out[..], cluster, ZSTD_LEVEL).ok()?;
    out.truncate(len);
    Some(out)
}

#[cfg(not(feature = "zstd"))]
fn unzstd(_: &[u8], _: &mut [u8]) -> Result<bool, Error> {
    Err(Error::Unsupported(
        "clusters are compressed with zstd, which this program was built without".into(),
    ))
}

#[cfg(not(feature = "zstd"))]
fn zstd(_: &[u8]) -> Option<Vec<u8>> {
    None
}

#[cfg(test)]
#[path = "compress/tests.rs"]
mod tests;
