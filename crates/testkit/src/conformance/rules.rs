//! Rules: limits, conditions, resources, reports, errors, what the operator sets.

use zbdkit_block::{CrossZone, Error, ZoneOp};
use zbdkit_zone::{CloseEmpty, Condition, Filter, ZoneError, ZoneNo};

use super::{Keeper, Outcome, Subject, ensure, ok, refused};

pub async fn limits(s: &Subject<'_>) -> Outcome {
    let (limits, geometry) = (s.device.limits(), &s.geometry);
    ensure!(!limits.read_only, "it is read-only");
    ensure!(
        limits.size == geometry.size(),
        "its size is {}, its zones' {}",
        limits.size,
        geometry.size()
    );
    ensure!(limits.block_size == geometry.block_size(), "block sizes differ");
    ensure!(s.count() >= 3, "the suites need three sequential zones");
    ensure!(
        (0..s.count()).all(|n| geometry.capacity(s.zone(n)) >= 4 * s.block()),
        "the suites need zones of four blocks"
    );
    s.works().await
}

pub async fn transitions(s: &Subject<'_>) -> Outcome {
    let (zone, block) = (s.zone(1), s.block());
    let close = ZoneOp::Close(CloseEmpty::ToEmpty);
    ok(s.op(zone, ZoneOp::Open).await, "an open")?;
    s.is(zone, Condition::ExplicitlyOpen, 0).await?;
    ok(s.op(zone, close).await, "a close")?;
    match s.keeper {
        Keeper::Engine => {
            s.is(zone, Condition::Empty, 0).await?;
            ok(s.op(zone, ZoneOp::Open).await, "an open")?;
            ok(
                s.op(zone, ZoneOp::Close(CloseEmpty::ToClosed)).await,
                "a close as ZNS has it",
            )?;
            s.is(zone, Condition::Closed, 0).await?;
        }
        Keeper::Namespace => {
            s.is(zone, Condition::Closed, 0).await?;
            refused!(
                s.op(s.zone(0), close).await,
                Error::Zone(ZoneError::InvalidTransition { .. }),
                "a close of an empty zone"
            );
        }
        Keeper::Drive => {}
    }
    ok(s.write(s.start(zone), block, 1).await, "a write to a closed zone")?;
    s.is(zone, Condition::ImplicitlyOpen, block).await?;
    ok(
        s.op(zone, ZoneOp::Open).await,
        "an open of an implicitly open zone",
    )?;
    s.is(zone, Condition::ExplicitlyOpen, block).await?;
    ok(s.op(zone, close).await, "a close")?;
    s.is(zone, Condition::Closed, block).await?;
    ok(s.op(zone, close).await, "a close of a closed zone")?;
    let before = s.info(zone).await?.counters;
    ok(s.op(zone, ZoneOp::Finish).await, "a finish")?;
    s.is(zone, Condition::Full, block).await?;
    s.holds(s.start(zone), block, 1).await?;
    s.unwritten(s.start(zone) + block, s.geometry.len(zone) - block)
        .await?;
    ok(s.op(zone, ZoneOp::Finish).await, "a finish of a full zone")?;
    // ZBC lets it pass without effect, the others refuse it.
    match s.op(zone, ZoneOp::Open).await {
        Ok(()) if !s.is_engine() => s.is(zone, Condition::Full, block).await?,
        opened => refused!(
            opened,
            Error::Zone(ZoneError::InvalidTransition { .. }),
            "an open of a full zone"
        ),
    }
    if !s.is_preferred() {
        refused!(
            s.write(s.start(zone) + block, block, 1).await,
            Error::Zone(ZoneError::Full { .. }),
            "a write to a finished zone"
        );
    }
    ok(s.op(zone, ZoneOp::Reset).await, "a reset of a finished zone")?;
    s.is(zone, Condition::Empty, 0).await?;
    let after = s.info(zone).await?.counters;
    ensure!(
        !s.is_engine() || (after.resets, after.finishes) == (before.resets + 1, before.finishes + 1),
        "one reset and one finish were counted as {before:?} to {after:?}"
    );
    ok(s.op(zone, ZoneOp::Reset).await, "a reset of an empty zone")?;
    s.works().await
}

