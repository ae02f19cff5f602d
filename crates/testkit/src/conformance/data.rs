//! Data: writes, appends, conventional zones.

use zbdkit_block::{CrossZone, Error, ZoneOp};
use zbdkit_zone::{Condition, ZoneError, ZoneNo};

use super::{Outcome, Subject, ensure, ok, refused};

pub async fn writes(s: &Subject<'_>) -> Outcome {
    let (zone, block) = (s.zone(0), s.block());
    let (start, capacity) = (s.start(zone), s.geometry.capacity(zone));
    refused!(
        s.write(start + block, block, 1).await,
        Error::Zone(ZoneError::NotAtWritePointer { .. }),
        "a write above the pointer"
    );
    s.is(zone, Condition::Empty, 0).await?;
    ok(s.write(start, 2 * block, 1).await, "a write at the pointer")?;
    s.is(zone, Condition::ImplicitlyOpen, 2 * block).await?;
    refused!(
        s.write(start, block, 2).await,
        Error::Zone(ZoneError::NotAtWritePointer { .. }),
        "a write below the pointer"
    );
    s.holds(start, 2 * block, 1).await?;
    s.unwritten(start + 2 * block, capacity - 2 * block).await?;
    let rest = capacity - 2 * block;
    refused!(
        s.write(start + 2 * block, rest + block, 3).await,
        Error::Zone(ZoneError::ExceedsCapacity { .. } | ZoneError::Boundary { .. }),
        "a write beyond the capacity"
    );
    ok(
        s.write(start + 2 * block, rest, 3).await,
        "a write up to the capacity",
    )?;
    s.is(zone, Condition::Full, capacity).await?;
    ensure!(
        s.info(zone).await?.wp == start + capacity,
        "the pointer of a full zone is not at its capacity"
    );
    refused!(
        s.append(zone, block, 4).await,
        Error::Zone(ZoneError::Full { .. } | ZoneError::AppendUnsupported),
        "an append to a full zone"
    );
    s.holds(start + 2 * block, rest, 3).await?;
    if capacity < s.geometry.len(zone) {
        s.unwritten(start + capacity, s.geometry.len(zone) - capacity)
            .await?;
    }
    ok(s.op(zone, ZoneOp::Reset).await, "a reset")?;
    s.unwritten(start, s.geometry.len(zone)).await?;
    // What lay below is not to be seen again when the pointer moves on.
    ok(s.write(start, block, 5).await, "a write after a reset")?;
    s.unwritten(start + block, s.geometry.len(zone) - block).await?;
    let lane = &s.lane;
    ok(
        s.device.write_zeroes(lane, start + block, block, true).await,
        "a write of zeros at the pointer",
    )?;
    s.is(zone, Condition::ImplicitlyOpen, 2 * block).await?;
    refused!(
        s.device.write_zeroes(lane, start, block, false).await,
        Error::Zone(ZoneError::NotAtWritePointer { .. }),
        "a write of zeros below the pointer"
    );
    ok(
        s.device.discard(lane, start, block).await,
        "a discard in a sequential zone, which is a hint",
    )?;
    s.holds(start, block, 5).await?;
    s.works().await
}

pub async fn appends(s: &Subject<'_>) -> Outcome {
    let (zone, block, max) = (s.zone(0), s.block(), s.geometry.max_append());
    if max == 0 {
        refused!(
            s.append(zone, block, 1).await,
            Error::Zone(ZoneError::AppendUnsupported),
            "an append on a device without"
        );
        return s.works().await;
    }
    let start = s.start(zone);
    for n in 0..2 {
        let at = ok(s.append(zone, block, 1 + n).await, "an append")?;
        ensure!(at == start + u64::from(n) * block, "append {n} went to {at}");
        s.holds(at, block, 1 + n).await?;
    }
    refused!(
        s.append(zone, max + block, 3).await,
        Error::Zone(ZoneError::AppendTooLarge { .. }),
        "an append above the limit"
    );
    let buf = zbdkit_io::IoBuf::alloc(block as usize);
    refused!(
        s.device.append(&s.lane, buf.clone(), start + block).await,
        Error::Zone(ZoneError::NotZoneStart { .. }),
        "an append that names no zone's start"
    );
    if s.geometry.nr_conventional() > 0 {
        refused!(
            s.device.append(&s.lane, buf, 0).await,
            Error::Zone(ZoneError::Conventional { .. }),
            "an append to a conventional zone"
        );
    }
    // Fill the zone; the last append that does not fit changes nothing.
    let capacity = s.geometry.capacity(zone);
    let mut at = 2 * block;
    while at < capacity {
        let len = max.min(capacity - at);
        ensure!(
            ok(s.append(zone, len, 9).await, "an append")? == start + at,
            "an append did not go to the pointer"
        );
        at += len;
    }
    s.is(zone, Condition::Full, capacity).await?;
    refused!(
        s.append(zone, block, 1).await,
        Error::Zone(ZoneError::Full { .. }),
        "an append to a full zone"
    );
    s.works().await
}

pub async fn conventional(s: &Subject<'_>) -> Outcome {
    if s.geometry.nr_conventional() == 0 {
        return s.works().await;
    }
    let (zone, block) = (ZoneNo(0), s.block());
    let last = s.geometry.len(zone) - block;
    for (offset, byte) in [(last, 1), (0, 2), (last, 3), (block, 4)] {
        ok(
            s.write(offset, block, byte).await,
            "a write anywhere in a conventional zone",
        )?;
        s.holds(offset, block, byte).await?;
    }
    s.is(zone, Condition::NotWritePointer, 0).await?;
    refused!(
        s.op(zone, ZoneOp::Reset).await,
        Error::Zone(ZoneError::Conventional { .. }),
        "a reset of a conventional zone"
    );
    refused!(
        s.op(zone, ZoneOp::Open).await,
        Error::Zone(ZoneError::Conventional { .. }),
        "an open of a conventional zone"
    );
    let end = s.start(s.zone(0));
    if s.is_preferred() {
        ok(
            s.write(end - block, 2 * block, 1).await,
            "a write from a conventional zone into one that takes writes anywhere",
        )?;
        s.is(s.zone(0), Condition::ImplicitlyOpen, block).await?;
    } else {
        refused!(
            s.write(end - block, 2 * block, 1).await,
            Error::Zone(ZoneError::Boundary { .. }),
            "a write from a conventional zone into a sequential one"
        );
    }
    ok(
        s.device.write_zeroes(&s.lane, 0, block, false).await,
        "a write of zeros",
    )?;
    s.holds(0, block, 0).await?;
    s.holds(last, block, 3).await?;
    ok(
        s.read(end - block, 2 * block, CrossZone::Allow).await,
        "a read across zones",
    )?;
    s.works().await
}
