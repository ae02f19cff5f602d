//! qcow2 images without zones, on real files: what a user of the library sees.

mod support;

use std::fs;
use std::path::Path;

use support::{Rig, pattern};
use zbdkit_block::{CrossZone, Graph, OpenOptions};
use zbdkit_io::IoBuf;
use zbdkit_qcow2::Layout;

const MIB: u64 = 1 << 20;

fn layout(size: u64) -> Layout {
    Layout {
        size,
        ..Layout::default()
    }
}

fn overlay(size: u64, base: &str, format: Option<&str>) -> Layout {
    Layout {
        backing: Some((base.into(), format.map(str::to_owned))),
        ..layout(size)
    }
}

#[test]
fn a_path_with_the_magic_is_opened_as_qcow2_and_keeps_what_is_written() {
    let rig = Rig::new();
    rig.plain("disk.qcow2", &layout(64 * MIB));
    let device = rig.open("disk.qcow2");
    assert_eq!((device.driver(), device.limits().size), ("qcow2", 64 * MIB));
    assert!(device.limits().zoned.is_none() && device.qcow2().is_some());
    rig.write(&device, 4096, &pattern(1, 128 * 1024));
    rig.write(&device, 40 * MIB + 512, &pattern(2, 512));
    rig.close(device);
    let device = rig.open("disk.qcow2");
    assert_eq!(rig.read(&device, 4096, 128 * 1024), pattern(1, 128 * 1024));
    assert_eq!(rig.read(&device, 40 * MIB, 2048)[512..1024], pattern(2, 512));
    assert_eq!(rig.read(&device, 0, 4096), [0; 4096]);
    let extent = rig.block_on(device.map(0, 64 * MIB)).unwrap();
    assert!(extent.data && extent.offset.is_some(), "{extent:?}");
    assert_eq!(extent.filename.as_deref(), rig.path("disk.qcow2").to_str());
    rig.close(device);
}

#[test]
fn an_overlay_shows_what_it_does_not_hold_itself() {
    let rig = Rig::new();
    fs::write(rig.path("base.raw"), pattern(9, 3 * MIB as usize)).unwrap();
    rig.plain("middle.qcow2", &overlay(4 * MIB, "base.raw", Some("raw")));
    rig.plain("top.qcow2", &overlay(5 * MIB, "middle.qcow2", Some("qcow2")));
    let middle = rig.open("middle.qcow2");
    rig.write(&middle, MIB, &pattern(5, 4096));
    rig.close(middle);
    let top = rig.open("top.qcow2");
    rig.write(&top, 2 * MIB + 4096, &pattern(7, 4096));
    let mut expected = pattern(9, 3 * MIB as usize);
    expected.resize(5 * MIB as usize, 0);
    expected[MIB as usize..][..4096].copy_from_slice(&pattern(5, 4096));
    expected[2 * MIB as usize + 4096..][..4096].copy_from_slice(&pattern(7, 4096));
    assert_eq!(rig.read(&top, 0, 5 * MIB as usize), expected);
    let backing = top.backing().unwrap();
    assert_eq!(
        (backing.name.as_str(), backing.format.as_deref()),
        ("middle.qcow2", Some("qcow2"))
    );
    let at = |offset| rig.block_on(top.map(offset, 65536)).unwrap();
    assert_eq!((at(0).depth, at(0).present, at(0).data), (2, true, true));
    assert_eq!((at(MIB).depth, at(2 * MIB).depth), (1, 0));
    assert!(!at(4 * MIB).present && at(4 * MIB).zero);
    rig.close(top);
}

#[test]
fn backing_images_are_overridden_and_left_out_as_the_user_says() {
    let rig = Rig::new();
    fs::write(rig.path("base.raw"), pattern(9, MIB as usize)).unwrap();
    fs::write(rig.path("other.raw"), pattern(4, MIB as usize)).unwrap();
    rig.plain("top.qcow2", &overlay(MIB, "base.raw", Some("raw")));
    let top = rig.path("top.qcow2");
    let read = |graph: &str| {
        let graph = graph.replace("TOP", top.to_str().unwrap());
        let graph = graph.replace("OTHER", rig.path("other.raw").to_str().unwrap());
        let device = rig.open_graph(&graph).unwrap();
        let byte = rig.read(&device, 0, 512);
        rig.close(device);
        byte
    };
    assert_eq!(read("driver=qcow2,file.filename=TOP"), pattern(9, 512));
    for nothing in ["", "null", "none"] {
        assert_eq!(
            read(&format!("driver=qcow2,file.filename=TOP,backing={nothing}")),
            [0; 512]
        );
    }
    assert_eq!(
        read(r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"TOP"},"backing":null}"#),
        [0; 512]
    );
    assert_eq!(
        read("driver=qcow2,file.filename=TOP,backing.file.filename=OTHER"),
        pattern(4, 512)
    );
    assert_eq!(
        read("driver=qcow2,file.filename=TOP,backing.driver=raw,backing.file.filename=OTHER"),
        pattern(4, 512)
    );
    fs::remove_file(rig.path("base.raw")).unwrap();
    assert!(rig.try_open("top.qcow2", OpenOptions::default()).is_err());
    let device = rig
        .try_open(
            "top.qcow2",
            OpenOptions {
                no_backing: true,
                ..OpenOptions::default()
            },
        )
        .unwrap();
    assert_eq!(rig.read(&device, 0, 512), [0; 512]);
    assert_eq!(device.backing().unwrap().name, "base.raw");
    assert!(device.backing().unwrap().node.is_none());
}

