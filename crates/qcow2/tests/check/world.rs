//! Images of our own in memory, their bytes, and what a check makes of those.

use std::ops::Range;
use std::time::SystemTime;

use zbdkit_io::{File, IoBuf};
use zbdkit_qcow2::{CheckReport, Error, Header, Layout, Options, Qcow2, Repair, create};

use crate::support::block_on;
use crate::support::crash::Disk;

/// Areas as [`zbdkit_qcow2::check`] takes them.
pub type Areas = Vec<(Range<u64>, &'static str)>;

/// A disk that holds these bytes, durably.
pub fn disk_of(bytes: &[u8]) -> Disk {
    let disk = Disk::new();
    block_on(disk.file().write(IoBuf::from_vec(bytes.to_vec()), 0)).unwrap();
    Disk::of(disk.now())
}

/// An image with data, zeros, holes, and what the layout allows besides: compressed clusters and a snapshot.
pub fn image(layout: &Layout) -> Vec<u8> {
    let disk = Disk::new();
    block_on(fill(disk.file(), layout)).unwrap();
    disk.now().to_vec()
}

async fn fill(file: File, layout: &Layout) -> Result<(), Error> {
    let header = create(&file, None, layout).await?;
    let image = Qcow2::open(file, header, Options::default()).await?;
    let c = layout.cluster_size;
    write(&image, 0..c * 3, 1).await?;
    write(&image, c * 5 + 512..c * 6 + 512, 2).await?;
    if layout.version > 2 {
        image.write_zeroes(c, c, false).await?;
        image.write_zeroes(c * 8, c, true).await?;
    }
    write(&image, layout.size - c..layout.size, 3).await?;
    if layout.refcount_bits > 1 {
        image.flush().await?;
        let now = SystemTime::UNIX_EPOCH;
        image.snapshot_create("one", now, |_, _| Ok(())).await?;
        write(&image, c * 2..c * 4, 4).await?;
    }
    if layout.refcount_bits > 4 {
        for n in 0..5 {
            let data: Vec<u8> = (0..c).map(|i| (i / 64 * n) as u8).collect();
            image.write_compressed(&data, c * (10 + n)).await?;
        }
    }
    image.flush().await?;
    image.close().await
}

async fn write(image: &Qcow2, range: Range<u64>, byte: u8) -> Result<(), Error> {
    let bytes = vec![byte; (range.end - range.start) as usize];
    image.write(IoBuf::from_vec(bytes), range.start).await
}

/// Checks a file, and repairs it.
pub async fn check_file(file: &File, areas: &Areas, repair: Repair) -> Result<CheckReport, Error> {
    let header = Header::read_for_check(file).await?;
    zbdkit_qcow2::check(file, &header, None, areas, repair, &mut |done, total| {
        assert!(done <= total);
    })
    .await
}

/// Checks bytes, and repairs them.
pub fn check(bytes: &mut Vec<u8>, areas: &Areas, repair: Repair) -> Result<CheckReport, Error> {
    let disk = disk_of(bytes);
    let report = block_on(check_file(&disk.file(), areas, repair));
    *bytes = disk.now().to_vec();
    report
}

/// The bytes of the device, as a reader sees them; `None` where it finds contradictions.
pub fn contents(bytes: &[u8]) -> Option<Vec<u8>> {
    let file = disk_of(bytes).file();
    block_on(async {
        let header = Header::read(&file).await?;
        let options = Options {
            read_only: true,
            ..Options::default()
        };
        let image = Qcow2::open(file, header, options).await?;
        let buf = IoBuf::alloc(image.size() as usize);
        image.read(buf.clone(), 0).await?;
        Ok::<_, Error>(buf.to_vec())
    })
    .ok()
}

/// A big-endian word of bytes.
pub fn word(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap())
}

/// Changes a word of bytes.
pub fn set_word(bytes: &mut [u8], at: u64, word: u64) {
    bytes[at as usize..][..8].copy_from_slice(&word.to_be_bytes());
}
