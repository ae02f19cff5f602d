use zbdkit_block::host_device::sysfs::ZoneFacts;
use zbdkit_zone::{Geometry, GeometrySpec, Model, Zns, Zrwa};

use super::*;

const SPEC: GeometrySpec = GeometrySpec {
    model: Model::HostManaged,
    size: 1 << 30,
    zone_size: 64 << 20,
    zone_capacity: 48 << 20,
    nr_conventional: 0,
    block_size: 4096,
    max_open: 6,
    max_active: 8,
    max_append: 64 << 10,
    zns: Zns::NONE,
};

fn limits(spec: GeometrySpec) -> Limits {
    Limits {
        zoned: Some(Geometry::new(spec).unwrap()),
        ..Limits::plain(spec.size, spec.block_size, true)
    }
}

fn facts() -> BlockFacts {
    BlockFacts {
        zones_by_command: false,
        name: "nullb0".into(),
        number: "252:0".parse().unwrap(),
        partition_of: None,
        size: SPEC.size,
        read_only: false,
        logical_block_size: 4096,
        physical_block_size: 4096,
        scheduler: Some("none".into()),
        write_back: Some(true),
        holders: Vec::new(),
        zones: Some(ZoneFacts {
            model: Model::HostManaged,
            zone_size: SPEC.zone_size,
            nr_zones: 16,
            max_open: 6,
            max_active: 8,
            max_append: 64 << 10,
            write_granularity: 4096,
        }),
    }
}

/// A null_blk that nobody uses.
fn free() -> Examination {
    Examination {
        path: "/dev/nullb0".into(),
        facts: Some(facts()),
        access: Access {
            read: true,
            write: true,
            group: 6,
            mode: 0o660,
        },
        denied: None,
        group: Some("disk".into()),
        users: Vec::new(),
        claimed: Some(false),
        zones: Some(Ok(Counts::default())),
        advice: None,
        opened: Some(Ok(limits(SPEC))),
    }
}

#[test]
fn a_free_zoned_device_is_usable_and_shows_what_a_guest_sees() {
    assert_eq!(
        free().report().lines(false),
        "\
ok       device          host-managed, 1 GiB, 16 zones of 64 MiB; may be open: 6, active: 8; blocks of 4096 bytes
ok       permissions     may be read and written
ok       in use          by nobody
ok       scheduler       none; any will do, one write of a zone is under way at a time
ok       cache mode      past the page cache only (cache.direct=on, io -n, serve --direct); the drive's own cache is \
         emptied by flushes
ok       zones           0 conventional, 0 open, 0 read-only, 0 offline
ok       opening         opens as driver=host_device,filename=/dev/nullb0,cache.direct=on
ok       vhost-user-blk  a guest sees 1 GiB in blocks of 4096 bytes, zones of 64 MiB, max open 6, max active 8, \
         appends up to 64 KiB, writes in multiples of 4096 bytes
note     nvme            by zbdkit serve --nvme, where no zone is conventional
/dev/nullb0: usable
"
    );
    assert_eq!(free().report().lines(true), "");
}

#[test]
fn zones_that_the_kernel_does_not_show_are_those_of_the_opened_drive() {
    let hidden = Examination {
        facts: Some(BlockFacts {
            zones: None,
            ..facts()
        }),
        zones: None,
        ..free()
    };
    let by_itself = Examination {
        facts: None,
        zones: None,
        ..free()
    };
    let zones = "host-managed, 1 GiB, 16 zones of 64 MiB; may be open: 6, active: 8; blocks of 4096 bytes";
    assert_eq!(hidden.findings()[0].says, zones);
    assert_eq!(by_itself.findings()[0].says, format!("character device: {zones}"));
    let plain = Examination {
        opened: None,
        ..hidden
    };
    assert!(plain.findings()[0].says.ends_with("an ordinary disk"));
}

#[test]
fn areas_extensions_and_advice_are_told_where_there_are_any() {
    let zns = Zns {
        zrwa: Some(Zrwa {
            size: 1 << 20,
            granularity: 64 << 10,
            count: 1,
            explicit_commit: false,
        }),
        extension_size: 128,
    };
    let advice = ZoneAdvice {
        open: Some(128),
        non_sequential: Some(16),
        reads_above_pointer: true,
    };
    let has_all = Examination {
        advice: Some(advice),
        opened: Some(Ok(limits(GeometrySpec { zns, ..SPEC }))),
        ..free()
    };
    let lines = has_all.report().lines(false);
    for line in [
        "ok       random writes   random write areas of 1 MiB in one zone at a time, committed by multiples of 64 KiB; not \
         by command, only by writes behind them\n",
        "ok       extensions      each zone's descriptor can have 128 bytes more\n",
        "note     advice          best with at most 128 zones open, 16 written out of order\n",
    ] {
        assert!(lines.contains(line), "{line:?} is not in {lines}");
    }
    assert!(has_all.report().usable);
}

