//! New images.
//!
//! A new image has its clusters in the order header, refcount table, refcount blocks, L1 table, as one that `qemu-img`
//! made. The header is written last, when all else is durable: a file is no image before it is a whole one.

use std::io;

use zbdkit_io::{File, IoBuf};
use zbdkit_spec::qcow2 as spec;

use crate::error::Error;
use crate::header::{Compression, Header};

/// What of a new image gets its space at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The mapping.
    Metadata,
    /// The mapping, and the data's space.
    Falloc,
    /// The mapping, and data of written zeros.
    Full,
}

/// What a new image is like. The default is QEMU's, and a device of no bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// 2 or 3.
    pub version: u32,
    /// Size of the device, bytes, a multiple of 512.
    pub size: u64,
    /// Bytes, a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Width of a refcount, a power of two from 1 to 64.
    pub refcount_bits: u32,
    /// Clusters in 32 parts of their own.
    pub extended_l2: bool,
    /// Of compressed clusters.
    pub compression: Compression,
    /// The compatible feature: refcounts may be late.
    pub lazy_refcounts: bool,
    /// Name and format of the backing image.
    pub backing: Option<(String, Option<String>)>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// The external data file is to be a raw image of its own.
    pub data_file_raw: bool,
    /// What gets its space at once.
    pub preallocation: Preallocation,
}

impl Default for Layout {
    fn default() -> Layout {
        Layout {
            version: 3,
            size: 0,
            cluster_size: 65536,
            refcount_bits: 16,
            extended_l2: false,
            compression: Compression::Zlib,
            lazy_refcounts: false,
            backing: None,
            data_file: None,
            data_file_raw: false,
            preallocation: Preallocation::Off,
        }
    }
}

/// Sizes of a device are multiples of this, bytes.
const SECTOR: u64 = 512;

/// Clusters of which only the beginning is used are written to this multiple, bytes.
const PAGE: u64 = 4096;

impl Layout {
    /// Refuses what no image can be, in QEMU's words where it has some.
    pub fn check(&self) -> Result<(), Error> {
        self.check_sizes()?;
        self.check_version()?;
        self.check_files()?;
        let l1 = self.header()?.l1_entries_for(self.size);
        if self.size > i64::MAX as u64 || l1 > spec::MAX_L1_BYTES / 8 {
            return refused(
                "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
            );
        }
        Ok(())
    }

    /// What is to be given its space: an external raw image is mapped wholly from the start, or there would be parts
    /// of it that the image has for zeros and a reader of the data file has not.
    pub fn effective_preallocation(&self) -> Preallocation {
        match self.preallocation {
            Preallocation::Off if self.data_file_raw => Preallocation::Metadata,
            other => other,
        }
    }