#[test]
fn a_backing_image_of_unstated_format_is_refused_with_the_fix() {
    let rig = Rig::new();
    fs::write(rig.path("base.raw"), [0; 65536]).unwrap();
    rig.plain("top.qcow2", &overlay(MIB, "base.raw", None));
    let error = rig.open_error("top.qcow2");
    assert!(error.contains("zbdkit rebase -u -b base.raw -F raw"), "{error}");
}

#[test]
fn names_that_are_no_plain_paths_are_not_opened() {
    let rig = Rig::new();
    for name in [
        "json:{\"driver\":\"file\",\"filename\":\"/etc/hostname\"}",
        "nbd://localhost/x",
        "file:base",
    ] {
        rig.plain("top.qcow2", &overlay(MIB, name, Some("raw")));
        let error = rig.open_error("top.qcow2");
        assert!(error.contains("only files are opened"), "{error}");
        fs::remove_file(rig.path("top.qcow2")).unwrap();
    }
    rig.plain("top.qcow2", &overlay(MIB, "/dev/zero", Some("raw")));
    let error = rig.open_error("top.qcow2");
    assert!(
        error.contains("neither a regular file nor a block device"),
        "{error}"
    );
}

#[test]
fn a_chain_that_comes_back_to_itself_is_refused_at_once() {
    let rig = Rig::new();
    rig.plain("self.qcow2", &overlay(MIB, "self.qcow2", Some("qcow2")));
    assert!(rig.open_error("self.qcow2").contains("own backing"));
    rig.plain("a.qcow2", &overlay(MIB, "b.qcow2", Some("qcow2")));
    rig.plain("b.qcow2", &overlay(MIB, "c.qcow2", Some("qcow2")));
    fs::hard_link(rig.path("a.qcow2"), rig.path("c.qcow2")).unwrap();
    assert!(rig.open_error("a.qcow2").contains("own backing"));
}

#[test]
fn a_long_chain_is_read_and_one_that_is_longer_than_any_is_refused() {
    let rig = Rig::new();
    fs::write(rig.path("0"), pattern(3, 65536)).unwrap();
    for n in 1..=201 {
        let format = if n == 1 { "raw" } else { "qcow2" };
        rig.plain(
            &n.to_string(),
            &overlay(65536, &(n - 1).to_string(), Some(format)),
        );
    }
    let device = rig.open("199");
    assert_eq!(rig.read(&device, 0, 65536), pattern(3, 65536));
    rig.close(device);
    let device = rig.open("200");
    assert_eq!(rig.read(&device, 0, 512), pattern(3, 512));
    rig.close(device);
    let error = rig.open_error("201");
    assert!(error.contains("more than 200 images"), "{error}");
}

#[test]
fn a_raw_image_that_has_lost_its_zone_table_is_not_taken_for_qcow2() {
    let rig = Rig::new();
    rig.zoned_raw("disk.raw", 8 * MIB, MIB);
    rig.plain("evil.qcow2", &overlay(8 * MIB, "/etc/hostname", Some("raw")));
    // A guest writes what it likes.
    let evil = fs::read(rig.path("evil.qcow2")).unwrap();
    let device = rig.open("disk.raw");
    rig.write(&device, 0, &evil[..65536]);
    rig.close(device);
    let device = rig.open("disk.raw");
    assert_eq!(device.driver(), "zoned");
    rig.close(device);
    fs::remove_file(rig.path("disk.raw.zones")).unwrap();
    let error = rig.open_error("disk.raw");
    assert!(
        error.contains("zone table") && error.contains("missing"),
        "{error}"
    );
}

#[test]
fn an_external_data_file_is_found_beside_the_image() {
    let rig = Rig::new();
    let with_data = Layout {
        data_file: Some("data.raw".into()),
        data_file_raw: true,
        ..layout(4 * MIB)
    };
    rig.plain("disk.qcow2", &with_data);
    let device = rig.open("disk.qcow2");
    rig.write(&device, MIB, &pattern(6, 8192));
    let extent = rig.block_on(device.map(MIB, 4096)).unwrap();
    assert_eq!(extent.filename.as_deref(), rig.path("data.raw").to_str());
    rig.close(device);
    assert_eq!(
        fs::read(rig.path("data.raw")).unwrap()[MIB as usize..][..8192],
        pattern(6, 8192)
    );
    fs::rename(rig.path("data.raw"), rig.path("moved.raw")).unwrap();
    assert!(rig.open_error("disk.qcow2").contains("data.raw"));
    let graph = format!(
        "driver=qcow2,file.filename={},data-file.filename={}",
        rig.path("disk.qcow2").display(),
        rig.path("moved.raw").display()
    );
    let device = rig.open_graph(&graph).unwrap();
    assert_eq!(rig.read(&device, MIB, 8192), pattern(6, 8192));
    rig.close(device);
}

