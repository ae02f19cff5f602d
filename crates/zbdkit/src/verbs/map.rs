//! `zbdkit map`: what an image consists of, and where it lies.

use clap::{Args, ValueEnum};
use serde::Serialize;
use zbdkit_block::{Device, MapExtent};

use crate::args;
use crate::image::{ImageArgs, Session, looking};
use crate::output::Out;

/// Show what an image consists of: data, zeros, and where in which file they lie
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Map {
    #[command(flatten)]
    pub image: ImageArgs,

    /// Format of the image: raw or qcow2 [default: what it looks like]
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,

    /// Begin at this byte of the device
    #[arg(short, long, value_name = "OFFSET", value_parser = args::bytes, default_value = "0")]
    pub start_offset: u64,

    /// Show at most so many bytes of the device [default: to its end]
    #[arg(short = 'l', long, value_name = "LENGTH", value_parser = args::bytes)]
    pub max_length: Option<u64>,

    /// A table of what has data, or everything as JSON
    #[arg(long, value_name = "FORMAT", default_value = "human")]
    pub output: Output,

    /// The same as --output json
    #[arg(long)]
    pub json: bool,

    /// Look even while another process writes the image; what is shown may be a moment old
    #[arg(short = 'U', long)]
    pub force_share: bool,
}

/// The form of what is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A table
    Human,
    /// A list of objects
    Json,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit map disk.qcow2
  zbdkit map disk.qcow2 --json | jq 'map(select(.data).length) | add'
  zbdkit map overlay.qcow2 --start-offset 64M --max-length 64M --json

The table is qemu-img's: each line is a range with data, the place of its bytes, and the file that they lie in, which may be \
a backing image. Zeros are left out. Data that does not lie in a file as it is (compressed) ends the table with an error; \
JSON shows it.

Zones:
  What lies above a zone's written end is zeros to everybody, and is shown as
  zeros, whatever the file holds there.

JSON:
  [{start, length, depth, present, zero, data, compressed, offset}, ...], as
  qemu-img prints it. All numbers are bytes; depth counts the images of the
  chain, 0 for this one; offset is left out where there is no such place";

/// An entry, as qemu-img prints it.
#[derive(Debug, Serialize)]
struct Entry {
    start: u64,
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

pub fn run(args: &Map) -> anyhow::Result<()> {
    let graph = args.image.graph_as(args.format.as_deref())?;
    let session = Session::new()?;
    let mut printer = Printer {
        out: Out::new(),
        json: args.json || args.output == Output::Json,
        first: true,
    };
    printer.begin()?;
    let result = session.with(&graph, &looking(args.force_share), async |device| {
        let size = device.limits().size;
        let end = match args.max_length {
            Some(length) => args.start_offset.saturating_add(length).min(size),
            None => size,
        };
        each_run(device, args.start_offset, end, &mut printer).await
    });
    if result.is_ok() {
        printer.end()?;
    }
    // What was found before an error is printed too.
    printer.out.flush()?;
    result
}

/// Prints the extents of a range, those that are alike and follow each other as one.
async fn each_run(device: &Device, start: u64, end: u64, printer: &mut Printer) -> anyhow::Result<()> {
    let mut run: Option<(u64, MapExtent)> = None;
    let mut at = start;
    while at < end {
        let extent = device.map(at, end - at).await?;
        let (start, len) = (at, extent.len);
        at += len;
        match &mut run {
            Some((_, run)) if continues(run, &extent) => run.len += len,
            _ => {
                if let Some((start, run)) = run.replace((start, extent)) {
                    printer.run(start, &run)?;
                }
            }
        }
    }
    match run {
        Some((start, run)) => printer.run(start, &run),
        None => printer.nothing(start),
    }
}

fn continues(run: &MapExtent, next: &MapExtent) -> bool {
    let kind = |extent: &MapExtent| {
        (
            extent.depth,
            extent.present,
            extent.zero,
            extent.data,
            extent.compressed,
        )
    };
    let follows = match (run.offset, next.offset) {
        (Some(run_offset), Some(next_offset)) => {
            run_offset.checked_add(run.len) == Some(next_offset) && run.filename == next.filename
        }
        (None, None) => true,
        _ => false,
    };
    kind(run) == kind(next) && follows
}

struct Printer {
    out: Out,
    json: bool,
    first: bool,
}

impl Printer {
    fn begin(&mut self) -> anyhow::Result<()> {
        if self.json {
            self.out.text("[")
        } else {
            self.line("Offset", "Length", "Mapped to", "File")
        }
    }

