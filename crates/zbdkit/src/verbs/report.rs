//! `zbdkit report`: the zones, one a line.

use std::ops::ControlFlow;

use clap::{Args, ValueEnum};
use zbdkit_zone::{Attributes, Condition, Filter, Recommendation, ZoneInfo, ZoneType};

use crate::args;
use crate::image::{ImageArgs, Session, looking, zones_of};
use crate::output::Out;
use crate::shapes;

/// Report the zones of an image, as blkzone does
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Report {
    #[command(flatten)]
    pub image: ImageArgs,

    /// Begin with the zone that holds this byte of the device
    #[arg(short, long, value_name = "OFFSET", value_parser = args::bytes, default_value = "0")]
    pub offset: u64,

    /// Report at most so many zones [default: all]
    #[arg(short, long, value_name = "N", value_parser = args::count)]
    pub count: Option<u32>,

    /// Report only zones in this condition
    #[arg(long, value_name = "CONDITION")]
    pub filter: Option<ConditionArg>,

    /// Look even while another process writes the image; what is shown may be a moment old
    #[arg(short = 'U', long)]
    pub force_share: bool,

    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

/// A condition by its name or by blkzone's two letters.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ConditionArg {
    /// Conventional zones, which have no write pointer
    #[value(name = "not-write-pointer", alias = "nw", alias = "conventional")]
    NotWritePointer,
    /// Nothing is written
    #[value(alias = "em")]
    Empty,
    /// Opened by a write
    #[value(
        name = "implicitly-open",
        alias = "oi",
        alias = "implicit-open",
        alias = "imp-open"
    )]
    ImplicitlyOpen,
    /// Opened by command
    #[value(
        name = "explicitly-open",
        alias = "oe",
        alias = "explicit-open",
        alias = "exp-open"
    )]
    ExplicitlyOpen,
    /// Partly written, not open
    #[value(alias = "cl")]
    Closed,
    /// Takes no writes
    #[value(alias = "ro")]
    ReadOnly,
    /// Written to its capacity, or finished
    #[value(alias = "fu")]
    Full,
    /// Neither read nor written
    #[value(alias = "of")]
    Offline,
}

impl ConditionArg {
    fn condition(self) -> Condition {
        match self {
            ConditionArg::NotWritePointer => Condition::NotWritePointer,
            ConditionArg::Empty => Condition::Empty,
            ConditionArg::ImplicitlyOpen => Condition::ImplicitlyOpen,
            ConditionArg::ExplicitlyOpen => Condition::ExplicitlyOpen,
            ConditionArg::Closed => Condition::Closed,
            ConditionArg::ReadOnly => Condition::ReadOnly,
            ConditionArg::Full => Condition::Full,
            ConditionArg::Offline => Condition::Offline,
        }
    }
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit report disk.raw
  zbdkit report disk.raw --offset 0x20000s --count 2
  zbdkit report disk.raw --filter closed --json | jq '.zones[].wp'

Lines:
  As blkzone(8) prints them, in 512-byte sectors; wptr is relative to the
  zone's start. An --offset can be pasted from a line with an s behind it.
  Conditions: nw not write pointer, em empty, oi implicitly open, oe
  explicitly open, cl closed, ro read-only, fu full, of offline.
  Behind a zone that has any follow NVMe's attributes: zrwa (it has a random
  write area), extension, finished-by-device, finish-recommended,
  reset-recommended.

JSON:
  {zones: [{zone, start, len, capacity, wp, written_end, type, condition,
  resets, finishes, bytes_written, attributes: {finished_by_device,
  recommended, zrwa, extension}}, ...]}; recommended is \"finish\", \"reset\" or
  null; all positions are absolute bytes; wp
  is start + capacity in a full zone; written_end is where data really ends";

