//! Zone reports of a SCSI disk, made sense of.

use zbdkit_spec::scsi::{ReportHeader, ZoneCondition, ZoneDescriptor, ZoneType};
use zbdkit_zone::{Attributes, Condition, Counters, ZoneInfo, ZoneNo, ZoneType as Kind};
use zerocopy::FromBytes;

/// What positions of a disk are given in. Bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) block_size: u32,
    /// Zero where it is not known yet: then the only zone is the first one.
    pub(super) zone_size: u64,
}

/// Bytes of the answer to a report of `zones`.
pub(super) fn bytes_of(zones: usize) -> usize {
    size_of::<ReportHeader>() + zones * size_of::<ZoneDescriptor>()
}

/// The zones of an answer; `None` where it makes no sense.
pub(super) fn parse(answer: &[u8], place: Place) -> Option<Vec<ZoneInfo>> {
    let (header, descriptors) = ReportHeader::ref_from_prefix(answer).ok()?;
    let present = header.zone_list_length.get() as usize / size_of::<ZoneDescriptor>();
    descriptors
        .chunks_exact(size_of::<ZoneDescriptor>())
        .take(present)
        .map(|bytes| info(ZoneDescriptor::ref_from_bytes(bytes).ok()?, place))
        .collect()
}

fn info(zone: &ZoneDescriptor, place: Place) -> Option<ZoneInfo> {
    let bytes = |blocks: u64| blocks.checked_mul(place.block_size.into());
    let (start, len) = (bytes(zone.zone_start_lba.get())?, bytes(zone.zone_length.get())?);
    let end = start.checked_add(len)?;
    let number = start.checked_div(place.zone_size).unwrap_or(0);
    let kind = match zone.zone_type() {
        ZoneType::CONVENTIONAL => Kind::Conventional,
        ZoneType::SEQUENTIAL_WRITE_REQUIRED => Kind::SequentialRequired,
        ZoneType::SEQUENTIAL_WRITE_PREFERRED => Kind::SequentialPreferred,
        _ => return None,
    };
    let condition = match zone.condition() {
        ZoneCondition::NOT_WRITE_POINTER => Condition::NotWritePointer,
        ZoneCondition::EMPTY => Condition::Empty,
        ZoneCondition::IMPLICITLY_OPENED => Condition::ImplicitlyOpen,
        ZoneCondition::EXPLICITLY_OPENED => Condition::ExplicitlyOpen,
        ZoneCondition::CLOSED => Condition::Closed,
        ZoneCondition::READ_ONLY => Condition::ReadOnly,
        ZoneCondition::FULL => Condition::Full,
        ZoneCondition::OFFLINE => Condition::Offline,
        _ => return None,
    };
    let wp = match condition {
        Condition::NotWritePointer | Condition::Empty => start,
        Condition::Full => end,
        // Invalid in read-only and offline zones, which may show anything.
        _ => bytes(zone.write_pointer_lba.get())
            .filter(|wp| (start..=end).contains(wp))
            .unwrap_or(start),
    };
    Some(ZoneInfo {
        zone: ZoneNo(u32::try_from(number).ok()?),
        start,
        len,
        capacity: len,
        wp,
        written_end: wp,
        kind,
        condition,
        counters: Counters::default(),
        attributes: Attributes::default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place {
        block_size: 512,
        zone_size: 64 << 20,
    };

    fn descriptor(kind: u8, condition: u8, start: u64, wp: u64) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        (bytes[0], bytes[1]) = (kind, condition << 4);
        bytes[8..16].copy_from_slice(&0x20000u64.to_be_bytes());
        bytes[16..24].copy_from_slice(&start.to_be_bytes());
        bytes[24..32].copy_from_slice(&wp.to_be_bytes());
        bytes
    }

    fn answer(length: u32, zones: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..4].copy_from_slice(&length.to_be_bytes());
        bytes.extend(zones.concat());
        bytes
    }

    #[test]
    fn blocks_become_bytes_and_pointers_that_mean_nothing_are_not_shown() {
        let zones = [
            descriptor(1, 0, 0x20000, u64::MAX),
            descriptor(3, 2, 0x40000, 0x40008),
            descriptor(3, 0xe, 0x60000, u64::MAX),
            descriptor(3, 4, 0x80000, 0),
        ];
        let zones = parse(&answer(256, &zones), PLACE).unwrap();
        let shown: Vec<_> = zones.iter().map(|z| (z.zone.0, z.kind, z.wp - z.start)).collect();
        let expected = [
            (1, Kind::Conventional, 0),
            (2, Kind::SequentialPreferred, 4096),
            (3, Kind::SequentialPreferred, 64 << 20),
            (4, Kind::SequentialPreferred, 0),
        ];
        assert_eq!(shown, expected);
    }

    #[test]
    fn no_more_zones_are_believed_than_are_there() {
        let zones = [descriptor(3, 1, 0, 0), descriptor(3, 1, 0x20000, 0x20000)];
        assert_eq!(parse(&answer(u32::MAX, &zones), PLACE).unwrap().len(), 2);
        assert_eq!(parse(&answer(64, &zones), PLACE).unwrap().len(), 1);
        assert_eq!(parse(&answer(64, &zones)[..127], PLACE).unwrap().len(), 0);
        assert_eq!(parse(&[0; 63], PLACE), None);
    }

    #[test]
    fn zones_that_cannot_be_are_refused() {
        let alone = |zone: Vec<u8>| parse(&answer(64, &[zone]), PLACE);
        assert_eq!(alone(descriptor(9, 1, 0, 0)), None);
        assert_eq!(alone(descriptor(3, 7, 0, 0)), None);
        assert_eq!(alone(descriptor(3, 1, u64::MAX, 0)), None);
        assert_eq!(alone(descriptor(3, 1, u64::MAX / 512, 0)), None, "ends nowhere");
        assert_eq!(alone(descriptor(3, 1, 0x20000 << 33, 0)), None, "too many zones");
    }
}
