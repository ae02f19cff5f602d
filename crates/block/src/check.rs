//! Checking images, and repairing them: the format's metadata, and the zone table.
//!
//! The image is looked at without being opened: what is damaged need not open. A repair has the image for itself.

use std::sync::Arc;

use zbdkit_qcow2::{CheckReport, Repair};
use zbdkit_zone::ZoneNo;

use crate::error::OpenError;
use crate::graph::{Graph, OpenOptions};
use crate::host::Host;
use crate::node::{CrossZone, Lane, MapExtent, Node};
use crate::qcow2::ImageFormat;
use crate::zoned::{Finding, Records, Salvaged, Slots, Table, TableError, drop_damaged, zones_of};

/// What a check found.
#[derive(Clone, Debug)]
pub struct CheckOutcome {
    /// Format of the image.
    pub format: ImageFormat,
    /// What the format's own metadata is like; `None` where the format has none.
    pub report: Option<CheckReport>,
    /// What the zones are like, if there are any.
    pub zones: Option<ZoneCheck>,
}

/// What a check found of an image's zones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ZoneCheck {
    /// Faults that are there (still, after a repair).
    pub errors: u64,
    /// Faults that were repaired.
    pub fixed: u64,
    /// What was found and done, in words.
    pub messages: Vec<String>,
}

/// Why an image could not be checked.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// A raw disk without zones: there is nothing that could be wrong with it.
    #[error("This image format does not support checks")]
    NothingToCheck,
    /// The image could not be opened or read.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// Most lines about zones.
const MAX_MESSAGES: usize = 1000;

impl ZoneCheck {
    pub(crate) fn say(&mut self, message: String) {
        match self.messages.len() {
            ..MAX_MESSAGES => self.messages.push(message),
            MAX_MESSAGES => self.messages.push("and more".into()),
            _ => {}
        }
    }

    pub(crate) fn error(&mut self, message: String) {
        self.errors += 1;
        self.say(format!("ERROR {message}"));
    }

    /// Everything that was found is repaired.
    pub(crate) fn all_fixed(&mut self) {
        self.fixed += std::mem::take(&mut self.errors);
    }
}

