//! Which clusters of the file hold metadata: data is never written there, and no two tables share one.

use std::collections::{BTreeMap, HashSet};
use std::hash::BuildHasherDefault;
use std::ops::Range;

use crate::l2::Mix;

/// Clusters that hold metadata.
#[derive(Default)]
pub struct Metadata {
    /// Tables of one cluster, and all that came since the opening.
    single: HashSet<u64, BuildHasherDefault<Mix>>,
    /// First and end of longer tables.
    runs: BTreeMap<u64, u64>,
}

impl Metadata {
    /// Whether a cluster holds metadata.
    pub fn contains(&self, cluster: u64) -> bool {
        self.single.contains(&cluster) || self.run_at(cluster).is_some()
    }

    /// The first cluster of a range that holds metadata.
    pub fn within(&self, range: &Range<u64>) -> Option<u64> {
        let single = if (self.single.len() as u64) < range.end - range.start {
            self.single
                .iter()
                .copied()
                .filter(|cluster| range.contains(cluster))
                .min()
        } else {
            range.clone().find(|cluster| self.single.contains(cluster))
        };
        let run = self.run_at(range.start).map(|_| range.start).or_else(|| {
            let (start, _) = self.runs.range(range.clone()).next()?;
            Some(*start)
        });
        single.into_iter().chain(run).min()
    }

    /// Adds a table that an image names. Fails with a cluster that holds another one. Long tables come first.
    pub fn add(&mut self, table: Range<u64>) -> Result<(), u64> {
        if let Some(cluster) = self.within(&table) {
            return Err(cluster);
        }
        if table.end - table.start == 1 {
            self.single.insert(table.start);
        } else if !table.is_empty() {
            self.runs.insert(table.start, table.end);
        }
        Ok(())
    }

    /// Adds clusters that were taken for metadata.
    pub fn extend(&mut self, clusters: impl IntoIterator<Item = u64>) {
        for cluster in clusters {
            if self.run_at(cluster).is_none() {
                self.single.insert(cluster);
            }
        }
    }

    /// Takes out clusters that hold no metadata any more.
    pub fn remove(&mut self, range: &Range<u64>) {
        if (self.single.len() as u64) < range.end - range.start {
            self.single.retain(|cluster| !range.contains(cluster));
        } else {
            range.clone().for_each(|cluster| {
                self.single.remove(&cluster);
            });
        }
        let first = self.run_at(range.start).map_or(range.start, |run| run.start);
        let touched: Vec<(u64, u64)> = self.runs.range(first..range.end).map(|(a, b)| (*a, *b)).collect();
        for (start, end) in touched {
            self.runs.remove(&start);
            for rest in [start..end.min(range.start), start.max(range.end)..end] {
                if !rest.is_empty() {
                    self.runs.insert(rest.start, rest.end);
                }
            }
        }
    }

    fn run_at(&self, cluster: u64) -> Option<Range<u64>> {
        let (start, end) = self.runs.range(..=cluster).next_back()?;
        (cluster < *end).then_some(*start..*end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_do_not_share_clusters() {
        let mut metadata = Metadata::default();
        metadata.add(10..20).unwrap();
        metadata.add(5..6).unwrap();
        assert_eq!(metadata.add(0..11), Err(5));
        assert_eq!(metadata.add(6..11), Err(10));
        assert_eq!(metadata.add(19..20), Err(19));
        assert_eq!(metadata.add(12..14), Err(12));
        metadata.add(20..21).unwrap();
        metadata.add(6..10).unwrap();
    }

    #[test]
    fn what_is_taken_out_is_out_and_the_rest_is_not() {
        let mut metadata = Metadata::default();
        metadata.add(10..20).unwrap();
        metadata.extend(18..25);
        metadata.remove(&(12..15));
        metadata.remove(&(19..22));
        let left: Vec<u64> = (0..30).filter(|cluster| metadata.contains(*cluster)).collect();
        assert_eq!(left, [10, 11, 15, 16, 17, 18, 22, 23, 24]);
    }
}
