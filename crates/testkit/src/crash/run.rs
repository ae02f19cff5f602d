//! One run: an image is opened on a recording machine, clients use it, it is closed.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use zbdkit_block::{CrossZone, Device, Error, Graph, Host, Lane, OpenError, OpenOptions, RunStateMode};
use zbdkit_io::{IoBuf, Runtime, spawn, yield_now};
use zbdkit_zone::{Condition, Filter, ZoneError, ZoneType};

use super::choose::mix;
use super::disk::Disk;
use super::host::{Behaviour, Machine, Recorded};
use super::image::Image;
use super::judge::View;
use super::oracle::{Fill, Kind, Oracle, PIECE, UNREADABLE, payload};
use super::workload::{Client, Mix};

/// Turns without any news after which a run is taken for stuck.
const STUCK: u32 = 20_000;

/// How a run goes.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The image's name.
    pub image: PathBuf,
    /// How the image is opened.
    pub run_state: RunStateMode,
    /// What the machine does.
    pub behaviour: Behaviour,
    /// What clients ask for.
    pub mix: Mix,
    /// How many clients at once.
    pub clients: u32,
    /// Requests of each.
    pub requests: u32,
    /// First one write at each zone's pointer, which must succeed.
    pub touch: bool,
    /// Close at the end.
    pub close: bool,
}

/// What is known of a run that was recorded.
pub struct History {
    /// The files it began with.
    pub start: Disk,
    /// What happened to them.
    pub events: Vec<Recorded>,
    /// What was asked and answered.
    pub oracle: Oracle,
    /// What the opening told.
    pub notices: Vec<String>,
    /// How it went.
    pub plan: Plan,
    /// When the fault struck.
    pub fault: Option<u64>,
    /// The files at its end.
    pub end: Disk,
}

/// Runs a future while the machine ends operations in any order.
pub fn drive<T>(runtime: &Runtime, machine: &Machine, future: impl Future<Output = T>) -> T {
    runtime.block_on(async {
        let mut future = pin!(future);
        let mut idle = 0;
        loop {
            let now = std::future::poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx)));
            if let Poll::Ready(output) = now.await {
                machine.settle();
                return output;
            }
            yield_now().await;
            idle = if machine.step() { 0 } else { idle + 1 };
            assert!(
                idle < STUCK,
                "the run is stuck: requests wait, but no operation is in flight"
            );
        }
    })
}

/// Makes an image on an empty machine; its name, what happened, and when it was answered.
pub fn record_creation(
    runtime: &Runtime,
    image: &Image,
    behaviour: Behaviour,
    seed: u64,
) -> Result<(PathBuf, Vec<Recorded>, u64), String> {
    let machine = Machine::new(Disk::default(), behaviour, seed);
    let host = machine.host();
    let path = drive(runtime, &machine, image.create(&host, "disk"))?;
    Ok((path, machine.events(), machine.tick()))
}

/// Opens the image, as a user names it.
pub async fn open(host: &Arc<dyn Host>, path: &Path, run_state: &RunStateMode) -> Result<Device, OpenError> {
    let options = OpenOptions {
        run_state: run_state.clone(),
        lock_wait: Duration::ZERO,
        ..OpenOptions::default()
    };
    Graph::from_path(path).open(host, &options).await
}

/// Looks at all that can be seen.
pub async fn look_at(device: &Device) -> Result<View, Error> {
    let lane = device.lane(1);
    let zones = device.report(0, Filter::All, usize::MAX).await?;
    let mut contents = Vec::new();
    for zone in &zones {
        if zone.condition == Condition::Offline {
            contents.push(None);
            continue;
        }
        let buf = IoBuf::alloc(zone.len as usize);
        // What a read leaves alone must not look like zeros.
        buf.fill(0..buf.len(), 0xee);
        read_all(device, &lane, &buf, zone.start).await?;
        contents.push(Some(buf.to_vec()));
    }
    let mut extensions = Vec::new();
    for zone in &zones {
        let has_some = device
            .limits()
            .zoned
            .is_some_and(|zones| zones.extension_size() != 0);
        extensions.push(match has_some {
            true => device.extension(zone.start).await?,
            false => None,
        });
    }
    Ok(View {
        block_size: device.block_size(),
        zones,
        contents,
        extensions,
    })
}

/// Reads a zone; what cannot be read of it is [`UNREADABLE`].
async fn read_all(device: &Device, lane: &Lane, buf: &IoBuf, start: u64) -> Result<(), Error> {
    let read = device.read(lane, buf.clone(), start, CrossZone::Refuse).await;
    if !matches!(read, Err(Error::Uncorrectable { .. })) {
        return read;
    }
    let block = device.limits().block_size as usize;
    for at in (0..buf.len()).step_by(block) {
        let part = buf.slice(at..at + block);
        match device
            .read(lane, part.clone(), start + at as u64, CrossZone::Refuse)
            .await
        {
            Err(Error::Uncorrectable { .. }) => {
                part.copy_from(&UNREADABLE.repeat(block / PIECE));
            }
            read => read?,
        }
    }
    Ok(())
}

