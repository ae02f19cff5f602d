//! `zbdkit check`: whether an image contradicts itself, and repairing it. Of a device of this machine: [`device`].

mod device;
mod findings;

use std::path::Path;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use zbdkit_block::{CheckError, CheckOutcome, Graph};
use zbdkit_qcow2::Repair;

use crate::args::OutputArg;
use crate::image::{ImageArgs, Session, looking};
use crate::output::{Out, Usage, complain, complain_plain, printable};
use crate::progress::{Progress, Show};
use crate::shapes::qemu::{ImageCheck, ZonesCheck};

/// Check an image's consistency, zones included, and repair it; or whether a host device can be used
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Check {
    #[command(flatten)]
    pub image: ImageArgs,

    /// Take the image for this format instead of finding out
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,

    /// Repair what was found: only leaks, which is always safe, or all
    #[arg(short, long, value_name = "WHAT")]
    pub repair: Option<RepairArg>,

    /// Look even while another process writes the image; what is found then may be nothing but work in progress
    #[arg(short = 'U', long, conflicts_with = "repair")]
    pub force_share: bool,

    /// How to print the result
    #[arg(long, value_name = "FORM", default_value = "human")]
    pub output: OutputArg,

    /// The same as --output json
    #[arg(long)]
    pub json: bool,

    /// Show the progress in percents on stdout, as qemu-img -p does; a terminal gets a bar without it
    #[arg(short, long)]
    pub progress: bool,

    /// Print nothing but what is wrong
    #[arg(short, long)]
    pub quiet: bool,
}

/// What is repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RepairArg {
    /// Space that nothing refers to
    Leaks,
    /// Everything; what cannot be known is told
    All,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit check disk.qcow2
  zbdkit check -r leaks disk.qcow2
  zbdkit check -r all --output json disk.qcow2
  zbdkit check disk.raw
  zbdkit check /dev/nullb0

What is wrong is said on stderr, line by line, and summed up on stdout. Of a raw image with zones the zone table is \
checked. Leaks are space that nothing uses: a crash leaves them, and they do no harm. Do not repair an image of which \
there is no copy before you have read what is wrong.

Devices:
  Of a zoned device of this machine, or any that holds no image, it is checked
  whether zbdkit can use it: permissions, who else uses it, scheduler, cache
  mode, its zones, and what each door would show of it. Each line is ok, a
  note, or a problem with what to do about it. Nothing is changed. With -f or
  --image-opts an image on a device is meant.

JSON:
  As qemu-img prints it: {image-end-offset, total-clusters, corruptions,
  check-errors, leaks, corruptions-fixed, leaks-fixed, allocated-clusters,
  fragmented-clusters, compressed-clusters, filename, format}, where counts of
  0 are left out but for check-errors; and zones: {errors, fixed, messages},
  whose figures are also in corruptions and corruptions-fixed. Of a device:
  {path, usable, image, findings: [{about, verdict, says, fix}, ...]}

Exit status:
  0   nothing is wrong, or no longer
  1   it could not be checked, or the command line is wrong; a device cannot
      be used as it is
  2   corruptions are left
  3   leaks are left
  63  the format has nothing to check";

/// Nothing to check in this format.
const NO_CHECKS: u8 = 63;