    fn check_sizes(&self) -> Result<(), Error> {
        let clusters = 1 << spec::MIN_CLUSTER_BITS..=1 << spec::MAX_CLUSTER_BITS;
        if !self.cluster_size.is_power_of_two() || !clusters.contains(&self.cluster_size) {
            return refused(format!(
                "Cluster size must be a power of two between {} and {}k",
                clusters.start(),
                clusters.end() >> 10
            ));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return refused("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if !self.size.is_multiple_of(SECTOR) {
            return refused("Image size must be a multiple of 512 bytes");
        }
        if self.extended_l2 && self.cluster_size < 1 << spec::MIN_EXTENDED_CLUSTER_BITS {
            return refused(format!(
                "Extended L2 entries are only supported with cluster sizes of at least {} bytes",
                1 << spec::MIN_EXTENDED_CLUSTER_BITS
            ));
        }
        Ok(())
    }

    fn check_version(&self) -> Result<(), Error> {
        if !(2..=3).contains(&self.version) {
            return refused(format!(
                "qcow2 version {} does not exist: 2 and 3 do",
                self.version
            ));
        }
        let needs_3 = [
            (
                self.refcount_bits != 16,
                "Different refcount widths than 16 bits require compatibility level 1.1 or above",
            ),
            (
                self.lazy_refcounts,
                "Lazy refcounts only supported with compatibility level 1.1 and above",
            ),
            (
                self.extended_l2,
                "Extended L2 entries are only supported with compatibility level 1.1 and above",
            ),
            (
                self.data_file.is_some(),
                "External data files are only supported with compatibility level 1.1 and above",
            ),
            (
                self.compression != Compression::Zlib,
                "Non-zlib compression type is only supported with compatibility level 1.1 and above",
            ),
        ];
        match needs_3.iter().find(|(wanted, _)| *wanted && self.version < 3) {
            Some((_, message)) => refused(format!("{message} (use version=v3 or greater)")),
            None => Ok(()),
        }
    }

    fn check_files(&self) -> Result<(), Error> {
        if self.data_file_raw && self.data_file.is_none() {
            return refused("data-file-raw requires data-file");
        }
        if self.data_file_raw && self.backing.is_some() {
            return refused("Backing file and data-file-raw cannot be used at the same time");
        }
        if self.backing.is_some() && self.preallocation != Preallocation::Off && !self.extended_l2 {
            return refused(
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            );
        }
        if let Some((name, format)) = &self.backing {
            check_name("backing file", name, spec::MAX_BACKING_NAME)?;
            if let Some(format) = format {
                check_name("backing format", format, spec::MAX_BACKING_FORMAT)?;
            }
        }
        match &self.data_file {
            Some(name) => check_name("data file", name, spec::MAX_BACKING_NAME),
            None => Ok(()),
        }
    }

    /// The header that says all this, without tables. For sizes that were checked.
    fn header(&self) -> Result<Header, Error> {
        let mut header = Header::new(self.cluster_size.trailing_zeros());
        header.version = self.version;
        header.size = self.size;
        header.refcount_order = self.refcount_bits.trailing_zeros();
        header.compression = self.compression;
        let bits = [
            (self.data_file.is_some(), spec::INCOMPAT_DATA_FILE),
            (self.compression != Compression::Zlib, spec::INCOMPAT_COMPRESSION),
            (self.extended_l2, spec::INCOMPAT_EXTENDED_L2),
        ];
        for (_, bit) in bits.iter().filter(|(wanted, _)| *wanted) {
            header.incompatible |= bit;
        }
        if self.lazy_refcounts {
            header.compatible |= spec::COMPAT_LAZY_REFCOUNTS;
        }
        if self.data_file_raw {
            header.autoclear |= spec::AUTOCLEAR_DATA_FILE_RAW;
        }
        if let Some((name, format)) = &self.backing {
            header.backing_file = Some(name.clone());
            let format = format.as_ref().map(|format| format.clone().into_bytes());
            header.set_extension(spec::EXT_BACKING_FORMAT, format);
        }
        let name = self.data_file.as_ref().map(|name| name.clone().into_bytes());
        header.set_extension(spec::EXT_DATA_FILE, name);
        header.encode()?;
        Ok(header)
    }
}

fn check_name(what: &str, name: &str, most: u32) -> Result<(), Error> {
    if name.is_empty() {
        return refused(format!("Expected {what} name, got empty string"));
    }
    if name.contains('\0') {
        return refused(format!("the {what} name has a NUL in it"));
    }
    if name.len() > most as usize {
        let len = name.len();
        return refused(format!(
            "the {what} name has {len} bytes, at most {most} are possible"
        ));
    }
    Ok(())
}

/// Makes an image in an empty file (or on a block device), synced. The external data file, if `layout` names one, is
/// made as long as the device where it is shorter. Nothing is preallocated: that is done on the open image.
pub async fn create(file: &File, data: Option<&File>, layout: &Layout) -> Result<Header, Error> {
    create_with(file, data, layout, |_| ()).await
}

/// The same with `also` changing the header before it is written: an image that is not whole without what comes next can
/// say so from the first moment.
pub async fn create_with(
    file: &File,
    data: Option<&File>,
    layout: &Layout,
    also: impl FnOnce(&mut Header),
) -> Result<Header, Error> {
    layout.check()?;
    if data.is_some() != layout.data_file.is_some() {
        return refused("an external data file needs both its name in the image and the file");
    }
    let align = u64::from(file.direct_align().unwrap_or(1));
    if align > layout.cluster_size {
        return refused(format!(
            "clusters of {} bytes are smaller than what direct I/O on this file can write ({align} bytes)",
            layout.cluster_size
        ));
    }
    let mut header = layout.header()?;
    let places = Places::of(&header);
    places.tell(&mut header);
    also(&mut header);

    let creating = |e: io::Error| Error::io("creating the image", &e);
    if let Some(data) = data
        && data.len().map_err(creating)? < layout.size
    {
        data.set_len(layout.size).map_err(creating)?;
    }
    make_room(file, places.end() << header.cluster_bits)
        .await
        .map_err(creating)?;
    let tables = places.refcount_tables(&header);
    write_beginning(file, tables.table, places.reftable << header.cluster_bits)
        .await
        .map_err(creating)?;
    for (i, block) in tables.blocks.into_iter().enumerate() {
        let at = (places.blocks + i as u64) << header.cluster_bits;
        write_beginning(file, block, at).await.map_err(creating)?;
    }
    file.sync().await.map_err(creating)?;
    write_beginning(file, header.encode()?, 0)
        .await
        .map_err(creating)?;
    file.sync().await.map_err(creating)?;
    if let Some(data) = data {
        data.sync().await.map_err(creating)?;
    }
    Ok(header)
}

/// Makes the first `end` bytes zeros. What is no file of its own, such as a block device, keeps its length.
async fn make_room(file: &File, end: u64) -> io::Result<()> {
    let len = file.len()?;
    if len < end {
        file.set_len(end)?;
    }
    if len > 0 {
        file.zero_range(0, len.min(end)).await?;
    }
    Ok(())
}

/// Writes a cluster to where only zeros lie, without the zeros at its end.
async fn write_beginning(file: &File, mut cluster: Vec<u8>, offset: u64) -> io::Result<()> {
    let used = cluster
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last + 1);
    let align = u64::from(file.direct_align().unwrap_or(1)).max(PAGE) as usize;
    cluster.truncate(used.next_multiple_of(align).min(cluster.len()));
    file.write(IoBuf::from_vec(cluster), offset).await
}

