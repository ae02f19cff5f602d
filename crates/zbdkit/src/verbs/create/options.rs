//! The options of `-o` by QEMU's names, and our own flags as other spellings of the same.

use std::collections::BTreeMap;
use std::path::Path;

use zbdkit_block::did_you_mean;

use crate::args;
use crate::output::{Out, Usage};

/// The formats that `create` makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2,
}

impl Format {
    /// What was said, or what the name says.
    pub fn of(said: Option<&str>, path: &Path) -> anyhow::Result<Format> {
        match said {
            Some("raw") => Ok(Format::Raw),
            Some("qcow2") => Ok(Format::Qcow2),
            None if path.extension().is_some_and(|suffix| suffix == "qcow2") => Ok(Format::Qcow2),
            None => Ok(Format::Raw),
            Some(other) => Err(Usage(format!(
                "format {other:?} is not known{}; formats are raw, qcow2",
                did_you_mean(other, &["raw", "qcow2"])
            ))
            .into()),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// What the value of an option is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    /// One of these words.
    Word(&'static [&'static str]),
    Size,
    Count,
    Switch,
    /// QEMU has it and we do not; `off` is accepted. Why not.
    Never(&'static str),
}

/// Which formats have an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum In {
    Both,
    RawOnly,
    Qcow2Only,
}

struct Known {
    name: &'static str,
    kind: Kind,
    formats: In,
    what: &'static str,
}

const fn known(name: &'static str, kind: Kind, formats: In, what: &'static str) -> Known {
    Known {
        name,
        kind,
        formats,
        what,
    }
}

const NO_ENCRYPTION: &str =
    "zbdkit neither makes nor opens encrypted images; encrypt below (dm-crypt) or in the guest";

/// Every option, in the order of `-o help`.
const KNOWN: &[Known] = &[
    known(
        "backing_file",
        Kind::Text,
        In::Qcow2Only,
        "image that shows where this one has nothing",
    ),
    known("backing_fmt", Kind::Text, In::Qcow2Only, "format of that image"),
    known(
        "block_size",
        Kind::Size,
        In::Both,
        "logical block size of a zoned device [4096]",
    ),
    known(
        "cluster_size",
        Kind::Size,
        In::Qcow2Only,
        "unit of allocation, 512 to 2M [64k]",
    ),
    known(
        "compat",
        Kind::Word(&["0.10", "v2", "1.1", "v3"]),
        In::Qcow2Only,
        "version of the format: 0.10 (v2) or 1.1 (v3) [1.1]",
    ),
    known(
        "compression_type",
        Kind::Word(&["zlib", "zstd"]),
        In::Qcow2Only,
        "of compressed clusters: zlib or zstd [zlib]",
    ),
    known(
        "data_file",
        Kind::Text,
        In::Qcow2Only,
        "file for the data, outside the image",
    ),
    known(
        "data_file_raw",
        Kind::Switch,
        In::Qcow2Only,
        "keep that file readable as a raw image",
    ),
    known("encryption", Kind::Never(NO_ENCRYPTION), In::Qcow2Only, ""),
    known(
        "extended_l2",
        Kind::Switch,
        In::Qcow2Only,
        "allocate in 32nds of a cluster",
    ),
    known(
        "extent_size_hint",
        Kind::Never("the file system decides how it allocates"),
        In::Both,
        "",
    ),
    known(
        "keep_data_file",
        Kind::Never("the data file must be new; put an existing raw image below with -b IMAGE -F raw"),
        In::Qcow2Only,
        "",
    ),
    known(
        "lazy_refcounts",
        Kind::Switch,
        In::Qcow2Only,
        "let QEMU write reference counts late",
    ),
    known(
        "nocow",
        Kind::Never("on btrfs, 'chattr +C' on the directory does the same"),
        In::Both,
        "",
    ),
    known(
        "preallocation",
        Kind::Word(&["off", "metadata", "falloc", "full"]),
        In::Qcow2Only,
        "space at once: off, metadata, falloc or full [off]",
    ),
    known(
        "refcount_bits",
        Kind::Count,
        In::Qcow2Only,
        "width of a reference count, 1 to 64 [16]",
    ),
    known(
        "sidecar",
        Kind::Text,
        In::RawOnly,
        "where the zone table goes [PATH.zones]",
    ),
    known("size", Kind::Size, In::Both, "size of the device"),
    known(
        "zone.capacity",
        Kind::Size,
        In::Both,
        "writable bytes of a zone [zone.size]",
    ),
    known(
        "zone.conventional_zones",
        Kind::Count,
        In::Both,
        "so many of the first zones are conventional [0]",
    ),
    known(
        "zone.descr_ext_size",
        Kind::Size,
        In::Both,
        "bytes of a zone descriptor extension (NVMe), a multiple of 64, 0 for none [0]",
    ),
    known(
        "zone.max_active_zones",
        Kind::Count,
        In::Both,
        "most open or closed zones, 0 for no limit [0]",
    ),
    known(
        "zone.max_append_bytes",
        Kind::Size,
        In::Both,
        "largest zone append, 0 for none [1M]",
    ),
    known(
        "zone.max_open_zones",
        Kind::Count,
        In::Both,
        "most open zones, 0 for no limit [the active limit]",
    ),
    known(
        "zone.max_zrwa",
        Kind::Count,
        In::Both,
        "most zones with a random write area (NVMe), 0 for no limit [0]",
    ),
    known(
        "zone.mode",
        Kind::Word(&["host-managed", "host-aware", "none"]),
        In::Both,
        "host-managed, host-aware or (qcow2) none",
    ),
    known("zone.size", Kind::Size, In::Both, "zone size [256M]"),
    known(
        "zone.zrwa_granularity",
        Kind::Size,
        In::Both,
        "the pointer of a zone with a random write area moves by multiples of this [block_size]",
    ),
    known(
        "zone.zrwa_size",
        Kind::Size,
        In::Both,
        "bytes of a zone random write area (NVMe), 0 for none [0]",
    ),
];

/// The options that describe zones.
const ZONES: [&str; 12] = [
    "block_size",
    "zone.capacity",
    "zone.conventional_zones",
    "zone.descr_ext_size",
    "zone.max_active_zones",
    "zone.max_append_bytes",
    "zone.max_open_zones",
    "zone.max_zrwa",
    "zone.mode",
    "zone.size",
    "zone.zrwa_granularity",
    "zone.zrwa_size",
];

/// An option's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Text(String),
    Number(u64),
    Switch(bool),
}

