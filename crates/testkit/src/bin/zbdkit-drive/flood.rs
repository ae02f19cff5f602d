//! Appends to many zones at once while something happens to the drive: nothing may hang, and every failure has its reason.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::process::{Child, Command};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use zbdkit_block::Device;
use zbdkit_io::{IoBuf, sleep, spawn};

use super::steps::name;

const DEPTH: u32 = 32;
const BLOCK: usize = 4096;
/// Appends before the command runs.
const BEFORE: u64 = 200;
/// What has not ended by then hangs.
const LIMIT: Duration = Duration::from_secs(60);

struct State {
    acknowledged: Cell<u64>,
    running: Cell<u32>,
    errors: RefCell<BTreeMap<String, u64>>,
    stop: Cell<bool>,
}

/// Floods the drive, runs the command in the middle of it, and says what came of the appends.
pub async fn run(device: &Device, command: &str) -> Result<()> {
    let geometry = device.limits().zoned.context("no zones")?;
    let state = Rc::new(State {
        acknowledged: Cell::new(0),
        running: Cell::new(DEPTH),
        errors: RefCell::default(),
        stop: Cell::new(false),
    });
    let sequential = geometry.nr_zones() - geometry.nr_conventional();
    let used = [sequential, 8, geometry.max_open().max(1)]
        .into_iter()
        .min()
        .unwrap_or(1);
    for n in 0..DEPTH {
        let zone = geometry.start(zbdkit_zone::ZoneNo(geometry.nr_conventional() + n % used));
        spawn(append(device.clone(), zone, state.clone()));
    }
    let begun = Instant::now();
    let mut child: Option<Child> = None;
    while state.running.get() > 0 {
        sleep(Duration::from_millis(5)).await;
        ensure!(begun.elapsed() < LIMIT, "{} appends hang", state.running.get());
        if child.is_none() && state.acknowledged.get() >= BEFORE {
            child = Some(Command::new("bash").arg("-c").arg(command).spawn()?);
        }
        if let Some(child) = &mut child
            && let Some(status) = child.try_wait()?
        {
            ensure!(status.success(), "{command} failed");
            state.stop.set(true);
        }
    }
    for (error, count) in state.errors.borrow().iter() {
        println!("{count} failed: {error}");
    }
    println!(
        "{} appends were acknowledged, all others have failed",
        state.acknowledged.get()
    );
    Ok(())
}

/// Appends to one zone until that fails for good, or it is enough. A zone that is full is reset.
async fn append(device: Device, zone: u64, state: Rc<State>) {
    let lane = device.lane(1);
    let mut failures = 0;
    while failures < 3 && !state.stop.get() {
        match device.append(&lane, IoBuf::alloc(BLOCK), zone).await {
            Ok(_) => state.acknowledged.set(state.acknowledged.get() + 1),
            Err(zbdkit_block::Error::Zone(zbdkit_zone::ZoneError::Full { .. })) => {
                // Several come to it at once.
                let _ = device.zone_op(&lane, zbdkit_block::ZoneOp::Reset, zone).await;
            }
            Err(error) => {
                *state.errors.borrow_mut().entry(name(error)).or_default() += 1;
                failures += 1;
            }
        }
    }
    lane.quiet().await;
    state.running.set(state.running.get() - 1);
}
