//! The durable table: header and zone blocks, two checksummed copies each (layout: `spec::sidecar`). It is a file of its
//! own, the sidecar, or lies at some offset inside an image.
//!
//! A copy is overwritten only while the other one is durable: writes of a block alternate between its copies, and
//! every batch of writes is followed by a sync before the next batch. So a torn write leaves the older copy.

mod marks;
mod mend;

use std::collections::BTreeMap;
use std::io;

use zbdkit_io::{File, IoBuf};
use zbdkit_spec::sidecar::{
    ATTRIBUTE_BY_DEVICE, ATTRIBUTE_EXTENSION, ATTRIBUTE_FINISH_RECOMMENDED, ATTRIBUTE_RESET_RECOMMENDED,
    ATTRIBUTE_ZRWA, BLOCK, BLOCK_MAGIC, ENTRIES_PER_BLOCK, ENTRY_FINISHED, ENTRY_OFFLINE, ENTRY_READ_ONLY,
    EXTENSION_SLOT, Entry, Header, MAGIC, TABLE_OFFSET, TableBlock, VERSION, VERSION_MARKS, VERSION_ZNS,
};
use zbdkit_zone::{Counters, MAX_EXTENSION_SIZE, MAX_ZONES, Recommendation, ZoneNo, ZoneRecord};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::marks::MarkList;
use marks::KeptMarks;

pub use marks::{MARKS_LEN, marks_place};
pub use mend::{Finding, Salvaged, drop_damaged, zones_of};

/// Why a table cannot be used; the opener adds the path.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// Reading or writing failed.
    #[error("{0} failed: {1}")]
    Io(&'static str, #[source] io::Error),
    /// The file is too short for what its header says, or for a header.
    #[error("truncated: {actual} bytes, but the zone table takes {expected}")]
    Truncated {
        /// Bytes there are.
        actual: u64,
        /// Bytes there should be.
        expected: u64,
    },
    /// It does not begin like a sidecar.
    #[error("not a zone table of zbdkit (no valid header)")]
    NotATable,
    /// Both header copies fail their checksum.
    #[error("both copies of the header are damaged")]
    HeaderDamaged,
    /// A version that this program does not know.
    #[error("version {0} of the zone table is not known to this zbdkit; use a newer one")]
    Version(u32),
    /// Figures that no zbdkit wrote, whatever the checksum says.
    #[error("the figures of the zone table's header contradict each other")]
    Contradictory,
    /// Both copies of a block fail their checksum.
    #[error("both copies of zone table block {index} (zones {first} to {last}) are damaged")]
    BlockDamaged {
        /// The block.
        index: u64,
        /// Its first zone.
        first: u64,
        /// Its last zone.
        last: u64,
    },
    /// Both copies of the list of marked blocks fail their checksum.
    #[error("both copies of the list of blocks that are marked uncorrectable are damaged")]
    MarksLost,
    /// A zone's descriptor extension is not what its record says.
    #[error("the descriptor extension of zone {zone} is damaged: its checksum does not match")]
    ExtensionDamaged {
        /// The zone.
        zone: ZoneNo,
    },
    /// A copy that was current at the last clean close is gone.
    #[error("a damaged copy held the newest state of some zones of a cleanly closed image")]
    Outdated,
}

/// The opened table; its writer is whoever runs the current commit round.
pub struct Table {
    file: File,
    /// Where in the file it begins, bytes.
    base: u64,
    header: Box<Header>,
    /// Generation of each block's current copy, 0 where none was written.
    generations: Vec<u64>,
    /// Blocks whose very first write was torn.
    torn: Vec<u64>,
    /// Blocks of which one copy is damaged.
    halves: Vec<u64>,
    marks: KeptMarks,
}

/// What was found when a table was opened.
pub struct Loaded {
    /// The table.
    pub table: Table,
    /// The zones that are not empty and untouched, ascending.
    pub records: BTreeMap<u32, ZoneRecord>,
    /// Damage that the other copy made good, in words.
    pub repaired: Vec<String>,
}

/// Bytes of a sidecar that get their space when it is made, so that a full disk fails a guest's write, not the flush
/// of what was written before. The tables of huge devices (over 130,000 zones) stay sparse behind it.
pub const RESERVED: u64 = 16 << 20;

