//! Changes of the device's size: what is grown reads as zeros whatever lay there, what is cut is let go, and QEMU agrees.

mod support;

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use support::power::{Below, read_all};
use support::qemu::Qemu;
use support::{block_on, open_file};
use zbdkit_io::IoBuf;
use zbdkit_qcow2::{
    Backing, Error, Header, Layout, Mapping, Options, Preallocation, Qcow2, Repair, check, create,
};

const OFF: Preallocation = Preallocation::Off;

/// An image in a directory of its own, with what belongs to it.
struct Image {
    dir: tempfile::TempDir,
    below: Option<Vec<u8>>,
}

impl Image {
    fn new(mut layout: Layout) -> Image {
        let dir = tempfile::tempdir().unwrap();
        let image = Image { dir, below: None };
        if let Some(name) = &mut layout.data_file {
            *name = image.data().to_str().unwrap().to_owned();
        }
        let data = layout.data_file.is_some().then(|| open_file(&image.data()));
        block_on(create(&open_file(&image.path()), data.as_ref(), &layout)).unwrap();
        image
    }

    /// An overlay over these bytes.
    fn over(mut layout: Layout, below: Vec<u8>) -> Image {
        layout.backing = Some(("below.raw".into(), Some("raw".into())));
        let mut image = Image::new(layout);
        std::fs::write(image.dir.path().join("below.raw"), &below).unwrap();
        image.below = Some(below);
        image
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image.qcow2")
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Opens it, does something with it, and closes it.
    fn with<T>(&self, f: impl AsyncFnOnce(&Qcow2) -> T) -> T {
        block_on(async {
            let file = open_file(&self.path());
            let header = Header::read(&file).await.unwrap();
            let below = self.below.clone();
            let options = Options {
                backing: below.map(|bytes| Arc::new(Below(bytes)) as Arc<dyn Backing>),
                data_file: header.external_data().then(|| open_file(&self.data())),
                ..Options::default()
            };
            let image = Qcow2::open(file, header, options).await.unwrap();
            let result = f(&image).await;
            image.close().await.unwrap();
            result
        })
    }

    fn resize(&self, size: u64) {
        self.with(async |image: &Qcow2| image.resize(size, true, OFF).await)
            .unwrap();
    }

    fn fill(&self, offset: u64, len: u64, byte: u8) {
        self.with(async |image: &Qcow2| {
            let buf = IoBuf::from_vec(vec![byte; len as usize]);
            image.write(buf, offset).await
        })
        .unwrap();
    }

    /// Our reading, which must be QEMU's too, and neither finds an error or a leak.
    fn contents(&self) -> Vec<u8> {
        let ours = self.with(async |image: &Qcow2| read_all(image).await.unwrap());
        self.check();
        if let Some(qemu) = Qemu::find() {
            qemu.check(&self.path());
            assert!(
                qemu.contents(&self.path(), None) == ours,
                "QEMU reads something else"
            );
        }
        ours
    }

    fn check(&self) {
        let report = block_on(async {
            let file = open_file(&self.path());
            let header = Header::read(&file).await.unwrap();
            check(&file, &header, None, &[], Repair::None, &mut |_, _| {})
                .await
                .unwrap()
        });
        let found = (report.corruptions, report.leaks, report.check_errors);
        assert_eq!(found, (0, 0, 0), "{:#?}", report.messages);
    }
}

fn layouts() -> Vec<Layout> {
    let layout = |cluster_size| Layout {
        cluster_size,
        size: 3 << 20,
        ..Layout::default()
    };
    vec![
        layout(512),
        layout(4096),
        layout(65536),
        layout(2 << 20),
        Layout {
            extended_l2: true,
            ..layout(16384)
        },
    ]
}

fn ones(contents: &[u8], byte: u8) -> usize {
    contents.iter().filter(|other| **other == byte).count()
}

#[test]
fn what_was_cut_is_gone_when_the_device_grows_again() {
    let cuts = [512, 65536 + 1024, 5 * 512, (2 << 20) - 512];
    for (index, layout) in layouts().into_iter().enumerate() {
        for cut in cuts.into_iter().skip(index % 2).step_by(2) {
            let image = Image::new(layout.clone());
            image.fill(0, 3 << 20, 7);
            image.resize(cut);
            assert_eq!(ones(&image.contents(), 7), cut as usize);
            image.resize(4 << 20);
            let contents = image.contents();
            assert_eq!(contents.len(), 4 << 20);
            assert!(contents[..cut as usize].iter().all(|byte| *byte == 7));
            assert_eq!(ones(&contents, 7), cut as usize, "cut to {cut} in {layout:?}");
        }
    }
}

#[test]
fn what_was_cut_is_gone_for_qemu_too() {
    let Some(qemu) = Qemu::find() else { return };
    for layout in layouts() {
        let image = Image::new(layout.clone());
        image.fill(0, 3 << 20, 7);
        image.resize((1 << 20) + 512);
        qemu.img(&[
            "resize",
            "-q",
            "-f",
            "qcow2",
            image.path().to_str().unwrap(),
            "3M",
        ]);
        assert_eq!(ones(&image.contents(), 7), (1 << 20) + 512, "{layout:?}");
    }
}

#[test]
fn a_snapshot_keeps_what_the_device_loses() {
    for layout in layouts() {
        let image = Image::new(layout);
        image.fill(0, 3 << 20, 7);
        image.with(async |image: &Qcow2| {
            let made = image
                .snapshot_create("all of it", SystemTime::now(), |_, _| Ok(()))
                .await;
            made.unwrap();
        });
        image.resize(1536);
        image.resize(4 << 20);
        assert_eq!(ones(&image.contents(), 7), 1536);
        image
            .with(async |image: &Qcow2| image.snapshot_apply("all of it", |_| Ok(())).await)
            .unwrap();
        assert_eq!(image.contents(), vec![7; 3 << 20]);
    }
}

#[test]
fn compressed_clusters_and_zeros_are_cut_too() {
    for layout in layouts() {
        let image = Image::new(layout.clone());
        let n = layout.cluster_size;
        image.with(async |image: &Qcow2| {
            for index in 0..(2 << 20) / n {
                let data = vec![3; n as usize];
                image.write_compressed(&data, index * n).await.unwrap();
            }
            image.write_zeroes(2 << 20, 1 << 20, false).await.unwrap();
        });
        image.resize((1 << 20) + 1024);
        image.resize(3 << 20);
        assert_eq!(ones(&image.contents(), 3), (1 << 20) + 1024, "{layout:?}");
    }
}

#[test]
fn a_longer_backing_image_does_not_show_in_what_is_grown() {
    let sizes = [(1 << 20) + 512, 1 << 20, 512, 65536 * 3];
    for (index, layout) in layouts().into_iter().enumerate() {
        for size in sizes.into_iter().skip(index % 2).step_by(2) {
            let layout = Layout {
                size,
                ..layout.clone()
            };
            let image = Image::over(layout.clone(), vec![9; (2 << 20) + 1536]);
            image.resize(3 << 20);
            let contents = image.contents();
            assert!(contents[..size as usize].iter().all(|byte| *byte == 9));
            assert_eq!(ones(&contents, 9), size as usize, "{layout:?}");
            // Cutting it again, where the backing image would show, and growing.
            image.resize(1024);
            image.resize(2 << 20);
            assert_eq!(ones(&image.contents(), 9), 1024.min(size as usize), "{layout:?}");
        }
    }
}

#[test]
fn version_2_cannot_hide_a_longer_backing_image() {
    let layout = Layout {
        version: 2,
        size: 1 << 20,
        ..Layout::default()
    };
    let image = Image::over(layout.clone(), vec![9; 2 << 20]);
    let before = std::fs::read(image.path()).unwrap();
    let error = image
        .with(async |image: &Qcow2| image.resize(2 << 20, false, OFF).await)
        .unwrap_err();
    assert!(
        error.to_string().contains("Failed to zero out the new area"),
        "{error}"
    );
    assert!(std::fs::read(image.path()).unwrap() == before);
    // As long as it does not show, all is well.
    let image = Image::over(layout, vec![9; 1 << 20]);
    image.resize(2 << 20);
    assert_eq!(ones(&image.contents(), 9), 1 << 20);
}

#[test]
fn what_lay_behind_the_end_is_not_shown() {
    // Another program cut the device by its header alone, or the saved state of a guest lies there.
    let layout = Layout {
        cluster_size: 512,
        size: 128 << 10,
        ..Layout::default()
    };
    let image = Image::new(layout);
    image.fill(0, 128 << 10, 5);
    let mut bytes = std::fs::read(image.path()).unwrap();
    bytes[24..32].copy_from_slice(&(40u64 << 10).to_be_bytes());
    std::fs::write(image.path(), bytes).unwrap();
    assert_eq!(ones(&image.contents(), 5), 40 << 10);
    image.resize(100 << 10);
    assert_eq!(ones(&image.contents(), 5), 40 << 10);
}

#[test]
fn a_device_of_no_bytes_can_grow() {
    for layout in layouts() {
        let image = Image::new(Layout { size: 0, ..layout });
        image.resize(3 << 20);
        image.fill(1 << 20, 4096, 1);
        image.resize(0);
        assert_eq!(image.contents(), []);
        image.resize(2 << 20);
        assert_eq!(image.contents(), vec![0; 2 << 20]);
    }
}

/// A change of size that is not made, and what is said then.
struct Refusal {
    layout: Layout,
    snapshot: bool,
    size: u64,
    shrink: bool,
    preallocation: Preallocation,
    text: &'static str,
}

#[test]
fn refusals_are_qemus_and_change_nothing() {
    let v2 = Layout {
        version: 2,
        size: 1 << 20,
        ..Layout::default()
    };
    let v3 = Layout {
        size: 1 << 20,
        cluster_size: 4096,
        ..Layout::default()
    };
    let case = |layout: &Layout, snapshot: bool, size: u64, text: &'static str| Refusal {
        layout: layout.clone(),
        snapshot,
        size,
        shrink: true,
        preallocation: OFF,
        text,
    };
    let cases = [
        case(&v3, false, 1_000_000, "The new size must be a multiple of 512"),
        Refusal {
            shrink: false,
            ..case(
                &v3,
                false,
                524_288,
                "Use the --shrink option to perform a shrink operation.",
            )
        },
        Refusal {
            preallocation: Preallocation::Full,
            ..case(
                &v3,
                false,
                524_288,
                "Preallocation can only be used for growing images",
            )
        },
        case(&v2, true, 2 << 20, "Can't resize a v2 image which has snapshots"),
        // The same in other words.
        case(&v3, false, 1 << 50, ""),
    ];
    for Refusal {
        layout,
        snapshot,
        size,
        shrink,
        preallocation,
        text,
    } in cases
    {
        let image = Image::new(layout);
        if snapshot {
            image.with(async |image: &Qcow2| {
                let made = image.snapshot_create("s", SystemTime::now(), |_, _| Ok(())).await;
                made.unwrap();
            });
        }
        let before = std::fs::read(image.path()).unwrap();
        let refused = image.with(async |image: &Qcow2| {
            let size_before = image.size();
            let refused = image.resize(size, shrink, preallocation).await.unwrap_err();
            assert_eq!(image.size(), size_before);
            refused
        });
        assert!(refused.to_string().contains(text), "{refused}");
        if text.is_empty() {
            assert_eq!(refused.errno(), libc::EFBIG);
        }
        assert!(
            std::fs::read(image.path()).unwrap() == before,
            "{refused}, but something changed"
        );
        let Some(qemu) = Qemu::find() else { continue };
        let size = size.to_string();
        let mut command = vec!["resize", "-f", "qcow2"];
        if shrink {
            command.push("--shrink");
        }
        if preallocation == Preallocation::Full {
            command.push("--preallocation=full");
        }
        let path = image.path();
        command.extend([path.to_str().unwrap(), &size]);
        let said = qemu.try_img(&command);
        assert_eq!(said.code, Some(1), "{}", said.text);
        assert!(said.text.contains(text), "{}", said.text);
    }
}

