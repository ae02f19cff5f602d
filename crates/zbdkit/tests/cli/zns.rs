//! Random write areas, descriptor extensions and attributes, which only NVMe's Zoned Namespaces have.

use crate::support::Bench;

#[test]
fn a_disk_without_areas_and_extensions_says_so() {
    let bench = Bench::with_demo();
    for (command, what) in [
        ("zo -r 0 64M", "zone open"),
        ("zcm 64k", "zone commit"),
        ("zse 0", "zone set extension"),
        ("zge 0", "zone get extension"),
    ] {
        let run = bench.io(&[command]);
        assert_eq!(run.status, Some(1), "{command}: {run:?}");
        assert_eq!(
            run.out,
            format!("{what} failed: Operation not supported\n"),
            "{run:?}"
        );
    }
    bench.io(&["zo 0 64M", "zc 0 64M"]).ok();
}

#[test]
fn commands_of_areas_and_extensions_are_called_rightly_and_explained() {
    let bench = Bench::with_demo();
    for (command, said) in [
        ("zo -r 0", "bad argument count 1 to zo, expected 2 arguments\n"),
        ("zcm", "bad argument count 0 to zcm, expected 1 arguments\n"),
        ("zcm 0 1", "bad argument count 2 to zcm, expected 1 arguments\n"),
        (
            "zge",
            "bad argument count 0 to zge, expected at least 1 arguments\n",
        ),
    ] {
        let run = bench.io(&[command]);
        assert_eq!((run.status, &*run.err), (Some(1), said), "{command}");
    }
    let usage =
        "zone_set_ext [-f file | -P pattern] start -- attach a descriptor extension to an empty zone\n";
    assert_eq!(bench.io(&["zse 0 1"]).out, usage);
    assert_eq!(bench.io(&["zse -P 300 0"]).status, Some(1));
    assert_eq!(
        bench.io(&["zse -P 1 -f x 0"]).out,
        "Only one of -f and -P can be specified at the same time\n"
    );
    let absent = bench.io(&["zse -f absent 0"]);
    assert!(absent.out.starts_with("absent: "), "{absent:?}");
    for (command, example) in [
        ("zo", "Example: 'zo -r 64M 64M'"),
        ("zcm", "Example: 'zcm 0x4010000'"),
        ("zse", "Example: 'zse -P 0x5a 64M'"),
        ("zge", "Example: 'zge 64M'"),
    ] {
        let help = bench.io(&[&format!("help {command}")]).ok();
        assert!(help.contains(example), "{help}");
    }
}
