//! The power fails, or the process dies, while an image is written, zeroed, discarded, mapped ahead, released, flushed and
//! closed by requests in flight together.
//!
//! Each sector must hold what was written to it last before a flush that ended in time, or what came after that; after the
//! death of the process what was acknowledged last, or what was in flight. Snapshots are as they were, and check finds
//! leaks at most.

mod support;

use std::cell::RefCell;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::SystemTime;

use support::crash::{Bytes, Disk};
use support::power::{Below, Contents, open_with, take_both_apart};
use support::{Rng, block_on};
use zbdkit_io::IoBuf;
use zbdkit_qcow2::{Backing, Error, Layout, Qcow2, create};

const SECTOR: u64 = 512;

/// Who wrote a sector: 0 for zeros, else the number of a request.
type Tag = u16;

/// What the backing image is tagged with.
const BELOW: Tag = Tag::MAX;

/// The bytes of a sector that this request wrote.
fn sector(tag: Tag, number: u64) -> Vec<u8> {
    if tag == 0 {
        return vec![0; SECTOR as usize];
    }
    let [a, b] = tag.to_le_bytes();
    [a, b, number as u8, (number >> 8) as u8].repeat(SECTOR as usize / 4)
}

fn data(tag: Tag, sectors: Range<u64>) -> Vec<u8> {
    sectors.flat_map(|number| sector(tag, number)).collect()
}

/// A request that changed sectors.
struct Change {
    sectors: Range<u64>,
    tag: Tag,
    /// Moments of the disk.
    started: usize,
    ended: Option<usize>,
}

/// All that was asked of the image.
#[derive(Default)]
struct Log {
    changes: Vec<Change>,
    /// When flushes were asked for and when they ended.
    flushes: Vec<(usize, usize)>,
}

/// How the image comes to an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Power,
    Kill,
}

impl Log {
    /// What a sector may hold after that end at a moment. `first`: what it held at the beginning.
    fn allowed(&self, number: u64, first: Tag, end: End, moment: usize) -> Vec<Tag> {
        let durable = |change: &Change| match end {
            End::Kill => change.ended.is_some_and(|ended| ended <= moment),
            End::Power => change.ended.is_some_and(|ended| {
                let covers = |(asked, done): &(usize, usize)| ended <= *asked && *done <= moment;
                self.flushes.iter().any(covers)
            }),
        };
        let mut tags = vec![first];
        for change in &self.changes {
            if change.sectors.contains(&number) && change.started <= moment {
                if durable(change) {
                    tags.clear();
                }
                tags.push(change.tag);
            }
        }
        tags
    }
}

/// One sequence of requests on an image.
struct Run {
    layout: Layout,
    seed: u64,
    backing: Option<Arc<dyn Backing>>,
    disk: Disk,
    /// The data's own file.
    data: Option<Disk>,
    /// What each sector holds, as far as all requests are done.
    tags: Vec<Tag>,
    next: Tag,
    /// Where something was done lately, which the next requests may run into.
    hot: u64,
    log: RefCell<Log>,
    rng: Rng,
}