pub fn run(args: &Check) -> anyhow::Result<ExitCode> {
    let path = Path::new(&args.image.image);
    if args.format.is_none() && !args.image.image_opts && device::is_device(path) {
        if args.repair.is_some() {
            return Err(Usage(
                "there is nothing to repair in a device; -f names the format of an image on it".into(),
            )
            .into());
        }
        let usable = device::run(path, args.as_json(), args.quiet)?;
        return Ok(if usable {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let graph = args.image.graph_as(args.format.as_deref())?;
    let repair = match args.repair {
        None => Repair::None,
        Some(RepairArg::Leaks) => Repair::Leaks,
        Some(RepairArg::All) => Repair::All,
    };
    let Some(mut outcome) = look(&graph, args, repair)? else {
        complain("this image format has nothing to check");
        return Ok(ExitCode::from(NO_CHECKS));
    };
    tell(outcome.report.iter().flat_map(|report| &report.messages));
    tell(outcome.zones.iter().flat_map(|zones| &zones.messages));
    let json = args.as_json();
    let mut out = Out::new();
    let (leaks, corruptions) = fixed(&outcome);
    if leaks + corruptions > 0 {
        if !args.quiet && !json {
            out.text(repaired(leaks, corruptions))?;
            out.flush()?;
        }
        outcome = second_look(&graph, args, outcome)?;
    }
    let zones = outcome.zones.map(|zones| ZonesCheck {
        errors: zones.errors,
        fixed: zones.fixed,
        messages: zones.messages,
    });
    let report = outcome.report.unwrap_or_default();
    let filename = args.image.image.to_string_lossy().into_owned();
    let check = ImageCheck::of(filename, outcome.format.name(), &report, zones);
    if json {
        out.json(&check)?;
    } else if !args.quiet {
        out.text(summary(&check))?;
    }
    out.flush()?;
    Ok(ExitCode::from(status(&check)))
}

impl Check {
    fn as_json(&self) -> bool {
        self.json || self.output == OutputArg::Json
    }
}

/// Checks the image, and repairs it if that was asked for; `None` for a format that has nothing to check.
fn look(graph: &Graph, args: &Check, repair: Repair) -> anyhow::Result<Option<CheckOutcome>> {
    let session = Session::new()?;
    // Percents would spoil JSON.
    let percent = args.progress && !args.as_json();
    let mut progress = Progress::new(Show::of(percent, args.quiet), "checking");
    let mut show = |done, total| progress.set(done, total);
    let options = looking(args.force_share);
    match session.run(zbdkit_block::check(
        session.host(),
        graph,
        &options,
        repair,
        &mut show,
    )) {
        Ok(outcome) => Ok(Some(outcome)),
        Err(CheckError::NothingToCheck) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// How many leaks and how many other faults a repair took away.
fn fixed(outcome: &CheckOutcome) -> (u64, u64) {
    let (leaks, corruptions) = outcome
        .report
        .as_ref()
        .map_or((0, 0), |report| (report.leaks_fixed, report.corruptions_fixed));
    (
        leaks,
        corruptions + outcome.zones.as_ref().map_or(0, |zones| zones.fixed),
    )
}

/// What is left after a repair. The format's check has looked again itself, unless only the zones were repaired.
fn second_look(graph: &Graph, args: &Check, first: CheckOutcome) -> anyhow::Result<CheckOutcome> {
    if first.zones.as_ref().is_none_or(|zones| zones.fixed == 0) {
        tell(
            first
                .report
                .iter()
                .flat_map(|report| report.rechecked.iter().flatten()),
        );
        return Ok(first);
    }
    let Some(mut second) = look(graph, args, Repair::None)? else {
        return Ok(first);
    };
    tell(second.report.iter().flat_map(|report| &report.messages));
    tell(second.zones.iter().flat_map(|zones| &zones.messages));
    if let (Some(before), Some(now)) = (first.report, &mut second.report) {
        now.leaks_fixed = before.leaks_fixed;
        now.corruptions_fixed = before.corruptions_fixed;
    }
    if let (Some(before), Some(now)) = (first.zones, &mut second.zones) {
        now.fixed = before.fixed;
        now.messages = [before.messages, std::mem::take(&mut now.messages)].concat();
    }
    Ok(second)
}

/// Findings go to stderr as they are, as qemu-img's do.
fn tell<'a>(findings: impl Iterator<Item = &'a String>) {
    for finding in findings {
        complain_plain(printable(finding));
    }
}

/// Words for the result.
fn summary(check: &ImageCheck) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    // Writing to a string cannot fail.
    if check.corruptions == 0 && check.leaks == 0 && check.check_errors == 0 {
        text.push_str("No errors were found on the image.\n");
    }
    if check.corruptions > 0 {
        let _ = write!(
            text,
            "\n{} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n",
            check.corruptions
        );
    }
    if check.leaks > 0 {
        let _ = write!(
            text,
            "\n{} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n",
            check.leaks
        );
    }
    if check.check_errors > 0 {
        let _ = write!(
            text,
            "\n{} internal errors have occurred during the check.\n",
            check.check_errors
        );
    }
    if check.total_clusters > 0 && check.allocated_clusters > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        let _ = writeln!(
            text,
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            check.allocated_clusters,
            check.total_clusters,
            percent(check.allocated_clusters, check.total_clusters),
            percent(check.fragmented_clusters, check.allocated_clusters),
            percent(check.compressed_clusters, check.allocated_clusters)
        );
    }
    if check.image_end_offset > 0 {
        let _ = writeln!(text, "Image end offset: {}", check.image_end_offset);
    }
    text
}

/// What a repair did.
fn repaired(leaks: u64, corruptions: u64) -> String {
    format!(
        "The following inconsistencies were found and repaired:\n\n    {leaks} leaked clusters\n    \
         {corruptions} corruptions\n\nDouble checking the fixed image now...\n"
    )
}

/// The exit status.
fn status(check: &ImageCheck) -> u8 {
    match check {
        _ if check.check_errors > 0 => 1,
        _ if check.corruptions > 0 => 2,
        _ if check.leaks > 0 => 3,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use zbdkit_qcow2::CheckReport;

    use super::*;
    use crate::shapes::qemu::ZonesCheck;

    fn check(report: CheckReport) -> ImageCheck {
        ImageCheck::of("x.qcow2".to_owned(), "qcow2", &report, None)
    }

    fn fresh() -> CheckReport {
        CheckReport {
            image_end_offset: 262_144,
            total_clusters: 16384,
            ..CheckReport::default()
        }
    }

    fn damaged() -> CheckReport {
        CheckReport {
            corruptions: 4,
            leaks: 2,
            allocated_clusters: 16,
            image_end_offset: 1_376_256,
            ..fresh()
        }
    }

    #[test]
    fn summaries_are_qemu_imgs() {
        assert_eq!(
            summary(&check(fresh())),
            "No errors were found on the image.\nImage end offset: 262144\n"
        );
        assert_eq!(
            summary(&check(damaged())),
            "\n4 errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n\
             \n2 leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n\
             16/16384 = 0.10% allocated, 0.00% fragmented, 0.00% compressed clusters\n\
             Image end offset: 1376256\n"
        );
        let full = CheckReport {
            total_clusters: 80,
            allocated_clusters: 80,
            fragmented_clusters: 1,
            compressed_clusters: 20,
            ..fresh()
        };
        assert!(
            summary(&check(full))
                .contains("\n80/80 = 100.00% allocated, 1.25% fragmented, 25.00% compressed clusters\n")
        );
    }

    #[test]
    fn the_worst_that_is_left_is_the_status() {
        let with = |corruptions, leaks, check_errors| {
            status(&check(CheckReport {
                corruptions,
                leaks,
                check_errors,
                corruptions_fixed: 5,
                leaks_fixed: 5,
                ..fresh()
            }))
        };
        assert_eq!(with(0, 0, 0), 0);
        assert_eq!(with(0, 1, 0), 3);
        assert_eq!(with(1, 1, 0), 2);
        assert_eq!(with(1, 1, 1), 1);
    }

    #[test]
    fn json_has_qemus_keys_and_counts_zone_errors_as_corruptions() {
        let json = |check: &ImageCheck| serde_json::to_value(check).unwrap();
        assert_eq!(
            json(&check(fresh())),
            serde_json::json!({
                "image-end-offset": 262_144, "total-clusters": 16384, "check-errors": 0, "filename": "x.qcow2",
                "format": "qcow2",
            })
        );
        let zones = ZonesCheck {
            errors: 1,
            fixed: 2,
            messages: vec!["zone 3 ...".to_owned()],
        };
        let check = ImageCheck::of("x.qcow2".to_owned(), "qcow2", &damaged(), Some(zones));
        assert_eq!(
            json(&check),
            serde_json::json!({
                "image-end-offset": 1_376_256, "total-clusters": 16384, "corruptions": 5, "check-errors": 0, "leaks": 2,
                "corruptions-fixed": 2, "allocated-clusters": 16, "filename": "x.qcow2", "format": "qcow2",
                "zones": {"errors": 1, "fixed": 2, "messages": ["zone 3 ..."]},
            })
        );
    }
}
