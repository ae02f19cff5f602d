//! What only Zoned Namespaces have: random write areas and descriptor extensions (ZNS 1.2).

use zbdkit_block::{Error, ZoneOp};
use zbdkit_zone::{CloseEmpty, Condition, ZoneError, ZoneNo, Zrwa};

use super::{Outcome, Subject, ensure, ok, refused};

/// The zone has an area, is in that condition, and so many bytes of it are committed.
async fn has_area(s: &Subject<'_>, zone: ZoneNo, condition: Condition, committed: u64) -> Outcome {
    let info = s.info(zone).await?;
    ensure!(info.attributes.zrwa, "zone {zone} has no random write area");
    let wp = info.wp - info.start;
    ensure!(
        (info.condition, wp) == (condition, committed),
        "zone {zone} is {} with its pointer at {wp}, and should be {condition} with it at {committed}",
        info.condition
    );
    Ok(())
}

async fn has_none(s: &Subject<'_>, zone: ZoneNo) -> Outcome {
    let info = s.info(zone).await?;
    ensure!(!info.attributes.zrwa, "zone {zone} still has a random write area");
    Ok(())
}

/// Writes in any order and again, commits, what lies outside.
pub async fn areas(s: &Subject<'_>, zrwa: Zrwa) -> Outcome {
    let (zone, block) = (s.zone(1), s.block());
    let start = s.start(zone);
    let open = Condition::ExplicitlyOpen;
    ensure!(
        s.geometry.capacity(zone) >= 4 * zrwa.size,
        "the suites need zones of four random write areas"
    );
    ok(s.op(zone, ZoneOp::OpenZrwa).await, "an open with an area")?;
    has_area(s, zone, open, 0).await?;
    let last = zrwa.size - block;
    for (offset, byte) in [(last, 1), (0, 2), (last, 3), (block, 4), (0, 5)] {
        ok(s.write(start + offset, block, byte).await, "a write in the area")?;
    }
    has_area(s, zone, open, 0).await?;
    s.holds(start, block, 5).await?;
    s.holds(start + block, block, 4).await?;
    s.holds(start + last, block, 3).await?;
    let mut pointer = 0;
    if zrwa.explicit_commit {
        pointer = zrwa.granularity;
        ok(s.commit(start + pointer).await, "a commit of one granule")?;
        has_area(s, zone, open, pointer).await?;
        for (end, what) in [
            (pointer, "a commit of nothing"),
            (pointer + zrwa.size + zrwa.granularity, "a commit beyond the area"),
        ] {
            refused!(s.commit(start + end).await, _, what);
        }
        if zrwa.granularity > block {
            refused!(
                s.commit(start + pointer + block).await,
                _,
                "a commit of less than a granule"
            );
        }
        refused!(
            s.write(start, block, 6).await,
            Error::Zone(ZoneError::OutsideRandomWriteArea { .. } | ZoneError::NotAtWritePointer { .. }),
            "a write of what is committed"
        );
    }
    refused!(
        s.write(start + pointer + 2 * zrwa.size, block, 6).await,
        Error::Zone(ZoneError::OutsideRandomWriteArea { .. } | ZoneError::NotAtWritePointer { .. }),
        "a write too far behind the area"
    );
    if s.geometry.max_append() > 0 {
        refused!(
            s.append(zone, block, 6).await,
            Error::Zone(ZoneError::RandomWriteArea { .. }),
            "an append to a zone with an area"
        );
    }
    has_area(s, zone, open, pointer).await?;
    ok(
        s.write(start + pointer + zrwa.size, block, 7).await,
        "a write behind the area",
    )?;
    pointer += zrwa.granularity;
    has_area(s, zone, open, pointer).await?;
    s.holds(start + pointer - zrwa.granularity + zrwa.size, block, 7)
        .await?;
    ok(s.device.flush(&s.lane).await, "a flush")?;
    s.holds(start + last, block, 3).await?;
    ok(s.op(zone, ZoneOp::Close(CloseEmpty::ToClosed)).await, "a close")?;
    has_area(s, zone, Condition::Closed, pointer).await?;
    ok(
        s.write(start + pointer, block, 8).await,
        "a write to the closed zone",
    )?;
    has_area(s, zone, Condition::ImplicitlyOpen, pointer).await?;
    s.works().await
}

/// There are so many areas and no more.
pub async fn resources(s: &Subject<'_>, zrwa: Zrwa) -> Outcome {
    let open = s.geometry.max_open();
    let enough = s.count() > zrwa.count && (open == 0 || open > zrwa.count);
    if zrwa.count > 0 && enough {
        for n in 0..zrwa.count {
            ok(s.op(s.zone(n), ZoneOp::OpenZrwa).await, "an open with an area")?;
        }
        let more = s.zone(zrwa.count);
        refused!(
            s.op(more, ZoneOp::OpenZrwa).await,
            Error::Zone(ZoneError::NoRandomWriteArea { .. }),
            "one more area"
        );
        s.is(more, Condition::Empty, 0).await?;
        ok(s.op(s.zone(0), ZoneOp::Reset).await, "a reset")?;
        ok(
            s.op(more, ZoneOp::OpenZrwa).await,
            "an open with the area that is free",
        )?;
        ok(
            s.write(s.start(more) + s.block(), s.block(), 1).await,
            "a write in that area",
        )?;
    }
    s.works().await
}