pub async fn resources(s: &Subject<'_>) -> Outcome {
    let (open, active) = (s.geometry.max_open(), s.geometry.max_active());
    let block = s.block();
    if open > 0 && s.count() > open {
        for n in 0..open {
            ok(s.op(s.zone(n), ZoneOp::Open).await, "an open within the limit")?;
        }
        refused!(
            s.write(s.start(s.zone(open)), block, 1).await,
            Error::Zone(ZoneError::TooManyOpen { .. } | ZoneError::TooManyActive { .. }),
            "a write that needs one more open zone"
        );
        s.is(s.zone(open), Condition::Empty, 0).await?;
        for n in 0..open {
            ok(
                s.op(s.zone(n), ZoneOp::Close(CloseEmpty::ToEmpty)).await,
                "a close",
            )?;
        }
        // Implicitly open zones make room for others.
        let room = if active == 0 {
            s.count()
        } else {
            active.min(s.count())
        };
        for n in 0..room {
            ok(
                s.write(s.start(s.zone(n)), block, 1).await,
                "a write that closes another zone implicitly",
            )?;
        }
        let opened = s.report(Filter::ImplicitlyOpen).await?.len() as u32;
        ensure!(opened <= open, "{opened} zones are open, more than {open}");
        s.renew().await?;
    }
    if active > 0 && s.count() > active {
        for n in 0..active {
            ok(
                s.write(s.start(s.zone(n)), block, 1).await,
                "a write within the limits",
            )?;
        }
        refused!(
            s.write(s.start(s.zone(active)), block, 1).await,
            Error::Zone(ZoneError::TooManyActive { .. }),
            "a write that needs one more active zone"
        );
        ok(
            // An open zone: null_blk refuses to finish a closed one while every open zone is in use.
            s.op(s.zone(active - 1), ZoneOp::Finish).await,
            "a finish, which frees a resource",
        )?;
        ok(
            s.write(s.start(s.zone(active)), block, 1).await,
            "a write that the finish made room for",
        )?;
        s.renew().await?;
    }
    s.works().await
}

pub async fn reports(s: &Subject<'_>) -> Outcome {
    let block = s.block();
    ok(s.write(s.start(s.zone(0)), block, 1).await, "a write")?;
    ok(s.op(s.zone(1), ZoneOp::Finish).await, "a finish")?;
    let all = s.report(Filter::All).await?;
    ensure!(
        all.len() as u32 == s.geometry.nr_zones(),
        "{} zones reported",
        all.len()
    );
    for (number, info) in all.iter().enumerate() {
        let zone = ZoneNo(number as u32);
        ensure!(
            (info.zone, info.start, info.len, info.capacity, info.kind)
                == (
                    zone,
                    s.start(zone),
                    s.geometry.len(zone),
                    s.geometry.capacity(zone),
                    s.geometry.zone_type(zone)
                ),
            "zone {number} is reported as {info:?}"
        );
    }
    let full = s.report(Filter::Full).await?;
    ensure!(
        full.len() == 1 && full[0].zone == s.zone(1),
        "full zones: {full:?}"
    );
    let empty = s.report(Filter::Empty).await?;
    ensure!(empty.len() as u32 == s.count() - 2, "{} empty zones", empty.len());
    let two = ok(
        s.device.report(s.start(s.zone(1)) + block, Filter::All, 2).await,
        "a report from inside a zone",
    )?;
    ensure!(
        two.len() == 2 && two[0].zone == s.zone(1) && two[1].zone == s.zone(2),
        "a report of two zones from zone {}: {two:?}",
        s.zone(1)
    );
    refused!(
        s.device.report(s.geometry.size(), Filter::All, 1).await,
        Error::OutOfRange { .. },
        "a report from past the end"
    );
    s.works().await
}

