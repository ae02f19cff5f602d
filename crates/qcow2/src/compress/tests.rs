//! Compressed clusters, alone and out of images that `qemu-img convert -c` wrote.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use proptest::prelude::*;
use zbdkit_spec::qcow2 as spec;

use super::*;
use crate::header::Header;

#[cfg(feature = "zstd")]
const BOTH: [Compression; 2] = [Compression::Zlib, Compression::Zstd];
#[cfg(not(feature = "zstd"))]
const BOTH: [Compression; 1] = [Compression::Zlib];

/// Bytes that can be compressed, with repetitions at all distances up to 32 KiB and more.
fn sample(len: usize, mut seed: u32) -> Vec<u8> {
    let mut out: Vec<u8> = Vec::with_capacity(len);
    let mut random = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) as usize
    };
    while out.len() < len {
        let (run, distance) = (random() % 60 + 4, random() % (1 << (random() % 16)) + 1);
        for _ in 0..run {
            let byte = match out.len().checked_sub(distance) {
                Some(from) if run % 3 != 0 => out[from],
                _ => b"a few letters"[random() % 13],
            };
            out.push(byte);
        }
    }
    out.truncate(len);
    out
}

#[test]
fn what_was_compressed_is_what_comes_out() {
    for compression in BOTH {
        for bits in 9..=21 {
            let cluster = sample(1 << bits, bits);
            let mut packed = compress(compression, &cluster).expect("it gets smaller");
            assert!(packed.len() < cluster.len());
            packed.extend_from_slice(&[0xa5; 511]);
            let mut out = vec![0; cluster.len()];
            decompress(compression, &packed, &mut out).expect("it is whole");
            assert!(
                out == cluster,
                "{compression:?}, clusters of {} bytes",
                cluster.len()
            );
        }
    }
}

#[test]
fn what_does_not_get_smaller_is_not_compressed() {
    let noise: Vec<u8> = (0_u32..4096)
        .flat_map(|i| {
            i.wrapping_mul(2_654_435_761)
                .swap_bytes()
                .wrapping_mul(0x9e37_79b1)
                .to_le_bytes()
        })
        .collect();
    for compression in BOTH {
        for tiny in [&noise[..], &[], &[1], &[1, 2]] {
            assert_eq!(compress(compression, tiny), None);
        }
    }
}

#[test]
fn deflate_looks_back_4_kib_at_most() {
    let mut look_back_further = 0;
    for bits in 13..=17 {
        let cluster = sample(1 << bits, bits);
        let packed = compress(Compression::Zlib, &cluster).expect("it gets smaller");
        assert!(farthest_distance(&packed) <= 4096);

        let mut wide = vec![0; cluster.len()];
        let mut stream = Compress::new_with_window_bits(flate2::Compression::new(6), false, 15);
        let status = stream.compress(&cluster, &mut wide, FlushCompress::Finish);
        assert_eq!(status.ok(), Some(Status::StreamEnd));
        look_back_further += usize::from(farthest_distance(&wide) > 4096);
        let mut out = vec![0; cluster.len()];
        assert_eq!(
            decompress(Compression::Zlib, &wide, &mut out),
            Ok(()),
            "others' windows are read"
        );
    }
    assert!(
        look_back_further >= 4,
        "without the limit {look_back_further} of 5 would"
    );
}

