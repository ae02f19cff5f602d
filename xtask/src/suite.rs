//! `cargo xtask suite`: other people's test suites, on our drive and on the kernel's null_blk.
//!
//! Nothing of theirs is kept in the repository: the scripts come out of the source packages of the
//! very tools that the guest has, or from a directory that the user names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use crate::demo::{log_of, socket_directory};
use crate::drive::{Device, Geometry, Zbdkit, remove_image};
use crate::guest::{End, Guest};
use crate::proc;
use crate::rig::Rig;
use crate::ui::{heading, say};

/// What both suites need to run nearly all of their tests: 256 sequential zones of 4 MiB and some
/// conventional ones, 4 KiB blocks, limits of 16.
const GEOMETRY: Geometry = Geometry {
    size: 1088,
    zone_size: 4,
    conventional: 16,
    max_open: 16,
    max_active: 16,
    block_size: 4096,
};

/// The same without what ZNS does not have.
const WITHOUT_CONVENTIONAL: Geometry = Geometry {
    size: 1024,
    conventional: 0,
    ..GEOMETRY
};

/// A whole suite takes at most this long.
const LIMIT: Duration = Duration::from_secs(3600);
/// Copying and compiling the suites' files.
const LOCAL_LIMIT: Duration = Duration::from_secs(120);

/// What the user asks for.
#[derive(Debug, Args)]
pub struct Suite {
    /// Which suite
    #[arg(value_enum)]
    suite: Which,
    /// Runs on this device only, instead of comparing zbdkit with null_blk
    #[arg(long, value_enum)]
    device: Option<Device>,
    /// What the guest sees zbdkit's drive by
    #[arg(long, value_enum, default_value = "vhost-user-blk")]
    door: Door,
    /// Shows the suite's output as it comes
    #[arg(long, short)]
    verbose: bool,
    /// Runs only these tests (numbers as the suite writes them)
    tests: Vec<String>,
}

/// The suites.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Which {
    /// fio's own tests of zoned devices: t/zbd/test-zbd-support
    FioZbd,
    /// The tests of zonefs-tools: tests/zonefs-tests.sh
    Zonefs,
}

/// The doors to guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Door {
    /// A virtio block device
    VhostUserBlk,
    /// A namespace of an NVMe controller, which has no conventional zones; neither has null_blk then
    Nvme,
}

impl Door {
    fn geometry(self) -> Geometry {
        match self {
            Door::VhostUserBlk => GEOMETRY,
            Door::Nvme => WITHOUT_CONVENTIONAL,
        }
    }
}

/// What a suite says about one of its tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It passed.
    Pass,
    /// It failed.
    Fail,
    /// It did not apply.
    Skip,
    /// It was begun and did not end.
    Lost,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Fail => "FAIL",
            Verdict::Skip => "skip",
            Verdict::Lost => "LOST",
        }
    }
}

/// The verdicts of one run, by test.
pub type Verdicts = BTreeMap<String, Verdict>;

impl Which {
    fn name(self) -> &'static str {
        match self {
            Which::FioZbd => "fio-zbd",
            Which::Zonefs => "zonefs",
        }
    }

    fn package(self) -> &'static str {
        match self {
            Which::FioZbd => "fio",
            Which::Zonefs => "zonefs-tools",
        }
    }

    /// The variable that names a directory with the suite's sources.
    fn variable(self) -> &'static str {
        match self {
            Which::FioZbd => "ZBDKIT_FIO_SOURCE",
            Which::Zonefs => "ZBDKIT_ZONEFS_TOOLS_SOURCE",
        }
    }

    /// The part of the sources that the guest needs.
    fn part(self) -> &'static str {
        match self {
            Which::FioZbd => "t/zbd",
            Which::Zonefs => "tests",
        }
    }

    fn script(self, tests: &[String]) -> String {
        let tests: String = tests.iter().map(|test| format!(" -t {test}")).collect();
        match self {
            // The script calls the fio of the source tree that it stands in.
            Which::FioZbd => format!(
                "mkdir -p /tmp/fio/t && cp -a /share/suite /tmp/fio/t/zbd && ln -s /usr/bin/fio /tmp/fio/fio\n\
                 cd /tmp/fio/t/zbd || fail 'no suite'\n\
                 ./test-zbd-support -r -w{tests} \"$DEV\"\nstatus=$?\n\
                 mkdir -p /share/logs && cp test-zbd-support.log* /share/logs/\nexit $status\n"
            ),
            Which::Zonefs => {
                // The tests from 0600 on make their own null_blk and say nothing about the drive.
                let tests = if tests.is_empty() { " -t 0001-0519" } else { &tests };
                format!(
                    "cp -a /share/suite /tmp/suite && cd /tmp/suite || fail 'no suite'\n\
                     printf '#!/bin/sh\\nexec \"$@\"\\n' >/usr/bin/sudo && chmod +x /usr/bin/sudo\n\
                     ./zonefs-tests.sh -g /tmp/logs{tests} \"$DEV\"\nstatus=$?\n\
                     mkdir -p /share/logs && cp /tmp/logs/* /share/logs/\nexit $status\n"
                )
            }
        }
    }

    fn parse(self, output: &str) -> Verdicts {
        match self {
            Which::FioZbd => parse(output, "Running test "),
            Which::Zonefs => parse(output, "Test "),
        }
    }
}

