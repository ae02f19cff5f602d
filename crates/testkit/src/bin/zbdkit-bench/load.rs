//! What else the machine was doing: a figure measured beside a compiler is not one.

use std::time::Instant;

use rustix::param::clock_ticks_per_second;

/// Processor time used so far, in ticks.
pub struct Load {
    all: u64,
    ours: u64,
    at: Instant,
}

impl Load {
    /// Reads the counters; `ours` are the processes that take part in the benchmark.
    pub fn now(ours: &[u32]) -> Self {
        let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let fields = stat.lines().next().unwrap_or_default().split_whitespace().skip(1);
        let numbers: Vec<u64> = fields.map_while(|f| f.parse().ok()).collect();
        // All but idle, iowait, and guest time (which is within user time).
        let busy = |(i, n): (usize, &u64)| if matches!(i, 0 | 1 | 2 | 5 | 6 | 7) { *n } else { 0 };
        Load {
            all: numbers.iter().enumerate().map(busy).sum(),
            ours: ours.iter().map(|&pid| process_ticks(pid)).sum(),
            at: Instant::now(),
        }
    }

    /// Processors that others used since `self`, on average.
    pub fn others_since(&self, ours: &[u32]) -> f64 {
        let now = Load::now(ours);
        let ticks = (now.all - self.all).saturating_sub(now.ours.saturating_sub(self.ours));
        ticks as f64 / clock_ticks_per_second() as f64 / self.at.elapsed().as_secs_f64()
    }
}

/// User and system time of a process with all its threads, kernel ones for its rings among them.
fn process_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything, so count from its end: fields 14 and 15 of proc(5).
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    rest.split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|f| f.parse::<u64>().ok())
        .sum()
}