/// Is told what a reopened image shows and what the opening said, and may object.
pub type Look<'a> = &'a mut dyn FnMut(&View, &[String]) -> Result<(), String>;

/// Opens, looks, lets the clients work, closes. `judge` sees what the reopened image shows, and what the opening told.
pub fn record(
    runtime: &Runtime,
    start: &Disk,
    plan: &Plan,
    seed: u64,
    first_id: u32,
    judge: Look<'_>,
) -> Result<History, String> {
    let machine = Machine::new(start.clone(), plan.behaviour.clone(), seed);
    let host = machine.host();
    let (oracle, notices) = drive(runtime, &machine, async {
        let device = open(&host, &plan.image, &plan.run_state)
            .await
            .map_err(|error| format!("the image does not open: {error}"))?;
        let opened = machine.tick();
        machine.arm();
        let view = look_at(&device)
            .await
            .map_err(|error| format!("the image cannot be read: {error}"))?;
        judge(&view, device.notices())?;
        let geometry = device.limits().zoned.ok_or("the image has no zones")?;
        let mut oracle = Oracle::new(geometry, view, first_id);
        oracle.opened = opened;
        let oracle = Rc::new(RefCell::new(oracle));
        if plan.touch {
            touch(&machine, &device, &oracle).await?;
        }
        work(&machine, &device, &oracle, plan, seed).await;
        let notices = device.notices().to_vec();
        if plan.close {
            close(&machine, device, &oracle).await?;
        }
        Ok::<_, String>((oracle, notices))
    })?;
    let oracle = Rc::try_unwrap(oracle)
        .map_err(|_| "a client did not end")?
        .into_inner();
    if let Some(op) = oracle.acknowledged_after_the_end() {
        return Err(format!("acknowledged although the epoch had failed: {op:?}"));
    }
    Ok(History {
        start: start.clone(),
        events: machine.events(),
        oracle,
        notices,
        plan: plan.clone(),
        fault: machine.fault_fired(),
        end: machine.disk(),
    })
}

/// The image takes a write at each pointer.
async fn touch(machine: &Machine, device: &Device, oracle: &RefCell<Oracle>) -> Result<(), String> {
    let lane = device.lane(4);
    let zones = oracle.borrow().baseline.zones.clone();
    let block = device.limits().block_size.into();
    for zone in zones {
        let offset = match (zone.kind, zone.condition) {
            (_, Condition::ReadOnly | Condition::Offline | Condition::Full) => continue,
            (ZoneType::Conventional, _) => zone.start,
            _ => zone.wp,
        };
        let id = oracle.borrow().next_id();
        let buf = IoBuf::from_vec(payload(id, block));
        let kind = Kind::Write {
            id,
            offset: Some(offset),
            len: block,
            fill: Fill::Stamp,
        };
        let op = oracle
            .borrow_mut()
            .submit(machine.tick(), zone.zone.0, kind, device);
        let result = device.write(&lane, buf, offset).await;
        let answer = result.as_ref().map(|()| Some(offset));
        oracle.borrow_mut().answer(machine.tick(), op, answer, device);
        match result {
            Ok(()) | Err(Error::Zone(ZoneError::TooManyActive { .. } | ZoneError::TooManyOpen { .. })) => {}
            Err(error) => {
                return Err(format!(
                    "zone {} takes no write at its pointer: {error}",
                    zone.zone
                ));
            }
        }
    }
    Ok(())
}

async fn work(machine: &Machine, device: &Device, oracle: &Rc<RefCell<Oracle>>, plan: &Plan, seed: u64) {
    let running = Rc::new(Cell::new(plan.clients));
    let cursors: Vec<u64> = oracle
        .borrow()
        .baseline
        .zones
        .iter()
        .map(|zone| zone.wp)
        .collect();
    let cursors = Rc::new(RefCell::new(cursors));
    for number in 0..plan.clients {
        let client = Client::new(
            machine.clone(),
            device.clone(),
            oracle.clone(),
            cursors.clone(),
            plan.mix,
            mix(seed, 1000 + u64::from(number)),
        );
        let (running, requests) = (running.clone(), plan.requests);
        spawn(async move {
            client.run(requests).await;
            running.set(running.get() - 1);
        });
    }
    std::future::poll_fn(|_| match running.get() {
        0 => Poll::Ready(()),
        _ => Poll::Pending,
    })
    .await;
}

async fn close(machine: &Machine, device: Device, oracle: &RefCell<Oracle>) -> Result<(), String> {
    let asked = machine.tick();
    let op = {
        let mut oracle = oracle.borrow_mut();
        oracle.closing = Some(asked);
        oracle.submit(asked, 0, Kind::Flush, &device)
    };
    let result = device.clone().close().await;
    let tick = machine.tick();
    let answer = result.as_ref().map(|()| None);
    let mut oracle = oracle.borrow_mut();
    oracle.answer(tick, op, answer, &device);
    match result {
        Ok(()) => oracle.closed = Some(tick),
        Err(_) if machine.fault_fired().is_some() => {}
        Err(error) => return Err(format!("the image does not close: {error}")),
    }
    Ok(())
}
