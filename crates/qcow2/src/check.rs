//! Checking an image, and repairing it.
//!
//! A pass follows everything that refers to clusters, counts the references, and compares them with the refcounts in
//! the file; then it looks whether the flags that allow writing in place agree with those. It reads the file itself and
//! needs no opened image. It believes nothing: work and memory follow the bytes that the file really has.
//!
//! What it says is what `qemu-img check` says of the same damage, mostly in the same words. Beyond that it finds
//! metadata that lies on other metadata or data, clusters of an external data file in wrong places, flags that version
//! or features of the image do not have, and refcounts past the end of the file.

mod counts;
mod disk;
mod entries;
mod extras;
mod found;
mod references;
mod repair;

pub(crate) use extras::zone_table;

use std::ops::Range;

use zbdkit_io::File;
use zbdkit_spec::qcow2::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_ZONE_TABLE, CRYPT_NONE, INCOMPAT_CORRUPT, INCOMPAT_DIRTY,
    INCOMPAT_ZONE_STATES, INCOMPAT_ZONED,
};

use crate::error::Error;
use crate::header::Header;
use crate::image::{file_len, read_at, write_at};
use crate::snapshot::table;
use counts::Use;
use disk::{Differences, Disk};
use found::Found;
use references::{L1, References};
use repair::{Aim, Flags, Way};

/// What a check repairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    None,
    /// Clusters that are counted more often than they are referred to, where all references are known.
    Leaks,
    /// All that can be repaired.
    All,
}

/// What a check found. After a repair, what a second look found, and what the first one repaired.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Contradictions that put data at risk.
    pub corruptions: u64,
    /// Clusters with space that nothing refers to.
    pub leaks: u64,
    /// Contradictions that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Places that could not be checked.
    pub check_errors: u64,
    /// Where the used part of the file ends, bytes.
    pub image_end_offset: u64,
    /// Clusters of the device.
    pub total_clusters: u64,
    /// Those with data.
    pub allocated_clusters: u64,
    /// Those that do not follow the one before them in the file.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
    /// What was found and repaired, in QEMU's words; a bounded number of lines.
    pub messages: Vec<String>,
    /// What the second look after a repair found; `None` where nothing was repaired.
    pub rechecked: Option<Vec<String>>,
}

