//! Random requests, many at a time, against what a plain array would hold; QEMU's tools agree with the image after it.

mod support;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use support::qemu::Qemu;
use support::{Rng, block_on, open_file};
use zbdkit_io::{File, FileKind, IoBuf, LocalBoxFuture};
use zbdkit_qcow2::{Backing, Error, Header, Layout, Mapping, Options, Preallocation, Qcow2, create};

type Job<'a> = Pin<Box<dyn Future<Output = Result<(), Error>> + 'a>>;

/// Polls all of them until all have ended.
async fn all(mut jobs: Vec<Job<'_>>) {
    std::future::poll_fn(|cx| {
        jobs.retain_mut(|job| match job.as_mut().poll(cx) {
            Poll::Ready(result) => {
                result.unwrap();
                false
            }
            Poll::Pending => true,
        });
        if jobs.is_empty() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}

/// A raw backing file.
struct Below(File, u64);

impl Backing for Below {
    fn len(&self) -> u64 {
        self.1
    }

    fn read<'a>(&'a self, buf: IoBuf, offset: u64) -> LocalBoxFuture<'a, Result<(), i32>> {
        Box::pin(async move { self.0.read(buf, offset).await.map_err(|_| libc::EIO) })
    }
}

struct Setup {
    /// Every request is a multiple of it, and where it is more than 512, so must be all I/O of the image.
    unit: usize,
    dir: tempfile::TempDir,
    layout: Layout,
    model: Vec<u8>,
    backing: bool,
}

impl Setup {
    fn new(layout: Layout, backing_len: usize, rng: &mut Rng) -> Setup {
        let dir = tempfile::tempdir().unwrap();
        let mut layout = layout;
        let mut model = vec![0; layout.size as usize];
        if backing_len > 0 {
            let below: Vec<u8> = (0..backing_len / 512)
                .flat_map(|sector| {
                    let byte = if rng.one_in(3) { 0 } else { sector as u8 | 1 };
                    [byte; 512]
                })
                .collect();
            std::fs::write(dir.path().join("below.raw"), &below).unwrap();
            let n = below.len().min(model.len());
            model[..n].copy_from_slice(&below[..n]);
            layout.backing = Some(("below.raw".into(), Some("raw".into())));
        }
        if let Some(name) = &mut layout.data_file {
            // QEMU takes it from its own working directory.
            *name = dir.path().join(&name).to_str().unwrap().to_owned();
        }
        let data = layout
            .data_file
            .as_ref()
            .map(|name| open_file(&dir.path().join(name)));
        let file = open_file(&dir.path().join("image.qcow2"));
        block_on(create(&file, data.as_ref(), &layout)).unwrap();
        Setup {
            unit: 512,
            dir,
            backing: backing_len > 0,
            layout,
            model,
        }
    }