/// What was asked for.
#[derive(Debug)]
pub struct Asked {
    format: Format,
    values: BTreeMap<&'static str, Value>,
}

impl Asked {
    /// Reads `-o`, several times `key=value,key=value`; a comma in a value is written twice, `key` alone means on, and
    /// of an option that is there twice the last one holds.
    pub fn read(format: Format, texts: &[String]) -> anyhow::Result<Asked> {
        let mut asked = Asked {
            format,
            values: BTreeMap::new(),
        };
        for item in texts.iter().flat_map(|text| items(text)) {
            asked.take(&item)?;
        }
        Ok(asked)
    }

    fn take(&mut self, item: &str) -> anyhow::Result<()> {
        let (key, value) = match item.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (item, None),
        };
        let known = self.known(&key.replace('-', "_"))?;
        let key = known.name;
        let wrong = |wanted: &str| Usage(format!("-o {item}: {wanted}"));
        let value = match (known.kind, value) {
            (Kind::Switch, None | Some("on")) => Value::Switch(true),
            (Kind::Switch, Some("off")) => Value::Switch(false),
            (Kind::Switch, Some(_)) => return Err(wrong("expected on or off").into()),
            (Kind::Never(_), Some("off" | "0")) => return Ok(()),
            (Kind::Never(why), _) => return Err(wrong(why).into()),
            (_, None) => return Err(wrong(&format!("write {key}=VALUE")).into()),
            (Kind::Text, Some(text)) => Value::Text(text.to_owned()),
            (Kind::Word(words), Some(text)) if words.contains(&text) => Value::Text(text.to_owned()),
            (Kind::Word(words), Some(_)) => {
                return Err(wrong(&format!("expected one of {}", words.join(", "))).into());
            }
            (Kind::Size, Some(text)) => Value::Number(args::bytes(text).map_err(|e| wrong(&e))?),
            (Kind::Count, Some(text)) => Value::Number(args::count(text).map_err(|e| wrong(&e))?.into()),
        };
        self.values.insert(key, value);
        Ok(())
    }

    fn known(&self, key: &str) -> anyhow::Result<&'static Known> {
        let here = |known: &&Known| match known.formats {
            In::Both => true,
            In::RawOnly => self.format == Format::Raw,
            In::Qcow2Only => self.format == Format::Qcow2,
        };
        if key.starts_with("encrypt.") {
            return Err(Usage(format!("-o {key}: {NO_ENCRYPTION}")).into());
        }
        match KNOWN.iter().find(|known| known.name == key) {
            Some(known) if here(&known) => Ok(known),
            Some(known) => {
                let other = match known.formats {
                    In::RawOnly => "raw",
                    _ => "qcow2",
                };
                let format = self.format.name();
                Err(Usage(format!(
                    "-o {key} is an option of {other} images, not of {format}: say -f {other}"
                ))
                .into())
            }
            None => {
                let names: Vec<_> = KNOWN.iter().filter(here).map(|known| known.name).collect();
                Err(Usage(format!(
                    "-o {key} is not known{}; '-o help' lists the options",
                    did_you_mean(key, &names)
                ))
                .into())
            }
        }
    }

    /// Adds what a flag of ours says.
    pub fn flag(&mut self, flag: &str, name: &'static str, value: Option<Value>) -> anyhow::Result<()> {
        match value.and_then(|value| self.values.insert(name, value)) {
            None => Ok(()),
            Some(_) => Err(Usage(format!("{name} is given twice: by -o and by {flag}")).into()),
        }
    }

    /// Adds what a flag of QEMU's says, over what `-o` says.
    pub fn override_with(&mut self, name: &'static str, value: Option<String>) {
        if let Some(value) = value {
            self.values.insert(name, Value::Text(value));
        }
    }

    pub fn number(&self, name: &str) -> Option<u64> {
        match self.values.get(name) {
            Some(Value::Number(number)) => Some(*number),
            _ => None,
        }
    }

    /// A number that the reading kept below 2^32.
    pub fn count(&self, name: &str) -> Option<u32> {
        self.number(name)
            .map(|number| u32::try_from(number).unwrap_or(u32::MAX))
    }

    pub fn text(&self, name: &str) -> Option<&str> {
        match self.values.get(name) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    pub fn switch(&self, name: &str) -> Option<bool> {
        match self.values.get(name) {
            Some(Value::Switch(on)) => Some(*on),
            _ => None,
        }
    }

    /// The first option that describes zones, if there is one.
    pub fn zone_option(&self) -> Option<&'static str> {
        ZONES.into_iter().find(|name| self.values.contains_key(name))
    }

    /// Whether there are zone options besides the mode.
    pub fn describes_zones_besides_mode(&self) -> bool {
        ZONES
            .iter()
            .any(|name| *name != "zone.mode" && self.values.contains_key(name))
    }

    /// The value as qemu-img's "Formatting" line shows it.
    pub fn shown(&self, name: &str) -> Option<String> {
        Some(match self.values.get(name)? {
            Value::Text(text) => text.replace(',', ",,"),
            Value::Number(number) => number.to_string(),
            Value::Switch(on) => on_off(*on).to_owned(),
        })
    }
}

