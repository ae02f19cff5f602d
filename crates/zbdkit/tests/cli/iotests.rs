//! QEMU's zoned iotests, replayed: what its qemu-io prints at each step is what ours prints.
//!
//! The transcripts hold commands and answers; QEMU's scripts are not here.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::Stdio;

use crate::support::{Bench, Run};

const ZONED: &str = include_str!("iotests/zoned.transcript");
const ZONED_QCOW2: &str = include_str!("iotests/zoned-qcow2.transcript");
const PROMPT: &str = "qemu-io> ";

/// The options that QEMU's tests give to qemu-io before an image's own.
const HARNESS: [&str; 4] = ["--cache", "writeback", "--aio", "threads"];

/// One run of the program in a transcript.
#[derive(Default)]
struct Process {
    stdin: bool,
    /// Each command with the lines that answer it.
    steps: Vec<(String, String)>,
}

fn processes(transcript: &str) -> Vec<Process> {
    let mut processes: Vec<Process> = Vec::new();
    for line in transcript.lines() {
        match (line.strip_prefix("> "), processes.last_mut()) {
            (Some(command), Some(process)) => process.steps.push((command.to_owned(), String::new())),
            (None, _) if line.starts_with('[') => processes.push(Process {
                stdin: line == "[stdin]",
                ..Process::default()
            }),
            (None, Some(process)) if !line.is_empty() && !line.starts_with('#') => {
                let (_, answer) = process.steps.last_mut().expect("an answer follows a command");
                *answer += &format!("{line}\n");
            }
            _ => {}
        }
    }
    processes
}

fn run(bench: &Bench, image: &str, process: &Process) -> Run {
    let mut command = bench.command();
    command
        .arg("io")
        .args(HARNESS)
        .args(["--image-opts", "-n", image])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if !process.stdin {
        for (step, _) in &process.steps {
            command.args(["-c", step]);
        }
    }
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    if process.stdin {
        for (step, _) in &process.steps {
            writeln!(stdin, "{step}").unwrap();
        }
    }
    drop(stdin);
    child.wait_with_output().unwrap().into()
}

/// Runs each process of a transcript; it must print what stands there, nothing else, and succeed.
fn replay(bench: &Bench, image: &str, processes: &[Process]) {
    assert!(!processes.is_empty());
    for process in processes {
        let prompt = if process.stdin { PROMPT } else { "" };
        let answers = process
            .steps
            .iter()
            .map(|(_, answer)| format!("{prompt}{answer}"));
        let expected = answers.collect::<String>() + prompt;
        let commands: Vec<&str> = process
            .steps
            .iter()
            .map(|(command, _)| command.as_str())
            .collect();
        let run = run(bench, image, process);
        assert_eq!(run.out, expected, "{commands:?} on {image}: {}", run.err);
        assert_eq!((run.status, &*run.err), (Some(0), ""), "{commands:?} on {image}");
    }
}

const QCOW2: &str = "driver=qcow2,file.driver=file,file.filename=zbc.qcow2";
const RAW: &str = "driver=zoned,file.driver=file,file.filename=zbc.raw";

/// As the iotest makes it.
fn create_qcow2(bench: &Bench) {
    let options = "size=768M zone.size=64M zone.capacity=64M zone.conventional_zones=0 zone.max_open_zones=6 \
                   zone.max_active_zones=8 zone.mode=host-managed";
    let options = options.split(' ').flat_map(|option| ["-o", option]);
    let arguments = ["create", "-f", "qcow2", "zbc.qcow2"].into_iter().chain(options);
    let created = bench.run(&arguments.collect::<Vec<_>>()).ok();
    assert_eq!(
        created,
        "Formatting 'zbc.qcow2', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib \
         zone.mode=host-managed zone.size=67108864 zone.capacity=67108864 zone.conventional_zones=0 \
         zone.max_active_zones=8 zone.max_open_zones=6 size=805306368 lazy_refcounts=off refcount_bits=16\n"
    );
}

#[test]
fn each_step_of_zoned_qcow2_prints_what_qemu_io_prints() {
    let bench = Bench::new();
    create_qcow2(&bench);
    replay(&bench, QCOW2, &processes(ZONED_QCOW2));
}

