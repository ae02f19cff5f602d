//! Another backing image for an overlay that is to read as before.

use std::ops::Range;

use zbdkit_io::IoBuf;

use super::bytes::{differing_clusters, is_zero};
use super::{CHUNK, Contents, Progress, ToolError, cluster_size, refuse_marks, store, zero};
use crate::device::Device;

/// Copies into `overlay` what it has from its backing image now and would read differently over `new` (over nothing if
/// `None`), cluster by cluster. Durable when this returns; the overlay's header is then to be changed. Says how many
/// bytes were copied.
///
/// Bytes above the written ends of the overlay's zones are nobody's and stay as they are, but for zones with a random write
/// area: there they are zeros, and the overlay gets them itself.
///
/// # Errors
/// Refused: the overlay is read-only. A request failed: the overlay reads as before, over its present backing image.
pub async fn rebase(
    overlay: &Device,
    new: Option<&Device>,
    progress: Progress<'_>,
) -> Result<u64, ToolError> {
    if overlay.limits().read_only {
        return Err(ToolError::Refused("the image is open read-only".into()));
    }
    refuse_marks(overlay, "the image")?;
    if let Some(new) = new {
        refuse_marks(new, "the backing image")?;
    }
    let cluster = cluster_size(overlay);
    let present = overlay.backing().and_then(|backing| backing.node.as_ref());
    let rebase = Rebase {
        overlay,
        old: Contents::of(overlay),
        // As the overlay will read it, which is below its zones.
        new: new.map(Contents::below),
        cluster,
        shown: present.map_or(0, |node| node.limits().size.next_multiple_of(cluster)),
        buffers: [IoBuf::alloc(CHUNK as usize), IoBuf::alloc(CHUNK as usize)],
    };
    rebase.zero_above_areas().await?;
    let size = overlay.limits().size;
    let (mut at, mut copied) = (0, 0);
    progress(0, size);
    while at < size {
        let extent = overlay.map(at, size - at).await;
        let extent = extent.map_err(ToolError::request("looking at the image", at))?;
        if extent.depth > 0 || !extent.present {
            let mut from = at;
            while from < at + extent.len {
                let (to, bytes) = rebase.piece(from..at + extent.len).await?;
                copied += bytes;
                from = to;
                progress(from, size);
            }
        }
        at += extent.len;
        progress(at, size);
    }
    let lane = overlay.lane(0);
    let flushed = overlay.flush(&lane).await;
    flushed.map_err(ToolError::request("flushing the image", 0))?;
    Ok(copied)
}

struct Rebase<'a> {
    overlay: &'a Device,
    old: Contents<'a>,
    new: Option<Contents<'a>>,
    cluster: u64,
    /// Up to here, in whole clusters, the present backing image shows.
    shown: u64,
    buffers: [IoBuf; 2],
}

impl Rebase<'_> {
    /// Makes what lies above random write areas zeros of the overlay's own, wherever they come from now.
    async fn zero_above_areas(&self) -> Result<(), ToolError> {
        let Some(engine) = self.overlay.engine() else {
            return Ok(());
        };
        let geometry = engine.geometry();
        for zone in geometry.zones() {
            let record = engine.record(zone);
            if !record.zrwa {
                continue;
            }
            let (mut at, end) = (geometry.data_end(zone, &record), geometry.end(zone));
            while at < end {
                let len = (end - at).min(CHUNK);
                let zeros = self.buffers[0].slice(0..len as usize);
                zeros.fill(0..len as usize, 0);
                self.write(at, zeros).await?;
                at += len;
            }
        }
        Ok(())
    }

    /// Compares the beginning of a range that the overlay has not; where that ended, and how much was copied.
    async fn piece(&self, range: Range<u64>) -> Result<(u64, u64), ToolError> {
        let at = range.start;
        let (old_zeros, new_zeros) = (
            self.old.zeros(&range).await?,
            match &self.new {
                Some(new) => new.zeros(&range).await?,
                None => range.end - at,
            },
        );
        // Zeros on both sides may be long.
        let both = old_zeros.min(new_zeros);
        if both > 0 {
            return Ok((at + both, 0));
        }
        // Whole clusters, where there are any: a part of one would be filled up from below.
        let end = range.end.min((at / CHUNK + 1) * CHUNK);
        let [old, new] = [&self.buffers[0], &self.buffers[1]].map(|buf| buf.slice(0..(end - at) as usize));
        self.old.fill(&old, at).await?;
        match &self.new {
            Some(contents) => contents.fill(&new, at).await?,
            None => new.fill(0..new.len(), 0),
        }
        let mut copied = 0;
        for run in differing_clusters(self.cluster, at, &old, &new) {
            self.write(at + run.start as u64, old.slice(run.clone())).await?;
            copied += run.len() as u64;
        }
        Ok((end, copied))
    }

    async fn write(&self, at: u64, buf: IoBuf) -> Result<(), ToolError> {
        if !is_zero(&buf) {
            return store(self.overlay, buf, at).await;
        }
        // Past the end of the present backing image the overlay reads as zeros without having any: it would not take
        // them, but for written ones.
        let end = at + buf.len() as u64;
        let split = self.shown.clamp(at, end);
        if at < split {
            zero(self.overlay, at..split).await?;
        }
        if split < end {
            store(self.overlay, buf.slice((split - at) as usize..buf.len()), split).await?;
        }
        Ok(())
    }
}