    fn file(&self, name: &str) -> File {
        if self.unit == 512 {
            return open_file(&self.dir.path().join(name));
        }
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.dir.path().join(name))
            .unwrap();
        let kind = FileKind {
            direct_align: Some(self.unit as u32),
        };
        File::from_fd(file.into(), kind)
    }

    async fn open(&self, read_only: bool) -> Qcow2 {
        let file = self.file("image.qcow2");
        let header = Header::read(&file).await.unwrap();
        let backing: Option<Arc<dyn Backing>> = self.backing.then(|| {
            let file = open_file(&self.dir.path().join("below.raw"));
            let len = file.len().unwrap();
            Arc::new(Below(file, len)) as Arc<dyn Backing>
        });
        let data_file = self
            .layout
            .data_file
            .as_ref()
            .map(|name| open_file(&self.dir.path().join(name)));
        let options = Options {
            read_only,
            data_file,
            backing,
            l2_cache: 1,
            ..Options::default()
        };
        Qcow2::open(file, header, options).await.unwrap()
    }

    /// Requests that do not touch each other, all at once.
    async fn batch(&mut self, image: &Qcow2, rng: &mut Rng) {
        let (slots, unit) = (8, self.unit);
        let slot = self.model.len() / slots / unit * unit;
        let mut jobs: Vec<Job<'_>> = Vec::new();
        for index in 0..slots {
            let base = index * slot;
            let offset = base + rng.below((slot / unit) as u64) as usize * unit;
            let most = (base + slot - offset).min(4 * self.layout.cluster_size as usize) / unit;
            let len = unit * (1 + rng.below(most as u64) as usize);
            let at = offset as u64;
            match rng.below(8) {
                0..=3 => {
                    let byte = rng.below(255) as u8 + 1;
                    self.model[offset..offset + len].fill(byte);
                    jobs.push(Box::pin(image.write(IoBuf::from_vec(vec![byte; len]), at)));
                }
                4 => {
                    self.model[offset..offset + len].fill(0);
                    jobs.push(Box::pin(image.write_zeroes(at, len as u64, rng.one_in(2))));
                }
                5 => {
                    // Whole clusters become zeros, of the rest nothing is said: so only whole ones are asked for.
                    let cluster = self.layout.cluster_size as usize;
                    let start = offset.div_ceil(cluster) * cluster;
                    let end = (base + slot) / cluster * cluster;
                    if start < end {
                        self.model[start..end].fill(0);
                        jobs.push(Box::pin(image.discard(start as u64, (end - start) as u64)));
                    }
                }
                6 => jobs.push(Box::pin(image.flush())),
                _ => {
                    let (expected, buf) = (self.model[offset..offset + len].to_vec(), IoBuf::alloc(len));
                    jobs.push(Box::pin(async move {
                        image.read(buf.clone(), at).await?;
                        assert!(buf.to_vec() == expected, "read of {len} at {at}");
                        Ok(())
                    }));
                }
            }
        }
        all(jobs).await;
    }

    async fn compare(&self, image: &Qcow2) {
        let buf = IoBuf::alloc(self.model.len());
        image.read(buf.clone(), 0).await.unwrap();
        let found = buf.to_vec();
        if let Some(at) = (0..found.len()).find(|at| found[*at] != self.model[*at]) {
            panic!("byte {at:#x} is {:#x} and not {:#x}", found[at], self.model[at]);
        }
    }

    fn judge_by_qemu(&self) {
        let Some(qemu) = Qemu::find() else { return };
        let image = self.dir.path().join("image.qcow2");
        qemu.check(&image);
        let raw = self.dir.path().join("model.raw");
        std::fs::write(&raw, &self.model).unwrap();
        let text = qemu.img(&[
            "compare",
            "-f",
            "qcow2",
            "-F",
            "raw",
            image.to_str().unwrap(),
            raw.to_str().unwrap(),
        ]);
        assert!(text.contains("identical"), "{text}");
    }
}

fn run(name: &str, layout: Layout, backing: usize, seed: u64) {
    run_in_units(name, layout, backing, seed, 512);
}

fn run_in_units(name: &str, layout: Layout, backing: usize, seed: u64, unit: usize) {
    let mut rng = Rng(seed);
    let mut setup = Setup::new(layout, backing, &mut rng);
    setup.unit = unit;
    println!("{name} seed {seed}");
    block_on(async {
        for _ in 0..3 {
            let image = setup.open(false).await;
            for _ in 0..25 {
                setup.batch(&image, &mut rng).await;
            }
            setup.compare(&image).await;
            image.close().await.unwrap();
        }
        let image = setup.open(true).await;
        setup.compare(&image).await;
    });
    setup.judge_by_qemu();
}

fn layout(cluster_size: u64, size: u64) -> Layout {
    Layout {
        cluster_size,
        size,
        ..Layout::default()
    }
}

