//! `zbdkit create`: makes an image of empty zones.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use zbdkit_block::{
    CreateError, CreateOptions, DEFAULT_BLOCK_SIZE, DEFAULT_ZONE_SIZE, default_sidecar, did_you_mean,
    format_size,
};
use zbdkit_zone::{GeometryError, GeometrySpec, Model};

use crate::args;
use crate::image::{Session, shell_quoted};
use crate::output::{Out, Usage};
use crate::shapes;

/// Make an image of empty zones
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Create {
    /// The data file to make; the zone table is made beside it as PATH.zones
    pub path: PathBuf,

    /// Size of the device in bytes, as qemu-img takes it; the same as --size
    #[arg(value_name = "SIZE", value_parser = args::bytes)]
    pub positional_size: Option<u64>,

    /// Size of the device in bytes
    #[arg(long, value_name = "BYTES", value_parser = args::bytes)]
    pub size: Option<u64>,

    /// Zone size in bytes, a multiple of the block size; a power of two if Linux is to use the device [default: 256M]
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

    /// Logical block size in bytes, 512 to 65536 [default: 4096]
    #[arg(long, visible_alias = "logical-block-size", value_name = "BYTES", value_parser = args::bytes)]
    pub block_size: Option<u64>,

    /// How sequential zones may be written [default: host-managed]
    #[arg(long, value_name = "MODEL")]
    pub model: Option<ModelArg>,

    /// Where the zone table goes [default: PATH.zones]
    #[arg(long, value_name = "FILE")]
    pub sidecar: Option<PathBuf>,

    /// Replace an image that is there (not one that is in use)
    #[arg(long)]
    pub force: bool,

    /// Format of the data file: raw
    #[arg(short, long, value_name = "FORMAT", default_value = "raw")]
    pub format: String,

    /// The same options by QEMU's names: size=, zone.size=, ...; several with commas ('-o help' lists them)
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,

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
}

const AFTER_HELP: &str = "\
Examples:
  zbdkit create disk.raw --size 768M --zone-size 64M --max-open 6 --max-active 8
  zbdkit create -f raw -o size=768M,zone.size=64M,zone.max_open_zones=6 disk.raw
  zbdkit create smr.raw 8T --zone-size 256M --conventional 64 --model host-aware
  zbdkit create zns.raw 64G --zone-size 128M --zone-capacity 96M --block-size 4k

The file is sparse: it takes the space of what is written. Sizes are bytes with a suffix k, M, G, T (powers of 1024).

JSON:
  {image, format, sidecar, uuid, size, block_size, zoned: {model, zone_size,
  zone_capacity, nr_zones, nr_conventional, max_open, max_active,
  max_append}}; sizes in bytes, a limit of 0 is no limit";

/// The names of `-o`, and what they are.
const OPTIONS: [(&str, &str); 10] = [
    ("size", "size of the device, bytes"),
    ("zone.mode", "host-managed or host-aware"),
    ("zone.size", "zone size, bytes"),
    ("zone.capacity", "writable bytes of a zone"),
    (
        "zone.conventional_zones",
        "how many of the first zones are conventional",
    ),
    ("zone.max_open_zones", "most open zones, 0 for no limit"),
    (
        "zone.max_active_zones",
        "most open or closed zones, 0 for no limit",
    ),
    ("zone.max_append_bytes", "largest zone append, bytes, 0 for none"),
    ("block_size", "logical block size, bytes"),
    ("sidecar", "where the zone table goes"),
];

pub fn run(mut args: Create) -> anyhow::Result<()> {
    let mut out = Out::new();
    if args.options.iter().any(|text| text == "help" || text == "?") {
        for (name, what) in OPTIONS {
            out.line(format_args!("  {name:<24} - {what}"))?;
        }
        return out.flush();
    }
    check_format(&args.format)?;
    take_positional_size(&mut args)?;
    for text in std::mem::take(&mut args.options) {
        take_options(&mut args, &text)?;
    }
    let options = create_options(&args)?;
    let session = Session::new()?;
    let made = session
        .run(zbdkit_block::create(session.host(), &options))
        .map_err(|error| match error {
            CreateError::Geometry(error) if args.zone_size.is_none() && blames_zone_size(&error) => {
                anyhow::Error::new(error).context("the default zone size does not fit, say --zone-size")
            }
            CreateError::Geometry(error) => anyhow::Error::new(error).context("these zones do not work"),
            error => error.into(),
        })?;
    if args.json {
        let spec = made.geometry.spec();
        out.json(&shapes::Created {
            image: args.path,
            format: "raw",
            sidecar: made.sidecar,
            uuid: made.uuid.to_string(),
            size: spec.size,
            block_size: spec.block_size,
            zoned: shapes::Zoned::of(&made.geometry),
        })?;
    } else if !args.quiet {
        out.line(formatting(&args.path, made.geometry.spec()))?;
        out.line(hint(&args.path, &made))?;
    }
    out.flush()
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

fn check_format(format: &str) -> anyhow::Result<()> {
    match format {
        "raw" => Ok(()),
        "qcow2" => anyhow::bail!(
            "format qcow2 is not there yet; use -f raw, which keeps the zones in a table beside the file"
        ),
        other => Err(Usage(format!(
            "format {other:?} is not known{}; formats are raw",
            did_you_mean(other, &["raw"])
        ))
        .into()),
    }
}

fn take_positional_size(args: &mut Create) -> anyhow::Result<()> {
    match args.positional_size.take() {
        Some(size) => put(&mut args.size, "size", size),
        None => Ok(()),
    }
}

fn put<T>(slot: &mut Option<T>, name: &str, value: T) -> anyhow::Result<()> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(Usage(format!("{name} is given twice")).into()),
    }
}