/// What is a problem, each with its fix.
fn problems(examination: &Examination) -> Vec<(&'static str, String, Option<String>)> {
    let findings = examination.findings().into_iter();
    let problems = findings.filter(|finding| finding.verdict == Verdict::Problem);
    problems
        .map(|finding| (finding.about, finding.says, finding.fix))
        .collect()
}

#[test]
fn each_use_is_a_problem_with_its_fix() {
    let used = Examination {
        users: vec![
            User::Mount("/mnt/my data".into()),
            User::Swap,
            User::Holder("dm-0".into()),
        ],
        claimed: Some(true),
        opened: None,
        ..free()
    };
    let fixes: Vec<_> = problems(&used)
        .into_iter()
        .map(|(_, _, fix)| fix.unwrap())
        .collect();
    assert_eq!(
        fixes,
        [
            "unmount it (umount /mnt/my data)",
            "turn that off (swapoff)",
            "take dm-0 apart (dmsetup remove, mdadm --stop)"
        ]
    );
    assert!(!used.report().usable);
    let unseen = Examination {
        claimed: Some(true),
        opened: None,
        ..free()
    };
    assert_eq!(problems(&unseen).len(), 1);
}

#[test]
fn a_process_is_a_problem_only_where_it_keeps_others_out() {
    let process = User::Process {
        pid: 42,
        name: "fio".into(),
    };
    let shared = Examination {
        users: vec![process],
        ..free()
    };
    assert_eq!(problems(&shared), []);
    let claimed = Examination {
        claimed: Some(true),
        ..shared
    };
    let problems = problems(&claimed);
    assert_eq!(problems.len(), 1);
    assert!(problems[0].1.contains("fio (process 42)"), "{problems:?}");
}

#[test]
fn missing_permissions_name_the_group_that_has_them() {
    let denied = |mode| {
        let examination = Examination {
            access: Access {
                read: false,
                write: false,
                group: 6,
                mode,
            },
            zones: None,
            opened: None,
            ..free()
        };
        let problems = problems(&examination);
        assert_eq!(problems.len(), 1, "one cause, one problem: {problems:?}");
        problems[0].2.clone().unwrap()
    };
    assert!(denied(0o660).contains("join the group disk"));
    assert!(denied(0o600).contains("setfacl -m u:$USER:rw /dev/nullb0"));
}

#[test]
fn a_denied_opening_is_a_problem_though_the_mode_allows_it() {
    let denied = Examination {
        denied: Some("Operation not permitted".into()),
        zones: None,
        opened: None,
        claimed: None,
        ..free()
    };
    let problems = problems(&denied);
    assert_eq!(problems.len(), 1);
    assert_eq!(
        (problems[0].0, &*problems[0].1),
        ("permissions", "Operation not permitted")
    );
}

#[test]
fn a_partition_of_a_zoned_disk_is_refused_and_the_disk_named() {
    let partition = Examination {
        facts: Some(BlockFacts {
            partition_of: Some("sdb".into()),
            ..facts()
        }),
        ..free()
    };
    let problems = problems(&partition);
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].2.as_deref(), Some("use /dev/sdb"));
}

#[test]
fn a_door_that_cannot_carry_the_zones_says_why() {
    let odd = Examination {
        opened: Some(Ok(limits(GeometrySpec {
            zone_size: 48 << 20,
            size: 960 << 20,
            ..SPEC
        }))),
        ..free()
    };
    let problems = problems(&odd);
    assert_eq!(problems[0].0, "vhost-user-blk");
    assert!(problems[0].1.contains("must be a power of two"), "{problems:?}");
}

#[test]
fn what_cannot_be_opened_or_reported_is_a_problem_in_the_systems_words() {
    let broken = Examination {
        zones: Some(Err("Input/output error".into())),
        opened: Some(Err("/dev/nullb0: gone".into())),
        ..free()
    };
    let said: Vec<_> = problems(&broken).into_iter().map(|(_, says, _)| says).collect();
    assert_eq!(said, ["no report: Input/output error", "/dev/nullb0: gone"]);
    let some_offline = Examination {
        zones: Some(Ok(Counts {
            offline: 1,
            ..Counts::default()
        })),
        ..free()
    };
    assert!(some_offline.report().usable, "the other zones are");
}
