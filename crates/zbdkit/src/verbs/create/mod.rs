//! `zbdkit create`: makes an image, most often of empty zones.

pub mod options;
pub mod qcow2;

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use zbdkit_block::{CreateError, CreateOptions, Created, Qcow2CreateOptions, default_sidecar, format_size};
use zbdkit_zone::{Geometry, GeometryError, GeometrySpec};

use crate::args;
use crate::image::{Session, shell_quoted};
use crate::output::{Out, Usage, complain};
use crate::shapes;
use options::{Asked, Format, Value};
use qcow2::Zones;

/// Make an image: a zoned device of empty zones, or a plain qcow2 disk
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Create {
    /// The file to make: NAME.qcow2 holds data and zones; of any other name the zone table is made beside it, as
    /// PATH.zones
    #[arg(required_unless_present = "options")]
    pub path: Option<PathBuf>,

    /// Size of the device in bytes, as qemu-img takes it; the same as --size
    #[arg(value_name = "SIZE", value_parser = args::bytes)]
    pub positional_size: Option<u64>,

    /// Size of the device in bytes [default with -b: the backing image's]
    #[arg(long, value_name = "BYTES", value_parser = args::bytes)]
    pub size: Option<u64>,

    /// Zone size in bytes, a multiple of the block size; a power of two if Linux is to use the device, and in qcow2
    /// [default: 256M]
    #[arg(long, value_name = "BYTES", value_parser = args::bytes)]
    pub zone_size: Option<u64>,

    /// Writable bytes of each zone, at most the zone size [default: the zone size]
    #[arg(long, value_name = "BYTES", value_parser = args::bytes)]
    pub zone_capacity: Option<u64>,

    /// Make the first N zones conventional: written anywhere, without a write pointer [default: 0]
    #[arg(long, value_name = "N", value_parser = args::count)]
    pub conventional: Option<u32>,

    /// At most N zones are open at a time, 0 for no limit [default: the active limit]
    #[arg(long, value_name = "N", value_parser = args::count)]
    pub max_open: Option<u32>,

    /// At most N zones are open or closed, that is, partly written; 0 for no limit [default: 0]
    #[arg(long, value_name = "N", value_parser = args::count)]
    pub max_active: Option<u32>,

    /// Largest zone append in bytes, 0 for none [default: 1M, or the zone capacity if that is less]
    #[arg(long, value_name = "BYTES", value_parser = args::bytes)]
    pub max_append: Option<u64>,

    /// Size of a zone random write area (NVMe ZRWA) in bytes, a multiple of the granularity, 0 for none [default: 0]
    #[arg(long, value_name = "BYTES", value_parser = args::bytes)]
    pub zrwa_size: Option<u64>,

    /// The write pointer of a zone with such an area moves by multiples of BYTES [default: the block size]
    #[arg(long, value_name = "BYTES", value_parser = args::bytes)]
    pub zrwa_granularity: Option<u64>,

    /// At most N zones have such an area at a time, 0 for no limit [default: 0]
    #[arg(long, value_name = "N", value_parser = args::count)]
    pub max_zrwa: Option<u32>,

    /// Size of a zone descriptor extension (NVMe) in bytes, a multiple of 64 up to 16320, 0 for none [default: 0]
    #[arg(long, value_name = "BYTES", value_parser = args::bytes)]
    pub extension_size: Option<u64>,

    /// Logical block size in bytes, 512 to 65536 [default: 4096]
    #[arg(long, visible_alias = "logical-block-size", value_name = "BYTES", value_parser = args::bytes)]
    pub block_size: Option<u64>,

    /// How sequential zones may be written, or none for a disk without zones (qcow2) [default: host-managed]
    #[arg(long, value_name = "MODEL")]
    pub model: Option<ModelArg>,

    /// Where the zone table goes, of a raw image [default: PATH.zones]
    #[arg(long, value_name = "FILE")]
    pub sidecar: Option<PathBuf>,

    /// Replace an image that is there (not one that is in use)
    #[arg(long)]
    pub force: bool,

    /// Format of the image: raw or qcow2 [default: qcow2 where PATH ends in .qcow2, else raw]
    #[arg(short, long, value_name = "FORMAT")]
    pub format: Option<String>,

    /// Options by QEMU's names: size=, cluster_size=, zone.size=, ...; several with commas ('-o help' lists them)
    #[arg(short = 'o', long = "options", value_name = "OPTIONS")]
    pub options: Vec<String>,

    /// Make an overlay: where it has nothing of its own, this image shows, whose zones it starts with (qcow2)
    #[arg(short, long, value_name = "IMAGE")]
    pub backing: Option<String>,

    /// Format of the backing image: qcow2 or raw; qemu-img's -B is the same
    #[arg(short = 'F', long, value_name = "FORMAT", visible_short_alias = 'B')]
    pub backing_format: Option<String>,

    /// Do not look at the backing image: its name is only noted, SIZE must be given
    #[arg(short = 'u', long)]
    pub backing_unsafe: bool,

    /// Print nothing
    #[arg(short, long)]
    pub quiet: bool,

    /// Print what was made as JSON
    #[arg(long, conflicts_with = "quiet")]
    pub json: bool,
}

