//! Copying an image's contents, and its zones, into another image.

use std::cell::{Cell, RefCell};
use std::ops::Range;

use zbdkit_io::IoBuf;
use zbdkit_qcow2::Qcow2;
use zbdkit_zone::ZoneType;

use super::bytes::{data_runs, differing_clusters, first_difference, is_zero};
use super::work::{Turns, Worker, all};
use super::zones::{Plan, ZoneEnds};
use super::{CHUNK, Contents, CopiedZones, Progress, ToolError, cluster_size, fetch, refuse_marks, store};
use crate::device::Device;
use crate::error::Error;

/// What the target of a copy reads as where nothing was copied yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetHolds {
    /// Zeros: it is new.
    Zeros,
    /// Nobody knows: everything is written, zeros too.
    Anything,
    /// Its backing image: what differs from that is written.
    Backing {
        /// It is the source's own backing image: what the source has from there is not even looked at.
        shared: bool,
    },
}

/// How an image is copied.
#[derive(Clone, Debug)]
pub struct CopyOptions {
    /// So many bytes of zeros in a row are left out; 0: nothing is left out, and the target takes its full space.
    pub sparse: usize,
    /// Write compressed clusters. The target must be a qcow2 image that does not hold [`TargetHolds::Anything`].
    pub compress: bool,
    /// What the target reads as before.
    pub target: TargetHolds,
    /// Pieces of the image that are worked on at once.
    pub workers: usize,
    /// Write in the order of the device's offsets.
    pub in_order: bool,
}

impl Default for CopyOptions {
    fn default() -> CopyOptions {
        CopyOptions {
            sparse: 4096,
            compress: false,
            target: TargetHolds::Zeros,
            workers: 8,
            in_order: true,
        }
    }
}

/// Copies the contents of `source`, and its zones where `target` has zones too; says what became of those. The target
/// is durable when this returns.
///
/// A source without zones fills a target's sequential zones from their starts: each is written up to its last data.
///
/// # Errors
/// Refused, before anything is written: the target is smaller or read-only; the zones do not fit. Refused later: data
/// above a zone's capacity. The target is then not to be used.
pub async fn copy(
    source: &Device,
    target: &Device,
    options: &CopyOptions,
    progress: Progress<'_>,
) -> Result<CopiedZones, ToolError> {
    let (size, room) = (source.limits().size, target.limits().size);
    if size > room {
        return Err(ToolError::Refused(format!(
            "the target is smaller than the source: it has {room} bytes, the source {size}"
        )));
    }
    let plan = Plan::new(source, target)?;
    let copy = Copy::new(source, target, options, progress, plan.ends())?;
    if options.target == TargetHolds::Anything {
        plan.empty(target).await?;
    }
    progress(0, size);
    let workers = (0..options.workers.max(1))
        .map(|_| Box::pin(copy.worker()) as Worker<'_, ToolError>)
        .collect();
    all(workers).await?;
    if options.target != TargetHolds::Zeros && size < room {
        super::zero(target, size..room).await?;
    }
    let zones = plan.install(source, target, copy.ends.into_inner()).await?;
    let lane = target.lane(0);
    target
        .flush(&lane)
        .await
        .map_err(ToolError::request("flushing the target", 0))?;
    progress(size, size);
    Ok(zones)
}

struct Copy<'a> {
    source: &'a Device,
    target: &'a Device,
    options: &'a CopyOptions,
    progress: Progress<'a>,
    size: u64,
    /// The unit in which an overlay is compared with its backing image, and in which clusters are compressed.
    cluster: u64,
    compressor: Option<&'a Qcow2>,
    /// Where nobody works yet.
    cursor: Cell<u64>,
    turns: Turns,
    /// Where each zone's data ends, if that must be found out.
    ends: RefCell<Option<ZoneEnds>>,
}

/// What there is to do for a range.
enum Piece {
    Nothing,
    Zeros,
    Bytes,
}

/// What is done in a range of the target once it is its turn.
enum Change {
    Zeros(Range<u64>),
    Bytes(u64, IoBuf),
    Compressed(Vec<(u64, Vec<u8>)>),
}

