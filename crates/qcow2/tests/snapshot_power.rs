//! The power fails during an operation on snapshots or during a change of size: what was before is there, or what is new,
//! whole and unharmed.
//!
//! Every moment of an operation is looked at, with several chances of what reached the medium. The image that is left is
//! checked, read, written over, and each of its snapshots is applied and read.

mod support;

use std::sync::Arc;
use std::time::SystemTime;

use support::crash::{Bytes, Disk};
use support::power::{Below, Contents, MARK, open, take_apart};
use support::qemu::Qemu;
use support::{Rng, block_on};
use zbdkit_io::IoBuf;
use zbdkit_qcow2::{Backing, Error, Header, Layout, Preallocation, Qcow2, create};

/// Chances at each moment; `ZBDKIT_LONG=1` takes far more.
fn chances() -> u64 {
    match std::env::var_os("ZBDKIT_LONG") {
        Some(_) => 200,
        None => 3,
    }
}

fn mark(header: &mut Header) -> Result<(), Error> {
    header.set_extension(MARK, Some(b"new".to_vec()));
    Ok(())
}

async fn snapshot(image: &Qcow2, mark_it: bool) {
    let also = |header: &mut Header, _: &_| if mark_it { mark(header) } else { Ok(()) };
    let made = image.snapshot_create("name", SystemTime::UNIX_EPOCH, also).await;
    made.unwrap();
}

/// Writes, zeroes, discards and compresses here and there.
async fn stir(image: &Qcow2, rng: &mut Rng) {
    let sectors = image.size() / 512;
    for _ in 0..12 {
        let offset = rng.below(sectors);
        let len = 1 + rng.below((sectors - offset).min(5 * image.cluster_size() / 512));
        let (offset, len, byte) = (offset * 512, len * 512, rng.word() as u8);
        let done = match rng.below(8) {
            0 => image.discard(offset, len).await,
            1 => image.write_zeroes(offset, len, rng.one_in(2)).await,
            2 | 3 => {
                let start = offset & !(image.cluster_size() - 1);
                let n = image.cluster_size().min(image.size() - start);
                image.write_compressed(&vec![byte; n as usize], start).await
            }
            _ => {
                let data = (0..len).map(|at| byte ^ (at / 512) as u8).collect();
                image.write(IoBuf::from_vec(data), offset).await
            }
        };
        done.unwrap();
    }
}

/// An image, and what it holds.
struct Case {
    what: String,
    bytes: Bytes,
    backing: Option<Arc<dyn Backing>>,
    rng: Rng,
}

impl Case {
    /// An image of this layout with two snapshots, each of another state, and a third state active.
    fn new(what: &str, mut layout: Layout, seed: u64) -> Case {
        let mut rng = Rng(seed);
        let backing = layout.backing.is_some().then(|| {
            let len = layout.size as usize + (64 << 10);
            Arc::new(Below((0..len).map(|at| (at / 512) as u8 | 1).collect())) as Arc<dyn Backing>
        });
        layout.backing = layout.backing.map(|_| ("below".into(), Some("raw".into())));
        let disk = Disk::new();
        block_on(async {
            create(&disk.file(), None, &layout).await.unwrap();
            let image = open(&disk, backing.clone()).await.unwrap();
            for _ in 0..2 {
                stir(&image, &mut rng).await;
                snapshot(&image, false).await;
            }
            stir(&image, &mut rng).await;
            image.close().await.unwrap();
        });
        Case {
            what: format!("{what}, {layout:?}"),
            bytes: disk.now(),
            backing,
            rng,
        }
    }

    /// Carries the operation out, and cuts the power at each moment.
    fn cut_everywhere(mut self, operation: impl AsyncFn(&Qcow2)) {
        let disk = Disk::of(self.bytes.clone());
        let done = block_on(async {
            let image = open(&disk, self.backing.clone()).await.unwrap();
            operation(&image).await;
            let done = disk.moment();
            image.close().await.unwrap();
            done
        });
        let judge = |bytes: Bytes| block_on(take_apart(bytes, self.backing.clone()));
        let old = judge(self.bytes.clone()).unwrap();
        let new = judge(disk.now()).unwrap();
        assert_ne!(old, new, "{}: the operation does nothing", self.what);
        let (mut olds, mut news) = (0, 0);
        for moment in 0..=disk.moment() {
            for chance in 0..chances() {
                let left = disk.power_cut(moment, &mut self.rng);
                let said =
                    |why: String| format!("{}, moment {moment} of {done}, chance {chance}: {why}", self.what);
                let found = judge(left).unwrap_or_else(|why| panic!("{}", said(why)));
                if found == new {
                    news += 1;
                } else {
                    assert!(found == old, "{}", said(differences(&found, &old, &new)));
                    assert!(moment < done, "{}", said("what was done is gone".into()));
                    olds += 1;
                }
            }
        }
        assert!(olds > 0 && news > 0, "{}: {olds} old, {news} new", self.what);
        if let Some(qemu) = Qemu::find() {
            for _ in 0..2 {
                let moment = disk.some_moment(&mut self.rng);
                qemu_repairs(&qemu, &disk.power_cut(moment, &mut self.rng), &self.what);
            }
        }
        println!(
            "{}: {olds} states were the old one, {news} the new one",
            self.what
        );
    }
}