/// How sequential zones may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ModelArg {
    /// Only at the write pointer
    HostManaged,
    /// Best, but not only, at the write pointer
    HostAware,
    /// There are no zones
    None,
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit create disk.qcow2 --size 768M --zone-size 64M --max-open 6 --max-active 8
  zbdkit create -f qcow2 -o size=768M,zone.mode=host-managed,zone.size=64M zbc.qcow2
  zbdkit create -b disk.qcow2 -F qcow2 overlay.qcow2
  zbdkit create -f qcow2 plain.qcow2 20G
  zbdkit create smr.raw 8T --zone-size 256M --conventional 64 --model host-aware
  zbdkit create zns.raw 64G --zone-size 128M --zone-capacity 96M --block-size 4k
  zbdkit create zns.raw 64G --zone-size 128M --max-active 14 --zrwa-size 1M --max-zrwa 8

The file takes the space of what is written. Sizes are bytes with a suffix k, M, G, T (powers of 1024).

Zones or not:
  A raw image has zones always, those of the options and else the defaults.
  A qcow2 image has zones
    - where an option says anything of zones: --zone-size, --block-size,
      -o zone.mode=host-managed, ...;
    - where only the name PATH.qcow2 chose the format;
    - over a backing image that has zones: the overlay begins with them.
  It has none, as qemu-img's, where -f qcow2 is said without any option for
  zones, and with --model none or -o zone.mode=none.
  Limits that exceed the number of zones are cut with a warning in qcow2.

JSON:
  {image, format, sidecar, uuid, size, block_size, zoned: {model, zone_size,
  zone_capacity, nr_zones, nr_conventional, max_open, max_active,
  max_append, zrwa: {size, granularity, max, explicit_commit},
  extension_size}}; sizes in bytes, a limit of 0 is no limit; null: zoned and
  uuid without zones, sidecar and block_size where the format has none, zrwa
  without random write areas";

pub fn run(args: Create) -> anyhow::Result<()> {
    let mut out = Out::new();
    if options::asks_for_help(&args.options) {
        let path = args.path.as_deref().unwrap_or(Path::new(""));
        options::print_help(&mut out, Format::of(args.format.as_deref(), path)?)?;
        return out.flush();
    }
    let Some(path) = &args.path else {
        return Err(Usage("which file is to be made? Say PATH, as in disk.qcow2".into()).into());
    };
    let format = Format::of(args.format.as_deref(), path)?;
    let asked = asked(&args, format)?;
    match format {
        Format::Raw => raw(&mut out, path, &args, &asked)?,
        Format::Qcow2 => qcow2_image(&mut out, path, &args, &asked)?,
    }
    out.flush()
}

