//! Zoned images: our block layer does zone workloads, and QEMU judges what is a qcow2 image apart from the zones.
//!
//! QEMU refuses an image with zones. In a copy without the feature bits of zones it must find no error, exactly as many
//! leaks as the zones' tables have clusters, and below the written ends what was written.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use zbdkit_block::{
    CreateOptions, CrossZone, Device, Graph, Host, OpenOptions, OsHost, Qcow2CreateOptions, Repair, ZoneOp,
    check, create_qcow2,
};
use zbdkit_io::{IoBuf, Runtime};
use zbdkit_qcow2::{Compression, Header, Layout as Qcow2Layout};
use zbdkit_spec::qcow2::{
    EXT_ZBDKIT, EXT_ZONED, INCOMPAT_ZONE_STATES, INCOMPAT_ZONED, SnapshotDirectory, SnapshotZones,
};
use zbdkit_zone::{CloseEmpty, Condition, Filter, Model, ZoneInfo, ZoneType};

use crate::kill::rng::Rng;

use super::content::{Content, Pattern};
use super::layout::Layout;
use super::ours::all;
use super::program::Program;
use super::world::World;

const NAME: &str = "zoned.qcow2";
const COPY: &str = "copy.qcow2";
/// Bytes of the head of the snapshots' directory, and of an entry.
const DIRECTORY_HEAD: u64 = size_of::<SnapshotDirectory>() as u64;
const DIRECTORY_ENTRY: u64 = size_of::<SnapshotZones>() as u64;

/// A zoned image, and what it must hold.
pub struct Zoned<'a> {
    runtime: &'a Runtime,
    rng: Rng,
    world: World,
    content: Content,
    device: Option<Device>,
    zones: Vec<ZoneInfo>,
    block: u64,
    cluster: u64,
}

