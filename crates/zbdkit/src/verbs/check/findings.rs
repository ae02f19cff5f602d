//! What follows from an examination of a device: a finding for each thing that was looked at.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::Serialize;
use zbdkit_block::host_device::sysfs::{BlockFacts, ZoneFacts};
use zbdkit_block::host_device::{Access, User, ZoneAdvice};
use zbdkit_block::{Limits, format_size};
use zbdkit_export::vhost_user_blk;
use zbdkit_zone::Geometry;

use crate::image::shell_quoted;
use crate::output::printable;
use crate::shapes::model_name;
use crate::verbs::list::{described_advice, described_areas};
use crate::verbs::serve::DEFAULT_QUEUE_SIZE;

/// What `--json` shows.
#[derive(Debug, Serialize)]
pub struct Report {
    path: String,
    /// Nothing below is a problem.
    pub usable: bool,
    /// How to name it to the other verbs.
    image: String,
    findings: Vec<Finding>,
}

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Finding {
    about: &'static str,
    verdict: Verdict,
    says: String,
    fix: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// Worth knowing, and no hindrance.
    Note,
    /// zbdkit cannot use the device as it is.
    Problem,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Note => "note",
            Verdict::Problem => "problem",
        }
    }
}

impl Finding {
    fn new(about: &'static str, verdict: Verdict, says: impl Into<String>) -> Finding {
        Finding {
            about,
            verdict,
            says: says.into(),
            fix: None,
        }
    }

    fn fix(self, fix: impl Into<String>) -> Finding {
        Finding {
            fix: Some(fix.into()),
            ..self
        }
    }
}

/// What was found out about a device.
#[derive(Debug)]
pub struct Examination {
    pub path: PathBuf,
    /// What sysfs says; absent for a character device.
    pub facts: Option<BlockFacts>,
    pub access: Access,
    /// In whose words it may not be opened, although the file's permissions allow it.
    pub denied: Option<String>,
    /// The name of the group that the device file belongs to.
    pub group: Option<String>,
    pub users: Vec<User>,
    /// Somebody has it for themselves; `None` where that could not be found out.
    pub claimed: Option<bool>,
    /// How many zones are conventional, offline, read-only and open, or why that is not known; absent without zones.
    pub zones: Option<Result<Counts, String>>,
    /// What a host-aware SCSI disk advises.
    pub advice: Option<ZoneAdvice>,
    /// The limits that it has once opened as it would be for a door, or why it could not be opened. Absent where that was
    /// not tried, because it is plain that it fails.
    pub opened: Option<Result<Limits, String>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub conventional: u32,
    pub offline: u32,
    pub read_only: u32,
    pub open: u32,
}

/// How the other verbs want the device named.
pub fn image_of(path: &Path) -> String {
    let filename = path.display().to_string().replace(',', ",,");
    format!("driver=host_device,filename={filename},cache.direct=on")
}

impl Examination {
    /// All findings, and whether zbdkit can use the device.
    pub fn report(&self) -> Report {
        let findings = self.findings();
        Report {
            path: self.path.display().to_string(),
            usable: findings.iter().all(|finding| finding.verdict != Verdict::Problem),
            image: image_of(&self.path),
            findings,
        }
    }

    fn findings(&self) -> Vec<Finding> {
        let mut findings = vec![self.device()];
        findings.extend(self.partition());
        findings.push(self.permissions());
        findings.extend(self.in_use());
        if let Some(facts) = &self.facts {
            findings.extend(read_only(facts));
            findings.extend(scheduler(facts));
            findings.push(cache(facts));
        }
        findings.extend(self.zones());
        findings.extend(self.extras());
        findings.push(match &self.opened {
            Some(Ok(_)) => Finding::new(
                "opening",
                Verdict::Ok,
                format!("opens as {}", image_of(&self.path)),
            ),
            Some(Err(error)) => Finding::new("opening", Verdict::Problem, printable(error)),
            None => Finding::new("opening", Verdict::Note, "not tried before the above is mended"),
        });
        if let Some(Ok(limits)) = &self.opened {
            findings.push(vhost_user_blk_door(limits));
        }
        findings.push(Finding::new(
            "nvme",
            Verdict::Note,
            "by zbdkit serve --nvme, where no zone is conventional",
        ));
        findings
    }

