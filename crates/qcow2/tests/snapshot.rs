//! Internal snapshots, made, applied and deleted by us and by QEMU in turn on the same images.

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use support::power::Below;
use support::qemu::Qemu;
use support::{Rng, block_on, open_file};
use zbdkit_io::IoBuf;
use zbdkit_qcow2::{Backing, Compression, Error, Header, Layout, Options, Preallocation, Qcow2, create};

/// Opens the image, does something with it, and closes it.
async fn with_image<T>(path: &Path, f: impl AsyncFnOnce(&Qcow2) -> T) -> T {
    let file = open_file(path);
    let header = Header::read(&file).await.unwrap();
    let backing = header.backing_file.as_ref().map(|name| {
        let bytes = std::fs::read(path.with_file_name(name)).unwrap();
        Arc::new(Below(bytes)) as Arc<dyn Backing>
    });
    let options = Options {
        backing,
        ..Options::default()
    };
    let image = Qcow2::open(file, header, options).await.unwrap();
    let result = f(&image).await;
    image.close().await.unwrap();
    result
}

fn ours<T>(path: &Path, f: impl AsyncFnOnce(&Qcow2) -> T) -> T {
    block_on(with_image(path, f))
}

/// A new image, made by QEMU or by us, and what it shows.
fn new_image(dir: &Path, qemu: Option<&Qemu>, layout: &Layout) -> (PathBuf, Vec<u8>) {
    let path = dir.join("image.qcow2");
    let _ = std::fs::remove_file(&path);
    let mut shows = vec![0; layout.size as usize];
    if let Some((name, _)) = &layout.backing {
        // Not as long as the device, and with zeros in it.
        let len = layout.size as usize / 2 + 512;
        let below: Vec<u8> = (0..len).map(|at| if at & 4096 == 0 { 0 } else { 0xbb }).collect();
        shows[..len].copy_from_slice(&below);
        std::fs::write(dir.join(name), below).unwrap();
    }
    let Some(qemu) = qemu else {
        block_on(create(&open_file(&path), None, layout)).unwrap();
        return (path, shows);
    };
    let compression = match layout.compression {
        Compression::Zlib => "",
        Compression::Zstd => ",compression_type=zstd",
    };
    let options = format!(
        "compat={},cluster_size={},refcount_bits={},extended_l2={}{compression}",
        if layout.version == 2 { "0.10" } else { "1.1" },
        layout.cluster_size,
        layout.refcount_bits,
        if layout.extended_l2 { "on" } else { "off" },
    );
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    if let Some((name, _)) = &layout.backing {
        args.extend(["-b", name, "-F", "raw"]);
    }
    let size = layout.size.to_string();
    args.extend([path.to_str().unwrap(), &size]);
    qemu.img(&args);
    (path, shows)
}

fn no_change(_: &mut Header) -> Result<(), Error> {
    Ok(())
}

async fn snapshot(image: &Qcow2, name: &str) -> Result<String, Error> {
    let at = SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 5);
    let made = image.snapshot_create(name, at, |_, _| Ok(())).await?;
    Ok(made.id)
}

async fn fill(image: &Qcow2, offset: u64, len: u64, byte: u8) {
    let buf = IoBuf::from_vec(vec![byte; len as usize]);
    image.write(buf, offset).await.unwrap();
}

async fn contents(image: &Qcow2) -> Vec<u8> {
    let buf = IoBuf::alloc(image.size() as usize);
    image.read(buf.clone(), 0).await.unwrap();
    buf.to_vec()
}

/// What the image should hold.
#[derive(Clone)]
struct Model {
    disk: Vec<u8>,
    /// Id, name, contents.
    snapshots: Vec<(String, String, Vec<u8>)>,
}

/// One image that both sides change.
struct Both<'a> {
    qemu: &'a Qemu,
    path: PathBuf,
    layout: Layout,
    model: Model,
    rng: Rng,
    history: Vec<String>,
}

