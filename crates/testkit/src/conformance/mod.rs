//! What any zoned device must do, as a library: tests run it on every backing and through every door.
//!
//! Each suite begins on a device whose zones are all reset and ends with a case that must succeed, so that a device
//! that refuses everything does not pass.

mod data;
mod preferred;
mod rules;
mod zns;

use std::cell::RefCell;
use std::fmt;

use zbdkit_block::{CrossZone, Device, Error, Lane, ZoneOp};
use zbdkit_io::{IoBuf, LocalBoxFuture};
use zbdkit_zone::{Condition, Filter, Geometry, Model, ZoneInfo, ZoneNo, ZoneType};

/// A rule that the device breaks.
#[derive(Debug)]
pub struct Broken {
    /// The suite.
    pub suite: &'static str,
    /// What happened, and what should have.
    pub what: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.suite, self.what)
    }
}

type Outcome = Result<(), String>;

macro_rules! ensure {
    ($condition:expr, $($text:tt)*) => {
        if !$condition {
            return Err(format!($($text)*));
        }
    };
}
pub(crate) use ensure;

/// Asserts that a result is an error that matches.
macro_rules! refused {
    ($result:expr, $pattern:pat, $what:expr) => {
        match $result {
            Err($pattern) => {}
            other => {
                return Err(format!(
                    "{}: {other:?} instead of {}",
                    $what,
                    stringify!($pattern)
                ))
            }
        }
    };
}
pub(crate) use refused;

/// What a device keeps of its zones beside what every device does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keeper {
    /// An engine: written ends of finished zones, counters, what an operator sets, and what becomes of an opened zone that is
    /// closed is the door's choice.
    Engine,
    /// A drive, which knows nothing of these.
    Drive,
    /// A zoned namespace: a drive whose rules are those of ZNS, and whose unwritten blocks read as zeros.
    Namespace,
}

/// Looks at a device after each step of the suites.
pub type Observer<'a> = &'a dyn Fn() -> LocalBoxFuture<'a, Result<(), String>>;

/// Runs all suites on a device whose zones an engine keeps. Its contents are lost.
pub async fn run(device: &Device) -> Result<(), Broken> {
    run_as(device, Keeper::Engine, &|| Box::pin(async { Ok(()) })).await
}

/// Runs all suites on a device whose zones a drive keeps, by itself or behind a door. Its contents are lost.
pub async fn run_on_drive(device: &Device) -> Result<(), Broken> {
    run_as(device, Keeper::Drive, &|| Box::pin(async { Ok(()) })).await
}

/// Runs all suites on a zoned namespace behind a door. Its contents are lost.
pub async fn run_on_namespace(device: &Device) -> Result<(), Broken> {
    run_as(device, Keeper::Namespace, &|| Box::pin(async { Ok(()) })).await
}

/// As [`run_on_drive`], and `observer` looks at the drive after each step.
pub async fn run_observed<'a>(device: &'a Device, observer: Observer<'a>) -> Result<(), Broken> {
    run_as(device, Keeper::Drive, observer).await
}

async fn run_as<'a>(device: &'a Device, keeper: Keeper, observer: Observer<'a>) -> Result<(), Broken> {
    let Some(geometry) = device.limits().zoned else {
        return Err(Broken {
            suite: "limits",
            what: "the device has no zones".into(),
        });
    };
    let subject = Subject {
        lane: device.lane(8),
        device,
        geometry,
        keeper,
        observer,
        seen: RefCell::new(Ok(())),
    };
    let s = &subject;
    s.suite("limits", rules::limits(s)).await?;
    if s.is_preferred() {
        s.suite("writes", preferred::writes(s)).await?;
        s.suite("appends", preferred::appends(s)).await?;
    } else {
        s.suite("writes", data::writes(s)).await?;
        s.suite("appends", data::appends(s)).await?;
    }
    s.suite("conventional zones", data::conventional(s)).await?;
    s.suite("transitions", rules::transitions(s)).await?;
    s.suite("resources", rules::resources(s)).await?;
    s.suite("random write areas", zns::areas(s)).await?;
    s.suite("descriptor extensions", zns::extensions(s)).await?;
    s.suite("reports", rules::reports(s)).await?;
    s.suite("errors", rules::errors(s)).await?;
    if keeper == Keeper::Engine {
        s.suite("operator", rules::operator(s)).await?;
    }
    s.suite("end", s.works()).await
}

/// The device under test.
pub(crate) struct Subject<'a> {
    device: &'a Device,
    lane: Lane,
    geometry: Geometry,
    keeper: Keeper,
    observer: Observer<'a>,
    /// The first thing that the observer had to say.
    seen: RefCell<Outcome>,
}

