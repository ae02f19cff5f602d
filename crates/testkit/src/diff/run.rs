//! Many sequences, on some threads; failures made short.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result, anyhow};
use zbdkit_io::{Runtime, RuntimeOptions};

use super::hand::Hand;
use super::ours::Ours;
use super::program::Program;
use super::sequence::{Counts, Plan, Sequence, Skipped};
use super::tools::Tools;
use super::zoned::Zoned;

/// One sequence in so many has zones.
const ZONED: u64 = 8;

/// What is to be run.
#[derive(Debug, Clone)]
pub struct Options {
    /// QEMU's tools.
    pub tools: Tools,
    /// Where images are made; below it each thread has a directory.
    pub directory: PathBuf,
    /// Seed of the first sequence; the next ones follow.
    pub seed: u64,
    /// Sequences.
    pub count: u64,
    /// Threads.
    pub jobs: usize,
    /// Runs of a failing sequence to make it short.
    pub shrink: u32,
    /// Ends with so many failures.
    pub most_failures: usize,
    /// The zbdkit program, if it is to take part.
    pub zbdkit: Option<PathBuf>,
    /// QEMU works alone, which shows whether the comparison itself is right.
    pub qemu_only: bool,
    /// Left out of every sequence.
    pub skip: BTreeSet<Skipped>,
}

/// What was found.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The sequence.
    pub seed: u64,
    /// What was left out of it without the failure going away.
    pub skip: BTreeSet<Skipped>,
    /// What is wrong.
    pub what: String,
    /// What was done.
    pub trace: Vec<String>,
    /// The images, if they were kept.
    pub kept: PathBuf,
}

impl Failure {
    /// The arguments that play it again.
    pub fn replay(&self) -> String {
        let part = |(step, op): &Skipped| match op {
            Some(op) => format!("{step}.{op}"),
            None => step.to_string(),
        };
        let skip: Vec<String> = self.skip.iter().map(part).collect();
        let mut arguments = format!("--seed {} --count 1", self.seed);
        if !skip.is_empty() {
            arguments += &format!(" --skip {}", skip.join(","));
        }
        arguments
    }
}

/// How it went.
#[derive(Debug, Clone, Default)]
pub struct Summary {
    /// Sequences that ran to their end.
    pub passed: u64,
    /// What was done in all.
    pub counts: Counts,
    /// Those that did not.
    pub failures: Vec<Failure>,
}

/// Runs sequences; `say` is told of each failure and now and then of the progress.
///
/// # Errors
/// When a thread cannot work at all.
pub fn run(options: &Options, say: &(dyn Fn(&str) + Sync)) -> Result<Summary> {
    let summary = Mutex::new(Summary::default());
    let next = AtomicU64::new(0);
    let enough = AtomicBool::new(false);
    let worker = |job: usize| -> Result<()> {
        while !enough.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= options.count {
                break;
            }
            let plan = Plan {
                seed: options.seed.wrapping_add(number),
                skip: options.skip.clone(),
                damage: None,
            };
            let directory = options.directory.join(format!("job{job}"));
            let ran = attempt(options, &plan, &directory)?;
            let failure = ran
                .error
                .as_ref()
                .map(|error| shorten(options, &plan, &directory, error))
                .transpose()?;
            let mut summary = summary.lock().expect("nobody panics with it");
            for (what, (done, refused)) in &ran.counts {
                let entry = summary.counts.entry(*what).or_default();
                entry.0 += done;
                entry.1 += refused;
            }
            match failure {
                Some(failure) => {
                    say(&told(&failure));
                    summary.failures.push(failure);
                    enough.fetch_or(summary.failures.len() >= options.most_failures, Ordering::Relaxed);
                }
                None => summary.passed += 1,
            }
            let ran = summary.passed + summary.failures.len() as u64;
            if ran.is_multiple_of(100) {
                say(&format!("{ran} of {} sequences", options.count));
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..options.jobs.max(1))
            .map(|job| scope.spawn(move || worker(job)))
            .collect();
        threads.into_iter().try_for_each(|thread| {
            thread
                .join()
                .unwrap_or_else(|_| Err(anyhow!("a thread panicked")))
        })
    })?;
    Ok(summary.into_inner().expect("nobody panics with it"))
}