pub fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// Whether `-o` asks for the list of options.
pub fn asks_for_help(texts: &[String]) -> bool {
    texts
        .iter()
        .flat_map(|text| items(text))
        .any(|item| item == "help" || item == "?")
}

/// Prints the list of options in the form of qemu-img's.
pub fn print_help(out: &mut Out, format: Format) -> anyhow::Result<()> {
    out.line(format_args!("Supported {} options:", format.name()))?;
    for known in KNOWN {
        let kind = match known.kind {
            Kind::Text | Kind::Word(_) => "<str>",
            Kind::Size => "<size>",
            Kind::Count => "<num>",
            Kind::Switch => "<bool (on/off)>",
            Kind::Never(_) => continue,
        };
        let other = match format {
            Format::Raw => In::Qcow2Only,
            Format::Qcow2 => In::RawOnly,
        };
        if known.formats != other {
            let name = format!("{}={kind}", known.name);
            out.line(format_args!("  {name:<22} - {}", known.what))?;
        }
    }
    Ok(())
}

/// The items between single commas; a doubled comma is one that belongs to the item.
fn items(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ',' if chars.next_if_eq(&',').is_some() => push(&mut items, ','),
            ',' => items.push(String::new()),
            c => push(&mut items, c),
        }
    }
    items.retain(|item| !item.is_empty());
    items
}

