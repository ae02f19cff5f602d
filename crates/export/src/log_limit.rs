//! A limit for log lines that a guest or another peer can trigger at will.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lets a burst of lines through in each interval, and counts what it holds back.
#[derive(Debug)]
pub(crate) struct LogLimit {
    burst: u32,
    interval: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    since: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl LogLimit {
    /// At most `burst` lines in `interval`.
    pub(crate) const fn new(burst: u32, interval: Duration) -> Self {
        LogLimit {
            burst,
            interval,
            state: Mutex::new(State {
                since: None,
                lines: 0,
                suppressed: 0,
            }),
        }
    }

    /// Whether a line may be written now: `Some` with the number of lines that were held back before it.
    pub(crate) fn permit(&self) -> Option<u64> {
        self.permit_at(Instant::now())
    }

    fn permit_at(&self, now: Instant) -> Option<u64> {
        let mut state = self
            .state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if state
            .since
            .is_none_or(|since| now.duration_since(since) >= self.interval)
        {
            state.since = Some(now);
            state.lines = 0;
        }
        if state.lines == self.burst {
            state.suppressed += 1;
            return None;
        }
        state.lines += 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

/// A `tracing` warning under a [`LogLimit`].
macro_rules! limited_warn {
    ($limit:expr, $($rest:tt)*) => {
        if let Some(suppressed) = $limit.permit() {
            if suppressed > 0 {
                tracing::warn!("{suppressed} similar messages suppressed");
            }
            tracing::warn!($($rest)*);
        }
    };
}
pub(crate) use limited_warn;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_the_rest_is_counted_until_the_interval_is_over() {
        let limit = LogLimit::new(2, Duration::from_secs(10));
        let start = Instant::now();
        let at = |seconds| limit.permit_at(start + Duration::from_secs(seconds));
        assert_eq!([at(0), at(0), at(1), at(9)], [Some(0), Some(0), None, None]);
        assert_eq!([at(10), at(10), at(10)], [Some(2), Some(0), None]);
    }
}
