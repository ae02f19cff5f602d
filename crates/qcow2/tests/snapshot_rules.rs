//! What snapshots refuse, how they are found, and what becomes of forged images.

mod support;

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use support::crash::Disk;
use support::power::{no_harm, read_all};
use support::qemu::Qemu;
use support::{Rng, block_on, open_file};
use zbdkit_io::IoBuf;
use zbdkit_qcow2::{Error, Header, Layout, Options, Preallocation, Qcow2, Snapshot, create, read_snapshots};

fn at() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789)
}

async fn make(image: &Qcow2, name: &str) -> Result<Snapshot, Error> {
    image.snapshot_create(name, at(), |_, _| Ok(())).await
}

fn nothing(_: &mut Header) -> Result<(), Error> {
    Ok(())
}

async fn open(path: &Path) -> Qcow2 {
    let file = open_file(path);
    let header = Header::read(&file).await.unwrap();
    let options = Options {
        data_file: header
            .external_data()
            .then(|| open_file(&path.with_file_name("data"))),
        ..Options::default()
    };
    Qcow2::open(file, header, options).await.unwrap()
}

fn with<T>(path: &Path, f: impl AsyncFnOnce(&Qcow2) -> T) -> T {
    block_on(async {
        let image = open(path).await;
        let result = f(&image).await;
        image.close().await.unwrap();
        result
    })
}

fn new_image(dir: &Path, layout: &Layout) -> PathBuf {
    let path = dir.join("image.qcow2");
    let _ = std::fs::remove_file(&path);
    let data = layout.data_file.is_some().then(|| open_file(&dir.join("data")));
    block_on(create(&open_file(&path), data.as_ref(), layout)).unwrap();
    path
}

fn layout(cluster_size: u64, size: u64, refcount_bits: u32) -> Layout {
    Layout {
        cluster_size,
        size,
        refcount_bits,
        ..Layout::default()
    }
}

async fn fill(image: &Qcow2, byte: u8) {
    let buf = IoBuf::from_vec(vec![byte; image.size() as usize]);
    image.write(buf, 0).await.unwrap();
}

#[test]
fn refcounts_without_room_are_refused_before_anything_changes() {
    let dir = tempfile::tempdir().unwrap();
    for (bits, room) in [(1, 0), (2, 2), (4, 14)] {
        let path = new_image(dir.path(), &layout(4096, 1 << 20, bits));
        with(&path, async |image: &Qcow2| {
            fill(image, 1).await;
            for _ in 0..room {
                make(image, "s").await.unwrap();
            }
        });
        let before = std::fs::read(&path).unwrap();
        let error = with(&path, async |image: &Qcow2| make(image, "one more").await).unwrap_err();
        let text = error.to_string();
        let width = format!("refcounts of {bits} bit");
        assert!(
            text.contains(&width) && text.contains("refcount_bits=16"),
            "{text}"
        );
        assert!(
            std::fs::read(&path).unwrap() == before,
            "{bits} bits: something changed"
        );
        if let Some(qemu) = Qemu::find() {
            qemu.check(&path);
            // What the message advises is possible.
            qemu.img(&[
                "amend",
                "-f",
                "qcow2",
                "-o",
                "refcount_bits=16",
                path.to_str().unwrap(),
            ]);
            with(&path, async |image: &Qcow2| make(image, "one more").await).unwrap();
            qemu.check(&path);
        }
    }
}

#[test]
fn applying_needs_no_room_for_what_stays_the_same() {
    // QEMU counts everything once more meanwhile, and cannot do this.
    let dir = tempfile::tempdir().unwrap();
    let path = new_image(dir.path(), &layout(4096, 8 << 20, 2));
    with(&path, async |image: &Qcow2| {
        fill(image, 1).await;
        make(image, "one").await.unwrap();
        make(image, "two").await.unwrap();
        // One L2 table of four becomes the device's own.
        image.write(IoBuf::from_vec(vec![2; 4096]), 0).await.unwrap();
        image.snapshot_apply("one", nothing).await.unwrap_err();
        image.snapshot_delete("two", nothing).await.unwrap();
        image.snapshot_apply("one", nothing).await.unwrap();
        assert_eq!(read_all(image).await.unwrap(), vec![1; 8 << 20]);
        make(image, "two").await.unwrap();
        image.snapshot_apply("two", nothing).await.unwrap();
        assert_eq!(read_all(image).await.unwrap(), vec![1; 8 << 20]);
    });
    if let Some(qemu) = Qemu::find() {
        qemu.check(&path);
    }
}

