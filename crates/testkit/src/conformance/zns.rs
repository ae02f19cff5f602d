//! What only Zoned Namespaces have: random write areas and descriptor extensions.

use zbdkit_block::{Error, ZoneOp};
use zbdkit_zone::{CloseEmpty, Condition, ZoneNo, Zrwa};

use super::{Outcome, Subject, ensure, ok};

/// Refused by a rule of zones, by whichever the device names.
fn refused(result: Result<(), Error>, what: &str) -> Outcome {
    match result {
        Err(Error::Zone(_) | Error::NotSupported(_)) => Ok(()),
        other => Err(format!("{what}: {other:?} instead of a refusal")),
    }
}

async fn commit(s: &Subject<'_>, end: u64) -> Result<(), Error> {
    s.observe(
        format_args!("a commit up to {end}"),
        s.device.commit_zrwa(&s.lane, end).await,
    )
    .await
}

/// The zone's pointer, bytes from its start, and whether it has an area.
async fn pointer(s: &Subject<'_>, zone: ZoneNo, at: u64, area: bool) -> Outcome {
    let info = s.info(zone).await?;
    ensure!(
        info.wp == info.start + at && info.attributes.zrwa == area,
        "zone {zone} has its pointer at {} and area {}, and should have {at} and {area}",
        info.wp - info.start,
        info.attributes.zrwa
    );
    Ok(())
}

/// Blocks are written in any order, and again; writes behind the area and commits move the pointer.
pub async fn areas(s: &Subject<'_>) -> Outcome {
    let Some(area) = s.geometry.zrwa() else {
        return Ok(());
    };
    in_any_order(s, area).await?;
    moved_by_writes(s, area).await?;
    if area.explicit_commit {
        commits(s, area).await?;
    }
    refusals(s).await?;
    counted(s, area).await
}

async fn in_any_order(s: &Subject<'_>, area: Zrwa) -> Outcome {
    let (zone, block) = (s.zone(0), s.block());
    let start = s.start(zone);
    ok(s.op(zone, ZoneOp::OpenZrwa).await, "an open with an area")?;
    pointer(s, zone, 0, true).await?;
    let last = start + area.size - block;
    for (offset, byte) in [(last, 1), (start, 2), (last, 3), (start, 4)] {
        ok(s.write(offset, block, byte).await, "a write in the area")?;
    }
    s.holds(last, block, 3).await?;
    s.holds(start, block, 4).await?;
    if area.size > 2 * block {
        s.unwritten(start + block, block).await?;
    }
    pointer(s, zone, 0, true).await?;
    refused(
        s.append(zone, block, 5).await.map(drop),
        "an append to a zone with an area",
    )?;
    ok(s.op(zone, ZoneOp::Close(CloseEmpty::ToClosed)).await, "a close")?;
    ok(s.write(start, block, 6).await, "a write to the closed zone")?;
    ok(s.op(zone, ZoneOp::FinishUnlimited).await, "a finish")?;
    s.holds(last, block, 3).await?;
    s.holds(start, block, 6).await?;
    ensure!(
        !s.info(zone).await?.attributes.zrwa,
        "the finished zone {zone} has an area"
    );
    ok(s.op(zone, ZoneOp::Reset).await, "a reset").map(drop)
}

async fn moved_by_writes(s: &Subject<'_>, area: Zrwa) -> Outcome {
    let (zone, block) = (s.zone(0), s.block());
    let start = s.start(zone);
    ok(s.op(zone, ZoneOp::OpenZrwa).await, "an open with an area")?;
    ok(
        s.write(start + area.size, block, 1).await,
        "a write behind the area",
    )?;
    let moved = block.next_multiple_of(area.granularity);
    pointer(s, zone, moved, true).await?;
    s.holds(start + area.size, block, 1).await?;
    s.unwritten(start, block).await?;
    refused(s.write(start, block, 2).await, "a write below the pointer")?;
    let reach = start + moved + 2 * area.size;
    if reach < start + s.geometry.capacity(zone) {
        refused(
            s.write(reach, block, 2).await,
            "a write beyond the region behind the area",
        )?;
    }
    ok(s.op(zone, ZoneOp::Reset).await, "a reset")?;
    pointer(s, zone, 0, false).await
}

async fn commits(s: &Subject<'_>, area: Zrwa) -> Outcome {
    let (zone, block) = (s.zone(0), s.block());
    let (start, capacity) = (s.start(zone), s.geometry.capacity(zone));
    refused(
        commit(s, start + area.granularity).await,
        "a commit without an area",
    )?;
    ok(s.op(zone, ZoneOp::OpenZrwa).await, "an open with an area")?;
    ok(s.write(start, block, 1).await, "a write in the area")?;
    ok(commit(s, start + area.granularity).await, "a commit")?;
    pointer(s, zone, area.granularity, true).await?;
    refused(
        commit(s, start + 2 * area.granularity + area.size).await,
        "a commit beyond the area",
    )?;
    let mut at = area.granularity;
    while at < capacity {
        at = (at + area.size).min(capacity);
        ok(commit(s, start + at).await, "a commit of the whole area")?;
    }
    ensure!(
        s.info(zone).await?.condition == Condition::Full,
        "zone {zone} is committed whole, and not full"
    );
    s.holds(start, block, 1).await?;
    ok(s.op(zone, ZoneOp::Reset).await, "a reset").map(drop)
}

