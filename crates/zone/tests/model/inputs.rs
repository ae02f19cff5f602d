//! What is tried: devices, what their zones held before, and steps.

use proptest::prelude::*;
use zbdkit_zone::{
    CloseEmpty, ExclusiveOp, Geometry, GeometrySpec, Model, Recommendation, Zns, ZoneNo, ZoneRecord, Zrwa,
};

use crate::{At, Step};

pub fn geometry() -> impl Strategy<Value = Geometry> {
    let zones = prop_oneof![2 => 1u64..=3, 1 => 4u64..=7];
    let shape = (1u64..=12, zones, 0u64..12, any::<u64>());
    let limits = (0u32..=5, 0u32..=5, 0u64..=8);
    let zns = (0u64..=4, 1u64..=3, 0u32..=3, 0u32..=1);
    (
        any::<bool>(),
        prop_oneof![Just(512u32), Just(4096)],
        shape,
        any::<u32>(),
        limits,
        zns,
    )
        .prop_map(
            |(
                aware,
                block_size,
                (zone, full, rest, capacity),
                conventional,
                (max_active, max_open, append),
                (granules, granularity, areas, extension),
            )| {
                let block = u64::from(block_size);
                let zones = full + u64::from(!rest.is_multiple_of(zone));
                let max_open = if max_active == 0 {
                    max_open
                } else {
                    max_open.min(max_active)
                };
                let capacity = 1 + capacity % zone;
                let zrwa = Zrwa {
                    size: granules * granularity * block,
                    granularity: granularity * block,
                    count: areas.min(if max_active == 0 { areas } else { max_active }),
                    explicit_commit: true,
                };
                let has_areas = !aware && granules != 0 && zrwa.size <= capacity * block;
                Geometry::new(GeometrySpec {
                    model: if aware {
                        Model::HostAware
                    } else {
                        Model::HostManaged
                    },
                    size: (full * zone + rest % zone) * block,
                    zone_size: zone * block,
                    zone_capacity: capacity * block,
                    nr_conventional: if conventional.is_multiple_of(3) {
                        conventional / 3 % zones as u32
                    } else {
                        0
                    },
                    block_size,
                    max_open,
                    max_active,
                    max_append: append * block,
                    zns: Zns {
                        zrwa: has_areas.then_some(zrwa),
                        extension_size: if aware { 0 } else { 64 * extension },
                    },
                })
                .expect("valid")
            },
        )
}

/// What persisted of the zones: most are as new.
pub fn records(geometry: &Geometry, seeds: &[u16]) -> Vec<ZoneRecord> {
    let block = u64::from(geometry.block_size());
    let record = |zone: ZoneNo| {
        let seed = seeds[zone.0 as usize % seeds.len()];
        let sequential = !geometry.is_conventional(zone);
        let blocks = if seed.is_multiple_of(3) && sequential {
            u64::from(seed) / 3
        } else {
            0
        };
        let mut written = blocks % (geometry.capacity(zone) / block + 1) * block;
        let finished = seed % 11 == 1 && sequential;
        let area = geometry
            .zrwa()
            .filter(|_| sequential && seed % 7 == 4 && !finished);
        let below = |area: Zrwa| written / area.granularity * area.granularity;
        let zrwa = area.is_some_and(|area| below(area) < geometry.capacity(zone));
        written = area.filter(|_| zrwa).map_or(written, below);
        ZoneRecord {
            written,
            finished,
            zrwa,
            extension: (sequential && seed % 5 == 1 && geometry.extension_size() != 0).then_some(seed.into()),
            read_only: seed % 17 == 2 && seed % 19 != 3,
            offline: seed % 19 == 3,
            ..ZoneRecord::default()
        }
    };
    geometry.zones().map(record).collect()
}

fn result() -> impl Strategy<Value = Result<(), i32>> {
    prop_oneof![6 => Just(Ok(())), 1 => (1..200).prop_map(Err)]
}

pub fn steps() -> impl Strategy<Value = Step> {
    let zone = || any::<u32>();
    let which = || any::<usize>();
    let at = prop_oneof![6 => Just(At::Next), 2 => (0u64..14).prop_map(At::Block),
        1 => (0u64..9000).prop_map(At::Byte)];
    let op = prop_oneof![4 => Just(ExclusiveOp::Reset), 2 => Just(ExclusiveOp::Finish), 1 => Just(ExclusiveOp::FinishUnlimited),
        1 => Just(ExclusiveOp::Format),
        1 => Just(ExclusiveOp::SetReadOnly), 1 => Just(ExclusiveOp::SetOffline),
        2 => Just(ExclusiveOp::SetNormal), 6 => Just(ExclusiveOp::OpenZrwa),
        1 => Just(ExclusiveOp::FinishByDevice),
        2 => any::<(u32, bool)>().prop_map(|(checksum, zrwa)| ExclusiveOp::SetExtension { checksum, zrwa }),
        1 => Just(ExclusiveOp::Recommend(Some(Recommendation::Finish))),
        1 => Just(ExclusiveOp::Recommend(Some(Recommendation::Reset))),
        1 => Just(ExclusiveOp::Recommend(None))];
    let empty = prop_oneof![Just(CloseEmpty::ToEmpty), Just(CloseEmpty::ToClosed)];
    let skew = prop_oneof![9 => Just(0u64), 1 => 0u64..5000];
    prop_oneof![
        8 => (zone(), at, 0u64..6, which())
            .prop_map(|(zone, at, blocks, lane)| Step::Write { zone, at, blocks, lane }),
        6 => (zone(), 0u64..5, which(), skew)
            .prop_map(|(zone, blocks, lane, skew)| Step::Append { zone, blocks, lane, skew }),
        10 => (which(), result()).prop_map(|(which, result)| Step::Complete { which, result }),
        8 => (which(), result()).prop_map(|(which, result)| Step::Acknowledge { which, result }),
        3 => (zone(), 0u64..30_000, 0u64..20_000)
            .prop_map(|(zone, from, bytes)| Step::Read { zone, from, bytes }),
        3 => which().prop_map(|which| Step::EndRead { which }),
        2 => zone().prop_map(|zone| Step::Open { zone }),
        2 => (zone(), empty).prop_map(|(zone, empty)| Step::Close { zone, empty }),
        3 => (zone(), op).prop_map(|(zone, op)| Step::Begin { zone, op }),
        3 => (which(), any::<bool>()).prop_map(|(which, commit)| Step::End { which, commit }),
        2 => (zone(), 0u64..7, prop_oneof![9 => Just(0u64), 1 => 0u64..5000])
            .prop_map(|(zone, blocks, skew)| Step::CommitZrwa { zone, blocks, skew }),
    ]
}
