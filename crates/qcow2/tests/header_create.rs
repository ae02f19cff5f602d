//! New images, and what QEMU says of them. Where its tools are not there (`cargo xtask rig` fetches them), the tests
//! that ask it do nothing.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use zbdkit_io::{File, FileKind, LocalBoxFuture, Runtime, RuntimeOptions, Storage, StorageOp};
use zbdkit_qcow2::{Compression, Error, Header, Layout, Preallocation, create};

/// `qemu-img` out of the rig's tree, run through the tree's own dynamic linker.
struct QemuImg {
    tree: PathBuf,
}

impl QemuImg {
    fn find() -> Option<QemuImg> {
        let tree = Path::new(env!("CARGO_MANIFEST_DIR"))
            .ancestors()
            .map(|ancestor| ancestor.join("target/rig/qemu"))
            .find(|tree| tree.join("usr/bin/qemu-img").is_file());
        if tree.is_none() {
            eprintln!("not asking QEMU: there is no target/rig/qemu");
        }
        tree.map(|tree| QemuImg { tree })
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let libraries = self.tree.join("usr/lib/x86_64-linux-gnu");
        Command::new(self.tree.join("usr/lib64/ld-linux-x86-64.so.2"))
            .args(["--inhibit-cache", "--library-path"])
            .arg(&libraries)
            .args(["--argv0", "qemu-img"])
            .arg(self.tree.join("usr/bin/qemu-img"))
            .args(arguments)
            .env("QEMU_MODULE_DIR", libraries.join("qemu"))
            .output()
            .expect("qemu-img starts")
    }

    /// Runs it and gives what it prints; it must succeed.
    fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let complaints = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {said}{complaints}");
        said + &complaints
    }
}

fn runtime() -> Runtime {
    Runtime::new(RuntimeOptions::default()).expect("a runtime")
}

fn open(path: &Path) -> File {
    let mut options = std::fs::File::options();
    let file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path);
    File::from_fd(file.expect("a file").into(), FileKind::default())
}

fn make(path: &Path, layout: &Layout) -> Result<Header, Error> {
    let data = layout
        .data_file
        .as_ref()
        .map(|name| open(&path.with_file_name(name)));
    runtime().block_on(create(&open(path), data.as_ref(), layout))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of ours")
}

#[test]
fn what_was_created_is_read_back() {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("image");
    let layout = Layout {
        size: 1 << 30,
        extended_l2: true,
        compression: Compression::Zstd,
        lazy_refcounts: true,
        backing: Some(("base.raw".into(), Some("raw".into()))),
        ..Layout::default()
    };
    let made = make(&path, &layout).expect("it is made");
    let read = runtime()
        .block_on(Header::read(&open(&path)))
        .expect("it is read");
    assert_eq!(read, made);
    assert_eq!(read.check_features(0), Ok(()));
    assert_eq!((read.l1_size, read.refcount_table_clusters), (4, 1));
    assert_eq!((read.refcount_table_offset, read.l1_offset), (0x10000, 0x30000));
    assert_eq!(read.backing_format(), Some("raw"));
    assert!(read.lazy_refcounts() && read.extended_l2());
}

/// Keeps what is written, and the order of writes and syncs.
#[derive(Default)]
struct Recorder {
    bytes: Mutex<Vec<u8>>,
    order: Mutex<Vec<String>>,
}

impl Storage for Recorder {
    fn submit(&self, op: StorageOp) -> LocalBoxFuture<'static, std::io::Result<()>> {
        let mut bytes = self.bytes.lock().expect("not poisoned");
        let done = match &op {
            StorageOp::Write { buf, offset } => {
                let range = *offset as usize..*offset as usize + buf.len();
                bytes[range].copy_from_slice(&buf.to_vec());
                format!("write {offset:#x}")
            }
            StorageOp::Sync => "sync".to_owned(),
            other => panic!("{other:?} is not needed in an empty file"),
        };
        self.order.lock().expect("not poisoned").push(done);
        Box::pin(async { Ok(()) })
    }

    fn len(&self) -> std::io::Result<u64> {
        Ok(self.bytes.lock().expect("not poisoned").len() as u64)
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.bytes.lock().expect("not poisoned").resize(len as usize, 0);
        Ok(())
    }
}

