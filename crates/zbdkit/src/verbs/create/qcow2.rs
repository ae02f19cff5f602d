//! What `create` makes of its options for a qcow2 image: the layout, whether there are zones and which, and the line
//! that qemu-img's users know.

use std::path::Path;

use zbdkit_block::{CreateOptions, DEFAULT_BLOCK_SIZE, DEFAULT_ZONE_SIZE, ZnsOptions};
use zbdkit_qcow2::{Compression, Layout, Preallocation};
use zbdkit_zone::{GeometrySpec, Model};

use super::options::{Asked, on_off};
use crate::args;
use crate::output::{Usage, complain};
use crate::shapes;

/// The zones of a new qcow2 image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zones {
    /// None: a plain disk.
    None,
    /// As the options say, defaults for the rest.
    Described,
    /// Those of the backing image, if it has any.
    Inherited,
}

/// Decides. Explicit options win; else `-f qcow2` alone means what it means to qemu-img, and a format that only the
/// name chose is zbdkit's own way of asking for a zoned device.
pub fn zones(asked: &Asked, format_was_said: bool) -> anyhow::Result<Zones> {
    let backing = asked.text("backing_file").is_some();
    match (asked.text("zone.mode"), asked.zone_option()) {
        (_, Some(option)) if backing => Err(Usage(format!(
            "an image over a backing image has the zones of that, or none: leave out {option}"
        ))
        .into()),
        (Some("none"), _) if asked.describes_zones_besides_mode() => Err(Usage(
            "zone.mode=none makes a disk without zones, but other options describe zones: leave out the one or the others"
                .into(),
        )
        .into()),
        (Some("none"), _) => Ok(Zones::None),
        (_, Some(_)) => Ok(Zones::Described),
        (_, None) if backing => Ok(Zones::Inherited),
        (_, None) if format_was_said => Ok(Zones::None),
        (_, None) => Ok(Zones::Described),
    }
}

/// The layout that the options describe. Its size is 0 where the backing image's is meant.
pub fn layout(asked: &Asked) -> anyhow::Result<Layout> {
    let wrong = |name: &str, wanted: &str| {
        let given = asked.shown(name).unwrap_or_default();
        anyhow::Error::new(Usage(format!("-o {name}={given}: {wanted}")))
    };
    // The words are among those that their options take.
    let version = match asked.text("compat") {
        Some("0.10" | "v2") => 2,
        _ => 3,
    };
    let compression = match asked.text("compression_type") {
        Some("zstd") => Compression::Zstd,
        _ => Compression::Zlib,
    };
    let preallocation = match asked.text("preallocation") {
        None => Preallocation::Off,
        Some(text) => args::preallocation(text).map_err(|expected| wrong("preallocation", &expected))?,
    };
    let backing_format = asked.text("backing_fmt").map(str::to_owned);
    let backing = match (asked.text("backing_file"), backing_format) {
        (Some(name), Some(format)) => Some((name.to_owned(), Some(format))),
        (Some(name), None) => {
            return Err(Usage(format!(
                "which format has the backing image {name}? Say -F qcow2 or -F raw; it is not guessed, because a guest \
                 could make a raw image look like another format"
            ))
            .into());
        }
        (None, Some(_)) => {
            return Err(Usage("backing_fmt is given, but no backing_file: add -b IMAGE".into()).into());
        }
        (None, None) => None,
    };
    Ok(Layout {
        version,
        // As qemu-img, a device has whole sectors.
        size: match asked.number("size") {
            None => 0,
            Some(size) => size
                .checked_next_multiple_of(512)
                .ok_or_else(|| wrong("size", "too large"))?,
        },
        cluster_size: asked.number("cluster_size").unwrap_or(64 << 10),
        refcount_bits: asked.count("refcount_bits").unwrap_or(16),
        extended_l2: asked.switch("extended_l2").unwrap_or(false),
        compression,
        lazy_refcounts: asked.switch("lazy_refcounts").unwrap_or(false),
        backing,
        data_file: asked.text("data_file").map(str::to_owned),
        data_file_raw: asked.switch("data_file_raw").unwrap_or(false),
        preallocation,
    })
}