/// The bits of a deflate stream (RFC 1951), from the lowest of the first byte on.
struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Bits<'_> {
    fn take(&mut self, count: usize) -> usize {
        let bits = self.at..self.at + count;
        self.at += count;
        bits.rev().fold(0, |value, i| {
            value << 1 | usize::from(self.bytes[i / 8] >> (i % 8) & 1)
        })
    }

    /// The next symbol of a code whose symbols have words of these lengths.
    fn symbol(&mut self, lengths: &[usize]) -> usize {
        let (mut code, mut first) = (0, 0);
        for length in 1..16 {
            code |= self.take(1);
            let symbols = || (0..lengths.len()).filter(|i| lengths[*i] == length);
            let count = symbols().count();
            if code < first + count {
                return symbols().nth(code - first).expect("counted");
            }
            (code, first) = (code << 1, (first + count) << 1);
        }
        panic!("no symbol has this code");
    }

    fn dynamic_lengths(&mut self) -> (Vec<usize>, Vec<usize>) {
        const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
        let (literals, distances, count) = (self.take(5) + 257, self.take(5) + 1, self.take(4) + 4);
        let mut code = [0; 19];
        for symbol in &ORDER[..count] {
            code[*symbol] = self.take(3);
        }
        let mut lengths = Vec::new();
        while lengths.len() < literals + distances {
            let (length, times) = match self.symbol(&code) {
                16 => (*lengths.last().expect("not the first"), 3 + self.take(2)),
                17 => (0, 3 + self.take(3)),
                18 => (0, 11 + self.take(7)),
                length => (length, 1),
            };
            lengths.resize(lengths.len() + times, length);
        }
        let distances = lengths.split_off(literals);
        (lengths, distances)
    }

    fn farthest_of_block(&mut self, literals: &[usize], distances: &[usize]) -> usize {
        let mut farthest = 0;
        loop {
            match self.symbol(literals) {
                256 => return farthest,
                symbol @ 257.. => {
                    let extra = if matches!(symbol, ..265 | 285) {
                        0
                    } else {
                        (symbol - 261) / 4
                    };
                    self.take(extra);
                    let distance = self.symbol(distances);
                    let extra = (distance / 2).saturating_sub(1);
                    let base = if distance < 4 {
                        distance
                    } else {
                        (2 + distance % 2) << extra
                    };
                    farthest = farthest.max(1 + base + self.take(extra));
                }
                _ => {}
            }
        }
    }
}

/// How far a raw deflate stream looks back.
fn farthest_distance(packed: &[u8]) -> usize {
    let mut bits = Bits { bytes: packed, at: 0 };
    let mut farthest = 0;
    loop {
        let last = bits.take(1) == 1;
        let (literals, distances) = match bits.take(2) {
            0 => {
                bits.at = bits.at.next_multiple_of(8);
                let len = bits.take(16);
                bits.at += 16 + 8 * len;
                (Vec::new(), Vec::new())
            }
            1 => {
                let fixed = [(144, 8), (112, 9), (24, 7), (8, 8)];
                (
                    fixed
                        .into_iter()
                        .flat_map(|(n, length)| vec![length; n])
                        .collect(),
                    vec![5; 30],
                )
            }
            _ => bits.dynamic_lengths(),
        };
        if !literals.is_empty() {
            farthest = farthest.max(bits.farthest_of_block(&literals, &distances));
        }
        if last {
            return farthest;
        }
    }
}

#[test]
fn streams_that_do_not_fill_the_cluster_are_refused() {
    for compression in BOTH {
        let cluster = sample(65536, 1);
        let packed = compress(compression, &cluster).expect("it gets smaller");
        let refused = |input: &[u8], len: usize| {
            let result = decompress(compression, input, &mut vec![0; len]);
            assert!(
                matches!(result, Err(Error::Corrupt(_))),
                "{compression:?}: {result:?}"
            );
        };
        refused(&packed, 65537);
        refused(&packed[..packed.len() / 2], 65536);
        refused(&[], 65536);
        refused(&[0xff; 512], 65536);
        refused(&[0; 512], 65536);
    }
}

#[test]
fn a_stream_may_be_longer_than_the_cluster_only_with_deflate() {
    let cluster = sample(65536, 1);
    let packed = compress(Compression::Zlib, &cluster).expect("it gets smaller");
    let mut out = vec![0; 40_000];
    assert_eq!(decompress(Compression::Zlib, &packed, &mut out), Ok(()));
    assert!(out == cluster[..40_000]);
}

#[cfg(feature = "zstd")]
#[test]
fn several_zstd_frames_fill_one_cluster() {
    let cluster = sample(65536, 1);
    let mut packed = Vec::new();
    for part in cluster.chunks(20_000) {
        packed.extend(compress(Compression::Zstd, part).expect("it gets smaller"));
    }
    let mut out = vec![0; 65536];
    assert_eq!(decompress(Compression::Zstd, &packed, &mut out), Ok(()));
    assert!(out == cluster);
}

