//! Reading a header: each number is bounded before anything is allocated or read by it.

use zbdkit_io::{File, IoBuf};
use zbdkit_spec::qcow2 as spec;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{Compression, Extension, FeatureName, Header, KNOWN_NAMES, ZONE_NAMES, until_nul};
use crate::error::Error;

/// Extensions whose data means something to us, so that two of a kind would be a contradiction.
const UNDERSTOOD: [u32; 7] = [
    spec::EXT_BACKING_FORMAT,
    spec::EXT_FEATURE_NAMES,
    spec::EXT_BITMAPS,
    spec::EXT_CRYPTO,
    spec::EXT_DATA_FILE,
    spec::EXT_ZONED,
    spec::EXT_ZBDKIT,
];

/// What is read of a file before its cluster size is known, bytes.
const FIRST_READ: u64 = 4096;

/// The first cluster, and the length of the file.
pub(super) async fn read_first_cluster(file: &File) -> Result<(Vec<u8>, u64), Error> {
    let failed = |e: std::io::Error| Error::io("reading the header", &e);
    let len = file.len().map_err(failed)?;
    let align = u64::from(file.direct_align().unwrap_or(1));
    let buf = IoBuf::alloc(FIRST_READ.max(align) as usize);
    file.read(buf.clone(), 0).await.map_err(failed)?;
    let first = buf.to_vec();
    let core = Core::decode(&first)?;
    if core.cluster_size() <= first.len() {
        return Ok((first, len));
    }
    let buf = IoBuf::alloc(core.cluster_size());
    file.read(buf.clone(), 0).await.map_err(failed)?;
    Ok((buf.to_vec(), len))
}

/// The fields that tell how to read the others.
struct Core {
    raw: spec::Header,
    cluster_bits: u32,
    header_length: usize,
}

impl Core {
    fn decode(bytes: &[u8]) -> Result<Core, Error> {
        let mut raw = spec::Header::new_zeroed();
        let given = bytes.len().min(size_of::<spec::Header>());
        raw.as_mut_bytes()[..given].copy_from_slice(&bytes[..given]);
        if raw.magic.get() != spec::MAGIC {
            return Err(Error::NotQcow2);
        }
        let version = raw.version.get();
        if !(2..=3).contains(&version) {
            return Err(Error::Unsupported(format!("Unsupported qcow2 version {version}")));
        }
        let cluster_bits = raw.cluster_bits.get();
        if !(spec::MIN_CLUSTER_BITS..=spec::MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return invalid(format!("Unsupported cluster size: 2^{cluster_bits}"));
        }
        if version == 2 {
            raw.as_mut_bytes()[spec::V2_HEADER_LEN..].fill(0);
            raw.refcount_order = 4.into();
            raw.header_length = (spec::V2_HEADER_LEN as u32).into();
        } else if raw.header_length.get() < spec::V3_HEADER_MIN as u32 {
            return invalid("qcow2 header too short");
        }
        let header_length = raw.header_length.get() as usize;
        if header_length > 1 << cluster_bits {
            return invalid("qcow2 header exceeds cluster size");
        }
        if !header_length.is_multiple_of(8) {
            return invalid(format!(
                "qcow2 header length {header_length} is not a multiple of 8"
            ));
        }
        Ok(Core {
            raw,
            cluster_bits,
            header_length,
        })
    }

    fn cluster_size(&self) -> usize {
        1 << self.cluster_bits
    }

    /// Where the extensions end at the latest.
    fn extensions_end(&self) -> Result<usize, Error> {
        match self.raw.backing_file_offset.get() {
            0 => Ok(self.cluster_size()),
            offset if offset > self.cluster_size() as u64 => invalid("Invalid backing file offset"),
            offset if offset < self.header_length as u64 => invalid("Invalid backing file offset"),
            offset => Ok(offset as usize),
        }
    }

    fn compression(&self) -> Result<Compression, Error> {
        let kind = if self.header_length > spec::V3_HEADER_MIN {
            self.raw.compression_type
        } else {
            spec::COMPRESSION_ZLIB
        };
        let bit = self.raw.incompatible_features.get() & spec::INCOMPAT_COMPRESSION != 0;
        match (kind, bit) {
            (spec::COMPRESSION_ZLIB, false) => Ok(Compression::Zlib),
            (spec::COMPRESSION_ZLIB, true) => {
                invalid("qcow2: Compression type incompatible feature bit must not be set")
            }
            (spec::COMPRESSION_ZSTD, true) => Ok(Compression::Zstd),
            (spec::COMPRESSION_ZSTD, false) => {
                invalid("qcow2: Compression type incompatible feature bit must be set")
            }
            (other, _) => Err(Error::Unsupported(format!(
                "qcow2: unknown compression type: {other}"
            ))),
        }
    }