/// The zones that the options describe. For a qcow2 image, limits that cannot be met are cut with a warning, as QEMU
/// does.
pub fn zone_options(asked: &Asked, path: &Path, size: u64, clamp: bool) -> anyhow::Result<CreateOptions> {
    let model = match asked.text("zone.mode") {
        Some("host-aware") => Model::HostAware,
        Some("none") => {
            return Err(Usage(
                "a raw image of ours has zones: leave out zone.mode=none, or say -f qcow2".into(),
            )
            .into());
        }
        _ => Model::HostManaged,
    };
    let block_size = asked.number("block_size").unwrap_or(DEFAULT_BLOCK_SIZE.into());
    let mut options = CreateOptions {
        model,
        zone_size: Some(asked.number("zone.size").unwrap_or(DEFAULT_ZONE_SIZE)),
        zone_capacity: asked.number("zone.capacity"),
        conventional_zones: asked.count("zone.conventional_zones").unwrap_or(0),
        max_open: asked.count("zone.max_open_zones"),
        max_active: asked.count("zone.max_active_zones").unwrap_or(0),
        max_append: asked.number("zone.max_append_bytes"),
        block_size: u32::try_from(block_size).unwrap_or(u32::MAX),
        zns: ZnsOptions {
            zrwa_size: asked.number("zone.zrwa_size"),
            zrwa_granularity: asked.number("zone.zrwa_granularity"),
            max_zrwa: asked.count("zone.max_zrwa"),
            extension_size: asked.count("zone.descr_ext_size").unwrap_or(0),
        },
        ..CreateOptions::new(path, size)
    };
    if clamp {
        for warning in clamp_limits(&mut options) {
            complain(format_args!("warning: {warning}"));
        }
    }
    Ok(options)
}

/// Cuts the limits to what the zones allow, and says what was cut in QEMU's words.
fn clamp_limits(options: &mut CreateOptions) -> Vec<String> {
    let mut warnings = Vec::new();
    let zone_size = options.zone_size.unwrap_or(DEFAULT_ZONE_SIZE);
    if zone_size == 0 {
        // Refused soon.
        return warnings;
    }
    let nr_zones = u32::try_from(options.size.div_ceil(zone_size)).unwrap_or(u32::MAX);
    let sequential = nr_zones.saturating_sub(options.conventional_zones);
    if options.max_active > nr_zones {
        warnings.push(format!(
            "max_active_zones {} exceeds nr_zones {nr_zones}, clamping to nr_zones",
            options.max_active
        ));
        options.max_active = nr_zones;
    }
    if let Some(open) = options.max_open.as_mut().filter(|open| **open > sequential) {
        warnings.push(format!(
            "max_open_zones {open} exceeds the number of SWR zones, clamping to {sequential}"
        ));
        *open = sequential;
    }
    let active = options.max_active;
    if let Some(open) = options
        .max_open
        .as_mut()
        .filter(|open| active > 0 && **open > active)
    {
        warnings.push(format!(
            "max_open_zones {open} exceeds max_active_zones {active}, clamping to max_active_zones"
        ));
        *open = active;
    }
    warnings
}

/// The options of what only NVMe devices have, in the order of the line.
const ZNS: [&str; 4] = [
    "zone.zrwa_size",
    "zone.zrwa_granularity",
    "zone.max_zrwa",
    "zone.descr_ext_size",
];

