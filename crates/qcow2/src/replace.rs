//! Changing an image's header in place, so that a cut at any moment leaves the old one or the new one.
//!
//! A device writes a sector wholly or not, and what a header says lies in the first one but for the rest of its
//! extensions and the name of the backing image. So the change is a series of cluster contents, synced one after the
//! other, each of which differs from the one before it in the first sector alone, or only behind it, where nothing
//! that the first sector leads to changes:
//!
//! 1. the present name is copied to where nothing of the new header will lie, if it is in the way; the first sector
//!    then leads there;
//! 2. the first sector's extensions end before the feature name table, which often reaches into the next sector and
//!    is only for error messages;
//! 3. all behind the first sector is as it will be, besides the present name;
//! 4. the first sector is the new one;
//! 5. the old name's bytes go.
//!
//! What has no room for that (small clusters), or other extensions that reach behind the first sector, is changed with
//! fewer steps, and a power cut in that moment can damage it.

use std::ops::Range;

use zbdkit_io::File;
use zbdkit_spec::qcow2 as spec;

use super::sectors::{Sectors, read_at};
use crate::error::Error;
use crate::header::Header;

/// What a device writes wholly or not.
const SECTOR: usize = 512;

/// Where the header says where the name of the backing image lies, and how long it is.
const NAME_OFFSET: Range<usize> = 8..16;
const NAME_LEN: Range<usize> = 16..20;
/// Where a version 3 header says how long it is.
const HEADER_LEN: Range<usize> = 100..104;

/// Writes a new header over the one in the file, whoever wrote that one.
pub(crate) async fn replace_header(file: &File, sectors: Sectors, new: &Header) -> Result<(), Error> {
    let sync = || async {
        file.datasync()
            .await
            .map_err(|e| Error::io("syncing the header", &e))
    };
    let new = new.encode()?;
    let mut now = read_at(file, 0, new.len()).await?;
    sync().await?;
    let align = (sectors.align as usize).min(new.len());
    for next in steps(&now, &new) {
        for at in (0..next.len()).step_by(align) {
            if now[at..at + align] != next[at..at + align] {
                sectors.write(file, 0, &next, at..at + align).await?;
            }
        }
        sync().await?;
        now = next;
    }
    Ok(())
}

/// The contents of the header's cluster on the way from one to another.
fn steps(present: &[u8], new: &[u8]) -> Vec<Vec<u8>> {
    let mut steps = Vec::new();
    let mut now = present.to_vec();
    let mut step = |now: &mut Vec<u8>, next: Vec<u8>| {
        if *now != next {
            steps.push(next.clone());
            *now = next;
        }
    };
    if new.len() > SECTOR && present.get(SECTOR..) != new.get(SECTOR..) {
        let mut kept = name(&now);
        if let Some(old) = &kept
            && let Some(place) = aside(old, &now, new)
        {
            let mut next = now.clone();
            next.copy_within(old.clone(), place.start);
            step(&mut now, next.clone());
            next[NAME_OFFSET].copy_from_slice(&(place.start as u64).to_be_bytes());
            step(&mut now, next);
            kept = Some(place);
        }
        if let Some(first) = without_names(&now) {
            let mut next = now.clone();
            next[..SECTOR].copy_from_slice(&first);
            step(&mut now, next);
        }
        let mut next = new.to_vec();
        next[..SECTOR].copy_from_slice(&now[..SECTOR]);
        if let Some(kept) = kept.map(|kept| kept.start.max(SECTOR)..kept.end)
            && kept.start < kept.end
            && (kept.start >= used(new) || now[kept.clone()] == new[kept.clone()])
        {
            next[kept.clone()].copy_from_slice(&now[kept]);
        }
        let mut last = next.clone();
        step(&mut now, next);
        last[..SECTOR].copy_from_slice(&new[..SECTOR]);
        step(&mut now, last);
    }
    step(&mut now, new.to_vec());
    steps
}

/// A place for the present name where neither it nor anything of the new header lies; `None` where it is not in the way,
/// or there is no room.
fn aside(old: &Range<usize>, now: &[u8], new: &[u8]) -> Option<Range<usize>> {
    let behind = old.start.max(SECTOR).min(old.end)..old.end;
    if behind.start >= used(new) || now[behind.clone()] == new[behind] {
        return None;
    }
    let start = old.end.max(used(new)).max(SECTOR).next_multiple_of(8);
    let place = start..start + old.len();
    (place.end <= new.len()).then_some(place)
}

