//! The list of marked blocks behind a table: two copies, written by turns like a block's, each whole at once.
//!
//! A table gets its place for the list when the first block is marked; until then it is what it always was.

use zbdkit_spec::sidecar::{MARKS_COPY, MARKS_MAGIC, MAX_MARKS, Mark, MarksHead};

use super::*;

/// Bytes that a list takes in its file.
pub const MARKS_LEN: u64 = 2 * MARKS_COPY;

/// The list as it was last written.
pub struct KeptMarks {
    pub list: MarkList,
    /// 0 where none was written.
    pub generation: u64,
}

impl KeptMarks {
    /// None was written yet.
    pub fn none(header: &Header) -> KeptMarks {
        KeptMarks {
            list: MarkList::new(header.zone_size.get()),
            generation: 0,
        }
    }
}

/// Where the list of the table at `base` of a file lies, if it has one: offset and length, bytes.
///
/// # Errors
/// It would lie in the table, or where no file has bytes.
pub fn marks_place(header: &Header, base: u64) -> Result<Option<(u64, u64)>, TableError> {
    if header.version.get() != VERSION_MARKS {
        return Ok(None);
    }
    let offset = header.marks_offset.get();
    let table = base..base.saturating_add(table_size(header.nr_zones.get(), extension_size(header)));
    let is_free = offset
        .checked_add(MARKS_LEN)
        .is_some_and(|end| end <= table.start || offset >= table.end);
    // As the clusters of an image are.
    match is_free && offset.is_multiple_of(512) && offset <= i64::MAX as u64 - MARKS_LEN {
        true => Ok(Some((offset, MARKS_LEN))),
        false => Err(TableError::Contradictory),
    }
}

impl Table {
    fn marks_at(&self) -> Option<u64> {
        marks_place(&self.header, self.base)
            .ok()
            .flatten()
            .map(|(offset, _)| offset)
    }

    /// Whether the table has a place for a list.
    pub fn has_marks(&self) -> bool {
        self.marks_at().is_some()
    }

    /// Where a list would lie behind a table that has its file for itself.
    pub fn behind(&self) -> u64 {
        let header = &self.header;
        self.base + table_size(header.nr_zones.get(), extension_size(header))
    }

    /// Gives the place for a list at `offset` of the file its space, not synced. After that a full disk fails no write of a list,
    /// which would be final: lists grow, and are written to the other copy. Nothing names the place yet.
    pub async fn make_room(&self, offset: u64) -> Result<(), TableError> {
        match self.file.allocate(offset, MARKS_LEN).await {
            Err(error) if crate::file::is_unsupported(&error) => {
                write_at(&self.file, &vec![0; MARKS_LEN as usize], offset).await
            }
            result => result.map_err(|e| TableError::Io("allocating", e)),
        }
    }

    /// Gives the table a place for its list, at `offset` of the file, which has its space, with a first list in it; durable when
    /// this returns.
    pub async fn add_marks(&mut self, offset: u64, list: &MarkList) -> Result<(), TableError> {
        self.write_list(offset, list).await?;
        self.sync().await?;
        // Only now is there something to be named.
        self.update_header(|header| {
            header.version = VERSION_MARKS.into();
            header.marks_offset = offset.into();
        })
        .await?;
        self.sync().await
    }

    /// Writes the list, over its older copy, not synced: [`Table::sync`] must succeed before the next write.
    pub async fn write_marks(&mut self, list: &MarkList) -> Result<(), TableError> {
        match self.marks_at() {
            Some(offset) => self.write_list(offset, list).await,
            None => Ok(()),
        }
    }

    async fn write_list(&mut self, offset: u64, list: &MarkList) -> Result<(), TableError> {
        let generation = self.marks.generation + 1;
        self.write_copy(offset, list, generation).await?;
        self.marks = KeptMarks {
            list: list.clone(),
            generation,
        };
        Ok(())
    }