impl Both<'_> {
    fn clusters(&self) -> u64 {
        self.model.disk.len() as u64 / self.layout.cluster_size
    }

    fn step(&mut self) {
        let ours = self.rng.one_in(2);
        let before = self.history.len();
        match self.rng.below(16) {
            0..=4 => self.write(ours),
            5 => self.zero(ours),
            6 => self.discard(ours),
            7 => self.compress(ours),
            8..=10 => self.create(ours),
            11..=12 => self.apply(ours),
            13..=14 => self.delete(ours),
            _ => self.resize(ours),
        }
        let who = if ours { "zbdkit" } else { "qemu" };
        for what in &mut self.history[before..] {
            *what = format!("{who}: {what}");
        }
    }

    fn range(&mut self) -> (u64, u64) {
        let sectors = self.model.disk.len() as u64 / 512;
        let offset = self.rng.below(sectors);
        let most = (sectors - offset).min(5 * self.layout.cluster_size / 512);
        (offset * 512, (1 + self.rng.below(most)) * 512)
    }

    fn cluster_range(&mut self) -> Option<(u64, u64)> {
        let clusters = self.clusters();
        if clusters == 0 {
            return None;
        }
        let first = self.rng.below(clusters);
        let count = 1 + self.rng.below((clusters - first).min(6));
        Some((first * self.layout.cluster_size, count * self.layout.cluster_size))
    }

    fn set(&mut self, offset: u64, len: u64, byte: u8) {
        self.model.disk[offset as usize..(offset + len) as usize].fill(byte);
    }

    fn write(&mut self, ours_: bool) {
        let ((offset, len), byte) = (self.range(), 1 + self.rng.below(255) as u8);
        self.history.push(format!("write -P {byte} {offset} {len}"));
        if ours_ {
            ours(&self.path, async |image: &Qcow2| {
                fill(image, offset, len, byte).await
            });
        } else {
            self.qemu
                .io(&self.path, &[format!("write -P {byte} {offset} {len}")]);
        }
        self.set(offset, len, byte);
    }

    fn zero(&mut self, ours_: bool) {
        let ((offset, len), unmap) = (self.range(), self.rng.one_in(2));
        let unmap_flag = if unmap { "-u " } else { "" };
        self.history.push(format!("write -z {unmap_flag}{offset} {len}"));
        if ours_ {
            ours(&self.path, async |image: &Qcow2| {
                image.write_zeroes(offset, len, unmap).await
            })
            .unwrap();
        } else {
            let command = format!("write -z {unmap_flag}{offset} {len}");
            self.qemu.io(&self.path, &[command]);
        }
        self.set(offset, len, 0);
    }

    fn discard(&mut self, ours_: bool) {
        if self.layout.version == 2 && self.layout.backing.is_some() {
            // It cannot hide the backing image.
            return;
        }
        let Some((offset, len)) = self.cluster_range() else {
            return;
        };
        self.history.push(format!("discard {offset} {len}"));
        if ours_ {
            ours(&self.path, async |image: &Qcow2| image.discard(offset, len).await).unwrap();
        } else {
            self.qemu.io(&self.path, &[format!("discard {offset} {len}")]);
        }
        self.set(offset, len, 0);
    }

    fn compress(&mut self, ours_: bool) {
        let Some((offset, _)) = self.cluster_range() else {
            return;
        };
        if self.layout.refcount_bits < 16 {
            // Many compressed clusters in one of the file's count as many there; snapshots find no room then.
            return;
        }
        let (len, byte) = (self.layout.cluster_size, 1 + self.rng.below(255) as u8);
        self.history.push(format!("write -c -P {byte} {offset} {len}"));
        if ours_ {
            let data = vec![byte; len as usize];
            ours(&self.path, async |image: &Qcow2| {
                image.write_compressed(&data, offset).await
            })
            .unwrap();
        } else {
            // It does not compress over clusters that it may write to in place.
            let discard = format!("discard {offset} {len}");
            self.qemu.io(
                &self.path,
                &[discard, format!("write -c -P {byte} {offset} {len}")],
            );
        }
        self.set(offset, len, byte);
    }

    /// Whether refcounts have room for one more.
    fn has_room(&self) -> bool {
        // QEMU raises all counts before it lowers any, when it applies one.
        let most = (1usize << self.layout.refcount_bits.min(16)) - 3;
        self.model.snapshots.len() < most.min(40)
    }

    fn create(&mut self, ours_: bool) {
        if !self.has_room() {
            return;
        }
        let newest = self
            .model
            .snapshots
            .iter()
            .map(|(id, ..)| id.parse::<u64>().unwrap())
            .max();
        let id = (newest.unwrap_or(0) + 1).to_string();
        let name = format!("s{}", self.rng.below(1000));
        self.history.push(format!("snapshot -c {name}"));
        if ours_ {
            let made = ours(&self.path, async |image: &Qcow2| snapshot(image, &name).await).unwrap();
            assert_eq!(made, id);
        } else {
            self.qemu
                .img(&["snapshot", "-c", &name, self.path.to_str().unwrap()]);
        }
        self.model.snapshots.push((id, name, self.model.disk.clone()));
    }

    fn pick(&mut self) -> Option<(usize, String, String)> {
        if self.model.snapshots.is_empty() {
            return None;
        }
        let index = self.rng.below(self.model.snapshots.len() as u64) as usize;
        let (id, name, _) = self.model.snapshots[index].clone();
        Some((index, id, name))
    }

    fn apply(&mut self, ours_: bool) {
        let Some((index, id, _)) = self.pick() else { return };
        self.history.push(format!("snapshot -a {id}"));
        if ours_ {
            ours(&self.path, async |image: &Qcow2| {
                image.snapshot_apply(&id, no_change).await
            })
            .unwrap();
        } else {
            self.qemu
                .img(&["snapshot", "-a", &id, self.path.to_str().unwrap()]);
        }
        self.model.disk = self.model.snapshots[index].2.clone();
    }

    fn delete(&mut self, ours_: bool) {
        let Some((index, id, name)) = self.pick() else {
            return;
        };
        let unique = self
            .model
            .snapshots
            .iter()
            .filter(|(_, other, _)| *other == name)
            .count()
            == 1;
        self.history.push(format!("snapshot -d {id} ({name})"));
        if ours_ || !unique {
            ours(&self.path, async |image: &Qcow2| {
                image.snapshot_delete(&id, no_change).await
            })
            .unwrap();
        } else {
            // QEMU's tool goes by names only.
            self.qemu
                .img(&["snapshot", "-d", &name, self.path.to_str().unwrap()]);
        }
        self.model.snapshots.remove(index);
    }

    fn resize(&mut self, ours_: bool) {
        if self.layout.version == 2 && !self.model.snapshots.is_empty() {
            return;
        }
        let most = 2 * self.layout.size / 512;
        let size = (1 + self.rng.below(most)) * 512;
        // QEMU shows what lay behind the end of a device that it made shorter and longer again.
        let size = if ours_ {
            size
        } else {
            size.next_multiple_of(self.layout.cluster_size)
        };
        self.history.push(format!("resize --shrink {size}"));
        if ours_ {
            ours(&self.path, async |image: &Qcow2| {
                image.resize(size, true, Preallocation::Off).await
            })
            .unwrap();
        } else {
            let size = size.to_string();
            self.qemu.img(&[
                "resize",
                "-q",
                "-f",
                "qcow2",
                "--shrink",
                self.path.to_str().unwrap(),
                &size,
            ]);
            // The end of the old device may lie within a cluster.
        }
        self.model.disk.resize(size as usize, 0);
    }

    /// Both sides see what the model holds, and neither finds anything wrong.
    fn judge(&self) {
        let history = || self.history.join("\n");
        let path = self.path.to_str().unwrap();
        let output = self.qemu.try_img(&["check", "-f", "qcow2", path]);
        assert!(
            output.code == Some(0) && output.text.contains("No errors were found"),
            "{}\n{}",
            output.text,
            history()
        );
        let (seen, listed) = ours(&self.path, async |image: &Qcow2| {
            (contents(image).await, image.snapshots().await.unwrap())
        });
        assert!(
            seen == self.model.disk,
            "we read something else after\n{}",
            history()
        );
        let theirs = self.qemu.contents(&self.path, None);
        assert!(
            theirs == self.model.disk,
            "QEMU reads something else after\n{}",
            history()
        );
        let listed: Vec<_> = listed
            .iter()
            .map(|s| (s.id.as_str(), s.name.as_str(), s.disk_size))
            .collect();
        let expected: Vec<_> = self
            .model
            .snapshots
            .iter()
            .map(|(id, name, disk)| (id.as_str(), name.as_str(), disk.len() as u64))
            .collect();
        assert_eq!(listed, expected, "after\n{}", history());
        for (id, _, disk) in &self.model.snapshots {
            // The tool reads a snapshot as long as the device is now.
            let mut theirs = self.qemu.contents(&self.path, Some(id));
            let mut disk = disk.clone();
            let n = theirs.len().min(disk.len());
            theirs.truncate(n);
            disk.truncate(n);
            assert!(
                theirs == disk,
                "snapshot {id} is something else after\n{}",
                history()
            );
        }
    }
}

