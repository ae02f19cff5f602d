//! Following what refers to clusters besides the mapping: snapshots, bitmaps, encryption, zones, the caller's areas.

use std::ops::Range;

use zbdkit_spec::qcow2 as spec;
use zerocopy::FromBytes;

use super::Image;
use super::counts::Use;
use super::found::Found;
use super::references::{L1, Marked, References};
use crate::error::Error;
use crate::image::read_at;
use crate::snapshot::table;

/// Bytes of a bitmap directory that are read at once; more than an entry can have.
const WINDOW: u64 = 128 << 10;
/// Most extra data of a bitmap.
const MAX_BITMAP_EXTRA: u32 = 1 << 16;
/// Longest name of a bitmap.
const MAX_BITMAP_NAME: u16 = 1023;
/// Most clusters' bytes of a bitmap.
const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// More than an encryption header has, bytes.
const MAX_ENCRYPTION: u64 = 1 << 30;

/// The snapshot table, as it would be written anew where that helps.
pub type Rewrite = Option<Vec<table::Entry>>;

impl References {
    /// Notes the snapshot table, and what its snapshots refer to. Returns the table's bytes in the file, and its entries
    /// where written anew they would be without a finding.
    pub async fn snapshots(&mut self, image: &Image<'_>, found: &mut Found) -> (u64, Rewrite) {
        let header = &image.header;
        if header.nb_snapshots == 0 {
            return (0, None);
        }
        if header.external_data() {
            found.corruption(format_args!(
                "ERROR {} snapshots in image with data file",
                header.nb_snapshots
            ));
        }
        let table = if image.is_aligned(header.snapshots_offset) {
            table::read_for_check(image.file, header).await
        } else {
            Err(Error::Invalid("Snapshot table offset invalid".to_owned()))
        };
        let table = match table {
            Ok(table) => table,
            Err(e) => {
                found.error(format_args!("ERROR {e}"));
                self.incomplete = true;
                return (0, None);
            }
        };
        let range = (header.snapshots_offset, table.len);
        let marked = self.mark(image, found, range, 1, Use::SnapshotTable);
        for (index, entry) in table.entries.iter().enumerate() {
            if table.cut.binary_search(&(index as u32)).is_ok() {
                found.snapshot_entries += 1;
                found.corruption(format_args!(
                    "ERROR Too much extra metadata in snapshot table entry {index}"
                ));
            }
            if header.version >= 3 && !entry.is_complete() {
                found.snapshot_entries += 1;
                found.corruption(format_args!("ERROR snapshot table entry {index} is incomplete"));
            }
            self.snapshot(image, found, entry).await;
        }
        // Of a table that is not there, or that is something else, nothing would be right when written anew.
        let rewrite = found.snapshot_entries > 0 && marked == Marked::Alone;
        (table.len, rewrite.then_some(table.entries))
    }

    async fn snapshot(&mut self, image: &Image<'_>, found: &mut Found, entry: &table::Entry) {
        let snapshot = &entry.snapshot;
        let what = match () {
            () if !image.is_aligned(snapshot.l1_offset) => "is not cluster aligned",
            () if u64::from(snapshot.l1_size) * 8 > spec::MAX_L1_BYTES => "is too large",
            () => {
                let l1 = L1 {
                    offset: snapshot.l1_offset,
                    entries: snapshot.l1_size,
                    for_what: Use::SnapshotL1,
                };
                return self.l1(image, found, l1).await;
            }
        };
        found.corruption(format_args!(
            "ERROR snapshot {} ({}) l1_offset={:#x} l1_size={:#x}: L1 table {what}; snapshot table entry corrupted",
            printable(&snapshot.id),
            printable(&snapshot.name),
            snapshot.l1_offset,
            snapshot.l1_size
        ));
        self.incomplete = true;
    }

