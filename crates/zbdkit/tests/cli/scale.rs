//! A million zones. Not run by default, for its figures: `cargo test --release -p zbdkit -- --ignored --nocapture`.

use std::time::Instant;

use crate::support::Bench;

#[test]
#[ignore = "measures; wants a release build and a file system that takes a 256 TiB file, as tmpfs"]
fn a_million_zones_open_fast_and_are_reported() {
    let bench = Bench::new();
    // tmpfs takes any size, ext4 ends at 16 TiB.
    let place = tempfile::tempdir_in("/dev/shm").unwrap();
    let image = place.path().join("disk.raw");
    let image = image.to_str().unwrap();
    bench
        .run(&["create", "-q", image, "--size", "256T", "--zone-size", "256M"])
        .ok();

    let timed = |args: &[&str]| {
        let started = Instant::now();
        let out = bench.run(args).ok();
        eprintln!("{args:?}: {:?}", started.elapsed());
        out
    };
    assert!(timed(&["info", image]).contains("zones: 1048576 of 256 MiB"));
    assert_eq!(timed(&["report", image]).lines().count(), 1 << 20);
    assert_eq!(
        timed(&["report", image, "-o", "255T", "-c", "1"]).lines().count(),
        1
    );

    let started = Instant::now();
    let mut user = bench.interactive(image);
    eprintln!("open for writing until the first prompt: {:?}", started.elapsed());
    assert!(user.command("write 128T 4k").starts_with("wrote"));
    let status = std::fs::read_to_string(format!("/proc/{}/status", user.child.id())).unwrap();
    for line in status
        .lines()
        .filter(|line| line.starts_with("VmHWM") || line.starts_with("VmRSS") || line.starts_with("RssAnon"))
    {
        eprintln!("{line}");
    }
    assert_eq!(user.finish(), Some(0));
}
