//! Everything that is done with an image, done with one that may be forged.
//!
//! It may refuse what it wants; it may not panic, hang, write far out of the file, change a file that is open read-only,
//! or put a guest's bytes over its own metadata.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, UNIX_EPOCH};

use zbdkit_io::{File, IoBuf};
use zbdkit_qcow2::{Backing, Error, Header, Options, Preallocation, Qcow2, Repair, check};

use super::memory::{Below, Memory};
use super::random::Rng;

/// What the guest writes.
const GUEST: u8 = 0xa5;
/// Incompatible bits of zones, which somebody above takes care of.
const ZONES: u64 = 1 << 5 | 1 << 40;
/// No request is longer.
const LONGEST: u64 = 192 << 10;
/// A device that is not larger is read as a whole.
const WHOLE: u64 = 4 << 20;
/// The largest device that anything is preallocated of.
const PREALLOCATED: u64 = 1 << 20;

/// An image and its data file.
#[derive(Clone)]
pub struct Subject {
    /// The image.
    pub image: Memory,
    /// The data file, for those that want one.
    pub data: Memory,
}

impl Subject {
    fn copy(&self) -> Subject {
        Subject {
            image: self.image.copy(),
            data: self.data.copy(),
        }
    }

    async fn open(&self, read_only: bool, rng: &mut Rng) -> Result<Qcow2, Error> {
        let file = self.image.file();
        let header = Header::read(&file).await?;
        let backing = header.backing_file.as_ref().map(|_| {
            let below: Arc<dyn Backing> = Arc::new(Below(512 * rng.below(600)));
            below
        });
        let options = Options {
            read_only,
            l2_cache: [0, 1, 4096][rng.below(3) as usize],
            data_file: header.external_data().then(|| self.data.file()),
            backing,
            known_incompatible: ZONES,
            ..Options::default()
        };
        Qcow2::open(file, header, options).await
    }
}

/// Does everything with an image; the generator decides with which arguments. Whether it could be opened for writing.
pub async fn exercise(subject: &Subject, rng: &mut Rng) -> bool {
    read(subject, rng).await;
    look(subject).await;
    let mut opened = false;
    for _ in 0..2 {
        opened |= change(&subject.copy(), rng).await;
    }
    repair(subject, rng).await;
    opened
}

/// Opens it read-only, reads and maps.
async fn read(subject: &Subject, rng: &mut Rng) {
    let frozen = subject.copy();
    let (image, data) = (frozen.image.freeze(), frozen.data.freeze());
    let frozen = Subject { image, data };
    let Ok(opened) = frozen.open(true, rng).await else {
        return;
    };
    let size = opened.size();
    let mut at = 0;
    for _ in 0..300 {
        if at >= size {
            break;
        }
        match opened.map(at, size - at).await {
            Ok(extent) => {
                assert!(
                    extent.len > 0 && extent.len <= size - at,
                    "an extent of {} bytes",
                    extent.len
                );
                at += extent.len;
            }
            Err(_) => at += opened.cluster_size(),
        }
    }
    let _ = opened.snapshots().await;
    if size <= WHOLE {
        for start in (0..size).step_by(LONGEST as usize) {
            let _ = opened
                .read(IoBuf::alloc(LONGEST.min(size - start) as usize), start)
                .await;
        }
    }
    for _ in 0..20 {
        let (offset, len) = range(&opened, rng);
        let _ = opened.read(IoBuf::alloc(len as usize), offset).await;
    }
    assert!(opened.write(IoBuf::alloc(512), 0).await.is_err());
    let _ = opened.close().await;
}

/// Checks it without changing it.
async fn look(subject: &Subject) {
    let frozen = subject.copy().image.freeze();
    let file = frozen.file();
    let Ok(header) = Header::read_for_check(&file).await else {
        return;
    };
    let _ = header.encode();
    let _ = check(&file, &header, None, &[], Repair::None, &mut |_, _| {}).await;
}

/// Opens it for writing and does everything that changes it.
async fn change(subject: &Subject, rng: &mut Rng) -> bool {
    let Ok(image) = subject.open(false, rng).await else {
        return false;
    };
    for _ in 0..10 + rng.below(20) {
        match rng.below(16) {
            0..=8 => in_flight(&image, rng).await,
            9 => drop(create_snapshot(&image, rng).await),
            10 => {
                if let Some(name) = some_snapshot(&image, rng).await {
                    let _ = image.snapshot_apply(&name, |_| Ok(())).await;
                }
            }
            11 => {
                if let Some(name) = some_snapshot(&image, rng).await {
                    let _ = image.snapshot_delete(&name, |_| Ok(())).await;
                }
            }
            12 => resize(&image, rng).await,
            13 => {
                if let Ok(area) = image.allocate_area(1 + rng.below(100_000)).await {
                    assert_eq!(area % image.cluster_size(), 0);
                    let _ = image.free_area(area, 1).await;
                }
            }
            14 => {
                let changed = image.update_header(|header| {
                    header.set_extension(0x1234_5678, Some(vec![7; 20]));
                    Ok(())
                });
                let _ = changed.await;
            }
            _ => drop(image.flush().await),
        }
    }
    if rng.one_in(2) {
        let _ = image.close().await;
    }
    drop(image);
    guest_is_contained(&subject.image).await;
    true
}

async fn create_snapshot(image: &Qcow2, rng: &mut Rng) -> Result<(), Error> {
    let name = format!("s{}", rng.below(4));
    let now = UNIX_EPOCH + Duration::from_secs(rng.below(1 << 34));
    image.snapshot_create(&name, now, |_, _| Ok(())).await.map(drop)
}