async fn refusals(s: &Subject<'_>) -> Outcome {
    let zone = s.zone(0);
    ok(s.op(zone, ZoneOp::FinishUnlimited).await, "a finish")?;
    refused(
        s.op(zone, ZoneOp::OpenZrwa).await,
        "an open of a full zone with an area",
    )?;
    ok(s.op(zone, ZoneOp::Reset).await, "a reset").map(drop)
}

/// No more areas than there are, and each is free again.
async fn counted(s: &Subject<'_>, area: Zrwa) -> Outcome {
    let limits = [area.count, s.geometry.max_open(), s.geometry.max_active()];
    let most = limits.into_iter().filter(|limit| *limit != 0).min();
    let Some(most) = most.filter(|most| *most < s.count()) else {
        return Ok(());
    };
    for n in 0..most {
        ok(s.op(s.zone(n), ZoneOp::OpenZrwa).await, "an open with an area")?;
    }
    let next = s.zone(most);
    refused(s.op(next, ZoneOp::OpenZrwa).await, "one area too many")?;
    ok(s.op(s.zone(0), ZoneOp::Reset).await, "a reset")?;
    ok(
        s.op(next, ZoneOp::OpenZrwa).await,
        "an open with the area that is free again",
    )
    .map(drop)
}

/// An extension that comes with an area: neither where no area is left.
async fn both(s: &Subject<'_>, area: Zrwa, extension: &[u8]) -> Outcome {
    let attach = async |zone| {
        s.device
            .set_extension(&s.lane, s.start(zone), extension, true)
            .await
    };
    let limits = [area.count, s.geometry.max_active()];
    let most = limits.into_iter().filter(|limit| *limit != 0).min();
    let most = most.filter(|most| *most < s.count());
    for n in 0..most.unwrap_or(1) {
        ok(attach(s.zone(n)).await, "an extension with an area")?;
        let info = s.info(s.zone(n)).await?;
        ensure!(
            info.condition == Condition::Closed && info.attributes.extension && info.attributes.zrwa,
            "the zone with an extension and an area is {info:?}"
        );
    }
    ok(
        s.write(s.start(s.zone(0)) + s.block(), s.block(), 2).await,
        "a write in the area",
    )?;
    if let Some(next) = most.map(|most| s.zone(most)) {
        refused(attach(next).await, "one too many")?;
        s.is(next, Condition::Empty, 0).await?;
        let left = s.device.extension(s.start(next)).await;
        ensure!(
            left == Ok(None),
            "a refused extension is there all the same: {left:?}"
        );
    }
    Ok(())
}

/// An extension closes an empty zone, and lasts until that is reset.
pub async fn extensions(s: &Subject<'_>) -> Outcome {
    let size = s.geometry.extension_size() as usize;
    if size == 0 {
        return Ok(());
    }
    let zone = s.zone(0);
    let start = s.start(zone);
    let look = async || {
        let found = s.device.extension(start).await;
        found.map_err(|error| format!("no look at the extension: {error}"))
    };
    let (first, second) = (vec![0x5a; size], vec![0xa5; size]);
    ensure!(
        look().await?.is_none(),
        "zone {zone} has an extension from the start"
    );
    ok(
        s.device.set_extension(&s.lane, start, &first, false).await,
        "an extension of an empty zone",
    )?;
    ensure!(
        look().await? == Some(first.clone()),
        "the extension is another one"
    );
    let info = s.info(zone).await?;
    ensure!(
        info.condition == Condition::Closed && info.attributes.extension,
        "the zone with an extension is {info:?}"
    );
    refused(
        s.device.set_extension(&s.lane, start, &second, false).await,
        "another extension",
    )?;
    ok(s.write(start, s.block(), 1).await, "a write to it")?;
    ok(s.op(zone, ZoneOp::FinishUnlimited).await, "a finish")?;
    // QEMU's drive forgets it there.
    ensure!(
        look().await? == Some(first) || !s.is_engine(),
        "a finish took the extension away"
    );
    ok(s.op(zone, ZoneOp::Reset).await, "a reset")?;
    ensure!(look().await?.is_none(), "a reset left the extension");
    ok(
        s.device.set_extension(&s.lane, start, &second, false).await,
        "an extension after a reset",
    )?;
    ensure!(
        look().await? == Some(second.clone()),
        "the new extension is another one"
    );
    // QEMU's drive overlooks that an area is asked for.
    if let Some(area) = s.geometry.zrwa().filter(|_| s.is_engine()) {
        ok(s.op(zone, ZoneOp::Reset).await, "a reset")?;
        both(s, area, &second).await?;
    }
    Ok(())
}
