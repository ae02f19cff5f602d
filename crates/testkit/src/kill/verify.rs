//! Reading the whole device back, through its queues.

use anyhow::{Context, Result, bail, ensure};

use super::answers::pointer;
use super::channel::{Channel, Config};
use super::judge::Found;
use super::shared::Geometry;
use super::stamp::Content;
use crate::client::{Zone, ZoneKind};

/// What the device holds.
#[derive(Debug)]
pub struct Whole {
    /// Every block of the conventional zones.
    pub conventional: Vec<Vec<Content>>,
    /// The sequential zones.
    pub sequential: Vec<Found>,
    /// Which of them have a random write area.
    pub areas: Vec<bool>,
    /// Bytes read.
    pub bytes: u64,
}

/// Learns the zones of a device: conventional ones first, then sequential ones of one capacity.
///
/// # Errors
/// If the zones are others, or cannot be reported.
pub fn learn(queue: &mut Channel, config: &Config) -> Result<Geometry> {
    let zones: Vec<Zone> = queue
        .report_all(config)?
        .into_iter()
        .map(|(zone, _)| zone)
        .collect();
    let conventional = zones
        .iter()
        .take_while(|zone| zone.kind == ZoneKind::Conventional)
        .count();
    let sequential = &zones[conventional..];
    let capacity = sequential
        .first()
        .context("the device has no sequential zones")?
        .cap;
    ensure!(
        sequential
            .iter()
            .all(|zone| zone.kind == ZoneKind::SequentialRequired && zone.cap == capacity),
        "the zones are not all sequential-required ones of {capacity} sectors"
    );
    Geometry::new(config, capacity, conventional as u32).context("the configuration makes no sense")
}

/// Reads everything, all queues taking part, and gives the queues back.
///
/// # Errors
/// If a request fails, or bytes past a zone's capacity are not zeros.
pub fn read_all(
    mut queues: Vec<Channel>,
    config: &Config,
    geometry: &Geometry,
    image: u64,
) -> Result<(Vec<Channel>, Whole)> {
    let zones = queues[0].report_all(config)?;
    let count = queues.len();
    let parts: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = queues
            .iter_mut()
            .enumerate()
            .map(|(first, queue)| {
                scope.spawn(move || -> Result<Vec<Vec<Content>>> {
                    let zones = (first as u32..geometry.zones).step_by(count);
                    zones
                        .map(|zone| read_zone(queue, geometry, image, zone))
                        .collect()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a reading thread panicked"))
            .collect()
    });
    let mut parts = parts
        .into_iter()
        .map(|part: Result<Vec<_>>| part.map(Vec::into_iter))
        .collect::<Result<Vec<_>>>()?;
    let mut whole = Whole {
        conventional: Vec::new(),
        sequential: Vec::new(),
        areas: Vec::new(),
        bytes: u64::from(geometry.zones) * u64::from(geometry.zone_blocks) * u64::from(geometry.block),
    };
    for (zone, (report, area)) in zones.iter().enumerate() {
        let mut blocks = parts[zone % count].next().context("a zone was not read")?;
        if zone < geometry.conventional as usize {
            whole.conventional.push(blocks);
            continue;
        }
        let past = blocks.split_off(geometry.capacity as usize);
        if let Some(content) = past.iter().find(|&&content| content != Content::Zeros) {
            bail!(
                "zone {zone}: past the capacity of {} blocks is {content}",
                geometry.capacity
            );
        }
        whole.areas.push(*area);
        whole.sequential.push(Found {
            blocks,
            pointer: pointer(report, geometry.block),
            state: report.state,
        });
    }
    Ok((queues, whole))
}

fn read_zone(queue: &mut Channel, geometry: &Geometry, image: u64, zone: u32) -> Result<Vec<Content>> {
    let most = (queue.max_data() as u32 / geometry.block).max(1);
    let mut contents = Vec::with_capacity(geometry.zone_blocks as usize);
    while (contents.len() as u32) < geometry.zone_blocks {
        let at = contents.len() as u32;
        let blocks = most.min(geometry.zone_blocks - at);
        let data = queue
            .read(geometry.sector(zone, at), blocks * geometry.block)
            .with_context(|| format!("reading {blocks} blocks from block {at} of zone {zone}"))?;
        let blocks = data.chunks_exact(geometry.block as usize);
        contents.extend(blocks.map(|block| Content::of(image, block)));
    }
    Ok(contents)
}