/// Checks an image, and repairs what `repair` says. `progress` is told what is done, and of how much.
pub async fn check(
    host: &Arc<dyn Host>,
    graph: &Graph,
    options: &OpenOptions,
    repair: Repair,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CheckOutcome, CheckError> {
    let options = OpenOptions {
        read_only: repair == Repair::None,
        ..options.clone()
    };
    match graph.format(host, &options).await? {
        ImageFormat::Qcow2 => Ok(graph.check_qcow2(host, &options, repair, progress).await?),
        ImageFormat::Raw => Ok(CheckOutcome {
            format: ImageFormat::Raw,
            report: None,
            zones: Some(check_sidecar(host, graph, &options, repair).await?),
        }),
    }
}

async fn check_sidecar(
    host: &Arc<dyn Host>,
    graph: &Graph,
    options: &OpenOptions,
    repair: Repair,
) -> Result<ZoneCheck, CheckError> {
    let Some(files) = graph.open_parts(host, options).await? else {
        return Err(CheckError::NothingToCheck);
    };
    let path = files.sidecar.display();
    let mut found = ZoneCheck::default();
    let len = files
        .table
        .len()
        .map_err(|e| OpenError::file(&files.sidecar, "cannot be looked at", e))?;
    let salvaged = match Table::salvage(files.table.clone(), 0, len).await {
        Ok(mut salvaged) => match salvaged.check_extensions().await {
            Ok(()) => salvaged,
            Err(error) => {
                found.error(format!("{path}: {error}"));
                return Ok(found);
            }
        },
        Err(error) => {
            found.error(format!("{path}: {error}"));
            return Ok(found);
        }
    };
    tell(&salvaged, &mut found);
    let size = files.data.limits().size;
    let expected = salvaged.table.header().size.get();
    if size != expected {
        found.error(format!(
            "the image has {size} bytes, its zone table describes {expected}"
        ));
    }
    if repair == Repair::All && found.errors > 0 && size == expected {
        let Salvaged {
            mut table,
            mut records,
            findings,
        } = salvaged;
        drop_extensions("", &findings, &mut records, &mut found);
        if findings.contains(&Finding::Outdated) {
            found.say(
                "write pointers are those of the older copies: what lies above them is not shown any more"
                    .into(),
            );
            tell_forgotten(&table, &mut found)
                .await
                .map_err(|e| crate::zoned::Place::Sidecar(files.sidecar.clone()).table_error(e))?;
        }
        rebuild_lost(&findings, &table, &mut records, &*files.data, &mut found)
            .await
            .map_err(OpenError::from)?;
        tell_lost_marks(&findings, &mut found);
        let mended = table.mend(&findings, &records).await;
        mended.map_err(|e| crate::zoned::Place::Sidecar(files.sidecar.clone()).table_error(e))?;
        found.all_fixed();
    }
    Ok(found)
}

/// What is wrong with a table. While an epoch is open, a torn copy is what a power cut leaves, and no fault.
pub(crate) fn tell(salvaged: &Salvaged, found: &mut ZoneCheck) {
    let header = salvaged.table.header();
    let open = header.open != 0;
    if open {
        found.say(format!(
            "epoch {} of the image was not closed: the next opening for writing recovers it",
            header.epoch.get()
        ));
    }
    for finding in &salvaged.findings {
        match finding {
            Finding::Half { .. } | Finding::Torn { .. } | Finding::Header | Finding::MarksHalf if open => {
                found.say(finding.to_string())
            }
            _ => found.error(finding.to_string()),
        }
    }
}

/// Takes damaged descriptor extensions out of the records, and says so. `whose` is put before it.
pub(crate) fn drop_extensions(
    whose: &str,
    findings: &[Finding],
    records: &mut Records,
    found: &mut ZoneCheck,
) {
    for zone in drop_damaged(findings, records) {
        found.say(format!(
            "{whose}zone {zone}: its descriptor extension is damaged and dropped"
        ));
    }
}

/// What is lost with the newest copies of an outdated table, besides write pointers. What an operation set is in both copies
/// of its block once the image was closed, so it is lost only where no copy is left.
pub(crate) async fn tell_forgotten(table: &Table, found: &mut ZoneCheck) -> Result<(), TableError> {
    found.say(
        "with the lost copies go counters of bytes written, and where no copy of a block is left all counters, descriptor \
         extensions, random write areas, attributes, and which zones were finished, made read-only or offline"
            .into(),
    );
    let Some(slots) = Slots::of(table) else {
        return Ok(());
    };
    for zone in (0..table.header().nr_zones.get()).filter(|zone| !table.has_copy(*zone)) {
        // A slot keeps its bytes when its zone is reset.
        if slots.read(ZoneNo(zone)).await?.iter().any(|byte| *byte != 0) {
            found.say(format!(
                "zone {zone}: it has lost its descriptor extension, unless it was reset since it got one"
            ));
        }
    }
    Ok(())
}

/// Says what a repair cannot bring back.
pub(crate) fn tell_lost_marks(findings: &[Finding], found: &mut ZoneCheck) {
    if findings.contains(&Finding::MarksLost) {
        found.say(
            "nothing tells any more which blocks were marked uncorrectable: none are, and what lies there can be read".into(),
        );
    }
}

/// The last resort: written ends of zones whose records nothing holds any more, from where their data ends.
pub(crate) async fn rebuild_lost(
    findings: &[Finding],
    table: &Table,
    records: &mut Records,
    node: &dyn Node,
    found: &mut ZoneCheck,
) -> Result<(), crate::error::Error> {
    for finding in findings {
        if let Finding::Lost { index } = finding {
            for zone in zones_of(*index, table.header().nr_zones.get()) {
                rebuild(zone, table, records, node, found).await?;
            }
        }
    }
    Ok(())
}

/// Sets the written end of one zone to where its data ends.
pub(crate) async fn rebuild(
    zone: u32,
    table: &Table,
    records: &mut Records,
    node: &dyn Node,
    found: &mut ZoneCheck,
) -> Result<(), crate::error::Error> {
    let header = table.header();
    if zone < header.nr_conventional.get() {
        return Ok(());
    }
    let start = u64::from(zone) * header.zone_size.get();
    let end = (start + header.zone_capacity.get()).min(header.size.get());
    let written = data_end(node, start, end, header.block_size.get().into()).await? - start;
    records.insert(
        zone,
        zbdkit_zone::ZoneRecord {
            written,
            ..Default::default()
        },
    );
    found.say(format!(
        "zone {zone}: nothing tells its write pointer any more; it is set to {:#x}, behind the last data that is not zeros",
        start + written
    ));
    Ok(())
}

/// Where the last block of a range ends that does not read as zeros; its start if there is none.
pub(crate) async fn data_end(
    node: &dyn Node,
    start: u64,
    end: u64,
    block: u64,
) -> Result<u64, crate::error::Error> {
    const PIECE: u64 = 1 << 20;
    let mut data: Vec<std::ops::Range<u64>> = Vec::new();
    let mut at = start;
    while at < end {
        let MapExtent { len, zero, .. } = node.map(at, end - at).await?;
        if !zero {
            data.push(at..at + len);
        }
        at += len.max(1);
    }
    let lane = Lane::new(None, 0);
    for range in data.into_iter().rev() {
        let mut stop = range.end;
        while stop > range.start {
            let first = stop.saturating_sub(PIECE).max(range.start);
            let buf = zbdkit_io::IoBuf::alloc((stop - first) as usize);
            node.read(&lane, buf.clone(), first, CrossZone::Allow).await?;
            if let Some(last) = buf.to_vec().iter().rposition(|byte| *byte != 0) {
                return Ok((first + last as u64 + 1).next_multiple_of(block).min(end));
            }
            stop = first;
        }
    }
    Ok(start)
}

/// The files of a raw image with zones.
pub(crate) struct Parts {
    pub sidecar: std::path::PathBuf,
    pub table: zbdkit_io::File,
    pub data: Arc<dyn Node>,
}