#[test]
fn a_snapshot_is_found_by_its_id_and_then_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = new_image(dir.path(), &layout(512, 16 << 10, 16));
    with(&path, async |image: &Qcow2| {
        // The second one is named as the first one's id is.
        for (byte, name) in [(1, "twin"), (2, "1"), (3, "twin"), (4, "alone")] {
            fill(image, byte).await;
            make(image, name).await.unwrap();
        }
        for (wanted, byte) in [("1", 1), ("2", 2), ("3", 3), ("alone", 4)] {
            image.snapshot_apply(wanted, nothing).await.unwrap();
            assert_eq!(read_all(image).await.unwrap()[0], byte, "{wanted}");
        }
        for result in [
            image.snapshot_apply("twin", nothing).await,
            image.snapshot_delete("twin", nothing).await,
        ] {
            let text = result.unwrap_err().to_string();
            assert!(text.contains("several") && text.contains("1, 3"), "{text}");
        }
        for result in [
            image.snapshot_apply("nobody", nothing).await,
            image.snapshot_delete("7", nothing).await,
        ] {
            assert!(result.unwrap_err().to_string().contains("no snapshot"));
        }
        image.snapshot_delete("1", nothing).await.unwrap();
        // Now it is a name.
        image.snapshot_apply("1", nothing).await.unwrap();
        assert_eq!(read_all(image).await.unwrap()[0], 2);
        image.snapshot_delete("twin", nothing).await.unwrap();
        assert_eq!(image.next_snapshot_id().await.unwrap(), "5");
        assert_eq!(make(image, "").await.unwrap().id, "5");
    });
}

#[test]
fn names_that_nobody_could_find_again_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = new_image(dir.path(), &layout(4096, 16 << 10, 16));
    with(&path, async |image: &Qcow2| {
        make(image, &"n".repeat(255)).await.unwrap();
        for name in ["n".repeat(256), "a\0b".to_owned()] {
            assert!(matches!(make(image, &name).await, Err(Error::Refused(_))));
        }
    });
}

#[test]
fn qemu_lists_what_we_made() {
    let Some(qemu) = Qemu::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    for version in [2, 3] {
        let layout = Layout {
            version,
            ..layout(65536, 1 << 20, 16)
        };
        let path = new_image(dir.path(), &layout);
        let made = with(&path, async |image: &Qcow2| {
            make(image, "before the upgrade").await
        })
        .unwrap();
        assert_eq!(
            (made.disk_size, made.date_sec, made.date_nsec),
            (1 << 20, 1_700_000_000, 123_456_789)
        );
        let info = qemu.img(&["info", "-f", "qcow2", "--output=json", path.to_str().unwrap()]);
        for field in [
            r#""id": "1""#,
            r#""name": "before the upgrade""#,
            r#""date-sec": 1700000000"#,
            r#""date-nsec": 123456789"#,
            r#""vm-state-size": 0"#,
        ] {
            assert!(info.contains(field), "{field} is not in {info}");
        }
        assert!(!info.contains("icount"), "{info}");
        qemu.img(&["snapshot", "-c", "theirs", path.to_str().unwrap()]);
        let listed = block_on(async {
            let file = open_file(&path);
            let header = Header::read(&file).await.unwrap();
            read_snapshots(&file, &header).await.unwrap()
        });
        assert_eq!(listed[0], made);
        assert_eq!((listed[1].id.as_str(), listed[1].name.as_str()), ("2", "theirs"));
    }
}