/// Generations and epochs count one by one, so none gets here; below it, adding one cannot overflow.
const COUNTER_END: u64 = 1 << 62;

/// Gives a file its space, where its file system can.
pub async fn reserve(file: &File, len: u64) -> io::Result<()> {
    match file.allocate(0, len).await {
        Err(error) if crate::file::is_unsupported(&error) => Ok(()),
        result => result,
    }
}

/// The bytes of a table for `nr_zones` zones and of the slots of their descriptor extensions, of that many bytes each.
pub fn table_size(nr_zones: u32, extension_size: u32) -> u64 {
    slots_offset(nr_zones) + u64::from(nr_zones) * slot_size(extension_size)
}

/// Where the slots of descriptor extensions begin, bytes from the table's beginning.
pub fn slots_offset(nr_zones: u32) -> u64 {
    TABLE_OFFSET + 2 * BLOCK as u64 * blocks(nr_zones)
}

/// Bytes from one slot to the next.
pub fn slot_size(extension_size: u32) -> u64 {
    u64::from(extension_size.next_multiple_of(EXTENSION_SLOT))
}

/// Bytes of a descriptor extension, as a header says.
pub fn extension_size(header: &Header) -> u32 {
    match header.version.get() {
        VERSION => 0,
        _ => header.extension_size.get(),
    }
}

fn blocks(nr_zones: u32) -> u64 {
    u64::from(nr_zones.div_ceil(ENTRIES_PER_BLOCK))
}

fn copy_offset(index: u64, generation: u64) -> u64 {
    TABLE_OFFSET + (2 * index + (generation & 1)) * BLOCK as u64
}

impl Table {
    /// Writes a new table at `base` of a file, where [`table_size`] bytes are zeros. Not synced yet.
    pub async fn create(
        file: File,
        base: u64,
        mut header: Box<Header>,
        records: &BTreeMap<u32, ZoneRecord>,
    ) -> Result<Table, TableError> {
        header.generation = 0.into();
        let marks = KeptMarks::none(&header);
        let mut table = Table {
            file,
            base,
            generations: vec![0; blocks(header.nr_zones.get()) as usize],
            header,
            torn: Vec::new(),
            halves: Vec::new(),
            marks,
        };
        table.write(records).await?;
        table.header.generation_sum = table.generation_sum().into();
        // Both copies, so that neither is ever garbage.
        table.write_header().await?;
        table.write_header().await?;
        Ok(table)
    }

    /// Reads and checks header and blocks of the table in the `actual` bytes at `base` of a file.
    pub async fn load(file: File, base: u64, actual: u64) -> Result<Loaded, TableError> {
        let salvaged = Table::salvage(file, base, actual).await?;
        match salvaged.unusable() {
            Some(error) => Err(error),
            None => Ok(Loaded {
                table: salvaged.table,
                records: salvaged.records,
                repaired: salvaged.findings.iter().map(Finding::to_string).collect(),
            }),
        }
    }

    /// Reads and checks the header alone of the table in the `actual` bytes at `base` of a file.
    pub async fn load_header(file: &File, base: u64, actual: u64) -> Result<Box<Header>, TableError> {
        read_header(file, base, actual, &mut Vec::new()).await
    }

    /// The current header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Whether some copy of the zone's block is there.
    pub fn has_copy(&self, zone: u32) -> bool {
        self.generations[(zone / ENTRIES_PER_BLOCK) as usize] != 0
    }

    /// Where the table begins in its file, bytes.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// The file that holds the table.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Writes the header as `change` leaves it, not synced.
    pub async fn update_header(&mut self, change: impl FnOnce(&mut Header)) -> Result<(), TableError> {
        change(&mut self.header);
        self.write_header().await
    }

    /// The checksum over which blocks, and which list of marks, are current that a clean close leaves in the header.
    pub fn generation_sum(&self) -> u64 {
        self.generations
            .iter()
            .fold(self.marks.generation, |sum, generation| {
                sum.wrapping_add(*generation)
            })
    }

    /// The blocks that are marked.
    pub fn marks(&self) -> &MarkList {
        &self.marks.list
    }