    fn backing_file(&self, cluster: &[u8]) -> Result<Option<String>, Error> {
        let (offset, len) = (
            self.raw.backing_file_offset.get() as usize,
            self.raw.backing_file_size.get(),
        );
        if offset == 0 {
            return Ok(None);
        }
        if len > spec::MAX_BACKING_NAME || len as usize > cluster.len() - offset {
            return invalid("Backing file name too long");
        }
        let name = text(
            &cluster[offset..offset + len as usize],
            "the name of the backing file",
        )?;
        Ok((!name.is_empty()).then_some(name))
    }
}

/// Without `len` leniently, as [`Header::read_for_check`] says.
pub(super) fn decode(bytes: &[u8], len: Option<u64>) -> Result<Header, Error> {
    let core = Core::decode(bytes)?;
    let extensions_end = core.extensions_end()?;
    let compression = core.compression()?;
    let mut cluster = bytes[..bytes.len().min(core.cluster_size())].to_vec();
    cluster.resize(core.cluster_size(), 0);

    let raw = &core.raw;
    let mut header = Header {
        version: raw.version.get(),
        size: raw.size.get(),
        refcount_order: raw.refcount_order.get(),
        crypt_method: raw.crypt_method.get(),
        l1_size: raw.l1_size.get(),
        l1_offset: raw.l1_table_offset.get(),
        refcount_table_offset: raw.refcount_table_offset.get(),
        refcount_table_clusters: raw.refcount_table_clusters.get(),
        nb_snapshots: raw.nb_snapshots.get(),
        snapshots_offset: raw.snapshots_offset.get(),
        incompatible: raw.incompatible_features.get(),
        compatible: raw.compatible_features.get(),
        autoclear: raw.autoclear_features.get(),
        compression,
        ..Header::new(core.cluster_bits)
    };
    check_numbers(&header, len)?;
    read_extensions(&mut header, &cluster[core.header_length..extensions_end])?;
    header.backing_file = core.backing_file(&cluster)?;
    check_combinations(&header)?;
    if core.header_length > spec::V3_HEADER_MIN {
        let fields = &cluster[spec::V3_HEADER_MIN + 1..core.header_length];
        let used = fields
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last + 1);
        header.unknown_fields = fields[..used].to_vec();
    }
    Ok(header)
}

fn check_numbers(header: &Header, len: Option<u64>) -> Result<(), Error> {
    if header.extended_l2() && header.cluster_bits < spec::MIN_EXTENDED_CLUSTER_BITS {
        return invalid(format!(
            "Unsupported subcluster size: {}",
            header.subcluster_size()
        ));
    }
    if header.refcount_order > spec::MAX_REFCOUNT_ORDER {
        return invalid("Reference count entry width too large; may not exceed 64 bits");
    }
    let strict = len.is_some();
    let reftable = u64::from(header.refcount_table_clusters) << header.cluster_bits;
    if strict && reftable == 0 {
        return invalid("Image does not contain a reference count table");
    }
    let at = header.refcount_table_offset;
    check_table(
        header,
        at,
        reftable,
        spec::MAX_REFTABLE_BYTES,
        "Reference count table",
    )?;
    if strict {
        let (entry, at) = (size_of::<spec::SnapshotEntry>() as u64, header.snapshots_offset);
        let most = entry * u64::from(spec::MAX_SNAPSHOTS);
        check_table(
            header,
            at,
            entry * u64::from(header.nb_snapshots),
            most,
            "Snapshot table",
        )?;
    }
    let l1 = u64::from(header.l1_size) * 8;
    check_table(
        header,
        header.l1_offset,
        l1,
        spec::MAX_L1_BYTES,
        "Active L1 table",
    )?;
    if header.size > i64::MAX as u64 || header.l1_entries_for(header.size) > i32::MAX as u64 {
        return invalid("Image is too big");
    }
    if u64::from(header.l1_size) < header.l1_entries_for(header.size) {
        return invalid("L1 table is too small");
    }
    let Some(len) = len else { return Ok(()) };
    for (range, what) in header.metadata_ranges() {
        // The rest of a last cluster that nobody wrote to may be missing.
        if range.end.div_ceil(header.cluster_size()) > len.max(1).div_ceil(header.cluster_size()) {
            let offset = range.start;
            return Err(Error::Truncated { what, offset, len });
        }
    }
    Ok(())
}

fn check_table(header: &Header, offset: u64, bytes: u64, most: u64, what: &str) -> Result<(), Error> {
    if bytes > most {
        return invalid(format!("{what} too large"));
    }
    let past = offset.checked_add(bytes).is_none_or(|end| end > i64::MAX as u64);
    if past || !offset.is_multiple_of(header.cluster_size()) {
        return invalid(format!("{what} offset invalid"));
    }
    Ok(())
}

fn check_combinations(header: &Header) -> Result<(), Error> {
    if header.data_raw() && !header.external_data() {
        return invalid("data-file-raw requires a data file");
    }
    if header.extension(spec::EXT_CRYPTO).is_some() && header.crypt_method != spec::CRYPT_LUKS {
        return invalid("CRYPTO header extension only expected with LUKS encryption method");
    }
    if header.autoclear & spec::AUTOCLEAR_BITMAPS != 0
        && let Some(data) = header.extension(spec::EXT_BITMAPS)
    {
        check_bitmaps(header, data)?;
    }
    Ok(())
}