#[test]
fn extensions_change_with_the_snapshots_or_nothing_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = new_image(dir.path(), &layout(4096, 1 << 20, 16));
    let set = |data: u8| {
        move |header: &mut Header| {
            header.set_extension(77, Some(vec![data]));
            Ok(())
        }
    };
    let refuse = |_: &mut Header| Err(Error::Refused("not so".into()));
    with(&path, async |image: &Qcow2| {
        fill(image, 1).await;
        let made = image
            .snapshot_create("s", at(), |header, snapshot| {
                assert_eq!((snapshot.id.as_str(), header.nb_snapshots), ("1", 1));
                set(1)(header)
            })
            .await;
        made.unwrap();
        assert_eq!(image.header().await.extension(77), Some(&[1][..]));
        fill(image, 2).await;
        image.close().await.unwrap();
        let header = image.header().await;
        let refused = [
            image
                .snapshot_create("t", at(), |header, _| refuse(header))
                .await
                .map(drop),
            image.snapshot_apply("1", refuse).await,
            image.snapshot_delete("1", refuse).await,
        ];
        assert!(
            refused
                .iter()
                .all(|result| *result == Err(Error::Refused("not so".into())))
        );
        assert_eq!(image.header().await, header);
        assert_eq!(read_all(image).await.unwrap()[0], 2);
        image.snapshot_apply("1", set(2)).await.unwrap();
        assert_eq!(image.header().await.extension(77), Some(&[2][..]));
        image.snapshot_delete("1", set(3)).await.unwrap();
        assert_eq!(image.header().await.extension(77), Some(&[3][..]));
        assert_eq!(read_all(image).await.unwrap()[0], 1);
    });
    if let Some(qemu) = Qemu::find() {
        qemu.check(&path);
    }
}

#[test]
fn an_image_with_a_data_file_has_no_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout {
        data_file: Some(dir.path().join("data").to_str().unwrap().to_owned()),
        ..layout(65536, 1 << 20, 16)
    };
    let path = new_image(dir.path(), &layout);
    with(&path, async |image: &Qcow2| {
        assert_eq!(image.snapshots().await.unwrap(), []);
        for result in [
            make(image, "s").await.map(drop),
            image.snapshot_apply("1", nothing).await,
            image.snapshot_delete("1", nothing).await,
        ] {
            assert_eq!(result.unwrap_err().errno(), libc::EOPNOTSUPP);
        }
    });
}

#[test]
fn an_entry_without_the_size_of_its_device_is_not_applied() {
    let dir = tempfile::tempdir().unwrap();
    // Version 2 says nothing of sizes; as version 3 the entry is incomplete.
    let path = new_image(dir.path(), &layout(65536, 1 << 20, 16));
    with(&path, async |image: &Qcow2| make(image, "s").await).unwrap();
    let header = block_on(Header::read(&open_file(&path))).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let entry = header.snapshots_offset as usize;
    // Extra data of 8 bytes; id and name follow it.
    bytes[entry + 36..entry + 40].copy_from_slice(&8u32.to_be_bytes());
    bytes.copy_within(entry + 64..entry + 80, entry + 48);
    std::fs::write(&path, bytes).unwrap();
    with(&path, async |image: &Qcow2| {
        assert_eq!(image.snapshots().await.unwrap()[0].name, "s");
        let refused = image.snapshot_apply("s", nothing).await.unwrap_err();
        assert!(refused.to_string().contains("incomplete"), "{refused}");
        let refused = image
            .resize(2 << 20, false, Preallocation::Off)
            .await
            .unwrap_err();
        assert!(refused.to_string().contains("incomplete"), "{refused}");
        // A new table completes it.
        make(image, "t").await.unwrap();
        image.snapshot_apply("s", nothing).await.unwrap();
    });
    if let Some(qemu) = Qemu::find() {
        qemu.check(&path);
    }
}

#[test]
fn a_snapshot_of_another_size_brings_its_size_back() {
    let dir = tempfile::tempdir().unwrap();
    for sizes in [[1 << 20, (3 << 20) + 512], [(3 << 20) + 512, 1 << 20]] {
        let path = new_image(dir.path(), &layout(4096, sizes[0], 16));
        with(&path, async |image: &Qcow2| {
            fill(image, 1).await;
            make(image, "first").await.unwrap();
            image.resize(sizes[1], true, Preallocation::Off).await.unwrap();
            fill(image, 2).await;
            make(image, "second").await.unwrap();
            for (name, size, byte) in [("first", sizes[0], 1), ("second", sizes[1], 2)] {
                image.snapshot_apply(name, nothing).await.unwrap();
                assert_eq!(
                    read_all(image).await.unwrap(),
                    vec![byte; size as usize],
                    "{name}"
                );
            }
        });
        if let Some(qemu) = Qemu::find() {
            qemu.check(&path);
            qemu.img(&["snapshot", "-a", "first", path.to_str().unwrap()]);
            assert_eq!(qemu.contents(&path, None), vec![1; sizes[0] as usize]);
        }
    }
}