/// What `-o` and the flags say, in one place.
fn asked(args: &Create, format: Format) -> anyhow::Result<Asked> {
    if format == Format::Raw && args.backing.is_some() {
        return Err(Usage("a raw image has no backing image: say -f qcow2".into()).into());
    }
    if format == Format::Qcow2 && args.sidecar.is_some() {
        return Err(Usage("a qcow2 image holds its zone table itself: leave out --sidecar".into()).into());
    }
    let mut asked = Asked::read(format, &args.options)?;
    let number = |bytes: Option<u64>| bytes.map(Value::Number);
    let count = |count: Option<u32>| number(count.map(u64::from));
    for size in [args.positional_size, args.size] {
        asked.flag("SIZE or --size", "size", number(size))?;
    }
    asked.flag("--zone-size", "zone.size", number(args.zone_size))?;
    asked.flag("--zone-capacity", "zone.capacity", number(args.zone_capacity))?;
    asked.flag(
        "--conventional",
        "zone.conventional_zones",
        count(args.conventional),
    )?;
    asked.flag("--max-open", "zone.max_open_zones", count(args.max_open))?;
    asked.flag("--max-active", "zone.max_active_zones", count(args.max_active))?;
    asked.flag("--max-append", "zone.max_append_bytes", number(args.max_append))?;
    asked.flag("--zrwa-size", "zone.zrwa_size", number(args.zrwa_size))?;
    asked.flag(
        "--zrwa-granularity",
        "zone.zrwa_granularity",
        number(args.zrwa_granularity),
    )?;
    asked.flag("--max-zrwa", "zone.max_zrwa", count(args.max_zrwa))?;
    asked.flag(
        "--extension-size",
        "zone.descr_ext_size",
        number(args.extension_size),
    )?;
    asked.flag("--block-size", "block_size", number(args.block_size))?;
    let model = args.model.map(|model| Value::Text(model.name().to_owned()));
    asked.flag("--model", "zone.mode", model)?;
    asked.override_with("backing_file", args.backing.clone());
    asked.override_with("backing_fmt", args.backing_format.clone());
    Ok(asked)
}

impl ModelArg {
    fn name(self) -> &'static str {
        match self {
            ModelArg::HostManaged => "host-managed",
            ModelArg::HostAware => "host-aware",
            ModelArg::None => "none",
        }
    }
}

fn no_size() -> anyhow::Error {
    Usage("how large is the device to be? Say --size, as in --size 768M".into()).into()
}

fn raw(out: &mut Out, path: &Path, args: &Create, asked: &Asked) -> anyhow::Result<()> {
    let size = asked.number("size").ok_or_else(no_size)?;
    let named = args.sidecar.clone();
    let sidecar = named.or_else(|| asked.text("sidecar").map(PathBuf::from));
    let options = CreateOptions {
        sidecar,
        force: args.force,
        ..qcow2::zone_options(asked, path, size, false)?
    };
    let session = Session::new()?;
    let made = session
        .run(zbdkit_block::create(session.host(), &options))
        .map_err(|error| explained(error, asked))?;
    let spec = made.geometry.spec();
    if args.json {
        out.json(&shapes::Created {
            image: path.to_owned(),
            format: "raw",
            sidecar: Some(made.sidecar),
            uuid: Some(made.uuid.to_string()),
            size: spec.size,
            block_size: Some(spec.block_size),
            zoned: Some(shapes::Zoned::of(&made.geometry)),
        })
    } else if !args.quiet {
        out.line(raw_formatting(path, spec))?;
        out.line(raw_hint(path, &made))
    } else {
        Ok(())
    }
}

/// Puts words around an error that the user's options explain.
fn explained(error: CreateError, asked: &Asked) -> anyhow::Error {
    match error {
        CreateError::Geometry(error) if asked.number("zone.size").is_none() && blames_zone_size(&error) => {
            anyhow::Error::new(error).context("the default zone size does not fit, say --zone-size")
        }
        CreateError::Geometry(error) => anyhow::Error::new(error).context("these zones do not work"),
        error => error.into(),
    }
}

