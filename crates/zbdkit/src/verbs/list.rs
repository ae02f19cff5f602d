//! `zbdkit list`: the zoned drives of this machine.

use std::path::Path;

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use zbdkit_block::format_size;
use zbdkit_block::host_device::sysfs::{BlockFacts, Sysfs, ZoneFacts};
use zbdkit_block::host_device::{Drive, DriveFacts, Hidden, Listed, Look, NvmeDrive, ZoneAdvice, users};
use zbdkit_zone::Zns;

use crate::image::Session;
use crate::output::{Out, complain, printable};
use crate::shapes::{ZrwaShape, model_name};

/// List the zoned drives of this machine
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct List {
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit list
  zbdkit list --json | jq -r '.devices[].path'
  zbdkit check /dev/sdb        # can zbdkit use it, and what would a guest see?

Columns:
  CAPACITY is what can be written of a zone; OPEN and ACTIVE are the limits of
  open and of open or closed zones. BLOCK is the logical block size, and behind
  the slash the granularity of writes to sequential zones, if that is another.
  In brackets: the character device of an NVMe namespace. - stands for none
  and no limit, ? for what this user may not see.

Listed besides zoned block devices are host-aware SCSI disks, which Linux takes
for ordinary ones from 6.8 on, and NVMe namespaces that have only a character
device. These are asked themselves, where this user may open them for reading.
Below the table: the random write areas (ZRWA) and descriptor extensions of NVMe
namespaces, which their character devices give, and what SCSI disks advise.

JSON:
  {devices: [{path, nvme_generic, vendor_model, size, logical_block_size,
  physical_block_size, write_granularity, read_only, scheduler, write_cache,
  model, zone_size, zone_capacity, nr_zones, max_open, max_active, max_append,
  used_by, note, zrwa: {size, granularity, max, explicit_commit},
  extension_size, advice: {open, non_sequential}}, ...]};
  sizes are bytes, 0 is no limit, null is none or not known";

/// A drive, as `--json` shows it.
#[derive(Debug, Default, Serialize)]
struct Row {
    path: String,
    /// The character device of an NVMe namespace.
    nvme_generic: Option<String>,
    vendor_model: Option<String>,
    size: Option<u64>,
    logical_block_size: Option<u32>,
    physical_block_size: Option<u32>,
    write_granularity: Option<u32>,
    read_only: Option<bool>,
    scheduler: Option<String>,
    write_cache: Option<&'static str>,
    model: Option<&'static str>,
    zone_size: Option<u64>,
    zone_capacity: Option<u64>,
    nr_zones: Option<u32>,
    max_open: Option<u32>,
    max_active: Option<u32>,
    max_append: Option<u64>,
    used_by: Vec<String>,
    note: Option<&'static str>,
    /// Zone random write areas.
    zrwa: Option<ZrwaShape>,
    /// Bytes of a descriptor extension.
    extension_size: Option<u32>,
    advice: Option<Advice>,
}

/// How many zones are best open, or written out of order, at a time.
#[derive(Debug, Serialize)]
struct Advice {
    open: Option<u32>,
    non_sequential: Option<u32>,
}

#[derive(Debug, Serialize)]
struct Rows {
    devices: Vec<Row>,
}

pub fn run(args: &List) -> anyhow::Result<()> {
    let drives = Sysfs::default()
        .zoned_drives(Path::new("/dev"))
        .context("listing block devices")?;
    let mut devices: Vec<Row> = drives
        .iter()
        .map(|drive| row(drive, Path::new("/proc")))
        .collect();
    for (row, drive) in devices.iter_mut().zip(&drives) {
        row.ask(drive)?;
    }
    let mut out = Out::new();
    if args.json {
        out.json(&Rows { devices })?;
    } else if devices.is_empty() {
        complain("this machine has no zoned drives; 'zbdkit create' makes images that are some");
    } else {
        out.text(table(&devices))?;
    }
    out.flush()
}

fn row(drive: &Listed, proc: &Path) -> Row {
    let path = drive.path();
    let mut row = Row {
        path: path.display().to_string(),
        nvme_generic: drive.generic.as_ref().map(|name| format!("/dev/{name}")),
        vendor_model: drive.model.clone(),
        note: drive.hidden.map(|hidden| match hidden {
            Hidden::HostAware => {
                "host-aware, which this kernel takes for an ordinary disk: it shows no zones"
            }
            Hidden::NoBlockDevice => "this kernel makes no block device of this namespace",
        }),
        model: (drive.hidden == Some(Hidden::HostAware)).then_some("host-aware"),
        ..Row::default()
    };
    if let Some(facts) = &drive.block {
        row.add_block(facts);
        row.used_by = users(facts, &path, proc)
            .iter()
            .map(ToString::to_string)
            .collect();
        if let Some(zones) = &facts.zones {
            row.add_zones(zones);
            row.zone_capacity = match facts.zones_by_command {
                // A zone of a host-aware disk can be written to its end.
                true => Some(zones.zone_size),
                false => Look::at(&path, zones.zone_size)
                    .and_then(|look| look.capacity())
                    .ok()
                    .flatten(),
            };
        }
    }
    row
}

impl Row {
    /// What only the drive itself can tell, where this user may ask it.
    fn ask(&mut self, drive: &Listed) -> anyhow::Result<()> {
        if drive.block.as_ref().is_some_and(|block| block.zones_by_command) {
            self.advice = ZoneAdvice::of_disk(&drive.path()).map(|advice| Advice {
                open: advice.open,
                non_sequential: advice.non_sequential,
            });
        }
        let Some(generic) = &self.nvme_generic else {
            return Ok(());
        };
        let namespace = Session::new()?.run(NvmeDrive::open(Path::new(generic), true));
        if let Ok(namespace) = namespace {
            self.add_namespace(namespace.facts());
        }
        Ok(())
    }

    fn add_namespace(&mut self, facts: &DriveFacts) {
        let Zns { zrwa, extension_size } = facts.zns;
        self.extension_size = Some(extension_size);
        self.zrwa = zrwa.map(ZrwaShape::of);
        // Without a block device nobody else has told.
        if self.size.is_none() {
            self.size = Some(facts.size);
            self.logical_block_size = Some(facts.block_size);
            self.add_zones(&facts.zones);
        }
    }

    /// Lines below the table.
    fn notes(&self) -> Vec<String> {
        let mut notes: Vec<String> = self.note.map(str::to_owned).into_iter().collect();
        if let Some(areas) = &self.zrwa {
            notes.push(described_areas(areas.size, areas.granularity, areas.max));
        }
        if let Some(bytes) = self.extension_size.filter(|bytes| *bytes > 0) {
            notes.push(format!("descriptor extensions of {bytes} bytes"));
        }
        if let Some(advice) = &self.advice {
            notes.extend(described_advice(advice.open, advice.non_sequential));
        }
        notes
    }

    fn add_block(&mut self, facts: &BlockFacts) {
        self.size = Some(facts.size);
        self.logical_block_size = Some(facts.logical_block_size);
        self.physical_block_size = Some(facts.physical_block_size);
        self.read_only = Some(facts.read_only);
        self.scheduler.clone_from(&facts.scheduler);
        self.write_cache = facts.write_back.map(|write_back| match write_back {
            true => "write back",
            false => "write through",
        });
    }

    fn add_zones(&mut self, zones: &ZoneFacts) {
        self.model = Some(model_name(zones.model));
        self.write_granularity = Some(zones.write_granularity);
        self.zone_size = Some(zones.zone_size);
        self.nr_zones = Some(zones.nr_zones);
        self.max_open = Some(zones.max_open);
        self.max_active = Some(zones.max_active);
        self.max_append = Some(zones.max_append);
    }

    fn cells(&self) -> [String; 11] {
        let unknown = || "?".to_owned();
        let size = |bytes: Option<u64>| bytes.map_or_else(unknown, format_size);
        let count = |count: Option<u32>| count.map_or_else(unknown, |count| count.to_string());
        let limit = |limit: Option<u32>| match limit {
            Some(0) => "-".to_owned(),
            limit => count(limit),
        };
        let generic = self
            .nvme_generic
            .as_deref()
            .filter(|generic| *generic != self.path);
        let block = match (self.logical_block_size, self.write_granularity) {
            (Some(logical), Some(granularity)) if logical != granularity => {
                format!("{logical}/{granularity}")
            }
            (logical, _) => count(logical),
        };
        [
            match generic {
                Some(generic) => format!("{} ({generic})", self.path),
                None => self.path.clone(),
            },
            self.model.unwrap_or("?").to_owned(),
            size(self.size),
            count(self.nr_zones),
            size(self.zone_size),
            size(self.zone_capacity),
            limit(self.max_open),
            limit(self.max_active),
            block,
            // The drive says it, and could say anything.
            self.vendor_model
                .as_deref()
                .map_or_else(|| "-".to_owned(), printable),
            match self.used_by.is_empty() {
                true => "-".to_owned(),
                false => printable(&self.used_by.join(", ")),
            },
        ]
    }
}

/// Zone random write areas for people; `count` 0 is any number.
pub fn described_areas(size: u64, granularity: u64, count: u32) -> String {
    let zones = match count {
        0 => "any number of zones".to_owned(),
        1 => "one zone at a time".to_owned(),
        count => format!("{count} zones at a time"),
    };
    format!(
        "random write areas of {} in {zones}, committed by multiples of {}",
        format_size(size),
        format_size(granularity)
    )
}

/// What a SCSI disk advises, if anything.
pub fn described_advice(open: Option<u32>, non_sequential: Option<u32>) -> Option<String> {
    let open = open.map(|zones| format!("{zones} zones open"));
    let non_sequential = non_sequential.map(|zones| format!("{zones} written out of order"));
    let best: Vec<String> = open.into_iter().chain(non_sequential).collect();
    (!best.is_empty()).then(|| format!("best with at most {}", best.join(", ")))
}

const HEADINGS: [&str; 11] = [
    "DEVICE",
    "MODEL",
    "SIZE",
    "ZONES",
    "ZONE SIZE",
    "CAPACITY",
    "OPEN",
    "ACTIVE",
    "BLOCK",
    "DRIVE",
    "USED BY",
];

/// The table for people, each column as wide as its widest cell, and the notes below it.
fn table(rows: &[Row]) -> String {
    let lines: Vec<[String; 11]> = std::iter::once(HEADINGS.map(str::to_owned))
        .chain(rows.iter().map(Row::cells))
        .collect();
    let width = |column: usize| {
        let widths = lines.iter().map(|line| line[column].chars().count());
        widths.max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..HEADINGS.len()).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        let cells = line.iter().zip(&widths);
        let padded: Vec<String> = cells.map(|(cell, width)| format!("{cell:width$}")).collect();
        text += padded.join("  ").trim_end();
        text.push('\n');
    }
    for row in rows {
        for note in row.notes() {
            text += &format!("{}: {note}\n", row.path);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use zbdkit_zone::Model;

    use super::*;

    fn facts() -> BlockFacts {
        BlockFacts {
            zones_by_command: false,
            name: "sdb".into(),
            number: "8:16".parse().unwrap(),
            partition_of: None,
            size: 14 << 40,
            read_only: false,
            logical_block_size: 512,
            physical_block_size: 4096,
            scheduler: Some("mq-deadline".into()),
            write_back: Some(true),
            holders: vec!["dm-0".into()],
            zones: Some(ZoneFacts {
                model: Model::HostManaged,
                zone_size: 256 << 20,
                nr_zones: 57344,
                max_open: 128,
                max_active: 0,
                max_append: 0,
                write_granularity: 4096,
            }),
        }
    }

    fn listed(block: Option<BlockFacts>, generic: Option<&str>, hidden: Option<Hidden>) -> Listed {
        Listed {
            block,
            generic: generic.map(str::to_owned),
            model: Some("ATA \u{1b}[2Jx".into()),
            hidden,
        }
    }

    #[test]
    fn the_table_shows_limits_users_and_what_cannot_be_seen() {
        let proc = tempfile::tempdir().unwrap();
        let nvme = BlockFacts {
            name: "nvme0n1".into(),
            holders: Vec::new(),
            ..facts()
        };
        let rows = [
            listed(Some(facts()), None, None),
            listed(Some(nvme), Some("ng0n1"), None),
            listed(None, Some("ng1n1"), Some(Hidden::NoBlockDevice)),
        ]
        .map(|drive| row(&drive, proc.path()));
        let table = table(&rows);
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(
            table.lines().map(words).collect::<Vec<_>>(),
            [
                "DEVICE MODEL SIZE ZONES ZONE SIZE CAPACITY OPEN ACTIVE BLOCK DRIVE USED BY",
                "/dev/sdb host-managed 14 TiB 57344 256 MiB ? 128 - 512/4096 ATA \\u{1b}[2Jx part of dm-0",
                "/dev/nvme0n1 (/dev/ng0n1) host-managed 14 TiB 57344 256 MiB ? 128 - 512/4096 ATA \\u{1b}[2Jx -",
                "/dev/ng1n1 ? ? ? ? ? ? ? ? ATA \\u{1b}[2Jx -",
                "/dev/ng1n1: this kernel makes no block device of this namespace",
            ]
        );
        let column = |line: &str| line.find("DRIVE").or(line.find("ATA"));
        let columns: Vec<_> = table.lines().take(4).map(column).collect();
        assert_eq!(columns, [columns[0]; 4]);
    }

    #[test]
    fn what_the_drive_itself_tells_is_below_the_table() {
        let proc = tempfile::tempdir().unwrap();
        let mut rows = [listed(None, Some("ng1n1"), Some(Hidden::NoBlockDevice)), {
            let aware = BlockFacts {
                zones_by_command: true,
                holders: Vec::new(),
                ..facts()
            };
            listed(Some(aware), None, Some(Hidden::HostAware))
        }]
        .map(|drive| row(&drive, proc.path()));
        rows[0].add_namespace(&DriveFacts {
            path: "/dev/ng1n1".into(),
            size: 1 << 40,
            block_size: 4096,
            read_only: true,
            zones: facts().zones.unwrap(),
            zns: Zns {
                zrwa: Some(zbdkit_zone::Zrwa {
                    size: 1 << 20,
                    granularity: 64 << 10,
                    count: 8,
                    explicit_commit: true,
                }),
                extension_size: 64,
            },
        });
        rows[1].advice = Some(Advice {
            open: Some(128),
            non_sequential: None,
        });
        let table = table(&rows);
        assert_eq!(
            table.lines().skip(3).collect::<Vec<_>>(),
            [
                "/dev/ng1n1: this kernel makes no block device of this namespace",
                "/dev/ng1n1: random write areas of 1 MiB in 8 zones at a time, committed by multiples of 64 KiB",
                "/dev/ng1n1: descriptor extensions of 64 bytes",
                "/dev/sdb: host-aware, which this kernel takes for an ordinary disk: it shows no zones",
                "/dev/sdb: best with at most 128 zones open",
            ]
        );
        assert!(
            table.contains("/dev/ng1n1  host-managed  1 TiB   57344"),
            "{table}"
        );
        let json = serde_json::to_value(&rows[0]).unwrap();
        assert_eq!(
            (&json["zrwa"]["max"], &json["extension_size"], &json["advice"]),
            (&8.into(), &64.into(), &serde_json::Value::Null)
        );
        assert_eq!(rows[1].zone_capacity, Some(256 << 20));
    }

    #[test]
    fn json_has_bytes_and_null_for_what_is_not_known() {
        let proc = tempfile::tempdir().unwrap();
        let plain = BlockFacts {
            zones: None,
            ..facts()
        };
        let row = row(&listed(Some(plain), None, Some(Hidden::HostAware)), proc.path());
        let json = serde_json::to_value(Rows { devices: vec![row] }).unwrap();
        let device = &json["devices"][0];
        assert_eq!(
            (&device["path"], &device["model"]),
            (&"/dev/sdb".into(), &"host-aware".into())
        );
        assert_eq!(device["size"], 14u64 << 40);
        assert!(device["zone_size"].is_null() && device["nvme_generic"].is_null());
        assert_eq!(device["used_by"], serde_json::json!(["part of dm-0"]));
    }
}