type Job<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Polls all of them until all have ended.
async fn all(mut jobs: Vec<Job<'_>>) {
    std::future::poll_fn(|cx| {
        jobs.retain_mut(|job| job.as_mut().poll(cx).is_pending());
        if jobs.is_empty() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}

#[derive(Clone, Copy, Debug)]
enum Request {
    Write,
    Compressed,
    Zero { unmap: bool },
    Discard,
    Release,
    MapAhead,
    Flush,
}

impl Run {
    /// An image that holds something, with a snapshot or without.
    fn new(mut layout: Layout, seed: u64) -> Run {
        let sectors = layout.size / SECTOR;
        let backing = layout.backing.is_some().then(|| {
            // Not as long as the device.
            Arc::new(Below(data(BELOW, 0..sectors * 3 / 4))) as Arc<dyn Backing>
        });
        layout.backing = layout.backing.map(|_| ("below".into(), Some("raw".into())));
        let first = |number| {
            if backing.is_some() && number < sectors * 3 / 4 {
                BELOW
            } else {
                0
            }
        };
        let disk = Disk::new();
        let data = layout.data_file.is_some().then(|| disk.beside(Bytes::default()));
        let data_file = data.as_ref().map(Disk::file);
        block_on(create(&disk.file(), data_file.as_ref(), &layout)).unwrap();
        let mut run = Run {
            layout,
            seed,
            tags: (0..sectors).map(first).collect(),
            backing,
            disk,
            data,
            next: 1,
            hot: 0,
            log: RefCell::default(),
            rng: Rng(seed),
        };
        run.go(4);
        if run.rng.one_in(2) && run.data.is_none() {
            block_on(async {
                let image = run.open().await;
                let made = image
                    .snapshot_create("s", SystemTime::UNIX_EPOCH, |_, _| Ok(()))
                    .await;
                made.unwrap();
                image.close().await.unwrap();
            });
            run.go(1);
        }
        let data = run.data.map(|data| data.now());
        run.disk = Disk::of(run.disk.now());
        run.data = data.map(|data| run.disk.beside(data));
        run.log = RefCell::default();
        run
    }

    async fn open(&self) -> Qcow2 {
        open_with(&self.disk, self.data.as_ref(), self.backing.clone())
            .await
            .unwrap()
    }

    /// Opens the image, has some batches of requests carried out, and closes it.
    fn go(&mut self, batches: usize) {
        let disk = self.disk.clone();
        let seed = self.rng.word();
        block_on(async {
            let image = self.open().await;
            disk.delay(seed);
            self.data.iter().for_each(|data| data.delay(seed ^ 1));
            for _ in 0..batches {
                self.batch(&image).await;
            }
            let asked = disk.moment();
            image.close().await.unwrap();
            self.log.borrow_mut().flushes.push((asked, disk.moment()));
        });
    }

    /// Requests that do not touch each other's sectors, all at once.
    async fn batch(&mut self, image: &Qcow2) {
        let sectors = self.tags.len() as u64;
        let slots = 1 + self.rng.below(6);
        let mut jobs: Vec<Job<'_>> = Vec::new();
        let mut planned = Vec::new();
        let mut at = match self.rng.one_in(2) {
            true => self.hot,
            false => self.rng.below(sectors / 2),
        };
        for _ in 0..slots {
            let most = (sectors - at).min(1 + 4 * self.layout.cluster_size / SECTOR);
            if most == 0 {
                break;
            }
            let range = at..at + 1 + self.rng.below(most);
            at = range.end + self.rng.below(3 * self.layout.cluster_size / SECTOR);
            planned.push(self.plan(range));
            if at >= sectors {
                break;
            }
        }
        self.hot = planned[self.rng.below(planned.len() as u64) as usize].1.start;
        if self.rng.one_in(3) {
            planned.push((Request::Flush, 0..0, 0));
        }
        let this = &*self;
        for (request, range, tag) in &planned {
            jobs.push(Box::pin(this.carry_out(image, *request, range.clone(), *tag)));
        }
        all(jobs).await;
        for (request, range, tag) in planned {
            if !matches!(request, Request::Flush | Request::MapAhead) {
                self.tags[range.start as usize..range.end as usize].fill(tag);
            }
        }
    }

    /// Chooses what is done with sectors, and makes their range fit that.
    fn plan(&mut self, range: Range<u64>) -> (Request, Range<u64>, Tag) {
        let per_cluster = self.layout.cluster_size / SECTOR;
        let whole = range.start.next_multiple_of(per_cluster)..range.end / per_cluster * per_cluster;
        let zeros = |tags: &[Tag]| tags.iter().all(|tag| *tag == 0);
        let request = match self.rng.below(12) {
            0 => Request::Zero { unmap: false },
            1 => Request::Zero { unmap: true },
            2 | 3 if !whole.is_empty() => Request::Discard,
            4 if !whole.is_empty() => Request::Release,
            5 if !whole.is_empty() && zeros(&self.tags[whole.start as usize..whole.end as usize]) => {
                Request::MapAhead
            }
            // Narrow refcounts leave no room for a snapshot of compressed clusters that share one of the file's.
            6 if !whole.is_empty() && self.layout.refcount_bits > 4 && self.data.is_none() => {
                Request::Compressed
            }
            _ => Request::Write,
        };
        // Version 2 cannot say that a cluster hides the backing image.
        let cannot = self.layout.version < 3 && self.backing.is_some();
        match request {
            Request::Discard | Request::Release if cannot => (Request::Flush, 0..0, 0),
            Request::Discard | Request::Release | Request::MapAhead => (request, whole, 0),
            Request::Zero { .. } => (request, range, 0),
            Request::Compressed => {
                self.next += 1;
                (request, whole.start..whole.start + per_cluster, self.next)
            }
            Request::Write | Request::Flush => {
                self.next += 1;
                (request, range, self.next)
            }
        }
    }

    async fn carry_out(&self, image: &Qcow2, request: Request, range: Range<u64>, tag: Tag) {
        let started = self.disk.moment();
        let bytes = range.start * SECTOR..range.end * SECTOR;
        let len = bytes.end - bytes.start;
        let index = {
            let mut log = self.log.borrow_mut();
            log.changes.push(Change {
                sectors: range.clone(),
                tag,
                started,
                ended: None,
            });
            log.changes.len() - 1
        };
        let done: Result<(), Error> = match request {
            Request::Write => image.write(IoBuf::from_vec(data(tag, range)), bytes.start).await,
            Request::Compressed => image.write_compressed(&data(tag, range), bytes.start).await,
            Request::Zero { unmap } => image.write_zeroes(bytes.start, len, unmap).await,
            Request::Discard => image.discard(bytes.start, len).await,
            Request::Release => image.release(bytes).await,
            Request::MapAhead => image.map_ahead(bytes).await,
            Request::Flush => image.flush().await,
        };
        done.unwrap();
        let ended = self.disk.moment();
        let mut log = self.log.borrow_mut();
        match request {
            Request::Flush => log.flushes.push((started, ended)),
            _ => log.changes[index].ended = Some(ended),
        }
    }

    /// Ends the run at some of its moments, and judges what is left.
    fn cut(&mut self, cuts: u64) -> u64 {
        let first = self.tags.clone();
        let before = self
            .take_apart(self.disk.now(), self.data.as_ref().map(Disk::now))
            .unwrap_or_else(|why| panic!("{:?}, seed {}: {why}", self.layout, self.seed));
        self.go(6);
        let last = self.disk.moment();
        let mut states = 0;
        for cut in 0..cuts {
            let moment = self.disk.some_moment(&mut self.rng);
            let end = if cut % 4 == 0 { End::Kill } else { End::Power };
            let left = |disk: &Disk, rng: &mut Rng| match end {
                End::Kill => disk.kill(moment),
                End::Power => disk.power_cut(moment, rng),
            };
            let image = left(&self.disk, &mut self.rng);
            let data = self.data.as_ref().map(|data| left(data, &mut self.rng));
            if let Err(why) = self.judge((image, data), &first, &before, end, moment) {
                panic!(
                    "{:?}, seed {}, {end:?} at moment {moment} of {last}: {why}",
                    self.layout, self.seed
                );
            }
            states += 1;
        }
        states
    }

    fn take_apart(&self, image: Bytes, data: Option<Bytes>) -> Result<Contents, String> {
        block_on(take_both_apart(image, data, self.backing.clone()))
    }

    fn judge(
        &self,
        (image, data): (Bytes, Option<Bytes>),
        first: &[Tag],
        before: &Contents,
        end: End,
        moment: usize,
    ) -> Result<(), String> {
        let found = self.take_apart(image, data)?;
        if found.snapshots != before.snapshots {
            return Err("a snapshot is not what it was".into());
        }
        let log = self.log.borrow();
        for (number, bytes) in found.disk.chunks_exact(SECTOR as usize).enumerate() {
            let allowed = log.allowed(number as u64, first[number], end, moment);
            if !allowed.iter().any(|tag| sector(*tag, number as u64) == bytes) {
                let words = &bytes[..8];
                return Err(format!(
                    "sector {number} holds {words:?}, allowed are {allowed:?}"
                ));
            }
        }
        Ok(())
    }
}

fn layouts() -> Vec<Layout> {
    let layout = |cluster_size, size, refcount_bits| Layout {
        cluster_size,
        size,
        refcount_bits,
        ..Layout::default()
    };
    let backed = |layout| Layout {
        backing: Some((String::new(), None)),
        ..layout
    };
    vec![
        layout(512, 80 << 10, 16),
        backed(layout(512, 50 << 10, 64)),
        layout(4096, 300 << 10, 2),
        backed(layout(4096, 200 << 10, 16)),
        Layout {
            version: 2,
            ..layout(1024, 100 << 10, 16)
        },
        Layout {
            version: 2,
            ..backed(layout(1024, 100 << 10, 16))
        },
        Layout {
            data_file: Some("data".into()),
            ..backed(layout(4096, 200 << 10, 16))
        },
        Layout {
            data_file: Some("data".into()),
            data_file_raw: true,
            ..layout(1024, 100 << 10, 16)
        },
        Layout {
            extended_l2: true,
            ..layout(16384, 500 << 10, 8)
        },
        Layout {
            extended_l2: true,
            ..backed(layout(16384, 400 << 10, 16))
        },
    ]
}

/// Sequences and cuts in each; `ZBDKIT_LONG` is how many times as many sequences.
fn effort() -> (u64, u64) {
    let times = std::env::var("ZBDKIT_LONG").ok().and_then(|n| n.parse().ok());
    (2 * times.unwrap_or(1), 40)
}

#[test]
fn a_flush_holds_and_the_rest_is_old_or_new() {
    let (sequences, cuts) = effort();
    let mut states = 0;
    for seed in 0..sequences {
        for (index, layout) in layouts().into_iter().enumerate() {
            states += Run::new(layout, seed * 100 + index as u64).cut(cuts);
        }
    }
    println!("{states} states");
}

#[test]
fn growing_refcounts_lose_nothing() {
    // A refcount table of one cluster counts 4096 clusters of 512 bytes; more than those are written.
    let layout = Layout {
        cluster_size: 512,
        size: 3 << 20,
        refcount_bits: 64,
        ..Layout::default()
    };
    let mut run = Run::new(layout, 7);
    let tag = 9999;
    let table = block_on(async {
        let image = run.open().await;
        let table = image.header().await.refcount_table_offset;
        let this = &run;
        this.carry_out(&image, Request::Write, 1000..6000, tag).await;
        this.carry_out(&image, Request::Flush, 0..0, 0).await;
        assert_ne!(
            image.header().await.refcount_table_offset,
            table,
            "the table did not move"
        );
        table
    });
    assert_ne!(table, 0);
    let first = run.tags.clone();
    let whole = run.take_apart(run.disk.now(), None).unwrap();
    let last = run.disk.moment();
    for _ in 0..16 {
        let moment = run.disk.some_moment(&mut run.rng);
        let left = run.disk.power_cut(moment, &mut run.rng);
        run.judge((left, None), &first, &whole, End::Power, moment)
            .unwrap_or_else(|why| panic!("moment {moment} of {last}: {why}"));
    }
}