#[test]
fn every_cluster_size_holds_what_is_written() {
    for (seed, bits) in (9..=21).enumerate() {
        let cluster = 1u64 << bits;
        run(
            "plain",
            layout(cluster, (cluster * 40).min(8 << 20)),
            0,
            seed as u64,
        );
    }
}

#[test]
fn every_refcount_width_counts() {
    for order in 0..=6u32 {
        for cluster_size in [512, 4096] {
            let layout = Layout {
                refcount_bits: 1 << order,
                ..layout(cluster_size, 1 << 20)
            };
            run("width", layout, 0, 100 + u64::from(order));
        }
    }
}

#[test]
fn all_io_is_as_aligned_as_direct_io_wants_it() {
    run_in_units("direct", layout(4096, 2 << 20), 0, 500, 4096);
    run_in_units("direct", layout(65536, 4 << 20), 1 << 20, 501, 4096);
}

#[test]
fn what_lies_below_shows_through() {
    for (seed, cluster_size) in [512, 4096, 65536].into_iter().enumerate() {
        run(
            "backing",
            layout(cluster_size, 2 << 20),
            (1 << 20) + 1536,
            200 + seed as u64,
        );
    }
}

#[test]
fn subclusters_hold_what_is_written() {
    for (seed, backing) in [0, 1 << 20].into_iter().enumerate() {
        let layout = Layout {
            extended_l2: true,
            ..layout(16384, 2 << 20)
        };
        run("extended", layout, backing, 300 + seed as u64);
    }
}

#[test]
fn an_external_data_file_holds_what_is_written() {
    for raw in [false, true] {
        let layout = Layout {
            data_file: Some("data.raw".into()),
            data_file_raw: raw,
            ..layout(4096, 1 << 20)
        };
        run("external", layout, 0, 400 + u64::from(raw));
    }
}

#[test]
fn mapping_ahead_is_contiguous_and_zero_and_release_keeps_it() {
    for cluster_size in [512, 4096, 65536] {
        let mut rng = Rng(7);
        let mut setup = Setup::new(layout(cluster_size, 8 << 20), 0, &mut rng);
        block_on(async {
            let image = setup.open(false).await;
            image.map_ahead(0..4 << 20).await.unwrap();
            let extent = image.map(0, 4 << 20).await.unwrap();
            let Mapping::Data { offset } = extent.mapping else {
                panic!("{extent:?}")
            };
            setup.compare(&image).await;
            image
                .write(IoBuf::from_vec(vec![3; 1 << 20]), 4096)
                .await
                .unwrap();
            setup.model[4096..(1 << 20) + 4096].fill(3);
            setup.compare(&image).await;
            image.release(0..4 << 20).await.unwrap();
            setup.model.fill(0);
            setup.compare(&image).await;
            assert_eq!(image.map(0, 512).await.unwrap().mapping, Mapping::Data { offset });
            image.drop_ahead(0..4 << 20).await.unwrap();
            assert_eq!(image.map(0, 4 << 20).await.unwrap().mapping, Mapping::Unallocated);
            image.close().await.unwrap();
        });
        setup.judge_by_qemu();
    }
}

#[test]
fn preallocation_maps_all_and_leaks_nothing() {
    for mode in [
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ] {
        let setup = Setup::new(layout(65536, (8 << 20) + 512), 0, &mut Rng(1));
        block_on(async {
            let image = setup.open(false).await;
            image.preallocate(0..image.size(), mode).await.unwrap();
            let extent = image.map(0, image.size()).await.unwrap();
            assert!(matches!(extent.mapping, Mapping::Data { .. }) && extent.len == image.size());
            setup.compare(&image).await;
            image.close().await.unwrap();
        });
        setup.judge_by_qemu();
    }
}