/// Takes `key=value,key=value`; a comma in a value is written twice.
fn take_options(args: &mut Create, text: &str) -> anyhow::Result<()> {
    const COMMA: &str = "\u{0}";
    for item in text
        .replace(",,", COMMA)
        .split(',')
        .filter(|item| !item.is_empty())
    {
        let item = item.replace(COMMA, ",");
        let (key, value) = item
            .split_once('=')
            .ok_or_else(|| Usage(format!("-o {item}: write {item}=VALUE")))?;
        take_option(args, &key.replace('-', "_"), value)?;
    }
    Ok(())
}

fn take_option(args: &mut Create, key: &str, value: &str) -> anyhow::Result<()> {
    let wrong = |wanted: &str| Usage(format!("-o {key}={value}: {wanted}"));
    let bytes = || args::bytes(value).map_err(|e| wrong(&e));
    let count = || args::count(value).map_err(|e| wrong(&e));
    match key {
        "size" => put(&mut args.size, key, bytes()?),
        "zone.size" => put(&mut args.zone_size, key, bytes()?),
        "zone.capacity" => put(&mut args.zone_capacity, key, bytes()?),
        "zone.conventional_zones" => put(&mut args.conventional, key, count()?),
        "zone.max_open_zones" => put(&mut args.max_open, key, count()?),
        "zone.max_active_zones" => put(&mut args.max_active, key, count()?),
        "zone.max_append_bytes" => put(&mut args.max_append, key, bytes()?),
        "block_size" => put(&mut args.block_size, key, bytes()?),
        "sidecar" => put(&mut args.sidecar, key, value.into()),
        "zone.mode" => {
            let model =
                ModelArg::from_str(value, false).map_err(|_| wrong("modes are host-managed, host-aware"))?;
            put(&mut args.model, key, model)
        }
        unknown => {
            let names = OPTIONS.map(|(name, _)| name);
            let near = did_you_mean(unknown, &names);
            Err(Usage(format!(
                "-o {unknown} is not known{near}; options are {}",
                names.join(", ")
            ))
            .into())
        }
    }
}

fn create_options(args: &Create) -> anyhow::Result<CreateOptions> {
    let size = args
        .size
        .ok_or_else(|| Usage("how large is the device to be? Say --size, as in --size 768M".into()))?;
    let block_size = args.block_size.unwrap_or(DEFAULT_BLOCK_SIZE.into());
    let block_size = u32::try_from(block_size).unwrap_or(u32::MAX);
    Ok(CreateOptions {
        model: match args.model {
            None | Some(ModelArg::HostManaged) => Model::HostManaged,
            Some(ModelArg::HostAware) => Model::HostAware,
        },
        zone_size: Some(args.zone_size.unwrap_or(DEFAULT_ZONE_SIZE)),
        zone_capacity: args.zone_capacity,
        conventional_zones: args.conventional.unwrap_or(0),
        max_open: args.max_open,
        max_active: args.max_active.unwrap_or(0),
        max_append: args.max_append,
        block_size,
        sidecar: args.sidecar.clone(),
        force: args.force,
        ..CreateOptions::new(&args.path, size)
    })
}

/// The line that qemu-img's users know, with the options that describe the image in full.
fn formatting(path: &Path, spec: &GeometrySpec) -> String {
    format!(
        "Formatting '{}', fmt=raw zone.mode={} zone.size={} zone.capacity={} zone.conventional_zones={} \
         zone.max_active_zones={} zone.max_open_zones={} zone.max_append_bytes={} block_size={} size={}",
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

fn hint(path: &Path, made: &zbdkit_block::Created) -> String {
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
    format!(
        "{} zones of {}, zone table in {}. Next: zbdkit serve {image} --vhost-user-blk /tmp/zbd.sock",
        made.geometry.nr_zones(),
        format_size(made.geometry.zone_size()),
        made.sidecar.display(),
    )
}