    fn device(&self) -> Finding {
        let geometry = match &self.opened {
            Some(Ok(limits)) => limits.zoned.as_ref(),
            _ => None,
        };
        let says = match (&self.facts, geometry) {
            (None, None) => "character device".to_owned(),
            (None, Some(geometry)) => format!("character device: {}", of_geometry(geometry)),
            (Some(facts), geometry) => match (&facts.zones, geometry) {
                (Some(zones), _) => of_facts(facts, zones),
                // The kernel shows none, but the drive has some, and was asked itself.
                (None, Some(geometry)) => of_geometry(geometry),
                (None, None) => format!(
                    "{} without zones that this kernel shows: an ordinary disk",
                    format_size(facts.size)
                ),
            },
        };
        Finding::new("device", Verdict::Ok, says)
    }

    fn partition(&self) -> Option<Finding> {
        let facts = self.facts.as_ref()?;
        let disk = facts.partition_of.as_ref()?;
        let says = format!("a partition of {disk}");
        Some(match facts.zones {
            None => Finding::new("whole disk", Verdict::Note, says),
            Some(_) => Finding::new(
                "whole disk",
                Verdict::Problem,
                says + ": the limits of open zones are the whole disk's, which others may use up",
            )
            .fix(format!("use /dev/{disk}")),
        })
    }

    fn permissions(&self) -> Finding {
        let Access {
            read,
            write,
            mode,
            group,
        } = self.access;
        if let Some(denied) = &self.denied {
            return Finding::new("permissions", Verdict::Problem, denied).fix(
                "let the container have it (--device, DeviceAllow=); the file's own permissions allow it",
            );
        }
        let says = match (read, write) {
            (true, true) => return Finding::new("permissions", Verdict::Ok, "may be read and written"),
            (true, false) => "may be read, but not written",
            (false, true) => "may be written, but not read",
            (false, false) => "may neither be read nor written",
        };
        let group = self.group.clone().unwrap_or_else(|| group.to_string());
        let fix = match mode & 0o060 {
            0o060 => format!("join the group {group} ('sudo usermod -aG {group} $USER', then log in anew)"),
            _ => format!("'sudo setfacl -m u:$USER:rw {}'", shell_quoted(&self.path)),
        };
        Finding::new("permissions", Verdict::Problem, says).fix(fix + ", or run zbdkit as root")
    }

    /// Nothing is known of who uses a character device.
    fn in_use(&self) -> Vec<Finding> {
        if self.facts.is_none() {
            return Vec::new();
        }
        let claimed = self.claimed == Some(true);
        let about = "in use";
        let mut findings: Vec<Finding> = self
            .users
            .iter()
            .map(|user| {
                let says = printable(&user.to_string());
                match user {
                    // Nothing keeps it from writing.
                    User::Process { .. } if !claimed => Finding::new(
                        about,
                        Verdict::Note,
                        says + ": what it writes or resets, zbdkit learns of only by a failure",
                    ),
                    _ => Finding::new(about, Verdict::Problem, says).fix(printable(&user.remedy())),
                }
            })
            .collect();
        let explained = findings.iter().any(|finding| finding.verdict == Verdict::Problem);
        if claimed && !explained {
            findings.push(
                Finding::new(about, Verdict::Problem, "by somebody whom this user may not see")
                    .fix("run this check as root to see who it is"),
            );
        }
        if findings.is_empty() {
            findings.push(match self.claimed {
                Some(_) => Finding::new(about, Verdict::Ok, "by nobody"),
                None => Finding::new(about, Verdict::Note, "nobody is seen, but that may not be all"),
            });
        }
        findings
    }

    fn zones(&self) -> Option<Finding> {
        let about = "zones";
        Some(match self.zones.as_ref()? {
            Err(error) => Finding::new(
                about,
                Verdict::Problem,
                format!("no report: {}", printable(error)),
            ),
            Ok(counts) => {
                let verdict = match counts.offline + counts.read_only {
                    0 => Verdict::Ok,
                    _ => Verdict::Note,
                };
                Finding::new(
                    about,
                    verdict,
                    format!(
                        "{} conventional, {} open, {} read-only, {} offline",
                        counts.conventional, counts.open, counts.read_only, counts.offline
                    ),
                )
            }
        })
    }
}

impl Examination {
    /// What only some drives have beside their zones.
    fn extras(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        if let Some(Ok(limits)) = &self.opened
            && let Some(geometry) = &limits.zoned
        {
            if let Some(zrwa) = geometry.zrwa() {
                let mut says = described_areas(zrwa.size, zrwa.granularity, zrwa.count);
                if !zrwa.explicit_commit {
                    says += "; not by command, only by writes behind them";
                }
                findings.push(Finding::new("random writes", Verdict::Ok, says));
            }
            match geometry.extension_size() {
                0 => {}
                bytes => findings.push(Finding::new(
                    "extensions",
                    Verdict::Ok,
                    format!("each zone's descriptor can have {bytes} bytes more"),
                )),
            }
        }
        let advice = self
            .advice
            .and_then(|advice| described_advice(advice.open, advice.non_sequential));
        findings.extend(advice.map(|says| Finding::new("advice", Verdict::Note, says)));
        findings
    }
}