/// Where what lies, all in clusters.
struct Places {
    /// First cluster of the refcount table.
    reftable: u64,
    /// The first refcount block.
    blocks: u64,
    /// First cluster of the L1 table.
    l1: u64,
    l1_clusters: u64,
    l1_entries: u64,
}

impl Places {
    fn of(header: &Header) -> Places {
        let l1_entries = header.l1_entries_for(header.size);
        let l1_clusters = (l1_entries * 8).div_ceil(header.cluster_size());
        let (mut reftable, mut blocks) = (1, 1);
        // Both count themselves, so they are found by growing them until they do.
        loop {
            let clusters = 1 + reftable + blocks + l1_clusters;
            let needed = clusters.div_ceil(header.refcounts_per_block());
            let table = (needed * 8).div_ceil(header.cluster_size());
            if (table, needed) == (reftable, blocks) {
                break;
            }
            (reftable, blocks) = (table.max(reftable), needed.max(blocks));
        }
        Places {
            reftable: 1,
            blocks: 1 + reftable,
            l1: 1 + reftable + blocks,
            l1_clusters,
            l1_entries,
        }
    }

    fn end(&self) -> u64 {
        self.l1 + self.l1_clusters
    }

    fn tell(&self, header: &mut Header) {
        header.refcount_table_offset = self.reftable << header.cluster_bits;
        header.refcount_table_clusters = (self.blocks - self.reftable) as u32;
        header.l1_size = self.l1_entries as u32;
        if self.l1_entries > 0 {
            header.l1_offset = self.l1 << header.cluster_bits;
        }
    }

    /// Every cluster of the new image has a refcount of one.
    fn refcount_tables(&self, header: &Header) -> RefcountTables {
        let cluster_size = header.cluster_size() as usize;
        let mut table = vec![0; (self.blocks - self.reftable) as usize * cluster_size];
        for (entry, block) in table.chunks_exact_mut(8).zip(self.blocks..self.l1) {
            entry.copy_from_slice(&(block << header.cluster_bits).to_be_bytes());
        }
        let mut left = self.end();
        let blocks = (self.blocks..self.l1).map(|_| {
            let here = left.min(header.refcounts_per_block());
            left -= here;
            ones(cluster_size, header.refcount_bits(), here)
        });
        let blocks = blocks.collect();
        RefcountTables { table, blocks }
    }
}

struct RefcountTables {
    table: Vec<u8>,
    blocks: Vec<Vec<u8>>,
}

/// A refcount block whose first `count` refcounts are one. Those narrower than a byte begin at its lowest bit.
fn ones(cluster_size: usize, bits: u32, count: u64) -> Vec<u8> {
    let mut block = vec![0; cluster_size];
    for i in 0..count as usize {
        match bits as usize {
            bits @ ..8 => block[i * bits / 8] |= 1 << (i * bits % 8),
            bits => block[(i + 1) * bits / 8 - 1] = 1,
        }
    }
    block
}

fn refused<T>(what: impl Into<String>) -> Result<T, Error> {
    Err(Error::Refused(what.into()))
}
