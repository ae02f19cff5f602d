//! What has run, and how it went.

use std::time::Instant;

use anyhow::{Result, ensure};

use crate::proc;
use crate::ui::say;

/// Names and outcomes of what has run.
#[derive(Debug, Default)]
pub struct Tally {
    passed: Vec<String>,
    failed: Vec<String>,
}

impl Tally {
    /// Runs one check, says how it went, and counts it.
    pub fn run(&mut self, name: &str, check: impl FnOnce() -> Result<()>) {
        let started = Instant::now();
        let outcome = check();
        let seconds = started.elapsed().as_secs_f32();
        match outcome {
            Ok(()) => {
                say(&format!("PASS {name} ({seconds:.1} s)"));
                self.passed.push(name.to_owned());
            }
            Err(error) => {
                say(&format!(
                    "FAIL {name} ({seconds:.1} s)\n{}",
                    proc::indent(&format!("{error:#}"))
                ));
                self.failed.push(name.to_owned());
            }
        }
    }

    /// Says how many passed and failed, and fails unless all did, and some ran.
    pub fn finish(self) -> Result<()> {
        say(&format!(
            "\n{} passed, {} failed",
            self.passed.len(),
            self.failed.len()
        ));
        ensure!(self.failed.is_empty(), "failed: {}", self.failed.join(", "));
        ensure!(
            !self.passed.is_empty(),
            "no job has that name; see cargo xtask test --list"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn a_run_without_any_job_and_a_run_with_a_failure_are_failures() {
        assert!(Tally::default().finish().is_err());
        let mut tally = Tally::default();
        tally.run("good", || Ok(()));
        tally.run("bad", || bail!("no"));
        assert!(tally.finish().unwrap_err().to_string().contains("bad"));
        let mut tally = Tally::default();
        tally.run("good", || Ok(()));
        assert!(tally.finish().is_ok());
    }
}
