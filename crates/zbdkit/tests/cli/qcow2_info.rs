//! `info` of qcow2 images, beside qemu-img's.

use std::os::unix::fs::FileExt;

use serde_json::Value;

use crate::qemu_img::qemu_img;
use crate::support::Bench;

/// Images of all kinds, made by qemu-img; `None` where there is none.
fn gallery(bench: &Bench) -> Option<Vec<&'static str>> {
    let make = |args: &[&str]| {
        qemu_img(bench, &[&["create", "-q", "-f", "qcow2"], args].concat()).map(|run| run.ok())
    };
    make(&["base.qcow2", "64M"])?;
    make(&["-o", "compat=0.10,cluster_size=4k", "old.qcow2", "1M"])?;
    make(&["-b", "base.qcow2", "-F", "qcow2", "overlay.qcow2"])?;
    make(&["-u", "-b", "not/there", "-F", "raw", "orphan.qcow2", "8M"])?;
    make(&["-o", "data_file=data.raw,data_file_raw=on", "outside.qcow2", "8M"])?;
    let options = "extended_l2=on,cluster_size=128k,compression_type=zstd,lazy_refcounts=on,refcount_bits=1";
    make(&["-o", options, "-o", "preallocation=metadata", "all.qcow2", "10M"])?;
    make(&["kept.qcow2", "64M"])?;
    for name in ["first", "a name that is too long for the column of names"] {
        qemu_img(bench, &["snapshot", "-c", name, "kept.qcow2"])?.ok();
    }
    std::fs::create_dir(bench.path("sub")).unwrap();
    make(&["sub/base.qcow2", "8M"])?;
    make(&["-b", "base.qcow2", "-F", "qcow2", "sub/overlay.qcow2"])?;
    make(&["dirty.qcow2", "8M"])?;
    // The incompatible features' last byte: dirty and corrupt.
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(bench.path("dirty.qcow2"))
        .unwrap();
    file.write_all_at(&[3], 79).unwrap();
    std::fs::write(bench.path("flat.raw"), vec![0; 1 << 20]).unwrap();
    make(&["-b", "flat.raw", "-F", "raw", "onflat.qcow2"])?;
    Some(vec![
        "base.qcow2",
        "old.qcow2",
        "overlay.qcow2",
        "orphan.qcow2",
        "outside.qcow2",
        "all.qcow2",
        "kept.qcow2",
        "sub/overlay.qcow2",
        "dirty.qcow2",
        "onflat.qcow2",
    ])
}

#[test]
fn info_of_an_image_without_zones_is_qemu_imgs_to_the_letter() {
    let bench = Bench::new();
    let Some(images) = gallery(&bench) else { return };
    for image in images {
        let theirs = qemu_img(&bench, &["info", image]).unwrap().ok();
        assert_eq!(bench.run(&["info", image]).ok(), theirs, "{image}");
        let parsed = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        let theirs = qemu_img(&bench, &["info", "--output=json", image]).unwrap().ok();
        let ours = bench.run(&["info", "--output=json", image]).ok();
        assert_eq!(parsed(&ours), parsed(&theirs), "{image}");
        assert_eq!(bench.run(&["info", "--json", image]).ok(), ours);
    }
}

#[test]
fn chains_are_followed_as_qemu_img_follows_them() {
    let bench = Bench::new();
    let Some(_) = gallery(&bench) else { return };
    for image in ["overlay.qcow2", "sub/overlay.qcow2", "onflat.qcow2", "base.qcow2"] {
        let chain = ["info", "--backing-chain", image];
        let theirs = qemu_img(&bench, &chain).unwrap().ok();
        assert_eq!(bench.run(&chain).ok(), theirs, "{image}");
        let chain = ["info", "--backing-chain", "--output=json", image];
        let theirs: Value = serde_json::from_str(&qemu_img(&bench, &chain).unwrap().ok()).unwrap();
        assert_eq!(bench.json(&chain), theirs, "{image}");
    }
    bench
        .run(&["info", "--backing-chain", "orphan.qcow2"])
        .fails(1, "not/there: cannot be opened: No such file or directory");
    for (image, below) in [("1.qcow2", "2.qcow2"), ("2.qcow2", "1.qcow2")] {
        let make = [
            "create", "-q", "-f", "qcow2", "-u", "-b", below, "-F", "qcow2", image, "1M",
        ];
        qemu_img(&bench, &make).unwrap().ok();
    }
    bench
        .run(&["info", "--backing-chain", "1.qcow2"])
        .fails(1, "backing image \"1.qcow2\" creates an infinite loop");
    qemu_img(
        &bench,
        &["rebase", "-u", "-b", "nbd://host/x", "-F", "raw", "1.qcow2"],
    )
    .unwrap()
    .ok();
    bench
        .run(&["info", "--backing-chain", "1.qcow2"])
        .fails(1, "backing image \"nbd://host/x\" is not a file");
}

#[test]
fn what_is_no_image_says_so() {
    let bench = Bench::new();
    std::fs::write(bench.path("short.qcow2"), b"QFI\xfb\0\0\0\x03").unwrap();
    bench
        .run(&["info", "-f", "qcow2", "short.qcow2"])
        .fails(1, "short.qcow2: ");
    std::fs::write(bench.path("text"), vec![b'x'; 4096]).unwrap();
    bench.run(&["info", "-f", "qcow2", "text"]).fails(1, "text: ");
    bench
        .run(&["info", "nothing.qcow2"])
        .fails(1, "nothing.qcow2: cannot be opened: No such file");
}
