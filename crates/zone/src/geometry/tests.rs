//! Which figures make a device, and what is said of those that do not.

use super::*;

const SPEC: GeometrySpec = GeometrySpec {
    model: Model::HostManaged,
    size: 768 << 20,
    zone_size: 64 << 20,
    zone_capacity: 48 << 20,
    nr_conventional: 2,
    block_size: 4096,
    max_open: 6,
    max_active: 8,
    max_append: 1 << 20,
    zns: Zns::NONE,
};

fn zrwa(size: u64, granularity: u64, count: u32) -> GeometrySpec {
    let zrwa = Some(Zrwa {
        size,
        granularity,
        count,
        explicit_commit: true,
    });
    GeometrySpec {
        zns: Zns { zrwa, ..Zns::NONE },
        ..SPEC
    }
}

fn extension(extension_size: u32) -> GeometrySpec {
    GeometrySpec {
        zns: Zns {
            extension_size,
            ..Zns::NONE
        },
        ..SPEC
    }
}

fn refused(spec: GeometrySpec) -> String {
    Geometry::new(spec).expect_err("refused").to_string()
}

#[test]
fn a_usual_device() {
    let g = Geometry::new(SPEC).expect("valid");
    assert_eq!(
        (g.nr_zones(), g.max_open(), g.max_active(), g.max_append()),
        (12, 6, 8, 1 << 20)
    );
    assert_eq!(g.zone_type(ZoneNo(1)), ZoneType::Conventional);
    assert_eq!(g.zone_type(ZoneNo(2)), ZoneType::SequentialRequired);
    assert_eq!(
        (g.capacity(ZoneNo(1)), g.capacity(ZoneNo(2))),
        (64 << 20, 48 << 20)
    );
    assert_eq!(g.zone_at(128 << 20), Ok(ZoneNo(2)));
    assert_eq!(g.zone_at(1), Err(ZoneError::NotZoneStart { offset: 1 }));
    assert!(matches!(g.zone_at(768 << 20), Err(ZoneError::OutOfRange { .. })));
    assert_eq!(g.zone_of(u64::MAX), ZoneNo(u32::MAX));
}

#[test]
fn zone_sizes_that_are_not_a_power_of_two_and_a_short_last_zone() {
    let g = Geometry::new(GeometrySpec {
        size: 250 * 4096,
        zone_size: 96 * 4096,
        zone_capacity: 90 * 4096,
        nr_conventional: 0,
        ..SPEC
    })
    .expect("valid");
    assert_eq!(g.nr_zones(), 3);
    for zone in g.zones() {
        assert_eq!(g.zone_of(g.start(zone)), zone);
        assert_eq!(g.zone_of(g.end(zone) - 1), zone);
    }
    assert_eq!((g.len(ZoneNo(2)), g.capacity(ZoneNo(2))), (58 * 4096, 58 * 4096));
    assert_eq!(g.capacity(ZoneNo(1)), 90 * 4096);
}

#[test]
fn limits_that_cannot_be_met_are_no_limits() {
    let g = Geometry::new(GeometrySpec {
        max_open: 9,
        max_active: 10,
        ..SPEC
    })
    .expect("valid");
    assert_eq!((g.max_open(), g.max_active()), (9, 0));
    let g = Geometry::new(GeometrySpec {
        max_open: 4_000_000_000,
        max_active: 0,
        ..SPEC
    })
    .expect("valid");
    assert_eq!((g.max_open(), g.max_active()), (0, 0));
    let g = Geometry::new(GeometrySpec {
        max_append: u64::MAX,
        ..SPEC
    })
    .expect("valid");
    assert_eq!(g.max_append(), 48 << 20);
    assert_eq!(
        Geometry::new(GeometrySpec {
            max_append: 0,
            ..SPEC
        })
        .expect("valid")
        .max_append(),
        0
    );
}

#[test]
fn each_impossible_figure_has_its_message() {
    let cases = [
        (
            GeometrySpec {
                block_size: 0,
                ..SPEC
            },
            "block size 0 is not",
        ),
        (
            GeometrySpec {
                block_size: 3000,
                ..SPEC
            },
            "block size 3000 is not",
        ),
        (GeometrySpec { size: 0, ..SPEC }, "device size must not be 0"),
        (
            GeometrySpec {
                size: (1 << 30) + 512,
                ..SPEC
            },
            "; 1073745920 would be",
        ),
        (GeometrySpec { zone_size: 0, ..SPEC }, "zone size must not be 0"),
        (
            GeometrySpec {
                zone_size: 1000,
                ..SPEC
            },
            "zone size 1000 is not a multiple of 512",
        ),
        (
            GeometrySpec {
                zone_size: 1024,
                ..SPEC
            },
            "not a multiple of the block size 4096",
        ),
        (
            GeometrySpec {
                zone_size: 1 << 40,
                ..SPEC
            },
            "bigger than the device",
        ),
        (
            GeometrySpec {
                zone_capacity: 0,
                ..SPEC
            },
            "zone capacity must not be 0",
        ),
        (
            GeometrySpec {
                zone_capacity: 65 << 20,
                ..SPEC
            },
            "bigger than the zone size 67108864",
        ),
        (
            GeometrySpec {
                zone_capacity: 5000,
                ..SPEC
            },
            "zone capacity 5000 is not a multiple",
        ),
        (
            GeometrySpec {
                nr_conventional: 12,
                ..SPEC
            },
            "so at most 11 can be conventional",
        ),
        (
            GeometrySpec {
                nr_conventional: u32::MAX,
                ..SPEC
            },
            "so at most 11 can be conventional",
        ),
        (GeometrySpec { max_open: 9, ..SPEC }, "max open must be at most 8"),
        (
            GeometrySpec {
                max_append: 512,
                ..SPEC
            },
            "less than the block size 4096",
        ),
        (
            GeometrySpec {
                model: Model::HostAware,
                ..zrwa(1 << 20, 65536, 4)
            },
            "for host-managed devices",
        ),
        (zrwa(1 << 20, 0, 4), "granularity 0 is not a multiple"),
        (zrwa(1 << 20, 6000, 4), "not a multiple of the block size 4096"),
        (zrwa(0, 4096, 4), "ZRWA size must not be 0"),
        (
            zrwa(65536, 12288, 4),
            "not a multiple of the ZRWA granularity 12288",
        ),
        (zrwa(256 << 20, 4096, 4), "at most 268431360"),
        (
            GeometrySpec {
                block_size: 512,
                ..zrwa(32 << 20, 512, 4)
            },
            "at most 33553920",
        ),
        (zrwa(1 << 20, 4096, 9), "must be at most 8"),
        (extension(32), "size 32 is not a multiple of 64"),
        (extension(16384), "up to 16320"),
        (
            GeometrySpec {
                size: 1 << 50,
                zone_size: 4096,
                zone_capacity: 4096,
                ..SPEC
            },
            "choose a zone size of at least 67108864",
        ),
        (
            GeometrySpec {
                size: u64::MAX - 511,
                zone_size: 512,
                zone_capacity: 512,
                block_size: 512,
                ..SPEC
            },
            "are too many",
        ),
    ];
    for (spec, message) in cases {
        let said = refused(spec);
        assert!(said.contains(message), "{said:?} does not say {message:?}");
    }
    for spec in [SPEC, zrwa(1 << 20, 65536, 8), extension(16320)] {
        Geometry::new(spec).expect("not everything is refused");
    }
}
