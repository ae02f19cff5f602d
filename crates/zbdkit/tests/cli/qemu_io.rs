//! Side by side with QEMU's own qemu-io on a plain raw file.

use std::process::Command;

use crate::support::{Bench, Run};

/// What a run prints, without the figures of a clock and without the reasons that only we tell.
fn normalized(run: Run) -> (Option<i32>, Vec<String>, Vec<String>) {
    let untimed = |line: &str| match line.split_once(" ops; ") {
        Some((what, figures)) => {
            // Shape only: `00.00 sec (1.374 MiB/sec and 351.7312 ops/sec)`.
            let words: Vec<&str> = figures.split(' ').collect();
            let shape = words.len() == 7 && words[1] == "sec" && words[4] == "and" && words[6] == "ops/sec)";
            format!("{what} ops; {}", if shape { "TIME" } else { figures })
        }
        None => line.to_owned(),
    };
    let out = run.out.lines().map(untimed).collect();
    let err = run
        .err
        .lines()
        .filter(|line| !line.starts_with("zbdkit: "))
        .map(str::to_owned)
        .collect();
    (run.status, out, err)
}

#[test]
fn every_command_prints_what_qemu_io_prints() {
    if Command::new("qemu-io").arg("--version").output().is_err() {
        eprintln!("SKIPPED: there is no qemu-io to compare with");
        return;
    }
    let bench = Bench::new();
    for commands in [
        &[
            "write -P 0xab 0 4k",
            "read -P 0xab 0 4k",
            "read -P 1 0 4k",
            "read -P 0xab 0 8k",
        ][..],
        &[
            "write 0 64k",
            "read -v 512 40",
            "read -q 0 4k",
            "write -q 0 4k",
            "write 10 20",
            "read -v 0 48",
        ],
        &[
            "write -z 8k 1536",
            "write -z -u 0 8k",
            "write -f 0 4k",
            "read -P 0 0 1M",
        ],
        &[
            "writev 0 4k 8k",
            "readv 0 4k 8k",
            "readv -v -P 3 0 16 16",
            "discard 0 64k",
            "flush",
            "length",
        ],
        &[
            "read -s 2 -l 4 -P 0 0 4k",
            "read -P 0 -s 9k 0 4k",
            "write -P 300 0 4k",
            "write -P foo 0 4k",
        ],
        &[
            "write 64M 4k",
            "read 64M 4k",
            "write 0 foo",
            "write 0 99999999999999999999",
            "write 0 16E",
        ],
        &[
            "write",
            "write 0",
            "read 0",
            "zrp 0",
            "zo 0",
            "zrs 0 1 2",
            "bogus",
            "length 3",
            "flush 1",
        ],
        &[
            "write -x 0 4k",
            "write 0 -1",
            "read -P",
            "write 0 4k 4k",
            "zrp foo 1",
            "zrp 0 5000000000",
            "zrp -1 1",
        ],
        &[
            "zrp 0 1",
            "zo 0 64M",
            "zc 0 64M",
            "zf 0 64M",
            "zrs 0 64M",
            "zap -p 0 4k",
            "zone_report 0 1",
        ],
        &[
            "write -z -P 1 0 4k",
            "write -u 0 4k",
            "write -n 0 4k",
            "write 0 3G",
            "read 0 3G",
        ],
        &[
            "write 0 0",
            "read 0 0",
            "  write   0   4k  ",
            "",
            "sleep 1",
            "aio_flush",
        ],
        &[
            "aio_write -P 1 0 4k",
            "aio_flush",
            "aio_read -P 1 0 4k",
            "aio_flush",
            "aio_read -P 2 0 4k",
            "aio_flush",
        ],
        &["quit", "bogus"],
        &["help bogus", "write -P 0x10 1M 1.5k", "read -P 020 1M 1536"],
    ] {
        let run = |mut command: Command, image: &str, from_stdin: bool| {
            let file = std::fs::File::create(bench.path(image)).unwrap();
            file.set_len(64 << 20).unwrap();
            command.args(["--cache", "writeback", "--aio", "threads", "-f", "raw"]);
            command.arg(bench.path(image));
            if from_stdin {
                std::fs::write(bench.path("commands"), commands.join("\n") + "\n").unwrap();
                command.stdin(std::fs::File::open(bench.path("commands")).unwrap());
            } else {
                commands.iter().for_each(|text| {
                    command.args(["-c", text]);
                });
            }
            normalized(command.output().unwrap().into())
        };
        for from_stdin in [false, true] {
            let mut ours = bench.command();
            ours.arg("io");
            let theirs = run(Command::new("qemu-io"), "theirs", from_stdin);
            let ours = run(ours, "ours", from_stdin);
            // A read that finds another pattern is a failure for us also when it was asynchronous.
            let asynchronous = commands.iter().any(|command| command.starts_with("aio_read"));
            assert_eq!((&ours.1, &ours.2), (&theirs.1, &theirs.2), "{commands:?}");
            assert!(
                ours.0 == theirs.0 || asynchronous,
                "{commands:?}: {:?}, {:?}",
                ours.0,
                theirs.0
            );
            assert_eq!(
                std::fs::read(bench.path("ours")).unwrap(),
                std::fs::read(bench.path("theirs")).unwrap(),
                "{commands:?} wrote something else"
            );
        }
    }
}
