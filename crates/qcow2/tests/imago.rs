//! A second reader that is not QEMU: what we wrote, the crate imago reads equal, and what it wrote we read equal.
//!
//! It knows no subclusters, no Zstandard and no snapshots, so these are left to the comparison with QEMU.

mod support;

use std::path::Path;
use std::sync::Arc;

use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use support::{Rng, block_on, open_file};
use zbdkit_io::{File, IoBuf, LocalBoxFuture};
use zbdkit_qcow2::{Backing, Header, Layout, Options, Qcow2, Repair, check, create};

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

/// An image in a directory, and what it must hold.
struct Setup {
    dir: tempfile::TempDir,
    layout: Layout,
    model: Vec<u8>,
}

impl Setup {
    fn random(rng: &mut Rng) -> Setup {
        // In memory, if there is such a file system: imago syncs often.
        let dir = tempfile::tempdir_in("/dev/shm")
            .or_else(|_| tempfile::tempdir())
            .unwrap();
        let version = if rng.one_in(4) { 2 } else { 3 };
        let cluster_size = 1 << (9 + rng.below(13));
        let size = 512 * (1 + rng.below((cluster_size / 64).clamp(1024, 8192)));
        let mut layout = Layout {
            version,
            size,
            cluster_size,
            refcount_bits: if version == 2 { 16 } else { 1 << rng.below(7) },
            ..Layout::default()
        };
        let mut model = vec![0; size as usize];
        if rng.one_in(3) {
            let len = 512 * (1 + rng.below(size / 512 * 2)) as usize;
            let below: Vec<u8> = (0..len / 512).flat_map(|_| [rng.word() as u8; 512]).collect();
            std::fs::write(dir.path().join("below.raw"), &below).unwrap();
            let both = len.min(model.len());
            model[..both].copy_from_slice(&below[..both]);
            layout.backing = Some(("below.raw".into(), Some("raw".into())));
        } else if version == 3 && rng.one_in(3) {
            layout.data_file = Some("image.data".into());
        }
        let setup = Setup { dir, layout, model };
        let file = open_file(&setup.path("image.qcow2"));
        let data = setup.data();
        block_on(create(&file, data.as_ref(), &setup.layout)).unwrap();
        setup
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn data(&self) -> Option<File> {
        self.layout
            .data_file
            .as_ref()
            .map(|name| open_file(&self.path(name)))
    }

    async fn open(&self) -> Qcow2 {
        let file = open_file(&self.path("image.qcow2"));
        let header = Header::read(&file).await.unwrap();
        let backing = header.backing_file.as_ref().map(|name| {
            let below = open_file(&self.path(name));
            let len = below.len().unwrap();
            let below: Arc<dyn Backing> = Arc::new(Below(below, len));
            below
        });
        let options = Options {
            data_file: self.data(),
            backing,
            ..Options::default()
        };
        Qcow2::open(file, header, options).await.unwrap()
    }

    /// A range of the device, of at most a few clusters.
    fn range(&self, rng: &mut Rng) -> std::ops::Range<usize> {
        let (size, cluster) = (self.layout.size, self.layout.cluster_size);
        let start = rng.below(size / 512) * 512;
        let start = if rng.one_in(2) {
            start / cluster * cluster
        } else {
            start
        };
        let most = (cluster * 4).min(2 << 20).min(size - start);
        let len = 512 * (1 + rng.below(most / 512));
        start as usize..(start + len) as usize
    }

    /// Some writes of ours.
    async fn write(&mut self, image: &Qcow2, rng: &mut Rng) {
        for _ in 0..2 + rng.below(12) {
            let range = self.range(rng);
            let (offset, len) = (range.start as u64, range.len() as u64);
            let cluster = self.layout.cluster_size;
            let start = offset / cluster * cluster;
            match rng.below(6) {
                0 if self.layout.data_file.is_none() => {
                    let end = (start + cluster).min(self.layout.size);
                    let byte = rng.word() as u8;
                    let range = start as usize..end as usize;
                    for (at, place) in self.model[range.clone()].iter_mut().enumerate() {
                        *place = byte.wrapping_add((at / 100) as u8);
                    }
                    image.write_compressed(&self.model[range], start).await.unwrap();
                }
                1 => {
                    image.write_zeroes(offset, len, rng.one_in(2)).await.unwrap();
                    self.model[range].fill(0);
                }
                _ => {
                    self.model[range.clone()].fill(rng.word() as u8);
                    let buf = IoBuf::from_vec(self.model[range].to_vec());
                    image.write(buf, offset).await.unwrap();
                }
            }
        }
    }
}

type Theirs = FormatAccess<imago::file::File>;

fn open_theirs(path: &Path, write: bool) -> Theirs {
    let builder = imago::qcow2::Qcow2::<imago::file::File>::builder_path(path).write(write);
    FormatAccess::new(builder.open(PermissiveImplicitOpenGate::default()).unwrap())
}

fn compare_theirs(setup: &Setup) {
    let theirs = open_theirs(&setup.path("image.qcow2"), false);
    assert_eq!(theirs.size(), setup.layout.size);
    let mut bytes = vec![0xee; setup.model.len()];
    theirs.read(&mut bytes, 0).unwrap();
    same(&bytes, setup);
}

fn same(bytes: &[u8], setup: &Setup) {
    let wrong = bytes.iter().zip(&setup.model).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "{:?}", setup.layout);
}

#[test]
fn imago_reads_what_we_wrote() {
    for seed in 0..24 {
        let mut rng = Rng(seed);
        let mut setup = Setup::random(&mut rng);
        block_on(async {
            let image = setup.open().await;
            setup.write(&image, &mut rng).await;
            image.close().await.unwrap();
        });
        compare_theirs(&setup);
    }
}

#[test]
fn what_imago_writes_in_our_images_we_read_and_find_sound() {
    for seed in 100..112 {
        let mut rng = Rng(seed);
        let mut setup = Setup::random(&mut rng);
        for _ in 0..2 {
            block_on(async {
                let image = setup.open().await;
                setup.write(&image, &mut rng).await;
                image.close().await.unwrap();
            });
            let theirs = open_theirs(&setup.path("image.qcow2"), true);
            for _ in 0..1 + rng.below(8) {
                let range = setup.range(&mut rng);
                setup.model[range.clone()].fill(rng.word() as u8);
                theirs
                    .write(&setup.model[range.clone()], range.start as u64)
                    .unwrap();
            }
            theirs.flush().unwrap();
            drop(theirs);
            block_on(async {
                let file = open_file(&setup.path("image.qcow2"));
                let header = Header::read(&file).await.unwrap();
                let mut unseen = |_, _| {};
                let report = check(&file, &header, None, &[], Repair::None, &mut unseen);
                let report = report.await.unwrap();
                assert_eq!(
                    (report.corruptions, report.check_errors),
                    (0, 0),
                    "{:?}",
                    report.messages
                );
                let image = setup.open().await;
                let buf = IoBuf::alloc(setup.model.len());
                image.read(buf.clone(), 0).await.unwrap();
                same(&buf.to_vec(), &setup);
                image.close().await.unwrap();
            });
        }
        compare_theirs(&setup);
    }
}