    fn end(&mut self) -> anyhow::Result<()> {
        if self.json { self.out.line("]") } else { Ok(()) }
    }

    fn run(&mut self, start: u64, extent: &MapExtent) -> anyhow::Result<()> {
        if self.json {
            return self.entry(&Entry {
                start,
                length: extent.len,
                depth: extent.depth,
                present: extent.present,
                zero: extent.zero,
                data: extent.data,
                compressed: extent.compressed,
                offset: extent.offset,
            });
        }
        if !extent.data || extent.zero {
            return Ok(());
        }
        let Some(offset) = extent.offset else {
            anyhow::bail!(
                "File contains external, encrypted or compressed clusters: at {start:#x} there are bytes that do not lie \
                 in a file as they are; --json shows them"
            )
        };
        let name = extent.filename.as_deref().unwrap_or("(memory)");
        self.line(hex(start), hex(extent.len), hex(offset), name)
    }

    /// An empty range.
    fn nothing(&mut self, start: u64) -> anyhow::Result<()> {
        if !self.json {
            return Ok(());
        }
        self.entry(&Entry {
            start,
            length: 0,
            depth: 0,
            present: false,
            zero: false,
            data: false,
            compressed: false,
            offset: None,
        })
    }

    fn entry(&mut self, entry: &Entry) -> anyhow::Result<()> {
        let comma = if self.first { "" } else { ",\n" };
        self.first = false;
        self.out.text(format_args!("{comma}{}", spaced(entry)?))
    }

    fn line(
        &mut self,
        offset: impl std::fmt::Display,
        length: impl std::fmt::Display,
        mapped: impl std::fmt::Display,
        file: &str,
    ) -> anyhow::Result<()> {
        self.out
            .line(format_args!("{offset:<16}{length:<16}{mapped:<16}{file}"))
    }
}

/// As C's `%#x`.
fn hex(number: u64) -> String {
    match number {
        0 => "0".to_owned(),
        number => format!("{number:#x}"),
    }
}

/// One line of JSON with qemu-img's spaces.
fn spaced(entry: &Entry) -> anyhow::Result<String> {
    let compact = serde_json::to_string(entry)?;
    let inner = compact.trim_start_matches('{').trim_end_matches('}');
    // Only numbers and booleans, so that no text can hold these characters.
    Ok(format!("{{ {}}}", inner.replace(':', ": ").replace(',', ", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_where_their_places_follow() {
        let extent = |len, offset| MapExtent {
            offset,
            ..MapExtent::unknown(len)
        };
        assert!(continues(&extent(10, Some(100)), &extent(5, Some(110))));
        assert!(!continues(&extent(10, Some(100)), &extent(5, Some(111))));
        assert!(!continues(&extent(10, Some(100)), &extent(5, None)));
        assert!(continues(&extent(10, None), &extent(5, None)));
        assert!(!continues(&extent(10, None), &MapExtent::zeros(5)));
    }

    #[test]
    fn json_has_qemus_spaces() {
        let entry = Entry {
            start: 0,
            length: 65536,
            depth: 1,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            offset: Some(327_680),
        };
        assert_eq!(
            spaced(&entry).unwrap(),
            "{ \"start\": 0, \"length\": 65536, \"depth\": 1, \"present\": true, \"zero\": false, \"data\": true, \
             \"compressed\": false, \"offset\": 327680}"
        );
    }
}