/// QEMU allocates single subclusters. Writes into those that are there go on while the others come.
#[test]
fn writes_to_subclusters_that_are_there_survive_others_that_come() {
    let Some(qemu) = Qemu::find() else { return };
    let layout = Layout {
        extended_l2: true,
        ..layout(65536, 1 << 20)
    };
    let mut setup = Setup::new(layout, 1 << 20, &mut Rng(3));
    let path = setup.dir.path().join("image.qcow2");
    let commands: Vec<String> = (0..16)
        .map(|cluster| format!("write -P 9 {} 2048", cluster * 65536))
        .collect();
    qemu.io(&path, &commands);
    for cluster in 0..16 {
        setup.model[cluster * 65536..][..2048].fill(9);
    }
    block_on(async {
        let image = setup.open(false).await;
        setup.compare(&image).await;
        let mut jobs: Vec<Job<'_>> = Vec::new();
        for cluster in 0..16usize {
            for part in 0..32usize {
                let byte = (cluster * 32 + part) as u8 | 1;
                let at = cluster * 65536 + part * 2048 + 512;
                setup.model[at..at + 512].fill(byte);
                jobs.push(Box::pin(image.write(IoBuf::from_vec(vec![byte; 512]), at as u64)));
            }
        }
        all(jobs).await;
        setup.compare(&image).await;
        image.close().await.unwrap();
    });
    setup.judge_by_qemu();
}

/// The end of the device may cut a cluster, and its subclusters.
#[test]
fn a_cluster_that_the_end_cuts_is_written() {
    let layout = Layout {
        extended_l2: true,
        ..layout(65536, 16896)
    };
    let mut setup = Setup::new(layout, 0, &mut Rng(3));
    block_on(async {
        let image = setup.open(false).await;
        image.write(IoBuf::from_vec(vec![1; 512]), 0).await.unwrap();
        image.write_zeroes(0, 16896, false).await.unwrap();
        image.write(IoBuf::from_vec(vec![2; 512]), 8192).await.unwrap();
        setup.model[8192..8704].fill(2);
        setup.compare(&image).await;
        image.close().await.unwrap();
    });
    setup.judge_by_qemu();
}

/// Every piece of it that is mapped takes its clusters from what was taken for the whole.
#[test]
fn a_large_range_is_mapped_without_more_space_than_it_needs() {
    let size = 64 << 30;
    let setup = Setup {
        unit: 512,
        dir: tempfile::tempdir().unwrap(),
        layout: layout(2 << 20, size),
        model: Vec::new(),
        backing: false,
    };
    let file = setup.file("image.qcow2");
    block_on(async {
        create(&file, None, &setup.layout).await.unwrap();
        let image = setup.open(false).await;
        image.map_ahead(0..size).await.unwrap();
        let len = file.len().unwrap();
        assert!(len < size + size / 8, "{len} bytes for {size}");
        image.close().await.unwrap();
    });
}

/// Zeros that keep their space, and zeros that have none, are told apart.
#[test]
fn a_map_of_zeros_ends_where_their_space_does() {
    let setup = Setup::new(layout(4096, 1 << 20), 0, &mut Rng(1));
    block_on(async {
        let image = setup.open(false).await;
        image.write(IoBuf::from_vec(vec![1; 4096]), 4096).await.unwrap();
        image.write_zeroes(4096, 4096, false).await.unwrap();
        let extent = image.map(4096, 8192).await.unwrap();
        assert!(matches!(extent.mapping, Mapping::Zero { offset: Some(_) }));
        image.close().await.unwrap();
    });
    let setup = Setup::new(layout(4096, 1 << 20), 1 << 20, &mut Rng(1));
    block_on(async {
        let image = setup.open(false).await;
        image.write_zeroes(0, 4096, false).await.unwrap();
        image.write(IoBuf::from_vec(vec![1; 4096]), 4096).await.unwrap();
        image.write_zeroes(4096, 4096, false).await.unwrap();
        let extent = image.map(0, 8192).await.unwrap();
        assert_eq!(
            (extent.len, extent.mapping),
            (4096, Mapping::Zero { offset: None })
        );
        image.close().await.unwrap();
    });
}
