//! What the user sees: headings, steps with their duration, progress on a terminal.

use std::io::{IsTerminal, Write};
use std::time::Instant;

/// A heading of the story.
pub fn heading(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = if out.is_terminal() {
        writeln!(out, "\n\x1b[1m== {text}\x1b[0m")
    } else {
        writeln!(out, "\n== {text}")
    };
    let _ = out.flush();
}

/// A line of explanation.
pub fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}");
    let _ = out.flush();
}

/// One piece of work under way, shown on standard error with its progress and, at its end, its duration.
#[derive(Debug)]
pub struct Step {
    what: String,
    started: Instant,
    terminal: bool,
}

impl Step {
    /// Announces the work.
    pub fn start(what: impl Into<String>) -> Step {
        let step = Step {
            what: what.into(),
            started: Instant::now(),
            terminal: std::io::stderr().is_terminal(),
        };
        if step.terminal {
            eprint!("  {} ...", step.what);
        } else {
            eprintln!("  {} ...", step.what);
        }
        step
    }

    /// Shows how far it is; on a terminal only, where it overwrites itself.
    pub fn progress(&self, how_far: &str) {
        if self.terminal {
            eprint!("\r\x1b[K  {} ... {how_far}", self.what);
        }
    }

    /// The work is done.
    pub fn done(self) {
        let seconds = self.started.elapsed().as_secs_f32();
        if self.terminal {
            eprintln!("\r\x1b[K  {} ... {seconds:.1} s", self.what);
        } else {
            eprintln!("  {} ... done in {seconds:.1} s", self.what);
        }
    }
}
