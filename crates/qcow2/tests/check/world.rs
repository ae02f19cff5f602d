//! Images of our own in memory, their bytes, and what a check makes of those.

use std::ops::Range;
use std::time::SystemTime;

use zbdkit_io::{File, IoBuf};
use zbdkit_qcow2::{CheckReport, Error, Header, Layout, Options, Qcow2, Repair, create};

use super::{Class, Counts};

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

/// The flag of entries whose cluster may be written in place.
pub const COPIED: u64 = 1 << 63;
/// The bits of an entry that hold an offset.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// A layout with a device of 100 clusters.
pub fn layout(cluster_bits: u32, refcount_bits: u32) -> Layout {
    Layout {
        size: (1 << cluster_bits) * 100,
        cluster_size: 1 << cluster_bits,
        refcount_bits,
        ..Layout::default()
    }
}

/// An image and where its parts lie.
pub struct Image {
    pub bytes: Vec<u8>,
    pub header: Header,
}

impl Image {
    pub fn new(layout: &Layout) -> Image {
        let bytes = image(layout);
        let header = Header::decode(&bytes, bytes.len() as u64).unwrap();
        Image { bytes, header }
    }

    pub fn plain() -> Image {
        Image::new(&layout(12, 16))
    }

    pub fn cluster(&self) -> u64 {
        self.header.cluster_size()
    }

    /// Where the first active L2 table lies.
    pub fn l2(&self) -> u64 {
        word(&self.bytes, self.header.l1_offset) & OFFSET
    }

    pub fn entry(&self, cluster: u64) -> u64 {
        self.entry_at(self.header.l1_offset, cluster)
    }

    pub fn set_entry(&mut self, cluster: u64, entry: u64) {
        self.set_entry_at(self.header.l1_offset, cluster, entry);
    }

    pub fn entry_at(&self, l1: u64, cluster: u64) -> u64 {
        word(&self.bytes, (word(&self.bytes, l1) & OFFSET) + cluster * 8)
    }

    pub fn set_entry_at(&mut self, l1: u64, cluster: u64, entry: u64) {
        let at = (word(&self.bytes, l1) & OFFSET) + cluster * 8;
        set_word(&mut self.bytes, at, entry);
    }

    pub fn block(&self) -> u64 {
        word(&self.bytes, self.header.refcount_table_offset)
    }

    /// A cluster's refcount of 16 bits.
    pub fn count(&self, cluster: u64) -> u16 {
        let at = (self.block() + cluster * 2) as usize;
        u16::from_be_bytes(self.bytes[at..at + 2].try_into().unwrap())
    }

    pub fn set_count(&mut self, cluster: u64, count: u16) {
        let at = (self.block() + cluster * 2) as usize;
        self.bytes[at..at + 2].copy_from_slice(&count.to_be_bytes());
    }

    pub fn set_incompatible(&mut self, bits: u64) {
        set_word(&mut self.bytes, 72, bits);
    }

    pub fn incompatible(&self) -> u64 {
        word(&self.bytes, 72)
    }

    pub fn check(&mut self, repair: Repair) -> CheckReport {
        self.check_with(&Areas::new(), repair)
    }

    pub fn check_with(&mut self, areas: &Areas, repair: Repair) -> CheckReport {
        check(&mut self.bytes, areas, repair).unwrap()
    }

    /// Expects such a finding, and that a repair of all leaves this.
    pub fn expect(&mut self, class: Class, said: &str, after: Class) {
        let before = contents(&self.bytes);
        let report = self.check(Repair::None);
        assert_eq!(Counts::from(&report).class(), class, "{report:?}");
        assert!(
            report.messages.iter().any(|line| line.contains(said)),
            "{report:?}"
        );
        let report = self.check(Repair::All);
        assert_eq!(Counts::from(&report).class(), after, "{report:?}");
        let again = self.check(Repair::None);
        assert_eq!(Counts::from(&again), Counts::from(&report));
        if after == Class::Clean && before.is_some() {
            assert!(contents(&self.bytes) == before, "a repair changed what is read");
        }
    }
}