impl Suite {
    /// Runs the suite and compares.
    pub fn run(self) -> Result<()> {
        let devices = self
            .device
            .map_or(vec![Device::NullBlk, Device::Zbdkit], |device| vec![device]);
        let zbdkit = if devices.contains(&Device::Zbdkit) {
            Some(Zbdkit::build()?)
        } else {
            None
        };
        let rig = Rig::prepare()?;
        let files = self.files(&rig)?;
        let mut runs = Vec::new();
        for device in devices {
            heading(&format!("{} on {}", self.suite.name(), device.name()));
            let verdicts = self.run_on(&rig, &files, device, zbdkit.as_ref())?;
            say(&summary(device.name(), &verdicts));
            runs.push((device, verdicts));
        }
        heading("Test by test");
        say(&table(&runs));
        for (device, verdicts) in &runs {
            say(&summary(device.name(), verdicts));
        }
        judge(&runs)
    }

    /// The directory with the suite's scripts, with its helper programs compiled.
    fn files(&self, rig: &Rig) -> Result<PathBuf> {
        let source = match std::env::var_os(self.suite.variable()) {
            Some(directory) => PathBuf::from(directory),
            None => rig.source(self.suite.package()).with_context(|| {
                format!(
                    "the mirror does not give the source of {}; get its source tree yourself (its upstream repository, \
                     in the version of the guest's package) and name the directory in {}",
                    self.suite.package(),
                    self.suite.variable()
                )
            })?,
        };
        let part = source.join(self.suite.part());
        ensure!(part.is_dir(), "{} has no {}", source.display(), self.suite.part());
        let into = rig.directory.join(format!("suite-{}", self.suite.name()));
        if into.exists() {
            std::fs::remove_dir_all(&into)?;
        }
        copy(&part, &into)?;
        if self.suite == Which::Zonefs {
            for tool in ["zio", "zopen"] {
                compile(&into.join("tools"), tool)?;
            }
        }
        Ok(into)
    }

    fn run_on(&self, rig: &Rig, files: &Path, device: Device, zbdkit: Option<&Zbdkit>) -> Result<Verdicts> {
        let name = format!("suite-{}-{}", self.suite.name(), device.name());
        let mut guest = Guest::new(rig, &name, &self.suite.script(&self.tests));
        guest.memory = 3072;
        guest.timeout = LIMIT;
        guest.stream = self.verbose;
        let share = rig.directory.join(format!("{name}-share"));
        if share.exists() {
            std::fs::remove_dir_all(&share)?;
        }
        std::fs::create_dir_all(&share)?;
        copy(files, &share.join("suite"))?;
        guest.share = Some(share.clone());
        let guest = self.door.geometry().give_to(guest, device);
        let result = match zbdkit.filter(|_| device == Device::Zbdkit) {
            None => guest.run()?,
            Some(zbdkit) => on_zbdkit(rig, zbdkit, guest, self.door, &name)?,
        };
        let verdicts = self.suite.parse(&result.output);
        // The suites' status says whether a test failed, which is for us to judge; no verdict at all is an error.
        if verdicts.is_empty() || !matches!(result.end, End::Script(_)) {
            let verdicts_so_far = table(&[(device, verdicts)]);
            result
                .check()
                .with_context(|| format!("the suite did not run to its end:\n{verdicts_so_far}"))?;
            anyhow::bail!("the suite ran no test");
        }
        say(&format!("logs of each test: {}", share.join("logs").display()));
        Ok(verdicts)
    }
}