fn of_facts(facts: &BlockFacts, zones: &ZoneFacts) -> String {
    zoned(
        model_name(zones.model),
        (facts.size, zones.nr_zones, zones.zone_size),
        (zones.max_open, zones.max_active),
        facts.logical_block_size,
    )
}

fn of_geometry(geometry: &Geometry) -> String {
    zoned(
        model_name(geometry.model()),
        (geometry.size(), geometry.nr_zones(), geometry.zone_size()),
        (geometry.max_open(), geometry.max_active()),
        geometry.block_size(),
    )
}

/// A zoned drive of a size, so many zones of a size, limits of open and of active ones, and a block size.
fn zoned(
    model: &str,
    (size, nr_zones, zone_size): (u64, u32, u64),
    (max_open, max_active): (u32, u32),
    block_size: u32,
) -> String {
    let limit = |limit: u32| match limit {
        0 => "any number".to_owned(),
        limit => limit.to_string(),
    };
    format!(
        "{model}, {}, {nr_zones} zones of {}; may be open: {}, active: {}; blocks of {block_size} bytes",
        format_size(size),
        format_size(zone_size),
        limit(max_open),
        limit(max_active)
    )
}

fn read_only(facts: &BlockFacts) -> Option<Finding> {
    facts.read_only.then(|| {
        Finding::new(
            "read-only",
            Verdict::Note,
            "this kernel takes no writes for it; only -r works",
        )
        .fix("blockdev --setrw, where the drive itself can be written")
    })
}

fn scheduler(facts: &BlockFacts) -> Option<Finding> {
    let scheduler = facts.scheduler.as_ref()?;
    let says = match facts.zones {
        Some(_) => format!("{scheduler}; any will do, one write of a zone is under way at a time"),
        None => scheduler.clone(),
    };
    Some(Finding::new("scheduler", Verdict::Ok, says))
}

fn cache(facts: &BlockFacts) -> Finding {
    let mut says = match facts.zones {
        Some(_) => "past the page cache only (cache.direct=on, io -n, serve --direct)".to_owned(),
        None => "through the page cache or past it (cache.direct=on)".to_owned(),
    };
    match facts.write_back {
        Some(true) => says += "; the drive's own cache is emptied by flushes",
        Some(false) => says += "; the drive has no volatile cache of its own",
        None => {}
    }
    Finding::new("cache mode", Verdict::Ok, says)
}

/// What a guest would see behind the door that is called so.
fn vhost_user_blk_door(limits: &Limits) -> Finding {
    let about = "vhost-user-blk";
    let config = match vhost_user_blk::shown(limits, 1, DEFAULT_QUEUE_SIZE) {
        Ok(config) => config,
        Err(unsuitable) => return Finding::new(about, Verdict::Problem, unsuitable.to_string()),
    };
    let sectors = |sectors: u64| format_size(sectors.saturating_mul(512));
    let mut says = format!(
        "a guest sees {} in blocks of {} bytes",
        sectors(config.capacity.get()),
        config.blk_size
    );
    let zoned = &config.zoned;
    if zoned.model != 0 {
        // Writing to a string cannot fail.
        let _ = write!(
            says,
            ", zones of {}, max open {}, max active {}, appends up to {}, writes in multiples of {} bytes",
            sectors(zoned.zone_sectors.get().into()),
            zoned.max_open_zones,
            zoned.max_active_zones,
            sectors(zoned.max_append_sectors.get().into()),
            zoned.write_granularity
        );
    }
    Finding::new(about, Verdict::Ok, says)
}

impl Report {
    /// For people: a line each, and the fix below its problem.
    pub fn lines(&self, quiet: bool) -> String {
        let shown = self
            .findings
            .iter()
            .filter(|finding| !quiet || finding.verdict == Verdict::Problem);
        let mut text = String::new();
        for Finding {
            about,
            verdict,
            says,
            fix,
        } in shown
        {
            let _ = writeln!(text, "{:8} {about:15} {says}", verdict.word());
            if let Some(fix) = fix {
                let _ = writeln!(text, "{:24} fix: {fix}", "");
            }
        }
        let path = printable(&self.path);
        match (self.usable, quiet) {
            (true, true) => {}
            (true, false) => {
                let _ = writeln!(text, "{path}: usable");
            }
            (false, _) => {
                let _ = writeln!(text, "{path}: not usable as it is");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests;