/// Where the name of the backing image lies.
fn name(cluster: &[u8]) -> Option<Range<usize>> {
    let offset = usize::try_from(u64::from_be_bytes(cluster.get(NAME_OFFSET)?.try_into().ok()?)).ok()?;
    let len = u32::from_be_bytes(cluster.get(NAME_LEN)?.try_into().ok()?) as usize;
    let end = offset.checked_add(len).filter(|end| *end <= cluster.len())?;
    (offset != 0 && len != 0).then_some(offset..end)
}

/// Where an encoded header ends, name and all.
fn used(cluster: &[u8]) -> usize {
    let extensions = extensions(cluster).last().map(|(_, range)| range.end);
    let name = name(cluster).map(|name| name.end);
    // With the mark of the end.
    (extensions.or(header_len(cluster)).unwrap_or(cluster.len()) + 8).max(name.unwrap_or(0))
}

/// The extensions before the mark of their end: what each is, and where it lies with its head and padding.
fn extensions(cluster: &[u8]) -> impl Iterator<Item = (u32, Range<usize>)> + '_ {
    let mut next = header_len(cluster);
    std::iter::from_fn(move || {
        let at = next?;
        let word = |at: usize| Some(u32::from_be_bytes(cluster.get(at..at + 4)?.try_into().ok()?));
        let (magic, len) = (word(at)?, word(at + 4)? as usize);
        if magic == spec::EXT_END {
            return None;
        }
        let end = at.checked_add(8)?.checked_add(len)?.checked_next_multiple_of(8)?;
        next = Some(end);
        (end <= cluster.len()).then_some((magic, at..end))
    })
}

/// The first sector with the same extensions but the feature name table; `None` where they do not fit there.
fn without_names(cluster: &[u8]) -> Option<Vec<u8>> {
    let mut first = cluster.get(..header_len(cluster)?)?.to_vec();
    for (_, range) in extensions(cluster).filter(|(magic, _)| *magic != spec::EXT_FEATURE_NAMES) {
        first.extend_from_slice(&cluster[range]);
    }
    first.extend_from_slice(&[0; 8]);
    let end = first.len();
    if end > SECTOR {
        return None;
    }
    first.resize(SECTOR, 0);
    match name(cluster) {
        Some(name) if name.start < end => return None,
        Some(name) if name.start < SECTOR => {
            let here = name.start..name.end.min(SECTOR);
            first[here.clone()].copy_from_slice(&cluster[here]);
        }
        _ => {}
    }
    Some(first)
}