    /// Writes these zones' records, not synced: [`Table::sync`] must succeed before the next write.
    pub async fn write(&mut self, changes: &BTreeMap<u32, ZoneRecord>) -> Result<(), TableError> {
        let mut rest = changes.iter().peekable();
        while let Some((zone, _)) = rest.peek() {
            let index = **zone / ENTRIES_PER_BLOCK;
            let mut block = self.current_block(u64::from(index)).await?;
            while let Some((zone, record)) = rest.next_if(|(zone, _)| **zone / ENTRIES_PER_BLOCK == index) {
                block.entries[(zone % ENTRIES_PER_BLOCK) as usize] = entry_of(record);
            }
            self.write_next(index.into(), block).await?;
        }
        Ok(())
    }

    /// Writes a block's next generation, over its older copy.
    async fn write_next(&mut self, index: u64, mut block: Box<TableBlock>) -> Result<(), TableError> {
        let generation = self.generations[index as usize] + 1;
        block.generation = generation.into();
        block.crc = 0.into();
        block.crc = crc32c::crc32c(block.as_bytes()).into();
        let offset = copy_offset(index, generation);
        self.write_block(block.as_bytes(), offset).await?;
        self.generations[index as usize] = generation;
        Ok(())
    }

    /// Writes the blocks once more of which one copy is damaged, over that copy; how many, not synced. What a cut has torn
    /// is no fault while the epoch is open, and would be one when it has ended. The other copies are durable: a sync
    /// has followed [`Table::rewrite`].
    pub async fn restore(&mut self) -> Result<usize, TableError> {
        let halves = std::mem::take(&mut self.halves);
        for index in &halves {
            let block = self.current_block(*index).await?;
            self.write_next(*index, block).await?;
        }
        Ok(halves.len())
    }

    /// Writes all that was read once more in its place, not synced. Where a sync failed, the page cache may hold what the
    /// medium does not and no sync will write: that must not be taken for durable, or the copy beside it, the only
    /// one that is, would be overwritten next.
    pub async fn rewrite(&mut self) -> Result<(), TableError> {
        for index in 0..self.generations.len() as u64 {
            let generation = self.generations[index as usize];
            if generation != 0 {
                let block = self.current_block(index).await?;
                self.write_block(block.as_bytes(), copy_offset(index, generation))
                    .await?;
            }
        }
        // What is left of a first write must not be there any more when the epoch has ended: then it would be damage.
        for index in std::mem::take(&mut self.torn) {
            self.write_block(&[0; BLOCK], copy_offset(index, 1)).await?;
        }
        self.rewrite_marks().await?;
        let offset = (self.header.generation.get() & 1) * BLOCK as u64;
        self.write_block(self.header.as_bytes(), offset).await
    }

    /// Makes what was written durable.
    pub async fn sync(&self) -> Result<(), TableError> {
        self.file
            .datasync()
            .await
            .map_err(|e| TableError::Io("syncing", e))
    }

    async fn write_header(&mut self) -> Result<(), TableError> {
        let generation = self.header.generation.get() + 1;
        self.header.generation = generation.into();
        self.header.crc = 0.into();
        self.header.crc = crc32c::crc32c(self.header.as_bytes()).into();
        let offset = (generation & 1) * BLOCK as u64;
        self.write_block(self.header.as_bytes(), offset).await
    }

    async fn write_block(&self, bytes: &[u8], offset: u64) -> Result<(), TableError> {
        write_at(&self.file, bytes, self.base + offset).await
    }

    async fn current_block(&self, index: u64) -> Result<Box<TableBlock>, TableError> {
        let generation = self.generations[index as usize];
        if generation == 0 {
            let mut block = new_box::<TableBlock>();
            block.magic = BLOCK_MAGIC;
            block.index = index.into();
            block.uuid = self.header.uuid;
            return Ok(block);
        }
        let bytes = read_at(&self.file, self.base + copy_offset(index, generation), BLOCK).await?;
        let block = TableBlock::read_from_bytes(&bytes)
            .map(Box::new)
            .map_err(|_| TableError::NotATable)?;
        if !self.is_valid(&block, index) || block.generation.get() != generation {
            // Somebody wrote into the file meanwhile; the locks say that this is not allowed.
            return Err(self.damaged(index));
        }
        Ok(block)
    }

