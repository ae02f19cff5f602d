//! Valid images with all of the format's features, and forgeries of them.

use std::time::UNIX_EPOCH;

use zbdkit_io::IoBuf;
use zbdkit_qcow2::{Compression, Header, Layout, Options, Qcow2, create};

use super::exercise::Subject;
use super::memory::{Below, Memory};
use super::random::Rng;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// A valid image with something of everything in it.
pub async fn valid(rng: &mut Rng) -> Subject {
    let extended = rng.one_in(4);
    let version = if !extended && rng.one_in(5) { 2 } else { 3 };
    let bits = if extended {
        14 + rng.below(3)
    } else {
        9 + rng.below(6)
    };
    let data_file = version == 3 && rng.one_in(6);
    let layout = Layout {
        version,
        size: 512 * (1 + rng.below(1600)),
        cluster_size: 1 << bits,
        refcount_bits: if version == 2 { 16 } else { 1 << rng.below(7) },
        extended_l2: extended,
        compression: match version == 3 && rng.one_in(2) {
            true => Compression::Zstd,
            false => Compression::Zlib,
        },
        lazy_refcounts: version == 3 && rng.one_in(4),
        backing: rng.one_in(3).then(|| ("below.raw".into(), Some("raw".into()))),
        data_file: data_file.then(|| "image.data".into()),
        data_file_raw: false,
        ..Layout::default()
    };
    let subject = Subject {
        image: Memory::new(&[]),
        data: Memory::device(&[]),
    };
    let (file, data) = (subject.image.file(), data_file.then(|| subject.data.file()));
    let header = create(&file, data.as_ref(), &layout).await.unwrap();
    let options = Options {
        data_file: data,
        backing: match header.backing_file {
            Some(_) => Some(std::sync::Arc::new(Below(100 << 10))),
            None => None,
        },
        ..Options::default()
    };
    let image = Qcow2::open(file, header, options).await.unwrap();
    for round in 0..2 + rng.below(3) {
        fill(&image, &layout, rng).await;
        if !data_file && rng.one_in(2) {
            let _ = image
                .snapshot_create(&format!("s{round}"), UNIX_EPOCH, |_, _| Ok(()))
                .await;
        }
    }
    if version == 3 && rng.one_in(4) {
        zones(&image).await;
    }
    image.close().await.unwrap();
    subject
}

async fn fill(image: &Qcow2, layout: &Layout, rng: &mut Rng) {
    for _ in 0..rng.below(12) {
        let start = 512 * rng.below(layout.size / 512);
        let end = (start + 512 * (1 + rng.below(64))).min(layout.size);
        let len = end - start;
        let cluster = start / layout.cluster_size * layout.cluster_size;
        match rng.below(6) {
            0 if layout.data_file.is_none() => {
                let len = layout.cluster_size.min(layout.size - cluster);
                let bytes = vec![rng.word() as u8; len as usize];
                image.write_compressed(&bytes, cluster).await.unwrap();
            }
            1 => image.write_zeroes(start, len, rng.one_in(2)).await.unwrap(),
            2 => image.discard(start, len).await.unwrap(),
            _ => {
                let buf = IoBuf::alloc(len as usize);
                buf.fill(0..len as usize, rng.word() as u8);
                image.write(buf, start).await.unwrap();
            }
        }
    }
}

/// The extension of zones, with its table, and ours.
async fn zones(image: &Qcow2) {
    let table = image.allocate_area(8 * 4).await.unwrap();
    let area = image.allocate_area(3 * 4096).await.unwrap();
    let mut zoned = vec![0; 44];
    zoned[0] = 1;
    zoned[4..8].copy_from_slice(&4u32.to_be_bytes());
    zoned[8..16].copy_from_slice(&(1u64 << 18).to_be_bytes());
    zoned[16..24].copy_from_slice(&(1u64 << 18).to_be_bytes());
    zoned[24..32].copy_from_slice(&table.to_be_bytes());
    let mut ours = vec![0; 56];
    ours[3] = 1;
    ours[8..16].copy_from_slice(&area.to_be_bytes());
    ours[16..24].copy_from_slice(&(3u64 * 4096).to_be_bytes());
    let changed = image.update_header(|header| {
        header.incompatible |= 1 << 5;
        header.autoclear |= 1 << 40;
        header.set_extension(0x007a_6264, Some(zoned));
        header.set_extension(0x7a62_646b, Some(ours));
        Ok(())
    });
    changed.await.unwrap();
}