/// Changes words of an image here and there, most often to something that looks like metadata.
fn forge(bytes: &mut [u8], metadata: usize, rng: &mut Rng) {
    for _ in 0..1 + rng.below(4) {
        let at = rng.below(metadata as u64 / 8) as usize * 8;
        let clusters = bytes.len() as u64 / 512;
        let word = match rng.below(6) {
            0 => rng.word(),
            1 => 0,
            2 => u64::MAX,
            3 => rng.below(clusters) * 512,
            4 => (rng.below(clusters) * 512) | (1 << 63),
            _ => rng.below(1 << 16),
        };
        match rng.below(4) {
            0 => bytes[at] = word as u8,
            1 => bytes[at..at + 4].copy_from_slice(&(word as u32).to_be_bytes()),
            _ => bytes[at..at + 8].copy_from_slice(&word.to_be_bytes()),
        }
    }
}

/// Opens a forged image and does something with it, whatever comes of that.
async fn use_forged(disk: &Disk, rng: &mut Rng) -> Result<(), Error> {
    let header = Header::read(&disk.file()).await?;
    if header.external_data() {
        return Ok(());
    }
    let image = Qcow2::open(disk.file(), header, Options::default()).await?;
    let _ = image.snapshots().await;
    for _ in 0..3 {
        let size = rng.below(200) * 512;
        let done = match rng.below(5) {
            0 => make(&image, "x").await.map(drop),
            1 => {
                image
                    .snapshot_apply(["1", "2"][rng.below(2) as usize], nothing)
                    .await
            }
            2 => {
                image
                    .snapshot_delete(["1", "2"][rng.below(2) as usize], nothing)
                    .await
            }
            3 => image.resize(size, true, Preallocation::Off).await,
            _ if image.size() < 1 << 20 => image.write(IoBuf::alloc(image.size() as usize), 0).await,
            _ => Ok(()),
        };
        // Errors are what is to be expected.
        drop(done);
    }
    image.close().await
}

#[test]
fn forged_images_are_errors_and_nothing_worse() {
    let disk = Disk::new();
    block_on(async {
        create(&disk.file(), None, &layout(512, 48 << 10, 16))
            .await
            .unwrap();
        let header = Header::read(&disk.file()).await.unwrap();
        let image = Qcow2::open(disk.file(), header, Options::default())
            .await
            .unwrap();
        for byte in [1, 2] {
            fill(&image, byte).await;
            make(&image, "s").await.unwrap();
        }
        fill(&image, 3).await;
        image.close().await.unwrap();
    });
    block_on(no_harm(&disk)).unwrap();
    let whole = disk.now().to_vec();
    let rounds = match std::env::var_os("ZBDKIT_LONG") {
        Some(_) => 200_000,
        None => 1500,
    };
    let (mut went, mut failed) = (0, 0);
    for seed in 0..rounds {
        let mut rng = Rng(seed);
        let mut bytes = whole.clone();
        let len = bytes.len();
        // The header's words and the first clusters are hit more often.
        let metadata = if rng.one_in(3) { 2048 } else { len };
        forge(&mut bytes, metadata, &mut rng);
        let forged = Disk::from_vec(&bytes);
        let used = std::panic::catch_unwind(AssertUnwindSafe(|| block_on(use_forged(&forged, &mut rng))));
        match used.unwrap_or_else(|_| panic!("seed {seed} panics")) {
            Ok(()) => went += 1,
            Err(_) => failed += 1,
        }
        let now = forged.now().len();
        assert!(now < 16 << 20, "seed {seed}: the file has {now} bytes now");
    }
    assert!(went > 0 && failed > 0, "{went} went, {failed} failed");
}