    /// Notes the bitmaps, if they are up to date: others are nobody's, and their clusters are leaks.
    pub async fn bitmaps(&mut self, image: &Image<'_>, found: &mut Found) {
        if image.header.autoclear & spec::AUTOCLEAR_BITMAPS == 0 {
            return;
        }
        let Some(bitmaps) = image.header.bitmaps() else {
            return;
        };
        let (offset, size) = (bitmaps.directory_offset.get(), bitmaps.directory_size.get());
        if self.mark(image, found, (offset, size), 1, Use::Bitmap) == Marked::Outside {
            found.error(format_args!("ERROR the bitmap directory cannot be read"));
            self.incomplete = true;
            return;
        }
        if let Err(e) = self.directory(image, found, bitmaps).await {
            found.corruption(format_args!("ERROR bitmap directory: {e}"));
            found.report.check_errors += 1;
            self.incomplete = true;
        }
    }

    async fn directory(
        &mut self,
        image: &Image<'_>,
        found: &mut Found,
        bitmaps: spec::BitmapsExtension,
    ) -> Result<(), Error> {
        let invalid = |what: &str| Err(Error::Invalid(what.to_owned()));
        let mut at = bitmaps.directory_offset.get();
        let end = at + bitmaps.directory_size.get();
        let (mut window, mut window_at) = (Vec::new(), at);
        for _ in 0..bitmaps.nb_bitmaps.get() {
            // Entries are smaller than half a window.
            if window.is_empty() || at - window_at > WINDOW / 2 {
                window = read_at(image.file, at, WINDOW.min(end - at) as usize).await?;
                window_at = at;
            }
            let rest = &window[((at - window_at) as usize).min(window.len())..];
            let Ok((entry, _)) = spec::BitmapEntry::read_from_prefix(rest) else {
                return invalid("it ends before its last entry");
            };
            let (name, extra) = (entry.name_size.get(), entry.extra_data_size.get());
            let len = size_of::<spec::BitmapEntry>() as u64 + u64::from(extra) + u64::from(name);
            if extra > MAX_BITMAP_EXTRA || at + len.next_multiple_of(8) > end {
                return invalid("it ends before its last entry");
            }
            let bytes = u64::from(entry.table_size.get()) << image.header.cluster_bits;
            if name == 0
                || name > MAX_BITMAP_NAME
                || !(9..=31).contains(&entry.granularity_bits)
                || entry.kind != 1
                || entry.table_offset.get() == 0
                || !image.is_aligned(entry.table_offset.get())
                || bytes == 0
                || bytes > MAX_BITMAP_BYTES
            {
                return invalid("a bitmap doesn't satisfy the constraints");
            }
            self.bitmap(image, found, entry).await?;
            at += len.next_multiple_of(8);
        }
        if at != end {
            return invalid("more bitmaps found than specified in header extension");
        }
        Ok(())
    }

    async fn bitmap(
        &mut self,
        image: &Image<'_>,
        found: &mut Found,
        entry: spec::BitmapEntry,
    ) -> Result<(), Error> {
        let (offset, entries) = (entry.table_offset.get(), u64::from(entry.table_size.get()));
        if self.mark(image, found, (offset, entries * 8), 1, Use::Bitmap) != Marked::Alone {
            self.incomplete = true;
            return Ok(());
        }
        for at in (0..entries).step_by(8192) {
            for word in image.words(offset + at * 8, 8192.min(entries - at)).await? {
                let cluster = word & spec::BITMAP_OFFSET_MASK;
                let flagged = cluster != 0 && word & spec::BITMAP_ALL_ONES != 0;
                if word & spec::BITMAP_RESERVED_MASK != 0 || flagged || !image.is_aligned(cluster) {
                    found.corruption(format_args!("ERROR bitmap table entry {word:x} is corrupted"));
                    self.incomplete = true;
                } else if cluster != 0 {
                    self.mark(image, found, (cluster, image.cluster_size()), 1, Use::Bitmap);
                }
            }
        }
        Ok(())
    }

