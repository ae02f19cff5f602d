//! What the crash tests share: how much is tried, and how it is told.
//!
//! `ZBDKIT_CRASH_STATES=N` makes each campaign judge so many states instead of its small share, `ZBDKIT_CRASH_SEED` gives
//! other histories; a failure prints the value of `ZBDKIT_CRASH_REPLAY` with which it can be seen alone.

#![allow(dead_code, reason = "each of the tests uses a part")]

use zbdkit_block::{CreateOptions, ZnsOptions};
use zbdkit_testkit::crash::host::{Fault, FaultKind, Lie, Role};
use zbdkit_testkit::crash::image::Image;
use zbdkit_testkit::crash::run::Plan;
use zbdkit_testkit::crash::suite::{Case, Crash, Effort, Tally, Violation, campaign, exhaust};
use zbdkit_testkit::crash::workload::Mix;
use zbdkit_zone::Model;

/// Where the histories come from.
pub const SEED: u64 = 0x5eed_0001;

/// Two conventional zones and eight sequential ones of 64 KiB, 48 KiB of each to be written.
pub fn host_managed() -> CreateOptions {
    CreateOptions {
        zone_size: Some(64 << 10),
        zone_capacity: Some(48 << 10),
        conventional_zones: 2,
        max_open: Some(3),
        max_active: 5,
        max_append: Some(16 << 10),
        ..CreateOptions::new("", 640 << 10)
    }
}

/// Eight zones of 64 KiB that may be written anywhere.
pub fn host_aware() -> CreateOptions {
    CreateOptions {
        model: Model::HostAware,
        zone_size: Some(64 << 10),
        ..CreateOptions::new("", 512 << 10)
    }
}

/// The same zones with areas of four blocks that move two at a time, two of them at once, and extensions of two sectors.
pub fn zoned_namespace() -> CreateOptions {
    CreateOptions {
        zns: ZnsOptions {
            zrwa_size: Some(16 << 10),
            zrwa_granularity: Some(8 << 10),
            max_zrwa: Some(2),
            extension_size: 1024,
        },
        ..host_managed()
    }
}

/// The same zones as a namespace has them: all of them sequential, so that it can be formatted.
pub fn formattable() -> CreateOptions {
    CreateOptions {
        conventional_zones: 0,
        ..zoned_namespace()
    }
}

/// More zones than a table block holds.
pub fn many_zones() -> CreateOptions {
    CreateOptions {
        zone_size: Some(16 << 10),
        zone_capacity: Some(12 << 10),
        max_active: 0,
        ..CreateOptions::new("", 140 * (16 << 10))
    }
}

pub fn case(name: &'static str, image: impl Into<Image>, mix: Mix) -> Case {
    Case {
        name,
        image: image.into(),
        plan: Plan::new(mix, 5, 25),
        crash: None,
    }
}

pub fn mapped(mut case: Case) -> Case {
    case.plan.behaviour.mapped = true;
    case
}

pub fn failing(mut case: Case, role: Role, kind: FaultKind, errno: i32) -> Case {
    let fault = Fault {
        role,
        kind,
        after: 1,
        errno,
    };
    case.plan.behaviour.fault = Some(fault);
    case
}

/// States of each history.
const STATES: u64 = 25;

/// Runs a campaign of `share` histories, or as many as the environment asks for, of about `states` states each.
pub fn tried(
    name: &str,
    share: u64,
    states: u64,
    run: impl FnOnce(Effort, u64, Option<&str>, &mut Tally) -> Result<(), Violation>,
) {
    let wanted = std::env::var("ZBDKIT_CRASH_STATES").ok();
    let wanted = wanted.map(|n| n.parse::<u64>().expect("ZBDKIT_CRASH_STATES is a number"));
    let effort = Effort {
        histories: wanted.map_or(share, |wanted| wanted.div_ceil(states)),
        states: STATES,
        again: 4,
    };
    let replay = std::env::var("ZBDKIT_CRASH_REPLAY").ok();
    let seed = std::env::var("ZBDKIT_CRASH_SEED")
        .map_or(SEED, |seed| seed.parse().expect("ZBDKIT_CRASH_SEED is a number"));
    let mut tally = Tally::default();
    let result = run(effort, seed, replay.as_deref(), &mut tally);
    println!(
        "{name}: {} states judged; distinct: {} after a kill, {} after a power cut; {} repaired first",
        tally.states,
        tally.kills.len(),
        tally.power_cuts.len(),
        tally.repaired
    );
    if let Err(violation) = result {
        panic!("{violation}");
    }
}

/// The case keeps the contract.
pub fn hold(case: Case, share: u64) {
    tried(case.name, share, STATES, |effort, seed, replay, tally| {
        campaign(&case, effort, seed, replay, tally)
    });
}

/// Every crash of some short histories must be allowed: all states that there are, up to `most` a moment.
pub fn hold_every(mut case: Case, most: u64) {
    case.plan.clients = 2;
    case.plan.requests = 4;
    let mut total = 0;
    for number in 0..4 {
        let result = exhaust(&case, SEED + number, most, &mut Tally::default());
        total += result.unwrap_or_else(|violation| panic!("{violation}"));
    }
    println!(
        "{}: {total} states, all that there are up to {most} a moment",
        case.name
    );
}

/// The case must be found out within the normal number of states; how.
pub fn caught(mut case: Case, lie: Lie, crash: Crash) -> String {
    case.plan.behaviour.lie = Some(lie);
    case.crash = Some(crash);
    let effort = Effort {
        histories: 12,
        states: STATES,
        again: 0,
    };
    let result = campaign(&case, effort, SEED, None, &mut Tally::default());
    let violation = result.expect_err("the lie was not found out");
    println!("{lie:?}: {}", violation.what.lines().next().unwrap_or_default());
    violation.what
}