    async fn load_blocks(
        &mut self,
        findings: &mut Vec<Finding>,
    ) -> Result<BTreeMap<u32, ZoneRecord>, TableError> {
        const BATCH: u64 = 128;
        let mut records = BTreeMap::new();
        let count = blocks(self.header.nr_zones.get());
        let mut index = 0;
        while index < count {
            let n = BATCH.min(count - index);
            let offset = self.base + copy_offset(index, 0);
            let bytes = read_at(&self.file, offset, 2 * BLOCK * n as usize).await?;
            for (i, pair) in bytes.chunks_exact(2 * BLOCK).enumerate() {
                self.load_block(index + i as u64, pair, &mut records, findings);
            }
            index += n;
        }
        Ok(records)
    }

    fn load_block(
        &mut self,
        index: u64,
        pair: &[u8],
        records: &mut BTreeMap<u32, ZoneRecord>,
        findings: &mut Vec<Finding>,
    ) {
        if is_zero(pair) {
            return;
        }
        let (first, second) = pair.split_at(BLOCK);
        let copies = [first, second].map(|bytes| TableBlock::ref_from_bytes(bytes).ok());
        let valid = copies.map(|copy| copy.filter(|block| self.is_valid(block, index)));
        let damaged = |i: usize| valid[i].is_none() && !is_zero([first, second][i]);
        let best = valid.iter().flatten().max_by_key(|block| block.generation.get());
        let Some(best) = best else {
            // The block's very first write was torn: allowed only while an epoch was open, and only there where
            // first writes go (generation 1), or else something was lost.
            if self.header.open != 0 && is_zero(first) && damaged(1) {
                self.torn.push(index);
                findings.push(Finding::Torn { index });
            } else {
                findings.push(Finding::Lost { index });
            }
            return;
        };
        let generation = best.generation.get();
        if damaged(0) || damaged(1) {
            self.halves.push(index);
            findings.push(Finding::Half { index, generation });
        }
        self.generations[index as usize] = generation;
        let base = index as u32 * ENTRIES_PER_BLOCK;
        for (i, entry) in best.entries.iter().enumerate() {
            let zone = base + i as u32;
            let record = record_of(entry);
            if zone < self.header.nr_zones.get() && record != ZoneRecord::default() {
                records.insert(zone, record);
            }
        }
    }

    fn is_valid(&self, block: &TableBlock, index: u64) -> bool {
        let mut copy = *block;
        copy.crc = 0.into();
        block.magic == BLOCK_MAGIC
            && block.index.get() == index
            && block.uuid == self.header.uuid
            && (1..COUNTER_END).contains(&block.generation.get())
            && crc32c::crc32c(copy.as_bytes()) == block.crc.get()
    }

    fn damaged(&self, index: u64) -> TableError {
        let first = index * u64::from(ENTRIES_PER_BLOCK);
        let last = (first + u64::from(ENTRIES_PER_BLOCK)).min(self.header.nr_zones.get().into()) - 1;
        TableError::BlockDamaged { index, first, last }
    }
}

async fn read_header(
    file: &File,
    base: u64,
    actual: u64,
    findings: &mut Vec<Finding>,
) -> Result<Box<Header>, TableError> {
    if actual < TABLE_OFFSET {
        return Err(TableError::Truncated {
            actual,
            expected: TABLE_OFFSET,
        });
    }
    let bytes = read_at(file, base, 2 * BLOCK).await?;
    let copies = [&bytes[..BLOCK], &bytes[BLOCK..]].map(|bytes| Header::read_from_bytes(bytes).ok());
    if !copies.iter().flatten().any(|header| header.magic == MAGIC) {
        return Err(TableError::NotATable);
    }
    let valid = copies.map(|header| header.filter(header_is_intact));
    let best = valid
        .iter()
        .flatten()
        .max_by_key(|header| header.generation.get());
    let best = best.ok_or(TableError::HeaderDamaged)?;
    if !matches!(best.version.get(), VERSION | VERSION_ZNS | VERSION_MARKS) {
        return Err(TableError::Version(best.version.get()));
    }
    if !is_consistent(best) || marks_place(best, base).is_err() {
        return Err(TableError::Contradictory);
    }
    if valid.iter().any(Option::is_none) {
        findings.push(Finding::Header);
    }
    Ok(Box::new(*best))
}

