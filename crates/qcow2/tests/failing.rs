//! Requests that fail or are given up half-way: what else the image holds is as it was, and check finds leaks at most.

mod support;

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::SystemTime;

use support::crash::Bytes;
use support::device::{Device, Failure, Kind};
use support::power::Below;
use support::{Rng, block_on};
use zbdkit_io::IoBuf;
use zbdkit_qcow2::{Backing, Error, Header, Layout, Options, Qcow2, Repair, check, create};

const SECTOR: u64 = 512;

type Job<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// An image on a disk that fails, and what its sectors hold: nobody knows where a request failed.
struct Bench {
    layout: Layout,
    device: Device,
    below: Option<Vec<u8>>,
    model: RefCell<Vec<Option<u8>>>,
    rng: Rng,
    seed: u64,
}

#[derive(Clone, Copy, Debug)]
enum Request {
    Write(u8),
    Compressed(u8),
    Zero { unmap: bool },
    Discard,
    Release,
    MapAhead,
    Flush,
}

impl Bench {
    fn new(mut layout: Layout, seed: u64) -> Bench {
        let sectors = (layout.size / SECTOR) as usize;
        let below = layout
            .backing
            .is_some()
            .then(|| vec![0xbb; sectors * SECTOR as usize * 2 / 3 / 512 * 512]);
        layout.backing = layout.backing.map(|_| ("below".into(), Some("raw".into())));
        let there = below.as_ref().map_or(0, |below| below.len() / SECTOR as usize);
        let model = (0..sectors).map(|sector| Some(if sector < there { 0xbb } else { 0 }));
        let device = Device::new(Bytes::default(), seed);
        block_on(create(&device.file(), None, &layout)).unwrap();
        Bench {
            layout,
            device,
            below,
            model: RefCell::new(model.collect()),
            rng: Rng(seed),
            seed,
        }
    }

    async fn open(&self) -> Qcow2 {
        let file = self.device.file();
        let header = Header::read(&file).await.unwrap();
        let options = Options {
            l2_cache: 1,
            backing: self
                .below
                .as_ref()
                .map(|bytes| Arc::new(Below(bytes.clone())) as Arc<dyn Backing>),
            ..Options::default()
        };
        Qcow2::open(file, header, options).await.unwrap()
    }

