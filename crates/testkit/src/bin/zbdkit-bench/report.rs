//! Medians, ratios, and how they are shown.

use serde::Serialize;

use crate::workload::{Kind, Workload};

/// One row, with a sample of each target for each round.
#[derive(Debug, Serialize)]
pub struct Row {
    pub workload: Workload,
    pub name: String,
    /// Names of the targets and their samples in operations a second, by round.
    pub samples: Vec<(String, Vec<f64>)>,
    /// Name of the better peer, by median.
    pub peer: Option<String>,
    pub zbdkit_iops: Option<f64>,
    pub peer_iops: Option<f64>,
    pub direct_iops: Option<f64>,
    /// Median over the rounds of zbdkit over the peer of the same round.
    pub zbdkit_to_peer: Option<f64>,
    /// The same of zbdkit over the file itself.
    pub zbdkit_to_direct: Option<f64>,
    /// The same of the peer over the file itself.
    pub peer_to_direct: Option<f64>,
    /// Lowest ratio to the peer that this row must have.
    pub goal: f64,
    pub below_goal: bool,
}

/// Name of zbdkit's target.
pub const ZBDKIT: &str = "zbdkit";
/// Name of the target without a server.
pub const DIRECT: &str = "io_uring";
/// How the names of peers begin.
pub const PEER: &str = "qsd";

impl Row {
    pub fn new(workload: Workload, samples: Vec<(String, Vec<f64>)>) -> Self {
        let of = |name: &str| samples.iter().find(|(n, _)| n == name).map(|(_, s)| s.as_slice());
        let peers = samples.iter().filter(|(name, _)| name.starts_with(PEER));
        let peer = peers.max_by(|a, b| median(&a.1).total_cmp(&median(&b.1)));
        let peer_samples = peer.map(|(_, s)| s.as_slice());
        let (zbdkit, direct) = (of(ZBDKIT), of(DIRECT));
        let goal = if workload.block == 4096 && workload.depth == 32 {
            1.5
        } else {
            1.0
        };
        let zbdkit_to_peer = ratio(zbdkit, peer_samples);
        Row {
            workload,
            name: workload.name(),
            peer: peer.map(|(name, _)| name.clone()),
            zbdkit_iops: zbdkit.map(median),
            peer_iops: peer_samples.map(median),
            direct_iops: direct.map(median),
            zbdkit_to_peer,
            zbdkit_to_direct: ratio(zbdkit, direct),
            peer_to_direct: ratio(peer_samples, direct),
            goal,
            below_goal: zbdkit_to_peer.is_some_and(|r| r < goal),
            samples,
        }
    }
}

/// The whole table as text.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<24} {:>10} {:>10}  {:<14} {:>10} {:>8} {:>9} {:>9}\n",
        "workload", "zbdkit/s", "peer/s", "(peer)", "io_uring/s", "to peer", "to limit", "peer/limit"
    );
    for row in rows {
        let iops = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.0}"));
        let times = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.2}x"));
        let flag = if row.below_goal {
            format!("  <-- under {:.1}x", row.goal)
        } else {
            String::new()
        };
        text += &format!(
            "{:<24} {:>10} {:>10}  {:<14} {:>10} {:>8} {:>9} {:>9}{flag}\n",
            row.name,
            iops(row.zbdkit_iops),
            iops(row.peer_iops),
            row.peer.as_deref().unwrap_or("-"),
            iops(row.direct_iops),
            times(row.zbdkit_to_peer),
            times(row.zbdkit_to_direct),
            times(row.peer_to_direct),
        );
    }
    if rows.iter().any(|row| row.workload.kind == Kind::Append) {
        text += "In the append rows the peer and io_uring do sequential writes.\n";
    }
    let below = rows.iter().filter(|row| row.below_goal).count();
    if rows.iter().any(|row| row.zbdkit_to_peer.is_some()) {
        text += &format!("{below} of {} rows below their goal.\n", rows.len());
    }
    text
}

/// Median of a list that is not empty; 0 of an empty one.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// Median of the ratios of paired samples.
fn ratio(over: Option<&[f64]>, under: Option<&[f64]>) -> Option<f64> {
    let ratios: Vec<f64> = over?.iter().zip(under?).map(|(a, b)| a / b).collect();
    (!ratios.is_empty()).then(|| median(&ratios))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(zbdkit: &[f64], depth: u32) -> Row {
        let samples = vec![
            (ZBDKIT.to_string(), zbdkit.to_vec()),
            ("qsd threads".to_string(), vec![90.0, 95.0, 80.0]),
            ("qsd io_uring".to_string(), vec![100.0, 100.0, 200.0]),
            (DIRECT.to_string(), vec![400.0, 400.0, 400.0]),
        ];
        Row::new(
            Workload {
                kind: Kind::RandomRead,
                block: 4096,
                depth,
            },
            samples,
        )
    }

    #[test]
    fn the_better_peer_counts_and_ratios_are_of_the_same_round() {
        let row = row(&[150.0, 160.0, 320.0], 32);
        assert_eq!(row.peer.as_deref(), Some("qsd io_uring"));
        assert_eq!(row.zbdkit_to_peer, Some(1.6));
        assert_eq!(row.zbdkit_to_direct, Some(0.4));
        assert!(!row.below_goal);
    }

    #[test]
    fn rows_below_their_goal_are_flagged() {
        assert!(row(&[140.0, 140.0, 280.0], 32).below_goal);
        assert!(!row(&[140.0, 140.0, 280.0], 1).below_goal);
        assert!(row(&[99.0, 99.0, 198.0], 1).below_goal);
        assert!(table(&[row(&[99.0, 99.0, 198.0], 1)]).contains("<-- under 1.0x"));
    }
}