#[test]
fn a_raw_image_with_a_zone_table_answers_zoned_qcow2_the_same() {
    let bench = Bench::new();
    let limits = ["--max-open", "6", "--max-active", "8"];
    let arguments = ["create", "zbc.raw", "--size", "768M", "--zone-size", "64M"];
    bench.run(&[&arguments[..], &limits].concat()).ok();
    replay(&bench, RAW, &processes(ZONED_QCOW2));
}

/// An image's open zones are closed when it is: on a device the kernel holds them open from one run to the next, here
/// one run does all steps.
#[test]
fn the_steps_of_zoned_print_the_same_on_images() {
    let steps = processes(ZONED).into_iter().flat_map(|process| process.steps);
    let together = [Process {
        stdin: false,
        steps: steps.collect(),
    }];
    for (name, image) in [("zbc.qcow2", QCOW2), ("zbc.raw", RAW)] {
        let bench = Bench::new();
        bench
            .run(&["create", name, "--size", "250G", "--zone-size", "256M"])
            .ok();
        replay(&bench, image, &together);
    }
}

fn image(bench: &Bench) -> File {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .open(bench.path("zbc.qcow2"))
        .unwrap()
}

fn number_at(file: &File, offset: u64, len: usize) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes[8 - len..], offset).unwrap();
    u64::from_be_bytes(bytes)
}

/// Where QEMU's write pointer table lies: 24 bytes into the zoned header extension, found as the iotest finds it.
fn table_of(file: &File) -> u64 {
    let mut extension = number_at(file, 100, 4);
    while number_at(file, extension, 4) != 0x007a_6264 {
        assert_ne!(number_at(file, extension, 4), 0, "no zoned header extension");
        extension += 8 + number_at(file, extension + 4, 4).next_multiple_of(8);
    }
    number_at(file, extension + 8 + 24, 8)
}

/// The words that the iotest corrupts, what it writes there, what belongs there, and QEMU's message.
const CORRUPTIONS: [(u64, u64, u64, &str); 3] = [
    (
        3,
        0,
        0xc00_0000,
        "Zone 3 has write pointer 0x0 outside its writable range 0xc000000..0x10000000",
    ),
    (
        1,
        0x400_0201,
        0x400_0000,
        "Zone 1 has write pointer 0x4000201 that is not sector aligned",
    ),
    (
        2,
        0x8000_0000_0800_0000,
        0x800_0000,
        "Zone 2 contradicts the header, which declares the first 0 zones conventional",
    ),
];

const FIRST_ZONE: &str = "start: 0x0, len 0x20000, cap 0x20000, wptr 0x0, zcond:1, [type: 2]\n";

/// Of an image that QEMU has written to: it clears the autoclear bit that vouches for our own copies of the table.
#[test]
fn a_corrupted_table_is_refused_in_qemus_words() {
    let bench = Bench::new();
    create_qcow2(&bench);
    let file = image(&bench);
    file.write_all_at(&[0; 8], 88).unwrap();
    let table = table_of(&file);
    let report = ["io", "-n", "--image-opts", QCOW2, "-c", "zrp 0 1"];
    for (zone, corrupt, right, message) in CORRUPTIONS {
        file.write_all_at(&corrupt.to_be_bytes(), table + 8 * zone)
            .unwrap();
        bench.run(&report).fails(1, message);
        file.write_all_at(&right.to_be_bytes(), table + 8 * zone).unwrap();
    }
    assert_eq!(bench.run(&report).ok(), FIRST_ZONE);
}

/// Of an image that only zbdkit has written: its own checksummed copies are the truth, which QEMU's table follows.
#[test]
fn a_corrupted_table_is_made_good_from_our_own() {
    let bench = Bench::new();
    create_qcow2(&bench);
    let file = image(&bench);
    let table = table_of(&file);
    for (zone, corrupt, right, _) in CORRUPTIONS {
        file.write_all_at(&corrupt.to_be_bytes(), table + 8 * zone)
            .unwrap();
        let report = ["io", "-n", "--image-opts", QCOW2, "-c", "zrp 0 1"];
        assert_eq!(bench.run(&report).ok(), FIRST_ZONE);
        assert_eq!(number_at(&file, table + 8 * zone, 8), right, "zone {zone}");
    }
}