/// A reset, a finish and the end of the zone take the area away, and writes are in order again.
pub async fn ends(s: &Subject<'_>, zrwa: Zrwa) -> Outcome {
    let (zone, block) = (s.zone(1), s.block());
    let start = s.start(zone);
    let capacity = s.geometry.capacity(zone);
    ok(s.op(zone, ZoneOp::OpenZrwa).await, "an open with an area")?;
    ok(s.write(start + block, block, 1).await, "a write in the area")?;
    ok(s.op(zone, ZoneOp::Reset).await, "a reset")?;
    has_none(s, zone).await?;
    s.is(zone, Condition::Empty, 0).await?;
    s.unwritten(start, 2 * block).await?;
    in_order(s, zone).await?;

    ok(s.op(zone, ZoneOp::Reset).await, "a reset")?;
    ok(s.op(zone, ZoneOp::OpenZrwa).await, "an open with an area")?;
    ok(s.write(start + block, block, 2).await, "a write in the area")?;
    ok(s.op(zone, ZoneOp::Finish).await, "a finish")?;
    has_none(s, zone).await?;
    s.holds(start + block, block, 2).await?;
    refused!(
        s.write(start + block, block, 3).await,
        Error::Zone(ZoneError::Full { .. }),
        "a write to the finished zone"
    );

    ok(s.op(zone, ZoneOp::Reset).await, "a reset")?;
    if zrwa.explicit_commit {
        ok(s.op(zone, ZoneOp::OpenZrwa).await, "an open with an area")?;
        let mut at = 0;
        while at < capacity {
            let len = zrwa.size.min(capacity - at);
            ok(s.write(start + at, len, 4).await, "a write of the whole area")?;
            at += len;
            ok(s.commit(start + at).await, "a commit of the whole area")?;
        }
        has_none(s, zone).await?;
        let info = s.info(zone).await?;
        ensure!(
            info.condition == Condition::Full,
            "committed to its end zone {zone} is {}",
            info.condition
        );
        s.holds(start, capacity, 4).await?;
        ok(s.op(zone, ZoneOp::Reset).await, "a reset")?;
    }
    in_order(s, zone).await?;
    s.works().await
}

/// The zone, which is empty, is one like any other.
async fn in_order(s: &Subject<'_>, zone: ZoneNo) -> Outcome {
    let (start, block) = (s.start(zone), s.block());
    ok(s.write(start, block, 9).await, "a write at the pointer")?;
    refused!(
        s.write(start + 2 * block, block, 9).await,
        Error::Zone(ZoneError::NotAtWritePointer { .. }),
        "a write that is not at the pointer"
    );
    refused!(s.commit(start + block).await, _, "a commit without an area");
    s.is(zone, Condition::ImplicitlyOpen, block).await
}

/// Extensions belong to empty zones and last until a reset.
pub async fn extensions(s: &Subject<'_>) -> Outcome {
    let zone = s.zone(1);
    let size = s.geometry.extension_size() as usize;
    let found = |zone| async move {
        let found = s.device.extension(s.start(zone)).await;
        found.map_err(|error| format!("an extension cannot be read: {error}"))
    };
    ensure!(found(zone).await?.is_none(), "an empty zone has an extension");
    ok(s.set_extension(zone, &[1, 2, 3]).await, "an extension")?;
    let mut expected = vec![1, 2, 3];
    expected.resize(size, 0);
    ensure!(
        found(zone).await?.as_ref() == Some(&expected),
        "the extension of zone {zone} is {:?}",
        found(zone).await?
    );
    ensure!(
        found(s.zone(0)).await?.is_none(),
        "another zone has the extension"
    );
    s.is(zone, Condition::Closed, 0).await?;
    ensure!(
        s.info(zone).await?.attributes.extension,
        "the report does not show it"
    );
    refused!(
        s.set_extension(zone, &[4]).await,
        Error::Zone(ZoneError::InvalidTransition { .. }),
        "an extension of a closed zone"
    );
    refused!(
        s.set_extension(s.zone(0), &vec![0; size + 1]).await,
        _,
        "an extension that is too long"
    );
    ok(s.write(s.start(zone), s.block(), 5).await, "a write")?;
    ok(s.op(zone, ZoneOp::Finish).await, "a finish")?;
    ensure!(
        found(zone).await? == Some(expected),
        "a write or a finish took the extension away"
    );
    ok(s.op(zone, ZoneOp::Reset).await, "a reset")?;
    ensure!(found(zone).await?.is_none(), "a reset left the extension");
    ensure!(
        !s.info(zone).await?.attributes.extension,
        "the report still shows it"
    );
    let whole = vec![0xa5; size];
    ok(s.set_extension(zone, &whole).await, "another extension")?;
    ensure!(
        found(zone).await? == Some(whole),
        "the second extension is not there"
    );
    s.works().await
}