/// qemu-img's line. Options that have a default are always there, the others where they were asked for; sizes are
/// bytes.
pub fn formatting(path: &Path, asked: &Asked, layout: &Layout, zones: Option<&GeometrySpec>) -> String {
    let mut line = format!(
        "Formatting '{}', fmt=qcow2 cluster_size={} extended_l2={}",
        path.display(),
        layout.cluster_size,
        on_off(layout.extended_l2)
    );
    let mut put = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            line.push_str(&format!(" {name}={value}"));
        }
    };
    let compression = match layout.compression {
        Compression::Zlib => "zlib",
        Compression::Zstd => "zstd",
    };
    put("preallocation", asked.shown("preallocation"));
    put("compression_type", Some(compression.to_owned()));
    if let Some(zones) = zones {
        // As asked: a limit that all zones together cannot reach is none, and would be shown as 0.
        let number = |name: &str, value: u64| Some(asked.number(name).unwrap_or(value).to_string());
        put("zone.mode", Some(shapes::model_name(zones.model).to_owned()));
        put("zone.size", number("zone.size", zones.zone_size));
        put("zone.capacity", number("zone.capacity", zones.zone_capacity));
        put(
            "zone.conventional_zones",
            number("zone.conventional_zones", zones.nr_conventional.into()),
        );
        put("zone.max_append_bytes", asked.shown("zone.max_append_bytes"));
        put(
            "zone.max_active_zones",
            number("zone.max_active_zones", zones.max_active.into()),
        );
        put(
            "zone.max_open_zones",
            number("zone.max_open_zones", zones.max_open.into()),
        );
        for name in ZNS {
            put(name, asked.shown(name));
        }
    }
    let size = asked.number("size").unwrap_or(layout.size);
    put("size", Some(size.to_string()));
    for name in [
        "compat",
        "backing_file",
        "backing_fmt",
        "data_file",
        "data_file_raw",
    ] {
        put(name, asked.shown(name));
    }
    put("lazy_refcounts", Some(on_off(layout.lazy_refcounts).to_owned()));
    put("refcount_bits", Some(layout.refcount_bits.to_string()));
    put("block_size", asked.shown("block_size"));
    line
}

#[cfg(test)]
mod tests {
    use super::super::options::Format;
    use super::*;

    fn asked(options: &str) -> Asked {
        Asked::read(Format::Qcow2, &[options.to_owned()]).unwrap()
    }

    /// The line for these options.
    fn line(name: &str, options: &str) -> String {
        let asked = asked(options);
        let layout = layout(&asked).unwrap();
        let zones = match zones(&asked, true).unwrap() {
            Zones::Described => Some(zone_options(&asked, Path::new(name), layout.size, true).unwrap()),
            _ => None,
        };
        let geometry = zones.map(|zones| *zones.geometry().unwrap().spec());
        formatting(Path::new(name), &asked, &layout, geometry.as_ref())
    }

    /// The lines are qemu-img 11.1's, those with zones the ones of the series that adds them.
    #[test]
    fn the_line_is_qemu_imgs() {
        for (name, options, expected) in [
            (
                "a.qcow2",
                "size=1G",
                "Formatting 'a.qcow2', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib \
                 size=1073741824 lazy_refcounts=off refcount_bits=16",
            ),
            (
                "b.qcow2",
                "cluster_size=4k,compat=0.10,size=1M",
                "Formatting 'b.qcow2', fmt=qcow2 cluster_size=4096 extended_l2=off compression_type=zlib size=1048576 \
                 compat=0.10 lazy_refcounts=off refcount_bits=16",
            ),
            (
                "x.qcow2",
                "data_file=xx.raw,data_file_raw=on,compat=1.1,backing_file=a,,b.qcow2,backing_fmt=qcow2,\
                 lazy_refcounts=on,extended_l2=on,preallocation=metadata,size=513",
                "Formatting 'x.qcow2', fmt=qcow2 cluster_size=65536 extended_l2=on preallocation=metadata \
                 compression_type=zlib size=513 compat=1.1 backing_file=a,,b.qcow2 backing_fmt=qcow2 \
                 data_file=xx.raw data_file_raw=on lazy_refcounts=on refcount_bits=16",
            ),
            (
                "zbc.qcow2",
                "size=768M,zone.size=64M,zone.capacity=64M,zone.conventional_zones=0,zone.max_open_zones=6,\
                 zone.max_active_zones=8,zone.mode=host-managed",
                "Formatting 'zbc.qcow2', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib \
                 zone.mode=host-managed zone.size=67108864 zone.capacity=67108864 zone.conventional_zones=0 \
                 zone.max_active_zones=8 zone.max_open_zones=6 size=805306368 lazy_refcounts=off refcount_bits=16",
            ),
            (
                "zbc.qcow2",
                "size=768M,zone.size=64M,zone.max_append_bytes=4096",
                "Formatting 'zbc.qcow2', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib \
                 zone.mode=host-managed zone.size=67108864 zone.capacity=67108864 zone.conventional_zones=0 \
                 zone.max_append_bytes=4096 zone.max_active_zones=0 zone.max_open_zones=0 size=805306368 \
                 lazy_refcounts=off refcount_bits=16",
            ),
        ] {
            assert_eq!(line(name, options), expected, "{options}");
        }
    }

