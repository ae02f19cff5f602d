//! Our header extension: where the checked zone table lies, and those of snapshots.

use zbdkit_qcow2::Header;
use zbdkit_spec::qcow2::{
    AUTOCLEAR_ZONE_TABLE, EXT_ZBDKIT, EXT_ZONED, INCOMPAT_ZONE_STATES, INCOMPAT_ZONED, MAX_CLUSTER_OFFSET,
    ZBDKIT_VERSION, ZbdkitExtension, ZonedC,
};
use zbdkit_zone::Model;
use zerocopy::{FromBytes, IntoBytes};

use super::extension::Zones;

/// Our extension, whether or not it may be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ours {
    /// Where the area lies, bytes.
    pub area: (u64, u64),
    /// Where the snapshots' directory lies, offset and length, both 0 for none.
    pub snapshots: (u64, u64),
    /// Identity of the image.
    pub uuid: uuid::Uuid,
}

impl Ours {
    /// Our extension, if the image has one that makes sense.
    pub fn find(header: &Header) -> Option<Ours> {
        let data = header.extension(EXT_ZBDKIT)?;
        let ext = ZbdkitExtension::read_from_bytes(data).ok()?;
        let ours = Ours {
            area: (ext.area_offset.get(), ext.area_len.get()),
            snapshots: (ext.snapshots_offset.get(), ext.snapshots_len.get()),
            uuid: uuid::Uuid::from_bytes(ext.uuid),
        };
        let cluster_size = header.cluster_size();
        let is_area = |(offset, len): (u64, u64)| {
            offset >= cluster_size
                && offset.is_multiple_of(cluster_size)
                && len > 0
                && offset
                    .checked_add(len)
                    .is_some_and(|end| end <= MAX_CLUSTER_OFFSET)
        };
        let makes_sense = ext.version.get() == ZBDKIT_VERSION
            && is_area(ours.area)
            && (ours.snapshots == (0, 0) || is_area(ours.snapshots));
        makes_sense.then_some(ours)
    }

    /// Our extension, if what it names is up to date.
    pub fn current(header: &Header) -> Result<Option<Ours>, String> {
        if header.autoclear & AUTOCLEAR_ZONE_TABLE == 0 {
            return Ok(None);
        }
        match Ours::find(header) {
            Some(ours) => Ok(Some(ours)),
            None => Err("the header extension that names the zone table is damaged, or of a version that is not known to \
                         this zbdkit; `zbdkit check -r all` makes a new one from what else is known"
                .into()),
        }
    }

    /// Puts it into a header that has one already.
    pub fn put(&self, header: &mut Header) {
        header.set_extension(EXT_ZBDKIT, Some(self.encode()));
    }

    /// The extension's data.
    pub fn encode(&self) -> Vec<u8> {
        let ext = ZbdkitExtension {
            version: ZBDKIT_VERSION.into(),
            reserved: 0.into(),
            area_offset: self.area.0.into(),
            area_len: self.area.1.into(),
            snapshots_offset: self.snapshots.0.into(),
            snapshots_len: self.snapshots.1.into(),
            uuid: self.uuid.into_bytes(),
        };
        ext.as_bytes().to_vec()
    }
}

/// Whether both extensions lie in the first sector of an encoded header: one write of it switches all that they name.
pub fn has_room(encoded: &[u8]) -> bool {
    let fields = encoded.get(100..104).and_then(|bytes| bytes.try_into().ok());
    let both = 8 + size_of::<ZonedC>().next_multiple_of(8) + 8 + size_of::<ZbdkitExtension>();
    fields.is_some_and(|bytes| u32::from_be_bytes(bytes) as usize + both <= 512)
}

/// Writes zones and what is ours into a header: with these bits and extensions, all of it counts.
pub fn put(header: &mut Header, zones: &Zones, ours: &Ours, states: bool) {
    header.set_extension(EXT_ZONED, Some(zones.encode()));
    ours.put(header);
    header.incompatible |= INCOMPAT_ZONED;
    header.autoclear |= AUTOCLEAR_ZONE_TABLE;
    if states || zones.model == Model::HostAware {
        header.incompatible |= INCOMPAT_ZONE_STATES;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_header_fields_may_leave_no_room() {
        let mut encoded = Header::new(16).encode().unwrap();
        assert!(has_room(&encoded));
        encoded[100..104].copy_from_slice(&392u32.to_be_bytes());
        assert!(has_room(&encoded));
        encoded[100..104].copy_from_slice(&400u32.to_be_bytes());
        assert!(!has_room(&encoded));
    }

    #[test]
    fn our_extension_counts_only_while_its_bit_is_set() {
        let ours = Ours {
            area: (1 << 20, 16384),
            snapshots: (0, 0),
            uuid: uuid::Uuid::from_u128(7),
        };
        let mut header = Header::new(16);
        header.set_extension(EXT_ZBDKIT, Some(ours.encode()));
        assert_eq!(Ours::current(&header), Ok(None));
        assert_eq!(Ours::find(&header), Some(ours));
        header.autoclear |= AUTOCLEAR_ZONE_TABLE;
        assert_eq!(Ours::current(&header), Ok(Some(ours)));
        for area in [
            (0, 16384),
            ((1 << 20) + 512, 16384),
            (1 << 20, 0),
            (u64::MAX - 65535, 65536),
        ] {
            header.set_extension(EXT_ZBDKIT, Some(Ours { area, ..ours }.encode()));
            assert!(Ours::current(&header).is_err(), "{area:?}");
        }
    }
}