/// What the random sequences run on.
fn layouts() -> Vec<Layout> {
    let layout = |cluster_size: u64, size: u64, refcount_bits: u32| Layout {
        cluster_size,
        size,
        refcount_bits,
        ..Layout::default()
    };
    vec![
        layout(512, 200 << 10, 16),
        layout(512, 130 << 10, 4),
        layout(4096, 5 << 20, 8),
        layout(65536, 4 << 20, 16),
        layout(65536, 3 << 20, 32),
        layout(2 << 20, 16 << 20, 64),
        Layout {
            extended_l2: true,
            ..layout(16384, 3 << 20, 16)
        },
        Layout {
            extended_l2: true,
            compression: Compression::Zstd,
            ..layout(65536, 4 << 20, 16)
        },
        Layout {
            version: 2,
            ..layout(4096, 3 << 20, 16)
        },
        layout(4096, 3 << 20, 2),
        Layout {
            backing: Some(("below.raw".into(), Some("raw".into()))),
            ..layout(4096, 3 << 20, 16)
        },
    ]
}

/// Steps of each sequence; `ZBDKIT_LONG=1` runs far more of them.
fn effort() -> (u64, usize) {
    match std::env::var_os("ZBDKIT_LONG") {
        Some(_) => (40, 60),
        None => (1, 24),
    }
}

#[test]
fn snapshots_of_ours_and_of_qemu_are_one_thing() {
    let Some(qemu) = Qemu::find() else { return };
    let (rounds, steps) = effort();
    let dir = tempfile::tempdir().unwrap();
    for round in 0..rounds {
        for (index, layout) in layouts().into_iter().enumerate() {
            let seed = round * 101 + index as u64;
            let by_qemu = seed % 2 == 1;
            let (path, disk) = new_image(dir.path(), by_qemu.then_some(&qemu), &layout);
            let mut both = Both {
                qemu: &qemu,
                path,
                model: Model {
                    disk,
                    snapshots: Vec::new(),
                },
                rng: Rng(seed),
                history: vec![format!("{layout:?}, seed {seed}, made by QEMU: {by_qemu}")],
                layout,
            };
            for step in 1..=steps {
                both.step();
                if step % 6 == 0 {
                    both.judge();
                }
            }
            both.judge();
        }
    }
}