fn on_zbdkit(
    rig: &Rig,
    zbdkit: &Zbdkit,
    mut guest: Guest,
    door: Door,
    name: &str,
) -> Result<crate::guest::GuestResult> {
    let sockets = socket_directory()?;
    let (socket, log) = (sockets.path().join("z.sock"), log_of(rig, name)?);
    let image = rig.directory.join("images").join(format!("{name}.raw"));
    zbdkit.create(&image, &door.geometry())?;
    let daemon = match door {
        Door::VhostUserBlk => {
            let daemon = zbdkit.serve(&image, &socket, &log)?;
            guest.drives = vec![daemon.drive()];
            daemon
        }
        Door::Nvme => {
            let daemon = zbdkit.serve_nvme(&[&image], &socket, &log)?;
            guest.qemu_args.extend(daemon.nvme_arguments());
            guest.script = format!("find_nvme 1\n{}", guest.script);
            daemon
        }
    };
    let result = guest.run()?;
    daemon.stop()?;
    remove_image(&image)?;
    Ok(result)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut copy = proc::command("cp");
    copy.arg("-a").arg("--no-target-directory").arg(from).arg(to);
    proc::capture(&mut copy, "cp", LOCAL_LIMIT).map(drop)
}

/// Compiles `TOOL.c`, without shared libraries so that it runs in any guest.
fn compile(directory: &Path, tool: &str) -> Result<()> {
    let mut cc = proc::command("cc");
    cc.args(["-O2", "-static", "-o", tool])
        .arg(format!("{tool}.c"))
        .current_dir(directory);
    proc::capture(&mut cc, "cc", LOCAL_LIMIT)
        .with_context(|| format!("cannot compile the suite's {tool}.c"))
        .map(drop)
}

/// Reads `PREFIX NUMBER ... VERDICT` lines out of a suite's output. A test without a verdict is lost.
fn parse(output: &str, prefix: &str) -> Verdicts {
    let mut verdicts = Verdicts::new();
    for line in output.lines() {
        let line = without_colors(line);
        let Some(rest) = line.trim_start().strip_prefix(prefix) else {
            continue;
        };
        let number: String = rest.chars().take_while(char::is_ascii_digit).collect();
        if number.is_empty() {
            continue;
        }
        let said = rest.rsplit_once("... ").map_or("", |(_, said)| said.trim());
        let verdict = match said
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .to_ascii_uppercase()
            .as_str()
        {
            "PASS" => Verdict::Pass,
            "SKIP" => Verdict::Skip,
            "FAIL" => Verdict::Fail,
            _ => Verdict::Lost,
        };
        verdicts.insert(number, verdict);
    }
    verdicts
}

/// `line` without the escape sequences that set colors.
fn without_colors(line: &str) -> String {
    let mut plain = String::new();
    let mut rest = line;
    while let Some((before, after)) = rest.split_once("\x1b[") {
        plain += before;
        rest = after.split_once('m').map_or("", |(_, rest)| rest);
    }
    plain + rest
}

fn count(verdicts: &Verdicts, wanted: Verdict) -> usize {
    verdicts.values().filter(|verdict| **verdict == wanted).count()
}

fn summary(device: &str, verdicts: &Verdicts) -> String {
    format!(
        "{device}: {} passed, {} failed, {} skipped, {} lost",
        count(verdicts, Verdict::Pass),
        count(verdicts, Verdict::Fail),
        count(verdicts, Verdict::Skip),
        count(verdicts, Verdict::Lost)
    )
}

/// One line a test, one column a device; what differs is marked.
fn table(runs: &[(Device, Verdicts)]) -> String {
    let mut tests: Vec<&String> = runs.iter().flat_map(|(_, verdicts)| verdicts.keys()).collect();
    tests.sort();
    tests.dedup();
    let mut text = format!("{:>6}", "test");
    for (device, _) in runs {
        text += &format!("  {:8}", device.name());
    }
    for test in tests {
        text += &format!("\n{test:>6}");
        let row: Vec<Option<Verdict>> = runs
            .iter()
            .map(|(_, verdicts)| verdicts.get(test).copied())
            .collect();
        for verdict in &row {
            text += &format!("  {:8}", verdict.map_or("-", Verdict::word));
        }
        if row.windows(2).any(|pair| pair[0] != pair[1]) {
            text += "  differs";
        }
        text.truncate(text.trim_end().len());
    }
    text
}

