//! The header extension that describes zones, in the drafts of QEMU's: layouts A, B, C and that of series 4 to 7.
//!
//! The drafts share a number and a feature bit, so the length tells them apart, and where two have the same length,
//! which of them makes sense. Layout C is the newest, and what is written. Checks and messages are QEMU's.

use zbdkit_qcow2::Header;
use zbdkit_spec::qcow2::{
    EXT_ZONED, INCOMPAT_ZONE_STATES, INCOMPAT_ZONED, ZONED_HOST_AWARE, ZONED_HOST_MANAGED, ZONED_MAX_ZONES,
    ZONED_NONE, ZonedA, ZonedB, ZonedC, ZonedV7,
};
use zbdkit_zone::{Geometry, GeometryError, GeometrySpec, Model, Zns};
use zerocopy::{FromBytes, IntoBytes};

/// Which draft an extension was written by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Draft {
    /// 44 bytes; the newest one.
    C,
    /// 48 bytes, series 12 and 13.
    B,
    /// 56 bytes, series 8 to 11.
    A,
    /// 48 bytes, series 4 to 7.
    V7,
}

/// What an extension says of the zones, whatever its draft. Checked: the figures fit each other and the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zones {
    /// By which draft.
    pub draft: Draft,
    /// How sequential zones may be written.
    pub model: Model,
    /// Number of zones.
    pub nr_zones: u32,
    /// Bytes.
    pub zone_size: u64,
    /// Bytes.
    pub zone_capacity: u64,
    /// The first so many zones are conventional.
    pub conventional: u32,
    /// 0 for no limit.
    pub max_active: u32,
    /// 0 for no limit.
    pub max_open: u32,
    /// Bytes; drafts before C have it.
    pub max_append: Option<u32>,
    /// Where the table of write pointers lies, bytes.
    pub table_offset: u64,
    /// Figures that were corrected, in words.
    pub warnings: Vec<String>,
}

/// Finds out about the zones of an image. `None` where it has none; the error is for the user.
pub fn zones(header: &Header, file_len: u64) -> Result<Option<Zones>, String> {
    let Some(data) = header.extension(EXT_ZONED) else {
        return if header.incompatible & INCOMPAT_ZONED == 0 {
            Ok(None)
        } else {
            Err(invalid(
                "the feature bit says that there is one, but it is missing",
            ))
        };
    };
    if data.first() == Some(&ZONED_NONE) {
        return Ok(None);
    }
    if header.incompatible & INCOMPAT_ZONED == 0 {
        return Err("the image has zones, but its feature bit 5 (\"zoned format\") is clear: a program that does not know \
                    zones may have written to it; set the bit again with `zbdkit check -r all`"
            .into());
    }
    let mut zones = told_apart(data, header.size)?;
    if header.version < 3 {
        return Err(invalid("images of version 2 cannot have zones"));
    }
    zones.check(header, file_len)?;
    Ok(Some(zones))
}

fn invalid(what: &str) -> String {
    format!("Invalid zoned extension header: {what}")
}

fn told_apart(data: &[u8], size: u64) -> Result<Zones, String> {
    let candidates = [
        ZonedC::read_from_bytes(data).ok().map(Raw::from),
        ZonedB::read_from_bytes(data).ok().map(Raw::from),
        ZonedV7::read_from_bytes(data).ok().map(Raw::from),
        ZonedA::read_from_bytes(data).ok().map(Raw::from),
    ];
    let mut candidates: Vec<Raw> = candidates.into_iter().flatten().collect();
    if candidates.len() > 1 {
        // The wrong reading of one draft as the other makes no sense: its fields lie elsewhere.
        candidates.retain(|raw| raw.makes_sense(size));
    }
    match candidates.as_slice() {
        [raw] => raw.check(),
        [] if data.len() != size_of::<ZonedB>() => Err(invalid(&format!(
            "zoned_ext: unexpected len={} (expected {})",
            data.len(),
            size_of::<ZonedC>()
        ))),
        _ => Err(invalid(
            "its 48 bytes fit neither of the two drafts of that length, or both",
        )),
    }
}