#[test]
fn the_header_is_written_last_over_synced_tables() {
    let recorder = Arc::new(Recorder::default());
    let file = File::custom(recorder.clone());
    let layout = Layout {
        size: 1 << 20,
        ..Layout::default()
    };
    let made = runtime()
        .block_on(create(&file, None, &layout))
        .expect("it is made");
    let order = recorder.order.lock().expect("not poisoned").join(", ");
    assert_eq!(order, "write 0x10000, write 0x20000, sync, write 0x0, sync");
    let bytes = recorder.bytes.lock().expect("not poisoned");
    assert_eq!(Header::decode(&bytes, bytes.len() as u64), Ok(made));
}

#[test]
fn a_used_file_is_made_an_image_without_its_old_content() {
    let directory = TempDir::new().expect("a directory");
    let (used, fresh) = (directory.path().join("used"), directory.path().join("fresh"));
    std::fs::write(&used, vec![0xff; 0x48000]).expect("written");
    let layout = Layout {
        size: 1 << 20,
        ..Layout::default()
    };
    make(&used, &layout).expect("it is made");
    make(&fresh, &layout).expect("it is made");
    let (used, fresh) = (
        std::fs::read(&used).expect("read"),
        std::fs::read(&fresh).expect("read"),
    );
    assert!(
        used[..0x40000] == fresh[..],
        "metadata has only what belongs there"
    );
    assert!(
        used[0x40000..].iter().all(|byte| *byte == 0xff),
        "the rest was not touched"
    );
}

#[test]
fn the_external_data_file_gets_the_size_of_the_device() {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("image");
    let layout = Layout {
        size: 3 << 20,
        data_file: Some("data".into()),
        ..Layout::default()
    };
    let header = make(&path, &layout).expect("it is made");
    assert!(header.external_data() && !header.data_raw());
    assert_eq!(header.data_file_name(), Some("data"));
    let len = std::fs::metadata(directory.path().join("data"))
        .expect("it is there")
        .len();
    assert_eq!(len, 3 << 20);
    let alone = runtime().block_on(create(&open(&path), None, &layout));
    assert!(matches!(alone, Err(Error::Refused(_))));
}

#[test]
fn raw_data_files_are_mapped_from_the_start() {
    let layout = Layout {
        data_file: Some("data".into()),
        data_file_raw: true,
        ..Layout::default()
    };
    assert_eq!(layout.effective_preallocation(), Preallocation::Metadata);
    assert_eq!(Layout::default().effective_preallocation(), Preallocation::Off);
}

