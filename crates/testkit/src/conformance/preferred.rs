//! Data in sequential-preferred zones of host-aware devices: written anywhere, best at the pointer.

use zbdkit_block::{Error, ZoneOp};
use zbdkit_zone::{Condition, ZoneError};

use super::{Outcome, Subject, ensure, ok, refused};

pub async fn writes(s: &Subject<'_>) -> Outcome {
    let (zone, block) = (s.zone(0), s.block());
    let (start, capacity) = (s.start(zone), s.geometry.capacity(zone));
    ok(s.write(start, block, 1).await, "a write at the pointer")?;
    s.is(zone, Condition::ImplicitlyOpen, block).await?;
    ok(
        s.write(start + 2 * block, block, 2).await,
        "a write above the pointer",
    )?;
    s.is(zone, Condition::ImplicitlyOpen, 3 * block).await?;
    s.unwritten(start + block, block).await?;
    for (at, byte) in [(start + block, 3), (start, 4)] {
        ok(s.write(at, block, byte).await, "a write below the pointer")?;
        s.is(zone, Condition::ImplicitlyOpen, 3 * block).await?;
    }
    for (n, byte) in [4, 3, 2].into_iter().enumerate() {
        s.holds(start + n as u64 * block, block, byte).await?;
    }
    s.unwritten(start + 3 * block, capacity - 3 * block).await?;
    ok(
        s.write(start + 3 * block, capacity - 3 * block, 5).await,
        "a write up to the capacity",
    )?;
    s.is(zone, Condition::Full, capacity).await?;
    ensure!(
        s.info(zone).await?.wp == start + capacity,
        "the pointer of a full zone is not at its capacity"
    );
    ok(s.write(start, block, 6).await, "a write to a full zone")?;
    s.is(zone, Condition::Full, capacity).await?;
    s.holds(start, block, 6).await?;
    ok(s.op(zone, ZoneOp::Reset).await, "a reset")?;
    s.is(zone, Condition::Empty, 0).await?;
    s.unwritten(start, s.geometry.len(zone)).await?;
    s.works().await
}

pub async fn appends(s: &Subject<'_>) -> Outcome {
    let zone = s.zone(0);
    refused!(
        s.append(zone, s.block(), 1).await,
        Error::Zone(ZoneError::NotSequentialRequired { .. } | ZoneError::AppendUnsupported),
        "an append to a zone that takes writes anywhere"
    );
    s.is(zone, Condition::Empty, 0).await?;
    s.works().await
}