async fn some_snapshot(image: &Qcow2, rng: &mut Rng) -> Option<String> {
    let all = image.snapshots().await.ok()?;
    let number = rng.below(all.len() as u64 + 1) as usize;
    all.get(number).map(|snapshot| match rng.one_in(2) {
        true => snapshot.id.clone(),
        false => snapshot.name.clone(),
    })
}

async fn resize(image: &Qcow2, rng: &mut Rng) {
    let size = match rng.below(4) {
        0 => image.size().saturating_add(512 * rng.below(2000)),
        1 => image.size() / 2 / 512 * 512,
        2 => rng.word(),
        _ => 512 * rng.below(4000),
    };
    let modes = [
        Preallocation::Off,
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ];
    let mut mode = modes[rng.below(4) as usize];
    if size.saturating_sub(image.size()) > PREALLOCATED {
        mode = Preallocation::Off;
    }
    let _ = image.resize(size, rng.one_in(2), mode).await;
}

type Job<'a> = Pin<Box<dyn Future<Output = Result<(), Error>> + 'a>>;

/// Some requests at once, anywhere.
async fn in_flight(image: &Qcow2, rng: &mut Rng) {
    let mut jobs: Vec<Job<'_>> = (0..1 + rng.below(4)).map(|_| request(image, rng)).collect();
    poll_fn(|cx| {
        jobs.retain_mut(|job| job.as_mut().poll(cx).is_pending());
        if jobs.is_empty() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}

fn request<'a>(image: &'a Qcow2, rng: &mut Rng) -> Job<'a> {
    let (offset, len) = range(image, rng);
    let cluster = image.cluster_size();
    let start = offset / cluster * cluster;
    let unmap = rng.one_in(2);
    match rng.below(16) {
        0..=6 => Box::pin(async move {
            let buf = IoBuf::alloc(len as usize);
            buf.fill(0..buf.len(), GUEST);
            image.write(buf, offset).await
        }),
        7..=8 => Box::pin(async move { image.read(IoBuf::alloc(len as usize), offset).await }),
        9 => Box::pin(async move { image.write_zeroes(offset, len, unmap).await }),
        10 => Box::pin(async move { image.discard(offset, len).await }),
        11 => {
            let len = cluster.min(image.size().saturating_sub(start));
            Box::pin(async move { image.write_compressed(&vec![GUEST; len as usize], start).await })
        }
        12 => Box::pin(async move { image.map_ahead(start..start + cluster * 4).await }),
        13 => Box::pin(async move { image.release(start..start + cluster * 2).await }),
        14 => Box::pin(async move { image.drop_ahead(start..start + cluster * 2).await }),
        _ => Box::pin(async move { image.flush().await }),
    }
}

/// A range that is mostly within the device, near one of its ends or where little images have their data.
fn range(image: &Qcow2, rng: &mut Rng) -> (u64, u64) {
    let size = image.size();
    let len = 512 * (1 + rng.below(rng.clone().below(LONGEST / 512) + 1));
    let offset = match rng.below(8) {
        0..=3 => rng.below(size.clamp(1, 1 << 20)),
        4 => size.saturating_sub(rng.below(4 * LONGEST)),
        5 => 0,
        6 => rng.below(size.max(1)),
        _ => rng.word() >> rng.below(64),
    };
    let offset = offset / 512 * 512;
    if rng.one_in(20) {
        return (offset, len);
    }
    (offset.min(size), len.min(size.saturating_sub(offset)))
}

/// The guest's bytes must not have come into the header or into a table that it names.
async fn guest_is_contained(image: &Memory) {
    let header = Header::read_for_check(&image.file()).await;
    let header = header.expect("what could be opened and was not failing still has a header");
    let clusters = header.cluster_size();
    let mut tables = vec![
        (0, clusters, "header"),
        (header.l1_offset, 8 * u64::from(header.l1_size), "L1 table"),
        (
            header.refcount_table_offset,
            u64::from(header.refcount_table_clusters) * clusters,
            "refcount table",
        ),
    ];
    let l1 = image.read(header.l1_offset, 8 * (header.l1_size as usize).min(4096));
    for entry in l1.chunks_exact(8) {
        let entry = u64::from_be_bytes(entry.try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
        if entry != 0 {
            tables.push((entry, clusters, "L2 table"));
        }
    }
    for (offset, len, what) in tables {
        let bytes = image.read(offset, len.min(1 << 20) as usize);
        let guest = bytes
            .chunks(512)
            .position(|sector| sector.iter().all(|byte| *byte == GUEST));
        assert!(guest.is_none(), "the guest's bytes are in the {what} at {offset}");
    }
}

/// Repairs it; what counts as repaired then is sound.
async fn repair(subject: &Subject, rng: &mut Rng) {
    for aim in [Repair::Leaks, Repair::All] {
        let copy = subject.copy();
        let file = copy.image.file();
        let Some(report) = checked(&file, aim).await else {
            continue;
        };
        let Some(again) = checked(&file, Repair::None).await else {
            panic!("after {aim:?} it has no header any more");
        };
        assert!(
            again.corruptions <= report.corruptions && again.leaks <= report.leaks,
            "after {aim:?}: {report:?}, and then {again:?}"
        );
        if aim == Repair::All {
            read(&copy, rng).await;
            change(&copy, rng).await;
        }
    }
}

async fn checked(file: &File, aim: Repair) -> Option<zbdkit_qcow2::CheckReport> {
    let header = Header::read_for_check(file).await.ok()?;
    check(file, &header, None, &[], aim, &mut |_, _| {}).await.ok()
}