pub async fn errors(s: &Subject<'_>) -> Outcome {
    let (zone, block, size) = (s.zone(0), s.block(), s.geometry.size());
    let start = s.start(zone);
    refused!(
        s.write(size, block, 1).await,
        Error::OutOfRange { .. },
        "a write past the end"
    );
    refused!(
        s.write(u64::MAX - block + 1, block, 1).await,
        Error::OutOfRange { .. },
        "a write at the end of numbers"
    );
    refused!(
        s.read(size - block, 2 * block, CrossZone::Allow).await,
        Error::OutOfRange { .. },
        "a read past the end"
    );
    if block > 512 {
        refused!(
            s.write(start, block / 2, 1).await,
            Error::Unaligned { .. } | Error::Zone(ZoneError::Unaligned { .. }),
            "a write of half a block"
        );
        refused!(
            s.write(start + block / 2, block, 1).await,
            Error::Unaligned { .. } | Error::Zone(ZoneError::Unaligned { .. }),
            "a write at half a block"
        );
    }
    ok(s.write(start, 0, 1).await, "a write of nothing")?;
    s.is(zone, Condition::Empty, 0).await?;
    let end = s.geometry.end(zone);
    if !s.is_preferred() {
        refused!(
            s.read(end - block, 2 * block, CrossZone::Refuse).await,
            Error::Zone(ZoneError::Boundary { .. }),
            "a read across zones where that is refused"
        );
    }
    ok(
        s.read(end - block, 2 * block, CrossZone::Allow).await,
        "a read across zones where that is allowed",
    )?;
    refused!(
        s.device.zone_op(&s.lane, ZoneOp::Reset, start + block).await,
        Error::Zone(ZoneError::NotZoneStart { .. }),
        "an operation that names no zone's start"
    );
    refused!(
        s.device.zone_op(&s.lane, ZoneOp::Reset, size).await,
        Error::Zone(ZoneError::OutOfRange { .. } | ZoneError::NotZoneStart { .. }) | Error::OutOfRange { .. },
        "an operation past the end"
    );
    s.works().await
}

pub async fn operator(s: &Subject<'_>) -> Outcome {
    let (zone, block) = (s.zone(0), s.block());
    let start = s.start(zone);
    ok(s.write(start, block, 6).await, "a write")?;
    ok(s.op(zone, ZoneOp::SetReadOnly).await, "setting a zone read-only")?;
    s.is(zone, Condition::ReadOnly, block).await?;
    refused!(
        s.write(start + block, block, 1).await,
        Error::Zone(ZoneError::ReadOnly { .. }),
        "a write"
    );
    refused!(
        s.op(zone, ZoneOp::Reset).await,
        Error::Zone(ZoneError::ReadOnly { .. }),
        "a reset"
    );
    ok(s.device.reset_all(&s.lane).await, "a reset of all zones")?;
    s.is(zone, Condition::ReadOnly, block).await?;
    s.holds(start, block, 6).await?;
    ok(s.op(zone, ZoneOp::SetOffline).await, "setting a zone offline")?;
    s.is(zone, Condition::Offline, block).await?;
    refused!(
        s.read(start, block, CrossZone::Refuse).await,
        Error::Zone(ZoneError::Offline { .. }),
        "a read of an offline zone"
    );
    refused!(
        s.op(zone, ZoneOp::Reset).await,
        Error::Zone(ZoneError::Offline { .. }),
        "a reset"
    );
    ok(s.op(zone, ZoneOp::SetNormal).await, "setting a zone normal")?;
    s.is(zone, Condition::Closed, block).await?;
    s.holds(start, block, 6).await?;
    ok(
        s.write(start + block, block, 7).await,
        "a write to a zone that is normal again",
    )?;
    s.works().await
}