/// QEMU finds no more harm than we do, and what it repairs is without fault then.
fn qemu_repairs(qemu: &Qemu, left: &Bytes, what: &str) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    std::fs::write(&path, left.to_vec()).unwrap();
    // Nobody reads it, but it must be there.
    std::fs::write(dir.path().join("below"), [0; 512]).unwrap();
    let name = path.to_str().unwrap();
    let said = qemu.try_img(&["check", "-f", "qcow2", name]);
    let harmless = |line: &str| {
        line.starts_with("Leaked cluster") || line.contains("OFLAG_COPIED") && line.ends_with("refcount=1")
    };
    let is_finding = |line: &&str| line.contains("refcount=") || line.starts_with("ERROR");
    let harm: Vec<&str> = said
        .text
        .lines()
        .filter(is_finding)
        .filter(|line| !harmless(line))
        .collect();
    assert!(harm.is_empty(), "{what}: QEMU finds {harm:?}");
    qemu.try_img(&["check", "-f", "qcow2", "-r", "all", name]);
    qemu.check(&path);
}

/// Says in what way contents are neither.
fn differences(found: &Contents, old: &Contents, new: &Contents) -> String {
    let versus = |other: &Contents| {
        let disk = found.disk.len() == other.disk.len();
        let wrong = found.disk.iter().zip(&other.disk).position(|(a, b)| a != b);
        let ids = |contents: &Contents| {
            contents
                .snapshots
                .iter()
                .map(|(id, _)| id.clone())
                .collect::<Vec<_>>()
        };
        let snapshots: Vec<bool> = found
            .snapshots
            .iter()
            .zip(&other.snapshots)
            .map(|(a, b)| a == b)
            .collect();
        format!(
            "size alike: {disk}, first difference: {wrong:?}, snapshots {:?} and {:?}, alike: {snapshots:?}, marks {:?} {:?}",
            ids(found),
            ids(other),
            found.mark,
            other.mark,
        )
    };
    format!("neither the old ({}) nor the new ({})", versus(old), versus(new))
}

fn layouts() -> Vec<Layout> {
    let layout = |cluster_size, size, refcount_bits| Layout {
        cluster_size,
        size,
        refcount_bits,
        ..Layout::default()
    };
    vec![
        // Several L2 tables.
        layout(512, 100 << 10, 16),
        // Many refcount blocks.
        layout(512, 70 << 10, 64),
        Layout {
            version: 2,
            ..layout(1024, 150 << 10, 16)
        },
        Layout {
            extended_l2: true,
            ..layout(16384, 400 << 10, 8)
        },
        Layout {
            backing: Some((String::new(), None)),
            ..layout(512, 60 << 10, 32)
        },
    ]
}

#[test]
fn a_snapshot_is_made_wholly_or_not_at_all() {
    for (index, layout) in layouts().into_iter().enumerate() {
        let case = Case::new("create", layout, index as u64);
        case.cut_everywhere(async |image: &Qcow2| snapshot(image, true).await);
    }
}

#[test]
fn a_snapshot_is_applied_wholly_or_not_at_all() {
    for (index, layout) in layouts().into_iter().enumerate() {
        let case = Case::new("apply", layout, 100 + index as u64);
        case.cut_everywhere(async |image: &Qcow2| image.snapshot_apply("1", mark).await.unwrap());
    }
}

#[test]
fn a_snapshot_is_deleted_wholly_or_not_at_all() {
    for (index, layout) in layouts().into_iter().enumerate() {
        let case = Case::new("delete", layout, 200 + index as u64);
        let which = ["1", "2"][index % 2];
        case.cut_everywhere(async |image: &Qcow2| image.snapshot_delete(which, mark).await.unwrap());
    }
}

#[test]
fn the_device_is_grown_and_cut_wholly_or_not_at_all() {
    for (index, layout) in layouts().into_iter().enumerate() {
        if layout.version < 3 {
            continue;
        }
        let old = layout.size;
        let sizes = [
            [old + 40960, old / 2 + 512],
            [old + 512, 512],
            [old + 51200, old - 512],
        ];
        for new in sizes[index % sizes.len()] {
            let case = Case::new("resize", layout.clone(), 300 + index as u64);
            case.cut_everywhere(async |image: &Qcow2| {
                let resized = image.resize_with(new, true, Preallocation::Off, mark).await;
                resized.unwrap();
            });
        }
    }
}