/// A frame that says its window has 3.75 TiB, as large as a frame can say.
#[cfg(feature = "zstd")]
#[test]
fn a_frame_does_not_say_how_much_is_allocated() {
    let raw_block_of_one_byte = [0x09, 0, 0, b'x'];
    let frame = [&[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xff][..], &raw_block_of_one_byte].concat();
    let mut out = [0; 512];
    assert!(decompress(Compression::Zstd, &frame, &mut out).is_err());
}

#[test]
fn descriptors_say_where_their_data_lies() {
    for bits in 9..=21 {
        let most = (1 << bits) - 1;
        for offset in [0x10000, 0x101ff, 0x10200, offset_limit(bits) - most] {
            for len in [1, 2, 200.min(most), most] {
                let word = encode_descriptor(offset, len, bits);
                assert_eq!(word >> 62, 0, "the flags are not its");
                let (at, room) = descriptor(word | spec::OFLAG_COMPRESSED, bits);
                assert_eq!(at, offset);
                assert!(room >= len && (at + room).is_multiple_of(512) && room - len < 512);
            }
        }
        for word in [0, u64::MAX, u64::MAX >> 2] {
            let (at, room) = descriptor(word, bits);
            assert!(
                at < 1 << 61 && room <= 2 << bits,
                "{word:#x}: {room} bytes at {at:#x}"
            );
        }
    }
    // Byte 0x12345 and three more sectors, with clusters of 64 KiB.
    assert_eq!(descriptor(0x40c0_0000_0001_2345, 16), (0x12345, 4 * 512 - 0x145));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_bytes_are_decompressed_or_refused(
        mut input in prop::collection::vec(any::<u8>(), 0..2048),
        zstd: bool,
        magic: bool,
        bits in 9_u32..=16,
    ) {
        let compression = if zstd { BOTH[BOTH.len() - 1] } else { Compression::Zlib };
        if magic && input.len() > 4 {
            input[..4].copy_from_slice(&[0x28, 0xb5, 0x2f, 0xfd]);
        }
        let _ = decompress(compression, &input, &mut vec![0; 1 << bits]);
    }

    #[test]
    fn changed_streams_are_decompressed_or_refused(
        seed: u32,
        changes in prop::collection::vec((any::<usize>(), any::<u8>()), 1..8),
        zstd: bool,
        bits in 9_u32..=16,
    ) {
        let compression = if zstd { BOTH[BOTH.len() - 1] } else { Compression::Zlib };
        if let Some(mut packed) = compress(compression, &sample(1 << bits, seed)) {
            for (at, value) in changes {
                let at = at % packed.len();
                packed[at] = value;
            }
            let _ = decompress(compression, &packed, &mut vec![0; 1 << bits]);
        }
    }
}

/// `qemu-img` out of the rig's tree, None where it is not there.
fn qemu_img(arguments: &[&str]) -> Option<()> {
    let tree = Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .map(|ancestor| ancestor.join("target/rig/qemu"))
        .find(|tree| tree.join("usr/bin/qemu-img").is_file())?;
    let libraries = tree.join("usr/lib/x86_64-linux-gnu");
    let status = Command::new(tree.join("usr/lib64/ld-linux-x86-64.so.2"))
        .args(["--inhibit-cache", "--library-path"])
        .arg(&libraries)
        .args(["--argv0", "qemu-img"])
        .arg(tree.join("usr/bin/qemu-img"))
        .args(arguments)
        .env("QEMU_MODULE_DIR", libraries.join("qemu"))
        .stdout(Stdio::null())
        .status()
        .expect("qemu-img starts");
    assert!(status.success(), "{arguments:?}");
    Some(())
}