impl<'a> Copy<'a> {
    fn new(
        source: &'a Device,
        target: &'a Device,
        options: &'a CopyOptions,
        progress: Progress<'a>,
        ends: Option<ZoneEnds>,
    ) -> Result<Copy<'a>, ToolError> {
        if target.limits().read_only {
            return Err(ToolError::Refused("the target is open read-only".into()));
        }
        refuse_marks(target, "the target")?;
        let compressor = if options.compress {
            let refused = || ToolError::Refused("Compression not supported for this file format".into());
            Some(target.qcow2().ok_or_else(refused)?)
        } else {
            None
        };
        if compressor.is_some() && options.target == TargetHolds::Anything {
            return Err(ToolError::Refused(
                "compressed clusters can only be written into a new image".into(),
            ));
        }
        Ok(Copy {
            source,
            target,
            options,
            progress,
            size: source.limits().size,
            cluster: cluster_size(target),
            compressor,
            cursor: Cell::new(0),
            turns: Turns::new(options.in_order),
            ends: RefCell::new(ends),
        })
    }

    async fn worker(&self) -> Result<(), ToolError> {
        let result = self.work().await;
        if result.is_err() {
            self.turns.stop();
        }
        result
    }

    async fn work(&self) -> Result<(), ToolError> {
        let mut buf = None;
        loop {
            let start = self.cursor.get();
            if start >= self.size || self.turns.is_stopped() {
                return Ok(());
            }
            let mut end = (start + CHUNK).min(self.size);
            self.cursor.set(end);
            let (len, piece) = self.piece(start, self.size - start).await?;
            let whole = start + len >= end && !matches!(piece, Piece::Bytes);
            let changes = if whole {
                // Nothing to read. If nobody has taken what follows, it is ours as well, as far as it is alike.
                if self.cursor.get() == end {
                    end = match start + len {
                        to if to == self.size => to,
                        to => end.max(to - to % CHUNK),
                    };
                    self.cursor.set(end);
                }
                match piece {
                    Piece::Zeros => vec![Change::Zeros(start..end)],
                    _ => Vec::new(),
                }
            } else {
                let buf = buf.get_or_insert_with(|| IoBuf::alloc(CHUNK as usize));
                let buf = buf.slice(0..(end - start) as usize);
                match self.compressor {
                    Some(qcow2) => self.clusters(qcow2, start, &buf).await?,
                    None => self.changes(start, &buf).await?,
                }
            };
            if !self.carry_out(start, end, changes).await? {
                return Ok(());
            }
        }
    }

    /// What to do from an offset on, and for how many bytes.
    async fn piece(&self, at: u64, len: u64) -> Result<(u64, Piece), ToolError> {
        if self.options.sparse == 0 {
            return Ok((len, Piece::Bytes));
        }
        if let Some(len) = self.hidden(at, len) {
            return Ok((len, Piece::Nothing));
        }
        let extent = self.source.map(at, len).await;
        let extent = extent.map_err(ToolError::request("looking at the source", at))?;
        let inherited = extent.depth > 0 || !extent.present;
        Ok(match self.options.target {
            TargetHolds::Backing { shared: true } if inherited => (extent.len, Piece::Nothing),
            _ if !extent.zero => (extent.len, Piece::Bytes),
            TargetHolds::Zeros => (extent.len, Piece::Nothing),
            TargetHolds::Anything => (extent.len, Piece::Zeros),
            TargetHolds::Backing { .. } => {
                // As it will read once the source's zones are installed.
                let below = self.target.below().map(at, extent.len).await;
                let below = below.map_err(ToolError::request("looking at the target", at))?;
                let piece = if below.zero { Piece::Nothing } else { Piece::Zeros };
                (below.len, piece)
            }
        })
    }

    /// How much of a range nobody will see in an overlay: what lies above the written ends of zones that are written in
    /// order. In a new image there is nothing, and one that is overwritten gives the space back.
    fn hidden(&self, at: u64, len: u64) -> Option<u64> {
        let TargetHolds::Backing { .. } = self.options.target else {
            return None;
        };
        let end = self.written_end(at)?;
        let geometry = self.source.engine()?.geometry();
        (at >= end).then(|| len.min(geometry.end(geometry.zone_of(at)) - at))
    }

    /// Where data ends in the zone that holds this byte, if it is one that is written in order and whose bytes above that
    /// do not matter.
    fn written_end(&self, at: u64) -> Option<u64> {
        let engine = self.source.engine()?;
        let geometry = engine.geometry();
        let zone = geometry.zone_of(at);
        let record = engine.record(zone);
        // Above a random write area there must be zeros.
        let ordered = geometry.zone_type(zone) == ZoneType::SequentialRequired && !record.zrwa;
        ordered.then(|| geometry.start(zone) + record.written)
    }

    /// Reads a piece of the source and finds what of it must be written.
    async fn changes(&self, start: u64, buf: &IoBuf) -> Result<Vec<Change>, ToolError> {
        let end = start + buf.len() as u64;
        let mut changes = Vec::new();
        let mut at = start;
        while at < end {
            let (len, piece) = self.piece(at, end - at).await?;
            let next = at + len;
            match piece {
                Piece::Nothing => {}
                Piece::Zeros => changes.push(Change::Zeros(at..next)),
                Piece::Bytes => {
                    let part = buf.slice((at - start) as usize..(next - start) as usize);
                    self.bytes(at, &part, &mut changes).await?;
                }
            }
            at = next;
        }
        Ok(changes)
    }

    async fn bytes(&self, at: u64, buf: &IoBuf, changes: &mut Vec<Change>) -> Result<(), ToolError> {
        if self.options.sparse == 0 {
            Contents::of(self.source).fill(buf, at).await?;
            self.note_data(at, &data_runs(buf, 4096))?;
            changes.push(Change::Bytes(at, buf.clone()));
            return Ok(());
        }
        fetch(self.source, buf, at).await?;
        let position = |offset: usize| at + offset as u64;
        match self.options.target {
            TargetHolds::Backing { .. } => {
                let old = IoBuf::alloc(buf.len());
                Contents::below(self.target).fill(&old, at).await?;
                for run in differing_clusters(self.cluster, at, buf, &old) {
                    let part = buf.slice(run.clone());
                    if is_zero(&part) {
                        changes.push(Change::Zeros(position(run.start)..position(run.end)));
                    } else {
                        self.note_data(at, std::slice::from_ref(&run))?;
                        changes.push(Change::Bytes(position(run.start), part));
                    }
                }
            }
            holds => {
                let runs = data_runs(buf, self.options.sparse);
                self.note_data(at, &runs)?;
                let mut done = 0;
                for run in &runs {
                    if holds == TargetHolds::Anything && done < run.start {
                        changes.push(Change::Zeros(position(done)..position(run.start)));
                    }
                    changes.push(Change::Bytes(position(run.start), buf.slice(run.clone())));
                    done = run.end;
                }
                if holds == TargetHolds::Anything && done < buf.len() {
                    changes.push(Change::Zeros(position(done)..position(buf.len())));
                }
            }
        }
        Ok(())
    }

    /// Reads a piece of the source and compresses the clusters that must be written, on another thread.
    async fn clusters(&self, qcow2: &Qcow2, start: u64, buf: &IoBuf) -> Result<Vec<Change>, ToolError> {
        Contents::of(self.source).fill(buf, start).await?;
        let mut clusters = Vec::new();
        for (index, from) in (0..buf.len()).step_by(self.cluster as usize).enumerate() {
            let part = buf.slice(from..buf.len().min(from + self.cluster as usize));
            let at = start + index as u64 * self.cluster;
            if self.must_write(at, &part).await? {
                let data = if is_zero(&part) { 0..0 } else { 0..part.len() };
                self.note_data(at, std::slice::from_ref(&data))?;
                clusters.push((at, part.to_vec()));
            }
        }
        let compression = qcow2.header().await.compression;
        let cluster = self.cluster as usize;
        let compressed = zbdkit_io::unblock(move || {
            let one = |(at, bytes): (u64, Vec<u8>)| {
                let mut whole = bytes.clone();
                whole.resize(cluster, 0);
                (at, zbdkit_qcow2::compress(compression, &whole).ok_or(bytes))
            };
            clusters.into_iter().map(one).collect::<Vec<_>>()
        });
        let mut changes = Vec::new();
        let mut packed = Vec::new();
        for (at, result) in compressed.await {
            match result {
                Ok(bytes) => packed.push((at, bytes)),
                // It would not become smaller.
                Err(bytes) => changes.push(Change::Bytes(at, IoBuf::from_vec(bytes))),
            }
        }
        if !packed.is_empty() {
            changes.push(Change::Compressed(packed));
        }
        Ok(changes)
    }

    async fn must_write(&self, at: u64, cluster: &IoBuf) -> Result<bool, ToolError> {
        if self.options.sparse == 0 {
            return Ok(true);
        }
        let TargetHolds::Backing { .. } = self.options.target else {
            return Ok(!is_zero(cluster));
        };
        let len = cluster.len() as u64;
        let seen = self
            .written_end(at)
            .map_or(len, |end| end.saturating_sub(at).min(len)) as usize;
        if seen == 0 {
            return Ok(false);
        }
        let (old, new) = (IoBuf::alloc(seen), cluster.slice(0..seen));
        Contents::below(self.target).fill(&old, at).await?;
        Ok(first_difference(&new, &old).is_some())
    }

    /// Makes the changes of a piece when it is its turn. `false` where the work was stopped before.
    async fn carry_out(&self, start: u64, end: u64, changes: Vec<Change>) -> Result<bool, ToolError> {
        if !self.turns.wait(start).await {
            return Ok(false);
        }
        for change in changes {
            match change {
                Change::Zeros(range) => super::zero(self.target, range).await?,
                Change::Bytes(at, buf) => store(self.target, buf, at).await?,
                Change::Compressed(clusters) => {
                    if let Some(qcow2) = self.compressor {
                        let written = qcow2.write_packed(clusters).await.map_err(Error::from);
                        written.map_err(ToolError::request("writing the target", start))?;
                    }
                }
            }
        }
        self.turns.pass(end);
        (self.progress)(self.turns.done(), self.size);
        Ok(true)
    }

    /// Notes that there is data in parts of a buffer that belongs at `at`, where zones are filled.
    fn note_data(&self, at: u64, runs: &[Range<usize>]) -> Result<(), ToolError> {
        let mut ends = self.ends.borrow_mut();
        let Some(ends) = ends.as_mut() else { return Ok(()) };
        runs.iter()
            .filter(|run| !run.is_empty())
            .try_for_each(|run| ends.note(at + run.start as u64..at + run.end as u64))
    }
}