fn header_is_intact(header: &Header) -> bool {
    let mut copy = *header;
    copy.crc = 0.into();
    header.magic == MAGIC && crc32c::crc32c(copy.as_bytes()) == header.crc.get()
}

/// Checked before anything is made or read by these numbers: a checksum is no proof of who wrote them.
fn is_consistent(header: &Header) -> bool {
    let (nr_zones, zone_size) = (header.nr_zones.get(), header.zone_size.get());
    zone_size != 0
        && header.size.get().div_ceil(zone_size) == u64::from(nr_zones)
        && nr_zones <= MAX_ZONES
        && extension_size(header) <= MAX_EXTENSION_SIZE
        && header.generation.get() < COUNTER_END
        && header.epoch.get() < COUNTER_END
}

/// Reads bytes, also where direct I/O wants more than these.
pub async fn read_at(file: &File, offset: u64, len: usize) -> Result<Vec<u8>, TableError> {
    let align = u64::from(file.direct_align().unwrap_or(1).max(1));
    let start = offset / align * align;
    let end = (offset + len as u64).next_multiple_of(align);
    let buf = IoBuf::alloc((end - start) as usize);
    file.read(buf.clone(), start)
        .await
        .map_err(|e| TableError::Io("reading", e))?;
    let within = (offset - start) as usize;
    Ok(buf.slice(within..within + len).to_vec())
}

pub async fn write_at(file: &File, bytes: &[u8], offset: u64) -> Result<(), TableError> {
    let buf = IoBuf::alloc(bytes.len());
    buf.copy_from(bytes);
    file.write(buf, offset)
        .await
        .map_err(|e| TableError::Io("writing", e))
}

fn new_box<T: FromZeros>() -> Box<T> {
    Box::new(T::new_zeroed())
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(64)
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

fn entry_of(record: &ZoneRecord) -> Entry {
    let flag = |set: bool, flag: u8| if set { flag } else { 0 };
    Entry {
        written: record.written.into(),
        bytes_written: record.counters.bytes_written.into(),
        resets: record.counters.resets.into(),
        finishes: record.counters.finishes.into(),
        flags: flag(record.finished, ENTRY_FINISHED)
            | flag(record.read_only, ENTRY_READ_ONLY)
            | flag(record.offline, ENTRY_OFFLINE),
        attributes: flag(record.finished_by_device, ATTRIBUTE_BY_DEVICE)
            | flag(record.zrwa, ATTRIBUTE_ZRWA)
            | flag(record.extension.is_some(), ATTRIBUTE_EXTENSION)
            | match record.recommended {
                None => 0,
                Some(Recommendation::Finish) => ATTRIBUTE_FINISH_RECOMMENDED,
                Some(Recommendation::Reset) => ATTRIBUTE_RESET_RECOMMENDED,
            },
        extension_crc: record.extension.unwrap_or(0).into(),
        ..Entry::new_zeroed()
    }
}

fn record_of(entry: &Entry) -> ZoneRecord {
    let has = |attribute: u8| entry.attributes & attribute != 0;
    ZoneRecord {
        written: entry.written.get(),
        finished: entry.flags & ENTRY_FINISHED != 0,
        read_only: entry.flags & ENTRY_READ_ONLY != 0,
        offline: entry.flags & ENTRY_OFFLINE != 0,
        zrwa: has(ATTRIBUTE_ZRWA),
        extension: has(ATTRIBUTE_EXTENSION).then(|| entry.extension_crc.get()),
        finished_by_device: has(ATTRIBUTE_BY_DEVICE),
        recommended: if has(ATTRIBUTE_FINISH_RECOMMENDED) {
            Some(Recommendation::Finish)
        } else {
            has(ATTRIBUTE_RESET_RECOMMENDED).then_some(Recommendation::Reset)
        },
        counters: Counters {
            resets: entry.resets.get(),
            finishes: entry.finishes.get(),
            bytes_written: entry.bytes_written.get(),
        },
    }
}