/// A compressed image of `content` by QEMU; None where QEMU is not there.
fn qemu_compresses(directory: &Path, content: &[u8], compression: Compression, bits: u32) -> Option<PathBuf> {
    let (raw, image) = (directory.join("raw"), directory.join("image"));
    std::fs::write(&raw, content).expect("written");
    let _ = std::fs::remove_file(&image);
    let kind = match compression {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    };
    let options = format!("cluster_size={},compression_type={kind}", 1 << bits);
    let text = |path: &Path| path.to_str().expect("a path of ours").to_owned();
    let (from, to) = (text(&raw), text(&image));
    qemu_img(&[
        "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, &from, &to,
    ])?;
    Some(image)
}

fn word(image: &[u8], at: u64) -> u64 {
    let at = at as usize;
    u64::from_be_bytes(image[at..at + 8].try_into().expect("8 bytes"))
}

/// The places of the L2 entries of each cluster of the device.
fn entries(image: &[u8], header: &Header) -> Vec<u64> {
    let clusters = header.size.div_ceil(header.cluster_size());
    let place = |cluster| {
        let l1 = word(image, header.l1_offset + cluster / header.l2_entries() * 8);
        (l1 & spec::L1E_OFFSET_MASK) + cluster % header.l2_entries() * 8
    };
    (0..clusters).map(place).collect()
}

#[test]
fn what_qemu_compressed_comes_out() {
    let directory = tempfile::TempDir::new().expect("a directory");
    for compression in BOTH {
        for bits in [9, 12, 14, 16, 18, 21] {
            let content = sample((8 << bits).min(4 << 20), bits);
            let Some(path) = qemu_compresses(directory.path(), &content, compression, bits) else {
                return;
            };
            let image = std::fs::read(&path).expect("read");
            let header = Header::decode(&image, image.len() as u64).expect("an image");
            let mut compressed = 0;
            for (entry, part) in entries(&image, &header)
                .into_iter()
                .zip(content.chunks(1 << bits))
            {
                let entry = word(&image, entry);
                if entry & spec::OFLAG_COMPRESSED == 0 {
                    continue;
                }
                compressed += 1;
                let (at, room) = descriptor(entry, bits);
                let end = (at + room).min(image.len() as u64) as usize;
                let mut out = vec![0; 1 << bits];
                decompress(compression, &image[at as usize..end], &mut out).expect("it is whole");
                assert!(
                    out[..part.len()] == *part,
                    "{compression:?}, 2^{bits}, at {at:#x}"
                );
            }
            assert!(compressed >= 2, "{compression:?}, 2^{bits}: {compressed}");
        }
    }
}

#[test]
fn qemu_reads_what_was_compressed_here() {
    let directory = tempfile::TempDir::new().expect("a directory");
    for compression in BOTH {
        for bits in [9, 12, 14, 16, 18, 21] {
            let content = sample((8 << bits).min(4 << 20), bits);
            let Some(path) = qemu_compresses(directory.path(), &content, compression, bits) else {
                return;
            };
            // Each cluster that QEMU compressed is moved to the end of the file, in our bytes, right behind the last.
            let mut image = std::fs::read(&path).expect("read");
            let header = Header::decode(&image, image.len() as u64).expect("an image");
            let mut changed = 0;
            for (entry, part) in entries(&image, &header)
                .into_iter()
                .zip(content.chunks(1 << bits))
            {
                let mut cluster = part.to_vec();
                cluster.resize(1 << bits, 0);
                let Some(packed) = compress(compression, &cluster) else {
                    continue;
                };
                let new = encode_descriptor(image.len() as u64, packed.len() as u64, bits);
                image[entry as usize..][..8].copy_from_slice(&(new | spec::OFLAG_COMPRESSED).to_be_bytes());
                image.extend_from_slice(&packed);
                changed += 1;
            }
            assert!(changed >= 2);
            image.resize(image.len().next_multiple_of(512), 0);
            std::fs::write(&path, image).expect("written");
            let raw = path.with_file_name("raw");
            let names = [&raw, &path].map(|path| path.to_str().expect("a path of ours"));
            qemu_img(&["compare", "-f", "raw", "-F", "qcow2", names[0], names[1]]).expect("QEMU is there");
        }
    }
}
