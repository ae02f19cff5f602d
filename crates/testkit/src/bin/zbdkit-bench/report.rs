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
    /// What is measured, what it is measured against.
    pub names: Names,
    /// Name of the better peer, by median.
    pub peer: Option<String>,
    pub zbdkit_iops: Option<f64>,
    pub peer_iops: Option<f64>,
    pub limit_iops: Option<f64>,
    /// Median over the rounds of zbdkit over the peer of the same round.
    pub zbdkit_to_peer: Option<f64>,
    /// The same of zbdkit over the limit: the file itself, or our own raw.
    pub zbdkit_to_limit: Option<f64>,
    /// The same of the peer over the limit.
    pub peer_to_limit: Option<f64>,
    /// Lowest ratio to the peer that this row must have.
    pub goal: f64,
    /// Lowest ratio to the limit that it must have, if any.
    pub limit_goal: Option<f64>,
    pub below_goal: bool,
}

/// Names of the targets of a table.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Names {
    /// What is measured.
    pub ours: &'static str,
    /// How the names of peers begin.
    pub peer: &'static str,
    /// What cannot be passed, or not by much.
    pub limit: &'static str,
}

/// Name of zbdkit's target.
pub const ZBDKIT: &str = "zbdkit";
/// Name of the target without a server.
pub const DIRECT: &str = "io_uring";
/// How the names of peers begin.
pub const PEER: &str = "qsd";

impl Row {
    /// A row of the table of raw images.
    pub fn new(workload: Workload, samples: Vec<(String, Vec<f64>)>) -> Self {
        let goal = if workload.block == 4096 && workload.depth == 32 {
            1.5
        } else {
            1.0
        };
        let names = Names {
            ours: ZBDKIT,
            peer: PEER,
            limit: DIRECT,
        };
        Row::named(workload.name(), workload, samples, names, goal, None)
    }

    /// A row of any table.
    pub fn named(
        name: String,
        workload: Workload,
        samples: Vec<(String, Vec<f64>)>,
        names: Names,
        goal: f64,
        limit_goal: Option<f64>,
    ) -> Self {
        let of = |name: &str| samples.iter().find(|(n, _)| n == name).map(|(_, s)| s.as_slice());
        let peers = samples.iter().filter(|(name, _)| name.starts_with(names.peer));
        let peer = peers.max_by(|a, b| median(&a.1).total_cmp(&median(&b.1)));
        let peer_samples = peer.map(|(_, s)| s.as_slice());
        let (zbdkit, limit) = (of(names.ours), of(names.limit));
        let zbdkit_to_peer = ratio(zbdkit, peer_samples);
        let zbdkit_to_limit = ratio(zbdkit, limit);
        let under = |ratio: Option<f64>, goal: f64| ratio.is_some_and(|ratio| ratio < goal);
        Row {
            workload,
            name,
            names,
            peer: peer.map(|(name, _)| name.clone()),
            zbdkit_iops: zbdkit.map(median),
            peer_iops: peer_samples.map(median),
            limit_iops: limit.map(median),
            zbdkit_to_peer,
            zbdkit_to_limit,
            peer_to_limit: ratio(peer_samples, limit),
            goal,
            limit_goal,
            below_goal: under(zbdkit_to_peer, goal)
                || limit_goal.is_some_and(|goal| under(zbdkit_to_limit, goal)),
            samples,
        }
    }

    fn flag(&self) -> String {
        if !self.below_goal {
            return String::new();
        }
        let limit = self
            .limit_goal
            .map(|goal| format!(" or {goal:.1}x {}", self.names.limit))
            .unwrap_or_default();
        format!("  <-- under {:.1}x{limit}", self.goal)
    }
}

/// The whole table as text; rows have the same names of targets.
pub fn table(rows: &[Row]) -> String {
    let Some(names) = rows.first().map(|row| row.names) else {
        return String::new();
    };
    let per_second = |name: &str| format!("{name}/s");
    let mut text = format!(
        "{:<26} {:>14} {:>10}  {:<18} {:>12} {:>8} {:>9} {:>10}\n",
        "workload",
        per_second(names.ours),
        "peer/s",
        "(peer)",
        per_second(names.limit),
        "to peer",
        "to limit",
        "peer/limit"
    );
    for row in rows {
        let iops = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.0}"));
        let times = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.2}x"));
        text += &format!(
            "{:<26} {:>14} {:>10}  {:<18} {:>12} {:>8} {:>9} {:>10}{}\n",
            row.name,
            iops(row.zbdkit_iops),
            iops(row.peer_iops),
            row.peer.as_deref().unwrap_or("-"),
            iops(row.limit_iops),
            times(row.zbdkit_to_peer),
            times(row.zbdkit_to_limit),
            times(row.peer_to_limit),
            row.flag()
        );
    }
    if rows.iter().any(|row| row.workload.kind == Kind::Append) {
        text += "In the append rows the peer and io_uring do sequential writes.\n";
    }
    let spread: Vec<f64> = rows
        .iter()
        .filter(|row| row.workload.kind == Kind::SpreadWrite)
        .filter_map(|row| row.zbdkit_iops)
        .collect();
    if let [first, .., last] = spread.as_slice() {
        text += &format!(
            "Spread writes into the largest image are at {:.2}x of those into the smallest.\n",
            last / first
        );
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
        assert_eq!(row.zbdkit_to_limit, Some(0.4));
        assert!(!row.below_goal);
    }

    #[test]
    fn a_row_may_have_a_goal_for_the_limit_too() {
        let samples = vec![
            ("zbdkit qcow2".to_string(), vec![80.0]),
            ("zbdkit raw".to_string(), vec![100.0]),
            ("qsd qcow2 threads".to_string(), vec![10.0]),
        ];
        let names = Names {
            ours: "zbdkit qcow2",
            peer: "qsd qcow2",
            limit: "zbdkit raw",
        };
        let row = |goal| {
            let workload = Workload {
                kind: Kind::RandomRead,
                block: 4096,
                depth: 1,
            };
            Row::named("row".into(), workload, samples.clone(), names, 1.2, goal)
        };
        assert!(!row(None).below_goal && !row(Some(0.8)).below_goal && row(Some(0.9)).below_goal);
        assert!(table(&[row(Some(0.9))]).contains("<-- under 1.2x or 0.9x zbdkit raw"));
    }

    #[test]
    fn rows_below_their_goal_are_flagged() {
        assert!(row(&[140.0, 140.0, 280.0], 32).below_goal);
        assert!(!row(&[140.0, 140.0, 280.0], 1).below_goal);
        assert!(row(&[99.0, 99.0, 198.0], 1).below_goal);
        assert!(table(&[row(&[99.0, 99.0, 198.0], 1)]).contains("<-- under 1.0x"));
    }
}
