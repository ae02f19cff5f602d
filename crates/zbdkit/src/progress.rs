//! How far long work is.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// Where progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// A bar on stderr, where that is a terminal.
    Auto,
    /// Percents on stdout, in the form of `qemu-img -p`, which programs read.
    Percent,
    /// Nowhere.
    Never,
}

impl Show {
    /// What `-p` and `-q` ask for; `-q` wins, as in qemu-img.
    pub fn of(percent: bool, quiet: bool) -> Show {
        match (percent, quiet) {
            (_, true) => Show::Never,
            (true, false) => Show::Percent,
            (false, false) => Show::Auto,
        }
    }
}

/// A bar is drawn at most so often, and not for work that is done sooner.
const PACE: Duration = Duration::from_millis(200);
/// Characters between the brackets of a bar.
const WIDTH: u64 = 40;

/// Shows how far a piece of work is; what it drew goes when it is dropped.
pub struct Progress {
    show: Show,
    what: &'static str,
    next: Instant,
    /// What was drawn last, in tenths of a percent for a bar and hundredths for percents.
    drawn: Option<u64>,
}

impl Progress {
    /// Progress of `what`, such as "checking".
    pub fn new(show: Show, what: &'static str) -> Progress {
        let show = match show {
            Show::Auto if !io::stderr().is_terminal() => Show::Never,
            show => show,
        };
        let mut progress = Progress {
            show,
            what,
            next: Instant::now() + PACE,
            drawn: None,
        };
        if show == Show::Percent {
            progress.set(0, 1);
        }
        progress
    }

    /// `done` of `total` is done, in whatever unit.
    pub fn set(&mut self, done: u64, total: u64) {
        match self.show {
            Show::Never => {}
            Show::Percent => self.percent(share(done, total, 10_000)),
            Show::Auto if Instant::now() < self.next => {}
            Show::Auto => self.bar(share(done, total, 1000)),
        }
    }

    /// A reader that is gone is no reason to stop working, so failures to draw are passed over here and below.
    fn percent(&mut self, hundredths: u64) {
        if self.drawn.is_some_and(|drawn| hundredths <= drawn) {
            return;
        }
        self.drawn = Some(hundredths);
        let mut out = io::stdout().lock();
        let _ = write!(out, "    ({}.{:02}/100%)\r", hundredths / 100, hundredths % 100);
        let _ = out.flush();
    }

    fn bar(&mut self, thousandths: u64) {
        self.next = Instant::now() + PACE;
        if self.drawn == Some(thousandths) {
            return;
        }
        self.drawn = Some(thousandths);
        let _ = write!(io::stderr().lock(), "\r{}", bar(self.what, thousandths));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        match (self.show, self.drawn) {
            (Show::Percent, _) => {
                let _ = io::stdout().lock().write_all(b"\n");
            }
            (Show::Auto, Some(_)) => {
                // Back to the first column, and erase the line.
                let _ = io::stderr().lock().write_all(b"\r\x1b[K");
            }
            _ => {}
        }
    }
}

/// `done` of `total` in parts of `whole`; what has nothing to do is done.
fn share(done: u64, total: u64, whole: u64) -> u64 {
    if total == 0 {
        return whole;
    }
    (u128::from(done.min(total)) * u128::from(whole) / u128::from(total)) as u64
}

fn bar(what: &str, thousandths: u64) -> String {
    let full = (thousandths * WIDTH / 1000) as usize;
    format!(
        "{what} [{}{}] {:3}.{}%",
        "#".repeat(full),
        ".".repeat(WIDTH as usize - full),
        thousandths / 10,
        thousandths % 10
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_hold_for_any_numbers() {
        assert_eq!(share(1, 3, 1000), 333);
        assert_eq!(share(0, 0, 1000), 1000);
        assert_eq!(share(u64::MAX, u64::MAX, 10_000), 10_000);
        assert_eq!(share(7, 3, 1000), 1000, "more than all is all");
    }

    #[test]
    fn a_bar_keeps_its_width() {
        let empty = bar("checking", 0);
        assert_eq!(empty, format!("checking [{}]   0.0%", ".".repeat(40)));
        for thousandths in 0..=1000 {
            assert_eq!(bar("checking", thousandths).len(), empty.len());
        }
        assert!(bar("checking", 1000).contains(&"#".repeat(40)));
    }
}