/// Fails if zbdkit fails what null_blk does not fail; alone, a device must not fail anything.
fn judge(runs: &[(Device, Verdicts)]) -> Result<()> {
    let reference = runs
        .iter()
        .find(|(device, _)| *device == Device::NullBlk && runs.len() > 1)
        .map(|(_, verdicts)| verdicts);
    let judged = runs
        .iter()
        .find(|(device, _)| *device == Device::Zbdkit)
        .or(runs.first());
    let Some((device, verdicts)) = judged else {
        return Ok(());
    };
    let bad = |verdict: Verdict| matches!(verdict, Verdict::Fail | Verdict::Lost);
    let excused =
        |test: &String| reference.is_some_and(|reference| reference.get(test).copied().is_some_and(bad));
    let mut worse: Vec<&str> = verdicts
        .iter()
        .filter(|(test, verdict)| bad(**verdict) && !excused(test))
        .map(|(test, _)| test.as_str())
        .collect();
    let missing = reference
        .into_iter()
        .flat_map(Verdicts::keys)
        .filter(|test| !verdicts.contains_key(*test));
    worse.extend(missing.map(String::as_str));
    ensure!(
        worse.is_empty(),
        "on {} fail or are missing: {}",
        device.name(),
        worse.join(" ")
    );
    ensure!(
        count(verdicts, Verdict::Pass) > 0,
        "nothing passed on {}",
        device.name()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(of: &[(&str, Verdict)]) -> Verdicts {
        of.iter()
            .map(|(test, verdict)| ((*test).to_owned(), *verdict))
            .collect()
    }

    #[test]
    fn the_output_of_both_suites_is_understood() {
        let fio = "First sequential zone starts at sector 131072; zone size: 4 MB\n\
            Running test 01 ... PASS\nRunning test 02 ... SKIP    no conventional zones\nRunning test 03 ... FAIL\nRunning test 04 ... ";
        let wanted = [
            ("01", Verdict::Pass),
            ("02", Verdict::Skip),
            ("03", Verdict::Fail),
            ("04", Verdict::Lost),
        ];
        assert_eq!(Which::FioZbd.parse(fio), verdicts(&wanted));
        let zonefs = "zonefs-tests on /dev/vda:\n  Test 0001:  mkzonefs (options)    ... \x1b[92mPASS\x1b[0m\n\
            \x20 Test 0002:  a ... b   ... skip\n  Test 0003:  c ... \x1b[31mFAIL\x1b[0m\n";
        let wanted = [
            ("0001", Verdict::Pass),
            ("0002", Verdict::Skip),
            ("0003", Verdict::Fail),
        ];
        assert_eq!(Which::Zonefs.parse(zonefs), verdicts(&wanted));
    }

    #[test]
    fn only_what_null_blk_passes_counts_against_zbdkit() {
        let reference = verdicts(&[("1", Verdict::Pass), ("2", Verdict::Fail), ("3", Verdict::Skip)]);
        let with = |ours: &[(&str, Verdict)]| {
            judge(&[
                (Device::NullBlk, reference.clone()),
                (Device::Zbdkit, verdicts(ours)),
            ])
        };
        assert!(with(&[("1", Verdict::Pass), ("2", Verdict::Fail), ("3", Verdict::Skip)]).is_ok());
        assert!(with(&[("1", Verdict::Fail), ("2", Verdict::Pass), ("3", Verdict::Pass)]).is_err());
        assert!(with(&[("1", Verdict::Lost), ("2", Verdict::Pass), ("3", Verdict::Pass)]).is_err());
        assert!(
            with(&[("2", Verdict::Pass), ("3", Verdict::Pass)]).is_err(),
            "a test that did not run is no success"
        );
        assert!(
            with(&[("1", Verdict::Skip), ("2", Verdict::Skip), ("3", Verdict::Skip)]).is_err(),
            "nor is skipping all"
        );
    }

    #[test]
    fn a_device_alone_must_not_fail_anything() {
        assert!(judge(&[(Device::NullBlk, verdicts(&[("1", Verdict::Pass)]))]).is_ok());
        assert!(
            judge(&[(
                Device::NullBlk,
                verdicts(&[("1", Verdict::Pass), ("2", Verdict::Fail)])
            )])
            .is_err()
        );
    }

    #[test]
    fn the_table_has_a_line_for_each_test_and_marks_differences() {
        let runs = [
            (
                Device::NullBlk,
                verdicts(&[("1", Verdict::Pass), ("2", Verdict::Pass)]),
            ),
            (
                Device::Zbdkit,
                verdicts(&[("1", Verdict::Pass), ("2", Verdict::Fail), ("3", Verdict::Pass)]),
            ),
        ];
        let table = table(&runs);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(
            !lines[1].contains("differs") && lines[2].contains("differs") && lines[3].contains("differs"),
            "{table}"
        );
    }
}