/// How one run of a sequence went.
#[derive(Debug)]
pub struct Ran {
    /// What is wrong.
    pub error: Option<String>,
    /// What was done.
    pub trace: Vec<String>,
    /// The same in numbers.
    pub counts: Counts,
    /// What can be left out.
    pub parts: Vec<Skipped>,
}

/// Runs a sequence in `directory`, which is emptied first.
///
/// # Errors
/// When the directory cannot be made.
pub fn attempt(options: &Options, plan: &Plan, directory: &Path) -> Result<Ran> {
    if directory.exists() {
        std::fs::remove_dir_all(directory)?;
    }
    std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let qemu = Program::qemu(options.tools.clone());
    if plan.seed % ZONED == ZONED - 1 && !options.qemu_only && plan.damage.is_none() {
        return zoned(plan.seed, directory, &qemu);
    }
    let mut hands: Vec<Box<dyn Hand>> = vec![Box::new(qemu.clone())];
    if !options.qemu_only {
        hands.push(Box::new(Ours::new(plan.seed, qemu.clone())?));
        if let Some(zbdkit) = &options.zbdkit {
            hands.push(Box::new(Program::zbdkit(zbdkit)));
        }
    }
    let mut sequence = Sequence::new(plan, directory, &mut hands, qemu)?;
    let error = match catch_unwind(AssertUnwindSafe(|| sequence.run())) {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(format!("{error:#}")),
        Err(panic) => Some(format!("panicked: {}", text_of(&*panic))),
    };
    Ok(Ran {
        error,
        trace: std::mem::take(&mut sequence.world.trace),
        counts: std::mem::take(&mut sequence.counts),
        parts: std::mem::take(&mut sequence.parts),
    })
}

/// A sequence of an image with zones. There is nothing to leave out.
fn zoned(seed: u64, directory: &Path, qemu: &Program) -> Result<Ran> {
    let runtime = Runtime::new(RuntimeOptions::default())?;
    let mut ran = Ran {
        error: None,
        trace: Vec::new(),
        counts: Counts::from([(("zbdkit", "zoned"), (1, 0))]),
        parts: Vec::new(),
    };
    let run = || -> Result<()> {
        let mut zoned = Zoned::new(seed, directory, &runtime)?;
        let result = zoned.run(qemu);
        ran.trace = zoned.trace();
        result
    };
    ran.error = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.err().map(|error| format!("{error:#}")),
        Err(panic) => Some(format!("panicked: {}", text_of(&*panic))),
    };
    Ok(ran)
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("with something that is no text")
}

/// Leaves out of a failing sequence what it fails without, in large pieces first, and keeps the images of what is left.
fn shorten(options: &Options, plan: &Plan, directory: &Path, first: &str) -> Result<Failure> {
    let scratch = directory.with_extension("shorter");
    let mut plan = plan.clone();
    let mut budget = options.shrink;
    for whole_steps in [true, false] {
        let mut piece = usize::MAX;
        while piece > 1 {
            let parts: Vec<Skipped> = attempt(options, &plan, &scratch)?
                .parts
                .into_iter()
                .filter(|(_, op)| op.is_none() == whole_steps)
                .collect();
            piece = piece.min(parts.len()).div_ceil(2).max(1);
            let mut parts = parts.as_slice();
            while !parts.is_empty() && budget > 0 {
                let rest = parts.len().saturating_sub(piece);
                let mut shorter = plan.clone();
                shorter.skip.extend(&parts[rest..]);
                parts = &parts[..rest];
                budget -= 1;
                if attempt(options, &shorter, &scratch)?.error.is_some() {
                    plan = shorter;
                }
            }
        }
    }
    let _ = std::fs::remove_dir_all(&scratch);
    let kept = options.directory.join(format!("failed{}", plan.seed));
    let ran = attempt(options, &plan, &kept)?;
    Ok(Failure {
        seed: plan.seed,
        skip: plan.skip,
        what: ran
            .error
            .unwrap_or_else(|| format!("once, and not when it was played again: {first}")),
        trace: ran.trace,
        kept,
    })
}

/// A failure for people.
fn told(failure: &Failure) -> String {
    format!(
        "FAILED: sequence {}: {}\n  {}\n  again: cargo xtask diff -- {}\n  the images are in {}",
        failure.seed,
        failure.what,
        failure.trace.join("\n  "),
        failure.replay(),
        failure.kept.display()
    )
}
