//! Damage of a table: what was found, and how it is made good.

use std::fmt;

use super::*;
use crate::zoned::extensions::Slots;

/// What is wrong with a table that has a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// One copy of the header is damaged.
    Header,
    /// One copy of a block is damaged, the other one is used.
    Half {
        /// The block.
        index: u64,
        /// The generation of the other copy.
        generation: u64,
    },
    /// A block's first write was torn while an epoch was open.
    Torn {
        /// The block.
        index: u64,
    },
    /// Both copies of a block are damaged.
    Lost {
        /// The block.
        index: u64,
    },
    /// A zone's descriptor extension is not what its record says.
    Extension {
        /// The zone.
        zone: ZoneNo,
    },
    /// One copy of the list of marks is damaged, the other one is used.
    MarksHalf,
    /// Both are.
    MarksLost,
    /// The blocks are not those of the last clean close.
    Outdated,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Finding::Header => {
                f.write_str("one copy of the zone table's header is damaged; the other one is used")
            }
            Finding::Half { index, generation } => write!(
                f,
                "one copy of zone table block {index} is damaged; the other one (generation {generation}) is used"
            ),
            Finding::Torn { index } => {
                write!(
                    f,
                    "the first write of zone table block {index} was torn; it holds empty zones"
                )
            }
            Finding::Lost { index } => write!(f, "both copies of zone table block {index} are damaged"),
            Finding::Extension { zone } => TableError::ExtensionDamaged { zone: *zone }.fmt(f),
            Finding::MarksHalf => f.write_str(
                "one copy of the list of blocks that are marked uncorrectable is damaged; the other one is used",
            ),
            Finding::MarksLost => TableError::MarksLost.fmt(f),
            Finding::Outdated => TableError::Outdated.fmt(f),
        }
    }
}

/// A table as far as it can be read.
pub struct Salvaged {
    /// The table; blocks that are lost are as if they had never been written.
    pub table: Table,
    /// The zones that are not empty and untouched, ascending.
    pub records: BTreeMap<u32, ZoneRecord>,
    /// What is wrong with it.
    pub findings: Vec<Finding>,
}

impl Salvaged {
    /// Why the records cannot be believed as they are, if they cannot.
    pub fn unusable(&self) -> Option<TableError> {
        self.findings.iter().find_map(|finding| match finding {
            Finding::Lost { index } => Some(self.table.damaged(*index)),
            Finding::MarksLost => Some(TableError::MarksLost),
            Finding::Outdated => Some(TableError::Outdated),
            _ => None,
        })
    }

    /// Reads each descriptor extension that a record speaks of, and adds those to the findings that are damaged.
    pub async fn check_extensions(&mut self) -> Result<(), TableError> {
        let Some(slots) = Slots::of(&self.table) else {
            return Ok(());
        };
        for (zone, record) in &self.records {
            let (Some(checksum), zone) = (record.extension, ZoneNo(*zone)) else {
                continue;
            };
            match slots.checked(zone, checksum).await {
                Ok(_) => {}
                Err(TableError::ExtensionDamaged { zone }) => self.findings.push(Finding::Extension { zone }),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Takes damaged descriptor extensions out of the records of their zones: nothing has their bytes any more. Which zones
/// those are.
pub fn drop_damaged(findings: &[Finding], records: &mut BTreeMap<u32, ZoneRecord>) -> Vec<ZoneNo> {
    let mut dropped = Vec::new();
    for finding in findings {
        if let Finding::Extension { zone } = finding
            && let Some(record) = records.get_mut(&zone.0)
        {
            record.extension = None;
            dropped.push(*zone);
        }
    }
    dropped
}

/// The zones of a block.
pub fn zones_of(index: u64, nr_zones: u32) -> std::ops::Range<u32> {
    let first = (index as u32).saturating_mul(ENTRIES_PER_BLOCK);
    first.min(nr_zones)..first.saturating_add(ENTRIES_PER_BLOCK).min(nr_zones)
}

impl Table {
    /// Reads what can be read of the table in the `actual` bytes at `base` of a file.
    pub async fn salvage(file: File, base: u64, actual: u64) -> Result<Salvaged, TableError> {
        let mut findings = Vec::new();
        let header = read_header(&file, base, actual, &mut findings).await?;
        let nr_zones = header.nr_zones.get();
        let expected = table_size(nr_zones, extension_size(&header));
        if actual < expected {
            return Err(TableError::Truncated { actual, expected });
        }
        let generations = vec![0; blocks(nr_zones) as usize];
        let marks = KeptMarks::none(&header);
        let mut table = Table {
            file,
            base,
            header,
            generations,
            torn: Vec::new(),
            halves: Vec::new(),
            marks,
        };
        let records = table.load_blocks(&mut findings).await?;
        table.load_marks(&mut findings).await?;
        // Of which generation a list was that is lost, nobody knows.
        let clean = table.header.open == 0 && !findings.contains(&Finding::MarksLost);
        if clean && table.generation_sum() != table.header.generation_sum.get() {
            findings.push(Finding::Outdated);
        }
        Ok(Salvaged {
            table,
            records,
            findings,
        })
    }

    /// Makes both copies of what is damaged whole again, with these records of the zones, synced. An epoch that is open
    /// stays open.
    pub async fn mend(
        &mut self,
        findings: &[Finding],
        records: &BTreeMap<u32, ZoneRecord>,
    ) -> Result<(), TableError> {
        let nr_zones = self.header.nr_zones.get();
        let everything = findings.contains(&Finding::Outdated);
        for index in 0..self.generations.len() as u64 {
            let is = |finding: &Finding| match *finding {
                Finding::Half { index: at, .. }
                | Finding::Torn { index: at }
                | Finding::Lost { index: at } => at == index,
                Finding::Extension { zone } => u64::from(zone.0 / ENTRIES_PER_BLOCK) == index,
                Finding::Header | Finding::Outdated | Finding::MarksHalf | Finding::MarksLost => false,
            };
            let found = findings.iter().find(|finding| is(finding));
            let block: BTreeMap<u32, ZoneRecord> = zones_of(index, nr_zones)
                .map(|zone| (zone, records.get(&zone).copied().unwrap_or_default()))
                .collect();
            let unused = self.generations[index as usize] == 0 && block.values().all(is_default);
            match found {
                Some(Finding::Lost { .. } | Finding::Torn { .. }) => {
                    // The first copy that is written is number 1. Only then the other one goes: with one copy of zeros
                    // and one damaged, the block would pass for one that was never written.
                    self.write(&block).await?;
                    self.sync().await?;
                    self.write(&block).await?;
                    self.sync().await?;
                }
                Some(_) => {
                    self.write(&block).await?;
                    self.sync().await?;
                }
                None if everything && !unused => {
                    self.write(&block).await?;
                    self.sync().await?;
                }
                None => {}
            }
        }
        self.torn.clear();
        self.halves.clear();
        let marks = |finding: &Finding| {
            matches!(
                finding,
                Finding::MarksHalf | Finding::MarksLost | Finding::Outdated
            )
        };
        if findings.iter().any(marks) {
            self.mend_marks().await?;
        }
        let sum = self.generation_sum();
        for _ in 0..2 {
            self.update_header(|header| {
                if header.open == 0 {
                    header.generation_sum = sum.into();
                }
            })
            .await?;
            self.sync().await?;
        }
        Ok(())
    }
}

fn is_default(record: &ZoneRecord) -> bool {
    *record == ZoneRecord::default()
}