/// The fields of any draft, as they are.
struct Raw {
    zoned: u8,
    /// Length of the table, where the draft says it.
    table_size: Option<u64>,
    zones: Zones,
}

impl Raw {
    fn new(zoned: u8, zones: Zones) -> Raw {
        Raw {
            zoned,
            table_size: None,
            zones,
        }
    }

    fn makes_sense(&self, size: u64) -> bool {
        let z = &self.zones;
        let table = 8 * u64::from(z.nr_zones);
        z.zone_size.is_power_of_two()
            && z.zone_capacity <= z.zone_size
            && size.div_ceil(z.zone_size) == u64::from(z.nr_zones)
            && self.table_size.is_none_or(|len| len == table)
    }

    /// What QEMU checks wherever it meets such a header, in its order.
    fn check(&self) -> Result<Zones, String> {
        let mut z = self.zones.clone();
        z.model = match self.zoned {
            ZONED_HOST_MANAGED => Model::HostManaged,
            ZONED_HOST_AWARE => Model::HostAware,
            other => {
                return Err(invalid(&format!(
                    "Zoned extension header zoned field has unknown value {other}"
                )));
            }
        };
        check_figures(&z).map_err(|what| invalid(&what))?;
        z.clamp();
        Ok(z)
    }
}

/// The rules for zones in a qcow2 image that QEMU has, with its words. The other rules are the geometry's.
fn check_figures(z: &Zones) -> Result<(), String> {
    if z.zone_size == 0 {
        return Err("Zoned extension header zone_size field must not be 0".into());
    }
    if !z.zone_size.is_power_of_two() {
        return Err(format!(
            "Zoned extension header zone_size {} is not a power of 2",
            z.zone_size
        ));
    }
    if z.nr_zones > ZONED_MAX_ZONES {
        return Err(format!(
            "Zoned extension header nr_zones {} exceeds maximum {ZONED_MAX_ZONES}",
            z.nr_zones
        ));
    }
    if z.zone_capacity > z.zone_size {
        return Err(format!(
            "zone capacity {} exceeds zone size {}",
            z.zone_capacity, z.zone_size
        ));
    }
    if z.conventional >= z.nr_zones {
        return Err(format!(
            "Conventional_zones {} exceeds nr_zones {}.",
            z.conventional, z.nr_zones
        ));
    }
    Ok(())
}

/// Whether layout C, and so a qcow2 image, can describe a device.
pub fn expressible(geometry: &Geometry, cluster_size: u64) -> Result<(), String> {
    let zones = Zones::of(geometry, 0);
    check_figures(&zones)?;
    if !zones.zone_size.is_multiple_of(cluster_size) {
        return Err(format!(
            "zone size {} is not a multiple of the cluster size {cluster_size}",
            zones.zone_size
        ));
    }
    Ok(())
}

impl Zones {
    /// What describes a device in layout C.
    pub fn of(geometry: &Geometry, table_offset: u64) -> Zones {
        let spec = geometry.spec();
        Zones {
            draft: Draft::C,
            model: spec.model,
            nr_zones: geometry.nr_zones(),
            zone_size: spec.zone_size,
            zone_capacity: spec.zone_capacity,
            conventional: spec.nr_conventional,
            max_active: spec.max_active,
            max_open: spec.max_open,
            max_append: None,
            table_offset,
            warnings: Vec::new(),
        }
    }

    /// The extension's data, in layout C.
    pub fn encode(&self) -> Vec<u8> {
        let zoned = match self.model {
            Model::HostManaged => ZONED_HOST_MANAGED,
            Model::HostAware => ZONED_HOST_AWARE,
        };
        let data = ZonedC {
            zoned,
            reserved: [0; 3],
            nr_zones: self.nr_zones.into(),
            zone_size: self.zone_size.into(),
            zone_capacity: self.zone_capacity.into(),
            zonedmeta_offset: self.table_offset.into(),
            conventional_zones: self.conventional.into(),
            max_active_zones: self.max_active.into(),
            max_open_zones: self.max_open.into(),
        };
        data.as_bytes().to_vec()
    }