#[test]
fn the_extensions_change_with_the_size() {
    let image = Image::new(Layout {
        size: 1 << 20,
        ..Layout::default()
    });
    image.with(async |image: &Qcow2| {
        let also = |header: &mut Header| {
            assert_eq!(header.size, 2 << 20);
            header.set_extension(77, Some(vec![1, 2, 3]));
            Ok(())
        };
        image.resize_with(2 << 20, false, OFF, also).await.unwrap();
        let refused = |_: &mut Header| Err(Error::Refused("not so".into()));
        let error = image.resize_with(3 << 20, false, OFF, refused).await.unwrap_err();
        assert_eq!(error, Error::Refused("not so".into()));
        assert_eq!(image.size(), 2 << 20);
        assert_eq!(image.header().await.extension(77), Some(&[1, 2, 3][..]));
    });
    assert_eq!(image.contents(), vec![0; 2 << 20]);
}

#[test]
fn what_is_grown_gets_its_space() {
    for mode in [
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ] {
        for cluster_size in [512, 65536] {
            let image = Image::new(Layout {
                cluster_size,
                size: (1 << 20) + 512,
                ..Layout::default()
            });
            let blocks = |image: &Image| std::fs::metadata(image.path()).unwrap().blocks() * 512;
            let before = blocks(&image);
            image
                .with(async |image: &Qcow2| image.resize(3 << 20, false, mode).await)
                .unwrap();
            image.with(async |image: &Qcow2| {
                let mut at = 0;
                while at < 1 << 20 {
                    let extent = image.map(at, (1 << 20) - at).await.unwrap();
                    assert_eq!(extent.mapping, Mapping::Unallocated, "{mode:?} at {at}");
                    at += extent.len;
                }
                let mut at = (1 << 20) + cluster_size;
                while at < 3 << 20 {
                    let extent = image.map(at, (3 << 20) - at).await.unwrap();
                    assert!(
                        matches!(extent.mapping, Mapping::Data { .. }),
                        "{mode:?}: {extent:?} at {at}"
                    );
                    at += extent.len;
                }
            });
            assert_eq!(image.contents(), vec![0; 3 << 20]);
            let grown = blocks(&image) - before;
            assert_eq!(
                grown > 1 << 20,
                mode != Preallocation::Metadata,
                "{mode:?}: {grown} bytes"
            );
        }
    }
}