    /// Notes the header of the encryption and the zone table of QEMU's drafts.
    pub fn extensions(&mut self, image: &Image<'_>, found: &mut Found) {
        let header = &image.header;
        let crypto = header.extension(spec::EXT_CRYPTO).unwrap_or_default();
        if let Ok(crypto) = spec::CryptoExtension::read_from_bytes(crypto) {
            let (offset, len) = (crypto.offset.get(), crypto.length.get());
            if !image.is_aligned(offset) || len > MAX_ENCRYPTION {
                found.corruption(format_args!(
                    "ERROR encryption header at {offset:#x}, {len} bytes: not a place for it"
                ));
                self.incomplete = true;
            } else {
                self.mark(image, found, (offset, len), 1, Use::Encryption);
            }
        }
        if header.zoned()
            && let Some(extension) = header.extension(spec::EXT_ZONED)
        {
            self.zones(image, found, extension);
        }
    }

    fn zones(&mut self, image: &Image<'_>, found: &mut Found, extension: &[u8]) {
        let Some((offset, zones)) = zone_table(extension, image.header.size) else {
            found.error(format_args!(
                "ERROR zoned_ext: unexpected len={}",
                extension.len()
            ));
            self.incomplete = true;
            return;
        };
        if zones > spec::ZONED_MAX_ZONES {
            found.corruption(format_args!(
                "ERROR Zoned extension header nr_zones {zones} exceeds maximum {}",
                spec::ZONED_MAX_ZONES
            ));
            self.incomplete = true;
            return;
        }
        self.mark(image, found, (offset, u64::from(zones) * 8), 1, Use::ZoneTable);
    }

    /// Notes what the caller knows of.
    pub fn areas(&mut self, image: &Image<'_>, found: &mut Found, areas: &[(Range<u64>, &'static str)]) {
        for (range, name) in areas {
            let len = range.end.saturating_sub(range.start);
            if !image.is_aligned(range.start) {
                found.corruption(format_args!(
                    "ERROR the {name} at {:#x} is not cluster aligned",
                    range.start
                ));
                self.incomplete = true;
                continue;
            }
            if self.mark(image, found, (range.start, len), 1, Use::Area) != Marked::Alone {
                found.say(format_args!("ERROR the {name} lies there"));
            }
        }
        // Who does not name the area does not know what it names in turn: nothing that it may own is given away.
        let header = &image.header;
        let extension = header.extension(spec::EXT_ZBDKIT).unwrap_or_default();
        if header.autoclear & spec::AUTOCLEAR_ZONE_TABLE != 0
            && let Ok((extension, _)) = spec::ZbdkitExtension::read_from_prefix(extension)
        {
            let at = extension.area_offset.get();
            self.incomplete |= !areas.iter().any(|(range, _)| range.contains(&at));
        }
    }
}

/// Where the zone table of a draft lies, and for how many zones.
pub fn zone_table(extension: &[u8], size: u64) -> Option<(u64, u32)> {
    if let Ok(c) = spec::ZonedC::read_from_bytes(extension) {
        return Some((c.zonedmeta_offset.get(), c.nr_zones.get()));
    }
    if let Ok(a) = spec::ZonedA::read_from_bytes(extension) {
        return Some((a.zonedmeta_offset.get(), a.nr_zones.get()));
    }
    let b = spec::ZonedB::read_from_bytes(extension).ok()?;
    let old = spec::ZonedV7::read_from_bytes(extension).ok()?;
    // They have the same length; only one of them makes sense.
    if b.zone_size.get() > 0 && u64::from(b.nr_zones.get()) == size.div_ceil(b.zone_size.get()) {
        return Some((b.zonedmeta_offset.get(), b.nr_zones.get()));
    }
    Some((old.zonedmeta_offset.get(), old.nr_zones.get()))
}

/// What a terminal can take of a name, whoever wrote it.
fn printable(name: &str) -> String {
    name.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .take(200)
        .collect()
}