impl<'a> Zoned<'a> {
    /// Makes an image in a directory; the seed decides what it is like.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(seed: u64, directory: &Path, runtime: &'a Runtime) -> Result<Zoned<'a>> {
        let mut rng = Rng::new(seed).fork(0x20e5);
        let layout = Layout::random(&mut rng, false);
        let zone = layout.cluster_size.max(16 << 10) << rng.below(4);
        let zone = zone.min(4 << 20).max(layout.cluster_size);
        let number = 2 + rng.below((16 << 20) / zone).min(9);
        let block = if rng.one_in(2) { 512 } else { 4096 };
        let short = if rng.one_in(4) {
            block * rng.below(zone / block)
        } else {
            0
        };
        let size = number * zone - short;
        let zones = CreateOptions {
            model: if rng.one_in(4) {
                Model::HostAware
            } else {
                Model::HostManaged
            },
            zone_size: Some(zone),
            zone_capacity: Some(
                zone - if rng.one_in(3) {
                    block * rng.below(zone / block / 2)
                } else {
                    0
                },
            ),
            conventional_zones: rng.below(number.min(4)) as u32,
            max_open: Some(rng.below(4) as u32),
            max_active: 0,
            block_size: block as u32,
            ..CreateOptions::new(NAME, size)
        };
        let mut world = World::new(directory)?;
        world
            .trace
            .push(format!("# zbdkit creates {NAME}: {layout:?}, {zones:?}"));
        let options = Qcow2CreateOptions {
            layout: Qcow2Layout {
                cluster_size: layout.cluster_size,
                refcount_bits: layout.refcount_bits,
                extended_l2: layout.extended_l2 && layout.version == 3,
                compression: if layout.zstd {
                    Compression::Zstd
                } else {
                    Compression::Zlib
                },
                ..Qcow2Layout::default()
            },
            zones: Some(zones),
            ..Qcow2CreateOptions::new(world.path(NAME), size)
        };
        let made = runtime.block_on(create_qcow2(&host(), &options));
        made.map_err(|error| anyhow!("create: {error}"))?;
        Ok(Zoned {
            runtime,
            rng,
            content: Content::zeros(size),
            world,
            device: None,
            zones: Vec::new(),
            block,
            cluster: layout.cluster_size,
        })
    }

    /// What was done.
    pub fn trace(&mut self) -> Vec<String> {
        std::mem::take(&mut self.world.trace)
    }

    /// Works on it, and asks QEMU.
    ///
    /// # Errors
    /// What was found.
    pub fn run(&mut self, qemu: &Program) -> Result<()> {
        let rounds = 1 + self.rng.below(3);
        for _ in 0..rounds {
            self.open()?;
            for _ in 0..4 + self.rng.below(20) {
                self.step()?;
            }
            self.compare().context("as zbdkit reads it")?;
            let device = self.device.take().context("it is open")?;
            if self.rng.one_in(3) {
                let name = self.world.name("snapshot");
                self.world.trace.push(format!("# snapshot {name}"));
                let made = self.runtime.block_on(device.snapshot_create(&name));
                // Refcounts of one bit have no room for any.
                if let Err(error) = made {
                    ensure!(error.to_string().contains("refcount"), "snapshot: {error}");
                }
            }
            let closed = self.runtime.block_on(device.close());
            closed.map_err(|error| anyhow!("close: {error}"))?;
            self.judge(qemu)?;
        }
        self.open()?;
        self.compare().context("as zbdkit reads it in the end")
    }

    fn open(&mut self) -> Result<()> {
        self.world.trace.push("# open".into());
        let opened = self
            .runtime
            .block_on(Graph::from_path(self.world.path(NAME)).open(&host(), &OpenOptions::default()));
        let device = opened.map_err(|error| anyhow!("open: {error}"))?;
        ensure!(device.notices().is_empty(), "notices: {:?}", device.notices());
        self.device = Some(device);
        self.report()
    }

    fn report(&mut self) -> Result<()> {
        let device = self.device.as_ref().context("it is open")?;
        let zones = self.runtime.block_on(device.report(0, Filter::All, usize::MAX));
        self.zones = zones.map_err(|error| anyhow!("report: {error}"))?;
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        match self.rng.below(8) {
            0..=3 => self.append()?,
            4..=5 => self.write()?,
            6 => self.manage()?,
            _ => {
                let device = self.device.clone().context("it is open")?;
                let flushed = self.runtime.block_on(device.flush(&device.lane(1)));
                flushed.map_err(|error| anyhow!("flush: {error}"))?;
            }
        }
        self.report()
    }

    /// Appends, many at once; each says where it went, if there was room for it.
    fn append(&mut self) -> Result<()> {
        let device = self.device.clone().context("it is open")?;
        let lane = device.lane(32);
        let mut sent = Vec::new();
        for _ in 0..1 + self.rng.below(24) {
            let zone = self.rng.below(self.zones.len() as u64) as usize;
            let len = self.block * self.rng.skewed(1, 64 << 10 >> 9);
            let len = len.min(self.zones[zone].capacity).next_multiple_of(self.block);
            sent.push((zone, len, Pattern::random(&mut self.rng)));
        }
        self.world
            .trace
            .push(format!("# append at once (zone, bytes): {sent:?}"));
        let jobs = sent.iter().map(|(zone, len, pattern)| {
            let buf = IoBuf::from_vec(self.world.sources.render(*pattern, *len));
            let (device, lane, start) = (&device, &lane, self.zones[*zone].start);
            Box::pin(async move { device.append(lane, buf, start).await })
        });
        let results = self.runtime.block_on(all(jobs.collect(), &mut self.rng.fork(5)));
        for ((_, len, pattern), result) in sent.iter().zip(results) {
            if let Ok(offset) = result {
                self.content.write(offset..offset + len, *pattern);
            }
        }
        Ok(())
    }

    /// Writes: anywhere where there is no pointer, else at the pointer.
    fn write(&mut self) -> Result<()> {
        let zone = self.zones[self.rng.below(self.zones.len() as u64) as usize];
        let free = zone.kind == ZoneType::Conventional;
        let at = if free {
            zone.start + self.block * self.rng.below(zone.len / self.block)
        } else {
            zone.wp
        };
        let most = (zone.start + if free { zone.len } else { zone.capacity }).saturating_sub(at);
        if most < self.block {
            return Ok(());
        }
        let len = self.block * self.rng.skewed(1, most.min(1 << 20) / self.block);
        let pattern = Pattern::random(&mut self.rng);
        self.world.trace.push(format!("# write {at} {len} {pattern:?}"));
        let device = self.device.clone().context("it is open")?;
        let buf = IoBuf::from_vec(self.world.sources.render(pattern, len));
        let written = self.runtime.block_on(device.write(&device.lane(1), buf, at));
        let full = matches!(
            zone.condition,
            Condition::Full | Condition::ReadOnly | Condition::Offline
        );
        match written {
            Ok(()) => self.content.write(at..at + len, pattern),
            // Or no more zones may be open.
            Err(error) => ensure!(
                full || !matches!(
                    zone.condition,
                    Condition::ImplicitlyOpen | Condition::ExplicitlyOpen | Condition::NotWritePointer
                ),
                "write {at} {len}, {zone:?}: {error}"
            ),
        }
        Ok(())
    }

    fn manage(&mut self) -> Result<()> {
        let zone = self.zones[self.rng.below(self.zones.len() as u64) as usize];
        let ops = [
            ZoneOp::Reset,
            ZoneOp::Reset,
            ZoneOp::Finish,
            ZoneOp::Open,
            ZoneOp::Close(CloseEmpty::ToEmpty),
            ZoneOp::SetReadOnly,
            ZoneOp::SetNormal,
        ];
        let op = ops[self.rng.below(ops.len() as u64) as usize];
        self.world.trace.push(format!("# {op:?} zone at {}", zone.start));
        let device = self.device.clone().context("it is open")?;
        let done = self
            .runtime
            .block_on(device.zone_op(&device.lane(1), op, zone.start));
        if done.is_ok() && op == ZoneOp::Reset {
            self.content.zero(zone.start..zone.start + zone.len);
        }
        Ok(())
    }

    /// What a reader of the device finds is the model: above the written ends, zeros.
    fn compare(&mut self) -> Result<()> {
        let device = self.device.clone().context("it is open")?;
        let buf = IoBuf::alloc(self.content.len() as usize);
        let lane = device.lane(1);
        let read = device.read(&lane, buf.clone(), 0, CrossZone::Allow);
        let read = self.runtime.block_on(read);
        read.map_err(|error| anyhow!("read: {error}"))?;
        self.content.compare(&self.world.sources, &buf.to_vec(), 0)
    }

    /// What QEMU says of a copy without the bits of zones, and what our own check says of the image.
    fn judge(&mut self, qemu: &Program) -> Result<()> {
        let refused = qemu.img(&mut self.world, ["info", "-f", "qcow2", NAME])?;
        ensure!(
            refused.code() != 0 && refused.text.contains("zoned format"),
            "QEMU opens an image with zones: {}",
            refused.text
        );
        let bytes = std::fs::read(self.world.path(NAME))?;
        let mut header = Header::decode(&bytes, bytes.len() as u64)?;
        let word = |magic, at: usize| {
            let data = header.extension(magic).and_then(|data| data.get(at..at + 8));
            data.map_or(0, |data| {
                u64::from_be_bytes(data.try_into().expect("eight bytes"))
            })
        };
        let number = header.extension(EXT_ZONED).and_then(|data| data.get(4..8));
        let number = number.map_or(0, |data| u32::from_be_bytes(data.try_into().expect("four bytes")));
        let (directory, directory_len) = (word(EXT_ZBDKIT, 24), word(EXT_ZBDKIT, 32));
        let mut tables = vec![u64::from(number) * 8, word(EXT_ZBDKIT, 16), directory_len];
        for entry in 0..directory_len.saturating_sub(DIRECTORY_HEAD) / DIRECTORY_ENTRY {
            let at = (directory + DIRECTORY_HEAD + entry * DIRECTORY_ENTRY + 40) as usize;
            let len = bytes.get(at..at + 8).context("the directory ends early")?;
            tables.push(u64::from_be_bytes(len.try_into().expect("eight bytes")));
        }
        let clusters: u64 = tables.iter().map(|len| len.div_ceil(self.cluster)).sum();
        header.incompatible &= !(INCOMPAT_ZONED | INCOMPAT_ZONE_STATES);
        std::fs::write(self.world.path(COPY), &bytes)?;
        let copy = std::fs::OpenOptions::new()
            .write(true)
            .open(self.world.path(COPY))?;
        copy.write_all_at(&header.encode()?, 0)?;
        let (found, said) = qemu.check(&mut self.world, COPY, None)?;
        ensure!(
            (found.corruptions, found.check_errors, found.leaks) == (0, 0, clusters),
            "the tables of zones have {clusters} clusters ({tables:?} bytes), QEMU finds {said}"
        );
        let contents = qemu.read(&mut self.world, COPY, "qcow2", None)?;
        for zone in &self.zones {
            let end = match zone.kind {
                ZoneType::Conventional => zone.start + zone.len,
                _ => zone.written_end,
            };
            let part = &contents[zone.start as usize..end as usize];
            let compared = self.content.compare(&self.world.sources, part, zone.start);
            compared.with_context(|| format!("as QEMU reads it: {zone:?}"))?;
        }
        std::fs::remove_file(self.world.path(COPY))?;
        let graph = Graph::from_path(self.world.path(NAME));
        let options = OpenOptions::default();
        let outcome = self
            .runtime
            .block_on(check(&host(), &graph, &options, Repair::None, &mut |_, _| {}));
        let outcome = outcome.map_err(|error| anyhow!("check: {error}"))?;
        let report = outcome.report.context("a report")?;
        let zones = outcome.zones.context("a report on zones")?;
        ensure!(
            (
                report.corruptions,
                report.check_errors,
                report.leaks,
                zones.errors
            ) == (0, 0, 0, 0),
            "our check: {:?} {:?}",
            report.messages,
            zones.messages
        );
        Ok(())
    }
}

fn host() -> Arc<dyn Host> {
    Arc::new(OsHost)
}
