//! A disk that is full in mid-write: that write fails, the image goes on.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::support::Bench;

#[test]
fn a_write_beyond_the_file_size_limit_fails_alone() {
    let bench = Bench::with_demo();
    // 2048 blocks of 512 bytes: the first MiB of the data file can be written.
    let script = "trap '' XFSZ; ulimit -f 2048; exec \"$0\" \"$@\"";
    let mut command = Command::new("sh");
    command
        .args(["-c", script, env!("CARGO_BIN_EXE_zbdkit"), "io", "disk.raw"])
        .args([
            "-c",
            "write -q 0 64k",
            "-c",
            "write 64M 4k",
            "-c",
            "zrp 64M 1",
            "-c",
            "write -q 64k 4k",
            "-c",
            "flush",
        ])
        .current_dir(bench.directory())
        .stdin(Stdio::null());
    let run: crate::support::Run = command.output().unwrap().into();
    assert_eq!(
        run.out,
        "write failed: File too large\nstart: 0x20000, len 0x20000, cap 0x20000, wptr 0x20000, zcond:1, [type: 2]\n",
        "{run:?}"
    );
    assert_eq!(run.status, Some(1));
    let info = bench.run(&["info", "disk.raw"]).ok();
    assert!(
        info.contains("11 empty, 1 closed") && info.contains("closed cleanly"),
        "{info}"
    );
    bench.io(&["read -q -P 0xcd 0 68k", "write -q 64M 4k"]).ok();
}

/// A small tmpfs, where we may mount one.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf) -> Option<SmallDisk> {
        std::fs::create_dir(&at).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(&at);
        let mounted = mount.stderr(Stdio::null()).status();
        mounted
            .is_ok_and(|status| status.success())
            .then_some(SmallDisk(at))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_fails_the_write_and_the_image_works_on_when_there_is_room() {
    let bench = Bench::new();
    let Some(disk) = SmallDisk::mount(bench.path("small")) else {
        eprintln!("SKIPPED: no tmpfs can be mounted here (the test of the file size limit ran)");
        return;
    };
    let image = disk.0.join("disk.raw");
    let image = image.to_str().unwrap();
    bench
        .run(&["create", "-q", image, "--size", "64M", "--zone-size", "16M"])
        .ok();
    std::fs::write(disk.0.join("filler"), vec![1; 512 << 10]).unwrap();
    let mut user = bench.interactive(image);
    assert!(user.command("write -P 1 0 128k").starts_with("wrote"));
    assert_eq!(
        user.command("write -P 2 128k 640k"),
        "write failed: No space left on device\n"
    );
    assert_eq!(
        user.command("zrp 0 1"),
        "start: 0x0, len 0x8000, cap 0x8000, wptr 0x100, zcond:2, [type: 2]\n"
    );
    std::fs::remove_file(disk.0.join("filler")).unwrap();
    assert!(user.command("write -P 3 128k 256k").starts_with("wrote"));
    assert_eq!(user.command("read -q -P 1 0 128k"), "");
    assert_eq!(user.command("read -q -P 3 128k 256k"), "");
    assert_eq!(user.finish(), Some(1));
    assert!(bench.run(&["info", image]).ok().contains("closed cleanly"));
}

#[test]
fn a_full_disk_fails_the_first_mark_alone_and_no_later_one() {
    let bench = Bench::new();
    let Some(disk) = SmallDisk::mount(bench.path("small")) else {
        eprintln!("SKIPPED: no tmpfs can be mounted here");
        return;
    };
    let filler = disk.0.join("filler");
    let fill = || {
        let full = std::fs::write(&filler, vec![1; 2 << 20]).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    };
    for name in ["disk.raw", "disk.qcow2"] {
        let image = disk.0.join(name);
        let image = image.to_str().unwrap();
        bench
            .run(&[
                "create",
                "-q",
                image,
                "--size",
                "64M",
                "--zone-size",
                "16M",
                "--conventional",
                "1",
                "--block-size",
                "512",
            ])
            .ok();
        let mut user = bench.interactive(image);
        // Twice, for both copies of the zones' records: then nothing but the list needs space.
        for _ in 0..2 {
            assert!(user.command("write -P 1 0 320k").starts_with("wrote"));
            assert_eq!(user.command("flush"), "");
        }
        fill();
        assert_eq!(
            user.command("write_uncor 0 512"),
            "write uncorrectable failed: No space left on device\n"
        );
        assert_eq!(user.command("flush"), "", "{name}");
        std::fs::remove_file(&filler).unwrap();
        assert_eq!(user.command("write_uncor 0 512"), "");
        // The other copy was never written, and both become longer.
        fill();
        for at in 1..300 {
            assert_eq!(user.command(&format!("write_uncor {at}k 512")), "", "{at}k");
        }
        assert_eq!(user.command("flush"), "", "{name}");
        std::fs::remove_file(&filler).unwrap();
        assert_eq!(user.finish(), Some(1));
        assert!(bench.run(&["info", image]).ok().contains("closed cleanly"));
        bench.run(&["check", image]).ok();
        std::fs::remove_file(image).unwrap();
    }
}
