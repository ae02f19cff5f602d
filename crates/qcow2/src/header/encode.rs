//! Writing a header.

use zbdkit_spec::qcow2 as spec;
use zerocopy::{FromZeros, IntoBytes};

use super::{Compression, Header, KNOWN_INCOMPATIBLE, KNOWN_NAMES, ZONE_NAMES};
use crate::error::Error;

/// From this cluster size on QEMU writes its whole feature name table.
const NAMES_MIN_CLUSTER: u64 = 4096;

/// Header and extensions of images with zones end here at the latest: a device writes so many bytes wholly or not.
const SECTOR: usize = 512;

impl Header {
    /// The first cluster of the image: header, extensions, name of the backing image.
    ///
    /// What the zones' extensions say lies right behind the header, in its sector: a device writes that wholly or not,
    /// so whatever one write changes there changes at once.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        let mut out = self.encode_fields();
        let zones = [spec::EXT_ZONED, spec::EXT_ZBDKIT];
        for magic in zones {
            if let Some(data) = self.extension(magic) {
                put_extension(&mut out, magic, data);
            }
        }
        if zones.iter().any(|magic| self.extension(*magic).is_some()) && out.len() > SECTOR {
            return Err(Error::Unsupported(format!(
                "the header has {} bytes of fields that this version does not know: \
                 there is no room for zones in its first {SECTOR} bytes",
                self.unknown_fields.len()
            )));
        }
        for extension in &self.extensions {
            if !zones.contains(&extension.magic) {
                put_extension(&mut out, extension.magic, &extension.data);
            }
        }
        let end = size_of::<spec::Extension>();
        let backing = self.backing_file.as_deref().unwrap_or_default().as_bytes();
        let names = self.encode_feature_names();
        let left = self
            .cluster_size()
            .saturating_sub((out.len() + end + backing.len()) as u64);
        if !names.is_empty() && (names.len() + end) as u64 <= left {
            put_extension(&mut out, spec::EXT_FEATURE_NAMES, &names);
        }
        put_extension(&mut out, spec::EXT_END, &[]);
        self.put_backing_file(&mut out, backing)?;
        if out.len() as u64 > self.cluster_size() {
            return Err(Error::Refused(format!(
                "the header needs {} bytes, more than a cluster ({} bytes): make the names of backing and data file \
                 shorter, or the image with larger clusters",
                out.len(),
                self.cluster_size()
            )));
        }
        out.resize(self.cluster_size() as usize, 0);
        Ok(out)
    }

    fn encode_fields(&self) -> Vec<u8> {
        let known = size_of::<spec::Header>();
        let header_length = (spec::V3_HEADER_MIN + 1 + self.unknown_fields.len())
            .next_multiple_of(8)
            .max(known);
        let raw = spec::Header {
            magic: spec::MAGIC.into(),
            version: self.version.into(),
            backing_file_offset: 0.into(),
            backing_file_size: 0.into(),
            cluster_bits: self.cluster_bits.into(),
            size: self.size.into(),
            crypt_method: self.crypt_method.into(),
            l1_size: self.l1_size.into(),
            l1_table_offset: self.l1_offset.into(),
            refcount_table_offset: self.refcount_table_offset.into(),
            refcount_table_clusters: self.refcount_table_clusters.into(),
            nb_snapshots: self.nb_snapshots.into(),
            snapshots_offset: self.snapshots_offset.into(),
            incompatible_features: self.incompatible.into(),
            compatible_features: self.compatible.into(),
            autoclear_features: self.autoclear.into(),
            refcount_order: self.refcount_order.into(),
            header_length: (header_length as u32).into(),
            compression_type: match self.compression {
                Compression::Zlib => spec::COMPRESSION_ZLIB,
                Compression::Zstd => spec::COMPRESSION_ZSTD,
            },
            padding: [0; 7],
        };
        if self.version == 2 {
            return raw.as_bytes()[..spec::V2_HEADER_LEN].to_vec();
        }
        let mut out = raw.as_bytes().to_vec();
        out.truncate(spec::V3_HEADER_MIN + 1);
        out.extend_from_slice(&self.unknown_fields);
        out.resize(header_length, 0);
        out
    }

    fn put_backing_file(&self, out: &mut Vec<u8>, name: &[u8]) -> Result<(), Error> {
        if name.is_empty() {
            return Ok(());
        }
        if name.len() > spec::MAX_BACKING_NAME as usize {
            return Err(Error::Refused(format!(
                "the name of the backing file has {} bytes, at most {} are possible",
                name.len(),
                spec::MAX_BACKING_NAME
            )));
        }
        let offset = out.len() as u64;
        let mut raw = spec::Header::new_zeroed();
        let fixed = spec::V2_HEADER_LEN;
        raw.as_mut_bytes()[..fixed].copy_from_slice(&out[..fixed]);
        raw.backing_file_offset = offset.into();
        raw.backing_file_size = (name.len() as u32).into();
        out[..fixed].copy_from_slice(&raw.as_bytes()[..fixed]);
        out.extend_from_slice(name);
        Ok(())
    }

    /// The feature name table. In small clusters, whose room is worth more, it only has what a reader would have to
    /// tell its user: names of the incompatible features of this image that QEMU does not know.
    fn encode_feature_names(&self) -> Vec<u8> {
        if self.version == 2 {
            return Vec::new();
        }
        let small = self.cluster_size() < NAMES_MIN_CLUSTER;
        let zoned = self.zoned() || self.extension(spec::EXT_ZONED).is_some();
        let zone_names = &ZONE_NAMES[..if zoned { ZONE_NAMES.len() } else { 0 }];
        let ours = KNOWN_NAMES.iter().chain(zone_names).map(|(kind, bit, text)| {
            let mut name = [0; 46];
            name[..text.len()].copy_from_slice(text.as_bytes());
            let (kind, bit) = (*kind, bit.trailing_zeros() as u8);
            spec::FeatureName { kind, bit, name }
        });
        let theirs = self.feature_names.iter().map(|feature| spec::FeatureName {
            kind: feature.kind,
            bit: feature.bit,
            name: feature.name,
        });
        let needed = |name: &spec::FeatureName| {
            name.kind == spec::FEATURE_INCOMPATIBLE
                && self.incompatible & !KNOWN_INCOMPATIBLE & (1 << name.bit) != 0
        };
        ours.chain(theirs)
            .filter(|name| !small || needed(name))
            .flat_map(|name| name.as_bytes().to_vec())
            .collect()
    }
}

fn put_extension(out: &mut Vec<u8>, magic: u32, data: &[u8]) {
    let head = spec::Extension {
        magic: magic.into(),
        len: (data.len() as u32).into(),
    };
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(8), 0);
}