    /// Requests that do not touch each other's sectors, all at once; polls them at most `polls` times.
    async fn batch(&mut self, image: &Qcow2, mut polls: u64) {
        let cluster = self.layout.cluster_size / SECTOR;
        let sectors = self.layout.size / SECTOR;
        let mut planned: Vec<(Request, Range<u64>)> = Vec::new();
        let mut at = self.rng.below(sectors / 2);
        while at < sectors && planned.len() < 6 {
            // Some need more than one sector of an L2 table.
            let most = (sectors - at).min(if self.rng.one_in(4) { 200 } else { 4 } * cluster);
            let range = at..at + 1 + self.rng.below(most);
            at = range.end + self.rng.below(2 * cluster);
            planned.push(self.plan(range));
        }
        let this = &*self;
        let mut jobs: Vec<Job<'_>> = Vec::new();
        for (request, range) in planned {
            jobs.push(Box::pin(this.carry_out(image, request, range)));
        }
        poll_fn(|cx| {
            jobs.retain_mut(|job| job.as_mut().poll(cx).is_pending());
            polls -= 1;
            if jobs.is_empty() || polls == 0 {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }

    fn plan(&mut self, range: Range<u64>) -> (Request, Range<u64>) {
        let cluster = self.layout.cluster_size / SECTOR;
        let whole = range.start.next_multiple_of(cluster)..range.end / cluster * cluster;
        let zeros = |range: &Range<u64>| {
            let model = self.model.borrow();
            model[range.start as usize..range.end as usize]
                .iter()
                .all(|byte| *byte == Some(0))
        };
        let byte = 1 + self.seed.wrapping_mul(31) as u8 % 64 + self.rng.clone().below(64) as u8;
        match self.rng.below(12) {
            0 => (Request::Zero { unmap: false }, range),
            1 => (Request::Zero { unmap: true }, range),
            2 | 3 if !whole.is_empty() => (Request::Discard, whole),
            4 if !whole.is_empty() => (Request::Release, whole),
            5 if !whole.is_empty() && zeros(&whole) => (Request::MapAhead, whole),
            6 if !whole.is_empty() => (Request::Compressed(byte), whole.start..whole.start + cluster),
            7 => (Request::Flush, 0..0),
            _ => (Request::Write(byte), range),
        }
    }

    async fn carry_out(&self, image: &Qcow2, request: Request, range: Range<u64>) {
        let bytes = range.start * SECTOR..range.end * SECTOR;
        let len = bytes.end - bytes.start;
        let data = |byte| vec![byte; len as usize];
        // Also if we are dropped half-way.
        if !matches!(request, Request::MapAhead) {
            self.expect(range.clone(), None);
        }
        let (done, byte) = match request {
            Request::Write(byte) => (image.write(IoBuf::from_vec(data(byte)), bytes.start).await, byte),
            Request::Compressed(byte) => (image.write_compressed(&data(byte), bytes.start).await, byte),
            Request::Zero { unmap } => (image.write_zeroes(bytes.start, len, unmap).await, 0),
            Request::Discard => (image.discard(bytes.start, len).await, 0),
            Request::Release => (image.release(bytes).await, 0),
            Request::MapAhead => (image.map_ahead(bytes).await, 0),
            Request::Flush => (image.flush().await, 0),
        };
        match done {
            Ok(()) => self.expect(range, Some(byte)),
            Err(Error::Io { .. } | Error::Failed { .. }) => {}
            Err(error) => panic!("{request:?}: {error}"),
        }
    }

    fn expect(&self, range: Range<u64>, byte: Option<u8>) {
        self.model.borrow_mut()[range.start as usize..range.end as usize].fill(byte);
    }

    async fn compare(&self, image: &Qcow2) {
        let buf = IoBuf::alloc(self.layout.size as usize);
        image.read(buf.clone(), 0).await.unwrap();
        for (sector, bytes) in buf.to_vec().chunks(SECTOR as usize).enumerate() {
            if let Some(byte) = self.model.borrow()[sector] {
                assert!(
                    bytes.iter().all(|found| *found == byte),
                    "seed {}: sector {sector} holds {:?} and not {byte}",
                    self.seed,
                    &bytes[..4]
                );
            }
        }
    }

    /// Opens what is in the file now; check finds nothing but leaks, if those are allowed.
    async fn judge(&self, leaks: bool) {
        let file = self.device.file();
        let header = Header::read(&file).await.unwrap();
        let report = check(&file, &header, None, &[], Repair::None, &mut |_, _| {})
            .await
            .unwrap();
        assert!(
            report.corruptions == 0 && (leaks || report.leaks == 0),
            "seed {}: {:#?}",
            self.seed,
            report.messages
        );
        let image = self.open().await;
        self.compare(&image).await;
        image.close().await.unwrap();
    }

    /// Fills some of the image, with a snapshot of a part of that.
    async fn begin(&mut self) {
        let image = self.open().await;
        for _ in 0..3 {
            self.batch(&image, u64::MAX).await;
        }
        let made = image.snapshot_create("s", SystemTime::UNIX_EPOCH, |_, _| Ok(()));
        made.await.unwrap();
        self.batch(&image, u64::MAX).await;
        image.close().await.unwrap();
        self.judge(false).await;
    }

    /// One request in so many fails with one of these errors, after some of it was done.
    fn fail(&mut self, one_in: u64, errnos: &'static [i32], only: fn(Kind) -> bool) {
        let mut rng = Rng(self.rng.word());
        self.device.fail(Some(Box::new(move |kind, _, len| {
            let fails = only(kind) && rng.one_in(one_in);
            fails.then(|| Failure {
                errno: errnos[rng.below(errnos.len() as u64) as usize],
                written: rng.below(len.max(1)) as usize / 512 * 512,
            })
        })));
    }
}

fn layouts() -> Vec<Layout> {
    let layout = |cluster_size, size| Layout {
        cluster_size,
        size,
        ..Layout::default()
    };
    let backed = |layout| Layout {
        backing: Some((String::new(), None)),
        ..layout
    };
    vec![
        layout(512, 100 << 10),
        backed(layout(512, 100 << 10)),
        Layout {
            refcount_bits: 64,
            ..layout(512, 1 << 20)
        },
        backed(layout(4096, 3 << 20)),
        Layout {
            extended_l2: true,
            ..layout(16384, 1 << 20)
        },
    ]
}

fn seeds() -> Range<u64> {
    let long = std::env::var("ZBDKIT_LONG").ok().and_then(|n| n.parse().ok());
    0..4 * long.unwrap_or(1)
}

fn each(mut test: impl FnMut(&mut Bench)) {
    for seed in seeds() {
        for (index, layout) in layouts().into_iter().enumerate() {
            let mut bench = Bench::new(layout, seed * 100 + index as u64);
            block_on(bench.begin());
            test(&mut bench);
        }
    }
}

#[test]
fn a_full_disk_fails_what_needs_room_and_nothing_else() {
    each(|bench| {
        block_on(async {
            let image = bench.open().await;
            for _ in 0..8 {
                bench.fail(6, &[libc::ENOSPC, libc::EDQUOT], |kind| {
                    matches!(kind, Kind::Write | Kind::Length | Kind::Zero)
                });
                bench.batch(&image, u64::MAX).await;
                bench.device.fail(None);
                bench.batch(&image, u64::MAX).await;
                bench.compare(&image).await;
            }
            image.flush().await.unwrap();
            image.close().await.unwrap();
            bench.judge(true).await;
        });
    });
}

#[test]
fn after_an_error_nothing_changes_and_nothing_is_lost() {
    each(|bench| {
        block_on(async {
            let image = bench.open().await;
            bench.batch(&image, u64::MAX).await;
            bench.fail(30, &[libc::EIO], |kind| kind != Kind::Read);
            for _ in 0..6 {
                bench.batch(&image, u64::MAX).await;
            }
            bench.device.fail(None);
            let closed = image.close().await;
            drop(image);
            bench.judge(closed.is_err()).await;
        });
    });
}

#[test]
fn a_failed_sync_is_final_whatever_its_error() {
    for errno in [libc::EIO, libc::ENOSPC, libc::EDQUOT] {
        let mut bench = Bench::new(layouts()[0].clone(), 1);
        block_on(async {
            let image = bench.open().await;
            bench.batch(&image, u64::MAX).await;
            bench.device.fail(Some(Box::new(move |kind, _, _| {
                let written = 0;
                (kind == Kind::Sync).then_some(Failure { errno, written })
            })));
            assert!(image.flush().await.is_err());
            bench.device.fail(None);
            // Whoever asks again would be told a lie.
            assert_eq!(image.flush().await, Err(Error::Failed { errno }));
            let write = image.write(IoBuf::alloc(512), 0).await;
            assert_eq!(write, Err(Error::Failed { errno }));
        });
    }
}

#[test]
fn requests_that_are_given_up_harm_no_others() {
    each(|bench| {
        block_on(async {
            for _ in 0..6 {
                let image = bench.open().await;
                for _ in 0..3 {
                    let polls = 1 + bench.rng.below(40);
                    bench.batch(&image, polls).await;
                }
                // Some of their I/O may still be on its way.
                let _ = image.close().await;
                drop(image);
                let file = bench.device.file();
                while bench.device.is_busy() {
                    file.datasync().await.unwrap();
                }
                bench.judge(true).await;
            }
        });
    });
}