impl Subject<'_> {
    /// One suite, on a device whose zones are all empty before and after it.
    async fn suite(&self, suite: &'static str, run: impl Future<Output = Outcome>) -> Result<(), Broken> {
        let broken = |what| Broken { suite, what };
        self.renew().await.map_err(broken)?;
        run.await.map_err(broken)?;
        self.renew().await.map_err(broken)?;
        self.seen.replace(Ok(())).map_err(broken)
    }

    /// A step was made.
    async fn observe<T>(&self, what: std::fmt::Arguments<'_>, result: T) -> T {
        let wanted = self.seen.borrow().is_ok();
        if wanted && let Err(difference) = (self.observer)().await {
            *self.seen.borrow_mut() = Err(format!("after {what}: {difference}"));
        }
        result
    }

    fn is_engine(&self) -> bool {
        self.keeper == Keeper::Engine
    }

    /// Its sequential zones take writes anywhere.
    fn is_preferred(&self) -> bool {
        self.geometry.model() == Model::HostAware
    }

    /// All zones normal and empty.
    async fn renew(&self) -> Outcome {
        let zones = self.geometry.zones().filter(|_| self.is_engine());
        for zone in zones {
            let start = self.geometry.start(zone);
            self.device
                .zone_op(&self.lane, ZoneOp::SetNormal, start)
                .await
                .map_err(|e| format!("zone {zone} cannot be made normal: {e}"))?;
        }
        self.device
            .reset_all(&self.lane)
            .await
            .map_err(|e| format!("the zones cannot be reset: {e}"))?;
        let zones = self.report(Filter::All).await?;
        match zones
            .iter()
            .find(|zone| zone.condition != Condition::Empty && zone.kind != ZoneType::Conventional)
        {
            Some(zone) => Err(format!("after a reset of all zones: {zone:?}")),
            None => Ok(()),
        }
    }

    /// The least that can be written to a sequential zone, bytes.
    fn block(&self) -> u64 {
        let limits = self.device.limits();
        limits.write_granularity.max(limits.block_size).into()
    }

    /// The sequential zone number `n`.
    fn zone(&self, n: u32) -> ZoneNo {
        ZoneNo(self.geometry.nr_conventional() + n)
    }

    /// How many sequential zones there are.
    fn count(&self) -> u32 {
        self.geometry.nr_zones() - self.geometry.nr_conventional()
    }

    fn start(&self, zone: ZoneNo) -> u64 {
        self.geometry.start(zone)
    }

    async fn report(&self, filter: Filter) -> Result<Vec<ZoneInfo>, String> {
        let zones = self.device.report(0, filter, usize::MAX).await;
        zones.map_err(|e| format!("no report: {e}"))
    }

    async fn info(&self, zone: ZoneNo) -> Result<ZoneInfo, String> {
        let zones = self.device.report(self.start(zone), Filter::All, 1).await;
        let zones = zones.map_err(|e| format!("no report: {e}"))?;
        zones
            .first()
            .copied()
            .ok_or_else(|| format!("no report of zone {zone}"))
    }

    async fn is(&self, zone: ZoneNo, condition: Condition, written: u64) -> Outcome {
        let info = self.info(zone).await?;
        let end = info.written_end - info.start;
        // A full zone of a drive has no end of its own.
        let same_end = end == written || (condition == Condition::Full && !self.is_engine());
        ensure!(
            info.condition == condition && same_end,
            "zone {zone} is {} with {end} bytes written, and should be {condition} with {written}",
            info.condition
        );
        Ok(())
    }

    async fn write(&self, offset: u64, len: u64, byte: u8) -> Result<(), Error> {
        let buf = IoBuf::alloc(len as usize);
        buf.fill(0..len as usize, byte);
        self.observe(
            format_args!("a write of {len} bytes at {offset}"),
            self.device.write(&self.lane, buf, offset).await,
        )
        .await
    }

    async fn append(&self, zone: ZoneNo, len: u64, byte: u8) -> Result<u64, Error> {
        let buf = IoBuf::alloc(len as usize);
        buf.fill(0..len as usize, byte);
        self.observe(
            format_args!("an append of {len} bytes to zone {zone}"),
            self.device.append(&self.lane, buf, self.start(zone)).await,
        )
        .await
    }

    async fn op(&self, zone: ZoneNo, op: ZoneOp) -> Result<(), Error> {
        self.observe(
            format_args!("{op:?} of zone {zone}"),
            self.device.zone_op(&self.lane, op, self.start(zone)).await,
        )
        .await
    }

    async fn read(&self, offset: u64, len: u64, cross: CrossZone) -> Result<Vec<u8>, Error> {
        let buf = IoBuf::alloc(len as usize);
        buf.fill(0..len as usize, 0xee);
        self.device.read(&self.lane, buf.clone(), offset, cross).await?;
        Ok(buf.to_vec())
    }

    /// The range holds this byte only.
    async fn holds(&self, offset: u64, len: u64, byte: u8) -> Outcome {
        let bytes = self.read(offset, len, CrossZone::Refuse).await;
        let bytes = bytes.map_err(|e| format!("{len} bytes at {offset} cannot be read: {e}"))?;
        match bytes.iter().position(|got| *got != byte) {
            Some(at) => Err(format!(
                "at {} is {:#x} and should be {byte:#x}",
                offset + at as u64,
                bytes[at]
            )),
            None => Ok(()),
        }
    }

    /// Nobody has written the range since the zone was reset: zeros, but a drive may have a pattern of its own.
    async fn unwritten(&self, offset: u64, len: u64) -> Outcome {
        if self.keeper != Keeper::Drive {
            return self.holds(offset, len, 0).await;
        }
        let bytes = self.read(offset, len, CrossZone::Refuse).await;
        let bytes = bytes.map_err(|e| format!("{len} bytes at {offset} cannot be read: {e}"))?;
        match bytes.iter().find(|byte| !matches!(byte, 0 | 0xff)) {
            Some(old) => Err(format!("old data ({old:#x}) can be read from {offset} on")),
            None => Ok(()),
        }
    }

    /// A zone takes data and gives it back: what each suite ends with.
    async fn works(&self) -> Outcome {
        let zone = self.zone(self.count() - 1);
        ok(self.op(zone, ZoneOp::Reset).await, "a reset")?;
        ok(
            self.write(self.start(zone), self.block(), 0x77).await,
            "a write at the pointer",
        )?;
        ok(self.device.flush(&self.lane).await, "a flush")?;
        self.holds(self.start(zone), self.block(), 0x77).await?;
        ok(self.op(zone, ZoneOp::Reset).await, "a reset of a written zone")?;
        self.is(zone, Condition::Empty, 0).await
    }
}

fn ok<T>(result: Result<T, Error>, what: &str) -> Result<T, String> {
    result.map_err(|error| format!("{what} failed: {error}"))
}