#[test]
fn options_that_are_not_known_are_named_with_those_that_are() {
    let rig = Rig::new();
    rig.plain("disk.qcow2", &layout(MIB));
    let path = rig.path("disk.qcow2");
    let error = |options: &str| {
        let graph = format!("driver=qcow2,file.filename={}{options}", path.display());
        rig.open_graph(&graph).err().expect("refused").to_string()
    };
    let unknown = error(",l2-cache-sise=1M");
    assert!(
        unknown.contains("\"l2-cache-size\"") && unknown.contains("its options are"),
        "{unknown}"
    );
    assert!(error(",file.driver=memory").contains("driver=file"));
    assert!(error(",data-file.filename=x").contains("keeps its data itself"));
}

#[test]
fn an_image_that_somebody_writes_is_locked_and_its_backing_images_are_shared() {
    let rig = Rig::new();
    fs::write(rig.path("base.raw"), [1; 65536]).unwrap();
    rig.plain("one.qcow2", &overlay(65536, "base.raw", Some("raw")));
    rig.plain("two.qcow2", &overlay(65536, "base.raw", Some("raw")));
    let one = rig.open("one.qcow2");
    let two = rig.open("two.qcow2");
    assert!(rig.open_error("one.qcow2").contains("lock"));
    let base = format!("driver=raw,file.filename={}", rig.path("base.raw").display());
    assert!(
        rig.open_graph(&base)
            .err()
            .expect("locked")
            .to_string()
            .contains("lock")
    );
    let shared = OpenOptions {
        read_only: true,
        force_share: true,
        ..OpenOptions::default()
    };
    rig.close(rig.try_open("one.qcow2", shared).unwrap());
    rig.close(one);
    rig.close(two);
}

#[test]
fn a_format_that_is_stated_is_not_looked_for() {
    let rig = Rig::new();
    rig.plain("disk", &layout(MIB));
    let raw = OpenOptions {
        format: Some(zbdkit_block::ImageFormat::Raw),
        read_only: true,
        ..OpenOptions::default()
    };
    let device = rig.try_open("disk", raw).unwrap();
    assert_eq!(device.driver(), "raw");
    assert_eq!(&rig.read(&device, 0, 512)[..3], b"QFI");
    fs::write(rig.path("other"), [0; 65536]).unwrap();
    let qcow2 = OpenOptions {
        format: Some(zbdkit_block::ImageFormat::Qcow2),
        ..OpenOptions::default()
    };
    assert!(rig.try_open("other", qcow2).is_err());
}

#[test]
fn a_qcow2_node_can_stand_below_raw_but_not_below_zoned() {
    let rig = Rig::new();
    rig.plain("disk.qcow2", &layout(MIB));
    let file = format!(
        "file.driver=qcow2,file.file.filename={}",
        rig.path("disk.qcow2").display()
    );
    let device = rig.open_graph(&format!("driver=raw,offset=64k,{file}")).unwrap();
    rig.write(&device, 0, &pattern(1, 512));
    rig.close(device);
    let device = rig.open("disk.qcow2");
    assert_eq!(rig.read(&device, 65536, 512), pattern(1, 512));
    rig.close(device);
    let error = rig.open_graph(&format!("driver=zoned,{file}")).err().unwrap();
    assert!(error.to_string().contains("driver=qcow2"), "{error}");
}

#[test]
fn direct_io_goes_through_formats_whose_clusters_it_can_write() {
    let rig = Rig::on_disk();
    rig.plain(
        "disk.qcow2",
        &Layout {
            cluster_size: 65536,
            ..layout(4 * MIB)
        },
    );
    let direct = OpenOptions {
        direct: true,
        ..OpenOptions::default()
    };
    let device = rig.try_open("disk.qcow2", direct).unwrap();
    let block = u64::from(device.limits().block_size);
    rig.write(&device, block, &pattern(8, 3 * block as usize));
    let buf = IoBuf::alloc(4 * block as usize);
    rig.block_on(device.read(&device.lane(1), buf.clone(), 0, CrossZone::Allow))
        .unwrap();
    assert_eq!(buf.to_vec()[block as usize..], pattern(8, 3 * block as usize));
    rig.close(device);
    rig.close(rig.open("disk.qcow2"));
}

#[test]
fn filenames_are_found_at_the_bottom_of_a_graph() {
    let graph = Graph::parse("driver=qcow2,file.filename=a.qcow2").unwrap();
    assert_eq!(graph.filename().as_deref(), Some(Path::new("a.qcow2")));
}
