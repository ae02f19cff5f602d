//! Metadata in the file: whole sectors, the header, and what must be right before an image may be written.

use std::ops::Range;

use zbdkit_io::{File, IoBuf};
use zbdkit_spec::qcow2::{AUTOCLEAR_DATA_FILE_RAW, INCOMPAT_CORRUPT, INCOMPAT_DIRTY, MAX_CLUSTER_OFFSET};

use crate::check::{Repair, check};
use crate::error::Error;
use crate::header::Header;
use crate::image::Options;
use crate::l2::COPIED;
use crate::replace::replace_header;

/// How metadata is written: whole sectors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sectors {
    /// Bytes: 512, or what direct I/O needs.
    pub(crate) align: u64,
}

impl Sectors {
    /// Writes the sectors of a table at `base` that hold `range` of its bytes.
    pub(crate) async fn write(
        self,
        file: &File,
        base: u64,
        table: &[u8],
        range: Range<usize>,
    ) -> Result<(), Error> {
        let align = self.align as usize;
        let start = range.start / align * align;
        let end = (range.end.div_ceil(align) * align).min(table.len());
        write_at(file, base + start as u64, &table[start..end]).await
    }
}

/// Reads bytes, also where direct I/O wants more than these; zeros past the end of the file.
pub(crate) async fn read_at(file: &File, offset: u64, len: usize) -> Result<Vec<u8>, Error> {
    let align = u64::from(file.direct_align().unwrap_or(1).max(1));
    let start = offset / align * align;
    let end = offset
        .checked_add(len as u64)
        .filter(|end| *end <= MAX_CLUSTER_OFFSET + (1 << 30))
        .ok_or_else(|| Error::Corrupt(format!("{len} bytes at {offset:#x} are past any file's end")))?
        .div_ceil(align)
        * align;
    let buf = IoBuf::try_alloc((end - start) as usize).map_err(|e| Error::io("reading metadata", &e))?;
    file.read(buf.clone(), start)
        .await
        .map_err(|e| Error::io("reading metadata", &e))?;
    let within = (offset - start) as usize;
    Ok(buf.slice(within..within + len).to_vec())
}

/// Writes bytes; with direct I/O, offset and length are multiples of its alignment.
pub(crate) async fn write_at(file: &File, offset: u64, bytes: &[u8]) -> Result<(), Error> {
    let buf = IoBuf::try_alloc(bytes.len()).map_err(|e| Error::io("writing metadata", &e))?;
    buf.copy_from(bytes);
    file.write(buf, offset)
        .await
        .map_err(|e| Error::io("writing metadata", &e))
}

pub(crate) fn file_len(file: &File) -> Result<u64, Error> {
    file.len().map_err(|e| Error::io("finding the file's size", &e))
}

/// Big-endian words.
pub(crate) fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes
        .chunks_exact(8)
        .map(|word| u64::from_be_bytes(word.try_into().expect("eight bytes")))
}

/// An L1 entry for a table of the image's own.
pub(crate) fn own_table(offset: u64) -> u64 {
    offset | COPIED
}

/// Checks and repairs what must be right before an image may be written.
pub(crate) async fn prepare(file: &File, mut header: Header, options: &Options) -> Result<Header, Error> {
    if header.incompatible & INCOMPAT_CORRUPT != 0 {
        return Err(Error::Corrupt(
            "it is marked so, and can only be read until it is repaired".into(),
        ));
    }
    if header.incompatible & INCOMPAT_DIRTY != 0 {
        tracing::warn!("the image was not closed cleanly: its refcounts are made anew");
        check(
            file,
            &header,
            options.data_file.as_ref(),
            &options.areas,
            Repair::All,
            &mut |_, _| {},
        )
        .await?;
        header = Header::read(file).await?;
        if header.incompatible & (INCOMPAT_DIRTY | INCOMPAT_CORRUPT) != 0 {
            return Err(Error::Corrupt("its refcounts could not be made anew".into()));
        }
    }
    let unknown = header.autoclear & !(options.known_autoclear | AUTOCLEAR_DATA_FILE_RAW);
    if unknown != 0 {
        let mut new = header.clone();
        new.autoclear &= !unknown;
        let align = u64::from(file.direct_align().unwrap_or(1).max(512));
        replace_header(file, Sectors { align }, &new).await?;
        header = new;
    }
    Ok(header)
}