pub fn run(args: &Report) -> anyhow::Result<()> {
    let graph = args.image.graph()?;
    let session = Session::new()?;
    let device = session.open(&graph, &looking(args.force_share))?;
    zones_of(&device)?;
    let size = device.limits().size;
    anyhow::ensure!(
        args.offset < size,
        "--offset {} is past the end of the device ({size} bytes)",
        args.offset
    );
    let mut printer = Printer {
        out: Out::new(),
        json: args.json,
        left: args.count.unwrap_or(u32::MAX),
        first: true,
        result: Ok(()),
    };
    let filter = args
        .filter
        .map_or(Filter::All, |filter| Filter::Only(filter.condition()));
    if args.json {
        printer.out.text("{\"zones\": [")?;
    }
    if printer.left > 0 {
        let mut sink = |zone: ZoneInfo| printer.zone(&zone);
        session.run(device.report_to(args.offset, filter, &mut sink))?;
    }
    printer.result?;
    if args.json {
        printer.out.line("\n]}")?;
    }
    printer.out.flush()
}

/// Prints zone by zone, so that a million of them take no memory.
struct Printer {
    out: Out,
    json: bool,
    left: u32,
    first: bool,
    result: anyhow::Result<()>,
}

impl Printer {
    fn zone(&mut self, zone: &ZoneInfo) -> ControlFlow<()> {
        self.result = self.print(zone);
        self.first = false;
        self.left -= 1;
        if self.result.is_err() || self.left == 0 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    fn print(&mut self, zone: &ZoneInfo) -> anyhow::Result<()> {
        if !self.json {
            return self.out.line(blkzone_line(zone));
        }
        let comma = if self.first { "" } else { "," };
        let zone = serde_json::to_string(&shapes::Zone::of(zone))?;
        self.out.text(format_args!("{comma}\n  {zone}"))
    }
}

/// A zone as util-linux's blkzone prints it. In a full zone Linux reports the end of the zone, not of its capacity.
fn blkzone_line(zone: &ZoneInfo) -> String {
    let wptr = match zone.condition {
        Condition::Full => zone.len,
        _ => zone.wp - zone.start,
    };
    let kind = match zone.kind {
        ZoneType::Conventional => "CONVENTIONAL",
        ZoneType::SequentialRequired => "SEQ_WRITE_REQUIRED",
        ZoneType::SequentialPreferred => "SEQ_WRITE_PREFERRED",
    };
    let condition = match zone.condition {
        Condition::NotWritePointer => "nw",
        Condition::Empty => "em",
        Condition::ImplicitlyOpen => "oi",
        Condition::ExplicitlyOpen => "oe",
        Condition::Closed => "cl",
        Condition::ReadOnly => "ro",
        Condition::Full => "fu",
        Condition::Offline => "of",
    };
    format!(
        "  start: {:#011x}, len {:#08x}, cap {:#08x}, wptr {:#08x} reset:0 non-seq:0, zcond:{:2}({condition}) [type: {}({kind})]{}",
        zone.start / 512,
        zone.len / 512,
        zone.capacity / 512,
        wptr / 512,
        zone.condition as u8,
        zone.kind as u8,
        attributes(zone.attributes),
    )
}

/// What blkzone does not know; nothing where the zone has none of it.
fn attributes(attributes: Attributes) -> String {
    let Attributes {
        finished_by_device,
        recommended,
        zrwa,
        extension,
    } = attributes;
    let names: Vec<&str> = [
        (zrwa, "zrwa"),
        (extension, "extension"),
        (finished_by_device, "finished-by-device"),
        (recommended == Some(Recommendation::Finish), "finish-recommended"),
        (recommended == Some(Recommendation::Reset), "reset-recommended"),
    ]
    .into_iter()
    .filter_map(|(has, name)| has.then_some(name))
    .collect();
    match names.is_empty() {
        true => String::new(),
        false => format!(" [attributes: {}]", names.join(" ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_named_where_there_are_any() {
        assert_eq!(attributes(Attributes::default()), "");
        let some = Attributes {
            finished_by_device: true,
            recommended: Some(Recommendation::Reset),
            zrwa: false,
            extension: true,
        };
        assert_eq!(
            attributes(some),
            " [attributes: extension finished-by-device reset-recommended]"
        );
        let others = Attributes {
            recommended: Some(Recommendation::Finish),
            zrwa: true,
            ..Attributes::default()
        };
        assert_eq!(attributes(others), " [attributes: zrwa finish-recommended]");
    }
}