/// Checks an image, and repairs what is asked for.
///
/// `header` may come from [`Header::read_for_check`]. A repair changes the header in the file, so it has to be read
/// again afterwards. `areas` are bytes of the file that extensions name beyond what the format itself knows; whoever
/// leaves out one must not repair. `progress` is told what is done, and of how much.
///
/// # Errors
/// Where the image has incompatible features that are not known here; where the file cannot be written or synced during a repair, or its length not be read. What cannot be read is
/// counted in [`CheckReport::check_errors`].
pub async fn check(
    file: &File,
    header: &Header,
    _data: Option<&File>,
    areas: &[(Range<u64>, &'static str)],
    repair: Repair,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CheckReport, Error> {
    // What is encrypted is so in the data only.
    let mut plain = header.clone();
    plain.crypt_method = CRYPT_NONE;
    plain.check_features(INCOMPAT_ZONED | INCOMPAT_ZONE_STATES)?;
    let mut image = Image {
        file,
        header: header.clone(),
        len: file_len(file)?,
        writes: 0,
    };
    let mut report = pass(&mut image, areas, repair, progress).await?;
    if report.leaks_fixed + report.corruptions_fixed > 0 {
        image.len = file_len(file)?;
        let again = pass(&mut image, areas, Repair::None, progress).await?;
        report = CheckReport {
            corruptions_fixed: report.corruptions_fixed,
            leaks_fixed: report.leaks_fixed,
            messages: report.messages,
            rechecked: Some(again.messages),
            ..again
        };
    }
    if repair != Repair::None && report.corruptions == 0 && report.check_errors == 0 {
        image.clear_bits().await?;
    }
    Ok(report)
}

/// The image as a check sees it.
struct Image<'a> {
    file: &'a File,
    header: Header,
    /// Length of the file, bytes.
    len: u64,
    /// Writes so far.
    writes: u64,
}

impl Image<'_> {
    fn cluster_size(&self) -> u64 {
        self.header.cluster_size()
    }

    fn is_aligned(&self, offset: u64) -> bool {
        offset.is_multiple_of(self.cluster_size())
    }

    /// Big-endian words of the file.
    async fn words(&self, offset: u64, n: u64) -> Result<Vec<u64>, Error> {
        let bytes = read_at(self.file, offset, n as usize * 8).await?;
        let word = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
        Ok(bytes.chunks_exact(8).map(word).collect())
    }

    /// Writes whole clusters.
    async fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        if self.writes == 0 {
            self.clear_autoclear().await?;
        }
        self.writes += 1;
        self.put(offset, bytes).await
    }

    async fn put(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        write_at(self.file, offset, bytes).await
    }

    async fn sync(&self) -> Result<(), Error> {
        let synced = self.file.datasync().await;
        synced.map_err(|e| Error::io("syncing metadata", &e))
    }

    /// Changes bytes of the header's first sector, in one write, synced.
    async fn patch(&self, at: usize, bytes: &[u8]) -> Result<(), Error> {
        let sector = self.file.direct_align().unwrap_or(1).max(512) as usize;
        let mut header = read_at(self.file, 0, sector).await?;
        header[at..at + bytes.len()].copy_from_slice(bytes);
        self.put(0, &header).await?;
        self.sync().await
    }

    /// Refcount table and snapshot table: bytes 48 to 72.
    async fn write_tables(&mut self) -> Result<(), Error> {
        self.writes += 1;
        let header = &self.header;
        let bytes = [
            &header.refcount_table_offset.to_be_bytes()[..],
            &header.refcount_table_clusters.to_be_bytes(),
            &header.nb_snapshots.to_be_bytes(),
            &header.snapshots_offset.to_be_bytes(),
        ];
        self.patch(48, &bytes.concat()).await
    }

    /// Clears what says that the image may be damaged.
    async fn clear_bits(&mut self) -> Result<(), Error> {
        let clean = self.header.incompatible & !(INCOMPAT_DIRTY | INCOMPAT_CORRUPT);
        if self.header.version < 3 || clean == self.header.incompatible {
            return Ok(());
        }
        self.clear_autoclear().await?;
        self.sync().await?;
        self.header.incompatible = clean;
        self.patch(72, &clean.to_be_bytes()).await
    }

    /// Who writes must clear the autoclear features that he does not know. A repair leaves bitmaps and zone tables as
    /// true as they were.
    async fn clear_autoclear(&mut self) -> Result<(), Error> {
        let known = AUTOCLEAR_BITMAPS | AUTOCLEAR_ZONE_TABLE;
        if self.header.version >= 3 && self.header.clear_unknown_autoclear(known) {
            self.patch(88, &self.header.autoclear.to_be_bytes()).await?;
        }
        Ok(())
    }
}

/// How far a pass is.
struct Progress<'a> {
    done: u64,
    total: u64,
    told: &'a mut dyn FnMut(u64, u64),
}

impl Progress<'_> {
    fn step(&mut self, n: u64) {
        self.done = (self.done + n).min(self.total);
        (self.told)(self.done, self.total);
    }
}