    async fn write_copy(&self, offset: u64, list: &MarkList, generation: u64) -> Result<(), TableError> {
        let mut head = MarksHead::new_zeroed();
        head.magic = MARKS_MAGIC;
        head.count = (list.ranges().len() as u32).into();
        head.generation = generation.into();
        head.uuid = self.header.uuid;
        let marks = list.ranges().iter().map(|range| Mark {
            start: range.start.into(),
            end: range.end.into(),
        });
        let marks: Vec<Mark> = marks.collect();
        head.crc = checksum(head, marks.as_bytes()).into();
        let mut bytes = [head.as_bytes(), marks.as_bytes()].concat();
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        write_at(&self.file, &bytes, copy_at(offset, generation)).await
    }

    /// Writes the list once more in its place, not synced; see [`Table::rewrite`].
    pub(super) async fn rewrite_marks(&self) -> Result<(), TableError> {
        match self.marks_at() {
            Some(offset) if self.marks.generation != 0 => {
                self.write_copy(offset, &self.marks.list, self.marks.generation)
                    .await
            }
            _ => Ok(()),
        }
    }

    /// Makes both copies whole, with the list that was read, or an empty one; synced.
    pub(super) async fn mend_marks(&mut self) -> Result<(), TableError> {
        for _ in 0..2 {
            let list = self.marks.list.clone();
            self.write_marks(&list).await?;
            self.sync().await?;
        }
        Ok(())
    }

    /// Reads the list, if the table has one.
    pub(super) async fn load_marks(&mut self, findings: &mut Vec<Finding>) -> Result<(), TableError> {
        let Some(offset) = self.marks_at() else {
            return Ok(());
        };
        let len = self.file.len().map_err(|e| TableError::Io("looking at", e))?;
        if len < offset + MARKS_LEN {
            findings.push(Finding::MarksLost);
            return Ok(());
        }
        let bytes = read_at(&self.file, offset, MARKS_LEN as usize).await?;
        let (first, second) = bytes.split_at(MARKS_COPY as usize);
        let copies = [first, second].map(|bytes| self.decode(bytes));
        let is_damaged = |i: usize| copies[i].is_none() && !is_zero(&[first, second][i][..BLOCK]);
        let is_half = is_damaged(0) || is_damaged(1);
        // The other one may be of before a change of the block size, and be none the worse for it.
        let newest = copies.into_iter().flatten().max_by_key(|kept| kept.generation);
        match newest.filter(|kept| self.fits(&kept.list)) {
            Some(kept) => {
                self.marks = kept;
                findings.extend(is_half.then_some(Finding::MarksHalf));
            }
            // The first list was durable before the header named it.
            None => findings.push(Finding::MarksLost),
        }
        Ok(())
    }

    /// Whether its marks are blocks of the device as it is.
    fn fits(&self, list: &MarkList) -> bool {
        let (size, block) = (self.header.size.get(), u64::from(self.header.block_size.get()));
        list.ranges().iter().all(|range| {
            range.end <= size && range.start.checked_rem(block) == Some(0) && range.end % block == 0
        })
    }

    fn decode(&self, bytes: &[u8]) -> Option<KeptMarks> {
        let (head, rest) = MarksHead::read_from_prefix(bytes).ok()?;
        let count = head.count.get() as usize;
        let is_ours = head.magic == MARKS_MAGIC
            && head.uuid == self.header.uuid
            && (1..COUNTER_END).contains(&head.generation.get())
            && count <= MAX_MARKS;
        let marks = is_ours.then(|| &rest[..count * size_of::<Mark>()])?;
        if checksum(head, marks) != head.crc.get() {
            return None;
        }
        let marks = marks.chunks_exact(size_of::<Mark>());
        let ranges: Option<Vec<_>> = marks
            .map(|bytes| {
                let mark = Mark::read_from_bytes(bytes).ok()?;
                Some(mark.start.get()..mark.end.get())
            })
            .collect();
        Some(KeptMarks {
            list: MarkList::of(self.header.zone_size.get(), ranges?)?,
            generation: head.generation.get(),
        })
    }
}

fn copy_at(offset: u64, generation: u64) -> u64 {
    offset + (generation & 1) * MARKS_COPY
}

fn checksum(mut head: MarksHead, marks: &[u8]) -> u32 {
    head.crc = 0.into();
    crc32c::crc32c_append(crc32c::crc32c(head.as_bytes()), marks)
}

const _: () = assert!(size_of::<MarksHead>() + MAX_MARKS * size_of::<Mark>() <= MARKS_COPY as usize);