fn header_len(cluster: &[u8]) -> Option<usize> {
    let version = u32::from_be_bytes(cluster.get(4..8)?.try_into().ok()?);
    match version {
        2 => Some(spec::V2_HEADER_LEN),
        _ => Some(u32::from_be_bytes(cluster.get(HEADER_LEN)?.try_into().ok()?) as usize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = 1 << 40;

    fn header(backing: Option<&str>, format: Option<&str>) -> Header {
        let mut header = Header::new(12);
        header.size = 1 << 20;
        header.l1_size = 1;
        header.l1_offset = 3 << 12;
        header.refcount_table_offset = 1 << 12;
        header.refcount_table_clusters = 1;
        header.backing_file = backing.map(str::to_owned);
        header.set_extension(spec::EXT_BACKING_FORMAT, format.map(|f| f.as_bytes().to_vec()));
        header
    }

    type Meaning = (Option<String>, Option<String>, u64, u64, usize);

    /// What a reader goes by.
    fn meaning(cluster: &[u8]) -> Result<Meaning, String> {
        let header = Header::decode(cluster, LEN).map_err(|e| e.to_string())?;
        Ok((
            header.backing_file.clone(),
            header.backing_format().map(str::to_owned),
            header.size,
            header.autoclear,
            header.extensions.len(),
        ))
    }

    /// Every state that a cut can leave on the way is the old header or the new one.
    #[track_caller]
    fn check(present: &[u8], new: &Header) {
        let encoded = new.encode().unwrap();
        let (before, after) = (meaning(present).unwrap(), meaning(&encoded).unwrap());
        let steps = steps(present, &encoded);
        let mut now = present.to_vec();
        for next in &steps {
            let changed: Vec<usize> = (0..now.len() / SECTOR)
                .filter(|sector| now[sector * SECTOR..][..SECTOR] != next[sector * SECTOR..][..SECTOR])
                .collect();
            assert!(
                !changed.is_empty() && (changed == [0] || changed[0] != 0),
                "{changed:?}"
            );
            for torn in 0..1u32 << changed.len() {
                let mut left = now.clone();
                for (i, sector) in changed.iter().enumerate() {
                    if torn & 1 << i != 0 {
                        let range = sector * SECTOR..(sector + 1) * SECTOR;
                        left[range.clone()].copy_from_slice(&next[range]);
                    }
                }
                let left = meaning(&left);
                assert!(
                    left == Ok(before.clone()) || left == Ok(after.clone()),
                    "{left:?}"
                );
            }
            now = next.clone();
        }
        assert_eq!(now, encoded);
    }

    #[test]
    fn names_of_backing_images_change_at_once() {
        let long = "x".repeat(900);
        let names = [None, Some("base.qcow2"), Some("another/base.raw"), Some(&*long)];
        for old in names {
            for new in names {
                for (old_format, new_format) in [("raw", "qcow2"), ("qcow2", "qcow2")] {
                    let format = |name: Option<&str>, format| name.map(|_| format);
                    let present = header(old, format(old, old_format)).encode().unwrap();
                    check(&present, &header(new, format(new, new_format)));
                }
            }
        }
    }

    #[test]
    fn extensions_that_move_the_name_change_at_once() {
        let present = header(Some("base.qcow2"), Some("qcow2"));
        for len in (8..=160).step_by(8) {
            let mut new = present.clone();
            new.set_extension(0x1234_5678, Some(vec![7; len]));
            new.autoclear = 1 << 40;
            check(&present.encode().unwrap(), &new);
            check(&new.encode().unwrap(), &present);
        }
    }

    #[test]
    fn a_header_that_somebody_else_wrote_is_replaced_as_it_lies_there() {
        // As QEMU writes it: more feature names, so that the name lies elsewhere.
        let old = header(Some("base.qcow2"), Some("qcow2"));
        let encoded = old.encode().unwrap();
        let place = name(&encoded).unwrap();
        for shift in [8, 48, 96, 600] {
            let mut present = encoded.clone();
            present.copy_within(place.clone(), place.start + shift);
            present[place.start..place.start + shift.min(place.len())].fill(0);
            let offset = (place.start + shift) as u64;
            present[NAME_OFFSET].copy_from_slice(&offset.to_be_bytes());
            if shift < place.len() {
                let bytes = encoded[place.clone()].to_vec();
                present[place.start + shift..][..bytes.len()].copy_from_slice(&bytes);
            }
            let mut new = old.clone();
            new.size = 2 << 20;
            check(&present, &new);
        }
    }

    #[test]
    fn a_name_in_the_first_sector_goes_with_it() {
        // Without a feature name table, as others may leave it out.
        let mut old = header(Some("base.qcow2"), Some("qcow2")).encode().unwrap();
        let (present, end) = (name(&old).unwrap(), header_len(&old).unwrap());
        let moved = end + 24..end + 24 + present.len();
        let bytes = old[present].to_vec();
        old[end..].fill(0);
        old[moved.clone()].copy_from_slice(&bytes);
        old[NAME_OFFSET].copy_from_slice(&(moved.start as u64).to_be_bytes());
        for new in [header(Some("another/base.raw"), Some("raw")), header(None, None)] {
            check(&old, &new);
        }
    }

    #[test]
    fn a_change_in_the_first_sector_is_one_write() {
        let old = header(Some("base.qcow2"), Some("qcow2"));
        let mut new = old.clone();
        new.incompatible = 1;
        assert_eq!(steps(&old.encode().unwrap(), &new.encode().unwrap()).len(), 1);
        assert!(steps(&old.encode().unwrap(), &old.encode().unwrap()).is_empty());
    }

    #[test]
    fn small_clusters_are_one_sector() {
        let mut old = header(Some("a"), Some("raw"));
        old.cluster_bits = 9;
        let mut new = old.clone();
        new.backing_file = Some("another".into());
        let (old, new) = (old.encode().unwrap(), new.encode().unwrap());
        assert_eq!(steps(&old, &new), [new]);
    }
}
