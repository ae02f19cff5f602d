//! What is done to an image between its runs: snapshots.

use std::path::Path;

use zbdkit_block::{Device, Host, RunStateMode};
use zbdkit_io::Runtime;

use super::disk::Disk;
use super::format;
use super::host::{Behaviour, Machine, Recorded};
use super::judge::View;
use super::run::{drive, look_at, open};

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A snapshot of this name is made.
    Create(String),
    /// It is applied.
    Apply(String),
    /// It is deleted.
    Delete(String),
}

/// What is known of a step that was recorded.
#[derive(Clone, Debug)]
pub struct Done {
    /// The files before.
    pub start: Disk,
    /// What happened to them.
    pub events: Vec<Recorded>,
    /// The files after.
    pub end: Disk,
    /// The opening before the step was over.
    pub opened: u64,
    /// The step was answered.
    pub answered: u64,
    /// What the image showed before.
    pub before: View,
    /// What it shows after.
    pub after: View,
    /// The names of its snapshots before.
    pub listed_before: Vec<String>,
    /// And after.
    pub listed_after: Vec<String>,
}

/// Is told what the image shows before the step, and may object.
pub type Look<'a> = &'a mut dyn FnMut(&View) -> Result<(), String>;

/// Opens the image, takes the step, closes it; then opens what is left and looks at it.
pub fn record(
    runtime: &Runtime,
    start: &Disk,
    path: &Path,
    behaviour: Behaviour,
    seed: u64,
    step: &Step,
    look: Look<'_>,
) -> Result<Done, String> {
    let machine = Machine::new(start.clone(), behaviour, seed);
    let host = machine.host();
    let (opened, answered, before, listed_before) = drive(runtime, &machine, async {
        let device = open(&host, path, &RunStateMode::Beside)
            .await
            .map_err(|error| format!("the image does not open: {error}"))?;
        let opened = machine.tick();
        machine.arm();
        let view = look_at(&device)
            .await
            .map_err(|error| format!("it cannot be read: {error}"))?;
        look(&view)?;
        let listed = format::snapshots(&device).await?;
        take(&device, step).await?;
        let answered = machine.tick();
        device
            .close()
            .await
            .map_err(|error| format!("it does not close: {error}"))?;
        Ok::<_, String>((opened, answered, view, listed))
    })?;
    let end = machine.disk();
    let (after, listed_after) = look_again(runtime, &end, path)?;
    Ok(Done {
        start: start.clone(),
        events: machine.events(),
        end,
        opened,
        answered,
        before,
        after,
        listed_before,
        listed_after,
    })
}

async fn take(device: &Device, step: &Step) -> Result<(), String> {
    format::step(device, step)
        .await
        .map_err(|error| format!("{step:?} failed: {error}"))
}

/// What the image shows, and the names of its snapshots.
pub fn look_again(runtime: &Runtime, disk: &Disk, path: &Path) -> Result<(View, Vec<String>), String> {
    let machine = Machine::new(disk.clone(), Behaviour::default(), 1);
    let host = machine.host();
    drive(runtime, &machine, see(&host, path))
}

async fn see(host: &std::sync::Arc<dyn Host>, path: &Path) -> Result<(View, Vec<String>), String> {
    let device = open(host, path, &RunStateMode::Beside)
        .await
        .map_err(|error| format!("the image does not open: {error}"))?;
    let view = look_at(&device)
        .await
        .map_err(|error| format!("it cannot be read: {error}"))?;
    let listed = format::snapshots(&device).await?;
    device
        .close()
        .await
        .map_err(|error| format!("it does not close: {error}"))?;
    Ok((view, listed))
}

/// Two looks at the same state: zones and contents are alike.
pub fn same(one: &View, two: &View) -> Result<(), String> {
    if one.zones.len() != two.zones.len() {
        return Err(format!(
            "{} zones, and {} before",
            two.zones.len(),
            one.zones.len()
        ));
    }
    if one.block_size != two.block_size {
        return Err(format!(
            "blocks of {} bytes, and {} before",
            two.block_size, one.block_size
        ));
    }
    for (zone, (then, now)) in one.zones.iter().zip(&two.zones).enumerate() {
        if then != now {
            return Err(format!("zone {zone} is {now:?}\n  and was {then:?}"));
        }
        if one.extensions[zone] != two.extensions[zone] {
            return Err(format!("zone {zone} has another descriptor extension"));
        }
        if one.contents[zone] != two.contents[zone] {
            let bytes = |view: &View| view.contents[zone].clone().unwrap_or_default();
            let (then, now) = (bytes(one), bytes(two));
            let at = then.iter().zip(&now).position(|(a, b)| a != b);
            return Err(format!("zone {zone} has other contents from byte {at:?} on"));
        }
    }
    Ok(())
}