async fn pass(
    image: &mut Image<'_>,
    areas: &[(Range<u64>, &'static str)],
    repair: Repair,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CheckReport, Error> {
    let mut found = Found::default();
    let mut refs = References::default();
    let header = &image.header;
    found.report.total_clusters = header.size.div_ceil(image.cluster_size());
    refs.mark(image, &mut found, (0, image.cluster_size()), 1, Use::Header);
    let l1 = L1 {
        offset: header.l1_offset,
        entries: header.l1_size,
        for_what: Use::L1,
    };
    refs.l1(image, &mut found, l1).await;
    let (snapshots_len, rewrite) = refs.snapshots(image, &mut found).await;
    refs.extensions(image, &mut found);
    refs.bitmaps(image, &mut found).await;
    refs.areas(image, &mut found, areas);

    // Tables are read twice, and the refcounts in between.
    let tables = refs.tables.len() as u64;
    let blocks = (image.len / image.cluster_size()).div_ceil(header.refcounts_per_block());
    let mut progress = Progress {
        done: 0,
        total: 2 * tables + blocks,
        told: progress,
    };
    let all = repair == Repair::All;
    refs.l2(image, &mut found, all, &mut progress).await?;
    let mut disk = match Disk::read(image, &mut refs, &mut found).await {
        Ok(disk) => disk,
        Err(e) => {
            found.error(format_args!("ERROR the refcount table cannot be read: {e}"));
            return Ok(found.into_report());
        }
    };
    let differences = disk.compare(image, &refs, &mut found, &mut progress).await;
    found.report.image_end_offset = (differences.highest + 1) * image.cluster_size();
    let mut work = Work {
        aim: Aim {
            repair,
            incomplete: refs.incomplete,
            max: disk.max(),
        },
        refs,
        disk,
        differences,
        found,
    };
    let rewrite = rewrite.map(|entries| table::encode(&entries)).transpose()?;
    work.finish(image, (snapshots_len, rewrite), &mut progress)
        .await?;
    progress.step(u64::MAX / 2);
    Ok(work.found.into_report())
}

/// What is left to do once everything was looked at.
struct Work {
    aim: Aim,
    refs: References,
    disk: Disk,
    differences: Differences,
    found: Found,
}

impl Work {
    async fn finish(
        &mut self,
        image: &mut Image<'_>,
        snapshots: (u64, Option<Vec<u8>>),
        progress: &mut Progress<'_>,
    ) -> Result<(), Error> {
        match self.aim.repair {
            Repair::None => self.flags(image, false, progress).await.map(drop),
            Repair::Leaks => {
                if !self.aim.incomplete && !self.disk.damaged {
                    self.lower(image).await?;
                } else {
                    // Counts stay, and flags are judged by those.
                    self.aim.repair = Repair::None;
                }
                let report = &self.found.report;
                let rest = report.leaks + report.corruptions + report.check_errors;
                self.flags(image, rest == 0, progress).await.map(drop)
            }
            Repair::All => self.repair(image, snapshots, progress).await,
        }
    }

    async fn repair(
        &mut self,
        image: &mut Image<'_>,
        snapshots: (u64, Option<Vec<u8>>),
        progress: &mut Progress<'_>,
    ) -> Result<(), Error> {
        if self.disk.damaged || self.differences.homeless || snapshots.1.is_some() {
            self.rebuild(image, snapshots).await?;
            return self.flags(image, true, progress).await.map(drop);
        }
        let (raised, _) = self.correct(image, Way::Up).await?;
        self.found.fixed(raised);
        let later = self.flags(image, true, progress).await?;
        if !self.aim.incomplete {
            self.lower(image).await?;
        }
        if later > 0 {
            self.flags(image, true, progress).await?;
        }
        Ok(())
    }

    async fn correct(&mut self, image: &mut Image<'_>, way: Way) -> Result<(u64, Vec<Range<u64>>), Error> {
        let (refs, disk, found) = (&self.refs, &mut self.disk, &mut self.found);
        repair::correct(image, refs, disk, found, &self.differences, way).await
    }

    async fn lower(&mut self, image: &mut Image<'_>) -> Result<(), Error> {
        let (lowered, freed) = self.correct(image, Way::Down).await?;
        if lowered > 0 {
            self.found.fixed_leaks();
        }
        repair::punch(image, freed).await;
        Ok(())
    }

    async fn rebuild(
        &mut self,
        image: &mut Image<'_>,
        snapshots: (u64, Option<Vec<u8>>),
    ) -> Result<(), Error> {
        self.found.say(format_args!("Rebuilding refcount structure"));
        let (refs, disk) = (&mut self.refs, &mut self.disk);
        if !repair::rebuild(image, refs, disk, self.aim, snapshots).await? {
            self.found.error(format_args!(
                "ERROR the new refcount table would be larger than 8 MiB: the image needs wider clusters"
            ));
            return Ok(());
        }
        let found = &mut self.found;
        found.fixed(found.structure + found.low + found.snapshot_entries);
        found.report.check_errors -= found.unreadable_blocks;
        if !self.aim.incomplete {
            found.fixed_leaks();
        }
        Ok(())
    }

    /// Returns how many flags have to wait for lower counts.
    async fn flags(
        &mut self,
        image: &mut Image<'_>,
        repair: bool,
        progress: &mut Progress<'_>,
    ) -> Result<u64, Error> {
        let mut flags = Flags {
            aim: self.aim,
            repair,
            refs: &self.refs,
            disk: &mut self.disk,
            found: &mut self.found,
            external: image.header.external_data(),
            later: 0,
        };
        flags.go(image, progress).await?;
        Ok(flags.later)
    }
}