    /// Bytes of the table of write pointers.
    pub fn table_len(&self) -> u64 {
        8 * u64::from(self.nr_zones)
    }

    /// The device, with what the extension does not say.
    pub fn geometry(&self, size: u64, block_size: u32, max_append: u64) -> Result<Geometry, GeometryError> {
        Geometry::new(GeometrySpec {
            model: self.model,
            size,
            zone_size: self.zone_size,
            zone_capacity: self.zone_capacity,
            nr_conventional: self.conventional,
            block_size,
            max_open: self.max_open,
            max_active: self.max_active,
            max_append,
            zns: Zns::NONE,
        })
    }

    fn clamp(&mut self) {
        let sequential = self.nr_zones - self.conventional;
        if self.max_active > self.nr_zones {
            self.warnings.push(format!(
                "max_active_zones {} exceeds nr_zones {}, clamping to nr_zones",
                self.max_active, self.nr_zones
            ));
            self.max_active = self.nr_zones;
        }
        if self.max_open > sequential {
            self.warnings.push(format!(
                "max_open_zones {} exceeds the number of SWR zones, clamping to {sequential}",
                self.max_open
            ));
            self.max_open = sequential;
        }
        if self.max_active != 0 && self.max_open > self.max_active {
            self.warnings.push(format!(
                "max_open_zones {} exceeds max_active_zones {}, clamping to max_active_zones",
                self.max_open, self.max_active
            ));
            self.max_open = self.max_active;
        }
    }

    /// What only an image can tell.
    fn check(&mut self, header: &Header, file_len: u64) -> Result<(), String> {
        if header.size.div_ceil(self.zone_size) != u64::from(self.nr_zones) {
            return Err(invalid("Zoned extension header nr_zones field is wrong"));
        }
        if self.zone_capacity == 0 {
            return Err(invalid("zone capacity must not be 0"));
        }
        let cluster_size = header.cluster_size();
        if !self.zone_size.is_multiple_of(cluster_size) {
            return Err(invalid(&format!(
                "zone size {} is not a multiple of the cluster size {cluster_size}",
                self.zone_size
            )));
        }
        let end = self.table_offset.checked_add(self.table_len());
        if end.is_none_or(|end| end > file_len) || self.table_offset < cluster_size {
            return Err(invalid("Zoned metadata region exceeds the image file size"));
        }
        if self.model == Model::HostAware && header.incompatible & INCOMPAT_ZONE_STATES == 0 {
            return Err(invalid(&format!(
                "Zoned extension header zoned field has unknown value {ZONED_HOST_AWARE}"
            )));
        }
        Ok(())
    }
}