fn qcow2_image(out: &mut Out, path: &Path, args: &Create, asked: &Asked) -> anyhow::Result<()> {
    let mut layout = qcow2::layout(asked)?;
    let size = asked.number("size").map(|_| layout.size);
    if size.is_none() && (layout.backing.is_none() || args.backing_unsafe) {
        return Err(no_size());
    }
    let zones = match qcow2::zones(asked, args.format.is_some())? {
        Zones::None | Zones::Inherited => None,
        Zones::Described => Some(qcow2::zone_options(asked, path, layout.size, true)?),
    };
    let options = Qcow2CreateOptions {
        path: path.to_owned(),
        layout: layout.clone(),
        size,
        zones,
        unsafe_backing: args.backing_unsafe,
        force: args.force,
    };
    let session = Session::new()?;
    let made = session
        .run(zbdkit_block::create_qcow2(session.host(), &options))
        .map_err(|error| explained(error, asked))?;
    for notice in &made.notices {
        complain(format_args!("warning: {notice}"));
    }
    if args.json {
        return out.json(&shapes::Created {
            image: path.to_owned(),
            format: "qcow2",
            sidecar: None,
            uuid: made.uuid.map(|uuid| uuid.to_string()),
            size: made.size,
            block_size: made.geometry.map(|geometry| geometry.block_size()),
            zoned: made.geometry.as_ref().map(shapes::Zoned::of),
        });
    }
    if args.quiet {
        return Ok(());
    }
    layout.size = made.size;
    let spec = made.geometry.as_ref().map(Geometry::spec);
    out.line(qcow2::formatting(path, asked, &layout, spec))?;
    match &made.geometry {
        // Who says -f qcow2 is used to qemu-img, which prints nothing more.
        Some(geometry) if args.format.is_none() => out.line(hint(geometry, "the image", &shell_quoted(path))),
        _ => Ok(()),
    }
}

/// Whether another zone size would do.
fn blames_zone_size(error: &GeometryError) -> bool {
    matches!(
        error,
        GeometryError::ZoneSizeTooBig { .. }
            | GeometryError::TooManyZones { .. }
            | GeometryError::CapacityTooBig { .. }
            | GeometryError::TooManyConventional { .. }
    )
}

/// The line that qemu-img's users know, with the options that describe the image in full.
fn raw_formatting(path: &Path, spec: &GeometrySpec) -> String {
    let zns = zns_options(spec);
    format!(
        "Formatting '{}', fmt=raw zone.mode={} zone.size={} zone.capacity={} zone.conventional_zones={} \
         zone.max_active_zones={} zone.max_open_zones={} zone.max_append_bytes={}{zns} block_size={} size={}",
        path.display(),
        shapes::model_name(spec.model),
        spec.zone_size,
        spec.zone_capacity,
        spec.nr_conventional,
        spec.max_active,
        spec.max_open,
        spec.max_append,
        spec.block_size,
        spec.size
    )
}

/// What only NVMe devices have, as options with a space before each; nothing where there is none of it.
fn zns_options(spec: &GeometrySpec) -> String {
    let zrwa = spec.zns.zrwa.map_or(String::new(), |zrwa| {
        format!(
            " zone.zrwa_size={} zone.zrwa_granularity={} zone.max_zrwa={}",
            zrwa.size, zrwa.granularity, zrwa.count
        )
    });
    match spec.zns.extension_size {
        0 => zrwa,
        bytes => format!("{zrwa} zone.descr_ext_size={bytes}"),
    }
}

fn raw_hint(path: &Path, made: &Created) -> String {
    let image = if made.sidecar == default_sidecar(path) {
        shell_quoted(path)
    } else {
        let doubled = |path: &Path| path.to_string_lossy().replace(',', ",,");
        let graph = format!(
            "driver=zoned,file.driver=file,file.filename={},sidecar={}",
            doubled(path),
            doubled(&made.sidecar)
        );
        shell_quoted(Path::new(&graph))
    };
    hint(&made.geometry, &made.sidecar.display().to_string(), &image)
}

/// What was made and what comes next; `image` can be pasted into a shell.
fn hint(geometry: &Geometry, table: &str, image: &str) -> String {
    format!(
        "{} zones of {}, zone table in {table}. Next: zbdkit serve {image} --vhost-user-blk /tmp/zbd.sock",
        geometry.nr_zones(),
        format_size(geometry.zone_size()),
    )
}