fn push(items: &mut [String], c: char) {
    if let Some(item) = items.last_mut() {
        item.push(c);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(format: Format, text: &str) -> Result<Asked, String> {
        Asked::read(format, &[text.to_owned()]).map_err(|e| e.to_string())
    }

    #[test]
    fn items_end_at_single_commas() {
        assert_eq!(items("a=1,b=2"), ["a=1", "b=2"]);
        assert_eq!(items("file=a,,b,c"), ["file=a,b", "c"]);
        assert_eq!(items("a,,,b,"), ["a,", "b"]);
        assert!(items("").is_empty());
    }

    #[test]
    fn values_have_their_kind_and_the_last_one_holds() {
        let asked = read(
            Format::Qcow2,
            "cluster_size=4k,lazy_refcounts,cluster-size=8k,backing_file=a,,b,refcount_bits=1,extended_l2=off",
        )
        .unwrap();
        assert_eq!(asked.number("cluster_size"), Some(8192));
        assert_eq!(asked.count("refcount_bits"), Some(1));
        assert_eq!(asked.text("backing_file"), Some("a,b"));
        assert_eq!(asked.shown("backing_file").unwrap(), "a,,b");
        assert_eq!(asked.switch("lazy_refcounts"), Some(true));
        assert_eq!(asked.switch("extended_l2"), Some(false));
        assert_eq!(asked.shown("preallocation"), None);
        assert_eq!(asked.zone_option(), None);
    }

    #[test]
    fn what_another_format_has_or_nobody_is_told_apart() {
        for (format, text, message) in [
            (Format::Raw, "cluster_size=4k", "is an option of qcow2 images"),
            (Format::Qcow2, "sidecar=x", "is an option of raw images"),
            (
                Format::Qcow2,
                "cluster_sise=4k",
                "(did you mean \"cluster_size\"?)",
            ),
            (Format::Qcow2, "extended_l2=maybe", "expected on or off"),
            (Format::Qcow2, "encryption=on", "encrypted"),
            (Format::Qcow2, "encrypt.format=luks", "encrypted"),
            (Format::Qcow2, "refcount_bits=x", "not a number"),
            (Format::Qcow2, "compat=v4", "expected one of 0.10, v2, 1.1, v3"),
            (
                Format::Qcow2,
                "compression_type=foo",
                "expected one of zlib, zstd",
            ),
            (
                Format::Qcow2,
                "preallocation=foo",
                "expected one of off, metadata, falloc, full",
            ),
        ] {
            let error = read(format, text).unwrap_err();
            assert!(error.contains(message), "{text}: {error}");
        }
        assert!(read(Format::Qcow2, "encryption=off,nocow=off").is_ok());
    }

    #[test]
    fn every_zone_option_is_known() {
        for name in ZONES {
            assert!(KNOWN.iter().any(|known| known.name == name), "{name}");
        }
    }
}