macro_rules! from_draft {
    ($layout:ident, $draft:expr, $append:expr, $size:expr) => {
        impl From<$layout> for Raw {
            fn from(z: $layout) -> Raw {
                let append: fn(&$layout) -> Option<u32> = $append;
                let size: fn(&$layout) -> Option<u64> = $size;
                let mut raw = Raw::new(
                    z.zoned,
                    Zones {
                        draft: $draft,
                        model: Model::HostManaged,
                        nr_zones: z.nr_zones.get(),
                        zone_size: z.zone_size.get().into(),
                        zone_capacity: z.zone_capacity.get().into(),
                        conventional: z.conventional_zones.get(),
                        max_active: z.max_active_zones.get(),
                        max_open: z.max_open_zones.get(),
                        max_append: append(&z),
                        table_offset: z.zonedmeta_offset.get(),
                        warnings: Vec::new(),
                    },
                );
                raw.table_size = size(&z);
                raw
            }
        }
    };
}
from_draft!(ZonedC, Draft::C, |_| None, |_| None);
from_draft!(ZonedB, Draft::B, |z| Some(z.max_append_bytes.get()), |_| None);
from_draft!(ZonedA, Draft::A, |z| Some(z.max_append_bytes.get()), |z| Some(
    z.zonedmeta_size.get()
));
from_draft!(ZonedV7, Draft::V7, |z| Some(z.max_append_bytes.get()), |z| Some(
    z.zonedmeta_size.get()
));

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: u64 = 1 << 30;

    fn header(data: &[u8]) -> Header {
        let mut header = Header::new(16);
        header.size = 768 << 20;
        header.incompatible |= INCOMPAT_ZONED;
        header.set_extension(EXT_ZONED, Some(data.to_vec()));
        header
    }

    fn c() -> ZonedC {
        ZonedC {
            zoned: 1,
            reserved: [0; 3],
            nr_zones: 12.into(),
            zone_size: (64 << 20).into(),
            zone_capacity: (48 << 20).into(),
            zonedmeta_offset: (3 << 16).into(),
            conventional_zones: 2.into(),
            max_active_zones: 8.into(),
            max_open_zones: 6.into(),
        }
    }

    fn refused(change: impl FnOnce(&mut ZonedC)) -> String {
        let mut ext = c();
        change(&mut ext);
        zones(&header(ext.as_bytes()), FILE).expect_err("refused")
    }

    #[test]
    fn the_drafts_are_told_apart_by_length_and_sense() {
        let expected = |draft, max_append| Zones {
            draft,
            model: Model::HostManaged,
            nr_zones: 12,
            zone_size: 64 << 20,
            zone_capacity: 48 << 20,
            conventional: 2,
            max_active: 8,
            max_open: 6,
            max_append,
            table_offset: 3 << 16,
            warnings: Vec::new(),
        };
        let found = |data: &[u8]| zones(&header(data), FILE).unwrap().unwrap();
        assert_eq!(found(c().as_bytes()), expected(Draft::C, None));
        assert_eq!(expected(Draft::C, None).encode(), c().as_bytes());
        let b = ZonedB {
            zoned: 1,
            reserved: [0; 3],
            nr_zones: 12.into(),
            zone_size: (64 << 20).into(),
            zone_capacity: (48 << 20).into(),
            conventional_zones: 2.into(),
            max_active_zones: 8.into(),
            max_open_zones: 6.into(),
            max_append_bytes: 4096.into(),
            zonedmeta_offset: (3 << 16).into(),
        };
        assert_eq!(found(b.as_bytes()), expected(Draft::B, Some(4096)));
        let v7 = ZonedV7 {
            zoned: 1,
            reserved: [0; 3],
            zone_size: (64 << 20).into(),
            zone_capacity: (48 << 20).into(),
            conventional_zones: 2.into(),
            nr_zones: 12.into(),
            max_active_zones: 8.into(),
            max_open_zones: 6.into(),
            max_append_bytes: 4096.into(),
            zonedmeta_size: 96.into(),
            zonedmeta_offset: (3 << 16).into(),
        };
        assert_eq!(found(v7.as_bytes()), expected(Draft::V7, Some(4096)));
        let a = ZonedA {
            zoned: 1,
            reserved: [0; 3],
            zone_size: (64 << 20).into(),
            zone_capacity: (48 << 20).into(),
            conventional_zones: 2.into(),
            nr_zones: 12.into(),
            max_active_zones: 8.into(),
            max_open_zones: 6.into(),
            max_append_bytes: 4096.into(),
            zonedmeta_size: 96.into(),
            zonedmeta_offset: (3 << 16).into(),
        };
        assert_eq!(found(a.as_bytes()), expected(Draft::A, Some(4096)));
    }

    #[test]
    fn what_is_no_extension_of_a_draft_is_refused_in_qemus_words() {
        for (says, change) in [
            (
                "zoned field has unknown value 3",
                (|e| e.zoned = 3) as fn(&mut ZonedC),
            ),
            // Ours, and only where the image says so.
            ("zoned field has unknown value 2", |e| e.zoned = 2),
            ("zone_size field must not be 0", |e| e.zone_size = 0.into()),
            ("zone_size 50331648 is not a power of 2", |e| {
                e.zone_size = (48 << 20).into()
            }),
            ("nr_zones 1048577 exceeds maximum 1048576", |e| {
                e.nr_zones = 1048577.into()
            }),
            ("zone capacity 67108865 exceeds zone size 67108864", |e| {
                e.zone_capacity = ((64 << 20) + 1).into()
            }),
            ("Conventional_zones 12 exceeds nr_zones 12.", |e| {
                e.conventional_zones = 12.into()
            }),
            ("nr_zones field is wrong", |e| e.nr_zones = 13.into()),
            ("capacity must not be 0", |e| e.zone_capacity = 0.into()),
            ("Zoned metadata region exceeds the image file size", |e| {
                e.zonedmeta_offset = (FILE - 8).into()
            }),
            ("Zoned metadata region exceeds the image file size", |e| {
                e.zonedmeta_offset = u64::MAX.into()
            }),
            ("Zoned metadata region exceeds the image file size", |e| {
                e.zonedmeta_offset = 0.into()
            }),
        ] {
            let message = refused(change);
            assert!(
                message.starts_with("Invalid zoned extension header") && message.contains(says),
                "{message}"
            );
        }
        let long = zones(&header(&[1; 60]), FILE).unwrap_err();
        assert!(
            long.contains("zoned_ext: unexpected len=60 (expected 44)"),
            "{long}"
        );
        let neither = zones(&header(&[1; 48]), FILE).unwrap_err();
        assert!(neither.contains("neither"), "{neither}");
    }

    #[test]
    fn small_zones_need_small_clusters_and_zones_need_version_3() {
        let mut header = header(c().as_bytes());
        header.size = 12 << 15;
        let mut ext = c();
        ext.zone_size = (1 << 15).into();
        ext.zone_capacity = (1 << 15).into();
        header.set_extension(EXT_ZONED, Some(ext.as_bytes().to_vec()));
        let message = zones(&header, FILE).unwrap_err();
        assert!(
            message.contains("multiple of the cluster size 65536"),
            "{message}"
        );
        header.cluster_bits = 15;
        assert!(zones(&header, FILE).unwrap().is_some());
        header.version = 2;
        assert!(zones(&header, FILE).is_err());
    }

    #[test]
    fn extension_and_feature_bit_come_together() {
        let mut header = header(c().as_bytes());
        header.incompatible = 0;
        assert!(zones(&header, FILE).unwrap_err().contains("bit 5"));
        header.set_extension(EXT_ZONED, None);
        assert_eq!(zones(&header, FILE), Ok(None));
        header.incompatible = INCOMPAT_ZONED;
        assert!(zones(&header, FILE).is_err());
        let mut ext = c();
        ext.zoned = 0;
        ext.nr_zones = u32::MAX.into();
        header.set_extension(EXT_ZONED, Some(ext.as_bytes().to_vec()));
        assert_eq!(zones(&header, FILE), Ok(None));
    }

    #[test]
    fn limits_that_are_too_large_are_clamped_with_a_warning() {
        let mut ext = c();
        ext.max_active_zones = 20.into();
        ext.max_open_zones = 11.into();
        let found = zones(&header(ext.as_bytes()), FILE).unwrap().unwrap();
        assert_eq!((found.max_active, found.max_open), (12, 10));
        assert_eq!(found.warnings.len(), 2);
        ext.max_active_zones = 3.into();
        let found = zones(&header(ext.as_bytes()), FILE).unwrap().unwrap();
        assert_eq!((found.max_active, found.max_open), (3, 3));
    }
}