/// Only of a bitmaps extension that says it is up to date: what became of another one is nobody's business.
fn check_bitmaps(header: &Header, data: &[u8]) -> Result<(), Error> {
    let Ok(bitmaps) = spec::BitmapsExtension::read_from_bytes(data) else {
        return invalid("bitmaps_ext: Invalid extension length");
    };
    if bitmaps.reserved.get() != 0 {
        return invalid("bitmaps_ext: Reserved field is not zero");
    }
    let (count, size) = (bitmaps.nb_bitmaps.get(), bitmaps.directory_size.get());
    if count > spec::MAX_BITMAPS {
        return invalid(format!(
            "bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {}",
            spec::MAX_BITMAPS
        ));
    }
    if count == 0 {
        return invalid("found bitmaps extension with zero bitmaps");
    }
    if !bitmaps
        .directory_offset
        .get()
        .is_multiple_of(header.cluster_size())
    {
        return invalid("bitmaps_ext: invalid bitmap directory offset");
    }
    if size > spec::MAX_BITMAP_DIRECTORY {
        return invalid(format!(
            "bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size ({})",
            spec::MAX_BITMAP_DIRECTORY
        ));
    }
    Ok(())
}

fn read_extensions(header: &mut Header, mut bytes: &[u8]) -> Result<(), Error> {
    let mut seen = [false; UNDERSTOOD.len()];
    while !bytes.is_empty() {
        let Ok((head, rest)) = spec::Extension::read_from_prefix(bytes) else {
            return invalid("Header extension too large");
        };
        let (magic, len) = (head.magic.get(), head.len.get() as usize);
        if len > rest.len() {
            return invalid("Header extension too large");
        }
        if magic == spec::EXT_END {
            return Ok(());
        }
        if let Some(i) = UNDERSTOOD.iter().position(|understood| *understood == magic) {
            if seen[i] {
                return invalid(format!("header extension {magic:#010x} is there twice"));
            }
            seen[i] = true;
        }
        let (data, rest) = rest.split_at(len);
        read_extension(header, magic, data)?;
        bytes = &rest[(len.next_multiple_of(8) - len).min(rest.len())..];
    }
    Ok(())
}

fn read_extension(header: &mut Header, magic: u32, data: &[u8]) -> Result<(), Error> {
    match magic {
        spec::EXT_FEATURE_NAMES => {
            read_feature_names(header, data);
            return Ok(());
        }
        spec::EXT_BACKING_FORMAT if data.len() > spec::MAX_BACKING_FORMAT as usize => {
            return invalid(format!(
                "ERROR: ext_backing_format: len={} too large (>={})",
                data.len(),
                spec::MAX_BACKING_FORMAT + 1
            ));
        }
        spec::EXT_BACKING_FORMAT => drop(text(data, "the format of the backing file")?),
        spec::EXT_DATA_FILE => drop(text(data, "the name of the data file")?),
        spec::EXT_CRYPTO if data.len() != size_of::<spec::CryptoExtension>() => {
            return invalid(format!(
                "CRYPTO header extension size {}, but expected size {}",
                data.len(),
                size_of::<spec::CryptoExtension>()
            ));
        }
        _ => {}
    }
    let data = data.to_vec();
    header.extensions.push(Extension { magic, data });
    Ok(())
}

/// Keeps the names of features that we have none for. Like for QEMU the first empty name ends the table.
fn read_feature_names(header: &mut Header, data: &[u8]) {
    for entry in data.chunks_exact(size_of::<spec::FeatureName>()) {
        let Ok(entry) = spec::FeatureName::ref_from_bytes(entry) else {
            return;
        };
        if entry.name[0] == 0 {
            return;
        }
        let ours = KNOWN_NAMES.iter().chain(&ZONE_NAMES);
        let known = |(kind, bit, _): &(u8, u64, _)| {
            *kind == entry.kind && bit.trailing_zeros() == u32::from(entry.bit)
        };
        let valid = entry.kind <= spec::FEATURE_AUTOCLEAR && entry.bit < 64;
        let again = |name: &FeatureName| name.kind == entry.kind && name.bit == entry.bit;
        if valid && !ours.clone().any(known) && !header.feature_names.iter().any(again) {
            let mut name = [0; 46];
            let used = until_nul(&entry.name);
            name[..used.len()].copy_from_slice(used);
            header.feature_names.push(FeatureName {
                kind: entry.kind,
                bit: entry.bit,
                name,
            });
        }
    }
}

fn invalid<T>(what: impl Into<String>) -> Result<T, Error> {
    Err(Error::Invalid(what.into()))
}

/// A string of the image's, which ends at a NUL for QEMU, too.
fn text(bytes: &[u8], what: &str) -> Result<String, Error> {
    match std::str::from_utf8(until_nul(bytes)) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(Error::Unsupported(format!("{what} is not UTF-8"))),
    }
}