/// What is refused, the options by which `qemu-img create` is asked for it, and QEMU's message.
fn impossible() -> Vec<(Layout, &'static str, &'static str)> {
    let plain = Layout {
        size: 1 << 20,
        ..Layout::default()
    };
    let version_2 = Layout {
        version: 2,
        ..plain.clone()
    };
    let backed = Layout {
        backing: Some(("base".into(), Some("raw".into()))),
        ..plain.clone()
    };
    let clusters = "Cluster size must be a power of two between 512 and 2048k";
    let width = "Refcount width must be a power of two and may not exceed 64 bits";
    let large = "The image size is too large for file format 'qcow2' (try using a larger cluster size)";
    let cluster_size = |cluster_size| Layout {
        cluster_size,
        ..plain.clone()
    };
    let refcount_bits = |refcount_bits| Layout {
        refcount_bits,
        ..plain.clone()
    };
    vec![
        (cluster_size(256), "cluster_size=256", clusters),
        (cluster_size(1000), "cluster_size=1000", clusters),
        (cluster_size(4 << 20), "cluster_size=4M", clusters),
        (refcount_bits(0), "refcount_bits=0", width),
        (refcount_bits(3), "refcount_bits=3", width),
        (refcount_bits(128), "refcount_bits=128", width),
        (
            Layout {
                cluster_size: 512,
                size: 129 << 30,
                ..plain.clone()
            },
            "cluster_size=512,size=129G",
            large,
        ),
        (
            Layout {
                size: 3 << 50,
                ..plain.clone()
            },
            "size=3P",
            large,
        ),
        (
            Layout {
                cluster_size: 8192,
                extended_l2: true,
                ..plain.clone()
            },
            "cluster_size=8k,extended_l2=on",
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        ),
        (
            Layout {
                refcount_bits: 8,
                ..version_2.clone()
            },
            "compat=0.10,refcount_bits=8",
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
        ),
        (
            Layout {
                lazy_refcounts: true,
                ..version_2.clone()
            },
            "compat=0.10,lazy_refcounts=on",
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        (
            Layout {
                extended_l2: true,
                ..version_2.clone()
            },
            "compat=0.10,extended_l2=on",
            "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        (
            Layout {
                compression: Compression::Zstd,
                ..version_2.clone()
            },
            "compat=0.10,compression_type=zstd",
            "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        (
            Layout {
                data_file: Some("data".into()),
                ..version_2
            },
            "compat=0.10,data_file=data",
            "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ),
        (
            Layout {
                data_file_raw: true,
                ..plain.clone()
            },
            "data_file_raw=on",
            "data-file-raw requires data-file",
        ),
        (
            Layout {
                data_file: Some("data".into()),
                data_file_raw: true,
                ..backed.clone()
            },
            "data_file=data,data_file_raw=on,backing_file=base,backing_fmt=raw",
            "Backing file and data-file-raw cannot be used at the same time",
        ),
        (
            Layout {
                preallocation: Preallocation::Full,
                ..backed
            },
            "preallocation=full,backing_file=base,backing_fmt=raw",
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        ),
    ]
}

#[test]
fn impossible_layouts_are_refused_in_qemus_words() {
    let directory = TempDir::new().expect("a directory");
    let qemu = QemuImg::find();
    for (layout, options, message) in impossible() {
        let path = directory.path().join("ours");
        assert_eq!(make(&path, &layout), Err(Error::Refused(message.into())));
        assert_eq!(
            std::fs::metadata(&path).expect("it was opened").len(),
            0,
            "nothing was written"
        );
        let Some(qemu) = &qemu else { continue };
        let theirs = directory.path().join("theirs");
        let data = format!("data_file={}", text(&directory.path().join("data")));
        let options = options.replace("data_file=data", &data);
        let sized = options.split(',').any(|option| option.starts_with("size="));
        let size = if sized { "" } else { ",size=1M" };
        let options = format!("{options}{size}");
        let output = qemu.run(&["create", "-u", "-f", "qcow2", "-o", &options, text(&theirs)]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.trim_end().ends_with(message), "{options}: QEMU says {said}");
    }
}

#[test]
fn what_no_header_can_say_is_refused() {
    let backing = |name: &str, format: &str| Layout {
        backing: Some((name.into(), Some(format.into()))),
        ..Layout::default()
    };
    for layout in [
        backing("", "raw"),
        backing("a\0b", "raw"),
        backing(&"x".repeat(1024), "raw"),
        backing("base", "a format of 17 b."),
        Layout {
            cluster_size: 512,
            ..backing(&"x".repeat(400), "raw")
        },
        Layout {
            size: 1000,
            ..Layout::default()
        },
        Layout {
            version: 4,
            ..Layout::default()
        },
        Layout {
            size: 1 << 63,
            cluster_size: 2 << 20,
            ..Layout::default()
        },
    ] {
        assert!(matches!(layout.check(), Err(Error::Refused(_))), "{layout:?}");
    }
    assert_eq!(backing(&"x".repeat(1023), "qcow2").check(), Ok(()));
}

#[test]
fn qemu_finds_nothing_wrong_with_any_cluster_size_and_refcount_width() {
    let Some(qemu) = QemuImg::find() else { return };
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("image");
    for cluster_bits in 9..=21 {
        for order in 0..=6 {
            let _ = std::fs::remove_file(&path);
            let layout = Layout {
                size: 100 << 20,
                cluster_size: 1 << cluster_bits,
                refcount_bits: 1 << order,
                ..Layout::default()
            };
            make(&path, &layout).expect("it is made");
            let said = qemu.succeed(&["check", "-f", "qcow2", text(&path)]);
            assert!(
                said.starts_with("No errors were found on the image."),
                "{layout:?}: {said}"
            );
        }
    }
}

#[test]
fn qemu_finds_nothing_wrong_with_small_and_huge_images() {
    let Some(qemu) = QemuImg::find() else { return };
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("image");
    let sized = |size, cluster_size, refcount_bits| Layout {
        size,
        cluster_size,
        refcount_bits,
        ..Layout::default()
    };
    let version_2 = Layout {
        version: 2,
        ..sized(1 << 30, 65536, 16)
    };
    let extended = Layout {
        extended_l2: true,
        ..sized(1 << 60, 2 << 20, 16)
    };
    for layout in [
        sized(0, 65536, 16),
        sized(512, 512, 1),
        sized(512, 2 << 20, 64),
        sized(8 << 30, 512, 64),
        sized(8 << 30, 512, 1),
        sized(1 << 50, 2 << 20, 16),
        sized(2 << 50, 65536, 8),
        version_2,
        extended,
    ] {
        let _ = std::fs::remove_file(&path);
        make(&path, &layout).expect("it is made");
        let said = qemu.succeed(&["check", "-f", "qcow2", text(&path)]);
        assert!(
            said.starts_with("No errors were found on the image."),
            "{layout:?}: {said}"
        );
        let said = qemu.succeed(&["info", "-f", "qcow2", "--output=json", text(&path)]);
        assert!(
            said.contains(&format!("\"virtual-size\": {},", layout.size)),
            "{said}"
        );
        assert!(
            said.contains(&format!("\"cluster-size\": {},", layout.cluster_size)),
            "{said}"
        );
    }
}

#[test]
fn images_are_byte_for_byte_those_of_qemu_img() {
    let Some(qemu) = QemuImg::find() else { return };
    let directory = TempDir::new().expect("a directory");
    let (ours, theirs) = (directory.path().join("ours"), directory.path().join("theirs"));
    let plain = Layout {
        size: 64 << 20,
        ..Layout::default()
    };
    let base = directory.path().join("base");
    std::fs::write(&base, vec![0; 4096]).expect("written");
    for (layout, options) in [
        (plain.clone(), "size=64M".to_owned()),
        (
            Layout {
                size: 0,
                ..plain.clone()
            },
            "size=0".to_owned(),
        ),
        (
            Layout {
                version: 2,
                ..plain.clone()
            },
            "size=64M,compat=0.10".to_owned(),
        ),
        (
            Layout {
                cluster_size: 2 << 20,
                refcount_bits: 1,
                ..plain.clone()
            },
            "size=64M,cluster_size=2M,refcount_bits=1".to_owned(),
        ),
        (
            Layout {
                cluster_size: 512,
                refcount_bits: 64,
                size: 1 << 20,
                ..plain.clone()
            },
            "size=1M,cluster_size=512,refcount_bits=64".to_owned(),
        ),
        (
            Layout {
                extended_l2: true,
                compression: Compression::Zstd,
                lazy_refcounts: true,
                ..plain.clone()
            },
            "size=64M,extended_l2=on,compression_type=zstd,lazy_refcounts=on".to_owned(),
        ),
        (
            Layout {
                backing: Some((text(&base).to_owned(), Some("raw".into()))),
                ..plain
            },
            format!("size=64M,backing_file={},backing_fmt=raw", text(&base)),
        ),
    ] {
        for path in [&ours, &theirs] {
            let _ = std::fs::remove_file(path);
        }
        make(&ours, &layout).expect("it is made");
        qemu.succeed(&["create", "-f", "qcow2", "-o", &options, text(&theirs)]);
        let ours = std::fs::read(&ours).expect("read");
        let mut theirs = std::fs::read(&theirs).expect("read");
        // QEMU leaves out the rest of the last cluster.
        theirs.resize(theirs.len().next_multiple_of(layout.cluster_size as usize), 0);
        assert_eq!(ours.len(), theirs.len(), "{options}");
        let differs = ours.iter().zip(&theirs).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{options}");
    }
}

#[test]
fn qemu_writes_to_an_image_with_an_external_data_file() {
    let Some(qemu) = QemuImg::find() else { return };
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("image");
    let layout = Layout {
        size: 1 << 20,
        // QEMU takes relative names from its working directory.
        data_file: Some(text(&directory.path().join("data")).to_owned()),
        ..Layout::default()
    };
    make(&path, &layout).expect("it is made");
    let raw = directory.path().join("raw");
    std::fs::write(&raw, vec![7; 1 << 20]).expect("written");
    qemu.succeed(&[
        "convert",
        "-n",
        "-f",
        "raw",
        "-O",
        "qcow2",
        text(&raw),
        text(&path),
    ]);
    qemu.succeed(&["compare", "-f", "raw", "-F", "qcow2", text(&raw), text(&path)]);
    qemu.succeed(&["check", "-f", "qcow2", text(&path)]);
    assert_eq!(
        std::fs::read(directory.path().join("data")).expect("read"),
        vec![7; 1 << 20]
    );
}