#[test]
fn a_data_file_is_as_long_as_the_device_and_zero_where_it_grew() {
    for raw in [false, true] {
        let image = Image::new(Layout {
            size: (1 << 20) + 512,
            data_file: Some("data".into()),
            data_file_raw: raw,
            ..Layout::default()
        });
        let len = |image: &Image| std::fs::metadata(image.data()).unwrap().len();
        image.fill(0, (1 << 20) + 512, 6);
        image.resize(65536 + 512);
        assert_eq!(len(&image), 65536 + 512);
        // Somebody left more there than the device has.
        let mut rest = std::fs::read(image.data()).unwrap();
        rest.resize(200_000, 6);
        std::fs::write(image.data(), rest).unwrap();
        let refused = image.with(async |image: &Qcow2| {
            let refuse = |_: &mut Header| Err(Error::Refused("not so".into()));
            image.resize_with(2 << 20, false, OFF, refuse).await
        });
        assert!(refused.is_err());
        assert_eq!(len(&image), 200_000, "it stays as it is");
        image.resize(2 << 20);
        assert_eq!(len(&image), 2 << 20);
        image.fill(1 << 20, 512, 8);
        let mut expected = vec![0; 2 << 20];
        expected[..65536 + 512].fill(6);
        expected[1 << 20..(1 << 20) + 512].fill(8);
        let contents = image.with(async |image: &Qcow2| read_all(image).await.unwrap());
        assert!(contents == expected, "raw {raw}");
        if raw {
            assert!(
                std::fs::read(image.data()).unwrap() == expected,
                "the data file is no raw image"
            );
        }
        if let Some(qemu) = Qemu::find() {
            qemu.check(&image.path());
            assert!(qemu.contents(&image.path(), None) == expected, "QEMU, raw {raw}");
        }
    }
}

#[test]
fn a_large_device_grows_without_much_ado() {
    let image = Image::new(Layout {
        size: 1 << 30,
        ..Layout::default()
    });
    image.fill((1 << 30) - 65536, 65536, 4);
    image.resize(64 << 40);
    image.with(async |image: &Qcow2| {
        let last = IoBuf::from_vec(vec![5; 4096]);
        image.write(last, (64 << 40) - 4096).await.unwrap();
        let buf = IoBuf::alloc(65536);
        image.read(buf.clone(), (1 << 30) - 65536).await.unwrap();
        assert_eq!(buf.to_vec(), vec![4; 65536]);
    });
    image.check();
    let size = std::fs::metadata(image.path()).unwrap().blocks() * 512;
    assert!(size < 8 << 20, "{size} bytes");
    image.resize(1 << 30);
    image.check();
    if let Some(qemu) = Qemu::find() {
        qemu.check(&image.path());
    }
}