    #[test]
    fn zones_are_there_where_somebody_asked_for_them() {
        for (options, format_was_said, expected) in [
            ("size=1G", true, Zones::None),
            ("size=1G", false, Zones::Described),
            ("size=1G,zone.size=64M", true, Zones::Described),
            ("size=1G,block_size=512", true, Zones::Described),
            ("zone.mode=host-managed", true, Zones::Described),
            ("zone.mode=none", false, Zones::None),
            ("backing_file=b", false, Zones::Inherited),
            ("backing_file=b", true, Zones::Inherited),
        ] {
            assert_eq!(
                zones(&asked(options), format_was_said).unwrap(),
                expected,
                "{options}"
            );
        }
        for (options, message) in [
            ("zone.mode=none,zone.size=64M", "leave out"),
            (
                "backing_file=b,zone.size=64M",
                "has the zones of that, or none: leave out zone.size",
            ),
        ] {
            let error = zones(&asked(options), true).unwrap_err().to_string();
            assert!(error.contains(message), "{options}: {error}");
        }
    }

    #[test]
    fn limits_are_cut_as_qemu_cuts_them() {
        let cut = |options: &str| {
            let asked = asked(options);
            let mut options = zone_options(&asked, Path::new("x"), 12 << 26, false).unwrap();
            let warnings = clamp_limits(&mut options);
            (options.max_active, options.max_open, warnings.join("; "))
        };
        let zones = "zone.size=64M,zone.conventional_zones=2";
        assert_eq!(
            cut(&format!("{zones},zone.max_active_zones=10")),
            (10, None, String::new())
        );
        assert_eq!(
            cut(&format!("{zones},zone.max_active_zones=13")),
            (
                12,
                None,
                "max_active_zones 13 exceeds nr_zones 12, clamping to nr_zones".into()
            )
        );
        assert_eq!(
            cut(&format!("{zones},zone.max_open_zones=11")),
            (
                0,
                Some(10),
                "max_open_zones 11 exceeds the number of SWR zones, clamping to 10".into()
            )
        );
        assert_eq!(
            cut(&format!("{zones},zone.max_open_zones=7,zone.max_active_zones=6")),
            (
                6,
                Some(6),
                "max_open_zones 7 exceeds max_active_zones 6, clamping to max_active_zones".into()
            )
        );
        assert_eq!(cut("zone.size=0,zone.max_open_zones=7").2, "");
    }

    #[test]
    fn wrong_layouts_are_told_with_what_is_right() {
        for (options, message) in [
            ("backing_file=b", "Say -F qcow2"),
            ("backing_fmt=raw", "add -b IMAGE"),
            ("size=18446744073709551615", "too large"),
        ] {
            let error = layout(&asked(options)).unwrap_err().to_string();
            assert!(error.contains(message), "{options}: {error}");
        }
    }
}