/// Places of an image that mean something: offset and width in bytes.
pub async fn places(image: &Memory) -> Vec<(u64, u64)> {
    let file = image.file();
    let mut places: Vec<(u64, u64)> = (4..112).step_by(4).map(|at| (at, 4)).collect();
    places.extend((8..112).step_by(8).map(|at| (at, 8)));
    let Ok(header) = Header::read(&file).await else {
        return places;
    };
    // Extensions and names.
    places.extend((112..512).step_by(4).map(|at| (at, 4)));
    let word = |at| u64::from_be_bytes(image.read(at, 8).try_into().unwrap());
    let table = |places: &mut Vec<(u64, u64)>, offset: u64, bytes: u64| {
        places.extend((offset..offset + bytes.min(512)).step_by(8).map(|at| (at, 8)));
    };
    let mut l1s = vec![(header.l1_offset, u64::from(header.l1_size))];
    let mut at = header.snapshots_offset;
    for _ in 0..header.nb_snapshots {
        table(&mut places, at, 64);
        l1s.push((word(at), word(at + 8) >> 32));
        let lens = word(at + 8) as u32;
        let extra = word(at + 32) as u32;
        at += (40 + u64::from(extra) + u64::from(lens >> 16) + u64::from(lens & 0xffff)).next_multiple_of(8);
    }
    for (offset, entries) in l1s {
        table(&mut places, offset, 8 * entries);
        for index in 0..entries.min(64) {
            let l2 = word(offset + 8 * index) & OFFSET;
            if l2 != 0 {
                table(&mut places, l2, header.cluster_size());
            }
        }
    }
    table(&mut places, header.refcount_table_offset, 64);
    for index in 0..4 {
        let block = word(header.refcount_table_offset + 8 * index) & OFFSET;
        if block != 0 {
            table(&mut places, block, 128);
        }
    }
    for magic in [0x007a_6264, 0x7a62_646b] {
        let at = if magic == 0x007a_6264 { 24..32 } else { 8..16 };
        if let Some(offset) = header.extension(magic).and_then(|data| data.get(at)) {
            table(&mut places, u64::from_be_bytes(offset.try_into().unwrap()), 512);
        }
    }
    places
}

/// Changes some places of an image to something that means trouble.
pub async fn forge(image: &Memory, rng: &mut Rng) {
    let places = places(image).await;
    let cluster = 1u64 << (image.read(23, 1)[0] & 31);
    for _ in 0..1 + rng.below(4) {
        let (at, width) = places[rng.below(places.len() as u64) as usize];
        let old = image.read(at, width as usize);
        let old = old.iter().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
        let (other, _) = places[rng.below(places.len() as u64) as usize];
        let end = image.len();
        let new = match rng.below(16) {
            0 => 0,
            1 => u64::MAX,
            2 => old ^ (1 << rng.below(64)),
            3 => old.wrapping_add(rng.below(5)).wrapping_sub(2),
            4 => (other / cluster * cluster) | 1 << 63,
            5 => other / cluster * cluster,
            6 => (end / cluster * cluster) | 1 << 63,
            7 => (end.wrapping_mul(rng.below(1000)) / cluster * cluster) | 1 << 63,
            8 => cluster.wrapping_mul(rng.word()) & OFFSET | 1 << 63,
            9 => 1 << 62 | rng.word() >> 2 >> rng.below(62),
            10 => {
                let word = image.read(other, 8);
                u64::from_be_bytes(word.try_into().unwrap())
            }
            11 => old.wrapping_mul(2),
            12 => old ^ (1 << 63),
            13 => rng.below(256),
            14 => 0xffff_ffff >> rng.below(32),
            _ => rng.word() >> rng.below(64),
        };
        image.write(at, &new.to_be_bytes()[8 - width as usize..]);
    }
    match rng.below(12) {
        0 => image.resize(rng.below(image.len() + 1)),
        1 => noise(image, rng),
        _ => {}
    }
}

/// Random bytes in random places.
pub fn noise(image: &Memory, rng: &mut Rng) {
    for _ in 0..1 + rng.below(12) {
        let at = rng.below(image.len().max(1));
        let bytes: Vec<u8> = (0..1 + rng.below(16)).map(|_| rng.word() as u8).collect();
        image.write(at, &bytes);
    }
}
