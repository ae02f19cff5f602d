//! Zone reports of a namespace, made sense of.

use zbdkit_spec::nvme::zns::{self, ReportHeader, ZoneDescriptor, ZoneState, ZoneType};
use zbdkit_zone::{Attributes, Condition, Counters, Recommendation, ZoneInfo, ZoneNo, ZoneType as Kind};
use zerocopy::FromBytes;

use super::facts::NamespaceFacts;

/// Bytes of the answer to a report of `zones`, each with `extension` more bytes.
pub(super) fn bytes_of(zones: usize, extension: usize) -> usize {
    size_of::<ReportHeader>() + zones * (size_of::<ZoneDescriptor>() + extension)
}

/// A zone, and its descriptor extension where that was asked for and is valid.
pub(super) type Reported<'a> = (ZoneInfo, Option<&'a [u8]>);

/// The zones of an answer, the first of which is number `first`, with extensions of `extension` bytes. `None` where the answer makes no sense: zones that do not follow one another, or that no namespace of
/// this kind can have.
pub(super) fn parse<'a>(
    answer: &'a [u8],
    first: u32,
    extension: usize,
    facts: &NamespaceFacts,
) -> Option<Vec<Reported<'a>>> {
    let (header, descriptors) = ReportHeader::ref_from_prefix(answer).ok()?;
    let present = usize::try_from(header.nr_zones.get()).unwrap_or(usize::MAX);
    descriptors
        .chunks_exact(size_of::<ZoneDescriptor>() + extension)
        .take(present)
        .zip(first..facts.nr_zones)
        .map(|(bytes, number)| {
            let (zone, extension) = ZoneDescriptor::ref_from_prefix(bytes).ok()?;
            let extension = zone.attributes().zdev().then_some(extension);
            Some((info(zone, number, facts)?, extension))
        })
        .collect()
}

fn info(zone: &ZoneDescriptor, number: u32, facts: &NamespaceFacts) -> Option<ZoneInfo> {
    let bytes = |blocks: u64| blocks.checked_mul(facts.block_size.into());
    let start = bytes(zone.zslba.get())?;
    let capacity = bytes(zone.zcap.get())?;
    let expected = u64::from(number) * facts.zone_size;
    let is_sequential = zone.zone_type() == ZoneType::SEQUENTIAL_WRITE_REQUIRED;
    if start != expected || !is_sequential || capacity > facts.zone_size {
        return None;
    }
    let condition = match zone.state() {
        ZoneState::EMPTY => Condition::Empty,
        ZoneState::IMPLICITLY_OPENED => Condition::ImplicitlyOpen,
        ZoneState::EXPLICITLY_OPENED => Condition::ExplicitlyOpen,
        ZoneState::CLOSED => Condition::Closed,
        ZoneState::READ_ONLY => Condition::ReadOnly,
        ZoneState::FULL => Condition::Full,
        ZoneState::OFFLINE => Condition::Offline,
        _ => return None,
    };
    let wp = match condition {
        Condition::Empty => start,
        Condition::Full => start + capacity,
        // Invalid in read-only and offline zones, which may show anything.
        _ => bytes(zone.wp.get())
            .filter(|wp| (start..=start + capacity).contains(wp))
            .unwrap_or(start),
    };
    Some(ZoneInfo {
        zone: ZoneNo(number),
        start,
        len: facts.zone_size,
        capacity,
        wp,
        written_end: wp,
        kind: Kind::SequentialRequired,
        condition,
        counters: Counters::default(),
        attributes: attributes(zone.za),
    })
}

fn attributes(za: u8) -> Attributes {
    let za = zns::Attributes::from_bits(za);
    Attributes {
        finished_by_device: za.zfc(),
        recommended: match (za.rzr(), za.fzr()) {
            (true, _) => Some(Recommendation::Reset),
            (false, true) => Some(Recommendation::Finish),
            (false, false) => None,
        },
        zrwa: za.zrwav(),
        extension: za.zdev(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_device::nvme::facts::tests_support::facts;
    use zerocopy::IntoBytes;

    fn descriptor(zslba: u64, state: u8, wp: u64) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[0] = 2;
        bytes[1] = state << 4;
        bytes[8..16].copy_from_slice(&0x3000u64.to_le_bytes());
        bytes[16..24].copy_from_slice(&zslba.to_le_bytes());
        bytes[24..32].copy_from_slice(&wp.to_le_bytes());
        bytes
    }

    fn answer(nr_zones: u64, zones: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..8].copy_from_slice(nr_zones.as_bytes());
        bytes.extend(zones.concat());
        bytes
    }

    fn conditions(answer: &[u8], first: u32) -> Option<Vec<(Condition, u64)>> {
        let zones = parse(answer, first, 0, &facts())?;
        Some(zones.iter().map(|(zone, _)| (zone.condition, zone.wp)).collect())
    }

    #[test]
    fn blocks_become_bytes_and_pointers_that_mean_nothing_are_not_shown() {
        let zones = [
            descriptor(0x4000, 4, 0x4008),
            descriptor(0x8000, 0xe, u64::MAX),
            descriptor(0xc000, 0xf, u64::MAX),
        ];
        let expected = [
            (Condition::Closed, 0x4008 * 4096),
            (Condition::Full, (0x8000 + 0x3000) * 4096),
            (Condition::Offline, 0xc000 * 4096),
        ];
        assert_eq!(conditions(&answer(3, &zones), 1).unwrap(), expected);
    }

    #[test]
    fn no_more_zones_are_believed_than_are_there() {
        let zones = [descriptor(0, 1, 0), descriptor(0x4000, 1, 0x4000)];
        assert_eq!(conditions(&answer(u64::MAX, &zones), 0).unwrap().len(), 2);
        assert_eq!(conditions(&answer(1, &zones), 0).unwrap().len(), 1);
        assert_eq!(conditions(&answer(1, &zones)[..100], 0).unwrap().len(), 0);
        assert_eq!(conditions(&[0; 63], 0), None);
    }

    #[test]
    fn zones_that_do_not_follow_or_cannot_be_are_refused() {
        let alone = |zone: Vec<u8>| conditions(&answer(1, &[zone]), 1);
        assert_eq!(alone(descriptor(0x8000, 1, 0)), None, "another zone");
        assert_eq!(alone(descriptor(u64::MAX, 1, 0)), None);
        assert_eq!(alone(descriptor(0x4000, 7, 0)), None, "no such state");
        let mut conventional = descriptor(0x4000, 1, 0);
        conventional[0] = 1;
        assert_eq!(alone(conventional), None);
        let mut large = descriptor(0x4000, 1, 0);
        large[8..16].copy_from_slice(&0x4001u64.to_le_bytes());
        assert_eq!(alone(large), None, "capacity above size");
    }

    #[test]
    fn an_extension_is_shown_where_it_is_valid() {
        let mut with = descriptor(0, 4, 0);
        with[2] = 0x80;
        with.extend([7; 64]);
        let mut without = descriptor(0x4000, 1, 0x4000);
        without.extend([9; 64]);
        let bytes = answer(2, &[with, without]);
        let zones = parse(&bytes, 0, 64, &facts()).unwrap();
        assert_eq!((zones[0].1, zones[1].1), (Some(&[7; 64][..]), None));
    }
}
